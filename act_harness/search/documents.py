"""Documents for the head search, as they were drawn and tokenised, and the file that holds them.

A search document is one multiple-choice question with the very prompt that an evaluation of the
same task would build (:mod:`act_harness.search.splits`). Here no lm-eval is needed, so that a
machine without it can search documents that were prepared elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from act_harness.errors import RecipeError, TaskError
from act_harness.support import atomic, reading
from act_harness.support.provenance import sha256_text

if TYPE_CHECKING:
    from act_harness.artifact import ModelFacts

__all__ = [
    "Document",
    "Split",
    "TaskDocuments",
    "digest_of",
    "facts_of_tokens",
    "read_documents",
    "write_documents",
]

Tokens = tuple[int, ...]

Split = Literal["search", "verify", "judge"]


@dataclass(frozen=True)
class Document:
    """One question: a (context, answer) pair of token sequences for each of its choices."""

    task: str
    key: str
    """lm-eval's hash of the document, as its sample files carry it."""
    requests: tuple[tuple[Tokens, Tokens], ...]
    right: int
    """Index of the right choice."""
    choices: tuple[str, ...] = ()
    """Texts of the choices; equal in all documents of a classification task."""

    def __post_init__(self) -> None:
        """Check that every answer follows something.

        Raises:
            TaskError: a context has no token.
        """
        if not self.requests or not all(context for context, _ in self.requests):
            raise TaskError(
                f"document {self.key} of {self.task} has a context without tokens, expected at "
                "least the model's prefix token; prepare the documents again"
            )

    @property
    def labelled(self) -> bool:
        """Whether one of its choices is known to be right."""
        return 0 <= self.right < len(self.requests)

    def check_choices(self, who: str) -> None:
        """Refuse a document with nothing to choose between.

        Args:
            who: needs two choices, for the error's line.

        Raises:
            RecipeError: it has one choice.
        """
        if len(self.requests) < 2:
            raise RecipeError(
                f"document {self.key} of task {self.task!r} has one choice, {who} needs at least "
                "two to tell apart; leave the task out"
            )


def digest_of(documents: Sequence[Document]) -> str:
    """Return one hash over documents as they were tokenised."""
    content = [[d.key, d.requests, d.right] for d in documents]
    return sha256_text(json.dumps(content))


@dataclass(frozen=True)
class TaskDocuments:
    """The drawn documents of one task, and where they came from."""

    task: str
    search: tuple[Document, ...]
    verify: tuple[Document, ...]
    source: str
    """Split they were drawn from: ``train``, ``validation``, or ``hash of <split>``."""
    evaluation: str
    """Split that an evaluation of the task uses."""
    too_long: int
    """Documents left out because the model's context is shorter."""
    num_fewshot: int = 0
    without_examples: bool = False
    """Whether the task itself allows no examples, whatever a recipe asks for."""
    held_out: tuple[Document, ...] = ()
    """Documents of the evaluation split, where they were asked for."""
    tokenizer_sha256: str | None = None
    """Hash of the tokenizer that made the tokens; None: not noted."""
    judge: tuple[Document, ...] = ()
    """Documents that neither find nor choose heads, and say what the chosen ones are worth; empty
    where a task has no more."""
    tokenizer_probe_sha256: str | None = None
    """What that tokenizer does, see :attr:`ModelFacts.tokenizer_probe_sha256`."""

    def of(self, split: Split) -> tuple[Document, ...]:
        """Return the documents of a split."""
        return {"search": self.search, "verify": self.verify, "judge": self.judge}[split]

    def digest(self, split: Split) -> str:
        """Return one hash over the documents of a split as they were tokenised."""
        return digest_of(self.of(split))


def write_documents(path: Path, documents: Sequence[TaskDocuments]) -> None:
    """Store drawn documents, so that a machine without lm-eval or data sets can search.

    The file holds token sequences and so the texts themselves: it is as private as the data.

    Raises:
        InfrastructureError: the file cannot be written.
    """
    atomic.write_json(path, [asdict(one) for one in documents], canonical=True)


def read_documents(path: Path) -> list[TaskDocuments]:
    """Read what :func:`write_documents` stored.

    Raises:
        TaskError: there is no such file, or it is no such file.
    """
    advice = "write it with `act-harness search --prepare`"
    content = reading.read_json(path, error=TaskError, advice=advice)
    try:
        return [
            TaskDocuments(
                **{
                    **one,
                    **{split: _documents(one[split]) for split in ("search", "verify", "held_out")},
                    "judge": _documents(one.get("judge", [])),  # older files have none
                }
            )
            for one in content
        ]
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise TaskError(
            f"{path} holds no search documents ({type(error).__name__}); {advice}"
        ) from error


def facts_of_tokens(facts: ModelFacts, documents: Sequence[TaskDocuments]) -> ModelFacts:
    """Return a model's facts with the tokenizer that made the documents' tokens.

    Where prepared documents are read, nothing is tokenised. Tokenizers are told apart by the ids
    they give, and by their files where an older document notes no more: releases of transformers
    read other special tokens off the same files.

    Raises:
        TaskError: the documents were made with several tokenizers, or by another than the model's.
    """
    keys = ("tokenizer_probe_sha256", "tokenizer_sha256")
    noted = [{key: getattr(one, key) for key in keys if getattr(one, key)} for one in documents]
    noted = [one for one in noted if one]
    if not noted:
        return facts
    key = keys[0] if all(keys[0] in one for one in noted) else keys[1]
    made = sorted({str(one.get(key)) for one in noted})
    if len(made) > 1:
        raise TaskError(
            f"the prepared documents come from {len(made)} tokenizers "
            f"({', '.join(name[:12] for name in made)}); prepare all of them again with one"
        )
    probe = facts.tokenizer_probe_sha256
    if key == keys[0] and probe is not None and probe != made[0]:
        raise TaskError(
            f"the prepared documents hold token ids of another tokenizer ({made[0][:12]}, the "
            f"model's is {probe[:12]}); prepare them with the tokenizer of {facts.id!r}"
        )
    return facts.model_copy(update=dict.fromkeys(keys) | noted[0])


def _documents(rows: list[dict[str, Any]]) -> tuple[Document, ...]:
    if not all(answer for row in rows for _, answer in row["requests"]):
        raise ValueError("an answer has no token")
    return tuple(
        Document(
            row["task"],
            row["key"],
            tuple((tuple(context), tuple(answer)) for context, answer in row["requests"]),
            row["right"],
            tuple(row["choices"]),
        )
        for row in rows
    )
