"""The retrieval example: its data, its search and its figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_the_retrieval_example() -> None:
    """In a process of its own, as the example imports files by names that tests have as well."""
    pytest.importorskip("faiss")
    script = Path(__file__).parent / "retrieval_checks.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout
