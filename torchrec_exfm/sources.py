"""Where a step's teacher outputs come from, and what is done when they can't be had.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from torchrec_exfm._user import read
from torchrec_exfm._warnings import DistillationWarning, TeacherMissingWarning
from torchrec_exfm.auxiliary import AuxiliaryHead
from torchrec_exfm.batch import TeacherOutputs

__all__ = ["AsyncTeacher", "LiveTeacher"]

RETRY_SECONDS = 30.0  # for so long a teacher that failed is not asked anew
MASKED_ERRORS = (OSError, RuntimeError)  # StoreError is one of them; others are wrong set-ups
TELLING_OUTPUTS = 64  # so many do not lie in [0, 1] by chance
T = TypeVar("T")


@runtime_checkable
class AsyncTeacher(Protocol):
    """Finds outputs while earlier batches compute; ``torchrec_exfm.das.TeacherLookup`` is one."""

    def start(self, batch: Any) -> Future[TeacherOutputs]:
        """Begin to find the outputs of a batch that is on the host; they come on the host."""
        ...


class LiveTeacher:
    """A teacher in the same process, asked at every step, without gradient.

    The most expensive way to have a teacher, and the baseline for the others. Under several ranks
    a sharded teacher runs its collectives at the same point of every rank's step.

    Args:
        model: ``model(batch)`` on the user's batch, on the student's device; put into
            evaluation mode.
        outputs: takes what it returns to logits (or predictions of a regression) of shape (B, T)
            or (B,); the default fits TorchRec's contract ``(loss, (loss, logits, labels))``.

    Raises:
        ValueError: when called, if ``outputs`` does not fit what the model returns.
    """

    def __init__(
        self, model: nn.Module, *, outputs: Callable[[Any], Tensor] = lambda output: output[1][1]
    ) -> None:
        self.model = model.eval()
        self.outputs = outputs

    def __call__(self, batch: Any) -> TeacherOutputs:
        """The outputs for a batch that is on the device."""
        with torch.no_grad():
            output = self.model(batch)
            what = "what the live teacher's forward returns to its logits"
            return TeacherOutputs(read("outputs", self.outputs, output, "LiveTeacher", what))


class _NotAskedError(RuntimeError):
    """A teacher is not asked, as it failed a moment ago."""


class Asking:
    """Asks a teacher, and masks and counts its failures if told to.

    ``missing`` gives the outputs of a batch whose teacher failed: all absent.
    """

    def __init__(self, masks_errors: bool, missing: Callable[[Any], TeacherOutputs]) -> None:
        self.masks_errors = masks_errors
        self.failures = 0
        self._missing = missing
        self._retry_at = -float("inf")
        self._missing_was_tried = False

    def ask(self, teacher: Callable[[Any], TeacherOutputs], batch: Any) -> TeacherOutputs:
        """What a function says of a batch."""
        return self.unless_it_fails(lambda: self._asked(teacher, batch), batch)

    def start(self, teacher: AsyncTeacher, batch: Any) -> Future[TeacherOutputs]:
        """A look-up that was begun, or has failed where errors are masked."""
        if not self.masks_errors:
            return teacher.start(batch)
        try:
            return self._asked(teacher.start, batch)
        except MASKED_ERRORS as error:
            failed: Future[TeacherOutputs] = Future()
            failed.set_exception(error)
            return failed

    def unless_it_fails(self, outputs: Callable[[], TeacherOutputs], batch: Any) -> TeacherOutputs:
        """What a function returns; no outputs where it fails and errors are masked."""
        if not self.masks_errors:
            return outputs()
        if not self._missing_was_tried:  # a wrong set-up should not wait for the first failure
            self._missing(batch)
            self._missing_was_tried = True
        try:
            return outputs()
        except MASKED_ERRORS as error:
            self._count(error)
            return self._missing(batch)

    def _asked(self, teacher: Callable[[Any], T], batch: Any) -> T:
        if time.monotonic() < self._retry_at:
            raise _NotAskedError
        return teacher(batch)

    def _count(self, error: Exception) -> None:
        if not isinstance(error, _NotAskedError):
            self._retry_at = time.monotonic() + RETRY_SECONDS
        if not self.failures:
            warnings.warn(
                f"the teacher's outputs can't be had ({type(error).__name__}: {error}); "
                "training goes on without them, and they are asked for again every "
                f"{RETRY_SECONDS:g} s; TrainPipelineExFM.teacher_failures counts batches",
                TeacherMissingWarning,
                stacklevel=2,
            )
        self.failures += 1


class ProbabilityCheck:
    """Warns, once a task, where a binary task's outputs look like probabilities.

    It looks when enough were seen, however few come in a batch or how late. Each look waits for the
    device, so it comes after 1, 2, 4, 8 ... batches.
    """

    def __init__(self, head: AuxiliaryHead) -> None:
        self._tasks = {t: task.name for t, task in enumerate(head.tasks) if not task.regression}
        self._batches = 0
        self._seen: Tensor | None = None  # (3, T): how many, -lowest, highest

    def __call__(self, outputs: TeacherOutputs) -> None:
        """Take in a batch's outputs."""
        if not self._tasks or not len(outputs.values):
            return
        self._batches += 1
        absent = torch.finfo(torch.float32).min
        there, values = outputs.presence.flatten(0, 1), outputs.values.flatten(0, 1)
        low, high = (torch.where(there, each, absent).amax(0) for each in (-values, values))
        seen = torch.stack([there.sum(0).float(), low, high])
        if self._seen is not None:
            seen[0] += self._seen[0]
            seen[1:] = torch.maximum(seen[1:], self._seen[1:])
        self._seen = seen
        if self._batches & (self._batches - 1):
            return
        for t, (count, minus_low, high) in enumerate(seen.t().tolist()):
            if count < TELLING_OUTPUTS:
                continue
            name = self._tasks.pop(t, None)
            if name is not None and 0 <= -minus_low < high <= 1:
                warnings.warn(
                    f"the teachers' outputs for the binary task {name!r} should be logits; all of "
                    f"the first {count:.0f} lie in [0, 1]: if they are probabilities, take "
                    "TeacherOutputs.from_probabilities, or torch.logit before they are stored",
                    DistillationWarning,
                    stacklevel=2,
                )
