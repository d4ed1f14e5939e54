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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

import act_harness
from act_harness.cli.artifact import artifact_app
from act_harness.cli.bench import bench_app
from act_harness.cli.compare import compare
from act_harness.cli.dashboard import dashboard
from act_harness.cli.evaluate import LEFT_OUT, EvalCommand, evaluate
from act_harness.cli.explore import explore
from act_harness.cli.judge import judge
from act_harness.cli.methods import methods
from act_harness.cli.options import Device, IncludePath, Tasks
from act_harness.cli.parsing import SPELLING, Command, names
from act_harness.cli.publish import publish
from act_harness.cli.regress import regress
from act_harness.cli.report import report
from act_harness.cli.search import search
from act_harness.cli.sinks import sinks
from act_harness.cli.tasks import tasks
from act_harness.cli.warned import plain_warnings
from act_harness.errors import ActHarnessError, InputError, InternalError, one_line
from act_harness.support.interruption import unwind_on_signals
from act_harness.support.launcher import keep_quiet, launched
from act_harness.support.places import remove_unused
from act_harness.support.threads import wait_passively

__all__ = ["app", "main"]

_EXIT_CODES = """Exit codes: 0 done; 1 a verdict against the run (regressed); 2 bad input;
3 no data, model, memory or server, so no score, or nothing that could be tested; 70 an error inside
the program, with its traceback (ACT_HARNESS_TRACEBACK=1 prints it for the others too);
130 interrupted, 143 terminated, 141 nobody reads the output."""


_ORDER = (
    "eval", "search", "methods", "compare", "explore", "sinks", "report", "regress", "judge",
    "dashboard", "publish", "tasks", "fetch", "artifact", "bench", "run", "doctor", "tasks-path",
)  # fmt: skip
"""Commands as docs/commands.md has them; typer's order is that of definitions, groups last."""

_SHARED = ("eval", "run", "search", "regress")
"""Commands whose work several processes share; of any other each would write the same files."""

_NOBODY_READS = 141  # what shells give for a process that SIGPIPE ended


class _Commands(typer.core.TyperGroup):
    """All commands; typer itself would answer an interrupt with "Aborted!" and a verdict's code."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the commands as a reader needs them."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - click's
        found = super().resolve_command(ctx, args)
        count = launched().count
        if count > 1 and found[0] not in _SHARED:
            raise InputError(
                f"{count} processes were started, and {found[0]} runs in one; start it without "
                f"torchrun or accelerate launch ({', '.join(_SHARED)} share their work)"
            )
        return found

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
        kept = _said(cause) or "nothing was saved"
        command = shlex.join(["act-harness", *sys.argv[1:]])
        super().__init__(f"interrupted; {kept}; go on with: {command}")
        self.exit_code = 128 + int(getattr(cause, "signal", signal.SIGINT))


def _said(error: BaseException | None) -> str:
    """Return what the first of several interrupts could say about what was saved."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) and str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


class _NobodyReadsError(Exception):
    """Standard output was closed by its reader, as `head` does."""


