"""What was tried on a model holds for the kernel, dtype and autocast that it was tried with."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from act_harness.attention.capabilities import packs
from act_harness.attention.probe import Probe
from act_harness.attention.trials import Trials


def test_a_trial_is_of_a_model_in_one_state(tiny):
    model, other = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    trials = Trials()
    trials[model] = "first"
    assert model in trials
    assert other not in trials
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model not in trials
        trials[model] = "mixed"
    model.set_attn_implementation("eager")
    assert model not in trials
    assert trials.setdefault(model, "eager") == "eager"
    model.set_attn_implementation("sdpa")
    assert trials[model] == "first"
    assert trials.setdefault(model, "another") == "first"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trials[model] == "mixed"
    model.to(torch.bfloat16)
    assert model not in trials


def test_rounding_is_measured_anew_under_autocast(tiny):
    """Mixed precision rounds coarsely on some machines; what float32 does was kept for both."""
    model = tiny(dtype=torch.float32)

    def round_by_shape(_, __, logits):
        coarse = 0.1 * logits.shape[1] if torch.is_autocast_enabled("cpu") else 0.0
        return logits + coarse

    model.lm_head.register_forward_hook(round_by_shape)
    probe = Probe(model)
    changed = probe.ids.clone()
    changed[0, -1] += 1
    before = probe._stock_noise(changed)
    assert before.shape < 1e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert probe._stock_noise(changed).shape > 0.5
    assert probe._stock_noise(changed) == before


def test_trials_do_not_keep_a_model(tiny):
    model = tiny()
    trials = Trials()
    trials[model] = 1
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


def test_a_model_that_was_given_another_kernel_is_not_packed_for_the_old_one(tiny):
    model = tiny(dtype=torch.float32)
    assert packs(model)
    model.set_attn_implementation("eager")
    assert not packs(model)
    model.set_attn_implementation("sdpa")
    assert packs(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_a_copied_engine_knows_its_settings_and_nothing_of_plans(duplicate):
    """What it learned is kept by the identity of a plan, which a copy does not have."""
    triton = pytest.importorskip("act_harness.engines.triton", reason="triton is not installed")
    from act_harness.artifact import LayerPlan
    from act_harness.calibration import Calibration

    engine = triton.TritonEngine()
    plan = LayerPlan.uniform(Calibration(), (0, 1))
    engine._select(plan, torch.device("cpu"))
    twin = duplicate(engine)
    assert twin.blocks == engine.blocks
    assert engine._selections
    assert not twin._selections
