"""The SQuAD metrics against their definition, published examples and answers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import lm_eval
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import LM
from task_rows import SQUAD, hand_made, manager

ABSTAINS = "Not in background"


def row(*references: str) -> dict[str, Any]:
    return {"answers": {"text": list(references), "answer_start": [0] * len(references)}}


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Warsaw Citadel.", "warsaw citadel"),
        ("  a\tcat,\n an  owl ", "cat owl"),
        ("U.S.", "us"),
        ("well-known", "wellknown"),  # punctuation goes without leaving a space
        ("theatre and another anthem", "theatre and another anthem"),  # articles are whole words
        ("the the", ""),
        ("A", ""),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes
        ("the\u2013end", "\u2013end"),  # an article beside a dash that stays is still an article
        ("Beyoncé", "beyoncé"),
        ("$1,804", "1804"),
        ("", ""),
    ],
)
def test_normalise(answer: str, normal: str) -> None:
    assert SQUAD.normalise(answer) == normal


# The examples of the metric cards `squad` and `squad_v2` of the library `evaluate` (HuggingFace),
# which wrap the official scripts: prediction, reference, exact match, F1.
PUBLISHED = [
    ("1976", "1976", 1.0, 1.0),
    ("1999", "1976", 0.0, 0.0),
    ("Beyonce", "Beyoncé and Bruno Mars", 0.0, 0.0),
    ("climate change", "climate change", 1.0, 1.0),
]


@pytest.mark.parametrize(("prediction", "reference", "exact", "f1"), PUBLISHED)
def test_published_examples(prediction: str, reference: str, exact: float, f1: float) -> None:
    assert SQUAD.score_v1(row(reference), [prediction]) == {"exact_match": exact, "f1": f1}
    assert SQUAD.score_v2(row(reference), [prediction]) == {
        "exact_match": exact,
        "f1": f1,
        "HasAns_exact_match": exact,
        "HasAns_f1": f1,
    }


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        # shared / predicted = 2/3, shared / wanted = 2/2, F1 = 2 * (2/3) / (5/3) = 4/5
        ("in Warsaw Citadel", "the Warsaw Citadel", 4 / 5),
        # 1/4 and 1/1: 2 * (1/4) / (5/4) = 2/5
        ("it was dug 1804", "1804", 2 / 5),
        # words count as often as they occur: 2 shared of 3 and of 2
        ("ha ha ha", "ha ha", 4 / 5),
        # 1/1 and 1/3: 2 * (1/3) / (4/3) = 1/2
        ("oil", "whale oil lamps", 1 / 2),
        # order does not count for F1, but it does for exact match
        ("oil whale", "whale oil", 1.0),
    ],
)
def test_f1_by_hand(prediction: str, reference: str, f1: float) -> None:
    scores = SQUAD.score_v1(row(reference), [prediction])
    assert scores == {"exact_match": 0.0, "f1": pytest.approx(f1)}


def test_each_metric_takes_its_best_reference() -> None:
    scores = SQUAD.score_v1(row("Ostrey", "in the harbour of Ostrey"), ["the harbour of Ostrey"])
    assert scores["exact_match"] == 0.0
    assert scores["f1"] == pytest.approx(2 * 3 / (3 + 4))  # the second one
    assert SQUAD.score_v1(row("x", "1804", "y"), ["1804."]) == {"exact_match": 1.0, "f1": 1.0}


def test_answers_without_any_word() -> None:
    # The two official scripts differ here: 1.1 finds no shared word, 2.0 finds both empty.
    assert SQUAD.score_v1(row("A"), ["the"]) == {"exact_match": 1.0, "f1": 0.0}
    assert SQUAD.score_v2(row("A"), ["the"])["HasAns_f1"] == 1.0
    assert SQUAD.score_v2(row("A", "grade A plus"), ["grade plus"])["HasAns_f1"] == 1.0
    assert SQUAD.score_v2(row("A", "grade A plus"), [""])["HasAns_f1"] == 0.0  # "A" is left out


@pytest.mark.parametrize("answer", ["", "  ", ABSTAINS, " not in BACKGROUND.", "The", "."])
def test_no_answer_is_right_where_there_is_none(answer: str) -> None:
    ones = {"exact_match": 1.0, "f1": 1.0}
    assert SQUAD.score_v2(row(), [answer]) == {
        **ones,
        **{f"NoAns_{name}": value for name, value in ones.items()},
    }


@pytest.mark.parametrize("answer", ["1804", "It is not in background", "Not in the text"])
def test_an_answer_is_wrong_where_there_is_none(answer: str) -> None:
    assert set(SQUAD.score_v2(row(), [answer]).values()) == {0.0}


@pytest.mark.parametrize("answer", ["", ABSTAINS])
def test_no_answer_is_wrong_where_there_is_one(answer: str) -> None:
    scores = SQUAD.score_v2(row("the background", "1804"), [answer])
    assert scores == dict.fromkeys(("exact_match", "f1", "HasAns_exact_match", "HasAns_f1"), 0.0)


def test_few_shot_answers() -> None:
    assert SQUAD.first_answer(row("1804", "in 1804")) == "1804"
    assert SQUAD.first_answer_or_abstention(row("1804")) == "1804"
    assert SQUAD.first_answer_or_abstention(row()) == ABSTAINS


WORDS = st.lists(st.sampled_from(["a", "the", "Cat", "cat.", "sat", "mat", "—", "!"]), max_size=6)


@given(WORDS, WORDS)
def test_f1_is_the_harmonic_mean(prediction: list[str], reference: list[str]) -> None:
    one, two = " ".join(prediction), " ".join(reference)
    mine, theirs = SQUAD.normalise(one).split(), SQUAD.normalise(two).split()
    shared = sum(min(mine.count(word), theirs.count(word)) for word in set(mine))
    f1 = SQUAD.f1(one, two)
    if shared == 0:
        assert f1 == 0.0
    else:
        precision, recall = shared / len(mine), shared / len(theirs)
        assert math.isclose(f1, 2 * precision * recall / (precision + recall))
    assert f1 == SQUAD.f1(two, one)
    assert SQUAD.exact_match(one, two) <= SQUAD.f1_or_empty(one, two) <= 1.0


class Parrot(LM):
    """Gives the answers it was told, by question."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        assert all(request.args[1]["until"] == ["\n"] for request in requests)
        return [self.answers[request.doc["question"]] for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


def test_the_two_kinds_of_questions_are_averaged_apart() -> None:
    answers = {
        "When was the harbour dug?": " 1804",  # exact
        "What do the lamps burn?": " oil",  # F1 of 2 * 1 / (1 + 2)
        "Who owns the harbour?": " " + ABSTAINS,  # has no answer
    }
    with hand_made():
        results = lm_eval.simple_evaluate(
            model=Parrot(answers), tasks=["act_qa"], task_manager=manager(), log_samples=False
        )["results"]
    two = results["act_squad_v2"]
    assert two["HasAns_exact_match,none"] == pytest.approx(1 / 2)
    assert two["HasAns_f1,none"] == pytest.approx((1 + 2 / 3) / 2)
    assert two["NoAns_exact_match,none"] == two["NoAns_f1,none"] == 1.0
    assert two["exact_match,none"] == pytest.approx(2 / 3)
    assert two["f1,none"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    one = results["act_squad_v1"]
    assert one["f1,none"] == pytest.approx((1 + 2 / 3) / 2)
    group = results["act_qa"]
    assert group["f1,none"] == pytest.approx((one["f1,none"] + two["f1,none"]) / 2)
    assert isinstance(two["HasAns_f1_stderr,none"], float)


def test_no_metric_is_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = pytest.importorskip("evaluate")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a metric was asked for by name")

    monkeypatch.setattr(evaluate, "load", refuse)
    with hand_made():
        lm_eval.simple_evaluate(
            model=Parrot(dict.fromkeys(["When was the harbour dug?"], "1804")),
            tasks=["act_squad_v1"],
            task_manager=manager(),
            limit=1,
            log_samples=False,
        )
