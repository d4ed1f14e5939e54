"""A whole search on a tiny model: artifact, rules, ledger, kills, screening."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from search_runs import DRAWN, recipe, search
from tiny_search import drawn, tiny

from act_harness.artifact import ModelFacts, load_artifact
from act_harness.attention import attach, model_facts
from act_harness.errors import (
    InfrastructureError,
    InputError,
    RecipeError,
    ResultError,
    UnsupportedModelError,
)
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.choose import sets as choose_sets
from act_harness.search.compute import measure
from act_harness.search.compute.exact import ChunkPass
from act_harness.search.ledger import SearchLedger
from act_harness.search.recipe import load_recipe
from act_harness.search.run import ledger_folder, run_search, stable_content
from act_harness.support import atomic, places, sealed
from act_harness.support.atomic import canonical_json


def test_a_search_in_which_nothing_was_calibrated_says_so(tmp_path):
    """All effects were 0, and the summary called that "no head set improved"."""
    said = "no head changed any score: none saw a sink"
    assert said not in search(tmp_path / "usual").summary()
    deaf = recipe(calibration={"alpha": 1000.0})
    assert said in search(tmp_path / "deaf", deaf).summary()


@pytest.mark.parametrize("stored", [False, True])
def test_calibrated_scores_that_are_no_numbers_end_the_search(tmp_path, monkeypatch, stored):
    """A not-a-number change of one document became a mean, and the order of the heads."""
    layer = ChunkPass.layer

    def broken(self, number, heads):
        change, counts = layer(self, number, heads)
        if number == 1:
            change[0, 2, 3, 0] = math.nan
        return change, counts

    monkeypatch.setattr(ChunkPass, "layer", broken)
    if stored:  # by a version that did not look
        monkeypatch.setattr(measure, "_refuse_not_finite", lambda *_: None)
    words = r"document 0000000\d\d of a has scores that are not finite where head 1\.2 is calib"
    with pytest.raises(InfrastructureError, match=words):
        search(tmp_path)
    assert not (tmp_path / "out.json").exists()
    kept = "".join(file.read_text() for file in tmp_path.rglob("*.jsonl"))
    assert ("NaN" in kept) == stored


def test_the_artifact_holds_table_controls_and_provenance(tmp_path):
    result = search(tmp_path)
    artifact = load_artifact(tmp_path / "out.json")
    found = artifact.search
    assert artifact.head_count() == len(result.selection.places) > 0
    assert len(found["table"]["heads"]["rows"]) == 12
    assert len(found["table"]["by_task"]["rows"]) == 24
    assert len(found["judgement"]["columns"]["raw"]["random_sets"]["scores"]) == 2
    splits = ("search", "verify", "judge")
    assert [found["splits"]["a"][split] for split in splits] == [
        {"n": 8, "sha256": DRAWN[0].digest(split)} for split in splits
    ]
    assert len({DRAWN[0].digest(split) for split in splits}) == 3
    assert artifact.provenance["torch"] is not None
    assert found["judgement"]["verdict"] in result.summary()
    assert artifact.judgement()[0].startswith(found["judgement"]["verdict"])
    best = max(found["table"]["heads"]["rows"], key=lambda row: row[3])
    assert found["rule"]["order"][0] == best[:3]


def test_a_second_run_measures_nothing_and_gives_the_same(tmp_path):
    first, second = search(tmp_path), search(tmp_path)
    assert canonical_json(stable_content(first.artifact)) == canonical_json(
        stable_content(second.artifact)
    )
    assert first.work.forwards > 0
    assert second.work.forwards == 0
    assert first.artifact.search["content_sha256"] == second.artifact.search["content_sha256"]


def test_a_ledger_does_not_ask_who_read_the_tokenizers_file(tmp_path):
    """Documents are compared by their tokens; another transformers release continues a search."""
    facts = ModelFacts(
        id="m", architecture="A", num_hidden_layers=1, num_attention_heads=1,
        weights_sha256="w", tokenizer_sha256="a",
    )  # fmt: skip

    def folder(**changes):
        other = facts.model_copy(update=changes)
        return ledger_folder(tmp_path, recipe(), other, DRAWN, "cpu")[0]

    assert folder(tokenizer_sha256="b", id="n", tokenizer_probe_sha256="c") == folder()
    assert folder(weights_sha256="v") != folder()
    assert folder(dtype="bfloat16") != folder()
    kernels = ledger_folder(tmp_path, recipe(), facts, DRAWN, "cpu", column_sums="triton")[0]
    assert kernels != folder(), "they round otherwise than plain torch"


def test_a_model_that_cannot_be_calibrated_is_found_before_a_head_is_measured(
    tmp_path, monkeypatch
):
    def refuse(*arguments, **more):
        raise UnsupportedModelError("no interface")

    monkeypatch.setattr(choose_sets, "attach", refuse)
    with pytest.raises(UnsupportedModelError, match="no interface"):
        search(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rule", ["paper", "significant", "joint"])
def test_rules_select_by_their_own_measure(tmp_path, rule):
    result = search(tmp_path, recipe(rule=rule, significant={"q": 0.5}))
    rows = {tuple(row[:2]): row for row in result.artifact.search["table"]["heads"]["rows"]}
    chosen = {place[:2] for place in result.selection.places}
    if rule == "paper":
        base = result.selection.trace["baseline_accuracy"]
        assert chosen == {place for place, row in rows.items() if row[6] > base + 1e-6}
    elif rule == "significant":
        assert all(rows[place][5] <= 0.5 for place in chosen)
    else:
        left = []
        for step in result.selection.trace["steps"]:
            if "add" in step and step["kept"]:
                left.append(tuple(step["add"]))
            elif "drop" in step and not step["kept"]:
                left.remove(tuple(step["drop"]))
        assert result.selection.places == tuple(left) != ()


@pytest.mark.slow
def test_screened_measures_a_share_and_says_how_well_it_agrees(tmp_path):
    whole = search(tmp_path, recipe(keep=1.0, method="screened"))
    part = search(tmp_path, recipe(keep=0.25, method="screened"))
    exhaustive = search(tmp_path)
    assert len(part.effects) == 3
    assert len(whole.effects) == len(exhaustive.effects) == 12
    for one, other in zip(whole.effects, exhaustive.effects, strict=True):
        assert one.effect == pytest.approx(other.effect, abs=1e-4)
    assert part.artifact.search["screen"]["rank_correlation_on_kept"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["margin", "corrected"])
def test_the_estimate_is_the_derivative(tmp_path, objective):
    """With beta near 1 calibration is a small step, where first order is exact."""
    small = recipe(
        method="screened", keep=1.0, objective=objective, calibration={"alpha": 2.0, "beta": 0.999}
    )
    result = search(tmp_path, small)
    estimates = {tuple(r[:3]): r[3] for r in result.artifact.search["screen"]["rows"]}
    largest = max(abs(e.effect) for e in result.effects)
    assert largest > 1e-5
    for effect in result.effects:
        assert estimates[effect.place] == pytest.approx(effect.effect, abs=0.05 * largest + 2e-6)


@pytest.mark.slow
def test_strengths_are_searched_per_head_and_stored(tmp_path):
    maps = [{"mass": "damp", "beta": 0.4}, {"mass": "reweight", "gamma": 2.0}]
    result = search(tmp_path, recipe(strengths=maps, top={"sizes": [12]}))
    assert len(result.effects) == 24
    artifact = load_artifact(tmp_path / "out.json")
    amplified = {p[:2] for p in result.selection.places if p[2] == 1}
    stored = {(layer, h) for layer, own in (artifact.strengths or {}).items() for h in own}
    assert stored == amplified


@pytest.mark.slow
def test_a_changed_recipe_has_a_ledger_of_its_own(tmp_path):
    search(tmp_path)
    changes = (
        {"seed": 2},
        {"calibration": {"alpha": 3.0}},
        {"chunk_tokens": 60},
        {"layers": (0, 1)},
        {"method": "screened"},
        {"method": "screened", "keep": 0.5},
        {"method": "screened", "objective": "corrected"},
    )
    for number, change in enumerate(changes, start=2):
        search(tmp_path, recipe(**change))
        assert len(list((tmp_path / "ledgers").iterdir())) == number


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"rule": "paper"},
        {"rule": "significant", "significant": {"q": 0.99}},
        {"objective": "corrected"},
        {"top": {"sizes": [3]}, "controls": {"random_sets": 1}},
        {"judge_samples": 2},
    ],
)
def test_another_selection_measures_no_head_again(tmp_path, change):
    """And gives the artifact that a search of its own gives."""
    search(tmp_path / "both")
    second = search(tmp_path / "both", recipe(**change))
    assert len(list((tmp_path / "both" / "ledgers").iterdir())) == 1
    assert second.artifact.search["run"]["units_from_ledger"] > 0
    assert second.work.pairs == 0
    alone = search(tmp_path / "alone", recipe(**change))
    assert alone.work.pairs > 0
    assert stable_content(second.artifact) == stable_content(alone.artifact)


@pytest.mark.slow
def test_refit_orders_the_heads_by_the_documents_of_both_splits(tmp_path):
    top = {"sizes": [1, 2, 4], "refit": True}
    plain = search(tmp_path / "plain")
    result = search(tmp_path / "refit", recipe(top=top))
    found, before = result.artifact.search, plain.artifact.search
    assert found["table"] == before["table"]
    refit = found["rule"]["refit"]
    assert refit["before"] == before["rule"]["order"]
    assert refit["documents"] == 32
    # the oracle: a search whose search split holds the documents of both
    both = [
        dataclasses.replace(one, search=(*one.search, *one.verify), verify=one.verify)
        for one in DRAWN
    ]
    oracle = run_search(
        recipe(samples=16),
        model=tiny(),
        documents=both,
        ledgers=tmp_path / "oracle",
        show_progress=False,
    )
    effects = {e.place: e for e in oracle.effects}
    assert len(refit["rows"]) == len(effects) == 12
    for layer, head, strength, effect, stderr in refit["rows"]:
        one = effects[layer, head, strength]
        assert (effect, stderr) == pytest.approx((one.effect, one.stderr), abs=2e-5)
    order = sorted(effects.values(), key=lambda e: -e.effect)
    count = len(plain.selection.places)
    assert 0 < count < 12
    assert result.selection.places == tuple(e.place for e in order[:count])
    assert refit["kept"] == len(set(result.selection.places) & set(plain.selection.places))
    assert any("ordered anew" in note for note in found["notes"])


@pytest.mark.parametrize("refit", [False, True])
def test_the_judgement_is_of_the_artifacts_heads_on_the_judge_documents(tmp_path, refit):
    """Scored anew through the adapter; neither verify's figures nor the set before the refit."""
    found = search(tmp_path, recipe(top={"sizes": [1, 2, 4], "refit": refit})).artifact
    right = {}
    for arm, artifact in (("untouched", None), ("selected", found)):
        model = tiny()
        attachment = attach(model, artifact, facts=model_facts(model))
        scorer = Scorer(model, attachment)
        for task in DRAWN:
            for document in task.judge:
                scores = scorer.score([Item(*request) for request in document.requests])
                best = max(range(len(scores)), key=lambda n: scores[n].loglikelihood)
                right.setdefault(arm, []).append(float(best == document.right))
    raw = found.search["judgement"]["columns"]["raw"]
    for arm, values in right.items():
        assert raw[arm] == pytest.approx(sum(values) / 16, abs=1e-6)
    moved = np.subtract(right["selected"], right["untouched"])
    assert raw["difference"] == pytest.approx(moved.mean(), abs=1e-6)
    assert found.search["judgement"]["heads"] == found.head_count()


