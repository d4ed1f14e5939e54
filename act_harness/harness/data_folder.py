"""A folder of benchmark data: how tasks read from it, and the manifest that says what it holds.

Not part of the paper. A data directory mirrors the hub: ``DIR/<owner>/<dataset>`` is a folder that
``datasets.load_dataset`` reads as it is. Any folder of that shape will do; reading needs no
manifest. :mod:`act_harness.harness.fetch` fills one.

* :func:`load_rows` is what every task under ``tasks/`` calls. It reads a dataset from the data
  directory when one is set, else as ``datasets`` would, and turns "cannot be had" into one line.
* :func:`data_directory` sets that directory for a block of code, for every task of
  lm-evaluation-harness and not only this project's. The environment variable
  ``ACT_HARNESS_DATA_DIR`` alone serves this project's tasks.
* :func:`verify_directory` holds a directory against its manifest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import datasets
import huggingface_hub
import pydantic

from act_harness.errors import InfrastructureError, TaskError
from act_harness.support import atomic, reading
from act_harness.support.provenance import sha256_file

__all__ = [
    "DATA_DIRECTORY_VARIABLE",
    "MANIFEST",
    "NOT_HAD",
    "DatasetRecord",
    "Loader",
    "Manifest",
    "SplitRecord",
    "damage",
    "data_directory",
    "first_line",
    "label",
    "load_rows",
    "read_manifest",
    "record_split",
    "verify_directory",
    "write_manifest",
]

DATA_DIRECTORY_VARIABLE = "ACT_HARNESS_DATA_DIR"
MANIFEST = "manifest.json"

# What `datasets` raises when a dataset, or a configuration of it, cannot be had.
NOT_HAD = (ConnectionError, FileNotFoundError, ValueError, huggingface_hub.errors.HfHubHTTPError)

Loader = Callable[..., datasets.DatasetDict]


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class SplitRecord(_Record):
    """One file of rows."""

    file: str
    """Path below the data directory."""
    rows: int
    bytes: int
    sha256: str


class DatasetRecord(_Record):
    """One configuration of one dataset, as it was fetched."""

    id: str
    """Name on the hub, ``owner/dataset``."""
    config: str | None
    revision: str | None
    """What the task asks for: a branch or commit; null is the main branch."""
    commit: str | None
    """The commit that this was; null when it came from a cache or folder."""
    fetched: str
    """Time, UTC, ISO 8601."""
    splits: dict[str, SplitRecord]


class Manifest(_Record):
    """What a data directory holds."""

    schema_: Literal["act-harness/data/1"] = pydantic.Field(
        default="act-harness/data/1", validation_alias="schema", serialization_alias="schema"
    )
    datasets: tuple[DatasetRecord, ...] = ()


def label(path: str, name: str | None) -> str:
    """Return a dataset's name for people: with its configuration where it has several."""
    return f"{path} ({name})" if name else path


def load_rows(
    path: str,
    name: str | None = None,
    *,
    task: str | None = None,
    splits: Sequence[str] = (),
    **settings: object,
) -> datasets.DatasetDict:
    """Read a dataset from the data directory if one is set, else as ``datasets`` would.

    Args:
        path: Name of the dataset on the hub; also a folder relative to the working directory.
        name: Its configuration.
        task: Who asks, for the message.
        splits: Splits that have to be there.
        settings: More arguments of ``datasets.load_dataset``.

    Returns:
        The rows of every split.

    Raises:
        InfrastructureError: The dataset, its configuration or a split is not there. The text names
            the dataset and both ways out.
    """
    place = path
    who = (label(path, name), task or "TASK")
    if directory := os.environ.get(DATA_DIRECTORY_VARIABLE):
        local = Path(directory).expanduser() / path
        if not local.is_dir():
            raise _missing(*who, f"{local} does not exist")
        place = str(local)
        settings.pop("revision", None)  # a folder has none
    try:
        rows = datasets.load_dataset(place, name, **settings)
    except NOT_HAD as error:
        raise _missing(*who, first_line(error)) from error
    if lacking := [split for split in splits if split not in rows]:
        raise _missing(*who, f"it has no split {lacking[0]!r}, only {', '.join(rows)}")
    return rows


