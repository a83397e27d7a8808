"""The contract of a loss: from a step's B examples to one value for each of a term's U tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchrec_exfm.tasks import Task


@dataclass(frozen=True)
class LossInputs:
    """The argument of every loss.

    Args:
        tasks: the U tasks of the term.
        outputs: (B, U), the head's logits of binary tasks or predictions of regressions, in float32
            or more; only they receive gradient. For a loss with a ``width``: (B, U, width), or
            (B, U, D) if that is 0.
        values: (B, U), the teacher's logits or predictions, without gradient. For a loss of
            ``embeddings``: (B, 1, E), the same for all tasks.
        absent: (B, U), boolean, which examples must have no influence: those without ``values`` or
            with a weight of 0.
        count: (U,), > 0, the denominator: the sum of present weights, averaged over the ranks.
        alpha: α of the term, for losses that take it.
        weights: (B, U), >= 0; None: all 1.
        groups: (B,) int64, equal for examples that are compared; None if no loss needs them.
        candidates: (B,) int64, the examples' items, and (B,) log q, how often each is sampled, or
            None; None if no loss needs them.
    """

    tasks: Sequence[Task]
    outputs: Tensor
    values: Tensor
    absent: Tensor
    count: Tensor
    alpha: float = 1.0
    weights: Tensor | None = None
    groups: Tensor | None = None
    candidates: tuple[Tensor, Tensor | None] | None = None


@dataclass(frozen=True)
class Loss:
    """A loss for ``DistillationTerm(loss=...)``: a pure function and its requirements.

    Return sums over the examples divided by ``count``, not means over a rank's examples. Then the
    average of the ranks' gradients is that of the loss over all examples.

    Args:
        function: maps :class:`LossInputs` to (U,), one loss for each task.
        needs_groups: it reads ``groups``; a pipeline without them raises.
        needs_candidates: it reads ``candidates``; a pipeline without them raises.
        takes_alpha: it reads ``alpha``; if False, a term with an α other than 1 raises.
        binary_only: it is undefined for regressions; a term over one raises.
        embeddings: it learns from the teacher's embeddings instead of its outputs.
        width: of its input from the student. None: a head's output for each task. A number above 0:
            that many outputs of a head on the shared representation. 0: the representation itself,
            (B, D), the two towers [u, v] of :class:`~torchrec_exfm.OutputsOf`.
    """

    function: Callable[[LossInputs], Tensor] = field(repr=False)
    needs_groups: bool = False
    needs_candidates: bool = False
    takes_alpha: bool = False
    binary_only: bool = False
    embeddings: bool = False
    width: int | None = None

    def __call__(self, inputs: LossInputs) -> Tensor:
        """Return the loss of each task, (U,), with gradient."""
        return self.function(inputs)


def check_temperature(name: str, value: float) -> float:
    """Return a temperature; raise a ValueError unless it is a finite number > 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} should be a finite number > 0; received {value}")
    return value
