from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from act_harness.bench import coverage
from act_harness.errors import ResultError
from act_harness.evidence import intervals, stats

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)
REALS = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
PAIRS = st.lists(st.tuples(REALS, REALS), min_size=2, max_size=30)


def arms(documents, *, lost, gained, right=100):
    """0/1 answers with known flips: the first ones get lost, the next ones gained."""
    a, b = np.zeros(documents), np.zeros(documents)
    a[:lost], b[lost : lost + gained] = 1, 1
    a[lost + gained : lost + gained + right] = b[lost + gained : lost + gained + right] = 1
    return a, b


# -- the paired comparison -------------------------------------------------------------------------


def test_known_flips_give_the_numbers_of_scipy_and_of_counting():
    a, b = arms(500, lost=40, gained=25)
    result = stats.paired_difference(a, b)
    assert result.score_a == pytest.approx(140 / 500)
    assert result.difference == pytest.approx(-15 / 500)
    assert result.flips[:2] == (25, 40)
    # Two-sided binomial tail by counting: 25 or fewer, 40 or more of 65.
    tail = sum(math.comb(65, k) for k in range(66) if k <= 25 or k >= 40) / 2**65
    assert result.p_value == pytest.approx(tail, rel=1e-12)
    assert result.stderr == pytest.approx(scipy.stats.sem(b - a), rel=1e-12)
    drawn = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: (y - x).mean(axis=axis),
        paired=True, method="percentile", n_resamples=20000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert result.interval == pytest.approx(tuple(drawn), abs=0.0021)  # one document is 0.002
    # Bonett and Price: one more gained, one more lost, of two more documents.
    up, down = 26 / 502, 41 / 502
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 502)
    assert result.interval == pytest.approx((up - down - half, up - down + half), rel=1e-6)


@pytest.mark.parametrize(("lost", "gained", "said"), [
    (15, 0, "regressed"), (0, 15, "improved"), (40, 25, "inconclusive"), (25, 40, "inconclusive"),
    (0, 0, "inconclusive"), (5, 0, "inconclusive"), (6, 0, "regressed"),
])  # fmt: skip
def test_verdicts_on_500_documents(lost, gained, said):
    a, b = arms(500, lost=lost, gained=gained)
    assert stats.verdict(stats.paired_difference(a, b)) == said


def test_a_paired_effect_that_an_unpaired_test_misses_is_found():
    a, b = arms(1000, lost=2, gained=20, right=600)
    unpaired = scipy.stats.ttest_ind(a, b).pvalue
    result = stats.paired_difference(a, b)
    assert unpaired > 0.3
    assert result.p_value < 0.001
    assert stats.verdict(result) == "improved"
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 300)
    moved = base + rng.normal(0.3, 1, 300)
    result = stats.paired_difference(base, moved)
    assert scipy.stats.ttest_ind(base, moved).pvalue > 0.3
    assert result.p_value == pytest.approx(scipy.stats.ttest_rel(base, moved).pvalue, abs=2e-3)
    assert stats.verdict(result) == "improved"


def test_the_drawn_interval_agrees_with_scipys():
    rng = np.random.default_rng(3)
    a = rng.gamma(2, size=200)
    b = a + rng.exponential(1, size=200) - 0.8
    result = stats.paired_difference(a, b)
    theirs = scipy.stats.bootstrap(
        (b - a,), np.mean, method="percentile", rng=np.random.default_rng(5)
    )
    assert result.interval == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    assert result.stderr == pytest.approx(scipy.stats.sem(b - a))


def test_few_and_many_kinds_of_units_draw_from_the_same_distribution():
    rng = np.random.default_rng(0)
    few = rng.integers(0, 4, size=(2, 400)).astype(float)
    many = few + rng.uniform(0, 1e-9, size=few.shape)  # the other way of drawing, same numbers
    first, second = stats.paired_difference(*few), stats.paired_difference(*many)
    assert first.interval == pytest.approx(second.interval, abs=0.01)
    assert first.p_value == pytest.approx(second.p_value, abs=0.02)


