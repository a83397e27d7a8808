"""The stream of the promotion-response example, whose student MEAT has a bug in its second week.

Takes the options of `stream.py`. With FAILS=once the bug is gone when Slurm starts the job again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "promo_response"))

import stream

WEEKS_SAID: list[str] = []


def say(words: str) -> None:
    """Say it; in the second week of MEAT, fail on every rank."""
    SAY(words)
    if words.startswith("MEAT:"):
        WEEKS_SAID.append(words)
        if len(WEEKS_SAID) == 2 and not (FAILS_ONCE and "SLURM_RESTART_COUNT" in os.environ):
            raise RuntimeError("a bug of the student MEAT")


FAILS_ONCE = os.environ.get("FAILS") == "once"
SAY, stream.say = stream.say, say

if __name__ == "__main__":
    stream.main()
