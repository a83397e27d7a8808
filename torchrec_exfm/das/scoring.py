"""The teacher's pass: each rank scores shards of its own, each shard once, by its name.

B examples of a batch, T tasks, E width of an embedding.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist
from tqdm import tqdm

from torchrec_exfm._ranks import of_each_rank, rank, world_size
from torchrec_exfm.das.feed import (
    Feed,
    Part,
    ScoringReport,
    Shard,
    describe_error,
    mark_done,
    name_in_errors,
)
from torchrec_exfm.das.rules import BadRows, check_bad_rows
from torchrec_exfm.das.schema import Snapshot
from torchrec_exfm.das.snapshots import load_snapshot
from torchrec_exfm.das.store import TeacherStore, WriteReport

__all__ = ["ScoringReport", "Shard", "score"]


def score(
    model: nn.Module,
    store: TeacherStore,
    shards: Iterable[Shard],
    teacher: str | Snapshot,
    *,
    device: torch.device,
    ids: Callable[[Any], Any] = operator.attrgetter("example_ids"),
    event_seconds: Callable[[Any], Any] = operator.attrgetter("event_seconds"),
    keys: Callable[[Any], Mapping[str, Any]] | None = None,
    outputs: Callable[[Any], Tensor] = lambda output: output[1],
    embeddings: Callable[[Any], Tensor] | None = None,
    tasks: Sequence[str] | None = None,
    shard_rows: int = 2**18,
    bad_rows: BadRows = "refuse",
    progress: bool = True,
) -> ScoringReport:
    """Score shards into a store, each once; called by all ranks, each with shards of its own.

    Ranks may have any number of shards, of any length; the teacher's collectives stay in step, as a
    rank that is out of batches runs one again and drops what it gives. A job that was killed is
    started again, on any number of ranks: a shard that is in the store is skipped, unless rows were
    removed since by :func:`forget` or a repair; what is left of the others is scored. Two ranks or
    jobs that get the same shard both score it, and write its rows once.

    Args:
        model: the teacher under ``DistributedModelParallel``, sharded over the ranks.
        store: where to.
        shards: this rank's, taken in turn, each opened when its turn comes.
        teacher: a ``Snapshot``: the model is that one as it is. A name: for each shard the newest
            published snapshot that was trained through a time before its ``begin_seconds``. It is
            loaded into the model, in place, when all ranks are done with those before it: **the
            model's parameters are overwritten and stay so**. Shards should come in order of time.
        device: where the model runs.
        ids: takes a batch, as it is read, to its example ids, (B,) int64 on the host.
        event_seconds: takes it to its event times, (B,) epoch seconds or timestamps.
        keys: takes it to its keys by name, as for :meth:`TeacherStore.write`, (B,) each, on the
            host; None: rows are written without.
        outputs: takes what ``EvalPipelineSparseDist.progress`` returns to logits, not
            probabilities (or predictions), (B, T) or (B,); the default fits
            ``(loss, logits, labels)``.
        embeddings: takes it to the teacher's embeddings, (B, E); None: rows are written without.
        tasks: as for :meth:`TeacherStore.write`.
        shard_rows: rows of one commit, up to a batch more; the outputs of two are held in memory.
        bad_rows: as for :meth:`TeacherStore.write`.
        progress: show a bar of rank 0's shards, with its rows a second.

    Raises:
        TypeError: for ids, times and keys of another dtype.
        ValueError: for a wrong value; for bad rows (leaks among them); if no published snapshot is
            old enough; if a shard has other examples than it was written with.
        RuntimeError: if a shard's batches can't be read; if another rank has stopped by an error.
        StoreError: if the store can't be read or written.
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows should be at least 1; received {shard_rows}")
    check_bad_rows(bad_rows)
    started = time.perf_counter()
    store, read = copy.copy(store), copy.copy(store)
    # of its own, as batches are read on a thread of their own; and on the host
    group = dist.new_group(backend="gloo") if world_size() > 1 else None
    feed = Feed(read, shards, teacher, group, ids, event_seconds, keys, shard_rows)
    known = len(shards) if isinstance(shards, Sized) else None
    bar = tqdm(total=known, unit="shards", desc="scoring", disable=not progress or rank() > 0)
    said = outputs, embeddings, store.format.chosen(tasks)
    with bar, _Job(model, store, device, feed, bar, *said, bad_rows) as job:
        job.run(teacher)
        told = of_each_rank((describe_error(feed.failure), feed.report), group)
    if group is not None:
        dist.destroy_process_group(group)
    if feed.failure is not None:
        raise feed.failure
    for number, (words, _) in enumerate(told):
        if words:
            raise RuntimeError(f"rank {number} stopped, and all ranks with it: {words}")
    names = [each.name for each in fields(ScoringReport)]
    report = ScoringReport(**{n: sum(getattr(one, n) for _, one in told) for n in names})
    report.seconds = time.perf_counter() - started
    return report


