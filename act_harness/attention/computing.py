"""What surrounds an engine's call: mixed precision and gradients, which engines know nothing of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from act_harness.engines.operation import Stock
from act_harness.errors import UnsupportedCallError

if TYPE_CHECKING:
    from collections.abc import Callable

    from act_harness.engines.operation import Engine, EngineResult

__all__ = ["in_full_precision", "refuse_backward"]


def in_full_precision(
    compute: Callable[..., EngineResult], device: str, stock: Stock
) -> EngineResult:
    """Let an engine sum in the precision that it chose, under autocast, which would lower it.

    The model's own attention stays under autocast. Which kernel that runs is autocast's to
    decide, so the stock attention that the engine is given names none.

    Args:
        compute: calls the engine, given ``stock``.
        device: type of the device that computes.
        stock: the model's own attention.
    """
    dtype = torch.get_autocast_dtype(device)

    def run() -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return stock()

    with torch.autocast(device, enabled=False):
        return compute(stock=Stock(run))


class _NoBackward(torch.autograd.Function):
    """The identity, whose gradient is an error."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, engine: str) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.engine = engine
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:  # noqa: ANN401
        raise UnsupportedCallError(
            f"engine {ctx.engine} computes no gradients of calibrated heads; "
            "attach with engine='torch' to train or to differentiate"
        )


def refuse_backward(output: Tensor, engine: Engine) -> Tensor:
    """Return ``output``, through which gradients flow if the engine says that they can.

    A kernel's in-place results have no gradient: without this the heads it computed would be
    left out of the sum, and nobody would know.
    """
    if getattr(engine, "differentiable", False):
        return output
    found: Tensor = _NoBackward.apply(output, engine.name)  # type: ignore[no-untyped-call]
    return found
