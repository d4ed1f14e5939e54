"""The drawings of a packed row and of its segments show what the code lays out."""

import re

import torch

from act_harness.attention import packing
from act_harness.engines import segments

CONTEXTS, ANSWERS = (4, 2), (packing.Rows(0, (2, 1)), packing.Rows(1, (2,)))
TOKENS = ["c0", "c1", "c2", "c3", "d0", "d1", "a0", "a1", "b0", "e0", "e1"]
ROW = packing.Packing(CONTEXTS, CONTEXTS, ANSWERS)


def drawn(page, word):
    """What a line of a module's drawing says behind its first word, up to the remark."""
    (line,) = re.findall(rf"^    {word} +(.*)$", page, flags=re.MULTILINE)
    return re.split(r" {4,}(?=\S* ?[a-z]{2})", line)[0]


def test_the_packed_row():
    assert re.findall(r"\w+", drawn(packing.__doc__, "token")) == TOKENS
    positions = [int(one) for one in re.findall(r"\d+", drawn(packing.__doc__, "position"))]
    assert [positions] == ROW.position_ids.tolist()
    assert len(TOKENS) == ROW.tokens


def test_what_the_packed_answers_see():
    _, extension = ROW._geometries(torch.device("cpu"))
    seen = extension.visible(0, extension.rows)[:, 0]
    columns = [["c0", "c1", "c2", "c3", "a0", "a1", "b0"], ["d0", "d1", "", "", "e0", "e1", ""]]
    for row, (context, number) in {
        "a0": (0, 0), "a1": (0, 1), "b0": (0, 2), "e0": (1, 0), "e1": (1, 1),
    }.items():  # fmt: skip
        (line,) = re.findall(rf" {{8,}}{row} {{5}}(.+)$", packing.__doc__, flags=re.MULTILINE)
        places = line.split()
        assert len(places) == 7
        for place, name, sees in zip(
            places, columns[context], seen[context, number].tolist(), strict=True
        ):
            assert place == (name if sees else ".")


def test_the_segments():
    found = segments.Segments.of(CONTEXTS, CONTEXTS, ROW.sizes, torch.device("cpu"))
    page = segments.__doc__
    queries, keys = (drawn(page, word).split("|") for word in ("queries", "keys"))
    assert [len(part.split()) for part in queries] == found.table[:, 1].tolist()
    assert [len(part.split()) for part in keys] == found.table[:, 3].tolist()
    assert [TOKENS[place] for place in found.columns] == " ".join(keys).split()
    assert " ".join(queries).split() == TOKENS
