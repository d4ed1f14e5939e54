"""I1 to I8 of the design's page on semantics, on whole models (the engines alone: test_engines)."""

from __future__ import annotations

import json

import engine_cases as ec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import act_harness
from act_harness.artifact import Artifact
from act_harness.attention import Attachment, attach, calibrated, model_facts
from act_harness.calibration import Calibration, HeadStrength, preset
from act_harness.engines.reference import calibrate_weights, find_sinks
from act_harness.scoring.scorer import Item, Scorer

WINDOWED = ("mistral", "gemma3_text")
KINDS = ("llama", *WINDOWED)
DECODES = ("frozen", "running", "off")
EXACT = 1e-9  # float64 models: nothing but the order of additions differs


def tokens(length, seed=0, low=3, high=97):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (length,), generator=generator)


def logprobs(logits):
    return torch.log_softmax(logits.double(), dim=-1)


def forward(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids[None] if ids.ndim == 1 else ids, **more)


def sinks_found(attachment: Attachment) -> int:
    return sum(record.sinks for record in attachment.records())


# -- I1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_i1_no_heads_is_the_stock_model_bit_for_bit(tiny, make_artifact, kind):
    model = tiny(kind, dtype=torch.float32)
    ids = tokens(20)
    stock = forward(model, ids).logits
    with calibrated(model, make_artifact(model, heads={})) as attachment:
        assert not attachment.active
        assert torch.equal(forward(model, ids).logits, stock)
    one = make_artifact(model, heads={2: (1,)})
    with calibrated(model, one) as attachment:
        changed = forward(model, ids).logits
        assert attachment.active
        assert not torch.equal(changed, stock)
        # rows that no later layer changes: the layers below the selected one are bit-exact
        hidden = forward(model, ids, output_hidden_states=True).hidden_states
    before = forward(model, ids, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[2], before[2])
    assert torch.equal(forward(model, ids).logits, stock)


