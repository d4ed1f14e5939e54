"""Finding the heads whose calibration helps: exact, fast, resumable, statistically honest.

``recipe`` says what to search for; ``command`` goes from the command line to a recipe, its
documents and ``run``, which goes from there to an artifact. ``compute`` measures heads, ``choose``
turns measurements into a head set and says what that is worth; README.md has every file.

A name is imported when it is asked for, so that a recipe can be read without torch. Only
``splits`` needs lm-eval, and only when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from act_harness import lazy_attributes

__all__ = [
    "Recipe",
    "SearchResult",
    "SearchSettings",
    "load_recipe",
    "run_search",
    "search_documents",
    "search_from_settings",
]

_HOMES = {
    "Recipe": "act_harness.search.recipe",
    "SearchResult": "act_harness.search.run",
    "SearchSettings": "act_harness.search.command",
    "load_recipe": "act_harness.search.recipe",
    "run_search": "act_harness.search.run",
    "search_documents": "act_harness.search.command",
    "search_from_settings": "act_harness.search.command",
}

if TYPE_CHECKING:
    from act_harness.search.command import SearchSettings, search_documents, search_from_settings
    from act_harness.search.recipe import Recipe, load_recipe
    from act_harness.search.run import SearchResult, run_search

__getattr__ = lazy_attributes(__name__, _HOMES)
