"""Every task and group loads, builds the prompt it built before, and can be scored."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks._index import Kind
from task_rows import (
    REPOSITORY,
    SUBJECTS,
    TASKS,
    build,
    documents,
    hand_made,
    load,
    manager,
    real,
    write_lexicon,
)

from act_harness.errors import InfrastructureError

GOLDEN = REPOSITORY / "tests" / "data" / "golden_prompts.json"
GOLDEN_REAL = REPOSITORY / "tests" / "data" / "golden_prompts_real.json"

CLASSIFICATION = ["sst2", "sst5", "mr", "subj", "agnews", "trec", "cb", "boolq", "dbpedia"]
LETTERS = ["hellaswag", "arc_easy", "arc_challenge", "piqa", "openbookqa", "copa", "commonsense_qa"]
SUBJECT_NAMES = [f"mmlu_{subject}" for some in SUBJECTS.values() for subject in some]
PAPER = [
    f"act_{name}" for name in [*CLASSIFICATION, *LETTERS, *SUBJECT_NAMES, "squad_v1", "squad_v2"]
]
GEN = [f"act_{name}_gen" for name in [*LETTERS, *SUBJECT_NAMES]]
DEMO = ["act_demo_sentiment", "act_demo_word"]
OUTSIDE = ["act_commonsense_qa_text"]  # of no group: what the joint recipes search with
CATEGORIES = [f"act_mmlu_{name}" for name in ("stem", "humanities", "social_sciences", "other")]
FAMILIES = {"classification", "multiple_choice", "mmlu", "squad", "demo", "groups"}
GROUPS = {
    "act_classification": [f"act_{name}" for name in CLASSIFICATION],
    "act_multiple_choice": [f"act_{name}" for name in LETTERS],
    "act_multiple_choice_gen": [f"act_{name}_gen" for name in LETTERS],
    "act_mmlu": CATEGORIES,
    "act_mmlu_gen": [f"{name}_gen" for name in CATEGORIES],
    "act_qa": ["act_squad_v1", "act_squad_v2"],
    "act_demo": DEMO,
    "act_paper": ["act_classification", "act_multiple_choice", "act_mmlu", "act_qa"],
    **{
        f"act_mmlu_{category}{suffix}": [f"act_mmlu_{subject}{suffix}" for subject in subjects]
        for category, subjects in SUBJECTS.items()
        for suffix in ("", "_gen")
    },
}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    return build("act_paper", "act_multiple_choice_gen", "act_mmlu_gen")


# ---------------------------------------------------------------------------- the files


def test_every_yaml_file_is_a_task_or_group() -> None:
    # lm-eval skips a broken file without a word; then the name is missing here.
    index = {k: entry for k, entry in manager().task_index.items() if entry.kind is not Kind.TAG}
    assert {entry.yaml_path.resolve() for entry in index.values()} == {
        path.resolve() for path in TASKS.rglob("*.yaml")
    }
    ours = {name for name, entry in index.items() if _family(entry.yaml_path) in FAMILIES}
    assert sorted(ours) == sorted([*PAPER, *GEN, *DEMO, *OUTSIDE, *GROUPS])


def _family(path: Path) -> str:
    return path.relative_to(TASKS).parts[0]


def test_groups_hold_what_their_name_says() -> None:
    for name, members in GROUPS.items():
        settings = manager().task_index[name].cfg
        assert settings["task"] == members, name
        for metric in settings.get("aggregate_metric_list", []):
            assert metric["weight_by_size"] is False, name
    assert "aggregate_metric_list" not in manager().task_index["act_paper"].cfg
    assert [len(GROUPS["act_classification"]), len(GROUPS["act_multiple_choice"])] == [9, 7]
    assert len(SUBJECT_NAMES) == len(set(SUBJECT_NAMES)) == 57


def test_the_mmlu_files_are_what_their_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make", TASKS / "mmlu" / "make_subjects.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    there = {
        str(path.relative_to(TASKS / "mmlu")): path.read_text(encoding="utf-8")
        for path in (TASKS / "mmlu").rglob("*.yaml")
    }
    assert there == make.files()


@pytest.mark.parametrize("name", sorted([*PAPER, *GEN, *DEMO]))
def test_settings(name: str) -> None:
    settings = manager().task_index[name].cfg
    assert "num_fewshot" not in settings  # it would block --num_fewshot
    assert settings["metadata"]["version"] == 1.0
    assert settings["description"].endswith("\n\n")
    assert settings["target_delimiter"] == " "
    assert settings["fewshot_delimiter"] == "\n\n"
    assert settings["fewshot_split"] == ("dev" if "mmlu" in name else "train")
    if "squad" not in name:
        metric = "exact_match" if name.endswith("_gen") else "acc"
        assert [one["metric"] for one in settings["metric_list"]] == [metric]


def test_no_template_is_a_yaml_file() -> None:
    # A stub is written for every *.yaml; a template must not get one, nor be taken for a task.
    for path in TASKS.rglob("_*"):
        assert path.suffix != ".yaml"


# ---------------------------------------------------------------------------- the prompts


def rendered(task: Any) -> dict[str, Any]:
    """Return the first document as a model gets it."""
    requests = documents(task, limit=1)[0]
    target = task.doc_to_target(requests[0].doc)
    if task.OUTPUT_TYPE == "generate_until":
        how = {"generate": requests[0].args[1]}
    else:
        how = {"choices": [request.args[1] for request in requests]}
    return {"prompt": requests[0].args[0], **how, "target": target}


def held(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored; with ACT_HARNESS_WRITE_GOLDEN=1, store ``found`` first."""
    if os.environ.get("ACT_HARNESS_WRITE_GOLDEN"):
        text = json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def test_golden_prompts(
    tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lexicon(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = {name: rendered(task) for name, task in (tasks | build("act_demo")).items()}
    stored = held(GOLDEN, found)
    assert set(stored) == set(found)
    for name, prompt in found.items():
        assert prompt == stored[name], name


@pytest.mark.slow
def test_golden_prompts_of_real_rows(shared_dir: Path) -> None:
    def digest(task: Any) -> str:
        texts = [[request.args for request in some] for some in documents(task, limit=5)]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    found = {name: digest(task) for name, task in real(shared_dir / "hub").items()}
    assert found == held(GOLDEN_REAL, found)


def test_golden_prompts_by_hand(tasks: dict[str, Any]) -> None:
    # Three of the stored prompts, written out from the design's tables and not by the code.
    assert rendered(tasks["act_sst2"]) == {
        "prompt": "Classify the sentiment of the user's message into one of the following "
        "categories:'positive' or 'negative'.\n\nSentence: the tide of charm never comes in  "
        "\nSentiment:",
        "choices": [" negative", " positive"],
        "target": 0,
    }
    assert rendered(tasks["act_copa"]) == {
        "prompt": "Generate the correct answer to the following question.\n\nThe cup fell. What "
        "is the effect?\nA. It broke.\nB. It sang.\nAnswer:",
        "choices": [" A", " B"],
        "target": 0,
    }
    squad = rendered(tasks["act_squad_v2"])
    assert squad["prompt"].startswith(
        "Answer question using information in the preceding background paragraph. If there is "
        'not enough information available in the background paragraph, answer "Not in '
        'background".\n\nTitle: Harbour\n\nBackground: The harbour'
    )
    assert squad["prompt"].endswith("\n\nQ: When was the harbour dug?\n\nA:")


def test_requests_from_two_rows(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        description = task.config.description
        for requests in documents(task, limit=2):
            contexts = {request.args[0] for request in requests}
            assert len(contexts) == 1, name
            (context,) = contexts
            assert context.startswith(description), name
            assert not context[-1].isspace(), name  # the choice brings its own space
            if task.OUTPUT_TYPE == "multiple_choice":
                choices = [request.args[1] for request in requests]
                assert len(set(choices)) == len(choices) > 1, name
                assert all(c[0] == " " and not c[1].isspace() for c in choices), name
            else:
                assert len(requests) == 1, name


def test_three_shots(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        for requests in documents(task, 3, limit=2):
            context = requests[0].args[0]
            rest = context.removeprefix(task.config.description)
            shown = rest.split("(earlier)")
            assert len(shown) == 4, name  # three examples, all from the few-shot split
            assert "(earlier)" not in rest.rpartition("\n\n")[2], name
            if "squad" not in name:
                *examples, last = rest.split("\n\n")
                assert len(examples) == 3, name
                for example in examples:  # an example is a prompt and one of the choices
                    end = last.rpartition("\n")[2].rpartition(" ")[2]  # "Answer:", "Type:" ...
                    stem, _, answer = example.rpartition(f"{end} ")
                    assert stem, name
                    assert answer in task.doc_to_choice(task.task_docs[0]) or "arc" in name, name


def test_few_shot_seed_decides(tasks: dict[str, Any]) -> None:
    task = tasks["act_dbpedia"]
    first = documents(task, 3, limit=1)[0][0].args[0]
    assert documents(task, 3, limit=1)[0][0].args[0] == first
    task.set_fewshot_seed(7)
    task.build_all_requests(limit=1)
    assert task.instances[0].args[0] != first


def chat(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    text = "".join(f"<{one['role']}>{one['content']}</>" for one in messages)
    return text + ("<assistant>" if add_generation_prompt else "")


def test_chat_template(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        how = {"apply_chat_template": True, "chat_template": chat}
        for shots in (0, 3):
            request = documents(task, shots, limit=1, **how)[0][0]
            context = request.args[0]
            assert context.startswith(f"<system>{task.config.description}</><user>"), name
            assert context.endswith("</><assistant>"), name
            assert context.count("(earlier)") == shots, name
            if task.OUTPUT_TYPE == "multiple_choice":
                assert not request.args[1][0].isspace(), name


# ---------------------------------------------------------------------------- odd rows


@pytest.mark.parametrize("name", ["act_arc_easy", "act_arc_challenge"])
def test_arc_rows_with_numbers_or_three_or_five_options(name: str, tasks: dict[str, Any]) -> None:
    rows = {some[0].doc["id"]: some for some in documents(tasks[name])}
    sizes = {key: [request.args[1] for request in some] for key, some in rows.items()}
    assert sizes["letters"] == sizes["n"] == [" A", " B", " C", " D"]
    assert sizes["three"] == [" A", " B", " C"]
    assert sizes["five"] == [" A", " B", " C", " D", " E"]
    assert {key: tasks[name].doc_to_target(some[0].doc) for key, some in rows.items()} == {
        "letters": 1,
        "n": 2,  # answerKey "3"
        "three": 0,
        "five": 4,
        "n4": 3,
    }
    for key, some in rows.items():
        prompt = some[0].args[0]
        assert "1." not in prompt, key  # letters by place, also where the row has numbers
        assert prompt.count("\nE. ") == (key == "five")
        assert prompt.count("\nD. ") == (key != "three")


def test_a_question_with_a_space_at_its_end(tasks: dict[str, Any]) -> None:
    # Kept as the row has it, inside the prompt; the prompt's own end has none.
    prompt = documents(tasks["act_arc_easy"])[1][0].args[0]
    assert "Which one flies? \nA. cat\n" in prompt
    assert prompt.endswith("\nD. cow\nAnswer:")
    assert "Open a jar \nA. " in documents(tasks["act_piqa"])[0][0].args[0]


# ---------------------------------------------------------------------------- scores


class Guesser(LM):
    """Likes the longest choice best, generates a letter, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, ...]] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(float(len(request.args[1])), False) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += [request.args for request in requests]
        return [" A" for _ in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def apply_chat_template(self, messages: list[dict[str, str]], **how: bool) -> str:
        return chat(messages, **how)

    tokenizer_name = "guesser"

    def chat_template(self, _: object = True) -> str:
        return "a template"


NAMES = ["act_paper", "act_multiple_choice_gen", "act_mmlu_gen"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{}, {"num_fewshot": 3}, {"apply_chat_template": True}],
    ids=str,
)
def test_every_task_and_group_gets_a_value_and_a_stderr(how: dict[str, Any]) -> None:
    model = Guesser()
    with hand_made():
        results = lm_eval.simple_evaluate(
            model=model, tasks=NAMES, task_manager=manager(), log_samples=False, **how
        )["results"]
    assert set(results) == {*PAPER, *GEN, *GROUPS} - {"act_demo"}
    for name, values in results.items():
        scores = [key for key in values if "," in key and "_stderr" not in key]
        if name == "act_paper":
            assert scores == []
            continue
        assert scores, name
        for key in scores:
            metric, kind = key.split(",")
            assert 0.0 <= values[key] <= 1.0, (name, key)
            if metric.startswith(("HasAns", "NoAns")):
                continue  # a group of rows: with very few rows it may hold one or none
            assert isinstance(values[f"{metric}_stderr,{kind}"], float), (name, key)


@pytest.mark.slow
def test_a_group_is_the_plain_mean_of_its_tasks() -> None:
    with hand_made():
        results = lm_eval.simple_evaluate(
            model=Guesser(),
            tasks=["act_classification", "act_multiple_choice_gen"],
            task_manager=manager(),
            log_samples=False,
        )["results"]
    for group, key in (
        ("act_classification", "acc,none"),
        ("act_multiple_choice_gen", "exact_match,letter"),
    ):
        values = [results[name][key] for name in GROUPS[group]]
        assert results[group][key] == pytest.approx(sum(values) / len(values))
        assert len(set(values)) > 1


def test_the_letter_counts_with_or_without_white_space() -> None:
    model = Guesser()
    with hand_made():
        results = lm_eval.simple_evaluate(
            model=model, tasks=["act_piqa_gen"], task_manager=manager(), log_samples=False
        )["results"]
    assert results["act_piqa_gen"]["exact_match,letter"] == 0.5  # " A" is right in one of two
    assert {json.dumps(asked[1], sort_keys=True) for asked in model.asked} == {
        json.dumps({"until": ["\n"], "max_gen_toks": 1, "do_sample": False}, sort_keys=True)
    }


# ---------------------------------------------------------------------------- places


SAMPLE = ["act_trec", "act_arc_easy_gen", "act_mmlu_virology", "act_squad_v2"]


@pytest.mark.slow
def test_stubs_with_an_absolute_include_work(tmp_path: Path, tasks: dict[str, Any]) -> None:
    # What an editable install puts into lm-eval's folder: one line for every *.yaml.
    stubs = tmp_path / "lm_eval" / "tasks" / "act_harness"
    for path in TASKS.rglob("*.yaml"):
        stub = stubs / path.relative_to(TASKS)
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"include: {json.dumps(str(path))}\n", encoding="utf-8")
    built = build("act_paper", "act_multiple_choice_gen", "act_mmlu_gen", folder=stubs)
    assert set(built) == set(tasks)
    for name in SAMPLE:
        assert rendered(built[name]) == rendered(tasks[name])
    assert sorted(manager(stubs).task_index) == sorted(manager().task_index)


def test_a_copied_folder_works(tmp_path: Path, tasks: dict[str, Any]) -> None:
    # What a wheel puts there.
    folder = tmp_path / "lm_eval" / "tasks" / "act_harness"
    shutil.copytree(TASKS, folder)
    built = build(*SAMPLE, folder=folder)
    for name in SAMPLE:
        assert rendered(built[name]) == rendered(tasks[name])
    assert built["act_squad_v2"].process_results({"answers": {"text": []}}, [""])["f1"] == 1.0


# ---------------------------------------------------------------------------- what is missing


def test_a_missing_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ACT_HARNESS_DATA_DIR", raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(InfrastructureError) as caught:
        manager().load(["act_sst2"])
    text = str(caught.value)
    assert "\n" not in text
    assert "dataset nyu-mll/glue (sst2) cannot be had" in text
    assert "act-harness fetch --tasks act_sst2 --dest DIR" in text
    assert "ACT_HARNESS_DATA_DIR=DIR" in text
    assert "HF_HOME" in text


def test_a_missing_split_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from task_rows import (
        manager,
    )

    def without_train(*args: Any, **kwargs: Any) -> Any:
        rows = load(*args, **kwargs)
        del rows["train"]
        return rows

    monkeypatch.setattr("datasets.load_dataset", without_train)
    with pytest.raises(
        InfrastructureError, match=r"SetFit/sst5 .*no split 'train', only validation"
    ):
        manager().load(["act_sst5"])


# ---------------------------------------------------------------------------- demo tasks


def test_demo_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(
        InfrastructureError, match=r"pip install 'vaderSentiment==3\.3\.2'"
    ) as caught:
        manager().load(["act_demo"])
    assert "\n" not in str(caught.value)


@pytest.fixture
def demo() -> dict[str, Any]:
    if importlib.util.find_spec("vaderSentiment") is None:
        pytest.skip("the package vaderSentiment (extra `demo`) is not installed")
    return manager().load(["act_demo"])["tasks"]


def test_demo_documents(demo: dict[str, Any]) -> None:
    for task in demo.values():
        train, test = task.dataset["train"], task.dataset["test"]
        assert len(train) == len(test) == 200
        assert len({str(row) for row in [*train, *test]}) == 400
        half = [row["label"] for row in test]
        assert len({half.count(label) for label in set(half)}) == 1  # balanced
    sentiment, word = demo["act_demo_sentiment"], demo["act_demo_word"]
    assert sentiment.dataset["test"][0]["text"] != sentiment.dataset["train"][0]["text"]
    assert {tuple(sentiment.doc_to_choice(row)) for row in sentiment.task_docs} == {
        ("negative", "positive")
    }
    choices = {
        split: {c for row in word.dataset[split] for c in row["choices"]}
        for split in ("train", "test")
    }
    assert not choices["train"] & choices["test"]
    assert all(len(set(row["choices"])) == 4 for row in word.task_docs)
    assert rendered(word)["prompt"].startswith(
        "Continue the list with a word that fits.\n\nThe hotel"
    )


def test_demo_labels_are_the_raters(demo: dict[str, Any]) -> None:
    spec = importlib.util.find_spec("vaderSentiment")
    lines = Path(spec.origin).with_name("vader_lexicon.txt").read_text(encoding="utf-8")
    mean = {line.split("\t")[0]: float(line.split("\t")[1]) for line in lines.splitlines()}
    for row in demo["act_demo_word"].task_docs:
        sides = [mean[choice] > 0 for choice in row["choices"]]
        assert sides.count(sides[row["label"]]) == 1
        assert sides[row["label"]] == ("good, wonderful" in row["text"])
    for row in demo["act_demo_sentiment"].task_docs:
        words = [w.strip(".,") for w in row["text"].split()]
        rated = [(w, mean[w] > 0) for w in words if abs(mean.get(w, 0)) >= 1.5]
        first_is_own = row["text"].startswith("The ")
        own = rated[0] if first_is_own else rated[-1]
        assert own[1] == bool(row["label"]), row["text"]


def test_demo_is_the_same_every_time(demo: dict[str, Any]) -> None:
    again = manager().load(["act_demo"])["tasks"]
    for name, task in demo.items():
        assert list(task.task_docs) == list(again[name].task_docs)


@pytest.mark.slow
def test_options_as_texts_have_no_letters_in_the_prompt(hub_dir, monkeypatch) -> None:
    """As stock lm-eval asks arc_easy; ``act_commonsense_qa`` is asked for letters."""
    monkeypatch.setenv("ACT_HARNESS_DATA_DIR", str(hub_dir))
    task = manager().load(OUTSIDE)["tasks"][OUTSIDE[0]]
    first = documents(task)[0]
    prompt = first[0].args[0]
    assert prompt.startswith("Question: ")
    assert prompt.endswith("\nAnswer:")
    assert "\nA. " not in prompt
    assert [one.args[1] for one in first] == [
        f" {text}" for text in first[0].doc["choices"]["text"]
    ]
