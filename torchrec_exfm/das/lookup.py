"""The look-up of a batch's outputs by example id: a window at a time, off the training thread.

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

_SILENT_BATCHES = 10
_POLL_SECONDS = 0.005


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

    **A window is held once a host.** Where a host has several ranks (``LOCAL_WORLD_SIZE``), or the
    store is not in a local folder, a process of its own reads it into files that all ranks map: a
    store that is slow, or hangs, then never holds up the training process's interpreter.

    The age of an output is how far the teacher's training lay behind its example: event time -
    time that the snapshot was trained through, in seconds; 0 for what was logged in training.

    Args:
        store: opened anew, so that look-ups share nothing with the caller's. Teachers of several
            stores are looked up together: pass the store of each teacher, by its name.
        teachers: a name or several, in the order of the wrapper's teachers; None: those that
            ``store`` names.
        ids: takes the user's batch, as it is loaded, to its example ids, (B,) int64 on the host.
        event_seconds: takes it to the examples' event times, (B,) epoch seconds or timestamps, or
            one for all.
        tasks: which of the stores' tasks, in the order of the wrapper's; None: all. No others are
            held in memory. What a teacher does not know of them is masked.
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
        timeout_seconds: how long a look-up waits for a window that is being read. Then it raises a
            StoreError (which ``on_teacher_error="mask"`` of the pipeline masks), and those that
            come next do not wait, until a window is there.
        host_folder: where the host's processes share windows, in memory or on a local disk; None:
            ``/dev/shm`` (``/tmp``, if that is below 1 GiB), and no folder and no second process
            for one rank with a local store.
        host_bytes: at most so many of windows there; None: as many as it has room for.

    A look-up that is pickled is made anew where it arrives, with counters of its own: hand it to
    spawned processes, not to forked ones.

    Attributes:
        counters: for each teacher, :class:`LookupCounters` since the look-up was made.

    Warns:
        TeacherMissingWarning: once, if none of a teacher's first batches has an output.
        NotPipelinedWarning: once, if windows are read again and again.

    Raises:
        TypeError: for a store of another kind.
        ValueError: for a wrong value; if no store has a task, if a store has outputs and none of a
            teacher, or was made without the embeddings that are asked for.
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
        arguments = dict(locals())  # before there are other names
        del arguments["self"], arguments["store"], arguments["teachers"]
        self._options: dict[str, Any] = arguments
        self._process = os.getpid()
        self.stores = _open_stores(store, teachers)
        self.teachers = tuple(self.stores)
        known = dict.fromkeys(itertools.chain(*(each.tasks for each in self.stores.values())))
        self.tasks = tuple(known) if tasks is None else tuple(tasks)
        check_names("tasks", self.tasks, tuple(known))
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
        widths = {each.format.embedding_width for each in self.stores.values() if embeddings}
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
        local = all("://" not in store.url for store in self.stores.values())
        if host_folder is None and local and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1:
            self._reader = ThreadReader(sources)
        else:
            folder = default_folder() if host_folder is None else Path(host_folder)
            self._reader = HostReader(sources, folder, max_windows, host_bytes)
        self._closed = False
        self._store_answers = True  # the store does, as far as is known
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
        """Begin the look-up of a batch on the host; the future gives its outputs, on the host.

        The ids and times are taken from the batch before this returns.

        Raises:
            StoreError: in a process that was forked from the one that made the look-up.
            ValueError: for a batch that has none; for a look-up that was closed.
        """
        check_process(self._process)
        if self._closed:
            raise ValueError("a look-up should be used before close(); received a batch after it")
        deadline = time.monotonic() + self._timeout_seconds
        return self._thread.submit(self._look_up, *self._read_keys(batch), deadline)

    def __call__(self, batch: Any) -> TeacherOutputs:
        """The outputs of a batch.

        Raises:
            LookupError: for an example without an output, if ``missing="raise"``.
            StoreError: if the store is damaged, refused for its rows, or does not answer in time.
        """
        return self.start(batch).result()

    def refresh(self) -> None:
        """Forget the windows in memory, so that the next look-up reads what the store has then."""
        check_process(self._process)
        self._reader.forget()
        for windows in self._windows.values():
            self._thread.submit(windows.forget).result()

    def close(self) -> None:
        """End its threads, and let the windows in memory go; look-ups that were started end."""
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
        return ids.copy(), times.copy()  # the loader may use its buffers again

    def _look_up(self, ids: Ints, seconds: Ints, deadline: float) -> TeacherOutputs:
        found = [
            self._look_up_teacher(teacher, ids, seconds, deadline) for teacher in self.teachers
        ]
        values, presence, age_seconds = (
            torch.from_numpy(np.stack(parts, axis=1)) for parts in zip(*found, strict=True)
        )
        values, numbers = values.tensor_split([len(self.tasks)], dim=2)
        if not self._embedding_width:
            return TeacherOutputs(values.contiguous(), presence, age_seconds)
        embedded = presence.any(-1) & numbers.isfinite().all(-1)
        for teacher, count in zip(self.teachers, embedded.sum(0).tolist(), strict=True):
            self._count_embeddings(teacher, count)
        return TeacherOutputs(
            values.contiguous(),
            presence,
            age_seconds,
            embeddings=numbers.contiguous(),
            embedding_presence=embedded,
        )

    def _look_up_teacher(
        self, teacher: str, ids: Ints, seconds: Ints, deadline: float
    ) -> tuple[Floats, Mask, Floats]:
        """Outputs and embeddings (B, T + E), presence (B, T), ages in seconds (B,)."""
        windows = self._windows[teacher]
        columns, age_seconds, found = windows.find(ids, seconds, deadline)
        tasks, form = windows.selection.tasks, windows.store.format
        values = columns[:, : len(tasks)]
        null = absent(values)
        presence = found[:, None] & ~null
        if null.any():
            values = np.where(null, np.float32(0), values)
        if tasks != self.tasks:  # those that its store does not have are absent
            at = [self.tasks.index(task) for task in tasks]
            known, outputs = presence, values
            presence = np.zeros((len(ids), len(self.tasks)), np.bool_)
            values = np.zeros(presence.shape, np.float32)
            presence[:, at], values[:, at] = known, outputs
        presence = self._mask_and_count(teacher, ids, seconds, presence, age_seconds)
        if self._embedding_width:
            data = columns.view(np.uint8)[:, 4 * len(tasks) :][:, : form.embedding_bytes]
            embeddings = decode(data, form.embedding_resolution, form.embedding_width)
            values = np.concatenate([values, embeddings], axis=1)
        return values, presence, age_seconds

    def _mask_and_count(
        self, teacher: str, ids: Ints, seconds: Ints, presence: Mask, age_seconds: Floats
    ) -> Mask:
        """The presence (B, T) less what is stale; counts what there is, and what is missing."""
        store, counters = self.stores[teacher], self.counters[teacher]
        windows = self._windows[teacher]
        counters.late, counters.quarantined = windows.late, windows.quarantined
        known = presence.any(axis=1)
        counters.batches += 1
        counters.asked += len(ids)
        if self._missing == "raise" and not known.all():
            raise LookupError(
                f"{store.url}: {(~known).sum()} of {len(ids)} examples have no output of "
                f"{teacher}: ids {ids[~known][:5].tolist()}, in the windows "
                f"{np.unique(store.window_of(seconds)).tolist()}; score them first, or pass "
                "missing='mask'"
            )
        counters.missing += int((~known).sum())
        if self._max_age_seconds is not None:
            stale = known & (age_seconds > self._max_age_seconds)
            counters.stale += int(stale.sum())
            known, presence = known & ~stale, presence & ~stale[:, None]
        counters.present += int(known.sum())
        counters._age_seconds += float(age_seconds[known].sum(dtype=np.float64))
        if counters.batches == _SILENT_BATCHES and not counters.present:
            length, first = store.format.window_seconds, windows.first
            stored = "no outputs" if first is None else f"outputs from {utc(first * length)} on"
            began = utc(int(store.window_of(seconds[:1]).sum()) * length)
            warnings.warn(
                f"{store.url}: {teacher} has no output for any of the first {counters.asked} "
                f"examples, the last of which lie in the window of {began}; of {teacher} there "
                f"are {stored}: are its name, ids, event_seconds and snapshot right?",
                TeacherMissingWarning,
                stacklevel=2,
            )
        return presence

    def _count_embeddings(self, teacher: str, count: int) -> None:
        counters = self.counters[teacher]
        counters.embedded += count
        silent = counters.batches == _SILENT_BATCHES and not counters.embedded
        if silent and counters.present:
            warnings.warn(
                f"{self.stores[teacher].url}: {teacher} has no embedding for any of the first "
                f"{counters.present} examples with an output: were they written with embeddings=?",
                TeacherMissingWarning,
                stacklevel=2,
            )

    def _wait(self, window: Pending, url: str, deadline: float) -> IndexedWindow:
        """A window that is being read; a StoreError if it does not come by the deadline."""
        while not window.done():
            if not self._store_answers or time.monotonic() >= deadline:
                self._store_answers = False
                raise StoreError(
                    f"{url}: should answer within {self._timeout_seconds:g} s, and has not: "
                    "look-ups do not wait until it does; a larger timeout_seconds waits longer, "
                    "on_teacher_error='mask' of the pipeline trains without"
                )
            time.sleep(_POLL_SECONDS)
        read_one = window.result()
        self._store_answers = True
        return read_one


class _WorkerThread:
    """Runs functions in order; the end of the process does not wait for it, as for an executor."""

    def __init__(self, name: str) -> None:
        self._work = queue.SimpleQueue[Any]()
        self._thread = threading.Thread(
            target=_run_work, args=(self._work,), name=name, daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._work.put, None)  # where nobody closes it

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.put((future, function, arguments))
        return future

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()


def _run_work(work: queue.SimpleQueue[Any]) -> None:
    while (one := work.get()) is not None:
        future, function, arguments = one
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del one, future, function, arguments  # so that what they hold does not outlive them


def _open_stores(
    store: TeacherStore | Mapping[str, TeacherStore], teachers: str | Sequence[str] | None
) -> dict[str, TeacherStore]:
    """The store of each teacher, opened anew, which has it if it has any."""
    if teachers is None:
        teachers = tuple(store) if isinstance(store, Mapping) else ()
    names = (teachers,) if isinstance(teachers, str) else tuple(teachers)
    given = store if isinstance(store, Mapping) else dict.fromkeys(names, store)
    check_names("teachers", names, tuple(given))
    opened: dict[int, TeacherStore] = {}
    for name in names:
        one = given[name]
        if not isinstance(one, TeacherStore):
            raise TypeError(f"store should be a TeacherStore; received {type(one).__name__}")
        if id(one) not in opened:
            opened[id(one)] = copy.copy(one)
        check_names("teachers", (name,), opened[id(one)].teachers() or (name,))
    return {name: opened[id(given[name])] for name in names}


def _read_column(name: str, function: Callable[[Any], Any], batch: Any) -> Any:
    what = f"the user's batch to its {name.replace('_', ' ')}"
    return read(name, function, batch, "TeacherLookup", what)
