"""I1 to I8 of every member beyond the first schema's, on whole models (test_invariants: those)."""

from __future__ import annotations

import engine_cases as ec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from act_harness.attention import attach, calibrated
from act_harness.attention.spans import SpanFinder
from act_harness.calibration import Calibration
from act_harness.engines.reference import calibrate_weights, find_sinks
from act_harness.errors import CalibrationError, UnsupportedCallError
from act_harness.scoring.scorer import Item, Scorer

EXACT = 1e-9  # float64 models: nothing but the order of additions differs
pytestmark = pytest.mark.filterwarnings("ignore:a prompt holds nothing between the markers")


class Letters:
    """A tokenizer of one letter a token, brackets often enough."""

    def decode(self, ids, **_):
        return "".join("<x>yz"[one % 5] for one in ids)


def tokens(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (length,), generator=generator)


def forward(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids[None] if ids.ndim == 1 else ids, **more)


@pytest.fixture(params=list(ec.MEMBERS))
def member(request):
    return request.param


@pytest.fixture
def engine(member):
    """Name of the engine to try it on: the last of those that have it."""
    return ec.able(member)[-1]


@pytest.fixture
def calibration(member):
    given = ec.MEMBERS[member]
    return Calibration(**{**given.settings(), **({"alpha": 1.5} if given.alpha else {})})


@pytest.fixture
def on(tiny, make_artifact, calibration, engine):
    """Attach the member to all heads of a tiny model."""

    def make(kind="llama", dtype=torch.float64, engine=engine, **more):
        model = tiny(kind, dtype=dtype)
        own = Calibration(**{**calibration.settings(), **more})
        artifact = make_artifact(model, calibration=own)
        return model, calibrated(
            model, artifact, engine=engine, tokenizer=Letters(), facts=artifact.model
        )

    return make


def test_i1_it_passes_the_engine_and_changes_the_model(on, engine):
    model, context = on()
    stock = forward(model, tokens(20)).logits
    with context as attachment:
        changed = forward(model, tokens(20)).logits
        assert attachment.calls.calls == {engine: 3}
    assert (changed - stock).abs().max() > 1e-4
    assert torch.equal(forward(model, tokens(20)).logits, stock)


