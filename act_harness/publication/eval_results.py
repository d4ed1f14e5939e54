"""Entries for ``.eval_results/`` of a model repository, which the hub shows and ranks by.

The format is the hub's (https://huggingface.co/docs/hub/eval-results): a list of dataset, value and
where it comes from, one file a task here. A repository holds entries of its own model alone, so the
arms are apart. Left out are scores that would stand on a leaderboard as what they are not: of a
part of the documents, of groups, and of data that are not on the hub.

Not here: whether a dataset is a registered benchmark, which only the hub knows.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from act_harness.publication.evaluation import Arm, is_hub_id
from act_harness.support.places import file_name

__all__ = ["FOLDER", "eval_result_entries"]

FOLDER = ".eval_results"


def eval_result_entries(
    arms: Sequence[Arm], *, source: str | None
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Return one arm's entries by file, and a line for what was left out.

    Args:
        arms: The arm's results, one for each few-shot seed.
        source: Address of the results behind the entries.
    """
    files: dict[str, list[dict[str, Any]]] = {}
    parts, elsewhere = [], []
    for task in arms[0].run.tasks if arms else ():
        config = arms[0].run.data["configs"][task]
        where = str(config.get("dataset_path") or "") if isinstance(config, Mapping) else ""
        if not is_hub_id(where):
            elsewhere.append(task)
        elif not all(_whole(arm, task) for arm in arms):
            parts.append(task)
        elif (entry := _entry(arms, task, source)) is not None:
            dataset = {"id": where, "task_id": str(config.get("dataset_name") or "default")}
            files[f"{FOLDER}/{file_name(task)}.yaml"] = [{"dataset": dataset, **entry}]
    notes = []
    if parts:
        notes.append(f"no {FOLDER} of {_listed(parts)}: not all documents were scored")
    if elsewhere:
        notes.append(f"no {FOLDER} of {_listed(elsewhere)}: the data are not on the hub")
    return files, notes


def _whole(arm: Arm, task: str) -> bool:
    """Whether all documents were scored; lm-eval's own count knows --limit, not --samples."""
    counts = arm.documents(task)
    scored = arm.run.data["results"][task].get("sample_len", counts.get("effective"))
    whole = counts.get("original")
    if whole is None or not scored == whole == counts.get("effective"):
        return False
    if not arm.skipped:
        return True
    # Without samples nobody knows of which task the skipped requests were.
    return arm.run.has_samples(task) and not any(one.skipped for one in arm.run.samples(task))


def _entry(arms: Sequence[Arm], task: str, source: str | None) -> dict[str, Any] | None:
    run = arms[0].run
    key = next((k for k in run.metrics(task) if run.score(task, *k) is not None), None)
    if key is None:
        return None
    scores = [score for arm in arms if (score := arm.run.score(task, *key)) is not None]
    if len(scores) < len(arms):  # a seed without a number
        return None
    entry: dict[str, Any] = {"value": statistics.fmean(scores) if len(scores) > 1 else scores[0]}
    if arms[0].date is not None:
        entry["date"] = f"{datetime.fromtimestamp(arms[0].date, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    address = source or arms[0].tracked_at
    if address:
        name = "act-harness results" if source else "W&B run"
        entry["source"] = {"url": address, "name": name}
    return {**entry, "notes": _notes(arms, task, key)}


def _notes(arms: Sequence[Arm], task: str, key: tuple[str, str]) -> str:
    arm = arms[0]
    metric, kind = key
    shots = arm.noted("n-shot", task)
    parts = [
        f"lm-evaluation-harness {arm.run.data.get('lm_eval_version', '')}".strip(),
        f"task {task}",
        metric if kind in ("none", "") else f"{metric} ({kind})",
    ]
    if shots is not None:
        parts.append(f"{shots}-shot")
    if len(arms) > 1:
        parts.append(f"mean of {len(arms)} few-shot seeds")
    if arm.calibrated:
        digest = str(arm.record["artifact_sha256"])[:12]
        parts.append(
            f"calibrated attention (ACT), artifact {arm.record.get('artifact')} ({digest}) on "
            f"{arm.base_model}"
        )
    return ", ".join(parts)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
