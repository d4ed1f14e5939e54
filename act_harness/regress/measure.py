"""Running a suite: one loaded model, every arm on every task, as hashes and numbers.

Each arm is an ordinary ``lm_eval.simple_evaluate``. What keeps it from being finished
(no folder, no data, no memory, no GPU) becomes an :class:`InfrastructureError`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from act_harness.artifact import Artifact, load_artifact
from act_harness.attention.counters import PromptRecord, prompt_key
from act_harness.errors import InfrastructureError, RecipeError, suggestion
from act_harness.evidence.results import run_from_memory
from act_harness.evidence.samples import Sample, choice_scores
from act_harness.harness.eval_settings import EvalSettings
from act_harness.harness.evaluate import load_model
from act_harness.harness.task_lookup import find_tasks, load_tasks, single_tasks
from act_harness.regress.baseline import (
    ArmInfo,
    StoredAnswer,
    StoredDocument,
    StoredMeasurement,
    TaskRecord,
)
from act_harness.regress.suite import BASELINE_ARM, Suite, Variation
from act_harness.support.checks import check_batch_size
from act_harness.support.failures import infrastructure, running
from act_harness.support.provenance import sha256_text

if TYPE_CHECKING:
    from act_harness.model import CalibratedHFLM

__all__ = ["Session", "digest", "infrastructure"]


class Session:
    """A suite's model, tasks and head sets, loaded once and run as often as wanted."""

    def __init__(
        self,
        suite: Suite,
        *,
        pretrained: str | None = None,
        tasks: Sequence[str] = (),
        limit: int | None = None,
        include_path: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        """Load everything.

        Args:
            suite: What to run.
            pretrained: The user's own place of the model.
            tasks: Only these tasks of the suite; all where empty.
            limit: Fewer documents than the suite says.
            include_path: Folders of further task files.

        Raises:
            RecipeError: A task is not of the suite.
            InputError: A task, artifact or argument of the model cannot be used.
            InfrastructureError: The model, its device or data is missing.
        """
        self.suite = suite
        self.limit = min((one for one in (limit, suite.limit) if one is not None), default=None)
        check_batch_size(suite.batch_size)  # a misspelt one fails before the model is loaded
        self.artifacts: dict[str, Artifact | None] = {
            arm: None if reference is None else load_artifact(reference)
            for arm, reference in suite.arms().items()
        }
        self.selection = find_tasks(suite.tasks, include_path=include_path)
        loaded = single_tasks(load_tasks(self.selection))  # missing data, before the model loads
        self.tasks = _selected([task.task_name for task in loaded], tasks)
        self.lm = _load(suite, suite.model.find(pretrained))
        self.lm.try_artifacts(self.artifacts.values())  # none is found unfit after hours of others

    def run(
        self, variation: Variation | None = None, *, title: str = "regress"
    ) -> StoredMeasurement:
        """Score all arms and tasks; of several processes the first alone has them.

        Raises:
            InfrastructureError: Data or memory ran out, or answers are not finite.
        """
        varied = variation or Variation()
        self.lm.batch_size_per_gpu = _batch_size(varied.batch_size or self.suite.batch_size)
        tasks: dict[str, dict[str, TaskRecord]] = {}
        arms = {}
        with (
            tqdm(self.artifacts, desc=title, unit="arm", disable=not self.lm.leads) as bar,
            _threads(varied.threads),
            _reversed(self.lm, varied.reverse),
            running(f"suite {self.suite.name}"),
        ):
            for arm in bar:
                bar.set_postfix_str(arm)
                self.lm.use_artifact(self.artifacts[arm])  # also resets the counters
                results = self._evaluate()
                _refuse_not_finite(arm, len(self.lm.counters.not_finite))
                if results is None:  # the first process has them all; it needs us in every arm
                    continue
                for task in self.tasks:
                    tasks.setdefault(task, {})[arm] = _record(results, task, arm, self.lm)
                arms[arm] = _arm_info(self.lm, self.suite.arms()[arm])
        facts = self.lm.facts.model_copy(update={"id": self.suite.model.name})
        return StoredMeasurement(
            model=facts, arms=arms, tasks={task: _join(found) for task, found in tasks.items()}
        )

    def dismiss_others(self) -> None:
        """End every process but the first, which needed them while it ran the suite.

        Raises:
            SystemExit: With status 0, on the others: there is nothing to report there.
        """
        if not self.lm.leads:
            raise SystemExit(0)

    def _evaluate(self) -> dict[str, Any] | None:
        """Evaluate one arm; None on every process but the first."""
        import lm_eval

        results = lm_eval.simple_evaluate(
            model=self.lm,
            tasks=list(self.tasks),
            num_fewshot=self.suite.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.suite.apply_chat_template,
            system_instruction=self.suite.system_instruction,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=self.selection.manager,
        )
        return None if results is None else dict(results)


def _refuse_not_finite(arm: str, answers: int) -> None:
    """Refuse a run whose answers are no numbers: it has no verdict and makes no baseline."""
    if answers:
        raise InfrastructureError(
            f"not tested: {answers} answers of arm {arm!r} are not finite; check the model's "
            "weights and the dtype"
        )


def digest(value: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a JSON value or text."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return sha256_text(text)[:16]


# -- loading ---------------------------------------------------------------------------------------


def _load(suite: Suite, place: str) -> CalibratedHFLM:
    source = suite.model
    if source.device.startswith("cuda") and not torch.cuda.is_available():
        raise InfrastructureError(
            f"suite {suite.name!r} needs a GPU (device {source.device}) and this machine has none"
        )
    given = {"dtype": source.dtype, **source.args}
    settings = EvalSettings(
        tasks=suite.tasks,
        pretrained=place,
        model_args=",".join(f"{key}={value}" for key, value in given.items()),
        artifact="none",
        device=source.device,
        batch_size=suite.batch_size,
    )
    with infrastructure(f"the model {place}"):
        lm, _ = load_model(settings)
    return lm


def _selected(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    for name in wanted:
        if name not in known:
            hint = suggestion(name, known) or f"; it has {', '.join(known)}"
            raise RecipeError(f"task {name!r} is not of this suite{hint}")
    return [name for name in known if not wanted or name in wanted]


def _batch_size(text: str) -> int | str:
    check_batch_size(text)
    return "auto" if text.startswith("auto") else int(text)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _reversed(lm: CalibratedHFLM, wanted: bool) -> Iterator[None]:
    """Hand the model its requests in reverse order, so that batches are composed otherwise."""
    if not wanted:
        yield
        return
    stock = lm.loglikelihood

    def backwards(requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return stock(requests[::-1], disable_tqdm=disable_tqdm)[::-1]

    lm.loglikelihood = backwards  # type: ignore[method-assign]
    try:
        yield
    finally:
        del lm.loglikelihood


# -- recording -------------------------------------------------------------------------------------


def _arm_info(lm: CalibratedHFLM, reference: str | None) -> ArmInfo:
    artifact, attachment = lm.artifact, lm.attachment
    if artifact is None:
        return ArmInfo()
    content = artifact.document()
    return ArmInfo(
        artifact=reference,
        sha256=artifact.sha256(),
        calibration=content["calibration"],
        heads=content["heads"],
        strengths=content.get("strengths"),
        engine=attachment.engine.name if attachment is not None else None,
    )


def _record(results: Mapping[str, Any], task: str, arm: str, lm: CalibratedHFLM) -> TaskRecord:
    run = run_from_memory(results, label=arm)
    samples = run.samples(task)
    labels = _labels(samples)
    rows = {(row["doc_id"], row["filter"]): row for row in results["samples"][task]}
    contexts: dict[str, list[int]] = {}
    documents = []
    for sample in samples:
        row = rows[sample.doc_id, sample.filter]
        arguments = [list(one) for one in row["arguments"]]
        answer = _answer(sample, row["filtered_resps"])
        if arm != BASELINE_ARM:
            answer = _with_counters(answer, lm, arguments, contexts)
        documents.append(
            StoredDocument(
                id=sample.doc_id,
                filter=sample.filter,
                doc=digest(sample.doc_hash),
                prompt=digest(sample.prompt_hash),
                requests=digest(arguments),
                target=digest(sample.target_hash),
                label=labels.get((sample.doc_id, sample.filter)),
                choices=digest(list(sample.choices)) if sample.choices else None,
                shared={name: digest(text) for name, text in sample.fields.items()},
                arms={arm: answer},
            )
        )
    found = results["results"][task]
    directions = results.get("higher_is_better", {}).get(task, {})
    keys = [f"{metric},{kind}" for metric, kind in run.metrics(task)]
    shots = results.get("n-shot", {}).get(task)
    return TaskRecord(
        version=str(results.get("versions", {}).get(task)),
        num_fewshot=shots if isinstance(shots, int) else None,
        higher_is_better={k: v for k, v in directions.items() if isinstance(v, bool)},
        scores={arm: {key: float(found[key]) for key in keys if _is_number(found[key])}},
        documents=tuple(documents),
    )


def _labels(samples: Sequence[Sample]) -> dict[tuple[int, str], int]:
    """Right choices of a multiple-choice task, by document and filter."""
    found = {}
    for kind in dict.fromkeys(sample.filter for sample in samples):
        own = [sample for sample in samples if sample.filter == kind]
        chosen = choice_scores(own)
        if chosen is not None:
            for sample, label in zip(own, chosen.labels.tolist(), strict=True):
                found[sample.doc_id, kind] = int(label)
    return found


def _answer(sample: Sample, responses: Sequence[Any]) -> StoredAnswer:
    numbers: list[float | None] = []
    for response in responses:
        value = response[0] if isinstance(response, (list, tuple)) and response else response
        if not _is_number(value):
            text = digest([str(one) for one in responses])
            return StoredAnswer(prediction=text, metrics=dict(sample.values))
        numbers.append(round(float(value), 6) if math.isfinite(value) else None)
    ranked = [-math.inf if number is None else number for number in numbers]
    best = max(range(len(ranked)), key=ranked.__getitem__) if len(ranked) > 1 else None
    return StoredAnswer(scores=tuple(numbers), prediction=best, metrics=dict(sample.values))


def _with_counters(
    answer: StoredAnswer,
    lm: CalibratedHFLM,
    arguments: Sequence[Sequence[Any]],
    contexts: dict[str, list[int]],
) -> StoredAnswer:
    """Add what calibration did to the document's prompts, each counted once."""
    found: dict[str, PromptRecord] = {}
    for given in arguments:
        context = str(given[0])
        for text in (context.rstrip(), context):
            if text not in contexts:
                contexts[text] = lm._prompt_tokens(text)
            key = prompt_key(contexts[text])
            if key in lm.counters.records:
                found[key] = lm.counters.records[key]
                break
    if not found:
        return answer
    return answer.model_copy(
        update={
            "sinks": sum(record.sinks for record in found.values()),
            "moved": float(f"{math.fsum(record.moved for record in found.values()):.8g}"),
            "near": any(record.near_threshold for record in found.values()),
        }
    )


def _join(arms: Mapping[str, TaskRecord]) -> TaskRecord:
    """Put the arms of a task together; all were asked the same."""
    first = next(iter(arms.values()))
    documents = []
    for together in zip(*(record.documents for record in arms.values()), strict=True):
        answers = {arm: answer for one in together for arm, answer in one.arms.items()}
        documents.append(together[0].model_copy(update={"arms": answers}))
    return first.model_copy(
        update={
            "scores": {arm: record.scores[arm] for arm, record in arms.items()},
            "documents": tuple(documents),
        }
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
