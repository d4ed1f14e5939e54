"""What the scores of a document's choices say: hits, margins, and hits without the label's prior.

A model that simply likes one label scores well where that label is frequent. Subtracting each
choice's mean score over the documents takes that preference out; what remains is what the model
knows about the document. It applies where the choices are the same for every document.

Not here: anything about two arms (:mod:`act_harness.evidence.stats`). No torch: arrays are numpy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from act_harness.errors import ResultError
from act_harness.evidence.resampling import Array

__all__ = [
    "CorrectedAccuracy",
    "answer_margin",
    "corrected_accuracy",
    "label_prior_corrected",
    "labels_of",
    "padded",
    "score_matrix",
]


class CorrectedAccuracy(NamedTuple):
    """Accuracy of the best-scored choice, before and after the label prior is taken out."""

    raw: float
    corrected: float
    raw_hits: Array
    """1.0 where the best-scored choice is right, (documents,)."""
    corrected_hits: Array
    """The same after the correction, (documents,)."""


def label_prior_corrected(scores: Array, *, prior: Array | None = None) -> Array:
    """Subtract each choice's mean score, so that a mere preference for a label earns nothing.

    Args:
        scores: Log-likelihood of each choice, (documents, choices); the choices are the same for
            every document.
        prior: What to subtract, (choices,); None: the mean over these documents.

    Raises:
        ResultError: A score is not finite, or the shape is another.
    """
    given = score_matrix(scores)
    return given - (given.mean(axis=0) if prior is None else np.asarray(prior, dtype=np.float64))


def corrected_accuracy(
    scores: Array, labels: Sequence[int] | npt.NDArray[Any]
) -> CorrectedAccuracy:
    """Accuracy before and after :func:`label_prior_corrected`; of equal scores the first wins.

    Args:
        scores: Log-likelihood of each choice, (documents, choices).
        labels: Index of the right choice, (documents,).

    Raises:
        ResultError: A score is not finite, or a label is not an index of a choice.
    """
    given = score_matrix(scores)
    right = labels_of(labels, given)
    raw = (given.argmax(axis=1) == right).astype(np.float64)
    corrected = (label_prior_corrected(given).argmax(axis=1) == right).astype(np.float64)
    return CorrectedAccuracy(float(raw.mean()), float(corrected.mean()), raw, corrected)


def answer_margin(scores: Array, labels: Sequence[int] | npt.NDArray[Any]) -> Array:
    """Return the right choice's score minus the best wrong one's, in nats, (documents,).

    Args:
        scores: Log-likelihood of each choice, (documents, choices); minus infinity where a document
            has fewer choices than others.
        labels: Index of the right choice, (documents,).

    Raises:
        ResultError: As for :func:`corrected_accuracy`, or a document has only one choice.
    """
    given = score_matrix(scores, padded=True)
    right = labels_of(labels, given)
    rows = np.arange(len(given))
    wrong = given.copy()
    wrong[rows, right] = -np.inf
    alone = np.flatnonzero(np.isinf(wrong.max(axis=1)) | np.isinf(given[rows, right]))
    if len(alone):
        raise ResultError(f"document {alone[0]}: a margin needs the right choice and another one")
    return np.asarray(given[rows, right] - wrong.max(axis=1), dtype=np.float64)


def padded(rows: Sequence[Sequence[float]]) -> Array:
    """Return rows of numbers as a matrix, minus infinity behind those that are shorter."""
    found = np.full((len(rows), max(map(len, rows))), -np.inf)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def score_matrix(scores: Array, *, padded: bool = False) -> Array:
    """Return scores as float64, (documents, choices), each finite.

    Args:
        scores: What was given as such.
        padded: Whether a document may have fewer choices, minus infinity in the others' place.

    Raises:
        ResultError: The shape is another, or a score is not finite.
    """
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim != 2 or 0 in given.shape:
        raise ResultError(f"scores must be (documents, choices); found shape {given.shape}")
    usable = np.isfinite(given) | (padded & (given == -np.inf))
    bad = np.argwhere(~usable)
    if len(bad):
        raise ResultError(f"the score of document {bad[0][0]}, choice {bad[0][1]} is not finite")
    return given


def labels_of(labels: Sequence[int] | npt.NDArray[Any], scores: Array) -> npt.NDArray[np.int64]:
    """Return indices of right choices, (documents,), each one of a choice of ``scores``.

    Raises:
        ResultError: A label is no index of a choice, or their number is another.
    """
    given = np.asarray(labels)
    fits = given.shape == (len(scores),) and np.issubdtype(given.dtype, np.integer)
    if not fits or given.min() < 0 or given.max() >= scores.shape[1]:
        raise ResultError(
            f"labels must be {len(scores)} indices from 0 to {scores.shape[1] - 1}, one a document"
        )
    return given.astype(np.int64)
