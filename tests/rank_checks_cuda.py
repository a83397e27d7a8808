"""Checks of the step on a CUDA device: no wait is added, no stream reads what another writes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import rank_models as rm
import torch
from models import students
from ranks import device
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import DistillationTerm, ExFMWrapper, StudentAdapter, TeacherOutputs

DELAY_CYCLES = 20_000_000  # of the GPU's clock: some ten milliseconds
STEPS = 6


class SlowTeacher:
    """A look-up that takes its time, on a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def start(self, batch: Any) -> Future[TeacherOutputs]:
        return self._thread.submit(self._look_up, batch)

    def _look_up(self, batch: Any) -> TeacherOutputs:
        time.sleep(0.02)
        return rm.logged(batch)


def check_no_wait_is_added(rank: int, world_size: int) -> None:
    """As many waits for the device in a step as TorchRec's own pipeline has, and no more."""
    student = students()["dlrm"]
    bare = rm.sharded(student.factory(), world_size)
    plain = TrainPipelineSparseDist(bare.model, bare.optimizer, device())
    expected = _waits(plain, rm.random_batches(student, rank, steps=STEPS, supervised=False))
    terms = [DistillationTerm(beta=3.0), DistillationTerm(beta=3.0, adapted=True)]
    trainee = rm.sharded(ExFMWrapper(student.factory(), tap=student.tap, terms=terms), world_size)
    pipeline = rm.pipeline_of(trainee, adapter=StudentAdapter())
    actual = _waits(pipeline, rm.random_batches(student, rank, steps=STEPS))
    assert actual == expected, (actual, expected)


def _waits(pipeline: TrainPipelineSparseDist[Any, Any], batches: list[Any]) -> int:
    """Of the steps after the first two."""
    feed = iter(batch.pin_memory() for batch in batches)
    for _ in range(2):
        pipeline.progress(feed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(STEPS - 2):
                pipeline.progress(feed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in told)


def check_late_copies_are_waited_for(rank: int, world_size: int) -> None:
    """Outputs that are looked up and copied late teach what they teach as columns.

    Each copy comes behind a delay on its stream, and after each step memory that was given back is
    filled with NaN from that stream and from the step's.
    """
    batches = rm.parts(rank, world_size, STEPS)
    expected = _trained(world_size, batches, teacher=rm.logged)
    with mock.patch.object(TeacherOutputs, "to", _delayed(TeacherOutputs.to)):
        actual = _trained(world_size, batches, teacher=SlowTeacher(), poisoned=True)
    rm.assert_same(actual, expected)


def _delayed(move: Any) -> Any:
    def delayed(*args: Any, **kwargs: Any) -> Any:
        torch.cuda._sleep(DELAY_CYCLES)
        return move(*args, **kwargs)

    return delayed


def _trained(
    world_size: int, batches: list[Any], *, teacher: Any, poisoned: bool = False
) -> tuple[Any, Any]:
    trainee = rm.sharded(rm.wrapped(terms=(*rm.HEADS, *rm.ADAPTED)), world_size)
    pipeline = rm.pipeline_of(trainee, teacher=teacher, adapter=rm.two_task_adapter())
    feed = _poisoning(pipeline, batches) if poisoned else batches
    return rm.drained(pipeline, feed), rm.snapshot(trainee.model.state_dict())


def _poisoning(pipeline: Any, batches: list[Any]) -> Iterator[Any]:
    """The batches, and NaN in what memory is free as each is asked for."""
    shapes = {tuple(rm.logged(batch).values.shape) for batch in batches}
    for batch in batches:
        for stream in (pipeline._memcpy_stream, torch.cuda.default_stream()):
            with torch.cuda.stream(stream):
                junk = [torch.full(shape, torch.nan, device=device()) for shape in shapes] * 8
                del junk
        yield batch
