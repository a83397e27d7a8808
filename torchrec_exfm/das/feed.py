"""The feed of a scoring job: it reads shards in batches, keeps ranks in step, marks shards done.

B examples of a batch.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist

from torchrec_exfm._ranks import gather_from_ranks, rank
from torchrec_exfm.das.arrays import Ints, among, as_epoch, as_int64, as_second, utc
from torchrec_exfm.das.delta import Commit
from torchrec_exfm.das.schema import Snapshot, as_keys, check_same_keys
from torchrec_exfm.das.shards import transaction_name
from torchrec_exfm.das.snapshots import newest_snapshot
from torchrec_exfm.das.store import TeacherStore

__all__ = ["Feed", "Part", "ScoringReport", "Shard", "describe", "mark_done", "naming"]

_NO_IDS = np.empty(0, dtype=np.int64)
_AHEAD = 8  # read ahead, so that ranks communicate once in so many batches


@dataclass(frozen=True)
class Shard:
    """A named piece of scoring work, such as the examples of a file, which is written once.

    Args:
        name: unique among the shards of the teacher's snapshot. No example is in two shards.
        batches: function that opens the shard: it returns an iterable of the teacher's batches, the
            same ones in the same order at each call. Not called if the shard is in the store.
        begin_seconds: epoch seconds, no later than any event of the shard; required if the snapshot
            is chosen by time.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an empty name, or a time out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> def shard_of(file):
        ...     return Shard(file, lambda: DataLoader(range(4), batch_size=2))  # the file's rows
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
    """Counts of a scoring job, over all ranks.

    Attributes:
        shards: shards that this job completed.
        skipped: shards that were in the store already.
        scored: examples whose outputs were written.
        stored_before: examples of shards that were not skipped, whose outputs were in the store
            already.
        quarantined: outputs left out because they break a rule.
        fillers: rows that were scored again, and dropped, to keep ranks in step where one has more
            batches than another.
        seconds: duration of the job.
    """

    shards: int = 0
    skipped: int = 0
    scored: int = 0
    stored_before: int = 0
    quarantined: int = 0
    fillers: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Work:
    """A shard, the snapshot to score it with, and the store's commit when the work began."""

    shard: Shard
    snapshot: Snapshot
    commit: int


@dataclass(frozen=True)
class Part:
    """The examples (B,) of a batch, in a numbered piece of a shard; a piece is one commit."""

    work: Work
    piece: int
    ids: Ints
    seconds: Ints
    keys: dict[str, Ints]
    ends_piece: bool
    ends_shard: bool


