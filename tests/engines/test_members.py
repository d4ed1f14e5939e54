"""Members of the operation beyond damped and reweighted sinks: by definition, by hand, by engine.

``by_definition`` is the page ``act_harness/engines/README.md`` written with loops over plain
numbers: nothing of the package computes there, not even the hash that draws columns.
"""

from __future__ import annotations

import math
from dataclasses import replace

import engine_cases as ec
import pytest
import torch

from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.engines.operation import unsupported
from act_harness.engines.reference import COMPUTES, ReferenceEngine, calibrate_weights
from act_harness.engines.strengths import Strengths, row_factors
from act_harness.engines.triton.selection import COMPUTES as TRITON
from act_harness.errors import CalibrationError, InternalError

HEADS = (0, 2, 3)


@pytest.fixture(params=list(ec.SIZES))
def engine(request):
    return ec.SIZES[request.param]


@pytest.fixture(params=list(ec.MEMBERS))
def calibration(request):
    """A member; where the test has an engine that lacks it, that engine refuses it instead."""
    if "engine" in request.fixturenames and ec.refused(
        request.getfixturevalue("engine"), request.param
    ):
        pytest.skip("refused by name, as it should be")
    return ec.MEMBERS[request.param]


# -- the definition, with loops --------------------------------------------------------------------

WORD = (1 << 64) - 1


