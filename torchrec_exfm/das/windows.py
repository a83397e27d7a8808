"""The windows of a teacher: one is read into an index, a few are held, the next is read ahead.

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

# So many windows that were read again, soon after they were let go, within so many batches
_THRASHING_READS, _THRASHING_BATCHES = 8, 6


@dataclass(frozen=True)
class Selection:
    """Which rows, and what of them; the arguments of ``TeacherLookup`` say it."""

    teacher: str
    tasks: tuple[str, ...]
    snapshot: int | None = None
    excluded: tuple[int, ...] = ()
    bad_rows: BadRows = "refuse"
    embedding_bytes: int = 0

    @property
    def width(self) -> int:
        """Values of a row: T outputs, and the bytes of its embedding, four in each."""
        return len(self.tasks) + -(-self.embedding_bytes // 4)


@dataclass(frozen=True)
class IndexedWindow:
    """A window of a teacher as it was read, and what is known of the store from then.

    Attributes:
        index: its rows.
        files: the paths of the data files that they came from.
        quarantined: rows left out because they break a rule.
        first: the first window for which the teacher has outputs, if there is any.
        following: the next one after this.
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
    """Read a window as the store has it now: the rows of ``before`` again, if no file is new.

    ``folder`` makes the folder for an index of so many rows; None: it is kept in memory.
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
    files = _file_paths(store, selection, window)  # compaction may have put others in their place
    if selection.snapshot is not None:
        rows = rows[rows.snapshot == selection.snapshot]
    if selection.excluded:
        rows = rows[~among(rows.snapshot, as_int64("versions", selection.excluded))]
    rows = newest(rows)
    # four bytes of an embedding in one: the index keeps any float32 to the bit
    values, tasks = np.zeros((len(rows), selection.width), np.float32), len(selection.tasks)
    values[:, :tasks] = rows.outputs
    values.view(np.uint8)[:, 4 * tasks :][:, : selection.embedding_bytes] = rows.embedding
    place = None if folder is None else folder(len(rows))
    index = WindowIndex(rows.example_id, values, rows.age_seconds, place)
    del rows, values
    pa.default_memory_pool().release_unused()  # what reading took, several times what is kept
    return IndexedWindow(index, files, sum(quarantined.values()), first, following)


def _file_paths(store: TeacherStore, selection: Selection, window: int) -> tuple[str, ...]:
    return tuple(file.path for file in store.files(selection.teacher, window))


class Pending(Protocol):
    """A window that was asked for."""

    def done(self) -> bool:
        """Whether it is there, or can't be had."""
        ...

    def result(self) -> IndexedWindow:
        """The window; it raises if it can't be had."""
        ...


class ThreadReader:
    """Reads windows on a thread, into this process's memory: for one rank with a local store."""

    def __init__(self, sources: Sequence[tuple[TeacherStore, Selection]]) -> None:
        self._sources = sources
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-store-reader")

    def start(self, teacher: int, window: int, before: IndexedWindow | None = None) -> Pending:
        """Read a window of a teacher, if it is not as ``before``."""
        return self._thread.submit(read_window, *self._sources[teacher], window, before)

    def forget(self) -> None:
        """Nothing: it keeps nothing."""

    def close(self) -> None:
        """End the thread, when it has read what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class HeldWindows:
    """The windows of one teacher that are in memory, and the next one on its way."""

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
        self.first: int | None = None  # of the store's windows
        self.late = 0  # examples whose first output came after their window was read
        self._read, self._wait = read, wait
        self._max_windows, self._refresh_seconds = max_windows, refresh_seconds
        self._held: dict[int, Pending] = {}  # the one used last comes last
        self._reread: dict[int, Pending] = {}
        self._refreshed = time.monotonic()
        self._row_counts: dict[int, int] = {}  # of each window, as it was last
        self._quarantined: dict[int, int] = {}
        self._dropped = deque[int](maxlen=_THRASHING_READS)
        self._batches = 0
        self._read_again = deque[int](maxlen=_THRASHING_READS)  # at which batches
        self._has_warned = False

    def find(self, ids: Ints, seconds: Ints, deadline: float) -> tuple[Floats, Floats, Mask]:
        """Values (B, width), ages (B,) and presence (B,) of examples, where it has them."""
        self._reread_windows()
        self._batches += 1
        windows = self.store.window_of(seconds)
        in_one = len(windows) and windows.min() == windows.max()
        needed = (windows[:1] if in_one else np.unique(windows)).tolist()
        if in_one:
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
        """Forget what was read; what is being read meanwhile is not used."""
        self._held.clear()
        self._reread.clear()
        self._row_counts.clear()

    @property
    def quarantined(self) -> int:
        """Rows that break a rule, in all windows that were looked at."""
        return sum(self._quarantined.values())

    def _wait_for_window(self, window: int, needed: list[int], deadline: float) -> IndexedWindow:
        self._start_reading(window, needed)
        pending = self._held[window] = self._held.pop(window)
        try:
            held = self._wait(pending, self.store.url, deadline)
        except Exception:
            if pending.done():  # so that it is tried again when it is asked for again
                del self._held[window]
                self._reread.pop(window, None)
            raise
        self.late += max(0, len(held.index) - self._row_counts.get(window, len(held.index)))
        self._row_counts[window], self._quarantined[window] = len(held.index), held.quarantined
        self.first = held.first
        return held

    def _read_ahead(self, last: IndexedWindow, needed: list[int]) -> None:
        if last.following is not None and len(needed) < self._max_windows:
            self._start_reading(last.following, needed)

    def _start_reading(self, window: int, needed: list[int]) -> None:
        """Let it be read, if it is not in memory, in the place of the one used longest ago."""
        if window in self._held:
            return
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
        often = len(self._read_again) == _THRASHING_READS
        if (
            self._has_warned
            or not often
            or self._batches - self._read_again[0] >= _THRASHING_BATCHES
        ):
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
                with contextlib.suppress(Exception):  # told when the window is asked for
                    self._reread[window] = self._read(window, pending.result())
