"""The student adapter (SA), which re-calibrates a stale teacher's outputs on fresh labels.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_exfm._compat import step_if
from torchrec_exfm._ranks import start_average
from torchrec_exfm.batch import TeacherOutputs, check_outputs_shape
from torchrec_exfm.functional import positive
from torchrec_exfm.heads import fill_mlp_gradients, mlp, run_mlp
from torchrec_exfm.tasks import (
    Task,
    check_tasks,
    checked_labels,
    checked_weights,
    count_outputs,
    find_absent,
    map_tasks,
    mean_task_losses,
)

__all__ = ["StudentAdapter", "adapter_step"]

LOGIT_LIMIT = 15.0  # σ(15) is 1 - 3e-7; larger inputs carry no more information


class StudentAdapter(nn.Module):
    """A small perceptron per teacher, from its outputs to the label (arXiv 2502.17494, eq. 6-7).

    .. math:: y_{SA} = y_F + \\mathrm{MLP}(y_F), \\qquad L_{SA} = h(y_{SA}, y)

    Each perceptron also sees the presence of its teacher's outputs. Its last layer starts at 0, so
    the adapter starts as the identity and learns a correction. It is trained on fresh labels only,
    by its own optimizer, before the student's step (Algorithm 1, :func:`adapter_step`). A second
    distillation head then learns from its outputs, without gradient to the adapter.

    Input logits are clamped to ±15; predictions of a regression are not.

    Args:
        num_teachers: M, at least 1.
        tasks: the T tasks, in the order of the teacher's outputs and of the labels.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: without tasks, or if two share a name.
        TypeError: for tasks of another type, or when subclassed.

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
        """Return logits or predictions, (B, M, T), with gradient to the parameters.

        Raises:
            ValueError: if the outputs' shape does not fit M and T.
        """
        values, inputs = self._inputs(teacher)
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
        """Return L_SA: the mean over labeled, present examples and tasks, summed over teachers.

        Args:
            outputs: (B, M, T), the result of ``forward`` on ``teacher``.
            teacher: its presence decides which examples count.
            labels: (B,) or (B, T), fresh labels, NaN where one is missing.
            count: (M, T), see :func:`torchrec_exfm.functional.masked_mean`.
            weights: (B,) or (B, T), the examples' weights; None: all 1.

        Raises:
            ValueError: if labels are missing or a shape does not fit; on the CPU for infinite
                labels and negative weights.
        """
        labels, weights, count = _checked(self, teacher, labels, weights, count)
        absent = find_absent(teacher.presence, labels, weights)
        targets = labels.unsqueeze(1).expand_as(outputs).masked_fill(absent, 0.0)  # NaN labels
        weights = None if weights is None else weights.unsqueeze(1)
        means = mean_task_losses(self.tasks, outputs, targets, absent, positive(count), weights)
        total: Tensor = means.mean(-1).sum()
        return total

    def __init_subclass__(cls) -> None:
        raise TypeError(
            "StudentAdapter should have no subclass, as adapter_step knows its gradient in closed "
            f"form; received {cls.__name__}: change tasks and hidden, or train a module of your own"
        )

    def _inputs(self, teacher: TeacherOutputs) -> tuple[Tensor, Tensor]:
        """Return the values to correct, (B, M, T), and the perceptrons' inputs, (B, M, 2 T)."""
        check_outputs_shape(teacher, self.shape)
        values = map_tasks(self.tasks, _limited, teacher.values)
        return values, torch.cat([values, teacher.presence.float()], dim=-1)


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
    """Train the adapter for one step and return its outputs: the first half of Algorithm 1.

    The gradients of :meth:`StudentAdapter.loss` are computed in closed form. In a network this
    small, kernel launches dominate the cost, and autograd makes more of them. The optimizer takes
    no step if no rank has a label. Autocast is off throughout. Under data parallelism every rank
    must call it, with the same ``count``; one all-reduce averages the gradients over ``group``.

    Args:
        adapter: trained in place.
        optimizer: over the adapter's parameters only.
        teacher: the step's outputs.
        labels: (B,) or (B, T), the step's fresh labels, NaN where one is missing.
        count: (M, T), see :func:`torchrec_exfm.functional.masked_mean`.
        weights: (B,) or (B, T), the examples' weights; None: all 1.
        group: the ranks to average over; None: this rank only.

    Returns:
        (B, M, T) outputs of the updated adapter, detached.

    Raises:
        ValueError: as for :meth:`StudentAdapter.loss`.
        TypeError: if the adapter's layers were changed, frozen, tied or hooked after it was built.
    """
    return train_adapter(adapter, optimizer, teacher, labels, count, weights, group)[1]


