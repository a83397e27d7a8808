"""Shards that are scored: read batch by batch, ranks in step, and known by name when they are done.

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

from torchrec_exfm._ranks import of_each_rank, rank
from torchrec_exfm.das.arrays import Ints, among, as_epoch, as_int64, as_second, utc
from torchrec_exfm.das.delta import Commit
from torchrec_exfm.das.schema import Snapshot, as_keys, check_same_keys
from torchrec_exfm.das.shards import transaction_name
from torchrec_exfm.das.snapshots import newest_snapshot
from torchrec_exfm.das.store import TeacherStore

__all__ = [
    "Feed",
    "Part",
    "ScoringReport",
    "Shard",
    "describe_error",
    "mark_done",
    "name_in_errors",
]

_NO_IDS = np.empty(0, dtype=np.int64)
_BATCHES_AHEAD = 8  # batches that are read ahead, and that ranks agree on at once


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


@dataclass(frozen=True)
class Assignment:
    """A shard that is to be scored by a snapshot, begun as of a commit of the store."""

    shard: Shard
    snapshot: Snapshot
    commit: int


@dataclass(frozen=True)
class Part:
    """The examples (B,) of a batch, of the piece of a shard that is committed with a number."""

    assignment: Assignment
    piece: int
    ids: Ints
    seconds: Ints
    keys: dict[str, Ints]
    ends_piece: bool
    ends_shard: bool


@dataclass
class Feed:
    """Reads this rank's batches, and gives as many as other ranks give."""

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
    sent: deque[Part | None] = field(default_factory=deque)  # of the batches given; None: again
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
                if self.ahead and self.ahead[0][0].assignment.snapshot == loaded:
                    part, self.spare = self.ahead.popleft()
                self.sent.append(part)
                yield self.spare
                self._read_ahead()

    def _agree(self, loaded: Snapshot | None) -> int:
        """How many batches come next on all ranks; 0 if another snapshot is due, or none is."""
        self._read_ahead()
        if self.spare is None and self.ahead:
            self.spare = self.ahead[0][1]
        ours = [part.assignment.snapshot for part, _ in self.ahead]
        first, count = (ours[0], ours.count(ours[0])) if ours else (None, 0)
        mine = first, count, self.spare is not None, self.failure is not None
        told = of_each_rank(mine, self.group)
        firsts = [snapshot for snapshot, *_ in told if snapshot is not None]
        stopping = any(failed for *_, failed in told)
        self.due = None if stopping else min(firsts, key=lambda one: one.version, default=None)
        if self.due is None or self.due != loaded:
            return 0
        self._share_spare([has_spare for _, _, has_spare, _ in told])
        return max(number for snapshot, number, *_ in told if snapshot == loaded)

    def _share_spare(self, have: list[bool]) -> None:
        """Give a rank that has no batch at all one of another rank."""
        if all(have):
            return
        giver = have.index(True)
        given = [_pickle(self.spare) if rank() == giver else b""]
        dist.broadcast_object_list(given, src=giver, group=self.group)
        if isinstance(given[0], Exception):
            raise given[0]
        if self.spare is None:
            self.spare = pickle.loads(given[0])

    def _read_ahead(self) -> None:
        try:
            while self.failure is None and len(self.ahead) < _BATCHES_AHEAD:
                self.ahead.append(next(self.parts))
        except StopIteration:
            pass
        except Exception as error:
            self.failure = error

    def _parts(self) -> Iterator[tuple[Part, Any]]:
        """The batches that are to be scored."""
        for shard in self.shards:
            snapshot = self._choose_snapshot(shard)
            assignment = Assignment(shard, snapshot, self.store.refresh())
            if _is_done(self.store, assignment):
                self.report.skipped += 1
                continue
            left = False
            for part_and_batch in self._cut_into_pieces(
                assignment, self._missing_pieces(assignment)
            ):
                left = True
                yield part_and_batch
            if not left:
                mark_done(self.store, assignment)
                self.report.skipped += 1

    def _choose_snapshot(self, shard: Shard) -> Snapshot:
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

    def _missing_pieces(self, assignment: Assignment) -> list[int] | None:
        """The pieces of a shard that are not in the store; None: all, it was not begun."""
        begun = transaction_name(assignment.snapshot, f"{assignment.shard.name}/0")
        if self.store.table.transaction(begun) is None:
            return None
        missing, stored = [], _Stored(self.store, assignment.snapshot)
        for piece, group in itertools.groupby(
            self._cut_into_pieces(assignment), lambda pair: pair[0].piece
        ):
            columns = [(part.ids, part.seconds) for part, _ in group]
            ids, seconds = map(np.concatenate, zip(*columns, strict=True))
            if stored.has_all(ids, seconds):
                self.report.stored_before += len(ids)
            else:
                missing.append(piece)
        return missing

    def _cut_into_pieces(
        self, assignment: Assignment, wanted: list[int] | None = None
    ) -> Iterator[tuple[Part, Any]]:
        """A shard's batches, in pieces of whole batches; those of some pieces, if they are given.

        It is cut the same way each time, so that a piece is written once, by its number.
        """
        if wanted == []:
            return
        piece = rows = 0
        batches = itertools.chain(
            self._checked_batches(assignment.shard), [(None, _NO_IDS, _NO_IDS, {})]
        )
        for (batch, ids, seconds, keys), (_, after, *_) in itertools.pairwise(batches):
            rows += len(ids)
            ends = rows >= self.shard_rows or not len(after)
            last = not len(after) if wanted is None else ends and piece == wanted[-1]
            if wanted is None or piece in wanted:
                yield Part(assignment, piece, ids, seconds, keys, ends, last), batch
            if last:
                return
            if ends:
                piece, rows = piece + 1, 0

    def _checked_batches(self, shard: Shard) -> Iterator[tuple[Any, Ints, Ints, dict[str, Ints]]]:
        """Batches, with their ids, times and keys, as far as they have examples."""
        before = None
        for batch in _read_batches(shard):
            with name_in_errors(shard):
                if not hasattr(batch, "to"):  # to TorchRec's thread it would be the end, unsaid
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
    """Which examples the store has outputs of, by a snapshot or a newer one."""

    def __init__(self, store: TeacherStore, snapshot: Snapshot) -> None:
        self.store, self.snapshot = store, snapshot
        self.window, self.ids = -1, _NO_IDS  # one window at a time

    def has_all(self, ids: Ints, seconds: Ints) -> bool:
        """Whether it has all (n,)."""
        windows = self.store.window_of(seconds)
        return all(
            among(ids[windows == window], self._stored_ids(window)).all()
            for window in np.unique(windows).tolist()
        )

    def _stored_ids(self, window: int) -> Ints:
        if window != self.window:
            teacher, tasks = self.snapshot.teacher, self.store.tasks[:1]
            rows, _ = self.store.read(teacher, window, tasks=tasks, bad_rows="quarantine")
            newer = rows.snapshot >= self.snapshot.version
            self.window, self.ids = window, np.unique(rows.example_id[newer])
        return self.ids


