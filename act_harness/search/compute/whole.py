"""Variants of models whose texts cannot be entered behind their first token.

A recurrent layer's state at a row comes from all rows before it, so a variant runs its whole
sequence, from the calibrated layer on. Pads stand behind, where nothing that is read sees them:
sequences of any lengths may be batched, and a variant's scores are those that it has alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.errors import InternalError
from act_harness.search.compute.packs import Variants

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from act_harness.search.compute.chunk import RecordedChunk

__all__ = ["WholeLayer"]


class WholeLayer:
    """The variants of one layer of a chunk."""

    def __init__(
        self, chunk: RecordedChunk, layer: int, heads: tuple[int, ...], change: Tensor
    ) -> None:
        """Store what calibration changes there.

        Args:
            chunk: the chunk, its baseline recorded.
            layer: one that attends.
            heads: its heads at stake.
            change: (M, S, T, h, D) added to their attention output.
        """
        self.chunk, self.layer, self.change = chunk, layer, change
        self.bench, self.layout, self.records = chunk.bench, chunk.layout, chunk.records
        record = self.records[layer]
        if record.attention is None:
            raise InternalError("a layer below the first recorded one was asked for")
        self.attention = record.attention
        # runs that begin at the first layer take no input; any tensor of S sequences would do
        self.hidden = self.attention if record.hidden is None else record.hidden
        self.heads = torch.tensor(heads, device=change.device)

    def divided(self, triples: Tensor, first: Tensor, sinks: Tensor) -> Iterator[Variants]:
        """Yield all variants, (V, 3), from the first row on."""
        yield Variants.of(triples, torch.zeros_like(first))

    def run(self, pack: Sequence[Variants]) -> Tensor:
        """Return the change of every read token's log-probability, (V, N)."""
        layout = self.layout
        strength, sequence, head = (
            torch.cat([getattr(group, name) for group in pack])
            for name in ("strength", "sequence", "head")
        )
        rows, read = self._rows(sequence)
        length = int(layout.real[sequence].sum(dim=1).max())  # pads stand behind
        each = torch.arange(len(sequence), device=sequence.device)
        attention = self.attention[sequence, :length].clone()
        attention[each, :, self.heads[head]] += self.change[strength, sequence, :length, head]

        def own(earlier: int) -> tuple[Tensor, Tensor]:
            key, value = self.records[earlier].columns()
            return key[sequence, :, :length], value[sequence, :, :length]

        replayed = partial(
            self.bench.replay,
            self.layer,
            ids=layout.ids[sequence, :length],
            hidden=self.hidden.index_select(-3, sequence)[..., :length, :],
            attention=attention,
            own=own,
            places=rows,
        )
        return self.chunk.changes(read, len(rows), replayed)

    def _rows(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows to read, (P, 2), and (V, N) which of them an answer token has, or -1."""
        owner, place = self.layout.places.T
        wanted = owner == sequence[:, None]  # (V, places)
        pairs = wanted.nonzero()
        number = torch.full(wanted.shape, -1, dtype=torch.long, device=wanted.device)
        number[wanted] = torch.arange(len(pairs), device=wanted.device)
        rows = torch.stack([pairs[:, 0], place[pairs[:, 1]]], dim=1)
        return rows, number[:, self.layout.read_place]
