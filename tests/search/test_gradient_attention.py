"""Strengths of all heads in one forward: the product's own scores, and exact gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from tiny_search import documents

from act_harness.artifact import Artifact
from act_harness.attention import attach, model_facts
from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines.operation import Geometry
from act_harness.engines.reference import calibrate_weights
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.compute import gradient_attention
from act_harness.search.compute.gradient import StrengthenedModel, Target
from act_harness.search.compute.gradient_attention import attention_with_bias, column_sums
from act_harness.search.compute.read_rows import batches_of
from act_harness.search.compute.target_columns import TARGETS, PromptColumns

DETECTION = Calibration(alpha=1.5)
CPU = torch.device("cpu")


def strengths(model, seed=0, sets=1, size=0.7):
    facts = model_facts(model)
    shape = (sets, facts.num_hidden_layers, facts.num_attention_heads)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return size * made


def product_scores(model, theta, items, calibration, **how):
    """Scores by the product: an artifact with the same strengths, the reference engine."""
    heads = {layer: tuple(range(theta.shape[1])) for layer in range(len(theta))}
    own = {
        layer: {
            head: HeadStrength(mass="reweight", gamma=float(theta[layer, head].exp()))
            for head in heads[layer]
        }
        for layer in heads
    }
    facts = model_facts(model)
    artifact = Artifact(name="x", model=facts, calibration=calibration, heads=heads, strengths=own)
    attachment = attach(model, artifact, facts=facts, engine="reference")
    try:
        found = Scorer(model, attachment, **how).score([Item(*one) for one in items])
    finally:
        attachment.detach()
    return [one.loglikelihood for one in found]


def scored(opened, docs, theta, tokens=4096):
    found = {}
    for batch in batches_of(docs, range(len(docs)), tokens=tokens, device=CPU):
        for number, row in zip(batch.documents, opened.scores(batch, theta), strict=True):
            found[number] = row
    return torch.stack([found[number] for number in range(len(docs))])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen3"])
@pytest.mark.parametrize(
    "calibration",
    [
        DETECTION,
        Calibration(alpha=1.5, decode="off"),
        Calibration(rule="absolute", tau=0.15, protect="first-flagged"),
        Calibration(target="initial"),
    ],
    ids=["paper", "off", "release", "initial"],
)
def test_scores_are_the_products_own(kind, calibration):
    model, docs = make_tiny(kind), documents(6)
    theta = strengths(model)
    target = Target(calibration.target, calibration, decode=calibration.decode)
    with StrengthenedModel(model, target) as opened, torch.no_grad():
        untouched = scored(opened, docs, None)
        found = scored(opened, docs, theta)
        alone = scored(opened, docs, theta, tokens=1)
    items = [request for document in docs for request in document.requests]
    wanted = torch.tensor(product_scores(model, theta[0], items, calibration)).view(len(docs), -1)
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
    options = {"geometry": geometry, "scale": 0.5, "softcap": None}
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    maps = logits.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).softmax(-1)
    wanted = (maps * prompt[:, None, :, None]).sum(2)
    for elements in (1 << 24, 2 * 4 * 11 * 3):
        found = column_sums(query, key, block_elements=elements, **options)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def in_double(model):
    """Llama's own norms compute in float32 whatever the model is in: no match for differences."""
    for part in list(model.modules()):
        for name, norm in part.named_children():
            if "RMSNorm" in type(norm).__name__:
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(part, name, exact)
    return model


@pytest.mark.parametrize("target", ["sinks", "initial", "both", "last", "random-fixed", "random",
                                    "gate", "temperature"])  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_gradcheck_through_the_whole_model(target, checkpointing):
    """Where a layer's target columns stay, which finite differences this small see to."""
    model, docs = in_double(make_tiny("llama")), documents(3)
    opened = StrengthenedModel(model, Target(target, DETECTION), checkpointing=checkpointing)
    with opened:
        (batch,) = batches_of(docs, range(3), tokens=4096, device=CPU)
        theta = strengths(model, 3, len(opened.target.sets)).requires_grad_()
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
    columns = PromptColumns(
        geometry, DETECTION, torch.arange(12)[None], 0, 0,
        lambda: column_sums(query, key, geometry=geometry, scale=0.8, softcap=None),
    )  # fmt: skip
    sinks = columns.sinks
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


def columns_of(ids, layer=0, seed=0, heads=4):
    torch.manual_seed(4)
    batch, total = ids.shape
    real = ids >= 0
    sums = torch.zeros(batch, heads, total)
    sums[:, :, 2:5] = 20.0  # three sinks a head
    geometry = Geometry(real, real, 0, 0, total)
    return PromptColumns(geometry, DETECTION, ids, layer, seed, lambda: sums)


def test_controls_take_as_many_columns_as_there_are_sinks():
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 10, -1, -1]])
    columns = columns_of(ids)
    assert columns.sinks.sum(-1).tolist() == [[3] * 4] * 2
    for name in ("random", "last"):
        (found,) = TARGETS[name](columns)
        assert found.sum(-1).tolist() == [[3] * 4] * 2
        assert not (found & columns.initial).any()
        assert not (found & ~columns.geometry.real[:, None]).any()
    (last,) = TARGETS["last"](columns)
    assert last[0, 0].nonzero().view(-1).tolist() == [5, 6, 7]
    assert last[1, 0].nonzero().view(-1).tolist() == [3, 4, 5]
    sinks, initial = TARGETS["both"](columns)
    assert not (sinks & initial).any()
    assert initial[:, 0].nonzero().tolist() == [[0, 0], [1, 0]]


def test_random_columns_depend_on_token_position_head_layer_and_seed_alone():
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 10, -1, -1]])
    both = columns_of(ids).hashes(4)
    alone = columns_of(ids[1:, :6]).hashes(4)
    assert torch.equal(both[1:, :, :6], alone)
    assert (both[0, :, :6] == both[1, :, :6]).all()
    for other in (columns_of(ids, seed=1), columns_of(ids, layer=1)):
        assert not (other.hashes(4) == both).any()
    assert len(set(both[0].flatten().tolist())) == 32
