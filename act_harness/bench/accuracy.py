"""Row-by-row accuracy of an engine against float64, by the sinks' share of the row.

A norm over the whole output hides the worst rows, so errors are relative and by row, at the 99.9th
percentile and at the maximum, in bins of the mass m that a row has on its sinks; beside them stands
what stock attention itself loses in the same rows. Run as ``python -m act_harness.bench.accuracy``.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act_harness.artifact import Artifact
from act_harness.attention import attach, model_facts
from act_harness.attention.load import load_plain_model
from act_harness.bench.arguments import Arguments, read_counts, read_device, read_dtypes
from act_harness.bench.attention import Inputs, planted, run_engine, stock
from act_harness.bench.common import BenchmarkReport, Table, command_line, describe_machine
from act_harness.bench.scoring import read_requests
from act_harness.calibration import Calibration, LayerPlan
from act_harness.engines import select_engine
from act_harness.engines.operation import AttentionCall, EngineResult, masked_softmax
from act_harness.engines.reference import apply_factors, find_sinks
from act_harness.engines.torch import TorchEngine
from act_harness.errors import InputError
from act_harness.support import places

__all__ = ["BINS", "compare", "main"]

_logger = logging.getLogger(__name__)
BINS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0000001)


def _exact(inputs: Inputs, plan: LayerPlan) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return calibrated and stock output (B, h, N, D), m (B, h, N), sinks, a/threshold."""
    geometry = inputs.geometry()
    heads = torch.tensor(plan.heads, device=inputs.query.device)
    group = heads // (inputs.query.shape[1] // inputs.key.shape[1])
    key, value = inputs.key[:, group].double(), inputs.value[:, group].double()
    visible = geometry.visible(0, geometry.rows)
    scale = inputs.query.shape[-1] ** -0.5
    weights = masked_softmax(inputs.query[:, heads].double(), key, visible, scale, None)
    seen, most = geometry.prompt_census
    sinks, near = find_sinks(
        weights.sum(2),
        seen[:, None],
        most=most[:, None, None],
        first=geometry.first[:, None, None],
        calibration=plan.calibration,
    )
    every = torch.ones_like(weights[:, :1, :, :1], dtype=torch.bool)
    changed, _ = apply_factors(weights, sinks[:, :, None], plan.strengths, every)
    mass = (weights * sinks[:, :, None]).sum(-1)
    return changed @ value, weights @ value, mass, sinks, near


def compare(inputs: Inputs, plan: LayerPlan, name: str, *, device: str) -> list[dict[str, Any]]:
    """Return one record for each bin of m, of the rows of the selected heads."""
    engine = select_engine(name, device=device)
    calibrated, plain, mass, sinks, near = _exact(inputs, plan)
    found = run_engine(engine, inputs, inputs.geometry(), plan)
    heads = list(plan.heads)
    mine = _errors(found.output[:, :, heads].transpose(1, 2), calibrated)
    theirs = _errors(stock(inputs)[:, :, heads].transpose(1, 2), plain)
    assert found.state is not None  # noqa: S101 - a prefill leaves a state
    differ = (found.state.sinks != sinks) & ((near - 1).abs() > 1e-3)
    records = []
    for low, high in itertools.pairwise(BINS):
        rows = (mass >= low) & (mass < high)
        if not bool(rows.any()):
            continue
        mine_at, theirs_at = _summary(mine[rows]), _summary(theirs[rows])
        records.append(
            {
                "m": f"{low:.1f}-{min(high, 1):.1f}",
                "rows": int(rows.sum()),
                "p99.9": mine_at[0],
                "stock p99.9": theirs_at[0],
                "max": mine_at[1],
                "stock max": theirs_at[1],
                "ratio p99.9": _over(mine_at[0], theirs_at[0]),
                "ratio max": _over(mine_at[1], theirs_at[1]),
                "sinks that differ": int(differ.sum()),
            }
        )
    return records


class _Recorder(TorchEngine):
    """An engine that keeps what it was given."""

    name = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Inputs] = []

    def __call__(
        self,
        call: AttentionCall,
        **given: Any,  # noqa: ANN401 - passed on
    ) -> EngineResult:
        self.seen.append(Inputs(call.query, call.key, call.value))
        return super().__call__(call, **given)


