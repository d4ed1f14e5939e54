"""Random scoring cases: shared, plain and reference scoring agree within 1e-4 nats."""

from __future__ import annotations

import json

import pytest

from act_harness.bench import random_scoring
from act_harness.bench.random_scoring import draw_case, draw_setup, run_cases
from act_harness.bench.tiny_families import FAMILIES
from act_harness.engines.operation import LayerState
from act_harness.errors import InputError

# Cases skip requests on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* requests are longer than the model:UserWarning")

CASES = 84  # of each family: 504 in all


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_ways_agree(family):
    outcome = run_cases(CASES, seed=1, families=[family])
    assert outcome.failures == []
    assert outcome.cases == CASES
    assert len(outcome.near) <= 2
    assert outcome.worst[family] <= 1e-4
    seen = outcome.seen
    assert seen["prompts with sinks"] > 0.3 * seen["prompts"] > 10
    assert min(seen["prompts truncated"], seen["empty continuations"]) > 0
    assert seen["answers not finite"] == 0


def test_cases_are_what_they_are_said_to_be():
    cases = [draw_case(n, seed=0) for n in range(300)]
    contexts = {context for case in cases for context, _ in case.requests}
    assert {"", " ", "\n", "a", "<s>", "</s>"} <= contexts
    assert max(map(len, contexts)) > 48
    assert {case.batch_size for case in cases} == {1, 2, 3, 8, "auto"}
    setups = [draw_setup(n, seed=0, families=list(FAMILIES)) for n in range(120)]
    assert {setup.family for setup in setups} == set(FAMILIES)
    assert any(not setup.heads for setup in setups)
    assert any(setup.strengths for setup in setups)
    for name in ("target", "rule", "protect", "min_rows", "mass", "decode"):
        assert len({getattr(setup.calibration, name) for setup in setups}) > 1
    assert cases[7] == draw_case(7, seed=0) != draw_case(7, seed=1)


def test_a_wrong_state_is_found(monkeypatch):
    """Sinks of another context for the answers that extend it: shared scoring alone is wrong."""
    right = LayerState.select
    monkeypatch.setattr(LayerState, "select", lambda self, index: right(self, index.flip(0)))
    outcome = run_cases(24, seed=1, families=["Llama"])
    assert outcome.failures
    assert "case " in outcome.failures[0]


def test_the_command_writes_its_figures(tmp_path):
    path = random_scoring.main(
        ["--cases", "8", "--families", "Qwen3", "--output", str(tmp_path), "--name", "random"]
    )
    stored = json.loads(path.with_suffix(".json").read_text())
    ((family, cases, worst),) = stored["tables"][0]["rows"]
    assert (family, cases) == ("Qwen3", 8)
    assert worst <= 1e-4
    with pytest.raises(InputError, match="expected one of Llama"):
        run_cases(1, seed=0, families=["Gemma"])
