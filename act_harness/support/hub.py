"""Files on the model hub: how they are named, fetched, and what is said when that fails.

``hub:OWNER/REPO[@REVISION][/FOLDER/FILE]`` names one; huggingface_hub's own client does the rest,
with its cache, its token and its variables (``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HUB_CACHE``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote

from act_harness._version import __version__
from act_harness.errors import ActHarnessError, InfrastructureError, InputError, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = [
    "DEFAULT_FILE",
    "FORM",
    "LIBRARY",
    "PREFIX",
    "Fetched",
    "HubFile",
    "asking",
    "check_repository",
    "client",
    "fetch",
    "is_repository",
    "named",
    "parse",
]

LIBRARY = "act-harness"
"""What the hub is told that asks it, and that a card's files are for."""
PREFIX = "hub:"
DEFAULT_FILE = "heads.json"
"""What a repository's artifact is called where no file is named, as peft's adapter_config.json."""
FORM = "hub:OWNER/REPO[@REVISION][/FOLDER/FILE.json]"

_REVISION = re.compile(r"refs/(?:pr|convert)/[^/]+|[^/]+")
"""Ahead of a file: a name without slashes (``%2F`` is one), or the hub's own two kinds of refs."""


class HubFile(NamedTuple):
    """A file of a model repository on the hub."""

    repo: str
    """``OWNER/REPO``."""
    file: str = DEFAULT_FILE
    """Path in the repository, folders and all."""
    revision: str | None = None
    """Branch, tag, commit or ``refs/pr/N``; None: the main branch."""

    def __str__(self) -> str:
        """Write it as :func:`parse` reads it."""
        if self.revision is None:
            return f"{PREFIX}{self.repo}/{self.file}"
        special = _REVISION.fullmatch(self.revision)
        revision = self.revision if special else quote(self.revision, safe="")
        return f"{PREFIX}{self.repo}@{revision}/{self.file}"


class Fetched(NamedTuple):
    """A file of the hub on this machine."""

    path: Path
    """In the client's cache."""
    source: HubFile
    """What was fetched, its revision the commit."""


def parse(reference: str, *, error: type[ActHarnessError] = InputError) -> HubFile:
    """Read ``hub:OWNER/REPO[@REVISION][/FOLDER/FILE]``; the revision may also stand at the end.

    Args:
        reference: Begins with ``hub:``.
        error: Raised where it names no file on the hub.

    Raises:
        ActHarnessError: ``error``.
    """
    body = reference.removeprefix(PREFIX)
    ahead, at, behind = body.partition("@")
    revision, rest = None, ""
    if at and ahead.count("/") == 1:
        found = _REVISION.match(behind)
        revision = unquote(found[0]) if found else ""
        rest = behind[found.end() :] if found else ""
    elif at:
        revision = behind
    parts = f"{ahead}{rest}".split("/")
    if len(parts) < 2 or not all(parts) or revision == "" or "@" in rest:
        raise error(
            f"{one_line(repr(reference))} names no file on the hub; expected {FORM} "
            f"({DEFAULT_FILE} where no file is named)"
        )
    file = "/".join(parts[2:]) or DEFAULT_FILE
    return named("/".join(parts[:2]), file, revision, error=error)


def named(
    repo: str, file: str, revision: str | None, *, error: type[ActHarnessError] = InputError
) -> HubFile:
    """Return a file of the hub by its parts, each of which can be one.

    Raises:
        ActHarnessError: ``error``: one cannot.
    """
    check_repository(repo, error=error)
    folders = file.split("/")
    if not all(folders) or {".", ".."} & set(folders) or "\\" in file or not file.isprintable():
        raise error(
            f"{one_line(repr(file))} is no path in a repository; expected FILE or FOLDER/FILE"
        )
    if revision is not None and not (revision.strip() and revision.isprintable()):
        raise error(f"{one_line(repr(revision))} is no revision; expected a branch, tag or commit")
    return HubFile(repo, file, revision)


def is_repository(repo: str) -> bool:
    """Say whether a text can be the name of a repository, OWNER/REPO."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return repo.count("/") == 1


def check_repository(repo: str, *, error: type[ActHarnessError] = InputError) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        ActHarnessError: ``error``.
    """
    if not is_repository(repo):
        raise error(
            f"{one_line(repr(repo))} is no repository's name on the hub; expected OWNER/REPO"
        )


