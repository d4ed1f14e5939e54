"""Models with peft adapters: they are identified by their base model, and the adapter is named."""

from __future__ import annotations

import warnings

import pytest
import torch

from act_harness.artifact import Artifact
from act_harness.attention import attach, detach, model_facts, weights_fingerprint
from act_harness.attention.facts import adapter_fingerprint, base_model
from act_harness.calibration import Calibration
from act_harness.errors import ArtifactError, UnsupportedCallError
from act_harness.model import CalibratedHFLM

peft = pytest.importorskip("peft", reason="the package peft is not installed")

PROMPT = torch.tensor([[5, 17, 3, 88, 41, 9, 33, 60, 12, 7, 29, 54]])


def adapted(model, *, seed=0, **more):
    """The model inside a LoRA whose matrices are not zero."""
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **more}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return wrapped


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"use_dora": True},
        {"target_modules": "all-linear", "lora_bias": False},
    ],
)
def test_the_facts_are_the_base_models(tiny, more):
    base = model_facts(tiny())
    model = adapted(tiny(), **more)
    facts = model_facts(model)
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.weights_sha256 == base.weights_sha256
    assert facts.adapter.startswith("default (LORA) ")
    assert facts.model_copy(update={"adapter": None}) == base
    assert model_facts(model.get_base_model()) == facts  # the same, however it is reached
    assert weights_fingerprint(model) == base.weights_sha256
    assert adapter_fingerprint(tiny()) is None


def test_an_adapter_is_known_by_its_weights_and_only_while_it_is_active(tiny):
    first, second = adapted(tiny(), seed=0), adapted(tiny(), seed=1)
    names = [adapter_fingerprint(model) for model in (first, second, adapted(tiny(), seed=0))]
    assert names[0] == names[2] != names[1]
    with first.disable_adapter():
        assert adapter_fingerprint(first) is None
    first.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapter_fingerprint(first) == names[0]  # a second one that is not in use
    first.set_adapter("other")
    assert adapter_fingerprint(first).startswith("other (LORA) ")


def test_an_adapter_that_transformers_puts_in_place_is_known_too(tiny):
    inplace = tiny()
    try:
        inplace.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="own")
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))  # transformers 5.24 wants a peft that is not out
    assert model_facts(inplace).weights_sha256 == model_facts(tiny()).weights_sha256
    assert adapter_fingerprint(inplace).startswith("own (LORA) ")


def test_an_artifact_of_the_base_is_accepted_with_a_warning_that_names_the_adapter(
    tiny, make_artifact
):
    model = adapted(tiny())
    artifact = make_artifact(tiny())
    stock = logits(model)
    with pytest.warns(UserWarning, match=r"without a peft adapter.*default \(LORA\)") as caught:
        attachment = attach(model, artifact)
    assert len(caught) == 1
    assert attachment.model is base_model(model)
    assert not torch.equal(logits(model), stock)
    assert attachment.calls.calls == {"torch": 3}
    for one in (model, model.get_base_model()):  # both ways into the same loop
        with pytest.raises(UnsupportedCallError, match="num_beams"):
            one.generate(input_ids=PROMPT, num_beams=2)
    detach(model)
    assert torch.equal(logits(model), stock)
    own = make_artifact(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, own).detach()
    with pytest.warns(UserWarning, match="another|this model is without a peft adapter"):
        attach(tiny(), own).detach()
    with pytest.warns(UserWarning, match="an adapter changes the weights"):
        attach(adapted(tiny(), seed=1), own).detach()


def test_an_artifact_of_another_base_is_refused(tiny, make_artifact):
    mine, other = adapted(tiny()), adapted(tiny("mistral"))
    with pytest.raises(ArtifactError, match="architecture LlamaForCausalLM"):
        attach(other, make_artifact(mine))
    with pytest.raises(ArtifactError, match="this model has MistralForCausalLM"):
        attach(other, make_artifact(tiny()))


def test_hf_act_takes_an_adapter_by_its_folder(tiny, tiny_checkpoint, tmp_path):
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 2}
    plain = CalibratedHFLM(str(tiny_checkpoint), artifact="none", **settings)
    adapted(plain.model).save_pretrained(tmp_path)
    base = CalibratedHFLM(str(tiny_checkpoint), artifact="none", **settings)
    artifact = Artifact(
        name="of-the-base", model=base.facts, calibration=Calibration(alpha=1.5), heads={0: (0, 2)}
    )
    with pytest.warns(UserWarning, match=r"default \(LORA\)"):
        lm = CalibratedHFLM(str(tiny_checkpoint), artifact=artifact, peft=str(tmp_path), **settings)
    assert lm.facts.architecture == "LlamaForCausalLM"
    assert lm.facts.weights_sha256 == base.facts.weights_sha256
    assert lm.get_model_info()["act_harness"]["model"]["adapter"].startswith("default (LORA) ")
    pair = (("", ""), lm.tok_encode("the cat sat on"), lm.tok_encode(" the mat"))
    found = []
    for one in (lm, base):
        found.append(one._loglikelihood_tokens([pair], disable_tqdm=True)[0][0])
    lm.use_artifact(None)
    found.append(lm._loglikelihood_tokens([pair], disable_tqdm=True)[0][0])
    assert len({round(value, 3) for value in found}) == 3
