"""Teacher memory in serving: how long a request of 1,000 rows waits for its features.

    python benchmarks/memory.py [--json] [--quick]

A memory of 200,000 users (--quick: 20,000), 12 numbers an event, published and read on each
backend: SQLite, and Redis if a server is installed here, which runs on the same machine. With
sequences of L = 0 and of L = 50 events in int8, all of them full. A request has 1,000 rows of
distinct random users, one of twenty of them without a record; the time is that of
ServedMemory.read, from columns to features. Beside it is what a student alone takes for 1,000
rows: the exported DLRM of serving.py with 26 tables (--quick: 4), eager, on one thread.

serve_p50_ms, serve_p99_ms: by backend and L, on the wall, of 3,000 reads (--quick: 200).
core_p50_ms: the time that the reading process had the core, so that other work counts less.
publish_rows_per_s, bytes_a_record: of the publication of all records; SQLite's are of its file.
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

ROWS, WIDTH = 1_000, 12
LENGTHS = (0, 50)
AIMS = {
    f"serve_p99_ms.{backend}_length_{length}": "below student_alone_p99_ms"
    for backend, length in itertools.product(("sqlite", "redis"), LENGTHS)
}


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(measure(options.quick), options.json, AIMS)


def measure(quick: bool) -> dict[str, Any]:
    return serve_latency(quick)


def serve_latency(quick: bool) -> dict[str, Any]:
    """Milliseconds of a request, by backend and length of the sequences."""
    keys, reads = (20_000, 200) if quick else (200_000, 3_000)
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
    details = result["details"]
    header = ["backend, sequences", "ms at p50", "ms at p99", "ms of a core"]
    header += ["records published a second", "bytes a record"]
    names = ("serve_p50_ms", "serve_p99_ms", "core_p50_ms", "publish_rows_per_s", "bytes_a_record")
    rows = [
        [arm.replace("_length_", ", L = "), *(figures[name] for name in names)]
        for arm, figures in details.items()
        if isinstance(figures, dict)
    ]
    return (
        f"A request of {details['rows']:,} users out of {details['keys']:,}, {WIDTH} numbers an "
        f"event. A student alone takes {result['student_alone_p50_ms']} ms for as many rows "
        f"({result['student_alone_p99_ms']} at p99).\n\n{common.table(header, rows)}"
    )


def backends() -> list[str]:
    sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))
    from redis_server import BINARY

    return ["sqlite"] if BINARY is None else ["sqlite", "redis"]


@contextmanager
def target(backend: str) -> Iterator[str]:
    """The URL of an empty one."""
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
    """One in which each user has L events, or one where there are no sequences."""
    random = np.random.default_rng(0)
    memory = Memory(
        MemoryFormat(name="fm", keys=[["user_id"]], width=WIDTH, length=length, resolution="int8")
    )
    users = np.arange(keys)
    for second in range(max(1, length)):
        values = random.normal(size=(keys, WIDTH)).astype(np.float32)
        memory.write({"user_id": users}, np.full(keys, second), values)
        memory.read({"user_id": users[:1]}, [second + 1])  # takes the events in
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
    """What the bare student takes for as many rows, as serving.py serves it."""
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
