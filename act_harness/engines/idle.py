"""A layer none of whose selected heads are in this process: stock attention, and empty findings.

Where a model's heads are split over processes, one of them may hold nothing of a layer's head set.
It keeps step with the others all the same: the same states on the same caches, the same refusals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from act_harness.engines.operation import EngineResult, LayerState, Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from act_harness.engines.geometry import Geometry

__all__ = ["empty_report", "idle"]


def idle(geometry: Geometry, state: LayerState | None, stock: Callable[[], Tensor]) -> EngineResult:
    """Return what an engine would for a plan without heads; see the protocol of engines."""
    output = stock()
    if state is not None:
        return EngineResult(output, state, None)
    sinks = geometry.prompt.new_zeros(len(geometry.prompt), 0, geometry.total)
    report = empty_report(len(geometry.prompt), output.device)
    return EngineResult(output, LayerState(sinks), report)


def empty_report(sequences: int, device: torch.device) -> Report:
    """Return the report of no heads, for so many sequences."""
    return Report(torch.zeros(6, sequences, 0, device=device))
