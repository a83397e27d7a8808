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
FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FOUND = [path for path in (README, *sorted(DOCS.rglob("*.md"))) if path.is_file()]
PAGES = [path for path in FOUND if "```python" in path.read_text()]


def test_readme_guide_and_formats_show_code() -> None:
    assert README in PAGES or not README.is_file()
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
