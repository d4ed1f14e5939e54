"""An artifact goes to the hub: all files made first, then one commit with them all, or none.

huggingface_hub's client does the sending; a branch that somebody else moved meanwhile is refused by
the hub, since the commit names the one it was made on.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from act_harness.errors import InputError, install_command, one_line
from act_harness.evidence.head_effects import head_effects
from act_harness.exploration.page import strengths_of
from act_harness.sharing.card import CardFacts, model_card, picture_path
from act_harness.support import hub, reading

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

    from act_harness.artifact import Artifact

__all__ = ["card_of", "picture_of", "push"]

_PATH = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*\.json", re.ASCII)
_MOST_CARD = 1 << 20
"""Bytes of a README.md that is there."""


class _Branch(NamedTuple):
    """The branch that is written to, as it was found."""

    exists: bool
    """Whether the repository does."""
    head: str | None = None
    """Its newest commit; None: there is no such branch yet."""
    card: str | None = None
    """Its README.md."""


def push(
    artifact: Artifact,
    repo_id: str,
    *,
    license: str | None,
    base_model: str | None,
    path_in_repo: str,
    revision: str | None,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Upload an artifact; see :meth:`act_harness.artifact.Artifact.push_to_hub`, the way in.

    Raises:
        InputError: No token, no right to write, or something that the hub does not take.
        InfrastructureError: The hub cannot be reached or is out of order.
    """
    from huggingface_hub import CommitOperationAdd

    place = _place(repo_id, path_in_repo, revision)
    base = _base_model(artifact, base_model)
    api = hub.client(token)
    picture = picture_of(artifact)
    with hub.asking(place, token=token):
        branch = _look(api, place, private=private)
        facts = CardFacts(place, license, base, picture is not None)
        files = {
            place.file: artifact.text().encode(),
            "README.md": model_card(artifact, facts, existing=branch.card).encode(),
        }
        if picture is not None:
            files[picture_path(place)] = picture
        _prepare(api, place, branch, private=private)
        return api.create_commit(
            place.repo,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=commit_message or f"Upload head set {one_line(artifact.name, limit=60)}",
            revision=revision,
            parent_commit=branch.head,
            create_pr=create_pr,
        )


def card_of(
    artifact: Artifact,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    path_in_repo: str = hub.DEFAULT_FILE,
) -> str:
    """Return the card that a new repository would get; nothing is asked or sent.

    Raises:
        InputError: No licence, or a name that the hub cannot take.
    """
    place = _place(repo_id, path_in_repo, None)
    return model_card(
        artifact, CardFacts(place, license, _base_model(artifact, base_model), _can_draw())
    )


def _place(repo_id: str, path_in_repo: str, revision: str | None) -> hub.HubFile:
    if not _PATH.fullmatch(path_in_repo):
        raise InputError(
            f"the path in the repository is {one_line(repr(path_in_repo))}; expected "
            "FOLDER/NAME.json of letters, digits, dots, dashes and underscores"
        )
    return hub.named(repo_id.removeprefix(hub.PREFIX), path_in_repo, revision)


def _base_model(artifact: Artifact, given: str | None) -> str | None:
    """Return the hub id of the artifact's model; None where none can be it."""
    if given is not None:
        hub.check_repository(given)
        return given
    if hub.is_repository(artifact.model.id):
        return artifact.model.id
    warnings.warn(
        f"the model is recorded as {one_line(artifact.model.id)!r}, which is no hub id: the "
        "card names no base_model; give it (--base-model OWNER/NAME)",
        stacklevel=4,
    )
    return None


def _look(api: HfApi, place: hub.HubFile, *, private: bool | None) -> _Branch:
    """Find out what is there, changing nothing."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        main = api.model_info(place.repo)
    except RepositoryNotFoundError:
        return _Branch(exists=False)
    if private and main.private is False:
        raise InputError(
            f"{place.repo} exists and is public, private was asked for; make it private on its "
            "page, or name another repository"
        )
    if place.revision in (None, "main"):
        return _Branch(exists=True, head=main.sha, card=_card(api, place.repo, main.sha))
    try:
        head = api.model_info(place.repo, revision=place.revision).sha
    except RevisionNotFoundError:
        if str(place.revision).startswith("refs/"):
            raise  # pull requests are not made by their number
        return _Branch(exists=True, card=_card(api, place.repo, main.sha))
    return _Branch(exists=True, head=head, card=_card(api, place.repo, head))


def _card(api: HfApi, repo: str, commit: str | None) -> str | None:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = api.hf_hub_download(repo, "README.md", revision=commit)
    except RemoteEntryNotFoundError:
        return None
    return reading.read_text(path, error=InputError, most_bytes=_MOST_CARD)


def _prepare(api: HfApi, place: hub.HubFile, branch: _Branch, *, private: bool | None) -> None:
    """Make the repository and the branch where they are not there."""
    if not branch.exists:
        api.create_repo(place.repo, private=private, exist_ok=True)
    if branch.head is None and place.revision not in (None, "main"):
        api.create_branch(place.repo, branch=str(place.revision), exist_ok=True)


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def picture_of(artifact: Artifact) -> bytes | None:
    """Return the map of an artifact's heads as PNG: effects where a search measured them.

    Else strengths, those that are not 1. None, with a warning, without matplotlib.
    """
    if not _can_draw():
        warnings.warn(
            f"the card has no picture: matplotlib is not installed ({install_command('report')})",
            stacklevel=3,
        )
        return None
    from act_harness.evidence.head_plots import head_map

    values, label = head_effects(artifact), "effect of a head alone in the search"
    if values is None or not np.isfinite(values).any():
        values, label = strengths_of(artifact)[0].astype(np.float64), "strength (1 changes nothing)"
    with tempfile.TemporaryDirectory(prefix="act-harness-") as folder:
        path = head_map(
            values,
            Path(folder, "map.png"),
            selected=artifact.heads,
            title=one_line(f"{artifact.name}: {artifact.head_count()} heads", limit=80),
            label=label,
        )
        return path.read_bytes()
