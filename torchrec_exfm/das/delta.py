"""What Delta Lake leaves to its users: to commit once, and to say which file is damaged."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler

from torchrec_exfm.das.urls import normal_url

__all__ = ["Commit", "DataFile", "MissingFileError", "StoreError", "Table", "normal_url"]

_ATTEMPTS = 20
_ONE_FILE = 2**40  # bytes: the library's own limit, 100 MB, makes several
_ERRORS = (DeltaError, OSError, ValueError, pa.ArrowException)  # of reading what is damaged
_LOG = "_delta_log"
_CHECKPOINT = {"add": ("path", "partitionValues", "size", "stats"), "txn": ("appId", "version")}


class StoreError(RuntimeError):
    """Something in a store is damaged, missing, foreign or can't be written; the text names it."""


class MissingFileError(StoreError):
    """A file of the store is not there (any more)."""


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

    act: Callable[[CommitProperties], object]
    transaction: tuple[str, int] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class Table:
    """A Delta table at a URL, as of one version; :meth:`refresh` goes to the newest.

    Attributes:
        delta: the table of the deltalake library.
        properties: of the files that are written.

    Raises:
        StoreError: if there is none, or none that can be read.
    """

    def __init__(
        self,
        url: str,
        partition: Sequence[str] = (),
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        self.url = url
        self.partition = tuple(partition)
        self.properties = WriterProperties()
        self._options = dict(storage_options or {})
        self._process = os.getpid()
        self._listed: tuple[int, list[DataFile]] | None = None
        with self._reading_log("can't be opened"):
            try:
                self.delta = DeltaTable(url, storage_options=self._options)
            except TableNotFoundError:
                words = "there is no store; TeacherStore.create makes one"
                raise StoreError(f"{url}: {words}") from None
        summed_up = [named for named in self._log_files() if named[1].endswith(".parquet")]
        self._whole_through = summed_up[-1][0] if summed_up else -1  # no line is lost up to it
        self._first_whole = self._whole_through
        self._added: set[str] | None = set()  # by the commits after it; None: some were not read
        for version, path in summed_up:
            if version == self._whole_through:
                self._check_log_file(path)
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
        try:
            with telling(url, "can't be made", storage_options):
                DeltaTable.create(
                    url,
                    schema,
                    mode="ignore",
                    partition_by=list(partition),
                    description=description,
                    storage_options=dict(storage_options or {}),
                    commit_properties=CommitProperties(max_commit_retries=0),
                )
        except _ConflictError:  # another process was first
            return

    @property
    def version(self) -> int:
        """Number of the commit that is read."""
        return self.delta.version()

    def refresh(self, version: int | None = None) -> None:
        """Go to the newest version, or to ``version``."""
        with self._reading_log():
            if version is None:
                self.delta.update_incremental()
            elif version != self.version:
                self.delta.load_as_version(version)
        self._check()

    def commit(
        self, failure: str, prepare: Callable[[], Commit | None]
    ) -> Mapping[str, Any] | None:
        """Make a commit once, and go to it.

        Args:
            failure: what to say where it can't be made.
            prepare: gives the commit, as of the table's newest version; it is asked again where
                another writer was faster. None: there is nothing to do.

        Returns:
            What the log says of the commit; None if there was nothing to do.

        Raises:
            StoreError: if it can't be made; then nothing of it is there, unless the text says that
                this can't be seen.
        """
        for attempt in range(_ATTEMPTS):
            self.refresh()
            if (commit := prepare()) is None:
                return None
            before, mark = self.version, uuid.uuid4().hex
            try:
                with self._telling(failure):
                    commit.act(_properties(commit, mark))
            except StoreError as error:
                # it may be there all the same: its reply was lost, or what failed came after it
                made = self._commit_since(before, mark)
                conflict = isinstance(error, _ConflictError) and attempt < _ATTEMPTS - 1
                if made is None and not conflict:
                    raise
            else:
                made = self._commit_since(self.version - 1, mark) or {}
            if made is not None:
                return made
        raise AssertionError("unreachable")

    def append(self, data: pa.Table, properties: CommitProperties) -> None:
        """Write rows: the act of a commit."""
        names = list(self.partition)
        for values in data.select(names).group_by(names).aggregate([]).to_pylist() if names else ():
            self._check_inside("/".join(f"{name}={values[name]}" for name in names))
        write_deltalake(
            self.delta,
            data,
            mode="append",
            writer_properties=self.properties,
            commit_properties=properties,
        )

    def transaction(self, name: str) -> int | None:
        """The number of the last transaction of a name in this version; None for none."""
        with self._reading_log():
            return self.delta.transaction_version(name)

    def delete(self, predicate: str) -> int:
        """Delete the rows that fit a predicate, in one commit, and return how many there were."""

        def act(properties: CommitProperties) -> None:
            self.delta.delete(
                predicate, writer_properties=self.properties, commit_properties=properties
            )

        self._check_links()
        made = self.commit("can't delete", lambda: Commit(act)) or {}
        metrics = made.get("operationMetrics", {})  # where no row fits, the library commits nothing
        return int(metrics.get("num_deleted_rows", 0))

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

        self._check_links()
        self.commit("can't compact", lambda: Commit(act))

    def repair(self) -> list[str]:
        """Give up the data files that are missing, and return their paths."""
        missing: list[str] = []

        def act(properties: CommitProperties) -> None:
            missing.extend(self.delta.repair(commit_properties=properties)["files_removed"])

        self._check_links()
        self.commit("can't be repaired", lambda: Commit(act))
        return missing

    def vacuum(self, hours: int, *, enforce: bool) -> list[str]:
        """Remove the files that left the table more than so many hours ago."""
        self._check_links()
        with self._telling("can't remove files"):
            return self.delta.vacuum(hours, False, enforce)

    def files(self) -> list[DataFile]:
        """The data files of this version.

        Raises:
            StoreError: if the path of one leaves the table's folder, or the log contradicts itself.
        """
        if self._listed is None or self._listed[0] != self.version:
            with self._reading_log():
                actions = pa.table(self.delta.get_add_actions(flatten=True)).to_pydict()
                partition = tuple(self.delta.metadata().partition_columns)
            if partition != self.partition:
                raise StoreError(
                    f"{self.url}: is partitioned by {partition}, not by {self.partition}: its rows "
                    "are not read; it is damaged, or of another program"
                )
            files = [self._data_file(actions, row) for row in range(len(actions["path"]))]
            self._listed = self.version, files
        return self._listed[1]

    def _data_file(self, actions: Mapping[str, Sequence[Any]], row: int) -> DataFile:
        path = unquote(actions["path"][row])  # the log has it percent-encoded
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|/", path) or ".." in path.split("/"):
            raise self._refusal(actions["path"][row])
        values = tuple(actions[f"partition.{name}"][row] for name in self.partition)
        folders = [f"{name}={value}" for name, value in zip(self.partition, values, strict=True)]
        written = [unquote(folder) for folder in path.split("/")[: len(folders)]]
        if written[:1] and written[0].startswith(self.partition[0] + "=") and written != folders:
            raise StoreError(
                f"{self.url}/{path}: the log says that it is of {'/'.join(folders)}: the log is "
                "damaged; restore it"
            )
        lowest, highest = (actions.get(f"{end}.snapshot") for end in ("min", "max"))
        known = lowest and highest and lowest[row] is not None and highest[row] is not None
        return DataFile(
            path,
            actions["size_bytes"][row],
            actions["num_records"][row],
            values,
            (lowest[row], highest[row]) if lowest and highest and known else None,
        )

    def read(self, file: DataFile, columns: pa.Schema) -> pa.Table:
        """The rows of a data file.

        Raises:
            MissingFileError: if it is not there.
            StoreError: if it is cut short or is not a file of this table.
        """
        where = f"{self.url}/{file.path}"
        self._check_inside(file.path)
        with telling(where, "can't be read", self._options):
            if self._filesystem.get_file_info(file.path).type != pa_fs.FileType.File:
                raise MissingFileError(
                    f"{where}: is missing, and the table's log has it; restore it, or give its "
                    "rows up with `python -m torchrec_exfm.das compact URL --repair` and write "
                    "them anew"
                )
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
            if any(rows[column.name].null_count for column in columns if not column.nullable):
                raise StoreError(f"{where}: has nulls where none may be: it is not of this table")
            return rows.cast(columns)

    def damaged_log_files(self) -> Iterator[str]:
        """What is wrong with files of the log, each in words that name it."""
        for _, path in self._log_files():
            if words := self._damage(path):
                yield f"{self.url}/{path}: {words}"

    def _check(self) -> None:
        """Whether the version that is read is of a protocol, and of commits, that can be read."""
        protocol = self.delta.protocol()
        if protocol.min_reader_version > 1:
            raise StoreError(
                f"{self.url}: needs version {protocol.min_reader_version} of the Delta reader "
                f"protocol ({protocol.reader_features}), and this package reads version 1: rewrite "
                "it without column mapping and deletion vectors"
            )
        for version in range(self._whole_through + 1, self.version + 1):
            self._check_log_file(f"{_LOG}/{version:020}.json")
            self._whole_through = version

    def _check_log_file(self, path: str) -> None:
        if words := self._damage(path, follow=True):
            raise StoreError(f"{self.url}/{path}: {words}; restore it from a copy")

    def _damage(self, path: str, *, follow: bool = False) -> str | None:
        """What is wrong with a file of the log, in words; None if nothing is, or it is gone.

        To ``follow`` the commits, in order, is to see that they remove what was there; the rows of
        a checkpoint are not read then.
        """
        self._check_inside(path)
        try:
            with telling("its text", "can't be read", self._options):
                try:
                    source = self._filesystem.open_input_file(path)
                except FileNotFoundError:  # cleaned up since it was listed
                    self._added = None if follow else self._added
                    return None
                with source:
                    if path.endswith(".parquet"):
                        return _lost_columns(source) or (None if follow else _lost_actions(source))
                    text = source.read()
                return lost_lines(text) or (self._follow(text) if follow else None)
        except StoreError as error:
            return str(error)

    def _follow(self, text: bytes) -> str | None:
        """Whether a commit removes a file that was never there: then another's rows come back."""
        if self._added is None:
            return None
        actions = [json.loads(line) for line in text.splitlines()]
        unknown = {unquote(action["remove"]["path"]) for action in actions if "remove" in action}
        unknown -= self._added
        if unknown and (before := self._added_before) is not None and (unknown := unknown - before):
            return f"removes {min(unknown)!r}, which was not there: it is damaged"
        self._added.update(unquote(action["add"]["path"]) for action in actions if "add" in action)
        return None

    @functools.cached_property
    def _added_before(self) -> set[str] | None:
        """The files of the checkpoint that the table was opened with; None if it is gone."""
        if self._first_whole < 0:
            return set()
        try:
            table = DeltaTable(self.url, self._first_whole, storage_options=self._options)
        except DeltaError:
            return None
        return {unquote(path) for path in pa.table(table.get_add_actions())["path"].to_pylist()}

    def _log_files(self) -> list[tuple[int, str]]:
        """The commits and checkpoints of the log: their versions and paths."""
        self._check_inside(_LOG)
        with self._telling("its log can't be listed"):
            infos = self._filesystem.get_file_info(pa_fs.FileSelector(_LOG))
        named = [(re.match(r"(\d{20})(\.json|\..*parquet)$", i.base_name), i) for i in infos]
        return sorted((int(match[1]), f"{_LOG}/{info.base_name}") for match, info in named if match)

    def _commit_since(self, version: int, mark: str) -> Mapping[str, Any] | None:
        """What the log says of the commit with a mark, if it was made after a version."""
        what = "it can't be seen whether the commit was made; look again when the store answers"
        with self._telling(what):
            self.delta.update_incremental()
            newer = self.version - version
            for info in self.delta.history(newer) if newer else ():
                if info.get("mark") == mark:
                    return info
        return None

    def _check_inside(self, path: str) -> None:
        """Whether a path of the table leads out of it, by a link."""
        if "://" not in self.url:
            root, target = os.path.realpath(self.url), os.path.realpath(f"{self.url}/{path}")
            if not target.startswith(root + os.sep):
                raise self._refusal(path)
            if os.path.exists(target) and not (os.path.isfile(target) or os.path.isdir(target)):
                raise StoreError(f"{self.url}/{path}: is no regular file: it is not of this table")

    def _check_links(self) -> None:
        """Whether any link in the table's folder leads out of it: the library follows them."""
        for folder, folders, files in os.walk(self.url):  # of a URL, nothing
            for name in folders + files:
                path = os.path.join(folder, name)
                if os.path.islink(path):
                    self._check_inside(os.path.relpath(path, self.url))

    def _refusal(self, path: str) -> StoreError:
        return StoreError(
            f"{self.url}: the file {path!r} is refused: it is not in the table's folder"
        )

    @functools.cached_property
    def _filesystem(self) -> pa_fs.FileSystem:
        if "://" not in self.url:
            return pa_fs.SubTreeFileSystem(self.url, pa_fs.LocalFileSystem())
        return pa_fs.PyFileSystem(DeltaStorageHandler(self.url, self._options))

    @contextlib.contextmanager
    def _telling(self, failure: str) -> Iterator[None]:
        check_process(self._process)
        with telling(self.url, failure, self._options):
            yield

    @contextlib.contextmanager
    def _reading_log(self, failure: str = "its log can't be read") -> Iterator[None]:
        """Name the file of the log that is damaged, if one is: the library names the table."""
        try:
            with self._telling(failure):
                yield
        except StoreError as error:
            damaged = []
            with contextlib.suppress(StoreError):  # there may be no log at all
                damaged = [*self.damaged_log_files()]
            if not damaged or isinstance(error, _ConflictError):
                raise
            raise StoreError(f"{damaged[0]}; restore it from a copy") from error


class _ConflictError(StoreError):
    """Another writer was first."""


def check_process(process: int) -> None:
    """A StoreError in a process that was forked from the one given.

    The library's threads, and those of a look-up, are not there after a fork: it would panic, and
    who waits for them would wait for ever.
    """
    if os.getpid() != process:
        raise StoreError(
            f"a store opened in process {process} should be used there; received a use in process "
            f"{os.getpid()}, which was forked from it: start workers with "
            "multiprocessing_context='spawn' or 'forkserver' (of a DataLoader): stores and "
            "look-ups travel there by their URLs"
        )


@contextlib.contextmanager
def telling(
    where: str, failure: str, storage_options: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Raise the libraries' errors as a StoreError: what could not be done, where, and why."""
    try:
        yield
    except BaseException as error:
        # what panics in the library is no Exception, and would end threads without a word
        if not isinstance(error, _ERRORS) and type(error).__name__ != "PanicException":
            raise
        kind = _ConflictError if isinstance(error, CommitFailedError) else StoreError
        raise kind(f"{where}: {failure} ({_one_line(error)})") from error


def lost_lines(text: bytes) -> str | None:
    """What a commit lacks of what it says of itself, in words; None for nothing that is known."""
    try:
        return _lost_lines([json.loads(line) for line in text.splitlines()])
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        return f"is no commit: {_one_line(error)}"


def _lost_lines(actions: list[dict[str, Any]]) -> str | None:
    if not actions:
        return "is an empty commit: its lines were lost"
    if not all(isinstance(action, dict) for action in actions):
        return "is no commit: its lines should be JSON objects"
    infos = [action["commitInfo"] for action in actions if "commitInfo" in action]
    info: dict[str, Any] = infos[0] if infos else {}
    metrics = info.get("operationMetrics", {})
    adds = [action["add"] for action in actions if "add" in action]
    stats = [json.loads(add.get("stats") or "{}") for add in adds]
    transactions = [action["txn"] for action in actions if "txn" in action]
    there = {
        "num_added_files": len(adds),
        "numFilesAdded": len(adds),
        "num_removed_files": sum("remove" in action for action in actions),
        "numFilesRemoved": sum("remove" in action for action in actions),
    }
    for each in stats:
        if each and not _is_whole(each):
            return f"has statistics of a file that are damaged: {json.dumps(each)[:500]}"
    if all("numRecords" in each for each in stats):
        there["num_added_rows"] = sum(each["numRecords"] for each in stats)
    for name, count in there.items():
        if metrics.get(name, count) != count:
            return f"says {name} of itself is {metrics[name]}, and has {count}: lines were lost"
    noted = info.get("transaction")
    if noted not in (None, *(f"{each['appId']}={each['version']}" for each in transactions)):
        return f"says it is of the transaction {noted!r}, and has {transactions}: lines were lost"
    return None


def _is_whole(stats: Mapping[str, Any]) -> bool:
    """Whether statistics have all their parts, and each part its columns: writers give them all."""
    lowest, highest, nulls = (
        stats.get(part, {}).keys() for part in ("minValues", "maxValues", "nullCount")
    )
    return "numRecords" in stats and lowest == highest and lowest <= nulls


def _lost_columns(source: pa.NativeFile) -> str | None:
    """What a checkpoint lacks, by whose absence files or transactions would not be known."""
    schema = pq.ParquetFile(source).schema_arrow
    for name, parts in _CHECKPOINT.items():
        kind = schema.field(name).type if name in schema.names else None
        there = [field.name for field in kind] if isinstance(kind, pa.StructType) else []
        if missing := [part for part in parts if part not in there]:
            return f"lacks the column {name}.{missing[0]}: it is no checkpoint"
    return None


def _lost_actions(source: pa.NativeFile) -> str | None:
    pq.ParquetFile(source).read()
    return None


def _properties(commit: Commit, mark: str) -> CommitProperties:
    notes, transactions = {**commit.notes, "mark": mark}, []
    if commit.transaction is not None:
        name, number = commit.transaction
        notes["transaction"] = f"{name}={number}"
        transactions.append(Transaction(name, number))
    return CommitProperties(custom_metadata=notes, app_transactions=transactions)


def _one_line(error: BaseException) -> str:
    """The error on one line: of an object store's, the causes that its other lines tell."""
    text = re.sub(r"\x1b\[[0-9;]*m|↳", "", str(error)) or type(error).__name__
    text = text.split("stack backtrace:")[0]
    return ": ".join(filter(None, map(str.strip, text.splitlines())))[:500]
