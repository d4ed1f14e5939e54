"""The whole command ``act-harness methods`` on two tiny tasks."""

from __future__ import annotations

import json

import pytest
from method_runs import DOCUMENTS, RECIPE
from own_tasks import caller, few_tasks

from act_harness.search.documents import write_documents


@pytest.fixture
def call(monkeypatch, capsys):
    return caller(monkeypatch, capsys)


@pytest.fixture
def arguments(tiny_checkpoint, tmp_path):
    write_documents(tmp_path / "documents.json", DOCUMENTS)
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    return (
        "methods", tmp_path / "recipe.yaml", "--documents", tmp_path / "documents.json",
        "--pretrained", tiny_checkpoint, "--model-args", "dtype=float32", "--device", "cpu",
        "--output", tmp_path / "out",
    )  # fmt: skip


def test_prepared_documents_give_a_table_and_a_second_call_adds_a_method(call, arguments, tmp_path):
    done = call(*arguments, "--methods", "signed,gate")
    assert done.code == 0, done.err
    stored = json.loads((tmp_path / "out/methods.json").read_text())
    assert stored["documents"]["evaluation"] == {"a": 8, "b": 8}
    assert [*stored["methods"]] == ["signed", "gate"]
    assert [*stored["equal_strength"]["methods"]] == ["signed", "gate"]
    assert stored["columns"]["supervised_other_tasks"] == ["b"]
    fitted = min(stored["documents"]["search"][t] + stored["documents"]["verify"][t] for t in "ab")
    text = (tmp_path / "out/methods.md").read_text()
    assert text.count(f"(fitted on as few as {fitted} of a task: mostly noise below 50)") == 2
    signed = stored["methods"]["signed"]
    assert signed["columns"]["raw"]["by_task"]["a"] == signed["columns"]["raw"]["accuracy"]
    assert signed["columns"]["raw"]["difference"] == pytest.approx(
        signed["columns"]["raw"]["accuracy"] - stored["untouched"]["raw"]["a"]
    )
    assert "| signed |" in done.out
    before = (tmp_path / "out/scores/signed.json").stat().st_mtime_ns

    done = call(*arguments, "--methods", "signed,gate,random-heads-[12]", "--no-equal-strength")
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "out/methods.json").read_text())
    assert [*again["methods"]] == ["signed", "gate", "random-heads-1", "random-heads-2"]
    assert again["methods"]["signed"]["columns"]["raw"]["by_task"] == signed["columns"]["raw"][
        "by_task"
    ]  # fmt: skip
    assert "equal_strength" not in again
    assert (tmp_path / "out/scores/signed.json").stat().st_mtime_ns == before

    done = call(*arguments, "--methods", "signed", "--seed", "5")
    assert (done.code, done.err.count("another recipe; give another --output")) == (2, 1)


def test_tasks_of_lm_eval_are_judged_on_held_out_documents(call, tiny_checkpoint, tmp_path):
    pytest.importorskip("vaderSentiment")
    (tmp_path / "recipe.yaml").write_text(
        "tasks: [act_demo_sentiment, act_demo_word]\nsamples: 4\nverify_samples: 4\n"
        "judge_samples: 0\n"
    )
    with few_tasks():
        done = call(
            "methods", tmp_path / "recipe.yaml",
            "--pretrained", tiny_checkpoint, "--model-args", "dtype=float32", "--device", "cpu",
            "--output", tmp_path / "out", "--methods", "one-strength", "--held-out", "6",
        )  # fmt: skip
    assert done.code == 0, done.err
    stored = json.loads((tmp_path / "out/methods.json").read_text())
    assert stored["documents"]["evaluation"] == {"act_demo_sentiment": 6, "act_demo_word": 6}
    assert stored["columns"]["batch"] == ["act_demo_sentiment"]
    assert stored["columns"]["by_characters_other_tasks"] == ["act_demo_word"]


def test_held_out_belongs_to_documents_that_are_drawn(call, arguments):
    done = call(*arguments, "--held-out", "4")
    assert done.code == 2
    assert "drawn already" in done.err
