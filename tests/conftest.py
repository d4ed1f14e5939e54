"""Fixtures shared by all tests: tiny models made from configurations, and real parts if present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _shared() -> Path:
    named = os.environ.get("ACT_HARNESS_SHARED")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real benchmark rows (``hub``) and the release's outputs (``golden``)."""
    folder = _shared()
    if not folder.is_dir():
        pytest.skip(f"real rows are not at {folder}; set ACT_HARNESS_SHARED to their folder")
    return folder


@pytest.fixture(scope="session")
def hub_dir(shared_dir: Path) -> Path:
    """Folder with real benchmark rows in the layout of the hub."""
    return shared_dir / "hub"


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    """Folder with the release's inputs and outputs."""
    return shared_dir / "golden"


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real SmolLM2-135M-Instruct in float32, converted once and kept in a cache."""
    from act_harness.demo_model import convert, find_gguf
    from act_harness.errors import InfrastructureError

    try:
        find_gguf()
    except InfrastructureError as error:
        pytest.skip(str(error))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "act-harness" / "smollm2-135m-instruct"
    convert(folder)
    return folder
