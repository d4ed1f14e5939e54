"""Engines: the calibration operation behind one signature, chosen by name.

``reference`` is the oracle (float64, every map in memory), ``torch`` the blockwise engine that runs
anywhere, ``triton`` the one for CUDA. ``auto`` takes the fastest engine for the device; where that
one cannot be loaded, or does not compute what it is wanted for, a warning says why.
"""

from __future__ import annotations

import functools
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
    """Return the engine of that name; ``auto`` chooses by ``device`` (``cpu``, ``cuda``, ...).

    Args:
        name: of the engine.
        device: where it is to compute.
        plans: what it is to compute. ``auto`` takes an engine that does; who names one gets that,
            and :func:`refuse_unsupported` says what it lacks.

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

            kernels = TritonEngine()
            lacking = _lacking(kernels, plans) if name == "auto" else []
            if not lacking:
                return kernels
            _warn(f"{'; '.join(lacking)}; engine torch is used, which is slower on CUDA")
        elif name == "triton":
            raise InputError(
                "engine 'triton' needs the package triton, which is not installed; "
                "pip install triton, or use engine 'torch'"
            )
        else:
            _warn("triton is not installed; engine torch is used, which is slower on CUDA")
    from act_harness.engines.torch import TorchEngine

    return TorchEngine()


def refuse_unsupported(engine: Engine, plans: Iterable[LayerPlan]) -> None:
    """Refuse plans that an engine cannot compute, before it is used on any of them.

    Raises:
        CalibrationError: there is such a plan; the line names all reasons, and the engines that
            compute all of the plans.
    """
    plans = list(plans)
    reasons = _lacking(engine, plans)
    if not reasons:
        return
    able = [name for name in ENGINES if name != "auto" and _computes(name, plans)]
    others = f"; engines that do: {', '.join(able)}" if able else ""
    raise CalibrationError("; ".join(reasons) + others)


def _lacking(engine: Engine, plans: Iterable[LayerPlan]) -> list[str]:
    return list(dict.fromkeys(reason for plan in plans for reason in engine.supports(plan)))


@functools.lru_cache(maxsize=64)
def _warn(line: str) -> None:
    """Log a warning, once: an engine is chosen for every arm and for every part of a search."""
    _logger.warning(line)


def _computes(name: str, plans: list[LayerPlan]) -> bool:
    if name == "triton" and find_spec("triton") is None:
        return False
    return not _lacking(select_engine(name), plans)
