from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from published_runs import BASE, DIGEST, STAMP, results, write_arm, write_evaluation

from act_harness.errors import InfrastructureError, InputError, ResultError
from act_harness.evidence.stats import paired_difference
from act_harness.publication.publish import publish
from act_harness.support import atomic

ACT = f"{BASE}__act-heads-ab12cd34"


def records(folder):
    """Records by model."""
    found = [json.loads(p.read_text()) for p in (folder / "every_eval_ever").rglob("*.json")]
    return {one["model_info"]["id"]: one for one in found}


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- both arms -------------------------------------------------------------------------------------


def test_each_arm_is_published_as_what_it_is(tmp_path):
    write_evaluation(tmp_path / "out")
    done = publish(tmp_path / "out", str(tmp_path / "to"))
    found = records(tmp_path / "to")
    assert set(found) == {BASE, ACT}
    details = found[ACT]["model_info"]["additional_details"]
    assert (details["base_model"], details["artifact_sha256"]) == (BASE, DIGEST)
    assert "artifact" not in found[BASE]["model_info"]["additional_details"]
    scores = {k: v["evaluation_results"][0]["score_details"]["score"] for k, v in found.items()}
    assert scores == {BASE: 0.25, ACT: 0.75}
    page = (tmp_path / "to" / "README.md").read_text()
    assert ACT in page
    assert DIGEST in page
    assert set(done.files) == {str(p) for p in snapshot(tmp_path / "to")}


def test_the_paired_difference_stands_beside_the_calibrated_score(tmp_path):
    write_evaluation(tmp_path / "out")
    publish(tmp_path / "out", str(tmp_path / "to"))
    details = records(tmp_path / "to")[ACT]["evaluation_results"][0]["score_details"]["details"]
    by_hand = paired_difference([1, 0, 0, 0], [1, 1, 1, 0])
    assert float(details["paired_difference"]) == 0.5
    low, high = float(details["paired_interval_low"]), float(details["paired_interval_high"])
    assert (low, high) == pytest.approx(tuple(by_hand.interval))
    assert float(details["paired_p_value"]) == 0.5  # two of two flips in one direction
    assert (details["paired_gained"], details["paired_lost"]) == ("2", "0")
    compared = json.loads((tmp_path / "to" / "comparison.json").read_text())
    assert compared["rows"][0]["result"]["difference"] == 0.5


@pytest.mark.parametrize("part", ["", "baseline", "act", "comparison", "file"])
def test_any_folder_of_an_evaluation_stands_for_all_of_it(tmp_path, part):
    folders = write_evaluation(tmp_path / "out")
    folders |= {"": tmp_path / "out", "file": folders["act"] / f"results_{STAMP}.json"}
    write_evaluation(tmp_path / "out", stamp="2026-06-01T12-00-00") if part else None
    publish(folders[part], str(tmp_path / "to"))
    assert set(records(tmp_path / "to")) == {BASE, ACT}