def test_the_sign_flip_test_is_exact_for_few_documents():
    moves = np.array([1.0, 2.0, 3.5, -0.5])
    result = stats.paired_difference(np.zeros(4), moves)
    sums = [abs(np.dot(signs, moves)) for signs in itertools.product((-1, 1), repeat=4)]
    assert result.p_value == sum(s >= 6 - 1e-9 for s in sums) / 16
    theirs = scipy.stats.permutation_test(
        (moves,), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert result.p_value == pytest.approx(theirs.pvalue)
    assert result.test == "sign-flip"


@given(pairs=BITS)
def test_swapping_the_arms_mirrors_the_result(pairs):
    a, b = np.array(pairs, dtype=float).T
    one, other = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert one.difference == pytest.approx(-other.difference)
    assert one.interval == pytest.approx((-other.interval.high, -other.interval.low))
    assert one.p_value == pytest.approx(other.p_value)
    assert {stats.verdict(one), stats.verdict(other)} in (
        {"inconclusive"}, {"improved", "regressed"},
    )  # fmt: skip


@settings(max_examples=30)
@given(pairs=PAIRS, shift=REALS)
def test_a_shift_of_both_arms_changes_nothing_and_seeds_repeat(pairs, shift):
    a, b = np.array(pairs).T
    one = stats.paired_difference(a, b, resamples=199)
    assert one == stats.paired_difference(a, b, resamples=199)
    other = stats.paired_difference(a + shift, b + shift, resamples=199)
    assert one.difference == pytest.approx(other.difference, abs=1e-9)
    assert one.stderr == pytest.approx(other.stderr, abs=1e-9)
    assert one.interval.low <= one.interval.high
    assert 0 < one.p_value <= 1


def test_equal_arms_are_inconclusive_and_the_smallest_finding_is_six_flips():
    a, _ = arms(200, lost=50, gained=0)
    result = stats.paired_difference(a, a)
    assert (result.difference, result.stderr) == (0, 0)
    # No change in 200 documents does not say that none would change among others.
    half = 1.959964 * math.sqrt(2 / 202 / 202)
    assert result.interval == pytest.approx((-half, half))
    assert result.p_value == 1
    # 2 * 0.5**5 > 0.05 >= 2 * 0.5**6: no test can find fewer than six flips.
    assert result.minimum_detectable == pytest.approx(6 / 200)


def test_no_change_in_clusters_or_groups_is_no_certainty():
    half = 1.959964 * math.sqrt(2 / 22 / 22)
    right = np.tile([0.0, 1.0], 20)
    clustered = stats.paired_difference(right, right, clusters=np.repeat(range(20), 2).tolist())
    assert clustered.interval == pytest.approx((-half, half))
    group = stats.combined_difference([stats.Part(right[:10], right[:10])] * 2)
    assert group.interval == pytest.approx((-half, half))
    assert group.p_value == 1
    lone = stats.combined_difference([stats.Part([1.0], [1.0])] * 2)
    assert lone.stderr == math.inf


def test_few_units_have_students_interval():
    a, b = [5.0, 7.0, 2.0, 6.0], [6.0, 9.0, 2.5, 6.5]
    result = stats.paired_difference(a, b)
    theirs = scipy.stats.ttest_rel(b, a).confidence_interval(0.95)
    assert result.interval == pytest.approx(tuple(theirs))
    other = stats.paired_difference(a, b, confidence=0.8)
    assert other.interval == pytest.approx(
        tuple(scipy.stats.ttest_rel(b, a).confidence_interval(0.8))
    )
    # Nine units still have it, ten have percentiles: neither jumps.
    rng = np.random.default_rng(0)
    moves = rng.normal(1, 1, 10)
    nine = stats.paired_difference(np.zeros(9), moves[:9])
    assert nine.interval == pytest.approx(
        tuple(scipy.stats.ttest_1samp(moves[:9], 0).confidence_interval(0.95))
    )
    ten = stats.paired_difference(np.zeros(10), moves)
    student = scipy.stats.ttest_1samp(moves, 0).confidence_interval(0.95)
    assert ten.interval != pytest.approx(tuple(student), abs=1e-6)
    assert ten.interval == pytest.approx(tuple(student), abs=0.2)


def test_two_units_have_a_spread():
    """One has none; two do, with one degree of freedom: 12.7 standard errors to each side."""
    result = stats.paired_difference([0.0, 0.0], [1.0, 3.0])
    assert result.difference == 2
    assert result.stderr == pytest.approx(1)
    assert result.interval == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    pairs = stats.paired_difference([0.0] * 4, [1.0, 1.0, 3.0, 3.0], clusters=["x", "x", "y", "y"])
    assert (pairs.stderr, pairs.clusters) == (pytest.approx(1), 2)
    assert stats.standard_error([1.0, 3.0]) == pytest.approx(1)
    assert stats.standard_error([1.0]) == math.inf


def test_degrees_of_freedom_of_a_group_are_satterthwaites():
    rng = np.random.default_rng(0)
    parts = [stats.Part(np.zeros(n), rng.normal(0, s, n)) for n, s in ((4, 2.0), (30, 0.5))]
    v = [0.25 * np.var(part.b, ddof=1) / len(part.b) for part in parts]
    by_hand = (v[0] + v[1]) ** 2 / (v[0] ** 2 / 3 + v[1] ** 2 / 29)
    result = stats.combined_difference(parts)
    assert result.degrees == pytest.approx(by_hand)
    assert result.degrees < 4
    half = scipy.stats.t.ppf(0.975, by_hand) * math.sqrt(v[0] + v[1])
    assert result.interval == pytest.approx((result.difference - half, result.difference + half))
    still = stats.combined_difference(
        [stats.Part([0.5, 2], [0.5, 2]), stats.Part([3, 1, 9], [3, 1, 9])]
    )
    assert (still.degrees, still.interval, still.p_value) == (3, (0, 0), 1)


@pytest.mark.parametrize(("case", "units", "least"), [
    ("normal", 3, 0.92), ("normal", 10, 0.92), ("clusters", 10, 0.91), ("answers", 20, 0.92),
    ("rare", 20, 0.92),
])  # fmt: skip
def test_95_percent_intervals_of_few_units_hold_the_truth(case, units, least):
    """Simulated; percentiles of the plain bootstrap have 0.75, 0.90, 0.89, 0.94 and 0.63."""
    found = coverage.simulate(coverage.CASES[case], units, repetitions=500)
    assert found.inside >= least


def test_coverage_is_counted_against_the_truth():
    """The simulation itself: a truth that is off is not covered."""
    wrong = coverage.CASES["normal"]._replace(truth=1.3)
    assert coverage.simulate(wrong, 50, repetitions=40).inside < 0.1
    rng = np.random.default_rng(0)
    (part,) = coverage.CASES["clusters"].draw(rng, 60000)
    assert np.mean(part.b) - np.mean(part.a) == pytest.approx(
        coverage.CASES["clusters"].truth, abs=0.003
    )


def test_what_is_detectable_as_one_of_several_is_found_in_80_percent():
    """One task of nine has an effect; at the unadjusted figure BH finds it far less often."""
    rng = np.random.default_rng(1)
    n, rounds = 60, 400
    sample = stats.paired_difference(np.zeros(n), rng.normal(0, 1, n), resamples=99)
    sample = replace(sample, stderr=1 / math.sqrt(n))
    alone, of_nine = (stats.at_level(sample, 0.05 / m).minimum_detectable for m in (1, 9))
    assert alone == pytest.approx((2.001 + 0.848) / math.sqrt(n), abs=1e-3)  # t of 59 degrees
    found = {}
    for effect in (alone, of_nine):
        moves = rng.normal(0, 1, (rounds, 9, n))
        moves[:, 0] += effect
        p_values = scipy.stats.ttest_1samp(moves, 0, axis=2).pvalue
        found[effect] = np.mean([stats.benjamini_hochberg(p).rejected[0] for p in p_values])
    assert found[of_nine] >= 0.76
    assert found[alone] < 0.65


def test_what_is_detectable_of_other_values_has_no_floor_of_answers():
    """Six changed answers of 50 are the least for right and wrong, not for tiny differences."""
    rng = np.random.default_rng(0)
    moves = rng.normal(0, 1e-3, 50)
    found = stats.paired_difference(np.zeros(50), moves).minimum_detectable
    t = scipy.stats.t
    assert found == pytest.approx((t.isf(0.025, 49) + t.ppf(0.8, 49)) * scipy.stats.sem(moves))
    assert found < 6 / 50 / 100


def test_tasks_of_one_document_say_nothing():
    """Ten of them neither: no task has a spread of its own."""
    found = stats.combined_difference([stats.Part([0.0], [float(n)]) for n in range(1, 11)])
    assert (found.stderr, found.interval) == (math.inf, (-math.inf, math.inf))
    assert (found.degrees, found.minimum_detectable, found.units) == (0, math.inf, 10)


def test_defaults_of_the_draws():
    """The least p of a drawn test is one of its draws and one; equal calls draw equally."""
    assert (stats.SEED, stats.RESAMPLES) == (0, 9999)
    moves = np.random.default_rng(0).normal(5, 1, 30)
    found = stats.paired_difference(np.zeros(30), moves)
    assert found.p_value == pytest.approx(1 / 10000)
    assert found == stats.paired_difference(np.zeros(30), moves, seed=0, resamples=9999)
    assert found.interval != stats.paired_difference(np.zeros(30), moves, seed=1).interval


@pytest.mark.parametrize(("score", "change", "said"), [
    (0.5, 0.9e-4, "inconclusive"), (0.5, 1.1e-4, "improved"),
    (-20.0, 19e-4, "inconclusive"), (-20.0, 21e-4, "improved"),
])  # fmt: skip
def test_the_bound_of_rounding_is_a_share_of_the_score_or_of_one(score, change, said):
    rng = np.random.default_rng(0)
    a = np.full(40, score)
    result = stats.paired_difference(a, a + change + rng.normal(0, change / 1e3, 40))
    assert stats.verdict(result) == said


def test_bounds_that_are_met_exactly():
    quarter = stats.paired_difference(np.zeros(40), np.full(40, 0.25))
    assert stats.verdict(quarter, negligible=0.25) == "inconclusive"
    assert stats.verdict(quarter, negligible=0.2499) == "improved"
    assert stats.verdict(quarter, 0.05) == "improved"
    assert stats.verdict(quarter, 0.0501) == "inconclusive"
    # An interval that ends at zero does not exclude it.
    for ends in ((0.0, 0.5), (-0.5, 0.0), (0.0, 0.0)):
        touching = replace(quarter, interval=stats.Interval(*ends))
        assert stats.verdict(touching) == "inconclusive"
    assert stats.verdict(replace(quarter, interval=stats.Interval(0.01, 0.5))) == "improved"
    alone = stats.paired_difference([1.0], [1.0], weights=[2.0])
    assert alone.interval == (-math.inf, math.inf)
    assert stats.benjamini_hochberg([0.05]).rejected.tolist() == [True]
    assert stats.benjamini_hochberg([0.0501]).rejected.tolist() == [False]
    with pytest.raises(FrozenInstanceError):
        quarter.stderr = 0.0


def test_percentiles_leave_the_same_number_out_on_both_sides():
    draws = np.random.default_rng(0).permutation(1000).astype(float)
    assert intervals.percentile_interval(draws, 0.95) == (25, 974)
    assert intervals.percentile_interval(draws, 0.9) == (50, 949)
    assert intervals.percentile_interval(draws, 0.9999) == (0, 999)


def test_the_level_of_percentiles_by_hand():
    # Student's 2.262157 of 9 degrees times the root of 10/9 is a normal quantile of 2.38451.
    level = intervals.expanded(0.95, 9, math.sqrt(10 / 9))
    assert level == pytest.approx(1 - 2 * scipy.stats.norm.sf(2.38451), abs=1e-6)
    assert intervals.expanded(0.95, 1e9, 1.0) == pytest.approx(0.95, abs=1e-6)
    assert intervals.flips_interval(3, 0, 3, 0.99) == pytest.approx(
        (0.6 - 2.575829 * math.sqrt((1.0 - 0.36) / 5), 1.0)
    )
    assert intervals.flips_interval(0, 3, 3, 0.99).low == -1


def test_the_spread_of_a_transformed_score_is_that_of_its_draws_widened():
    """Perplexity of 12 texts: the bootstrap lacks the square root of 12/11."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(3, 0.2, (2, 12))
    result = stats.paired_difference(a, b, transform=np.exp, resamples=60000)
    drawn = np.random.default_rng(5).integers(0, 12, size=(60000, 12))
    draws = np.exp(b[drawn].mean(axis=1)) - np.exp(a[drawn].mean(axis=1))
    assert result.stderr == pytest.approx(draws.std(ddof=1) * math.sqrt(12 / 11), rel=0.015)
    few = stats.paired_difference(a[:6], b[:6], transform=np.exp)
    half = scipy.stats.t.isf(0.025, 5) * few.stderr
    assert few.interval == pytest.approx((few.difference - half, few.difference + half))
    assert few.difference == pytest.approx(np.exp(b[:6].mean()) - np.exp(a[:6].mean()))


def test_nothing_is_detectable_where_no_p_value_is_small_enough():
    """Five units give two-sided p of 1/16 at the least, whatever happens; six give 1/32."""
    rng = np.random.default_rng(0)
    five, six = (stats.paired_difference(np.zeros(n), rng.normal(0, 1, n)) for n in (5, 6))
    assert five.minimum_detectable == math.inf
    assert math.isfinite(six.minimum_detectable)
    assert stats.at_level(six, 0.05 / 2).minimum_detectable == math.inf
    flips = stats.paired_difference(*arms(200, lost=50, gained=0))
    assert stats.at_level(flips, 0.05 / 9).minimum_detectable >= 9 / 200
    still = stats.paired_difference(np.ones(200), np.ones(200))
    # 2 * 0.5**8 > 0.05 / 9 >= 2 * 0.5**9
    assert stats.at_level(still, 0.05 / 9).minimum_detectable == pytest.approx(9 / 200)
    assert stats.at_level(
        stats.paired_difference([1.0] * 7, [0.0] * 7), 0.05
    ).minimum_detectable == pytest.approx(6 / 7)


def test_what_no_answers_can_show_is_not_detectable():
    """Four of eight gained and four lost: 3.26 standard errors of 0.378 are more than all."""
    eight = stats.paired_difference(*arms(8, lost=4, gained=4, right=0))
    assert eight.test == "mcnemar"
    t = scipy.stats.t
    assert (t.isf(0.025, 7) + t.ppf(0.8, 7)) * eight.stderr == pytest.approx(1.2315, abs=1e-3)
    assert eight.minimum_detectable == math.inf
    # Six of six may all change; other values than answers may move by more than one.
    assert stats.paired_difference([1.0] * 6, [1.0] * 6).minimum_detectable == 1
    reals = stats.paired_difference(np.zeros(8), [9.0, -9.0] * 4)
    assert reals.minimum_detectable == pytest.approx(9 * 1.2315, abs=1e-2)
    default = stats.minimum_detectable_effect(2.0)
    assert default == pytest.approx(2 * (1.959964 + 0.841621), rel=1e-6)


def test_the_minimum_detectable_effect_is_found_in_80_percent():
    rng = np.random.default_rng(0)
    found, sd, n = 0, 2.0, 100
    effect = stats.minimum_detectable_effect(sd / math.sqrt(n))
    assert effect == pytest.approx((1.959964 + 0.841621) * 0.2, rel=1e-5)
    few = stats.minimum_detectable_effect(1.0, alpha=0.01, power=0.9, degrees=9)
    assert few == pytest.approx(3.249836 + 1.383029, rel=1e-5)
    for _ in range(2000):
        found += scipy.stats.ttest_1samp(rng.normal(effect, sd, n), 0).pvalue < 0.05
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_rounding_of_another_batch_size_is_no_verdict():
    a = -np.arange(1, 201) * 3.7
    b = a + 1e-5  # all documents drift the same way: the test alone would be certain
    result = stats.paired_difference(a, b)
    assert result.p_value < 0.001
    assert stats.verdict(result) == "inconclusive"
    assert stats.verdict(result, negligible=0) == "improved"


def test_direction_and_adjusted_p_decide():
    a, b = arms(500, lost=0, gained=15)
    result = stats.paired_difference(a, b)
    assert stats.verdict(result, higher_is_better=False) == "regressed"
    assert stats.verdict(result, higher_is_better=None) == "inconclusive"
    assert stats.verdict(result, 0.06) == "inconclusive"


# -- clusters, weights, groups ---------------------------------------------------------------------


def test_clusters_of_one_document_change_nothing():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    ids = [f"passage {i}" for i in range(50)]
    assert stats.paired_difference(a, b, clusters=ids) == stats.paired_difference(a, b)
    flips = arms(100, lost=3, gained=9, right=20)
    assert stats.paired_difference(*flips, clusters=range(100)) == stats.paired_difference(*flips)


def test_a_cluster_of_copies_is_one_piece_of_evidence():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 40))
    b += 0.4
    alone = stats.paired_difference(a, b)
    copies = stats.paired_difference(
        np.repeat(a, 5), np.repeat(b, 5), clusters=np.repeat(np.arange(40), 5).tolist()
    )
    assert copies.documents == 200
    assert copies.clusters == 40
    assert copies.difference == pytest.approx(alone.difference)
    assert copies.stderr == pytest.approx(alone.stderr)
    assert copies.interval == pytest.approx(alone.interval, abs=0.03)
    assert copies.p_value == pytest.approx(alone.p_value, abs=0.01)
    blind = stats.paired_difference(np.repeat(a, 5), np.repeat(b, 5))
    assert blind.stderr < alone.stderr / 2


def test_clustered_01_values_are_tested_by_cluster():
    a = np.zeros(60)
    b = np.repeat([1, 1, 1, 0, 0, 0], 10).astype(float)
    clusters = np.repeat(np.arange(6), 10).tolist()
    result = stats.paired_difference(a, b, clusters=clusters)
    assert result.flips.p_value < 1e-8  # thirty flips, all one way ...
    assert result.p_value == 0.25  # ... from three passages: 2 of the 8 sign patterns
    assert stats.verdict(result) == "inconclusive"


def test_clusters_of_unequal_size_by_hand():
    """Ten clusters: the ratio's standard error, and percentiles of its resamples further out."""
    rng = np.random.default_rng(4)
    sizes = [1, 4, 2, 3, 1, 5, 2, 2, 3, 1]
    clusters = np.repeat(np.arange(10), sizes)
    b = rng.normal(0.4, 1, len(clusters)) + rng.normal(0, 1, 10)[clusters]
    sums = np.array([b[clusters == c].sum() for c in range(10)])
    mean = sums.sum() / 24
    residual = sums - np.array(sizes) * mean
    stderr = math.sqrt(10 / 9 * (residual**2).sum()) / 24
    result = stats.paired_difference(np.zeros(24), b, clusters=clusters.tolist(), resamples=40000)
    assert result.difference == pytest.approx(mean)
    assert result.stderr == pytest.approx(stderr)
    assert (result.clusters, result.units, result.degrees) == (10, 10, 9)
    drawn = np.random.default_rng(9).integers(0, 10, size=(40000, 10))
    means = sums[drawn].sum(axis=1) / np.array(sizes)[drawn].sum(axis=1)
    # Student's t of 9 degrees, times the square root of 10/9, as a normal quantile.
    tail = scipy.stats.norm.sf(2.262157 * math.sqrt(10 / 9))
    assert tail == pytest.approx(0.00855, abs=1e-4)
    ends = np.quantile(means, [tail, 1 - tail])
    assert result.interval == pytest.approx(tuple(ends), abs=0.05)
    plain = np.quantile(means, [0.025, 0.975])
    assert result.interval.low < plain[0] - 0.05
    assert result.interval.high > plain[1] + 0.05


def test_weights_and_transform_give_a_perplexity():
    rng = np.random.default_rng(0)
    words = rng.integers(20, 200, size=80)
    loss_a = words * rng.normal(3.0, 0.3, size=80)
    loss_b = loss_a - words * 0.05
    result = stats.paired_difference(
        loss_a / words, loss_b / words, weights=words.astype(float), transform=np.exp
    )
    assert result.score_a == pytest.approx(math.exp(loss_a.sum() / words.sum()))
    assert result.score_b == pytest.approx(math.exp(loss_b.sum() / words.sum()))
    assert result.interval.low < result.difference < result.interval.high < 0
    assert result.stderr == pytest.approx((result.interval[1] - result.interval[0]) / 3.92, rel=0.1)
    assert stats.verdict(result, higher_is_better=False) == "improved"


def test_weighted_01_values_are_no_mcnemar():
    a, b = arms(20, lost=0, gained=8, right=5)
    result = stats.paired_difference(a, b, weights=[3.0] + [1.0] * 19)
    assert result.difference == pytest.approx(10 / 22)
    assert result.flips[:2] == (8, 0)
    assert result.test == "sign-flip"
    assert result.interval.low < result.difference < result.interval.high


def test_units_of_a_group_are_clusters_and_lone_documents():
    """Two passages of three documents and four documents alone are six units."""
    rng = np.random.default_rng(0)
    passages = stats.Part(np.zeros(6), rng.normal(size=6), None, [1, 1, 1, 2, 2, 2])
    alone = stats.Part(np.zeros(4), rng.normal(size=4))
    for parts in ([passages, alone], [alone, passages]):
        found = stats.combined_difference(parts)
        assert (found.documents, found.clusters, found.units) == (10, 6, 6)
    assert stats.combined_difference([alone, alone]).clusters is None
    # Two passages without a change: one gained and one lost of four.
    still = stats.paired_difference([1.0, 0.0] * 2, [1.0, 0.0] * 2, clusters=[1, 1, 2, 2])
    half = 1.959964 * math.sqrt(2 / 4 / 4)
    assert still.interval == pytest.approx((-half, half))


@pytest.mark.parametrize(("a", "b", "transform"), [
    ([0.0, 1.0, 0.0], [1.0, 1.0, 0.0], np.exp), ([0.5, 1.0, 0.0], [1.0, 1.0, 0.0], None),
    ([1.0, 1.0, 0.0], [0.5, 1.0, 0.0], None),
])  # fmt: skip
def test_other_values_than_answers_have_no_flips(a, b, transform):
    found = stats.paired_difference(a, b, transform=transform)
    assert (found.flips, found.test) == (None, "sign-flip")
    first, second = np.mean(a), np.mean(b)
    expected = second - first if transform is None else math.exp(second) - math.exp(first)
    assert found.difference == pytest.approx(expected)


def test_a_group_is_the_mean_of_its_tasks_resampled_apart():
    rng = np.random.default_rng(0)
    parts = [
        stats.Part(rng.normal(level, 1, n), rng.normal(level, 1, n) + 0.2)
        for level, n in ((0, 50), (100, 400))
    ]
    single = [stats.paired_difference(part.a, part.b) for part in parts]
    group = stats.combined_difference(parts)
    assert group.difference == pytest.approx(np.mean([one.difference for one in single]))
    assert group.stderr == pytest.approx(math.hypot(*(one.stderr for one in single)) / 2)
    # Levels that far apart would show if tasks were resampled: the interval would be dozens wide.
    assert group.interval[1] - group.interval[0] == pytest.approx(3.92 * group.stderr, rel=0.1)
    by_size = stats.combined_difference(parts, weights=[50, 400])
    whole = np.concatenate([part.b for part in parts]) - np.concatenate([p.a for p in parts])
    assert by_size.difference == pytest.approx(whole.mean())
    assert by_size.documents == 450


def test_group_of_01_tasks_reports_all_flips():
    parts = [stats.Part(*arms(100, lost=0, gained=8, right=9)) for _ in range(3)]
    group = stats.combined_difference(parts)
    assert group.flips[:2] == (24, 0)
    assert group.test == "sign-flip"  # each task within itself, which pooled flips forget
    assert group.p_value < 0.001
    assert stats.verdict(group) == "improved"


@pytest.mark.parametrize(("a", "b", "more", "message"), [
    ([], [], {}, "no documents"),
    ([1, 2], [1], {}, "found 2 and 1"),
    ([1, math.nan], [1, 2], {}, "document 1 has the value nan"),
    ([1, 2], [1, 2], {"weights": [1, 0]}, "weights must be positive"),
    ([1, 2], [1, 2], {"clusters": ["x", "x"]}, "one cluster"),
    ([1, 2], [1, 2], {"clusters": ["x"]}, "found 2 and 1"),
    ([[1, 2]], [[1, 2]], {}, "shape"),
])  # fmt: skip
def test_what_cannot_be_compared(a, b, more, message):
    with pytest.raises(ResultError, match=message):
        stats.paired_difference(a, b, **more)


def test_a_single_document_says_nothing():
    result = stats.paired_difference([0], [1])
    assert result.stderr == math.inf
    assert result.interval == (-math.inf, math.inf)
    assert stats.verdict(result) == "inconclusive"
    with pytest.raises(ResultError, match="no task"):
        stats.combined_difference([])
    with pytest.raises(ResultError, match="2 positive weights"):
        stats.combined_difference([stats.Part([0], [1])] * 2, weights=[1])


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, math.inf], [math.nan, 1], [1, 1, 1]])
def test_weights_of_tasks_that_cannot_be_used(weights):
    parts = [stats.Part([0.0, 1.0], [1.0, 1.0])] * 2
    with pytest.raises(ResultError, match="2 positive weights are needed"):
        stats.combined_difference(parts, weights=weights)


