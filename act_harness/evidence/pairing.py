"""Pairing two runs' samples document by document, and what can be measured on the pairs.

Samples are joined by document, prompt and target hash. A document without a partner is an error
that names the first difference, because scores of different documents cannot be paired. A metric is
measured only when its reported score follows from its samples (their mean, a perplexity of it, or a
metric of the whole corpus, :mod:`act_harness.evidence.corpus`), which is checked against the
reported number, so that no aggregation is guessed.

Not here: the tests and the verdicts (:mod:`act_harness.evidence.compare`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special  # type: ignore[import-untyped]

from act_harness.errors import ResultError
from act_harness.evidence.calibrators import (
    CALIBRATORS,
    CalibratorInputs,
    calibrated_hits,
    calibrator_inputs,
    same_labelled,
)
from act_harness.evidence.corpus import CorpusPart, corpus_part
from act_harness.evidence.results import Run
from act_harness.evidence.samples import Sample, choice_scores, without_choice_scores
from act_harness.evidence.stats import Part, answer_margin

__all__ = ["Key", "Measured", "Pair", "join", "measure"]

Pair = tuple[Sample, Sample]
Key = tuple[str, str]
"""Metric and filter."""
Clusters = Mapping[str, str | None]

_CLUSTER_FIELDS = ("passage", "context", "subject")


class Measured(NamedTuple):
    """A metric's values in both arms, ready to be tested."""

    part: Part | None
    """None where the values do not determine the score; ``note`` says why."""
    derived: bool = False
    """Computed here from the choices' scores, not reported by the evaluation."""
    clustered_by: str | None = None
    """The field whose equal values make a cluster."""
    subjects: tuple[str, ...] | None = None
    """Each document's ``subject`` where all have one (MMLU), for groups of such tasks."""
    note: str = ""
    corpus: CorpusPart | None = None
    """Instead of ``part``, where the score is one of the whole corpus."""
    not_finite: int = 0
    """Answers of both runs that are NaN or infinite: their metrics are no result."""


def join(task: str, a: Sequence[Sample], b: Sequence[Sample]) -> dict[str, list[Pair]]:
    """Pair the samples of two runs by document, prompt and target hash, filter by filter.

    Documents that occur more than once are paired in their order.

    Returns:
        Filter name to pairs, in A's order.

    Raises:
        ResultError: A sample has no partner; the text names the first one and what differs.
    """
    partners: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for sample in b:
        partners[_key(sample)].append(sample)
    left = {key: iter(found) for key, found in partners.items()}
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for sample in a:
        partner = next(left.get(_key(sample), iter(())), None)
        if partner is None:
            raise ResultError(_difference(task, sample, "A", a, b))
        pairs[sample.filter].append((sample, partner))
    spare = Counter(map(_key, b))
    spare.subtract(map(_key, a))
    for sample in b:
        if spare[_key(sample)] > 0:
            raise ResultError(_difference(task, sample, "B", b, a))
    return dict(pairs)


def measure(a: Run, b: Run, task: str, *, clusters: Clusters) -> dict[Key, Measured]:
    """Pair a task's samples and collect every metric: the reported ones, then the derived ones.

    Args:
        a: The reference run.
        b: The other run.
        task: A task that both have samples of.
        clusters: Task to the field to cluster by, or None for no clusters; a task that is absent
            is clustered by the passage, context or subject that its documents share.

    Raises:
        ResultError: See :func:`join`; or a field to cluster by is not in the documents.
    """
    fields = [name for name in (clusters.get(task),) if name]
    samples_a, samples_b = a.samples(task, fields=fields), b.samples(task, fields=fields)
    inputs = calibrator_inputs(a, task), calibrator_inputs(b, task)
    found: dict[Key, Measured] = {}
    for kind, pairs in join(task, samples_a, samples_b).items():
        names = list(dict.fromkeys(name for first, _ in pairs for name in first.values))
        places = _scored(pairs)
        scored = [pairs[i] for i in places]
        left = len(pairs) - len(scored)
        skipped = f"{left} documents with an answer too long to be scored left out" if left else ""
        for metric in names:
            values_a = [first.values.get(metric) for first, _ in pairs]
            values_b = [second.values.get(metric) for _, second in pairs]
            reported = a.score(task, metric, kind), b.score(task, metric, kind)
            both = values_a, values_b
            made = Measured(None, note="its score is not the mean over documents; not tested")
            if _agree(metric, both, reported):
                own = [values_a[i] for i in places], [values_b[i] for i in places]
                made = _measured(metric, own, scored, task, clusters)
            if made.part is None:
                made = _of_corpus(metric, both, pairs, places, reported, task, clusters) or made
            if skipped and not (made.part is None and made.corpus is None):
                made = made._replace(note="; ".join(filter(None, (made.note, skipped))))
            found[metric, kind] = made
        for metric, values in _derived(scored, inputs).items():
            if metric not in names:
                made = (
                    Measured(None, note=values)
                    if isinstance(values, str)
                    else _measured(metric, values, scored, task, clusters)
                )
                found[metric, kind] = made._replace(derived=True)
        broken = [sum(pair[arm].not_finite for pair in pairs) for arm in (0, 1)]
        if any(broken):
            note = f"not tested: {broken[0]} answers of A and {broken[1]} of B are not finite"
            refused = Measured(None, note=note, not_finite=sum(broken))
            found |= dict.fromkeys(((name, kind) for name in names), refused)
    return found


