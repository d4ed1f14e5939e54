"""What an evaluation logs: one run per arm in one group, and an open run of lm-eval's own.

:func:`track_arms` takes result folders that are on the disk already, so a failure of the tracking
service loses nothing. :func:`log_to_open_run` adds what lm-eval's logger does not know of
(artifact, calibration, counters, heads) to the run that ``lm_eval --wandb_args`` opened; a failure
is a warning there, because lm-eval saves its results later than it logs.

Not here: the service (:mod:`act_harness.tracking.wandb_run`) and the names
(:mod:`act_harness.tracking.values`); a search and a judge log through modules of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from act_harness.errors import ActHarnessError, install_command
from act_harness.evidence.results import Run, load_run
from act_harness.support.atomic import write_json
from act_harness.support.reading import read_lines
from act_harness.tracking import values as tracked
from act_harness.tracking.tracker import RUN_FILE, JobType, Tracker, TrackingSettings
from act_harness.tracking.values import Table
from act_harness.tracking.wandb_run import active_run, identity_hash, open_tracker

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from act_harness.artifact import Artifact
    from act_harness.evidence.comparison import Comparison

__all__ = ["TrackedArms", "head_effects", "log_artifact", "log_to_open_run", "track_arms"]

HEADS_FILE = "heads.json"
"""Name of the file in the tracked artifact: the same from a search and from an evaluation, so that
equal head sets are one version."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedArms:
    """Both arms of an evaluation, as they lie on the disk."""

    model: str
    """Short name of the model."""
    folders: Mapping[str, Path]
    """Result folders by arm, ``baseline`` and ``act``; with several seeds ``seed-<n>`` in them."""
    seeds: tuple[int, ...]
    """Few-shot seeds."""
    output: Path
    """The command's output folder, where run ids and W&B's files are kept."""
    artifact: Artifact | None = None
    comparisons: Mapping[int, Comparison] = field(default_factory=dict)
    """Act against baseline, by seed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the command was asked for: decides, with the artifact, which runs are continued."""
    job_type: JobType = "act"
    """Of the arms other than the baseline; ``regress`` where they are held against a stored one."""

    def runs(self, arm: str) -> dict[int, Run]:
        """Read an arm's results, by seed."""
        place, several = self.folders[arm], len(self.seeds) > 1
        return {s: load_run(place / f"seed-{s}" if several else place) for s in self.seeds}


def track_arms(arms: TrackedArms, settings: TrackingSettings) -> list[str]:
    """Log the arms of an evaluation, one run each, in one group.

    Returns:
        Where the runs are, a line each.

    Raises:
        InfrastructureError: W&B cannot be reached or refuses the key (strict only).
        ResultError: the results cannot be read back.
    """
    identity = {
        **arms.settings,
        "seeds": arms.seeds,
        "artifact": arms.artifact.sha256() if arms.artifact else None,
    }
    group = settings.group or f"{arms.model}-{identity_hash(identity)}"
    shared = replace(settings, group=group)
    lines = []
    for arm in arms.folders:
        job: JobType = "baseline" if arm == "baseline" else arms.job_type
        own = arms.artifact.name if arms.artifact and arm != "baseline" else arm
        runs = arms.runs(arm)
        with open_tracker(
            shared,
            job_type=job,
            name=f"{arms.model}__{own}",
            config=_config(arms, arm, runs),
            folder=arms.output,
            identity={**identity, "group": group},
        ) as tracker:
            _log_scores(tracker, runs, settings.max_samples)
            if arm != "baseline":
                _log_calibration(tracker, arms, runs, arms.folders[arm])
            lines.append(tracker.describe())
            if tracker.url is not None:
                write_json(arms.folders[arm] / RUN_FILE, {"url": tracker.url})
        if not lines[-1]:  # the service failed, was said to have, and will fail again
            break
    return [line for line in lines if line]


def log_artifact(tracker: Tracker, artifact: Artifact, folder: Path, *, used: bool) -> None:
    """Log a head set: the file as an artifact that the run used or made, and its heads as a table.

    Args:
        tracker: An open run.
        artifact: The head set.
        folder: Where its file is written; it may be removed afterwards.
        used: Whether the run used (True) or made (False) it.

    Raises:
        InfrastructureError: the file cannot be written, or W&B failed (strict only).
    """
    document = artifact.document()
    heads = tracked.heads_table(document)
    tracker.table("heads", heads.columns, heads.rows)
    file = artifact.save(folder / HEADS_FILE)
    tracker.artifact(
        artifact.name,
        {HEADS_FILE: file},
        kind="head-set",
        used=used,
        metadata={
            "sha256": artifact.sha256(),
            "heads": artifact.head_count(),
            "model": artifact.model.id,
            "calibration": artifact.calibration.settings(),
        },
    )


