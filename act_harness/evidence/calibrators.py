r"""Calibrations of the choices' scores: what is had from a model's outputs alone.

They are what calibrated attention is held against, and what it may be worth on top of. Each takes
the log-likelihoods :math:`s[c]` of a document's choices and returns scores of the same shape:

- ``batch``: less each choice's mean over the evaluated documents (Zhou et al. 2024, "Batch
  Calibration"), here the mean of log-likelihoods, theirs of probabilities; the one definition is
  :func:`act_harness.evidence.choices.label_prior_corrected`, its column ``acc_corrected``.
- ``content-free``: less the log of the choices' mean probability behind inputs without content
  (Zhao et al. 2021, "Calibrate Before Use").
- ``domain-pmi``: less the choice's log-likelihood behind the end of the prompt alone (Holtzman et
  al. 2021, "Surface Form Competition").
- ``pride``: less the log of the option letters' prior, from a few documents asked with their
  options rotated (Zheng et al. 2024, "Large Language Models Are Not Robust Multiple Choice
  Selectors").
- ``supervised``: a scaling fitted on the labelled documents of the head search
  (:func:`act_harness.evidence.scaling.fit_scaling`): what the labels are worth without any heads.

Everything they need beside the scores is :class:`CalibratorInputs`, measured in each arm anew by
``act-harness eval --calibrators`` and stored beside its samples. Each has a column of accuracies.

Not here: asking a model (:mod:`act_harness.harness.calibrator_inputs`), comparing two arms
(:mod:`act_harness.evidence.compare`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import scipy.special  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from act_harness.errors import InputError, ResultError, one_line, suggestion
from act_harness.evidence.choices import label_prior_corrected, padded, score_matrix
from act_harness.evidence.resampling import Array
from act_harness.evidence.results import Run
from act_harness.evidence.samples import ChoiceScores
from act_harness.evidence.scaling import fit_scaling
from act_harness.support import reading

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "CalibratorInputs",
    "LabelledScores",
    "calibrated_hits",
    "calibrator_inputs",
    "calibrator_names",
    "content_free",
    "domain_pmi",
    "lengths_of",
    "option_prior",
    "pride",
    "same_labelled",
]

Row = tuple[Annotated[float, Field(allow_inf_nan=False)], ...]


class LabelledScores(BaseModel):
    """The labelled documents that a head search saw, as one arm scores them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: tuple[Row, ...]
    """Log-likelihood of each choice of each document, in nats."""
    labels: tuple[int, ...]
    """Index of each document's right choice."""
    lengths: tuple[tuple[int, ...], ...]
    """Characters of each choice (:func:`lengths_of`)."""
    same_choices: bool


