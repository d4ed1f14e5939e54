"""Reading what an evaluation left on the disk: lm-eval's result files and the samples beside them.

lm-eval 0.4.13 writes ``results_<date>.json`` and, with ``--log_samples``, one
``samples_<task>_<date>.jsonl`` a task into a folder named by the checkpoint (its
``loggers/evaluation_tracker.py``); ``act-harness eval`` writes the same layout, one folder per arm.
A :class:`Run` is one such result. Of every sample it keeps what a comparison needs (hashes, metric
values, the scores of the choices), not the texts.

Not here: comparing two runs (:mod:`act_harness.evidence.compare`) and writing results.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from act_harness.errors import ResultError, suggestion
from act_harness.evidence.samples import Sample, finite_number, read_sample
from act_harness.support import places, reading

__all__ = [
    "Run",
    "load_run",
    "run_from_memory",
    "task_file_name",
]

_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.jsonl?$")
_SHARED_FIELDS = ("passage", "context", "subject")


@dataclass(frozen=True)
class Run:
    """One evaluation of one model: its scores and, where they were logged, its samples."""

    label: str
    """Short name: the folder's, which for ``act-harness eval`` is model and arm."""
    path: Path | None
    """The file that was read; None for results in memory."""
    data: Mapping[str, Any]
    """The results as lm-eval writes them, and ``calibrators``, which ``act-harness eval`` stores in
    a file beside them; empty when only a samples file was given."""
    sample_files: Mapping[str, Path] = field(default_factory=dict)
    """Task to samples file."""
    notes: tuple[str, ...] = ()
    """What a reader should know about how this run was found."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks (not groups), in the result's order."""
        known = self.data.get("configs")
        if not known:
            return list(self.sample_files) or list(self.data.get("samples", {}))
        return [name for name in self.data.get("results", {}) if name in known]

    @property
    def groups(self) -> list[str]:
        """Names of the groups that have a score of their own."""
        return list(self.data.get("groups", {}))

    def leaves(self, group: str) -> list[str]:
        """Names of the tasks below a group, through groups in groups, each once."""
        tree, found = self.data.get("group_subtasks", {}), dict[str, None]()
        waiting, seen = [group], set[str]()
        while waiting:
            name = waiting.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if tree.get(name):
                waiting.extend(tree[name])
            else:
                found[name] = None
        return list(found)

    def metrics(self, name: str) -> list[tuple[str, str]]:
        """(metric, filter) of a task or group, in the result's order, without standard errors."""
        pairs = []
        for key in self.data.get("results", {}).get(name, {}):
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                pairs.append((metric, kind))
        return pairs

    def score(self, name: str, metric: str, filter_name: str) -> float | None:
        """Score of a task or group as reported, or None where there is no number."""
        return finite_number(
            self.data.get("results", {}).get(name, {}).get(f"{metric},{filter_name}")
        )

    def higher_is_better(self, name: str, metric: str) -> bool | None:
        """Direction of a metric; None when the result does not say it and the name does not."""
        said = self.data.get("higher_is_better", {}).get(name, {}).get(metric)
        if isinstance(said, bool):
            return said
        if any(word in metric for word in ("perplexity", "bits_per_byte", "brier")):
            return False
        if metric.startswith(("acc", "exact", "em", "f1")):
            return True
        return None

    def has_samples(self, task: str) -> bool:
        """Whether the samples of a task were logged."""
        return task in self.sample_files or task in self.data.get("samples", {})

    def samples(self, task: str, *, fields: Sequence[str] = ()) -> list[Sample]:
        """Read the samples of a task, ordered by document.

        Args:
            task: One of :attr:`tasks`.
            fields: More fields of the documents to keep in :attr:`Sample.fields`.

        Raises:
            ResultError: The task is unknown, its samples were not logged, or they are malformed.
            InfrastructureError: The file cannot be read.
        """
        kept = (*fields, *_SHARED_FIELDS)
        if task in self.sample_files:
            path = self.sample_files[task]
            rows: Iterable[Any] = reading.read_lines(path, half_line="refuse")
            where = str(path)
        elif task in self.data.get("samples", {}):
            rows, where = self.data["samples"][task], f"{self.label}, task {task}"
        else:
            known = [*self.sample_files, *self.data.get("samples", {})]
            raise ResultError(
                f"{self.label}: no samples of task {task!r}{suggestion(task, known)}; "
                "repeat the run with --log_samples"
            )
        found = [
            read_sample(row, kept, f"{where}: sample {i}") for i, row in enumerate(rows, start=1)
        ]
        if not found:
            raise ResultError(f"{where}: no samples in it; repeat the run")
        return sorted(found, key=lambda sample: (sample.doc_id, sample.filter))


