"""What a gradient search leaves for a reader: plots, and the option to compare with effects."""

from __future__ import annotations

import dataclasses
import math

import gradient_runs
import numpy as np
import pytest
import search_runs

from act_harness.errors import InputError, RecipeError
from act_harness.evidence import tuning_plots
from act_harness.search import report
from act_harness.search.command import SearchSettings, search_from_settings
from act_harness.search.report import draw, single_effects

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return search_runs.search(tmp_path_factory.mktemp("alone")).artifact


@pytest.mark.parametrize("target", ["sinks", "both", "gate"])
def test_plots_of_a_gradient_search(tmp_path, alone, monkeypatch, target):
    given = gradient_runs.recipe(objective="entropy", gradient={"target": target, "epochs": 3})
    result = gradient_runs.search(tmp_path, given)
    drawn = {}
    for module, name in ((report, "_tuned"), (tuning_plots, "strengths_against_effects")):
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name,
            lambda *given, own=own, name=name, **options: drawn.update({name: given})
            or own(*given, **options),
        )  # fmt: skip
    found = draw(result, tmp_path / "mine.json", against=alone)
    assert found == {k: tmp_path / f"mine-{k}.png" for k in ("map", "curves", "effects")}
    assert {path.read_bytes()[:4] for path in found.values()} == {b"\x89PNG"}
    strengths, effects, _ = drawn["strengths_against_effects"]
    names = {"sinks": ["sinks"], "both": ["sinks", "initial"], "gate": ["gate"]}[target]
    assert list(strengths) == [f"log strength on {name}" for name in names]
    layer, heads = next(iter(result.artifact.heads.items()))
    own = result.artifact.strengths[layer][heads[0]]
    values = [own.factor] if target == "gate" else [own.gamma, own.gamma_initial][: len(names)]
    for one, value in zip(strengths.values(), values, strict=True):
        assert one[layer, heads[0]] == pytest.approx(math.log(value), abs=1e-5)
    rows = alone.search["table"]["heads"]["rows"]
    assert effects[rows[3][0], rows[3][1]] == rows[3][3]
    assert set(draw(result, tmp_path / "mine.json")) == {"map", "curves"}


def test_a_head_with_several_maps_has_its_best_effect(alone):
    table = alone.search["table"]["heads"]
    row = table["rows"][0]
    place = table["columns"].index("effect")
    better = [*row[:place], row[place] + 1, *row[place + 1 :]]
    changed = {**alone.search, "table": {"heads": {**table, "rows": [*table["rows"], better]}}}
    found = single_effects(alone.model_copy(update={"search": changed}))
    assert found[row[0], row[1]] == row[place] + 1
    assert np.isfinite(found).all()


def test_only_an_artifact_with_effects_can_be_compared_with(tmp_path, alone):
    tuned = gradient_runs.search(tmp_path, gradient_runs.recipe(objective="entropy")).artifact
    with pytest.raises(InputError, match="'tiny' has no effects of single heads to compare with"):
        single_effects(tuned)
    with pytest.raises(InputError, match="no effects of single heads"):
        single_effects(alone.model_copy(update={"search": None}))
    asked = SearchSettings(
        pretrained="absent", tasks=("act_demo_word",), compare_with=tmp_path / "out.json",
        output=tmp_path / "heads.json", plots=True,
    )  # fmt: skip
    with pytest.raises(RecipeError, match="--compare-with belongs to --plots and --method gradie"):
        search_from_settings(asked)
    gradient = dataclasses.replace(asked, method="gradient")
    with pytest.raises(InputError, match="has no effects of single heads"):
        search_from_settings(gradient)
    with pytest.raises(RecipeError, match="--compare-with belongs to --plots"):
        search_from_settings(dataclasses.replace(gradient, plots=False))
