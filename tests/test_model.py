"""``hf-act`` through lm-eval: arguments, arms, results, refusals."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_heads import save_heads

from act_harness.calibration import Calibration
from act_harness.errors import ArtifactError, InputError, UnsupportedCallError
from act_harness.model import CalibratedHFLM
from act_harness.model.calibrated import _refuse_virtual_tokens
from act_harness.support.processes import Processes

QUESTIONS = [
    ("The cat sat on the", [" mat", " moon", " the other cat there"]),
    ("In a hole in the ground there lived a", [" hobbit", " a"]),
    ("Then", [" they went there", " the", " them"]),
]


def instances(pairs):
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=(context, answer), idx=n)
        for n, (context, answer) in enumerate(pairs)
    ]


PAIRS = [(context, answer) for context, answers in QUESTIONS for answer in answers]


@pytest.fixture(scope="module")
def artifact_file(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny-heads.json"
    heads = {0: (0, 2), 1: (1, 3), 2: (0, 1)}
    return save_heads(tiny_checkpoint, path, name="tiny-heads", heads=heads, alpha=1.5)


def make(checkpoint, artifact="none", **more):
    more = {"dtype": "float32", "device": "cpu", "batch_size": 4, **more}
    return CalibratedHFLM(str(checkpoint), artifact=str(artifact), **more)


def values(answers):
    return [answer[0] for answer in answers]


def test_the_baseline_arm_is_stock_hf(tiny_checkpoint):
    stock = HFLM(str(tiny_checkpoint), dtype="float32", device="cpu", batch_size=3)
    want = stock.loglikelihood(instances(PAIRS), disable_tqdm=True)
    for batch_size in (1, 8, "auto"):
        lm = make(tiny_checkpoint, batch_size=batch_size)
        got = lm.loglikelihood(instances(PAIRS), disable_tqdm=True)
        assert values(got) == pytest.approx(values(want), abs=1e-4)
        assert [g[1] for g in got] == [w[1] for w in want]


def test_an_empty_context_is_conditioned_on_the_prefix_token(tiny_checkpoint):
    stock = HFLM(str(tiny_checkpoint), dtype="float32", device="cpu")
    requests = instances([("", "the cat"), ("", "<s>the")])
    want = stock.loglikelihood(requests, disable_tqdm=True)
    got = make(tiny_checkpoint).loglikelihood(requests, disable_tqdm=True)
    assert values(got) == pytest.approx(values(want), abs=1e-4)


BLANK = ["\n", " ", "\t", " \n", "\u2003"]


@pytest.mark.parametrize("arm", ["baseline", "calibrated"])
@pytest.mark.parametrize("blank", BLANK)
def test_a_context_without_tokens_is_scored_as_part_of_what_follows(
    tiny_checkpoint, artifact_file, blank, arm
):
    """Stock stops there; the answer's first token must not be read from some other row."""
    artifact = artifact_file if arm == "calibrated" else "none"
    request = (blank, "the cat sat")
    asked = [request, ("a longer context", " and an answer"), (blank, " dog"), (blank, "")]
    whole = [("", context + answer) for context, answer in asked]
    want = values(make(tiny_checkpoint, artifact).loglikelihood(instances(whole[:1]), True))
    for options in ({"batch_size": 1}, {"batch_size": 8}, {"scoring": "plain"}):
        lm = make(tiny_checkpoint, artifact, **options)
        got = values(lm.loglikelihood(instances(asked), disable_tqdm=True))
        assert got[:1] == pytest.approx(want, abs=1e-4)
        assert got[2:] == pytest.approx(values(lm.loglikelihood(instances(whole[2:]), True)))
        assert values(lm.loglikelihood(instances([request]), True)) == pytest.approx(want, abs=1e-4)
    before, after = lm._encode_request(*request, {})
    assert before == [lm.prefix_token_id]
    assert lm.tok_decode(after) == blank + "the cat sat"


