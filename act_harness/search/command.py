"""The command ``act-harness search``: from file names and model arguments to :func:`run_search`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from act_harness.artifact import load_artifact
from act_harness.attention import model_facts
from act_harness.attention.load import load_plain_model, load_plain_tokenizer
from act_harness.attention.parallel import refuse_parts
from act_harness.errors import RecipeError
from act_harness.search.documents import (
    TaskDocuments,
    facts_of_tokens,
    read_documents,
    write_documents,
)
from act_harness.search.prompting import Prompting
from act_harness.search.recipe import Recipe, load_recipe, make_recipe
from act_harness.search.run import SearchResult, run_search
from act_harness.search.splits import load_documents
from act_harness.support import places
from act_harness.support.checks import check_count, check_kind, check_seed
from act_harness.support.launcher import launched
from act_harness.support.model_arguments import check_vocabulary, model_arguments
from act_harness.support.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.artifact import Artifact, ModelFacts
    from act_harness.harness.task_lookup import TaskSelection
    from act_harness.model import CalibratedHFLM
    from act_harness.search.choose.effects import HeadEffect

__all__ = [
    "LoadedSearch",
    "SearchSettings",
    "load_search",
    "public_facts",
    "search_documents",
    "search_from_settings",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchSettings:
    """What the command line gives; None and empty mean "not given"."""

    recipe: Path | None = None
    """A recipe file or the name of a shipped one; the options below override its fields."""
    pretrained: str | Path | None = None
    model_args: str | Mapping[str, Any] = ""
    """As lm-eval takes them: ``pretrained=DIR,dtype=float32``."""
    tasks: Sequence[str] = ()
    include_path: tuple[str | Path, ...] = ()
    """Folders of further task files."""
    samples: int | None = None
    device: str | None = None
    output: Path = Path("artifact.json")
    seed: int | None = None
    data_dir: Path | None = None
    documents: Path | None = None
    """Documents drawn and tokenised beforehand; then neither lm-eval nor data sets are needed."""
    held_out: int = 0
    """With ``prepare``: documents per task of the evaluation split to store beside them."""
    prepare: Path | None = None
    """Only draw and tokenise the documents, and write them to this file."""
    ledgers: Path | None = None
    """Folder of the ledgers; None: ``search/ledgers`` in a checkout, else beside the output."""
    show_best: bool = False
    """Print the best heads so far after each chunk of documents."""
    method: str | None = None
    """``exhaustive``, ``screened`` or ``gradient``."""
    objective: str | None = None
    gradient: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe's ``gradient`` that override it, for method ``gradient`` alone."""
    plots: bool = False
    """Draw the head map and the effect by rank beside the output."""
    compare_with: Path | None = None
    """With ``plots`` and method ``gradient``: an artifact whose search measured single heads of the
    same model; strengths are drawn against their effects."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            InputError: A setting is out of range, or would do nothing beside the others.
        """
        if isinstance(self.tasks, str):  # a name would be taken letter by letter
            object.__setattr__(self, "tasks", tuple(self.tasks.split(",")))
        for name in ("output", "documents", "prepare", "ledgers", "compare_with"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        check_count(self.samples, "--samples", least=2)
        check_count(self.held_out, "--held-out")
        check_seed(self.seed)
        if self.held_out and self.prepare is None:
            raise RecipeError("--held-out belongs to --prepare; give both or none")
        if self.prepare is not None and self.documents is not None:
            raise RecipeError("--prepare draws the documents that --documents reads; give one")
        if self.documents is not None and (self.data_dir is not None or self.include_path):
            raise RecipeError(
                "with --documents no task is read, so --data-dir and --include-path would do "
                "nothing; leave them out"
            )

    def make_recipe(self) -> Recipe:
        """Return the recipe with the options applied.

        Raises:
            RecipeError: neither a recipe nor tasks were given, or a field is out of range.
        """
        changes: dict[str, Any] = {}
        if self.tasks:
            changes["tasks"] = tuple(self.tasks)
        if self.samples is not None:
            changes["samples"] = self.samples
        if self.seed is not None:
            changes["seed"] = self.seed
        for name in ("method", "objective"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        own = {name: value for name, value in self.gradient.items() if value is not None}
        if own:
            changes["gradient"] = own
        if self.recipe is not None:
            return load_recipe(self.recipe, **changes)
        if not self.tasks:
            raise RecipeError(
                "neither a recipe nor tasks were given; name a recipe file, or --tasks and "
                "--model-args"
            )
        return make_recipe({"name": self.output.stem, **changes}, source="the command's options")


@dataclass(frozen=True)
class PreparedDocuments:
    """Documents that were drawn and stored, without a search."""

    path: Path
    documents: list[TaskDocuments]

    def summary(self) -> str:
        """Return a line for the terminal."""
        count = sum(len(one.search + one.verify + one.judge) for one in self.documents)
        return f"{count} documents of {len(self.documents)} tasks written to {self.path}"


def search_from_settings(settings: SearchSettings) -> SearchResult | PreparedDocuments:
    """Load the model, draw the documents, search, and write the artifact and its plots.

    Raises:
        InputError: recipe, model, tasks or ranges are wrong.
        InfrastructureError: data or disk are missing; what was measured is kept.
    """
    check_kind(settings, SearchSettings, "settings")
    if settings.plots:
        from act_harness.evidence.figures import require_matplotlib

        require_matplotlib()
    recipe = settings.make_recipe()
    against = _compared_with(settings, recipe)
    ledgers = settings.ledgers or _ledgers(settings.output)
    reads = (
        settings.recipe, settings.documents, settings.compare_with,
        *recipe.tasks, *settings.include_path,
    )  # fmt: skip
    if settings.prepare is None:
        places.prepare_file(settings.output, reads=reads)
        places.prepare_folder(ledgers)
    else:
        places.prepare_file(settings.prepare, reads=reads)
    given = load_search(settings, recipe, held_out=settings.held_out)
    recipe, model, facts, documents = given
    if settings.prepare is not None:
        made = {key: getattr(facts, key) for key in ("tokenizer_sha256", "tokenizer_probe_sha256")}
        documents = [replace(one, **made) for one in documents]
        write_documents(settings.prepare, documents)
        return PreparedDocuments(settings.prepare, documents)
    if against is not None:
        against.verify(facts)
    result = run_search(
        recipe,
        model=model,
        documents=documents,
        facts=facts,
        ledgers=ledgers,
        output=settings.output,
        on_best=_print_best if settings.show_best else None,
    )
    if settings.plots and result.path is not None:
        from act_harness.search.report import draw

        result = replace(result, figures=draw(result, result.path, against=against))
    return result


class LoadedSearch(NamedTuple):
    """What a search needs besides its settings."""

    recipe: Recipe
    model: PreTrainedModel
    facts: ModelFacts
    documents: list[TaskDocuments]


def load_search(settings: SearchSettings, recipe: Recipe, *, held_out: int = 0) -> LoadedSearch:
    """Load the model, and draw a recipe's documents or read prepared ones.

    Args:
        settings: where model and documents are.
        recipe: what is asked for.
        held_out: documents per task of the evaluation split to draw beside them.

    Raises:
        InputError: model, tasks or prepared documents are wrong.
        InfrastructureError: data are missing.
    """
    if settings.documents is not None:
        prepared = _fitting(read_documents(settings.documents), recipe)
        plain, facts = _plain_model(settings)
        return LoadedSearch(recipe, plain, facts_of_tokens(facts, prepared), prepared)
    from act_harness.harness.task_lookup import find_tasks

    given = _arguments(settings)
    found = find_tasks(recipe.tasks, include_path=settings.include_path)
    recipe = recipe.model_copy(update={"tasks": found.names})  # no path goes into an artifact
    lm = _load_model(given)
    documents = search_documents(
        recipe, lm, data_dir=settings.data_dir, held_out=held_out, selection=found
    )
    return LoadedSearch(recipe, lm.model, public_facts(lm.facts), documents)


def _compared_with(settings: SearchSettings, recipe: Recipe) -> Artifact | None:
    """Return the artifact whose effects strengths are drawn against."""
    if settings.compare_with is None:
        return None
    if not settings.plots or recipe.method != "gradient":
        raise RecipeError("--compare-with belongs to --plots and --method gradient; give all three")
    from act_harness.search.report import single_effects

    found = load_artifact(settings.compare_with)
    single_effects(found)  # refuses an artifact without any
    return found


def search_documents(
    recipe: Recipe,
    lm: CalibratedHFLM,
    *,
    data_dir: Path | None = None,
    held_out: int = 0,
    selection: TaskSelection | None = None,
) -> list[TaskDocuments]:
    """Draw a recipe's documents, tokenised exactly as ``lm`` would score them.

    ``selection`` is where the recipe's tasks were found; else they are looked up by name.
    """
    contexts: dict[str, list[int]] = {}

    def encode(context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        return lm._encode_request(context, continuation, contexts)

    return load_documents(
        selection or recipe.tasks,
        samples=recipe.samples,
        verify_samples=recipe.verify_samples,
        judge_samples=recipe.judge_documents(),
        seed=recipe.seed,
        held_out_samples=held_out,
        encode=encode,
        max_length=lm.max_length,
        prompting=Prompting(
            num_fewshot=recipe.num_fewshot,
            fewshot_seed=recipe.fewshot_seed,
            apply_chat_template=recipe.apply_chat_template,
            fewshot_as_multiturn=recipe.fewshot_as_multiturn,
            system_instruction=recipe.system_instruction,
        ),
        chat_template=lm.apply_chat_template if recipe.apply_chat_template else None,
        data_dir=data_dir,
        labels=recipe.objective != "entropy",
    )


def _arguments(settings: SearchSettings) -> dict[str, Any]:
    given = model_arguments(settings.pretrained, settings.model_args, device=settings.device)
    if "artifact" in given:
        raise RecipeError("a search starts from the untouched model; leave out artifact=")
    return given


def _load_model(given: dict[str, Any]) -> CalibratedHFLM:
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(artifact="none", **given)
    refuse_parts(lm.model, "the search")
    return lm


def _plain_model(settings: SearchSettings) -> tuple[PreTrainedModel, ModelFacts]:
    """Load the model by transformers alone; only its folder and dtype can be given."""
    text = settings.model_args
    if isinstance(text, str):  # lm-eval, which could read it, may be missing here
        pairs = [pair.partition("=") for pair in text.split(",") if pair]
        text = {key: value for key, _, value in pairs}
    given = model_arguments(settings.pretrained, text, device=settings.device)
    folder, dtype = str(given.pop("pretrained")), given.pop("dtype", "auto")
    device = given.pop("device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    if Processes.join().count > 1 and str(device).startswith("cuda"):
        device = f"cuda:{launched().local}"
    if given:
        raise RecipeError(
            f"with prepared documents the model takes pretrained and dtype only, got {list(given)}"
        )
    model = load_plain_model(folder, dtype=dtype or "auto", device=device)
    tokenizer = load_plain_tokenizer(folder)
    check_vocabulary(model, tokenizer)
    return model, public_facts(model_facts(model, tokenizer, name=folder))


def public_facts(facts: ModelFacts) -> ModelFacts:
    """Name a model loaded from a folder by the folder's name: artifacts are given to others."""
    name = Path(facts.id).resolve().name if Path(facts.id).is_dir() else facts.id
    return facts.model_copy(update={"id": name})


def _fitting(documents: list[TaskDocuments], recipe: Recipe) -> list[TaskDocuments]:
    """Take the recipe's tasks, where it names them one by one, and check what it asks of them."""
    held = {one.task: one for one in documents}
    if set(recipe.tasks) <= set(held):
        documents = [held[name] for name in recipe.tasks]
    else:  # a group's name, which nothing here can resolve, or other documents
        _logger.warning(
            "recipe %s names %s; the prepared documents are of %s, and all of these are taken",
            recipe.name, ", ".join(recipe.tasks), ", ".join(held),
        )  # fmt: skip
    for one in documents:
        if len(one.search) != recipe.samples:
            raise RecipeError(
                f"the prepared documents hold {len(one.search)} of task {one.task!r}, the recipe "
                f"asks for {recipe.samples}; prepare them again"
            )
        asked = None if one.without_examples else recipe.num_fewshot
        if asked not in (None, one.num_fewshot):
            raise RecipeError(
                f"the prepared documents of task {one.task!r} have {one.num_fewshot} examples in "
                f"their prompts, the recipe asks for {asked}; prepare them again"
            )
    return documents


def _ledgers(output: Path) -> Path:
    shared = Path("search/ledgers")
    return shared if shared.parent.is_dir() else output.parent / "ledgers"


def _print_best(ranked: list[HeadEffect]) -> None:
    from tqdm import tqdm

    best = ", ".join(f"{e.layer}.{e.head} {e.effect:+.3f}" for e in ranked[:10])
    tqdm.write(f"best so far (layer.head effect): {best}")
