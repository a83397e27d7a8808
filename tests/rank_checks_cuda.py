"""Checks of the step on a CUDA device: no added wait, no race between streams.

Those without a stream in them run on the CPU as well.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import rank_models as rm
import torch
import torch.distributed as dist
from models import students
from ranks import device
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import DistillationTerm, ExFMWrapper, StudentAdapter, TeacherOutputs

DELAY_CYCLES = 20_000_000  # of the GPU's clock: some ten milliseconds
STEPS = 6
LATE = {  # how late outputs come, and what the pipeline is told
    "columns": (False, {}),
    "look-up": (True, {}),
    "columns not traced": (False, {"trace": False}),
    "look-up not traced": (True, {"trace": False}),
    "columns in place": (False, {"enable_inplace_copy_batch": True}),
    "look-up in place": (True, {"enable_inplace_copy_batch": True}),
}


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
    """A step waits for the device as often as TorchRec's own pipeline does."""
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
    """Count the waits for the device in the steps after the first two."""
    feed = iter(batch.pin_memory() for batch in batches)
    for _ in range(2):
        pipeline.progress(feed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(STEPS - 2):
                pipeline.progress(feed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def check_no_copy_is_pageable(rank: int, world_size: int) -> None:
    """What a step copies to the device comes from page-locked memory, if the batches do.

    A copy from other memory may hold the host until all earlier copies are done, which the counts
    of waits do not show.
    """
    batches = rm.parts(rank, world_size, STEPS)
    pinned = [batch.pin_memory() for batch in batches]
    assert _pageable_copies(_pipeline(world_size, rm.logged)[1], batches) > 0
    for teacher in (rm.logged, SlowTeacher()):
        assert _pageable_copies(_pipeline(world_size, teacher)[1], pinned) == 0


def _pageable_copies(pipeline: TrainPipelineSparseDist[Any, Any], batches: list[Any]) -> int:
    """Of the steps after the first two."""
    feed = iter(batches)
    for _ in range(2):
        pipeline.progress(feed)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS - 2):
            pipeline.progress(feed)
        torch.cuda.synchronize()
    return sum("Pageable -> Device" in event.name for event in profiled.events())


def check_late_copies_are_waited_for(rank: int, world_size: int, way: str) -> None:
    """Batches and outputs that are copied late teach the same as those copied in time.

    Each copy comes behind a delay on its stream, the step's kernels behind another, and as each
    batch is asked for, memory that was given back is filled with NaN from both streams.
    """
    looked_up, options = LATE[way]
    batches = rm.parts(rank, world_size, STEPS)
    expected = _trained(world_size, batches, rm.logged)
    pinned = [batch.pin_memory() for batch in batches]
    with (
        mock.patch.object(TeacherOutputs, "to", _delayed(TeacherOutputs.to)),
        mock.patch.object(rm.Columns, "to", _delayed(rm.Columns.to)),
    ):
        teacher = SlowTeacher() if looked_up else rm.logged
        actual = _trained(world_size, pinned, teacher, _poisoned, **options)
    rm.assert_same(actual, expected)


def _delayed(move: Callable[..., Any]) -> Callable[..., Any]:
    def delayed(*args: Any, **kwargs: Any) -> Any:
        stream = kwargs.get("data_copy_stream") or torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(DELAY_CYCLES)
        return move(*args, **kwargs)

    return delayed


def _poisoned(pipeline: TrainPipelineSparseDist[Any, Any], batches: list[Any]) -> Iterator[Any]:
    """Yield the batches; before each, fill free memory with NaN."""
    parts = [part for batch in batches for part in (batch.dense_features, batch.values)]
    shapes = {tuple(part.shape) for part in parts}
    for batch in batches:
        for stream in (pipeline._memcpy_stream, torch.cuda.default_stream()):
            with torch.cuda.stream(stream):
                junk = [torch.full(shape, torch.nan, device=device()) for shape in shapes] * 8
                del junk
        torch.cuda._sleep(DELAY_CYCLES)  # so that the host is ahead of the step's kernels
        yield batch


def check_torchrecs_own(rank: int, world_size: int) -> None:
    """TorchRec's pipeline without a teacher: the control of the checks that watch streams."""
    runs = []
    for pin in (False, True):
        student = students()["dlrm"]
        bare = rm.sharded(student.factory(), world_size)
        plain = TrainPipelineSparseDist(bare.model, bare.optimizer, device())
        batches = rm.random_batches(student, rank, supervised=False)
        batches = [batch.pin_memory() for batch in batches] if pin else batches
        runs.append((rm.drained(plain, batches), rm.snapshot(bare.model.state_dict())))
    rm.assert_same(*runs)


def check_with_a_group(
    rank: int, world_size: int, check: Callable[..., None], *arguments: Any
) -> None:
    """Run a check in which a single rank all-reduces as several do."""
    all_reduce = mock.Mock(wraps=dist.all_reduce)
    group = mock.patch("torchrec_exfm.pipeline.data_parallel_group", lambda _: dist.group.WORLD)
    with group, mock.patch.object(dist, "all_reduce", all_reduce):
        check(rank, world_size, *arguments)
    groups = [call.kwargs.get("group") for call in all_reduce.call_args_list]
    assert dist.group.WORLD in groups


class InBfloat16(nn.Module):
    """A module that computes in bfloat16, between neighbours that do not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.bfloat16()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.inner(inputs.bfloat16()).float()
        return outputs


def check_bfloat16(rank: int, world_size: int, way: str) -> None:
    """A student that computes in bfloat16 learns nearly the same; the adapter is exact.

    Autocast over the whole step, or an over part that has its weights and the tap in bfloat16.
    """
    batches = rm.parts(rank, world_size, STEPS)
    outputs, _, adapter = _trained(world_size, batches, rm.logged)
    if way == "autocast":
        with torch.autocast(device().type, torch.bfloat16):
            rounded = _trained(world_size, batches, rm.logged)
    else:
        student = rm.two_task_student()
        student.model.over_arch = InBfloat16(student.model.over_arch)
        tap = f"{rm.TAP}.inner"
        rounded = _trained(world_size, batches, rm.logged, student=student, tap=tap)
    losses, exact = ([float(loss) for loss, *_ in run] for run in (rounded[0], outputs))
    assert losses == pytest.approx(exact, rel=0.02) and losses != exact
    rm.assert_same(rounded[2], adapter)
    start = rm.snapshot(_pipeline(world_size, rm.logged)[0].model.state_dict())
    matrices = [key for key in start if key.startswith("exfm.") and key.endswith("weight")]
    assert len(matrices) > len(rm.HEADS)
    for key in matrices:
        assert rm.differs({key: rounded[1][key]}, {key: start[key]}), key


def _pipeline(
    world_size: int, teacher: Any, *, student: Any = None, tap: str = rm.TAP, **options: Any
) -> tuple[rm.Trainee, Any]:
    wrapper = rm.wrapped(student, tap=tap, terms=(*rm.HEADS, *rm.ADAPTED, *rm.MARGINS))
    trainee = rm.sharded(wrapper, world_size)
    adapter = rm.two_task_adapter()
    return trainee, rm.pipeline_of(trainee, teacher=teacher, adapter=adapter, **options)


def _trained(
    world_size: int,
    batches: list[Any],
    teacher: Any,
    feed: Callable[[Any, list[Any]], Iterable[Any]] = lambda _, batches: batches,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """Outputs, weights, and the adapter's weights."""
    trainee, pipeline = _pipeline(world_size, teacher, **options)
    outputs = rm.drained(pipeline, feed(pipeline, batches))
    adapter = rm.snapshot(pipeline.adapter.state_dict())
    return outputs, rm.snapshot(trainee.model.state_dict()), adapter
