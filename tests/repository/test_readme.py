"""README is one screen; what it says can be run, is run; commands are held against the parsers.

The commands' work has tests of its own: `make demo` and `make test` are CI's jobs, `lm_eval --model
hf-act` runs in test_plugin, both arms in test_evaluate, the search in test_search_run, MT-Bench and
its judge in test_mtbench_*, W&B in test_tracked_commands, the nightly suite in test_nightly and
test_regress. Figures are held by the dated reports that they link to.
"""

import inspect
import os
import re
import subprocess
import sys

import pytest
import typer
from installed import REPOSITORY
from shell_lines import check_line, command_lines, parse

from act_harness import artifact
from act_harness.cli import app as cli

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = (REPOSITORY / "docs/commands.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)


def test_it_is_one_screen_with_one_picture_and_one_table():
    assert len(README.splitlines()) <= 70
    assert README.count("![") == 1
    tables = re.findall(r"(?m)^\|[-|: ]+\|$", README)
    assert len(tables) == 1
    wanted = (
        "docs/index.md",
        "docs/commands.md",
        "docs/publish.md",
        "gguf_file=",
        "any two lm-eval",
    )
    assert [one for one in wanted if one not in README] == []


def shell_lines():
    return command_lines("\n".join(block for language, block in BLOCKS if language == "bash"))


def test_every_line_of_a_shell_block_is_a_command_that_is_there():
    kinds = dict.fromkeys(("pip", "make", "lm_eval", "act-harness"), 0)
    for line in shell_lines():
        kinds[check_line(line)] += 1
    assert min(kinds.values()) > 0, kinds


def test_a_command_that_is_not_there_is_found():
    with pytest.raises(Exception, match="No such command"):
        parse(["evil", "--tasks", "x"])
    with pytest.raises(Exception, match="No such option"):
        parse(["eval", "--tasks", "x", "--no-such-option"])


def test_the_tables_name_commands_and_arguments_that_exist():
    from act_harness.model import CalibratedHFLM

    group = typer.main.get_command(cli.app)
    told = re.findall(r"(?m)^\| `act-harness ([a-z]+)(?: ([a-z]+))?", COMMANDS)
    assert {name for name, _ in told} == set(group.commands) - {"tasks-path"}
    assert {one for name, one in told if name == "artifact"} == set(
        group.commands["artifact"].commands
    )
    table = COMMANDS.partition("| argument | meaning |")[2].partition("\n\n")[0]
    arguments = re.findall(r"(?m)^\| `(\w+)` \|", table)
    assert len(arguments) >= 5
    assert set(arguments) <= set(inspect.signature(CalibratedHFLM.__init__).parameters) | {
        "answers"
    }


def test_links_and_folders_exist():
    links = [one for one in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in one]
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = re.findall(r"(?m)^([a-z_]+)/ {2,}", contributing)
    assert len(links) > 5
    assert len(folders) >= 5
    for one in (*links, *folders):
        assert (REPOSITORY / one).exists(), one


@pytest.mark.slow
def test_the_python_example_says_what_the_model_writes(smollm, tmp_path):
    block = "\n".join(text for language, text in BLOCKS if language == "python")
    assert "calibrated(" in block
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo/model").symlink_to(smollm)
    shipped = artifact.shipped_artifacts()["smollm2-135m-instruct/demo"]
    (tmp_path / ".demo/artifact.json").write_bytes(shipped.read_bytes())
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris")
    assert len(done.stdout.split()) > 8
    said = [
        line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line
    ]
    assert said == []  # no warning of a length, a pad token or another tokenizer
