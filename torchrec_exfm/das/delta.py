"""What Delta Lake leaves to its users: to commit once, and to say which file is damaged."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler

from torchrec_exfm.das.redaction import told
from torchrec_exfm.das.urls import normal_url

__all__ = ["DataFile", "MissingFileError", "StoreError", "Table", "normal_url"]

_ATTEMPTS = 20
_ONE_FILE = 2**40  # bytes: the library's own limit, 100 MB, makes several
_ERRORS = (DeltaError, OSError, ValueError, pa.ArrowException)  # of reading what is damaged


class StoreError(RuntimeError):
    """Something in a store is damaged, missing, foreign or can't be written; the text names it."""


class MissingFileError(StoreError):
    """A file of the store is not there (any more)."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a table: path within it, bytes, rows, and its values of the partition."""

    path: str
    size_bytes: int
    rows: int | None
    partition: tuple[Any, ...]


class Table:
    """A Delta table at a URL, as of one version; :meth:`refresh` goes to the newest.

    Attributes:
        delta: the table of the deltalake library.
        properties: of the files that are written.

    Raises:
        StoreError: if there is none, or none that can be read.
    """

    def __init__(self, url: str, storage_options: Mapping[str, str] | None = None) -> None:
        self.url = url
        self._options = dict(storage_options or {})
        self.delta = self._load()
        self.properties = WriterProperties()
        self._newest: DeltaTable | None = None  # to write to, whichever version is read
        self._listed: tuple[int, list[DataFile]] | None = None

    @staticmethod
    def create(
        url: str,
        schema: pa.Schema,
        partition: Sequence[str],
        description: str,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        """Make an empty table; one that is there is left as it is."""
        options = dict(storage_options or {})
        try:
            DeltaTable.create(
                url,
                schema,
                mode="ignore",
                partition_by=list(partition),
                description=description,
                storage_options=options,
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except CommitFailedError:  # another process was first
            return
        except (DeltaError, OSError) as error:
            text, cause = told(error, options)
            raise StoreError(f"{url}: can't be made ({text})") from cause

    @property
    def version(self) -> int:
        """Number of the commit that is read."""
        return self.delta.version()

    def refresh(self, version: int | None = None) -> None:
        """Go to the newest version, or to ``version``."""
        self._bring_to(self.delta, version)

    def append(
        self,
        data: pa.Table,
        transaction: tuple[str, int],
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """Commit rows, all or none, once for all calls with the same transaction.

        Of a transaction's name there may be a commit for each number, rising; ``metadata`` is kept
        in the log beside it.

        Returns:
            Whether the rows were committed by this call; False: they were there.

        Raises:
            StoreError: if they can't be written; then none of them is there.
        """
        name, number = transaction
        commit = CommitProperties(
            custom_metadata=dict(metadata or {}), app_transactions=[Transaction(name, number)]
        )
        for _ in range(_ATTEMPTS):
            if self._newest is None:
                self._newest = self._load()
            self._bring_to(self._newest)
            last = self._newest.transaction_version(name)
            if last is not None and last >= number:
                return False
            try:
                write_deltalake(
                    self._newest,
                    data,
                    mode="append",
                    writer_properties=self.properties,
                    commit_properties=commit,
                )
                return True
            except _ERRORS as error:
                failure = error
            if not isinstance(failure, CommitFailedError):  # else another writer was first
                if self._load().transaction_version(name) == number:
                    return True  # what failed came after the commit: to sum up the log
                break
        text, cause = told(failure, self._options)
        raise StoreError(
            f"{self.url}: can't be written to, and nothing of this shard was "
            f"({text}); mend the cause and write it again"
        ) from cause

    def transaction(self, name: str) -> int | None:
        """The highest number of the transactions of a name in this version; None for none."""
        return self.delta.transaction_version(name)

    def delete(self, predicate: str) -> None:
        """Delete the rows that fit a predicate, in one commit; files of the rest are rewritten."""
        self.refresh()
        try:
            self.delta.delete(predicate, writer_properties=self.properties)
        except (DeltaError, OSError) as error:
            text, cause = told(error, self._options)
            raise StoreError(f"{self.url}: can't delete ({text})") from cause

    def compact(self, partition: tuple[Any, ...] = ()) -> None:
        """Make the files of a partition (or of a table without any) one, sorted by example id."""
        columns = self.delta.metadata().partition_columns
        filters = [(c, "=", str(value)) for c, value in zip(columns, partition, strict=True)]
        self.refresh()
        try:
            if filters:
                self.delta.optimize.z_order(
                    ["example_id"],
                    partition_filters=filters,
                    target_size=_ONE_FILE,
                    writer_properties=self.properties,
                )
            else:
                self.delta.optimize.compact()
        except (DeltaError, OSError) as error:
            text, cause = told(error, self._options)
            raise StoreError(f"{self.url}: can't compact ({text})") from cause

    def files(self) -> list[DataFile]:
        """The data files of this version.

        Raises:
            StoreError: if the path of one leaves the table's folder.
        """
        if self._listed is None or self._listed[0] != self.version:
            actions = pa.table(self.delta.get_add_actions(flatten=True)).to_pydict()
            partition = [f"partition.{name}" for name in self.delta.metadata().partition_columns]
            columns = ["path", "size_bytes", "num_records", *partition]
            files = [
                DataFile(path, size_bytes, rows, tuple(values))
                for path, size_bytes, rows, *values in zip(
                    *(actions[name] for name in columns), strict=True
                )
            ]
            for path in actions["path"]:
                if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|/", path) or ".." in path.split("/"):
                    raise self._leaves(path)
            self._listed = self.version, files
        return self._listed[1]

    def read(self, file: DataFile, columns: pa.Schema) -> pa.Table:
        """The rows of a data file.

        Raises:
            MissingFileError: if it is not there.
            StoreError: if it is cut short or is not a file of this table.
        """
        where = f"{self.url}/{file.path}"
        if "://" not in self.url:  # where a link may lead out of the table
            root = os.path.realpath(self.url)
            if not os.path.realpath(where).startswith(root + os.sep):
                raise self._leaves(file.path)
        try:
            with self._filesystem.open_input_file(file.path) as source:
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
            if any(rows[field.name].null_count for field in columns if not field.nullable):
                raise StoreError(f"{where}: has nulls where none may be: it is not of this table")
            return rows.cast(columns)
        except FileNotFoundError as error:
            raise MissingFileError(
                f"{where}: is missing, and the table's log has it; restore it, or give its rows up "
                "with `python -m torchrec_exfm.das compact URL --repair` and write them anew"
            ) from told(error, self._options)[1]
        except _ERRORS as error:
            text, cause = told(error, self._options)
            raise StoreError(f"{where}: can't be read ({text})") from cause

    def _bring_to(self, table: DeltaTable, version: int | None = None) -> None:
        """Bring an open table to a version, or the newest."""
        try:
            if version is None:
                table.update_incremental()
            elif version != table.version():
                table.load_as_version(version)
        except _ERRORS as error:
            text, cause = told(error, self._options)
            raise StoreError(f"{self.url}: its log can't be read ({text})") from cause
        self._check_protocol(table)

    def _load(self) -> DeltaTable:
        try:
            table = DeltaTable(self.url, storage_options=self._options)
        except TableNotFoundError as error:
            raise StoreError(
                f"{self.url}: there is no store; TeacherStore.create makes one"
            ) from told(error, self._options)[1]
        except _ERRORS as error:
            text, cause = told(error, self._options)
            raise StoreError(f"{self.url}: can't be opened ({text})") from cause
        self._check_protocol(table)
        return table

    def _check_protocol(self, table: DeltaTable) -> None:
        protocol = table.protocol()
        if protocol.min_reader_version > 1:
            raise StoreError(
                f"{self.url}: needs version {protocol.min_reader_version} of the Delta reader "
                f"protocol ({protocol.reader_features}), and this package reads version 1: rewrite "
                "it without column mapping and deletion vectors"
            )

    def _leaves(self, path: str) -> StoreError:
        return StoreError(
            f"{self.url}: the file {path!r} is refused: it is not in the table's folder"
        )

    @functools.cached_property
    def _filesystem(self) -> pa_fs.FileSystem:
        return pa_fs.PyFileSystem(DeltaStorageHandler(self.url, self._options))
