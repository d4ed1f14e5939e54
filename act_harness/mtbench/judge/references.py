"""Reference answers: from a file in FastChat's format, or from the dataset's own column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from act_harness.errors import RecipeError
from act_harness.mtbench.judge.answers import Arm, Question
from act_harness.mtbench.judge.prompts import REFERENCE_CATEGORIES
from act_harness.support import reading

__all__ = ["load_references", "missing_references", "references_of"]

References = Mapping[str, Sequence[str]]


def load_references(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the reference answers of a file, question id to texts by turn.

    Args:
        path: JSON lines with ``question_id`` and ``choices[0].turns``, as FastChat's
            ``reference_answer/<model>.jsonl``.

    Raises:
        RecipeError: the file has another form.
    """
    found: dict[str, tuple[str, ...]] = {}
    advice = "check --references"
    records = reading.read_lines(
        path, half_line="keep", error=RecipeError, advice=advice, lenient=False
    )
    for number, record in enumerate(records, start=1):
        try:
            turns = record["choices"][0]["turns"]
            found[str(record["question_id"])] = tuple(str(text) for text in turns)
        except (TypeError, KeyError, IndexError):
            raise RecipeError(
                f"{path}: entry {number} is no reference answer, expected question_id and "
                "choices[0].turns"
            ) from None
    return found


def references_of(question: Question, given: References | None) -> tuple[str, ...]:
    """Return a question's references by turn, without empty ones at the end."""
    found = question.references if given is None else given.get(question.id, ())
    kept = [text.strip() for text in found]
    while kept and not kept[-1]:
        kept.pop()
    return tuple(kept)


def missing_references(arms: Sequence[Arm], given: References | None) -> list[tuple[str, int]]:
    """Return (question id, turn) of reference-guided questions that lack a reference."""
    missing: dict[tuple[str, int], None] = {}
    for arm in arms:
        for talk in arm.talks:
            if talk.question.category in REFERENCE_CATEGORIES:
                known = references_of(talk.question, given)
                for turn in range(1, len(talk.question.turns) + 1):
                    if len(known) < turn or not known[turn - 1]:
                        missing[talk.question.id, turn] = None
    return sorted(missing)
