"""``act-harness compare A B``: what changed between two runs on the same documents.

For every task and group that both runs have: both scores, the paired difference with its interval,
a p-value adjusted for the number of tasks, and a verdict. Groups are compared as lm-eval aggregates
them; whether by tasks or by documents is read off the reported score. Documents that share a
passage (BoolQ), a context (SQuAD) or a subject (groups of MMLU) are resampled together.

Not here: pairing the documents (:mod:`act_harness.evidence.pairing`), tolerances of nightly runs
(regress), plots (:mod:`act_harness.evidence.plots`).
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from act_harness.errors import ResultError, suggestion
from act_harness.evidence.comparison import Comparison, Row, RunInfo, Settings
from act_harness.evidence.corpus import corpus_difference
from act_harness.evidence.pairing import Key, Measured, measure
from act_harness.evidence.results import Run, load_run
from act_harness.evidence.stats import (
    NEGLIGIBLE,
    RESAMPLES,
    SEED,
    Part,
    at_level,
    benjamini_hochberg,
    combined_difference,
    verdict,
)
from act_harness.support.checks import check_seed, check_share

__all__ = ["Comparison", "Row", "compare"]

_INFO = {
    "lm_eval_version": "lm_eval",
    "transformers_version": "transformers",
}


def compare(
    a: Run | str | os.PathLike[str],
    b: Run | str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    clusters: Mapping[str, str | None] | None = None,
    confidence: float = 0.95,
    alpha: float = 0.05,
    negligible: float = NEGLIGIBLE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare run B with run A, the reference.

    Args:
        a: A run, or what :func:`act_harness.evidence.results.load_run` takes.
        b: The same.
        tasks: Names of tasks and groups to compare; None: all that both runs have.
        clusters: Task to the document field whose equal values are resampled together; None for a
            task: each document alone. A task that is absent is clustered by what its documents
            share.
        confidence: Level of the intervals.
        alpha: Accepted share of false findings.
        negligible: See :func:`act_harness.evidence.stats.verdict`.
        resamples: Bootstrap resamples and sign flips.
        seed: Seed of the draws; equal input and seed give equal output.

    Raises:
        InputError: A level or seed is out of range.
        ResultError: The runs share no task or no samples, a document or prompt differs, or a name
            is unknown.
        InfrastructureError: A file cannot be read.
    """
    check_share(confidence, "--confidence")
    check_share(alpha, "--alpha")
    check_seed(seed)
    one, two = (given if isinstance(given, Run) else load_run(given) for given in (a, b))
    settings = Settings(confidence, alpha, negligible, resamples, seed)
    names, groups, notes = _select(one, two, tasks)
    needed = dict.fromkeys([*names, *(leaf for group in groups for leaf in one.leaves(group))])
    logged = [task for task in needed if one.has_samples(task) and two.has_samples(task)]
    if not logged:
        raise ResultError(
            f"no samples to pair in {one.label} and {two.label}; repeat both with --log_samples"
        )
    measured = {task: measure(one, two, task, clusters=clusters or {}) for task in logged}
    rows = [row for task in names for row in _task_rows(one, two, task, measured, settings)]
    rows += [row for group in groups for row in _group_rows(one, two, group, measured, settings)]
    return Comparison(
        a=_info(one),
        b=_info(two),
        settings=settings,
        rows=_decide(rows, settings),
        notes=(*one.notes, *two.notes, *_settings_that_differ(one, two), *notes),
    )


# -- what is compared ------------------------------------------------------------------------------


def _select(a: Run, b: Run, wanted: Sequence[str] | None) -> tuple[list[str], list[str], list[str]]:
    """Tasks, groups, and notes on what only one run has."""
    tasks = [task for task in a.tasks if task in b.tasks]
    groups = [group for group in a.groups if group in b.groups]
    notes = []
    for run, other, name in ((a, b, "A"), (b, a, "B")):
        alone = [task for task in run.tasks if task not in other.tasks]
        if alone:
            more = f" and {len(alone) - 8} more" if len(alone) > 8 else ""
            notes.append(f"only in {name}: {', '.join(alone[:8])}{more}")
    if not tasks:
        raise ResultError(
            f"{a.label} and {b.label} have no task in common ({'; '.join(notes) or 'no tasks'}); "
            "compare runs of the same tasks"
        )
    if wanted is None:
        return tasks, groups, notes
    for name in wanted:
        if name not in tasks and name not in groups:
            known = [*tasks, *groups]
            raise ResultError(
                f"no task or group {name!r} in both runs{suggestion(name, known)}; "
                f"there are {', '.join(known[:12])}{' ...' if len(known) > 12 else ''}"
            )
    return [t for t in tasks if t in wanted], [g for g in groups if g in wanted], notes