def _is_done(store: TeacherStore, assignment: Assignment) -> bool:
    """Whether a shard was written to its end, and nothing was removed since it was begun."""
    begun = store.table.transaction(_done_name(assignment))
    return begun is not None and begun > store.table.removed


def mark_done(store: TeacherStore, assignment: Assignment) -> None:
    """Say that a shard is in the store, all of it: the number is the commit it was begun at."""
    nothing, transaction = (
        store.format.schema().empty_table(),
        (_done_name(assignment), assignment.commit),
    )
    commit = Commit(lambda properties: store.table.append(nothing, properties), transaction)
    store.table.commit(
        f"can't be written to, and the shard {assignment.shard.name!r} was not marked as done",
        lambda: None if _is_done(store, assignment) else commit,
    )


def _done_name(assignment: Assignment) -> str:
    snapshot = assignment.snapshot
    return f"scored/{snapshot.teacher}/{snapshot.version}/{assignment.shard.name}"


def _read_batches(shard: Shard) -> Iterator[Any]:
    try:
        yield from shard.batches()
    except Exception as error:
        raise RuntimeError(
            f"the shard {shard.name!r} can't be read: {describe_error(error)}"
        ) from error


@contextlib.contextmanager
def name_in_errors(shard: Shard) -> Iterator[None]:
    """Say which shard it is that has wrong values."""
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
            "a batch should be one that can be pickled, as a rank without a shard gets one of "
            f"another rank's; received one that can't: {describe_error(error)}: give every rank "
            "a shard"
        )


def describe_error(error: Exception | None) -> str:
    """An error, as other ranks are told of it; nothing of none."""
    return f"{type(error).__name__}: {error}" if error is not None else ""
