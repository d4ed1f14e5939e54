"""A control: ``signed`` with every sign turned around.

Where a strength is a direction that the search has found, its opposite does harm. Where both help,
what helps is that something was changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.search.methods.context import MethodContext

__all__ = ["OppositeStrengths"]


class OppositeStrengths(NamedTuple):
    """Amplified where ``signed`` damps, and the other way."""

    name: str = "opposite-strengths"
    note: str = "control: signed with every strength inverted"

    def find(self, context: MethodContext) -> Artifact | None:
        """Invert what ``signed`` found, which are factors."""
        from act_harness.search.methods.strength import scaled

        like = context.artifact_of("signed")
        if like is None or not like.head_count():
            return None
        return scaled(like, -1.0).model_copy(update={"name": self.name})
