"""The teacher's pass: each rank scores shards of its own, each shard once, by its name.

B examples of a batch, T tasks, E width of an embedding.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist
from tqdm import tqdm

from torchrec_exfm._ranks import of_each_rank, rank, world_size
from torchrec_exfm.das.arrays import Ints, among, as_epoch, as_int64, as_second, utc
from torchrec_exfm.das.delta import Commit
from torchrec_exfm.das.rules import BadRows, check_bad_rows
from torchrec_exfm.das.schema import Snapshot
from torchrec_exfm.das.shards import transaction_name
from torchrec_exfm.das.snapshots import load_snapshot, newest_snapshot
from torchrec_exfm.das.store import TeacherStore, WriteReport

__all__ = ["ScoringReport", "Shard", "score"]

_NONE = np.empty(0, dtype=np.int64)
_AHEAD = 8  # batches that are read ahead, and that ranks agree on at once


@dataclass(frozen=True)
class Shard:
    """Examples that are scored once, by the name that they go by: those of a file, say.

    Args:
        name: among those of the teacher's snapshot; an example is in one shard.
        batches: opens the shard: returns an iterable of the teacher's batches, the same ones in the
            same order each time. Not called for a shard that is in the store.
        begin_seconds: epoch seconds, no later than any of its events; needed where the snapshot is
            chosen by time.

    Raises:
        TypeError: for a wrong kind.
        ValueError: for a name that is empty, or a time out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> def shard_of(file):
        ...     return Shard(file, lambda: DataLoader(range(4), batch_size=2))  # of what is in it
        >>> shards = (shard_of(file) for file in ["09.parquet", "10.parquet"])  # opened in turn
        >>> [(shard.name, len(list(shard.batches()))) for shard in shards]
        [('09.parquet', 2), ('10.parquet', 2)]
    """

    name: str
    batches: Callable[[], Iterable[Any]]
    begin_seconds: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.batches):
            raise TypeError(
                "a Shard should have a name, in text, and a function that opens its batches; "
                f"received {type(self.name).__name__} and {type(self.batches).__name__}: "
                "Shard('name', lambda: batches)"
            )
        if not self.name:
            raise ValueError("a Shard should have a name; received ''")
        if self.begin_seconds is not None:
            second = as_second("begin_seconds", self.begin_seconds)
            object.__setattr__(self, "begin_seconds", second)


@dataclass
class ScoringReport:
    """What a scoring job did, on all ranks together.

    Attributes:
        shards: that are in the store now and were not, or not wholly.
        skipped: shards that were in the store.
        scored: examples whose outputs were written.
        stored_before: examples of shards that were not skipped whose outputs were in the store.
        quarantined: outputs left out because they break a rule.
        fillers: rows that went through the teacher once more, to keep its ranks in step where one
            has more batches than another.
        seconds: of the whole job.
    """

    shards: int = 0
    skipped: int = 0
    scored: int = 0
    stored_before: int = 0
    quarantined: int = 0
    fillers: int = 0
    seconds: float = 0.0


def score(
    model: nn.Module,
    store: TeacherStore,
    shards: Iterable[Shard],
    teacher: str | Snapshot,
    *,
    device: torch.device,
    ids: Callable[[Any], Any] = operator.attrgetter("example_ids"),
    event_seconds: Callable[[Any], Any] = operator.attrgetter("event_seconds"),
    outputs: Callable[[Any], Tensor] = lambda output: output[1],
    embeddings: Callable[[Any], Tensor] | None = None,
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
        outputs: takes what ``EvalPipelineSparseDist.progress`` returns to logits, not
            probabilities (or predictions), (B, T) or (B,); the default fits
            ``(loss, logits, labels)``.
        embeddings: takes it to the teacher's embeddings, (B, E); None: rows are written without.
        shard_rows: rows of one commit, up to a batch more; the outputs of two are held in memory.
        bad_rows: as for :meth:`TeacherStore.write`.
        progress: show a bar of rank 0's shards, with its rows a second.

    Raises:
        TypeError: for ids and times of another dtype.
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
    feed = _Feed(read, shards, teacher, group, ids, event_seconds, shard_rows)
    known = len(shards) if isinstance(shards, Sized) else None
    bar = tqdm(total=known, unit="shards", desc="scoring", disable=not progress or rank() > 0)
    with bar, _Job(model, store, device, feed, bar, outputs, embeddings, bad_rows) as job:
        job.run(teacher)
        told = of_each_rank((_words(feed.failure), feed.report), group)
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


@dataclass(frozen=True)
class _Task:
    """A shard that is to be scored by a snapshot, begun as of a commit of the store."""

    shard: Shard
    snapshot: Snapshot
    commit: int


@dataclass(frozen=True)
class _Part:
    """The examples (B,) of a batch, of the piece of a shard that is committed with a number."""

    task: _Task
    piece: int
    ids: Ints
    seconds: Ints
    ends_piece: bool
    ends_shard: bool


@dataclass
class _Feed:
    """Reads this rank's batches, and gives as many as other ranks give."""

    store: TeacherStore
    shards: Iterable[Shard]
    teacher: str | Snapshot
    group: dist.ProcessGroup | None
    ids: Callable[[Any], Any]
    event_seconds: Callable[[Any], Any]
    shard_rows: int
    report: ScoringReport = field(default_factory=ScoringReport)
    ahead: deque[tuple[_Part, Any]] = field(default_factory=deque)
    sent: deque[_Part | None] = field(default_factory=deque)  # of the batches given; None: again
    due: Snapshot | None = None  # what the next batches of all ranks are to be scored by
    failure: Exception | None = None  # of this rank: all stop when they agree the next time
    spare: Any = None  # a batch that may be run again

    def __post_init__(self) -> None:
        self.parts = self._parts()

    def batches(self, loaded: Snapshot | None) -> Iterator[Any]:
        """What is to be scored by the snapshot that is loaded, until no rank has more of it."""
        while steps := self._agree(loaded):
            for _ in range(steps):
                part = None
                if self.ahead and self.ahead[0][0].task.snapshot == loaded:
                    part, self.spare = self.ahead.popleft()
                self.sent.append(part)
                yield self.spare
                self._read_ahead()

    def _agree(self, loaded: Snapshot | None) -> int:
        """How many batches come next on all ranks; 0 if another snapshot is due, or none is."""
        self._read_ahead()
        if self.spare is None and self.ahead:
            self.spare = self.ahead[0][1]
        ours = [part.task.snapshot for part, _ in self.ahead]
        first, count = (ours[0], ours.count(ours[0])) if ours else (None, 0)
        mine = first, count, self.spare is not None, self.failure is not None
        told = of_each_rank(mine, self.group)
        firsts = [snapshot for snapshot, *_ in told if snapshot is not None]
        stopping = any(failed for *_, failed in told)
        self.due = None if stopping else min(firsts, key=lambda one: one.version, default=None)
        if self.due is None or self.due != loaded:
            return 0
        self._share_a_spare([has_spare for _, _, has_spare, _ in told])
        return max(number for snapshot, number, *_ in told if snapshot == loaded)

    def _share_a_spare(self, have: list[bool]) -> None:
        """Give a rank that has no batch at all one of another rank."""
        if all(have):
            return
        giver = have.index(True)
        given = [_pickled(self.spare) if rank() == giver else b""]
        dist.broadcast_object_list(given, src=giver, group=self.group)
        if isinstance(given[0], Exception):
            raise given[0]
        if self.spare is None:
            self.spare = pickle.loads(given[0])

    def _read_ahead(self) -> None:
        try:
            while self.failure is None and len(self.ahead) < _AHEAD:
                self.ahead.append(next(self.parts))
        except StopIteration:
            pass
        except Exception as error:
            self.failure = error

    def _parts(self) -> Iterator[tuple[_Part, Any]]:
        """The batches that are to be scored."""
        for shard in self.shards:
            snapshot = self._snapshot_of(shard)
            task = _Task(shard, snapshot, self.store.refresh())
            if _is_whole(self.store, task):
                self.report.skipped += 1
                continue
            left = False
            for found in self._cut(task, self._missing(task)):
                left = True
                yield found
            if not left:
                _mark(self.store, task)
                self.report.skipped += 1

    def _snapshot_of(self, shard: Shard) -> Snapshot:
        teacher, url, begin = self.teacher, self.store.url, shard.begin_seconds
        if isinstance(teacher, Snapshot):
            return teacher
        if begin is None:
            raise ValueError(
                f"the shard {shard.name!r} should have begin_seconds, by which a snapshot of "
                f"{teacher} is chosen; received None: pass it, or a Snapshot as the teacher"
            )
        if (snapshot := newest_snapshot(self.store, teacher, before_seconds=begin)) is not None:
            return snapshot
        if newest_snapshot(self.store, teacher) is None:
            raise ValueError(
                f"{url}: {teacher} has no published snapshot: publish one, or pass a Snapshot"
            )
        raise ValueError(
            f"{url}: no published snapshot of {teacher} was trained through a time before "
            f"{utc(begin)}, where the shard {shard.name!r} begins, and a later one would leak: "
            "publish one, or score later examples"
        )

    def _missing(self, task: _Task) -> list[int] | None:
        """The pieces of a shard that are not in the store; None: all, it was not begun."""
        begun = transaction_name(task.snapshot, f"{task.shard.name}/0")
        if self.store.table.transaction(begun) is None:
            return None
        missing, stored = [], _Stored(self.store, task.snapshot)
        for piece, group in itertools.groupby(self._cut(task), lambda pair: pair[0].piece):
            columns = [(part.ids, part.seconds) for part, _ in group]
            ids, seconds = map(np.concatenate, zip(*columns, strict=True))
            if stored.has(ids, seconds):
                self.report.stored_before += len(ids)
            else:
                missing.append(piece)
        return missing

    def _cut(self, task: _Task, wanted: list[int] | None = None) -> Iterator[tuple[_Part, Any]]:
        """A shard's batches, in pieces of whole batches; those of some pieces, if they are given.

        It is cut the same way each time, so that a piece is written once, by its number.
        """
        if wanted == []:
            return
        piece = rows = 0
        batches = itertools.chain(self._opened(task.shard), [(None, _NONE, _NONE)])
        for (batch, ids, seconds), (_, after, _) in itertools.pairwise(batches):
            rows += len(ids)
            ends = rows >= self.shard_rows or not len(after)
            last = not len(after) if wanted is None else ends and piece == wanted[-1]
            if wanted is None or piece in wanted:
                yield _Part(task, piece, ids, seconds, ends, last), batch
            if last:
                return
            if ends:
                piece, rows = piece + 1, 0

    def _opened(self, shard: Shard) -> Iterator[tuple[Any, Ints, Ints]]:
        """Batches, with their ids and times, as far as they have examples."""
        for batch in _reading(shard):
            with _naming(shard):
                ids = as_int64("example_ids", self.ids(batch))
                seconds = as_epoch("event_seconds", self.event_seconds(batch), len(ids))
            if len(ids):
                yield batch, ids, seconds


