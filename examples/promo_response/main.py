"""External distillation on a real stream, from the raw data to a table of results.

    python examples/promo_response/main.py

1. A teacher with rich features trains once on all verticals in time order. A logger writes the
   outputs of its training forward, from before each update, to a teacher store.
2. Students with lean features train on one vertical each, in time order, and look up the teacher's
   outputs. The first vertical has a student for each arm: without a teacher, with the teacher on
   the serving head, with an auxiliary head (AH), and with a student adapter as well, from which the
   serving head learns as far as the teacher leads (AH + SA). Then again with a teacher whose logits
   are off by +1.
3. Every figure is of examples scored before they were trained on, in the last half of the year.

Runs on one rank or several (torchrun), on CPU or CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import data
import models
import numpy as np
import report
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from tqdm import tqdm

from torchrec_exfm import (
    DistillationTerm,
    ExFMMetrics,
    ExFMWrapper,
    StudentAdapter,
    TrainPipelineExFM,
)
from torchrec_exfm.das import (
    Snapshot,
    TeacherLogger,
    TeacherLookup,
    TeacherStore,
    Window,
    train_windows,
)

FIRST_WEEK = 27  # of the evaluation: the last half of the year
BIAS = 1.0  # added to the logits of the biased teacher
BATCH = 2048  # of all ranks together
WEEK_SECONDS = 7 * 24 * 3600
TEACHER_NAME, BIASED_NAME = "rich", "rich-biased"
TEACHER: dict[str, Any] = {"width": 16, "cross_layers": 2, "over_arch": (128, 64)}
STUDENT: dict[str, Any] = {"width": 32, "cross_layers": 1, "over_arch": (64, 32)}
TEACHER_RATES = {"learning_rate": 1e-3, "table_learning_rate": 0.3}

TAP = "model.over_arch.model.1"  # the last layer: the heads share the network below it
TERM = DistillationTerm(weight=1.0, beta=3.0)
# its gradient below the tap is as strong as that of TERM
SERVING_TERM = DistillationTerm(serving=True, weight=TERM.weight * TERM.beta)
TERMS = {
    "serving head": [SERVING_TERM],
    "AH": [TERM],
    "AH + SA": [TERM, DistillationTerm(adapted=True, serving=True, margin=0.25)],
}
ARMS = ("none", *TERMS)

Pipeline = TrainPipelineSparseDist[Any, Any]
Feed = Iterator[tuple[slice, Any]]  # rows of the stream, with their batch or outputs


def main() -> None:
    """Run every arm; write the table, JSON, and a picture."""
    options = parse_options()
    device = set_up()
    stream = data.load_stream(options.cache, progress=dist.get_rank() == 0)
    check_verticals(stream, options.verticals)
    parts = {name: rows_of(stream, name) for name in options.verticals}
    store = new_store(options.out / "store")
    logits, teacher_speed = teach(stream, store, options, device)
    results = []
    for name, rows in parts.items():
        vertical, outputs = stream.select(rows), logits[torch.from_numpy(rows)]
        figures = evaluate(vertical, outputs)
        results.append(report.Result(name, "teacher", "fresh", *figures, teacher_speed))
        settings = [(arm, TEACHER_NAME) for arm in ("none", "AH")]
        if name == options.verticals[0]:
            log_biased(store, vertical, outputs)
            settings = [(arm, TEACHER_NAME) for arm in ARMS]
            settings += [(arm, BIASED_NAME) for arm in ARMS if arm != "none"]
        for arm, teacher in settings:
            outputs, speed = train_student(vertical, store, teacher, arm, options, device)
            kind = "fresh" if teacher == TEACHER_NAME else f"biased by {BIAS:+g}"
            results.append(report.Result(name, arm, kind, *evaluate(vertical, outputs), speed))
    if dist.get_rank() == 0:
        report.write(results, options)
    dist.destroy_process_group()


def teach(
    stream: data.Stream, store: TeacherStore, options: argparse.Namespace, device: torch.device
) -> tuple[Tensor, float]:
    """Train the teacher for one logged pass; return its logits and its examples per second."""
    torch.manual_seed(options.seed)
    features = data.RICH_SPARSE, data.RICH_DENSE
    module = models.ranker(*features, stream.cardinalities, **TEACHER)
    model, optimizer = models.distribute(module, device, **TEACHER_RATES)
    pipeline: Pipeline = TrainPipelineSparseDist(model, optimizer, device)
    feed = data.batches(stream, *features, BATCH, **ranks())
    with TeacherLogger(store, TEACHER_NAME) as logger:
        logger.attach(model)
        return run("teacher", pipeline, feed, stream)


def log_biased(store: TeacherStore, vertical: data.Stream, logits: Tensor) -> None:
    """Write a second teacher to the store: the first one's logits for a vertical, plus `BIAS`."""
    if dist.get_rank() == 0:
        present = ~logits.isnan().numpy()
        store.write(
            Snapshot(BIASED_NAME, version=0, trained_through_seconds=0),
            vertical.example_id[present],
            logits[present] + BIAS,
            vertical.time[present],
            logged=True,
        )
    dist.barrier()


