"""The hook behind ``lm_eval --model hf-act``: it registers once, and never breaks anything.

The tests run in processes of their own, because the hook acts on imports. Two of them import the
real torch and lm-eval; the others use a stand-in of lm-eval with the same import behaviour.
"""

from __future__ import annotations

import json
import shutil
import textwrap

import pytest
from installed import REPOSITORY, python, write_metadata

REGISTRY = '''
class Registry:
    """Keeps lm-eval's rule: an alias is never given a second target."""
    def __init__(self):
        self.entries = {}
    def register(self, alias, target=None):
        if self.entries.get(alias, target) != target:
            raise ValueError(f"alias {alias!r} already registered")
        self.entries[alias] = target
    def __contains__(self, alias):
        return alias in self.entries
    def __len__(self):
        return len(self.entries)
model_registry = Registry()
def get_model(name):
    if len(model_registry) == 0:
        import lm_eval.models
    if name not in model_registry:
        raise ValueError(f"Attempted to load model {name!r}")
    return model_registry.entries[name]
'''
MODELS = """
from lm_eval.api.registry import model_registry
for name in ("hf", "dummy"):
    if name not in model_registry:
        model_registry.register(name, target=f"lm_eval.models.{name}:X")
"""
DISCOVERY = """
from importlib.metadata import entry_points
for entry in entry_points(group="lm_eval.models"):
    model_registry.register(entry.name, target=entry)
"""


@pytest.fixture
def stand_in(tmp_path):
    """Return a function that writes a stand-in lm-eval and returns the folder to import from."""

    def write(models: str = MODELS, registry: str = REGISTRY):
        root = tmp_path / "stand-in"
        for name, text in (("api/registry", registry), ("models/__init__", models)):
            file = root / "lm_eval" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (root / "lm_eval/__init__.py").touch()
        (root / "lm_eval/api/__init__.py").touch()
        return root

    return write


def run(script: str, *path, **environment):
    done = python("-c", textwrap.dedent(script), path=path, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hook_registers_after_the_import_and_is_gone(stand_in):
    answer = run(
        """
        import importlib.util, json, sys
        from act_harness import plugin
        plugin.install(); plugin.install()
        waiting = sum(type(f).__module__ == "act_harness.plugin" for f in sys.meta_path)
        importlib.util.find_spec("lm_eval.models")  # looking it up is not importing it
        still = plugin.installed()
        from lm_eval.api.registry import get_model
        found = get_model("hf-act")
        import lm_eval.models as m
        print(json.dumps([waiting, still, found, get_model("hf"), plugin.installed(),
            type(m.__loader__).__name__, type(m.__spec__.loader).__name__, plugin.failures(),
            "act_harness.model" in sys.modules, "torch" in sys.modules]))
        """,
        stand_in(),
        REPOSITORY,
    )
    loader = "SourceFileLoader"
    target = "act_harness.model:CalibratedHFLM"
    expected = [1, True, target, "lm_eval.models.hf:X", False, loader, loader, [], False, False]
    assert answer == expected


def test_hook_registers_at_once_where_lm_eval_came_first(stand_in):
    answer = run(
        """
        import json, lm_eval.models
        from lm_eval.api.registry import get_model
        from act_harness import plugin
        plugin.install(); plugin.install()
        print(json.dumps([get_model("hf-act"), plugin.installed()]))
        """,
        stand_in(),
        REPOSITORY,
    )
    assert answer == ["act_harness.model:CalibratedHFLM", False]


def test_hook_leaves_the_name_to_an_lm_eval_that_discovers_plugins(stand_in, tmp_path):
    """lm-eval may look for plug-ins when its table is filled, or only when a model is asked for."""
    script = """
        import json
        from act_harness import plugin
        plugin.install()
        from lm_eval.api.registry import get_model
        found = get_model("hf-act")
        print(json.dumps([type(found).__name__, found.value, plugin.failures()]))
        """
    installed = write_metadata(tmp_path / "site")
    eager = run(script, stand_in(models=MODELS + DISCOVERY), installed, REPOSITORY)
    lazily = textwrap.indent(DISCOVERY, "    ")
    late = REGISTRY.replace("    if name not in", f"{lazily}    if name not in")
    assert late != REGISTRY
    lazy = run(script, stand_in(registry=late), installed, REPOSITORY)
    assert eager == lazy == ["EntryPoint", "act_harness.model:CalibratedHFLM", []]


def test_register_helps_where_discovery_cannot(stand_in):
    """In a bare checkout there is no entry point to discover; `act-harness run` still works."""
    root = stand_in(models=MODELS + DISCOVERY)
    answer = run(
        """
        import json
        from act_harness import plugin
        first, second = plugin.register(), plugin.register()
        from lm_eval.api.registry import get_model
        print(json.dumps([first, second, str(get_model("hf-act"))]))
        """,
        root,
        without_metadata(root),
    )
    assert answer == [True, False, "act_harness.model:CalibratedHFLM"]


def without_metadata(folder):
    """Hide an installed act-harness: the first metadata of a name on the path is the only one."""
    info = folder / "act_harness-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: act-harness\nVersion: 0.0.0\n")
    return REPOSITORY


