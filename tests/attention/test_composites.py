"""Models of text and images, and decoders whose layers differ: text through both arms."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import IDS, PROMPT, Oracle, logits, settings
from transformers import AutoConfig, BertConfig, CLIPConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from act_harness.attention import attach, calibrated
from act_harness.attention.dimensions import cached_values, head_count, of_layers, widths
from act_harness.attention.load import auto_class, load_plain_model
from act_harness.bench import families
from act_harness.bench.families import build_tiny, try_family
from act_harness.errors import UnsupportedCallError, UnsupportedModelError
from act_harness.model import CalibratedHFLM

KINDS = (
    "gemma3",
    "gemma4",
    "gemma4_text",
    "gemma3n_text",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llama4",
)


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_logits_are_the_oracles(kind, make_artifact, monkeypatch):
    """The oracle replaces the stock softmax; strength 1 and detaching leave stock's logits."""
    model = build_tiny(kind)
    model.set_attn_implementation("eager")
    heads = model.config.get_text_config().num_attention_heads
    stock = logits(model)
    expected = Oracle(monkeypatch, heads).logits(model)
    artifact = settings(make_artifact, model)
    with calibrated(model, artifact, engine="reference") as attachment:
        with attachment.prompts([PROMPT]):
            found = logits(model)
        # generate() prefills with logits_to_keep, for which Gemma 4 leaves rows out of layers
        with attachment.prompts([PROMPT]):
            last = logits(model, logits_to_keep=1)
    assert (expected - stock).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(last, found[:, -1:], atol=1e-5, rtol=1e-5)
    with calibrated(model, settings(make_artifact, model, beta=1.0)):
        torch.testing.assert_close(logits(model), stock, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma3n_text", "qwen2_5_vl"])
def test_batches_caches_and_generation_agree(kind):
    row = try_family(kind)
    assert row.result == "works"
    assert row.generation == "yes"
    assert not row.search.startswith("crashes")


def test_the_tiny_gemmas_differ_by_layer():
    """What the tests above prove nothing without."""
    model = build_tiny("gemma4")
    config = model.config.get_text_config()
    assert of_layers(config, "head_dim") == [8, 16, 8, 16]
    assert config.num_kv_shared_layers == 2
    # 2 (keys, values) x 2 heads x (8 + 16 + 8 + 16)
    assert cached_values(config) == 192
    nano = build_tiny("gemma3n_text").config
    assert widths(nano) == [48, 96, 48, 96]
    assert nano.num_kv_shared_layers == 2


def test_sizes_by_layer():
    """One value stands for all layers, a list is by layer, and what is not said is None."""
    plain = CONFIG_MAPPING["llama"](
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    assert of_layers(plain, "num_attention_heads") == [4, 4, 4]
    assert of_layers(plain, "attention_chunk_size") == [None, None, None]
    assert cached_values(plain) == 2 * 3 * 4 * 8
    own = CONFIG_MAPPING["laguna"](
        num_hidden_layers=3, num_attention_heads=4, num_attention_heads_per_layer=[2, 4, 6]
    )
    assert of_layers(own, "num_attention_heads") == [2, 4, 6]
    assert head_count(own) == 6
    assert head_count(CONFIG_MAPPING["mamba"](num_hidden_layers=3)) is None


@pytest.fixture
def folder(request, tiny_checkpoint, tmp_path, monkeypatch):
    """A tiny model of a type in a folder, with a tokenizer of bytes."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        monkeypatch.setitem(families._TINY, name, len(tokenizer))
    build_tiny(request.param).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


TEXT = "The cat sat on the mat; the dog sat in the garden and"


@pytest.mark.parametrize("folder", ["gemma3", "gemma4", "mistral3"], indirect=True)
def test_text_goes_through_hf_act_in_both_arms(folder, make_artifact):
    """From a folder: log-likelihoods are those of a plain forward, and generation runs."""
    lm = CalibratedHFLM(pretrained=str(folder), artifact="none", device="cpu", dtype="float32")
    before = lm.tok_encode(TEXT)
    pairs = [((TEXT, " ran"), before, lm.tok_encode(" ran")), ((TEXT, "s"), before, [9, 11, 40])]

    def expected(attachment):
        found = []
        for _, context, answer in pairs:
            with attachment.prompts([len(context)]):
                out = logits(lm.model, torch.tensor([context + answer]))[0, len(context) - 1 : -1]
            rows = torch.log_softmax(out, dim=-1)
            found.append(float(rows.gather(1, torch.tensor(answer)[:, None]).sum()))
        return found

    scores = []
    for artifact in (None, settings(make_artifact, lm.model)):
        lm.use_artifact(artifact)
        scores.append([score for score, _ in lm._loglikelihood_tokens(pairs, disable_tqdm=True)])
        with calibrated(lm.model, artifact) as attachment:
            assert scores[-1] == pytest.approx(expected(attachment), abs=1e-3)
    assert max(abs(a - b) for a, b in zip(*scores, strict=True)) > 1e-3
    made = lm._model_generate(torch.tensor([before]), len(before) + 3, [])
    assert made.shape[1] > len(before)


@pytest.mark.parametrize("folder", ["mistral3"], indirect=True)
def test_commands_load_models_of_text_and_images(folder):
    assert type(load_plain_model(str(folder))).__name__ == "Mistral3ForConditionalGeneration"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (CLIPConfig(), "'clip' are no causal language models"),
        (CONFIG_MAPPING["florence2"](), "an encoder of its own for text"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(config, told, tmp_path, tiny_checkpoint):
    with pytest.raises(UnsupportedModelError, match=told):
        auto_class(config)
    config.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=told):
        CalibratedHFLM(pretrained=str(tmp_path), artifact="none", device="cpu")
    with pytest.raises(UnsupportedModelError, match=told):
        load_plain_model(str(tmp_path))


def test_models_of_text_alone_load_as_before(tiny_checkpoint):
    assert auto_class(AutoConfig.from_pretrained(tiny_checkpoint)).__name__ == (
        "AutoModelForCausalLM"
    )
    assert auto_class(BertConfig()).__name__ == "AutoModelForCausalLM"
    brought = CLIPConfig()
    brought.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    assert auto_class(brought).__name__ == "AutoModelForCausalLM"


def test_images_that_see_ahead_are_refused(make_artifact):
    """Gemma 3's image tokens attend to later ones; text with the processor's zeros passes."""
    model = build_tiny("gemma3")
    stock = logits(model)
    attachment = attach(model, settings(make_artifact, model))
    words = torch.zeros_like(IDS)
    found = logits(model, token_type_ids=words)
    torch.testing.assert_close(found, logits(model))
    image = words.clone()
    image[0, 3:6] = 1
    with pytest.raises(UnsupportedCallError, match="token_type_ids"):
        logits(model, token_type_ids=image)
    # refused before any layer ran, and the next forward is as it was
    torch.testing.assert_close(logits(model), found)
    with pytest.raises(UnsupportedCallError, match="2-dimensional"):
        logits(model, attention_mask={"full_attention": None, "sliding_attention": None})
    attachment.detach()
    assert torch.equal(logits(model), stock)


def test_targets_that_need_tokens_are_told_them(make_artifact):
    """The decoder of a composite model is given embeddings; the ids are its caller's."""
    model = build_tiny("gemma3")
    artifact = make_artifact(model, alpha=None, rule=None, target="random", count=2)
    with calibrated(model, artifact) as attachment, attachment.prompts([PROMPT]):
        found = logits(model)
    assert not torch.equal(found, logits(model))


def test_a_decoder_that_is_called_alone_and_a_copy(make_artifact):
    """The decoder itself reads its own arguments; a copied model has a caller of its own."""
    model = build_tiny("gemma3")
    attachment = attach(model, settings(make_artifact, model))
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    whole = logits(model, attention_mask=mask)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=IDS, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden)[:, 3:], whole[:, 3:])
    twin = copy.deepcopy(model)
    attachment.detach()
    torch.testing.assert_close(logits(twin, attention_mask=mask), whole)
