"""From what a user wrote behind ``--tasks`` to tasks of lm-eval: the one door for every command.

What lm-eval's own command line takes is taken here: names of tasks, groups and tags, patterns
(``act_demo_*``), YAML files, patterns of YAML files and folders of them, and further folders to
look names up in (``--include_path``). What a file defines is known by its name from here on, so
that results, recipes and ledgers never hold a path of somebody's machine.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from datasets.exceptions import DatasetGenerationError

from act_harness.errors import (
    ActHarnessError,
    InfrastructureError,
    TaskError,
    nearest,
    one_line,
)
from act_harness.harness.data_folder import first_line
from act_harness.support import paths, reading

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

__all__ = [
    "TaskSelection",
    "find_tasks",
    "known_tasks",
    "leaf_tasks",
    "load_tasks",
    "members_of",
    "single_tasks",
]

_logger = logging.getLogger(__name__)

_SUFFIXES = (".yaml", ".yml")
# What lm-eval raises on a YAML file that is no task, and on a task whose settings do not hold.
_OF_DATA = ("datasets", "huggingface_hub", "fsspec")
_NO_TASK = (KeyError, TypeError, AttributeError, ImportError, SyntaxError, AssertionError)
_UNREADABLE = (OSError, ValueError, yaml.YAMLError, RecursionError, *_NO_TASK)


class TaskSelection(NamedTuple):
    """Tasks that were asked for and are known."""

    manager: TaskManager
    names: tuple[str, ...]
    """Tasks, groups and tags that ``manager`` knows, each once, in the order given."""


def find_tasks(
    tasks: Sequence[str],
    *,
    include_path: Sequence[str | os.PathLike[str]] = (),
    metadata: Mapping[str, Any] | None = None,
) -> TaskSelection:
    """Look tasks up, without loading any of them or their data.

    Args:
        tasks: Names, patterns of names, YAML files, patterns of YAML files, or folders of them.
        include_path: Folders whose YAML files define further tasks; a name that lm-eval has too is
            theirs.
        metadata: What lm-eval hands to every task as its ``metadata``.

    Raises:
        TaskError: Nothing was named, a name is unknown (with the nearest known one), a folder is
            missing, or a YAML file defines no task.
    """
    if not tasks:
        raise TaskError(
            "no task was named; give --tasks, `act-harness tasks` lists ours, `act-harness run ls "
            "tasks` all"
        )
    manager = _manager(include_path, metadata, tasks)
    names: list[str] = []
    for task in tasks:
        names += _names_of(task, manager, include_path)
    return TaskSelection(manager, tuple(dict.fromkeys(names)))


def _manager(
    include_path: Sequence[str | os.PathLike[str]],
    metadata: Mapping[str, Any] | None,
    tasks: Sequence[str],
) -> TaskManager:
    """Return a manager that knows the tasks.

    Ours alone where that is enough: lm-eval takes seconds to read its own fourteen thousand.
    """
    from lm_eval.tasks import TaskManager  # seconds to import
    from lm_eval.tasks._index import Kind

    _check_folders(include_path)
    # Naming our folder where lm-eval finds it by itself makes it warn about every file.
    ours = [] if paths.task_route().found else [paths.tasks_path()]
    folders = [Path(folder) for folder in include_path]
    own = dict(metadata) if metadata else None
    if not any(glob.has_magic(task) or task.endswith(_SUFFIXES) for task in tasks):
        few = known_tasks(include_path, metadata=own)
        kinds = {name: entry.kind for name, entry in few.task_index.items()}
        if all(kinds.get(task) in (Kind.TASK, Kind.PY_TASK) for task in tasks):
            return few
    return TaskManager(include_path=[*ours, *folders] or None, metadata=own)


def known_tasks(
    include_path: Sequence[str | os.PathLike[str]] = (), *, metadata: dict[str, Any] | None = None
) -> TaskManager:
    """Return a manager of this project's tasks and those of further folders, without lm-eval's.

    Raises:
        TaskError: One of ``include_path`` is no folder.
    """
    from lm_eval.tasks import TaskManager

    _check_folders(include_path)
    folders = [paths.tasks_path(), *(Path(folder) for folder in include_path)]
    return TaskManager(include_path=folders, include_defaults=False, metadata=metadata)


def _check_folders(include_path: Sequence[str | os.PathLike[str]]) -> None:
    for folder in include_path:
        if not reading.is_folder(folder):
            raise TaskError(
                f"--include_path {folder}: no such folder; name the one that holds the YAML files "
                f"of your tasks{reading.nearest_beside(folder)}"
            )


def _names_of(
    task: str, manager: TaskManager, include_path: Sequence[str | os.PathLike[str]]
) -> list[str]:
    if task in manager.task_index:
        return [task]
    if task.endswith(_SUFFIXES):
        return [_register(Path(file), manager) for file in _files(task)]
    if reading.is_folder(task):
        return _of_folder(Path(task), manager)
    found: list[str] = manager.match_tasks([task])
    if not found:
        raise _unknown(task, manager, include_path)
    return found


def _files(pattern: str) -> list[str]:
    found = sorted(glob.glob(os.path.expanduser(pattern)))  # noqa: PTH111, PTH207 - user's pattern
    if not found:
        hint = reading.nearest_beside(pattern, "*.yaml", "*.yml")
        end = hint or "; check the path, or give the name of a task"
        raise TaskError(f"no task file {pattern}{end}")
    return found


def _of_folder(folder: Path, manager: TaskManager) -> list[str]:
    """Register what the YAML files of a folder define; files others include define nothing."""
    names = []
    for file in sorted(folder.glob("*.yaml")):
        if {"task", "group"} & _read(file).keys():
            names.append(_register(file, manager))
    if not names:
        raise TaskError(
            f"folder {folder} holds no YAML file that defines a task; name a task, a YAML file or "
            "another folder"
        )
    return names


def _read(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml  # what lm-eval's own command line reads with

    try:
        return dict(load_yaml(file, resolve_func=False))
    except _UNREADABLE as error:
        raise TaskError(
            f"task file {file} cannot be read: {first_line(error)}; expected YAML as lm-eval takes "
            "it"
        ) from None


def _register(file: Path, manager: TaskManager) -> str:
    """Make what a YAML file defines known by its name, which is returned."""
    from lm_eval.tasks._index import TaskIndex

    settings = _read(file)
    name = settings.get("group") or settings.get("task")
    if not isinstance(name, str) or not name:
        raise TaskError(
            f"task file {file} defines no task: it has neither 'task: NAME' nor 'group: NAME'"
        )
    index: dict[str, Entry] = manager.task_index
    before = index.pop(name, None)
    if before is not None and before.yaml_path is not None and before.yaml_path != file:
        _logger.warning("task %s of %s takes the place of lm-eval's own", name, file)
    try:
        TaskIndex.process_cfg(settings, file.resolve(), index)
    except _UNREADABLE as error:
        raise TaskError(f"task file {file} defines no task: {first_line(error)}") from None
    return name


def _unknown(
    task: str, manager: TaskManager, include_path: Sequence[str | os.PathLike[str]]
) -> TaskError:
    """Say that a name is unknown; name a file that may define it and cannot be read."""
    for folder in include_path:
        for file in sorted(Path(folder).rglob("*.yaml")):
            try:
                _read(file)
            except TaskError as error:  # lm-eval skips such a file without a word
                return TaskError(f"unknown task {task!r}, and {error}")
    files = {file.stem: str(file) for file in sorted(Path().glob("*.yaml"))}
    near = nearest(task, [*files, *manager.all_tasks])
    meant = f"the file {files[near]!r}" if near in files else repr(near)
    end = "; " if near is None else f"; did you mean {meant}? "
    return TaskError(
        f"unknown task {task!r}{end}`act-harness run ls tasks` lists all of them; own ones need "
        "--include_path FOLDER or the path of their YAML file"
    )


def leaf_tasks(selection: TaskSelection) -> list[str]:
    """Return the tasks that a selection stands for, through groups and tags, each once.

    Raises:
        TaskError: A group names a task that is unknown.
    """
    index = selection.manager.task_index
    leaves: dict[str, None] = {}
    waiting = list(reversed(selection.names))
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in index:
            raise _unknown(name, selection.manager, ())
        members = members_of(index[name])
        if members:
            waiting += reversed(members)
        else:
            leaves[name] = None
    return list(leaves)


def members_of(entry: Entry) -> list[str]:
    """Return what a group or tag names itself: tasks or groups; nothing for a task."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return []
    return _named_in((entry.cfg or {}).get("task"))


