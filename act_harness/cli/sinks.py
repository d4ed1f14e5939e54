"""``act-harness sinks``: statistics of attention sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_harness.cli.listing import ListPresets
from act_harness.cli.options import DataDir, Device, IncludePath, ModelArgs, Pretrained, Tasks
from act_harness.cli.parsing import names

__all__ = ["sinks"]


def sinks(
    tasks: Tasks,
    pretrained: Pretrained = None,
    model_args: ModelArgs = "",
    device: Device = None,
    limit: Annotated[int, typer.Option("--limit", "-L", help="Most documents per task.")] = 100,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt. [default: the task's]")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Use the model's chat template.")
    ] = False,
    calibration: Annotated[str, typer.Option(help="Preset whose detection is used.")] = "paper",
    output: Annotated[Path, typer.Option(help="Folder of sinks.json and tables.")] = Path("sinks"),
    plots: Annotated[
        bool, typer.Option("--plots", help="Draw the tables as sinks.png and sinks.svg.")
    ] = False,
    include_path: IncludePath = None,
    data_dir: DataDir = None,
    listed: ListPresets = False,
) -> None:
    """Count attention sinks over the documents of tasks.

    Where they stand, on which tokens, in which heads. Writes one JSON file, and its tables as CSV.
    Memory does not grow with the documents.

    \b
    Example:
      act-harness sinks --pretrained .demo/model --tasks act_demo --limit 50 --output sinks
    """
    from act_harness.exploration.command import SinksSettings, sinks_from_settings

    settings = SinksSettings(
        pretrained=pretrained,
        model_args=model_args,
        device=device,
        tasks=names(tasks),
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        calibration=calibration,
        output=output,
        plots=plots,
        include_path=tuple(include_path or ()),
        data_dir=data_dir,
    )
    found, files = sinks_from_settings(settings)
    print(found.summary())
    for file in files:
        print(f"written: {file}")
