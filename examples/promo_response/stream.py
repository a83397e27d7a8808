"""The promotion-response stream as in production: teacher, scorer and students, week by week.

    python examples/promo_response/stream.py  # one after the other
    torchx run -s local_cwd torchx_components/exfm.py:stream -j 1x1 --students "DRUG GM,MEAT" \
        --script examples/promo_response/stream.py  # side by side

1. The teacher trains on three quarters of the households, logs its outputs from before each
   update, and publishes itself every few weeks.
2. The scorer takes a snapshot that is some weeks old, and scores the students' other examples.
3. Each student trains on a week as soon as its outputs are in the store.

They meet only in the store. Each can be killed and started again. Whichever is ahead, the figures
are the same up to rounding. Each runs on one rank or several (torchrun), on CPU or CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import data
import main as demo
import models
import numpy as np
import score as scoring_job
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import (
    DistillationTerm,
    ExFMMetrics,
    ExFMWrapper,
    RunMonitor,
    StudentAdapter,
    TrainPipelineExFM,
)
from torchrec_exfm.das import (
    TeacherLogger,
    TeacherLookup,
    TeacherStore,
    Window,
    score_windows,
    train_teacher,
    train_windows,
    wait_for_outputs,
)

TEACHER_NAME = "rich"
STUDENTS = ("DRUG GM", "MEAT")
RICH = data.RICH_SPARSE, data.RICH_DENSE
LEAN = data.LEAN_SPARSE, data.LEAN_DENSE
STUDENT_BATCH = 256
STUDENT_RATES = {"learning_rate": 1e-3, "table_learning_rate": 0.5}
TERMS = [DistillationTerm(), DistillationTerm(adapted=True, serving=True, margin=0.25)]


def main() -> None:
    """Run one role, or all of them in turn."""
    options = parse_options()
    device = demo.set_up()
    stream = data.load_stream(options.cache, progress=dist.get_rank() == 0)
    demo.check_verticals(stream, options.students)
    store = TeacherStore.create(options.out / "store", window_seconds=demo.WEEK_SECONDS)
    if options.role in ("teacher", "all"):
        run_teacher(stream, store, options, device)
    if options.role in ("scorer", "all"):
        run_scorer(stream, store, options, device)
    if options.role in ("student", "all"):
        for name in [options.student] if options.student else options.students:
            run_student(name, stream, store, options, device)
    dist.destroy_process_group()


def run_teacher(
    stream: data.Stream, store: TeacherStore, options: argparse.Namespace, device: torch.device
) -> None:
    """Train, log and publish the teacher."""
    model, optimizer = teacher_of(stream, options, device)
    pipeline: Any = TrainPipelineSparseDist(model, optimizer, device)
    make_batches = partial(batches, RICH, demo.BATCH)
    windows = weeks(stream, options.weeks, seen_by_teacher(stream), make_batches)
    with TeacherLogger(store, TEACHER_NAME) as logger:
        logger.attach(model)
        for window in train_teacher(
            pipeline,
            windows,
            store,
            TEACHER_NAME,
            refresh=options.refresh,
            logger=logger,
            folder=options.out / "teacher",
        ):
            say(f"teacher: through {day_of(window)}, {logger.written:,} outputs logged")


def run_scorer(
    stream: data.Stream, store: TeacherStore, options: argparse.Namespace, device: torch.device
) -> None:
    """Score the students' examples that the teacher does not train on."""
    model, _ = teacher_of(stream, options, device)
    wanted = np.logical_or.reduce([demo.rows_of(stream, name) for name in options.students])
    rest = wanted & ~seen_by_teacher(stream)
    for window in score_windows(
        model,
        weeks(stream, options.weeks, rest, scoring_job.shards),
        store,
        TEACHER_NAME,
        device=device,
        delay=options.delay,
        timeout_seconds=options.timeout_seconds,
        progress=False,
    ):
        say(f"scorer: through {day_of(window)}")


