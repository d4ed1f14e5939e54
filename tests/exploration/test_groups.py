"""Query heads that share a key head: what an artifact knows of them, and its page."""

import json
import re

import pytest
from tiny_models import make_tiny

from act_harness import head_set, load_artifact
from act_harness.attention import model_facts
from act_harness.exploration.page import artifact_page


def groups(artifact):
    text = re.search(r'id="data">(.*?)</script>', artifact_page(artifact), flags=re.DOTALL)[1]
    return json.loads(text)["groups"]


def test_a_made_artifact_knows_its_models_groups(tmp_path):
    made = head_set(make_tiny("llama"), {1: [2]})
    assert made.model.num_key_value_heads == 2
    assert groups(load_artifact(made.save(tmp_path / "heads.json"))) == 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2-135m-instruct/general", 3),
        ("mistral-7b-instruct-v0.2/release-classification", 8),
        ("llama-2-7b-chat/release-classification", 32),
    ],
)
def test_shipped_artifacts_know_their_models_groups(name, count):
    assert groups(load_artifact(name)) == count


def test_a_model_that_does_not_say_or_has_other_groups_by_layer_is_drawn_without():
    model = make_tiny("gpt2")
    for said in (None, [2, 4, 4]):
        model.config.num_key_value_heads = said
        assert model_facts(model).num_key_value_heads is None
        assert groups(head_set(model, {0: [1]})) == 4


def test_an_artifact_that_was_made_without_is_drawn_without_and_still_fits():
    model = make_tiny("llama")
    made = head_set(model, {1: [2]})
    old = made.model_copy(
        update={"model": made.model.model_copy(update={"num_key_value_heads": None})}
    )
    assert groups(old) == 4
    old.verify(model_facts(model))
    assert old.sha256() == made.sha256()
