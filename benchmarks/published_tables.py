"""From published files to a stream on disk, with little memory; shared by the four readers.

DuckDB reads the files, sorts and counts in a folder of its own, and returns the rows in parts. Each
part becomes a stream, and is written after the one before. Memory holds a part, the vocabularies,
and what DuckDB needs, which spills beyond `MEMORY`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import duckdb
import numpy as np
import polars as pl

# After the script's own folder, as both have a report.py.
sys.path.insert(1, str(Path(__file__).parents[1] / "examples" / "promo_response"))

import data

FORMAT_VERSION = 1
MEMORY, THREADS = "2GB", 4
"""Limits of DuckDB; on fewer cores it has fewer threads."""
PART_ROWS = 2**18
PRIOR_COUNT = 10.0
"""How many examples a prior rate counts as."""
LABEL = "ENUM('0', '1')"
_MIB = 2**20

Names: TypeAlias = tuple[str, ...]
Arrays: TypeAlias = dict[str, data.Array]


class Format(NamedTuple):
    """The names of the sparse and dense features that each model gets.

    Attributes:
        lean: those of a served student.
        strong: also counts and means of earlier rows with the example's ids.
        rich: all.
        in_time_order: whether rows come in the order in which they happened.
    """

    lean: tuple[Names, Names]
    strong: tuple[Names, Names]
    rich: tuple[Names, Names]
    in_time_order: bool = True


def require_files(title: str, folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the paths of the files.

    Raises:
        FileNotFoundError: one is missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"The folder of {title} should have {', '.join(names)}. Received: {folder}, without "
            f"{', '.join(missing)}. Give the folder that the published files were unpacked to"
        )
    return [folder / name for name in names]


def digest(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of each file's name and size, and of its first and last MiB."""
    total = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            total.update(file.read(_MIB))
            file.seek(max(0, size - _MIB))
            total.update(file.read())
    return total.hexdigest()


def load_or_build(
    name: str,
    paths: Sequence[Path],
    cache: Path | None,
    parts: Callable[[duckdb.DuckDBPyConnection], Iterator[data.Stream]],
) -> data.Stream:
    """Return the stream of some files, memory-mapped; build it in the cache the first time.

    Args:
        name: of the data set.
        paths: the files; their digest is part of the name in the cache.
        cache: by default that of the promotion stream.
        parts: yields the stream in parts, in order; gets an empty database.
    """
    folder = (cache or data._default_cache()) / f"{name}-v{FORMAT_VERSION}-{digest(paths)[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as work:
            with _connect(Path(work)) as database:
                save_parts(parts(database), Path(work) / "stream")
            data.rename(Path(work) / "stream", folder)
    return data.load(folder)


def _connect(work: Path) -> duckdb.DuckDBPyConnection:
    settings: dict[str, Any] = {
        "memory_limit": MEMORY,
        "threads": min(THREADS, os.cpu_count() or 1),
        "temp_directory": str(work / "spilled"),
        "preserve_insertion_order": True,
    }
    database = duckdb.connect(str(work / "tables.duckdb"), config=settings)
    return database.execute("SET enable_progress_bar = false")


def save_parts(parts: Iterable[data.Stream], folder: Path) -> None:
    """Write the parts of a stream, one after the other, as `data.save` writes a whole one.

    The files grow by plain writes: pages of a memory-map would count as this process's memory.
    """
    folder.mkdir()
    rows, meta, types = 0, {}, {}
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for part in parts:
            for name, values in data._columns(part).items():
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
                    types[name] = values.dtype
                    _write_header(files[name], values.dtype, 0)
                files[name].write(np.ascontiguousarray(values, types[name]).data)
            rows += len(part)
            meta = {"verticals": part.verticals, "cardinalities": part.cardinalities}
        for name, file in files.items():
            file.seek(0)
            _write_header(file, types[name], rows)
    (folder / "meta.json").write_text(json.dumps(meta))


def _write_header(file: Any, dtype: np.dtype[Any], rows: int) -> None:
    """Write a header that can be overwritten, as NumPy pads it for any number of rows."""
    about = {"descr": dtype.str, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, about)


def read_table(
    database: duckdb.DuckDBPyConnection,
    table: str,
    path: Path,
    columns: Mapping[str, str],
    select: str = "*",
    *,
    delimiter: str = ",",
    header: bool = True,
) -> None:
    """Append columns of a file to a table, in the order of the file.

    Args:
        database: that of the table, which is created if needed.
        table: its name.
        path: a text file, or one that gzip has packed.
        columns: name and type of every column. Empty values and NULL are missing.
        select: SQL of the columns to keep.
        delimiter: between two columns.
        header: whether the first line has the names of the columns.

    Raises:
        ValueError: the file has another header, or a line of another form.
    """
    if header:
        _check_header(path, list(columns), delimiter)
    form = (
        f"SELECT {select} FROM read_csv($path, auto_detect = false, header = false, "
        f"skip = {int(header)}, delim = '{delimiter}', quote = '', escape = '', "
        f"nullstr = ['', 'NULL'], columns = {dict(columns)})"
    )
    try:
        # Creates the table, without rows, from the first file
        database.execute(
            f"CREATE TABLE IF NOT EXISTS {table} AS {form} LIMIT 0", {"path": str(path)}
        )
        database.execute(f"INSERT INTO {table} {form}", {"path": str(path)})
    except (duckdb.DataError, duckdb.InvalidInputException) as error:
        raise ValueError(
            f"{path} should be as published, each line with the columns {dict(columns)}. "
            f"Received: {_first_lines(error)}. Unpack it again, or see whether it is another file"
        ) from error


