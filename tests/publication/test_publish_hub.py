"""Publishing to the hub: its own client, talking to a stand-in."""

from __future__ import annotations

import socket

import pytest
import yaml
from hub_commits import serve_hub
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
        monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")

    return at


@pytest.fixture
def output(tmp_path):
    write_evaluation(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(("repository", "value"), [("me/heads", 0.75), (BASE, 0.25)])
def test_one_commit_holds_all_and_entries_of_the_repositorys_own_arm(
    output, hub_at, repository, value
):
    with serve_hub(repository) as hub:
        hub_at(hub.url)
        done = publish(output, f"hub:{repository}")
    assert len(hub.commits) == 1
    assert set(hub.files) == set(done.files)
    assert done.where == f"{hub.url}/{repository}/commit/abc"
    own = [name for name in hub.files if not name.startswith(f"act-harness-results/{STAMP}/")]
    assert own == [".eval_results/sst2.yaml"]  # README.md of the repository is not touched
    (entry,) = yaml.safe_load(hub.files[".eval_results/sst2.yaml"])
    assert (entry["value"], entry["source"]["url"]) == (value, f"{hub.url}/{repository}")


def test_a_pull_request_is_opened_where_it_is_asked_for(output, hub_at):
    with serve_hub(BASE) as hub:
        hub_at(hub.url)
        done = publish(output, f"hub:{BASE}", create_pr=True)
    assert done.where == f"{hub.url}/{BASE}/discussions/1"


def test_another_models_repository_gets_no_entries_of_a_baseline(tmp_path, hub_at):
    folders = write_evaluation(tmp_path / "out")
    for part in ("act", "comparison"):
        for file in folders[part].iterdir():
            file.unlink()
        folders[part].rmdir()
    with serve_hub("me/other") as hub:
        hub_at(hub.url)
        done = publish(tmp_path / "out", "hub:me/other")
    assert not [name for name in hub.files if ".eval_results" in name]
    assert any("me/other is not the repository of owner/base-model" in n for n in done.notes)


def test_a_repository_that_is_not_there_is_bad_input(output, hub_at):
    with serve_hub() as hub:
        hub_at(hub.url)
        with pytest.raises(InputError, match="there is no repository 'me/x'"):
            publish(output, "hub:me/x")


@pytest.mark.parametrize(("status", "error"), [(403, InputError), (500, InfrastructureError)])
def test_a_refusal_is_one_line_and_nothing_is_published(output, hub_at, status, error):
    with serve_hub("me/x", refuse=status) as hub:
        hub_at(hub.url)
        with pytest.raises(error, match=f"hub:me/x.*{status}") as caught:
            publish(output, "hub:me/x")
    assert hub.files == {}
    assert "\n" not in str(caught.value)
    assert "hf_not_a_token" not in str(caught.value)


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
