"""The paper's mathematics, in one place, on materialised attention maps.

Source: Yu et al., ICML 2024 (arXiv 2406.15765), sections 3 and 4. A hidden attention sink is a
column whose mean attention, over the rows that can see it, is above a multiple of the average
(section 3); calibration damps the sinks of a selected head and gives the mass to the other columns
of the same row in proportion (section 4). The functions take any float dtype; the engine at the
end computes in float64 and is the oracle of all others. Nothing here is fast: every map is stored.

Axes in the comments: b sequence, h selected head, k row (query), t column (key).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from act_harness.calibration import MIN_OTHER_MASS, Calibration, HeadStrength, LayerPlan
from act_harness.engines.operation import (
    AttentionCall,
    EngineResult,
    Geometry,
    LayerState,
    Members,
    masked_softmax,
    member,
    pad_columns,
    unsupported,
)
from act_harness.engines.reports import block_report, few_columns, make_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "COMPUTES",
    "ReferenceEngine",
    "RowFactors",
    "SelectedMaps",
    "calibrate_weights",
    "find_sinks",
    "row_factors",
    "selected_maps",
]

COMPUTES: Members = {
    "target": ("sinks", "initial"),
    "rule": ("relative", "absolute"),
    "protect": ("initial", "first-flagged", "none"),
    "decode": ("frozen", "running", "off"),
    "mass": ("damp", "reweight"),
}
"""What the reference computes: every member that the settings have."""


def find_sinks(
    sums: Tensor,  # (b, h, ..., t) attention that each column received
    seen: Tensor,  # (b, 1, ..., t) rows that could see it
    *,
    most: Tensor,  # (b, 1, ..., 1) N: most columns that a row can see
    first: Tensor,  # (b, 1, ..., 1) position of the first real token
    calibration: Calibration,
    at_least: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the sinks (b, h, ..., t) bool and a/threshold of every column that can be one.

    Paper, section 3: ``S = {t : a[t] > alpha / N} - {initial token}`` with ``a[t]`` the mean
    attention that column t gets. Columns that cannot be sinks have the ratio 0.
    """
    column = torch.arange(sums.shape[-1], device=sums.device).expand_as(seen)
    if member("target", calibration.target, COMPUTES) == "initial":
        initial = ((column == first) & (seen > 0)).expand_as(sums)
        return initial, torch.zeros_like(sums)
    most = most.clamp(min=1).to(sums.dtype)
    member("rule", calibration.rule, COMPUTES)  # refuses a third, which `threshold` would not
    eligible = (seen >= calibration.required_rows(most, at_least=at_least)) & (seen > 0)
    if member("protect", calibration.protect, COMPUTES) == "initial":
        eligible = eligible & (column != first)
    mean = sums / seen.clamp(min=1)
    ratio = torch.where(eligible, mean / calibration.threshold(most), 0.0)
    sinks = ratio > 1
    if member("protect", calibration.protect, COMPUTES) == "first-flagged":
        lowest = sinks & (sinks.cumsum(dim=-1) == 1)
        sinks = sinks & ~lowest
    return sinks, ratio


class RowFactors(NamedTuple):
    """How a row's weights change; each (b, h, k, 1)."""

    inside: Tensor  # factor m'/m on the sinks
    outside: Tensor  # factor (1 - m')/u on all other columns
    moved: Tensor  # m - m'
    alone: Tensor  # bool: u too small, the row stays as it is


