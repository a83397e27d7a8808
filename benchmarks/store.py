"""The teacher store on one core: bytes of its rows, and the rates of writes and look-ups.

    python benchmarks/store.py [--json] [--quick] [--rows N] [--embeddings]

All rows lie in one time window, 2^18 in a commit. Ids are random (hash_ids) or sequential. At the
top level bytes on disk are of sequential ids, all else of random ones, at bfloat16; the rest is in
the details.

A look-up is a whole TeacherLookup(batch) of 8192 examples at random places in the window: ids and
times from the batch, threads, index, checks, counters. The gather that it is compared with is
numpy's take of the same rows, by position, from records of 16 bytes (id, age, value).

host_memory_over_one_process: 8 processes of one host, on all cores, look up the window (--rows)
through mapped files. The host's memory is what the processes and their reader have privately beyond
what they had before, and the files once. It is compared with that of one process that reads on a
thread of its own.

Embeddings are measured on 2^18 rows of random ids in one commit, each width and resolution against
none. They resemble a teacher's hidden layer: 64 normal inputs through a random linear layer, then
ReLU or tanh. --embeddings measures these alone, and prints a table.

Everything else is pinned to one core. Rates are medians over batches, commits or reads, by the time
that the process had the core, so that other work counts less; "on_the_wall" is by the clock.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
import torch
from reference import FIRST, SNAPSHOT, WINDOW

from torchrec_exfm.das import TeacherLookup, TeacherStore, hash_ids
from torchrec_exfm.das.host import default_folder
from torchrec_exfm.das.index import WindowIndex

BATCH, BATCHES, COMMIT = 8192, 400, 2**18
PROCESSES = 8
AIMS = {
    "host_memory_over_one_process": "<= 1.2",
    "lookup_rows_per_s": ">= 5 M",
    "bytes_per_row_in_memory": "<= 24",
    "bytes_per_row_on_disk": "<= 2",
}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--rows", type=int, help="of the window (10 million; --quick: 1 million)")
    parser.add_argument("--embeddings", action="store_true", help="a table of these alone")
    options = parser.parse_args()
    if options.embeddings:
        pin()
        print(table_of_embeddings(embeddings(options.quick)))
        return
    common.show(measure(options.quick, options.rows), options.json, AIMS)


def measure(quick: bool, rows: int | None = None) -> dict[str, Any]:
    rows = rows or (1_000_000 if quick else 10_000_000)
    pin()
    details: dict[str, Any] = {"rows": rows, "batch": BATCH, "rows_of_a_commit": COMMIT}
    with tempfile.TemporaryDirectory(prefix="benchmark-store-") as folder:
        write(f"{folder}/small", "random", rows=1)
        for ids in ("random", "sequential"):
            url, exact = f"{folder}/{ids}", f"{folder}/float32/{ids}"
            times = write(url, ids, rows)
            write(exact, ids, rows, resolution="float32")
            details[ids] = {
                "write_rows_per_s": common.rates(times),
                "bytes_per_row_on_disk": bytes_per_row(url, rows),
                "bytes_per_row_on_disk_float32": bytes_per_row(exact, rows),
                **common.in_process(look_up, folder, ids, rows),
            }
        details["host"] = host(folder, rows)
        details["windows_x10"] = windows_x10(folder, rows // 100)
    details["embeddings"] = embeddings(quick)
    random, sequential = details["random"], details["sequential"]
    return {
        "write_rows_per_s": random["write_rows_per_s"]["median"],
        "lookup_rows_per_s": random["lookup_rows_per_s"]["median"],
        "lookup_over_gather": random["lookup_over_gather"]["median"],
        "bytes_per_row_on_disk": sequential["bytes_per_row_on_disk"],
        "bytes_per_row_in_memory": random["bytes_per_row_in_memory"],
        "host_memory_over_one_process": details["host"]["memory_over_one_process"],
        "details": details,
    }


def pin() -> None:
    """Pin this process, and those that it starts from now on, to one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"


