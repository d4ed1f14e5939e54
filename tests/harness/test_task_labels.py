"""Every task's choices line up with its dataset's labels.

An answerer is told the dataset's own name of the right label (class name, label text, or the text
of the right option) and looks the choice up in a table written by hand below. It knows nothing of
the YAML files, so it is right everywhere only if they are.
"""

from __future__ import annotations

import collections
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_rows import BAD, GOOD, SUBJECTS, TASKS, build, documents, real, write_lexicon

# What the dataset calls a label, and the word that the model has to answer.
TABLE = {
    "act_sst2": {"negative": "negative", "positive": "positive"},
    "act_sst5": {
        "very negative": "terrible",
        "negative": "negative",
        "neutral": "neutral",
        "positive": "positive",
        "very positive": "great",
    },
    "act_mr": {"neg": "negative", "pos": "positive"},
    "act_subj": {"objective": "objective", "subjective": "subjective"},
    "act_agnews": {
        "World": "World",
        "Sports": "Sports",
        "Business": "Business",
        "Sci/Tech": "Technology",
    },
    "act_trec": {
        "ABBR": "Expression",
        "ENTY": "Entity",
        "DESC": "Description",
        "HUM": "Person",
        "LOC": "Location",
        "NUM": "Number",
    },
    "act_cb": {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
    "act_boolq": {"False": "False", "True": "True"},
    "act_dbpedia": {
        "Company": "company",
        "EducationalInstitution": "school",
        "Artist": "artist",
        "Athlete": "sport",
        "OfficeHolder": "politics",
        "MeanOfTransportation": "transportation",
        "Building": "building",
        "NaturalPlace": "nature",
        "Village": "village",
        "Animal": "animal",
        "Plant": "plant",
        "Album": "album",
        "Film": "film",
        "WrittenWork": "book",
    },
}
CLASSIFICATION = sorted(TABLE)


def _by_key(doc: dict[str, Any]) -> str:
    pairs = zip(doc["choices"]["label"], doc["choices"]["text"], strict=True)
    return next(text for label, text in pairs if label == doc["answerKey"])


# From a row to the text of its right option.
ANSWER: dict[str, Callable[[dict[str, Any]], str]] = {
    "act_hellaswag": lambda doc: doc["endings"][int(doc["label"])],
    "act_arc_easy": _by_key,
    "act_arc_challenge": _by_key,
    "act_openbookqa": _by_key,
    "act_commonsense_qa": _by_key,
    "act_piqa": lambda doc: [doc["sol1"], doc["sol2"]][doc["label"]],
    "act_copa": lambda doc: {0: doc["choice1"], 1: doc["choice2"]}[doc["label"]],
}
SUBJECT_TASKS = [f"act_mmlu_{subject}" for some in SUBJECTS.values() for subject in some]
LETTERS = sorted(ANSWER)


def answer_text(task: str, doc: dict[str, Any]) -> str:
    if task.startswith("act_mmlu"):
        return doc["choices"][doc["answer"]]
    return ANSWER[task](doc)


def label_name(task: Any, doc: dict[str, Any]) -> str:
    """Return the dataset's own name for the label of a row."""
    if "label_text" in doc:
        return doc["label_text"]
    column = "coarse_label" if "coarse_label" in doc else "label"
    return task.task_docs.features[column].int2str(doc[column])


def letters_of(context: str, text: str) -> list[str]:
    """Return the letters under which ``text`` stands in the last question of a prompt."""
    ends = re.escape(text) + r"(?=\n(?:[A-H]\. |Answer:))"
    return re.findall(rf"\n([A-H])\. {ends}", context)


def right_choices(task: Any, doc: dict[str, Any], context: str) -> list[str]:
    """Return what the answerer takes for right: one choice, or all that read the same."""
    name = task.task_name.removesuffix("_gen")
    if name in TABLE:
        return [TABLE[name][label_name(task, doc)]]
    return letters_of(context, answer_text(name, doc))


def score(task: Any, answer: Callable[[Any, dict[str, Any], str], list[str]], **how: Any) -> float:
    """Return the mean of a task's metric for an answerer, over rows where it names one choice."""
    values: list[float] = []
    rows = documents(task, **how)
    for requests in rows:
        doc, context = requests[0].doc, requests[0].args[0]
        chosen = answer(task, doc, context)
        assert chosen, f"{task.task_name}: no choice found for {doc}"
        if len(chosen) > 1:
            continue  # two options of a real row read the same
        if task.OUTPUT_TYPE == "generate_until":
            results: list[Any] = chosen
        else:
            results = [(0.0 if r.args[1] == f" {chosen[0]}" else -9.0, False) for r in requests]
        values += task.process_results(doc, results).values()
    assert len(values) > 0.9 * len(rows)
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    return build("act_paper", "act_multiple_choice_gen", "act_mmlu_gen")


def test_the_tables_name_every_task(tasks: dict[str, Any]) -> None:
    letters = [*LETTERS, *SUBJECT_TASKS]
    gen = [f"{name}_gen" for name in letters]
    squad = ["act_squad_v1", "act_squad_v2"]
    assert sorted(tasks) == sorted([*CLASSIFICATION, *letters, *gen, *squad])


def test_the_informed_answerer_is_always_right(tasks: dict[str, Any]) -> None:
    wrong = {
        name: value
        for name, task in tasks.items()
        if "squad" not in name and (value := score(task, right_choices)) != 1.0
    }
    assert wrong == {}


def test_every_class_has_a_row(tasks: dict[str, Any]) -> None:
    # Otherwise a swap of two choices could go unseen.
    for name in CLASSIFICATION:
        seen = {label_name(tasks[name], row) for row in tasks[name].task_docs}
        assert seen == set(TABLE[name]), name


def test_a_constant_answerer_gets_that_choices_share(tasks: dict[str, Any]) -> None:
    for name in CLASSIFICATION:
        task = tasks[name]
        shares = collections.Counter(label_name(task, row) for row in task.task_docs)
        for label, word in TABLE[name].items():
            expected = shares[label] / shares.total()
            assert score(task, lambda *_, word=word: [word]) == pytest.approx(expected)
    for letter in "ABC":  # the letters that every row has; each is right in one of five rows
        assert score(tasks["act_arc_easy"], lambda *_, one=letter: [one]) == 1 / 5
        assert score(tasks["act_arc_easy_gen"], lambda *_, one=letter: [one]) == 1 / 5


# For every YAML with choices, two of them swapped. The test above has to see each.
SWAPS = {
    "classification/sst2.yaml": ('"negative", "positive"]', '"positive", "negative"]'),
    "classification/sst5.yaml": ('"positive", "great"]', '"great", "positive"]'),
    "classification/mr.yaml": ('"negative", "positive"]', '"positive", "negative"]'),
    "classification/subj.yaml": ('"objective", "subjective"]', '"subjective", "objective"]'),
    "classification/agnews.yaml": ('"World", "Sports"', '"Sports", "World"'),
    "classification/trec.yaml": ('"Person", "Location"', '"Location", "Person"'),
    "classification/cb.yaml": ('"No", "Maybe"]', '"Maybe", "No"]'),
    "classification/boolq.yaml": ('"False", "True"]', '"True", "False"]'),
    "classification/dbpedia.yaml": ('"animal", "plant"', '"plant", "animal"'),
    "multiple_choice/hellaswag.yaml": ('"B", "C", "D"]', '"C", "B", "D"]'),
    "multiple_choice/piqa.yaml": ('["A", "B"]', '["B", "A"]'),
    "multiple_choice/copa.yaml": ("{{choice1}}\\nB. {{choice2}}", "{{choice2}}\\nB. {{choice1}}"),
    "multiple_choice/openbookqa.yaml": ("'ABCDEFGH'[loop", "'BACDEFGH'[loop"),
    "multiple_choice/_answer_key_yaml": ("{{'ABCDEFGH'[:", "{{'BACDEFGH'[:"),
    "mmlu/_mmlu_yaml": ('"A", "B", "C", "D"]', '"A", "C", "B", "D"]'),
}  # fmt: skip
READERS = {
    "_answer_key_yaml": ["act_arc_easy", "act_arc_challenge", "act_commonsense_qa"],
    "_mmlu_yaml": ["act_mmlu_anatomy", "act_mmlu_virology"],
}


@pytest.fixture
def lexicon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lexicon(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def demo_choices(task: Any, doc: dict[str, Any], context: str) -> list[str]:
    """Return the right choice of a demo row from its words alone."""
    del context
    if task.task_name == "act_demo_word":
        asked = GOOD if "good, wonderful" in doc["text"] else BAD
        return [word for word in doc["choices"] if word in asked]
    # The writer's own view is before "although" and after "but" and "For us".
    own = re.split(r"although|but|For us", doc["text"])
    words = own[0 if "although" in doc["text"] else 1].replace(".", " ").replace(",", " ").split()
    return ["positive" if set(words) & set(GOOD) else "negative"]


@pytest.mark.usefixtures("lexicon")
def test_demo_labels_line_up() -> None:
    for task in build("act_demo").values():
        assert score(task, demo_choices) == 1.0
    for word in ("negative", "positive"):
        (sentiment,) = build("act_demo_sentiment").values()
        assert score(sentiment, lambda *_, one=word: [one]) == 0.5


@pytest.mark.usefixtures("lexicon")
def test_swapped_demo_choices_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS, folder)
    for file, before, after in (
        ("sentiment", '["negative", "positive"]', '["positive", "negative"]'),
        ("word", "doc_to_choice: choices", 'doc_to_choice: "{{choices|reverse|list}}"'),
    ):
        path = folder / "demo" / f"{file}.yaml"
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1
        path.write_text(text.replace(before, after), encoding="utf-8")
        (task,) = build(f"act_demo_{file}", folder=folder).values()
        assert score(task, demo_choices) < 1.0


@pytest.mark.parametrize("file", SWAPS)
def test_two_swapped_choices_are_seen(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS, folder)
    before, after = SWAPS[file]
    path = folder / file
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")
    for name in READERS.get(path.name, [f"act_{path.stem}"]):
        (task,) = build(name, folder=folder).values()
        assert score(task, right_choices) < 1.0


REAL = [*CLASSIFICATION, *LETTERS, "act_mmlu"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_labels_line_up(name: str, shared_dir: Path) -> None:
    for task_name, task in real(shared_dir / "hub").items():
        if task_name == name or (name == "act_mmlu" and task_name.startswith(name)):
            assert score(task, right_choices, limit=60) == 1.0, task_name
