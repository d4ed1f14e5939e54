"""Documents of the search: lm-eval's own prompts, splits that never meet the evaluation's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask

from act_harness.artifact import ModelFacts
from act_harness.errors import TaskError
from act_harness.search import splits
from act_harness.search.documents import (
    facts_of_tokens,
    read_documents,
    write_documents,
)
from act_harness.search.prompting import Prompting
from act_harness.search.splits import held_out, load_documents


def encode(context: str, continuation: str) -> tuple[list[int], list[int]]:
    return [ord(c) for c in context], [ord(c) for c in continuation]


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"id": n, "text": f"text {n}", "label": n % 2} for n in range(start, start + count)]


def task(splits: dict[str, list[dict]], **settings) -> ConfigurableTask:
    names = {f"{split}_split": split for split in splits}
    return ConfigurableTask(
        config={
            "task": "made",
            "custom_dataset": lambda: datasets.DatasetDict(
                {split: datasets.Dataset.from_list(found) for split, found in splits.items()}
            ),
            "output_type": "multiple_choice",
            "doc_to_text": "Say: {{text}}\nKind:",
            "doc_to_choice": ["even", "odd"],
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}],
            **{key: names[key] for key in names if key != "train_split"},
            **({"training_split": "train"} if "train" in splits else {}),
            **settings,
        }
    )


def draw(made: ConfigurableTask, prompting: Prompting | None = None) -> splits._Draw:
    return splits._Draw("made", made, prompting or Prompting(), encode, 400, None)


def test_documents_are_lm_evals_own_requests():
    made = task({"train": rows(30), "test": rows(10, 100)})
    found = draw(made).documents(5, 4, 1)
    made.build_all_requests()
    first = made.instances[0]
    assert found.source == "train"
    assert found.evaluation == "test"
    context, answer = found.search[0].requests[1]
    text = "".join(map(chr, context))
    number = int(text.split()[2])
    assert text == first.args[0].replace("100", str(number))
    assert "".join(map(chr, answer)) == " odd"
    assert found.search[0].right == number % 2
    assert found.search[0].choices == ("even", "odd")


def test_splits_do_not_meet_and_depend_on_the_seed_alone():
    train = [*rows(20), *rows(10, 100), *rows(5)]  # some are evaluated, some come twice
    found = draw(task({"train": train, "test": rows(10, 100)})).documents(8, 8, 1)
    again = draw(task({"train": train[::-1], "test": rows(10, 100)})).documents(8, 8, 1)
    other = draw(task({"train": train, "test": rows(10, 100)})).documents(8, 8, 2)
    texts = [d.requests[0][0] for d in (*found.search, *found.verify)]
    evaluated = {tuple(map(ord, f"Say: text {n}\nKind:")) for n in range(100, 110)}
    assert len(set(texts)) == 16
    assert not evaluated & set(texts)
    assert found.search == again.search
    assert found.search != other.search


def test_a_task_with_one_split_is_divided_by_hash():
    made = task({"validation": rows(80)})
    drawer = draw(made)
    found = drawer.documents(5, 5, 1)
    assert found.source == "hash of validation"
    assert not any(held_out(d.key) for d in (*found.search, *found.verify))
    rest = drawer.held_out(100, 1)
    assert all(held_out(d.key) for d in rest)
    assert len(rest) > 20


def keys(documents) -> set[str]:
    return {document.key for document in documents}


@pytest.mark.parametrize(
    ("count", "verify", "judge", "parts"),
    [
        (30, 8, 12, (8, 12)),
        (15, 8, 12, (5, 5)),  # too few for both: half each
        (18, 3, 12, (3, 10)),
        (18, 12, 3, (10, 3)),
        (16, 12, 12, (6, 5)),  # the odd one chooses
        (9, 8, 12, (2, 2)),
        (8, 8, 12, (3, 0)),  # one alone says nothing
        (11, 0, 4, (0, 4)),
        (11, 4, 0, (4, 0)),
    ],
)
def test_three_splits_never_meet_and_share_what_there_is(count, verify, judge, parts):
    made = task({"train": rows(count), "test": rows(4, 900)})
    found = draw(made).documents(5, verify, 1, judge_samples=judge)
    splits = found.search, found.verify, found.judge
    assert tuple(map(len, splits)) == (5, *parts)
    assert len(keys(found.search) | keys(found.verify) | keys(found.judge)) == 5 + sum(parts)
    assert len({found.digest(split) for split in ("search", "verify", "judge")}) >= 2
    assert found.of("judge") == found.judge
    if verify:  # whoever judges, the same documents find heads, and the same choose where they can
        plain = draw(made).documents(5, verify, 1)
        assert plain.search == found.search
        assert found.verify == plain.verify[: len(found.verify)]


def test_a_task_divided_by_hash_gives_no_evaluated_document_to_the_judge():
    found = draw(task({"validation": rows(120)})).documents(5, 6, 1, judge_samples=6)
    assert (len(found.verify), len(found.judge)) == (6, 6)
    assert not keys(found.verify) & keys(found.judge)
    assert not any(held_out(key) for key in keys(found.verify) | keys(found.judge))
    assert {int(key[:8], 16) % 4 for key in keys(found.judge)} == {1}


def test_a_document_is_never_its_own_example():
    made = task({"train": rows(6), "test": rows(4, 100)}, fewshot_split="train", num_fewshot=5)
    for document in draw(made).documents(4, 2, 1).search:
        text = "".join(map(chr, document.requests[0][0]))
        parts = [part.split("\n")[0] for part in text.split("Say: ")[1:]]
        assert len(parts) == len(set(parts)) == 6


def test_documents_that_do_not_fit_are_left_out_and_counted():
    long = [{"id": n, "text": "x" * 500, "label": 0} for n in range(3)]
    long = [{**row, "text": row["text"] + str(row["id"])} for row in long]
    found = draw(task({"train": [*rows(8), *long], "test": rows(3, 100)})).documents(6, 2, 1)
    assert found.too_long <= 3
    assert all(len(d.requests[0][0]) < 400 for d in found.search)


@pytest.mark.parametrize(("short", "said"), [(0, "has 0 documents for the search"), (2, "remain")])
def test_too_few_documents_that_fit_are_said_to_be_too_long(short, said):
    """ "0 documents, the recipe asks for 2; lower samples" named no cause and no way out."""
    long = [{"id": n, "text": f"{n}" * 500, "label": 0} for n in range(3)]
    made = task({"train": [*rows(short), *long], "test": rows(3, 100)})
    with pytest.raises(TaskError, match=said) as caught:
        draw(made).documents(2, 2, 1)
    assert "(3 more are longer than the model's 400 tokens, or have" in str(caught.value)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": rows(4), "test": rows(2, 50)}, "has 4 documents for the search split"),
        ({"train": rows(6), "test": rows(2, 50)}, "verify split .* is empty"),
        ({"train": rows(6), "test": rows(6)}, "no documents outside"),
    ],
)
def test_too_few_documents_are_one_clear_line(splits, message):
    with pytest.raises(TaskError, match=message) as caught:
        draw(task(splits)).documents(6, 3, 1)
    assert "\n" not in str(caught.value)


def test_documents_without_a_label_are_drawn_where_none_is_needed():
    """Objective entropy needs no labels, but a task that has none could not be drawn."""
    blind = [{**one, "label": -1} for one in rows(30)]
    made = task({"train": blind, "test": rows(4, 100)})
    with pytest.raises(TaskError, match=r"needs exactly one right choice .*objective 'entropy'"):
        draw(made).documents(5, 4, 1)
    drawer = splits._Draw("made", made, Prompting(), encode, 400, None, labels=False)
    found = drawer.documents(5, 4, 1)
    assert {one.right for one in (*found.search, *found.verify)} == {-1}
    assert {one.right for one in drawer.held_out(4, 1)} == {0, 1}  # what is known stays known


def test_prepared_documents_come_back_as_they_were(tmp_path: Path):
    made = draw(task({"train": rows(30), "test": rows(10, 100)}))
    found = made.documents(5, 4, 1, judge_samples=6)
    write_documents(tmp_path / "d.json", [found])
    assert read_documents(tmp_path / "d.json") == [found]
    assert len(found.judge) == 6
    older = json.loads((tmp_path / "d.json").read_text())
    del older[0]["judge"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert read_documents(tmp_path / "older.json") == [replace(found, judge=())]
    (tmp_path / "bad.json").write_text(json.dumps({"no": 1}))
    with pytest.raises(TaskError, match="no search documents"):
        read_documents(tmp_path / "bad.json")
    with pytest.raises(TaskError, match="no such file"):
        read_documents(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("request_", "message"), [([[], [5]], "context without tokens"), ([[4], []], "no search doc")]
)
def test_prepared_documents_have_tokens(tmp_path: Path, request_, message):
    found = draw(task({"train": rows(30), "test": rows(10, 100)})).documents(5, 4, 1)
    path = tmp_path / "d.json"
    write_documents(path, [found])
    content = json.loads(path.read_text())
    content[0]["verify"][0]["requests"][0] = request_
    path.write_text(json.dumps(content))
    with pytest.raises(TaskError, match=message):
        read_documents(path)


def test_prepared_documents_say_whose_tokens_they_hold(tmp_path: Path):
    """A machine of another transformers release may give the same vocabulary another hash."""
    found = draw(task({"train": rows(30), "test": rows(10, 100)})).documents(5, 4, 1)
    facts = ModelFacts(
        id="m", architecture="A", num_hidden_layers=1, num_attention_heads=1, tokenizer_sha256="b"
    )
    assert facts_of_tokens(facts, [found]) == facts
    one, other = (replace(found, tokenizer_sha256=name) for name in ("a", "c"))
    write_documents(tmp_path / "d.json", [found, one])
    assert facts_of_tokens(facts, read_documents(tmp_path / "d.json")).tokenizer_sha256 == "a"
    with pytest.raises(TaskError, match="from 2 tokenizers"):
        facts_of_tokens(facts, [one, other])


def test_prepared_documents_are_of_the_model_whose_tokenizer_does_the_same(tmp_path):
    found = draw(task({"train": rows(30), "test": rows(10, 100)})).documents(5, 4, 1)
    known = {"tokenizer_sha256": "b", "tokenizer_probe_sha256": "same"}
    facts = ModelFacts(
        id="m", architecture="A", num_hidden_layers=1, num_attention_heads=1, **known
    )
    one = replace(found, tokenizer_sha256="a", tokenizer_probe_sha256="same")
    other = replace(one, tokenizer_sha256="c")  # the same ids, read by another release
    write_documents(tmp_path / "d.json", [one, other])
    read = facts_of_tokens(facts, read_documents(tmp_path / "d.json"))
    assert (read.tokenizer_sha256, read.tokenizer_probe_sha256) == ("a", "same")
    with pytest.raises(TaskError, match="token ids of another tokenizer"):
        facts_of_tokens(facts, [replace(one, tokenizer_probe_sha256="else")])
    # Documents of before there was a probe say nothing of ids, so neither does the artifact.
    old = facts_of_tokens(facts, [replace(found, tokenizer_sha256="a")])
    assert (old.tokenizer_sha256, old.tokenizer_probe_sha256) == ("a", None)


@pytest.mark.slow
def test_unknown_and_unfit_tasks_are_refused():
    settings = {
        "samples": 2,
        "verify_samples": 2,
        "seed": 1,
        "encode": encode,
        "max_length": 99,
    }
    with pytest.raises(TaskError, match="unknown task 'act_sst22'; did you mean 'act_sst2'"):
        load_documents(["act_sst22"], **settings)
    with pytest.raises(TaskError, match="no task was named"):
        load_documents([], **settings)


def test_a_task_that_is_not_multiple_choice_is_refused():
    made = task({"train": rows(4), "test": rows(2, 50)}, output_type="loglikelihood")
    with pytest.raises(TaskError, match="'made' is of type loglikelihood"):
        splits._check_kind("made", made)