def _named_in(members: Any) -> list[str]:  # noqa: ANN401 - a YAML value
    """Return the tasks and groups that a group's ``task`` names, those of groups within it too."""
    names: list[str] = []
    for member in members if isinstance(members, list) else [members] if members else []:
        inner = member.get("task") if isinstance(member, dict) else None
        if isinstance(inner, list):  # a group that is defined in this place
            names += _named_in(inner)
        else:
            names.append(str(inner or member.get("group")) if isinstance(member, dict) else member)
    return list(dict.fromkeys(map(str, names)))


def load_tasks(selection: TaskSelection) -> list[Any]:
    """Build lm-eval's task and group objects, with their data.

    Returns:
        What ``simple_evaluate(tasks=...)`` and ``TaskManager.load`` take: one object for each
        name, for a tag one for each of its tasks.

    Raises:
        TaskError: A task's settings do not hold, or two names stand for the same task.
        InfrastructureError: The data of a task cannot be had.
    """
    built: list[Any] = []
    for name in selection.names:
        with _task_errors(name, selection):
            loaded = selection.manager.load([name])
        group = loaded.get("groups", {}).get(name)
        built += [group] if group is not None else loaded["tasks"].values()
    try:
        selection.manager.load(built)
    except ValueError as error:  # two groups share a task
        raise TaskError(f"--tasks: {first_line(error)}; leave one of them out") from None
    return built


