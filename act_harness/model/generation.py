"""Generation of texts: transformers' ``generate``, calibrated, with true masks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from act_harness.attention.generation import refuse_unsupported_generation
from act_harness.errors import UnsupportedCallError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from lm_eval.api.instance import Instance

    from act_harness.attention import Attachment
    from act_harness.attention.counters import CalibrationCounters

__all__ = ["GenerationMixin"]


class GenerationMixin(HFLM):
    """Generates as HFLM does, with this arm in force."""

    attachment: Attachment | None
    batch_size_per_gpu: int | str
    counters: CalibrationCounters
    _arm: Callable[[], AbstractContextManager[None]]
    _budget: Callable[[], int]
    _skip_prompt: Callable[[Instance], list[int] | None]
    _count_skipped: Callable[[Sequence[Sequence[int]], int], None]
    _will_calibrate: bool

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as HFLM does, calibrated; batches are formed in a size that memory allows.

        Raises:
            UnsupportedCallError: a request's settings cannot be calibrated; nothing was generated.
        """
        if self._will_calibrate or (self.attachment is not None and self.attachment.active):
            for request in requests:
                self.check_generation(request.args[1])
        skipped = [self._skip_prompt(request) for request in requests]
        self._count_skipped([tokens for tokens in skipped if tokens is not None], len(requests))
        asked = [one for one, left in zip(requests, skipped, strict=True) if left is None]
        with self._whole_batches():
            answers: list[str] = (
                super().generate_until(asked, disable_tqdm=disable_tqdm or not self.leads)
                if asked
                else []
            )
        self._share_counters(len(requests))
        given = iter(answers)
        return [next(given) if left is None else "" for left in skipped]

    def check_generation(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings of generation under which no arm could be calibrated.

        Args:
            settings: a task's ``generation_kwargs`` with what a user put over them.

        Raises:
            UnsupportedCallError: they reorder, chunk or do without the cache.
        """
        refuse_unsupported_generation(self.model, dict(settings))

    @contextmanager
    def _whole_batches(self) -> Iterator[None]:
        """Give HFLM's generation a number where the user said ``auto``.

        HFLM's own probe measures one forward of the longest context, not a growing cache.
        """
        before = self.batch_size_per_gpu
        if str(before).startswith("auto"):
            self.batch_size_per_gpu = max(1, min(64, self._budget() // 512))
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        **generation_kwargs: Any,  # noqa: ANN401 - as HFLM
    ) -> torch.Tensor:
        """Generate a batch, and count what calibration did to its prompts."""
        attachment = self.attachment
        if attachment is None or not attachment.active:
            with self._arm():
                stock: torch.Tensor = super()._model_generate(
                    context, max_length, stop, **generation_kwargs
                )
            return stock
        if generation_kwargs.pop("use_cache", True) is False:
            raise UnsupportedCallError(
                "use_cache=False would make every step a new prefill with other sinks; "
                "generate with the cache while attention is calibrated"
            )
        mask = generation_kwargs.pop("attention_mask", None)
        if mask is None:  # what generate() takes then, so that both arms see the same tokens
            mask = self._inferred_mask(context)
        with self._arm(), attachment.watch() as records:
            output: torch.Tensor = super()._model_generate(
                context, max_length, stop, attention_mask=mask, **generation_kwargs
            )
        for row, real, record in zip(context, mask.bool(), records[0], strict=False):
            self.counters.record(tuple(row[real].tolist()), record)
        return output

    def _inferred_mask(self, context: torch.Tensor) -> torch.Tensor:
        """Return (B, T) ones, or zeros at pads where these are no end tokens."""
        pad, end = self.tokenizer.pad_token_id, self.model.generation_config.eos_token_id
        if pad is None or pad in (end if isinstance(end, list) else [end]):
            return torch.ones_like(context)
        mask: torch.Tensor = (context != pad).long()
        return mask
