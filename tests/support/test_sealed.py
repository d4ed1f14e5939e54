"""Values that are read back only as they were written."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_harness.errors import ResultError
from act_harness.support.atomic import append_line, write_json
from act_harness.support.reading import read_json, read_lines
from act_harness.support.sealed import is_sealed, seal, unsealed

TEXTS = st.sampled_from(["", "a", "é", "10", "9", "\u2028"])
PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | TEXTS
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(TEXTS, PLAIN, max_size=3)


def opened(stored):
    return unsealed(stored, source="here", advice="do it again")


@given(st.dictionaries(st.sampled_from(["key", "value", "x"]), VALUES))
def test_what_was_sealed_comes_back_through_a_line(content):
    line = json.dumps(seal(content))
    assert json.dumps(opened(json.loads(line))) == json.dumps(content)


@pytest.mark.parametrize("name", ["one.json", "lines.jsonl"])
def test_files_keep_the_seal(tmp_path, name):
    content = {"z": (1, 2.5), "a": {"10": 0.1, "9": "é"}}
    if name == "one.json":
        write_json(tmp_path / name, seal(content), canonical=True)
        stored = read_json(tmp_path / name)
    else:
        append_line(tmp_path / name, seal({**content, "nan": math.nan}))
        (stored,) = read_lines(tmp_path / name)
    assert is_sealed(stored)
    assert opened(stored)["z"] == [1, 2.5]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["a"].append(1), lambda c: c.pop("a"), lambda c: c.update(b=1),
        lambda c: c.update(sha256="0" * 64), lambda c: c.pop("sha256"),
        lambda c: c.update(a=[1.0000001]),
    ],
)  # fmt: skip
def test_what_was_changed_is_refused_in_one_line(change):
    stored = json.loads(json.dumps(seal({"a": [1.0]})))
    change(stored)
    with pytest.raises(ResultError, match=r"^here is not as it was written.*; do it again$"):
        opened(stored)


@pytest.mark.parametrize("stored", [[], None, "text", {}])
def test_what_is_no_object_of_ours_is_refused(stored):
    with pytest.raises(ResultError, match="is not as it was written"):
        opened(stored)
    assert not is_sealed(stored)
