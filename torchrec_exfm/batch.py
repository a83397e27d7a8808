"""Teacher outputs, and the batch that carries them together with the user's own.

Shapes: B examples, M teachers, T tasks, E width of a teacher's embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torchrec.streamable import Pipelineable

__all__ = ["ExFMBatch", "TeacherOutputs"]

BatchT = TypeVar("BatchT")


class TeacherOutputs(Pipelineable):
    """The teachers' outputs for a batch, with the mask of which outputs exist.

    Args:
        values: (B, M, T) floating point: the teacher's logit of a binary task, or its prediction
            of a regression in the task's units. (B, T) is accepted for one teacher, (B,) for one
            teacher and one task. Stored as float32, detached.
        presence: boolean, of the same shape as ``values``, or (B,) for all teachers and tasks:
            which outputs exist; None: all. The value of a missing output is ignored and may be NaN.
        age_seconds: (B, M), or (B,) for one teacher: the event time minus the time the teacher's
            snapshot was trained through; None if unknown.
        embeddings: (B, M, E) floating point, or (B, E) for one teacher: the teacher's embedding of
            each example, such as its last hidden layer; None: there are none. Stored as float32,
            detached.
        embedding_presence: boolean, (B, M), or (B,) for one teacher: which embeddings exist;
            None: those of examples with any output. A missing embedding is ignored and may be NaN.

    Raises:
        TypeError: for a wrong type or dtype.
        ValueError: for a wrong shape; for NaN or infinity where presence is true. The contents of
            a tensor on an accelerator are not checked, as that would synchronize the device: build
            the outputs on the host.

    Example:
        >>> outputs = TeacherOutputs(torch.tensor([0.5, -2.0, float("nan")]),
        ...                          presence=torch.tensor([True, True, False]))
        >>> outputs.values.shape, outputs.presence.flatten().tolist()
        (torch.Size([3, 1, 1]), [True, True, False])
    """

    values: Tensor
    presence: Tensor
    age_seconds: Tensor | None
    embeddings: Tensor | None
    embedding_presence: Tensor | None

    def __init__(
        self,
        values: Tensor,
        presence: Tensor | None = None,
        age_seconds: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        embedding_presence: Tensor | None = None,
    ) -> None:
        _check_tensor("teacher outputs", values, floating=True)
        if values.dim() not in (1, 2, 3):
            raise ValueError(
                "teacher outputs should be of shape (B, M, T), (B, T) or (B,); received "
                f"{tuple(values.shape)}"
            )
        shape = values.shape
        values = values.detach().float()
        if values.dim() < 3:
            values = values.reshape(shape[0], 1, *(shape[1:] or (1,)))
        self.presence = _presence_like(values, shape, presence)
        # Copied even if all are present: a data loader may reuse the memory of its column.
        absent = None if presence is None else ~self.presence
        self.values = values.clone() if absent is None else values.masked_fill(absent, 0.0)
        _check_finite(self.values, self.presence)
        self.age_seconds = _age_like(values, age_seconds)
        if self.age_seconds is not None:
            _check_ages(self.age_seconds, self.presence.any(-1))
        self.embeddings = self.embedding_presence = None
        if embeddings is not None:
            embedded = self.presence.any(-1)
            if embedding_presence is not None:
                embedded = _presence_like(
                    embedded, embedded.shape, embedding_presence, "embedding_presence"
                )
            self.embeddings = _embeddings_like(embeddings, embedded)
            self.embedding_presence = embedded

    @classmethod
    def from_probabilities(
        cls,
        probabilities: Tensor,
        presence: Tensor | None = None,
        age_seconds: Tensor | None = None,
        *,
        eps: float = 1e-6,
        **embeddings: Tensor | None,
    ) -> TeacherOutputs:
        """Convert probabilities to logits: log(p / (1 - p)), with p clamped to [ε, 1 - ε].

        Args:
            probabilities: of the shapes of ``values``.
            presence: as for the class.
            age_seconds: as for the class.
            eps: ε, in [1e-7, 0.5): keeps the logits of 0 and 1 finite (±13.8 for the default).
            **embeddings: ``embeddings`` and ``embedding_presence``, as for the class.

        Raises:
            TypeError: as for the class.
            ValueError: as for the class, and for a present value outside [0, 1].

        Example:
            >>> TeacherOutputs.from_probabilities(torch.tensor([0.5])).values.item()
            0.0
        """
        if not 1e-7 <= eps < 0.5:
            raise ValueError(f"eps should be in [1e-7, 0.5); received {eps}")
        _check_tensor("teacher probabilities", probabilities, floating=True)
        outputs = cls(probabilities, presence, age_seconds, **embeddings)
        outside = outputs.presence & ((outputs.values < 0) | (outputs.values > 1))
        if _any_on_host(outside):
            raise ValueError(
                "teacher probabilities should be in [0, 1]; received "
                f"{_describe(outputs.values, outside)}; pass logits to TeacherOutputs(...) instead"
            )
        outputs.values = torch.where(outputs.presence, outputs.values.logit(eps), 0.0)
        return outputs

    @classmethod
    def missing(cls, batch_size: int, num_teachers: int = 1, num_tasks: int = 1) -> TeacherOutputs:
        """Return outputs that are missing for all of ``batch_size`` examples; E is 0.

        Example:
            >>> TeacherOutputs.missing(2).presence.any().item()
            False
        """
        values = torch.zeros(batch_size, num_teachers, num_tasks)
        presence = torch.zeros_like(values, dtype=torch.bool)
        return cls(values, presence, embeddings=values[..., :0])

    def to(
        self,
        device: torch.device,
        non_blocking: bool = False,
        data_copy_stream: torch.Stream | None = None,
    ) -> TeacherOutputs:
        """Copy to ``device``, on ``data_copy_stream`` if given."""
        if data_copy_stream is None:
            return self._map(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))
        accelerator = torch.get_device_module(device)
        # Kernels queued on the current stream may still read the memory that the copies reuse.
        data_copy_stream.wait_stream(accelerator.current_stream())

        def move(tensor: Tensor) -> Tensor:
            # Allocated on the current stream, which uses it; the copy stream only fills it.
            target = torch.empty_like(tensor, device=device)
            with accelerator.stream(data_copy_stream):
                return target.copy_(tensor, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> TeacherOutputs:
        """Copy into page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses these tensors."""
        for tensor in vars(self).values():
            if tensor is not None:
                tensor.record_stream(stream)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TeacherOutputs:
        moved = copy.copy(self)
        for name, tensor in vars(self).items():
            setattr(moved, name, None if tensor is None else function(tensor))
        return moved

    def __repr__(self) -> str:
        return f"TeacherOutputs(values={tuple(self.values.shape)}, device={self.values.device})"


@dataclass(frozen=True)
class StepInputs:
    """The inputs of a step's supervision, prepared once, when the batch is on the device.

    The fields are arguments of :meth:`torchrec_exfm.AuxiliaryHead.forward`.
    """

    teacher: TeacherOutputs
    labels: Tensor | None = None
    weights: Tensor | None = None
    counts: Tensor | None = None
    adapted: Tensor | None = None
    groups: Tensor | None = None
    candidates: Any = None


Started: TypeAlias = TeacherOutputs | Future[TeacherOutputs] | Callable[[Any], TeacherOutputs]


class Steps(Protocol):
    """The work of a train pipeline around the student's forward, where batches carry it."""

    def start(self, batch: ExFMBatch[Any]) -> Callable[[], StepInputs]:
        """Start a step before the student's forward; return a function that gives its inputs."""
        ...

    def end(self) -> None:
        """Start to average the heads' running means over the ranks."""
        ...

    def wait(self) -> None:
        """Wait for the averages that :meth:`end` started."""
        ...


