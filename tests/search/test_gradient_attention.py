"""Strengths of all heads in one forward: the product's own scores, and exact gradients."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import make_tiny
from tiny_search import documents, tiny

from act_harness.artifact import Artifact
from act_harness.attention import attach, model_facts
from act_harness.calibration import Calibration, HeadStrength, LayerPlan
from act_harness.engines.geometry import Geometry
from act_harness.engines.operation import AttentionCall
from act_harness.engines.reference import calibrate_weights, prompt_target
from act_harness.errors import UnsupportedModelError
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.compute import gradient, gradient_attention
from act_harness.search.compute import opened as opened_model
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.gradient_attention import attention_with_bias, column_sums
from act_harness.search.compute.read_rows import batches_of

CPU = torch.device("cpu")


def strengths(model, seed=0, sets=1, size=0.7):
    facts = model_facts(model)
    shape = (sets, facts.num_hidden_layers, facts.num_attention_heads)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return size * made


def head_strength(calibration, sets):
    if calibration.target == "head":
        return HeadStrength(mass=calibration.mass, factor=float(sets[0].exp()))
    found = {"gamma": float(sets[0].exp())}
    if len(sets) > 1:
        found["gamma_initial"] = float(sets[1].exp())
    return HeadStrength(mass="reweight", **found)


def product_scores(model, theta, items, calibration):
    """Scores by the product: an artifact with the same strengths, the reference engine."""
    heads = {layer: tuple(range(theta.shape[2])) for layer in range(theta.shape[1])}
    own = {
        layer: {head: head_strength(calibration, theta[:, layer, head]) for head in heads[layer]}
        for layer in heads
    }
    facts = model_facts(model)
    artifact = Artifact(name="x", model=facts, calibration=calibration, heads=heads, strengths=own)
    attachment = attach(model, artifact, facts=facts, engine="reference")
    try:
        found = Scorer(model, attachment).score([Item(*one) for one in items])
    finally:
        attachment.detach()
    return [one.loglikelihood for one in found]


def scored(opened, docs, theta, tokens=4096):
    found = {}
    for batch in batches_of(docs, tokens=tokens, device=CPU):
        for number, row in zip(batch.documents, opened.scores(batch, theta), strict=True):
            found[number] = row
    return torch.stack([found[number] for number in range(len(docs))])


NEUTRAL = {"mass": "reweight", "gamma": 1.0}
TARGETS = {
    "sinks": Calibration(alpha=1.5),
    "off": Calibration(alpha=1.5, decode="off"),
    "release": Calibration(rule="absolute", tau=0.15, protect="first-flagged"),
    "initial": Calibration(target="initial"),
    "both": Calibration(target="both", alpha=1.5, gamma_initial=1.0, **NEUTRAL),
    "random": Calibration(target="random", alpha=1.5, seed=3),
    "random-anew": Calibration(target="random", alpha=1.5, draw="anew"),
    "last": Calibration(target="last", alpha=1.5),
    "last-2": Calibration(target="last", count=2),
    "gate": Calibration(target="head", mass="gate", factor=1.0),
    "gate-off": Calibration(target="head", mass="gate", factor=1.0, decode="off"),
    "temperature": Calibration(target="head", mass="temperature", factor=1.0),
    "temperature-off": Calibration(target="head", mass="temperature", factor=1.0, decode="off"),
}
"""What an artifact's strengths can act on, all members of the operation with such a strength."""


