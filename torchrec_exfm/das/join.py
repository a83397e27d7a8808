"""The join of training examples with the store, by engines that exist: outputs become columns.

:func:`join_sql` makes one text for DuckDB and Spark, and with it the command
``python -m torchrec_exfm.das join`` joins files on DuckDB.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from torchrec_exfm.das.arrays import MAX_SECONDS, as_int, as_int64, as_seconds, check_duration
from torchrec_exfm.das.errors import MissingFileError, StoreError
from torchrec_exfm.das.lookup import _check_names, _versions
from torchrec_exfm.das.rules import BadRows, check_bad_rows
from torchrec_exfm.das.schema import KEYS
from torchrec_exfm.das.store import TeacherStore

__all__ = ["JoinReport", "data_files", "join_files", "join_sql"]

_WINNERS = "_winners"  # the name of a table in the text
_LARGEST = 3.4028234663852886e38  # of float32; NaN is larger to both engines
_NOTE = b"torchrec_exfm.join"
_ORDER = "example_number"


def join_sql(
    store: TeacherStore,
    teachers: str | Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    snapshot: int | Mapping[str, int] | None = None,
    exclude: Collection[int] | Mapping[str, Collection[int]] = (),
    max_age_seconds: float | None = None,
    embeddings: bool = False,
    examples: str = "examples",
    outputs: str = "outputs",
    example_id: str = "example_id",
    event_seconds: str = "event_seconds",
    event_time: str | None = None,
) -> str:
    """One SELECT, for DuckDB 2 and Spark 3.5 or newer: examples with what teachers said of them.

    Rows are found as :class:`TeacherLookup` finds them: in the window of the example's own time,
    those that break no rule of the store, and of several the newest snapshot's, then what was
    logged in training, then what was scored last. Columns: those of the examples, then of each
    teacher ``TEACHER_TASK`` for each task, ``TEACHER_snapshot`` (the version that said it),
    ``TEACHER_age_seconds`` (event time - trained-through; 0 for what was logged) and
    ``TEACHER_embedding`` (bytes); all null where there is no output. Examples keep their number,
    not their order.

    Args:
        store: of the outputs; its tasks and its length of a window are in the text.
        teachers: a name or several.
        tasks: which of the store's; None: all.
        snapshot: pins a version, of all teachers or by name; None: the newest counts.
        exclude: versions that are passed over, of all teachers or by name.
        max_age_seconds: older outputs are as none; None: none is too old.
        embeddings: give the bytes of the embeddings too.
        examples: the name of the table of examples, within a catalog if need be (``a.b.c``).
        outputs: the same of the table of outputs: the Delta table ``outputs`` in the store's
            folder, or a view of :func:`data_files`.
        example_id: the examples' column of ids.
        event_seconds: their column of event times in epoch seconds.
        event_time: their column of timestamps, in the place of ``event_seconds``. Those without a
            time zone are in that of the engine's session.

    Raises:
        TypeError: for a wrong kind.
        ValueError: for a wrong value; for a task or a teacher that the store lacks; for columns
            that would differ by upper and lower case alone.

    Example:
        >>> import duckdb, tempfile
        >>> from torchrec_exfm.das import Snapshot, TeacherStore
        >>> store = TeacherStore.create(tempfile.mkdtemp())
        >>> _ = store.write(Snapshot("fm", 1, 1_000), [7, 8], [0.5, -2.0], [5_000, 6_000])
        >>> _ = store.refresh()
        >>> engine = duckdb.connect()
        >>> _ = engine.read_parquet(data_files(store), hive_partitioning=True).to_view("outputs")
        >>> _ = engine.sql("SELECT 8 AS example_id, 6000 AS event_seconds").to_view("examples")
        >>> engine.sql(join_sql(store, "fm")).fetchall()
        [(8, 6000, -2.0, 1, 5000.0)]
    """
    wanted = _Wanted.of(store, teachers, tasks, snapshot, exclude, max_age_seconds, embeddings)
    winners = wanted.winners(outputs)
    joined = wanted.joined(examples, example_id, event_seconds, event_time)
    return f"WITH {_WINNERS} AS (\n{winners}\n)\n{joined}"


def data_files(
    store: TeacherStore,
    teachers: str | Sequence[str] | None = None,
    first_seconds: int = 0,
    last_seconds: int = MAX_SECONDS,
) -> list[str]:
    """The Parquet files that hold a store's outputs for events between two times, both included.

    Other files in the store's folder have left the table, and are not to be read. ``teacher`` and
    ``window`` are in the paths (Hive partitions).

    Args:
        store: as of the commit that it is at.
        teachers: a name or several; None: all.
        first_seconds: the least event time, epoch seconds.
        last_seconds: the last event time.
    """
    names = {teachers} if isinstance(teachers, str) else teachers
    first, last = (
        second // store.format.window_seconds for second in (first_seconds, last_seconds)
    )
    return sorted(
        f"{store.table.url}/{file.path}"
        for file in store.table.files()
        if (names is None or file.partition[0] in names) and first <= file.partition[1] <= last
    )


@dataclass(frozen=True)
class _Wanted:
    """Which outputs are wanted, of which rows: the arguments of ``join_sql``, checked."""

    stored_tasks: tuple[str, ...]
    window_seconds: int
    teachers: tuple[str, ...]
    tasks: tuple[str, ...]
    snapshot: dict[str, int | None]
    exclude: dict[str, list[int]]
    max_age_seconds: float | None
    embeddings: bool

    @classmethod
    def of(
        cls,
        store: TeacherStore,
        teachers: str | Sequence[str],
        tasks: Sequence[str] | None,
        snapshot: int | Mapping[str, int] | None,
        exclude: Collection[int] | Mapping[str, Collection[int]],
        max_age_seconds: float | None,
        embeddings: bool,
    ) -> _Wanted:
        names = (teachers,) if isinstance(teachers, str) else tuple(teachers)
        pinned = snapshot if isinstance(snapshot, Mapping) else dict.fromkeys(names, snapshot)
        excluded = exclude if isinstance(exclude, Mapping) else dict.fromkeys(names, exclude)
        chosen = store.tasks if tasks is None else tuple(tasks)
        _check_names("teachers", names, store.teachers() or names)
        _check_names("tasks", chosen, store.tasks)
        _check_names("snapshot", tuple(pinned), names)
        _check_names("exclude", tuple(excluded), names)
        if max_age_seconds is not None:
            check_duration("max_age_seconds", max_age_seconds)
        embeddings = embeddings and store.format.embedding_bytes > 0  # refuses a store without
        wanted = cls(
            store.tasks,
            store.format.window_seconds,
            names,
            chosen,
            {name: _version(pinned.get(name)) for name in names},
            {name: _versions(excluded.get(name, ())).tolist() for name in names},
            None if max_age_seconds is None else float(max_age_seconds),
            embeddings,
        )
        columns = [name for teacher in names for name in wanted.columns(teacher)]
        if len({name.lower() for name in columns}) < len(columns):
            raise ValueError(
                "columns should differ by more than upper and lower case, which SQL takes for the "
                f"same; received {columns}: join fewer teachers or tasks at once"
            )
        return wanted

    def columns(self, teacher: str) -> dict[str, str]:
        """The columns that a teacher becomes, each with its name among the winners."""
        columns = {f"{teacher}_{task}": f"output_{task}" for task in self.tasks}
        columns[f"{teacher}_snapshot"] = "snapshot"
        columns[f"{teacher}_age_seconds"] = "age_seconds"
        if self.embeddings:
            columns[f"{teacher}_embedding"] = "embedding"
        return columns

    def rules(self) -> dict[str, str]:
        """What rows may not do, in words and as a condition: ``rules.broken_rules`` in SQL."""
        infinite = [f"abs({_quoted(f'output_{task}')}) > {_LARGEST}" for task in self.stored_tasks]
        # within range, as a timestamp has to be; no example lies in a window beyond
        window = f"least(greatest(`window`, 0), {MAX_SECONDS // self.window_seconds})"
        first = f"{window} * {self.window_seconds}"
        return {
            "have a negative example id": "example_id < 0",
            "have an output that is NaN or infinite": " OR ".join(infinite),
            f"have an event time outside of [0, {MAX_SECONDS:,}) seconds": (
                f"event_time < to_timestamp(0) OR event_time >= to_timestamp({MAX_SECONDS})"
            ),
            "leak: their teacher was trained through their own event time": (
                "trained_through >= event_time AND NOT logged"
            ),
            "lie outside of their window": (
                f"event_time < to_timestamp({first})"
                f" OR event_time >= to_timestamp({first} + {self.window_seconds})"
            ),
        }

    def winners(self, outputs: str) -> str:
        """The row of each example that counts, for each teacher and window."""
        tasks = [_quoted(f"output_{task}") for task in self.tasks]
        columns = ["teacher", "`window`", "example_id", "snapshot", *tasks]
        columns += ["embedding"] if self.embeddings else []
        broken = " OR ".join(f"({condition})" for condition in self.rules().values())
        eligible = " OR ".join(f"({self._eligible(teacher)})" for teacher in self.teachers)
        # datediff(MICROSECOND, ...) names a unit to Spark, and a column of that name to DuckDB
        return f"""SELECT {", ".join(columns)},
  CAST(CASE WHEN logged THEN 0
    ELSE datediff(MICROSECOND, trained_through, event_time) / 1e6 END AS FLOAT) AS age_seconds
