"""Which kernels run for a call, with what block sizes; see the package's docstring."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from act_harness.calibration import FEW_ROWS, MIN_OTHER_MASS, Calibration, LayerPlan
from act_harness.engines.base import attend_with_lse
from act_harness.engines.operation import EngineResult, Geometry, LayerState, Report, boundary
from act_harness.engines.ragged import LONGEST
from act_harness.engines.torch import TorchEngine
from act_harness.engines.triton import direct, kernels
from act_harness.engines.triton.decode import Sheet, Steps, make_sheet
from act_harness.engines.triton.ragged import SegmentKernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from act_harness.engines.ragged import RaggedOutput, Segments

__all__ = ["Blocks", "Selection", "TritonEngine"]

_logger = logging.getLogger(__name__)

_MOST_ON = {torch.float32: 0.5, torch.float16: 0.9, torch.bfloat16: 0.98}
"""Mass on the sinks beyond which 1 - m has lost too many digits for the dtype of the output."""

_PROTECT = {"none": 0, "initial": 1, "first-flagged": 2}


class Blocks(NamedTuple):
    """Block sizes of the kernels (powers of two; at least 16 for rows, columns and sinks)."""

    sums_rows: int
    sums_columns: int
    sums_warps: int
    apply_rows: int
    direct_rows: int
    direct_columns: int
    sinks: int = 16
    stages: int = 3
    fold: bool = True
    apply_warps: int = 4
    direct_warps: int = 4
    direct_stages: int = 3
    direct_registers: int | None = None
    """Most registers of a thread, so that more programs fit side by side; None: as needed."""
    sums_registers: int | None = None
    apply_registers: int | None = None
    apply_stages: int = 3
    items: int = 132
    """Programs that listed rows are split for, to fill the chip."""
    least: int = 256
    """Fewest columns of a split."""
    finish_rows: int = 32
    """Rows whose parts one program adds up; at most ``direct_rows``."""


def default_blocks(size: int, dtype: torch.dtype, rows: int) -> Blocks:
    """Choose blocks for heads of ``size`` values; tuned on one H200, bf16, 128 values."""
    wide = dtype == torch.float32 or size > 128
    if rows <= 16:
        return Blocks(16, 64, 4, 16, 16, 64, finish_rows=16)
    if wide:
        return Blocks(32, 64, 4, 32, 32, 32, stages=2, direct_stages=2)
    if rows < 1024:
        return Blocks(128, 64, 4, 64, 64, 64)
    return Blocks(
        64, 128, 8, 64, 128, 64, direct_warps=8, apply_stages=1, apply_registers=128
    )  # fmt: skip


_LEAST_SCRATCH = 4 << 20
_CONCURRENT_QUERIES = 16 << 20
"""Bytes of queries that programs running side by side read: less than the chip's L2 cache."""


@dataclass
class TritonState(LayerState):
    """The prompt's sinks also as lists, so that extending touches only their columns."""

    index: Tensor | None = None  # (B, h, T) int32: flagged columns first, in order
    count: Tensor | None = None  # (B, h) int32
    flags: Tensor | None = None  # (B, h, T) uint8: the sinks as the kernels read them

    def __post_init__(self) -> None:
        """Leave what decode steps read to the first of them; it is no field, selections lose it."""
        self.sheet: Sheet | None = None

    def sheet_of(self, selection: Selection) -> Sheet:
        """Return what decode steps under this plan read."""
        if self.sheet is None or self.sheet.plan is not selection.plan:
            if self.index is None or self.count is None or self.flags is None:
                raise ValueError("the state's sinks are not listed")
            self.sheet = make_sheet(
                selection.plan, selection.facts, index=self.index, count=self.count,
                flags=self.flags,
            )  # fmt: skip
        return self.sheet


class Selection(NamedTuple):
    """A layer's plan on the device."""

    plan: LayerPlan  # held, so that its id stays its own
    heads: Tensor  # (h,) int32
    strength: Tensor  # (h,) float32
    damp: Tensor  # (h,) int32
    facts: Tensor  # (h, 3) int32: the three, the strength by its bits


