"""Layer 1: is everything exactly as it was, document by document?

Two parts. :func:`identity_findings` says whether the same thing was asked of the same model with
the same head sets; it serves both layers. :func:`golden_findings` holds the answers against the
stored ones: no other prediction or metric, no log-likelihood off by more than the tolerance, the
same sinks. A head set that changed does not end the comparison: the scores say what it did.

float32 sums differ between processors, thread counts and batch sizes, by 1e-5 nats or so; hence a
tolerance, and hence the exception for documents near the sink threshold (invariant I3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from act_harness.errors import ResultError
from act_harness.regress.baseline import (
    ArmInfo,
    Baseline,
    StoredAnswer,
    StoredDocument,
    StoredMeasurement,
)
from act_harness.regress.baseline import TaskRecord as Task

__all__ = ["Drift", "Finding", "check_comparable", "drifts", "golden_findings", "identity_findings"]

Kind = Literal[
    "artifact changed", "model changed", "task changed", "document changed", "prompt changed",
    "request changed", "target changed", "prediction flipped", "metric changed", "drift",
    "counter changed", "score regressed",
]  # fmt: skip

MOVED_TOLERANCE = 1e-4
"""Largest relative change of the attention moved: some hundred times what rounding does to it."""

METRIC_TOLERANCE = 1e-6
"""Largest change of a metric that is no count, per document, beyond the drift it may rest on."""

_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One reason why a run does not pass, with the task it is about."""

    kind: Kind
    task: str
    arm: str | None
    """None where all arms are concerned."""
    text: str

    def line(self) -> str:
        """Return the finding in one line."""
        where = self.task if self.arm is None else f"{self.task}, arm {self.arm}"
        return f"{where}: {self.kind}: {self.text}"


class Drift(NamedTuple):
    """How far one arm of one task is from the baseline."""

    task: str
    arm: str
    documents: int
    drift: float
    """Largest change of a log-likelihood in nats, documents near the threshold left out."""
    flips: int
    """Documents with another prediction or another value of a 0/1 metric; likewise."""
    near: int
    """Documents near the threshold."""


class _Change(NamedTuple):
    document: StoredDocument
    text: str


def check_comparable(
    baseline: Baseline, identity: Mapping[str, Any], found: StoredMeasurement
) -> None:
    """Check that the run is one of the same suite on the same kind of model.

    Raises:
        ResultError: The suite was changed since, or the model has another shape.
    """
    for key, value in identity.items():
        if baseline.identity.get(key) != value:
            raise ResultError(
                f"suite {baseline.suite!r} was changed since its baseline was made ({key}: "
                f"{baseline.identity.get(key)!r} then, {value!r} now); undo that or make a new "
                "baseline with --update"
            )
    for key in ("architecture", "num_hidden_layers", "num_attention_heads"):
        then, now = getattr(baseline.measurement.model, key), getattr(found.model, key)
        if then != now:
            raise ResultError(
                f"the baseline of {baseline.suite!r} was made with {key} {then}, this model has "
                f"{now}; give the model {baseline.measurement.model.id}"
            )


def identity_findings(
    old: StoredMeasurement, new: StoredMeasurement, *, limit: int | None = None
) -> list[Finding]:
    """Return what was asked otherwise: model, head sets, task versions, documents, prompts.

    Args:
        old: The baseline's.
        new: This run's; tasks that it lacks were not asked for.
        limit: Documents of each task that were asked for; None: all of the baseline's.
    """
    tasks = ", ".join(new.tasks)
    findings = []
    keys = ["weights_sha256", "chat_template_sha256", "dtype", "adds_bos"]
    # Another file that gives the same ids is no change: releases of transformers read it otherwise.
    known = old.model.knows_tokens(new.model)
    keys += ["tokenizer_probe_sha256", "chat_probe_sha256"] if known else ["tokenizer_sha256"]
    for key in keys:
        then, now = getattr(old.model, key), getattr(new.model, key)
        if then != now:
            text = f"{key} {_short(then)} in the baseline, {_short(now)} now"
            findings.append(Finding("model changed", tasks, None, text))
    for arm, info in new.arms.items():
        if info.sha256 != old.arms[arm].sha256:
            text = _artifact_changes(old.arms[arm], info)
            findings.append(Finding("artifact changed", tasks, arm, text))
    for name, task in new.tasks.items():
        findings += _task_identity(name, old.tasks.get(name), task, limit)
    return findings


