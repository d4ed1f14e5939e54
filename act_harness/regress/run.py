"""The two verbs: hold a run against the baseline, and make a new baseline.

Results are written first and tracked afterwards. A verdict outlives a failure of tracking: a
regressed run ends with 1 even if W&B cannot be reached, a passed one with 3 then.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from act_harness.errors import ActHarnessError, InfrastructureError, InputError
from act_harness.harness.data_folder import data_directory
from act_harness.regress import gates, goldens, outcome
from act_harness.regress.baseline import (
    FILE,
    Baseline,
    Spread,
    StoredMeasurement,
    load_baseline,
    save_baseline,
)
from act_harness.regress.measure import Session
from act_harness.regress.outcome import RegressOutcome
from act_harness.regress.suite import Suite, load_suite
from act_harness.support import places, provenance
from act_harness.support.checks import check_batch_size, check_count, check_kind
from act_harness.tracking.tracker import Tracker, TrackingSettings
from act_harness.tracking.values import comparison_scalars, comparison_table, run_config
from act_harness.tracking.wandb_run import open_tracker

__all__ = ["RegressSettings", "run_regress", "track_outcome", "update_baseline"]

_LOG = logging.getLogger(__name__)
_VERSIONS = ("torch", "transformers", "lm_eval", "device")


@dataclass(frozen=True)
class RegressSettings:
    """What ``act-harness regress`` was asked for."""

    suite: str
    """Name of a suite, or path of its folder or YAML file."""
    pretrained: str | None = None
    """The model's place; None: where the suite says."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; empty: all."""
    limit: int | None = None
    """Only the first so many documents of each task."""
    batch_size: str | None = None
    """None: the suite's."""
    data_dir: Path | None = None
    output: Path = Path("outputs/regress")
    baselines: Path | None = None
    """Folder of suites; None: the shipped one."""
    include_path: tuple[str | Path, ...] = ()
    """Folders of further task files."""
    tracking: TrackingSettings | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            InputError: A setting is out of range.
        """
        if isinstance(self.tasks, str):  # a name would be taken letter by letter
            object.__setattr__(self, "tasks", tuple(self.tasks.split(",")))
        object.__setattr__(self, "output", Path(self.output))
        check_count(self.limit, "--limit", least=1)
        check_batch_size(self.batch_size)


# -- hold against the baseline ---------------------------------------------------------------------


def run_regress(settings: RegressSettings) -> RegressOutcome:
    """Run a suite and hold it against its baseline; the report is in ``settings.output``.

    Raises:
        InputError: The suite, a task or an artifact cannot be used, or the suite was changed.
        InfrastructureError: There is no baseline, model, data, memory or GPU, or a passed run
            could not be tracked.
    """
    check_kind(settings, RegressSettings, "settings")
    places.prepare_folder(settings.output)
    outcome.clear_report(settings.output)
    try:
        found, measured = _compared(settings)
    except ActHarnessError as error:
        outcome.write_failure(settings.suite, error, settings.output)
        raise
    outcome.write_report(found, settings.output)
    try:
        found = replace(found, tracked=_track(settings, found, measured))
    except InfrastructureError as error:
        if found.exit_code == 0:
            raise
        _LOG.error("%s", error)
    return found


def _compared(settings: RegressSettings) -> tuple[RegressOutcome, StoredMeasurement]:
    suite, folder = _suite(settings)
    baseline = load_baseline(folder, suite=suite.name)
    with data_directory(settings.data_dir):
        session = _session(suite, settings)
        measured = session.run(title=f"regress {suite.name}")
        session.dismiss_others()
    goldens.check_comparable(baseline, suite.identity(), measured)
    old = baseline.measurement
    findings = goldens.identity_findings(old, measured, limit=session.limit)
    # Other documents or right answers cannot be paired; a run that lacks a task neither.
    unpaired = {
        one.task
        for one in findings
        if one.kind in ("prompt changed", "document changed", "target changed", "task changed")
    }
    if "goldens" in suite.layers:
        findings += goldens.golden_findings(old, measured, drift=baseline.drift)
    comparison = gates.compare_measurements(baseline, measured, without=unpaired)
    machine = _machine(str(session.lm.device))
    notes = _notes(baseline, measured, session.suite, machine, unpaired)
    if "statistics" in suite.layers and comparison is not None:
        losses, within = gates.gate(baseline, comparison)
        findings += losses
        notes += within
    found = RegressOutcome(
        suite=suite.name,
        layers=suite.layers,
        findings=tuple(findings),
        notes=tuple(notes),
        drifts=tuple(goldens.drifts(old, measured)),
        comparison=comparison,
        tolerance=baseline.drift,
        baseline={"reason": baseline.reason, **baseline.provenance},
        provenance=machine,
    )
    return found, measured


def _suite(settings: RegressSettings) -> tuple[Suite, Path]:
    suite, folder = load_suite(settings.suite, root=settings.baselines)
    if settings.batch_size is not None:
        suite = suite.model_copy(update={"batch_size": settings.batch_size})
    return suite, folder


def _session(suite: Suite, settings: RegressSettings) -> Session:
    return Session(
        suite,
        pretrained=settings.pretrained,
        tasks=settings.tasks,
        limit=settings.limit,
        include_path=settings.include_path,
    )


def _notes(
    baseline: Baseline,
    measured: StoredMeasurement,
    suite: Suite,
    here: dict[str, object],
    unpaired: set[str],
) -> list[str]:
    """What a reader should know beside the verdict; ``here`` is the machine of this run."""
    notes = [
        f"{key}: {baseline.provenance.get(key)} in the baseline, {here.get(key)} now"
        for key in _VERSIONS
        if baseline.provenance.get(key) != here.get(key)
    ]
    for key in ("drift", "alpha"):
        asked, kept = getattr(suite, key), getattr(baseline, key)
        if asked != kept:
            notes.append(f"{key}: {asked:g} in the suite; {kept:g}, the baseline's, was applied")
    if unpaired:
        notes.append(f"no statistics for {', '.join(sorted(unpaired))}: other questions were asked")
    left_out = [name for name in baseline.measurement.tasks if name not in measured.tasks]
    if left_out:
        notes.append(f"not run: {', '.join(left_out)}")
    for name, task in measured.tasks.items():
        stored = baseline.measurement.tasks.get(name)
        if stored is not None and len(task.documents) != len(stored.documents):
            notes.append(f"{name}: {len(task.documents)} of {len(stored.documents)} documents")
    return notes


# -- make a new baseline ---------------------------------------------------------------------------


def update_baseline(
    settings: RegressSettings, *, reason: str, announce: Callable[[str], None] = print
) -> Path:
    """Run a suite with all its variations and store what came of it as the new baseline.

    Args:
        settings: The suite and its places; nothing may be left out of it.
        reason: Why there is a new baseline; stands in it.
        announce: Gets what changes against the old one.

    Returns:
        The file, replaced as a whole at the very end.

    Raises:
        InputError: No reason, only a part of the suite, changed files, or no commit.
        RecipeError: The suite's own repetitions are further apart than its tolerance.
        InfrastructureError: As for :func:`run_regress`; the old baseline is untouched.
    """
    suite, folder = _suite(settings)
    _check_update(settings, reason)
    places.prepare_file(folder / FILE)
    with data_directory(settings.data_dir):
        session = _session(suite, settings)
        origin = _machine(str(session.lm.device))  # now: the clone may change while this runs
        reference = session.run(title=f"{suite.name}: reference")
        varied = []
        for number, variation in enumerate(suite.variations, start=1):
            title = f"{suite.name}: variation {number} of {len(suite.variations)}"
            varied.append(session.run(variation, title=title))
        session.dismiss_others()
    spread = _widest([gates.spread_of(reference, one) for one in varied])
    _check_spread(suite, spread)
    baseline = Baseline(
        suite=suite.name,
        identity=suite.identity(),
        reason=" ".join(reason.split()),
        provenance=origin,
        drift=suite.drift,
        alpha=suite.alpha,
        variations=tuple(variation.describe() for variation in suite.variations),
        spread=spread,
        measurement=reference,
    )
    announce(_changes(folder, baseline))
    return save_baseline(baseline, folder)


def _check_update(settings: RegressSettings, reason: str) -> None:
    if not reason.strip():
        raise InputError("a new baseline needs a reason; give --reason TEXT, it stands in the file")
    if settings.tasks or settings.limit is not None:
        raise InputError("a baseline is made of the whole suite; leave out --tasks and --limit")
    state = provenance.commit()
    if state.commit is None:
        raise InputError(
            "a baseline needs a commit to belong to, and the package does not run from a "
            "repository; work in a clone"
        )
    if state.dirty:
        raise InputError(
            f"there are changes since commit {state.commit[:12]}, so the baseline would belong to "
            "no commit; commit or stash them first"
        )


def _check_spread(suite: Suite, spread: dict[str, dict[str, Spread]]) -> None:
    """Refuse goldens that the suite's own repetitions would fail."""
    if "goldens" not in suite.layers:
        return
    for task, arms in spread.items():
        for arm, one in arms.items():
            if one.drift > suite.drift or one.flips:
                raise InputError(
                    f"suite {suite.name!r} does not repeat itself: {task}, arm {arm} drifts by "
                    f"{one.drift:.1e} nats with {one.flips} flips among its variations, tolerated "
                    f"are {suite.drift:g} and none; the old baseline is untouched"
                )