class CalibratorInputs(BaseModel):
    """What one arm was asked for one task beyond its documents; None: it was not asked for that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content_free: tuple[Row, ...] | None = None
    """Log-likelihoods of the choices behind each input without content, (inputs, choices)."""
    premise: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    """Choice, as it is asked, to its log-likelihood behind the end of the prompt alone."""
    rotated: tuple[tuple[Row, ...], ...] | None = None
    """Log-likelihoods of the option letters, (documents, rotations of the options, letters)."""
    labelled: LabelledScores | None = None


# -- without labels --------------------------------------------------------------------------------


def content_free(scores: Array, prior_scores: Array) -> Array:
    """Subtract the log of the choices' mean probability behind inputs without content.

    Args:
        scores: Log-likelihood of each choice, (documents, choices); the same choices everywhere.
        prior_scores: The same behind each input without content, (inputs, choices).

    Raises:
        ResultError: A score is not finite, or the shapes do not fit.
    """
    return score_matrix(scores) - _log_prior(prior_scores, np.shape(scores)[-1])


def domain_pmi(scores: Array, premise_scores: Array) -> Array:
    """Subtract each choice's log-likelihood behind the end of the prompt alone.

    What remains is the pointwise mutual information of document and choice within the domain that
    the premise names; it may be ranked where choices differ by document.

    Args:
        scores: Log-likelihood of each choice, (documents, choices); minus infinity where a document
            has fewer choices than others.
        premise_scores: The same behind the premise, (documents, choices).

    Raises:
        ResultError: A score is not finite, or the shapes do not fit.
    """
    given, premise = score_matrix(scores, padded=True), score_matrix(premise_scores, padded=True)
    if given.shape != premise.shape or bool(np.any(np.isinf(premise) & np.isfinite(given))):
        raise ResultError("every choice needs its score behind the premise; score both again")
    return np.where(np.isinf(given), -np.inf, given - np.where(np.isinf(premise), 0.0, premise))


def option_prior(rotated: Array) -> Array:
    """Return the log-probabilities of option letters before any option is read, (letters,).

    Rotated through all places, every option stands once behind every letter, so that a letter's
    mean log-probability over the rotations holds the letter's prior and the same for all else. The
    priors of several documents are averaged as probabilities.

    Args:
        rotated: Log-likelihood of each letter, (documents, rotations, letters).

    Raises:
        ResultError: A score is not finite, or there are not as many rotations as letters.
    """
    given = np.asarray(rotated, dtype=np.float64)
    if given.ndim != 3 or given.shape[1] != given.shape[2] or 0 in given.shape:
        raise ResultError(
            f"rotated scores must be (documents, letters, letters); found shape {given.shape}"
        )
    flat = score_matrix(given.reshape(-1, given.shape[2]))
    means = scipy.special.log_softmax(flat, axis=1).reshape(given.shape).mean(axis=1)
    return _log_prior(means, given.shape[2])


def pride(scores: Array, prior: Array) -> Array:
    """Subtract the option letters' prior.

    Args:
        scores: Log-likelihood of each letter, (documents, letters).
        prior: As :func:`option_prior` returns it, (letters,).

    Raises:
        ResultError: A score is not finite, or the prior is of other letters.
    """
    given, less = score_matrix(scores), np.asarray(prior, dtype=np.float64)
    if less.shape != given.shape[1:]:
        raise ResultError(f"a prior of {less.size} letters, for {given.shape[1]} choices")
    return given - less


def _log_prior(scores: Array, choices: int) -> Array:
    given = score_matrix(scores)
    if given.shape[1] != choices:
        raise ResultError(f"a prior of {given.shape[1]} choices, for {choices} choices")
    return np.asarray(np.log(scipy.special.softmax(given, axis=1).mean(axis=0)), dtype=np.float64)


def lengths_of(choices: Iterable[str]) -> tuple[int, ...]:
    """Characters of each choice without the spaces around it; at least one."""
    return tuple(max(1, len(choice.strip())) for choice in choices)


# -- by name ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibrator:
    """One calibration of scores as ``eval`` and ``compare`` know it."""

    name: str
    metric: str
    """Its column: accuracy of the best calibrated score."""
    needs: Literal["content_free", "premise", "rotated", "labelled"] | None
    """Field of :class:`CalibratorInputs`; None: the samples' scores are enough."""
    any_choices: bool
    """Whether it applies where choices differ by document."""
    says: str
    """What its column is, in a clause for the legend of a table."""
    calibrate: Callable[[ChoiceScores, CalibratorInputs], Array]
    """Scores of one arm and its inputs to calibrated scores, (documents, choices)."""


def _premise(choices: ChoiceScores, inputs: CalibratorInputs) -> Array:
    known = inputs.premise or {}
    lacking = next((c for row in choices.choices for c in row if c not in known), None)
    if lacking is not None:
        raise ResultError(
            f"the choice {lacking!r} has no score behind the premise; evaluate both arms again"
        )
    rows = [tuple(known[choice] for choice in row) for row in choices.choices]
    return domain_pmi(choices.scores, padded(rows))


