"""The operation alone: stock attention, the engines, and calibration the eager way.

Inputs are random with planted sinks, so that rows of small and of large sink mass occur; several
input sets are rotated. Run as ``python -m act_harness.bench.attention --help``.

Not measured here: whole models (:mod:`act_harness.bench.models`).
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from act_harness.bench.arguments import (
    Arguments,
    read_count,
    read_counts,
    read_device,
    read_dtype,
    read_shapes,
)
from act_harness.bench.common import (
    BenchmarkReport,
    Table,
    Timing,
    alternate,
    command_line,
    describe_machine,
    peak_memory,
    ratio,
    replayed,
    synchronize,
    write_plot,
)
from act_harness.calibration import Calibration, LayerPlan
from act_harness.engines import select_engine
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import AttentionCall, Engine, EngineResult, Stock
from act_harness.engines.reference import calibrate_weights
from act_harness.errors import InputError
from act_harness.support import places

__all__ = ["Inputs", "ceilings", "eager_calibrated", "floor", "main", "planted", "run_engine"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Query (B, H, N, D), key and value (B, G, N, D) of one layer."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def call(self) -> AttentionCall:
        """The attention that the model asks for."""
        return AttentionCall(self.query, self.key, self.value, self.query.shape[-1] ** -0.5)

    def geometry(self) -> Geometry:
        """Return a prompt without pads; its once-per-forward facts are looked up already."""
        batch, _, tokens, _ = self.query.shape
        real = torch.ones(batch, tokens, dtype=torch.bool, device=self.query.device)
        geometry = Geometry(real, real, 0, 0, tokens)
        _ = (
            geometry.plain,
            geometry.only_prompt,
            geometry.prompt_census,
            geometry.has_continuation_rows,
        )
        _ = geometry.has_prompt_rows, geometry.intervals, geometry.first
        return geometry


def planted(
    seed: int,
    *,
    batch: int,
    heads: int,
    groups: int,
    tokens: int,
    size: int,
    dtype: torch.dtype,
    device: str,
    strength: float | None = None,
    sinks: int = 6,
) -> Inputs:
    """Make inputs whose first token and ``sinks`` others draw attention, more in some rows.

    Without a ``strength`` the inputs are made for timing: sinks have small values, as in real
    models, and about one row in nine would lose digits by subtraction, as was seen in real maps of
    SmolLM2 (those rows cost the CUDA engine most).
    """
    drained = 1.0 if strength is not None else 0.4
    if strength is None:
        strength = (math.log(max(tokens, 16) / 6) + 0.5) / 1.9
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    query, key = normal(batch, heads, tokens, size), normal(batch, groups, tokens, size)
    direction = torch.nn.functional.normalize(normal(batch, groups, 1, size), dim=-1)
    amount = (1 + 0.5 * normal(batch, heads, tokens, 1)).abs() * size**0.25
    query += direction.repeat_interleave(heads // groups, dim=1) * amount
    places = torch.randperm(max(tokens // 2, 1), generator=generator, device=device)[:sinks]
    places = torch.cat([places.new_zeros(1), places])
    key[:, :, places] += direction * strength * size**0.25
    value = normal(batch, groups, tokens, size)
    value[:, :, places] *= drained
    return Inputs(query.to(dtype), key.to(dtype), value.to(dtype))


def stock(inputs: Inputs) -> Tensor:
    """Return what an uncalibrated model computes, (B, N, H, D)."""
    out = scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=True,
        enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def run_engine(engine: Engine, inputs: Inputs, geometry: Geometry, plan: LayerPlan) -> EngineResult:
    """Calibrate one prefill of one layer."""
    return engine(
        inputs.call,
        geometry=geometry,
        plan=plan,
        state=None,
        stock=Stock(lambda: stock(inputs), kernel="sdpa"),
    )


def eager_calibrated(inputs: Inputs, plan: LayerPlan) -> Tensor:
    """Calibrate as eager attention code does: the map of every head, then head by head.

    Written from the method's description, to have its cost in the comparison: softmax in float32
    over the map of all heads, repeated keys and values, a Python loop over the selected heads.
    """
    group = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (inputs.key, inputs.value))
    tokens = key.shape[2]
    weights = inputs.query @ key.transpose(2, 3) * inputs.query.shape[-1] ** -0.5
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=key.device).triu(1)
    weights = weights.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(inputs.query.dtype)
    for slot, head in enumerate(plan.heads):
        weights[:, head : head + 1] = calibrate_weights(
            weights[:, head : head + 1].float(),
            calibration=plan.calibration,
            strengths=plan.strengths[slot : slot + 1],
        ).to(weights.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def ceilings(device: str) -> dict[str, float]:
    """Measure bytes per second of a copy and operations per second of a bf16 product."""
    if torch.device(device).type != "cuda":
        return {}
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    timings = alternate(
        {"copy": lambda _: target.copy_(source), "product": lambda _: a @ b},
        device=device,
        rounds=10,
    )
    return {
        "bytes/s": 2 * source.nbytes / timings["copy"].median,
        "bf16 operations/s": 2 * 8192**3 / timings["product"].median,
    }


def floor(shape: dict[str, int], selected: int, limits: dict[str, float], base: float) -> float:
    """Return the least seconds of a calibrated prefill.

    The stock kernel as measured, plus the products of the selected heads' queries and keys (causal
    half) at the measured rate of products; reading them once more is less.
    """
    if not limits:
        return base
    per_head = shape["batch"] * shape["tokens"] ** 2 * shape["size"]  # 2 operations, causal half
    moved = 2 * 2 * shape["batch"] * selected * shape["tokens"] * shape["size"]
    extra = max(selected * per_head / limits["bf16 operations/s"], moved / limits["bytes/s"])
    return base + extra


def _variants(
    sets: list[Inputs], geometry: Geometry, plan: LayerPlan, engines: dict[str, Engine], eager: bool
) -> dict[str, Callable[[int], object]]:
    def of(engine: Engine) -> Callable[[int], object]:
        return lambda turn: run_engine(engine, sets[turn % len(sets)], geometry, plan)

    found: dict[str, Callable[[int], object]] = {
        "stock": lambda turn: stock(sets[turn % len(sets)])
    }
    found |= {name: of(engine) for name, engine in engines.items()}
    if eager:
        found["eager"] = lambda turn: eager_calibrated(sets[turn % len(sets)], plan)
    return found


def measure(
    shape: dict[str, int],
    selected: int,
    *,
    device: str,
    dtype: torch.dtype,
    engines: dict[str, Engine],
    rounds: int,
    limits: dict[str, float],
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Timing]]]:
    """Time all variants on one shape; return a record for each, and timings of calls and graphs."""
    sets = [planted(seed, **shape, dtype=dtype, device=device) for seed in range(3)]
    step = shape["heads"] / selected
    heads = tuple(int(step * n) for n in range(selected))
    plan = LayerPlan.uniform(Calibration(), heads)
    geometry = sets[0].geometry()
    # Masks of all heads, in several copies; the eager version is left out where they do not fit.
    needed = shape["batch"] * shape["heads"] * shape["tokens"] ** 2 * 12
    free = torch.cuda.mem_get_info()[0] if torch.device(device).type == "cuda" else 8 << 30
    variants = _variants(sets, geometry, plan, engines, needed < free)
    peaks = {
        name: peak_memory(lambda run=run: run(0), device=device)  # type: ignore[misc]
        for name, run in variants.items()
    }
    synchronize(device)
    timings = alternate(variants, device=device, rounds=rounds)
    device_only: dict[str, Timing] = {}
    if torch.device(device).type == "cuda":
        kept = {name: run for name, run in variants.items() if name in ("stock", "triton")}
        graphs = {name: replayed(run, len(sets)) for name, run in kept.items()}
        device_only = alternate(graphs, device=device, rounds=rounds)
    base = device_only.get("stock", timings["stock"])
    least = floor(shape, selected, limits, base.median)
    records = []
    for name, timing in timings.items():
        peak, stock_peak = peaks[name], peaks["stock"]
        records.append(
            {
                **shape,
                "selected": selected,
                "variant": name,
                "ms": timing.median * 1e3,
                "spread": timing.spread,
                "ratio": ratio(timings, name, "stock"),
                "device_ms": device_only[name].median * 1e3 if name in device_only else None,
                "device_ratio": (
                    ratio(device_only, name, "stock") if name in device_only else None
                ),
                "over_floor": device_only.get(name, timing).median / least,
                "peak_gib": None if peak is None else peak / 2**30,
                "peak_ratio": None if peak is None or not stock_peak else peak / stock_peak,
            }
        )
        _logger.info("%s", records[-1])
    return records, {"calls": timings, "graphs": device_only}


_COLUMNS = (
    "batch", "tokens", "selected", "variant", "ms", "ratio", "device_ms", "device_ratio",
    "over_floor", "peak_ratio",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    """Run the benchmark from a command line; return the report's path."""
    parser = Arguments(prog="act-harness bench attention", description=__doc__)
    parser.add_argument(
        "--device",
        type=read_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--dtype", type=read_dtype, default="bfloat16")
    parser.add_argument(
        "--shapes",
        type=read_shapes,
        default="4x2048,1x8192,1x32768",
        help="batch x tokens",
    )
    parser.add_argument("--heads", type=read_count, default=32)
    parser.add_argument("--groups", type=read_count, default=8, help="key heads")
    parser.add_argument("--size", type=read_count, default=128, help="values of a head")
    parser.add_argument(
        "--selected",
        type=read_counts,
        default="7,32",
        help="numbers of calibrated heads",
    )
    parser.add_argument("--engines", default="triton" if torch.cuda.is_available() else "torch")
    parser.add_argument("--rounds", type=read_count, default=20)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    given = parser.parse_args(arguments)
    places.prepare_folder(given.output)
    engines = {name: select_engine(name, device=given.device) for name in given.engines.split(",")}
    limits = ceilings(given.device)
    records: list[dict[str, Any]] = []
    rounds: dict[str, dict[str, Timing]] = {}
    for batch, tokens in given.shapes:
        shape = {
            "batch": batch,
            "heads": given.heads,
            "groups": given.groups,
            "tokens": tokens,
            "size": given.size,
        }
        for selected in given.selected:
            found, timings = measure(
                shape,
                selected,
                device=given.device,
                dtype=getattr(torch, given.dtype),
                engines=engines,
                rounds=given.rounds,
                limits=limits,
            )
            records += found
            rounds |= {
                f"{batch}x{tokens}, {selected} heads, {how}": t for how, t in timings.items() if t
            }
    return _write(records, rounds, given, limits)


def _write(
    records: list[dict[str, Any]],
    rounds: dict[str, dict[str, Timing]],
    given: argparse.Namespace,
    limits: dict[str, float],
) -> Path:
    kind = torch.device(given.device).type
    report = BenchmarkReport(
        name=f"attention-{kind}",
        title=f"Calibrated attention, the operation alone ({kind})",
        machine=describe_machine(given.device),
        command=command_line(),
        remarks=[f"{given.rounds} rounds, variants in turns, order reversed every other round"],
    )
    for what, timings in rounds.items():
        report.add_rounds(what, timings)
    report.tables.append(
        Table(
            f"{given.heads} query and {given.groups} key heads of {given.size}, {given.dtype}",
            _COLUMNS,
            [[record[name] for name in _COLUMNS] for record in records],
            note="ratio: median over rounds of the time over stock attention in the same round, "
            "each call issued by the host after the device was idle. device_ms, "
            "device_ratio: the same "
            "work replayed as a CUDA graph, without the host's gaps. over_floor: device time over "
            "the least time (stock kernel, and the selected heads' products at the measured rate).",
        )
    )
    if limits:
        report.remarks.append(
            "measured ceilings: " + ", ".join(f"{k} {v:.3g}" for k, v in limits.items())
        )
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        name = record["variant"]
        name = name if name == "stock" else f"{name}, {record['selected']} heads"
        x, y = lines.setdefault(name, ([], []))
        if record["batch"] * record["tokens"] not in x:
            x.append(record["batch"] * record["tokens"])
            y.append(record["ms"])
    try:
        path = write_plot(
            given.output / f"{report.name}.png",
            lines,
            title=report.title,
            x_label="tokens in the batch",
            y_label="milliseconds",
        )
        report.figure = path.name
    except InputError as error:
        _logger.warning("%s", error)
    return report.write(given.output)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main())
