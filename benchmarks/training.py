"""Students that train in turns in one process, and what a step of each costs."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import STUDENT, TAP, Batch, Sizes, dlrm, sharded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import (
    DistillationTerm,
    ExFMWrapper,
    StudentAdapter,
    Task,
    TeacherOutputs,
    TrainPipelineExFM,
)

EMBEDDING = 64
AH = (DistillationTerm(beta=3.0),)
AH_SA = (*AH, DistillationTerm(beta=3.0, adapted=True))
RECIPE = (DistillationTerm(), DistillationTerm(adapted=True, serving=True, margin=0.25))


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function(device, folder, *args)`` on ranks; return what rank 0 returns, through JSON.

    The folder is empty and temporary, the same for all ranks.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        mp.spawn(_rank, (ranks, folder, function, args), nprocs=ranks)
        return json.loads(Path(folder, "result.json").read_text())


def _rank(
    rank: int, ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    on_gpu = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, common.cores() // ranks))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
    )
    result = function(device, folder, *args)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def columns(batch: Batch) -> TeacherOutputs:
    return TeacherOutputs(batch.logits)


def embeddings(batch: Batch) -> TeacherOutputs:
    """Return the logits as teacher outputs, with 64 numbers as each one's embedding."""
    return TeacherOutputs(batch.logits, embeddings=batch.logits.unsqueeze(1).expand(-1, EMBEDDING))


def groups(batch: Batch) -> Tensor:
    return torch.arange(len(batch.labels), device=batch.labels.device) // 10


def plain(device: torch.device, sizes: Sizes = STUDENT) -> TrainPipelineSparseDist:
    """Return TorchRec's own pipeline, without a teacher."""
    torch.manual_seed(0)
    model, optimizer = sharded(dlrm(sizes), device)
    return TrainPipelineSparseDist(model, optimizer, device)


def exfm(
    device: torch.device,
    terms: Sequence[DistillationTerm] = AH_SA,
    teacher: Any = columns,
    sizes: Sizes = STUDENT,
    tasks: Sequence[Task] = (Task(),),
    **options: Any,
) -> TrainPipelineExFM:
    """Return the same student with heads, and an adapter where a term needs it; groups have 10."""
    torch.manual_seed(0)
    teachers = list(dict.fromkeys(term.teacher for term in terms))
    wrapper = ExFMWrapper(dlrm(sizes), tap=TAP, terms=terms, teachers=teachers, tasks=tasks)
    model, optimizer = sharded(wrapper, device)
    adapted = any(term.adapted for term in terms)
    adapter = StudentAdapter(num_teachers=len(teachers), tasks=tasks) if adapted else None
    if any(term.loss.needs_groups for term in terms):
        options["groups"] = groups
    return TrainPipelineExFM(model, optimizer, device, teacher=teacher, adapter=adapter, **options)


class Arm:
    """One way to train; its pipeline cycles over the same batches."""

    def __init__(self, pipeline: Any, batches: Sequence[Any]) -> None:
        self.pipeline = pipeline
        self.feed: Iterator[Any] = itertools.cycle(batches)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.pipeline.progress(self.feed)


class Kernels(TorchDispatchMode):
    """A counter of operations that do work on the device; views and empty tensors do none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        empty = "empty" in function.overloadpacket.__name__
        self.count += not (function.is_view or empty or function.namespace == "profiler")
        return function(*args, **(kwargs or {}))


def kernels_of(arm: Callable[[int], None]) -> int:
    """Count the operations of one step; the optimizers should have their state."""
    with Kernels() as kernels:
        arm(1)
    return kernels.count


def take_turns(
    arms: dict[str, Callable[[int], None]], device: torch.device, *, rounds: int, steps: int
) -> dict[str, list[common.Time]]:
    """Return seconds a step of each arm in each round, by the clock and of all threads together.

    In a round each arm takes its steps; the order rotates from round to round. The first round
    warms up and is not counted. On a GPU the clock is that of the device's events.
    """
    times: dict[str, list[common.Time]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, core = _timed(arms[name], steps, device)
            if turn >= 0:
                times[name].append((wall / steps, core / steps))
    return times


def _timed(arm: Callable[[int], None], steps: int, device: torch.device) -> common.Time:
    if device.type != "cuda":
        return common.timed(arm, steps)
    torch.cuda.synchronize(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    core = time.process_time()
    before.record()
    arm(steps)
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000, time.process_time() - core


def over(
    times: dict[str, list[common.Time]], arm: str, base: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the ratios of two arms, round by round, by the clock and in seconds of all threads."""
    ratios = np.array(times[arm]) / np.array(times[base])
    return common.spread(ratios[:, 0]), common.spread(ratios[:, 1])
