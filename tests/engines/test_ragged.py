"""Packed rows as segments: layout, and the kernels (interpreted) against the reference."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import Mock

import engine_cases as ec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny
from triton_cases import DEVICE, ON_DEVICE, SMALL, attend, check_row

from act_harness.attention import calibrated
from act_harness.attention import packing as packed
from act_harness.attention.capabilities import capabilities_of
from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines.operation import AttentionCall
from act_harness.engines.segments import LONGEST, Capacity, Segments
from act_harness.engines.triton.engine import TritonEngine
from act_harness.engines.triton.segments import RaggedBlocks
from act_harness.scoring import graphs
from act_harness.scoring.forwards import Forwards
from act_harness.scoring.scorer import Item, Scorer

CPU = torch.device("cpu")


QUESTIONS = ((40, 40, (3, 1, 20)), (7, 7, ()), (23, 19, (2,)), (1, 1, (4,)))


def test_layout():
    segments = Segments.of([3, 2], [3, 1], [(1, 2), (0, 1)], CPU)
    assert segments.table.tolist() == [
        [0, 3, 0, 3, 3, 0],
        [3, 2, 3, 2, 1, 1],
        [5, 2, 5, 4, 1, 1],
        [7, 1, 9, 4, 3, 0],
    ]
    assert segments.columns.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 7]
    assert segments.query_starts.tolist() == [0, 3, 5, 7, 8]
    assert segments.key_starts.tolist() == [0, 3, 5, 9, 13]
    assert segments.capacity == Capacity(8, 2, 2, 13, 3, 2)
    alone = Segments.of([3], [3], [], CPU)
    values = torch.arange(6.0).view(3, 1, 2)
    assert alone.gather(values) is values


QUESTION = st.tuples(st.integers(1, 90), st.lists(st.integers(1, 70), max_size=4))


@example([[(4, [])], [(1, [1])]])
@example([[(4, [])], [(9, [])], [(1, [1])]])
@given(st.lists(st.lists(QUESTION, min_size=1, max_size=5), min_size=2, max_size=4))
def test_layouts_in_a_shared_capacity(batches):
    """Contexts and answers lie as in a layout of their own; the rest is empty, or keyless pads."""
    layouts = [
        (
            [length for length, _ in sizes],
            [(owner, size) for owner, (_, own) in enumerate(sizes) for size in own],
        )
        for sizes in batches
    ]
    capacities = [Capacity.of(*layout) for layout in layouts]
    capacity = capacities[0]
    for other in capacities[1:]:
        capacity = capacity.joined(other)
    assert capacity.tokens == max(one.tokens for one in capacities)
    assert capacity.pads - 1 == capacity.tokens - min(one.tokens for one in capacities)
    assert capacity.contexts == max(one.contexts for one in capacities) + 1
    for exact, (lengths, answers) in zip(capacities, layouts, strict=True):
        own = Segments.of(lengths, lengths, answers, CPU)
        shared = Segments.of(lengths, lengths, answers, CPU, capacity)
        table, count = shared.table.tolist(), len(lengths)
        assert len(table) == capacity.segments
        assert table[:count] == own.table[:count].tolist()
        longer = slice(capacity.contexts, capacity.contexts + len(answers))
        # empty contexts and answers number themselves and the last, empty context
        assert table[longer] == own.table[count:].tolist()
        used = {*range(count), *range(longer.start, longer.stop)}
        empty = [row for n, row in enumerate(table[:-1]) if n not in used]
        assert all(row[1] == row[3] == row[4] == 0 for row in empty)
        assert all(row[5] == capacity.contexts - 1 for row in table[longer.stop :])
        assert table[capacity.contexts - 1][1] == 0
        pads = capacity.tokens - exact.tokens
        assert table[-1][:2] == [exact.tokens, pads]
        assert table[-1][3] == 0
        assert pads < capacity.pads
        assert int(shared.query_starts[-1]) == capacity.tokens
        if capacity.keys:
            columns = list(range(sum(lengths))) if own.columns is None else own.columns.tolist()
            assert shared.columns[: len(columns)].tolist() == columns


@pytest.mark.parametrize("name", list(ec.PLANS))
def test_presets(name):
    kernels, report = check_row(QUESTIONS, ec.plan_of(ec.PLANS[name], (0, 3)))
    assert (report.sinks > 0).any()
    assert kernels.calls == {"segment_sinks": 1, "answer_rows": 1}


def test_long_contexts_take_a_launch_of_their_own():
    kernels = TritonEngine()
    kernels.segments.fused = 16
    check_row(QUESTIONS, ec.plan_of(Calibration(), (0, 3)), engine=kernels)
    assert kernels.calls == {"segment_sinks": 1, "segment_rows": 1, "answer_rows": 1}


def test_several_tiles():
    for fused in (256, 0):
        kernels = TritonEngine()
        kernels.segments.fused, kernels.segments.blocks = fused, RaggedBlocks(16, 16)
        plan = ec.plan_of(Calibration(alpha=2.0), (1, 2))
        _, report = check_row(
            ((70, 66, (20, 3)), (33, 33, (1,))), plan, engine=kernels, sinks=(0, 5, 20, 40)
        )
        assert (report.sinks > 1).any()


def test_first_flagged_over_several_tiles():
    """The lowest flagged column is left out once, in whichever tile it lies."""
    kernels = TritonEngine()
    kernels.segments.blocks = RaggedBlocks(16, 16)
    plan = ec.plan_of(Calibration(rule="absolute", tau=0.1, protect="first-flagged"), (0, 1, 2, 3))
    _, report = check_row(((60, 60, (2,)),), plan, engine=kernels, sinks=(20, 37))
    assert (report.sinks > 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    if dtype == torch.bfloat16 and not ON_DEVICE:
        pytest.skip("the interpreter's tl.dot takes bfloat16 for integers (triton 3.6 to 3.9)")
    check_row(QUESTIONS, ec.plan_of(Calibration(), (0, 2)), dtype=dtype)
    for name in ("unprotected", "initial"):  # rows that keep next to nothing of their sinks
        check_row(((300, 280, (17,)),), ec.plan_of(ec.PLANS[name], (0, 3)), dtype=dtype, size=64)


@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_head_sizes(size):
    check_row(((30, 30, (3,)),), ec.plan_of(Calibration(), (1,)), size=size, heads=2, groups=1)


def test_rows_with_nearly_all_mass_on_sinks_and_rows_left_alone():
    plan = ec.plan_of(Calibration(protect="none"), (0, 1, 2, 3))
    reports = [
        check_row(((40, 40, (3,)),), plan, strength=strength, spread=0.1)[1]
        for strength in (9.0, 13.0, 60.0)
    ]
    assert reports[1].moved.max() > 0.3 * 40
    assert (reports[2].alone > 0).any()


def test_one_strength_per_head():
    strengths = (HeadStrength(beta=0.0), HeadStrength(mass="reweight", gamma=3.0))
    check_row(QUESTIONS, ec.plan_of(Calibration(), (0, 2), strengths))


def test_continuations_are_not_calibrated_with_decode_off():
    kernels, _ = check_row(QUESTIONS, ec.plan_of(Calibration(decode="off"), (0, 1, 2, 3)))
    assert kernels.calls == {"segment_sinks": 1}


def test_rolling_windows_have_no_sinks():
    _, report = check_row(((20, 0, ()), (30, 30, ())), ec.plan_of(Calibration(), (0, 3)))
    assert not report.facts[:, 0].any()
    assert report.facts[0, 1].any()


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 9), max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_any_lengths(sizes):
    questions = tuple((length, length, tuple(answers)) for length, answers in sizes)
    check_row(questions, ec.plan_of(Calibration(alpha=2.0, min_rows="auto"), (0, 3)))


def test_what_is_not_taken():
    kernels = TritonEngine()
    short = Segments.of([5], [5], [], CPU)
    long = Segments.of([LONGEST + 1], [5], [], CPU)
    plan = ec.plan_of(Calibration(), (0,))
    assert kernels.takes_segments(plan, short.capacity)
    assert not kernels.takes_segments(plan, long.capacity)
    running = ec.plan_of(Calibration(decode="running"), (0,))
    assert not kernels.takes_segments(running, short.capacity)


class Tape:
    """A capture without a device: what is run again writes where its results were."""

    def __init__(self, fails="", keeps=False):
        self.fails, self.keeps, self.captures = fails, keeps, 0

    def capture(self, work):
        self.captures += 1
        if self.fails:
            raise RuntimeError(self.fails)
        found = work()

        def replay():
            again = found if self.keeps else work()
            found.hidden.copy_(again.hidden)
            if found.totals is not None:
                found.totals.copy_(again.totals)

        return found, replay


@pytest.fixture
def segmented(monkeypatch):
    """Let a model on the CPU attend over segments, as on a device, and capture on a tape."""

    def prepare(**tape):
        made = Tape(**tape)
        monkeypatch.setattr(graphs.PackedForwards.__init__, "__defaults__", (lambda: made,))
        return made

    monkeypatch.setattr(Forwards, "_joins_answers", False)
    monkeypatch.setattr(packed, "flash_takes", lambda *_: True)
    monkeypatch.setattr(packed, "ragged_attention", attend)
    return prepare


def scores(found):
    return [s.loglikelihood for s in found]


def some_items(sizes):
    """Contexts of these sizes, each with answers of up to three tokens."""
    contexts = [tuple(range(3, 3 + size)) for size in sizes]
    items = [
        Item(c, (40 + n, 50 - n, 30)[:size]) for c in contexts for n, size in enumerate((3, 2, 1))
    ]
    return [*items, Item(contexts[0], (7, 7, 7)), Item((9, 8, 7), (3, 2))]


def compare_records(seen, records):
    assert seen.keys() == records.keys()
    assert any(record.with_sink for record in records.values())
    for prompt, record in records.items():
        assert seen[prompt].sinks == record.sinks
        assert seen[prompt].rows == record.rows
        assert seen[prompt].moved == pytest.approx(record.moved, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["frozen", "off", "running"])
def test_requests_of_a_model(make_artifact, segmented, decode):
    """Contexts of several lengths and their answers: as each request by itself."""
    tape = segmented()
    model, items = make_tiny(dtype=torch.float32).to(DEVICE), some_items((30, 6, 17))
    artifact = make_artifact(model, decode=decode)
    with calibrated(model, artifact, engine="reference") as attachment:
        records = {}
        plain = Scorer(model, attachment, batch_size=1, share=False)
        expected = plain.score(items, on_prompt=records.__setitem__)
    kernels = TritonEngine()
    with calibrated(model, artifact, engine=kernels) as attachment:
        kernels.calls.clear()
        scorer, seen = Scorer(model, attachment), {}
        found = scorer.score(items, on_prompt=seen.__setitem__)
    assert scorer.work.forwards == 1
    assert ("segment_sinks" in kernels.calls) == (decode != "running")
    assert scorer.work.padded_tokens == scorer.work.tokens
    assert tape.captures == 0  # nothing to come that is worth it
    assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
    compare_records(seen, records)


class Letters:
    """A tokenizer of one letter a token, brackets often enough."""

    def decode(self, ids, **_):
        return "".join("<x>yz"[one % 5] for one in ids)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a prompt holds nothing between the markers")
@pytest.mark.parametrize("name", ["both", "span-raise"])
def test_requests_of_a_model_under_other_members(make_artifact, segmented, name):
    """Spans, which segments do not know, are calibrated by the kernels of a padded call."""
    segmented()
    model, items = make_tiny(dtype=torch.float32).to(DEVICE), some_items((14, 6))
    given = ec.MEMBERS[name]
    given = Calibration(**{**given.settings(), **({"alpha": 1.5} if given.alpha else {})})
    artifact = make_artifact(model, {1: (2,)}, calibration=given)
    span = given.target == "span"
    own = {"tokenizer": Letters(), "facts": artifact.model}
    with calibrated(model, artifact, engine="reference", **own) as attachment:
        expected = Scorer(model, attachment, batch_size=1, share=False).score(items)
    kernels = TritonEngine(SMALL)
    with calibrated(model, artifact, engine=kernels, **own) as attachment:
        kernels.calls.clear()
        scorer = Scorer(model, attachment)
        found = scorer.score(items)
    with calibrated(model, None) as attachment:
        stock = Scorer(model, attachment).score(items)
    assert scorer.work.forwards == 1
    assert ("segment_sinks" in kernels.calls) == (not span)
    assert ("apply" in kernels.calls) == span
    assert "fallback" not in kernels.calls
    assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
    assert scores(found) != pytest.approx(scores(stock), abs=1e-3)


SIMILAR = (16, 15, 14, 13, 12, 11, 10, 9)


@pytest.mark.parametrize("heads", [pytest.param(True, marks=pytest.mark.slow), False])
def test_captured_forwards(make_artifact, segmented, heads):
    """Similar forwards are captured once and run again, with their own tokens."""
    tape = segmented()
    model, items = make_tiny(dtype=torch.float32).to(DEVICE), some_items(SIMILAR)
    artifact = make_artifact(model, heads={1: (0, 3)}) if heads else None
    with calibrated(model, artifact) as attachment:
        records = {}
        plain = Scorer(model, attachment, batch_size=1, share=False)
        expected = plain.score(items, on_prompt=records.__setitem__)
    with calibrated(model, artifact, engine=TritonEngine()) as own:
        calls = own.calls.calls.get("triton", 0)
        scorer, seen, done = Scorer(model, own, batch_size=2), {}, []
        found = scorer.score(items, on_prompt=seen.__setitem__, progress=done.append)
        calls = own.calls.calls.get("triton", 0) - calls
        assert len(own.records()) == (1 if heads else 0)  # of the latest forward
    forwards = scorer.forwards._packed
    assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
    assert [s.is_greedy for s in found] == [s.is_greedy for s in expected]
    assert tape.captures == forwards.captured == 1
    assert forwards.replayed == scorer.work.forwards - 1 == 4
    assert forwards._graphs == {}  # their memory is free again
    assert [answer.value for answer in capabilities_of(model).graphs.values()] == [True]
    assert len(done) == 5
    assert sum(done) == len(items)
    assert scorer.work.padded_tokens > scorer.work.tokens
    if heads:
        compare_records(seen, records)
        # a layer of every forward, of capturing the graph, and of the trial of the first replay
        # (whose graph, being a tape, calls the engine as well)
        assert calls >= scorer.work.forwards


@pytest.mark.parametrize(
    ("tape", "why"),
    [
        ({"fails": "operation not permitted when stream is capturing"}, "not permitted"),
        ({"keeps": True}, "something else on other tokens"),
    ],
)
def test_models_that_cannot_be_captured(segmented, caplog, tape, why):
    """They are run forward by forward, and the log says why, once."""
    made = segmented(**tape)
    model, items = make_tiny(dtype=torch.float32).to(DEVICE), some_items(SIMILAR)
    expected = Scorer(model, batch_size=1, share=False).score(items)
    scorer = Scorer(model, batch_size=2)
    with caplog.at_level("INFO"):
        found = scorer.score(items)
    assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
    assert made.captures == 1
    assert caplog.text.count("cannot be recorded") == 1
    assert why in caplog.text
    answer = capabilities_of(model).graphs[None]
    assert not answer.value
    assert why in answer.reason
    assert scores(Scorer(model, batch_size=2).score(items)) == pytest.approx(scores(expected))
    assert made.captures == 1  # nor is it tried again


def test_memory_that_runs_out_ends_capturing(segmented, monkeypatch):
    segmented()
    model, items = make_tiny(dtype=torch.float32).to(DEVICE), some_items(SIMILAR)
    expected = Scorer(model, batch_size=1, share=False).score(items)
    run, failed = graphs.PackedForwards.run, []

    def fails_once(self, *given):
        if self.replayed == 2 and not failed:
            failed.append(given)
            raise torch.OutOfMemoryError
        return run(self, *given)

    monkeypatch.setattr(graphs.PackedForwards, "run", fails_once)
    scorer = Scorer(model, batch_size=2)
    assert scores(scorer.score(items)) == pytest.approx(scores(expected), abs=1e-4)
    assert failed
    assert scorer.token_budget
    assert scorer.forwards._packed.replayed == 2


def test_what_a_plan_shares(segmented, monkeypatch):
    """Many small forwards share a capacity; few, or such as the device computes longer, do not."""
    segmented()
    model = make_tiny(dtype=torch.float32).to(DEVICE)
    forwards = Forwards(model)
    small = [([size, size], []) for size in range(60, 50, -1)]
    capacities = [Capacity.of(*one) for one in small]

    def plan(layouts, tokens):
        monkeypatch.setattr(graphs, "HOST_SECONDS", graphs.layer_seconds(model, tokens))
        forwards.expect(layouts)
        return [forwards.capacity(*one) for one in layouts]

    shared = plan(small, 10_000)
    assert len(set(shared)) == 1
    assert shared[0] == Capacity(120, 3, 0, 0, 60, 0, pads=19)
    assert plan(small[:2], 10_000) == capacities[:2]
    assert plan(small, 100) == capacities
    apart = plan([([900], [])] * 5 + [([50], [])] * 5, 2_000)
    assert [capacity.tokens for capacity in apart] == [900] * 5 + [50] * 5
    forwards.forget_graphs()
    assert forwards.capacity(*small[0]) == capacities[0]


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which is the first one under ``--device cuda:1``."""
    current = [0]

    @contextmanager
    def device(wanted):
        before, current[0] = current[0], 1
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    kernels, query = TritonEngine(), Mock(is_cuda=True, device=CPU)
    query.get_device.return_value = 1
    where = []
    monkeypatch.setattr(kernels.segments, "calibrate", lambda *_, **__: where.append(current[0]))
    monkeypatch.setattr(kernels, "fallback", lambda *_, **__: where.append(current[0]))
    plan = ec.plan_of(Calibration(), (0,))
    call = AttentionCall(query, None, None, scale=1.0)
    kernels.calibrate_segments(call, None, segments=None, plan=plan)
    kernels(call, geometry=None, plan=plan, state=None, stock=None)
    assert where == [1, 1]
    assert current == [0]
