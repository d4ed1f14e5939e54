"""Sections of a recipe: the rules, the gradient method, the controls, the expected model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from act_harness.support.checks import LARGEST_SEED

__all__ = [
    "STRICT",
    "Controls",
    "ExpectedModel",
    "GradientMethod",
    "JointRule",
    "Seed",
    "SignificantRule",
    "TopRule",
]

STRICT = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
"""Of every section: unknown keys are errors."""

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
"""As ``--seed`` takes it."""


class TopRule(BaseModel):
    """Rule ``top``: the k best heads, k chosen on ``verify``."""

    model_config = STRICT

    sizes: tuple[int, ...] = (5, 10, 20, 40, 80, 120, 160)
    """Values of k to try; those above the number of heads with a positive effect are left out."""
    criterion: Literal["accuracy", "margin"] = "accuracy"
    """What decides between them on ``verify``: mean accuracy over the tasks (label-prior corrected
    where the objective is), or the mean standardised change of the answer margin."""
    refit: bool = False
    """Once k is chosen, order the heads anew by their effect on the documents of both splits, and
    take the k best of that order. It measures every head on ``verify`` too."""

    @field_validator("sizes")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 1:
            raise ValueError(f"sizes are {list(value)}, expected whole numbers above 0")
        return tuple(sorted(set(value)))


class SignificantRule(BaseModel):
    """Rule ``significant``: heads whose paired margin change holds under Benjamini-Hochberg."""

    model_config = STRICT

    q: float = Field(default=0.05, gt=0, lt=1)
    """Accepted share of false discoveries."""


class JointRule(BaseModel):
    """Rule ``joint``: grow the set in order of effect while ``verify`` improves, then prune."""

    model_config = STRICT

    candidates: int = Field(default=40, ge=1)
    """How many of the best heads are tried, in order."""
    patience: int = Field(default=8, ge=1)
    """Stop growing after this many heads in a row that did not help."""


class GradientMethod(BaseModel):
    """Method ``gradient``: a strength for every head, all tuned together on ``search``."""

    model_config = STRICT

    target: Literal["sinks", "initial", "both", "random", "last", "gate", "temperature"] | None = (
        None
    )
    """What the strengths act on; null: the calibration's own target. ``gate`` and ``temperature``
    are controls that scale a head's output or its logits."""
    signs: Literal["both", "damp", "amplify"] = "both"
    """Whether a head's target columns may lose weight, gain it, or either."""
    epochs: int = Field(default=12, ge=1)
    """Passes over the search documents; ``verify`` chooses after which of them to stop. It
    is looked at after each, or after every few where it has many more documents."""
    rate: float = Field(default=0.08, gt=0)
    """First step size of Adam; it falls to 0 along a cosine."""
    penalties: tuple[float, ...] = (2e-4,)
    """Factors on the sum of the strengths' sizes, of which ``verify`` chooses one; a run each."""
    batch: int = Field(default=24, ge=2)
    """Documents of each task in a step; a task's last batches share what is left over."""
    restarts: int = Field(default=1, ge=1)
    """Runs for each penalty: the first from no strength, others from small random ones."""
    criterion: Literal["accuracy", "margin"] = "accuracy"
    """What ``verify`` chooses by, as rule ``top`` has it; ``entropy`` chooses by itself."""
    sizes: tuple[int, ...] = (10, 40, 160)
    """Numbers of heads to try on ``verify``, the strongest ones; all of them are tried too."""
    checkpointing: bool | None = None
    """Compute layers again in the backward pass instead of keeping what they computed; null: where
    the kept would take more than half of the device's memory."""
    tf32: bool = True
    """Tune and choose with TF32 products where a float32 model is on CUDA. What ``judge`` and any
    evaluation say is computed in full either way."""

    @field_validator("penalties")
    @classmethod
    def _not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0.0 <= one < float("inf") for one in value):
            raise ValueError(f"penalties are {list(value)}, expected finite numbers of at least 0")
        return tuple(dict.fromkeys(value))

    @field_validator("sizes")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value and min(value) < 1:
            raise ValueError(f"sizes are {list(value)}, expected whole numbers above 0")
        return tuple(sorted(set(value)))


class Controls(BaseModel):
    """What the found set is held against."""

    model_config = STRICT

    random_sets: int = Field(default=19, ge=0)
    """Random head sets of the same size, measured on ``judge``. To come first among R of them is a
    test at the level 1/(R+1): 19 give 5 %. Method ``gradient`` has none, unless they are asked for,
    where they would cost more than tuning."""
    seed: Seed = 0
    """Of their draw."""


class ExpectedModel(BaseModel):
    """The model a recipe was written for; given fields must match the model at hand."""

    model_config = STRICT

    architecture: str | None = None
    """Class name, for example ``LlamaForCausalLM``."""
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    weights_sha256: str | None = None