class ExFMBatch(Pipelineable, Generic[BatchT]):
    """The user's batch together with the teacher outputs of its examples.

    Other attributes and keys are those of the user's batch, so a model, a pipeline or a loop that
    reads ``batch.sparse_features`` or ``batch["ids"]`` needs no change.

    Args:
        batch: the user's own. ``to``, ``pin_memory`` and ``record_stream`` call its methods of the
            same name; TorchRec's pipelines use the first and the last.
        teacher: the teacher outputs for the same examples, in the same order; or what provides them
            when the step starts: a future, or a function of the user's batch on the device.
        steps: the work that a pipeline adds to the step; None: nothing.

    Attributes:
        step_inputs: the inputs of the step's supervision; None until the step starts, unless they
            are known from the beginning.

    Raises:
        TypeError: if ``teacher`` is of another type; in a method that the user's batch lacks.
    """

    def __init__(self, batch: BatchT, teacher: Started, steps: Steps | None = None) -> None:
        known = teacher if isinstance(teacher, TeacherOutputs) else None
        if known is None and not hasattr(teacher, "result") and not callable(teacher):
            raise TypeError(
                f"teacher should be TeacherOutputs; received {type(teacher).__name__}: make it "
                "TeacherOutputs(logits)"
            )
        self.batch = batch
        self.step_inputs = StepInputs(known) if known is not None and steps is None else None
        self._teacher = teacher
        self._steps = steps

    @property
    def teacher(self) -> Any:
        """The teacher outputs or, until the step starts, the future or function of them."""
        return self._teacher if self.step_inputs is None else self.step_inputs.teacher

    def to(
        self, device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> ExFMBatch[BatchT]:
        """Copy to ``device``; further arguments go to the user's batch as well."""
        batch = self._call("to", device=device, non_blocking=non_blocking, **kwargs)
        teacher = self._map(lambda outputs: outputs.to(device, non_blocking, **kwargs))
        return ExFMBatch(batch, teacher, self._steps)

    def pin_memory(self) -> ExFMBatch[BatchT]:
        """Copy into page-locked memory."""
        batch = self._call("pin_memory")
        return ExFMBatch(batch, self._map(TeacherOutputs.pin_memory), self._steps)

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses these tensors."""
        self._call("record_stream", stream)
        self._map(lambda outputs: outputs.record_stream(stream))

    def start_step(self) -> Callable[[], StepInputs]:
        """Start the step before the student's forward; return a function that gives its inputs.

        A second forward on the same batch uses the inputs of the first.
        """
        known = self.step_inputs
        if known is not None:
            if self._steps is not None:
                self._steps.wait()
            return lambda: known
        if self._steps is None:
            raise TypeError(
                "the teacher outputs of an ExFMBatch should be available when the student runs "
                f"without a pipeline; received {type(self._teacher).__name__}: wait for them, and "
                "move them to the device"
            )
        return self._steps.start(self)

    def end_step(self, inputs: StepInputs) -> None:
        """End the step that :meth:`start_step` started, after the heads' forward."""
        self.step_inputs = inputs
        if self._steps is not None:
            self._steps.end()

    def _map(self, function: Callable[[TeacherOutputs], Any]) -> Any:
        """Apply a function to the outputs; return a future or function of them unchanged."""
        teacher = self.teacher
        return function(teacher) if isinstance(teacher, TeacherOutputs) else teacher

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.batch, name, None)
        if not callable(method):
            raise TypeError(
                f"the batch should have the method {name} (see torchrec.streamable.Pipelineable); "
                f"received {type(self.batch).__name__} without it"
            )
        return method(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Unpickling and copying ask for these before ``batch`` exists: looking there would recurse.
        if name == "batch" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.batch, name)

    def __getitem__(self, key: Any) -> Any:
        inner: Any = self.batch
        return inner[key]

    def __copy__(self) -> ExFMBatch[BatchT]:
        copied = ExFMBatch(copy.copy(self.batch), self._teacher, self._steps)
        copied.step_inputs = self.step_inputs
        return copied


