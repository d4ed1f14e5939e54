"""A few tiny forwards after attaching: does the model really do what calibration assumes?

The probe finds the attention modules by watching them being called (names are no evidence), and
fails loudly where a model does not pass its layers through the interface, where a layer's attention
is not what the interface was asked for, where the calibrated model would attend to the future, or
where the interface changes the stock logits by a single bit. What cannot be equal to the bit may
differ as stock's own logits of these tokens do when only shapes differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from act_harness.attention.cache import cache_argument, cache_of, visible_of
from act_harness.attention.capabilities import Answer, Noise, capabilities_of
from act_harness.attention.facts import decoder_of
from act_harness.attention.interface import Seen, recording
from act_harness.attention.placement import input_device
from act_harness.attention.rounding import largest_change, rounding, spread_tokens
from act_harness.attention.routes import passing
from act_harness.calibration import Calibration, LayerPlan
from act_harness.engines.geometry import Geometry
from act_harness.engines.reference import ReferenceEngine
from act_harness.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from act_harness.attention.owner import Owner

__all__ = ["FoundLayer", "Probe", "attending_layers"]

_TOKENS = 12
_PROMPT = 6

_EXACT, _HALF = 5e-3, 0.1
"""How far a layer's attention may be off its call's, relative to its size: what TF32 products and a
softmax in half precision make of it."""


class FoundLayer(NamedTuple):
    """What computes the attention of one layer."""

    module: nn.Module
    heads: int
    """Query heads."""
    by_position: bool
    """Whether logits of single rows or columns come with its calls."""


class Probe:
    """Tiny forwards through one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        ids = spread_tokens(range(_TOKENS), model.config.get_text_config().vocab_size)
        self.ids = torch.tensor([ids], device=input_device(model))  # (1, T)
        self.changed = self.ids.clone()  # another last token
        self.changed[0, -1] = (ids[-1] + 1) % model.config.get_text_config().vocab_size

    def hidden(self, ids: Tensor | None = None) -> Tensor:
        """Return (1, T, vocabulary) logits of the probe tokens, on the CPU."""
        with torch.no_grad():
            out = self.model(input_ids=self.ids if ids is None else ids, use_cache=False)
        logits: Tensor = out.logits
        return logits.float().cpu()

    def attention_modules(self, stock: Tensor) -> dict[int, FoundLayer]:
        """Return what computes attention, by layer.

        Args:
            stock: logits of the same tokens before the interface was switched on.

        Raises:
            UnsupportedModelError: no layer passes through the interface, or one cannot be
                calibrated.
        """
        kind = type(self.model).__name__
        if not torch.isfinite(stock).all():
            raise UnsupportedModelError(
                f"{kind} gives logits that are not finite on a few tokens, without calibration; "
                "check its weights and the dtype"
            )
        with recording() as calls:
            logits = self.hidden()
        calls = [seen for seen in calls if not _is_beside_tokens(seen)]
        if not calls:
            raise UnsupportedModelError(
                f"{kind} does not pass its attention through transformers' AttentionInterface and "
                "is none of the families served outside it, so it cannot be calibrated; use "
                "artifact=none for a baseline"
            )
        if not torch.equal(logits, stock):
            raise UnsupportedModelError(
                f"{kind} gives other logits through the attention interface than without it; "
                "it cannot be calibrated safely"
            )
        found = {}
        for seen in calls:
            _refuse_layer(kind, seen)
            call = seen.call
            heads, by_position = call.query.shape[1], call.by_position
            found[int(seen.layer)] = FoundLayer(seen.module, heads, by_position)  # type: ignore[arg-type]
        return found

    def check(self, attachment: Owner) -> None:
        """Check that every selected layer runs calibrated and that no row sees a later token.

        Raises:
            UnsupportedModelError: a layer was not reached, or an earlier logit changed.
        """
        kind = type(self.model).__name__
        with attachment.prompts([_PROMPT]):
            first, second = self.hidden(), self.hidden(self.changed)
        if attachment.calls.calls.get(attachment.engine.name, 0) != 2 * len(attachment.plans):
            raise UnsupportedModelError(f"not every selected layer of {kind} ran calibrated")
        if not torch.isfinite(first).all():
            raise UnsupportedModelError(f"{kind} gives logits that are not finite when calibrated")
        with attachment.suspended():
            noise = self.stock_noise()
        pieces = self._over_cache(steps=noise.steps)
        self._check_causal(first, second, noise.ahead)
        self._check_pieces(pieces, first[:, _PROMPT:], noise.shape)

    def stock_noise(self) -> Noise:
        """Return what rounding does to the stock model; measured once in each of its states."""
        known = capabilities_of(self.model)
        if known.noise is None:
            stock = self.hidden()
            ahead = largest_change(stock[:, :-1], self.hidden(self.changed)[:, :-1])
            whole = stock[:, _PROMPT:]
            cached = largest_change(self._over_cache(), whole)
            # one by one only where that helps: a cache that is not followed at all must show
            one_by_one = cached > self._allowed(whole)
            if one_by_one:
                single = largest_change(self._over_cache(steps=True), whole)
                one_by_one = single <= self._allowed(whole)
                cached = min(cached, single)
            shape = max(cached, rounding(self.model, [range(_TOKENS)]))
            known.noise = Answer(
                Noise(ahead, shape, one_by_one),
                f"measured: logits move by {shape:.2g} with a forward's shape, and by {ahead:.2g} "
                "with a later token",
            )
        return known.noise.value

    def _check_causal(self, first: Tensor, second: Tensor, stock: float) -> None:
        """Check that a last token changes no earlier logit, but for what it does to stock's.

        Args:
            first: (1, T, vocabulary) calibrated logits.
            second: The same with another last token.
            stock: The largest change of stock's: rounding, where tokens share experts.
        """
        moved = largest_change(first[:, :-1], second[:, :-1])
        rounded = 1e-4 * (1 + float(first.abs().max())) + 4 * stock
        if moved > rounded or stock > 0.3 * float(first.std()):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} attends to later tokens through the attention "
                "interface; it cannot be calibrated"
            )

    def _check_pieces(self, pieces: Tensor, whole: Tensor, noise: float) -> None:
        """Check that tokens over the prompt's cache give what they give in one piece.

        Args:
            pieces: (1, T, vocabulary) calibrated logits over a cache.
            whole: The same in one piece.
            noise: What rounding does to stock's logits of these tokens.
        """
        spread = float(whole.std())
        off = largest_change(pieces, whole)
        if not off <= min(max(self._allowed(whole), 4 * noise), max(spread, 1e-3)):
            if noise > spread:
                raise UnsupportedModelError(
                    f"the stock model's own logits over a cache are {noise / spread:.2g} standard "
                    f"deviations off those in one piece, so {type(self.model).__name__} cannot be "
                    "calibrated; use artifact=none for a baseline"
                )
            raise UnsupportedModelError(
                f"{type(self.model).__name__} in {self.model.dtype}: calibrated logits over a "
                f"cache are {off / spread:.2g} standard deviations off those in one piece (stock: "
                f"{noise / spread:.2g}); its layers do not get the cache they extend, or the dtype "
                "is too coarse"
            )

    def _allowed(self, whole: Tensor) -> float:
        """Return how far logits over a cache may be off, whatever rounding does to stock's."""
        share = 0.02 if self.model.dtype in (torch.float32, torch.float64) else 0.3
        return share * float(whole.std()) + 1e-3

    def _over_cache(self, *, steps: bool = False) -> Tensor:
        """Logits of the tokens after the prompt, computed over the prompt's cache.

        Args:
            steps: one token at a time, else all together.
        """
        with torch.no_grad():
            cache = cache_of(self.model(input_ids=self.ids[:, :_PROMPT], use_cache=True))
            if cache is None:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} returns no cache, by which calibration tells a "
                    "prompt from what follows; use artifact=none for a baseline"
                )
            given = {cache_argument(self.model.forward): cache, "use_cache": True}
            parts = [
                self.model(input_ids=tokens, **given).logits
                for tokens in self.ids[:, _PROMPT:].split(1 if steps else _TOKENS, dim=1)
            ]
        return torch.cat(parts, dim=1).float().cpu()


