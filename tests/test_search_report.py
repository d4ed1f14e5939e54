"""What a search leaves for a reader: plots, the held-out table, the benchmark, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_search_run import DRAWN, recipe, search
from tiny_search import documents, tiny

from act_harness.attention import model_facts
from act_harness.bench.search import bench_search, random_documents
from act_harness.data import write_documents
from act_harness.errors import RecipeError
from act_harness.search.figures import draw
from act_harness.search.heldout import compare_arms, random_artifact
from act_harness.search.settings import SearchSettings, search_from_settings


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = draw(search(tmp_path), tmp_path)
    assert {path.read_bytes()[:4] for path in found.values()} == {b"\x89PNG"}
    assert len(found) == 2


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
    assert found[1].raw.difference == 0
    assert found[0].raw.score_a == found[2].raw.score_a
    assert found[0].raw.documents == 24
    assert drawn.heads == random_artifact(artifact, seed=1).heads
    assert drawn.heads != random_artifact(artifact, seed=2).heads


def test_the_benchmark_compares_three_ways_that_agree():
    tables = bench_search(
        tiny(), random_documents(5, vocabulary=97, own=12), loop_heads=3, keep=0.5
    )
    cost = {row[0]: row for row in tables[0].rows}
    assert cost["exhaustive"][2] < cost["loop, batch 1 (scaled)"][2]
    assert cost["screened"][2] < cost["exhaustive"][2]
    assert "100.00 %" in tables[0].note


def test_settings_make_a_recipe_or_say_what_is_missing(tmp_path):
    made = SearchSettings(tasks=["x", "y"], samples=7, output=Path("o/name.json")).make_recipe()
    assert (made.tasks, made.samples, made.name) == (("x", "y"), 7, "name")
    demo = SearchSettings(recipe=Path("demo"), samples=9).make_recipe()
    assert (demo.name, demo.samples) == ("demo", 9)
    with pytest.raises(RecipeError, match="neither a recipe nor tasks"):
        SearchSettings().make_recipe()
    with pytest.raises(RecipeError, match="no model was given"):
        search_from_settings(SearchSettings(tasks=["x"]))
    path = tmp_path / "d.json"
    write_documents(path, DRAWN)
    with pytest.raises(RecipeError, match="prepare them again"):
        search_from_settings(SearchSettings(tasks=["x"], samples=3, documents=path))
