"""Held-out tables: every figure against scores that are read off the adapter here."""

from __future__ import annotations

import json
import runpy
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hand_sets import outcome, two_tasks
from search_runs import recipe, search
from tiny_search import documents, drawn, tiny

from act_harness.artifact import Artifact, load_artifact
from act_harness.attention import calibrated, model_facts
from act_harness.calibration import Calibration, HeadStrength
from act_harness.errors import ActHarnessError, InputError
from act_harness.evidence.stats import Part, combined_difference
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose import heldout
from act_harness.search.choose.heldout import ArmResult, best_heads, compare_arms, random_artifact
from act_harness.search.documents import write_documents
from act_harness.search.run import content_sha256


def table(model, artifact, docs):
    """(documents, choices) log-likelihoods through the adapter."""
    with calibrated(model, artifact) as attachment:
        scorer = Scorer(model, attachment)
        return np.array(
            [[s.loglikelihood for s in scorer.score([Item(*r) for r in d.requests])] for d in docs]
        )


def made(heads, **changes):
    return Artifact(
        name="mine", model=model_facts(tiny()), calibration=Calibration(alpha=2.0), heads=heads,
        **changes,
    )  # fmt: skip


@pytest.mark.slow
def test_both_columns_compare_like_with_like():
    """The corrected arm against the corrected baseline, each by its own documents' prior."""
    model, artifact = tiny(), made({0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 3)})
    tasks = {"a": documents(30, seed=9, task="a"), "b": documents(45, seed=10, task="b")}
    (arm,) = compare_arms(model, {"set": artifact}, tasks, facts=model_facts(model))
    empty = made({})
    for column in ("raw", "corrected"):
        parts = []
        for docs in tasks.values():
            both = [table(model, one, docs) for one in (empty, artifact)]
            if column == "corrected":
                both = [scores - scores.mean(axis=0) for scores in both]
            right = [document.right for document in docs]
            parts.append(Part(*((scores.argmax(axis=1) == right) * 1.0 for scores in both)))
        assert arm.columns[column] == combined_difference(parts)
    assert arm.columns["raw"].score_a != arm.columns["corrected"].score_a
    assert arm.columns["corrected"].flips.gained > 0
    stored = arm.to_json()
    assert stored["raw"]["difference"] == arm.columns["raw"].difference
    assert stored["tasks"] == {"raw": ["a", "b"], "corrected": ["a", "b"]}
    scores = table(model, artifact, tasks["b"])
    right = [document.right for document in tasks["b"]]
    prior = scores - scores.mean(axis=0)
    assert stored["by_task"]["b"] == (
        pytest.approx(np.mean(scores.argmax(axis=1) == right)),
        pytest.approx(np.mean(prior.argmax(axis=1) == right)),
    )


def test_the_table_has_the_same_tasks_in_both_columns_and_names_the_rest():
    mixed = two_tasks(("1000", "1100"), ("10", "11"))
    columns = {name: mixed.difference(name) for name in mixed.readings()}
    arm = ArmResult("set", 3, mixed, columns)
    text = heldout._markdown([arm], {"fixed": [1, 2, 3, 4], "loose": [1, 2]}, "Title")
    lines = text.splitlines()
    assert lines[0] == "# Title"
    assert "Held-out documents: fixed 4, loose 2." in lines[2]
    assert lines[3] == (
        "Tasks by column: raw: fixed; label-prior corrected: fixed; raw, choices differ by "
        "document: loose."
    )
    assert lines[5] == (
        "| heads | number | raw | label-prior corrected | raw, choices differ by document |"
    )
    assert lines[6] == "| --- | --- | --- | --- | --- |"
    assert lines[7] == "| none | 0 | 25.0 | 25.0 | 50.0 |"
    low, high = columns["raw"].interval
    assert lines[8].startswith(
        f"| set | 3 | 50.0 (+25.0; {100 * low:+.1f} to {100 * high:+.1f}) | 50.0 (+25.0; "
    )
    assert "100.0 (+50.0; " in lines[8]
    plain = outcome("10", "11")
    arm = ArmResult("set", 1, plain, {name: plain.difference(name) for name in plain.readings()})
    text = heldout._markdown([arm], {"t": [1, 2]}, "Title")
    assert "Tasks by column" not in text
    assert "| heads | number | raw | label-prior corrected |" in text