def mixed(state, value):
    """A step of SplitMix64 in Python's own whole numbers."""
    z = ((state ^ value) + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def drawn(plan, head, ids, prompt, count):
    """Positions of the ``count`` lowest ranks among the prompt's, the first token apart."""
    tokens = [mixed(mixed(plan.calibration.seed, t), ids[t]) for t in range(prompt)]
    if plan.calibration.draw == "anew":
        whole = sum(tokens) & WORD
        tokens = [mixed(token, whole) for token in tokens]

    def rank(t):
        found = mixed(tokens[t], plan.layer << 32 | head)
        return found - (1 << 64) if found >> 63 else found  # as a signed number

    return set(sorted(range(1, prompt), key=rank)[:count])


def softmax(logits):
    top = max(logits)
    raw = [math.exp(one - top) for one in logits]
    return [one / sum(raw) for one in raw]


def sinks_of(maps, seen, calibration):
    """Positions above the threshold; ``maps`` are the prompt's rows, ``seen`` what each sees."""
    prompt = len(maps)
    most = max(len(columns) for columns in seen)
    limit = calibration.tau if calibration.rule == "absolute" else calibration.alpha / most
    flagged = []
    for t in range(prompt):
        rows = [k for k in range(prompt) if t in seen[k]]
        mean = sum(maps[k][t] for k in rows) / len(rows)
        free = t > 0 or calibration.protect != "initial"
        if mean > limit and len(rows) >= calibration.min_rows and free:
            flagged.append(t)
    return set(flagged[1:] if calibration.protect == "first-flagged" else flagged)


def target_of(plan, head, maps, seen, ids, span):
    calibration, prompt = plan.calibration, len(maps)
    if calibration.target == "span":
        return {t for t in range(prompt) if span[t]}
    if calibration.target == "initial":
        return {0}
    if calibration.target == "last" and calibration.count != "sinks":
        return set(range(prompt)[-calibration.count :])
    sinks = sinks_of(maps, seen, calibration)
    if calibration.target == "both":
        return sinks | {0}
    if calibration.target == "last":
        return set(range(prompt)[prompt - len(sinks) :])
    if calibration.target == "random":
        return drawn(plan, head, ids, prompt, len(sinks))
    return sinks


def changed_row(row, target, own, both):
    """A row's weights after the map; ``row`` by visible position."""
    m = sum(weight for t, weight in row.items() if t in target)
    u = sum(weight for t, weight in row.items() if t not in target)
    if m == 0 or (own.mass == "damp" and u < 1e-6):
        return row
    if own.mass == "reweight":
        factor = {t: own.gamma_initial if both and t == 0 else own.gamma for t in target}
        raw = {t: weight * factor.get(t, 1.0) for t, weight in row.items()}
        return {t: weight / sum(raw.values()) for t, weight in raw.items()}
    new = own.beta * m if own.mass == "damp" else max(m, own.psi) / (max(m, own.psi) + u)
    return {t: w * (new / m if t in target else (1 - new) / u) for t, w in row.items()}


def by_definition(case, plan):
    """(B, T, h, D) output of the selected heads; pads are left out by position."""
    output = torch.zeros(*case.real.shape, len(plan.heads), case.value.shape[-1]).double()
    group = case.query.shape[1] // case.key.shape[1]
    for b in range(case.real.shape[0]):
        places = case.real[b].nonzero()[:, 0].tolist()
        ids, span = case.ids[b, places].tolist(), case.span[b, places].tolist()
        prompt = int(case.prompt[b].sum())
        for n, (head, own) in enumerate(zip(plan.heads, plan.strengths, strict=True)):
            query = case.query[b, head, places].double()
            key, value = (x[b, head // group, places].double() for x in (case.key, case.value))
            output[b, places, n] = one_head(
                case, plan, head, own, query, key, value, ids, span, prompt
            )
    return output


def one_head(case, plan, head, own, query, key, value, ids, span, prompt):
    length = len(ids)
    low = [0 if case.window is None else max(0, k - case.window + 1) for k in range(length)]
    seen = [range(low[k], k + 1) for k in range(length)]
    logits = [[float(query[k] @ key[t]) * case.scale for t in seen[k]] for k in range(length)]
    if case.softcap is not None:
        cap = case.softcap
        logits = [[cap * math.tanh(one / cap) for one in row] for row in logits]
    maps = [
        dict(zip(columns, softmax(row), strict=True))
        for columns, row in zip(seen, logits, strict=True)
    ]
    whole, gate = plan.calibration.target == "head", 1.0
    if whole and own.mass == "temperature":
        hot = [softmax([own.factor * one for one in row]) for row in logits]
        maps = [
            dict(zip(columns, row, strict=True)) for columns, row in zip(seen, hot, strict=True)
        ]
    elif whole:
        gate = own.factor
    else:
        target = target_of(plan, head, maps[:prompt], seen[:prompt], ids, span)
        rows = length if plan.calibration.decode == "frozen" else prompt
        both = plan.calibration.target == "both"
        maps[:rows] = [changed_row(row, target, own, both) for row in maps[:rows]]
    learned = -math.inf if case.sink_logits is None else float(case.sink_logits[head])
    left = [1 - softmax([*row, learned])[-1] for row in logits]
    return torch.stack(
        [
            gate * part * sum(w * value[t] for t, w in row.items())
            for part, row in zip(left, maps, strict=True)
        ]
    )


SHAPES = {
    "plain": {},
    "right pads": {"lengths": (24, 13), "side": "right"},
    "left pads": {"lengths": (11, 24), "side": "left"},
    "continuation": {"lengths": (24, 20), "prompts": (15, 9), "side": "left"},
    "window": {"window": 9},
    "softcap": {"softcap": 4.0},
    "learned sinks": {
        "sink_logits": (-3.0, 9.0, 2.0, 5.0),
        "lengths": (24, 20),
        "prompts": (15, 9),
    },
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_member_is_its_definition(engine, calibration, shape):
    case = ec.make_case(3, tokens=24, size=8, dtype=torch.float64, **SHAPES[shape])
    plan = replace(ec.plan_of(calibration, HEADS), layer=2)
    found = ec.run(engine, case, plan)
    expected = by_definition(case, plan)
    real = case.real
    error = (found.output[:, :, list(HEADS)] - expected)[real].abs().max()
    assert error < 1e-11
    stock = ec.stock_of(case, case.geometry())()
    torch.testing.assert_close(found.output[:, :, 1], stock[:, :, 1], rtol=0, atol=1e-14)
    moved = (found.output - stock)[real][:, list(HEADS)].abs().amax(dim=(0, 2))
    assert (moved > 1e-4).any(), "no head changed: the case shows nothing"


# -- by hand ---------------------------------------------------------------------------------------


def factors_of(own, m, u, first=None):
    parts = [
        None if x is None else torch.tensor(x).double().view(1, 1, 1, 1) for x in (m, u, first)
    ]
    found = row_factors(parts[0], parts[1], (own,), parts[2])
    return [None if x is None else x.item() for x in found]


def test_both_by_hand():
    """Sinks 0.2 times 3, initial token 0.4 times 0.5, others 0.4: a row of 0.6 + 0.2 + 0.4."""
    own = HeadStrength(mass="reweight", gamma=3.0, gamma_initial=0.5)
    inside, outside, moved, alone, initial = factors_of(own, 0.2, 0.4, 0.4)
    assert inside == pytest.approx(3 / 1.2)
    assert outside == pytest.approx(1 / 1.2)
    assert initial == pytest.approx(0.5 / 1.2)
    assert moved == pytest.approx(0.6 - 0.8 / 1.2)
    assert not alone
    maps = torch.tensor(
        [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.4, 0.5, 0.1, 0], [0.3, 0.5, 0.1, 0.1]]
    )
    both = Calibration(
        target="both", mass="reweight", gamma=3.0, gamma_initial=0.5, rule="absolute", tau=0.4
    )
    changed = calibrate_weights(maps[None, None].double(), calibration=both)[0, 0]
    row = torch.tensor([0.15, 1.5, 0.1, 0.1]).double()
    torch.testing.assert_close(changed[3], row / row.sum(), rtol=0, atol=1e-7)
    torch.testing.assert_close(changed[0], torch.tensor([1.0, 0, 0, 0]).double())


def test_raise_by_hand():
    """psi 0.5: a mass of 0.2 on the span becomes 0.5 / (0.5 + 0.8); one of 0.6 stays."""
    own = HeadStrength(mass="raise", psi=0.5)
    inside, outside, moved, alone, _ = factors_of(own, 0.2, 0.8)
    assert inside * 0.2 == pytest.approx(0.5 / 1.3)
    assert outside * 0.8 == pytest.approx(0.8 / 1.3)
    assert moved == pytest.approx(0.2 - 0.5 / 1.3)
    assert not alone
    assert factors_of(own, 0.6, 0.4)[:4] == [1, 1, 0, False]
    assert factors_of(own, 0.0, 1.0)[:4] == [1, 1, 0, False]
    assert factors_of(own, 1e-31, 1.0)[:4] == [1, 1, 0, True]  # next to nothing is not made much of


def test_gate_and_temperature_by_hand():
    """Two columns with logits 0 and ln 3, so weights 1/4 and 3/4; times 2: 1/10 and 9/10."""
    query = torch.tensor([[0.0], [1.0]]).view(1, 1, 2, 1).double()
    key = torch.tensor([[0.0], [math.log(3.0)]]).view(1, 1, 2, 1).double()
    value = torch.tensor([[8.0], [16.0]]).view(1, 1, 2, 1).double()
    whole = torch.ones(1, 2, dtype=torch.bool)
    case = ec.Case(query, key, value, whole, whole)
    for mass, factor, expected in (("temperature", 2.0, 15.2), ("gate", 0.25, 3.5), ("gate", 0, 0)):
        plan = ec.plan_of(Calibration(target="head", mass=mass, factor=factor), (0,))
        for engine in ec.SIZES.values():
            found = ec.run(engine, case, plan)
            assert found.output[0, 1, 0, 0].item() == pytest.approx(expected)
            assert found.report.sinks.sum() == 0
            assert found.report.moved.sum() == 0


def test_drawn_columns_by_hand():
    """The draw of one small prompt, as Python's own whole numbers give it, on every layer."""
    case = ec.make_case(5, batch=1, tokens=40, dtype=torch.float64)
    sets = set()
    for name in ("random-fixed", "random-anew"):
        for layer in (0, 1):
            plan = replace(ec.plan_of(ec.MEMBERS[name], HEADS), layer=layer)
            found = ec.run(ReferenceEngine(), case, plan).state.sinks[0]
            for n, head in enumerate(HEADS):
                mine = drawn(plan, head, case.ids[0].tolist(), 40, int(found[n].sum()))
                assert set(found[n].nonzero()[:, 0].tolist()) == mine
                assert 0 not in mine
                sets.add(tuple(sorted(mine)))
    assert len(sets) > 8, "heads, layers and ways of drawing give columns of their own"


def test_fixed_draws_know_no_more_than_a_token_and_anew_draws_the_prompt():
    """With another last token of the prompt, only the draw anew moves the ranks of the others."""
    case = ec.make_case(5, batch=1, tokens=40, dtype=torch.float64)
    other = replace(case, ids=case.ids.clone())
    other.ids[0, -1] += 1
    for name, same in (("random-fixed", True), ("random-anew", False)):
        plan = ec.plan_of(ec.MEMBERS[name], HEADS)
        one, two = (ec.run(ReferenceEngine(), c, plan).state.sinks[..., :-1] for c in (case, other))
        if same:
            assert (one != two).sum() <= len(HEADS)  # the token itself may have joined or left
        else:
            assert (one != two).sum() > len(HEADS)


# -- what holds for all of them --------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_change_nothing(engine, calibration, side):
    """I3: a sequence alone gives what it gives in a padded batch."""
    plan = ec.plan_of(calibration, HEADS)
    case = ec.make_case(
        13, batch=3, tokens=30, lengths=(30, 21, 12), side=side, dtype=torch.float64
    )
    together = ec.run(engine, case, plan)
    for b in range(3):
        alone = ec.run(engine, case.alone(b), plan)
        inside = case.real[b]
        torch.testing.assert_close(together.output[b, inside], alone.output[0], rtol=0, atol=1e-12)
        assert torch.equal(together.state.sinks[b][:, inside], alone.state.sinks[0])


@pytest.mark.parametrize("decode", ["frozen", "off"])
def test_one_piece_is_token_by_token(engine, calibration, decode):
    """I4, at the engine: a prefill with its continuation, in pieces, and token by token."""
    plan = ec.plan_of(Calibration(**{**calibration.settings(), "decode": decode}), HEADS)
    case = ec.make_case(14, tokens=24, prompts=(17, 17), dtype=torch.float64)
    whole = ec.run(engine, case, plan).output
    for cuts in ([17], [17, 18, 21], list(range(17, 24))):
        pieces, _ = ec.run_pieces(engine, case, plan, cuts)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    stock = ec.stock_of(case, case.geometry())()
    same = torch.allclose(whole[:, 17:, 0], stock[:, 17:, 0], atol=1e-9)
    assert same or decode == "frozen"


def test_running_finds_both_in_every_row(engine):
    settings = {**ec.MEMBERS["both"].settings(), "decode": "running", "alpha": 2.0}
    plan = ec.plan_of(Calibration(**settings), HEADS)
    case = ec.make_case(15, tokens=24, prompts=(15, 11), dtype=torch.float64)
    whole = ec.run(engine, case, plan).output
    exact = ec.run(ReferenceEngine(), case, plan).output
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-12)
    even = replace(case, prompt=case.real & (torch.arange(24) < 15))
    pieces, _ = ec.run_pieces(engine, even, plan, [15, 19])
    torch.testing.assert_close(pieces, ec.run(engine, even, plan).output, rtol=0, atol=1e-12)
    off = ec.plan_of(Calibration(**{**settings, "decode": "off"}), HEADS)
    assert (ec.run(engine, case, off).output - whole)[0, 15:].abs().max() > 1e-4


@pytest.mark.parametrize(
    "own",
    [
        ("both", HeadStrength(mass="reweight", gamma=1.0, gamma_initial=1.0)),
        ("random-fixed", HeadStrength(beta=1.0)),
        ("last-three", HeadStrength(beta=1.0)),
        ("span", HeadStrength(mass="reweight", gamma=1.0)),
        ("span-raise", HeadStrength(mass="raise", psi=1e-12)),
        ("gate", HeadStrength(mass="gate", factor=1.0)),
        ("temperature", HeadStrength(mass="temperature", factor=1.0)),
    ],
    ids=lambda own: own[0],
)
def test_the_neutral_strength_changes_nothing(engine, own):
    """I1: through the engine, and the result is stock's."""
    case = ec.make_case(11, tokens=24, dtype=torch.float64)
    stock = ec.stock_of(case, case.geometry())()
    plan = ec.plan_of(ec.MEMBERS[own[0]], HEADS, (own[1],) * 3)
    torch.testing.assert_close(ec.run(engine, case, plan).output, stock, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, (40, 19)])
def test_engines_agree_with_the_reference(engine, calibration, dtype, lengths):
    """I6: sinks, outputs row by row, reports (whose sums cancel under ``both``: not in bf16)."""
    case = ec.make_case(16, tokens=40, lengths=lengths, dtype=dtype)
    plan = ec.plan_of(calibration, HEADS)
    if dtype == torch.bfloat16 and calibration.target == "both":
        exact, found = ec.run(ReferenceEngine(), case, plan), ec.run(engine, case, plan)
        ec.compare_outputs(found.output, exact.output, case)
        assert torch.equal(found.state.sinks, exact.state.sinks)
    else:
        ec.assert_matches(engine, case, plan)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ec.MEMBERS, "reweight", "paper"])
