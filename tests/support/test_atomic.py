from __future__ import annotations

import errno
import json
import math
import os
import stat
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_harness.errors import InfrastructureError, InternalError, ResultError
from act_harness.support import atomic, reading

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_with(code):
    def fail(*_arguments):
        raise OSError(code, os.strerror(code))

    return fail


def test_text_bytes_and_json_round_trip_and_leave_no_other_file(tmp_path):
    atomic.write_text(tmp_path / "deep" / "er" / "a.txt", "ä\r\nb")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "ä\r\nb".encode()
    atomic.write_bytes(tmp_path / "b.bin", b"\0\xff")
    assert (tmp_path / "b.bin").read_bytes() == b"\0\xff"
    atomic.write_json(tmp_path / "c.json", {"b": [1, None], "a": "é"})
    assert json.loads((tmp_path / "c.json").read_text("utf-8")) == {"b": [1, None], "a": "é"}
    assert names(tmp_path) == ["b.bin", "c.json", "deep"]


def test_canonical_json_is_one_text_for_equal_values(tmp_path):
    atomic.write_json(tmp_path / "a", {"b": 1, "a": [1.5, "é"]}, canonical=True)
    atomic.write_json(tmp_path / "b", {"a": [1.5, "é"], "b": 1}, canonical=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() == b'{"a":[1.5,"\\u00e9"],"b":1}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [float("-inf")]}, object()])
def test_canonical_json_refuses_what_json_cannot_hold(tmp_path, value):
    with pytest.raises(InternalError, match="cannot be written as JSON"):
        atomic.write_json(tmp_path / "a.json", value, canonical=True)
    assert names(tmp_path) == []


def test_half_a_surrogate_pair_survives(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"x": "\ud800é"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"x": "\ud800é"}


def test_default_turns_unknown_objects_into_data(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"x": {1}}, default=sorted)
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1]}


def test_an_overwritten_file_keeps_its_mode_and_a_new_one_follows_the_umask(tmp_path):
    target = tmp_path / "a.txt"
    before = os.umask(0o027)
    try:
        atomic.write_text(target, "one")
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        target.chmod(0o604)
        atomic.write_text(target, "two")
        assert stat.S_IMODE(target.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_a_symbolic_link_is_followed(tmp_path):
    real = tmp_path / "real.txt"
    real.write_text("old")
    (tmp_path / "link.txt").symlink_to(real)
    atomic.write_text(tmp_path / "link.txt", "new")
    assert real.read_text() == "new"
    assert (tmp_path / "link.txt").is_symlink()


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_is_one_line(tmp_path, monkeypatch, broken):
    target = tmp_path / "a.json"
    atomic.write_json(target, {"old": True})
    place = atomic.Path if broken == "replace" else os
    monkeypatch.setattr(place, broken, fail_with(errno.ENOSPC))
    with pytest.raises(InfrastructureError, match=r"No space left.*untouched.*free some") as e:
        atomic.write_json(target, {"old": False})
    monkeypatch.undo()
    assert "\n" not in str(e.value)
    assert json.loads(target.read_text()) == {"old": True}
    assert names(tmp_path) == ["a.json"]


def test_a_real_full_device_is_reported():
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("no /dev/full on this system")
    handle = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space") as error:
            atomic._write_all(handle, [b"x"])
    finally:
        os.close(handle)
    assert error.value.errno == errno.ENOSPC


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InfrastructureError, match=r"cannot write .*file/a\.txt"):
        atomic.write_text(tmp_path / "file" / "a.txt", "x")


def test_an_interrupt_leaves_no_temporary_file(tmp_path):
    def chunks():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_lines(tmp_path / "a.jsonl", chunks())
    assert names(tmp_path) == []


@pytest.mark.slow
@given(records=st.lists(JSON, max_size=5))
def test_lines_round_trip_whatever_they_hold(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    atomic.write_lines(path, records)
    assert list(reading.read_lines(path, half_line="refuse")) == records
    for record in records:
        atomic.append_line(path, record, sync=False)
    assert list(reading.read_lines(path)) == records * 2


@given(cut=st.integers(min_value=0, max_value=200), size=st.integers(min_value=1, max_value=80))
def test_a_file_cut_anywhere_loses_only_its_last_line(tmp_path_factory, cut, size):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    records = [{"text": "ü\n" * size, "n": n} for n in range(3)]
    atomic.append_lines(path, records, sync=False)
    whole = path.read_bytes()
    kept = whole[: max(0, len(whole) - cut)]
    path.write_bytes(kept)
    complete = kept.count(b"\n")
    assert list(reading.read_lines(path)) == records[:complete]
    atomic.append_line(path, "next", sync=False)
    assert list(reading.read_lines(path, half_line="refuse")) == [*records[:complete], "next"]


def test_half_a_line_longer_than_a_block_is_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'"kept"\n' + b"x" * 200_000)
    atomic.append_line(path, "next")
    assert path.read_bytes() == b'"kept"\n"next"\n'


def test_half_a_line_can_be_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('1\n{"a": ')
    assert list(reading.read_lines(path)) == [1]
    with pytest.raises(ResultError, match="line 2 is cut off"):
        list(reading.read_lines(path, half_line="refuse"))


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1\n\n{oops\n3\n")
    with pytest.raises(ResultError, match="line 3 is not JSON"):
        list(reading.read_lines(path))


def test_a_missing_file(tmp_path):
    assert list(reading.read_lines(tmp_path / "no", missing_ok=True)) == []
    with pytest.raises(ResultError, match="no such file"):
        list(reading.read_lines(tmp_path / "no"))


def test_an_append_that_fails_half_way_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    atomic.append_line(path, {"n": 1})
    before = path.read_bytes()
    real, calls = os.write, []

    def short_then_full(handle, data):
        calls.append(len(data))
        if len(calls) == 1:
            return real(handle, bytes(data)[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", short_then_full)
    with pytest.raises(InfrastructureError, match="earlier lines are untouched"):
        atomic.append_line(path, {"n": 2})
    monkeypatch.undo()
    assert len(calls) == 2
    assert path.read_bytes() == before


def test_appending_is_all_or_nothing_when_a_record_is_not_json(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(InternalError):
        atomic.append_lines(path, [1, object()])
    assert not path.exists()


class Pair(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Found:
    pair: Pair
    names: frozenset[str]


@pytest.mark.parametrize(("value", "expected"), [
    (np.int64(3), 3), (np.float32(0.5), 0.5), (math.nan, None), ({1: (2, {3})}, {"1": [2, [3]]}),
    (np.bool_(True), "True"), (True, True), (None, None), (np.float64("inf"), None),
    (Found(Pair(0.5, -math.inf), frozenset("cab")),
     {"pair": {"low": 0.5, "high": None}, "names": ["a", "b", "c"]}),
])  # fmt: skip
def test_plain_values_are_what_json_holds(value, expected):
    found = atomic.plain(value)
    assert json.loads(atomic.canonical_json(found)) == found == expected
