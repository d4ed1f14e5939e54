"""Files that are either written whole or not touched at all.

Every file this package leaves behind goes through this module: a temporary file in the same
folder, flushed to the disk, then renamed over the target. A reader never sees half a file, and a
full disk costs the new content, not the old one. JSON-lines files that grow (ledgers, answers) are
appended to instead; there, a line counts only once its newline is on the disk.

Not here: locking. A growing file has one writer (one file per process).
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from act_harness.errors import InfrastructureError, InternalError

__all__ = [
    "append_line",
    "append_lines",
    "cannot_write",
    "canonical_json",
    "plain",
    "remove_halves",
    "write_bytes",
    "write_json",
    "write_lines",
    "write_text",
]

_HINTS = {
    errno.ENOSPC: "free some space there and repeat the command",
    errno.EDQUOT: "raise the quota or free some space there and repeat the command",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EEXIST: "a file is there; choose another folder",
    errno.ENOTDIR: "a part of that path is a file; choose another folder",
    errno.EISDIR: "that is a folder; name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
}

Default = Callable[[Any], Any]


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Replace the file at ``path`` by ``data``, creating its folder when needed.

    Args:
        path: Target; a symbolic link is followed, the file it points to is replaced.
        data: The whole new content.

    Returns:
        The path that was written.

    Raises:
        InfrastructureError: The disk is full or the place cannot be written; what was there before
            is still there.
    """
    return _replace(path, [data])


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Replace the file at ``path`` by ``text`` in UTF-8; line ends are written as given.

    Raises:
        InfrastructureError: As for :func:`write_bytes`.
    """
    # Half a surrogate pair, which a model's output can hold, is no UTF-8; its escape is.
    return _replace(path, [text.encode("utf-8", errors="backslashreplace")])


def write_json(
    path: str | os.PathLike[str],
    value: object,
    *,
    canonical: bool = False,
    default: Default | None = None,
) -> Path:
    """Replace the file at ``path`` by ``value`` as JSON with a final newline.

    Args:
        path: Target file.
        value: What to write.
        canonical: Write the one form that equal values share (see :func:`canonical_json`), for
            files that are hashed or compared byte for byte. Otherwise two spaces of indentation,
            keys in their own order, and NaN as Python's ``NaN``, as lm-eval writes its results.
        default: Turns an object that JSON does not know into one that it does.

    Raises:
        InternalError: ``value`` holds something JSON cannot hold.
        InfrastructureError: As for :func:`write_bytes`.
    """
    if canonical:
        text = canonical_json(value, default=default)
    else:
        text = _dumps(value, indent=2, ensure_ascii=False, default=default)
    # Model output can hold half a surrogate pair, which UTF-8 cannot; JSON's escape can.
    data = text.encode("utf-8", errors="backslashreplace")
    return _replace(path, [data, b"\n"])


def write_lines(
    path: str | os.PathLike[str], records: Iterable[object], *, default: Default | None = None
) -> Path:
    """Replace the file at ``path`` by ``records``, one JSON value a line, without holding them all.

    Raises:
        InternalError: A record holds something JSON cannot hold.
        InfrastructureError: As for :func:`write_bytes`.
    """
    return _replace(path, (_line(record, default) for record in records))


def append_line(
    path: str | os.PathLike[str],
    record: object,
    *,
    default: Default | None = None,
    sync: bool = True,
) -> None:
    """Add one JSON value as a line to the file at ``path``; see :func:`append_lines`."""
    append_lines(path, [record], default=default, sync=sync)


def append_lines(
    path: str | os.PathLike[str],
    records: Iterable[object],
    *,
    default: Default | None = None,
    sync: bool = True,
) -> None:
    """Add JSON values as lines to the file at ``path``, creating it when needed.

    Half a line that an earlier, killed process left at the end is cut off first, so that it can
    never be glued to the next one. When the disk is full, the file is cut back to what it held.

    Args:
        path: The JSON-lines file.
        records: What to add, all of it or nothing.
        default: Turns an object that JSON does not know into one that it does.
        sync: Return only when the lines are on the disk (fsync).

    Raises:
        InternalError: A record holds something JSON cannot hold; nothing was added.
        InfrastructureError: The lines could not be written; earlier lines are still there.
    """
    data = b"".join(_line(record, default) for record in records)
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a+b", buffering=0) as stream:
            start = _cut_half_line(stream.fileno())
            try:
                _write_all(stream.fileno(), [data])
                if sync:
                    os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), start)
                raise
    except OSError as error:
        raise cannot_write(target, error, "earlier lines are untouched") from error


def canonical_json(value: object, *, default: Default | None = None) -> str:
    """Return the one JSON text that equal values share: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        InternalError: ``value`` holds NaN, an infinity, or something else JSON cannot hold.
    """
    return _dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=default)


def plain(value: Any) -> Any:  # noqa: ANN401 - any value a command hands over
    """Return a value as JSON can hold it.

    Dataclasses, named tuples and mappings become objects; lists, tuples and sets (in the order of
    their texts) become arrays; numbers that are not finite become None; what else there is, text.
    """
    kind = type(value)
    if kind is float:  # a ledger's unit holds thousands: these first
        return value if math.isfinite(value) else None
    if kind is list:
        return [plain(one) for one in value]
    if value is None or kind in (str, int, bool):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return [plain(one) for one in sorted(value, key=str)]
    if isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def remove_halves(folder: Path) -> None:
    """Delete what processes that were killed in writing have left, in a folder of one's own."""
    for half in folder.glob(".*.tmp"):
        half.unlink(missing_ok=True)


