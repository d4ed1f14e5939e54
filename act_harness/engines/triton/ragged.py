"""Launches of the kernels for packed rows; see :mod:`act_harness.engines.triton.ragged_kernels`.

A packed forward of a small model is bound by the host, and a launch of a Triton kernel spends most
of its time on finding out which compiled kernel fits the arguments. The answer is kept here:
``kernel[grid](...)`` returns the compiled kernel, ``compiled[grid](...)`` launches just that. It
fits all calls with the same data type and constants, since all pointers are checked to be multiples
of 16 and no integer is specialised on.
"""

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

__all__ = ["FUSED", "RaggedBlocks", "SegmentKernels"]

FUSED = 256
"""Longest context, in tokens, whose rows the program that finds the sinks calibrates as well."""

_MOST_KERNELS = 1024


class RaggedBlocks(NamedTuple):
    """Rows and columns of a tile; powers of two, at least 16."""

    rows: int
    columns: int


def ragged_blocks(size: int) -> RaggedBlocks:
    """Choose tiles for heads of ``size`` values: two float32 sums of a tile stay in registers."""
    if size > 128:
        return RaggedBlocks(32, 32)
    return RaggedBlocks(64, 64) if size <= 64 else RaggedBlocks(64, 32)


class SegmentKernels:
    """Calibrates packed rows, and keeps the kernels that were compiled for it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """Store what is told the name of every kernel launched."""
        self.note = note
        self.blocks: RaggedBlocks | None = None
        """Tiles; None chooses them by head size."""
        self.fused = FUSED
        """Longest context, in tokens, that one launch finds the sinks of and calibrates."""
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def calibrate(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stock: RaggedOutput,
        *,
        segments: Segments,
        selection: Selection,
        detection: dict[str, Any],
        scale: float,
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
        """
        size, device = query.shape[-1], query.device
        blocks = self.blocks or ragged_blocks(size)
        slots, contexts = len(selection.plan.heads), segments.contexts
        width = segments.longest_context
        flags = torch.empty(contexts, slots, width, dtype=torch.uint8, device=device)
        facts = torch.empty(6, contexts, slots, dtype=torch.float32, device=device)
        pointers = (
            query, key, value, stock.output, stock.lse, segments.table,
            selection.heads, selection.strength, selection.damp, flags, facts,
        )  # fmt: skip
        numbers = (stock.lse.stride(0), width)
        constants = (
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            *stock.output.stride()[:2], slots, query.shape[1] // key.shape[1], scale, FEW_ROWS,
            MIN_OTHER_MASS,
        )  # fmt: skip
        continues = selection.plan.calibration.decode == "frozen"
        tiles = (
            continues, "ieee" if query.dtype == torch.float32 else "tf32",
            size, max(16, triton.next_power_of_2(size)), *blocks,
        )  # fmt: skip
        together = width <= self.fused
        self._launch(
            "segment_sinks", kernels.segment_sinks, (contexts * slots, 1, 1), pointers, numbers,
            (*constants, detection["limit"], detection["min_rows"], boundary(query.dtype),
             detection["INITIAL"], detection["RELATIVE"], detection["PROTECT"], detection["AUTO"],
             together, *tiles),
        )  # fmt: skip

        def rows(name: str, first: int, count: int, longest: int, tally: Tensor) -> None:
            self._launch(
                name, kernels.segment_rows,
                (triton.cdiv(longest, blocks.rows), count * slots, 1),
                (*pointers, tally), (*numbers, first, contexts),
                (*constants, name == "segment_rows", *tiles),
            )  # fmt: skip

        if not together:
            tally = torch.empty(3, contexts, slots, triton.cdiv(width, blocks.rows), device=device)
            rows("segment_rows", 0, contexts, width, tally)
            torch.sum(tally, dim=3, out=facts[2:5])
        if continues and segments.count > contexts:
            count = segments.count - contexts
            rows("answer_rows", contexts, count, segments.longest_answer, facts)
        return Report(facts)

    def _launch(
        self,
        name: str,
        kernel: Any,  # noqa: ANN401 - Triton's functions have no types
        grid: tuple[int, int, int],
        pointers: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
    ) -> None:
        self.note(name)
        query = pointers[0]
        places = 0
        for tensor in pointers:
            places |= tensor.data_ptr()
        # AMD's kernels are specialised by tensors' sizes too; the interpreter compiles nothing
        if places & 15 or not query.is_cuda or torch.version.hip is not None:
            kernel[grid](*pointers, *numbers, *constants)
            return
        place = (name, query.dtype, torch.cuda.current_device(), constants)
        compiled = self._compiled.get(place)
        if compiled is not None:
            compiled[grid](*pointers, *numbers, *constants)
            return
        if len(self._compiled) >= _MOST_KERNELS:
            self._compiled.clear()
        self._compiled[place] = kernel[grid](*pointers, *numbers, *constants)
