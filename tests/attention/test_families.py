"""Families that attend otherwise, against an oracle that shares no code.

They are outside transformers' attention interface, or have learned sink logits beside the columns.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
import transformers
from oracle import BETA, IDS, PROMPT, Oracle, calibrate_by_hand, logits, settings
from tiny_models import make_tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from act_harness.attention import attach, calibrated, select_cache
from act_harness.attention.families import FAMILIES, family_of
from act_harness.attention.interface import BINDING
from act_harness.bench.families import build_tiny
from act_harness.engines.reference import ReferenceEngine
from act_harness.errors import UnsupportedCallError

GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_EXPERTS = {
    "head_dim": 8,
    "num_experts_per_tok": 1,
    "sliding_window": 5,
    "experts_implementation": "eager",  # the grouped kernels take no float64
}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
LEARNED = {
    "gpt_oss": ("gpt_oss", {**_EXPERTS, "num_local_experts": 2, "layer_types": _LAYERS}),
    "mimo": (
        "mimo_v2_flash",
        {
            **_EXPERTS,
            "v_head_dim": 6,
            "n_routed_experts": 2,
            "moe_intermediate_size": 16,
            "layer_types": _LAYERS,  # the full one has no sink
        },
    ),
    "granite": ("granite_swa", {"sliding_window": 5, "layer_types": _LAYERS}),
}
"""Of them, those with learned sink logits; Granite multiplies outputs by what is left instead."""

KINDS = {
    **LEARNED,
    "gptj": ("gptj", {**GPT, "rotary_dim": 4, "attn_implementation": "eager"}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 4, "attn_implementation": "eager"}),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 5,
        },
    ),
    "xglm": (
        "xglm",
        {"init_std": 0.08, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
    ),
    "falcon": ("falcon", {"attn_implementation": "eager"}),
    "falcon-sdpa": ("falcon", {}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True, "attn_implementation": "eager"}),
    "falcon-alibi-sdpa": ("falcon", {"alibi": True, "multi_query": False}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
}
"""Name to transformers' model type and what the configuration says beside the tiny shape."""


@functools.cache
def make(name, dtype=torch.float64):
    """Return the model of a name, the same object for all tests: they leave it as it was."""
    kind, more = KINDS[name]
    if kind == "xglm" and dtype == torch.float64:
        dtype = torch.float32  # the stock model fails in float64
    return make_tiny(kind, dtype=dtype, **more)


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return make(name)


def test_calibrated_logits_are_the_oracles(name, model, make_artifact, monkeypatch):
    expected = Oracle(monkeypatch, model.config.num_attention_heads).logits(model)
    for engine in ("torch", "reference"):
        with calibrated(model, settings(make_artifact, model), engine=engine) as attachment:
            with attachment.prompts([PROMPT]):
                found = logits(model, use_cache=False)
            assert attachment.calls.calls == {engine: 3}
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["inkling_text", "inkling2_text"])
def test_logits_by_position_and_sinks_of_rows_are_the_oracles(kind, make_artifact, monkeypatch):
    """Inkling adds a bias to each query and column, Inkling 2 a sink logit to each row, too."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    model = build_tiny(kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():  # sinks that take next to nothing or nearly all, biases that matter
        for name, parameter in model.named_parameters():
            larger = {"sink_proj": 100, "r_proj": 30, "rel_logits": 30, "lm_head": 100}
            parameter.mul_(next((by for part, by in larger.items() if part in name), 1))
    heads = model.config.num_attention_heads
    expected = Oracle(monkeypatch, heads).logits(model)
    rounding = 5e-5 * float(expected.abs().max())  # the models are float32
    for engine in ("torch", "reference"):
        with (
            calibrated(model, settings(make_artifact, model), engine=engine) as attachment,
            attachment.prompts([PROMPT]),
        ):
            found = logits(model, use_cache=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    assert (logits(model) - expected).abs().max() > 50 * rounding


def test_strength_1_is_stock_and_nothing_is_left_after_detaching(name, model, make_artifact):
    stock, before = logits(model), traces(model)
    attachment = attach(model, settings(make_artifact, model, beta=1.0))
    torch.testing.assert_close(logits(model), stock, rtol=0, atol=1e-4)
    assert attachment.calls.calls == {"torch": 3}
    with attachment.suspended():
        assert torch.equal(logits(model), stock)
    attachment.detach()
    assert torch.equal(logits(model), stock)
    assert traces(model) == before


def traces(model):
    return {
        "of modules": {n: frozenset(m.__dict__) for n, m in model.named_modules()},
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "kernel": model.config._attn_implementation,
    }


def test_heads_that_are_not_selected_are_stock_to_the_bit(name, model, make_artifact):
    """No column passes the threshold, so all rows keep the output of the model's own code."""
    heads = {1: (0,)}
    stock = logits(model)
    nothing = make_artifact(model, heads=heads, alpha=1000.0, beta=0.0)
    with calibrated(model, nothing) as attachment:
        assert torch.equal(logits(model), stock)
        assert attachment.calls.calls == {"torch": 1}


