"""What a search says its set is worth: every figure by hand or by an independent computation."""

from __future__ import annotations

import pytest
import scipy.stats
from hand_sets import A, B, C, documents, outcome, recipe, rows, sets, two_tasks

from act_harness.bench.null_search import _Memory
from act_harness.evidence.stats import paired_difference
from act_harness.search.choose.effects import HeadEffect
from act_harness.search.choose.judgement import LEVEL, conclude, describe, judgement
from act_harness.search.choose.select import Selection
from act_harness.search.choose.sets import Outcome, SetMeasurement, make_heads
from act_harness.support.processes import Processes


def changed(gained, lost, kept=30):
    """Return before and after of documents of which so many become right and wrong."""
    return "0" * gained + "1" * lost + "1" * kept, "1" * gained + "0" * lost + "1" * kept


def judged(before, after, drawn=(), **options):
    others = [outcome(before, one) for one in drawn]
    found = outcome(before, after, **options)
    return judgement(found, others, chosen_by="accuracy", heads=1, resamples=199)


def columns_of(found, key="verdict"):
    return {name: one[key] for name, one in found["columns"].items()}


@pytest.mark.parametrize(
    ("gained", "lost", "said"),
    [
        (10, 2, "improved"),  # exact McNemar: 2 * P(at most 2 of 12) = 0.0386
        (9, 2, "inconclusive"),  # 0.0654
        (2, 10, "regressed"),
        (5, 0, "inconclusive"),  # 0.0625, though the interval excludes 0
        (6, 0, "improved"),  # 0.03125
        (0, 0, "inconclusive"),
        (3, 3, "inconclusive"),
    ],
)
def test_beats_untouched_is_a_test_and_no_comparison_of_two_numbers(gained, lost, said):
    before, after = changed(gained, lost)
    found = judged(before, after, loose=True)["columns"]["raw"]
    flips = gained + lost
    assert found["p"] == pytest.approx(
        scipy.stats.binomtest(gained, flips).pvalue if flips else 1.0, rel=1e-3
    )
    assert found["verdict"] == said
    assert found["difference"] == pytest.approx((gained - lost) / len(before), abs=1e-6)
    assert found["untouched"] == pytest.approx(before.count("1") / len(before), abs=1e-6)
    assert found["selected"] == pytest.approx(after.count("1") / len(before), abs=1e-6)
    low, high = found["interval"]
    oracle = paired_difference([int(x) for x in before], [int(x) for x in after])
    assert (low, high) == pytest.approx(tuple(oracle.interval), abs=1e-6)
    assert found["interval_includes_zero"] is (low <= 0 <= high)
    assert found["confidence"] == 1 - LEVEL


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"),
    [
        (10, 2, "beats the untouched model"),
        (2, 10, "worse than the untouched model in raw accuracy"),
        (6, 5, "not shown to beat the untouched model"),
    ],
)
def test_the_record_says_it_in_words(gained, lost, verdict):
    found = judged(*changed(gained, lost), loose=True)
    assert found["verdict"] == verdict
    assert found["beats_untouched"] == {"raw": gained == 10}
    assert found["beats_random"] == {"raw": None}
    assert found["interval_includes_zero"] is (gained == 6)
    assert (found["level"], found["heads"]) == (0.05, 1)
    assert found["documents"] == {"t": 30 + gained + lost}
    assert (
        describe(found)[0]
        == f"{verdict} ({30 + gained + lost} documents that chose nothing, level 0.05)"
    )


RIGHT, NONE = "1" * 8 + "0" * 8, "0" * 16


@pytest.mark.parametrize(
    ("counts", "p", "level", "beaten"),
    [
        ([7, 3, 7, 0], 0.2, 0.2, True),  # all four are below 8
        ([7, 3, 8, 0], 0.4, 0.2, False),  # an equal one is not beaten
        ([9, 3, 7, 0], 0.4, 0.2, False),  # one of four is above: all must be beaten
        ([9, 9, 9, 9], 1.0, 0.2, False),
        ([7] * 19, 0.05, 0.05, True),
        ([7] * 18 + [8], 0.1, 0.05, False),
        ([7] * 38 + [9], 0.05, 0.05, True),  # 39 sets: one above is within 5 %
        ([7] * 37 + [9, 9], 0.075, 0.05, False),
        ([7], 0.5, 0.5, True),
    ],
)
def test_beats_random_is_a_rank_at_a_stated_level(counts, p, level, beaten):
    drawn = ["1" * count + "0" * (16 - count) for count in counts]
    found = judged(NONE, RIGHT, drawn, loose=True)
    one = found["columns"]["raw"]["random_sets"]
    assert one["p"] == pytest.approx(p, abs=1e-6)
    assert one["level"] == pytest.approx(level, abs=1e-6)
    assert one["beaten"] is beaten is found["beats_random"]["raw"]
    assert one["scores"] == [count / 16 for count in counts]
    assert found["chosen_by"]["random_sets"] == one["scores"]
    said = describe(found)[2]
    assert ("does not beat" in said) is not beaten
    assert f"{len(counts)} random sets" in said
    assert f"best {100 * max(counts) / 16:.1f} %" in said
    assert f"mean {100 * sum(counts) / 16 / len(counts):.1f} %" in said


