"""The one place where files and texts from outside become values: JSON, JSON lines and YAML.

Everything that is read here was written by somebody else, an earlier version or a killed process,
so the form is checked as strictly as the formats allow: each key once, bounded nesting and size,
whole numbers of 64 bits, no NaN, no half of a surrogate pair. What an evaluation wrote is read with
``lenient=True``: a model's output holds such things, and a result must not be lost to them.

Not here: what the values mean (each format's own module), and writing
(:mod:`act_harness.support.atomic`).
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from pydantic import BaseModel

from act_harness.errors import ActHarnessError, InfrastructureError, ResultError, nearest
from act_harness.support.strict_yaml import MOST_DEPTH, WIDEST, Loader, shown

__all__ = [
    "is_file",
    "is_folder",
    "nearest_beside",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_lines",
    "read_text",
    "read_yaml",
    "validated",
]

MOST_BYTES = 1 << 30
"""Of a JSON file or of one JSON line."""
MOST_YAML_BYTES = 1 << 22
"""Of a file of settings; PyYAML takes a minute for so much."""

Model = TypeVar("Model", bound=BaseModel)
HalfLine = Literal["drop", "refuse", "keep"]

_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)
_LONG_NUMBER = re.compile(r"\d{18}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# The path is wrong, not the disk: the caller's own kind of error.
_WRONG_PATH = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class _RefusedError(ValueError):
    """Well-formed, but not taken; the text says why."""


# -- files -----------------------------------------------------------------------------------------


def is_file(path: str | os.PathLike[str]) -> bool:
    """Say whether there is a file; a name that no file can have is none (not an OSError)."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Say whether there is a folder; a name that no folder can have is none (not an OSError)."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def nearest_beside(path: str | os.PathLike[str], *patterns: str) -> str:
    """Return ``"; did you mean 'out/heads.json'?"`` where a path that is not there has such a kin.

    Args:
        path: What was named.
        patterns: Of what may have been meant, as ``Path.glob`` takes them, in the path's own
            folder: ``*.yaml``, or ``*/config.json`` for a folder that holds one; without any, all.

    Returns:
        An empty string where nothing in that folder has a name like it.
    """
    place = Path(path)
    depth = len(place.parent.parts)
    try:
        found = [kin for pattern in patterns or ("*",) for kin in place.parent.glob(pattern)]
    except (OSError, ValueError):
        return ""
    near = nearest(place.name, sorted({kin.parts[depth] for kin in found}))
    return f"; did you mean {str(place.with_name(near))!r}?" if near else ""


def read_text(
    path: str | os.PathLike[str],
    *,
    error: type[ActHarnessError] = ResultError,
    advice: str = "check the path",
    most_bytes: int = MOST_BYTES,
) -> str:
    """Read a file of UTF-8 text (a byte order mark is left out; ``*.gz`` is unpacked).

    Args:
        path: The file.
        error: Raised where the path or the content is to blame.
        advice: What to do about it, the end of the error's line.
        most_bytes: Larger files are refused before they fill the memory.

    Raises:
        ActHarnessError: ``error``: there is no such file, it is too large, or no UTF-8.
        InfrastructureError: It is there and cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            if str(path).endswith(".gz"):
                data = gzip.GzipFile(fileobj=stream).read(most_bytes + 1)
            else:
                data = stream.read(most_bytes + 1)
    except (OSError, EOFError, ValueError, zlib.error) as problem:
        _cannot_read(path, problem, error, advice)
    if len(data) > most_bytes:
        raise error(f"{path} holds more than {most_bytes} bytes; {advice}")
    return _decoded(data, str(path), error, advice)


def read_json(
    path: str | os.PathLike[str],
    *,
    error: type[ActHarnessError] = ResultError,
    advice: str = "check the path",
    lenient: bool = False,
) -> Any:  # noqa: ANN401 - any JSON value
    """Read a JSON file; see :func:`read_text` and :func:`parse_json` for arguments and errors."""
    text = read_text(path, error=error, advice=advice)
    return parse_json(text, source=str(path), error=error, advice=advice, lenient=lenient)


def read_yaml(
    path: str | os.PathLike[str],
    *,
    error: type[ActHarnessError] = ResultError,
    advice: str = "check the path",
) -> Any:  # noqa: ANN401 - any YAML value
    """Read a YAML file; see :func:`read_text` and :func:`parse_yaml` for arguments and errors."""
    text = read_text(path, error=error, advice=advice, most_bytes=MOST_YAML_BYTES)
    return parse_yaml(text, source=str(path), error=error, advice=advice)


def read_lines(
    path: str | os.PathLike[str],
    *,
    half_line: HalfLine = "drop",
    skip: int = 0,
    missing_ok: bool = False,
    error: type[ActHarnessError] = ResultError,
    advice: str = "repeat the run that wrote it",
    lenient: bool = True,
) -> Iterator[Any]:
    """Yield the JSON values of a file, a line each; empty lines are skipped.

    Args:
        path: The JSON-lines file.
        half_line: A last line without a newline was being written when its process ended: leave it
            out (``drop``, for files that grow), ``refuse`` the file (for files that are written
            whole), or ``keep`` it (for files that people write).
        skip: Lines at the beginning that are left out, whatever they hold: read before.
        missing_ok: A file that does not exist has no lines, instead of being an error.
        error: As for :func:`read_text`.
        advice: The same.
        lenient: As for :func:`parse_json`; this package's own lines hold a model's output.

    Raises:
        ActHarnessError: ``error``: the file does not exist, or a line (which is named) is not JSON.
        InfrastructureError: The file cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            number = 0
            while line := stream.readline(MOST_BYTES + 1):
                number += 1
                if number <= skip:
                    continue
                source = f"{path}: line {number}"
                if len(line) > MOST_BYTES:
                    raise error(f"{source} holds more than {MOST_BYTES} bytes; {advice}")
                if not line.endswith(b"\n"):
                    if half_line == "drop":
                        return
                    if half_line == "refuse":
                        raise error(
                            f"{source} is cut off (no newline at the end of the file); copy the "
                            f"file again or {advice}"
                        )
                text = _decoded(line, source, error, advice)
                if text.strip():
                    yield parse_json(
                        text, source=source, error=error, advice=advice, lenient=lenient
                    )
    except (OSError, ValueError) as problem:
        if not (missing_ok and isinstance(problem, FileNotFoundError)):
            _cannot_read(path, problem, error, advice)