def test_results_are_left_as_they_are(tmp_path):
    write_evaluation(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    publish(tmp_path / "out", str(tmp_path / "to"))
    assert snapshot(tmp_path / "out") == before


def test_nothing_of_the_machine_is_published(tmp_path):
    write_evaluation(tmp_path / "out")
    publish(tmp_path / "out", str(tmp_path / "to"))
    text = b"\n".join(snapshot(tmp_path / "to").values()).decode()
    for secret in ("hf_secret", str(tmp_path), "a secret text"):
        assert secret not in text


def test_every_seed_has_its_records_and_entries_hold_their_mean(tmp_path):
    write_evaluation(tmp_path / "out", seeds=(1, 2))
    publish(tmp_path / "out", str(tmp_path / "to"))
    to = tmp_path / "to"
    found = [json.loads(p.read_text()) for p in (to / "every_eval_ever").rglob("*.json")]
    ends = sorted(one["evaluation_id"].rpartition("/")[2] for one in found)
    assert ends == ["fewshot-seed-1"] * 2 + ["fewshot-seed-2"] * 2
    assert (to / "seed-1" / "comparison.json").is_file()
    (entry,) = yaml.safe_load((to / "act" / ".eval_results" / "sst2.yaml").read_text())
    assert entry["value"] == 0.75
    assert "mean of 2 few-shot seeds" in entry["notes"]


def test_a_group_and_its_tasks_are_one_record(tmp_path):
    write_evaluation(tmp_path / "out", tasks=("a", "b", "c"), groups={"g": ["a", "h"], "h": ["b"]})
    publish(tmp_path / "out", str(tmp_path / "to"))
    base = tmp_path / "to" / "every_eval_ever" / "data"
    names = {
        folder.name: {
            r["evaluation_name"] for r in json.loads(file.read_text())["evaluation_results"]
        }
        for folder in base.iterdir()
        for file in (folder / BASE).glob("*.json")
    }
    assert names == {"g": {"a", "b", "g", "h"}, "c": {"c"}}


# -- the hub's entries -----------------------------------------------------------------------------


def test_entries_are_read_by_the_hubs_own_client(tmp_path):
    write_evaluation(tmp_path / "out")
    publish(tmp_path / "out", str(tmp_path / "to"))
    for arm, value in (("baseline", 0.25), ("act", 0.75)):
        text = (tmp_path / "to" / arm / ".eval_results" / "sst2.yaml").read_text()
        (entry,) = parse_eval_result_entries(yaml.safe_load(text))
        assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "sst2", value)
        assert entry.date == "2026-05-01T12:00:00Z"
        assert "2-shot" in entry.notes
        assert ("artifact heads (ab12cd340000) on owner/base-model" in entry.notes) == (
            arm == "act"
        )


def test_a_part_of_a_benchmark_is_no_entry_on_its_leaderboard(tmp_path):
    write_evaluation(tmp_path / "out", whole=100)
    done = publish(tmp_path / "out", str(tmp_path / "to"))
    assert not [name for name in done.files if name.endswith(".yaml")]
    assert "no .eval_results of sst2: not all documents were scored" in done.notes


def test_the_address_of_a_tracked_run_is_published(tmp_path):
    folders = write_evaluation(tmp_path / "out")
    url = "https://wandb.ai/me/act/runs/1"
    (folders["act"] / "wandb_run.json").write_text(json.dumps({"url": url}))
    (folders["baseline"] / "wandb_run.json").write_text(json.dumps({"url": "file:///etc"}))
    publish(tmp_path / "out", str(tmp_path / "to"))
    found = records(tmp_path / "to")
    assert found[ACT]["source_metadata"]["additional_details"]["wandb_run"] == url
    assert "additional_details" not in found[BASE]["source_metadata"]
    (entry,) = yaml.safe_load((tmp_path / "to" / "act" / ".eval_results" / "sst2.yaml").read_text())
    assert entry["source"]["url"] == url


@pytest.mark.parametrize(("noted", "said"), [(14, True), (0, False), ("14", False), (None, False)])
def test_a_gain_on_documents_of_the_search_is_published_as_that(tmp_path, noted, said):
    folders = write_evaluation(tmp_path / "out")
    (file,) = folders["act"].glob("results_*.json")
    content = json.loads(file.read_text())
    content.setdefault("act_harness", {})["documents_open_to_search"] = noted
    file.write_text(json.dumps(content))
    publish(tmp_path / "out", str(tmp_path / "to"))
    page = (tmp_path / "to" / "README.md").read_text()
    assert ("14 of the documents scored are of the splits that the heads" in page) is said


@pytest.mark.parametrize(("count", "said"), [(16, True), (0, False), (None, False)])
def test_scores_that_count_documents_which_were_not_scored_say_so(tmp_path, count, said):
    """Answers that were skipped were published as wrong ones, or right ones, of the model."""
    folders = write_evaluation(tmp_path / "out")
    (file,) = folders["act"].glob("results_*.json")
    content = json.loads(file.read_text())
    content["config"]["act_harness"]["counters"] = {"requests_skipped": count}
    file.write_text(json.dumps(content))
    (samples,) = folders["act"].glob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    mark = {"overlength": "skipped" if count else "truncated"}
    rows[1]["arguments"] = {"gen_args_0": {"arg_0": "Q", "arg_1": " a", "arg_2": mark}}
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = publish(tmp_path / "out", str(tmp_path / "to"))
    page = (tmp_path / "to" / "README.md").read_text()
    assert ("Of arm act 16 requests were too long to be scored" in page) is said
    assert any("of arm act 16 requests" in note for note in done.notes) is said
    assert (tmp_path / "to" / "act" / ".eval_results").exists() is not said
    assert (tmp_path / "to" / "baseline" / ".eval_results").exists()


