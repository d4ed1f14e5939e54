"""``act-harness eval``: both arms on the same requests in one go, the model loaded once.

Every arm is an ordinary lm-eval run (``simple_evaluate``) on one loaded model whose head set is
switched in between, so tasks, prompts, filters and metrics are lm-eval's own. Results and samples
are written in lm-eval's layout, one folder per arm, atomically, and then compared document by
document (:mod:`act_harness.compare`). With several few-shot seeds each seed is a pair of runs; the
averages and their spread are reported beside the pairs.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from act_harness import atomic, paths, places, provenance
from act_harness.compare import Comparison, compare
from act_harness.data_folder import data_directory
from act_harness.errors import InputError, TaskError, suggestion
from act_harness.interruption import saved
from act_harness.report import comparison_files, markdown_table
from act_harness.results import task_file_name
from act_harness.tracked_runs import TrackedArms, track_arms
from act_harness.tracker import TrackingSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from act_harness.artifact import Artifact
    from act_harness.model import CalibratedHFLM

__all__ = [
    "EvalOutcome",
    "EvalSettings",
    "SeedAverage",
    "load_model",
    "run_eval",
    "task_manager",
    "track_eval",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """What ``act-harness eval`` was asked for."""

    tasks: tuple[str, ...]
    pretrained: str | None = None
    """Hub id or folder; the same as ``pretrained=`` in ``model_args``."""
    model_args: str = ""
    """lm-eval's comma-separated arguments of the model."""
    artifact: str = ""
    """Empty: ``artifact=`` of ``model_args``, or the one shipped artifact that fits."""
    limit: float | None = None
    num_fewshot: int | None = None
    fewshot_seeds: tuple[int, ...] = (1234,)
    batch_size: str = "1"
    device: str | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    output: Path = Path("outputs")
    seed: int = 1234
    data_dir: Path | None = None


class SeedAverage(NamedTuple):
    """One task's metric over several few-shot seeds."""

    name: str
    metric: str
    baseline: float
    act: float
    difference: float
    spread: float
    """Standard deviation of the difference over seeds."""


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

    def summary(self) -> str:
        """Return what is printed at the end."""
        lines = []
        if len(self.comparisons) == 1:
            lines.append(next(iter(self.comparisons.values())).to_terminal())
        elif self.averages:
            lines.append(_averages_table(self.averages, len(self.comparisons)))
        else:
            header = ("task", "metric", "baseline")
            lines.append(markdown_table(header, [(n, m, _shown(v)) for n, m, v in self.scores]))
        if self.counters:
            lines.append("calibration: " + _counters_line(self.counters))
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
    with data_directory(settings.data_dir):
        return _run(settings)


def _run(settings: EvalSettings) -> EvalOutcome:
    manager = task_manager(settings.tasks)
    places.prepare_folder(settings.output)
    lm, artifact = load_model(settings)
    _warn_of_other_prompts(artifact, settings)
    model = places.file_name(Path(str(lm.pretrained)).name)
    stamp = datetime.now().isoformat(timespec="seconds").replace(":", "-")
    folders = {} if lm.rank != 0 else _new_folders(settings.output, model, artifact, stamp)
    try:
        with saved(lambda: _what_is_saved(folders)):
            return _run_arms(settings, lm, artifact, manager, folders, model, stamp)
    except BaseException:
        places.remove_empty(folders)
        raise


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


def _what_is_saved(folders: Mapping[str, Path]) -> str:
    done = [str(place) for place in folders.values() if any(place.rglob("results_*.json"))]
    return f"complete results are in {', '.join(done)}" if done else "no arm was complete"


