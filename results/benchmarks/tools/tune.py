"""Block sizes of the CUDA engine's prefill kernels: compile, check against float64, time.

Candidates are compiled and checked in processes of their own (one that fails or crashes is left
out), from inputs and into memory that holds NaN wherever nothing was written. Then every kernel is
timed alone, as a CUDA graph over three input sets, and the whole operation with the fastest blocks
beside stock attention. Run as ``python results/benchmarks/tools/tune.py --seconds 150``; the tables
come last, all numbers go to ``tune.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from act_harness.bench.arguments import (
    Arguments,
    read_count,
    read_counts,
    read_device,
    read_dtype,
    read_shapes,
)
from act_harness.bench.attention import Inputs, planted, run_engine, stock
from act_harness.bench.common import alternate, replayed
from act_harness.calibration import Calibration, LayerPlan
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import Stock
from act_harness.engines.reference import ReferenceEngine
from act_harness.engines.stock import attend_with_lse
from act_harness.errors import suggestion
from act_harness.support import places

__all__ = ["main"]

Change = dict[str, Any]

# Most promising first. Columns of the sums decide how often queries are read from the L2 cache.
SUMS: list[Change] = [
    {
        "sums_rows": rows,
        "sums_columns": columns,
        "sums_warps": warps,
        "stages": stages,
        "sums_registers": registers,
        "fold": fold,
    }
    for rows, columns, warps, stages, registers, fold in (
        (64, 128, 4, 3, 168, True),
        (64, 128, 8, 4, None, True),
        (64, 256, 8, 2, 128, True),
        (64, 64, 4, 3, None, True),
        (64, 128, 8, 3, None, True),
        (128, 128, 8, 2, 128, True),
        (128, 64, 4, 3, None, True),
        (64, 64, 4, 4, 128, True),
        (64, 128, 4, 3, 128, True),
        (64, 256, 8, 3, 128, True),
        (128, 64, 4, 2, 128, True),
        (64, 128, 8, 3, None, False),
    )
]
# Of 128 rows one program fits a multiprocessor (fewer registers spill in the loop), of 64 two, or
# three with 168 registers; but these read keys and values twice as often. Items beyond what the
# chip takes at once even the load out, but their parts must be added up.
DIRECT: list[Change] = [
    {
        "direct_rows": rows,
        "direct_columns": columns,
        "direct_warps": warps,
        "direct_stages": stages,
        "direct_registers": registers,
        "items": items,
    }
    for rows, columns, warps, stages, registers, items in (
        (128, 64, 8, 3, None, 264),
        (64, 64, 4, 3, None, 528),
        (128, 64, 8, 3, None, 528),
        (64, 32, 4, 3, 168, 792),
        (128, 128, 8, 2, None, 264),
        (64, 64, 4, 3, None, 264),
        (128, 64, 8, 4, None, 264),
        (64, 32, 4, 4, None, 528),
        (128, 64, 8, 3, None, 132),
        (64, 64, 4, 2, None, 528),
        (128, 64, 8, 3, None, 396),
        (64, 64, 4, 3, None, 1056),
        (64, 32, 4, 3, 168, 396),
    )
]
APPLY: list[Change] = [
    {
        "apply_rows": rows,
        "apply_warps": warps,
        "apply_stages": stages,
        "apply_registers": registers,
    }
    for rows, warps, stages, registers in (
        (64, 4, 1, 168),
        (128, 8, 1, 128),
        (64, 4, 1, 128),
        (64, 4, 1, None),
        (64, 4, 3, None),
    )
]
FINISH: list[Change] = [{"finish_rows": rows} for rows in (64, 32, 16)]


class Setting(NamedTuple):
    """What is computed: dtype and device are names, so that processes can be told."""

    heads: int
    groups: int
    size: int
    dtype: str
    device: str


def _blocks(setting: Setting, tokens: int, *changes: Change) -> Any:  # noqa: ANN401 - needs triton
    from act_harness.engines.triton.blocks import default_blocks

    blocks = default_blocks(setting.size, getattr(torch, setting.dtype), tokens)
    for change in changes:
        blocks = blocks._replace(**change)
    return blocks


def _plan(setting: Setting, selected: int) -> LayerPlan:
    step = setting.heads / selected
    return LayerPlan.uniform(Calibration(), tuple(int(step * n) for n in range(selected)))


def _inputs(setting: Setting, batch: int, tokens: int, seed: int) -> Inputs:
    return planted(
        seed, batch=batch, heads=setting.heads, groups=setting.groups, tokens=tokens,
        size=setting.size, dtype=getattr(torch, setting.dtype), device=setting.device,
    )  # fmt: skip


def check(setting: Setting, change: Change, tokens: int, selected: int) -> dict[str, Any]:
    """Compile one candidate and compare its rows with float64; ``error`` is the worst row's."""
    from act_harness.engines.triton.engine import TritonEngine

    began = time.perf_counter()
    if setting.device != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    plan = _plan(setting, selected)
    blocks = _blocks(setting, 8192, change)
    inputs = _inputs(setting, 2, tokens, 7)
    geometry = inputs.geometry()
    heads = torch.tensor(plan.heads, device=setting.device)
    group = heads // (setting.heads // setting.groups)
    few = Inputs(
        inputs.query[:, heads].double(),
        inputs.key[:, group].double(),
        inputs.value[:, group].double(),
    )
    alone = LayerPlan.uniform(Calibration(), tuple(range(selected)))
    exact = run_engine(ReferenceEngine(), few, geometry, alone)
    found = run_engine(TritonEngine(blocks), inputs, geometry, plan)
    again = run_engine(TritonEngine(blocks), inputs, geometry, plan)
    assert exact.state is not None and found.state is not None  # noqa: S101, PT018
    assert exact.report is not None and found.report is not None  # noqa: S101, PT018
    assert again.report is not None  # noqa: S101
    agree = (found.state.sinks == exact.state.sinks).all(-1)  # (B, h)
    mine = found.output[:, :, heads].double()
    errors = (mine - exact.output).norm(dim=-1) / exact.output.norm(dim=-1)  # (B, N, h)
    errors = torch.where(agree[:, None], errors, 0.0)
    moved = (found.report.moved - exact.report.moved).abs() / exact.report.moved.clamp(min=1e-6)
    return {
        "error": float(errors.nan_to_num(nan=1e9).max()),
        "moved": float(torch.where(agree, moved, 0.0).nan_to_num(nan=1e9).max()),
        "unequal": int((~agree & ~found.report.near).sum()),
        "left_out": int((~agree).sum()),
        "repeats": bool(torch.equal(found.output, again.output))
        and bool(torch.equal(found.report.facts, again.report.facts)),
        "kernels": _resources(),
        "seconds": time.perf_counter() - began,
    }