def markdown(result: dict[str, Any]) -> str:
    details = result["details"]
    columns = (details["random"], details["sequential"])
    rows = [
        ("lookup_rows_per_s", "**look-up through `TeacherLookup`, rows/s**", "5 M"),
        ("mapped_rows_per_s", "**the same through the mapped files of a host, rows/s**", "5 M"),
        (
            "first_mapped_over_first",
            "time of the first look-up of a window, mapped files over memory",
            "1",
        ),
        ("index_rows_per_s", "the index alone (`WindowIndex.find`), rows/s", ""),
        ("gather_rows_per_s", "a plain gather of the same records by position, rows/s", ""),
        ("lookup_over_gather", "look-up over gather", ""),
        ("bytes_per_row_in_memory", "**bytes a row in memory: the index**", "24"),
        ("bytes_per_row_resident", "the same, as resident memory of the process", ""),
        ("bytes_per_row_at_peak_of_read", "at the peak of reading a window", ""),
        ("bytes_per_row_on_disk", "**bytes a row on disk, bfloat16**", "2 (sequential)"),
        ("bytes_per_row_on_disk_float32", "bytes a row on disk, float32", ""),
        ("write_rows_per_s", "written, rows/s", ""),
        ("read_rows_per_s", "a window read into memory, rows/s", ""),
    ]
    windows = details["windows_x10"]
    with_embeddings = details.get("embeddings")  # earlier measured files have none
    return (
        f"{common.cell(details['rows'])} rows of one task in one time window, batches of "
        f"{details['batch']:,}, on one core. Rates are by the time that the process had the "
        "core.\n\n"
        + common.table(
            ["", "random ids", "sequential ids", "aim"],
            [[text, *(column[field] for column in columns), aim] for field, text, aim in rows],
        )
        + f"\n\nWith 100 windows of {windows['rows_of_a_window']:,} rows instead of 10, "
        f"visited in order, look-ups have {common.cell(windows['rows_per_s_ratio'])} times the "
        f"rate, and the peak of memory is {common.cell(windows['peak_ratio'])} times as high."
        + (
            "\n\nWith embeddings of width E, bytes a row:\n\n"
            f"{table_of_embeddings(with_embeddings)}"
            if with_embeddings
            else ""
        )
    )


def write(
    url: str, ids: str, rows: int, window: int = 0, resolution: str = "bfloat16"
) -> list[tuple[int, common.Time]]:
    """Write the rows of a window into a store; return the rows and the time of each commit."""
    store = TeacherStore.create(url, window_seconds=WINDOW, resolution=resolution)
    random = np.random.default_rng(window)
    times = []
    for places in np.array_split(np.arange(rows), range(COMMIT, rows, COMMIT)):
        outputs = random.normal(-2.0, 1.5, len(places)).astype(np.float32)
        part = examples(places, ids, rows, window)
        arguments = (SNAPSHOT, part.example_ids, outputs, part.event_seconds)
        times.append((len(places), common.timed(store.write, *arguments)))
    return times


def embeddings(quick: bool) -> list[dict[str, Any]]:
    """Measure bytes a row and look-ups, for each width and resolution, and without embeddings."""
    cases = [(0, "float16"), *itertools.product((16, 32, 64), ("float16", "int8"))]
    rows = 2**15 if quick else COMMIT
    with tempfile.TemporaryDirectory(prefix="benchmark-store-") as folder:
        return common.in_process(_embeddings, folder, rows, cases)