MORE = {
    "gpt_oss": {  # learned sinks, and windows in every other layer
        **{"head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
        "experts_implementation": "eager",  # the grouped kernels take no float64
    }
}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("name", TARGETS)
def test_scores_are_the_products_own(kind, name):
    model, docs, calibration = make_tiny(kind, **MORE.get(kind, {})), documents(4), TARGETS[name]
    theta = strengths(model, sets=1 + (name == "both"))
    with StrengthenedModel(model, calibration) as opened, torch.no_grad():
        untouched = scored(opened, docs, None)
        found = scored(opened, docs, theta)
        alone = scored(opened, docs, theta, tokens=1)
    items = [request for document in docs for request in document.requests]
    wanted = torch.tensor(product_scores(model, theta, items, calibration)).view(len(docs), -1)
    assert (found - untouched).abs().max() > 1e-3
    torch.testing.assert_close(found.float(), wanted.float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found, alone, atol=1e-9, rtol=1e-9)


def dense(query, key, value, bias, scale):
    """Attention with a bias on the columns, written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(repeats, 1) for one in (key, value))
    logits = query @ key.transpose(2, 3) * scale + bias[:, :, None]
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def test_a_bias_in_the_key_is_a_bias_on_the_column():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    bias = torch.randn(2, 4, 9) * (torch.rand(2, 4, 9) < 0.3)
    found = attention_with_bias(query, key, value, bias=bias, scale=0.3)
    torch.testing.assert_close(found, dense(query, key, value, bias, 0.3), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_strength_to_sixteen_bits(dtype):
    """One bfloat16 channel would round 0.7003 / scale to three digits."""
    wanted = torch.tensor([0.7003, -3.0001, 1e-3, 5.4321]) * 8
    parts = gradient_attention._parts(wanted.view(1, 1, 4), dtype).float().sum(-1).view(4)
    assert ((parts - wanted).abs() <= wanted.abs() * 2**-16).all()
    assert ((wanted.to(dtype).float() - wanted).abs() > wanted.abs() * 2**-16).any()
    bias = torch.tensor([0.5, 0.25]).view(1, 1, 2).requires_grad_()
    gradient_attention._parts(bias, dtype).float().sum(-1)[..., 0].sum().backward()
    assert bias.grad.view(-1).tolist() == [1.0, 0.0]  # once, not once a channel


def test_column_sums_in_blocks_are_those_of_the_maps():
    torch.manual_seed(1)
    query, key = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8)
    real = torch.arange(11) < torch.tensor([[11], [8]])
    prompt = torch.arange(11) < torch.tensor([[7], [8]])
    geometry = Geometry(real, prompt, 0, 0, 11)
    call = AttentionCall(query, key, key, 0.5)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    maps = logits.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).softmax(-1)
    wanted = (maps * prompt[:, None, :, None]).sum(2)
    for elements in (1 << 24, 2 * 4 * 11 * 3):
        found = column_sums(call, geometry=geometry, block_elements=elements)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["sinks", "both", "last"])
def test_kernels_add_up_the_same_columns(name):
    """On the processor by Triton's interpreter; counters prove that the kernels ran."""
    triton = pytest.importorskip("act_harness.engines.triton")
    docs = documents(4)
    model = make_tiny("llama").float()
    (batch,) = batches_of(docs, tokens=4096, device=CPU)
    theta = strengths(model, 3, 1 + (name == "both")).float()
    found = []
    kernels = triton.TritonEngine()
    for given in (None, kernels):
        opened = StrengthenedModel(model, TARGETS[name], kernels=given)
        with opened:
            own = theta.clone().requires_grad_()
            scores = opened.scores(batch, own)
            (slope,) = torch.autograd.grad(scores[torch.isfinite(scores)].sum(), own)
            found.append((scores.detach(), slope))
    # the opened model is checked on a probe first
    assert kernels.calls["column_sums"] == 2 * model.config.num_hidden_layers
    for torch_value, kernel_value in zip(*found, strict=True):
        torch.testing.assert_close(kernel_value, torch_value, atol=1e-5, rtol=1e-4)


def in_double(model):
    """Llama's own norms compute in float32 whatever the model is in: no match for differences."""
    for part in list(model.modules()):
        for name, norm in part.named_children():
            if "RMSNorm" in type(norm).__name__:
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(part, name, exact)
    return model


@pytest.mark.parametrize("name", ["sinks", "both", "random", "last", "gate-off", "temperature"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_gradcheck_through_the_whole_model(name, checkpointing):
    """Where a layer's target columns stay, which finite differences this small see to."""
    model, docs = in_double(make_tiny("llama")), documents(3)
    opened = StrengthenedModel(model, TARGETS[name], checkpointing=checkpointing)
    with opened:
        (batch,) = batches_of(docs[:3], tokens=4096, device=CPU)
        theta = strengths(model, 3, 1 + (name == "both")).requires_grad_()
        there = torch.isfinite(opened.scores(batch, theta.detach()))
        assert torch.autograd.gradcheck(
            lambda given: opened.scores(batch, given)[there], (theta,), fast_mode=True
        )
        (slope,) = torch.autograd.grad(opened.scores(batch, theta)[there].sum(), theta)
        assert slope.shape == opened.shape
        assert (slope != 0).float().mean() > 0.7


def test_gradients_are_those_of_the_dense_operation():
    """The engines' mathematics, on maps in memory, differentiated by autograd."""
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, n, 12, 8).double() for n in (4, 2, 2))
    theta = torch.randn(4).double().requires_grad_()
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.8
    maps = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    every = torch.ones(1, 12, dtype=torch.bool)
    geometry = Geometry(every, every, 0, 0, 12)
    plan = LayerPlan.uniform(Calibration(alpha=1.5), (0, 1, 2, 3))
    sums = column_sums(AttentionCall(query, key, value, 0.8), geometry=geometry)
    sinks, _ = prompt_target(sums, geometry, plan)
    assert 0 < sinks.sum() < sinks.numel()
    weights = maps * torch.where(sinks[:, :, None], theta.exp()[None, :, None, None], 1.0)
    wanted = weights / weights.sum(-1, keepdim=True) @ value.repeat_interleave(2, 1)
    probe = torch.randn(wanted.shape).double()
    (slope,) = torch.autograd.grad((wanted * probe).sum(), theta)
    bias = theta[None, :, None] * sinks
    found = attention_with_bias(query, key, value, bias=bias, scale=0.8)
    torch.testing.assert_close(found.transpose(1, 2), wanted)
    (mine,) = torch.autograd.grad((found.transpose(1, 2) * probe).sum(), theta)
    torch.testing.assert_close(mine, slope)
    # and the reference itself, with one strength for all
    one = Calibration(alpha=1.5, mass="reweight", gamma=2.5)
    bias = torch.full((1, 4, 1), 2.5).double().log() * sinks
    found = attention_with_bias(query, key, value, bias=bias, scale=0.8).transpose(1, 2)
    told = calibrate_weights(maps, calibration=one) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, told)


@pytest.mark.parametrize(("noise", "accepted"), [(0.1, True), (1e-6, False)])
def test_an_opened_model_is_held_to_what_rounding_does_to_stock(monkeypatch, noise, accepted):
    """A wide model in bfloat16 moves by more than a fixed bound; 0.2 is noise only where 0.1 is."""
    whole, calls = gradient.attention_with_bias, []

    def coarse(*args, **kwargs):
        calls.append(1)
        return whole(*args, **kwargs) * 1.02

    monkeypatch.setattr(gradient, "attention_with_bias", coarse)
    monkeypatch.setattr(opened_model, "rounding", lambda model, sequences: noise)
    with contextlib.ExitStack() as stack:
        if not accepted:
            stack.enter_context(pytest.raises(UnsupportedModelError, match="other logits"))
        stack.enter_context(StrengthenedModel(tiny(), Calibration(**NEUTRAL)))
    assert calls