def _supervised(choices: ChoiceScores, inputs: CalibratorInputs) -> Array:
    found = inputs.labelled
    if found is None or found.same_choices != choices.same_choices:
        raise ResultError(
            "the labelled documents have other choices than the evaluated ones; search again on "
            "this version of the task"
        )
    scaling = fit_scaling(
        padded(found.scores),
        found.labels,
        lengths=padded(found.lengths),
        same_choices=found.same_choices,
    )
    return scaling.apply(choices.scores, padded([lengths_of(row) for row in choices.choices]))


CALIBRATORS: Mapping[str, Calibrator] = {
    one.name: one
    for one in (
        Calibrator(
            "batch", "acc_corrected", None, False,
            "each choice's mean score over the documents subtracted",
            lambda choices, _: label_prior_corrected(choices.scores),
        ),
        Calibrator(
            "content-free", "acc_content_free", "content_free", False,
            "each choice's log-probability behind inputs without content subtracted",
            lambda choices, inputs: content_free(choices.scores, np.asarray(inputs.content_free)),
        ),
        Calibrator(
            "domain-pmi", "acc_domain_pmi", "premise", True,
            "each choice's score behind the end of the prompt alone subtracted",
            _premise,
        ),
        Calibrator(
            "pride", "acc_pride", "rotated", False,
            "the option letters' prior from rotated options subtracted",
            lambda choices, inputs: pride(choices.scores, option_prior(np.asarray(inputs.rotated))),
        ),
        Calibrator(
            "supervised", "acc_supervised", "labelled", True,
            "scores scaled as fits the labelled documents of the search, in each arm anew",
            _supervised,
        ),
    )
}  # fmt: skip
"""Every calibration by its name; the order is that of the columns."""


def calibrator_inputs(run: Run, task: str) -> CalibratorInputs:
    """Return what ``act-harness eval`` stored of a task's calibrations; empty for any other run.

    Raises:
        ResultError: What is stored is none of that.
    """
    stored = run.data.get("calibrators", {})
    try:
        return reading.validated(CalibratorInputs, stored.get(task, {}))
    except (TypeError, ValidationError) as error:
        raise ResultError(
            f"{run.label}: what is stored for the calibrators of task {task} cannot be read "
            f"({one_line(error, limit=200)}); repeat act-harness eval"
        ) from None


def same_labelled(a: CalibratorInputs, b: CalibratorInputs) -> bool:
    """Say whether two arms' supervised scalings, where both have one, saw the same documents."""
    one, two = a.labelled, b.labelled
    if one is None or two is None:
        return True
    return (one.labels, one.lengths) == (two.labels, two.lengths)


def calibrator_names(given: Sequence[str]) -> tuple[str, ...]:
    """Return the calibrations that were asked for, in the order of the columns, ``batch`` first.

    Args:
        given: Names of :data:`CALIBRATORS`, or ``all``.

    Raises:
        InputError: A name is unknown.
    """
    for name in given:
        if name not in CALIBRATORS and name != "all":
            known = [*CALIBRATORS, "all"]
            hint = suggestion(name, known) or f"; there are {', '.join(known)}"
            raise InputError(f"--calibrators names {name!r}, which is unknown{hint}")
    return tuple(one for one in CALIBRATORS if one in given or "all" in given or one == "batch")


def calibrated_hits(
    calibrator: Calibrator, choices: ChoiceScores, inputs: CalibratorInputs
) -> Array | None:
    """Return 1.0 where the best calibrated score is the right choice's, (documents,).

    Of equal scores the first wins. None where the calibration does not apply: choices differ by
    document, what it needs was not measured, or a prior over documents is asked of one: nothing
    would be left of its scores.

    Raises:
        ResultError: What was measured does not fit the documents.
    """
    if not (choices.same_choices or calibrator.any_choices):
        return None
    if calibrator.name == "batch" and len(choices.labels) < 2:
        return None
    if calibrator.needs is not None and getattr(inputs, calibrator.needs) is None:
        return None
    best = calibrator.calibrate(choices, inputs).argmax(axis=1)
    return np.asarray(best == choices.labels, dtype=np.float64)
