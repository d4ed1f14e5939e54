"""Recipes: everything that decides what a search finds, in one validated file.

A recipe is YAML with the fields of :class:`Recipe`; unknown keys are errors. The hash of what it
measures names the ledger: a recipe that would measure anything else never continues an old one's
measurements, one that only selects differently measures nothing twice. Where the model comes
from, how it is batched in memory and where files go are the command's business, not the recipe's,
with one exception: ``chunk_tokens`` and ``pack_tokens`` decide how sums are rounded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from act_harness.artifact import ModelFacts
from act_harness.calibration import (
    Calibration,
    HeadStrength,
    LayerPlan,
    preset,
    validation_line,
)
from act_harness.errors import ActHarnessError, RecipeError, suggestion
from act_harness.search.recipe_sections import (
    STRICT,
    Controls,
    ExpectedModel,
    GradientMethod,
    JointRule,
    Seed,
    SignificantRule,
    TopRule,
)
from act_harness.support import reading
from act_harness.support.atomic import canonical_json
from act_harness.support.paths import recipes_path
from act_harness.support.provenance import sha256_text

__all__ = [
    "OF_SINGLE_HEADS",
    "Recipe",
    "load_recipe",
    "make_recipe",
    "shipped_recipes",
]

_logger = logging.getLogger(__name__)

_SIZES = {"chunk_tokens": 2048, "screen_tokens": 1024, "pack_tokens": 2048}
_GPU_SIZES = {"chunk_tokens": 8192, "screen_tokens": 4096, "pack_tokens": 32768}
_GPU_STEP = {"chunk_tokens": 32768}
"""Of method ``gradient``, at most: what a backward keeps must fit; see ``by_gradient``."""

_SAMPLES = 100
"""Documents of a task and split, where a recipe does not say."""

OF_SINGLE_HEADS = ("strengths", "keep", "rule", "top", "significant", "joint", "screen_tokens",
                    "pack_tokens")  # fmt: skip
"""Settings of the methods that measure one head at a time."""


class Recipe(BaseModel):
    """What to search for, and how.

    Every field that decides what is measured is part of the ledger's key; how heads are selected
    from the measurements is not, so that another rule costs no second search.
    """

    model_config = STRICT

    name: str = Field(default="search", min_length=1)
    """Name of the artifact."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """lm-eval tasks or groups of type multiple choice, stock or our own."""
    expect: ExpectedModel = ExpectedModel()
    """Facts about the model that must hold."""

    samples: int = Field(default=_SAMPLES, ge=2)
    """Documents per task to measure heads on (split ``search``)."""
    verify_samples: int = Field(default=_SAMPLES, ge=0)
    """Documents per task to choose among head sets on (split ``verify``); fewer if a task has no
    more. 0 only with rules that need none. Method ``gradient`` takes four times ``samples`` where
    that is less and nothing was said: they would cost more than tuning."""
    judge_samples: int | None = Field(default=None, ge=0)
    """Documents per task that say what the chosen set is worth (split ``judge``), beside the
    untouched model and the random sets; null: as many as ``verify_samples``, 100 where those are
    fewer by default. A task with too few for both has half of the rest each. 0: the set is not
    judged."""
    seed: Seed = 1234
    """Of the draw of documents."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; null: each task's own number."""
    fewshot_seed: Seed = 1234
    """Of the choice of examples; lm-eval's own default."""
    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template. Sinks sit on template tokens too."""
    fewshot_as_multiturn: bool = False
    """With a chat template: examples as turns."""
    system_instruction: str | None = None
    """Text of the system message."""

    calibration: Calibration = Calibration()
    """A preset's name (``paper``, ``release``) or settings."""
    strengths: tuple[HeadStrength, ...] = ()
    """Mass maps to try on every head, each head keeps its best; empty: the calibration's own."""
    layers: Literal["all", "release"] | tuple[int, int] = "all"
    """``all``, ``release`` (2 to L-2, as the authors' code), or [first, last]."""
    heads: Literal["all"] | tuple[int, int] = "all"
    """``all`` or [first, last] within each layer."""
    engine: str = "auto"
    """What computes calibrated attention."""

    method: Literal["exhaustive", "screened", "gradient"] = "exhaustive"
    """``exhaustive`` measures every head; ``screened`` only the best by a first-order estimate;
    ``gradient`` tunes a strength of every head, all together."""
    keep: float = Field(default=0.15, gt=0, le=1)
    """Share of the heads that ``screened`` measures exactly."""
    objective: Literal["margin", "corrected", "entropy"] = "margin"
    """``margin``: log-likelihood of the right choice minus the best wrong one's. ``corrected``: the
    same after subtracting each choice's mean over the task's search documents, in both arms. Method
    ``gradient`` takes the cross-entropy of either, or ``entropy``, which needs no labels."""
    rule: Literal["top", "paper", "significant", "joint"] = "top"
    """How heads are selected; see the models below."""
    top: TopRule = TopRule()
    significant: SignificantRule = SignificantRule()
    joint: JointRule = JointRule()
    gradient: GradientMethod = GradientMethod()
    controls: Controls = Controls()

    chunk_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens of a chunk of documents: bounds the memory of the kept layer inputs. null, here
    and below: by the kind of device (``Recipe.on``)."""
    screen_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens of a backward pass of the screen, whose activations are all kept."""
    pack_tokens: int | None = Field(default=None, ge=1)
    """Rows (variants x rows) of a packed forward."""

    @field_validator("calibration", mode="before")
    @classmethod
    def _read_calibration(cls, value: Any) -> Any:  # noqa: ANN401 - raw input
        try:
            if isinstance(value, str):
                return preset(value)
            if isinstance(value, dict):
                return Calibration(**value)
        except ActHarnessError as error:
            raise ValueError(str(error).removeprefix("calibration: ")) from None
        return value

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task(cls, value: Any) -> Any:  # noqa: ANN401 - raw input
        # A tuple: behind a validator like this one strict types take no list for it.
        given = [value] if isinstance(value, str) else value
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks names one twice: {list(self.tasks)}")
        if len(set(self.strengths)) != len(self.strengths):
            raise ValueError("strengths names one twice")
        self._check_method()
        if self.rule in ("top", "joint") and self.verify_samples < 2:
            raise ValueError(
                f"verify_samples is {self.verify_samples}, rule {self.rule!r} needs at least 2; "
                "with rule 'paper' or 'significant' it may be 0"
            )
        if self.judge_samples == 1:
            raise ValueError("judge_samples is 1, expected 0 (not judged), or 2 or more")
        for name in ("layers", "heads"):
            span = getattr(self, name)
            if isinstance(span, tuple) and not 0 <= span[0] <= span[1]:
                raise ValueError(f"{name} is {list(span)}, expected [first, last], counted from 0")
        return self

    def _check_method(self) -> None:
        """Refuse settings that the method would not read."""
        if self.method != "gradient":
            if "gradient" in self.model_fields_set:
                raise ValueError(
                    f"gradient belongs to method 'gradient', not to {self.method!r}; give that "
                    "method or leave it out"
                )
            if self.objective == "entropy":
                raise ValueError(
                    "objective 'entropy' belongs to method 'gradient'; give that method, or "
                    "objective 'margin' or 'corrected'"
                )
            return
        surplus = [name for name in OF_SINGLE_HEADS if name in self.model_fields_set]
        if surplus:
            raise ValueError(f"{surplus[0]} does nothing with method 'gradient'; leave it out")
        if self.calibration.decode == "running":
            raise ValueError("method 'gradient' takes decode 'frozen' or 'off', not 'running'")

    def on(self, device: str) -> Recipe:
        """Return the recipe with its sizes written out for a kind of device (``cpu``, ``cuda``).

        Small ones fill a processor core and spare memory; a GPU needs more rows at a time. With
        the sizes for ``cuda`` a 7B model in bf16 keeps about 13 GB of layer inputs beside its
        weights; lower ``chunk_tokens`` and ``screen_tokens`` where that is too much.
        """
        sizes = _GPU_SIZES if device.split(":")[0] == "cuda" else _SIZES
        if sizes is _GPU_SIZES and self.method == "gradient":
            sizes = {**sizes, **_GPU_STEP}
        own = {key: value for key, value in sizes.items() if getattr(self, key) is None}
        return self.model_copy(update=own)

    def size(self, key: Literal["chunk_tokens", "screen_tokens", "pack_tokens"]) -> int:
        """Return a size, the CPU's where it was left to the device."""
        given: int | None = getattr(self, key)
        return _SIZES[key] if given is None else given

    def tuned_calibration(self) -> Calibration:
        """Return the calibration that method ``gradient`` tunes strengths of, itself neutral.

        Raises:
            RecipeError: its settings do not fit the target.
        """
        own = self.calibration.settings()
        was = self.calibration.target
        target = self.gradient.target or (self.calibration.mass if was == "head" else was)
        if target == "span":
            raise RecipeError(
                "method 'gradient' does not know where spans are; take target 'sinks' or another"
            )
        for name in ("beta", "gamma", "gamma_initial", "psi", "factor"):
            own.pop(name, None)
        if target != was:
            for name in ("count", "draw", "seed", "markers"):
                own.pop(name, None)
        if target in ("initial", "gate", "temperature"):
            own = {"decode": own["decode"]}
        if target in ("gate", "temperature"):
            return Calibration(**{**own, "target": "head", "mass": target, "factor": 1.0})
        gammas = {"gamma": 1.0, **({"gamma_initial": 1.0} if target == "both" else {})}
        return Calibration(**{**own, "target": target, "mass": "reweight", **gammas})

    def judge_documents(self) -> int:
        """Return how many documents per task judge the chosen set."""
        return self.verify_samples if self.judge_samples is None else self.judge_samples

    def mass_maps(self) -> tuple[HeadStrength, ...]:
        """Return the mass maps to try on every head."""
        return self.strengths or (self.calibration.strength_of_all,)

    @property
    def plan(self) -> LayerPlan:
        """What is done to a layer, without its heads: what an engine must compute."""
        return LayerPlan(self.calibration, (), self.mass_maps())

    def grid(self, facts: ModelFacts) -> dict[int, tuple[int, ...]]:
        """Return the heads to search by layer.

        Raises:
            RecipeError: the model is another than expected, or a range does not fit it.
        """
        for key, want in self.expect.model_dump(exclude_none=True).items():
            have = getattr(facts, key)
            if have is not None and have != want:
                raise RecipeError(
                    f"recipe {self.name!r} is for a model with {key} {want}, {facts.id!r} has "
                    f"{have}; take the recipe of that model or change its 'expect'"
                )
        count, heads = facts.num_hidden_layers, facts.num_attention_heads
        if isinstance(self.layers, tuple):
            first, last = self.layers
        else:
            first, last = (0, count - 1) if self.layers == "all" else (2, count - 2)
        if not 0 <= first <= last < count:
            raise RecipeError(
                f"layers {first} to {last} are asked for, {facts.id!r} has layers 0 to {count - 1}"
            )
        low, high = (0, heads - 1) if isinstance(self.heads, str) else self.heads
        if high >= heads:
            raise RecipeError(
                f"heads {low} to {high} are asked for, {facts.id!r} has heads 0 to {heads - 1}"
            )
        return {layer: tuple(range(low, high + 1)) for layer in range(first, last + 1)}

    def content(self) -> dict[str, Any]:
        """Return the recipe as plain values, defaults written out."""
        content = self.model_dump(mode="json", exclude={"calibration", "strengths"})
        content["calibration"] = self.calibration.settings()
        content["strengths"] = [s.model_dump(exclude_none=True) for s in self.strengths]
        for key in OF_SINGLE_HEADS if self.method == "gradient" else ("gradient",):
            del content[key]
        return content

    def sha256(self) -> str:
        """Return the hash of everything but the name."""
        content = self.content()
        del content["name"]
        return sha256_text(canonical_json(content))

    def measured(self) -> dict[str, Any]:
        """Return the fields that decide what is measured: the ledger's part of the recipe.

        Without the name, the rule, its settings, the controls and what judges. An exhaustive search
        measures the same whatever the objective is; a screened one keeps other heads.
        """
        content = self.content()
        chooses = ("rule", "top", "significant", "joint")
        for key in ("name", "expect", *chooses, "controls", "judge_samples"):
            content.pop(key, None)
        if self.method == "exhaustive":
            for key in ("objective", "keep", "screen_tokens"):
                del content[key]
        return content


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    root = recipes_path()
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.yaml"))
    }