def golden_findings(
    old: StoredMeasurement, new: StoredMeasurement, *, drift: float
) -> list[Finding]:
    """Return where an answer is not the stored one.

    Args:
        old: The baseline's.
        new: This run's; it may have fewer tasks and documents.
        drift: Tolerance of a log-likelihood, in nats.
    """
    checks: dict[Kind, Callable[[StoredAnswer, StoredAnswer], str]] = {
        "prediction flipped": _flip,
        "metric changed": lambda a, b: _metric_change(a, b, drift),
        "drift": lambda a, b: _drift_text(a, b, drift),
        "counter changed": _counter_change,
    }
    findings = []
    for name, arm, pairs in _pairs(old, new):
        judged = [pair for pair in pairs if not _near(pair, arm)]
        for kind, check in checks.items():
            changes = []
            for then, now in judged:
                text = check(then.arms[arm], now.arms[arm])
                if text:
                    changes.append(_Change(now, text))
            if changes:
                findings.append(Finding(kind, name, arm, _listed(changes, len(pairs))))
    return findings


def drifts(old: StoredMeasurement, new: StoredMeasurement) -> list[Drift]:
    """Return how far each arm of each task is from the baseline."""
    rows = []
    for name, arm, pairs in _pairs(old, new):
        judged = [pair for pair in pairs if not _near(pair, arm)]
        answers = [(then.arms[arm], now.arms[arm]) for then, now in judged]
        rows.append(
            Drift(
                task=name,
                arm=arm,
                documents=len(pairs),
                drift=max((_drift(a, b) for a, b in answers), default=0.0),
                flips=sum(bool(_flip(a, b)) or _changed_hits(a, b) for a, b in answers),
                near=len(pairs) - len(judged),
            )
        )
    return rows


# -- identity --------------------------------------------------------------------------------------


def _task_identity(name: str, old: Task | None, new: Task, limit: int | None) -> list[Finding]:
    if old is None:
        return [Finding("task changed", name, None, "not in the baseline")]
    findings = []
    for key in ("version", "num_fewshot"):
        then, now = getattr(old, key), getattr(new, key)
        if then != now:
            text = f"{key} {then} in the baseline, {now} now"
            findings.append(Finding("task changed", name, None, text))
    stored = {document.key: document for document in old.documents}
    expected, there = ({one.id for one in task.documents} for task in (old, new))
    wanted = len(expected) if limit is None else min(limit, len(expected))
    if len(there) < wanted:
        text = f"{len(there)} documents are left, the baseline has {wanted}"
        findings.append(Finding("document changed", name, None, text))
    missing = [document for document in new.documents if document.key not in stored]
    if missing:
        texts = [_Change(document, "is not in the baseline") for document in missing]
        text = _listed(texts, len(new.documents))
        findings.append(Finding("document changed", name, None, text))
    kinds: dict[str, Kind] = {
        "doc": "document changed",
        "prompt": "prompt changed",
        "requests": "request changed",
        "target": "target changed",
    }
    pairs = [(stored[one.key], one) for one in new.documents if one.key in stored]
    for field, kind in kinds.items():
        changes = [
            _Change(now, f"hash {getattr(then, field)} then, {getattr(now, field)} now")
            for then, now in pairs
            if getattr(then, field) != getattr(now, field)
            # A changed prompt changes the requests too; said once.
            and not (field == "requests" and then.prompt != now.prompt)
        ]
        if changes:
            findings.append(Finding(kind, name, None, _listed(changes, len(pairs))))
    return findings


def _artifact_changes(old: ArmInfo, new: ArmInfo) -> str:
    changes = []
    before, after = old.calibration or {}, new.calibration or {}
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            changes.append(f"{key} {_plain(before.get(key))} then, {_plain(after.get(key))} now")
    then, now = _heads(old), _heads(new)
    for word, heads in (("without", then - now), ("with", now - then)):
        if heads:
            listed = ", ".join(f"{layer}.{head}" for layer, head in sorted(heads)[:6])
            more = f" and {len(heads) - 6} more" if len(heads) > 6 else ""
            changes.append(f"{word} {len(heads)} heads (layer.head {listed}{more})")
    if old.strengths != new.strengths:
        changes.append("strengths of single heads differ")
    return "; ".join(changes) or f"sha256 {_short(old.sha256)} then, {_short(new.sha256)} now"


