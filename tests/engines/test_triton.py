"""The CUDA engine's kernels, interpreted on the CPU, against the float64 reference."""

from __future__ import annotations

import engine_cases as ec
import pytest
import torch
from triton_cases import DEVICE, ON_DEVICE, SMALL, check_prefill

from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines import select_engine
from act_harness.engines.reference import ReferenceEngine
from act_harness.engines.triton import direct_kernels as direct
from act_harness.engines.triton import prefill
from act_harness.engines.triton.blocks import Blocks, default_blocks
from act_harness.engines.triton.engine import TritonEngine
from act_harness.errors import CalibrationError

WHOLE = SMALL._replace(least=256)  # no block of these short prompts is split
OWN_LSE = ON_DEVICE  # torch has no fused CUDA kernel for the float32 of most cases here


def engine():
    return TritonEngine(SMALL)


def tiny(seed, **settings):
    return ec.make_case(seed, **{"batch": 1, "tokens": 40, "sinks": (0, 5, 11), **settings})


@pytest.mark.parametrize("name", list(ec.PLANS))
def test_presets(name):
    found, _, calls = check_prefill(tiny(1), ec.plan_of(ec.PLANS[name], (0, 3)))
    assert (found.report.sinks > 0).any()
    assert calls["apply"] == calls["direct"] == 1
    assert ("column_sums" in calls) == (ec.PLANS[name].target == "sinks")
    assert ("row_lse" in calls) == OWN_LSE, "the stock kernel's own log-sum-exp was not used"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    if dtype == torch.bfloat16 and not ON_DEVICE:
        pytest.skip("the interpreter's tl.dot takes bfloat16 for integers (triton 3.6 to 3.9)")
    check_prefill(tiny(2, dtype=dtype), ec.plan_of(Calibration(), (0, 2)))


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_head_sizes(size):
    check_prefill(tiny(3, size=size, heads=2, groups=1), ec.plan_of(Calibration(), (1,)))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 70])
