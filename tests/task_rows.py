"""Hand-made rows for every dataset that a task reads, and the tasks built on them.

The rows were written for these tests: no benchmark's text is in this repository. Every dataset has
the columns and class names of its namesake on the hub, and at least one row of each class in the
split that is scored.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import yaml
from datasets import ClassLabel, Features, List, Value
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

REPOSITORY = Path(__file__).resolve().parents[1]
TASKS = REPOSITORY / "tasks"
TEXT, INTEGER = Value("string"), Value("int64")

Row = dict[str, Any]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SUBJECTS = _module(TASKS / "mmlu" / "make_subjects.py").CATEGORIES
SQUAD = _module(TASKS / "squad" / "squad_metrics.py")


def names(*classes: str) -> ClassLabel:
    return ClassLabel(names=list(classes))


def lettered(question: str, *texts: str, key: str, labels: str = "ABCDE", **more: str) -> Row:
    """A row with `choices.text`, `choices.label` and `answerKey`."""
    choices = {"text": list(texts), "label": list(labels[: len(texts)])}
    return {"question": question, "choices": choices, "answerKey": key, **more}


LETTERED = {"choices": {"text": List(TEXT), "label": List(TEXT)}, "answerKey": TEXT}
ANSWERS = {"text": List(TEXT), "answer_start": List(Value("int32"))}

_WORDS = (
    *("stone", "river", "lamp", "chair", "road", "cloud", "coin"),
    *("rope", "door", "bell", "leaf", "horn", "drum", "nail"),
)


def _numbered(column: str, classes: int, label: str = "label", **more: Any) -> list[Row]:
    """One row for each class."""
    return [{column: f"a text about the {_WORDS[n]} .", label: n, **more} for n in range(classes)]


def _squad(question: str, *texts: str) -> Row:
    return {
        "id": question.replace(" ", ""),
        "title": "Harbour",
        "context": "The harbour of Ostrey was dug in 1804. Its two lamps burn whale oil.",
        "question": question,
        "answers": {"text": list(texts), "answer_start": [0] * len(texts)},
    }


_SST2 = [
    {"sentence": "the tide of charm never comes in ", "label": 0, "idx": 0},
    {"sentence": "a warm and wily comedy ", "label": 1, "idx": 1},
]
_SETFIT = {"text": TEXT, "label": INTEGER, "label_text": TEXT}
_FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
_SST5 = [
    {"text": f"it is a {name} kind of film .", "label": n, "label_text": name}
    for n, name in enumerate(_FIVE)
]
_SUBJ = [
    {"text": "the sisters run an inn by the sea .", "label": 0, "label_text": "objective"},
    {"text": "you will leave it humming .", "label": 1, "label_text": "subjective"},
]
_DBPEDIA = names(
    *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder"),
    *("MeanOfTransportation", "Building", "NaturalPlace", "Village", "Animal"),
    *("Plant", "Album", "Film", "WrittenWork"),
)
_CB = [
    {
        "premise": "Ann said that it rained. It did.",
        "hypothesis": "it rained",
        "idx": 0,
        "label": 0,
    },
    {"premise": "Ann knows that it is dry.", "hypothesis": "it rains", "idx": 1, "label": 1},
    {"premise": "Ann wonders about rain.", "hypothesis": "it rains", "idx": 2, "label": 2},
]
_BOOLQ = [
    {"question": "is the lake salt", "passage": "The lake is fresh.", "idx": 0, "label": 0},
    {"question": "is the lake deep", "passage": "The lake is 90 m deep.", "idx": 1, "label": 1},
]
_COPA = [
    {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "It sang.",
     "question": "effect", "idx": 0, "label": 0},
    {"premise": "The dog barked.", "choice1": "It slept.", "choice2": "The bell rang.",
     "question": "cause", "idx": 1, "label": 1},
]  # fmt: skip
_HELLASWAG = [
    {"ctx": f"A man number {n} opens a tin. he", "label": str(n),
     "endings": ["eats the tin.", "closes the sea.", "takes out beans.", "paints [substeps] it."],
     "ind": n, "activity_label": "Cooking", "ctx_a": "", "ctx_b": "he", "source_id": "x",
     "split": "val", "split_type": "indomain"}
    for n in range(4)
]  # fmt: skip
_ARC = [
    lettered("Which one swims?", "cat", "carp", "crow", "cow", key="B", id="letters"),
    lettered("Which one flies? ", "cat", "carp", "crow", "cow", key="3", labels="1234", id="n"),
    lettered("Which one barks?", "dog", "hen", "bee", key="A", id="three"),
    lettered("Which one stings?", "dog", "hen", "ox", "ant", "bee", key="E", id="five"),
    lettered("Which one brays?", "dog", "hen", "ox", "ass", key="4", labels="1234", id="n4"),
]
_CSQA = [
    lettered(f"Where is tool {key} kept?", "shed", "soup", "sky", "sock", "song", key=key,
             id=key, question_concept="tool")
    for key in "ABCDE"
]  # fmt: skip
_OBQA = [
    {"question_stem": f"Ice number {key} is", "id": key,
     **{k: v for k, v in lettered("", "cold", "hot", "loud", "sweet", key=key).items()
        if k != "question"}}
    for key in "ABCD"
]  # fmt: skip
_PIQA = [
    {"goal": "Open a jar ", "sol1": "Turn the lid.", "sol2": "Turn the room.", "label": 0},
    {"goal": "Dry a plate", "sol1": "Bury it.", "sol2": "Wipe it.", "label": 1},
]
_V1 = [
    _squad("When was the harbour dug?", "1804", "in 1804"),
    _squad("What do the lamps burn?", "whale oil"),
]
_V2 = [*_V1, _squad("Who owns the harbour?")]

# dataset -> configuration -> (columns, the split that is scored, the few-shot split, rows)
HUB: dict[str, dict[str | None, tuple[dict[str, Any], str, str, list[Row]]]] = {
    "nyu-mll/glue": {
        "sst2": (
            {"sentence": TEXT, "label": names("negative", "positive"), "idx": Value("int32")},
            "validation", "train", _SST2,
        )
    },
    "SetFit/sst5": {None: (_SETFIT, "validation", "train", _SST5)},
    "cornell-movie-review-data/rotten_tomatoes": {
        None: ({"text": TEXT, "label": names("neg", "pos")}, "validation", "train",
               _numbered("text", 2))
    },
    "SetFit/subj": {None: (_SETFIT, "test", "train", _SUBJ)},
    "fancyzhx/ag_news": {
        None: ({"text": TEXT, "label": names("World", "Sports", "Business", "Sci/Tech")},
               "test", "train", _numbered("text", 4))
    },
    "CogComp/trec": {
        None: (
            {"text": TEXT, "coarse_label": names("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")},
            "test", "train", _numbered("text", 6, "coarse_label"),
        )
    },
    "fancyzhx/dbpedia_14": {
        None: ({"label": _DBPEDIA, "title": TEXT, "content": TEXT}, "test", "train",
               _numbered("content", 14, title="A title"))
    },
    "aps/super_glue": {
        "cb": (
            {"premise": TEXT, "hypothesis": TEXT, "idx": Value("int32"),
             "label": names("entailment", "contradiction", "neutral")},
            "validation", "train", _CB,
        ),
        "boolq": (
            {"question": TEXT, "passage": TEXT, "idx": Value("int32"),
             "label": names("False", "True")},
            "validation", "train", _BOOLQ,
        ),
        "copa": (
            {"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT,
             "idx": Value("int32"), "label": names("choice1", "choice2")},
            "validation", "train", _COPA,
        ),
    },
    "Rowan/hellaswag": {
        None: (
            {"ind": Value("int32"), "activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT,
             "ctx": TEXT, "endings": List(TEXT), "source_id": TEXT, "split": TEXT,
             "split_type": TEXT, "label": TEXT},
            "validation", "train", _HELLASWAG,
        )
    },
    "allenai/ai2_arc": {
        config: ({"id": TEXT, "question": TEXT, **LETTERED}, "validation", "train", _ARC)
        for config in ("ARC-Easy", "ARC-Challenge")
    },
    "allenai/openbookqa": {
        "main": ({"id": TEXT, "question_stem": TEXT, **LETTERED}, "validation", "train", _OBQA)
    },
    "tau/commonsense_qa": {
        None: ({"id": TEXT, "question": TEXT, "question_concept": TEXT, **LETTERED},
               "validation", "train", _CSQA)
    },
    "baber/piqa": {
        None: ({"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": names("0", "1")},
               "validation", "train", _PIQA)
    },
    "rajpurkar/squad": {
        "plain_text": (
            {"id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT, "answers": ANSWERS},
            "validation", "train", _V1,
        )
    },
    "rajpurkar/squad_v2": {
        "squad_v2": (
            {"id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT, "answers": ANSWERS},
            "validation", "train", _V2,
        )
    },
    "cais/mmlu": {
        subject: (
            {"question": TEXT, "subject": TEXT, "choices": List(TEXT),
             "answer": names("A", "B", "C", "D")},
            "test", "dev",
            [
                {"question": f"Which of these is fact {n} of {subject.replace('_', ' ')}? ",
                 "subject": subject, "choices": ["north", "south", "east", "west"], "answer": n}
                for n in range(4)
            ],
        )
        for category in SUBJECTS.values() for subject in category
    },
}  # fmt: skip


def load(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
    """Stand in for ``datasets.load_dataset``."""
    if path not in HUB:
        raise FileNotFoundError(f"Couldn't find any data file at {path}")
    if name not in HUB[path]:
        raise ValueError(f"BuilderConfig {name!r} not found")
    columns, scored, shots, rows = HUB[path][name]
    splits = {scored: rows, shots: 2 * [_earlier(row) for row in rows]}
    if path == "cais/mmlu":
        splits["validation"] = splits["dev"]
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(some, Features(columns))
            for split, some in splits.items()
        }
    )


def _earlier(row: Row) -> Row:
    """Return a row for few-shot examples: another one, that says where it is from."""
    column = next(key for key, value in row.items() if isinstance(value, str) and " " in value)
    return {**row, column: f"(earlier) {row[column]}"}


GOOD = ("graceful", "joyous", "restful", "sociable", "fearless", "cheerful", "heroic", "likable")
BAD = ("wrathful", "joyless", "careless", "horrific", "fearful", "nervous", "toxic", "terrible")
UNCLEAR = (("curious", 0.9, 0.5), ("furtive", -2.0, 1.4), ("wrath", -2.5, 0.5))


def write_lexicon(folder: Path) -> None:
    """Write a package of the name that the demo tasks look for, with a few rated words."""
    rated = [*((w, 2.1, 0.7) for w in GOOD), *((w, -2.2, 0.8) for w in BAD), *UNCLEAR]
    package = folder / "vaderSentiment"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('nothing needs to import it')\n")
    lines = [f"{word}\t{mean}\t{deviation}\t[]\n" for word, mean, deviation in rated]
    (package / "vader_lexicon.txt").write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def hand_made() -> Iterator[None]:
    """Let every task read the rows of this file."""
    with mock.patch.object(datasets, "load_dataset", load):
        yield


@functools.cache
def manager(folder: Path = TASKS) -> TaskManager:
    """Return a task manager that knows this project's tasks only (lm-eval's take seconds)."""
    return TaskManager(include_path=str(folder), include_defaults=False)


def build(*tasks: str, folder: Path = TASKS) -> dict[str, ConfigurableTask]:
    """Return tasks (groups resolved) on the hand-made rows."""
    with hand_made():
        return manager(folder).load(list(tasks))["tasks"]


@functools.cache
def real(hub: Path) -> dict[str, ConfigurableTask]:
    """Return all tasks of the paper on the rows in a data directory."""

    def safe_load(text: str) -> Any:
        # MMLU's card is long and is read 57 times; the parser in C makes that seconds.
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506

    with (
        mock.patch.object(yaml, "safe_load", safe_load),
        mock.patch.dict("os.environ", {"ACT_HARNESS_DATA_DIR": str(hub)}),
    ):
        return manager().load(["act_paper"])["tasks"]


def documents(task: ConfigurableTask, shots: int = 0, **settings: Any) -> list[list[Any]]:
    """Return the requests of a task, a list for each document."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    limit = settings.pop("limit", None)
    task.build_all_requests(limit=limit, **settings)
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    return list(by_document.values())
