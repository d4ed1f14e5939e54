"""A model that the search has opened: what both of its ways do to get in, and to leave no trace.

Attention of every layer is led through the door that calibration uses too
(:mod:`act_harness.attention.interface`), and forwards are replaced on single modules; leaving the
``with`` block undoes all of it, last first.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from act_harness.attention.facts import decoder_of
from act_harness.attention.interface import BASES, base_of
from act_harness.attention.parallel import refuse_parts
from act_harness.attention.placement import on_one_device
from act_harness.attention.rounding import alike, rounding
from act_harness.attention.routes import passing
from act_harness.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from act_harness.attention.probe import Probe

__all__ = ["OpenedModel"]

_Opened = TypeVar("_Opened", bound="OpenedModel")


class OpenedModel:
    """Use as a context manager: the model is stock again after it.

    A subclass says in :meth:`_open` what it puts on the model, and adds to ``_undo`` how each part
    is taken off again.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Store the model; nothing in it changes before ``with``.

        Args:
            model: a causal language model on one device, on the ``sdpa`` or ``eager`` kernel.
        """
        self.model = model
        self.decoder: Any = decoder_of(model)
        self.device: torch.device = next(model.parameters()).device
        self.by_position = False
        """Whether logits of single rows or columns come with the calls of its attention."""
        self._undo: list[Callable[[], object]] = []

    def __enter__(self: _Opened) -> _Opened:
        base = base_of(self.decoder.config._attn_implementation)
        if base not in BASES:
            raise UnsupportedModelError(
                f"the model runs attention {base!r}, the search builds on {' or '.join(BASES)}; "
                "load it with attn_implementation=sdpa"
            )
        refuse_parts(self.model, "the search")
        if not on_one_device(self.model):
            devices = {parameter.device for parameter in self.model.parameters()}
            raise UnsupportedModelError(
                f"the model is spread over {sorted(map(str, devices))}, the search needs it on one "
                "device; start one process per device instead of parallelize or device_map"
            )
        try:
            self._open(base)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _open(self, base: str) -> None:
        """Put on the model, which runs stock kernel ``base``, what the search needs."""
        raise NotImplementedError

    def _close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _find_attentions(self, probe: Probe) -> tuple[dict[int, nn.Module], int, Tensor]:
        """Lead every layer's attention through the door.

        Returns:
            The attention modules by layer (a hybrid has layers without), their number of query
            heads, and what the stock decoder gave for the probe's tokens.

        Raises:
            UnsupportedModelError: no layer attends there, or they differ in their heads.
        """
        stock, kind = probe.hidden(), type(self.model).__name__
        led = contextlib.ExitStack()
        self._undo.append(led.close)
        led.enter_context(passing(self.decoder))
        found = probe.attention_modules(stock)
        attentions = {layer: one.module for layer, one in sorted(found.items())}
        heads = {one.heads for one in found.values()}
        self.by_position = any(one.by_position for one in found.values())
        if len(heads) != 1:
            raise UnsupportedModelError(f"the layers of {kind} differ in their number of heads")
        return attentions, heads.pop(), stock

    def as_stock(self, found: Tensor, stock: Tensor) -> bool:
        """Say whether logits (T, vocabulary) are the stock model's, but for rounding.

        How much that is, is asked of the stock model where a dtype's own precision does not
        explain a difference: the sums of a wide model in bfloat16 move its logits further.
        """
        found, stock, dtype = found.float().cpu(), stock.float().cpu(), self.model.dtype
        dtype = torch.float32 if dtype == torch.float64 else dtype  # which some norms are made in
        return alike(found, stock, dtype) or alike(
            found, stock, dtype, noise=rounding(self.model, [range(8)])
        )

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        own = module.__dict__.get("forward")
        module.forward = forward
        if own is None:
            self._undo.append(lambda: module.__dict__.pop("forward"))
        else:
            self._undo.append(lambda: setattr(module, "forward", own))
