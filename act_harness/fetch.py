"""Benchmark data without a network: read it from a folder, and fill that folder beforehand.

Not part of the paper. Two things live here:

* :func:`load_rows` is what every task under ``tasks/`` calls. It reads a dataset from the data
  directory when there is one (``ACT_HARNESS_DATA_DIR`` or :func:`data_directory`), else as
  ``datasets`` would, and turns "cannot be had" into one line.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets

from act_harness.errors import InfrastructureError

__all__ = ["DATA_DIRECTORY_VARIABLE", "load_rows"]

DATA_DIRECTORY_VARIABLE = "ACT_HARNESS_DATA_DIR"


def load_rows(
    path: str, name: str | None = None, *, task: str | None = None, **kwargs: Any
) -> datasets.DatasetDict:
    """Read dataset ``path`` (configuration ``name``) from the data directory or the hub."""
    directory = os.environ.get(DATA_DIRECTORY_VARIABLE)
    source = path
    if directory:
        local = Path(directory).expanduser() / path
        if not local.is_dir():
            raise InfrastructureError(
                f"dataset {path} is not in the data directory {directory}; add it with "
                f"`act-harness fetch --tasks {task or 'TASK'} --dest {directory}`, "
                f"or unset {DATA_DIRECTORY_VARIABLE}"
            )
        source = str(local)
        kwargs.pop("revision", None)
    return datasets.load_dataset(source, name, **kwargs)
