"""What there is, by name: `tasks`, every `--list`, and the nearest name where one is wrong."""

from __future__ import annotations

import json
import re

import datasets
import pytest
from installed import REPOSITORY
from own_tasks import caller, write_own_tasks

from act_harness.calibration import PRESETS
from act_harness.errors import RecipeError, TaskError
from act_harness.harness.fetch import Source, save_dataset
from act_harness.harness.task_list import list_tasks
from act_harness.regress.suite import load_suite, shipped_suites
from act_harness.search.methods.registry import METHODS
from act_harness.search.recipe import make_recipe, shipped_recipes


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.delenv("ACT_HARNESS_DATA_DIR", raising=False)
    return caller(monkeypatch, capsys)


def documents(found, name):
    return next(one.documents for one in (*found.groups, *found.tasks) if one.name == name)


# -- tasks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACT_HARNESS_DATA_DIR", raising=False)
        return list_tasks()


def test_every_task_and_group_is_listed_with_its_documents(everything):
    files = list((REPOSITORY / "tasks").rglob("*.yaml"))
    assert len(everything.groups) + len(everything.tasks) == len(files)
    assert [one.name for one in everything.tasks if not one.documents] == []
    assert all(one.split and one.source for one in everything.tasks)
    assert documents(everything, "act_sst2") == 872
    # The sizes of the benchmarks' papers: 57 subjects of MMLU; SQuAD 1.1 and 2.0.
    assert documents(everything, "act_mmlu") == documents(everything, "act_mmlu_gen") == 14_042
    assert documents(everything, "act_qa") == 10_570 + 11_873
    (paper,) = (one for one in everything.groups if one.name == "act_paper")
    assert len(paper.tasks) == 9 + 7 + 57 + 2
    assert paper.members == ("act_classification", "act_multiple_choice", "act_mmlu", "act_qa")


def test_no_published_number_is_of_a_dataset_that_no_task_reads(everything):
    content = json.loads((REPOSITORY / "tasks/documents.json").read_text(encoding="utf-8"))
    assert set(content["rows"]) == {
        one.source for one in everything.tasks if not one.source.startswith("built by")
    }


def test_a_number_that_nobody_has_checked_says_so(everything, tmp_path, call):
    unchecked = {one.name for one in everything.tasks if not one.checked}
    assert unchecked == {"act_subj"}
    assert {one.name for one in everything.groups if not one.checked} == {
        "act_classification",
        "act_paper",
    }
    done = call("tasks", "act_subj,act_sst2")
    assert re.search(r"^act_subj +2,000\?  test", done.out, re.MULTILINE)
    assert re.search(r"^act_sst2 +872  validation", done.out, re.MULTILINE)
    assert "With ?: not held against the dataset" in done.out
    done = call("tasks", "act_sst2")
    assert "?" not in done.out
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0], "label_text": ["x"]})
    split = datasets.DatasetDict(train=rows, test=rows)
    save_dataset(split, tmp_path, source=Source("SetFit/subj", None, None, "act_subj"))
    (counted,) = list_tasks(["act_subj"], data_dir=tmp_path).tasks
    assert (counted.documents, counted.checked) == (1, True)


def test_rows_of_a_data_folder_are_counted(tmp_path):
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 0]})
    split = datasets.DatasetDict(train=rows, validation=rows.select([0, 1]))
    save_dataset(split, tmp_path, source=Source("nyu-mll/glue", "sst2", None, "act_sst2"))
    found = list_tasks(["act_classification"], data_dir=tmp_path)
    assert documents(found, "act_sst2") == 2
    assert documents(found, "act_mr") is None
    assert documents(found, "act_classification") is None
    assert documents(list_tasks(["act_demo_*"], data_dir=tmp_path), "act_demo_word") == 200


def test_tasks_of_a_folder_are_listed_too(tmp_path):
    own = write_own_tasks(tmp_path / "own", "fr_mc")
    found = list_tasks(["fr_mc"], include_path=[own])
    assert [(one.name, one.documents, one.source) for one in found.tasks] == [
        ("fr_mc", None, "json")
    ]


