"""How ``lm_eval --model hf-act`` finds the model, with no change to lm-eval.

lm-eval releases after 0.4.13 read the entry-point group ``lm_eval.models`` themselves. Release
0.4.13 does not, so :func:`install`, called through :mod:`act_harness.autoload` whenever torch is
imported, waits for the import of ``lm_eval.models`` and adds one line to its table of lazy models
right after it. It waits, instead of registering at once, because lm-eval fills an empty table on
first use and only then: an early entry would make ``--model hf`` unknown.

What it does not do: it imports neither torch nor transformers nor the model class, it registers
no tasks (those lie as data files in lm-eval's own folder), and it does nothing at all once lm-eval
finds plug-ins by itself. Known gap: with ``--seed`` set to ``None`` for torch, lm-eval looks the
model up before anything imports torch; ``act-harness run`` has no such gap.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = [
    "MODEL_NAME",
    "MODEL_TARGET",
    "MODULE_AWAITED",
    "install",
    "installed",
    "lookup",
    "register",
]

MODEL_NAME = "hf-act"
"""The name behind ``--model``."""

MODEL_TARGET = "act_harness.model:CalibratedHFLM"
"""Where lm-eval finds the class, when it is asked for: ``module:attribute``."""

MODULE_AWAITED = "lm_eval.models"
"""The module whose import fills lm-eval's table of models."""


_failures: list[str] = []  # what the hook kept to itself, for failures()


def install() -> None:
    """Register the model now if lm-eval's table is filled, else as soon as it is.

    Calling it twice changes nothing.
    """
    if MODULE_AWAITED in sys.modules:
        register()
    elif not installed():
        sys.meta_path.insert(0, _Awaiter())


def installed() -> bool:
    """Say whether a hook is waiting for lm-eval's table of models."""
    return any(isinstance(finder, _Awaiter) for finder in sys.meta_path)


def failures() -> list[str]:
    """Return what went wrong in the hook of this process; for ``act-harness doctor``."""
    return list(_failures)


def register() -> bool:
    """Add ``hf-act`` to lm-eval's table of models, after lm-eval has filled it.

    The entry is a string, so the model class is imported when somebody asks for it.

    Returns:
        Whether this call added it: ``False`` if it was there or lm-eval finds it by itself.

    Raises:
        ImportError: lm-eval is not installed, or is older than its registry.
    """
    # Not `import lm_eval.models`: during that import the package has no such attribute yet.
    models = importlib.import_module(MODULE_AWAITED)
    from lm_eval.api import registry

    if MODEL_NAME in registry.model_registry:
        return False
    if _discovers_plugins(registry, models) and _entry_point_exists():
        return False
    registry.model_registry.register(MODEL_NAME, target=MODEL_TARGET)
    return True


def lookup() -> str | None:
    """Ask lm-eval for ``hf-act`` without registering it; for ``act-harness doctor``.

    Returns:
        Module and name of the class that lm-eval gets, or ``None`` where it knows no such model.

    Raises:
        ImportError: lm-eval, or the module of the class, cannot be imported.
    """
    importlib.import_module(MODULE_AWAITED)  # which fills the table
    from lm_eval.api import registry

    try:
        found = registry.get_model(MODEL_NAME)
    except ValueError:
        return None
    return f"{found.__module__}:{found.__qualname__}"


def _discovers_plugins(*modules: ModuleType) -> bool:
    """Say whether this lm-eval reads entry points itself, from the text of the modules that would.

    A version number would be a guess about releases that do not exist yet.
    """
    for module in modules:
        loader: Any = getattr(module, "__loader__", None)
        get_source = getattr(loader, "get_source", None)
        source = get_source(module.__name__) if get_source else None
        if source and "entry_points(" in source:
            return True
    return False


def _entry_point_exists() -> bool:
    """Say whether our own entry point is there to be found (not so in a bare checkout)."""
    from importlib.metadata import entry_points

    return any(entry.name == MODEL_NAME for entry in entry_points(group="lm_eval.models"))


class _Awaiter:
    """Finds one module, as whoever is responsible for it would, and registers after its import.

    It takes itself off ``sys.meta_path`` once that module has been executed.
    """

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE_AWAITED or self._asking:
            return None
        self._asking = True  # another finder may look the same name up through importlib
        try:
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    break
            else:
                return None
        finally:
            self._asking = False
        if spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)  # type: ignore[assignment]
        return spec


class _RegisteringLoader:
    """The real loader of ``lm_eval.models``, and one registration after it.

    It stands in only until the module is executed: module and spec then carry the real loader.
    """

    def __init__(self, loader: Loader, awaiter: _Awaiter) -> None:
        self._loader = loader
        self._awaiter = awaiter

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the real loader has
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        # The import has worked; from here on nothing may spoil it.
        try:
            sys.meta_path[:] = [f for f in sys.meta_path if f is not self._awaiter]
            register()
        except Exception as error:  # noqa: BLE001 - lm-eval must work without us
            _failures.append(f"{type(error).__name__}: {error}")