def check_outputs_shape(teacher: TeacherOutputs, shape: tuple[int, int]) -> None:
    """Raise a ValueError unless the outputs are of (M, T) teachers and tasks."""
    if teacher.values.shape[1:] != shape:
        raise ValueError(
            f"teacher outputs should be of shape (B, {shape[0]}, {shape[1]}) (examples, teachers, "
            f"tasks); received {tuple(teacher.values.shape)}"
        )


def _check_tensor(what: str, value: object, *, floating: bool) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} should be a torch.Tensor; received {type(value).__name__}")
    if floating and not value.dtype.is_floating_point:
        raise TypeError(
            f"{what} should be of a floating-point dtype; received {value.dtype}: "
            "convert with .float()"
        )


def _presence_like(
    values: Tensor, shape: torch.Size, presence: Tensor | None, what: str = "presence"
) -> Tensor:
    if presence is None:
        return torch.ones_like(values, dtype=torch.bool)
    _check_tensor(what, presence, floating=False)
    if presence.dtype != torch.bool:
        raise TypeError(f"{what} should be of dtype torch.bool; received {presence.dtype}")
    if presence.shape == shape:
        return presence.reshape(values.shape)
    if presence.shape == values.shape[:1]:
        return presence.reshape(-1, *[1] * (values.dim() - 1)).expand(values.shape).contiguous()
    raise ValueError(
        f"{what} should be of shape {tuple(shape)} or ({shape[0]},); received "
        f"{tuple(presence.shape)}"
    )


