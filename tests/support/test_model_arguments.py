"""The model's arguments, whoever gives them: one line where they are wrong, none ignored."""

from __future__ import annotations

import json

import pytest
import torch
from bad_inputs import make_places
from transformers import GemmaConfig, GemmaForCausalLM

from act_harness.errors import (
    ActHarnessError,
    InfrastructureError,
    InputError,
    UnsupportedCallError,
)
from act_harness.model import CalibratedHFLM
from act_harness.support import model_arguments
from act_harness.support.model_arguments import (
    check_arguments,
    check_device,
    loading,
    parse_arguments,
    usable_device,
)


@pytest.fixture(scope="module")
def places(tiny_checkpoint, tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("bad"), tiny_checkpoint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("pretrained=a/b,dtype=float32", {"pretrained": "a/b", "dtype": "float32"}),
        ('{"pretrained": "m", "chat_template_args": {"x": 1}}',
         {"pretrained": "m", "chat_template_args": {"x": 1}}),
        ("temperature=0.5,do_sample=true", {"temperature": 0.5, "do_sample": True}),
        ('until=["a,b"],max_gen_toks=4', {"until": ["a,b"], "max_gen_toks": 4}),
    ],
)  # fmt: skip
def test_arguments_are_read_as_lm_eval_reads_them(text, expected):
    assert parse_arguments(text) == expected


def test_plain_lm_eval_gets_the_same_line(places, tmp_path):
    """``lm_eval --model hf-act`` makes the model by this call, with defaults of its own."""
    defaults = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    for text, kind, words in (
        ("pretrained={gone}", InfrastructureError, "no such folder"),
        ("pretrained={empty}", InfrastructureError, "holds no config.json"),
        ("pretrained={badweights}", InfrastructureError, "cannot be loaded"),
        ("pretrained={badtokenizer}", InfrastructureError, "cannot be loaded"),
        ("pretrained=no-owner/no-model", InfrastructureError, "cannot be loaded"),
        ("pretrained={otherwords}", InputError, "has .* words and the model"),
        ("pretrained={model},dtpye=float32", InputError, "did you mean 'dtype'"),
        ("pretrained={model},dtype=flot32", InputError, "did you mean 'float32'"),
        ("artifact=none", InputError, "no model was named"),
        ("pretrained={model},use_cache=False", UnsupportedCallError, "would do nothing"),
        ("pretrained={model},revision=v2", InputError, "would do nothing"),
    ):
        given = f"{text.format(**places)},artifact=none".removeprefix("artifact=none,")
        with pytest.raises(kind, match=words) as caught:
            CalibratedHFLM.create_from_arg_string(given, defaults)
        assert "\n" not in str(caught.value)


def test_lm_evals_default_device_is_no_wish(tiny_checkpoint, monkeypatch):
    """Its command line says cuda:0 where nothing was said; a CPU alone is no error then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert usable_device("cuda:0") == usable_device(None) == "cpu"
    check_arguments(str(tiny_checkpoint), {"device": "cuda:0"})
    with pytest.raises(InfrastructureError, match="this machine has none; use cpu"):
        check_device("cuda:0")
    with pytest.raises(InfrastructureError, match="this machine has none"):
        check_arguments(str(tiny_checkpoint), {"device": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda:0") == "cuda:0"
    check_device("cuda:1")
    with pytest.raises(InfrastructureError, match="'cuda:2' was asked for and this machine has 2"):
        check_device("cuda:2")


def test_what_would_do_nothing_says_so(tiny_checkpoint):
    for name, value in (("logits_cache", False), ("truncation", True), ("max_batch_size", 8)):
        with pytest.warns(UserWarning, match=f"{name} does nothing with hf-act"):
            check_arguments(str(tiny_checkpoint), {name: value})
    with pytest.warns(UserWarning, match="device_map does nothing without parallelize=True"):
        check_arguments(str(tiny_checkpoint), {"device_map": "auto"})
    check_arguments(str(tiny_checkpoint), {"device_map": {"": 0}, "parallelize": True})


def test_a_path_is_a_model_and_other_things_are_not(tiny_checkpoint, monkeypatch):
    lm = CalibratedHFLM(tiny_checkpoint, artifact=None, device=torch.device("cpu"))
    assert lm.pretrained == str(tiny_checkpoint)
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    assert (
        CalibratedHFLM(f"~/{tiny_checkpoint.name}", artifact=None, device="cpu").facts == lm.facts
    )


def test_more_special_tokens_than_vectors_is_a_warning(tiny_checkpoint):
    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", device="cpu")
    model_arguments.check_vocabulary(lm.model, lm.tokenizer)
    rows = lm.model.get_input_embeddings().num_embeddings
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    with pytest.warns(UserWarning, match="2 special tokens that the model has no vectors for"):
        model_arguments.check_vocabulary(lm.model, lm.tokenizer)
    assert rows == len(lm.tokenizer) - 2


def test_a_tokenizer_that_knows_no_words_is_refused(tmp_path):
    """transformers makes one of these where a folder of Gemma holds no tokenizer's files."""
    config = GemmaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    GemmaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="knows no words, as where a folder holds no tokenizer's"):
        CalibratedHFLM(str(tmp_path / "model"), artifact="none", device="cpu")


