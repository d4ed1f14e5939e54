"""Strengths on parts of the sinks: the parts by hand, the whole as the search finds it."""

from __future__ import annotations

import json

import pytest
import torch
from method_runs import DOCUMENTS, RECIPE
from tiny_search import tiny

from act_harness.attention import model_facts
from act_harness.errors import InputError, RecipeError, ResultError
from act_harness.search.compute.training import Training
from act_harness.search.documents import Document, TaskDocuments
from act_harness.search.recipe import make_recipe
from act_harness.search.run import run_search
from act_harness.search.subsets import PromptParts, compare_parts


def task(*prompts):
    documents = tuple(
        Document("t", str(n), ((prompt, (1,)), (prompt, (2,))), 0)
        for n, prompt in enumerate(prompts)
    )
    return TaskDocuments("t", documents, (), "train", "test", 0)


def recipe(**changes):
    return make_recipe({**RECIPE, **changes})


def test_parts_are_the_last_tokens_what_all_prompts_share_and_the_others():
    parts = PromptParts([task((7, 8, 3, 4, 9, 9, 5), (7, 8, 6, 9, 9, 5), (7, 8, 4, 9, 9, 5))], 2)
    t, o, last = "template", "others", "last"
    assert parts.of[(7, 8, 3, 4, 9, 9, 5)] == [t, t, o, o, t, last, last]
    assert parts.of[(7, 8, 6, 9, 9, 5)] == [t, t, o, t, last, last]


def test_columns_of_a_part_are_those_of_each_sequence():
    parts = PromptParts([task((7, 3, 9, 9), (7, 4, 5, 9, 9))], 1)
    ids = torch.tensor([[7, 3, 9, 9, 1], [7, 4, 5, 9, 9]])  # an answer's token behind the first
    prompt = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    found = {name: parts.columns(name, ids, prompt) for name in ("last", "template", "others")}
    assert found["last"].tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert found["template"].tolist() == [[1, 0, 1, 0, 0], [1, 0, 0, 1, 0]]
    assert found["others"].tolist() == [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert torch.equal(sum(one.int() for one in found.values()).bool(), prompt)


def test_the_whole_finds_what_the_search_finds_and_goes_on_from_its_folder(tmp_path, monkeypatch):
    model, own = tiny(), recipe()
    facts = model_facts(model)
    found = compare_parts(own, model=model, documents=DOCUMENTS, folder=tmp_path / "parts", last=1)
    searched = run_search(
        own, model=model, facts=facts, documents=DOCUMENTS, ledgers=tmp_path / "ledgers",
        show_progress=False,
    ).artifact  # fmt: skip
    assert found["parts"]["all"]["heads"] == searched.head_count() > 0
    flags = {name: part["flags"] for name, part in found["parts"].items()}
    assert flags["all"] > 0
    assert {"all", "last", "template", "others"} == set(flags)
    assert json.loads((tmp_path / "parts" / "parts.json").read_text()) == found
    monkeypatch.setattr(Training, "epoch", None)  # nothing is tuned again
    again = compare_parts(own, model=model, documents=DOCUMENTS, folder=tmp_path / "parts", last=1)
    assert again["parts"] == found["parts"]
    with pytest.raises(RecipeError, match="is of another recipe, model or documents"):
        compare_parts(
            recipe(seed=5), model=model, documents=DOCUMENTS, folder=tmp_path / "parts", last=1
        )
    path = tmp_path / "parts" / "scores" / "last-1.json"
    path.write_text(path.read_text().replace("-", "", 1))
    with pytest.raises(ResultError, match=r"last-1\.json is not as it was written.*; delete it"):
        compare_parts(own, model=model, documents=DOCUMENTS, folder=tmp_path / "parts", last=1)


def test_another_target_is_refused(tmp_path):
    with pytest.raises(InputError, match="target 'sinks'"):
        compare_parts(
            recipe(gradient={"target": "last"}), model=tiny(), documents=DOCUMENTS, folder=tmp_path
        )
