"""What Delta Lake leaves to its users: to commit once, and to say which file is damaged."""

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
_ONE_FILE = 2**40  # bytes: the library's own limit, 100 MB, makes several


@dataclass(frozen=True)
class DataFile:
    """A data file of a table: its path within it, and what the log says of it.

    ``snapshots`` are the lowest and the highest version among its rows, None where it isn't said.
    """

    path: str
    size_bytes: int
    rows: int | None
    partition: tuple[Any, ...]
    snapshots: tuple[int, int] | None = None


@dataclass(frozen=True)
class Commit:
    """What is to be committed: an act that takes the library's properties for it.

    A commit with a ``transaction``, a name and a number, fails where one of that name is made at
    the same moment. ``notes`` are kept in the log.
    """

    act: Callable[[CommitProperties], Mapping[str, Any] | None]
    transaction: tuple[str, int] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class Table:
    """A Delta table at a URL, as of one version; :meth:`refresh` goes to the newest."""

    def __init__(
        self, url: str, partition: Sequence[str], storage_options: Mapping[str, str]
    ) -> None:
        self.url = url
        self.partition = tuple(partition)
        self.properties = WriterProperties()  # of the files that are written
        self._options = dict(storage_options)
        self._process = os.getpid()
        # what a commit is based on must not move while it is prepared, by another thread's refresh
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
        """Make an empty table; one that is there is left as it is."""
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
        """Number of the commit that is read."""
        return self.delta.version()

    def refresh(self, version: int | None = None) -> None:
        """Go to the newest version, or to ``version``."""
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
        """Make a commit once, and go to it; return what it gave, or the log says if that was lost.

        ``prepare`` gives the commit, as of the table's newest version; it is asked again where
        another writer was faster. None, there and in return: there is nothing to do. After an error
        nothing of the commit is there, unless the text says that this can't be seen.
        """
        check_process(self._process)
        with self._lock:
            for attempt in range(_ATTEMPTS):
                self.refresh()
                before = self.version
                commit = prepare()
                if self.version != before:  # what was read then is of two versions
                    continue
                if commit is None:
                    return None
                mark = uuid.uuid4().hex
                try:
                    with self._store_errors(failure):
                        return commit.act(_properties(commit, mark)) or {}
                except StoreError as error:
                    # it may be there all the same: its reply was lost, or what failed came after it
                    if (made := self._commit_since(before, mark)) is not None:
                        return made
                    if not isinstance(error, ConflictError) or attempt == _ATTEMPTS - 1:
                        raise
        raise StoreError(f"{self.url}: {failure}: other writers were faster {_ATTEMPTS} times")

    def append(self, data: pa.Table, properties: CommitProperties) -> None:
        """Write rows: the act of a commit."""
        names = list(self.partition)
        for values in data.select(names).group_by(names).aggregate([]).to_pylist() if names else ():
            self._folder.check_inside("/".join(f"{name}={values[name]}" for name in names))
        write_deltalake(
            self.delta,
            data,
            mode="append",
            # columns that another tool has added are null
            schema_mode="merge" if len(self.delta.schema().fields) > data.num_columns else None,
            writer_properties=self.properties,
            commit_properties=properties,
        )

    def transaction(self, name: str) -> int | None:
        """The number of the last transaction of a name in this version; None for none."""
        with self._reading_log():
            return self.delta.transaction_version(name)

    @property
    def removed(self) -> int:
        """The commit before the last one in which rows were deleted or given up; -1 for none."""
        last = self.transaction(_REMOVED)
        return -1 if last is None else last

    def delete(self, predicate: str) -> int:
        """Delete the rows that fit a predicate, in one commit, and return how many there were."""

        def act(properties: CommitProperties) -> Mapping[str, Any]:
            return self.delta.delete(
                predicate, writer_properties=self.properties, commit_properties=properties
            )

        self._folder.check_links()
        removal = self.commit("can't delete", lambda: Commit(act, (_REMOVED, self.version)))
        made = removal or {}
        return int(made.get("operationMetrics", made)["num_deleted_rows"])

    def compact(self, partition: tuple[Any, ...] = ()) -> None:
        """Make the files of a partition (or of a table without any) one, sorted by example id."""
        filters = [(c, "=", str(value)) for c, value in zip(self.partition, partition, strict=True)]

        def act(properties: CommitProperties) -> None:
            if filters:
                self.delta.optimize.z_order(
                    ["example_id"],
                    partition_filters=filters,
                    target_size=_ONE_FILE,
                    writer_properties=self.properties,
                    commit_properties=properties,
                )
            else:
                self.delta.optimize.compact(commit_properties=properties)

        self._folder.check_links()
        self.commit("can't compact", lambda: Commit(act))

    def repair(self) -> list[str]:
        """Give up the data files that are missing, and return their paths."""
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
        """Remove the files that left the table more than so many hours ago."""
        self._folder.check_links()
        with self._store_errors("can't remove files"):
            return self.delta.vacuum(hours, False, enforce)

    def files(self) -> list[DataFile]:
        """The data files of this version, all within the table's folder."""
        if self._listed is None or self._listed[0] != self.version:
            with self._reading_log():
                actions = pa.table(self.delta.get_add_actions(flatten=True)).to_pylist()
                partition = tuple(self.delta.metadata().partition_columns)
            if partition != self.partition:
                raise StoreError(
                    f"{self.url}: is partitioned by {partition}, not by {self.partition}: its rows "
                    "are not read; it is damaged, or of another program"
                )
            self._listed = self.version, [self._data_file(action) for action in actions]
        return self._listed[1]

    def _data_file(self, action: Mapping[str, Any]) -> DataFile:
        path = unquote(action["path"])  # the log has it percent-encoded
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|/", path) or ".." in path.split("/"):
            raise self._folder.refusal(action["path"])
        values = tuple(action[f"partition.{name}"] for name in self.partition)
        folders = [f"{name}={value}" for name, value in zip(self.partition, values, strict=True)]
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
        """The rows of a data file; a MissingFileError if it is not there."""
        where = f"{self.url}/{file.path}"
        self._folder.check_inside(file.path)
        with store_errors(where, "can't be read", self._options):
            if not self._folder.is_file(file.path):
                raise MissingFileError(
                    f"{where}: is missing, and the table's log has it; restore it, or give its "
                    "rows up with `python -m torchrec_exfm.das compact URL --repair` and write "
                    "them anew"
                )
            with self._folder.filesystem.open_input_file(file.path) as source:
                size = source.size()
                if size != file.size_bytes:
                    raise StoreError(
                        f"{where}: is of {size} bytes and the table's log says {file.size_bytes}: "
                        "it was cut short or replaced; restore it, or write its rows anew"
                    )
                rows = pq.ParquetFile(source).read(columns=columns.names, use_threads=False)
            if rows.schema.names != columns.names:
                absent = [name for name in columns.names if name not in rows.schema.names]
                raise StoreError(f"{where}: lacks the columns {absent}: it is not of this table")
            if file.rows is not None and rows.num_rows != file.rows:
                raise StoreError(
                    f"{where}: has {rows.num_rows} rows and the table's log says {file.rows}: it "
                    "was replaced; restore it, or write its rows anew"
                )
            if any(rows[column.name].null_count for column in columns if not column.nullable):
                raise StoreError(f"{where}: has nulls where none may be: it is not of this table")
            return rows.cast(columns)

    @functools.cached_property
    def log(self) -> Log:
        """The log of the table."""
        return Log(self._folder)

    def _check(self) -> None:
        """Check that the version that is read is of a protocol, and commits, that can be read."""
        protocol = self.delta.protocol()
        if protocol.min_reader_version > 1:
            raise StoreError(
                f"{self.url}: needs version {protocol.min_reader_version} of the Delta reader "
                f"protocol ({protocol.reader_features}), and this package reads version 1: rewrite "
                "it without column mapping and deletion vectors"
            )
        self.log.check(self.version)

    def _commit_since(self, version: int, mark: str) -> Mapping[str, Any] | None:
        """What the log says of the commit with a mark, if it was made after a version."""
        with self._store_errors(
            "it can't be seen whether the commit was made; look again when the store answers"
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
        """Name the file of the log that is damaged, if one is: the library names the table."""
        try:
            with self._store_errors(failure):
                yield
        except StoreError as error:
            damaged: list[str] = []
            with contextlib.suppress(StoreError):  # there may be no log at all
                damaged = [*self.log.damaged()]
            if not damaged:
                raise
            raise StoreError(f"{damaged[0]}; restore it from a copy") from error


def _properties(commit: Commit, mark: str) -> CommitProperties:
    notes, transactions = {**commit.notes, "mark": mark}, []
    if commit.transaction is not None:
        name, number = commit.transaction
        notes["transaction"] = f"{name}={number}"
        transactions.append(Transaction(name, number))
    return CommitProperties(custom_metadata=notes, app_transactions=transactions)
