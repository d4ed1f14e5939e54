"""Methods and controls whose strengths a gradient tunes together.

They differ in what the strengths act on, and in what tells them where to go. ``zerotuning`` is the
first token's scaling of ZeroTuning (arXiv 2505.11739), here with a strength of every head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.search.methods.context import MethodContext

__all__ = ["TUNED", "Tuned"]


@dataclass(frozen=True)
class Tuned:
    """A gradient search of one target."""

    name: str
    note: str
    target: str = "sinks"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the target's columns, beside the recipe's detection."""
    signs: str = "both"
    objective: str | None = None
    """None: the recipe's, with labels."""

    def find(self, context: MethodContext) -> Artifact:
        """Search with the recipe's settings."""
        objective = self.objective
        if objective is None:
            objective = context.recipe.objective
            objective = "corrected" if objective == "entropy" else objective
        detection = {} if isinstance(self.settings.get("count"), int) else context.detection
        return context.search(
            self.name,
            method="gradient",
            calibration={**detection, **self.settings},
            objective=objective,
            gradient={"target": self.target, "signs": self.signs},
        )


TUNED = (
    Tuned("act-gradient", "sinks of all heads damped together", signs="damp"),
    Tuned("signed", "sinks of all heads damped or amplified together"),
    Tuned("both", "sinks and initial token, a strength each", "both"),
    Tuned("zerotuning", "initial token scaled, with labels", "initial"),
    Tuned(
        "zerotuning-entropy", "initial token scaled, without labels", "initial", objective="entropy"
    ),
    Tuned(
        "random-columns", "control: as many random columns, fixed by a hash", "random",
        {"target": "random", "draw": "fixed"},
    ),
    Tuned(
        "random-columns-anew", "control: as many random columns, other ones in every prompt",
        "random", {"target": "random", "draw": "anew"},
    ),
    Tuned("last-columns", "control: as many last columns of the prompt", "last"),
    Tuned(
        "sinks-min-rows-auto", "signed, without sinks that few rows see",
        settings={"min_rows": "auto"},
    ),
    Tuned("gate", "control: the heads' outputs scaled", "gate"),
    Tuned("temperature", "control: the heads' logits scaled", "temperature"),
)  # fmt: skip
