"""Where commands write, and what a terminal is told: before the work, and whatever is printed."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_harness.artifact import Artifact
from act_harness.errors import InfrastructureError, InputError
from act_harness.harness.fetch import fetch_tasks
from act_harness.search.command import SearchSettings, search_from_settings
from act_harness.support import atomic, places


@given(text=st.text() | st.text(alphabet="/.\\ ~\0", max_size=300) | st.text(min_size=300))
def test_any_text_gives_a_name_that_a_file_can_have(text):
    name = places.file_name(text)
    assert 0 < len(os.fsencode(name)) <= 80
    assert name.isascii()
    assert "/" not in name
    assert not name.startswith((".", "-"))


def test_long_names_stay_apart():
    one, two = (places.file_name("x" * 5000 + end) for end in "ab")
    assert one != two
    assert places.file_name("SmolLM2-135M_a.b") == "SmolLM2-135M_a.b"


def test_a_file_may_have_the_longest_name_there_is(tmp_path):
    # 63 characters of four bytes: the temporary file's name must not be longer than the system's.
    path = tmp_path / ("\U0001f600" * 63)
    assert atomic.write_text(path, "kept").read_text() == "kept"


def test_folders_are_made_all_or_none(tmp_path):
    (tmp_path / "b").mkdir()
    made = places.new_folders(tmp_path, {"x": "a", "y": "b"})
    assert {key: place.name for key, place in made.items()} == {"x": "a-2", "y": "b-2"}
    assert sorted(place.name for place in tmp_path.iterdir()) == ["a-2", "b", "b-2"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/x", "x" * 300, "a\0b"):
        with pytest.raises(InfrastructureError, match="choose") as caught:
            places.prepare_folder(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        places.prepare_file(tmp_path)
    with pytest.raises(InfrastructureError, match="shorter name"):
        places.prepare_file(tmp_path / ("x" * 300))
    assert places.prepare_file(tmp_path / "new" / "a.json").parent.is_dir()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("given", ["own.yaml", "o*.yaml", ".", "link.yaml"])
def test_a_file_that_a_command_reads_is_never_replaced(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text("task: own")
    (tmp_path / "link.yaml").symlink_to(own)
    with pytest.raises(InputError, match=r"own\.yaml is what this command reads; name another"):
        places.prepare_file(own, reads=[None, "sst2", "~nobody/x", "x" * 5000, given])
    assert places.prepare_file(tmp_path / "new.json", reads=[given]).name == "new.json"
    (tmp_path / "earlier.json").write_text("{}")
    assert places.prepare_file(tmp_path / "earlier.json", reads=["sst2", given, "a\0b"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InfrastructureError, match="you may write to"):
        places.prepare_folder(tmp_path)


def test_search_and_fetch_look_at_their_output_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("")

    def search(**places_):
        return search_from_settings(
            SearchSettings(tasks=["t"], pretrained="/nonexistent", **places_)
        )

    with pytest.raises(InputError, match="is a folder"):
        search(output=tmp_path)
    with pytest.raises(InfrastructureError, match="choose"):
        search(output=tmp_path / "file" / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        search(prepare=tmp_path)
    with pytest.raises(InfrastructureError, match="choose"):
        search(output=tmp_path / "a.json", ledgers=tmp_path / "file")

    def load(*_, **__):
        raise AssertionError("downloaded")

    with pytest.raises(InfrastructureError, match="choose"):
        fetch_tasks(["act_sst2"], tmp_path / "file", load=load, progress=False)


@pytest.mark.slow
def test_a_data_folder_is_filled_by_one_fetch_at_a_time(tmp_path):
    with (
        places.sole_writer(tmp_path / ".fetching", "busy"),
        pytest.raises(InputError, match=r"another fetch is filling .*--dest"),
    ):
        fetch_tasks(["act_demo_word"], tmp_path, progress=False)
    assert fetch_tasks(["act_demo_word"], tmp_path, progress=False).datasets == ()


# -- the terminal ----------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path):
    model = {"id": "m", "architecture": "A", "num_hidden_layers": 1, "num_attention_heads": 1}
    artifact = Artifact.model_validate(
        {"schema": "act-harness/heads/1", "name": "na\u00efve \u2713", "model": model,
         "calibration": {}, "heads": {0: (0,)}, "provenance": {"much": ["x" * 100] * 20_000}}
    )  # fmt: skip
    path = artifact.save(tmp_path / "a.json")
    return [sys.executable, "-m", "act_harness", "artifact", "show", "--full", str(path)]


def test_a_terminal_without_unicode_shows_escapes(shown):
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain.pop("PYTHONIOENCODING", None)
    done = subprocess.run(shown, env=plain, capture_output=True, check=True)
    assert b"na\\xefve \\u2713" in done.stdout


def test_a_reader_that_goes_away_is_no_failure(shown):
    process = subprocess.Popen(shown, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (141, b"")


def test_output_that_was_closed_is_no_failure(shown):
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "-", *shown], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
