"""Values that are read back only as they were written: each carries the hash of its own content.

Scores and states that a run goes on from are trusted without another look. A file that was edited,
mixed up or damaged on its disk would then become a wrong number, or an error far from its cause.

Not here: whether it belongs to the question at hand, which its reader compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_harness.errors import ActHarnessError, ResultError
from act_harness.support.atomic import plain, write_json
from act_harness.support.provenance import sha256_json
from act_harness.support.reading import read_json

__all__ = ["is_sealed", "read_sealed", "seal", "unsealed", "write_sealed"]

_SEAL = "sha256"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the hash of its content in ``sha256``.

    Args:
        content: What JSON can hold, without that key.
    """
    return {**content, _SEAL: _hash(content)}


def is_sealed(stored: object) -> bool:
    """Say whether something that was read has a seal, whole or broken."""
    return isinstance(stored, dict) and _SEAL in stored


def unsealed(
    stored: object, *, source: str, advice: str, error: type[ActHarnessError] = ResultError
) -> dict[str, Any]:
    """Return what :func:`seal` was given.

    Args:
        stored: What was read.
        source: Where it was read, for the error's line.
        advice: What to do about it, the end of the error's line.
        error: Raised where it is anything else.

    Raises:
        ActHarnessError: ``error``: it was changed since it was written.
    """
    if isinstance(stored, dict):
        content = {key: value for key, value in stored.items() if key != _SEAL}
        if stored.get(_SEAL) == _hash(content):
            return content
    raise error(f"{source} is not as it was written: its sha256 is another; {advice}")


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal.

    Raises:
        InfrastructureError: the file cannot be written.
    """
    write_json(path, seal(content), canonical=True)


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote: something that is computed again where it is missing.

    Raises:
        ResultError: it was changed since it was written.
        InfrastructureError: it cannot be read.
    """
    advice = "delete it, and it is computed again"
    return unsealed(read_json(path, advice=advice), source=str(path), advice=advice)


def _hash(content: Mapping[str, Any]) -> str:
    return sha256_json(plain(content))  # plain: as it is after a way through a file, NaN included
