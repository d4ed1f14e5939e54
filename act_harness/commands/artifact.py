"""``act-harness artifact``: looking at head-set artifacts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from act_harness.commands.options import Reference

__all__ = ["artifact_app"]

artifact_app = typer.Typer(
    help="Look at head-set artifacts.", no_args_is_help=True, rich_markup_mode=None
)


@artifact_app.command()
def show(reference: Reference) -> None:
    """Print an artifact: its model, its calibration and its heads.

    \b
    Example:
      act-harness artifact show .demo/artifact.json
    """
    import json

    from act_harness.artifact import load_artifact

    artifact = load_artifact(reference)
    print(json.dumps(artifact.document(), indent=2, ensure_ascii=False))
    print(f"{artifact.head_count()} heads, sha256 {artifact.sha256()}", file=sys.stderr)


@artifact_app.command()
def verify(
    reference: Reference,
    pretrained: Annotated[str, typer.Argument(help="Hub id or folder of the model.")],
) -> None:
    """Check that an artifact fits a model; warnings say what could not be checked.

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
