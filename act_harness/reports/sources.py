"""Recognising results on the disk: by their schema, or by the form that lm-eval and bench give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from act_harness.errors import ResultError
from act_harness.support import reading

__all__ = ["Kind", "Source", "find_sources"]

Kind = Literal["run", "comparison", "methods", "search", "sinks", "bench"]

_SCHEMAS: dict[str, Kind] = {
    "act-harness/comparison/1": "comparison",
    "act-harness/methods/1": "methods",
    "act-harness/heads/1": "search",
    "act-harness/heads/2": "search",
    "act-harness/sinks/1": "sinks",
}
_BENCH = {"title", "machine", "command", "tables"}
_EXPECTED = (
    "expected files or folders of eval, compare, methods, search, sinks or bench (JSON), or "
    "results_*.json of lm-eval"
)
_MOST_BYTES = 1 << 24  # a larger one is a model's file or a ledger, and no result
_PASSED_OVER = {".git", ".venv", "node_modules", "site-packages"}


@dataclass(frozen=True)
class Source:
    """One result as it was read."""

    kind: Kind
    path: Path
    content: dict[str, Any]


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """Read every result among files and in folders, each file once.

    In a folder, files of other kinds are passed over, and so are the artifacts and runs of single
    arms below a comparison of methods, which shows them.

    Raises:
        ResultError: A path does not exist, a file that was named is no result, or nothing is one.
        InfrastructureError: A file cannot be read.
    """
    found: dict[Path, Source] = {}
    for path in paths:
        if reading.is_file(path):
            source = _recognised(path, _read(path))
            if source is None:
                raise ResultError(f"{path} is no result that a report can show; {_EXPECTED}")
            found.setdefault(path.resolve(), source)
        elif reading.is_folder(path):
            found |= {
                s.path.resolve(): s for s in _in_folder(path) if s.path.resolve() not in found
            }
        else:
            hint = reading.nearest_beside(path)
            raise ResultError(f"{path}: no such file or folder; {_EXPECTED}{hint}")
    if not found:
        raise ResultError(f"nothing to report in {', '.join(map(str, paths))}; {_EXPECTED}")
    return list(found.values())


def _in_folder(folder: Path) -> Iterator[Source]:
    files = [
        file
        for file in sorted(folder.rglob("*.json"))
        if _PASSED_OVER.isdisjoint(file.relative_to(folder).parts)
    ]
    arms = {file.parent / "artifacts" for file in files if file.name == "methods.json"}
    for file in files:
        if file.parent in arms or not reading.is_file(file) or file.stat().st_size > _MOST_BYTES:
            continue
        try:
            source = _recognised(file, _read(file))
        except ResultError:
            continue  # some other program's file
        if source is not None:
            yield source


def _read(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    return reading.read_json(path, advice=_EXPECTED, lenient=True)


def _recognised(path: Path, content: Any) -> Source | None:  # noqa: ANN401 - any JSON value
    if not isinstance(content, dict):
        return None
    kind = _SCHEMAS.get(str(content.get("schema")))
    if kind is None and isinstance(content.get("results"), dict) and "configs" in content:
        kind = "run"
    if kind is None and content.keys() >= _BENCH and isinstance(content["tables"], list):
        kind = "bench"
    return None if kind is None else Source(kind, path, content)
