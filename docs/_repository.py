"""Pages and files of the repository that docs/ links to become part of the site.

docs/ says once what no other page says and links to the rest (rooms' READMEs, reports, benchmarks)
by relative paths, which lead somewhere in a checkout. This hook of mkdocs follows the links, puts
what they name below ``repository/`` in the site, and rewrites them.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SITE, CHECKOUT = "repository/", "docs/"  # where what is outside docs/ is, and docs/ itself

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(?=[)\s#])")
_CODE = re.compile(r"(?ms)(^```.*?^```|`[^`\n]+`)")


def _in_repository(uri: str) -> str:
    """Return the path in the checkout of a page of the site."""
    return uri.removeprefix(SITE) if uri.startswith(SITE) else CHECKOUT + uri


def _in_site(path: str) -> str:
    """Return the page of the site that shows a path of the checkout."""
    return path.removeprefix(CHECKOUT) if path.startswith(CHECKOUT) else SITE + path


def _target(path: str, link: str) -> str:
    """Return the path in the checkout that a link of the page at ``path`` leads to."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if (ROOT / found).is_dir():
        found += "/README.md"
    return found


def _text(path: str) -> str:
    """Return a page's Markdown; a folder without a README gets a list of what it holds."""
    file = ROOT / path
    if file.is_file():
        return file.read_text(encoding="utf-8")
    names = sorted(one.name for one in file.parent.iterdir() if one.name[0] not in "._")
    return "\n".join([f"# {posixpath.dirname(path)}", "", *(f"- [{n}]({n})" for n in names), ""])


def _links(path: str) -> Iterator[str]:
    """Yield what the page at ``path`` links to, as paths of the checkout, code blocks left out."""
    for link in _LINK.findall(_CODE.sub("", _text(path))):
        target = _target(path, link)
        if (ROOT / target).exists() or (ROOT / target).parent.is_dir():
            yield target


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add every file that a page links to, and what those pages link to in turn."""
    waiting = [_in_repository(file.src_uri) for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        for target in _links(path):
            if target in seen:
                continue
            seen.add(target)
            file = ROOT / target
            if target.endswith(".md") and (file.is_file() or file.name == "README.md"):
                waiting.append(target)
                files.append(File.generated(config, _in_site(target), content=_text(target)))
            elif file.is_file() and not target.startswith(CHECKOUT):
                files.append(File.generated(config, _in_site(target), abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between docs/ and the rest of the checkout to where the site has them."""
    path = _in_repository(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        return os.path.relpath(_in_site(_target(path, match[1])), here or ".")

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts)
