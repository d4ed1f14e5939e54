"""Finding the heads whose calibration helps: exact, fast, resumable, statistically honest.

``recipe`` says what to search for; ``layout`` and ``workbench`` prepare documents and model;
``exact`` measures every head, ``screen`` estimates all of them from one backward pass; ``measure``
and ``ledger`` split the work into units that survive a kill; ``effects`` and ``select`` turn
measurements into a head set, ``sets`` measures whole sets, ``judgement`` says what the chosen one
is worth on documents that chose nothing, and ``null`` holds all that to a truth that is known;
``run`` goes from recipe to artifact, ``settings`` from the command line to a recipe.

Only ``settings`` needs lm-eval, and only when it is called.
"""

from __future__ import annotations

from act_harness.search.command import SearchSettings, search_documents, search_from_settings
from act_harness.search.recipe import Recipe, load_recipe
from act_harness.search.run import SearchResult, run_search

__all__ = [
    "Recipe",
    "SearchResult",
    "SearchSettings",
    "load_recipe",
    "run_search",
    "search_documents",
    "search_from_settings",
]
