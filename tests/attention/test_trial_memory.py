"""What was tried on a model holds for the kernel, dtype and autocast that it was tried with."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers

from act_harness.attention.capabilities import Answer, capabilities_of
from act_harness.attention.packing_trial import packs
from act_harness.attention.probe import Probe
from act_harness.scoring import trials
from act_harness.scoring.forwards import Forwards
from act_harness.scoring.trials import try_all

YES = Answer(True, "so the test says")


def test_answers_are_of_a_model_in_one_state(tiny):
    model, other = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    first = capabilities_of(model)
    first.packs = YES
    assert capabilities_of(model) is first
    assert capabilities_of(other).packs is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = capabilities_of(model)
        assert mixed.packs is None
    model.set_attn_implementation("eager")
    assert capabilities_of(model).packs is None
    model.set_attn_implementation("sdpa")
    assert capabilities_of(model) is first
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert capabilities_of(model) is mixed
    model.config.sliding_window = 4
    assert capabilities_of(model).packs is None
    assert capabilities_of(model).window.value == 4
    model.config.use_sliding_window = False  # Qwen2-MoE keeps a width beside it
    assert capabilities_of(model).window.value is None
    model.config.use_sliding_window = True
    assert capabilities_of(model).window.value == 4
    model.config.sliding_window = None
    model.to(torch.bfloat16)
    assert capabilities_of(model).packs is None


def test_rounding_is_measured_anew_under_autocast(tiny):
    """Mixed precision rounds coarsely on some machines; what float32 does was kept for both."""
    model = tiny(dtype=torch.float32)

    def round_by_shape(_, __, logits):
        coarse = 0.1 * logits.shape[1] if torch.is_autocast_enabled("cpu") else 0.0
        return logits + coarse

    model.lm_head.register_forward_hook(round_by_shape)
    probe = Probe(model)
    before = probe.stock_noise()
    assert before.shape < 1e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert probe.stock_noise().shape > 0.5
    assert probe.stock_noise() == before


def test_packing_is_tried_under_the_autocast_that_scoring_runs_under(tiny):
    """What float32 showed was taken for mixed precision, where this model mixes neighbours."""
    model = tiny(dtype=torch.float32)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def mixing(x):
        share = 0.1 if torch.is_autocast_enabled("cpu") else 0.0
        return forward(x + share * torch.nn.functional.pad(x, (0, 0, 1, -1)))

    mlp.forward = mixing
    assert packs(model).value
    mixed = Forwards(model, forward_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert not trials.packs(mixed).value
    assert packs(model).value


@pytest.mark.parametrize(
    ("family", "settings", "reasons"),
    [
        (
            "llama",
            {},
            {
                "window": "its configuration names none",
                "rope_limit": "no rotary frequencies that depend on length",
                "noise": "measured: logits move by",
                "packs": "tried: a packed row gives what its sequences give",
                "packs_segments": "tried: layers attend over padded batches",
                "bare_head": "tried: logits are what the output head returns",
                "extends": "tried: over a cache, with right pads",
            },
        ),
        (
            "mistral",
            {},
            {
                "window": "its configuration says sliding_window=6",
                "packs": "its window of 6 tokens is less than the 9 that packing is tried with",
                "packs_segments": "it does not pack",
                "extends": "tried: over a cache, with left pads",
            },
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            {"rope_limit": "its rotary frequencies are dynamic: they change beyond it"},
        ),
    ],
)  # fmt: skip
def test_every_answer_says_what_decided_it(tiny, family, settings, reasons):
    answers = dict(try_all(tiny(family, **settings)))
    assert None not in answers.values()
    for name, reason in reasons.items():
        assert reason in answers[name].reason


def test_a_model_without_attention_is_told_so_in_every_answer():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    answers = dict(try_all(transformers.MambaForCausalLM(config).eval()))
    assert "no attention heads" in answers["calibrates"].reason
    assert not answers["packs"].value
    assert answers["extends"].value is None
    assert answers["noise"] is None


def test_a_cache_that_cannot_be_extended_says_how_it_failed(tiny, caplog):
    model = tiny()
    forward = model.forward

    def refusing(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise ValueError("no cache, please")
        return forward(*args, **kwargs)

    model.forward = refusing
    answer = trials.extends(Forwards(model))
    assert answer.value is None
    assert "forward of several tokens over a cache fails (no cache, please)" in answer.reason
    assert caplog.text.count("cannot be extended") == 1


def test_answers_do_not_keep_a_model(tiny):
    model = tiny()
    try_all(model)
    watch = weakref.ref(model)
    del model
    gc.collect()
    assert watch() is None


def test_a_model_that_was_given_another_kernel_is_not_packed_for_the_old_one(tiny):
    model = tiny(dtype=torch.float32)
    assert packs(model).value
    model.set_attn_implementation("flex_attention")
    assert packs(model) == Answer(
        False, "packing builds on attention sdpa or eager, the model runs 'flex_attention'"
    )
    model.set_attn_implementation("eager")
    assert packs(model).value
    model.set_attn_implementation("sdpa")
    assert packs(model).value


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