def run_student(
    name: str,
    stream: data.Stream,
    store: TeacherStore,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Train a student on each week once its outputs are in the store."""
    torch.manual_seed(options.seed)
    module = models.ranker(*LEAN, stream.cardinalities, **demo.STUDENT)
    wrapper = ExFMWrapper(module, tap=demo.TAP, terms=TERMS)
    model, optimizer = models.distribute(wrapper, device, **STUDENT_RATES)
    lookup = TeacherLookup(store, TEACHER_NAME)
    torch.manual_seed(options.seed)
    adapter = StudentAdapter()
    pipeline = TrainPipelineExFM(model, optimizer, device, teacher=lookup, adapter=adapter)
    metrics = ExFMMetrics(batch_size=STUDENT_BATCH // dist.get_world_size(), device=device)
    make_batches = partial(batches, LEAN, STUDENT_BATCH)
    windows = wait_for_outputs(
        weeks(stream, options.weeks, demo.rows_of(stream, name), make_batches),
        lookup,
        [TEACHER_NAME, f"{TEACHER_NAME}/scores"],
        timeout_seconds=options.timeout_seconds,
    )
    folder = name.replace(" ", "-")
    curves = options.curves and options.curves / folder
    with RunMonitor(pipeline, metrics, folder=curves, progress=False) as monitor:
        for window in train_windows(
            pipeline, windows, step=monitor.step, metrics=metrics, folder=options.out / folder
        ):
            so_far = ", ".join(f"{key} {value:.4f}" for key, value in metrics.compute().items())
            say(f"{name}: through {day_of(window)}, {so_far}")


def teacher_of(
    stream: data.Stream, options: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Any]:
    """Return a new teacher and its optimizer."""
    torch.manual_seed(options.seed)
    module = models.ranker(*RICH, stream.cardinalities, **demo.TEACHER)
    return models.distribute(module, device, **demo.TEACHER_RATES)


def seen_by_teacher(stream: data.Stream) -> data.Array:
    """Return a mask (B,) of what the teacher trains on: three quarters of the households."""
    return stream.sparse["household"] % 4 > 0


def weeks(
    stream: data.Stream,
    between: Sequence[int],
    rows: data.Array,
    make_data: Callable[[data.Stream], Iterable[Any]],
) -> Iterator[Window]:
    """Yield a window for each week between two, with data made of its rows in the mask."""
    first = np.flatnonzero(np.diff(stream.week, prepend=0))
    begins = [*stream.time[first].tolist(), int(stream.time[-1]) + 1]
    for week, (begin, end) in zip(stream.week[first], itertools.pairwise(begins), strict=True):
        if between[0] <= week <= between[1]:
            week_rows = slice(*np.searchsorted(stream.time, [begin, end]))
            yield Window(begin, end, make_data(stream.select(week_rows).select(rows[week_rows])))


def batches(
    features: tuple[Sequence[str], Sequence[str]], batch_size: int, part: data.Stream
) -> Iterator[Any]:
    """Yield this rank's batches of all examples of a part; the last one is smaller."""
    size = len(part) // dist.get_world_size() * dist.get_world_size()
    for first in range(0, size, batch_size):
        all_ranks = part.select(slice(first, min(first + batch_size, size)))
        yield next(data.batches(all_ranks, *features, len(all_ranks), **demo.ranks()))[1]


def day_of(window: Window) -> str:
    """Return the last day of a window."""
    return time.strftime("%Y-%m-%d", time.gmtime(window.end_seconds - 1))


def say(words: str) -> None:
    """Print a line on rank 0."""
    if dist.get_rank() == 0:
        print(words, flush=True)


def parse_options() -> argparse.Namespace:
    """Read the command line; --student picks one of --students."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=("teacher", "scorer", "student", "all"), default="all")
    parser.add_argument("--students", nargs="+", default=STUDENTS, help="their departments")
    parser.add_argument("--student", help="the one that this process trains")
    parser.add_argument("--weeks", type=int, nargs=2, default=(1, 53), metavar=("FIRST", "LAST"))
    parser.add_argument("--refresh", type=int, default=2, help="weeks between two snapshots")
    parser.add_argument("--delay", type=int, default=1, help="weeks until a snapshot scores")
    parser.add_argument(
        "--timeout-seconds", type=float, default=600.0, help="how long to wait for others"
    )
    parser.add_argument("--curves", type=Path, help="folder of the students' TensorBoard curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder of the built stream")
    parser.add_argument("--out", type=Path, default=Path("results/promo_response_stream"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