def test_random_artifacts_are_of_the_same_size_and_maps_and_other_heads():
    strong = HeadStrength(mass="reweight", gamma=2.0)
    own = made({0: (1,), 2: (0, 3)}, strengths={2: {0: strong}}, search={"x": 1})
    found = [random_artifact(own, seed=seed) for seed in range(60)]
    assert [one.name for one in found[:2]] == ["random-0", "random-1"]
    assert all(one.head_count() == 3 for one in found)
    assert all(one.search is None for one in found)
    sets = {tuple((n, h) for n, hs in sorted(one.heads.items()) for h in hs) for one in found}
    assert len(sets) > 45  # of 220
    assert {place for one in sets for place in one} == {(n, h) for n in range(3) for h in range(4)}
    for one in found:
        maps = [s for plan in one.plans().values() for s in plan.strengths]
        assert sorted(str(s.strength) for s in maps) == sorted(
            str(s.strength) for plan in own.plans().values() for s in plan.strengths
        )
    strengthened = {
        (n, h) for one in found for n, plan in one.plans().items()
        for h, s in zip(plan.heads, plan.strengths, strict=True) if s == strong
    }  # fmt: skip
    assert len(strengthened) > 9
    assert random_artifact(own, seed=5) == found[5]


def searched(rows, refit=None, strengths=()):
    given = recipe(strengths=list(strengths))
    rule = {"refit": {"rows": refit}} if refit else {}
    search = {"recipe": given.content(), "rule": rule, "table": {"heads": {"rows": rows}}}
    return made({0: (0,)}, search=search)


def test_the_best_heads_are_ordered_by_their_best_effect():
    maps = [{"mass": "damp", "beta": 0.4}, {"mass": "reweight", "gamma": 2.0}]
    rows = [
        [0, 1, 0, 0.2, 9], [0, 1, 1, 0.5, 9], [1, 2, 0, 0.4, 9], [1, 3, 0, -0.9, 9],
        [2, 0, 0, 0.4, 9], [2, 1, 0, 0.0, 9],
    ]  # fmt: skip
    own = searched(rows, strengths=maps)
    two = best_heads(own, 2)
    assert two.heads == {0: (1,), 1: (2,)}  # of equal effects the first place
    assert two.strengths == {0: {1: HeadStrength(mass="reweight", gamma=2.0)}}
    assert two.name == "mine-2"
    assert best_heads(own, 3).heads == {0: (1,), 1: (2,), 2: (0,)}
    with pytest.raises(InputError, match="has 3 heads of positive effect, not 4"):
        best_heads(own, 4)
    turned = best_heads(searched(rows[::-1], strengths=maps), 2)
    assert (turned.heads, turned.strengths) == (two.heads, two.strengths)
    first = searched([[0, 1, 0, 0.5, 9], [0, 1, 1, 0.2, 9]], strengths=maps)
    assert best_heads(first, 1).strengths is None  # the first map is the better one
    again = searched(rows, refit=[[1, 3, 0, 0.1, 9], [0, 1, 0, 0.05, 9]], strengths=maps)
    assert best_heads(again, 1).heads == {1: (3,)}
    with pytest.raises(InputError, match="no search table"):
        best_heads(made({0: (0,)}), 1)