@pytest.mark.parametrize(("kind", "side"), [("llama", "right"), ("gemma3_text", "left")])
def test_i3_padding_changes_nothing(on, kind, side):
    lengths = [5, 17, 25]
    batch = torch.zeros(3, 25, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for n, length in enumerate(lengths):
        place = slice(25 - length, None) if side == "left" else slice(length)
        batch[n, place], mask[n, place] = tokens(length, seed=n), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model, context = on(kind)
    with context as attachment:
        together = forward(model, batch, attention_mask=mask, position_ids=positions).logits
        records = attachment.records()
        for n, length in enumerate(lengths):
            alone = forward(model, tokens(length, seed=n)).logits[0]
            (record,) = attachment.records()
            assert record.sinks == records[n].sinks
            real = together[n][mask[n].bool()]
            torch.testing.assert_close(real, alone, rtol=0, atol=EXACT)


def test_i3_scores_do_not_depend_on_batch_order_or_way(on):
    items = [
        Item(tuple(tokens(n, seed=n).tolist()), tuple(tokens(1 + n % 3, seed=99 + n).tolist()))
        for n in range(4, 16)
    ]
    model, context = on()
    with context as attachment:
        alone = [
            score.loglikelihood
            for score in Scorer(model, attachment, batch_size=1, share=False).score(items)
        ]
        order = list(reversed(range(len(items))))
        for batch_size in (1, 5, None):
            scores = Scorer(model, attachment, batch_size=batch_size).score(
                [items[n] for n in order]
            )
            found = [scores[order.index(n)].loglikelihood for n in range(len(items))]
            assert found == pytest.approx(alone, abs=1e-9)
    with calibrated(model, None) as attachment:
        stock = [score.loglikelihood for score in Scorer(model, attachment).score(items)]
    assert stock != pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(("kind", "decode"), [("llama", "off"), ("gemma3_text", "frozen")])
def test_i4_and_i8_one_piece_is_token_by_token(on, kind, decode):
    model, context = on(kind, decode=decode)
    prompt, rest = tokens(15), tokens(7, seed=5)
    with context as attachment:
        with attachment.prompts([15]):
            whole = forward(model, torch.cat([prompt, rest])).logits[0]
            later = rest.clone()
            later[4] = (later[4] + 1) % 97
            other = forward(model, torch.cat([prompt, later])).logits[0]
        cache = forward(model, prompt, use_cache=True).past_key_values
        steps = []
        for token in rest:
            out = forward(model, token[None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), whole[15:], rtol=0, atol=EXACT)
    torch.testing.assert_close(other[:19], whole[:19], rtol=0, atol=EXACT)
    assert (other[19] - whole[19]).abs().max() > 1e-6


def test_i5_greedy_generation_is_the_argmax_of_scoring(on):
    model, context = on()
    prompts = [tokens(8), tokens(15, seed=3)]
    ids = torch.zeros(2, 15, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, prompt in enumerate(prompts):
        ids[n, 15 - len(prompt) :], mask[n, 15 - len(prompt) :] = prompt, 1
    with context as attachment:
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=6,
            eos_token_id=None, pad_token_id=0,
        )[:, 15:]  # fmt: skip
        scorer = Scorer(model, attachment)
        for prompt, answer in zip(prompts, made.tolist(), strict=True):
            assert scorer.score([Item(tuple(prompt.tolist()), tuple(answer))])[0].is_greedy


def test_i6_engines_agree_with_the_reference(on, member):
    outputs, records = [], []
    for engine in ec.able(member):
        model, context = on("gemma3_text", engine=engine)
        with context as attachment, attachment.prompts([14]):
            outputs.append(forward(model, tokens(22)).logits)
            records.append(attachment.records()[0])
    for output, record in zip(outputs[1:], records[1:], strict=True):
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=EXACT)
        assert records[0].sinks == record.sinks
        assert record.moved == pytest.approx(records[0].moved, abs=1e-9)


# -- I2 on maps ------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.builds(
            Calibration,
            target=st.just("both"),
            mass=st.just("reweight"),
            gamma=st.floats(0.05, 20.0),
            gamma_initial=st.floats(0.05, 20.0),
            alpha=st.floats(1.0, 6.0),
            protect=st.sampled_from(["initial", "first-flagged", "none"]),
        ),
        st.builds(Calibration, mass=st.just("raise"), psi=st.floats(0.01, 0.99)),
        st.builds(
            Calibration, target=st.just("initial"), mass=st.just("raise"), psi=st.floats(0.01, 0.99)
        ),
    ),
    st.integers(0, 10**6),
    st.integers(1, 24),
    st.floats(0.1, 8.0),
)
def test_i2_rows_stay_distributions_and_ratios_outside_the_target(calibration, seed, rows, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2, rows, rows, generator=generator, dtype=torch.float64) * spread
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    maps = torch.softmax(logits.masked_fill(~causal, -torch.inf), dim=-1)
    changed = calibrate_weights(maps, calibration=calibration)
    assert (changed >= 0).all()
    assert (changed[..., ~causal] == 0).all()
    torch.testing.assert_close(changed.sum(-1), maps.sum(-1), rtol=0, atol=1e-9)
    sinks, _ = find_sinks(
        maps.sum(2),
        causal.sum(0).expand(2, 1, rows),
        most=torch.full((2, 1, 1), rows),
        first=torch.zeros(2, 1, 1, dtype=torch.long),
        calibration=calibration,
    )
    off = ~sinks[:, :, None] & causal
    share = changed * off / (changed * off).sum(-1, keepdim=True).clamp(min=1e-300)
    before = maps * off / (maps * off).sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(share, before, rtol=0, atol=1e-9)
    if calibration.mass == "raise":
        mass, new = ((x * sinks[:, :, None]).sum(-1) for x in (maps, changed))
        assert (new >= mass - 1e-12).all()
        low = (mass > 0) & (mass < calibration.psi)
        assert (new[low] <= calibration.psi + 1e-12).all()


