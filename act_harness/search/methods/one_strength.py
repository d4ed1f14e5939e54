"""One number instead of one a head: the sinks of all heads scaled alike.

What a search of heads is worth is what it gains above this, whose number six scorings of ``verify``
choose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from act_harness.artifact import Artifact
from act_harness.calibration import Calibration

if TYPE_CHECKING:
    from act_harness.search.methods.context import MethodContext

__all__ = ["OneStrength"]


class OneStrength(NamedTuple):
    """The factor on the sinks' columns that does best on verify."""

    name: str = "one-strength"
    note: str = "sinks of all heads scaled by one number, chosen on verify"
    factors: tuple[float, ...] = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)

    def find(self, context: MethodContext) -> Artifact | None:
        """Try the factors; None where no one does better than the untouched model."""
        from act_harness.search.choose.sets import heads_at_stake

        best, value = None, context.verified(None)
        heads = heads_at_stake(context.scorer.model, context.facts, context.recipe)
        for factor in self.factors:
            tried = Artifact(
                name=self.name,
                model=context.facts,
                calibration=Calibration(**context.detection, mass="reweight", gamma=factor),
                heads=heads,
            )
            found = context.verified(tried)
            if found > value:
                best, value = tried, found
        return best
