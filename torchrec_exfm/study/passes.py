"""The parts of a study, and one pass of one arm: each example is scored, then trained on.

Letters in shapes: B examples, M teachers, T tasks, N examples of a pass.
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_exfm._ranks import world_size
from torchrec_exfm._user import outline
from torchrec_exfm.adapter import StudentAdapter
from torchrec_exfm.batch import ExFMBatch, TeacherOutputs
from torchrec_exfm.pipeline import TrainPipelineExFM
from torchrec_exfm.tasks import Task, checked_labels
from torchrec_exfm.terms import DistillationTerm
from torchrec_exfm.wrapper import ExFMWrapper, wrapper_in

__all__ = ["ARMS", "Arm", "Pass", "Study", "run_pass"]

CERTAIN = 1e-13  # labels are clipped by this before their logit: σ returns them in float32
STRETCHES = 40  # the number of periods of a pass if the study gives none
FUSED = ["fused", "fused_uvm", "fused_uvm_caching"]  # kernels that run the optimizer in backward


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Args:
        terms: the distillation terms; none: the student alone, in TorchRec's own pipeline.
        teacher: what the terms learn from: the study's teacher, an older one, or the labels
            themselves. The last is the control: what another head brings without any teacher.
    """

    terms: tuple[DistillationTerm, ...] = ()
    teacher: Literal["teacher", "older", "labels"] = "teacher"


def changed_fields(what: Any) -> dict[str, Any]:
    """Return the fields of a dataclass whose values are not the defaults."""
    values = {field.name: (getattr(what, field.name), field.default) for field in fields(what)}
    return {name: value for name, (value, default) in values.items() if value != default}


def term_in_words(term: DistillationTerm) -> dict[str, Any]:
    """Return a term's fields that are not the defaults, as words and numbers to hash.

    A loss becomes the name of its function, that function's arguments, and its width.
    """
    words = changed_fields(term)
    if "loss" in words:
        function = term.loss.function
        name, args = getattr(function, "func", function).__name__, getattr(function, "args", ())
        words["loss"] = [name, *args, term.loss.width]
    return words


ARMS: Mapping[str, Arm] = {
    "none": Arm(),
    "head on the label": Arm((DistillationTerm(),), "labels"),
    "AH": Arm((DistillationTerm(),)),
    "AH + SA by margin": Arm(
        (DistillationTerm(), DistillationTerm(adapted=True, serving=True, margin=0.25))
    ),
    "serving head": Arm((DistillationTerm(serving=True),)),
}
"""The default arms: the student alone, the control, and settings from the simplest on."""


