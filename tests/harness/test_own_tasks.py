"""Tasks of one's own and lm-eval's options, in every command that takes tasks."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import typer
import yaml
from installed import REPOSITORY
from own_tasks import caller, few_tasks, write_own_tasks
from tiny_heads import save_heads

from act_harness.artifact import load_artifact
from act_harness.cli import app as cli
from act_harness.cli.evaluate import LEFT_OUT
from act_harness.errors import InfrastructureError, InputError, TaskError
from act_harness.evidence.results import load_run
from act_harness.harness import fetch
from act_harness.harness.eval_settings import EvalSettings
from act_harness.harness.evaluate import run_eval
from act_harness.harness.task_lookup import find_tasks, leaf_tasks, load_tasks
from act_harness.support.failures import explained

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def quick():
    with few_tasks():
        yield


@pytest.fixture
def call(monkeypatch, capsys):
    return caller(monkeypatch, capsys)


@pytest.fixture
def own(tmp_path):
    return write_own_tasks(tmp_path / "own", "fr_mc", "fr_two")


@pytest.fixture(scope="module")
def artifact_file(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny.json"
    return save_heads(tiny_checkpoint, path, name="tiny", alpha=1.5, beta=0.0)


# -- looking up ------------------------------------------------------------------------------------


def test_what_lm_eval_takes_is_taken(own):
    names = lambda *tasks, **how: find_tasks(tasks, **how).names  # noqa: E731
    assert names(str(own / "fr_mc.yaml")) == ("fr_mc",)
    assert names(str(own / "fr_*.yaml")) == ("fr_mc", "fr_two")
    assert names(str(own)) == ("fr_mc", "fr_two")
    assert names("fr_two", "fr_mc", "fr_two", include_path=[own]) == ("fr_two", "fr_mc")
    assert names("fr_*", include_path=[str(own)]) == ("fr_mc", "fr_two")
    assert names("act_demo_w*") == ("act_demo_word",)
    (own / "both.yaml").write_text("group: both\ntask: [fr_two, own_tag, act_demo_word]\n")
    assert leaf_tasks(find_tasks(["own_tag"], include_path=[own])) == ["fr_mc", "fr_two"]
    group = find_tasks(["both"], include_path=[own])
    assert leaf_tasks(group) == ["fr_two", "fr_mc", "act_demo_word"]
    (own / "both.yaml").unlink()
    assert [len(task.eval_docs) for task in load_tasks(find_tasks([str(own)]))] == [8, 8]


def test_a_file_takes_the_place_of_a_task_of_its_name(own):
    text = (own / "fr_mc.yaml").read_text()
    (own / "mine.yaml").write_text(text.replace("fr_mc", "act_demo_word"))
    (task,) = load_tasks(find_tasks([str(own / "mine.yaml")]))
    assert len(task.eval_docs) == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [", "cannot be read"),
        ("- 1\n", "cannot be read"),
        ("include: gone.yaml\ntask: x\n", "cannot be read"),
        ("dataset_path: json\n", "defines no task"),
        ("task: 3\n", "defines no task"),
        ("task: x\nmetric_lst: []\n", "cannot be built.*metric_lst"),
        ("task: x\ndataset_path: json\noutput_type: multi\n", "cannot be built.*output_type"),
        ("group: x\ntask: [act_demo_word, nothing_there]\n", "unknown task 'nothing_there'"),
        ("task: x\ncustom_dataset: !function parts.fail\n", "ZeroDivisionError.*parts.py line 2"),
        ("task: x\ndataset_path: json\ntest_split: test\n"
         "dataset_kwargs: {data_files: {test: gone.jsonl}}\n", "data of task 'x' cannot be had"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_task_is_one_line(tmp_path, text, words):
    (tmp_path / "parts.py").write_text("def fail(**_):\n    1 / 0\n")
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises((TaskError, InfrastructureError), match=words) as caught:
        load_tasks(find_tasks([str(file)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"test": '{"q": 1}\n{"q": 1 "a": 2}\n'}, "Missing a comma"),
        ({"train": '{"q": 1}\n', "test": '{"q": 1, "a": 2}\n'}, "column names don't match"),
    ],
    ids=["no JSON", "other keys"],
)
def test_rows_that_cannot_be_read_say_why(tmp_path, rows, reason):
    """It was "An error occurred while generating the dataset; give --data-dir", exit code 3."""
    files = {split: str(tmp_path / f"{split}.jsonl") for split in rows}
    for split, text in rows.items():
        Path(files[split]).write_text(text)
    task = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(task | {"test_split": "test"}, sort_keys=False)
    )
    with pytest.raises(TaskError, match="the rows of task 'mine' cannot be read") as caught:
        load_tasks(find_tasks([str(tmp_path / "mine.yaml")]))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_says_how_own_tasks_are_used(own):
    with pytest.raises(TaskError, match=r"unknown task 'fr_mc'.*--include_path FOLDER"):
        find_tasks(["fr_mc"])
    with pytest.raises(TaskError, match="did you mean 'fr_two'"):
        find_tasks(["fr_tow"], include_path=[own])
    (own / "broken.yaml").write_text("task: [")  # which lm-eval skips without a word
    with pytest.raises(TaskError, match=r"unknown task 'broken', and task file .*broken.yaml"):
        find_tasks(["broken"], include_path=[own])
    for place in (own / "gone", own / "fr_mc.yaml", "x" * 5000):
        with pytest.raises(TaskError, match="no such folder"):
            find_tasks(["fr_mc"], include_path=[place])
    for task in (str(own / "gone.yaml"), f"{'x' * 5000}.yaml"):
        with pytest.raises(TaskError, match="no task file"):
            find_tasks([task])


def test_a_misspelt_file_and_the_name_of_a_file_say_what_was_meant(own, monkeypatch):
    """Typed first after writing `my_task.yaml`: its name, and its name wrong."""
    monkeypatch.chdir(own.parent)
    with pytest.raises(TaskError, match=re.escape(f"did you mean '{own.name}/fr_mc.yaml'?")):
        find_tasks([f"{own.name}/fr_mcc.yaml"])
    monkeypatch.chdir(own)
    with pytest.raises(TaskError, match=r"'fr_mc'; did you mean the file 'fr_mc.yaml'"):
        find_tasks(["fr_mc"])
    with pytest.raises(TaskError, match=r"'fr_mcc'; did you mean the file 'fr_mc.yaml'"):
        find_tasks(["fr_mcc"])
    (own / "act_dema_wird.yaml").write_text("task: act_dema_wird\n")
    with pytest.raises(TaskError, match="did you mean 'act_demo_word'"):  # nearer than any file
        find_tasks(["act_demo_wrd"])


def test_fetch_finds_the_datasets_of_own_tasks(own):
    (own / "hub.yaml").write_text("task: hub_task\ndataset_path: owner/rows\ntest_split: test\n")
    for given, more in ((["hub_task"], {"include_path": [own]}), ([str(own / "hub.yaml")], {})):
        (source,) = fetch.datasets_of(given, **more)
        assert (source.id, source.task) == ("owner/rows", "hub_task")


# -- the commands ----------------------------------------------------------------------------------


def test_eval_with_an_own_file_as_lm_eval_takes_it(
    call, own, tiny_checkpoint, artifact_file, tmp_path, monkeypatch
):
    """The relative ``rows.jsonl`` of case 03, too: it is found from where the command runs."""
    text = (own / "fr_mc.yaml").read_text()
    (own / "fr_mc.yaml").write_text(re.sub(r"test: .*rows.jsonl", "test: rows.jsonl", text))
    monkeypatch.chdir(own)
    done = call(
        "eval", "--pretrained", tiny_checkpoint, "--artifact", artifact_file, "--device", "cpu",
        "--tasks", "fr_mc.yaml", "--model_args", "dtype=float32", "--batch_size", "4",
        "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "fr_mc" in done.out
    base, act = (
        load_run(next((tmp_path / "out").glob(f"*__{arm}__2*"))) for arm in ("baseline", "act-tiny")
    )
    for run in (base, act):
        assert len(run.samples("fr_mc")) == 8
    assert str(own) not in json.dumps(sorted(base.data["results"]))


def test_heads_found_on_the_documents_that_are_scored_are_told(
    own, tiny_checkpoint, artifact_file, tmp_path, monkeypatch, capfd
):
    """A task of one split shares it with its search; the comparison has to say so, too."""
    monkeypatch.chdir(tmp_path)  # no repository: git would say "fatal"
    content = json.loads(artifact_file.read_text())
    source = {"fr_mc": {"source": "hash of test"}, "fr_two": {"source": "train"}}
    (tmp_path / "found.json").write_text(json.dumps(content | {"search": {"splits": source}}))
    settings = EvalSettings(
        tasks=("fr_mc", "fr_two"), include_path=(own,), pretrained=tiny_checkpoint, device="cpu",
        artifact=tmp_path / "found.json", output=tmp_path / "out",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="a gain on them shows nothing") as caught:
        outcome = run_eval(settings)
    samples = next(outcome.folders["act"].glob("samples_fr_mc_*")).read_text().splitlines()
    hashes = [json.loads(line)["doc_hash"] for line in samples]
    seen = sum(int(one[:8], 16) % 4 < 2 for one in hashes)
    assert 0 < seen < len(hashes)
    told = [str(w.message) for w in caught if "shows nothing" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith(f"{seen} of the {len(hashes)} documents of 'fr_mc' are of the half")
    assert f", {seen} documents open to search" in outcome.report.read_text()
    (result,) = outcome.folders["act"].glob("results_*.json")
    assert json.loads(result.read_text())["act_harness"]["documents_open_to_search"] == seen
    assert "fatal" not in capfd.readouterr().err


def test_every_option_of_lm_evals_is_there_or_said_to_be_missing():
    """Against the installed lm-eval: a new option of a later release must be decided on."""
    from lm_eval._cli.run import Run

    parser = argparse.ArgumentParser()
    run = Run(parser.add_subparsers())._parser
    theirs = {
        option.replace("_", "-")
        for action in run._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    command = typer.main.get_command(cli.app).commands["eval"]
    ours = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert theirs - ours == set(LEFT_OUT)
    assert not ours & set(LEFT_OUT)
    page = (REPOSITORY / "docs/commands.md").read_text(encoding="utf-8")
    for option in LEFT_OUT:
        assert f"`{option.replace('-', '_').replace('__', '--')}`" in page, option


@pytest.mark.parametrize("option", ["--use_cache", "--log-samples"])
def test_an_option_that_is_left_out_says_why(call, option):
    done = call("eval", "--tasks", "x", option, "y")
    assert done.code == 2
    assert "eval has no option --" in done.err
    assert any(reason in done.err for reason in LEFT_OUT.values())


def test_evals_options_of_lm_eval_reach_the_run(tiny_checkpoint, own, tmp_path, call):
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": "hf-act",
                "model_args": {"pretrained": str(tiny_checkpoint), "dtype": "float32"},
                "tasks": ["fr_mc", "fr_two"],
                "include_path": str(own),
                "samples": {"fr_mc": [5, 1, 5]},
                "apply_chat_template": True,
                "num_fewshot": 2,
                "device": "cpu",
            }
        )
    )
    done = call(
        "eval", "--config", config, "--artifact", "none", "--system_instruction", "Be brief.",
        "--num-fewshot", "1", "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    run = load_run(next((tmp_path / "out").glob("*__baseline__*")))
    assert [sample.doc_id for sample in run.samples("fr_mc")] == [1, 5]
    assert len(run.samples("fr_two")) == 8
    assert run.data["n-shot"] == {"fr_mc": 1, "fr_two": 1}  # the command line overrides the file
    (line, *_) = next((tmp_path / "out").rglob("samples_fr_mc_*.jsonl")).read_text().splitlines()
    row = json.loads(line)
    assert row["doc"]["q"].startswith("Q: What is a violin")  # document 1, not the first of two
    prompt = row["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<system>Be brief.</system><user>")
    assert prompt.count("<assistant>") == 2, "the example is a turn of its own"


def test_examples_in_one_turn_and_a_named_template(tiny_checkpoint, own, tmp_path, call):
    common = ("eval", "--pretrained", tiny_checkpoint, "--artifact", "none", "--device", "cpu",
              "--tasks", own / "fr_mc.yaml", "--limit", 1, "--num_fewshot", 1,
              "--output", tmp_path / "out")  # fmt: skip
    done = call(*common, "--apply_chat_template", "--fewshot_as_multiturn", "false")
    assert done.code == 0, done.err
    text = next((tmp_path / "out").rglob("samples_fr_mc_*.jsonl")).read_text()
    assert json.loads(text)["arguments"]["gen_args_0"]["arg_0"].count("<assistant>") == 1
    done = call(*common, "--apply_chat_template", "tool_use")
    assert (done.code, done.err.count("no chat template 'tool_use'")) == (2, 1)


def test_the_named_template_is_the_one_that_renders(tiny_checkpoint, own, tmp_path):
    """lm-eval looks the name up for its results, and renders with the default one."""
    from act_harness.harness import eval_checks
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", device="cpu")
    lm.tokenizer.chat_template = {"default": "default", "short": "{{ messages[0].content }}!"}
    settings = EvalSettings(tasks=("x",), apply_chat_template="short")
    eval_checks.check_template(lm, settings)
    assert lm.apply_chat_template([{"role": "user", "content": "Hello"}]) == "Hello!"
    with pytest.raises(InputError, match="no chat template 'shrt'; did you mean 'short'"):
        eval_checks.check_template(lm, EvalSettings(tasks=("x",), apply_chat_template="shrt"))


def write_talk(own):
    """A task that generates two tokens."""
    (own / "talk.yaml").write_text(
        (own / "fr_mc.yaml").read_text().replace("task: fr_mc", "task: talk")
        .replace("multiple_choice", "generate_until").replace("acc_norm", "exact_match")
        .replace("  - metric: acc\n", "") + "generation_kwargs: {max_gen_toks: 2, until: [x]}\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("own_setting", "given"),
    [
        ("", "num_beams=2"), ("", "num_beams=x"), ("", "prefill_chunk_size=4"),
        ("", "use_cache=False"), ("", "cache_implementation=static"), ("num_beams: 2", ""),
    ],
)  # fmt: skip
def test_generation_that_cannot_be_calibrated_is_refused_before_the_baseline(
    call, own, tiny_checkpoint, artifact_file, tmp_path, monkeypatch, own_setting, given
):
    from act_harness.model import CalibratedHFLM

    write_talk(own)
    if own_setting:
        text = (own / "talk.yaml").read_text()
        (own / "talk.yaml").write_text(text.replace("until: [x]", f"until: [x], {own_setting}"))
    forwards = []
    for name in ("_loglikelihood_tokens", "_model_generate"):
        monkeypatch.setattr(CalibratedHFLM, name, lambda *_, **__: forwards.append(1))
    done = call(
        "eval", "--pretrained", tiny_checkpoint, "--artifact", artifact_file, "--device", "cpu",
        "--include_path", own, "--limit", 1, "--output", tmp_path / "out", "--tasks", "fr_mc,talk",
        *(["--gen_kwargs", given] if given else []),
    )  # fmt: skip
    assert done.code == 2, done.err
    assert re.search(f"task 'talk': {(given or own_setting)[:9]}", done.err), done.err
    assert forwards == []
    assert not (tmp_path / "out").exists()


def test_every_arm_refuses_what_one_of_them_will(tiny_checkpoint, artifact_file):
    """The baseline comes first where several arms are run by turns."""
    from lm_eval.api.instance import Instance

    from act_harness.artifact import load_artifact
    from act_harness.errors import UnsupportedCallError
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(str(tiny_checkpoint), artifact="none", device="cpu", dtype="float32")
    settings = {"until": ["z"], "max_gen_toks": 2, "num_beams": 2}
    request = [Instance("generate_until", {}, ("the cat", settings), 0)]
    assert len(lm.generate_until(request, disable_tqdm=True)) == 1
    lm.try_artifacts([None, load_artifact(artifact_file)])
    with pytest.raises(UnsupportedCallError, match="num_beams=2"):
        lm.generate_until(request, disable_tqdm=True)


def test_settings_that_fail_while_a_task_runs_are_one_line(call, own, tiny_checkpoint, tmp_path):
    write_talk(own)
    (own / "odd.yaml").write_text(
        (own / "fr_mc.yaml").read_text().replace("fr_mc", "odd").replace("{{q}}", "{{q.a.b}}")
    )
    common = ("eval", "--pretrained", tiny_checkpoint, "--artifact", "none", "--device", "cpu",
              "--include_path", own, "--limit", 1, "--output", tmp_path / "out")  # fmt: skip
    for task, more, words in (
        ("talk", ("--gen_kwargs", "temprature=1"), "transformers refuses.*temprature"),
        ("talk", ("--gen_kwargs", "do_sample=true,temperature=-1"), "transformers refuses.*temper"),
        ("talk", ("--gen_kwargs", "max_gen_toks=x"), "lm-eval refuses"),
        ("talk", ("--gen_kwargs", "num_beams=x"), "refuses these settings"),
        ("fr_mc", ("--num_fewshot", "100"), "lm-eval refuses.*population"),
        ("odd", (), "UndefinedError"),
    ):
        done = call(*common, "--tasks", task, *more)
        assert done.code == 2, done.err
        assert re.search(words, done.err), done.err
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()


CODE = """
def fails_on_the_third(doc, results):
    if "ladder" in doc["q"]:
        raise {error}
    return {{"acc": 1.0}}


