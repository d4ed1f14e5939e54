"""lm-eval's own command line, with our model and tasks made known first: ``act-harness run``.

Nothing has to be found by a hook here, so this works where plain ``lm_eval`` does not: with
torch's extension autoload switched off, with an lm-eval that lives in another place, or from a
bare checkout. Two things differ from plain ``lm_eval`` for the better: the results folder is named
after the arm (lm-eval names it after the checkpoint alone, so that a baseline and a calibrated
run of one model land on top of each other), and a misspelt task or model gets a suggestion.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness import plugin
from act_harness.errors import ActHarnessError, InputError, TaskError, suggestion
from act_harness.support import places, reading
from act_harness.support.checks import check_limit
from act_harness.support.paths import task_route, tasks_path

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["arm_name", "run_lm_eval"]

_NO_TASKS = "Tasks not found: "
_NO_MODEL = "Attempted to load model "


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-eval as ``lm_eval <arguments>`` would, in this process.

    Args:
        arguments: What would follow ``lm_eval`` on its command line, subcommand included or not.

    Raises:
        TaskError: A task name is unknown.
        InputError: The model name is unknown, an option cannot be used, or the configuration file
            cannot be read.
        ActHarnessError: Whatever the model or a task of ours raises.
    """
    plugin.register()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    from act_harness.support.failures import explained

    setup_logging()
    with _command_line(arguments):
        harness = HarnessCLI()
        namespace = harness.parse_args()
    config = _config_file(namespace)
    _check_run(namespace, config)
    _add_tasks(namespace, config)
    _name_output(namespace, config)
    try:
        harness.execute(namespace)
    except ActHarnessError:
        raise
    except Exception as error:
        include_path = getattr(namespace, "include_path", None)
        known = _explained(error, include_path=include_path) or explained(error)
        if known is None:
            raise
        raise known from error


def arm_name(model_args: Mapping[str, Any]) -> str:
    """Return the folder name of an arm: ``baseline``, the artifact's own name, or ``act``.

    ``act`` stands for "the one shipped artifact that fits", which is not known before the model.

    Args:
        model_args: The model's arguments as lm-eval has parsed them.

    Raises:
        ArtifactError: The artifact is unknown or malformed.
    """
    reference = model_args.get("artifact", "")
    if reference is None or str(reference).lower() == "none":
        return "baseline"
    if not str(reference):
        return "act"
    from act_harness.artifact import load_artifact

    return places.file_name(load_artifact(str(reference)).name)


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Let ``sys.argv`` be lm-eval's: its parser reads and completes that list itself."""
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _config_file(namespace: Namespace) -> dict[str, Any]:
    """Return the content of lm-eval's ``--config`` file, whose values its options override."""
    path = getattr(namespace, "config", None)
    if not path:
        return {}
    content = reading.read_yaml(path, error=InputError, advice="check --config")
    if not isinstance(content, dict):
        raise InputError(f"--config {path} holds {type(content).__name__}, expected a mapping")
    return content


def _check_run(namespace: Namespace, config: Mapping[str, Any]) -> None:
    """Refuse what lm-eval would load a model for, only to fail or to score nothing."""
    if not hasattr(namespace, "model_args"):  # ls, validate
        return
    if not (namespace.tasks or config.get("tasks")):
        raise TaskError("no task was named; give --tasks, `act-harness run ls tasks` lists them")
    limit = config.get("limit") if namespace.limit is None else namespace.limit
    if limit is None or isinstance(limit, (int, float)):
        check_limit(limit)


def _add_tasks(namespace: Namespace, config: Mapping[str, Any]) -> None:
    """Add our task folder to ``--include_path`` where lm-eval would not find it by itself."""
    if not hasattr(namespace, "include_path") or task_route().found:
        return
    given = namespace.include_path or config.get("include_path") or []
    others = [given] if isinstance(given, str) else list(given)
    namespace.include_path = [*others, str(tasks_path())]


def _name_output(namespace: Namespace, config: Mapping[str, Any]) -> None:
    """Put the arm's name at the end of ``--output_path``, if that is a folder."""
    model = getattr(namespace, "model", None) or config.get("model")
    output = getattr(namespace, "output_path", None) or config.get("output_path")
    if not output:
        return
    # lm-eval looks at it after all is scored, and loses the scores with a warning.
    is_file = Path(output).suffix == ".json"
    places.prepare_folder(Path(output).parent if is_file else output)
    if model != plugin.MODEL_NAME or is_file:
        return
    model_args = config.get("model_args") or {}
    if isinstance(model_args, str):
        model_args = dict(part.partition("=")[::2] for part in model_args.split(","))
    model_args = {**model_args, **(namespace.model_args or {})}
    namespace.output_path = str(Path(output) / arm_name(model_args))


def _explained(error: Exception, *, include_path: Any) -> ActHarnessError | None:  # noqa: ANN401
    """Turn lm-eval's complaint about an unknown name into ours, with a suggestion."""
    text = str(error)
    if text.startswith(_NO_TASKS):
        from lm_eval.tasks import TaskManager

        names = text.removeprefix(_NO_TASKS).split(", ")
        known = TaskManager(include_path=include_path).all_tasks
        found = ", ".join(f"{name!r}{suggestion(name, known)}" for name in names)
        end = " " if found.endswith("?") else "; "
        return TaskError(f"unknown task {found}{end}`act-harness run ls tasks` lists all of them")
    if text.startswith(_NO_MODEL):
        from lm_eval.models import MODEL_MAPPING

        name = text.removeprefix(_NO_MODEL).split("'")[1]
        hint = suggestion(name, [plugin.MODEL_NAME, *MODEL_MAPPING])
        return InputError(f"unknown model {name!r}{hint or f'; ours is {plugin.MODEL_NAME!r}'}")
    return None