def test_whatever_loading_raises_is_one_line():
    for error, kind in (
        (OSError("a\nb"), InfrastructureError),
        (ValueError(""), InfrastructureError),
        (RecursionError("deep"), InfrastructureError),
        (Exception("tokenizers raises this"), InfrastructureError),
        (MemoryError(), InfrastructureError),
        (torch.OutOfMemoryError("CUDA out of memory"), InfrastructureError),
        (TypeError("f() got an unexpected keyword argument 'tokeniser'"), InputError),
        (InputError("ours"), InputError),
    ):
        with pytest.raises(ActHarnessError) as caught, loading("m", known=["tokenizer"]):
            raise error
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyboardInterrupt), loading("m"):
        raise KeyboardInterrupt


# -- artifacts -------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny):
    return tiny(dtype=torch.float32)


def test_a_head_set_by_hand(llama, tmp_path):
    import act_harness

    made = act_harness.head_set(llama, {1: [3, 0], 2: (1,)}, name="mine")
    assert made.heads == {1: (0, 3), 2: (1,)}
    assert made.calibration == act_harness.preset("paper")
    pairs = act_harness.head_set(
        llama, [(2, 1), (1, 3), (1, 0)], name="mine",
        calibration={"target": "initial", "mass": "reweight", "gamma": 2.0},
        strengths={1: {3: {"mass": "reweight", "gamma": 0.5}}},
    )  # fmt: skip
    assert pairs.heads == made.heads
    assert pairs.strengths[1][3].gamma == 0.5
    ids = torch.arange(3, 40)[None]
    stock = llama(ids).logits
    file = pairs.save(tmp_path / "mine.json")
    shown = []
    for given in (pairs, file, str(file), json.loads(file.read_text())):
        with act_harness.calibrated(llama, given):
            shown.append(llama(ids).logits)
    assert all(torch.equal(one, shown[0]) for one in shown)
    assert not torch.allclose(shown[0], stock, atol=1e-3)


def test_a_head_set_that_cannot_be_is_one_line(llama):
    import act_harness

    for heads, more, words in (
        ({9: [0]}, {}, "layer 9 is out of range, the model has 0..2"),
        ({0: [4]}, {}, "head 4 of layer 0 is out of range"),
        ([(0, 1), (0, 1)], {}, "names a head twice"),
        ([1, 2], {}, "expected {layer: "),
        ({0: 3}, {}, "expected {layer: "),
        (7, {}, "expected {layer: "),
        ({0: [1]}, {"calibration": "papre"}, "did you mean 'paper'"),
        ({0: [1]}, {"calibration": {"bta": 1}}, "did you mean 'beta'"),
        ({0: [1]}, {"strengths": {0: {2: {"beta": 0.1}}}}, "heads do not"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            act_harness.head_set(llama, heads, **more)
        assert "\n" not in str(caught.value)


def test_the_python_api_refuses_other_kinds_in_one_line(llama, tmp_path):
    import act_harness
    from act_harness.harness.evaluate import run_eval
    from act_harness.regress import RegressSettings, run_regress
    from act_harness.search import search_from_settings

    for call, words in (
        (lambda: act_harness.attach(llama, 3), "given as int; expected an Artifact, a path"),
        (lambda: act_harness.attach(llama, ["a"]), "given as list"),
        (lambda: act_harness.attach(llama, {"hedas": {}}), "did you mean 'heads'"),
        (lambda: act_harness.attach("folder", "none"), "model was given as str"),
        (lambda: act_harness.head_set("folder", {0: [1]}), "model was given as str"),
        (lambda: run_eval({"tasks": ["a"]}), "given as dict, expected EvalSettings"),
        (lambda: run_eval("a"), "given as str"),
        (lambda: search_from_settings({"tasks": ["a"]}), "expected SearchSettings"),
        (lambda: run_regress("suite"), "expected RegressSettings"),
        (lambda: RegressSettings("suite", limit=0), "--limit is 0"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
