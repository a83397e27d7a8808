"""The train pipeline that brings the teachers' outputs to the step: it holds time, no formula.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

import operator
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from torchrec_exfm._compat import (
    TrainPipelineContext,
    TrainPipelineSparseDist,
    data_parallel_group,
    pipelined_names,
    sharded_names,
    tables_left_whole,
)
from torchrec_exfm._warnings import (
    DistillationWarning,
    NotPipelinedWarning,
    TeacherMissingWarning,
)
from torchrec_exfm.adapter import StudentAdapter, start_adapter_step, start_all_reduce
from torchrec_exfm.batch import ExFMBatch, TeacherOutputs
from torchrec_exfm.heads import AuxiliaryHead
from torchrec_exfm.wrapper import find_wrapper

__all__ = ["AsyncTeacher", "LiveTeacher", "TrainPipelineExFM"]

RETRY_SECONDS = 30.0  # for so long a teacher that failed is not asked anew
_TELLING = 64  # outputs that do not lie in [0, 1] by chance
MASKED_ERRORS = (OSError, RuntimeError)  # StoreError is one of them; others are wrong set-ups
_T = TypeVar("_T")


class _NotAskedError(RuntimeError):
    """A teacher is not asked, as it failed a moment ago."""


@runtime_checkable
class AsyncTeacher(Protocol):
    """Finds outputs while earlier batches compute; ``torchrec_exfm.das.TeacherLookup`` is one."""

    def start(self, batch: Any) -> Future[TeacherOutputs]:
        """Begin to find the outputs of a batch that is on the host; they come on the host."""
        ...


@dataclass
class _Context(TrainPipelineContext):
    """TrainPipelineSparseDist's own of a batch in flight, and the look-up of its outputs."""

    outputs: Future[TeacherOutputs] | None = None


class LiveTeacher:
    """A teacher in the same process, asked at every step, without gradient.

    The most expensive way to have a teacher, and the baseline for the others. Under several ranks
    a sharded teacher runs its collectives at the same point of every rank's step.

    Args:
        model: ``model(batch)`` on the user's batch, on the student's device; put into
            evaluation mode.
        outputs: takes what it returns to logits (or predictions of a regression) of shape (B, T)
            or (B,); the default fits TorchRec's contract ``(loss, (loss, logits, labels))``.
    """

    def __init__(
        self, model: nn.Module, *, outputs: Callable[[Any], Tensor] = lambda output: output[1][1]
    ) -> None:
        self.model = model.eval()
        self.outputs = outputs

    def __call__(self, batch: Any) -> TeacherOutputs:
        """The outputs for a batch that is on the device."""
        with torch.no_grad():
            return TeacherOutputs(self.outputs(self.model(batch)))


