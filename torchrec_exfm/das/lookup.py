"""Look-up of a batch's teacher outputs by example id, off the training thread.

B examples, M teachers, T tasks, embeddings of E numbers in W bytes.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from torchrec_exfm._user import read
from torchrec_exfm._warnings import TeacherMissingWarning
from torchrec_exfm.batch import TeacherOutputs
from torchrec_exfm.das.arrays import (
    Floats,
    Ints,
    Mask,
    as_int64,
    as_seconds_of_rows,
    check_duration,
    utc,
)
from torchrec_exfm.das.choice import check_names, choose_versions
from torchrec_exfm.das.embeddings import decode
from torchrec_exfm.das.errors import StoreError, check_process
from torchrec_exfm.das.host import HostReader, default_folder
from torchrec_exfm.das.rules import BadRows, absent, check_bad_rows
from torchrec_exfm.das.store import TeacherStore
from torchrec_exfm.das.windows import HeldWindows, IndexedWindow, Pending, Selection, ThreadReader

__all__ = ["LookupCounters", "TeacherLookup"]

_SILENT_BATCHES = 10  # warn if none of so many batches has an output
_POLL_SECONDS = 0.005


@dataclass
class LookupCounters:
    """Counts of one teacher's look-ups.

    Attributes:
        asked: examples that were looked up.
        present: examples whose output was returned.
        embedded: examples whose embedding was returned, if embeddings are looked up.
        missing: examples without an output in the store.
        stale: examples whose output is older than allowed, and was masked.
        quarantined: rows of the store left out because they break a rule.
        late: examples whose first output was written into a window after it was read.
        batches: batches that were looked up.
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
        """Share of examples with an output, present / asked, in [0, 1]; NaN before the first."""
        return self.present / self.asked if self.asked else float("nan")

    @property
    def age_seconds(self) -> float:
        """Mean age of the outputs that were returned; NaN before the first."""
        return self._age_seconds / self.present if self.present else float("nan")


