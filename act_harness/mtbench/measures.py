"""What can be said about answers without a judge: length, cuts, emptiness, repetition.

A model that runs into loops, or whose answers all end at the limit, is worth knowing before a judge
is paid. No torch, no lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["distinct_n", "measure"]


def distinct_n(text: str, n: int = 2) -> float:
    """Return the share of different word n-grams among all of a text (Li et al., 2016).

    1.0 where nothing repeats; nan where the text has fewer than ``n`` words.
    """
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def measure(answers: Sequence[str]) -> dict[str, float]:
    """Measure the turns of one conversation.

    Args:
        answers: the texts; a :class:`act_harness.mtbench.chat.Conversation` also knows tokens and
            why each answer ended, without which these two are nan.

    Returns:
        ``turn_N_tokens``, ``turn_N_cut_off`` (ended by a limit, 0 or 1), ``turn_N_empty`` (0 or 1)
        and ``turn_N_distinct_2`` for every turn.
    """
    details = getattr(answers, "answers", None)
    found: dict[str, float] = {}
    for number, text in enumerate(answers, start=1):
        known = details[number - 1] if details else None
        found[f"turn_{number}_tokens"] = float(known.tokens) if known else math.nan
        cut = float(known.finish in ("length", "context")) if known else math.nan
        found[f"turn_{number}_cut_off"] = cut
        found[f"turn_{number}_empty"] = float(not text.strip())
        found[f"turn_{number}_distinct_2"] = distinct_n(text)
    return found
