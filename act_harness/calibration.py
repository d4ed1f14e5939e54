"""What the settings of calibrated attention mean, without any arithmetic on tensors.

A :class:`Calibration` is *(target set) x (mass map)*: which columns of an attention map are damped
and what becomes of their mass. The paper is Yu et al., "Unveiling and Harnessing Hidden Attention
Sinks", ICML 2024 (arXiv 2406.15765), sections 3 and 4; the preset ``paper`` is its published rule,
``release`` the behaviour of the authors' released code on a prefill. The engines
(:mod:`act_harness.engines`) do the arithmetic; this module imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from act_harness.errors import CalibrationError, suggestion

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "MIN_OTHER_MASS",
    "PRESETS",
    "Calibration",
    "HeadStrength",
    "LayerPlan",
    "preset",
]

MIN_OTHER_MASS = 1e-6
"""A row whose attention outside the sinks sums to less than this is left alone by ``damp``."""

FEW_ROWS = 4
"""Counters report the sinks on columns that fewer prompt rows than this can see."""

_DETECTION = ("rule", "alpha", "tau", "protect", "min_rows")
_ROWS = "expected at least 1 or 'auto'"


def validation_line(error: ValidationError) -> str:
    """Return the first problem of a pydantic error as one line, with its place."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = re.sub(r"^\w+ should (be|have)", "expected", message)
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] == "missing":
        message = "is missing; expected it beside the others"
    elif message.startswith("expected") and first["type"] != "value_error":  # those are ours
        message = f"found {_found(first['input'])}, {message}"
    return f"{place}: {message}" if place else message


def _found(value: object) -> str:
    """Return what was given, for a message: numbers and short words; of the rest, the kind."""
    if value is None or isinstance(value, (bool, float)):
        return str(value)
    if isinstance(value, int) and abs(value) < 10**18:
        return str(value)
    if isinstance(value, str) and len(value) <= 40:
        return repr(value)
    return f"a {type(value).__name__}"


class HeadStrength(BaseModel):
    """Mass map of one head: how the total attention on its sinks changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mass: Literal["damp", "reweight"] = "damp"
    """``damp``: m' = beta m (paper, equation of section 4). ``reweight``: scale and renormalise."""
    beta: float | None = None
    """Share of the sinks' mass that is kept by ``damp``; in [0, 1]; 0.4 unless told."""
    gamma: float | None = None
    """Factor on the sinks' columns before renormalising, for ``reweight``; above 0."""

    @model_validator(mode="before")
    @classmethod
    def _fill_strength(cls, data: Any) -> Any:  # noqa: ANN401 - raw input of any shape
        if isinstance(data, dict) and data.get("mass", "damp") == "damp":
            return {"beta": 0.4, **{k: v for k, v in data.items() if v is not None}}
        return data

    @model_validator(mode="after")
    def _check_strength(self) -> HeadStrength:
        if self.mass == "damp":
            if self.gamma is not None:
                raise ValueError("gamma belongs to mass 'reweight'; 'damp' takes beta")
            if self.beta is None or not 0.0 <= self.beta <= 1.0:
                raise ValueError(
                    f"beta is {self.beta}, expected a number in [0, 1]; "
                    "to amplify sinks use mass 'reweight' with gamma > 1"
                )
        else:
            if self.beta is not None:
                raise ValueError("beta belongs to mass 'damp'; 'reweight' takes gamma")
            if self.gamma is None or not 0.0 < self.gamma < float("inf"):
                raise ValueError(f"gamma is {self.gamma}, expected a finite number above 0")
        return self

    @property
    def strength(self) -> float:
        """The one number of the map: beta of ``damp``, gamma of ``reweight``."""
        value = self.beta if self.mass == "damp" else self.gamma
        assert value is not None  # noqa: S101 - guaranteed by the validator above
        return value


