"""The scoring benchmark: its stock path is lm-eval's, its ceiling is countable by hand."""

from __future__ import annotations

import json
from statistics import median

import pytest

from act_harness.attention import model_facts
from act_harness.attention.load import load_plain_model
from act_harness.bench import common, memory, scoring
from act_harness.bench.models import random_llama
from act_harness.bench.scoring import (
    Requests,
    ScoringSettings,
    StockPath,
    bench_scoring,
    random_heads,
    read_requests,
    token_ceiling,
    write_requests,
)
from act_harness.bench.stock import LM_EVAL, STAND_IN, choose_stock
from act_harness.errors import InputError
from act_harness.scoring import logits
from act_harness.support import provenance

PAIRS = [
    ((5, 6, 7, 8), (9, 10, 11)),
    ((5, 6, 7, 8), (9,)),
    ((5, 6, 7, 8), (12, 13)),
    ((4, 5), (3,)),
]


def test_the_stock_path_is_lm_evals(tiny_checkpoint):
    from lm_eval.models.huggingface import HFLM

    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(
        str(tiny_checkpoint), artifact="none", dtype="float32", device="cpu", batch_size=2
    )
    requests = [(("", ""), list(context), list(answer)) for context, answer in PAIRS]
    want = HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
    stock = StockPath(lm.model, batch_size=2)
    got = stock.score(PAIRS)
    assert [g[0] for g in got] == pytest.approx([w[0] for w in want], abs=1e-5)
    assert [g[1] for g in got] == [w[1] for w in want]
    # inputs: 4+2 (answer of three), 4 (one token), 4+1 (two tokens), 2
    assert stock.tokens == 6 + 4 + 5 + 2


def test_the_ceiling_counts_tokens():
    # stock: 6 + 4 + 5 + 2; needed: contexts 4 + 2, then 2 + 1 tokens of longer answers
    assert token_ceiling(PAIRS) == pytest.approx(17 / 9)
    assert token_ceiling([((1, 2, 3), (4,)), ((1, 2, 3), (5,))]) == 1


def test_a_run_is_written_with_machine_and_command(tiny, tmp_path):
    model = tiny()
    settings = ScoringSettings(batch_sizes=(2,), rounds=2, output=tmp_path)
    report = bench_scoring(model, [Requests("four", PAIRS)], settings)
    stored = json.loads((tmp_path / "scoring.json").read_text())
    (row,) = stored["tables"][0]["rows"]
    values = dict(zip(stored["tables"][0]["columns"], row, strict=True))
    assert values["requests"] == 4
    assert values["max difference"] < 1e-5
    assert 0 <= values["pairs with a sink"] <= 1
    assert stored["machine"]["chip"]
    seconds = stored["rounds"]["Batch size 2: four"]
    assert {name: len(rounds) for name, rounds in seconds.items()} == dict.fromkeys(
        ("stock", "none", "act"), 2
    )
    ratios = [a / b for a, b in zip(seconds["stock"], seconds["act"], strict=True)]
    assert values["ACT / stock"] == pytest.approx(1 / median(1 / one for one in ratios))
    assert "Scoring" in report.markdown()
    assert random_heads(model_facts(model), 0.5).head_count() == 6


def test_stock_is_lm_evals_own_where_it_can_be_imported(tiny_checkpoint, monkeypatch):
    """The stand-in has to be named as one: README once called it lm-eval's hf."""
    model = load_plain_model(str(tiny_checkpoint), dtype="float32")
    own = choose_stock("auto", model, tokenizer=str(tiny_checkpoint))
    assert own.words == LM_EVAL
    want = StockPath(model, 2).score(PAIRS)
    got = own.scores(2)(PAIRS)
    assert [g[0] for g in got] == pytest.approx([w[0] for w in want], abs=1e-5)
    assert choose_stock("auto", model, tokenizer=None).words == STAND_IN
    assert choose_stock("stand-in", model, tokenizer=str(tiny_checkpoint)).words == STAND_IN
    monkeypatch.setattr("act_harness.bench.stock.find_spec", lambda name: None)
    assert choose_stock("auto", model, tokenizer=str(tiny_checkpoint)).words == STAND_IN
    with pytest.raises(InputError, match="needs lm-eval"):
        choose_stock("hf", model, tokenizer=str(tiny_checkpoint))


