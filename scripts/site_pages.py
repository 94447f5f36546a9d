"""The site's pages that lie outside docs/, and their links: hooks of mkdocs.yml.

README.md and the other pages at the root are read where they are, so that there is one copy of each. A link to a file
that is no page (a schema, a source file) becomes its path, since the site holds pages only.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

# Files at the root and the names of their pages.
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def page_of(target: str) -> str | None:
    """Return the page for a path from the root, or None if the site has none."""
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    if target.startswith("docs/") and target.endswith(".md"):
        return target.removeprefix("docs/")
    return None


def relink(markdown: str, folder: str) -> str:
    """Return a page of ``folder`` (from the root) with its relative links as the site has them."""

    def replacement(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if ":" in target:
            return found[0]
        page = page_of(posixpath.normpath(posixpath.join(folder, target)))
        return text if page is None else f"[{text}]({page}{anchor})"

    return LINK.sub(replacement, markdown)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages at the root."""
    for name, page in ROOT_PAGES.items():
        content = relink((ROOT / name).read_text(encoding="utf-8"), "")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Mend the links of the pages in docs/."""
    return markdown if page.file.generated_by else relink(markdown, "docs")
