"""What counts as a regression: exact goldens and statistical gates on answers made by hand."""

from __future__ import annotations

import json

import pytest
from regress_suites import FACTS, answer, measurement, stored

from act_harness.errors import InfrastructureError, ResultError
from act_harness.regress.baseline import ArmInfo, load_baseline, save_baseline
from act_harness.regress.gates import compare_measurements, gate, spread_of
from act_harness.regress.goldens import check_comparable, drifts, golden_findings, identity_findings


def replaced(found, index, **changes):
    """The measurement with one document changed."""
    task = found.tasks["task"]
    documents = list(task.documents)
    documents[index] = documents[index].model_copy(update=changes)
    task = task.model_copy(update={"documents": tuple(documents)})
    return found.model_copy(update={"tasks": {"task": task}})


def with_answer(found, index, changed, arm="baseline"):
    arms = {**found.tasks["task"].documents[index].arms, arm: changed}
    return replaced(found, index, arms=arms)


def findings(old, new, drift=1e-4):
    return [*identity_findings(old, new), *golden_findings(old, new, drift=drift)]


@pytest.fixture
def old():
    return measurement(
        arms={"baseline": [answer(True)] * 4, "demo": [answer(True, sinks=3, moved=1.0)] * 4}
    )


def test_the_same_answers_pass(old):
    assert findings(old, old) == []
    assert {(row.drift, row.flips, row.documents) for row in drifts(old, old)} == {(0.0, 0, 4)}


@pytest.mark.parametrize(
    ("shift", "kinds"), [(0.9e-4, []), (1.1e-4, ["drift"]), (-1.1e-4, ["drift"])]
)
def test_drift_is_measured_against_the_tolerance(old, shift, kinds):
    moved = answer(True, margin=1.0 + shift)
    (found,) = [findings(old, with_answer(old, 2, moved))]
    assert [one.kind for one in found] == kinds
    for one in found:
        assert (one.task, one.arm) == ("task", "baseline")
        assert "document 2" in one.text
        assert "1 of 4" in one.text


def test_a_flip_fails_even_within_the_tolerance():
    tight = [answer(True, margin=2e-5)] * 4
    old = measurement(arms={"baseline": tight})
    new = with_answer(old, 1, answer(False, margin=2e-5))
    kinds = {one.kind: one for one in findings(old, new)}
    assert set(kinds) == {"prediction flipped", "metric changed"}
    assert "answer 0 then, 1 now" in kinds["prediction flipped"].text
    (row,) = drifts(old, new)
    assert (row.flips, row.drift <= 1e-4) == (1, True)


def test_scores_that_are_no_numbers_any_more_are_drift(old):
    lost = answer(True).model_copy(update={"scores": (0.0, None)})
    (drift,) = [one for one in findings(old, with_answer(old, 0, lost)) if one.kind == "drift"]
    assert "log-likelihood 1 was -" in str(drift)
    assert "is not finite" in str(drift)
    fewer = answer(True).model_copy(update={"scores": (0.0,)})
    assert "drift" in {one.kind for one in findings(old, with_answer(old, 0, fewer))}


def test_sinks_and_moved_attention_are_goldens_too(old):
    for changed, told in (
        (answer(True, sinks=4, moved=1.0), "3 sinks then, 4 now"),
        (answer(True, sinks=3, moved=1.001), "attention moved 1 then, 1.001 now"),
    ):
        (one,) = findings(old, with_answer(old, 3, changed, arm="demo"))
        assert (one.kind, one.arm) == ("counter changed", "demo")
        assert told in one.text
    assert findings(old, with_answer(old, 3, answer(True, sinks=3, moved=1.00001), "demo")) == []


def test_documents_near_the_threshold_are_reported_and_not_judged(old):
    near = answer(False, sinks=9, moved=2.0, near=True)
    new = with_answer(old, 0, near, arm="demo")
    assert findings(old, new) == []
    rows = {row.arm: row.near for row in drifts(old, new)}
    assert rows == {"baseline": 0, "demo": 1}