@dataclass
class Feed:
    """Reader of this rank's batches, which yields as many as every other rank's."""

    store: TeacherStore
    shards: Iterable[Shard]
    teacher: str | Snapshot
    group: dist.ProcessGroup | None
    ids: Callable[[Any], Any]
    event_seconds: Callable[[Any], Any]
    keys: Callable[[Any], Mapping[str, Any]] | None
    shard_rows: int
    report: ScoringReport = field(default_factory=ScoringReport)
    ahead: deque[tuple[Part, Any]] = field(default_factory=deque)
    sent: deque[Part | None] = field(default_factory=deque)  # of yielded batches; None: a filler
    due: Snapshot | None = None  # the snapshot to score the next batches of all ranks with
    failure: Exception | None = None  # this rank's; kept until all ranks can stop together
    spare: Any = None  # a batch that can be scored again as a filler

    def __post_init__(self) -> None:
        self.parts = self._parts()

    def batches(self, loaded: Snapshot | None) -> Iterator[Any]:
        """Yield batches for the loaded snapshot until no rank has any more for it."""
        while steps := self._agree(loaded):
            for _ in range(steps):
                part = None
                if self.ahead and self.ahead[0][0].work.snapshot == loaded:
                    part, self.spare = self.ahead.popleft()
                self.sent.append(part)
                yield self.spare
                self._read_ahead()

    def _agree(self, loaded: Snapshot | None) -> int:
        """Agree on the next snapshot; return how many batches all ranks run by ``loaded``.

        Return 0 if another snapshot is due, all shards are done, or a rank has failed.
        """
        self._read_ahead()
        if self.spare is None and self.ahead:
            self.spare = self.ahead[0][1]
        snapshots = [part.work.snapshot for part, _ in self.ahead]
        first, count = (snapshots[0], snapshots.count(snapshots[0])) if snapshots else (None, 0)
        state = first, count, self.spare is not None, self.failure is not None
        states = gather_from_ranks(state, self.group)
        firsts = [snapshot for snapshot, *_ in states if snapshot is not None]
        stopping = any(failed for *_, failed in states)
        # Oldest first: all ranks load the same snapshot, and shards come in order of time.
        self.due = None if stopping else min(firsts, key=lambda s: s.version, default=None)
        if self.due is None or self.due != loaded:
            return 0
        self._share_spare([has_spare for _, _, has_spare, _ in states])
        return max(number for snapshot, number, *_ in states if snapshot == loaded)

    def _share_spare(self, have: list[bool]) -> None:
        """Send a spare batch to ranks that have had no batch at all; all ranks call this."""
        if all(have):
            return
        source = have.index(True)
        # Pickled before the broadcast: an error in it would leave the other ranks waiting.
        payload = [_pickle(self.spare) if rank() == source else b""]
        dist.broadcast_object_list(payload, src=source, group=self.group)
        if isinstance(payload[0], Exception):
            raise payload[0]
        if self.spare is None:
            self.spare = pickle.loads(payload[0])

    def _read_ahead(self) -> None:
        try:
            while self.failure is None and len(self.ahead) < _AHEAD:
                self.ahead.append(next(self.parts))
        except StopIteration:
            pass
        except Exception as error:  # raised once all ranks have stopped: they wait in collectives
            self.failure = error

    def _parts(self) -> Iterator[tuple[Part, Any]]:
        """Yield the batches to score, skipping what is in the store."""
        for shard in self.shards:
            snapshot = self._find_snapshot(shard)
            work = Work(shard, snapshot, self.store.refresh())
            if _is_done(self.store, work):
                self.report.skipped += 1
                continue
            is_scored = False
            for part_and_batch in self._cut(work, self._find_missing(work)):
                is_scored = True
                yield part_and_batch
            if not is_scored:  # all rows are stored: the job was killed before it marked the shard
                mark_done(self.store, work)
                self.report.skipped += 1

    def _find_snapshot(self, shard: Shard) -> Snapshot:
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

    def _find_missing(self, work: Work) -> list[int] | None:
        """Return the pieces of a shard that the store lacks; None if no piece was written yet."""
        first_piece = transaction_name(work.snapshot, f"{work.shard.name}/0")
        if self.store.table.transaction(first_piece) is None:
            return None
        missing, stored = [], _Stored(self.store, work.snapshot)
        for piece, group in itertools.groupby(self._cut(work), lambda pair: pair[0].piece):
            columns = [(part.ids, part.seconds) for part, _ in group]
            ids, seconds = map(np.concatenate, zip(*columns, strict=True))
            if stored.has_all(ids, seconds):
                self.report.stored_before += len(ids)
            else:
                missing.append(piece)
        return missing

    def _cut(self, work: Work, wanted: list[int] | None = None) -> Iterator[tuple[Part, Any]]:
        """Cut a shard into pieces of whole batches; yield those of ``wanted`` pieces (None: all).

        A shard is cut the same way each time, so that a piece's number names the same rows.
        """
        if wanted == []:
            return
        piece = rows = 0
        # An empty batch at the end gives the last one a successor, which tells that it is the last.
        batches = itertools.chain(self._checked_batches(work.shard), [(None, _NO_IDS, _NO_IDS, {})])
        for (batch, ids, seconds, keys), (_, after, *_) in itertools.pairwise(batches):
            rows += len(ids)
            ends_piece = rows >= self.shard_rows or not len(after)
            ends_shard = not len(after) if wanted is None else ends_piece and piece == wanted[-1]
            if wanted is None or piece in wanted:
                yield Part(work, piece, ids, seconds, keys, ends_piece, ends_shard), batch
            if ends_shard:
                return
            if ends_piece:
                piece, rows = piece + 1, 0

    def _checked_batches(self, shard: Shard) -> Iterator[tuple[Any, Ints, Ints, dict[str, Ints]]]:
        """Yield the batches that are not empty, with their ids, times and keys, checked."""
        before = None
        for batch in _read_batches(shard):
            with naming(shard):
                if not hasattr(batch, "to"):  # TorchRec's thread would stop without an error
                    raise TypeError(
                        "a batch should have to(device), as TorchRec's pipelines take it; received "
                        f"{type(batch).__name__}: return it from the data loader as such a class"
                    )
                ids = as_int64("example_ids", self.ids(batch))
                seconds = as_epoch("event_seconds", self.event_seconds(batch), len(ids))
                keys = as_keys(self.keys and self.keys(batch), len(ids))
                check_same_keys(keys, keys if before is None else before)
            before = keys
            if len(ids):
                yield batch, ids, seconds, keys


