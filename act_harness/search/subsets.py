"""Which sinks carry the gain: strengths tuned on a part of the detected sinks alone.

    python -m act_harness.search.subsets joint-sinks --documents FILE --pretrained DIR --output DIR

The columns of a prompt are parted in three: its ``last`` ones; of those before, the ``template``,
tokens that stand at the beginning or the end of every prompt of a task; and the ``others``. A part
of the sinks is no target that an artifact could name: what is template depends on the task. So
the scores are the search's own, of the model whose strengths it tuned.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from act_harness.attention import model_facts
from act_harness.attention.placement import input_device
from act_harness.errors import InputError, RecipeError
from act_harness.evidence.tables import markdown_table
from act_harness.search.choose.sets import heads_at_stake
from act_harness.search.command import SearchSettings, load_search
from act_harness.search.compute.gradient import StrengthenedModel
from act_harness.search.compute.training import score_rows
from act_harness.search.ledger import SearchLedger
from act_harness.search.methods.arms import Arm, identity_of, parts_of
from act_harness.search.methods.table import Table, make_table
from act_harness.search.progress import Phase, Progress
from act_harness.search.record import ledger_folder
from act_harness.search.tuning import Tuning
from act_harness.support import atomic, provenance
from act_harness.support.processes import Processes
from act_harness.support.sealed import read_sealed, write_sealed
from act_harness.support.sequences import common_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from act_harness.artifact import ModelFacts
    from act_harness.engines.operation import AttentionCall
    from act_harness.search.compute.gradient import Forward
    from act_harness.search.documents import TaskDocuments
    from act_harness.search.recipe import Recipe

__all__ = ["PARTS", "PartOfSinks", "PromptParts", "compare_parts"]

PARTS = ("all", "last", "template", "others")


class PromptParts:
    """The part that each token of a known prompt is in."""

    def __init__(self, documents: Iterable[TaskDocuments], last: int) -> None:
        """Find what all prompts of a task begin and end with.

        Args:
            documents: of all splits that will be scored.
            last: tokens at the end of a prompt that are the part ``last``.
        """
        self.of: dict[tuple[int, ...], list[str]] = {}
        for one in documents:
            splits = (one.search, one.verify, one.judge, one.held_out)
            prompts = {prompt for some in splits for d in some for prompt, _ in d.requests}
            before = common_start(prompts)
            behind = common_start({prompt[::-1] for prompt in prompts})
            for prompt in prompts:
                count = len(prompt)
                self.of[prompt] = [
                    "last" if place >= count - last
                    else "template" if place < before or place >= count - behind
                    else "others"
                    for place in range(count)
                ]  # fmt: skip

    def columns(self, part: str, ids: Tensor, prompt: Tensor) -> Tensor:
        """Return (B, T) bool: the columns of a part.

        Args:
            part: one of :data:`PARTS` but ``all``.
            ids: (B, T), right-padded.
            prompt: (B, T) bool.
        """
        found = torch.zeros_like(prompt, device="cpu")
        for row, (own, count) in enumerate(zip(ids.tolist(), prompt.sum(1).tolist(), strict=True)):
            known = self.of[tuple(own[:count])]
            found[row, :count] = torch.tensor([place == part for place in known])
        return found.to(prompt.device)


class PartOfSinks(StrengthenedModel):
    """A model whose strengths act on the sinks in a part of the prompt."""

    part = "all"
    parts: PromptParts
    flags = 0
    """Columns that strengths acted on, over all layers, heads and forwards so far."""
    _last: tuple[Forward, Tensor] | None = None

    def _columns(
        self, layer: int, run: Forward, call: AttentionCall, visible: Tensor | None
    ) -> tuple[Tensor, ...]:
        if self.part == "all":
            return self._counted(super()._columns(layer, run, call, visible))
        if self._last is None or self._last[0] is not run:
            own = self.parts.columns(self.part, run.batch.ids, run.batch.prompt)
            self._last = run, own[:, None]
        own = self._last[1]
        return self._counted(
            tuple(one & own for one in super()._columns(layer, run, call, visible))
        )

    def _counted(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():  # counting waits for the device, which tuning need not
            self.flags += sum(int(one.sum()) for one in found)
        return found


def compare_parts(
    recipe: Recipe,
    *,
    model: PreTrainedModel,
    facts: ModelFacts | None = None,
    documents: Sequence[TaskDocuments],
    folder: Path,
    last: int = 4,
    names: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Tune strengths on each part of the sinks, and score the documents that judge.

    Args:
        recipe: of method ``gradient``, target ``sinks``.
        model: a loaded causal language model.
        facts: what identifies it; computed when missing.
        documents: of every task, with held-out documents or the split ``judge``.
        folder: of ``parts.json``, ``parts.md`` and the ledgers.
        last: tokens at the end of a prompt that are the part ``last``.
        names: of :data:`PARTS`, those to tune.

    Returns:
        What ``parts.json`` holds: figures by part and column, and their share of the whole gain.

    Raises:
        RecipeError: documents lack what a table needs, or the folder is of another recipe, model or
            documents.
        ResultError: a file of the folder was changed since it was written.
        InputError: the recipe tunes something else.
    """
    calibration = recipe.tuned_calibration()
    if recipe.method != "gradient" or calibration.target != "sinks":
        raise InputError(
            f"recipe {recipe.name!r} does not tune sinks by gradient, expected method 'gradient' "
            "and target 'sinks'"
        )
    recipe = recipe.model_copy(update={"calibration": calibration})
    facts = facts or model_facts(model)
    parts, device = parts_of(documents), input_device(model)
    recipe = recipe.on(device.type)
    prompts = PromptParts(documents, last)
    grid = heads_at_stake(model, facts, recipe)
    arms, flags = [], {}
    of = provenance.sha256_json(identity_of(recipe, facts, parts, device.type))
    for name in ("none", *names):
        path = folder / "scores" / f"{name}-{last}.json"
        if not path.is_file():
            opened = PartOfSinks(model, calibration, checkpointing=False)
            ledgers, identity = ledger_folder(
                folder / f"ledgers-{name}-{last}", recipe, facts, documents, device.type
            )
            with opened, SearchLedger.opened(ledgers, identity=identity, rank=0) as ledger:
                opened.part, opened.parts = name, prompts  # not before: no part knows the probe
                theta, heads = None, 0
                if name != "none":
                    theta, heads = _tuned(recipe, documents, ledger, opened, grid)
                opened.flags = 0
                scores = {
                    split: {
                        task: score_rows(
                            opened, some, theta,
                            tokens=recipe.size("chunk_tokens"), processes=Processes.here(),
                        )
                        for task, some in tasks.items()
                    }
                    for split, tasks in parts.items()
                }  # fmt: skip
                arm = Arm(name, heads, None, "search", scores)
                content = {"of": of, "arm": arm._asdict(), "flags": opened.flags}
            write_sealed(path, content)
        stored = read_sealed(path)
        if stored["of"] != of:
            raise RecipeError(
                f"{path} is of another recipe, model or documents; give another folder"
            )
        arms.append(Arm(**stored["arm"]))
        flags[name] = stored["flags"]
    table = make_table(arms[0], arms[1:], parts)
    found = _content(recipe, table, arms, flags, last)
    atomic.write_json(folder / "parts.json", found)
    atomic.write_text(folder / "parts.md", _markdown(found))
    return found


