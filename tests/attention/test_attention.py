"""The adapter: which models, whose settings, what is refused, what is restored."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers.models.llama import modeling_llama

import act_harness
from act_harness.attention import attach, calibrated, select_cache, weights_fingerprint
from act_harness.attention.interface import BINDING
from act_harness.bench.families import build_tiny
from act_harness.errors import (
    ArtifactError,
    UnsupportedCallError,
    UnsupportedModelError,
)

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 33, 60, 12, 7, 29, 54]])


def logits(model, ids=PROMPT, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "phi",
        "opt",
    ],
)
def test_decoders_of_many_families_can_be_calibrated(tiny, make_artifact, kind):
    more = {}
    if kind == "gpt2":
        more = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    if kind == "opt":
        more = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    model = tiny(kind, dtype=torch.float32, **more)
    stock = logits(model)
    with calibrated(model, make_artifact(model)) as attachment:
        changed = logits(model)
        assert attachment.calls.calls == {"torch": 3}
        assert attachment.records()[0].sinks > 0
        made = model.generate(PROMPT, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert made.shape[1] >= 13
    assert (changed - stock).abs().max() > 1e-5
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("kind", ["openai-gpt", "mamba"])
def test_a_model_outside_the_interface_is_refused_and_left_as_it_was(tiny, make_artifact, kind):
    more = {"openai-gpt": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}}
    model = tiny(kind, dtype=torch.float32, **more.get(kind, {}))
    stock = logits(model)
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="AttentionInterface") as caught:
        attach(model, make_artifact(model))
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model), stock)


def test_learned_sinks_that_calibration_would_not_see_are_refused(tiny, make_artifact):
    """Torch's sdpa leaves them out silently."""
    model = tiny(
        "gpt_oss", dtype=torch.float32, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    for kernel, found in (("sdpa", "leaves out"), ("flex_attention", "runs attention")):
        model.config._attn_implementation = kernel  # set_attn_implementation refuses sdpa itself
        with pytest.raises(UnsupportedModelError, match=f"{found}.*eager") as caught:
            attach(model, make_artifact(model))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_its_call_does_not_say_is_refused(tiny, make_artifact, monkeypatch, dtype):
    """A term in one layer that calibration is not told of: it would calibrate another model."""
    model = tiny(dtype=dtype, attn_implementation="eager")
    attach(model, make_artifact(model)).detach()
    stock = modeling_llama.eager_attention_forward

    def more(module, query, key, value, mask, **kwargs):
        if module.layer_idx == 1:
            key = key + torch.linspace(0, 2, key.shape[2], dtype=key.dtype)[:, None]
        return stock(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", more)
    with pytest.raises(UnsupportedModelError, match=r"of layer 1 of .* off what") as caught:
        attach(model, make_artifact(model))
    assert "\n" not in str(caught.value)


def test_columns_that_are_no_tokens_are_refused(make_artifact):
    """DeepSeek V4 compresses keys: what those columns get in the mean says nothing of a token."""
    model = build_tiny("deepseek_v4")
    with pytest.raises(UnsupportedModelError, match="15 columns where there are 12 tokens"):
        attach(model, make_artifact(model))


def test_another_kernel_is_refused_with_what_to_use(tiny, make_artifact):
    model = tiny(dtype=torch.float32)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="attn_implementation=sdpa"):
        attach(model, make_artifact(model))


def test_the_eager_kernel_gives_what_sdpa_gives(tiny, make_artifact):
    model = tiny()
    with calibrated(model, make_artifact(model)):
        fused = logits(model)
    model.set_attn_implementation("eager")
    with calibrated(model, make_artifact(model)) as attachment:
        torch.testing.assert_close(logits(model), fused, rtol=0, atol=1e-9)
        assert attachment.calls.calls == {"torch": 3}


def test_two_models_in_one_process_do_not_see_each_other(tiny, make_artifact):
    first, second = tiny(seed=0), tiny(seed=1)
    alone = []
    for model, heads in ((first, {0: (0, 1)}), (second, {1: (2,), 2: (3,)})):
        with calibrated(model, make_artifact(model, heads=heads)):
            alone.append(logits(model))
    stock = [logits(first), logits(second)]
    one = attach(first, make_artifact(first, heads={0: (0, 1)}))
    assert torch.equal(logits(second), stock[1])
    two = attach(second, make_artifact(second, heads={1: (2,), 2: (3,)}))
    assert torch.equal(logits(first), alone[0])
    assert torch.equal(logits(second), alone[1])
    assert one.calls.calls["torch"] == 1
    one.detach()
    assert torch.equal(logits(first), stock[0])
    assert torch.equal(logits(second), alone[1])
    two.detach()
    assert torch.equal(logits(second), stock[1])


def test_models_that_share_a_configuration_do_not_disturb_each_other(tiny, make_artifact):
    first = tiny()
    second = type(first)(first.config).double().eval()
    assert second.config is first.config
    second.load_state_dict(tiny(seed=1).state_dict())
    stock = [logits(first), logits(second)]
    one, two = attach(first, make_artifact(first)), attach(second, make_artifact(second))
    both = [logits(first), logits(second)]
    one.detach()
    assert torch.equal(logits(first), stock[0])
    assert torch.equal(logits(second), both[1])
    assert not torch.equal(both[1], stock[1])
    two.detach()
    assert torch.equal(logits(second), stock[1])
    assert first.config._attn_implementation == "sdpa"


def test_detaching_leaves_no_trace(tiny, make_artifact):
    model = tiny()
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    attachment = attach(model, make_artifact(model))
    attachment.detach()
    attachment.detach()
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert not any(hasattr(m, BINDING) for m in model.modules())
    assert "generate" not in model.__dict__
    assert model.config._attn_implementation == "sdpa"


def test_a_suspended_calibration_is_the_stock_model(tiny, make_artifact):
    model = tiny()
    stock = logits(model)
    with calibrated(model, make_artifact(model)) as attachment:
        changed = logits(model)
        calls = attachment.calls.calls["torch"]
        with attachment.suspended():
            assert torch.equal(logits(model), stock)
            model.generate(PROMPT, max_new_tokens=2, pad_token_id=0, num_beams=2)
        assert attachment.calls.calls["torch"] == calls
        assert torch.equal(logits(model), changed)


def test_the_context_manager_detaches_after_an_error(tiny, make_artifact):
    model = tiny()
    stock = logits(model)
    with pytest.raises(RuntimeError, match="mine"), calibrated(model, make_artifact(model)):
        raise RuntimeError("mine")
    assert torch.equal(logits(model), stock)


def test_switching_the_kernel_under_the_calibration_is_an_error_not_a_baseline(tiny, make_artifact):
    model = tiny()
    with calibrated(model, make_artifact(model)):
        model.config._attn_implementation_internal = "sdpa"
        with pytest.raises(UnsupportedCallError, match="without calibration"):
            logits(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    ],
)
def test_generation_that_would_break_the_calibration_is_refused(
    tiny, make_artifact, settings, message
):
    model = tiny()
    with calibrated(model, make_artifact(model)):
        with pytest.raises(UnsupportedCallError, match=message) as caught:
            model.generate(PROMPT, max_new_tokens=2, **settings)
        assert "\n" not in str(caught.value)
        own = copy.deepcopy(model.generation_config)
        for name, value in settings.items():
            setattr(own, name, value)
        with pytest.raises(UnsupportedCallError, match=message):
            model.generate(PROMPT, generation_config=own, max_new_tokens=2)
    model.generate(PROMPT, max_new_tokens=2, pad_token_id=0, num_beams=2)  # stock is free to


