"""What the calibrations of scores need beside an evaluation's answers, asked of the model.

``act-harness eval --calibrators`` asks it in each arm anew, with the arm's heads in force, and
stores it beside the arm's samples. The further prompts are those of lm-eval's own task objects, of
documents whose texts are replaced or whose options are rotated, so that they hold for any task of
type multiple choice. Where one does not apply to a task, a line says so.

The first process of several asks all of it.

Not here: what is computed from it (:mod:`act_harness.evidence.calibrators`).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from act_harness.errors import InputError
from act_harness.evidence.calibrators import CalibratorInputs, LabelledScores, lengths_of
from act_harness.search.prompting import Prompting, prompt_of
from act_harness.support.failures import running
from act_harness.support.sequences import common_start

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.harness.task_lookup import TaskSelection
    from act_harness.model import CalibratedHFLM
    from act_harness.search.documents import Document

__all__ = ["CONTENT_FREE", "InputsOfArm", "Prompts", "labelled_documents", "premise_of"]

_logger = logging.getLogger(__name__)

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs without content, as Zhao et al. (2021) take them."""

_SHARE, _LEAST = 0.05, 20
"""Documents whose options are rotated: this share of a task's, and no fewer than that number."""

Doc = dict[str, Any]
Labelled = Mapping[str, Sequence["Document"]]


class _DoesNotApplyError(Exception):
    """A calibration says nothing about a task; the text says why."""


@dataclass(frozen=True)
class Prompts:
    """How an evaluation builds prompts, to build further ones alike."""

    prompting: Prompting
    chat_template: Callable[..., str] | None

    def of(self, task: Any, doc: Doc) -> str:  # noqa: ANN401 - lm-eval's Task
        """Return a document's prompt; every call draws the same examples."""
        task.set_fewshot_seed(seed=self.prompting.fewshot_seed)
        text = prompt_of(task, doc, self.prompting, self.chat_template)
        if not isinstance(text, str):
            raise _DoesNotApplyError("its prompts differ by choice")
        return text


@dataclass(frozen=True)
class _Asked:
    """A task as one arm answered it."""

    task: Any
    docs: tuple[Doc, ...]
    hashes: frozenset[str]
    contexts: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    """Continuations of each document."""

    @classmethod
    def of(cls, task: Any, rows: Sequence[Mapping[str, Any]]) -> _Asked:  # noqa: ANN401
        first = {row["doc_id"]: row for row in rows}.values()  # a row for every filter
        pairs = [[tuple(given[:2]) for given in row["arguments"]] for row in first]
        if any(len({context for context, _ in one}) > 1 for one in pairs):
            raise _DoesNotApplyError("its prompts differ by choice")
        return cls(
            task,
            tuple(row["doc"] for row in first),
            frozenset(str(row["doc_hash"]) for row in first),
            tuple(one[0][0] for one in pairs),
            tuple(tuple(choice for _, choice in one) for one in pairs),
        )

    def fixed(self) -> tuple[str, ...]:
        """Return the choices where they are the same for every document."""
        if len(set(self.choices)) > 1:
            raise _DoesNotApplyError("its choices differ by document")
        return self.choices[0]