def _resources() -> dict[str, str]:
    """Registers, spills and shared memory of what this process compiled."""
    from act_harness.engines.triton import direct_kernels as direct
    from act_harness.engines.triton import prefill_kernels as kernels

    found = {}
    for kernel in (
        kernels.column_sums, kernels.flag_sinks, kernels.apply_sinks,
        direct.gather_rows, direct.direct_sums, direct.finish_direct,
    ):  # fmt: skip
        for caches in getattr(kernel, "device_caches", {}).values():
            for built in caches[0].values():
                shared = built.metadata.shared / 1024
                name = kernel.__name__
                found[name] = f"{built.n_regs} regs, {built.n_spills} spills, {shared:.0f} KiB"
    return found


def _good(found: dict[str, Any], dtype: str) -> bool:
    limit = {"float32": 1e-4, "float16": 4e-3}.get(dtype, 1.5e-2)
    return (
        found["error"] < limit
        and found["moved"] < 1e-2
        and not found["unequal"]
        and bool(found["repeats"])
    )


def prepare(
    setting: Setting, changes: list[Change], tokens: int, workers: int, until: float
) -> dict[str, dict[str, Any]]:
    """Check candidates in parallel; return what was found by candidate, failures included."""
    found: dict[str, dict[str, Any]] = {}
    run = functools.partial(check, setting, tokens=tokens, selected=min(7, setting.heads))
    if workers < 2:
        return {_name(c): _attempt(functools.partial(run, c)) for c in changes}
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    waiting = {pool.submit(run, change): _name(change) for change in changes}
    try:
        for future in as_completed(waiting, timeout=max(1.0, until - time.monotonic())):
            found[waiting[future]] = _attempt(future.result)
    except TimeoutError:
        print("some candidates were not ready in time")
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def _attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return function()
    except (RuntimeError, BrokenProcessPool) as error:  # what compilers and CUDA raise
        return {"failed": f"{type(error).__name__}: {str(error)[-300:]}"}
    except Exception as error:  # noqa: BLE001 - a compiler's own classes: reported, not hidden
        return {"failed": f"{type(error).__name__}: {str(error)[-300:]}"}


def _name(change: Change) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items())


