"""Ways in which a model comes to be loaded: each works as a plain load does, or is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from act_harness.attention import attach, calibrated, detach
from act_harness.attention.facts import base_model
from act_harness.errors import UnsupportedModelError
from act_harness.scoring.scorer import Item, Scorer

accelerate = pytest.importorskip("accelerate", reason="the package accelerate is not installed")

ITEMS = [Item(tuple(range(3, 24)), answer) for answer in ((40, 50, 30), (41, 49))]
PROMPT = torch.tensor([list(range(3, 24))])
PLACES = {
    "model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def on_the_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_the_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny(dtype=torch.float32).save_pretrained(folder)
    return folder


def found(model, artifact):
    """Scores, and a greedy continuation."""
    with calibrated(model, artifact) as attachment:
        scores = Scorer(model, attachment).score(ITEMS)
        told = model.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=4, do_sample=False
        )
    return [s.loglikelihood for s in scores], told[0, PROMPT.shape[1] :].tolist()


# transformers before 5.20 warns of every model that has weights on a meta device.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize(
    "given",
    [
        {"device_map": "auto"},
        {"device_map": {"": "disk"}},
        {"device_map": PLACES},
        on_the_cpu,
        on_the_disk,
    ],
)
def test_weights_that_are_kept_elsewhere_give_the_same(saved, make_artifact, tmp_path, given):
    if given == {"device_map": {"": "disk"}}:
        pytest.importorskip("accelerate", "1.15", reason="before, not all of a model may lie there")
    plain = AutoModelForCausalLM.from_pretrained(saved).eval()
    artifact = make_artifact(plain, alpha=2.0)
    if callable(given):
        model = AutoModelForCausalLM.from_pretrained(saved).eval()
        given(model, str(tmp_path / "kept"))
    else:
        more = {**given, "offload_folder": str(tmp_path / "kept")}
        model = AutoModelForCausalLM.from_pretrained(saved, **more).eval()
    for arm in (None, artifact):
        expected, words = found(plain, arm)
        scores, told = found(model, arm)
        assert scores == pytest.approx(expected, abs=1e-5)
        assert told == words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_what_full_precision_does(saved, make_artifact, dtype):
    plain = AutoModelForCausalLM.from_pretrained(saved).eval()
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype).eval()
    assert found(model, None)[0] == pytest.approx(found(plain, None)[0], abs=0.01)
    initial = [make_artifact(one, target="initial") for one in (model, plain)]  # no flags to flip
    expected = found(plain, initial[1])[0]
    assert found(model, initial[0])[0] == pytest.approx(expected, abs=0.01)
    assert expected != pytest.approx(found(plain, None)[0], abs=0.01)


def test_a_model_without_weights_is_refused(tiny, make_artifact):
    model = tiny()
    artifact = make_artifact(model)
    model.to("meta")
    with pytest.raises(UnsupportedModelError, match="on the meta device, where there are no"):
        attach(model, artifact)
    with pytest.raises(UnsupportedModelError, match="on the meta device, where there are no"):
        Scorer(model)


def test_a_compiled_wrapper_is_the_model_in_it(tiny, make_artifact):
    model = tiny()
    artifact = make_artifact(model)
    wrapper = torch.nn.Module()  # as torch._dynamo's, which takes seconds to import
    wrapper._orig_mod = model
    assert base_model(wrapper) is model
    with calibrated(wrapper, artifact) as attachment:
        assert attachment.model is model
    attach(wrapper, artifact)
    detach(wrapper)
    assert model.config._attn_implementation == "sdpa"
