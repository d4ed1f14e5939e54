"""What a search leaves for a reader: plots, the held-out table, the benchmark, the command."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from installed import REPOSITORY
from search_runs import DRAWN, recipe, search
from tiny_search import documents, tiny

from act_harness.attention import model_facts
from act_harness.bench.common import ratio
from act_harness.bench.search import bench_search, main, random_documents
from act_harness.bench.search_parts import join_parts, measure_parts, read_slice
from act_harness.errors import InputError, RecipeError
from act_harness.search.choose.heldout import best_heads, compare_arms, random_artifact
from act_harness.search.command import SearchSettings, search_from_settings
from act_harness.search.documents import write_documents
from act_harness.search.recipe import make_recipe
from act_harness.search.report import draw


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    result = search(tmp_path)
    found = draw(result, tmp_path / "mine.json")
    assert {path.read_bytes()[:4] for path in found.values()} == {b"\x89PNG"}
    assert found == {kind: tmp_path / f"mine-{kind}.png" for kind in ("map", "ranks")}
    last = replace(result, figures=found).summary().splitlines()[-1]
    assert last == f"drawn to {found['map']} and {found['ranks']}"


def test_plots_are_refused_before_the_search_not_after_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = SearchSettings(
        pretrained=str(tmp_path / "absent"), tasks=("act_demo_word",), plots=True,
        output=tmp_path / "heads.json",
    )  # fmt: skip
    with pytest.raises(InputError, match="plots need matplotlib"):
        search_from_settings(asked)
    assert not list(tmp_path.iterdir())


def test_make_demo_names_the_map_that_its_search_draws():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (artifact,) = re.findall(r"--plots --output (\S+)\.json", makefile)
    (named,) = re.findall(r"(\S+)-map\.png", makefile)
    assert named == artifact


def test_held_out_figures_are_paired_with_the_untouched_model(tmp_path):
    model = tiny()
    found = search(tmp_path, recipe()).artifact
    artifact = found.model_copy(update={"heads": {0: (1,), 2: (0, 3)}, "strengths": None})
    tasks = {"a": documents(12, seed=9, task="a"), "b": documents(12, seed=10, task="b")}
    empty = artifact.model_copy(update={"heads": {}, "strengths": None})
    drawn = random_artifact(artifact, seed=1)
    found = compare_arms(
        model, {"set": artifact, "empty": empty, "random": drawn}, tasks, facts=model_facts(model)
    )
    assert [arm.heads for arm in found] == [3, 0, 3]
    assert found[1].columns["raw"].difference == 0
    assert found[0].columns["raw"].score_a == found[2].columns["raw"].score_a
    assert found[0].columns["raw"].documents == 24
    assert drawn.heads == random_artifact(artifact, seed=1).heads
    assert drawn.heads != random_artifact(artifact, seed=2).heads


def test_the_best_heads_come_from_the_table(tmp_path):
    found = search(tmp_path, recipe(top={"sizes": [2]})).artifact
    three = best_heads(found, 3)
    assert three.head_count() == 3
    rows = sorted(found.search["table"]["heads"]["rows"], key=lambda row: -row[3])
    expected = {(row[0], row[1]) for row in rows[:3]}
    assert {(layer, h) for layer, heads in three.heads.items() for h in heads} == expected
    with pytest.raises(InputError, match="not 13"):
        best_heads(found, 13)


def test_the_benchmark_compares_three_ways_that_agree():
    tables, timings = bench_search(
        tiny(), random_documents(5, vocabulary=97, own=12), loop_heads=3, keep=0.5, rounds=2
    )
    cost = {row[0]: row for row in tables[0].rows}
    assert cost["exhaustive"][2] < cost["loop, batch 1 (scaled)"][2]
    assert cost["screened"][2] < cost["exhaustive"][2]
    assert "100.00 %" in tables[0].note
    assert {name: len(one.samples) for name, one in timings.items()} == {
        "loop": 2, "exhaustive": 2, "screened": 2,
    }  # fmt: skip
    assert cost["screened"][4] == pytest.approx(1 / ratio(timings, "screened", "loop"))


@pytest.mark.slow
def test_slices_of_the_benchmark_add_up(tmp_path, capsys):
    documents = random_documents(5, tasks=2, vocabulary=97, own=12)
    options = {"folder": tmp_path, "loop_heads": 2, "loop_documents": 2, "keep": 0.5}
    small = make_recipe({"tasks": ["bench"], "chunk_tokens": 128})
    for number in range(2):
        path = measure_parts(tiny(), documents, (number, 2), recipe=small, **options)
    lines = path.read_text().splitlines()
    measure_parts(tiny(), documents, (1, 2), recipe=small, **options)
    assert path.read_text().splitlines() == lines  # nothing is measured twice
    tables, _, _ = join_parts(tmp_path)
    assert "10 documents in 5 of 5 chunks" in tables[0].note
    assert "100.00 %" in tables[0].note
    assert [row[1] for row in tables[1].rows] == [5, 5]
    path.write_text("".join(line + "\n" for line in lines[:1]))  # a slice that was cut
    assert "1 chunks were not reached" in join_parts(tmp_path)[0][0].note
    main(["--join", str(tmp_path), "--output", str(tmp_path), "--name", "whole"])
    assert "not reached" in (tmp_path / "whole.md").read_text()
    for wrong in ("2/2", "x/2", "1"):
        with pytest.raises(InputError, match="expected I/N"):
            read_slice(wrong)
    with pytest.raises(InputError, match="no results"):
        join_parts(tmp_path / "none")


@pytest.mark.parametrize(
    "name", ["classification", "general", "classification-signed", "six-tasks-paper"]
)
def test_another_method_than_the_recipes_leaves_out_what_it_does_not_read(name, caplog):
    """The command line cannot take a file's settings away, and ``--method`` overrides the file."""
    given = {"epochs": 3, "penalties": None}
    asked = SearchSettings(recipe=Path(name), method="gradient", gradient=given)
    found = asked.make_recipe()
    own = SearchSettings(recipe=Path(name)).make_recipe()
    assert (found.method, found.gradient.epochs, found.tasks) == ("gradient", 3, own.tasks)
    assert "left out, which method gradient does not read" in caplog.text
    back = SearchSettings(recipe=Path("joint-both"), method="screened").make_recipe()
    assert (back.method, back.gradient) == ("screened", own.gradient)


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize("place", ["seed", "fewshot_seed", "controls.seed"])
def test_a_seed_of_a_recipe_is_one_that_the_option_takes(place, seed):
    content = {"tasks": ["x"]}
    content |= {"controls": {"seed": seed}} if "." in place else {place: seed}
    with pytest.raises(RecipeError, match=f"{place}: found {seed}, expected"):
        make_recipe(content)


