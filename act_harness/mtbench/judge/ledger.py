"""Judgments on the disk: one JSON line each, appended as they come, never made twice.

A judgment's key is the hash of the whole request (prompt with question, answers and references;
judge; settings) and of its repeat number. Equal answers of two arms therefore share one judgment,
and a changed answer, prompt or judge is a new one. A missing rating is kept for the record and
asked for again by the next run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from act_harness.errors import ResultError
from act_harness.support import atomic, places, reading
from act_harness.support.provenance import sha256_json

__all__ = ["Judgment", "JudgmentLedger", "Judgments", "judgment_key"]

_FILE = "judgments.jsonl"


class Judgment(BaseModel):
    """One verdict about one answer, or that there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["act-harness/judgment/1"] = Field(
        default="act-harness/judgment/1", validation_alias="schema", serialization_alias="schema"
    )
    key: str
    question: str
    category: str
    turn: int
    repeat: int
    prompt: str
    """Name of the judge prompt."""
    judge: str
    rating: float | None
    """From 1 to 10; None: missing."""
    reason: str
    """Why it is missing."""
    verdict: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    created: str


def judgment_key(messages: list[dict[str, str]], judge: dict[str, Any], repeat: int) -> str:
    """Return the key of a judgment: the hash of everything that decides it."""
    return sha256_json({"messages": messages, "judge": judge, "repeat": repeat})


class Judgments:
    """The judgments of one output folder, as they are when it is read."""

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Raises:
            ResultError: the file holds something else.
        """
        self.path = folder / _FILE
        self._known: dict[str, Judgment] = {}
        for number, record in enumerate(reading.read_lines(self.path, missing_ok=True), start=1):
            try:
                self._keep(Judgment.model_validate(record))
            except ValidationError as error:
                raise ResultError(
                    f"{self.path}: line {number} is no judgment ({error.errors()[0]['msg']}); "
                    "move the file away, or give another --output"
                ) from None

    def _keep(self, judgment: Judgment) -> None:
        before = self._known.get(judgment.key)
        if before is None or before.rating is None:
            self._known[judgment.key] = judgment

    def find(self, key: str) -> Judgment | None:
        """Return the judgment of a key; a rating if there ever was one."""
        return self._known.get(key)

    def rated(self, key: str) -> bool:
        """Say whether a key needs no call."""
        found = self._known.get(key)
        return found is not None and found.rating is not None


class JudgmentLedger(Judgments):
    """The same, to be added to; see :meth:`opened`."""

    def add(self, judgment: Judgment) -> None:
        """Append a judgment; it is on the disk when this returns.

        Raises:
            InfrastructureError: the file cannot be written.
        """
        atomic.append_line(self.path, judgment.model_dump(mode="json", by_alias=True))
        self._keep(judgment)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[JudgmentLedger]:
        """Keep other judges away from a folder, and only then read what is there.

        Raises:
            InputError: another process judges into this folder.
            ResultError: the file holds something else.
        """
        refusal = f"another judge is writing to {folder}; wait for it, or give another --output"
        with places.sole_writer(folder / ".judging", refusal):
            yield cls(folder)