def test_a_result_without_samples_does_not_say_of_which_task_the_skipped_were(tmp_path):
    path = write_arm(tmp_path / "m", "baseline")
    content = json.loads(path.read_text())
    content["config"].setdefault("act_harness", {})["counters"] = {"requests_skipped": 2}
    path.write_text(json.dumps(content))
    for samples in (tmp_path / "m").glob("samples_*"):
        samples.unlink()
    done = publish(tmp_path / "m", str(tmp_path / "to"))
    assert any("2 requests were too long" in note for note in done.notes)
    assert not list((tmp_path / "to").rglob(".eval_results"))


def test_a_report_page_is_taken_along(tmp_path):
    folders = write_evaluation(tmp_path / "out")
    place = folders["comparison"].parent / "report"
    (place / "figures").mkdir(parents=True)
    (place / "report.html").write_text("<p>report")
    (place / "figures" / "1-forest.csv").write_text("task")
    publish(tmp_path / "out", str(tmp_path / "to"))
    copied = snapshot(tmp_path / "to" / "report")
    assert {str(k): v for k, v in copied.items()} == {
        "report.html": b"<p>report", "figures/1-forest.csv": b"task",
    }  # fmt: skip


def test_a_report_page_that_names_folders_of_this_machine_is_left_out(tmp_path):
    """`report /home/me/out` writes that path, and it was published with the page."""
    folders = write_evaluation(tmp_path / "out")
    place = folders["comparison"].parent / "report"
    place.mkdir()
    (place / "report.html").write_text(f"<p>A: {folders['act']}/results.json")
    done = publish(tmp_path / "out", str(tmp_path / "to"))
    assert not (tmp_path / "to" / "report").exists()
    assert "report" not in (tmp_path / "to" / "README.md").read_text()
    assert any("names folders of this machine" in note for note in done.notes)


# -- lm-eval's own results -------------------------------------------------------------------------


def test_a_result_of_lm_evals_own_is_published_alone(tmp_path):
    place = tmp_path / "owner__base-model"
    write_arm(place, "baseline", stamp="2026-05-01T12-00-00.5", record=False, model="hf")
    data = json.loads((place / "results_2026-05-01T12-00-00.5.json").read_text())
    data |= {"model_name": BASE}
    (place / "results_2026-05-01T12-00-00.5.json").write_text(json.dumps(data))
    done = publish(tmp_path, str(tmp_path / "to"))
    assert set(records(tmp_path / "to")) == {BASE}
    assert "one arm alone: no paired difference" in done.notes


def test_a_calibrated_result_of_lm_evals_own_needs_no_baseline(tmp_path):
    write_arm(tmp_path / "model__act", "act", stamp="2026-05-01T12-00-00.5")
    publish(tmp_path / "model__act", str(tmp_path / "to"))
    assert set(records(tmp_path / "to")) == {ACT}


@pytest.mark.parametrize("odd", [None, 3, "text", [1], {"sst2": 3}])
@pytest.mark.parametrize(
    "part", ["n-samples", "n-shot", "versions", "task_hashes", "date", "act_harness"]
)
def test_what_a_result_says_oddly_is_left_out(tmp_path, part, odd):
    path = write_arm(tmp_path / "m", "baseline")
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: odd}))
    publish(tmp_path / "m", str(tmp_path / "to"))
    (record,) = records(tmp_path / "to").values()
    assert record["evaluation_results"][0]["score_details"]["score"] == 0.25


def test_an_empty_folder_is_not_filled_from_one_beside_it(tmp_path):
    write_arm(tmp_path / "other__baseline", "baseline")
    (tmp_path / "mine__baseline").mkdir()
    refused("no results_", tmp_path / "mine__baseline", str(tmp_path / "to"))


# -- what cannot be published ----------------------------------------------------------------------


def refused(match, *arguments, error=ResultError, **settings):
    with pytest.raises(error, match=match):
        publish(*arguments, **settings)


