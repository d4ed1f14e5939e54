"""Head sets whose answers are written down by hand, for tests of choosing and judging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from act_harness.bench.null_search import _Memory
from act_harness.search.choose.sets import Outcome, Place, SetMeasurement
from act_harness.search.documents import Document
from act_harness.search.recipe import Recipe, make_recipe
from act_harness.support.processes import Processes

A, B, C, D = (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)
"""Four places."""


def recipe(**changes: object) -> Recipe:
    return make_recipe({"name": "hand", "tasks": ["t"], "controls": {"random_sets": 0}, **changes})


def documents(count: int, *, task: str = "t", loose: bool = False) -> list[Document]:
    """Two choices, the first one right; with ``loose`` every document has texts of its own."""
    requests = (((1,), (2,)), ((1,), (3,)))
    return [
        Document(task, f"{n:08x}", requests, 0, (f"yes {n}" if loose else "yes", "no"))
        for n in range(count)
    ]


def rows(pattern: str) -> list[list[float]]:
    """Return scores whose margins are +1 where ``pattern`` has a 1 and -1 where it has a 0."""
    return [[-1.0, -2.0] if mark == "1" else [-2.0, -1.0] for mark in pattern]


def sets(
    answers: Mapping[Sequence[Place], str | list[list[float]]],
    given: Recipe | None = None,
    *,
    loose: bool = False,
) -> SetMeasurement:
    """Return what measures sets of one task; ``answers`` maps each set to hits or to scores."""
    scores = {
        tuple(sorted(places)): rows(found) if isinstance(found, str) else found
        for places, found in answers.items()
    }
    count = len(next(iter(scores.values())))
    tasks = {"t": documents(count, loose=loose)}
    return SetMeasurement(
        lambda places, _: scores[places], given or recipe(), tasks, _Memory(), Processes()
    )


def outcome(before: str, after: str, *, loose: bool = False) -> Outcome:
    """Return the outcome of a set that turned the answers ``before`` into ``after``."""
    return sets({(): before, (A,): after}, loose=loose).outcomes([[A]])[0]


def two_tasks(fixed, loose):
    """One task with fixed choices and one whose choices differ, each (before, after)."""
    tasks = {"fixed": documents(len(fixed[0])), "loose": documents(len(loose[0]), loose=True)}
    patterns = {("fixed", 0): fixed[0], ("fixed", 1): fixed[1]}
    patterns |= {("loose", 0): loose[0], ("loose", 1): loose[1]}

    def score(places, given):
        kind = "fixed" if given[0].choices[0] == "yes" else "loose"
        return rows(patterns[kind, len(places)])

    measured = SetMeasurement(score, recipe(), tasks, _Memory(), Processes())
    return measured.outcomes([[A]])[0]
