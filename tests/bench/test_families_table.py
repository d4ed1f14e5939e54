"""The table of architectures says what is so, also of models that fail."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from act_harness.bench import families
from act_harness.bench.families import architectures, build_tiny, report, try_family
from act_harness.cli.app import app


@pytest.mark.parametrize(
    ("kind", "route", "search"),
    [
        ("llama", "packed", "yes"),
        ("gptj", "over the cache", "yes"),
        ("mpt", None, "no: "),
        ("gpt_oss", "packed", "yes"),  # with learned sinks
        ("mimo_v2_flash", "packed", "yes"),
    ],
)
def test_an_architecture_that_works(kind, route, search):
    row = try_family(kind)
    assert row.result == "works"
    assert route in (None, row.route)
    assert row.search.startswith(search)
    assert row.generation == "yes"


@pytest.mark.parametrize("kind", ["modernbert-decoder", "roc_bert"])
def test_architectures_with_parts_in_other_places_work(kind):
    """A head called decoder, and a cache for an encoder that is not there."""
    assert try_family(kind).result == "works"


def test_a_model_that_the_search_cannot_follow_is_refused_by_it():
    """DeepSeek's indexed layers want more than their input; the search's check crashed first."""
    row = try_family("deepseek_v32")
    assert row.result == "works"
    assert row.search.startswith("no: the decoder layers of DeepseekV32ForCausalLM cannot be")
    assert try_family("jetmoe").search == "yes"  # attends with a bias behind its maps


def test_architectures_that_do_not_work_say_why():
    assert try_family("mamba").result.startswith("refused: MambaForCausalLM has no")
    assert try_family("ctrl").architecture == "CTRLLMHeadModel"


def test_wrong_logits_and_crashes_are_told_apart(monkeypatch):
    """Rows that differ when padded are wrong, what raises crashes; neither ends the table."""
    original = families._calibrated_logits

    def shifted(model, attachment, rows, prompts):
        found = original(model, attachment, rows, prompts)
        return [one + attachment.active * (len(rows) - 1) for one in found]

    monkeypatch.setattr(families, "_calibrated_logits", shifted)
    assert try_family("llama").result.startswith("wrong: a sequence scores otherwise in a padded")

    def broken(model, attachment, rows, prompts):
        if attachment.active:
            raise KeyError("no such layer")
        return original(model, attachment, rows, prompts)

    monkeypatch.setattr(families, "_calibrated_logits", broken)
    told = report(["llama", "gpt2"])
    assert "2 crashes" in told
    assert "crashes: KeyError: 'no such layer'" in told

    def ours_too(*_):
        raise KeyError("no such layer")

    monkeypatch.setattr(families, "_calibrated_logits", ours_too)
    assert try_family("llama").result == "stock: KeyError: 'no such layer'"


def test_tiny_models_are_tiny_and_the_same_each_time():
    one, two = build_tiny("qwen3"), build_tiny("qwen3")
    assert sum(parameter.numel() for parameter in one.parameters()) < 100_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert {"llama", "gptj", "bloom", "gpt2"} <= set(architectures())


def test_an_output_without_a_table_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path / "families.md")])
    assert result.exit_code != 0
    assert "--families" in str(result.exception)
