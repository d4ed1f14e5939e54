"""From scores to effects, by hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hand_sets import A, B, documents

from act_harness.errors import InternalError
from act_harness.search.choose.effects import (
    HeadEffect,
    TaskScores,
    as_rows,
    both_splits,
    head_effects,
)
from act_harness.search.documents import Document

SCORES = [[-1.0, -2.0, -4.0], [-3.0, -1.0, -2.0]]
"""Means of the columns: -2, -1.5, -3. Corrected: 1, -0.5, -1 and -1, 0.5, 1."""


def three(rights=(0, 2), choices=("a", "b", "c")):
    request = (((1,), (2,)),) * 3
    return [Document("t", f"{n:08x}", request, right, choices) for n, right in enumerate(rights)]


def two(scores, objective="margin", rights=None):
    """A task of two choices; the margin of a row is its first score minus the second."""
    found = documents(len(scores))
    task = TaskScores.of(found, scores, objective=objective)
    if rights is None:
        return task
    return TaskScores(task.task, task.scores, np.array(rights), task.fixed, objective)


def test_margins_and_hits_before_and_after_the_label_prior():
    plain = TaskScores.of(three(), SCORES, objective="margin")
    assert plain.fixed
    assert plain.margins(plain.scores).tolist() == [1.0, -1.0]
    arm = plain.arm(plain.scores)
    assert arm.hits.tolist() == [1.0, 0.0]
    assert arm.corrected_hits.tolist() == [1.0, 1.0]
    assert (arm.accuracy, arm.corrected) == (0.5, 1.0)
    assert arm.margins.tolist() == [1.0, -1.0]
    prior = TaskScores.of(three(), SCORES, objective="corrected")
    assert prior.margins(prior.scores).tolist() == [1.5, 0.5]
    assert prior.arm(prior.scores).hits.tolist() == [1.0, 0.0]  # raw stays raw


def test_choices_that_differ_have_no_label_prior():
    texts = [
        Document("t", "0", (((1,), (2,)),) * 3, 0, ("a", "b", "c")),
        Document("t", "1", (((1,), (2,)),) * 3, 2, ("a", "b", "d")),
    ]
    for found, scores in (
        (texts, SCORES),
        ([three()[0], Document("t", "1", (((1,), (2,)),) * 2, 1, ("a", "b"))],
         [SCORES[0], [-3.0, -1.0]]),
    ):  # fmt: skip
        task = TaskScores.of(found, scores, objective="corrected")
        assert not task.fixed
        arm = task.arm(task.scores)
        assert arm.corrected is arm.corrected_hits is None
        assert arm.margins[0] == 1.0  # as with objective margin
    assert arm.margins[1] == 2.0  # the choice that is not there is no rival
    with pytest.raises(InternalError, match="another number of scores"):
        TaskScores.of(three(), [SCORES[0], [-1.0, -2.0]], objective="margin")


def test_a_choice_that_is_not_there_makes_no_label_prior():
    """Also where the documents name no texts of their choices."""
    found = [three(choices=())[0], Document("t", "1", (((1,), (2,)),) * 2, 1)]
    assert not TaskScores.of(found, [SCORES[0], [-3.0, -1.0]], objective="corrected").fixed
    assert TaskScores.of(three(choices=()), SCORES, objective="corrected").fixed


def test_the_spread_is_the_sample_standard_deviation():
    assert two([[0, -1], [0, -3], [0, -5]]).spread == pytest.approx(2.0)
    assert two([[0, -1], [0, -1]]).spread == 1.0
    assert two([[0, -7]]).spread == 1.0


def test_an_effect_is_the_mean_of_standardised_changes():
    """Margins 1, 3, 5 (spread 2) and 10, 30 (spread 14.142); hand-worked below."""
    first, second = two([[0, -1], [0, -3], [0, -5]]), two([[0, -10], [0, -30]])
    changes = [np.array([[1.0, 0], [2, 0], [6, 0]]), np.array([[0.0, 4], [0, -2]])]
    (effect,) = head_effects([first, second], {A: changes})
    spread = math.sqrt(200)
    assert effect.place == A
    assert effect.effect == pytest.approx((3 / 2 + -1 / spread) / 2)
    # changes 1, 2, 6: deviation sqrt(7), error sqrt(7 / 3); changes -4, 2: sqrt(18 / 2) = 3
    errors = math.sqrt(7 / 3) / 2, 3 / spread
    stderr = math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2
    assert effect.stderr == pytest.approx(stderr)
    assert effect.p == pytest.approx(scipy.stats.t.sf(effect.effect / stderr, 3))
    one, other = effect.tasks
    assert (one.n, one.margin_change) == (3, 3.0)
    assert one.p == pytest.approx(
        scipy.stats.ttest_1samp([1, 2, 6], 0, alternative="greater").pvalue
    )
    assert (other.n, other.margin_change) == (2, -1.0)
    assert other.p == pytest.approx(
        scipy.stats.ttest_1samp([-4, 2], 0, alternative="greater").pvalue
    )


def test_accuracy_is_the_mean_over_tasks_not_over_documents():
    first = two([[0, -1], [0, 1], [0, 1], [0, 1]])  # 1 of 4 is right
    second = two([[0, -1], [0, -1]])  # 2 of 2
    (effect,) = head_effects([first, second], {A: [np.zeros((4, 2)), np.zeros((2, 2))]})
    assert effect.accuracy == pytest.approx(0.625)
    assert [row.accuracy for row in effect.tasks] == [0.25, 1.0]
    (moved,) = head_effects([first], {A: [np.array([[0.0, 0], [2, 0], [0, 0], [0, 0]])]})
    assert moved.accuracy == 0.5


def test_a_shift_of_the_label_bias_earns_nothing_under_the_corrected_objective():
    """Both labels are right once; the head favours the first one, everywhere alike."""
    scores, rights = [[0, -1], [0, 1], [0, 1]], [0, 1, 0]
    shift = np.array([[1.0, 0]] * 3)
    plain, prior = two(scores, rights=rights), two(scores, "corrected", rights=rights)
    (raw,) = head_effects([plain], {A: [shift]})
    (corrected,) = head_effects([prior], {A: [shift]})
    assert raw.effect == pytest.approx((1 - 1 + 1) / 3 / plain.spread)
    assert corrected.effect == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("change", "p"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_equal_changes_leave_no_chance(change, p):
    task = two([[0, -1], [0, -2], [0, -3]])
    (effect,) = head_effects([task], {A: [np.array([[change, 0]] * 3)]})
    assert (effect.p, effect.tasks[0].p) == (p, p)


def test_one_document_has_no_error_and_effects_come_in_order():
    task = two([[0, -2]])
    found = head_effects([task], {B: [np.array([[1.0, 0]])], A: [np.array([[-1.0, 0]])]})
    assert [effect.place for effect in found] == [A, B]
    assert [effect.effect for effect in found] == [-1.0, 1.0]
    assert [effect.stderr for effect in found] == [0.0, 0.0]


def test_both_splits_are_one_longer_task():
    short = TaskScores.of(documents(2), [[0, -1], [0, -3]], objective="margin")
    wide = TaskScores.of(three(), SCORES, objective="margin")
    moves = np.array([[1.0, 0], [0, 0]]), np.ones((2, 3))
    tasks, changes = both_splits(([short], {A: [moves[0]]}), ([wide], {A: [moves[1]]}))
    assert tasks[0].scores.tolist() == [[0, -1, -np.inf], [0, -3, -np.inf], *SCORES]
    assert tasks[0].right.tolist() == [0, 0, 0, 2]
    assert not tasks[0].fixed
    assert changes[A][0].tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]]
    same, _ = both_splits(([short], {A: [moves[0]]}), ([short], {A: [moves[0]]}))
    assert same[0].fixed


def test_the_table_names_its_columns():
    task = two([[0, -1], [0, -3]])
    effects = head_effects([task], {B: [np.array([[1 / 3, 0], [0, 0]])]})
    table = as_rows(effects, ["t"])
    one = effects[0]
    row = dict(zip(table["heads"]["columns"], table["heads"]["rows"][0], strict=True))
    assert (row["layer"], row["head"], row["strength"]) == B
    assert row["effect"] == float(f"{one.effect:.6g}") == 0.117851
    assert (row["stderr"], row["p"]) == tuple(float(f"{v:.6g}") for v in (one.stderr, one.p))
    assert row["accuracy"] == 1.0
    part = dict(zip(table["by_task"]["columns"], table["by_task"]["rows"][0], strict=True))
    assert (part["layer"], part["head"], part["strength"]) == B
    assert (part["task"], part["n"], part["accuracy"]) == ("t", 2, 1.0)
    assert part["corrected_accuracy"] == one.tasks[0].corrected
    assert part["margin_change"] == 0.166667
    assert part["p"] == float(f"{one.tasks[0].p:.6g}")
    assert isinstance(one, HeadEffect)