def test_settings_make_a_recipe_or_say_what_is_missing(tmp_path):
    made = SearchSettings(tasks=["x", "y"], samples=7, output=Path("o/name.json")).make_recipe()
    assert (made.tasks, made.samples, made.name) == (("x", "y"), 7, "name")
    demo = SearchSettings(recipe=Path("demo"), samples=9).make_recipe()
    assert (demo.name, demo.samples) == ("demo", 9)
    with pytest.raises(RecipeError, match="neither a recipe nor tasks"):
        SearchSettings().make_recipe()
    with pytest.raises(InputError, match="no model was named"):
        search_from_settings(SearchSettings(tasks=["x"]))
    path = tmp_path / "d.json"
    write_documents(path, DRAWN)
    with pytest.raises(RecipeError, match="prepare them again"):
        search_from_settings(SearchSettings(tasks=["x"], samples=3, documents=path))


def test_prepared_documents_serve_every_recipe_on_some_of_their_tasks(caplog):
    from act_harness.search.command import _fitting

    some = recipe(tasks=["b"], samples=8)
    assert _fitting(DRAWN, some) == [DRAWN[1]]
    assert _fitting(DRAWN, recipe(tasks=["b", "a"])) == [DRAWN[1], DRAWN[0]]
    assert not caplog.records
    assert _fitting(DRAWN, recipe(tasks=["group-of-both"])) == DRAWN
    assert "names group-of-both; the prepared documents are of a, b, and all" in caplog.text
    with pytest.raises(RecipeError, match="hold 8 of task 'b', the recipe asks for 9"):
        _fitting(DRAWN, recipe(tasks=["b"], samples=9))
    with_examples = [replace(one, num_fewshot=3) for one in DRAWN]
    with pytest.raises(RecipeError, match="task 'b' have 3 examples in their prompts, the recipe"):
        _fitting(with_examples, recipe(tasks=["b"], num_fewshot=0))  # the artifact would say 0
    for shots in (None, 3):
        assert _fitting(with_examples, recipe(tasks=["b"], num_fewshot=shots)) == with_examples[1:]
    with pytest.raises(RecipeError, match="have 0 examples in their prompts, the recipe"):
        _fitting(DRAWN, recipe(tasks=["b"], num_fewshot=3))
    never = [replace(one, without_examples=True) for one in DRAWN]  # the task's own word
    assert _fitting(never, recipe(tasks=["b"], num_fewshot=3)) == never[1:]
