"""A control: the heads that ``signed`` found, with its strengths handed out among them at random.

Random head sets ask whether these heads matter; this asks whether each needs its own strength.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from act_harness.calibration import HeadStrength

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.search.methods.context import MethodContext

__all__ = ["ShuffledStrengths"]


class ShuffledStrengths(NamedTuple):
    """Strengths in an order drawn with the recipe's seed."""

    name: str = "shuffled-strengths"
    note: str = "control: signed's heads, its strengths handed out among them at random"

    def find(self, context: MethodContext) -> Artifact | None:
        """Draw the order."""
        like = context.artifact_of("signed")
        if like is None or like.head_count() < 2:
            return None
        plans = like.plans()
        drawn = [strength for plan in plans.values() for strength in plan.strengths]
        random.Random(f"shuffled/{context.recipe.seed}").shuffle(drawn)  # noqa: S311 - no secret
        left = iter(drawn)
        strengths: dict[int, dict[int, HeadStrength]] = {
            layer: {head: next(left) for head in plan.heads} for layer, plan in plans.items()
        }
        return like.model_copy(update={"name": self.name, "strengths": strengths, "search": None})
