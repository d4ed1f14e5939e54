"""Engines: the calibration operation behind one signature, chosen by name.

``reference`` is the oracle (float64, every map in memory), ``torch`` the blockwise engine that runs
anywhere, ``triton`` the one for CUDA. ``auto`` takes the fastest engine for the device that
computes what is asked; where that is a slower one, a warning says why.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from act_harness.errors import CalibrationError, InputError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from act_harness.calibration import LayerPlan
    from act_harness.engines.operation import Engine

__all__ = ["ENGINES", "refuse_unsupported", "select_engine"]

ENGINES = ("auto", "reference", "torch", "triton")

_logger = logging.getLogger(__name__)


def select_engine(
    name: str = "auto", *, device: str = "cpu", plans: Iterable[LayerPlan] = ()
) -> Engine:
    """Return the engine of that name; ``auto`` chooses one.

    Args:
        name: one of :data:`ENGINES`.
        device: kind of the model's device, ``cpu``, ``cuda``, ...
        plans: what ``auto`` must compute; another engine is returned whatever it computes
            (:func:`refuse_unsupported`).

    Raises:
        InputError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise InputError(unknown_name(f"engine {name!r}", name, ENGINES))
    if name == "reference":
        from act_harness.engines.reference import ReferenceEngine

        return ReferenceEngine()
    if name == "triton" or (name == "auto" and device.split(":")[0] == "cuda"):
        if find_spec("triton") is not None:
            from act_harness.engines.triton import TritonEngine

            engine = TritonEngine()
            lacking = [] if name == "triton" else [one for p in plans for one in engine.supports(p)]
            if not lacking:
                return engine
            _logger.warning("%s; engine torch is used, which is slower on CUDA", lacking[0])
        elif name == "triton":
            raise InputError(
                "engine 'triton' needs the package triton, which is not installed; "
                "pip install triton, or use engine 'torch'"
            )
        else:
            _logger.warning("triton is not installed; engine torch is used, slower on CUDA")
    from act_harness.engines.torch import TorchEngine

    return TorchEngine()


def refuse_unsupported(engine: Engine, plans: Iterable[LayerPlan]) -> None:
    """Refuse plans that an engine cannot compute, before it is used on any of them.

    Raises:
        CalibrationError: there is such a plan; the line names all reasons, and the engines that
            compute all of the plans.
    """
    plans = list(plans)
    reasons = dict.fromkeys(reason for plan in plans for reason in engine.supports(plan))
    if not reasons:
        return
    able = [name for name in ENGINES if name != "auto" and _computes(name, plans)]
    others = f"; engines that do: {', '.join(able)}" if able else ""
    raise CalibrationError("; ".join(reasons) + others)


def _computes(name: str, plans: list[LayerPlan]) -> bool:
    if name == "triton" and find_spec("triton") is None:
        return False
    engine = select_engine(name)
    return not any(engine.supports(plan) for plan in plans)
