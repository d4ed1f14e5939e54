"""Simulated searches: the flags of an artifact are true no more often than they claim."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats

from act_harness.bench import null_search as null
from act_harness.bench.null_search import PLANTED, RULES, World, search_world, simulate
from act_harness.errors import InputError
from act_harness.search.choose.judgement import LEVEL


def most(searches: int, level: float) -> int:
    """Return a count that so many searches pass once in ten thousand at ``level``."""
    return int(scipy.stats.binom.ppf(1 - 1e-4, searches, level))


@pytest.fixture(scope="module")
def nothing():
    """Every head is noise."""
    return simulate(World(), 50)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_without_any_effect_flags_keep_their_level(nothing, rule):
    tally = nothing[rule]
    assert tally.judged >= 10
    for column in ("raw", "corrected"):
        assert tally.untouched[column] <= most(tally.judged, LEVEL / 2)
        assert tally.random[column] <= most(tally.judged, tally.random_level)
        mean, error = tally.mean_gain(column)
        assert abs(mean) < 4 * error


@pytest.mark.slow
def test_over_all_rules_flags_keep_their_level(nothing):
    searches = sum(tally.judged for tally in nothing.values())
    assert searches > 150
    for column in ("raw", "corrected"):
        flags = sum(tally.untouched[column] for tally in nothing.values())
        assert flags <= most(searches, LEVEL / 2)
        first = sum(tally.random[column] for tally in nothing.values())
        assert first <= most(searches, LEVEL)
        gains = np.concatenate([tally.gains[column] for tally in nothing.values()])
        assert abs(gains.mean()) < 3.5 * gains.std() / np.sqrt(len(gains))


def test_the_simulation_sees_documents_that_judge_their_own_choice():
    """It would fail a search whose chosen set is judged where it was chosen."""
    tally = simulate(World(), 25, rules=["joint"], judge="verify")["joint"]
    mean, error = tally.mean_gain("raw")
    assert mean > 5 * error
    assert tally.random["raw"] > most(tally.judged, LEVEL)


@pytest.mark.parametrize("rule", ["top", "joint", "significant", "paper"])
def test_planted_heads_are_found(rule):
    """4 of 24 heads help: most of what is selected first are they, and the gain is shown."""
    world = World(planted=4, gain=0.3, documents=60)
    tally = simulate(world, 8, rules=[rule])[rule]
    assert tally.judged == 8
    assert tally.mean_gain("raw")[0] > 0.08
    assert tally.untouched["raw"] >= 6
    drawn = null._Drawn(world, 3)
    selection, _ = search_world(world, 3, null.make_rule(rule))
    assert len(drawn.planted) == 4
    assert len(drawn.planted.intersection(selection.places[:6])) >= 3


def test_untouched_and_calibrated_scores_of_a_null_world_are_exchangeable():
    """The same mean and spread for no heads, one and many, on 4,000 documents."""
    drawn = null._Drawn(World(tasks=1, documents=4000), 1)
    noise = [
        drawn.scores("judge", "task-0", drawn.places[:count])
        - drawn.splits["judge", "task-0"].level
        for count in (0, 1, 12)
    ]
    for one in noise:
        assert one.mean() == pytest.approx(0, abs=0.05)
        assert one.std() == pytest.approx(1, abs=0.04)
    together = [np.corrcoef(noise[0].ravel(), one.ravel())[0, 1] for one in noise]
    assert together == pytest.approx([1, np.cos(0.3), np.cos(0.3 * np.sqrt(12))], abs=0.03)


def test_the_command_writes_what_was_counted(tmp_path):
    path = null.main(["--searches", "3", "--rules", "top; paper", "--output", str(tmp_path)])
    stored = json.loads((tmp_path / "null-search.json").read_text())
    assert set(stored["parts"]["null"]["rules"]) == {"top", "paper"}
    assert stored["parts"]["planted"]["world"]["gain"] == PLANTED.gain
    text = path.read_text()
    for name, tally in stored["parts"]["null"]["rules"].items():
        assert f"| {name} | {tally['judged']} of 3 | raw |" in text
    with pytest.raises(InputError, match="rule 'topp' is unknown"):
        simulate(World(), 1, rules=["topp"])
