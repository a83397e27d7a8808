"""What the documents show runs: every block of Python in docs/, page by page, in order."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "```python" in path.read_text()]


def test_the_guide_and_the_formats_show_code() -> None:
    assert not DOCS.is_dir() or {"guide.md", "formats.md"} <= {path.name for path in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = page.read_text()
    blocks = list(FENCE.finditer(text))
    assert len(blocks) == text.count("```python")
    namespace: dict[str, Any] = {"__name__": page.stem}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for block in blocks:
                lines = "\n" * text.count("\n", 0, block.start(1))  # errors tell the page's line
                code = compile(lines + block[1], str(page), "exec", dont_inherit=True)
                exec(code, namespace)
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
