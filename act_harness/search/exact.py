"""The exact pass: what calibrating each single head changes, for a chunk of documents.

Equal to running the model once per (document, head) with that one head calibrated, and cheaper by
five savings: the layers below the calibrated one are read from the baseline's forward; all heads of
a layer follow from one set of queries, keys and values; a pair in which no row changes costs
nothing; variants of many documents and heads run packed; and rows before the first changed row are
the baseline's, keys and values included. A variant enters layer l with the baseline's attention
output plus ``(out'_h - out_h) W_o[h]`` and runs on from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.errors import InternalError
from act_harness.search.layout import Layout
from act_harness.search.workbench import LayerRecord, Masks, Workbench, columns_before

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from act_harness.engines.operation import Engine

__all__ = ["ChunkPass", "Counts", "calibrated_change"]


class Counts(NamedTuple):
    """What a layer's variants of a chunk cost."""

    variants: int
    """(sequence, head, strength) triples."""
    computed: int
    """Of them, with a changed row: the ones that were run."""


class _Variants(NamedTuple):
    """Triples to run, as (V,) tensors, and each one's first changed row."""

    strength: Tensor
    sequence: Tensor
    head: Tensor
    first: list[int]

    def some(self, chosen: slice) -> _Variants:
        return _Variants(
            self.strength[chosen], self.sequence[chosen], self.head[chosen], self.first[chosen]
        )