@pytest.mark.slow
def test_judging_other_documents_measures_no_head_again(tmp_path):
    first = search(tmp_path)
    others = [dataclasses.replace(one, judge=one.judge[:5]) for one in DRAWN]
    second = search(tmp_path, documents=others)
    assert second.work.pairs == 0
    assert second.selection == first.selection
    assert second.artifact.search["judgement"]["documents"] == {"a": 5, "b": 5}
    again = search(tmp_path)
    assert stable_content(again.artifact) == stable_content(first.artifact)


@pytest.mark.slow
def test_a_search_without_judge_documents_says_that_nothing_was_judged(tmp_path):
    """Prepared before there was such a split: the documents that chose never judge instead."""
    others = [DRAWN[0], dataclasses.replace(DRAWN[1], judge=())]
    part = search(tmp_path, documents=others).artifact.search
    assert part["judgement"]["columns"]["raw"]["tasks"] == ["a"]
    assert any("not judged on b: no documents were left" in note for note in part["notes"])
    none = [dataclasses.replace(one, judge=()) for one in DRAWN]
    result = search(tmp_path, documents=none)
    judged = result.artifact.search["judgement"]
    assert (judged["verdict"], judged["columns"]) == ("not judged", {})
    assert "not judged: no documents were left" in result.summary()
    assert result.artifact.head_count() > 0


