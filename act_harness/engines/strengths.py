"""Strengths of the selected heads as tensors, and what they make of a row's mass.

Source of ``damp``: Yu et al., ICML 2024 (arXiv 2406.15765), section 4; of ``reweight``: the
first-token methods (arXiv 2505.11739); of ``raise``: SpotLight (arXiv 2505.12025). Everything here
has a gradient in the strengths, which :class:`Strengths` takes as a tensor where one is wanted.

Axes in the comments: b sequence, h selected head, k row (query).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from act_harness.calibration import MIN_OTHER_MASS, MIN_RAISED_MASS
from act_harness.engines.operation import Members, member
from act_harness.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from act_harness.calibration import HeadStrength

__all__ = ["RowFactors", "Strengths", "row_factors"]


_COLUMN_MAPS: Members = {"mass": ("damp", "reweight", "raise")}
_HEAD_MAPS: Members = {"mass": ("gate", "temperature")}
_MAPS: Members = {"mass": _COLUMN_MAPS["mass"] + _HEAD_MAPS["mass"]}


class Strengths(NamedTuple):
    """One mass map a head, with its strength."""

    masses: tuple[str, ...]
    value: Tensor  # (1, h, 1, 1) the strength of each head's map
    initial: Tensor | None = None  # (1, h, 1, 1) of the initial token, where that has its own

    @classmethod
    def of(cls, given: Sequence[HeadStrength] | Strengths, like: Tensor) -> Strengths:
        """Return the strengths as tensors of the device and dtype of ``like``.

        Raises:
            CalibrationError: an unknown map, or heads of several targets.
        """
        if isinstance(given, Strengths):
            return given
        for own in given:
            member("mass", own.mass, _MAPS)
        initial = [own.gamma_initial for own in given if own.gamma_initial is not None]
        if len(initial) not in (0, len(given)):
            raise CalibrationError(
                f"{len(initial)} of {len(given)} heads have gamma_initial, expected all or none"
            )
        shape = (1, -1, 1, 1)
        return cls(
            tuple(own.mass for own in given),
            like.new_tensor([own.strength for own in given]).view(shape),
            like.new_tensor(initial).view(shape) if initial else None,
        )

    def are(self, mass: str) -> Tensor:
        """Return (1, h, 1, 1) bool: the heads that have that mass map."""
        found = torch.tensor([own == mass for own in self.masses], device=self.value.device)
        return found.view(1, -1, 1, 1)

    def factor(self, mass: str) -> Tensor:
        """Return (1, h, 1, 1): the strength of the heads that have that mass map, 1 of the others.

        Of target ``head``, whose maps are ``gate`` and ``temperature``.

        Raises:
            CalibrationError: a head has another map.
        """
        for own in self.masses:
            member("mass", own, _HEAD_MAPS)
        return self.value.where(self.are(member("mass", mass, _HEAD_MAPS)), 1.0)


class RowFactors(NamedTuple):
    """How a row's weights change; each (b, h, k, 1)."""

    inside: Tensor  # factor on the target: m'/m
    outside: Tensor  # factor (1 - m')/u on all other columns
    moved: Tensor  # m - m'
    alone: Tensor  # bool: u (for ``raise``: m) too small, the row stays as it is
    initial: Tensor | None = None  # factor on the initial token, where that has its own strength

    def on(self, initial: Tensor | None) -> Tensor:
        """Return the factor of each column of the target; ``initial`` says which is that token."""
        if initial is None or self.initial is None:
            return self.inside
        return torch.where(initial, self.initial, self.inside)


def row_factors(
    m: Tensor, u: Tensor, strengths: Sequence[HeadStrength] | Strengths, first: Tensor | None = None
) -> RowFactors:
    """Turn the mass on the target (m) and off it (u) into factors.

    ``damp``: ``m' = beta m``. ``reweight``: ``m' = gamma m / (u + gamma m)``. ``raise``:
    ``m' = psi / (u + psi)`` where m < psi. A row without mass on the target keeps its weights, and
    so does one where ``damp`` would divide by (nearly) nothing, or ``raise`` make much of nothing.

    Args:
        m: (b, h, k, 1).
        u: (b, h, k, 1), summed, not ``1 - m``.
        strengths: one for each head; of mass maps of columns.
        first: (b, h, k, 1) mass on the initial token, which has a strength of its own (target
            ``both``); ``m`` is then that on the other sinks.

    Raises:
        CalibrationError: the strengths are of another target.
    """
    own = Strengths.of(strengths, m)
    if (first is None) != (own.initial is None):
        raise CalibrationError("gamma_initial is of target 'both' alone, whose heads all have it")
    for mass in own.masses:
        member("mass", mass, _COLUMN_MAPS)
    damped, raised, value = own.are("damp"), own.are("raise"), own.value
    whole = m if first is None else m + first
    alone = (damped & (m > 0) & (u < MIN_OTHER_MASS)) | (raised & (m > 0) & (m < MIN_RAISED_MASS))
    changes = (whole > 0) & ~alone & ~(raised & (m >= value))
    share = torch.where(raised, value, value * m)  # of the target, before renormalising
    if first is not None and own.initial is not None:  # both or none
        share = share + own.initial * first
    scaled = (u + share).where(changes, 1.0)  # sum of the row before renormalising
    # a branch that is not taken still must not divide by zero: its gradient would be no number
    factor = torch.where(raised, value / m.where(raised & changes, 1.0), value)
    inside = torch.where(damped, value, factor / scaled)
    outside = torch.where(damped, (1 - value * m) / u.where(damped & changes, 1.0), 1 / scaled)
    inside, outside = inside.where(changes, 1.0), outside.where(changes, 1.0)
    if first is None or own.initial is None:
        return RowFactors(inside, outside, m * (1 - inside), alone)
    initial = (own.initial / scaled).where(changes, 1.0)
    moved = m * (1 - inside) + first * (1 - initial)
    return RowFactors(inside, outside, moved, alone, initial)
