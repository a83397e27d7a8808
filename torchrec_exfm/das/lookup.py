"""The look-up of a batch's outputs by example id: a window at a time, off the training thread.

B examples, M teachers, T tasks, embeddings of E numbers in W bytes.
"""

from __future__ import annotations

import copy
import functools
import operator
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from torchrec_exfm._user import read
from torchrec_exfm._warnings import TeacherMissingWarning
from torchrec_exfm.batch import TeacherOutputs
from torchrec_exfm.das.arrays import (
    Floats,
    Ints,
    Mask,
    among,
    as_int,
    as_int64,
    as_seconds_of_rows,
    check_duration,
    utc,
)
from torchrec_exfm.das.delta import DataFile
from torchrec_exfm.das.embeddings import decode
from torchrec_exfm.das.errors import check_process
from torchrec_exfm.das.index import WindowIndex
from torchrec_exfm.das.rules import BadRows, check_bad_rows, newest
from torchrec_exfm.das.store import TeacherStore

__all__ = ["LookupCounters", "TeacherLookup"]

_SILENT_BATCHES = 10

_Found: TypeAlias = tuple[Floats, Floats, Mask]  # (B, T + W / 4); ages in seconds, presence (B,)


@dataclass
class LookupCounters:
    """What became of the outputs of one teacher that were asked for.

    Attributes:
        asked: examples that were looked up.
        present: with an output that was given.
        embedded: with an embedding that was given, if embeddings were asked for.
        missing: without one in the store.
        stale: with one that is older than allowed; not given.
        quarantined: rows of the store left out because they break a rule.
        late: examples whose first output came into a window after it was read.
        batches: that were looked up.
    """

    asked: int = 0
    present: int = 0
    embedded: int = 0
    missing: int = 0
    stale: int = 0
    quarantined: int = 0
    late: int = 0
    batches: int = 0
    _age_seconds: float = field(default=0.0, repr=False)

    @property
    def coverage(self) -> float:
        """Part of the examples with an output, present / asked, in [0, 1]; NaN before the first."""
        return self.present / self.asked if self.asked else float("nan")

    @property
    def age_seconds(self) -> float:
        """The mean age of the outputs that were given; NaN before the first."""
        return self._age_seconds / self.present if self.present else float("nan")