def _run_arms(
    settings: EvalSettings,
    lm: CalibratedHFLM,
    artifact: Artifact | None,
    manager: TaskManager,
    folders: dict[str, Path],
    model: str,
    stamp: str,
) -> EvalOutcome:
    arms = ["baseline"] if artifact is None else ["baseline", "act"]
    comparisons: dict[int, Comparison] = {}
    counters: dict[str, Any] = {}
    scores: tuple[tuple[str, str, float | None], ...] = ()
    for seed in settings.fewshot_seeds:
        several = len(settings.fewshot_seeds) > 1
        for arm in arms:
            lm.use_artifact(None if arm == "baseline" else artifact)
            results = _evaluate(lm, settings, manager, seed)
            if results is None:  # the first process has them all
                continue
            if arm == "act":
                counters = lm.counters.summary()
            place = folders[arm] / f"seed-{seed}" if several else folders[arm]
            place.mkdir(exist_ok=True)
            _write_run(results, place, stamp)
            scores = scores or _scores(results)
        if artifact is not None and lm.rank == 0:
            pair = [folders[arm] / f"seed-{seed}" if several else folders[arm] for arm in arms]
            comparisons[seed] = compare(pair[0], pair[1], seed=settings.seed)
    if lm.rank != 0:  # nothing to report here, and nothing went wrong
        raise SystemExit(0)
    report = None
    averages = _averages(comparisons) if len(comparisons) > 1 else ()
    if artifact is not None:
        report = _write_report(folders["comparison"], comparisons, averages, counters)
    return EvalOutcome(
        {arm: folders[arm] for arm in arms},
        comparisons,
        report,
        averages,
        counters,
        scores,
        model=model,
        artifact=artifact,
    )


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


def _warn_of_other_prompts(artifact: Artifact | None, settings: EvalSettings) -> None:
    """Say so where prompts differ from those the heads were found on: sinks sit on both."""
    recipe = ((artifact.search if artifact else None) or {}).get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    for name, given in (
        ("num_fewshot", settings.num_fewshot or 0),
        ("apply_chat_template", settings.apply_chat_template),
        ("system_instruction", settings.system_instruction),
    ):
        if name in recipe and (recipe[name] or None) != (given or None):
            warnings.warn(
                f"artifact {artifact.name if artifact else None!r} was searched with "
                f"{name}={recipe[name]!r}, this evaluation uses {given!r}",
                stacklevel=2,
            )


def task_manager(tasks: Sequence[str]) -> TaskManager:
    """Return lm-eval's task manager with our tasks, after checking that all names are known.

    Raises:
        TaskError: a name is unknown, with the nearest known one.
    """
    from lm_eval.tasks import TaskManager

    found = paths.task_route().found
    manager = TaskManager(include_path=None if found else str(paths.tasks_path()))
    if not tasks:
        raise TaskError("no task was named; give --tasks, `act-harness run ls tasks` lists them")
    for name in tasks:
        if not manager.match_tasks([name]):
            hint = suggestion(name, manager.all_tasks)
            end = hint or "; `act-harness run ls tasks` lists all of them"
            raise TaskError(f"unknown task {name!r}{end}")
    return manager


def load_model(settings: EvalSettings) -> tuple[CalibratedHFLM, Any]:
    """Load the model as its baseline, and find and check the artifact; (model, artifact)."""
    from lm_eval.utils import simple_parse_args_string

    from act_harness.artifact import load_artifact, resolve_artifact
    from act_harness.model import CalibratedHFLM

    arguments = dict(simple_parse_args_string(settings.model_args) or {})
    if settings.pretrained is not None:
        arguments["pretrained"] = settings.pretrained
    if not arguments.get("pretrained"):
        raise InputError("no model was named; give --pretrained or --model-args pretrained=...")
    reference = settings.artifact or str(arguments.pop("artifact", ""))
    arguments.pop("artifact", None)
    if reference and reference.lower() != "none":
        load_artifact(reference)  # a misspelt name fails before the model is loaded
    if settings.device is not None:
        arguments["device"] = settings.device
    arguments.setdefault("batch_size", settings.batch_size)
    lm = CalibratedHFLM(artifact=None, **arguments)
    return lm, resolve_artifact(reference, lm.facts)


def _evaluate(
    lm: CalibratedHFLM, settings: EvalSettings, manager: TaskManager, seed: int
) -> dict[str, Any] | None:
    """Evaluate one arm; None on every process but the first."""
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        apply_chat_template=settings.apply_chat_template,
        system_instruction=settings.system_instruction,
        log_samples=True,
        task_manager=manager,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=seed,
    )
    if results is None:
        return None
    results["act_harness"] = {"fewshot_seed": seed, "provenance": provenance.collect().to_json()}
    return dict(results)


