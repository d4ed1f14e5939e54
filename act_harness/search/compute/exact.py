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

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.errors import InternalError
from act_harness.search.compute.layout import Layout
from act_harness.search.compute.packs import GROUP_COST, Shared, Variants, packs_of
from act_harness.search.compute.records import Group, LayerRecord
from act_harness.search.compute.whole import WholeLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from act_harness.engines.operation import Engine
    from act_harness.search.compute.workbench import Workbench

__all__ = ["ChunkPass", "Counts", "calibrated_change"]


class Counts(NamedTuple):
    """What a layer's variants of a chunk cost."""

    variants: int
    """(sequence, head, strength) triples."""
    computed: int
    """Of them, with a changed row: the ones that were run."""


class _Variants(Protocol):
    """The variants of one layer of a chunk."""

    def divided(self, triples: Tensor, first: Tensor, sinks: Tensor) -> Iterator[Variants]:
        """Yield them in the order in which they are packed; see :meth:`_Layer.divided`."""
        ...

    def run(self, pack: Sequence[Variants]) -> Tensor:
        """Return the change of every read token's log-probability, (V, N)."""
        ...


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
        self.group_cost = GROUP_COST.get(bench.device.type, GROUP_COST["cuda"])
        self.masks = bench.masks(layout)
        self._geometries: dict[int, object] = {}
        with torch.no_grad():
            logits, self.records = bench.recorded(layout, self.masks, keep_from=first_layer)
            self.base = bench.log_probabilities(logits, layout.read_place, layout.read_token)
            self.base_logits = bench.logits_of(layout.read_place, layout.read_token)

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
            one = _Layer(self, layer, heads, change)
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

    def change(
        self, layer: int, record: LayerRecord, heads: tuple[int, ...], strength: HeadStrength
    ) -> tuple[Tensor, Tensor]:
        """Return ``out' - out`` of each head, (S, T, h, D), and its sinks, (S, h, T)."""
        return calibrated_change(
            self.engine,
            record,
            LayerPlan(self.calibration, heads, (strength,) * len(heads), layer),
            self.layout,
            self.bench.visible(layer, record, self.masks),
            cache=self._geometries,
        )

    def changes(self, read: Tensor, rows: int, run: Callable[..., Tensor]) -> Tensor:
        """Run variants; return the change of every read token's log-probability, (V, N) float64.

        Args:
            read: (V, N) index of each answer token's row among those that are read, -1 where the
                variant has none.
            rows: how many are read.
            run: given ``headless``, (rows,) bool, returns logits of the others.
        """
        layout, bench = self.layout, self.bench
        found = torch.zeros(read.shape, dtype=torch.float64, device=read.device)
        known = read >= 0  # (V, N)
        level = layout.level[layout.read_place] & bench.plain_head  # (N,)
        headless = torch.zeros(rows, dtype=torch.bool, device=read.device)
        headless[read[known & level]] = True
        logits = run(headless=headless)
        index = (~headless).cumsum(dim=0) - 1  # of each row among those with logits
        for some, before in ((known & level, self.base_logits), (known & ~level, self.base)):
            place, tokens = read[some], layout.read_token.expand_as(read)[some]
            if before is self.base:
                after = bench.log_probabilities(logits, index[place], tokens)
            else:
                after = bench.logits_of(place, tokens)
            found[some] = after.double() - before.double().expand_as(read)[some]
        return found

    def _slots(self, tokens: Tensor) -> Tensor:
        """Sum (V, N) values of answer tokens to (V, documents * choices)."""
        layout = self.layout
        size = layout.documents * layout.choices
        slots = torch.zeros(len(tokens), size, dtype=torch.float64, device=tokens.device)
        return slots.index_add_(1, layout.read_slot, tokens.double())


class _Layer:
    """The variants of one layer of a chunk."""

    def __init__(
        self, passing: ChunkPass, layer: int, heads: tuple[int, ...], change: Tensor
    ) -> None:
        self.passing, self.layer, self.change = passing, layer, change
        self.bench, self.layout, self.masks = passing.bench, passing.layout, passing.masks
        self.records = passing.records
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
        step = max(1, self.passing.pack_tokens // common)
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
        return self.passing.changes(read, len(places), resumed)

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


def calibrated_change(
    engine: Engine,
    record: LayerRecord,
    plan: LayerPlan,
    layout: Layout,
    visible: Tensor | None,
    *,
    cache: dict[int, object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what calibration changes in a layer's attention output, and where.

    Args:
        engine: computes the plan's heads.
        record: queries, keys, values and attention output of the layer.
        plan: heads and their mass maps.
        layout: the chunk.
        visible: the layer's mask, (S or 1, 1, T, T) bool; None: causal.
        cache: keeps the geometry of each mask between calls.

    Returns:
        ``out' - out`` of each head, (S, T, h, D), exactly 0 in rows that do not change, and the
        heads' sinks among the prompt's columns, (S, h, T) bool.
    """
    if record.call is None:
        raise InternalError("a layer's queries were not recorded")
    attention = record.attention
    if attention is None:
        raise InternalError("a layer's attention output was not recorded")
    geometries = {} if cache is None else cache
    if id(visible) not in geometries:
        geometries[id(visible)] = layout.geometry(visible)
    result = engine(
        record.call,
        geometry=geometries[id(visible)],  # type: ignore[arg-type]
        plan=plan,
        state=None,
        stock=lambda: attention,
    )
    if result.state is None:
        raise InternalError("the engine does not say which columns are sinks")
    heads = list(plan.heads)
    return result.output[:, :, heads] - attention[:, :, heads], result.state.sinks
