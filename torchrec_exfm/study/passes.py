"""What a study is made of, and one pass of one arm: each example is scored before it trains.

Letters in shapes: B examples, M teachers, T tasks, N examples of a pass.
"""

from __future__ import annotations

import contextlib
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_exfm.adapter import StudentAdapter
from torchrec_exfm.batch import ExFMBatch, TeacherOutputs
from torchrec_exfm.pipeline import TrainPipelineExFM
from torchrec_exfm.tasks import Task, checked_labels
from torchrec_exfm.terms import DistillationTerm
from torchrec_exfm.wrapper import ExFMWrapper, wrapper_in

__all__ = ["ARMS", "Arm", "Pass", "Study", "run_pass"]

CERTAIN = 1e-13  # a label is taught as the logit of it or of 1 less it: within float32 of the label
KEPT_BATCHES = 512  # on the device, before they are moved to the host


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Args:
        terms: what is distilled; none: the student alone, by TorchRec's own pipeline.
        teacher: what the terms learn from: the study's teacher, an older one, or the labels
            themselves, which is the control: what a head more would bring without any teacher.
    """

    terms: tuple[DistillationTerm, ...] = ()
    teacher: Literal["teacher", "older", "labels"] = "teacher"


ARMS: Mapping[str, Arm] = {
    "none": Arm(),
    "head on the label": Arm((DistillationTerm(),), "labels"),
    "AH": Arm((DistillationTerm(),)),
    "AH + SA by margin": Arm(
        (DistillationTerm(), DistillationTerm(adapted=True, serving=True, margin=0.25))
    ),
    "serving head": Arm((DistillationTerm(serving=True),)),
}
"""Those of a study: the student alone, the control, and settings from the simplest on."""


def device() -> torch.device:
    """This process's GPU, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def distribute(module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The module by TorchRec's own planner, and Adam with a rate of 1e-3 for what is dense."""
    model = DistributedModelParallel(module, device=device())
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    return model, KeyedOptimizerWrapper(dense, lambda params: torch.optim.Adam(params, lr=1e-3))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A student, a stream and a teacher. Of a module that the command is given, its names.

    Args:
        make_student: gives the training module, ``forward(batch) -> (loss, (loss, logits,
            labels))``, before it is wrapped and sharded; its parameters as they are drawn then.
        stream: gives this rank's batches in time order, as many on every rank, and the same ones
            whenever it is called.
        make_teacher: gives a ``TeacherLookup``, or a function of the batch to its
            ``TeacherOutputs``; called for each pass. None: the stream gives :class:`ExFMBatch`.
        make_older_teacher: the same of a generation before; None: there is none.
        tap: see :class:`ExFMWrapper`, as ``tasks``, which have to be binary, ``teachers`` and
            ``serving_logits``.
        arms: by their names, among them ``"none"``; see `ARMS`, whose terms are of a teacher of
            the name ``"teacher"``.
        distribute: takes the module, wrapped where an arm has terms, to what the pipeline trains,
            and the optimizer. By default ``DistributedModelParallel`` and Adam; tables have the
            optimizer that ``make_student`` applied in backward.
        make_adapter: gives a student adapter and its optimizer (None: its own), for terms that
            need one.
        labels, weights, groups, candidates: as ``TrainPipelineExFM`` takes them.
        outputs: takes what ``progress`` returns to ``(loss, logits, labels)``.
        period: takes the batch to (B,) integers, the stretch of time that an example is of, such
            as its day; None: forty stretches of as many batches.
        first_period: figures are of examples from this one on. None: of the second half of the
            examples.
    """

    make_student: Callable[[], nn.Module]
    stream: Callable[[], Iterable[Any]]
    make_teacher: Callable[[], Any] | None = None
    make_older_teacher: Callable[[], Any] | None = None
    tap: Any
    tasks: Sequence[Task] = (Task(),)
    teachers: Sequence[str] = ("teacher",)
    serving_logits: Callable[[Any], Tensor] | None = None
    arms: Mapping[str, Arm] | None = None
    distribute: Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]] = distribute
    make_adapter: Callable[[], tuple[StudentAdapter, torch.optim.Optimizer | None]] | None = None
    labels: Callable[[Any], Tensor] = operator.attrgetter("labels")
    weights: Callable[[Any], Tensor] | None = None
    groups: Callable[[Any], Tensor] | None = None
    candidates: Callable[[Any], Any] | None = None
    outputs: Callable[[Any], Sequence[Tensor]] = tuple
    period: Callable[[Any], Any] | None = None
    first_period: int | None = None


