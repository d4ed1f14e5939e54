"""Attention inputs with planted sinks, and how two engines are compared; for the engine tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.engines import ENGINES, select_engine
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import (
    AttentionCall,
    Engine,
    EngineResult,
    LayerState,
    Stock,
    masked_softmax,
)
from act_harness.engines.reference import ReferenceEngine
from act_harness.engines.torch import TorchEngine
from act_harness.errors import CalibrationError

TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Largest relative error of a row (norm over the head's values), by the dtype of the inputs."""

NEAR = 1e-3
"""Sink sets must agree where abs(a/threshold - 1) is above this."""

PLANS = {
    "paper": Calibration(),
    "release": Calibration(rule="absolute", tau=0.1, protect="first-flagged"),
    "unprotected": Calibration(protect="none", beta=0.0),
    "auto-rows": Calibration(min_rows="auto"),
    "reweight": Calibration(mass="reweight", gamma=0.3),
    "amplify": Calibration(mass="reweight", gamma=4.0),
    "initial": Calibration(target="initial"),
    "initial-reweight": Calibration(target="initial", mass="reweight", gamma=0.5),
}

MEMBERS = {
    "both": Calibration(target="both", mass="reweight", gamma=2.5, gamma_initial=0.4),
    "both-first-flagged": Calibration(
        target="both", mass="reweight", gamma=0.2, gamma_initial=3.0, protect="first-flagged"
    ),
    "random-fixed": Calibration(target="random", alpha=3.0),
    "random-anew": Calibration(
        target="random", draw="anew", seed=7, mass="reweight", gamma=3.0, alpha=3.0
    ),
    "last-as-sinks": Calibration(target="last", mass="reweight", gamma=4.0, alpha=2.0),
    "last-three": Calibration(target="last", count=3, beta=0.2),
    "span": Calibration(target="span", markers=("<", ">"), mass="reweight", gamma=4.0),
    "span-raise": Calibration(target="span", markers=("<", ">"), mass="raise", psi=0.3),
    "raise": Calibration(mass="raise", psi=0.5),
    "initial-raise": Calibration(target="initial", mass="raise", psi=0.2),
    "gate": Calibration(target="head", mass="gate", factor=0.5),
    "temperature": Calibration(target="head", mass="temperature", factor=1.7),
}
"""Members beyond those of the first schema, each on what it goes with."""

LACKING: dict[str, tuple[str, ...]] = {
    "triton": (
        "random-fixed", "random-anew", "last-as-sinks", "last-three", "gate", "temperature",
    ),
}  # fmt: skip
"""By an engine's name: those of ``MEMBERS`` that it lacks, and so must refuse by name."""

NAMES = tuple(name for name in ENGINES if name not in ("auto", "triton"))
"""Engines that run anywhere; the tests of invariants hold each of them."""

SIZES: dict[str, Engine] = {
    **{name: select_engine(name) for name in NAMES},
    "tiny blocks": TorchEngine(block_elements=97),
}
"""The same as objects, and again where a size of theirs decides the way they compute."""


@dataclass
class Case:
    """Inputs of one layer for whole sequences."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, G, T, D)
    value: Tensor
    real: Tensor  # (B, T) bool
    prompt: Tensor  # (B, T) bool
    window: int | None = None
    softcap: float | None = None
    ids: Tensor | None = None  # (B, T)
    span: Tensor | None = None  # (B, T) bool
    sink_logits: Tensor | None = None  # (H,) learned ones

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    def call(self, first_row: int = 0) -> AttentionCall:
        """What the rows from ``first_row`` on are to compute, over all columns."""
        query = self.query[:, :, first_row:]
        learned = None if self.sink_logits is None else self.sink_logits[None, :, None]
        return AttentionCall(
            query, self.key, self.value, self.scale, self.softcap, sink_logits=learned
        )

    def mask(self, first_row: int) -> Tensor | None:
        """The model's own mask, as transformers gives it; None where it would give none."""
        causal_only = self.window is None and not bool((~self.real).any())
        if causal_only and first_row == 0:
            return None
        total = self.real.shape[1]
        row = torch.arange(first_row, total, device=self.real.device)[:, None]
        column = torch.arange(total, device=self.real.device)[None]
        seen = column <= row
        if self.window is not None:
            seen = seen & (column > row - self.window)
        return seen[None, None] & self.real[:, None, None]

    def geometry(self, first_row: int = 0, *, bare: bool = False) -> Geometry:
        """Geometry of the rows from ``first_row``; ``bare``: right pads without a mask."""
        prompt = self.prompt if first_row == 0 else torch.zeros_like(self.prompt)
        mask = None if bare else self.mask(first_row)
        return Geometry(
            real=self.real,
            prompt=prompt,
            first_row=first_row,
            first_column=0,
            columns=self.real.shape[1],
            mask=mask,
            ids=self.ids if first_row == 0 else None,
            span=self.span if first_row == 0 else None,
        )

    def until(self, stop: int) -> Case:
        """The first ``stop`` positions."""
        cut = {name: getattr(self, name)[:, :, :stop] for name in ("query", "key", "value")}
        for name in ("real", "prompt", "ids", "span"):
            held = getattr(self, name)
            cut[name] = None if held is None else held[:, :stop]
        return replace(self, **cut)

    def alone(self, number: int) -> Case:
        """One of the sequences, without its pads."""
        inside, one = self.real[number], slice(number, number + 1)
        cut = {name: getattr(self, name)[one][:, :, inside] for name in ("query", "key", "value")}
        for name in ("real", "prompt", "ids", "span"):
            held = getattr(self, name)
            cut[name] = None if held is None else held[one][:, inside]
        return replace(self, **cut)

    def to(self, target: torch.dtype | str) -> Case:
        moved = {name: getattr(self, name).to(target) for name in ("query", "key", "value")}
        if self.sink_logits is not None:
            moved["sink_logits"] = self.sink_logits.to(target)
        if isinstance(target, str):
            for name in ("real", "prompt", "ids", "span"):
                held = getattr(self, name)
                moved[name] = None if held is None else held.to(target)
        return replace(self, **moved)


