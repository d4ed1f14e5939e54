"""Metrics of a whole corpus: no mean over documents, but a function of what they add up to.

Matthews' correlation and F1 are functions of a table of counts, (right class, predicted class), to
which every document adds one. So a bootstrap over documents costs no more than that of a mean: the
tables are drawn, and the metric is computed of each. The definitions are those of scikit-learn,
which lm-eval calls; which one a task uses is read off its reported score, never guessed.

Not here: means and perplexities (:mod:`act_harness.evidence.stats`), and translation metrics (BLEU,
chrF, TER), whose counts lm-eval does not log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from act_harness.errors import ResultError
from act_harness.evidence.intervals import expanded, percentile_interval, student_interval
from act_harness.evidence.resampling import Array, Interval
from act_harness.evidence.stats import RESAMPLES, SEED, PairedDifference, at_level

__all__ = ["CorpusPart", "corpus_difference", "corpus_part", "f1", "macro_f1", "matthews"]

MOST_CLASSES = 64
"""More classes than this are no classification; their tables would not fit in memory."""

_CELLS = 1 << 22
_FEW_DEGREES = 9

Counts = npt.NDArray[np.int64]
Score = Callable[[Array], Array]
"""From tables of counts, (..., right classes, predicted classes), to scores, (...)."""


class CorpusPart(NamedTuple):
    """Both arms' classes on the documents of one task, document i being the same in both."""

    right: Sequence[int]
    """Index of the right class, (documents,)."""
    a: Sequence[int]
    """Index of the class that arm A predicts, (documents,)."""
    b: Sequence[int]
    """The same of arm B."""
    classes: tuple[float, ...]
    """The classes in ascending order, as the samples name them."""
    score: Score
    clusters: Sequence[Hashable] | None = None
    """Which documents belong together, one id a document; None: each stands alone."""


def matthews(tables: Array) -> Array:
    """Matthews' correlation of tables of counts; 0 where a side has one class only."""
    rows, columns = tables.sum(axis=-1), tables.sum(axis=-2)
    total = rows.sum(axis=-1)
    hits = np.trace(tables, axis1=-2, axis2=-1)
    shared = hits * total - (rows * columns).sum(axis=-1)
    spreads = (total**2 - (rows**2).sum(axis=-1)) * (total**2 - (columns**2).sum(axis=-1))
    found: Array = np.zeros_like(shared)
    return np.asarray(np.divide(shared, np.sqrt(spreads), out=found, where=spreads > 0))


def f1(tables: Array) -> Array:
    """F1 of the last of two classes; 0 where it is neither right nor predicted anywhere."""
    return _f1_of_classes(tables)[..., -1]


def macro_f1(tables: Array) -> Array:
    """Unweighted mean of the F1 of all classes."""
    return np.asarray(_f1_of_classes(tables).mean(axis=-1))


def _f1_of_classes(tables: Array) -> Array:
    twice = 2.0 * np.diagonal(tables, axis1=-2, axis2=-1)
    both = tables.sum(axis=-1) + tables.sum(axis=-2)
    found: Array = np.zeros_like(both)
    return np.asarray(np.divide(twice, both, out=found, where=both > 0))


_SCORES: dict[str, Score] = {"mcc": matthews, "f1": f1, "macro_f1": macro_f1}


def corpus_part(
    metric: str,
    a: Sequence[tuple[float, float]],
    b: Sequence[tuple[float, float]],
    *,
    reported: tuple[float | None, float | None],
    clusters: Sequence[Hashable] | None = None,
) -> CorpusPart | None:
    """Find the corpus metric that gives both arms' reported scores from their samples.

    Args:
        metric: Its name, tried first; where no score was reported it alone counts.
        a: Right and predicted class of each document in arm A, (documents,).
        b: The same of arm B.
        reported: Both arms' reported scores.
        clusters: Cluster id of each document.

    Returns:
        None where no known metric does, or the arms' right classes differ.
    """
    right = [pair[0] for pair in a]
    classes = tuple(sorted({value for pair in (*a, *b) for value in pair}))
    if not a or right != [pair[0] for pair in b] or not 1 < len(classes) <= MOST_CLASSES:
        return None
    if not all(value.is_integer() for value in classes):
        return None
    index = {value: number for number, value in enumerate(classes)}
    columns = [[index[value] for value in one] for one in zip(*_triples(a, b), strict=True)]
    names = sorted(_SCORES, key=lambda name: name != metric)
    for name in names if any(score is not None for score in reported) else [metric]:
        if name not in _SCORES or (name == "f1" and classes != (0.0, 1.0)):
            continue
        part = CorpusPart(columns[0], columns[1], columns[2], classes, _SCORES[name], clusters)
        if all(
            said is None or math.isclose(found, said, rel_tol=1e-6, abs_tol=1e-9)
            for found, said in zip(_scores(part), reported, strict=True)
        ):
            return part
    return None


def _triples(
    a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float, float]]:
    return ((one[0], one[1], two[1]) for one, two in zip(a, b, strict=True))