# -- single quantities -----------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_tail():
    a, b = arms(50, lost=1, gained=9, right=10)
    tail = 2 * sum(math.comb(10, k) for k in (0, 1)) / 2**10
    assert stats.mcnemar(a, b) == (9, 1, pytest.approx(tail))
    assert stats.mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)
    for one, other in (([0.5], [1]), ([1], [0.5])):
        with pytest.raises(ResultError, match="0 or 1"):
            stats.mcnemar(one, other)
    with pytest.raises(ResultError, match="found 2 and 1"):
        stats.mcnemar([1, 0], [1])


def test_mean_and_standard_error():
    values = np.arange(20.0)
    found = stats.estimate_mean(values)
    assert found.mean == pytest.approx(9.5)
    assert found.stderr == pytest.approx(scipy.stats.sem(values))
    assert found.interval.low < 9.5 < found.interval.high
    assert stats.standard_error(values) == pytest.approx(scipy.stats.sem(values))
    clustered = stats.standard_error(np.repeat(values, 3), clusters=[i // 3 for i in range(60)])
    assert clustered == pytest.approx(scipy.stats.sem(values))


def test_benjamini_hochberg_by_its_definition():
    p_values = [0.001, 0.02, 0.03, 0.04, 0.9]
    found = stats.benjamini_hochberg(p_values)
    by_hand = [min(p * 5 / (rank + 1) for rank, p in list(enumerate(p_values))[i:])
               for i in range(5)]  # fmt: skip
    assert found.adjusted == pytest.approx(by_hand)
    assert found.rejected.tolist() == [True, True, True, True, False]
    assert stats.benjamini_hochberg([]).rejected.shape == (0,)
    assert stats.benjamini_hochberg([0.0, 1.0]).adjusted.tolist() == [0, 1]
    for outside in (math.nan, -0.1, 1.1):
        with pytest.raises(ResultError, match="p-values must lie between 0 and 1"):
            stats.benjamini_hochberg([0.5, outside])


@given(hnp.arrays(float, st.integers(1, 20), elements=st.floats(0, 1)))
def test_benjamini_hochberg_never_lowers_a_p_value_and_keeps_the_order(p_values):
    adjusted = stats.benjamini_hochberg(p_values).adjusted
    assert (adjusted >= p_values - 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p_values)]) >= -1e-12).all()


