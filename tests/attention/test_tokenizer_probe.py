"""A tokenizer is what it does: the same ids are the same tokenizer, whatever its files say."""

import copy
import hashlib
import json
import warnings

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_harness.artifact import load_artifact, shipped_artifacts
from act_harness.attention import model_facts, tokenizer_fingerprint
from act_harness.attention.tokenizer_probe import (
    _CONVERSATION,
    _SPECIAL,
    _TEXTS,
    chat_probe,
    tokenizer_probe,
)
from act_harness.errors import ArtifactError


def digest(ids):
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


class Bytes:
    """Its ids are the bytes of UTF-8; the template writes role and text."""

    chat_template = "any"

    def __call__(self, text, *, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, turns, *, chat_template, tokenize, add_generation_prompt, **more):
        assert (tokenize, add_generation_prompt) == (False, True)
        assert chat_template.endswith(self.chat_template)
        return "".join(f"{turn['role']}:{turn['content']}" for turn in turns)


class Choosy(Bytes):
    def __call__(self, text, *, add_special_tokens):
        if "\u0000" in text:
            raise Exception("no such character")  # as the tokenizers library does
        return super().__call__(text, add_special_tokens=add_special_tokens)


def test_the_probe_is_a_hash_of_ids():
    texts = (*_TEXTS, *_SPECIAL)
    assert len(set(texts)) == len(texts) > 50
    assert tokenizer_probe(Bytes()) == digest([list(text.encode()) for text in texts])
    said = "".join(f"{turn['role']}:{turn['content']}" for turn in _CONVERSATION)
    assert chat_probe(Bytes()) == digest([list(said.encode())])


def test_a_text_that_cannot_be_encoded_is_part_of_the_answer():
    texts = (*_TEXTS, *_SPECIAL)
    expected = [None if "\u0000" in text else list(text.encode()) for text in texts]
    assert expected.count(None) == 1
    assert tokenizer_probe(Choosy()) == digest(expected)


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def lower(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def prefix(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def digits(tokenizer):
    before = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), before]
    )


def another_special(tokenizer):
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|im_start|>")])


def merges(tokenizer):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    kept = [tuple(pair) for pair in model["merges"] if pair != ["i", "n"]]
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(
        vocab=model["vocab"], merges=kept
    )


@pytest.mark.parametrize("change", [lower, prefix, digits, another_special, merges])
def test_what_gives_other_ids_has_another_probe(tokenizer, change):
    other = copy.deepcopy(tokenizer)
    assert tokenizer_probe(other) == tokenizer_probe(tokenizer)
    change(other)
    assert tokenizer_probe(other) != tokenizer_probe(tokenizer)


def as_read_elsewhere(tokenizer):
    """SmolLM2's GGUF under transformers 5.17: no pad token, and the first token ends a text."""
    other = copy.deepcopy(tokenizer)
    other.eos_token = other.bos_token
    other.pad_token = None
    backend = other.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.normalizer = normalizers.Sequence([])
    return other


def check_that_the_file_only_warns(artifact, model, tokenizer, other):
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artifact.verify(model_facts(model, tokenizer))
    with pytest.warns(UserWarning, match="both give the same token ids") as caught:
        artifact.verify(model_facts(model, other))
    assert len(caught) == 1


def test_an_artifact_is_taken_with_another_file_of_the_same_ids(
    tokenizer, tiny_checkpoint, make_artifact
):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    facts = model_facts(model, tokenizer)
    assert None not in (facts.tokenizer_probe_sha256, facts.chat_probe_sha256)
    artifact = make_artifact(model).model_copy(update={"model": facts})
    other = as_read_elsewhere(tokenizer)
    check_that_the_file_only_warns(artifact, model, tokenizer, other)
    prefix(other)
    with pytest.raises(ArtifactError, match="other token ids for the same texts"):
        artifact.verify(model_facts(model, other))
    turned = copy.deepcopy(tokenizer)
    turned.chat_template = tokenizer.chat_template.replace("</", "[/")
    with pytest.raises(ArtifactError, match="a chat template that gives other token ids"):
        artifact.verify(model_facts(model, turned))
    turned.chat_template = None
    artifact.verify(model_facts(model, turned))


def test_a_template_that_writes_the_date_has_one_probe(tokenizer):
    plain = chat_probe(tokenizer)
    turns = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}{{ strftime_now('%H:%M:%S.%f') }}"
    )
    tokenizer.chat_template = dated + turns
    first = chat_probe(tokenizer)
    assert first == chat_probe(tokenizer) != plain
    assert first is not None
    tokenizer.chat_template = "1 Jan 20001 Jan 2000" + turns
    assert chat_probe(tokenizer) == first
    tokenizer.chat_template = {"default": dated + turns, "tool_use": "x"}
    assert chat_probe(tokenizer) == first
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert chat_probe(tokenizer) is None
    tokenizer.chat_template = "{{ messages[0].nothing.at.all }}"
    assert chat_probe(tokenizer) is None
    tokenizer.chat_template = None
    assert chat_probe(tokenizer) is None


def test_shipped_artifacts_hold_the_probe_of_the_real_tokenizer(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    found = (tokenizer_probe(tokenizer), chat_probe(tokenizer))
    own = [path for path in shipped_artifacts().values() if "smollm2" in path.parent.name]
    assert len(own) >= 8
    for path in own:
        recorded = load_artifact(path).model
        assert (recorded.tokenizer_probe_sha256, recorded.chat_probe_sha256) == found
    other = as_read_elsewhere(tokenizer)
    assert tokenizer_fingerprint(other).startswith("2971911c993c")  # seen with 5.17.0
    assert (tokenizer_probe(other), chat_probe(other)) == found
