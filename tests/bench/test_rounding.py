"""The instrument that compares hf-act with hf and hf with itself."""

from __future__ import annotations

import json

import pytest
import torch

from act_harness.bench import rounding
from act_harness.bench.rounding import Gap, Paths, bench_rounding, gap, questions
from act_harness.bench.scoring import Requests, write_requests
from act_harness.errors import InputError

PAIRS = [
    ((5, 6, 7), (8, 9, 10)), ((5, 6, 7), (9,)), ((5, 6, 7), (12, 13)),
    ((4, 5), (3,)), ((4, 6), (3,)), ((4, 7), (3, 4)), ((4, 7), (8,)),
]  # fmt: skip


def test_questions_are_runs_of_one_context():
    assert questions(PAIRS) == [range(0, 3), range(5, 7)]
    assert questions(PAIRS[:2]) == [range(0, 2)]
    assert questions(PAIRS[3:5]) == []


def test_a_gap_by_hand():
    one = [(-1.0, True), (-2.0, False), (-3.0, False), (-1.0, True), (-9.0, False),
           (-2.0, False), (-2.5, False)]  # fmt: skip
    two = [(-1.5, False), (-1.25, True), (-3.0, False), (-1.0, True), (-8.0, False),
           (-2.0, False), (-2.5, False)]  # fmt: skip
    # differences 0.5, 0.75, 0, 0, 1, 0, 0; the first question's best choice moves from 0 to 1
    assert gap(two, one, PAIRS) == Gap(1.0, pytest.approx(2.25 / 7), 1, 2)
    assert gap(one, one, PAIRS) == Gap(0.0, 0.0, 0, 0)


def test_rows_say_what_is_compared_with_what():
    def stock(pairs, size, softmax):
        return [(-1.0 - (0.25 if size == 8 else 0.0) - (0.5 if softmax else 0.0), True)] * 7

    paths = Paths(stock, lambda pairs, size: [(-1.5, True)] * 7, "by hand")
    table = bench_rounding([Requests("t", PAIRS)], paths, batch_sizes=(1, 8), rounds=2)
    found = {(row[3], row[4]): row[5] for row in table.rows}
    assert found == {
        ("hf, batch 1, softmax float32", "hf, batch 1"): 0.5,
        ("hf, batch 1, again", "hf, batch 1"): 0.0,
        ("none, batch 1", "hf, batch 1"): 0.5,
        ("none, batch 1", "hf, batch 1, softmax float32"): 0.0,
        ("hf, batch 8", "hf, batch 1"): 0.25,
        ("none, batch 8", "hf, batch 8"): 0.25,
        ("none, batch 1, again", "none, batch 1"): 0.0,
        ("none, batch 8", "none, batch 1"): 0.0,
    }


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_on_stored_requests(tiny_checkpoint, tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setattr(rounding, "find_spec", lambda name: None)
    write_requests([Requests("made 0-shot", PAIRS)], tmp_path / "r.json")
    given = ["--model", str(tiny_checkpoint), "--requests", str(tmp_path / "r.json"), "--device",
             "cpu", "--batch-sizes", "1,4", "--rounds", "1", "--output", str(tmp_path)]  # fmt: skip
    worst = {}
    for dtype in ("float32", "bfloat16"):
        path = rounding.main([*given, "--dtype", dtype])
        stored = json.loads(path.with_suffix(".json").read_text())
        rows = stored["tables"][0]["rows"]
        assert {tuple(row[:3]) for row in rows} == {("made 0-shot", 7, 2)}
        worst[dtype] = max(row[5] for row in rows)
        assert ("lm-eval's own" in stored["remarks"][0]) is installed
    assert worst["float32"] < 1e-5 < 1e-3 < worst["bfloat16"]
    with pytest.raises(InputError, match="one of them"):
        rounding.main([*given, "--tasks", "sst2"])


def test_stock_in_another_softmax_dtype(tiny):
    from act_harness.bench.stock import StockPath

    model = tiny(dtype=torch.bfloat16)
    coarse = StockPath(model, 1).score(PAIRS)
    fine = StockPath(model, 1, softmax_dtype=torch.float32).score(PAIRS)
    assert 0 < gap(coarse, fine, PAIRS).largest < 0.5
