"""Each context computed once gives what one forward per request gives, whatever is asked for."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from act_harness.attention import calibrated
from act_harness.attention.capabilities import Answer, capabilities_of
from act_harness.attention.packing import Packing
from act_harness.errors import InfrastructureError, InputError, InternalError
from act_harness.scoring import logits
from act_harness.scoring.forwards import Forwards
from act_harness.scoring.scorer import Item, Scorer
from act_harness.scoring.trials import extends, packs
from act_harness.scoring.truncation import prepare

TOKEN = st.integers(3, 60)
CONTEXTS = st.lists(st.lists(TOKEN, min_size=1, max_size=14).map(tuple), min_size=1, max_size=4)
ANSWERS = st.lists(st.lists(TOKEN, max_size=7).map(tuple), min_size=1, max_size=8)


@st.composite
def requests(draw):
    """Few contexts with answers that repeat, extend each other and differ in length."""
    items = []
    for context in draw(CONTEXTS):
        answers = draw(ANSWERS)
        answers += [answer[:2] for answer in answers]  # prefixes of others, and duplicates
        items += [Item(context, answer) for answer in answers]
    items += [Item(items[0].context, items[0].answer, prompt=0)]
    return draw(st.permutations(items))


@pytest.fixture(scope="module", params=["llama", "llama over a cache", "mistral"])
def model(request, tiny):
    """Models whose requests are packed into one row, or extend a cache (with a window or not)."""
    name, _, cached = request.param.partition(" ")
    made = tiny(name)
    if cached:
        unpackable(made)
    assert packs(Forwards(made)).value is (request.param == "llama")
    return made


def unpackable(model):
    capabilities_of(model).packs = Answer(False, "so the test says")


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["frozen", "running", "off", None])
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests(), st.sampled_from([1, 2, 5, None]), st.sampled_from([None, 20, 64]))
def test_sharing_is_exact(model, make_artifact, decode, items, batch_size, budget):
    artifact = None if decode is None else make_artifact(model, decode=decode)
    with calibrated(model, artifact) as attachment:
        plain = Scorer(model, attachment, batch_size=1, share=False).score(items)
        scorer = Scorer(model, attachment, batch_size=batch_size, token_budget=budget)
        shared = scorer.score(items)
    for a, b in zip(plain, shared, strict=True):
        assert b.loglikelihood == pytest.approx(a.loglikelihood, abs=1e-5)
        assert b.is_greedy == a.is_greedy
    contexts = {(item.context, item.prompt) for item in items}
    assert scorer.work.forwards <= 2 * len(contexts) + len(items)
    if packs(scorer.forwards).value and batch_size is None and budget is None:
        assert scorer.work.forwards == 1
        assert scorer.work.padded_tokens == scorer.work.tokens


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_answers_in_one_row_or_in_rows_of_their_own(tiny, make_artifact, monkeypatch, device):
    """The CPU puts a context's answers into one row of queries, other devices do not."""
    model = tiny()
    monkeypatch.setattr(Forwards, "_joins_answers", property(lambda self: device == "cpu"))
    contexts = [(5, 9, 14, 22, 7, 31), (8, 3, 4), (6, 7)]
    items = [Item(c, (3 + n, 40, 50 - n)[:size]) for c in contexts for n, size in enumerate((3, 2))]
    items = [item for item in items if item.context != (8, 3, 4)] + [Item((8, 3, 4), (4, 4))]
    with calibrated(model, make_artifact(model)) as attachment:
        expected = Scorer(model, attachment, batch_size=1, share=False).score(items)
        scorer = Scorer(model, attachment)
        seen = []
        attend = Packing.attend
        monkeypatch.setattr(
            Packing, "attend", lambda self, *a, **k: seen.append(self) or attend(self, *a, **k)
        )
        got = scorer.score(items)
    assert scorer.work.forwards == 1
    assert {rows.lengths for rows in seen[-1].answers} == (
        {(2, 1)} if device == "cpu" else {(2,), (1,)}
    )
    assert [s.loglikelihood for s in got] == pytest.approx([s.loglikelihood for s in expected])