def _settings_that_differ(a: Run, b: Run) -> list[str]:
    """Notes on settings that change scores but not the hashes of document and prompt."""
    notes = []
    for key in ("lm_eval_version", "transformers_version", "chat_template_sha"):
        one, two = a.data.get(key), b.data.get(key)
        if one != two and a.data and b.data:
            notes.append(f"{key}: {one} in A, {two} in B")
    for key in ("model_dtype", "gen_kwargs", "batch_size", "model_sha"):
        one, two = a.data.get("config", {}).get(key), b.data.get("config", {}).get(key)
        if one != two:
            notes.append(f"{key}: {one} in A, {two} in B")
    return notes


def _info(run: Run) -> RunInfo:
    config = run.data.get("config", {})
    date = run.data.get("date")
    return RunInfo(
        label=run.label,
        path=str(run.path) if run.path else None,
        model=run.data.get("model_name") or config.get("model"),
        model_args=config.get("model_args"),
        date=float(date) if isinstance(date, (int, float)) else None,
        versions={name: str(run.data[key]) for key, name in _INFO.items() if key in run.data},
    )


# -- rows ------------------------------------------------------------------------------------------


def _task_rows(
    a: Run,
    b: Run,
    task: str,
    measured: Mapping[str, Mapping[Key, Measured]],
    settings: Settings,
) -> list[Row]:
    found = measured.get(task, {})
    rows: list[Row] = []
    for key in dict.fromkeys([*a.metrics(task), *b.metrics(task), *found]):
        one = found.get(key, Measured(None, note="not in the samples of both runs; not tested"))
        row = _reported(a, b, task, key)
        row = replace(row, derived=one.derived, note=one.note, not_finite=one.not_finite)
        if one.part is not None:
            row = _tested(row, [one.part], None, settings)
        elif one.corpus is not None:
            result = corpus_difference(
                one.corpus,
                confidence=settings.confidence,
                resamples=settings.resamples,
                seed=settings.seed,
            )
            row = replace(row, result=result, score_a=result.score_a, score_b=result.score_b)
        if row.result is not None and row.result.clusters is not None:
            row = replace(row, clustered_by=one.clustered_by)
        rows.append(row)
    return _with_headline(rows)


def _group_rows(
    a: Run,
    b: Run,
    group: str,
    measured: Mapping[str, Mapping[Key, Measured]],
    settings: Settings,
) -> list[Row]:
    leaves = a.leaves(group)
    reported = a.metrics(group)
    if not reported:
        return []
    derived = [
        key
        for key, one in measured.get(leaves[0], {}).items()
        if one.derived and all(key in measured.get(leaf, {}) for leaf in leaves)
    ]
    rows: list[Row] = []
    for key in [*reported, *derived]:
        row = replace(_reported(a, b, group, key), kind="group", derived=key in derived)
        # A derived measure is averaged as the group's first reported metric is.
        by_size = _weighs_by_size(a, b, group, reported[0] if key in derived else key, leaves)
        parts = [measured.get(leaf, {}).get(key, Measured(None)) for leaf in leaves]
        if sorted(leaves) != sorted(b.leaves(group)):
            row = replace(row, note="its tasks differ between A and B; not tested")
        elif by_size is None:
            row = replace(row, note="its score is no mean of its tasks' scores; not tested")
        elif any(one.part is None for one in parts):
            lacking = leaves[[one.part is None for one in parts].index(True)]
            note = f"task {lacking} could not be tested; nor is its group"
            if any(one.corpus is not None for one in parts):
                note = f"task {lacking} has no mean over its documents; its group is not tested"
            row = replace(row, note=note)
        else:
            row = _test_group(row, parts, by_size, settings)
        rows.append(row)
    return _with_headline(rows)


def _with_headline(rows: list[Row]) -> list[Row]:
    """Mark the first reported metric that could be tested, or the first one."""
    tested = [i for i, row in enumerate(rows) if row.result is not None and not row.derived]
    chosen = tested[0] if tested else 0
    return [replace(row, headline=index == chosen) for index, row in enumerate(rows)]