class Calibration(BaseModel):
    """All settings of the operation. Unknown keys and settings that do not apply are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target: Literal["sinks", "initial"] = "sinks"
    """``sinks``: the detected set. ``initial``: the first real token, without any detection."""
    rule: Literal["relative", "absolute"] | None = None
    """``relative`` (default): a column is a sink above alpha / N. ``absolute``: above tau."""
    alpha: float | None = None
    """Multiple of the average attention 1 / N (paper, section 3: 5); above 0."""
    tau: float | None = None
    """Absolute threshold on the mean attention of a column (release: 0.1); in (0, 1)."""
    protect: Literal["initial", "first-flagged", "none"] | None = None
    """Which column never is a sink: the first real token (default), the lowest flagged, none."""
    min_rows: int | Literal["auto"] | None = None
    """A column that fewer rows can see is never a sink; ``auto`` = ceil(1 / threshold)."""
    mass: Literal["damp", "reweight"] = "damp"
    """Mass map of all heads that have none of their own (see :class:`HeadStrength`)."""
    beta: float | None = None
    """Strength of ``damp``; in [0, 1]."""
    gamma: float | None = None
    """Strength of ``reweight``; above 0."""
    decode: Literal["frozen", "running", "off"] = "frozen"
    """Continuation rows use the prompt's sinks, sinks of their own rows so far, or none at all."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - validated by pydantic
        """Validate the settings.

        Raises:
            CalibrationError: a setting is unknown, out of range, or does not apply.
        """
        unknown = [key for key in settings if key not in type(self).model_fields]
        if unknown:
            hint = suggestion(unknown[0], type(self).model_fields)
            raise CalibrationError(f"calibration setting {unknown[0]!r} is unknown{hint}")
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise CalibrationError(f"calibration: {validation_line(error)}") from None

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:  # noqa: ANN401 - raw input of any shape
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        if given.get("target", "sinks") == "sinks":
            given = {"rule": "relative", "protect": "initial", "min_rows": 1, **given}
            if given["rule"] == "relative":
                given = {"alpha": 5.0, **given}
        if given.get("mass", "damp") == "damp":
            given = {"beta": 0.4, **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        if self.target == "initial":
            surplus = [name for name in _DETECTION if getattr(self, name) is not None]
            if surplus:
                raise ValueError(f"{surplus[0]} belongs to target 'sinks'; 'initial' detects none")
        else:
            self._check_detection()
        HeadStrength(mass=self.mass, beta=self.beta, gamma=self.gamma)
        return self

    def _check_detection(self) -> None:
        if self.rule == "relative":
            if self.tau is not None:
                raise ValueError("tau belongs to rule 'absolute'; 'relative' takes alpha")
            if self.alpha is None or not 0.0 < self.alpha < float("inf"):
                raise ValueError(f"alpha is {self.alpha}, expected a finite number above 0")
        else:
            if self.alpha is not None:
                raise ValueError("alpha belongs to rule 'relative'; 'absolute' takes tau")
            if self.tau is None or not 0.0 < self.tau < 1.0:
                raise ValueError(f"tau is {self.tau}, expected a number between 0 and 1")
        if isinstance(self.min_rows, int) and self.min_rows < 1:
            raise ValueError(f"min_rows is {self.min_rows}, {_ROWS}")

    def threshold(self, columns: Any) -> Any:  # noqa: ANN401 - a number or a tensor of any library
        """Return the threshold for rows that see at most ``columns`` columns (N of the paper).

        Raises:
            CalibrationError: there is no such rule; a target without detection has none.
        """
        match self.rule:
            case "relative":
                return self.alpha / columns
            case "absolute":
                return columns * 0 + self.tau
        raise CalibrationError(self._undetected("rule"))

    def required_rows(self, columns: Any, *, at_least: int = 1) -> Any:  # noqa: ANN401
        """Return how many rows must see a column before it can be a sink.

        Raises:
            CalibrationError: ``min_rows`` or the rule that ``auto`` asks is none that exists; a
                target without detection has neither.
        """
        # ceil(1 / threshold), written so that numbers and tensors both take it
        match self.min_rows, self.rule:
            case "auto", "relative":
                needed = -(-columns // self.alpha)
            case "auto", "absolute":
                needed = -(-(columns * 0 + 1.0 / (self.tau or 1.0)) // 1.0)
            case "auto", _:
                raise CalibrationError(self._undetected("rule"))
            case int(rows), _:
                needed = columns * 0 + rows
            case None, _:
                raise CalibrationError(self._undetected("min_rows"))
            case _:
                raise CalibrationError(f"min_rows is {self.min_rows}, {_ROWS}")
        short = needed < at_least
        return needed + (at_least - needed) * short

    def _undetected(self, setting: str) -> str:
        value = getattr(self, setting)
        if value is None:
            return f"this calibration of target {self.target!r} has no {setting} to detect sinks by"
        return unknown_member(setting, value)

    def settings(self) -> dict[str, Any]:
        """Return the settings that apply, as plain values (the artifact's ``calibration``)."""
        return self.model_dump(exclude_none=True)


def members_of(setting: str) -> tuple[str, ...]:
    """Return the words that a setting of a calibration can be: its closed set."""
    return _words(Calibration.model_fields[setting].annotation)


def _words(annotation: Any) -> tuple[str, ...]:  # noqa: ANN401 - a type as typing writes it
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in _words(part))


def unknown_member(setting: str, value: object) -> str:
    """Return the line that refuses what is no member of a closed set."""
    members = members_of(setting)
    return (
        f"{setting} {value!r} is unknown, expected one of {', '.join(members)}"
        f"{suggestion(str(value), members)}"
    )


PRESETS: Mapping[str, Calibration] = {
    "paper": Calibration(),
    "release": Calibration(rule="absolute", tau=0.1, protect="first-flagged"),
}


def preset(name: str) -> Calibration:
    """Return a published group of settings.

    Args:
        name: ``paper`` (relative threshold 5, first token protected) or ``release`` (absolute
            threshold 0.1, the lowest flagged column protected).

    Raises:
        CalibrationError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise CalibrationError(
            f"preset {name!r} is unknown, expected one of {sorted(PRESETS)}"
            f"{suggestion(name, PRESETS)}"
        )
    return PRESETS[name]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer is to do: its selected heads, and one mass map for each of them."""

    calibration: Calibration
    heads: tuple[int, ...]
    strengths: tuple[HeadStrength, ...]

    @classmethod
    def uniform(cls, calibration: Calibration, heads: tuple[int, ...]) -> LayerPlan:
        """Give every head the calibration's own mass map."""
        own = HeadStrength(mass=calibration.mass, beta=calibration.beta, gamma=calibration.gamma)
        return cls(calibration, heads, (own,) * len(heads))
