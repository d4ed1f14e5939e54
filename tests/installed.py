"""What the packaging tests share: the look of an installed act-harness, without installing it.

Python finds entry points in any ``*.dist-info`` folder on its path, so a folder with the entry
points of pyproject.toml, put on ``PYTHONPATH`` beside the repository, is as good as an install.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent


def pyproject() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def write_metadata(folder: Path) -> Path:
    """Write the metadata of an installed act-harness into ``folder`` and return it."""
    info = folder / "act_harness-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: act-harness\nVersion: 0.0.0\n")
    groups = pyproject()["project"]["entry-points"]
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def python(*arguments: str, path: tuple[Path, ...], **environment: str):
    """Run this Python with ``path`` first on its path, from a folder that holds nothing."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in path), "HF_HUB_OFFLINE": "1"}
    env.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    env["OMP_NUM_THREADS"] = "1"
    env.update(environment)
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        cwd=path[0],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