def _test_group(row: Row, found: Sequence[Measured], by_size: bool, settings: Settings) -> Row:
    parts = [one.part for one in found if one.part is not None]
    noted = sum(bool(one.note) for one in found if one.part is not None)
    if noted:
        row = replace(row, note=f"documents left out in {noted} of its tasks, see there")
    sizes = [len(part.a) for part in parts]
    subjects = [name for one in found for name in one.subjects or ()]
    plain = all(part.weights is None and part.transform is None for part in parts)
    if not (plain and len(subjects) == sum(sizes) and 1 < len(set(subjects)) < len(subjects)):
        weights = [float(size) for size in sizes] if by_size else None
        row = _tested(row, parts, weights, settings)
        names = {one.clustered_by for one in found if one.clustered_by}
        clustered = row.result is not None and row.result.clusters is not None
        return replace(row, clustered_by="/".join(sorted(names)) if clustered else None)
    # The subjects are a sample of what could be asked: they are resampled, not their documents.
    each = None if by_size else np.repeat([1 / size for size in sizes], sizes)
    whole = Part(
        np.concatenate([np.asarray(part.a, dtype=np.float64) for part in parts]),
        np.concatenate([np.asarray(part.b, dtype=np.float64) for part in parts]),
        weights=each,
        clusters=subjects,
    )
    return replace(_tested(row, [whole], None, settings), clustered_by="subject")


def _weighs_by_size(a: Run, b: Run, group: str, key: Key, leaves: Sequence[str]) -> bool | None:
    """Whether a group's reported scores weigh tasks by size; None when they are no such mean."""
    fits = {True, False}
    for run in (a, b):
        scores = [run.score(leaf, *key) for leaf in leaves]
        sizes = [run.data["results"].get(leaf, {}).get("sample_len", 0) for leaf in leaves]
        reported = run.score(group, *key)
        known = [score for score in scores if score is not None]
        if reported is None or len(known) < len(scores) or not sum(sizes):
            return None
        for by_size in tuple(fits):
            mean = float(np.average(known, weights=sizes if by_size else None))
            if not math.isclose(mean, reported, rel_tol=1e-6, abs_tol=1e-9):
                fits.discard(by_size)
    return None if not fits else min(fits)


def _reported(a: Run, b: Run, name: str, key: Key) -> Row:
    """Return a row with what the runs themselves say."""
    metric, kind = key
    better = a.higher_is_better(name, metric)
    if better is None and metric == "margin":
        better = True
    return Row(
        kind="task",
        name=name,
        metric=metric,
        filter=kind,
        headline=False,
        derived=False,
        higher_is_better=better,
        score_a=a.score(name, *key),
        score_b=b.score(name, *key),
        result=None,
        p_adjusted=None,
        verdict="inconclusive",
        clustered_by=None,
    )


def _tested(
    row: Row, parts: Sequence[Part], weights: Sequence[float] | None, settings: Settings
) -> Row:
    result = combined_difference(
        parts,
        weights=weights,
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    return replace(row, result=result, score_a=result.score_a, score_b=result.score_b)


def _decide(rows: Sequence[Row], settings: Settings) -> tuple[Row, ...]:
    """Adjust the p-values, headlines and other metrics, tasks and groups apart, and conclude.

    A group is made of its tasks' documents, and a task's metrics of the same answers: in one family
    they would count the same evidence several times.
    """
    families: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if row.result is not None:
            families[row.kind, row.headline].append(index)
    decided = list(rows)
    for members in families.values():
        results = [rows[index].result for index in members]
        adjusted = benjamini_hochberg([one.p_value for one in results if one is not None]).adjusted
        for index, result, p_value in zip(members, results, adjusted.tolist(), strict=True):
            if result is not None:
                said = verdict(
                    result,
                    p_value,
                    higher_is_better=rows[index].higher_is_better,
                    alpha=settings.alpha,
                    negligible=settings.negligible,
                )
                # What can be found is said at the level that the verdict was given at.
                level = min(settings.alpha / len(members), 1 - settings.confidence)
                decided[index] = replace(
                    rows[index], result=at_level(result, level), p_adjusted=p_value, verdict=said
                )
    return tuple(decided)
