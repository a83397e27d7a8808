"""Windows of a teacher's outputs: read into an index, a few held in memory, the next read ahead.

B examples.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from torchrec_exfm._warnings import NotPipelinedWarning
from torchrec_exfm.das.arrays import Floats, Ints, Mask, among, as_int64
from torchrec_exfm.das.index import WindowIndex
from torchrec_exfm.das.rules import BadRows, newest
from torchrec_exfm.das.store import TeacherStore

__all__ = [
    "HeldWindows",
    "IndexedWindow",
    "Pending",
    "Selection",
    "ThreadReader",
    "read_window",
]

# Warn if so many windows were read again, soon after they were dropped, within so many batches.
# In order of time a batch starts about one read, even where an epoch begins again.
_THRASHING_READS, _THRASHING_BATCHES = 8, 6


@dataclass(frozen=True)
class Selection:
    """Which rows and columns of a teacher are looked up; see the arguments of ``TeacherLookup``."""

    teacher: str
    tasks: tuple[str, ...]
    snapshot: int | None = None
    excluded: tuple[int, ...] = ()
    bad_rows: BadRows = "refuse"
    embedding_bytes: int = 0

    @property
    def width(self) -> int:
        """Number of float32 values of a row: T outputs, and its embedding at four bytes a value."""
        return len(self.tasks) + -(-self.embedding_bytes // 4)


@dataclass(frozen=True)
class IndexedWindow:
    """A window of a teacher, and the state of the store when it was read.

    Attributes:
        index: the window's rows.
        files: the paths of the data files that the rows came from.
        quarantined: number of rows left out because they break a rule.
        first: the first window with outputs of the teacher; None: the teacher has none.
        following: the next window with outputs of the teacher; None: there is none.
    """

    index: WindowIndex
    files: tuple[str, ...]
    quarantined: int
    first: int | None
    following: int | None


def read_window(
    store: TeacherStore,
    selection: Selection,
    window: int,
    before: IndexedWindow | None = None,
    folder: Callable[[int], Path] | None = None,
) -> IndexedWindow:
    """Read a window at the store's newest commit; reuse ``before`` if its files are the same.

    ``folder`` makes the folder of an index, given its number of rows; None: keep it in memory.
    """
    store.refresh()
    windows = store.windows(selection.teacher)
    first = windows[0] if windows else None
    following = next((later for later in windows if later > window), None)
    files = _file_paths(store, selection, window)
    if before is not None and before.files == files:
        return replace(before, first=first, following=following)
    rows, quarantined = store.read(
        selection.teacher,
        window,
        tasks=selection.tasks,
        bad_rows=selection.bad_rows,
        embeddings=selection.embedding_bytes > 0,
    )
    # Listed again: if compaction replaced files meanwhile, the read was of a newer commit.
    files = _file_paths(store, selection, window)
    if selection.snapshot is not None:
        rows = rows[rows.snapshot == selection.snapshot]
    if selection.excluded:
        rows = rows[~among(rows.snapshot, as_int64("versions", selection.excluded))]
    rows = newest(rows)
    # An index holds float32 only. It keeps every bit, so a value can carry four embedding bytes.
    values, tasks = np.zeros((len(rows), selection.width), np.float32), len(selection.tasks)
    values[:, :tasks] = rows.outputs
    values.view(np.uint8)[:, 4 * tasks :][:, : selection.embedding_bytes] = rows.embedding
    place = None if folder is None else folder(len(rows))
    index = WindowIndex(rows.example_id, values, rows.age_seconds, place)
    del rows, values
    # Reading takes several times the memory of the index, and Arrow's pool would keep it.
    pa.default_memory_pool().release_unused()
    return IndexedWindow(index, files, sum(quarantined.values()), first, following)


def _file_paths(store: TeacherStore, selection: Selection, window: int) -> tuple[str, ...]:
    return tuple(file.path for file in store.files(selection.teacher, window))


class Pending(Protocol):
    """A window that was requested, as a future."""

    def done(self) -> bool:
        """Return whether the window was read, or failed."""
        ...

    def result(self) -> IndexedWindow:
        """Return the window, or raise why it could not be read."""
        ...


class ThreadReader:
    """A thread that reads windows into this process's memory: for one rank with a local store."""

    def __init__(self, sources: Sequence[tuple[TeacherStore, Selection]]) -> None:
        self._sources = sources
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-store-reader")

    def start(self, teacher: int, window: int, before: IndexedWindow | None = None) -> Pending:
        """Start to read a window of a teacher; reuse ``before`` if its files are the same."""
        return self._thread.submit(read_window, *self._sources[teacher], window, before)

    def forget(self) -> None:
        """Do nothing: every read is at the newest commit."""

    def close(self) -> None:
        """Stop the thread after its current read, without waiting for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class HeldWindows:
    """The windows of one teacher that are in memory, and the next one, which is read ahead."""

    def __init__(
        self,
        store: TeacherStore,
        selection: Selection,
        read: Callable[..., Pending],
        wait: Callable[[Pending, str, float], IndexedWindow],
        max_windows: int,
        refresh_seconds: float | None,
    ) -> None:
        self.store, self.selection = store, selection
        self.first: int | None = None  # first window of the store with outputs of the teacher
        self.late = 0  # examples whose first output came after their window was read
        self._read, self._wait = read, wait
        self._max_windows, self._refresh_seconds = max_windows, refresh_seconds
        self._held: dict[int, Pending] = {}  # least recently used first
        self._reread: dict[int, Pending] = {}
        self._refreshed = time.monotonic()
        self._row_counts: dict[int, int] = {}  # by window, when it was last read
        self._quarantined: dict[int, int] = {}
        self._dropped = deque[int](maxlen=_THRASHING_READS)
        self._batches = 0
        self._read_again = deque[int](maxlen=_THRASHING_READS)  # numbers of batches
        self._has_warned = False

    def find(self, ids: Ints, seconds: Ints, deadline: float) -> tuple[Floats, Floats, Mask]:
        """Return values (B, width), ages in seconds (B,) and presence (B,); absent ones are 0."""
        self._reread_windows()
        self._batches += 1
        windows = self.store.window_of(seconds)
        in_one = len(windows) and windows.min() == windows.max()
        needed = (windows[:1] if in_one else np.unique(windows)).tolist()
        if in_one:  # the common case takes the index's arrays as they are, without a copy
            held = self._wait_for_window(needed[0], needed, deadline)
            self._read_ahead(held, needed)
            return held.index.find(ids)
        values = np.zeros((len(ids), self.selection.width), dtype=np.float32)
        age_seconds = np.zeros(len(ids), dtype=np.float32)
        presence = np.zeros(len(ids), dtype=np.bool_)
        for window in needed:
            held, rows = self._wait_for_window(window, needed, deadline), windows == window
            values[rows], age_seconds[rows], presence[rows] = held.index.find(ids[rows])
        if needed:
            self._read_ahead(held, needed)
        return values, age_seconds, presence

    def forget(self) -> None:
        """Forget all windows, and ignore the reads that are under way."""
        self._held.clear()
        self._reread.clear()
        self._row_counts.clear()

    @property
    def quarantined(self) -> int:
        """Number of rows that break a rule, in all windows that were used."""
        return sum(self._quarantined.values())

    def _wait_for_window(self, window: int, needed: list[int], deadline: float) -> IndexedWindow:
        self._start_reading(window, needed)
        pending = self._held[window] = self._held.pop(window)
        try:
            held = self._wait(pending, self.store.url, deadline)
        except Exception:
            if pending.done():  # it failed: the next look-up tries again; a slow read goes on
                del self._held[window]
                self._reread.pop(window, None)
            raise
        # A reread window with more rows has gained examples: batches before may have missed them.
        self.late += max(0, len(held.index) - self._row_counts.get(window, len(held.index)))
        self._row_counts[window], self._quarantined[window] = len(held.index), held.quarantined
        self.first = held.first
        return held

    def _read_ahead(self, last: IndexedWindow, needed: list[int]) -> None:
        if last.following is not None and len(needed) < self._max_windows:
            self._start_reading(last.following, needed)

    def _start_reading(self, window: int, needed: list[int]) -> None:
        """Start to read a window that is not held, and drop the least recently used one for it."""
        if window in self._held:
            return
        # Where a batch needs more windows than fit, its first ones, used already, make room.
        for other in [w for w in self._held if w not in needed] + needed:
            if len(self._held) < self._max_windows:
                break
            if self._held.pop(other, None) is not None:
                self._dropped.append(other)
        if window in self._dropped:
            self._warn_of_thrashing()
        self._held[window] = self._read(window)

    def _warn_of_thrashing(self) -> None:
        self._read_again.append(self._batches)
        if self._has_warned or len(self._read_again) < _THRASHING_READS:
            return
        if self._batches - self._read_again[0] >= _THRASHING_BATCHES:
            return
        self._has_warned = True
        warnings.warn(
            f"{self.store.url}: {_THRASHING_READS} windows were read again soon after they had "
            "made room for others: batches lie in more windows than "
            f"max_windows={self._max_windows}: raise it, or give the batches in order of time",
            NotPipelinedWarning,
            stacklevel=2,
        )

    def _reread_windows(self) -> None:
        for window in [w for w, pending in self._reread.items() if pending.done()]:
            pending = self._reread.pop(window)
            if window in self._held:
                self._held[window] = pending
        now = time.monotonic()
        if self._refresh_seconds is None or now - self._refreshed < self._refresh_seconds:
            return
        self._refreshed = now
        for window, pending in self._held.items():
            if pending.done() and window not in self._reread:
                # A window that failed is skipped: the look-up that needs it raises the error.
                with contextlib.suppress(Exception):
                    self._reread[window] = self._read(window, pending.result())
