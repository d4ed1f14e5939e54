"""Files for those who come to the repository: workflows, image, citation, templates, hooks."""

from __future__ import annotations

import re
import shlex
import sys
import types

import pytest
import yaml
from installed import REPOSITORY, pyproject, tomllib
from shell_lines import INSTALL

import act_harness

if not (REPOSITORY / ".github").is_dir():
    pytest.skip("a source package leaves these files out", allow_module_level=True)


def read(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def load(name):
    return yaml.safe_load(read(name))


def test_the_citation_names_this_version_licence_and_paper():
    citation = load("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == act_harness.__version__
    assert citation["license"] == pyproject()["project"]["license"]
    assert citation["preferred-citation"]["year"] == 2024
    assert " ".join(citation["preferred-citation"]["title"].split()) in " ".join(
        read("README.md").split()
    )


def test_a_release_needs_no_token_and_publishes_only_what_was_tried():
    jobs = load(".github/workflows/release.yml")["jobs"]
    publish = jobs["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "ref_type == 'tag'" in publish["if"]
    (send,) = [step for step in publish["steps"] if "pypi-publish" in step["uses"]]
    assert "with" not in send  # no user, no password
    assert "secrets." not in read(".github/workflows/release.yml")
    assert [name for name, job in jobs.items() if "contents" in job.get("permissions", {})] == [
        "release"
    ]


def test_the_release_reads_the_version_where_it_stands():
    (command,) = re.findall(r'"v\$\((cut [^)]+)\)"', read(".github/workflows/release.yml"))
    assert shlex.split(command) == ["cut", '-d"', "-f2", "act_harness/_version.py"]
    quoted = [line.split('"') for line in read("act_harness/_version.py").splitlines()]
    assert quoted[-1][1] == act_harness.__version__


def copied():
    """Return what the image's build copies from the checkout."""
    text = re.sub(r"\\\n", " ", read("Dockerfile"))
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("COPY ")]
    return [place for words in lines if not words[0].startswith("--") for place in words[:-1]]


def test_the_image_copies_what_is_there_and_what_docker_is_sent():
    sent = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert set(copied()) == sent
    for place in copied():
        assert (REPOSITORY / place).exists(), place


def test_the_image_has_what_the_build_reads():
    """hatchling and the hook read these; without one the wheel fails, or is not whole."""
    project = pyproject()
    hook = read("hatch_build.py")
    needed = {"pyproject.toml", "hatch_build.py", project["project"]["readme"], "act_harness"}
    needed |= {*project["project"]["license-files"]}
    folders = re.findall(r'^\w* ?=? ?\(?"([a-z/]+)", "', hook, re.MULTILINE)
    folders += re.findall(r'^    \("([a-z/]+)", "', hook, re.MULTILINE)
    assert {"tasks", "search/artifacts", "results/baselines"} <= set(folders)
    there = set(copied())
    assert needed <= there
    for folder in folders:
        assert {folder, folder.partition("/")[0]} & there, folder
    assert "--require-hashes" in read("Dockerfile")


def test_the_hooks_run_what_make_check_runs():
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    check = re.search(r"(?m)^check: venv\n((?:\t.*\n)+)", read("Makefile")).group(1)
    for hook in repository["hooks"]:
        command = hook["entry"].removeprefix(".venv/").removesuffix(" --force-exclude")
        assert command.replace("bin/", "$(BIN)/") in check, hook["id"]


def test_issue_forms_ask_for_what_helps_and_are_forms():
    folder = REPOSITORY / ".github/ISSUE_TEMPLATE"
    forms = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yml")
             if path.name != "config.yml"]  # fmt: skip
    assert len(forms) == 3
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        names = [part["id"] for part in form["body"]]
        assert len(set(names)) == len(names)
        assert all(part["attributes"]["label"] for part in form["body"])
    assert sum("act-harness doctor" in str(form) for form in forms) == 2


def test_every_way_to_install_is_tried_and_on_the_page():
    ways = load(".github/workflows/ci.yml")["jobs"]["install"]["strategy"]["matrix"]["include"]
    assert [way["way"] for way in ways] == ["pip", "uv", "uvx", "pipx"]
    page = read("docs/index.md")
    for way, line in zip(ways, INSTALL, strict=True):
        # `python -m pip` is that of the job, `--python user` an environment not entered.
        tried = way["install"].replace("python -m ", "").replace("--python user ", "")
        assert line.removesuffix("doctor") in f"{tried} "
        assert f"\n{line}\n" in page


def test_the_page_about_plugins_does_what_it_says(tmp_path, monkeypatch):
    page = read("docs/writing_a_plugin.md")
    model, register = re.findall(r"(?ms)^```python[^\n]*\n(.*?)^```$", page)
    (toml,) = re.findall(r"(?ms)^```toml[^\n]*\n(.*?)^```$", page)
    (entry,) = tomllib.loads(toml)["project"]["entry-points"]["lm_eval.models"].items()
    package, module = types.ModuleType("longest_answer"), types.ModuleType("longest_answer.model")
    exec(model, vars(module))  # noqa: S102 - the page's own lines
    monkeypatch.setitem(sys.modules, "longest_answer", package)
    monkeypatch.setitem(sys.modules, "longest_answer.model", module)
    from lm_eval.api.registry import get_model, model_registry

    exec(register, {})  # noqa: S102
    exec(register, {})  # noqa: S102 - once more changes nothing
    try:
        assert entry == ("longest", "longest_answer.model:LongestAnswer")
        scorer = get_model("longest").create_from_arg_string("per_character=2")
        assert get_model("hf").__name__ == "HFLM"
    finally:
        model_registry._objs.pop("longest", None)
    request = types.SimpleNamespace(args=("question", "four"))
    assert scorer.loglikelihood([request]) == [(8.0, False)]


def test_the_page_about_plugins_speaks_of_what_is_declared():
    assert pyproject()["project"]["entry-points"]["lm_eval.models"]["hf-act"]
    page = read("docs/writing_a_plugin.md")
    for place in re.findall(r"`((?:act_harness/)?\w+\.py)`", page):
        assert place == "__init__.py" or (REPOSITORY / place).exists() or (
            REPOSITORY / "act_harness" / place
        ).exists(), place  # fmt: skip