@pytest.mark.parametrize(
    ("field", "kind"),
    [("doc", "document changed"), ("prompt", "prompt changed"),
     ("requests", "request changed"), ("target", "target changed")],
)  # fmt: skip
def test_what_was_asked_is_compared(old, field, kind):
    (one,) = findings(old, replaced(old, 1, **{field: "other"}))
    assert (one.kind, one.task, one.arm) == (kind, "task", None)
    assert "document 1" in one.text


def test_a_changed_prompt_is_said_once(old):
    found = findings(old, replaced(old, 1, prompt="other", requests="other"))
    assert [one.kind for one in found] == ["prompt changed"]


def test_other_weights_versions_and_documents_are_named(old):
    facts = FACTS.model_copy(update={"weights_sha256": "f" * 64})
    (one,) = findings(old, old.model_copy(update={"model": facts}))
    assert one.kind == "model changed"
    task = old.tasks["task"].model_copy(update={"version": "2"})
    (one,) = findings(old, old.model_copy(update={"tasks": {"task": task}}))
    assert (one.kind, one.text) == ("task changed", "version 1 in the baseline, 2 now")
    (one,) = findings(old, replaced(old, 3, id=17))
    assert (one.kind, "document 17" in one.text) == ("document changed", True)


def test_a_tokenizer_is_compared_by_what_it_does(old):
    def held(then, now):
        before, after = (FACTS.model_copy(update=one) for one in (then, now))
        stored = old.model_copy(update={"model": before})
        return [one.text for one in findings(stored, old.model_copy(update={"model": after}))]

    file, other = {"tokenizer_sha256": "a" * 64}, {"tokenizer_sha256": "b" * 64}
    probe = {"tokenizer_probe_sha256": "c" * 64}
    assert held(file | probe, other | probe) == []
    (text,) = held(file | probe, file | {"tokenizer_probe_sha256": "d" * 64})
    assert text.startswith("tokenizer_probe_sha256 c")
    (text,) = held(file, other | probe)
    assert text.startswith("tokenizer_sha256 a")


def test_documents_that_are_gone_are_named(old):
    task = old.tasks["task"]
    fewer = task.model_copy(update={"documents": task.documents[:3]})
    new = old.model_copy(update={"tasks": {"task": fewer}})
    assert identity_findings(old, new, limit=3) == []
    for limit in (None, 4, 100):
        (one,) = identity_findings(old, new, limit=limit)
        assert (one.kind, one.text) == (
            "document changed",
            "3 documents are left, the baseline has 4",
        )


def test_a_changed_head_set_is_named_with_what_changed(old):
    def info(sha, beta, heads):
        return ArmInfo(sha256=sha, calibration={"beta": beta, "alpha": 5}, heads=heads)

    def arms(**named):
        return {"arms": {"baseline": ArmInfo(), **named}}

    before = old.model_copy(update=arms(demo=info("a", 0.4, {"2": [0, 3], "11": [8]})))
    after = old.model_copy(update=arms(demo=info("b", 0.41, {"2": [0], "11": [8, 9]})))
    (one,) = identity_findings(before, after)
    assert (one.kind, one.task, one.arm) == ("artifact changed", "task", "demo")
    for told in ("beta 0.4 then, 0.41 now", "without 1 heads (layer.head 2.3)", "11.9"):
        assert told in one.text
    assert "alpha" not in one.text


def test_another_suite_or_model_cannot_be_compared(old):
    baseline = stored(old).model_copy(update={"identity": {"limit": 4}})
    check_comparable(baseline, {"limit": 4}, old)
    with pytest.raises(ResultError, match="limit: 4 then, 5 now"):
        check_comparable(baseline, {"limit": 5}, old)
    facts = FACTS.model_copy(update={"num_hidden_layers": 3})
    with pytest.raises(ResultError, match="num_hidden_layers 2, this model has 3"):
        check_comparable(baseline, {}, old.model_copy(update={"model": facts}))


# -- statistics ------------------------------------------------------------------------------------


