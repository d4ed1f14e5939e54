"""``act-harness artifact``: looking at head-set artifacts, and sharing them on the hub."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from act_harness.cli.listing import columns
from act_harness.cli.options import Reference
from act_harness.cli.parsing import Command
from act_harness.errors import InputError
from act_harness.support.hub import DEFAULT_FILE, FORM, PREFIX, HubFile, parse

if TYPE_CHECKING:
    from act_harness.artifact import Artifact

__all__ = ["artifact_app"]

artifact_app = typer.Typer(
    help="List, show, verify and share head sets.", no_args_is_help=True, rich_markup_mode=None
)


@artifact_app.command("list", cls=Command)
def list_shipped() -> None:
    """List the shipped artifacts by the names that artifact= takes.

    With where each comes from, and what it is worth on documents that did not find it.

    \b
    Example:
      act-harness artifact list
    """
    from act_harness.artifact import load_artifact, shipped_artifacts

    rows = [("name", "heads", "model", "method", "source", "measured gain")]
    for name in shipped_artifacts():
        one = load_artifact(name)
        source = "published" if one.search is None else "searched"
        worth = one.judgement()[0] if one.search is not None else "not judged here"
        rows.append((name, str(one.head_count()), one.model.id, _method(one), source, worth))
    print(columns(rows))


@artifact_app.command(cls=Command)
def show(
    reference: Reference,
    full: Annotated[bool, typer.Option("--full", help="Print the whole file, as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the map of its heads as a page to this file.")
    ] = None,
) -> None:
    """Print an artifact: model, calibration, heads, what they are worth.

    \b
    Example:
      act-harness artifact show .demo/artifact.json
      act-harness artifact show .demo/artifact.json --full
      act-harness artifact show .demo/artifact.json --html heads.html
    """
    import json

    from act_harness.artifact import load_artifact

    artifact = load_artifact(reference)
    if html is not None:
        from act_harness.exploration.page import artifact_page
        from act_harness.support import atomic, places

        atomic.write_text(places.prepare_file(html, reads=[reference]), artifact_page(artifact))
        print(f"written: {html}")
        return
    if full:
        print(json.dumps(artifact.document(), indent=2, ensure_ascii=False))
        print(f"{artifact.head_count()} heads, sha256 {artifact.sha256()}", file=sys.stderr)
        return
    settings = artifact.calibration.settings()
    print(f"name         {artifact.name}")
    print(f"model        {artifact.model.id} ({artifact.model.architecture})")
    print(f"grid         {artifact.model.num_hidden_layers} layers of "
          f"{artifact.model.num_attention_heads} heads")  # fmt: skip
    print(f"calibration  {', '.join(f'{key}={value}' for key, value in settings.items())}")
    if artifact.strengths:
        print(f"strengths    {sum(map(len, artifact.strengths.values()))} heads have their own")
    print(f"search       {_origin(artifact)}")
    if artifact.search is not None:
        print(f"judged       {artifact.judgement()[0]}")
    print(f"sha256       {artifact.sha256()}")
    print(f"heads        {artifact.head_count()}, by layer:")
    for layer, heads in artifact.heads.items():
        if heads:
            print(f"  {layer:>3}  {' '.join(map(str, heads))}")


def _method(artifact: Artifact) -> str:
    settings = artifact.calibration.settings()
    return f"{settings['target']}, {settings['mass']}"


def _origin(artifact: Artifact) -> str:
    recipe = (artifact.search or {}).get("recipe")
    if not isinstance(recipe, dict):
        return "none; a published or hand-made list"
    tasks = recipe.get("tasks")
    named = ", ".join(map(str, tasks)) if isinstance(tasks, list) else str(tasks)
    rule = f", rule {recipe['rule']}" if recipe.get("rule") else ""  # gradient has none
    return f"{recipe.get('method')}{rule}, {recipe.get('samples')} documents of each of {named}"


@artifact_app.command(cls=Command)
def verify(
    reference: Reference,
    pretrained: Annotated[str, typer.Argument(help="Hub id or folder of the model.")],
) -> None:
    """Check that an artifact fits a model.

    Warnings say what could not be checked.

    \b
    Example:
      act-harness artifact verify .demo/artifact.json .demo/model
    """
    from act_harness.artifact import load_artifact
    from act_harness.model import CalibratedHFLM

    artifact = load_artifact(reference)
    facts = CalibratedHFLM(pretrained, artifact="none").facts
    with _told_of():
        artifact.verify(facts)
    print(f"{artifact.name} fits {pretrained}: {artifact.head_count()} heads")


@artifact_app.command(cls=Command)
def push(
    reference: Reference,
    repository: Annotated[str, typer.Argument(help="OWNER/REPO; made where it does not exist.")],
    license: Annotated[
        str | None,
        typer.Option(
            help="The hub's name of the licence you share it under, as apache-2.0. [required, "
            "unless the repository's card has one]"
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the model. [default: the one recorded in the artifact]"),
    ] = None,
    path: Annotated[str, typer.Option(help="Its path there: FOLDER/NAME.json.")] = DEFAULT_FILE,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made where there is none. [default: main]")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the new repository private.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of writing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Subject of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card of a new repository, send nothing.")
    ] = False,
) -> None:
    """Share an artifact on the model hub, with a card.

    One commit with the artifact, a map of its heads and the card; other text of a card that is
    there stays. The token is that of `hf auth login` or HF_TOKEN.

    \b
    Example:
      act-harness artifact push .demo/artifact.json ME/heads --license apache-2.0 \\
          --base-model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from act_harness.artifact import load_artifact

    artifact = load_artifact(reference)
    with _told_of():
        if dry_run:
            from act_harness.sharing.push import card_of

            print(
                card_of(
                    artifact, repository, license=license, base_model=base_model, path_in_repo=path
                ),
                end="",
            )
            return
        commit = artifact.push_to_hub(
            repository,
            license=license,
            base_model=base_model,
            path_in_repo=path,
            revision=revision,
            private=private or None,
            commit_message=message,
            create_pr=create_pr,
        )
    print(f"pushed: {commit.pr_url or commit.commit_url}")
    print(f"pinned: {HubFile(repository.removeprefix(PREFIX), path, commit.oid)}")


@artifact_app.command(cls=Command)
def pull(
    reference: Annotated[str, typer.Argument(help=f"{FORM}.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write. [default: its name, in this folder]")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that holds something else.")
    ] = False,
) -> None:
    """Fetch an artifact from the model hub, and check it.

    The commit it came from is noted in it (provenance). Without this command too,
    artifact=hub:... is taken wherever an artifact is named.

    \b
    Example:
      act-harness artifact pull hub:ME/heads@v1/sub/heads.json --output heads.json
    """
    from act_harness.artifact import load_artifact
    from act_harness.support import places, reading

    source = parse(reference)
    target = output or Path(source.file.rpartition("/")[2])
    places.prepare_file(target)
    artifact = load_artifact(str(source))
    if reading.is_file(target) and not force:
        text = reading.read_text(target, error=InputError)
        if text != artifact.text():
            raise InputError(f"{target} is there and holds something else; --force replaces it")
    artifact.save(target)
    print(f"written: {target}, {artifact.head_count()} heads for {artifact.model.id}")
    print(f"from:    {artifact.provenance['hub']}")


@contextmanager
def _told_of() -> Iterator[None]:
    """Print the warnings of what is done, a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