class _Stored:
    """Which examples the store has outputs of, by a snapshot or a newer one."""

    def __init__(self, store: TeacherStore, snapshot: Snapshot) -> None:
        self.store, self.snapshot = store, snapshot
        self.window, self.ids = -1, _NONE  # one window at a time

    def has(self, ids: Ints, seconds: Ints) -> bool:
        """Whether it has all (n,)."""
        windows = self.store.window_of(seconds)
        return all(
            among(ids[windows == window], self._of(window)).all()
            for window in np.unique(windows).tolist()
        )

    def _of(self, window: int) -> Ints:
        if window != self.window:
            teacher, tasks = self.snapshot.teacher, self.store.tasks[:1]
            rows, _ = self.store.read(teacher, window, tasks=tasks, bad_rows="quarantine")
            newer = rows.snapshot >= self.snapshot.version
            self.window, self.ids = window, np.unique(rows.example_id[newer])
        return self.ids


@dataclass
class _Job:
    """The pass itself: the pipeline, and the commits behind it."""

    model: nn.Module
    store: TeacherStore
    device: torch.device
    feed: _Feed
    bar: tqdm[Any]
    outputs: Callable[[Any], Tensor]
    embeddings: Callable[[Any], Tensor] | None
    bad_rows: BadRows

    def __enter__(self) -> _Job:
        self.training = self.model.training
        unused = torch.optim.SGD([torch.zeros(1)], lr=0.0)
        self.pipeline: Any = EvalPipelineSparseDist(self.model.eval(), unused, self.device)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="teacher-scores")
        self.writing: Future[WriteReport] | None = None
        self.kept: list[tuple[_Part, Tensor]] = []  # of the piece that is scored
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
        self._trying(self._wait)

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
            self._trying(self._keep, part, output)

    def _trying(self, function: Callable[..., None], *args: Any) -> None:
        """Keep an error for when all ranks can be told; nothing more is written then."""
        try:
            if self.feed.failure is None:
                function(*args)
        except Exception as error:
            self.feed.failure = error

    def _keep(self, part: _Part | None, output: Any) -> None:
        logits, hidden = self.outputs(output), self.embeddings and self.embeddings(output)
        if part is None:
            self.feed.report.fillers += len(logits)
            return
        self.kept.append((part, self.store.format.joined(logits, hidden, len(part.ids)).float()))
        self.rows += len(part.ids)
        if part.ends_piece:
            self._wait()
            self.writing = self.writer.submit(self._write, self.kept)
            self.kept = []
        if part.ends_shard:
            self.feed.report.shards += 1
            rate = self.rows / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"{rate:,.0f} rows/s a rank", refresh=False)
            self.bar.update(self.feed.report.shards + self.feed.report.skipped - self.bar.n)

    def _write(self, kept: list[tuple[_Part, Tensor]]) -> WriteReport:
        """A piece; and with its last one the mark of the shard."""
        last, tasks = kept[-1][0], len(self.store.tasks)
        ids, seconds = (
            np.concatenate([getattr(p, n) for p, _ in kept]) for n in ("ids", "seconds")
        )
        outputs, embeddings = torch.cat([v for _, v in kept]).tensor_split([tasks], dim=1)
        options: Any = {"embeddings": self.embeddings and embeddings, "bad_rows": self.bad_rows}
        task, name = last.task, f"{last.task.shard.name}/{last.piece}"
        with _naming(task.shard):
            report = self.store.write(task.snapshot, ids, outputs, seconds, shard=name, **options)
        if last.ends_shard:
            _mark(self.store, task)
        return report

    def _wait(self) -> None:
        if self.writing is not None:
            writing, self.writing = self.writing, None
            report, written = self.feed.report, writing.result()
            report.scored += written.written
            report.stored_before += written.stored_before
            report.quarantined += sum(written.quarantined.values())


