"""How fast examples are joined with the store on DuckDB, in how much memory, and whether rightly.

    python benchmarks/join.py [--json] [--quick] [--rows N]

A stream of 10 million examples in time order (--rows; --quick: 1 million), in files of 400,000:
random ids (hash_ids), event_seconds, a label, a user, an item and ten numbers of a history. Windows
have 500,000 examples, so that files share them. Nineteen of twenty examples have an output in the
store. What is timed is that of the command `python -m torchrec_exfm.das join`, in a process of its
own: it reads store and examples, and writes files with all columns.

peak_memory_bytes: the peak of the process above its memory after a join of one example, which loads
    the libraries; DuckDB may take 2 GB.
equal_to_lookup: whether outputs, presence and ages of all examples are those of TeacherLookup.
spark_equal: whether the same SQL on Spark gives the same for two files; null without PySpark.
exponent_time, exponent_peak_memory: the slope of log(seconds), or log(bytes), over log(examples),
    through three sizes, 1 to 30 million (--quick: 0.25 to 1 million), in whole files. 1 grows as
    the stream does, 0 is flat. Seconds are those that the process had a core, so that other work
    counts less; those by the clock are in the details.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import store as store_benchmark
import torch
from reference import FIRST, WINDOW

from torchrec_exfm.das import TeacherLookup, TeacherStore, data_files, hash_ids, join_sql
from torchrec_exfm.das.join_files import join_files

ROWS_OF_WINDOW, ROWS_OF_FILE = 500_000, 400_000
ADDED = ("fm_label", "fm_age_seconds")
AIMS = {
    "equal_to_lookup": "True",
    "spark_equal": "True",
    "exponent_time": "<= 1",
    "exponent_peak_memory": "0",
}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--rows", type=int, help="of the stream (10 million; --quick: 1 million)")
    options = parser.parse_args()
    common.show(measure(options.quick, options.rows), options.json, AIMS)


def measure(quick: bool, rows: int | None = None) -> dict[str, Any]:
    rows = rows or (1_000_000 if quick else 10_000_000)
    sizes = [250_000, 500_000, 1_000_000] if quick else [1_000_000, 5_500_000, 30_000_000]
    with tempfile.TemporaryDirectory(prefix="benchmark-join-") as folder:
        make(Path(folder), max(rows, *sizes))
        runs = [common.in_process(join, folder, rows, run == 0) for run in range(3)]
        equal = common.in_process(equal_to_lookup, folder)
        spark_equal, reason = common.in_process(equal_on_spark, folder)
        grown = {size: common.in_process(join, folder, size) for size in sizes}
    rates = [(rows, (run["seconds"], run["core_seconds"])) for run in runs]
    details = {
        "rows": rows,
        "rows_per_s_of_a_core": common.rates(rates),
        "rows_per_s_on_the_wall": common.spread([rows / run["seconds"] for run in runs]),
        "peak_memory_bytes": common.spread([run["peak_memory_bytes"] for run in runs]),
        "coverage": runs[0]["coverage"],
        "spark_equal_reason": reason,
        "growth": {str(run["examples"]): run for run in grown.values()},
    }
    return {
        "rows_per_s": details["rows_per_s_on_the_wall"]["median"],
        "peak_memory_bytes": int(statistics.median(run["peak_memory_bytes"] for run in runs)),
        "equal_to_lookup": equal,
        "spark_equal": spark_equal,
        "exponent_time": slope(grown, "core_seconds"),
        "exponent_peak_memory": slope(grown, "peak_memory_bytes"),
        "details": details,
    }


def markdown(result: dict[str, Any]) -> str:
    details = result["details"]
    growth = [
        [f"{run['examples']:,}", run["seconds"], run["core_seconds"], run["peak_memory_bytes"]]
        for run in details["growth"].values()
    ]
    wall, core, peak = (
        common.cell(details[name])
        for name in ("rows_per_s_on_the_wall", "rows_per_s_of_a_core", "peak_memory_bytes")
    )
    return (
        f"{common.cell(details['rows'])} examples: {wall} a second by the clock, {core} by the "
        f"time that the process had a core, {peak} bytes at the peak. Equal to the look-up: "
        f"{result['equal_to_lookup']}. Equal on Spark: {result['spark_equal']} "
        f"({details['spark_equal_reason']}).\n\n"
        + common.table(["examples", "s on the wall", "s on a core", "bytes at the peak"], growth)
        + f"\n\nTime grows with the power {result['exponent_time']:g} of the examples, the peak "
        f"of memory with {result['exponent_peak_memory']:g}."
    )


def slope(runs: dict[int, dict[str, Any]], figure: str) -> float:
    examples, figures = ([run[name] for run in runs.values()] for name in ("examples", figure))
    return common.rounded(float(np.polyfit(np.log(examples), np.log(figures), 1)[0]))


def make(folder: Path, rows: int) -> None:
    """Write the store, and the files of examples."""
    for window in range(-(-rows // ROWS_OF_WINDOW)):
        store_benchmark.write(f"{folder}/store", "random", ROWS_OF_WINDOW, window)
    (folder / "examples").mkdir()
    for first in range(0, rows, ROWS_OF_FILE):
        name = f"{first // ROWS_OF_FILE:05}.parquet"
        pq.write_table(examples(first, min(first + ROWS_OF_FILE, rows)), folder / "examples" / name)


def examples(first: int, last: int) -> pa.Table:
    """Return the stream's examples in a range of numbers; every twentieth is not in the store."""
    random, numbers = np.random.default_rng(first), np.arange(first, last)
    known = torch.from_numpy(np.where(numbers % 20 == 0, numbers + 10**15, numbers))
    history = pa.array(random.integers(0, 10**6, 10 * len(numbers)))
    return pa.table(
        {
            "example_id": hash_ids(known).numpy(),
            "event_seconds": FIRST * WINDOW + numbers * WINDOW // ROWS_OF_WINDOW,
            "label": random.integers(0, 2, len(numbers)).astype(np.int8),
            "user_id": random.integers(0, 10**6, len(numbers)),
            "item_id": random.integers(0, 10**5, len(numbers)),
            "history": pa.FixedSizeListArray.from_arrays(history, 10).cast(pa.list_(pa.int64())),
        }
    )