def test_one_sided_p_per_head():
    rng = np.random.default_rng(0)
    changes = rng.normal(0.2, 1, size=(3, 80))
    theirs = scipy.stats.ttest_1samp(changes, 0, axis=1, alternative="greater").pvalue
    assert stats.one_sided_p(changes) == pytest.approx(theirs)
    still = np.array([[0.0] * 4, [0.1] * 4, [-0.1] * 4])
    assert stats.one_sided_p(still).tolist() == [1, 0, 1]
    two = np.array([[0.0, 1.0]])  # t = 1 of one degree of freedom, a quarter is above
    assert stats.one_sided_p(two) == pytest.approx([0.25])
    # Half of how far two values are apart is their mean's error: up to 1e-12 of it is rounding.
    rounding, spread = (np.array([[-0.1, -0.1 * (1 + size)]]) for size in (1.5e-12, 3e-12))
    assert stats.one_sided_p(rounding).tolist() == [1]
    assert 0.999 < stats.one_sided_p(spread)[0] < 1
    for unusable in (np.ones((3, 1)), np.ones(3), np.ones((1, 3, 2)), [[1.0, math.nan, 2.0]]):
        with pytest.raises(ResultError, match="2 documents"):
            stats.one_sided_p(unusable)


def test_spearman():
    assert stats.spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert stats.spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert stats.spearman([1, 2], [2, 1]) == pytest.approx(-1)
    assert math.isnan(stats.spearman([1, 2], [3, 3]))
    assert math.isnan(stats.spearman([3, 3], [1, 2]))
    with pytest.raises(ResultError, match="found 3 and 2"):
        stats.spearman([1, 2, 3], [1, 2])
    with pytest.raises(ResultError, match="two items"):
        stats.spearman([1], [1])


