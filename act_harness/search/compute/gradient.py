"""A model whose every head has a strength: scores of documents as a differentiable function of all.

The stock model does all arithmetic but attention, which goes through the same seam as everywhere
(:mod:`act_harness.attention.interface`). In each layer the target columns are found first, without
a gradient, on the queries and keys as the layers below have made them; then attention runs with the
strengths of that layer (:mod:`act_harness.search.compute.gradient_attention`). One forward and one
backward so give the exact derivative of a loss by every strength of every head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from act_harness.attention.families.family import visible_columns
from act_harness.attention.interface import BINDING
from act_harness.attention.probe import Probe
from act_harness.calibration import Calibration, LayerPlan
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import AttentionCall
from act_harness.engines.reference import prompt_target
from act_harness.errors import InternalError, UnsupportedModelError
from act_harness.search.compute.gradient_attention import (
    attention_with_bias,
    column_bias,
    column_sums,
)
from act_harness.search.compute.opened import OpenedModel
from act_harness.search.compute.structure import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from act_harness.engines.triton import TritonEngine
    from act_harness.search.compute.read_rows import Batch

__all__ = ["StrengthenedModel"]


@dataclass
class Forward:
    """The batch under way."""

    batch: Batch
    theta: Tensor | None
    geometries: dict[int, Geometry] = field(default_factory=dict)
    masks: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """By identity: the model's masks, which live as long as they are known, and what they show."""
    columns: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """Found once a layer: a layer that is computed again for its backward finds the same."""
    read: bool = False

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """Return (B or 1, 1, T, T) bool, what a model's mask shows; None where it is causal."""
        if mask is None:
            return None
        if id(mask) not in self.masks:
            seen = visible_columns(mask)
            causal = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()
            self.masks[id(mask)] = mask, None if bool((seen == causal).all()) else seen
        return self.masks[id(mask)][1]

    def geometry(self, visible: Tensor | None) -> Geometry:
        """Return which tokens are the prompt, and what its rows see."""
        if id(visible) not in self.geometries:
            batch = self.batch
            self.geometries[id(visible)] = Geometry(
                batch.real, batch.prompt, 0, 0, batch.ids.shape[1], visible, batch.ids
            )
        return self.geometries[id(visible)]


