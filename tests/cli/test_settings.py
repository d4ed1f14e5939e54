"""No setting does nothing: every field of every class of settings is read where a run uses it."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from act_harness.bench.scoring import ScoringSettings
from act_harness.calibration import Calibration
from act_harness.cli import app as cli
from act_harness.evidence.comparison import Settings as ComparisonSettings
from act_harness.exploration.command import ExploreSettings, ModelSettings, SinksSettings
from act_harness.harness.eval_settings import EvalSettings
from act_harness.mtbench.chat.settings import ChatSettings
from act_harness.mtbench.judge import JudgeSettings
from act_harness.regress import RegressSettings
from act_harness.regress.suite import ModelSource, Suite, Variation
from act_harness.search import Recipe, SearchSettings
from act_harness.search.methods.command import MethodsSettings
from act_harness.search.prompting import Prompting
from act_harness.search.recipe_sections import Controls, JointRule, SignificantRule, TopRule
from act_harness.tracking.tracker import TrackingSettings

PACKAGE = Path(cli.__file__).parents[1]
CLASSES = (
    ScoringSettings, Calibration, ComparisonSettings, ChatSettings, Prompting, EvalSettings,
    JudgeSettings, RegressSettings, ModelSource, Suite, Variation, Recipe, SearchSettings, Controls,
    JointRule, SignificantRule, TopRule, TrackingSettings, ExploreSettings, MethodsSettings,
    ModelSettings, SinksSettings,
)  # fmt: skip

OF_THE_RECORD = {
    "Suite.description": "for the reader of the file",
}
"""Fields that are written for people and decide nothing."""

STRENGTHS = {"damp": "beta", "reweight": "gamma", "raise": "psi"}
"""Fields that are read by the name in a table: ``HeadStrength.strength``."""


def fields_of(kind: type) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind.model_fields)


class Reads(ast.NodeVisitor):
    """Names that are read as attributes, or by ``getattr`` and mappings of names, by class.

    A read inside the class that checks the field (``__post_init__``, a validator) does not count.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.checking = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        checks = node.name == "__post_init__" or any(
            "validator" in ast.unparse(one) for one in node.decorator_list
        )
        self.checking += checks
        self.generic_visit(node)
        self.checking -= checks

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and not self.checking:
            self.found[node.attr] += 1
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and not self.checking:
            self.found[f"'{node.value}'"] += 1


def test_every_field_of_every_settings_class_is_read():
    reads = Reads()
    for file in PACKAGE.rglob("*.py"):
        reads.visit(ast.parse(file.read_text(encoding="utf-8")))
    unread = [
        f"{kind.__name__}.{name}"
        for kind in CLASSES
        for name in fields_of(kind)
        if not reads.found[name] and f"{kind.__name__}.{name}" not in OF_THE_RECORD
    ]
    assert set(unread) <= {f"Calibration.{name}" for name in STRENGTHS.values()}


@pytest.mark.parametrize("mass", STRENGTHS)
def test_a_strength_is_read_by_its_name(mass):
    calibration = Calibration(mass=mass, **{STRENGTHS[mass]: 0.37})
    assert calibration.strength_of_all.strength == 0.37


def test_the_list_of_classes_is_whole():
    named = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Settings")
    }
    listed = {kind.__name__ for kind in CLASSES}
    assert named - listed == set()


class Watched:
    """A stand-in for settings that notes which fields are read."""

    def __init__(self, settings: object) -> None:
        self.__dict__["_settings"], self.__dict__["read"] = settings, set()

    def __getattr__(self, name: str) -> object:
        self.read.add(name)
        kind = type(self._settings)
        found = getattr(kind, name, None)
        if isinstance(found, property):  # whose own reads count too
            return found.fget(self)
        if callable(found) and hasattr(found, "__get__"):
            return found.__get__(self)
        return getattr(self._settings, name)


@pytest.fixture
def unchecked(monkeypatch):
    for module in ("harness.evaluate", "search.command", "regress.run"):
        monkeypatch.setattr(f"act_harness.{module}.check_kind", lambda *given: None)


def unread(watched: Watched) -> set[str]:
    return set(fields_of(type(watched._settings))) - watched.read


def test_a_run_of_eval_reads_every_setting(unchecked, tiny_checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    from own_tasks import few_tasks, write_own_tasks

    from act_harness.harness.evaluate import run_eval

    own = write_own_tasks(tmp_path / "own", "one")
    watched = Watched(
        EvalSettings(
            tasks=("one",), include_path=(own,), pretrained=tiny_checkpoint, artifact="none",
            device="cpu", samples={"one": [0]}, output=tmp_path / "out", metadata={"a": 1},
        )
    )  # fmt: skip
    with few_tasks():
        run_eval(watched)
    assert unread(watched) == set()


def test_a_search_reads_every_setting(unchecked, tiny_checkpoint, tmp_path, monkeypatch):
    from act_harness.harness.task_lookup import TaskSelection
    from act_harness.search import command as settings
    from act_harness.search import search_from_settings

    class StopError(Exception):
        pass

    def stop(*given, **named):
        raise StopError

    monkeypatch.setattr(
        "act_harness.harness.task_lookup.find_tasks",
        lambda tasks, **more: TaskSelection(None, tuple(tasks)),
    )
    monkeypatch.setattr(settings, "search_documents", lambda *given, **more: [])
    monkeypatch.setattr(settings, "run_search", stop)
    made = {"pretrained": tiny_checkpoint, "device": "cpu", "tasks": ("a",)}
    watched = Watched(SearchSettings(**made, output=tmp_path / "a.json"))
    with pytest.raises(StopError):
        search_from_settings(watched)
    # read once there is a result: by the callback's choice, and after it
    assert unread(watched) <= {"plots"}