def load_run(path: str | os.PathLike[str]) -> Run:
    """Find and read one result.

    Args:
        path: A results file, a samples file (then there are no groups and no reported scores), or
            a folder that holds results directly or in its only subfolder with any. Of several
            results in one folder the newest is taken, which a note says.

    Raises:
        ResultError: Nothing is there, several arms are there, or the file is malformed.
        InfrastructureError: It cannot be read.
    """
    given = Path(path)
    if reading.is_folder(given):
        return _load_folder(given)
    if not reading.is_file(given):
        hint = reading.nearest_beside(given) or "; check the path"
        raise ResultError(f"{given}: no such file or folder{hint}")
    if given.name.startswith("samples_") or given.suffix == ".jsonl":
        task = _DATE.sub("", given.name).removeprefix("samples_").removesuffix(".jsonl")
        return Run(label=given.parent.name, path=given, data={}, sample_files={task: given})
    return _load_file(given, ())


def run_from_memory(results: Mapping[str, Any], *, label: str) -> Run:
    """Wrap what ``lm_eval.simple_evaluate(..., log_samples=True)`` returned, without any file."""
    return Run(label=label, path=None, data=results)


# -- files -----------------------------------------------------------------------------------------


def _load_folder(folder: Path) -> Run:
    files = sorted(folder.glob("results_*.json")) or sorted(folder.glob("*/results_*.json"))
    files = files or sorted(folder.glob("**/results_*.json"))
    if not files:
        raise ResultError(
            f"{folder}: no results_*.json in it; give the output folder of act-harness eval or of "
            "lm_eval --output_path --log_samples"
        )
    arms = sorted({file.parent for file in files})
    if len(arms) > 1:
        names = ", ".join(str(arm.relative_to(folder)) for arm in arms[:6])
        more = f" and {len(arms) - 6} more" if len(arms) > 6 else ""
        raise ResultError(f"{folder}: {len(arms)} results in it ({names}{more}); name one of them")
    newest = max(files, key=lambda file: (_date(file), file.stat().st_mtime))
    older = len(files) - 1
    note = f"{arms[0].name}: newest of {older + 1} results taken ({newest.name})"
    return _load_file(newest, (note,) if older else ())


def _load_file(path: Path, notes: tuple[str, ...]) -> Run:
    data = reading.read_json(path, advice="repeat the run that wrote it", lenient=True)
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
        raise ResultError(
            f"{path}: no 'results' in it, so it is not a result of lm-eval; give a results_*.json"
        )
    date = _date(path)
    beside = path.parent / f"calibrators_{date}.json"
    if reading.is_file(beside):
        data["calibrators"] = reading.read_json(beside, advice="repeat act-harness eval")
    _check_form(data, str(path))
    files = {}
    names = {_flat(task): task for task in data.get("configs", {})}
    names |= {_flat(task_file_name(task)): task for task in data.get("configs", {})}
    for file in sorted(path.parent.glob(f"samples_*_{date}.jsonl")):
        task = file.name.removeprefix("samples_").removesuffix(f"_{date}.jsonl")
        files[task if task in names.values() else names.get(_flat(task), task)] = file
    return Run(label=path.parent.name, path=path, data=data, sample_files=files, notes=notes)


_OBJECTS_OF_OBJECTS = ("results", "groups", "higher_is_better", "calibrators")
_OBJECTS_OF_LISTS = ("group_subtasks", "samples")


def _check_form(data: Mapping[str, Any], where: str) -> None:
    """Refuse a result whose parts are not of the kinds that :class:`Run` walks through."""
    for name in (*_OBJECTS_OF_OBJECTS, *_OBJECTS_OF_LISTS, "configs", "config"):
        part = data.get(name, {})
        inner = dict if name in _OBJECTS_OF_OBJECTS else list if name in _OBJECTS_OF_LISTS else None
        fits = isinstance(part, Mapping) and (
            inner is None or all(isinstance(one, inner) for one in part.values())
        )
        if not fits:
            raise ResultError(
                f"{where}: {name!r} is not as lm-eval writes it; give a results_*.json of lm-eval"
            )
    tree = data.get("group_subtasks", {})
    if not all(isinstance(name, str) for names in tree.values() for name in names):
        raise ResultError(f"{where}: 'group_subtasks' names no tasks; give a results_*.json")


def _date(path: Path) -> str:
    found = _DATE.search(path.name)
    return found.group(1) if found else path.stem.rpartition("_")[2]


def task_file_name(task: str) -> str:
    """Return what stands for a task in the name of its samples file."""
    # As lm-eval writes it wherever that can be a file's name.
    plain = task.replace("/", "__")
    return plain if re.fullmatch(r"[\w .-]{1,40}", plain) else places.file_name(task)


def _flat(task: str) -> str:
    # A task name with "/" cannot be a file name; whoever writes it replaces something.
    return re.sub(r"\W+", "_", task).replace("__", "_")
