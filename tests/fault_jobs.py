"""The jobs that the fault tests kill: a scoring job, and a training that logs and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import das_data as dd
import dlrm_reference as reference
import numpy as np
import pytest
import rank_models as rm
import torch
import torch.distributed as dist
from forked import Forked
from ranks import device
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.models.dlrm import DLRMTrain
from tqdm import tqdm

from torchrec_exfm.das import (
    Shard,
    Snapshot,
    StoreError,
    TeacherLogger,
    TeacherStore,
    publish,
    published,
    score,
)
from torchrec_exfm.das.rules import Rows

START = 1_000_000  # the first event time
ROWS = 4_320  # examples, one each second
WINDOW = ROWS // 3
TASKS = tuple(task.name for task in rm.TASKS)
PIECE = 60  # rows of a commit of the scoring job
LENGTHS = (40, 200, 360, 120)  # of its shards, over and over
SCORED_AT_ONCE = 25
STEPS = 80  # of the training, with the first LOGGED examples
LOGGED = 3_200
CHECKPOINT_STEPS = 5

KEYS = ("user_id", "item_id")

Job = Callable[[int, int, Path], Any]


class Data:
    """Examples by their position; the ids are large and in no order."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randperm(ROWS, generator=generator) * 1_000_003 + 2**60
        self.seconds = START + torch.arange(ROWS)
        self.dense = torch.randn(ROWS, rm.NUM_DENSE, generator=generator)
        self.sparse = torch.randint(0, rm.ROWS, (ROWS, rm.NUM_TABLES), generator=generator)
        self.labels = torch.rand(ROWS, len(TASKS), generator=generator).round()

    def batch(self, positions: Tensor) -> rm.Columns:
        keys = [f"f{table}" for table in range(rm.NUM_TABLES)]
        lengths = torch.ones(len(keys) * len(positions), dtype=torch.int32)
        values = self.sparse[positions].t().reshape(-1)
        return rm.where_torch_allocates(
            dense_features=self.dense[positions],
            sparse_features=KeyedJaggedTensor(keys, values, lengths=lengths),
            labels=self.labels[positions],
            example_ids=self.ids[positions],
            event_seconds=self.seconds[positions],
        )


def assert_within_rounding(teacher: DLRMTrain, rows: Rows) -> None:
    """Require scored outputs to equal the teacher's, computed per example, up to rounding."""
    data = Data()
    ids, order = data.ids.sort()
    wanted = torch.tensor(rows.example_id)
    at = order[torch.searchsorted(ids, wanted)]
    assert torch.equal(data.ids[at], wanted)
    batch = data.batch(at)
    expected = reference.logits_alone(teacher.model, batch.dense_features, batch.sparse_features)
    reference.assert_within_rounding(rows.outputs, expected)


def keys_of(batch: rm.Columns) -> dict[str, Tensor]:
    """Return keys that identify each example; the first example has one null."""
    items = torch.where(batch.event_seconds == START, -(2**63), START - batch.event_seconds)
    return {"item_id": items, "user_id": batch.example_ids * 7}


def assert_keys(rows: Rows) -> None:
    """Require each row to have the ``KEYS`` columns of its own example."""
    seconds = rows.event_time // dd.US
    items = np.where(seconds == START, -(2**63), START - seconds)
    np.testing.assert_array_equal(rows.keys, np.stack([rows.example_id * 7, items], axis=1))


def make_store(folder: Path) -> TeacherStore:
    return dd.new_store(folder / "store", tasks=TASKS, window_seconds=WINDOW)


def run(job: Job, rank: int, world_size: int, folder: Path, attempt: int) -> Any:
    """Run a job as one of its ranks; the ranks of an attempt meet by its number."""
    logging.disable(logging.WARNING)
    tqdm.set_lock(threading.RLock())  # by default a semaphore, which a killed process leaves behind
    torch.set_num_threads(1)
    meeting = (folder / f"meeting-{attempt}").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    result = job(rank, world_size, folder)
    dist.destroy_process_group()
    return result


def on_ranks(job: Job, world_size: int, folder: Path, attempt: int) -> list[Forked]:
    """Start a job's ranks, each in a process of its own."""
    return [Forked(run, job, rank, world_size, folder, attempt) for rank in range(world_size)]