class ChunkPass:
    """One chunk: its baseline forward, then any layer's heads."""

    def __init__(
        self,
        bench: Workbench,
        layout: Layout,
        *,
        engine: Engine,
        calibration: Calibration,
        strengths: Sequence[HeadStrength],
        first_layer: int,
        pack_tokens: int,
    ) -> None:
        """Run the baseline and keep what the layers from ``first_layer`` on need.

        Args:
            bench: the opened model.
            layout: the chunk.
            engine: computes calibrated attention.
            calibration: target set; its own mass map is not used.
            strengths: mass maps to try on every head.
            first_layer: lowest layer that will be asked for.
            pack_tokens: most rows (variants x rows) of a packed forward.
        """
        self.bench, self.layout, self.engine = bench, layout, engine
        self.calibration, self.strengths = calibration, tuple(strengths)
        self.pack_tokens = pack_tokens
        self.masks = Masks(bench, layout)
        self._geometries: dict[int, object] = {}
        with torch.no_grad():
            logits, self.records = bench.recorded(layout, self.masks, keep_from=first_layer)
            self.base = bench.log_probabilities(logits, layout.read_place, layout.read_token)

    def baseline(self) -> Tensor:
        """Return (documents, choices) float64 log-likelihoods of the untouched model."""
        return self._slots(self.base.double()[None]).view(self.layout.documents, -1)

    def layer(
        self,
        layer: int,
        heads: Sequence[int],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, Counts]:
        """Return what calibrating each head alone does to the log-likelihoods.

        Args:
            layer: at or above ``first_layer``.
            heads: heads of that layer.
            progress: called with the number of (sequence, head, strength) triples done.

        Returns:
            (strengths, heads, documents, choices) float64 changes in nats, and the work.
        """
        with torch.no_grad():
            return self._layer(layer, tuple(heads), progress or (lambda done: None))

    def _layer(
        self, layer: int, heads: tuple[int, ...], progress: Callable[[int], object]
    ) -> tuple[Tensor, Counts]:
        layout, record = self.layout, self.records[layer]
        change = torch.stack(
            [self.change(layer, record, heads, strength) for strength in self.strengths]
        )  # (M, S, T, h, D)
        size = (len(self.strengths), len(heads), layout.documents, layout.choices)
        result = torch.zeros(size, dtype=torch.float64, device=layout.ids.device)
        moved = (change != 0).any(dim=-1) & layout.real[None, :, :, None]  # (M, S, T, h)
        variants = self._variants(moved)
        total = moved.shape[0] * moved.shape[1] * moved.shape[3]
        progress(total - len(variants.first))
        for start in self._packs(variants.first):
            pack = variants.some(start)
            logprobs = self._run(layer, heads, change, pack)  # (V, N) changes, 0 where not read
            slots = self._slots(logprobs)  # (V, documents * choices)
            result.view(*size[:2], -1).index_put_(
                (pack.strength, pack.head), slots, accumulate=True
            )
            progress(len(pack.first))
        return result, Counts(total, len(variants.first))

    def change(
        self, layer: int, record: LayerRecord, heads: tuple[int, ...], strength: HeadStrength
    ) -> Tensor:
        """Return ``out' - out`` of each head, (S, T, h, D), exactly 0 in rows that do not change."""
        return calibrated_change(
            self.engine,
            record,
            LayerPlan(self.calibration, heads, (strength,) * len(heads)),
            self.layout,
            self.masks.visible(layer),
            cache=self._geometries,
        )

    def _variants(self, moved: Tensor) -> _Variants:
        """Return the triples with a changed row, those with the longest way to run first."""
        triples = moved.any(dim=2).nonzero()  # (V, 3): strength, sequence, head
        first = moved.int().argmax(dim=2)[triples[:, 0], triples[:, 1], triples[:, 2]]
        order = torch.argsort(first, stable=True)
        triples = triples[order]
        return _Variants(triples[:, 0], triples[:, 1], triples[:, 2], first[order].tolist())

    def _packs(self, first: list[int]) -> list[slice]:
        """Cut the triples, sorted by first changed row, into packs of bounded size."""
        packs, start = [], 0
        while start < len(first):
            rows = self.layout.length - first[start]
            stop = min(len(first), start + max(1, self.pack_tokens // rows))
            packs.append(slice(start, stop))
            start = stop
        return packs

    def _run(self, layer: int, heads: tuple[int, ...], change: Tensor, pack: _Variants) -> Tensor:
        """Return the change of every read token's log-probability, (V, N)."""
        layout, record, sequence = self.layout, self.records[layer], pack.sequence
        start = pack.first[0]
        if record.hidden is None or record.projected is None:
            raise InternalError("a layer below the first recorded one was asked for")
        own = change[:, :, start:].permute(0, 1, 3, 2, 4)[pack.strength, sequence, pack.head]
        weight = self.bench.output_weight(layer)[list(heads)][pack.head]  # (V, D, hidden)
        projected = record.projected[:, start:][sequence] + torch.bmm(own, weight)
        hidden = record.hidden[:, start:][sequence]
        rows, places, read = self._rows(sequence, start)
        if not len(places):
            return torch.zeros(len(sequence), len(layout.read_place), dtype=torch.float64)
        positions = layout.position[:, start:][sequence]
        if layer == len(self.bench.layers) - 1:  # no attention follows: only the read rows matter
            hidden, projected = hidden[rows], projected[rows]
            positions = positions[places[:, 0], places[:, 1]][None]
            hidden, projected = hidden[None], projected[None]
            places = torch.stack([torch.zeros_like(places[:, 0]), torch.arange(len(places))], dim=1)
        logits = self.bench.resume(
            layer,
            hidden=hidden,
            projected=projected,
            positions=positions,
            mask=lambda later: self.masks.of(later)[:, :, start:][sequence],
            prefix=lambda later: columns_before(self.records[later], sequence, start),
            places=places,
        )
        known = read >= 0  # (V, N)
        tokens = layout.read_token.expand_as(read)[known]
        found = torch.zeros(read.shape, dtype=torch.float64, device=read.device)
        after = self.bench.log_probabilities(logits, read[known], tokens)
        found[known] = after.double() - self.base.double().expand_as(read)[known]
        return found

    def _rows(self, sequence: Tensor, start: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return the rows to read and where each answer token finds its row.

        Returns:
            (variant, row) as an index, the same as (P', 2), and (V, N): index of the row of each
            answer token among them, -1 where another sequence or an earlier row holds it.
        """
        layout = self.layout
        wanted = (layout.places[:, 0] == sequence[:, None]) & (layout.places[:, 1] >= start)
        pairs = wanted.nonzero()
        number = torch.full(wanted.shape, -1, dtype=torch.long, device=wanted.device)
        number[wanted] = torch.arange(len(pairs), device=wanted.device)
        places = torch.stack([pairs[:, 0], layout.places[pairs[:, 1], 1] - start], dim=1)
        return (places[:, 0], places[:, 1]), places, number[:, layout.read_place]

    def _slots(self, tokens: Tensor) -> Tensor:
        """Sum (V, N) values of answer tokens to (V, documents * choices)."""
        layout = self.layout
        size = layout.documents * layout.choices
        slots = torch.zeros(len(tokens), size, dtype=torch.float64, device=tokens.device)
        return slots.index_add_(1, layout.read_slot, tokens.double())


def calibrated_change(
    engine: Engine,
    record: LayerRecord,
    plan: LayerPlan,
    layout: Layout,
    visible: Tensor,
    *,
    cache: dict[int, object] | None = None,
) -> Tensor:
    """Return what calibration changes in a layer's attention output, (S, T, h, D).

    Args:
        engine: computes the plan's heads.
        record: queries, keys, values and attention output of the layer.
        plan: heads and their mass maps.
        layout: the chunk.
        visible: the layer's mask, (S, 1, T, T) bool.
        cache: keeps the geometry of each mask between calls.
    """
    if record.query is None or record.key is None or record.value is None:
        raise InternalError("a layer's queries were not recorded")
    attention = record.attention
    if attention is None:
        raise InternalError("a layer's attention output was not recorded")
    geometries = {} if cache is None else cache
    if id(visible) not in geometries:
        geometries[id(visible)] = layout.geometry(visible)
    result = engine(
        record.query,
        record.key,
        record.value,
        geometry=geometries[id(visible)],  # type: ignore[arg-type]
        plan=plan,
        state=None,
        stock=lambda: attention,
        scale=record.scale,
        softcap=record.softcap,
    )
    heads = list(plan.heads)
    return result.output[:, :, heads] - attention[:, :, heads]
