"""The tuner's command line: wrong options are one line, and nothing is run or made."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from installed import REPOSITORY

pytest.importorskip("triton")

PATH = REPOSITORY / "results" / "benchmarks" / "tools" / "tune.py"
_spec = importlib.util.spec_from_file_location("tune", PATH)
tune = sys.modules["tune"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tune)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--shapes", "1y2"), "expected a pair such as 4x2048"),
        (("--selected", "7,x"), "expected whole numbers"),
        (("--heads", "0"), "expected a whole number above 0"),
        (("--seconds", "nan"), "expected a whole number above 0"),
        (("--dtype", "bfloat17"), "dtype=bfloat17 is unknown"),
        (("--device", "gpu"), "did you mean 'cuda'"),
        (("--stages", "sums,direkt"), "did you mean 'direct'"),
    ],
)
def test_wrong_options_are_one_line(given, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main([*given, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.startswith("act-harness: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_stages_come_in_their_own_order():
    assert [stage.name for stage in tune._read_stages("finish,sums")] == ["sums", "finish"]
