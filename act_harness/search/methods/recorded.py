"""What the documents that only judge say of a method's head set, written into its artifact.

An artifact that leaves the folder then carries its figures, as those of ``act-harness search`` do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from act_harness.artifact import load_artifact
from act_harness.search.choose.effects import TaskScores
from act_harness.search.choose.judgement import judgement
from act_harness.search.choose.sets import Outcome
from act_harness.search.methods.random_heads import RANDOM_HEADS

if TYPE_CHECKING:
    from act_harness.search.documents import Document
    from act_harness.search.methods.arms import Arm

__all__ = ["record_judgements"]


def record_judgements(
    folder: Path, untouched: Arm, arms: Sequence[Arm], tasks: Mapping[str, Sequence[Document]]
) -> None:
    """Write ``search.held_out`` into the artifact of every method that searched.

    Args:
        folder: of the artifacts.
        untouched: scores of the stock model.
        arms: of the methods; random head sets among them are the controls of what they copy.
        tasks: the documents that only judge, by task.
    """
    for arm in arms:
        path = folder / f"{arm.method}.json"
        artifact = load_artifact(path) if arm.heads else None
        if artifact is None or artifact.search is None:
            continue
        search = artifact.search
        objective: str = search["recipe"]["objective"]
        random = {one.name for one in RANDOM_HEADS if one.of == arm.method}
        found = judgement(
            _outcome(arm, untouched, tasks, objective),
            [_outcome(one, untouched, tasks, objective) for one in arms if one.method in random],
            chosen_by=search["rule"].get("criterion")
            or ("objective" if objective == "corrected" else "accuracy"),
            heads=arm.heads,
        )
        if search.get("held_out") != found:
            artifact.model_copy(update={"search": {**search, "held_out": found}}).save(path)


def _outcome(
    arm: Arm, untouched: Arm, tasks: Mapping[str, Sequence[Document]], objective: str
) -> Outcome:
    stock, arms, spreads = {}, {}, {}
    for task, documents in tasks.items():
        base, own = (
            TaskScores.of(documents, one.scores["evaluation"][task], objective=objective)
            for one in (untouched, arm)
        )
        stock[task], arms[task] = base.arm(base.scores), base.arm(own.scores)
        spreads[task] = base.spread
    return Outcome(stock, arms, spreads)
