"""The model card of an artifact: what it is, what it is worth, how to use it, what it cannot do.

Everything is read from the artifact. A card that is there keeps its text and its metadata: only the
section between the artifact's own marks is written anew, so that several share a repository.
Not here: the picture (:mod:`act_harness.sharing.push`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from huggingface_hub import CardData, ModelCard, ModelCardData
from yaml import YAMLError

from act_harness.errors import InputError, one_line
from act_harness.evidence.tables import markdown_cell, markdown_table, visible
from act_harness.exploration.page import settings_line
from act_harness.support.hub import LIBRARY

if TYPE_CHECKING:
    from act_harness.artifact import Artifact
    from act_harness.support.hub import HubFile

__all__ = ["CardFacts", "model_card"]

TAGS = (LIBRARY, "attention-calibration", "attention-sinks", "lm-evaluation-harness")


class CardFacts(NamedTuple):
    """What a card says and an artifact does not know."""

    place: HubFile
    """Where the artifact will lie."""
    license: str | None = None
    """The hub's name of the licence; None: as the card says that is there."""
    base_model: str | None = None
    """Hub id; None: unknown."""
    picture: bool = False
    """Whether the map of heads lies beside the artifact, see :func:`picture_path`."""


def picture_path(place: HubFile) -> str:
    """Return the path of an artifact's picture in its repository."""
    return PurePosixPath(place.file).with_suffix(".png").as_posix()


def model_card(artifact: Artifact, facts: CardFacts, *, existing: str | None = None) -> str:
    """Return the text of a repository's README.md with the artifact's section in it.

    Args:
        artifact: What is shared.
        facts: What it does not know itself.
        existing: The README.md that is there.

    Raises:
        InputError: No licence, or metadata in ``existing`` that cannot be read.
    """
    body, data = "", cast("CardData", ModelCardData())
    if existing is not None:
        try:
            old = ModelCard(existing.replace("\r\n", "\n"))
            body, data = old.text.strip("\n"), old.data
        except (ValueError, AttributeError, TypeError, YAMLError) as error:  # or no mapping
            raise InputError(
                f"README.md of {facts.place.repo} has metadata that cannot be read "
                f"({one_line(error, limit=120)}); mend it on the hub first"
            ) from error
    begin, end = (f"<!-- {word} act-harness {facts.place.file} -->" for word in ("begin", "end"))
    section = f"{begin}\n{_section(artifact, facts)}{end}\n"
    # Marks are whole lines, which no text of an artifact can be: it stands in one line with others.
    pattern = rf"^{re.escape(begin)}$.*?^{re.escape(end)}$\n?"
    found = re.search(pattern, body, flags=re.MULTILINE | re.DOTALL)
    if found:
        text = f"{body[: found.start()]}{section}{body[found.end() :]}"
    else:
        text = f"{body or _title(facts)}\n\n{section}"
    known = cast("dict[str, Any]", data.to_dict())  # type: ignore[no-untyped-call]
    for key, value in _metadata(known, facts).items():
        data[key] = value
    return f"---\n{data.to_yaml().strip()}\n---\n\n{text.strip(chr(10))}\n"


def _title(facts: CardFacts) -> str:
    return (
        f"# {facts.place.repo.partition('/')[2]}\n\n"
        "Attention heads whose hidden attention sinks are calibrated at inference, without "
        "training (ACT, ICML 2024), as `act-harness` reads them. No weights are in here."
    )


def _metadata(old: dict[str, Any], facts: CardFacts) -> dict[str, Any]:
    license_ = facts.license or old.get("license")
    if not license_:
        raise InputError(
            "no licence was named; choose one with --license (license=), for example apache-2.0 or "
            "cc-by-4.0: whose heads these are decides, and some models bind what is made from them"
        )
    library = old.get("library_name") or LIBRARY
    bases = _listed(old.get("base_model"))
    if facts.base_model and facts.base_model not in (*bases, facts.place.repo):
        bases.append(facts.base_model)
    new: dict[str, Any] = {
        "library_name": library,
        "license": license_,
        "tags": list(dict.fromkeys([*_listed(old.get("tags")), *TAGS])),
    }
    if bases and library == LIBRARY:  # else it is a model's own card
        new["base_model"] = bases[0] if len(bases) == 1 else bases
        new["base_model_relation"] = old.get("base_model_relation") or "adapter"
    return new


