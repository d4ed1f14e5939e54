"""What keeps a run from being finished though no line of this package is wrong, as one line.

Memory, disk, GPU and network become an :class:`~act_harness.errors.InfrastructureError`; what
lm-eval and transformers refuse about the settings they were given becomes an
:class:`~act_harness.errors.InputError`; what a task's own code raises, a
:class:`~act_harness.errors.TaskError`. Everything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from jinja2 import TemplateError

from act_harness.errors import ActHarnessError, InfrastructureError, InputError, TaskError, one_line
from act_harness.support.launcher import launched, too_few_documents

__all__ = ["complaint_of_harness", "explained", "infrastructure", "running", "task_failure"]

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_NO_DOCUMENTS = "did not find any docs"
_NO_DEVICE = ("No CUDA GPUs", "Found no NVIDIA driver", "CUDA error", "not compiled with CUDA")
_HARNESS = (
    "lm_eval._cli",
    "lm_eval.api.samplers",
    "lm_eval.api.task",
    "lm_eval.config",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.models.utils",
    "lm_eval.models.utils_hf",
    "lm_eval.tasks",
    "lm_eval.utils",
    "transformers.generation",
)
"""Modules that use settings: what they raise of COMPLAINTS is about what a user gave."""
# Not lm_eval.api.metrics or the filters: what fails there is a task's code.


COMPLAINTS = (ValueError, TypeError, AssertionError, TemplateError)
"""What a setting of the wrong kind, a template or too many examples end in."""


@contextmanager
def infrastructure(what: str) -> Iterator[None]:
    """Turn what no change of code brings about into an :class:`InfrastructureError`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InfrastructureError(
            f"{what}: out of memory ({_first(error)}); free some, or use a smaller --batch-size"
        ) from error
    except OSError as error:
        raise InfrastructureError(f"{what}: {_first(error)}; check model, data, disk") from error
    except RuntimeError as error:
        text = str(error)
        if any(sign in text.lower() for sign in _NO_MEMORY):
            raise InfrastructureError(
                f"{what}: out of memory ({_first(error)}); use a smaller --batch-size"
            ) from error
        if any(sign in text for sign in _NO_DEVICE):
            raise InfrastructureError(f"{what}: {_first(error)}; check the GPU") from error
        raise


@contextmanager
def running(what: str) -> Iterator[None]:
    """Do :func:`infrastructure`, and :func:`explained` for what a user's settings and tasks raise.

    Args:
        what: What is running, for the message.
    """
    with infrastructure(what):
        try:
            yield
        except ActHarnessError:
            raise
        except Exception as error:
            known = explained(error)
            if known is None:
                raise
            raise known from error


def explained(error: Exception) -> InputError | None:
    """Return what settings or a task's code raised as one line; None: it is neither's."""
    return task_failure(error, own=True) or complaint_of_harness(error) or task_failure(error)


class _Step(NamedTuple):
    """A frame of a traceback."""

    module: str
    frame: FrameType
    line: int


def _steps(error: BaseException) -> list[_Step]:
    """Return the frames from the outermost to the one that raised."""
    steps = []
    place = error.__traceback__
    while place is not None:
        module = str(place.tb_frame.f_globals.get("__name__", ""))
        steps.append(_Step(module, place.tb_frame, place.tb_lineno))
        place = place.tb_next
    return steps


