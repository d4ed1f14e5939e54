"""The exact pass equals the one-head-at-a-time loop through the permanent adapter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_search import documents, tiny

from act_harness.artifact import Artifact
from act_harness.attention import calibrated, model_facts
from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines import select_engine
from act_harness.errors import UnsupportedModelError
from act_harness.scoring import Item, Scorer
from act_harness.search.exact import ChunkPass
from act_harness.search.layout import Layout, chunks_of
from act_harness.search.workbench import Workbench


def loop_scores(model, docs, artifact):
    with calibrated(model, artifact) as attachment:
        scorer = Scorer(model, attachment)
        return [
            [score.loglikelihood for score in scorer.score([Item(*r) for r in doc.requests])]
            for doc in docs
        ]


def one_head(model, layer, head, calibration, strength=None):
    return Artifact(
        name="one",
        model=model_facts(model),
        calibration=calibration,
        heads={layer: (head,)},
        strengths=None if strength is None else {layer: {head: strength}},
    )


def exact_scores(model, docs, calibration, strengths, *, chunk_tokens=1 << 12, pack_tokens=64):
    """(layers, strengths, heads, documents, choices) by the exact pass, and its counts."""
    found, counts, order = [], [], []
    with Workbench(model) as bench:
        for chunk in chunks_of(docs, chunk_tokens):
            layout = Layout.of(
                chunk.documents, device=bench.device, share=calibration.decode != "running"
            )
            run = ChunkPass(
                bench,
                layout,
                engine=select_engine("torch"),
                calibration=calibration,
                strengths=strengths,
                first_layer=0,
                pack_tokens=pack_tokens,
            )
            base = run.baseline()
            layers = [run.layer(layer, range(bench.heads)) for layer in range(len(bench.layers))]
            found.append(torch.stack([change + base for change, _ in layers]))
            counts += [count for _, count in layers]
            order += [doc.key for doc in chunk.documents]
    return torch.cat(found, dim=3), counts, order


@dataclass(frozen=True)
class Case:
    model: str
    calibration: Calibration
    strength: HeadStrength | None = None


CASES = {
    "llama": Case("llama", Calibration(alpha=2.0)),
    "llama-initial-reweight": Case(
        "llama", Calibration(target="initial"), HeadStrength(mass="reweight", gamma=2.0)
    ),
    "llama-running": Case("llama", Calibration(alpha=2.0, decode="running")),
    "llama-off": Case("llama", Calibration(alpha=2.0, decode="off", protect="none")),
    "mistral-window": Case("mistral-window", Calibration(alpha=2.0)),
    "qwen2": Case("qwen2", Calibration(alpha=2.0, beta=0.0)),
    "gemma2": Case("gemma2", Calibration(alpha=2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_head_and_document_equals_the_loop(name):
    case = CASES[name]
    model = tiny(case.model)
    docs = documents()
    own = HeadStrength(mass=case.calibration.mass, beta=case.calibration.beta)
    strengths = [own] if case.strength is None else [own, case.strength]
    found, counts, order = exact_scores(model, docs, case.calibration, strengths)
    place = [order.index(doc.key) for doc in docs]
    base = torch.tensor(loop_scores(model, docs, None), dtype=torch.float64)
    moved = 0
    for layer in range(found.shape[0]):
        for head in range(found.shape[2]):
            for number, strength in enumerate(strengths):
                artifact = one_head(model, layer, head, case.calibration, strength)
                expected = torch.tensor(loop_scores(model, docs, artifact), dtype=torch.float64)
                torch.testing.assert_close(
                    found[layer, number, head, place], expected, atol=1e-4, rtol=0
                )
                moved += int(((expected - base).abs() > 1e-3).sum())
    assert moved > 50  # calibration really changes these models
    assert sum(count.computed for count in counts) <= sum(count.variants for count in counts)


def test_chunks_and_packs_do_not_change_scores():
    model, docs = tiny(), documents(6)
    own = [HeadStrength()]
    one, _, order = exact_scores(model, docs, Calibration(alpha=2.0), own)
    for tokens, pack in ((30, 1), (60, 40), (1000, 10_000)):
        other, _, again = exact_scores(
            model, docs, Calibration(alpha=2.0), own, chunk_tokens=tokens, pack_tokens=pack
        )
        assert again == order
        torch.testing.assert_close(other, one, atol=2e-5, rtol=0)


def test_pairs_without_a_sink_are_not_computed():
    model, docs = tiny(), documents(4)
    found, counts, _ = exact_scores(model, docs, Calibration(alpha=1e6), [HeadStrength()])
    assert sum(count.computed for count in counts) == 0
    assert bool((found == found[0, 0, 0]).all())


def test_the_model_is_stock_again_afterwards():
    model = tiny()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    ids = torch.arange(12)[None]
    logits = model(input_ids=ids).logits
    with Workbench(model):
        pass
    assert torch.equal(model(input_ids=ids).logits, logits)
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name]), name
    assert model.config._attn_implementation == "sdpa"


def test_an_adapter_that_is_not_merged_is_refused():
    model = tiny()
    projection = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(projection)
    with pytest.raises(UnsupportedModelError, match="o_proj"):
        exact_scores(model, documents(2), Calibration(alpha=2.0), [HeadStrength()])


def test_rows_of_a_common_instruction_are_run_once(monkeypatch):
    """With the shared prefix fewer rows are computed, and the scores are the same."""
    model, docs = tiny(), documents(10, common=16)
    calibration = Calibration(alpha=2.0)
    prefixes = []
    from act_harness.search.exact import _Layer

    original = _Layer._prefix

    def counted(self, *args):
        prefixes.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(_Layer, "_prefix", counted)
    shared, _, _ = exact_scores(model, docs, calibration, [HeadStrength()], pack_tokens=400)
    assert sum(prefixes) > 0
    monkeypatch.setattr(Layout, "common", 0)
    count = len(prefixes)
    plain, _, _ = exact_scores(model, docs, calibration, [HeadStrength()], pack_tokens=400)
    assert len(prefixes) == count
    torch.testing.assert_close(shared, plain, atol=2e-5, rtol=0)
    assert float((plain - plain[:, :, :, :].mean(dim=2, keepdim=True)).abs().max()) > 1e-2


def test_the_same_instruction_is_found():
    docs = documents(4, common=9)
    layout = Layout.of(docs, device=torch.device("cpu"))
    assert layout.common >= 9
    other = Layout.of([*docs, *documents(1, seed=3)], device=torch.device("cpu"))
    assert other.common == 0
