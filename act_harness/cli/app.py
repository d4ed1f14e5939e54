"""The command ``act-harness``: thin commands, each of which imports what it needs when it runs.

User errors (:class:`act_harness.errors.ActHarnessError`) end as one line on the error output and
the exit code of their branch. What is no user error keeps its traceback and ends with 70, so that
1 is left to verdicts. Nothing imports this module but ``__main__`` and the installed script.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

import act_harness
from act_harness.cli.artifact import artifact_app
from act_harness.cli.bench import bench_app
from act_harness.cli.dashboard import dashboard
from act_harness.cli.evaluate import LEFT_OUT, EvalCommand, evaluate
from act_harness.cli.options import (
    DataDir,
    Device,
    IncludePath,
    ModelArgs,
    Pretrained,
    Tasks,
    with_tracking,
)
from act_harness.cli.parsing import SPELLING, Command, names
from act_harness.cli.regress import regress
from act_harness.errors import ActHarnessError, InternalError, one_line
from act_harness.support.interruption import end_like_ctrl_c
from act_harness.support.places import prepare_folder, remove_unused
from act_harness.support.threads import wait_passively
from act_harness.tracking.tracker import TrackingSettings

__all__ = ["app", "main"]

_EXIT_CODES = """Exit codes: 0 done; 1 a verdict against the run (regressed); 2 bad input;
3 no data, model, memory or server, so no score, or nothing that could be tested; 70 an error inside
the program, with its traceback (ACT_HARNESS_TRACEBACK=1 prints it for the others too);
130 interrupted, 143 terminated, 141 nobody reads the output."""


_ORDER = (
    "eval", "search", "compare", "regress", "judge", "dashboard", "fetch", "artifact", "bench",
    "run", "doctor", "tasks-path",
)  # fmt: skip
"""Commands as README introduces them; typer's order is that of the definitions, groups last."""

_NOBODY_READS = 141  # what shells give for a process that SIGPIPE ended


class _Commands(typer.core.TyperGroup):
    """All commands; typer itself would answer an interrupt with "Aborted!" and a verdict's code."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the commands as a reader needs them."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - click's context; typer brings its own click
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _StoppedError(error) from error
        except BrokenPipeError as error:
            raise _NobodyReadsError from error


class _StoppedError(Exception):
    """Ctrl-C or SIGTERM, with what was saved and how to go on."""

    def __init__(self, cause: KeyboardInterrupt) -> None:
        kept = str(cause) or "nothing was saved"
        command = shlex.join(["act-harness", *sys.argv[1:]])
        super().__init__(f"interrupted; {kept}; go on with: {command}")
        self.exit_code = 128 + int(getattr(cause, "signal", signal.SIGINT))


class _NobodyReadsError(Exception):
    """Standard output was closed by its reader, as `head` does."""


app = typer.Typer(
    name="act-harness",
    cls=_Commands,
    context_settings=SPELLING,
    help=f"Calibrated attention (ACT) inside lm-evaluation-harness.\n\n{_EXIT_CODES}",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(artifact_app, name="artifact")
app.add_typer(bench_app, name="bench")


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    wait_passively()  # before anything imports torch
    try:
        _run()
    finally:
        _leave_other_processes()


def _run() -> NoReturn:
    _open_streams()
    end_like_ctrl_c()
    try:
        try:
            code = app(prog_name="act-harness", standalone_mode=False)
        finally:
            _close_bars()
            sys.stdout.flush()
    except (_NobodyReadsError, BrokenPipeError):
        # What nobody reads is no failure of the run; Python must not try to flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_NOBODY_READS)
    except (ActHarnessError, _StoppedError) as error:
        remove_unused()
        if os.environ.get(_TRACEBACK, "") not in ("", "0"):
            traceback.print_exception(error)
        print(f"act-harness: {one_line(error, limit=2000)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - exit code 1 is a verdict; a crash must not look so
        if hasattr(error, "format_message"):  # typer's own: click's, or its copy of click
            _wrong_call(error)
        traceback.print_exc()
        sys.exit(InternalError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


_TRACEBACK = "ACT_HARNESS_TRACEBACK"
"""Environment variable: 1 prints the traceback of every error before its line."""


def _close_bars() -> None:
    """End the lines of progress bars that an error left open; what is printed next has its own."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm and tqdm.tqdm, "_instances", ())):
        bar.close()


def _open_streams() -> None:
    """Make printing safe: a closed stream swallows, a character it lacks is shown as its escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave_other_processes() -> None:
    """End a process group; now and then gloo's threads abort a process that exits beside them."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _version(value: bool) -> None:
    if value:
        print(act_harness.__version__)
        raise typer.Exit


