"""``act-harness eval``: both arms on the same requests in one go, the model loaded once.

Every arm is an ordinary lm-eval run (``simple_evaluate``) on one loaded model whose head set is
switched in between, so tasks, prompts, filters and metrics are lm-eval's own. Results and samples
are written in lm-eval's layout, one folder per arm, atomically, and then compared document by
document (:mod:`act_harness.evidence.compare`). With several few-shot seeds each seed is a pair of
runs; the averages and their spread are reported beside the pairs.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.errors import (
    ActHarnessError,
    InfrastructureError,
    InputError,
    TaskError,
    UnsupportedCallError,
    suggestion,
)
from act_harness.evidence.calibrators import calibrator_names
from act_harness.evidence.compare import Comparison, compare
from act_harness.evidence.tables import markdown_table
from act_harness.harness.calibrator_inputs import InputsOfArm, Labelled, Prompts, labelled_documents
from act_harness.harness.data_folder import data_directory
from act_harness.harness.run_files import (
    SeedAverage,
    averages_table,
    counters_line,
    scores_of,
    seed_averages,
    shown,
    write_report,
    write_run,
)
from act_harness.harness.task_lookup import TaskSelection, find_tasks, leaf_tasks, load_tasks
from act_harness.support import places, provenance
from act_harness.support.checks import (
    check_batch_size,
    check_count,
    check_kind,
    check_limit,
    check_seed,
)
from act_harness.support.failures import running
from act_harness.support.interruption import saved
from act_harness.support.model_arguments import model_arguments
from act_harness.tracking.arms import TrackedArms, track_arms
from act_harness.tracking.tracker import TrackingSettings

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.model import CalibratedHFLM

__all__ = [
    "EvalOutcome",
    "EvalSettings",
    "load_model",
    "run_eval",
    "track_eval",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """What ``act-harness eval`` was asked for."""

    tasks: tuple[str, ...]
    """Names, patterns, YAML files or folders, see
    :func:`act_harness.harness.task_lookup.find_tasks`."""
    pretrained: str | Path | None = None
    """Hub id or folder; the same as ``pretrained=`` in ``model_args``."""
    model_args: str | Mapping[str, Any] = ""
    """The model's arguments, as lm-eval takes them."""
    artifact: str | Path | Artifact = ""
    """Empty: ``artifact=`` of ``model_args``, or the one shipped artifact that fits."""
    include_path: tuple[str | Path, ...] = ()
    """Folders of further task files."""
    limit: float | None = None
    """Documents of each task: a number, or a share below 1."""
    samples: Mapping[str, Sequence[int]] | None = None
    """Documents to take by task, counted from 0; all of a task that is not named."""
    num_fewshot: int | None = None
    fewshot_seeds: tuple[int, ...] = (1234,)
    batch_size: int | str | None = None
    """None: ``batch_size=`` of ``model_args``, or 1."""
    device: str | None = None
    apply_chat_template: bool | str = False
    """True, or the name of one of the tokenizer's templates."""
    fewshot_as_multiturn: bool | None = None
    """Examples as turns of a conversation; None: yes with a chat template."""
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the tasks' own settings of generation."""
    predict_only: bool = False
    """Store the answers of both arms, compute no metric and compare nothing."""
    write_out: bool = False
    """Print the first prompts of every task."""
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute what the model wrote."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Further settings for tasks that take them (RULER: ``max_seq_lengths``)."""
    calibrators: tuple[str, ...] = ("batch",)
    """Calibrations of the scores to have a column, see
    :data:`act_harness.evidence.calibrators.CALIBRATORS`; ``batch`` always has one, ``all`` stands
    for every one. Those that need further prompts ask them in both arms."""
    output: Path = Path("outputs")
    seed: int = 1234
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            InputError: A setting is out of range, or two of them exclude each other.
        """
        if isinstance(self.tasks, str):  # a name would be taken letter by letter
            object.__setattr__(self, "tasks", tuple(self.tasks.split(",")))
        object.__setattr__(self, "output", Path(self.output))
        check_limit(self.limit)
        check_count(self.num_fewshot, "--num-fewshot")
        check_seed(self.seed)
        check_batch_size(self.batch_size)
        if not self.fewshot_seeds:
            raise InputError("--fewshot-seeds names no seed; give at least one number")
        for seed in self.fewshot_seeds:
            check_seed(seed, "--fewshot-seeds")
        if len(set(self.fewshot_seeds)) < len(self.fewshot_seeds):
            raise InputError("--fewshot-seeds names a seed twice; its runs would be the same")
        if self.samples is not None:
            if self.limit is not None:
                raise InputError("--samples and --limit exclude each other; give one of them")
            object.__setattr__(self, "samples", _checked_samples(self.samples))
        object.__setattr__(self, "calibrators", calibrator_names(self.calibrators))
        if self.predict_only and len(self.calibrators) > 1:
            raise InputError("--calibrators and --predict-only exclude each other; give one")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise InputError("--fewshot-as-multiturn needs --apply-chat-template; give both")

    @property
    def multiturn(self) -> bool:
        """Whether few-shot examples are turns, as lm-eval's command line decides it."""
        if self.fewshot_as_multiturn is None:
            return bool(self.apply_chat_template)
        return self.fewshot_as_multiturn