def row_factors(m: Tensor, u: Tensor, strengths: Sequence[HeadStrength]) -> RowFactors:
    """Turn the mass on the sinks (m) and off them (u), (b, h, k, 1), into factors.

    Paper, section 4: ``m' = beta m`` (``damp``). First-token methods: ``m' = gamma m / (u + gamma
    m)`` (``reweight``; arXiv 2505.11739). A row without sinks, or one that ``damp`` would divide
    by (nearly) nothing, keeps its weights.
    """
    shape = (1, len(strengths), 1, 1)
    damps = [member("mass", s.mass, COMPUTES) == "damp" for s in strengths]
    damped = torch.tensor(damps, device=m.device).view(shape)
    value = m.new_tensor([s.strength for s in strengths]).view(shape)
    alone = damped & (m > 0) & (u < MIN_OTHER_MASS)
    changes = (m > 0) & ~alone
    scaled = (u + value * m).where(changes, 1.0)  # reweight: sum of the row before renormalising
    inside = torch.where(damped, value, value / scaled)
    outside = torch.where(damped, (1 - value * m) / u.where(changes, 1.0), 1 / scaled)
    inside, outside = inside.where(changes, 1.0), outside.where(changes, 1.0)
    return RowFactors(inside, outside, m * (1 - inside), alone)


def apply_factors(
    weights: Tensor,  # (b, h, k, t)
    sinks: Tensor,  # (b, h, k or 1, t) bool
    strengths: Sequence[HeadStrength],
    active: Tensor,  # (b, 1, k, 1) bool: rows that are calibrated
) -> tuple[Tensor, RowFactors]:
    """Return ``A'`` (paper, section 4) and the factors."""
    on = (weights * sinks).sum(dim=-1, keepdim=True)
    off = (weights * ~sinks).sum(dim=-1, keepdim=True)  # summed: 1 - m would lose digits
    factors = row_factors(on * active, off, strengths)
    return weights * torch.where(sinks, factors.inside, factors.outside), factors


def calibrate_weights(
    weights: Tensor,
    *,
    calibration: Calibration,
    visible: Tensor | None = None,
    strengths: Sequence[HeadStrength] | None = None,
) -> Tensor:
    """Calibrate materialised attention maps of one prompt (a prefill).

    Args:
        weights: (batch, heads, rows, columns), rows that sum to 1; every head is calibrated.
        calibration: target set and mass map.
        visible: (batch or 1, 1, rows, columns) bool; causal, aligned to the last row, when None.
        strengths: one mass map per head; the calibration's own for all when None.

    Returns:
        A tensor of the same shape and dtype.
    """
    rows, columns = weights.shape[-2:]
    if visible is None:
        visible = torch.ones(rows, columns, dtype=torch.bool, device=weights.device)
        visible = visible.tril(columns - rows)[None, None]
    visible = visible.expand(weights.shape[0], 1, rows, columns)
    plan = LayerPlan.uniform(calibration, tuple(range(weights.shape[1])))
    seen = visible.sum(dim=2)  # (b, 1, t)
    most = visible.sum(dim=3).amax(dim=2, keepdim=True)  # (b, 1, 1)
    first = (seen > 0).int().argmax(dim=2, keepdim=True)
    sinks, _ = find_sinks(weights.sum(dim=2), seen, most=most, first=first, calibration=calibration)
    every = visible.any(dim=3, keepdim=True)
    return apply_factors(weights, sinks[:, :, None], strengths or plan.strengths, every)[0]


def row_sinks(
    weights: Tensor,  # (b, h, k, t)
    visible: Tensor,  # (b, 1, k, t) bool
    geometry: Geometry,
    calibration: Calibration,
    state: LayerState | None,
) -> tuple[Tensor, LayerState, Tensor | None]:
    """Return the sinks of every row (b, h, k or 1, t), the state after it, and a/threshold."""
    first = geometry.first[:, None, None]
    ratio = None
    if state is None:
        sums = (weights * geometry.prompt_rows[:, None, :, None]).sum(dim=2)
        seen, most = geometry.prompt_census
        sinks, ratio = find_sinks(
            sums, seen[:, None], most=most[:, None, None], first=first, calibration=calibration
        )
        state = LayerState(sinks, torch.zeros_like(sums), torch.zeros_like(seen))
    frozen = pad_columns(state.sinks, geometry.total)
    if member("decode", calibration.decode, COMPUTES) != "running":
        return frozen[:, :, None], LayerState(frozen), ratio
    assert state.sums is not None  # noqa: S101 - 'running' fills both
    assert state.seen is not None  # noqa: S101
    sums = pad_columns(state.sums, geometry.total)[:, :, None] + weights.cumsum(dim=2)
    seen = pad_columns(state.seen, geometry.total)[:, None, None] + visible.cumsum(dim=2)
    most = visible.sum(dim=3, keepdim=True)  # N_k: what row k itself sees
    own, _ = find_sinks(
        sums, seen, most=most, first=first[..., None], calibration=calibration, at_least=2
    )
    rest = geometry.continuation_rows[:, None, :, None]
    after = LayerState(frozen, sums[:, :, -1], seen[:, 0, -1])
    return torch.where(rest, own, frozen[:, :, None]), after, ratio