class _Rows(NamedTuple):
    """A geometry as the kernels read it; shared by the layers of a forward."""

    kind: Tensor  # (B, C) uint8: 0 pad, 1 prompt, 2 continuation
    real: Tensor  # (B, T) uint8
    lo: Tensor  # (B, C) int32: first column a row sees
    hi: Tensor  # (B, C) int32: last column it sees, -1 for none


class _Found(NamedTuple):
    """What the correction by differences leaves."""

    counts: Tensor  # (B * h, parts) int32: rows that lose digits, by part of the rows
    rows: Tensor  # (B, h, C) int32: those, at the front of their part
    tally: Tensor  # (3, B, h, C) float32, or ``counts`` where no report is wanted
    seen: Tensor  # (B, T) int32, likewise


class _Share(NamedTuple):
    """How listed rows are shared out among programs: tables that the device fills, and room."""

    size: int  # rows of a block
    per_pair: int  # most blocks of rows of a sequence and slot
    programs: int
    most_split: int  # most blocks whose columns are split
    listed: Tensor  # (B * h,) int32: number of listed rows
    rows: Tensor  # (B, h, C) int32: those rows, in order
    work: Tensor  # (5, B * h * per_pair) int32, see ``direct``
    items: Tensor  # (2, programs) int32
    facts: Tensor  # (2,) int32
    values: Tensor  # (2 * aim, size, D) float32: parts of sums
    masses: Tensor  # (2 * aim, size) float32


