"""A gradient search finds the strengths that decide the right answers, where some do."""

from __future__ import annotations

import dataclasses
import math

import pytest
from gradient_runs import PLANTED, planted, recipe, search

from act_harness.artifact import load_artifact


def tuned(found):
    """Return (layer, head) to log strength of an artifact's heads."""
    return {
        (layer, head): math.log(own.gamma)
        for layer, heads in found.strengths.items()
        for head, own in heads.items()
    }


@pytest.mark.parametrize("objective", ["corrected", "margin"])
def test_planted_strengths_are_found_and_hold_elsewhere(tmp_path, objective):
    given = recipe(
        objective=objective, samples=40, verify_samples=40, chunk_tokens=2048,
        gradient={"epochs": 10, "batch": 16, "rate": 0.3, "sizes": [3]},
    )  # fmt: skip
    result = search(tmp_path, given, [planted("a", 1), planted("b", 2)])
    rule = result.artifact.search["rule"]
    assert max(one["value"] for one in rule["tried"]) >= rule["untouched"] + 0.2
    training = result.artifact.search["training"]
    assert training[-1]["loss"] < 0.5 * training[0]["loss"]
    assert training[-1]["verify_loss"] < training[0]["verify_loss"] - 0.02
    rows = {(row[0], row[1]): row[2] for row in result.artifact.search["table"]["heads"]["rows"]}
    strongest = sorted(rows, key=lambda place: -abs(rows[place]))[: len(PLANTED)]
    assert set(strongest) == set(PLANTED)
    for place, value in PLANTED.items():
        assert rows[place] == pytest.approx(value, rel=0.25)
        assert tuned(load_artifact(result.path))[place] == pytest.approx(rows[place], abs=1e-5)
    judgement = result.artifact.search["judgement"]
    assert judgement["beats_untouched"] == {"raw": True, "corrected": True}
    assert all(one["difference"] >= 0.1 for one in judgement["columns"].values())


@pytest.mark.parametrize("signs", ["damp", "amplify"])
def test_one_sign_finds_its_share_of_what_was_planted(tmp_path, signs):
    given = recipe(
        objective="margin", samples=24, verify_samples=24, chunk_tokens=2048,
        controls={"random_sets": 0},
        gradient={"epochs": 6, "batch": 12, "rate": 0.3, "sizes": [], "signs": signs},
    )  # fmt: skip
    found = tuned(search(tmp_path, given, [planted("a", 1, 24), planted("b", 2, 24)]).artifact)
    assert found
    fits = {place for place, value in PLANTED.items() if (value < 0) == (signs == "damp")}
    assert fits <= set(found)
    assert all((value < 0) == (signs == "damp") for value in found.values())


@pytest.mark.parametrize(
    "target", ["sinks", "initial", "both", "random", "last", "gate", "temperature"]
)
def test_every_target_ends_in_an_artifact_that_scores_as_it_was_tuned(tmp_path, target):
    """The judge split goes through the product; verify went through the search's attention."""
    made = [planted(task, seed, 8, target=target, pool=50) for task, seed in (("a", 1), ("b", 2))]
    twins = [dataclasses.replace(one, verify=one.search, judge=one.search) for one in made]
    given = recipe(
        objective="margin", chunk_tokens=2048,
        gradient={"target": target, "epochs": 7, "batch": 4, "sizes": []},
    )  # fmt: skip
    found = search(tmp_path, given, twins).artifact
    assert found.heads
    judged, rule = found.search["judgement"]["chosen_by"], found.search["rule"]
    assert judged["selected"] == pytest.approx(rule["tried"][-1]["value"], abs=1e-6)
    assert judged["selected"] > rule["untouched"] + 0.04
