"""The launches of a prefill, or of an extension of several rows, for one layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from act_harness.calibration import FEW_ROWS, MIN_OTHER_MASS, Calibration
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import AttentionCall, boundary, member
from act_harness.engines.targets import span_columns
from act_harness.engines.triton import direct_kernels as direct
from act_harness.engines.triton import prefill_kernels as kernels
from act_harness.engines.triton.blocks import default_blocks
from act_harness.engines.triton.selection import COMPUTES

if TYPE_CHECKING:
    from act_harness.calibration import LayerPlan
    from act_harness.engines.triton.selection import Launcher, Selection

__all__ = ["INITIAL", "MOST_ON", "Launches", "Sinks", "detection_of"]

MOST_ON = {torch.float32: 0.5, torch.float16: 0.9, torch.bfloat16: 0.98}
"""Mass on the sinks beyond which 1 - m has lost too many digits for the dtype of the output."""

INITIAL = 1 << 29
"""What a listed column has added that is the initial token, with a strength of its own."""

_PROTECT = {"none": 0, "initial": 1, "first-flagged": 2}


_LEAST_SCRATCH = 4 << 20
_CONCURRENT_QUERIES = 16 << 20
"""Bytes of queries that programs running side by side read: less than the chip's L2 cache."""


class _Rows(NamedTuple):
    """A geometry as the kernels read it; shared by the layers of a forward."""

    kind: Tensor  # (B, C) uint8: 0 pad, 1 prompt, 2 continuation
    real: Tensor  # (B, T) uint8
    lo: Tensor  # (B, C) int32: first column a row sees
    hi: Tensor  # (B, C) int32: last column it sees, -1 for none


@dataclass(frozen=True)
class Sinks:
    """A layer's sinks as the kernels read them."""

    flags: Tensor  # (B, h, T) uint8
    index: Tensor  # (B, h, T) int32: flagged columns first, in order, see ``flag_sinks``
    count: Tensor  # (B, h) int32
    sums: Tensor | None = None  # (B, h, T) float32 and
    seen: Tensor | None = None  # (B, T) int32: for decode 'running' only


class _Found(NamedTuple):
    """What the correction by differences leaves."""

    counts: Tensor  # (B * h, parts) int32: rows that lose digits, by part of the rows
    rows: Tensor  # (B, h, C) int32: those, at the front of their part
    arrived: Tensor  # (1,) int32: programs that have listed their rows
    tally: Tensor  # (3, B, h, width) float32, see ``Launches.width``; ``counts`` without a report
    seen: Tensor  # (B, T) int32, likewise


class _Share(NamedTuple):
    """How listed rows are shared out among programs: tables that the device fills, and room."""

    programs: int
    most_split: int  # most blocks whose columns are split
    listed: Tensor  # (B * h,) int32: number of listed rows
    rows: Tensor  # (B, h, C) int32: those rows, in order
    work: Tensor  # (5, B * h * per_pair) int32, see ``direct``
    items: Tensor  # (2, programs) int32
    facts: Tensor  # (2,) int32
    values: Tensor  # (2 * aim, size, D) float32: parts of sums
    masses: Tensor  # (2 * aim, size) float32


