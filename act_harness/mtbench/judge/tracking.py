"""What a finished judge run logs: scores, differences, the conversations, the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from act_harness.mtbench.judge.summary import scalars
from act_harness.support import provenance
from act_harness.tracking import values as tracked
from act_harness.tracking.wandb_run import open_tracker

if TYPE_CHECKING:
    from act_harness.mtbench.judge.judging import JudgeOutcome
    from act_harness.mtbench.judge.settings import JudgeSettings
    from act_harness.tracking.tracker import Tracker, TrackingSettings

__all__ = ["track_judge", "track_outcome"]

_COLUMNS = ("arm", "question", "category", "turn", "user", "assistant", "score")


def track_judge(
    outcome: JudgeOutcome, settings: JudgeSettings, tracking: TrackingSettings
) -> list[str]:
    """Log a finished judge run as one run of job type ``judge``; return where it is, as a line.

    The same judge on the same answers continues its run.

    Raises:
        InfrastructureError: W&B cannot be reached or refuses the key (strict only).
    """
    judge = settings.judge_identity()
    config = {
        "arm": "judge",
        "arms": [arm.arm for arm in outcome.arms],
        "judge": judge,
        "answers": [str(path) for path in settings.paths],
        "rejudge": settings.rejudge,
        "provenance": provenance.collect(seed=settings.seed).to_json(),
    }
    with open_tracker(
        tracking,
        job_type="judge",
        name=f"judge-{settings.model}",
        config=config,
        folder=settings.output_folder,
        identity={"judge": judge, "arms": config["arms"], "group": tracking.group},
    ) as tracker:
        track_outcome(tracker, outcome, max_rows=tracking.max_samples)
        return [line for line in (tracker.describe(),) if line]


def track_outcome(tracker: Tracker, outcome: JudgeOutcome, *, max_rows: int = 500) -> None:
    """Log scores, a table of the conversations and the pictures of a finished run."""
    tracker.scalars(
        {
            **scalars(outcome.arms, outcome.differences),
            "mt_bench/calls": outcome.calls,
            "mt_bench/failure_rate": outcome.failure_rate,
        }
    )
    if max_rows:
        table = tracked.capped(_COLUMNS, _rows(outcome.conversations), max_rows=max_rows)
        tracker.table("mt_bench/conversations", table.columns, table.rows)
        if table.left_out:
            tracker.scalars({"mt_bench/conversations_left_out": table.left_out})
    for file in outcome.files:
        if file.suffix == ".png":
            tracker.image(f"mt_bench/{file.stem}", file)


def _rows(conversations: Iterable[Sequence[object]]) -> Iterable[list[object]]:
    for row in conversations:
        yield [None if isinstance(v, float) and math.isnan(v) else v for v in row]
