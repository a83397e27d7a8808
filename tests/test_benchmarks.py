"""benchmarks/README.md is the page of what is kept in benchmarks/measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGE = "import report; print(report.page(report.HERE / 'measured'), end='')"


@pytest.mark.skipif(not (BENCHMARKS / "measured").is_dir(), reason="benchmarks/measured is missing")
def test_the_page_is_that_of_what_is_kept() -> None:
    """In a process of its own, as the benchmarks import files by names that tests have as well."""
    command = [sys.executable, "-c", PAGE]
    result = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (BENCHMARKS / "README.md").read_text()