def test_a_chat_template_that_writes_white_space_only(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    lm.tokenizer.chat_template = "\n{% for turn in messages %}{{ turn.content | trim }}{% endfor %}"
    prompt = lm.apply_chat_template([{"role": "user", "content": " "}])
    assert not prompt.strip()
    (found,) = lm.loglikelihood(instances([(prompt, "yes")]), disable_tqdm=True)
    (want,) = lm.loglikelihood(instances([("", prompt + "yes")]), disable_tqdm=True)
    assert found[0] == pytest.approx(want[0], abs=1e-6)


def test_blank_contexts_with_a_tokenizer_that_adds_a_first_token(tiny_checkpoint):
    """There stock has a value, and it is the same one."""
    from tokenizers.processors import TemplateProcessing

    models = [HFLM(str(tiny_checkpoint), dtype="float32", device="cpu"), make(tiny_checkpoint)]
    for lm in models:
        lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        assert lm.tok_encode("") == [1]
    requests = instances([(blank, "the cat") for blank in BLANK] + [("", "\nthe cat")])
    want, got = (values(lm.loglikelihood(requests, disable_tqdm=True)) for lm in models)
    assert got == pytest.approx(want, abs=1e-4)
    assert got[0] == pytest.approx(got[-1], abs=1e-4)


def test_an_empty_continuation_of_an_empty_context_is_counted(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    assert lm.loglikelihood(instances([("", "")]), disable_tqdm=True) == [(0.0, True)]
    assert lm.counters.summary()["requests_with_empty_continuation"] == 1


def test_calibrated_scores_do_not_depend_on_batch_or_sharing(tiny_checkpoint, artifact_file):
    plain = make(tiny_checkpoint, artifact_file, scoring="plain")
    want = values(plain.loglikelihood(instances(PAIRS), disable_tqdm=True))
    base = make(tiny_checkpoint).loglikelihood(instances(PAIRS), disable_tqdm=True)
    assert max(abs(a - b) for a, b in zip(want, values(base), strict=True)) > 1e-3
    expected = plain.get_model_info()["act_harness"]["counters"]
    for batch_size in (1, 8, "auto"):
        lm = make(tiny_checkpoint, artifact_file, batch_size=batch_size)
        got = values(lm.loglikelihood(instances(PAIRS), disable_tqdm=True))
        assert got == pytest.approx(want, abs=1e-4)
        counters = lm.get_model_info()["act_harness"]["counters"]
        assert counters == pytest.approx(expected, rel=1e-5)
    assert expected["prompts"] == 3
    assert expected["pairs"] == 3 * 6
    assert 0 < expected["share_of_pairs_with_sink"] <= 1
    assert expected["mean_moved_mass"] > 0


def test_a_token_that_spans_the_boundary_is_scored_and_counted(tiny_checkpoint):
    # "the" is one token, so "t" + "he" leaves no token for the continuation; stock hf fails
    stock = HFLM(str(tiny_checkpoint), dtype="float32", device="cpu")
    request = instances([("see t", "he")])
    with pytest.raises(AssertionError):
        stock.loglikelihood(request, disable_tqdm=True)
    lm = make(tiny_checkpoint)
    (score,) = lm.loglikelihood(request, disable_tqdm=True)
    (whole,) = lm.loglikelihood(instances([("see ", "the")]), disable_tqdm=True)
    assert score[0] == pytest.approx(
        lm._loglikelihood_tokens(
            [(("", ""), lm.tok_encode("see "), lm.tok_encode("the"))], disable_tqdm=True
        )[0][0],
        abs=1e-5,
    )
    assert whole[0] < 0
    assert lm.counters.summary()["requests_with_empty_continuation"] == 1
    assert lm.loglikelihood(instances([("see", "")]), disable_tqdm=True) == [(0.0, True)]


@pytest.mark.parametrize("overlength", ["truncate", "skip", "error"])
def test_requests_longer_than_the_model(tiny_checkpoint, artifact_file, overlength):
    lm = make(tiny_checkpoint, artifact_file, overlength=overlength, max_length=16)
    pairs = [("a b c d e f g h i j k", " x y"), ("ab", " c")]
    requests = instances(pairs)
    if overlength == "error":
        with pytest.raises(InputError, match="the model takes 16"):
            lm.loglikelihood(requests, disable_tqdm=True)
        return
    said = pytest.warns(UserWarning, match="1 of 2 requests are longer than the model's 16 tokens")
    with said if overlength == "skip" else nullcontext():
        long, short = lm.loglikelihood(requests, disable_tqdm=True)
    counters = lm.counters.summary()
    assert short[0] < 0
    assert [request.args[:2] for request in requests] == pairs
    (mark,) = requests[0].args[2:]  # what lm-eval writes into the sample as arg_2
    assert len(requests[1].args) == 2
    surplus = mark.pop("surplus_tokens" if overlength == "skip" else "lost_tokens")
    assert surplus == len(lm.tok_encode("".join(pairs[0]))) - 17
    assert mark == {"overlength": "skipped" if overlength == "skip" else "truncated"}
    if overlength == "skip":
        assert long == (float("-inf"), False)
        assert (counters["requests_skipped"], counters["prompts_truncated"]) == (1, 0)
        assert counters["answers_not_finite"] == 0  # it is minus infinity on purpose
    else:
        stock = HFLM(str(tiny_checkpoint), dtype="float32", device="cpu", max_length=16)
        lm.use_artifact(None)
        (same, _) = lm.loglikelihood(requests, disable_tqdm=True)
        want = stock.loglikelihood(instances(pairs), disable_tqdm=True)
        assert same[0] == pytest.approx(want[0][0], abs=1e-4)
        assert counters["prompts_truncated"] == counters["prompts_without_first_token"] == 1


def rolling(*texts):
    return [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=n)
        for n, text in enumerate(texts)
    ]


def test_rolling_is_stock_without_running_and_says_so_once(tiny_checkpoint, artifact_file):
    texts = rolling("the cat sat on the mat and there it was then " * 3, "a b")
    stock = HFLM(str(tiny_checkpoint), dtype="float32", device="cpu", max_length=40)
    want = stock.loglikelihood_rolling(texts, disable_tqdm=True)
    lm = make(tiny_checkpoint, artifact_file, max_length=40)
    with pytest.warns(UserWarning, match="no prompt"):
        got = lm.loglikelihood_rolling(texts, disable_tqdm=True)
    assert got == pytest.approx(want, abs=1e-3)
    lm.loglikelihood_rolling(texts, disable_tqdm=True)  # warnings are errors: a second one fails
    running = lm.artifact.model_copy(
        update={"calibration": Calibration(alpha=1.5, decode="running")}
    )
    lm.use_artifact(running)
    changed = lm.loglikelihood_rolling(texts, disable_tqdm=True)
    assert abs(changed[0] - want[0]) > 1e-3


def generation(*texts, **settings):
    return [
        Instance(request_type="generate_until", doc={}, arguments=(text, settings), idx=n)
        for n, text in enumerate(texts)
    ]


def test_generation_does_not_depend_on_the_batch(tiny_checkpoint, artifact_file):
    requests = generation(
        "the cat", "Then there was a long story", "x", until=["zzz"], max_gen_toks=8
    )
    found = []
    for batch_size in (1, 3, "auto"):
        lm = make(tiny_checkpoint, artifact_file, batch_size=batch_size)
        found.append(lm.generate_until(requests, disable_tqdm=True))
        assert lm.counters.summary()["prompts"] == 3
    assert found[0] == found[1] == found[2]
    assert found[0] != make(tiny_checkpoint).generate_until(requests, disable_tqdm=True)


def test_prompts_to_go_on_from_are_skipped_where_that_is_asked(tiny_checkpoint, artifact_file):
    """`overlength=skip` cut them, as `truncate` does, and answered from half a prompt."""
    settings = {"until": ["zzz"], "max_gen_toks": 6}
    long, short = "x y z " * 9, "the cat"
    skipping = make(tiny_checkpoint, artifact_file, overlength="skip", max_length=24)
    requests = generation(long, short, long + "!", **settings)
    with pytest.warns(UserWarning, match="2 of 3 requests are longer than the model's 24 tokens"):
        found = skipping.generate_until(requests, disable_tqdm=True)
    plain = make(tiny_checkpoint, artifact_file, max_length=24)
    (alone,) = plain.generate_until(generation(short, **settings), disable_tqdm=True)
    assert found == ["", alone, ""]
    surplus = len(skipping.tok_encode(long)) - (24 - 6)
    assert requests[0].args[2:] == ({"overlength": "skipped", "surplus_tokens": surplus},)
    assert len(requests[1].args) == 2
    counters = skipping.counters.summary()
    assert (counters["requests_skipped"], counters["prompts_truncated"]) == (2, 0)
    wide = make(tiny_checkpoint, artifact_file, max_length=64)  # the same requests to another model
    assert all(wide.generate_until(requests, disable_tqdm=True))
    again = make(tiny_checkpoint, artifact_file, overlength="skip", max_length=24)
    with pytest.warns(UserWarning, match="1 of 1 requests"):
        nothing = again.generate_until(generation(long, **settings), disable_tqdm=True)
    assert nothing == [""]


@pytest.mark.parametrize("arm", ["baseline", "calibrated"])
def test_an_empty_prompt_is_continued_from_the_prefix_token(tiny_checkpoint, artifact_file, arm):
    """Stock fails on it alone, and generates from a row of pads beside other prompts."""
    artifact = artifact_file if arm == "calibrated" else "none"
    settings = {"until": ["zzz"], "max_gen_toks": 6}
    lm = make(tiny_checkpoint, artifact, batch_size=1)
    (alone,) = lm.generate_until(generation("", **settings), disable_tqdm=True)
    prefix = lm.tokenizer.decode([lm.prefix_token_id])
    assert [alone] == lm.generate_until(generation(prefix, **settings), disable_tqdm=True)
    assert lm.counters.summary()["prompts"] == (arm == "calibrated")
    beside = make(tiny_checkpoint, artifact, batch_size=3)
    texts = ("the cat", "", "Then there was a story")
    assert beside.generate_until(generation(*texts, **settings), disable_tqdm=True)[1] == alone


@pytest.mark.parametrize("padded", [False, True])
def test_generation_without_a_mask_takes_the_one_that_stock_infers(
    tiny_checkpoint, artifact_file, padded
):
    lm = make(tiny_checkpoint, artifact_file)
    text = lm.tok_encode("Then there was a story")
    context = torch.tensor([text, [0] * 3 + text[3:]] if padded else [text])
    options = {"max_length": context.shape[1] + 5, "stop": ["zzz"]}
    found = lm._model_generate(context, **options)
    want = make(tiny_checkpoint, artifact_file)
    assert torch.equal(
        found, want._model_generate(context, attention_mask=(context != 0).long(), **options)
    )
    assert lm.counters.summary() == want.counters.summary()
    assert lm.counters.summary()["prompts"] == len(context)


@pytest.mark.parametrize(
    "setting", [{"num_beams": 2}, {"prefill_chunk_size": 4}, {"use_cache": False}]
)
def test_generation_settings_that_would_break_the_calibration(
    tiny_checkpoint, artifact_file, setting
):
    lm = make(tiny_checkpoint, artifact_file)
    request = generation("the cat", until=["z"], max_gen_toks=2, **setting)
    with pytest.raises(UnsupportedCallError, match=next(iter(setting))):
        lm.generate_until(request, disable_tqdm=True)


def test_each_prompt_of_a_batch_is_encoded_by_itself(tiny_checkpoint):
    lm = make(tiny_checkpoint, add_bos_token=True)
    ids, mask = lm.tok_batch_encode(["<s>the", "cat"])
    bos = lm.tokenizer.bos_token_id
    for row, real in zip(ids, mask.bool(), strict=True):
        assert row[real].tolist().count(bos) <= 1
    again, _ = lm.tok_batch_encode(["cat", "<s>the"])
    assert torch.equal(again.flip(0), ids)


def test_the_instruction_survives_a_template_that_refuses_system_messages(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert "<system>Be kind.</system>" in lm.apply_chat_template(turns)
    lm.tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn.role == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}<{{ turn.role }}>{{ turn.content }}"
        "{% endfor %}"
    )
    assert lm.apply_chat_template(turns) == "<user>Be kind.\n\nHello"
    assert turns[1]["content"] == "Hello"