def attending_layers(model: PreTrainedModel) -> dict[int, int]:
    """Return the number of query heads of every layer that attends; hybrids have others too.

    Raises:
        UnsupportedModelError: the model cannot be calibrated.
    """
    probe = Probe(model)
    before = probe.hidden()
    with passing(decoder_of(model)):
        found = probe.attention_modules(before)
    return {layer: one.heads for layer, one in sorted(found.items())}


def _is_beside_tokens(seen: Seen) -> bool:
    """Whether a call has neither rows nor columns that are tokens: it is no layer's attention.

    Inkling 2's residuals attend, at each token by itself, to the outputs of earlier blocks.
    """
    return seen.layer is None and _TOKENS not in (seen.call.query.shape[2], seen.call.key.shape[2])


def _refuse_layer(kind: str, seen: Seen) -> None:
    if seen.layer is not None and seen.layer < 0:
        raise UnsupportedModelError(
            f"{kind} shares one attention block among its layers, which does not say for which of "
            "them it computes; use artifact=none for a baseline"
        )
    if seen.layer is None:
        raise UnsupportedModelError(f"{kind} does not number its attention layers; not supported")
    columns = seen.call.key.shape[2]
    if columns > _TOKENS:
        raise UnsupportedModelError(
            f"{kind} attends to {columns} columns where there are {_TOKENS} tokens; columns that "
            "stand for other things than one token (compressed keys) have no mean attention that "
            "calibration is defined by; use artifact=none for a baseline"
        )
    off = _unasked(seen)
    if not off <= (_EXACT if seen.output.dtype in (torch.float32, torch.float64) else _HALF):
        raise UnsupportedModelError(
            f"the attention of layer {seen.layer} of {kind} is {off:.2g} of its size off what "
            "queries, keys, values, mask and known logits beside them give, so calibration would "
            "compute another model; use artifact=none for a baseline"
        )


def _unasked(seen: Seen) -> float:
    """Return how far a layer's own attention is from what its call says, relative to its size.

    Whatever a model adds to its attention that calibration does not know of is found here, by the
    reference with a gate of 1.
    """
    call = seen.call
    every = torch.ones(call.query.shape[0], _TOKENS, dtype=torch.bool, device=call.query.device)
    mask = visible_of(seen.mask, call.key.shape[2])
    geometry = Geometry(every, every, 0, 0, call.key.shape[2], mask)
    heads = tuple(range(call.query.shape[1]))
    plan = LayerPlan.uniform(Calibration(target="head", mass="gate", factor=1.0), heads)
    engine = ReferenceEngine(torch.float32)  # not every device has float64
    with torch.no_grad():
        found = engine(call, geometry=geometry, plan=plan, state=None, stock=lambda: seen.output)
        size = seen.output.float().norm()
        return float((found.output.float() - seen.output.float()).norm() / size.clamp(min=1e-30))