# -- what a forward must be told -------------------------------------------------------------------


def test_a_decoder_that_is_given_embeddings_cannot_draw_columns(tiny, make_artifact):
    model = tiny()
    artifact = make_artifact(model, calibration=ec.MEMBERS["random-fixed"])
    embeddings = model.get_input_embeddings()(tokens(8)[None])
    with calibrated(model, artifact), pytest.raises(UnsupportedCallError, match="pass input_ids"):
        model(inputs_embeds=embeddings)


def test_spans_need_a_tokenizer(tiny, make_artifact):
    model = tiny()
    with pytest.raises(CalibrationError, match="give the tokenizer"):
        attach(model, make_artifact(model, calibration=ec.MEMBERS["span"]))


class Pieces:
    """A tokenizer with tokens of several letters."""

    words = ("Review", ":", " good", " film", "\n", "Mood:", " ", "x\ny")

    def decode(self, ids, **_):
        return "".join(self.words[one] for one in ids)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((0, 1, 2, 3, 4, 5), "..xx.."),
        ((0, 1, 2, 4, 0, 1, 3, 3, 4), "..x...xx."),  # every pair counts
        ((0, 1, 2, 7, 5), "..xx."),  # a token with text of the piece and of the marker
        ((0, 1, 4, 0, 1, 6, 4), ".....x."),  # an empty piece is none
        ((0, 1, 2, 4, 0, 1, 2), "..x...."),  # an opening marker that nothing closes
    ],
)
def test_spans_are_found_between_their_markers(ids, expected):
    found = SpanFinder(Pieces(), ("Review:", "\n"))(ids)
    assert "".join(".x"[one] for one in found) == expected


@pytest.mark.filterwarnings("error")
def test_a_prompt_without_markers_is_said_once():
    finder = SpanFinder(Pieces(), ("Review:", "\n"))
    with pytest.warns(UserWarning, match="holds nothing between the markers 'Review:'"):
        assert finder((0, 2)) == [False, False]
    assert finder((0, 2)) == [False, False]


@pytest.mark.filterwarnings("error")
def test_what_a_probe_reads_is_not_taken_for_a_prompt_without_markers(tiny, make_artifact):
    """The probe's tokens hold no markers, and the warning is said once: of the user's prompt."""
    model, tokenizer = tiny(), Letters()
    artifact = make_artifact(model, calibration=ec.MEMBERS["span"])
    on = {"tokenizer": tokenizer, "facts": artifact.model, "engine": "torch"}
    with calibrated(model, artifact, **on) as attachment:
        forward(model, torch.tensor([5, 6, 8, 7, 8]))  # < x z > ...
        assert attachment.records()[0].moved != 0
        with pytest.warns(UserWarning, match="holds nothing between the markers"):
            forward(model, torch.tensor([6, 8, 8, 6]))


def test_a_probe_of_a_span_changes_something(tiny, make_artifact, monkeypatch):
    from act_harness.attention.attachment import Attachment

    model, moved = tiny(), []
    artifact = make_artifact(model, calibration=ec.MEMBERS["span"])
    keep = Attachment.note_report

    def note(self, layer, report, prompts):
        moved.append(float(report.moved.abs().max()))
        keep(self, layer, report, prompts)

    monkeypatch.setattr(Attachment, "note_report", note)
    on = {"tokenizer": Letters(), "facts": artifact.model, "engine": "torch"}
    attach(model, artifact, **on).detach()
    assert moved
    assert min(moved) > 0