@pytest.mark.slow
def test_a_table_for_each_batch_size_in_one_run(tiny, tmp_path):
    settings = ScoringSettings(batch_sizes=(1, None), rounds=1, output=tmp_path)
    bench_scoring(tiny(), [Requests("four", PAIRS)], settings)
    stored = json.loads((tmp_path / "scoring.json").read_text())
    titles = ["Batch size 1", "Ours by a budget of tokens, stock at batch size 64"]
    assert [table["title"] for table in stored["tables"]] == titles
    assert sorted(stored["rounds"]) == sorted(f"{title}: four" for title in titles)


def test_the_commit_of_a_copy_without_repository_or_with_an_older_one(monkeypatch):
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    assert common.describe_machine().commit == provenance.commit().commit
    for repository in (provenance.commit().commit, None):
        monkeypatch.setattr(provenance, "_git", lambda *_, found=repository: found)
        monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123-dirty")
        found = common.describe_machine()
        assert (found.commit, found.dirty) == ("abc123", True)
        monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
        assert common.describe_machine().dirty is False
        assert provenance.collect().commit == "abc123"


@pytest.mark.parametrize("name", ["requests.json", "requests.json.gz"])
def test_requests_travel_as_json(tmp_path, name):
    path = tmp_path / name
    write_requests([Requests("a", PAIRS)], path)
    assert read_requests(path) == [Requests("a", PAIRS)]
    path.write_text("{")
    with pytest.raises(InputError, match=r"(is not JSON|cannot read).*; write it with --export"):
        read_requests(path)


def test_stored_requests_are_measured_without_lm_eval(tmp_path):
    path = tmp_path / "requests.json.gz"
    far = [((1000 * 512 + context[0], *context[1:]), answer) for context, answer in PAIRS]
    write_requests([Requests("far", far), Requests("other", PAIRS)], path)
    given = ["--requests", str(path), "--dtype", "float32", "--device", "cpu", "--rounds", "1"]
    more = ["--only", "far", "--stock-batch-size", "3", "--token-budget", "64"]
    report = scoring.main([*given, *more, "--output", str(tmp_path)])
    stored = json.loads(report.with_suffix(".json").read_text())
    (row,) = stored["tables"][0]["rows"]
    assert row[:2] == ["far", 4]
    assert stored["tables"][0]["title"] == ("Ours by a budget of 64 tokens, stock at batch size 3")
    assert stored["remarks"][0] == f"stock: {STAND_IN}"
    with pytest.raises(InputError, match="no entry"):
        scoring.main([*given, "--only", "none", "--output", str(tmp_path)])


def test_peak_memory_of_a_large_vocabulary(tmp_path, monkeypatch):
    """All variants run, and what the head sees at a time is what the piece size allows."""
    monkeypatch.setattr(logits, "_PIECE_BYTES", 8 * 199 * 4)
    made = random_llama("tiny")
    seen = []
    made.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    monkeypatch.setattr(memory, "random_llama", lambda *args, **kwargs: made)
    path = memory.main(
        ["--device", "cpu", "--contexts", "3", "--tokens", "40", "--output", str(tmp_path)]
    )
    (table,) = json.loads(path.with_suffix(".json").read_text())["tables"]
    assert [row[0] for row in table["rows"]] == ["the model alone", "none", "ACT"]
    assert 0 < table["rows"][2][3] <= 1
    assert "stock was not run" in table["note"]
    assert max(seen) <= 14  # the probes' few tokens
    assert seen.count(8) > 2 * 3 * 4 * 16 / 8 - 8
