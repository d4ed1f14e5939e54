"""What the launches of prefills and of packed rows take from the engine that makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from act_harness.calibration import LayerPlan
from act_harness.engines.operation import Members, member
from act_harness.engines.strengths import Strengths
from act_harness.errors import CalibrationError

if TYPE_CHECKING:
    from act_harness.engines.triton.blocks import Blocks

__all__ = ["COMPUTES", "Launcher", "Selection"]

COMPUTES: Members = {
    "target": ("sinks", "initial", "both", "span"),
    "rule": ("relative", "absolute"),
    "protect": ("initial", "first-flagged", "none"),
    "decode": ("frozen", "running", "off"),
    "mass": ("damp", "reweight", "raise"),
}
"""What the kernels compute, or leave to engine torch (decode ``running``)."""


class Launcher(Protocol):
    """Whom launches are made for."""

    blocks: Blocks | None
    """Block sizes; None chooses them by head size and dtype."""

    def note(self, name: str) -> None:
        """Count a launch of the kernel of that name."""
        ...


_CODES = {"reweight": 0, "damp": 1, "raise": 2}
"""Mass maps as the kernels read them."""


class Selection(NamedTuple):
    """A layer's plan on the device."""

    plan: LayerPlan  # held, so that its id stays its own
    heads: Tensor  # (h,) int32
    strength: Tensor  # (2, h) float32: of the head's map; of the initial token where it has its own
    masses: Tensor  # (h,) int32: mass maps by their codes
    facts: Tensor  # (h, 4) int32: head, bits of the strength, code, bits of the second strength
    maps: str
    """What the kernels are compiled for: ``both`` (strengths of two kinds of columns), ``raise``
    (some head has that map) or ``usual``, which spends nothing on the other two."""

    @classmethod
    def of(cls, plan: LayerPlan, device: torch.device) -> Selection:
        """Put a plan on a device.

        Raises:
            CalibrationError: a mass map that the kernels lack, or strengths of another target.
        """
        names = [member("mass", own.mass, COMPUTES) for own in plan.strengths]
        both = member("target", plan.calibration.target, COMPUTES) == "both"
        given = Strengths.of(plan.strengths, torch.empty(0))
        if both != (given.initial is not None):
            raise CalibrationError(
                "gamma_initial is of target 'both' alone, whose heads all have it"
            )
        masses = torch.tensor([_CODES[name] for name in names], dtype=torch.int32, device=device)
        heads = torch.tensor(plan.heads, dtype=torch.int32, device=device)
        initial = given.value if given.initial is None else given.initial
        strength = torch.stack([given.value.flatten(), initial.flatten()]).to(device)
        bits = strength.view(torch.int32)
        facts = torch.stack([heads, bits[0], masses, bits[1]], dim=1)
        maps = "both" if both else "raise" if "raise" in names else "usual"
        return cls(plan, heads, strength, masses, facts, maps)
