"""Build hook: puts the data folders where an installed act-harness and lm-eval look for them.

A wheel gets the files themselves: ``tasks/`` inside lm-eval's own task folder, which is where
``lm_eval ls``, ``validate`` and ``run`` look without being told, the rest inside the package
(``act_harness/support/paths.py`` finds it there). An editable install gets one stub per task file,
a YAML of one line that includes the real file by its absolute path, so that edits count at once; a
new task file needs a new ``pip install -e .`` (or ``make venv``).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TASKS = ("tasks", "lm_eval/tasks/act_harness")
DATA = (
    ("search/artifacts", "act_harness/_data/artifacts"),
    ("search/recipes", "act_harness/_data/recipes"),
    ("results/baselines", "act_harness/_data/baselines"),
)


class DataHook(BuildHookInterface):
    """Adds the data folders to a wheel, or their stubs to an editable install."""

    PLUGIN_NAME = "custom"
    _scratch: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Choose the files; ``version`` is ``"standard"`` or ``"editable"``.

        Raises:
            FileNotFoundError: There is no task file: a wheel without tasks would look healthy.
        """
        root = Path(self.root)
        tasks = root / TASKS[0]
        if not any(tasks.rglob("*.yaml")):
            raise FileNotFoundError(f"no task file (*.yaml) under {tasks}; is the checkout whole?")
        if version == "editable":
            self._scratch = Path(tempfile.mkdtemp(prefix="act-harness-stubs-"))
            write_stubs(tasks, self._scratch)
            build_data["force_include_editable"][str(self._scratch)] = TASKS[1]
            return
        for source, target in (TASKS, *DATA):
            for file in data_files(root / source):
                inside = file.relative_to(root / source).as_posix()
                build_data["force_include"][str(file)] = f"{target}/{inside}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the stubs once they are in the archive."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def data_files(folder: Path) -> list[Path]:
    """Return every file below ``folder`` that is no by-product, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def write_stubs(tasks: Path, target: Path) -> None:
    """Write, for each task file, a file of the same name that includes it by its absolute path."""
    for file in sorted(tasks.rglob("*.yaml")):
        stub = target / file.relative_to(tasks)
        stub.parent.mkdir(parents=True, exist_ok=True)
        # A JSON string is a YAML string, whatever characters the path has.
        stub.write_text(f"include: {json.dumps(str(file.resolve()))}\n", encoding="utf-8")
