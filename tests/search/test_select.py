"""The four rules and the random sets, by hand-worked numbers."""

from __future__ import annotations

import pytest
from hand_sets import A, B, C, D, recipe, sets

from act_harness.errors import InternalError
from act_harness.evidence.stats import paired_difference
from act_harness.search.choose.effects import HeadEffect
from act_harness.search.choose.select import (
    Selection,
    best_of_each_head,
    random_sets,
    refitted,
    select_heads,
)


def effect(place, value, *, p=0.5, accuracy=0.5, stderr=0.25):
    return HeadEffect(*place, value, stderr, p, accuracy, ())


FOUR = [effect(D, 0.1), effect(A, 0.4), effect(C, 0.2), effect(B, 0.3)]
"""Best first: A, B, C, D."""


def choose(given, effects=FOUR, *, verify=None, baseline=0.5):
    return select_heads(effects, given, baseline_accuracy=baseline, verify=verify, resamples=99)


def top(**changes):
    return recipe(top={"sizes": [1, 2, 3], **changes.pop("top", {})}, **changes)


def test_each_head_keeps_its_best_mass_map():
    other = (0, 0, 1)
    found = best_of_each_head([effect(other, 0.5), effect(A, 0.4), effect(B, 0.5), effect(C, -1)])
    assert [e.place for e in found] == [other, B, C]  # of equal effects the first place leads
    assert best_of_each_head([effect(A, 0.4), effect(other, 0.4)])[0].place == A


def test_top_takes_the_size_that_is_best_on_verify():
    verify = sets({(): "1000", (A,): "1100", (A, B): "1111", (A, B, C): "1110"})
    found = choose(top(), verify=verify)
    assert found.places == (A, B)
    assert found.trace["criterion"] == "accuracy"
    assert found.trace["untouched"] == 0.25
    assert found.trace["chosen"] == 2
    assert found.trace["reason"] == (
        "2 heads: the highest raw accuracy on the verify documents, 100.0% against 25.0% without "
        "heads (of equals the fewest)"
    )
    assert [(one["heads"], one["value"]) for one in found.trace["tried"]] == [
        (1, 0.5), (2, 1.0), (3, 0.75),
    ]  # fmt: skip
    assert found.trace["tried"][1]["accuracy"] == 1.0
    oracle = paired_difference([1, 0, 0, 0], [1, 1, 0, 0], resamples=99).interval
    assert found.trace["tried"][0]["interval"] == pytest.approx(list(oracle), abs=1e-6)


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (("1100", "1010", "0110", "0011"), 0),  # as good as no heads is no improvement
        (("1100", "1110", "0111", "1011"), 1),  # of equal sizes the smallest
        (("1100", "0100", "1111", "1111"), 2),
        (("1100", "0100", "0000", "0001"), 0),
    ],
)
def test_a_tie_is_no_improvement(answers, chosen):
    places = [(), (A,), (A, B), (A, B, C)]
    found = choose(top(), verify=sets(dict(zip(places, answers, strict=True))))
    assert found.places == (A, B, C)[:chosen]
    assert found.trace["chosen"] == chosen
    assert ("no heads" in found.trace["reason"]) is (chosen == 0)


def test_only_heads_of_positive_effect_are_candidates():
    effects = [effect(A, 0.4), effect(B, 0.0), effect(C, -0.1)]
    found = choose(top(), effects, verify=sets({(): "10", (A,): "11"}))
    assert [one["heads"] for one in found.trace["tried"]] == [1]
    nothing = choose(top(), [effect(A, -1.0)], verify=sets({(): "10"}))
    assert (nothing.places, nothing.trace["tried"]) == ((), [])


def test_sizes_above_the_number_of_heads_are_that_number():
    verify = sets({(): "10", (A, B): "10", (A, B, C, D): "11"})
    found = choose(recipe(top={"sizes": [2, 9, 50]}), verify=verify)
    assert [one["heads"] for one in found.trace["tried"]] == [2, 4]
    assert found.places == (A, B, C, D)