def head_effects(artifact: Artifact) -> npt.NDArray[np.float64]:
    """Return the effect of each head alone as its search measured it, (layers, heads).

    NaN where a head was not measured, which is everywhere for a published list.
    """
    import numpy as np

    effects = np.full(
        (artifact.model.num_hidden_layers, artifact.model.num_attention_heads), np.nan
    )
    table = ((artifact.search or {}).get("table") or {}).get("heads") or {}
    for row in table.get("rows", ()):
        own = dict(zip(table["columns"], row, strict=True))
        layer, head, effect = own["layer"], own["head"], own["effect"]
        if effect is not None and not effects[layer, head] >= effect:  # several mass maps: the best
            effects[layer, head] = effect
    return effects


def log_to_open_run(info: Mapping[str, Any], artifact: Artifact | None) -> None:
    """Add artifact, calibration, counters and heads to the run that is open already, if one is.

    A failure is a warning: lm-eval has not saved its results yet.

    Args:
        info: What ``get_model_info`` stores under ``act_harness``.
        artifact: The head set in use; None: the baseline.
    """
    tracker = active_run()
    if tracker.run_id is None:
        return
    settings = {key: value for key, value in info.items() if key != "counters"}
    content = tracked.artifact_content(artifact.document()) if artifact else None
    tracker.configure({"act_harness": {**settings, "artifact_content": content}})
    tracker.scalars(tracked.counter_scalars(info["counters"]))
    if artifact is None:
        return
    try:
        with TemporaryDirectory(prefix="act-harness-") as folder:
            log_artifact(tracker, artifact, Path(folder), used=True)
            _log_map(tracker, artifact, Path(folder))
    except (ActHarnessError, OSError) as error:
        _LOG.warning("the heads were not logged to W&B: %s", error)


# -- parts of a run --------------------------------------------------------------------------------


def _config(arms: TrackedArms, arm: str, runs: Mapping[int, Run]) -> dict[str, Any]:
    first = next(iter(runs.values())).data
    info = first.get("config", {}).get("act_harness", {})
    artifact = arms.artifact if arm != "baseline" else None
    return tracked.run_config(
        arm=arm,
        model=info.get("model") or arms.model,
        artifact=artifact.document() if artifact else None,
        artifact_sha256=artifact.sha256() if artifact else None,
        engine=info.get("engine"),
        provenance=first.get("act_harness", {}).get("provenance"),
        scoring=info.get("scoring"),
        overlength=info.get("overlength"),
        task_versions=first.get("versions"),
        fewshot_seeds=arms.seeds,
        results=str(arms.folders[arm]),
        **arms.settings,
    )


def _log_scores(tracker: Tracker, runs: Mapping[int, Run], max_samples: int) -> None:
    tracker.scalars(
        tracked.over_seeds({s: tracked.result_scalars(r.data) for s, r in runs.items()})
    )
    _log_table(tracker, "scores", {s: tracked.results_table(r.data) for s, r in runs.items()})
    first = next(iter(runs.values()))
    for task in first.sample_files if max_samples else ():
        each = {
            seed: tracked.samples_table(
                _samples(run, task),
                max_rows=max(1, max_samples // len(runs)),
                max_bytes=(4 << 20) // len(runs),
            )
            for seed, run in runs.items()
        }
        table = _log_table(tracker, f"samples/{task}", each)
        if table.left_out:
            tracker.scalars({f"{task}/samples_left_out": table.left_out})


def _samples(run: Run, task: str) -> Iterable[Mapping[str, Any]]:
    return read_lines(run.sample_files[task], half_line="refuse")


def _log_table(tracker: Tracker, name: str, tables: Mapping[int, Table]) -> Table:
    joined = tracked.tables_over_seeds(tables)
    tracker.table(name, joined.columns, joined.rows)
    return joined


def _log_calibration(
    tracker: Tracker, arms: TrackedArms, runs: Mapping[int, Run], folder: Path
) -> None:
    """Log what the calibrated arm has beside its scores."""
    found = arms.comparisons
    if found:
        tracker.scalars(
            tracked.over_seeds({s: tracked.comparison_scalars(c) for s, c in found.items()})
        )
        _log_table(
            tracker, "comparison", {s: tracked.comparison_table(c) for s, c in found.items()}
        )
    infos = {seed: run.data["config"]["act_harness"] for seed, run in runs.items()}
    counters = {s: tracked.counter_scalars(info["counters"]) for s, info in infos.items()}
    tracker.scalars(tracked.over_seeds(counters))
    if arms.artifact is not None:
        log_artifact(tracker, arms.artifact, folder, used=True)
        _log_map(tracker, arms.artifact, folder)


def _log_map(tracker: Tracker, artifact: Artifact, folder: Path) -> None:
    """Draw and log the head map; without matplotlib (extra ``report``) only say so."""
    if find_spec("matplotlib") is None:
        command = install_command("report")
        _LOG.warning("no head map: matplotlib is not installed; run: %s", command)
        return
    from act_harness.evidence.head_plots import head_map

    searched: Sequence[Any] = (artifact.search or {}).get("table") or ()
    path = head_map(
        head_effects(artifact),
        folder / "head_map.png",
        selected=artifact.heads,
        title=f"{artifact.name}: {artifact.head_count()} heads",
        label="effect of the head alone, as searched" if searched else "effect (none is known)",
    )
    tracker.image("head_map", path, caption=f"{artifact.name}, {artifact.sha256()[:12]}")
