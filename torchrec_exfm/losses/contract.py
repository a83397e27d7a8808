"""What a loss is: a function from a step's B examples to a loss for each of a term's U tasks."""

from __future__ import annotations

import math
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
            or more; they alone receive gradient. Of a loss with a ``width`` (B, U, width), or
            (B, U, D) where that is 0.
        values: (B, U), the teacher's logits or predictions, without gradient. Of a loss of
            ``embeddings`` (B, 1, E), the same for all tasks.
        absent: (B, U), boolean, which examples should have no influence, for want of ``values`` or
            with a weight of 0.
        count: (U,), > 0, the denominator: the sum of present weights, averaged over the ranks.
        alpha: α of the term, for losses that take it.
        weights: (B, U), >= 0; None: all 1.
        groups: (B,) int64, equal for examples that are compared; None where no loss needs them.
        candidates: (B,) int64, the examples' items, and (B,) log q, how often each is sampled, or
            None; None where no loss needs them.
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
    """A loss for ``DistillationTerm(loss=...)``: a pure function, and what it needs.

    Sums over the examples divided by ``count``, without a mean over the examples of its own, are
    right over several ranks, whose gradients are averaged.

    Args:
        function: takes :class:`LossInputs` to (U,), one loss for each task.
        needs_groups: it reads ``groups``; a pipeline without them is then refused.
        needs_candidates: it reads ``candidates``; likewise.
        takes_alpha: it reads ``alpha``; a term with an α other than 1 is refused otherwise.
        binary_only: it has no meaning for a regression; a term over one is then refused.
        embeddings: it learns from the teacher's embeddings in the place of its outputs.
        width: of what it takes from the student. None: a head's output for each task. A number:
            so many outputs of a head on the shared representation. 0: that representation, (B, D),
            itself, of :class:`~torchrec_exfm.OutputsOf` two towers [u, v].
    """

    function: Callable[[LossInputs], Tensor] = field(repr=False)
    needs_groups: bool = False
    needs_candidates: bool = False
    takes_alpha: bool = False
    binary_only: bool = False
    embeddings: bool = False
    width: int | None = None

    def __call__(self, inputs: LossInputs) -> Tensor:
        """(U,), with gradient."""
        return self.function(inputs)


def check_temperature(name: str, value: float) -> float:
    """Return it; raise a ValueError unless it is a finite number > 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} should be a finite number > 0; received {value}")
    return value
