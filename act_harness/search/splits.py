"""The splits of a task for the head search, drawn out of lm-eval's own tasks.

The requests come from lm-eval's task objects, never from templates of our own. Three splits are
drawn, ``search`` (to find heads), ``verify`` (to choose among sets of them) and ``judge`` (to say
what the chosen set is worth), disjoint from each other and from the documents that an evaluation
uses: they come from the train split where the task has one, else from a validation split beside a
test split, else from the evaluation split itself, divided by a hash of the document (see
:func:`held_out`).

lm-eval is imported on first use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.errors import TaskError
from act_harness.search.documents import Document, TaskDocuments
from act_harness.search.prompting import Prompting, prompt_of, without_itself
from act_harness.support.failures import running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from act_harness.harness.task_lookup import TaskSelection

__all__ = [
    "evaluation_documents",
    "held_out",
    "load_documents",
    "open_to_search",
    "task_requests",
]


Encode = Callable[[str, str], tuple[Sequence[int], Sequence[int]]]


_PARTS = 4
"""A task without a second split gives its documents of hash 0, of 4, to search, and those of hash 1
to verify and judge."""

_DIVIDED = "hash of "
"""Before the name of an evaluation split that was divided so, in ``TaskDocuments.source``."""


def held_out(key: str) -> bool:
    """Say whether an evaluation may use a document of a task that was divided by hash.

    Args:
        key: lm-eval's hash of the document.
    """
    return _part(key) > 1


def open_to_search(documents: Iterable[Any], source: str) -> int:
    """Count the documents of an evaluation that a search of the same task may have drawn.

    Args:
        documents: Rows of the evaluation split.
        source: Where the search drew its documents from, as :class:`TaskDocuments` has it.
    """
    if not source.startswith(_DIVIDED):
        return 0
    return sum(not held_out(_document_hash(doc)) for doc in documents)


def _part(key: str) -> int:
    return int(key[:8], 16) % _PARTS


def load_documents(
    tasks: Sequence[str] | TaskSelection,
    *,
    samples: int,
    verify_samples: int,
    judge_samples: int = 0,
    seed: int,
    held_out_samples: int = 0,
    encode: Encode,
    max_length: int,
    prompting: Prompting | None = None,
    chat_template: Callable[..., str] | None = None,
    data_dir: Path | None = None,
    labels: bool = True,
) -> list[TaskDocuments]:
    """Draw and tokenise the documents of several tasks.

    Args:
        tasks: task or group names of lm-eval, stock or our own, or what ``find_tasks`` found.
        samples: documents per task of the search split.
        verify_samples: documents per task of the verify split; fewer where the task has no more.
        judge_samples: documents per task of the judge split. A task with too few for both shares
            what is left between the two, and has no judge split where that is less than four.
        seed: of the draw.
        held_out_samples: documents per task of the evaluation split, for a report of the search.
        encode: turns (context, continuation) texts into token sequences, as the model's scorer
            does.
        max_length: longest input of the model; longer documents are left out and counted.
        prompting: few-shot examples, chat template, system message.
        chat_template: renders a list of messages; needed with ``apply_chat_template``.
        data_dir: folder that datasets are read from.
        labels: refuse a document without one right choice; else it has ``right`` -1.

    Raises:
        TaskError: a task is unknown, not multiple choice, or has too few documents.
        InfrastructureError: its data cannot be had.
    """
    options = prompting or Prompting()
    with _datasets_from(data_dir):
        loaded = _load_tasks(tasks)
        result = []
        for name, task in loaded.items():
            draw = _Draw(name, task, options, encode, max_length, chat_template, labels=labels)
            with running(f"the documents of task {name!r}"):
                found = draw.documents(samples, verify_samples, seed, judge_samples=judge_samples)
                result.append(replace(found, held_out=draw.held_out(held_out_samples, seed)))
    return result


def evaluation_documents(
    tasks: Sequence[str] | TaskSelection,
    *,
    first: int = 0,
    count: int,
    encode: Encode,
    max_length: int,
    prompting: Prompting | None = None,
    chat_template: Callable[..., str] | None = None,
    data_dir: Path | None = None,
) -> Iterator[Document]:
    """Yield documents of tasks as an evaluation numbers them, to look at: none is drawn.

    Args:
        tasks: see :func:`load_documents`.
        first: number of the first document of each task, as ``doc_id`` in samples files.
        count: most documents of each task.
        encode: see :func:`load_documents`.
        max_length: longest input of the model; longer documents are left out.
        prompting: see :func:`load_documents`.
        chat_template: see :func:`load_documents`.
        data_dir: see :func:`load_documents`.

    Raises:
        TaskError: a task is unknown, not multiple choice, or has no such document.
        InfrastructureError: its data cannot be had.
    """
    options = prompting or Prompting()
    with _datasets_from(data_dir):
        for name, task in _load_tasks(tasks).items():
            draw = _Draw(name, task, options, encode, max_length, chat_template)
            with running(f"the documents of task {name!r}"):
                yield from draw.numbered(first, count)


def _datasets_from(data_dir: Path | None) -> Any:  # noqa: ANN401 - a context manager
    if data_dir is None:
        return nullcontext()
    from act_harness.harness.data_folder import data_directory

    return data_directory(data_dir)


def _load_tasks(tasks: Sequence[str] | TaskSelection) -> dict[str, Any]:
    """Load tasks, through groups and tags, by the name of each."""
    from act_harness.harness.task_lookup import (
        TaskSelection,
        find_tasks,
        load_tasks,
        single_tasks,
    )

    selection = tasks if isinstance(tasks, TaskSelection) else find_tasks(tasks)
    found = {task.task_name: task for task in single_tasks(load_tasks(selection))}
    for name, task in found.items():
        _check_kind(name, task)
    return found


def _check_kind(name: str, task: Any) -> None:  # noqa: ANN401 - lm-eval's Task
    kind = task.get_config("output_type")
    if kind != "multiple_choice":
        raise TaskError(f"task {name!r} is of type {kind}, expected multiple_choice; leave it out")


class _Draw:
    """Takes the documents of one task object."""

    def __init__(
        self,
        name: str,
        task: Any,  # noqa: ANN401 - lm-eval's Task
        prompting: Prompting,
        encode: Encode,
        max_length: int,
        chat_template: Callable[..., str] | None,
        *,
        labels: bool = True,
    ) -> None:
        self.name, self.task, self.prompting, self.labels = name, task, prompting, labels
        self.encode, self.max_length, self.chat_template = encode, max_length, chat_template
        own = task.get_config("num_fewshot")
        self.without_examples = own == 0
        if prompting.num_fewshot is not None and own != 0:  # as lm-eval's own evaluation does it
            task.set_config(key="num_fewshot", value=prompting.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=prompting.fewshot_seed)
        self.too_long = 0
        self._used = 0

    def documents(
        self, samples: int, verify_samples: int, seed: int, *, judge_samples: int = 0
    ) -> TaskDocuments:
        """Draw the splits; see :func:`load_documents`."""
        source, evaluation, search, verify = self._pools(seed)
        if isinstance(source, str) and not search:
            raise TaskError(f"task {self.name!r} has no documents outside its evaluation split")
        drawn = self._take(iter(search), samples)
        if len(drawn) < samples:
            raise TaskError(
                f"task {self.name!r} has {len(drawn)} documents for the search split ({source}), "
                f"the recipe asks for {samples}; lower samples"
                + (", or give the task a training_split" if source.startswith(_DIVIDED) else "")
                + self._left_out()
            )
        rest = iter(search[self._used :]) if verify is None else iter(verify)
        left = self._take(rest, verify_samples + judge_samples)
        checked, judged = _shared_out(left, verify_samples, judge_samples)
        if verify_samples and len(checked) < 2:
            raise TaskError(
                f"the verify split of task {self.name!r} is empty: {len(drawn)} documents go to "
                f"search and {len(checked)} remain ({source}); lower samples" + self._left_out()
            )
        return TaskDocuments(
            task=self.name,
            search=tuple(drawn),
            verify=tuple(checked),
            judge=tuple(judged),
            source=source,
            evaluation=evaluation,
            too_long=self.too_long,
            num_fewshot=int(self.task.get_config("num_fewshot") or 0),
            without_examples=self.without_examples,
        )

    def _left_out(self) -> str:
        """Return the end of an error's line: fewer samples help not where documents do not fit."""
        if not self.too_long:
            return ""
        return (
            f" ({self.too_long} more are longer than the model's {self.max_length} tokens, or have "
            "an empty answer)"
        )

    def held_out(self, count: int, seed: int) -> tuple[Document, ...]:
        """Draw from what an evaluation uses; fewer than ``count`` where there are no more."""
        divided = not self.task.has_training_docs() and not (
            self.task.has_test_docs() and self.task.has_validation_docs()
        )
        rows = self._ordered(self.task.eval_docs, set(), seed)
        return tuple(self._take(iter([r for r in rows if not divided or held_out(r[0])]), count))

    def numbered(self, first: int, count: int) -> Iterator[Document]:
        """Yield documents by their numbers in an evaluation; those that are too long are left out.

        Raises:
            TaskError: there is no document ``first``.
        """
        rows = self.task.eval_docs
        if first >= len(rows):
            raise TaskError(
                f"task {self.name!r} has documents 0..{len(rows) - 1}, not {first}; "
                "give the number of one of them"
            )
        for number in range(first, min(len(rows), first + count)):
            doc = rows[number]
            yield from self._take(iter([(_document_hash(doc), doc)]), 1)

    def _pools(self, seed: int) -> tuple[str, str, list[Any], list[Any] | None]:
        """Return source, evaluation split, and (hash, document) pools in the order of the draw."""
        task = self.task
        evaluation = "test" if task.has_test_docs() else "validation"
        if task.has_training_docs():
            source, rows = "train", task.training_docs()
        elif task.has_test_docs() and task.has_validation_docs():
            source, rows = "validation", task.validation_docs()
        else:
            pool = self._ordered(task.eval_docs, set(), seed)
            search = [row for row in pool if _part(row[0]) == 0]
            verify = [row for row in pool if _part(row[0]) == 1]
            return f"{_DIVIDED}{evaluation}", evaluation, search, verify
        taken = {self._identity(doc) for doc in task.eval_docs}
        return source, evaluation, self._ordered(rows, taken, seed), None

    def _ordered(self, rows: Iterable[Any], taken: set[str], seed: int) -> list[Any]:
        """Return (hash, document), each question once and none that is evaluated, shuffled."""
        pool = []
        for doc in rows:
            identity = self._identity(doc)
            if identity not in taken:
                taken.add(identity)
                pool.append((_document_hash(doc), doc))
        order = sorted(pool, key=lambda row: hashlib.sha256(f"{seed}:{row[0]}".encode()).digest())
        self._used = 0
        return order

    def _identity(self, doc: Any) -> str:  # noqa: ANN401 - a row of any dataset
        """Return what makes two rows the same question, whatever their running numbers are."""
        text = self.task.doc_to_text(doc)
        return json.dumps([text, self.task.doc_to_choice(doc)], default=str)

    def _take(self, rows: Iterator[Any], count: int) -> list[Document]:
        """Build documents until there are ``count``; what is too long is left out."""
        found: list[Document] = []
        for key, doc in rows if count else ():
            self._used += 1
            built = self._build(key, doc)
            longest = max(len(context) + len(answer) - 1 for context, answer in built.requests)
            if longest > self.max_length or not all(answer for _, answer in built.requests):
                self.too_long += 1
                continue
            found.append(built)
            if len(found) == count:
                break
        return found

    def _build(self, key: str, doc: Any) -> Document:  # noqa: ANN401
        task, options = self.task, self.prompting
        with without_itself(task):
            context = prompt_of(task, doc, options, self.chat_template)
        instances = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(self.name, 0, 1),
            apply_chat_template=options.apply_chat_template,
            chat_template=self.chat_template,
        )
        choices = tuple(str(choice) for choice in task.doc_to_choice(doc))
        requests = []
        for instance in instances[: len(choices)]:  # mutual information adds unconditional ones
            before, answer = self.encode(*instance.args[:2])
            requests.append((tuple(before), tuple(answer)))
        right = self._right(doc, choices)
        return Document(self.name, key, tuple(requests), right, choices)

    def _right(self, doc: Any, choices: tuple[str, ...]) -> int:  # noqa: ANN401
        """Return the index of the right choice, as the metric reads it; -1: none is known."""
        target = self.task.doc_to_text(doc) if self.task.multiple_input else None
        if target is None:
            target = self.task.doc_to_target(doc)
        if isinstance(target, str) and target in choices:
            target = choices.index(target)
        if not isinstance(target, int) or not 0 <= target < len(choices):
            if not self.labels:
                return -1
            raise TaskError(
                f"task {self.name!r} names {target!r} as the right choice of a document with "
                f"{len(choices)} choices, expected exactly one of them; mend its rows (a search by "
                "method 'gradient' with objective 'entropy' needs none)"
            )
        return target


def _shared_out(
    left: list[Document], verify: int, judge: int
) -> tuple[list[Document], list[Document]]:
    """Divide what the search left; half each where it is too little, and no split of one document.

    Args:
        left: documents in the order of the draw, at most ``verify + judge``.
        verify: how many the verify split wants.
        judge: how many the judge split wants.
    """
    count = max(len(left) - judge, min(verify, max(2, (len(left) + 1) // 2)))
    if len(left) - count < 2:
        return left[:verify], []
    return left[:count], left[count:]


def _document_hash(doc: Any) -> str:  # noqa: ANN401 - a row of any dataset
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


def task_requests(
    name: str, *, limit: int, num_fewshot: int = 0, data_dir: Path | None = None
) -> list[tuple[str, str]]:
    """Return (context, continuation) of a multiple-choice task's evaluation requests, in order.

    Prompts are built by lm-eval's own task object, as ``lm_eval --limit`` would.

    Raises:
        TaskError: the task is unknown or not multiple choice.
        InfrastructureError: its data cannot be had.
    """
    with _datasets_from(data_dir):
        (task,) = _load_tasks([name]).values()
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [tuple(instance.args) for instance in task.instances]
