"""``act-harness eval``: both arms on the same requests, with lm-eval's own options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_harness.cli.options import (
    DataDir,
    Device,
    IncludePath,
    ModelArgs,
    Pretrained,
    Seed,
    Tasks,
    with_tracking,
)
from act_harness.cli.parsing import Command, document_numbers, names, numbers, switch, use_config
from act_harness.tracking.tracker import TrackingSettings

__all__ = ["LEFT_OUT", "EvalCommand", "evaluate"]

LEFT_OUT = {
    "--model": "eval scores hf-act, with and without a head set",
    "--use-cache": "lm-eval keys that cache by request alone, so one arm would get the other's",
    "--cache-requests": "lm-eval's key knows neither --samples nor settings of generation",
    "--max-batch-size": "--batch-size auto counts tokens, not rows",
    "--log-samples": "samples are always written; without them nothing could be paired",
    "--check-integrity": "it tests tasks and needs no model: act-harness run --check_integrity",
    "--show-config": "the results file of each arm holds the configuration of every task",
    "--verbosity": "set LMEVAL_LOG_LEVEL",
    "--wandb-args": "--wandb-project and the other --wandb options log both arms",
    "--wandb-config-args": "--wandb-project and the other --wandb options log both arms",
    "--trackio-args": "lm-eval names a run by the model alone, so both arms would be one",
    "--hf-hub-log-args": "lm-eval names an upload by the model alone, so both arms would be one",
}
"""Options of ``lm_eval run`` that ``eval`` does not have, and why or what instead."""

_PROMPTS = "Prompts and generation"
_CARE = "Running code of others"


class EvalCommand(Command):
    """``eval``: two of its options may stand without their value, as in lm-eval."""

    optional_values = frozenset({"--apply-chat-template", "--fewshot-as-multiturn"})


@with_tracking
def evaluate(
    tasks: Tasks = "",
    pretrained: Pretrained = None,
    model_args: ModelArgs = "",
    artifact: Annotated[
        str,
        typer.Option(
            help="Path, shipped name, hub:OWNER/REPO[@REVISION][/FILE], or 'none' for the baseline "
            "alone. [default: the one shipped artifact that fits]"
        ),
    ] = "",
    include_path: IncludePath = None,
    limit: Annotated[
        float | None,
        typer.Option("--limit", "-L", help="Documents per task: a number, or a share below 1."),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples",
            "-E",
            help="Documents by their numbers: '{\"TASK\": [0, 1]}', or a JSON file of that.",
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option("--batch-size", "-b", help="Requests at a time, or 'auto'. [default: 1]"),
    ] = None,
    device: Device = None,
    output: Annotated[
        Path, typer.Option("--output", "--output-path", "-o", help="Folder for results.")
    ] = Path("outputs"),
    seed: Seed = 1234,
    data_dir: DataDir = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-C",
            is_eager=True,
            callback=use_config,
            help="YAML file of these options, as lm-eval names them; the command line overrides.",
        ),
    ] = None,
    predict_only: Annotated[
        bool,
        typer.Option("--predict-only", "-x", help="Store both arms' answers; compute no metric."),
    ] = False,
    write_out: Annotated[
        bool, typer.Option("--write-out", "-w", help="Print the first prompts of every task.")
    ] = False,
    calibrators: Annotated[
        str,
        typer.Option(
            help="Calibrations of the scores to show beside raw accuracy: content-free, "
            "domain-pmi, pride, supervised (fitted on the documents of the artifact's search), or "
            "all; batch is always shown."
        ),
    ] = "batch",
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            "-f",
            help="Examples in the prompt. [default: the task's own number]",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    fewshot_seeds: Annotated[
        str,
        typer.Option(
            help="Seeds of the choice of examples, separated by commas.", rich_help_panel=_PROMPTS
        ),
    ] = "1234",
    apply_chat_template: Annotated[
        str,
        typer.Option(
            metavar="[NAME]",
            help="Put the prompt through the tokenizer's chat template, by name if it has several.",
            rich_help_panel=_PROMPTS,
        ),
    ] = "false",
    fewshot_as_multiturn: Annotated[
        str | None,
        typer.Option(
            metavar="[BOOL]",
            help="Examples as turns of a conversation. [default: with a chat template]",
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    system_instruction: Annotated[
        str | None, typer.Option(help="Text of the system message.", rich_help_panel=_PROMPTS)
    ] = None,
    gen_kwargs: Annotated[
        str,
        typer.Option(
            help="Changes to the tasks' settings of generation: temperature=0.8,do_sample=true.",
            rich_help_panel=_PROMPTS,
        ),
    ] = "",
    metadata: Annotated[
        str,
        typer.Option(
            help="Settings for tasks that take them, as key=value or JSON (RULER).",
            rich_help_panel=_PROMPTS,
        ),
    ] = "",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run code of the model's repository.", rich_help_panel=_CARE
        ),
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code",
            help="Run tasks that execute what the model wrote.",
            rich_help_panel=_CARE,
        ),
    ] = False,
    tracking: TrackingSettings | None = None,
) -> None:
    """Score a model with and without calibration, and compare.

    Both arms answer the same requests. The model is loaded once. Every task's line has both
    accuracies, the paired difference with its 95 % interval, and the exact McNemar p. Results and
    samples of both arms are written under --output. Options that lm-eval has too have its names
    (--num_fewshot or --num-fewshot). Exit code 3 when answers are not finite: there is no verdict
    then.

    \b
    Example:
      act-harness eval --pretrained .demo/model --artifact .demo/artifact.json \\
          --tasks act_demo --output .demo/eval
    """
    from act_harness.harness.eval_settings import EvalSettings
    from act_harness.harness.evaluate import run_eval, track_eval
    from act_harness.support.model_arguments import parse_arguments

    template = switch(apply_chat_template, "--apply-chat-template", or_name=True)
    settings = EvalSettings(
        pretrained=pretrained,
        model_args=model_args,
        artifact=artifact,
        tasks=names(tasks),
        include_path=tuple(include_path or ()),
        limit=limit,
        samples=document_numbers(samples),
        num_fewshot=num_fewshot,
        fewshot_seeds=numbers(fewshot_seeds, "--fewshot-seeds"),
        batch_size=batch_size,
        device=device,
        apply_chat_template=template or False,
        fewshot_as_multiturn=bool(switch(fewshot_as_multiturn, "--fewshot-as-multiturn"))
        if fewshot_as_multiturn is not None
        else None,
        system_instruction=system_instruction,
        gen_kwargs=parse_arguments(gen_kwargs, "--gen_kwargs"),
        predict_only=predict_only,
        calibrators=names(calibrators),
        write_out=write_out,
        trust_remote_code=trust_remote_code,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        metadata=parse_arguments(metadata, "--metadata"),
        output=output,
        seed=seed,
        data_dir=data_dir,
    )
    outcome = run_eval(settings)
    print(outcome.summary())
    if tracking is not None:
        for line in track_eval(outcome, settings, tracking):
            print(line)
    raise typer.Exit(outcome.exit_code)
