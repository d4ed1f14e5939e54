from __future__ import annotations

import json

import numpy as np
import pytest

from act_harness.errors import ResultError
from act_harness.evidence import results, samples

DATE = "2024-05-01T12-00-00.123456"


def sample(doc_id, *, acc=1.0, scores=(-1.0, -2.0), target="0", **more):
    """A row as lm-eval's tracker writes it."""
    choices = [" no", " yes", " maybe"][: len(scores)]
    return {
        "doc_id": doc_id,
        "doc": {"text": f"text {doc_id}", "passage": f"passage {doc_id // 2}"},
        "target": target,
        "arguments": {
            f"gen_args_{i}": {"arg_0": f"Q{doc_id}", "arg_1": choice}
            for i, choice in enumerate(choices)
        },
        "resps": [[[str(score), "False"]] for score in scores],
        "filtered_resps": [[str(score), "False"] for score in scores],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": f"doc{doc_id}",
        "prompt_hash": f"prompt{doc_id}",
        "target_hash": "t",
        "acc": acc,
        **more,
    }


def write(folder, tasks, *, date=DATE, groups=None, results_name=None):
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        task: {"alias": task, "sample_len": len(rows), "acc,none": 0.5, "acc_stderr,none": 0.1}
        for task, rows in tasks.items()
    }
    data = {
        "results": scores | {group: {"alias": group, "acc,none": 0.5} for group in groups or {}},
        "groups": {group: {"acc,none": 0.5} for group in groups or {}},
        "group_subtasks": groups or {},
        "configs": {task: {"task": task} for task in tasks},
        "higher_is_better": {task: {"acc": True} for task in tasks},
    }
    (folder / (results_name or f"results_{date}.json")).write_text(json.dumps(data))
    for task, rows in tasks.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"samples_{task.replace('/', '__')}_{date}.jsonl").write_text(text)
    return folder


def test_answers_that_are_no_numbers_are_counted():
    def count(*responses, arguments):
        row = sample(0, resps=[[one] for one in responses], arguments=arguments)
        run = results.run_from_memory({"samples": {"t": [row]}}, label="r")
        (found,) = run.samples("t")
        return found.not_finite

    two = [("Q", "a"), ("Q", "b")]
    skipped = [("Q", "a", {"overlength": "skipped"}), ("Q", "b")]
    assert count((-1.0, True), (-2.0, False), arguments=two) == 0
    assert count((float("nan"), False), ("-inf", "False"), arguments=two) == 2
    assert count(("-inf", "False"), ("nan", "False"), arguments=skipped) == 1
    assert count("nan", arguments=[("Q",)]) == 1  # the log-likelihood of a text
    assert count(-3.5, arguments=[("Q",)]) == 0
    assert count("nan", arguments=[("Q", {"until": ["x"]})]) == 0  # a text that was generated


def test_a_folder_a_parent_folder_a_file_and_samples_alone(tmp_path):
    folder = write(tmp_path / "out" / "model__act", {"sst2": [sample(0), sample(1)]})
    for path in (folder, tmp_path / "out", tmp_path, folder / f"results_{DATE}.json"):
        run = results.load_run(path)
        assert run.label == "model__act"
        assert run.tasks == ["sst2"]
        assert run.metrics("sst2") == [("acc", "none")]
        assert run.score("sst2", "acc", "none") == 0.5
        assert [one.doc_id for one in run.samples("sst2")] == [0, 1]
    alone = results.load_run(folder / f"samples_sst2_{DATE}.jsonl")
    assert alone.tasks == ["sst2"]
    assert len(alone.samples("sst2")) == 2
    assert alone.score("sst2", "acc", "none") is None


