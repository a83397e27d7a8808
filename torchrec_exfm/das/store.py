"""The teacher store: an open table of teacher outputs, written once and shared by many students.

Shapes: n rows, T tasks, E numbers of an embedding. ExFM (arXiv 2502.17494) calls the system around
it the data augmentation system (DAS).
"""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from torchrec_exfm.das.arrays import (
    MAX_SECONDS,
    MICROSECONDS,
    Ints,
    as_epoch,
    as_floats,
    as_int,
    as_int64,
    as_second,
)
from torchrec_exfm.das.conditional_puts import check_conditional_puts
from torchrec_exfm.das.delta import Commit, DataFile, Table
from torchrec_exfm.das.embeddings import MISSING, encode
from torchrec_exfm.das.errors import MissingFileError, StoreError
from torchrec_exfm.das.rules import (
    ABSENT,
    NO_KEY,
    BadRows,
    Rows,
    absent,
    broken_rules,
    check_bad_rows,
    sift,
)
from torchrec_exfm.das.schema import (
    OPTIONAL,
    PARTITION,
    SNAPSHOTS,
    EmbeddingResolution,
    Resolution,
    Snapshot,
    StoreFormat,
    as_keys,
    check_key_names,
    output_columns,
)
from torchrec_exfm.das.shards import NamedRows
from torchrec_exfm.das.urls import check_options, normal_url

__all__ = ["MAX_WINDOWS", "TeacherStore", "WriteReport"]

T = TypeVar("T")
MAX_WINDOWS = 1_000  # of one write: each has its own open file, of some 300 KiB in memory


@dataclass(frozen=True)
class WriteReport:
    """Counts of the rows of one write.

    Attributes:
        written: rows that this write added to the store.
        quarantined: rows left out, by the rule that they break.
        committed: False if there was nothing to do, as the shard had been written before.
        stored_before: rows that an earlier write of the shard had stored already.
    """

    written: int
    quarantined: dict[str, int] = field(default_factory=dict)
    committed: bool = True
    stored_before: int = 0


