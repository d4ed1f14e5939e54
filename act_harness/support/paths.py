"""Where the files are that are data, not code: tasks, artifacts, recipes, baselines.

In a checkout (and so in an editable install) they lie in folders beside the package. A wheel
carries them elsewhere: the tasks inside lm-eval's own task folder, so that lm-eval finds them
(``lm_eval/tasks/act_harness``), the rest inside the package (``act_harness/_data``).
``hatch_build.py`` is the other half of this module and names the same folders.

It looks folders up; of the files it reads only the stubs of an editable install.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from act_harness.errors import InfrastructureError

__all__ = [
    "TaskRoute",
    "artifacts_path",
    "baselines_path",
    "is_checkout",
    "lm_eval_path",
    "recipes_path",
    "task_route",
    "tasks_path",
]

_PACKAGE = Path(__file__).resolve().parents[1]


class _Folder(NamedTuple):
    """One data folder, relative to the folder that holds the package."""

    what: str
    checkout: str
    wheel: str


_TASKS = _Folder("task files", "tasks", "lm_eval/tasks/act_harness")
_ARTIFACTS = _Folder("shipped artifacts", "search/artifacts", "act_harness/_data/artifacts")
_RECIPES = _Folder("search recipes", "search/recipes", "act_harness/_data/recipes")
_BASELINES = _Folder("baselines", "results/baselines", "act_harness/_data/baselines")


def tasks_path() -> Path:
    """Return the folder of the task YAML files, for ``lm_eval --include_path``.

    Raises:
        InfrastructureError: The installation has no such folder.
    """
    return _locate(_TASKS)


def artifacts_path() -> Path:
    """Return the folder of the artifacts that come with the package: ``<model>/<name>.json``.

    Raises:
        InfrastructureError: The installation has no such folder.
    """
    return _locate(_ARTIFACTS)


def recipes_path() -> Path:
    """Return the folder of the search recipes that come with the package.

    Raises:
        InfrastructureError: The installation has no such folder.
    """
    return _locate(_RECIPES)


def baselines_path() -> Path:
    """Return the folder of the baselines that runs are held against.

    Raises:
        InfrastructureError: The installation has no such folder.
    """
    return _locate(_BASELINES)


def is_checkout() -> bool:
    """Say whether the package is imported from its repository (editable install or plain)."""
    return (_PACKAGE.parent / "hatch_build.py").is_file()


def _locate(folder: _Folder) -> Path:
    found = _PACKAGE.parent / (folder.checkout if is_checkout() else folder.wheel)
    if not found.is_dir():
        advice = (
            "restore it from version control"
            if is_checkout()
            else "install the wheel again with `pip install --force-reinstall --no-deps`"
        )
        raise InfrastructureError(f"the {folder.what} of act-harness are not at {found}; {advice}")
    return found


def lm_eval_path() -> Path | None:
    """Return the folder of the installed lm-eval package without importing it, or ``None``.

    ``None`` too when ``lm_eval`` is only a bare folder: an lm-eval in editable mode can be hidden
    by the task files that were installed to ``lm_eval/tasks/act_harness``.
    """
    spec = find_spec("lm_eval")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


class TaskRoute(NamedTuple):
    """Whether plain lm-eval finds the tasks of this installation."""

    found: bool
    """All of them, by the name alone."""
    text: str
    """By which route; or what is missing and what to do."""


def task_route() -> TaskRoute:
    """Say whether lm-eval finds every task file without ``--include_path``, and how.

    Raises:
        InfrastructureError: The installation has no task files at all.
    """
    ours, harness = tasks_path(), lm_eval_path()
    advice = "use `act-harness run`, or lm_eval with --include_path $(act-harness tasks-path)"
    if harness is None:
        return TaskRoute(False, "lm-eval is not installed, or hidden by a folder of its name")
    theirs = harness / "tasks" / "act_harness"
    if theirs.resolve() == ours.resolve():
        return TaskRoute(True, f"data files inside lm-eval: {theirs}")
    names = [path.relative_to(ours) for path in sorted(ours.rglob("*.yaml"))]
    stubbed = [name for name in names if _stub_target(theirs / name) == (ours / name).resolve()]
    if len(stubbed) == len(names):
        return TaskRoute(True, f"{len(names)} stubs in {theirs}, which include {ours}")
    if not theirs.is_dir():
        return TaskRoute(False, f"{theirs} does not exist (lm-eval lives elsewhere); {advice}")
    if is_checkout():
        advice = f"run `pip install -e .` once more, or {advice}"
    lacking = len(names) - len(stubbed)
    return TaskRoute(
        False, f"{lacking} of {len(names)} task files have no stub in {theirs}; {advice}"
    )


def _stub_target(stub: Path) -> Path | None:
    """Return the file that a stub includes, or ``None`` if ``stub`` is not one."""
    if not stub.is_file():
        return None
    key, _, value = stub.read_text(encoding="utf-8").partition(":")
    try:
        return Path(json.loads(value)).resolve() if key == "include" else None
    except (ValueError, TypeError):
        return None