def arm(right, wrong):
    return [answer(True)] * right + [answer(False)] * wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "spread", "regressed"),
    [
        ([True] * 500, [True] * 485 + [False] * 15, 0.0, True),
        ([True] * 500, [True] * 485 + [False] * 15, 0.04, False),  # rounding alone does as much
        ([True] * 475 + [False] * 25, [False] * 40 + [True] * 460, 0.0, False),  # 40 : 25
        ([False] * 15 + [True] * 485, [True] * 500, 0.0, False),  # better is no regression
        ([True] * 24, [False] * 4 + [True] * 20, 0.0, False),  # four of 24: not significant
    ],
)
def test_the_gate(before, after, spread, regressed):
    baseline = stored(measurement(arms={"baseline": list(map(answer, before))}), spread=spread)
    new = measurement(arms={"baseline": list(map(answer, after))})
    comparison = compare_measurements(baseline, new)
    found, notes = gate(baseline, comparison)
    assert bool(found) is regressed
    for one in found:
        assert (one.kind, one.task, one.arm) == ("score regressed", "task", "baseline")
    assert bool(notes) is (spread > 0)
    row = next(row for row in comparison.rows if row.headline)
    assert (row.name, row.result.documents) == ("task@baseline", len(before))


def test_arms_are_one_family_of_tests():
    """Two tests at p just under 0.05 each: adjusted together, one alone would not hold."""
    worse = [True] * 100
    lost = [False] * 6 + [True] * 94  # exact McNemar: p = 0.031
    old = measurement(arms={"baseline": list(map(answer, worse)), "demo": list(map(answer, worse))})
    baseline = stored(old)
    one = measurement(arms={"baseline": list(map(answer, worse)), "demo": list(map(answer, lost))})
    assert gate(baseline, compare_measurements(baseline, one))[0] == []
    both = measurement(arms={"baseline": list(map(answer, lost)), "demo": list(map(answer, lost))})
    found, _ = gate(baseline, compare_measurements(baseline, both))
    assert [finding.arm for finding in found] == ["baseline", "demo"]


def test_a_part_of_the_documents_is_held_against_the_same_part():
    baseline = stored(measurement(arms={"baseline": arm(10, 10)}))
    part = measurement(arms={"baseline": arm(8, 0)})
    comparison = compare_measurements(baseline, part)
    row = next(row for row in comparison.rows if row.headline)
    assert (row.score_a, row.score_b, row.result.documents) == (1.0, 1.0, 8)
    assert compare_measurements(baseline, part, without={"task"}) is None


def test_the_spread_of_a_repetition():
    one = measurement(arms={"baseline": arm(6, 2)})
    two = measurement(arms={"baseline": arm(5, 3)})
    found = spread_of(one, two)["task"]["baseline"]
    assert found.flips == 1
    assert found.spread == {"acc,none": pytest.approx(1 / 8)}


# -- the file --------------------------------------------------------------------------------------


def test_a_baseline_is_read_back_as_it_was_written(old, tmp_path):
    baseline = stored(old, spread=0.25)
    path = save_baseline(baseline, tmp_path)
    assert load_baseline(tmp_path, suite="suite") == baseline
    text = path.read_text()
    assert json.loads(text)["about"][0].startswith("Layer 1")
    assert sum(line.startswith('{"id":') for line in text.splitlines()) == 4
    tasks = {"fråga": old.tasks["task"].model_copy(update={"name": "fråga"})}
    named = stored(old.model_copy(update={"tasks": tasks}), spread=0.25)
    save_baseline(named, tmp_path)
    assert load_baseline(tmp_path, suite="suite").measurement.tasks.keys() == {"fråga"}


def test_a_missing_or_damaged_baseline(old, tmp_path):
    with pytest.raises(InfrastructureError, match=r"no baseline at .*--update --reason"):
        load_baseline(tmp_path, suite="suite")
    path = save_baseline(stored(old), tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "extra": 1}))
    with pytest.raises(ResultError, match="extra: unknown key"):
        load_baseline(tmp_path, suite="suite")
    path.write_text("{")
    with pytest.raises(
        ResultError, match=r"baseline\.json is not JSON .*; restore it from version control"
    ):
        load_baseline(tmp_path, suite="suite")
