"""Heads with a learned sink beside their columns: what calibration means there, by value.

Every member of the operation is held to its definition on such heads in ``test_members.py``.
"""

from __future__ import annotations

from dataclasses import replace

import engine_cases as ec
import numpy as np
import pytest
import torch

from act_harness.calibration import Calibration
from act_harness.engines import select_engine
from act_harness.engines.operation import AttentionCall
from act_harness.engines.reference import ReferenceEngine, selected_maps

LOGITS = (-3.0, 4.0, 2.0, 5.0)


@pytest.fixture(params=ec.SIZES)
def engine(request):
    return ec.SIZES[request.param]


def test_by_hand(engine):
    """Four columns, one head, a sink that takes 1/2, 3/4, 1/3 and 4/5 of the rows.

    Shares of the second column are 0.5, 0.5, 0.4: its mean is 0.467. Of all attention it gets
    0.125, 0.333, 0.08, a mean of 0.179: with tau 0.4 it is a sink because shares are what counts.
    """
    shares = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.3, 0.5, 0.2, 0], [0.4, 0.4, 0.1, 0.1]])
    left = np.array([1 / 2, 1 / 4, 2 / 3, 1 / 5])
    # the mass that a row's softmax would have had to share with a sink of logit 0
    sums = left / (1 - left)
    with np.errstate(divide="ignore"):
        logits = np.log(shares * sums[:, None])
    logits[np.isinf(logits)] = 0.0  # above the diagonal, which no row sees
    query = torch.eye(4, dtype=torch.float64)[None, None]
    key = torch.from_numpy(logits.T.copy())[None, None]
    value = torch.eye(4, dtype=torch.float64)[None, None]
    every = torch.ones(1, 4, dtype=torch.bool)
    case = ec.Case(2 * query, key, value, every, every, sink_logits=torch.zeros(1).double())
    assert case.scale == 0.5
    plan = ec.plan_of(Calibration(rule="absolute", tau=0.4, beta=0.5), (0,))
    result = ec.run(engine, case, plan)
    damped = np.array(
        [
            [1, 0, 0, 0],
            [0.75, 0.25, 0, 0],  # 0.5 became 0.25, the rest is the other column's
            [0.45, 0.25, 0.3, 0],  # (1 - 0.25) / 0.5 = 1.5 times 0.3 and 0.2
            [0.4 * 4 / 3, 0.2, 0.4 / 3, 0.4 / 3],  # (1 - 0.2) / 0.6
        ]
    )
    expected = torch.from_numpy(damped * left[:, None])
    torch.testing.assert_close(result.output[0, :, 0], expected, rtol=0, atol=1e-12)
    assert result.report.sinks.tolist() == [[1]]
    assert float(result.report.moved) == pytest.approx(0.25 + 0.25 + 0.2)


