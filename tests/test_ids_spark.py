"""hash_ids in Spark's SQL, with and without ANSI mode, in which integer overflow is an error.

Needs Java, and pyspark of any version from 3.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_das_ids import SETS_OF_COLUMNS, columns_to_hash

from torchrec_exfm.das import hash_ids, hash_ids_sql

pyspark_sql = pytest.importorskip("pyspark.sql", reason="needs pyspark")
AnalysisException = pytest.importorskip("pyspark.errors").AnalysisException

# of unsigned 64-bit integers, which Spark reads as decimals: docs/store.md has it
UNSIGNED = "CAST(IF({0} < 9223372036854775808, {0}, {0} - 18446744073709551616) AS BIGINT)"

# sockets that pyspark leaves open
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    builder = pyspark_sql.SparkSession.builder.master("local[1]")
    options = {"ui.enabled": False, "ui.showConsoleProgress": False}
    for name, value in {**options, "driver.host": "127.0.0.1"}.items():
        builder = builder.config(f"spark.{name}", value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture(params=[False, True], ids=["wraps", "ANSI"])
def sql(spark: Any, request: pytest.FixtureRequest) -> Any:
    spark.conf.set("spark.sql.ansi.enabled", request.param)
    return spark.sql


@pytest.mark.parametrize("columns", SETS_OF_COLUMNS, ids=str)
def test_spark_gives_the_same_ids(spark: Any, sql: Any, columns: dict[str, Any]) -> None:
    values = columns_to_hash(200)
    schema = 'user string, request bigint, `Odd "``name` bigint'
    rows = list(zip(*values.values(), strict=True))
    spark.createDataFrame(rows, schema).createOrReplaceTempView("turn")
    ids = sql(f"SELECT {hash_ids_sql(columns, 'spark')} AS id FROM turn").collect()
    assert [row.id for row in ids] == hash_ids(*(values[name] for name in columns)).tolist()


def test_types_of_spark(sql: Any) -> None:
    def hashed(value: str, kind: Any) -> Any:
        text = hash_ids_sql({"v": kind}, "spark")
        return sql(f"SELECT {text} AS id FROM (SELECT {value} AS v)").collect()[0].id

    for kind in "TINYINT", "SMALLINT", "INT", "BIGINT":
        assert hashed(f"CAST(-7 AS {kind})", "integer") == hash_ids([-7])[0]
    for number in 0, 2**63 - 1, 2**63, 2**64 - 1:
        signed = UNSIGNED.format(f"CAST({number} AS DECIMAL(20, 0))")
        assert hashed(signed, "integer") == hash_ids(np.array([number], np.uint64))[0]
    assert hashed("CAST(NULL AS BIGINT)", "integer") is None
    assert hashed("CAST(NULL AS STRING)", "string") is None
    for value, kind in (
        ("1.5D", "integer"),
        ("CAST(7 AS DECIMAL(20, 0))", "integer"),
        ("7", "string"),
    ):
        with pytest.raises(AnalysisException):
            hashed(value, kind)
