"""The engines against the float64 reference, and the reference against the definition itself."""

from __future__ import annotations

import math
import random
from dataclasses import fields
from typing import get_args

import engine_cases as ec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import act_harness
from act_harness.calibration import MIN_OTHER_MASS, Calibration, HeadStrength, LayerPlan
from act_harness.engines import ENGINES, refuse_unsupported, select_engine
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import Stock, unsupported
from act_harness.engines.reference import COMPUTES as MEMBERS
from act_harness.engines.reference import ReferenceEngine, calibrate_weights, row_factors
from act_harness.engines.stock import _knows_groups, attend_with_lse
from act_harness.engines.torch import TorchEngine
from act_harness.errors import CalibrationError, InputError

ENGINE_SIZES = {name: engine for name, engine in ec.SIZES.items() if name != "reference"}


@pytest.fixture(params=list(ENGINE_SIZES))
def engine(request):
    return ENGINE_SIZES[request.param]


# -- the reference against the definition, written with loops -------------------------------------


def by_definition(weights, visible, calibration, strength):
    """One head, plain Python floats: semantics read line by line. ``visible`` is a list of rows."""
    rows, columns = len(weights), len(weights[0])
    seen = [sum(visible[k][t] for k in range(rows)) for t in range(columns)]
    most = max(sum(row) for row in visible)
    first = next(t for t in range(columns) if seen[t])
    mean = [sum(weights[k][t] for k in range(rows)) / max(seen[t], 1) for t in range(columns)]
    if calibration.target == "initial":
        sinks = {first}
    else:
        limit = calibration.tau if calibration.rule == "absolute" else calibration.alpha / most
        least = calibration.min_rows
        if least == "auto":
            least = math.ceil(most / calibration.alpha)
        allowed = [t for t in range(columns) if seen[t] >= max(least, 1)]
        if calibration.protect == "initial":
            allowed = [t for t in allowed if t != first]
        sinks = {t for t in allowed if mean[t] > limit}
        if calibration.protect == "first-flagged" and sinks:
            sinks -= {min(sinks)}
    changed = []
    for k in range(rows):
        m = sum(weights[k][t] for t in range(columns) if t in sinks)
        u = sum(weights[k][t] for t in range(columns) if t not in sinks)
        if m == 0 or (strength.mass == "damp" and u < MIN_OTHER_MASS):
            changed.append(list(weights[k]))
            continue
        if strength.mass == "damp":
            new = strength.strength * m
        else:
            new = strength.strength * m / (u + strength.strength * m)
        off = (1 - new) / u if u else 0.0
        changed.append([weights[k][t] * (new / m if t in sinks else off) for t in range(columns)])
    return changed


@st.composite
def maps(draw):
    """Causal attention maps of one head with concentrated columns, as nested lists."""
    size = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)  # noqa: S311
    bias = [rng.choice([0.0, 0.0, 3.0, 12.0]) for _ in range(size)]
    rows = []
    for k in range(size):
        raw = [math.exp(rng.gauss(0, 1) + bias[t]) for t in range(k + 1)]
        rows.append([value / sum(raw) for value in raw] + [0.0] * (size - k - 1))
    return rows


@st.composite
def calibrations(draw):
    mass = draw(st.sampled_from(["damp", "reweight"]))
    strength = (
        {"beta": draw(st.sampled_from([0.0, 0.4, 1.0]))}
        if mass == "damp"
        else {"gamma": draw(st.sampled_from([0.01, 0.5, 3.0]))}
    )
    if draw(st.booleans()) and draw(st.booleans()):
        return Calibration(target="initial", mass=mass, **strength)
    rule = draw(st.sampled_from([{"alpha": 5.0}, {"alpha": 1.5}, {"rule": "absolute", "tau": 0.1}]))
    return Calibration(
        mass=mass,
        protect=draw(st.sampled_from(["initial", "first-flagged", "none"])),
        min_rows=draw(st.sampled_from([1, 3])),
        **rule,
        **strength,
    )