def _check_header(path: Path, columns: list[str], delimiter: str) -> None:
    with path.open(errors="replace") as file:
        names = [name.strip() for name in file.readline(1_000).split(delimiter)]
    if names != columns:
        raise ValueError(
            f"The first line of {path} should name {columns}. Received: {names}. "
            "See whether it is the published file, and whole"
        )


def _first_lines(error: Exception) -> str:
    """Return DuckDB's message about a line, without its advice and settings."""
    lines = str(error).split("\nColumn ")[0].split("\nPossible ")[0].splitlines()
    return ". ".join(line[:200] for line in lines if line)


def require_values(database: duckdb.DuckDBPyConnection, table: str, columns: Sequence[str]) -> int:
    """Return the number of a table's rows, all of which need values.

    Raises:
        ValueError: there is none, or some lack a value.
    """
    lacking = " OR ".join(f"{name} IS NULL" for name in columns)
    counts = f"SELECT count(*), count(*) FILTER (WHERE {lacking}) FROM {table}"
    rows, lack = database.execute(counts).fetchall()[0]
    if not rows or lack:
        raise ValueError(
            f"There should be rows, all with {', '.join(columns)}. Received: {rows} rows, {lack} "
            "that lack a value. Unpack the published files again"
        )
    return int(rows)


def require_once(database: duckdb.DuckDBPyConnection, table: str, key: str, path: Path) -> None:
    """Raise ValueError if two rows of a table, read from a file, have the same key."""
    counts = f"SELECT count(*), count(DISTINCT {key}) FROM {table}"
    rows, keys = database.execute(counts).fetchall()[0]
    if rows != keys:
        raise ValueError(
            f"{path} should have each {key} in one row. Received: {rows} rows of {keys} of them. "
            "Unpack it again"
        )


def make_codes(database: duckdb.DuckDBPyConnection, table: str, key: str, source: str) -> int:
    """Make a table of the values of a key in another table; return their number.

    Its columns are the key, its `code`, which is its rank, and `before`, the number of rows in the
    other table with a lower key.
    """
    database.execute(f"""
        CREATE TABLE {table} AS SELECT {key}, row_number() OVER (ORDER BY {key}) - 1 AS code,
            (sum(n) OVER (ORDER BY {key}) - n)::BIGINT AS before
        FROM (SELECT {key}, count(*) AS n FROM {source} GROUP BY {key})""")
    return int(database.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])


def code_columns(table: pl.DataFrame, columns: Sequence[str]) -> tuple[Arrays, dict[str, int]]:
    """Return codes of some columns, by the rank of the value, and their numbers.

    The last code is that of a missing value, whether it occurs or not.
    """
    words = {name: table[name].drop_nulls().unique().sort() for name in columns}
    codes = {name: data.code(table[name], known) for name, known in words.items()}
    return codes, {name: len(known) + 1 for name, known in words.items()}


def earlier(key: str, columns: str, labels: Sequence[str] = ("label",)) -> tuple[str, str]:
    """Return SQL over the rows of the same key with a strictly earlier `time`.

    Args:
        key: prefix of the selected columns: `{key}_seen`, the number of such rows, `{key}_last`,
            their greatest time, else NULL, and `{key}_{label}` for each label, the number of those
            that have it.
        columns: the key's columns.
        labels: columns of 0 and 1.

    Returns:
        columns to select, and the definition of a window.
    """
    counts = [f"coalesce(sum({x}) OVER {key}_past, 0)::BIGINT AS {key}_{x}" for x in labels]
    seen = f"count(*) OVER {key}_past AS {key}_seen"
    last = f"max(time) OVER {key}_past AS {key}_last"
    frame = "GROUPS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING"  # a group has one time
    window = f"{key}_past AS (PARTITION BY {columns} ORDER BY time {frame})"
    return ", ".join([seen, last, *counts]), window


def parts(database: duckdb.DuckDBPyConnection, query: str) -> Iterator[Arrays]:
    """Yield the columns of a query's rows, a part of the rows at a time."""
    for batch in database.sql(query).to_arrow_reader(PART_ROWS):
        columns = zip(batch.schema.names, batch.columns, strict=True)
        yield {name: column.to_numpy(zero_copy_only=False) for name, column in columns}


def past(key: str, rows: Arrays, prior: float, label: str = "label") -> Arrays:
    """Return log1p of the number of earlier rows of the key, and their smoothed mean label,

    (positives + prior * PRIOR_COUNT) / (count + PRIOR_COUNT).
    """
    seen = rows[f"{key}_seen"]
    mean = (rows[f"{key}_{label}"] + prior * PRIOR_COUNT) / (seen + PRIOR_COUNT)
    named = key if label == "label" else f"{key}_{label}"
    return {f"{key}_log_seen": np.log1p(seen), f"{named}_mean": mean}


def part(
    features: Format,
    rows: Arrays,
    sparse: Arrays,
    dense: Arrays,
    verticals: Names,
    cardinalities: Mapping[str, int],
) -> data.Stream:
    """Return a part of a stream; `rows` has time, week, label, page, slot, and maybe vertical."""
    (sparse_names, dense_names), size = features.rich, len(rows["time"])
    return data.Stream(
        time=rows["time"].astype(np.int64),
        week=rows["week"].astype(np.int32),
        label=rows["label"].astype(np.float32),
        vertical=np.array(rows.get("vertical", np.zeros(size)), np.int32),
        weight=np.ones(size, np.float32),
        example_id=data.example_ids(rows["page"], rows["slot"]),
        sparse={name: sparse[name].astype(np.int32) for name in sparse_names},
        dense={name: dense[name].astype(np.float32) for name in dense_names},
        verticals=verticals,
        cardinalities={name: int(cardinalities[name]) for name in sparse_names},
    )
