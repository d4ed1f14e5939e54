"""``act-harness publish``: results in the formats that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import typer.core

__all__ = ["publish"]


def publish(
    results: Annotated[
        Path, typer.Argument(help="Output folder of eval or of lm_eval, or one in it.")
    ],
    to: Annotated[str, typer.Option(help="A new folder, or hub:OWNER/REPO (a model repository).")],
    model_id: Annotated[
        str | None,
        typer.Option(help="OWNER/NAME of the base model. [default: as the results name it]"),
    ] = None,
    organization: Annotated[
        str | None, typer.Option(help="Who evaluated. [default: OWNER of the hub repository]")
    ] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request on the hub instead.")
    ] = False,
) -> None:
    """Publish a finished evaluation, both arms as what they are.

    Writes records of Every Eval Ever, entries for .eval_results/ of a model repository, the paired
    comparison with its intervals, the report page if there is one, and the W&B run's address. The
    results are left as they are. The calibrated arm has a name of its own, with the artifact's
    hash; .eval_results/ on the hub gets the arm whose repository it is, and only scores of all
    documents.

    \b
    Example:
      act-harness publish .demo/results --to .demo/published \\
          --model-id HuggingFaceTB/SmolLM2-135M-Instruct
      act-harness publish outputs --to hub:ME/MY-HEADS
    """
    from act_harness.publication.publish import publish as publish_results

    done = publish_results(
        results, to, model_id=model_id, organization=organization, pull_request=pull_request
    )
    print(done.summary())
