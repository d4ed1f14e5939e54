"""What eval, search, judge and lm_eval leave in W&B's run files; and a W&B that is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from installed import REPOSITORY, python, write_metadata
from mtbench_runs import doc, graded, write_run
from mtbench_server import Say, serving
from tiny_heads import save_heads
from tiny_search import drawn
from tracked_tasks import write_tasks
from wandb_files import (
    KEY,
    Read,
    no_server,  # noqa: F401
    only_run,
    quiet_wandb,  # noqa: F401
    refusing_server,  # noqa: F401
    run_files,
)

from act_harness.artifact import load_artifact
from act_harness.cli import app as cli
from act_harness.evidence.results import load_run
from act_harness.harness import task_lookup

wandb = pytest.importorskip("wandb")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("quiet_wandb")


@pytest.fixture(scope="module", autouse=True)
def stop_wandb():
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def artifact_file(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "mine.json"
    return save_heads(tiny_checkpoint, path, name="tiny heads/1", alpha=1.5, beta=0.0)


@pytest.fixture
def call(monkeypatch, capfd):
    """Return a function that runs the command line as the installed script does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["act-harness", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capfd.readouterr()
        return stop.value.code, output.out, output.err

    return run


@pytest.fixture
def evaluation(monkeypatch, tiny_checkpoint, artifact_file, tmp_path, call):
    """Return a function that evaluates the two odd tasks on both arms."""
    from lm_eval.tasks import TaskManager

    folder = write_tasks(tmp_path / "tasks")
    manager = TaskManager(include_path=str(folder), include_defaults=False)  # seconds faster
    monkeypatch.setattr(task_lookup, "_manager", lambda *given: manager)

    def run(*more, tasks="org/choice,talk", output=tmp_path / "out"):
        return call(
            "eval", "--tasks", tasks, "--pretrained", tiny_checkpoint, "--model-args",
            "dtype=float32", "--artifact", artifact_file, "--device", "cpu", "--batch-size", "4",
            "--output", output, *more,
        )  # fmt: skip

    return run


def by_job(folder):
    return {read.run.job_type: read for read in map(Read, run_files(folder))}


OFFLINE = ("--wandb-project", "p", "--wandb-mode", "offline")


# -- eval ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eval_logs_one_complete_run_per_arm_and_continues_it(
    evaluation, tmp_path, artifact_file, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    code, said, _ = evaluation(*OFFLINE, "--wandb-tags", "a,b", "--wandb-samples", "5")
    assert code == 0
    assert said.count("wandb sync") == 2
    found = by_job(out)
    assert set(found) == {"baseline", "act"}
    base, act = found["baseline"], found["act"]
    assert base.run.run_group == act.run.run_group != ""
    assert list(act.run.tags) == ["a", "b"]
    artifact = load_artifact(artifact_file)

    assert (base.config["arm"], act.config["arm"]) == ("baseline", "act")
    assert (base.config["artifact"], base.config["artifact_sha256"]) == (None, None)
    assert act.config["artifact"]["heads"] == {"0": [0, 1, 2], "1": [1, 3], "2": [0, 1]}
    assert act.config["artifact_sha256"] == artifact.sha256()
    assert act.config["calibration"] == artifact.calibration.settings()
    assert (act.config["engine"], base.config["engine"]) == ("torch", None)
    assert act.config["model"]["architecture"] == "LlamaForCausalLM"
    assert act.config["provenance"]["lm_eval"]
    assert act.config["tasks"] == ["org/choice", "talk"]

    for read in found.values():
        reported = load_run(read.config["results"]).data["results"]["org/choice"]
        assert read.scalars()["org/choice/acc"] == pytest.approx(reported["acc,none"])
        assert read.scalars()["org/choice/acc_stderr"] == pytest.approx(reported["acc_stderr,none"])
        assert read.scalars()["talk/odd"] is None
        rows = {(r["task"], r["metric"]): r for r in read.table("scores")}
        assert rows["org/choice", "acc"]["value"] == pytest.approx(reported["acc,none"])
        assert rows["talk", "odd"]["value"] is None
        samples = read.table("samples/talk")
        assert [row["target"] for row in samples][:2] == ["['x', 'y']", "1"]
        assert len(samples) == 5
        assert read.scalars()["talk/samples_left_out"] == 3
        assert read.exit_code == 0

    scalars = act.scalars()
    difference = scalars["org/choice/acc"] - base.scalars()["org/choice/acc"]
    assert scalars["org/choice/acc_difference"] == pytest.approx(difference)
    assert scalars["org/choice/acc_low"] <= difference <= scalars["org/choice/acc_high"]
    assert scalars["org/choice/acc_verdict"] == "inconclusive"
    assert scalars["counters/prompts"] == 8
    assert scalars["counters/mean_moved_mass"] > 0
    assert not [key for key in base.scalars() if "counters" in key or "difference" in key]
    assert any(r["metric"] == "acc_corrected" for r in act.table("comparison"))
    assert [(r["layer"], r["head"]) for r in act.table("heads")][:4] == [
        (0, 0), (0, 1), (0, 2), (1, 1),
    ]  # fmt: skip
    assert act.file(act.logged("head_map")[0]).read_bytes()[:4] == b"\x89PNG"
    assert (list(act.head_sets()), base.head_sets()) == (["tiny-heads-1"], {})
    assert act.head_sets()["tiny-heads-1"][1], "the run must be recorded as a user of the artifact"

    ids = {read.run.run_id for read in found.values()}
    assert evaluation(*OFFLINE)[0] == 0
    assert evaluation(*OFFLINE, "--limit", "4", "--wandb-samples", "0")[0] == 0
    later = [Read(path) for path in run_files(out)][2:]
    assert {read.run.run_id for read in later[:2]} == ids
    assert not {read.run.run_id for read in later[2:]} & ids, "another experiment is another run"
    assert not [key for step in later[3].history for key in step if key.startswith("samples/")]
    check_key(out, said)


@pytest.mark.slow
def test_several_fewshot_seeds_are_one_run_per_arm(evaluation, tmp_path):
    more = ("--fewshot-seeds", "0,7", "--limit", "4")
    assert evaluation(*OFFLINE, *more, tasks="org/choice")[0] == 0
    found = by_job(tmp_path / "out")
    assert len(run_files(tmp_path / "out")) == 2
    values = found["act"].scalars()
    each = [values[f"seed-{seed}/org/choice/acc"] for seed in (0, 7)]
    assert values["org/choice/acc"] == pytest.approx(sum(each) / 2)
    assert values["org/choice/acc_spread"] == 0
    assert "org/choice/acc_stderr" not in values
    assert values["seed-7/org/choice/acc_stderr"] > 0
    assert values["org/choice/acc_difference"] == pytest.approx(
        values["org/choice/acc"] - found["baseline"].scalars()["org/choice/acc"]
    )
    assert [row["fewshot_seed"] for row in found["act"].table("scores")] == [0, 7]
    assert len(found["act"].table("samples/org/choice")) == 8


def check_failure(evaluation, out):
    """Results are there, the error is one line, the key is nowhere."""
    more = ("--wandb-project", "p", "--wandb-timeout", "1", "--limit", "2")
    code, said, errors = evaluation(*more, tasks="org/choice", output=out)
    last = errors.splitlines()[-1]
    assert code == 3
    assert last.startswith("act-harness: W&B: opening a run failed")
    assert f"the results are saved in {out}" in last
    assert "--no-wandb-strict" in last
    assert "Traceback" not in errors
    assert "org/choice" in said, "the scores are printed before anything is logged"
    assert len(list(out.glob("*/results_*.json"))) == 2
    assert (list(out.glob("*/comparison.json"))) != []

    check_key(out, said, errors)
    return more


def check_key(out, *texts):
    for text in texts:
        assert KEY not in text
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.usefixtures("no_server")
def test_eval_without_a_server(evaluation, tmp_path, caplog):
    out = tmp_path / "out"
    more = check_failure(evaluation, out)
    caplog.clear()
    code, said, warned = evaluation(*more, "--no-wandb-strict", tasks="org/choice", output=out)
    assert code == 0
    assert "W&B run" not in said
    check_key(out, said, warned, caplog.text)
    warnings = [r for r in caplog.records if r.name == "act_harness.tracking.wandb_run"]
    assert len(warnings) == 1, "one warning, not one per arm"
    assert "going on without W&B" in warnings[0].message


@pytest.mark.slow
@pytest.mark.usefixtures("refusing_server")
def test_eval_with_a_wrong_key(evaluation, tmp_path):
    check_failure(evaluation, tmp_path / "out")


def test_bad_options_are_found_before_anything_is_done(call, monkeypatch):
    code, _, err = call("eval", "--tasks", "x", "--wandb-entity", "me")
    assert (code, err.count("\n")) == (2, 1)
    assert "without --wandb-project" in err
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = call("eval", "--tasks", "x", "--wandb-project", "p")
    assert code == 2
    assert "pip install 'wandb>=0.31' 'wandb-workspaces>=0.4'" in err


@pytest.mark.parametrize("name", ["eval", "search", "methods", "judge"])
def test_the_options_are_the_same_for_all_commands(name):
    import typer

    options = {
        option
        for parameter in typer.main.get_command(cli.app).commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if "wandb" in option
    }
    assert options == {
        "--wandb-project", "--wandb-entity", "--wandb-group", "--wandb-tags", "--wandb-mode",
        "--wandb-strict", "--no-wandb-strict", "--wandb-samples", "--wandb-timeout",
    }  # fmt: skip


# -- search ----------------------------------------------------------------------------------------


def test_methods_log_both_tables(call, tiny_checkpoint, tmp_path):
    from method_runs import DOCUMENTS
    from method_runs import RECIPE as OF_METHODS

    from act_harness.search.documents import write_documents

    write_documents(tmp_path / "documents.json", DOCUMENTS)
    (tmp_path / "recipe.yaml").write_text(json.dumps(OF_METHODS))
    code, said, _ = call(
        "methods", tmp_path / "recipe.yaml", "--documents", tmp_path / "documents.json",
        "--pretrained", tiny_checkpoint, "--model-args", "dtype=float32", "--device", "cpu",
        "--methods", "signed", "--output", tmp_path / "out", *OFFLINE,
    )  # fmt: skip
    assert code == 0
    assert "wandb sync" in said
    found = only_run(tmp_path / "out")
    assert found.run.job_type == "methods"
    stored = json.loads((tmp_path / "out/methods.json").read_text())
    wanted = stored["methods"]["signed"]["columns"]["raw"]["difference"]
    assert found.scalars()["methods/signed/raw"] == pytest.approx(wanted)
    assert {row["column"] for row in found.table("methods_equal")} == set(stored["columns"])


RECIPE = {
    "name": "tiny", "tasks": ["a", "b"], "samples": 8, "verify_samples": 8,
    "calibration": {"alpha": 2.0}, "chunk_tokens": 100, "top": {"sizes": [1, 2, 4]},
    "controls": {"random_sets": 2},
}  # fmt: skip


@pytest.mark.slow
def test_search_logs_its_tables_plots_and_heads(call, tiny_checkpoint, tmp_path, monkeypatch):
    from act_harness.search.documents import write_documents

    write_documents(tmp_path / "documents.json", [drawn("a", 1), drawn("b", 2)])
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    arguments = (
        "search", tmp_path / "recipe.yaml", "--documents", tmp_path / "documents.json",
        "--pretrained", tiny_checkpoint, "--model-args", "dtype=float32", "--device", "cpu",
        "--ledgers", tmp_path / "ledgers", "--output", tmp_path / "out/tiny.json", *OFFLINE,
    )  # fmt: skip
    code, said, _ = call(*arguments)
    assert code == 0
    assert "wandb sync" in said
    artifact = load_artifact(tmp_path / "out/tiny.json")
    found = only_run(tmp_path / "out")
    assert found.run.job_type == "search"
    assert found.config["recipe"]["tasks"] == ["a", "b"]
    assert found.config["artifact_sha256"] == artifact.sha256()
    assert found.config["provenance"]["torch"]
    assert "table" not in found.config["artifact"]["search"]
    scalars = found.scalars()
    held = artifact.search["judgement"]["columns"]["raw"]
    assert scalars["search/kept_heads"] == artifact.head_count() > 0
    assert scalars["search/forwards"] > 0
    assert scalars["search/rows"] > 0
    assert scalars["search/baseline/a/accuracy"] == artifact.search["baseline"]["a"]["accuracy"]
    assert scalars["judge/raw/selected"] == held["selected"]
    drawn_sets = held["random_sets"]["scores"]
    assert scalars["judge/raw/random_sets_mean"] == pytest.approx(sum(drawn_sets) / 2)
    assert scalars["judge/raw/interval_low"] == held["interval"][0]
    assert scalars["judge/verdict"] == artifact.search["judgement"]["verdict"]
    table = found.table("effects_by_task")
    assert len(table) == 24
    assert {"layer", "head", "task", "accuracy", "margin_change"} <= set(table[0])
    assert len(found.table("effects")) == 12
    for name in ("head_map", "ranks"):
        assert found.file(found.logged(name)[0]).read_bytes()[:4] == b"\x89PNG"
    made = found.head_sets()["tiny"]
    assert made[1] is False

    # An evaluation that uses the artifact logs the same content, so the lineage is one graph.
    from act_harness.tracking.arms import log_artifact
    from act_harness.tracking.wandb_run import TrackingSettings, open_tracker

    settings = TrackingSettings(project="p", mode="offline")
    with open_tracker(
        settings, job_type="act", name="x", config={}, folder=tmp_path / "use"
    ) as tracker:
        log_artifact(tracker, artifact, tmp_path / "use", used=True)
    assert only_run(tmp_path / "use").head_sets()["tiny"] == (made[0], True)

    assert call(*arguments)[0] == 0
    first, again = map(Read, run_files(tmp_path / "out"))
    assert again.run.run_id == first.run.run_id
    assert again.scalars()["search/forwards"] == 0
    (tmp_path / "recipe.yaml").write_text(json.dumps({**RECIPE, "rule": "paper"}))
    assert call(*arguments)[0] == 0
    other = Read(run_files(tmp_path / "out")[-1])
    assert other.run.run_id != first.run.run_id, "another selection from the same measurements"
    monkeypatch.setenv("RANK", "1")
    assert call(*arguments)[1] == "", "other ranks neither print nor log"
    assert len(run_files(tmp_path / "out")) == 3


# -- judge -----------------------------------------------------------------------------------------


def test_judge_logs_scores_conversations_and_pictures(call, tmp_path):
    rows = [doc(81 + n) for n in range(3)]
    write_run(tmp_path / "a", [(row, graded(4, 6)) for row in rows])
    write_run(tmp_path / "b", [(row, graded(5, 8)) for row in rows], arm="few", sha="1")

    def grade(prompt, times):
        value = prompt.rpartition("QUALITY=")[2].split(".")[0]
        return Say(f"Grade: [[{value}]]")

    with serving(grade) as server:
        arguments = ("judge", tmp_path, "--model", "some/judge", "--base-url", server.url)
        assert call(*arguments, *OFFLINE, "--wandb-group", "g", "--wandb-samples", "7")[0] == 0
        assert call(*arguments, *OFFLINE, "--wandb-group", "g", "--wandb-samples", "7")[0] == 0
    folder = tmp_path / "mt_bench_judge"
    found, again = map(Read, run_files(folder))
    assert found.run.run_id == again.run.run_id
    assert (found.run.job_type, found.run.run_group) == ("judge", "g")
    assert found.config["judge"]["model"] == "some/judge"
    assert found.config["arms"] == ["baseline", "few"]
    assert found.config["provenance"]["act_harness"]
    scalars = found.scalars()
    assert scalars["mt_bench/baseline/overall"] == 5.0
    assert scalars["mt_bench/few-minus-baseline/overall"] == pytest.approx(1.5)
    assert (scalars["mt_bench/calls"], again.scalars()["mt_bench/calls"]) == (12, 0)
    talks = found.table("mt_bench/conversations")
    assert talks[0]["assistant"] == "An answer. QUALITY=4."
    assert talks[0]["score"] == 4.0
    assert (len(talks), scalars["mt_bench/conversations_left_out"]) == (7, 5)
    picture = found.file(found.logged("mt_bench/categories")[0])
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("no_server")
def test_judge_without_a_server_of_wandb(call, tmp_path):
    write_run(tmp_path, [(doc(81), graded(4, 6))])
    with serving() as server:
        code, said, errors = call(
            "judge", tmp_path, "--model", "m", "--base-url", server.url, "--wandb-project", "p",
            "--wandb-timeout", "1",
        )  # fmt: skip
    assert code == 3
    assert "opening a run failed" in errors.splitlines()[-1]
    assert (tmp_path / "mt_bench_judge/scores.json").is_file()
    check_key(tmp_path, said, errors)


# -- lm_eval's own command line --------------------------------------------------------------------


# The command `lm_eval`, without reading its thousands of task files first (ten seconds).
LM_EVAL = """
import functools, lm_eval.tasks as tasks
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
def test_a_plain_lm_eval_run_gets_artifact_counters_and_heads(
    tiny_checkpoint, artifact_file, tmp_path
):
    tasks, out = write_tasks(tmp_path / "tasks"), tmp_path / "out"
    done = python(
        "-c", LM_EVAL, "--model", "hf-act", "--model_args",
        f"pretrained={tiny_checkpoint},artifact={artifact_file},dtype=float32",
        "--tasks", "talk", "--include_path", str(tasks), "--limit", "6", "--device", "cpu",
        "--batch_size", "4", "--output_path", str(out), "--log_samples",
        "--wandb_args", f"project=q,job_type=act,step=3,dir={tmp_path}",
        path=(tmp_path, write_metadata(tmp_path / "metadata"), REPOSITORY), WANDB_MODE="offline",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = only_run(tmp_path)
    assert (found.run.project, found.run.job_type) == ("q", "act")
    ours, artifact = found.config["act_harness"], load_artifact(artifact_file)
    assert ours["artifact_sha256"] == artifact.sha256()
    assert ours["artifact_content"]["heads"] == {"0": [0, 1, 2], "1": [1, 3], "2": [0, 1]}
    assert ours["calibration"] == artifact.calibration.settings()
    assert ours["engine"] == "torch"
    scalars = found.scalars()
    assert scalars["counters/prompts"] == 6
    assert len(found.table("heads")) == 7
    assert found.file(found.logged("head_map")[0]).read_bytes()[:4] == b"\x89PNG"
    assert found.head_sets()["tiny-heads-1"][1] is True
    # lm-eval's own logging comes later, with a step of the user's, and is not disturbed.
    assert scalars["talk/exact_match"] == 0
    assert "task_configs" in found.config
    (file,) = Path(out).rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["act_harness"]["counters"]["prompts"] == 6


# -- parts -----------------------------------------------------------------------------------------


def test_effects_of_heads_are_the_best_over_mass_maps(artifact_file):
    from act_harness.tracking.arms import head_effects

    artifact = load_artifact(artifact_file)
    assert np.isnan(head_effects(artifact)).all()
    columns = ["layer", "head", "strength", "effect"]
    rows = [[0, 1, 0, 0.5], [0, 1, 1, 0.2], [2, 3, 0, -1.0], [2, 3, 1, 0.25], [1, 1, 0, None]]
    table = {"heads": {"columns": columns, "rows": rows}}
    found = head_effects(artifact.model_copy(update={"search": {"table": table}}))
    assert (found[0, 1], found[2, 3]) == (0.5, 0.25)
    assert np.isfinite(found).sum() == 2


@pytest.mark.parametrize("job", ["act", "regress"])
def test_an_arm_against_a_stored_baseline(artifact_file, tmp_path, job):
    """What `regress` needs: one arm, its job type, no baseline run."""
    from act_harness.tracking.arms import TrackedArms, track_arms
    from act_harness.tracking.wandb_run import TrackingSettings

    (tmp_path / "run").mkdir()
    info = {"engine": "torch", "counters": {"prompts": 3}}
    content = {"results": {"t": {"acc,none": 0.5}}, "configs": {"t": {}},
               "config": {"act_harness": info}}  # fmt: skip
    (tmp_path / "run/results_2026-01-02T03-04-05.json").write_text(json.dumps(content))
    arms = TrackedArms(
        model="m", folders={"act": tmp_path / "run"}, seeds=(1,), output=tmp_path, job_type=job,
        artifact=load_artifact(artifact_file),
    )  # fmt: skip
    (line,) = track_arms(arms, TrackingSettings(mode="offline", group="nightly"))
    assert "wandb sync" in line
    found = only_run(tmp_path)
    assert (found.run.job_type, found.run.run_group) == (job, "nightly")
    assert (found.scalars()["t/acc"], found.scalars()["counters/prompts"]) == (0.5, 3)


def test_an_arms_folder_keeps_the_address_of_its_run(tmp_path, monkeypatch):
    """`publish` names it; offline there is none to keep."""
    from act_harness.tracking import arms as tracking
    from act_harness.tracking.tracker import Tracker, TrackingSettings

    class Online(Tracker):
        url = "https://wandb.ai/me/p/runs/1"

    place = tmp_path / "run"
    place.mkdir()
    content = {"results": {"t": {"acc,none": 0.5}}, "configs": {"t": {}}}
    (place / "results_2026-01-02T03-04-05.json").write_text(json.dumps(content))
    arms = tracking.TrackedArms(model="m", folders={"baseline": place}, seeds=(1,), output=tmp_path)
    monkeypatch.setattr(tracking, "open_tracker", lambda *_, **__: Tracker())
    tracking.track_arms(arms, TrackingSettings())
    assert not (place / "wandb_run.json").exists()
    monkeypatch.setattr(tracking, "open_tracker", lambda *_, **__: Online())
    tracking.track_arms(arms, TrackingSettings())
    assert json.loads((place / "wandb_run.json").read_text()) == {"url": Online.url}
