"""The terms of the distillation loss, each of which teaches one teacher to one head.

Shapes: B examples, D width of a shared representation, M teachers, T tasks, U tasks of a term.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_exfm.functional import check_sampling_rate, scale_gradient
from torchrec_exfm.heads import DistillationHead
from torchrec_exfm.losses.contract import Loss, LossInputs
from torchrec_exfm.losses.elementwise import task_loss
from torchrec_exfm.tasks import Task, map_tasks, mean_task_losses, pick_columns

__all__ = ["DistillationTerm"]

TASK_LOSS = task_loss()
LEAD_DECAY = 0.99  # per step, of the running means behind a term's margin


@dataclass(frozen=True, kw_only=True)
class DistillationTerm:
    """One term of the loss: one teacher, taught to one head (arXiv 2502.17494, eq. 3-5, 7).

    Args:
        teacher: the teacher's name.
        adapted: learn from the student adapter's re-calibrated outputs instead of the teacher's.
        serving: teach the serving head itself, without a distillation head. The tapped module's
            output, (B, T) or (B,), is read as its logits (not probabilities) or predictions. Use it
            with ``adapted``, as the adapter removes the teacher's bias on fresh labels. Without
            it, a biased teacher biases the served predictions.
        tasks: the names of the tasks it covers; None: all. Terms over different tasks give each
            task its own α, β and w.
        loss: one of :mod:`torchrec_exfm.losses`, or a ``Loss`` of your own; by default each task's
            own, cross entropy or squared error. For a loss of the teacher's embeddings, the head
            is a projection of the shared representation, or there is none.
        alpha: α, label scaling: multiplies the soft label, which is then clipped at 1 (or the
            prediction of a regression, unclipped). For ``task_loss()`` and ``temperature()``.
        beta: β, gradient scaling: multiplies this head's gradient into the backbone.
        weight: w, multiplies the term in the loss, and so all its gradients.
        hidden: widths of the head's hidden layers; () for a linear head.
        margin: ρ, for terms of the serving head: the lead at which the term has its full weight.
            Each task's loss is multiplied by clip((1 - L_T / L_S) / ρ, 0, 1). L_T and L_S are
            running means of the losses of the target and of the serving head on fresh labels. A
            teacher that is no better than the student has no influence. None: the weight does not
            depend on the teacher's quality.
        negative_sampling_rate: r_F, the share of the negatives that the teacher's training data
            kept, in (0, 1]. The soft label of a binary task is σ(z + log r_F - log r_S), with the
            task's r_S: the teacher's logit z as if it had learned from the student's data. If both
            are sampled alike, set both or neither. Leave it at 1 for an adapted term, whose adapter
            learns from the student's own labels, and for a regression.

    Raises:
        ValueError: if α is not positive, if β or w is negative, or if one is not finite; if α is
            not 1 and the loss does not take it; if the rate is outside (0, 1], or is not 1 and the
            term is adapted; if a term of the serving head sets β or ``hidden``; for a margin that
            is not positive, or without ``serving``.
        TypeError: if ``hidden`` or ``tasks`` is no tuple, or ``loss`` no ``Loss``.
    """

    teacher: str = "teacher"
    adapted: bool = False
    serving: bool = False
    tasks: tuple[str, ...] | None = None
    loss: Loss = TASK_LOSS
    alpha: float = 1.0
    beta: float = 1.0
    weight: float = 1.0
    hidden: tuple[int, ...] = (128,)
    margin: float | None = None
    negative_sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("weight", self.weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} should be a finite number >= 0; received {value}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha should be a finite number > 0; received {self.alpha}")
        self._check_loss()
        if self.margin is not None and not (self.serving and 0 < self.margin < math.inf):
            raise ValueError(
                "margin should be None, or a number > 0 of a term with serving=True; received "
                f"margin={self.margin}, serving={self.serving}"
            )
        check_sampling_rate("negative_sampling_rate", self.negative_sampling_rate)
        if self.adapted and self.negative_sampling_rate != 1:
            raise ValueError(
                "negative_sampling_rate of an adapted term should be 1, as the adapter learns from "
                "the student's own labels and needs no correction; received "
                f"{self.negative_sampling_rate}"
            )
        for name, values in (("hidden", self.hidden), ("tasks", self.tasks)):
            if values is not None and not isinstance(values, (tuple, list)):
                raise TypeError(f"{name} should be a tuple; received {values!r}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden should be widths of at least 1; received {self.hidden}")

    def _check_loss(self) -> None:
        """Raise unless the loss goes with the other options."""
        if not isinstance(self.loss, Loss):
            raise TypeError(
                "loss should be a Loss, as torchrec_exfm.losses.listwise() returns, or Loss("
                f"a function of LossInputs); received {self.loss!r}"
            )
        if self.alpha != 1 and not self.loss.takes_alpha:
            raise ValueError(f"alpha should be 1 with this loss; received {self.alpha}")
        if self.serving and (self.beta != 1 or self.hidden != type(self).hidden):
            raise ValueError(
                "a term of the serving head has no head of its own and no gradient to scale: leave "
                f"hidden and beta as they are; received hidden={self.hidden}, beta={self.beta}"
            )
        if (
            (self.loss.width is not None and self.serving)
            or (self.loss.embeddings and (self.adapted or self.negative_sampling_rate != 1))
            or (self.loss.width == 0 and self.hidden != type(self).hidden)
        ):
            raise ValueError(
                "serving, adapted and negative_sampling_rate are for losses of outputs, and hidden "
                "for those with a head: leave them as they are with this loss; received "
                f"serving={self.serving}, adapted={self.adapted}, "
                f"negative_sampling_rate={self.negative_sampling_rate}, hidden={self.hidden}"
            )

    @property
    def name(self) -> str:
        """The teacher's name, then "adapted" and "serving" if set, then the tasks if not all."""
        flags = [flag for flag in ("adapted", "serving") if getattr(self, flag)]
        return "/".join([self.teacher, *flags, *(self.tasks or ())])


