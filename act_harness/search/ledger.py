"""The ledger: every measurement of a search, one JSON line each, appended and never changed.

A ledger is a folder named by the hash of all that decides the numbers (what a recipe measures,
model, documents, kind of device); each process appends to a file of its own in it, so processes
never write to one file. A line is a unit of work with its key; a rerun reads all lines, skips the
units that are there and measures the rest. A line that was being written when a process was killed
is cut off by the next append, one that was changed afterwards is refused. Two searches with one
ledger at a time are refused.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from act_harness.errors import ResultError
from act_harness.support import atomic, places, reading, sealed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MeasuredUnits", "SearchLedger"]

Key = tuple[Any, ...]


class MeasuredUnits(Protocol):
    """Measured units by key: a :class:`SearchLedger`, or one that is kept in memory alone."""

    def __contains__(self, key: Key) -> bool: ...

    def get(self, key: Key) -> dict[str, Any]:
        """Return a unit that is there."""

    def add(self, key: Key, value: dict[str, Any]) -> None:
        """Keep a unit."""

    def reload(self) -> None:
        """Read what other processes have added."""


VERSION = 4

_DAMAGED = "delete the folder to start over"


class SearchLedger:
    """The measurements of one search, on disk and in memory."""

    def __init__(self, folder: Path, *, identity: dict[str, Any], rank: int = 0) -> None:
        """Read what is there; :meth:`opened` is the way to a ledger that can be added to.

        Args:
            folder: its folder, named by the hash of ``identity``.
            identity: all that decides the numbers; stored beside the lines for people.
            rank: number of this process.

        Raises:
            ResultError: a line within a file is damaged (only a cut last line is expected).
            InfrastructureError: the folder cannot be read or written.
        """
        self.folder, self.rank = folder, rank
        self.path = folder / f"part-{rank:03d}.jsonl"
        self.units: dict[Key, dict[str, Any]] = {}
        self.found = 0
        """Units that were there when the ledger was opened."""
        self._read: dict[Path, int] = {}
        """Lines of each file that are known: they never change."""
        if rank == 0:
            about = folder / "identity.json"
            if not about.is_file():
                atomic.write_json(about, {"version": VERSION, **identity})
        self.reload()
        self.found = len(self.units)

    def reload(self) -> None:
        """Read the lines of all processes that were not read before."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            known = self._read.get(path, 0)
            for number, line in enumerate(reading.read_lines(path, skip=known), start=known + 1):
                unit = line
                if sealed.is_sealed(line):  # else of a version that did not seal
                    unit = sealed.unsealed(line, source=f"{path}: line {number}", advice=_DAMAGED)
                whole = isinstance(unit, dict) and isinstance(unit.get("key"), list)
                if not (whole and isinstance(unit.get("value"), dict)):
                    raise ResultError(f"{path}: line {number} is no unit of a ledger; {_DAMAGED}")
                self.units.setdefault(tuple(unit["key"]), unit["value"])
                self._read[path] = number

    def __contains__(self, key: Key) -> bool:
        return key in self.units

    def get(self, key: Key) -> dict[str, Any]:
        """Return a unit that is there."""
        return self.units[key]

    def add(self, key: Key, value: dict[str, Any]) -> None:
        """Append a unit; it is on the disk when this returns.

        Raises:
            InfrastructureError: it could not be written; earlier lines are still there.
        """
        atomic.append_line(self.path, sealed.seal({"key": list(key), "value": value}))
        self.units[key] = value

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, folder: Path, *, identity: dict[str, Any], rank: int = 0
    ) -> Iterator[SearchLedger]:
        """Keep other searches out of this process's file, and only then read what is there.

        Args:
            folder: as for the class; likewise the next two.
            identity: see there.
            rank: see there.

        Raises:
            InputError: another process is appending to it.
            ResultError: as for the class.
            InfrastructureError: as for the class.
        """
        refusal = f"another search is writing to {folder}; wait for it or end it"
        with places.sole_writer(folder / f"lock-{rank:03d}", refusal):
            yield cls(folder, identity=identity, rank=rank)
