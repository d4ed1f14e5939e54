"""Where a result came from: versions, commit, device, time, and the hashes of the files behind it.

Everything here is cheap: versions come from the installed packages' metadata, nothing heavy is
imported, and a missing package, repository or device description is None, never an error. The
record stands beside results and artifacts, outside whatever is hashed or compared byte for byte.

Not here: what was run (that is the recipe's and the task's business) and whether two results may
be compared (:mod:`act_harness.evidence.compare`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from act_harness._version import __version__
from act_harness.errors import InfrastructureError, ResultError
from act_harness.support.atomic import canonical_json

__all__ = [
    "COMMIT_VARIABLE",
    "Commit",
    "Provenance",
    "collect",
    "commit",
    "describe_device",
    "now",
    "sha256_file",
    "sha256_files",
    "sha256_json",
    "sha256_text",
    "versions",
]

COMMIT_VARIABLE = "ACT_HARNESS_COMMIT"
"""Names the commit where the code is a copy of a repository."""

_PACKAGES = ("torch", "transformers", "lm_eval")
_CODE_FOLDERS = ("act_harness", "tasks", "search")


class Commit(NamedTuple):
    """State of the repository the package runs from; both None outside one."""

    commit: str | None
    """Full hash of the checked-out commit."""
    dirty: bool | None
    """Whether tracked files were changed, or files were added beside the code."""


@dataclass(frozen=True)
class Provenance:
    """The artifact schema's ``provenance`` and what a result file carries about its origin."""

    created: str
    """When, in UTC, as ISO 8601 to the second."""
    act_harness: str
    """Version of this package."""
    python: str
    """Version of the interpreter."""
    torch: str | None
    """Version of torch, None where it is not installed; likewise the next two."""
    transformers: str | None
    lm_eval: str | None
    commit: str | None
    """Commit of the repository the package runs from, None for an installed wheel."""
    dirty: bool | None
    """Whether that repository had changes."""
    device: str
    """What the numbers were computed on, in words."""
    seed: int | None
    """The run's seed, where it has one."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


def collect(*, seed: int | None = None, device: str | None = None) -> Provenance:
    """Gather the provenance of this process now.

    Args:
        seed: The run's seed.
        device: What the model is on, as torch writes it (``cpu``, ``cuda:0``); None for the CPU.
    """
    state = commit()
    found = versions()
    return Provenance(
        created=now(),
        act_harness=__version__,
        python=platform.python_version(),
        torch=found["torch"],
        transformers=found["transformers"],
        lm_eval=found["lm_eval"],
        commit=state.commit,
        dirty=state.dirty,
        device=describe_device(device),
        seed=seed,
    )


def now() -> str:
    """Return the time in UTC as ISO 8601 to the second, for example ``2024-05-01T12:00:00Z``."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str | None]:
    """Return the versions of this package, Python, torch, transformers and lm_eval.

    A package that is not installed is None. Nothing is imported to find out.
    """
    found: dict[str, str | None] = {
        "act_harness": __version__,
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit(folder: str | os.PathLike[str] | None = None) -> Commit:
    """Return the commit the package runs from, and whether anything was changed since.

    A wheel that happens to be installed below somebody's repository is not part of it: the package
    has to be tracked there. New files count as changes only beside the code (in the package, tasks
    and search folders), so that a report in the working folder does not make a run dirty.

    The variable ``ACT_HARNESS_COMMIT`` (``-dirty`` behind it where something was changed) goes
    before git: a copy of the code may have no repository, or an older one.

    Args:
        folder: The package's folder; the running package's own by default.
    """
    named = os.environ.get(COMMIT_VARIABLE)
    if named and folder is None:
        return Commit(named.removesuffix("-dirty"), named.endswith("-dirty"))
    package = Path(folder) if folder else Path(__file__).parents[1]
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    top = _git(package, "rev-parse", "--show-toplevel")
    head = _git(package, "rev-parse", "--verify", "HEAD")
    if tracked is None or top is None or head is None:
        return Commit(commit=None, dirty=None)
    code = [name for name in _CODE_FOLDERS if (Path(top) / name).is_dir()]
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    added = _git(Path(top), "ls-files", "--others", "--exclude-standard", "--", *code)
    return Commit(commit=head, dirty=bool(changed) or (bool(code) and bool(added)))


def describe_device(device: str | None = None) -> str:
    """Return a device in words: ``NVIDIA H200 (cuda:0)``, or the processor's name and core count.

    Args:
        device: As torch writes it. The name of an accelerator is looked up only when torch is
            loaded already.
    """
    if device is not None and device.split(":")[0] == "cuda":
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            return f"{torch.cuda.get_device_name(device)} ({device})"
        return device
    if device is not None and device.split(":")[0] != "cpu":
        return device
    return f"{_processor()}, {os.cpu_count() or 1} cores"


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits.

    Raises:
        ResultError: There is no such file.
        InfrastructureError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ResultError(f"{path}: no such file, so it has no hash; check the path") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InfrastructureError(f"cannot read {path}: {reason}; check the disk") from error
    return digest.hexdigest()


def sha256_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Return one SHA-256 for several files (the shards of a model): over their names and contents.

    The order in which they are given and the folder they lie in do not matter; a renamed, added or
    missing file does.

    Raises:
        ResultError: No files were given, two have the same name, or one does not exist.
        InfrastructureError: One cannot be read.
    """
    by_name: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.name in by_name:
            raise ResultError(
                f"{by_name[path.name]} and {path} have the same name; hash them apart"
            )
        by_name[path.name] = path
    if not by_name:
        raise ResultError("no files to hash were given; name at least one")
    return sha256_json({name: sha256_file(path) for name, path in by_name.items()})


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 form as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def sha256_json(value: Mapping[str, Any] | list[Any]) -> str:
    """Return the SHA-256 of a value's canonical JSON: the same for equal values in any key order.

    Raises:
        InternalError: ``value`` holds something JSON cannot hold, NaN included.
    """
    return sha256_text(canonical_json(value))


def _git(folder: Path, *arguments: str) -> str | None:
    """Return git's output, stripped, or None where git or the repository is missing."""
    program = shutil.which("git")
    if program is None:
        return None
    # A hook of another repository exports GIT_DIR and its like; they would answer for that one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # Optional locks off: asking must not write to the index of a repository that is being used.
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(  # noqa: S603 - fixed program, no shell
            [program, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    # platform.processor() is empty or just "x86_64" on Linux; the kernel knows the model's name.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"
