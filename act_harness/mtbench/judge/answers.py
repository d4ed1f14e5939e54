"""Finding the conversations of ``mt_bench`` runs: lm-eval's samples files, one arm each.

Plain ``lm_eval`` puts both arms of a model into one folder, told apart by date only; which arm a
samples file holds stands in the results file of the same date (``config.act_harness``). Of several
runs of one arm the newest counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_harness.errors import ResultError
from act_harness.support import reading

__all__ = ["Arm", "Question", "Talk", "find_arms"]

_TASK = "mt_bench"
_DATE = re.compile(rf"^samples_{_TASK}_(\d{{4}}-\d\d-\d\dT[\d.-]+)\.jsonl$")


@dataclass(frozen=True)
class Question:
    """One question of the benchmark."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    """The dataset's own reference answers by turn."""


@dataclass(frozen=True)
class Talk:
    """A question with a model's answers."""

    question: Question
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """All conversations of one model with one head set (or none)."""

    label: str
    """``baseline`` or the artifact's name, with the model in front if there are several."""
    model: str
    artifact_sha256: str | None
    talks: tuple[Talk, ...]
    path: Path

    @property
    def is_baseline(self) -> bool:
        """Whether nothing was calibrated."""
        return self.artifact_sha256 is None


@dataclass(frozen=True)
class _Run:
    date: str
    samples: Path
    model: str
    arm: str
    artifact_sha256: str | None


def find_arms(paths: Sequence[Path]) -> list[Arm]:
    """Return the arms below some folders, baselines first.

    Args:
        paths: output folders, or samples files.

    Raises:
        ResultError: there are no answers, or a file cannot be read as answers of ``mt_bench``.
    """
    newest: dict[tuple[str, str | None], _Run] = {}
    for path in paths:
        for file in _samples_files(path):
            run = _describe(file)
            place = (run.model, run.artifact_sha256)
            if place not in newest or newest[place].date < run.date:
                newest[place] = run
    models = {run.model for run in newest.values()}
    names = [run.arm for run in newest.values()]
    arms = []
    for run in sorted(newest.values(), key=lambda run: (run.artifact_sha256 is not None, run.date)):
        label = run.arm
        if len(models) == 1 and names.count(label) > 1:  # one name, other heads
            label = f"{label}-{str(run.artifact_sha256)[:8]}"
        if len(models) > 1:
            label = f"{run.model}/{label}"
        arms.append(Arm(label, run.model, run.artifact_sha256, _talks(run.samples), run.samples))
    return arms


def _samples_files(path: Path) -> list[Path]:
    if reading.is_file(path):
        return [path]
    if not reading.is_folder(path):
        raise ResultError(f"{str(path)[:200]} does not exist; give an output folder of mt_bench")
    found = sorted(p for p in path.rglob(f"samples_{_TASK}_*.jsonl") if _DATE.match(p.name))
    if not found:
        raise ResultError(
            f"{path} holds no samples of mt_bench; run lm_eval --model hf-act --tasks mt_bench "
            f"--apply_chat_template --log_samples --output_path {path} first"
        )
    return found


def _describe(file: Path) -> _Run:
    """Look the arm up in the results file that was written with the samples."""
    match = _DATE.match(file.name)
    date = match[1] if match else file.name
    results = file.with_name(f"results_{date}.json")
    if not results.is_file():  # a samples file that was moved
        return _Run(date, file, "", file.stem, file.stem)
    content = reading.read_json(results, advice="repeat the run that wrote it", lenient=True)
    try:
        facts = content["config"]["act_harness"]
        sha256 = facts["artifact_sha256"]
        return _Run(
            date, file, str(facts["model"]["id"]), str(facts["arm"]), sha256 and str(sha256)
        )
    except (KeyError, TypeError) as error:
        raise ResultError(
            f"{results} does not say which arm it holds; expected a result of --model hf-act"
        ) from error


def _talks(file: Path) -> tuple[Talk, ...]:
    talks: dict[str, Talk] = {}
    for number, record in enumerate(reading.read_lines(file, half_line="refuse"), start=1):
        talk = _talk(record)
        if talk is None:
            raise ResultError(
                f"{file}: line {number} is no conversation of mt_bench, expected doc.prompt and "
                "as many answers in filtered_resps"
            )
        talks[talk.question.id] = talk
    if not talks:
        raise ResultError(f"{file} is empty; repeat the run that wrote it")
    return tuple(talks[name] for name in sorted(talks, key=lambda name: (len(name), name)))


def _talk(record: Any) -> Talk | None:  # noqa: ANN401 - any JSON value
    try:
        doc, answers = record["doc"], record["filtered_resps"][0]
        question = Question(
            id=str(doc["prompt_id"]),
            category=str(doc["category"]),
            turns=tuple(map(str, doc["prompt"])),
            references=tuple(map(str, doc.get("reference") or ())),
        )
    except (KeyError, TypeError, IndexError, AttributeError):
        return None
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        return None
    if len(answers) != len(question.turns) or not answers:
        return None
    return Talk(question, tuple(answers))