def _tuned(
    recipe: Recipe,
    documents: Sequence[TaskDocuments],
    ledger: SearchLedger,
    opened: PartOfSinks,
    grid: dict[int, tuple[int, ...]],
) -> tuple[Tensor | None, int]:
    """Return the strengths of a part as a search would choose them, and how many heads have one."""
    phases = {name: Phase(name, 1) for name in ("train", "choose")}
    with Progress(phases, show=False) as progress:
        tuning = Tuning(
            recipe, documents, ledger, Processes.here(), progress, grid, opened,
            recipe.size("chunk_tokens"),
        )  # fmt: skip
        theta, trace = tuning.train()
        if theta is None:
            return None, 0
        kept, _ = tuning.choose(theta, trace["best"])
    return kept, int((kept.abs().amax(dim=0) > 0).sum())


def _content(
    recipe: Recipe, table: Table, arms: Sequence[Arm], flags: dict[str, int], last: int
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "recipe": recipe.content(),
        "last": last,
        "columns": {column.name: list(column.tasks) for column in table.columns},
        "untouched": {column.name: table.level(column) for column in table.columns},
        "parts": {
            arm.method: {
                "heads": arm.heads,
                "columns": {name: cell.to_json() for name, cell in table.cells[arm.method].items()},
                "flags": flags[arm.method],
            }
            for arm in arms[1:]
        },
        "provenance": provenance.collect(seed=recipe.seed).to_json(),
    }
    whole = found["parts"].get("all")
    for own in found["parts"].values() if whole else ():
        own["share"] = {
            name: cell["difference"] / whole["columns"][name]["difference"]
            for name, cell in own["columns"].items()
            if whole["columns"][name]["difference"] > 0
        }
    return found


def _markdown(content: dict[str, Any]) -> str:
    columns = list(content["columns"])
    rows = [
        [name, str(own["heads"]), str(own["flags"])]
        + [
            f"{100 * own['columns'][column]['difference']:+.1f} "
            f"({100 * own['columns'][column]['interval'][0]:+.1f} to "
            f"{100 * own['columns'][column]['interval'][1]:+.1f})"
            + (f" {100 * own['share'][column]:.0f} %" if column in own.get("share", {}) else "")
            for column in columns
        ]
        for name, own in content["parts"].items()
    ]
    return (
        f"Strengths tuned on a part of the sinks: the last {content['last']} tokens of the prompt, "
        "tokens of the task's template before them, the others. Change of accuracy in points, its "
        "95 % interval, and the share of the whole gain; flags: columns that strengths acted on.\n"
        "\n" + markdown_table(["part", "heads", "flags", *columns], rows) + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--documents", type=Path, required=True)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--model-args", default="dtype=float32")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--last", type=int, default=4)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    settings = SearchSettings(
        recipe=given.recipe, documents=given.documents, pretrained=given.pretrained,
        model_args=given.model_args, device=given.device, seed=given.seed,
    )  # fmt: skip
    found = load_search(settings, settings.make_recipe())
    content = compare_parts(
        found.recipe, model=found.model, facts=found.facts, documents=found.documents,
        folder=given.output, last=given.last, names=given.parts.split(","),
    )  # fmt: skip
    print(_markdown(content))


if __name__ == "__main__":
    main()
