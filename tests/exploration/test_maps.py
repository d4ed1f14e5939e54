"""Maps, effects and columns by value, against the stock model's own maps and plain forwards."""

import base64
import json
import re

import numpy as np
import pytest
import tiny_search
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import act_harness
from act_harness import Calibration, calibrate_weights, head_set
from act_harness.calibration import HeadStrength
from act_harness.errors import ArtifactError, InputError
from act_harness.exploration.effects import answer_scores, head_scores, margin
from act_harness.exploration.explore import explore_document
from act_harness.search.documents import Document

SETTINGS = {"alpha": 1.5}


@pytest.fixture(scope="module")
def parts(tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    return model, AutoTokenizer.from_pretrained(tiny_checkpoint)


def letters(text):
    """Return made tokens, as a tokenizer would."""
    return {"input_ids": [ord(letter) % 97 for letter in text]}


def eager_map(model, tokens, layer, head):
    """Return transformers' own map, (1, 1, N, N)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(torch.tensor([tokens]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return maps[layer][:, head : head + 1]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_maps_are_the_models_own_and_calibrated_by_the_definition(kind):
    model = make_tiny(kind)
    text = "a text of some words in a row"
    tokens = letters(text)["input_ids"]
    before, after, sinks = act_harness.maps(model, letters, text, 1, 2, calibration=SETTINGS)
    own = eager_map(model, tokens, 1, 2)
    visible = own > 0
    wanted = calibrate_weights(own, calibration=Calibration(**SETTINGS), visible=visible)
    torch.testing.assert_close(before, own[0, 0].float(), atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(after, wanted[0, 0].float(), atol=2e-6, rtol=1e-4)
    assert sinks.any()
    assert not sinks[0]
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(after.sum(dim=1), torch.ones(len(tokens)))


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "random", "alpha": 1.2},
        {"target": "random", "draw": "anew", "alpha": 1.2, "mass": "raise", "psi": 0.6},
        {"target": "both", "alpha": 1.5, "mass": "reweight", "gamma": 0.3, "gamma_initial": 2.0},
        {"target": "last", "count": 2},
        {"target": "span", "markers": ("other ", " a")},
        {"target": "head", "mass": "temperature", "factor": 0.5},
    ],
    ids=lambda settings: settings["target"],
)
def test_every_target_is_shown_as_an_attached_model_has_it(parts, settings):
    model, tokenizer = parts
    text = "the other thing is a thing in there"
    heads = head_set(model, {2: [1, 3]}, calibration=settings, tokenizer=tokenizer)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    base = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with act_harness.calibrated(model, heads, tokenizer=tokenizer), torch.no_grad():
        wanted = model(ids, output_attentions=True).attentions[2][0]
    model.set_attn_implementation(base)
    for head in (1, 3):
        before, after, _ = act_harness.maps(model, tokenizer, text, 2, head, artifact=heads)
        torch.testing.assert_close(after, wanted[head].float(), atol=2e-6, rtol=1e-4)
        assert (before - after).abs().max() > 0.001
    found = act_harness.explore(model, tokenizer, text, artifact=heads)
    alone = head_set(model, {2: [3]}, calibration=settings, tokenizer=tokenizer)
    answers = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(one)) for one in found.labels]
    with act_harness.calibrated(model, alone, tokenizer=tokenizer), torch.no_grad():
        likely = model(ids).logits[0, -1].double().log_softmax(-1)
    for scores, answer in zip(found.scores[2, 3], answers, strict=True):
        if len(answer) == 1:  # a label's text may be cut otherwise
            assert scores == pytest.approx(float(likely[answer[0]]), abs=1e-4)


@pytest.mark.parametrize("settings", [("gate", 3.0), ("gate", 0.0), ("temperature", 2.0)])
def test_a_page_says_what_a_head_as_a_whole_becomes(parts, settings):
    """Weights above 1, of a gate above 1, must not wrap around in a page's bytes."""
    model, tokenizer = parts
    mass, factor = settings
    text = "the other thing is a thing"
    calibration = {"target": "head", "mass": mass, "factor": factor}
    heads = head_set(model, {1: [2]}, calibration=calibration, tokenizer=tokenizer)
    found = act_harness.explore(model, tokenizer, text, artifact=heads)
    data = re.search(r'id="data">(.*?)</script>', found.html()).group(1)
    packed = json.loads(data)["maps"]["1.2"]
    below = np.tril(np.ones((len(found.tokens), len(found.tokens)), bool))

    def squares(name):
        read = np.frombuffer(base64.b64decode(packed[name]), np.uint8)
        return (read / 255.0) ** 2

    if "after" in packed:
        shown = squares("after")
    else:
        inside = np.frombuffer(base64.b64decode(packed["inside"]), "<f4")
        shown = squares("weights") * np.broadcast_to(inside[:, None], below.shape)[below]
    after = act_harness.maps(model, tokenizer, text, 1, 2, artifact=heads).after.numpy()
    np.testing.assert_allclose(shown, after[below], atol=0.004 * max(factor, 1.0))


def test_an_artifacts_strength_is_the_heads_own():
    model = make_tiny()
    heads = head_set(model, {1: [2]}, calibration=SETTINGS, strengths={1: {2: {"beta": 0.1}}})
    text = "a text of some words"
    before, after, sinks = act_harness.maps(model, letters, text, 1, 2, artifact=heads)
    changed = before[:, sinks].sum(dim=1) > 0
    share = after[:, sinks].sum(dim=1) / before[:, sinks].sum(dim=1)
    torch.testing.assert_close(share[changed], torch.full_like(share[changed], 0.1))


def test_the_model_is_as_it_was():
    model = make_tiny()
    ids = torch.tensor([letters("words and words")["input_ids"]])
    before = model(ids).logits
    act_harness.maps(model, letters, "words and words", 0, 0)
    assert torch.equal(before, model(ids).logits)


def test_heads_and_texts_that_cannot_be():
    model = make_tiny()
    with pytest.raises(ArtifactError, match="head 4 of layer 1 is out of range"):
        act_harness.maps(model, letters, "words", 1, 4)
    with pytest.raises(InputError, match="no tokens"):
        act_harness.maps(model, letters, "", 0, 0)
    with pytest.raises(InputError, match="200 tokens, the model reads at most 128"):
        act_harness.maps(model, letters, "x" * 200, 0, 0)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gemma2"])
def test_effects_are_those_of_one_forward_a_head(kind):
    model = tiny_search.tiny(kind)
    document = tiny_search.documents(2)[1]
    calibration = Calibration(**SETTINGS)
    strengths = {
        (layer, head): HeadStrength(beta=0.1 if head == 2 else 0.4)
        for layer in range(3)
        for head in range(4)
    }
    before = answer_scores(model, document)
    found = head_scores(
        model, document, calibration=calibration, strengths=strengths, before=before
    )
    wanted = np.zeros_like(found)
    for (layer, head), strength in strengths.items():
        alone = head_set(
            model,
            {layer: [head]},
            calibration=calibration,
            strengths={layer: {head: strength}},
        )
        wanted[layer, head] = answer_scores(model, document, alone)
    np.testing.assert_allclose(found, wanted, atol=5e-5)
    assert np.abs(found - before).max() > 0.01


def test_a_model_that_the_search_cannot_open_is_measured_by_forwards(monkeypatch):
    from act_harness.errors import UnsupportedModelError
    from act_harness.exploration import effects

    model, document = tiny_search.tiny(), tiny_search.documents(1)[0]
    strengths = {(layer, head): HeadStrength() for layer in range(3) for head in range(4)}
    settings = Calibration(**SETTINGS)
    before = answer_scores(model, document)
    given = {"calibration": settings, "strengths": strengths, "before": before}
    exact = head_scores(model, document, **given)

    def refuses(model):
        raise UnsupportedModelError("its layers are not of the usual shape; use another")

    monkeypatch.setattr(effects, "Workbench", refuses)
    plain = head_scores(model, document, **given)
    np.testing.assert_allclose(plain, exact, atol=5e-5)


def test_scores_of_the_stock_model_are_log_likelihoods():
    model = make_tiny()
    context, answers = (5, 6, 7, 8), ((9,), (10, 11), (12, 13, 14))
    document = Document("t", "0" * 8, tuple((context, one) for one in answers), 0)
    wanted = []
    for answer in answers:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *answer]])).logits[0].log_softmax(-1)
        rows = range(len(context) - 1, len(context) + len(answer) - 1)
        wanted.append(sum(float(logits[row, t]) for row, t in zip(rows, answer, strict=True)))
    np.testing.assert_allclose(answer_scores(model, document), wanted, atol=1e-5)
    by_hand = wanted[0] - max(wanted[1:])
    assert float(margin(np.array(wanted), 0)) == pytest.approx(by_hand)