def single_tasks(tasks: Sequence[Any]) -> list[Any]:
    """Return the tasks among lm-eval's task and group objects, and in the groups."""
    from lm_eval.api.group import Group

    return [
        task for one in tasks for task in (one.get_all_tasks() if isinstance(one, Group) else [one])
    ]


@contextmanager
def _task_errors(name: str, selection: TaskSelection) -> Iterator[None]:
    """Turn what lm-eval, datasets and a task's own code raise on building it into one line."""
    try:
        yield
    except ActHarnessError:
        raise
    except Exception as error:
        leaf_tasks(TaskSelection(selection.manager, (name,)))  # says so where a member is unknown
        place = _place(error)
        if isinstance(error, DatasetGenerationError) and not isinstance(error.__cause__, OSError):
            said = one_line(error.__cause__ or error)  # `datasets` itself says that it failed
            raise TaskError(
                f"the rows of task {name!r} cannot be read: {said.rstrip('.')}; check the files "
                "that it names: the same keys and kinds of values in every row and split"
            ) from error
        if isinstance(error, OSError) or any(part in place.modules for part in _OF_DATA):
            raise InfrastructureError(
                f"the data of task {name!r} cannot be had: {one_line(first_line(error), limit=300)}"
                "; give --data-dir, a folder filled by `act-harness fetch`, or check the task's "
                "data_files where they are your own"
            ) from error
        what = f"{type(error).__name__}: {one_line(first_line(error), limit=300)}"
        raise TaskError(
            f"task {name!r} cannot be built ({what}, {place.line}); check its YAML file"
        ) from error


class _Place(NamedTuple):
    """Where an error was raised."""

    modules: tuple[str, ...]
    """Packages on the way, each once."""
    line: str


def _place(error: BaseException) -> _Place:
    modules: dict[str, None] = {}
    line, frame = "", error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        modules[str(frame.tb_frame.f_globals.get("__name__", "")).partition(".")[0]] = None
        line = f"{Path(code.co_filename).name} line {frame.tb_lineno}"
        frame = frame.tb_next
    return _Place(tuple(modules), line)
