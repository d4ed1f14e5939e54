"""Everything that a page shows of one document: columns, sinks, masses, effects, chosen maps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from act_harness.artifact import load_artifact
from act_harness.attention import model_facts
from act_harness.attention.parallel import refuse_parts
from act_harness.calibration import Calibration, HeadStrength, preset
from act_harness.errors import InputError, UnsupportedModelError, one_line
from act_harness.exploration.effects import answer_scores, head_scores, margin, text_document
from act_harness.exploration.exploration import Exploration, HeadMap
from act_harness.exploration.first_order import first_order_effects
from act_harness.exploration.maps import LayerMaps, observe, text_tokens
from act_harness.exploration.page import strengths_of
from act_harness.support.checks import check_count

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from act_harness.artifact import Artifact, ModelFacts
    from act_harness.search.documents import Document

__all__ = ["explore", "explore_document"]

_logger = logging.getLogger(__name__)

_ROWS = 512
"""Most rows of a stored map; of a longer prompt they are spread evenly, the last one among them."""

_MAP_BYTES = 4 << 20
"""Bytes of all stored maps together, one for each weight; the heads asked for come first."""


class _Columns:
    """Takes the maps of a forward as they pass, and keeps what a page needs of them."""

    def __init__(
        self, shape: tuple[int, int], length: int, chosen: Iterable[tuple[int, int]]
    ) -> None:
        layers, heads = shape
        self.means = np.zeros((layers, heads, length), np.float32)
        self.sinks = np.zeros((layers, heads, length), np.bool_)
        self.seen = np.zeros((layers, length), np.int64)
        self.most = np.ones(layers, np.int64)
        self.sink_mass = np.zeros(shape, np.float32)
        self.first_mass = np.zeros(shape, np.float32)
        self.maps: dict[tuple[int, int], HeadMap] = {}
        self.chosen = frozenset(chosen)
        count = min(length, _ROWS)
        self.rows = np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))

    def take(self, found: LayerMaps) -> None:
        """Keep what is needed of some heads of a layer."""
        layer, some = found.layer, list(found.heads)
        self.means[layer, some] = found.means().cpu().numpy()
        self.sinks[layer, some] = found.sinks.cpu().numpy()
        self.seen[layer] = found.seen.cpu().numpy()
        self.most[layer] = found.most
        received = found.weights.sum(dim=1)  # (h, N)
        total = len(self.seen[layer])
        self.sink_mass[layer, some] = ((received * found.sinks).sum(dim=1) / total).cpu().numpy()
        self.first_mass[layer, some] = (received[:, 0] / total).cpu().numpy()
        index = torch.from_numpy(self.rows).to(found.weights.device)
        for place, head in enumerate(some):
            if (layer, head) in self.chosen:
                parts = (found.weights, found.inside, found.outside, found.calibrated)
                weights, inside, outside, after = (
                    part[place][index].cpu().numpy() for part in parts
                )
                columns = self.sinks[layer, head]
                said = weights * np.where(columns, inside[:, None], outside[:, None])
                kept = None if np.allclose(said, after, atol=1e-6) else after
                self.maps[layer, head] = HeadMap(weights, inside, outside, kept)


def explore(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
    text: str,
    *,
    artifact: Artifact | str | Path | None = None,
    calibration: Calibration | Mapping[str, Any] | str = "paper",
    heads: Sequence[tuple[int, int]] = (),
    exact: int | None = None,
    progress: bool = False,
) -> Exploration:
    """See what a model attends to in a text, and what calibrating each head alone does to it.

    The answer whose margin the effects are of is the stock model's most likely next token. One
    backward pass finds all heads' effects to first order; ``exact`` says of how many they are then
    computed exactly: of ``heads``, of the artifact's, of those with the strongest effects.

    Args:
        model: A loaded causal language model, left as it is.
        tokenizer: Its tokenizer.
        text: A prompt.
        artifact: A head set, its path or name: its calibration and strengths are shown, and the
            next tokens with all of its heads calibrated.
        calibration: What is done in each head where there is no artifact.
        heads: (layer, head) pairs whose maps are stored before all others.
        exact: Number of heads whose effect is computed exactly; None: as many as have their maps
            stored, 4 MiB of them.
        progress: Whether to show a bar.

    Returns:
        An :class:`Exploration`, which displays itself in a notebook.

    Raises:
        InputError: The text has no tokens, or too many, or ``exact`` is below 0.
        ArtifactError: The artifact is not this model's, or a head is not.
        UnsupportedModelError: The model cannot be calibrated.
    """
    check_count(exact, "exact")
    found = load_artifact(artifact) if isinstance(artifact, (str, Path)) else artifact
    tokens = text_tokens(model, tokenizer, text)
    return explore_document(
        model,
        tokenizer,
        text_document(model, tokens, found, tokenizer=tokenizer),
        artifact=found,
        calibration=calibration,
        heads=heads,
        exact=exact,
        progress=progress,
        title="Next token",
    )


def explore_document(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
    document: Document,
    *,
    title: str,
    artifact: Artifact | None = None,
    calibration: Calibration | Mapping[str, Any] | str = "paper",
    heads: Sequence[tuple[int, int]] = (),
    exact: int | None = None,
    progress: bool = False,
) -> Exploration:
    """See one question through a model; see :func:`explore`.

    Args:
        model: the stock model.
        tokenizer: turns tokens into the texts that are shown.
        document: prompt and answers. Where answers follow different prompts, the right one's is
            shown.
        title: what the page says it is.
        artifact: see :func:`explore`.
        calibration: see :func:`explore`.
        heads: see :func:`explore`.
        exact: see :func:`explore`.
        progress: see :func:`explore`.
    """
    check_count(exact, "exact")
    if len(document.requests) < 2:
        raise InputError(f"{title} has {len(document.requests)} answer, expected two or more")
    refuse_parts(model, "an exploration")
    facts = model_facts(model, tokenizer)
    if artifact is not None:
        artifact.verify(facts)
    settings = artifact.calibration if artifact else _settings(calibration)
    shape = (facts.num_hidden_layers, facts.num_attention_heads)
    _check_heads(heads, shape)
    maps = _mass_maps(artifact, settings, shape)
    nothing = np.full(shape, np.nan, np.float32)
    table, initial = strengths_of(artifact) if artifact else (nothing, None)
    prompt = document.requests[document.right][0]
    before = answer_scores(model, document)
    given: dict[str, Any] = {
        "calibration": settings,
        "strengths": maps,
        "before": before,
        "tokenizer": tokenizer,
    }
    stored = _stored(heads, len(prompt))
    try:
        estimates = first_order_effects(model, document, **given)
        ranked = _ranked(heads, table, estimates)
        some = frozenset(ranked[: stored if exact is None else exact])
        scores = head_scores(model, document, **given, heads=some, progress=progress)
    except (UnsupportedModelError, torch.OutOfMemoryError) as error:
        _logger.warning("%s; all heads' effects are computed exactly", one_line(error))
        estimates = np.full(shape, np.nan)
        scores = head_scores(model, document, **given, progress=progress)
        change = margin(scores, document.right) - margin(before, document.right)
        ranked = _ranked(heads, table, change)
    columns = _Columns(shape, len(prompt), ranked[:stored])
    grid = {layer: range(shape[1]) for layer in range(shape[0])}
    observe(
        model, prompt, grid, show=columns.take, calibration=settings, artifact=artifact,
        tokenizer=tokenizer,
    )  # fmt: skip
    return Exploration(
        model=_name(facts),
        title=title,
        tokens=token_texts(tokenizer, prompt),
        heads=(*shape, facts.num_key_value_heads or shape[1]),
        calibration=settings,
        artifact=artifact.name if artifact else None,
        strengths=table,
        initial_strengths=initial,
        labels=_labels(tokenizer, document),
        next_token=not document.choices,
        right=document.right,
        before=before,
        after=answer_scores(model, document, artifact, tokenizer=tokenizer) if artifact else None,
        scores=scores,
        first_order=estimates,
        means=columns.means,
        sinks=columns.sinks,
        seen=columns.seen,
        thresholds=np.array([_threshold(settings, int(most)) for most in columns.most]),
        sink_mass=columns.sink_mass,
        first_mass=columns.first_mass,
        rows=columns.rows,
        maps=columns.maps,
    )


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:  # noqa: ANN401
    """Return the text of each token; of a part of a character, the tokenizer's name for it."""
    texts = []
    for token in tokens:
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if not text or "\ufffd" in text:
            text = str(tokenizer.convert_ids_to_tokens([token])[0])
        texts.append(text)
    return tuple(texts)