@pytest.mark.slow
def test_refit_needs_only_what_the_ledger_lacks(tmp_path):
    plain = search(tmp_path)
    result = search(tmp_path, recipe(top={"sizes": [1, 2, 4], "refit": True}))
    assert len(list((tmp_path / "ledgers").iterdir())) == 1
    assert result.work.pairs == plain.work.pairs  # the verify split's, as many as the search's
    again = search(tmp_path, recipe(top={"sizes": [1, 2, 4], "refit": True}))
    assert again.work.forwards == 0
    assert stable_content(again.artifact) == stable_content(result.artifact)


@pytest.mark.slow
@pytest.mark.parametrize("refit", [False, True])
def test_a_cut_ledger_is_continued_to_the_same_artifact(tmp_path, refit):
    given = recipe(top={"sizes": [1, 2, 4], "refit": refit})
    first = search(tmp_path, given)
    (part,) = (tmp_path / "ledgers").glob("*/part-*.jsonl")
    whole = part.read_bytes()
    for share in (0.0, 0.13, 0.5, 0.77, 0.999):
        part.write_bytes(whole[: int(share * len(whole))])
        again = search(tmp_path, given)
        assert stable_content(again.artifact) == stable_content(first.artifact)
        assert again.artifact.search["run"]["units_from_ledger"] < len(whole.splitlines())


