"""``act-harness eval``: both arms on the same requests in one go, the model loaded once.

Every arm is an ordinary lm-eval run (``simple_evaluate``) on one loaded model whose head set is
switched in between, so tasks, prompts, filters and metrics are lm-eval's own. Results and samples
are written in lm-eval's layout, one folder per arm, atomically, and then compared document by
document (:mod:`act_harness.evidence.compare`). With several few-shot seeds each seed is a pair of
runs; the averages and their spread are reported beside the pairs.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.errors import (
    ActHarnessError,
    InfrastructureError,
    InputError,
    TaskError,
    suggestion,
)
from act_harness.evidence.compare import Comparison, compare
from act_harness.evidence.tables import markdown_table
from act_harness.harness.calibrator_inputs import Labelled, labelled_documents
from act_harness.harness.data_folder import data_directory
from act_harness.harness.eval_checks import (
    check_generation,
    check_samples,
    check_template,
    leave_out_idle,
    searched_documents,
    warn_of_other_prompts,
)
from act_harness.harness.eval_settings import EvalSettings
from act_harness.harness.one_arm import evaluate_arm
from act_harness.harness.run_files import (
    SeedAverage,
    asides_of,
    averages_table,
    counters_line,
    scores_of,
    seed_averages,
    shown,
    write_report,
    write_run,
)
from act_harness.harness.task_lookup import TaskSelection, find_tasks, leaf_tasks, load_tasks
from act_harness.support import places
from act_harness.support.checks import check_kind
from act_harness.support.interruption import saved
from act_harness.support.model_arguments import model_arguments
from act_harness.tracking.arms import TrackedArms, track_arms
from act_harness.tracking.tracker import TrackingSettings

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.model import CalibratedHFLM

__all__ = [
    "EvalOutcome",
    "load_model",
    "run_eval",
    "track_eval",
]


@dataclass(frozen=True)
class EvalOutcome:
    """What was run and what came of it."""

    folders: dict[str, Path]
    """Result folders by arm, ``baseline`` and ``act``."""
    comparisons: dict[int, Comparison]
    """One paired comparison for each few-shot seed; none for a baseline alone."""
    report: Path | None
    averages: tuple[SeedAverage, ...] = ()
    counters: dict[str, Any] = field(default_factory=dict)
    scores: tuple[tuple[str, str, float | None], ...] = ()
    model: str = ""
    """Short name of the model."""
    artifact: Artifact | None = None
    not_finite: int = 0
    """Answers of both arms that are NaN or infinite: no verdict then."""
    asides: tuple[str, ...] = ()
    """What a reader of a baseline alone should know of its requests."""

    @property
    def exit_code(self) -> int:
        """3 where answers are not finite, otherwise 0."""
        return InfrastructureError.exit_code if self.not_finite else 0

    def summary(self) -> str:
        """Return what is printed at the end."""
        lines = []
        if len(self.comparisons) == 1:
            lines.append(next(iter(self.comparisons.values())).to_terminal())
        elif self.averages:
            lines.append(averages_table(self.averages, len(self.comparisons)))
        elif self.scores:
            header = ("task", "metric", "baseline")
            lines.append(markdown_table(header, [(n, m, shown(v)) for n, m, v in self.scores]))
            if self.asides:  # lm-eval has no way to leave a document out
                lines.append(f"in these scores: {', '.join(self.asides)}")
        if self.counters:
            lines.append("calibration: " + counters_line(self.counters))
        if self.not_finite:
            lines.append(f"no verdict: {self.not_finite} answers are not finite")
        lines += [f"{arm}: {folder}" for arm, folder in self.folders.items()]
        if self.report is not None:
            lines.append(f"report: {self.report}")
        return "\n".join(lines)


def run_eval(settings: EvalSettings) -> EvalOutcome:
    """Run the baseline and, unless the artifact is ``none``, the calibrated arm.

    Raises:
        InputError: a task, the model, the artifact or an argument cannot be used.
        InfrastructureError: data or memory is missing, or nothing can be written.
        SystemExit: with status 0, on every process but the first of several.
    """
    check_kind(settings, EvalSettings, "settings")
    with data_directory(settings.data_dir):
        return _run(settings)


def _run(settings: EvalSettings) -> EvalOutcome:
    _given_artifact(_arguments(settings))  # what is not there is found before tasks are read
    selection = _selection(settings)
    tasks = load_tasks(selection)  # missing data is found before the model loads
    check_samples(tasks or [], settings.samples)
    places.prepare_folder(settings.output)
    lm, artifact = load_model(settings)
    leave_out_idle(lm, tasks or [], settings)
    check_template(lm, settings)
    check_generation(lm, artifact, tasks or [], settings.gen_kwargs)
    warn_of_other_prompts(artifact, settings)
    labelled: Labelled = {}
    if "supervised" in settings.calibrators:
        labelled = labelled_documents(lm, artifact, selection, leaf_tasks(selection))
    model = places.file_name(Path(str(lm.pretrained)).name)
    stamp = datetime.now().isoformat(timespec="seconds").replace(":", "-")
    folders = {} if not lm.leads else _new_folders(settings.output, model, artifact, stamp)
    try:
        with saved(lambda: _what_is_saved(folders)):
            return _run_arms(settings, lm, artifact, selection, tasks, folders, stamp, labelled)
    except ActHarnessError as error:
        if not _complete(folders):
            raise
        raise type(error)(f"{error}; {_what_is_saved(folders)}") from error
    finally:
        places.remove_empty(folders)


def _new_folders(
    output: Path, model: str, artifact: Artifact | None, stamp: str
) -> dict[str, Path]:
    """Make this run's own folders: of the arms, and of their comparison."""
    names = {"baseline": f"{model}__baseline__{stamp}"}
    if artifact is not None:
        act = f"act-{places.file_name(artifact.name)}"
        names["act"] = f"{model}__{act}__{stamp}"
        names["comparison"] = f"{model}__{act}__comparison__{stamp}"
    return places.new_folders(output, names)