@dataclass
class InputsOfArm:
    """Asks a model, in whatever arm is in force, what calibrations need."""

    lm: CalibratedHFLM
    names: Sequence[str]
    """Of the calibrations, see :func:`act_harness.evidence.calibrators.calibrator_names`."""
    prompts: Prompts
    labelled: Labelled
    """Documents that the search saw, by task; empty without ``supervised``."""
    _left_out: dict[tuple[str, str], list[str]] = field(
        default_factory=lambda: defaultdict(list), init=False
    )

    def collect(
        self, tasks: Sequence[Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """Ask for every task, and say in a line for which a calibration does not apply.

        Args:
            tasks: lm-eval's task objects as they were evaluated.
            samples: Their samples, as ``simple_evaluate`` returns them.

        Returns:
            Task to :class:`CalibratorInputs` as plain values, tasks without any left out.

        Raises:
            TaskError: A task fails on a document without content or with rotated options.
        """
        if not set(self.names) - {"batch"}:
            return {}
        # Further prompts are no part of what was evaluated.
        counters, requests = self.lm.counters, self.lm.requests
        self.lm.counters, self.lm.requests = type(counters)(), []
        try:
            with self.lm.alone():
                found = self._of_tasks(tasks, samples)
        finally:
            self.lm.counters, self.lm.requests = counters, requests
        for (name, why), without in self._left_out.items():
            _logger.warning("no %s for %s: %s", name, ", ".join(without), why)
        self._left_out.clear()
        return found

    def _of_tasks(
        self, tasks: Sequence[Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        found = {}
        for task in tasks:
            rows = samples.get(task.task_name)
            if rows and task.get_config("output_type") == "multiple_choice":
                inputs = self._of_task(task, rows).model_dump(mode="json", exclude_none=True)
                if inputs:
                    found[task.task_name] = inputs
        return found

    def _of_task(self, task: Any, rows: Sequence[Mapping[str, Any]]) -> CalibratorInputs:  # noqa: ANN401
        asks: dict[str, tuple[str, Callable[[_Asked], Any]]] = {
            "content-free": ("content_free", self._content_free),
            "domain-pmi": ("premise", self._premise),
            "pride": ("rotated", self._rotated),
            "supervised": ("labelled", self._labelled),
        }
        found = {}
        for name in self.names:
            if name not in asks:
                continue
            key, ask = asks[name]
            try:
                with running(f"the further prompts of task {task.task_name!r} for {name}"):
                    found[key] = ask(_Asked.of(task, rows))
            except _DoesNotApplyError as error:
                self._left_out[name, str(error)].append(task.task_name)
        return CalibratorInputs(**found)

    def _content_free(self, asked: _Asked) -> list[list[float]]:
        choices, doc = asked.fixed(), asked.docs[0]
        kept = {choice.strip() for choice in choices}
        contexts = [self.prompts.of(asked.task, _emptied(doc, text, kept)) for text in CONTENT_FREE]
        if self.prompts.of(asked.task, doc) in contexts:
            raise _DoesNotApplyError("no text of its documents stands in its prompts")
        return self._ask([[(context, c) for c in choices] for context in contexts])

    def _premise(self, asked: _Asked) -> dict[str, float]:
        choices = list(dict.fromkeys(choice for row in asked.choices for choice in row))
        premise = premise_of(asked.contexts)
        (scores,) = self._ask([[(premise, choice) for choice in choices]])
        return dict(zip(choices, scores, strict=True))

    def _rotated(self, asked: _Asked) -> list[list[list[float]]]:
        choices = asked.fixed()
        turns, count = range(len(choices)), len(asked.docs)
        number = min(count, max(_LEAST, math.ceil(_SHARE * count)))
        rows = []
        for index in range(number):  # evenly over the documents
            doc = asked.docs[index * count // number]
            contexts = [self.prompts.of(asked.task, _turned(doc, choices, n)) for n in turns]
            if len(set(contexts)) == 1:
                raise _DoesNotApplyError("its documents have no options behind fixed letters")
            rows += [[(context, choice) for choice in choices] for context in contexts]
        scores = self._ask(rows)
        return [scores[start : start + len(turns)] for start in range(0, len(scores), len(turns))]

    def _labelled(self, asked: _Asked) -> LabelledScores:
        documents = self.labelled.get(asked.task.task_name)
        if not documents:
            raise _DoesNotApplyError("the search saw no documents of it")
        both = sum(document.key in asked.hashes for document in documents)
        if both:
            _logger.warning(
                "task %s: %d of the evaluated documents are among those that the supervised "
                "scaling is fitted on; its column flatters both arms",
                asked.task.task_name,
                both,
            )
        answers = iter(
            self.lm._loglikelihood_tokens(
                [
                    (("", ""), list(context), list(answer))
                    for document in documents
                    for context, answer in document.requests
                ]
            )
        )
        return LabelledScores(
            scores=tuple(
                tuple(_finite(next(answers)[0]) for _ in document.requests)
                for document in documents
            ),
            labels=tuple(document.right for document in documents),
            lengths=tuple(lengths_of(document.choices) for document in documents),
            same_choices=len({document.choices for document in documents}) == 1,
        )

    def _ask(self, rows: Sequence[Sequence[tuple[str, str]]]) -> list[list[float]]:
        """Return log-likelihoods of (context, continuation) pairs, in their rows."""
        from lm_eval.api.instance import Instance

        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
            for index, pair in enumerate(pair for row in rows for pair in row)
        ]
        answers = iter(self.lm.loglikelihood(requests))
        return [[_finite(next(answers)[0]) for _ in row] for row in rows]


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise _DoesNotApplyError("a score is not finite")
    return score


def premise_of(contexts: Sequence[str]) -> str:
    """Return what all prompts of a task end with, from its first whole line or word on.

    That is what is left of a prompt when the document is taken out: "Answer:" where that is the
    last line of each, nothing where prompts are texts to be continued.

    Args:
        contexts: Prompts of the task's documents.

    Raises:
        _DoesNotApplyError: All prompts are the same.
    """
    distinct = set(contexts)
    if len(distinct) < 2:
        raise _DoesNotApplyError("its prompts do not differ")
    reversed_ = [one[::-1] for one in distinct]
    common = reversed_[0][: common_start(reversed_)][::-1]
    for gap in ("\n", " "):
        _, there, rest = common.partition(gap)
        if there and rest.strip():
            return rest.lstrip()
    return ""


def _emptied(value: Any, text: str, kept: set[str]) -> Any:  # noqa: ANN401 - a row of any dataset
    """Replace every text of a document that is not a choice."""
    if isinstance(value, str):
        return value if value.strip() in kept else text
    if isinstance(value, Mapping):
        return {key: _emptied(one, text, kept) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_emptied(one, text, kept) for one in value]
    return value


def _turned(value: Any, letters: Sequence[str], places: int) -> Any:  # noqa: ANN401
    """Move a document's options on by some places: lists of texts, or fields named by letters."""
    names = [letter.strip() for letter in letters]
    size = len(names)
    if isinstance(value, Mapping):
        turned = {key: _turned(one, letters, places) for key, one in value.items()}
        if all(isinstance(value.get(name), str) for name in names):
            turned |= {name: value[names[n - places]] for n, name in enumerate(names)}
        return turned
    options = isinstance(value, (list, tuple)) and len(value) == size
    if options and all(isinstance(one, str) and one.strip() not in names for one in value):
        return [value[n - places] for n in range(size)]
    return value


def labelled_documents(
    lm: CalibratedHFLM, artifact: Artifact | None, selection: TaskSelection, tasks: Sequence[str]
) -> dict[str, tuple[Document, ...]]:
    """Draw again the labelled documents that a search saw, of the tasks that are evaluated.

    Args:
        lm: The model, whose tokenizer makes the documents' tokens.
        artifact: What the search found; it names its recipe and its documents' hashes.
        selection: Where the evaluated tasks were found.
        tasks: Their names.

    Returns:
        Task to the documents of the splits search and verify.

    Raises:
        InputError: The artifact names no documents, none of these tasks, or other documents than
            can be drawn now.
    """
    from act_harness.search.command import search_documents
    from act_harness.search.recipe import make_recipe

    search = (artifact.search if artifact else None) or {}
    recipe, splits = search.get("recipe"), search.get("splits")
    if artifact is None or not isinstance(recipe, dict) or not isinstance(splits, dict):
        found = "there is none" if artifact is None else f"{artifact.name!r} names none"
        raise InputError(
            "--calibrators supervised needs an artifact that names the documents of its search; "
            f"{found}, so leave it out or give one that act-harness search wrote"
        )
    names = tuple(task for task in tasks if task in splits)
    if not names:
        raise InputError(
            f"--calibrators supervised: the search of artifact {artifact.name!r} saw "
            f"{', '.join(splits)}, none of --tasks; leave it out or evaluate one of them"
        )
    made = make_recipe(recipe, source=f"the recipe in artifact {artifact.name!r}")
    drawn = search_documents(made, lm, selection=selection._replace(names=names))
    for one in drawn:
        for split in ("search", "verify"):
            noted, now = splits[one.task].get(split, {}).get("sha256"), one.digest(split)
            if noted != now:
                raise InputError(
                    f"--calibrators supervised: the {split} documents of task {one.task!r} drawn "
                    f"now ({now[:12]}) are not those of artifact {artifact.name!r} "
                    f"({str(noted)[:12]}); use the data of the search, or leave it out"
                )
    return {one.task: (*one.search, *one.verify) for one in drawn}