def test_an_unfinished_evaluation_is_refused(tmp_path):
    to = str(tmp_path / "to")
    folders = write_evaluation(tmp_path / "out")
    (folders["act"] / f"results_{STAMP}.json").unlink()
    for part in ("baseline", "act", "comparison"):
        refused("not finished", folders[part], to)
    refused("not finished", tmp_path / "out", to)
    assert not (tmp_path / "to").exists()


def test_an_evaluation_that_lacks_a_seed_is_refused(tmp_path):
    folders = write_evaluation(tmp_path / "out", seeds=(1, 2))
    shutil.rmtree(folders["act"] / "seed-2")
    refused("not finished", tmp_path / "out", str(tmp_path / "to"))


def test_a_calibrated_arm_without_its_baseline_is_refused(tmp_path):
    folders = write_evaluation(tmp_path / "out")
    alone = tmp_path / "alone" / folders["act"].name
    shutil.copytree(folders["act"], alone)
    refused("its baseline is not beside it", alone, str(tmp_path / "to"))


def test_several_evaluations_are_not_mixed(tmp_path):
    write_evaluation(tmp_path / "out")
    write_evaluation(tmp_path / "out", stamp="2026-06-01T12-00-00")
    refused("2 evaluations in it", tmp_path / "out", str(tmp_path / "to"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "no 'results' in it"),
        ("{", "results_2026"),
        ('{"results": {"a": 3}}', "not as lm-eval writes it"),
        ('{"results": {}, "configs": {}}', "no scores"),
        (
            '{"results": {"a": {"acc,none": NaN}}, "configs": {"a": {}}, "model_name": "o/m"}',
            "no score",
        ),
    ],
)
def test_results_of_other_tools_are_refused(tmp_path, content, match):
    (tmp_path / "results_2026-01-01T00-00-00.json").write_text(content)
    refused(match, tmp_path, str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.json").write_text("{}")
    refused("no such file or folder", tmp_path / "gone", str(tmp_path / "to"))
    refused("no results_", tmp_path / "empty", str(tmp_path / "to"))
    refused("not a results_", tmp_path / "notes.json", str(tmp_path / "to"))


def test_a_model_that_only_this_machine_knows_is_named_by_the_user(tmp_path):
    write_evaluation(tmp_path / "out", model="models/mine/final")
    refused("--model-id OWNER/NAME", tmp_path / "out", str(tmp_path / "to"))
    publish(tmp_path / "out", str(tmp_path / "to"), model_id="me/mine")
    assert set(records(tmp_path / "to")) == {"me/mine", "me/mine__act-heads-ab12cd34"}


def test_a_target_that_exists_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    refused("not empty", tmp_path / "gone", str(tmp_path / "full"), error=InputError)
    refused("a file is there", "gone", str(tmp_path / "full" / "mine"), error=InputError)
    refused("--to is empty", "gone", " ", error=InputError)
    for to in ("hub:", "hub:a", "hub:a/b/c", "hub:../b"):
        refused("expected OWNER/REPO", "gone", to, error=InputError)
    refused("--create-pr", "gone", "x", error=InputError, create_pr=True)
    for name in ("../../x", "a", "a/b/c", "", "a/b\n"):
        refused("expected OWNER/REPO", "gone", str(tmp_path / "x"), error=InputError, model_id=name)


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
    write_evaluation(tmp_path / "out")
    written, real = [], atomic.write_bytes

    def fail_late(path, data):
        if len(written) == 3:
            raise InfrastructureError("the disk is full")
        written.append(path)
        return real(path, data)

    monkeypatch.setattr(atomic, "write_bytes", fail_late)
    refused("full", tmp_path / "out", str(tmp_path / "to"), error=InfrastructureError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_names_from_results_stay_in_the_folder_and_in_their_cells(tmp_path):
    hostile = "../../../x|<script>alert(1)</script>"
    place = tmp_path / "m"
    place.mkdir()
    data = results("baseline", tasks=(hostile,), record=False)
    data |= {"model_name": BASE}
    (place / "results_2026-01-01T00-00-00.json").write_text(json.dumps(data))
    publish(place, str(tmp_path / "to"))
    names = [str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*.json")]
    assert all(re.fullmatch(r"[\w./-]+", name) and ".." not in name for name in names)
    assert not (tmp_path / "x").exists()
    assert "<script" not in (tmp_path / "to" / "README.md").read_text()
