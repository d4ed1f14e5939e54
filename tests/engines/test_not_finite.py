"""A token that makes NaN: it spoils its own requests, no others, and it is counted and refused."""

from __future__ import annotations

import math

import pytest
import torch

from act_harness.attention import attach
from act_harness.attention.capabilities import Answer, capabilities_of
from act_harness.attention.counters import CalibrationCounters
from act_harness.errors import InfrastructureError
from act_harness.scoring.scorer import Item, Scorer
from act_harness.scoring.trials import packs
from act_harness.search.choose.effects import TaskScores
from act_harness.search.documents import Document

POISON = 12  # none of the tokens that trials and the probe take
CONTEXTS = [(5, 9, 14, 22, 7, 31), (8, 3, 4), (5, POISON, 6)]
ANSWERS = [(9,), (30, 40, 50), (POISON, 5), (7, POISON, 8, 9), (3, POISON), ()]
ITEMS = [Item(context, answer) for context in CONTEXTS for answer in ANSWERS] + [
    # one longer answer beside single tokens: it is computed in the same rows as the context
    Item((50, 51, 52, 53, 54), (9,)),
    Item((50, 51, 52, 53, 54), (POISON, 8)),
    Item((60,), (30, 31, 32), prompt=0),
    Item((60,), (30, POISON, 32, 5), prompt=0),
]


def poisoned(model, token=POISON):
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    return model


def alone(model, attachment):
    return [Scorer(model, attachment, share=False).score([item])[0] for item in ITEMS]


def same(found, expected):
    for item, a, b in zip(ITEMS, found, expected, strict=True):
        assert a.loglikelihood == pytest.approx(b.loglikelihood, abs=1e-6, nan_ok=True), item
        assert a.is_greedy == b.is_greedy, item


@pytest.mark.parametrize("decode", [None, "frozen", "running"])
@pytest.mark.parametrize("kind", ["llama", "llama over a cache", "llama in rows", "mistral"])
def test_a_poisoned_token_spoils_its_own_requests_only(
    tiny, make_artifact, monkeypatch, kind, decode
):
    model = poisoned(tiny(kind.split()[0]))
    if "cache" in kind:
        capabilities_of(model).packs = Answer(False, "so the test says")
    if "rows" in kind:  # as other devices do
        monkeypatch.setattr("act_harness.scoring.forwards.Forwards._joins_answers", False)
    artifact = None if decode is None else make_artifact(model, decode=decode)
    attachment = attach(model, artifact, engine="torch")
    assert packs(Scorer(model, attachment).forwards).value is (kind in ("llama", "llama in rows"))
    expected = alone(model, attachment)
    finite = [math.isfinite(score.loglikelihood) for score in expected]
    assert 0 < sum(finite) < len(finite)
    assert all(
        fine == (POISON not in item.context + item.answer[:-1])
        for item, fine in zip(ITEMS, finite, strict=True)
        if item.answer
    )
    counted = {}
    for batch_size, order in ((None, 1), (2, -1)):
        counters = CalibrationCounters()
        scorer = Scorer(model, attachment, batch_size=batch_size)
        found = scorer.score(ITEMS[::order], on_prompt=counters.record)
        same(found[::order], expected)
        counted[batch_size] = counters.summary()
    assert counted[None] == pytest.approx(counted[2])
    if artifact is not None:
        assert counted[None]["prompts"] == len(CONTEXTS)  # the poisoned one has none to report


@pytest.mark.parametrize("decode", [None, "frozen"])
def test_pads_that_are_poisoned(tiny, make_artifact, decode):
    model = tiny("mistral")
    attachment = attach(model, None if decode is None else make_artifact(model))
    poisoned(model, token=0)
    expected = alone(model, attachment)
    same(Scorer(model, attachment, batch_size=8).score(ITEMS), expected)
    assert all(math.isfinite(score.loglikelihood) for score in expected)


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_search_does_not_rank_heads_by_what_is_no_number(wrong):
    documents = [Document("t", f"key{n}", (((4,), (5,)), ((4,), (6,))), 0) for n in range(2)]
    with pytest.raises(InfrastructureError, match="document key1 of t has scores that are not"):
        TaskScores.of(documents, [(-1.0, -2.0), (-1.0, wrong)], objective="plain")


@pytest.mark.parametrize("engine", ["torch", "reference"])
def test_a_poisoned_continuation_does_not_undo_a_detection(tiny, make_artifact, engine):
    """The context's rows share a call with the continuation: means of NaN find no sinks."""
    model = poisoned(tiny())
    attachment = attach(model, make_artifact(model, alpha=1.1, beta=0.0), engine=engine)
    context = (50, 51, 52, 53, 54, 50, 51)
    (expected,) = Scorer(model, attachment).score([Item(context, (9,))])
    with attachment.suspended():
        (baseline,) = Scorer(model).score([Item(context, (9,))])
    assert abs(expected.loglikelihood - baseline.loglikelihood) > 1e-3
    found, broken = Scorer(model, attachment).score(
        [Item(context, (9,)), Item(context, (POISON, 8))]
    )
    assert found.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-6)
    assert math.isnan(broken.loglikelihood)
