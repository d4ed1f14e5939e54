"""Settings: defaults, presets, and every value that must be refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from act_harness.calibration import (
    PRESETS,
    Calibration,
    HeadStrength,
    LayerPlan,
    _keys_at,
    preset,
    validation_line,
)
from act_harness.errors import CalibrationError, InputError


def test_presets_are_the_published_settings():
    paper, release = preset("paper"), preset("release")
    assert paper.settings() == {
        "target": "sinks", "rule": "relative", "alpha": 5.0, "protect": "initial", "min_rows": 1,
        "mass": "damp", "beta": 0.4, "decode": "frozen",
    }  # fmt: skip
    assert release.settings() == {
        "target": "sinks", "rule": "absolute", "tau": 0.1, "protect": "first-flagged",
        "min_rows": 1, "mass": "damp", "beta": 0.4, "decode": "frozen",
    }  # fmt: skip
    assert sorted(PRESETS) == ["paper", "release"]
    with pytest.raises(CalibrationError, match="did you mean 'paper'"):
        preset("papr")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, "expected a number in"),
        ({"beta": 1.01}, "to amplify sinks use mass 'reweight'"),
        ({"beta": math.nan}, "expected a number in"),
        ({"alpha": 0}, "alpha is 0.0, expected a finite number above 0"),
        ({"alpha": -2}, "above 0"),
        ({"alpha": math.inf}, "finite"),
        ({"rule": "absolute"}, "tau is None"),
        ({"rule": "absolute", "tau": 1.0}, "between 0 and 1"),
        ({"rule": "absolute", "tau": 0.1, "alpha": 5}, "alpha belongs to rule 'relative'"),
        ({"tau": 0.1}, "tau belongs to rule 'absolute'"),
        ({"min_rows": 0}, "at least 1"),
        ({"mass": "reweight"}, "gamma is None"),
        ({"mass": "reweight", "gamma": 0}, "above 0"),
        ({"mass": "reweight", "gamma": 2, "beta": 0.4}, "beta belongs to mass 'damp'"),
        ({"gamma": 2}, "gamma belongs to mass 'reweight'"),
        ({"target": "initial", "alpha": 5}, "alpha belongs to target 'sinks'"),
        ({"target": "initial", "protect": "none"}, "protect belongs to target 'sinks'"),
        ({"target": "initial", "min_rows": 2}, "min_rows belongs to target 'sinks'"),
        ({"target": "both", "mass": "reweight", "gamma": 2}, "'both' takes gamma_initial beside"),
        ({"target": "both", "mass": "damp"}, "target 'both' takes mass 'reweight', found 'damp'"),
        ({"target": "both", "mass": "reweight", "gamma": 2, "gamma_initial": 0}, "above 0"),
        ({"gamma_initial": 2}, "gamma_initial belongs to mass 'reweight'; 'damp' takes beta"),
        ({"mass": "reweight", "gamma": 2, "gamma_initial": 2}, "belongs to target 'both'"),
        ({"mass": "raise"}, "psi is None, expected a number between 0 and 1"),
        ({"mass": "raise", "psi": 1}, "psi is 1.0, expected a number between 0 and 1"),
        ({"mass": "raise", "psi": 0.2, "beta": 1}, "beta belongs to mass 'damp'; 'raise' takes"),
        ({"target": "head"}, "target 'head' takes mass 'gate' or 'temperature', found 'damp'"),
        ({"mass": "gate", "factor": 2}, "takes mass 'damp' or 'reweight' or 'raise', found 'gate'"),
        ({"target": "head", "mass": "gate", "factor": -1}, "finite number of at least 0"),
        ({"target": "head", "mass": "temperature", "factor": 0}, "finite number above 0"),
        ({"target": "head", "mass": "gate", "factor": 2, "alpha": 5}, "'head' detects none"),
        ({"target": "last", "count": 0}, "count is 0, expected at least 1 or 'sinks'"),
        ({"target": "last", "count": 3, "tau": 0.1}, "count 3 detects none"),
        ({"count": 3}, "count belongs to target 'last', this is 'sinks'"),
        ({"target": "initial", "draw": "anew"}, "draw belongs to target 'random'"),
        ({"target": "random", "seed": -1}, "seed is -1, expected a whole number from 0"),
        ({"target": "random", "draw": "never"}, "draw"),
        ({"target": "span"}, "markers is missing or empty; target 'span' takes two texts"),
        ({"target": "span", "markers": ("a", "")}, "missing or empty"),
        ({"target": "random", "decode": "running"}, "target 'random' cannot follow"),
        ({"decode": "frosen"}, "decode"),
        ({"rule": "relativ"}, "rule"),
        ({"alhpa": 3}, "'alhpa' is unknown; did you mean 'alpha'"),
    ],
)
def test_settings_out_of_range_are_one_line(settings, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration(**settings)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        (
            {"target": "both", "mass": "reweight", "gamma": 2, "gamma_initial": 0.5},
            {"rule": "relative", "alpha": 5.0, "protect": "initial", "min_rows": 1},
        ),
        (
            {"target": "random"},
            {"rule": "relative", "alpha": 5.0, "protect": "initial", "min_rows": 1, "mass": "damp",
             "beta": 0.4, "draw": "fixed", "seed": 0},
        ),
        (
            {"target": "last", "rule": "absolute", "tau": 0.1, "mass": "raise", "psi": 0.2},
            {"protect": "initial", "min_rows": 1, "count": "sinks"},
        ),
        ({"target": "last", "count": 4}, {"mass": "damp", "beta": 0.4}),
        ({"target": "span", "markers": ["<b>", "</b>"]},
         {"mass": "damp", "beta": 0.4, "markers": ["<b>", "</b>"]}),
        ({"target": "head", "mass": "temperature", "factor": 2}, {}),
    ],
)  # fmt: skip
def test_every_target_has_the_settings_that_apply_and_no_others(settings, defaults):
    calibration = Calibration(**settings)
    assert calibration.settings() == {"decode": "frozen", **settings, **defaults}
    assert calibration.detects == ("rule" in calibration.settings())
    (own,) = LayerPlan.uniform(calibration, (0,)).strengths
    assert calibration.misfit(own) == ""
    assert own.mass == calibration.mass


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(Exception, match="frozen"):
        preset("paper").beta = 0.9


@given(st.integers(1, 10**6), st.floats(0.01, 100))
def test_auto_min_rows_is_n_over_alpha_rounded_up(columns, alpha):
    calibration = Calibration(alpha=alpha, min_rows="auto")
    rows = calibration.required_rows(float(columns))
    assert rows >= columns / alpha - 1e-6 * rows
    assert rows - 1 < columns / alpha + 1e-6 * rows or rows == 1
    # where a column counts, the threshold is at least what an average column of so few rows gets
    assert calibration.threshold(columns) >= 1 / rows * (1 - 1e-6)


def test_running_needs_two_rows_and_tensors_work_like_numbers():
    columns = torch.tensor([3.0, 23.0, 25.0, 26.0])
    calibration = Calibration(min_rows="auto")
    assert calibration.required_rows(columns).tolist() == [1, 5, 5, 6]
    assert calibration.required_rows(columns, at_least=2).tolist() == [2, 5, 5, 6]
    assert Calibration().required_rows(columns, at_least=2).tolist() == [2] * 4
    assert Calibration(min_rows=7).required_rows(columns, at_least=2).tolist() == [7] * 4
    absolute = Calibration(rule="absolute", tau=0.1, min_rows="auto")
    assert absolute.required_rows(columns).tolist() == [10] * 4
    assert absolute.threshold(columns).tolist() == pytest.approx([0.1] * 4)
    assert calibration.threshold(columns).tolist() == pytest.approx([5 / 3, 5 / 23, 0.2, 5 / 26])


def test_strengths_of_heads_follow_the_same_rules():
    assert HeadStrength().strength == 0.4
    assert HeadStrength(mass="reweight", gamma=2).strength == 2
    for wrong in ({"beta": 2}, {"mass": "reweight"}, {"gamma": 2}, {"beta": 0.2, "x": 1}):
        with pytest.raises(ValueError, match=r"beta|gamma|x"):
            HeadStrength(**wrong)
    plan = LayerPlan.uniform(Calibration(beta=0.25), (3, 5))
    assert [s.strength for s in plan.strengths] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"rule": "median"}, "rule 'median' is unknown, expected one of relative, absolute"),
        ({"rule": "absolut"}, "rule 'absolut' is unknown, .*; did you mean 'absolute'"),
        ({"rule": None}, "this calibration of target 'sinks' has no rule to detect sinks by"),
    ],
)
def test_a_rule_that_does_not_exist_is_taken_for_no_other(changed, line):
    plain = {**Calibration().model_dump(), "min_rows": "auto", "tau": 0.1}
    calibration = Calibration.model_construct(**{**plain, **changed})
    for ask in (calibration.threshold, calibration.required_rows):
        with pytest.raises(CalibrationError, match=f"^{line}"):
            ask(20.0)


def test_rows_are_a_number_or_auto():
    plain = Calibration().model_dump()
    for rows in ("always", 2.5):
        made = Calibration.model_construct(**{**plain, "min_rows": rows})
        with pytest.raises(CalibrationError, match=rf"^min_rows is {rows}, expected at least 1 or"):
            made.required_rows(20.0)
    initial = Calibration(target="initial")
    for ask in (initial.threshold, initial.required_rows):
        with pytest.raises(CalibrationError, match=r"^this calibration of target 'initial' has no"):
            ask(20.0)


def test_a_mass_map_that_does_not_exist_has_no_strength():
    made = HeadStrength.model_construct(mass="clip", beta=0.4)
    with pytest.raises(
        CalibrationError, match=r"^mass 'clip' is unknown, expected one of damp, rew"
    ):
        _ = made.strength


def test_a_key_beside_a_list_has_a_nearest():
    """Python 3.10 takes ``list[int]`` for a class, and fell over it in the search for a name."""

    class Inner(BaseModel):
        beta: float = 1.0

    class Outer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        layers: list[int] = []
        inner: dict[str, list[Inner]] = {}

    with pytest.raises(ValidationError) as refused:
        Outer.model_validate({"layer": [1]})
    assert validation_line(refused.value, Outer) == "layer: unknown key; did you mean 'layers'?"
    assert _keys_at(Outer, ("layers", 0)) == []
    assert _keys_at(Outer, ("inner", "a", 0)) == ["beta"]