class TrainPipelineExFM(TrainPipelineSparseDist[Any, Any]):
    """``TrainPipelineSparseDist`` with the teachers' outputs (arXiv 2502.17494, Algorithm 1).

    At each step, once the batch is on the device: the live teacher is asked, if there is one; the
    student adapter takes its step on the labels, and gives its outputs without gradient; then
    the student's step goes as in ``TrainPipelineSparseDist``, one forward, one backward. Under
    data parallelism the means of the losses are over all ranks' examples, and the adapter's
    gradients are averaged over the ranks: two small all-reduces, the first behind the next
    batch's input distribution, the second behind the student's forward. Terms with a margin
    need a third, of their running means, after the forward.

    Everything else is TorchRec's: ``progress(dataloader_iter)`` returns the student's own
    ``(loss, logits, labels)``, computed before the step's update.

    Args:
        model: an ``ExFMWrapper`` under ``DistributedModelParallel`` (or DDP, or alone).
        optimizer: over the model's dense parameters, the heads' among them.
        device: where the step runs.
        teacher: where the outputs come from. None: the data loader gives ``ExFMBatch``. A
            function of the user's batch, called on the host as it is loaded: for outputs that
            were logged as columns of the data. A look-up with ``start(batch)``, such as
            ``torchrec_exfm.das.TeacherLookup``: begun as the batch is loaded, joined before its
            step. A :class:`LiveTeacher`.
        on_teacher_error: ``"raise"``, or ``"mask"``: where the outputs can't be had (the store is
            gone, a window is damaged: OSError and RuntimeError), training goes on without them, as
            the student alone would, warns once, counts such batches in ``teacher_failures``, and
            asks again half a minute later. Not for a live teacher, whose ranks have to fail
            together.
        adapter: re-calibrates the outputs; needed by terms with ``adapted=True``.
        adapter_optimizer: over the adapter's parameters; None: fused Adam with a rate of 1e-2.
        labels: takes the user's batch to its labels, (B,) or (B, T), for the adapter, for terms
            with a margin, and to know B where the teacher failed.
        trace: False for a model that can't be traced: nothing is pipelined but the copies, as in
            ``TrainPipelineBase``.
        **kwargs: those of ``TrainPipelineSparseDist``.

    Attributes:
        adapter: as given, on the device.
        adapter_optimizer: as given, or the one made for the adapter; None without an adapter.
        teacher_failures: batches of this rank that had to go without a teacher's outputs.

    Raises:
        ValueError: if the model holds no ExFMWrapper; if terms and adapter do not fit, or a
            look-up's teachers and tasks; for ``free_features_storage_early`` with a live teacher;
            for ``on_teacher_error="mask"`` with a live teacher, or with none. In ``progress`` if
            ``labels`` does not fit the batch, or the labels do not fit the outputs.
        TypeError: for a teacher of another kind. In ``progress`` for ``ExFMBatch`` from the loader
            and a teacher as well, or neither.
        RuntimeError: in the first ``progress``, if the model can't be traced.

    Warns:
        NotPipelinedWarning: if the embeddings end up not pipelined, or not sharded.
        TeacherMissingWarning: at the first failure of a teacher that is masked.
        DistillationWarning: if the model is sharded over ranks that do not average; if the
            optimizer does not hold the heads' parameters; if the first outputs for a binary task
            look like probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        teacher: Callable[[Any], TeacherOutputs] | AsyncTeacher | LiveTeacher | None = None,
        on_teacher_error: Literal["raise", "mask"] = "raise",
        adapter: StudentAdapter | None = None,
        adapter_optimizer: torch.optim.Optimizer | None = None,
        labels: Callable[[Any], Tensor] = operator.attrgetter("labels"),
        trace: bool = True,
        **kwargs: Any,
    ) -> None:
        head = find_wrapper(model).auxiliary_head
        _check_teacher(teacher, model, kwargs)
        _check_on_error(on_teacher_error, teacher)
        _check_names(head, teacher)
        _check_adapter(head, adapter, adapter_optimizer)
        kwargs.setdefault("context_type", _Context)
        self._student_forward: Callable[[Any], Any] | None = kwargs.pop("custom_model_fwd", None)
        forward = weakref.WeakMethod(self._forward)  # no cycle, so that the model is freed at once
        super().__init__(
            model,
            optimizer,
            device,
            custom_model_fwd=lambda batch: cast(Any, forward())(batch),
            **kwargs,
        )
        _warn_of_tables(model)
        _warn_of_optimizer(optimizer, head)
        self._head = head
        self._teacher = teacher
        self._saw_outputs = False
        self._masks_errors = on_teacher_error == "mask"
        self._retry_at = -float("inf")
        self.teacher_failures = 0
        self._started: Future[TeacherOutputs] | None = None
        self._counted: Callable[[], Tensor | None] = lambda: None
        self._labels = labels
        self._trace = trace
        self._group = data_parallel_group(model)
        self.adapter = None if adapter is None else self._on_device(adapter)
        self.adapter_optimizer = adapter_optimizer
        if self.adapter is not None and adapter_optimizer is None:
            self.adapter_optimizer = torch.optim.Adam(
                self.adapter.parameters(), lr=1e-2, fused=True
            )

    def _on_device(self, adapter: StudentAdapter) -> StudentAdapter:
        adapter = adapter.to(self._device)
        if self._group is not None:
            for parameter in adapter.parameters():
                dist.broadcast(parameter.detach(), group=self._group, group_src=0)
        return adapter

    def _next_batch(self, dataloader_iter: Iterator[Any]) -> Any:
        batch = super()._next_batch(dataloader_iter)
        if batch is None or self._teacher is None:
            return batch
        if isinstance(batch, ExFMBatch):
            raise TypeError(
                "the data loader gives ExFMBatch, which carries the teachers' outputs, and "
                "TrainPipelineExFM was given a teacher as well: drop one of them"
            )
        teacher = self._teacher
        if isinstance(teacher, LiveTeacher) or not self._model.training:
            return batch
        if isinstance(teacher, AsyncTeacher):
            self._started = self._begun(teacher, batch)
            return batch
        ask = partial(self._asked, teacher, batch)
        return ExFMBatch(batch, self._unless_it_fails(ask, batch))

    def copy_batch_to_gpu(self, dataloader_iter: Iterator[Any]) -> Any:
        """As TorchRec's, with the look-up of the batch's outputs begun."""
        return self._with_started(*super().copy_batch_to_gpu(dataloader_iter))

    def inplace_copy_batch_to_gpu(self, dataloader_iter: Iterator[Any]) -> Any:
        """As TorchRec's, with the look-up of the batch's outputs begun."""
        return self._with_started(*super().inplace_copy_batch_to_gpu(dataloader_iter))

    def _with_started(self, batch: Any, context: Any) -> tuple[Any, Any]:
        context.outputs, self._started = self._started, None
        return batch, context

    def _wait_for_batch(self) -> None:
        super()._wait_for_batch()
        if self._model.training:
            with record_function("## teacher_outputs ##"):
                batch = self.batches[0] = self._with_outputs(self.batches[0])
                self._counted = self._start_count(batch.teacher)
                if not self._saw_outputs:
                    self._saw_outputs = True
                    _warn_of_probabilities(batch.teacher, self._head)

    def _forward(self, batch: Any) -> Any:
        """The student's forward, while the adapter's gradients are on their way to other ranks."""
        if self._model.training:
            batch.count = self._counted()
            if self.adapter is not None or self._head.lead_losses is not None:
                batch.fresh_labels = self._fresh_labels(batch.batch)
            if self.adapter is not None and self.adapter_optimizer is not None:
                with record_function("## adapter_step ##"):
                    batch.adapted = start_adapter_step(
                        self.adapter,
                        self.adapter_optimizer,
                        batch.teacher,
                        batch.fresh_labels,
                        count=batch.count,
                        group=self._group,
                    )
        outputs = (self._student_forward or self._model)(batch)
        if self._model.training:
            batch.adapted = batch.adapted  # ends the step where the forward did not ask for it
            if self._group is not None and self._head.lead_losses is not None:
                start_all_reduce(self._head.lead_losses, self._group)().div_(self._group.size())
        return outputs

    def _fresh_labels(self, batch: Any) -> Tensor:
        try:
            return self._labels(batch)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                "labels should take the user's batch to its labels, for what needs them here; "
                f"received a {type(batch).__name__} and {type(error).__name__}: {error}: pass "
                "labels=..., a function of the batch, to TrainPipelineExFM"
            ) from error

    def _with_outputs(self, batch: Any) -> ExFMBatch[Any]:
        teacher = self._teacher
        if isinstance(batch, ExFMBatch):
            return batch
        if teacher is None:
            raise TypeError(
                f"the data loader should give ExFMBatch; received {type(batch).__name__}: or tell "
                "TrainPipelineExFM where the teachers' outputs come from (teacher=...)"
            )
        if isinstance(teacher, AsyncTeacher):
            context: Any = self.contexts[0]
            started = context.outputs or self._begun(teacher, batch)  # None: loaded in evaluation
            return ExFMBatch(batch, self._copied(self._unless_it_fails(started.result, batch)))
        outputs = self._unless_it_fails(partial(self._asked, teacher, batch), batch)
        return ExFMBatch(batch, outputs.to(self._device) if self._masks_errors else outputs)

    def _begun(self, teacher: AsyncTeacher, batch: Any) -> Future[TeacherOutputs]:
        """A look-up that was begun, or has failed where errors are masked."""
        if not self._masks_errors:
            return teacher.start(batch)
        try:
            return self._asked(teacher.start, batch)
        except MASKED_ERRORS as error:
            failed: Future[TeacherOutputs] = Future()
            failed.set_exception(error)
            return failed

    def _asked(self, teacher: Callable[[Any], _T], batch: Any) -> _T:
        if time.monotonic() < self._retry_at:
            raise _NotAskedError
        return teacher(batch)

    def _unless_it_fails(self, ask: Callable[[], TeacherOutputs], batch: Any) -> TeacherOutputs:
        """What a teacher says of a batch; no outputs where it fails and errors are masked."""
        if not self._masks_errors:
            return ask()
        try:
            return ask()
        except MASKED_ERRORS as error:
            if not isinstance(error, _NotAskedError):
                self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self.teacher_failures:
                warnings.warn(
                    f"the teacher's outputs can't be had ({type(error).__name__}: {error}); "
                    "training goes on without them, and they are asked for again every "
                    f"{RETRY_SECONDS:g} s; TrainPipelineExFM.teacher_failures counts batches",
                    TeacherMissingWarning,
                    stacklevel=2,
                )
        self.teacher_failures += 1
        shape = len(self._head.teachers), len(self._head.tasks)
        return TeacherOutputs.missing(len(self._fresh_labels(batch)), *shape)

    def _copied(self, outputs: TeacherOutputs) -> TeacherOutputs:
        """Outputs on the device; on an accelerator by way of the stream that copies batches."""
        if self._memcpy_stream is None:
            return outputs.to(self._device)
        accelerator = torch.get_device_module(self._device)
        with accelerator.stream(self._memcpy_stream):
            copied = outputs.pin_memory().to(self._device, non_blocking=True)
        current = accelerator.current_stream()
        current.wait_stream(self._memcpy_stream)
        copied.record_stream(current)
        return copied

    def _start_count(self, teacher: TeacherOutputs) -> Callable[[], Tensor | None]:
        """Begin to count the present outputs, (M, T), of a rank on average over the ranks."""
        group = self._group
        if group is None:
            return lambda: None
        count = teacher.presence.sum(0, dtype=torch.float32)
        finish = start_all_reduce(count, group)
        return lambda: finish() / group.size()

    def _pipeline_model(self, *args: Any, **kwargs: Any) -> None:
        if not self._trace or not sharded_names(self._model):
            return
        try:
            super()._pipeline_model(*args, **kwargs)
        except Exception as error:
            raise RuntimeError(
                f"the model can't be pipelined ({type(error).__name__}: {error}); if its forward "
                "can't be traced, move what depends on tensors' values into a submodule without "
                "tables, or pass trace=False to train with the embeddings not pipelined"
            ) from error
        self._warn_if_not_pipelined()

    def _warn_if_not_pipelined(self) -> None:
        pipelined = pipelined_names(self, self._model)
        missed = [name for name in sharded_names(self._model) if name not in pipelined]
        if missed:
            warnings.warn(
                f"the embeddings {missed} are NOT pipelined: their input is changed on its way "
                "from the batch to them; training is right, but slower; move the change into the "
                "data loader, or see pipeline_postproc of TrainPipelineSparseDist",
                NotPipelinedWarning,
                stacklevel=2,
            )


def _warn_of_tables(model: nn.Module) -> None:
    whole = tables_left_whole(model)
    if whole:
        warnings.warn(
            f"the embeddings {whole} are not sharded, although the model is under "
            "DistributedModelParallel: make the sharding plan of the wrapped model, whose names "
            "begin with 'student.'",
            NotPipelinedWarning,
            stacklevel=3,
        )


def _warn_of_optimizer(optimizer: torch.optim.Optimizer, head: AuxiliaryHead) -> None:
    """Where it would never train the heads, from which the network below learns."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = [p for p in head.parameters() if not hasattr(p, "_in_backward_optimizers")]
    if own and not any(id(parameter) in held for parameter in own):
        warnings.warn(
            "the optimizer should hold the parameters of the distillation heads; received one "
            "without: make it of the wrapped model's parameters",
            DistillationWarning,
            stacklevel=3,
        )


