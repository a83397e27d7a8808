"""How fast the features of a teacher memory are built, and how long a request of 1,000 rows waits.

    python benchmarks/memory.py [--json] [--quick]

Built: aggregates of the promotion stream's labels (3.6 million examples; --quick: 0.3 million).
Each example is written and read, in parts of 65,536, for each key alone, in a process of its own.

aggregate_rows_per_s: examples a second that the process had a core, of the slowest key.
aggregate_peak_bytes: the peak of the process above the stream's arrays, of the largest key.
exponent_time: the slope of log(seconds of a core) over log(examples), through three sizes.
exponent_memory: the slope of log(peak bytes) over log(distinct keys), through three made streams
    with the same number of examples: 1 is linear in keys.
sql_rows_per_s: the same table by memory_sql on DuckDB, one thread.
equal_to_brute_force: whether counts, means, last values, decayed means and days of 20,000
    examples equal those from a dict of lists, within float32.

Served: a memory of 50,000 users (--quick: 20,000), 12 numbers an event, published and read on each
backend: SQLite, and Redis if a server is installed, which runs on the same machine. Sequences have
L = 0 or 50 events in int8, and are full. A request has 1,000 rows of distinct random users, one in
twenty without a record. Its time is that of ServedMemory.read, from columns to features. For
comparison, a student alone serves 1,000 rows: the exported DLRM of serving.py with 26 tables
(--quick: 4), eager, on one thread.

serve_p50_ms, serve_p99_ms: by backend and L, by the clock, of 500 reads (--quick: 200).
core_p50_ms: the time that the reading process had the core, so that other work counts less.
publish_rows_per_s, bytes_a_record: of the publication of all records; SQLite's bytes are of its
    file.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from torchrec_exfm.das.memory import Memory, MemoryFormat
from torchrec_exfm.das.memory_server import ServedMemory, publish_memory
from torchrec_exfm.das.memory_sql import memory_sql

ROWS, WIDTH, PART = 1_000, 12, 1 << 16
PROMOTIONS = (("household",), ("product",), ("household", "category"))
LENGTHS = (0, 50)
AIMS = {
    "aggregate_rows_per_s": ">= 1,000,000",
    "exponent_time": "1",
    "exponent_memory": "1",
    "equal_to_brute_force": "True",
} | {
    f"serve_p99_ms.{backend}_length_{length}": "below student_alone_p99_ms"
    for backend, length in itertools.product(("sqlite", "redis"), LENGTHS)
}


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(measure(options.quick), options.json, AIMS)


def measure(quick: bool) -> dict[str, Any]:
    built, served = build(quick), serve_latency(quick)
    return {**built, **served, "details": {"built": built["details"], "served": served["details"]}}


def build(quick: bool) -> dict[str, Any]:
    """Measure how fast aggregates are built, their memory, and whether they are right."""
    rows = 300_000 if quick else 3_600_000
    runs = {"_".join(key): common.in_process(aggregate, key, rows) for key in PROMOTIONS}
    sizes = [rows // 4, rows // 2, rows]
    grown = [common.in_process(aggregate, PROMOTIONS[-1], size) for size in sizes]
    keys = [rows // 32, rows // 8, rows // 2]
    made = [common.in_process(aggregate_made, count, rows // 2) for count in keys]
    return {
        "aggregate_rows_per_s": min(run["rows_per_s"] for run in runs.values()),
        "aggregate_peak_bytes": max(run["peak_bytes"] for run in runs.values()),
        "exponent_time": common.rounded(slope(sizes, [run["core_seconds"] for run in grown])),
        "exponent_memory": common.rounded(slope(keys, [run["peak_bytes"] for run in made])),
        "sql_rows_per_s": common.in_process(by_sql, min(rows, 1_000_000)),
        "equal_to_brute_force": common.in_process(equal_to_brute_force, 20_000),
        "details": {
            "examples": rows,
            "by_key": runs,
            "keys_made": dict(zip(map(str, keys), made, strict=True)),
        },
    }


def slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def promotions(rows: int) -> tuple[dict[str, Any], Any, Any]:
    """Return the first examples of the stream: columns of keys, times and labels."""
    sys.path.insert(1, str(Path(__file__).parents[1] / "examples" / "promo_response"))
    import data

    stream = data.load_stream(progress=False).select(slice(0, rows))
    names = {name for key in PROMOTIONS for name in key}
    return {name: np.array(stream.sparse[name]) for name in names}, stream.time, stream.label


def aggregate(key: tuple[str, ...], rows: int) -> dict[str, Any]:
    return pass_over(key, *promotions(rows))


def aggregate_made(keys: int, rows: int) -> dict[str, Any]:
    """Aggregate a made stream in which each of so many keys comes equally often."""
    random = np.random.default_rng(0)
    columns = {"key": random.permutation(np.arange(rows) % keys)}
    return pass_over(("key",), columns, np.arange(rows), np.zeros(rows, np.float32))


def pass_over(key: tuple[str, ...], columns: dict[str, Any], seconds: Any, values: Any) -> Any:
    before = common.memory("VmRSS", new_peak=True)
    memory = Memory(MemoryFormat(name="label", keys=[key]))

    def run() -> None:
        for first in range(0, len(seconds), PART):
            rows = slice(first, first + PART)
            part = {name: column[rows] for name, column in columns.items()}
            memory.write(part, seconds[rows], np.asarray(values[rows]))
            memory.read(part, seconds[rows])

    _, core = common.timed(run)
    peak = common.memory("VmHWM")
    return {
        "core_seconds": common.rounded(core),
        "rows_per_s": common.rounded(len(seconds) / core),
        "peak_bytes": peak - before,
    }


def by_sql(rows: int) -> float:
    """Return the examples that DuckDB builds a second of a core, for one key."""
    import duckdb
    import pyarrow as pa

    columns, seconds, labels = promotions(rows)
    columns = {**columns, "example_id": np.arange(rows), "event_seconds": seconds, "value": labels}
    engine = duckdb.connect(config={"threads": 1})
    engine.register("events", pa.table(columns))
    text = memory_sql(
        MemoryFormat(name="label", keys=PROMOTIONS[-1:]), dialect="duckdb", examples="events"
    )
    _, core = common.timed(lambda: engine.sql(f"CREATE TABLE made AS {text}"))
    return common.rounded(rows / core)


def equal_to_brute_force(rows: int) -> bool:
    columns, seconds, labels = promotions(rows)
    format = MemoryFormat(name="label", keys=PROMOTIONS)
    memory, equal = Memory(format), True
    memory.write(columns, seconds, np.asarray(labels))
    features = memory.read(columns, seconds)
    for name, key in zip(format.key_names, PROMOTIONS, strict=True):
        earlier: dict[Any, list[tuple[int, float]]] = {}
        values, known = (
            list(zip(*(columns[column].tolist() for column in key), strict=True)),
            features[name],
        )
        first = 0
        for row in range(rows):
            while seconds[first] < seconds[row]:
                earlier.setdefault(values[first], []).append((int(seconds[first]), labels[first]))
                first += 1
            events = earlier.get(values[row], [])
            equal &= known.count[row] == len(events)
            if not events:
                continue
            ages = [(int(seconds[row]) - t) / format.half_life_seconds for t, _ in events]
            weights = [2.0**-age for age in ages]
            decayed = sum(w * y for w, (_, y) in zip(weights, events, strict=True)) / sum(weights)
            expected = np.mean([y for _, y in events]), events[-1][1], decayed
            received = known.mean[row, 0], known.last[row, 0], known.decayed_mean[row, 0]
            equal &= bool(np.allclose(received, expected, rtol=1e-6, atol=1e-7))
            days = (int(seconds[row]) - events[-1][0]) / 86_400
            equal &= bool(np.isclose(known.days_since[row], days, rtol=1e-6))
    return bool(equal)


def serve_latency(quick: bool) -> dict[str, Any]:
    """Measure the milliseconds of a request, by backend and length of the sequences."""
    keys, reads = (20_000, 200) if quick else (50_000, 500)
    details: dict[str, Any] = {"keys": keys, "rows": ROWS, "reads": reads}
    for backend, length in itertools.product(backends(), LENGTHS):
        figures = common.in_process(serve, backend, keys, length, reads)
        details[f"{backend}_length_{length}"] = figures
    student = common.in_process(student_alone, quick)
    by_arm = {name: value for name, value in details.items() if isinstance(value, dict)}
    return {
        "serve_p50_ms": {name: arm["serve_p50_ms"] for name, arm in by_arm.items()},
        "serve_p99_ms": {name: arm["serve_p99_ms"] for name, arm in by_arm.items()},
        "student_alone_p50_ms": student["p50_ms"],
        "student_alone_p99_ms": student["p99_ms"],
        "details": details,
    }


def markdown(result: dict[str, Any]) -> str:
    details, built = result["details"]["served"], result["details"]["built"]
    header = ["backend, sequences", "ms at p50", "ms at p99", "ms of a core"]
    header += ["records published a second", "bytes a record"]
    names = ("serve_p50_ms", "serve_p99_ms", "core_p50_ms", "publish_rows_per_s", "bytes_a_record")
    rows = [
        [arm.replace("_length_", ", L = "), *(figures[name] for name in names)]
        for arm, figures in details.items()
        if isinstance(figures, dict)
    ]
    by_key = [
        [name, *(f"{run[figure]:,.0f}" for figure in ("rows_per_s", "peak_bytes"))]
        for name, run in built["by_key"].items()
    ]
    by_key_table = common.table(["key", "examples a second of a core", "peak bytes"], by_key)
    return (
        f"Built: aggregates of {built['examples']:,} promotions by one key. `memory_sql` on DuckDB "
        f"builds {result['sql_rows_per_s']:,.0f} examples a second of a core. Memory grows as "
        f"keys^{result['exponent_memory']:.2f}.\n\n{by_key_table}\n\n"
        f"Served: a request of {details['rows']:,} users out of {details['keys']:,}, with {WIDTH} "
        "numbers for each event and sequences of L events. A student alone takes "
        f"{result['student_alone_p50_ms']} ms for as many rows "
        f"({result['student_alone_p99_ms']} at p99).\n\n{common.table(header, rows)}"
    )


def backends() -> list[str]:
    sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))
    from redis_server import BINARY

    return ["sqlite"] if BINARY is None else ["sqlite", "redis"]


@contextmanager
def target(backend: str) -> Iterator[str]:
    """Yield the URL of an empty backend."""
    if backend == "sqlite":
        with tempfile.TemporaryDirectory(prefix="benchmark-memory-") as folder:
            yield f"{folder}/memory.sqlite"
        return
    backends()
    from redis_server import RedisServer

    server = RedisServer()
    try:
        yield server.url
    finally:
        server.stop()


def memory_of(keys: int, length: int) -> Memory:
    """Return a memory in which each user has L events; with L = 0, one without sequences."""
    random = np.random.default_rng(0)
    memory = Memory(
        MemoryFormat(name="fm", keys=[["user_id"]], width=WIDTH, length=length, resolution="int8")
    )
    users = np.arange(keys)
    for second in range(max(1, length)):
        values = random.normal(size=(keys, WIDTH)).astype(np.float32)
        memory.write({"user_id": users}, np.full(keys, second), values)
        memory.read({"user_id": users[:1]}, [second + 1])  # which applies the events
    return memory


def serve(backend: str, keys: int, length: int, reads: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    memory, random = memory_of(keys, length), np.random.default_rng(1)
    with target(backend) as url:
        seconds, _ = common.timed(publish_memory, url, memory, 100)
        size = stored_bytes(url)
        with closing(ServedMemory(url, "fm", format=memory.format)) as served:
            times = []
            for _ in range(reads):
                users = random.choice(keys * 20 // 19, ROWS, replace=False)
                at = np.full(ROWS, 1000)
                times.append(common.timed(served.read, {"user_id": users}, at))
    wall, core = (1000 * np.array(column) for column in zip(*times, strict=True))
    return {
        "serve_p50_ms": common.rounded(float(np.percentile(wall, 50))),
        "serve_p99_ms": common.rounded(float(np.percentile(wall, 99))),
        "core_p50_ms": common.rounded(float(np.percentile(core, 50))),
        "publish_rows_per_s": common.rounded(keys / seconds),
        "bytes_a_record": common.rounded(size / keys),
    }


def stored_bytes(url: str) -> int:
    if "://" not in url:
        return sum(file.stat().st_size for file in Path(url).parent.iterdir())
    import redis

    with redis.Redis.from_url(url) as client:
        used: int = client.info("memory")["used_memory"]
    return used


def student_alone(quick: bool) -> dict[str, Any]:
    """Measure the milliseconds of the bare student for as many rows, as in serving.py."""
    from reference import KEYS, STUDENT, Stream, dlrm
    from serving import Flat, inputs

    torch.set_num_threads(1)
    keys = KEYS[:4] if quick else KEYS
    student = Flat(dlrm(STUDENT, tables="cpu", keys=keys).eval().model)
    requests = [inputs(batch) for batch in Stream(4096, keys).pool(4, ROWS)]
    times = []
    with torch.no_grad():
        for request in itertools.islice(itertools.cycle(requests), 50 if quick else 300):
            start = time.perf_counter()
            student(*request)
            times.append(1000 * (time.perf_counter() - start))
    p50, p99 = (common.rounded(float(value)) for value in np.percentile(times, [50, 99]))
    return {"p50_ms": p50, "p99_ms": p99}


if __name__ == "__main__":
    main()
