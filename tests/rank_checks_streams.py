"""Checks of train pipelines on simulated streams: no race, no copy that waits, no added wait."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import rank_models as rm
import torch
import torch.distributed as dist
from streams import DEVICE, HOST, Finding, Simulation, simulated
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import train_pipelines

import torchrec_exfm.pipeline as exfm_pipeline
import torchrec_exfm.sources as exfm_sources
from torchrec_exfm import ExFMBatch, LiveTeacher, TeacherOutputs, TrainPipelineExFM

STEPS = 3  # of an epoch: the first, whose batch no earlier step overlaps, and two others
EPOCHS = 2
TERMS = {"heads": rm.HEADS, "adapted": (*rm.HEADS, *rm.ADAPTED), "margins": rm.MARGINS}
CONTROL = "TrainPipelineSparseDist"
BASES = (
    CONTROL,
    "TrainPipelineBase",
    "TrainPipelineSparseDistLite",
    "PrefetchTrainPipelineSparseDist",
    "TrainPipelineFusedSparseDist",
    "TrainPipelineSemiSync",
)
WAITING_FILES = (  # of TorchRec's own, whose reads of lengths and counters wait
    "torchrec/distributed/batched_embedding_kernel.py",
    "torchrec/sparse/jagged_tensor.py",
    "torchrec/sparse/jagged_tensor_validator.py",
)

Teacher = Callable[[Any], TeacherOutputs]


class LookUp:
    """Looks up outputs on a thread of its own."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._thread = ThreadPoolExecutor(1)

    def start(self, batch: Any) -> Future[TeacherOutputs]:
        return self._thread.submit(self._teacher, batch)


def failing(teacher: Teacher) -> Teacher:
    """Let a teacher fail at every other batch."""
    asked = 0

    def answer(batch: Any) -> TeacherOutputs:
        nonlocal asked
        asked += 1
        if asked % 2:
            return teacher(batch)
        raise ConnectionError("at every other batch")

    return answer


def live_teacher(simulation: Simulation) -> LiveTeacher:
    """Return a model on the device that serves as both teachers."""
    model = rm.two_task_student(seed=5)
    simulation.adopt(model)

    def logits(output: Any) -> Tensor:
        return torch.stack([output[1][1], output[1][1] / 2], dim=1)

    return LiveTeacher(model, outputs=logits)


def pipeline_class(base: str) -> type[Any]:
    """Return the mixin over one of TorchRec's pipelines."""
    return type(f"ExFM{base}", (exfm_pipeline.ExFMSteps, getattr(train_pipelines, base)), {})


