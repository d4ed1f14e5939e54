"""Exact match and F1 for the two SQuAD tasks, computed here and without a network.

The definitions are those of the official evaluation scripts of SQuAD 1.1 (Rajpurkar et al.,
EMNLP 2016) and 2.0 (Rajpurkar, Jia and Liang, ACL 2018), on a scale from 0 to 1:

* An answer is normalised: lower case, no ASCII punctuation, no articles, single spaces.
* Exact match is 1 when the normalised strings are equal. F1 is that of the two bags of words.
* Of several references the best one counts, for either metric by itself.
* An unanswerable question (2.0) has the empty reference, which only an empty answer matches.

What is ours: the model says that it abstains with a phrase (:data:`ABSTENTION`), as the prompt
asks it to, and an answer that is this phrase counts as empty. The no-answer probability
threshold of the official 2.0 script is not computed: a generated answer has none.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = [
    "ABSTENTION",
    "best",
    "exact_match",
    "f1",
    "f1_or_empty",
    "first_answer",
    "first_answer_or_abstention",
    "normalise",
    "score_v1",
    "score_v2",
]

ABSTENTION = "Not in background"

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Return ``answer`` without what does not count: case, punctuation, articles, white space."""
    return " ".join(_ARTICLE.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 if both answers are the same once normalised, else 0.0."""
    return float(normalise(prediction) == normalise(reference))


def f1(prediction: str, reference: str) -> float:
    """Return the F1 of the two answers' bags of words; 0.0 if they share none (SQuAD 1.1)."""
    predicted, wanted = normalise(prediction).split(), normalise(reference).split()
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    # 2 p r / (p + r) with p = shared / predicted and r = shared / wanted
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def f1_or_empty(prediction: str, reference: str) -> float:
    """Return :func:`f1`, but 1.0 if both answers are empty once normalised (SQuAD 2.0)."""
    both_empty = not normalise(prediction) and not normalise(reference)
    return 1.0 if both_empty else f1(prediction, reference)


def best(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """Return the largest value of ``metric`` over ``references`` (at least one)."""
    return max(metric(prediction, reference) for reference in references)


def score_v1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one SQuAD 1.1 answer. lm-eval calls this with the row and the generated text."""
    references = doc["answers"]["text"]
    return {
        "exact_match": best(exact_match, results[0], references),
        "f1": best(f1, results[0], references),
    }


def score_v2(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one SQuAD 2.0 answer, also under the kind of its question.

    A row counts towards ``HasAns_*`` or ``NoAns_*``, never both, so either mean is over its own
    rows only.
    """
    prediction = results[0]
    if normalise(prediction) == normalise(ABSTENTION):
        prediction = ""
    given = doc["answers"]["text"]
    references = [text for text in given if normalise(text)] or [""]
    scores = {
        "exact_match": best(exact_match, prediction, references),
        "f1": best(f1_or_empty, prediction, references),
    }
    kind = "HasAns" if given else "NoAns"
    return scores | {f"{kind}_{name}": value for name, value in scores.items()}


def first_answer(doc: Mapping[str, Any]) -> str:
    """Return the answer that a few-shot example shows (SQuAD 1.1)."""
    return str(doc["answers"]["text"][0])


def first_answer_or_abstention(doc: Mapping[str, Any]) -> str:
    """Return the answer that a few-shot example shows (SQuAD 2.0)."""
    return first_answer(doc) if doc["answers"]["text"] else ABSTENTION