@pytest.mark.slow
def test_a_damaged_ledger_line_is_named(tmp_path):
    search(tmp_path)
    (part,) = (tmp_path / "ledgers").glob("*/part-*.jsonl")
    lines = part.read_text().splitlines()
    lines[1] = lines[1][:20]
    part.write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultError, match="line 2"):
        search(tmp_path)


def test_a_changed_unit_of_a_ledger_is_refused_and_one_without_a_seal_is_read(tmp_path):
    def opened():
        return SearchLedger.opened(tmp_path, identity={})

    with opened() as ledger:
        ledger.add(("a", 1), {"loss": 0.5, "rows": [[1.0, 2.0]]})
        ledger.add(("a", 2), {"loss": 0.25})
    whole = ledger.path.read_text()
    for change in (("0.5", "0.6"), ('"loss"', '"lose"'), ("[[1.0, 2.0]]", "[[1.0]]")):
        ledger.path.write_text(whole.replace(*change, 1))
        with (
            pytest.raises(ResultError, match=r"line 1 is not as it was .*; delete the folder"),
            opened(),
        ):
            pass
    lines = [json.loads(line) for line in whole.splitlines()]
    for line in lines:
        del line["sha256"]
    ledger.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with opened() as ledger:
        assert ledger.get(("a", 2)) == {"loss": 0.25}


def test_what_a_ledger_has_read_is_not_read_again(tmp_path, monkeypatch):
    seals = []
    honest = sealed.unsealed
    monkeypatch.setattr(
        sealed, "unsealed", lambda line, **given: seals.append(line["key"]) or honest(line, **given)
    )
    ours, theirs = (SearchLedger(tmp_path, identity={}, rank=rank) for rank in range(2))
    for number in range(3):
        ours.add(("ours", number), {"loss": 0.5})
        theirs.add(("theirs", number), {"loss": 0.25})
        with theirs.path.open("a") as stream:
            stream.write('{"key": [')  # a process that was killed here; the next line cuts it off
        ours.reload()
        assert {("ours", number), ("theirs", number)} <= ours.units.keys()
    assert sorted(map(tuple, seals)) == [(who, n) for who in ("ours", "theirs") for n in range(3)]