def test_a_sequence_scores_the_same_alone_and_in_padded_batches(name, make_artifact):
    model = make(name, torch.float32)
    texts = [IDS[0, :size] for size in (16, 9, 12, 16, 5)]
    prompts = [11, 6, 7, 4, 3]
    with calibrated(model, settings(make_artifact, model)) as attachment:
        alone = []
        for text, prompt in zip(texts, prompts, strict=True):
            with attachment.prompts([prompt]):
                alone.append(logits(model, text[None])[0])
        for side in ("right", "left"):
            ids = torch.zeros(5, 16, dtype=torch.long)
            mask = torch.zeros(5, 16, dtype=torch.long)
            for row, text in enumerate(texts):
                at = slice(0, len(text)) if side == "right" else slice(16 - len(text), 16)
                ids[row, at], mask[row, at] = text, 1
            places = {"attention_mask": mask}
            if side == "left" and takes_positions(model):
                places["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            elif side == "left" and not biased(model):
                continue  # XGLM: its positions count the pads, in the stock model too
            with attachment.prompts(prompts):
                found = logits(model, ids, **places)
            for row, expected in enumerate(alone):
                real = found[row][mask[row] == 1]
                torch.testing.assert_close(real, expected, rtol=0, atol=1e-4)


def takes_positions(model):
    return "position_ids" in inspect.signature(model.forward).parameters


def biased(model):
    return model.config.model_type in ("bloom", "mpt") or getattr(model.config, "alibi", False)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_tokens_over_a_cache_score_as_in_one_piece(name, model, make_artifact, decode):
    artifact = settings(make_artifact, model, decode=decode)
    with calibrated(model, artifact) as attachment, torch.no_grad():
        with attachment.prompts([PROMPT]):
            whole = logits(model)[:, PROMPT:]
        for sizes in ([1] * 5, [2, 3], [5]):
            cache = model(input_ids=IDS[:, :PROMPT], use_cache=True).past_key_values
            cache = select_cache(cache, torch.tensor([0, 0]))
            parts, at = [], PROMPT
            for size in sizes:
                piece = IDS[:, at : at + size].expand(2, -1)
                parts.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
                at += size
            found = torch.cat(parts, dim=1)
            torch.testing.assert_close(found, whole.expand(2, -1, -1), rtol=0, atol=1e-4)


def test_greedy_generation_is_the_argmax_of_scoring(name, model, make_artifact):
    with calibrated(model, settings(make_artifact, model)) as attachment:
        prompt = IDS[:, :PROMPT]
        made = model.generate(  # MPT's configuration leaves the cache off
            prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=True
        )
        with attachment.prompts([PROMPT]):
            scored = logits(model, made[:, :-1])
    assert made[0, PROMPT:].tolist() == scored[0, PROMPT - 1 :].argmax(-1).tolist()


def test_attention_maps_are_the_calibrated_ones(name, make_artifact):
    model = make(name)
    if model.config._attn_implementation == "sdpa":
        with (
            calibrated(model, settings(make_artifact, model)),
            pytest.raises(UnsupportedCallError, match="attn_implementation=eager"),
        ):
            attention_maps(model)
        return
    stock = attention_maps(model)
    heads = model.config.num_attention_heads
    with calibrated(model, settings(make_artifact, model, heads={0: tuple(range(heads))})):
        found = attention_maps(model)
    expected = calibrate_by_hand(stock[0][0].numpy(), len(IDS[0]), BETA)
    torch.testing.assert_close(found[0][0], torch.from_numpy(expected), rtol=0, atol=1e-5)
    assert torch.equal(attention_maps(model)[0], stock[0])


def attention_maps(model):
    with torch.no_grad():
        output = model(input_ids=IDS, output_attentions=True, use_cache=False)
    return [maps.double() for maps in output.attentions]


def test_copies_are_calibrated_by_their_own_weights(name, make_artifact):
    model = make.__wrapped__(name)  # its own: transformers' hooks for maps cannot be pickled
    stock = logits(model)
    with calibrated(model, settings(make_artifact, model)):
        expected = logits(model)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301 - its own
    for other in (copied, pickled):
        assert torch.equal(logits(other), expected)
        assert any(BINDING in module.__dict__ for module in other.modules())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.01)
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), stock)