def fails_at_the_end(items):
    return [][0]


def fails_in_a_prompt(doc):
    return doc["question" if "ladder" in doc["q"] else "q"]


class Odd(Exception):
    pass
"""
PROCESS = "process_results: !function code.fails_on_the_third\n"
METRICS = "  - metric: acc\n"


@pytest.mark.parametrize(
    ("error", "change", "said"),
    [
        ("KeyError('label')", (METRICS, METRICS, PROCESS), "at document 2 .KeyError: 'label'"),
        ("ValueError('no')", (METRICS, METRICS, PROCESS), "at document 2 .ValueError: no"),
        ("OSError('gone')", (METRICS, METRICS, PROCESS), "at document 2 .OSError: gone"),
        ("RuntimeError('CUDA error: x')", (METRICS, METRICS, PROCESS), "at document 2 .Runtime"),
        ("Odd()", (METRICS, METRICS, PROCESS), "at document 2 .Odd, code.py line 4"),
        ("Odd()", (METRICS, METRICS + "    aggregation: !function code.fails_at_the_end\n", ""),
         ".IndexError: list index.*code.py"),
        ("Odd()", ("'{{q}}'", "!function code.fails_in_a_prompt", ""),
         "at document 2 .KeyError: 'question', code.py"),
    ],
)  # fmt: skip
def test_what_a_tasks_own_code_raises_is_the_tasks_fault(
    call, own, tiny_checkpoint, tmp_path, monkeypatch, error, change, said
):
    """It ended in a traceback and exit code 70, which says that act-harness is at fault."""
    (own / "code.py").write_text(CODE.format(error=error))
    text = (own / "fr_mc.yaml").read_text().replace("  - metric: acc_norm\n", "")
    (own / "fr_mc.yaml").write_text(text.replace(*change[:2]) + change[2])
    words = ("eval", "--pretrained", tiny_checkpoint, "--artifact", "none", "--device", "cpu",
             "--tasks", own / "fr_mc.yaml", "--output", tmp_path / "out")  # fmt: skip
    done = call(*words)
    assert done.code == 2, done.err
    assert re.search(f"^act-harness: task 'fr_mc' failed {said}", done.err, re.MULTILINE), done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("ACT_HARNESS_TRACEBACK", "1")
    done = call(*words)
    assert done.code == 2
    assert re.search(r"Traceback(.|\n)*code\.py", done.err)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"y": None}, "at document 2 .tuple indices must be integers"),
        ({"ch": None}, "at document 2 .'NoneType' object is not iterable"),
        ({"ch": []}, "at document 2 .not enough values to unpack"),
    ],
)
def test_a_row_without_label_or_choices_is_named(
    call, own, tiny_checkpoint, tmp_path, broken, said
):
    """ "lm-eval refuses these settings: tuple indices must be integers" named no row of a file."""
    rows = [json.loads(line) for line in (own / "rows.jsonl").read_text().splitlines()]
    rows[2] |= broken
    (own / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("eval", "--pretrained", tiny_checkpoint, "--artifact", "none", "--device", "cpu",
                "--tasks", own / "fr_mc.yaml", "--output", tmp_path / "out")  # fmt: skip
    assert done.code == 2, done.err
    assert re.search(f"^act-harness: task 'fr_mc' failed {said}", done.err, re.MULTILINE), done.err
    assert done.err.rstrip().endswith("check its label, its choices and its texts")


def test_a_search_says_which_task_failed(call, own, tiny_checkpoint, tmp_path):
    (own / "code.py").write_text(CODE.format(error="Odd()"))
    text = (own / "fr_mc.yaml").read_text()
    (own / "fr_mc.yaml").write_text(text.replace("'{{q}}'", "!function code.fails_in_a_prompt"))
    done = call("search", "--pretrained", tiny_checkpoint, "--tasks", own / "fr_mc.yaml",
                "--samples", 4, "--device", "cpu", "--output", tmp_path / "a.json")  # fmt: skip
    assert done.code == 2, done.err
    assert re.search(r"task 'fr_mc' failed.*KeyError: 'question', code\.py", done.err), done.err
    assert "Traceback" not in done.err


def test_the_arm_that_was_finished_is_kept_and_named(
    call, own, tiny_checkpoint, artifact_file, tmp_path, monkeypatch
):
    """A task that fails in the second arm."""
    counted = tmp_path / "count"
    (own / "code.py").write_text(
        f"from pathlib import Path\nHERE = Path({str(counted)!r})\n"
        "def process(doc, results):\n"
        "    seen = len(HERE.read_text()) if HERE.exists() else 0\n"
        "    HERE.write_text('x' * (seen + 1))\n"
        "    return {'acc': 1 / (seen < 12)}\n"
    )
    text = (own / "fr_mc.yaml").read_text().replace("  - metric: acc_norm\n", "")
    (own / "fr_mc.yaml").write_text(text + "process_results: !function code.process\n")
    done = call("eval", "--pretrained", tiny_checkpoint, "--artifact", artifact_file, "--device",
                "cpu", "--tasks", own / "fr_mc.yaml", "--output", tmp_path / "out")  # fmt: skip
    assert done.code == 2, done.err
    (kept,) = (tmp_path / "out").iterdir()
    assert "__baseline__" in kept.name
    assert len(list(kept.glob("*"))) == 2
    line = done.err.rstrip("\n").splitlines()[-1]
    assert "failed at document 4 (ZeroDivisionError" in line
    assert f"complete results are in {kept}" in line


def test_an_error_has_a_line_of_its_own(call, own, tiny_checkpoint, tmp_path, monkeypatch):
    """lm-eval's bar of generation stayed open, and the error stood behind it."""
    from act_harness.model import CalibratedHFLM

    def fails(*_, **__):
        raise InputError("found a, expected b; give b")

    monkeypatch.setattr(CalibratedHFLM, "_model_generate", fails)
    write_talk(own)
    done = call("eval", "--pretrained", tiny_checkpoint, "--artifact", "none", "--device", "cpu",
                "--include_path", own, "--tasks", "talk", "--output", tmp_path / "o")  # fmt: skip
    assert done.code == 2, done.err
    assert "Running generate_until" in done.err
    assert "\nact-harness: found a" in done.err