class TeacherLookup:
    """Where ``TrainPipelineExFM`` finds the outputs of teachers that were stored.

    ``TrainPipelineExFM(..., teacher=TeacherLookup(store, "fm"))`` starts the look-up of a batch as
    it is loaded, on a thread of its own, and joins it before the batch's step. The windows that
    the batch lies in are in memory, 18 to 24 bytes a row for one task, and the next one is read
    ahead; memory does not depend on the size of the store.

    The age of an output is how far the teacher's training lay behind its example: event time -
    time that the snapshot was trained through, in seconds; 0 for what was logged in training.

    Args:
        store: opened anew, so that look-ups share nothing with the caller's.
        teachers: a name or several, in the order of the wrapper's teachers.
        ids: takes the user's batch, as it is loaded, to its example ids, (B,) int64 on the host.
        event_seconds: takes it to the examples' event times, (B,) epoch seconds or timestamps, or
            one for all.
        tasks: which of the store's tasks, in the order of the wrapper's; None: all.
        snapshot: pins a version (one for all teachers, or by name); None: the newest snapshot's
            output of each example, of those that do not leak.
        exclude: versions whose outputs are passed over (of all teachers, or by name), as those of a
            bad snapshot: an older one's are found in their place, if there are any.
        missing: what to do if an example has no output: ``"mask"`` (absent, and counted) or
            ``"raise"``.
        max_age_seconds: older outputs are masked and counted as stale; None: none is too old.
        bad_rows: as for :meth:`TeacherStore.read`; what is left out is counted.
        max_windows: how many windows of each teacher to have in memory, the one read ahead
            included.
        refresh_seconds: how often to see whether rows came late into the windows in memory: for so
            long a look-up may miss them. None: never (what is read depends on the store alone, not
            on time).
        embeddings: give the teachers' embeddings too, for W bytes a row in memory, and several
            times that while it is read. One is missing where its output is, or was written without.

    A look-up that is pickled is made anew where it arrives, with counters of its own: hand it to
    spawned processes, not to forked ones.

    Attributes:
        counters: for each teacher, :class:`LookupCounters` since the look-up was made.

    Warns:
        TeacherMissingWarning: once, if none of a teacher's first batches has an output.

    Raises:
        TypeError: for a store of another kind.
        ValueError: for a wrong value; if the store lacks a task, has outputs and none of a
            teacher, or was made without the embeddings that are asked for.

    Example:
        >>> import tempfile
        >>> from torchrec_exfm.das import Snapshot, TeacherStore
        >>> store = TeacherStore.create(tempfile.mkdtemp())
        >>> _ = store.write(Snapshot("fm", 1, 1_000), [7, 8], [0.5, -2.0], [5_000, 6_000])
        >>> lookup = TeacherLookup(store, "fm", ids=lambda batch: batch["id"],
        ...                        event_seconds=lambda batch: batch["time"])
        >>> outputs = lookup({"id": torch.tensor([8, 9]), "time": torch.tensor([6_000, 6_000])})
        >>> outputs.values.flatten().tolist(), outputs.presence.flatten().tolist()
        ([-2.0, 0.0], [True, False])
        >>> lookup.counters["fm"].coverage, lookup.counters["fm"].age_seconds
        (0.5, 5000.0)
    """

    def __init__(
        self,
        store: TeacherStore,
        teachers: str | Sequence[str],
        *,
        ids: Callable[[Any], Any] = operator.attrgetter("example_ids"),
        event_seconds: Callable[[Any], Any] = operator.attrgetter("event_seconds"),
        tasks: Sequence[str] | None = None,
        snapshot: int | Mapping[str, int] | None = None,
        exclude: Collection[int] | Mapping[str, Collection[int]] = (),
        missing: Literal["mask", "raise"] = "mask",
        max_age_seconds: float | None = None,
        bad_rows: BadRows = "refuse",
        max_windows: int = 2,
        refresh_seconds: float | None = 60.0,
        embeddings: bool = False,
    ) -> None:
        arguments = dict(locals())  # before there are other names
        del arguments["self"], arguments["store"], arguments["teachers"]
        self._options: dict[str, Any] = arguments
        if not isinstance(store, TeacherStore):
            raise TypeError(f"store should be a TeacherStore; received {type(store).__name__}")
        self._process = os.getpid()
        self.store = copy.copy(store)
        self.teachers = (teachers,) if isinstance(teachers, str) else tuple(teachers)
        self.tasks = self.store.tasks if tasks is None else tuple(tasks)
        pinned: Mapping[str, int | None] = (
            snapshot if isinstance(snapshot, Mapping) else dict.fromkeys(self.teachers, snapshot)
        )
        excluded = (
            {teacher: _versions(of_one) for teacher, of_one in exclude.items()}
            if isinstance(exclude, Mapping)
            else dict.fromkeys(self.teachers, _versions(exclude))
        )
        self._options["exclude"] = excluded
        _check_names("tasks", self.tasks, self.store.tasks)
        _check_names("teachers", self.teachers, self.store.teachers() or self.teachers)
        _check_names("snapshot", tuple(pinned), self.teachers)
        _check_names("exclude", tuple(excluded), self.teachers)
        for teacher, version in pinned.items():
            if version is not None and not 0 <= as_int(version) < 2**40:
                raise ValueError(f"snapshot should be a version; received {version!r}")
            if version is not None and version in excluded.get(teacher, _versions(())):
                raise ValueError(
                    f"the look-up pins version {version} of {teacher}, and excludes it"
                )
        if missing not in ("mask", "raise"):
            raise ValueError(f"missing should be 'mask' or 'raise'; received {missing!r}")
        if max_age_seconds is not None:
            check_duration("max_age_seconds", max_age_seconds)
        if refresh_seconds is not None:
            check_duration("refresh_seconds", refresh_seconds)
        if max_windows < 1:
            raise ValueError(f"max_windows should be at least 1; received {max_windows}")
        check_bad_rows(bad_rows)
        self._embedding_bytes = self.store.format.embedding_bytes if embeddings else 0
        self._ids = ids
        self._event_seconds = event_seconds
        self._missing = missing
        self._max_age_seconds = max_age_seconds
        self.counters = {teacher: LookupCounters() for teacher in self.teachers}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-store-reader")
        self._windows = {
            teacher: _Windows(
                self.store,
                teacher,
                counters,
                self._reader,
                snapshot=pinned.get(teacher),
                excluded=excluded.get(teacher, _versions(())),
                bad_rows=bad_rows,
                max_windows=max_windows,
                refresh_seconds=refresh_seconds,
                embedding_bytes=self._embedding_bytes,
            )
            for teacher, counters in self.counters.items()
        }
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-lookup")

    def start(self, batch: Any) -> Future[TeacherOutputs]:
        """Begin the look-up of a batch on the host; the future gives its outputs, on the host.

        The ids and times are taken from the batch before this returns.

        Raises:
            StoreError: in a process that was forked from the one that made the look-up.
            ValueError: for a batch that has none; for a look-up that was closed.
        """
        check_process(self._process)
        if self._closed:
            raise ValueError("a look-up should be used before close(); received a batch after it")
        return self._thread.submit(self._look_up, *self._keys(batch))

    def __call__(self, batch: Any) -> TeacherOutputs:
        """The outputs of a batch.

        Raises:
            LookupError: for an example without an output, if ``missing="raise"``.
            StoreError: if the store is damaged, or refused for its rows.
        """
        return self.start(batch).result()

    def refresh(self) -> None:
        """Forget the windows in memory, so that the next look-up reads what the store has then."""
        check_process(self._process)
        for windows in self._windows.values():
            self._thread.submit(windows.forget).result()

    def close(self) -> None:
        """End its threads, and let the windows in memory go; look-ups that were started end."""
        if self._process == os.getpid() and not self._closed:
            self._closed = True
            self._thread.shutdown()
            self._reader.shutdown()
            self._windows.clear()

    def __enter__(self) -> TeacherLookup:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(TeacherLookup, **self._options)
        return make, (self.store, self.teachers)

    def _keys(self, batch: Any) -> tuple[Ints, Ints]:
        ids = as_int64("the example ids of a batch", _taken("ids", self._ids, batch))
        seconds = _taken("event_seconds", self._event_seconds, batch)
        times = as_seconds_of_rows("the event_seconds of a batch", seconds, len(ids))
        if len(ids) and ids.min() < 0:
            raise ValueError(f"the example ids should be at least 0; received {ids.min()}")
        return ids.copy(), times.copy()  # the loader may use its buffers again

    def _look_up(self, ids: Ints, seconds: Ints) -> TeacherOutputs:
        windows = self.store.window_of(seconds)
        in_one = len(windows) and windows.min() == windows.max()
        needed = (windows[:1] if in_one else np.unique(windows)).tolist()
        found = [self._of_teacher(teacher, ids, needed, windows) for teacher in self.teachers]
        values, age_seconds, presence = (
            np.stack(parts, axis=1) for parts in zip(*found, strict=True)
        )
        values, data = np.split(values, [len(self.store.tasks)], axis=2)
        given = {}
        if self._embedding_bytes:
            data = data.view(np.uint8)[:, :, : self._embedding_bytes]
            embeddings = torch.from_numpy(decode(data, self.store.format.embedding_resolution))
            embedded = torch.from_numpy(presence) & embeddings.isfinite().all(-1)
            given = {"embeddings": embeddings, "embedding_presence": embedded}
            for teacher, count in zip(self.teachers, embedded.sum(0).tolist(), strict=True):
                self._count_embeddings(teacher, count)
        if self.tasks != self.store.tasks:
            values = values[:, :, [self.store.tasks.index(task) for task in self.tasks]]
        return TeacherOutputs(
            torch.from_numpy(values),
            torch.from_numpy(np.broadcast_to(presence[:, :, None], values.shape).copy()),
            torch.from_numpy(age_seconds),
            **given,
        )

    def _of_teacher(self, teacher: str, ids: Ints, needed: list[int], windows: Ints) -> _Found:
        values, age_seconds, presence = self._windows[teacher].find(ids, needed, windows)
        counters = self.counters[teacher]
        counters.batches += 1
        counters.asked += len(ids)
        absent = ~presence
        if self._missing == "raise" and absent.any():
            raise LookupError(
                f"{self.store.url}: {absent.sum()} of {len(ids)} examples have no output of "
                f"{teacher}: ids {ids[absent][:5].tolist()}, in the windows {needed}; score them "
                "first, or pass missing='mask'"
            )
        counters.missing += int(absent.sum())
        if self._max_age_seconds is not None:
            stale = presence & (age_seconds > self._max_age_seconds)
            counters.stale += int(stale.sum())
            presence = presence & ~stale
        counters.present += int(presence.sum())
        if counters.batches == _SILENT_BATCHES and not counters.present:
            seconds = self.store.format.window_seconds
            known = self._windows[teacher].known
            stored = f"outputs from {utc(known[0] * seconds)} on" if known else "no outputs at all"
            warnings.warn(
                f"{self.store.url}: {teacher} has no output for any of the first {counters.asked} "
                f"examples, whose windows begin with {[utc(w * seconds) for w in needed[:1]]}; of "
                f"{teacher} there are {stored}: are its name, ids, event_seconds and "
                "snapshot right?",
                TeacherMissingWarning,
                stacklevel=2,
            )
        counters._age_seconds += float(age_seconds[presence].sum(dtype=np.float64))
        return values, age_seconds, presence

    def _count_embeddings(self, teacher: str, count: int) -> None:
        counters = self.counters[teacher]
        counters.embedded += count
        silent = counters.batches == _SILENT_BATCHES and not counters.embedded
        if silent and counters.present:
            warnings.warn(
                f"{self.store.url}: {teacher} has no embedding for any of the first "
                f"{counters.present} examples with an output: were they written with embeddings=?",
                TeacherMissingWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class _Window:
    index: WindowIndex
    files: list[DataFile]


@dataclass(eq=False)
class _Windows:
    """The windows of one teacher that are in memory, and the next one on its way."""

    store: TeacherStore  # of the reader's thread alone
    teacher: str
    counters: LookupCounters
    reader: ThreadPoolExecutor
    snapshot: int | None
    excluded: Ints
    bad_rows: BadRows
    max_windows: int
    refresh_seconds: float | None
    embedding_bytes: int
    known: list[int] = field(default_factory=list)  # windows in the store

    def __post_init__(self) -> None:
        self._held: dict[int, Future[_Window]] = {}  # the one used last comes last
        self._reread: dict[int, Future[_Window]] = {}
        self._refreshed = time.monotonic()
        self._quarantined: dict[int, int] = {}  # rows, by window
        # four bytes of an embedding in one: the index keeps any float32 to the bit
        self._columns = len(self.store.tasks) + -(-self.embedding_bytes // 4)

    def find(self, ids: Ints, needed: list[int], windows: Ints) -> _Found:
        """The outputs of examples (B,) in ``windows`` (B,), which are those needed."""
        self._refresh()
        values = np.zeros((len(ids), self._columns), dtype=np.float32)
        age_seconds = np.zeros(len(ids), dtype=np.float32)
        presence = np.zeros(len(ids), dtype=np.bool_)
        for window in needed:
            rows = slice(None) if len(needed) == 1 else windows == window
            found = self._window(window, needed).index.find(ids[rows])
            values[rows], age_seconds[rows], presence[rows] = found
        self._read_ahead(needed)
        return values, age_seconds, presence

    def forget(self) -> None:
        """Forget what was read; what is being read meanwhile is not used."""
        self._held.clear()
        self._reread.clear()

    def _window(self, window: int, needed: list[int]) -> _Window:
        if window not in self._held:
            self._make_room(needed)
            self._held[window] = self.reader.submit(self._read, window)
        self._held[window] = self._held.pop(window)
        try:
            return self._held[window].result()
        except Exception:
            del self._held[window]  # so that it is tried again when it is asked for again
            self._reread.pop(window, None)
            raise

    def _make_room(self, needed: list[int]) -> None:
        for window in [w for w in self._held if w not in needed] + needed:
            if len(self._held) < self.max_windows:
                return
            self._held.pop(window, None)

    def _read_ahead(self, needed: list[int]) -> None:
        following = [window for window in self.known if needed and window > needed[-1]]
        if following and following[0] not in self._held and len(needed) < self.max_windows:
            self._make_room(needed)
            self._held[following[0]] = self.reader.submit(self._read, following[0])

    def _refresh(self) -> None:
        for window in [w for w, future in self._reread.items() if future.done()]:
            future = self._reread.pop(window)
            if window in self._held:
                self._held[window] = future
        now = time.monotonic()
        if self.refresh_seconds is None or now - self._refreshed < self.refresh_seconds:
            return
        self._refreshed = now
        for window, future in self._held.items():
            if future.done() and window not in self._reread:
                self._reread[window] = self.reader.submit(self._read_late, window, future)

    def _read(self, window: int) -> _Window:
        self.store.refresh()
        self.known = self.store.windows(self.teacher)
        rows, quarantined = self.store.read(
            self.teacher, window, bad_rows=self.bad_rows, embeddings=self.embedding_bytes > 0
        )
        self._quarantined[window] = sum(quarantined.values())
        self.counters.quarantined = sum(self._quarantined.values())
        if self.snapshot is not None:
            rows = rows[rows.snapshot == self.snapshot]
        if len(self.excluded):
            rows = rows[~among(rows.snapshot, self.excluded)]
        rows = newest(rows)
        values, tasks = np.zeros((len(rows), self._columns), np.float32), len(self.store.tasks)
        values[:, :tasks] = rows.outputs
        values.view(np.uint8)[:, 4 * tasks :][:, : self.embedding_bytes] = rows.embedding
        index = WindowIndex(rows.example_id, values, rows.age_seconds)
        del rows, values
        pa.default_memory_pool().release_unused()  # what reading took, several times what is kept
        return _Window(index, self.store.files(self.teacher, window))

    def _read_late(self, window: int, before: Future[_Window]) -> _Window:
        self.store.refresh()
        held = before.result()
        if self.store.files(self.teacher, window) == held.files:
            return held
        read = self._read(window)
        self.counters.late += max(0, len(read.index) - len(held.index))
        return read


def _taken(name: str, function: Callable[[Any], Any], batch: Any) -> Any:
    what = f"the user's batch to its {name.replace('_', ' ')}"
    return read(name, function, batch, "TeacherLookup", what)


def _versions(versions: Collection[int]) -> Ints:
    if isinstance(versions, str) or not isinstance(versions, Iterable):
        raise TypeError(f"exclude should be a collection of versions; received {versions!r}")
    return np.sort(as_int64("exclude", list(versions)))


def _check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    none = not names and what not in ("snapshot", "exclude")
    if none or not set(names) <= set(known) or len(set(names)) < len(names):
        raise ValueError(
            f"{what} should be of those there are, {tuple(known)}, each at most once; received "
            f"{tuple(names)}"
        )