def _age_like(values: Tensor, age_seconds: Tensor | None) -> Tensor | None:
    if age_seconds is None:
        return None
    _check_tensor("age_seconds", age_seconds, floating=False)
    expected = values.shape[:2]
    if age_seconds.shape != expected and (age_seconds.shape != expected[:1] or expected[1] != 1):
        raise ValueError(
            f"age_seconds should be of shape {tuple(expected)}; received {tuple(age_seconds.shape)}"
        )
    return age_seconds.detach().float().reshape(expected)


def _embeddings_like(embeddings: Tensor, presence: Tensor) -> Tensor:
    """Return embeddings as (B, M, E) float32, 0 where missing."""
    _check_tensor("embeddings", embeddings, floating=True)
    shape = tuple(presence.shape)
    if embeddings.dim() == 2 and shape[1] == 1:
        embeddings = embeddings.unsqueeze(1)
    if embeddings.dim() != 3 or embeddings.shape[:2] != shape:
        raise ValueError(
            f"embeddings should be of shape ({shape[0]}, {shape[1]}, E); received "
            f"{tuple(embeddings.shape)}"
        )
    embeddings = embeddings.detach().float().masked_fill(~presence.unsqueeze(-1), 0.0)
    bad = ~embeddings.isfinite()
    if _any_on_host(bad):
        raise ValueError(
            f"embeddings should be finite; received NaN or infinity for {int(bad.any(-1).sum())} "
            "examples; mark missing ones in embedding_presence"
        )
    return embeddings


def _check_finite(values: Tensor, presence: Tensor) -> None:
    if values.device.type != "cpu" or math.isfinite(values.sum()):
        return  # one fast sum: it is finite unless a value is not, or it overflows
    bad = presence & ~values.isfinite()
    if bad.any():
        raise ValueError(
            f"teacher outputs should be finite; received {_describe(values, bad)}; "
            "mark missing outputs in presence"
        )


def _check_ages(age_seconds: Tensor, presence: Tensor) -> None:
    bad = presence & ~age_seconds.isfinite()
    if _any_on_host(bad):
        raise ValueError(
            f"age_seconds should be finite where an output is present; received {int(bad.sum())} "
            "that are not; pass None if the ages are not known"
        )


def _any_on_host(bad: Tensor) -> bool:
    """Return whether any is true; False on an accelerator, where looking would synchronize."""
    return bad.device.type == "cpu" and bool(bad.any())


def _describe(values: Tensor, bad: Tensor) -> str:
    example, teacher, task = (int(i) for i in bad.nonzero()[0])
    return (
        f"{values[example, teacher, task].item()} for example {example}, teacher {teacher}, "
        f"task {task} ({int(bad.sum())} such values)"
    )