def test_a_cache_that_was_filled_by_the_stock_model_is_refused(tiny, make_artifact):
    model = tiny()
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
    with calibrated(model, make_artifact(model)):
        with pytest.raises(UnsupportedCallError, match="not computed under this calibration"):
            logits(model, PROMPT[:, :1], past_key_values=cache)
        fresh = model(PROMPT, use_cache=True).past_key_values
        fresh.crop(-4)
        with pytest.raises(UnsupportedCallError, match="cropped"):
            logits(model, PROMPT[:, :1], past_key_values=fresh)
        fresh = model(PROMPT, use_cache=True).past_key_values
        fresh.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedCallError, match="select_cache"):
            logits(model, PROMPT[:, :1].repeat(2, 1), past_key_values=fresh)


def test_a_selected_cache_goes_on_as_the_original_would(tiny, make_artifact):
    model = tiny()
    rest = torch.tensor([[8, 9, 10]])
    with calibrated(model, make_artifact(model, decode="running")), torch.no_grad():
        cache = model(torch.cat([PROMPT, PROMPT.flip(1)]), use_cache=True).past_key_values
        picked = select_cache(cache, torch.tensor([1, 0, 1]))
        three = logits(model, rest.repeat(3, 1), past_key_values=picked)
        again = logits(model, rest.repeat(2, 1), past_key_values=copy.deepcopy(cache))
        direct = logits(model, rest.repeat(2, 1), past_key_values=cache)
    torch.testing.assert_close(three, direct[[1, 0, 1]], rtol=0, atol=1e-9)
    torch.testing.assert_close(again, direct, rtol=0, atol=0)


