"""Check the local links of the built site and of the Markdown files: `make docs` runs it."""

from __future__ import annotations

import functools
import re
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN = ("*.md", "benchmarks/*.md", "examples/**/*.md")  # Sphinx checks those of docs/


def links_of(path: Path) -> list[str]:
    """Return the targets of a page's links and pictures."""
    pattern = r"\]\(([^()\s]+)\)" if path.suffix == ".md" else r'\b(?:href|src)="([^"]+)"'
    return [unescape(link) for link in re.findall(pattern, path.read_text())]


@functools.cache
def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page; those of Markdown are its headings, as GitHub writes them."""
    if path.suffix == ".html":
        return set(re.findall(r'\b(?:id|name)="([^"]+)"', path.read_text()))
    headings = re.findall(r"^#+ +(.+?) *$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def is_broken(path: Path, link: str) -> bool:
    """Return whether a page's local link lacks its file or its anchor."""
    url = urlsplit(link)
    target = path.parent / unquote(url.path) if url.path else path
    if url.scheme or url.netloc:
        return False
    return not target.exists() or bool(url.fragment and url.fragment not in anchors_of(target))


if __name__ == "__main__":
    markdown = [path for pattern in MARKDOWN for path in ROOT.glob(pattern)]
    site = list(Path(sys.argv[1]).rglob("*.html"))
    if not site:
        sys.exit(f"{sys.argv[1]}: no page of a site is here: build it first")
    pages = [*markdown, *site]
    links = [(path, link) for path in sorted(pages) for link in sorted(set(links_of(path)))]
    broken = [f"{path}: {link}" for path, link in links if is_broken(path, link)]
    sys.exit("\n".join(["broken links:", *broken]) if broken else 0)
