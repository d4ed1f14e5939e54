"""Controls: random head sets of the size and the strengths that ``signed`` found."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.search.methods.context import MethodContext

__all__ = ["RANDOM_HEADS", "RandomHeads"]


class RandomHeads(NamedTuple):
    """One draw."""

    number: int
    of: str = "signed"

    @property
    def name(self) -> str:
        """Numbered from 1."""
        return f"random-heads-{self.number}"

    @property
    def note(self) -> str:
        """See the module."""
        return f"control: random heads, as many as {self.of} has, with its strengths"

    def find(self, context: MethodContext) -> Artifact | None:
        """Draw heads of the whole model and hand the strengths out at random."""
        from act_harness.search.choose.heldout import random_artifact

        like = context.artifact_of(self.of)
        if like is None or not like.head_count():
            return None
        return random_artifact(like, seed=self.number, layers=context.layers)


RANDOM_HEADS = tuple(RandomHeads(number) for number in range(1, 11))