def _complete(folders: Mapping[str, Path]) -> list[str]:
    """Return the folders of arms whose results are on the disk."""
    return [str(place) for place in folders.values() if any(place.rglob("results_*.json"))]


def _what_is_saved(folders: Mapping[str, Path]) -> str:
    done = _complete(folders)
    if not done:
        return "no arm was complete, so a repeated command starts anew"
    told = f"complete results are in {', '.join(done)}"
    arms = [folders[arm] for arm in ("baseline", "act") if arm in folders]
    if len(arms) == 2 and all(any(place.glob("results_*.json")) for place in arms):
        again = shlex.join(["act-harness", "compare", *map(str, arms)])
        return f"{told}; what is left to do is: {again}"
    return f"{told}; a repeated command starts anew"


def _run_arms(
    settings: EvalSettings,
    lm: CalibratedHFLM,
    artifact: Artifact | None,
    selection: TaskSelection,
    tasks: list[Any] | None,
    folders: dict[str, Path],
    stamp: str,
    labelled: Labelled,
) -> EvalOutcome:
    model = places.file_name(Path(str(lm.pretrained)).name)
    arms = ["baseline"] if artifact is None else ["baseline", "act"]
    searched = searched_documents(artifact, tasks or [], settings)
    comparisons: dict[int, Comparison] = {}
    counters: dict[str, Any] = {}
    not_finite = 0
    asides: tuple[str, ...] = ()
    scores: tuple[tuple[str, str, float | None], ...] = ()
    for seed in settings.fewshot_seeds:
        several = len(settings.fewshot_seeds) > 1
        for arm in arms:
            lm.use_artifact(None if arm == "baseline" else artifact)
            first = settings.write_out and not scores
            results = evaluate_arm(lm, settings, selection, seed, tasks, labelled, write_out=first)
            tasks = None  # they hold this arm's requests; the next one builds its own
            if results is None or not lm.leads:  # the first process has them all
                continue
            not_finite += len(lm.counters.not_finite)
            if arm == "act":
                counters = lm.counters.summary() | searched
                results["act_harness"] |= searched
            elif artifact is None:
                asides = tuple(asides_of(lm.counters.summary()))
            place = folders[arm] / f"seed-{seed}" if several else folders[arm]
            place.mkdir(exist_ok=True)
            write_run(results, place, stamp)
            scores = scores or scores_of(results)
        if artifact is not None and lm.leads and not settings.predict_only:
            pair = [folders[arm] / f"seed-{seed}" if several else folders[arm] for arm in arms]
            comparisons[seed] = compare(pair[0], pair[1])
    if not lm.leads:  # nothing to report here, and nothing went wrong
        raise SystemExit(0)
    report = None
    averages = seed_averages(comparisons) if len(comparisons) > 1 else ()
    if comparisons:
        report = write_report(folders["comparison"], comparisons, averages, counters)
    own = {arm: folders[arm] for arm in arms}
    return EvalOutcome(
        own, comparisons, report, averages, counters, scores, model=model, artifact=artifact,
        not_finite=not_finite, asides=asides,
    )  # fmt: skip


