"""docs/troubleshooting.md explains every error and warning, and quotes none that is gone.

A message is what an error, a warning or a function that is raised is called with; in the modules of
SPEAKING, which put their sentences together, every string with a space. What is put in at run time
is "…" in it. A quote is code in the first column of a table of the page, and explains the messages
that it is a part of, as it stands.

``python tests/test_troubleshooting.py`` lists what is missing and what is gone.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
SPEAKING = {"_versions.py", "log.py", "rules.py", "streaming.py", "verify.py"}
TELLING = ("telling", "_reading_log", ".commit")  # whose strings become a part of an error
LEAST = 12  # characters of its own that tell a message from others
UNSEEN = {"AssertionError", "AttributeError"}  # of mistakes here, and of Python's own protocol
WITHOUT_WORDS = {"…: …"}  # a URL, and another message

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="docs/ is not there")


def words(node: ast.expr) -> str:
    """A string as it will be, with … for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return words(node.left) + words(node.right)
    return "…"


def plain(text: str) -> str:
    return re.sub("…+", "…", " ".join(text.split()))


def says_something(text: str) -> bool:
    return len(text.replace("…", "")) >= LEAST


def calls_that_speak(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func), node.exc
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.endswith(("Error", *TELLING)) or name == "warnings.warn":
                yield name, node


def messages_of(path: Path) -> Iterator[tuple[int, str]]:
    module = ast.parse(path.read_text())
    for name, call in calls_that_speak(module):
        of_helper = not name.endswith(("Error", "warn"))
        text = plain("…".join(map(words, call.args if of_helper else call.args[:1])))
        told_elsewhere = (of_helper or path.name in SPEAKING) and not says_something(text)
        if text and name not in UNSEEN and not told_elsewhere:
            yield call.lineno, text
    if path.name in SPEAKING:
        yield from strings_of(module)


def strings_of(module: ast.Module) -> Iterator[tuple[int, str]]:
    nodes = list(ast.walk(module))
    skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    inner = (value for node in nodes if isinstance(node, ast.JoinedStr) for value in node.values)
    skipped |= set(map(id, inner))
    for node in nodes:
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in skipped:
            text = plain(words(node))
            if " " in text and says_something(text):
                yield node.lineno, text


@functools.cache
def messages() -> dict[str, str]:
    """Each message, and where it stands."""
    found: dict[str, str] = {}
    for folder in ("torchrec_exfm", "torchx_components"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, text in messages_of(path):
                found.setdefault(text, f"{path.relative_to(ROOT)}:{line}")
    return found


def quotes() -> set[str]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {quote for row in rows for quote in re.findall("`([^`]+)`", row.split(" | ")[0])}


def unexplained() -> list[str]:
    known = quotes()
    return [
        f"{where}: {text}"
        for text, where in messages().items()
        if text not in WITHOUT_WORDS and not any(quote in text for quote in known)
    ]


def gone() -> list[str]:
    said = messages()
    return [quote for quote in quotes() if not any(quote in text for text in said)]


def test_every_message_is_explained() -> None:
    assert len(messages()) > 150
    assert not unexplained(), "explain in docs/troubleshooting.md:\n" + "\n".join(unexplained())


def test_every_quote_is_of_a_message() -> None:
    assert len(quotes()) > 100
    assert not gone(), "no longer in the code:\n" + "\n".join(gone())


def test_a_quote_tells_its_message_from_others() -> None:
    assert not [quote for quote in quotes() if not says_something(quote)]


def test_no_message_is_without_words() -> None:
    short = {text: at for text, at in messages().items() if not says_something(text)}
    assert short.keys() <= WITHOUT_WORDS, f"write the words in the call, or see SPEAKING: {short}"


if __name__ == "__main__":
    print("not explained:", *unexplained(), "gone:", *gone(), sep="\n")
