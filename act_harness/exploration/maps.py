"""Attention maps before and after calibration, seen in one forward of the stock model.

The observing engine hands every layer's own output on, so what it sees is the stock model: "after"
is what calibration makes of a map that the stock model has, not of one that other calibrated heads
have already changed. Maps exist for a few heads of one layer at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from act_harness.attention.head_set import head_set
from act_harness.attention.lifecycle import prepare
from act_harness.attention.parallel import refuse_parts
from act_harness.attention.placement import input_device
from act_harness.calibration import LayerPlan
from act_harness.engines.operation import EngineResult, LayerState, unsupported
from act_harness.engines.reference import COMPUTES, selected_maps
from act_harness.engines.strengths import Strengths
from act_harness.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from act_harness.artifact import Artifact
    from act_harness.calibration import Calibration
    from act_harness.engines.geometry import Geometry
    from act_harness.engines.operation import AttentionCall

__all__ = [
    "AttentionMaps",
    "LayerMaps",
    "groups_of",
    "last_logits",
    "maps",
    "observe",
    "text_tokens",
]

_MAP_BYTES = 1 << 26
"""Heads are looked at in groups whose maps are at most this large."""


class AttentionMaps(NamedTuple):
    """One head's attention on one text of N tokens."""

    before: Tensor
    """(N, N) float32: row k is what token k attends to, as the stock model has it."""
    after: Tensor
    """(N, N) float32: the same rows calibrated."""
    sinks: Tensor
    """(N,) bool: the columns whose mass calibration changes."""


@dataclass(frozen=True)
class LayerMaps:
    """Maps of some heads of a layer over a prompt of N tokens; h heads."""

    layer: int
    heads: tuple[int, ...]
    weights: Tensor  # (h, N, N) float32
    sinks: Tensor  # (h, N) bool
    inside: Tensor  # (h, N): factor of each row on its sinks
    outside: Tensor  # (h, N): factor of each row elsewhere
    calibrated: Tensor  # (h, N, N) float32
    seen: Tensor  # (N,): rows that see each column
    most: int
    """N of the paper: the most columns that a row of this layer sees."""

    def means(self) -> Tensor:
        """Return (h, N) mean attention of each column over the rows that see it."""
        return self.weights.sum(dim=1) / self.seen.clamp(min=1)


class _Observer:
    """An engine that changes nothing and shows what calibration would do."""

    name = "observer"
    differentiable = False

    def __init__(self) -> None:
        self.show: Callable[[LayerMaps], object] | None = None

    def supports(self, plan: LayerPlan) -> list[str]:
        """See :class:`act_harness.engines.operation.Engine`."""
        return unsupported(plan, COMPUTES, engine=self.name)

    def __call__(
        self,
        call: AttentionCall,
        *,
        geometry: Geometry,
        plan: LayerPlan,
        state: LayerState | None,
        stock: Callable[[], Tensor],
    ) -> EngineResult:
        """See :class:`act_harness.engines.operation.Engine`."""
        sinks = torch.zeros(len(geometry.real), len(plan.heads), geometry.total, dtype=torch.bool)
        nothing = LayerState(sinks.to(call.query.device))  # a cache of the probe's wants a state
        if self.show is None:
            return EngineResult(stock(), nothing, None)
        total = geometry.total
        seen, most = geometry.prompt_census
        for some in groups_of(plan, total * total):
            found = selected_maps(
                call, geometry=geometry, plan=some, state=None, dtype=torch.float32
            )
            inside, outside = found.factors.inside, found.factors.outside
            if plan.calibration.target == "head":  # a gate is a factor on all columns alike
                inside = outside = Strengths.of(some.strengths, found.weights).factor("gate")
            self.show(
                LayerMaps(
                    plan.layer,
                    some.heads,
                    found.weights[0],
                    found.after.sinks[0],
                    inside[0, :, :, 0].expand(-1, total),
                    outside[0, :, :, 0].expand(-1, total),
                    found.calibrated[0],
                    seen[0],
                    int(most[0]),
                )
            )
        return EngineResult(stock(), nothing, None)