def test_odd_lengths(tokens):
    check_prefill(tiny(4, tokens=tokens, heads=2, groups=1), ec.plan_of(Calibration(), (0, 1)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    """Left pads come with a mask, so the kernels compute the log-sum-exp themselves."""
    case = tiny(5, batch=3, lengths=(40, 21, 1), side=side)
    _, _, calls = check_prefill(case, ec.plan_of(Calibration(), (0, 3)), bare=side == "right")
    assert ("row_lse" in calls) == (side == "left" or OWN_LSE)
    if side == "right":
        _, _, calls = check_prefill(case, ec.plan_of(Calibration(), (0, 3)))
        assert "row_lse" in calls


def test_window_and_softcap():
    case = tiny(6, tokens=50, window=20, sinks=(0, 9, 30))
    found, _, calls = check_prefill(case, ec.plan_of(Calibration(alpha=2.0), (1, 2)))
    assert (found.report.sinks > 0).any()
    assert "row_lse" in calls
    capped = tiny(7, softcap=4.0)
    found, _, calls = check_prefill(capped, ec.plan_of(Calibration(), (0, 3)))
    assert (found.report.sinks > 0).any()
    assert "row_lse" in calls


@pytest.mark.slow
def test_rows_with_nearly_all_mass_on_sinks():
    """The direct sum's branch: rows beyond one half, beyond nine tenths, and left alone."""
    for strength in (9.0, 13.0, 60.0):
        case = tiny(8, strength=strength, spread=0.1)
        plan = ec.plan_of(Calibration(protect="none"), (0, 1, 2, 3))
        found, exact, calls = check_prefill(case, plan)
        assert calls["finish"] == 1
        assert found.report.moved.max() > 0.3 * 40 or (found.report.alone > 0).any()
    assert (exact.report.alone > 0).any()


@pytest.mark.parametrize("strength", [13.0, 60.0])
def test_direct_sums_in_one_piece(strength):
    plan = ec.plan_of(Calibration(protect="none"), (0, 1, 2, 3))
    _, _, calls = check_prefill(
        tiny(8, strength=strength, spread=0.1), plan, using=TritonEngine(WHOLE)
    )
    assert "finish" not in calls


def test_direct_sums_in_large_blocks_of_several_parts():
    """Blocks of rows that are finished piece by piece, some with rows to spare."""
    blocks = SMALL._replace(direct_rows=32, items=64)
    plan = ec.plan_of(Calibration(protect="none"), (0, 1))
    case = tiny(8, tokens=90, strength=13.0, spread=0.1)
    _, _, calls = check_prefill(case, plan, using=TritonEngine(blocks))
    assert calls["finish"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", [3, 37, 79, 90])
@pytest.mark.parametrize("side", ["right", "left"])
def test_bias_is_read_where_a_block_of_columns_holds_a_sink(place, side, monkeypatch):
    """In the first block, in one that all rows see, in the last, and in the edge of the rows.

    The bias of all other blocks is made NaN, so that reading it shows; where no block is said to
    hold a sink, the result must be wrong.
    """
    lengths = (96,) if side == "right" else (91,)
    case = tiny(8, tokens=96, strength=13.0, spread=0.1, sinks=(place,), lengths=lengths, side=side)
    plan = ec.plan_of(Calibration(protect="none", alpha=8.0), (0, 1, 2, 3))
    seen = []

    def spoil(call, sinks, output, found):
        clean = call.holds == 0
        assert clean.any(dim=-1).all(), "every block holds a sink"
        assert (call.holds.sum(-1) >= (sinks.count > 0)).all()
        assert found.counts.sum() > 0, "no row is summed anew"
        wide = clean.repeat_interleave(16, dim=-1)
        call.bias.masked_fill_(wide, float("nan"))
        seen.append(call.plain)
        whole(call, sinks, output, found)

    def forget(call, sinks, output, found):
        call.holds.zero_()
        whole(call, sinks, output, found)

    whole = prefill.Launches.sum_anew
    monkeypatch.setattr(prefill.Launches, "sum_anew", spoil)
    found, _, _ = check_prefill(case, plan)
    assert seen == [side == "right"]
    assert found.state.sinks[0, :, 96 - lengths[0] + place].any()
    monkeypatch.setattr(prefill.Launches, "sum_anew", forget)
    with pytest.raises(AssertionError, match="largest relative error"):
        check_prefill(case, plan)


@pytest.mark.slow
@pytest.mark.parametrize("finish_rows", [16, 32])
def test_reports_of_rows_summed_in_pieces(finish_rows):
    """Rows corrected, summed in one piece, in parts and left alone are all counted, once."""
    blocks = SMALL._replace(direct_rows=32, items=24, finish_rows=finish_rows)
    plan = ec.plan_of(Calibration(protect="none"), (0, 1, 3))
    for strength in (9.0, 60.0):
        case = tiny(8, batch=2, tokens=70, strength=strength, lengths=(70, 41))
        kernels = TritonEngine(blocks)
        found, exact, calls = check_prefill(case, plan, bare=True, using=kernels)
        again, _, _ = check_prefill(case, plan, bare=True, using=kernels)
        assert torch.equal(found.report.facts, again.report.facts)
        assert found.report.facts.dtype == torch.float32
        assert calls["finish"] == 2
        assert (exact.report.sinks > 0).any()
    assert (exact.report.alone > 0).any()


def test_rows_summed_anew_twice(monkeypatch):
    """The same rows again (bench tune times that): the tables are left as they were found."""
    whole = prefill.Launches.sum_anew

    def twice(call, sinks, output, found):
        before = output.clone()
        whole(call, sinks, before, found)
        whole(call, sinks, output, found)
        assert torch.equal(before, output)

    monkeypatch.setattr(prefill.Launches, "sum_anew", twice)
    case = tiny(8, strength=13.0, spread=0.1)
    check_prefill(case, ec.plan_of(Calibration(protect="none"), (0, 1)))


def listed_tables(chosen, aim, *, plain, per_pair, lo, hi):
    """Run the two kernels that share listed rows out; ``chosen`` (pairs, rows) bool."""
    pairs, rows = chosen.shape
    counts = chosen.view(pairs, -1, 16).sum(-1, dtype=torch.int32)
    found = torch.full((pairs, rows), 10**6, dtype=torch.int32)
    for pair in range(pairs):
        for part in range(rows // 16):
            own = chosen[pair, part * 16 : part * 16 + 16].nonzero()[:, 0] + part * 16
            found[pair, part * 16 : part * 16 + len(own)] = own.int()
    listed = torch.full((pairs,), -7, dtype=torch.int32)
    row_blocks = pairs * per_pair
    ordered, work = torch.full_like(found, -7), torch.full((5, row_blocks), -7, dtype=torch.int32)
    items = torch.full((2, row_blocks + aim), -7, dtype=torch.int32)
    facts = torch.full((2,), -7, dtype=torch.int32)
    tensors = [x.to(DEVICE) for x in (counts, found, lo, hi, listed, ordered, work, items, facts)]
    counts, found, lo, hi, listed, ordered, work, items, facts = tensors
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    tally = torch.full((3, pairs, rows // 16 + per_pair), 5.0, device=DEVICE)
    direct.gather_rows[(pairs,)](
        counts, found, lo, hi, arrived, tally, listed, ordered, work, items, facts,
        rows, rows, 1, rows // 16, per_pair, row_blocks, row_blocks + aim, aim, 1,
        tally.shape[2], PLAIN=plain, REPORT=True, AM=16, BM=16, BN=16, PARTS=2, BLOCKS=2, SHARED=4,
    )  # fmt: skip
    assert not tally[..., rows // 16 :].any()
    assert (tally[..., : rows // 16] == 5).all()
    assert arrived.item() == 0
    return listed.cpu(), ordered.cpu(), work.cpu(), items.cpu(), facts.tolist()


@pytest.mark.parametrize("aim", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("plain", [True, False])
def test_listed_rows_are_shared_out(aim, plain):
    """Every listed row is in one block, and every column it sees in one item."""
    generator = torch.Generator().manual_seed(aim)
    chosen = torch.rand(4, 96, generator=generator) < torch.tensor([[0.9], [0.0], [0.2], [0.02]])
    chosen[3, 95] = True
    row = torch.arange(96, dtype=torch.int32).expand(4, -1).contiguous()
    lo = torch.zeros_like(row) if plain else (row - 20).clamp(min=0)
    listed, ordered, work, items, (used, split) = listed_tables(
        chosen, aim, plain=plain, per_pair=6, lo=lo, hi=row
    )
    assert listed.tolist() == chosen.sum(1).tolist()
    parts = []
    for pair in range(4):
        own = ordered[pair, : listed[pair]].tolist()
        assert own == chosen[pair].nonzero()[:, 0].tolist()
        for block in range(6):
            g = pair * 6 + block
            mine = own[block * 16 : block * 16 + 16]
            first, length, number, item, part = work[:, g].tolist()
            if not mine:
                assert length == number == 0
                continue
            assert first <= lo[pair, mine[0]] < first + 16
            assert mine[-1] < first + length * 16 <= mine[-1] + 16
            assert items[0, item : item + number].tolist() == [g] * number
            assert 1 <= number <= length
            assert (part >= 0) == (number > 1)
            parts += range(part, part + number) if part >= 0 else []
    assert sorted(parts) == list(range(len(parts)))
    assert len(parts) <= 2 * aim
    assert used == int(work[2].sum()) <= 24 + aim
    assert sorted(items[1, :split].tolist()) == (work[2] > 1).nonzero()[:, 0].tolist()
    if aim == 40:
        assert split > 1
    if aim == 0:
        assert split == 0


@pytest.mark.slow
def test_column_sums_side_by_side(monkeypatch):
    """Sequences and heads in groups, the last of them smaller."""
    monkeypatch.setattr(prefill, "_CONCURRENT_QUERIES", 2 * 40 * 16 * 4)
    case = tiny(19, batch=2)
    assert case.query.shape[2:] == (40, 16)
    check_prefill(case, ec.plan_of(Calibration(), (0, 1, 3)), using=TritonEngine(SMALL))
    monkeypatch.setattr(prefill, "_CONCURRENT_QUERIES", 4 * 40 * 16 * 4)
    check_prefill(case, ec.plan_of(Calibration(), (0, 1, 3)), using=TritonEngine(SMALL))


def test_more_sinks_than_a_block_of_them():
    case = tiny(9, tokens=60, sinks=tuple(range(0, 60, 3)), strength=4.0)
    found, _, _ = check_prefill(case, ec.plan_of(Calibration(alpha=1.2), (0, 1)))
    assert (found.report.sinks > 16).any()


@pytest.mark.slow
def test_flags_over_several_blocks():
    """Counting goes on from one block of columns to the next."""
    case = tiny(10, tokens=1100, heads=1, groups=1, sinks=(3, 500, 1026, 1050), strength=9.0)
    large = TritonEngine(Blocks(128, 128, 4, 128, 128, 128))
    for protect in ("initial", "first-flagged"):
        found, _, _ = check_prefill(
            case, ec.plan_of(Calibration(protect=protect), (0,)), using=large
        )
        assert found.state.sinks[0, 0, 1026:].any()


@pytest.mark.slow
def test_one_strength_per_head():
    strengths = (HeadStrength(beta=0.0), HeadStrength(mass="reweight", gamma=3.0))
    check_prefill(tiny(11), ec.plan_of(Calibration(), (0, 2), strengths))


def test_other_heads_are_the_stock_kernels():
    case = tiny(12).to(DEVICE)
    stock = ec.stock_of(case, case.geometry())()
    found = ec.run(engine(), case, ec.plan_of(Calibration(beta=0.0), (1,)))
    assert torch.equal(found.output[:, :, [0, 2, 3]], stock[:, :, [0, 2, 3]])
    assert not torch.allclose(found.output[:, :, 1], stock[:, :, 1], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["frozen", "off"])
def test_prompt_and_continuation_in_one_call(decode):
    case = tiny(13, batch=2, lengths=(40, 30), prompts=(32, 20))
    _, _, calls = check_prefill(case, ec.plan_of(Calibration(decode=decode), (0, 3)), bare=True)
    assert ("row_lse" in calls) == OWN_LSE


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["frozen", "running", "off"])
@pytest.mark.parametrize("cuts", [[30], [30, 31, 33]])
def test_pieces_give_the_whole(decode, cuts):
    case = tiny(14, batch=2, prompts=(30, 30), tokens=36).to(DEVICE)
    plan = ec.plan_of(Calibration(decode=decode), (0, 3))
    whole = ec.run(ReferenceEngine(), case, plan).output
    kernels = engine()
    pieces, _ = ec.run_pieces(kernels, case, plan, cuts)
    ec.compare_outputs(pieces, whole, case)
    assert kernels.calls.get("fallback", 0) == (len(cuts) if decode == "running" else 0)
    assert kernels.calls.get("step", 0) == (len(cuts) > 1 and decode == "frozen")


@pytest.mark.slow
@pytest.mark.parametrize("strength", [6.0, 13.0, 60.0])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_steps(strength, softcap):
    """One row over the cache: by difference, summed directly, left alone; with a soft cap."""
    case = tiny(18, tokens=34, prompts=(30,), strength=strength, softcap=softcap).to(DEVICE)
    plan = ec.plan_of(Calibration(protect="none"), (0, 1, 2, 3))
    whole = ec.run(ReferenceEngine(), case, plan).output
    kernels = engine()
    pieces, _ = ec.run_pieces(kernels, case, plan, [30, 31, 32, 33])
    ec.compare_outputs(pieces, whole, case)
    assert kernels.calls["step"] == 4


@pytest.mark.slow
def test_left_padded_decode():
    case = tiny(15, batch=2, lengths=(36, 20), prompts=(30, 14), side="left", tokens=36)
    case = case.to(DEVICE)
    plan = ec.plan_of(Calibration(), (0, 2))
    whole = ec.run(ReferenceEngine(), case, plan).output
    pieces, _ = ec.run_pieces(engine(), case, plan, list(range(30, 36)))
    ec.compare_outputs(pieces, whole, case)


def test_unlisted_states_are_taken_too():
    """A state that engine torch left, repeated for answers."""
    case = tiny(16, prompts=(30,), tokens=36).to(DEVICE)
    plan = ec.plan_of(Calibration(), (0, 3))
    whole = ec.run(ReferenceEngine(), case, plan).output
    state = ec.run(select_engine("torch"), case.until(30), plan).state
    found = ec.run(engine(), case, plan, first_row=30, state=state)
    rest = ec.row_errors(found.output, whole[:, 30:], case.real[:, 30:])
    assert rest.max() < ec.TOLERANCE[torch.float32]


def test_what_the_kernels_cannot_do_is_said_once(caplog):
    case = tiny(17, dtype=torch.float64).to(DEVICE)
    plan = ec.plan_of(Calibration(), (0,))
    kernels = engine()
    for _ in range(2):
        ec.assert_matches(kernels, case, plan)
    assert kernels.calls == {"fallback": 2}
    assert len([r for r in caplog.records if "float64" in r.getMessage()]) == 1


@pytest.mark.parametrize("setting", list(ec.MADE_UP))
def test_made_up_members_are_refused_by_name(setting):
    plan, case = ec.made_up(setting), tiny(1).to(DEVICE)
    line = f"{setting} '{ec.MADE_UP[setting]}' is unknown, expected one of "
    assert [reason[: len(line)] for reason in engine().supports(plan)] == [line]
    kernels = engine()
    with pytest.raises(CalibrationError, match=f"^{line}"):
        ec.run(kernels, case, plan)
    assert "apply" not in kernels.calls


@pytest.mark.slow
def test_packed_requests_through_the_kernels(make_artifact, monkeypatch):
    """Contexts of several lengths and their answers in one row: as the plain path."""
    from conftest import make_tiny

    from act_harness.attention import calibrated
    from act_harness.scoring.forwards import Forwards
    from act_harness.scoring.scorer import Item, Scorer

    monkeypatch.setattr(Forwards, "_joins_answers", False)  # as on a device
    model = make_tiny(dtype=torch.float32).to(DEVICE)
    contexts = [tuple(range(3, 3 + size)) for size in (14, 6)]
    items = [
        Item(c, (40 + n, 50 - n, 30)[:size]) for c in contexts for n, size in enumerate((3, 2, 1))
    ]
    kernels = engine()
    artifact = make_artifact(model)
    with calibrated(model, artifact, engine="reference") as attachment:
        expected = Scorer(model, attachment, batch_size=1, share=False).score(items)
    with calibrated(model, artifact, engine=kernels) as attachment:
        kernels.calls.clear()
        scorer = Scorer(model, attachment)
        found = scorer.score(items)
    assert scorer.work.forwards == 1
    assert kernels.calls["column_sums"]
    assert "fallback" not in kernels.calls
    assert [s.loglikelihood for s in found] == pytest.approx(
        [s.loglikelihood for s in expected], abs=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_blocks_of_devices_with_little_shared_memory(size, dtype):
    """Turing has 64 KiB: smaller blocks there, which compute the same."""
    for rows in (8, 400, 20000):
        usual = default_blocks(size, dtype, rows)
        assert usual == default_blocks(size, dtype, rows, shared=99 << 10)
        little = default_blocks(size, dtype, rows, shared=64 << 10)
        row_bytes = size * dtype.itemsize
        held = little.sums_columns + little.stages * little.sums_rows
        assert held * row_bytes <= 64 << 10
        held = little.direct_rows + 2 * little.direct_stages * little.direct_columns
        assert held * row_bytes <= 64 << 10
    case = tiny(31, size=size, heads=2, groups=1, dtype=dtype)
    check_prefill(case, ec.plan_of(Calibration(), (1,)), using=TritonEngine(little))
