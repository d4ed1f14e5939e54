"""Conversations of two turns: sampling, prompts, batches, kept answers, and the task itself."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from installed import REPOSITORY
from lm_eval.api.instance import Instance
from tiny_heads import save_heads

from act_harness.errors import InputError, ResultError, TaskError, UnsupportedCallError
from act_harness.model import CalibratedHFLM
from act_harness.mtbench.chat import REQUEST_TYPE, ChatSettings
from act_harness.mtbench.chat.sampling import RowSampler, gumbel_noise, row_key
from act_harness.mtbench.chat.store import Answer, AnswerStore, answers_folder

ROWS = [
    ("81", "writing", ["Tell me about a cat.", "Shorter, please."]),
    ("91", "roleplay", ["You are the captain of a ship in the rain. Speak.", "And the crew?"]),
    ("101", "reasoning", ["If I have two and lose one?", "And then?"]),
    ("111", "math", ["Two and two?", "And three more than that?"]),
    ("151", "humanities", ["Why?", "Why not?"]),
]
TOKENS = 12


def approx(value):
    return pytest.approx(value, rel=1e-5)


def requests(rows=ROWS, system=None, **generation):
    generation = {"max_gen_toks": TOKENS, **generation}
    return [
        Instance(
            request_type=REQUEST_TYPE,
            doc={},
            arguments=(
                "first prompt",
                {"question": name, "category": category, "turns": turns, "system": system,
                 "generation": generation},
            ),
            idx=0,
        )
        for name, category, turns in rows
    ]  # fmt: skip


@pytest.fixture(scope="module")
def artifact_file(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny-heads.json"
    heads = {0: (0, 2), 1: (1, 3), 2: (0, 1)}
    return save_heads(tiny_checkpoint, path, name="tiny-heads", heads=heads, alpha=1.5)


@pytest.fixture(params=["none", "calibrated"])
def arm(request, artifact_file):
    return "none" if request.param == "none" else artifact_file


def make(checkpoint, artifact="none", **more):
    more = {"dtype": "float32", "device": "cpu", "batch_size": 4, "answers": "none", **more}
    return CalibratedHFLM(str(checkpoint), artifact=str(artifact), **more)


def talk(lm, **settings):
    return lm.generate_conversations(requests(**settings), disable_tqdm=True)


# -- sampling --------------------------------------------------------------------------------------


def test_the_noise_of_a_token_depends_on_its_place_alone():
    keys = torch.tensor([row_key(1, "81", 1), row_key(1, "81", 2), row_key(2, "81", 1)])
    tokens = torch.arange(50).expand(3, 50)
    noise = gumbel_noise(keys, 3, tokens)
    alone = gumbel_noise(keys[1:2], 3, torch.tensor([[7, 40]]))
    assert torch.equal(alone[0], noise[1, [7, 40]])
    assert len(set(noise.flatten().tolist())) == 150
    assert not torch.equal(noise, gumbel_noise(keys, 4, tokens))


def test_the_noise_is_standard_gumbel():
    keys = torch.tensor([row_key(0, str(n), 1) for n in range(400)])
    noise = gumbel_noise(keys, 0, torch.arange(500).expand(400, 500))
    assert torch.isfinite(noise).all()
    # Mean and variance of the standard Gumbel distribution; 200 000 draws.
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.012)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(4000, 1)
    sampler = RowSampler(
        [row_key(3, str(n), 1) for n in range(4000)], [0.5] * 4000, start=2, top_k=0
    )
    drawn = sampler(torch.zeros(4000, 2, dtype=torch.long), logits).argmax(dim=1)
    shares = drawn.bincount(minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 0.5).softmax(0), atol=0.025)


@pytest.mark.parametrize(("cut", "allowed"), [({"top_k": 2}, {1, 2}), ({"top_p": 0.6}, {2})])
def test_unlikely_tokens_can_be_left_out(cut, allowed):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(200, 1)
    keys = [row_key(3, str(n), 1) for n in range(200)]
    sampler = RowSampler(keys, [1.0] * 200, start=0, **cut)
    drawn = sampler(torch.zeros(200, 0, dtype=torch.long), logits).argmax(dim=1)
    assert set(drawn.tolist()) == allowed


def test_greedy_rows_of_a_batch_are_left_alone():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    sampler = RowSampler([1, 2, 3], [0.0, 0.7, 0.0], start=0)
    done = sampler(torch.zeros(3, 4, dtype=torch.long), logits)
    assert torch.equal(done[[0, 2]], logits[[0, 2]])
    assert torch.isfinite(done[1]).sum() == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_generation_settings_are_one_line(given, message):
    with pytest.raises(TaskError) as caught:
        ChatSettings.parse(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_temperatures_are_those_of_the_original():
    settings = ChatSettings.parse({"until": []})
    categories = ("writing", "roleplay", "stem", "humanities", "math", "extraction")
    assert [settings.temperature_of(c) for c in categories] == [0.7, 0.7, 0.1, 0.1, 0.0, 0.0]
    assert settings.max_gen_toks == 1024
    for given in ({"greedy": True}, {"do_sample": False}, {"temperature": 0.0}):
        assert ChatSettings.parse(given).temperature_of("writing") == 0.0
    assert ChatSettings.parse({"temperature": 0.3}).temperature_of("math") == 0.3


# -- conversations ---------------------------------------------------------------------------------


def by_hand(lm, turns):
    """Greedy answers, one conversation at a time, with nothing but transformers."""
    messages, answers = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        text = lm.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([lm.tokenizer.encode(text, add_special_tokens=False)])
        with lm.attachment.engaged():  # between requests the model is stock
            output = lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        new = lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        answers.append(new)
        messages.append({"role": "assistant", "content": new})
    return answers


@pytest.mark.slow
def test_greedy_answers_are_those_of_one_conversation_at_a_time(tiny_checkpoint, arm):
    lm = make(tiny_checkpoint, arm)
    want = [by_hand(lm, turns) for _, _, turns in ROWS]
    assert talk(lm, greedy=True) == want
    assert all(len(set(answers)) == 2 for answers in want)  # the turns differ, so order matters


def test_calibration_changes_the_answers(tiny_checkpoint, artifact_file):
    plain = talk(make(tiny_checkpoint), greedy=True)
    assert talk(make(tiny_checkpoint, artifact_file), greedy=True) != plain


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [None, 1.5])
def test_answers_do_not_depend_on_the_batch(tiny_checkpoint, arm, temperature):
    lm = make(tiny_checkpoint, arm, batch_size=8)
    want = talk(lm, temperature=temperature, seed=5)
    counters = lm.counters.summary()
    for batch_size in (1, 2):
        lm = make(tiny_checkpoint, arm, batch_size=batch_size)
        assert talk(lm, temperature=temperature, seed=5) == want
        for name, value in lm.counters.summary().items():
            assert value == (counters[name] if value is None else approx(counters[name]))
    assert talk(lm, rows=ROWS[2:0:-1], temperature=temperature, seed=5) == want[2:0:-1]
    assert counters["prompts"] == (0 if arm == "none" else 2 * len(ROWS))


def test_a_run_repeats_exactly_and_another_seed_does_not(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    first = talk(lm, seed=5)
    torch.manual_seed(99)  # has no say where a seed is given
    assert talk(lm, seed=5) == first
    other = talk(lm, seed=6)
    assert [a != b for a, b in zip(first, other, strict=True)] == [True, True, False, False, True]


def test_without_a_seed_the_one_of_lm_eval_counts(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    torch.manual_seed(5)
    first = talk(lm)
    assert first == talk(lm, seed=5)
    torch.manual_seed(6)
    assert talk(lm) != first


def test_details_say_how_every_answer_ended(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    found = talk(lm, greedy=True)[0]
    assert isinstance(found, list)
    assert [answer.finish for answer in found.answers] == ["length", "length"]
    assert [answer.tokens for answer in found.answers] == [TOKENS, TOKENS]
    # Let a token that comes anyway be the end, and a text that comes anyway.
    ids = lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": ROWS[0][2][0]}]))
    new = lm.model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    new = new[0, len(ids) :].tolist()
    lm.model.generation_config.eos_token_id = [2, new[5]]
    stopped = talk(lm, greedy=True)[0].answers[0]
    assert (stopped.finish, stopped.tokens) == ("stop", new.index(new[5]))
    lm.model.generation_config.eos_token_id = 2
    piece = lm.tokenizer.decode(new[4:6])
    cut = talk(lm, greedy=True, until=[piece])[0].answers[0]
    assert cut.finish == "stop"
    assert cut.tokens < TOKENS
    assert cut.text == found[0].partition(piece)[0].strip()


def test_details_survive_the_way_between_processes(tiny_checkpoint):
    found = talk(make(tiny_checkpoint), greedy=True)[0]
    copied = pickle.loads(pickle.dumps(found))  # noqa: S301 - made one line above
    assert copied == found
    assert copied.answers == found.answers
    assert json.loads(json.dumps(found)) == list(found)


def test_settings_of_the_models_own_configuration_do_not_leak_in(tiny_checkpoint):
    lm = make(tiny_checkpoint)
    want = talk(lm, greedy=True)
    config = lm.model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 2.0, 1.8
    assert talk(lm, greedy=True) == want


def test_the_system_instruction_opens_both_turns(tiny_checkpoint, monkeypatch):
    lm, seen = make(tiny_checkpoint), []
    encode = lm.tok_encode
    monkeypatch.setattr(lm, "tok_encode", lambda text: seen.append(text) or encode(text))
    found = talk(lm, rows=ROWS[:1], system="Be brief.", greedy=True)[0]
    first = "<system>Be brief.</system><user>Tell me about a cat.</user><assistant>"
    assert seen == [
        first, f"{first}{found[0]}</assistant><user>Shorter, please.</user><assistant>"
    ]  # fmt: skip


def test_there_is_one_bos_however_it_comes(tiny_checkpoint):
    from tokenizers.processors import TemplateProcessing

    lm = make(tiny_checkpoint)
    template = lm.tokenizer.chat_template
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    for start in ("", "<s>"):
        lm.tokenizer.chat_template = start + template
        for answer in talk(lm, rows=ROWS[:2], greedy=True)[0].answers:
            text = start + _conversation_text(lm, answer.turn)
            assert answer.prompt_tokens == len(
                lm.tokenizer.encode(text, add_special_tokens=False)
            ) + (not start)


def _conversation_text(lm, turn):
    turns = ROWS[0][2]
    messages = [{"role": "user", "content": turns[0]}]
    if turn == 2:
        said = talk(lm, rows=ROWS[:1], greedy=True)[0][0]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": turns[1]}]
    return lm.apply_chat_template(messages).removeprefix("<s>")


# What SmolLM2's template and tokenizer make of the second turn of a conversation of our own. No
# BOS: SmolLM2's tokenizer adds none, and its template starts with <|im_start|> (1).
SMOLLM_TEXT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nRed."
    "<|im_end|>\n<|im_start|>user\nAnother one?<|im_end|>\n<|im_start|>assistant\n"
)
SMOLLM_IDS = [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
    1,
    4093,
    198,
    5820,
    253,
    7302,
    30,
    2,
    198,
    1,
    520,
    9531,
    198,
    12869,
    30,
    2,
    198,
    1,
    4093,
    198,
    4809,
    582,
    47,
    2,
    198,
    1,
    520,
    9531,
    198,
]


def test_turn_2_of_smollm_holds_turn_1_and_no_second_bos(smollm, monkeypatch):
    lm = make(smollm, batch_size=1)
    prompts = []

    def generate(input_ids, **settings):
        prompts.append(input_ids[0].tolist())
        answer = lm.tokenizer.encode(" Red.\n" if len(prompts) == 1 else "Blue.")
        return torch.tensor([[*prompts[-1], *answer, lm.tokenizer.eos_token_id]])

    monkeypatch.setattr(lm.model, "generate", generate)
    turns = ["Name a colour.", "Another one?"]
    found = talk(lm, rows=[("1", "math", turns)])
    assert found == [["Red.", "Blue."]]
    assert prompts[1] == SMOLLM_IDS
    assert lm.tokenizer.decode(prompts[1]) == SMOLLM_TEXT


# -- prompts that do not fit -----------------------------------------------------------------------


def test_long_prompts_are_cut_refused_or_skipped_and_counted(tiny_checkpoint):
    rows = [("1", "math", ["the " * 90, "And?"]), ROWS[0]]
    lm = make(tiny_checkpoint, max_length=130)
    with pytest.raises(InputError, match="a prompt has"):
        talk(make(tiny_checkpoint, max_length=130, overlength="error"), rows=rows)
    skipping = make(tiny_checkpoint, max_length=130, overlength="skip")
    found = talk(skipping, rows=rows, greedy=True)
    assert list(found[0]) == ["", ""]
    assert [answer.finish for answer in found[0].answers] == ["skipped", "skipped"]
    assert skipping.counters.summary()["requests_skipped"] == 2
    cut = talk(lm, rows=rows, greedy=True)
    assert [answer.prompt_tokens for answer in cut[0].answers] == [118, 118]
    assert lm.counters.summary()["prompts_truncated"] >= 2
    # What fits is the same, whatever its neighbour does.
    assert cut[1] == found[1] == talk(lm, rows=rows[1:], greedy=True)[0]


def test_an_answer_ends_where_the_context_is_full(tiny_checkpoint):
    prompt = len(make(tiny_checkpoint).tok_encode("<user>Why?</user><assistant>"))
    lm = make(tiny_checkpoint, max_length=prompt + 5)
    found = talk(lm, rows=[("151", "humanities", ["Why?"]), (*ROWS[4][:2], ["Why?"])], greedy=True)
    assert [a.finish for a in found[0].answers] == ["context"]
    assert [a.tokens for a in found[0].answers] == [5]


# -- kept answers ----------------------------------------------------------------------------------


def counting(lm, monkeypatch, *, fail_after=None):
    """Count generated rows; stop the run after some batches, as a kill would."""
    counts, generate = [], lm.model.generate

    def counted(**settings):
        if fail_after is not None and len(counts) == fail_after:
            raise KeyboardInterrupt
        counts.append(len(settings["input_ids"]))
        return generate(**settings)

    monkeypatch.setattr(lm.model, "generate", counted)
    return counts


def test_a_killed_run_does_only_what_is_missing(tiny_checkpoint, arm, tmp_path, monkeypatch):
    want = talk(make(tiny_checkpoint, arm), seed=5)
    lm = make(tiny_checkpoint, arm, batch_size=2, answers=tmp_path)
    counting(lm, monkeypatch, fail_after=4)  # 3 batches of turn 1, then 1 of turn 2
    with pytest.raises(KeyboardInterrupt):
        talk(lm, seed=5)
    file = next(tmp_path.glob("*/rank-0.jsonl"))
    with file.open("a") as stream:
        stream.write('{"question": "half a l')
    lm = make(tiny_checkpoint, arm, batch_size=8, answers=tmp_path)
    counts = counting(lm, monkeypatch)
    assert talk(lm, seed=5) == want
    assert counts == [3]
    summary = lm.counters.summary()
    assert summary["prompts"] == (0 if arm == "none" else 10)
    lm = make(tiny_checkpoint, arm, answers=tmp_path)
    counts = counting(lm, monkeypatch)
    assert talk(lm, seed=5) == want
    assert counts == []
    assert lm.counters.summary() == summary  # the records were kept with the answers


def test_other_arms_settings_and_prompts_have_answers_of_their_own(
    tiny_checkpoint, artifact_file, tmp_path, monkeypatch
):
    def generated(artifact, **settings):
        lm = make(tiny_checkpoint, artifact, answers=tmp_path)
        counts = counting(lm, monkeypatch)
        talk(lm, **{"seed": 5, **settings})
        return sum(counts)

    assert generated("none") == 10
    assert generated(artifact_file) == 10
    assert generated("none", seed=6) == 10
    assert generated("none", max_gen_toks=TOKENS + 1) == 10
    changed = [("81", "writing", ["Tell me about a dog.", "Shorter, please."]), *ROWS[1:]]
    assert generated("none", rows=changed) == 2
    assert generated("none") == 0
    assert {path.name.rpartition("-")[0] for path in tmp_path.iterdir()} == {
        "baseline", "tiny-heads",
    }  # fmt: skip


def test_answers_of_all_ranks_are_read(tmp_path):
    def answer(name):
        return Answer(name, 1, "p", 3, "text", 1, "stop")

    for rank in (0, 1):
        with closing(AnswerStore(tmp_path, arm="a b", settings={"x": 1}, rank=rank)) as store:
            store.add([answer(str(rank))])
    with closing(AnswerStore(tmp_path, arm="a b", settings={"x": 1}, rank=0)) as store:
        pass
    assert [store.find(name, 1, "p") is not None for name in ("0", "1", "2")] == [True, True, False]
    assert store.find("0", 1, "another prompt") is None
    next(tmp_path.glob("*/rank-1.jsonl")).write_text('{"question": "0"}\n')
    with pytest.raises(ResultError, match="does not hold answers"):
        AnswerStore(tmp_path, arm="a b", settings={"x": 1})


def test_a_folder_of_answers_has_one_writer(tmp_path):
    def opened(rank=0, **settings):
        return AnswerStore(tmp_path, arm="a", settings=settings, rank=rank)

    with closing(opened()):
        with pytest.raises(InputError, match=r"another run is writing .*answers=DIR"):
            opened()
        # Other settings and the other processes of the same run have files of their own.
        opened(x=1).close()
        opened(rank=1).close()
    opened().close()


def test_a_run_beside_another_is_refused_and_loses_nothing(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from act_harness.mtbench.chat.store import Answer, AnswerStore\n"
        "from act_harness.errors import InputError\n"
        "try:\n"
        "    store = AnswerStore(pathlib.Path(sys.argv[1]), arm='a', settings={})\n"
        "except InputError:\n"
        "    sys.exit(2)\n"
        "print('open', flush=True)\n"
        "sys.stdin.readline()\n"
        "for number in range(200):\n"
        "    store.add([Answer(str(number), 1, 'p', 3, 'text', 1, 'stop')])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "open\n"
    others = [subprocess.run(command, input="go\n", text=True).returncode for _ in range(2)]
    first.communicate("go\n")
    assert (first.returncode, others) == (0, [2, 2])
    with closing(AnswerStore(tmp_path, arm="a", settings={})) as store:
        assert all(store.find(str(number), 1, "p") for number in range(200))


def test_where_answers_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert answers_folder("") == tmp_path / "act-harness" / "answers"
    assert answers_folder("none") is None
    assert answers_folder(None) is None
    assert answers_folder("~/x") == Path("~/x").expanduser()


# -- the task --------------------------------------------------------------------------------------

TASKS = REPOSITORY / "tasks"


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """A data directory with a dataset of the real one's form, and rows of our own."""
    folder = tmp_path / "data" / "HuggingFaceH4" / "mt_bench_prompts"
    folder.mkdir(parents=True)
    rows = [
        {"prompt": turns, "reference": [], "category": category, "prompt_id": int(name)}
        for name, category, turns in ROWS
    ]
    rows[0]["reference"] = ["", ""]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("ACT_HARNESS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def evaluate(lm, **settings):
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        lm,
        tasks=["mt_bench"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        **{"apply_chat_template": True, "log_samples": True, "bootstrap_iters": 0, **settings},
    )


def test_the_task_through_lm_eval(questions, tiny_checkpoint, artifact_file):
    lm = make(tiny_checkpoint, artifact_file)
    results = evaluate(lm, gen_kwargs=f"max_gen_toks={TOKENS}", torch_random_seed=5)
    samples = results["samples"]["mt_bench"]
    assert [sample["filtered_resps"][0] for sample in samples] == talk(lm, seed=5)
    found = results["results"]["mt_bench"]
    assert found["turn_1_tokens,none"] == TOKENS
    assert found["turn_2_cut_off,none"] == 1.0
    assert 0 < found["turn_1_distinct_2,none"] <= 1
    first = samples[0]["arguments"][0][0]
    assert first == "<user>Tell me about a cat.</user><assistant>"
    assert results["config"]["act_harness"]["counters"]["prompts"] == 10


def test_predict_only_and_limit(questions, tiny_checkpoint):
    lm = make(tiny_checkpoint)
    results = evaluate(lm, gen_kwargs=f"max_gen_toks={TOKENS}", limit=2, predict_only=True)
    samples = results["samples"]["mt_bench"]
    assert [len(sample["filtered_resps"][0]) for sample in samples] == [2, 2]
    assert "turn_1_tokens,none" not in results["results"]["mt_bench"]
    assert [sample["doc"]["prompt_id"] for sample in samples] == [81, 91]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_chat_template": False}, "--model hf-act and --apply_chat_template"),
        ({"gen_kwargs": "temprature=1"}, "did you mean 'temperature'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_generated(
    questions, tiny_checkpoint, monkeypatch, settings, message
):
    lm = make(tiny_checkpoint)
    counts = counting(lm, monkeypatch)
    with pytest.raises(TaskError, match=message) as caught:
        evaluate(lm, **settings)
    assert "\n" not in str(caught.value)
    assert counts == []


@pytest.mark.parametrize("template", [True, False])
def test_other_models_are_refused_in_one_line_that_names_hf_act(
    questions, tiny_checkpoint, template
):
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(str(tiny_checkpoint), dtype="float32", device="cpu")
    with pytest.raises((UnsupportedCallError, TaskError), match="--model hf-act") as caught:
        evaluate(lm, apply_chat_template=template)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedCallError, match="HFLM"):  # where no template tells the model
        getattr(lm, REQUEST_TYPE)([])


def test_single_requests_through_lm_evals_generic_calls(questions):
    """lm-eval's own tools ask a task for a prompt and a request without a model at hand."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS / "mt_bench"), include_defaults=False)
    task = manager.load(["mt_bench"])["tasks"]["mt_bench"]
    doc = task.eval_docs[0]
    request = task.construct_requests(doc=doc, ctx="prompt")
    assert (request.request_type, request.args[0]) == (REQUEST_TYPE, "prompt")
    assert request.args[1]["turns"] == doc["prompt"]
    assert request.metadata == (None, None, None)
    named = task.construct_requests(doc, "prompt", metadata=("mt_bench", 3, 1))
    assert (named.task_name, named.doc_id) == ("mt_bench", 3)
    shown = task.fewshot_context(doc, 0, chat_template=lambda turns: turns[0]["content"])
    assert shown == doc["prompt"][0]
    with pytest.raises(TaskError, match="--apply_chat_template"):
        task.fewshot_context(doc, num_fewshot=0)
