"""External distillation on a real stream, from the raw data to a table of what it brings.

    python examples/promo_response/main.py

1. A teacher with rich features goes once through all verticals in time order; its logits are
   logged in its own training forward, before each update.
2. Students with lean features go through one vertical in time order, one for each arm: without a
   teacher, with the teacher on the serving head, with an auxiliary head (AH), and with the
   student adapter beside it (AH + SA); then again with a teacher whose logits are off by +1.
3. Every figure is of examples scored before they were trained on, over the last half of the year.

Runs alone or on several ranks (torchrun), on CPU or CUDA.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data
import models
import report
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from tqdm import tqdm

from torchrec_exfm import (
    DistillationTerm,
    ExFMBatch,
    ExFMMetrics,
    ExFMWrapper,
    StudentAdapter,
    TeacherOutputs,
    TrainPipelineExFM,
)

FIRST_WEEK = 27  # of the evaluation: the last half of the year
BIAS = 1.0  # added to the logits of the biased teacher
TEACHER_BATCH, STUDENT_BATCH = 2048, 1024
WEIGHT, BETA = 1.0, 2.0
TAP = "model.over_arch.model.1"  # the last layer: heads share the whole of the network below it

TERM = DistillationTerm(weight=WEIGHT, beta=BETA)
TERMS = {
    "AH": [TERM],
    "AH + SA": [TERM, DistillationTerm(weight=WEIGHT, beta=BETA, adapted=True)],
}
ARMS = ("none", "serving head", *TERMS)


def main() -> None:
    """Run every arm; write the table, the same as JSON, and a picture."""
    options = parse_options()
    device = set_up()
    stream = data.load_stream(options.cache, progress=dist.get_rank() == 0)
    logged, speed = train_teacher(stream, options.seed, device)
    rows = stream.vertical == stream.verticals.index(options.vertical)
    vertical, logged = stream.select(rows), logged[torch.from_numpy(rows)]
    results = [report.Result("teacher", "fresh", **evaluate(vertical, logged), samples_per_second=speed)]
    for teacher, bias in (("fresh", 0.0), (f"biased by {BIAS:+g}", BIAS)):
        for arm in ARMS:
            if arm == "none" and bias:
                continue
            logits, speed = train_student(vertical, logged + bias, arm, options.seed, device)
            figures = evaluate(vertical, logits)
            results.append(report.Result(arm, teacher, **figures, samples_per_second=speed))
    if dist.get_rank() == 0:
        report.write(results, options.out, vertical=options.vertical, examples=len(vertical))
    dist.destroy_process_group()


def train_teacher(stream: data.Stream, seed: int, device: torch.device) -> tuple[Tensor, float]:
    """One pass through all verticals; the logits before each update, and examples a second."""
    torch.manual_seed(seed)
    module = models.ranker(
        data.RICH_SPARSE,
        data.RICH_DENSE,
        stream.cardinalities,
        over_arch=(128, 64),
        cross_layers=2,
    )
    model, optimizer = models.distribute(module, device)
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    feed = data.batches(
        stream, data.RICH_SPARSE, data.RICH_DENSE, TEACHER_BATCH, **ranks()
    )
    return run("teacher", pipeline, feed, len(stream))


def train_student(
    vertical: data.Stream, logged: Tensor, arm: str, seed: int, device: torch.device
) -> tuple[Tensor, float]:
    """One pass through the vertical; the logits before each update, and examples a second."""
    torch.manual_seed(seed)
    module: Any = models.ranker(
        data.LEAN_SPARSE, data.LEAN_DENSE, vertical.cardinalities, over_arch=(64, 32), cross_layers=1
    )
    if arm == "serving head":
        module = models.ServingHeadDistillation(module, WEIGHT)
    elif arm in TERMS:
        module = ExFMWrapper(module, tap=TAP, terms=TERMS[arm])
    model, optimizer = models.distribute(module, device)
    pipeline: TrainPipelineSparseDist[Any, Any]
    if arm in TERMS:
        adapter = StudentAdapter() if arm == "AH + SA" else None
        pipeline = TrainPipelineExFM(model, optimizer, device, adapter=adapter)
    else:
        pipeline = TrainPipelineSparseDist(model, optimizer, device)
    feed = data.batches(vertical, data.LEAN_SPARSE, data.LEAN_DENSE, STUDENT_BATCH, **ranks())
    if arm != "none":
        feed = with_teacher(feed, logged)
    return run(arm, pipeline, feed, len(vertical))


def with_teacher(feed: Iterator[tuple[slice, Batch]], logged: Tensor) -> Iterator[tuple[slice, Any]]:
    """The batches with the logits that were logged for their examples; NaN: none was."""
    for rows, batch in feed:
        values = logged[rows]
        yield rows, ExFMBatch(batch, TeacherOutputs(values, presence=~values.isnan()))


def run(
    name: str,
    pipeline: TrainPipelineSparseDist[Any, Any],
    feed: Iterator[tuple[slice, Any]],
    examples: int,
) -> tuple[Tensor, float]:
    """Train through the feed; every example's logit before its update, NaN where there is none."""
    logits = torch.full((examples,), torch.nan)
    started = time.perf_counter()
    with tqdm(total=examples, desc=name, unit="rows", disable=dist.get_rank() != 0) as bar:
        for rows, (_, outputs, _) in progress(pipeline, feed):
            logits[rows] = outputs.cpu()
            bar.update(len(outputs) * dist.get_world_size())
    speed = examples / (time.perf_counter() - started)
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, logits)
    return torch.stack(parts).nanmean(0), speed


def progress(
    pipeline: TrainPipelineSparseDist[Any, Any], feed: Iterator[tuple[slice, Any]]
) -> Iterator[tuple[slice, Any]]:
    """The pipeline's outputs, each with the rows of its batch (it loads some batches ahead)."""
    loaded: deque[slice] = deque()

    def batches() -> Iterator[Any]:
        for rows, batch in feed:
            loaded.append(rows)
            yield batch

    batches_left = batches()
    while True:
        try:
            outputs = pipeline.progress(batches_left)
        except StopIteration:
            return
        yield loaded.popleft(), outputs


def evaluate(stream: data.Stream, logits: Tensor) -> dict[str, float]:
    """NE, AUC and calibration of the examples scored in the second half of the year."""
    counted = torch.from_numpy(stream.week >= FIRST_WEEK) & ~logits.isnan()
    labels = torch.from_numpy(stream.label[counted.numpy()])
    part = slice(dist.get_rank(), None, dist.get_world_size())
    metrics = ExFMMetrics(
        batch_size=len(labels[part]), device=torch.device("cpu"), window_size=len(labels)
    )
    metrics.update((torch.tensor(0.0), logits[counted][part], labels[part]))
    figures = metrics.compute()
    return {name: figures[f"{name}/label"] for name in ("ne", "auc", "calibration")}


def ranks() -> dict[str, int]:
    """This rank and the number of ranks, as `data.batches` takes them."""
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size()}


def set_up() -> torch.device:
    """Join the ranks that torchrun started, or be the only one; the device to run on."""
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|torchrec|fbgemm_gpu")
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        meeting_point = Path(tempfile.mkdtemp()) / "ranks"
        dist.init_process_group(backend, init_method=f"file://{meeting_point}", rank=0, world_size=1)
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vertical", default="DRUG GM", help="department of the students")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder of the built stream")
    parser.add_argument("--out", type=Path, default=Path("results/promo_response"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