def test_a_model_that_mixes_neighbours_is_not_packed(tiny, caplog):
    """A layer that looks at the previous position would see another sequence's last token."""
    model = tiny()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, -1)))
    with caplog.at_level("INFO"):
        assert not packs(Forwards(model)).value
    assert "packed logits differ" in caplog.text
    items = [Item((5, 6, 7), (8, 9)), Item((5, 6, 7), (9, 8)), Item((4,), (3, 3))]
    expected = Scorer(model, batch_size=1, share=False).score(items)
    assert [s.loglikelihood for s in Scorer(model).score(items)[2:]] == pytest.approx(
        [s.loglikelihood for s in expected[2:]]
    )


def test_a_context_with_forty_answers_is_prefilled_once(tiny, make_artifact):
    model = tiny()
    items = [Item((5, 9, 14, 22, 7, 31), (3 + n, 40, 50 - n)) for n in range(40)]
    with calibrated(model, make_artifact(model)) as attachment:
        expected = Scorer(model, attachment, batch_size=1, share=False).score(items)
        scorer = Scorer(model, attachment, batch_size=16)
        got = scorer.score(items)
        assert scorer.work.forwards == 1
        assert scorer.work.tokens == scorer.work.padded_tokens == 6 + 40 * 2
        small = Scorer(model, attachment, batch_size=1)  # not enough room for all of them
        again = small.score(items)
        assert small.work.forwards > 2
        assert small.work.tokens == 6 + 40 * 2
    assert [s.loglikelihood for s in got] == pytest.approx([s.loglikelihood for s in expected])
    assert [s.loglikelihood for s in again] == pytest.approx([s.loglikelihood for s in expected])


def test_a_cache_is_repeated_for_as_many_answers_as_stock_memory_allows(tiny, make_artifact):
    model = tiny()
    unpackable(model)
    items = [Item((5, 9, 14, 22, 7, 31), (3 + n, 40, 50 - n)) for n in range(40)]
    with calibrated(model, make_artifact(model)) as attachment:
        plain = Scorer(model, attachment, batch_size=1, share=False)
        expected = plain.score(items)
        shared = Scorer(model, attachment, batch_size=16)
        got = shared.score(items)
    assert [s.loglikelihood for s in got] == pytest.approx([s.loglikelihood for s in expected])
    assert plain.work.forwards == 40
    # one prefill; 2 x 97 logits a token of stock against 2 x 3 layers x 2 heads x 8 of a cache:
    # twice as many answers as sequences fit, so 40 answers go in batches of 32
    assert shared.work.forwards == 1 + 2
    assert shared.work.tokens == 6 + 40 * 2
    assert plain.work.tokens == 40 * (6 + 2)


def test_single_token_answers_need_no_second_pass(tiny):
    model = tiny()
    items = [Item((4, 5, 6, 7), (n,)) for n in range(3, 40)] + [Item((4, 5), (n,)) for n in (3, 9)]
    scorer = Scorer(model)
    scores = scorer.score(items)
    assert scorer.work.forwards == 1
    assert scorer.work.scored_rows == 2
    assert sum(2.718281828**s.loglikelihood for s in scores[:37]) < 1


def test_scores_are_those_of_a_full_forward(tiny):
    model = tiny()
    context, answer = (4, 8, 15, 16), (23, 42, 11)
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0]
    logprobs = torch.log_softmax(logits, dim=-1)
    want = sum(logprobs[3 + n, token].item() for n, token in enumerate(answer))
    (score,) = Scorer(model).score([Item(context, answer)])
    assert score.loglikelihood == pytest.approx(want, abs=1e-5)
    best = tuple(logits[3:4].argmax(-1).tolist())
    assert Scorer(model).score([Item(context, best)])[0].is_greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (5, 6)), "context has no token"),
        (((), ()), "context has no token"),
        (((4,), (5,), 2), "expected 0 to 1"),
        (((4,), (5,), -1), "expected 0 to 1"),
    ],
)
def test_a_request_has_a_token_of_context(arguments, message):
    with pytest.raises(InputError, match=message):
        Item(*arguments)