def real_inputs(model: Any, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, Inputs]:  # noqa: ANN401 - any model
    """Return queries, keys and values of a prompt in some layers of a model.

    Args:
        model: a loaded causal language model.
        tokens: of the prompt.
        layers: their numbers.
    """
    facts = model_facts(model)
    heads = dict.fromkeys(sorted(layers), (0,))
    artifact = Artifact(
        name="recorder", model=facts, calibration=Calibration(beta=1.0), heads=heads
    )
    recorder = _Recorder()
    attachment = attach(model, artifact, facts=facts, engine=recorder)
    try:
        recorder.seen.clear()  # attaching tries the model with a few tokens
        with torch.no_grad():
            model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False)
    finally:
        attachment.detach()
    return dict(zip(heads, recorder.seen, strict=True))


def _errors(output: Tensor, exact: Tensor) -> Tensor:
    relative: Tensor = (output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return relative


def _over(mine: float, theirs: float) -> float | None:
    return mine / theirs if theirs > 0 else None


def _summary(errors: Tensor) -> tuple[float, float]:
    ordered = errors.sort().values
    return float(ordered[int(0.999 * (len(ordered) - 1))]), float(ordered[-1])


def main(arguments: list[str] | None = None) -> Path:
    """Run the comparison from a command line; return the report's path."""
    parser = Arguments(prog="act-harness bench accuracy", description=__doc__)
    parser.add_argument(
        "--device", type=read_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--dtypes", type=read_dtypes, default="bfloat16,float16,float32")
    parser.add_argument("--tokens", type=read_counts, default="1,2,31,127,1000,4097")
    parser.add_argument("--model", default=None, help="folder of a model, for real maps")
    parser.add_argument("--requests", type=Path, help="written by bench scoring --export")
    parser.add_argument("--layers", type=read_counts, default="0,2,8,15,22,29", help="of the model")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    given = parser.parse_args(arguments)
    places.prepare_folder(given.out)
    tables = []
    real: dict[int, Inputs] = {}
    if given.model is not None:
        if given.requests is None:
            raise InputError(
                "real maps need a prompt: --requests FILE, from bench scoring --export"
            )
        contexts = [c for _, pairs in read_requests(given.requests) for c, _ in pairs]
        model = load_plain_model(given.model, dtype="float32", device=given.device)
        longest = max(contexts, key=len)[:1000]
        real = real_inputs(model, longest, given.layers)
    for name in given.dtypes:
        dtype = getattr(torch, name)
        records: list[dict[str, Any]] = []
        for tokens in given.tokens:
            inputs = planted(
                tokens, batch=1, heads=8, groups=2, tokens=tokens, size=128,
                dtype=dtype, device=given.device, strength=9.0,
            )  # fmt: skip
            plan = LayerPlan.uniform(Calibration(), tuple(range(8)))
            for record in compare(inputs, plan, given.engine, device=given.device):
                records.append({"tokens": tokens, **record})
        tables.append(_table(f"random inputs with planted sinks, {name}", records))
        if real:
            records = []
            for layer, found in real.items():
                inputs = Inputs(*(x.to(dtype) for x in (found.query, found.key, found.value)))
                plan = LayerPlan.uniform(Calibration(), tuple(range(inputs.query.shape[1])))
                for record in compare(inputs, plan, given.engine, device=given.device):
                    records.append({"layer": layer, **record})
            tables.append(_table(f"real maps of {Path(given.model).name}, {name}", records))
    kind = torch.device(given.device).type
    report = BenchmarkReport(
        name=f"attention-accuracy-{kind}",
        title=f"Row-by-row error of engine {select_engine(given.engine, device=kind).name}",
        machine=describe_machine(given.device),
        command=command_line(),
        tables=tables,
    )
    return report.write(given.out)


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    columns = tuple(records[0])
    for record in records:
        _logger.info("%s", record)
    return Table(title, columns, [[record[name] for name in columns] for record in records])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(main())
