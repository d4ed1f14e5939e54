"""What calibration does to one document's answer: of a head alone, and of a whole head set.

A document is a prompt with answers. A task's document has its choices; a plain text has the most
likely next tokens, the stock model's first one in the place of the right choice. The margin is the
log-likelihood of the right one minus the best other's; a head's effect is what calibrating it alone
adds to the margin, in nats, exact.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from act_harness.attention.head_set import head_set
from act_harness.attention.lifecycle import calibrated
from act_harness.calibration import LayerPlan
from act_harness.engines import select_engine
from act_harness.errors import UnsupportedModelError
from act_harness.exploration.maps import last_logits
from act_harness.search.compute.exact import ChunkPass
from act_harness.search.compute.workbench import Workbench
from act_harness.search.documents import Document

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel

    from act_harness.artifact import Artifact
    from act_harness.calibration import Calibration, HeadStrength

    Array = npt.NDArray[np.float64]

__all__ = ["answer_scores", "grid_shape", "head_scores", "margin", "text_document"]

_PACK_TOKENS = {"cpu": 8_192}
"""Rows of a packed forward of the exact pass; an accelerator takes eight times as many."""


def margin(scores: Array, right: int) -> Array:
    """Return (...) margins in nats of (..., choices) log-likelihoods."""
    others = np.delete(scores, right, axis=-1)
    return np.asarray(scores[..., right] - others.max(axis=-1))


def grid_shape(
    model: PreTrainedModel, strengths: Mapping[tuple[int, int], HeadStrength]
) -> tuple[int, int]:
    """Return (layers, heads) of a table that has all of a model's layers, attending or not."""
    layers: int = model.config.get_text_config().num_hidden_layers
    return layers, max(head for _, head in strengths) + 1


def text_document(
    model: PreTrainedModel,
    tokens: Sequence[int],
    artifact: Artifact | None,
    *,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
    count: int = 8,
) -> Document:
    """Return a text as a document: its answers are the most likely next tokens.

    Args:
        model: the stock model.
        tokens: the text.
        artifact: its most likely tokens are among them too.
        tokenizer: of the text; target ``span`` needs it.
        count: tokens of the stock model.
    """
    likely = last_logits(model, tokens)[0].topk(count).indices.tolist()
    if artifact is not None:
        with calibrated(model, artifact, tokenizer=tokenizer):
            likely += last_logits(model, tokens)[0].topk(count // 2).indices.tolist()
    context = tuple(tokens)
    requests = tuple((context, (token,)) for token in dict.fromkeys(likely))
    return Document("text", "text", requests, right=0)


def answer_scores(
    model: PreTrainedModel,
    document: Document,
    artifact: Artifact | None = None,
    *,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
) -> Array:
    """Return (choices,) log-likelihoods in nats, of the stock model or of an artifact.

    Sinks are those of the context. Choices that are read behind the same tokens share a forward.
    Target ``span`` needs the ``tokenizer``.
    """
    rows: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for choice, (context, answer) in enumerate(document.requests):
        rows[len(context), (*context, *answer[:-1])].append(choice)
    scores = np.zeros(len(document.requests))
    with calibrated(model, artifact, tokenizer=tokenizer) as attachment:
        for (length, tokens), choices in rows.items():
            longest = len(tokens) - length + 1
            with attachment.prompts([length]):
                logits = last_logits(model, tokens, rows=longest)
            known = torch.log_softmax(logits.double(), dim=-1)
            for choice in choices:
                asked = torch.tensor(document.requests[choice][1])
                scores[choice] = known.gather(1, asked[:, None]).sum().item()
    return scores


def head_scores(
    model: PreTrainedModel,
    document: Document,
    *,
    calibration: Calibration,
    strengths: Mapping[tuple[int, int], HeadStrength],
    before: Array,
    heads: Collection[tuple[int, int]] | None = None,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
    progress: bool = False,
) -> Array:
    """Return (layers, heads, choices) log-likelihoods with each head calibrated alone.

    The one place to change for another way to all effects: the search's exact pass where it can
    open the model, else one forward a head.

    Args:
        model: the stock model.
        document: prompt and answers.
        calibration: what is done in the head.
        strengths: mass map of every head, by (layer, head).
        before: what :func:`answer_scores` says of the stock model; changes are added to it, so that
            a head that changes nothing has these very numbers, however forwards round.
        heads: (layer, head) pairs to compute, the others have NaN; None: all.
        tokenizer: of the document; target ``span`` needs it, and a forward a head.
        progress: whether to show a bar.

    Raises:
        UnsupportedModelError: the model cannot be calibrated.
    """
    shape = grid_shape(model, strengths)
    some = {place: own for place, own in strengths.items() if heads is None or place in heads}
    scores = np.full((*shape, len(before)), np.nan)
    for place in some:
        scores[place] = before
    with tqdm(total=len(some), desc="heads", unit="head", disable=not progress) as bar:
        exact = calibration.target != "span"  # whose places the exact pass does not know
        try:
            if exact:
                bench = Workbench(model)
                with bench:
                    bench.plain_head = False  # whole distributions, not differences of logits
                    _by_exact_pass(bench, document, calibration, some, scores, bar)
        except UnsupportedModelError:
            exact = False
        if not exact:
            _by_forwards(model, tokenizer, document, calibration, some, scores, bar)
    return scores


def _by_exact_pass(
    bench: Workbench,
    document: Document,
    calibration: Calibration,
    strengths: Mapping[tuple[int, int], HeadStrength],
    scores: Array,
    bar: Any,  # noqa: ANN401 - tqdm has no types
) -> None:
    share = calibration.decode != "running"
    layout = bench.lay_out([document], share=share)
    rows = _PACK_TOKENS.get(bench.device.type, 8 * _PACK_TOKENS["cpu"])
    passing = ChunkPass(
        bench,
        layout,
        engine=select_engine(
            "auto",
            device=bench.device.type,
            plans=[LayerPlan(calibration, (), tuple(strengths.values()))],
        ),
        calibration=calibration,
        strengths=(),
        first_layer=0,
        pack_tokens=max(rows, layout.length),
    )
    for layer in range(len(scores)):
        alike: dict[HeadStrength, list[int]] = defaultdict(list)
        for head in range(scores.shape[1]):
            if (layer, head) in strengths:
                alike[strengths[layer, head]].append(head)
        for strength, some in alike.items():
            passing.strengths = (strength,)  # mass maps of heads of their own, each head once
            change, _ = passing.layer(layer, some)
            scores[layer, some] += change[0, :, 0].cpu().numpy()
            bar.update(len(some))


def _by_forwards(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
    document: Document,
    calibration: Calibration,
    strengths: Mapping[tuple[int, int], HeadStrength],
    scores: Array,
    bar: Any,  # noqa: ANN401 - tqdm has no types
) -> None:
    for (layer, head), strength in strengths.items():
        alone = head_set(
            model,
            {layer: (head,)},
            calibration=calibration,
            strengths={layer: {head: strength}},
        )
        scores[layer, head] = answer_scores(model, document, alone, tokenizer=tokenizer)
        bar.update(1)