@contextlib.contextmanager
def exfm_set_up() -> Iterator[None]:
    """Let one rank run the collectives of several, and retry a failed teacher at once."""

    def every_rank(model: nn.Module) -> Any:
        return dist.group.WORLD

    with (
        mock.patch.object(exfm_pipeline, "data_parallel_group", every_rank),
        mock.patch.object(exfm_sources, "RETRY_SECONDS", 0.0),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def trainee_of(module: nn.Module, *, is_sharded: bool = True) -> rm.Trainee:
    if is_sharded:
        return rm.sharded(module, dist.get_world_size())
    optimizer: Any = torch.optim.SGD(module.parameters(), lr=0.2)
    return rm.Trainee(module, optimizer)  # type: ignore[arg-type]


def batches_of(steps: int = STEPS, *, seed: int = 0) -> list[rm.Columns]:
    return rm.parts(dist.get_rank(), dist.get_world_size(), steps, seed=seed)


def train(
    pipeline: Any,
    batches: Sequence[Any],
    simulation: Simulation | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Return the outputs of all epochs; in a simulation the loader pins its batches."""
    if simulation is not None:
        simulation.name_streams(pipeline)
        simulation.findings.clear()  # those of the set-up
    outputs = []
    for _ in range(EPOCHS):
        feed = (batch if simulation is None else batch.pin_memory() for batch in batches)
        if isinstance(pipeline, train_pipelines.TrainPipelineBase):
            pipeline.reset()  # it takes no new iterator without
        for _ in batches:
            if simulation is not None:
                simulation.step += 1
            outputs.append([value.clone() for value in pipeline.progress(feed)])
            between()
    return outputs


def assert_nothing_found(simulation: Simulation, base: str = CONTROL) -> None:
    """Require no race, no memory freed too early, no copy that waits, no added wait."""
    findings = simulation.findings_of("race", "pageable", "untold")
    if base == "TrainPipelineFusedSparseDist":
        # it looks up on a stream, and does not call record_stream for the result
        findings = [
            finding for finding in findings if finding.kind != "untold" or _is_ours(finding)
        ]
    # it looks for probabilities at batches 1, 2, 4, 8, ...
    added = [
        finding
        for finding in simulation.findings_of("wait", "mixed", "literal")
        if _is_ours(finding)
    ]
    findings += [finding for finding in added if finding.step & (finding.step - 1)]
    assert not findings, "\n".join(map(str, [len(findings), *findings]))


def _is_ours(finding: Finding) -> bool:
    return "torchrec_exfm/" in finding.place or "torchrec_exfm/" in finding.description


def check_torchrecs_own(rank: int, world_size: int, base: str, is_sharded: bool) -> None:
    """TorchRec's own pipelines, the control: no finding except their own reads of values."""
    trainee = trainee_of(rm.two_task_student(), is_sharded=is_sharded)
    with simulated() as simulation:
        simulation.adopt(trainee.model)
        kind = getattr(train_pipelines, base)
        pipeline = kind(trainee.model, trainee.optimizer, DEVICE)
        train(pipeline, batches_of(), simulation)
        assert_nothing_found(simulation, base)
    waits = [
        finding
        for finding in simulation.findings_of("wait")
        if finding.description != "synchronize"
    ]
    assert all(finding.place.startswith(WAITING_FILES) for finding in waits), waits
    synchronizes = len(simulation.findings_of("wait")) > len(waits)
    assert synchronizes == (base == "TrainPipelineSemiSync")
    distributes_ahead = (
        is_sharded and base != "TrainPipelineBase"
    )  # else one rank has no collective
    assert bool(simulation.collectives) == distributes_ahead


def check_exfm(
    rank: int, world_size: int, source: str, terms: str, model: str, extra: str = ""
) -> None:
    """The product's pipeline adds no finding to the control's.

    ``source`` is how the outputs come; ``model`` is "sharded", "unsharded" or "untraced"; ``extra``
    is nothing, "in place" or "evaluated".
    """
    trainee = trainee_of(rm.wrapped(terms=TERMS[terms]), is_sharded=model != "unsharded")
    with simulated() as simulation, exfm_set_up():
        simulation.adopt(trainee.model)
        teacher = rm.teacher_for(TERMS[terms])
        options: dict[str, Any] = {"trace": model != "untraced"}
        if "failing" in source:
            teacher, options["on_teacher_error"] = failing(teacher), "mask"
        if source == "live":
            options["teacher"] = live_teacher(simulation)
        elif source != "loaded":
            options["teacher"] = LookUp(teacher) if "look-up" in source else teacher
        if extra == "in place":
            options["enable_inplace_copy_batch"] = True
        pipeline = _pipeline(TrainPipelineExFM, trainee, terms, DEVICE, **options)
        batches: list[Any] = batches_of()
        if source == "loaded":
            batches = [ExFMBatch(batch, teacher(batch)) for batch in batches]
        between = _evaluation(pipeline) if extra == "evaluated" else lambda: None
        train(pipeline, batches, simulation, between)
        assert (pipeline.teacher_failures > 0) == ("failing" in source)
        assert_nothing_found(simulation)


def _pipeline(
    kind: type[Any], trainee: rm.Trainee, terms: str, device: torch.device, **options: Any
) -> Any:
    if terms != "heads":
        options["adapter"] = rm.two_task_adapter()
    return kind(trainee.model, trainee.optimizer, device, **options)


def _evaluation(pipeline: Any) -> Callable[[], None]:
    """Detach the model, evaluate it, then train on."""
    batch = batches_of(1, seed=9)[0]

    def evaluate() -> None:
        model = pipeline.detach().eval()
        with torch.no_grad():
            model(batch.pin_memory().to(DEVICE))
        model.train()
        pipeline.attach(model)

    return evaluate


def check_mixin(rank: int, world_size: int, base: str) -> None:
    """Over any of TorchRec's pipelines there is no finding, and results are equal to the bit."""
    trainee = trainee_of(rm.wrapped(terms=(*rm.HEADS, *rm.MARGINS)))
    with simulated() as simulation, exfm_set_up():
        simulation.adopt(trainee.model)
        kind = pipeline_class(base)
        pipeline = _pipeline(kind, trainee, "margins", DEVICE, teacher=rm.informed)
        outputs = train(pipeline, batches_of(), simulation)
        assert_nothing_found(simulation, base)
    rm.assert_same((outputs, rm.snapshot(trainee.model.state_dict())), _results())


@functools.cache
def _results() -> Any:
    """Return the results of TrainPipelineExFM without a simulation."""
    trainee = trainee_of(rm.wrapped(terms=(*rm.HEADS, *rm.MARGINS)))
    with exfm_set_up():
        pipeline = _pipeline(TrainPipelineExFM, trainee, "margins", HOST, teacher=rm.informed)
        return train(pipeline, batches_of()), rm.snapshot(trainee.model.state_dict())


def check_next_batch_is_not_held_up(rank: int, world_size: int, is_exfm: bool) -> None:
    """The input distribution of the next batch waits, in NCCL's order, for no optimizer's step."""
    module = rm.wrapped() if is_exfm else rm.two_task_student()
    trainee = trainee_of(module)
    with simulated() as simulation, exfm_set_up():
        simulation.adopt(trainee.model)
        kind = TrainPipelineExFM if is_exfm else train_pipelines.TrainPipelineSparseDist
        options = {"teacher": rm.logged} if is_exfm else {}
        pipeline: Any = kind(trainee.model, trainee.optimizer, DEVICE, **options)
        before_optimizer = {}
        step = trainee.optimizer.step

        def stepped(*arguments: Any) -> None:
            before_optimizer[simulation.step] = simulation.last_kernel(simulation.default)
            step(*arguments)

        with mock.patch.object(trainee.optimizer, "step", stepped):
            train(pipeline, batches_of(), simulation)
    starts = [
        collective
        for collective in simulation.collectives
        if collective.issuer == "_data_dist_stream"
    ]
    # with step 1 of an epoch
    overlapped = [collective for collective in starts if collective.step % STEPS == 2]
    assert len(overlapped) == EPOCHS
    for start in overlapped:
        assert start.waits_for[simulation.default.id] <= before_optimizer[start.step - 1], start
    reduced = [
        collective for collective in simulation.collectives if collective.name == "all_reduce"
    ]
    assert is_exfm == bool(reduced)


def check_faults_are_found(rank: int, world_size: int) -> None:
    """Each kind of fault is found in a minimal example, and not in the corrected one."""

    def kinds(program: Callable[[Any], Any]) -> set[str]:
        with simulated() as simulation:
            program(torch.cuda.Stream())
        return {finding.kind for finding in simulation.findings}

    def copied(stream: Any, *, pinned: bool = True) -> Tensor:
        host = torch.ones(4)
        with torch.cuda.stream(stream):
            return (host.pin_memory() if pinned else host).to(DEVICE, non_blocking=True)

    def used(stream: Any, *, waits: bool = True, tells: bool = True) -> None:
        tensor = copied(stream)
        current = torch.get_device_module(DEVICE).current_stream()
        if waits:
            current.wait_stream(stream)
        if tells:
            tensor.record_stream(current)
        assert tensor.device == DEVICE and (tensor + 1).is_cuda

    def reduced(*, waits: bool) -> None:
        tensor = torch.ones(4, device=DEVICE)
        work: Any = dist.all_reduce(tensor, async_op=True)
        if waits:
            work.wait()
        tensor.add_(1)

    def refilled(stream: Any, *, waits: bool) -> None:
        torch.ones(4, device=DEVICE).add_(1)
        target = torch.empty(4, device=DEVICE)
        if waits:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            target.copy_(torch.ones(4).pin_memory(), non_blocking=True)
        torch.cuda.current_stream().wait_stream(stream)

    def read(function: Callable[[Tensor], Any]) -> set[str]:
        return kinds(lambda stream: function(torch.ones(4, device=DEVICE)))

    assert kinds(used) == set()
    assert kinds(lambda stream: used(stream, waits=False)) == {"race"}
    assert kinds(lambda stream: used(stream, tells=False)) == {"untold"}
    assert kinds(copied) == set()
    assert kinds(lambda stream: copied(stream, pinned=False)) == {"pageable"}
    assert kinds(lambda stream: refilled(stream, waits=True)) == set()
    assert kinds(lambda stream: refilled(stream, waits=False)) == {"race"}
    assert kinds(lambda stream: reduced(waits=True)) == set()
    assert kinds(lambda stream: reduced(waits=False)) == {"race"}
    assert kinds(lambda stream: torch.tensor([1.0], device=DEVICE)) == {"literal"}
    assert read(lambda tensor: tensor + 1) == set()
    assert read(lambda tensor: tensor + torch.ones(4)) == {"mixed"}
    for function in (
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.numpy(),
        lambda tensor: bool(tensor.any()),
    ):
        assert read(function) == {"wait"}
