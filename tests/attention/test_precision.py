"""Mixed precision: what a run before decided, and what autocast does to an engine's sums."""

from __future__ import annotations

import pytest
import torch

from act_harness.attention import calibrated
from act_harness.engines import stock as base
from act_harness.engines.operation import AttentionCall
from act_harness.engines.reference import ReferenceEngine

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 33, 60, 12, 7, 29, 54]])
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


def stepped(model):
    """Logits of a token by itself, of a prompt, and of three steps after that."""
    with torch.no_grad():
        single = model(PROMPT[:, :1], use_cache=False).logits
        out = model(PROMPT, use_cache=True)
        found = [single, out.logits]
        for token in (8, 9, 10):
            cache = out.past_key_values
            out = model(torch.tensor([[token]]), past_key_values=cache)
            found.append(out.logits)
    return torch.cat(found, dim=1).float()


@pytest.mark.parametrize("decode", ["frozen", "running"])
def test_a_kernel_chosen_for_one_dtype_is_not_run_on_another(tiny, make_artifact, decode):
    """Under autocast queries and keys are float32 and values bfloat16; a float32 run came first."""
    model = tiny(dtype=torch.float32)
    with calibrated(model, make_artifact(model, decode=decode)):
        plain = stepped(model)
        with BF16:
            found = stepped(model)
        base._CHOICES.clear()  # as a process that starts with mixed precision
        with BF16:
            fresh = stepped(model)
        again = stepped(model)
    assert torch.equal(found, fresh)
    assert torch.equal(again, plain)
    assert float((found - plain).abs().max()) > 0


def test_every_choice_is_keyed_by_what_decides_it():
    """The same shapes in two dtypes, and with kernels switched off, are choices of their own."""

    def chosen(query, key, value):
        return base._chosen(AttentionCall(query, key, value, 0.25), False)

    base._CHOICES.clear()
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.ones(1, 4, 1, 16, dtype=dtype)
        key = torch.ones(1, 4, 5, 16, dtype=dtype)
        made.append(chosen(query, key, key))
        chosen(query, key, key[..., :8])
    wide = torch.ones(1, 4, 1, 16), torch.ones(1, 4, 5, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert chosen(*wide, wide[1]) is None
    assert chosen(*wide, wide[1]) is made[0]
    assert len(base._CHOICES) == 5
    assert chosen(wide[0], wide[1], wide[1].bfloat16()) is None
    assert len(base._CHOICES) == 5


class Watched(ReferenceEngine):
    """The reference, in a dtype that autocast would lower."""

    def __init__(self):
        super().__init__(torch.float32)
        self.lowered = []

    def __call__(self, call, **more):
        self.lowered.append(torch.is_autocast_enabled("cpu"))
        found = super().__call__(call, **more)
        self.lowered.append(torch.is_autocast_enabled("cpu"))
        return found


def test_engines_sum_in_their_own_precision_under_autocast(tiny, make_artifact):
    model = tiny(dtype=torch.float32)
    artifact = make_artifact(model)
    watched = Watched()
    found = []
    for engine in (watched, "torch", ReferenceEngine()):
        with calibrated(model, artifact, engine=engine), BF16:
            found.append(stepped(model))
            assert torch.is_autocast_enabled("cpu")
    assert not any(watched.lowered)
    spread = float(found[2].std())
    for one in found[:2]:  # what is left is the model's own bfloat16
        assert float((one - found[2]).abs().max()) < 0.02 * spread