def test_what_a_file_of_others_can_say_is_shown_and_breaks_no_line(tmp_path, call):
    texts = {
        "escape": 'task: "we\\eird\\n\\e[31mname"\ndataset_path: json\ntest_split: test\n',
        "ring": "group: ring\ntask: [ring_too]\n",
        "too": "group: ring_too\ntask: [ring]\n",
        "bad": "task: bad\ndataset_path: [1]\n",
        "inline": "group: inline\ntask:\n  - task: act_demo_word\n    num_fewshot: 3\n"
        "  - group: within\n    task: [act_demo_sentiment, act_demo_word]\n",
        "broken": "task: [",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    done = call("tasks", "--include-path", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert "we\\x1bird\\n\\x1b[31mname" in done.out
    assert "\x1b" not in done.out
    assert re.search(r"^inline +2 +400  act_demo_word, act_demo_sentiment$", done.out, re.MULTILINE)
    assert re.search(r"^ring +0 ", done.out, re.MULTILINE)
    assert re.search(r"^bad +-  -", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("names", "folders", "words"),
    [
        (["act_dmo"], [], "unknown task 'act_dmo'; did you mean 'act_demo'"),
        (["zzz*"], [], r"unknown task 'zzz\*'; without a name all are listed"),
        ([""], [], "unknown task ''"),
        (["act_demo"], ["gone"], "--include_path gone: no such folder"),
    ],
)
def test_a_name_that_is_none(names, folders, words):
    with pytest.raises(TaskError, match=words):
        list_tasks(names, include_path=folders)


def test_the_command_folds_many_tasks_of_one_dataset(call):
    done = call("tasks")
    assert done.code == 0
    lines = [re.split(r"  +", line) for line in done.out.splitlines()]
    assert ["act_mmlu_*", "14,042", "test", "choices", "cais/mmlu (57 configurations)"] in lines
    assert [
        "act_mmlu_*_gen",
        "14,042",
        "test",
        "generated",
        "cais/mmlu (57 configurations)",
    ] in lines
    assert ["act_demo", "2", "400", "act_demo_sentiment, act_demo_word"] in lines
    assert "act_mmlu_anatomy  " not in done.out
    done = call("tasks", "act_mmlu_stem,act_demo_word")
    assert done.code == 0
    assert "act_mmlu_anatomy " in done.out
    assert re.search(r"^act_demo_word +200  test", done.out, re.MULTILINE)


def test_an_unknown_task_and_a_folder_that_is_none_are_bad_input(call, tmp_path):
    assert call("tasks", "act_dmo").code == 2
    done = call("tasks", "--data-dir", tmp_path / "gone")
    assert done.code == 2
    assert "is not a folder" in done.err


# -- --list ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("search", shipped_recipes()),
        ("regress", shipped_suites()),
        ("methods", [name for name in METHODS if not name.startswith("random-heads-")]),
        ("sinks", PRESETS),
        ("explore", PRESETS),
    ],
)
def test_list_names_all_and_asks_for_nothing_else(call, command, names):
    done = call(command, "--list")
    assert (done.code, done.err) == (0, "")
    listed = {line.split("  ")[0] for line in done.out.splitlines()[1:]}
    assert set(names) <= listed
    assert len(listed) <= len(names) + 1


def test_list_of_suites_says_which_can_be_held_and_follows_the_folder(call, tmp_path):
    out = call("regress", "--list").out
    assert re.search(r"^smollm2-goldens +stored ", out, re.MULTILINE)
    assert re.search(r"^llama-2-7b-chat +none yet ", out, re.MULTILINE)
    done = call("regress", "--list", "--baselines", tmp_path)
    assert done.code == 2
    assert "holds no suite" in done.err
    (tmp_path / "mine").mkdir()
    text = (REPOSITORY / "results/baselines/smollm2-goldens/suite.yaml").read_text()
    (tmp_path / "mine/suite.yaml").write_text(text.replace("smollm2-goldens", "mine"))
    assert re.search(r"^mine +none yet ", call("regress", "--baselines", tmp_path, "--list").out,
                     re.MULTILINE)  # fmt: skip


def test_regress_without_a_suite_says_where_they_are_listed(call):
    done = call("regress")
    assert done.code == 2
    assert "give --suite NAME, --list shows those there are" in done.err


# -- the nearest name ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"method": "gradiant"}, "found 'gradiant', expected .*; did you mean 'gradient'"),
        ({"gradient": {"target": "sink"}}, "gradient.target: .*; did you mean 'sinks'"),
        ({"gradient": {"epoch": 3}}, "gradient.epoch: unknown key; did you mean 'epochs'"),
        ({"controls": {"seeed": 3}}, "controls.seeed: unknown key; did you mean"),
        ({"strengths": [{"mass": "damp", "bta": 0.1}]}, "bta: unknown key; did you mean 'beta'"),
        ({"gradient": {"zzz": 3}}, "gradient.zzz: unknown key$"),
        ({"method": 3}, "method: found 3, expected"),
    ],
)
def test_a_recipes_words_and_inner_keys_have_a_nearest(content, words):
    with pytest.raises(RecipeError, match=words):
        make_recipe({"tasks": ["a"], **content})


def test_a_suites_inner_keys_have_a_nearest(tmp_path):
    text = (REPOSITORY / "results/baselines/smollm2-goldens/suite.yaml").read_text()
    (tmp_path / "suite.yaml").write_text(text.replace("  package:", "  packge:"))
    with pytest.raises(RecipeError, match=r"model\.packge: unknown key; did you mean 'package'"):
        load_suite(str(tmp_path))


def test_a_misspelled_pretrained_is_the_one_that_is_unknown(call):
    done = call("eval", "--tasks", "act_demo", "--model-args", "pretraned=x", "--artifact", "none")
    assert done.code == 2
    assert "'pretraned' is unknown, did you mean 'pretrained'?" in done.err
