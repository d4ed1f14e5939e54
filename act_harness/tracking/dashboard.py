"""``act-harness dashboard``: the W&B workspace for this package's runs, built by code.

What it shows is first described as plain data (:func:`dashboard_spec`), written as JSON, and then,
online, built with W&B's own workspace library. The names are those of
:mod:`act_harness.tracking.values`, so the dashboard can be made before the first run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from act_harness.errors import InfrastructureError, InputError, ResultError
from act_harness.evidence.results import load_run
from act_harness.support import reading
from act_harness.support.atomic import write_json
from act_harness.tracking.wandb_run import one_line, optional_module

__all__ = ["Built", "dashboard", "dashboard_spec", "known_scores", "load_spec"]

SCHEMA = "act-harness/dashboard/1"

_PURPOSE = "a W&B workspace"


def dashboard_spec(
    *,
    project: str,
    scores: Mapping[str, Sequence[str]],
    counters: Sequence[str] = (),
    entity: str | None = None,
    name: str = "act-harness",
    group: str | None = None,
) -> dict[str, Any]:
    """Describe a dashboard: arms side by side, paired differences, head map, counters, samples.

    Args:
        project: Project of the tracking service.
        scores: Task or group to its metrics, as logged.
        counters: Names of the calibration's counters.
        entity: Owner of the project.
        name: Name of the dashboard.
        group: Only runs of this group; None: all.
    """
    keys = [(task, metric) for task, metrics in scores.items() for metric in metrics]
    arms = [_bars(f"{task}: {metric}", [f"{task}/{metric}"]) for task, metric in keys]
    paired = [
        _bars(
            f"{task}: {metric}, act - baseline",
            [f"{task}/{metric}_{part}" for part in ("low", "difference", "high")],
        )
        for task, metric in keys
    ]
    return {
        "schema": SCHEMA,
        "entity": entity,
        "project": project,
        "name": name,
        "runs": {
            "group": group,
            "group_by": "JobType",
            "columns": ["config:arm", "config:model", "config:artifact_name"],
        },
        "sections": [
            {"name": "Arms side by side", "panels": [*arms, _table("scores")]},
            {"name": "Paired differences", "panels": [_table("comparison"), *paired]},
            {"name": "Heads", "panels": [_media("head_map"), _table("heads")]},
            {"name": "Counters", "panels": [_bars(n, [f"counters/{n}"]) for n in counters]},
            {"name": "Search", "panels": [_media("ranks"), _table("effects")]},
            {"name": "Samples", "panels": [_table(_samples(task)) for task in scores]},
        ],
    }


def known_scores(
    results: Iterable[str | os.PathLike[str]], *, tasks: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return task or group to metrics, as results have them and as they are asked for.

    Args:
        results: Folders of results, at any depth, or result files.
        tasks: Further tasks with their metrics.

    Raises:
        ResultError: A folder holds no results.
        InputError: Neither results nor tasks were given.
    """
    found: dict[str, dict[str, None]] = {task: dict.fromkeys(own) for task, own in tasks.items()}
    for given in map(Path, results):
        files = sorted(given.glob("**/results_*.json")) if reading.is_folder(given) else [given]
        if not files:
            raise ResultError(
                f"{given}: no results_*.json in it; give output folders of act-harness eval or of "
                "lm_eval --output_path"
            )
        for run in map(load_run, files):
            for name in dict.fromkeys((*run.tasks, *run.groups)):
                for metric, kind in run.metrics(name):
                    shown = metric if kind == "none" else f"{metric},{kind}"
                    found.setdefault(name, {})[shown] = None
    if not found:
        raise InputError("nothing to show; give result folders, or --tasks with --metrics")
    return {name: list(metrics) for name, metrics in found.items()}


