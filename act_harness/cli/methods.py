"""``act-harness methods``: methods and controls on the same documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_harness.cli.listing import ListMethods
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
from act_harness.tracking.tracker import TrackingSettings

__all__ = ["methods"]


@with_tracking
def methods(
    recipe: RecipeName = None,
    pretrained: Pretrained = None,
    model_args: ModelArgs = "",
    tasks: RecipeTasks = "",
    methods: Annotated[
        str,
        typer.Option(
            help="Names or patterns as random-heads-*, separated by commas. [default: all]"
        ),
    ] = "",
    include_path: IncludePath = None,
    samples: RecipeSamples = None,
    device: Device = None,
    output: Annotated[
        Path, typer.Option(help="Folder of head sets, scores and the report.")
    ] = Path("methods"),
    seed: RecipeSeed = None,
    data_dir: DataDir = None,
    ledgers: Annotated[
        Path | None, typer.Option(help="Folder of the searches' ledgers. [default: in the output]")
    ] = None,
    documents: Annotated[
        Path | None,
        typer.Option(help="Use the documents of search --prepare; no lm-eval is needed."),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            help="Documents per task of the evaluation split to judge on; 0: the recipe's judge."
        ),
    ] = 0,
    objective: Annotated[
        str | None, typer.Option(help="margin or corrected. [default: the recipe's]")
    ] = None,
    equal_strength: Annotated[
        bool,
        typer.Option(
            "--equal-strength/--no-equal-strength",
            help="Whether to compare at equal strength too: about ten scorings of verify a method.",
        ),
    ] = True,
    listed: ListMethods = False,
    tracking: TrackingSettings | None = None,
) -> None:
    """Compare methods and controls with the untouched model.

    Each finds heads with the recipe's search and verify documents and is scored on documents that
    it never saw. A comparison that was interrupted is continued by the same command; one with more
    methods computes those alone.

    \b
    Example:
      act-harness methods --list
      act-harness methods demo --pretrained .demo/model --output methods \\
          --methods signed,random-columns,random-heads-*
    """
    from act_harness.search import SearchSettings
    from act_harness.search.methods.command import MethodsSettings, methods_from_settings

    settings = MethodsSettings(
        search=SearchSettings(
            recipe=Path(recipe) if recipe else None,
            pretrained=pretrained,
            model_args=model_args,
            tasks=names(tasks),
            include_path=tuple(include_path or ()),
            samples=samples,
            device=device,
            output=output / "methods.json",
            seed=seed,
            data_dir=data_dir,
            ledgers=ledgers,
            documents=documents,
            objective=objective,
        ),
        methods=names(methods),
        output=output,
        held_out=held_out,
        equal_strength=equal_strength,
    )
    found = methods_from_settings(settings)
    print(found.markdown())
    for path in found.files.values():
        print(f"written: {path}")
    if tracking is not None:
        from act_harness.search.methods.report import track_methods

        for line in track_methods(found, tracking, folder=output):
            print(line)
