"""``act-harness regress`` from end to end on a tiny model: verdicts, exit codes, new baselines."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import regress_suites as suites
import torch
from regress_suites import (
    changed_artifact,
    demo_tasks,
    drop_head,
    raise_beta,
    tasks_with,
    write_suite,
)
from tiny_heads import save_heads

from act_harness.artifact import load_artifact
from act_harness.cli import app as cli
from act_harness.errors import InfrastructureError, InputError, RecipeError
from act_harness.harness import task_lookup
from act_harness.regress import RegressSettings, measure, run, run_regress, update_baseline
from act_harness.regress.baseline import load_baseline
from act_harness.regress.suite import Variation, load_suite, shipped_suites
from act_harness.support import provenance

if find_spec("vaderSentiment") is None:  # importing it would hide the lexicon of other tests
    pytest.skip("the demo tasks need vaderSentiment", allow_module_level=True)

COMMIT = provenance.Commit("c" * 40, False)
TASKS = ("act_demo_sentiment", "act_demo_word")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A clean commit whatever the state of the clone, and an index of few tasks."""
    shorten(monkeypatch)


def shorten(monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # asks pip
    monkeypatch.setattr(provenance, "commit", lambda *_: COMMIT)
    monkeypatch.setattr(task_lookup, "_manager", lambda *given: demo_tasks())


@pytest.fixture(scope="module")
def artifact_file(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "heads.json"
    return save_heads(tiny_checkpoint, path, name="heads", alpha=1.5, beta=0.4)


@pytest.fixture(scope="module")
def shipped(tiny_checkpoint, artifact_file, tmp_path_factory):
    """A suite with its baseline; tests copy it."""
    place = tmp_path_factory.mktemp("suites") / "tiny"
    shutil.copy(artifact_file, place.parent / "heads.json")
    folder = write_suite(place, tiny_checkpoint, [str(place.parent / "heads.json")])
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        update_baseline(RegressSettings(str(folder)), reason="  first\none ", announce=print)
    return folder


@pytest.fixture
def heads(shipped):
    """The suite's artifact, put back after the test."""
    path = shipped.parent / "heads.json"
    before = path.read_text()
    yield path
    path.write_text(before)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run ``act-harness regress`` as the installed script does; (exit code, output, errors)."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["act-harness", "regress", "--output", str(tmp_path / "out"), *arguments]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


def report(tmp_path):
    return json.loads((tmp_path / "out" / "regress.json").read_text())


# -- verdicts --------------------------------------------------------------------------------------


def test_an_unchanged_model_passes(shipped, call, tmp_path):
    code, out, err = call("--suite", str(shipped))
    assert code == 0, err
    assert out.splitlines()[-2].startswith("tiny: passed (24 answers, largest drift ")
    content = report(tmp_path)
    assert (content["status"], content["findings"]) == ("passed", [])
    assert {(row["task"], row["arm"]) for row in content["drifts"]} == {
        (task, arm) for task in TASKS for arm in ("baseline", "heads")
    }
    assert content["baseline"]["reason"] == "first one"
    page = (tmp_path / "out" / "regress.md").read_text()
    assert "Regression suite tiny: **passed**" in page
    assert "| act_demo_word@heads |" in page
    assert not list(tmp_path.rglob("*.tmp"))


def test_answers_that_are_no_numbers_have_no_verdict(shipped, call, tmp_path, monkeypatch):
    load = measure._load

    def broken(suite, place):
        lm = load(suite, place)
        with torch.no_grad():
            lm.model.get_input_embeddings().weight[lm.tok_encode("e")] = float("nan")
        return lm

    monkeypatch.setattr(measure, "_load", broken)
    with pytest.warns(UserWarning, match="log-likelihoods are not finite"):
        code, _, errors = call("--suite", str(shipped))
    assert code == 3
    assert "answers of arm 'baseline' are not finite" in errors
    assert report(tmp_path)["status"] == "infrastructure"


@pytest.mark.slow
def test_two_processes_pass(shipped, tmp_path):
    """The second process stays for all arms; the first one has the verdict."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "act_harness", "regress", "--suite", str(shipped), "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(suites.TASKS.parent), "HF_HUB_OFFLINE": "1",
             "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "regress.json").read_text())["status"] == "passed"


@pytest.mark.slow
def test_another_batch_size_passes(shipped, tmp_path):
    for size in ("1", "auto"):
        found = run_regress(RegressSettings(str(shipped), batch_size=size, output=tmp_path))
        assert found.findings == ()
        assert 0 <= max(row.drift for row in found.drifts) < 1e-4


@pytest.mark.parametrize(
    ("change", "told"),
    [(raise_beta, "beta 0.4 then, 0.41 now"), (drop_head, "without 1 heads (layer.head 0.0)")],
)
def test_a_changed_head_set_fails_and_its_scores_are_compared(
    shipped, heads, call, tmp_path, change, told
):
    changed_artifact(heads, heads, change)
    code, out, _ = call("--suite", str(shipped))
    assert code == 1
    assert f"FAILED act_demo_sentiment, act_demo_word, arm heads: artifact changed: {told}" in out
    for task in TASKS:
        assert f"FAILED {task}, arm heads: drift: 6 of 6 documents (document 0: log-" in out
        assert f"FAILED {task}, arm heads: counter changed: 6 of 6 documents" in out
        assert f"FAILED {task}, arm baseline" not in out
    assert "regressed" in (tmp_path / "out" / "regress.md").read_text().splitlines()[0]
    assert report(tmp_path)["exit_code"] == 1


def test_one_changed_character_of_a_prompt_fails(shipped, call, monkeypatch, tmp_path):
    changed = demo_tasks(tasks_with(tmp_path, "Decide", "decide"))
    monkeypatch.setattr(task_lookup, "_manager", lambda *given: changed)
    code, out, _ = call("--suite", str(shipped))
    assert code == 1
    assert "FAILED act_demo_sentiment: prompt changed: 6 of 6 documents (document 0: hash" in out
    assert "FAILED act_demo_sentiment, arm baseline: drift" in out
    assert "FAILED act_demo_word" not in out
    assert "no statistics for act_demo_sentiment" in out


def test_one_changed_character_of_an_answer_fails(shipped, monkeypatch, tmp_path):
    changed = demo_tasks(
        tasks_with(tmp_path, '["negative", "positive"]', '["negative","Positive"]')
    )
    monkeypatch.setattr(task_lookup, "_manager", lambda *given: changed)
    found = run_regress(RegressSettings(str(shipped), tasks=TASKS[:1], output=tmp_path / "out"))
    assert "request changed" in {one.kind for one in found.findings}
    assert {one.task for one in found.findings} == {"act_demo_sentiment"}


@pytest.mark.slow
def test_a_part_of_a_suite(shipped, call):
    code, out, _ = call("--suite", str(shipped), "--tasks", "act_demo_word", "--limit", "3")
    assert code == 0
    assert "note: not run: act_demo_sentiment" in out
    assert "note: act_demo_word: 3 of 6 documents" in out
    assert call("--suite", str(shipped), "--tasks", "act_demo_word", "--limit", "9")[0] == 0
    code, _, err = call("--suite", str(shipped), "--batch-size", "many")
    assert (code, "expected a number above 0" in err) == (2, True)
    code, _, err = call("--suite", str(shipped), "--tasks", "act_demo_wrod")
    assert (code, "did you mean 'act_demo_word'" in err) == (2, True)


def test_the_baseline_of_another_model_shape_or_suite_is_bad_input(shipped, tmp_path, call):
    folder = tmp_path / "tiny"
    shutil.copytree(shipped, folder)
    text = (folder / "suite.yaml").read_text()
    (folder / "suite.yaml").write_text(text.replace("limit: 6", "limit: 5"))
    code, _, err = call("--suite", str(folder))
    assert code == 2
    assert "limit: 6 then, 5 now" in err
    assert report(tmp_path)["status"] == "bad input"


def test_documents_that_are_gone_fail(shipped, monkeypatch, tmp_path):
    """A dataset that lost rows since must not pass because what is left is the same."""
    evaluate = measure.Session._evaluate

    def fewer(self):
        asked, self.limit = self.limit, 4
        try:
            return evaluate(self)
        finally:
            self.limit = asked

    monkeypatch.setattr(measure.Session, "_evaluate", fewer)
    found = run_regress(RegressSettings(str(shipped), tasks=TASKS[:1], output=tmp_path / "out"))
    assert [(one.kind, one.task) for one in found.findings] == [("document changed", TASKS[0])]


# -- no verdict ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 GiB"),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_something_is_no_score(shipped, call, monkeypatch, tmp_path, error):
    from act_harness.model import CalibratedHFLM

    def fail(self, requests, disable_tqdm=False):
        raise error

    monkeypatch.setattr(CalibratedHFLM, "loglikelihood", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "regress.json").write_text('{"status": "passed"}')
    code, _, err = call("--suite", str(shipped))
    assert code == 3
    assert err.splitlines()[-1].startswith("act-harness: suite tiny: ")
    content = report(tmp_path)
    assert content["status"] == "infrastructure"
    assert "no verdict" in (tmp_path / "out" / "regress.md").read_text()


def test_another_error_is_no_infrastructure(shipped, call, monkeypatch, tmp_path):
    from act_harness.model import CalibratedHFLM

    def fail(self, requests, disable_tqdm=False):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(CalibratedHFLM, "loglikelihood", fail)
    code, _, err = call("--suite", str(shipped))
    assert (code, "Traceback" in err) == (70, True)
    assert not (tmp_path / "out" / "regress.json").exists()


def test_no_model(shipped, call, tmp_path):
    code, _, err = call("--suite", str(shipped), "--pretrained", str(tmp_path / "nowhere"))
    assert (code, "no model at" in err) == (3, True)
    folder = write_suite(tmp_path / "moved", tmp_path / "gone", [])
    shutil.copy(shipped / "baseline.json", folder)
    code, _, err = call("--suite", str(folder))
    assert (code, "is not in" in err, "--pretrained" in err) == (3, True, True)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    code, _, err = call("--suite", str(shipped), "--pretrained", str(empty))
    assert (code, "cannot be loaded" in err) == (3, True)


def test_the_demo_model_is_converted_where_the_suite_says_so(tmp_path, monkeypatch):
    from act_harness import demo_model

    made = []
    monkeypatch.setattr(demo_model, "convert", made.append)
    suite, _ = load_suite("smollm2-goldens")
    source = suite.model.model_copy(
        update={"look_in": (str(tmp_path / "one"), str(tmp_path / "two"))}
    )
    assert source.find() == str(tmp_path / "one")
    assert made == [tmp_path / "one"]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text("{}")
    assert source.find() == str(tmp_path / "two")
    assert len(made) == 1


def test_no_data(shipped, call, monkeypatch):
    def gone(self, names):
        raise FileNotFoundError("Couldn't find any data file at /hub/some/dataset")

    manager = demo_tasks()
    monkeypatch.setattr(type(manager), "load", gone)
    code, _, err = call("--suite", str(shipped))
    assert (code, "cannot be had" in err, "--data-dir" in err) == (3, True, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tiny_checkpoint, shipped, call, tmp_path):
    model = {"device": "cuda", "dtype": "bfloat16"}
    folder = write_suite(tmp_path / "gpu", tiny_checkpoint, [], model=model, layers=["statistics"])
    shutil.copy(shipped / "baseline.json", folder)
    code, _, err = call("--suite", str(folder))
    assert (code, "needs a GPU" in err) == (3, True)


def test_no_baseline(tiny_checkpoint, artifact_file, tmp_path, call):
    folder = write_suite(tmp_path / "new", tiny_checkpoint, [str(artifact_file)])
    code, _, err = call("--suite", str(folder))
    assert (code, "has no baseline" in err) == (3, True)
    assert "--update --reason" in report(tmp_path)["message"]


# -- new baselines ---------------------------------------------------------------------------------


def test_the_baseline_holds_hashes_and_numbers_only(shipped):
    text = (shipped / "baseline.json").read_text()
    for word in ("Sentence", "hotel", "negative", "positive", "advertisement", "Decide"):
        assert word not in text
    content = json.loads(text)
    assert (content["reason"], content["provenance"]["commit"]) == ("first one", COMMIT.commit)
    for key in ("created", "torch", "transformers", "lm_eval", "device", "platform", "threads"):
        assert content["provenance"][key] is not None
    assert content["variations"] == ["batch size 1, 1 threads, reverse order"]
    for arms in content["spread"].values():
        for one in arms.values():
            assert (0 <= one["drift"] < 1e-4, one["flips"]) == (True, 0)
            assert set(one["spread"]) == {"acc,none"}
    arm = content["measurement"]["arms"]["heads"]
    assert len(arm["sha256"]) == 64
    assert arm["calibration"]["beta"] == 0.4


def test_every_prompt_of_the_calibrated_arm_was_found_among_the_counters(shipped):
    """The counters are kept by a hash of tokens that :func:`prompt_key` has to reproduce."""
    for task in load_baseline(shipped, suite="tiny").measurement.tasks.values():
        for document in task.documents:
            assert document.arms["heads"].sinks is not None
            assert document.arms["baseline"].sinks is None
        assert any(document.arms["heads"].moved > 0 for document in task.documents)


@pytest.mark.parametrize(
    ("reason", "state", "more", "told"),
    [
        (" ", COMMIT, [], "needs a reason"),
        (
            "why",
            provenance.Commit("c" * 40, True),
            [],
            "there are changes since commit cccccccccccc",
        ),
        ("why", provenance.Commit(None, None), [], "does not run from a repository"),
        ("why", COMMIT, ["--limit", "2"], "the whole suite"),
        ("why", COMMIT, ["--tasks", TASKS[0]], "the whole suite"),
    ],
)
def test_update_refuses(shipped, call, monkeypatch, reason, state, more, told):
    monkeypatch.setattr(provenance, "commit", lambda *_: state)
    before = (shipped / "baseline.json").read_bytes()
    code, _, err = call("--suite", str(shipped), "--update", "--reason", reason, *more)
    assert (code, told in err) == (2, True), err
    assert (shipped / "baseline.json").read_bytes() == before


def test_a_reason_without_update_is_bad_input(shipped, call):
    code, _, err = call("--suite", str(shipped), "--reason", "why")
    assert (code, "--update" in err) == (2, True)


@pytest.mark.slow
def test_update_says_what_changes(shipped, heads, call, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(shipped, folder)
    code, out, err = call("--suite", str(folder), "--update", "--reason", "again")
    assert code == 0, err
    assert "the same answers as the old one" in out
    changed_artifact(heads, heads, raise_beta)
    _, out, _ = call("--suite", str(folder), "--update", "--reason", "a larger beta")
    assert "new baseline of suite tiny: a larger beta" in out
    assert "beta 0.4 then, 0.41 now" in out
    assert "act_demo_word, arm heads: drift: 6 of 6 documents" in out
    assert load_baseline(folder, suite="tiny").reason == "a larger beta"
    assert call("--suite", str(folder))[0] == 0


@pytest.mark.parametrize("at", ["variation", "rename"])
def test_an_interrupted_update_leaves_the_old_baseline(shipped, monkeypatch, tmp_path, at):
    folder = tmp_path / "tiny"
    shutil.copytree(shipped, folder)
    before = (folder / "baseline.json").read_bytes()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if at == "variation":
        monkeypatch.setattr(run.gates, "spread_of", stop)
    else:
        monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        update_baseline(RegressSettings(str(folder)), reason="why", announce=lambda text: None)
    assert (folder / "baseline.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["baseline.json", "suite.yaml"]


def test_goldens_that_do_not_repeat_themselves_are_refused(shipped, monkeypatch, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(shipped, folder)
    text = (folder / "suite.yaml").read_text()
    (folder / "suite.yaml").write_text(text + "drift: 1.0e-12\n")
    with pytest.raises(InputError, match="does not repeat itself"):
        update_baseline(RegressSettings(str(folder)), reason="why", announce=lambda text: None)


@pytest.mark.slow
def test_real_rows_leave_no_text_in_a_baseline(tiny_checkpoint, hub_dir, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(suites.TASKS), include_defaults=False)
    monkeypatch.setattr(task_lookup, "_manager", lambda *given: manager)
    folder = write_suite(
        tmp_path / "real", tiny_checkpoint, [], tasks=["act_sst2", "act_boolq"], variations=[]
    )
    settings = RegressSettings(str(folder), data_dir=hub_dir, output=tmp_path / "out")
    text = update_baseline(settings, reason="why", announce=lambda text: None).read_text()
    for name in ("nyu-mll/glue/sst2/validation", "aps/super_glue/boolq/validation"):
        rows = (hub_dir / f"{name}.jsonl").read_text().splitlines()
        row = json.loads(rows[0])
        for words in (str(value) for value in row.values() if isinstance(value, str)):
            for start in range(0, len(words) - 12, 12):
                assert words[start : start + 12] not in text
    stored = load_baseline(folder, suite="real").measurement
    shared = [one.shared.get("passage", "") for one in stored.tasks["act_boolq"].documents]
    assert all(len(one) == 16 for one in shared)
    assert run_regress(settings).findings == ()
    with pytest.raises(InfrastructureError):
        run_regress(RegressSettings(str(folder), data_dir=tmp_path, output=tmp_path / "out"))


# -- suites ----------------------------------------------------------------------------------------


def test_every_shipped_suite_is_whole():
    found = shipped_suites()
    assert {"smollm2-goldens", "smollm2-benchmarks", "llama-2-7b-chat"} <= set(found)
    for name in found:
        suite, folder = load_suite(name)
        assert (suite.name, folder.name) == (name, name)
        for reference in suite.artifacts:
            assert load_artifact(reference).head_count() > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"taks": ["x"]}, "unknown key 'taks'; did you mean 'tasks'"),
        ({"model": {"name": "m", "nmae": 1}}, "model.nmae: unknown key"),
        ({"limit": 0}, "limit: "),
        ({"tasks": []}, "tasks: "),
        ({"layers": ["golden"]}, "layers"),
        ({"model": {"dtype": "bfloat16"}}, "exact goldens need device cpu and dtype float32"),
        ({"artifacts": ["one/demo", "two/demo"]}, "different last names"),
        ({"artifacts": ["some/baseline"]}, "different last names"),
    ],
)
def test_a_wrong_suite_is_bad_input(tmp_path, change, told):
    write_suite(tmp_path / "wrong", "nowhere", **{"artifacts": [], **change})
    with pytest.raises(RecipeError) as caught:
        load_suite(str(tmp_path / "wrong"))
    assert told in str(caught.value)


def test_suites_are_found_by_name_folder_and_file(tmp_path):
    folder = write_suite(tmp_path / "mine", "nowhere", [])
    for reference, root in (
        ("mine", tmp_path), (str(folder), None), (str(folder / "suite.yaml"), None),
    ):  # fmt: skip
        assert load_suite(reference, root=root)[1] == folder
    with pytest.raises(RecipeError, match="did you mean 'mine'"):
        load_suite("mien", root=tmp_path)
    assert Variation(batch_size=1, threads=2).describe() == "batch size 1, 2 threads"


# -- tracking --------------------------------------------------------------------------------------


class Recorder:
    """Keeps what is logged."""

    def __init__(self):
        self.values, self.tables = {}, {}

    def describe(self):
        return "tracked here"

    def scalars(self, values):
        self.values.update(values)

    def table(self, name, columns, rows):
        self.tables[name] = (list(columns), [list(row) for row in rows])


def test_what_is_tracked(shipped, monkeypatch, tmp_path):
    seen, opened = Recorder(), {}

    def tracker(settings, **given):
        opened.update(given)
        opened["saved"] = (given["folder"] / "regress.json").is_file()
        return nullcontext(seen)

    monkeypatch.setattr(run, "open_tracker", tracker)
    found = run_regress(RegressSettings(str(shipped), output=tmp_path / "out"))
    assert found.tracked == "tracked here"
    assert (opened["job_type"], opened["saved"]) == ("regress", True)
    assert opened["name"].startswith("regress-tiny-20")
    assert opened["config"]["baseline"]["commit"] == COMMIT.commit
    assert opened["config"]["arms"]["heads"]["calibration"]["beta"] == 0.4
    assert seen.values["regress/status"] == "passed"
    assert seen.values["act_demo_word@heads/drift"] < 1e-4
    assert seen.values["act_demo_word@heads/acc_difference"] == 0
    assert 0 <= seen.values["act_demo_word@baseline/acc"] <= 1
    columns, rows = seen.tables["comparison"]
    assert {row[0] for row in rows} == {f"{t}@{a}" for t in TASKS for a in ("baseline", "heads")}
    assert len(columns) == len(rows[0])


@pytest.mark.parametrize("change", [None, drop_head])
def test_a_verdict_outlives_a_failure_of_tracking(
    shipped, heads, monkeypatch, tmp_path, caplog, change
):
    def unreachable(settings, **given):
        raise InfrastructureError("W&B: opening a run failed")

    monkeypatch.setattr(run, "open_tracker", unreachable)
    settings = RegressSettings(str(shipped), output=tmp_path / "out")
    if change is None:
        with pytest.raises(InfrastructureError, match="W&B"):
            run_regress(settings)
        assert report(tmp_path)["status"] == "passed"
        return
    changed_artifact(heads, heads, change)
    with caplog.at_level(logging.ERROR):
        assert run_regress(settings).exit_code == 1
    assert "W&B: opening a run failed" in caplog.text