def _warn_of_probabilities(outputs: TeacherOutputs, head: AuxiliaryHead) -> None:
    """Of the first batch alone, as it waits for the device."""
    for t, (task, regression) in enumerate(zip(head.tasks, head.regressions, strict=True)):
        values = outputs.values[:, :, t][outputs.presence[:, :, t]]
        if regression or len(values) < _TELLING:
            continue
        low, high = values.min(), values.max()
        if 0 <= low < high <= 1:
            warnings.warn(
                f"the teachers' outputs for the binary task {task!r} should be logits; all of the "
                f"first {len(values)} lie in [0, 1]: if they are probabilities, take "
                "TeacherOutputs.from_probabilities, or torch.logit before they are stored",
                DistillationWarning,
                stacklevel=2,
            )


def _check_teacher(teacher: object, model: nn.Module, options: dict[str, Any]) -> None:
    known = teacher is None or callable(teacher) or isinstance(teacher, AsyncTeacher)
    if isinstance(teacher, nn.Module) or not known:
        raise TypeError(
            "teacher should be None, a function of the batch, a TeacherLookup, or "
            f"LiveTeacher(module); received {type(teacher).__name__}"
        )
    if not isinstance(teacher, LiveTeacher):
        return
    if any(module is teacher.model for module in model.modules()):
        raise ValueError("the live teacher should be another model; received the student's own")
    if options.get("free_features_storage_early"):
        raise ValueError(
            "free_features_storage_early should be False with a LiveTeacher, which reads the "
            "features after TorchRec would have freed them; received True"
        )