@dataclass(frozen=True)
class Pass:
    """What one pass of one arm said, in the order of the stream (rank after rank).

    Attributes:
        logits, labels: (N, T) float32, before the example's update; NaN for a missing label.
        teacher: (N, M, T) float32, NaN where an output was missing; (0, M, T) without a teacher.
        periods: (N,) int32.
        seconds: of an example of this rank, over the second half of the pass.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    teacher: npt.NDArray[np.float32]
    periods: npt.NDArray[np.int32]
    seconds: float


def run_pass(
    study: Study, arm: Arm, seed: int, step: Callable[[int], None] = lambda examples: None
) -> Pass:
    """Train one arm on this rank's part of the stream; called by all ranks.

    Args:
        study: what is trained on what.
        arm: how.
        seed: of the parameters.
        step: takes the examples of each step.

    Raises:
        ValueError: for a stream without a batch; for a student whose outputs do not fit.
    """
    torch.manual_seed(seed)
    module = study.make_student()
    if arm.terms:
        module = ExFMWrapper(
            module,
            tap=study.tap,
            terms=arm.terms,
            teachers=study.teachers,
            tasks=study.tasks,
            serving_logits=study.serving_logits,
        )
    model, optimizer = study.distribute(module)
    torch.manual_seed(seed)
    seen, periods = _Seen(study), deque[Any]()
    with contextlib.ExitStack() as stack:
        pipeline = _pipeline(study, arm, model, optimizer, stack)
        wrapper = wrapper_in(model) if arm.teacher != "labels" else None
        batches = _batches(study, arm, periods)
        while True:
            try:
                output = pipeline.progress(batches)
            except StopIteration:
                break
            teacher = None if wrapper is None else wrapper.last_teacher
            seen.add(output, teacher, periods.popleft())
            step(seen.examples[-1])
    if not seen.examples:
        raise ValueError("stream() should give some batches; received none")
    return seen.finish()


def _pipeline(
    study: Study,
    arm: Arm,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stack: contextlib.ExitStack,
) -> Any:
    """TorchRec's for the student alone, else ours with the arm's teacher, closed with the stack."""
    if not arm.terms:
        return TrainPipelineSparseDist(model, optimizer, device())
    options: dict[str, Any] = {
        name: getattr(study, name) for name in ("labels", "weights", "groups", "candidates")
    }
    if any(term.adapted for term in arm.terms):
        make = study.make_adapter or (
            lambda: (StudentAdapter(num_teachers=len(study.teachers), tasks=study.tasks), None)
        )
        options["adapter"], options["adapter_optimizer"] = make()
    make_teacher = study.make_older_teacher if arm.teacher == "older" else study.make_teacher
    if arm.teacher == "labels":
        options["teacher"] = None if make_teacher is None else lambda batch: _said(study, batch)
    elif make_teacher is not None:
        options["teacher"] = teacher = make_teacher()
        if hasattr(teacher, "close"):
            stack.callback(teacher.close)
    return TrainPipelineExFM(model, optimizer, device(), **options)


def _batches(study: Study, arm: Arm, periods: deque[Any]) -> Iterator[Any]:
    """The stream's, with what the arm is taught from; their periods are put into the queue."""
    for batch in study.stream():
        bare = batch.batch if isinstance(batch, ExFMBatch) else batch
        periods.append(None if study.period is None else study.period(bare))
        if not arm.terms:
            yield bare
        elif batch is not bare and arm.teacher == "labels":
            yield ExFMBatch(bare, _said(study, bare))
        else:
            yield batch


def _said(study: Study, batch: Any) -> TeacherOutputs:
    """The labels, as if every teacher were sure of them."""
    labels = study.labels(batch)
    columns = checked_labels(labels, study.tasks, len(labels)).double()
    values = columns.logit(CERTAIN).float().unsqueeze(1).expand(-1, len(study.teachers), -1)
    return TeacherOutputs(values, presence=~values.isnan())


class _Seen:
    """What was computed step by step, moved to the host now and then."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._on_device: list[tuple[Tensor, ...]] = []
        self._on_host: list[tuple[Tensor, ...]] = []
        self._periods: list[Any] = []
        self._times: list[float] = []
        self.examples: list[int] = []

    def add(self, output: Any, teacher: TeacherOutputs | None, period: Any) -> None:
        _, logits, labels, *_ = self._study.outputs(output)
        shape = len(logits), len(self._study.tasks)
        if logits.numel() != shape[0] * shape[1] or labels.numel() != logits.numel():
            raise ValueError(
                f"progress should return (loss, logits, labels) of (B, {shape[1]}) each; received "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}: say where they are by "
                "outputs=..., a function of what the student returns"
            )
        said = logits.new_empty(0, len(self._study.teachers), shape[1])
        if teacher is not None:
            said = teacher.values.where(teacher.presence, torch.nan)
        self._on_device.append(
            (logits.detach().reshape(shape), labels.detach().reshape(shape), said)
        )
        self._periods.append(period)
        self.examples.append(len(logits))
        if len(self._on_device) == KEPT_BATCHES:
            self._move()
        self._times.append(time.perf_counter())

    def _move(self) -> None:
        columns = zip(*self._on_device, strict=True)
        self._on_host.append(tuple(torch.cat(column).float().cpu() for column in columns))
        self._on_device.clear()

    def finish(self) -> Pass:
        if self._on_device:
            self._move()
        columns = zip(*self._on_host, strict=True)
        logits, labels, teacher = (torch.cat(column).numpy() for column in columns)
        half = len(self.examples) // 2
        spent = time.perf_counter() - self._times[max(half - 1, 0)]
        return Pass(logits, labels, teacher, self._all_periods(), spent / sum(self.examples[half:]))

    def _all_periods(self) -> npt.NDArray[np.int32]:
        steps = len(self.examples)
        if self._study.period is None:
            return np.repeat(np.arange(steps) * 40 // steps, self.examples).astype(np.int32)
        return np.concatenate([np.asarray(part) for part in self._periods]).astype(np.int32)