def _widest(spreads: Sequence[dict[str, dict[str, Spread]]]) -> dict[str, dict[str, Spread]]:
    """Return the largest of each figure over all repetitions."""
    widest: dict[str, dict[str, Spread]] = {}
    for found in spreads:
        for task, arms in found.items():
            for arm, one in arms.items():
                before = widest.setdefault(task, {}).get(arm, one)
                widest[task][arm] = Spread(
                    drift=max(before.drift, one.drift),
                    flips=max(before.flips, one.flips),
                    spread={k: max(v, one.spread.get(k, 0.0)) for k, v in before.spread.items()},
                )
    return widest


def _changes(folder: Path, new: Baseline) -> str:
    """Say what a new baseline changes against the old one."""
    lines = [f"new baseline of suite {new.suite}: {new.reason}"]
    for task, arms in new.spread.items():
        for arm, one in arms.items():
            lines.append(
                f"  {task}, arm {arm}: {one.drift:.1e} nats and {one.flips} flips among "
                f"{len(new.variations)} repetitions"
            )
    if not (folder / FILE).is_file():
        return "\n".join([*lines, "  there was none before"])
    try:
        old = load_baseline(folder, suite=new.suite)
        goldens.check_comparable(old, new.identity, new.measurement)
    except ActHarnessError as error:
        return "\n".join([*lines, f"  not comparable with the old one: {error}"])
    before, after = old.measurement, new.measurement
    if set(before.arms) != set(after.arms):
        return "\n".join([*lines, "  other arms than the old one"])
    findings = goldens.identity_findings(before, after)
    findings += goldens.golden_findings(before, after, drift=new.drift)
    changes = [f"  {finding.line()}" for finding in findings]
    return "\n".join([*lines, *(changes or ["  the same answers as the old one"])])


