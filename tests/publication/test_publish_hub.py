"""Publishing to the hub: its own client, talking to a stand-in."""

from __future__ import annotations

import socket

import pytest
import yaml
from hub_server import TOKEN, running_hub
from huggingface_hub import constants
from published_runs import BASE, STAMP, write_evaluation

from act_harness.errors import InfrastructureError, InputError
from act_harness.publication.publish import publish


@pytest.fixture
def hub_at(monkeypatch):
    """Point the hub's client to an address."""

    def at(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    return at


@pytest.fixture
def output(tmp_path):
    write_evaluation(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(("repository", "value"), [("me/heads", 0.75), (BASE, 0.25)])
def test_one_commit_holds_all_and_entries_of_the_repositorys_own_arm(
    output, hub_at, repository, value
):
    with running_hub() as hub:
        hub.add(repository, {})
        hub_at(hub.url)
        done = publish(output, f"hub:{repository}")
    files = hub.files(repository)
    assert len(hub.repositories[repository].messages) == 2  # the first commit is ours by hand
    assert set(files) == set(done.files)
    newest = hub.repositories[repository].branches["main"]
    assert done.where == f"{hub.url}/{repository}/commit/{newest}"
    own = [name for name in files if not name.startswith(f"act-harness-results/{STAMP}/")]
    assert own == [".eval_results/sst2.yaml"]  # README.md of the repository is not touched
    (entry,) = yaml.safe_load(files[".eval_results/sst2.yaml"])
    assert (entry["value"], entry["source"]["url"]) == (value, f"{hub.url}/{repository}")


def test_a_pull_request_is_opened_where_it_is_asked_for(output, hub_at):
    with running_hub() as hub:
        hub.add(BASE, {})
        hub_at(hub.url)
        done = publish(output, f"hub:{BASE}", create_pr=True)
    assert done.where == f"{hub.url}/{BASE}/discussions/1"
    assert hub.files(BASE) == {}
    assert set(hub.files(BASE, "refs/pr/1")) == set(done.files)


def test_another_models_repository_gets_no_entries_of_a_baseline(tmp_path, hub_at):
    folders = write_evaluation(tmp_path / "out")
    for part in ("act", "comparison"):
        for file in folders[part].iterdir():
            file.unlink()
        folders[part].rmdir()
    with running_hub() as hub:
        hub.add("me/other", {})
        hub_at(hub.url)
        done = publish(tmp_path / "out", "hub:me/other")
    assert not [name for name in hub.files("me/other") if ".eval_results" in name]
    assert any("me/other is not the repository of owner/base-model" in n for n in done.notes)


def test_a_repository_that_is_not_there_is_bad_input(output, hub_at):
    with running_hub() as hub:
        hub_at(hub.url)
        with pytest.raises(InputError, match="there is no repository 'me/x'"):
            publish(output, "hub:me/x")


@pytest.mark.parametrize(("status", "error"), [(403, InputError), (500, InfrastructureError)])
def test_a_refusal_is_one_line_and_nothing_is_published(output, hub_at, status, error):
    with running_hub() as hub:
        hub.add("me/x", {})
        hub.failing["/commit/"] = (status, "You may not write here")
        hub_at(hub.url)
        with pytest.raises(error, match=f"hub:me/x.*{status}") as caught:
            publish(output, "hub:me/x")
    assert hub.files("me/x") == {}
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_hub_that_does_not_answer_is_one_line(output, hub_at, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hub_at(f"http://127.0.0.1:{port}")
    with pytest.raises(InfrastructureError, match="the hub cannot be reached"):
        publish(output, "hub:me/x")


def test_what_no_push_can_do_without_is_said_before_the_work(hub_at, monkeypatch, tmp_path):
    with pytest.raises(InfrastructureError, match="HF_HUB_OFFLINE is set"):
        publish(tmp_path / "gone", "hub:me/x")
    hub_at("http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(InputError, match="hf auth login"):
        publish(tmp_path / "gone", "hub:me/x")