def test_interleaved_conversations_keep_their_own_sinks(tiny, make_artifact):
    model = tiny()
    with calibrated(model, make_artifact(model)), torch.no_grad():
        prompts = [PROMPT, PROMPT.flip(1)[:, :7]]
        alone = []
        for prompt in prompts:
            cache = model(prompt, use_cache=True).past_key_values
            alone.append(logits(model, PROMPT[:, :2], past_key_values=cache))
        caches = [model(prompt, use_cache=True).past_key_values for prompt in prompts]
        mixed = [logits(model, PROMPT[:, :2], past_key_values=cache) for cache in caches]
    for a, b in zip(alone, mixed, strict=True):
        assert torch.equal(a, b)


def test_a_static_cache_is_followed(tiny, make_artifact):
    from transformers import StaticCache

    model = tiny()
    with calibrated(model, make_artifact(model)), torch.no_grad():
        want = model(PROMPT, use_cache=True)
        cache = StaticCache(config=model.config, max_cache_len=40)
        got = model(PROMPT, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-9)
        next_want = logits(model, PROMPT[:, :1], past_key_values=want.past_key_values)
        next_got = logits(model, PROMPT[:, :1], past_key_values=cache)
        torch.testing.assert_close(next_got, next_want, rtol=0, atol=1e-9)


def test_expanded_masks_and_wrong_lengths_are_refused(tiny, make_artifact):
    model = tiny()
    with calibrated(model, make_artifact(model)) as attachment:
        with pytest.raises(UnsupportedCallError, match="2-dimensional"):
            logits(model, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool))
        with (
            pytest.raises(UnsupportedCallError, match="the batch has 1"),
            attachment.prompts([3, 4]),
        ):
            logits(model)


def test_a_peft_model_is_calibrated_through_its_base(tiny, make_artifact):
    peft = pytest.importorskip("peft")
    base = tiny(dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with calibrated(base, make_artifact(base)) as attachment, torch.no_grad():
        model(input_ids=PROMPT)
        assert attachment.calls.calls == {"torch": 3}


def test_the_model_at_hand_is_checked_against_the_artifact(tiny, make_artifact):
    model = tiny()
    with pytest.raises(ArtifactError, match="num_hidden_layers"):
        attach(tiny(num_hidden_layers=2), make_artifact(model))
    with pytest.raises(ArtifactError, match="architecture"):
        attach(tiny("mistral"), make_artifact(model))
    with pytest.warns(UserWarning, match="weights_sha256"):
        attach(tiny(seed=5), make_artifact(model)).detach()


def test_the_fingerprint_knows_weights_but_not_their_dtype(tiny):
    print_of = weights_fingerprint
    model = tiny(dtype=torch.bfloat16)
    assert print_of(model) == print_of(copy.deepcopy(model).float())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert print_of(other) != print_of(model)


def test_an_attachment_goes_with_its_model(tiny, make_artifact):
    import weakref

    model = tiny()
    attachment = attach(model, make_artifact(model))
    watch = weakref.ref(model)
    del model, attachment
    gc.collect()
    assert watch() is None


def test_the_example_of_the_package(tiny, make_artifact, tmp_path):
    model = tiny()
    path = make_artifact(model).save(tmp_path / "heads.json")
    with act_harness.calibrated(model, path):
        changed = model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0)
    stock = model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert not torch.equal(changed, stock)
