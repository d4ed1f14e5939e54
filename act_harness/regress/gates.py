"""Layer 2: is a task worse than its baseline, beyond chance and beyond rounding?

Every arm of every task is one pair of runs over the same documents and goes through
:func:`act_harness.evidence.compare.compare`: exact McNemar for 0/1 metrics, bootstrap interval,
clusters where documents share a passage, Benjamini-Hochberg over all tasks and arms together. A
task that this calls regressed fails only when its loss is also larger than the spread that was
measured when the baseline was made: repetitions that change nothing but batch size, threads and
order.

So on the CPU in float32, where the spread is mostly zero, significance decides; in bf16 a task
whose score wanders by two documents from run to run cannot fail by losing two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from act_harness.evidence.compare import compare
from act_harness.evidence.comparison import Comparison, Row
from act_harness.evidence.results import Run, run_from_memory
from act_harness.regress.baseline import (
    Baseline,
    Spread,
    StoredDocument,
    StoredMeasurement,
    TaskRecord,
)
from act_harness.regress.goldens import Finding, drifts

__all__ = ["compare_measurements", "gate", "split_name", "spread_of"]


def compare_measurements(
    baseline: Baseline, new: StoredMeasurement, *, without: Collection[str] = ()
) -> Comparison | None:
    """Compare a run with the baseline; rows are named ``task@arm``.

    Args:
        baseline: The stored run, A.
        new: This run, B; it may have fewer tasks and documents.
        without: Tasks that cannot be paired, because they ask something else now.

    Returns:
        None where no task is left.
    """
    tasks = [name for name in new.tasks if name not in without]
    if not tasks:
        return None
    stored = baseline.measurement
    kept = {name: {one.key for one in new.tasks[name].documents} for name in tasks}
    date = baseline.provenance.get("created", "")
    old_run = _run(stored, kept, label=f"baseline of {date}")
    new_run = _run(new, kept, label="this run")
    return compare(old_run, new_run, alpha=baseline.alpha)


def gate(baseline: Baseline, comparison: Comparison) -> tuple[list[Finding], list[str]]:
    """Return what regressed, and notes on losses that are within the spread."""
    findings, notes = [], []
    for row in comparison.regressed:
        task, arm = split_name(row.name)
        spread = _allowed(baseline, task, arm, row)
        if row.result is None:
            continue
        loss = abs(row.result.difference)
        told = (
            f"{row.metric} {row.score_a:.4f} then, {row.score_b:.4f} now "
            f"({row.result.difference:+.4f}, adjusted p {row.p_adjusted:.2g}, spread {spread:.4f})"
        )
        if loss > spread:
            findings.append(Finding("score regressed", task, arm, told))
        else:
            notes.append(f"{task}, arm {arm}: {told}: within the run-to-run spread")
    return findings, notes


def spread_of(
    reference: StoredMeasurement, repeated: StoredMeasurement
) -> dict[str, dict[str, Spread]]:
    """Return what a repetition changed: task to arm to drift, flips and change of the scores."""
    found: dict[str, dict[str, Spread]] = {}
    for row in drifts(reference, repeated):
        then = reference.tasks[row.task].scores[row.arm]
        now = repeated.tasks[row.task].scores[row.arm]
        changes = {key: abs(now[key] - value) for key, value in then.items() if key in now}
        one = Spread(drift=float(f"{row.drift:.3g}"), flips=row.flips, spread=changes)
        found.setdefault(row.task, {})[row.arm] = one
    return found


def split_name(name: str) -> tuple[str, str]:
    """Return task and arm of a row's name."""
    task, _, arm = name.rpartition("@")
    return task, arm


def _allowed(baseline: Baseline, task: str, arm: str, row: Row) -> float:
    measured = baseline.spread.get(task, {}).get(arm)
    return 0.0 if measured is None else measured.spread.get(f"{row.metric},{row.filter}", 0.0)


def _run(measured: StoredMeasurement, kept: Mapping[str, set[Any]], *, label: str) -> Run:
    """Return a measurement as the run that lm-eval would have written, without any text."""
    data: dict[str, Any] = {"results": {}, "configs": {}, "higher_is_better": {}, "samples": {}}
    data["model_name"] = measured.model.id
    for name, documents in kept.items():
        task = measured.tasks[name]
        chosen = [one for one in task.documents if one.key in documents]
        whole = len(chosen) == len(task.documents)
        for arm in measured.arms:
            row = f"{name}@{arm}"
            # Of a part of the documents, the score is not the reported one.
            scores = task.scores[arm] if whole else {}
            data["results"][row] = {**scores, "sample_len": len(chosen)}
            data["configs"][row] = {}
            data["higher_is_better"][row] = task.higher_is_better
            data["samples"][row] = [_row(task, one, arm) for one in chosen]
    return run_from_memory(data, label=label)


def _row(task: TaskRecord, document: StoredDocument, arm: str) -> dict[str, Any]:
    answer = document.arms[arm]
    row: dict[str, Any] = {
        "doc_id": document.id,
        "doc_hash": document.doc,
        "prompt_hash": document.prompt,
        "target_hash": document.target,
        "filter": document.filter,
        "metrics": list(answer.metrics),
        "doc": document.shared,
        "target": document.target if document.label is None else str(document.label),
        **answer.metrics,
    }
    if document.label is not None:
        row["arguments"] = [
            [document.prompt, f"{document.choices}-{at}"] for at in range(len(answer.scores))
        ]
        row["filtered_resps"] = [
            [-math.inf if score is None else score, "False"] for score in answer.scores
        ]
    return row