def test_gradients_of_every_strength(engine, name):
    """``gradcheck`` in float64, over strengths, queries, keys and values."""
    if not getattr(engine, "differentiable", False) or ec.refused(engine, name):
        return
    calibration = ec.MEMBERS.get(name) or ec.PLANS[name]
    case = ec.make_case(3, batch=1, tokens=12, size=4, sinks=(0, 5), dtype=torch.float64)
    plan = ec.plan_of(calibration, (0, 3))
    own = Strengths.of(plan.strengths, case.query)
    both = own.initial is not None
    value = (own.value * torch.tensor([1.0, 1.1]).view(1, 2, 1, 1)).requires_grad_()
    initial = (
        (own.initial * torch.tensor([1.0, 0.9]).view(1, 2, 1, 1)).requires_grad_() if both else None
    )

    def forward(query, key, values, strength, *rest):
        given = replace(case, query=query, key=key, value=values)
        own_plan = LayerPlan(
            calibration,
            plan.heads,
            Strengths(own.masses, strength, *rest),  # type: ignore[arg-type]
        )
        return ec.run(engine, given, own_plan).output[:, :, [0, 3]]

    inputs = [x.clone().requires_grad_() for x in (case.query, case.key, case.value)]
    inputs += [value] + ([initial] if both else [])
    fixed = [x.detach() for x in inputs[:3]]
    assert torch.autograd.gradcheck(lambda *own: forward(*fixed, *own), inputs[3:])
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)
    strengths = torch.autograd.grad(forward(*inputs).pow(2).sum(), inputs[3:])
    assert all((grad != 0).any() for grad in strengths), "nothing changed: the case shows nothing"


