"""PyYAML's safe loader, strict: what JSON knows, each key once, bounded.

No tags, no dates, no value that is part of itself, no numbers that are not finite or wider than 64
bits. The bounds are those of :mod:`act_harness.support.reading`, the one module that uses this one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import IO, Any, NoReturn

import yaml

__all__ = ["MOST_DEPTH", "WIDEST", "Loader", "shown"]

MOST_DEPTH = 100
"""Levels of nesting: no format here needs a dozen, and Python's parsers fail at a thousand."""
WIDEST = 1 << 64
"""The first whole number that is too large."""


def shown(text: str) -> str:
    """Return a text of the input as a message shows it: quoted, in ASCII, cut."""
    return ascii(text if len(text) <= 40 else f"{text[:40]}...")


class Loader(yaml.SafeLoader):  # type: ignore[misc] # PyYAML is untyped
    """PyYAML's safe loader without what JSON lacks, with bounds."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._open: list[str] = []

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - PyYAML's nodes
        """Compose as PyYAML does, within the bounds."""
        event = self.peek_event()
        anchor, where = event.anchor, event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                _refuse_yaml(f"*{anchor} would be part of itself", where)
            # Every use is a copy for who walks through the value: exponentially many by a few.
            if isinstance(self.anchors.get(anchor), yaml.CollectionNode):
                self._nodes += 1
                if self._nodes > MOST_DEPTH:
                    _refuse_yaml(f"more than {MOST_DEPTH} uses of anchors", where)
            return super().compose_node(parent, index)
        if getattr(event, "tag", None) not in (None, "!"):
            _refuse_yaml(f"the tag {event.tag} is not known", where)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            _refuse_yaml(f"nested more than {MOST_DEPTH} levels deep", where)
        if anchor:
            self._open.append(anchor)
        node = super().compose_node(parent, index)
        if anchor:
            self._open.pop()
        self._depth -= 1
        return node


def _refuse_yaml(problem: str, mark: object) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _yaml_mapping(loader: Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:  # before merge keys are replaced by what they bring
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, (str, int, float, bool)) and key is not None:
            _refuse_yaml("a key is neither a text nor a number", key_node.start_mark)
        if key in seen:
            _refuse_yaml(f"the key {shown(str(key))} stands there twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


def _yaml_sequence(loader: Loader, node: yaml.SequenceNode) -> list[Any]:
    return list(loader.construct_sequence(node, deep=True))


def _yaml_integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    try:
        number = int(loader.construct_yaml_int(node)) if len(text) <= 80 else WIDEST
    except ValueError:  # "0x_" looks like a number to PyYAML
        _refuse_yaml(f"{shown(text)} is no whole number", node.start_mark)
    if abs(number) >= WIDEST:
        problem = f"the whole number {shown(text)} is wider than 64 bits"
        _refuse_yaml(problem, node.start_mark)
    return number


def _yaml_float(loader: Loader, node: yaml.ScalarNode) -> float:
    try:
        number = float(loader.construct_yaml_float(node))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        _refuse_yaml(f"{shown(str(node.value))} is no finite number", node.start_mark)
    return number


Loader.add_constructor("tag:yaml.org,2002:map", _yaml_mapping)
Loader.add_constructor("tag:yaml.org,2002:seq", _yaml_sequence)
Loader.add_constructor("tag:yaml.org,2002:int", _yaml_integer)
Loader.add_constructor("tag:yaml.org,2002:float", _yaml_float)
# A date stays the text it is: no setting is one, and JSON has none.
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