# -- scores of choices -----------------------------------------------------------------------------


def test_the_label_prior_is_taken_out():
    # The model likes choice 1 by 3 nats and knows the answers by 2: raw it always says 1.
    labels = np.array([0, 1, 0, 1, 0, 0])
    scores = np.zeros((6, 2))
    scores[:, 1] += 3
    scores[np.arange(6), labels] += 2
    found = stats.corrected_accuracy(scores, labels)
    assert (found.raw, found.corrected) == (pytest.approx(2 / 6), 1.0)
    assert found.raw_hits.tolist() == [0, 1, 0, 1, 0, 0]
    by_hand = scores - scores.sum(axis=0) / 6
    assert stats.label_prior_corrected(scores) == pytest.approx(by_hand)
    assert stats.label_prior_corrected(scores, prior=[0, 3])[0].tolist() == [2, 0]


@given(
    scores=hnp.arrays(float, (7, 3), elements=st.integers(-20, 20)),
    shift=hnp.arrays(float, 3, elements=st.integers(-50, 50)),
)
def test_a_shift_of_label_bias_earns_nothing_after_the_correction(scores, shift):
    moved = stats.label_prior_corrected(scores + shift)
    assert moved == pytest.approx(stats.label_prior_corrected(scores), abs=1e-9)
    assert moved.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-9)