# -- provenance and tracking -----------------------------------------------------------------------


def _machine(device: str) -> dict[str, object]:
    record = provenance.collect(device=device).to_json()
    return {**record, "threads": torch.get_num_threads(), "platform": platform.platform(),
            "cores": os.cpu_count()}  # fmt: skip


def _track(settings: RegressSettings, found: RegressOutcome, measured: StoredMeasurement) -> str:
    model = measured.model.model_dump()
    config = run_config(
        arm="regress",
        model=model,
        engine=next((arm.engine for arm in measured.arms.values() if arm.engine), None),
        provenance=found.provenance,
        suite=found.suite,
        layers=list(found.layers),
        baseline=found.baseline,
        arms={
            name: arm.model_dump(include={"artifact", "sha256", "calibration"})
            for name, arm in measured.arms.items()
        },
    )
    with open_tracker(
        settings.tracking,
        job_type="regress",
        name=f"regress-{found.suite}-{found.provenance['created']}",  # every night a run of its own
        config=config,
        folder=settings.output,
    ) as tracker:
        track_outcome(tracker, found)
        return tracker.describe()


def track_outcome(tracker: Tracker, found: RegressOutcome) -> None:
    """Log scores, paired differences, drifts, verdict, and the tables behind them."""
    values: dict[str, object] = {
        "regress/status": found.status,
        "regress/findings": len(found.findings),
        "regress/passed": int(found.exit_code == 0),
    }
    for row in found.drifts:
        values[f"{row.task}@{row.arm}/drift"] = row.drift
        values[f"{row.task}@{row.arm}/flips"] = row.flips
    if found.comparison is not None:
        for one in found.comparison.rows:
            if one.score_b is not None:
                values[f"{one.name}/{one.metric}"] = one.score_b
        values |= comparison_scalars(found.comparison)
    tracker.scalars(values)
    if found.comparison is not None:
        table = comparison_table(found.comparison)
        tracker.table("comparison", table.columns, table.rows)
    rows = [[one.task, one.arm or "all", one.kind, one.text] for one in found.findings]
    tracker.table("findings", ["task", "arm", "what", "details"], rows)
