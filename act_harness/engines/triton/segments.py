"""Launches of the kernels for packed rows; see :mod:`act_harness.engines.triton.segment_kernels`.

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
from act_harness.engines.operation import Report, boundary, member
from act_harness.engines.triton import segment_kernels as kernels
from act_harness.engines.triton.selection import COMPUTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from act_harness.calibration import LayerPlan
    from act_harness.engines.operation import AttentionCall
    from act_harness.engines.segments import RaggedOutput, Segments
    from act_harness.engines.triton.selection import Selection

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


class _Family(NamedTuple):
    """What is the same for all forwards of a layer: the kernels' constants."""

    plan: LayerPlan  # held, so that its id stays its own
    slots: int
    rows: int  # of a tile
    continues: bool
    sinks: tuple[Any, ...]  # constants of ``segment_sinks``, by whether it is fused
    contexts: tuple[Any, ...]  # of ``segment_rows`` on contexts
    answers: tuple[Any, ...]  # and on answers


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
        self._families: dict[tuple[Any, ...], _Family] = {}

    def calibrate(
        self,
        call: AttentionCall,
        stock: RaggedOutput,
        *,
        segments: Segments,
        selection: Selection,
        detection: Callable[[], dict[str, Any]],
    ) -> Report:
        """Calibrate ``stock.output`` in place; return what that did to the contexts.

        Args:
            call: queries (N, H, D), gathered keys and values (M, G, D).
            stock: output (N, H, D) and log-sum-exp (H, N) of the stock kernel.
            segments: contexts and answers.
            selection: the layer's plan on the device.
            detection: gives the plan's settings of detection as the kernels take them.
        """
        query, key, value = call[:3]
        device = query.device
        family = self._family(call, stock.output, selection, detection)
        slots, contexts, width = family.slots, segments.contexts, segments.longest_context
        flags = torch.empty(contexts, slots, width, dtype=torch.uint8, device=device)
        facts = torch.empty(6, contexts, slots, dtype=torch.float32, device=device)
        pointers = (
            query, key, value, stock.output, stock.lse, segments.table,
            selection.heads, selection.strength, selection.masses, flags, facts,
        )  # fmt: skip
        numbers = (stock.lse.stride(0), width)
        together = width <= self.fused
        self._launch(
            "segment_sinks", kernels.segment_sinks, (contexts * slots, 1, 1), pointers, numbers,
            family.sinks[together],
        )  # fmt: skip
        if not together:
            blocks = triton.cdiv(width, family.rows)
            tally = torch.empty(3, contexts, slots, blocks, device=device)
            self._launch(
                "segment_rows", kernels.segment_rows, (blocks, contexts * slots, 1),
                (*pointers, tally), (*numbers, 0, contexts), family.contexts,
            )  # fmt: skip
            torch.sum(tally, dim=3, out=facts[2:5])
        if family.continues and segments.answers:
            blocks = triton.cdiv(segments.longest_answer, family.rows)
            self._launch(
                "answer_rows", kernels.segment_rows, (blocks, segments.answers * slots, 1),
                (*pointers, facts), (*numbers, contexts, contexts), family.answers,
            )  # fmt: skip
        return Report(facts)

    def _family(
        self,
        call: AttentionCall,
        output: Tensor,
        selection: Selection,
        detection: Callable[[], dict[str, Any]],
    ) -> _Family:
        """Return the constants of such tensors under the plan, made once."""
        query, key, value, scale = call[:4]
        place = (
            id(selection.plan), query.dtype, query.stride(), key.stride(), value.stride(),
            output.stride(), query.shape[1], key.shape[1], scale, self.blocks,
        )  # fmt: skip
        found = self._families.get(place)
        if found is None:
            if len(self._families) >= _MOST_KERNELS:
                self._families.clear()
            found = self._families[place] = self._make_family(call, output, selection, detection())
        return found

    def _make_family(
        self, call: AttentionCall, output: Tensor, selection: Selection, detection: dict[str, Any]
    ) -> _Family:
        plan = selection.plan
        query, key, value, scale = call[:4]
        size = query.shape[-1]
        blocks = self.blocks or ragged_blocks(size)
        continues = member("decode", plan.calibration.decode, COMPUTES) == "frozen"
        constants = (
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *output.stride()[:2],
            len(plan.heads), query.shape[1] // key.shape[1], scale, FEW_ROWS, MIN_OTHER_MASS,
        )  # fmt: skip
        found = (
            detection["limit"], detection["min_rows"], boundary(query.dtype),
            detection["TARGET"], detection["RELATIVE"], detection["PROTECT"], detection["AUTO"],
        )  # fmt: skip
        tiles = (
            continues, "ieee" if query.dtype == torch.float32 else "tf32", selection.maps,
            size, max(16, triton.next_power_of_2(size)), *blocks,
        )  # fmt: skip
        return _Family(
            plan,
            len(plan.heads),
            blocks.rows,
            continues,
            sinks=tuple((*constants, *found, fused, *tiles) for fused in (False, True)),
            contexts=(*constants, True, *tiles),
            answers=(*constants, False, *tiles),
        )

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
