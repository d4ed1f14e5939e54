"""What the settings of calibrated attention mean, without any arithmetic on tensors.

A :class:`Calibration` is *(target set) x (mass map)*: which columns of an attention map change and
what becomes of their mass; target ``head`` changes a head as a whole (a control). The paper
is Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", ICML 2024 (arXiv 2406.15765),
sections 3 and 4; the preset ``paper`` is its published rule, ``release`` the behaviour of the
authors' released code on a prefill. The engines (:mod:`act_harness.engines`) do the arithmetic;
this module imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from act_harness.errors import CalibrationError, suggestion, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "MIN_OTHER_MASS",
    "MIN_RAISED_MASS",
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

MIN_RAISED_MASS = 1e-30
"""A row whose attention on the target sums to less than this is left alone by ``raise``."""

_DETECTION = ("rule", "alpha", "tau", "protect", "min_rows")
_ROWS = "expected at least 1 or 'auto'"

_OWN_SETTINGS = {"count": "last", "draw": "random", "seed": "random", "markers": "span"}
"""Settings of a single target."""

_COLUMN_MASSES = ("damp", "reweight", "raise")
_MASSES = {"both": ("reweight",), "head": ("gate", "temperature")}
"""Mass maps of targets that do not take all those of columns."""


class _Strength(NamedTuple):
    """The strength of a mass map: its setting, the values it can have, and how to say them."""

    setting: str
    fits: Callable[[float], bool]
    expected: str


_STRENGTHS = {
    "damp": _Strength(
        "beta",
        lambda beta: 0.0 <= beta <= 1.0,
        "a number in [0, 1]; to amplify sinks use mass 'reweight' with gamma > 1",
    ),
    "reweight": _Strength("gamma", lambda gamma: 0.0 < gamma < math.inf, "a finite number above 0"),
    "raise": _Strength("psi", lambda psi: 0.0 < psi < 1.0, "a number between 0 and 1"),
    "gate": _Strength(
        "factor", lambda factor: 0.0 <= factor < math.inf, "a finite number of at least 0"
    ),
    "temperature": _Strength(
        "factor", lambda factor: 0.0 < factor < math.inf, "a finite number above 0"
    ),
}


def validation_line(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return the first problem of a pydantic error as one line, with its place.

    Args:
        error: What pydantic found.
        model: What was validated, to name the nearest of its keys where one is unknown.
    """
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = re.sub(r"^\w+ should (be|have)", "expected", message)
    if first["type"] == "extra_forbidden":
        known = _keys_at(model, first["loc"][:-1]) if model is not None else []
        message = f"unknown key{suggestion(str(first['loc'][-1]), known)}"
    elif first["type"] == "missing":
        message = "is missing; expected it beside the others"
    elif message.startswith("expected") and first["type"] != "value_error":  # those are ours
        message = f"found {_found(first['input'])}, {message}"
    if first["type"] == "literal_error":
        known = re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
        message += suggestion(str(first["input"]), known)
    return f"{place}: {message}" if place else message