class _Tap:
    """Bound to an attention module: attends with that layer's strengths."""

    def __init__(self, owner: StrengthenedModel, layer: int) -> None:
        self.owner, self.layer = owner, layer

    def attend(
        self,
        call: AttentionCall,
        mask: Tensor | None,
        *,
        stock: Callable[[], Tensor],
        stock_maps: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`act_harness.attention.interface.BoundLayer`."""
        run = self.owner.running
        if run is None or run.theta is None:
            return stock(), None
        output = self.owner.attend(self.layer, run, call, run.visible(mask))
        return output.contiguous(), None  # as stock kernels give it: Afmoe's gate takes a view


class StrengthenedModel(OpenedModel):
    """Opens a model; use as a context manager, the model is stock again after it."""

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        *,
        checkpointing: bool = False,
        kernels: TritonEngine | None = None,
    ) -> None:
        """Store the model; nothing in it changes before ``with``.

        Args:
            model: a causal language model on one device, on the ``sdpa`` or ``eager`` kernel.
            calibration: what the strengths act on: its target, as an artifact has it. Its own
                strength is not used.
            checkpointing: keep only the layers' inputs for the backward, and compute the rest of
                a layer again there.
            kernels: of CUDA, which add up what columns receive without holding any map; None:
                plain torch.
        """
        super().__init__(model)
        self.kernels = kernels
        self.calibration, self.checkpointing = calibration, checkpointing
        self.running: Forward | None = None
        self.layers = self.heads = 0
        self.tokens = 0
        """Padded tokens that went through the model in forwards."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, L, H) of the strengths; target ``both`` has two of a head, for sinks and initial."""
        return 2 if self.calibration.target == "both" else 1, self.layers, self.heads

    @property
    def hidden_size(self) -> int:
        """Of the decoder's layers, for estimates: 1024 where the config does not say."""
        return int(getattr(self.decoder.config.get_text_config(), "hidden_size", None) or 1024)

    @property
    def dtype(self) -> torch.dtype:
        """Of the strengths: float32, or float64 in a float64 model."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    # -- opening and closing -----------------------------------------------------------------

    def _open(self, base: str) -> None:
        model, kind = self.model, type(self.model).__name__
        training = model.training
        model.eval()
        self._undo.append(lambda: model.train(training))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._undo.append(partial(parameter.requires_grad_, True))
        probe = Probe(model)
        attentions, self.heads, stock = self._find_attentions(probe)
        self.layers = self.decoder.config.get_text_config().num_hidden_layers
        for layer, attention in attentions.items():
            setattr(attention, BINDING, _Tap(self, layer))
            self._undo.append(partial(delattr, attention, BINDING))
        if self.checkpointing:
            for block in decoder_layers(self.decoder, attentions, kind):
                self._checkpoint(block)
        head = model.get_output_embeddings()
        self._undo.append(head.register_forward_pre_hook(self._pick_rows).remove)
        self._check(probe, kind, stock)

    def _checkpoint(self, block: nn.Module) -> None:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a layer's own
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return checkpoint(partial(within, self.running), *args, use_reentrant=False, **kwargs)

        def within(run: Forward | None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            before, self.running = self.running, run  # in the backward, other batches have followed
            try:
                return original(*args, **kwargs)
            finally:
                self.running = before

        self._replace(block, forward)

    def _check(self, probe: Probe, kind: str, stock: Tensor) -> None:
        """Without any strength the logits must be the stock model's."""
        from act_harness.search.compute.read_rows import Batch

        ids = probe.ids
        every = torch.ones_like(ids, dtype=torch.bool)
        column = torch.arange(ids.shape[1], device=ids.device)
        none = column[:0]
        batch = Batch(
            (0,), ids, every, every, torch.stack([column * 0, column], 1), none, none, none, 1
        )
        with torch.no_grad():
            logits = self.logits(batch, torch.zeros(self.shape, device=self.device))
        if not self.as_stock(logits, stock[0]):
            raise UnsupportedModelError(
                f"{kind} gives other logits when its attention is computed for the search; the "
                "gradient search does not support this model"
            )

    # -- forwards ----------------------------------------------------------------------------

    def _pick_rows(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Give the output head the rows that are read, and no others."""
        run = self.running
        if run is None:
            return None
        run.read = True
        row, column = run.batch.places.T
        return (args[0][row, column][None], *args[1:])

    def logits(self, batch: Batch, theta: Tensor | None) -> Tensor:
        """Return (P, vocabulary) logits of a batch's places.

        Args:
            batch: of documents.
            theta: (S, L, H) logarithms of the strengths; None: the untouched model.
        """
        self.running = run = Forward(batch, theta)
        self.tokens += batch.tokens
        try:
            output = self.model(input_ids=batch.ids, use_cache=False)
        finally:
            self.running = None
        if not run.read:
            raise InternalError("the model does not call its output head as a module")
        logits: Tensor = output.logits[0]
        return logits

    def scores(self, batch: Batch, theta: Tensor | None) -> Tensor:
        """Return (documents, choices) log-likelihoods of a batch; see :meth:`logits`."""
        return batch.scores(self.logits(batch, theta))

    def attend(
        self, layer: int, run: Forward, call: AttentionCall, visible: Tensor | None
    ) -> Tensor:
        """Return (B, T, H, D) attention of a layer with its strengths.

        Args:
            layer: its number.
            run: the batch under way.
            call: what the layer is to compute.
            visible: what rows see, (B or 1, 1, T, T) bool; None: causal.
        """
        if run.theta is None:
            raise InternalError("a layer without strengths attends with them")
        theta, own = run.theta[:, layer], self.calibration
        rows = run.batch.prompt if own.decode == "off" else None
        attend = partial(
            attention_with_bias, call.query, call.key, call.value, scale=call.scale,
            softcap=call.softcap, added=call.bias, mask=visible, rows=rows,
            sink_logits=call.sink_logits,
        )  # fmt: skip
        if own.target != "head":
            if layer not in run.columns:
                run.columns[layer] = self._columns(layer, run, call, visible)
            return attend(bias=column_bias(theta, run.columns[layer]))
        factor = theta[0].exp()
        none = theta.new_zeros(*call.query.shape[:3])
        if own.mass == "temperature":
            return attend(bias=none, factor=factor)
        gates = factor[:, None] if rows is None else torch.where(
            rows[:, :, None, None], factor[:, None], 1.0
        )  # fmt: skip
        return attend(bias=none) * gates.to(call.query.dtype)

    @torch.no_grad()
    def _columns(
        self, layer: int, run: Forward, call: AttentionCall, visible: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the sets of columns that the strengths act on, (B, H, T) bool each."""
        geometry = run.geometry(visible)
        own, every = self.calibration, tuple(range(self.heads))
        plan = LayerPlan(own, every, (own.strength_of_all,) * self.heads, layer)
        if own.detects:
            sums = self._sums(call, geometry)
        else:
            sums = torch.zeros(call.query.shape[:3], device=self.device)
        found, _ = prompt_target(sums, geometry, plan)
        if own.target != "both":
            return (found,)
        column = torch.arange(geometry.total, device=self.device)
        initial = found & (column == geometry.first[:, None])[:, None]
        return found & ~initial, initial

    @cached_property
    def _every(self) -> LayerPlan:
        """All heads, for all layers: what columns receive depends on nothing else of a plan."""
        return LayerPlan.uniform(Calibration(), tuple(range(self.heads)))

    def _sums(self, call: AttentionCall, geometry: Geometry) -> Tensor:
        """Return (B, H, T): what each column receives from the prompt's rows."""
        if self.kernels is not None:
            found = self.kernels.column_sums(call, geometry=geometry, plan=self._every)
            if found is not None:
                return found
        return column_sums(call, geometry=geometry)
