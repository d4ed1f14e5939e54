"""What can go wrong, as one tree; what every branch means for an exit code.

::

    ActHarnessError                      base of all; its text is one line that says what to do
    ├── InputError                       the user gave something that cannot be used      exit 2
    │   ├── CalibrationError             a calibration setting is out of range
    │   ├── ArtifactError                a head-set file is missing, malformed or does not fit
    │   ├── UnsupportedModelError        the adapter cannot calibrate this model
    │   ├── UnsupportedCallError         a call would break the calibration (beams, no cache, ...)
    │   ├── TaskError                    a task or its data cannot be used
    │   ├── RecipeError                  a search recipe or judge setting is wrong
    │   └── ResultError                  a result file is missing, malformed or does not match
    ├── InfrastructureError              no data, no memory, no server: never a score      exit 3
    └── InternalError                    a promise of this package was broken: a bug        exit 70

Exit code 1 is left to verdicts ("regressed"), so that a pipeline can tell a bad score from a
bad run.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ActHarnessError",
    "ArtifactError",
    "CalibrationError",
    "InfrastructureError",
    "InputError",
    "InternalError",
    "RecipeError",
    "ResultError",
    "TaskError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "install_command",
    "nearest",
    "one_line",
    "suggestion",
    "unknown_name",
]

_LONGEST_WORD = 120


class ActHarnessError(Exception):
    """Base of every error this package raises on purpose. Its text is a single line."""

    exit_code: ClassVar[int] = 1


class InputError(ActHarnessError):
    """The user gave something that cannot be used."""

    exit_code: ClassVar[int] = 2


class CalibrationError(InputError):
    """A calibration setting is unknown or out of range."""


class ArtifactError(InputError):
    """A head-set artifact is missing, malformed, or does not fit the model at hand."""


class UnsupportedModelError(InputError):
    """The adapter cannot calibrate this model; nothing was changed in it."""


class UnsupportedCallError(InputError):
    """A call that would silently break the calibration, refused before it starts."""


class TaskError(InputError):
    """A task is unknown, or its data cannot be used."""


class RecipeError(InputError):
    """A search recipe or judge setting is wrong."""


class ResultError(InputError):
    """A result file is missing, malformed, or does not match the other one."""


class InfrastructureError(ActHarnessError):
    """Something outside the numbers failed (no model, no data, no memory): never a score."""

    exit_code: ClassVar[int] = 3


class InternalError(ActHarnessError):
    """A promise this package makes about itself was broken. Please report it."""

    exit_code: ClassVar[int] = 70


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest of ``known``, or an empty string."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return what of ``known`` a misspelt name may mean; None where nothing is like it."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def unknown_name(shown: str, name: object, known: Iterable[str], *, listed: bool = True) -> str:
    """Return what to say of a name that nothing has: what there is, and what may be meant.

    Args:
        shown: The name as it was given, with what it should name: ``engine 'trion'``.
        name: The name itself.
        known: Names there are.
        listed: Whether to list them; where they are many, the nearest is enough.
    """
    names = list(known)
    expected = f", expected one of {', '.join(names)}" if listed else ""
    return f"{shown} is unknown{expected}{suggestion(str(name), names)}"


def one_line(error: BaseException | str, *, limit: int = 600) -> str:
    """Return what an error says as one line that fits a terminal.

    Args:
        error: An error, or its text.
        limit: Most characters; what was found may be a number of 5,000 digits.
    """
    words = [
        word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD // 2]}...{word[-20:]}"
        for word in str(error).split()
    ]
    text = " ".join(words) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


EXTRAS = {
    "wandb": ("wandb>=0.31", "wandb-workspaces>=0.4"),
    "mtbench": ("openai>=1.56", "tenacity>=8"),
    "report": ("matplotlib>=3.8",),
    "triton": ("triton>=3.2",),
    "demo": ("gguf>=0.17", "vadersentiment>=3.3.2"),
}
"""What the extras of pyproject.toml ask for."""


def install_command(extra: str) -> str:
    """Return the line that installs what an extra asks for, from a checkout and from a wheel.

    It names the packages: the name of this one is not on the package index, so pip cannot be asked
    for its extras.
    """
    return "pip install " + " ".join(f"'{requirement}'" for requirement in EXTRAS[extra])
