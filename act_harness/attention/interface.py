"""The seam: one name, registered with transformers for attention and for masks together.

A name known only to ``AttentionInterface`` is given no mask at all by transformers 5 and attends
to the future; hence :func:`register`. The registered function is global to the process, so it
holds no settings: it looks at the attention *module* it is called for, and a module without a
binding is served by the stock kernel.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, cast

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from act_harness.attention.packing import PackedLayer, active_packing
from act_harness.engines.operation import AttentionCall, Stock
from act_harness.errors import UnsupportedCallError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from transformers import PretrainedConfig

__all__ = [
    "BASES",
    "BINDING",
    "Run",
    "Seen",
    "attend",
    "base_of",
    "interface_name",
    "recording",
    "register",
    "stock_kernel",
]

BASES = ("sdpa", "eager")
"""Stock kernels that calibration can build on."""

BINDING = "_act_harness_binding"
"""Attribute of an attention module that carries what to do there."""

_PREFIX = "act_harness_"

Run: TypeAlias = "Callable[..., tuple[Tensor, Tensor | None]]"
"""A model's own attention: (query, key, value, mask) to output (B, C, H, D) and maps or None."""


class BoundLayer(PackedLayer, Protocol):
    """What :data:`BINDING` holds."""

    def attend(
        self,
        call: AttentionCall,
        mask: Tensor | None,
        *,
        stock: Stock,
        stock_maps: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """Return the calibrated attention output, (B, C, H, D), and what the stock kernel would.

        That is the maps, (B, H, C, K), where they are asked for and the kernel has them.
        """
        ...


class Seen(NamedTuple):
    """One call of a layer's attention during a probe."""

    module: nn.Module
    layer: int | None
    call: AttentionCall
    mask: Tensor | None
    output: Tensor
    """(B, C, H, D), the stock model's."""


_recorder: list[Seen] | None = None


@contextmanager
def recording() -> Iterator[list[Seen]]:
    """Collect every call of the interface inside the block (used by the probe only)."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def interface_name(base: str) -> str:
    """Return the name under which calibrated attention over kernel ``base`` is registered."""
    return _PREFIX + base


def base_of(implementation: str | None) -> str:
    """Return the stock kernel of an attention implementation name."""
    return str(implementation).removeprefix(_PREFIX)


def stock_kernel(config: PretrainedConfig) -> str:
    """Return the stock kernel that a decoder of this configuration runs.

    Raises:
        UnsupportedModelError: calibration does not build on it.
    """
    base = base_of(config._attn_implementation)
    if base.startswith("paged|"):
        raise UnsupportedCallError(
            "continuous batching keeps the keys of all sequences in pages, where calibration "
            "cannot follow them; use generate() while attention is calibrated"
        )
    if base not in BASES:
        raise UnsupportedModelError(
            f"the model runs attention {base!r}, calibration builds on {' or '.join(BASES)}; "
            "load it with attn_implementation=sdpa, or eager where it has learned sink logits"
        )
    return base


def register(base: str) -> str:
    """Register attention and mask of one base kernel under one name, and return the name."""
    name = interface_name(base)
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():

        def mask(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            # packed sequences are kept apart by the attention itself
            return None if active_packing() else ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)

        AttentionMaskInterface.register(name, mask)
        AttentionInterface.register(name, partial(_attend, base))
    return name


def _stock_function(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the model's own attention function for this kernel."""
    if base == "eager":
        found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if found is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no eager attention of its own; "
                "load the model with attn_implementation=sdpa"
            )
        return found  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]


def _attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,  # noqa: ANN401 - whatever the model passes on
) -> tuple[Tensor, Tensor | None]:
    """Serve transformers' call: the stock kernel, corrected where the module is bound."""
    run = partial(_stock_function(base, module), module, **kwargs)
    if not _concerns(module) and _recorder is None:
        return run(query, key, value, attention_mask)
    given = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if given is None else float(given)
    call = AttentionCall(
        query,
        key,
        value,
        scale,
        kwargs.get("softcap"),
        kwargs.get("position_bias"),
        sink_logits=_sink_logits(base, module, kwargs),
    )
    return _serve(
        module,
        call,
        attention_mask,
        layer=getattr(module, "layer_idx", None),
        run=run,
        kernel=base,
        dropout=kwargs.get("dropout") or 0.0,
    )


def _sink_logits(base: str, module: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """Return (B or 1, H, C or 1) the sink logits of a layer; None where it has none.

    Raises:
        UnsupportedModelError: the kernel would leave them out, as torch's sdpa does.
    """
    of_heads, of_rows = arguments.get("s_aux"), arguments.get("sinks")  # the latter is Inkling 2's
    found: Tensor | None = None
    if of_heads is not None:
        found = of_heads[None, :, None]
    elif of_rows is not None:
        found = of_rows[..., 0]
    if found is not None and base != "eager":
        raise UnsupportedModelError(
            f"{type(module).__name__} has learned sink logits, which kernel {base!r} leaves out; "
            "load the model with attn_implementation=eager"
        )
    return found


def attend(
    module: nn.Module,
    call: AttentionCall,
    mask: Tensor | None,
    *,
    layer: int,
    run: Run,
    kernel: str,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Serve a layer that does not use the interface (:mod:`act_harness.attention.families`).

    Args:
        module: the attention module.
        call: what it is to compute.
        mask: the model's mask, (B or 1, 1, C, K) bool or additive; None where causal.
        layer: its number.
        run: the model's own attention on (query, key, value, mask): output (B, C, H, D) and maps.
        kernel: which one that is, ``sdpa`` or ``eager``.
        dropout: what falls on the attention maps in this call.

    Returns:
        What ``run`` does, corrected where the module is bound.
    """
    return _serve(module, call, mask, layer=layer, run=run, kernel=kernel, dropout=dropout)


def _serve(
    module: nn.Module,
    call: AttentionCall,
    mask: Tensor | None,
    *,
    layer: int | None,
    run: Run,
    kernel: str,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Return a layer's attention, stock or corrected, and let a probe see it."""
    if _concerns(module):
        found = _correct(module, call, mask, run=run, kernel=kernel, dropout=dropout)
    else:
        found = run(call.query, call.key, call.value, mask)
    if _recorder is not None:
        _recorder.append(Seen(module, layer, call, mask, found[0]))
    return found


def _concerns(module: nn.Module) -> bool:
    """Whether a call is more than stock attention: its module is bound, or its row is packed."""
    return BINDING in module.__dict__ or active_packing() is not None  # getattr would be slow


def _correct(
    module: nn.Module,
    call: AttentionCall,
    mask: Tensor | None,
    *,
    run: Run,
    kernel: str,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Return what the binding of a module, or the packing of its row, makes of its attention."""
    binding: BoundLayer | None = module.__dict__.get(BINDING)
    packing = active_packing()
    if binding is not None and dropout:
        raise UnsupportedCallError(
            f"attention dropout {dropout} (training mode) would fall on stock heads only; call "
            "model.eval(), or set the attention's dropout to 0 in the model's configuration"
        )
    if packing is not None:
        if call.by_position:
            raise UnsupportedCallError(
                "attention with logits by position (as ALiBi) takes a packed row for one sequence; "
                "score this model in padded batches"
            )
        return packing.attend(call, binding=binding, run=lambda *given: run(*given)[0]), None
    given = (call.query, call.key, call.value, mask)
    return cast("BoundLayer", binding).attend(
        call,
        mask,
        stock=Stock(lambda: run(*given)[0], kernel),
        stock_maps=lambda: run(*given)[1],
    )