def _dumps(value: object, **settings: Any) -> str:  # noqa: ANN401 - json's own settings
    try:
        return json.dumps(value, **settings)
    except (TypeError, ValueError) as error:
        # A tensor, a NaN in canonical form: the caller has to turn it into data.
        raise InternalError(f"a value cannot be written as JSON: {error}") from error


def _line(record: object, default: Default | None) -> bytes:
    # JSON escapes newlines in strings, so a record is one line whatever it holds; and as ASCII
    # (json's default) no odd line separator or half surrogate of a model's output reaches the file.
    return (_dumps(record, default=default) + "\n").encode("ascii")


def _replace(path: str | os.PathLike[str], chunks: Iterable[bytes]) -> Path:
    target = Path(path)
    final = target.resolve()
    # The random part keeps two processes apart; the dot and the suffix keep globs and git away. The
    # name is cut by bytes: 100 letters may be 400 of them, and a name holds 255.
    start = os.fsencode(final.name)[:100].decode("ascii", errors="ignore")
    temporary = final.with_name(f".{start}.{secrets.token_hex(4)}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: it creates files that only their owner can read, and a rename keeps that.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(handle, chunks)
            if final.exists():
                temporary.chmod(final.stat().st_mode & 0o777)
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            kept = "the file that was there is untouched" if final.exists() else "nothing was left"
            raise cannot_write(target, error, kept) from error
        raise
    _sync_folder(final.parent)
    return target


def _write_all(handle: int, chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(handle, rest) :]


def _cut_half_line(handle: int) -> int:
    """Cut what stands after the last newline; return the size of the file then, in bytes."""
    end = os.fstat(handle).st_size
    position, block = end, 1 << 16
    while position > 0:
        start = max(0, position - block)
        os.lseek(handle, start, os.SEEK_SET)
        newline = os.read(handle, position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        os.ftruncate(handle, position)
    return position


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Some file systems (and Windows) refuse to sync a folder; the
    # file is complete by then, so that is no reason to fail.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cannot_write(path: Path, error: OSError, kept: str) -> InfrastructureError:
    """Return the error of a place that cannot be written, in one line with what to do.

    Args:
        path: The file or folder.
        error: What the system said.
        kept: What is left on the disk.
    """
    reason = error.strerror or str(error)
    hint = _HINTS.get(error.errno or 0, "check the disk and repeat the command")
    return InfrastructureError(f"cannot write {path}: {reason} ({kept}); {hint}")