@pytest.mark.parametrize("sequences", [[(4, 5), ()], [(4, 5), (6,)]])
@pytest.mark.parametrize("rows", [range(-1, 1), range(2)])
def test_no_row_is_read_outside_its_sequence(tiny, sequences, rows):
    made = Forwards(tiny())
    wanted = [range(1), rows]
    with pytest.raises(InternalError, match="of a sequence of"):
        made.prefill(sequences, wanted, prompts=[2, 1], use_cache=False)
    with pytest.raises(InternalError, match="of a sequence of"):
        made.pack(sequences, wanted, prompts=[2, 1], answers=[])


def test_an_empty_answer_is_certain(tiny):
    (score,) = Scorer(tiny()).score([Item((4, 5), ())])
    assert score == (0.0, True)


def test_memory_that_runs_out_sends_no_group_over_a_cache_that_cannot_be_extended(
    tiny, monkeypatch
):
    """Groups that were to be packed and no longer fit come apart, also those that still waited."""
    model = tiny()
    items = [Item((5, 6, 7 + n), (8, 9 + m)) for n in range(8) for m in range(3)]
    expected = Scorer(model).score(items)
    capabilities_of(model).extends = Answer(None, "so the test says")
    monkeypatch.setattr(Forwards, "extend", lambda *_: pytest.fail("its cache was extended"))
    run = Forwards._run

    def limited(self, arguments, places, *, bare):
        if arguments["input_ids"].numel() > 5:
            raise torch.OutOfMemoryError("too much")
        return run(self, arguments, places, bare=bare)

    monkeypatch.setattr(Forwards, "_run", limited)
    found = Scorer(model).score(items)
    assert [s.loglikelihood for s in found] == pytest.approx([s.loglikelihood for s in expected])


@pytest.mark.parametrize(("cached", "limit"), [(False, 14), (False, 4), (True, 9)])
def test_memory_that_runs_out_halves_the_batch(tiny, monkeypatch, cached, limit):
    """Down to a single context, and where even that is too much, to its answers over a cache."""
    model = tiny()
    if cached:
        unpackable(model)
    items = [Item((5, 6, 7 + n), (8, 9 + m)) for n in range(8) for m in range(3)]
    expected = Scorer(model).score(items)
    assert extends(Forwards(model)).value  # tried before memory is short
    sizes = []
    run = Forwards._run

    def limited(self, arguments, places, *, bare):
        size = arguments["input_ids"].numel()
        sizes.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("too much")
        return run(self, arguments, places, bare=bare)

    monkeypatch.setattr(Forwards, "_run", limited)
    scorer = Scorer(model)
    got = scorer.score(items)
    assert max(sizes) > limit
    assert scorer.token_budget is not None
    assert [s.loglikelihood for s in got] == pytest.approx([s.loglikelihood for s in expected])

    def never(self, arguments, places, *, bare):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(Forwards, "_run", never)
    with pytest.raises(InfrastructureError, match="out of memory for one context of 3 tokens"):
        Scorer(model).score(items)


def test_progress_counts_every_request_once(tiny):
    items = [Item((5, 6, n), (7, m)) for n in range(3, 9) for m in (3, 4, 4)]
    done = []
    Scorer(tiny(), batch_size=2).score(items, progress=done.append)
    assert sum(done) == len(items)
    assert len(done) > 1


@pytest.mark.parametrize("piece", [3, 1000])
def test_the_output_head_sees_scored_rows_only_and_few_at_a_time(tiny, monkeypatch, piece):
    model = tiny()
    items = [Item((5, 6, 7, 8, 9), (3, 4)), Item((5, 6, 7, 8, 9), (4, 3)), Item((5, 6), (3,))]
    scorer = Scorer(model)
    expected = scorer.score(items)
    monkeypatch.setattr(logits, "_PIECE_BYTES", piece * 97 * 4)
    rows = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(tuple(out.shape)))
    got = scorer.score(items)
    # the model's own call is left one row; the four wanted ones come afterwards, in pieces
    assert rows == [(1, 1, 97)] + ([(1, 3, 97), (1, 1, 97)] if piece == 3 else [(1, 4, 97)])
    assert [s.loglikelihood for s in got] == pytest.approx([s.loglikelihood for s in expected])