def device() -> torch.device:
    """Return this process's current GPU, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def distribute(module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Shard the module by TorchRec's planner, with Adam at a rate of 1e-3 for the dense part.

    Small tables are not replicated, though the planner would: TorchRec drops the optimizer in
    backward of replicated tables. TorchRec initializes the tables anew, the same for every arm.

    Raises:
        ValueError: for tables without an optimizer in backward.
    """
    constraints: dict[str, ParameterConstraints] = {}
    for collection in module.modules():
        if not isinstance(collection, (EmbeddingBagCollection, EmbeddingCollection)):
            continue
        without = [name for name, _ in in_backward_optimizer_filter(collection.named_parameters())]
        if without:
            raise ValueError(
                f"make_student should apply an optimizer to its tables; received {without} without "
                "one: apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), "
                '{"lr": 0.1}), or give the study a distribute of your own'
            )
        for name, _ in collection.named_parameters():
            constraints[name.split(".")[-2]] = ParameterConstraints(compute_kernels=FUSED)
    ranks = world_size()
    topology = Topology(ranks, device().type, local_world_size=get_local_size(ranks))
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    sharders = get_default_sharders()
    plan = planner.collective_plan(module, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(module, device=device(), plan=plan, sharders=sharders)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    return model, KeyedOptimizerWrapper(dense, lambda params: torch.optim.Adam(params, lr=1e-3))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A student, a stream and a teacher. The command reads these names from a module.

    Args:
        make_student: returns the training module, ``forward(batch) -> (loss, (loss, logits,
            labels))``, neither wrapped nor sharded.
        stream: returns this rank's batches in time order: equally many on every rank, and the same
            ones at every call.
        make_teacher: returns a ``TeacherLookup``, or a function from the batch to its
            ``TeacherOutputs``; called for each pass. None: the stream gives :class:`ExFMBatch`.
        make_older_teacher: the same for an earlier generation; None: there is none.
        tap: see :class:`ExFMWrapper`, as for ``tasks``, which must be binary, ``teachers`` (the
            table reports on the first), ``in_features`` and ``serving_logits``.
        arms: by name, among them ``"none"``. None: `ARMS`, whose terms need a teacher named
            ``"teacher"``.
        distribute: maps the module, wrapped if the arm has terms, to the model that the pipeline
            trains and its optimizer. The default takes TorchRec's planner, the optimizer in
            backward that ``make_student`` applied to the tables, and Adam at a rate of 1e-3 for
            the rest. Give another for other rates, or for tables with initial values of their own.
        make_adapter: returns a student adapter and its optimizer (None: the pipeline's default),
            for terms that need one.
        labels, weights, groups, candidates: see ``TrainPipelineExFM``.
        outputs: maps what ``progress`` returns to ``(loss, logits, labels)``.
        period: maps the batch to (B,) integers, the period of time of each example, such as its
            day. None: forty periods of equally many batches.
        first_period: figures cover the examples from this period on. None: the second half of the
            examples.
    """

    make_student: Callable[[], nn.Module]
    stream: Callable[[], Iterable[Any]]
    make_teacher: Callable[[], Any] | None = None
    make_older_teacher: Callable[[], Any] | None = None
    tap: Any
    tasks: Sequence[Task] = (Task(),)
    teachers: Sequence[str] = ("teacher",)
    in_features: int | None = None
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
    """The outcome of one pass of one arm, in the order of the stream, rank after rank.

    Attributes:
        logits, labels: (N, T) float32, computed before the example's update; NaN for a missing
            label.
        teacher: (N, M, T) float32, NaN where an output is missing; (0, M, T) without a teacher.
        periods: (N,) int64.
        seconds: the time per example of this rank, over the second half of the pass.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    teacher: npt.NDArray[np.float32]
    periods: npt.NDArray[np.int64]
    seconds: float


def run_pass(
    study: Study, arm: Arm, seed: int, step: Callable[[int], object] = lambda examples: None
) -> Pass:
    """Train one arm on this rank's part of the stream; every rank must call it.

    Args:
        study: the student, the stream and the teacher.
        arm: how to train.
        seed: the seed of the parameters.
        step: called with the number of examples after each step.

    Raises:
        ValueError: for an empty stream; for outputs of the student, or periods, of the wrong
            shape; for labels outside [0, 1], or probabilities where logits should be.
    """
    torch.manual_seed(seed)
    module = study.make_student()
    if arm.terms:
        names = ("tap", "tasks", "teachers", "in_features", "serving_logits")
        module = ExFMWrapper(module, terms=arm.terms, **_fields(study, *names))
    model, optimizer = study.distribute(module)
    where = next((value.device for value in model.parameters()), device())
    wrapper = wrapper_in(model) if arm.teacher != "labels" else None
    rows: list[tuple[Tensor, ...]] = []  # on the device, so that no step waits for a copy
    periods: list[Any] = []
    times: list[float] = []
    with contextlib.ExitStack() as stack:
        kind = TrainPipelineExFM if arm.terms else TrainPipelineSparseDist
        torch.manual_seed(seed)  # the adapter's parameters do not depend on the heads' draws
        pipeline: Any = kind(model, optimizer, where, **_options(study, arm, stack))
        torch.manual_seed(seed)  # training draws the same numbers in every arm
        batches = _batches(study, arm, periods)
        while True:
            try:
                output = pipeline.progress(batches)
            except StopIteration:
                break
            rows.append(_rows(study, output, wrapper))
            times.append(time.perf_counter())
            step(len(rows[-1][0]))
    if not rows:
        raise ValueError("stream() should give some batches; received none")
    logits, labels, teacher = (
        torch.cat(parts).float().cpu().numpy() for parts in zip(*rows, strict=True)
    )
    _check_values(logits, labels)
    sizes, half = [len(part[0]) for part in rows], len(rows) // 2
    seconds = (time.perf_counter() - times[max(half - 1, 0)]) / sum(sizes[half:])
    return Pass(logits, labels, teacher, _periods(study, periods, sizes), seconds)


def _check_values(logits: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    """Raise a ValueError for labels or logits that can't be those of a binary task."""
    if ((labels < 0) | (labels > 1)).any():
        raise ValueError(
            "labels should lie in [0, 1], or be NaN where one is missing; received "
            f"{np.nanmin(labels):g} to {np.nanmax(labels):g}"
        )
    if len(logits) > 64 and ((logits >= 0) & (logits <= 1)).all():
        raise ValueError(
            "logits should be the student's log-odds; received values that all lie in [0, 1]: give "
            "them as they are before the sigmoid, by outputs=..."
        )


def _fields(study: Study, *names: str) -> dict[str, Any]:
    return {name: getattr(study, name) for name in names}


def _options(study: Study, arm: Arm, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Return the pipeline's options for an arm; the stack closes the arm's teacher."""
    if not arm.terms:
        return {}
    options = _fields(study, "labels", "weights", "groups", "candidates")
    if any(term.adapted for term in arm.terms):
        make_adapter = study.make_adapter or (
            lambda: (StudentAdapter(num_teachers=len(study.teachers), tasks=study.tasks), None)
        )
        options["adapter"], options["adapter_optimizer"] = make_adapter()
    make_teacher = study.make_older_teacher if arm.teacher == "older" else study.make_teacher
    if arm.teacher != "labels" and make_teacher is not None:
        options["teacher"] = teacher = make_teacher()
        stack.callback(getattr(teacher, "close", lambda: None))
    return options


def _batches(study: Study, arm: Arm, periods: list[Any]) -> Iterator[Any]:
    """Yield the batches for an arm; append the periods of each to the list."""
    for batch in study.stream():
        bare = batch.batch if isinstance(batch, ExFMBatch) else batch
        if study.period is not None:
            periods.append(np.asarray(study.period(bare)))
        if arm.teacher == "labels":
            yield ExFMBatch(bare, _taught_labels(study, bare))
        else:
            yield batch if arm.terms else bare


def _taught_labels(study: Study, batch: Any) -> TeacherOutputs:
    """Return the labels as outputs of teachers that are certain of them."""
    labels = study.labels(batch)
    columns = checked_labels(labels, study.tasks, len(labels)).double()
    values = columns.logit(CERTAIN).float().unsqueeze(1).expand(-1, len(study.teachers), -1)
    return TeacherOutputs(values, presence=~values.isnan())


def _rows(study: Study, output: Any, wrapper: ExFMWrapper | None) -> tuple[Tensor, ...]:
    """Return a step's logits and labels, (B, T), and the teacher's outputs, (B, M, T)."""
    tasks = len(study.tasks)
    try:
        _, logits, labels, *_ = study.outputs(output)
        shape = len(logits), tasks
        # Labels are copied: a view would keep the whole batch in memory.
        rows = logits.detach().reshape(shape), labels.detach().reshape(shape).clone()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"progress should return (loss, logits, labels), the last two of (B, {tasks}); "
            f"received {outline(output)}: say where they are by outputs=..., a function of what "
            "the student returns"
        ) from error
    teacher = None if wrapper is None else wrapper.last_teacher
    if teacher is None:
        return *rows, logits.new_empty(0, len(study.teachers), tasks)
    return *rows, teacher.values.where(teacher.presence, torch.nan)


def _periods(study: Study, periods: Sequence[Any], sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the periods of all examples, (N,), from those of the batches."""
    if study.period is None:
        periods = [np.full(size, at * STRETCHES // len(sizes)) for at, size in enumerate(sizes)]
    for period, size in zip(periods, sizes, strict=True):
        if period.shape != (size,):
            raise ValueError(
                f"period should give an integer for each example, {(size,)}; received "
                f"{period.shape}"
            )
    return np.concatenate(periods).astype(np.int64)