def _write_run(results: dict[str, Any], folder: Path, stamp: str) -> None:
    """Write one arm as lm-eval's tracker lays it out, whole files only."""
    from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

    samples = results.pop("samples", {})
    results["task_hashes"] = {
        task: hash_string(
            "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in rows)
        )
        for task, rows in samples.items()
    }
    for task, rows in samples.items():
        lines = []
        for row in rows:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(given)}
                for i, given in enumerate(row["arguments"])
            }
            line = {
                **row,
                "arguments": arguments,
                "resps": sanitize_list(row["resps"]),
                "filtered_resps": sanitize_list(row["filtered_resps"]),
                "target": str(row["target"]),
            }
            lines.append(line)
        path = folder / f"samples_{task_file_name(task)}_{stamp}.jsonl"
        atomic.write_lines(path, lines, default=handle_non_serializable)
    atomic.write_json(folder / f"results_{stamp}.json", results, default=handle_non_serializable)


def _scores(results: dict[str, Any]) -> tuple[tuple[str, str, float | None], ...]:
    rows = []
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, comma, _ = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                rows.append((name, metric, value if isinstance(value, int | float) else None))
    return tuple(rows)


def _averages(comparisons: dict[int, Comparison]) -> tuple[SeedAverage, ...]:
    """Average every row over the seeds' comparisons."""
    rows: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for comparison in comparisons.values():
        for row in comparison.rows:
            if row.score_a is not None and row.score_b is not None:
                key = (row.name, row.metric, row.filter)
                rows.setdefault(key, []).append((row.score_a, row.score_b))
    found = []
    for (name, metric, _), pairs in rows.items():
        changes = [b - a for a, b in pairs]
        found.append(
            SeedAverage(
                name,
                metric,
                baseline=statistics.fmean(a for a, _ in pairs),
                act=statistics.fmean(b for _, b in pairs),
                difference=statistics.fmean(changes),
                spread=statistics.stdev(changes) if len(changes) > 1 else 0.0,
            )
        )
    return tuple(found)


def _averages_table(averages: Sequence[SeedAverage], seeds: int) -> str:
    header = ("task", "metric", "baseline", "ACT", "difference", f"sd over {seeds} seeds")
    rows = [
        (
            a.name,
            a.metric,
            _shown(a.baseline),
            _shown(a.act),
            f"{a.difference:+.4f}",
            f"{a.spread:.4f}",
        )
        for a in averages
    ]
    return markdown_table(header, rows)


def _write_report(
    folder: Path,
    comparisons: dict[int, Comparison],
    averages: tuple[SeedAverage, ...],
    counters: dict[str, Any],
) -> Path:
    """Write the comparison (one for each seed) and what calibration did; return the main file."""
    atomic.write_json(folder / "counters.json", counters)
    if len(comparisons) == 1:
        (only,) = comparisons.values()
        written = _comparison_files(only, folder)
        text = written.read_text(encoding="utf-8") + f"\nCalibration: {_counters_line(counters)}\n"
        return atomic.write_text(written, text)
    for seed, comparison in comparisons.items():
        _comparison_files(comparison, folder / f"seed-{seed}")
    text = _averages_table(averages, len(comparisons))
    links = "\n".join(f"- [seed {s}](seed-{s}/comparison.md)" for s in comparisons)
    return atomic.write_text(folder / "comparison.md", f"{text}\n\n{links}\n")


def _comparison_files(comparison: Comparison, folder: Path) -> Path:
    """Write table, JSON and, where matplotlib (extra ``report``) is there, the plot."""
    if find_spec("matplotlib") is not None:
        return comparison_files(comparison, folder)["comparison.md"]
    _logger.warning("no plots: matplotlib is not installed; pip install 'act-harness[report]'")
    atomic.write_json(folder / "comparison.json", comparison.to_json())
    return atomic.write_text(folder / "comparison.md", comparison.to_markdown())


def _counters_line(counters: dict[str, Any]) -> str:
    share, moved = counters["share_of_pairs_with_sink"], counters["mean_moved_mass"]
    parts = [
        f"{counters['prompts']} prompts",
        f"{_shown(share)} of (head, prompt) pairs with a sink",
        f"{_shown(moved)} of the attention moved",
    ]
    for key in ("prompts_near_threshold", "prompts_too_short", "prompts_truncated"):
        if counters[key]:
            parts.append(f"{counters[key]} {key.replace('_', ' ')}")
    return ", ".join(parts)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
