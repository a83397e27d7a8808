"""A Delta table with commits that happen once and errors that name the damaged file."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import TableNotFoundError

from torchrec_exfm.das.errors import (
    ConflictError,
    MissingFileError,
    StoreError,
    check_process,
    store_errors,
)
from torchrec_exfm.das.folder import Folder
from torchrec_exfm.das.log import Log

_ATTEMPTS = 20
_REMOVED = "removed"  # the transaction of commits that remove rows
_TARGET_BYTES = 2**40  # of a compacted file; the library's default, 100 MB, makes several


@dataclass(frozen=True)
class DataFile:
    """A data file of a table, as the log describes it; its path is relative to the table.

    ``snapshots`` are the lowest and highest version among its rows, None if the log has neither.
    """

    path: str
    size_bytes: int
    rows: int | None
    partition: tuple[Any, ...]
    snapshots: tuple[int, int] | None = None


@dataclass(frozen=True)
class Commit:
    """A commit to make: ``act`` calls the library, with the properties that it is given.

    A commit with a ``transaction`` (name, number) fails if another writer commits one of that name
    at the same time. ``notes`` are kept in the log.
    """

    act: Callable[[CommitProperties], Mapping[str, Any] | None]
    transaction: tuple[str, int] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class Table:
    """A Delta table at a URL, read as of one version; :meth:`refresh` moves to the newest."""

    def __init__(
        self, url: str, partition: Sequence[str], storage_options: Mapping[str, str]
    ) -> None:
        self.url = url
        self.partition = tuple(partition)
        self.properties = WriterProperties()  # for the files that are written
        self._options = dict(storage_options)
        self._process = os.getpid()
        # another thread's refresh must not move the version that a commit is being prepared for
        self._lock = threading.RLock()
        self._listed: tuple[int, list[DataFile]] | None = None
        self._folder = Folder(url, self._options)
        with self._reading_log("can't be opened"):
            try:
                self.delta = DeltaTable(url, storage_options=self._options)
            except TableNotFoundError:
                raise StoreError(
                    f"{url}: there is no store; TeacherStore.create makes one"
                ) from None
        self._check()

    @staticmethod
    def create(
        url: str,
        schema: pa.Schema,
        partition: Sequence[str],
        description: str,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        """Create an empty table; leave an existing one as it is."""
        # another process may create it at the same time: then its table is as good
        another_was_first = contextlib.suppress(ConflictError)
        with another_was_first, store_errors(url, "can't be made", storage_options):
            DeltaTable.create(
                url,
                schema,
                mode="ignore",
                partition_by=list(partition),
                description=description,
                storage_options=dict(storage_options or {}),
                commit_properties=CommitProperties(max_commit_retries=0),
            )

    @property
    def version(self) -> int:
        """The number of the commit that is read."""
        return self.delta.version()

    def refresh(self, version: int | None = None) -> None:
        """Read the newest commit of the table, or ``version``."""
        check_process(self._process)
        with self._lock:
            with self._reading_log():
                if version is None:
                    self.delta.update_incremental()
                elif version != self.version:
                    self.delta.load_as_version(version)
            self._check()

    def commit(
        self, failure: str, prepare: Callable[[], Commit | None]
    ) -> Mapping[str, Any] | None:
        """Commit exactly once and move to that version; return what the act returned.

        ``prepare`` returns the commit for the table's newest version, or None, which is then
        returned, if there is nothing to do. It is called again if another writer was faster. If the
        store's reply was lost, the commit's entry in the log is returned. After an error nothing
        was committed, unless the message says that this is unknown.
        """
        check_process(self._process)
        with self._lock:
            for attempt in range(_ATTEMPTS):
                self.refresh()
                before = self.version
                commit = prepare()
                if self.version != before:  # `prepare` refreshed: it has read two versions
                    continue
                if commit is None:
                    return None
                mark = uuid.uuid4().hex
                try:
                    with self._store_errors(failure):
                        return commit.act(_properties(commit, mark)) or {}
                except StoreError as error:
                    # The commit may exist all the same: its reply was lost, or what failed came
                    # after it. A mark in the log tells, as a second try would write rows twice.
                    if (entry := self._commit_since(before, mark)) is not None:
                        return entry
                    if not isinstance(error, ConflictError) or attempt == _ATTEMPTS - 1:
                        raise
        raise StoreError(f"{self.url}: {failure}: other writers were faster {_ATTEMPTS} times")

    def append(self, data: pa.Table, properties: CommitProperties) -> None:
        """Write rows, as the act of a commit."""
        names = list(self.partition)
        # a partition's folder may be a link out of the table, which the library would follow
        for values in data.select(names).group_by(names).aggregate([]).to_pylist() if names else ():
            self._folder.check_inside("/".join(f"{name}={values[name]}" for name in names))
        write_deltalake(
            self.delta,
            data,
            mode="append",
            # columns that another tool added become null
            schema_mode="merge" if len(self.delta.schema().fields) > data.num_columns else None,
            writer_properties=self.properties,
            commit_properties=properties,
        )

    def transaction(self, name: str) -> int | None:
        """Return the number of the last transaction of a name in this version, or None."""
        with self._reading_log():
            return self.delta.transaction_version(name)

    @property
    def removed(self) -> int:
        """The version before the last commit that deleted or dropped rows; -1 for none."""
        last = self.transaction(_REMOVED)
        return -1 if last is None else last

    def delete(self, predicate: str) -> int:
        """Delete the rows that match a predicate, in one commit; return how many they were."""

        def act(properties: CommitProperties) -> Mapping[str, Any]:
            return self.delta.delete(
                predicate, writer_properties=self.properties, commit_properties=properties
            )

        self._folder.check_links()
        removal = self.commit("can't delete", lambda: Commit(act, (_REMOVED, self.version))) or {}
        # an entry of the log has the metrics one level below those of a reply
        return int(removal.get("operationMetrics", removal)["num_deleted_rows"])

    def compact(self, partition: tuple[Any, ...] = ()) -> None:
        """Merge the files of a partition, sorted by example id, or those of an unpartitioned table.

        ``partition`` holds the values of its columns.
        """
        filters = [(c, "=", str(value)) for c, value in zip(self.partition, partition, strict=True)]

        def act(properties: CommitProperties) -> None:
            if filters:
                self.delta.optimize.z_order(
                    ["example_id"],
                    partition_filters=filters,
                    target_size=_TARGET_BYTES,
                    writer_properties=self.properties,
                    commit_properties=properties,
                )
            else:
                self.delta.optimize.compact(commit_properties=properties)

        self._folder.check_links()
        self.commit("can't compact", lambda: Commit(act))

    def repair(self) -> list[str]:
        """Drop the data files that are missing from the log; return their paths."""
        paths: set[str] = set()

        def prepare() -> Commit:
            paths.clear()
            paths.update(file.path for file in self.files())
            return Commit(
                lambda properties: self.delta.repair(commit_properties=properties),
                (_REMOVED, self.version),
            )

        self._folder.check_links()
        self.commit("can't be repaired", prepare)
        return sorted(paths.difference(file.path for file in self.files()))

    def vacuum(self, hours: int, *, enforce: bool) -> list[str]:
        """Remove the files that left the table more than ``hours`` ago; return their paths."""
        self._folder.check_links()
        with self._store_errors("can't remove files"):
            return self.delta.vacuum(hours, False, enforce)

    def files(self) -> list[DataFile]:
        """Return the data files of this version, all of them inside the table's folder."""
        if self._listed is None or self._listed[0] != self.version:
            with self._reading_log():
                actions = pa.table(self.delta.get_add_actions(flatten=True)).to_pylist()
                partition = tuple(self.delta.metadata().partition_columns)
            if partition != self.partition:
                raise StoreError(
                    f"{self.url}: is partitioned by {partition}, not by {self.partition}: its rows "
                    "are not read; it is damaged, or another program's"
                )
            self._listed = self.version, [self._data_file(action) for action in actions]
        return self._listed[1]

    def _data_file(self, action: Mapping[str, Any]) -> DataFile:
        path = unquote(action["path"])  # the log has it percent-encoded
        # the protocol allows absolute paths and URLs, which could name any file of the machine
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|/", path) or ".." in path.split("/"):
            raise self._folder.refusal(action["path"])
        values = tuple(action[f"partition.{name}"] for name in self.partition)
        folders = [f"{name}={value}" for name, value in zip(self.partition, values, strict=True)]
        # a window's outputs must not be read as another's: the path is checked against the values
        written = [unquote(folder) for folder in path.split("/")[: len(folders)]]
        if written[:1] and written[0].startswith(self.partition[0] + "=") and written != folders:
            raise StoreError(
                f"{self.url}/{path}: the log says that it is of {'/'.join(folders)}: the log is "
                "damaged; restore it"
            )
        bounds: tuple[Any, Any] = action.get("min.snapshot"), action.get("max.snapshot")
        snapshots = None if None in bounds else bounds
        return DataFile(path, action["size_bytes"], action["num_records"], values, snapshots)

    def read(self, file: DataFile, columns: pa.Schema) -> pa.Table:
        """Return the rows of a data file; a MissingFileError if it does not exist."""
        where = f"{self.url}/{file.path}"
        self._folder.check_inside(file.path)
        with store_errors(where, "can't be read", self._options):
            if not self._folder.is_file(file.path):
                raise MissingFileError(
                    f"{where}: is missing, and the table's log has it; restore it, or drop its "
                    "rows with `python -m torchrec_exfm.das compact URL --repair` and write them "
                    "again"
                )
            with self._folder.filesystem.open_input_file(file.path) as source:
                size = source.size()
                if size != file.size_bytes:
                    raise StoreError(
                        f"{where}: has {size} bytes and the table's log says {file.size_bytes}: it "
                        "was cut short or replaced; restore it, or write its rows again"
                    )
                rows = pq.ParquetFile(source).read(columns=columns.names, use_threads=False)
            if rows.schema.names != columns.names:
                missing = [name for name in columns.names if name not in rows.schema.names]
                raise StoreError(f"{where}: lacks the columns {missing}: it is not of this table")
            if file.rows is not None and rows.num_rows != file.rows:
                raise StoreError(
                    f"{where}: has {rows.num_rows} rows and the table's log says {file.rows}: it "
                    "was replaced; restore it, or write its rows again"
                )
            if any(rows[column.name].null_count for column in columns if not column.nullable):
                raise StoreError(f"{where}: has nulls where none may be: it is not of this table")
            return rows.cast(columns)

    @functools.cached_property
    def log(self) -> Log:
        """The log of the table."""
        return Log(self._folder)

    def _check(self) -> None:
        """Raise a StoreError unless this version's protocol and commits can be read."""
        protocol = self.delta.protocol()
        if protocol.min_reader_version > 1:
            raise StoreError(
                f"{self.url}: needs version {protocol.min_reader_version} of the Delta reader "
                f"protocol ({protocol.reader_features}), and this package reads version 1: rewrite "
                "it without column mapping and deletion vectors"
            )
        self.log.check(self.version)

    def _commit_since(self, version: int, mark: str) -> Mapping[str, Any] | None:
        """Return the log's entry of the commit with a mark, if it was made after a version."""
        with self._store_errors(
            "it is unknown whether the commit was made; check again when the store answers"
        ):
            self.delta.update_incremental()
            newer = self.version - version
            for info in self.delta.history(newer) if newer else ():
                if info.get("mark") == mark:
                    return info
        return None

    @contextlib.contextmanager
    def _store_errors(self, failure: str) -> Iterator[None]:
        check_process(self._process)
        with store_errors(self.url, failure, self._options):
            yield

    @contextlib.contextmanager
    def _reading_log(self, failure: str = "its log can't be read") -> Iterator[None]:
        """Convert errors of reading the log; name its damaged file, as the library does not."""
        try:
            with self._store_errors(failure):
                yield
        except StoreError as error:
            damaged: list[str] = []
            with contextlib.suppress(StoreError):  # the log may be missing: then raise `error`
                damaged = [*self.log.damaged()]
            if not damaged:
                raise
            raise StoreError(f"{damaged[0]}; restore it from a copy") from error


def _properties(commit: Commit, mark: str) -> CommitProperties:
    """Return the library's properties of a commit, with a mark to find it by in the log."""
    notes, transactions = {**commit.notes, "mark": mark}, []
    if commit.transaction is not None:
        name, number = commit.transaction
        notes["transaction"] = f"{name}={number}"
        transactions.append(Transaction(name, number))
    return CommitProperties(custom_metadata=notes, app_transactions=transactions)