@dataclass(frozen=True)
class Targets:
    """The targets of all teachers and tasks.

    Args:
        values: (B, M, T), the teacher outputs, or (B, M, E), their embeddings; 0 where missing.
        absent: (B, M, T), boolean, which examples have no influence on the loss.
        count: (M, T), the denominators of the loss, positive.
    """

    values: Tensor
    absent: Tensor
    count: Tensor


@dataclass(frozen=True, kw_only=True)
class TermInputs:
    """The inputs that all terms of a step share.

    Args:
        outputs: the teacher outputs as targets.
        embeddings: the teachers' embeddings as targets; None if no loss needs them.
        adapted: (B, M, T), the adapter's outputs; None if no term is adapted.
        labels: (B, T), NaN where one is missing; None if no running mean is to be updated.
        weights: (B, T); None: all 1.
        label_count: (M, T), denominators of the running means, 0 where there is no label.
        unlabelled: (B, M, T), boolean, which examples the running means leave out; None without
            labels.
        groups: (B,), ids of groups; None if no loss needs them.
        candidates: ids of items, and log q; None if no loss needs them.
    """

    outputs: Targets
    embeddings: Targets | None
    adapted: Tensor | None
    labels: Tensor | None
    weights: Tensor | None
    label_count: Tensor
    unlabelled: Tensor | None
    groups: Tensor | None
    candidates: tuple[Tensor, Tensor | None] | None