def join(folder: str, rows: int, keep: bool = False) -> dict[str, Any]:
    """Join the first files, in this process; return seconds and bytes."""
    root = Path(folder)
    files = sorted((root / "examples").iterdir())[: -(-rows // ROWS_OF_FILE)]
    store = TeacherStore(f"{folder}/store")
    with tempfile.TemporaryDirectory(dir=root) as work:
        small, asked, out = (Path(work) / name for name in ("small", "asked", "out"))
        small.mkdir(), asked.mkdir()
        pq.write_table(pq.read_table(files[0]).slice(0, 1), small / "one.parquet")
        join_files(store, str(small), Path(work) / "one")  # the libraries are ready
        for file in files:
            os.link(file, asked / file.name)
        before = common.memory("VmRSS", new_peak=True)
        reports = []
        wall, core = common.timed(
            lambda: reports.append(join_files(store, str(asked), out, memory_limit="2GB"))
        )
        peak = common.memory("VmHWM") - before
        if keep:
            shutil.copytree(out, root / "joined")
    (report,) = reports
    return {
        "examples": report.examples,
        "coverage": common.rounded(report.present["fm"] / report.examples),
        "seconds": common.rounded(wall),
        "core_seconds": common.rounded(core),
        "peak_memory_bytes": peak,
    }


def equal_to_lookup(folder: str) -> bool:
    """Check that all joined files have what TeacherLookup returns."""
    torch.set_num_threads(1)
    functions: Any = {
        "ids": lambda table: table["example_id"].to_numpy(),
        "event_seconds": lambda table: table["event_seconds"].to_numpy(),
    }
    with TeacherLookup(TeacherStore(f"{folder}/store"), "fm", **functions) as lookup:
        for file in sorted(Path(folder, "joined").iterdir()):
            table = pq.read_table(file)
            outputs = lookup(table)
            present = outputs.presence[:, 0, 0].numpy()
            assert outputs.age_seconds is not None
            expected = (outputs.values[:, 0, 0].numpy(), outputs.age_seconds[:, 0].numpy())
            for name, values in zip(ADDED, expected, strict=True):
                column = table[name].combine_chunks()
                if not np.array_equal(column.is_valid().to_numpy(False), present):
                    return False
                if not np.array_equal(column.drop_null().to_numpy(), values[present]):
                    return False
    return True


def equal_on_spark(folder: str) -> tuple[bool | None, str]:
    """Check that Spark joins two files as DuckDB did; return the reason where it cannot tell."""
    try:
        import pyspark
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        return None, "PySpark is not installed"
    if shutil.which("java") is None:
        return None, "Java is not installed"
    options = {"spark.ui.enabled": "false", "spark.driver.memory": "4g"}
    session = SparkSession.builder.master("local[1]").config(map=options).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    store = TeacherStore(f"{folder}/store")
    files = [str(file) for file in sorted(Path(folder, "joined").iterdir())[:2]]
    joined = pa.concat_tables([pq.read_table(file) for file in files])
    times = joined["event_seconds"].to_numpy()
    stored = data_files(store, "fm", int(times.min()), int(times.max()))
    frame = session.read.option("basePath", store.table.url).parquet(*stored)
    frame.createOrReplaceTempView("outputs")
    keys = session.read.parquet(*files).select("example_id", "event_seconds")
    keys.createOrReplaceTempView("examples")
    result = f"{folder}/spark"
    session.sql(join_sql(store, "fm")).write.parquet(result)
    session.stop()
    order = [("example_id", "ascending")]
    columns = ["example_id", *ADDED, "fm_snapshot"]
    from_spark, from_duckdb = (
        table.select(columns).sort_by(order).combine_chunks()
        for table in (pq.read_table(result), joined)
    )
    equal = from_spark.equals(from_duckdb)
    return equal, f"PySpark {pyspark.__version__}, {len(from_duckdb):,} examples"


if __name__ == "__main__":
    main()
