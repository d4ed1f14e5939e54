"""What the launches of prefills and of packed rows take from the engine that makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from act_harness.calibration import LayerPlan
from act_harness.engines.operation import Members, member

if TYPE_CHECKING:
    from act_harness.engines.triton.blocks import Blocks

__all__ = ["COMPUTES", "Launcher", "Selection"]

COMPUTES: Members = {
    "target": ("sinks", "initial"),
    "rule": ("relative", "absolute"),
    "protect": ("initial", "first-flagged", "none"),
    "decode": ("frozen", "running", "off"),
    "mass": ("damp", "reweight"),
}
"""What the kernels compute, or leave to engine torch (decode ``running``)."""


class Launcher(Protocol):
    """Whom launches are made for."""

    blocks: Blocks | None
    """Block sizes; None chooses them by head size and dtype."""

    def note(self, name: str) -> None:
        """Count a launch of the kernel of that name."""
        ...


class Selection(NamedTuple):
    """A layer's plan on the device."""

    plan: LayerPlan  # held, so that its id stays its own
    heads: Tensor  # (h,) int32
    strength: Tensor  # (h,) float32
    damp: Tensor  # (h,) int32
    facts: Tensor  # (h, 3) int32: the three, the strength by its bits

    @classmethod
    def of(cls, plan: LayerPlan, device: torch.device) -> Selection:
        """Put a plan on a device."""
        damps = [member("mass", s.mass, COMPUTES) == "damp" for s in plan.strengths]
        damp = torch.tensor(damps, dtype=torch.int32, device=device)
        heads = torch.tensor(plan.heads, dtype=torch.int32, device=device)
        strength = torch.tensor([s.strength for s in plan.strengths], device=device)
        facts = torch.stack([heads, strength.view(torch.int32), damp], dim=1)
        return cls(plan, heads, strength, damp, facts)
