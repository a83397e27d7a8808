"""Join of example files with the store, on DuckDB: ``python -m torchrec_exfm.das join``."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from torchrec_exfm.das.arrays import as_int64, as_seconds
from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.join import WINNERS, Query, outputs_source
from torchrec_exfm.das.rules import BadRows, check_bad_rows
from torchrec_exfm.das.schema import KEYS, TIMESTAMP
from torchrec_exfm.das.store import TeacherStore

__all__ = ["NOTE", "JoinReport", "join_files"]

NOTE = b"torchrec_exfm.join"  # key in the metadata of a joined file: its origin and its counts
_ORDER = "example_number"


@dataclass
class JoinReport:
    """Counts of a join, by teacher.

    Attributes:
        examples: number of examples.
        present: examples with an output, by teacher.
        left_out: rows that break a rule, in the windows that were read, by teacher and rule.
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
    """Join Parquet files with the store: each gives a file of its name, with the same row order.

    A file is written atomically, and a file that exists is not written again. Memory holds the
    outputs of the windows that a file touches, its ids and times, and one of its row groups.

    Args:
        store: the store of the outputs.
        examples: a glob pattern of local files, or a folder of ``*.parquet``.
        folder: folder for the joined files, and nothing else.
        teachers: names of teachers; empty: all.
        example_id: column of ids.
        event_time: column of event times, timestamps or epoch seconds; None: ``event_seconds`` if
            it exists, else ``event_time``.
        bad_rows: as for :meth:`TeacherStore.read`.
        memory_limit: memory of DuckDB, such as ``"4GB"``, beyond which it uses the disk; None:
            DuckDB's default.
        tasks: as for :func:`join_sql`.
        snapshot: as for :func:`join_sql`, for all teachers.
        exclude: as for :func:`join_sql`, for all teachers.
        max_age_seconds: as for :func:`join_sql`.
        embeddings: as for :func:`join_sql`.

    Raises:
        ModuleNotFoundError: if DuckDB is not installed.
        TypeError: for ids or times of a wrong type.
        ValueError: for a wrong value; for unfit example files; for a folder with other files.
        StoreError: if the store is damaged or has rows that are refused, or DuckDB fails.
    """
    check_bad_rows(bad_rows)
    names = list(teachers) or store.teachers()
    query = Query.check(store, names, tasks, snapshot, exclude, max_age_seconds, embeddings)
    paths = _paths(examples)
    folder.mkdir(parents=True, exist_ok=True)
    expected = {path.name for path in paths}
    if others := [p.name for p in folder.iterdir() if p.name not in expected and p.name[0] != "."]:
        raise ValueError(
            f"{folder}: should hold only the files of this join; it has {sorted(others)[:5]}: "
            "choose another folder"
        )
    report = JoinReport(left_out={name: Counter() for name in names})
    with _engine(folder, memory_limit) as engine:
        join = _Join(engine, store, query, bad_rows, example_id, event_time, report.left_out)
        for path in tqdm(paths, desc="join", unit="file", disable=None):
            origin = join.origin(path)
            counts = _read_counts(folder / path.name, origin) or join.run(path, folder, origin)
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
    if repeated := [path for path in paths if names[path.name] > 1]:
        raise ValueError(
            f"{examples}: the files should differ in name, since the joined files go into one "
            f"folder; received {[*map(str, repeated[:4])]}: join folder by folder"
        )
    return paths


