"""A document as one arm answered it: a line of lm-eval's samples files, and its choices' scores.

Of every sample is kept what a comparison needs (hashes, metric values, the scores of the choices),
not the texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from act_harness.errors import ResultError
from act_harness.evidence.choices import padded

__all__ = [
    "ChoiceScores",
    "Sample",
    "Value",
    "choice_scores",
    "finite_number",
    "read_sample",
    "without_choice_scores",
]


Value = float | tuple[float, float] | None


class Sample(NamedTuple):
    """One document as one arm answered it, under one of the task's filters."""

    doc_id: int
    """Index of the document in its split."""
    doc_hash: str
    prompt_hash: str
    target_hash: str
    filter: str
    """Name of the lm-eval filter that the metrics belong to."""
    values: Mapping[str, Value]
    """Metric name to value; a pair is (log-likelihood, words or bytes); None: no number."""
    fields: Mapping[str, str]
    """What documents may share: the doc's ``passage``, ``context`` or ``subject``."""
    choices: tuple[str, ...] = ()
    """Continuations of a multiple-choice document, otherwise empty."""
    scores: tuple[float, ...] = ()
    """Log-likelihood of each choice, in nats."""
    target: str = ""
    """The right answer as lm-eval writes it: an index or a text."""
    not_finite: int = 0
    """Log-likelihoods that are NaN or infinite; requests skipped on purpose do not count."""
    skipped: int = 0
    """Requests that were too long to be scored: metrics of the document measure nothing."""


class ChoiceScores(NamedTuple):
    """The choices' scores of a multiple-choice task under one filter."""

    scores: npt.NDArray[np.float64]
    """Log-likelihoods, (documents, most choices), in the order of the samples given; minus infinity
    where a document has fewer choices."""
    labels: npt.NDArray[np.int64]
    """Index of the right choice, (documents,)."""
    same_choices: bool
    """Whether every document has the same choices, so that a label prior means something."""
    choices: tuple[tuple[str, ...], ...]
    """Texts of each document's choices, as they were asked."""


def choice_scores(samples: Sequence[Sample]) -> ChoiceScores | None:
    """Collect the choices' scores of samples under one filter, or None where they have none.

    lm-eval writes the right answer as text, so an index and a choice that happens to be a digit
    look alike; the reading that agrees with the logged ``acc`` of every document is taken.

    Args:
        samples: All of one task and filter.

    Returns:
        None when a document is not multiple choice, a score is not finite, or the right answers
        cannot be told.
    """
    widths = [len(sample.scores) for sample in samples]
    if not widths or min(widths) < 2:
        return None
    if not all(math.isfinite(score) for sample in samples for score in sample.scores):
        return None
    scores = padded([sample.scores for sample in samples])
    best = scores.argmax(axis=1)
    for read in (_label_as_index, _label_as_text):
        labels = [read(sample) for sample in samples]
        if None in labels:
            continue
        right = np.asarray(labels, dtype=np.int64)
        logged = [sample.values.get("acc") for sample in samples]
        if all(
            acc is None or acc == float(hit) for acc, hit in zip(logged, best == right, strict=True)
        ):
            texts = tuple(sample.choices for sample in samples)
            return ChoiceScores(scores, right, len(set(texts)) == 1, texts)
    return None


def without_choice_scores(samples: Sequence[Sample]) -> str:
    """Say why :func:`choice_scores` has nothing for samples of a multiple-choice task.

    Returns:
        A clause, empty where the samples are of another kind of task.
    """
    asked = [sample for sample in samples if sample.scores]
    if not asked:
        return ""
    lost = sum(not all(map(math.isfinite, sample.scores)) for sample in asked)
    if lost:
        return f"{lost} documents have a choice that was not scored"
    short = len(samples) - len(asked)
    if short:
        return f"{short} documents have fewer than two choices"
    unlabelled = sum(
        _label_as_index(sample) is None and _label_as_text(sample) is None for sample in asked
    )
    if unlabelled:
        return f"{unlabelled} documents have no right answer among their choices"
    return "the right answers cannot be told from the samples"