@settings(max_examples=150, deadline=None)
@given(weights=maps(), calibration=calibrations())
def test_reference_is_the_definition(weights, calibration):
    size = len(weights)
    visible = [[t <= k for t in range(size)] for k in range(size)]
    strength = LayerPlan.uniform(calibration, (0,)).strengths[0]
    expected = torch.tensor(by_definition(weights, visible, calibration, strength)).double()
    given_map = torch.tensor(weights, dtype=torch.float64)
    changed = calibrate_weights(given_map[None, None], calibration=calibration)[0, 0]
    torch.testing.assert_close(changed, expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(weights=maps(), calibration=calibrations())
def test_rows_stay_distributions(weights, calibration):
    """I2: rows sum to 1, nothing negative, nothing invisible becomes visible."""
    given_map = torch.tensor(weights, dtype=torch.float64)
    changed = calibrate_weights(given_map[None, None], calibration=calibration)[0, 0]
    torch.testing.assert_close(changed.sum(-1), torch.ones(len(weights)).double())
    assert (changed >= 0).all()
    assert (changed[given_map == 0] == 0).all()


@settings(max_examples=100, deadline=None)
@given(
    m=st.floats(1e-5, 1 - 1e-5), value=st.floats(0, 1), gamma=st.floats(1e-2, 50), low=st.booleans()
)
def test_mass_maps(m, value, gamma, low):
    """The new mass on the sinks is m' of the table, and the rest of the row takes what is left."""
    strengths = (HeadStrength(beta=value), HeadStrength(mass="reweight", gamma=gamma))
    mass = torch.full((1, 2, 1, 1), m, dtype=torch.float64)
    factors = row_factors(mass, 1 - mass, strengths)
    new = [value * m, gamma * m / (1 - m + gamma * m)]
    torch.testing.assert_close((factors.inside * mass).flatten(), torch.tensor(new).double())
    total = factors.inside * mass + factors.outside * (1 - mass)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_row_without_other_mass_is_left_alone():
    calibration = Calibration(rule="absolute", tau=0.5, protect="none")
    weights = torch.tensor([[1.0, 0, 0], [1 - 1e-8, 1e-8, 0], [0.8, 0.1, 0.1]]).double()
    changed = calibrate_weights(weights[None, None], calibration=calibration)[0, 0]
    assert torch.equal(changed[:2], weights[:2])
    assert changed[2, 0].item() == pytest.approx(0.32)


# -- engines against the reference ----------------------------------------------------------------


@pytest.mark.parametrize("name", list(ec.PLANS))
def test_presets(engine, name):
    case = ec.make_case(1)
    found, _ = ec.assert_matches(engine, case, ec.plan_of(ec.PLANS[name], (0, 1, 3)))
    assert (found.report.sinks > 0).any(), "the case must have sinks to prove anything"
    assert found.report.moved.abs().max() > 0.1


@pytest.mark.parametrize("dtype", list(ec.TOLERANCE))
def test_dtypes(engine, dtype):
    case = ec.make_case(2, dtype=dtype)
    ec.assert_matches(engine, case, ec.plan_of(Calibration(), (0, 2)))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (8, 1)])
def test_grouped_queries(engine, heads, groups):
    case = ec.make_case(3, heads=heads, groups=groups)
    ec.assert_matches(engine, case, ec.plan_of(Calibration(), tuple(range(1, heads, 2))))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bare", [False, True])
def test_padding(engine, side, bare):
    if bare and side == "left":
        pytest.skip("left pads always come with a mask")
    case = ec.make_case(4, batch=3, lengths=(48, 31, 1), side=side)
    ec.assert_matches(engine, case, ec.plan_of(Calibration(), (0, 3)), bare=bare)


@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 127, 200])
def test_odd_lengths(engine, tokens):
    case = ec.make_case(5, batch=1, tokens=tokens)
    ec.assert_matches(engine, case, ec.plan_of(Calibration(), (0, 1, 2, 3)))


@pytest.mark.parametrize("window", [7, 20])
def test_sliding_window(engine, window):
    case = ec.make_case(6, tokens=60, window=window, sinks=(0, 9, 30))
    plan = ec.plan_of(Calibration(alpha=2.0), (1, 2))
    found, _ = ec.assert_matches(engine, case, plan)
    assert (found.report.sinks > 0).any()


def test_softcap(engine):
    case = ec.make_case(7, softcap=4.0)
    found, _ = ec.assert_matches(engine, case, ec.plan_of(Calibration(), (0, 3)))
    assert (found.report.sinks > 0).any()


