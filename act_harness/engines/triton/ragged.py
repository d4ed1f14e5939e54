"""Launches of the kernels for packed rows; see :mod:`act_harness.engines.triton.ragged_kernels`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from act_harness.calibration import FEW_ROWS, MIN_OTHER_MASS
from act_harness.engines.operation import Report, boundary
from act_harness.engines.triton import ragged_kernels as kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from act_harness.engines.ragged import RaggedOutput, Segments
    from act_harness.engines.triton.engine import Selection

__all__ = ["FUSED", "RaggedBlocks", "calibrate_segments"]

FUSED = 256
"""Longest context, in tokens, whose rows the program that finds the sinks calibrates as well."""


class RaggedBlocks(NamedTuple):
    """Rows and columns of a tile; powers of two, at least 16."""

    rows: int
    columns: int


def ragged_blocks(size: int) -> RaggedBlocks:
    """Choose tiles for heads of ``size`` values: two float32 sums of a tile stay in registers."""
    if size > 128:
        return RaggedBlocks(32, 32)
    return RaggedBlocks(64, 64) if size <= 64 else RaggedBlocks(64, 32)


def calibrate_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stock: RaggedOutput,
    *,
    segments: Segments,
    selection: Selection,
    detection: dict[str, Any],
    scale: float,
    note: Callable[[str], None],
    blocks: RaggedBlocks | None = None,
    fused: int = FUSED,
) -> Report:
    """Calibrate ``stock.output`` in place; return what that did to the contexts.

    Args:
        query: (N, H, D).
        key: (M, G, D), gathered.
        value: (M, G, D), gathered.
        stock: output (N, H, D) and log-sum-exp (H, N) of the stock kernel.
        segments: contexts and answers.
        selection: the layer's plan on the device.
        detection: the plan's settings of detection as the kernels take them.
        scale: factor on query-key products.
        note: told the name of every kernel launched.
        blocks: tiles; chosen by head size when None.
        fused: longest context that is calibrated in one launch.
    """
    calibration = selection.plan.calibration
    size = query.shape[-1]
    blocks = blocks or ragged_blocks(size)
    slots, contexts = len(selection.plan.heads), segments.contexts
    width = segments.longest_context
    flags = torch.empty(contexts, slots, width, dtype=torch.uint8, device=query.device)
    facts = torch.empty(6, contexts, slots, dtype=torch.float32, device=query.device)
    tensors = (
        query, key, value, stock.output, stock.lse, segments.table,
        selection.heads, selection.strength, selection.damp, flags, facts,
    )  # fmt: skip
    strides = (
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *stock.output.stride()[:2],
        stock.lse.stride(0),
    )  # fmt: skip
    group = query.shape[1] // key.shape[1]
    continues = calibration.decode == "frozen"
    common = {
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "D": size,
        "BD": max(16, triton.next_power_of_2(size)),
        "BM": blocks.rows,
        "BN": blocks.columns,
    }
    together = width <= fused
    note("segment_sinks")
    kernels.segment_sinks[(contexts * slots,)](
        *tensors, *strides, slots, group, width, scale,
        **detection, boundary=boundary(query.dtype), few_rows=FEW_ROWS,
        min_other=MIN_OTHER_MASS, FUSED=together, CONTINUE=continues, **common,
    )  # fmt: skip

    def rows(first: int, count: int, longest: int, tally: Tensor, *, context: bool) -> None:
        note("segment_rows" if context else "answer_rows")
        kernels.segment_rows[(triton.cdiv(longest, blocks.rows), count * slots)](
            *tensors, tally, *strides, first, contexts, slots, group, width,
            scale, FEW_ROWS, MIN_OTHER_MASS,
            CONTEXT=context, CONTINUE=continues, **common,
        )  # fmt: skip

    if not together:
        tally = torch.empty(
            3, contexts, slots, triton.cdiv(width, blocks.rows), device=query.device
        )
        rows(0, contexts, width, tally, context=True)
        torch.sum(tally, dim=3, out=facts[2:5])
    if continues and segments.count > contexts:
        longest = segments.longest_answer
        rows(contexts, segments.count - contexts, longest, facts, context=False)
    return Report(facts)