class Launches:
    """The launches of one layer's call."""

    def __init__(
        self,
        engine: Launcher,
        call: AttentionCall,
        geometry: Geometry,
        selection: Selection,
        lse: Tensor | None,
    ) -> None:
        self.engine, self.geometry, self.selection = engine, geometry, selection
        dense = call.each(_last_axis_dense)
        self.query, self.key, self.value, self.scale, self.softcap = dense[:5]
        query = self.query
        self.blocks = engine.blocks or default_blocks(
            query.shape[-1], query.dtype, geometry.rows, shared=_shared_memory(query.device)
        )
        self.rows = _rows_of(geometry)
        self.pairs = query.shape[0] * len(selection.plan.heads)
        self.plain = geometry.first_row == 0 and geometry.plain
        self.by_head = lse is not None
        # Of a prefill: -inf for sinks and pads, and which blocks hold some; else unused.
        self.bias = self.holds = self.rows.real
        # A pair's blocks of rows: of all, of those that are summed anew, pieces of one of these.
        self.parts = triton.cdiv(geometry.rows, self.blocks.apply_rows)
        self.per_pair = triton.cdiv(geometry.rows, self.blocks.direct_rows)
        self.pieces = max(1, self.blocks.direct_rows // self.blocks.finish_rows)
        self.width = self.parts + self.per_pair * self.pieces
        """Places in the tally of a pair: each has one program that writes it, or is 0."""
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
        self.engine.note("row_lse")
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

    def detect(self) -> tuple[Sinks, Tensor]:
        """Find the prompt's sinks; return them with a report's facts (6, B, h), 0, 1, 5 of them."""
        geometry, calibration = self.geometry, self.selection.plan.calibration
        device = self.query.device
        shape = (self.query.shape[0], len(self.selection.plan.heads), geometry.total)
        running = member("decode", calibration.decode, COMPUTES) == "running"
        if member("target", calibration.target, COMPUTES) == "span":
            sums = _span_of(geometry, self.selection.plan)
        elif calibration.detects or running:
            sums = self.sums()
        else:  # nobody reads it
            sums = torch.empty(shape, dtype=torch.float32, device=device)
        seen, most = _census(geometry)
        sinks = Sinks(
            torch.empty(shape, dtype=torch.uint8, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(shape[:2], dtype=torch.int32, device=device),
            sums if running else None,
            seen if running else None,
        )
        self.bias = torch.empty(shape, dtype=torch.float32, device=device)
        width = self.blocks.direct_columns
        blocks = triton.cdiv(geometry.total, width)
        self.holds = torch.empty(*shape[:2], blocks, dtype=torch.uint8, device=device)
        facts = torch.empty(6, *shape[:2], dtype=torch.float32, device=device)
        block = max(width, min(4096, triton.next_power_of_2(geometry.total)))
        self.engine.note("flag_sinks")
        kernels.flag_sinks[(self.pairs,)](
            sums, seen, most, geometry.first, self.rows.real,
            sinks.flags, sinks.index, sinks.count, self.bias, self.holds, facts,
            geometry.total, shape[1], **detection_of(calibration),
            boundary=boundary(self.query.dtype), few_rows=FEW_ROWS,
            BN=width, BLOCK=block, num_warps=16 if block > 2048 else 8,
        )  # fmt: skip
        return sinks, facts

    def sums(self) -> Tensor:
        """Return (B, h, T) float32: what each column gets from the prompt's rows."""
        self.engine.note("column_sums")
        geometry, blocks, lse = self.geometry, self.blocks, self.lse
        whole = geometry.first_column == 0 and geometry.columns == geometry.total
        make = torch.empty if whole else torch.zeros
        shape = (self.query.shape[0], len(self.selection.plan.heads), geometry.total)
        sums = make(shape, dtype=torch.float32, device=self.query.device)
        if not geometry.only_prompt:
            lse = lse.masked_fill(~geometry.prompt_rows[:, None], float("inf"))
        bytes_of_one = geometry.rows * self.query.shape[-1] * self.query.element_size()
        programs = triton.cdiv(geometry.columns, blocks.sums_columns) * self.pairs
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
        return sums

    def apply(self, sinks: Sinks, output: Tensor, *, facts: Tensor | None = None) -> None:
        """Calibrate ``output`` (B, C, H, D); complete the ``facts`` of a report."""
        found = self.correct(sinks, output, report=facts is not None)
        self.sum_anew(sinks, output, found)
        if facts is not None:
            torch.sum(found.tally, dim=3, out=facts[2:5])

    def _inputs(self, output: Tensor) -> tuple[Tensor, ...]:
        return (
            self.query, self.key, self.value, output, self.lse, self.selection.heads,
            self.selection.strength, self.selection.masses, self.rows.kind,
        )  # fmt: skip

    def _strides(self, output: Tensor) -> tuple[int, ...]:
        return (
            *self.query.stride()[:3], *self.key.stride()[:3], *self.value.stride()[:3],
            output.stride(0), output.stride(2), output.stride(1), *self.lse.stride(),
        )  # fmt: skip

    def _settings(self, sinks: Sinks, report: bool) -> dict[str, Any]:
        return {
            **self._common(),
            "sink_total": sinks.flags.shape[-1],
            "few_rows": FEW_ROWS,
            "BY_HEAD": self.by_head,
            "REPORT": report,
            "MAPS": self.selection.maps,
            "BS": self.blocks.sinks,
            "width": self.width,
        }

    def correct(self, sinks: Sinks, output: Tensor, *, report: bool) -> _Found:
        """Calibrate by the difference; return the rows where it would lose digits."""
        blocks, geometry, device = self.blocks, self.geometry, self.query.device
        shape = (self.query.shape[0], len(self.selection.plan.heads), geometry.rows)
        parts = self.parts
        counts = torch.empty(self.pairs, parts, dtype=torch.int32, device=device)
        found = _Found(
            counts,
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.empty(1, dtype=torch.int32, device=device),
            torch.empty(3, *shape[:2], self.width, device=device) if report else counts,
            _census(geometry)[0] if report else counts,
        )
        self.engine.note("apply")
        kernels.apply_sinks[(parts, self.pairs)](
            *self._inputs(output), self.rows.lo, self.rows.hi,
            found.seen, sinks.index, sinks.count,
            found.counts, found.rows, found.arrived, found.tally,
            *self._strides(output), **self._settings(sinks, report),
            most_on=MOST_ON[self.query.dtype],
            CONTINUE=member("decode", self.selection.plan.calibration.decode, COMPUTES) == "frozen",
            BM=blocks.apply_rows,
            num_warps=blocks.apply_warps, num_stages=blocks.apply_stages,
            maxnreg=blocks.apply_registers,
        )  # fmt: skip
        return found

    def sum_anew(self, sinks: Sinks, output: Tensor, found: _Found) -> None:
        """Sum the rows that ``correct`` left."""
        blocks, rows = self.blocks, self.rows
        share = self._share(found)
        common = self._settings(sinks, found.tally is not found.counts)
        del common["total"]
        common |= {"min_other": MIN_OTHER_MASS, "per_pair": self.per_pair, "pairs": self.pairs}
        common |= {"counted": self.parts}
        inputs, strides = self._inputs(output), self._strides(output)
        tables = (
            found.seen, sinks.index, sinks.count,
            share.listed, share.rows, share.work, share.items, share.facts, found.tally,
            share.values, share.masses,
        )  # fmt: skip
        self.engine.note("direct")
        direct.direct_sums[(share.programs,)](
            *inputs, rows.lo, rows.hi, rows.real, sinks.flags, self.bias, self.holds,
            *tables, *strides,
            **common, total=self.geometry.total, pieces=self.pieces,
            BM=blocks.direct_rows, BN=blocks.direct_columns,
            num_warps=blocks.direct_warps, num_stages=blocks.direct_stages,
            maxnreg=blocks.direct_registers,
        )  # fmt: skip
        if share.most_split:
            self.engine.note("finish")
            direct.finish_direct[(share.most_split * self.pieces,)](
                *inputs, rows.lo, rows.hi, *tables, *strides,
                **common, programs=share.programs, BM=blocks.direct_rows,
                FM=blocks.direct_rows // self.pieces,
            )  # fmt: skip

    def _share(self, found: _Found) -> _Share:
        """Share the listed rows out among programs; how many there are, only the device knows."""
        blocks, size, columns = self.blocks, self.blocks.direct_rows, self.geometry.columns
        width = max(16, triton.next_power_of_2(self.query.shape[-1]))
        row_blocks = self.per_pair * self.pairs
        # Partial sums take no more than the base kernel's output did before it was transposed.
        room = max(self.query.nbytes, _LEAST_SCRATCH) // (4 * size * width)
        aim = min(blocks.items, room // 2) if columns > blocks.least else 0
        device = self.query.device
        share = _Share(
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
        self.engine.note("gather")
        report = found.tally is not found.counts
        direct.gather_rows[(self.pairs,)](
            found.counts, found.rows, self.rows.lo, self.rows.hi, found.arrived, found.tally,
            share.listed, share.rows, share.work, share.items, share.facts,
            self.geometry.rows, columns, len(self.selection.plan.heads), self.parts,
            self.per_pair, row_blocks, share.programs, aim,
            triton.cdiv(blocks.least, blocks.direct_columns), self.width,
            PLAIN=self.plain, REPORT=report, AM=blocks.apply_rows, BM=size,
            BN=blocks.direct_columns, PARTS=max(1, 4096 // blocks.apply_rows),
            BLOCKS=128 if self.plain else max(1, 2048 // size), SHARED=2048, num_warps=8,
        )  # fmt: skip
        return share


@functools.lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a program may have; None where that is not known."""
    if device.type != "cuda":
        return None
    found = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return None if found is None else int(found)


def _last_axis_dense(tensor: Tensor) -> Tensor:
    """Return the tensor with the values of a head side by side, copied only where needed."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows_of(geometry: Geometry) -> _Rows:
    """Return the geometry in the kernels' form, computed once for all layers that share it."""

    def make() -> _Rows:
        if geometry.intervals is None:
            raise ValueError("the rows' visible columns are no intervals")
        kind = geometry.prompt_rows.to(torch.uint8) + 2 * geometry.continuation_rows
        real = geometry.real.contiguous().view(torch.uint8)
        return _Rows(kind.contiguous(), real, *geometry.intervals)

    return geometry.scratch("triton rows", make)


def _census(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return the prompt's census as contiguous int32."""

    def make() -> tuple[Tensor, Tensor]:
        seen, most = geometry.prompt_census
        return seen.to(torch.int32).contiguous(), most.to(torch.int32)

    return geometry.scratch("triton census", make)


def _span_of(geometry: Geometry, plan: LayerPlan) -> Tensor:
    """Return (B, T) uint8: the columns of target ``span``."""

    def make() -> Tensor:
        return span_columns(geometry, plan)[:, 0].contiguous().view(torch.uint8)

    return geometry.scratch("triton span", make)


def detection_of(calibration: Calibration) -> dict[str, Any]:
    """Return the settings of detection as ``flag_sinks`` takes them."""
    target = member("target", calibration.target, COMPUTES)
    if not calibration.detects:
        return {
            "limit": 1.0,
            "min_rows": 1,
            "TARGET": target,
            "RELATIVE": True,
            "PROTECT": _PROTECT["none"],
            "AUTO": False,
        }
    relative = member("rule", calibration.rule, COMPUTES) == "relative"
    limit = calibration.alpha if relative else calibration.tau
    auto = calibration.min_rows == "auto"
    least = 1 if auto else int(calibration.min_rows or 1)
    if auto and not relative:
        least, auto = int(calibration.required_rows(1.0)), False
    return {
        "limit": float(limit or 0.0),
        "min_rows": least,
        "TARGET": target,
        "RELATIVE": relative,
        "PROTECT": _PROTECT[member("protect", calibration.protect, COMPUTES)],
        "AUTO": auto,
    }