def test_of_equal_scores_the_first_choice_wins_as_in_lm_eval():
    found = stats.corrected_accuracy(np.zeros((2, 3)), [0, 1])
    assert found.raw_hits.tolist() == [1, 0]


@given(
    scores=hnp.arrays(float, (5, 4), elements=st.floats(-50, 0)),
    labels=st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_a_positive_margin_is_a_right_answer(scores, labels):
    margin = stats.answer_margin(scores, labels)
    hits = stats.corrected_accuracy(scores, labels).raw_hits
    assert (hits[margin > 0] == 1).all()
    assert (hits[margin < 0] == 0).all()
    for row, label in enumerate(labels):
        rest = max(scores[row, c] for c in range(4) if c != label)
        assert margin[row] == pytest.approx(scores[row, label] - rest)


@pytest.mark.parametrize(("scores", "labels", "message"), [
    ([[0.0, -math.inf]], [0], "document 0, choice 1"),
    ([[0.0, 1.0]], [2], "from 0 to 1"),
    ([[0.0, 1.0]], [0, 1], "from 0 to 1"),
    ([[0.0, 1.0]], [0.0], "from 0 to 1"),
    ([0.0, 1.0], [0], "shape"),
])  # fmt: skip
def test_scores_that_cannot_be_used(scores, labels, message):
    with pytest.raises(ResultError, match=message):
        stats.corrected_accuracy(scores, labels)
    with pytest.raises(ResultError):
        stats.answer_margin(scores, labels)


def test_a_margin_needs_two_choices():
    with pytest.raises(ResultError, match="document 0: a margin needs"):
        stats.answer_margin(np.zeros((2, 1)), [0, 0])
    ragged = [[-1.0, -3.0, -math.inf], [-1.0, -2.0, -4.0]]
    assert stats.answer_margin(ragged, [0, 2]).tolist() == [2, -3]
    with pytest.raises(ResultError, match="document 0: a margin needs"):
        stats.answer_margin(ragged, [2, 0])
