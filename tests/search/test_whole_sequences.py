"""Models that are searched by whole sequences: hybrids, gated attention, stacked hidden states."""

from __future__ import annotations

import functools

import pytest
import torch
from exact_runs import exact_scores, loop_scores, one_head, relative
from tiny_hybrids import KINDS, hybrid
from tiny_search import documents, drawn

from act_harness.attention.probe import attending_layers
from act_harness.bench.families import build_tiny
from act_harness.calibration import Calibration, HeadStrength
from act_harness.errors import RecipeError
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.read_rows import batches_of
from act_harness.search.compute.workbench import Workbench
from act_harness.search.ledger import SearchLedger
from act_harness.search.recipe import make_recipe
from act_harness.search.record import stable_content
from act_harness.search.run import run_search
from act_harness.support.provenance import canonical_json

CALIBRATION = Calibration(alpha=1.5)
SLOW = (
    "qwen3_5_text", "granitemoehybrid", "bamba", "mllama", "afmoe", "llama4_text", "gemma3n_text",
    "deepseek_v32",
)  # fmt: skip
BUILT = ["gemma3n_text", "bitnet", "deepseek_v32", "mllama", "afmoe", "llama4_text"]


GRADIENTS = ["qwen3_next", "falcon_h1", "jamba", "gemma3n_text", "bloom"]


def cases(kinds):
    return [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in kinds]


@functools.cache
def made(kind):
    return hybrid(kind) if kind in KINDS else build_tiny(kind)


@pytest.mark.parametrize("kind", cases([k for k in [*KINDS, *BUILT] if k != "zamba2"]))
def test_single_heads_equal_forwards_with_that_head(kind):
    model, docs = made(kind), documents(4)
    layers = list(attending_layers(model))
    with Workbench(model) as bench:
        assert bench.obstacle
    found, _, order = exact_scores(model, docs, CALIBRATION, [CALIBRATION.strength_of_all])
    place = [order.index(doc.key) for doc in docs]
    base = torch.tensor(loop_scores(model, docs, None), dtype=torch.float64)
    moved = 0
    for number, layer in enumerate(layers):
        for head in (0, 3):
            artifact = one_head(model, layer, head, CALIBRATION)
            expected = torch.tensor(loop_scores(model, docs, artifact), dtype=torch.float64)
            got = relative(found[number, 0, head, place])
            torch.testing.assert_close(got, relative(expected), atol=1e-4, rtol=0)
            moved += int(((expected - base).abs() > 1e-3).sum())
    assert moved > 10


@pytest.mark.parametrize("kind", cases(["qwen3_next", "lfm2", "gemma3n_text"]))
def test_neither_chunks_nor_packs_change_scores(kind):
    """Documents of 13 to 25 tokens: together they are padded, where recurrent layers would see."""
    model, docs = made(kind), documents(4)
    given = [CALIBRATION, [CALIBRATION.strength_of_all, HeadStrength(mass="damp", beta=0.0)]]
    alone, _, order = exact_scores(model, docs, *given, chunk_tokens=1, pack_tokens=1)
    for tokens, pack in ((50, 1 << 12), (1 << 12, 40)):
        found, _, again = exact_scores(model, docs, *given, chunk_tokens=tokens, pack_tokens=pack)
        place = [again.index(key) for key in order]
        torch.testing.assert_close(found[:, :, :, place], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "jamba"])
def test_gradient_scores_do_not_depend_on_the_batch(kind):
    model, docs = made(kind), documents(6)
    with StrengthenedModel(model, CALIBRATION) as opened, torch.no_grad():
        theta = torch.randn(opened.shape, generator=torch.Generator().manual_seed(1))
        scores = {}
        for tokens in (1, 1 << 12):
            found = torch.zeros(len(docs), 3)
            for batch in batches_of(docs, tokens=tokens, device=torch.device("cpu")):
                found[list(batch.documents)] = opened.scores(batch, theta)
            scores[tokens] = found
        stock = opened.scores(batch, None)
    torch.testing.assert_close(scores[1], scores[1 << 12], atol=1e-4, rtol=0)
    assert (stock - scores[1][list(batch.documents)]).abs().max() > 0.01


@pytest.mark.parametrize(
    "kind", cases(["qwen3_next", "falcon_h1", "jamba", "gemma3n_text", "bloom"])
)
def test_gradients_are_those_of_finite_differences(kind):
    """In float64, but for what some norms and recurrent layers compute in float32."""
    model = build_tiny(kind) if kind not in KINDS else hybrid(kind)
    model.set_experts_implementation("eager")  # torch has no grouped product of float64
    model, docs = model.double(), documents(3)
    (batch,) = batches_of(docs, tokens=1 << 12, device=torch.device("cpu"))
    calibration = Calibration(target="initial", mass="reweight", gamma=1.0)
    with StrengthenedModel(model, calibration) as opened:
        theta = torch.full(opened.shape, 0.3, dtype=torch.float64, requires_grad=True)

        def margin(theta):
            scores = opened.scores(batch, theta)
            return (scores[:, 0] - scores[:, 1]).sum()

        (slope,) = torch.autograd.grad(margin(theta), theta)
        for place in slope.abs().flatten().topk(3).indices:
            step = torch.zeros_like(theta)
            step.view(-1)[place] = 1e-2
            with torch.no_grad():
                wanted = float(margin(theta + step) - margin(theta - step)) / 2e-2
            assert float(slope.view(-1)[place]) == pytest.approx(wanted, rel=0.01, abs=2e-5)
            assert abs(wanted) > 2e-4
    attending = attending_layers(model)
    for layer in range(slope.shape[1]):
        assert (layer in attending) == bool(slope[0, layer].any())


RECIPE = {
    "name": "tiny", "tasks": ["a"], "samples": 8, "verify_samples": 8,
    "calibration": {"alpha": 1.5}, "chunk_tokens": 60, "layers": "all",
    "controls": {"random_sets": 2},
}  # fmt: skip
EXHAUSTIVE = {"method": "exhaustive", "top": {"sizes": [1, 2]}}
SCREENED = {"method": "screened", "keep": 0.5, "top": {"sizes": [1, 2]}}
GRADIENT = {
    "method": "gradient", "objective": "entropy",
    "gradient": {"epochs": 3, "batch": 4, "rate": 0.3, "sizes": [2, 3]},
}  # fmt: skip


def searched(folder, changes, kind="qwen3_next"):
    return run_search(
        make_recipe({**RECIPE, **changes}), model=made(kind), documents=[drawn("a", 5)],
        ledgers=folder / "ledgers", output=folder / "out.json", show_progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [EXHAUSTIVE, SCREENED, GRADIENT])
def test_a_killed_search_of_a_hybrid_goes_on_to_the_same_artifact(tmp_path, monkeypatch, changes):
    whole = searched(tmp_path / "whole", changes).artifact
    assert set(whole.heads) <= {1}
    assert whole.search["searched_heads"] == 4 or changes is GRADIENT
    add, left = SearchLedger.add, [3]

    def dying(self, *args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return add(self, *args, **kwargs)

    monkeypatch.setattr(SearchLedger, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "killed", changes)
    monkeypatch.setattr(SearchLedger, "add", add)
    again = searched(tmp_path / "killed", changes).artifact
    assert again.search["run"]["units_from_ledger"] > 0
    assert canonical_json(stable_content(again)) == canonical_json(stable_content(whole))


def test_layers_that_do_not_attend_are_no_part_of_a_search(tmp_path):
    with pytest.raises(RecipeError, match=r"no layer from 2 to 2 .* attends, only \[1\] do"):
        searched(tmp_path, {"layers": [2, 2]})