def test_one_strength_per_head(engine):
    case = ec.make_case(8)
    strengths = (
        HeadStrength(beta=0.0),
        HeadStrength(mass="reweight", gamma=3.0),
        HeadStrength(beta=1.0),
    )
    ec.assert_matches(engine, case, ec.plan_of(Calibration(), (0, 1, 2), strengths))


def test_rows_with_nearly_all_mass_on_sinks(engine):
    """Where subtraction would lose every digit; u down to about 1e-6."""
    case = ec.make_case(9, strength=13.0, spread=0.1)
    plan = ec.plan_of(Calibration(protect="none"), (0, 1, 2, 3))
    _, exact = ec.assert_matches(engine, case, plan)
    assert (exact.report.moved > 0.5 * 48).any()  # a mean mass of 0.84 on the sinks, and more


def test_rows_left_alone_keep_the_stock_output(engine):
    case = ec.make_case(10, strength=60.0, spread=0.1)
    plan = ec.plan_of(Calibration(protect="none"), (0, 1, 2, 3))
    found, _ = ec.assert_matches(engine, case, plan)
    assert (found.report.alone > 0).any()


def test_damping_by_one_changes_nothing(engine):
    """I1: through the engine, equal within the tolerance; other heads bit for bit."""
    case = ec.make_case(11)
    stock = ec.stock_of(case, case.geometry())()
    plan = ec.plan_of(Calibration(beta=1.0), (0, 2))
    found = ec.run(engine, case, plan)
    ec.compare_outputs(found.output, stock, case)
    assert torch.equal(found.output[:, :, 1], stock[:, :, 1])
    assert torch.equal(found.output[:, :, 3], stock[:, :, 3])


