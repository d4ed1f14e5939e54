"""The nightly workflow runs what a developer can run: every command of it exists here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml
from installed import REPOSITORY

from act_harness.regress.suite import load_suite

WORKFLOW = REPOSITORY / ".github/workflows/nightly.yml"
if not WORKFLOW.is_file():
    pytest.skip("no workflows here: a source package leaves them out", allow_module_level=True)


@pytest.fixture(scope="module")
def workflow():
    content = yaml.safe_load(WORKFLOW.read_text())
    content["on"] = content.pop(True)  # YAML 1.1 reads the key "on" as a truth value
    return content


def steps(workflow, job="regress"):
    return workflow["jobs"][job]["steps"]


def make(*arguments, **environment):
    program = shutil.which("make")
    if program is None:
        pytest.skip("no make on this machine")
    done = subprocess.run(
        [program, "--dry-run", "--always-make", "--silent", *arguments], cwd=REPOSITORY,
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.replace("\\\n", " ").split())


def test_it_runs_every_night_and_by_hand(workflow):
    assert re.fullmatch(r"\d+ \d+ \* \* \*", workflow["on"]["schedule"][0]["cron"])
    assert "workflow_dispatch" in workflow["on"]
    assert workflow["permissions"] == {"contents": "read", "issues": "write"}


def test_every_command_of_the_suites_is_a_target_of_the_makefile(workflow):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    made = [command for command in commands if command.startswith("make ")]
    assert [command.split()[1] for command in made] == ["nightly", "nightly-issue"]
    for command in made:
        assert command.split()[1] in targets
        assert re.fullmatch(r'make [a-z-]+ SUITE="\$SUITE"', command)
    # What is left speaks to the runner alone.
    for command in set(commands) - set(made):
        assert re.search(r"\$GITHUB_(STEP_SUMMARY|ENV)", command)


def test_the_lock_is_taken_where_no_other_index_is_given(workflow):
    environment = workflow["jobs"]["regress"]["env"]
    assert environment["LOCK"] == "${{ matrix.gpu && 'requirements.lock' || '' }}"
    assert "!matrix.gpu" in environment["PIP_EXTRA_INDEX_URL"]
    fresh = workflow["jobs"]["fresh"]
    assert fresh["env"] == {"LOCK": "${{ matrix.lock }}"}
    assert (REPOSITORY / fresh["strategy"]["matrix"]["lock"][1]).is_file()
    assert steps(workflow, "fresh")[-1]["run"] == "make demo"
    plain, locked = make("venv"), make("venv", LOCK="requirements.lock")
    assert "install --quiet --editable" in plain
    assert "--require-hashes" not in plain
    assert "install --quiet --require-hashes --requirement requirements.lock" in locked
    assert "install --quiet --no-deps --editable '.[" in locked


def test_the_matrix_names_shipped_suites_and_the_gpu_is_off_by_default(workflow, tmp_path):
    (step,) = steps(workflow, "suites")
    output = tmp_path / "output"
    for wanted, expected in (
        ("false", ["smollm2-goldens"]),
        ("true", ["smollm2-goldens", "llama-2-7b-chat"]),
    ):
        subprocess.run(
            ["bash", "-euc", step["run"]], check=True,
            env={**os.environ, "GITHUB_OUTPUT": str(output), "GPU": wanted},
        )  # fmt: skip
        jobs = json.loads(output.read_text().partition("=")[2])["include"]
        output.unlink()
        assert [job["suite"] for job in jobs] == expected
        for job in jobs:
            assert load_suite(job["suite"])[0].model.device == ("cuda" if job["gpu"] else "cpu")
            assert ("self-hosted" in job["runner"]) is job["gpu"]


def test_a_failed_run_leaves_its_summary_and_files(workflow):
    by_use = {step.get("uses", step.get("run", "")).split("@")[0]: step for step in steps(workflow)}
    kept = by_use["actions/upload-artifact"]
    assert kept["if"] == "${{ !cancelled() }}"
    assert kept["with"]["path"] == ".nightly/${{ matrix.suite }}"
    assert kept["with"]["include-hidden-files"] is True
    (summary,) = (step for step in steps(workflow) if "STEP_SUMMARY" in step.get("run", ""))
    assert summary["if"] == "${{ !cancelled() }}"
    assert ".nightly/$SUITE/regress.md" in summary["run"]
    assert by_use["actions/cache"]["with"]["path"] == ".demo/model"
    suite, _ = load_suite("smollm2-goldens")
    assert suite.model.look_in[0] == by_use["actions/cache"]["with"]["path"]


def test_secrets_are_optional_and_given_to_few_steps(workflow):
    environment = workflow["jobs"]["regress"]["env"]
    assert "secrets.WANDB_API_KEY != ''" in environment["WANDB_MODE"]
    for step in steps(workflow):
        if "secrets." in str(step):
            assert step["name"] == "Access to models and datasets"


def test_make_nightly_is_the_command_of_the_readme():
    told = make("nightly", WANDB_MODE="disabled")
    assert told.endswith(
        "act-harness regress --suite smollm2-goldens --output .nightly/smollm2-goldens"
    )
    told = make("nightly", "SUITE=smollm2-benchmarks", "DATA_DIR=rows", WANDB_MODE="offline")
    assert told.endswith(
        "act-harness regress --suite smollm2-benchmarks --output .nightly/smollm2-benchmarks "
        "--data-dir rows --wandb-project act-harness"
    )


@pytest.mark.parametrize(
    ("content", "open_issue", "expected"),
    [
        ({"status": "regressed"}, "", "issue create --title Nightly regression: s"),
        ({"status": "regressed"}, "7", "issue comment 7"),
        ({"status": "infrastructure"}, "", None),
        (None, "", None),
    ],
)
def test_an_issue_is_opened_or_commented_on_a_regression_only(
    tmp_path, content, open_issue, expected
):
    log = tmp_path / "log"
    program = tmp_path / "bin" / "gh"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *"issue list"*) printf "%s" "{open_issue}";; '
        f'*) echo "$*" >> "{log}"; for last; do :; done; cat "$last" >> "{log}";; esac\n'
    )
    program.chmod(0o755)
    if content is not None:
        (tmp_path / "regress.json").write_text(json.dumps(content))
        (tmp_path / "regress.md").write_text("## the report\n")
    done = subprocess.run(
        [REPOSITORY / ".ci/nightly-issue", tmp_path, "s"], check=False, capture_output=True,
        text=True, env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if expected is None:
        assert not log.exists()
        assert "no issue" in done.stdout
    else:
        assert log.read_text().startswith(expected)
        assert "## the report" in log.read_text()


def test_families_are_held_against_the_stored_table(workflow, tmp_path):
    """The step as the runner runs it, with a command in its place that finds something worse."""
    (step,) = (one for one in steps(workflow, "families") if one.get("name") == "What changed")
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/act-harness"
    stand_in.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]], check=False, capture_output=True, cwd=tmp_path,
        env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 1
    (summary,) = (one for one in steps(workflow, "families") if one.get("name") == "Job summary")
    kept = tmp_path / summary["run"].split()[1]
    words = kept.read_text().split()
    assert words[:2] == ["doctor", "--families"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert set(options) == {"--against", "--output"}
    assert (REPOSITORY / options["--against"]).is_file()
    assert (tmp_path / options["--output"]).parent.is_dir()
