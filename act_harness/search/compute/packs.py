"""How the variants of a layer are packed into forwards.

A variant is one sequence with one head calibrated, from its first changed row on. The rows of a
pack lie one behind the other in a single row of tokens, so that all products of the model see one
matrix without padding; only attention has to tell variants apart. It runs by groups: variants of a
group begin at the same row and make a batch of sequences of one length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

__all__ = ["GROUP_COST", "Shared", "Variants", "packs_of"]

GROUP_COST = {"cpu": 1, "cuda": 64}
"""Rows that a group more in a pack costs as much as, by kind of device.

A group is about ten operations more in each layer: 60 microseconds of either device's host, where a
row of SmolLM2 takes 80 on a core and 1 on an H100.
"""


class Shared(NamedTuple):
    """What variants with the same changes in the common prefix share: its keys and values."""

    columns: dict[int, tuple[Tensor, Tensor]]
    """By layer above the calibrated one: (U, G, P, D) each."""
    member: Tensor  # (V,) long: which of the U a variant has


@dataclass(frozen=True)
class Variants:
    """Triples to run, as (V,) tensors, with each one's first row to compute, ascending."""

    strength: Tensor
    sequence: Tensor
    head: Tensor  # index among the layer's asked heads
    first: list[int]
    shared: Shared | None = None

    @classmethod
    def of(cls, triples: Tensor, first: Tensor, shared: Shared | None = None) -> Variants:
        """Sort ``triples`` (V, 3) by ``first`` (V,)."""
        order = torch.argsort(first, stable=True)
        chosen = triples[order]
        if shared is not None:
            shared = Shared(shared.columns, shared.member[order])
        return cls(chosen[:, 0], chosen[:, 1], chosen[:, 2], first[order].tolist(), shared)

    def __len__(self) -> int:
        """Return V."""
        return len(self.first)

    def some(self, chosen: slice) -> Variants:
        """Return a part of the variants."""
        shared = self.shared
        if shared is not None:
            shared = Shared(shared.columns, shared.member[chosen])
        return Variants(
            self.strength[chosen],
            self.sequence[chosen],
            self.head[chosen],
            self.first[chosen],
            shared,
        )


def packs_of(
    parts: Iterable[Variants], *, length: int, rows: int, group_cost: int
) -> Iterator[list[Variants]]:
    """Cut variants into packs of bounded size, and each pack into groups that begin together.

    A group's variants all run the rows of its first, longest one; a variant joins it as long as the
    rows run in vain cost less than a group of its own.

    Args:
        parts: variants sorted by their first row within each part; a part is taken when the packs
            before it are full.
        length: rows of a sequence.
        rows: most rows of a pack; a variant of more is a pack of its own.
        group_cost: in rows; see :data:`GROUP_COST`.
    """
    pack: list[Variants] = []
    held = 0
    for variants in parts:
        start, first = 0, variants.first
        while start < len(first):
            own = length - first[start]
            if held and held + own > rows:
                yield pack
                pack, held = [], 0
            most = min(len(first), start + max(1, (rows - held) // own))
            stop, wasted = start + 1, 0
            while stop < most:
                wasted += first[stop] - first[start]
                if wasted > group_cost:
                    break
                stop += 1
            pack.append(variants.some(slice(start, stop)))
            held += (stop - start) * own
            start = stop
    if pack:
        yield pack