def read_sample(row: Any, kept: Sequence[str], where: str) -> Sample:  # noqa: ANN401 - parsed JSON
    """Return a line of a samples file as a sample.

    Args:
        row: The line, parsed.
        kept: Fields of the document to keep.
        where: File and line, for an error.

    Raises:
        ResultError: It is no line of lm-eval's samples files.
    """
    if not isinstance(row, Mapping):
        raise ResultError(f"{where} is not an object; this is no samples file of lm-eval")
    missing = [name for name in ("doc_id", "doc_hash", "prompt_hash") if name not in row]
    if missing:
        raise ResultError(
            f"{where} has no {missing[0]!r}; this is no samples file of lm-eval 0.4.13 or later"
        )
    given = row.get("doc")
    doc: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    names, number = row.get("metrics", []), row["doc_id"]
    if not isinstance(names, list) or isinstance(number, bool) or not isinstance(number, int):
        raise ResultError(
            f"{where}: 'metrics' is no list, or 'doc_id' no number; this is no samples file of "
            "lm-eval"
        )
    choices, scores = _choices(row)
    return Sample(
        doc_id=number,
        doc_hash=str(row["doc_hash"]),
        prompt_hash=str(row["prompt_hash"]),
        target_hash=str(row.get("target_hash", "")),
        filter=str(row.get("filter", "none")),
        values={str(name): _value(row.get(str(name))) for name in names},
        fields={name: str(doc[name]) for name in kept if name in doc},
        choices=choices,
        scores=scores,
        target=str(row.get("target", "")),
        not_finite=_not_finite(row),
        skipped=sum(map(_is_skipped, _arguments(row))),
    )


def _value(given: Any) -> Value:  # noqa: ANN401 - whatever a task's metric returned
    if isinstance(given, (list, tuple)) and len(given) == 2:
        first, second = finite_number(given[0]), finite_number(given[1])
        return None if first is None or second is None else (first, second)
    return finite_number(given)


def finite_number(given: Any) -> float | None:  # noqa: ANN401 - whatever stands in the file
    """Return a finite number as it is, and None for whatever else."""
    if isinstance(given, (bool, int, float, np.number, np.bool_)):
        number = float(given)
        return number if math.isfinite(number) else None
    return None


def _choices(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Continuations and their log-likelihoods, or nothing where a row is not multiple choice."""
    responses, arguments = row.get("filtered_resps"), _arguments(row)
    if not isinstance(responses, list):
        return (), ()
    scores = []
    for response in responses:
        if not isinstance(response, (list, tuple)) or len(response) != 2:
            return (), ()
        if str(response[1]) not in ("True", "False"):
            return (), ()
        try:
            scores.append(float(response[0]))
        except (TypeError, ValueError):
            return (), ()
    texts = [(str(one[0]), str(one[1])) for one in arguments if len(one) >= 2]
    # Choices scored without their context as well (mutual information) are another measure.
    bare = sum(context == "" for context, _ in texts)
    if len(scores) < 2 or len(texts) != len(scores) or 0 < bare < len(texts):
        return (), ()
    return tuple(choice for _, choice in texts), tuple(scores)


def _arguments(row: Mapping[str, Any]) -> list[Sequence[Any]]:
    """Arguments of each of a sample's requests; nothing for what is no request."""
    given = row.get("arguments")
    if isinstance(given, Mapping):  # as written: {"gen_args_0": {"arg_0": ..., "arg_1": ...}}
        given = [list(one.values()) if isinstance(one, Mapping) else () for one in given.values()]
    if not isinstance(given, list):
        return []
    return [one if isinstance(one, (list, tuple)) else () for one in given]


def _not_finite(row: Mapping[str, Any]) -> int:
    """Count a sample's log-likelihoods that are no numbers."""
    responses, arguments = row.get("resps"), _arguments(row)
    if not isinstance(responses, list):
        return 0
    found = 0
    for repeats, asked in zip(responses, arguments, strict=False):
        if _is_skipped(asked):
            continue
        for value in repeats if isinstance(repeats, (list, tuple)) else ():
            pair = isinstance(value, (list, tuple)) and len(value) == 2
            if pair and str(value[1]) in ("True", "False"):
                found += _no_number(value[0])
            elif len(asked) == 1:  # a rolling request; one that generates has settings too
                found += _no_number(value)
    return found


def _is_skipped(arguments: Sequence[Any]) -> bool:
    """Say whether a request's arguments bear the mark of one that was not scored."""
    marks = [one for one in arguments if isinstance(one, Mapping)]
    return any(mark.get("overlength") == "skipped" for mark in marks)


def _no_number(value: Any) -> bool:  # noqa: ANN401 - a number, or its text in a file
    try:
        return not math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _label_as_index(sample: Sample) -> int | None:
    try:
        label = int(sample.target)
    except ValueError:
        return None
    return label if 0 <= label < len(sample.scores) else None


def _label_as_text(sample: Sample) -> int | None:
    stripped = [choice.strip() for choice in sample.choices]
    wanted = sample.target.strip()
    return stripped.index(wanted) if stripped.count(wanted) == 1 else None