def _checked_samples(samples: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return document numbers in order, each once: lm-eval takes them in the order of the data."""
    checked = {}
    for task, numbers in samples.items():
        if not isinstance(numbers, (list, tuple)) or not numbers:
            raise InputError(
                f"--samples gives no list of documents for {task!r}; expected "
                '{"TASK": [0, 1, 2]}, counted from 0'
            )
        for number in numbers:
            if number is None:
                raise InputError(f"--samples of {task!r} holds null, expected whole numbers")
            check_count(number, f"--samples of {task!r}")
        checked[task] = sorted(set(numbers))
    return checked


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
    _check_samples(tasks or [], settings.samples)
    places.prepare_folder(settings.output)
    lm, artifact = load_model(settings)
    _leave_out_idle(lm, tasks or [], settings)
    _check_template(lm, settings)
    _check_generation(lm, artifact, tasks or [], settings.gen_kwargs)
    _warn_of_other_prompts(artifact, settings)
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
    return f"complete results are in {', '.join(done)}; a repeated command starts anew"


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
    searched = _searched_documents(artifact, tasks or [], settings)
    comparisons: dict[int, Comparison] = {}
    counters: dict[str, Any] = {}
    not_finite = 0
    scores: tuple[tuple[str, str, float | None], ...] = ()
    for seed in settings.fewshot_seeds:
        several = len(settings.fewshot_seeds) > 1
        for arm in arms:
            lm.use_artifact(None if arm == "baseline" else artifact)
            first = settings.write_out and not scores
            results = _evaluate(lm, settings, selection, seed, tasks, labelled, write_out=first)
            tasks = None  # they hold this arm's requests; the next one builds its own
            if results is None or not lm.leads:  # the first process has them all
                continue
            not_finite += len(lm.counters.not_finite)
            if arm == "act":
                counters = lm.counters.summary() | searched
                results["act_harness"] |= searched
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
        not_finite=not_finite,
    )  # fmt: skip


def _calibrator_inputs(
    lm: CalibratedHFLM, settings: EvalSettings, seed: int, labelled: Labelled
) -> InputsOfArm:
    prompts = Prompts(
        fewshot_seed=seed,
        apply_chat_template=bool(settings.apply_chat_template),
        fewshot_as_multiturn=settings.multiturn,
        system_instruction=settings.system_instruction,
        chat_template=lm.apply_chat_template if settings.apply_chat_template else None,
    )
    return InputsOfArm(lm, settings.calibrators, prompts, labelled)


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


def _searched_documents(
    artifact: Artifact | None, tasks: Sequence[Any], settings: EvalSettings
) -> dict[str, int]:
    """Count, and say, where heads were found on documents of the very split that is scored."""
    from act_harness.search.splits import open_to_search

    splits = ((artifact.search if artifact else None) or {}).get("splits")
    if artifact is None or not artifact.head_count() or not isinstance(splits, dict):
        return {}
    total = 0
    for task in _leaves(tasks):
        split = splits.get(task.task_name)
        numbers = (settings.samples or {}).get(task.task_name, range(_documents(task, settings)))
        rows = (task.eval_docs[number] for number in numbers)
        source = str(split.get("source")) if isinstance(split, dict) else ""
        if seen := open_to_search(rows, source):
            total += seen
            warnings.warn(
                f"{seen} of the {len(numbers)} documents of {task.task_name!r} are of the half "
                f"from which the search of {artifact.name!r} drew, as the task has no training "
                "split: a gain on them shows nothing; give the task a training_split and search "
                "again",
                stacklevel=2,
            )
    return {"documents_open_to_search": total} if total else {}


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


def _check_samples(tasks: Sequence[Any], samples: Mapping[str, Sequence[int]] | None) -> None:
    """Refuse document numbers that a task does not have, before the model is loaded."""
    if samples is None:
        return
    for task in _leaves(tasks):
        wanted, have = samples.get(task.task_name, ()), len(task.eval_docs)
        if wanted and max(wanted) >= have:
            raise TaskError(
                f"--samples asks for document {max(wanted)} of {task.task_name!r}, which has "
                f"{have}; expected numbers from 0 to {have - 1}"
            )


def _leave_out_idle(lm: CalibratedHFLM, tasks: Sequence[Any], settings: EvalSettings) -> None:
    """Let no more processes take part than the smallest task has documents.

    lm-eval deals out each task's documents by itself and fails in a process that gets none.

    Raises:
        SystemExit: With status 0, on a process that is left out.
    """
    if lm.world_size == 1:
        return
    fewest = min((_documents(task, settings) for task in _leaves(tasks)), default=1)
    if fewest >= lm.world_size:
        return
    taking_part = lm.processes.first(max(1, fewest))
    if taking_part is None:
        raise SystemExit(0)
    warnings.warn(
        f"a task has {fewest} documents, so {taking_part.count} of {lm.world_size} processes run",
        stacklevel=2,
    )
    lm.share_work(taking_part)


def _documents(task: Any, settings: EvalSettings) -> int:  # noqa: ANN401 - lm-eval's Task
    """Return how many documents of a task are asked for."""
    if settings.samples is not None and task.task_name in settings.samples:
        return len(settings.samples[task.task_name])
    there = len(task.eval_docs)
    if settings.limit is None:
        return there
    wanted = settings.limit if settings.limit >= 1 else math.ceil(there * settings.limit)
    return min(there, int(wanted))


def _leaves(tasks: Sequence[Any]) -> list[Any]:
    """Return the tasks among lm-eval's task and group objects, and in the groups."""
    from lm_eval.api.group import Group

    return [
        task for one in tasks for task in (one.get_all_tasks() if isinstance(one, Group) else [one])
    ]


def _check_generation(
    lm: CalibratedHFLM, artifact: Artifact | None, tasks: Sequence[Any], changes: Mapping[str, Any]
) -> None:
    """Refuse settings of generation that the calibrated arm cannot take, before any is scored."""
    if artifact is None or not artifact.head_count():
        return
    for task in _leaves(tasks):
        kind = getattr(task, "request_type", task.get_config("output_type"))
        if kind != "generate_until":  # a conversation's settings are its own, with their checks
            continue
        own = task.get_config("generation_kwargs") or {}
        try:
            lm.check_generation({**own, **changes})
        except UnsupportedCallError as error:
            raise UnsupportedCallError(f"task {task.task_name!r}: {error}") from None


def _check_template(lm: CalibratedHFLM, settings: EvalSettings) -> None:
    """Refuse a chat template that there is not, and take the one that was named.

    lm-eval writes the named one into its results and renders prompts with the default one.
    """
    wanted, there = settings.apply_chat_template, lm.tokenizer.chat_template
    if not wanted:
        return
    if there is None:
        raise InputError(
            "the model's tokenizer has no chat template; leave out --apply-chat-template, or give "
            "--model_args tokenizer=DIR"
        )
    known = sorted(there) if isinstance(there, dict) else []
    if isinstance(wanted, str):
        if wanted not in known:
            found = suggestion(wanted, known) or f"; it has {', '.join(known) or 'one, unnamed'}"
            raise InputError(f"the model's tokenizer has no chat template {wanted!r}{found}")
        lm.chat_template_args = {**lm.chat_template_args, "chat_template": wanted}
    elif known and "default" not in known:
        raise InputError(
            f"the model's tokenizer has the chat templates {', '.join(known)}; name one of them "
            "behind --apply-chat-template"
        )


def _evaluate(
    lm: CalibratedHFLM,
    settings: EvalSettings,
    selection: TaskSelection,
    seed: int,
    tasks: list[Any] | None,
    labelled: Labelled,
    *,
    write_out: bool,
) -> dict[str, Any] | None:
    """Evaluate one arm; None on every process but the first."""
    import lm_eval

    built = tasks or load_tasks(selection)
    with (
        _setting("DISABLE_MULTIPROC", "1"),  # no process for every core, for a hundred draws
        # a model's processes ask all that follows together; lm-eval answers the first one alone
        _setting("LOCAL_RANK", "0") if lm.head_group.is_split else nullcontext(),
        _hashes_of_any_text(),
        _without_a_repository(),
        running("the evaluation"),
    ):
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=built,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            samples=None if settings.samples is None else dict(settings.samples),
            bootstrap_iters=_RESAMPLES,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.multiturn,
            system_instruction=settings.system_instruction,
            gen_kwargs=dict(settings.gen_kwargs) or None,
            log_samples=True,
            predict_only=settings.predict_only,
            write_out=write_out and lm.leads,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            task_manager=selection.manager,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=seed,
        )
    if results is None:
        return None
    further = _calibrator_inputs(lm, settings, seed, labelled)
    results["calibrators"] = further.collect(_leaves(built), results.get("samples", {}))
    results["act_harness"] = {"fewshot_seed": seed, "provenance": provenance.collect().to_json()}
    return dict(results)


_RESAMPLES = 100
"""lm-eval's bootstraps behind the standard errors of f1, mcc, perplexity and their like; its own
number for BLEU. 100,000 are its default and cost minutes. What is reported here rests on the paired
intervals of the comparison; standard errors of means have a formula and cost nothing."""


@contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    """Have a variable of the environment inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _hashes_of_any_text() -> Iterator[None]:
    """Let lm-eval hash a document with half a surrogate pair; it would lose the arm, all scored.

    Every other text keeps its hash, so that runs of lm-eval itself can be paired with these.
    """
    from lm_eval import evaluator

    before = evaluator.hash_string
    evaluator.hash_string = provenance.sha256_text
    try:
        yield
    finally:
        evaluator.hash_string = before


@contextmanager
def _without_a_repository() -> Iterator[None]:
    """Keep git from saying "fatal" where nothing failed: lm-eval asks it in any folder.

    Where there is no repository lm-eval's answer is None, with git's word for it on the terminal.
    """
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash
    here = Path.cwd()
    named = "GIT_DIR" in os.environ
    if not named and not any((folder / ".git").exists() for folder in (here, *here.parents)):
        evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before