@dataclass
class _Job:
    """The pass itself: the pipeline, and the commits behind it."""

    model: nn.Module
    store: TeacherStore
    device: torch.device
    feed: Feed
    bar: tqdm[Any]
    outputs: Callable[[Any], Tensor]
    embeddings: Callable[[Any], Tensor] | None
    tasks: tuple[str, ...]
    bad_rows: BadRows

    def __enter__(self) -> _Job:
        self.training = self.model.training
        unused = torch.optim.SGD([torch.zeros(1)], lr=0.0)
        self.pipeline: Any = EvalPipelineSparseDist(self.model.eval(), unused, self.device)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="teacher-scores")
        self.writing: Future[WriteReport] | None = None
        self.collected: list[tuple[Part, Tensor]] = []  # of the piece that is scored
        self.rows, self.started = 0, time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.pipeline.reset()
        self.pipeline.detach()
        self.model.train(self.training)
        self.writer.shutdown()

    def run(self, teacher: str | Snapshot) -> None:
        """Score what the feed gives; an error of this rank alone is in the feed's failure then."""
        loaded = teacher if isinstance(teacher, Snapshot) else None
        while True:
            self._score(self.feed.batches(loaded))
            loaded = self.feed.due
            if loaded is None:
                break
            load_snapshot(self.store, loaded, self.model)
        self._run_unless_failed(self._finish_write)

    def _score(self, batches: Iterator[Any]) -> None:
        """All of the batches, which ends with none in flight."""
        while True:
            try:
                with torch.no_grad():
                    output = self.pipeline.progress(batches)
            except StopIteration:
                self.pipeline.reset()
                return
            part = self.feed.sent.popleft()
            self._run_unless_failed(self._collect, part, output)

    def _run_unless_failed(self, function: Callable[..., None], *args: Any) -> None:
        """Keep an error for when all ranks can be told; nothing more is written then."""
        try:
            if self.feed.failure is None:
                function(*args)
        except Exception as error:
            self.feed.failure = error

    def _collect(self, part: Part | None, output: Any) -> None:
        logits, hidden = self.outputs(output), self.embeddings and self.embeddings(output)
        if part is None:
            self.feed.report.fillers += len(logits)
            return
        values = self.store.format.joined(logits, hidden, len(part.ids), self.tasks)
        self.collected.append((part, values.float()))
        self.rows += len(part.ids)
        if part.ends_piece:
            self._finish_write()
            self.writing = self.writer.submit(self._write, self.collected)
            self.collected = []
        if part.ends_shard:
            self.feed.report.shards += 1
            rate = self.rows / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"{rate:,.0f} rows/s a rank", refresh=False)
            self.bar.update(self.feed.report.shards + self.feed.report.skipped - self.bar.n)

    def _write(self, collected: list[tuple[Part, Tensor]]) -> WriteReport:
        """A piece; and with its last one the mark of the shard."""
        last = collected[-1][0]
        keys = {name: np.concatenate([p.keys[name] for p, _ in collected]) for name in last.keys}
        ids, seconds = (
            np.concatenate([getattr(p, n) for p, _ in collected]) for n in ("ids", "seconds")
        )
        outputs, embeddings = torch.cat([v for _, v in collected]).tensor_split(
            [len(self.tasks)], dim=1
        )
        assignment = last.assignment
        with name_in_errors(assignment.shard):
            report = self.store.write(
                assignment.snapshot,
                ids,
                outputs,
                seconds,
                tasks=self.tasks,
                shard=f"{assignment.shard.name}/{last.piece}",
                keys=keys,
                embeddings=self.embeddings and embeddings,
                bad_rows=self.bad_rows,
            )
        if last.ends_shard:
            mark_done(self.store, assignment)
        return report

    def _finish_write(self) -> None:
        if self.writing is not None:
            writing, self.writing = self.writing, None
            report, written = self.feed.report, writing.result()
            report.scored += written.written
            report.stored_before += written.stored_before
            report.quarantined += sum(written.quarantined.values())