class TermLoss(nn.Module):
    """The module of a term: its heads, its loss and its teacher's lead.

    Args:
        term: the options.
        teacher: the position of its teacher among the M.
        tasks: all T tasks.
        taps: for each shared representation, the positions of its tasks and its width D.
    """

    lead_losses: Tensor | None

    def __init__(
        self,
        term: DistillationTerm,
        teacher: int,
        tasks: Sequence[Task],
        taps: Sequence[tuple[list[int], int]],
    ) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        self.term = term
        self.teacher = teacher
        self.columns = [names.index(name) for name in term.tasks or names]
        self._covers_all = self.columns == list(range(len(names)))
        self.tasks = [tasks[t] for t in self.columns]
        regressions = [task.name for task in self.tasks if task.regression]
        if term.loss.binary_only and regressions:
            raise ValueError(
                f"the loss of the term {term.name!r} should accept regressions; received one for "
                f"binary tasks alone over {regressions}: give those a term of their own"
            )
        self._shifts = [self._shift(task) for task in self.tasks]
        # Heads are by tap, so their outputs come in the order of the taps, not of the tasks.
        covered = [[t for t in self.columns if t in tap_tasks] for tap_tasks, _ in taps]
        order = list(itertools.chain(*covered))
        self._order = [order.index(t) for t in self.columns]
        self._taps = [] if term.serving else [i for i, columns in enumerate(covered) if columns]
        self._head_of_column = [k for k, i in enumerate(self._taps) for _ in covered[i]]
        width = term.loss.width
        if width == 0 and len(self._taps) > 1:
            raise ValueError(
                f"the loss of the term {term.name!r} should cover tasks that share two towers; "
                f"received {len(self._taps)} taps: give each a term of its own"
            )
        self.heads = nn.ModuleList(
            DistillationHead(
                taps[i][1], num_tasks=width or len(covered[i]), hidden=term.hidden, beta=term.beta
            )
            for i in self._taps
            if width != 0
        )
        # On the CPU even under a meta default device, as nothing would initialize them later.
        means = torch.zeros(2, len(self.columns), device="cpu") if term.margin else None
        self.register_buffer("lead_losses", means)

    def forward(
        self, shared: Sequence[Tensor], serving: Tensor | None, inputs: TermInputs
    ) -> tuple[Tensor, Tensor]:
        """Return the term's loss with w and lead, and the plain loss, detached."""
        outputs = self._outputs(shared, serving)
        targets = inputs.embeddings if self.term.loss.embeddings else inputs.outputs
        assert targets is not None
        absent = self._pick(targets.absent.select(1, self.teacher))
        values = self._values(inputs, targets.values, absent)
        weights = None if inputs.weights is None else self._pick(inputs.weights)
        count, alpha = self._pick(targets.count[self.teacher]), self.term.alpha
        columns = (self.tasks, outputs, values, absent, count, alpha, weights)
        means = self.term.loss(LossInputs(*columns, inputs.groups, inputs.candidates))
        if means.shape != (len(self.tasks),):
            raise ValueError(
                f"the loss of the term {self.term.name!r} should return {(len(self.tasks),)}, one "
                f"value for each of its tasks; received {tuple(means.shape)}"
            )
        loss = taught = _mean(means)
        if self.lead_losses is not None:
            taught = _mean(self.lead * means)
            if inputs.unlabelled is not None:
                self._update_means(values, outputs.detach(), weights, inputs)
        w = self.term.weight
        return taught if w == 1 else w * taught, loss.detach()

    @property
    def lead(self) -> Tensor:
        """The factor of each task's loss, (U,): in [0, 1] with a margin, 1 without."""
        if self.lead_losses is None or self.term.margin is None:
            return torch.ones(len(self.columns))
        teacher_loss, student_loss = self.lead_losses
        lead: Tensor = (1 - teacher_loss / student_loss) / self.term.margin
        return lead.clamp_(0, 1).nan_to_num_(0.0)  # NaN before the first labels: 0 / 0

    @torch.no_grad()
    def _update_means(
        self, values: Tensor, outputs: Tensor, weights: Tensor | None, inputs: TermInputs
    ) -> None:
        """Update the running means with the losses of targets and outputs, (B, U), on labels."""
        assert inputs.labels is not None and inputs.unlabelled is not None
        assert self.lead_losses is not None
        both = torch.stack([values, outputs.to(values.dtype)], dim=1)
        labels = self._pick(inputs.labels).unsqueeze(1).expand_as(both)
        unlabelled = self._pick(inputs.unlabelled.select(1, self.teacher)).unsqueeze(1)
        weights = None if weights is None else weights.unsqueeze(1)
        count = self._pick(inputs.label_count[self.teacher])
        losses = mean_task_losses(self.tasks, both, labels, unlabelled, count, weights)
        losses = losses.to(self.lead_losses.dtype)
        # Without labels the mean is NaN; an infinite loss would stay in a running mean for ever.
        usable = losses.amax(0) < math.inf
        losses = torch.where(usable, losses, self.lead_losses)
        # Not in place: a compiled backward may recompute the lead from the means as they were.
        self.lead_losses = self.lead_losses.lerp(losses, 1 - LEAD_DECAY)

    def _outputs(self, shared: Sequence[Tensor], serving: Tensor | None) -> Tensor:
        """Return the student's (B, U), or (B, U, D) of representations, in float32 or more."""
        if serving is not None and self.term.serving:
            # Weight 0 equals the plain student to the bit: no gradient goes back, not even zeros,
            # which could change the memory layout of the sum.
            outputs = self._pick(serving if self.term.weight else serving.detach())
        elif self.term.loss.width == 0:
            towers = shared[self._taps[0]]
            towers = scale_gradient(towers, self.term.beta) if self.term.weight else towers.detach()
            outputs = towers.unsqueeze(1).expand(-1, len(self.columns), -1)
        else:
            parts = [head(shared[i]) for i, head in zip(self._taps, self.heads, strict=True)]
            if self.term.loss.width is None:
                outputs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
                outputs = pick_columns(outputs, self._order)
            else:
                outputs = torch.stack([parts[self._head_of_column[i]] for i in self._order], dim=1)
        return outputs if outputs.dtype == torch.float64 else outputs.float()

    def _values(self, inputs: TermInputs, values: Tensor, absent: Tensor) -> Tensor:
        """Return the targets: (B, U) logits at the student's rate or predictions, or embeddings."""
        if self.term.loss.embeddings:
            values = values.select(1, self.teacher).unsqueeze(1)
            if not values.shape[-1]:  # TeacherOutputs.missing() does not know E
                values = values.new_zeros(*values.shape[:2], self.term.loss.width or 0)
            return values
        if not self.term.adapted or inputs.adapted is None:
            values = self._pick(values.select(1, self.teacher))
        else:
            values = self._pick(inputs.adapted.select(1, self.teacher)).masked_fill(absent, 0.0)
        if not any(self._shifts):
            return values
        return map_tasks(self.tasks, lambda task, column: column + self._shift(task), values)

    def _shift(self, task: Task) -> float:
        """Return log r_F - log r_S: from the teacher's sampling rate to the student's."""
        if self.term.adapted:
            return 0.0
        rate = self.term.negative_sampling_rate
        if task.regression and rate != 1:
            raise ValueError(
                f"negative_sampling_rate of the term {self.term.name!r} over the regression "
                f"{task.name!r} should be 1; received {rate}: give the binary tasks a term of "
                "their own"
            )
        return math.log(rate) - math.log(task.negative_sampling_rate)

    def _pick(self, values: Tensor) -> Tensor:
        """Return the term's columns: (..., T) -> (..., U)."""
        return values if self._covers_all else pick_columns(values, self.columns)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move and convert the module, but keep the running means in float32."""
        # In half precision most updates, 1 - LEAD_DECAY of a difference, would round to nothing.
        before = self.lead_losses
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        after = self.lead_losses
        if before is not None and after is not None and after.dtype != before.dtype:
            self.lead_losses = before.to(after.device)
        return self


def _mean(values: Tensor) -> Tensor:
    """Return the mean; for one value a view of it, which launches no kernel."""
    return values.reshape(()) if len(values) == 1 else values.mean()
