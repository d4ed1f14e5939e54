"""Models with recurrent layers beside attention: their states are repeated as keys are."""

from __future__ import annotations

import pytest
import torch
from tiny_hybrids import KINDS, hybrid

from act_harness.attention import calibrated, select_cache
from act_harness.attention.counters import CalibrationCounters
from act_harness.errors import UnsupportedModelError
from act_harness.scoring.forwards import Forwards
from act_harness.scoring.scorer import Item, Scorer
from act_harness.scoring.trials import extends

EXTENDED = [
    "qwen3_next", "falcon_h1", "lfm2",
    *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3_5_text", "granitemoehybrid")),
    pytest.param("bamba", marks=pytest.mark.slow),
]  # fmt: skip
ITEMS = [
    Item(tuple(range(3, 3 + size)), (40 + n, 50 - n, 30)[:last])
    for size in (21, 9, 4, 1)
    for n, last in enumerate((3, 2, 1, 3))
]


@pytest.mark.parametrize("kind", EXTENDED)
def test_answers_extend_repeated_states(make_artifact, kind):
    """Each answer was a forward of its own with the context in it: 12 in place of 4."""
    model = hybrid(kind)
    assert extends(Forwards(model)).value == "left"
    for artifact in (None, make_artifact(model, dict.fromkeys(KINDS[kind][1], (0, 3)), alpha=2.0)):
        plain, shared = CalibrationCounters(), CalibrationCounters()
        with calibrated(model, artifact) as attachment:
            alone = Scorer(model, attachment, batch_size=1, share=False)
            expected = alone.score(ITEMS, on_prompt=plain.record)
            scorer = Scorer(model, attachment)
            found = scorer.score(ITEMS, on_prompt=shared.record)
        assert [s.loglikelihood for s in found] == pytest.approx(
            [s.loglikelihood for s in expected], abs=1e-4
        )
        assert [s.is_greedy for s in found] == [s.is_greedy for s in expected]
        assert scorer.work.tokens < alone.work.tokens / 2
        if artifact is not None:
            for name, figure in plain.summary().items():
                assert shared.summary()[name] == pytest.approx(figure, rel=1e-3), name
            assert shared.summary()["mean_moved_mass"] > 0.01


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1"])
def test_the_cache_that_is_repeated_stays_as_it_was(kind):
    model = hybrid(kind)
    ids = torch.tensor([[5, 9, 14, 22, 7], [8, 3, 4, 31, 60]])
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

        def step(index):
            picked = select_cache(cache, torch.tensor(index))
            tokens = torch.full((len(index), 1), 11)
            return model(input_ids=tokens, past_key_values=picked, use_cache=True).logits[:, -1]

        first, again, one = step([0, 1, 1]), step([0, 1, 1]), step([1])
        whole = model(input_ids=torch.cat([ids, torch.full((2, 1), 11)], dim=1)).logits[:, -1]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, whole[[0, 1, 1]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one[0], first[1], atol=1e-5, rtol=1e-5)


def test_a_cached_forward_that_differs_in_stock_is_the_reason():
    answer = extends(Forwards(hybrid("jamba")))
    assert answer.value is None
    assert "its stock forward of several tokens over a cache differs by" in answer.reason


def test_a_block_that_layers_share_is_refused_by_name(make_artifact):
    model = hybrid("zamba2")
    artifact = make_artifact(model, {1: (0,)})
    with pytest.raises(UnsupportedModelError, match="shares one attention block among its layers"):
        calibrated(model, artifact).__enter__()