def margins(*values):
    return [[-1.0, -1.0 - value] for value in values]


BIAS = {
    (): margins(0.5, -0.5, -0.6, -0.7),  # less their mean of -0.325: one is above 0
    (A,): margins(8, 8, 8, 9),  # every answer becomes the first; less 8.25: one
    (A, B): margins(0.5, -0.01, -0.02, -3),  # less -0.6325: three
    (A, B, C): margins(0.5, -0.5, -0.6, -0.7),
}
"""The first choice is right everywhere: raw 0.25, 1, 0.25, 0.25."""


@pytest.mark.parametrize(
    ("objective", "criterion", "taken", "values"),
    [
        ("margin", "accuracy", (A,), [1.0, 0.25, 0.25]),
        ("corrected", "objective", (A, B), [0.25, 0.75, 0.25]),
    ],
)
def test_the_objective_decides_which_accuracy_chooses(objective, criterion, taken, values):
    given = top(objective=objective)
    found = choose(given, verify=sets(BIAS, given))
    assert found.places == taken
    assert (found.trace["criterion"], found.trace["untouched"]) == (criterion, 0.25)
    assert [one["value"] for one in found.trace["tried"]] == values
    assert [one["accuracy"] for one in found.trace["tried"]] == [1.0, 0.25, 0.25]
    assert [one["corrected_accuracy"] for one in found.trace["tried"]] == [0.25, 0.75, 0.25]
    name = {"accuracy": "raw accuracy", "objective": "label-prior corrected accuracy"}[criterion]
    assert f"the highest {name} on the verify documents" in found.trace["reason"]


def test_where_choices_differ_the_corrected_objective_chooses_by_raw_accuracy():
    given = top(objective="corrected")
    found = choose(given, verify=sets(BIAS, given, loose=True))
    assert found.places == (A,)
    assert [one["corrected_accuracy"] for one in found.trace["tried"]] == [None] * 3


def test_the_margin_criterion_chooses_by_the_standardised_change():
    """Untouched margins 1 and -1, spread sqrt(2)."""
    answers = {
        (): [[-1.0, -2.0], [-2.0, -1.0]],
        (A,): [[-1.0, -3.0], [-2.0, -1.0]],  # changes 1 and 0
        (A, B): [[-1.0, -2.0], [-1.0, -1.5]],  # changes 0 and 1.5, and one more right
        (A, B, C): [[-1.0, -2.0], [-1.0, -1.2]],  # 0 and 1.2
    }
    given = top(top={"sizes": [1, 2, 3], "criterion": "margin"})
    found = choose(given, verify=sets(answers, given))
    assert found.trace["criterion"] == "margin"
    values = [one["value"] for one in found.trace["tried"]]
    assert values == pytest.approx([0.5 / 2**0.5, 0.75 / 2**0.5, 0.6 / 2**0.5], abs=1e-6)
    assert (found.places, found.trace["untouched"]) == ((A, B), 0.0)
    assert "the highest margin on the verify documents, 0.530 against" in found.trace["reason"]


def test_rules_that_choose_on_verify_need_it():
    for rule in ("top", "joint"):
        with pytest.raises(InternalError, match=f"rule '{rule}' needs a verify split"):
            choose(recipe(rule=rule))


