from __future__ import annotations

import json
import sys

import pytest
from tracked_rows import comparison, row

from act_harness.errors import InfrastructureError, InputError, ResultError
from act_harness.evidence import stats
from act_harness.tracking import dashboard
from act_harness.tracking import values as tracked

SCORES = {"sst2": ["acc"], "org/task": ["acc", "f1"]}


def panels(spec, name):
    (section,) = [one for one in spec["sections"] if one["name"] == name]
    return section["panels"]


def spec_of(**more):
    given = {"project": "p", "entity": "e", "group": "g", "scores": SCORES, "counters": ["share"]}
    return dashboard.dashboard_spec(**{**given, **more})


def test_offline_the_specification_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = tmp_path / "new" / "dashboard.json"
    made = dashboard.dashboard(spec_of(), path)
    assert (made.url, made.path) == (None, path)
    assert f"--from {path}" in made.note
    spec = json.loads(path.read_text())
    assert (spec["project"], spec["entity"], spec["runs"]["group"]) == ("p", "e", "g")
    bars = [one for one in panels(spec, "Arms side by side") if one["kind"] == "bars"]
    assert [one["metrics"] for one in bars] == [["sst2/acc"], ["org/task/acc"], ["org/task/f1"]]
    assert panels(spec, "Heads")[0] == {"kind": "media", "title": "head_map", "key": "head_map"}
    assert panels(spec, "Counters")[0]["metrics"] == ["counters/share"]
    assert panels(spec, "Samples")[1]["key"] == "samples/org/task"


def write_results(folder, results):
    folder.mkdir(parents=True)
    content = {"results": results, "configs": {task: {} for task in results}, "groups": {}}
    (folder / "results_2026-01-02T03-04-05.json").write_text(json.dumps(content))


def test_tasks_and_metrics_are_those_of_the_results(tmp_path):
    write_results(tmp_path / "a/b", {"org/task": {"acc,none": 0.5, "acc_stderr,none": 0.1}})
    write_results(tmp_path / "c", {"gsm": {"exact_match,strict": 1.0}, "org/task": {"f1,none": 0}})
    assert dashboard.known_scores([tmp_path], tasks={"sst2": ["acc"]}) == {
        "sst2": ["acc"], "org/task": ["acc", "f1"], "gsm": ["exact_match,strict"],
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultError, match="no results_"):
        dashboard.known_scores([tmp_path / "empty"], tasks={})
    with pytest.raises(InputError, match="nothing to show"):
        dashboard.known_scores([], tasks={})


@pytest.fixture
def saved(monkeypatch):
    """Workspaces that would have been sent to W&B."""
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    made = []

    def save(self):
        made.append(self)
        self._internal_name = "abc"

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(workspaces.Workspace, "save", save)
    monkeypatch.setattr(workspaces.Workspace, "url", property(lambda self: "https://example.org"))
    return made


def test_the_command_writes_a_specification_and_builds_it_later(tmp_path, saved, monkeypatch):
    from typer.testing import CliRunner

    from act_harness.cli import app as cli

    write_results(tmp_path / "out", {"org/task": {"acc,none": 0.5}})
    path = tmp_path / "d.json"

    def call(*arguments):
        return CliRunner().invoke(cli.app, ["dashboard", *map(str, arguments)])

    done = call(tmp_path / "out", "--wandb-mode", "offline", "--output", path, "--tasks", "sst2")
    assert done.exit_code == 0
    assert "written:" in done.output
    assert "--from" in done.output
    spec = json.loads(path.read_text())
    names = [metric for one in panels(spec, "Counters") for metric in one["metrics"]]
    assert "counters/share_of_pairs_with_sink" in names

    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    done = call("--tasks", "sst2", "--output", tmp_path / "other.json")
    assert done.exit_code == 0
    assert "not installed" in done.output
    assert saved == []

    done = call("--from", path, "--wandb-entity", "me", "--wandb-project", "mine")
    assert done.exit_code == 0
    assert "https://example.org" in done.output
    assert (saved[0].entity, saved[0].project) == ("me", "mine")
    assert saved[0].sections[0].panels[0].metrics == ["sst2/acc"]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema": "x"}'])
def test_a_file_that_is_no_specification(tmp_path, text):
    path = tmp_path / "d.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"d\.json"):
        dashboard.load_spec(path)


def test_the_panels_show_what_is_logged():
    logged = set(tracked.result_scalars({"results": {"sst2": {"acc,none": 0.5}}}))
    logged |= set(tracked.counter_scalars({"share": 1}))
    result = stats.paired_difference([0, 1, 1], [1, 1, 0])
    logged |= set(tracked.comparison_scalars(comparison(row("sst2", result=result))))
    spec = dashboard.dashboard_spec(project="p", scores={"sst2": ["acc"]}, counters=["share"])
    shown = {
        metric
        for section in spec["sections"]
        for panel in section["panels"]
        for metric in panel.get("metrics", [])
    }
    assert shown <= logged


def test_online_it_becomes_a_workspace(tmp_path, saved):
    built = dashboard.dashboard(spec_of(), tmp_path / "d.json", mode="online")
    assert built.url == "https://example.org"
    made = saved[0]
    assert [section.name for section in made.sections] == [
        "Arms side by side", "Paired differences", "Heads", "Counters", "Search", "Samples",
    ]  # fmt: skip
    assert made.sections[0].panels[0].metrics == ["sst2/acc"]
    assert made.sections[2].panels[0].media_keys == ["head_map"]
    text = made._to_model().model_dump_json()
    assert "org/task/f1_difference" in text
    assert "jobType" in text


def test_failures_say_where_the_specification_is(tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    with pytest.raises(InputError, match=r"--wandb-entity .*d\.json"):
        dashboard.dashboard(spec_of(entity=None), path, mode="online")
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")

    def fail(self):
        raise ValueError("no\nsuch entity")

    monkeypatch.setattr(workspaces.Workspace, "save", fail)
    with pytest.raises(InfrastructureError, match=r"no such entity.*d\.json"):
        dashboard.dashboard(spec_of(), path, mode="online")
    assert json.loads(path.read_text())["schema"] == "act-harness/dashboard/1"
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    expected = r"needs wandb-workspaces.*pip install .*'wandb-workspaces>"
    with pytest.raises(InputError, match=expected):
        dashboard.dashboard(spec_of(), path, mode="online", must_build=True)