class Bench:
    """One shape: three input sets, with everything the stages need computed once."""

    def __init__(self, setting: Setting, batch: int, tokens: int, selected: int) -> None:
        self.setting, self.batch, self.tokens, self.selected = setting, batch, tokens, selected
        self.plan = _plan(setting, selected)
        self.sets = [_inputs(setting, batch, tokens, seed) for seed in range(3)]
        self.geometry: Geometry = self.sets[0].geometry()
        self.base = [
            attend_with_lse(
                x.call,
                geometry=self.geometry,
                stock=Stock(functools.partial(stock, x), kernel="sdpa"),
            )
            for x in self.sets
        ]

    def stages(self, blocks: Any) -> Iterator[dict[str, Callable[[], object]]]:  # noqa: ANN401
        """The kernels of one call, by stage, for every input set."""
        from act_harness.engines.triton.engine import TritonEngine
        from act_harness.engines.triton.prefill import Launches

        engine = TritonEngine(blocks)
        for inputs, base in zip(self.sets, self.base, strict=True):
            selection = engine._select(self.plan, inputs.query.device)
            launches = Launches(engine, inputs.call, self.geometry, selection, base.lse)
            output = base.output.clone()
            sinks, _ = launches.detect()
            sums = torch.empty(self.batch, self.selected, self.tokens, device=output.device)
            found = launches.correct(sinks, output, report=True)
            yield {
                "sums": functools.partial(launches._sums, sums),
                "correct": functools.partial(launches.correct, sinks, output.clone(), report=True),
                "direct": functools.partial(launches.sum_anew, sinks, output, found),
            }

    def stage_time(self, stage: str, blocks: Any, rounds: int) -> float:  # noqa: ANN401
        """Seconds of a stage: median over rounds, each over all input sets."""
        runs = [stages[stage] for stages in self.stages(blocks)]
        return self._time(lambda _: [run() for run in runs], rounds) / len(runs)

    def _time(self, function: Callable[[int], object], rounds: int) -> float:
        device = self.setting.device
        if device != "cpu":
            function = replayed(function)
        return alternate({"": function}, device=device, rounds=rounds)[""].median

    def whole(self, variants: dict[str, Any], rounds: int) -> dict[str, tuple[float, float]]:
        """Seconds of the whole operation, and their ratio to stock attention, by variant."""
        from act_harness.engines.triton.engine import TritonEngine

        def of(blocks: Any) -> Callable[[int], object]:  # noqa: ANN401
            engine = TritonEngine(blocks)
            return lambda turn: (
                run_engine(engine, self.sets[turn % 3], self.geometry, self.plan).output
            )

        def plain(turn: int) -> Tensor:
            return stock(self.sets[turn % 3])

        runs: dict[str, Callable[[int], object]] = {"stock": plain}
        runs |= {name: of(blocks) for name, blocks in variants.items()}
        device = self.setting.device
        if device != "cpu":
            runs = {name: replayed(run, 3) for name, run in runs.items()}
        timings = alternate(runs, device=device, rounds=rounds)
        base = timings["stock"].median
        return {name: (timing.median, timing.median / base) for name, timing in timings.items()}

    def profile(self, blocks: Any) -> dict[str, float]:  # noqa: ANN401
        """Microseconds of every kernel of one call, as the profiler sees them."""
        from act_harness.engines.triton.engine import TritonEngine

        if self.setting.device == "cpu":
            return {}
        engine = TritonEngine(blocks)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for inputs in self.sets:
                run_engine(engine, inputs, self.geometry, self.plan)
            torch.cuda.synchronize()
        times = {
            event.key[:40]: round(float(getattr(event, "device_time_total", 0.0)) / 3, 1)
            for event in profiler.key_averages()
        }
        return dict(sorted(times.items(), key=lambda pair: -pair[1])[:14])

    def listed(self) -> float:
        """Share of the selected heads' rows that are summed anew."""
        from act_harness.engines.triton.engine import TritonEngine
        from act_harness.engines.triton.prefill import Launches

        engine, inputs, base = TritonEngine(), self.sets[0], self.base[0]
        selection = engine._select(self.plan, inputs.query.device)
        launches = Launches(engine, inputs.call, self.geometry, selection, base.lse)
        sinks, _ = launches.detect()
        found = launches.correct(sinks, base.output.clone(), report=True)
        return float(found.counts.sum()) / (self.batch * self.selected * self.tokens)


class Stage(NamedTuple):
    """Candidates for some of the parameters, and the launches that they are timed in."""

    name: str
    launches: str
    candidates: list[Change]


STAGES = (
    Stage("sums", "sums", SUMS),
    Stage("direct", "direct", DIRECT),
    Stage("apply", "correct", APPLY),
    Stage("finish", "direct", FINISH),
)