# -- joining ---------------------------------------------------------------------------------------


def _key(sample: Sample) -> tuple[str, ...]:
    return sample.filter, sample.doc_hash, sample.prompt_hash, sample.target_hash


def _difference(
    task: str, sample: Sample, name: str, own: Sequence[Sample], others: Sequence[Sample]
) -> str:
    """One line on why a sample of run ``name`` has no partner among the other run's samples."""
    other = "B" if name == "A" else "A"
    start = f"task {task}: document {sample.doc_id} of {name}"
    if not any(one.filter == sample.filter for one in others):
        return f"{start} has filter {sample.filter!r}, {other} has none; use one task version"
    same = [one for one in others if one.doc_hash == sample.doc_hash]
    if not same:
        return (
            f"{start} is not in {other} (doc_hash {sample.doc_hash[:12]}; {len(own)} samples in "
            f"{name}, {len(others)} in {other}); run both on the same data with the same --limit"
        )
    prompts = [one for one in same if one.prompt_hash == sample.prompt_hash]
    if not prompts:
        return (
            f"{start} has another prompt in {other} (prompt_hash {sample.prompt_hash[:12]} and "
            f"{same[0].prompt_hash[:12]}); run both with the same task version, few-shot examples, "
            "system instruction and chat template"
        )
    if not any(one.target_hash == sample.target_hash for one in prompts):
        return (
            f"{start} has another right answer in {other} (target_hash {sample.target_hash[:12]} "
            f"and {prompts[0].target_hash[:12]}); run both with the same task version"
        )
    return f"{start} occurs more often there than in {other}; run both on the same data"


# -- measuring -------------------------------------------------------------------------------------


def _agree(
    metric: str,
    values: tuple[Sequence[Any], Sequence[Any]],
    reported: tuple[float | None, float | None],
) -> bool:
    return all(_agrees(metric, one, score) for one, score in zip(values, reported, strict=True))


def _of_corpus(
    metric: str,
    values: tuple[Sequence[Any], Sequence[Any]],
    pairs: Sequence[Pair],
    places: Sequence[int],
    reported: tuple[float | None, float | None],
    task: str,
    clusters: Clusters,
) -> Measured | None:
    """Measure a score that is no mean of what the samples name; None where it does not follow.

    It is to follow from all pairs, and is measured on those at ``places``.
    """
    if "brier" in metric:  # lm-eval logs the probabilities as a text; they follow from the scores
        scored = [pairs[i] for i in places]
        brier = _brier_scores(scored)
        whole = len(scored) == len(pairs)  # else lm-eval's own is no number
        if brier is None or (whole and not _agree(metric, brier, reported)):
            return None
        return _measured(metric, brier, scored, task, clusters)
    if not all(isinstance(value, tuple) for one in values for value in one):
        return None
    field, ids = _clusters(task, [pair[0] for pair in pairs], clusters)
    corpus = corpus_part(metric, values[0], values[1], reported=reported, clusters=ids)
    if corpus is None:
        return None
    if not places:
        return Measured(None, note=_NOTHING_SCORED)
    kept = corpus._replace(
        right=[corpus.right[i] for i in places],
        a=[corpus.a[i] for i in places],
        b=[corpus.b[i] for i in places],
        clusters=None if ids is None else [ids[i] for i in places],
    )
    return Measured(None, clustered_by=field, corpus=kept)


_NOTHING_SCORED = "none of its documents was scored whole; not tested"


def _scored(pairs: Sequence[Pair]) -> list[int]:
    """Return the places of the pairs in which every request was scored.

    lm-eval has no way to leave a document out: one that was skipped because it was too long counts
    as answered by its first choice.
    """
    return [i for i, (a, b) in enumerate(pairs) if not a.skipped and not b.skipped]


def _brier_scores(pairs: Sequence[Pair]) -> tuple[list[float], list[float]] | None:
    """Squared distance of the choices' probabilities from the right answer, per document."""
    found = []
    for arm in (0, 1):
        choices = choice_scores([pair[arm] for pair in pairs])
        if choices is None:
            return None
        probabilities = scipy.special.softmax(choices.scores, axis=1)
        right = np.eye(probabilities.shape[1])[choices.labels]
        found.append(((probabilities - right) ** 2).sum(axis=1).tolist())
    return found[0], found[1]