def _listed(value: Any) -> list[Any]:  # noqa: ANN401 - of a card's metadata
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# -- the section -----------------------------------------------------------------------------------


def _section(artifact: Artifact, facts: CardFacts) -> str:
    parts = [
        f"## {_code(artifact.name)}: {_heads(artifact)} of "
        f"{_code(facts.base_model or artifact.model.id)}\n",
    ]
    if facts.picture:
        parts.append(f"![Map of the heads]({picture_path(facts.place)})\n")
    own = sum(map(len, (artifact.strengths or {}).values()))
    parts += [
        f"Method: {_code(settings_line(artifact.calibration.settings()))}"
        f"{f'; {own} heads have a strength of their own' if own else ''}. "
        f"Hash of what decides scores: {_code(artifact.sha256())}.\n",
        f"### What it is worth\n\n{''.join(_worth(artifact))}",
        f"### How to use it\n\n{_usage(facts)}",
        f"### How it was found\n\n{''.join(_origin(artifact))}",
        f"### Limits\n\n{_limits(artifact)}",
    ]
    return "\n".join(parts)


def _heads(artifact: Artifact) -> str:
    """Return how many heads, and of how many: layers times heads counts layers without attention.

    What a hybrid's layers do is known where a search went through them.
    """
    searched = (artifact.search or {}).get("searched_heads")
    if isinstance(searched, int):
        return f"{artifact.head_count()} of {searched} searched heads"
    return f"{artifact.head_count()} heads"


def _worth(artifact: Artifact) -> Iterator[str]:
    yield f"Verdict: {_text(artifact.judgement()[0])}.\n"
    search = artifact.search or {}
    found = search.get("held_out") or search.get("judgement")
    try:
        rows = _measured(found)
        documents = {str(task): int(n) for task, n in found["documents"].items()} if found else {}
    except (AttributeError, KeyError, TypeError, ValueError):
        return  # the line above says that it cannot be read
    if not rows:
        return
    header = (
        "reading",
        "untouched, %",
        "calibrated, %",
        "change",
        "interval",
        "verdict",
        "controls",
    )
    yield f"\n{markdown_table(header, rows, right=())}\n"
    kind = "an evaluation" if search.get("held_out") else "a split of the search"
    yield (
        f"Mean over tasks, the weakest reading first, on {sum(documents.values())} documents of "
        f"{kind} that neither found nor chose the heads ("
        + ", ".join(f"{_code(task)} {n}" for task, n in documents.items())
        + "). *Corrected* takes each choice's mean score out in both arms: a gain that is left is "
        "no shift of label bias. *Controls* are random heads, as many as these.\n"
    )