def test_raw_and_corrected_are_of_the_same_tasks_and_the_rest_is_named():
    """Fixed: raw 1/4 to 2/4, margins 1 and -1. Loose: 1/2 to 2/2."""
    found = two_tasks(("1000", "1100"), ("10", "11"))
    assert found.readings() == ["raw", "corrected", "raw_other_tasks"]
    result = judgement(found, [], chosen_by="accuracy", heads=2, resamples=99)
    assert columns_of(result, "tasks") == {
        "raw": ["fixed"], "corrected": ["fixed"], "raw_other_tasks": ["loose"],
    }  # fmt: skip
    assert columns_of(result, "untouched") == {
        "raw": 0.25, "corrected": 0.25, "raw_other_tasks": 0.5,
    }  # fmt: skip
    assert columns_of(result, "selected") == {"raw": 0.5, "corrected": 0.5, "raw_other_tasks": 1.0}
    assert found.corrected == 0.5  # nothing raw stands in for the loose task
    assert found.accuracy == 0.75
    assert found.score("accuracy") == 0.75
    assert found.score("objective") == 0.75
    assert result["chosen_by"]["untouched"] == 0.375
    assert result["chosen_by"]["difference"] == 0.375
    assert result["documents"] == {"fixed": 4, "loose": 2}
    assert any("all tasks, what the set was chosen by: 37.5 %" in line for line in describe(result))
    by_task = result["selected_by_task"]
    assert by_task["loose"]["corrected_accuracy"] is None
    assert by_task["loose"]["accuracy"] == 1.0
    # margins of the fixed task: one of four moves by 2
    assert by_task["fixed"]["margin_change"] == 0.5
    assert result["untouched_by_task"]["fixed"] == {
        "accuracy": 0.25, "corrected_accuracy": 0.25, "margin_change": 0.0,
    }  # fmt: skip
    loose = outcome("10", "11", loose=True)
    assert loose.readings() == ["raw"]
    assert loose.corrected is None
    assert loose.tasks_of("raw") == ["t"]
    assert outcome("10", "11").readings() == ["raw", "corrected"]


def test_the_objective_reads_corrected_where_it_can():
    """A shift of all labels: raw from 1/4 to 1, corrected stays 1/4 whichever way it is read."""
    answers = {(): [[-1, -1.5], [-1.5, -1], [-1.6, -1], [-1.7, -1]],
               (A,): [[-1, -9], [-1, -9], [-1, -9], [-1, -10]]}  # fmt: skip
    found = sets(answers).outcomes([[A]])[0]
    assert [found.score(name) for name in ("raw", "accuracy")] == [1.0, 1.0]
    assert [found.score(name) for name in ("corrected", "objective")] == [0.25, 0.25]
    assert found.difference("corrected", resamples=9).difference == 0
    assert found.difference("raw", resamples=9).difference == 0.75
    assert found.untouched().score("corrected") == 0.25
    assert found.to_json() == {"accuracy": 1.0, "corrected_accuracy": 0.25, "effect": 15.4219}


def test_margins_are_standardised_before_they_are_averaged():
    """Margins 1, -1 (spread sqrt 2) and 10, -10 (spread sqrt 200), moved by 1 and by 10."""
    tasks = {"one": documents(2, task="one"), "ten": documents(2, task="ten")}

    def score(places, given):
        size = 1.0 if given[0].task == "one" else 10.0
        move = size * len(places)
        return [[0.0, -size - move], [0.0, size - move]]

    found = SetMeasurement(score, recipe(), tasks, _Memory(), Processes()).outcomes([[A]])[0]
    assert found.score("margin") == pytest.approx(1 / 2**0.5)
    assert found.difference("margin", resamples=99).difference == pytest.approx(1 / 2**0.5)
    assert found.by_task()["ten"]["margin_change"] == 10.0
    assert found.tasks_of("margin") == ["one", "ten"]