def _heads(info: ArmInfo) -> set[tuple[int, int]]:
    return {(int(layer), head) for layer, heads in (info.heads or {}).items() for head in heads}


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


# -- answers ---------------------------------------------------------------------------------------


def _pairs(
    old: StoredMeasurement, new: StoredMeasurement
) -> Iterable[tuple[str, str, list[tuple[StoredDocument, StoredDocument]]]]:
    """Task, arm, and (stored, new) documents that both have."""
    for name, task in new.tasks.items():
        stored = old.tasks.get(name)
        known = {document.key: document for document in stored.documents} if stored else {}
        pairs = [(known[one.key], one) for one in task.documents if one.key in known]
        for arm in new.arms:
            both = [(a, b) for a, b in pairs if arm in a.arms and arm in b.arms]
            if both:
                yield name, arm, both


def _near(pair: tuple[StoredDocument, StoredDocument], arm: str) -> bool:
    return any(document.arms[arm].near for document in pair)


def _flip(then: StoredAnswer, now: StoredAnswer) -> str:
    if then.prediction == now.prediction:
        return ""
    return f"answer {then.prediction} then, {now.prediction} now"


def _drift(then: StoredAnswer, now: StoredAnswer) -> float:
    if len(then.scores) != len(now.scores):
        return math.inf
    return max(map(_apart, then.scores, now.scores), default=0.0)


def _apart(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b)


def _drift_text(then: StoredAnswer, now: StoredAnswer, tolerance: float) -> str:
    largest = _drift(then, now)
    if largest <= tolerance:
        return ""
    if len(then.scores) != len(now.scores):
        return f"{len(then.scores)} scores then, {len(now.scores)} now"
    gaps = list(map(_apart, then.scores, now.scores))
    at = gaps.index(largest)
    a, b = then.scores[at], now.scores[at]
    if a is None or b is None:
        return f"log-likelihood {at} was {_number(a)}, is {_number(b)}"
    return f"log-likelihood {at} was {a:.6f}, is {b:.6f} ({b - a:+.2e})"


def _number(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.6f}"


def _changed_hits(then: StoredAnswer, now: StoredAnswer) -> bool:
    return any(
        value in (0.0, 1.0) and value != now.metrics.get(name)
        for name, value in then.metrics.items()
        if isinstance(value, float)
    )


def _metric_change(then: StoredAnswer, now: StoredAnswer, drift: float) -> str:
    for name, a in then.metrics.items():
        b = now.metrics.get(name)
        first = a if isinstance(a, tuple) else (a,)
        second = b if isinstance(b, tuple) else (b,)
        if len(first) != len(second):
            return f"{name} was {a}, is {b}"
        # A log-likelihood may be a metric itself; a hit or a count may not move at all.
        allowed = drift if then.scores and a not in (0.0, 1.0) else METRIC_TOLERANCE
        if max(map(_apart, first, second)) > allowed:
            return f"{name} was {a}, is {b}"
    return ""


def _counter_change(then: StoredAnswer, now: StoredAnswer) -> str:
    if then.sinks != now.sinks:
        return f"{then.sinks} sinks then, {now.sinks} now"
    if then.moved is None or now.moved is None:
        return "" if then.moved is now.moved else f"moved {then.moved} then, {now.moved} now"
    if math.isclose(then.moved, now.moved, rel_tol=MOVED_TOLERANCE, abs_tol=1e-6):
        return ""
    return f"attention moved {then.moved:.6g} then, {now.moved:.6g} now"


def _listed(changes: Sequence[_Change], total: int) -> str:
    shown = "; ".join(f"document {one.document.id}: {one.text}" for one in changes[:_SHOWN])
    more = "; ..." if len(changes) > _SHOWN else ""
    return f"{len(changes)} of {total} documents ({shown}{more})"