def _embeddings(folder: str, rows: int, cases: list[tuple[int, str]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    part = examples(np.arange(rows), "random", rows)
    outputs = random.normal(-2.0, 1.5, rows).astype(np.float32)
    inputs = random.normal(size=(rows, 64)).astype(np.float32)
    results, lookups = [], []
    for width, resolution in cases:
        hidden = inputs @ random.normal(0, 0.125, (64, width)).astype(np.float32)
        result: dict[str, Any] = {"rows": rows, "width": width, "resolution": resolution}
        for name, layer in (("relu", np.maximum(hidden, 0)), ("tanh", np.tanh(hidden))):
            url = f"{folder}/{name}-{width}-{resolution}"
            kind: Any = {"embedding_width": width, "embedding_resolution": resolution}
            store = TeacherStore.create(url, window_seconds=WINDOW, **kind)
            columns = {"embeddings": layer} if width else {}
            store.write(SNAPSHOT, part.example_ids, outputs, part.event_seconds, **columns)
            result[f"bytes_per_row_on_disk_{name}"] = bytes_per_row(url, rows)
        lookup = TeacherLookup(TeacherStore(url), "fm", embeddings=width > 0)
        lookup(part)
        (window,) = lookup._windows["fm"]._held.values()
        result["bytes_per_row_in_memory"] = common.rounded(window.result().index.nbytes / rows)
        results.append(result)
        lookups.append(lookup)
    times: list[list[tuple[int, common.Time]]] = [[] for _ in cases]
    for batch in random_batches("random", rows, BATCHES // 4):
        for case_times, lookup in zip(times, lookups, strict=True):
            case_times.append((BATCH, common.timed(lookup, batch)))
    for result, case_times in zip(results, times, strict=True):
        result["lookup_rows_per_s"] = common.rates(case_times)
    return results


def table_of_embeddings(results: list[dict[str, Any]]) -> str:
    fields = ("bytes_per_row_on_disk_relu", "bytes_per_row_on_disk_tanh", "bytes_per_row_in_memory")
    header = ["", "on disk, ReLU", "on disk, tanh", "in memory", "look-up, rows/s"]
    rows = []
    for result in results:
        kind = "E = {width}, {resolution}" if result["width"] else "no embeddings"
        figures = [result[field] for field in (*fields, "lookup_rows_per_s")]
        rows.append([kind.format(**result), *figures])
    return common.table(header, rows)


def bytes_per_row(url: str, rows: int) -> float:
    files = [file for file in Path(url).rglob("*") if file.is_file()]
    return common.rounded(sum(file.stat().st_size for file in files) / rows)


def examples(places: Any, ids: str, rows: int, window: int = 0) -> SimpleNamespace:
    """Return a batch of the examples at places in a window; event times follow the places."""
    place = torch.from_numpy(places)
    number = place + window * rows
    return SimpleNamespace(
        places=places,
        example_ids=hash_ids(number) if ids == "random" else number + 10**12,
        event_seconds=(FIRST + window) * WINDOW + place * WINDOW // rows,
    )


def random_batches(ids: str, rows: int, count: int, window: int = 0) -> list[SimpleNamespace]:
    random = np.random.default_rng(window)
    return [examples(random.integers(0, rows, BATCH), ids, rows, window) for _ in range(count)]


def ready(folder: str) -> int:
    """Return the memory of this process once its libraries have read something."""
    torch.set_num_threads(1)
    TeacherLookup(TeacherStore(f"{folder}/small"), "fm")(examples(np.arange(1), "random", 1))
    return common.memory("VmRSS", new_peak=True)


def look_up(folder: str, ids: str, rows: int) -> dict[str, Any]:
    """Measure the first look-up of a window, then batches, against the index and gathers alone."""
    batches = random_batches(ids, rows, BATCHES)
    store = TeacherStore(f"{folder}/{ids}")
    before = ready(folder)
    lookup = TeacherLookup(store, "fm")
    reads = [common.timed(lookup, batches[0])]
    resident, peak = (common.memory(name) - before for name in ("VmRSS", "VmHWM"))
    mapped: list[TeacherLookup] = []
    mapped_seconds = []
    for number in range(2):
        mapped.append(TeacherLookup(store, "fm", host_folder=shared(), exclude=[100 + number]))
        mapped[-1](examples(np.arange(1), ids, rows, 1_000))  # its reader has started
        mapped_seconds.append(common.timed(mapped[-1], batches[0])[0])
        reads.append(common.timed(TeacherLookup(store, "fm"), batches[0]))
    mapped.pop(0).close()
    stored, _ = store.read("fm", FIRST)
    index = WindowIndex(stored.example_id, stored.outputs, stored.age_seconds)
    del stored
    records = np.empty(rows, [("id", "i8"), ("age", "f4"), ("value", "f4")])
    records["id"], records["age"], records["value"] = np.arange(rows), 1.0, 1.0
    values = records["value"].copy()
    arms: dict[str, Callable[[Any], Any]] = {
        "lookup": lookup,
        "mapped": mapped[0],
        "index": lambda batch: index.find(batch.example_ids.numpy()),
        "gather": lambda batch: records.take(batch.places),
        "gather_of_values": lambda batch: values.take(batch.places),
    }
    times: dict[str, list[tuple[int, common.Time]]] = {name: [] for name in arms}
    for batch in batches:
        for name, arm in arms.items():
            times[name].append((BATCH, common.timed(arm, batch)))
    assert lookup.counters["fm"].coverage == 1
    core = {name: [core for _, (_, core) in times[name]] for name in arms}
    return {
        **{f"{name}_rows_per_s": common.rates(times[name]) for name in arms},
        **{
            f"lookup_over_{name}": common.spread(np.divide(core[name], core["lookup"]))
            for name in ("mapped", "gather", "gather_of_values")
        },
        "first_mapped_over_first": common.spread(
            [seconds / read for seconds, (read, _) in zip(mapped_seconds, reads[1:], strict=True)]
        ),
        "read_rows_per_s": common.rates([(rows, read) for read in reads]),
        "bytes_per_row_in_memory": common.rounded(index.nbytes / rows),
        "bytes_per_row_resident": common.rounded(resident / rows),
        "bytes_per_row_at_peak_of_read": common.rounded(peak / rows),
    }


def host(folder: str, rows: int) -> dict[str, Any]:
    """Measure memory and look-ups of 8 processes with a reader, against one process."""
    single = common.in_process(processes_of_a_host, folder, rows, 1, None)
    several = common.in_process(processes_of_a_host, folder, rows, PROCESSES, shared())
    return {
        "memory_over_one_process": common.rounded(several["memory"] / single["memory"]),
        "bytes_per_row_one_process": common.rounded(single["memory"] / rows),
        "bytes_per_row_of_the_host": common.rounded(several["memory"] / rows),
        "processes": PROCESSES,
        "mapped_rows_per_s": several["rows_per_s"],
    }


def shared() -> str:
    """Return a new folder for the files of a host, in memory if that is large enough."""
    return tempfile.mkdtemp(prefix="benchmark-store-", dir=default_folder())


def processes_of_a_host(
    folder: str, rows: int, count: int, host_folder: str | None
) -> dict[str, Any]:
    """Fork processes before anything is read; let one after the other look up, as cores are few."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe() for _ in range(count)]
    workers = [
        context.Process(target=answer_on_host, args=(folder, rows, host_folder, end), daemon=True)
        for _, end in ends
    ]
    for worker in workers:
        worker.start()
    answers: dict[str, list[Any]] = {"ready": [], "first": [], "batches": [], "memory": []}
    for name, answer in answers.items():
        for connection, _ in ends:
            connection.send(name)
            answer.append(connection.recv())
    reader = 0
    if host_folder is not None:
        (lock,) = Path(host_folder).glob("torchrec_exfm-*/*/reader")
        reader = sum(private_bytes(pid) for pid in holders(lock))
        reader += sum(file.stat().st_size for file in lock.parent.rglob("*") if file.is_file())
    for worker in workers:
        worker.kill()
    return {
        "memory": sum(answers["memory"]) + reader,
        "rows_per_s": common.rates(list(itertools.chain(*answers["batches"]))),
    }


def answer_on_host(folder: str, rows: int, host_folder: str | None, connection: Any) -> None:
    """Do what the connection asks for, one request after the other, and send the answers."""
    torch.set_num_threads(1)
    batches = random_batches("random", rows, BATCHES // PROCESSES)
    small = TeacherLookup(TeacherStore(f"{folder}/small"), "fm")
    small(examples(np.arange(1), "random", 1))
    lookup = TeacherLookup(TeacherStore(f"{folder}/random"), "fm", host_folder=host_folder)
    before = private_bytes(os.getpid())
    work: dict[str, Callable[[], Any]] = {
        "ready": lambda: None,
        "first": lambda: len(lookup(batches[0]).values),
        "batches": lambda: [(BATCH, common.timed(lookup, batch)) for batch in batches],
        "memory": lambda: private_bytes(os.getpid()) - before,
    }
    while True:
        connection.send(work[connection.recv()]())


def private_bytes(pid: int) -> int:
    """Return the bytes of memory that a process does not share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def holders(lock: Path) -> list[int]:
    """Return the other processes that have a file open."""
    pids = [int(process.name) for process in Path("/proc").iterdir() if process.name.isdecimal()]
    return [pid for pid in pids if pid != os.getpid() and str(lock) in opened(pid)]


def opened(pid: int) -> set[str]:
    names = set()
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.add(os.readlink(file))
    return names


def windows_x10(folder: str, rows: int) -> dict[str, Any]:
    """Compare a table of 100 windows with tables of 10, looked up in order of windows."""
    for window in range(100):
        write(f"{folder}/many", "random", rows, window)
    for window in range(50):
        write(f"{folder}/few/{window // 10}", "random", rows, window)
    _, few = common.in_process(visit, folder, rows, ["few"], 1)
    _, many = common.in_process(visit, folder, rows, ["many"], 10)
    times, _ = common.in_process(visit, folder, rows, ["few", "many"], 5)
    core = {name: [core for _, (_, core) in pairs] for name, pairs in times.items()}
    return {
        "rows_of_a_window": rows,
        "rows_per_s_10_windows": common.rates(times["few"]),
        "rows_per_s_100_windows": common.rates(times["many"]),
        "rows_per_s_ratio": common.spread(np.divide(core["few"], core["many"])),
        "peak_mib_10_windows": few,
        "peak_mib_100_windows": many,
        "peak_ratio": common.rounded(many / few),
    }


def visit(folder: str, rows: int, tables: list[str], tens: int) -> tuple[Any, float]:
    """Look up as many rows as the windows have, ten windows at a time, in turns in each table."""
    count = -(-rows // BATCH)
    by_window = [random_batches("random", rows, count, window) for window in range(10 * tens)]
    before = ready(folder)
    many = TeacherLookup(TeacherStore(f"{folder}/many"), "fm")
    times: dict[str, list[tuple[int, common.Time]]] = {table: [] for table in tables}
    for number in range(tens):
        batches = list(itertools.chain(*by_window[10 * number :][:10]))
        few = TeacherLookup(TeacherStore(f"{folder}/few/{number % 5}"), "fm")
        for table in tables[:: 1 if number % 2 else -1]:
            lookup = many if table == "many" else few
            seconds = common.timed(list, map(lookup, batches))
            times[table].append((len(batches) * BATCH, seconds))
            assert lookup.counters["fm"].coverage == 1
    return times, common.rounded((common.memory("VmHWM") - before) / 2**20)


if __name__ == "__main__":
    main()