def test_other_heads_are_the_stock_kernels(engine):
    """I2: bit for bit, padded or not."""
    for lengths in ((48, 48), (48, 20)):
        case = ec.make_case(12, lengths=lengths)
        stock = ec.stock_of(case, case.geometry())()
        found = ec.run(engine, case, ec.plan_of(Calibration(beta=0.0), (1,)))
        others = [0, 2, 3]
        assert torch.equal(found.output[:, :, others], stock[:, :, others])
        assert not torch.allclose(found.output[:, :, 1], stock[:, :, 1], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_change_nothing(engine, side):
    """I3: a sequence alone gives what it gives in a padded batch."""
    plan = ec.plan_of(Calibration(), (0, 1, 2))
    case = ec.make_case(13, batch=3, lengths=(48, 33, 17), side=side)
    together = ec.run(engine, case, plan)
    for b, length in enumerate((48, 33, 17)):
        inside = case.real[b]
        alone = ec.Case(
            *(x[b : b + 1][:, :, inside] for x in (case.query, case.key, case.value)),
            real=torch.ones(1, length, dtype=torch.bool),
            prompt=torch.ones(1, length, dtype=torch.bool),
        )
        single = ec.run(engine, alone, plan)
        ec.compare_outputs(together.output[b : b + 1][:, inside], single.output, alone)
        for name in ("sinks", "moved", "alone"):
            torch.testing.assert_close(
                getattr(together.report, name)[b], getattr(single.report, name)[0]
            )


# -- phases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["frozen", "running", "off"])
@pytest.mark.parametrize("side", ["one", "right"])
def test_prompt_and_continuation_in_one_call(engine, decode, side):
    lengths, prompts = ((48, 48), (40, 40)) if side == "one" else ((48, 37), (40, 21))
    case = ec.make_case(14, lengths=lengths, prompts=prompts, sinks=(0, 5, 11, 43))
    plan = ec.plan_of(Calibration(decode=decode, alpha=3.0), (0, 1, 3))
    found, _ = ec.assert_matches(engine, case, plan, stray=0.002)
    stock = ec.stock_of(case, case.geometry())()
    rest = case.real & ~case.prompt
    same = torch.isclose(found.output[rest], stock[rest], atol=1e-5).all()
    assert bool(same) == (decode == "off")


@pytest.mark.parametrize("decode", ["frozen", "running", "off"])
@pytest.mark.parametrize("window", [None, 20])
def test_pieces_give_the_whole(engine, decode, window):
    """I4: prefill and extension, in one piece, in several, and token by token."""
    case = ec.make_case(
        15, prompts=(40, 40), sinks=(0, 5, 30, 42), window=window, dtype=torch.float64
    )
    plan = ec.plan_of(Calibration(decode=decode, alpha=3.0), (0, 1, 3))
    whole = ec.run(ReferenceEngine(), case, plan).output
    for cuts in ([40], [40, 43], list(range(40, 48))):
        pieces, _ = ec.run_pieces(engine, case, plan, cuts)
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_left_padded_generation(engine, decode):
    case = ec.make_case(16, lengths=(48, 30), side="left", prompts=(40, 22), dtype=torch.float64)
    plan = ec.plan_of(Calibration(decode=decode), (0, 2))
    whole = ec.run(ReferenceEngine(), case, plan).output
    pieces, _ = ec.run_pieces(engine, case, plan, list(range(40, 48)))
    torch.testing.assert_close(pieces[case.real], whole[case.real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_later_tokens_change_nothing_earlier(engine, decode):
    """I8: bit for bit up to the changed token."""
    case = ec.make_case(17, prompts=(40, 40))
    plan = ec.plan_of(Calibration(decode=decode), (0, 1, 2, 3))
    before = ec.run(engine, case, plan).output
    changed = ec.make_case(17, prompts=(40, 40))
    for tensor in (changed.query, changed.key, changed.value):
        tensor[:, :, 45:] = torch.randn_like(tensor[:, :, 45:]) * 3
    after = ec.run(engine, changed, plan).output
    torch.testing.assert_close(before[:, :45], after[:, :45], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before[:, 45:], after[:, 45:], atol=1e-2)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_states_follow_their_sequences(engine, decode):
    """Answers of one context: the state is repeated and picked as the cache is."""
    case = ec.make_case(18, prompts=(40, 40), dtype=torch.float64)
    plan = ec.plan_of(Calibration(decode=decode), (0, 3))
    state = ec.run(engine, case.until(40), plan).state
    index = torch.tensor([1, 1, 0])
    picked = ec.Case(
        *(x[index] for x in (case.query, case.key, case.value, case.real, case.prompt))
    )
    found = ec.run(engine, picked, plan, first_row=40, state=state.select(index))
    again = ec.run(engine, case, plan, first_row=40, state=state)
    torch.testing.assert_close(found.output, again.output[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_sliding_cache_that_dropped_columns(engine, decode):
    """The key tensor holds the last columns only; columns stay absolute positions."""
    case = ec.make_case(19, prompts=(40, 40), window=16, sinks=(0, 30, 36), dtype=torch.float64)
    plan = ec.plan_of(Calibration(decode=decode, alpha=2.0), (0, 1))
    state = ec.run(engine, case.until(40), plan).state
    whole = ec.run(engine, case, plan, first_row=40, state=state).output
    first = 40 + 1 - 16  # what the first new row still sees
    full = case.geometry(40)
    geometry = Geometry(
        real=case.real,
        prompt=torch.zeros_like(case.prompt),
        first_row=40,
        first_column=first,
        columns=48 - first,
        mask=full.mask[..., first:],
    )
    short = ec.Case(
        case.query, case.key[:, :, first:], case.value[:, :, first:], case.real, case.prompt
    )
    stock = ec.stock_of(case, full)()
    found = engine(
        short.call(40),
        geometry=geometry,
        plan=plan,
        state=state,
        stock=Stock(lambda: stock, kernel="sdpa"),
    )
    torch.testing.assert_close(found.output, whole, rtol=1e-9, atol=1e-9)


def test_rolling_windows_are_only_calibrated_by_running(engine):
    case = ec.make_case(20, prompts=(0, 0))
    case.prompt[:] = False
    stock = ec.stock_of(case, case.geometry())()
    frozen = ec.run(engine, case, ec.plan_of(Calibration(), (0, 1)))
    assert torch.equal(frozen.output, stock)
    plan = ec.plan_of(Calibration(decode="running"), (0, 1))
    exact = ec.run(ReferenceEngine(), case, plan)
    found = ec.run(engine, case, plan)
    ec.compare_outputs(found.output, exact.output, case, stray=0.002)
    assert not torch.allclose(found.output, stock, atol=1e-3)


# -- random shapes --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """I6 over random shapes, settings and paddings."""
    tokens = data.draw(st.integers(1, 40), "tokens")
    groups = data.draw(st.sampled_from([1, 2, 3]), "groups")
    heads = groups * data.draw(st.sampled_from([1, 2]), "per group")
    lengths = tuple(data.draw(st.integers(1, tokens), "length") for _ in range(2))
    prompts = tuple(data.draw(st.integers(1, length), "prompt") for length in lengths)
    case = ec.make_case(
        data.draw(st.integers(0, 10**6), "seed"),
        heads=heads,
        groups=groups,
        tokens=tokens,
        lengths=lengths,
        prompts=prompts,
        side=data.draw(st.sampled_from(["left", "right"]), "side"),
        window=data.draw(st.sampled_from([None, 5]), "window"),
        size=8,
        dtype=torch.float64,
    )
    selected = tuple(sorted(data.draw(st.sets(st.integers(0, heads - 1), min_size=1), "selected")))
    base = data.draw(calibrations(), "calibration")
    decode = data.draw(st.sampled_from(["frozen", "running", "off"]), "decode")
    calibration = Calibration(**{**base.settings(), "decode": decode})
    blocks = TorchEngine(block_elements=data.draw(st.sampled_from([1, 50, 10**6]), "block"))
    ec.assert_matches(blocks, case, ec.plan_of(calibration, selected))


# -- geometry and choice of engine ----------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 6])
def test_census_counts_what_rows_see(side, window):
    case = ec.make_case(21, tokens=20, lengths=(20, 11), prompts=(15, 4), side=side, window=window)
    for bare in (False, True):
        geometry = case.geometry(bare=bare)
        visible = geometry.visible(0, 20)[:, 0] & case.prompt[:, :, None]
        seen, most = geometry.prompt_census
        assert torch.equal(seen, visible.sum(dim=1))
        assert torch.equal(most, visible.sum(dim=2).amax(dim=1))


def test_unknown_engine():
    with pytest.raises(InputError, match="did you mean 'torch'"):
        select_engine("tortch")
    assert set(ENGINES) >= {"auto", "reference", "torch", "triton"}
    assert select_engine("auto", device="cpu").name == "torch"
    assert select_engine("reference").name == "reference"


@pytest.mark.parametrize("setting", list(ec.MADE_UP))
@pytest.mark.parametrize("name", ec.NAMES)
def test_made_up_members_are_refused_by_name(name, setting):
    engine, plan = select_engine(name), ec.made_up(setting)
    members = ", ".join(MEMBERS[setting])
    line = f"{setting} '{ec.MADE_UP[setting]}' is unknown, expected one of {members}"
    (reason,) = engine.supports(plan)
    assert reason.startswith(line)
    with pytest.raises(CalibrationError, match=f"^{line}"):
        refuse_unsupported(engine, [plan])
    with pytest.raises(CalibrationError, match=f"^{line}"):
        ec.run(engine, ec.make_case(1, batch=1, tokens=20), plan)


def test_closed_sets_are_those_of_the_settings():
    for setting, members in MEMBERS.items():
        annotation = Calibration.model_fields[setting].annotation
        literal = [one for one in get_args(annotation) if one is not type(None)]
        if not isinstance(literal[0], str):
            literal = get_args(literal[0])
        assert set(literal) == set(members)
    assert all(not select_engine("torch").supports(ec.plan_of(c, (0,))) for c in ec.PLANS.values())


def test_an_engine_may_compute_fewer_members():
    fewer = {**MEMBERS, "target": ("sinks",), "mass": ("damp",)}
    assert unsupported(ec.plan_of(ec.PLANS["initial-reweight"], (0, 1)), fewer, engine="few") == [
        "engine few does not compute target 'initial'",
        "engine few does not compute mass 'reweight'",
    ]


def test_an_engine_that_lacks_a_member_refuses_it_by_name(monkeypatch):
    """What one engine learns is not taken for granted of the others."""
    plan = ec.plan_of(ec.PLANS["initial-reweight"], (0, 1))
    fewer = {**MEMBERS, "mass": ("damp",)}
    monkeypatch.setattr("act_harness.engines.torch.COMPUTES", fewer)
    monkeypatch.setattr("act_harness.engines.ENGINES", ("auto", "reference", "torch"))
    with pytest.raises(CalibrationError) as caught:
        refuse_unsupported(select_engine("torch"), [plan])
    assert str(caught.value) == (
        "engine torch does not compute mass 'reweight'; engines that do: reference"
    )
    refuse_unsupported(select_engine("reference"), [plan])


def test_calibrate_weights_is_public():
    weights = torch.softmax(torch.randn(1, 2, 6, 6).tril() - 1e9 * torch.ones(6, 6).triu(1), -1)
    changed = act_harness.calibrate_weights(weights, calibration=Calibration(alpha=2.0))
    assert changed.shape == weights.shape
    assert changed.dtype == weights.dtype


# -- the stock kernel with its log-sum-exp ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_kernels_own_log_sum_exp(dtype, groups):
    """The fused kernel called directly is the stock one, bit for bit, and its lse is right."""
    case = ec.make_case(22, groups=groups, tokens=33, size=64, dtype=dtype)
    geometry = case.geometry()
    stock = ec.stock_of(case, geometry)
    found = attend_with_lse(case.call(), geometry=geometry, stock=stock)
    assert torch.equal(found.output, stock())
    if groups < 4 and not _knows_groups("cpu"):  # torch 2.6 has no fused kernel for groups there
        assert found.lse is None
        return
    assert found.lse is not None
    key = case.key.repeat_interleave(4 // groups, dim=1)
    products = case.query.double() @ key.double().transpose(-1, -2) * case.scale
    exact = products.masked_fill(~geometry.visible(0, 33), -math.inf).logsumexp(-1)
    atol = 2e-4 if dtype == torch.bfloat16 else 1e-5  # bf16: a faster, coarser exponential
    torch.testing.assert_close(found.lse.double(), exact, rtol=0, atol=atol)


def test_masks_and_other_kernels_give_no_log_sum_exp():
    for case, kernel in (
        (ec.make_case(23, side="left", lengths=(48, 20)), "sdpa"),
        (ec.make_case(23, window=9), "sdpa"),
        (ec.make_case(23), "eager"),
    ):
        geometry = case.geometry()
        output = ec.stock_of(case, geometry)()
        found = attend_with_lse(
            case.call(),
            geometry=geometry,
            stock=Stock(lambda output=output: output, kernel=kernel),
        )
        assert found.lse is None
        assert found.output is output


def test_a_plain_callable_keeps_its_tensor():
    """What is no Stock may hand out a tensor it still needs; the engine must not write into it."""
    case = ec.make_case(24)
    geometry = case.geometry()
    held = ec.stock_of(case, geometry)()
    before = held.clone()
    found = TorchEngine()(
        case.call(),
        geometry=geometry,
        plan=ec.plan_of(Calibration(), (0, 1)),
        state=None,
        stock=lambda: held,
    )
    assert torch.equal(held, before)
    assert not torch.equal(found.output, before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("first_row", [0, 15])
def test_intervals_say_what_rows_see(side, window, first_row):
    case = ec.make_case(25, tokens=20, lengths=(20, 11), side=side, window=window)
    geometry = case.geometry(first_row)
    lo, hi = geometry.intervals
    column = torch.arange(20)
    between = (column >= lo[..., None]) & (column <= hi[..., None]) & case.real[:, None]
    rows = case.real[:, first_row:]
    assert torch.equal(between[rows], geometry.visible(0, geometry.rows)[:, 0][rows])


def test_masks_with_holes_are_no_intervals():
    case = ec.make_case(26, tokens=12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[9, 4] = False
    geometry = Geometry(case.real, case.prompt, 0, 0, 12, mask[None, None])
    assert geometry.intervals is None


def test_what_an_engine_derives_from_a_geometry_is_made_once_for_its_layers():
    geometry, other = (ec.make_case(25).geometry() for _ in range(2))
    made = []

    def make():
        made.append(len(made))
        return made[-1]

    assert [geometry.scratch("rows", make) for _ in range(3)] == [0, 0, 0]
    assert geometry.scratch("columns", make) == 1
    assert other.scratch("rows", make) == 2
    assert set(vars(geometry)) == {field.name for field in fields(geometry)}