@pytest.mark.slow
def test_the_command_writes_table_figures_and_record(
    tmp_path, tiny_checkpoint, monkeypatch, capsys
):
    model = tiny()
    monkeypatch.setattr(heldout, "load_plain_model", lambda *_, **__: model)
    monkeypatch.setattr(heldout, "model_facts", lambda *_, **__: model_facts(model))
    search(tmp_path, recipe(top={"sizes": [2]}))
    held = [
        replace(drawn(task, seed), held_out=tuple(documents(9, seed=seed + 50, task=task)))
        for task, seed in (("a", 5), ("b", 6))
    ]
    write_documents(tmp_path / "d.json", held)
    before = load_artifact(tmp_path / "out.json")
    arguments = [
        str(tmp_path / "out.json"), "--model", str(tiny_checkpoint), "--documents",
        str(tmp_path / "d.json"), "--random-sets", "3", "--sizes", "3", "--output", str(tmp_path),
        "--title", "Mine",
    ]  # fmt: skip
    path = heldout.main([*arguments, "--name", "plain"])
    assert load_artifact(tmp_path / "out.json") == before
    text = path.read_text()
    assert text.startswith("# Mine")
    assert capsys.readouterr().out.strip() == text.strip()
    stored = json.loads((tmp_path / "plain.json").read_text())
    assert [arm["name"] for arm in stored["arms"]] == [
        "out", "3 best of tiny", "random 1", "random 2", "random 3",
    ]  # fmt: skip
    assert [arm["heads"] for arm in stored["arms"]] == [before.head_count(), 3, 2, 2, 2]
    assert stored["documents"] == {"a": 9, "b": 9}
    assert stored["provenance"]["torch"]
    assert isinstance(stored["arms"][0]["raw"]["interval"], list)

    heldout.main([*arguments, "--name", "other", "--record", "--tasks", "b", "--random-size", "3"])
    other = json.loads((tmp_path / "other.json").read_text())
    assert other["documents"] == {"b": 9}
    assert [arm["heads"] for arm in other["arms"]][2:] == [3, 3, 3]
    recorded = load_artifact(tmp_path / "out.json")
    found = recorded.search["held_out"]
    assert found["documents"] == {"b": 9}
    assert found["columns"]["raw"]["difference"] == pytest.approx(
        other["arms"][0]["raw"]["difference"], abs=1e-6
    )
    assert found["columns"]["raw"]["random_sets"]["scores"] == []  # of another size: no control
    assert found["heads"] == before.head_count()
    assert recorded.heads == before.heads
    assert content_sha256(recorded) == before.search["content_sha256"]
    assert recorded.judgement()[0].startswith(found["verdict"])

    heldout.main([*arguments, "--name", "third", "--record"])
    third = load_artifact(tmp_path / "out.json").search["held_out"]
    scores = third["columns"]["raw"]["random_sets"]["scores"]
    assert scores == pytest.approx([arm["raw"]["score_b"] for arm in stored["arms"][2:]], abs=1e-6)
    with pytest.raises(InputError, match="no held-out documents of these tasks"):
        heldout.main([*arguments, "--tasks", "c"])


def test_arms_that_do_not_fit_are_found_before_anything_is_scored(monkeypatch):
    model = tiny()
    other = model_facts(model).model_copy(update={"num_hidden_layers": 9})
    monkeypatch.setattr(Scorer, "score", lambda *_: pytest.fail("scored"))
    arms = {"good": made({0: (0,)}), "bad": made({0: (0,)}).model_copy(update={"model": other})}
    with pytest.raises(ActHarnessError, match="9"):
        compare_arms(model, arms, {"a": documents(2)})


@pytest.mark.parametrize("told", [True, False])
def test_artifacts_are_checked_against_what_the_caller_knows_of_the_model(told, monkeypatch):
    """What a model alone does not say: its name. Untold, the model's own facts count."""
    model, seen = tiny(), []
    own = model_facts(model)
    facts = own.model_copy(update={"id": "its folder"}) if told else None
    real = heldout.attach

    def spy(model, artifact, *, facts):
        seen.append(facts)
        return real(model, artifact, facts=facts)

    monkeypatch.setattr(heldout, "attach", spy)
    compare_arms(model, {"set": made({0: (0,)})}, {"a": documents(2)}, facts=facts)
    assert seen == [facts or own] * 3  # the check, the untouched model, the arm


