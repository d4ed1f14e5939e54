"""Which models may be packed, extended and calibrated: structure, then stock's own rounding."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from act_harness.attention import calibrated, packing_trial
from act_harness.attention.rounding import logits_of, rounding
from act_harness.attention.structure import mixing_part
from act_harness.errors import InfrastructureError, InternalError, UnsupportedModelError
from act_harness.scoring.forwards import Forwards
from act_harness.scoring.scorer import Item, Scorer
from act_harness.scoring.trials import extends, packs

ITEMS = [
    Item(tuple(range(3, 3 + size)), (40 + n, 50 - n, 30)[:last])
    for size in (21, 9, 4, 1)
    for n, last in enumerate((3, 2, 1, 3))
]


def lfm2_moe():
    torch.manual_seed(2)
    config = transformers.Lfm2MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, num_dense_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        layer_types=["conv", "full_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Lfm2MoeForCausalLM(config).eval()


def test_what_a_model_raises_in_a_trial_is_its_answer(monkeypatch, tiny):
    """Three lists of it had come to differ: a KeyError ended one trial, no memory was an answer."""

    def raises(error):
        def raising(*args, **kwargs):
            raise error

        return raising

    monkeypatch.setattr(packing_trial, "_trial", raises(KeyError("key_cache")))
    said = packing_trial._obstacle(tiny())
    assert said == "a packed forward fails ('key_cache')"
    monkeypatch.setattr(Forwards, "extend", raises(InternalError("without a cache")))
    said = extends(Forwards(tiny())).reason
    assert "extending its cache fails (without a cache)" in said
    monkeypatch.setattr(Forwards, "extend", raises(InfrastructureError("no memory")))
    with pytest.raises(InfrastructureError):
        extends(Forwards(tiny()))


@pytest.mark.parametrize("listed", [True, False])
def test_a_short_convolution_is_seen_in_the_structure(caplog, listed):
    """Its trial was off by less than 0.2 % of the logits' spread, its scores by 1.4e-4."""
    model = lfm2_moe()
    if not listed:  # a model's own code may not say what its layers are
        model.config.layer_types = ["full_attention"] * 3
        model._is_stateful = False
        assert "conv" in mixing_part(model)
    with caplog.at_level("INFO", logger="act_harness"):
        assert not packs(Forwards(model)).value
    assert "scored in padded batches: it" in caplog.text
    assert "conv" in caplog.messages[-1]
    expected = Scorer(model, batch_size=1, share=False).score(ITEMS)
    scorer = Scorer(model, batch_size=4)
    assert [s.loglikelihood for s in scorer.score(ITEMS)] == pytest.approx(
        [s.loglikelihood for s in expected], abs=1e-5
    )


def test_the_trial_alone_sees_the_convolution(monkeypatch):
    monkeypatch.setattr(packing_trial, "mixing_part", lambda *args, **kwargs: None)
    assert packing_trial._obstacle(lfm2_moe()) is not None


@pytest.mark.parametrize(
    ("dtype", "share"),
    [  # less than that is lost in a bfloat16 sum, so nothing leaks
        (torch.float32, 1e-1), (torch.float32, 1e-2), (torch.float32, 1e-4),
        (torch.bfloat16, 1e-1), (torch.bfloat16, 1e-2),
    ],
)  # fmt: skip
def test_the_faintest_trace_of_a_neighbour_is_seen(tiny, dtype, share):
    """Where no token of another sequence may matter, not a bit of the logits may move."""
    model = tiny(dtype=dtype)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + share * torch.nn.functional.pad(x, (0, 0, 1, -1)))
    assert packing_trial._obstacle(model) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_tokens_share_are_no_leak(tiny, dtype):
    model = tiny(
        "qwen3_moe", dtype=dtype, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    assert packing_trial._obstacle(model) is None


class CoarseKernels(torch.nn.Module):
    """Output head of a machine whose rounding depends on the shape: 0.3 deviations of the logits.

    Stock bf16 on a CPU without units for it behaves so.
    """

    def __init__(self, head, share):
        super().__init__()
        self.head, self.share = head, share
        self.weight = head.weight

    def forward(self, hidden):
        logits = self.head(hidden)
        noise = torch.Generator().manual_seed(hidden.shape[1] + 1000 * hidden.shape[0])
        moved = torch.rand(logits.shape[-1], generator=noise) - 0.5
        return logits + (2 * self.share * moved * logits.float().std()).to(logits.dtype)


def test_a_machine_that_rounds_coarsely_is_no_reason_to_refuse(tiny, make_artifact):
    model = tiny(dtype=torch.bfloat16)
    model.lm_head = CoarseKernels(model.lm_head, 0.25)
    spread = float(logits_of(model, range(12)).std())
    assert 0.4 * spread < rounding(model, [range(12)]) < spread
    assert packing_trial._obstacle(model) is None
    with calibrated(model, make_artifact(model)) as attachment:
        assert attachment.active


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_forgets_its_cache_is_refused_with_figures(tiny, make_artifact, dtype):
    model = tiny(dtype=dtype)
    forward = model.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        return forward(*args, past_key_values=DynamicCache(config=model.config), **kwargs)

    model.forward = forgetful
    with pytest.raises(
        UnsupportedModelError, match=r"stock model's own logits over a cache are .* standard dev"
    ):
        calibrated(model, make_artifact(model)).__enter__()


def test_a_model_without_numbers_is_refused_for_that(tiny, make_artifact):
    model = tiny()
    artifact = make_artifact(model)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with (
        pytest.warns(UserWarning, match="weights"),
        pytest.raises(
            UnsupportedModelError, match="not finite on a few tokens, without calibration"
        ),
    ):
        calibrated(model, artifact).__enter__()


def test_a_cache_that_is_extended_wrongly_by_little_is_seen(tiny, monkeypatch):
    model = tiny()
    extend = Forwards.extend

    def off(self, *args):
        logits = extend(self, *args)
        logits.rows.add_(1e-3)
        return logits

    monkeypatch.setattr(Forwards, "extend", off)
    assert not extends(Forwards(model)).value