class TeacherLookup:
    """A source of stored teacher outputs for ``TrainPipelineExFM``.

    ``TrainPipelineExFM(..., teacher=TeacherLookup(store, "fm"))`` looks up each batch
    asynchronously: it starts when the batch is loaded, on a thread of its own, and waits before the
    batch's step. The windows of the batch are held in memory, at 18 to 24 bytes a row for one
    task, and the next window is read ahead. Memory does not depend on the size of the store.

    **Windows are held once a host** if it has several ranks (``LOCAL_WORLD_SIZE``) or the store is
    not in a local folder. A separate process then reads them into files that all ranks map. So a
    store that is slow, or hangs, never blocks the training process's interpreter.

    The age of an output is its example's event time minus the time that the snapshot was trained
    through, in seconds. It is 0 for outputs that were logged in training.

    Args:
        store: opened anew, so that look-ups share nothing with the caller's. To look up teachers of
            several stores, pass a mapping from each teacher's name to its store.
        teachers: one name or several, in the order of the wrapper's teachers; None: the names in
            the mapping ``store``.
        ids: function from the user's batch, as it is loaded, to example ids, (B,) int64 on the
            host.
        event_seconds: function from the batch to event times, (B,) epoch seconds or timestamps, or
            one time for all examples.
        tasks: tasks of the stores, in the order of the wrapper's; None: all. Other tasks are not
            held in memory. A task that a teacher's store lacks is masked.
        snapshot: a pinned version, for all teachers or by name; None: the newest snapshot's output
            of each example, among those that do not leak.
        exclude: versions to ignore, for all teachers or by name, such as a bad snapshot's. Outputs
            of older versions take their place.
        missing: what to do if an example has no output: ``"mask"`` (mask and count it) or
            ``"raise"``.
        max_age_seconds: mask older outputs and count them as stale; None: no limit.
        bad_rows: as for :meth:`TeacherStore.read`; rows that are left out are counted.
        max_windows: number of windows of each teacher in memory, including the one read ahead.
        refresh_seconds: interval at which the windows in memory are checked for late rows; a
            look-up may miss rows that are younger. None: never, so that results depend on the store
            alone, not on time.
        embeddings: return the teachers' embeddings too, for W bytes a row in memory, and several
            times that while a window is read. An embedding is absent where its output is, or where
            the row was written without.
        timeout_seconds: how long a look-up waits for a window. Then it raises a StoreError (which
            ``on_teacher_error="mask"`` of the pipeline masks), and later look-ups do not wait until
            a window has been read.
        host_folder: where the host's processes share windows, in memory or on a local disk; None:
            ``/dev/shm`` (``/tmp`` if that is below 1 GiB). One rank with a local store then uses no
            folder and no second process.
        host_bytes: maximum size of the windows there; None: as much as the folder has room for.

    A pickled look-up is made anew where it is unpickled, with counters of its own. Pass it to
    spawned processes, not to forked ones.

    Attributes:
        counters: :class:`LookupCounters` by teacher, since the look-up was made.

    Warns:
        TeacherMissingWarning: once, if none of a teacher's first batches has an output.
        NotPipelinedWarning: once, if windows are read again and again.

    Raises:
        TypeError: if a store is no TeacherStore.
        ValueError: for a wrong value; if no store has a task; if a store has outputs but none of a
            teacher, or was made without the embeddings that are looked up.
        StoreError: if the host's folder can't be used.

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
        store: TeacherStore | Mapping[str, TeacherStore],
        teachers: str | Sequence[str] | None = None,
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
        timeout_seconds: float = 600.0,
        host_folder: Path | str | None = None,
        host_bytes: int | None = None,
    ) -> None:
        arguments = dict(locals())  # for pickling; first, before there are other local names
        del arguments["self"], arguments["store"], arguments["teachers"]
        self._options: dict[str, Any] = arguments
        self._process = os.getpid()
        self.stores = _open_stores(store, teachers)
        self.teachers = tuple(self.stores)
        known_tasks = dict.fromkeys(itertools.chain(*(s.tasks for s in self.stores.values())))
        self.tasks = tuple(known_tasks) if tasks is None else tuple(tasks)
        check_names("tasks", self.tasks, tuple(known_tasks))
        pinned, excluded = choose_versions("the look-up", self.teachers, snapshot, exclude)
        self._options["exclude"] = excluded
        if missing not in ("mask", "raise"):
            raise ValueError(f"missing should be 'mask' or 'raise'; received {missing!r}")
        if max_age_seconds is not None:
            check_duration("max_age_seconds", max_age_seconds)
        if refresh_seconds is not None:
            check_duration("refresh_seconds", refresh_seconds)
        check_duration("timeout_seconds", timeout_seconds)
        if max_windows < 1:
            raise ValueError(f"max_windows should be at least 1; received {max_windows}")
        check_bad_rows(bad_rows)
        self._ids = ids
        self._event_seconds = event_seconds
        self._missing = missing
        self._max_age_seconds = max_age_seconds
        self._timeout_seconds = timeout_seconds
        widths = {s.format.embedding_width for s in self.stores.values() if embeddings}
        if len(widths) > 1:
            raise ValueError(f"embeddings should be of one width; the stores have {sorted(widths)}")
        self._embedding_width = max(widths, default=0)
        self.counters = {teacher: LookupCounters() for teacher in self.teachers}
        sources = [
            (
                store,
                Selection(
                    teacher,
                    tuple(task for task in self.tasks if task in store.tasks),
                    pinned[teacher],
                    excluded[teacher],
                    bad_rows,
                    store.format.embedding_bytes if embeddings else 0,
                ),
            )
            for teacher, store in self.stores.items()
        ]
        self._reader: ThreadReader | HostReader
        is_local = all("://" not in store.url for store in self.stores.values())
        if host_folder is None and is_local and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
            self._reader = ThreadReader(sources)
        else:
            folder = default_folder() if host_folder is None else Path(host_folder)
            self._reader = HostReader(sources, folder, max_windows, host_bytes)
        self._closed = False
        self._store_answers = True  # False after a timeout, until a window has been read
        self._windows = {
            selection.teacher: HeldWindows(
                store,
                selection,
                functools.partial(self._reader.start, number),
                self._wait,
                max_windows,
                refresh_seconds,
            )
            for number, (store, selection) in enumerate(sources)
        }
        self._thread = _WorkerThread("teacher-lookup")

    def start(self, batch: Any) -> Future[TeacherOutputs]:
        """Start to look up a batch; return a future of its outputs, on the host.

        The ids and times are copied from the batch before this returns.

        Raises:
            StoreError: in a process that was forked from the one that made the look-up.
            ValueError: for a batch without ids or event times; after ``close()``.
        """
        check_process(self._process)
        if self._closed:
            raise ValueError("a look-up should be used before close(); received a batch after it")
        deadline = time.monotonic() + self._timeout_seconds
        return self._thread.submit(self._look_up, *self._read_keys(batch), deadline)

    def __call__(self, batch: Any) -> TeacherOutputs:
        """Return the outputs of a batch.

        Raises:
            LookupError: for an example without an output, if ``missing="raise"``.
            StoreError: if the store is damaged, has rows that are refused, or does not answer in
                time.
        """
        return self.start(batch).result()

    def refresh(self) -> None:
        """Forget the windows in memory, so that the next look-up reads the newest commit."""
        check_process(self._process)
        self._reader.forget()
        for windows in self._windows.values():  # on the thread that uses them, so without a lock
            self._thread.submit(windows.forget).result()

    def close(self) -> None:
        """Stop the threads and free the windows, once the look-ups that were started have ended."""
        # A forked child has none of the threads: closing is left to its parent.
        if self._process == os.getpid() and not self._closed:
            self._closed = True
            self._thread.close()
            self._reader.close()
            self._windows.clear()

    def __enter__(self) -> TeacherLookup:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(TeacherLookup, **self._options)
        return make, (self.stores,)

    def _read_keys(self, batch: Any) -> tuple[Ints, Ints]:
        ids = as_int64("the example ids of a batch", _read_column("ids", self._ids, batch))
        seconds = _read_column("event_seconds", self._event_seconds, batch)
        times = as_seconds_of_rows("the event_seconds of a batch", seconds, len(ids))
        if len(ids) and ids.min() < 0:
            raise ValueError(f"the example ids should be at least 0; received {ids.min()}")
        return ids.copy(), times.copy()  # the loader may reuse its buffers before the look-up ends

    def _look_up(self, ids: Ints, seconds: Ints, deadline: float) -> TeacherOutputs:
        by_teacher = [self._look_up_teacher(t, ids, seconds, deadline) for t in self.teachers]
        values, presence, age_seconds = (
            torch.from_numpy(np.stack(parts, axis=1)) for parts in zip(*by_teacher, strict=True)
        )
        values, embeddings = values.tensor_split([len(self.tasks)], dim=2)
        if not self._embedding_width:
            return TeacherOutputs(values.contiguous(), presence, age_seconds)
        # A row written without an embedding decodes to NaN; an absent output masks its embedding.
        embedding_presence = presence.any(-1) & embeddings.isfinite().all(-1)
        for teacher, count in zip(self.teachers, embedding_presence.sum(0).tolist(), strict=True):
            self._count_embeddings(teacher, count)
        return TeacherOutputs(
            values.contiguous(),
            presence,
            age_seconds,
            embeddings=embeddings.contiguous(),
            embedding_presence=embedding_presence,
        )

    def _look_up_teacher(
        self, teacher: str, ids: Ints, seconds: Ints, deadline: float
    ) -> tuple[Floats, Mask, Floats]:
        """Return outputs and embeddings (B, T + E), presence (B, T) and ages in seconds (B,)."""
        windows = self._windows[teacher]
        columns, age_seconds, has_row = windows.find(ids, seconds, deadline)
        tasks, format = windows.selection.tasks, windows.store.format
        outputs = columns[:, : len(tasks)]
        is_null = absent(outputs)
        presence = has_row[:, None] & ~is_null
        if is_null.any():
            outputs = np.where(is_null, np.float32(0), outputs)
        if tasks != self.tasks:  # tasks that this teacher's store lacks stay absent
            places = [self.tasks.index(task) for task in tasks]
            own_presence, own_outputs = presence, outputs
            presence = np.zeros((len(ids), len(self.tasks)), np.bool_)
            outputs = np.zeros(presence.shape, np.float32)
            presence[:, places], outputs[:, places] = own_presence, own_outputs
        presence = self._mask_and_count(teacher, ids, seconds, presence, age_seconds)
        if self._embedding_width:
            data = columns.view(np.uint8)[:, 4 * len(tasks) :][:, : format.embedding_bytes]
            embeddings = decode(data, format.embedding_resolution, format.embedding_width)
            outputs = np.concatenate([outputs, embeddings], axis=1)
        return outputs, presence, age_seconds

    def _mask_and_count(
        self, teacher: str, ids: Ints, seconds: Ints, presence: Mask, age_seconds: Floats
    ) -> Mask:
        """Return the presence (B, T) without stale outputs, and count all kinds of examples."""
        store, counters = self.stores[teacher], self.counters[teacher]
        windows = self._windows[teacher]
        counters.late, counters.quarantined = windows.late, windows.quarantined
        is_known = presence.any(axis=1)
        counters.batches += 1
        counters.asked += len(ids)
        if self._missing == "raise" and not is_known.all():
            raise LookupError(
                f"{store.url}: {(~is_known).sum()} of {len(ids)} examples have no output of "
                f"{teacher}: ids {ids[~is_known][:5].tolist()}, in the windows "
                f"{np.unique(store.window_of(seconds)).tolist()}; score them first, or pass "
                "missing='mask'"
            )
        counters.missing += int((~is_known).sum())
        if self._max_age_seconds is not None:
            is_stale = is_known & (age_seconds > self._max_age_seconds)
            counters.stale += int(is_stale.sum())
            is_known, presence = is_known & ~is_stale, presence & ~is_stale[:, None]
        counters.present += int(is_known.sum())
        counters._age_seconds += float(age_seconds[is_known].sum(dtype=np.float64))
        if counters.batches == _SILENT_BATCHES and not counters.present:
            length, first = store.format.window_seconds, windows.first
            stored = "no outputs" if first is None else f"outputs from {utc(first * length)} on"
            window_begin = utc(int(store.window_of(seconds[:1]).sum()) * length)
            warnings.warn(
                f"{store.url}: {teacher} has no output for any of the first {counters.asked} "
                f"examples, the last of which are in the window that begins {window_begin}; the "
                f"store has {stored} of {teacher}: are the teacher's name, ids, event_seconds and "
                "snapshot right?",
                TeacherMissingWarning,
                stacklevel=2,
            )
        return presence

    def _count_embeddings(self, teacher: str, count: int) -> None:
        counters = self.counters[teacher]
        counters.embedded += count
        is_silent = counters.batches == _SILENT_BATCHES and not counters.embedded
        if is_silent and counters.present:
            warnings.warn(
                f"{self.stores[teacher].url}: {teacher} has no embedding for any of the first "
                f"{counters.present} examples with an output: were they written with embeddings=?",
                TeacherMissingWarning,
                stacklevel=2,
            )

    def _wait(self, window: Pending, url: str, deadline: float) -> IndexedWindow:
        """Wait for a window; raise a StoreError at the deadline, or at once after a timeout."""
        while not window.done():
            # After one timeout no look-up waits, or a store that hangs would cost one at each step.
            if not self._store_answers or time.monotonic() >= deadline:
                self._store_answers = False
                raise StoreError(
                    f"{url}: should answer within {self._timeout_seconds:g} s, and has not: "
                    "look-ups do not wait until it does; pass a larger timeout_seconds to wait "
                    "longer, or train without its outputs by on_teacher_error='mask' of the "
                    "pipeline"
                )
            time.sleep(_POLL_SECONDS)
        indexed = window.result()
        self._store_answers = True
        return indexed


class _WorkerThread:
    """A thread that runs functions in order.

    It is a daemon, unlike an executor's threads: the process can exit while a look-up waits.
    """

    def __init__(self, name: str) -> None:
        self._queue = queue.SimpleQueue[Any]()
        self._thread = threading.Thread(target=_work, args=(self._queue,), name=name, daemon=True)
        self._thread.start()
        # The thread refers to the queue, not to this object, so that a look-up that nobody closes
        # can be collected; its thread then ends.
        weakref.finalize(self, self._queue.put, None)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((future, function, arguments))
        return future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()


def _work(items: queue.SimpleQueue[Any]) -> None:
    while (item := items.get()) is not None:
        future, function, arguments = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
        # Waiting for the next item would keep alive what these refer to: the look-up and a batch.
        del item, future, function, arguments


def _open_stores(
    store: TeacherStore | Mapping[str, TeacherStore], teachers: str | Sequence[str] | None
) -> dict[str, TeacherStore]:
    """Return each teacher's store, opened anew; check that a store with outputs has the teacher."""
    if teachers is None:
        teachers = tuple(store) if isinstance(store, Mapping) else ()
    names = (teachers,) if isinstance(teachers, str) else tuple(teachers)
    stores = store if isinstance(store, Mapping) else dict.fromkeys(names, store)
    check_names("teachers", names, tuple(stores))
    opened: dict[int, TeacherStore] = {}  # by id of the caller's store, to open each once
    for name in names:
        original = stores[name]
        if not isinstance(original, TeacherStore):
            raise TypeError(f"store should be a TeacherStore; received {type(original).__name__}")
        if id(original) not in opened:
            opened[id(original)] = copy.copy(original)
        check_names("teachers", (name,), opened[id(original)].teachers() or (name,))
    return {name: opened[id(stores[name])] for name in names}


def _read_column(name: str, function: Callable[[Any], Any], batch: Any) -> Any:
    what = f"the user's batch to its {name.replace('_', ' ')}"
    return read(name, function, batch, "TeacherLookup", what)
