"""Answers that survive a kill: JSON lines, one file per process, appended as answers come.

A folder holds the answers of one arm under one set of settings; its name carries both, so that
nothing can be given to the other arm. Every record also carries the hash of the prompt's token ids:
a question, chat template or earlier answer that changed makes the record unusable, not wrong.
No torch here.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from act_harness.errors import ResultError
from act_harness.support import atomic, places, reading
from act_harness.support.provenance import sha256_json

__all__ = ["Answer", "AnswerStore", "answers_folder"]


@dataclass(frozen=True)
class Answer:
    """One turn of one conversation as the model answered it."""

    question: str
    """Id of the question."""
    turn: int
    """1 or 2."""
    prompt_sha256: str
    """Hash of the prompt's token ids."""
    prompt_tokens: int
    text: str
    """The answer without special tokens and outer white space."""
    tokens: int
    """New tokens, the end token not counted."""
    finish: str
    """``stop`` (the model ended), ``length`` (limit of new tokens), ``context`` (the model's
    context was full) or ``skipped`` (the prompt did not fit)."""
    calibration: dict[str, Any] | None = None
    """What calibration did to the prompt (a ``PromptRecord``); None in the baseline."""


_KEY_TYPES = {"question": str, "turn": int, "prompt_sha256": str, "text": str}
_FIELDS = {field.name for field in fields(Answer)}


def answers_folder(setting: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder that ``answers=`` of the model arguments means; None keeps nothing.

    Not given: a folder in the user's cache (``XDG_CACHE_HOME``), because the model never learns
    where lm-eval writes.
    """
    if setting is None or str(setting).lower() == "none":
        return None
    if str(setting):
        return Path(setting).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "act-harness" / "answers"


class AnswerStore:
    """The answers of one arm under one set of settings, open for one run at a time.

    Two runs of one arm under the same settings write to the same files, and one would cut the
    other's line while it is being written. Every process of a run holds the lock of its own file;
    all runs have a first process, so no two get past each other.
    """

    def __init__(
        self, folder: Path | None, *, arm: str, settings: dict[str, Any], rank: int = 0
    ) -> None:
        """Lock the place and read what is there.

        Args:
            folder: where the folders of all arms are; None: nothing is kept.
            arm: name of the arm, for people; its hash belongs into ``settings``.
            settings: everything that decides an answer, but for the prompt.
            rank: number of this process; it appends to a file of its own.

        Raises:
            InputError: another run is writing there.
            ResultError: a file there is not one of answers.
            InfrastructureError: a file cannot be read or written.
        """
        self._known: dict[tuple[str, int, str], Answer] = {}
        self._held = ExitStack()
        self.folder: Path | None = None
        if folder is None:
            return
        name = places.file_name(arm, longest=40)
        self.folder = folder / f"{name}-{sha256_json(settings)[:16]}"
        self._file = self.folder / f"rank-{rank}.jsonl"
        refusal = (
            f"another run is writing its answers to {self.folder}; wait for it, or give another "
            "folder as answers=DIR in the model's arguments"
        )
        with ExitStack() as held:
            held.enter_context(places.sole_writer(self.folder / f"lock-{rank}", refusal))
            self._read()
            if not (self.folder / "settings.json").is_file():
                atomic.write_json(self.folder / "settings.json", settings)
            self._held = held.pop_all()

    def _read(self) -> None:
        for path in sorted(self.folder.glob("rank-*.jsonl") if self.folder else ()):
            for record in reading.read_lines(path, missing_ok=True):
                answer = _answer(record, path)
                place = (answer.question, answer.turn, answer.prompt_sha256)
                self._known.setdefault(place, answer)

    def close(self) -> None:
        """Let other runs write here."""
        self._held.close()

    def find(self, question: str, turn: int, prompt_sha256: str) -> Answer | None:
        """Return the kept answer to exactly this prompt, or None."""
        return self._known.get((question, turn, prompt_sha256))

    def add(self, answers: list[Answer]) -> None:
        """Append answers; they are on the disk when this returns.

        Raises:
            InfrastructureError: the file cannot be written.
        """
        if self.folder is not None and answers:
            atomic.append_lines(self._file, [asdict(answer) for answer in answers])


def _answer(record: Any, path: Path) -> Answer:  # noqa: ANN401 - any JSON value
    fits = isinstance(record, dict) and set(record) == _FIELDS
    if not fits or not all(isinstance(record[name], kind) for name, kind in _KEY_TYPES.items()):
        raise ResultError(
            f"{path} does not hold answers of this version; move it away, or give another folder "
            "as answers=DIR in the model's arguments"
        )
    return Answer(**record)
