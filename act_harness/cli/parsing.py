"""How option texts become values, and the class behind every command.

:class:`Command` adds to typer what lm-eval's users know from its command line: options whose value
may be left out (``--apply_chat_template``), spelled with dashes or underscores, and sections of
options in the help.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from act_harness.errors import InputError, one_line, suggestion
from act_harness.support import reading

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "SPELLING",
    "Command",
    "document_numbers",
    "head_places",
    "names",
    "numbers",
    "switch",
    "use_config",
]


def _dashes(token: str) -> str:
    return token.replace("_", "-")


SPELLING: dict[str, Any] = {"token_normalize_func": _dashes}
"""Context settings that let ``--num_fewshot``, as lm-eval spells it, be ``--num-fewshot``."""


class Command(TyperCommand):
    """A command whose help has sections, and whose ``optional_values`` may stand alone."""

    optional_values: frozenset[str] = frozenset()
    """Options (with dashes) that mean ``true`` where no value follows."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Write out the values that were left out, then parse as typer does."""
        return super().parse_args(ctx, _complete(args, self.optional_values))

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override] # noqa: ANN401
        """Write arguments, options, and every panel of options as a section of its own."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                panel = getattr(parameter, "rich_help_panel", None)
                section = "Arguments" if argument else panel or "Options"
                sections.setdefault(section, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _complete(args: Sequence[str], optional: Iterable[str]) -> list[str]:
    known = set(optional)
    completed = []
    for position, arg in enumerate(args):
        following = args[position + 1 : position + 2]
        alone = not following or following[0].startswith("-")
        completed.append(f"{arg}=true" if alone and _dashes(arg) in known else arg)
    return completed


def names(text: str) -> tuple[str, ...]:
    """Split a comma-separated option."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Split a comma-separated option of whole numbers.

    Raises:
        InputError: A part is no number, or there is none.
    """
    found = []
    for name in names(text):
        digits = name.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 18):
            raise InputError(
                f"{option} holds {one_line(repr(name))}, expected whole numbers with commas "
                "between them"
            )
        found.append(int(name))
    if not found:
        raise InputError(f"{option} is empty, expected whole numbers with commas between them")
    return tuple(found)


def head_places(text: str, option: str) -> tuple[tuple[int, int], ...]:
    """Split a comma-separated option of heads, each ``LAYER.HEAD``.

    Raises:
        InputError: A part is no head.
    """
    found = []
    for name in names(text):
        layer, _, head = name.partition(".")
        if not all(one.isascii() and one.isdecimal() and len(one) <= 6 for one in (layer, head)):
            raise InputError(
                f"{option} holds {one_line(repr(name))}, expected LAYER.HEAD with commas between "
                "them, as 3.5,7.0"
            )
        found.append((int(layer), int(head)))
    return tuple(found)


def switch(text: str | None, option: str, *, or_name: bool = False) -> bool | str | None:
    """Read an option that is ``true``, ``false`` or, with ``or_name``, a name.

    Raises:
        InputError: It is none of them.
    """
    if text is None:
        return None
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = known.get(text.strip().lower())
    if found is None and not (or_name and text.strip()):
        raise InputError(f"{option} is {one_line(repr(text))}, expected true or false")
    return text.strip() if found is None else found


def document_numbers(text: str | None, option: str = "--samples") -> dict[str, Any] | None:
    """Read ``{"TASK": [0, 1]}``, as JSON or as the path of a JSON file.

    Raises:
        InputError: It is neither.
    """
    if text is None:
        return None
    advice = 'expected {"TASK": [0, 1, 2]} or the path of a JSON file that holds it'
    if text.lstrip().startswith("{"):
        found = reading.parse_json(text, source=option, error=InputError, advice=advice)
    else:
        found = reading.read_json(text, error=InputError, advice=f"{option}: {advice}")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{option} holds {one_line(str(found), limit=80)}, {advice}")
    return found


def use_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take the defaults of a command's options from a YAML file in lm-eval's names.

    Raises:
        InputError: The file cannot be read, or names an option that the command does not have.
    """
    if file is None:
        return None
    advice = "--config: expected a YAML file of options"
    content = reading.read_yaml(file, error=InputError, advice=advice)
    if not isinstance(content, dict):
        raise InputError(f"--config {file} holds {type(content).__name__}, expected options")
    known = {
        option.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for option in parameter.opts
    }
    defaults: dict[str, Any] = {}
    for name, value in content.items():
        key = str(name).replace("-", "_")
        if key == "model" and value == "hf-act":
            continue  # lm-eval's own files say so; there is no other model here
        if key not in known or key == "config":
            hint = suggestion(key, known) or "; see the command's --help"
            raise InputError(f"--config {file} has the unknown option {str(name)!r}{hint}")
        several = getattr(known[key], "multiple", False)
        values = [_as_text(one) for one in (value if isinstance(value, list) else [value])]
        defaults[str(known[key].name)] = values if several else _as_text(value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


def _as_text(value: Any) -> Any:  # noqa: ANN401 - a YAML value
    """Return a value as it would be written behind an option."""
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return ",".join(str(one) for one in value)
    if isinstance(value, bool):
        return str(value).lower()
    return value if value is None else str(value)
