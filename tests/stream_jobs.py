"""The jobs that the tests of streaming run side by side: a teacher, its scorer, a student.

A stream of WINDOWS windows, of which two lie in one of the store's. The teacher trains on three of
four examples and logs them, the scorer scores the fourth, the student trains on all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import das_data as dd
import fault_jobs as fj
import numpy as np
import pytest
import rank_models as rm
import torch
from fault_jobs import ROWS, START, Data, Job
from ranks import device
from resume_jobs import digest
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import DistillationTerm, ExFMMetrics, StudentAdapter
from torchrec_exfm.das import (
    Shard,
    TeacherLogger,
    TeacherLookup,
    TeacherStore,
    Window,
    load_snapshot,
    published,
    score_windows,
    streaming,
    train_teacher,
    train_windows,
    wait_for_outputs,
)
from torchrec_exfm.wrapper import find_wrapper

WINDOWS = 6
SECONDS = fj.WINDOW // 2
assert WINDOWS * SECONDS == ROWS
BATCH = 40  # of all ranks
REFRESH, DELAY = 2, 1
TERMS = (
    DistillationTerm(teacher="fm", hidden=(4,)),
    DistillationTerm(teacher="fm", adapted=True, serving=True, margin=0.5),
)


def teacher(rank: int, world_size: int, folder: Path) -> None:
    data = Data()
    trainee = rm.sharded(rm.two_task_student(), world_size)
    pipeline: Any = TrainPipelineSparseDist(trainee.model, trainee.optimizer, device())
    store = TeacherStore(folder / "store")
    windows = windows_of(lambda rows: batches(data, rows[rows % 4 > 0], rank, world_size))
    rows = 3 * BATCH  # several in a window
    with TeacherLogger(store, "fm", keys=fj.keys_of, shard_rows=rows) as logger:
        logger.attach(trainee.model)
        for _ in train_teacher(
            pipeline, windows, store, "fm", refresh=REFRESH, logger=logger, folder=folder / "fm"
        ):
            pass


def scorer(rank: int, world_size: int, folder: Path) -> None:
    data = Data()
    model = rm.sharded(rm.two_task_student(seed=9), world_size).model

    def shards(rows: Tensor) -> list[Shard]:
        return fj.shards_of(data, [rows[rows % 4 == 0]], BATCH)[rank:]  # the first rank has it

    for _ in score_windows(
        model,
        windows_of(shards),
        TeacherStore(folder / "store"),
        "fm",
        device=device(),
        delay=DELAY,
        keys=fj.keys_of,
        shard_rows=fj.PIECE,  # several in a window
        progress=False,
    ):
        pass


def student(rank: int, world_size: int, folder: Path) -> list[str]:
    """Train the student, and return digests of its final state."""
    data = Data()
    wrapper = rm.wrapped(rm.two_task_student(seed=3), terms=TERMS, teachers=("fm",))
    trainee = rm.sharded(wrapper, world_size)
    torch.manual_seed(4)
    adapter = StudentAdapter(tasks=rm.TASKS, hidden=(5,))
    lookup = TeacherLookup(TeacherStore(folder / "store"), "fm", refresh_seconds=None)
    pipeline = rm.pipeline_of(trainee, teacher=lookup, adapter=adapter)
    metrics = ExFMMetrics(
        batch_size=BATCH // world_size, device=device(), tasks=rm.TASKS, teachers=("fm",)
    )
    windows = windows_of(lambda rows: batches(data, rows, rank, world_size))
    for _ in train_windows(
        pipeline,
        wait_for_outputs(windows, lookup, ["fm", "fm/scores"], timeout_seconds=50.0),
        step=lambda output: metrics.update(output, find_wrapper(trainee.model).last_teacher),
        metrics=metrics,
        folder=folder / "student",
    ):
        pass
    everything = [rm.snapshot(trainee.model.state_dict()), adapter.state_dict(), metrics.compute()]
    return [digest(part) for part in everything]


def waiting(rank: int, world_size: int, folder: Path) -> str:
    """What a rank is told that waits in vain, the second one with a clock that runs wild."""
    store = TeacherStore(folder / "store")
    lookup = TeacherLookup(store, "fm")

    def sleep(seconds: float) -> None:  # the watermark moves meanwhile, and not far enough
        store.advance_watermark("fm", 1_000)
        time.sleep(seconds)

    wild = itertools.count(step=10**6).__next__
    clock = SimpleNamespace(monotonic=wild if rank else time.monotonic, sleep=sleep)
    with mock.patch.object(streaming, "time", clock), pytest.raises(TimeoutError) as late:
        next(wait_for_outputs(windows_of(list), lookup, timeout_seconds=0.7))
    return str(late.value)


JOBS: dict[str, tuple[Job, int]] = {  # and on how many ranks
    "teacher": (teacher, 2),
    "scorer": (scorer, 1),
    "student": (student, 2),
}


def windows_of(data_of: Callable[[Tensor], Any]) -> Iterator[Window]:
    for number in range(WINDOWS):
        begin = START + number * SECONDS
        rows = torch.arange(number * SECONDS, (number + 1) * SECONDS)
        yield Window(begin, begin + SECONDS, data_of(rows))


def batches(data: Data, rows: Tensor, rank: int, world_size: int) -> Iterator[rm.Columns]:
    for batch in rows.split(BATCH):
        yield data.batch(batch.tensor_split(world_size)[rank])


def make_store(folder: Path) -> TeacherStore:
    folder.mkdir()
    return fj.make_store(folder)


def assert_scores(folder: Path) -> None:
    """Require scored outputs to equal their snapshot's, computed per example, up to rounding."""
    store = TeacherStore(folder / "store")
    rows = dd.all_rows(store)
    for snapshot in published(store, "fm"):
        model = rm.two_task_student()
        load_snapshot(store, snapshot, model)
        fj.assert_within_rounding(model, rows[~rows.logged & (rows.snapshot == snapshot.version)])


class Row(NamedTuple):
    """The stored row of an example."""

    snapshot: int
    logged: bool
    outputs: list[float]


def rows_of(folder: Path) -> dict[int, Row]:
    """Return the store's rows by example, and require a single row for each."""
    rows = dd.all_rows(TeacherStore(folder / "store"), keys=fj.KEYS)
    fj.assert_keys(rows)
    assert (np.diff(rows.example_id) > 0).all()
    columns = rows.snapshot.tolist(), rows.logged.tolist(), rows.outputs.tolist()
    return dict(zip(rows.example_id.tolist(), map(Row, *columns), strict=True))
