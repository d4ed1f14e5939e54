"""Comparisons made by hand, as trackers are given them."""

from __future__ import annotations

from act_harness.evidence import stats
from act_harness.evidence.comparison import Comparison, Row, RunInfo, Settings


def row(name, **more):
    result = stats.paired_difference([1, 1, 0, 0], [1, 0, 1, 1])
    given = {
        "kind": "task", "name": name, "metric": "acc", "filter": "none", "headline": True,
        "derived": False, "higher_is_better": True, "score_a": 0.5, "score_b": 0.75,
        "result": result, "p_adjusted": 0.5, "verdict": "inconclusive", "clustered_by": None,
    }  # fmt: skip
    return Row(**{**given, **more})


def comparison(*rows):
    run = RunInfo("m", None, "m", {}, None, {})
    return Comparison(run, run, Settings(0.95, 0.05, 1e-4, 99, 0), tuple(rows))
