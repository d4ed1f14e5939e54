"""All benchmarks in one go: each part by itself, whatever becomes of the others."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from importlib import import_module

import pytest

from act_harness.attention import model_facts
from act_harness.bench import arguments, equality, everything
from act_harness.bench.common import Timing
from act_harness.bench.decode import measure as measure_decode
from act_harness.bench.everything import PART_NAMES, Part, parts_of
from act_harness.bench.models import arms
from act_harness.bench.prefill import measure as measure_prefill
from act_harness.bench.scoring import Requests, random_heads
from act_harness.bench.stock import choose_stock
from act_harness.errors import InputError

PAIRS = [((5, 6, 7, 8, 9, 10), (11, 12)), ((5, 6, 7, 8, 9, 10), (9,)), ((4, 5, 30), (3, 7, 8))]


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_loses_only_itself(tmp_path, monkeypatch):
    small = ("--shape", "tiny", "--contexts", "2", "--tokens", "8", "--name", "small")
    made = [
        Part("fails", "no_such_module", (), 60),
        Part("hangs", "memory", small, 0),
        Part("works", "memory", small, 120),
    ]
    monkeypatch.setattr(everything, "parts_of", lambda given: made)
    path = everything.main(["--device", "cpu", "--output", str(tmp_path)])
    stored = json.loads(path.read_text())
    assert {name: part["fate"] for name, part in stored.items()} == {
        "fails": "failed with exit code 1", "hangs": "stopped after 0 s", "works": "done",
    }  # fmt: skip
    assert "no_such_module" in (tmp_path / "fails.log").read_text()
    report = json.loads((tmp_path / "small.json").read_text())
    assert report["machine"]["commit"] == stored["works"]["machine"]["commit"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "everything.json", "fails.log", "hangs.log", "small.json", "small.md",
    ]  # fmt: skip


def test_parts_do_not_begin_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "parts_of", lambda given: [Part("late", "memory", (), 9)])
    path = everything.main(["--device", "cpu", "--seconds", "-1", "--output", str(tmp_path)])
    assert json.loads(path.read_text())["late"]["fate"] == "not begun"
    monkeypatch.setattr(everything, "parts_of", lambda given: [Part("later", "memory", (), 9)])
    everything.main(["--device", "cpu", "--seconds", "-1", "--output", str(tmp_path)])
    assert list(json.loads(path.read_text())) == ["late", "later"]


def given(**changed):
    values = {"model": "M", "requests": "R", "documents": "D", "parts": None, "device": "cuda",
              "rounds": 3, "limit": None}  # fmt: skip
    return Namespace(**{**values, **changed})


def test_what_is_measured_where():
    assert [part.name for part in parts_of(given())] == list(PART_NAMES)
    (scoring,) = parts_of(given(parts="scoring"))
    text = " ".join(scoring.options)
    assert "--batch-size 8,64,auto --stock-batch-size 64 --token-budget 65536" in text
    assert [part.name for part in parts_of(given(device="cpu"))] == [
        "prefill", "scoring", "search", "equality",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"part 'scorng' is unknown.*did you mean 'scoring'"):
        parts_of(given(parts="attention,scorng"))
    with pytest.raises(InputError, match="part 'search' needs --documents"):
        parts_of(given(parts="search", documents=None))
    assert [p.name for p in parts_of(given(parts="decode,attention", model=None))] == [
        "decode", "attention",
    ]  # fmt: skip


class OptionsReadError(Exception):
    """The options were read, which is all that is wanted."""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_parts_options_are_known_to_its_benchmark(device, monkeypatch):
    read = ArgumentParser.parse_args

    def parse(parser, given_options):
        raise OptionsReadError(read(parser, given_options))

    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(arguments, "check_device", lambda text: None)  # tests run without a GPU
    for part in parts_of(given(device=device)):
        module = import_module(f"act_harness.bench.{part.module}")
        with pytest.raises(OptionsReadError) as found:
            module.main([*part.options, "--device", device, "--output", "o"])
        (options,) = found.value.args
        assert str(options.output) == "o"
        assert options.device == device


@pytest.mark.parametrize("measure", [measure_prefill, measure_decode])
def test_whole_models_keep_their_rounds(tiny, measure):
    pair = arms(tiny(), share=0.5, engine="torch")
    records, timings = measure(pair, 1, 8, device="cpu", rounds=2)
    pair.attachment.detach()
    assert [record["variant"] for record in records] == ["stock", "act (torch)"]
    assert {name: len(timing.samples) for name, timing in timings.items()} == {
        "stock": 2, "act (torch)": 2,
    }  # fmt: skip
    assert records[1]["ratio"] == pytest.approx(
        Timing(
            tuple(
                a / b
                for a, b in zip(
                    timings["act (torch)"].samples, timings["stock"].samples, strict=True
                )
            )
        ).median
    )


def test_equality_by_value(tiny):
    """Equal scores differ by nothing; a stock that is off by a nat is seen, and so is a flip."""
    model = tiny()
    artifact = random_heads(model_facts(model), 0.5)
    stock = choose_stock("stand-in", model, tokenizer=None)
    row = equality.measure(
        model, Requests("r", PAIRS), stock=stock, artifact=artifact, engine="torch"
    )
    assert row[:2] == ["r", 3]
    assert all(difference < 1e-5 for difference in row[2:9])
    assert row[9:] == [0, 0]

    def off(size):
        scores = stock.scores(size)
        return lambda pairs: [
            (a + (size == 8), not b if size == 8 else b) for a, b in scores(pairs)
        ]

    row = equality.measure(
        model, Requests("r", PAIRS), stock=stock._replace(scores=off), artifact=artifact,
        engine="torch",
    )  # fmt: skip
    assert row[2:6] == pytest.approx([1.0] * 4, abs=1e-5)
    assert all(difference < 1e-5 for difference in row[6:9])
    assert row[9] == 3 * 3
