"""Members beyond damped and reweighted sinks in the CUDA engine's kernels, path by path.

Each test says which kernels ran, and compares with the float64 reference by value.
"""

from __future__ import annotations

from dataclasses import replace

import engine_cases as ec
import pytest
import torch
from triton_cases import DEVICE, FUSED, SMALL, check_prefill, check_row, check_steps

from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines.operation import unsupported
from act_harness.engines.reference import ReferenceEngine
from act_harness.engines.segments import Capacity
from act_harness.engines.torch import TorchEngine
from act_harness.engines.triton import prefill
from act_harness.engines.triton.engine import TritonEngine
from act_harness.engines.triton.selection import COMPUTES
from act_harness.errors import CalibrationError

NAMES = ["both", "both-first-flagged", "span", "span-raise", "raise", "initial-raise"]
PACKED = ["both", "both-first-flagged", "raise", "initial-raise"]
HEADS = (0, 3)
MIXED = (
    HeadStrength(mass="raise", psi=0.4),
    HeadStrength(beta=0.3),
    HeadStrength(mass="reweight", gamma=3.0),
)
"""A map of every kind, side by side in a layer."""


@pytest.fixture(params=NAMES)
def calibration(request):
    return ec.MEMBERS[request.param]


def tiny(seed, **settings):
    return ec.make_case(seed, **{"batch": 1, "tokens": 36, **settings}).to(DEVICE)


@pytest.fixture
def anew(monkeypatch):
    """Rows that were listed to be summed anew, by call."""
    seen = []
    whole = prefill.Launches.sum_anew

    def spy(call, sinks, output, found):
        seen.append(int(found.counts.sum()))
        whole(call, sinks, output, found)

    monkeypatch.setattr(prefill.Launches, "sum_anew", spy)
    return seen


def test_these_are_all_that_the_kernels_compute():
    able = [
        name
        for name, one in ec.MEMBERS.items()
        if not unsupported(ec.plan_of(one, (0,)), COMPUTES, engine="triton")
    ]
    assert able == NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill(calibration, dtype):
    _, exact, calls = check_prefill(tiny(31, dtype=dtype), ec.plan_of(calibration, HEADS))
    assert (exact.report.moved.abs() > 0.1).any(), "nothing moved: the case shows nothing"
    assert ("column_sums" in calls) == calibration.detects
    assert calls["apply"] == calls["direct"] == 1


@pytest.mark.parametrize(("side", "decode"), [("left", "frozen"), ("right", "off")])
def test_padded_prefill_with_its_continuation(calibration, side, decode):
    settings = {"lengths": (36, 21), "prompts": (30, 20), "side": side}
    plan = ec.plan_of(Calibration(**{**calibration.settings(), "decode": decode}), HEADS)
    check_prefill(tiny(32, batch=2, **settings), plan, bare=side == "right")