def corpus_difference(
    part: CorpusPart, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = SEED
) -> PairedDifference:
    """Compare two arms on a corpus metric: paired bootstrap and exchange of the arms' predictions.

    The p-value counts how often the difference is as large when each document's (or cluster's)
    predictions are exchanged between the arms by the toss of a coin: random signs, for a score that
    is no sum.

    Args:
        part: The task.
        confidence: Level of the interval.
        resamples: How many resamples and exchanges are drawn.
        seed: Seed of the draws.

    Raises:
        ResultError: All documents are in one cluster.
    """
    kinds, counts = _kinds(part)
    units = int(counts.sum())
    score_a, score_b = _scores(part)
    difference = score_b - score_a
    rng = np.random.default_rng(seed)
    stderr, interval = math.inf, Interval(-math.inf, math.inf)
    if units > 1:
        draws = np.concatenate(list(_resampled(part, kinds, counts, rng, resamples)))
        widening = math.sqrt(units / (units - 1))
        stderr = float(np.std(draws, ddof=1)) * widening
        if units - 1 < _FEW_DEGREES:
            interval = student_interval(difference, stderr, units - 1, confidence)
        else:
            interval = percentile_interval(draws, expanded(confidence, units - 1, widening))
    documents = len(part.right)
    result = PairedDifference(
        documents=documents,
        clusters=units if units < documents else None,
        score_a=score_a,
        score_b=score_b,
        difference=difference,
        stderr=stderr,
        interval=interval,
        confidence=confidence,
        p_value=_exchange_p(part, kinds, counts, rng, resamples),
        test="sign-flip",
        flips=None,
        minimum_detectable=math.inf,
        degrees=units - 1,
        units=units,
    )
    return at_level(result, 1 - confidence)


def _terms(part: CorpusPart) -> Array:
    """What each document adds to both arms' tables, (documents, 2, classes * classes)."""
    size = len(part.classes)
    terms = np.zeros((len(part.right), 2, size * size))
    documents = np.arange(len(part.right))
    for arm, predicted in enumerate((part.a, part.b)):
        terms[documents, arm, np.asarray(part.right) * size + np.asarray(predicted)] = 1.0
    return terms


def _kinds(part: CorpusPart) -> tuple[Array, Counts]:
    """The distinct units (documents or clusters), as terms, and how many there are of each."""
    terms = _terms(part)
    if part.clusters is not None:
        ids: dict[Hashable, int] = {}
        codes = np.asarray([ids.setdefault(one, len(ids)) for one in part.clusters])
        if len(ids) == 1 and len(terms) > 1:
            raise ResultError("all documents are in one cluster; compare without clusters")
        sums = np.zeros((len(ids), *terms.shape[1:]))
        np.add.at(sums, codes, terms)
        terms = sums
    flat = terms.reshape(len(terms), -1)
    kinds, counts = np.unique(flat, axis=0, return_counts=True)
    return kinds.reshape(len(kinds), 2, -1), np.asarray(counts, dtype=np.int64)


def _scores(part: CorpusPart) -> tuple[float, float]:
    found = _of_sums(part, _terms(part).sum(axis=0))
    return float(found[0]), float(found[1])


def _of_sums(part: CorpusPart, sums: Array) -> Array:
    size = len(part.classes)
    return part.score(sums.reshape(*sums.shape[:-1], size, size))


def _rows(kinds: Array, resamples: int) -> Iterator[int]:
    step = max(1, _CELLS // max(len(kinds), kinds[0].size))
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def _resampled(
    part: CorpusPart, kinds: Array, counts: Counts, rng: np.random.Generator, resamples: int
) -> Iterator[Array]:
    """Differences of the scores in bootstrap resamples of the units, (rows,) at a time."""
    units = int(counts.sum())
    for rows in _rows(kinds, resamples):
        times = rng.multinomial(units, counts / units, size=rows).astype(np.float64)
        scores = _of_sums(part, np.tensordot(times, kinds, axes=1))
        yield scores[:, 1] - scores[:, 0]


def _exchange_p(
    part: CorpusPart, kinds: Array, counts: Counts, rng: np.random.Generator, resamples: int
) -> float:
    """Two-sided p of the difference when each unit's arms could as well be the other way round."""
    observed = float(np.abs(np.diff(_of_sums(part, np.tensordot(counts, kinds, axes=1))))[0])
    if observed == 0.0:
        return 1.0
    reached = 0
    for rows in _rows(kinds, resamples):
        turned = rng.binomial(counts, 0.5, size=(rows, len(counts))).astype(np.float64)
        kept = counts - turned
        sums = np.tensordot(kept, kinds, axes=1) + np.tensordot(turned, kinds[:, ::-1], axes=1)
        moves = np.abs(np.diff(_of_sums(part, sums), axis=-1))
        reached += int(np.count_nonzero(moves >= observed * (1 - 1e-9)))
    return (reached + 1) / (resamples + 1)
