"""Download what benchmark tasks read, so that they run where there is no network.

Not part of the paper. :func:`fetch_tasks` finds the datasets behind tasks, groups and tags without
building them, downloads each once into a data directory (:mod:`act_harness.harness.data_folder`,
which also reads it), and keeps a manifest of commits, rows and hashes. It copies whole datasets:
every split of the configuration that a task names.
"""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import datasets
import huggingface_hub
import yaml
from tqdm import tqdm

from act_harness.errors import InfrastructureError, TaskError
from act_harness.harness.data_folder import (
    DATA_DIRECTORY_VARIABLE,
    MANIFEST,
    NOT_HAD,
    DatasetRecord,
    Loader,
    Manifest,
    SplitRecord,
    damage,
    data_directory,
    first_line,
    label,
    load_rows,
    read_manifest,
    record_split,
    verify_directory,
    write_manifest,
)
from act_harness.harness.task_lookup import TaskSelection, find_tasks, leaf_tasks
from act_harness.support import atomic, places
from act_harness.support.interruption import saved

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = [
    "DATA_DIRECTORY_VARIABLE",
    "Manifest",
    "Source",
    "data_directory",
    "datasets_of",
    "fetch_tasks",
    "load_rows",
    "save_dataset",
    "verify_directory",
]

CommitOf = Callable[[str, str | None], str | None]

_DEFAULT = "default"  # what the hub calls the configuration of a dataset that has only one


class Source(NamedTuple):
    """A dataset that a task reads, as its YAML names it."""

    id: str
    config: str | None
    revision: str | None
    task: str
    """The first of the named tasks that reads it."""

    @property
    def label(self) -> str:
        """Name for people."""
        return label(self.id, self.config)


def datasets_of(
    tasks: Sequence[str],
    *,
    task_manager: TaskManager | None = None,
    include_path: Sequence[str | os.PathLike[str]] = (),
) -> tuple[Source, ...]:
    """Return the datasets that ``tasks`` (tasks, groups or tags) read, each once, by name.

    Tasks that build their rows themselves (the demo tasks) need none. Nothing is downloaded.
    ``include_path`` names folders of further task files, where no ``task_manager`` is given.

    Raises:
        TaskError: A task is unknown, or reads its dataset in a way that cannot be copied.
    """
    if task_manager is None:
        selection = find_tasks(tasks, include_path=include_path)
    else:
        selection = TaskSelection(task_manager, tuple(tasks))
    found: dict[tuple[str, str | None, str | None], Source] = {}
    for leaf in leaf_tasks(selection):
        source = _source_of(leaf, selection.manager)
        if source is not None:
            found.setdefault((source.id, source.config, source.revision), source)
    return tuple(found[key] for key in sorted(found, key=str))


def _source_of(task: str, manager: TaskManager) -> Source | None:
    """Return the dataset that the YAML of ``task`` names; None if it names none."""
    settings = manager.task_index[task].cfg or {}
    path = settings.get("dataset_path")
    if not path or settings.get("custom_dataset"):
        return None
    more = dict(settings.get("dataset_kwargs") or {})
    more.pop("trust_remote_code", None)  # datasets >= 4 knows it no longer
    revision = more.pop("revision", None)
    if more:
        raise TaskError(
            f"task {task!r} reads {path} with dataset_kwargs {', '.join(sorted(more))}, which "
            "cannot be copied; leave it out, or run it once with HF_HOME set and keep that cache"
        )
    return Source(id=path, config=settings.get("dataset_name"), revision=revision, task=task)


def _record_of(source: Source, manifest: Manifest) -> DatasetRecord | None:
    wanted = (source.id, source.config, source.revision)
    records = (one for one in manifest.datasets if (one.id, one.config, one.revision) == wanted)
    return next(records, None)


