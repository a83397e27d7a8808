"""docs/troubleshooting.md quotes no message that the package no longer has.

A quote is code in the first column of a table of the page. "…" stands for what a message puts in at
run time.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SHORTEST_QUOTE = 12  # characters; a shorter one would be part of many messages

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="docs/ is not there")


def text(node: ast.expr) -> str:
    """A string as a user sees it, with … for each value that is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


def plain(string: str) -> str:
    return re.sub("…+", "…", " ".join(string.split()))


def strings() -> set[str]:
    """Every string of the package, and the arguments of each call joined by …."""
    found: set[str] = set()
    for folder in ("torchrec_exfm", "torchx_components"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                    found.add(plain(text(node)))
                elif isinstance(node, ast.Call):
                    found.add(plain("…".join(map(text, node.args))))
    return found


def quotes() -> set[str]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {quote for row in rows for quote in re.findall("`([^`]+)`", row.split(" | ")[0])}


def test_every_quote_is_of_a_message() -> None:
    known = strings()
    gone = [quote for quote in quotes() if not any(quote in string for string in known)]
    assert len(quotes()) > 30
    assert not gone, "no longer in the code:\n" + "\n".join(gone)


def test_a_quote_tells_its_message_from_others() -> None:
    assert not [quote for quote in quotes() if len(quote.replace("…", "")) < SHORTEST_QUOTE]