def load_spec(path: str | os.PathLike[str], **changes: str | None) -> dict[str, Any]:
    """Read a specification; ``changes`` (project, entity, group, name) replace what it says.

    Raises:
        InputError: The file is missing or no specification.
    """
    advice = "write a dashboard's specification by act-harness dashboard"
    spec = reading.read_json(path, error=InputError, advice=advice)
    if not isinstance(spec, dict) or spec.get("schema") != SCHEMA:
        raise InputError(f"{path} is no dashboard's specification (schema {SCHEMA}); write one by "
                         "act-harness dashboard")  # fmt: skip
    for key, value in changes.items():
        if value is not None:
            (spec["runs"] if key == "group" else spec)[key] = value
    return spec


def _samples(task: str) -> str:
    return "mt_bench/conversations" if task == "mt_bench" else f"samples/{task}"


def _bars(title: str, metrics: list[str]) -> dict[str, Any]:
    return {"kind": "bars", "title": title, "metrics": metrics}


def _table(key: str) -> dict[str, Any]:
    return {"kind": "table", "title": key, "key": key}


def _media(key: str) -> dict[str, Any]:
    return {"kind": "media", "title": key, "key": key}


class Built(NamedTuple):
    """What came of a dashboard."""

    url: str | None
    """Address of the workspace; None where only the specification was written."""
    path: Path
    """The specification's file."""
    note: str = ""
    """How to build the workspace later, where it was not built."""


def dashboard(
    spec: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    mode: str | None = None,
    must_build: bool = False,
) -> Built:
    """Build the W&B workspace that shows the runs; offline, only its specification.

    Args:
        spec: See :func:`dashboard_spec`.
        path: Where the specification is written as JSON, online too.
        mode: ``online`` or ``offline``; None: what ``WANDB_MODE`` says.
        must_build: Take a missing package as an error, not as a reason to write a file only.

    Raises:
        InputError: No owner is known, or (``must_build``) a package is not installed.
        InfrastructureError: The specification cannot be written, or W&B cannot be reached.
    """
    file = write_json(path, spec)
    later = f"build the workspace later with: act-harness dashboard --from {file}"
    if (mode or os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        return Built(None, file, f"offline; {later}")
    if not must_build and find_spec("wandb_workspaces") is None:
        return Built(None, file, f"wandb-workspaces is not installed (extra wandb); {later}")
    if not spec["entity"]:
        raise InputError(
            f"a W&B workspace needs an owner: give --wandb-entity (the specification is in {path})"
        )
    workspaces = optional_module("wandb_workspaces.workspaces", _PURPOSE)
    errors = (optional_module("wandb", _PURPOSE).Error, OSError, ValueError, RuntimeError)
    try:
        made = workspaces.Workspace(
            entity=spec["entity"],
            project=spec["project"],
            name=spec["name"],
            sections=[_section(one) for one in spec["sections"] if one["panels"]],
            runset_settings=_runset(spec),
        )
        made.save()
        return Built(str(made.url), file)
    except errors as error:
        raise InfrastructureError(
            f"W&B: saving the workspace failed ({one_line(error)}); its specification is in "
            f"{path}; check WANDB_API_KEY and the network"
        ) from error


def _section(spec: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a wandb_workspaces object
    reports = optional_module("wandb_workspaces.reports.v2", _PURPOSE)
    workspaces = optional_module("wandb_workspaces.workspaces", _PURPOSE)
    panels: list[Any] = []
    for one in spec["panels"]:
        if one["kind"] == "bars":
            panels.append(reports.BarPlot(title=one["title"], metrics=one["metrics"]))
        elif one["kind"] == "table":
            panels.append(reports.WeavePanelSummaryTable(table_name=one["key"]))
        else:
            panels.append(reports.MediaBrowser(title=one["title"], media_keys=[one["key"]]))
    return workspaces.Section(name=spec["name"], panels=panels, is_open=True)


def _runset(spec: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a wandb_workspaces object
    expr = optional_module("wandb_workspaces.expr", _PURPOSE)
    workspaces = optional_module("wandb_workspaces.workspaces", _PURPOSE)
    group = spec["runs"]["group"]
    return workspaces.RunsetSettings(
        filters=expr.And(expr.Metric("Group") == group) if group else "",
        groupby=[expr.Metric(spec["runs"]["group_by"])],
        pinned_columns=list(spec["runs"]["columns"]),
    )