FROM (
  SELECT *, row_number() OVER (
    PARTITION BY teacher, `window`, example_id
    ORDER BY snapshot DESC, logged DESC, scored_at DESC
  ) AS place
  FROM (SELECT *, 'microsecond' AS microsecond FROM {_table(outputs)}) AS stored
  WHERE ({eligible})
    AND NOT coalesce({broken}, FALSE)
) AS ranked
WHERE place = 1"""

    def _eligible(self, teacher: str) -> str:
        conditions = [f"teacher = '{teacher}'"]
        if (version := self.snapshot[teacher]) is not None:
            conditions.append(f"snapshot = {version}")
        if excluded := self.exclude[teacher]:
            conditions.append(f"snapshot NOT IN ({', '.join(map(str, excluded))})")
        return " AND ".join(conditions)

    def joined(
        self, examples: str, example_id: str, event_seconds: str, event_time: str | None
    ) -> str:
        """The examples beside the winners of each teacher."""
        columns, joins = ["example.*"], []
        for number, teacher in enumerate(self.teachers):
            won = f"teacher_{number}"
            conditions = [
                f"{won}.teacher = '{teacher}'",
                f"{won}.example_id = example.{_quoted(example_id)}",
            ]
            first = f"{won}.`window` * {self.window_seconds}"
            if event_time is None:
                window = f"floor(example.{_quoted(event_seconds)} / {self.window_seconds})"
                conditions.append(f"{won}.`window` = CAST({window} AS BIGINT)")
            else:
                time = f"example.{_quoted(event_time)}"
                conditions.append(f"{time} >= to_timestamp({first})")
                conditions.append(f"{time} < to_timestamp({first} + {self.window_seconds})")
            if self.max_age_seconds is not None:
                conditions.append(f"{won}.age_seconds <= CAST({self.max_age_seconds!r} AS FLOAT)")
            joins.append(f"LEFT JOIN {_WINNERS} AS {won}\n  ON " + "\n  AND ".join(conditions))
            columns += [
                f"{won}.{_quoted(stored)} AS {_quoted(name)}"
                for name, stored in self.columns(teacher).items()
            ]
        listed = ",\n  ".join(columns)
        return f"SELECT {listed}\nFROM {_table(examples)} AS example\n" + "\n".join(joins)


def _quoted(name: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(
            f"a table or column should have a name that can be read; received {name!r}"
        )
    return "`" + name.replace("`", "``") + "`"


def _table(name: str) -> str:
    """The quoted name of a table, which may be within a catalog and a schema."""
    return ".".join(map(_quoted, name.split(".")))


def _version(version: Any) -> int | None:
    if version is not None and not 0 <= as_int(version) < 2**40:
        raise ValueError(f"snapshot should be a version; received {version!r}")
    return None if version is None else as_int(version)


@dataclass
class JoinReport:
    """What became of a join, by teacher.

    Attributes:
        examples: how many there are.
        present: examples with an output.
        left_out: rows of the store that break a rule, by the rule, in the windows that were read.
    """

    examples: int = 0
    present: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)


def join_files(
    store: TeacherStore,
    examples: str,
    folder: Path,
    teachers: Sequence[str] = (),
    *,
    example_id: str = "example_id",
    event_time: str | None = None,
    bad_rows: BadRows = "refuse",
    memory_limit: str | None = None,
    tasks: Sequence[str] | None = None,
    snapshot: int | None = None,
    exclude: Collection[int] = (),
    max_age_seconds: float | None = None,
    embeddings: bool = False,
) -> JoinReport:
    """Join Parquet files on DuckDB: each becomes one of its name, with its rows in their order.

    A file is there whole or not at all, and one that is there is not made again. In memory are the
    outputs of the windows that a file touches, its ids and times, and one of its row groups.

    Args:
        store: of the outputs.
        examples: a glob pattern of local files, or a folder of ``*.parquet``.
        folder: for the files that are made, and nothing else.
        teachers: names; none: all.
        example_id: the column of ids.
        event_time: that of event times, timestamps or epoch seconds; None: ``event_seconds``, or
            ``event_time`` where there is none.
        bad_rows: as for :meth:`TeacherStore.read`.
        memory_limit: of DuckDB, such as ``"4GB"``, beyond which it uses the disk; None: its own.
        tasks: as for :func:`join_sql`.
        snapshot: as there, of all teachers.
        exclude: as there, of all teachers.
        max_age_seconds: as there.
        embeddings: as there.

    Raises:
        ModuleNotFoundError: without DuckDB.
        TypeError: for ids or times of another kind.
        ValueError: for a wrong value; for examples, or a folder, that are not as they should be.
        StoreError: if the store is damaged or refused for its rows, or DuckDB fails.
    """
    check_bad_rows(bad_rows)
    names = list(teachers) or store.teachers()
    wanted = _Wanted.of(store, names, tasks, snapshot, exclude, max_age_seconds, embeddings)
    paths = _paths(examples)
    folder.mkdir(parents=True, exist_ok=True)
    known = {path.name for path in paths}
    if others := [p.name for p in folder.iterdir() if p.name not in known and p.name[0] != "."]:
        raise ValueError(
            f"{folder}: should hold what this join makes, and nothing else; it has "
            f"{sorted(others)[:5]}: choose another folder"
        )
    report = JoinReport(left_out={name: Counter() for name in names})
    with _engine(folder, memory_limit) as engine:
        join = _Join(engine, store, wanted, bad_rows, example_id, event_time, report.left_out)
        for path in tqdm(paths, desc="join", unit="file", disable=None):
            made_of = join.made_of(path)
            counts = _counts(folder / path.name, made_of) or join.file(path, folder, made_of)
            report.examples += counts["examples"]
            report.present.update(counts["present"])
    return report


def _paths(examples: str) -> list[Path]:
    pattern = f"{examples}/*.parquet" if os.path.isdir(examples) else examples
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise ValueError(
            f"{examples}: should be Parquet files of examples, on this machine; there are none"
        )
    names = Counter(path.name for path in paths)
    if twice := [path for path in paths if names[path.name] > 1]:
        raise ValueError(
            f"{examples}: the files should differ in name, as those that are made of them lie in "
            f"one folder; received {[*map(str, twice[:4])]}: join folder by folder"
        )
    return paths


def _counts(target: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """What a file that is there says of its rows; None if there is none."""
    if not target.exists():
        return None
    note = json.loads((pq.read_schema(target).metadata or {}).get(_NOTE, "{}"))
    if note.get("made_of") != made_of:
        raise ValueError(
            f"{target}: is there, and is not what this join would make: it is of other examples, "
            "another store or other options; choose another folder, or remove it"
        )
    counts: dict[str, Any] = note
    return counts


@contextmanager
def _engine(folder: Path, memory_limit: str | None) -> Iterator[Any]:
    """DuckDB, in memory, and beyond its limit in a folder that goes with it."""
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the join needs DuckDB, which is not installed: pip install 'torchrec-exfm[das,join]'",
            name="duckdb",
        ) from error
    limit = {} if memory_limit is None else {"memory_limit": memory_limit}
    with tempfile.TemporaryDirectory(prefix=".spilled-", dir=folder) as spilled:
        try:
            engine = duckdb.connect(config={"temp_directory": spilled, **limit})
        except duckdb.Error as error:
            raise ValueError(
                f"memory_limit should be as '4GB'; received {memory_limit!r} ({error})"
            ) from error
        try:
            engine.execute("SET TimeZone = 'UTC'")
            yield engine
        except duckdb.Error as error:
            raise StoreError(f"DuckDB can't join these examples ({error})") from error
        finally:
            engine.close()


@dataclass
class _Join:
    """The join of one file after the other, with the winners of windows that they share."""

    engine: Any
    store: TeacherStore
    wanted: _Wanted
    bad_rows: BadRows
    example_id: str
    event_time: str | None
    left_out: dict[str, Counter[str]]
    held: set[int] = field(default_factory=set)

    def made_of(self, path: Path) -> dict[str, Any]:
        """What decides what a file becomes, as JSON keeps it, but for the commit of the store."""
        fields = {
            "store": self.store.url,
            "examples": [path.name, path.stat().st_size, self.example_id, self.event_time],
            **asdict(self.wanted),
        }
        decoded: dict[str, Any] = json.loads(json.dumps(fields))
        return decoded

    def file(self, path: Path, folder: Path, made_of: dict[str, Any]) -> dict[str, Any]:
        """Make the file of one; returns how many examples it has, and outputs are present."""
        with pq.ParquetFile(path) as source:
            keys = self._keys(path, source)
            self._hold(np.unique(self.store.window_of(keys["event_seconds"].to_numpy())).tolist())
            self.engine.register("examples", keys)
            select = self.wanted.joined("examples", "example_id", "event_seconds", None)
            joined = self.engine.sql(f"SELECT * FROM ({select}) ORDER BY {_ORDER}").to_arrow_table()
            self.engine.unregister("examples")
            present = {
                teacher: len(joined) - joined[f"{teacher}_snapshot"].null_count
                for teacher in self.wanted.teachers
            }
            counts = {"examples": len(joined), "present": present}
            note = {"made_of": made_of, "commit": self.store.table.version, **counts}
            _write(source, joined.drop_columns(keys.column_names), folder / path.name, note)
        pa.default_memory_pool().release_unused()
        return counts

    def _keys(self, path: Path, source: pq.ParquetFile) -> pa.Table:
        """The examples' numbers, ids and times, checked."""
        names = source.schema_arrow.names
        time = self.event_time or "event_seconds"
        if self.event_time is None and time not in names:
            time = "event_time"
        if missing := [name for name in (self.example_id, time) if name not in names]:
            raise ValueError(
                f"{path}: should have the columns {self.example_id} and {time}; it lacks {missing} "
                f"and has {names}: name the columns of the ids and the times"
            )
        added = [name for teacher in self.wanted.teachers for name in self.wanted.columns(teacher)]
        if taken := sorted({*names} & {*added}):
            raise ValueError(
                f"{path}: has columns {taken} already, which the join would add: rename them"
            )
        keys = source.read(columns=[self.example_id, time])
        times = keys[time]
        if pa.types.is_timestamp(times.type):
            times = times.cast(pa.timestamp("s", "UTC"), safe=False).cast(pa.int64())
        ids = as_int64(f"{path}: {self.example_id}", keys[self.example_id])
        if len(ids) and ids.min() < 0:
            raise ValueError(f"{path}: the example ids should be at least 0; received {ids.min()}")
        columns = [np.arange(len(ids)), ids, as_seconds(f"{path}: {time}", times)]
        return pa.table(columns, names=[_ORDER, "example_id", "event_seconds"])

    def _hold(self, windows: Sequence[int]) -> None:
        """Have the winners of these windows in a table each, and of no others."""
        for window in self.held.difference(windows):
            self.engine.execute(f"DROP TABLE winners_{window}")
        for window in sorted({*windows, *([] if windows else [0])} - self.held):
            self.engine.register("outputs", self._stored(window))
            self._check(window)
            self.engine.execute(
                f"CREATE TABLE winners_{window} AS {self.wanted.winners('outputs')}"
            )
            self.engine.unregister("outputs")
        self.held = {*windows} or {0}
        parts = " UNION ALL ".join(f"FROM winners_{window}" for window in sorted(self.held))
        self.engine.execute(f"CREATE OR REPLACE VIEW {_WINNERS} AS {parts}")

    def _stored(self, window: int) -> pa.Table:
        """The rows of a window, of all teachers that are wanted."""
        schema = self.store.format.schema()
        left_out = {"teacher", "window", *KEYS, *([] if self.wanted.embeddings else ["embedding"])}
        columns = pa.schema([column for column in schema if column.name not in left_out])
        files = {teacher: self.store.files(teacher, window) for teacher in self.wanted.teachers}
        parts = [_rows("", 0, columns.empty_table())]
        try:
            for teacher, of_teacher in files.items():
                tables = [self.store.table.read(file, columns) for file in of_teacher]
                parts += [_rows(teacher, window, table) for table in tables]
        except MissingFileError:  # compaction may have put another in its place
            self.store.refresh()
            if files == {teacher: self.store.files(teacher, window) for teacher in files}:
                raise
            return self._stored(window)
        return pa.concat_tables(parts)

    def _check(self, window: int) -> None:
        """Refuse or count the rows of ``outputs`` that break a rule."""
        rules = self.wanted.rules()
        cases = " ".join(f"WHEN {rule} THEN {n}" for n, rule in enumerate(rules.values()))
        query = f"SELECT teacher, CASE {cases} END AS rule, count(*) FROM outputs GROUP BY ALL"
        for teacher, rule, rows in self.engine.sql(f"{query} ORDER BY teacher, rule").fetchall():
            if rule is None:
                continue
            words = list(rules)[rule]
            if self.bad_rows == "refuse":
                raise StoreError(
                    f"{self.store.table.url}: {rows} rows of {teacher} in window {window} {words}: "
                    "correct them, or join with bad_rows='quarantine' (--bad-rows quarantine) to "
                    "leave such rows out and count them"
                )
            self.left_out[teacher][words] += rows


def _rows(teacher: str, window: int, table: pa.Table) -> pa.Table:
    """A file's rows with the columns that are in its path."""
    zeros = np.zeros(len(table), np.int8)
    table = table.append_column("teacher", pa.DictionaryArray.from_arrays(zeros, [teacher]))
    return table.append_column("window", pa.array(np.full(len(table), window)))


def _write(source: pq.ParquetFile, added: pa.Table, target: Path, note: dict[str, Any]) -> None:
    """Write the file's rows, a row group at a time, with columns that are added to them."""
    schema = source.schema_arrow
    metadata = {**(schema.metadata or {}), _NOTE: json.dumps(note)}
    schema = pa.schema([*schema, *added.schema], metadata)
    part, first = target.with_name(f".{target.name}.part"), 0
    with pq.ParquetWriter(part, schema, compression="zstd") as sink:
        for group in range(source.num_row_groups):
            rows = source.read_row_group(group)
            columns = [*rows.columns, *added.slice(first, len(rows)).columns]
            sink.write_table(pa.Table.from_arrays(columns, schema=schema), len(rows) or None)
            first += len(rows)
    os.replace(part, target)