def test_columns_may_disagree_and_the_verdict_says_which():
    """The prior's shift makes everything right; corrected, as many are lost as gained."""
    before = [[0.0, 0.5 + 0.01 * n] for n in range(40)]  # all wrong, just
    after = [[0.0, -5 + 0.01 * n] for n in range(40)]  # all right, the order kept
    found = sets({(): before, (A,): after}).outcomes([[A]])[0]
    result = judgement(found, [], chosen_by="accuracy", heads=1, resamples=199)
    assert columns_of(result) == {"raw": "improved", "corrected": "inconclusive"}
    assert result["verdict"] == "beats the untouched model in raw accuracy only"
    assert result["beats_untouched"] == {"raw": True, "corrected": False}
    assert result["interval_includes_zero"] is True
    swapped = [[0.0, -5 - 0.01 * (n % 20) - 10 * (n < 4)] for n in range(40)]
    found = sets({(): before, (A,): swapped}).outcomes([[A]])[0]
    result = judgement(found, [], chosen_by="accuracy", heads=1, resamples=199)
    assert columns_of(result) == {"raw": "improved", "corrected": "regressed"}
    assert result["verdict"] == (
        "beats the untouched model in raw accuracy only, worse in label-prior corrected accuracy"
    )


FOUR = [HeadEffect(*place, value, 0.1, 0.5, 0.5, ()) for place, value in ((A, 3), (B, 2), (C, 1))]
GRID = {0: (0, 1), 1: (0, 1)}


def no_refit(selection):
    raise AssertionError(selection)


def finish(given, verify, judge, refit=no_refit):
    return conclude(
        FOUR, given, baseline_accuracy=0.5, grid=GRID, verify=verify, judge=judge, refit=refit,
        resamples=99,
    )  # fmt: skip


def test_the_set_is_chosen_on_verify_and_judged_on_judge():
    """The judge split would have chosen another size, and says that this one is worse."""
    given = recipe(top={"sizes": [1, 2]})
    verify = sets({(): "1100", (A,): "1110", (A, B): "1100"})
    judge = sets({(): "1" * 12, (A,): "1" * 4 + "0" * 8})
    selection, found = finish(given, verify, judge)
    assert selection.places == (A,)
    assert found["verdict"].startswith("worse than the untouched model")
    assert found["documents"] == {"t": 12}
    assert found["columns"]["raw"]["untouched"] == 1.0
    assert found["heads"] == 1


def test_the_set_behind_the_refit_is_judged():
    given = recipe(top={"sizes": [1], "refit": True})
    verify = sets({(): "1100", (A,): "1110"})
    judge = sets({(): "000000", (B,): "111111"})
    selection, found = finish(given, verify, judge, refit=lambda _: Selection((B,)))
    assert selection.places == (B,)
    assert found["columns"]["raw"]["selected"] == 1.0


def test_random_sets_have_the_size_of_the_set_and_are_judged_with_it():
    asked = []

    def score(places, given):
        asked.append(places)
        return rows("1" * len(places) + "0" * (len(given) - len(places)))

    judge = SetMeasurement(score, recipe(), {"t": documents(6)}, _Memory(), Processes(), "judge")
    given = recipe(top={"sizes": [2]}, controls={"random_sets": 3})
    _, found = finish(given, sets({(): "10", (A, B): "11"}), judge)
    assert asked[0] == ()
    assert asked[1] == (A, B)
    assert all(len(places) == 2 for places in asked[1:])
    assert len(found["columns"]["raw"]["random_sets"]["scores"]) == 3
    assert found["beats_random"]["raw"] is False  # all have the same score


@pytest.mark.parametrize("judge", [True, False])
def test_what_cannot_be_judged_says_so(judge):
    given = recipe(top={"sizes": [1]})
    untouched = sets({(): "11", (A,): "10"})
    selection, found = finish(given, untouched, sets({(): "11"}) if judge else None)
    assert selection.places == ()
    assert (found["verdict"], found["columns"]) == ("not judged", {})
    assert "no head was selected" in describe(found)[0]
    if not judge:
        better = sets({(): "10", (A,): "11"})
        selection, found = finish(given, better, None)
        assert selection.places == (A,)
        assert describe(found) == ["not judged: no documents were left to judge the set on"]


def test_a_set_is_measured_once_and_in_any_order():
    asked = []

    def score(places, given):
        asked.append(places)
        return rows("10")

    measured = SetMeasurement(score, recipe(), {"t": documents(2)}, _Memory(), Processes())
    measured.outcomes([[B, A], [A, B]])
    measured.outcomes([[A, B], []])
    measured.baseline()
    assert asked == [(), (A, B)]


