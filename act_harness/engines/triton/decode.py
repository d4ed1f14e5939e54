"""Decode steps on the host's side: what to launch for one new row a sequence, in little time.

At batch 1 a step is bound by the host, so whatever is the same for all layers of a forward or for
all steps of a generation is found out once: :class:`Step` for a forward, :class:`Family` for steps
alike, a :class:`Sheet` for a layer's generation. What is left for each layer is to check that its
tensors are of the kind seen before, the stock kernel, and one launch. Anything else (views into a
longer cache, say) is taken by ``step_sinks``, which knows strides.

A launch of a Triton kernel spends most of its time on finding out which compiled kernel fits the
arguments. Here the answer is kept: ``kernel[grid](...)`` returns the compiled kernel, and
``compiled[grid](...)`` launches just that (as in Triton's own tutorial of the fused softmax). It
fits all calls of its family: data types and constants are part of the family's key, all pointers
are checked to be multiples of 16, and no integer is specialised on. Where Triton looks at more
than that (the size of tensors, on AMD), kernels are launched in the usual way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from act_harness.calibration import MIN_OTHER_MASS
from act_harness.engines.stock import attend_with_lse, step_kernel
from act_harness.engines.triton import decode_kernels as step

if TYPE_CHECKING:
    from collections.abc import Callable

    from act_harness.calibration import LayerPlan
    from act_harness.engines.geometry import Geometry
    from act_harness.engines.operation import AttentionCall
    from act_harness.engines.stock import FusedKernel
    from act_harness.engines.triton.selection import Selection

__all__ = ["Sheet", "Step", "Steps", "make_sheet"]

_MOST_FAMILIES = 64
_STEP = "triton step"


class Sheet(NamedTuple):
    """A layer's sinks and plan as the kernels read them, see ``step``."""

    plan: LayerPlan
    data: Tensor  # (B, h, HEADER + T) int32
    slots: int  # h
    sink_total: int  # T
    maps: str  # what the kernels are compiled for
    kind: tuple[int, str]  # slots and maps


def make_sheet(selection: Selection, *, index: Tensor, count: Tensor, flags: Tensor) -> Sheet:
    """Write a sheet: four launches.

    Args:
        selection: the plan whose heads the other tensors belong to.
        index: (B, h, T) int32 the sinks' columns as ``flag_sinks`` lists them, then anything.
        count: (B, h) int32 number of sinks.
        flags: (B, h, T) uint8 the sinks.
    """
    batch, slots, total = index.shape
    shape = (batch, slots, step.HEADER + total)
    data = torch.empty(shape, dtype=torch.int32, device=index.device)
    data[..., 0].copy_(count)
    data[..., 1 : step.HEADER].copy_(selection.facts)
    entries = data[..., step.HEADER :]
    torch.bitwise_and(index, step.FLAG - 1, out=entries)  # what follows the sinks is not defined
    entries.add_(flags, alpha=step.FLAG)
    maps = selection.maps
    return Sheet(selection.plan, data, slots, total, maps, (slots, maps))


class Family:
    """Steps of one shape, data type, device and kernel; kept by the engine."""

    def __init__(self, base: FusedKernel | None, constants: tuple[Any, ...], *, warm: bool) -> None:
        """Store the stock kernel (None: no log-sum-exp) and the kernel's constants."""
        self.base = base
        self.constants = constants
        self.warm = warm  # whether compiled kernels may be kept
        self.runners: dict[tuple[int, str], Callable[..., None]] = {}  # by a sheet's kind