def test_logits_that_are_changed_after_the_head_are_kept(tiny):
    """Gemma 2 caps its logits: the head alone would not do."""
    model = tiny("gemma2")
    assert not Forwards(model)._bare_head
    model.config.final_logit_softcapping = 0.1
    context, answer = (4, 8, 15, 16), (23, 42, 11)
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0]
    assert logits.abs().max() < 0.1
    logprobs = torch.log_softmax(logits, dim=-1)
    want = sum(logprobs[3 + n, token].item() for n, token in enumerate(answer))
    (score,) = Scorer(model).score([Item(context, answer)])
    assert score.loglikelihood == pytest.approx(want, abs=1e-5)


def test_log_softmax_is_float32_whatever_the_model(tiny):
    model = tiny(dtype=torch.bfloat16)
    context, answer = (4, 8, 15, 16), (23, 42, 11)
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0]
    fine = torch.log_softmax(logits.double(), dim=-1)
    want = sum(fine[3 + n, token].item() for n, token in enumerate(answer))
    assert Scorer(model).score([Item(context, answer)])[0].loglikelihood == pytest.approx(
        want, abs=2e-5
    )


# -- models that are not like Llama --------------------------------------------------------------


def whatever(architecture, **settings):
    """Return a random small model of a transformers class, in float64."""
    config = getattr(transformers, f"{architecture}Config")(**settings)
    torch.manual_seed(1)
    kind = getattr(transformers, f"{architecture}ForCausalLM")
    model = kind(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
OTHERS = {
    # a window that the configuration calls window_size, shorter than the contexts
    "GPTNeo": {"vocab_size": 97, "hidden_size": 32, "num_heads": 4, "num_layers": 2,
               "attention_types": [[["global", "local"], 1]], "window_size": 8,
               "intermediate_size": 64, "max_position_embeddings": 128},
    # positions from the place of a key (ALiBi), no attention interface
    "Mpt": {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_head": 4, "n_layer": 2},
    # a cache that cannot be repeated by index
    "Lfm2": {**SMALL, "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64,
             "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("architecture", list(OTHERS))
def test_baselines_of_other_architectures(architecture):
    """Contexts of different lengths in one batch, several answers: as one forward a request."""
    model = whatever(architecture, **OTHERS[architecture])
    contexts = [tuple(range(3, 3 + size)) for size in (30, 17, 4, 1)]
    items = [
        Item(c, (40 + n, 50 - n, 30)[:size]) for c in contexts for n, size in enumerate((3, 2, 1))
    ]
    expected = Scorer(model, batch_size=1, share=False).score(items)
    for batch_size in (8, 2, None):
        found = Scorer(model, batch_size=batch_size).score(items)
        assert [s.loglikelihood for s in found] == pytest.approx(
            [s.loglikelihood for s in expected], abs=1e-6
        )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("cached", [False, True])
def test_rotary_frequencies_that_follow_the_longest_position(tiny, kind, cached):
    """A request beyond the original length is alone in its forward, and leaves no trace."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    if kind == "dynamic":
        rope["factor"] = 4.0
    else:
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    model = tiny(rope_parameters=rope, max_position_embeddings=16 if kind == "dynamic" else 64)
    assert capabilities_of(model).rope_limit.value == 16
    if cached:
        unpackable(model)
    contexts = [tuple(range(3, 3 + size)) for size in (30, 15, 12, 22)]
    items = [Item(c, answer) for c in contexts for answer in ((40, 41, 42), (50, 51), (60,))]

    def alone(item):
        model(torch.tensor([[3]]))  # forgets the frequencies of longer sequences
        return Scorer(model, batch_size=1, share=False).score([item])[0].loglikelihood

    with torch.no_grad():
        expected = [alone(item) for item in items]
    for order in (list(range(len(items))), list(range(len(items)))[::-1]):
        found = Scorer(model, batch_size=8).score([items[n] for n in order])
        assert [s.loglikelihood for s in found] == pytest.approx([expected[n] for n in order])


def test_windows_of_a_rolling_text_are_not_laid_side_by_side(tiny):
    """They share a first token and nothing else: one row of them all would be quadratic."""
    model = tiny()
    items = [Item((5,), tuple(range(3 + n, 43 + n)), prompt=0) for n in range(12)]
    expected = Scorer(model, batch_size=1, share=False).score(items)
    seen = []
    forward = Packing._extension
    scorer = Scorer(model, batch_size=4)
    assert packs(scorer.forwards).value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packing, "_extension", lambda self, d: seen.append(self) or forward(self, d))
        found = scorer.score(items)
    assert not seen
    assert scorer.work.forwards == 3
    assert [s.loglikelihood for s in found] == pytest.approx([s.loglikelihood for s in expected])


def test_many_answers_of_a_short_context_share_rows_of_bounded_length(tiny):
    model = tiny()
    items = [Item((5, 6), tuple(range(3 + n, 33 + n))) for n in range(20)]
    scorer = Scorer(model)
    rows = list(scorer.forwards._rows_of([(0, item.answer[:-1]) for item in items], [2]))
    assert {sum(row.lengths) for row in rows} == {58}
    expected = Scorer(model, batch_size=1, share=False).score(items)
    assert [s.loglikelihood for s in scorer.score(items)] == pytest.approx(
        [s.loglikelihood for s in expected]
    )


def test_attention_pads_no_more_than_it_holds(tiny):
    """One long context among short ones is not what the others are padded to."""
    model = tiny(max_position_embeddings=4096)
    items = [Item(tuple(range(3, 90)) * 20, (5,)), *(Item((4, 5, n), (6,)) for n in range(3, 80))]
    scorer = Scorer(model, token_budget=4096)
    scorer.score(items)
    assert scorer.work.forwards == 2


def test_memory_that_runs_out_in_a_trial_says_nothing_about_the_model(tiny, monkeypatch):
    model = tiny()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            packs(Forwards(model))
    assert packs(Forwards(model)).value


# -- truncation --------------------------------------------------------------------------------


def test_truncation_is_lm_evals():
    context, answer = list(range(10)), [90, 91, 92]
    kept = prepare([(context, answer)], max_length=8, overlength="truncate")
    # lm-eval: inp = (context + answer)[-(max_length + 1):][:-1]
    (item,) = kept.items
    assert [*item.context, *item.answer] == (context + answer)[-9:]
    assert kept.truncated == [tuple(context)]
    assert prepare([(context, answer)], max_length=12, overlength="error").truncated == []


def test_an_empty_answer_leaves_a_context_that_fits():
    (item,) = prepare([(range(10), ())], max_length=8, overlength="truncate").items
    assert item == Item(tuple(range(2, 10)), ())


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="max_length=0"):
        prepare([((1,), (2,))], max_length=0, overlength="truncate")
    for setting in ({"batch_size": 0}, {"batch_size": -4}, {"token_budget": 0}):
        with pytest.raises(InputError, match="expected a number above 0"):
            Scorer(None, **setting)


def test_overlong_requests_can_be_refused_or_skipped():
    request = (list(range(10)), [90, 91, 92])
    with pytest.raises(InputError, match=r"10 \+ 3 tokens, the model takes 8"):
        prepare([request], max_length=8, overlength="error")
    skipped = prepare([request, ([1], [2])], max_length=8, overlength="skip")
    assert skipped.items == [None, Item((1,), (2,))]
    assert len(skipped.skipped) == 1
    long_answer = prepare([([1], list(range(20)))], max_length=8, overlength="truncate")
    assert long_answer.items == [None]