def test_use_cache_of_lm_eval_is_refused(tiny_checkpoint, tmp_path):
    from lm_eval.api.model import CachingLM

    with pytest.raises(UnsupportedCallError, match="use_cache"):
        CachingLM(make(tiny_checkpoint), str(tmp_path / "cache.db"))  # what --use_cache does


def test_bad_arguments_are_one_line(tiny_checkpoint, artifact_file, tmp_path):
    for arguments, message in (
        ({"engine": "tourch"}, "did you mean 'torch'"),
        ({"overlength": "cut"}, "expected one of truncate, error, skip"),
        ({"scoring": "both"}, "expected one of shared, plain"),
        ({"backend": "seq2seq"}, "causal models only"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            make(tiny_checkpoint, artifact_file, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="neither a file nor a shipped artifact"):
        make(tiny_checkpoint, tmp_path / "missing.json")
    with pytest.raises(ArtifactError, match="artifact=none for the baseline"):
        make(tiny_checkpoint, "")
    content = json.loads(artifact_file.read_text())
    content["model"]["tokenizer_probe_sha256"] = "0" * 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="another tokenizer"):
        make(tiny_checkpoint, other)


def test_results_say_what_was_calibrated(tiny_checkpoint, artifact_file):
    lm = make(tiny_checkpoint, artifact_file)
    lm.loglikelihood(instances(PAIRS), disable_tqdm=True)
    info = lm.get_model_info()["act_harness"]
    assert info["artifact"] == info["arm"] == "tiny-heads"
    assert info["artifact_sha256"] == lm.artifact.sha256()
    assert info["calibration"]["alpha"] == 1.5
    assert info["engine"] == "torch"
    assert info["engine_calls"]["torch"] > 0
    assert info["heads"] == 6
    json.dumps(info)
    lm.use_artifact("none")
    assert lm.get_model_info()["act_harness"]["arm"] == "baseline"


def test_a_machine_without_a_gpu_needs_no_device_argument(tiny_checkpoint):
    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", dtype="float32")
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_rank_and_world_are_those_of_the_processes(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    assert (lm.rank, lm.world_size) == (0, 1)
    lm.accelerator = SimpleNamespace(
        num_processes=2, process_index=0, device=torch.device("cpu"), unwrap_model=lambda own: own
    )
    lm.share_work(Processes(2, 4))  # over all machines; the accelerator's device is this one's
    assert (lm.rank, lm.world_size, lm.device) == (2, 4, torch.device("cpu"))
    with lm.alone():
        assert (lm.rank, lm.world_size) == (2, 1)
    assert lm.world_size == 4


def test_adapters_with_virtual_tokens_are_refused(tiny):
    """Prompt tuning puts tokens before the prompt: every position and score would shift."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    given = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(InputError, match=r"PROMPT_TUNING.*--model hf"):
        _refuse_virtual_tokens(peft.get_peft_model(tiny(), given))
    weights = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    _refuse_virtual_tokens(peft.get_peft_model(tiny(), weights))


def test_a_model_without_attention_heads_is_refused_in_a_line():
    from transformers import MambaConfig, MambaForCausalLM

    from act_harness.attention import model_facts
    from act_harness.errors import UnsupportedModelError

    model = MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM has no attention heads"):
        model_facts(model)


SPREAD = {
    "model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.mark.parametrize("places", [{"": "disk"}, SPREAD])
@pytest.mark.parametrize("scoring", ["shared", "plain"])
def test_weights_that_are_fetched_give_the_same_scores(
    tiny_checkpoint, artifact_file, tmp_path, places, scoring
):
    """Accelerate keeps them on a meta device, which computes nothing and which autocast refuses."""
    if places == {"": "disk"}:
        pytest.importorskip("accelerate", "1.15", reason="before, not all of a model may lie there")
    spread = make(
        tiny_checkpoint, artifact_file, scoring=scoring, parallelize=True, device_map=places,
        offload_folder=str(tmp_path / "offload"),
    )  # fmt: skip
    assert any(parameter.device.type == "meta" for parameter in spread.model.parameters())
    lm = make(tiny_checkpoint, artifact_file, scoring=scoring)
    for arm in (str(artifact_file), "none"):
        for one in (spread, lm):
            one.use_artifact(arm)
        assert spread.loglikelihood(instances(PAIRS), disable_tqdm=True) == lm.loglikelihood(
            instances(PAIRS), disable_tqdm=True
        )


def test_a_model_is_not_laid_on_the_disk_for_want_of_a_gpu(
    tiny_checkpoint, artifact_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="parallelize=True does nothing here"):
        lm = make(tiny_checkpoint, artifact_file, parallelize=True)
    expected = make(tiny_checkpoint, artifact_file)
    assert lm.loglikelihood(instances(PAIRS), disable_tqdm=True) == expected.loglikelihood(
        instances(PAIRS), disable_tqdm=True
    )
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_takes_one_token_is_refused(tiny, tiny_checkpoint):
    """Nothing can be scored in it: every answer was -inf, and the run ended well."""
    with pytest.raises(InputError, match="sequences of 1 tokens by its own settings"):
        CalibratedHFLM(
            tiny(max_position_embeddings=1, vocab_size=300),
            tokenizer=str(tiny_checkpoint),
            artifact="none",
        )