class Step(NamedTuple):
    """A forward's step, for all layers whose tensors are alike; kept on their geometry."""

    family: Family
    query_shape: torch.Size
    key_shape: torch.Size
    dtype: torch.dtype
    scale: float
    softcap: float | None
    kernel: str
    seen: Tensor | None  # (B, K) uint8: columns that the row sees; None: all
    first_column: int

    def fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel: str,
        scale: float,
        softcap: float | None,
    ) -> bool:
        """Whether a layer's call is of this kind: nothing about it need be looked up."""
        shape, dtype = self.key_shape, self.dtype
        return (
            query.shape == self.query_shape
            and key.shape == shape
            and value.shape == shape
            and query.dtype is dtype
            and key.dtype is dtype
            and value.dtype is dtype
            and query.is_contiguous()
            and key.is_contiguous()
            and value.is_contiguous()
            and not (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15
            and scale == self.scale
            and softcap == self.softcap
            and kernel == self.kernel
            and not query.requires_grad
        )


class Steps:
    """Takes the decode steps of an engine."""

    def __init__(self, note: Callable[[str], None], most_on: dict[torch.dtype, float]) -> None:
        """Store how launches are counted, and beyond which mass rows are summed anew."""
        self.note = note
        self.most_on = most_on
        self.families: dict[tuple[Any, ...], Family] = {}

    def known(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        geometry: Geometry,
        sheet: Sheet,
        stock: Callable[[], Tensor],
        scale: float,
        softcap: float | None,
    ) -> Tensor | None:
        """Take a step like one seen before; None where it is not."""
        found: Step | None = geometry.scratched.get(_STEP)
        kernel = getattr(stock, "kernel", None)
        if found is None or not found.fits(query, key, value, kernel, scale, softcap):  # type: ignore[arg-type]
            return None
        family = found.family
        if family.base is None:
            output, lse = stock(), query
        else:
            output, lse = family.base(query, key, value, False, scale)
            output = output.transpose(1, 2)
        if (
            not (output.is_contiguous() and lse.is_contiguous())
            or (output.data_ptr() | lse.data_ptr()) & 15
        ):
            output = output.contiguous()
            given = None if family.base is None else lse
            self._strided(
                query, key, value, output, given, found.seen, geometry, sheet, scale, softcap
            )
            return output
        self.note("step")
        seen = query if found.seen is None else found.seen
        slots = sheet.slots
        runner = family.runners.get(sheet.kind)
        if runner is not None:
            runner(
                query, key, value, output, lse, sheet.data, seen,
                found.key_shape[2], found.first_column, sheet.sink_total, slots,
                *family.constants, sheet.maps,
            )  # fmt: skip
            return output
        grid = (query.shape[0] * slots, 1, 1)
        compiled = step.step_dense[grid](
            query, key, value, output, lse, sheet.data, seen,
            found.key_shape[2], found.first_column, sheet.sink_total, slots,
            *family.constants, sheet.maps,
        )  # fmt: skip
        if family.warm and compiled is not None:
            family.runners[sheet.kind] = compiled[grid]
        return output

    def other(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        sheet: Sheet,
        stock: Callable[[], Tensor],
    ) -> Tensor:
        """Take any step; what can be known about it serves the forward's other layers."""
        learned = geometry.scratch(_STEP, lambda: self._learn(call, geometry, stock))
        query, key, value, scale, softcap = call[:5]
        output = self.known(
            query, key, value, geometry=geometry, sheet=sheet, stock=stock, scale=scale,
            softcap=softcap,
        )  # fmt: skip
        if output is not None:
            return output
        base = attend_with_lse(call, geometry=geometry, stock=stock)
        output = base.output.contiguous()
        self._strided(
            query, key, value, output, base.lse, learned.seen, geometry, sheet, scale, softcap
        )
        return output

    def _learn(self, call: AttentionCall, geometry: Geometry, stock: Callable[[], Tensor]) -> Step:
        """Find out what the steps of the geometry's layers have in common."""
        query, key, _, scale, softcap = call[:5]
        base = step_kernel(call, geometry=geometry, stock=stock)
        plain = geometry.plain
        device = query.device
        current = torch.cuda.current_device() if device.type == "cuda" else -1
        shape, groups, dtype = query.shape, key.shape[1], query.dtype
        place = (device, current, dtype, shape, groups, scale, softcap, base, plain)
        family = self.families.get(place)
        if family is None:
            if len(self.families) >= _MOST_FAMILIES:
                self.families.clear()
            constants = (
                scale, softcap or 0.0, MIN_OTHER_MASS, self.most_on[dtype], shape[1], groups,
                base is None, plain, softcap is not None, *_blocks(shape[3]),
            )  # fmt: skip
            warm = device.type == "cuda" and torch.version.hip is None
            family = self.families[place] = Family(base, constants, warm=warm)
        seen = None if plain else _seen(geometry)
        return Step(
            family, shape, key.shape, dtype, scale, softcap, getattr(stock, "kernel", ""),
            seen, geometry.first_column,
        )  # fmt: skip

    def _strided(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor | None,
        seen: Tensor | None,
        geometry: Geometry,
        sheet: Sheet,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Calibrate ``output`` for tensors of any strides."""
        self.note("step")
        self.note("strided")
        query, key, value = (_last_axis_dense(x) for x in (query, key, value))
        given = query if lse is None else lse
        step.step_sinks[(query.shape[0] * sheet.slots,)](
            query, key, value, output, given, sheet.data, query if seen is None else seen,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3],
            output.stride(0), output.stride(2), *given.stride()[:2],
            geometry.columns, geometry.first_column, sheet.sink_total, sheet.slots,
            query.shape[1] // key.shape[1], scale, softcap or 0.0,
            MIN_OTHER_MASS, self.most_on[query.dtype],
            lse is None, seen is None, softcap is not None, *_blocks(query.shape[-1]), sheet.maps,
        )  # fmt: skip


def _blocks(size: int) -> tuple[int, int, int, int]:
    """D, BD, BN and BS of the kernels for heads of ``size`` values."""
    return size, max(16, triton.next_power_of_2(size)), 64, 16


def _seen(geometry: Geometry) -> Tensor:
    """(B, K) uint8: the columns that the only row sees."""
    return geometry.visible(0, 1)[:, 0, 0].contiguous().view(torch.uint8)


def _last_axis_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
