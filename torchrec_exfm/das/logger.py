"""Log of teacher outputs from the teacher's own training forward, without an extra pass.

The forward computes a batch's outputs before the update that learns from the batch. So an example's
output does not depend on its label, however far the teacher is trained later.

B examples, T tasks, E width of an embedding.
"""

from __future__ import annotations

import copy
import operator
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchrec_exfm.das.arrays import Ints, Mask, among, as_epoch, as_int64
from torchrec_exfm.das.errors import check_process
from torchrec_exfm.das.rules import BadRows, check_bad_rows
from torchrec_exfm.das.schema import (
    Snapshot,
    as_keys,
    check_key_names,
    check_name,
    check_same_keys,
)
from torchrec_exfm.das.snapshots import newest_snapshot
from torchrec_exfm.das.store import MAX_WINDOWS, TeacherStore

__all__ = ["TeacherLogger"]

_CACHED_WINDOWS = 16  # windows whose logged ids are kept in memory
_Batch: TypeAlias = tuple[Any, Any, Tensor, dict[str, Any]]  # ids, times, outputs, keys


class TeacherLogger:
    """Logger of a teacher's outputs in its training forward; each rank logs its own examples.

    Around a training loop::

        logger = TeacherLogger(store, "fm", ids=..., event_seconds=...)
        logger.attach(model)
        ...                              # the training loop, unchanged
        logger.close()

    Rows are collected, and written in the background ``shard_rows`` at a time. Call :meth:`flush`
    before each checkpoint of the training: a run that resumes from it then misses no row.

    **Each example is logged once**, the first time. A second epoch is not logged, since the teacher
    has then learned the labels. If a killed run resumes from its checkpoint, the rows that it
    logged after the checkpoint stay.

    Each row is marked ``logged``, with age 0. Its version is that of the newest published snapshot,
    which the teacher has been trained beyond; 0 before the first. A logged output does not depend
    on its own example's label. It may depend on the label of an example that comes later in a
    student's order. If that student is a teacher in turn, both have to see the examples in one
    order.

    Args:
        store: the store to write to.
        teacher: the teacher's name.
        ids: function from the batch to its example ids, (B,) int64.
        event_seconds: function from the batch to its event times, (B,) epoch seconds or timestamps.
        keys: function from the batch to its keys by name, as for :meth:`TeacherStore.write`, (B,)
            each; None: rows are written without keys.
        outputs: function from the model's result to logits (or predictions), (B, T) or (B,); the
            default fits TorchRec's contract ``(loss, (loss, logits, labels))``.
        embeddings: function from the model's result to the teacher's embeddings, (B, E); None: rows
            are written without embeddings.
        tasks: as for :meth:`TeacherStore.write`.
        shard_rows: rows of one commit.
        bad_rows: as for :meth:`TeacherStore.write`.

    Attributes:
        written: rows that this logger has written.
        logged_before: rows that it left out because their examples had been logged before.
        quarantined: rows left out because they break a rule.

    Raises:
        ValueError: for a wrong value.

    Example:
        >>> import tempfile
        >>> from torchrec_exfm.das import TeacherStore
        >>> store = TeacherStore.create(tempfile.mkdtemp())
        >>> with TeacherLogger(store, "fm") as logger:
        ...     logger.log(torch.tensor([1, 2]), torch.tensor([10, 20]), torch.tensor([0.5, -2.0]))
        >>> store.refresh(), store.windows("fm"), logger.written
        (1, [0], 2)
    """

    def __init__(
        self,
        store: TeacherStore,
        teacher: str,
        *,
        ids: Callable[[Any], Any] = operator.attrgetter("example_ids"),
        event_seconds: Callable[[Any], Any] = operator.attrgetter("event_seconds"),
        keys: Callable[[Any], Mapping[str, Any]] | None = None,
        outputs: Callable[[Any], Tensor] = lambda output: output[1][1],
        embeddings: Callable[[Any], Tensor] | None = None,
        tasks: Sequence[str] | None = None,
        shard_rows: int = 2**18,
        bad_rows: BadRows = "refuse",
    ) -> None:
        if shard_rows < 1:
            raise ValueError(f"shard_rows should be at least 1; received {shard_rows}")
        check_bad_rows(bad_rows)
        self.teacher = check_name("a teacher", teacher)
        self.written = 0
        self.quarantined = 0
        self.logged_before = 0
        self._store = copy.copy(store)
        self._ids = ids
        self._event_seconds = event_seconds
        self._keys = keys
        self._outputs = outputs
        self._embeddings = embeddings
        self._tasks = self._store.format.chosen(tasks)
        self._shard_rows = shard_rows
        self._bad_rows: BadRows = bad_rows
        self._process = os.getpid()
        self._run = uuid.uuid4().hex
        self._shards = 0
        self._rows: list[_Batch] = []
        self._count = 0
        self._handed_over: list[_Batch] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="teacher-logger")
        self._writing: Future[None] | None = None
        # by window, the least recently used first: its logged ids, sorted, and the files read
        self._logged: dict[int, tuple[Ints, set[str]]] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Log every training forward ``model(batch)`` of a model, under DMP or not."""

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if module.training:
                batch = arguments[0]
                ids, event_seconds = self._ids(batch), self._event_seconds(batch)
                keys = self._keys and self._keys(batch)
                embeddings = self._embeddings and self._embeddings(output)
                outputs = self._outputs(output)
                self.log(ids, event_seconds, outputs, embeddings=embeddings, keys=keys)

        self._handles.append(model.register_forward_hook(hook))

    def log(
        self,
        ids: Any,
        event_seconds: Any,
        outputs: Tensor,
        *,
        embeddings: Tensor | None = None,
        keys: Mapping[str, Any] | None = None,
    ) -> None:
        """Log the outputs of B examples; tensors may be on a device, which is not waited for.

        Pass embeddings (B, E), and keys by name, (B,) each, in every call or in none.

        Raises:
            StoreError: if an earlier shard could not be written.
            TypeError: for ids, times or keys of a wrong dtype.
            ValueError: for bad rows in an earlier shard; for nulls; for a wrong shape; for other
                names of keys than before.
        """
        values = self._store.format.joined(
            outputs, embeddings, outputs.shape[:1].numel(), self._tasks
        )
        keys = {} if keys is None else keys
        check_key_names([*keys])
        key_columns = {name: _copy_column(name, keys[name], as_int64) for name in keys}
        for _, _, last_values, last_keys in (self._rows or self._handed_over)[-1:]:
            check_same_keys(key_columns, last_keys)
            if last_values.shape[1] != values.shape[1]:
                raise ValueError(
                    "embeddings should come with every call of log() or with none; received "
                    f"{'none' if embeddings is None else 'some'}: take another logger for these"
                )
        seconds = _copy_column("event_seconds", event_seconds, as_epoch)
        self._rows.append((_copy_column("ids", ids, as_int64), seconds, values, key_columns))
        self._count += len(outputs)
        if self._count >= self._shard_rows:
            self._hand_over()

    def flush(self) -> None:
        """Write the logged rows, and wait until they are in the store.

        Rows that could not be written are kept, and the next flush tries again.

        Raises:
            StoreError: if it can't be written.
            ValueError: for bad rows.
        """
        self._hand_over()
        self._finish_write()

    def close(self) -> None:
        """Detach from the models, and flush."""
        for handle in self._handles:
            handle.remove()
        self.flush()
        self._writer.shutdown()

    def __enter__(self) -> TeacherLogger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _finish_write(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except Exception:  # put the rows back, so that the next flush tries again
                self._rows = self._handed_over + self._rows
                self._count = sum(len(outputs) for _, _, outputs, _ in self._rows)
                raise

    def _hand_over(self) -> None:
        check_process(self._process)
        self._finish_write()
        if self._rows:
            self._handed_over, self._rows, self._count = self._rows, [], 0
            ready = _record_event(self._handed_over[-1][2].device)
            self._writing = self._writer.submit(self._write, self._handed_over, self._shards, ready)
            self._shards += 1

    def _write(self, rows: list[_Batch], shard: int, ready: torch.Event | None) -> None:
        """Write a shard's new examples, in parts of as many windows as one write may have."""
        if ready is not None:
            ready.synchronize()  # this thread's stream does not wait for that of training
        ids = np.concatenate([as_int64("ids", i, len(values)) for i, _, values, _ in rows])
        seconds = np.concatenate([as_epoch("event_seconds", s, len(v)) for _, s, v, _ in rows])
        columns = torch.cat([values for _, _, values, _ in rows]).cpu()
        parts = [as_keys(columns_of_keys, len(values)) for _, _, values, columns_of_keys in rows]
        keys = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        is_new = self._select_new(ids, seconds)
        _, places = np.unique(self._store.window_of(seconds), return_inverse=True)
        for part in range(places.max(initial=-1) // MAX_WINDOWS + 1):
            chosen = is_new & (places // MAX_WINDOWS == part)
            if chosen.any():
                values = columns[torch.from_numpy(chosen)]
                outputs, embeddings = values.tensor_split([len(self._tasks)], dim=1)
                report = self._store.write(
                    newest_snapshot(self._store, self.teacher) or Snapshot(self.teacher, 0, 0),
                    ids[chosen],
                    outputs,
                    seconds[chosen],
                    tasks=self._tasks,
                    shard=f"log/{self._run}/{shard}/{part}",
                    logged=True,
                    keys={name: key[chosen] for name, key in keys.items()},
                    embeddings=embeddings if embeddings.shape[1] else None,
                    bad_rows=self._bad_rows,
                )
                self.written += report.written
                self.quarantined += sum(report.quarantined.values())
        self.logged_before += len(ids) - int(is_new.sum())

    def _select_new(self, ids: Ints, seconds: Ints) -> Mask:
        """Return which examples (n,) come for the first time, here and in the store."""
        self._store.refresh()
        is_new = np.zeros(len(ids), dtype=np.bool_)
        distinct, first = np.unique(ids, return_index=True)  # a search for sorted ids is faster
        windows = self._store.window_of(seconds[first])
        for window in np.unique(windows).tolist():
            in_window = windows == window
            is_new[first[in_window]] = ~among(distinct[in_window], self._logged_ids(window))
        return is_new

    def _logged_ids(self, window: int) -> Ints:
        """Return the ids that are logged in a window of the store, sorted."""
        empty = np.empty(0, dtype=np.int64), set[str]()
        ids, paths = self._logged.pop(window, empty)
        files = self._store.files(self.teacher, window)
        if not paths <= {file.path for file in files}:  # compacted or forgotten: read all again
            ids, paths = empty
        for file in files:
            if file.path not in paths:
                rows = self._store.read_file(file)
                ids = np.concatenate([ids, rows.example_id[rows.logged]])
                ids = np.sort(ids, kind="stable")  # a stable sort merges these two sorted runs
                paths.add(file.path)
        self._logged[window] = ids, paths
        if len(self._logged) > _CACHED_WINDOWS:
            del self._logged[next(iter(self._logged))]
        return ids


def _record_event(device: torch.device) -> torch.Event | None:
    """Record an event after the work queued on this thread's stream; None: on the CPU."""
    if device.type == "cpu":
        return None
    event: torch.Event = torch.get_device_module(device).Event()
    event.record()
    return event


def _copy_column(what: str, values: Any, convert: Callable[[str, Any], Ints]) -> Any:
    """Copy a column, since a loader may reuse its buffers; a device is not waited for."""
    return values.clone() if isinstance(values, Tensor) else convert(what, values).copy()
