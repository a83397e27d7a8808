"""The teacher store: what teachers said of examples, once, in an open table for many students.

n rows, T tasks. ExFM, arXiv 2502.17494, calls its keeper the data augmentation system (DAS).
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_exfm.das.arrays import MICROSECONDS, Ints, as_floats, as_int, as_int64
from torchrec_exfm.das.conditional_puts import check_conditional_puts
from torchrec_exfm.das.delta import DataFile, MissingFileError, StoreError, Table, normal_url
from torchrec_exfm.das.rules import MAX_SECONDS, BadRows, Rows, broken_rules, check_bad_rows, sift
from torchrec_exfm.das.schema import KEYS, OPTIONAL, PARTITION, Resolution, StoreFormat
from torchrec_exfm.das.snapshots import Snapshot, create_registry
from torchrec_exfm.das.urls import check_options

__all__ = ["TeacherStore", "WriteReport"]


@dataclass(frozen=True)
class WriteReport:
    """What became of the rows of one write.

    Attributes:
        written: rows that are in the store now.
        quarantined: rows left out, by the rule that they break.
        committed: False if the same shard had been written before: then nothing was done.
    """

    written: int
    quarantined: dict[str, int] = field(default_factory=dict)
    committed: bool = True


class TeacherStore:
    """A table of teachers' outputs at a folder or URL (Delta Lake; the columns are in ``schema``).

    Several processes may write at once, and others read: each write is one atomic commit, and a
    reader sees whole commits; :meth:`refresh` brings those made since. Of several outputs for an
    example, **that of the newest snapshot wins** (then what was logged in training, then what was
    scored last), unless the reader pins a snapshot.

    Args:
        url: a local folder, or ``s3://``, ``gs://``, ``az://`` ..., as deltalake takes them.
        storage_options: of deltalake, credentials among them; they are kept in memory only.

    Raises:
        StoreError: if there is no store, or it is damaged or of another format version.

    Example:
        >>> import tempfile
        >>> store = TeacherStore.create(tempfile.mkdtemp(), window_seconds=3600)
        >>> snapshot = Snapshot("fm", version=7, trained_through_seconds=1_000_000)
        >>> store.write(snapshot, [11, 12], [0.5, -2.0], [1_000_030, 1_000_060]).written
        2
        >>> _ = store.refresh()
        >>> rows, _ = store.read("fm", store.windows("fm")[0])
        >>> rows.example_id.tolist(), rows.outputs.tolist(), rows.age_seconds.tolist()
        ([11, 12], [[0.5], [-2.0]], [30.0, 60.0])
    """

    def __init__(
        self, url: str | Path, *, storage_options: Mapping[str, str] | None = None
    ) -> None:
        check_options(storage_options)
        self.url = normal_url(url)
        self.storage_options = dict(storage_options or {})
        self.table = Table(f"{self.url}/outputs", storage_options)
        try:
            self.format = StoreFormat.from_json(self.table.delta.metadata().description)
        except ValueError as error:
            raise StoreError(f"{self.table.url}: {error}") from error
        self.table.properties = self.format.writer_properties()

    @classmethod
    def create(
        cls,
        url: str | Path,
        *,
        tasks: Sequence[str] = ("label",),
        window_seconds: int = 86_400,
        resolution: Resolution = "bfloat16",
        storage_options: Mapping[str, str] | None = None,
    ) -> TeacherStore:
        """Make a store, or open the one that is there, which must be of the same format.

        Args:
            url: as for the class.
            tasks: names of the outputs, in order.
            window_seconds: length of a time window: choose it so that one window's rows fit in
                memory, at some 20 bytes a row and 130 while it is read; batches should come in
                order of time.
            resolution: ``"bfloat16"`` rounds the outputs to 8 bits of mantissa (a relative error
                of at most 0.4 %), for a third of the bytes on disk; ``"float32"`` keeps them.
            storage_options: as for the class.

        Raises:
            StoreError: if there is one of another format, or it can't be made.
            ValueError: for a wrong value.
        """
        if isinstance(tasks, str):
            raise ValueError(f"tasks should be a tuple of names; received {tasks!r}")
        names = tuple(tasks)
        wanted = StoreFormat(tasks=names, window_seconds=window_seconds, resolution=resolution)
        check_options(storage_options)
        url = normal_url(url)
        where = f"{url}/outputs"
        check_conditional_puts(where, storage_options)
        create_registry(url, storage_options)
        Table.create(where, wanted.schema(), PARTITION, wanted.to_json(), storage_options)
        store = cls(url, storage_options=storage_options)
        if store.format != wanted:
            raise StoreError(
                f"{where}: is a store of {store.format}, and {wanted} was asked for: open it with "
                "TeacherStore(url), or choose another folder"
            )
        return store

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.format.tasks

    def write(
        self,
        snapshot: Snapshot,
        example_ids: Any,
        outputs: Any,
        event_seconds: Any,
        *,
        shard: str | None = None,
        logged: bool = False,
        keys: Mapping[str, Any] | None = None,
        embeddings: Any = None,
        bad_rows: BadRows = "refuse",
    ) -> WriteReport:
        """Write what a snapshot said of n examples: one commit, all or nothing.

        Args:
            snapshot: who said it.
            example_ids: (n,) whole numbers in [0, 2^63), none twice.
            outputs: (n, T), or (n,) for one task: logits of binary tasks, not probabilities
                (``torch.logit`` makes them), else predictions.
            event_seconds: (n,) event times of the examples, epoch seconds.
            shard: a name for this piece of work: a second write of the same name does nothing.
                None: a name of its own.
            logged: said in the teacher's own training forward, before its update.
            keys: ``user_id``, ``item_id``, ``category_id``, each (n,) whole numbers.
            embeddings: (n, K) floating point.
            bad_rows: what to do with rows that break a rule: ``"refuse"`` all the rows with an
                error, or ``"quarantine"``: leave out the bad ones and count them.

        Raises:
            TypeError: for a wrong kind or dtype.
            ValueError: for a wrong shape; for bad rows: negative or doubled ids, NaN or infinite
                outputs, event times out of range, and leaks (the snapshot was trained through the
                event time of the example or later, and the output was not logged).
            StoreError: if the rows can't be written; then none is.
        """
        check_bad_rows(bad_rows)
        rows = self._to_write(snapshot, example_ids, outputs, event_seconds, logged)
        optional = _optional_columns(len(rows), keys, embeddings)
        columns = self._columns(snapshot.teacher, rows, optional)
        broken = broken_rules(rows, None, self.format.window_seconds)
        where = f"{self.url}: nothing was written"
        good, quarantined = sift(rows, broken, bad_rows, where, ValueError)
        if quarantined:
            columns = columns.filter(pa.array(good))
        note = {"quarantined": json.dumps(quarantined), "teacher": snapshot.teacher}
        transaction = shard or f"write/{uuid.uuid4().hex}", 0
        columns = columns.take(pa.array(_order(columns)))
        if not self.table.append(columns, transaction, note if quarantined else None):
            return WriteReport(written=0, committed=False)
        return WriteReport(written=columns.num_rows, quarantined=quarantined)

    def advance_watermark(self, writer: str, before_seconds: int) -> None:
        """Say that a writer has written all that it will of events before a time.

        For readers of a stream, who can't tell an output that is late from one that never comes.
        A watermark never falls: an earlier time than before changes nothing.

        Args:
            writer: a name: that of a teacher, or another that its readers know.
            before_seconds: event time, epoch seconds.

        Raises:
            ValueError: for a wrong value.
            StoreError: if it can't be written.
        """
        if not writer or not isinstance(writer, str):
            raise ValueError(f"the writer of a watermark should have a name; received {writer!r}")
        second = as_int(before_seconds)
        if not 0 <= second < MAX_SECONDS:
            raise ValueError(
                "before_seconds should be whole seconds since 1970, in [0, 2^40); received "
                f"{before_seconds!r}"
            )
        self.table.append(self.format.schema().empty_table(), (f"watermark/{writer}", second))

    def watermark(self, writer: str) -> int | None:
        """That of a writer, as of the commit that is read; None if it has none."""
        return self.table.transaction(f"watermark/{writer}")

    def refresh(self, version: int | None = None) -> int:
        """Go to the newest commit (or to that of number ``version``), and return its number."""
        self.table.refresh(version)
        return self.table.version

    def teachers(self) -> list[str]:
        """The teachers that have outputs."""
        return sorted({file.partition[0] for file in self.table.files()})

    def windows(self, teacher: str) -> list[int]:
        """The windows for which a teacher has outputs, in order of time."""
        return sorted(
            {file.partition[1] for file in self.table.files() if file.partition[0] == teacher}
        )

    def files(self, teacher: str, window: int) -> list[DataFile]:
        """The data files of a window."""
        return [file for file in self.table.files() if file.partition == (teacher, window)]

    def window_of(self, event_seconds: Ints) -> Ints:
        """The windows (n,) of event times (n,)."""
        return event_seconds // self.format.window_seconds

    def read(
        self, teacher: str, window: int, *, bad_rows: BadRows = "refuse"
    ) -> tuple[Rows, dict[str, int]]:
        """All rows of a window, as they were written: several of an example if there are.

        None for a window or a teacher that is not there.

        Args:
            teacher: its name.
            window: one of :meth:`windows`.
            bad_rows: what to do with rows that break a rule: ``"refuse"`` (an error that names the
                file and the rows), or ``"quarantine"``: leave them out.

        Returns:
            The rows, and how many were left out, by the rule that they break.

        Raises:
            StoreError: if a file is missing, cut short, foreign, or holds bad rows.
        """
        check_bad_rows(bad_rows)
        files = self.files(teacher, window)
        try:
            parts = [self.read_file(file, bad_rows=bad_rows) for file in files]
        except MissingFileError:  # compaction may have put another in its place
            self.refresh()
            if self.files(teacher, window) == files:
                raise
            return self.read(teacher, window, bad_rows=bad_rows)
        quarantined = Counter[str]()
        for _, left_out in parts:
            quarantined.update(left_out)
        return Rows.concatenate([rows for rows, _ in parts], len(self.tasks)), dict(quarantined)

    def read_file(
        self, file: DataFile, *, bad_rows: BadRows = "refuse"
    ) -> tuple[Rows, dict[str, int]]:
        """As :meth:`read`, for one of :meth:`files`."""
        rows = self.rows_of(file)
        broken = broken_rules(rows, file.partition[1], self.format.window_seconds)
        where = f"{self.table.url}/{file.path}"
        good, quarantined = sift(rows, broken, bad_rows, where, StoreError)
        return (rows[good] if quarantined else rows), quarantined

    def rows_of(self, file: DataFile) -> Rows:
        """The rows of one of :meth:`files`, whatever rules they break."""
        names = [field.name for field in fields(Rows) if field.name != "outputs"]
        schema = self.format.schema()
        wanted = pa.schema([schema.field(name) for name in (*names, *self.format.outputs)])
        table = self.table.read(file, wanted)
        outputs = np.stack([_array(table, name) for name in self.format.outputs], axis=1)
        return Rows(outputs=outputs, **{name: _array(table, name) for name in names})

    def _to_write(
        self, snapshot: Snapshot, example_ids: Any, outputs: Any, event_seconds: Any, logged: bool
    ) -> Rows:
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot should be a Snapshot; received {type(snapshot).__name__}")
        ids = as_int64("example_ids", example_ids)
        n = len(ids)
        seconds = as_int64("event_seconds", event_seconds, n)
        what = f"outputs of {n} examples for the tasks {self.tasks}"
        values = as_floats(what, outputs, (n, len(self.tasks)))
        return Rows(
            example_id=ids,
            outputs=self.format.round(values),
            event_time=seconds.clip(-1, 8 * MAX_SECONDS) * MICROSECONDS,  # within int64
            snapshot=np.full(n, snapshot.version),
            trained_through=np.full(n, snapshot.trained_through_seconds * MICROSECONDS),
            logged=np.full(n, bool(logged)),
            scored_at=np.full(n, int(time.time() * MICROSECONDS)),
        )

    def _columns(self, teacher: str, rows: Rows, optional: dict[str, Any]) -> pa.Table:
        columns = {
            **vars(rows),
            **dict(zip(self.format.outputs, rows.outputs.T, strict=True)),
            "teacher": pa.repeat(teacher, len(rows)),
            "window": self.window_of(rows.event_time // MICROSECONDS),
            **dict.fromkeys(OPTIONAL, pa.nulls(len(rows))),
            **optional,
        }
        schema = self.format.schema()
        return pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)


def _optional_columns(rows: int, keys: Mapping[str, Any] | None, embeddings: Any) -> dict[str, Any]:
    keys = keys or {}
    if unknown := sorted(set(keys) - set(KEYS)):
        raise ValueError(f"keys should be among {KEYS}; received {unknown}")
    columns: dict[str, Any] = {name: as_int64(name, keys[name], rows) for name in keys}
    if embeddings is not None:
        width = np.shape(embeddings)[-1] if np.ndim(embeddings) == 2 else 0
        if not width:
            raise ValueError(
                f"embeddings should be of shape ({rows}, K); received {np.shape(embeddings)}"
            )
        flat = as_floats("embeddings", embeddings, (rows, width)).reshape(-1)
        if not np.isfinite(flat).all():
            raise ValueError("embeddings should be finite; received NaN or infinity")
        offsets = np.arange(0, len(flat) + 1, width, dtype=np.int32)
        columns["embedding"] = pa.ListArray.from_arrays(offsets, flat)
    return columns


def _order(columns: pa.Table) -> Ints:
    """That of windows, and in a window of ids, of which none comes twice."""
    windows, ids = _array(columns, "window"), _array(columns, "example_id")
    in_one = len(ids) and (windows == windows[0]).all()
    order: Ints = np.argsort(ids) if in_one else np.lexsort((ids, windows))
    return order


def _array(table: pa.Table, name: str) -> Any:
    column = table[name].combine_chunks()
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    return column.to_numpy(zero_copy_only=False)
