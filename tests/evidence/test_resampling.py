"""Units, their resamples and the random signs: by hand, and draw by draw."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from act_harness.errors import ResultError
from act_harness.evidence import resampling
from act_harness.evidence.resampling import Part, Units, sign_flip_p


class Counting(np.random.Generator):
    """A generator that keeps which draws of which sizes were asked for."""

    def __init__(self, seed=0):
        super().__init__(np.random.PCG64(seed))
        self.asked = []

    def multinomial(self, n, pvals, size=None):
        self.asked.append(("multinomial", (size, len(pvals))))
        return super().multinomial(n, pvals, size)

    def integers(self, low, high=None, size=None, **more):
        self.asked.append(("integers", size))
        return super().integers(low, high, size, **more)


def units_of(b, **more):
    return Units.of(Part(np.zeros(len(b)), b, **more))


# -- units -----------------------------------------------------------------------------------------


def test_clusters_sum_up_values_and_weights():
    """Sums of a, b and weight; clusters numbered as they come."""
    part = Part([1, 2, 3, 4], [5, 7, 9, 11], [1, 2, 3, 4], ["y", "x", "y", "z"])
    found = Units.of(part)
    assert found.sums.tolist() == [[10, 32, 4], [4, 14, 2], [16, 44, 4]]
    assert (found.documents, found.grouped) == (4, True)
    assert found.scores() == (3.0, 9.0)
    moves = found.moves()
    assert moves.tolist() == [2.2, 1.0, 2.8]
    assert moves.sum() == pytest.approx(6.0)
    with pytest.raises(FrozenInstanceError):
        found.documents = 3
    # Residuals 22 - 24, 10 - 12 and 28 - 24 of ten documents' weight, three clusters.
    assert found.stderr() == pytest.approx(math.sqrt(3 / 2 * (4 + 4 + 16)) / 10)


def test_a_cluster_of_a_lone_document_is_that_document():
    found = units_of([0.5], clusters=["x"])
    assert (found.sums.tolist(), found.grouped) == ([[0.0, 0.5, 1.0]], False)
    assert found.stderr() == math.inf


def test_one_weight_does_not_stand_for_all():
    with pytest.raises(ResultError, match="found 2 and 1"):
        units_of([1.0, 2.0], weights=[1.0])
    with pytest.raises(ResultError, match="positive"):
        units_of([1.0, 2.0], weights=[1.0, -1.0])


def test_a_transform_gets_the_two_means_and_nothing_else():
    """The logarithm of 1 - mean has no value at 1, the share of the weights in themselves."""
    part = Part([0.25, 0.75], [0.5, 0.5], transform=lambda mean: np.log(1 - mean))
    assert Units.of(part).scores() == pytest.approx((math.log(0.5), math.log(0.5)))


# -- draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kinds", "how"), [(64, "multinomial"), (65, "integers")])
def test_up_to_64_kinds_of_units_are_drawn_as_counts(kinds, how):
    rng = Counting()
    draws = units_of(np.arange(float(kinds))).replicates(rng, 2000)
    assert rng.asked == [(how, (2000, kinds))]
    spread = (kinds**2 - 1) / 12 / kinds  # of the mean of so many draws out of 0 ... kinds - 1
    assert draws.mean() == pytest.approx((kinds - 1) / 2, abs=4 * math.sqrt(spread / 2000))
    assert draws.std() == pytest.approx(math.sqrt(spread), rel=0.1)


def test_draws_hold_four_million_numbers_at_once():
    """2**22 numbers are 4194 rows of 1000 units; the next rows continue, none is drawn twice."""
    moves = np.random.default_rng(0).normal(0.02, 1, 1000)
    rng = Counting()
    draws = units_of(moves).replicates(rng, 5000)
    assert rng.asked == [("integers", (4194, 1000)), ("integers", (806, 1000))]
    assert draws.shape == (5000,)
    assert len(np.unique(draws)) == 5000
    error = moves.std() / math.sqrt(1000)
    for some in (draws[:4194], draws[4194:]):
        assert some.mean() == pytest.approx(moves.mean(), abs=5 * error / math.sqrt(len(some)))
        assert some.std() == pytest.approx(error, rel=0.1)
    rng = Counting()
    p_value = sign_flip_p(moves, rng, 5000)
    assert rng.asked == [("integers", (4194, 1000)), ("integers", (806, 1000))]
    # The sum over its standard deviation under random signs is nearly normal.
    normal = math.erfc(abs(moves.sum()) / math.sqrt((moves**2).sum()) / math.sqrt(2))
    assert p_value == pytest.approx(normal, abs=0.03)


def test_more_units_than_are_held_at_once_are_drawn_row_by_row(monkeypatch):
    monkeypatch.setattr(resampling, "_CELLS", 50)
    moves = np.arange(1.0, 101.0)
    rng = Counting()
    assert units_of(moves).replicates(rng, 3).shape == (3,)
    assert rng.asked == [("integers", (1, 100))] * 3
    rng = Counting()
    assert sign_flip_p(moves, rng, 3) == 1 / 4
    assert rng.asked == [("integers", (1, 100))] * 3


# -- signs -----------------------------------------------------------------------------------------


def test_up_to_twelve_moves_every_pattern_of_signs_counts():
    """All alike: 2 of 2**12. Of thirteen 99 patterns are drawn, the least p is one of a hundred."""
    rng = Counting()
    assert sign_flip_p(np.ones(12), rng, 99) == 2 / 4096
    assert sign_flip_p(np.append(np.ones(12), 0.0), rng, 99) == 2 / 4096  # no move, no sign
    assert rng.asked == []
    found = sign_flip_p(np.ones(13), rng, 99)
    assert found * 100 == pytest.approx(round(found * 100))
    assert 1 / 100 <= found <= 2 / 100
    assert rng.asked == [("integers", (99, 13))]


def test_patterns_that_reach_the_sum_up_to_rounding_count():
    """The same seven moves in tenths, enumerated as integers, which add up without rounding."""
    moves = np.array([0.1, 0.2, 0.3, -0.1, 0.7, -0.3, 0.4])
    patterns = itertools.product((-1, 1), repeat=7)
    tenths = [1, 2, 3, -1, 7, -3, 4]
    sums = [abs(sum(s * t for s, t in zip(signs, tenths, strict=True))) for signs in patterns]
    expected = sum(one >= abs(sum(tenths)) for one in sums) / 128
    assert sign_flip_p(moves, np.random.default_rng(0), 9) == expected
    assert sign_flip_p(-moves, np.random.default_rng(0), 9) == expected
    # Two moves, the difference below the sum by 4 or by 15 parts in 10**10: 10 are a rounding.
    assert sign_flip_p(np.array([1.0, 2e-10]), np.random.default_rng(0), 9) == 1
    assert sign_flip_p(np.array([1.0, 7.5e-10]), np.random.default_rng(0), 9) == 0.5


@pytest.mark.parametrize("pairs", [0, 1, 6, 7, 20])
def test_moves_that_add_up_to_nothing_have_p_1(pairs):
    """Every pattern reaches a sum of 0, itself among them, enumerated or drawn."""
    moves = np.repeat([1.0, -1.0], pairs)
    assert sign_flip_p(moves, np.random.default_rng(0), 99) == 1.0


def test_drawn_signs_agree_with_all_patterns():
    """Twenty moves of one size, 14 up and 6 down: |sum| of 8 or more has a binomial tail."""
    moves = np.repeat([0.1, -0.1], [14, 6])
    tail = 2 * sum(math.comb(20, k) for k in range(14, 21)) / 2**20
    found = sign_flip_p(moves, np.random.default_rng(0), 100_000)
    assert found == pytest.approx(tail, abs=4 * math.sqrt(tail / 100_000))
    assert sign_flip_p(np.zeros(3), np.random.default_rng(0), 9) == 1.0
