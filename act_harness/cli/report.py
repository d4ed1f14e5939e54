"""``act-harness report``: everything that was found, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Files or folders of eval, compare, methods, search, sinks, bench or lm-eval."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of report.html, report.md and figures.")
    ] = Path("report"),
    title: Annotated[str, typer.Option(help="Heading.")] = "Report",
) -> None:
    """Put results together on one page, and in Markdown.

    Both arms by task with their intervals, paired differences, every calibrator's column, methods,
    the search, sinks, speed and memory: whatever the files hold, the weakest figures first. Each
    figure is also written as PNG and SVG, with its data as CSV. The page needs no network. Two runs
    that no comparison holds are compared. Needs matplotlib (extra `report`).

    \b
    Example:
      act-harness report .demo/results .demo/methods .demo/artifact.json --output report
    """
    from act_harness.reports.command import report_on

    page, markdown, *files = report_on(results, output, title=title)
    print(f"written: {page}")
    print(f"written: {markdown}")
    print(f"written: {len(files)} files of figures in {output / 'figures'}")
