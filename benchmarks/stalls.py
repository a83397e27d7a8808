"""How long a store that is slow or hangs stalls training.

    python benchmarks/stalls.py [--json] [--quick]

A small student trains with an auxiliary head, through TrainPipelineExFM(teacher=TeacherLookup(...),
on_teacher_error="mask"), on a store behind the tests' S3 server, which has faults on demand. A
stall is the time of a step beyond the median step of its run. Each case trains for 40 s.

longest_stall_ms_hanging: the server accepts requests and does not answer those of data files in one
    run, those of the log in another. The longest stall of both, beyond the look-up's deadline (2
    s). The details count stalls above 0.1 s; the wait for the deadline is one. In this time the
    storage library retries, and so does on_teacher_error.
longest_stall_ms_slow: every request takes 1 s, and batches enter the next window every 12 s, which
    has been read ahead by then. The wait for the first window is left out.
longest_stall_ms_without: of the same steps without a store, with teacher outputs as columns. It
    tells what the machine itself does.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from reference import SNAPSHOT, WIDTH, WINDOW, Batch, Sizes, Stream
from training import AH, columns, exfm, on_ranks

from torchrec_exfm.das import StoreError, TeacherLookup, TeacherStore

sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))
from s3_server import S3Server, s3_server

AIMS = {"longest_stall_ms_hanging": "< 100", "longest_stall_ms_slow": "< 50"}
SIZES = Sizes((32, WIDTH), (32, 1))
BATCH, ROWS, WINDOWS = 256, 2**14, 5
DEADLINE_SECONDS, LATENCY_SECONDS = 2.0, 1.0
SECONDS, WINDOW_SECONDS = 40.0, 12.0  # of a run, and in a window where requests are slow


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(on_ranks(1, measure, options.quick), options.json, AIMS)


def measure(device: torch.device, _: str, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    stream = Stream(ROWS)
    batches = stream.pool(8, BATCH)
    seconds = SECONDS / 4 if quick else SECONDS
    with s3_server() as server:
        store = stored(server, stream)
        runs = {
            "data_files": hanging(device, server, store, batches, ".parquet", seconds),
            "log": hanging(device, server, store, batches, "_delta_log", seconds),
            "slow": slow(device, server, store, batches, 2 if quick else WINDOWS - 1),
        }
    steps = step_seconds(exfm(device, AH, columns, SIZES), in_window(batches, 0), seconds)
    without = np.array(steps) - np.median(steps)
    late = {name: runs[name] - DEADLINE_SECONDS for name in ("data_files", "log")}
    return {
        "longest_stall_ms_hanging": milliseconds(max(stalls.max() for stalls in late.values())),
        "longest_stall_ms_slow": milliseconds(runs["slow"].max()),
        "longest_stall_ms_without": milliseconds(without.max()),
        "details": {
            **{f"{name}_beyond_the_deadline_ms": milliseconds(late[name].max()) for name in late},
            **{f"{name}_stalls_above_100_ms": int((runs[name] > 0.1).sum()) for name in runs},
            **{f"{name}_steps": len(runs[name]) for name in runs},
            "deadline_seconds": DEADLINE_SECONDS,
            "latency_seconds": LATENCY_SECONDS,
        },
    }


def markdown(result: dict[str, Any]) -> str:
    details = result["details"]
    rows = [
        ["data files hang, beyond the deadline", details["data_files_beyond_the_deadline_ms"]],
        ["the log hangs, beyond the deadline", details["log_beyond_the_deadline_ms"]],
        ["a request takes 1 s", result["longest_stall_ms_slow"]],
        ["no store", result["longest_stall_ms_without"]],
    ]
    names = "data_files", "log", "slow"
    counts = [*(details[f"{name}_stalls_above_100_ms"] for name in names), ""]
    steps = [*(details[f"{name}_steps"] for name in names), ""]
    columns = [[*row, *more] for row, *more in zip(rows, counts, steps, strict=True)]
    header = ["", "longest stall, ms", "stalls above 0.1 s", "steps"]
    return (
        "A stall is the time of a step beyond the median step. A look-up's deadline is "
        f"{details['deadline_seconds']:g} s. The time beyond it may be negative, as look-ups begin "
        "two batches early.\n\n" + common.table(header, columns)
    )


def stored(server: S3Server, stream: Stream) -> TeacherStore:
    """Store the stream's logits, with the same ids in each window."""
    options = server.storage_options
    url = f"{server.url}/store"
    store = TeacherStore.create(url, window_seconds=WINDOW, storage_options=options)
    for window in range(WINDOWS):
        store.write(SNAPSHOT, stream.ids, stream.logits, stream.seconds + window * WINDOW)
    return store


def hanging(
    device: torch.device,
    server: S3Server,
    store: TeacherStore,
    batches: list[Batch],
    requests: str,
    seconds: float,
) -> Any:
    """Return the stalls, in seconds, while requests for a window hang."""
    with looked_up(store, batches, timeout_seconds=DEADLINE_SECONDS) as lookup:
        pipeline = exfm(device, AH, lookup, SIZES, on_teacher_error="mask")
        step_seconds(pipeline, in_window(batches, 0), 3.0)  # window 1 is read ahead
        server.set_faults(hanging=requests)
        steps = step_seconds(pipeline, in_window(batches, WINDOWS - 1), seconds)
        assert pipeline.teacher_failures > 0, "the store answered"
        server.set_faults()
    return np.array(steps) - np.median(steps)


def slow(
    device: torch.device,
    server: S3Server,
    store: TeacherStore,
    batches: list[Batch],
    windows: int,
) -> Any:
    """Return the stalls, in seconds, while requests are slow and windows are read ahead."""
    server.set_faults(latency_seconds=LATENCY_SECONDS)
    with looked_up(store, batches) as lookup:
        pipeline = exfm(device, AH, lookup, SIZES, on_teacher_error="mask")
        step_seconds(pipeline, in_window(batches, 0), WINDOW_SECONDS)  # window 1 is read ahead
        steps = []
        for window in range(1, windows + 1):
            steps += step_seconds(pipeline, in_window(batches, window), WINDOW_SECONDS)
        assert pipeline.teacher_failures == 0
        assert lookup.counters["fm"].coverage == 1
    server.set_faults()
    return np.array(steps) - np.median(steps)


def looked_up(store: TeacherStore, batches: list[Batch], **options: Any) -> TeacherLookup:
    """Return a look-up that has its first window."""
    folder = tempfile.mkdtemp(prefix="benchmark-stalls-")
    lookup = TeacherLookup(store, "fm", host_folder=folder, **options)
    while not lookup.counters["fm"].present:  # until its reader has started
        with contextlib.suppress(StoreError):
            lookup(batches[0])
    return lookup


def in_window(batches: list[Batch], window: int) -> Iterator[Batch]:
    while True:
        for batch in batches:
            yield replace(batch, event_seconds=batch.event_seconds + window * WINDOW)


def step_seconds(pipeline: Any, feed: Iterator[Batch], seconds: float) -> list[float]:
    """Train for some seconds; return the time of each step."""
    times = [time.perf_counter()]
    while times[-1] < times[0] + seconds:
        pipeline.progress(feed)
        times.append(time.perf_counter())
    return np.diff(times).tolist()


def milliseconds(seconds: float) -> float:
    return common.rounded(1000 * float(seconds))


if __name__ == "__main__":
    main()