def _is_whole(store: TeacherStore, task: _Task) -> bool:
    """Whether a shard was written to its end, and nothing was removed since it was begun."""
    begun = store.table.transaction(_mark_name(task))
    return begun is not None and begun > store.table.removed


def _mark(store: TeacherStore, task: _Task) -> None:
    """Say that a shard is in the store, all of it: the number is the commit it was begun at."""
    nothing, transaction = store.format.schema().empty_table(), (_mark_name(task), task.commit)
    mark = Commit(lambda properties: store.table.append(nothing, properties), transaction)
    store.table.commit(
        f"can't be written to, and the shard {task.shard.name!r} was not marked as done",
        lambda: None if _is_whole(store, task) else mark,
    )


def _mark_name(task: _Task) -> str:
    return f"scored/{task.snapshot.teacher}/{task.snapshot.version}/{task.shard.name}"


def _reading(shard: Shard) -> Iterator[Any]:
    try:
        yield from shard.batches()
    except Exception as error:
        raise RuntimeError(f"the shard {shard.name!r} can't be read: {_words(error)}") from error


@contextlib.contextmanager
def _naming(shard: Shard) -> Iterator[None]:
    """Say which shard it is that has wrong values."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"the shard {shard.name!r}: {error}") from error


def _pickled(batch: Any) -> bytes | Exception:
    try:
        return pickle.dumps(batch)
    except Exception as error:
        return TypeError(
            "a batch should be one that can be pickled, as a rank without a shard gets one of "
            f"another rank's; received one that can't: {_words(error)}: give every rank a shard"
        )


def _words(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}" if error is not None else ""