def track_eval(
    outcome: EvalOutcome, settings: EvalSettings, tracking: TrackingSettings
) -> list[str]:
    """Log a finished evaluation, one W&B run per arm; return where they are, a line each.

    The same command in the same output folder continues its runs.

    Raises:
        InfrastructureError: W&B cannot be reached or refuses the key (strict only).
    """
    asked = {
        name: getattr(settings, name)
        for name in ("pretrained", "model_args", "tasks", "limit", "num_fewshot", "seed",
                     "apply_chat_template", "system_instruction")
    }  # fmt: skip
    arms = TrackedArms(
        model=outcome.model,
        folders=outcome.folders,
        seeds=settings.fewshot_seeds,
        output=settings.output,
        artifact=outcome.artifact,
        comparisons=outcome.comparisons,
        settings=asked,
    )
    return track_arms(arms, tracking)


def load_model(settings: EvalSettings) -> tuple[CalibratedHFLM, Any]:
    """Load the model as its baseline, and find and check the artifact; (model, artifact)."""
    from act_harness.artifact import resolve_artifact
    from act_harness.model import CalibratedHFLM

    arguments = _arguments(settings)
    reference = _given_artifact(arguments)
    lm = CalibratedHFLM(artifact=None, **arguments)
    artifact = resolve_artifact(reference, lm.facts)
    lm.try_artifacts([artifact])  # a model that cannot be calibrated fails before it is scored
    return lm, artifact


def _given_artifact(arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - as `artifact=`
    """Take the artifact out of the model's arguments: read where one is named, else as given."""
    from act_harness.artifact import Artifact, load_artifact

    reference = arguments.pop("artifact", "")
    if reference and not isinstance(reference, Artifact) and str(reference).lower() != "none":
        return load_artifact(reference)
    return reference


def _arguments(settings: EvalSettings) -> dict[str, Any]:
    """Return the model's arguments; ``artifact`` among them, if it was given."""
    arguments = model_arguments(
        settings.pretrained,
        settings.model_args,
        device=settings.device,
        batch_size=settings.batch_size,
    )
    if settings.artifact:
        other = arguments.get("artifact")
        if other is not None and str(other) != str(settings.artifact):
            raise InputError(
                f"--artifact is {str(settings.artifact)!r} and --model_args says artifact={other}; "
                "give one of them"
            )
        arguments["artifact"] = settings.artifact
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = True
    arguments.setdefault("batch_size", 1)
    return arguments


def _selection(settings: EvalSettings) -> TaskSelection:
    """Find the tasks; like lm-eval, hand them the model's arguments beside ``--metadata``."""
    given = {key: value for key, value in _arguments(settings).items() if key != "artifact"}
    metadata = {**given, **settings.metadata} if settings.metadata else None
    found = find_tasks(settings.tasks, include_path=settings.include_path, metadata=metadata)
    if settings.samples is not None:
        leaves = leaf_tasks(found)
        for name in settings.samples:
            if name not in leaves:
                hint = suggestion(name, leaves) or f"; there are {', '.join(leaves[:12])}"
                raise TaskError(f"--samples names {name!r}, which is not among --tasks{hint}")
    return found
