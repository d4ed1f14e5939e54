"""Records before the validator of the package every-eval-ever, where its command is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from published_runs import write_evaluation

from act_harness.publication.publish import publish

COMMAND = os.environ.get("EVERY_EVAL_EVER", "every_eval_ever")
# Where it was named (make published) it has to be there: a skipped job would be a green one.
AWAY = "EVERY_EVAL_EVER" not in os.environ and shutil.which(COMMAND) is None


def validate(folder):
    files = [str(path) for path in (folder / "every_eval_ever").rglob("*.json")]
    assert files
    done = subprocess.run([COMMAND, "validate", *files], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(AWAY, reason="every-eval-ever: make published")
@pytest.mark.parametrize(
    "settings",
    [{}, {"seeds": (1, 2)}, {"tasks": ("a", "b"), "groups": {"g": ["a", "b"]}}, {"whole": 9}],
)
def test_records_pass_the_validator(tmp_path, settings):
    write_evaluation(tmp_path / "out", **settings)
    publish(tmp_path / "out", str(tmp_path / "to"))
    code, said = validate(tmp_path / "to")
    assert code == 0, said
    assert re.search(r"(?<!\d)0 warnings", said), said


@pytest.mark.skipif(AWAY, reason="every-eval-ever: make published")
def test_the_validator_can_fail(tmp_path):
    write_evaluation(tmp_path / "out")
    publish(tmp_path / "out", str(tmp_path / "to"))
    for file in (tmp_path / "to" / "every_eval_ever").rglob("*.json"):
        file.write_text(
            file.read_text().replace('"0.0"', '""').replace('"score": 0.', '"score": 7.')
        )
    assert validate(tmp_path / "to")[0] != 0