# -- refusals --------------------------------------------------------------------------------------


def test_maps_alone_do_not_say_which_tokens_these_are():
    maps = torch.ones(1, 1, 3, 3).tril()
    for name in ("random-fixed", "last-three", "span", "gate"):
        with pytest.raises(CalibrationError, match="cannot be read off attention maps, these can"):
            calibrate_weights(maps, calibration=ec.MEMBERS[name])


@pytest.mark.parametrize(("name", "lacks"), [("random-fixed", "ids"), ("span", "span")])
def test_a_geometry_that_lacks_what_the_target_needs_is_an_error(engine, name, lacks):
    case = replace(ec.make_case(1, tokens=12), **{lacks: None})
    with pytest.raises(InternalError, match="reached an engine without"):
        ec.run(engine, case, ec.plan_of(ec.MEMBERS[name], (0,)))


def test_a_strength_of_another_target_is_refused():
    plan = ec.plan_of(ec.MEMBERS["gate"], (0,), (HeadStrength(),))
    assert unsupported(plan, COMPUTES, engine="x") == [
        "target 'head' takes mass 'gate' or 'temperature', found 'damp'"
    ]
    for engine in ec.SIZES.values():
        with pytest.raises(CalibrationError, match="does not compute mass 'damp'"):
            ec.run(engine, ec.make_case(1, tokens=12), plan)
    plan = ec.plan_of(ec.PLANS["paper"], (0,), (HeadStrength(mass="gate", factor=2.0),))
    with pytest.raises(CalibrationError, match="does not compute mass 'gate'"):
        ec.run(ReferenceEngine(), ec.make_case(1, tokens=12), plan)


def test_a_head_without_its_second_strength_is_refused(engine):
    own = ec.MEMBERS["both"].strength_of_all
    one = HeadStrength(mass="reweight", gamma=2.0)
    case = ec.make_case(1, tokens=12)
    for strengths in ((own, one), (one, one)):
        plan = ec.plan_of(ec.MEMBERS["both"], (0, 1), strengths)
        with pytest.raises(CalibrationError, match="gamma_initial"):
            ec.run(engine, case, plan)
    with pytest.raises(CalibrationError, match="gamma_initial is of target 'both' alone"):
        ec.run(engine, case, ec.plan_of(ec.PLANS["reweight"], (0,), (own,)))


@pytest.mark.parametrize("name", list(ec.MEMBERS))
def test_triton_refuses_what_it_does_not_compute_by_name(name):
    plan = ec.plan_of(ec.MEMBERS[name], (0,))
    reasons = unsupported(plan, TRITON, engine="triton")
    new = [("target", plan.calibration.target), ("mass", plan.calibration.mass)]
    lacking = [f"{setting} {value!r}" for setting, value in new if value not in TRITON[setting]]
    assert reasons == [f"engine triton does not compute {one}" for one in lacking]
    assert bool(reasons) == (name in ec.LACKING["triton"])