def test_no_arm_leaves_a_hook_behind(monkeypatch):
    model, docs = tiny(), documents(3)
    before = table(model, made({}), docs)
    stock = model.config._attn_implementation
    judge = heldout._Judge(model, model_facts(model), {"a": docs}, 99)
    judge.scores(made({0: (0, 1, 2, 3)}))
    assert model.config._attn_implementation == stock
    judge.scores(None)
    assert model.config._attn_implementation == stock
    assert table(model, made({}), docs) == pytest.approx(before, abs=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            judge.scores(made({0: (0,)}))
    assert model.config._attn_implementation == stock
    (row,) = judge.scores(None).values()
    assert np.array(row.scores) == pytest.approx(before, abs=1e-6)
    with pytest.raises(FrozenInstanceError):
        judge.token_budget = 1


def test_several_tasks_sizes_and_artifacts_with_nothing_to_record(
    tmp_path, tiny_checkpoint, monkeypatch
):
    """Of four tasks two are named and have held-out documents; five random sets unless told."""
    model = tiny()
    monkeypatch.setattr(heldout, "load_plain_model", lambda *_, **__: model)
    monkeypatch.setattr(heldout, "model_facts", lambda *_, **__: model_facts(model))
    held = [
        replace(drawn(task, 5), held_out=tuple(documents(count, seed=count, task=task)))
        for task, count in (("a", 3), ("b", 4), ("c", 5), ("d", 0))
    ]
    write_documents(tmp_path / "d.json", held)
    rows = [[0, 1, 0, 0.2, 9], [1, 2, 0, 0.4, 9], [2, 0, 0, 0.3, 9]]
    given = {
        "first": searched(rows),
        "unsearched": made({0: (0,)}),
        "empty": searched(rows).model_copy(update={"heads": {}}),
        "last": searched(rows).model_copy(update={"heads": {1: (0, 1)}}),
    }
    paths = [str(given[name].save(tmp_path / f"{name}.json")) for name in given]
    before = [load_artifact(path) for path in paths]
    heldout.main([
        *paths, "--model", str(tiny_checkpoint), "--documents", str(tmp_path / "d.json"),
        "--tasks", "a,c,d", "--sizes", "1,3", "--output", str(tmp_path / "new"), "--record",
    ])  # fmt: skip
    stored = json.loads((tmp_path / "new" / "heldout.json").read_text())
    assert stored["documents"] == {"a": 3, "c": 5}
    assert [(arm["name"], arm["heads"]) for arm in stored["arms"]] == [
        ("first", 1), ("unsearched", 1), ("empty", 0), ("last", 2),
        ("1 best of mine", 1), ("3 best of mine", 3),
        *((f"random {n}", 1) for n in range(1, 6)),
    ]  # fmt: skip
    after = [load_artifact(path) for path in paths]
    assert after[1:3] == before[1:3]
    for artifact in (after[0], after[3]):
        assert artifact.search["held_out"]["documents"] == {"a": 3, "c": 5}
    controls = [a.search["held_out"]["columns"]["raw"]["random_sets"] for a in after[::3]]
    assert [len(found["scores"]) for found in controls] == [5, 0]


@pytest.mark.parametrize("missing", ["--model", "--documents"])
def test_model_and_documents_must_be_named(missing, capsys):
    given = {"--model": "m", "--documents": "d"}
    del given[missing]
    with pytest.raises(SystemExit) as end:
        heldout.main(["x.json", *(text for pair in given.items() for text in pair)])
    assert end.value.code == 2
    assert f"required: {missing}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "load_plain_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "taken").write_text("a file")
    arguments = ["x.json", "--model", "m", "--documents", "d", "--output", str(tmp_path / "taken")]
    with pytest.raises(ActHarnessError, match="taken"):
        heldout.main(arguments)


def test_the_module_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["heldout", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(heldout.__file__, run_name="__main__")
    assert end.value.code == 0
    assert "--random-sets" in capsys.readouterr().out