def test_paper_takes_every_head_above_the_baseline():
    effects = [
        effect(A, -1, accuracy=0.6), effect(B, 1, accuracy=0.5), effect(C, 0, accuracy=0.7),
        effect((0, 1, 1), -1, accuracy=0.65), effect((0, 0, 1), 9, accuracy=0.55),
        effect(D, 1, accuracy=0.4),
    ]  # fmt: skip
    found = choose(recipe(rule="paper"), effects)
    assert found.places == (C, (0, 1, 1), A)  # equal to the baseline is not above it
    assert found.trace == {"baseline_accuracy": 0.5}
    tied = choose(recipe(rule="paper"), [effect(B, 0, accuracy=0.7), effect(A, 0, accuracy=0.7)])
    assert tied.places == (A, B)
    assert choose(recipe(rule="paper"), [effect(A, 1, accuracy=0.5)]).places == ()
    maps = [effect(A, 0, accuracy=0.7), effect((0, 0, 1), 9, accuracy=0.7)]
    assert choose(recipe(rule="paper"), maps).places == (A,)
    third = choose(recipe(rule="paper"), [effect(A, 0)], baseline=1 / 3)
    assert third.trace == {"baseline_accuracy": 0.333333}


@pytest.mark.parametrize(
    ("ps", "taken"),
    [
        ((0.01, 0.02, 0.03, 0.5), [A, B, C]),  # thresholds 0.0125, 0.025, 0.0375, 0.05
        ((0.04, 0.04, 0.5, 0.5), []),  # each below 0.05, none below its threshold
        ((0.03, 0.03, 0.035, 0.5), [A, B, C]),  # the third passes and takes the others along
        ((0.0, 1.0, 0.02, 1.0), [A, C]),
    ],
)
def test_significant_bounds_the_share_of_false_discoveries(ps, taken):
    effects = [effect(p, v, p=q) for p, v, q in zip((A, B, C, D), (4, 3, 2, 1), ps, strict=True)]
    found = choose(recipe(rule="significant"), effects)
    assert list(found.places) == taken
    assert found.trace == {"tests": 4, "q": 0.05}


def test_significant_counts_every_mass_map_as_a_test():
    twice = [effect(A, 1, p=0.04), effect((0, 0, 1), 2, p=0.9)]
    assert choose(recipe(rule="significant"), twice[:1]).places == (A,)
    assert choose(recipe(rule="significant"), twice).places == ()
    both = [effect(A, 1, p=0.01), effect((0, 0, 1), 2, p=0.02), effect(B, 3, p=0.9)]
    assert choose(recipe(rule="significant"), both).places == ((0, 0, 1),)
    wide = recipe(rule="significant", significant={"q": 0.1})
    assert choose(wide, twice).places == (A,)


def joint(patience=2, candidates=4, **changes):
    return recipe(rule="joint", joint={"patience": patience, "candidates": candidates}, **changes)


def test_joint_adds_what_improves_and_drops_what_then_hurts():
    """B is a tie and stays out; with C and D in, A hurts."""
    verify = sets(
        {
            (): "10000", (A,): "11000", (A, B): "10100", (A, C): "11100", (A, C, D): "11110",
            (C, D): "11111", (D,): "10000",
        }
    )  # fmt: skip
    found = choose(joint(), verify=verify)
    assert found.places == (C, D)
    assert found.trace["criterion"] == "accuracy"
    assert found.trace["steps"] == [
        {"add": list(A), "value": 0.4, "kept": True},
        {"add": list(B), "value": 0.4, "kept": False},
        {"add": list(C), "value": 0.6, "kept": True},
        {"add": list(D), "value": 0.8, "kept": True},
        {"drop": list(A), "value": 1.0, "kept": False},
        {"drop": list(C), "value": 0.2, "kept": True},
    ]


def test_joint_prunes_only_for_an_improvement():
    """Dropping A or C ties: both stay. The last one added needs no second look."""
    verify = sets(
        {
            (): "1000",
            (A,): "1100",
            (A, B): "1110",
            (A, B, C): "1111",
            (B, C): "1111",
            (A, C): "1111",
        }
    )
    found = choose(joint(candidates=3), verify=verify)
    assert found.places == (A, B, C)
    drops = [step for step in found.trace["steps"] if "drop" in step]
    assert [(step["drop"], step["kept"]) for step in drops] == [(list(A), True), (list(B), True)]


