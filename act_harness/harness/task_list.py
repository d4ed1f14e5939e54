"""What tasks there are: how many documents each scores, and where its rows come from.

:func:`list_tasks` reads the task files; it loads no model and downloads nothing. Documents are
counted where rows are at hand (a data folder, or rows that a task builds itself), and taken from
``tasks/documents.json`` otherwise: the sizes that the datasets were published with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from act_harness.errors import ActHarnessError, TaskError, suggestion
from act_harness.harness.data_folder import DATA_DIRECTORY_VARIABLE, data_directory, label
from act_harness.harness.task_lookup import (
    TaskSelection,
    known_tasks,
    leaf_tasks,
    load_tasks,
    members_of,
)
from act_harness.support import paths, reading

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["GroupEntry", "TaskEntry", "TaskList", "list_tasks"]

_PUBLISHED = "documents.json"
_SCORED = {
    "multiple_choice": "choices",
    "generate_until": "generated",
    "loglikelihood": "likelihood",
    "loglikelihood_rolling": "likelihood",
}


class TaskEntry(NamedTuple):
    """A task."""

    name: str
    documents: int | None
    """Documents that an evaluation scores; None: not known without the rows."""
    split: str
    scored: str
    """``choices``, ``generated`` or ``likelihood``."""
    source: str
    """Dataset and configuration, or the function that builds the rows."""
    dataset: str
    """The dataset without its configuration."""
    checked: bool = True
    """False: the number is one that nobody has held against the dataset."""


class GroupEntry(NamedTuple):
    """A group or tag."""

    name: str
    tasks: tuple[TaskEntry, ...]
    members: tuple[str, ...]
    """What it names itself: tasks, or further groups."""

    @property
    def documents(self) -> int | None:
        """Documents of all its tasks; None where one is not known."""
        counts = [task.documents for task in self.tasks]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def checked(self) -> bool:
        """Whether the numbers of all its tasks are."""
        return all(task.checked for task in self.tasks)


class PublishedSizes(NamedTuple):
    """What ``tasks/documents.json`` holds."""

    about: str
    unchecked: list[str]
    """Datasets with their configuration, as in :attr:`rows`."""
    rows: dict[str, dict[str, int]]
    """Sizes by dataset and split."""


class TaskList(NamedTuple):
    """Groups and tasks, by name."""

    groups: tuple[GroupEntry, ...]
    tasks: tuple[TaskEntry, ...]
    counted: Path | None
    """Data folder whose rows were counted; None: the numbers are the published ones."""
    whole: bool
    """Whether nothing was named."""


def list_tasks(
    names: Sequence[str] = (),
    *,
    include_path: Sequence[str | os.PathLike[str]] = (),
    data_dir: str | os.PathLike[str] | None = None,
) -> TaskList:
    """List this project's tasks and groups, and those of further folders.

    Args:
        names: Names or patterns (``act_mmlu_*``); a group stands for itself and all below it.
            Nothing: everything.
        include_path: Folders of further task files.
        data_dir: Data folder whose rows are counted; the environment's by default.

    Raises:
        TaskError: A name is unknown, or a folder is none.
    """
    manager = known_tasks(include_path)
    wanted = _wanted(names, manager)
    folder = data_dir or os.environ.get(DATA_DIRECTORY_VARIABLE) or None
    with data_directory(folder):
        counter = _Counter(manager, Path(folder).expanduser() if folder else None)
        index = manager.task_index
        found = {name: counter.entry(name) for name in wanted if not members_of(index[name])}
    groups = tuple(
        GroupEntry(
            name,
            tuple(found[leaf] for leaf in leaf_tasks(TaskSelection(manager, (name,)))),
            tuple(members_of(index[name])),
        )
        for name in wanted
        if members_of(index[name])
    )
    return TaskList(groups, tuple(found.values()), counter.folder, whole=not names)


def _wanted(names: Sequence[str], manager: TaskManager) -> list[str]:
    """Return groups and tasks of names, groups with all that is below them, sorted."""
    known = manager.task_index
    if not names:
        return sorted(known)
    wanted: set[str] = set()
    waiting: list[str] = []
    for name in names:
        matched = [name] if name in known else manager.match_tasks([name])
        if not matched:
            hint = suggestion(name, known) or "; without a name all are listed"
            raise TaskError(
                f"unknown task {name!r}{hint} (lm-eval's own: act-harness run ls tasks; those of a "
                "folder: --include-path FOLDER)"
            )
        waiting += matched
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            leaf_tasks(TaskSelection(manager, (name,)))  # says so where a member is unknown
            wanted.add(name)
            waiting += members_of(known[name])
    return sorted(wanted)


class _Counter:
    """Reads entries, and counts each dataset's rows once."""

    def __init__(self, manager: TaskManager, folder: Path | None) -> None:
        self.folder = folder
        self._manager = manager
        self._counts: dict[tuple[str, str | None, str], int | None] = {}

    @cached_property
    def _published(self) -> PublishedSizes:
        return PublishedSizes(**reading.read_json(paths.tasks_path() / _PUBLISHED))

    def entry(self, name: str) -> TaskEntry:
        """Return what is known of a task."""
        settings = self._manager.task_index[name].cfg or {}
        path, configuration = str(settings.get("dataset_path") or ""), settings.get("dataset_name")
        split = str(settings.get("test_split") or settings.get("validation_split") or "")
        built = settings.get("custom_dataset")
        if built:
            # lm-eval's index has a function as the path of its file with the name for an ending
            path = Path(str(getattr(built, "__name__", built))).name
            count: int | None = self._loaded(name)
        else:
            key = (path, configuration, split)
            if key not in self._counts:
                self._counts[key] = self._count(name, *key)
            count = self._counts[key]
        source = f"built by {path}" if built else label(path, configuration)
        return TaskEntry(
            name=name,
            documents=count,
            split=split,
            scored=_SCORED.get(str(settings.get("output_type")), "-"),
            source=source,
            dataset=path,
            checked=bool(built or self.folder) or source not in self._published.unchecked,
        )

    def _count(self, name: str, path: str, configuration: str | None, split: str) -> int | None:
        if self.folder is None:
            return self._published.rows.get(label(path, configuration), {}).get(split)
        return self._loaded(name) if path and (self.folder / path).is_dir() else None

    def _loaded(self, name: str) -> int | None:
        """Return how many documents lm-eval would score; None where the rows are not there."""
        try:
            (task,) = load_tasks(TaskSelection(self._manager, (name,)))
        except ActHarnessError:
            return None
        return len(task.eval_docs)
