from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import types

import pytest

import act_harness
from act_harness.errors import ResultError
from act_harness.support import provenance


@pytest.fixture
def repository(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "act_harness"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("outputs/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_commit_and_clean_tree(repository):
    state = provenance.commit(repository / "act_harness")
    assert state == (git(repository, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("act_harness/__init__.py", True),
        ("act_harness/new.py", True),
        ("notes.txt", False),
        ("outputs/results.json", False),
    ],
)
def test_what_makes_a_tree_dirty(repository, name, dirty):
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("changed")
    assert provenance.commit(repository / "act_harness").dirty is dirty


def test_an_installed_copy_below_a_repository_is_not_part_of_it(repository):
    installed = repository / "outputs" / "site-packages" / "act_harness"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance.commit(installed) == (None, None)


def test_no_repository_no_git_and_a_foreign_git_dir(repository, tmp_path_factory, monkeypatch):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "__init__.py").write_text("")
    assert provenance.commit(outside) == (None, None)
    head = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(outside / "nowhere"))
    assert provenance.commit(repository / "act_harness").commit == head
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(repository / "act_harness") == (None, None)


def test_collect_is_the_schema_of_an_artifact():
    found = provenance.collect(seed=7).to_json()
    assert set(found) == {
        "created", "act_harness", "python", "torch", "transformers", "lm_eval", "commit", "dirty",
        "device", "seed",
    }  # fmt: skip
    assert found["act_harness"] == act_harness.__version__
    assert found["seed"] == 7
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["created"])


def test_versions_import_nothing_and_a_missing_package_is_none(monkeypatch):
    code = (
        "import sys, act_harness.support.provenance as p; p.collect()\n"
        "print(p.versions()['torch'], [m for m in ('torch','transformers','lm_eval','numpy')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    monkeypatch.setattr(provenance, "_PACKAGES", ("no-such-package-at-all",))
    assert provenance.versions()["no-such-package-at-all"] is None


def test_devices_in_words(monkeypatch):
    assert re.search(r", \d+ cores$", provenance.describe_device())
    assert provenance.describe_device("cpu") == provenance.describe_device()
    assert provenance.describe_device("mps") == "mps"
    cuda = types.SimpleNamespace(is_available=lambda: True, get_device_name=lambda device: "GPU X")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert provenance.describe_device("cuda:1") == "GPU X (cuda:1)"
    monkeypatch.delitem(sys.modules, "torch")
    assert provenance.describe_device("cuda:1") == "cuda:1"


def test_hash_of_a_file(tmp_path):
    data = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "a").write_bytes(data)
    assert provenance.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    with pytest.raises(ResultError, match="no such file"):
        provenance.sha256_file(tmp_path / "b")
    with pytest.raises(ResultError, match="no such file"):
        provenance.sha256_file(tmp_path)


def test_hash_of_files_knows_names_and_contents_only(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a").write_text("A")
        (folder / "b").write_text("B")
    whole = provenance.sha256_files([first / "a", first / "b"])
    assert provenance.sha256_files([second / "b", second / "a"]) == whole
    assert provenance.sha256_files([first / "a"]) != whole
    (second / "b").write_text("C")
    assert provenance.sha256_files([second / "a", second / "b"]) != whole
    with pytest.raises(ResultError, match="same name"):
        provenance.sha256_files([first / "a", second / "a"])
    with pytest.raises(ResultError, match="no files"):
        provenance.sha256_files([])


def test_hash_of_json_ignores_the_order_of_keys():
    assert provenance.sha256_json({"a": 1, "b": [2]}) == provenance.sha256_json({"b": [2], "a": 1})
    assert provenance.sha256_json([1, 2]) != provenance.sha256_json([2, 1])
    assert provenance.sha256_text("a\ud800") != provenance.sha256_text("a")
