"""A whole gradient search of a tiny model, on random questions or on some with a known answer."""

from __future__ import annotations

import dataclasses
import random

import torch
from tiny_search import drawn, tiny

from act_harness.calibration import Calibration
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.read_rows import batches_of
from act_harness.search.documents import Document, TaskDocuments
from act_harness.search.recipe import make_recipe
from act_harness.search.run import run_search

PLANTED = {(0, 0): 2.5, (1, 2): 2.5, (2, 0): -3.0}
"""(layer, head) to log strength: what decides the right answers of :func:`planted`."""


def level(documents):
    """Answers of one token each: a longer one would always be the least likely."""
    return tuple(
        dataclasses.replace(
            one, requests=tuple((context, answer[:1]) for context, answer in one.requests)
        )
        for one in documents
    )


def twins(task, seed):
    """Random texts: what is tuned on some of them helps on those alone, so they verify too."""
    found = drawn(task, seed)
    return dataclasses.replace(found, search=level(found.search), verify=level(found.search))


DRAWN = [twins("a", 5), twins("b", 6)]


def recipe(**changes):
    return make_recipe(
        {
            "name": "tiny",
            "tasks": ["a", "b"],
            "samples": 8,
            "verify_samples": 8,
            "calibration": {"alpha": 2.0},
            "method": "gradient",
            "chunk_tokens": 100,
            "controls": {"random_sets": 2},
            **changes,
            "gradient": {
                "epochs": 4,
                "batch": 4,
                "rate": 0.3,
                "sizes": [2, 5],
                **changes.get("gradient", {}),
            },
        }
    )


def search(folder, given=None, documents=DRAWN, name="out"):
    return run_search(
        given or recipe(),
        model=tiny(),
        documents=documents,
        ledgers=folder / "ledgers",
        output=folder / f"{name}.json",
        show_progress=False,
    )


def planted(task, seed, count=40, *, target="sinks", pool=16):
    """Return questions whose right answers are those of the model with known strengths.

    All have the same choices. The answer is the likeliest choice after the label prior; the
    untouched model's is another in half of the questions, which are drawn from ``pool`` times
    ``count`` texts.
    """
    calibration = recipe(gradient={"target": target}).tuned_calibration()
    draw = random.Random(seed)  # noqa: S311 - no secret
    answers = [(token,) for token in draw.sample(range(97), 3)]
    every = []
    for number in range(pool * count):
        context = tuple(draw.randrange(97) for _ in range(draw.randint(10, 18)))
        requests = tuple((context, answer) for answer in answers)
        every.append(Document(task, f"{seed:04x}{number:04x}", requests, 0, ("x", "y", "z")))
    before, after = (_answers(every, calibration, given) for given in ({}, PLANTED))
    turned = [n for n in range(len(every)) if before[n] != after[n]][: 3 * count // 2]
    others = [n for n in range(len(every)) if before[n] == after[n]][: 3 * count // 2]
    taken = [n for pair in zip(turned, others, strict=True) for n in pair]
    chosen = [dataclasses.replace(every[n], right=after[n]) for n in taken]
    return TaskDocuments(
        task, search=tuple(chosen[:count]), verify=tuple(chosen[count : 2 * count]),
        judge=tuple(chosen[2 * count :]), source="train", evaluation="test", too_long=0,
    )  # fmt: skip


@torch.no_grad()
def _answers(documents, calibration: Calibration, strengths) -> list[int]:
    with StrengthenedModel(tiny(), calibration) as opened:
        theta = torch.zeros(opened.shape)
        for (layer, head), value in strengths.items():
            theta[:, layer, head] = value
        scores = torch.zeros(len(documents), 3)
        for batch in batches_of(documents, tokens=4096, device=torch.device("cpu")):
            scores[list(batch.documents)] = opened.scores(batch, theta)
    return (scores - scores.mean(dim=0)).argmax(dim=1).tolist()