@pytest.mark.parametrize("calibration", [*ec.PLANS.values(), *ec.MEMBERS.values()])
def test_a_learned_sink_is_a_factor_on_what_a_head_gives_without_it(engine, calibration):
    """Same columns, same figures, and outputs times what it leaves, whatever is done to it."""
    more = {"tokens": 30, "lengths": (30, 21), "prompts": (19, 15), "dtype": torch.float64}
    case, plan = ec.make_case(5, **more), ec.plan_of(calibration, (0, 2, 3))
    plain = ec.run(engine, case, plan)
    learned = replace(case, sink_logits=torch.tensor(LOGITS).double())
    found = ec.run(engine, learned, plan)
    ones = replace(learned, value=torch.ones_like(learned.value))
    left = ec.stock_of(ones, ones.geometry())()  # rows' sums, by the stock softmax
    assert left[case.real].min() < 0.5 < 0.99 < left[case.real].max()
    torch.testing.assert_close(
        found.output[case.real], (plain.output * left)[case.real], rtol=1e-9, atol=1e-11
    )
    assert torch.equal(found.state.sinks, plain.state.sinks)
    torch.testing.assert_close(found.report.facts, plain.report.facts, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_engines_agree_with_the_reference(engine, dtype, side):
    case = ec.make_case(6, lengths=(48, 31), side=side, sink_logits=LOGITS, window=20, dtype=dtype)
    ec.assert_matches(engine, case, ec.plan_of(Calibration(), (0, 1, 3)))


@pytest.mark.parametrize("decode", ["frozen", "running", "off"])
def test_pieces_give_the_whole(engine, decode):
    case = ec.make_case(7, prompts=(30, 30), tokens=36, sink_logits=LOGITS, dtype=torch.float64)
    plan = ec.plan_of(Calibration(decode=decode), (0, 1, 3))
    whole = ec.run(ReferenceEngine(), case, plan).output
    for cuts in ([30], [30, 31, 33]):
        pieces, _ = ec.run_pieces(engine, case, plan, cuts)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("logit", [-1e5, 300.0, 1e5])
def test_sinks_that_take_nothing_or_all(engine, logit):
    """No row is divided by what is left of it, however little that is."""
    case, plan = ec.make_case(8, tokens=20), ec.plan_of(Calibration(protect="none"), (0, 1))
    learned = replace(case, sink_logits=torch.full((4,), logit))
    found = ec.run(engine, learned, plan)
    plain = ec.run(engine, case, plan)
    wanted = plain.output if logit < 0 else torch.zeros_like(plain.output)
    torch.testing.assert_close(found.output, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.state.sinks, plain.state.sinks)
    assert int(plain.state.sinks.sum()) > 0


def test_gradients_of_a_learned_sink(engine):
    """A model may be trained while its attention is calibrated, its learned sinks with it."""
    case = ec.make_case(9, batch=1, tokens=14, sink_logits=LOGITS, dtype=torch.float64)
    plan = ec.plan_of(Calibration(protect="none"), (0, 2))
    stock = ec.stock_of(case, case.geometry())()

    def outputs(sink_logits):
        call = case.call()._replace(sink_logits=sink_logits[None, :, None])
        result = engine(
            call, geometry=case.geometry(), plan=plan, state=None, stock=lambda: stock.clone()
        )
        return result.output[:, :, [0, 2]]

    learned = case.sink_logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (learned,))
    assert (outputs(case.sink_logits) != stock[:, :, [0, 2]]).any(), "nothing was calibrated"


def test_maps_are_shares_of_what_the_sink_leaves():
    case = ec.make_case(10, batch=1, tokens=16, sink_logits=LOGITS, dtype=torch.float64)
    plan = ec.plan_of(Calibration(protect="none"), (1, 3))
    maps = selected_maps(case.call(), geometry=case.geometry(), plan=plan, state=None)
    one = torch.ones(1, 2, 16).double()
    torch.testing.assert_close(maps.weights.sum(dim=-1), one)
    torch.testing.assert_close(maps.calibrated.sum(dim=-1), one)
    group = [0, 1]  # of heads 1 and 3
    stock = ec.stock_of(case, case.geometry())()[:, :, [1, 3]].transpose(1, 2)
    torch.testing.assert_close(maps.outputs(maps.weights, case.value[:, group]), stock)


def test_triton_leaves_them_to_torch_and_says_so_once(caplog):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = ec.make_case(11, tokens=20, sink_logits=LOGITS).to(device)
    kernels = select_engine("triton")
    for _ in range(2):
        ec.assert_matches(kernels, case, ec.plan_of(Calibration(), (0, 3)))
    assert kernels.calls == {"fallback": 2}
    told = [r.getMessage() for r in caplog.records if "learned sink logits" in r.getMessage()]
    assert told == ["engine triton leaves learned sink logits to engine torch"]


def test_no_kernel_without_them_serves_such_a_call():
    from act_harness.engines.segments import flash_takes
    from act_harness.engines.stock import attend_with_lse

    case = ec.make_case(12, tokens=20)
    stock = ec.stock_of(case, case.geometry())
    assert stock.kernel == "sdpa"
    assert attend_with_lse(case.call(), geometry=case.geometry(), stock=stock).lse is not None
    call = case.call()._replace(sink_logits=torch.zeros(1, 4, 1))
    assert isinstance(call, AttentionCall)
    assert attend_with_lse(call, geometry=case.geometry(), stock=stock).lse is None
    assert not flash_takes(call)
