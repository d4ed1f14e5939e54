"""Metrics of a whole corpus: lm-eval's numbers, a bootstrap, and never exit 0 without a word."""

import json
import math

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from act_harness.evidence.compare import compare
from act_harness.evidence.corpus import (
    CorpusPart,
    corpus_difference,
    corpus_part,
    f1,
    macro_f1,
    matthews,
)
from act_harness.evidence.plots import comparison_files

STAMP = "2026-01-01T00-00-00"


def table(right, predicted, size):
    counts = np.zeros((size, size))
    np.add.at(counts, (right, predicted), 1)
    return counts


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40),
    two=st.booleans(),
)
def test_scores_are_those_of_the_harness(pairs, two):
    import warnings

    from lm_eval.api import metrics
    from sklearn.metrics import f1_score

    size = 2 if two else 4
    pairs = [(right % size, predicted % size) for right, predicted in pairs]
    counts = table(*np.asarray(pairs).T, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right, predicted = zip(*pairs, strict=True)
        assert matthews(counts) == pytest.approx(metrics.matthews_corrcoef(pairs), abs=1e-12)
        if two:
            assert f1(counts) == pytest.approx(metrics.f1_score(pairs), abs=1e-12)
        expected = f1_score(right, predicted, average="macro", labels=range(size))
        assert macro_f1(counts) == pytest.approx(expected, abs=1e-12)


def test_the_p_value_is_that_of_all_exchanges():
    """Six documents: every one of the 64 ways to exchange the arms, counted by hand."""
    right, a, b = np.array([0, 0, 0, 1, 1, 1]), [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0]
    arms = np.array([a, b])

    def difference(turned):
        one = np.where(turned, arms[1], arms[0])
        two = np.where(turned, arms[0], arms[1])
        return float(matthews(table(right, two, 2)) - matthews(table(right, one, 2)))

    observed = difference(np.zeros(6, dtype=bool))
    ways = [difference((number >> np.arange(6)) & 1 == 1) for number in range(64)]
    exact = np.mean([abs(way) >= abs(observed) - 1e-9 for way in ways])
    part = CorpusPart(right.tolist(), a, b, (0.0, 1.0), matthews)
    found = corpus_difference(part, resamples=20_000)
    assert found.difference == pytest.approx(observed)
    assert found.p_value == pytest.approx(exact, abs=0.015)
    assert (found.documents, found.clusters, found.units, found.flips) == (6, None, 6, None)


def test_the_standard_error_is_that_of_repeated_corpora():
    rng = np.random.default_rng(7)

    def corpus():
        right = rng.integers(0, 2, 200)
        a = np.where(rng.random(200) < 0.9, right, 1 - right)
        b = np.where(rng.random(200) < 0.7, right, 1 - right)
        return CorpusPart(right.tolist(), a.tolist(), b.tolist(), (0.0, 1.0), matthews)

    found = [corpus_difference(corpus(), resamples=400) for _ in range(150)]
    spread = np.std([one.difference for one in found], ddof=1)
    assert np.median([one.stderr for one in found]) == pytest.approx(spread, rel=0.15)
    held = np.mean([one.interval.low <= -0.4 <= one.interval.high for one in found])
    assert held > 0.88


def test_documents_that_belong_together_are_drawn_together():
    right, a = [0, 1] * 20, [0, 1] * 20
    b = [0, 1] * 10 + [1, 0] * 10
    ids = [number // 10 for number in range(40)]
    alone = corpus_difference(CorpusPart(right, a, b, (0.0, 1.0), matthews))
    grouped = corpus_difference(CorpusPart(right, a, b, (0.0, 1.0), matthews, ids))
    assert grouped.clusters == 4
    assert grouped.stderr > 2 * alone.stderr
    assert grouped.p_value > 0.05 > alone.p_value


def test_the_metric_is_read_off_the_reported_score():
    pairs = [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0), (2.0, 0.0)]
    expected = float(macro_f1(table(*np.asarray(pairs, dtype=int).T, 3)))
    found = corpus_part("f1", pairs, pairs, reported=(expected, expected))
    assert found is not None
    assert found.score is macro_f1
    assert corpus_part("f1", pairs, pairs, reported=(0.123, 0.123)) is None
    assert corpus_part("bleu", pairs, pairs, reported=(None, None)) is None
    assert corpus_part("mcc", pairs, pairs, reported=(None, None)).score is matthews
    other = [(1.0, 0.0), *pairs[1:]]
    assert corpus_part("mcc", pairs, other, reported=(None, None)) is None, "other right answers"


# -- comparing runs --------------------------------------------------------------------------------


def write(folder, metric, score, values, **more):
    folder.mkdir()
    results = {
        "results": {"t": {"alias": "t", f"{metric},none": score, "sample_len": len(values)}},
        "configs": {"t": {}}, "higher_is_better": {"t": {metric: True}}, "config": {},
    }  # fmt: skip
    rows = [
        {"doc_id": i, "doc_hash": str(i), "prompt_hash": str(i), "target_hash": "x",
         "filter": "none", "metrics": [metric], metric: value, "doc": {}, "target": str(i % 2),
         "arguments": {}, "resps": [], "filtered_resps": [], **{k: v[i] for k, v in more.items()}}
        for i, value in enumerate(values)
    ]  # fmt: skip
    (folder / f"results_{STAMP}.json").write_text(json.dumps(results))
    (folder / f"samples_t_{STAMP}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.parametrize("metric", ["mcc", "f1"])
def test_a_collapse_of_a_corpus_metric_is_seen(tmp_path, metric):
    right = [i % 2 for i in range(40)]
    good = [[r, r if i % 10 else 1 - r] for i, r in enumerate(right)]
    bad = [[r, 0] for r in right]
    score = {"mcc": matthews, "f1": f1}[metric]
    said = [float(score(table(*np.asarray(values).T, 2))) for values in (good, bad)]
    a = write(tmp_path / "a", metric, said[0], good)
    b = write(tmp_path / "b", metric, said[1], bad)
    (row,) = compare(a, b).rows
    assert (row.score_a, row.score_b) == pytest.approx(said)
    assert row.result.interval.high < 0
    assert row.verdict == "regressed"
    assert compare(a, b).exit_code == 1
    assert compare(b, a).rows[0].verdict == "improved"
    same = compare(a, a)
    assert (same.rows[0].verdict, same.rows[0].result.p_value) == ("inconclusive", 1.0)
    assert same.exit_code == 0


@pytest.mark.parametrize("where", ["a", "ab"])
def test_documents_that_were_not_scored_are_in_no_corpus_metric(tmp_path, where):
    """Skipped documents of one arm made a difference between equal answers."""
    right = [i % 2 for i in range(40)]
    folders = []
    for arm in "ab":
        skipped = [i >= 30 and arm in where for i in range(40)]
        # of answers that are all minus infinity the first one wins
        values = [[r, 0 if gone else r] for r, gone in zip(right, skipped, strict=True)]
        marks = [{"arg_2": {"overlength": "skipped"}} if gone else {} for gone in skipped]
        arguments = [{"gen_args_0": {"arg_0": f"q{i}", **one}} for i, one in enumerate(marks)]
        said = float(matthews(table(*np.asarray(values).T, 2)))
        responses = [[["-1.0", "False"]]] * 40
        folders.append(
            write(
                tmp_path / arm, "mcc", said, values,
                arguments=arguments, filtered_resps=responses,
            )
        )  # fmt: skip
    row = compare(*folders).rows[0]
    assert (row.score_a, row.score_b, row.result.difference) == (1.0, 1.0, 0.0)
    assert row.result.documents == 30
    assert row.note == "10 documents with an answer too long to be scored left out"


def test_a_score_that_does_not_follow_from_the_samples_is_no_verdict(tmp_path):
    """The reported numbers of this case are not those of its samples."""
    a = write(tmp_path / "a", "mcc", 0.9, [[i % 2, i % 2] for i in range(40)])
    b = write(tmp_path / "b", "mcc", 0.1, [[i % 2, 0] for i in range(40)])
    found = compare(a, b)
    assert found.rows[0].note == "its score is not the mean over documents; not tested"
    assert found.exit_code == 3
    assert "no verdict, nothing could be tested" in found.summary()
    assert found.to_json()["not_tested"] == ["t mcc"]
    files = comparison_files(found, tmp_path / "out")
    assert sorted(files) == ["comparison.json", "comparison.md"]
    assert "nothing could be tested" in files["comparison.md"].read_text()


def test_brier_is_recomputed_from_the_choices(tmp_path):
    rng = np.random.default_rng(1)

    def run(name, noise, skipped=0):
        scores = np.where(np.eye(2)[np.arange(40) % 2] > 0, -1.0, -2.0)
        scores += noise * rng.normal(size=scores.shape)
        chances = scipy.special.softmax(scores, axis=1)
        brier = ((chances - np.eye(2)[np.arange(40) % 2]) ** 2).sum(axis=1).mean()
        responses = [[[str(value), "False"] for value in row] for row in scores.tolist()]
        arguments = [
            {f"gen_args_{n}": {"arg_0": f"q{i}", "arg_1": text} for n, text in enumerate("ab")}
            for i in range(40)
        ]
        if skipped:  # lm-eval's own score is no number then
            brier, responses[:skipped] = math.nan, [[["-inf", "False"]] * 2] * skipped
            for one in arguments[:skipped]:
                one["gen_args_0"]["arg_2"] = {"overlength": "skipped"}
        # As lm-eval writes an array: a text.
        values = [f"[{i % 2} {row}]" for i, row in enumerate(chances)]
        return write(
            tmp_path / name, "brier_score", brier, values,
            filtered_resps=responses, arguments=arguments,
        )  # fmt: skip

    row = compare(run("a", 0.1), run("b", 4.0)).rows[0]
    assert row.metric == "brier_score"
    assert row.result.documents == 40
    assert row.result.difference > 0.2
    assert row.result.p_value < 0.01
    fewer = compare(tmp_path / "a", run("c", 4.0, skipped=5)).rows[0]
    assert fewer.result.documents == 35
    assert fewer.note == "5 documents with an answer too long to be scored left out"


def test_what_could_not_be_tested_is_said_beside_what_could(tmp_path):
    folders = []
    for name in ("a", "b"):
        folder = write(tmp_path / name, "acc", 0.5, [float(i % 2) for i in range(10)])
        path = folder / f"results_{STAMP}.json"
        content = json.loads(path.read_text())
        content["results"]["t"]["bleu,none"] = 12.5
        path.write_text(json.dumps(content))
        folders.append(folder)
    found = compare(*folders)
    assert found.exit_code == 0
    assert found.summary().endswith("1 metric not tested (t bleu).")


def test_one_document_is_a_result_without_a_verdict(tmp_path):
    a = write(tmp_path / "a", "acc", 1.0, [1.0])
    b = write(tmp_path / "b", "acc", 0.0, [0.0])
    found = compare(a, b)
    assert not math.isfinite(found.rows[0].result.stderr)
    assert found.exit_code == 3
    assert "nothing could be tested" in found.to_terminal(width=120)
    assert "forest.png" not in comparison_files(found, tmp_path / "out")
