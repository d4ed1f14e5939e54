"""What several sequences have in common: texts, prompts in tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

__all__ = ["common_start"]

_Sequence = TypeVar("_Sequence", str, list[int], tuple[int, ...])


def common_start(sequences: Collection[_Sequence]) -> int:
    """Return how many letters or tokens all sequences begin with.

    Args:
        sequences: at least one.
    """
    first, last = min(sequences), max(sequences)  # all others lie between the two
    most = min(len(first), len(last))
    return next((n for n in range(most) if first[n] != last[n]), most)