class SelectedMaps(NamedTuple):
    """The maps of a call's selected heads, over all columns so far; those dropped have weight 0."""

    weights: Tensor  # (b, h, k, t) as the model has them
    sinks: Tensor  # (b, h, k or 1, t) bool
    calibrated: Tensor  # (b, h, k, t)
    factors: RowFactors
    after: LayerState
    ratio: Tensor | None  # (b, h, t) a/threshold; of a prefill


def selected_maps(
    call: AttentionCall,
    *,
    geometry: Geometry,
    plan: LayerPlan,
    state: LayerState | None,
    dtype: torch.dtype = torch.float64,
) -> SelectedMaps:
    """Materialise the attention maps of the selected heads, before and after calibration.

    The arguments are those of :class:`act_harness.engines.operation.Engine`; ``dtype`` computes.
    """
    query, key, _, scale, softcap, bias = call
    heads = torch.tensor(plan.heads, device=query.device)
    group = heads // (query.shape[1] // key.shape[1])
    dropped = (geometry.first_column, 0)  # columns a sliding cache no longer holds: weight 0
    held = torch.nn.functional.pad(key[:, group].to(dtype), (0, 0, *dropped))
    visible = torch.nn.functional.pad(geometry.visible(0, geometry.rows), dropped)
    if bias is not None:
        bias = torch.nn.functional.pad(bias[:, heads, :, : geometry.columns].to(dtype), dropped)
    weights = masked_softmax(query[:, heads].to(dtype), held, visible, scale, softcap, bias)
    sinks, after, ratio = row_sinks(weights, visible, geometry, plan.calibration, state)
    active = geometry.prompt_rows[:, None, :, None]
    if member("decode", plan.calibration.decode, COMPUTES) != "off":
        active = active | geometry.continuation_rows[:, None, :, None]
    changed, factors = apply_factors(weights, sinks, plan.strengths, active)
    return SelectedMaps(weights, sinks, changed, factors, after, ratio)


class ReferenceEngine:
    """Every map in memory, float64 by default: the oracle for the other engines."""

    name = "reference"
    differentiable = True

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def supports(self, plan: LayerPlan) -> list[str]:
        """See :class:`act_harness.engines.operation.Engine`."""
        return unsupported(plan, COMPUTES)

    def __call__(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        plan: LayerPlan,
        state: LayerState | None,
        stock: Callable[[], Tensor],
    ) -> EngineResult:
        """See :class:`act_harness.engines.operation.Engine`."""
        maps = selected_maps(call, geometry=geometry, plan=plan, state=state, dtype=self.dtype)
        heads = torch.tensor(plan.heads, device=call.query.device)
        group = heads // (call.query.shape[1] // call.key.shape[1])
        values = call.value[:, group].to(self.dtype)
        output = stock().clone()
        held = maps.calibrated[..., geometry.first_column :]
        output[:, :, heads] = (held @ values).transpose(1, 2).to(output.dtype)
        report = None
        if maps.ratio is not None:
            on_few = maps.sinks & few_columns(geometry)[:, :, None]
            few = (maps.weights * on_few).sum(-1, keepdim=True)
            inside, _, moved, alone = maps.factors
            prompt = geometry.prompt_rows[:, None, :, None]
            sums = block_report(few, inside, moved, alone, prompt)
            report = make_report(maps.after.sinks, maps.ratio, sums, geometry, call.query.dtype)
        return EngineResult(output, maps.after, report)
