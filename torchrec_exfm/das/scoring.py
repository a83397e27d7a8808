"""The teacher's pass: each example is scored once, however many students share it.

n examples, B of a batch, T tasks, E width of an embedding.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist
from tqdm import tqdm

from torchrec_exfm._ranks import of_each_rank, on_rank_0, rank, world_size
from torchrec_exfm.das.arrays import MAX_SECONDS, Ints, Mask, among, as_epoch, as_int64, utc
from torchrec_exfm.das.rules import BadRows, check_bad_rows
from torchrec_exfm.das.schema import Snapshot
from torchrec_exfm.das.snapshots import load_snapshot, newest_snapshot
from torchrec_exfm.das.store import TeacherStore, WriteReport

__all__ = ["Examples", "ScoringReport", "score"]


@dataclass(frozen=True)
class Examples:
    """The examples of one student, or of several.

    Args:
        example_ids: (n,) int64; examples of several students meet by them.
        event_seconds: (n,) event times, epoch seconds or timestamps, the same for the same id
            everywhere.
        batch: takes positions, (B,) int64, to the teacher's batch of the examples there. Called
            on a thread of its own.
    """

    example_ids: Any
    event_seconds: Any
    batch: Callable[[Tensor], Any]


@dataclass
class ScoringReport:
    """What a scoring job did, on all ranks together.

    Attributes:
        scored: examples that went through the teacher, each once, and whose outputs are stored.
        shared: examples given that an earlier one had the id of.
        stored_before: examples that had an output of this snapshot, or a newer one.
        quarantined: outputs left out because they break a rule.
        fillers: rows that went through the teacher once more, to keep the ranks in step where a
            shard has fewer rows than there are ranks.
        seconds: of the whole job.
    """

    scored: int = 0
    shared: int = 0
    stored_before: int = 0
    quarantined: int = 0
    fillers: int = 0
    seconds: float = 0.0


def score(
    model: nn.Module,
    store: TeacherStore,
    examples: Sequence[Examples],
    teacher: str | Snapshot,
    *,
    device: torch.device,
    batch_size: int = 8192,
    outputs: Callable[[Any], Tensor] = lambda output: output[1],
    embeddings: Callable[[Any], Tensor] | None = None,
    shard_rows: int = 2**18,
    bad_rows: BadRows = "refuse",
    progress: bool = True,
) -> ScoringReport:
    """Score examples into a store, each once; called by all ranks, with the same examples.

    The examples are taken window by window, and in a window shard by shard: all ranks score a part
    of the shard, one of them commits it. A job that was killed is started again with the same
    examples, on any number of ranks: what is in the store is not scored again. On another number
    the rest comes together in other batches, which leaves its values the same up to rounding.

    Args:
        model: the teacher under ``DistributedModelParallel``, sharded over the ranks.
        store: where to.
        examples: of all students; those that share an id are scored once, by the first's batch.
        teacher: a ``Snapshot``: the model is that one as it is. A name: before each window the
            newest snapshot is looked for that was trained through a time before all of the
            window's examples, and is loaded into the model, in place, if it is another than
            before: **the model's parameters are overwritten and stay so**.
        device: where the model runs.
        batch_size: of a rank.
        outputs: takes what ``EvalPipelineSparseDist.progress`` returns to logits, not
            probabilities (or predictions), (B, T) or (B,); the default fits
            ``(loss, logits, labels)``.
        embeddings: takes it to the teacher's embeddings, (B, E); None: rows are written without.
        shard_rows: rows of one commit.
        bad_rows: as for :meth:`TeacherStore.write`.
        progress: show a bar with rows a second and the time left, on rank 0.

    Raises:
        TypeError: for examples that are no list, or ids and times of another dtype.
        ValueError: for a wrong value; if an id has two event times, or ranks differ in their
            examples; for bad rows (leaks among them); if no published snapshot is old enough.
        StoreError: if the store can't be read or written.
    """
    if batch_size < 1 or shard_rows < 1:
        raise ValueError(
            "batch_size and shard_rows should be at least 1; received "
            f"{batch_size} and {shard_rows}"
        )
    check_bad_rows(bad_rows)
    if not isinstance(examples, (list, tuple)):
        raise TypeError(
            f"examples should be a list of Examples; received {type(examples).__name__}"
        )
    started = time.perf_counter()
    store = copy.copy(store)
    shards, shared = _plan(examples, store, shard_rows)
    job = _Job(model, store, device, batch_size, outputs, embeddings, bad_rows)
    job.report.shared = shared
    total = sum(len(shard.ids) for shard in shards)
    bar = tqdm(total=total, unit="rows", desc="scoring", disable=not progress or rank() > 0)
    with bar, contextlib.closing(job):
        for window, group in itertools.groupby(shards, key=lambda shard: shard.window):
            of_window = list(group)
            snapshot = teacher
            if isinstance(snapshot, str):
                first = min(int(shard.seconds.min()) for shard in of_window)
                snapshot = job.load_newest(snapshot, first)
            job.score_window(window, of_window, snapshot, bar)
    job.report.quarantined = sum(of_each_rank(job.report.quarantined))
    job.report.fillers = sum(of_each_rank(job.report.fillers))
    job.report.seconds = time.perf_counter() - started
    return job.report


@dataclass(frozen=True)
class _Shard:
    """What is committed as one: examples (n,) of one window, at positions of one student's."""

    window: int
    examples: Examples
    positions: Ints
    ids: Ints
    seconds: Ints

    def pieces(self, batch_size: int) -> list[Ints]:
        """This rank's rows, batch by batch; every rank has as many batches, some may be empty."""
        mine = np.array_split(np.arange(len(self.ids)), world_size())[rank()]
        longest = -(-len(self.ids) // world_size())
        return np.array_split(mine, -(-longest // batch_size))


@dataclass
class _Job:
    """The pass itself: the pipeline, the gathering of its outputs, the commits behind it."""

    model: nn.Module
    store: TeacherStore
    device: torch.device
    batch_size: int
    outputs: Callable[[Any], Tensor]
    embeddings: Callable[[Any], Tensor] | None
    bad_rows: BadRows

    def __post_init__(self) -> None:
        self.training = self.model.training
        self.report = ScoringReport()
        unused = torch.optim.SGD([torch.zeros(1)], lr=0.0)
        self.pipeline: Any = EvalPipelineSparseDist(self.model.eval(), unused, self.device)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="teacher-scores")
        self.writing: Future[WriteReport] | None = None
        self.loaded: Snapshot | None = None

    def close(self) -> None:
        self.pipeline.reset()
        self.pipeline.detach()
        self.model.train(self.training)
        self.writer.shutdown()

    def load_newest(self, teacher: str, first_seconds: int) -> Snapshot:
        """Load the newest snapshot that has seen none of a window's examples, if it is another."""
        store = self.store
        # a time out of range is a rule's to say, when it is written
        before = min(max(first_seconds, 0), MAX_SECONDS - 1)
        snapshot = on_rank_0(lambda: newest_snapshot(store, teacher, before_seconds=before))
        if snapshot is None and on_rank_0(lambda: newest_snapshot(store, teacher)) is None:
            raise ValueError(
                f"{store.url}: {teacher} has no published snapshot: publish one, or pass a Snapshot"
            )
        if snapshot is None:
            raise ValueError(
                f"{store.url}: no published snapshot of {teacher} was trained through a time "
                f"before {utc(first_seconds)}, of the first example, and a later one would leak: "
                "publish one, or score later examples"
            )
        if snapshot != self.loaded:
            load_snapshot(store, snapshot, self.model)
            self.loaded = snapshot
        return snapshot

    def score_window(
        self, window: int, shards: list[_Shard], snapshot: Snapshot, bar: tqdm[Any]
    ) -> None:
        """Score what the store does not have, and wait until it has it."""
        left = self._left(window, shards, snapshot)
        before = sum(len(shard.ids) for shard in shards) - sum(len(s.ids) for _, s in left)
        self.report.stored_before += before
        bar.total -= before
        feed = self._batches([shard for _, shard in left])
        for number, (name, shard) in enumerate(left):
            values = self._gather(self._forward(shard, feed, bar), len(shard.ids), number)
            self._wait()
            if values is not None:
                self.writing = self.writer.submit(self._write, name, shard, snapshot, values)
            self.report.scored += len(shard.ids)
        self.pipeline.reset()
        self._wait()
        if world_size() > 1:
            dist.barrier()  # the next window's look at the store sees all of this one's commits

    def _left(
        self, window: int, shards: list[_Shard], snapshot: Snapshot
    ) -> list[tuple[str, _Shard]]:
        """The shards with the examples that are to be scored, as all ranks see it."""
        self.store.refresh(on_rank_0(self.store.refresh))
        rows, _ = self.store.read(snapshot.teacher, window, bad_rows="quarantine")
        stored = np.unique(rows.example_id[rows.snapshot >= snapshot.version])
        left = []
        for shard in shards:
            new = ~among(shard.ids, stored)
            if self.bad_rows == "quarantine":  # what would leak is not scored to be left out then
                leaks = shard.seconds <= snapshot.trained_through_seconds
                self.report.quarantined += int((new & leaks).sum()) if rank() == 0 else 0
                new &= ~leaks
            if new.any():
                ids, seconds = shard.ids[new], shard.seconds[new]
                # a name that is the same in every run that finds the same left
                digest = hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
                rest = replace(shard, positions=shard.positions[new], ids=ids, seconds=seconds)
                left.append((f"score/{digest}", rest))
        return left

    def _batches(self, shards: list[_Shard]) -> Iterator[Any]:
        for shard in shards:
            for rows in shard.pieces(self.batch_size):
                at = rows if len(rows) else np.zeros(1, dtype=np.int64)  # a filler
                yield shard.examples.batch(torch.from_numpy(shard.positions[at]))

    def _forward(self, shard: _Shard, feed: Iterator[Any], bar: tqdm[Any]) -> Tensor:
        """This rank's outputs and embeddings, (its rows, T + E), float32, on the device."""
        parts = []
        for rows in shard.pieces(self.batch_size):
            with torch.no_grad():
                output = self.pipeline.progress(feed)
                logits, hidden = self.outputs(output), self.embeddings and self.embeddings(output)
                values = self.store.format.joined(logits, hidden, max(len(rows), 1))
            parts.append(values.float()[: len(rows)])
            self.report.fillers += not len(rows)
            bar.update(min(len(rows) * world_size(), bar.total - bar.n))
        return torch.cat(parts)

    def _gather(self, mine: Tensor, rows: int, number: int) -> Tensor | None:
        """The columns of all ranks, in the order of the shard, on the rank that commits it."""
        if world_size() == 1:
            return mine
        owner = number % world_size()
        sizes = [len(part) for part in np.array_split(np.arange(rows), world_size())]
        padded = torch.zeros(max(sizes), mine.shape[1], device=self.device)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes] if rank() == owner else None
        dist.gather(padded, parts, dst=owner)
        if parts is None:
            return None
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def _write(self, name: str, shard: _Shard, snapshot: Snapshot, values: Tensor) -> WriteReport:
        outputs, embeddings = values.tensor_split([len(self.store.tasks)], dim=1)
        options: Any = {"embeddings": self.embeddings and embeddings, "bad_rows": self.bad_rows}
        return self.store.write(snapshot, shard.ids, outputs, shard.seconds, shard=name, **options)

    def _wait(self) -> None:
        if self.writing is not None:
            writing, self.writing = self.writing, None
            self.report.quarantined += sum(writing.result().quarantined.values())


def _plan(
    examples: Sequence[Examples], store: TeacherStore, shard_rows: int
) -> tuple[list[_Shard], int]:
    """The shards in order of windows, every id in one of them; and how many ids came again."""
    all_ids = [as_int64("example_ids", each.example_ids) for each in examples]
    sizes = [len(ids) for ids in all_ids]
    all_seconds = [
        as_epoch("event_seconds", each.event_seconds, size)
        for each, size in zip(examples, sizes, strict=True)
    ]
    nothing = np.empty(0, dtype=np.int64)
    ids, seconds = np.concatenate([nothing, *all_ids]), np.concatenate([nothing, *all_seconds])
    starts, source = np.cumsum([0, *sizes]), np.repeat(np.arange(len(examples)), sizes)
    again = _again(ids, seconds)
    if world_size() > 1:
        digest = hashlib.blake2b(ids.tobytes() + seconds.tobytes()).hexdigest()
        digests = of_each_rank(digest)
        different = [index for index, other in enumerate(digests) if other != digests[0]]
        if different:
            raise ValueError(
                "examples should be the same on every rank (score() divides them); received "
                f"others on ranks {different} than on rank 0"
            )
    window = store.window_of(seconds)
    kept = np.flatnonzero(~again)
    kept = kept[np.lexsort((source[kept], window[kept]))]
    turns = np.flatnonzero(np.diff(window[kept]) | np.diff(source[kept])) + 1
    shards = []
    for group in np.split(kept, turns) if len(kept) else []:
        for part in np.split(group, range(shard_rows, len(group), shard_rows)):
            at, k = int(window[part[0]]), source[part[0]]
            shards.append(_Shard(at, examples[k], part - starts[k], ids[part], seconds[part]))
    return shards, int(again.sum())


def _again(ids: Ints, seconds: Ints) -> Mask:
    """Which examples (n,) have the id of an earlier one."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    earliest = first[inverse]
    differ = ids[seconds != seconds[earliest]]
    if len(differ):
        raise ValueError(
            f"an example id should have one event time; received several for {len(set(differ))} "
            f"ids, the first of them {differ.min()}: they may not be ids of the same example"
        )
    again: Mask = earliest != np.arange(len(ids))
    return again
