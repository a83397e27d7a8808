"""The quality benchmark: what its teachers know when, and whether its figures are right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_quality_benchmark() -> None:
    script = Path(__file__).parent / "quality_checks.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    checks = script.read_text().count("\ndef check_")
    assert len(result.stdout.split()) == checks > 5