app = typer.Typer(
    name="act-harness",
    cls=_Commands,
    context_settings=SPELLING,
    help=f"Calibrated attention (ACT) inside lm-evaluation-harness.\n\n{_EXIT_CODES}",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(artifact_app, name="artifact")
app.add_typer(bench_app, name="bench")


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    wait_passively()  # before anything imports torch
    _open_streams()
    told = unwind_on_signals()
    code: int | str | None
    try:
        _run()
    except KeyboardInterrupt as error:  # from outside a command, or one more behind the first
        code = _tell(_StoppedError(error))
    except SystemExit as error:
        code = error.code
    told()
    try:
        sys.exit(code)  # W&B reads the code here
    finally:
        if "torch.distributed" in sys.modules:  # else nothing has waited, and nothing is imported
            from act_harness.support.processes import end

            end(code)


def _tell(error: ActHarnessError | _StoppedError) -> int:
    """Say in one line what ended the command; return its exit code."""
    remove_unused()
    place = _speak(error)
    if os.environ.get(_TRACEBACK, "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"act-harness{place}: {one_line(error, limit=2000)}", file=sys.stderr)
    return error.exit_code


_loud: list[Callable[[], None]] = []
"""How a process other than the first, which prints nothing, gets its standard error back."""


def _take_place() -> None:
    """Leave the printing to the first of several processes."""
    _loud[:] = [keep_quiet()] if launched().rank else []


def _speak(error: Exception) -> str:
    """Have an error told, and say whose it is; what all on a machine find, its first one tells.

    Once the processes share documents, bad input may be in the share of one: it is told by whoever
    finds it first.
    """
    processes = sys.modules.get("act_harness.support.processes")
    first = processes.leave_word(str(error)) if processes is not None else None
    if not _loud:
        return ""
    place = launched()
    pressed = isinstance(error, _StoppedError) and error.exit_code == 128 + signal.SIGINT
    others = pressed or (isinstance(error, InputError) and not first)
    if place.local == 0 or not others:
        _loud.pop()()
    return f" (process {place.rank + 1} of {place.count})"


def _run() -> NoReturn:
    try:
        try:
            _take_place()
            with plain_warnings():
                code = app(prog_name="act-harness", standalone_mode=False)
        finally:
            _close_bars()
            sys.stdout.flush()
    except (_NobodyReadsError, BrokenPipeError):
        # What nobody reads is no failure of the run; Python must not try to flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_NOBODY_READS)
    except (ActHarnessError, _StoppedError) as error:
        sys.exit(_tell(error))
    except Exception as error:  # noqa: BLE001 - exit code 1 is a verdict; a crash must not look so
        if hasattr(error, "format_message"):  # typer's own: click's, or its copy of click
            _wrong_call(error)
        _speak(error)
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


app.command("eval", cls=EvalCommand)(evaluate)
app.command(cls=Command)(search)
app.command(cls=Command)(methods)
app.command()(compare)
app.command(cls=Command)(explore)
app.command(cls=Command)(sinks)
app.command()(report)
app.command(cls=Command)(judge)
app.command(cls=Command)(dashboard)
app.command(cls=Command)(regress)
app.command()(publish)
app.command(cls=Command)(tasks)


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
def doctor(
    *,
    pretrained: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of a model: try what it can do, and say why."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype to try it in. [default: its own]")
    ] = None,
    device: Device = None,
    families: Annotated[
        bool,
        typer.Option(
            "--families",
            help="Try every causal architecture of the installed transformers, tiny and random.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Markdown file for the table of --families; beside it goes a JSON file."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of an earlier table: say what changed, and exit with 1 where something "
            "that worked no longer does."
        ),
    ] = None,
) -> None:
    """Say what is found here, and what is off.

    Exit code 2 when `lm_eval --model hf-act` would not work.

    \b
    Example:
      act-harness doctor
      act-harness doctor --pretrained HuggingFaceTB/SmolLM2-135M
      act-harness doctor --families --output results/families.md
      act-harness doctor --families --against results/families.json
    """
    from act_harness.harness.doctor import examine, render

    if pretrained is None and (dtype or device):
        raise InputError("--dtype and --device are of a model; name it with --pretrained")
    if not families and (output or against):
        option = "--output" if output else "--against"
        raise InputError(f"{option} is the file of a table of architectures; ask with --families")
    diagnosis = examine()
    print(render(diagnosis))
    if pretrained is not None:
        from act_harness.harness.model_report import report_on

        print(f"\n{report_on(pretrained, dtype=dtype or 'auto', device=device)}")
    if families:
        _try_families(output, against)
    if not diagnosis.reachable:
        raise typer.Exit(2)


def _try_families(output: Path | None, against: Path | None) -> None:
    """Print the table of architectures, or what changed in it."""
    from act_harness.bench.family_table import compare, make_table, read_table, write_table
    from act_harness.support.places import prepare_file

    before = None if against is None else read_table(against)
    if output is not None:
        prepare_file(output)
    table = make_table(progress=lambda kind: typer.echo(kind, err=True))
    if output is not None:
        write_table(output, table)
    if before is None:
        print(f"\n{table.markdown()}")
        return
    changes = compare(before, table)
    print(f"\n{changes.markdown}")
    if changes.worse:
        raise typer.Exit(1)


@app.command("tasks-path")
def tasks_path() -> None:
    """Print the folder of the task files, for --include_path.

    \b
    Example:
      lm_eval ls tasks --include_path "$(act-harness tasks-path)"
    """
    from act_harness.support import paths

    print(paths.tasks_path())