def _agrees(metric: str, values: Sequence[Any], score: float | None) -> bool:
    """Whether one arm's values give its reported score (True when none was reported)."""
    own = [value for value in values if value is not None]
    if not own or score is None:
        return True
    part = _part(metric, own, own)
    if part is None:
        return False
    mean = np.average(np.asarray(part.a, dtype=np.float64), weights=part.weights)
    found = mean if part.transform is None else part.transform(np.asarray(mean))
    return math.isclose(float(found), score, rel_tol=1e-6, abs_tol=1e-9)


def _part(metric: str, a: Sequence[Any], b: Sequence[Any]) -> Part | None:
    """Both arms' values as a part whose score is lm-eval's; None where they are of two kinds.

    The aggregations are those of lm-eval's ``api/metrics.py``: the mean, the perplexity of a mean
    log-likelihood and, of (log-likelihood, words or bytes), the weighted perplexity and the bits.
    """
    paired = {isinstance(value, tuple) for value in (*a, *b)}
    if paired == {False}:
        if "perplexity" in metric:
            return Part(-np.asarray(a), -np.asarray(b), transform=np.exp)
        return Part(np.asarray(a), np.asarray(b))
    if paired != {True} or not any(word in metric for word in ("perplexity", "bits", "byte")):
        return None
    weights = np.asarray([value[1] for value in a])
    if weights.min() <= 0 or weights.tolist() != [value[1] for value in b]:
        return None
    loss_a, loss_b = (-np.asarray([value[0] for value in given]) / weights for given in (a, b))
    if "bits" in metric:
        return Part(loss_a / math.log(2), loss_b / math.log(2), weights)
    return Part(loss_a, loss_b, weights, transform=np.exp)


def _measured(
    metric: str,
    values: tuple[Sequence[Any], Sequence[Any]],
    pairs: Sequence[Pair],
    task: str,
    clusters: Clusters,
) -> Measured:
    a, b = values
    kept = [i for i in range(len(pairs)) if a[i] is not None and b[i] is not None]
    if not kept:
        why = "no numbers in its samples; not tested" if pairs else _NOTHING_SCORED
        return Measured(None, note=why)
    part = _part(metric, [a[i] for i in kept], [b[i] for i in kept])
    if part is None:
        return Measured(None, note="its samples hold values of different kinds; not tested")
    samples = [pairs[i][0] for i in kept]
    field, ids = _clusters(task, samples, clusters)
    subjects = tuple(sample.fields.get("subject", "") for sample in samples)
    lost = len(pairs) - len(kept)
    return Measured(
        part=part._replace(clusters=ids),
        clustered_by=field,
        subjects=subjects if all(subjects) and task not in clusters else None,
        note=f"{lost} documents without a number in one of the runs left out" if lost else "",
    )


def _derived(
    pairs: Sequence[Pair], inputs: tuple[CalibratorInputs, CalibratorInputs]
) -> dict[str, tuple[list[float], list[float]] | str]:
    """What the choices' scores of a multiple-choice task say beside its reported metrics.

    Returns:
        Metric to both arms' values, or to why it cannot be tested.
    """
    a, b = (choice_scores([pair[arm] for pair in pairs]) for arm in (0, 1))
    if a is None or b is None:
        why = next(filter(None, map(without_choice_scores, zip(*pairs, strict=True))), "")
        return (
            {"margin": f"{why}; neither margin nor corrected accuracy is computed"} if why else {}
        )
    found: dict[str, tuple[list[float], list[float]] | str] = {}
    for one in CALIBRATORS.values():
        if one.needs == "labelled" and not same_labelled(*inputs):
            found[one.metric] = "fitted on other labelled documents in A than in B; not tested"
            continue
        hits_a, hits_b = (
            calibrated_hits(one, choices, own) for choices, own in zip((a, b), inputs, strict=True)
        )
        if hits_a is not None and hits_b is not None:
            found[one.metric] = hits_a.tolist(), hits_b.tolist()
    margin_a, margin_b = answer_margin(a.scores, a.labels), answer_margin(b.scores, b.labels)
    found["margin"] = margin_a.tolist(), margin_b.tolist()
    return found


def _clusters(
    task: str, samples: Sequence[Sample], wanted: Clusters
) -> tuple[str | None, list[str] | None]:
    """The field that documents share and each one's value; nothing where each has its own."""
    fields: Sequence[str | None] = [wanted[task]] if task in wanted else _CLUSTER_FIELDS
    for field in fields:
        if field is None:
            break
        missing = next((sample for sample in samples if field not in sample.fields), None)
        if missing is None:
            ids = [sample.fields[field] for sample in samples]
            if 1 < len(set(ids)) < len(ids):
                return field, ids
        elif task in wanted:
            raise ResultError(
                f"task {task}: document {missing.doc_id} has no field {field!r} to cluster by; "
                "name a field of its documents"
            )
    return None, None
