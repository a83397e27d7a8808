"""What it costs to keep a teacher's outputs: scoring beside a bare pass, logging beside training.

    python benchmarks/scoring.py [--json] [--quick]

scoring_over_bare_eval: rows a second of score() into a new store, over those of a bare loop over
EvalPipelineSparseDist with the same batches. logging_over_plain_training: the same of training with
TrainPipelineSparseDist and a TeacherLogger, its last flush included, over training without. Medians
over pairs of runs in one process, whose order turns from pair to pair; "over_by_core_time" is the
same by the time of all threads together, as if there were one core.
teacher_calls_per_unique_example: rows that went through the teacher as three students that overlap
were scored, and scored again, over distinct ids.

The teacher is a DLRM under DistributedModelParallel: 26 tables of 100,000 rows of 16, dense part
256-128-16, over part 256-128-1. Features are random and made beforehand; to make batches of them is
part of all runs. A rank computes on one thread and writes on another. "seconds" in the details are
those of score(), or of the training that is logged, and of it in the pipeline, in reading the store
and, on the other thread, in writing it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import common
import numpy as np
import torch
import torch.distributed as dist
from reference import SCORER, SNAPSHOT, WINDOW, Stream, dlrm, sharded
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineSparseDist
from training import on_ranks

from torchrec_exfm.das import Examples, TeacherLogger, TeacherStore, score

BATCH = 4096
COMMIT = 2**15  # rows
AIMS = {
    "scoring_over_bare_eval": ">= 0.9",
    "logging_over_plain_training": ">= 0.97",
    "teacher_calls_per_unique_example": "1",
}

Arm: TypeAlias = Callable[[TeacherStore, int], None]


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(measure(options.quick), options.json, AIMS)


def measure(quick: bool) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = 2**17 if quick else 2**18
    one = on_ranks(1, run, rows, 5)
    details: dict[str, Any] = {"rows": rows, "batch": BATCH, "commit": COMMIT, "one_rank": one}
    if not quick and torch.cuda.device_count() != 1:
        details["two_ranks"] = on_ranks(2, run, rows, 3)
    return {
        "scoring_over_bare_eval": one["scoring"]["over"]["median"],
        "logging_over_plain_training": one["logging"]["over"]["median"],
        "teacher_calls_per_unique_example": one["teacher_calls_per_unique_example"],
        "details": details,
    }


def markdown(result: dict[str, Any]) -> str:
    details = result["details"]
    ranks = [name for name in ("one_rank", "two_ranks") if name in details]
    rows = [
        ("scoring", "over", "**the scoring job over a bare `EvalPipelineSparseDist` loop**", "0.9"),
        ("scoring", "over_by_core_time", "the same by the time of all threads together", ""),
        ("logging", "over", "**training that logs over plain training**", "0.97"),
        ("logging", "over_by_core_time", "the same by the time of all threads together", ""),
    ]
    calls = [details[name]["teacher_calls_per_unique_example"] for name in ranks]
    return (
        f"Rows a second, {details['rows']:,} rows, batches of {details['batch']:,}, "
        f"{details['commit']:,} rows a commit. The writer has a thread of its own; where the ranks "
        "leave it no core it costs what it costs.\n\n"
        + common.table(
            ["", *(name.replace("_", " ") for name in ranks), "aim"],
            [
                *(
                    [text, *(details[name][of][field] for name in ranks), aim]
                    for of, field, text, aim in rows
                ),
                [
                    "rows through the teacher for each distinct example of three students",
                    *calls,
                    "1",
                ],
            ],
        )
    )


def run(device: torch.device, folder: str, rows: int, pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    bench, few = Bench(device, folder, rows), rows // 2  # as training is slower
    return {
        "scoring": bench.compare(pairs, rows, bench.bare_eval, bench.score),
        "logging": bench.compare(pairs, few, bench.train, bench.train_and_log),
        **bench.students(rows),
    }


class Bench:
    """The runs; all ranks take each together."""

    def __init__(self, device: torch.device, folder: str, rows: int) -> None:
        self.device, self.folder, self.stores = device, folder, itertools.count()
        torch.manual_seed(0)
        self.model, self.optimizer = sharded(dlrm(SCORER), device)
        self.stream = Stream(rows)
        self.spent: Counter[str] = Counter()
        self.watch("pipeline", EvalPipelineSparseDist, "progress")
        self.watch("pipeline", TrainPipelineSparseDist, "progress")
        self.watch("read", TeacherStore, "read")
        self.watch("write", TeacherStore, "write")

    def watch(self, what: str, owner: type, name: str) -> None:
        """Add up the seconds that a method takes."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent[what] += time.perf_counter() - started

        setattr(owner, name, watched)

    def score(self, store: TeacherStore, rows: int, *students: Examples) -> None:
        options: Any = {"device": self.device, "batch_size": BATCH, "shard_rows": COMMIT}
        examples = students or [self.stream.examples(0, rows)]
        score(self.model, store, examples, SNAPSHOT, progress=False, **options)

    def bare_eval(self, store: TeacherStore, rows: int) -> None:
        with torch.no_grad():
            self.drain(EvalPipelineSparseDist(self.model.eval(), self.optimizer, self.device), rows)

    def train(self, store: TeacherStore, rows: int) -> None:
        self.drain(TrainPipelineSparseDist(self.model.train(), self.optimizer, self.device), rows)

    def train_and_log(self, store: TeacherStore, rows: int) -> None:
        with TeacherLogger(store, "fm", shard_rows=COMMIT // dist.get_world_size()) as logger:
            logger.attach(self.model)
            self.train(store, rows)

    def drain(self, pipeline: Any, rows: int) -> None:
        """A rank's part of the rows, divided as score() does it."""
        shards = torch.arange(rows).split(COMMIT)
        mine = [shard.chunk(dist.get_world_size())[dist.get_rank()] for shard in shards]
        feed = (self.stream.batch(at) for part in mine for at in part.split(BATCH))
        try:
            while True:
                pipeline.progress(feed)
        except StopIteration:
            pipeline.detach()

    def compare(self, pairs: int, rows: int, bare: Arm, kept: Arm) -> dict[str, Any]:
        """The rate of the second over that of the first, and where the second spent its time."""
        times: dict[Arm, list[common.Time]] = {bare: [], kept: []}
        spent: list[Counter[str]] = []
        for pair in range(-1, pairs):  # the first is to warm up
            for arm in (bare, kept) if pair % 2 else (kept, bare):
                store = self.new_store()
                self.spent.clear()
                times[arm].append(common.timed(arm, store, rows))
                if arm == kept:
                    spent.append(self.spent.copy())
        walls, cores = (np.array([times[arm][1:] for arm in times])[:, :, i] for i in (0, 1))
        return {
            "over": common.spread(walls[0] / walls[1]),
            "over_by_core_time": common.spread(cores[0] / cores[1]),
            "bare_rows_per_s": common.spread(rows / walls[0]),
            "rows_per_s": common.spread(rows / walls[1]),
            "seconds": {
                "all": common.spread(walls[1]),
                **{what: common.spread([each[what] for each in spent[1:]]) for what in spent[0]},
            },
        }

    def new_store(self) -> TeacherStore:
        store = TeacherStore.create(f"{self.folder}/{next(self.stores)}", window_seconds=WINDOW)
        dist.barrier()
        return store

    def students(self, rows: int) -> dict[str, float]:
        """Three that overlap are scored, and scored again by a job that finds all done."""
        seen = torch.zeros(1, device=self.device)

        def count(model: Any, arguments: Any, output: Any) -> None:
            seen.add_(len(arguments[0].labels))

        handle = self.model.register_forward_hook(count)
        tenths = ((0, 6), (2, 8), (5, 10))
        students = [self.stream.examples(rows * a // 10, rows * b // 10) for a, b in tenths]
        store = self.new_store()
        self.score(store, rows, *students)
        again, _ = common.timed(self.score, store, rows, *students)
        handle.remove()
        dist.all_reduce(seen)
        return {
            "teacher_calls_per_unique_example": seen.item() / rows,
            "seconds_of_a_job_that_finds_all_done": common.rounded(again),
        }


if __name__ == "__main__":
    main()
