from __future__ import annotations

import json
import sys

import pytest

from act_harness import dashboard, stats, tracked
from act_harness.errors import InfrastructureError, InputError
from act_harness.tracking import TrackingSettings

SCORES = {"sst2": ["acc"], "org/task": ["acc", "f1"]}


def panels(spec, name):
    (section,) = [one for one in spec["sections"] if one["name"] == name]
    return section["panels"]


def test_offline_the_specification_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = tmp_path / "new" / "dashboard.json"
    settings = TrackingSettings(project="p", entity="e", group="g")
    assert dashboard.dashboard(settings, path, scores=SCORES, counters=["share"]) is None
    spec = json.loads(path.read_text())
    assert (spec["project"], spec["entity"], spec["runs"]["group"]) == ("p", "e", "g")
    bars = [one for one in panels(spec, "Arms side by side") if one["kind"] == "bars"]
    assert [one["metrics"] for one in bars] == [["sst2/acc"], ["org/task/acc"], ["org/task/f1"]]
    assert panels(spec, "Heads")[0] == {"kind": "media", "title": "head_map", "key": "head_map"}
    assert panels(spec, "Counters")[0]["metrics"] == ["counters/share"]
    assert panels(spec, "Samples")[1]["key"] == "samples/org/task"


def test_the_panels_show_what_is_logged():
    logged = set(tracked.result_scalars({"results": {"sst2": {"acc,none": 0.5}}}))
    logged |= set(tracked.counter_scalars({"share": 1}))
    result = stats.paired_difference([0, 1, 1], [1, 1, 0])
    from test_tracked import comparison, row

    logged |= set(tracked.comparison_scalars(comparison(row("sst2", result=result))))
    spec = dashboard.dashboard_spec(project="p", scores={"sst2": ["acc"]}, counters=["share"])
    shown = {
        metric
        for section in spec["sections"]
        for panel in section["panels"]
        for metric in panel.get("metrics", [])
    }
    assert shown <= logged


def test_online_it_becomes_a_workspace(tmp_path, monkeypatch):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    saved = []

    def save(self):
        saved.append(self)
        self._internal_name = "abc"

    monkeypatch.setattr(workspaces.Workspace, "save", save)
    monkeypatch.setattr(workspaces.Workspace, "url", property(lambda self: "https://example.org"))
    settings = TrackingSettings(project="p", entity="e", mode="online", group="g")
    url = dashboard.dashboard(settings, tmp_path / "d.json", scores=SCORES, counters=["share"])
    assert url == "https://example.org"
    made = saved[0]
    assert [section.name for section in made.sections] == [
        "Arms side by side", "Paired differences", "Heads", "Counters", "Samples",
    ]  # fmt: skip
    assert made.sections[0].panels[0].metrics == ["sst2/acc"]
    assert made.sections[2].panels[0].media_keys == ["head_map"]
    text = made._to_model().model_dump_json()
    assert "org/task/f1_difference" in text
    assert "jobType" in text


def test_failures_say_where_the_specification_is(tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    with pytest.raises(InputError, match=r"--wandb-entity .*d\.json"):
        dashboard.dashboard(TrackingSettings(mode="online"), path, scores=SCORES)
    settings = TrackingSettings(mode="online", entity="e")
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")

    def fail(self):
        raise ValueError("no\nsuch entity")

    monkeypatch.setattr(workspaces.Workspace, "save", fail)
    with pytest.raises(InfrastructureError, match=r"no such entity.*d\.json"):
        dashboard.dashboard(settings, path, scores=SCORES)
    assert json.loads(path.read_text())["schema"] == "act-harness/dashboard/1"
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(InputError, match=r"wandb-workspaces.*pip install 'act-harness\[wandb\]'"):
        dashboard.dashboard(settings, path, scores=SCORES)