def make_case(
    seed: int,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    tokens: int = 48,
    size: int = 16,
    sinks: tuple[int, ...] = (0, 5, 11),
    strength: float = 6.0,
    lengths: tuple[int, ...] | None = None,
    side: str = "right",
    prompts: tuple[int, ...] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: tuple[float, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.4,
) -> Case:
    """Random inputs whose columns ``sinks`` (counted from the first real token) draw attention.

    Queries share a direction that the keys of the planted columns have too, by an amount that
    varies over rows and heads, so that rows of small and of large sink mass both occur.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = normal(batch, heads, tokens, size), normal(batch, groups, tokens, size)
    value = normal(batch, groups, tokens, size)
    direction = torch.nn.functional.normalize(normal(batch, groups, 1, size), dim=-1)
    shared = direction.repeat_interleave(heads // groups, dim=1)
    amount = 1 + spread * normal(batch, heads, tokens, 1) + 0.5 * normal(batch, heads, 1, 1)
    query = query * 0.5 + shared * amount.abs() * size**0.25
    lengths = lengths or (tokens,) * batch
    prompts = prompts or lengths
    position = torch.arange(tokens)
    real = torch.zeros(batch, tokens, dtype=torch.bool)
    prompt, span = torch.zeros_like(real), torch.zeros_like(real)
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    for b, (length, given) in enumerate(zip(lengths, prompts, strict=True)):
        start = tokens - length if side == "left" else 0
        real[b] = (position >= start) & (position < start + length)
        prompt[b] = (position >= start) & (position < start + given)
        own = torch.Generator().manual_seed(1000 * seed + b)
        ids[b, real[b]] = torch.randint(1, 90, (length,), generator=own)
        span[b] = (position >= start + 3) & (position < start + 7) & real[b]
        for sink in sinks:
            if sink < length:
                key[b, :, start + sink] += direction[b, :, 0] * strength * size**0.25
    learned = None if sink_logits is None else torch.tensor(sink_logits, dtype=torch.float64)
    case = Case(query, key, value, real, prompt, window, softcap, ids, span, learned)
    return case.to(dtype)


def plan_of(
    calibration: Calibration, heads: tuple[int, ...], strengths: tuple[HeadStrength, ...] = ()
) -> LayerPlan:
    uniform = LayerPlan.uniform(calibration, heads)
    return replace(uniform, strengths=strengths) if strengths else uniform


MADE_UP = {
    "target": "no-columns",
    "rule": "no-rule",
    "protect": "no-column",
    "decode": "sometimes",
    "mass": "no-map",
}
"""A member of each closed set that does not exist."""


def made_up(setting: str) -> LayerPlan:
    """A plan that no validation let through: one setting is no member of its set."""
    plain = Calibration().model_dump()
    if setting == "mass":
        strength = HeadStrength.model_construct(mass=MADE_UP["mass"], beta=0.4)
        return LayerPlan(Calibration(), (0, 2), (strength,) * 2)
    calibration = Calibration.model_construct(**{**plain, setting: MADE_UP[setting]})
    return LayerPlan(calibration, (0, 2), (HeadStrength(),) * 2)


def able(name: str) -> list[str]:
    """Names of the engines that compute a member, the reference first."""
    return [one for one in NAMES if name not in LACKING.get(one, ())]


def refused(engine: Engine, name: str) -> bool:
    """Whether an engine lacks a member; one that does has refused it by name, before and within."""
    if name not in LACKING.get(engine.name, ()):
        return False
    plan = plan_of(MEMBERS[name], (0, 1))
    reasons = engine.supports(plan)
    assert reasons
    assert all(one.startswith(f"engine {engine.name} does not compute ") for one in reasons)
    with pytest.raises(CalibrationError, match="does not compute"):
        run(engine, make_case(1, batch=1, tokens=20), plan)
    return True


def stock_of(case: Case, geometry: Geometry) -> Stock:
    """Stock attention of the rows of a geometry, (B, C, H, D), as transformers' sdpa gives it."""
    query = case.query[:, :, geometry.first_row :]

    def run() -> Tensor:
        group = query.shape[1] // case.key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (case.key, case.value))
        if case.sink_logits is not None:
            visible = geometry.visible(0, geometry.rows)
            logits = query @ key.transpose(2, 3) * case.scale
            logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
            sink = case.sink_logits[:, None, None].expand(*logits.shape[:3], 1)
            weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
            return (weights @ value).transpose(1, 2).contiguous()
        if case.softcap is not None:
            visible = geometry.visible(0, geometry.rows)
            weights = masked_softmax(query, key, visible, case.scale, case.softcap)
            return (weights @ value).transpose(1, 2).contiguous()
        if geometry.mask is None:
            out = scaled_dot_product_attention(
                query, case.key, case.value, is_causal=query.shape[2] > 1, enable_gqa=True
            )
        else:
            out = scaled_dot_product_attention(query, key, value, attn_mask=geometry.mask)
        return out.transpose(1, 2).contiguous()

    plain = case.softcap is None and case.sink_logits is None
    return Stock(run, kernel="sdpa" if plain else "eager")


def run(
    engine: Engine,
    case: Case,
    plan: LayerPlan,
    *,
    first_row: int = 0,
    state: LayerState | None = None,
    bare: bool = False,
) -> EngineResult:
    geometry = case.geometry(first_row, bare=bare)
    return engine(
        case.call(first_row),
        geometry=geometry,
        plan=plan,
        state=state,
        stock=stock_of(case, geometry),
    )


def run_pieces(
    engine: Engine, case: Case, plan: LayerPlan, cuts: list[int]
) -> tuple[Tensor, LayerState | None]:
    """Prefill up to ``cuts[0]``, then extend to each further cut and the end; rows joined."""
    outputs, state, done = [], None, 0
    for stop in [*cuts, case.real.shape[1]]:
        result = run(engine, case.until(stop), plan, first_row=done, state=state)
        outputs.append(result.output)
        state, done = result.state, stop
    return torch.cat(outputs, dim=1), state


def row_errors(output: Tensor, exact: Tensor, real: Tensor) -> Tensor:
    """Relative error of every real row and head, (rows, H) float64."""
    output, exact = output.double(), exact.double()
    difference = (output - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-3)
    return difference[real]


def assert_matches(
    engine: Engine,
    case: Case,
    plan: LayerPlan,
    *,
    bare: bool = False,
    stray: float = 0.0,
    atol: float = 1e-4,
) -> tuple[EngineResult, EngineResult]:
    """Compare an engine's prefill with the float64 reference: sinks, output, report.

    ``atol`` is of the sums of masses in the report, which cancel under ``both``.
    """
    exact = run(ReferenceEngine(), case, plan, bare=bare)
    found = run(engine, case, plan, bare=bare)
    compare_outputs(found.output, exact.output, case, stray=stray)
    assert found.report is not None
    assert exact.report is not None
    assert found.state is not None
    assert exact.state is not None
    sinks = torch.nn.functional.pad(
        found.state.sinks, (0, exact.state.sinks.shape[-1] - found.state.sinks.shape[-1])
    )
    assert torch.equal(sinks, exact.state.sinks)
    for name in ("sinks", "few_sinks", "alone", "near"):
        assert torch.equal(
            getattr(found.report, name).long(), getattr(exact.report, name).long()
        ), name
    for name in ("moved", "few_moved"):
        torch.testing.assert_close(
            getattr(found.report, name).double(),
            getattr(exact.report, name).double(),
            rtol=5e-3 if case.query.dtype in (torch.float16, torch.bfloat16) else 1e-4,
            atol=atol,
        )
    return found, exact


def compare_outputs(output: Tensor, exact: Tensor, case: Case, *, stray: float = 0.0) -> None:
    """Every real row within the dtype's tolerance; ``stray``: share of rows that may differ."""
    rows = output.shape[1]
    errors = row_errors(output, exact, case.real[:, -rows:])
    wrong = ~(errors <= TOLERANCE[case.query.dtype])  # NaN is wrong
    assert wrong.double().mean().item() <= stray, f"largest relative error {errors.max():.3g}"
