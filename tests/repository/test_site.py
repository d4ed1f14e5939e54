"""The site of docs/: every code block is run or says why not, and it builds without a warning.

Blocks run in the order of their page, in a folder that has ``.demo/model`` (a tiny model) and
``.demo/artifact.json``. Blocks with a title are files. What is not run is held to the parsers.
"""

import ast
import glob
import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest
import yaml
from installed import REPOSITORY
from own_tasks import caller, few_tasks
from shell_lines import check_line, command_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import act_harness

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r'(?ms)(?:^<!-- ([^\n]+) -->\n)?^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$')
LANGUAGES = {"bash", "python", "yaml", "json", "text"}


@dataclass(frozen=True)
class Block:
    """A code block of a page, with the comment in front of it."""

    remark: str
    language: str
    title: str
    text: str

    @property
    def run(self):
        return not self.remark.startswith(("not run: ", "from "))

    @property
    def code(self):
        """The exit code that its commands should end with."""
        return int(self.remark.removeprefix("exits ") or 0)


def blocks(page):
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


ALL = [(page, block) for page in PAGES for block in blocks(page)]


def test_every_block_is_run_or_says_why_not():
    fences = sum(len(re.findall(r"(?m)^ *```\w", page.read_text("utf-8"))) for page in PAGES)
    assert len(ALL) == fences > 40
    for page, block in ALL:
        where = f"{page.name}: {block.text[:60]}"
        assert block.language in LANGUAGES, where
        assert re.fullmatch(r"(not run: .{10,}|exits \d+|from \S+)?", block.remark), where
    assert sum(block.run for _, block in ALL) > 2 * sum(not block.run for _, block in ALL)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_tasks():
        yield


@pytest.fixture
def folder(tiny_checkpoint, tmp_path, monkeypatch):
    """Enter a folder with a model and a head set where pages have them."""
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo/model").symlink_to(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    heads = act_harness.head_set(model, {0: [1], 2: [0, 3]}, name="demo", tokenizer=tokenizer)
    heads.save(tmp_path / ".demo/artifact.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell_words(line):
    """Cut a command into words and expand patterns of files, as a shell would."""
    for word in shlex.split(line):
        yield from sorted(glob.glob(word)) or [word]


def says(expected, output):
    """Whether the output has each line of a block, with anything in place of ``...``."""
    found = " ".join(output.split())
    return all(
        re.search(".*?".join(map(re.escape, " ".join(line.split()).split("..."))), found)
        for line in expected.splitlines()
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page(page, folder, monkeypatch, capsys):
    call, names, said = caller(monkeypatch, capsys), {"__name__": page.stem}, ""
    for block in filter(lambda one: one.run, blocks(page)):
        if block.title:
            target = folder / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            said = ""
            for line in command_lines(block.text):
                program, *words = shell_words(line)
                assert program == "act-harness", line
                ended = call(*words)
                assert ended.code == block.code, (line, ended.err)
                said += ended.out + ended.err
        elif block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)  # noqa: S102 - our own page
            said = capsys.readouterr().out
        else:
            assert block.language == "text", block
            assert says(block.text, said), (block.text, said)


def test_an_expected_text_that_is_not_said_is_found():
    assert says("[0.32..., 0.2...]\nb", "a [0.3200001, 0.2]\n  b")
    assert not says("did you mean 'x'?", "did you mean 'y'?")
    assert not says("a\nb", "a")


@pytest.mark.parametrize(
    "block", [block for _, block in ALL if not block.run], ids=lambda one: one.text[:40]
)
def test_a_block_that_is_not_run_names_what_exists(block):
    if block.language == "bash":
        for line in command_lines(block.text):
            check_line(line)
    elif block.language == "python":
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    else:  # a drawing that stands in the code
        source = (REPOSITORY / block.remark.removeprefix("from ")).read_text(encoding="utf-8")
        lines = [line.strip() for line in source.splitlines()]
        drawing = [line.strip() for line in block.text.splitlines()]
        start = lines.index(drawing[0])
        assert lines[start : start + len(drawing)] == drawing


@pytest.mark.slow
def test_the_site_builds_and_asks_no_other_host(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {page.stem for page in PAGES} <= {page.stem for page in tmp_path.glob("*.html")}
    assert (tmp_path / "repository/act_harness/engines/index.html").exists()
    asked = r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"']?((?:https?:)?//[^\s\"'>]+)"
    assert [found for page in pages for found in re.findall(asked, page.read_text("utf-8"))] == []
    styles = "".join(file.read_text("utf-8") for file in tmp_path.rglob("*.css"))
    assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']+", styles) == []