def _settings(calibration: Calibration | Mapping[str, Any] | str) -> Calibration:
    if isinstance(calibration, str):
        return preset(calibration)
    return Calibration(**calibration) if isinstance(calibration, Mapping) else calibration


def _threshold(calibration: Calibration, most: int) -> float:
    return float(calibration.threshold(most)) if calibration.detects else float("nan")


def _mass_maps(
    artifact: Artifact | None, calibration: Calibration, shape: tuple[int, int]
) -> dict[tuple[int, int], HeadStrength]:
    """Return every head's mass map: the artifact's where it has the head."""
    maps = dict.fromkeys(np.ndindex(*shape), calibration.strength_of_all)
    for layer, plan in (artifact.plans() if artifact else {}).items():
        maps |= {(layer, n): own for n, own in zip(plan.heads, plan.strengths, strict=True)}
    return maps


def _ranked(
    heads: Sequence[tuple[int, int]],
    strengths: npt.NDArray[np.float32],
    effects: npt.NDArray[np.float64],
) -> list[tuple[int, int]]:
    """Return all heads: those asked for, the artifact's, then the strongest."""
    order = np.argsort(-np.abs(effects), axis=None, kind="stable")
    ranked = [(int(n) // effects.shape[1], int(n) % effects.shape[1]) for n in order]
    ranked.sort(key=lambda place: bool(np.isnan(strengths[place])))  # stable: the artifact's first
    return list(dict.fromkeys([*((int(a), int(b)) for a, b in heads), *ranked]))


def _stored(heads: Sequence[tuple[int, int]], length: int) -> int:
    """Return how many heads have their maps stored."""
    return max(1, _MAP_BYTES // (min(length, _ROWS) * length), len(set(heads)))


def _check_heads(heads: Sequence[tuple[int, int]], shape: tuple[int, int]) -> None:
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise InputError(
                f"head {layer}.{head} is out of range, the model has layers 0..{shape[0] - 1} "
                f"with heads 0..{shape[1] - 1}; give one of those"
            )


def _name(facts: ModelFacts) -> str:
    """Return a model's name without its folder, and what it is where that says more."""
    name = facts.id.rstrip("/").rpartition("/")[2]
    return name if name == facts.architecture else f"{name} ({facts.architecture})"


def _labels(tokenizer: Any, document: Document) -> tuple[str, ...]:  # noqa: ANN401
    if len(document.choices) == len(document.requests):
        return document.choices
    return tuple("".join(token_texts(tokenizer, answer)) for _, answer in document.requests)
