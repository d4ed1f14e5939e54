"""What several texts or prompts begin with."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_harness.support.sequences import common_start


@pytest.mark.parametrize(
    ("sequences", "count"),
    [(["act_sst2", "act_cb", "act_rte"], 4), ({(1, 2, 3), (1, 2), (1, 2, 4)}, 2), ([[5, 1]], 2),
     (["", "a"], 0), (["b", "a"], 0), (([3, 3, 7], [3, 3, 7]), 3)],
)  # fmt: skip
def test_the_common_start_by_hand(sequences, count):
    assert common_start(sequences) == count


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5))
def test_the_common_start_is_counted_column_by_column(sequences):
    columns = zip(*sequences, strict=False)
    alike = takewhile(lambda column: len(set(column)) == 1, columns)
    assert common_start(sequences) == len(list(alike))
