"""Where a command writes: found out before the work, named so that two runs never share it.

A command that scores for an hour and then finds a file where its folder should be has lost the
hour. So each one makes and probes its place first. Names that become files come from models, tasks
and artifacts, which may be called anything: :func:`file_name` is the one way from such a name to a
file's. A folder of answers, measurements or judgments has one writer at a time.

Not here: writing itself (:mod:`act_harness.support.atomic`). A full disk cannot be foreseen.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import filelock

from act_harness.errors import InfrastructureError, InputError
from act_harness.support import atomic
from act_harness.support.provenance import sha256_text

__all__ = [
    "file_name",
    "new_folders",
    "prepare_file",
    "prepare_folder",
    "remove_empty",
    "remove_unused",
    "sole_writer",
]

_LONGEST = 80
"""Bytes of a part of a name: two of them and a date stay below the 255 of file systems."""


def file_name(text: str, *, longest: int = _LONGEST) -> str:
    """Turn any text into a part of a file's name: letters, digits, ``.``, ``_`` and ``-`` of ASCII.

    A text that was cut ends in a part of its hash, so that two long names stay two.

    Args:
        text: A name that a user, a model or a task brought.
        longest: Most bytes of the result.
    """
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"
    if len(cleaned) <= longest:
        return cleaned
    mark = sha256_text(text)[:8]
    return f"{cleaned[: longest - 9].rstrip('-.')}-{mark}"


def prepare_folder(folder: str | os.PathLike[str]) -> Path:
    """Make a folder and see that files can be written into it.

    Raises:
        InfrastructureError: It cannot be made or written to.
    """
    place = Path(folder)
    try:
        missing = [one for one in (place, *place.parents) if not one.exists()]
        place.mkdir(parents=True, exist_ok=True)
        _made.extend(missing)
        probe = place / f".{secrets.token_hex(4)}.tmp"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        probe.unlink()
    except (OSError, ValueError) as error:
        raise _refused(place, error) from error
    return place


_made: list[Path] = []
"""Folders that this process has made, for :func:`remove_unused`."""


def remove_unused() -> None:
    """Remove the folders that :func:`prepare_folder` has made and in which nothing was written.

    For a command that ends in an error: bad input leaves nothing behind.
    """
    for place in sorted(_made, key=lambda one: len(one.parts), reverse=True):
        with contextlib.suppress(OSError):  # something is in it
            place.rmdir()
    _made.clear()


def prepare_file(
    path: str | os.PathLike[str], *, reads: Iterable[str | os.PathLike[str] | None] = ()
) -> Path:
    """See that a file can be written or replaced, and make its folder.

    Args:
        path: The file.
        reads: What the command was given to read: files, patterns of them, folders of task files;
            what is none of these (a task's name, None) is passed over.

    Raises:
        InputError: A folder is there, or a file that the command reads: a user's own.
        InfrastructureError: The folder cannot be written to, or the name cannot be a file's.
    """
    target = Path(path)
    prepare_folder(target.parent)
    try:
        if target.is_dir():
            raise InputError(f"{target} is a folder; name a file in it")
        with contextlib.suppress(FileNotFoundError):
            target.lstat()  # a name that is too long shows here
        if target.exists() and any(_is_read(target, one) for one in reads if one):
            raise InputError(f"{target} is what this command reads; name another file to write")
    except (OSError, ValueError) as error:
        raise _refused(target, error) from error
    return target


def _is_read(target: Path, given: str | os.PathLike[str]) -> bool:
    """Say whether a file that is there is one that was named, or lies in a folder of tasks."""
    named = os.path.expanduser(given)  # noqa: PTH111 - Path's raises for an unknown user
    if os.path.isdir(named):  # noqa: PTH112 - Path's raises for a name that is too long
        return target.suffix == ".yaml" and Path(named).resolve() in target.resolve().parents
    found = [named, *glob.glob(named)]  # noqa: PTH207 - a user's pattern, which may be absolute
    return any(os.path.exists(one) and target.samefile(one) for one in found)  # noqa: PTH110


def new_folders(parent: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Make folders that were not there, all of them or none.

    Where one exists already (another run started in the same second), all names get the same
    number at their ends, so that folders of one run are told by their names.

    Args:
        parent: The folder they are made in.
        names: Key to name.

    Raises:
        InfrastructureError: One cannot be made.
    """
    number = 1
    while True:
        end = "" if number == 1 else f"-{number}"
        made: dict[str, Path] = {}
        try:
            for key, name in names.items():
                place = parent / f"{name}{end}"
                place.mkdir(parents=True)
                made[key] = place
        except OSError as error:
            remove_empty(made)
            if not isinstance(error, FileExistsError):
                raise _refused(parent, error) from error
            number += 1
        else:
            return made


def remove_empty(folders: Mapping[str, Path]) -> None:
    """Remove the folders in which nothing was written."""
    for place in folders.values():
        with contextlib.suppress(OSError):
            place.rmdir()


@contextlib.contextmanager
def sole_writer(path: Path, refusal: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock at a file while the block runs; it ends with the process, also by a kill.

    Args:
        path: The lock's file, in the folder it guards.
        refusal: What to say where another process holds it: who, and what to do.
        wait: Seconds to wait for it, where it is held for moments only.

    Raises:
        InputError: Another process, or another object of this one, holds it.
        InfrastructureError: The lock's file cannot be made.
    """
    lock = filelock.FileLock(path, timeout=wait)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(refusal) from None
    except NotImplementedError:
        yield  # a file system without locks: nothing to keep others out with
        return
    except OSError as error:
        raise atomic.cannot_write(path, error, "nothing was changed") from error
    try:
        yield
    finally:
        lock.release()


def _refused(path: Path, error: OSError | ValueError) -> InfrastructureError:
    if isinstance(error, OSError):
        shown = path if len(str(path)) < 200 else Path(f"{str(path)[:200]}...")
        return atomic.cannot_write(shown, error, "nothing was computed yet")
    return InfrastructureError(f"cannot write {str(path)!a}: {error}; choose another name")
