"""Two tiny tasks and a recipe on which methods are compared."""

from __future__ import annotations

import dataclasses

from tiny_search import drawn

RECIPE = {
    "name": "tiny", "tasks": ["a", "b"], "samples": 8, "verify_samples": 8,
    "calibration": {"alpha": 2.0}, "chunk_tokens": 100, "method": "gradient",
    "objective": "corrected",
    "gradient": {"epochs": 2, "batch": 4, "rate": 0.3, "sizes": [2, 5], "criterion": "margin"},
}  # fmt: skip


def with_choices(found, *, same):
    """Documents with texts of their choices, each answer of one token.

    Texts are random: what is tuned on some of them helps on those alone, so they verify too.
    """

    def of(documents):
        return tuple(
            dataclasses.replace(
                one,
                requests=tuple((context, answer[:1]) for context, answer in one.requests),
                choices=("no", "maybe", "yes") if same else (one.key[:3], f"{one.key}b", one.key),
            )
            for one in documents
        )

    return dataclasses.replace(
        found, search=of(found.search), verify=of(found.search), judge=of(found.judge)
    )


DOCUMENTS = [
    with_choices(drawn("a", 5), same=True),
    with_choices(drawn("b", 6), same=False),
]
