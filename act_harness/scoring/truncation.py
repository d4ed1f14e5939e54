"""From tokenised requests to what is scored: truncation as lm-eval does it, counted.

lm-eval keeps the last ``max_length`` + 1 tokens of context and continuation together (the last one
is never an input). A context that loses its first tokens loses its initial attention sink, so the
cases are counted, refused or skipped as the user asks. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from act_harness.errors import InputError
from act_harness.scoring.scorer import Item

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OVERLENGTH", "Prepared", "prepare"]

OVERLENGTH = ("truncate", "error", "skip")


@dataclass(frozen=True)
class Prepared:
    """Items in the order of the requests, None where one is skipped."""

    items: list[Item | None]
    truncated: list[tuple[int, ...]]
    """Contexts, as given, that lost their first tokens."""
    skipped: list[tuple[int, ...]]
    """Requests (context and continuation) that are not scored."""
    marks: list[dict[str, Any] | None]
    """For each request what a sample should say of it; None where it is scored as given."""


def prepare(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, max_length: int, overlength: str
) -> Prepared:
    """Cut requests to the model's length.

    Args:
        requests: (context, continuation) token ids.
        max_length: most tokens of one forward, at least one.
        overlength: one of :data:`OVERLENGTH`. A continuation that alone is longer than the model
            cannot be scored; ``truncate`` skips it too.

    Raises:
        InputError: ``overlength`` is ``error`` and a request is too long; or ``max_length`` is
            below 1.
    """
    if max_length < 1:
        raise InputError(f"max_length={max_length}, expected at least one token")
    items: list[Item | None] = []
    truncated: dict[tuple[int, ...], None] = {}
    skipped: dict[tuple[int, ...], None] = {}
    marks: list[dict[str, Any] | None] = []
    for given, continuation in requests:
        context, answer = tuple(given), tuple(continuation)
        # an empty answer has no last token that would not be an input
        surplus = len(context) + max(1, len(answer)) - (max_length + 1)
        if surplus > 0 and overlength == "error":
            raise InputError(
                f"a request has {len(context)} + {len(answer)} tokens, the model takes "
                f"{max_length}; use overlength=truncate or skip, or fewer few-shot examples"
            )
        if surplus > 0 and (overlength == "skip" or len(answer) > max_length):
            skipped[context + answer] = None
            items.append(None)
            marks.append({"overlength": "skipped", "surplus_tokens": surplus})
            continue
        if surplus > 0:
            truncated[context] = None
            context = context[surplus:]
        marks.append({"overlength": "truncated", "lost_tokens": surplus} if surplus > 0 else None)
        items.append(Item(context, answer))
    return Prepared(items, list(truncated), list(skipped), marks)
