"""How documents are cut into batches: each document once, and at the least cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act_harness.search.compute.read_rows import batches_of, forward_cost
from act_harness.search.compute.training import scored_together
from act_harness.search.documents import Document

CPU = torch.device("cpu")


def questions(lengths):
    return [
        Document("t", str(n), ((tuple(range(k)), (1,)), (tuple(range(k)), (2,))), 0)
        for n, k in enumerate(lengths)
    ]


def test_batches_end_where_documents_become_much_shorter():
    docs = questions([20, 100, 18, 90, 60])

    def cut(forward: float, tokens: int = 10_000) -> list[tuple[int, ...]]:
        found = batches_of(docs, tokens=tokens, device=CPU, forward=forward)
        return [one.documents for one in found]

    assert cut(0) == [(1,), (3,), (4,), (0,), (2,)]
    assert cut(5) == [(1,), (3,), (4,), (0, 2)]  # one more forward saves 2 tokens, then 10
    assert cut(15) == [(1, 3), (4,), (0, 2)]
    assert cut(45) == [(1, 3, 4), (0, 2)]
    assert cut(1000) == [(1, 3, 4, 0, 2)]
    assert cut(1000, tokens=290) == [(1, 3), (4, 0, 2)]  # no batch of three holds the longest
    assert cut(1000, tokens=50) == [(1,), (3,), (4,), (0, 2)]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7),
    tokens=st.integers(1, 200),
    forward=st.integers(0, 100),
)
def test_no_other_cut_of_the_documents_costs_less(lengths, tokens, forward):
    docs = [Document("t", str(n), ((tuple(range(k)), (1,)),) * 2, 0) for n, k in enumerate(lengths)]
    found = batches_of(docs, tokens=tokens, device=CPU, forward=forward)
    assert sorted(n for one in found for n in one.documents) == list(range(len(docs)))
    assert all(one.tokens <= tokens or len(one.documents) == 1 for one in found)

    worth = min(forward, tokens / 2)
    ordered = sorted(lengths, reverse=True)
    costs = []
    for marks in itertools.product([False, True], repeat=len(ordered) - 1):
        edges = [0, *(n + 1 for n, cut in enumerate(marks) if cut), len(ordered)]
        parts = [ordered[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(part) * part[0] <= tokens or len(part) == 1 for part in parts):
            costs.append(sum(worth + len(part) * part[0] for part in parts))
    assert sum(worth + one.tokens for one in found) == pytest.approx(min(costs))


@pytest.mark.parametrize(
    ("lengths", "processes", "forward", "batches"),
    [
        ([20, 19, 18, 17], 2, 1000, [(0, 1), (2, 3)]),  # 40 tokens, and the share is 37
        ([20, 19, 18, 17], 4, 0, [(0,), (1,), (2,), (3,)]),
        ([20, 19, 18], 5, 0, [(0,), (1,), (2,)]),  # two processes have nothing to do
        ([40, 10, 10, 10, 10], 2, 5, [(0,), (1, 2, 3, 4)]),
        ([20] * 6, 1, 1000, [(0, 1, 2, 3, 4, 5)]),
        ([20] * 6, 2, 1000, [(0, 1, 2), (3, 4, 5)]),
    ],
)
def test_processes_get_batches_that_end_together(lengths, processes, forward, batches):
    found = batches_of(
        questions(lengths), tokens=10_000, device=CPU, forward=forward, processes=processes
    )
    assert [one.documents for one in found] == batches


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    tokens=st.integers(1, 200),
    processes=st.integers(1, 5),
)
def test_processes_share_every_document_once(lengths, tokens, processes):
    found = batches_of(
        questions(lengths), tokens=tokens, device=CPU, forward=30, processes=processes
    )
    assert sorted(n for one in found for n in one.documents) == list(range(len(lengths)))
    assert all(one.tokens <= tokens or len(one.documents) == 1 for one in found)


def test_what_a_forward_is_worth_falls_with_the_size_of_the_model():
    assert forward_cost(CPU, 576) == pytest.approx(60, rel=0.02)  # measured: 0.38 s, 6 ms a token
    cuda = torch.device("cuda")
    assert forward_cost(cuda, 576) / forward_cost(cuda, 4096) == pytest.approx((4096 / 576) ** 2)


def test_tasks_share_forwards_in_their_order():
    sizes = {"a": 30, "b": 60, "c": 20, "d": 500, "e": 1}
    assert scored_together(sizes, tokens=100) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert scored_together({}, tokens=100) == []