def test_the_newest_of_several_results_with_its_own_samples(tmp_path):
    write(tmp_path, {"sst2": [sample(0)]})
    write(tmp_path, {"sst2": [sample(0), sample(1)]}, date="2024-05-02T08-00-00")
    run = results.load_run(tmp_path)
    assert run.path.name == "results_2024-05-02T08-00-00.json"
    assert len(run.samples("sst2")) == 2
    assert "newest of 2 results" in run.notes[0]
    assert results.load_run(tmp_path / f"results_{DATE}.json").notes == ()


def test_a_named_results_file(tmp_path):
    # lm_eval --output_path out.json writes out_<date>.json and the samples beside it.
    write(tmp_path, {"sst2": [sample(0)]}, results_name=f"out_{DATE}.json")
    assert len(results.load_run(tmp_path / f"out_{DATE}.json").samples("sst2")) == 1


def test_a_folder_with_two_arms_names_them(tmp_path):
    write(tmp_path / "m__baseline", {"sst2": [sample(0)]})
    write(tmp_path / "m__act", {"sst2": [sample(0)]})
    with pytest.raises(ResultError, match=r"2 results in it .m__act, m__baseline.; name one"):
        results.load_run(tmp_path)


def test_a_task_name_with_a_slash_finds_its_samples(tmp_path):
    write(tmp_path, {"org/task": [sample(0)], "org": [sample(0), sample(1)]})
    run = results.load_run(tmp_path)
    assert len(run.samples("org/task")) == 1
    assert len(run.samples("org")) == 2


def test_groups_in_groups_give_each_task_once(tmp_path):
    tree = {"all": ["stem", "arts", "x"], "stem": ["x", "y"], "arts": ["z"]}
    run = results.load_run(write(tmp_path, {t: [sample(0)] for t in "xyz"}, groups=tree))
    assert run.groups == ["all", "stem", "arts"]
    assert run.tasks == ["x", "y", "z"]
    assert sorted(run.leaves("all")) == ["x", "y", "z"]
    assert run.leaves("stem") == ["x", "y"]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("results_x.json", "{", "not JSON"),
    ("results_x.json", "[]", "not a result of lm-eval"),
    ("results_x.json", '{"a": 1}', "not a result of lm-eval"),
])  # fmt: skip
def test_files_that_are_no_results(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ResultError, match=message):
        results.load_run(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(ResultError, match="no such file or folder"):
        results.load_run(tmp_path / "no")
    with pytest.raises(ResultError, match=r"no results_\*\.json"):
        results.load_run(tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ('{"doc_id": 0}\n', "has no 'doc_hash'"),
    ("1\n", "not an object"),
    ("", "no samples in it"),
    (json.dumps(sample(0)), "line 1 is cut off"),
])  # fmt: skip
def test_malformed_samples(tmp_path, text, message):
    write(tmp_path, {"sst2": [sample(0)]})
    (tmp_path / f"samples_sst2_{DATE}.jsonl").write_text(text)
    with pytest.raises(ResultError, match=message):
        results.load_run(tmp_path).samples("sst2")


def test_a_task_without_samples_says_how_to_get_them(tmp_path):
    run = results.load_run(write(tmp_path, {"sst2": [sample(0)]}))
    with pytest.raises(ResultError, match=r"'sst'; did you mean 'sst2'\?; .*--log_samples"):
        run.samples("sst")


def test_values_of_every_kind(tmp_path):
    row = sample(0, acc=True)
    values = {"f1": [1, 0.5], "ppl": [-12.5, 4], "nan": float("nan"), "none": None,
              "text": "abc", "three": [1, 2, 3], "acc": True}  # fmt: skip
    row |= values | {"metrics": [*values, "gone"]}
    found = results.load_run(write(tmp_path, {"t": [row]})).samples("t")[0].values
    assert found == {"f1": (1, 0.5), "ppl": (-12.5, 4), "nan": None, "none": None, "text": None,
                     "three": None, "acc": 1.0, "gone": None}  # fmt: skip