def _keys_at(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Return the keys that a place in a model takes; of a union, those of all its members."""
    models = [model]
    for part in location:
        fields = [one.model_fields[part] for one in models if part in one.model_fields]
        if fields:  # else a place in a list, or the tag of a union's member
            models = [found for field in fields for found in _models_in(field.annotation)]
    return [key for one in models for key in one.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - a type, or a form of one
    # Python 3.10 takes list[int] for a class, which issubclass() then refuses.
    if get_origin(annotation) is None and isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for part in get_args(annotation) for found in _models_in(part)]


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
    """Mass map of one head: how the total attention on its target changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mass: Literal["damp", "reweight", "raise", "gate", "temperature"] = "damp"
    """``damp``: m' = beta m (paper, equation of section 4). ``reweight``: scale and renormalise.
    ``raise``: a mass below psi is scaled to psi, then renormalised (SpotLight). Of target ``head``:
    its output (``gate``) or its logits (``temperature``), times factor."""
    beta: float | None = None
    """Share of the target's mass that is kept by ``damp``; in [0, 1]; 0.4 unless told."""
    gamma: float | None = None
    """Factor on the target's columns before renormalising, for ``reweight``; above 0."""
    gamma_initial: float | None = None
    """The same for the initial token, of target ``both``; ``gamma`` is that of the sinks."""
    psi: float | None = None
    """Least mass on the target before renormalising, for ``raise``; between 0 and 1."""
    factor: float | None = None
    """On the output for ``gate``, at least 0; on the logits for ``temperature``, above 0."""

    @model_validator(mode="before")
    @classmethod
    def _fill_strength(cls, data: Any) -> Any:  # noqa: ANN401 - raw input of any shape
        if isinstance(data, dict) and data.get("mass", "damp") == "damp":
            return {"beta": 0.4, **{k: v for k, v in data.items() if v is not None}}
        return data

    @model_validator(mode="after")
    def _check_strength(self) -> HeadStrength:
        own = _STRENGTHS[self.mass]
        for mass, other in _STRENGTHS.items():
            if other.setting != own.setting and getattr(self, other.setting) is not None:
                raise ValueError(
                    f"{other.setting} belongs to mass {mass!r}; {self.mass!r} takes {own.setting}"
                )
        value = getattr(self, own.setting)
        if value is None or not own.fits(value):
            raise ValueError(f"{own.setting} is {value}, expected {own.expected}")
        initial = self.gamma_initial
        if initial is None:
            return self
        if self.mass != "reweight":
            raise ValueError(
                f"gamma_initial belongs to mass 'reweight'; {self.mass!r} takes {own.setting}"
            )
        if not own.fits(initial):
            raise ValueError(f"gamma_initial is {initial}, expected {own.expected}")
        return self

    @property
    def strength(self) -> float:
        """The one number of the map: beta, gamma (of ``both``: the sinks'), psi, or factor.

        Raises:
            CalibrationError: there is no such map.
        """
        if self.mass not in _STRENGTHS:
            raise CalibrationError(unknown_member("mass", self.mass))
        value: float = getattr(self, _STRENGTHS[self.mass].setting)
        return value


class Calibration(BaseModel):
    """All settings of the operation. Unknown keys and settings that do not apply are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    target: Literal["sinks", "initial", "both", "random", "last", "span", "head"] = "sinks"
    """``sinks``: the detected set. ``initial``: the first real token, without any detection.
    ``both``: these two, a strength each. ``random`` and ``last`` (controls): as many columns of the
    prompt as there are sinks, drawn or its last. ``span``: what stands between two markers of the
    prompt. ``head`` (a control): the head as a whole, by ``gate`` or ``temperature``."""
    count: int | Literal["sinks"] | None = None
    """Columns of target ``last``: as many as there are ``sinks`` (default), or a number."""
    draw: Literal["fixed", "anew"] | None = None
    """Columns of target ``random``: ``fixed`` (default) ranks a column by a hash of its token, its
    position and the head; ``anew`` by one of the whole prompt too: other columns in every prompt.
    Both are the same on every device and in every batch."""
    seed: int | None = None
    """Of the hash that draws for target ``random``; at least 0; 0 unless told."""
    markers: tuple[str, str] | None = None
    """Of target ``span``: the texts before and behind each piece of the prompt that is meant."""
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
    mass: Literal["damp", "reweight", "raise", "gate", "temperature"] = "damp"
    """Mass map of all heads that have none of their own (see :class:`HeadStrength`)."""
    beta: float | None = None
    """Strength of ``damp``; in [0, 1]."""
    gamma: float | None = None
    """Strength of ``reweight``; above 0."""
    gamma_initial: float | None = None
    """Strength of ``reweight`` on the initial token, of target ``both``; above 0."""
    psi: float | None = None
    """Strength of ``raise``; between 0 and 1."""
    factor: float | None = None
    """Strength of ``gate`` (at least 0) and of ``temperature`` (above 0)."""
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
        target = given.get("target", "sinks")
        if target == "last":
            given = {"count": "sinks", **given}
        elif target == "random":
            given = {"draw": "fixed", "seed": 0, **given}
        elif target == "span" and isinstance(given.get("markers"), list):  # as JSON and YAML do
            given["markers"] = tuple(given["markers"])
        if _counts_sinks(target, given.get("count")):
            given = {"rule": "relative", "protect": "initial", "min_rows": 1, **given}
            if given["rule"] == "relative":
                given = {"alpha": 5.0, **given}
        if given.get("mass", "damp") == "damp":
            given = {"beta": 0.4, **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        for name, target in _OWN_SETTINGS.items():
            if self.target != target and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to target {target!r}, this is {self.target!r}")
        if self.detects:
            self._check_detection()
        else:
            surplus = [name for name in _DETECTION if getattr(self, name) is not None]
            if surplus:
                which = f"count {self.count}" if self.target == "last" else repr(self.target)
                raise ValueError(f"{surplus[0]} belongs to target 'sinks'; {which} detects none")
        self._check_target()
        reason = self.misfit(self.strength_of_all)
        if reason:
            raise ValueError(reason)
        return self

    def _check_target(self) -> None:
        if isinstance(self.count, int) and self.count < 1:
            raise ValueError(f"count is {self.count}, expected at least 1 or 'sinks'")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, expected a whole number from 0 to 2**31 - 1")
        if self.target == "span" and not (self.markers and all(self.markers)):
            raise ValueError(
                "markers is missing or empty; target 'span' takes two texts: that before and that "
                "behind each piece of the prompt that is meant"
            )
        if self.decode == "running" and self.target not in ("sinks", "initial", "both"):
            raise ValueError(
                "decode 'running' finds the sinks of every row, which target "
                f"{self.target!r} cannot follow; it takes 'frozen' or 'off'"
            )

    @property
    def detects(self) -> bool:
        """Whether sinks are looked for: they are the target, or give the number of its columns."""
        return _counts_sinks(self.target, self.count)

    @property
    def strength_of_all(self) -> HeadStrength:
        """The mass map of all heads that have none of their own."""
        return HeadStrength(**{name: getattr(self, name) for name in HeadStrength.model_fields})

    def misfit(self, strength: HeadStrength) -> str:
        """Say in a line why a head of this calibration cannot have that mass map; "" if it can."""
        allowed = _MASSES.get(self.target, _COLUMN_MASSES)
        if strength.mass not in allowed:
            names = " or ".join(map(repr, allowed))
            return f"target {self.target!r} takes mass {names}, found {strength.mass!r}"
        if (self.target == "both") != (strength.gamma_initial is not None):
            return (
                "target 'both' takes gamma_initial beside gamma"
                if self.target == "both"
                else f"gamma_initial belongs to target 'both', this is {self.target!r}"
            )
        return ""

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
        return self.model_dump(mode="json", exclude_none=True)


def _counts_sinks(target: object, count: object) -> bool:
    return target in ("sinks", "both", "random") or (target == "last" and count == "sinks")


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
        raise CalibrationError(unknown_name(f"preset {name!r}", name, PRESETS))
    return PRESETS[name]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer is to do: its selected heads, and one mass map for each of them."""

    calibration: Calibration
    heads: tuple[int, ...]
    strengths: tuple[HeadStrength, ...]
    layer: int = 0
    """Number of the layer: target ``random`` draws other columns in every layer."""
    first_head: int = 0
    """Number of head 0 in the whole model, whose heads may be split over processes."""

    @classmethod
    def uniform(cls, calibration: Calibration, heads: tuple[int, ...]) -> LayerPlan:
        """Give every head the calibration's own mass map."""
        return cls(calibration, heads, (calibration.strength_of_all,) * len(heads))

    def part(self, first: int, count: int) -> LayerPlan:
        """Return the plan of ``count`` heads from ``first`` on, which are numbered from 0 there."""
        own = [
            (head - first, strength)
            for head, strength in zip(self.heads, self.strengths, strict=True)
            if first <= head < first + count
        ]
        return replace(
            self,
            heads=tuple(head for head, _ in own),
            strengths=tuple(strength for _, strength in own),
            first_head=self.first_head + first,
        )
