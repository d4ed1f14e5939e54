"""Head sets on a split: their scores through the adapter, and what the ledger knows them by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hand_sets import A, B, documents, outcome, recipe, rows, two_tasks
from tiny_search import documents as drawn_documents
from tiny_search import tiny

from act_harness.artifact import Artifact
from act_harness.attention import calibrated, model_facts
from act_harness.bench.null_search import _Memory
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose.sets import ModelSets, SetMeasurement
from act_harness.support.processes import Processes


def through_the_adapter(model, docs, heads, given, strengths=None):
    artifact = Artifact(
        name="own", model=model_facts(model), calibration=given.calibration, heads=heads,
        strengths=strengths,
    )  # fmt: skip
    with calibrated(model, artifact) as attachment:
        scorer = Scorer(model, attachment)
        return [[s.loglikelihood for s in scorer.score([Item(*r) for r in d.requests])]
                for d in docs]  # fmt: skip


def test_sets_are_scored_as_the_adapter_scores_them_and_leave_no_trace():
    model, docs = tiny(), drawn_documents(5, seed=3)
    maps = [{"mass": "damp", "beta": 0.4}, {"mass": "reweight", "gamma": 2.0}]
    given = recipe(calibration={"alpha": 2.0}, strengths=maps)
    score = ModelSets(model, model_facts(model), given)
    places = ((0, 0, 0), (0, 1, 1), (1, 2, 1), (2, 3, 0))
    own = {0: {1: given.strengths[1]}, 1: {2: given.strengths[1]}}
    heads = {0: (0, 1), 1: (2,), 2: (3,)}
    untouched = score((), docs)
    expected = through_the_adapter(model, docs, {}, given)
    found = score(places, docs)
    calibrated_scores = through_the_adapter(model, docs, heads, given, own)
    for one, other in ((untouched, expected), (found, calibrated_scores)):
        assert [len(row) for row in one] == [3] * 5
        assert np.array(one) == pytest.approx(np.array(other), abs=2e-6)
    assert np.abs(np.array(found) - untouched).max() > 1e-3
    # Rounded for the ledger, where the last digits would only say how documents were batched.
    flat = [value for row in found for value in row]
    assert flat == [round(value, 6) for value in flat]
    assert flat != [round(value, 5) for value in flat]
    assert score((), docs) == untouched
    again = SetMeasurement(score, given, {"t": docs}, _Memory(), Processes())
    assert again.baseline().accuracy == pytest.approx(
        np.mean([np.argmax(row) == d.right for row, d in zip(expected, docs, strict=True)])
    )


def test_no_hook_stays_behind_where_scoring_fails(monkeypatch):
    model, docs = tiny(), drawn_documents(2)
    given = recipe(calibration={"alpha": 2.0})
    score = ModelSets(model, model_facts(model), given)
    before = model.config._attn_implementation

    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            score((A,), docs)
    assert model.config._attn_implementation == before
    assert np.array(score((), docs)) == pytest.approx(
        np.array(through_the_adapter(model, docs, {}, given)), abs=2e-6
    )


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("loose", {"accuracy": "raw", "objective": "raw"}),
        ("fixed", {"accuracy": "raw", "objective": "corrected"}),
        ("both", {}),  # no column is of all tasks
    ],
)
def test_the_column_that_holds_what_sets_are_chosen_by(kind, columns):
    both = kind == "both"
    found = (
        two_tasks(("10", "11"), ("10", "11"))
        if both
        else outcome("10", "11", loose=kind == "loose")
    )
    for reading in ("accuracy", "objective", "margin", "raw", "corrected"):
        column = found.column_of(reading)
        assert column == columns.get(reading, reading)
        if column != reading:
            assert found.score(column) == found.score(reading)


def test_figures_for_the_artifact_have_six_decimals():
    """Two of seven right; corrected too, the mean margin being -3/7."""
    found = outcome("0000001", "0000011")
    assert found.to_json()["accuracy"] == 0.285714
    assert found.to_json()["corrected_accuracy"] == 0.285714
    assert found.by_task()["t"]["accuracy"] == 0.285714
    assert found.by_task()["t"]["corrected_accuracy"] == 0.285714
    assert found.by_task()["t"]["margin_change"] == 0.285714
    with pytest.raises(FrozenInstanceError):
        found.spreads = {}


def prefix(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("split", ["verify", "judge"])
def test_ledgers_of_earlier_searches_are_read_again(split):
    """The keys are part of the ledger's format: others would measure every set anew."""
    docs = documents(2)
    ledger = _Memory()
    measured = SetMeasurement(
        lambda places, _: rows("10"), recipe(), {"t": docs}, ledger, Processes(), split
    )
    measured.outcomes([[B, A]])
    names = [prefix(text) for text in ("[]", "[[0,0,0],[0,1,0]]")]
    digest = prefix(json.dumps([[d.key, d.requests, d.right] for d in docs]))
    if split == "verify":
        assert list(ledger) == [("set", name, "t") for name in names]
    else:
        assert list(ledger) == [("judge set", name, "t", digest) for name in names]


def test_progress_counts_documents_and_processes_meet_after_new_scores_only(monkeypatch):
    read = []
    monkeypatch.setattr(Processes, "read_together", lambda self, ledger: read.append(len(ledger)))
    counted = []
    tasks = {"one": documents(2, task="one"), "two": documents(3, task="two")}
    measured = SetMeasurement(
        lambda places, given: rows("1" * len(given)), recipe(), tasks, _Memory(), Processes(),
        progress=counted.append,
    )  # fmt: skip
    measured.outcomes([[A]])
    assert counted == [2, 3, 2, 3]  # the untouched model, then the set
    assert read == [4]
    measured.outcomes([[A]])
    assert (counted, read) == ([2, 3, 2, 3], [4])
