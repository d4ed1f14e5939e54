"""What all benchmarks share: the machine in words, fair timing, and the files a run leaves.

Variants are timed in turns within one process, the order reversed every round, so that a busy
neighbour or a clock that drifts hits all of them; what is reported is the median of each and the
median of the ratios within a round. Results go to ``results/benchmarks/NAME.json`` (all numbers,
with the seconds of every round), ``NAME.md`` (tables) and ``NAME.png``.
"""

from __future__ import annotations

import gc
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from act_harness.evidence.figures import new_figure, save_figure
from act_harness.evidence.tables import markdown_cell, markdown_table
from act_harness.support.atomic import write_json, write_text
from act_harness.support.provenance import collect, describe_device

__all__ = [
    "BenchmarkReport",
    "Machine",
    "Table",
    "Timing",
    "alternate",
    "command_line",
    "describe_machine",
    "peak_memory",
    "ratio",
    "replayed",
    "synchronize",
    "write_plot",
]


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured."""

    chip: str
    threads: int
    memory_gib: float
    python: str
    versions: dict[str, str]
    created: str
    commit: str | None
    dirty: bool | None

    def line(self) -> str:
        """Return the machine as one line for a report."""
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        state = "" if not self.dirty else " with local changes"
        commit = f"; commit {self.commit[:12]}{state}" if self.commit else ""
        return (
            f"{self.chip}, {self.memory_gib:.0f} GiB, {self.threads} CPU threads; "
            f"Python {self.python}, {packages}; {self.created}{commit}"
        )


def describe_machine(device: str = "cpu") -> Machine:
    """Describe the machine; ``device`` is written as torch writes it (``cpu``, ``cuda:0``)."""
    origin = collect(device=device)
    versions = {}
    for name in ("torch", "triton", "transformers", "lm_eval", "act_harness"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        versions["cuda"] = str(torch.version.cuda)
    else:
        memory = _main_memory()
    return Machine(
        chip=describe_device(device),
        threads=torch.get_num_threads(),
        memory_gib=memory,
        python=platform.python_version(),
        versions=versions,
        created=origin.created,
        commit=origin.commit,
        dirty=origin.dirty,
    )


def _main_memory() -> float:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return float("nan")
    return int(text.split("MemTotal:")[1].split()[0]) / 2**20


def command_line() -> str:
    """Return the command of this process, without folders of this machine."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one sample for each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between first and third quartile over the median (0 below four rounds)."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


def synchronize(device: str) -> None:
    """Wait until an accelerator has done all that was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    variants: Mapping[str, Callable[[int], object]],
    *,
    device: str = "cpu",
    rounds: int = 20,
    warmup: int = 2,
    repeat: int = 1,
    progress: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time variants in turns.

    Args:
        variants: by name, functions of the round's number (choose an input set by it, so that a
            cache does not hold it from the last call).
        device: where they compute; on ``cuda`` time is taken with events on the device.
        rounds: samples for each variant; the order is reversed every other round.
        warmup: calls of each variant before anything counts.
        repeat: calls that one sample is the mean of, for variants of microseconds.
        progress: called after every round.
    """
    for number in range(warmup):
        for function in variants.values():
            function(number)
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        order = list(variants.items())
        for name, function in order if number % 2 == 0 else reversed(order):
            samples[name].append(_sample(function, number, device, repeat))
        if progress is not None:
            progress()
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _sample(function: Callable[[int], object], number: int, device: str, repeat: int) -> float:
    if torch.device(device).type == "cuda":
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        first.record()
        for turn in range(repeat):
            function(number + turn)
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repeat
    began = time.perf_counter()
    for turn in range(repeat):
        function(number + turn)
    return (time.perf_counter() - began) / repeat


def replayed(function: Callable[[int], object], sets: int = 1) -> Callable[[int], object]:
    """Capture a function's device work once per input set; return what replays it.

    Replays leave out what the host does between launches, which a whole model hides behind its
    other work and an operation alone does not. CUDA only.
    """
    graphs = []
    for number in range(sets):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(number)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(number)
        graphs.append(graph)
    return lambda turn: graphs[turn % sets].replay()


def ratio(timings: Mapping[str, Timing], name: str, base: str) -> float:
    """Return the median over the rounds of ``name``'s time over that of ``base``."""
    pairs = zip(timings[name].samples, timings[base].samples, strict=True)
    return statistics.median(a / b for a, b in pairs)


def peak_memory(function: Callable[[], object], *, device: str) -> int | None:
    """Return the most bytes held during a call: of a CUDA device, or resident in this process.

    None on other devices, and on systems without Linux's ``/proc``.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    process = Path("/proc/self")
    if torch.device(device).type != "cpu" or not (process / "clear_refs").exists():
        return None
    gc.collect()
    try:
        (process / "clear_refs").write_text("5")  # the peak becomes what is resident now
    except OSError:
        return None
    function()
    found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    return None if found is None else 1024 * int(found[1])


@dataclass
class Table:
    """One table of a report; cells are written as given, floats with four digits."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown, with its title as a heading."""
        lines = [f"## {markdown_cell(self.title)}", ""]
        if self.note:
            lines += [markdown_cell(self.note), ""]
        rows = [[_shown(value) for value in row] for row in self.rows]
        lines.append(markdown_table(self.columns, rows, compact=True))
        return "\n".join(lines)


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever a table holds
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class BenchmarkReport:
    """A benchmark run: tables, what they mean, and where they were measured."""

    name: str
    title: str
    machine: Machine
    command: str
    tables: list[Table] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    figure: str | None = None
    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """What was timed, then variant, to its seconds in every round; in the JSON file alone."""

    def add_rounds(self, what: str, timings: Mapping[str, Timing]) -> None:
        """Keep the seconds of every round of something that was timed."""
        self.rounds[what] = {name: list(timing.samples) for name, timing in timings.items()}

    def write(self, folder: Path) -> Path:
        """Write ``NAME.md`` and ``NAME.json`` into a folder; return the Markdown file's path."""
        write_json(folder / f"{self.name}.json", asdict(self))
        return write_text(folder / f"{self.name}.md", self.markdown())

    def markdown(self) -> str:
        """Return the report in Markdown."""
        parts = [
            f"# {markdown_cell(self.title)}",
            "",
            markdown_cell(self.machine.line()),
            "",
            f"    {self.command}",
            "",
        ]
        parts += [f"- {markdown_cell(remark)}" for remark in self.remarks]
        parts += ["", *(table.markdown() for table in self.tables)]
        if self.figure:
            parts.append(f"![{markdown_cell(self.title)}]({self.figure})\n")
        return "\n".join(parts)


def write_plot(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    logarithmic: bool = True,
) -> Path:
    """Draw lines, one (x, y) pair of sequences for each name, into a PNG file.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = new_figure(width=7, height=4.5, dots=120)
    axes = figure.subplots()
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", label=name)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")
    return save_figure(figure, path)
