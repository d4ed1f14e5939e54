"""The exact pass: what calibrating each single head changes, for a chunk of documents.

Equal to running the model once per (document, head) with that one head calibrated, and cheaper by
five savings: the layers below the calibrated one are read from the baseline's forward; all heads of
a layer follow from one set of queries, keys and values; a pair in which no row changes costs
nothing; variants of many documents and heads run packed; and rows before the first changed row are
the baseline's, keys and values included. A sixth goes further: documents of a task begin with the
same instruction, and where calibration does the same to those rows they are run once for all
documents of a chunk. A variant enters layer l with the baseline's attention
output plus ``(out'_h - out_h) W_o[h]`` and runs on from there.

Models that are run as whole sequences (:attr:`Workbench.obstacle`) keep the first four savings; see
:mod:`act_harness.search.compute.whole`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from act_harness.search.compute.chunk import RecordedChunk
from act_harness.search.compute.entered_rows import EnteredLayer
from act_harness.search.compute.packs import Variants, packs_of
from act_harness.search.compute.whole import WholeLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["ChunkPass", "Counts"]


class Counts(NamedTuple):
    """What a layer's variants of a chunk cost."""

    variants: int
    """(sequence, head, strength) triples."""
    computed: int
    """Of them, with a changed row: the ones that were run."""


class _Variants(Protocol):
    """The variants of one layer of a chunk."""

    def divided(self, triples: Tensor, first: Tensor, sinks: Tensor) -> Iterator[Variants]:
        """Yield them in the order in which they are packed; see :meth:`EnteredLayer.divided`."""
        ...

    def run(self, pack: Sequence[Variants]) -> Tensor:
        """Return the change of every read token's log-probability, (V, N)."""
        ...


class ChunkPass(RecordedChunk):
    """One chunk: its baseline forward, then any layer's heads."""

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
            (strengths, heads, documents, choices) float64 changes in nats, and the work. Where all
            choices of a document are read from one row, its normaliser is left out: the changes are
            then those of the log-likelihoods up to a number for each document, which no margin and
            no prediction depends on.
        """
        with torch.no_grad():
            return self._layer(layer, tuple(heads), progress or (lambda done: None))

    def _layer(
        self, layer: int, heads: tuple[int, ...], progress: Callable[[int], object]
    ) -> tuple[Tensor, Counts]:
        layout, record = self.layout, self.records[layer]
        found = [self.change(layer, record, heads, strength) for strength in self.strengths]
        change = torch.stack([one for one, _ in found])  # (M, S, T, h, D)
        sinks = torch.stack([one for _, one in found])  # (M, S, h, T)
        size = (len(self.strengths), len(heads), layout.documents, layout.choices)
        result = torch.zeros(size, dtype=torch.float64, device=layout.ids.device)
        moved = (change != 0).any(dim=-1) & layout.real[None, :, :, None]  # (M, S, T, h)
        triples = moved.any(dim=2).nonzero()  # (V, 3): strength, sequence, head
        first = moved.int().argmax(dim=2)[triples[:, 0], triples[:, 1], triples[:, 2]]
        total = moved.shape[0] * moved.shape[1] * moved.shape[3]
        progress(total - len(triples))
        one: _Variants
        if self.bench.obstacle is None:
            one = EnteredLayer(self, layer, heads, change)
        else:
            one = WholeLayer(self, layer, heads, change)
        for pack in packs_of(
            one.divided(triples, first, sinks),
            length=layout.length,
            rows=self.pack_tokens,
            group_cost=self.group_cost,
        ):
            changes = one.run(pack)  # (V, N), 0 where not read
            place = (
                torch.cat([group.strength for group in pack]),
                torch.cat([group.head for group in pack]),
            )
            result.view(*size[:2], -1).index_put_(place, self._slots(changes), accumulate=True)
            progress(len(changes))
        return result, Counts(total, len(triples))
