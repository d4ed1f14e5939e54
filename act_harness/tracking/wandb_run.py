"""Tracking runs with Weights & Biases, or not at all.

A command saves its results first, then opens a tracker and logs. Without settings it gets the
:class:`NullTracker`, so no command asks whether tracking is on. With them, every arm is one run in
a common group, with the job types baseline, act, search, judge and regress; the run's id is kept
beside the results, so that a resumed command continues its run. ``WANDB_MODE=offline`` loses
nothing: everything is in the run file, to be uploaded later by ``wandb sync``.

When W&B fails (no network, wrong key), a strict tracker raises one line, which makes the command's
exit code 3; otherwise one warning is logged and the command goes on without it.

Not here: what the values are called (:mod:`act_harness.tracking.values`). The only module that
imports wandb, and only when a run is opened.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from act_harness.errors import InfrastructureError, InputError, ResultError, install_command
from act_harness.support import reading
from act_harness.support.atomic import canonical_json, plain, write_json
from act_harness.support.places import sole_writer
from act_harness.support.provenance import sha256_text
from act_harness.tracking.tracker import Files, JobType, NullTracker, Tracker, TrackingSettings
from act_harness.tracking.values import uniform

__all__ = [
    "JobType",
    "NullTracker",
    "Tracker",
    "TrackingSettings",
    "WandbTracker",
    "active_run",
    "identity_hash",
    "one_line",
    "open_tracker",
    "optional_module",
]

RUN_IDS = "wandb_runs.json"
"""File beside the results: which run belongs to which arm."""

_LOG = logging.getLogger(__name__)


def open_tracker(
    settings: TrackingSettings | None,
    *,
    job_type: JobType,
    name: str,
    config: Mapping[str, Any],
    folder: str | os.PathLike[str],
    identity: Mapping[str, Any] | None = None,
    rank: int = 0,
) -> Tracker:
    """Open a run, or the null tracker where there are no settings or this is not the first rank.

    ``WANDB_MODE=disabled`` gives the null tracker too.

    Args:
        settings: Where to track; None: nowhere.
        job_type: What the run does.
        name: Its name; with project and job type it decides which run is continued.
        config: See :func:`act_harness.tracking.values.run_config`.
        folder: The results' folder: run ids and W&B's own files are kept there.
        identity: What makes two commands the same one beside the name, so that the second
            continues the first's run: tasks, settings, the artifact's hash. None: nothing.
        rank: This process's rank.

    Raises:
        InputError: wandb is not installed.
        InfrastructureError: W&B cannot be reached or refuses the key (strict only).
    """
    mode = (settings.mode if settings else None) or os.environ.get("WANDB_MODE")
    if settings is None or rank != 0 or mode == "disabled":
        return NullTracker()
    wandb = _wandb()
    place = Path(folder)
    run_id = _run_id(place, settings, job_type, name, identity)
    known = type(wandb.Settings()).model_fields
    options: dict[str, Any] = {
        "init_timeout": settings.start_timeout,
        "finish_timeout": settings.finish_timeout,
        "finish_timeout_raises": True,
        "console": "off",  # the command's own output is its own business
        "disable_code": True,
        "silent": True,
        "reinit": "create_new",  # both arms may be open, and a caller's own run stays his
    }
    options = {key: value for key, value in options.items() if key in known}
    tracker = WandbTracker(None, settings=settings, where=str(place))
    tracker.start(
        lambda: wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            job_type=job_type,
            name=name,
            tags=list(settings.tags) or None,
            config=plain(config),
            dir=str(place),
            id=run_id,
            resume="allow",
            mode=settings.mode,
            settings=wandb.Settings(**options),
        )
    )
    return tracker


def active_run(settings: TrackingSettings | None = None) -> Tracker:
    """Return a tracker on the run that is open already, as under ``lm_eval --wandb_args``.

    The run stays its owner's: closing the tracker does not close it. Without such a run, the null
    tracker; nothing is imported to find out.
    """
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if run is None:
        return NullTracker()
    return WandbTracker(run, settings=settings or TrackingSettings(strict=False), owned=False)


class WandbTracker(Tracker):
    """A W&B run. Use :func:`open_tracker` or :func:`active_run`."""

    def __init__(
        self,
        run: Any,  # noqa: ANN401 - a wandb.Run, whose package need not be installed
        *,
        settings: TrackingSettings,
        where: str = "",
        owned: bool = True,
    ) -> None:
        self._run = run
        self._settings = settings
        self._where = where
        self._owned = owned

    @property
    def run_id(self) -> str | None:
        """Id of the run, None where W&B failed."""
        return None if self._run is None else str(self._run.id)

    @property
    def url(self) -> str | None:
        """Address of the run; None offline."""
        return getattr(self._run, "url", None) or None

    def describe(self) -> str:
        """Return where the run is, as a line for people; empty where W&B failed."""
        if self._run is None:
            return ""
        if self._run.offline:
            folder = Path(str(self._run.dir)).parent
            return f"W&B run {self._run.name}, offline; upload it with: wandb sync {folder}"
        return f"W&B run {self._run.name}: {self.url or self.run_id}"

    def start(self, start: Callable[[], Any]) -> None:
        """Open the run by calling ``start``.

        Raises:
            InfrastructureError: W&B cannot be reached or refuses the key (strict only).
        """
        self._run = self._guarded("opening a run", start)

    def configure(self, values: Mapping[str, object]) -> None:
        """Add to the run's configuration."""
        self._act(
            "writing the configuration",
            lambda: self._run.config.update(plain(values), allow_val_change=True),
        )

    def scalars(self, values: Mapping[str, object]) -> None:
        """Log numbers as one step; texts and missing numbers go to the run's summary."""
        given = {key: plain(value) for key, value in values.items()}
        numbers = {key: value for key, value in given.items() if _is_number(value)}
        others = {key: value for key, value in given.items() if not _is_number(value)}

        def log() -> None:
            if numbers:
                self._log(numbers)
            if others:
                self._run.summary.update(others)

        self._act("logging scalars", log)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Log a table; columns of mixed types become text."""
        data = uniform([list(map(plain, row)) for row in rows])

        def log() -> None:
            self._log({name: _wandb().Table(columns=list(columns), data=data)})

        self._act(f"logging table {name}", log)

    def image(self, name: str, path: str | os.PathLike[str], *, caption: str = "") -> None:
        """Log an image file."""

        def log() -> None:
            self._log({name: _wandb().Image(str(path), caption=caption or None)})

        self._act(f"logging image {name}", log)

    def artifact(
        self,
        name: str,
        files: Files,
        *,
        kind: str,
        used: bool,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Record files as an artifact that this run used (True) or made (False).

        Equal files under an equal name are one version on W&B, so what a search made and an
        evaluation used is joined in the lineage graph without either knowing of the other.
        """

        def log() -> None:
            made = _wandb().Artifact(
                re.sub(r"[^\w.-]+", "-", name), type=kind, metadata=plain(metadata or {})
            )
            named = files if isinstance(files, Mapping) else {Path(f).name: f for f in files}
            for own_name, file in named.items():
                made.add_file(str(file), name=own_name)
            if not used:
                self._run.log_artifact(made)
            elif self._run.offline:
                # use_artifact refuses offline; what it does online with a local artifact is this,
                # and the run file takes it, so that the lineage is there after wandb sync.
                self._run._log_artifact(made, is_user_created=True, use_after_commit=True)
            else:
                self._run.use_artifact(made)

        self._act(f"logging artifact {name}", log)

    def finish(self, *, failed: bool = False) -> None:
        """Close the run, waiting for the upload; a run that is not ours stays open."""
        run = self._run
        if run is not None and self._owned:
            self._run = None
            self._guarded("closing the run", lambda: run.finish(exit_code=1 if failed else 0))

    def __enter__(self) -> WandbTracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
            return
        try:
            self.finish(failed=True)
        except InfrastructureError as late:
            _LOG.warning("%s", late)  # the first error is the one to report

    def _log(self, values: dict[str, Any]) -> None:
        # In another owner's run no step may be used up: he may count steps himself, and W&B drops
        # what comes with a step that has passed.
        if self._owned:
            self._run.log(values)
        else:
            self._run.log(values, commit=False)

    def _act(self, what: str, action: Callable[[], None]) -> None:
        if self._run is not None:
            self._guarded(what, action)

    def _guarded(self, what: str, action: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Run an action; on failure raise one line (strict) or warn once and stop tracking."""
        try:
            return action()
        except Exception as error:
            if not _is_service_failure(error):
                raise
            self._run = None
            saved = f"; the results are saved in {self._where}" if self._where else ""
            message = (
                f"W&B: {what} failed ({one_line(error)}){saved}; check WANDB_API_KEY and the "
                "network, or set WANDB_MODE=offline and run 'wandb sync' later"
            )
            if self._settings.strict:
                raise InfrastructureError(f"{message}, or pass --no-wandb-strict") from error
            _LOG.warning("%s; going on without W&B", message)
            return None


def optional_module(name: str, purpose: str) -> Any:  # noqa: ANN401 - a module
    """Import a module of the extra ``wandb``.

    Raises:
        InputError: It is not installed; the text has the line that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise InputError(
            f"{purpose} needs {package}, which is not installed; run: {install_command('wandb')}"
        ) from error


def one_line(error: BaseException) -> str:
    """Return an error's kind and text as one short line, without the key."""
    text = " ".join(str(error).split())[:300]
    key = os.environ.get("WANDB_API_KEY", "")
    if len(key) > 4:
        text = text.replace(key, "***")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _wandb() -> Any:  # noqa: ANN401 - the module
    return optional_module("wandb", "tracking with W&B")


def _is_service_failure(error: Exception) -> bool:
    # W&B's own errors have no common base (those of its background process are apart), and its
    # network and file errors come through as they are. Anything else is a bug of the caller.
    return type(error).__module__.partition(".")[0] == "wandb" or isinstance(error, OSError)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return twelve characters that stand for what makes two commands the same one."""
    return sha256_text(canonical_json(plain(identity)))[:12]


def _run_id(
    folder: Path,
    settings: TrackingSettings,
    job_type: str,
    name: str,
    identity: Mapping[str, Any] | None,
) -> str:
    """Return the id of this arm's run: the one kept in the folder, or a new one, kept there."""
    path = folder / RUN_IDS
    refusal = f"{path}: another process has been writing it for a minute; end that one first"
    parts = [settings.entity or "", settings.project, job_type, name]
    key = "/".join([*parts, *([identity_hash(identity)] if identity else [])])
    with sole_writer(folder / f".{RUN_IDS}.lock", refusal, wait=60.0):
        known = _known_runs(path)
        if key not in known:
            known[key] = secrets.token_hex(4)
            write_json(path, known, canonical=True)
    return known[key]


def _known_runs(path: Path) -> dict[str, str]:
    """Return the ids of a folder's runs by what they are of."""
    if not path.exists():
        return {}
    advice = "delete it to start new runs"
    known = reading.read_json(path, advice=advice)
    if not isinstance(known, dict) or not all(isinstance(one, str) for one in known.values()):
        raise ResultError(f"{path}: not a list of W&B runs; {advice}")
    return known


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
