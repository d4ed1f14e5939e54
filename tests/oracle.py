"""What calibrated attention gives, by code that shares nothing with the product.

The oracle is the stock model itself with its softmax replaced: what comes out of it is calibrated
row by row in plain float64 loops, as the paper's two sections say. Where rows sum to less than 1,
because a learned sink has the rest, that is done to what they would be without it.
"""

from __future__ import annotations

import numpy as np
import torch

ALPHA, BETA = 1.5, 0.4
IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 33, 60, 12, 7, 29, 54, 71, 2, 90, 44]])
PROMPT = 11


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def settings(make_artifact, model, **more):
    return make_artifact(model, alpha=ALPHA, **{"beta": BETA, **more})


def calibrate_by_hand(maps, prompt, beta):
    """Maps (H, T, T) of one sequence, numpy float64, as the paper's sections 3 and 4 have them."""
    whole = maps.sum(axis=-1, keepdims=True)
    made = maps / whole
    for head, old in enumerate(made.copy()):
        seen = old > 0
        most = max(int(row.sum()) for row in seen[:prompt])
        sinks = [
            column
            for column in range(1, prompt)
            if old[:prompt, column].sum() / seen[:prompt, column].sum() > ALPHA / most
        ]
        for row in range(len(old)):
            mass = sum(old[row, column] for column in sinks)
            rest = sum(old[row, column] for column in range(len(old)) if column not in sinks)
            if mass == 0 or rest < 1e-6:
                continue
            for column in range(len(old)):
                on = column in sinks
                made[head, row, column] *= beta if on else (1 - beta * mass) / rest
    return made * whole


class Oracle:
    """Stock attention whose maps are calibrated by hand, for one sequence and no cache."""

    def __init__(self, monkeypatch, heads, beta=BETA, layers=None):
        self.patch, self.heads, self.beta, self.layers = monkeypatch, heads, beta, layers
        self.calls, self.moved = 0, 0.0

    def logits(self, model, ids=IDS, prompt=PROMPT):
        plain = torch.nn.functional.softmax
        plain_fused = torch.nn.functional.scaled_dot_product_attention

        def softmax(scores, dim=None, dtype=None, **kwargs):
            tokens, columns = len(ids[0]), scores.shape[-1]
            if columns not in (tokens, tokens + 1):  # of experts
                return plain(scores, dim=dim, dtype=dtype, **kwargs)
            self.calls += 1
            stock = plain(scores.double(), dim=-1)
            maps = stock.reshape(self.heads, tokens, columns).numpy()
            made = maps.copy()  # a learned sink is the column behind the others
            made[..., :tokens] = calibrate_by_hand(maps[..., :tokens], prompt, self.beta)
            self.moved += float(np.abs(made - maps).max())
            return torch.from_numpy(made).reshape(stock.shape).to(dtype or scores.dtype)

        def fused(query, key, value, attn_mask=None, **more):
            if attn_mask is None:  # of Inkling 2's residual blocks
                return plain_fused(query, key, value, **more)
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros(1).masked_fill(~attn_mask, -torch.inf)
            return softmax(scores + attn_mask) @ value

        with self.patch.context() as patch:
            patch.setattr(torch.nn.functional, "softmax", softmax)
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
            found = logits(model, ids, use_cache=False)
        assert self.calls == (self.layers or model.config.get_text_config().num_hidden_layers)
        assert self.moved > 0.1, "nothing was calibrated: the case proves nothing"
        return found