def test_columns_are_the_means_of_maps(parts):
    model, tokenizer = parts
    text = "the other thing is a thing"
    found = act_harness.explore(model, tokenizer, text, calibration=SETTINGS)
    total = len(found.tokens)
    assert "".join(found.tokens) == text
    seen = np.arange(total, 0, -1)
    for layer, head in ((0, 0), (2, 3)):
        before, after, sinks = act_harness.maps(
            model, tokenizer, text, layer, head, calibration=SETTINGS
        )
        np.testing.assert_allclose(found.means[layer, head], before.sum(dim=0) / seen, atol=1e-6)
        np.testing.assert_array_equal(found.sinks[layer, head], sinks)
        np.testing.assert_array_equal(found.seen[layer], seen)
        mass = float(before[:, sinks].sum()) / total
        assert found.sink_mass[layer, head] == pytest.approx(mass, abs=1e-6)
        assert found.first_mass[layer, head] == pytest.approx(float(before[:, 0].mean()), abs=1e-6)
        one = found.maps[layer, head]
        factors = np.where(found.sinks[layer, head], one.inside[:, None], one.outside[:, None])
        np.testing.assert_allclose(one.weights * factors, after, atol=1e-6)
    assert found.thresholds[0] == pytest.approx(1.5 / total)
    assert found.effects[0, 0] == pytest.approx(
        margin(found.scores, 0)[0, 0] - margin(found.before, 0)
    )
    probabilities = np.exp(found.before)
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert len(found.labels) == 8


