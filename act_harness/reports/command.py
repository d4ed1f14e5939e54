"""``act-harness report RESULTS...``: from files and folders to one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from act_harness.errors import ResultError, one_line
from act_harness.evidence.figures import require_matplotlib
from act_harness.reports.evaluations import evaluation_sections
from act_harness.reports.measurements import bench_section, sinks_section
from act_harness.reports.parts import Section
from act_harness.reports.searches import methods_section, search_section
from act_harness.reports.sources import Kind, Source, find_sources
from act_harness.reports.writing import write_report
from act_harness.support import places

__all__ = ["report_on"]

_SECTIONS: dict[Kind, Callable[[Source], Section]] = {
    "methods": methods_section,
    "search": search_section,
    "sinks": sinks_section,
    "bench": bench_section,
}
"""After the evaluations, in this order."""


def report_on(
    paths: Sequence[str | Path], output: str | Path = "report", *, title: str = "Report"
) -> list[Path]:
    """Write one report over results: a page, Markdown, and figures with their data.

    Args:
        paths: Files or folders of ``eval``, ``compare``, ``methods``, ``search``, ``sinks``,
            ``bench``, or of lm-eval; recognised by their content.
        output: Folder to write into.
        title: Heading.

    Returns:
        The files, the page first.

    Raises:
        ResultError: A path is no result, or malformed.
        ArtifactError: An artifact is malformed.
        InputError: matplotlib is not installed.
        InfrastructureError: A file cannot be read or written.
    """
    require_matplotlib()
    sources = find_sources([Path(path) for path in paths])
    folder = places.prepare_folder(output)
    sections = sorted(evaluation_sections(sources), key=lambda section: section.order)
    for kind, make in _SECTIONS.items():
        found = [_section(make, one) for one in sources if one.kind == kind]
        sections += sorted(found, key=lambda section: section.order)
    return write_report(sections, folder, title=title)


def _section(make: Callable[[Source], Section], source: Source) -> Section:
    try:
        return make(source)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Its schema is known, its content another's: a file that was edited, or a later version's.
        raise ResultError(
            f"{source.path} cannot be shown ({type(error).__name__}: "
            f"{one_line(error, limit=200)}); expected it as act-harness wrote it: repeat the command that did"
        ) from error
