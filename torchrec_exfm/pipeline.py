"""The train pipeline that brings the teachers' outputs to the step: it holds time, no formula.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

import inspect
import operator
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function
from torchrec.streamable import Pipelineable

from torchrec_exfm._checks import (
    check_adapter,
    check_on_error,
    check_teacher,
    warn_of_optimizer,
    warn_of_tables,
)
from torchrec_exfm._compat import (
    TrainPipelineSparseDist,
    data_parallel_group,
    pipelined_names,
    sharded_names,
)
from torchrec_exfm._ranks import average_over, start_all_reduce
from torchrec_exfm._user import read
from torchrec_exfm._warnings import NotPipelinedWarning
from torchrec_exfm.adapter import StudentAdapter, adapter_step
from torchrec_exfm.batch import ExFMBatch, StepInputs, TeacherOutputs
from torchrec_exfm.sources import Asking, AsyncTeacher, LiveTeacher, ProbabilityCheck
from torchrec_exfm.tasks import checked_labels, checked_weights, count_outputs
from torchrec_exfm.wrapper import find_wrapper

__all__ = ["TrainPipelineExFM"]

In = TypeVar("In", bound=Pipelineable)  # the user's batch
Out = TypeVar("Out")  # what the student returns beside the loss


class TrainPipelineExFM(TrainPipelineSparseDist[In, Out]):
    """``TrainPipelineSparseDist`` with the teachers' outputs (arXiv 2502.17494, Algorithm 1).

    At each step, once the batch is on the device: the live teacher is asked, if there is one; the
    student adapter takes its step on the labels, and gives its outputs without gradient; then
    the student's step goes as in ``TrainPipelineSparseDist``, one forward, one backward. Over
    several ranks the means of the losses are over all examples, which takes a small all-reduce that
    overlaps the next batch's input distribution; the adapter's gradients take a second, before the
    forward, and the running means of terms with a margin a third, after it.

    Everything else is TorchRec's: ``progress(dataloader_iter)`` returns the student's own
    ``(loss, logits, labels)``, computed before the step's update.

    Args:
        model: an ``ExFMWrapper`` under ``DistributedModelParallel`` (or DDP, or alone).
        optimizer: over the model's dense parameters, the heads' among them.
        device: where the step runs.
        *args: further options of ``TrainPipelineSparseDist`` by position, as there.
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
        labels: takes the user's batch to its labels, (B,) or (B, T), NaN where one is missing, for
            the adapter, for terms with a margin, and to know B where the teacher failed.
        weights: takes the user's batch to its examples' weights, (B,) or by task (B, T), in the
            means of terms, adapter and margins (not in the student's own loss). None: all 1.
        trace: False for a model that can't be traced: nothing is pipelined but the copies, as in
            ``TrainPipelineBase``.
        **kwargs: those of ``TrainPipelineSparseDist``.

    Attributes:
        adapter: as given, on the device.
        adapter_optimizer: as given, or the one made for the adapter; None without an adapter.

    Raises:
        ValueError: if the model holds no ExFMWrapper; if terms and adapter do not fit, or a
            look-up's teachers and tasks; for ``free_features_storage_early`` with a live teacher;
            for ``on_teacher_error="mask"`` with a live teacher, or with none. In ``progress`` if
            ``labels`` or ``weights`` do not fit the batch, or what they give does not fit the
            outputs; on the CPU for infinite labels and negative weights.
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
        *args: Any,
        teacher: Callable[[Any], TeacherOutputs] | AsyncTeacher | LiveTeacher | None = None,
        on_teacher_error: Literal["raise", "mask"] = "raise",
        adapter: StudentAdapter | None = None,
        adapter_optimizer: torch.optim.Optimizer | None = None,
        labels: Callable[[Any], Tensor] = operator.attrgetter("labels"),
        weights: Callable[[Any], Tensor] | None = None,
        trace: bool = True,
        **kwargs: Any,
    ) -> None:
        signature = inspect.signature(TrainPipelineSparseDist.__init__)
        options = signature.bind(self, model, optimizer, device, *args, **kwargs).arguments
        head = find_wrapper(model).auxiliary_head
        check_teacher(teacher, head, model, options)
        check_on_error(on_teacher_error, teacher)
        check_adapter(head, adapter, adapter_optimizer)
        self._student_forward: Callable[[Any], Any] | None = options.get("custom_model_fwd")
        forward = weakref.WeakMethod(self._forward)  # no cycle, so that the model is freed at once
        options["custom_model_fwd"] = lambda batch: cast(Any, forward())(batch)
        del options["self"]
        super().__init__(**options)
        warn_of_tables(model)
        warn_of_optimizer(optimizer, head)
        self._head = head
        self._teacher = teacher
        shape = len(head.teachers), len(head.tasks)
        self._asking = Asking(
            on_teacher_error == "mask",
            lambda batch: TeacherOutputs.missing(len(_read("labels", labels, batch)), *shape),
        )
        self._check_probabilities = ProbabilityCheck(head)
        self._step_inputs: Callable[[], StepInputs] | None = None
        self._labels = labels
        self._weights = weights
        self._trace = trace
        self._group = data_parallel_group(model)
        self.adapter = None if adapter is None else self._on_device(adapter)
        self.adapter_optimizer = adapter_optimizer
        if self.adapter is not None and adapter_optimizer is None:
            parameters = self.adapter.parameters()
            self.adapter_optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=True)

    @property
    def teacher_failures(self) -> int:
        """Batches of this rank that had to go without a teacher's outputs."""
        return self._asking.failures

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
            return ExFMBatch(batch, self._asking.start(teacher, batch))
        return ExFMBatch(batch, self._asking.ask(teacher, batch))

    def _wait_for_batch(self) -> None:
        super()._wait_for_batch()
        if self._model.training:
            with record_function("## teacher_outputs ##"):
                batches: Any = self.batches
                batch = batches[0] = self._with_outputs(batches[0])
                self._check_probabilities(batch.teacher)
                self._step_inputs = self._start_step_inputs(batch)

    def _start_step_inputs(self, batch: ExFMBatch[Any]) -> Callable[[], StepInputs]:
        """Start to count outputs and labels over the ranks; return what makes the step's inputs."""
        teacher, tasks = batch.teacher, self._head.tasks
        size, labels, weights = len(teacher.values), None, None
        if self.adapter is not None or self._head.lead_losses:
            labels = checked_labels(_read("labels", self._labels, batch.batch), tasks, size)
        if self._weights is not None:
            weights = checked_weights(_read("weights", self._weights, batch.batch), tasks, size)
        counts = count_outputs(teacher.presence, labels, weights)
        wait = start_all_reduce(counts, self._group)

        def finish() -> StepInputs:
            wait()
            adapted = None
            if self.adapter is not None and self.adapter_optimizer is not None:
                with record_function("## adapter_step ##"):
                    adapted = adapter_step(
                        self.adapter,
                        self.adapter_optimizer,
                        teacher,
                        labels,
                        count=counts[1],
                        weights=weights,
                        group=self._group,
                    )
            return StepInputs(teacher, labels, weights, counts, adapted)

        return finish

    def _forward(self, batch: Any) -> Any:
        forward = self._student_forward or self._model
        if not self._model.training:
            return forward(batch)
        assert self._step_inputs is not None
        batch.step_inputs = self._step_inputs()
        self._step_inputs = None
        outputs = forward(batch)
        means = self._head.lead_losses
        for own, average in zip(means, average_over(self._group, means), strict=True):
            own.copy_(average)
        return outputs

    def _with_outputs(self, batch: Any) -> ExFMBatch[Any]:
        teacher = self._teacher
        if isinstance(batch, ExFMBatch):
            started: Any = batch.teacher
            if isinstance(started, TeacherOutputs):
                return batch
            outputs = self._asking.unless_it_fails(started.result, batch.batch)
            return ExFMBatch(batch.batch, self._copied(outputs))
        if isinstance(teacher, AsyncTeacher):  # the batch was loaded in evaluation
            return self._with_outputs(ExFMBatch(batch, self._asking.start(teacher, batch)))
        if teacher is None:
            raise TypeError(
                f"the data loader should give ExFMBatch; received {type(batch).__name__}: or tell "
                "TrainPipelineExFM where the teachers' outputs come from (teacher=...)"
            )
        outputs = self._asking.ask(teacher, batch)
        return ExFMBatch(batch, outputs.to(self._device) if self._asking.masks_errors else outputs)

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


def _read(what: str, function: Callable[[Any], Tensor], batch: Any) -> Any:
    return read(what, function, batch, "TrainPipelineExFM", f"the user's batch to its {what}")