def test_what_documents_share_is_kept_and_more_on_request(tmp_path):
    run = results.load_run(write(tmp_path, {"t": [sample(3)]}))
    assert run.samples("t")[0].fields == {"passage": "passage 1"}
    assert run.samples("t", fields=["text"])[0].fields["text"] == "text 3"


def test_results_in_memory_read_the_same(tmp_path):
    written = [sample(1), sample(0)]
    kept = [{**row, "arguments": [(f"Q{row['doc_id']}", " no"), (f"Q{row['doc_id']}", " yes")],
             "filtered_resps": [(-1.0, False), (-2.0, False)], "target": 0}
            for row in written]  # fmt: skip
    data = {"results": {"t": {"acc,none": 1.0}}, "configs": {"t": {}}, "samples": {"t": kept}}
    from_memory = results.run_from_memory(data, label="x")
    from_disk = results.load_run(write(tmp_path, {"t": written}))
    assert from_memory.samples("t") == from_disk.samples("t")
    assert from_memory.tasks == ["t"]


def test_direction_of_a_metric(tmp_path):
    run = results.load_run(write(tmp_path, {"t": [sample(0)]}))
    assert run.higher_is_better("t", "acc") is True
    alone = results.load_run(tmp_path / f"samples_t_{DATE}.jsonl")
    assert alone.higher_is_better("t", "word_perplexity") is False
    assert alone.higher_is_better("t", "exact_match") is True
    assert alone.higher_is_better("t", "likes") is None


# -- scores of the choices -------------------------------------------------------------------------


def read(tmp_path, *rows):
    return results.load_run(write(tmp_path, {"t": list(rows)})).samples("t")


def test_choice_scores_with_the_right_answer_as_index_or_text(tmp_path):
    rows = [sample(0, scores=(-1.0, -2.0), target="0"), sample(1, target="1", acc=0.0)]
    found = samples.choice_scores(read(tmp_path, *rows))
    assert found.scores.tolist() == [[-1, -2], [-1, -2]]
    assert found.labels.tolist() == [0, 1]
    assert found.same_choices
    rows = [sample(0, target=" no"), sample(1, target="yes", acc=0.0)]
    assert samples.choice_scores(read(tmp_path, *rows)).labels.tolist() == [0, 1]


def test_choices_that_are_digits_are_told_apart_by_the_logged_accuracy(tmp_path):
    def digits(doc_id, *, target, acc):
        row = sample(doc_id, target=target, acc=acc, scores=(-1.0, -2.0, -3.0))
        for i, one in enumerate(row["arguments"].values()):
            one["arg_1"] = f" {i + 1}"
        return row

    as_text = read(tmp_path / "a", digits(0, target="1", acc=1.0), digits(1, target="2", acc=0.0))
    assert samples.choice_scores(as_text).labels.tolist() == [0, 1]
    as_index = read(tmp_path / "b", digits(0, target="1", acc=0.0), digits(1, target="0", acc=1.0))
    assert samples.choice_scores(as_index).labels.tolist() == [1, 0]


def test_fewer_choices_are_filled_up_and_not_the_same(tmp_path):
    found = samples.choice_scores(read(tmp_path, sample(0), sample(1, scores=(-1.0, -2.0, -3.0))))
    assert found.scores[0].tolist() == [-1, -2, -np.inf]
    assert not found.same_choices


@pytest.mark.parametrize("change", [
    {"filtered_resps": ["an answer"]},
    {"filtered_resps": [["-1.0", "False"]]},
    {"filtered_resps": [["x", "False"], ["-1.0", "False"]]},
    {"filtered_resps": [["-inf", "False"], ["-1.0", "False"]]},
    {"filtered_resps": "text"},
    {"target": "nobody"},
    {"target": "0", "acc": 0.0},
    {"arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": " no"},
                   "gen_args_1": {"arg_0": "", "arg_1": " no"}}},
])  # fmt: skip
def test_what_is_not_multiple_choice(tmp_path, change):
    assert samples.choice_scores(read(tmp_path, {**sample(0), **change})) is None
