"""The untouched model, which all others are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.search.methods.context import MethodContext

__all__ = ["Untouched"]


class Untouched(NamedTuple):
    """No head is calibrated."""

    name: str = "none"
    note: str = "the untouched model"

    def find(self, context: MethodContext) -> Artifact | None:
        """Find nothing."""
        return None
