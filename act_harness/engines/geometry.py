"""Which token is where: columns that are real, those of the prompt, and what each row can see.

One :class:`Geometry` describes a forward for all layers that share a mask, so that what is derived
from it is computed once: facts that every engine may ask are its properties, what only one engine
needs is in :meth:`Geometry.scratch`. Shapes are those of :mod:`act_harness.engines.operation`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["Geometry"]

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Geometry:
    """Which token is where, for all layers that share a mask.

    Columns are counted in absolute positions 0..T-1, pads included. The rows of the call are the
    positions ``first_row``..T-1, its keys the positions ``first_column``..``first_column``+K-1.
    """

    real: Tensor  # (B, T) bool: not a pad
    prompt: Tensor  # (B, T) bool: real and given, as against scored or generated
    first_row: int
    first_column: int
    columns: int  # K
    mask: Tensor | None = None  # (B or 1, 1, C, K) bool, the model's own; None: causal
    ids: Tensor | None = None  # (B, T) of the tokens, in a prefill; what target 'random' draws by
    span: Tensor | None = None  # (B, T) bool, in a prefill: the columns of target 'span'
    scratched: dict[Hashable, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What :meth:`scratch` has made, by key."""

    def scratch(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Return what an engine derives from the geometry, made once for the layers that share it.

        Args:
            key: names it among the works of all engines.
            make: called where there is none yet.
        """
        if key not in self.scratched:
            self.scratched[key] = make()
        made: _Made = self.scratched[key]
        return made

    @property
    def total(self) -> int:
        """T, the number of tokens so far, pads included."""
        return self.real.shape[1]

    @property
    def rows(self) -> int:
        """C, the number of query rows of this call."""
        return self.total - self.first_row

    def visible(self, start: int, stop: int) -> Tensor:
        """Return (B, 1, stop - start, K) bool: which columns the rows of a block can see.

        ``start`` and ``stop`` count the rows of this call. Pads are neither rows nor columns.
        """
        last = self.first_column + self.columns
        if self.mask is None:
            row = torch.arange(start, stop, device=self.real.device) + self.first_row
            column = torch.arange(self.first_column, last, device=self.real.device)
            seen = (column[None, :] <= row[:, None])[None, None]
        else:
            seen = self.mask[:, :, start:stop]
        row_real = self.real[:, self.first_row + start : self.first_row + stop]
        column_real = self.real[:, self.first_column : last]
        return seen & row_real[:, None, :, None] & column_real[:, None, None, :]

    @cached_property
    def plain(self) -> bool:
        """Whether stock attention without a mask sees exactly what :meth:`visible` says.

        True for a causal prefill without pads or with pads on the right only (which no real row
        sees), and for one row that sees every column. Looks at values once (on an accelerator
        that waits for it); the layers of a forward share the answer.
        """
        if self.mask is not None or self.first_column != 0 or self.columns != self.total:
            return False
        if self.first_row == 0:
            return not bool((self.real[:, 1:] & ~self.real[:, :-1]).any())
        return self.rows == 1 and bool(self.real.all())

    @cached_property
    def intervals(self) -> tuple[Tensor, Tensor] | None:
        """First and last column that each row sees, (B, C) int32 each, of the held columns.

        Between them a row sees every real column; a row that sees none has 0 and -1. None for
        masks that are not of this kind (looked at once; causal and sliding windows are).
        """
        batch = self.real.shape[0]
        if self.mask is None:
            row = torch.arange(self.rows, dtype=torch.int32, device=self.real.device)
            hi = (row + (self.first_row - self.first_column)).expand(batch, -1).contiguous()
            return torch.zeros_like(hi), hi
        held = self.real[:, self.first_column : self.first_column + self.columns]
        before = torch.nn.functional.pad(held.cumsum(dim=1), (1, 0))  # real ones before a column
        lows, highs, exact = [], [], []
        for start in range(0, self.rows, 512):
            seen = self.visible(start, min(start + 512, self.rows))[:, 0]
            number = seen.sum(dim=2)
            low = seen.to(torch.uint8).argmax(dim=2)
            high = self.columns - 1 - seen.flip(2).to(torch.uint8).argmax(dim=2)
            high = torch.where(number > 0, high, -1)
            between = before.gather(1, high + 1) - before.gather(1, low)
            exact.append(((between == number) | (number == 0)).all())
            lows.append(low)
            highs.append(high)
        if not bool(torch.stack(exact).all()):
            return None
        return torch.cat(lows, 1).to(torch.int32), torch.cat(highs, 1).to(torch.int32)

    @cached_property
    def first(self) -> Tensor:
        """(B,) absolute position of the first real token."""
        return self.real.int().argmax(dim=1)

    @cached_property
    def prompt_rows(self) -> Tensor:
        """(B, C) bool: rows of this call that belong to the prompt."""
        return self.prompt[:, self.first_row :]

    @cached_property
    def continuation_rows(self) -> Tensor:
        """(B, C) bool: rows of this call that are real and do not belong to the prompt."""
        return (self.real & ~self.prompt)[:, self.first_row :]

    @cached_property
    def has_prompt_rows(self) -> bool:
        """Whether any row of this call belongs to a prompt."""
        return self.first_row == 0 and bool(self.prompt.any())

    @cached_property
    def only_prompt(self) -> bool:
        """Whether every row of this call belongs to a prompt: no pads, nothing scored."""
        return self.first_row == 0 and bool(self.prompt.all())

    @cached_property
    def has_continuation_rows(self) -> bool:
        """Whether any row of this call is scored or generated."""
        return bool(self.continuation_rows.any())

    @cached_property
    def prompt_census(self) -> tuple[Tensor, Tensor]:
        """``seen`` (B, T): prompt rows that see each column; ``n`` (B,): most columns of a row.

        Only for a prefill; ``n`` is N of the paper, limited by a sliding window where there is
        one, since the model's own mask is counted.
        """
        if self.mask is None and self.first_column == 0:  # causal: a row sees all real ones before
            seen = self.prompt.flip(1).cumsum(dim=1).flip(1) * self.real
            return seen, (self.real.cumsum(dim=1) * self.prompt).amax(dim=1)
        seen = torch.zeros_like(self.real, dtype=torch.int64)
        most = torch.zeros(self.real.shape[0], dtype=torch.int64, device=self.real.device)
        for start in range(0, self.rows, 512):
            stop = min(start + 512, self.rows)
            block = self.visible(start, stop)[:, 0] & self.prompt_rows[:, start:stop, None]
            seen[:, self.first_column : self.first_column + self.columns] += block.sum(dim=1)
            most = torch.maximum(most, block.sum(dim=2).amax(dim=1))
        return seen, most