def train_student(
    vertical: data.Stream,
    store: TeacherStore,
    teacher: str,
    arm: str,
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Train for one pass of the vertical; return logits from before each update, and the speed."""
    torch.manual_seed(options.seed)
    features = data.LEAN_SPARSE, data.LEAN_DENSE
    module: Any = models.ranker(*features, vertical.cardinalities, **STUDENT)
    if arm in TERMS:
        module = ExFMWrapper(module, tap=TAP, terms=terms_of(arm, options))
    model, optimizer = models.distribute(
        module,
        device,
        learning_rate=options.learning_rate,
        table_learning_rate=options.table_learning_rate,
    )
    feed: Feed = data.batches(vertical, *features, options.batch_size, **ranks())
    pipeline: Pipeline = TrainPipelineSparseDist(model, optimizer, device)
    if arm in TERMS:
        lookup = TeacherLookup(store, teacher)
        adapter = StudentAdapter() if arm == "AH + SA" else None
        pipeline = TrainPipelineExFM(model, optimizer, device, teacher=lookup, adapter=adapter)
    return run(arm, pipeline, feed, vertical)


def terms_of(arm: str, options: argparse.Namespace) -> list[DistillationTerm]:
    """Return the terms of an arm; the options set the weight of the serving head's term."""
    weight = options.serving_head_weight
    return [replace(term, weight=weight) if term == SERVING_TERM else term for term in TERMS[arm]]


def new_store(folder: Path) -> TeacherStore:
    """Make an empty store, shared by all ranks."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        TeacherStore.create(folder, window_seconds=WEEK_SECONDS)
    dist.barrier()
    return TeacherStore(folder)


def check_verticals(stream: data.Stream, names: Sequence[str]) -> None:
    """Raise SystemExit unless all names are verticals of the stream."""
    for name in names:
        if name not in stream.verticals:
            raise SystemExit(
                f"a vertical should be one of {', '.join(stream.verticals)}; received {name}"
            )


def rows_of(stream: data.Stream, name: str) -> Any:
    """Return the rows of a vertical as a mask (B,)."""
    return stream.vertical == stream.verticals.index(name)


def run(name: str, pipeline: Pipeline, feed: Feed, stream: data.Stream) -> tuple[Tensor, float]:
    """Train on the feed; return logits from before each update (NaN where none), and the speed."""
    logits = torch.full((len(stream),), torch.nan)
    started = time.perf_counter()
    with tqdm(total=len(stream), desc=name, unit="rows", disable=dist.get_rank() != 0) as bar:
        for rows, (_, outputs, _) in progress(pipeline, feed, stream):
            logits[rows] = outputs.cpu()
            bar.update(len(outputs) * dist.get_world_size())
    speed = len(stream) / (time.perf_counter() - started)
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits)
    return torch.stack(parts).nanmean(0), speed


def progress(pipeline: Pipeline, feed: Feed, stream: data.Stream) -> Feed:
    """Train week by week; yield the pipeline's outputs, each with the rows of its batch."""
    loaded: deque[slice] = deque()
    outputs: list[Any] = []
    for _ in train_windows(pipeline, weekly(stream, feed, loaded), step=outputs.append):
        for output in outputs:
            yield loaded.popleft(), output
        outputs.clear()


def weekly(stream: data.Stream, feed: Feed, loaded: deque[slice]) -> Iterator[Window]:
    """Group the batches of a feed by the week in which they end, the same on every rank."""
    world_size = dist.get_world_size()

    def week(part: tuple[slice, Any]) -> int:
        rows, size = part[0], part[0].stop - part[0].start
        return int(stream.week[rows.start + (world_size - dist.get_rank()) * size - 1])

    def batches(feed_of_week: Feed) -> Iterator[Any]:
        for rows, batch in feed_of_week:
            loaded.append(rows)
            yield batch

    begin = 0
    for number, feed_of_week in itertools.groupby(feed, week):
        last = np.searchsorted(stream.week, number, side="right") - 1
        end = int(stream.time[last]) + 1
        yield Window(begin, end, batches(feed_of_week))
        begin = end


def evaluate(stream: data.Stream, logits: Tensor) -> tuple[float, float, float]:
    """Return NE, AUC and calibration of the examples scored in the second half of the year."""
    scored = torch.from_numpy(stream.week >= FIRST_WEEK) & ~logits.isnan()
    labels = torch.from_numpy(stream.label[scored.numpy()])
    part = slice(dist.get_rank(), None, dist.get_world_size())
    metrics = ExFMMetrics(
        batch_size=len(labels[part]), device=torch.device("cpu"), window_size=len(labels)
    )
    metrics.update((torch.tensor(0.0), logits[scored][part], labels[part]))
    figures = metrics.compute()
    return figures["ne/label"], figures["auc/label"], figures["calibration/label"]


def ranks() -> dict[str, int]:
    """Return this rank and the number of ranks, as `data.batches` takes them."""
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size()}


def set_up() -> torch.device:
    """Join the ranks that torchrun started, or be the only one; return the device to run on."""
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        meeting_point = Path(tempfile.mkdtemp()) / "ranks"
        dist.init_process_group(
            backend, init_method=f"file://{meeting_point}", rank=0, world_size=1
        )
    if not cuda:
        torch.set_num_threads(1)  # layers are small: more cores are better used by more ranks
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--verticals",
        nargs="+",
        default=["DRUG GM", "GROCERY", "MEAT-PCKGD"],
        help="departments with a student each; the first with all arms",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=BATCH, help="of a student, all ranks")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="of a student")
    parser.add_argument("--table-learning-rate", type=float, default=0.5, help="of a student")
    parser.add_argument("--serving-head-weight", type=float, default=SERVING_TERM.weight)
    parser.add_argument("--cache", type=Path, help="folder of the built stream")
    parser.add_argument("--out", type=Path, default=Path("results/promo_response"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