def _decoded(data: bytes, source: str, error: type[ActHarnessError], advice: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise error(
            f"{source} is not UTF-8 (line {line}: byte {problem.start}); {advice}"
        ) from None


def _cannot_read(
    path: str | os.PathLike[str], problem: Exception, error: type[ActHarnessError], advice: str
) -> NoReturn:
    shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
    if isinstance(problem, FileNotFoundError):
        hint = nearest_beside(path)
        raise error(f"{shown}: no such file; {advice}{hint}") from problem
    reason = getattr(problem, "strerror", None) or str(problem)
    if not isinstance(problem, OSError) or problem.errno in (None, *_WRONG_PATH):
        raise error(f"cannot read {shown}: {reason}; {advice}") from problem
    raise InfrastructureError(f"cannot read {shown}: {reason}; check the disk") from problem


# -- JSON ------------------------------------------------------------------------------------------


def parse_json(
    text: str,
    *,
    source: str,
    error: type[ActHarnessError] = ResultError,
    advice: str = "check the file",
    lenient: bool = False,
) -> Any:  # noqa: ANN401 - any JSON value
    """Parse one JSON value, each key once and at most :data:`MOST_DEPTH` levels deep.

    Args:
        text: The JSON text.
        source: What it is, for the error's line.
        error: Raised where it is not JSON, or more than is taken.
        advice: What to do about it, the end of the error's line.
        lenient: Take NaN and infinities, half a surrogate pair, and wider integers (as floats), as
            the output of a model holds them; otherwise they are errors.

    Raises:
        ActHarnessError: ``error``, in one line.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _object}
    if not lenient:
        hooks |= {"parse_constant": _refuse_constant, "parse_float": _finite}
    if _LONG_NUMBER.search(text):
        hooks["parse_int"] = _wide if lenient else _narrow
    try:
        _check_depth(text)
        value = json.loads(text, **hooks)
        if not lenient and _SURROGATE.search(text):
            _check_surrogates(value)
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}: {problem.msg}" if "\n" in text.strip() else problem.msg
        raise error(f"{source} is not JSON ({place}); {advice}") from None
    except _RefusedError as problem:
        raise error(f"{source}: {problem}; {advice}") from None
    return value


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    depth = 0
    for found in _BRACKETS.finditer(text):
        mark = found.group()
        if mark in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                raise _RefusedError(f"nested more than {MOST_DEPTH} levels deep")
        elif mark in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {shown(key)} stands there twice")
            seen.add(key)
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _RefusedError(f"the number {shown(text)} is too large")
    return number


def _narrow(text: str) -> int:
    if len(text) > 21 or abs(int(text)) >= WIDEST:
        raise _RefusedError(f"the whole number {shown(text)} is wider than 64 bits")
    return int(text)


def _wide(text: str) -> int | float:
    return float(text) if len(text) > 21 or abs(int(text)) >= WIDEST else int(text)


def _check_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as problem:
        code = ord(problem.object[problem.start])
        raise _RefusedError(f"half a surrogate pair (\\u{code:04x}) is no character") from None


# -- YAML ------------------------------------------------------------------------------------------


def parse_yaml(
    text: str,
    *,
    source: str,
    error: type[ActHarnessError] = ResultError,
    advice: str = "check the file",
) -> Any:  # noqa: ANN401 - any YAML value
    """Parse one YAML document of what JSON knows: no tags, no dates, each key once.

    Anchors and merge keys (``<<``) work where they do not make a value part of itself.

    Args:
        text: The YAML text; an empty one is None.
        source: What it is, for the error's line.
        error: Raised where it is not YAML, or more than is taken.
        advice: What to do about it, the end of the error's line.

    Raises:
        ActHarnessError: ``error``, in one line.
    """
    try:
        loader = Loader(io.StringIO(text))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        said = getattr(problem, "problem", None) or " ".join(str(problem).split())
        raise error(f"{source} is not YAML ({place}{said}); {advice}") from None


# -- models ----------------------------------------------------------------------------------------


def validated(model: type[Model], content: object) -> Model:
    """Build a pydantic model from parsed JSON or YAML without converting types.

    Whole numbers are whole numbers, ``true`` is not 1 and "1" is not 1; a list may become a tuple
    and a text a path, because JSON has neither. Pydantic tells the two apart only where it parses
    the JSON itself, hence the way over a text.

    Args:
        model: The class to build.
        content: What :func:`parse_json` or :func:`parse_yaml` returned; paths and tuples of a
            caller's own changes may be in it.

    Raises:
        pydantic.ValidationError: The content does not fit the model.
    """
    return model.model_validate_json(json.dumps(content, default=os.fspath), strict=True)