def load_recipe(reference: str | Path, **changes: Any) -> Recipe:  # noqa: ANN401 - recipe fields
    """Read a recipe from a YAML file, or by the name of a shipped one, and apply changes.

    ``gradient`` changes single settings of that method. A change of ``method`` leaves out what the
    file sets for its own method alone, with a warning.

    Raises:
        RecipeError: not found, not YAML, or a field is unknown or out of range.
    """
    path = Path(reference)
    if not reading.is_file(path):
        shipped = shipped_recipes()
        if str(reference) not in shipped:
            hint = reading.nearest_beside(path, "*.yaml") or suggestion(str(reference), shipped)
            hint = hint or f"; shipped are {', '.join(shipped)}"
            raise RecipeError(f"recipe {str(reference)!r} is neither a file nor shipped{hint}")
        path = shipped[str(reference)]
    advice = "expected a recipe as those in search/recipes"
    content = reading.read_yaml(path, error=RecipeError, advice=advice)
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} holds no settings; expected 'tasks: [...]' and others")
    left: list[str] = []
    if changes.get("method") not in (None, content.get("method")):
        unread = OF_SINGLE_HEADS if changes["method"] == "gradient" else ("gradient",)
        left = [key for key in unread if key in content]
        content = {key: value for key, value in content.items() if key not in left}
    given, change = content.get("gradient"), changes.get("gradient")
    if isinstance(given, dict) and isinstance(change, dict):
        changes["gradient"] = {**given, **change}
    recipe = make_recipe({**content, **changes}, source=f"recipe {path}")
    if left:
        _logger.warning(
            "recipe %s: %s left out, which method %s does not read",
            path.stem, ", ".join(left), recipe.method,
        )  # fmt: skip
    return recipe


def make_recipe(content: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate the fields of a recipe.

    Raises:
        RecipeError: a field is unknown, missing, or out of range.
    """
    unknown = [key for key in content if key not in Recipe.model_fields]
    if unknown:
        hint = suggestion(str(unknown[0]), Recipe.model_fields)
        raise RecipeError(f"{source} has the unknown key {unknown[0]!r}{hint}")
    try:
        found = reading.validated(Recipe, content)
        few = 4 * found.samples
        if found.method == "gradient" and "verify_samples" not in content and few < _SAMPLES:
            own = {"judge_samples": _SAMPLES, **content, "verify_samples": few}
            found = reading.validated(Recipe, own)
    except ValidationError as error:
        raise RecipeError(f"{source}: {validation_line(error, Recipe)}") from None
    return found
