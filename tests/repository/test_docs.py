"""Pages and docstrings name what exists: files of a room, modules and names behind references."""

import ast
import importlib
import re

import pytest
from installed import REPOSITORY

PACKAGE = REPOSITORY / "act_harness"
ROOMS = sorted(folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists())
REFERENCE = re.compile(r":(?:mod|class|func|meth|data|attr|exc):`~?(act_harness[\w.]*)`")


@pytest.mark.parametrize(
    "room", [one for one in ROOMS if one.name != "engines"], ids=lambda p: p.name
)
def test_a_room_lists_exactly_its_files(room):
    page = (room / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([\w/]+\.py)`:", page, flags=re.MULTILINE)
    modules = {
        str(file.relative_to(room)) for file in room.rglob("*.py") if file.name != "__init__.py"
    }
    assert sorted(listed) == sorted(modules)


def test_links_between_pages_lead_somewhere():
    pages = [*REPOSITORY.glob("*.md"), *PACKAGE.rglob("README.md")]
    broken = [
        f"{page.relative_to(REPOSITORY)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert broken == []


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or can be reached from one, fields by annotation too."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            annotated = part in getattr(found, "__annotations__", {})
            if not annotated and not hasattr(found, part):
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_references_in_docstrings_resolve():
    broken = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                broken += [
                    f"{file.relative_to(PACKAGE)}: {name}"
                    for name in REFERENCE.findall(node.value)
                    if not resolves(name)
                ]
    assert broken == []
