"""The join on Spark: the store's files as Spark reads them, and join_sql's text unchanged.

``make spark`` installs a PySpark and runs this file; Spark needs Java.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import join_cases as cases
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from das_data import AT, new_store, snapshot

from torchrec_exfm.das import data_files, join_sql

pyspark = pytest.importorskip("pyspark", reason="PySpark is not installed: make spark")
if shutil.which("java") is None:
    pytest.skip("Spark needs Java: install openjdk-17-jre-headless", allow_module_level=True)

from pyspark.sql import SparkSession  # noqa: E402

pytestmark = [  # py4j leaves its sockets to be collected
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start Spark with one thread, no UI, and a time zone that nothing may depend on."""
    options = {
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "1",
        "spark.sql.adaptive.enabled": "false",  # for what is small, plans take the time
        "spark.sql.session.timeZone": "America/New_York",
        "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
        "spark.driver.host": "localhost",
        "spark.driver.bindAddress": "127.0.0.1",
    }
    session = SparkSession.builder.master("local[1]").config(map=options).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


def views(spark: Any, store: Any, examples: pa.Table, folder: Path) -> None:
    """Create the views that the query names."""
    pq.write_table(examples, folder / "examples.parquet")
    spark.read.parquet(str(folder / "examples.parquet")).createOrReplaceTempView("examples")
    files = spark.read.option("basePath", store.table.url).parquet(*data_files(store))
    files.createOrReplaceTempView("outputs")


def rows(spark: Any, text: str) -> dict[str, list[Any]]:
    frame = spark.sql(f"SELECT * FROM ({text}) ORDER BY number")
    collected = frame.collect()
    return {name: [row[i] for row in collected] for i, name in enumerate(frame.columns)}


def test_spark_joins_what_the_look_up_finds(spark: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    store = cases.random_store(tmp_path / "store", random)
    for partition in {file.partition for file in store.table.files()}:
        store.table.compact(partition)  # which leaves files that are not to be read
    store.refresh()
    examples = cases.random_examples(store, random)
    views(spark, store, examples, tmp_path)
    for choice in cases.CHOICES:
        joined = rows(spark, join_sql(store, cases.TEACHERS, **choice))
        cases.check(joined, store, examples, choice)
        assert joined["example_id"] == examples["example_id"].to_pylist()


def test_examples_may_have_timestamps(spark: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    store = cases.random_store(tmp_path / "store", random)
    examples = cases.random_examples(store, random)
    times = pa.array(examples["event_seconds"].to_numpy() * 10**6).cast(pa.timestamp("us", "UTC"))
    views(spark, store, examples.append_column("at", times), tmp_path)
    joined = rows(spark, join_sql(store, cases.TEACHERS, event_time="at"))
    cases.check(joined, store, examples, {})


@pytest.mark.parametrize("resolution", ["bfloat16", "float32"])
@pytest.mark.parametrize("embeddings", ["float16", "int8"])
def test_spark_reads_every_encoding_with_its_defaults(
    spark: Any, tmp_path: Path, resolution: str, embeddings: str
) -> None:
    kind: Any = {"embedding_width": 3, "embedding_resolution": embeddings}
    store = new_store(tmp_path / "store", resolution=resolution, **kind)
    ids = np.arange(5_000)
    vectors = np.random.default_rng(0).normal(size=(5_000, 3)).astype(np.float32)
    for part in (slice(0, 3_000), slice(3_000, 5_000)):
        outputs = (ids[part] / 8).astype(np.float32)
        store.write(snapshot(), ids[part], outputs, AT + ids[part] % 60, embeddings=vectors[part])
    stored: dict[str, list[Any]] = {}
    for _ in range(2):  # as it was written, and compacted
        store.refresh()
        examples = pa.table({"number": ids, "example_id": ids, "event_seconds": AT + 0 * ids})
        views(spark, store, examples, tmp_path)
        joined = rows(spark, join_sql(store, "fm", embeddings=True))
        read, _ = store.read("fm", AT // 3_600, embeddings=True)
        order = np.argsort(read.example_id)
        assert joined["fm_label"] == read.outputs[order, 0].tolist()
        assert [*map(bytes, joined["fm_embedding"])] == [*map(bytes, read.embedding[order])]
        assert not stored or joined == stored
        stored = joined
        store.table.compact(("fm", AT // 3_600))
