"""Every architecture that the stored table calls working, against an oracle without our code."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from installed import REPOSITORY
from oracle import ALPHA, BETA, IDS, PROMPT, Oracle, logits

from act_harness.artifact import Artifact
from act_harness.attention import calibrated, model_facts
from act_harness.attention.probe import attending_layers
from act_harness.bench.families import build_tiny
from act_harness.calibration import Calibration

TABLE = json.loads((REPOSITORY / "results/families.json").read_text(encoding="utf-8"))
WORKING = sorted(kind for kind, row in TABLE["rows"].items() if row["result"] == "works")
QUICK = ("llama", "gemma2", "qwen3_next", "gpt_oss", "gptj")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in WORKING],
)
def test_calibrated_logits_are_the_oracles(kind, monkeypatch):
    if transformers.__version__ != TABLE["transformers"] and kind not in QUICK:
        pytest.skip(f"the table is of transformers {TABLE['transformers']}")
    model = build_tiny(kind)
    model.set_attn_implementation("eager")
    heads = attending_layers(model)
    artifact = Artifact(
        name="tiny",
        model=model_facts(model),
        calibration=Calibration(alpha=ALPHA, beta=BETA),
        heads={layer: tuple(range(count)) for layer, count in heads.items()},
    )
    ids = IDS % model.config.get_text_config().vocab_size
    stock = logits(model, ids, use_cache=False)
    expected = Oracle(monkeypatch, -1, layers=len(heads)).logits(model, ids)
    with (
        calibrated(model, artifact, engine="reference") as attachment,
        attachment.prompts([PROMPT]),
    ):
        found = logits(model, ids, use_cache=False)
    moved = float((expected - stock).abs().max())
    assert moved > 1e-4
    torch.testing.assert_close(found, expected, atol=min(1e-4, 0.02 * moved), rtol=0)
    assert torch.equal(logits(model, ids, use_cache=False), stock)