def fetch_tasks(
    tasks: Sequence[str],
    dest: str | os.PathLike[str],
    *,
    task_manager: TaskManager | None = None,
    include_path: Sequence[str | os.PathLike[str]] = (),
    load: Loader | None = None,
    commit_of: CommitOf | None = None,
    progress: bool = True,
) -> Manifest:
    """Download every dataset of ``tasks`` into ``dest``, once, and write its manifest.

    What the manifest lists and is intact on the disk is not fetched again; other datasets in
    ``dest`` stay. A run that was interrupted is continued by the same call.

    Args:
        tasks: Names of tasks, groups or tags.
        dest: The data directory, created when needed.
        task_manager: Where the names are looked up; lm-eval's and this project's tasks otherwise.
        include_path: Folders of further task files, where no ``task_manager`` is given.
        load: Replaces ``datasets.load_dataset``.
        commit_of: From dataset and revision to the commit, or None; asks the hub otherwise.
        progress: Show a progress bar.

    Returns:
        The manifest as it is on the disk now.

    Raises:
        TaskError: See :func:`datasets_of`; or the manifest in ``dest`` cannot be read.
        InfrastructureError: A dataset cannot be downloaded or written; earlier ones are kept.
        InputError: Another process is filling ``dest``: each would lose the other's entries.
    """
    folder = Path(dest).expanduser()
    places.prepare_folder(folder)
    sources = datasets_of(tasks, task_manager=task_manager, include_path=include_path)
    refusal = f"another fetch is filling {folder}; wait for it, or give another --dest"
    with places.sole_writer(folder / ".fetching", refusal):
        return _fetch(sources, folder, load or datasets.load_dataset, commit_of, progress)


def _fetch(
    sources: Sequence[Source],
    folder: Path,
    load: Loader,
    commit_of: CommitOf | None,
    progress: bool,
) -> Manifest:
    manifest = read_manifest(folder)
    bar = tqdm(sources, unit="dataset", disable=not progress)
    with saved(lambda: f"{len(manifest.datasets)} datasets are complete in {folder}"):
        for source in bar:
            bar.set_description(source.label)
            known = _record_of(source, manifest)
            if known is not None and not damage(known, folder):
                continue
            commit = (commit_of or _commit_on_hub)(source.id, source.revision)
            rows = _download(source, commit, load)
            manifest = save_dataset(rows, folder, source=source, commit=commit)
    if not (folder / MANIFEST).exists():
        write_manifest(manifest, folder)
    return manifest


def _download(source: Source, commit: str | None, load: Loader) -> datasets.DatasetDict:
    # A commit of the main branch pins what the manifest will say. Converted branches
    # (refs/convert/...) are asked for by their name, as tasks do.
    revision = source.revision or commit
    try:
        return load(source.id, source.config, **({"revision": revision} if revision else {}))
    except NOT_HAD as error:
        raise InfrastructureError(
            f"dataset {source.label} cannot be downloaded: {first_line(error).rstrip('.')}; run "
            "fetch where there is a network, or set HF_HOME to a HuggingFace cache that holds it"
        ) from error


def _commit_on_hub(path: str, revision: str | None) -> str | None:
    """Return the commit of a dataset, None when the hub is not there (a cache may still be)."""
    if Path(path).is_dir():
        return None
    try:
        return huggingface_hub.HfApi().dataset_info(path, revision=revision).sha
    except (OSError, huggingface_hub.errors.HfHubHTTPError):
        return None


def save_dataset(
    rows: datasets.DatasetDict,
    folder: str | os.PathLike[str],
    *,
    source: Source,
    commit: str | None = None,
) -> Manifest:
    """Write one dataset into a data directory, beside what is there, and list it in the manifest.

    Raises:
        InfrastructureError: It cannot be written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    below = f"{source.id}/{source.config or _DEFAULT}"
    splits = {
        split: _write_split(table, folder, f"{below}/{split}.parquet")
        for split, table in rows.items()
    }
    record = DatasetRecord(
        id=source.id,
        config=source.config,
        revision=source.revision,
        commit=commit,
        fetched=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        splits=splits,
    )
    others = [
        old for old in manifest.datasets if (old.id, old.config) != (record.id, record.config)
    ]
    listed = sorted([*others, record], key=lambda one: (one.id, one.config or ""))
    manifest = Manifest(datasets=tuple(listed))
    _write_card([one for one in listed if one.id == record.id], folder)
    write_manifest(manifest, folder)
    return manifest


def _write_split(table: datasets.Dataset, folder: Path, below: str) -> SplitRecord:
    target = folder / below
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(temporary))  # keeps the features: class names are in the file
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise InfrastructureError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose "
            "another --dest, and repeat the command"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return record_split(folder, below, len(table))


def _write_card(records: Sequence[DatasetRecord], folder: Path) -> None:
    """Write the README.md that tells ``datasets`` which file is which configuration and split."""
    configs = [
        {
            "config_name": record.config or _DEFAULT,
            "data_files": [
                {"split": name, "path": split.file.removeprefix(f"{record.id}/")}
                for name, split in record.splits.items()
            ],
        }
        for record in records
    ]
    header = yaml.safe_dump({"configs": configs}, sort_keys=False)
    text = f"---\n{header}---\n\nCopied by `act-harness fetch`; see {MANIFEST} above.\n"
    atomic.write_text(folder / records[0].id / "README.md", text)