def test_a_head_set_is_shown_with_its_strengths_and_its_answers(parts):
    model, tokenizer = parts
    heads = head_set(model, {0: [1], 2: [0, 3]}, calibration=SETTINGS, tokenizer=tokenizer)
    found = act_harness.explore(model, tokenizer, "the other thing", artifact=heads)
    assert sorted(zip(*np.nonzero(~np.isnan(found.strengths)), strict=True)) == [
        (0, 1),
        (2, 0),
        (2, 3),
    ]
    tokens = tokenizer("the other thing")["input_ids"]
    with act_harness.calibrated(model, heads), torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    likely = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(found.labels[0]))
    assert float(logits[likely[0]]) == pytest.approx(float(found.after[0]), abs=1e-4)
    assert "head set by-hand" in found.summary()


def test_maps_of_long_prompts_fit_the_page(parts, monkeypatch):
    from act_harness.exploration import explore as module

    model, tokenizer = parts
    monkeypatch.setattr(module, "_ROWS", 10)
    monkeypatch.setattr(module, "_MAP_BYTES", 10 * 60 * 3)
    found = act_harness.explore(model, tokenizer, "x" * 60, heads=[(2, 1), (0, 3)])
    assert len(found.rows) == 10
    assert (found.rows[0], found.rows[-1]) == (0, 59)
    assert len(found.maps) == 3
    assert {(2, 1), (0, 3)} <= set(found.maps)
    with pytest.raises(InputError, match=r"head 0\.4 is out of range"):
        act_harness.explore(model, tokenizer, "x", heads=[(0, 4)])


def test_one_answer_is_no_question(parts):
    model, tokenizer = parts
    document = Document("t", "0" * 8, (((3, 4), (5,)),), 0)
    with pytest.raises(InputError, match="1 answer, expected two"):
        explore_document(model, tokenizer, document, title="x")


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "both", "mass": "reweight", "gamma": 2.0, "gamma_initial": 0.5, "alpha": 1.5},
        {"target": "head", "mass": "temperature", "factor": 0.5},
        {"target": "initial", "mass": "reweight", "gamma": 0.5},
    ],
    ids=["both", "head", "initial"],
)
def test_maps_of_other_members_are_kept_whole_where_two_factors_do_not_say_them(parts, settings):
    model, tokenizer = parts
    text = "the other thing is a thing"
    found = act_harness.explore(model, tokenizer, text, calibration=settings)
    maps = act_harness.maps(model, tokenizer, text, 1, 2, calibration=settings)
    one = found.maps[1, 2]
    assert (one.calibrated is None) == (settings["target"] == "initial")
    if one.calibrated is not None:
        np.testing.assert_allclose(one.calibrated, maps.after, atol=1e-6)
    assert np.isnan(found.thresholds).all() == (settings["target"] != "both")
    assert np.abs(found.effects).max() > 1e-3


def test_a_head_without_sinks_has_no_effect_at_all(parts):
    """Also where forwards of other shapes round otherwise, as in bfloat16."""
    model = tiny_search.tiny().bfloat16()
    for document in tiny_search.documents(4):
        found = explore_document(model, parts[1], document, title="x", calibration={"alpha": 50.0})
        assert not found.sinks.any()
        assert np.abs(found.effects).max() == 0.0
