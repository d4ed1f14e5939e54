"""First-order effects by value: against finite differences and derivatives by strengths."""

import numpy as np
import pytest
import tiny_search
import torch
from tiny_hybrids import hybrid
from transformers import AutoTokenizer

import act_harness
from act_harness import Calibration, head_set
from act_harness.errors import InputError
from act_harness.exploration.effects import answer_scores, head_scores, margin
from act_harness.exploration.explore import explore_document
from act_harness.exploration.first_order import first_order_effects
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.read_rows import batches_of
from act_harness.search.documents import Document

ONE_ROW = ((7, 30, 31, 8, 9, 40, 12, 3, 7, 7, 22, 5), ((11,), (13,), (17,)))
"""A prompt, and answers that are read from its last row."""
OWN_ROWS = (ONE_ROW[0], ((11, 12), (13,), (17, 19, 2)))


def document_of(kind):
    context, answers = kind
    return Document("t", "0" * 8, tuple((context, one) for one in answers), 1)


def estimates(model, document, calibration):
    strengths = {(n, h): calibration.strength_of_all for n in range(3) for h in range(4)}
    before = answer_scores(model, document)
    return first_order_effects(
        model, document, calibration=calibration, strengths=strengths, before=before
    )


def change_by(model, document, calibration, layer, head):
    """Return the margin's exact change with one head calibrated, by a forward of the product."""
    alone = head_set(model, {layer: [head]}, calibration=calibration)
    before, after = (answer_scores(model, document, one) for one in (None, alone))
    return float(margin(after, document.right) - margin(before, document.right))