def train_adapter(
    adapter: StudentAdapter,
    optimizer: torch.optim.Optimizer,
    teacher: TeacherOutputs,
    labels: Tensor | None,
    count: Tensor | None,
    weights: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[list[Tensor], Tensor]:
    """Do :func:`adapter_step`; return the outputs before it, (B, T) by teacher, and after it."""
    _check_closed_form(adapter)
    parameters = list(adapter.parameters())
    with torch.no_grad(), torch.autocast(teacher.values.device.type, enabled=False):
        values, inputs = adapter._inputs(teacher)
        labels, weights, count = _checked(adapter, teacher, labels, weights, count)
        gradients = _allocate_gradients(parameters)
        mlps: Any = adapter.mlps
        # The derivative of the total loss by each example's: weight / (count T).
        scale = positive(count).reciprocal()
        if len(adapter.tasks) > 1:
            scale /= len(adapter.tasks)
        if weights is not None:
            scale = scale * weights.unsqueeze(1)
        absent = find_absent(teacher.presence, labels, weights)
        before = []
        for m, perceptron in enumerate(mlps):
            *activations, corrections = run_mlp(perceptron, inputs[:, m])
            before.append(values[:, m] + corrections)
            slope = map_tasks(adapter.tasks, _slope, before[m], labels)
            slope = slope.mul_(scale[..., m, :]).masked_fill_(absent[:, m], 0.0)
            fill_mlp_gradients(perceptron, activations, slope)
        start_average([gradients], group)()
        step_if(optimizer, count.any())  # momentum would move parameters on zero gradients too
        for parameter in parameters:
            parameter.grad = None
        adapted = torch.empty_like(values)
        for m, perceptron in enumerate(mlps):
            torch.add(values[:, m], run_mlp(perceptron, inputs[:, m])[-1], out=adapted[:, m])
    return before, adapted


def _limited(task: Task, values: Tensor) -> Tensor:
    return values if task.regression else values.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def _slope(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the derivative of the loss by the outputs, elementwise."""
    return 2 * (outputs - labels) if task.regression else outputs.sigmoid() - labels


def _check_closed_form(adapter: StudentAdapter) -> None:
    """Raise unless the adapter has only plain, trainable layers, so that the closed form holds."""
    mlps: Any = adapter.mlps
    layers = [layer for perceptron in mlps for layer in getattr(perceptron, "children", tuple)()]
    linear = [layer for layer in layers if type(layer) is nn.Linear]
    parameters = {id(p) for p in adapter.parameters() if p.requires_grad and not p._backward_hooks}
    hooked = any(layer._forward_pre_hooks or layer._forward_hooks for layer in [*mlps, *layers])
    known = all(type(layer) in (nn.Linear, nn.ReLU) for layer in layers)
    if hooked or not known or len(parameters) != 2 * len(linear):
        raise TypeError(
            "the adapter should have the layers that StudentAdapter makes, all of them trained, as "
            "its gradient is computed in closed form; received layers that are changed, frozen, "
            "tied or hooked: change tasks and hidden, or train a module of your own"
        )


def _checked(
    adapter: StudentAdapter,
    teacher: TeacherOutputs,
    labels: Tensor | None,
    weights: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return labels and weights as (B, T), and the count, by default that of these examples."""
    labels = checked_labels(labels, adapter.tasks, len(teacher.values))
    if weights is not None:
        weights = checked_weights(weights, adapter.tasks, len(labels))
    if count is None:
        count = count_outputs(teacher.presence, labels, weights)[1]
    return labels, weights, count


def _allocate_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Give parameters gradients in one buffer, for one in-place all-reduce, and return it."""
    sizes = [parameter.numel() for parameter in parameters]
    buffer = parameters[0].new_empty(sum(sizes))
    for parameter, piece in zip(parameters, buffer.split(sizes), strict=True):
        parameter.grad = piece.view_as(parameter)
    return buffer
