"""Reading a judge's verdict: a rating from 1 to 10, or nothing.

FastChat takes the first ``[[number]]`` of a verdict, whatever its size, and falls back to single
brackets. Here a verdict counts only if it is unambiguous, because a wrong number is worse than a
missing one, which is counted and asked for again.
"""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["Preference", "preference_of", "rating_of"]

Preference = Literal["A", "B", "tie"]

_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
_PREFERENCE = re.compile(r"\[\[\s*([ABC])\s*\]\]")


def rating_of(verdict: str) -> tuple[float | None, str]:
    """Return the rating, or None with the reason why there is none.

    Accepted is a number from 1 to 10 in double brackets; repeating the same one is harmless,
    two different ones are ambiguous.
    """
    found = {float(text) for text in _RATING.findall(verdict)}
    if not found:
        return None, "no rating in double brackets"
    if len(found) > 1:
        return None, "several different ratings"
    rating = found.pop()
    if not 1.0 <= rating <= 10.0:
        return None, "rating outside 1 to 10"
    return rating, ""


def preference_of(verdict: str) -> Preference | None:
    """Return which answer a pairwise verdict prefers; None where it does not say exactly one."""
    found = set(_PREFERENCE.findall(verdict))
    if len(found) != 1:
        return None
    letter = found.pop()
    return "A" if letter == "A" else "B" if letter == "B" else "tie"
