"""What a command may log, and the tracker that logs nothing.

A command talks to a :class:`Tracker`; without settings it gets the :class:`NullTracker`, so none of
them asks whether tracking is on. Not here: any tracking service
(:mod:`act_harness.tracking.wandb_run`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import Literal

from act_harness.errors import InputError, install_command

__all__ = [
    "RUN_FILE",
    "Files",
    "JobType",
    "NullTracker",
    "Tracker",
    "TrackingSettings",
    "check_installed",
]

JobType = Literal["baseline", "act", "search", "methods", "judge", "regress"]

RUN_FILE = "wandb_run.json"
"""File in an arm's result folder: the address of its run, where it has one."""

Files = Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]
"""Files of an artifact, under their own names or (a mapping) under the names given."""


@dataclass(frozen=True)
class TrackingSettings:
    """Where and how runs are tracked."""

    project: str = "act-harness"
    entity: str | None = None
    """Owner of the project; None: the key's own."""
    group: str | None = None
    """Common name of the runs of one command."""
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] | None = None
    """None: what ``WANDB_MODE`` says."""
    strict: bool = True
    """Whether a failure of W&B is an error."""
    start_timeout: float = 60.0
    """Seconds to wait for W&B when a run is opened."""
    finish_timeout: float = 300.0
    """Seconds to wait for the upload when it is closed."""
    max_samples: int = 500
    """Rows of a samples table, per task; 0: no text of any sample leaves the machine."""


class Tracker:
    """What a command may log; by itself nothing is logged.

    Use as a context manager; an exception marks the run as failed.
    """

    @property
    def run_id(self) -> str | None:
        """Id of the run, None where nothing is tracked."""
        return None

    @property
    def url(self) -> str | None:
        """Address of the run, None where it has none (yet)."""
        return None

    def describe(self) -> str:
        """Return where the run is, as a line for people; empty where nothing is tracked."""
        return ""

    def configure(self, values: Mapping[str, object]) -> None:
        """Add to the run's configuration."""

    def scalars(self, values: Mapping[str, object]) -> None:
        """Log numbers; texts and missing numbers go to the run's summary."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Log a table; columns of mixed types become text."""

    def image(self, name: str, path: str | os.PathLike[str], *, caption: str = "") -> None:
        """Log an image file."""

    def artifact(
        self,
        name: str,
        files: Files,
        *,
        kind: str,
        used: bool,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Record files as an artifact that this run used (True) or made (False)."""

    def finish(self, *, failed: bool = False) -> None:
        """Close the run."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


class NullTracker(Tracker):
    """Tracks nothing; stands in where no tracking is wanted, and on all ranks but the first."""


def check_installed() -> None:
    """Find out before any work is done that tracking could not be opened after it.

    Raises:
        InputError: wandb is not installed; the text has the line that installs it.
    """
    found = find_spec("wandb")
    # Without an origin it is a bare folder, such as the one wandb keeps its run files in.
    if found is None or found.origin is None:
        raise InputError(
            "tracking with W&B needs wandb, which is not installed; "
            f"run: {install_command('wandb')}"
        )
