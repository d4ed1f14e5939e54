"""Methods on the same documents: what each is, the table by value, equal strength, going on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_runs import DOCUMENTS, RECIPE
from search_child import die_while_writing
from tiny_search import drawn, tiny

from act_harness.artifact import Artifact, ModelFacts, load_artifact
from act_harness.attention import model_facts
from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.errors import (
    ArtifactError,
    InfrastructureError,
    InputError,
    RecipeError,
    ResultError,
)
from act_harness.search.documents import Document
from act_harness.search.methods import context as context_module
from act_harness.search.methods import report as methods_report
from act_harness.search.methods.arms import Arm, ArmScorer, computing_engine, parts_of
from act_harness.search.methods.comparison import compare_methods
from act_harness.search.methods.one_strength import OneStrength
from act_harness.search.methods.random_heads import RANDOM_HEADS
from act_harness.search.methods.registry import METHODS, chosen_methods
from act_harness.search.methods.report import write_report
from act_harness.search.methods.strength import divergence, matching_power, scaled
from act_harness.search.methods.table import make_table
from act_harness.search.recipe import make_recipe
from act_harness.search.run import run_search

MODEL = {"id": "m", "architecture": "LlamaForCausalLM", "num_hidden_layers": 3,
         "num_attention_heads": 4}  # fmt: skip


def recipe(**changes):
    return make_recipe({**RECIPE, **changes})


def compare(folder, names, given_recipe=None, **options):
    model = tiny()
    return compare_methods(
        given_recipe or recipe(), model=model, facts=model_facts(model), documents=DOCUMENTS,
        methods=chosen_methods(names), folder=folder, show_progress=False, **options,
    )  # fmt: skip


# -- names -----------------------------------------------------------------------------------------


def test_methods_are_chosen_by_name_and_pattern_and_come_in_the_tables_order():
    names = [one.name for one in chosen_methods(["random-heads-*", "signed"])]
    assert names == ["none", "signed", *(f"random-heads-{n}" for n in range(1, 11))]
    assert [one.name for one in chosen_methods([])] == list(METHODS)
    assert next(iter(METHODS)) == "none"


def test_an_unknown_method_is_one_line_with_the_nearest():
    with pytest.raises(InputError, match=r"method 'singed' is unknown.*did you mean 'signed'\?"):
        chosen_methods(["none", "singed"])
    with pytest.raises(InputError, match="another method"):
        chosen_methods(["none"])


def test_one_strength_takes_the_factor_that_verify_likes_best():
    class Context:
        def __init__(self):
            model = tiny()
            self.scorer = types.SimpleNamespace(model=model)
            self.facts, self.recipe = model_facts(model), recipe(layers=[1, 2])
            self.detection = {"alpha": 2.0}

        def verified(self, artifact):
            return 0.5 if artifact is None else {0.5: 0.6, 2.0: 0.7, 4.0: 0.7}.get(
                artifact.calibration.gamma, 0.1
            )  # fmt: skip

    found = OneStrength().find(Context())
    assert found.calibration.gamma == 2.0
    assert found.heads == {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}
    assert OneStrength(factors=(0.25,)).find(Context()) is None


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ({"mass": "reweight", "gamma": 2.0}, "triton"),
        ({"target": "both", "mass": "reweight", "gamma": 2.0, "gamma_initial": 2.0}, "triton"),
        ({"target": "random"}, "torch"),
        ({"target": "last"}, "torch"),
        ({"target": "head", "mass": "gate", "factor": 1.0}, "torch"),
        ({"target": "head", "mass": "temperature", "factor": 1.0}, "torch"),
    ],
)
def test_what_triton_does_not_compute_is_computed_by_torch(settings, engine):
    pytest.importorskip("triton")
    plan = LayerPlan.uniform(Calibration(**settings), (0,))
    assert computing_engine("triton", [plan], "cuda") == engine
    assert computing_engine("reference", [plan], "cpu") == "reference"


# -- the table -------------------------------------------------------------------------------------


def hand_made():
    """Four documents to judge on and four labelled ones, two choices, no model."""

    def documents(rights, *, same):
        return tuple(
            Document(
                "t", f"{n:08x}", (((1,), (2,)), ((1,), (3,) * (n // 2 + 2))), right,
                ("no", "yes") if same else ("a", "b" * (n + 2)),
            )
            for n, right in enumerate(rights)
        )  # fmt: skip

    return {
        split: {"same": documents(rights, same=True), "other": documents(rights, same=False)}
        for split, rights in (
            ("search", (0, 1)), ("verify", (0, 1)), ("evaluation", (0, 0, 1, 1)),
        )
    }  # fmt: skip


def test_a_table_by_hand():
    parts = hand_made()
    labelled = [[-1.0, -3.0], [-3.0, -1.0]]
    base = {
        # always the first choice: two of four; less the means (-1.25, -3): 0, 0, 1, 1
        "same": [[-1.0, -3.5], [-1.0, -3.5], [-1.5, -2.5], [-1.5, -2.5]],
        "other": [[-1.0, -3.0]] * 4,
    }
    arm = {
        "same": [[-1.0, -3.5], [-1.0, -3.5], [-1.5, -1.0], [-1.5, -2.5]],
        # by characters 1 and 2, 3, 4, 5: second choices -1.5, -1, -0.75, -0.6 against -1
        "other": [[-1.0, -3.0]] * 3 + [[-4.0, -3.0]],
    }

    def scored(name, evaluation):
        other = {"same": labelled, "other": labelled}
        scores = {"search": other, "verify": other, "evaluation": evaluation}
        return Arm(name, 3, "0" * 64, "auto", scores)

    table = make_table(scored("none", base), [scored("x", arm), scored("y", base)], parts)
    accuracy = {name: one["t" if "t" in one else next(iter(one))] for name, one in
                table.untouched.items()}  # fmt: skip
    assert accuracy["raw"] == 0.5
    assert accuracy["batch"] == 1.0
    assert accuracy["raw_other_tasks"] == 0.5
    # -1 against -3/2, -3/3, -3/4, -3/5: the first choice of equal ones, so 0, 0, 1, 1
    assert accuracy["by_characters_other_tasks"] == 1.0
    # by tokens 1 and 2, 2, 3, 3: -1.5, -1.5, -1, -1 against -1: always the first of equal ones
    assert accuracy["by_tokens_other_tasks"] == 0.5
    cells = table.cells["x"]
    assert cells["raw"].by_task == {"same": 0.75}
    assert cells["raw"].result.difference == 0.25
    assert cells["raw"].result.p_value == 1.0  # one changed answer of McNemar's test
    # less the means (-1.25, -2.625): third -0.25 against 1.625, fourth -0.25 against 0.125
    assert cells["batch"].by_task == {"same": 1.0}
    assert cells["raw_other_tasks"].result.difference == 0.25
    assert table.cells["y"]["raw"].result.difference == 0.0
    assert [column.name for column in table.columns] == [
        "raw", "batch", "supervised",
        "raw_other_tasks", "by_characters_other_tasks", "by_tokens_other_tasks",
        "supervised_other_tasks",
    ]  # fmt: skip


def test_p_values_are_adjusted_over_the_methods_of_a_column():
    n = 12
    documents = tuple(
        Document("t", f"{i:08x}", (((1,), (2,)), ((1,), (3,))), 1, ("no", "yes")) for i in range(n)
    )
    parts = {split: {"t": documents} for split in ("search", "verify", "evaluation")}
    wrong, right = [-1.0, -2.0], [-2.0, -1.0]

    def arm(name, hits):
        rows = [right] * hits + [wrong] * (n - hits)
        return Arm(name, 1, None, None, {split: {"t": rows} for split in parts})

    table = make_table(arm("none", 0), [arm("a", 6), arm("b", 8), arm("c", 1)], parts)
    # McNemar, all one way: 2 x 2^-6, 2 x 2^-8, 1; Benjamini-Hochberg over these three
    found = [table.cells[name]["raw"] for name in "abc"]
    assert [one.result.p_value for one in found] == pytest.approx([2**-5, 2**-7, 1.0])
    assert [one.p_adjusted for one in found] == pytest.approx([1.5 * 2**-5, 3 * 2**-7, 1.0])
    bare = arm("d", 0)._replace(heads=0)  # of which nothing was tested
    table = make_table(arm("none", 0), [arm("a", 6), bare, arm("b", 8)], parts)
    assert [table.cells[name]["raw"].p_adjusted for name in "adb"] == pytest.approx(
        [2**-5, 1.0, 2 * 2**-7]
    )
    assert [one.verdict for one in found] == ["improved", "improved", "inconclusive"]


# -- equal strength --------------------------------------------------------------------------------


def test_divergence_by_hand():
    untouched = {"a": [[0.0, 0.0]], "b": [[0.0, 0.0], [1.0, 1.0, 1.0]]}
    calibrated = {"a": [[math.log(3.0), 0.0]], "b": [[0.0, 0.0], [2.0, 2.0, 2.0]]}
    one = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(untouched, calibrated) == pytest.approx(one / 2)  # b: equal answers
    assert divergence(untouched, untouched) == 0.0


def test_strengths_are_taken_to_a_power():
    maps = {
        0: HeadStrength(mass="reweight", gamma=4.0),
        1: HeadStrength(mass="reweight", gamma=0.25),
        2: HeadStrength(mass="damp", beta=0.0),
        3: HeadStrength(mass="raise", psi=0.25),
    }
    artifact = Artifact(
        name="x", model=ModelFacts(**MODEL), calibration=Calibration(beta=0.36),
        heads={0: (0, 1, 2, 3), 2: (1,)}, strengths={0: maps},
    )  # fmt: skip
    found = scaled(artifact, 0.5).strengths
    assert [found[0][h].strength for h in range(4)] == pytest.approx([2.0, 0.5, 0.0, 0.0625])
    assert found[2][1].beta == pytest.approx(0.6)  # a head that had the calibration's own
    one = scaled(artifact, 1.0)
    assert [s.strength for s in one.plans()[0].strengths] == pytest.approx([4.0, 0.25, 0.0, 0.25])
    both = Artifact(
        name="x", model=ModelFacts(**MODEL),
        calibration=Calibration(target="both", mass="reweight", gamma=9.0, gamma_initial=4.0),
        heads={1: (2,)},
    )  # fmt: skip
    strength = scaled(both, 0.5).strengths[1][2]
    assert (strength.gamma, strength.gamma_initial) == pytest.approx((3.0, 2.0))


@given(
    st.floats(0.2, 8.0), st.floats(0.5, 4.0), st.floats(1e-4, 3.0)
)  # the true power, its exponent, the size of the divergence there
def test_the_matching_power_is_found(truth, exponent, wanted):
    calls = []

    def measure(power):
        calls.append(power)
        return wanted * (power / truth) ** exponent

    match = matching_power(measure, wanted)
    assert match.reached
    assert match.divergence == pytest.approx(wanted, rel=0.0201)
    assert len(calls) <= 16


def test_what_never_gets_there_says_so():
    match = matching_power(lambda power: min(power, 2.0) * 0.01, 1.0)
    assert not match.reached
    assert match.divergence == pytest.approx(0.02)


def test_every_draw_of_random_heads_reads_the_layers_of_one_probe(monkeypatch):
    model, probes = tiny(), []
    facts = model_facts(model)
    signed = Artifact(
        name="signed", model=facts, calibration=Calibration(alpha=2.0), heads={1: (0, 2)}
    )
    attending = context_module.attending_layers
    monkeypatch.setattr(
        context_module, "attending_layers", lambda one: probes.append(one) or attending(one)
    )
    context = context_module.MethodContext(
        recipe(), facts, DOCUMENTS, ArmScorer(model, facts),
        Path("ledgers"), lambda name: signed,
    )  # fmt: skip
    drawn = [one.find(context) for one in RANDOM_HEADS]
    assert [one.head_count() for one in drawn] == [2] * 10
    assert len({one.sha256() for one in drawn}) > 5
    assert probes == [model]


# -- the whole -------------------------------------------------------------------------------------

SOME = ["act-paper", "act-exhaustive", "signed", "both", "random-columns*", "last-columns", "gate",
        "temperature", "random-heads-1", "*-strength*"]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    return folder, compare(folder, SOME)


def test_every_method_is_scored_as_its_artifact_says(compared):
    folder, arms = compared
    model = tiny()
    scorer = ArmScorer(model, model_facts(model))
    parts = parts_of(DOCUMENTS)
    found = {arm.method: arm for arm in arms.arms}
    assert [*found] == [one.name for one in chosen_methods(SOME)][1:]
    for name in ("signed", "last-columns", "temperature"):
        stored = Artifact.model_validate_json((folder / "artifacts" / f"{name}.json").read_text())
        assert stored.head_count() == found[name].heads > 0
        again = scorer.scores(stored, {"evaluation": parts["evaluation"]})
        assert again["evaluation"] == found[name].scores["evaluation"]
    targets = {
        name: json.loads((folder / "artifacts" / f"{name}.json").read_text())["calibration"]
        for name in found
        if name != "one-strength"  # may find none, and then writes none
    }
    assert targets["random-columns"]["draw"] == "fixed"
    assert targets["random-columns-anew"]["draw"] == "anew"
    assert targets["both"]["target"] == "both"
    assert targets["gate"]["mass"] == "gate"
    assert targets["act-paper"]["mass"] == "damp"
    assert targets["signed"]["alpha"] == targets["act-paper"]["alpha"] == 2.0
    assert found["random-heads-1"].heads == found["signed"].heads
    strengths = {
        name: json.loads((folder / "artifacts" / f"{name}.json").read_text())["strengths"]
        for name in ("signed", "shuffled-strengths", "opposite-strengths")
    }
    gammas = {
        name: [one["gamma"] for own in of.values() for one in own.values()]
        for name, of in strengths.items()
    }
    assert sorted(gammas["shuffled-strengths"]) == sorted(gammas["signed"])
    assert gammas["opposite-strengths"] == pytest.approx([1 / g for g in gammas["signed"]])
    # the same rows as an independent forward with nothing calibrated
    bare = scorer.scores(None, {"verify": parts["verify"]})
    assert bare["verify"] == arms.untouched.scores["verify"]


def test_at_equal_strength_all_move_the_answers_alike(compared):
    _, arms = compared
    wanted = arms.divergences["signed"]
    assert arms.reference == "signed"
    assert {one.arm.method for one in arms.equal} == {n for n, d in arms.divergences.items() if d}
    reached = 0
    for one in arms.equal:
        moved = divergence(arms.untouched.scores["verify"], one.arm.scores["verify"])
        assert moved == pytest.approx(one.match.divergence, abs=1e-9)
        if one.match.reached:
            reached += 1
            assert moved == pytest.approx(wanted, rel=0.0201)
    assert reached >= len(arms.equal) // 2


def test_the_report_says_what_was_scored(compared):
    folder, arms = compared
    report = write_report(recipe(), arms, folder)
    stored = json.loads((folder / "methods.json").read_text())
    signed = next(arm for arm in arms.arms if arm.method == "signed")
    rights = [one.right for one in DOCUMENTS[0].judge]
    answers = [int(np.argmax(row)) for row in signed.scores["evaluation"]["a"]]
    raw = np.mean([a == right for a, right in zip(answers, rights, strict=True)])
    cell = stored["methods"]["signed"]["columns"]["raw"]
    assert cell["accuracy"] == pytest.approx(raw)
    held = load_artifact(folder / "artifacts/signed.json").search["held_out"]
    assert held["columns"]["raw"]["selected"] == pytest.approx(raw, abs=1e-6)
    assert held["documents"] == {"a": 8, "b": 8}
    assert len(held["columns"]["raw"]["random_sets"]["scores"]) == 1
    text = report.markdown()
    assert text.count("| signed |") == 2
    assert "Place of signed among 1 random head sets" in text
    bare = tuple(one._replace(heads=0) if one.method == "signed" else one for one in arms.arms)
    assert (
        "Place of signed"
        not in dataclasses.replace(report, arms=dataclasses.replace(arms, arms=bare)).markdown()
    )
    assert {"methods.md", "methods.json", "forest.png", "forest-equal.png"} <= {
        path.name for path in folder.iterdir()
    }


def test_every_figure_follows_from_what_the_folder_holds(compared):
    """Accuracy, label prior, KL and p of a method from scores and labels alone, computed anew."""
    folder, _ = compared
    stored = json.loads((folder / "methods.json").read_text())
    labels = json.loads((folder / "labels.json").read_text())["evaluation"]["a"]
    assert [one["key"] for one in labels] == [one.key for one in DOCUMENTS[0].judge]
    right = np.array([one["right"] for one in labels])

    def scores(name, split, task):
        kept = json.loads((folder / "scores" / f"{name}.json").read_text())
        return np.array(kept["scores"][split][task])

    for name in ("gate", "signed", "both"):
        own = scores(name, "evaluation", "a")
        cells = stored["methods"][name]["columns"]
        assert cells["raw"]["accuracy"] == np.mean(own.argmax(axis=1) == right)
        less = own - own.mean(axis=0)
        assert cells["batch"]["accuracy"] == np.mean(less.argmax(axis=1) == right)
        stock = scores("none", "evaluation", "a").argmax(axis=1) == right
        gained = int(((own.argmax(axis=1) == right) & ~stock).sum())
        lost = int((stock & (own.argmax(axis=1) != right)).sum())
        p = min(1.0, 2 * sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
                / 2 ** (gained + lost))  # fmt: skip
        assert cells["raw"]["p"] == pytest.approx(p)
        moved = []
        for task in ("a", "b"):
            q, p = (np.exp(scores(who, "verify", task)) for who in ("none", name))
            q, p = q / q.sum(axis=1, keepdims=True), p / p.sum(axis=1, keepdims=True)
            moved.append(np.mean((p * np.log(p / q)).sum(axis=1)))
        assert stored["methods"][name]["divergence"] == pytest.approx(np.mean(moved))
        other = json.loads((folder / "labels.json").read_text())["evaluation"]["b"]
        for column in ("characters", "tokens"):
            best = (scores(name, "evaluation", "b") / [one[column] for one in other]).argmax(axis=1)
            hits = best == [one["right"] for one in other]
            assert cells[f"by_{column}_other_tasks"]["accuracy"] == np.mean(hits)
    tests = {
        name: one["columns"]["raw"]["p"] for name, one in stored["methods"].items() if one["heads"]
    }
    order = sorted(tests, key=tests.get)
    adjusted = [tests[name] * len(order) / (rank + 1) for rank, name in enumerate(order)]
    for rank, name in enumerate(order):
        found = stored["methods"][name]["columns"]["raw"]["p_adjusted"]
        assert found == pytest.approx(min(1.0, *adjusted[rank:]))


def test_a_method_without_heads_has_no_figures_of_its_own(compared, tmp_path):
    """It was drawn as a control that gains +0.0 (-2.7 to +2.7), which nobody had measured."""
    _, arms = compared
    bare = arms.untouched._replace(method="gate", note="found no heads: the untouched model")
    others = [one for one in arms.arms if one.method == "signed"]
    given = dataclasses.replace(
        arms, arms=(*others, bare), equal=(), reference=None, divergences={"signed": 1.0, "gate": 0}
    )
    report = write_report(recipe(), given, tmp_path)
    (row,) = (line for line in report.markdown().splitlines() if line.startswith("| gate |"))
    (stock,) = (line for line in report.markdown().splitlines() if line.startswith("| none |"))
    assert row.split("|")[4:] == stock.split("|")[4:]
    assert "Found no heads: `gate`. Nothing they tried did better on verify" in report.markdown()
    assert report.measured() == ["signed"]
    assert {one.name for one in methods_report._rows(report.table, report.measured())} == {"signed"}
    empty = dataclasses.replace(given, arms=(bare,))
    assert "forest.png" not in write_report(recipe(), empty, tmp_path).files
    assert not (tmp_path / "forest.png").exists()  # the first call's


def test_a_report_names_model_objective_and_what_columns_are(compared, tmp_path):
    _, arms = compared
    report = write_report(recipe(), arms, tmp_path)
    text = report.markdown()
    assert "(LlamaForCausalLM, float32), objective corrected, seed 1234; documents to find" in text
    assert "choose heads by: a 8 + 8, b 8 + 8." in text
    assert "- corrected: each choice's mean score over the documents subtracted; a\n" in text
    stored = json.loads((tmp_path / "methods.json").read_text())
    assert stored["model"]["architecture"] == "LlamaForCausalLM"
    assert "forest-equal.png" in report.files
    without = dataclasses.replace(arms, equal=(), reference=None)
    assert "forest-equal.png" not in write_report(recipe(), without, tmp_path).files
    assert not (tmp_path / "forest-equal.png").exists()
    blind = recipe(objective="entropy")
    assert "Objective entropy is that of methods without labels alone" in (
        write_report(blind, without, tmp_path).markdown()
    )


def test_a_later_call_with_fewer_methods_keeps_what_a_head_set_was_held_against(compared, tmp_path):
    folder = copy_of(compared, tmp_path)
    before = load_artifact(folder / "artifacts/signed.json").search["held_out"]
    assert len(before["columns"]["raw"]["random_sets"]["scores"]) == 1
    compare(folder, ["signed"], equal_strength=False)
    assert load_artifact(folder / "artifacts/signed.json").search["held_out"] == before


def test_what_a_killed_process_was_writing_is_removed(compared, tmp_path):
    folder = copy_of(compared, tmp_path)
    for kind in ("artifacts", "scores", "equal"):
        (folder / kind / ".signed.json.0123abcd.tmp").write_text("{")
    compare(folder, ["signed"], equal_strength=False)
    assert not [*folder.rglob("*.tmp")]


def test_what_was_found_is_not_found_again(compared, monkeypatch):
    folder, arms = compared
    monkeypatch.setattr(ArmScorer, "scores", None)
    monkeypatch.setattr("act_harness.search.methods.context.run_search", None)
    assert compare(folder, SOME) == arms


def test_a_folder_of_another_comparison_is_refused(compared, monkeypatch):
    folder, _ = compared
    with pytest.raises(RecipeError, match="another recipe; give another --output"):
        compare(folder, SOME, recipe(seed=77))
    one, *rest = DOCUMENTS
    fewer = dataclasses.replace(one, verify=one.verify[:-1])
    monkeypatch.setitem(compare.__globals__, "DOCUMENTS", [fewer, *rest])
    with pytest.raises(RecipeError, match="comparison with other documents; give another"):
        compare(folder, SOME)


def test_a_killed_comparison_goes_on_and_ends_the_same(compared, tmp_path):
    _, arms = compared
    names = ["signed", "last-columns"]
    for moment in (2, 7, 20):
        child = os.fork()
        if child == 0:
            die_while_writing(moment)
            compare(tmp_path, names)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
    found = compare(tmp_path, names)
    whole = {arm.method: arm for arm in arms.arms}
    assert [arm.method for arm in found.arms] == ["signed", "last-columns"]
    assert [arm.scores for arm in found.arms] == [
        whole[n].scores for n in ("signed", "last-columns")
    ]
    equal = {one.arm.method: one for one in arms.equal}
    assert [one.match for one in found.equal] == [
        equal[one.arm.method].match for one in found.equal
    ]


KEPT = ["scores/signed.json", "equal/signed.json"]


def copy_of(compared, tmp_path):
    return Path(shutil.copytree(compared[0], tmp_path / "copy"))


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"heads":', '"head":', 1),
        lambda text: text.replace("-", "", 1),  # a number that is another one
        lambda text: text.replace("[[-", "[[NaN,-", 1),
    ],
)
def test_a_damaged_file_of_the_folder_is_one_line(compared, tmp_path, name, change):
    folder = copy_of(compared, tmp_path)
    text = (folder / name).read_text()
    assert change(text) != text
    (folder / name).write_text(change(text))
    with pytest.raises(ResultError, match=rf"{name}.*; delete it, and it is computed again"):
        compare(folder, ["signed"])


def test_scores_are_of_the_head_set_beside_them(compared, tmp_path):
    folder = copy_of(compared, tmp_path)
    shutil.copy(folder / "artifacts/gate.json", folder / "artifacts/signed.json")
    with pytest.raises(ResultError, match=r"signed\.json is not of the head set in .*; delete the"):
        compare(folder, ["signed"])
    shutil.copy(folder / "scores/gate.json", folder / "scores/signed.json")
    with pytest.raises(ResultError, match="is not of the head set in"):
        compare(folder, ["signed"])
    (folder / "scores/signed.json").unlink()  # then it is taken for what signed found
    assert compare(folder, ["signed"]).arms[0].heads == load_artifact(
        folder / "artifacts/gate.json"
    ).head_count()  # fmt: skip


def test_an_artifact_of_another_model_is_refused_though_its_scores_are_there(compared, tmp_path):
    folder = copy_of(compared, tmp_path)
    path = folder / "artifacts/signed.json"
    content = json.loads(path.read_text())
    content["model"]["num_hidden_layers"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"was made for .* with num_hidden_layers 7"):
        compare(folder, ["signed"])


def test_a_lost_head_set_is_read_off_the_ledger_again(compared, tmp_path):
    folder = copy_of(compared, tmp_path)
    before = load_artifact(folder / "artifacts/signed.json")
    (folder / "artifacts/signed.json").unlink()
    assert compare(folder, ["signed"], equal_strength=False).arms[0].heads == before.head_count()
    assert load_artifact(folder / "artifacts/signed.json").sha256() == before.sha256()


def test_scores_that_are_not_finite_are_one_line(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(InfrastructureError, match="has scores that are not finite; check the"):
        compare_methods(
            recipe(), model=model, facts=model_facts(model), documents=DOCUMENTS,
            methods=chosen_methods(["signed"]), folder=tmp_path, show_progress=False,
        )  # fmt: skip
    assert not (tmp_path / "scores").exists()


def test_tasks_that_give_no_table_are_refused_before_anything_is_computed():
    def changed(**changes):
        return [dataclasses.replace(DOCUMENTS[0], **changes), DOCUMENTS[1]]

    def each(change):
        splits = ("search", "verify", "judge")
        return changed(**{s: tuple(map(change, getattr(DOCUMENTS[0], s))) for s in splits})

    for given_documents, words in (
        ([DOCUMENTS[0]] * 2, "a task comes twice"),
        (changed(verify=()), "8 search and 0 verify documents"),
        (changed(search=DOCUMENTS[0].search[:1], verify=DOCUMENTS[0].verify[:2]), "needs 2 that"),
        (each(lambda one: dataclasses.replace(one, choices=("a", "b"))), "lacks its label or the"),
        (
            each(lambda one: dataclasses.replace(
                one, requests=one.requests[:1], choices=("a",), right=0)),
            "has one choice",
        ),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            parts_of(given_documents)


def test_a_task_that_cannot_judge_is_refused(tmp_path):
    bare = [dataclasses.replace(one, judge=()) for one in DOCUMENTS]
    with pytest.raises(RecipeError, match="no documents that only judge"):
        parts_of(bare)
    with pytest.raises(RecipeError, match="lacks its label or the texts"):
        parts_of([drawn("a", 5)])


def test_a_methods_search_is_the_search_commands(tmp_path):
    """Its ledger too: `search` and `methods` of one recipe tune nothing twice."""
    given_recipe = recipe(gradient={**RECIPE["gradient"], "target": "sinks"})
    model = tiny()
    facts = model_facts(model)
    searched = run_search(
        given_recipe, model=model, documents=DOCUMENTS, facts=facts, ledgers=tmp_path / "ledgers",
        show_progress=False,
    )  # fmt: skip
    arms = compare(tmp_path / "out", ["signed"], given_recipe, ledgers=tmp_path / "ledgers",
                   equal_strength=False)  # fmt: skip
    stored = json.loads((tmp_path / "out" / "artifacts" / "signed.json").read_text())
    assert arms.arms[0].artifact_sha256 == searched.artifact.sha256()
    assert stored["search"]["run"]["units_from_ledger"] > 0
    assert len(list((tmp_path / "ledgers").iterdir())) == 1
