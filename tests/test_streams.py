"""The train pipelines on the simulated CUDA streams of tests/streams.py, on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import rank_checks_streams as checks
from ranks import Ranks

CASES = [  # how the outputs come, the terms, the model, and one option more
    ("columns", "heads", "sharded"),
    ("columns", "adapted", "unsharded"),
    ("columns", "margins", "untraced"),
    ("loaded", "margins", "sharded"),
    ("loaded", "heads", "unsharded"),
    ("loaded", "adapted", "untraced"),
    ("look-up", "adapted", "sharded"),
    ("look-up", "margins", "unsharded"),
    ("look-up", "heads", "untraced"),
    ("live", "margins", "sharded"),
    ("live", "heads", "unsharded"),
    ("live", "adapted", "untraced"),
    ("failing", "margins", "sharded"),
    ("failing", "heads", "unsharded"),
    ("failing look-up", "adapted", "sharded"),
    ("failing look-up", "heads", "untraced"),
    ("columns", "margins", "sharded", "in place"),
    ("loaded", "heads", "unsharded", "in place"),
    ("columns", "heads", "sharded", "evaluated"),
    ("look-up", "margins", "sharded", "evaluated"),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Use a separate process: the simulation replaces parts of torch while it runs."""
    processes = Ranks(1)
    yield processes
    processes.close()


def test_faults_are_found(ranks: Ranks) -> None:
    ranks.run(checks.check_faults_are_found)


@pytest.mark.parametrize("base", checks.BASES)
def test_torchrecs_own(ranks: Ranks, base: str) -> None:
    ranks.run(checks.check_torchrecs_own, base, True)


def test_torchrecs_own_unsharded(ranks: Ranks) -> None:
    ranks.run(checks.check_torchrecs_own, checks.CONTROL, False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace(" ", "_"))
def test_exfm(ranks: Ranks, case: tuple[str, ...]) -> None:
    ranks.run(checks.check_exfm, *case)


@pytest.mark.parametrize("base", [base for base in checks.BASES if base != checks.CONTROL])
def test_mixin(ranks: Ranks, base: str) -> None:
    ranks.run(checks.check_mixin, base)


@pytest.mark.parametrize("is_exfm", [False, True], ids=["torchrec", "exfm"])
def test_next_batch_is_not_held_up(ranks: Ranks, is_exfm: bool) -> None:
    ranks.run(checks.check_next_batch_is_not_held_up, is_exfm)
