"""The jobs that are killed while they use a store on a failing S3 server.

Each keeps a line in a file of what a call has returned, right after it; started again, a job does
all of its work anew but for what it has such a line of where that can't be done twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fault_jobs as jobs
import numpy as np
import rank_models as rm
import torch
from ranks import device

from torchrec_exfm.das import (
    Snapshot,
    TeacherLogger,
    TeacherStore,
    publish,
    score,
)

SNAPSHOT = Snapshot("fm", 1, jobs.START - 1)
SHARDS = 10
SHARD_ROWS = 40
ROWS = SHARDS * SHARD_ROWS
FIRST = jobs.WINDOW - ROWS // 2  # half of the rows lie in the window before
UNNAMED_ROWS = 3
SCORED_AT_ONCE = 20

ServerJob = Callable[[TeacherStore, Path, int], None]


def run(job: ServerJob, url: str, options: Mapping[str, str], folder: Path, attempt: int) -> None:
    """Run a job in a process of its own."""

    def work(rank: int, world_size: int, folder: Path) -> None:
        job(TeacherStore(url, storage_options=options), folder, attempt)

    jobs.run(work, 0, 1, folder, attempt)


def tell(folder: Path, **report: Any) -> None:
    """Append a report; after a kill its line is complete or absent."""
    descriptor = os.open(folder / "reports", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(report) + "\n").encode())
    os.close(descriptor)


def reports(folder: Path) -> list[dict[str, Any]]:
    path = folder / "reports"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shard(number: int) -> slice:
    """Return the positions of a shard's examples in the data."""
    return slice(FIRST + number * SHARD_ROWS, FIRST + (number + 1) * SHARD_ROWS)


def outputs(positions: slice) -> Any:
    data = jobs.Data()
    return data.dense[positions, : len(jobs.TASKS)]


def unnamed_ids(attempt: int, number: int) -> Any:
    return 10 * (1_000 * attempt + number) + np.arange(UNNAMED_ROWS)


def writing(store: TeacherStore, folder: Path, attempt: int) -> None:
    """Write named shards, each followed by rows without a name."""
    data = jobs.Data()
    for number in range(SHARDS):
        at = shard(number)
        report = store.write(
            SNAPSHOT, data.ids[at], outputs(at), data.seconds[at], shard=f"shard-{number}"
        )
        tell(folder, attempt=attempt, shard=number, **vars(report))
        ids = unnamed_ids(attempt, number)
        values = np.full((UNNAMED_ROWS, len(jobs.TASKS)), attempt + number, np.float32)
        report = store.write(SNAPSHOT, ids, values, np.full(UNNAMED_ROWS, jobs.START))
        tell(folder, attempt=attempt, unnamed=number, **vars(report))


def scoring(store: TeacherStore, folder: Path, attempt: int) -> None:
    """Score two shards of several pieces."""
    data = jobs.Data()
    parts = torch.arange(FIRST, FIRST + ROWS).split((2 * SHARD_ROWS, ROWS - 2 * SHARD_ROWS))
    report = score(
        rm.sharded(rm.two_task_student(), 1).model,
        store,
        jobs.shards_of(data, parts, SCORED_AT_ONCE),
        SNAPSHOT,
        device=device(),
        shard_rows=SHARD_ROWS,
        progress=False,
    )
    shards = report.shards + report.skipped
    tell(folder, attempt=attempt, scored=report.scored, shards=shards)


def teacher_logging(store: TeacherStore, folder: Path, attempt: int) -> None:
    """Log a teacher's outputs, from its first step on."""
    data = jobs.Data()
    with TeacherLogger(store, "fm") as logger:
        for number in range(SHARDS):
            at = shard(number)
            logger.log(data.ids[at], data.seconds[at], outputs(at))
            logger.flush()
            tell(folder, attempt=attempt, written=logger.written, before=logger.logged_before)


def publishing(store: TeacherStore, folder: Path, attempt: int) -> None:
    """Publish until the reports are complete."""
    for number in range(len(reports(folder)), SHARDS):
        through = 1_000 * attempt + number
        snapshot = publish(store, "fm", None, trained_through_seconds=through)
        tell(folder, version=snapshot.version, through=snapshot.trained_through_seconds)
