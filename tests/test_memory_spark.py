"""A memory as SQL on Spark: equal to the reference, as on DuckDB.

``make spark`` installs a PySpark and runs this file; Spark needs Java.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import memory_cases as cases
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_join_spark import pytestmark, rows, spark

from torchrec_exfm.das import data_files
from torchrec_exfm.das.memory import MemoryFormat
from torchrec_exfm.das.memory_sql import events_sql, memory_sql

__all__ = ["pytestmark", "spark"]


def view(session: Any, folder: Path, **tables: pa.Table) -> None:
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
        session.read.parquet(str(folder / f"{name}.parquet")).createOrReplaceTempView(name)


@pytest.mark.parametrize("format", cases.FORMATS)
def test_spark_knows_what_the_reference_knows(
    spark: Any, tmp_path: Path, format: MemoryFormat
) -> None:
    events, examples = cases.random_tables(np.random.default_rng(0))
    view(spark, tmp_path, events=events, examples=examples)
    columns = rows(spark, memory_sql(format, dialect="spark"))
    assert all(columns[name] == examples[name].to_pylist() for name in examples.column_names)
    cases.check(columns, events.to_pylist(), examples.to_pydict(), format)


@pytest.mark.parametrize("embeddings", [False, True])
def test_spark_reads_events_of_a_store(spark: Any, tmp_path: Path, embeddings: bool) -> None:
    store = cases.random_store(tmp_path / "store", np.random.default_rng(1))
    files = spark.read.option("basePath", store.table.url).parquet(*data_files(store))
    files.createOrReplaceTempView("outputs")
    text = events_sql(store, "fm", embeddings=embeddings)
    frame = spark.sql(f"SELECT * FROM ({text}) ORDER BY event_seconds, example_id")
    events = [row.asDict() for row in frame.collect()]
    expected = cases.events_of(store, 0, embeddings=embeddings)
    assert events == expected and len(events) > 20
    frame.createOrReplaceTempView("events")
    examples = {"user_id": [1, 9], "event_seconds": [5 * 3_600] * 2, "number": [0, 1]}
    view(spark, tmp_path, examples=pa.table(examples))
    width = 1 + embeddings
    format = MemoryFormat(name="fm", keys=[["user_id"]], width=width, length=3)
    columns = rows(spark, memory_sql(format, dialect="spark"))
    values = [event["value"] for event in events if event["user_id"] == 1]
    assert columns["fm_user_id_values"] == [values[:-4:-1], []] and len(values) > 2
    assert columns["fm_user_id_count"] == [len(values), 0]