def test_predictions_alone_compare_nothing(tiny_checkpoint, artifact_file, own, tmp_path):
    outcome = run_eval(
        EvalSettings(
            tasks=(str(own / "fr_mc.yaml"),), pretrained=tiny_checkpoint, artifact=artifact_file,
            predict_only=True, write_out=True, device="cpu", output=tmp_path / "out",
        )
    )  # fmt: skip
    assert outcome.comparisons == {}
    assert outcome.report is None
    assert sorted(outcome.folders) == ["act", "baseline"]
    for folder in outcome.folders.values():
        assert len(next(folder.glob("samples_*")).read_text().splitlines()) == 8


def test_standard_errors_cost_few_resamples(tiny_checkpoint, own, tmp_path, monkeypatch):
    """f1 has no formula: lm-eval would draw 100,000 times, in a pool of processes."""
    import lm_eval.api.metrics as metrics

    drawn = []
    stock = metrics._bootstrap_internal_no_mp

    def count(f, xs, iters):
        drawn.append(iters)
        return stock(f, xs, iters)

    monkeypatch.setattr(metrics, "_bootstrap_internal_no_mp", count)
    text = (own / "fr_mc.yaml").read_text().replace("acc_norm", "f1")
    (own / "fr_mc.yaml").write_text(text)
    outcome = run_eval(
        EvalSettings(
            tasks=(str(own / "fr_mc.yaml"),), pretrained=tiny_checkpoint, artifact="none",
            device="cpu", output=tmp_path / "out",
        )
    )  # fmt: skip
    found = load_run(outcome.folders["baseline"]).data["results"]["fr_mc"]
    assert drawn == [100]
    right = found["acc,none"]
    assert found["acc_stderr,none"] == pytest.approx((right * (1 - right) / 7) ** 0.5)
    assert isinstance(found["f1_stderr,none"], float)