def client(token: str | bool | None = None) -> HfApi:
    """Return the hub's own client, with a token that may write.

    Args:
        token: As huggingface_hub takes it; None: the one of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        InputError: There is none.
    """
    from huggingface_hub import HfApi, get_token

    if not isinstance(token, str) and (token is False or get_token() is None):
        raise InputError("no token of the hub is stored; run `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token, library_name=LIBRARY, library_version=__version__)


def fetch(
    source: HubFile,
    *,
    most_bytes: int,
    token: str | bool | None = None,
    error: type[ActHarnessError] = InputError,
) -> Fetched:
    """Get a file into the client's cache, or find it there.

    A commit that is in the cache is taken without asking; a branch is asked for, and taken from the
    cache where the hub cannot be reached.

    Args:
        source: The file.
        most_bytes: Of a larger one nothing is fetched.
        token: As huggingface_hub takes it; None: the one of ``hf auth login`` or ``HF_TOKEN``.
        error: Raised where the name is to blame.

    Raises:
        ActHarnessError: ``error``: no such repository, revision or file, no right to it, too large.
        InfrastructureError: It is not in the cache, and the hub is offline or out of order.
    """
    from huggingface_hub import hf_hub_download

    repo, file, revision = source
    with asking(source, error=error, token=token):
        size = hf_hub_download(repo, file, revision=revision, token=token, dry_run=True).file_size
        if size is not None and size > most_bytes:
            raise error(f"{source} holds {size} bytes, expected at most {most_bytes}")
        path = Path(hf_hub_download(repo, file, revision=revision, token=token))
    # The documented layout of the cache: .../snapshots/COMMIT/FOLDER/FILE.
    commit = path.parts[-1 - len(file.split("/"))]
    return Fetched(path, source._replace(revision=commit))


@contextmanager
def asking(
    source: HubFile,
    *,
    error: type[ActHarnessError] = InputError,
    token: str | bool | None = None,
) -> Iterator[None]:
    """Turn what the client raises about a file or its repository into one line.

    Args:
        source: What it is asked about.
        error: Raised where what the user gave is to blame.
        token: To list what a repository holds instead of a file that it has not.

    Raises:
        ActHarnessError: ``error``, or InfrastructureError where the hub is to blame.
    """
    from huggingface_hub import errors

    try:
        yield
    except ActHarnessError:
        raise
    except errors.GatedRepoError as problem:
        raise error(
            f"{source}: the repository is gated; ask for access on its page, then `hf auth login`"
        ) from problem
    except errors.RepositoryNotFoundError as problem:
        raise error(
            f"{source}: there is no repository {source.repo!r}, or it is private; check the name, "
            "or run `hf auth login` with a token that may read it"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise error(
            f"{source}: the repository has no revision {source.revision!r}; name a branch, a tag "
            "or a commit of it"
        ) from problem
    except errors.RemoteEntryNotFoundError as problem:
        raise error(
            f"{source}: the repository has no such file{_instead(source, token)}"
        ) from problem
    except errors.LocalEntryNotFoundError as problem:
        raise _out_of_reach(source, problem.__cause__ or problem) from problem
    except errors.HfHubHTTPError as problem:
        raise _answered(source, problem, error) from problem
    except json.JSONDecodeError as problem:
        raise InfrastructureError(
            f"{source}: what the hub answers is not JSON; check HF_ENDPOINT"
        ) from problem
    except ValueError as problem:  # a name, or metadata, that the client refuses
        raise error(f"{source}: {one_line(problem).rstrip('.')}; change it") from problem
    except (OSError, errors.HTTPError) as problem:  # type: ignore[attr-defined]  # its client's base
        raise _out_of_reach(source, problem) from problem


def _out_of_reach(source: HubFile, cause: BaseException) -> InfrastructureError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(cause, OfflineModeIsEnabled):
        return InfrastructureError(
            f"{source} is not in the cache and HF_HUB_OFFLINE is set; fetch it once without that "
            "variable, or give the path of a file"
        )
    return InfrastructureError(
        f"{source}: the hub cannot be reached ({_first(cause)}); check the network and "
        "HF_ENDPOINT, or give the path of a file"
    )


def _answered(
    source: HubFile, problem: BaseException, error: type[ActHarnessError]
) -> ActHarnessError:
    """Return what an answer of the hub means that the client has no name for."""
    response = getattr(problem, "response", None)
    status = getattr(response, "status_code", None)
    said = _first(getattr(problem, "server_message", None) or problem)
    if status in (401, 403):
        return error(
            f"{source}: the hub refuses this ({status}: {said}); run `hf auth login` with a token "
            f"that may do it on {source.repo}"
        )
    if status in (409, 412):
        return InfrastructureError(
            f"{source}: the repository was changed meanwhile ({status}: {said}); repeat the command"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return error(f"{source}: the hub refuses this ({status}: {said}); change it")
    return InfrastructureError(f"{source}: the hub answers {status} ({said}); try again later")


def _first(text: object) -> str:
    lines = [line for line in str(text).splitlines() if line.strip()]
    return one_line(lines[0] if lines else type(text).__name__, limit=200).rstrip(".")


def _instead(source: HubFile, token: str | bool | None) -> str:
    """Return what JSON files a repository has, as the end of a line."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = HfApi().list_repo_files(source.repo, revision=source.revision, token=token)
    except (HfHubHTTPError, OSError, ValueError):
        return "; check its name"  # the answer that there is none stands; this was only to help
    found = [one_line(name, limit=80) for name in names if name.endswith(".json")]
    if not found:
        return ", and no JSON file at all; check the repository's name"
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"; it holds {', '.join(found[:5])}{more}"
