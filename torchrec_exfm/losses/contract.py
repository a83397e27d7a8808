"""What a loss is: a function from a step's B examples to a loss for each of a term's U tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchrec_exfm.tasks import Task


@dataclass(frozen=True)
class LossInputs:
    """What a term's loss is computed from: the one argument of every loss.

    Args:
        tasks: the U tasks of the term.
        outputs: (B, U), the head's logits of binary tasks, predictions of regressions, in float32
            or more; they alone receive gradient.
        values: (B, U), the teacher's logits or predictions, without gradient.
        absent: (B, U), boolean, which examples should have no influence, for want of a teacher's
            output or with a weight of 0.
        count: (U,), > 0, the denominator: the sum of present weights, averaged over the ranks.
        alpha: α of the term, for losses that take it.
        weights: (B, U), >= 0; None: all 1.
        groups: (B,) int64, equal for examples that are compared; None where no loss needs them.
    """

    tasks: Sequence[Task]
    outputs: Tensor
    values: Tensor
    absent: Tensor
    count: Tensor
    alpha: float = 1.0
    weights: Tensor | None = None
    groups: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """A loss for ``DistillationTerm(loss=...)``: a pure function, and what it needs.

    Sums over the examples divided by ``count``, without a mean over the examples of its own, are
    right over several ranks, whose gradients are averaged.

    Args:
        function: takes :class:`LossInputs` to (U,), one loss for each task.
        needs_groups: it reads ``groups``; a pipeline without them is then refused.
        takes_alpha: it reads ``alpha``; a term with an α other than 1 is refused otherwise.
        binary_only: it has no meaning for a regression; a term over one is then refused.
    """

    function: Callable[[LossInputs], Tensor] = field(repr=False)
    needs_groups: bool = False
    takes_alpha: bool = False
    binary_only: bool = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        """(U,), with gradient."""
        return self.function(inputs)
