"""Which engine ``auto`` takes on CUDA: one that computes what is asked for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

import engine_cases as ec
from search_runs import recipe, search

from act_harness.attention import lifecycle
from act_harness.engines import _warn, select_engine
from act_harness.errors import CalibrationError
from act_harness.search import run

PLANS = {name: ec.plan_of(one, (0,)) for name, one in {**ec.PLANS, **ec.MEMBERS}.items()}
CONTROLS = {
    "random-fixed": "target 'random'",
    "random-anew": "target 'random'",
    "last-as-sinks": "target 'last'",
    "last-three": "target 'last'",
    "gate": "target 'head'; engine triton does not compute mass 'gate'",
    "temperature": "target 'head'; engine triton does not compute mass 'temperature'",
}


@pytest.fixture(autouse=True)
def _nothing_said():
    _warn.cache_clear()


@pytest.mark.parametrize("name", list(PLANS))
def test_auto_computes_every_member(name, caplog):
    """Methods by the kernels, controls by engine torch, which one line says once."""
    for device in ("cuda", "cuda:1"):
        found = select_engine("auto", device=device, plans=[PLANS["paper"], PLANS[name]])
        assert found.supports(PLANS[name]) == []
        assert found.name == ("torch" if name in CONTROLS else "triton")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"engine triton does not compute {lacking}; engine torch is used, which is slower on CUDA"
        for control, lacking in CONTROLS.items()
        if control == name
    ]


def test_who_names_an_engine_gets_that_one():
    assert select_engine("triton", device="cuda", plans=[PLANS["gate"]]).name == "triton"
    assert select_engine("reference", device="cuda", plans=[PLANS["gate"]]).name == "reference"
    assert select_engine("auto", device="cpu", plans=[PLANS["gate"]]).name == "torch"


@pytest.fixture
def on_cuda(monkeypatch):
    """Let a model on the CPU be taken for one on CUDA where its engine is chosen."""
    monkeypatch.setattr(lifecycle, "input_device", lambda _: torch.device("cuda"))


def test_attach_takes_an_engine_that_computes_the_artifact(
    tiny, make_artifact, on_cuda, monkeypatch
):
    model = tiny(dtype=torch.float32)
    random = make_artifact(model, target="random")
    both = make_artifact(model, target="both", mass="reweight", gamma=2.0, gamma_initial=0.5)
    with pytest.raises(CalibrationError, match="engines that do: reference, torch"):
        lifecycle.attach(model, random, engine="triton")
    with lifecycle.calibrated(model, random) as attachment:
        model(torch.arange(3, 15)[None])
        assert set(attachment.calls.calls) == {"torch"}
    monkeypatch.setattr(lifecycle.Attachment, "check", lambda _: None)  # slow, interpreted
    assert lifecycle.prepare(model, both).engine.name == "triton"


def test_a_search_takes_an_engine_that_computes_its_recipe(tmp_path, on_cuda, monkeypatch):
    chosen = []

    def choose(name, *, device, plans=()):
        chosen.append(select_engine(name, device="cuda", plans=plans))
        return chosen[-1]

    monkeypatch.setattr(run, "select_engine", choose)
    given = recipe(calibration={"target": "random", "alpha": 1.5}, controls={"random_sets": 0})
    found = search(tmp_path, given)
    assert found.artifact.calibration.target == "random"
    assert [engine.name for engine in chosen] == ["torch"]
