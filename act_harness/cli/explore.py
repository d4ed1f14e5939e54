"""``act-harness explore``: one document, seen in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_harness.cli.listing import ListPresets
from act_harness.cli.options import DataDir, Device, IncludePath, ModelArgs, Pretrained
from act_harness.cli.parsing import head_places

__all__ = ["explore"]


def explore(
    pretrained: Pretrained = None,
    model_args: ModelArgs = "",
    device: Device = None,
    text: Annotated[
        str | None, typer.Option(help="A prompt to look at; the answer is its next token.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of the document to look at.")] = None,
    doc: Annotated[int, typer.Option(help="Number of its document, as doc_id in samples.")] = 0,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt. [default: the task's]")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Use the model's chat template.")
    ] = False,
    artifact: Annotated[
        str | None, typer.Option(help="Head set to show: path, shipped name, or hub:...")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Preset for every head, where there is no artifact.")
    ] = "paper",
    heads: Annotated[
        str, typer.Option(help="Heads whose maps come first: LAYER.HEAD,LAYER.HEAD,...")
    ] = "",
    exact: Annotated[
        int | None,
        typer.Option(
            help="Heads whose effect is exact, the strongest first; the others' is first order. "
            "[default: those whose maps are on the page]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("explore.html"),
    include_path: IncludePath = None,
    data_dir: DataDir = None,
    listed: ListPresets = False,
) -> None:
    """Show what a model attends to in one document.

    Writes one page that opens without a network: attention, sinks, and what each head does to the
    answer.

    \b
    Example:
      act-harness explore --pretrained .demo/model --text "The film was a delight." \\
          --output page.html
      act-harness explore --pretrained .demo/model --artifact .demo/artifact.json \\
          --task act_demo_sentiment --doc 3 --output page.html
    """
    from act_harness.exploration.command import ExploreSettings, explore_from_settings

    settings = ExploreSettings(
        pretrained=pretrained,
        model_args=model_args,
        device=device,
        text=text,
        task=task,
        doc=doc,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        artifact=artifact,
        calibration=calibration,
        heads=head_places(heads, "--heads"),
        exact=exact,
        output=output,
        include_path=tuple(include_path or ()),
        data_dir=data_dir,
    )
    found = explore_from_settings(settings)
    print(found.summary())
    print(f"written: {output}")