@contextlib.contextmanager
def data_directory(directory: str | os.PathLike[str] | None) -> Iterator[None]:
    """Make all tasks read their datasets from ``directory`` while the block runs.

    This project's tasks look for it by themselves (:func:`load_rows`); for all others,
    ``datasets.load_dataset`` is replaced in this process by one that looks there first.

    Args:
        directory: The folder; None leaves everything as it is.

    Raises:
        TaskError: ``directory`` is not a folder.
    """
    if directory is None:
        yield
        return
    folder = Path(directory).expanduser().resolve()
    if not reading.is_folder(folder):
        raise TaskError(
            f"{directory} is not a folder; fill one with `act-harness fetch --tasks TASK "
            f"--dest {directory}` where there is a network"
        )
    original: Loader = datasets.load_dataset

    def redirected(path: str, *args: object, **kwargs: object) -> datasets.DatasetDict:
        local = folder / path
        if not local.is_dir():
            return original(path, *args, **kwargs)
        kwargs.pop("revision", None)
        return original(str(local), *args, **kwargs)

    before = os.environ.get(DATA_DIRECTORY_VARIABLE)
    os.environ[DATA_DIRECTORY_VARIABLE] = str(folder)
    datasets.load_dataset = redirected
    try:
        yield
    finally:
        datasets.load_dataset = original
        if before is None:
            del os.environ[DATA_DIRECTORY_VARIABLE]
        else:
            os.environ[DATA_DIRECTORY_VARIABLE] = before


def _missing(dataset: str, task: str, reason: str) -> InfrastructureError:
    return InfrastructureError(
        f"dataset {dataset} cannot be had: {reason.rstrip('.')}; either run `act-harness "
        f"fetch --tasks {task} --dest DIR` where there is a network and use `--data-dir "
        f"DIR` ({DATA_DIRECTORY_VARIABLE}=DIR) here, or set HF_HOME to a HuggingFace cache that "
        "holds it"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of a data directory; one without entries if there is none.

    Raises:
        TaskError: The file is not a manifest.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return Manifest()
    advice = "move it away, or choose another folder"
    content = reading.read_json(path, error=TaskError, advice=advice)
    try:
        return reading.validated(Manifest, content)
    except pydantic.ValidationError as error:
        raise TaskError(
            f"{path} is not a manifest of act-harness ({first_line(error)}); move it away, or "
            "choose another folder"
        ) from error


def verify_directory(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return what is wrong with a data directory, a line each; nothing if all files are intact.

    Raises:
        TaskError: The manifest cannot be read.
    """
    records = read_manifest(folder).datasets
    return tuple(line for record in records for line in damage(record, Path(folder)))


def damage(record: DatasetRecord, folder: Path) -> list[str]:
    """Return what is wrong with one dataset of a data directory, a line each."""
    lines = [] if (folder / record.id / "README.md").is_file() else [f"{record.id}: no README.md"]
    for split in record.splits.values():
        path = folder / split.file
        if not path.is_file():
            lines.append(f"{split.file}: missing")
        elif path.stat().st_size != split.bytes or sha256_file(path) != split.sha256:
            lines.append(f"{split.file}: not the file that was fetched")
    return lines


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest of a data directory."""
    atomic.write_json(folder / MANIFEST, manifest.model_dump(mode="json", by_alias=True))


def record_split(folder: Path, file: str, rows: int) -> SplitRecord:
    """Return the manifest's entry for the file of rows at ``folder / file``."""
    path = folder / file
    return SplitRecord(file=file, rows=rows, bytes=path.stat().st_size, sha256=sha256_file(path))