@pytest.mark.parametrize("answers", [ONE_ROW, OWN_ROWS], ids=["one-row", "own-rows"])
@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({"alpha": 1.5, "mass": "damp"}, "beta"),
        ({"alpha": 1.5, "mass": "damp", "decode": "off"}, "beta"),
        ({"target": "head", "mass": "gate"}, "factor"),
    ],
    ids=["damp", "damp-off", "gate"],
)
def test_it_is_the_limit_of_small_steps(answers, settings, strength):
    """A head's output is linear in beta and in a gate's factor: small steps say the derivative."""
    model, document = tiny_search.tiny().double(), document_of(answers)
    whole = Calibration(**settings, **{strength: 0.4})
    found = estimates(model, document, whole)
    assert np.abs(found).max() > 1e-3
    small = 0.04
    for layer, head in ((0, 1), (1, 2), (2, 0)):
        near, far = (
            change_by(
                model, document, Calibration(**settings, **{strength: 1 - part * 0.6}), layer, head
            )
            for part in (small, 2 * small)
        )
        wanted = (4 * near - far) / (2 * small)
        assert found[layer, head] == pytest.approx(wanted, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gemma2", "gpt-oss"])
def test_it_is_the_derivative_by_strength_times_the_logarithm_of_a_mild_one(kind):
    """The search's own backward says the derivative by the logarithm of every strength."""
    model, document = tiny_search.tiny(kind).double(), tiny_search.documents(2)[1]
    mild = Calibration(alpha=1.5, mass="reweight", gamma=1.002)
    found = estimates(model, document, mild)
    before = answer_scores(model, document)
    others = [choice for choice in range(len(before)) if choice != document.right]
    rival = max(others, key=lambda choice: before[choice])
    with StrengthenedModel(model, mild) as opened:
        theta = torch.zeros(opened.shape, dtype=opened.dtype, requires_grad=True)
        (batch,) = batches_of([document], tokens=1 << 16, device=torch.device("cpu"))
        scores = opened.scores(batch, theta)[0]
        (slope,) = torch.autograd.grad(scores[document.right] - scores[rival], theta)
    wanted = slope[0].numpy() * np.log(1.002)
    assert np.abs(wanted).max() > 1e-5
    np.testing.assert_allclose(found, wanted, rtol=0.01, atol=1e-7)


def test_nothing_of_the_model_is_changed_and_no_gradient_is_left():
    model, document = tiny_search.tiny(), document_of(ONE_ROW)
    before = answer_scores(model, document)
    asked = [one.requires_grad for one in model.parameters()]
    with torch.inference_mode():
        first = estimates(model, document, Calibration(alpha=1.5))
    np.testing.assert_array_equal(first, estimates(model, document, Calibration(alpha=1.5)))
    np.testing.assert_array_equal(answer_scores(model, document), before)
    assert [one.requires_grad for one in model.parameters()] == asked
    assert all(one.grad is None for one in model.parameters())


def test_a_page_has_exact_effects_of_the_heads_asked_for_and_of_the_strongest(
    tiny_checkpoint,
):
    model, document = tiny_search.tiny(), document_of(ONE_ROW)
    settings = Calibration(alpha=1.5)
    strengths = {(n, h): settings.strength_of_all for n in range(3) for h in range(4)}
    before = answer_scores(model, document)
    exact = margin(
        head_scores(model, document, calibration=settings, strengths=strengths, before=before), 1
    ) - margin(before, 1)
    names = AutoTokenizer.from_pretrained(tiny_checkpoint)
    found = explore_document(
        model, names, document, title="x", calibration=settings, heads=[(1, 1)], exact=3
    )
    strongest = [tuple(map(int, np.unravel_index(n, exact.shape)))
                 for n in np.argsort(-np.abs(found.first_order), axis=None)]  # fmt: skip
    wanted = {(1, 1), *[place for place in strongest if place != (1, 1)][:2]}
    assert {tuple(map(int, place)) for place in np.argwhere(found.exact)} == wanted
    assert np.isnan(found.scores[~found.exact]).all()
    np.testing.assert_allclose(found.effects[found.exact], exact[found.exact], atol=1e-6)
    np.testing.assert_array_equal(found.effects[~found.exact], found.first_order[~found.exact])
    assert (
        "about"
        in explore_document(
            model, names, document, title="x", calibration=settings, exact=0
        ).summary()
    )


def test_a_model_without_gradients_has_exact_effects_alone(tiny_checkpoint, monkeypatch, caplog):
    model, document = tiny_search.tiny(), document_of(ONE_ROW)
    given = {"title": "x", "calibration": Calibration(alpha=1.5), "exact": 2}
    names = AutoTokenizer.from_pretrained(tiny_checkpoint)
    wanted = explore_document(model, names, document, **given | {"exact": 12})
    norm = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda hidden: norm(hidden).detach())
    found = explore_document(model, names, document, **given)
    assert "passes no gradient on to its attention; all heads' effects" in caplog.text
    assert found.exact.all()
    assert np.isnan(found.first_order).all()
    np.testing.assert_allclose(found.effects, wanted.effects, atol=1e-6)
    assert "about" not in found.summary()


@pytest.mark.parametrize("exact", [-1, 1.5, True])
def test_a_number_of_exact_heads_that_is_none_is_refused(exact):
    with pytest.raises(InputError, match="exact is"):
        act_harness.explore(tiny_search.tiny(), None, "x", exact=exact)


def test_a_hybrid_has_effects_where_it_attends(tiny_checkpoint):
    model, document = hybrid("qwen3_next"), document_of(ONE_ROW)  # its layer 1 alone attends
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    found = explore_document(
        model, tokenizer, document, title="t", calibration=Calibration(alpha=1.5), exact=2
    )
    assert np.isnan(found.first_order[[0, 2]]).all()
    assert np.isfinite(found.first_order[1]).all()
    exact = np.isfinite(found.scores).all(axis=2)
    assert exact.sum(axis=1).tolist() == [0, 2, 0]
    for head in exact[1].nonzero()[0]:
        wanted = change_by(model, document, Calibration(alpha=1.5), 1, head)
        after = float(margin(found.scores[1, head], document.right))
        assert after - float(margin(found.before, document.right)) == pytest.approx(
            wanted, abs=1e-4
        )
    assert {layer for layer, _ in found.maps} == {1}
    assert "head 1." in found.summary()
    assert "of 4 heads have sinks" in found.summary()
    with pytest.raises(InputError, match=r"head 0.1 is out of range, the model has layers \[1\]"):
        explore_document(model, tokenizer, document, title="t", heads=[(0, 1)])
