"""The student adapter (SA): a stale teacher's outputs, re-calibrated on fresh labels.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_exfm._compat import step_if
from torchrec_exfm._ranks import start_average
from torchrec_exfm.batch import TeacherOutputs, check_outputs_shape
from torchrec_exfm.heads import mlp
from torchrec_exfm.tasks import (
    Task,
    check_tasks,
    checked_labels,
    checked_weights,
    count_outputs,
    map_tasks,
    mean_task_losses,
    split_missing,
)

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
        self.tasks = tuple(tasks)
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
        values = map_tasks(self.tasks, _limited, teacher.values)
        inputs = torch.cat([values, teacher.presence.float()], dim=-1)
        corrections = [perceptron(inputs[:, m]) for m, perceptron in enumerate(self.mlps)]
        return values + torch.stack(corrections, dim=1)

    def loss(
        self,
        outputs: Tensor,
        teacher: TeacherOutputs,
        labels: Tensor | None,
        count: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """L_SA: mean over present examples with a label and over tasks, summed over teachers.

        Args:
            outputs: (B, M, T), what ``forward`` gave for ``teacher``.
            teacher: says which examples count.
            labels: (B,) or (B, T), fresh labels, NaN where one is missing.
            count: (M, T), see :func:`torchrec_exfm.functional.masked_mean`.
            weights: (B,) or (B, T), the examples' weights; None: all 1.

        Raises:
            ValueError: if the labels are missing, or a shape does not fit; on the CPU for infinite
                labels and negative weights.
        """
        labels = checked_labels(labels, self.tasks, len(outputs)).unsqueeze(1)
        labels, mask = split_missing(labels, teacher.presence)
        if weights is not None:
            weights = checked_weights(weights, self.tasks, len(outputs)).unsqueeze(1)
        targets = labels.expand_as(outputs)
        means = mean_task_losses(self.tasks, outputs, targets, mask, weights, count)
        total: Tensor = means.mean(-1).sum()
        return total


def _limited(task: Task, values: Tensor) -> Tensor:
    return values if task.regression else values.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def adapter_step(
    adapter: StudentAdapter,
    optimizer: torch.optim.Optimizer,
    teacher: TeacherOutputs,
    labels: Tensor | None,
    *,
    count: Tensor | None = None,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Algorithm 1, first half: one step of the adapter, then its outputs for the student.

    Without any label on any rank the optimizer takes no step. Autocast is off throughout. Under
    data parallelism every rank must call it, with the same ``count``; the gradients are averaged
    over ``group`` in one all-reduce.

    Args:
        adapter: trained in place.
        optimizer: over the adapter's parameters alone.
        teacher: the step's outputs.
        labels: (B,) or (B, T), the step's fresh labels, NaN where one is missing.
        count: (M, T), see :func:`torchrec_exfm.functional.masked_mean`.
        weights: (B,) or (B, T), the examples' weights; None: all 1.
        group: the ranks to average over; None: this one alone.

    Returns:
        (B, M, T) outputs of the updated adapter, detached.

    Raises:
        ValueError: as for :meth:`StudentAdapter.loss`.
    """
    if count is None:
        labels = checked_labels(labels, adapter.tasks, len(teacher.values))
        count = count_outputs(teacher.presence, labels, weights)[1]
    parameters = list(adapter.parameters())
    exact = torch.autocast(teacher.values.device.type, enabled=False)
    with torch.enable_grad(), exact:
        loss = adapter.loss(adapter(teacher), teacher, labels, count, weights=weights)
        gradients = torch.autograd.grad(loss, parameters)
    start_average(gradients, group)()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    step_if(optimizer, count.any())  # zero gradients would still move what has momentum
    optimizer.zero_grad()
    with torch.no_grad(), exact:
        adapted: Tensor = adapter(teacher)
    return adapted