class _Stored:
    """The examples with a stored output of a snapshot or of a newer one."""

    def __init__(self, store: TeacherStore, snapshot: Snapshot) -> None:
        self.store, self.snapshot = store, snapshot
        self.window, self.ids = -1, _NO_IDS  # of the window that was read last

    def has_all(self, ids: Ints, seconds: Ints) -> bool:
        """Return whether all n examples have an output."""
        windows = self.store.window_of(seconds)
        return all(
            among(ids[windows == window], self._stored_ids(window)).all()
            for window in np.unique(windows).tolist()
        )

    def _stored_ids(self, window: int) -> Ints:
        if window != self.window:
            teacher, tasks = self.snapshot.teacher, self.store.tasks[:1]
            rows, _ = self.store.read(teacher, window, tasks=tasks, bad_rows="quarantine")
            is_new = rows.snapshot >= self.snapshot.version
            self.window, self.ids = window, np.unique(rows.example_id[is_new])
        return self.ids


def _is_done(store: TeacherStore, work: Work) -> bool:
    """Return whether a shard was completed, and no rows were removed since it was begun."""
    begun = store.table.transaction(_done_name(work))
    return begun is not None and begun > store.table.removed


def mark_done(store: TeacherStore, work: Work) -> None:
    """Record that all rows of a shard are in the store.

    The mark holds the commit at which the work began. If rows were removed after it, they may be
    this shard's, and it counts as not done (:func:`_is_done`).
    """
    no_rows = store.format.schema().empty_table()
    transaction = _done_name(work), work.commit
    commit = Commit(lambda properties: store.table.append(no_rows, properties), transaction)
    store.table.commit(
        f"can't be written to, and the shard {work.shard.name!r} was not marked as done",
        lambda: None if _is_done(store, work) else commit,
    )


def _done_name(work: Work) -> str:
    snapshot = work.snapshot
    return f"scored/{snapshot.teacher}/{snapshot.version}/{work.shard.name}"


def _read_batches(shard: Shard) -> Iterator[Any]:
    try:
        yield from shard.batches()
    except Exception as error:
        raise RuntimeError(f"the shard {shard.name!r} can't be read: {describe(error)}") from error


@contextlib.contextmanager
def naming(shard: Shard) -> Iterator[None]:
    """Add a shard's name to a TypeError or ValueError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"the shard {shard.name!r}: {error}") from error


def _pickle(batch: Any) -> bytes | Exception:
    try:
        return pickle.dumps(batch)
    except Exception as error:
        return TypeError(
            "a batch should be one that can be pickled, since a rank without a shard gets a batch "
            f"of another rank; received one that can't: {describe(error)}: give every rank a "
            "shard"
        )


def describe(error: Exception | None) -> str:
    """Return an error as text for other ranks; an empty string for None."""
    return f"{type(error).__name__}: {error}" if error is not None else ""
