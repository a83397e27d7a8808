"""A failing rank ends the whole job, with its message and without a hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).with_name("failing_rank.py")
SECONDS = 100  # far below the half hour for which a collective waits


def test_a_rank_that_fails_brings_the_others_down_with_its_message() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.run([*command, str(JOB)], capture_output=True, text=True, timeout=SECONDS)
    assert job.returncode != 0
    assert "ConnectionError: no route to the store" in job.stderr
    assert "went on to the end" not in job.stdout
