"""Documents for the demo tasks, built at run time from the VADER sentiment lexicon.

Not part of the paper. The rows come from the word list inside the package ``vaderSentiment``
(MIT licence; Hutto and Gilbert, ICWSM 2014), where ten people rated every word from -4 to 4.
Adjectives on whose side the raters agree are set into short sentences of our own. Nothing is
drawn at random: the same package version always gives the same documents, and no adjective of
the train split occurs in the test split.

The scores mean nothing beyond this project: they show that a pipeline works, with no network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import datasets

from act_harness.errors import InfrastructureError

__all__ = ["PACKAGE", "sentiment", "word"]

PACKAGE = "vaderSentiment==3.3.2"

# Endings that make a word an adjective often enough to fit behind "was"; they also keep the
# list's insults, which are mostly nouns, out of a demonstration.
_ADJECTIVE = re.compile(r"[a-z]{3,12}(ful|less|ous|able|ible|ive|ic)")
_STRAY = frozenset(
    {"deceive", "deprive", "critic", "sceptic", "idiotic", "moronic", "positivistic", "benefic"}
)
_CLEAR = 1.5  # the least mean rating, on the scale from -4 to 4, that counts as clear
_AGREED = 1.0  # the largest standard deviation between the ten raters
_PER_SIDE = 100  # documents of either side in a split

_TOPICS = ("hotel", "film", "tour", "book", "lesson", "concert", "visit")
_EXPECTED = (
    "We expected the {topic} to be {other}, but it was {own}.",
    "They say that the {topic} is {other}. For us it was {own}.",
    "The {topic} was {own}, although the advertisement had called it {other}.",
)
_KNOWN = ("The {topic} was bad, terrible and", "The {topic} was good, wonderful and")


class _Word(NamedTuple):
    text: str
    positive: bool


def sentiment() -> datasets.DatasetDict:
    """Sentences with what was expected and what came; the label is the side of what came.

    Returns:
        Splits ``train`` and ``test``, 200 documents each, with ``text`` and ``label``
        (0 negative, 1 positive), half of either.

    Raises:
        InfrastructureError: the package that holds the word list is not installed.
    """
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
        }
    )
    splits = {
        split: datasets.Dataset.from_list(_sentences(words), features=features)
        for split, words in _split_words().items()
    }
    return datasets.DatasetDict(splits)


def word() -> datasets.DatasetDict:
    """Beginnings of a list of adjectives, with four to go on, of which one is of their side.

    Returns:
        Splits ``train`` and ``test``, 200 documents each, with ``text``, ``choices`` (4 words)
        and ``label``, the place of the one that fits.

    Raises:
        InfrastructureError: the package that holds the word list is not installed.
    """
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "label": datasets.Value("int64"),
        }
    )
    splits = {
        split: datasets.Dataset.from_list(_gaps(words), features=features)
        for split, words in _split_words().items()
    }
    return datasets.DatasetDict(splits)


def _sentences(words: list[_Word]) -> list[dict[str, str | int]]:
    """Return the documents of one split of :func:`sentiment`, both sides in turn."""
    sides = _sides(words)
    documents: list[dict[str, str | int]] = []
    for index in range(_PER_SIDE):
        for label, side in enumerate(sides):
            text = _EXPECTED[index % len(_EXPECTED)].format(
                topic=_TOPICS[index % len(_TOPICS)],
                own=_at(side, index),
                other=_at(sides[1 - label], 3 * index + 1),
            )
            documents.append({"text": text, "label": label})
    return documents


def _gaps(words: list[_Word]) -> list[dict[str, str | int | list[str]]]:
    """Return the documents of one split of :func:`word`, both sides in turn."""
    sides = _sides(words)
    documents: list[dict[str, str | int | list[str]]] = []
    for index in range(_PER_SIDE):
        for label, beginning in enumerate(_KNOWN):
            own, other = sides[label], sides[1 - label]
            choices = [_at(other, 3 * index + step) for step in range(3)]
            place = (index + label) % 4
            choices.insert(place, _at(own, index))
            text = beginning.format(topic=_TOPICS[index % len(_TOPICS)])
            documents.append({"text": text, "choices": choices, "label": place})
    return documents


def _at(side: list[_Word], index: int) -> str:
    return side[index % len(side)].text


def _sides(words: list[_Word]) -> tuple[list[_Word], list[_Word]]:
    """Return the negative words and the positive ones."""
    return [w for w in words if not w.positive], [w for w in words if w.positive]


def _split_words() -> dict[str, list[_Word]]:
    """Return the adjectives of each split; every second one of either side goes to ``test``."""
    splits: dict[str, list[_Word]] = {"train": [], "test": []}
    for side in _sides(_words()):
        splits["train"] += side[0::2]
        splits["test"] += side[1::2]
    return splits


def _words() -> list[_Word]:
    """Return the clear adjectives of the lexicon, in an order that only their letters decide."""
    words = []
    for line in _lexicon().read_text(encoding="utf-8").splitlines():
        text, mean, deviation, _ = line.split("\t")
        clear = abs(float(mean)) >= _CLEAR and float(deviation) < _AGREED
        if clear and text not in _STRAY and _ADJECTIVE.fullmatch(text):
            words.append(_Word(text, float(mean) > 0))
    return sorted(words, key=lambda w: hashlib.sha256(w.text.encode()).hexdigest())


def _lexicon() -> Path:
    """Return the word list inside the package, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE.partition("==")[0])
    if spec is None or spec.origin is None:
        raise InfrastructureError(
            f"the demo tasks are built from the package {PACKAGE}, which is not installed; "
            f"run: pip install '{PACKAGE}'"
        )
    return Path(spec.origin).with_name("vader_lexicon.txt")
