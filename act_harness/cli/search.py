"""``act-harness search``: heads that help."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from act_harness.cli.listing import ListRecipes
from act_harness.cli.options import (
    DataDir,
    Device,
    IncludePath,
    ModelArgs,
    Pretrained,
    RecipeName,
    RecipeSamples,
    RecipeSeed,
    RecipeTasks,
    with_tracking,
)
from act_harness.cli.parsing import names
from act_harness.support.launcher import launched
from act_harness.tracking.tracker import TrackingSettings

__all__ = ["search"]


@with_tracking
def search(
    recipe: RecipeName = None,
    pretrained: Pretrained = None,
    model_args: ModelArgs = "",
    tasks: RecipeTasks = "",
    include_path: IncludePath = None,
    samples: RecipeSamples = None,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="The artifact to write.")] = Path("artifact.json"),
    seed: RecipeSeed = None,
    data_dir: DataDir = None,
    best: Annotated[
        bool, typer.Option("--best", help="Print the best heads so far now and then.")
    ] = False,
    plots: Annotated[
        bool, typer.Option("--plots", help="Draw head map and effects beside the output.")
    ] = False,
    compare_with: Annotated[
        Path | None,
        typer.Option(
            help="With --plots, method gradient: an exhaustive artifact of the same model, whose "
            "effects strengths are drawn against."
        ),
    ] = None,
    ledgers: Annotated[
        Path | None, typer.Option(help="Folder of the ledgers that make a search resumable.")
    ] = None,
    prepare: Annotated[
        Path | None,
        typer.Option(help="Only draw and tokenise the documents into this file (private data)."),
    ] = None,
    documents: Annotated[
        Path | None, typer.Option(help="Use the documents of --prepare; no lm-eval is needed.")
    ] = None,
    held_out: Annotated[
        int, typer.Option(help="With --prepare: evaluation documents per task to add.")
    ] = 0,
    method: Annotated[
        str | None, typer.Option(help="exhaustive, screened or gradient. [default: the recipe's]")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="margin, corrected, or entropy (gradient). [default: the recipe's]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Method gradient: what strengths act on: sinks, initial, both, random, last, "
            "gate or temperature."
        ),
    ] = None,
    signs: Annotated[
        str | None, typer.Option(help="Method gradient: damp, amplify or both.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Method gradient: passes over the search documents.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Method gradient: first step size of Adam.")
    ] = None,
    penalty: Annotated[
        list[float] | None,
        typer.Option(help="Method gradient: on the strengths' sizes; repeat it to try several."),
    ] = None,
    restarts: Annotated[
        int | None, typer.Option(help="Method gradient: runs, all but the first from random ones.")
    ] = None,
    listed: ListRecipes = False,
    tracking: TrackingSettings | None = None,
) -> None:
    """Find heads whose calibration helps; writes an artifact.

    A search that was interrupted is continued by the same command.

    \b
    Example:
      act-harness search --list
      act-harness search demo --pretrained .demo/model --output .demo/artifact.json
      act-harness search --pretrained .demo/model --tasks act_demo_sentiment --samples 32 \\
          --output .demo/artifact.json
    """
    from act_harness.search import SearchResult, SearchSettings, search_from_settings

    settings = SearchSettings(
        recipe=Path(recipe) if recipe else None,
        pretrained=pretrained,
        model_args=model_args,
        tasks=names(tasks),
        include_path=tuple(include_path or ()),
        samples=samples,
        device=device,
        output=output,
        seed=seed,
        data_dir=data_dir,
        show_best=best,
        plots=plots or (tracking is not None and find_spec("matplotlib") is not None),
        compare_with=compare_with,
        ledgers=ledgers,
        prepare=prepare,
        documents=documents,
        held_out=held_out,
        method=method,
        objective=objective,
        gradient={
            "target": target,
            "signs": signs,
            "epochs": epochs,
            "rate": rate,
            "penalties": tuple(penalty) if penalty else None,
            "restarts": restarts,
        },
    )
    found = search_from_settings(settings)
    if launched().rank == 0:
        print(found.summary())
        if tracking is not None and isinstance(found, SearchResult):
            from act_harness.search.report import track_search

            for line in track_search(found, tracking, folder=output.parent):
                print(line)
