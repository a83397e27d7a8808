"""What README and docs/ show runs: every block of Python, page by page, in order."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

README = Path(__file__).parents[1] / "README.md"
DOCS = README.with_name("docs")
HOW_TO = DOCS / "howto"
SHARED = HOW_TO / "own_model.md"  # whose first block the other how-tos continue
FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FILES = [path for path in (README, *sorted(DOCS.rglob("*.md"))) if path.is_file()]
PAGES = [path for path in FILES if "```python" in path.read_text()]


def test_readme_quickstart_and_how_tos_show_code() -> None:
    assert README in PAGES or not README.is_file()
    names = {path.name for path in PAGES}
    assert not DOCS.is_dir() or {"quickstart.md", "own_model.md", "formats.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    blocks = [(page, *block) for block in python_blocks(page)]
    if page.parent == HOW_TO and page != SHARED:
        blocks.insert(0, (SHARED, *python_blocks(SHARED)[0]))
    namespace: dict[str, Any] = {"__name__": page.stem}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for path, line, block in blocks:
                lines = "\n" * line  # so that a traceback has the page's line
                code = compile(lines + block, str(path), "exec", dont_inherit=True)
                exec(code, namespace)
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Return the line that each block of Python begins after, and its text."""
    text = page.read_text()
    blocks = [(text.count("\n", 0, block.start(1)), block[1]) for block in FENCE.finditer(text)]
    assert len(blocks) == text.count("```python")
    return blocks
