"""Variants as the rows behind their first changed one, packed over documents and heads.

A variant enters its layer with the baseline's attention output plus what calibration adds, and
attends over the baseline's keys and values of the rows before it, or over those of a common prefix
that was run once for all variants in which calibration does the same to it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.errors import InternalError
from act_harness.search.compute.packs import Shared, Variants
from act_harness.search.compute.records import Group, LayerRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from act_harness.search.compute.chunk import RecordedChunk

__all__ = ["EnteredLayer"]


class EnteredLayer:
    """The variants of one layer of a chunk."""

    def __init__(
        self, chunk: RecordedChunk, layer: int, heads: tuple[int, ...], change: Tensor
    ) -> None:
        self.chunk, self.layer, self.change = chunk, layer, change
        self.bench, self.layout, self.masks = chunk.bench, chunk.layout, chunk.masks
        self.records = chunk.records
        self.last = layer == len(self.bench.layers) - 1
        record = self.records[layer]
        if record.hidden is None or record.projected is None:
            raise InternalError("a layer below the first recorded one was asked for")
        self.hidden, self.projected = record.hidden, record.projected
        self.weight = self.bench.output_weight(layer)[list(heads)]  # (h, D, hidden)

    def divided(self, triples: Tensor, first: Tensor, sinks: Tensor) -> Iterator[Variants]:
        """Yield the variants by what they share in the prefix that all sequences have in common.

        Where the sinks among the prefix's columns are the same, so is everything in its rows:
        those are run once, and the variants that share them start behind the prefix.

        Args:
            triples: (V, 3) strength, sequence, head.
            first: (V,) first changed row.
            sinks: (M, S, h, T) bool.
        """
        layout, common = self.layout, self.layout.common
        offset = layout.offset[triples[:, 1]]
        inside = first < offset + common
        if self.last or not bool(inside.any()):  # in the last layer only the read rows count
            yield Variants.of(triples, first)
            return
        place = offset[:, None] + torch.arange(common, device=offset.device)
        pattern = sinks[triples[:, 0], triples[:, 1], triples[:, 2]].gather(1, place)
        key = torch.cat([triples[:, [0, 2]], pattern.long()], dim=1)
        _, group, size = torch.unique(key, dim=0, return_inverse=True, return_counts=True)
        together = inside & (size[group] > 1)
        if bool((~together).any()):
            yield Variants.of(triples[~together], first[~together])
        numbers = group[together].unique()
        step = max(1, self.chunk.pack_tokens // common)
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            mine = together & torch.isin(group, some)
            member = torch.searchsorted(some, group[mine])
            columns = self._prefix(triples[mine], (first - offset)[mine], member, len(some))
            yield Variants.of(triples[mine], (offset + common)[mine], Shared(columns, member))

    def _prefix(
        self, triples: Tensor, first: Tensor, member: Tensor, count: int
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Run the common prefix once for each group; return its keys and values by layer.

        Args:
            triples: (V, 3) of all members.
            first: (V,) first changed row within the prefix.
            member: (V,) group of each, 0..count - 1.
            count: number of groups.
        """
        layout, common = self.layout, self.layout.common
        index = torch.arange(len(member), device=member.device)
        # the representative of a group: its last member in the order given
        chosen = torch.zeros(count, dtype=torch.long, device=member.device)
        chosen.scatter_reduce_(0, member, index, "amax", include_self=False)
        start = int(first.min())
        strength, sequence, head = triples[chosen].unbind(dim=1)
        row = torch.arange(start, common, device=member.device)
        place = layout.offset[sequence][:, None] + row  # (U, n)
        own = self.change[strength[:, None], sequence[:, None], place, head[:, None]]
        zero = int(layout.offset[0])
        rows = slice(zero + start, zero + common)  # the untouched prefix: any sequence has it
        projected = self.projected[:1, rows] + torch.bmm(own, self.weight[head])
        before = torch.arange(common, device=member.device)
        records: dict[int, LayerRecord] = {}

        def prefix(later: int) -> tuple[Tensor, Tensor] | None:
            if start == 0:
                return None
            known = slice(zero, zero + start)
            key, value = (one[:1, :, known] for one in self.records[later].columns())
            return key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1)

        def own_columns(earlier: int) -> tuple[Tensor, Tensor]:
            key, value = (one[:1, :, rows] for one in self.records[earlier].columns())
            return key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1)

        self.bench.resume(
            self.layer,
            ids=layout.ids[0, rows].repeat(count),
            hidden=self.hidden[:1, rows].expand(count, -1, -1).flatten(0, 1),
            projected=projected.flatten(0, 1),
            positions=row.repeat(count),
            groups=[
                Group(
                    count,
                    len(row),
                    lambda later: self.masks.causal(later, row, before).expand(count, -1, -1, -1),
                    prefix,
                    own_columns,
                )
            ],
            places=row[:0],
            record=records,
        )
        return {later: record.columns() for later, record in records.items()}

    def run(self, pack: Sequence[Variants]) -> Tensor:
        """Return the change of every read token's log-probability, (V, N), of the groups' variants.

        Args:
            pack: groups; the variants of a group run the rows of its first.
        """
        layout = self.layout
        rows, read = self._rows(pack)
        if not len(rows):
            return torch.zeros(read.shape, dtype=torch.float64, device=read.device)
        place = torch.cat([self._places(group).flatten() for group in pack])  # (R,)
        own = torch.cat([self._own(group) for group in pack])
        hidden, projected = self.hidden.flatten(0, 1)[place], self.projected.flatten(0, 1)[place]
        projected = projected.add_(own)
        positions = layout.position.flatten()[place]
        groups = [self._group(group) for group in pack]
        ids, places = layout.ids.flatten()[place], rows
        if self.last:  # no attention follows: only the read rows matter
            hidden, projected, positions = hidden[rows], projected[rows], positions[rows]
            ids = ids[rows]
            places = torch.arange(len(rows), device=rows.device)
        resumed = partial(
            self.bench.resume,
            self.layer,
            ids=ids,
            hidden=hidden,
            projected=projected,
            positions=positions,
            groups=groups,
            places=places,
        )
        return self.chunk.changes(read, len(places), resumed)

    def _places(self, group: Variants) -> Tensor:
        """Return (V, n) long: each variant's rows among all rows of the chunk."""
        length = self.layout.length
        row = torch.arange(group.first[0], length, device=group.sequence.device)
        return group.sequence[:, None] * length + row

    def _own(self, group: Variants) -> Tensor:
        """Return (V * n, hidden): what calibration adds to the attention module's output."""
        change = self.change[:, :, group.first[0] :]
        some = change[group.strength, group.sequence, :, group.head]  # (V, n, D)
        return torch.bmm(some, self.weight[group.head]).flatten(0, 1)

    def _group(self, group: Variants) -> Group:
        """Return the mask and the columns before the rows of a group, by layer."""
        sequence, start = group.sequence, group.first[0]
        pads = int(self.layout.offset[sequence].min())  # columns before are pads of them all
        masks: dict[int | None, Tensor] = {}

        def mask(later: int) -> Tensor:
            window = self.bench.windows[later]
            if window not in masks:  # layers of one window share it
                masks[window] = self.masks.of(later)[:, :, start:, pads:][sequence]
            return masks[window]

        def stock(later: int) -> tuple[Tensor, Tensor]:
            key, value = self.records[later].columns()
            return key[:, :, pads:start][sequence], value[:, :, pads:start][sequence]

        prefix: Callable[[int], tuple[Tensor, Tensor] | None]
        if start == pads:
            prefix = _nothing
        elif group.shared is None:
            prefix = stock
        else:
            prefix = self._mixed(group, group.shared, pads, stock)

        def own(earlier: int) -> tuple[Tensor, Tensor]:
            key, value = self.records[earlier].columns()
            return key[:, :, start:][sequence], value[:, :, start:][sequence]

        return Group(len(group), self.layout.length - start, mask, prefix, own)

    def _mixed(
        self,
        group: Variants,
        shared: Shared,
        pads: int,
        stock: Callable[[int], tuple[Tensor, Tensor]],
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Return what gives the shared columns, and ``stock``'s outside of the common prefix."""
        start, common, member = group.first[0], self.layout.common, shared.member
        offset = self.layout.offset[group.sequence]
        if int(offset.max()) == pads and start - pads <= common:  # no column is outside

            def whole(later: int) -> tuple[Tensor, Tensor]:
                key, value = shared.columns[later]
                return key[:, :, : start - pads][member], value[:, :, : start - pads][member]

            return whole
        place = torch.arange(pads, start, device=offset.device) - offset[:, None]
        known = ((place >= 0) & (place < common))[:, None, :, None]  # (V, 1, start - pads, 1)
        place = place.clamp(0, common - 1)

        def mixed(later: int) -> tuple[Tensor, Tensor]:
            key, value = (
                torch.where(known, own.transpose(1, 2)[member[:, None], place].transpose(1, 2), one)
                for own, one in zip(shared.columns[later], stock(later), strict=True)
            )
            return key, value

        return mixed

    def _rows(self, pack: Sequence[Variants]) -> tuple[Tensor, Tensor]:
        """Return the rows to read and where each answer token finds its row.

        Returns:
            (P',) rows of the pack, and (V, N): index of the row of each answer token among them, -1
            where another sequence or an earlier row holds it.
        """
        layout = self.layout
        owner, place = layout.places.T
        rows, read, seen, begin = [], [], 0, 0
        for group in pack:
            start = group.first[0]
            wanted = (owner == group.sequence[:, None]) & (place >= start)
            pairs = wanted.nonzero()
            number = torch.full(wanted.shape, -1, dtype=torch.long, device=wanted.device)
            number[wanted] = torch.arange(seen, seen + len(pairs), device=wanted.device)
            length = layout.length - start
            rows.append(begin + pairs[:, 0] * length + place[pairs[:, 1]] - start)
            read.append(number[:, layout.read_place])
            seen, begin = seen + len(pairs), begin + len(group) * length
        return torch.cat(rows), torch.cat(read)


def _nothing(later: int) -> None:
    """No column lies before the rows, in any layer."""
