"""Scoring: a pass of the teacher over shards, each of which is written once, under its name.

Shapes: B examples of a batch, T tasks, E width of an embedding.
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

from torchrec_exfm._ranks import gather_from_ranks, rank, world_size
from torchrec_exfm.das.feed import Feed, Part, ScoringReport, Shard, describe, mark_done, naming
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

    Ranks may have any number of shards, of any length. A rank that is out of batches scores one
    again and drops the result, so that the teacher's collectives stay in step.

    A killed job can be started again, on any number of ranks. It skips shards that are complete in
    the store, unless :func:`forget` or a repair has removed rows since, and scores what the others
    lack. If two ranks or jobs get the same shard, both score it, and its rows are written once.

    Args:
        model: the teacher under ``DistributedModelParallel``, sharded over the ranks.
        store: the store to write to.
        shards: this rank's shards, each opened when its turn comes.
        teacher: a ``Snapshot``, if the model holds its parameters already; or a name, for the
            newest published snapshot that was trained through a time before each shard's
            ``begin_seconds``. It is loaded into the model in place, once all ranks are done with
            the previous one: **the model's parameters are overwritten and not restored**. Shards
            should come in order of time.
        device: the device that the model runs on.
        ids: function from a batch, as it is read, to its example ids, (B,) int64 on the host.
        event_seconds: function from a batch to its event times, (B,) epoch seconds or timestamps.
        keys: function from a batch to its keys by name, as for :meth:`TeacherStore.write`, (B,)
            each, on the host; None: rows are written without keys.
        outputs: function from the result of ``EvalPipelineSparseDist.progress`` to logits, not
            probabilities (or to predictions), (B, T) or (B,); the default fits
            ``(loss, logits, labels)``.
        embeddings: function from the same result to the teacher's embeddings, (B, E); None: rows
            are written without embeddings.
        tasks: as for :meth:`TeacherStore.write`.
        shard_rows: rows of one commit, up to a batch more; the outputs of two commits are held in
            memory.
        bad_rows: as for :meth:`TeacherStore.write`.
        progress: show a progress bar of rank 0's shards, with its rows a second.

    Raises:
        TypeError: for ids, times or keys of a wrong dtype.
        ValueError: for a wrong value; for bad rows (leaks among them); if no published snapshot is
            old enough; if a shard has other examples than it was written with.
        RuntimeError: if a shard's batches can't be read; if another rank has stopped with an error.
        StoreError: if the store can't be read or written.
    """
    if shard_rows < 1:
        raise ValueError(f"shard_rows should be at least 1; received {shard_rows}")
    check_bad_rows(bad_rows)
    started = time.perf_counter()
    store, read = copy.copy(store), copy.copy(store)
    # The feed's collectives run on the pipeline's loading thread, beside the model's: in one group
    # their order could differ between ranks. gloo, since it exchanges objects on the host.
    group = dist.new_group(backend="gloo") if world_size() > 1 else None
    feed = Feed(read, shards, teacher, group, ids, event_seconds, keys, shard_rows)
    num_shards = len(shards) if isinstance(shards, Sized) else None
    bar = tqdm(total=num_shards, unit="shards", desc="scoring", disable=not progress or rank() > 0)
    chosen = store.format.chosen(tasks)
    with bar, _Job(model, store, device, feed, bar, outputs, embeddings, chosen, bad_rows) as job:
        job.run(teacher)
        results = gather_from_ranks((describe(feed.failure), feed.report), group)
    if group is not None:
        dist.destroy_process_group(group)
    if feed.failure is not None:
        raise feed.failure
    for number, (failure, _) in enumerate(results):
        if failure:
            raise RuntimeError(f"rank {number} stopped, and all ranks with it: {failure}")
    names = [field.name for field in fields(ScoringReport)]
    report = ScoringReport(**{n: sum(getattr(part, n) for _, part in results) for n in names})
    report.seconds = time.perf_counter() - started
    return report


@dataclass
class _Job:
    """The pass of one rank: its pipeline, and the thread that writes the outputs."""

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
        unused = torch.optim.SGD([torch.zeros(1)], lr=0.0)  # the constructor demands an optimizer
        self.pipeline: Any = EvalPipelineSparseDist(self.model.eval(), unused, self.device)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="teacher-scores")
        self.writing: Future[WriteReport] | None = None
        self.parts: list[tuple[Part, Tensor]] = []  # of the piece being scored
        self.rows, self.started = 0, time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.pipeline.reset()
        self.pipeline.detach()
        self.model.train(self.training)
        self.writer.shutdown()

    def run(self, teacher: str | Snapshot) -> None:
        """Score all of the feed; keep this rank's error in ``feed.failure`` instead of raising."""
        loaded = teacher if isinstance(teacher, Snapshot) else None
        while True:
            self._score(self.feed.batches(loaded))
            loaded = self.feed.due
            if loaded is None:
                break
            load_snapshot(self.store, loaded, self.model)
        self._attempt(self._finish_write)

    def _score(self, batches: Iterator[Any]) -> None:
        """Score the batches for one snapshot, until none is in flight."""
        while True:
            try:
                with torch.no_grad():
                    output = self.pipeline.progress(batches)
            except StopIteration:
                self.pipeline.reset()
                return
            part = self.feed.sent.popleft()
            self._attempt(self._collect, part, output)

    def _attempt(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function unless this rank has failed; keep an error in ``feed.failure``.

        Raised here, it would leave the other ranks waiting in the model's collectives.
        """
        try:
            if self.feed.failure is None:
                function(*args)
        except Exception as error:
            self.feed.failure = error

    def _collect(self, part: Part | None, output: Any) -> None:
        logits, embeddings = self.outputs(output), self.embeddings and self.embeddings(output)
        if part is None:
            self.feed.report.fillers += len(logits)
            return
        values = self.store.format.joined(logits, embeddings, len(part.ids), self.tasks)
        self.parts.append((part, values.float()))
        self.rows += len(part.ids)
        if part.ends_piece:
            self._finish_write()  # one write at a time, so that at most two pieces are in memory
            self.writing = self.writer.submit(self._write, self.parts)
            self.parts = []
        if part.ends_shard:
            self.feed.report.shards += 1
            rate = self.rows / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"{rate:,.0f} rows/s a rank", refresh=False)
            self.bar.update(self.feed.report.shards + self.feed.report.skipped - self.bar.n)

    def _write(self, parts: list[tuple[Part, Tensor]]) -> WriteReport:
        """Write a piece, and mark the shard as done after its last one."""
        last = parts[-1][0]
        keys = {name: np.concatenate([p.keys[name] for p, _ in parts]) for name in last.keys}
        ids, seconds = (
            np.concatenate([getattr(p, n) for p, _ in parts]) for n in ("ids", "seconds")
        )
        outputs, embeddings = torch.cat([v for _, v in parts]).tensor_split(
            [len(self.tasks)], dim=1
        )
        work = last.work
        with naming(work.shard):
            report = self.store.write(
                work.snapshot,
                ids,
                outputs,
                seconds,
                tasks=self.tasks,
                shard=f"{work.shard.name}/{last.piece}",
                keys=keys,
                embeddings=self.embeddings and embeddings,
                bad_rows=self.bad_rows,
            )
        if last.ends_shard:
            mark_done(self.store, work)
        return report

    def _finish_write(self) -> None:
        if self.writing is not None:
            writing, self.writing = self.writing, None
            report, written = self.feed.report, writing.result()
            report.scored += written.written
            report.stored_before += written.stored_before
            report.quarantined += sum(written.quarantined.values())
