"""What a calibrated decoder's forward was asked for, and what it is not to be asked for."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from act_harness.attention.cache import find_cache
from act_harness.errors import UnsupportedCallError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = [
    "as_the_caller_gave",
    "forward_arguments",
    "named_arguments",
    "read_shape",
    "refuse_tracing",
    "refuse_unsupported_forward",
    "wants_maps",
]

_FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "max_length_q", "max_length_k")
"""Arguments that say where the sequences of a flattened batch begin (padding-free training)."""

_MEDIA = ("pixel", "image", "video", "audio", "input_features", "mm_encoder")
"""How arguments begin that are no text."""

_APART = "give every prompt its own row of the batch, with an attention_mask for the pads"


def named_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name, however they were given.

    Raises:
        TypeError: the function does not take them.
    """
    given = inspect.signature(function).bind(*args, **kwargs)
    named = dict(given.arguments)
    for parameter in given.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def forward_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a decoder's forward by name, however they were given."""
    return named_arguments(module.forward, args, kwargs) if args else kwargs


def as_the_caller_gave(given: dict[str, Any], caller: dict[str, Any] | None) -> dict[str, Any]:
    """Return a decoder's arguments with those that a composite model made anew as it got them.

    Gemma 3 hands its decoder embeddings and a mask for each kind of layer, Qwen-VL positions of
    three axes; which tokens are pads, and what they are, only the caller's arguments say.

    Args:
        given: the decoder's arguments by name.
        caller: those of the model around it; None where the decoder was called by itself.

    Raises:
        UnsupportedCallError: that model's masks let images see later tokens.
    """
    if caller is None:
        return given
    found = dict(given)
    if isinstance(given.get("attention_mask"), dict):
        _refuse_media(caller)
        found["attention_mask"] = caller.get("attention_mask")
    ids, embedded = caller.get("input_ids"), given.get("inputs_embeds")
    if given.get("input_ids") is None and embedded is not None and ids is not None:
        found["input_ids"] = ids if ids.shape == embedded.shape[:2] else None
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim != 2:
        found["position_ids"] = caller.get("position_ids")
    return found


def _refuse_media(caller: dict[str, Any]) -> None:
    named = [name for name, one in caller.items() if name.startswith(_MEDIA) and _holds(one)]
    kinds = [caller.get(name) for name in ("token_type_ids", "mm_token_type_ids")]
    if named or any(isinstance(one, Tensor) and bool(one.any()) for one in kinds):
        raise UnsupportedCallError(
            f"the tokens of an image ({', '.join(named) or 'token_type_ids'}) see later ones in "
            "this model, and calibration is defined over earlier tokens; give text alone, or "
            "detach first"
        )


def _holds(value: object) -> bool:
    """Whether an argument is there; ``generate`` gives a mapping of nothing for no image."""
    values = value.values() if isinstance(value, dict) else [value]
    return any(one is not None for one in values)


def read_shape(given: dict[str, Any]) -> tuple[int, int]:
    """Return sequences and tokens of each."""
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None:
        raise UnsupportedCallError("a calibrated forward needs input_ids or inputs_embeds")
    batch, rows = tokens.shape[:2]
    return batch, rows


def wants_maps(module: nn.Module, given: dict[str, Any]) -> bool:
    """Whether attention maps are to be returned, as transformers' own forward decides it."""
    asked = given.get("output_attentions")
    return bool(getattr(module.config, "output_attentions", False) if asked is None else asked)


def refuse_tracing() -> None:
    """Refuse a forward that is traced into one graph, as its first statement.

    Where the graph may break (``torch.compile`` without ``fullgraph``), it breaks here, and the
    calibrated layers run as they are.

    Raises:
        UnsupportedCallError: it is traced.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedCallError(
            "calibrated attention cannot be traced (torch.compile with fullgraph=True, "
            "torch.export): which columns are sinks depends on values; run the model eagerly"
        )


def refuse_unsupported_forward(module: nn.Module, given: dict[str, Any], *, packed: bool) -> None:
    """Check a forward before any layer runs.

    Args:
        module: the decoder.
        given: its arguments by name.
        packed: whether the row of tokens is one of this package's own packings.

    Raises:
        UnsupportedCallError: the forward is checkpointed, holds several prompts in a
            row, or has a mask that does not say which tokens are pads.
    """
    if module.training and _is_checkpointed(module):
        raise UnsupportedCallError(
            "gradient checkpointing runs layers again outside the forward that calibrates them; "
            "call model.gradient_checkpointing_disable() while attention is calibrated"
        )
    if packed:
        return
    _refuse_mask(given.get("attention_mask"), find_cache((), given))
    named = [name for name in _FLATTENED if given.get(name) is not None]
    if named:
        raise UnsupportedCallError(
            f"{named[0]} says that a row holds several sequences, and calibration would take them "
            f"for one prompt; {_APART}"
        )
    _refuse_restarts(given.get("position_ids"), given.get("attention_mask"))


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on; transformers' own property has changed its name."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def _refuse_mask(mask: object, cache: object) -> None:
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return
    if isinstance(cache, StaticCache):
        raise UnsupportedCallError(
            "generate() expands the attention_mask for a static cache, and calibration needs to "
            "know the pads; leave out cache_implementation and past_key_values (the default "
            "dynamic cache)"
        )
    raise UnsupportedCallError(
        "calibration needs the 2-dimensional attention_mask (batch, tokens) to know the "
        "pads, got one that was expanded already; pass the 2-dimensional one"
    )


def _refuse_restarts(positions: object, mask: Tensor | None) -> None:
    """Refuse a row whose positions do not count its tokens: it holds more than one sequence.

    Looks at values, which an accelerator is waited for, only where a call has several rows.
    """
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return
    broken = positions[:, 1:] - positions[:, :-1] != 1
    if mask is not None:  # what pads are given does not matter
        real = mask[:, -positions.shape[1] :].to(device=positions.device, dtype=torch.bool)
        broken = broken & real[:, 1:] & real[:, :-1]
    if bool(broken.any()):
        raise UnsupportedCallError(
            "position_ids do not count up by one, as in a row that holds several sequences, and "
            f"calibration would take them for one prompt; {_APART}"
        )