def _check_on_error(on_teacher_error: str, teacher: object) -> None:
    if on_teacher_error not in ("raise", "mask"):
        raise ValueError(
            f"on_teacher_error should be 'raise' or 'mask'; received {on_teacher_error!r}"
        )
    if on_teacher_error == "mask" and (teacher is None or isinstance(teacher, LiveTeacher)):
        raise ValueError(
            "on_teacher_error should be 'raise' without a teacher, and with a LiveTeacher, whose "
            "ranks have to fail together; received 'mask'"
        )


def _check_names(head: AuxiliaryHead, teacher: object) -> None:
    """A look-up's teachers and tasks should be the wrapper's; one alone may have another name."""
    for what, names in (("teachers", head.teachers), ("tasks", head.tasks)):
        given = tuple(getattr(teacher, what, names))
        if len(given) != len(names) or (len(names) > 1 and given != names):
            raise ValueError(
                f"the look-up should be of the wrapper's {what}, {names}, in this order; received "
                f"{given}"
            )


def _check_adapter(
    head: AuxiliaryHead,
    adapter: StudentAdapter | None,
    adapter_optimizer: torch.optim.Optimizer | None,
) -> None:
    if adapter is None and adapter_optimizer is not None:
        raise ValueError("adapter_optimizer should come with its adapter: pass adapter")
    adapted = [term.name for term in head.terms if term.adapted]
    if adapted and adapter is None:
        raise ValueError(
            f"the terms {adapted} learn from a student adapter, and received none: pass "
            "adapter=StudentAdapter() to TrainPipelineExFM"
        )
    if adapter is not None and not adapted:
        raise ValueError(
            "no term learns from the adapter: give the wrapper a DistillationTerm(adapted=True), "
            "or pass no adapter"
        )
    expected = (len(head.teachers), len(head.tasks))
    if adapter is not None and adapter.shape != expected:
        raise ValueError(
            f"the adapter should be for (teachers, tasks) = {expected}; received {adapter.shape}"
        )