class TritonEngine:
    """See :mod:`act_harness.engines.triton`."""

    name = "triton"

    def __init__(self, blocks: Blocks | None = None) -> None:
        """Store the block sizes; None chooses them by head size and dtype."""
        self.blocks = blocks
        self.segments = SegmentKernels(self._note)
        self.fallback = TorchEngine()
        self.calls: dict[str, int] = {}
        """How often each kernel, or the fallback, was launched."""
        self._warned: set[str] = set()
        self._selections: dict[tuple[int, torch.device], Selection] = {}
        self.steps = Steps(self._note, _MOST_ON)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        geometry: Geometry,
        plan: LayerPlan,
        state: LayerState | None,
        stock: Callable[[], Tensor],
        scale: float,
        softcap: float | None = None,
    ) -> EngineResult:
        """See :class:`act_harness.engines.operation.Engine`."""
        if state is not None and query.shape[2] == 1:  # a decode step, most often like the last
            sheet = getattr(state, "sheet", None)
            if sheet is not None and sheet.plan is plan:
                stepped = self.steps.known(
                    query, key, value, geometry=geometry, sheet=sheet, stock=stock, scale=scale,
                    softcap=softcap,
                )  # fmt: skip
                if stepped is not None:
                    return EngineResult(stepped, state, None)
        reason = _unsupported(query, key, value, geometry, plan, state)
        if reason:
            self._note("fallback")
            if reason not in self._warned:
                self._warned.add(reason)
                _logger.warning("engine triton leaves %s to engine torch", reason)
            return self.fallback(
                query, key, value, geometry=geometry, plan=plan, state=state, stock=stock,
                scale=scale, softcap=softcap,
            )  # fmt: skip
        selection = self._select(plan, query.device)
        frozen = plan.calibration.decode != "off"
        if state is not None and query.shape[2] == 1 and frozen:
            found = _listed(state)
            sheet = found.sheet_of(selection)
            stepped = self.steps.other(
                query, key, value, geometry=geometry, sheet=sheet, stock=stock, scale=scale,
                softcap=softcap,
            )  # fmt: skip
            return EngineResult(stepped, found, None)
        output, lse = attend_with_lse(
            query, key, value, geometry=geometry, stock=stock, scale=scale, softcap=softcap
        )
        if not frozen and geometry.first_row > 0:
            return EngineResult(output, state, None)
        call = _Call(self, query, key, value, geometry, selection, lse, scale, softcap)
        if state is None:
            found, facts = call.detect()
            tally = call.apply(found, output, report=True)
            return EngineResult(output, found, _report(facts, tally))
        found = _listed(state)
        call.apply(found, output)
        return EngineResult(output, found, None)

    def takes_segments(self, plan: LayerPlan, segments: Segments) -> bool:
        """Whether :meth:`calibrate_segments` computes such a plan on such segments."""
        return plan.calibration.decode != "running" and segments.longest_context <= LONGEST

    def calibrate_segments(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stock: RaggedOutput,
        *,
        segments: Segments,
        plan: LayerPlan,
        scale: float,
    ) -> Report:
        """Calibrate a packed row in place; see :mod:`act_harness.engines.triton.ragged`."""
        return self.segments.calibrate(
            query, key, value, stock,
            segments=segments,
            selection=self._select(plan, query.device),
            detection=lambda: _detection(plan.calibration),
            scale=scale,
        )  # fmt: skip

    def _note(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def _select(self, plan: LayerPlan, device: torch.device) -> Selection:
        place = (id(plan), device)
        if place not in self._selections:
            heads = torch.tensor(plan.heads, dtype=torch.int32, device=device)
            strength = torch.tensor([s.strength for s in plan.strengths], device=device)
            damp = torch.tensor(
                [s.mass == "damp" for s in plan.strengths], dtype=torch.int32, device=device
            )
            facts = torch.stack([heads, strength.view(torch.int32), damp], dim=1)
            self._selections[place] = Selection(plan, heads, strength, damp, facts)
        return self._selections[place]


class _Call:
    """The launches of one layer's call."""

    def __init__(
        self,
        engine: TritonEngine,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        geometry: Geometry,
        selection: Selection,
        lse: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.engine, self.geometry, self.selection = engine, geometry, selection
        self.query, self.key, self.value = (_last_axis_dense(x) for x in (query, key, value))
        self.scale, self.softcap = scale, softcap
        self.blocks = engine.blocks or default_blocks(query.shape[-1], query.dtype, geometry.rows)
        self.rows = _rows_of(geometry)
        self.pairs = query.shape[0] * len(selection.plan.heads)
        self.plain = geometry.first_row == 0 and geometry.plain
        self.by_head = lse is not None
        self.bias = self.rows.real  # of a prefill: -inf for sinks and pads; unused otherwise
        self.lse = lse if lse is not None else self._own_lse()

    def _common(self) -> dict[str, Any]:
        size = self.query.shape[-1]
        return {
            "slots": len(self.selection.plan.heads),
            "per_group": self.query.shape[1] // self.key.shape[1],
            "scale": self.scale,
            "softcap": self.softcap or 0.0,
            "rows": self.geometry.rows,
            "columns": self.geometry.columns,
            "total": self.geometry.total,
            "first_column": self.geometry.first_column,
            "PLAIN": self.plain,
            "SOFTCAP": self.softcap is not None,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
            "D": size,
            "BD": max(16, triton.next_power_of_2(size)),
        }

    def _own_lse(self) -> Tensor:
        self.engine._note("row_lse")
        heads = len(self.selection.plan.heads)
        batch, rows = self.query.shape[0], self.geometry.rows
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=self.query.device)
        kernels.row_lse[(triton.cdiv(rows, self.blocks.apply_rows), self.pairs)](
            self.query, self.key, lse, self.selection.heads,
            self.rows.real, self.rows.lo, self.rows.hi,
            *self.query.stride()[:3], *self.key.stride()[:3],
            **self._common(), BM=self.blocks.apply_rows, BN=self.blocks.direct_columns,
        )  # fmt: skip
        return lse

    def detect(self) -> tuple[TritonState, Tensor]:
        """Find the prompt's sinks; return them with the facts of ``flag_sinks``, (3, B, h)."""
        geometry, calibration = self.geometry, self.selection.plan.calibration
        device = self.query.device
        shape = (self.query.shape[0], len(self.selection.plan.heads), geometry.total)
        whole = geometry.first_column == 0 and geometry.columns == geometry.total
        make = torch.empty if whole else torch.zeros
        sums = make(shape, dtype=torch.float32, device=device)
        if calibration.target == "sinks" or calibration.decode == "running":
            self._sums(sums)
        flags = torch.empty(shape, dtype=torch.bool, device=device)
        index = torch.empty(shape, dtype=torch.int32, device=device)
        self.bias = torch.empty(shape, dtype=torch.float32, device=device)
        facts = torch.empty(3, *shape[:2], dtype=torch.int32, device=device)
        seen, most = _census(geometry)
        self.engine._note("flag_sinks")
        kernels.flag_sinks[(self.pairs,)](
            sums, seen, most, geometry.first, self.rows.real, flags.view(torch.uint8), index,
            self.bias, facts,
            geometry.total, shape[1], **_detection(calibration),
            boundary=boundary(self.query.dtype), few_rows=FEW_ROWS,
            BLOCK=min(4096, triton.next_power_of_2(geometry.total)), num_warps=8,
        )  # fmt: skip
        running = calibration.decode == "running"
        state = TritonState(
            flags,
            sums if running else None,
            seen if running else None,
            index,
            facts[0],
            flags.view(torch.uint8),
        )
        return state, facts

    def _sums(self, sums: Tensor) -> None:
        self.engine._note("column_sums")
        blocks = self.blocks
        lse = self.lse
        if not self.geometry.only_prompt:
            lse = lse.masked_fill(~self.geometry.prompt_rows[:, None], float("inf"))
        bytes_of_one = self.geometry.rows * self.query.shape[-1] * self.query.element_size()
        programs = triton.cdiv(self.geometry.columns, blocks.sums_columns) * self.pairs
        kernels.column_sums[(programs,)](
            self.query, self.key, lse, sums, self.selection.heads,
            self.rows.real, self.rows.lo, self.rows.hi,
            *self.query.stride()[:3], *self.key.stride()[:3], *lse.stride(),
            **self._common(), pairs=self.pairs,
            together=min(self.pairs, max(1, _CONCURRENT_QUERIES // bytes_of_one)),
            BY_HEAD=self.by_head, FOLD=blocks.fold,
            BM=blocks.sums_rows, BN=blocks.sums_columns,
            num_warps=blocks.sums_warps, num_stages=blocks.stages, maxnreg=blocks.sums_registers,
        )  # fmt: skip

    def apply(self, state: TritonState, output: Tensor, *, report: bool = False) -> Tensor | None:
        """Calibrate ``output`` (B, C, H, D).

        Returns:
            The kernels' tally (3, B, h, C), when a report is wanted.
        """
        found = self.correct(state, output, report=report)
        self.sum_anew(state, output, found)
        return found.tally if report else None

    def _inputs(self, output: Tensor) -> tuple[Tensor, ...]:
        return (
            self.query, self.key, self.value, output, self.lse, self.selection.heads,
            self.selection.strength, self.selection.damp, self.rows.kind,
        )  # fmt: skip

    def _strides(self, output: Tensor) -> tuple[int, ...]:
        return (
            *self.query.stride()[:3], *self.key.stride()[:3], *self.value.stride()[:3],
            output.stride(0), output.stride(2), output.stride(1), *self.lse.stride(),
        )  # fmt: skip

    def _settings(self, state: TritonState, report: bool) -> dict[str, Any]:
        return {
            **self._common(),
            "sink_total": state.sinks.shape[-1],
            "few_rows": FEW_ROWS,
            "BY_HEAD": self.by_head,
            "REPORT": report,
            "BS": self.blocks.sinks,
        }

    def correct(self, state: TritonState, output: Tensor, *, report: bool) -> _Found:
        """Calibrate by the difference; return the rows where it would lose digits."""
        blocks, geometry, device = self.blocks, self.geometry, self.query.device
        shape = (self.query.shape[0], len(self.selection.plan.heads), geometry.rows)
        parts = triton.cdiv(geometry.rows, blocks.apply_rows)
        counts = torch.empty(self.pairs, parts, dtype=torch.int32, device=device)
        found = _Found(
            counts,
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(3, *shape, device=device) if report else counts,
            _census(geometry)[0] if report else counts,
        )
        self.engine._note("apply")
        kernels.apply_sinks[(parts, self.pairs)](
            *self._inputs(output), self.rows.lo, self.rows.hi,
            found.seen, state.index, state.count, found.counts, found.rows, found.tally,
            *self._strides(output), **self._settings(state, report),
            most_on=_MOST_ON[self.query.dtype],
            CONTINUE=self.selection.plan.calibration.decode == "frozen", BM=blocks.apply_rows,
            num_warps=blocks.apply_warps, num_stages=blocks.apply_stages,
            maxnreg=blocks.apply_registers,
        )  # fmt: skip
        return found

    def sum_anew(self, state: TritonState, output: Tensor, found: _Found) -> None:
        """Sum the rows that ``correct`` left."""
        blocks, rows = self.blocks, self.rows
        share = self._share(found)
        common = self._settings(state, found.tally is not found.counts)
        del common["total"]
        common |= {"min_other": MIN_OTHER_MASS, "per_pair": share.per_pair, "pairs": self.pairs}
        inputs, strides = self._inputs(output), self._strides(output)
        tables = (
            found.seen, state.index, state.count,
            share.listed, share.rows, share.work, share.items, share.facts, found.tally,
            share.values, share.masses,
        )  # fmt: skip
        self.engine._note("direct")
        direct.direct_sums[(share.programs,)](
            *inputs, rows.lo, rows.hi, rows.real, state.flags, self.bias, *tables, *strides,
            **common, total=self.geometry.total, BM=share.size, BN=blocks.direct_columns,
            num_warps=blocks.direct_warps, num_stages=blocks.direct_stages,
            maxnreg=blocks.direct_registers,
        )  # fmt: skip
        if share.most_split:
            self.engine._note("finish")
            part = min(blocks.finish_rows, share.size)
            direct.finish_direct[(share.most_split * (share.size // part),)](
                *inputs, rows.lo, rows.hi, *tables, *strides,
                **common, programs=share.programs, BM=share.size, FM=part,
            )  # fmt: skip

    def _share(self, found: _Found) -> _Share:
        """Share the listed rows out among programs; how many there are, only the device knows."""
        blocks, size, columns = self.blocks, self.blocks.direct_rows, self.geometry.columns
        width = max(16, triton.next_power_of_2(self.query.shape[-1]))
        per_pair = triton.cdiv(self.geometry.rows, size)
        row_blocks = per_pair * self.pairs
        # Partial sums take no more than the base kernel's output did before it was transposed.
        room = max(self.query.nbytes, _LEAST_SCRATCH) // (4 * size * width)
        aim = min(blocks.items, room // 2) if columns > blocks.least else 0
        device = self.query.device
        share = _Share(
            size,
            per_pair,
            row_blocks + aim,
            min(aim, row_blocks),
            torch.empty(self.pairs, dtype=torch.int32, device=device),
            torch.empty_like(found.rows),
            torch.empty(5, row_blocks, dtype=torch.int32, device=device),
            torch.empty(2, row_blocks + aim, dtype=torch.int32, device=device),
            torch.empty(2, dtype=torch.int32, device=device),
            torch.empty(max(1, 2 * aim), size, width, dtype=torch.float32, device=device),
            torch.empty(max(1, 2 * aim), size, dtype=torch.float32, device=device),
        )
        self.engine._note("gather")
        direct.gather_rows[(self.pairs,)](
            found.counts, found.rows, self.rows.lo, self.rows.hi,
            share.listed, share.rows, share.work,
            self.geometry.rows, columns, len(self.selection.plan.heads), found.counts.shape[1],
            per_pair, row_blocks, PLAIN=self.plain, AM=blocks.apply_rows, BM=size,
            BN=blocks.direct_columns, PARTS=max(1, 4096 // blocks.apply_rows),
            BLOCKS=128 if self.plain else max(1, 2048 // size), num_warps=8,
        )  # fmt: skip
        direct.share_out[(1,)](
            share.work, share.items, share.facts, row_blocks, row_blocks + aim, aim,
            triton.cdiv(blocks.least, blocks.direct_columns), BLOCK=512, num_warps=8,
        )  # fmt: skip
        return share


def _unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Geometry,
    plan: LayerPlan,
    state: LayerState | None,
) -> str:
    """Say what the kernels cannot do; empty where they can."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype} inputs"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on {query.device.type}"
    if not key.shape[-1] == value.shape[-1] <= 256:
        return f"head sizes {key.shape[-1]} and {value.shape[-1]}"
    running = plan.calibration.decode == "running"
    if running and (state is not None or geometry.has_continuation_rows):
        return "the continuation rows of decode 'running'"
    step = state is not None and query.shape[2] == 1  # one row's mask need not be an interval
    if not step and geometry.intervals is None:
        return "masks that are no interval of columns for every row"
    return ""


def _last_axis_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows_of(geometry: Geometry) -> _Rows:
    """Return the geometry in the kernels' form, computed once for all layers that share it."""
    known: _Rows | None = geometry.__dict__.get("_triton_rows")
    if known is None:
        if geometry.intervals is None:
            raise ValueError("the rows' visible columns are no intervals")
        kind = geometry.prompt_rows.to(torch.uint8) + 2 * geometry.continuation_rows
        lo, hi = geometry.intervals
        known = _Rows(kind.contiguous(), geometry.real.contiguous().view(torch.uint8), lo, hi)
        geometry.__dict__["_triton_rows"] = known
    return known


def _census(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return the prompt's census as contiguous int32."""
    known: tuple[Tensor, Tensor] | None = geometry.__dict__.get("_triton_census")
    if known is None:
        seen, most = geometry.prompt_census
        known = seen.to(torch.int32).contiguous(), most.to(torch.int32)
        geometry.__dict__["_triton_census"] = known
    return known


def _detection(calibration: Calibration) -> dict[str, Any]:
    """Return the settings of detection as ``flag_sinks`` takes them."""
    initial = calibration.target == "initial"
    relative = calibration.rule != "absolute"
    limit = calibration.alpha if relative else calibration.tau
    auto = calibration.min_rows == "auto"
    least = 1 if initial or auto else int(calibration.min_rows or 1)
    if auto and not relative:
        least, auto = int(calibration.required_rows(1.0)), False
    return {
        "limit": 1.0 if initial else float(limit or 0.0),
        "min_rows": least,
        "INITIAL": initial,
        "RELATIVE": relative,
        "PROTECT": _PROTECT[calibration.protect or "none"],
        "AUTO": auto,
    }


def _listed(state: LayerState) -> TritonState:
    """Return the state with its sinks as lists, as the kernels read them."""
    if isinstance(state, TritonState) and state.flags is not None:
        return state
    sinks = state.sinks.contiguous()
    order = state.sinks.int().sort(dim=-1, descending=True, stable=True).indices
    return TritonState(
        sinks,
        state.sums,
        state.seen,
        order.to(torch.int32),
        state.sinks.sum(dim=-1, dtype=torch.int32),
        sinks.view(torch.uint8),
    )


def _report(facts: Tensor, tally: Tensor | None) -> Report | None:
    if tally is None:
        return None
    moved, few_moved, alone = tally.sum(dim=-1)
    return Report.of(
        sinks=facts[0],
        few_sinks=facts[1],
        moved=moved,
        few_moved=few_moved,
        alone=alone,
        near=facts[2] > 0,
    )
