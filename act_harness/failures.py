"""What keeps a run from being finished though no line of this package is wrong, as one line.

Memory, disk, GPU and network become an :class:`~act_harness.errors.InfrastructureError`; what
lm-eval and transformers refuse about the settings they were given becomes an
:class:`~act_harness.errors.InputError`. Everything else keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jinja2 import TemplateError

from act_harness.errors import InfrastructureError, InputError, one_line

__all__ = ["COMPLAINTS", "complaint_of_harness", "infrastructure", "running"]

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
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
    """Do :func:`infrastructure`, and turn the complaints of lm-eval into an :class:`InputError`."""
    with infrastructure(what):
        try:
            yield
        except (*COMPLAINTS,) as error:
            known = complaint_of_harness(error)
            if known is None:
                raise
            raise known from error


def complaint_of_harness(error: BaseException) -> InputError | None:
    """Return an error that lm-eval or transformers raised about a setting as ours; None: no such.

    Args:
        error: As it was caught; the module that raised it decides.
    """
    modules = []
    place = error.__traceback__
    while place is not None:
        modules.append(str(place.tb_frame.f_globals.get("__name__", "")))
        place = place.tb_next
    for module in reversed(modules):  # of theirs and ours, the one nearest to the error decides
        if module.partition(".")[0] == "act_harness":
            return None
        if any(module == name or module.startswith(f"{name}.") for name in _HARNESS):
            break
    else:
        return None
    whose = module.partition(".")[0].replace("_", "-")
    said = _first(error).rstrip(".")
    return InputError(f"{whose} refuses these settings: {said}; change them, or the task")


def _first(error: BaseException) -> str:
    return one_line(next(iter(str(error).strip().splitlines()), type(error).__name__))
