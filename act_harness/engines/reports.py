"""Counts of what calibration did to prompt rows, per block of rows, shared by the engines.

Axes: b sequence, h selected head, k row, t column. What the counters mean and how they become
figures of a run is said in :mod:`act_harness.attention.counters`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from act_harness.calibration import FEW_ROWS
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import Report, boundary

if TYPE_CHECKING:
    from act_harness.calibration import LayerPlan
    from act_harness.engines.strengths import RowFactors

__all__ = ["BlockReport", "block_report", "make_report"]


class BlockReport(NamedTuple):
    """Sums over the prompt rows of one block; each (b, h)."""

    moved: Tensor
    few_moved: Tensor
    alone: Tensor

    def __add__(self, other: BlockReport) -> BlockReport:  # type: ignore[override]
        return BlockReport(*(a + b for a, b in zip(self, other, strict=True)))


def block_report(
    few_moved: Tensor,  # (b, h, k, 1) m - m' of the sinks that few rows see
    factors: RowFactors,
    prompt: Tensor,  # (b, 1, k, 1) bool: rows of the prompt
) -> BlockReport:
    """Sum what a block of rows contributes."""
    return BlockReport(
        moved=(factors.moved * prompt).sum(dim=(2, 3)),
        few_moved=(few_moved * prompt).sum(dim=(2, 3)),
        alone=(factors.alone & prompt).sum(dim=(2, 3)),
    )


def few_columns(geometry: Geometry) -> Tensor:
    """(b, 1, t) bool: columns that fewer than four prompt rows see."""
    return geometry.prompt_census[0][:, None] < FEW_ROWS


def make_report(
    sinks: Tensor,  # (b, h, t) bool
    ratio: Tensor,  # (b, h, t) a / threshold of the columns that can be sinks
    sums: BlockReport,
    geometry: Geometry,
    plan: LayerPlan,
    dtype: torch.dtype,
) -> Report:
    """Join the block sums with what is counted over columns; ``dtype`` is the model's."""
    if plan.calibration.target == "head":  # what is marked there is the prompt, not sinks
        sinks = torch.zeros_like(sinks)
    return Report.of(
        sinks=sinks.sum(dim=2),
        few_sinks=(sinks & few_columns(geometry)).sum(dim=2),
        moved=sums.moved,
        few_moved=sums.few_moved,
        alone=sums.alone,
        near=((ratio - 1).abs() < boundary(dtype)).any(dim=2),
    )