def _measured(found: Any) -> list[list[str]]:  # noqa: ANN401 - an artifact's record
    """Return a row a reading, those with the lowest interval first."""
    rows: list[tuple[float, list[str]]] = []
    for name, one in (found["columns"] if found else {}).items():
        before, after = 100 * float(one["untouched"]), 100 * float(one["selected"])
        lowest, span, shown = -math.inf, "unknown", "not shown"
        if None not in one["interval"]:
            lowest, highest = (100 * float(end) for end in one["interval"])
            span = f"{lowest:+.1f} to {highest:+.1f}"
            shown = "worse" if highest < 0 else "better" if lowest > 0 else "not shown"
        row = [
            str(name).replace("_", " "), f"{before:.1f}", f"{after:.1f}",
            f"{100 * float(one['difference']):+.1f}", span, shown, _controls(one, before),
        ]  # fmt: skip
        rows.append((lowest, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _controls(one: Mapping[str, Any], before: float) -> str:
    drawn = [100 * float(score) - before for score in one["random_sets"]["scores"]]
    if not drawn:
        return "none of this size"
    beaten = "above all" if one["random_sets"]["beaten"] else "not above all"
    return f"{min(drawn):+.1f} to {max(drawn):+.1f}, {len(drawn)} sets; the heads are {beaten}"


def _usage(facts: CardFacts) -> str:
    model = facts.base_model or "MODEL"
    return (
        "```python\nimport act_harness\n\n"
        f'with act_harness.calibrated(model, "{facts.place}", tokenizer=tokenizer):\n'
        "    output = model.generate(**prompt)\n```\n\n"
        f"where `model` is `AutoModelForCausalLM.from_pretrained(\"{model}\")`; a commit behind "
        "the repository's name (`@COMMIT`) pins it. Scored by lm-eval, and against the "
        "stock model:\n\n"
        f"```bash\nlm_eval --model hf-act --model_args pretrained={model},artifact={facts.place} "
        "--tasks TASKS\n"
        f"act-harness eval --pretrained {model} --artifact {facts.place} --tasks TASKS\n```\n"
    )  # fmt: skip


def _origin(artifact: Artifact) -> Iterator[str]:
    search = artifact.search or {}
    recipe, splits = search.get("recipe"), search.get("splits")
    if isinstance(recipe, Mapping):
        named = [(key, recipe.get(key)) for key in ("method", "rule", "objective")]
        told = ", ".join(f"{key} {_code(value)}" for key, value in named if value is not None)
        yield f"Searched: {told}.\n"
    else:
        yield "No search is recorded: a published list, or one made by hand.\n"
    rows = list(_documents(splits)) if isinstance(splits, Mapping) else []
    if rows:
        header = ("task", "from", "search", "verify", "judge")
        shared = any(source.startswith("hash of") for _, source, *_ in rows)
        yield "\nDocuments of the search"
        yield (
            ". *hash of*: the task has one split, shared by a hash of each document, and an "
            "evaluation of the whole split meets documents that the heads were found on:\n\n"
            if shared
            else ", which never meet its evaluation:\n\n"
        )
        yield markdown_table(header, rows, right=())
    made = artifact.provenance
    known = [f"{word} {_code(made[key])}" for key, word in _MADE if isinstance(made.get(key), str)]
    if known:
        yield f"\nMade {', '.join(known)}.\n"


_MADE = (
    ("created", "at"), ("device", "on"), ("act_harness", "with act-harness"), ("commit", "commit"),
    ("torch", "torch"), ("transformers", "transformers"),
)  # fmt: skip


def _documents(splits: Mapping[str, Any]) -> Iterator[list[str]]:
    for task, one in splits.items():
        if isinstance(one, Mapping):
            drawn = [one.get(name) for name in ("search", "verify", "judge")]
            sizes = [part.get("n") if isinstance(part, Mapping) else None for part in drawn]
            numbers = [str(n) if isinstance(n, int) else "none" for n in sizes]
            yield [one_line(str(task)), one_line(str(one.get("source"))), *numbers]


def _limits(artifact: Artifact) -> str:
    model = artifact.model
    precision = f" in {_code(model.dtype)}" if model.dtype else ""
    search = artifact.search or {}
    notes = [note for note in _listed(search.get("notes")) if isinstance(note, str)]
    lines = [
        f"For {_code(model.architecture)} of {model.num_hidden_layers} layers with "
        f"{model.num_attention_heads} heads and its tokenizer alone: another is refused; other "
        "weights or another dtype are warned of.",
        f"What is measured holds for the tasks and prompts above{precision}; elsewhere it may be "
        "nothing, or harm. Measure it on yours: `act-harness eval`.",
        "An interval that holds 0 shows no effect, and much of a raw gain on classification is a "
        "shift of label bias: compare the corrected reading.",
        *(f"Of the search: {_text(note)}." for note in notes),
    ]
    return "".join(f"- {line}\n" for line in lines)


def _text(value: object) -> str:
    """Return a text of an artifact as one line without any markup."""
    return markdown_cell(one_line(str(value)))


def _code(value: object) -> str:
    """Return a value as code, in which there is no markup."""
    return f"`{visible(one_line(str(value))).replace('`', chr(39))}`"
