"""One prefill per context gives what one forward per request gives, whatever is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from act_harness.attention import calibrated
from act_harness.errors import InfrastructureError, InputError
from act_harness.forwards import Forwards
from act_harness.requests import prepare
from act_harness.scoring import Item, Scorer

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


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request, tiny):
    return tiny(request.param)


@pytest.mark.parametrize("decode", ["frozen", "running", None])
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


def test_a_context_with_forty_answers_is_prefilled_once(tiny, make_artifact):
    model = tiny()
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


def test_an_empty_answer_is_certain(tiny):
    (score,) = Scorer(tiny()).score([Item((4, 5), ())])
    assert score == (0.0, True)


def test_memory_that_runs_out_halves_the_batch(tiny, make_artifact, monkeypatch):
    model = tiny()
    items = [Item((5, 6, 7 + n), (8, 9 + m)) for n in range(8) for m in range(3)]
    expected = Scorer(model).score(items)
    sizes = []
    run = Forwards._run

    def limited(self, arguments, places):
        sizes.append(len(arguments["input_ids"]))
        if len(arguments["input_ids"]) > 3:
            raise torch.OutOfMemoryError("too much")
        return run(self, arguments, places)

    monkeypatch.setattr(Forwards, "_run", limited)
    scorer = Scorer(model)
    got = scorer.score(items)
    assert max(sizes) > 3
    assert scorer.token_budget is not None
    assert [s.loglikelihood for s in got] == pytest.approx([s.loglikelihood for s in expected])

    def never(self, arguments, places):
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


def test_the_output_head_sees_scored_rows_only(tiny):
    model = tiny()
    rows = []
    model.lm_head.register_forward_hook(lambda m, args, out: rows.append(tuple(out.shape)))
    Scorer(model).score([Item((5, 6, 7, 8, 9), (3, 4)), Item((5, 6), (3,))])
    assert rows == [(1, 3, 97)]


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


# -- truncation --------------------------------------------------------------------------------


def test_truncation_is_lm_evals():
    context, answer = list(range(10)), [90, 91, 92]
    kept = prepare([(context, answer)], max_length=8, overlength="truncate")
    # lm-eval: inp = (context + answer)[-(max_length + 1):][:-1]
    (item,) = kept.items
    assert [*item.context, *item.answer] == (context + answer)[-9:]
    assert kept.truncated == [tuple(context)]
    assert prepare([(context, answer)], max_length=12, overlength="error").truncated == []


def test_overlong_requests_can_be_refused_or_skipped():
    request = (list(range(10)), [90, 91, 92])
    with pytest.raises(InputError, match=r"10 \+ 3 tokens, the model takes 8"):
        prepare([request], max_length=8, overlength="error")
    skipped = prepare([request, ([1], [2])], max_length=8, overlength="skip")
    assert skipped.items == [None, Item((1,), (2,))]
    assert len(skipped.skipped) == 1
    long_answer = prepare([([1], list(range(20)))], max_length=8, overlength="truncate")
    assert long_answer.items == [None]