def test_dropout_in_training_is_refused(name, make_artifact):
    kind, more = KINDS[name]
    if name.startswith("falcon") and "alibi" not in name:
        return  # the stock model applies none
    dropouts = {"attn_pdrop": 0.1, "attention_dropout": 0.1, "attn_config": {"attn_pdrop": 1}}
    model = make_tiny(kind, dtype=torch.float32, **{**dropouts, **more})
    with (
        calibrated(model, settings(make_artifact, model)),
        pytest.raises(UnsupportedCallError, match=r"model.eval\(\)"),
    ):
        logits(model.train())


def test_in_half_precision_engines_agree_better_than_calibration_changes(name, make_artifact):
    model = make(name, torch.bfloat16)
    stock = logits(model).float()
    with calibrated(model, settings(make_artifact, model), engine=ReferenceEngine()):
        expected = logits(model).float()
    with calibrated(model, settings(make_artifact, model), engine="torch"):
        found = logits(model).float()
    assert (expected - stock).abs().mean() > 4 * (found - expected).abs().mean()


@pytest.mark.parametrize("brought", [False, True])
def test_a_family_is_left_to_the_interface_where_its_code_asks_that(brought):
    """transformers 5.24 brought GPT-J and CodeGen over; the others may follow."""
    place = {"__name__": "transformers.models.mpt.modeling_mpt", "Module": torch.nn.Module}
    if brought:
        place["ALL_ATTENTION_FUNCTIONS"] = {}
    exec("class MptAttention(Module):\n def forward(self): ...", place)  # noqa: S102 - of a release
    family = family_of(place["MptAttention"]())
    assert family is (None if brought else FAMILIES["MptAttention"])


def test_attention_over_other_things_than_tokens_is_left_alone(make_artifact, monkeypatch):
    """As Inkling 2's residuals attend over blocks, by the interface from transformers 5.24 on."""
    model, beside = make_tiny("llama"), torch.nn.Module()
    beside.is_causal, beside.num_key_value_groups = False, 1
    norm, sizes = model.model.norm.forward, []

    def attending(hidden):
        states = norm(hidden)[:, :, None]  # (B, tokens, 1 block, hidden)
        sizes.append(states.shape[1])
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, None)
        return kernel(beside, states, states, states, None, scaling=1.0)[0][:, 0]

    artifact = settings(make_artifact, model)
    with calibrated(model, artifact):
        expected = logits(model)
    monkeypatch.setattr(model.model.norm, "forward", attending)
    with calibrated(model, artifact):
        found = logits(model)
    assert sizes[-1] == IDS.shape[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)  # over one block it is that one
