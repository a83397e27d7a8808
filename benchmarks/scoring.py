"""What it costs to store teacher outputs: scoring over a bare pass, logging over plain training.

    python benchmarks/scoring.py [--json] [--quick] [--kills N]

Scoring reads Parquet files of 25,000 rows, in time order, each a shard; two ranks take alternate
files.

rows_per_s_over_bare_loop: rows a second of score() into a new store, over those of a bare loop over
    EvalPipelineSparseDist with the same files.
logging_over_plain_training: rows a second of training with TrainPipelineSparseDist and a
    TeacherLogger, its last flush included, over training without.
    Both are medians over pairs of runs in one process, whose order alternates. "over_by_core_time"
    is the same by the time of all threads together, as if there were one core.
peak_memory_200_over_50: a rank's peak memory when it scores 200 files, over that for 50 of them.
each_id_once: whether the store has each id once, after the ranks that score the 200 files were
    killed so many times ("kills"), at moments spread over the work.

The teacher is a DLRM under DistributedModelParallel: 26 tables of 100,000 rows of 16, dense part
256-128-16, over part 256-128-1. Features are random. All runs read files, or make batches of rows.
A rank computes on one thread and writes on another. "seconds" in the details are those of score(),
or of the training that is logged; of it in the pipeline; and, on the other thread, in writes.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import (
    FIRST,
    KEYS,
    NUM_DENSE,
    SCORER,
    SNAPSHOT,
    TABLE_ROWS,
    WINDOW,
    Batch,
    Stream,
    dlrm,
    sharded,
)
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineSparseDist
from training import on_ranks

from torchrec_exfm.das import Shard, TeacherLogger, TeacherStore, hash_ids, score

BATCH = 4096
COMMIT = 2**15  # rows
FILES, FILE_ROWS, HOUR = 200, 25_000, 3_600
DENSE = [f"dense{i}" for i in range(NUM_DENSE)]
AIMS = {
    "each_id_once": "True",
    "peak_memory_200_over_50": "1",
    "rows_per_s_over_bare_loop": ">= 0.9",
    "logging_over_plain_training": ">= 0.97",
}

Arm: TypeAlias = Callable[[TeacherStore, int], None]


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--kills", type=int, default=10, help="how often the ranks are killed")
    options = parser.parse_args()
    common.show(measure(options.quick, options.kills), options.json, AIMS)


def measure(quick: bool, kills: int = 10) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    files, pairs = (FILES // 10, 3) if quick else (FILES, 5)
    ranks = 1 if torch.cuda.device_count() == 1 else 2
    with tempfile.TemporaryDirectory(prefix="files-") as folder:
        for number in range(files):
            write_file(Path(folder), number, files)
        peaks = [on_ranks(ranks, peak_of_scoring, folder, part) for part in (files, files // 4)]
        killed = score_and_kill(folder, ranks, files, kills)
        details: dict[str, Any] = {
            "rows": files * FILE_ROWS,
            "files": files,
            "batch": BATCH,
            "commit": COMMIT,
            "ranks": ranks,
            "peak_memory_mib": [common.rounded(peak / 2**20) for peak in peaks],
            "killed": killed,
            "one_rank": on_ranks(1, run, folder, pairs),
        }
        if ranks == 2:
            details["two_ranks"] = on_ranks(2, run, folder, pairs)
    compared = details["two_ranks" if ranks == 2 else "one_rank"]
    return {
        "each_id_once": killed["each_id_once"],
        "kills": killed["kills"],
        "peak_memory_200_over_50": common.rounded(peaks[0] / peaks[1]),
        "rows_per_s_over_bare_loop": compared["scoring"]["over"]["median"],
        "logging_over_plain_training": compared["logging"]["over"]["median"],
        "details": details,
    }


def markdown(result: dict[str, Any]) -> str:
    details, killed = result["details"], result["details"]["killed"]
    ranks = [name for name in ("one_rank", "two_ranks") if name in details]
    rows = [
        ("scoring", "over", "**the scoring job over a bare `EvalPipelineSparseDist` loop**", "0.9"),
        ("scoring", "over_by_core_time", "the same by the time of all threads together", ""),
        ("logging", "over", "**training that logs over plain training**", "0.97"),
        ("logging", "over_by_core_time", "the same by the time of all threads together", ""),
    ]
    many, few = details["peak_memory_mib"]
    once = "Each id was there once" if result["each_id_once"] else "**NOT each id was there once**"
    return (
        f"Rows a second, in batches of {details['batch']:,} and commits of about "
        f"{details['commit']:,} rows. The writer has a thread of its own. Where the ranks leave it "
        "no core, it takes time from them.\n\n"
        + common.table(
            ["", *(name.replace("_", " ") for name in ranks), "aim"],
            [
                [text, *(details[name][job][field] for name in ranks), aim]
                for job, field, text, aim in rows
            ],
        )
        + f"\n\nOn {details['ranks']} ranks, {details['rows']:,} rows in {details['files']} files "
        f"took {many:,.0f} MiB on a rank, and a quarter of the files {few:,.0f} MiB, libraries and "
        f"model included. {once} after {result['kills']} kills, with {killed['shares']} of the "
        "rows in the store.\n"
    )


# ---- The files ----


def write_file(folder: Path, number: int, files: int) -> None:
    """Write rows in time order; all files together are one window of the reference stream."""
    generator = np.random.default_rng(number)
    places = torch.arange(number * FILE_ROWS, (number + 1) * FILE_ROWS)
    columns = {
        "example_ids": hash_ids(places).numpy(),
        "event_seconds": (FIRST * WINDOW + places * WINDOW // (files * FILE_ROWS)).numpy(),
        **{key: generator.integers(TABLE_ROWS, size=FILE_ROWS) for key in KEYS},
        **{name: generator.random(FILE_ROWS, np.float32) for name in DENSE},
    }
    options: Any = {"use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table(columns), folder / f"{number:03}.parquet", **options)


def batches_of(file: Path) -> Iterator[Batch]:
    for rows in pq.ParquetFile(file).iter_batches(BATCH, use_threads=False):
        columns = {name: torch.tensor(rows[name].to_numpy()) for name in rows.schema.names}
        values = torch.cat([columns[key] for key in KEYS])
        sparse = KeyedJaggedTensor(KEYS, values, lengths=torch.ones_like(values))
        dense = torch.stack([columns[name] for name in DENSE], dim=1)
        zeros = torch.zeros(len(dense))
        times = columns["event_seconds"]
        yield Batch(dense, sparse, zeros, columns["example_ids"], times, zeros)


def files_of(folder: str, files: int) -> list[Path]:
    """Return this rank's share of the first files."""
    return sorted(Path(folder).iterdir())[:files][dist.get_rank() :: dist.get_world_size()]


