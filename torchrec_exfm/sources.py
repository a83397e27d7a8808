"""The sources of a step's teacher outputs, and what happens when a source fails.

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

RETRY_SECONDS = 30.0  # how long a source that failed is left alone
# StoreError is a RuntimeError. Other errors come from a wrong set-up, which masking would hide.
MASKED_ERRORS = (OSError, RuntimeError, CancelledError)
TELLING_OUTPUTS = 64  # so many logits do not all lie in [0, 1] by chance


@runtime_checkable
class TeacherSource(Protocol):
    """The protocol of a source of teacher outputs: one method.

    ``torchrec_exfm.das.TeacherLookup`` and :class:`LiveTeacher` are sources. So is any class of
    your own with this method. A pipeline also accepts a function of the batch.
    """

    def start(self, batch: Any) -> Started:
        """Start to fetch the outputs of a batch, which is on the host.

        It is called when the data loader yields the batch, while earlier batches train. An error
        that ``on_teacher_error="mask"`` masks (OSError, RuntimeError) may be raised here or by the
        future.

        Returns:
            ``TeacherOutputs`` on the host; or a future of them, awaited when the batch's step
            starts; or a function of the batch, called at that time with the batch on the device.
        """
        ...


def as_source(teacher: Callable[[Any], TeacherOutputs] | TeacherSource | None) -> Any:
    """Return a teacher as a source, wrapping a function; None if the loader brings outputs."""
    if teacher is None or isinstance(teacher, TeacherSource):
        return teacher
    return SimpleNamespace(start=teacher)


class LiveTeacher:
    """A teacher that runs in the same process at every step, without gradient.

    It is the most expensive kind of teacher, and the baseline for the others. With several ranks, a
    sharded teacher runs its collectives at the same point of every rank's step.

    Args:
        model: called as ``model(batch)`` on the user's batch, on the student's device; set to
            evaluation mode.
        outputs: a function from the model's output to logits (or predictions of a regression) of
            shape (B, T) or (B,), or to ``TeacherOutputs``, with embeddings; the default fits
            TorchRec's contract ``(loss, (loss, logits, labels))``.

    Raises:
        ValueError: when called, if ``outputs`` does not fit the model's output.
    """

    def __init__(
        self, model: nn.Module, *, outputs: Callable[[Any], Any] = lambda output: output[1][1]
    ) -> None:
        self.model = model.eval()
        self.outputs = outputs

    def start(self, batch: Any) -> Callable[[Any], TeacherOutputs]:
        """Return this teacher, to be called when the batch's step starts."""
        return self

    def __call__(self, batch: Any) -> TeacherOutputs:
        """Run the teacher on a batch that is on the device."""
        with torch.no_grad():
            output = self.model(batch)
            what = "what the live teacher's forward returns to its logits"
            values = read("outputs", self.outputs, output, "LiveTeacher", what)
            return values if isinstance(values, TeacherOutputs) else TeacherOutputs(values)


class MaskedErrors:
    """A source that replaces the failures of another one with missing outputs.

    After a failure the other source is left alone for ``RETRY_SECONDS``. ``size`` returns the
    number of examples of a batch; ``shape`` is that of an example's outputs, (M, T).
    """

    def __init__(
        self, source: TeacherSource, size: Callable[[Any], int], shape: tuple[int, int]
    ) -> None:
        self.failures = 0  # batches without outputs
        self._source = source
        self._size = size
        self._shape = shape
        self._retry_at = -float("inf")

    def start(self, batch: Any) -> Any:
        """Start the other source, or return missing outputs if it failed recently."""
        size = self._size(batch)  # at every batch, so that a wrong ``labels`` shows at once
        if time.monotonic() < self._retry_at:
            return self._missing(size)
        started: Any = self._call_or_mask(lambda: self._source.start(batch), size)
        if isinstance(started, TeacherOutputs):
            return started
        if hasattr(started, "result"):
            return SimpleNamespace(result=lambda: self._call_or_mask(started.result, size))
        return lambda device_batch: self._call_or_mask(lambda: started(device_batch), size)

    def _call_or_mask(self, function: Callable[[], Any], size: int) -> Any:
        try:
            return function()
        except MASKED_ERRORS as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self.failures:
                warnings.warn(
                    f"the teacher outputs are unavailable ({type(error).__name__}: {error}); "
                    "training goes on without them and asks for them again every "
                    f"{RETRY_SECONDS:g} s; the pipeline's teacher_failures counts such batches",
                    TeacherMissingWarning,
                    stacklevel=2,
                )
            return self._missing(size)

    def _missing(self, size: int) -> TeacherOutputs:
        self.failures += 1
        return TeacherOutputs.missing(size, *self._shape)


class ProbabilityCheck:
    """A check that warns, once per task, if the outputs of a binary task look like probabilities.

    It decides once it has seen enough outputs, however few come in a batch. Each decision waits for
    the device, so it is taken after 1, 2, 4, 8, ... batches only.
    """

    def __init__(self, head: AuxiliaryHead) -> None:
        self._tasks = {t: task.name for t, task in enumerate(head.tasks) if not task.regression}
        self._batches = 0
        # (3, T): count, -minimum, maximum. Of the negated values one maximum updates both.
        self._seen: Tensor | None = None

    def __call__(self, outputs: TeacherOutputs) -> None:
        """Add a batch's outputs, and warn if it is time to decide."""
        if not self._tasks or not len(outputs.values):
            return
        self._batches += 1
        absent = torch.finfo(torch.float32).min
        presence, values = outputs.presence.flatten(0, 1), outputs.values.flatten(0, 1)
        minus_low, high = (torch.where(presence, v, absent).amax(0) for v in (-values, values))
        seen = torch.stack([presence.sum(0).float(), minus_low, high])
        if self._seen is not None:
            seen[0] += self._seen[0]
            seen[1:] = torch.maximum(seen[1:], self._seen[1:])
        self._seen = seen
        if self._batches & (self._batches - 1):  # not a power of two
            return
        for t, (count, minus_low, high) in enumerate(seen.t().tolist()):
            if count < TELLING_OUTPUTS:
                continue
            # Removed with the first decision, whichever it is.
            name = self._tasks.pop(t, None)
            if name is not None and 0 <= -minus_low < high <= 1:
                warnings.warn(
                    f"the teachers' outputs for the binary task {name!r} should be logits; all of "
                    f"the first {count:.0f} lie in [0, 1]: if they are probabilities, use "
                    "TeacherOutputs.from_probabilities, or torch.logit before they are stored",
                    DistillationWarning,
                    stacklevel=2,
                )
