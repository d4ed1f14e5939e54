"""A model whose forwards are entered at any layer, all seen, an attention output replaced.

The stock model does all arithmetic. Its decoder layers and attention modules are given a thin
wrapper for the time of the search; what a forward is to do differently stands in a :class:`Run`:
skip the layers below the calibrated one and go in with known hidden states, take a known attention
output there instead of computing it, prepend known keys and values to those of the rows that are
computed, and read the output head on wanted rows only. Everything else (norms, rotary embedding,
soft caps) is the model's own code, so any decoder of the Llama shape works.

Others are run as *whole* sequences, each from its first token on (``obstacle`` says why): where
layers that are not attention carry a state along, where a bias or a window counts columns, or where
what attention gives does not simply add up in its output projection. A calibrated attention output
is then put in place inside the attention module, and all that follows is again the model's own.
"""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from act_harness.attention.cache import cache_argument
from act_harness.attention.interface import BINDING
from act_harness.attention.packing import packed
from act_harness.attention.probe import Probe
from act_harness.errors import InternalError, UnsupportedModelError
from act_harness.search.compute.linears import MOST_BYTES, laid_out_linear
from act_harness.search.compute.opened import OpenedModel
from act_harness.search.compute.records import Group, LayerRecord
from act_harness.search.compute.running import AttentionDone, Grouped, Run, Tap
from act_harness.search.compute.structure import (
    Masks,
    decoder_layers,
    output_projection,
    whole_reason,
    window_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from act_harness.search.compute.layout import Layout

__all__ = ["EnteredModel"]


class EnteredModel(OpenedModel):
    """A model with wrappers on its layers, and the forwards of the search that these allow."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Store the model; nothing in it changes before ``with``.

        Args:
            model: a causal language model on one device, on the ``sdpa`` or ``eager`` kernel.
        """
        super().__init__(model)
        self.running: Run | None = None
        self.obstacle: str | None = None
        """Why variants are run as whole sequences; None where they are rows of one."""
        self.layers: list[nn.Module] = []
        """Empty where they were not found; runs then begin at the first one."""
        self.attentions: dict[int, nn.Module] = {}
        """By layer; hybrids have layers without."""
        self.windows: dict[int, int | None] = {}
        self.heads = 0
        self.rows_computed = 0
        """Rows that went through a decoder layer, summed over layers: the work done."""
        self.forwards = 0
        self.laid_out = 0
        """Linear layers that run through oneDNN."""
        self.head_input = torch.empty(0)
        """(P, hidden) rows of the places of the latest forward, before the output head."""
        self.plain_head = False
        """Whether logits are what a linear output head gives, and nothing is done to them."""
        self.narrows = True
        """Whether the last layer may go on with the read rows alone."""
        self.enters = True
        """Whether whole sequences may be entered at a layer, else they begin at the first one."""
        self._weights: dict[int, Tensor] = {}
        self._stores: dict[int, tuple[str, ...]] = {}
        """Layers whose keys later layers attend over (Gemma 4), and the names of the stores."""
        self._base = ""

    # -- opening and closing -----------------------------------------------------------------

    def _open(self, base: str) -> None:
        self._base, kind = base, type(self.model).__name__
        self.model.eval()
        probe = Probe(self.model)
        self.attentions, self.heads, _ = self._find_attentions(probe)
        self.obstacle = whole_reason(self.model, self.attentions, by_position=self.by_position)
        try:
            self.layers = decoder_layers(self.decoder, self.attentions, kind)
        except UnsupportedModelError as error:
            self.obstacle, self.enters = self.obstacle or str(error), False
        for layer, attention in self.attentions.items():
            self.windows[layer] = window_of(self.model, attention)
            setattr(attention, BINDING, Tap(self, layer))
            self._undo.append(partial(delattr, attention, BINDING))
            self._replace(attention, self._attention_forward(layer, attention.forward))
        for layer, block in enumerate(self.layers):
            self._replace(block, self._layer_forward(layer, block.forward))
        self._wrap_ends()
        self._lay_out_linears()

    def _layer_forward(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(original).parameters)[1:]
        cache = cache_argument(original)
        behind: int | None = None  # what the decoder expects after the layer's output in a tuple

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            nonlocal behind
            run = self.running
            if run is None:  # a stock forward, as the one before the first run
                output = original(hidden, *args, **kwargs)
                behind = len(output) - 1 if isinstance(output, tuple) else None
                return output
            shared = kwargs.get("shared_kv_states")
            if shared is not None and run.groups and layer <= run.start:
                self._hand_on(layer, run.groups, shared)
            if shared is not None and run.own is not None and self.enters and layer < run.start:
                for name in self._stores.get(layer, ()):
                    shared[name] = run.own(layer)
            if layer < run.start and self.enters:
                return hidden if behind is None else (hidden, *[None] * behind)
            if layer == run.start and run.hidden is not None:
                hidden = run.hidden
            if run.record is not None and layer >= run.keep_from and layer in self.attentions:
                run.record.setdefault(layer, LayerRecord()).hidden = hidden
            if self.obstacle is None:
                kwargs.update(zip(names, args, strict=False))  # GPT-2 passes its mask by place
                mask = None if run.mask is None else run.mask(layer)
                kwargs.update({"attention_mask": mask, cache: None, "use_cache": False})
                args = ()
            self.rows_computed += hidden.shape[-3] * hidden.shape[-2]
            if layer == run.stops:
                with contextlib.suppress(AttentionDone):
                    original(hidden, **kwargs)
                hidden, run.projected[layer] = run.picked(hidden), run.picked(run.stopped)
            before = set(shared or ())
            output = original(hidden, *args, **kwargs)
            if shared is not None and set(shared) != before:
                self._stores[layer] = tuple(set(shared) - before)
            return output

        return forward

    def _hand_on(self, layer: int, groups: Sequence[Group], shared: Any) -> None:  # noqa: ANN401
        """Store a layer's keys and values, (1, G, R, D), which it is not run to make."""
        if layer not in self._stores:
            return
        known = [group.own(layer) for group in groups]
        pair = tuple(
            torch.cat([one[part].transpose(1, 2).flatten(0, 1) for one in known])
            .transpose(0, 1)
            .unsqueeze(0)
            for part in (0, 1)
        )
        for name in self._stores[layer]:
            shared[name] = pair

    def _attention_forward(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        behind: tuple[nn.Parameter | None, ...] = (None,)  # what the layer takes after the output

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            nonlocal behind
            run = self.running
            if run is not None and layer in run.projected:
                return (run.projected[layer], *behind)
            output = original(*args, **kwargs)
            behind = tuple(one if isinstance(one, nn.Parameter) else None for one in output[1:])
            if run is not None and layer == run.stops:
                run.stopped = output[0]
                raise AttentionDone
            if run is not None and run.record is not None and layer >= run.keep_from:
                run.record[layer].projected = None if self.obstacle else output[0]
            return output

        return forward

    def _lay_out_linears(self) -> None:
        """Run the layers' products through oneDNN where that is faster; see ``linears``."""
        weights = [weight for block in self.layers for weight in block.parameters()]
        if sum(weight.numel() * weight.element_size() for weight in weights) > MOST_BYTES:
            return
        for block in self.layers:
            for module in block.modules():
                forward = laid_out_linear(module)
                if forward is not None:
                    self._replace(module, forward)
                    self.laid_out += 1

    def _wrap_ends(self) -> None:
        def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            run = self.running
            if run is None or run.places is None:
                return None
            run.read = True
            # where the last layer went on with these rows alone, they are picked already
            rows = run.picked(args[0]) if run.stops is None else args[0]
            self.head_input = rows[0]
            if run.headless is not None:
                rows = rows[:, ~run.headless]
            return (rows, *args[1:])

        def embed(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:  # noqa: ANN401
            run = self.running
            if run is None or not run.embeds_grad:
                return None
            return output.detach().requires_grad_(True)

        head, words = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self._undo.append(head.register_forward_pre_hook(select).remove)
        self._undo.append(words.register_forward_hook(embed).remove)

    def masks(self, layout: Layout) -> Masks:
        """Return the masks of a chunk on this model."""
        return Masks(layout, self.windows, additive=self._base == "eager", dtype=self.model.dtype)

    # -- forwards ----------------------------------------------------------------------------

    def recorded(
        self,
        layout: Layout,
        masks: Masks,
        *,
        keep_from: int,
        on_attention: Callable[[int, LayerRecord], None] | None = None,
        gradient: bool = False,
    ) -> tuple[Tensor, dict[int, LayerRecord]]:
        """Run a chunk whole; return (P, vocabulary) logits of its places and the records.

        Args:
            layout: the chunk.
            masks: its masks.
            keep_from: first layer that is recorded in full; of the layers before it nothing is
                needed later, of the layers after it everything is.
            on_attention: called after each attention with the record so far.
            gradient: build a graph from the word embeddings on.
        """
        records: dict[int, LayerRecord] = {}
        run = Run(
            mask=masks.of if self.obstacle is None else None,
            places=layout.places,
            record=records,
            keep_from=keep_from,
            on_attention=on_attention,
            embeds_grad=gradient,
        )
        logits = self._call(run, layout.ids, layout.position)
        for layer in list(records):
            if layer < keep_from and layer not in self._stores:
                del records[layer]
        return logits, records

    def resume(
        self,
        layer: int,
        *,
        ids: Tensor,
        hidden: Tensor,
        projected: Tensor,
        positions: Tensor,
        groups: Sequence[Group],
        places: Tensor,
        record: dict[int, LayerRecord] | None = None,
        headless: Tensor | None = None,
    ) -> Tensor:
        """Run from ``layer`` on, with its attention output given; return (P, vocabulary) logits.

        With a vocabulary of 49 thousand words the output head of one row costs what eight rows
        cost in a layer, so rows of which a few logits are wanted can be left out.

        Args:
            layer: where to go in.
            ids: (R,) tokens of the rows; Gemma's layers take an embedding of them each.
            hidden: (R, hidden) input of that layer, rows of all groups one after another.
            projected: (R, hidden) output of its attention module.
            positions: (R,) positions of the rows.
            groups: which rows attend together.
            places: (P,) rows to read.
            record: filled with keys and values of all columns of the later layers; for one group.
            headless: (P,) bool, rows without logits; see :meth:`logits_of`.
        """
        last = len(self.layers) - 1
        run = Run(
            groups=groups,
            start=layer,
            hidden=hidden[None],
            projected={layer: projected[None]},
            stops=last if layer < last and self.narrows else None,
            places=torch.stack([torch.zeros_like(places), places], dim=1),
            record=record,
            keep_from=len(self.layers),
            headless=headless,
        )
        with packed(Grouped(self)):
            return self._call(run, ids[None], positions[None])

    def replay(
        self,
        layer: int,
        *,
        ids: Tensor,
        hidden: Tensor,
        attention: Tensor,
        own: Callable[[int], tuple[Tensor, Tensor]],
        places: Tensor,
        headless: Tensor | None = None,
    ) -> Tensor:
        """Run whole sequences from ``layer`` on, its attention given; return their logits.

        Args:
            layer: one that attends.
            ids: (V, T) tokens, pads on the right.
            hidden: (V, T, hidden) input of that layer.
            attention: (V, T, H, D) output of its attention, before the output projection.
            own: keys and values of the layers before it, (V, G, T, D).
            places: (P, 2) rows to read, (sequence, t).
            headless: (P,) bool, rows without logits; see :meth:`logits_of`.

        Returns:
            (P, vocabulary) logits, of the places that are not headless.
        """
        run = Run(
            start=layer,
            hidden=hidden if self.enters else None,
            attention=attention,
            own=own,
            places=places,
            headless=headless,
        )
        return self._call(run, ids, None)

    def _call(self, run: Run, ids: Tensor, positions: Tensor | None) -> Tensor:
        self.running = run
        self.forwards += 1
        given: dict[str, Any] = {}  # whole sequences have the model's own masks and positions
        if self.obstacle is None:
            # a mask of four axes is taken as it is, so that none is built; layers get their own
            mask = None if run.mask is None else run.mask(0)
            given = {"attention_mask": mask, "position_ids": positions}
        try:
            output = self.model(input_ids=ids, use_cache=False, **given)
        finally:
            self.running = None
        if not run.read:
            raise InternalError("the model does not call its output head as a module")
        if run.attention is not None and not run.replaced:
            raise InternalError("a layer whose attention is given was not run")
        logits: Tensor = output.logits[0]
        return logits

    def projected_by_model(
        self,
        layer: int,
        layout: Layout,
        masks: Masks,
        *,
        hidden: Tensor,
        attention: Tensor,
        own: Callable[[int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Return what a layer's attention module makes of an attention output, (S, T, hidden).

        Args:
            layer: one that attends.
            layout: the chunk.
            masks: its masks.
            hidden: (S, T, hidden) input of that layer.
            attention: (S, T, H, D).
            own: keys and values of the layers before it, (S, G, T, D).

        Raises:
            InternalError: the module was not run.
        """
        records: dict[int, LayerRecord] = {}
        run = Run(
            mask=masks.of,
            start=layer,
            hidden=hidden,
            attention=attention,
            own=own,
            places=layout.places,
            record=records,
            keep_from=layer,
        )
        self._call(run, layout.ids, layout.position)
        found = records[layer].projected
        if found is None:
            raise InternalError("a layer's attention module was not run")
        return found

    def output_weight(self, layer: int) -> Tensor:
        """Return the output projection of a layer by head, (H, D, hidden).

        Raises:
            UnsupportedModelError: it is not a plain linear layer.
        """
        if layer not in self._weights:
            attention = self.attentions[layer]
            weight = output_projection(attention)
            self._weights[layer] = weight.T.reshape(self.heads, -1, weight.shape[0])
        return self._weights[layer]
