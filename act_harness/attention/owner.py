"""What the layers of a calibrated model, and its probe, use of the attachment they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from act_harness.attention.cache import Forward
    from act_harness.attention.spans import FindSpan
    from act_harness.calibration import LayerPlan
    from act_harness.engines.operation import CallCounter, Engine, Report

__all__ = ["Owner"]


class Owner(Protocol):
    """See :class:`act_harness.attention.attachment.Attachment`."""

    engine: Engine
    plans: dict[int, LayerPlan]
    calls: CallCounter
    token: str
    forward: Forward | None
    spans: FindSpan | None

    def note_report(self, layer: int, report: Report, prompts: Tensor | Sequence[int]) -> None:
        """Keep what a layer's prefill did."""
        ...

    def prompts(self, lengths: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Say how many real tokens are prompt in the prefills inside the block."""
        ...

    def suspended(self) -> AbstractContextManager[None]:
        """Run the stock model inside the block."""
        ...
