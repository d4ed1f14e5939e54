"""A tiny run of an opened model: does it give the stock model's logits in the ways the search goes?

What decides how the search runs a model is tried here and not looked up: rows that are entered
behind a prefix, an attention output that is put in place, and what the output projection makes of a
changed one, which is a sum only where nothing (a gate, a norm) stands between the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from act_harness.attention.capabilities import MODEL_FAILURES
from act_harness.attention.rounding import alike
from act_harness.errors import UnsupportedModelError, one_line
from act_harness.search.compute.layout import Layout
from act_harness.search.compute.records import Group

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from act_harness.search.compute.entered import EnteredModel
    from act_harness.search.compute.records import LayerRecord

__all__ = ["Opening"]

_TOKENS = 8
_PREFIX = 3


class Opening:
    """Eight tokens, and what the stock model makes of them."""

    def __init__(self, bench: EnteredModel) -> None:
        """Run the stock model.

        Args:
            bench: with everything on its model.
        """
        self.bench = bench
        vocabulary = bench.model.config.get_text_config().vocab_size
        ids = torch.arange(_TOKENS, device=bench.device)[None] % vocabulary
        with torch.no_grad():
            self.stock = bench.model(input_ids=ids, use_cache=False).logits[0]
        self.layout = _layout(ids)
        self.masks = bench.masks(self.layout)

    def rows_obstacle(self) -> str | None:
        """Return why rows of a text cannot be run behind a known prefix; None where they can."""
        said = ""
        for narrows in (True, False):  # GPT-2's decoder gives its output the shape of its input
            self.bench.narrows = narrows
            try:
                with torch.no_grad():
                    return self._entered() or self._added()
            except torch.OutOfMemoryError:
                raise
            except MODEL_FAILURES as error:
                said = one_line(error, limit=120)
                if not isinstance(error, RuntimeError):
                    break
        return f"its layers cannot be entered one by one ({said})"

    def whole_sequences(self) -> None:
        """Find out whether whole sequences may be entered at a layer.

        Raises:
            UnsupportedModelError: they give other logits than the stock model even from their
                first layer on.
        """
        bench, said = self.bench, "its logits are others"
        ways = (True, False) if bench.enters else (False,)
        for enters in ways:
            bench.enters = enters
            try:
                with torch.no_grad():
                    if self._whole():
                        return
            except torch.OutOfMemoryError:
                raise
            except MODEL_FAILURES as error:
                said = one_line(error, limit=120)
        raise UnsupportedModelError(
            f"{type(bench.model).__name__} cannot be searched: its texts cannot lie in one row "
            f"({bench.obstacle}), and followed by layer it is not the stock model ({said}); make a "
            "head set by hand (act-harness artifact)"
        )

    def _entered(self) -> str | None:
        """Run the tokens whole, and their last rows from the middle layer on."""
        bench, layout, masks = self.bench, self.layout, self.masks
        logits, records = self._recorded()
        middle = (len(bench.layers) - 1) // 2  # before the last one, which may narrow
        hidden, projected = _known(records[middle])

        def prefix(layer: int) -> tuple[Tensor, Tensor]:
            key, value = records[layer].columns()
            return key[:, :, :_PREFIX], value[:, :, :_PREFIX]

        def own(layer: int) -> tuple[Tensor, Tensor]:
            key, value = records[layer].columns()
            return key[:, :, _PREFIX:], value[:, :, _PREFIX:]

        group = Group(
            1, _TOKENS - _PREFIX, lambda layer: masks.of(layer)[:, :, _PREFIX:], prefix, own
        )
        again = bench.resume(
            middle,
            ids=layout.ids[0, _PREFIX:],
            hidden=hidden[0, _PREFIX:],
            projected=projected[0, _PREFIX:],
            positions=layout.position[0, _PREFIX:],
            groups=[group],
            places=torch.arange(0, _TOKENS - _PREFIX, 2, device=bench.device),
        )
        same = self._as_stock(logits) and bench.as_stock(again, self.stock[_PREFIX::2])
        return None if same else "it gives other logits when it is entered at a layer"

    def _added(self) -> str | None:
        """Change the attention output of a layer of each kind; see what its projection gives."""
        bench = self.bench
        _, records = self._recorded()
        for layer in _one_of_each(bench.attentions, bench.windows):
            known = records[layer]
            hidden, projected = _known(known)
            attention = _attention(known)
            changed = _changed(attention)
            made = bench.projected_by_model(
                layer,
                self.layout,
                self.masks,
                hidden=hidden,
                attention=changed,
                own=lambda earlier: records[earlier].columns(),
            )
            added = torch.einsum(
                "sthd,hde->ste", (changed - attention).float(), bench.output_weight(layer).float()
            )
            if not alike(
                made.float().cpu(), (projected.float() + added).cpu(), _precision(made.dtype)
            ):
                return f"more than a product stands behind the attention of layer {layer}"
        return None

    def _whole(self) -> bool:
        """Say whether a changed attention output gives the same from its layer on as from below."""
        bench = self.bench
        logits, records = self._recorded()
        layer = sorted(bench.attentions)[(len(bench.attentions) - 1) // 2]
        known = records[layer]
        attention = _attention(known)
        hidden = attention if known.hidden is None else known.hidden  # not used if not entered

        def replayed(output: Tensor) -> Tensor:
            return bench.replay(
                layer,
                ids=self.layout.ids,
                hidden=hidden,
                attention=output,
                own=lambda earlier: records[earlier].columns(),
                places=self.layout.places,
            )

        enters = bench.enters
        same, other = replayed(attention), replayed(_changed(attention))
        try:
            bench.enters = False
            below = replayed(_changed(attention))
        finally:
            bench.enters = enters
        return self._as_stock(logits) and self._as_stock(same) and bench.as_stock(other, below)

    def _recorded(self) -> tuple[Tensor, dict[int, LayerRecord]]:
        """Run the tokens whole, note whether the output head is plain, and return all layers."""
        bench = self.bench
        logits, records = bench.recorded(self.layout, self.masks, keep_from=0)
        head: Any = bench.model.get_output_embeddings()
        bench.plain_head = type(head) is nn.Linear and torch.equal(
            head(bench.head_input[None])[0].to(logits), logits
        )
        return logits, records

    def _as_stock(self, logits: Tensor) -> bool:
        return self.bench.as_stock(logits, self.stock)


def _layout(ids: Tensor) -> Layout:
    """Return one prompt, (1, T), of which every row is read and no answer scored."""
    every = torch.ones_like(ids, dtype=torch.bool)
    place = torch.arange(ids.shape[1], device=ids.device)
    none = place[:0]
    return Layout(
        ids=ids,
        real=every,
        prompt=every,
        position=place[None],
        segment=torch.zeros_like(ids),
        owner=place[:1] * 0,
        places=torch.stack([place * 0, place], dim=1),
        read_place=none,
        read_token=none,
        read_slot=none,
        documents=1,
        choices=1,
        right=(0,),
        counts=(1,),
    )


def _known(record: LayerRecord) -> tuple[Tensor, Tensor]:
    if record.hidden is None or record.projected is None:
        raise UnsupportedModelError("a layer's input was not seen")
    return record.hidden, record.projected


def _attention(record: LayerRecord) -> Tensor:
    if record.attention is None:
        raise UnsupportedModelError("a layer's attention was not seen")
    return record.attention


def _changed(attention: Tensor) -> Tensor:
    """Return another attention output of the same size: every token has its neighbour's."""
    return attention.roll(1, dims=1)


def _one_of_each(
    attentions: Mapping[int, nn.Module], windows: Mapping[int, int | None]
) -> Iterator[int]:
    """Yield a layer of each kind: of one class, one window and like parts."""
    seen = set()
    for layer, attention in attentions.items():
        parts = tuple((name, type(part)) for name, part in attention.named_children())
        kind = (type(attention), windows[layer] is None, parts)
        if kind not in seen:
            seen.add(kind)
            yield layer


def _precision(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype
