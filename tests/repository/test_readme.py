"""What README says can be run, is run; commands are held against the real parsers.

The commands' work has tests of its own: `make demo` and `make test` are CI's jobs, `lm_eval --model
hf-act` runs in test_plugin, both arms in test_evaluate, the search in test_search_run, MT-Bench and
its judge in test_mtbench_*, W&B in test_tracked_commands, the nightly suite in test_nightly and
test_regress. Figures are held by the dated reports that they link to.
"""

import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from installed import REPOSITORY

from act_harness import artifact
from act_harness.cli import app as cli

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", README)


def shell_lines():
    text = "\n".join(block for language, block in BLOCKS if language == "bash")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [line for line in (re.sub(r"\s+# .*", "", one).strip() for one in lines) if line]


def parse(words):
    """Hand words to the command that they name; it parses them and is not run."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("act-harness", list(words))
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)
    return context


def test_every_line_of_a_shell_block_is_a_command_that_is_there():
    made = set(re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text()))
    kinds = dict.fromkeys(("pip", "make", "lm_eval", "act-harness"), 0)
    for line in shell_lines():
        program, *words = shlex.split(line)
        kinds[program] += 1
        if program == "make":
            assert words[0] in made
        elif program == "act-harness":
            parse(words)
        elif program == "lm_eval":
            check_lm_eval(words)
        else:
            assert line == "pip install -c constraints.txt ."
    assert min(kinds.values()) > 0, kinds


def check_lm_eval(words):
    """Parse as lm-eval would: without a subcommand the words are those of `run`."""
    from lm_eval._cli import HarnessCLI

    given = HarnessCLI()._parser.parse_args(["run", *words])
    assert given.model == "hf-act"
    assert given.tasks


def test_a_command_that_is_not_there_is_found():
    with pytest.raises(Exception, match="No such command"):
        parse(["evil", "--tasks", "x"])
    with pytest.raises(Exception, match="No such option"):
        parse(["eval", "--tasks", "x", "--no-such-option"])


def test_the_tables_name_commands_and_arguments_that_exist():
    from act_harness.model import CalibratedHFLM

    group = typer.main.get_command(cli.app)
    told = re.findall(r"(?m)^\| `act-harness ([a-z]+)(?: ([a-z\\|]+))?", README)
    assert {name for name, _ in told} == set(group.commands) - {"tasks-path"}
    for name, inner in told:
        for one in filter(None, inner.split(r"\|")):
            assert one in group.commands[name].commands
    table = README.partition("| argument | meaning |")[2].partition("\n\n")[0]
    arguments = re.findall(r"(?m)^\| `(\w+)` \|", table)
    assert len(arguments) >= 5
    assert set(arguments) <= set(inspect.signature(CalibratedHFLM.__init__).parameters) | {
        "answers"
    }


def test_links_and_folders_exist():
    links = [one for one in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in one]
    folders = re.findall(r"(?m)^([a-z_]+)/ {2,}", README)
    assert len(links) > 5
    assert len(folders) >= 5
    for one in (*links, *folders):
        assert (REPOSITORY / one).exists(), one


@pytest.mark.slow
def test_the_python_examples_say_what_the_model_writes(smollm, tmp_path):
    block = "\n".join(text for language, text in BLOCKS if language == "python")
    assert "calibrated(" in block
    assert "head_set(" in block
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