def task_failure(error: Exception, *, own: bool = False) -> TaskError | None:
    """Return what a task raised while it ran, with its name and document; None: it was no task.

    Args:
        error: As it was caught; of the task's, lm-eval's and our modules the one nearest to the
            error decides.
        own: Only what was raised in code that the task's files hold or call; else also what
            lm-eval's templates, filters and metrics make of the task.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return None
    steps = _steps(error)
    for number, step in reversed(list(enumerate(steps))):
        if step.module.partition(".")[0] in ("act_harness", "transformers"):
            return None
        if _is_task_code(step.module):
            return _failed(error, steps, step)
        if step.module.partition(".")[0] == "lm_eval":
            known = step.module.startswith(_RUNS_TASKS)
            if own or not known or isinstance(error, OSError):
                return None
            if step.module == "lm_eval.evaluator" and number + 1 < len(steps):
                return None  # of all that is no task's, the evaluator calls the model alone
            return _failed(error, steps, steps[min(number + 1, len(steps) - 1)])
    return None


_OF_TASK_MANAGER = ("_yaml_loader", "_factory", "_index", "manager")


_RUNS_TASKS = ("lm_eval.api.", "lm_eval.evaluator", "lm_eval.filters", "lm_eval.tasks.")
"""Modules that do what a task's files ask for: its templates, filters and metrics."""


def _is_task_code(module: str) -> bool:
    """Whether lm-eval has loaded a module for a task: it names it by its path, or in its tasks."""
    inside = module.removeprefix("lm_eval.tasks.")
    return Path(module).is_absolute() or (
        inside != module and inside.partition(".")[0] not in _OF_TASK_MANAGER
    )


def _failed(error: Exception, steps: list[_Step], place: _Step) -> TaskError | None:
    task, document = _task_and_document(steps)
    if not task:
        return None
    what = type(error).__name__
    if str(error).strip():
        what = f"{what}: {one_line(_first(error), limit=300)}"
    where = f"{Path(place.frame.f_code.co_filename).name} line {place.line}"
    return TaskError(
        f"task {task!r} failed{document} ({what}, {where}); check its code and its data, "
        "ACT_HARNESS_TRACEBACK=1 shows the way there"
    )


def _task_and_document(steps: list[_Step]) -> tuple[str, str]:
    """Find out from lm-eval's own variables which task and which document it was at."""
    task, document = "", ""
    for number, step in reversed(list(enumerate(steps))):
        if not step.module.startswith("lm_eval."):
            continue
        found = dict(step.frame.f_locals)  # from Python 3.13 on a proxy, whose keys are a list
        name = getattr(getattr(found.get("self"), "config", None), "task", None)
        task = task or name or found.get("task_name") or ""
        if document or not {"doc", "doc_id"} <= found.keys():
            continue
        # A loop that is over keeps its variables: only a document that was handed on counts.
        inner = (value for later in steps[number + 1 :] for value in later.frame.f_locals.values())
        if any(value is found["doc"] for value in inner):
            at = found["doc_id"]
            numbers = found.get("samples") if "indices" not in found else found["indices"]
            document = f" at document {numbers[at] if isinstance(numbers, list) else at}"
    return task, document


def complaint_of_harness(error: BaseException) -> InputError | None:
    """Return an error that lm-eval or transformers raised about a setting as ours; None: no such.

    Args:
        error: As it was caught; the module that raised it decides.
    """
    if not isinstance(error, COMPLAINTS):
        return None
    steps = _steps(error)
    for module in (
        step.module for step in reversed(steps)
    ):  # of theirs and ours, the one nearest to the error decides
        if module.partition(".")[0] == "act_harness":
            return None
        if any(module == name or module.startswith(f"{name}.") for name in _HARNESS):
            break
    else:
        return None
    whose = module.partition(".")[0].replace("_", "-")
    said = _first(error).rstrip(".")
    task, document = _task_and_document(steps)
    if document and module == "lm_eval.api.task" and not isinstance(error, TemplateError):
        return TaskError(
            f"task {task!r} failed{document} ({said}); check its label, its choices and its texts"
        )
    count = launched().count
    if _NO_DOCUMENTS in said and count > 1:  # the task has some: this process got none of them
        return too_few_documents(count)
    return InputError(f"{whose} refuses these settings: {said}; change them, or the task")


def _first(error: BaseException) -> str:
    return one_line(next(iter(str(error).strip().splitlines()), type(error).__name__))
