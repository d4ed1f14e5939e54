"""What is tracked: results, comparisons, samples, heads and counters as scalars and tables.

Plain data in, plain data out, so that every tracker logs the same names and a dashboard can be
described before the first run exists:

- ``<task>/<metric>`` and ``<task>/<metric>_stderr``: an arm's score (``<metric>,<filter>`` for
  filters other than ``none``), ``<task>/documents``: how many documents it rests on;
- ``<task>/<metric>_difference``, ``..._low``, ``..._high``, ``..._p``, ``..._verdict``: the paired
  difference to the baseline;
- ``counters/<name>``: what the calibration did;
- tables ``scores``, ``comparison``, ``heads``, ``samples/<task>``; image ``head_map``;
- ``search/...`` and ``judge/...``, tables ``effects`` and ``effects_by_task``, images ``head_map``
  and ``ranks``: a search; ``mt_bench/...``: a judge's scores.

With several few-shot seeds every score stands under ``seed-<n>/<task>/<metric>``, and the plain
names hold the mean over seeds, with ``..._spread`` for the standard deviation between them.

Not here: any tracking service (:mod:`act_harness.tracking.wandb_run`).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from act_harness.evidence.comparison import Comparison
from act_harness.support.atomic import plain

__all__ = [
    "Table",
    "artifact_content",
    "capped",
    "comparison_scalars",
    "comparison_table",
    "counter_scalars",
    "heads_table",
    "over_seeds",
    "result_scalars",
    "results_table",
    "run_config",
    "samples_table",
    "tables_over_seeds",
    "uniform",
]

_LONG = ("table", "screen", "rule")

_NO_MEAN = ("_stderr", "_low", "_high", "_p", "_verdict")
"""Ends of names whose mean over few-shot seeds would be no such thing (no interval, no p)."""

MAX_CELL = 2000
"""Characters of one cell of a samples table; longer texts are cut, with the number left out."""


class Table(NamedTuple):
    """Rows under named columns."""

    columns: list[str]
    rows: list[list[Any]]
    left_out: int = 0
    """Rows that did not fit the caps."""


# -- scalars and configuration ---------------------------------------------------------------------


def run_config(
    *,
    arm: str,
    model: Mapping[str, Any] | str,
    artifact: Mapping[str, Any] | None = None,
    artifact_sha256: str | None = None,
    engine: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    **more: Any,  # noqa: ANN401 - whatever else the command wants to record
) -> dict[str, Any]:
    """Return a run's configuration: what has to be equal for two runs to be the same experiment.

    Args:
        arm: ``baseline``, ``act``, or another name of what is being compared.
        model: The model, as a name or as the artifact schema's ``model``.
        artifact: Content of the head-set artifact, None for the untouched model.
        artifact_sha256: Hash of what decides scores in it.
        engine: Name of the attention engine.
        provenance: Versions, commit and device.
        more: Further keys.
    """
    return {
        "arm": arm,
        "model": plain(model),
        "artifact": artifact_content(artifact) if artifact else None,
        "artifact_name": artifact.get("name") if artifact else None,
        "artifact_sha256": artifact_sha256,
        "calibration": plain(artifact.get("calibration")) if artifact else None,
        "engine": engine,
        "provenance": plain(provenance or {}),
        **{key: plain(value) for key, value in more.items()},
    }


def artifact_content(artifact: Mapping[str, Any]) -> dict[str, Any]:
    """Return an artifact as a configuration holds it: whole, but for the search's long tables.

    They are in the tracked file; a row a head and task has no place among settings.
    """
    content: dict[str, Any] = plain(artifact)
    search = content.get("search")
    if isinstance(search, Mapping):
        kept = {key: value for key, value in search.items() if key not in _LONG}
        content["search"] = kept
    return content


def result_scalars(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the scores of all tasks and groups in an lm-eval result.

    None stands for a score that the result has no number for ("N/A", NaN).
    """
    found: dict[str, float | None] = {}
    for name, metrics in {**results.get("results", {}), **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if comma:
                shown = metric if kind == "none" else f"{metric},{kind}"
                found[f"{name}/{shown}"] = _number(value)
        if isinstance(metrics.get("sample_len"), int):
            found[f"{name}/documents"] = metrics["sample_len"]
    return found


def comparison_scalars(comparison: Comparison) -> dict[str, float | str | None]:
    """Return the paired differences of a comparison, to be logged with arm B."""
    found: dict[str, float | str | None] = {}
    for row in comparison.rows:
        if row.result is None:
            continue
        metric = row.metric if row.filter == "none" else f"{row.metric},{row.filter}"
        start = f"{row.name}/{metric}"
        found[f"{start}_difference"] = row.result.difference
        found[f"{start}_low"] = _number(row.result.interval.low)
        found[f"{start}_high"] = _number(row.result.interval.high)
        found[f"{start}_p"] = row.p_adjusted
        found[f"{start}_verdict"] = row.verdict
    return found


def counter_scalars(counters: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the calibration's counters, nested ones joined by a slash."""
    found: dict[str, float | None] = {}
    for key, value in counters.items():
        if isinstance(value, Mapping):
            found |= {f"counters/{key}/{k[9:]}": v for k, v in counter_scalars(value).items()}
        elif (number := _number(value)) is not None or value is None:
            found[f"counters/{key}"] = number
    return found


def over_seeds(
    found: Mapping[int, Mapping[str, float | str | None]],
) -> dict[str, float | str | None]:
    """Return the scalars of several few-shot seeds: each seed's own, the mean and the spread.

    With one seed, its scalars as they are.
    """
    if len(found) == 1:
        return dict(next(iter(found.values())))
    joined: dict[str, float | str | None] = {
        f"seed-{seed}/{key}": value for seed, own in found.items() for key, value in own.items()
    }
    for key in dict.fromkeys(key for own in found.values() for key in own):
        values = [_number(own.get(key)) for own in found.values()]
        known = [value for value in values if value is not None]
        if key.endswith(_NO_MEAN) or len(known) < len(values):
            continue
        joined[key] = statistics.fmean(known)
        if not key.endswith("/documents"):
            joined[f"{key}_spread"] = statistics.stdev(known)
    return joined


# -- tables ----------------------------------------------------------------------------------------


def results_table(results: Mapping[str, Any]) -> Table:
    """Return every score of an lm-eval result, one a row."""
    rows = []
    for name, metrics in {**results.get("results", {}), **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = _number(metrics.get(f"{metric}_stderr,{kind}"))
            shots = results.get("n-shot", {}).get(name)
            size = metrics.get("sample_len")
            rows.append([name, metric, kind, _number(value), error, size, shots])
    columns = ["task", "metric", "filter", "value", "stderr", "documents", "num_fewshot"]
    return Table(columns, rows)


def comparison_table(comparison: Comparison) -> Table:
    """Return a comparison, one row a task or group and metric."""
    columns = ["task", "kind", "metric", "filter", "documents", "score_a", "score_b", "difference",
               "low", "high", "p_adjusted", "gained", "lost", "minimum_detectable",
               "verdict"]  # fmt: skip
    rows: list[list[Any]] = []
    for row in comparison.rows:
        start = [row.name, row.kind, row.metric, row.filter]
        if row.result is None:
            rows.append([*start, None, row.score_a, row.score_b, *[None] * 7, "not tested"])
            continue
        found = row.result
        flips = (found.flips.gained, found.flips.lost) if found.flips else (None, None)
        rows.append([
            *start, found.documents, found.score_a, found.score_b, found.difference,
            _number(found.interval.low), _number(found.interval.high), row.p_adjusted, *flips,
            _number(found.minimum_detectable), row.verdict,
        ])  # fmt: skip
    return Table(columns, rows)


def heads_table(artifact: Mapping[str, Any]) -> Table:
    """Return the heads of an artifact with what is done to each, one a row."""
    calibration = artifact.get("calibration") or {}
    strengths = artifact.get("strengths") or {}
    rows = []
    for layer, heads in sorted(artifact.get("heads", {}).items(), key=lambda item: int(item[0])):
        for head in sorted(heads):
            own = strengths.get(layer, {}).get(str(head), calibration)
            strength = own.get("beta", own.get("gamma"))
            rows.append([int(layer), int(head), own.get("mass"), _number(strength)])
    return Table(["layer", "head", "mass", "strength"], rows)


def samples_table(
    samples: Iterable[Mapping[str, Any]],
    *,
    max_rows: int = 500,
    max_bytes: int = 4 << 20,
) -> Table:
    """Return samples as lm-eval logs them, cut to a number of rows and bytes.

    Args:
        samples: Parsed lines of a samples file, or the samples of ``simple_evaluate``.
        max_rows: The first so many are kept.
        max_bytes: Of these, as many as fit into so many bytes of JSON.
    """
    kept: list[dict[str, Any]] = []
    used = total = 0
    for sample in samples:
        total += 1
        if total > len(kept) + 1 or len(kept) >= max_rows:
            continue
        row = _sample_row(sample)
        used += len(json.dumps(row, default=str))
        if used <= max_bytes:
            kept.append(row)
    columns = list(dict.fromkeys(name for row in kept for name in row))
    rows = [[row.get(name) for name in columns] for row in kept]
    return Table(columns, uniform(rows), left_out=total - len(kept))


def tables_over_seeds(tables: Mapping[int, Table]) -> Table:
    """Return the tables of several few-shot seeds as one, the seed in the first column."""
    if len(tables) == 1:
        return next(iter(tables.values()))
    columns = list(dict.fromkeys(name for table in tables.values() for name in table.columns))
    rows = []
    for seed, table in tables.items():
        for row in table.rows:
            own = dict(zip(table.columns, row, strict=True))
            rows.append([seed, *(own.get(name) for name in columns)])
    left_out = sum(table.left_out for table in tables.values())
    return Table(["fewshot_seed", *columns], rows, left_out)


def capped(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    max_rows: int,
    max_bytes: int = 4 << 20,
) -> Table:
    """Return the first rows that stay within a number of rows and bytes of JSON."""
    kept: list[list[Any]] = []
    used = total = 0
    for row in rows:
        total += 1
        used += len(json.dumps(plain(row)))
        if len(kept) == total - 1 < max_rows and used <= max_bytes:
            kept.append(list(row))
    return Table(list(columns), kept, total - len(kept))


def uniform(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return rows whose columns hold one type each: numbers, booleans, or text; None stays.

    Trackers refuse columns of mixed types, and lm-eval's samples have them (a target is an index
    in one document and a list of texts in another).
    """
    columns = [_one_type(list(column)) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)] if columns else []


# -- helpers ---------------------------------------------------------------------------------------


def _sample_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments, answers = sample.get("arguments") or [], sample.get("filtered_resps") or []
    if isinstance(arguments, Mapping):
        arguments = [list(one.values()) for one in arguments.values()]
    prompt = arguments[0][0] if arguments and arguments[0] else None
    row: dict[str, Any] = {
        "doc_id": sample.get("doc_id"),
        "filter": sample.get("filter"),
        "prompt": _cut(prompt),
        "target": _cut(sample.get("target")),
    }
    scored = [a for a in answers if isinstance(a, (list, tuple)) and len(a) == 2]
    if len(scored) == len(arguments) > 1:
        scores = [_number_or_text(a[0]) for a in scored]
        best = max(range(len(scores)), key=lambda i: scores[i])
        row["answer"] = _cut(arguments[best][1] if len(arguments[best]) > 1 else best)
        row["scores"] = json.dumps(scores)
    else:
        row["answer"] = _cut(answers[0] if len(answers) == 1 else answers)
    for metric in sample.get("metrics", []):
        value = sample.get(metric)
        number = _number(value)
        row[f"metric/{metric}"] = number if number is not None else _cut(value)
    return row


def _one_type(column: list[Any]) -> list[Any]:
    known = [value for value in column if value is not None]
    if all(isinstance(value, bool) for value in known):
        return column
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
        return [_number(value) for value in column]
    return [value if value is None or isinstance(value, str) else _text(value) for value in column]


def _cut(value: Any) -> str | None:  # noqa: ANN401 - any part of a sample
    if value is None:
        return None
    text = value if isinstance(value, str) else _text(value)
    # Half a surrogate pair, as a model can produce, has no place in any protocol.
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    left = len(text) - MAX_CELL
    return text if left <= 0 else f"{text[:MAX_CELL]} ... ({left} more characters)"


def _text(value: Any) -> str:  # noqa: ANN401 - any part of a sample
    return json.dumps(plain(value), ensure_ascii=False)


def _number(value: Any) -> float | None:  # noqa: ANN401 - whatever stands in a result
    if isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        return float(value) if math.isfinite(value) else None
    return None


def _number_or_text(value: Any) -> float:  # noqa: ANN401 - lm-eval writes numbers as text
    try:
        return float(value)
    except (TypeError, ValueError):
        return -math.inf
