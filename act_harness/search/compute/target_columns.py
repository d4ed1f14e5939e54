"""Which prompt columns a strength acts on, by name: the methods and controls of a gradient search.

A target is one or two sets of columns, a strength each. What is detected follows the calibration's
rule on the attention maps as the layers below have made them; ``random`` and ``last`` are controls
that take as many columns as the head has sinks there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from act_harness.engines.reference import find_sinks

if TYPE_CHECKING:
    from act_harness.calibration import Calibration
    from act_harness.engines.operation import Geometry

__all__ = ["HEAD_LEVEL", "TARGETS", "PromptColumns", "set_names"]

HEAD_LEVEL = ("gate", "temperature")
"""Controls that act on a whole head: its output times exp(theta), its logits times exp(theta)."""


@dataclass(frozen=True)
class PromptColumns:
    """What targets are told from, in one layer of one batch; B sequences, H heads, T columns."""

    geometry: Geometry
    detection: Calibration
    """Settings of target ``sinks``: rule, protect, min_rows."""
    ids: Tensor  # (B, T) long
    layer: int
    seed: int
    """Of random columns: of the search (``random-fixed``), of search and pass (``random``)."""
    sums: Callable[[], Tensor]
    """Returns (B, H, T): attention that each column received from the prompt's rows."""

    @cached_property
    def sinks(self) -> Tensor:
        """(B, H, T) bool: the detected sinks (paper, section 3)."""
        seen, most = self.geometry.prompt_census
        found, _ = find_sinks(
            self.sums(),
            seen[:, None],
            most=most[:, None, None],
            first=self.geometry.first[:, None, None],
            calibration=self.detection,
        )
        return found

    @cached_property
    def initial(self) -> Tensor:
        """(B, 1, T) bool: the first real token."""
        column = torch.arange(self.geometry.total, device=self.ids.device)
        return (column == self.geometry.first[:, None])[:, None]

    def first_by(self, order: Tensor) -> Tensor:
        """Return as many prompt columns as there are sinks, those of smallest ``order``.

        Args:
            order: (B, H or 1, T) numbers; the initial token never is among them.
        """
        allowed = self.geometry.prompt[:, None] & ~self.initial
        count = self.sinks.sum(dim=-1, keepdim=True)
        order = order.masked_fill(~allowed, torch.iinfo(torch.int64).max)
        rank = order.argsort(dim=-1, stable=True).argsort(dim=-1)
        return (rank < count) & allowed

    def hashes(self, heads: int) -> Tensor:
        """Return (B, H, T) pseudo-random numbers of token, position, head, layer and seed.

        They depend on nothing else, so a draw is the same in every batch and on every device.
        """
        device = self.ids.device
        position = torch.arange(self.geometry.total, device=device) - self.geometry.first[:, None]
        mixed = _mixed(self.ids + (self.seed + 1) * 0x9E3779B1)
        mixed = _mixed(mixed + position)[:, None]
        return _mixed(mixed + self.layer * 4099 + torch.arange(heads, device=device)[:, None]) >> 2


def _mixed(values: Tensor) -> Tensor:
    """Scramble int64 (multiplications wrap around; constants of splitmix64)."""
    values = (values ^ (values >> 30)) * -0x40A7B892E31B1A47
    values = (values ^ (values >> 27)) * -0x6B2FB644ECCEEE15
    return values ^ (values >> 31)


def _sinks(columns: PromptColumns) -> tuple[Tensor, ...]:
    return (columns.sinks,)


def _initial(columns: PromptColumns) -> tuple[Tensor, ...]:
    return (columns.initial,)


def _both(columns: PromptColumns) -> tuple[Tensor, ...]:
    return columns.sinks & ~columns.initial, columns.initial.expand_as(columns.sinks)


def _random(columns: PromptColumns) -> tuple[Tensor, ...]:
    return (columns.first_by(columns.hashes(columns.sinks.shape[1])),)


def _last(columns: PromptColumns) -> tuple[Tensor, ...]:
    place = torch.arange(columns.geometry.total, device=columns.ids.device)
    return (columns.first_by(-place[None, None].expand(len(columns.ids), -1, -1)),)


TARGETS: dict[str, Callable[[PromptColumns], tuple[Tensor, ...]]] = {
    "sinks": _sinks,
    "initial": _initial,
    "both": _both,
    "random": _random,
    "random-fixed": _random,
    "last": _last,
}
"""Name to the sets of columns, (B, H or 1, T) bool each."""


def set_names(target: str) -> tuple[str, ...]:
    """Return what the strengths of a target act on, one name each."""
    return ("sinks", "initial") if target == "both" else (target,)
