"""``act-harness dashboard``: the W&B workspace for this package's runs, built by code.

What it shows is first described as plain data (:func:`dashboard_spec`), written as JSON, and then,
online, built with W&B's own workspace library. The names are those of :mod:`act_harness.tracked`,
so the dashboard can be made before the first run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from act_harness.atomic import write_json
from act_harness.errors import InfrastructureError, InputError
from act_harness.tracking import TrackingSettings, one_line, optional_module

__all__ = ["dashboard", "dashboard_spec"]

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
        "schema": "act-harness/dashboard/1",
        "entity": entity,
        "project": project,
        "name": name,
        "runs": {
            "group": group,
            "group_by": "JobType",
            "columns": ["config:arm", "config:model", "config:artifact_name"],
        },
        "sections": [
            {"name": "Arms side by side", "panels": [*arms, _table("results")]},
            {"name": "Paired differences", "panels": [_table("comparison"), *paired]},
            {"name": "Heads", "panels": [_media("head_map"), _table("heads")]},
            {"name": "Counters", "panels": [_bars(n, [f"counters/{n}"]) for n in counters]},
            {"name": "Samples", "panels": [_table(f"samples/{task}") for task in scores]},
        ],
    }


def _bars(title: str, metrics: list[str]) -> dict[str, Any]:
    return {"kind": "bars", "title": title, "metrics": metrics}


def _table(key: str) -> dict[str, Any]:
    return {"kind": "table", "title": key, "key": key}


def _media(key: str) -> dict[str, Any]:
    return {"kind": "media", "title": key, "key": key}


def dashboard(
    settings: TrackingSettings,
    path: str | os.PathLike[str],
    *,
    scores: Mapping[str, Sequence[str]],
    counters: Sequence[str] = (),
    name: str = "act-harness",
) -> str | None:
    """Build the W&B workspace that shows the runs; offline, only its specification.

    Args:
        settings: Project, entity and mode.
        path: Where the specification is written as JSON, online too.
        scores: Task or group to metrics, see :func:`act_harness.tracked.dashboard_spec`.
        counters: Names of the calibration's counters.
        name: Name of the workspace.

    Returns:
        Address of the workspace; None offline.

    Raises:
        InputError: wandb or wandb-workspaces is not installed, or no entity is known.
        InfrastructureError: The specification cannot be written, or W&B cannot be reached.
    """
    spec = dashboard_spec(
        project=settings.project, entity=settings.entity, scores=scores, counters=counters,
        name=name, group=settings.group,
    )  # fmt: skip
    write_json(path, spec)
    if (settings.mode or os.environ.get("WANDB_MODE")) == "offline":
        return None
    if not settings.entity:
        raise InputError(
            f"a W&B workspace needs an owner: give --wandb-entity (the specification is in {path})"
        )
    workspaces = optional_module("wandb_workspaces.workspaces", _PURPOSE)
    errors = (optional_module("wandb", _PURPOSE).Error, OSError, ValueError, RuntimeError)
    try:
        made = workspaces.Workspace(
            entity=settings.entity,
            project=settings.project,
            name=name,
            sections=[_section(one) for one in spec["sections"] if one["panels"]],
            runset_settings=_runset(spec),
        )
        made.save()
        return str(made.url)
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