@pytest.mark.parametrize("method", ["exhaustive", "screened"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"right": -1}, "document .* of task 'a' has no label, objective 'corrected' needs one"),
        ({"right": 3}, "has no label"),
        ({"requests": (((1, 2), (3,)),), "right": 0}, "has one choice, a search needs at least"),
    ],
)
def test_documents_that_say_nothing_are_refused(tmp_path, method, change, words):
    one, two = drawn("a", 1), drawn("b", 2)
    for split in ("search", "judge"):
        changed = tuple(dataclasses.replace(found, **change) for found in getattr(one, split))
        with pytest.raises(RecipeError, match=words):
            search(tmp_path, recipe(method=method, objective="corrected"),
                   documents=[dataclasses.replace(one, **{split: changed}), two])  # fmt: skip
    with pytest.raises(RecipeError, match="a task twice: b, b; give each once"):
        search(tmp_path, recipe(method=method), documents=[two, two])


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    first = search(tmp_path)
    (part,) = (tmp_path / "ledgers").glob("*/part-*.jsonl")
    part.write_bytes(b"")
    from act_harness.search import ledger

    written = []
    append = ledger.atomic.append_line

    def failing(path, record):
        if len(written) == 4:
            raise InfrastructureError(f"cannot write {path}: No space left on device; free some")
        written.append(record)
        append(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.atomic, "append_line", failing)
        with pytest.raises(InfrastructureError, match="No space left"):
            search(tmp_path)
    assert len(part.read_text().splitlines()) == 4
    assert stable_content(search(tmp_path).artifact) == stable_content(first.artifact)


@pytest.mark.slow
def test_two_searches_on_one_ledger_are_refused(tmp_path):
    from act_harness.search.ledger import SearchLedger

    search(tmp_path)
    (folder,) = (tmp_path / "ledgers").iterdir()
    with (
        SearchLedger.opened(folder, identity={}),
        pytest.raises(InputError, match="another search"),
    ):
        search(tmp_path)


def test_a_ledger_is_read_once_no_other_search_writes_to_it(tmp_path, monkeypatch):
    from act_harness.search.ledger import SearchLedger

    free = places.sole_writer

    def late(path, refusal):
        """Take the lock right after the search that held it has added a last unit."""
        atomic.append_line(path.parent / "part-000.jsonl", {"key": ["x", 1], "value": {"y": 2}})
        return free(path, refusal)

    monkeypatch.setattr(places, "sole_writer", late)
    with SearchLedger.opened(tmp_path, identity={}) as ledger:
        assert ledger.found == 1
        assert ledger.get(("x", 1)) == {"y": 2}


def test_bad_recipes_are_one_clear_line(tmp_path):
    cases = {
        "sampels": ({"tasks": ["a"], "sampels": 3}, "unknown key 'sampels'.*'samples'"),
        "rule": ({"tasks": ["a"], "rule": "topp"}, "rule"),
        "preset": ({"tasks": ["a"], "calibration": "papr"}, "papr"),
        "beta": ({"tasks": ["a"], "calibration": {"beta": 3}}, "beta is 3"),
        "nested": ({"tasks": ["a"], "top": {"size": [3]}}, "top.size: unknown key"),
        "verify": ({"tasks": ["a"], "verify_samples": 0}, "verify_samples is 0"),
        "judge": ({"tasks": ["a"], "judge_samples": 1}, "judge_samples is 1"),
        "tasks": ({}, "tasks"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(content))
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"neither a file nor shipped.*'demo'"):
        load_recipe("demoo")


@pytest.mark.slow
def test_sizes_left_open_follow_the_device(tmp_path):
    plain = recipe(chunk_tokens=None, pack_tokens=50)
    assert (plain.on("cpu").chunk_tokens, plain.on("cuda:1").chunk_tokens) == (2048, 8192)
    assert plain.on("cuda").pack_tokens == 50
    assert plain.size("screen_tokens") == plain.on("cpu").screen_tokens == 1024
    assert search(tmp_path, plain).artifact.search["recipe"]["chunk_tokens"] == 2048


def test_a_recipe_for_another_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="num_hidden_layers 30"):
        search(tmp_path, recipe(expect={"num_hidden_layers": 30}))
    with pytest.raises(RecipeError, match="layers 0 to 2"):
        search(tmp_path, recipe(layers=[1, 3]))
    with pytest.raises(RecipeError, match="heads 0 to 3"):
        search(tmp_path, recipe(heads=[0, 4]))
