"""Where a step's teacher outputs come from, and what is done when they can't be had.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from torchrec_exfm._user import read
from torchrec_exfm._warnings import DistillationWarning, TeacherMissingWarning
from torchrec_exfm.auxiliary import AuxiliaryHead
from torchrec_exfm.batch import Started, TeacherOutputs

__all__ = ["LiveTeacher", "TeacherSource"]

RETRY_SECONDS = 30.0  # for so long a teacher that failed is not asked anew
# StoreError is a RuntimeError; errors of other kinds come from wrong set-ups.
MASKED_ERRORS = (OSError, RuntimeError, CancelledError)
TELLING_OUTPUTS = 64  # so many do not lie in [0, 1] by chance


@runtime_checkable
class TeacherSource(Protocol):
    """Where a batch's teacher outputs come from: the one method that a source has.

    ``torchrec_exfm.das.TeacherLookup`` and :class:`LiveTeacher` are sources, a function of the
    batch is made one, and so is whatever class of your own has this method.
    """

    def start(self, batch: Any) -> Started:
        """Start to bring the outputs of a batch, which is on the host.

        Called as the data loader gives the batch, while earlier ones train. An error of a kind
        that ``on_teacher_error="mask"`` masks (OSError, RuntimeError) may be raised here or come
        from the future.

        Returns:
            ``TeacherOutputs`` on the host, or a future of them, which is waited for when the
            batch's step starts; or a function of the batch, called then with the batch on the
            device.
        """
        ...


def as_source(teacher: Callable[[Any], TeacherOutputs] | TeacherSource | None) -> Any:
    """The source that a teacher is, or that a function makes; None: the loader brings outputs."""
    if teacher is None or isinstance(teacher, TeacherSource):
        return teacher
    return SimpleNamespace(start=teacher)


class LiveTeacher:
    """A teacher in the same process, asked at every step, without gradient.

    The most expensive way to have a teacher, and the baseline for the others. Under several ranks
    a sharded teacher runs its collectives at the same point of every rank's step.

    Args:
        model: ``model(batch)`` on the user's batch, on the student's device; put into
            evaluation mode.
        outputs: takes what it returns to logits (or predictions of a regression) of shape (B, T)
            or (B,), or to ``TeacherOutputs``, with embeddings; the default fits TorchRec's contract
            ``(loss, (loss, logits, labels))``.

    Raises:
        ValueError: when called, if ``outputs`` does not fit what the model returns.
    """

    def __init__(
        self, model: nn.Module, *, outputs: Callable[[Any], Any] = lambda output: output[1][1]
    ) -> None:
        self.model = model.eval()
        self.outputs = outputs

    def start(self, batch: Any) -> Callable[[Any], TeacherOutputs]:
        """Return what is asked when the batch's step starts: this teacher."""
        return self

    def __call__(self, batch: Any) -> TeacherOutputs:
        """Run the teacher on a batch that is on the device."""
        with torch.no_grad():
            output = self.model(batch)
            what = "what the live teacher's forward returns to its logits"
            made = read("outputs", self.outputs, output, "LiveTeacher", what)
            return made if isinstance(made, TeacherOutputs) else TeacherOutputs(made)


class MaskedErrors:
    """A source around a source, whose failures become outputs that are missing.

    A source that has failed is left alone for ``RETRY_SECONDS``. ``size`` gives the number of
    examples of a batch, ``shape`` is that of an example's outputs, (M, T).
    """

    def __init__(
        self, source: TeacherSource, size: Callable[[Any], int], shape: tuple[int, int]
    ) -> None:
        self.failures = 0  # batches that went without outputs
        self._source = source
        self._size = size
        self._shape = shape
        self._retry_at = -float("inf")

    def start(self, batch: Any) -> Any:
        """As the source's own."""
        size = self._size(batch)  # before a failure, so that a wrong set-up is told at once
        if time.monotonic() < self._retry_at:
            return self._missing(size)
        started: Any = self._unless_it_fails(lambda: self._source.start(batch), size)
        if isinstance(started, TeacherOutputs):
            return started
        if hasattr(started, "result"):
            return SimpleNamespace(result=lambda: self._unless_it_fails(started.result, size))
        return lambda on_device: self._unless_it_fails(lambda: started(on_device), size)

    def _unless_it_fails(self, function: Callable[[], Any], size: int) -> Any:
        try:
            return function()
        except MASKED_ERRORS as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self.failures:
                warnings.warn(
                    f"the teacher's outputs can't be had ({type(error).__name__}: {error}); "
                    "training goes on without them, and they are asked for again every "
                    f"{RETRY_SECONDS:g} s; teacher_failures of the pipeline counts batches",
                    TeacherMissingWarning,
                    stacklevel=2,
                )
            return self._missing(size)

    def _missing(self, size: int) -> TeacherOutputs:
        self.failures += 1
        return TeacherOutputs.missing(size, *self._shape)


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