def shards_of(files: list[Path]) -> list[Shard]:
    return [Shard(file.name, partial(batches_of, file)) for file in files]


def score_files(
    model: torch.nn.Module, store: TeacherStore, files: list[Path], device: torch.device
) -> None:
    options: Any = {"device": device, "shard_rows": COMMIT, "progress": False}
    score(model, store, shards_of(files), SNAPSHOT, **options)


# ---- Memory, and kills ----


def new_store(folder: str, name: str) -> TeacherStore:
    store = TeacherStore.create(f"{folder}/{name}", window_seconds=HOUR)
    dist.barrier()
    return store


def peak_of_scoring(device: torch.device, folder: str, data: str, files: int) -> int:
    """Return the peak bytes of the rank that takes most, libraries and model included."""
    torch.set_num_threads(1)
    model, _ = sharded(dlrm(SCORER), device)
    score_files(model, new_store(folder, "store"), files_of(data, files), device)
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, common.memory("VmHWM"))
    return max(peaks)


def job(rank: int, ranks: int, folder: str, data: str, attempt: int, files: int) -> None:
    """Score a rank's files; this is the job that is killed."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{attempt}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model, _ = sharded(dlrm(SCORER))
    store = TeacherStore(f"{folder}/store")
    score_files(model, store, files_of(data, files), torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()


def score_and_kill(data: str, ranks: int, files: int, kills: int) -> dict[str, Any]:
    """Start a job and kill it, many times, then let it end; return what is in the store."""
    with tempfile.TemporaryDirectory(prefix="killed-") as folder:
        store = TeacherStore.create(f"{folder}/store", window_seconds=HOUR)
        log, shares, attempts = Path(store.table.url, "_delta_log"), [], itertools.count()

        def start() -> Any:
            arguments = ranks, folder, data, next(attempts), files
            return mp.start_processes(job, arguments, ranks, join=False)

        for kill in range(kills):
            context = start()
            # Each shard makes two commits: its rows, and the mark that it is done
            until = 2 * files * (kill + random.random()) / kills
            while len(list(log.glob("*.json"))) - 1 < until:
                if context.join(timeout=0.002):  # it raises the error of a failed process
                    raise RuntimeError("the job ended before it was to be killed")
            for process in random.sample(context.processes, ranks):
                process.kill()
                process.join()
            store.refresh()
            rows = sum(file.rows or 0 for file in store.table.files())
            shares.append(f"{rows / (files * FILE_ROWS):.0%}")
        context = start()
        while not context.join():  # it returns after each process that ends
            pass
        store.refresh()
        ids = [store.read_file(file).example_id for file in store.table.files()]
        expected = np.sort(hash_ids(torch.arange(files * FILE_ROWS)).numpy())
        once = np.array_equal(np.sort(np.concatenate(ids)), expected)
    return {"each_id_once": once, "kills": len(shares), "shares": ", ".join(shares)}


# ---- What it costs beside a bare loop ----


def run(device: torch.device, folder: str, data: str, pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    bench = Bench(device, folder, data)
    files = 5 * dist.get_world_size()
    return {
        "scoring": bench.compare(pairs, files * FILE_ROWS, bench.bare_eval, bench.score),
        "logging": bench.compare(pairs, 2**17, bench.train, bench.train_and_log),
    }


class Bench:
    """The runs that are compared; all ranks take part in each."""

    def __init__(self, device: torch.device, folder: str, data: str) -> None:
        self.device, self.folder, self.data = device, folder, data
        self.stores = itertools.count()
        torch.manual_seed(0)
        self.model, self.optimizer = sharded(dlrm(SCORER), device)
        self.stream = Stream(2**17)
        self.spent: Counter[str] = Counter()
        self.watch("pipeline", EvalPipelineSparseDist, "progress")
        self.watch("pipeline", TrainPipelineSparseDist, "progress")
        self.watch("write", TeacherStore, "write")

    def watch(self, part: str, owner: type, name: str) -> None:
        """Add up the seconds that a method takes."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent[part] += time.perf_counter() - started

        setattr(owner, name, watched)

    def score(self, store: TeacherStore, rows: int) -> None:
        score_files(self.model, store, files_of(self.data, rows // FILE_ROWS), self.device)

    def bare_eval(self, store: TeacherStore, rows: int) -> None:
        files = files_of(self.data, rows // FILE_ROWS)
        with torch.no_grad():
            pipeline = EvalPipelineSparseDist(self.model.eval(), self.optimizer, self.device)
            self.drain(pipeline, itertools.chain.from_iterable(map(batches_of, files)))

    def train(self, store: TeacherStore, rows: int) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        places = torch.arange(rows).chunk(ranks)[rank].split(BATCH)
        pipeline = TrainPipelineSparseDist(self.model.train(), self.optimizer, self.device)
        self.drain(pipeline, map(self.stream.batch, places))

    def train_and_log(self, store: TeacherStore, rows: int) -> None:
        with TeacherLogger(store, "fm", shard_rows=COMMIT // dist.get_world_size()) as logger:
            logger.attach(self.model)
            self.train(store, rows)

    def drain(self, pipeline: Any, feed: Iterator[Batch]) -> None:
        try:
            while True:
                pipeline.progress(feed)
        except StopIteration:
            pipeline.detach()

    def compare(self, pairs: int, rows: int, bare: Arm, stored: Arm) -> dict[str, Any]:
        """Return the rate of `stored` over that of `bare`, and where `stored` spent its time."""
        times: dict[Arm, list[common.Time]] = {bare: [], stored: []}
        spent: list[Counter[str]] = []
        for pair in range(-1, pairs):  # the first warms up
            for arm in (bare, stored) if pair % 2 else (stored, bare):
                store = new_store(self.folder, str(next(self.stores)))
                self.spent.clear()
                times[arm].append(common.timed(arm, store, rows))
                if arm == stored:
                    spent.append(self.spent.copy())
        walls, cores = (np.array([times[arm][1:] for arm in times])[:, :, i] for i in (0, 1))
        return {
            "over": common.spread(walls[0] / walls[1]),
            "over_by_core_time": common.spread(cores[0] / cores[1]),
            "bare_rows_per_s": common.spread(rows / walls[0]),
            "rows_per_s": common.spread(rows / walls[1]),
            "seconds": {
                "all": common.spread(walls[1]),
                **{part: common.spread([run[part] for run in spent[1:]]) for part in spent[0]},
            },
        }


if __name__ == "__main__":
    main()