class TeacherStore:
    """A Delta table of teacher outputs at a folder or URL (the columns are in ``schema``).

    Several processes may write and read at once. Each write is one atomic commit, and a reader sees
    whole commits; :meth:`refresh` reads the newest. If an example has several outputs, **the newest
    snapshot wins** (among its rows a logged one, then the one scored last), unless the reader pins
    a snapshot.

    Args:
        url: a local folder, or a URL that deltalake accepts: ``s3://``, ``gs://``, ``az://`` ...
        storage_options: options of deltalake, such as credentials; they are kept in memory only.
        checkpoints: the folder of the snapshots' checkpoints, which all ranks share. None: a folder
            inside the store, if that is local or mounted.

    A pickled or copied store is opened again from its URL. Pass it to spawned processes, not to
    forked ones, in which deltalake can't run.

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
        self,
        url: str | Path,
        *,
        storage_options: Mapping[str, str] | None = None,
        checkpoints: Path | str | None = None,
    ) -> None:
        check_options(storage_options)
        self.url = normal_url(url)
        self.storage_options = dict(storage_options or {})
        if checkpoints is None and "://" not in self.url:
            checkpoints = Path(self.url) / "checkpoints"
        self.checkpoints = None if checkpoints is None else Path(checkpoints)
        self.table = Table(f"{self.url}/outputs", PARTITION, self.storage_options)
        try:
            self.format = StoreFormat.from_json(self.table.delta.metadata().description)
        except ValueError as error:
            raise StoreError(f"{self.table.url}: {error}") from error
        names = {field.name for field in self.table.delta.schema().fields}
        if lost := sorted({*self.format.schema().names} - names):
            raise StoreError(f"{self.table.url}: lacks the columns {lost}: its log is damaged")
        self.table.properties = self.format.writer_properties()

    def __reduce__(self) -> tuple[Any, ...]:
        # locks and the library's handles can't be pickled
        options: dict[str, Any] = {
            "storage_options": self.storage_options,
            "checkpoints": self.checkpoints,
        }
        return functools.partial(TeacherStore, **options), (self.url,)

    @functools.cached_property
    def registry(self) -> Table:
        """The table of published snapshots."""
        # opened when needed: look-ups and writers do without it
        return Table(f"{self.url}/snapshots", (), self.storage_options)

    @classmethod
    def create(
        cls,
        url: str | Path,
        *,
        tasks: Sequence[str] = ("label",),
        window_seconds: int = 86_400,
        resolution: Resolution = "bfloat16",
        embedding_width: int = 0,
        embedding_resolution: EmbeddingResolution = "float16",
        storage_options: Mapping[str, str] | None = None,
        checkpoints: Path | str | None = None,
    ) -> TeacherStore:
        """Create a store, or open an existing one of the same format.

        Args:
            url: as for the class.
            tasks: names of the outputs, in order.
            window_seconds: length of a time window. One window's rows should fit in memory, at
                some 20 bytes a row, and 130 while it is read. Batches should come in order of time.
            resolution: ``"bfloat16"`` rounds the outputs to 8 bits of mantissa (a relative error
                of at most 0.4 %), for a third of the bytes on disk; ``"float32"`` keeps them.
            embedding_width: E, the numbers of a teacher's embedding; 0: the store has none.
            embedding_resolution: ``"float16"``, or with a scale for each embedding ``"int8"`` or
                ``"int4"``. These take half and a quarter of the bytes, with an error of at most
                max abs(e) / 254 and max abs(e) / 14.
            storage_options: as for the class.
            checkpoints: as for the class.

        Raises:
            StoreError: if a store of another format exists, or the store can't be created.
            ValueError: for a wrong value.
        """
        if isinstance(tasks, str):
            raise ValueError(f"tasks should be a tuple of names; received {tasks!r}")
        names = tuple(tasks)
        wanted = StoreFormat(
            names, window_seconds, resolution, embedding_width, embedding_resolution
        )
        check_options(storage_options)
        url = normal_url(url)
        where = f"{url}/outputs"
        check_conditional_puts(where, storage_options)
        Table.create(f"{url}/snapshots", SNAPSHOTS, (), "snapshots of teachers", storage_options)
        Table.create(where, wanted.schema(), PARTITION, wanted.to_json(), storage_options)
        store = cls(url, storage_options=storage_options, checkpoints=checkpoints)
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
        tasks: Sequence[str] | None = None,
        shard: str | None = None,
        logged: bool = False,
        keys: Mapping[str, Any] | None = None,
        embeddings: Any = None,
        bad_rows: BadRows = "refuse",
    ) -> WriteReport:
        """Write a snapshot's outputs for n examples in one commit: all or nothing.

        Args:
            snapshot: the snapshot that computed the outputs.
            example_ids: (n,) whole numbers in [0, 2^63) without repeats, such as those of
                :func:`hash_ids`.
            outputs: (n, T), or (n,) for one task: logits of binary tasks (``torch.logit`` converts
                probabilities), predictions of regressions. Named columns (of a DataFrame, an Arrow
                table) are taken by the names of the tasks, in any order.
            event_seconds: (n,) event times of the examples: epoch seconds, or timestamps or dates
                of numpy, pandas, Arrow, Polars or ``datetime`` (in UTC where they have no time
                zone), rounded down to the second.
            tasks: the T tasks that the teacher knows; the store's other tasks get no output. None:
                all tasks of the store.
            shard: a name for this piece of work, unique within the snapshot. Writing it again with
                the same rows (ids and times; outputs up to rounding) adds only rows that were
                removed from the store since; keys and embeddings are not compared. None: a unique
                name.
            logged: whether the outputs come from the teacher's own training forward, before its
                update.
            keys: ``user_id``, ``item_id``, ``category_id``, each (n,) whole numbers; -2^63: none.
            embeddings: (n, E) floating point, for a store with an ``embedding_width``.
            bad_rows: what to do with rows that break a rule: ``"refuse"`` the whole write with an
                error, or ``"quarantine"``: leave the bad rows out and count them.

        Raises:
            TypeError: for a wrong type or dtype.
            ValueError: for a wrong shape; for embeddings that the store can't hold; for bad rows:
                negative or repeated ids, NaN or infinite outputs, event times out of range, and
                leaks (the snapshot was trained through the event time of the example or later, and
                the output was not logged); if the shard was written with other rows; for rows of
                more than 1,000 windows.
            StoreError: if the rows can't be written; then none is.
        """
        check_bad_rows(bad_rows)
        known_tasks = self.format.chosen(tasks)
        offered = self._as_rows(snapshot, example_ids, outputs, event_seconds, logged, known_tasks)
        key_columns = as_keys(keys, len(offered))
        optional = {name: pa.array(key, mask=key == NO_KEY) for name, key in key_columns.items()}
        if embeddings is not None:
            optional["embedding"] = self._encoded(len(offered), embeddings)
        columns = self._columns(snapshot.teacher, offered, optional)
        broken = broken_rules(offered, None, self.format.window_seconds)
        where = f"{self.url}: nothing was written"
        good, quarantined = sift(offered, broken, bad_rows, where, ValueError)
        rows = offered[good] if quarantined else offered
        windows = np.unique(self.window_of(rows.event_time // MICROSECONDS))
        if len(windows) > MAX_WINDOWS:
            raise ValueError(
                f"{where}: the rows should be of at most {MAX_WINDOWS} windows; received "
                f"{len(windows)}: write them in order of time, a part at a time, or create the "
                "store with a larger window_seconds"
            )
        if quarantined:
            columns = columns.filter(pa.array(good))
        notes = {"teacher": snapshot.teacher, "quarantined": json.dumps(quarantined)}
        _check_shard(shard)
        named = NamedRows(self.url, snapshot, shard, offered)
        transaction = named.transaction()
        stored = np.zeros(len(rows), dtype=np.bool_)

        def prepare() -> Commit | None:
            nonlocal stored
            stored = np.zeros(len(rows), dtype=np.bool_)
            # a unique name can't have been written before, and looking one up reads the log
            last = None if shard is None else self.table.transaction(transaction[0])
            if last is not None:
                if named.may_be_stored(last, transaction[1], self.table.files(), self.read_file):
                    parts = [self.read(snapshot.teacher, w, bad_rows="quarantine") for w in windows]
                    stored_rows = Rows.concatenate([part for part, _ in parts], len(self.tasks))
                    stored = named.find(rows, stored_rows, self.format.alike)
                if stored.all():
                    return None
            data = columns.filter(pa.array(~stored)) if stored.any() else columns
            data = data.take(pa.array(_order(data)))
            return Commit(
                lambda properties: self.table.append(data, properties),
                transaction,
                # `show` adds the notes up: rows that are left out again are not counted again
                notes if quarantined and last is None else {},
            )

        if self.table.commit("can't be written to, and nothing of this shard was", prepare) is None:
            return WriteReport(0, committed=False, stored_before=int(stored.sum()))
        before = int(stored.sum())
        return WriteReport(len(stored) - before, quarantined, stored_before=before)

    def advance_watermark(self, writer: str, before_seconds: int) -> None:
        """Record that a writer has written everything for events before a time.

        Readers of a stream need it: they can't tell a late output from one that never comes. A
        watermark never falls: a time before the last one changes nothing.

        Args:
            writer: a name that the readers know, such as a teacher's.
            before_seconds: event time, epoch seconds.

        Raises:
            TypeError: for a time of another type.
            ValueError: for a wrong value.
            StoreError: if it can't be written.
        """
        if not writer or not isinstance(writer, str):
            raise ValueError(f"the writer of a watermark should have a name; received {writer!r}")
        second = as_second("before_seconds", before_seconds)
        name = f"watermark/{writer}"

        def prepare() -> Commit | None:
            last = self.table.transaction(name)
            if last is not None and last >= second:
                return None
            # a commit needs an act: no rows are appended, the transaction holds the watermark
            no_rows = self.format.schema().empty_table()
            return Commit(lambda properties: self.table.append(no_rows, properties), (name, second))

        self.table.commit("the watermark can't be written", prepare)

    def watermark(self, writer: str) -> int | None:
        """Return a writer's watermark as of the commit that is read; None if it has none."""
        return self.table.transaction(f"watermark/{writer}")

    def refresh(self, version: int | None = None) -> int:
        """Read the newest commit of the store, or number ``version``; return its number."""
        if version is not None and not 0 <= as_int(version) < 2**63:
            raise ValueError(f"version should be the number of a commit; received {version!r}")
        self.table.refresh(version)
        return self.table.version

    def teachers(self) -> list[str]:
        """Return the names of teachers that have outputs."""
        return sorted({file.partition[0] for file in self.table.files()})

    def windows(self, teacher: str) -> list[int]:
        """Return the windows in which a teacher has outputs, in order of time."""
        return sorted(
            {file.partition[1] for file in self.table.files() if file.partition[0] == teacher}
        )

    def files(self, teacher: str, window: int) -> list[DataFile]:
        """Return the data files of a window."""
        return [file for file in self.table.files() if file.partition == (teacher, window)]

    def window_of(self, event_seconds: Ints) -> Ints:
        """Return the windows (n,) of event times (n,)."""
        return event_seconds // self.format.window_seconds

    def read(
        self,
        teacher: str,
        window: int,
        *,
        tasks: Sequence[str] | None = None,
        bad_rows: BadRows = "refuse",
        embeddings: bool = False,
        keys: Sequence[str] = (),
    ) -> tuple[Rows, dict[str, int]]:
        """Read all rows of a window as they were written; an example may have several.

        There are no rows if the store lacks the window or the teacher.

        Args:
            teacher: name of the teacher.
            window: one of :meth:`windows`.
            tasks: tasks whose outputs to read, in this order; None: all.
            bad_rows: what to do with rows that break a rule: ``"refuse"`` (an error that names the
                file and the rows), or ``"quarantine"``: leave them out.
            embeddings: whether to read the embeddings' bytes too, all 255 where a row has none.
            keys: which of ``user_id``, ``item_id`` and ``category_id`` to read, in this order;
                -2^63 where a row has none.

        Returns:
            The rows (the bits of a null output are all 1), and how many were left out, by the rule
            that they break.

        Raises:
            ValueError: for a wrong value.
            StoreError: if a file is missing, cut short, foreign, or holds bad rows.
        """
        check_bad_rows(bad_rows)
        check_key_names(keys)
        names = self.format.chosen(tasks)
        size = self.format.embedding_bytes if embeddings else 0
        files, parts = self.read_files(
            [teacher], window, lambda file: self.read_file(file, names, embeddings, keys)
        )
        left_out = Counter[str]()
        for number, (file, rows) in enumerate(zip(files, parts, strict=True)):
            broken = broken_rules(rows, window, self.format.window_seconds)
            where = f"{self.table.url}/{file.path}"
            good, quarantined = sift(rows, broken, bad_rows, where, StoreError)
            left_out.update(quarantined)
            parts[number] = rows[good] if quarantined else rows
        return Rows.concatenate(parts, len(names), size, len(keys)), dict(left_out)

    def read_files(
        self, teachers: Sequence[str], window: int, read: Callable[[DataFile], T]
    ) -> tuple[list[DataFile], list[T]]:
        """Read the data files of a window, one teacher after another; return files and results.

        Raises:
            StoreError: if a file is missing that the newest commit has too.
        """
        while True:
            files = [file for teacher in teachers for file in self.files(teacher, window)]
            try:
                return files, [read(file) for file in files]
            except MissingFileError:  # another job may have compacted the window and vacuumed
                self.refresh()
                if files == [file for name in teachers for file in self.files(name, window)]:
                    raise

    def read_file(
        self,
        file: DataFile,
        tasks: Sequence[str] | None = None,
        embeddings: bool = False,
        keys: Sequence[str] = (),
    ) -> Rows:
        """Read the rows of one of :meth:`files` without checking the rules."""
        check_key_names(keys)
        output_names = output_columns(self.format.chosen(tasks))
        left_out = {"outputs", "keys"} if embeddings else {"outputs", "keys", "embedding"}
        names = [field.name for field in fields(Rows) if field.name not in left_out]
        schema = self.format.schema()
        wanted = pa.schema([schema.field(name) for name in (*names, *output_names, *keys)])
        table = self.table.read(file, wanted)
        outputs = np.stack([_array(table, name) for name in output_names], axis=1)
        columns = {name: _array(table, name) for name in names}
        columns = {"embedding": outputs[:, :0].view(np.uint8), **columns}
        key_columns = np.empty((len(table), len(keys)), np.int64)
        for number, name in enumerate(keys):
            key_columns[:, number] = table[name].fill_null(NO_KEY).to_numpy()
        rows = Rows(outputs=outputs, keys=key_columns, **columns)
        # files are skipped by the log's bounds of snapshots: they must be right
        if file.snapshots is not None and len(rows):
            bounds = int(rows.snapshot.min()), int(rows.snapshot.max())
            if bounds != file.snapshots:
                raise StoreError(
                    f"{self.table.url}/{file.path}: its snapshots are from {bounds[0]} to "
                    f"{bounds[1]} and the table's log says {file.snapshots}: one of the two is "
                    "damaged; restore it from a copy"
                )
        return rows

    def _encoded(self, rows: int, embeddings: Any) -> pa.Array:
        kind = pa.binary(self.format.embedding_bytes)
        values = as_floats("embeddings", embeddings, (rows, self.format.embedding_width))
        data = encode(values, self.format.embedding_resolution)
        return pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(data)])

    def _as_rows(
        self,
        snapshot: Snapshot,
        example_ids: Any,
        outputs: Any,
        event_seconds: Any,
        logged: bool,
        tasks: tuple[str, ...],
    ) -> Rows:
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"snapshot should be a Snapshot; received {type(snapshot).__name__}")
        ids = as_int64("example_ids", example_ids)
        n = len(ids)
        seconds = as_epoch("event_seconds", event_seconds, n)
        name = f"outputs of {n} examples for the tasks {tasks}"
        values = self.format.round(as_floats(name, outputs, (n, len(tasks)), tasks))
        if (nan := np.isnan(values)).any():  # a NaN with the bits ABSENT would pass for null
            values = np.where(nan, np.float32(np.nan), values)
        if tasks != self.tasks:
            all_values = np.full((n, len(self.tasks)), ABSENT).view(np.float32)
            all_values[:, [self.tasks.index(task) for task in tasks]] = values
            values = all_values
        return Rows(
            example_id=ids,
            outputs=values,
            # clipped so that microseconds fit in int64, but wide enough to recognize milliseconds
            event_time=seconds.clip(-1, 1_000 * MAX_SECONDS) * MICROSECONDS,
            snapshot=np.full(n, snapshot.version),
            trained_through=np.full(n, snapshot.trained_through_seconds * MICROSECONDS),
            logged=np.full(n, bool(logged)),
            scored_at=np.full(n, int(time.time() * MICROSECONDS)),
            embedding=np.empty((n, 0), np.uint8),
            keys=np.empty((n, 0), np.int64),
        )

    def _columns(self, teacher: str, rows: Rows, optional: dict[str, Any]) -> pa.Table:
        columns = {
            **vars(rows),
            **{
                name: pa.array(values, mask=absent(values))
                for name, values in zip(self.format.outputs, rows.outputs.T, strict=True)
            },
            "teacher": pa.repeat(teacher, len(rows)),
            "window": self.window_of(rows.event_time // MICROSECONDS),
            **dict.fromkeys(OPTIONAL, pa.nulls(len(rows))),
            **optional,
        }
        schema = self.format.schema()
        return pa.table([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)


def _check_shard(shard: object) -> None:
    try:
        if shard is None or (isinstance(shard, str) and shard.encode()):
            return
    except UnicodeEncodeError:
        pass
    raise ValueError(f"shard should be a name, in text, or None; received {shard!r:.200}")


def _order(columns: pa.Table) -> Ints:
    """Return the order of rows by window and id; ids are unique, so no stable sort is needed."""
    windows, ids = _array(columns, "window"), _array(columns, "example_id")
    one_window = len(ids) and (windows == windows[0]).all()
    order: Ints = np.argsort(ids) if one_window else np.lexsort((ids, windows))
    return order


def _array(table: pa.Table, name: str) -> Any:
    """Return a column as numpy: timestamps as int64, bytes (n, W), null outputs as ``ABSENT``."""
    column = table[name].combine_chunks()
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_float32(column.type) and column.null_count:
        null = column.is_null().to_numpy(zero_copy_only=False)
        bits = column.fill_null(0).to_numpy().view(np.uint32)
        return np.where(null, ABSENT, bits).view(np.float32)
    if pa.types.is_fixed_size_binary(column.type):
        size = column.type.byte_width
        column = column.fill_null(MISSING * size)
        data = column.buffers()[1]
        return np.frombuffer(data or b"", np.uint8).reshape(-1, size)[column.offset :][
            : len(column)
        ]
    return column.to_numpy(zero_copy_only=False)