def groups_of(plan: LayerPlan, weights: int) -> Iterator[LayerPlan]:
    """Yield a layer's plan in groups of heads whose maps, of so many weights, are in bounds."""
    group = max(1, _MAP_BYTES // (4 * weights))
    for start in range(0, len(plan.heads), group):
        yield replace(  # of the same layer, which target 'random' draws by
            plan,
            heads=plan.heads[start : start + group],
            strengths=plan.strengths[start : start + group],
        )


def text_tokens(model: PreTrainedModel, tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401
    """Return the tokens of a text, special ones as the tokenizer adds them.

    Raises:
        InputError: there are none, or more than the model can read.
    """
    tokens = [int(token) for token in tokenizer(text)["input_ids"]]
    if not tokens:
        raise InputError("the text has no tokens, expected at least one word")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and len(tokens) > longest:
        raise InputError(
            f"the text has {len(tokens)} tokens, the model reads at most {longest}; shorten it"
        )
    return tokens


def last_logits(
    model: PreTrainedModel, tokens: Sequence[int], *, rows: int = 1, gradient: bool = False
) -> Tensor:
    """Return (rows, vocabulary) float32 logits of the last ``rows`` tokens, on the CPU.

    The model computes what is in force on it, the stock model or an attachment; with ``gradient``
    so that a backward can follow.
    """
    ids = torch.tensor([list(tokens)], device=input_device(model))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = rows
    with torch.set_grad_enabled(gradient):
        logits: Tensor = model(**given, use_cache=False).logits
    return logits[0, -rows:].float().cpu()


def observe(
    model: PreTrainedModel,
    tokens: Sequence[int],
    heads: Mapping[int, Sequence[int]],
    *,
    show: Callable[[LayerMaps], object],
    calibration: Calibration | Mapping[str, Any] | str = "paper",
    artifact: Artifact | None = None,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
) -> None:
    """Run the stock model once over a prompt and show the maps of heads, layer by layer.

    Args:
        model: a causal language model that can be calibrated.
        tokens: the prompt; all of it is what sinks are detected on.
        heads: heads by layer.
        show: called with a few heads of a layer at a time; what it is given is not kept.
        calibration: what is done in heads that ``artifact`` does not have.
        artifact: decides the calibration, and the strengths of its heads.
        tokenizer: of the prompt; target ``span`` needs it.

    Raises:
        UnsupportedModelError: the model cannot be calibrated.
        ArtifactError: a head is not the model's.
    """
    with Observation(
        model, heads, calibration=calibration, artifact=artifact, tokenizer=tokenizer
    ) as observation:
        observation.run(tokens, show)


class Observation:
    """A model under observation, for many prompts; a context manager."""

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Mapping[int, Sequence[int]],
        *,
        calibration: Calibration | Mapping[str, Any] | str = "paper",
        artifact: Artifact | None = None,
        tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
    ) -> None:
        """Check the model and the heads; see :func:`observe`."""
        refuse_parts(model, "a look at its maps")
        own: dict[int, dict[int, Any]] = {}
        if artifact is not None:
            calibration = artifact.calibration
            for layer, some in (artifact.strengths or {}).items():
                kept = {head: one for head, one in some.items() if head in heads.get(layer, ())}
                own |= {layer: kept} if kept else {}
        self.model, self._engine = model, _Observer()
        watched = head_set(
            model, heads, calibration=calibration, strengths=own or None, name="observed"
        )
        self.artifact = watched
        self._attachment = prepare(
            model, watched, tokenizer=tokenizer, engine=self._engine, facts=watched.model
        )

    def __enter__(self) -> Observation:
        self._attachment.push()
        return self

    def __exit__(self, *_: object) -> None:
        self._attachment.detach()

    def run(self, tokens: Sequence[int], show: Callable[[LayerMaps], object]) -> None:
        """Run the stock model over one prompt; see :func:`observe`."""
        self._engine.show = show
        try:
            last_logits(self.model, tokens)
        finally:
            self._engine.show = None


def maps(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401 - any transformers tokenizer
    text: str,
    layer: int,
    head: int,
    *,
    calibration: Calibration | Mapping[str, Any] | str = "paper",
    artifact: Artifact | None = None,
) -> AttentionMaps:
    """Return one head's attention map on a text, before and after calibration, and its sinks.

    ::

        before, after, sinks = act_harness.maps(model, tokenizer, "A text.", 3, 5)

    Args:
        model: A loaded causal language model, left as it is.
        tokenizer: Its tokenizer.
        text: A prompt; all of its tokens are what sinks are detected on.
        layer: Counted from 0.
        head: Query head of the layer, counted from 0.
        calibration: A preset's name, settings, or a ``Calibration`` (paper, sections 3 and 4).
        artifact: Its calibration, and the strength it has for this head, instead.

    Returns:
        ``before`` and ``after``, (N, N) float32 on the CPU with rows that sum to 1 (after a
        ``gate`` to its factor), and ``sinks``, (N,) bool. The layer's input is the stock model's.
        Of a head with a learned sink these are shares of what that leaves to columns.

    Raises:
        ArtifactError: The model has no such head.
        InputError: The text has no tokens, or too many.
        UnsupportedModelError: The model cannot be calibrated.
    """
    found: list[AttentionMaps] = []

    def show(one: LayerMaps) -> None:
        parts = (one.weights[0], one.calibrated[0], one.sinks[0])
        found.append(AttentionMaps(*(part.cpu() for part in parts)))

    tokens = text_tokens(model, tokenizer, text)
    observe(
        model, tokens, {layer: (head,)}, show=show, calibration=calibration, artifact=artifact,
        tokenizer=tokenizer,
    )  # fmt: skip
    return found[0]
