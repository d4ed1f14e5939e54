"""Names that are imported when they are asked for, so that a package costs nothing to import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_attributes"]


def lazy_attributes(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that imports each name from its home when it is asked for.

    Args:
        module: The module's name.
        homes: Public name to the module that defines it.
    """

    def find(name: str) -> Any:  # noqa: ANN401 - module attributes are of any type
        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
