"""Which kernels run for a call, with what block sizes; see the package's docstring."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from act_harness.calibration import LayerPlan
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import (
    AttentionCall,
    EngineResult,
    LayerState,
    Report,
    member,
    unsupported,
)
from act_harness.engines.segments import LONGEST
from act_harness.engines.stock import attend_with_lse
from act_harness.engines.torch import TorchEngine
from act_harness.engines.triton.decode import Sheet, Steps, make_sheet
from act_harness.engines.triton.prefill import INITIAL, MOST_ON, Launches, Sinks, detection_of
from act_harness.engines.triton.segments import SegmentKernels
from act_harness.engines.triton.selection import COMPUTES, Selection

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from act_harness.engines.segments import Capacity, RaggedOutput, Segments
    from act_harness.engines.triton.blocks import Blocks

__all__ = ["TritonEngine"]

_logger = logging.getLogger(__name__)


@dataclass
class TritonState(LayerState):
    """The prompt's sinks also as lists, so that extending touches only their columns."""

    index: Tensor | None = None  # (B, h, T) int32: flagged columns first, see ``flag_sinks``
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
            self.sheet = make_sheet(selection, index=self.index, count=self.count, flags=self.flags)
        return self.sheet


class TritonEngine:
    """See :mod:`act_harness.engines.triton`."""

    name = "triton"

    def __init__(self, blocks: Blocks | None = None) -> None:
        """Store the block sizes; None chooses them by head size and dtype."""
        self.blocks = blocks
        self.segments = SegmentKernels(self.note)
        self.fallback = TorchEngine()
        self.calls: dict[str, int] = {}
        """How often each kernel, or the fallback, was launched."""
        self._warned: set[str] = set()
        self._selections: dict[tuple[int, torch.device], Selection] = {}
        self.steps = Steps(self.note, MOST_ON)

    def __reduce__(self) -> tuple[type[TritonEngine], tuple[Blocks | None]]:
        """Copy and pickle the settings; what was learned on a device is learned again."""
        return type(self), (self.blocks,)

    def supports(self, plan: LayerPlan) -> list[str]:
        """See :class:`act_harness.engines.operation.Engine`."""
        return unsupported(plan, COMPUTES, engine=self.name)

    def __call__(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        plan: LayerPlan,
        state: LayerState | None,
        stock: Callable[[], Tensor],
    ) -> EngineResult:
        """See :class:`act_harness.engines.operation.Engine`."""
        query, key, value, scale, softcap = call[:5]
        if query.is_cuda and query.get_device() != torch.cuda.current_device():
            with torch.cuda.device(query.device):  # Triton launches on the current device
                return self(call, geometry=geometry, plan=plan, state=state, stock=stock)
        if state is not None and query.shape[2] == 1:  # a decode step, most often like the last
            sheet = getattr(state, "sheet", None)
            if sheet is not None and sheet.plan is plan:
                stepped = self.steps.known(
                    query, key, value, geometry=geometry, sheet=sheet, stock=stock, scale=scale,
                    softcap=softcap,
                )  # fmt: skip
                if stepped is not None:
                    return EngineResult(stepped, state, None)
        reason = _unsupported(call, geometry, plan, state)
        if reason:
            self.note("fallback")
            if reason not in self._warned:
                self._warned.add(reason)
                _logger.warning("engine triton leaves %s to engine torch", reason)
            return self.fallback(call, geometry=geometry, plan=plan, state=state, stock=stock)
        selection = self._select(plan, query.device)
        frozen = member("decode", plan.calibration.decode, COMPUTES) != "off"
        if state is not None and query.shape[2] == 1 and frozen:
            found = _listed(state, geometry, plan)
            sheet = found.sheet_of(selection)
            stepped = self.steps.other(call, geometry=geometry, sheet=sheet, stock=stock)
            return EngineResult(stepped, found, None)
        output, lse = attend_with_lse(call, geometry=geometry, stock=stock)
        if not frozen and geometry.first_row > 0:
            return EngineResult(output, state, None)
        launches = Launches(self, call, geometry, selection, lse)
        if state is None:
            sinks, facts = launches.detect()
            launches.apply(sinks, output, facts=facts)
            return EngineResult(output, _state_of(sinks), Report(facts))
        found = _listed(state, geometry, plan)
        launches.apply(_sinks_of(found), output)
        return EngineResult(output, found, None)

    def column_sums(
        self, call: AttentionCall, *, geometry: Geometry, plan: LayerPlan
    ) -> Tensor | None:
        """Return (B, h, T) float32: what each column of a prompt gets from its rows, head by head.

        None where the kernels do not compute it; its caller then does.
        """
        query = call.query
        if query.is_cuda and query.get_device() != torch.cuda.current_device():
            with torch.cuda.device(query.device):
                return self.column_sums(call, geometry=geometry, plan=plan)
        if _unsupported(call, geometry, plan, None):
            return None
        return Launches(self, call, geometry, self._select(plan, query.device), None).sums()

    def takes_segments(self, plan: LayerPlan, capacity: Capacity) -> bool:
        """Whether :meth:`calibrate_segments` computes such a plan on segments of this capacity."""
        running = member("decode", plan.calibration.decode, COMPUTES) == "running"
        if member("target", plan.calibration.target, COMPUTES) == "span":
            return False  # a layout of segments does not say where a prompt's span lies
        return not running and capacity.longest_context <= LONGEST

    def calibrate_segments(
        self, call: AttentionCall, stock: RaggedOutput, *, segments: Segments, plan: LayerPlan
    ) -> Report:
        """Calibrate a packed row in place; see :mod:`act_harness.engines.triton.segments`."""
        query = call.query
        if query.is_cuda and query.get_device() != torch.cuda.current_device():
            with torch.cuda.device(query.device):
                return self.calibrate_segments(call, stock, segments=segments, plan=plan)
        return self.segments.calibrate(
            call,
            stock,
            segments=segments,
            selection=self._select(plan, query.device),
            detection=lambda: detection_of(plan.calibration),
        )

    def note(self, name: str) -> None:
        """Count a launch of the kernel of that name, or a use of the fallback."""
        self.calls[name] = self.calls.get(name, 0) + 1

    def _select(self, plan: LayerPlan, device: torch.device) -> Selection:
        place = (id(plan), device)
        if place not in self._selections:
            self._selections[place] = Selection.of(plan, device)
        return self._selections[place]


