"""A forward of the search under way: what it does otherwise than the stock model's, and its taps.

Attention is led here through the door that calibration uses too
(:mod:`act_harness.attention.interface`): a layer's queries, keys and values are seen, a known
attention output is given instead of computed, and rows of many sequences attend group by group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from act_harness.errors import InternalError
from act_harness.search.compute.records import Group, LayerRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from act_harness.engines.operation import AttentionCall

__all__ = ["AttentionDone", "Bench", "Grouped", "Run", "Tap"]


_BLOCK = 64
"""Rows of a block of attention on the CPU."""


@dataclass
class Run:
    """What the forward under way does differently from the stock model's."""

    mask: Callable[[int], Tensor] | None = None
    """(S, 1, T, T) by layer; None where ``groups`` have their own."""
    groups: Sequence[Group] = ()
    start: int = 0
    hidden: Tensor | None = None
    attention: Tensor | None = None
    """(S, T, H, D) of layer ``start``, of whole sequences that are run from it on."""
    own: Callable[[int], tuple[Tensor, Tensor]] | None = None
    """Keys and values by layer, (S, G, T, D), where such a run does not enter the layer."""
    projected: dict[int, Tensor] = field(default_factory=dict)
    """Attention outputs that are known and not computed, by layer."""
    places: Tensor | None = None  # (P, 2)
    headless: Tensor | None = None
    """(P,) bool: places whose rows the output head does not get."""
    record: dict[int, LayerRecord] | None = None
    keep_from: int = 0
    """First layer whose queries, input and outputs are recorded; keys and values are for all."""
    on_attention: Callable[[int, LayerRecord], None] | None = None
    embeds_grad: bool = False
    stops: int | None = None
    """Layer whose attention is computed for all rows and the rest of it for the read ones only."""
    stopped: Tensor | None = None  # (V, n, hidden): the attention output of that layer
    read: bool = field(default=False)
    replaced: bool = field(default=False)

    def picked(self, rows: Tensor | None) -> Tensor:
        """Return the rows that are read, (1, P, hidden)."""
        if rows is None or self.places is None:
            raise InternalError("rows are read that were not computed")
        return rows[self.places[:, 0], self.places[:, 1]][None]


class Bench(Protocol):
    """What a tap knows of the opened model that it sits on."""

    running: Run | None
    """The forward under way, where it is one of the search's."""
    obstacle: str | None
    """Why variants are run as whole sequences; None where they are rows of one."""


class AttentionDone(Exception):  # noqa: N818 - no error: leaves a layer behind its attention
    """Raised in the layer that ``stops`` names, once its attention output is known."""


@dataclass
class Grouped:
    """Attention over one row of tokens by groups (see ``attention.packed.Attends``)."""

    bench: Bench

    def attend(
        self,
        call: AttentionCall,
        *,
        binding: Any,  # noqa: ANN401 - the layer's tap
        run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """Return the attention output of all rows, (1, R, H, D)."""
        now, layer = self.bench.running, binding.layer
        if now is None:
            raise InternalError("a grouped forward attends outside of its run")
        parts, first = [], 0
        for group in now.groups:
            last = first + group.sequences * group.rows
            own = [
                one[0, :, first:last].unflatten(1, (group.sequences, group.rows)).transpose(0, 1)
                for one in call[:3]
            ]
            before = group.prefix(layer)
            if before is not None:
                own[1:] = [torch.cat(pair, dim=2) for pair in zip(before, own[1:], strict=True)]
            parts.append(_by_blocks(run, own, group.mask(layer)).flatten(0, 1))
            first = last
            if now.record is not None:
                now.record[layer] = LayerRecord(key=own[1], value=own[2])
        return torch.cat(parts)[None]


def _by_blocks(
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    projected: list[Tensor],
    mask: Tensor,
) -> Tensor:
    """Return attention of rows over columns, (V, n, H, D), leaving out columns that no row sees.

    Rows are the last columns, so a block of rows sees none behind its own last. Kernels for the
    CPU that are given a mask compute all columns of all rows.

    Args:
        run: the model's attention.
        projected: queries (V, H, n, D), keys and values (V, G, T, D).
        mask: (V, 1, n, T).
    """
    query, key, value = projected
    rows, columns = query.shape[2], key.shape[2]
    if rows <= _BLOCK or query.device.type != "cpu":
        return run(query, key, value, mask)
    parts = []
    for first in range(0, rows, _BLOCK):
        last = min(rows, first + _BLOCK)
        seen = columns - rows + last
        block = mask[:, :, first:last, :seen]
        parts.append(run(query[:, :, first:last], key[:, :, :seen], value[:, :, :seen], block))
    return torch.cat(parts, dim=1)


class Tap:
    """Bound to an attention module (see ``attention.interface``): sees queries, keys, values."""

    def __init__(self, bench: Bench, layer: int) -> None:
        self.bench, self.layer = bench, layer

    def attend(
        self,
        call: AttentionCall,
        mask: Tensor | None,
        *,
        stock: Callable[[], Tensor],
        stock_maps: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`act_harness.attention.interface.BoundLayer`."""
        run = self.bench.running
        if run is not None and run.attention is not None and run.start == self.layer:
            run.replaced = True
            return run.attention, None
        output = stock()
        if run is not None and run.record is not None:
            record = run.record.setdefault(self.layer, LayerRecord())
            record.key, record.value = call.key, call.value
            if self.layer >= run.keep_from:
                record.call, record.attention = call, output
                record.mask = mask if self.bench.obstacle is not None else None
                if run.on_attention is not None:
                    run.on_attention(self.layer, record)
        return output, None  # nobody asks a search's forward for its maps
