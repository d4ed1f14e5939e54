r"""The same numbers on one device and on several: every way of using them, as separate commands.

Each check runs ``act-harness`` or ``lm_eval`` as a user would, on one device and on several, and
compares scores, counters, texts and artifacts. One that fails is a row; the others go on.

    cd FOLDER_WITH_DATA_SETS
    python -m act_harness.bench.several --devices 2 --pretrained MODEL --output DIR
    python -m act_harness.bench.several --devices 2 --cpu --pretrained TINY --tasks act_demo_word
    python -m act_harness.bench.several --devices 2 --pretrained MODEL --random 7b \\
        --only eval,lm-eval-act,parallelize,device-map,tensor-parallel --output DIR
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from act_harness.bench.arguments import Arguments, read_count, read_dtype
from act_harness.bench.common import BenchmarkReport, Table, command_line, describe_machine
from act_harness.bench.models import random_llama
from act_harness.bench.several_checks import CHECKS, Row, SeveralDevices, checked
from act_harness.bench.several_runs import Runner
from act_harness.errors import InfrastructureError, InputError, unknown_name
from act_harness.support import places

if TYPE_CHECKING:
    import argparse

__all__ = ["main"]

_COLUMNS = ("check", "result", "largest difference", "s on 1", "s on {}", "note")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the checks from a command line; return the report's path.

    Raises:
        InputError: there is no such check.
        InfrastructureError: there are fewer GPUs than asked for.
        SystemExit: with status 1, where a check found a difference or failed.
    """
    given = _parser().parse_args(arguments)
    names = given.only.split(",") if given.only else list(CHECKS)
    for name in names:
        if name not in CHECKS:
            raise InputError(unknown_name(f"check {name!r}", name, CHECKS))
    gpus = torch.cuda.device_count()
    if not given.cpu and gpus < given.devices:
        raise InfrastructureError(
            f"{given.devices} GPUs were asked for and this machine has {gpus}; give --devices, or "
            "--cpu for processes on the CPU"
        )
    output = places.prepare_folder(given.output).resolve()
    stem = given.name or f"several-{_model_name(given)}-{given.dtype}"
    folder = places.new_folders(output, {"runs": f"{stem}-runs"})["runs"]
    runner = Runner(given.devices, given.cpu, folder, given.timeout)
    devices = SeveralDevices(
        _pretrained(given, output), given.tasks, given.limit, given.dtype, runner, given.samples
    )
    report = BenchmarkReport(
        name=stem,
        title=f"One device and {given.devices}: {_model_name(given)}, {given.dtype}",
        machine=describe_machine("cpu" if given.cpu else "cuda:0"),
        command=command_line(),
        remarks=[
            f"log-likelihoods may differ by {devices.tolerance.words}; a gradient's artifact by "
            "1e-3 (its sums over documents are added in another order); texts not at all",
            f"`eval` on one device is what all evaluations are compared with; {given.limit} "
            "documents a task, both arms; seconds are of whole commands with start and loading",
            "same: as on one device; refused: as it must be, in one line",
            *([f"{given.at_once} checks at a time, so seconds say little"] * (given.at_once > 1)),
        ],
    )
    rows = _all_rows(names, devices, report, given)
    fine = sum(row.fine for row in rows)
    print(f"{fine} of {len(names)} as they should be: {output / report.name}.md", flush=True)
    if fine < len(names):
        raise SystemExit(1)
    return output / f"{report.name}.md"


def _all_rows(
    names: list[str], devices: SeveralDevices, report: BenchmarkReport, given: argparse.Namespace
) -> list[Row]:
    """Do the checks; the report is written anew after each."""
    began, rows, writing = time.monotonic(), dict[str, Row](), threading.Lock()

    def check(name: str) -> None:
        if time.monotonic() - began > given.seconds:
            row = Row(name, "not begun", None, None, None, f"{given.seconds:.0f} s were over")
        else:
            row = checked(name, devices)
        print(f"{name}: {row.fate}{f' ({row.note})' if row.note else ''}", flush=True)
        with writing:
            rows[name] = row
            write()

    def write() -> None:
        done = [rows[one] for one in names if one in rows]
        columns = [column.format(given.devices) for column in _COLUMNS]
        commands = list(devices.runner.ran.items())
        report.tables = [
            Table("Checks", columns, list(done)),
            Table("Commands", ("run", "exit code", "seconds", "command"), [
                (run, ran.code, ran.seconds, _public(ran.command, devices)) for run, ran in commands
            ]),
        ]  # fmt: skip
        report.write(given.output)

    with ThreadPoolExecutor(given.at_once) as pool:
        list(pool.map(check, names))
    return list(rows.values())


def _public(command: str, devices: SeveralDevices) -> str:
    """Return a command without folders of this machine."""
    known = {str(devices.folder): "DIR", devices.pretrained: Path(devices.pretrained).name}
    for folder, name in known.items():
        command = command.replace(folder, name)
    return command


def _model_name(given: argparse.Namespace) -> str:
    return f"llama-{given.random}-random" if given.random else Path(given.pretrained).name


def _pretrained(given: argparse.Namespace, output: Path) -> str:
    """Return the model's folder or hub id; a random one is made, with the other's tokenizer."""
    place = Path(given.pretrained)
    pretrained = str(place.resolve()) if place.is_dir() else given.pretrained
    if not given.random:
        return pretrained
    from act_harness.attention.load import load_plain_tokenizer

    folder = output / _model_name(given)
    if not (folder / "config.json").is_file():
        tokenizer = load_plain_tokenizer(pretrained)
        model = random_llama(
            given.random, dtype=given.dtype, device="cpu" if given.cpu else "cuda:0",
            vocabulary=len(tokenizer),
        )  # fmt: skip
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return str(folder)


def _parser() -> Arguments:
    parser = Arguments(prog="act-harness bench several", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=read_count, default=2, help="GPUs, or CPU processes")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU")
    parser.add_argument("--pretrained", required=True, help="hub id or folder of the model")
    parser.add_argument("--random", choices=("7b", "1b", "tiny"), help="a random Llama instead,"
                        " with the tokenizer of --pretrained; made in --output")  # fmt: skip
    parser.add_argument("--tasks", default="act_sst2,act_copa,act_hellaswag,act_arc_easy",
                        help="of evaluations; the first is searched")  # fmt: skip
    parser.add_argument("--limit", type=read_count, default=24, help="documents per task")
    parser.add_argument("--samples", type=read_count, default=12, help="documents of a search")
    parser.add_argument("--dtype", type=read_dtype, default="float32")
    parser.add_argument("--only", help=f"by commas, of {', '.join(CHECKS)}; all if missing")
    parser.add_argument("--timeout", type=float, default=180, help="seconds of a command")
    parser.add_argument("--seconds", type=float, default=3600, help="no check begins after these")
    parser.add_argument("--at-once", type=read_count, default=1, help="checks at a time")
    parser.add_argument("--name", help="of the report")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    return parser


if __name__ == "__main__":
    print(main())
