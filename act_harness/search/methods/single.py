"""Methods that measure one head at a time: the paper's, and the product's exhaustive search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.search.methods.context import MethodContext

__all__ = ["SINGLE", "Exhaustive"]


@dataclass(frozen=True)
class Exhaustive:
    """Every head alone, then a rule; methods of this kind share one ledger."""

    name: str
    note: str
    rule: str

    def find(self, context: MethodContext) -> Artifact:
        """Measure every head with sinks damped, and select by the rule."""
        own = context.recipe.calibration
        beta = own.beta if own.target == "sinks" and own.mass == "damp" else 0.4
        changes: dict[str, Any] = {"strengths": []} if self.rule == "paper" else {}
        if self.rule == "top":
            changes["top"] = {"refit": True}
        return context.search(
            self.name,
            method="exhaustive",
            rule=self.rule,
            calibration={**context.detection, "mass": "damp", "beta": beta},
            **changes,
        )


SINGLE = (
    Exhaustive(
        "act-paper", "every head that helps alone, sinks damped (the paper's rule)", "paper"
    ),
    Exhaustive("act-exhaustive", "the best heads, their number chosen on verify, refitted", "top"),
)
