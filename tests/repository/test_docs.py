"""Pages and docstrings name what exists: files of a room, modules and names behind references."""

import ast
import importlib
import re

import pytest
from installed import REPOSITORY

from act_harness.engines.reference import COMPUTES as REFERENCE_HAS
from act_harness.engines.triton.selection import COMPUTES as TRITON_HAS

PACKAGE = REPOSITORY / "act_harness"
ROOMS = sorted(folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists())
REFERENCE = re.compile(r":(?:mod|class|func|meth|data|attr|exc):`~?(act_harness[\w.]*)`")


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: p.name)
def test_a_room_lists_exactly_its_files(room):
    page = (room / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([\w/]+\.py)`:", page, flags=re.MULTILINE)
    modules = {
        str(file.relative_to(room)) for file in room.rglob("*.py") if file.name != "__init__.py"
    }
    assert sorted(listed) == sorted(modules)


def test_links_between_pages_lead_somewhere():
    pages = [*REPOSITORY.glob("*.md"), *PACKAGE.rglob("README.md"), *REPOSITORY.glob("docs/*.md")]
    broken = [
        f"{page.relative_to(REPOSITORY)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert broken == []


def test_a_decision_stands_on_one_page():
    """Fifteen stood on two pages and had begun to differ."""
    pages = {}
    for page in [REPOSITORY / "CONTRIBUTING.md", *PACKAGE.rglob("README.md")]:
        text = page.read_text(encoding="utf-8")
        for decision in re.findall(r"^- \*\*([^*]+)\*\*", text, flags=re.MULTILINE):
            pages.setdefault(" ".join(decision.split()), []).append(page.parent.name)
    assert len(pages) > 80
    assert [one for one in pages.items() if len(one[1]) > 1] == []


def test_the_page_of_engines_says_what_triton_refuses():
    page = (PACKAGE / "engines" / "README.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"^`triton` (refuses .+)$", page, flags=re.MULTILINE)
    lacks = [
        member
        for setting in REFERENCE_HAS
        for member in REFERENCE_HAS[setting]
        if member not in TRITON_HAS[setting]
    ]
    assert list(dict.fromkeys(re.findall(r"`([\w-]+)`", said))) == lacks


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
