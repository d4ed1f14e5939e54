"""The exact pass equals the one-head-at-a-time loop through the permanent adapter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from exact_runs import exact_scores, loop_scores, one_head, relative, same_as_the_loop
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tiny
from tiny_search import documents, tiny

from act_harness.attention.families import FAMILIES
from act_harness.bench.families import build_tiny
from act_harness.calibration import Calibration, HeadStrength
from act_harness.engines.operation import AttentionCall
from act_harness.search.compute import entered, packs, running
from act_harness.search.compute.entered import EnteredModel
from act_harness.search.compute.layout import Layout
from act_harness.search.compute.linears import laid_out_linear
from act_harness.search.compute.workbench import Workbench


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
    "gpt-oss": Case("gpt-oss", Calibration(alpha=2.0)),
    "llama-both": Case(
        "llama",
        Calibration(target="both", alpha=2.0, mass="reweight", gamma=3.0, gamma_initial=0.3),
    ),
    "llama-random": Case("llama", Calibration(target="random", alpha=2.0, beta=0.0)),
    "llama-temperature": Case("llama", Calibration(target="head", mass="temperature", factor=1.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_head_and_document_equals_the_loop(name):
    case = CASES[name]
    model = tiny(case.model)
    docs = documents()
    own = case.calibration.strength_of_all
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
                got = found[layer, number, head, place]
                torch.testing.assert_close(relative(got), relative(expected), atol=1e-4, rtol=0)
                moved += int(((expected - base).abs() > 1e-3).sum())
    assert moved > 50  # calibration really changes these models
    assert sum(count.computed for count in counts) <= sum(count.variants for count in counts)


GPT = {"num_hidden_layers": 2, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NEO = {"num_hidden_layers": 2, "num_layers": 2, "num_heads": 4}
OUTSIDE = {
    "gpt2": GPT,  # its blocks are called by place
    "gpt_neox": {"num_hidden_layers": 2},
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "gpt_neo": {**NEO, "attention_types": [[["global"], 2]]},
    "xglm": {
        "init_std": 0.08, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
    },
    "falcon": {"num_hidden_layers": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "gpt_neo local": {**NEO, "attention_types": [[["global", "local"], 1]]},
}  # fmt: skip
"""Models whose layers are called, or attend, in ways of their own."""

WHOLE = {"bloom": "ALiBi", "mpt": "ALiBi", "gpt_neo local": "window"}
"""Those that count columns, and are run as whole sequences."""


@pytest.mark.parametrize("name", OUTSIDE)
def test_families_of_other_shapes_are_searched_like_the_loop(name):
    model = make_tiny(name.split()[0], dtype=torch.float32, **OUTSIDE[name])
    assert WHOLE.get(name, "") in (same_as_the_loop(model) or "")


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3"])
def test_layers_that_share_keys_and_composite_models_are_searched_like_the_loop(kind):
    """Gemma 4's last layers attend over keys of layers that a variant does not enter."""
    model = build_tiny(kind)
    same_as_the_loop(model, [(0, 1), (0, 2), (1, 0), (1, 3), (2, 1), (3, 0)])


class Japanese:
    """A family that is not ours, brought by a user; its attention returns three values."""

    attention = "GPTNeoXJapaneseAttention"
    method = "_attn"

    def layer(self, module):
        return module.layer_idx

    def search_obstacle(self, module):
        return None

    def serve(self, module, attend, query, key, value, attention_mask=None):
        def run(query, key, value, mask):
            query, key = query.contiguous(), key.contiguous()  # _attn takes views of them
            output, maps = type(module)._attn(module, query, key, value, mask)
            return output.transpose(1, 2), maps

        call = AttentionCall(query, key, value, 1 / module.norm_factor)
        output, maps = attend(call, attention_mask, run)
        return output.transpose(1, 2), maps


def test_an_attention_may_return_more_than_output_and_maps(monkeypatch):
    """The last layer's bias comes behind its maps, and the layer adds it; the rest give None."""
    monkeypatch.setitem(FAMILIES, Japanese.attention, Japanese())
    model = make_tiny("gpt_neox_japanese", dtype=torch.float32, num_hidden_layers=2)
    bias = model.gpt_neox_japanese.layers[-1].attention.dense_bias
    torch.nn.init.normal_(bias)
    same_as_the_loop(model)


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


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gemma2"])
@pytest.mark.parametrize(("group_cost", "block"), [(1, 64), (64, 64), (0, 3)])
def test_groups_and_blocks_do_not_change_scores(kind, group_cost, block, monkeypatch):
    """Variants that begin at different rows, in one group or each alone, attend to the same."""
    model, docs = tiny(kind), documents(6)
    plain, _, _ = exact_scores(model, docs, Calibration(alpha=2.0), [HeadStrength()], pack_tokens=1)
    groups, blocks = [], []
    by_blocks, resume = running._by_blocks, EnteredModel.resume

    def seen_blocks(run, projected, mask):
        blocks.append(projected[0].shape[2])
        return by_blocks(run, projected, mask)

    def seen_groups(self, layer, **given):
        groups.append([group.sequences for group in given["groups"]])
        return resume(self, layer, **given)

    monkeypatch.setitem(packs.GROUP_COST, "cpu", group_cost)
    monkeypatch.setattr(running, "_BLOCK", block)
    monkeypatch.setattr(running, "_by_blocks", seen_blocks)
    monkeypatch.setattr(EnteredModel, "resume", seen_groups)
    found, _, _ = exact_scores(
        model, docs, Calibration(alpha=2.0), [HeadStrength()], pack_tokens=400
    )
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=0)
    assert max(map(len, groups)) > 1
    assert max(max(one, default=0) for one in groups) > 1
    assert max(blocks) > 3


