"""``act-harness judge``: answers of MT-Bench, judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import typer.core

from act_harness.cli.options import with_tracking
from act_harness.tracking.tracker import TrackingSettings

__all__ = ["judge"]


@with_tracking
def judge(
    paths: Annotated[
        list[Path], typer.Argument(help="Output folders of mt_bench runs; all arms in them.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The judge's name, as its server knows it.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, with /v1. [default: OpenAI's]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; options override it.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for judgments and scores. [default: PATH/mt_bench_judge]"),
    ] = None,
    judge_prompts: Annotated[
        Path | None, typer.Option(help="Judge prompts in FastChat's format. [default: our own]")
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(help="Reference answers in FastChat's format. [default: the dataset's]"),
    ] = None,
    allow_missing_references: Annotated[
        bool | None, typer.Option(help="Judge without a reference where there is none.")
    ] = None,
    rejudge: Annotated[
        int | None, typer.Option(help="Judgments of each answer. [default: 1]")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Calls at a time. [default: 4]")] = None,
    retries: Annotated[
        int | None, typer.Option(help="Further calls after a failure, per judgment. [default: 3]")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds per call. [default: 120]")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="The judge's temperature. [default: 0]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a verdict. [default: 2048]")
    ] = None,
    max_failure_rate: Annotated[
        float | None, typer.Option(help="Share of missing judgments to accept. [default: 0.02]")
    ] = None,
    price_input: Annotated[
        float | None, typer.Option(help="Price of a million input tokens, for the estimate.")
    ] = None,
    price_output: Annotated[
        float | None, typer.Option(help="Price of a million output tokens.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable of the key, or 'none'. [default: OPENAI_API_KEY, if set]"
        ),
    ] = None,
    allow_insecure_key: Annotated[
        bool | None,
        typer.Option("--allow-insecure-key", help="Send the key to an http:// address elsewhere."),
    ] = None,
    dry_run: Annotated[
        bool | None, typer.Option("--dry-run", help="Print the estimate and stop.")
    ] = None,
    tracking: TrackingSettings | None = None,
) -> None:
    """Score MT-Bench answers with a judge model.

    Scores are per turn and category, and both arms are compared. A run that was stopped is
    continued by the same command. Exit code 3 when more judgments are missing than
    --max-failure-rate allows. The key is read from the environment alone.

    \b
    Example:
      act-harness judge outputs --model gpt-4o --dry-run
      act-harness judge outputs --model my-judge --base-url http://127.0.0.1:8000/v1
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "tracking")}
    from act_harness.mtbench.judge import judge as run_judge
    from act_harness.mtbench.judge import load_judge_settings, track_judge

    settings = load_judge_settings(config, **given)
    outcome = run_judge(settings)
    if outcome.arms:
        print(outcome.summary())
        for file in outcome.files:
            print(f"written: {file}")
        if tracking is not None:
            for line in track_judge(outcome, settings, tracking):
                print(line)
    raise typer.Exit(outcome.exit_code)
