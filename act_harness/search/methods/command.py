"""The command ``act-harness methods``: from file names and model arguments to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from act_harness.errors import RecipeError
from act_harness.search.command import SearchSettings, load_search
from act_harness.search.methods.comparison import compare_methods
from act_harness.search.methods.registry import chosen_methods
from act_harness.search.methods.report import MethodsReport, write_report
from act_harness.support import places
from act_harness.support.checks import check_count, check_kind

__all__ = ["MethodsSettings", "methods_from_settings"]


@dataclass(frozen=True)
class MethodsSettings:
    """What the command line gives."""

    search: SearchSettings
    """Recipe, model and documents, as ``act-harness search`` takes them."""
    methods: Sequence[str] = ()
    """Names or patterns; empty: all."""
    output: Path = Path("methods")
    """Folder of everything."""
    held_out: int = 0
    """Documents per task of the evaluation split to judge on; 0: the recipe's split ``judge``.
    Prepared documents bring their own."""
    equal_strength: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            InputError: A setting is out of range, or would do nothing beside the others.
        """
        check_count(self.held_out, "--held-out")
        if self.held_out and self.search.documents is not None:
            raise RecipeError(
                "--held-out draws documents, those of --documents are drawn already; leave it out"
            )


def methods_from_settings(settings: MethodsSettings) -> MethodsReport:
    """Load model and documents, compare the methods, and write the report.

    Raises:
        InputError: recipe, model, tasks, methods or ranges are wrong.
        InfrastructureError: data or disk are missing; what was computed is kept.
    """
    check_kind(settings, MethodsSettings, "settings")
    methods = chosen_methods(settings.methods)
    recipe = settings.search.make_recipe()
    places.prepare_folder(settings.output)
    found = load_search(settings.search, recipe, held_out=settings.held_out)
    arms = compare_methods(
        found.recipe,
        model=found.model,
        facts=found.facts,
        documents=found.documents,
        methods=methods,
        folder=settings.output,
        ledgers=settings.search.ledgers,
        equal_strength=settings.equal_strength,
    )
    return write_report(found.recipe, arms, settings.output)
