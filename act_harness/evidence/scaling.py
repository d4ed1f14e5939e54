"""What labelled documents alone can make of scores: a scaling of them, with heads untouched.

Somebody who has labelled documents can fit two numbers a choice to them without any search of
heads; what heads are worth is what they gain on top of that. :func:`fit_scaling` is that fit, the
calibrator ``supervised`` of :mod:`act_harness.evidence.calibrators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize  # type: ignore[import-untyped]
import scipy.special  # type: ignore[import-untyped]

from act_harness.errors import ResultError
from act_harness.evidence.choices import label_prior_corrected, labels_of, score_matrix
from act_harness.evidence.resampling import Array

__all__ = ["FOLDS", "PENALTIES", "Scaling", "fit_scaling"]

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""What the supervised scaling's penalty is chosen among, the plainest fit first."""
FOLDS = 4

_TOLERANCE = 1e-9  # of the gradient, in nats; the objective is strictly convex


class Scaling(NamedTuple):
    """A fitted scaling of scores: ``offset + features . weights``; see :func:`fit_scaling`."""

    prior: Array | None
    """Mean score of each choice over the fitted documents, (choices,); None: choices differ."""
    weights: Array
    """With a prior: w of each choice, then b of each choice; without: of score, score a character
    and length, (3,)."""
    length: float
    """Mean characters of a choice of the fitted documents."""
    penalty: float
    """What cross-validation chose among :data:`PENALTIES`."""

    def apply(self, scores: Array, lengths: Array) -> Array:
        """Return scaled scores, of which the largest is the answer.

        Args:
            scores: Log-likelihood of each choice, (documents, choices), minus infinity where a
                document has fewer choices.
            lengths: Characters of each choice, of the same shape.

        Raises:
            ResultError: The choices are not those of the fit, or a score is not finite.
        """
        offset, features = _features(scores, lengths, self.prior, self.length)
        return offset + features @ self.weights


def fit_scaling(
    scores: Array,
    labels: Sequence[int] | npt.NDArray[Any],
    *,
    lengths: Array,
    same_choices: bool,
    penalties: Sequence[float] = PENALTIES,
) -> Scaling:
    r"""Fit what labels alone can make of scores, by cross-entropy with a quadratic penalty.

    With the same choices everywhere, vector scaling (Guo et al. 2017): with :math:`x` the scores
    less each choice's mean over these documents, the scaled score of choice :math:`c` is
    :math:`(1 + w_c) x_c + b_c`. A large penalty leaves :math:`x`, the label-prior corrected scores.

    Where choices differ by document a weight of "the second choice" means nothing. There the
    scaling must not depend on which choice it is: :math:`(1 + w_1) s + w_2 \bar n s / n + w_3 n /
    \bar n`, with :math:`n` the choice's characters and :math:`\bar n` their mean. Raw and
    length-normalised accuracy (``acc``, ``acc_norm``) are two points of it, a temperature changes
    no answer of its own, and the last term takes out what every further character costs.

    The penalty is that with the least cross-entropy in a cross-validation of :data:`FOLDS` folds,
    stratified by label in the order given; of equal ones the first. There is no chance in it.

    Args:
        scores: Log-likelihood of each choice, (documents, choices); minus infinity where a document
            has fewer choices.
        labels: Index of the right choice, (documents,).
        lengths: Characters of each choice, of the shape of ``scores``.
        same_choices: Whether every document has the same choices.
        penalties: What the penalty is chosen among.

    Raises:
        ResultError: Fewer documents than folds, a score is not finite, or a label is no choice.
    """
    given = score_matrix(scores, padded=not same_choices)
    right, long = labels_of(labels, given), np.asarray(lengths, dtype=np.float64)
    if len(given) < FOLDS or long.shape != given.shape:
        raise ResultError(
            f"a supervised scaling needs {FOLDS} labelled documents or more and every choice's "
            f"length; found scores {given.shape}, lengths {long.shape}"
        )
    if not bool(np.isfinite(given[np.arange(len(right)), right]).all()):
        raise ResultError("a label is no choice of its document; score the documents again")
    order = np.argsort(right, kind="stable")
    fold = np.empty(len(right), dtype=np.int64)
    fold[order] = np.arange(len(right)) % FOLDS

    def fitted(rows: npt.NDArray[np.bool_], penalty: float) -> Scaling:
        prior = given[rows].mean(axis=0) if same_choices else None
        length = float(long[rows][np.isfinite(given[rows])].mean())
        offset, features = _features(given[rows], long[rows], prior, length)
        return Scaling(prior, _minimum(offset, features, right[rows], penalty), length, penalty)

    def loss(penalty: float) -> float:
        total = 0.0
        for part in range(FOLDS):
            held = fold == part
            scaled = fitted(~held, penalty).apply(given[held], long[held])
            total += float(_cross_entropies(scaled, right[held]).sum())
        return total

    losses = [loss(penalty) for penalty in penalties] if len(penalties) > 1 else [0.0]
    best = penalties[int(np.argmin(losses))]
    return fitted(np.ones(len(right), dtype=np.bool_), best)


def _features(
    scores: Array, lengths: Array, prior: Array | None, length: float
) -> tuple[Array, Array]:
    """Return the scores at zero weights, and what the weights multiply, (..., weights)."""
    if prior is None:
        given = score_matrix(scores, padded=True)
        there = np.isfinite(given)
        finite = np.where(there, given, 0.0)
        relative = np.where(there, np.asarray(lengths, dtype=np.float64) / length, 1.0)
        return given, np.stack([finite, finite / relative, relative * there], axis=-1)
    if np.shape(scores)[-1] != len(prior):
        raise ResultError(f"a scaling of {len(prior)} choices, for {np.shape(scores)[-1]} choices")
    offset = label_prior_corrected(scores, prior=prior)
    each = np.eye(len(prior))
    return offset, np.concatenate(
        [offset[..., None] * each, np.ones_like(offset)[..., None] * each], axis=-1
    )


def _minimum(offset: Array, features: Array, right: npt.NDArray[np.int64], penalty: float) -> Array:
    """Return the weights of the least mean cross-entropy plus ``penalty`` x their squares' sum."""
    rows = np.arange(len(right))
    wanted = features[rows, right].mean(axis=0)

    def objective(weights: Array) -> tuple[float, Array]:
        scaled = offset + features @ weights
        probability = scipy.special.softmax(scaled, axis=1)
        expected = np.einsum("dc,dcw->w", probability, features) / len(right)
        value = _cross_entropies(scaled, right).mean() + penalty * weights @ weights
        return float(value), expected - wanted + 2 * penalty * weights

    def curvature(weights: Array) -> Array:
        probability = scipy.special.softmax(offset + features @ weights, axis=1)
        flat = features.reshape(-1, features.shape[-1])
        mean = np.einsum("dc,dcw->dw", probability, features)
        second = (flat * probability.reshape(-1, 1)).T @ flat - mean.T @ mean
        return np.asarray(second / len(right) + 2 * penalty * np.eye(len(weights)))

    found = scipy.optimize.minimize(
        objective, np.zeros(features.shape[-1]), jac=True, hess=curvature, method="trust-exact",
        options={"gtol": _TOLERANCE},
    )  # fmt: skip
    return np.asarray(found.x, dtype=np.float64)


def _cross_entropies(scaled: Array, right: npt.NDArray[np.int64]) -> Array:
    rows = np.arange(len(right))
    total = scipy.special.logsumexp(scaled, axis=1)
    return np.asarray(total - scaled[rows, right], dtype=np.float64)
