"""``act-harness dashboard``: the W&B workspace that shows the runs, built by code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from act_harness.cli.options import WandbEntity, WandbGroup, WandbMode
from act_harness.cli.parsing import names
from act_harness.support.places import prepare_file
from act_harness.tracking.tracker import TrackingSettings

__all__ = ["dashboard"]


def dashboard(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Result folders; their tasks and metrics are shown."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks to show where there are no results yet.")] = "",
    metrics: Annotated[str, typer.Option(help="The metrics of --tasks.")] = "acc",
    spec: Annotated[
        Path | None, typer.Option("--from", help="Build what this specification describes.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the specification is written.")] = Path(
        "dashboard.json"
    ),
    name: Annotated[
        str | None, typer.Option(help="Name of the workspace. [default: act-harness]")
    ] = None,
    wandb_project: Annotated[
        str | None, typer.Option(help="Project of the runs. [default: act-harness]")
    ] = None,
    wandb_entity: WandbEntity = None,
    wandb_group: WandbGroup = None,
    wandb_mode: WandbMode = None,
) -> None:
    """Build the W&B workspace of the runs, or its specification.

    It shows arms side by side, paired differences, head map and counters. It can be built before
    the first run. Offline, or without the package wandb-workspaces, only its specification is
    written; `--from` builds it later.

    \b
    Example:
      act-harness dashboard .demo/results --wandb-mode offline --output .demo/dashboard.json
      act-harness dashboard --from .demo/dashboard.json --wandb-entity ME
    """
    from act_harness.attention.counters import CalibrationCounters
    from act_harness.tracking import dashboard as boards

    if spec is None:
        prepare_file(output)
    changes = {"project": wandb_project, "entity": wandb_entity, "group": wandb_group, "name": name}
    if spec is not None:
        content = boards.load_spec(spec, **changes)
    else:
        content = boards.dashboard_spec(
            project=wandb_project or TrackingSettings.project,
            scores=boards.known_scores(
                results or (), tasks={task: names(metrics) for task in names(tasks)}
            ),
            counters=list(CalibrationCounters().summary()),
            entity=wandb_entity,
            name=name or "act-harness",
            group=wandb_group,
        )
    made = boards.dashboard(content, spec or output, mode=wandb_mode, must_build=spec is not None)
    if made.note:
        print(made.note, file=sys.stderr)
    print(made.url or f"written: {made.path}")