def _read_counts(target: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """Return the counts in a joined file, if it exists; raise if it is of another join."""
    if not target.exists():
        return None
    note = json.loads((pq.read_schema(target).metadata or {}).get(NOTE, "{}"))
    if note.get("made_of") != origin:
        raise ValueError(
            f"{target}: exists, and is not of this join: it has other examples, another store or "
            "other options; choose another folder, or remove it"
        )
    counts: dict[str, Any] = note
    return counts


@contextmanager
def _engine(folder: Path, memory_limit: str | None) -> Iterator[Any]:
    """Open DuckDB in memory, with a temporary folder for what is beyond its memory limit."""
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
            engine.execute("SET TimeZone = 'UTC'")  # the store's times lose their zone when read
            yield engine
        except duckdb.Error as error:
            raise StoreError(f"DuckDB can't join these examples ({error})") from error
        finally:
            engine.close()


@dataclass
class _Join:
    """The join of one file after another, which keeps the winners of windows that they share."""

    engine: Any
    store: TeacherStore
    query: Query
    bad_rows: BadRows
    example_id: str
    event_time: str | None
    left_out: dict[str, Counter[str]]
    loaded: set[int] = field(default_factory=set)

    def origin(self, path: Path) -> dict[str, Any]:
        """Return all that a joined file depends on, but for the store's commit.

        The commit is left out, so that a job that was killed resumes although the store has grown.
        """
        fields = {
            "store": self.store.url,
            "examples": [path.name, path.stat().st_size, self.example_id, self.event_time],
            **asdict(self.query),
        }
        decoded: dict[str, Any] = json.loads(json.dumps(fields))  # to compare with a file's note
        return decoded

    def run(self, path: Path, folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
        """Join a file; return its number of examples, and by teacher that of present outputs."""
        with pq.ParquetFile(path) as source:
            keys = self._keys(path, source)
            self._load(np.unique(self.store.window_of(keys["event_seconds"].to_numpy())).tolist())
            self.engine.register("examples", keys)
            select = self.query.joined_sql("examples", "example_id", "event_seconds", None)
            joined = self.engine.sql(f"SELECT * FROM ({select}) ORDER BY {_ORDER}").to_arrow_table()
            self.engine.unregister("examples")
            present = {
                teacher: len(joined) - joined[f"{teacher}_snapshot"].null_count
                for teacher in self.query.teachers
            }
            counts = {"examples": len(joined), "present": present}
            note = {"made_of": origin, "commit": self.store.table.version, **counts}
            _write(source, joined.drop_columns(keys.column_names), folder / path.name, note)
        pa.default_memory_pool().release_unused()
        return counts

    def _keys(self, path: Path, source: pq.ParquetFile) -> pa.Table:
        """Return the examples' numbers, ids and times, checked."""
        names = source.schema_arrow.names
        time = self.event_time or "event_seconds"
        if self.event_time is None and time not in names:
            time = "event_time"
        if missing := [name for name in (self.example_id, time) if name not in names]:
            raise ValueError(
                f"{path}: should have the columns {self.example_id} and {time}; it lacks {missing} "
                f"and has {names}: name the columns of the ids and the times"
            )
        added = [name for teacher in self.query.teachers for name in self.query.columns(teacher)]
        if existing := sorted({*names} & {*added}):
            raise ValueError(
                f"{path}: has columns {existing} already, which the join would add: rename them"
            )
        keys = source.read(columns=[self.example_id, time])
        ids = as_int64(f"{path}: {self.example_id}", keys[self.example_id])
        if len(ids) and ids.min() < 0:
            raise ValueError(f"{path}: the example ids should be at least 0; received {ids.min()}")
        columns = [np.arange(len(ids)), ids, as_seconds(f"{path}: {time}", keys[time])]
        return pa.table(columns, names=[_ORDER, "example_id", "event_seconds"])

    def _load(self, windows: Sequence[int]) -> None:
        """Make a table of the winners of each of these windows, and drop all others.

        Without any, that is without examples, window 0 gives the columns.
        """
        for window in self.loaded.difference(windows):
            self.engine.execute(f"DROP TABLE winners_{window}")
        for window in sorted({*windows, *([] if windows else [0])} - self.loaded):
            self.engine.register("outputs", self._read_window(window))
            self._check_rows(window)
            self.engine.execute(
                f"CREATE TABLE winners_{window} AS {self.query.winners_sql('outputs')}"
            )
            self.engine.unregister("outputs")
        self.loaded = {*windows} or {0}
        parts = " UNION ALL ".join(f"FROM winners_{window}" for window in sorted(self.loaded))
        self.engine.execute(f"CREATE OR REPLACE VIEW {WINNERS} AS {parts}")

    def _read_window(self, window: int) -> pa.Table:
        """Return the rows of a window, of all selected teachers."""
        schema = self.store.format.schema()
        unused = {"teacher", "window", *KEYS, *([] if self.query.embeddings else ["embedding"])}
        columns = pa.schema(
            [
                # DuckDB subtracts times without a zone thirty times as fast; its zone is set to UTC
                column.with_type(pa.timestamp("us")) if column.type == TIMESTAMP else column
                for column in schema
                if column.name not in unused
            ]
        )
        files, tables = self.store.read_files(
            self.query.teachers, window, lambda file: self.store.table.read(file, columns)
        )
        parts = [
            _add_partition(file.partition[0], window, table)
            for file, table in zip(files, tables, strict=True)
        ]
        return pa.concat_tables([_add_partition("", 0, columns.empty_table()), *parts])

    def _check_rows(self, window: int) -> None:
        """Refuse or count the rows of ``outputs`` that break a rule."""
        rules = self.query.rules()
        cases = " ".join(f"WHEN {rule} THEN {n}" for n, rule in enumerate(rules.values()))
        sql = f"SELECT teacher, CASE {cases} END AS rule, count(*) FROM {outputs_source('outputs')}"
        for teacher, rule, rows in self.engine.sql(f"{sql} GROUP BY ALL ORDER BY ALL").fetchall():
            if rule is None:
                continue
            text = list(rules)[rule]
            if self.bad_rows == "refuse":
                raise StoreError(
                    f"{self.store.table.url}: {rows} rows of {teacher} in window {window} {text}: "
                    "correct them, or join with bad_rows='quarantine' (--bad-rows quarantine) to "
                    "leave such rows out and count them"
                )
            self.left_out[teacher][text] += rows


def _add_partition(teacher: str, window: int, table: pa.Table) -> pa.Table:
    """Return a data file's rows with the two columns that are in its path."""
    zeros = np.zeros(len(table), np.int8)
    table = table.append_column("teacher", pa.DictionaryArray.from_arrays(zeros, [teacher]))
    return table.append_column("window", pa.array(np.full(len(table), window)))


def _write(source: pq.ParquetFile, added: pa.Table, target: Path, note: dict[str, Any]) -> None:
    """Write a file's rows with added columns, one row group at a time."""
    schema = source.schema_arrow
    metadata = {**(schema.metadata or {}), NOTE: json.dumps(note)}
    schema = pa.schema([*schema, *added.schema], metadata)
    part, first = target.with_name(f".{target.name}.part"), 0
    with pq.ParquetWriter(part, schema, **_layout(source, added.column_names)) as sink:
        for group in range(source.num_row_groups):
            rows = source.read_row_group(group)
            columns = [*rows.columns, *added.slice(first, len(rows)).columns]
            sink.write_table(pa.Table.from_arrays(columns, schema=schema), len(rows) or None)
            first += len(rows)
    os.replace(part, target)  # atomic: a killed job leaves a hidden .part, never half a file


def _layout(source: pq.ParquetFile, added: Sequence[str]) -> dict[str, Any]:
    """Return a file's compression and dictionaries by column; added columns use ZSTD."""
    metadata = source.metadata
    if not metadata.num_row_groups:
        return {}
    group = metadata.row_group(0)
    columns = [group.column(number) for number in range(metadata.num_columns)]
    return {
        "compression": {
            **dict.fromkeys(added, "ZSTD"),
            **{
                column.path_in_schema: column.compression.replace("UNCOMPRESSED", "NONE")
                for column in columns
            },
        },
        "use_dictionary": [
            column.path_in_schema for column in columns if column.has_dictionary_page
        ],
    }
