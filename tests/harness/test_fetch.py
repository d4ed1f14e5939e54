"""Datasets from a folder, and the folder filled: everything with hand-made rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from lm_eval.tasks import TaskManager
from task_rows import HUB, build, documents, load, manager, real

from act_harness.errors import InfrastructureError, TaskError
from act_harness.harness import fetch

COMMITS = {"CogComp/trec": "c0ffee"}


def commit_of(path: str, revision: str | None) -> str | None:
    return COMMITS.get(path, "abc123")


class Hub:
    """Serves the hand-made rows, and keeps what it was asked for."""

    def __init__(self, missing: str = "") -> None:
        self.missing = missing
        self.asked: list[tuple[str, str | None, str | None]] = []

    def __call__(self, path: str, name: str | None = None, **how: Any) -> datasets.DatasetDict:
        self.asked.append((path, name, how.get("revision")))
        if path == self.missing:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")
        return load(path, name)


def fetched(dest: Path, *tasks: str, hub: Hub | None = None) -> fetch.Manifest:
    return fetch.fetch_tasks(
        tasks,
        dest,
        task_manager=manager(),
        load=hub or Hub(),
        commit_of=commit_of,
        progress=False,
    )


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv(fetch.DATA_DIRECTORY_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------- which datasets


def test_the_paper_reads_every_dataset_once() -> None:
    sources = fetch.datasets_of(["act_paper"], task_manager=manager())
    found = {(source.id, source.config) for source in sources}
    assert found == {(path, config) for path, configs in HUB.items() for config in configs}
    assert len(sources) == len(found)
    revisions = {source.id: source.revision for source in sources if source.revision}
    assert revisions == {"CogComp/trec": "refs/convert/parquet"}
    more = ["act_paper", "act_multiple_choice_gen", "act_mmlu_gen", "act_sst2"]
    again = fetch.datasets_of(more, task_manager=manager())
    assert {(source.id, source.config) for source in again} == found


def test_demo_tasks_need_no_dataset() -> None:
    assert fetch.datasets_of(["act_demo"], task_manager=manager()) == ()


def test_an_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(TaskError, match="unknown task 'act_sts2'; did you mean 'act_sst2'"):
        fetch.datasets_of(["act_sts2"], task_manager=manager())


def test_groups_tags_and_odd_settings_of_other_tasks(tmp_path: Path) -> None:
    for name, text in {
        "one": "task: one\ntag: [mine]\ndataset_path: a/b\ndataset_name: x\n",
        "two": "task: two\ntag: mine\ndataset_path: a/b\ndataset_kwargs: {trust_remote_code: 1}\n",
        "odd": "task: odd\ndataset_path: json\ndataset_kwargs: {data_files: rows.json}\n",
        "both": "group: both\ntask:\n  - task: one\n  - group: inner\n",
        "inner": "group: inner\ntask: [mine]\n",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    some = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wanted = {("a/b", None), ("a/b", "x")}
    for name in ("mine", "both"):
        sources = fetch.datasets_of([name], task_manager=some)
        assert {(source.id, source.config) for source in sources} == wanted
    with pytest.raises(TaskError, match="'odd' reads json with dataset_kwargs data_files"):
        fetch.datasets_of(["odd"], task_manager=some)


# ---------------------------------------------------------------------------- fetching


def test_what_was_fetched_reads_back_the_same(tmp_path: Path, no_network: None) -> None:
    names = ["act_sst2", "act_trec", "act_cb", "act_copa", "act_squad_v2", "act_mmlu_virology"]
    fetched(tmp_path / "data", *names)
    os.environ[fetch.DATA_DIRECTORY_VARIABLE] = str(tmp_path / "data")
    try:
        read = manager().load(names)["tasks"]
    finally:
        del os.environ[fetch.DATA_DIRECTORY_VARIABLE]
    for name, expected in build(*names).items():
        assert read[name].dataset["train" if "mmlu" not in name else "dev"].features
        for mine, theirs in zip(documents(read[name], 1), documents(expected, 1), strict=True):
            assert [request.args for request in mine] == [request.args for request in theirs]
        assert read[name].task_docs.features == expected.task_docs.features  # class names too


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    hub = Hub()
    manifest = fetched(tmp_path, "act_sst2", "act_trec", "act_cb", hub=hub)
    assert hub.asked == [
        ("CogComp/trec", None, "refs/convert/parquet"),
        ("aps/super_glue", "cb", "abc123"),
        ("nyu-mll/glue", "sst2", "abc123"),
    ]
    stored = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert stored["schema"] == "act-harness/data/1"
    trec, cb, sst2 = stored["datasets"]
    assert (trec["id"], trec["config"], trec["revision"], trec["commit"]) == (
        "CogComp/trec",
        None,
        "refs/convert/parquet",
        "c0ffee",
    )
    assert (cb["config"], sst2["config"], sst2["commit"]) == ("cb", "sst2", "abc123")
    assert {name: split["rows"] for name, split in sst2["splits"].items()} == {
        "train": 4,
        "validation": 2,
    }
    for record in manifest.datasets:
        for split in record.splits.values():
            assert (tmp_path / split.file).stat().st_size == split.bytes
            assert len(split.sha256) == 64
    assert fetch.verify_directory(tmp_path) == ()
    assert not list(tmp_path.rglob("*.tmp"))


def test_nothing_is_fetched_twice(tmp_path: Path) -> None:
    fetched(tmp_path, "act_sst2", "act_cb")
    hub = Hub()
    fetched(tmp_path, "act_sst2", "act_cb", "act_copa", hub=hub)
    assert [asked[:2] for asked in hub.asked] == [("aps/super_glue", "copa")]
    manifest = fetch.fetch_tasks(["act_mr"], tmp_path, task_manager=manager(), load=Hub(),
                                 commit_of=commit_of, progress=False)  # fmt: skip
    assert len(manifest.datasets) == 4
    assert fetch.verify_directory(tmp_path) == ()


def test_damage_is_seen_and_mended(tmp_path: Path) -> None:
    fetched(tmp_path, "act_sst2", "act_mr")
    train = tmp_path / "nyu-mll/glue/sst2/train.parquet"
    train.write_bytes(train.read_bytes()[:-1] + b"x")
    (tmp_path / "cornell-movie-review-data/rotten_tomatoes/default/validation.parquet").unlink()
    assert fetch.verify_directory(tmp_path) == (
        "cornell-movie-review-data/rotten_tomatoes/default/validation.parquet: missing",
        "nyu-mll/glue/sst2/train.parquet: not the file that was fetched",
    )
    hub = Hub()
    fetched(tmp_path, "act_sst2", "act_mr", hub=hub)
    assert len(hub.asked) == 2
    assert fetch.verify_directory(tmp_path) == ()


def test_no_network_is_one_line_and_keeps_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError) as caught:
        fetched(tmp_path, "act_sst2", "act_cb", hub=Hub(missing="nyu-mll/glue"))
    text = str(caught.value)
    assert "\n" not in text
    assert "dataset nyu-mll/glue (sst2) cannot be downloaded" in text
    assert "HF_HOME" in text
    assert [record.config for record in fetch.fetch_tasks([], tmp_path, task_manager=manager(),
            progress=False).datasets] == ["cb"]  # fmt: skip
    hub = Hub()
    fetched(tmp_path, "act_sst2", "act_cb", hub=hub)  # goes on where it stopped
    assert [asked[0] for asked in hub.asked] == ["nyu-mll/glue"]


def test_fetch_without_a_patched_hub(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(InfrastructureError, match=r"dataset nyu-mll/glue .*cannot be downloaded"):
        fetch.fetch_tasks(["act_sst2"], tmp_path / "d", task_manager=manager(), progress=False)


def test_the_commit_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Api:
        def dataset_info(self, path: str, revision: str | None = None) -> Any:
            if path == "a/b":
                raise OSError("no network")
            return huggingface_hub.hf_api.DatasetInfo(id=path, sha=f"sha of {revision}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c/d").mkdir(parents=True)
    assert fetch._commit_on_hub("x/y", "main") == "sha of main"
    assert fetch._commit_on_hub("a/b", None) is None  # a cache may still have it
    assert fetch._commit_on_hub("c/d", None) is None  # a folder


def test_a_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an app"}', encoding="utf-8")
    with pytest.raises(TaskError, match=r"manifest\.json is not a manifest of act-harness"):
        fetched(tmp_path, "act_sst2")
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == '{"name": "an app"}'


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: datasets.Dataset, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "to_parquet", full)
    with pytest.raises(InfrastructureError, match="No space left on device; free some space"):
        fetched(tmp_path, "act_sst2")
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {".fetching"}, "the lock, which holds nothing"


# ---------------------------------------------------------------------------- reading


def test_the_data_directory_serves_other_tasks_too(tmp_path: Path, no_network: None) -> None:
    fetched(tmp_path / "data", "act_sst2")
    original = datasets.load_dataset
    with fetch.data_directory(tmp_path / "data"):
        # as lm-eval's own task sst2 does it
        rows = datasets.load_dataset(path="nyu-mll/glue", name="sst2", revision="main")
        assert len(rows["validation"]) == 2
        assert os.environ[fetch.DATA_DIRECTORY_VARIABLE] == str(tmp_path / "data")
        with pytest.raises(ConnectionError):  # not in the folder: as without it
            datasets.load_dataset(path="SetFit/sst5")
    assert datasets.load_dataset is original
    assert fetch.DATA_DIRECTORY_VARIABLE not in os.environ


def test_the_data_directory_is_undone_after_an_error(tmp_path: Path, no_network: None) -> None:
    original = datasets.load_dataset
    os.environ[fetch.DATA_DIRECTORY_VARIABLE] = "before"
    with pytest.raises(KeyError), fetch.data_directory(tmp_path):
        raise KeyError
    assert os.environ.pop(fetch.DATA_DIRECTORY_VARIABLE) == "before"
    assert datasets.load_dataset is original


def test_no_data_directory_changes_nothing(no_network: None) -> None:
    original = datasets.load_dataset
    with fetch.data_directory(None):
        assert datasets.load_dataset is original
        assert fetch.DATA_DIRECTORY_VARIABLE not in os.environ


def test_a_data_directory_that_is_none(tmp_path: Path) -> None:
    with (
        pytest.raises(TaskError, match="is not a folder; fill one with `act-harness fetch"),
        fetch.data_directory(tmp_path / "nowhere"),
    ):
        pass


def test_what_the_data_directory_lacks(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(tmp_path / "data", "act_cb")
    monkeypatch.setenv(fetch.DATA_DIRECTORY_VARIABLE, str(tmp_path / "data"))
    for task, named in (("act_sst2", "nyu-mll/glue (sst2)"), ("act_copa", "super_glue (copa)")):
        with pytest.raises(InfrastructureError) as caught:
            manager().load([task])
        text = str(caught.value)
        assert "\n" not in text
        assert named in text
        assert f"fetch --tasks {task} --dest DIR" in text
        assert "HF_HOME" in text


@pytest.mark.slow
def test_the_shared_folder_works_as_it_is(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = real(shared_dir / "hub")
    assert len(tasks) == 9 + 7 + 57 + 2
    for name in ("act_sst2", "act_trec", "act_hellaswag", "act_squad_v2"):
        (first,) = documents(tasks[name], limit=1)
        assert first[0].args[0].startswith(tasks[name].config.description)


@pytest.mark.slow
def test_the_shared_folder_can_be_copied(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a download: the real loader, from a folder that stands for the hub.
    monkeypatch.chdir(shared_dir / "hub")
    some = ["act_cb", "act_copa", "act_trec"]
    manifest = fetch.fetch_tasks(some, tmp_path, task_manager=manager(), progress=False)
    assert [record.commit for record in manifest.datasets] == [None, None, None]
    monkeypatch.setenv(fetch.DATA_DIRECTORY_VARIABLE, str(tmp_path))
    copied = manager().load(some)["tasks"]
    for name, task in real(shared_dir / "hub").items():
        if name in some:
            one, two = documents(task, 1, limit=3), documents(copied[name], 1, limit=3)
            assert [r.args for d in one for r in d] == [r.args for d in two for r in d]