def _unsupported(
    call: AttentionCall, geometry: Geometry, plan: LayerPlan, state: LayerState | None
) -> str:
    """Say what the kernels cannot do; empty where they can."""
    query, key, value = call[:3]
    if call.bias is not None:
        return "a bias on the attention logits (ALiBi)"
    if call.sink_logits is not None:
        return "learned sink logits"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype} inputs"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values of several dtypes"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on {query.device.type}"
    if not key.shape[-1] == value.shape[-1] <= 256:
        return f"head sizes {key.shape[-1]} and {value.shape[-1]}"
    running = member("decode", plan.calibration.decode, COMPUTES) == "running"
    if running and (state is not None or geometry.has_continuation_rows):
        return "the continuation rows of decode 'running'"
    step = state is not None and query.shape[2] == 1  # one row's mask need not be an interval
    if not step and geometry.intervals is None:
        return "masks that are no interval of columns for every row"
    return ""


def _listed(state: LayerState, geometry: Geometry, plan: LayerPlan) -> TritonState:
    """Return the state with its sinks as lists, as the kernels read them."""
    if isinstance(state, TritonState) and state.flags is not None:
        return state
    sinks = state.sinks.contiguous()
    order = state.sinks.int().sort(dim=-1, descending=True, stable=True).indices
    index = order.to(torch.int32)
    if member("target", plan.calibration.target, COMPUTES) == "both":
        index += (order == geometry.first[:, None, None]) * INITIAL
    return TritonState(
        sinks,
        state.sums,
        state.seen,
        index,
        state.sinks.sum(dim=-1, dtype=torch.int32),
        sinks.view(torch.uint8),
    )


def _state_of(sinks: Sinks) -> TritonState:
    return TritonState(
        sinks.flags.view(torch.bool), sinks.sums, sinks.seen, sinks.index, sinks.count, sinks.flags
    )


def _sinks_of(state: TritonState) -> Sinks:
    if state.flags is None or state.index is None or state.count is None:
        raise ValueError("the state's sinks are not listed")
    return Sinks(state.flags, state.index, state.count)