@pytest.mark.parametrize("engine", ec.NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_i1_all_heads_with_beta_1_pass_the_engine_and_change_nothing(
    tiny, make_artifact, kind, engine
):
    model = tiny(kind)
    ids = tokens(20)
    stock = forward(model, ids).logits
    with calibrated(model, make_artifact(model, beta=1.0), engine=engine) as attachment:
        same = forward(model, ids).logits
        assert attachment.calls.calls == {engine: 3}
        assert sinks_found(attachment) > 10
    torch.testing.assert_close(same, stock, rtol=0, atol=EXACT)


# -- I2 ----------------------------------------------------------------------------------------


def random_maps(seed, heads, rows, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, heads, rows, rows, generator=generator, dtype=torch.float64) * spread
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    return torch.softmax(logits.masked_fill(~causal, -torch.inf), dim=-1), causal


CALIBRATIONS = st.one_of(
    st.builds(
        Calibration,
        alpha=st.floats(1.0, 6.0),
        beta=st.floats(0.0, 1.0),
        protect=st.sampled_from(["initial", "first-flagged", "none"]),
        min_rows=st.sampled_from([1, 2, 4, "auto"]),
    ),
    st.builds(Calibration, rule=st.just("absolute"), tau=st.floats(0.01, 0.5)),
    st.builds(Calibration, mass=st.just("reweight"), gamma=st.floats(0.05, 20.0)),
    st.builds(
        Calibration, target=st.just("initial"), mass=st.just("reweight"), gamma=st.floats(0.1, 9)
    ),
)


@settings(max_examples=150, deadline=None)
@given(CALIBRATIONS, st.integers(0, 10**6), st.integers(1, 24), st.floats(0.1, 8.0))
def test_i2_rows_stay_distributions_and_keep_their_ratios(calibration, seed, rows, spread):
    maps, causal = random_maps(seed, 2, rows, spread)
    changed = calibrate_weights(maps, calibration=calibration)
    assert (changed >= 0).all()
    assert (changed[..., ~causal] == 0).all()
    torch.testing.assert_close(changed.sum(-1), maps.sum(-1), rtol=0, atol=1e-9)
    seen = causal.sum(0).expand(2, 1, rows)
    sinks, _ = find_sinks(
        maps.sum(2),
        seen,
        most=torch.full((2, 1, 1), rows),
        first=torch.zeros(2, 1, 1, dtype=torch.long),
        calibration=calibration,
    )
    mass = (maps * sinks[:, :, None]).sum(-1, keepdim=True)
    other = (maps * ~sinks[:, :, None]).sum(-1, keepdim=True)
    if calibration.mass == "damp":
        wanted = torch.where(other < 1e-6, mass, calibration.beta * mass)
    else:
        wanted = calibration.gamma * mass / (other + calibration.gamma * mass)
    inside = torch.where(mass > 0, wanted / mass, 1.0)
    outside = torch.where(mass > 0, (1 - wanted) / other.clamp(min=1e-300), 1.0)
    expected = maps * torch.where(sinks[:, :, None], inside, outside)
    untouched = (mass == 0) | ((calibration.mass == "damp") & (other < 1e-6))
    torch.testing.assert_close(changed, torch.where(untouched, maps, expected), rtol=0, atol=1e-9)


def test_i2_other_heads_are_untouched(tiny, make_artifact):
    model = tiny(dtype=torch.float32)
    attention = model.model.layers[1].self_attn
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    ids = tokens(24)
    forward(model, ids)
    with calibrated(model, make_artifact(model, heads={1: (0, 3)})):
        seen.clear()
        forward(model, ids)
        changed = seen[-1].view(24, 4, -1)
    seen.clear()
    forward(model, ids)
    stock = seen[-1].view(24, 4, -1)
    assert torch.equal(changed[:, [1, 2]], stock[:, [1, 2]])
    assert not torch.equal(changed[:, 0], stock[:, 0])
    assert not torch.equal(changed[:, 3], stock[:, 3])


# -- I3 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_i3_padding_on_either_side_changes_nothing(tiny, make_artifact, kind, side):
    model = tiny(kind)
    lengths = [5, 17, 30, 9]
    batch = torch.zeros(4, 30, dtype=torch.long)
    mask = torch.zeros(4, 30, dtype=torch.long)
    for n, length in enumerate(lengths):
        place = slice(30 - length, None) if side == "left" else slice(length)
        batch[n, place] = tokens(length, seed=n)
        mask[n, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with calibrated(model, make_artifact(model)) as attachment:
        together = forward(model, batch, attention_mask=mask, position_ids=positions).logits
        records = attachment.records()
        for n, length in enumerate(lengths):
            alone = forward(model, tokens(length, seed=n)).logits[0]
            (record,) = attachment.records()
            assert record.sinks > 0
            assert record.sinks == records[n].sinks
            assert record.moved == pytest.approx(records[n].moved, abs=1e-9)
            real = together[n][mask[n].bool()]
            torch.testing.assert_close(real, alone, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_i3_right_padding_without_a_mask_when_lengths_are_said(tiny, make_artifact, kind):
    model = tiny(kind)
    batch = torch.zeros(2, 20, dtype=torch.long)
    batch[0], batch[1, :7] = tokens(20), tokens(7, seed=1)
    with calibrated(model, make_artifact(model)) as attachment:
        with attachment.prompts([20, 7], tokens=[20, 7]):
            together = forward(model, batch).logits
        alone = forward(model, tokens(7, seed=1)).logits[0]
        torch.testing.assert_close(together[1, :7], alone, rtol=0, atol=EXACT)
        unsaid = forward(model, batch).logits  # the pads take part: what I3 is there to prevent
        assert (unsaid[1, :7] - alone).abs().max() > 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("kind", KINDS)
def test_i3_scores_do_not_depend_on_batch_or_order(tiny, make_artifact, kind, batch_size):
    model = tiny(kind, dtype=torch.float32)
    items = [
        Item(tuple(tokens(n, seed=n).tolist()), tuple(tokens(1 + n % 4, seed=99 + n).tolist()))
        for n in range(4, 24)
    ]
    with calibrated(model, make_artifact(model)) as attachment:
        near = set()
        plain = Scorer(model, attachment, batch_size=1, share=False)
        alone = plain.score(items, on_prompt=lambda p, r: near.add(p) if r.near_threshold else None)
        order = list(reversed(range(len(items))))
        scores = Scorer(model, attachment, batch_size=batch_size).score([items[n] for n in order])
    assert len(near) < len(items) / 2
    for n, score in zip(order, scores, strict=True):
        if items[n].context not in near:
            assert score.loglikelihood == pytest.approx(alone[n].loglikelihood, abs=1e-4)


# -- I4 and I8 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("kind", KINDS)
def test_i4_one_piece_equals_token_by_token(tiny, make_artifact, kind, decode):
    model = tiny(kind)
    prompt, rest = tokens(11), tokens(13, seed=5)
    with calibrated(model, make_artifact(model, decode=decode)) as attachment:
        with attachment.prompts([11]):
            whole = forward(model, torch.cat([prompt, rest])).logits[0, 11:]
        assert sinks_found(attachment) > 0
        piece = forward(
            model, rest, past_key_values=forward(model, prompt, use_cache=True).past_key_values
        ).logits[0]
        steps = []
        cache = forward(model, prompt, use_cache=True).past_key_values
        for token in rest:
            out = forward(model, token[None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
        everything = forward(model, torch.cat([prompt, rest])).logits[0, 11:]
    torch.testing.assert_close(piece, whole, rtol=0, atol=EXACT)
    torch.testing.assert_close(torch.stack(steps), whole, rtol=0, atol=EXACT)
    assert (everything - whole).abs().max() > 1e-4, "prompt and continuation were not told apart"


def test_i4_the_decode_settings_differ(tiny, make_artifact):
    model = tiny()
    prompt, rest = tokens(11), tokens(13, seed=5)
    found = {}
    for decode in DECODES:
        with (
            calibrated(model, make_artifact(model, decode=decode)) as attachment,
            attachment.prompts([11]),
        ):
            found[decode] = forward(model, torch.cat([prompt, rest])).logits[0]
    for decode in ("running", "off"):
        torch.testing.assert_close(found[decode][:11], found["frozen"][:11])
        assert (found[decode][11:] - found["frozen"][11:]).abs().max() > 1e-4


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("kind", KINDS)
def test_i8_a_later_continuation_token_changes_nothing_before_it(tiny, make_artifact, kind, decode):
    model = tiny(kind)
    ids = tokens(24)
    with (
        calibrated(model, make_artifact(model, decode=decode)) as attachment,
        attachment.prompts([9]),
    ):
        before = logprobs(forward(model, ids).logits[0])
        for place in (10, 17, 23):
            other = ids.clone()
            other[place] = (other[place] + 1) % 97
            after = logprobs(forward(model, other).logits[0])
            torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=EXACT)
            assert (after[place] - before[place]).abs().max() > 1e-6


def test_rolling_calibrates_only_with_running(tiny, make_artifact):
    model = tiny()
    ids = tokens(20)
    stock = forward(model, ids).logits
    for decode in DECODES:
        with (
            calibrated(model, make_artifact(model, decode=decode)) as attachment,
            attachment.prompts([0]),
        ):
            same = torch.allclose(forward(model, ids).logits, stock, rtol=0, atol=EXACT)
            assert same is (decode != "running")
            assert [record.sinks for record in attachment.records()] == [0]


# -- I5 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("kind", KINDS)
def test_i5_greedy_generation_is_the_argmax_of_scoring(tiny, make_artifact, kind, decode):
    model = tiny(kind)
    prompts = [tokens(8), tokens(15, seed=3)]
    ids = torch.zeros(2, 15, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, prompt in enumerate(prompts):
        ids[n, 15 - len(prompt) :] = prompt
        mask[n, 15 - len(prompt) :] = 1
    with calibrated(model, make_artifact(model, decode=decode)) as attachment:
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12,
            eos_token_id=None, pad_token_id=0,
        )[:, 15:]  # fmt: skip
        scorer = Scorer(model, attachment)
        for prompt, answer in zip(prompts, made.tolist(), strict=True):
            context = tuple(prompt.tolist())
            assert scorer.score([Item(context, tuple(answer))])[0].is_greedy
            for step in (0, 5, 11):
                wrong = [*answer[:step], (answer[step] + 1) % 97]
                assert not scorer.score([Item(context, tuple(wrong))])[0].is_greedy
    stock = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12,
        eos_token_id=None, pad_token_id=0,
    )[:, 15:]  # fmt: skip
    assert not torch.equal(stock, made)


# -- I6 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("kind", KINDS)
def test_i6_engines_agree_with_the_reference(tiny, make_artifact, kind, decode):
    model = tiny(kind)
    strengths = {1: {0: HeadStrength(beta=0.0), 2: HeadStrength(mass="reweight", gamma=3.0)}}
    artifact = make_artifact(model, decode=decode, strengths=strengths)
    outputs, records = [], []
    for engine in ec.NAMES:  # the reference first
        with calibrated(model, artifact, engine=engine) as attachment:
            with attachment.prompts([14]):
                outputs.append(forward(model, tokens(26)).logits)
            assert attachment.calls.calls == {engine: 3}
            records.append(attachment.records())
    a = records[0][0]
    for output, (b, *_) in zip(outputs[1:], records[1:], strict=True):
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=EXACT)
        assert (a.sinks, a.with_sink, a.few_sinks, a.rows_alone) == (
            b.sinks,
            b.with_sink,
            b.few_sinks,
            b.rows_alone,
        )
        assert b.moved == pytest.approx(a.moved)
        assert b.few_moved == pytest.approx(a.few_moved)


# -- I7 ----------------------------------------------------------------------------------------


def test_i7_every_golden_map_of_the_release(golden_dir):
    with np.load(golden_dir / "release_maps.npz", allow_pickle=False) as data:
        meta = json.loads(str(data["meta"]))
        assert len(meta) == 24
        for case in meta:
            weights = torch.tensor(data[f"in_{case['i']}"])
            expected = torch.tensor(data[f"out_{case['i']}"])
            calibration = Calibration(
                **{**preset("release").settings(), "tau": case["tau"], "beta": case["beta"]}
            )
            got = weights.clone()
            got[:, case["heads"]] = calibrate_weights(
                weights[:, case["heads"]], calibration=calibration
            )
            assert (got - expected).abs().max() < 1e-6, case["name"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ec.NAMES)
def test_i7_logits_of_the_release_on_the_real_model(golden_dir, smollm, engine):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    with np.load(golden_dir / "release_logits.npz", allow_pickle=False) as data:
        meta = json.loads(str(data["meta"]))
        heads = {n + 2: tuple(h) for n, h in enumerate(meta["heads_by_layer_from_2"]) if h}
        artifact = Artifact(
            name="release", model=model_facts(model), calibration=preset("release"), heads=heads
        )
        vocabulary = torch.tensor(data["vocab_ids"])
        stored = {
            setting: torch.tensor(data[f"logits__{setting}"])
            for setting in ("vanilla", "eval_fixed_b.4_t.1")
        }
        assert stored["vanilla"].shape == (8, 200)
        attachment = attach(model, artifact, engine=engine)
        for n in range(8):
            ids = torch.tensor(data[f"input_ids_{n}"])
            got = forward(model, ids).logits[0, -1, vocabulary]
            assert (got - stored["eval_fixed_b.4_t.1"][n]).abs().max() < 2e-4
        attachment.detach()
        ids = torch.tensor(data["input_ids_0"])
        got = forward(model, ids).logits[0, -1, vocabulary]
        assert (got - stored["vanilla"][0]).abs().max() < 2e-4
        assert (stored["vanilla"] - stored["eval_fixed_b.4_t.1"]).abs().max() > 1


def test_the_public_names_are_the_ones_promised():
    assert act_harness.__all__ == sorted(act_harness.__all__)
    for name in act_harness.__all__:
        assert getattr(act_harness, name) is not None
