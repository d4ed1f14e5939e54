"""Models that compressed-tensors has quantised, made here: calibrated like the same stock model."""

from __future__ import annotations

import pytest
import torch
from oracle import BETA, IDS, PROMPT, Oracle, logits, settings
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from act_harness.attention import attach, calibrated, detach, model_facts
from act_harness.scoring.scorer import Item, Scorer

pytest.importorskip("compressed_tensors", "0.15", reason="compressed-tensors is not installed")

FORMATS = ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK")
ITEMS = [Item(tuple(range(3, 24)), answer) for answer in ((40, 50, 30), (41, 49))]


def _least_and_most(weight, arguments):
    """Of each part of a weight (out, in) that has a scale of its own."""
    strategy = arguments.strategy
    if strategy == "channel":
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    high, wide = (1, arguments.group_size) if strategy == "group" else arguments.block_structure
    parts = weight.unflatten(0, (-1, high)).unflatten(-1, (-1, wide))
    return parts.amin((1, 3)), parts.amax((1, 3))


@pytest.fixture(scope="module", params=FORMATS)
def quantised(request, tmp_path_factory):
    """Folder of a random Llama, rounded to the nearest of a format."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    folder = tmp_path_factory.mktemp("quantised")
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    model = make_tiny(dtype=torch.float32, **wide)
    plan = QuantizationConfig(config_groups={request.param: ["Linear"]}, ignore=["lm_head"])
    apply_quantization_config(model, plan)
    for module in model.modules():
        arguments = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if arguments is not None:
            least, most = _least_and_most(module.weight.data, arguments)
            module.weight_scale.data = calculate_qparams(least, most, arguments)[0]
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.fixture(params=["packed", "dequantised"])
def model(quantised, request):
    given = {}
    if request.param == "dequantised":
        given["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float32, **given).eval()


# of a configuration that is given for a checkpoint that has its own
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


def test_calibrated_logits_are_the_oracles(model, make_artifact, monkeypatch):
    model.set_attn_implementation("eager")
    stock = logits(model, use_cache=False)
    expected = Oracle(monkeypatch, 4).logits(model)
    artifact = settings(make_artifact, model)
    with (
        calibrated(model, artifact, engine="reference") as attachment,
        attachment.prompts([PROMPT]),
    ):
        found = logits(model, use_cache=False)
    assert float((expected - stock).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(logits(model, use_cache=False), stock)


def test_a_head_set_from_before_the_first_forward_fits_after_it(model, make_artifact):
    artifact = settings(make_artifact, model)
    before = model_facts(model)
    logits(model, IDS)
    assert model_facts(model) == before
    attach(model, artifact)
    detach(model)


def test_strength_1_scores_as_stock_and_another_does_not(model, make_artifact, request):
    # activations that are rounded move with the batch, stock's own too
    noise = 0.05 if "W8A8-packed" in request.node.name else 1e-4
    stock = [one.loglikelihood for one in Scorer(model).score(ITEMS)]
    found = {}
    for strength in (1.0, BETA):
        with calibrated(model, make_artifact(model, beta=strength)) as attachment:
            scores = Scorer(model, attachment).score(ITEMS)
        found[strength] = [one.loglikelihood for one in scores]
    assert found[1.0] == pytest.approx(stock, abs=noise)
    assert found[BETA] != pytest.approx(stock, abs=0.05)
