"""``act-harness compare``: two runs, document by document."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from act_harness.cli.parsing import names
from act_harness.support.places import prepare_folder

__all__ = ["compare"]


def compare(
    a: Annotated[Path, typer.Argument(help="The reference: a result folder or file.")],
    b: Annotated[Path, typer.Argument(help="The run that is compared with it.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks and groups. [default: all that both have]")
    ] = "",
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Accepted share of false findings.")] = 0.05,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the resampling; that of `eval` if not given.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json, comparison.md, forest.png.")
    ] = None,
) -> None:
    """Compare two runs document by document.

    Takes folders and files of `act-harness eval` and of `lm_eval --log_samples`. Exit code 1
    when a task or group regressed, 2 when the runs answer other documents or prompts, 3 when
    answers are not finite (their tasks are not tested), or nothing at all could be tested.

    \b
    Example:
      act-harness compare outputs/model__baseline__DATE \\
          outputs/model__act-heads__DATE
    """
    from act_harness.evidence.compare import compare as compare_runs
    from act_harness.evidence.plots import comparison_files
    from act_harness.evidence.stats import SEED

    if output is not None:
        prepare_folder(output)
    found = compare_runs(
        a,
        b,
        tasks=names(tasks) or None,
        confidence=confidence,
        alpha=alpha,
        seed=SEED if seed is None else seed,
    )
    print(found.to_terminal(colour=sys.stdout.isatty()))
    if output is not None:
        for path in comparison_files(found, output).values():
            print(f"written: {path}")
    raise typer.Exit(found.exit_code)
