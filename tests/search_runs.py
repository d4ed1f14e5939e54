"""A whole search of a tiny model on random questions, as several tests run it."""

from __future__ import annotations

from tiny_search import drawn, tiny

from act_harness.search.recipe import make_recipe
from act_harness.search.run import run_search

DRAWN = [drawn("a", 5), drawn("b", 6)]


def recipe(**changes):
    return make_recipe(
        {
            "name": "tiny",
            "tasks": ["a", "b"],
            "samples": 8,
            "verify_samples": 8,
            "calibration": {"alpha": 2.0},
            "chunk_tokens": 100,
            "top": {"sizes": [1, 2, 4]},
            "controls": {"random_sets": 2},
            **changes,
        }
    )


def search(tmp_path, given=None, **options):
    return run_search(
        given or recipe(),
        model=options.pop("model", None) or tiny(),
        documents=options.pop("documents", DRAWN),
        ledgers=tmp_path / "ledgers",
        output=tmp_path / "out.json",
        show_progress=False,
        **options,
    )