def test_splits_share_a_ledger_and_no_unit():
    """Verify's scores of a set never stand for judge's, nor those of other judge documents."""
    ledger = _Memory()

    def measured(split, count, pattern):
        return SetMeasurement(
            lambda places, given: rows(pattern), recipe(), {"t": documents(count)}, ledger,
            Processes(), split,
        )  # fmt: skip

    assert measured("verify", 2, "11").outcomes([[A]])[0].accuracy == 1.0
    assert measured("judge", 2, "10").outcomes([[A]])[0].accuracy == 0.5
    assert measured("judge", 3, "000").outcomes([[A]])[0].accuracy == 0.0
    assert measured("verify", 2, "00").outcomes([[A]])[0].accuracy == 1.0  # it knows
    assert len(ledger) == 6


@pytest.mark.parametrize(("rank", "share"), [(0, [(), (B,)]), (1, [(A,)])])
def test_two_processes_share_the_sets(rank, share, monkeypatch):
    asked = []

    def score(places, given):
        asked.append(places)
        return rows("10")

    monkeypatch.setattr(Processes, "read_together", lambda *_: None)
    tasks = {"t": documents(2)}
    measured = SetMeasurement(score, recipe(), tasks, _Memory(), Processes(rank, 2))
    with pytest.raises(KeyError):  # it lacks what the other one measures
        measured.outcomes([[A], [B]])
    assert asked == share


def test_heads_and_strengths_of_places():
    maps = [{"mass": "damp", "beta": 0.4}, {"mass": "reweight", "gamma": 2.0}]
    given = recipe(strengths=maps)
    heads, strengths = make_heads([(2, 1, 0), (0, 3, 1), (2, 0, 0), (0, 1, 1)], given)
    assert heads == {0: (1, 3), 2: (0, 1)}
    assert strengths == {0: {1: given.strengths[1], 3: given.strengths[1]}}
    assert make_heads([(2, 1, 0)], given) == ({2: (1,)}, None)
    assert isinstance(outcome("1", "0"), Outcome)


@pytest.mark.parametrize(
    ("loose", "reading", "untouched", "selected"),
    [
        (False, "accuracy", 0.25, 1.0),
        (False, "objective", 0.25, 0.5),
        (False, "margin", 0.0, None),
        (True, "accuracy", 0.25, 1.0),
        (True, "objective", 0.25, 1.0),  # no label prior: raw
    ],
)
def test_the_record_holds_what_the_set_was_chosen_by(loose, reading, untouched, selected):
    """Margins 0.5, -0.5, -0.6, -0.7 become 8, 8, 9, 9: less their mean, two are above 0."""
    answers = {(): [[-1, -1.5], [-1.5, -1], [-1.6, -1], [-1.7, -1]],
               (A,): [[-1, -9], [-1, -9], [-1, -10], [-1, -10]]}  # fmt: skip
    found = sets(answers, loose=loose).outcomes([[A]])[0]
    one = judgement(found, [found], chosen_by=reading, heads=1, resamples=99)["chosen_by"]
    assert one["reading"] == reading
    assert one["untouched"] == untouched
    if reading == "margin":
        changes = [7.5, 8.5, 9.6, 9.7]
        selected = sum(changes) / 4 / 0.556028
    assert one["selected"] == pytest.approx(selected, rel=1e-5)
    assert one["difference"] == pytest.approx(selected - untouched, rel=1e-5)
    assert one["random_sets"] == pytest.approx([selected], rel=1e-5)


def test_the_lines_for_a_terminal_hold_the_figures():
    """32 of 42 right, then 40; the random set has 34."""
    before, after = changed(10, 2)
    found = judged(before, after, [before.replace("0", "1", 2)], loose=True)
    low, high = found["columns"]["raw"]["interval"]
    assert describe(found) == [
        "beats the untouched model (42 documents that chose nothing, level 0.05)",
        f"  raw accuracy: 76.2 %, calibrated 95.2 % (+19.0; 95 % interval {100 * low:+.1f} to "
        f"{100 * high:+.1f})",
        "    beats 1 random sets of that size (mean 81.0 %, best 81.0 %; p 0.5, level 0.5)",
    ]
    both = judged(before, after)
    assert [line.split(":")[0] for line in describe(both)[1:]] == [
        "  raw accuracy", "  label-prior corrected accuracy", "  held against no random head sets",
    ]  # fmt: skip