def test_search_with_an_own_file_keeps_no_path(call, own, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("samples: 2\nverify_samples: 2\ncontrols: {random_sets: 0}\n"
                      "layers: [0, 0]\nheads: [0, 1]\ntasks: [fr_mc]\n")  # fmt: skip
    many = own / "rows.jsonl"
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    more = [{**row, "q": f"{n} {row['q']}"} for n in range(6) for row in rows]
    many.write_text("".join(json.dumps(row) + "\n" for row in more))
    for option in (("--include_path", own), ("--tasks", own / "fr_mc.yaml")):
        done = call("search", recipe, "--pretrained", tiny_checkpoint, "--device", "cpu",
                    "--output", tmp_path / "found.json", *option)  # fmt: skip
        assert done.code == 0, done.err
        assert load_artifact(tmp_path / "found.json").search["recipe"]["tasks"] == ["fr_mc"]
        assert str(own) not in (tmp_path / "found.json").read_text()


def test_regress_finds_the_tasks_of_a_suite_in_an_own_folder(own, tiny_checkpoint, tmp_path):
    from regress_suites import write_suite

    from act_harness.regress.measure import Session
    from act_harness.regress.suite import load_suite

    for tasks, more in (
        (["own_tag"], {"include_path": [own]}),
        ([str(own)], {}),
    ):
        folder = write_suite(tmp_path / "suite", tiny_checkpoint, [], tasks=tasks)
        session = Session(load_suite(str(folder))[0], **more)
        assert session.tasks == ["fr_mc", "fr_two"]


def test_a_class_of_tasks_is_not_loaded_twice(own, tmp_path, tiny_checkpoint, monkeypatch):
    """Data is looked for before the model, and the first arm takes what was loaded then."""
    import datasets

    loads = []
    stock = datasets.load_dataset

    def count(*args, **kwargs):
        loads.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", count)
    run_eval(
        EvalSettings(
            tasks=(str(own / "fr_mc.yaml"),), pretrained=tiny_checkpoint, artifact="none",
            limit=2, device="cpu", output=tmp_path / "out",
        )
    )  # fmt: skip
    assert len(loads) == 1
    assert "lm_eval" in sys.modules


def test_a_process_without_documents_says_how_many_were_started(tmp_path, monkeypatch):
    """lm-eval only says that it found none, in the process that got none; the task has some."""
    write_own_tasks(tmp_path, "own_few")
    selection = find_tasks(("own_few",), include_path=(tmp_path,))
    (task,) = load_tasks(selection)
    with pytest.raises(ValueError, match="did not find any docs") as raised:
        task.build_all_requests(limit=1, rank=1, world_size=2)
    assert "refuses these settings" in str(explained(raised.value))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    told = str(explained(raised.value))
    assert told.startswith("2 processes were started for a task of fewer documents; start fewer")