def scoring(rank: int, world_size: int, folder: Path) -> None:
    """Score shards of unequal lengths, distributed over the ranks in turn."""
    teacher = rm.sharded(rm.two_task_student(), world_size).model
    shards = shards_of(Data(), torch.arange(ROWS).split(LENGTHS * (ROWS // sum(LENGTHS))))
    report = score(
        teacher,
        TeacherStore(folder / "store"),
        shards[rank::world_size],
        Snapshot("fm", 1, START - 1),
        device=device(),
        keys=keys_of,
        shard_rows=PIECE,
        progress=False,
    )
    assert report.shards + report.skipped == len(shards)


def shards_of(data: Data, parts: Sequence[Tensor], size: int = SCORED_AT_ONCE) -> list[Shard]:
    """Return one shard per part of the positions, named by its first position."""

    def batches(positions: Tensor) -> Iterator[rm.Columns]:
        return (data.batch(at) for at in positions.split(size))

    return [Shard(f"{int(part[0])}", functools.partial(batches, part)) for part in parts]


def training(rank: int, world_size: int, folder: Path) -> None:
    """Train a teacher that logs, from its last checkpoint on."""
    data = Data()
    trainee = rm.sharded(rm.two_task_student(), world_size)
    first = resumed(rank, folder, trainee.model.state_dict())
    size = LOGGED // STEPS // world_size
    store = TeacherStore(folder / "store")
    with TeacherLogger(store, "fm", keys=keys_of, shard_rows=3 * size) as logger:
        logger.attach(trainee.model)
        for step in range(first, STEPS):
            start = (step * world_size + rank) * size
            loss, _ = trainee.model(data.batch(torch.arange(start, start + size)))
            trainee.optimizer.zero_grad()
            loss.backward()
            trainee.optimizer.step()
            if (step + 1) % CHECKPOINT_STEPS == 0:
                logger.flush()
                checkpoint(rank, folder, step + 1, trainee.model.state_dict())


def checkpoint(rank: int, folder: Path, steps: int, state: Mapping[str, Any]) -> None:
    """Save every rank's state, then make all of it the last checkpoint in one step."""
    torch.save(rm.snapshot(state), folder / f"checkpoint-{steps}-{rank}.pt")
    dist.barrier()
    if rank == 0:
        (folder / "latest.new").write_text(str(steps))
        os.replace(folder / "latest.new", folder / "latest")


def resumed(rank: int, folder: Path, state: Mapping[str, Any]) -> int:
    """Load the last checkpoint, if there is one; return the number of steps before it."""
    if not (folder / "latest").exists():
        return 0
    steps = int((folder / "latest").read_text())
    saved = torch.load(folder / f"checkpoint-{steps}-{rank}.pt")
    with torch.no_grad():
        for key, value in state.items():
            for (tensor, _), stored in zip(rm._pieces(value), saved[key], strict=True):
                tensor.copy_(stored)
    return steps


# ---- A full disk ----


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Limit the size of any file that this process writes, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_to_a_full_disk(folder: Path, rows: int, name: str, limit: int) -> None:
    """A full disk is one error and stores nothing; with room again, the shard is stored once."""
    store = dd.small_store(folder)
    ids = np.arange(100, 100 + rows)
    shard = (dd.snapshot(), ids, ids.astype(np.float32), dd.AT + ids)
    with full_disk(limit):
        for _ in range(2):
            with pytest.raises(StoreError, match="can't be written to, and nothing of") as caught:
                store.write(*shard, shard=name)
            assert store.table.url in dd.sentence(caught.value)
    assert store.refresh() == 1
    assert list(dd.by_id(TeacherStore(folder))) == [0, 1, 2]
    assert store.write(*shard, shard=name).written == rows
    assert not store.write(*shard, shard=name).committed
    assert list(dd.by_id(store)) == [0, 1, 2, *ids.tolist()]


def write_where_a_log_checkpoint_does_not_fit(folder: Path) -> None:
    """A stored commit is never reported as failed, even if the log's checkpoint does not fit."""
    every = {"delta.checkpointInterval": "3"}
    made = dd.small_store(folder)
    dd.edit_log(made, 0, "metaData", lambda data: data["configuration"].update(every))
    store = TeacherStore(folder)
    written = [0, 1, 2]

    def write(example: int) -> None:
        with contextlib.suppress(StoreError):
            store.write(dd.snapshot(), [example], [0.5], [dd.AT])
            written.append(example)
        assert list(dd.by_id(store)) == written

    with full_disk(6_000):
        for example in range(100, 106):
            write(example)
    assert not list(folder.rglob("*.checkpoint.parquet"))
    for example in range(106, 109):
        write(example)
    assert list(folder.rglob("*.checkpoint.parquet"))


def log_to_a_full_disk(folder: Path) -> None:
    """A training that catches the error, waits for room and flushes again loses no row."""
    store = dd.new_store(folder)
    logger = TeacherLogger(store, "fm", shard_rows=1_000)
    ids = torch.arange(5_000)
    with full_disk(1_000):
        with pytest.raises(StoreError, match="can't be written to") as caught:
            for part in ids.split(500):
                logger.log(part, dd.AT + part % 100, part.float())
            logger.flush()
        assert store.table.url in dd.sentence(caught.value)
        logged = int(part[-1]) + 1
        assert dd.by_id(store) == {}
    logger.close()
    assert dd.by_id(store) == {id_: [float(id_)] for id_ in range(logged)}
    assert logger.written == logged


def publish_to_a_full_disk(folder: Path) -> None:
    store = dd.new_store(folder)
    with full_disk(100):
        with pytest.raises(StoreError, match="can't be written to") as caught:
            publish(store, "fm", None, trained_through_seconds=5)
        assert f"{store.url}/snapshots" in dd.sentence(caught.value)
    assert published(store, "fm") == []
    assert publish(store, "fm", None, trained_through_seconds=5).version == 1


def create_on_a_full_disk(folder: Path) -> None:
    with full_disk(100), pytest.raises(StoreError, match="can't be made") as caught:
        dd.new_store(folder)
    assert str(folder) in dd.sentence(caught.value)
    assert list(dd.by_id(dd.small_store(folder))) == [0, 1, 2]