def tune(
    bench: Bench,
    good: dict[str, bool],
    rounds: int,
    until: float,
    shortlist: dict[str, list[Change]],
) -> dict[str, Any]:
    """Time every stage's candidates, then the whole operation with the best."""
    setting = bench.setting
    best: list[Change] = []
    times: dict[str, list[tuple[float, str]]] = {}
    for stage, launches, candidates in STAGES:
        found: list[tuple[float, Change]] = []
        for change in shortlist.get(stage, candidates):
            if not good.get(_name(change), False) or (time.monotonic() > until and found):
                continue
            blocks = _blocks(setting, bench.tokens, *best, change)
            found.append((bench.stage_time(launches, blocks, rounds), change))
        found.sort(key=lambda pair: pair[0])
        times[stage] = [(round(t * 1e6, 1), _name(c)) for t, c in found]
        if found:
            best.append(found[0][1])
        shortlist.setdefault(stage, [c for _, c in found[:3]])
    variants = {"default": _blocks(setting, bench.tokens)}
    variants["best"] = _blocks(setting, bench.tokens, *best)
    whole = bench.whole(variants, rounds)
    return {
        "shape": f"{bench.batch}x{bench.tokens}",
        "selected": bench.selected,
        "listed": bench.listed(),
        "microseconds": times,
        "whole": {name: {"ms": t * 1e3, "ratio": r} for name, (t, r) in whole.items()},
        "profile": bench.profile(variants["best"]),
        "blocks": variants["best"]._asdict(),
    }


def _table(records: list[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        whole = ", ".join(
            f"{name} {x['ms']:.4g} ms ({x['ratio']:.3f})" for name, x in record["whole"].items()
        )
        shape = f"{record['shape']}, {record['selected']} heads"
        yield f"== {shape}, listed {record['listed']:.3f}: {whole}"
        for stage, times in record["microseconds"].items():
            for microseconds, name in times[: 6 if record["selected"] < 16 else 3]:
                yield f"   {stage} {microseconds:9.1f} us  {name}"
        yield "   " + ", ".join(f"{name} {t}" for name, t in record["profile"].items())


def _read_stages(text: str) -> list[Stage]:
    known = {stage.name: stage for stage in STAGES}
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"found {name!r}, expected some of {','.join(known)}{suggestion(name, known)}"
            )
    return [stage for name, stage in known.items() if name in names]


def main(arguments: list[str] | None = None) -> Path:
    """Tune from a command line; return the path of the numbers."""
    began = time.monotonic()
    cuda = torch.cuda.is_available()
    parser = Arguments(prog="python results/benchmarks/tools/tune.py", description=__doc__)
    add = parser.add_argument
    add("--seconds", type=read_count, default=150, help="stop at about that time")
    add("--shapes", type=read_shapes, default="1x8192,4x2048,1x32768", help="batch x tokens")
    add("--selected", type=read_counts, default="7,32", help="numbers of calibrated heads")
    add("--heads", type=read_count, default=32)
    add("--groups", type=read_count, default=8)
    add("--size", type=read_count, default=128)
    add("--dtype", type=read_dtype, default="bfloat16")
    add("--device", type=read_device, default="cuda" if cuda else "cpu")
    add("--rounds", type=read_count, default=20)
    add("--workers", type=read_count, default=min(14, os.cpu_count() or 1))
    add("--check-tokens", type=read_count, default=1040, help="a multiple of 16")
    add("--stages", type=_read_stages, default=",".join(s.name for s in STAGES), help="to tune")
    add("--candidates", type=read_count, default=99, help="of every stage")
    add("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    given = parser.parse_args(arguments)
    places.prepare_folder(given.out)
    setting = Setting(given.heads, given.groups, given.size, given.dtype, given.device)
    changes = [c for stage in given.stages for c in stage.candidates[: given.candidates]]
    checked = prepare(
        setting, changes, given.check_tokens, given.workers, began + 0.5 * given.seconds
    )
    good = {name: "failed" not in x and _good(x, given.dtype) for name, x in checked.items()}
    print(f"checked after {time.monotonic() - began:.0f} s")
    for name, found in checked.items():
        if not good[name]:
            print("left out:", name, found.get("failed") or found)
    worst = max((x["error"] for name, x in checked.items() if good[name]), default=0.0)
    print(f"{sum(good.values())} of {len(good)} candidates are right, worst row {worst:.2g}")
    records: list[dict[str, Any]] = []
    shortlists: dict[tuple[int, int], dict[str, list[Change]]] = {}
    path: Path = given.out / "tune.json"
    combinations = [(s, n) for n in given.selected for s in given.shapes]
    for number, (shape, selected) in enumerate(combinations):
        left = began + given.seconds - time.monotonic()
        if left < 5:
            print("out of time before", "x".join(map(str, shape)), selected)
            continue
        until = time.monotonic() + left / (len(combinations) - number) * 0.9
        batch, tokens = shape
        bench = Bench(setting, batch, tokens, selected)
        records.append(tune(bench, good, given.rounds, until, shortlists.setdefault(shape, {})))
        del bench
        path.write_text(json.dumps({"checked": checked, "records": records}, indent=1))
    for line in _table(records):
        print(line)
    print(f"{time.monotonic() - began:.0f} s in all; {path}")
    return path


if __name__ == "__main__":
    main()