def test_window_and_softcap(calibration):
    check_prefill(tiny(33, window=16, softcap=4.0), ec.plan_of(calibration, HEADS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_summed_anew(calibration, dtype, anew):
    """Nearly all mass is on the target: rows that a difference would spoil."""
    settings = {**calibration.settings(), "protect": "none"} if calibration.detects else {}
    settings = {**calibration.settings(), **settings}
    if calibration.mass == "raise":
        settings["psi"] = 0.999
    sinks = {"initial": (0,), "both": (0, 4, 5)}.get(calibration.target, (4, 5))
    case = tiny(8, strength=9.0, spread=0.1, dtype=dtype, sinks=sinks)
    check_prefill(case, ec.plan_of(Calibration(**settings), HEADS))
    assert anew[0] > 0


@pytest.mark.parametrize(
    ("gammas", "dtype"),
    [
        ((50.0, 0.02), torch.float32),
        ((0.02, 50.0), torch.float16),
        ((3e4, 1e-4), torch.float16),
        ((1e-4, 1e-4), torch.float32),
    ],
)
def test_both_with_strengths_far_apart(gammas, dtype):
    """What amplifies one column and damps another, in prefill, steps and packed rows."""
    both = Calibration(target="both", mass="reweight", gamma=gammas[0], gamma_initial=gammas[1])
    plan = ec.plan_of(both, HEADS)
    check_prefill(tiny(34, dtype=dtype), plan)
    check_row(((30, 30, (3,)),), plan, dtype=dtype)
    check_steps(
        TritonEngine(SMALL),
        ec.make_case(34, tokens=34, prompts=(30, 30), dtype=dtype),
        plan,
        bare=True,
    )


def slight(dtype):
    """A case whose spans get next to nothing of every row."""
    case = tiny(35, prompts=(34,), dtype=torch.float64)
    inside = case.span[:, None, :, None]
    key = torch.where(inside, -1.4 * case.key[:, :, 5:6], case.key)
    return replace(case, key=key).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_raising_next_to_nothing(dtype):
    """A mass far below what fp16 can hold is raised to psi, with the values it has."""
    case, plan = slight(dtype), ec.plan_of(ec.MEMBERS["span-raise"], HEADS)
    exact = ec.run(ReferenceEngine(), case, plan)
    stock = ec.stock_of(case, case.geometry())()
    assert exact.report.moved.max() < 0
    assert (exact.output - stock)[:, 10:, HEADS].abs().max() > 0.1
    check_prefill(case, plan)
    check_steps(TritonEngine(SMALL), case, plan)
    raised = ec.plan_of(ec.MEMBERS["initial-raise"], HEADS)
    check_row(((40, 40, (5,)),), raised, dtype=dtype, sinks=(5,), strength=14.0)


def test_reweighted_rows_with_nothing_else_sum_to_one():
    """The first row sees the initial token alone: no strength, however small, moves its mass."""
    plan = ec.plan_of(Calibration(target="initial", mass="reweight", gamma=1e-5), HEADS)
    check_prefill(tiny(43), plan)
    check_row(((40, 40, (3,)),), plan)


def test_rows_above_psi_keep_the_stock_kernels_bits():
    case = ec.make_case(8, tokens=40, strength=13.0, spread=0.1, dtype=torch.float16).to(DEVICE)
    plan = ec.plan_of(Calibration(target="initial", mass="raise", psi=1e-9), HEADS)
    found = ec.run(TritonEngine(SMALL), case, plan)
    assert torch.equal(found.output, ec.stock_of(case, case.geometry())())
    assert not found.report.moved.any()


def test_maps_of_every_kind_in_one_layer():
    plan = ec.plan_of(Calibration(), (0, 2, 3), MIXED)
    check_prefill(tiny(37), plan)
    check_row(((30, 30, (3,)),), plan)
    check_steps(TritonEngine(SMALL), tiny(37, prompts=(34,)), plan)


def test_layers_of_different_maps_share_a_step():
    """What a forward's layers have in common is not which maps they have."""
    case = tiny(38, tokens=31, prompts=(30,), dtype=FUSED)
    kernels = TritonEngine(SMALL)
    plans = [ec.plan_of(ec.MEMBERS[name], HEADS) for name in ("raise", "both")]
    plans.append(ec.plan_of(Calibration(), HEADS))
    case = case.to(DEVICE)
    states = [ec.run(kernels, case.until(30), plan).state for plan in plans]
    geometry = case.geometry(30, bare=True)
    given = {"geometry": geometry, "stock": ec.stock_of(case, geometry)}
    call = case.call(30).each(torch.Tensor.contiguous)
    for plan, state in zip(plans, states, strict=True):
        found = kernels(call, plan=plan, state=state, **given)
        exact = ReferenceEngine()(call, plan=plan, state=state, **given)
        assert ec.row_errors(found.output, exact.output, case.real[:, 30:]).max() < 4e-3
    assert kernels.calls["step"] == 3
    assert len(kernels.steps.families) == 1


@pytest.mark.parametrize(("dtype", "strength"), [(torch.float32, 13.0), (torch.float16, 6.0)])
def test_decode_steps(calibration, dtype, strength):
    case = tiny(39, prompts=(33,), dtype=dtype, strength=strength)
    check_steps(TritonEngine(SMALL), case, ec.plan_of(calibration, HEADS), bare=True)


def test_decode_steps_after_left_pads(calibration):
    case = tiny(40, batch=2, tokens=34, lengths=(34, 20), prompts=(32, 18), side="left")
    check_steps(TritonEngine(SMALL), case, ec.plan_of(calibration, HEADS))


def test_extending_by_several_rows_a_state_of_either_engine(calibration):
    """The list of an own state says which sink is the initial token; of another it is made."""
    case = tiny(41, batch=2, lengths=(36, 25), prompts=(30, 19), side="left")
    plan = ec.plan_of(calibration, HEADS)
    whole = ec.run(ReferenceEngine(), case, plan).output
    for first in (TorchEngine(), TritonEngine(SMALL)):
        state = ec.run(first, case.until(30), plan).state
        kernels = TritonEngine(SMALL)
        found = ec.run(kernels, case, plan, first_row=30, state=state.select(torch.tensor([0, 1])))
        ec.compare_outputs(found.output, whole[:, 30:], case)
        assert kernels.calls["apply"] == 1
        assert "fallback" not in kernels.calls


def test_running_both_is_the_prefills_and_leaves_what_follows_to_torch():
    settings = {**ec.MEMBERS["both"].settings(), "decode": "running", "alpha": 2.0}
    plan = ec.plan_of(Calibration(**settings), HEADS)
    case = tiny(42, prompts=(30,))
    kernels = TritonEngine(SMALL)
    pieces, _ = ec.run_pieces(kernels, case, plan, [30, 32])
    ec.compare_outputs(pieces, ec.run(ReferenceEngine(), case, plan).output, case)
    assert kernels.calls["apply"] == 1
    assert kernels.calls["fallback"] == 2


@pytest.mark.parametrize(("fused", "dtype"), [(256, torch.float32), (0, torch.float16)])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows(name, fused, dtype):
    plan = ec.plan_of(ec.MEMBERS[name], HEADS)
    questions = ((40, 40, (3, 1, 20)), (7, 7, ()), (23, 19, (2,)), (1, 1, (4,)))
    kernels = TritonEngine()
    kernels.segments.fused = fused
    _, report = check_row(questions, plan, dtype=dtype, engine=kernels)
    assert kernels.calls == {"segment_sinks": 1, "answer_rows": 1} | (
        {} if fused else {"segment_rows": 1}
    )
    assert report.moved.abs().max() > 0.1


def test_spans_take_the_padded_calls():
    for name in ("span", "span-raise"):
        plan = ec.plan_of(ec.MEMBERS[name], HEADS)
        assert not TritonEngine().takes_segments(plan, Capacity.of([5], []))


@pytest.mark.parametrize("strength", [13.0, 60.0])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_with_nearly_all_mass_on_the_target(name, strength):
    calibration = ec.MEMBERS[name]
    if calibration.mass == "raise":
        calibration = Calibration(**{**calibration.settings(), "psi": 0.999})
    plan = ec.plan_of(calibration, HEADS)
    check_row(((40, 40, (3,)),), plan, strength=strength, spread=0.1)


@pytest.mark.parametrize("name", ["random-fixed", "last-three", "gate"])
def test_the_controls_are_refused_by_name(name):
    plan = ec.plan_of(ec.MEMBERS[name], (0,))
    kernels = TritonEngine()
    assert f"engine triton does not compute target '{plan.calibration.target}'" in (
        kernels.supports(plan)
    )
    case = ec.make_case(1, batch=1, tokens=20).to(DEVICE)
    with pytest.raises(CalibrationError, match=r"does not compute (target|mass)"):
        ec.run(kernels, case, plan)
    assert "apply" not in kernels.calls


def test_a_head_without_its_second_strength_is_refused():
    own = ec.MEMBERS["both"].strength_of_all
    one = HeadStrength(mass="reweight", gamma=2.0)
    case = ec.make_case(1, tokens=12).to(DEVICE)
    for name, strengths in (("both", (own, one)), ("both", (one, one)), ("raise", (own, own))):
        plan = ec.plan_of(ec.MEMBERS[name], (0, 1), strengths)
        with pytest.raises(CalibrationError, match="gamma_initial"):
            ec.run(TritonEngine(), case, plan)