@pytest.mark.parametrize(
    ("registry", "models"),
    [
        ("nothing = None\n", "ready = True\n"),
        (REGISTRY.replace("self.entries[alias] = target", "raise RuntimeError(alias)"), "\n"),
    ],
    ids=["no-registry", "registry-refuses"],
)
def test_lm_eval_survives_a_registration_that_fails(stand_in, registry, models):
    failures = run(
        """
        import json
        from act_harness import plugin
        plugin.install()
        import lm_eval.models
        print(json.dumps(plugin.failures()))
        """,
        stand_in(models=models, registry=registry),
        REPOSITORY,
    )
    assert len(failures) == 1


def test_hook_waits_on_when_the_import_fails(stand_in):
    answer = run(
        """
        import json, os
        from act_harness import plugin
        plugin.install()
        try:
            import lm_eval.models
        except ZeroDivisionError:
            waiting = plugin.installed()
        os.environ["MENDED"] = "1"
        from lm_eval.api.registry import get_model
        print(json.dumps([waiting, get_model("hf-act")]))
        """,
        stand_in(models="import os\n'MENDED' in os.environ or 1 / 0\n" + MODELS),
        REPOSITORY,
    )
    assert answer == [True, "act_harness.model:CalibratedHFLM"]


BROKEN = {
    "raises": "raise RuntimeError('broken')\n",
    "syntax": "def install(:\n",
    "absent": None,
    "no-install": "\n",
    "install-raises": "def install():\n    raise OSError('broken')\n",
}


def broken_copy(folder, text):
    """Copy the package with a plugin module of the given text, and its metadata."""
    shutil.copytree(
        REPOSITORY / "act_harness",
        folder / "act_harness",
        ignore=shutil.ignore_patterns("__pycache__", "plugin.py"),
    )
    if text is not None:
        (folder / "act_harness/plugin.py").write_text(text)
    return write_metadata(folder)


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_stays_behind_its_entry_point(tmp_path, text):
    """What torch does with an entry point: load it, call it, and give up on any exception."""
    loaded = run(
        """
        import json
        from importlib.metadata import entry_points
        own = [e for e in entry_points(group="torch.backends") if "act_harness" in e.value]
        print(json.dumps([entry.load()() for entry in own]))
        """,
        broken_copy(tmp_path, text),
    )
    assert loaded == [None]


@pytest.mark.slow
def test_a_broken_plugin_cannot_break_import_torch(tmp_path):
    answer = run(
        """
        import json, sys, torch
        print(json.dumps([torch.ones(2).sum().item(), "act_harness.autoload" in sys.modules]))
        """,
        broken_copy(tmp_path, BROKEN["syntax"]),
    )
    assert answer == [2.0, True]  # torch works, and the broken plug-in was really tried


@pytest.mark.slow
def test_torch_and_lm_eval_for_real(tmp_path):
    """The route of the literal command: torch first, then the first look at an empty table."""
    answer = run(
        """
        import json, sys
        import torch
        own = sorted(name for name in sys.modules if name.startswith("act_harness"))
        heavy = [name for name in ("lm_eval", "transformers", "datasets") if name in sys.modules]
        from lm_eval.api.registry import get_model, model_registry
        stock = get_model("hf")
        target = model_registry._objs["hf-act"]
        from act_harness import plugin
        print(json.dumps([own, heavy, stock.__module__, target, plugin.installed()]))
        """,
        write_metadata(tmp_path),
        REPOSITORY,
    )
    own, heavy, stock, target, waiting = answer
    assert own == [
        "act_harness",
        "act_harness._version",
        "act_harness.autoload",
        "act_harness.plugin",
    ]
    assert heavy == []
    assert stock == "lm_eval.models.huggingface"
    assert target == "act_harness.model:CalibratedHFLM"
    assert not waiting


@pytest.mark.slow
def test_torch_can_be_told_to_leave_us_out(tmp_path):
    answer = run(
        """
        import json, sys, torch
        print(json.dumps([name for name in sys.modules if name.startswith("act_harness")]))
        """,
        write_metadata(tmp_path),
        REPOSITORY,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert answer == []
