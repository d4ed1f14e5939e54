"""``act-harness artifact``: looking at head-set artifacts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from act_harness.cli.listing import columns
from act_harness.cli.options import Reference
from act_harness.cli.parsing import Command

if TYPE_CHECKING:
    from act_harness.artifact import Artifact

__all__ = ["artifact_app"]

artifact_app = typer.Typer(
    help="List, show and verify head sets.", no_args_is_help=True, rich_markup_mode=None
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

        atomic.write_text(places.prepare_file(html), artifact_page(artifact))
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
    return (
        f"{recipe.get('method')}, rule {recipe.get('rule')}, {recipe.get('samples')} documents of "
        f"each of {named}"
    )


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
    import warnings

    from act_harness.artifact import load_artifact
    from act_harness.model import CalibratedHFLM

    artifact = load_artifact(reference)
    facts = CalibratedHFLM(pretrained, artifact="none").facts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        artifact.verify(facts)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(f"{artifact.name} fits {pretrained}: {artifact.head_count()} heads")
