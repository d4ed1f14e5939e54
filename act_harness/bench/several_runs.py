"""Commands in processes of their own, on one device and on several, and what they left behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import act_harness
from act_harness.errors import InfrastructureError
from act_harness.support import places, reading

__all__ = ["Ran", "Runner", "kill_once_written", "own_lines", "process_of_rank"]

_LAST_WORDS = 45.0
"""Seconds that a launcher has to end its processes before it is killed; torchrun gives them 30."""


class Ran(NamedTuple):
    """A command that came to an end."""

    code: int | None
    """None: it was stopped because it took too long."""
    seconds: float
    log: Path
    command: str
    memory: tuple[float, ...]
    """GiB in use on each GPU at most, of all processes of the machine."""

    def fault(self) -> str:
        """Return why it counts as failed; empty: it does not."""
        if self.code == 0:
            return ""
        last = own_lines(self.log.read_text(encoding="utf-8", errors="replace"))
        said = last[-1] if last else f"see {self.log.name}"
        return f"stopped after {self.seconds:.0f} s" if self.code is None else said


def own_lines(text: str) -> list[str]:
    """Return the lines with which our processes said why they ended."""
    parts = (part for line in text.splitlines() for part in line.split("\r"))
    return [part for part in parts if part.startswith("act-harness")]


@dataclass
class Runner:
    """Where and how commands are run."""

    devices: int
    cpu: bool
    folder: Path
    """Of logs and of what the commands write."""
    seconds: float
    """That a command may take."""
    ran: dict[str, Ran] = field(default_factory=dict)

    def device(self, several: bool, number: int = 0) -> str:
        """Return what ``--device`` is given."""
        if self.cpu:
            return "cpu"
        return "cuda" if several else f"cuda:{number}"

    def launcher(self, several: bool, *, accelerate: bool = False) -> list[str]:
        """Return what a module is started by."""
        if not several:
            return [sys.executable]
        if (
            accelerate and not self.cpu
        ):  # on a CPU accelerate starts one process, whatever it's told
            return [
                sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                "--num_processes", str(self.devices), "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
            ]  # fmt: skip
        return [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(self.devices),
        ]  # fmt: skip

    def lm_eval(self) -> list[str]:
        """Return the module of lm-eval's command line; ours where it would not know the model."""
        found = importlib.metadata.entry_points(group="torch.backends")
        known = any(point.value.startswith("act_harness") for point in found)
        return ["-m", "lm_eval", "run"] if known else ["-m", "act_harness", "run", "run"]

    def environment(self) -> dict[str, str]:
        """Return the environment of all commands: this package, no network of its own accord."""
        package = str(Path(act_harness.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        if self.cpu:
            own["CUDA_VISIBLE_DEVICES"] = ""
        return {"OMP_NUM_THREADS": "1", **os.environ, **own}

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        meanwhile: Callable[[subprocess.Popen[bytes]], object] | None = None,
    ) -> Ran:
        """Run a command to its end, or to that of its time.

        Args:
            name: of its log.
            command: program and arguments.
            meanwhile: called with the running process, to do something to it.
        """
        log = self.folder / f"{places.file_name(name)}.log"
        began = time.monotonic()
        with log.open("wb") as stream, _memory(self.cpu) as memory:
            process = subprocess.Popen(  # noqa: S603 - our own modules
                command, stdout=stream, stderr=subprocess.STDOUT, env=self.environment()
            )
            try:
                if meanwhile is not None:
                    meanwhile(process)
                code: int | None = process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        shown = [Path(command[0]).name, *command[1:]]
        took = time.monotonic() - began
        ran = Ran(code, took, log, shlex.join(shown), tuple(memory))
        self.ran[name] = ran
        return ran


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there, and leave it time to end its own."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_LAST_WORDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _memory(cpu: bool) -> Iterator[list[float]]:
    """Watch how much memory is in use on each GPU while the block runs."""
    most: list[float] = []
    if cpu:
        yield most
        return
    over = threading.Event()
    most += [0.0] * torch.cuda.device_count()

    def watch() -> None:
        while not over.wait(0.5):
            for number in range(len(most)):
                free, total = torch.cuda.mem_get_info(number)
                most[number] = max(most[number], (total - free) / 2**30)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def process_of_rank(launcher: int, rank: int) -> int:
    """Return the process that a launcher started with a rank (Linux only).

    Raises:
        InfrastructureError: there is none.
    """
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has ended meanwhile
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (
                (place / "environ").read_bytes().split(b"\0")
            ):
                return int(place.name)
    raise InfrastructureError(f"process {launcher} has started none of rank {rank}; see its log")


def kill_once_written(
    process: subprocess.Popen[bytes], *, rank: int, folder: Path, lines: int, seconds: float
) -> None:
    """Kill one process of a search without a word, once it has measured something.

    Args:
        process: the launcher.
        rank: of the process to kill.
        folder: of the ledgers.
        lines: that its part must hold.
        seconds: to wait for that.

    Raises:
        InfrastructureError: the search has ended before, or wrote too little in that time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        parts = list(folder.glob(f"*/part-{rank:03d}.jsonl"))
        if parts and sum(1 for _ in reading.read_lines(parts[0], missing_ok=True)) >= lines:
            os.kill(process_of_rank(process.pid, rank), signal.SIGKILL)
            return
        time.sleep(0.02)
    raise InfrastructureError(f"the search wrote no {lines} lines before it ended; give it more")