@pytest.mark.parametrize(("patience", "taken"), [(1, (A,)), (2, (A,)), (3, (A, D))])
def test_joint_stops_after_so_many_heads_in_a_row(patience, taken):
    verify = sets(
        {(): "100", (A,): "110", (A, B): "100", (A, C): "110", (A, D): "111", (D,): "110"}
    )
    found = choose(joint(patience), verify=verify)
    assert found.places == taken
    assert sum("add" in step for step in found.trace["steps"]) == {1: 2, 2: 3, 3: 4}[patience]


def test_joint_counts_misses_anew_after_a_head_that_helped():
    verify = sets(
        {(): "1000", (A,): "0100", (B,): "1100", (B, C): "1100", (B, D): "1110", (D,): "1000"}
    )
    assert choose(joint(patience=2), verify=verify).places == (B, D)


def test_joint_tries_the_candidates_alone_and_starts_from_no_heads():
    verify = sets({(): "100", (A,): "100", (B,): "010"})
    found = choose(joint(candidates=2), verify=verify)
    assert found.places == ()
    assert len(found.trace["steps"]) == 2


@pytest.mark.parametrize(("objective", "taken"), [("margin", (A,)), ("corrected", ())])
def test_joint_chooses_by_the_objective(objective, taken):
    given = joint(candidates=1, objective=objective)
    found = choose(given, verify=sets({key: BIAS[key] for key in [(), (A,)]}, given))
    assert found.places == taken


def test_a_refit_takes_as_many_heads_in_the_new_order():
    before = Selection((A, B), {"chosen": 2})
    effects = [effect(C, 0.9, stderr=0.123456789), effect(A, 0.5), effect(B, 0.4), effect(D, -1)]
    found = refitted(before, effects, 77)
    assert found.places == (C, A)
    record = found.trace["refit"]
    assert found.trace["chosen"] == 2
    assert (record["documents"], record["kept"]) == (77, 1)
    assert record["before"] == [list(A), list(B)]
    assert record["columns"] == ["layer", "head", "strength", "effect", "stderr"]
    assert record["rows"][0] == [*C, 0.9, 0.123457]
    assert len(record["rows"]) == 4
    assert refitted(before, [effect(C, 1.0), effect(A, -1)], 3).places == (C,)


GRID = {layer: tuple(range(8)) for layer in range(5)}


def test_random_sets_are_drawn_from_all_searched_heads():
    places = ((0, 1, 0), (2, 3, 1), (4, 5, 0))
    given = recipe(controls={"random_sets": 200, "seed": 3})
    drawn = random_sets(Selection(places), GRID, given)
    assert len(drawn) == 200
    assert all(len({place[:2] for place in one}) == 3 for one in drawn)
    assert all(sorted(place[2] for place in one) == [0, 0, 1] for one in drawn)
    assert len(set(drawn)) > 195
    assert {p[:2] for one in drawn for p in one} == {(n, h) for n in GRID for h in GRID[n]}
    assert all(one == tuple(sorted(one)) for one in drawn)
    # nothing prefers the selected heads: 3 of 40 places, 600 draws, 45 expected
    again = sum(place[:2] in {p[:2] for p in places} for one in drawn for place in one)
    assert 20 <= again <= 75
    amplified = {p[:2] for one in drawn for p in one if p[2] == 1}
    assert len(amplified) > 30  # maps are handed out, not tied to a head


def test_random_sets_depend_on_their_seed_alone():
    chosen = Selection(((0, 1, 0), (2, 3, 0)))

    def draw(count, seed=0, selection=chosen):
        given = recipe(controls={"random_sets": count, "seed": seed})
        return random_sets(selection, GRID, given)

    assert draw(5)[:2] == draw(2)
    assert draw(3) != draw(3, seed=1)
    assert draw(3) == draw(3, selection=Selection(((4, 4, 0), (3, 3, 0))))
    assert draw(0) == draw(3, selection=Selection(())) == []
