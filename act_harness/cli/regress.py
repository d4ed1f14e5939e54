"""``act-harness regress``: a suite held against its stored baseline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from act_harness.cli.listing import ListSuites, suite_list
from act_harness.cli.options import DataDir, IncludePath, Pretrained, with_tracking
from act_harness.cli.parsing import names
from act_harness.errors import InputError
from act_harness.tracking.tracker import TrackingSettings

__all__ = ["regress"]


@with_tracking
def regress(
    suite: Annotated[
        str, typer.Option(help="Name of a suite, or path of its folder or YAML. [required]")
    ] = "",
    pretrained: Pretrained = None,
    tasks: Annotated[
        str, typer.Option(help="Only these tasks of the suite, separated by commas.")
    ] = "",
    include_path: IncludePath = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", "-L", help="Only the first so many documents of each task."),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size", "-b", help="Requests at a time, or 'auto'. [default: the suite's]"
        ),
    ] = None,
    data_dir: DataDir = None,
    baselines: Annotated[
        Path | None, typer.Option(help="Folder of suites. [default: the shipped one]")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of regress.json and regress.md.")] = Path(
        "outputs/regress"
    ),
    update: Annotated[
        bool, typer.Option("--update", help="Make a new baseline instead; needs a clean clone.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why there is a new baseline.")] = "",
    listed: ListSuites = False,
    tracking: TrackingSettings | None = None,
) -> None:
    """Hold a suite against its stored baseline.

    Baselines are in results/baselines/. Layer 1 (goldens): documents, prompts, predictions and
    log-likelihoods, one by one. Layer 2 (statistics): worse than the baseline, significantly, by
    more than the run-to-run spread.

    \b
    Exit codes:
      0   passed
      1   regressed; the tasks are named
      2   bad input: an unknown suite, task or option, a suite changed since its baseline
      3   no verdict: no baseline, model, data, GPU or memory; or passed, but W&B failed

    \b
    Example:
      act-harness regress --list
      act-harness regress --suite smollm2-goldens --pretrained .demo/model
      act-harness regress --suite smollm2-goldens --update --reason "torch 2.14"
    """
    if listed:
        print(suite_list(baselines))
        return
    if not suite:
        raise InputError("no suite was named; give --suite NAME, --list shows those there are")
    from act_harness.regress import RegressSettings, run_regress, update_baseline

    settings = RegressSettings(
        suite=suite,
        pretrained=pretrained,
        tasks=names(tasks),
        include_path=tuple(include_path or ()),
        limit=limit,
        batch_size=batch_size,
        data_dir=data_dir,
        baselines=baselines,
        output=output,
        tracking=tracking,
    )
    if update:
        print(f"written: {update_baseline(settings, reason=reason)}")
        return
    if reason:
        raise InputError("--reason belongs to --update; give both or none")
    found = run_regress(settings)
    print(found.to_terminal(colour=sys.stdout.isatty()))
    print(f"written: {output / 'regress.json'}, {output / 'regress.md'}")
    if found.tracked:
        print(found.tracked)
    raise typer.Exit(found.exit_code)
