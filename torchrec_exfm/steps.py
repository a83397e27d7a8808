"""The work that external distillation adds to a train step, around the student's forward.

Nothing here depends on a pipeline: :class:`Steps` makes batches that carry this work, and
:class:`ExFMWrapper` calls it from its forward, which every pipeline runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from torchrec_exfm._compat import side_stream
from torchrec_exfm._ranks import start_average
from torchrec_exfm._user import read
from torchrec_exfm.adapter import StudentAdapter, train_adapter
from torchrec_exfm.auxiliary import AuxiliaryHead
from torchrec_exfm.batch import ExFMBatch, StepInputs, TeacherOutputs, check_outputs_shape
from torchrec_exfm.sources import ProbabilityCheck, TeacherSource
from torchrec_exfm.tasks import checked_labels, checked_weights, count_outputs


class Steps:
    """Algorithm 1 of arXiv 2502.17494, around the student's forward.

    1. When a batch is loaded, its source starts to fetch the outputs.
    2. When its forward begins, they are resolved. The all-reduce that counts outputs and labels
       overlaps the student's forward.
    3. The adapter takes its step, and the heads run.
    4. The all-reduce of the running means of terms with a margin overlaps backward.

    All collectives follow the order of the forwards, however many batches a pipeline holds at once.

    The arguments are those of :class:`ExFMSteps`. Without a ``source`` the batches carry their
    outputs. ``group`` holds the ranks to average over.
    """

    def __init__(
        self,
        head: AuxiliaryHead,
        source: TeacherSource | None,
        adapter: StudentAdapter | None,
        adapter_optimizer: torch.optim.Optimizer | None,
        *,
        labels: Callable[[Any], Tensor],
        weights: Callable[[Any], Tensor] | None,
        groups: Callable[[Any], Tensor] | None,
        candidates: Callable[[Any], Any] | None,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._head = head
        self._source = source
        self._adapter = adapter
        self._adapter_optimizer = adapter_optimizer
        self._labels = labels
        self._weights = weights
        self._groups = groups
        self._candidates = candidates
        self._group = group
        self._device = device
        self._copy_stream = side_stream(device)
        self._check_probabilities = ProbabilityCheck(head)
        self._wait_for_leads: Callable[[], None] = lambda: None
        self.started = False
        self.keep_adapter_loss = False  # set by RunMonitor
        self.adapter_loss = None if adapter is None else torch.zeros(2, device=device)

    def load(self, batch: Any) -> Any:
        """Start to fetch the outputs of a batch from the data loader; return an ExFMBatch."""
        if batch is None:
            return None
        if isinstance(batch, ExFMBatch):
            if self._source is not None:
                raise TypeError(
                    "the data loader gives ExFMBatch, which carries the teachers' outputs, and "
                    "the pipeline was given a teacher as well: drop one of them"
                )
            return ExFMBatch(batch.batch, batch.teacher, self)
        # A batch loaded in evaluation may never be trained on: then its outputs are not asked for.
        return ExFMBatch(batch, self._ask(batch) if self._head.training else self._ask, self)

    def _ask(self, batch: Any) -> Any:
        if self._source is None:
            raise TypeError(
                f"the data loader should give ExFMBatch; received {type(batch).__name__}: or tell "
                "the pipeline where the teachers' outputs come from (teacher=...)"
            )
        try:
            outputs = self._source.start(batch)
        except StopIteration as error:  # through Feed.__next__ it would end the epoch silently
            raise RuntimeError("the teacher's outputs ended before the batches") from error
        if isinstance(outputs, TeacherOutputs) and self._copy_stream is not None:
            return self._pin(outputs)  # a copy from pageable memory would block the host
        return outputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it has collectives and futures
    def start(self, batch: ExFMBatch[Any]) -> Callable[[], StepInputs]:
        """Resolve the outputs and start to count them; return a function that gives the inputs."""
        self.wait()  # the heads read the running means, which may still be averaged
        self.started = True
        with record_function("## teacher_outputs ##"):
            teacher = self._resolve(batch.teacher, batch.batch)
        check_outputs_shape(teacher, (len(self._head.teachers), len(self._head.tasks)))
        self._check_probabilities(teacher)
        tasks, size = self._head.tasks, len(teacher.values)
        labels = weights = None
        if self._adapter is not None or self._head.lead_losses:
            labels = checked_labels(read_labels(self._labels, batch.batch), tasks, size)
        if self._weights is not None:
            weights = checked_weights(_read("weights", self._weights, batch.batch), tasks, size)
        keys = (("groups", self._groups), ("candidates", self._candidates))
        groups, candidates = (f and _read(what, f, batch.batch) for what, f in keys)
        embeddings = self._head.embedding_presence(teacher)
        counts = count_outputs(teacher.presence, labels, weights, embeddings)
        wait = start_average([counts], self._group)
        inputs = StepInputs(teacher, labels, weights, counts, None, groups, candidates)
        return partial(self._adapt, inputs, wait)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _adapt(self, inputs: StepInputs, wait: Callable[[], None]) -> StepInputs:
        """Wait for the counts, then run the adapter's step."""
        wait()
        if self._adapter is None or self._adapter_optimizer is None:
            return inputs
        assert inputs.counts is not None
        with record_function("## adapter_step ##"):
            before, adapted = train_adapter(
                self._adapter,
                self._adapter_optimizer,
                inputs.teacher,
                inputs.labels,
                inputs.counts[1],
                inputs.weights,
                self._group,
            )
            if self.keep_adapter_loss:
                outputs = torch.stack(before, dim=1)
                self.adapter_loss = _adapter_loss(self._adapter, outputs, inputs, inputs.counts[1])
        return replace(inputs, adapted=adapted)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """Start to average the running means of terms with a margin; it overlaps backward."""
        self.wait()
        self._wait_for_leads = start_average(self._head.lead_losses, self._group)

    def finish(self) -> None:
        """Wait for the averages, and check that the step ran the wrapper.

        Raises:
            RuntimeError: in training, if no step was started.
        """
        self.wait()
        if self._head.training and not self.started:
            raise RuntimeError(
                "the forward of each step should run the ExFMWrapper; this one did not, and "
                "nothing was distilled: let custom_model_fwd call the wrapped model on the batch "
                "that it receives"
            )

    def wait(self) -> None:
        """Wait for the averages that :meth:`end` started."""
        self._wait_for_leads()
        self._wait_for_leads = lambda: None

    def _resolve(self, started: Any, batch: Any) -> TeacherOutputs:
        """Return the outputs on the device, resolving futures and functions."""
        is_future = False
        while not isinstance(started, TeacherOutputs):  # a function may return a future
            is_future = hasattr(started, "result")
            if not is_future and not callable(started):
                raise TypeError(
                    "a teacher should give TeacherOutputs, or a future of them; received "
                    f"{type(started).__name__}: make it TeacherOutputs(logits)"
                )
            started = started.result() if is_future else started(batch)
        return self._copy(started) if is_future else started.to(self._device)

    def _copy(self, outputs: TeacherOutputs) -> TeacherOutputs:
        """Copy outputs from the host on a side stream, which waits for no other copy."""
        if self._copy_stream is None:
            return outputs.to(self._device)
        accelerator = torch.get_device_module(self._device)
        with accelerator.stream(self._copy_stream):
            copied = self._pin(outputs).to(self._device, non_blocking=True)
        current = accelerator.current_stream()
        current.wait_stream(self._copy_stream)
        copied.record_stream(current)  # allocated on the side stream, used on this one
        return copied

    def _pin(self, outputs: TeacherOutputs) -> TeacherOutputs:
        return outputs.pin_memory() if outputs.values.device.type == "cpu" else outputs


@torch.no_grad()
def _adapter_loss(
    adapter: StudentAdapter, outputs: Tensor, inputs: StepInputs, count: Tensor
) -> Tensor:
    """Return L_SA of an adapter's outputs, and whether it has any label, (2,) on the device."""
    with torch.autocast(count.device.type, enabled=False):  # as in the step
        teacher, labels = inputs.teacher, inputs.labels
        loss = adapter.loss(outputs, teacher, labels, count, weights=inputs.weights)
    # Apart, as the loss itself is NaN where the adapter has diverged.
    return torch.stack([loss, count.any()])


class Feed:
    """An iterator that passes each batch of a data loader through :meth:`Steps.load`."""

    def __init__(self, batches: Iterator[Any], steps: Steps) -> None:
        self.batches = batches
        self._steps = steps

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._steps.load(next(self.batches))


def read_labels(labels: Callable[[Any], Tensor], batch: Any) -> Any:
    """Return the labels of a user's batch; raise a ValueError if the function does not fit it."""
    return _read("labels", labels, batch)


def _read(what: str, function: Callable[[Any], Tensor], batch: Any) -> Any:
    return read(what, function, batch, "the pipeline", f"the user's batch to its {what}")
