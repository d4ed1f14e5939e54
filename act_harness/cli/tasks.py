"""``act-harness tasks``: which tasks there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from act_harness.cli.listing import columns
from act_harness.cli.options import DataDir, IncludePath
from act_harness.cli.parsing import names as split_names
from act_harness.support.sequences import common_start

if TYPE_CHECKING:
    from act_harness.harness.task_list import GroupEntry, TaskEntry, TaskList

__all__ = ["tasks"]

_FOLDED = 10
"""More tasks than that on one dataset are one line of the whole list."""
_WIDTH = 72
_NOT_COUNTED = (
    "Documents as the datasets were published (--data-dir counts a folder's rows); - is not known."
)
_UNCHECKED = "With ?: not held against the dataset, or a sum with such a number in it."
_WHOLE = """A line with * stands for several tasks; to see each: act-harness tasks 'act_mmlu_*'
lm-eval's own tasks: act-harness run ls tasks"""


def tasks(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names of tasks or groups, or patterns as act_mmlu_*. [default: all]"),
    ] = None,
    include_path: IncludePath = None,
    data_dir: DataDir = None,
) -> None:
    """List our tasks: documents, where they come from.

    Groups and tasks; a data folder's rows are counted. lm-eval's own tasks are listed by
    `act-harness run ls tasks`.

    \b
    Example:
      act-harness tasks
      act-harness tasks act_classification --data-dir data
    """
    from act_harness.harness.task_list import list_tasks

    wanted = tuple(name for text in names or () for name in split_names(text))
    print(_text(list_tasks(wanted, include_path=tuple(include_path or ()), data_dir=data_dir)))


def _text(found: TaskList) -> str:
    blocks = []
    if found.groups:
        rows = [("group", "tasks", "documents", "members")]
        for group in found.groups:
            count = (str(len(group.tasks)), _number(group))
            rows.append((group.name, *count, _few(group.members)))
        blocks.append(columns(rows))
    lines = _folded(found.tasks) if found.whole else list(map(_line, found.tasks))
    blocks.append(columns([("task", "documents", "split", "scored by", "rows from"), *lines]))
    counted = f"Documents as counted in {found.counted}; - is where rows are missing."
    note = _NOT_COUNTED if found.counted is None else counted
    if not all(task.checked for task in found.tasks):
        note += f"\n{_UNCHECKED}"
    blocks.append(f"{note}\n{_WHOLE}" if found.whole else note)
    return "\n\n".join(blocks)


def _folded(tasks: Sequence[TaskEntry]) -> list[tuple[str, ...]]:
    """Return a line for each task, one for all where many read one dataset in one way."""
    together: dict[tuple[str, str], list[TaskEntry]] = {}
    for task in tasks:
        together.setdefault((task.dataset, task.scored), []).append(task)
    lines: list[tuple[str, ...]] = []
    for (dataset, _), several in together.items():
        if not dataset or len(several) <= _FOLDED:
            lines += map(_line, several)
            continue
        counts = [task.documents for task in several]
        all_of_them = several[0]._replace(
            name=_pattern([task.name for task in several]),
            documents=None if None in counts else sum(count or 0 for count in counts),
            source=f"{dataset} ({len(several)} configurations)",
        )
        lines.append(_line(all_of_them))
    return sorted(lines)


def _pattern(names: Sequence[str]) -> str:
    start = common_start(names)
    end = common_start([name[start:][::-1] for name in names])
    return f"{names[0][:start]}*{names[0][len(names[0]) - end :]}"


def _line(task: TaskEntry) -> tuple[str, ...]:
    return (task.name, _number(task), task.split or "-", task.scored, task.source or "-")


def _number(entry: TaskEntry | GroupEntry) -> str:
    count = entry.documents
    return "-" if count is None else f"{count:,}" if entry.checked else f"{count:,}?"


def _few(names: Sequence[str]) -> str:
    """Return as many names as fit a width, the first at least."""
    shown = 1
    while shown < len(names) and len(", ".join(names[: shown + 1])) <= _WIDTH:
        shown += 1
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
