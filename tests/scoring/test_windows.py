"""Models with a sliding window: packed where no sequence is longer than it, never beyond."""

from __future__ import annotations

import pytest
import torch

from act_harness.attention import calibrated
from act_harness.attention.capabilities import capabilities_of
from act_harness.attention.counters import CalibrationCounters
from act_harness.attention.packing import Packing
from act_harness.scoring.scorer import Item, Scorer
from act_harness.scoring.trials import packs

WINDOW = 12
KINDS = {
    "mistral": {},
    "gemma2": {},  # eager, with a soft cap
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "cohere2": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},  # learned sinks
    "llama4_text": {
        "attention_chunk_size": WINDOW, "num_local_experts": 2, "head_dim": 8,
        "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
    },
}  # fmt: skip
WITHIN = [
    Item(tuple(range(3, 3 + size)), (40 + n, 50 - n, 30)[:last])
    for size in (10, 7, 1)
    for n, last in enumerate((3, 2, 1))
]
BEYOND = [
    Item(tuple(range(5, 5 + size)), (40, 50 - size, 30)[:last])
    for size in (11, 20)  # the first only with its answer
    for last in (2, 3, 1)
]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_a_window_holds_is_packed(tiny, make_artifact, monkeypatch, kind):
    model = tiny(kind, dtype=torch.float32, **{"sliding_window": WINDOW, **KINDS[kind]})
    lengths, attend = [], Packing.attend

    def watched(self, *args, **kwargs):
        lengths.extend(self.lengths)
        lengths.extend(self.lengths[owner] + size for owner, size in self.sizes)
        return attend(self, *args, **kwargs)

    for artifact in (None, make_artifact(model, alpha=2.0)):
        with calibrated(model, artifact) as attachment:
            plain, shared = CalibrationCounters(), CalibrationCounters()
            one_by_one = Scorer(model, attachment, batch_size=1, share=False)
            expected = one_by_one.score([*BEYOND, *WITHIN], on_prompt=plain.record)
            scorer = Scorer(model, attachment)
            assert packs(scorer.forwards).value
            with monkeypatch.context() as patch:
                patch.setattr(Packing, "attend", watched)
                found = scorer.score([*BEYOND, *WITHIN], on_prompt=shared.record)
        assert [s.loglikelihood for s in found] == pytest.approx(
            [s.loglikelihood for s in expected], abs=5e-5
        )
        assert scorer.work.packed == 3
        assert one_by_one.work.packed == 0
        assert max(lengths) == WINDOW
        if artifact is not None:
            for name, figure in plain.summary().items():
                assert shared.summary()[name] == pytest.approx(figure, rel=1e-3), name
            assert shared.summary()["mean_moved_mass"] > 0.05


def test_the_narrowest_window_counts(tiny):
    """A list has a width for every layer; a layer that sees everything has none."""
    model = tiny("mistral")
    model.config.sliding_window = 60
    model.config.window_size = [None, 40, 30]
    model.config.attention_chunk_size = 50
    assert capabilities_of(model).window.value == 30
