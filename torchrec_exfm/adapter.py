"""The student adapter (SA): a stale teacher's outputs, re-calibrated on fresh labels.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_exfm.batch import TeacherOutputs, check_outputs_shape
from torchrec_exfm.functional import masked_mean
from torchrec_exfm.heads import Task, TaskLoss, check_tasks, checked_labels, constant, mlp

__all__ = ["StudentAdapter", "adapter_step"]

LOGIT_LIMIT = 15.0  # σ(15) is 1 - 3e-7: beyond it a logit says nothing more


class StudentAdapter(nn.Module):
    """A small perceptron from a teacher's outputs to the label (arXiv 2502.17494, eq. 6-7).

    .. math:: y_{SA} = y_F + \\mathrm{MLP}(y_F), \\qquad L_{SA} = h(y_{SA}, y)

    One perceptron a teacher, which also sees which of its outputs are there. Its last layer starts
    at 0, so the adapter starts as the identity and learns the correction. It is trained on fresh
    labels alone, through its own optimizer and before the student's step (Algorithm 1,
    :func:`adapter_step`); a second distillation head then learns from its outputs, through which
    no gradient comes back.

    Logits are kept within ±15 on their way in, predictions of a regression are taken as they are.

    Args:
        num_teachers: M, at least 1.
        tasks: the T tasks, in the order of the teacher's outputs and of the labels.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: for tasks that share a name, or none.
        TypeError: for tasks of another kind.

    Example:
        >>> adapter = StudentAdapter()
        >>> adapter(TeacherOutputs(torch.tensor([0.5, -1.0]))).flatten().tolist()
        [0.5, -1.0]
    """

    limits: Tensor

    def __init__(
        self,
        *,
        num_teachers: int = 1,
        tasks: Sequence[Task] = (Task(),),
        hidden: Sequence[int] = (32,),
    ) -> None:
        super().__init__()
        check_tasks(tasks)
        self.shape = (num_teachers, len(tasks))
        self.task_loss = TaskLoss(tasks)
        limits = [float("inf") if task.regression else LOGIT_LIMIT for task in tasks]
        self.register_buffer("limits", constant(limits), persistent=False)
        self.mlps = nn.ModuleList(
            mlp(2 * len(tasks), hidden, len(tasks)) for _ in range(num_teachers)
        )
        for perceptron in self.mlps:
            for parameter in list(perceptron.parameters())[-2:]:
                nn.init.zeros_(parameter)

    def forward(self, teacher: TeacherOutputs) -> Tensor:
        """Teacher outputs -> (B, M, T) logits or predictions, with gradient to the parameters.

        Raises:
            ValueError: if the outputs' shape does not fit M and T.
        """
        check_outputs_shape(teacher, self.shape)
        values = torch.clamp(teacher.values, -self.limits, self.limits)
        inputs = torch.cat([values, teacher.presence.float()], dim=-1)
        corrections = [perceptron(inputs[:, m]) for m, perceptron in enumerate(self.mlps)]
        return values + torch.stack(corrections, dim=1)

    def loss(
        self,
        outputs: Tensor,
        teacher: TeacherOutputs,
        labels: Tensor | None,
        count: Tensor | None = None,
    ) -> Tensor:
        """L_SA: mean over present examples and over tasks, summed over teachers.

        Args:
            outputs: (B, M, T), what ``forward`` gave for ``teacher``.
            teacher: says which examples count.
            labels: (B,) or (B, T), fresh labels.
            count: (M, T), see :func:`torchrec_exfm.functional.masked_mean`.

        Raises:
            ValueError: if the labels are missing or their shape does not fit.
        """
        targets = checked_labels(labels, len(outputs), outputs.shape[2])
        targets = targets.unsqueeze(1).expand_as(outputs)
        losses = self.task_loss(outputs, targets)
        total: Tensor = masked_mean(losses, teacher.presence, count).mean(-1).sum()
        return total


def adapter_step(
    adapter: StudentAdapter,
    optimizer: torch.optim.Optimizer,
    teacher: TeacherOutputs,
    labels: Tensor | None,
    *,
    count: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Algorithm 1, first half: one step of the adapter, then its outputs for the student.

    Under data parallelism every rank must call it, with the same ``count``; the gradients are
    averaged over ``group`` in one all-reduce.

    Args:
        adapter: trained in place.
        optimizer: over the adapter's parameters alone.
        teacher: the step's outputs.
        labels: (B,) or (B, T), the step's fresh labels.
        count: (M, T), see :func:`torchrec_exfm.functional.masked_mean`.
        group: the ranks to average over; None: this one alone.

    Returns:
        (B, M, T) outputs of the updated adapter, detached.

    Raises:
        ValueError: if labels are missing or a shape does not fit.
    """
    return start_adapter_step(adapter, optimizer, teacher, labels, count=count, group=group)()


def start_adapter_step(
    adapter: StudentAdapter,
    optimizer: torch.optim.Optimizer,
    teacher: TeacherOutputs,
    labels: Tensor | None,
    *,
    count: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Callable[[], Tensor]:
    """:func:`adapter_step` in two halves: what it returns ends the step that it has begun.

    The gradients are there, and on their way to the other ranks, when this returns; what comes
    between the two halves hides the way. Autocast is off in both.
    """
    parameters = list(adapter.parameters())
    exact = torch.autocast(teacher.values.device.type, enabled=False)
    with torch.enable_grad(), exact:
        loss = adapter.loss(adapter(teacher), teacher, labels, count)
        gradients = torch.autograd.grad(loss, parameters)
    average = (lambda: gradients) if group is None else _start_average(gradients, group)

    def finish() -> Tensor:
        for parameter, gradient in zip(parameters, average(), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), exact:
            adapted: Tensor = adapter(teacher)
        return adapted

    return finish


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to add up a tensor over the ranks, in place; the call of the result waits for it."""
    work = dist.all_reduce(tensor, group=group, async_op=True)

    def wait() -> Tensor:
        assert work is not None
        work.wait()
        return tensor

    return wait


def _start_average(
    gradients: Sequence[Tensor], group: dist.ProcessGroup
) -> Callable[[], Sequence[Tensor]]:
    wait = start_all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), group)

    def average() -> Sequence[Tensor]:
        pieces = (wait() / group.size()).split([gradient.numel() for gradient in gradients])
        return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]

    return average