def _wrong_call(error: Exception) -> NoReturn:
    """Say in one line what of a command line cannot be used, and where to look."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
        sys.exit(2)
    path = context.command_path if context is not None else "act-harness"
    text = one_line(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    left_out = LEFT_OUT.get(str(getattr(error, "option_name", "")).replace("_", "-"))
    if left_out is not None and path.endswith(" eval"):
        text = f"eval has no option {error.option_name} of lm-eval's: {left_out}"  # type: ignore[attr-defined]
    found = _given(getattr(error, "param", None))
    if found is not None and found not in text:
        text = f"{text} (found {one_line(repr(found))})"
    print(f"act-harness: {text}; see `{path} --help`", file=sys.stderr)
    sys.exit(2)


def _given(parameter: object) -> str | None:
    """Return what stands behind an option on the command line; None where that is not clear."""
    options = set(getattr(parameter, "opts", ()))
    for position, word in enumerate(sys.argv):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in options:
            return value if equals else next(iter(sys.argv[position + 1 : position + 2]), None)
    return None


@app.callback()
def _app_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)
def run(context: typer.Context) -> None:
    """Run lm-eval's own command line with our model and tasks.

    All arguments go to lm-eval: run (the default), ls, validate. The model's name is hf-act.
    The results folder gets the arm's name at its end.

    \b
    Example:
      act-harness run --model hf-act --model_args pretrained=.demo/model,artifact=none \\
          --tasks act_demo --limit 20 --device cpu
      act-harness run ls tasks
      act-harness run -- --help        (lm-eval's own help)
    """
    from act_harness.harness.launch import run_lm_eval

    run_lm_eval(context.args)


@with_tracking
def search(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe file or the name of a shipped one; options override it."),
    ] = None,
    pretrained: Pretrained = None,
    model_args: ModelArgs = "",
    tasks: Annotated[str, typer.Option(help="Task names, separated by commas.")] = "",
    include_path: IncludePath = None,
    samples: Annotated[
        int | None, typer.Option(help="Documents per task. [default: the recipe's number]")
    ] = None,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="The artifact to write.")] = Path("artifact.json"),
    seed: Annotated[int | None, typer.Option(help="Seed. [default: the recipe's]")] = None,
    data_dir: DataDir = None,
    best: Annotated[
        bool, typer.Option("--best", help="Print the best heads so far now and then.")
    ] = False,
    plots: Annotated[
        bool, typer.Option("--plots", help="Draw head map and effects beside the output.")
    ] = False,
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
    tracking: TrackingSettings | None = None,
) -> None:
    """Find heads whose calibration helps; writes an artifact.

    A search that was interrupted is continued by the same command.

    \b
    Example:
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
        ledgers=ledgers,
        prepare=prepare,
        documents=documents,
        held_out=held_out,
    )
    found = search_from_settings(settings)
    if os.environ.get("RANK", "0") == "0":
        print(found.summary())
        if tracking is not None and isinstance(found, SearchResult):
            from act_harness.search.tracking import track_search

            for line in track_search(found, tracking, folder=output.parent):
                print(line)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The reference: a result folder or file.")],
    b: Annotated[Path, typer.Argument(help="The run that is compared with it.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks and groups. [default: all that both have]")
    ] = "",
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Accepted share of false findings.")] = 0.05,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the resampling; that of `eval` if not given.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json, comparison.md, forest.png.")
    ] = None,
) -> None:
    """Compare two runs document by document.

    Takes folders and files of `act-harness eval` and of `lm_eval --log_samples`. Exit code 1
    when a task or group regressed, 2 when the runs answer other documents or prompts, 3 when
    answers are not finite (their tasks are not tested), or nothing at all could be tested.

    \b
    Example:
      act-harness compare outputs/model__baseline__DATE \\
          outputs/model__act-heads__DATE
    """
    from act_harness.evidence.compare import compare as compare_runs
    from act_harness.evidence.plots import comparison_files
    from act_harness.evidence.stats import SEED

    if output is not None:
        prepare_folder(output)
    found = compare_runs(
        a,
        b,
        tasks=names(tasks) or None,
        confidence=confidence,
        alpha=alpha,
        seed=SEED if seed is None else seed,
    )
    print(found.to_terminal(colour=sys.stdout.isatty()))
    if output is not None:
        for path in comparison_files(found, output).values():
            print(f"written: {path}")
    raise typer.Exit(found.exit_code)


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
    from act_harness.mtbench import judge as run_judge
    from act_harness.mtbench import load_judge_settings, track_judge

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


app.command("eval", cls=EvalCommand)(evaluate)
app.command(cls=Command)(search)
app.command(cls=Command)(judge)
app.command(cls=Command)(dashboard)
app.command(cls=Command)(regress)


@app.command()
def fetch(
    tasks: Tasks,
    dest: Annotated[Path, typer.Option(help="Folder to fill.")],
    include_path: IncludePath = None,
) -> None:
    """Store datasets in a folder, for machines without a network.

    \b
    Example:
      act-harness fetch --tasks act_sst2,act_hellaswag --dest data
      ACT_HARNESS_DATA_DIR=data lm_eval --model hf-act ... --tasks act_sst2
    """
    from act_harness.harness.fetch import fetch_tasks

    fetch_tasks(names(tasks), dest, include_path=tuple(include_path or ()))


@app.command()
def doctor() -> None:
    """Say what is found here, and what is off.

    Exit code 2 when `lm_eval --model hf-act` would not work.

    \b
    Example:
      act-harness doctor
    """
    from act_harness.harness.doctor import examine, render

    diagnosis = examine()
    print(render(diagnosis))
    if not diagnosis.reachable:
        raise typer.Exit(2)


@app.command("tasks-path")
def tasks_path() -> None:
    """Print the folder of the task files, for --include_path.

    \b
    Example:
      lm_eval ls tasks --include_path "$(act-harness tasks-path)"
    """
    from act_harness.support import paths

    print(paths.tasks_path())