@given(
    firsts=st.lists(st.lists(st.integers(0, 39), max_size=20).map(sorted), max_size=4),
    rows=st.integers(1, 200),
    cost=st.integers(0, 50),
)
def test_packs_hold_every_variant_once_within_their_bounds(firsts, rows, cost):
    parts, number = [], 0
    for first in firsts:
        own = torch.arange(number, number + len(first))
        parts.append(packs.Variants(own, own, own, first))
        number += len(first)
    made = list(packs.packs_of(parts, length=40, rows=rows, group_cost=cost))
    assert [int(v) for pack in made for group in pack for v in group.sequence] == list(
        range(number)
    )
    for pack in made:
        assert sum(map(len, pack)) > 0
        taken = sum(len(group) * (40 - group.first[0]) for group in pack)
        assert taken <= rows or sum(map(len, pack)) == 1
        for group in pack:
            assert sum(one - group.first[0] for one in group.first) <= cost


def test_rows_that_all_choices_share_need_no_output_head(monkeypatch):
    """Of documents whose choices begin in one row, only rows inside answers get logits."""
    model, docs = tiny(), documents(6)
    heads = []
    model.lm_head.register_forward_hook(lambda _, args, output: heads.append(output.shape[-2]))
    given = [Calibration(alpha=2.0), [HeadStrength()]]
    short, _, _ = exact_scores(model, docs, *given)
    few = sum(heads)
    heads.clear()
    monkeypatch.setattr(
        Layout, "level", property(lambda self: torch.zeros(len(self.places), dtype=torch.bool))
    )
    whole, _, _ = exact_scores(model, docs, *given)
    assert few < sum(heads)
    torch.testing.assert_close(relative(short), relative(whole), atol=2e-5, rtol=0)
    assert float((short - whole).abs().max()) > 1e-3  # the normaliser is left out


def test_a_head_whose_logits_are_changed_is_run_in_full():
    with Workbench(tiny("gemma2")) as bench:  # a soft cap on its logits
        assert not bench.plain_head
    with Workbench(tiny()) as bench:
        assert bench.plain_head


def test_linear_layers_run_through_onednn(monkeypatch):
    """Where that is faster, with the same scores, and only while the model is open."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    model, docs = tiny(), documents(4)
    given = [Calibration(alpha=2.0), [HeadStrength()]]
    with Workbench(model) as bench:
        assert bench.laid_out == 7 * len(bench.layers)  # of a Llama's layer
        assert "forward" in model.model.layers[0].mlp.up_proj.__dict__
        ids = model.get_input_embeddings()(torch.arange(5)[None]).detach().requires_grad_(True)
        model(inputs_embeds=ids).logits.sum().backward()  # gradients take the layers' own way
        assert ids.grad.abs().sum() > 0
    assert "forward" not in model.model.layers[0].mlp.up_proj.__dict__
    found, _, _ = exact_scores(model, docs, *given)
    monkeypatch.setattr(entered, "MOST_BYTES", 0)
    with Workbench(model) as bench:
        assert bench.laid_out == 0
    plain, _, _ = exact_scores(model, docs, *given)
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=0)


@pytest.mark.parametrize("change", ["double", "hook", "own forward", "subclass"])
def test_linear_layers_that_are_left_alone(change):
    layer = torch.nn.Linear(4, 3)
    if change == "double":
        layer = layer.double()
    elif change == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif change == "own forward":
        layer.forward = layer.forward
    else:
        layer = type("Adapted", (torch.nn.Linear,), {})(4, 3)
    assert laid_out_linear(layer) is None
    assert laid_out_linear(torch.nn.LayerNorm(4)) is None


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


def test_an_adapter_that_is_not_merged_is_part_of_the_model():
    model = tiny()
    projection = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(projection)
    assert "no plain linear output projection" in same_as_the_loop(model)


def test_rows_of_a_common_instruction_are_run_once(monkeypatch):
    """With the shared prefix fewer rows are computed, and the scores are the same."""
    model, docs = tiny(), documents(10, common=16)
    calibration = Calibration(alpha=2.0)
    prefixes = []
    from act_harness.search.compute.entered_rows import EnteredLayer

    original = EnteredLayer._prefix

    def counted(self, *args):
        prefixes.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(EnteredLayer, "_prefix", counted)
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
