"""Count words and sentences of over 30 words: `python docs/prose.py README.md docs/howto/*.md`.

Blocks of code do not count. A cell of a table, an item of a list and a heading end a sentence.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LONG = 30  # words


def sentences(text: str) -> list[list[str]]:
    """Return the words of each sentence of a Markdown page."""
    text = re.sub(r"^```.*?^```$", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?:^(?: {4,}.*)?\n)+(?=^\S|\Z)", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # where a link leads
    text = re.sub(r"^[|: -]+$", "\n", text, flags=re.MULTILINE)  # rules of tables
    pieces = re.split(r"[.?!]['\")*_]*\s+|\n\s*\n|\n\s*(?:[*-]|\d\.|#+|\|) |\|", text + "\n")
    word_lists = [re.findall(r"\S*\w\S*", piece) for piece in pieces]
    return [words for words in word_lists if words]


def main(pages: list[str]) -> None:
    """Print a line a page, and a line for all of them."""
    everything: list[list[str]] = []
    for page in pages:
        everything += (page_sentences := sentences(Path(page).read_text()))
        _report(page, page_sentences)
    _report("together", everything)


def _report(name: str, all_words: list[list[str]]) -> None:
    long = [words for words in all_words if len(words) > LONG]
    number = sum(map(len, all_words))
    share = len(long) / max(1, len(all_words))
    print(f"{name}: {number:,} words, {len(all_words)} sentences, {share:.1%} over {LONG} words")


if __name__ == "__main__":
    main(sys.argv[1:])
