"""Elementwise losses: each example on its own.

Shapes: B examples, U tasks of a term. z is the student's logit (or prediction), t the teacher's.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torchrec_exfm.functional import present_mean, scale_label, squared_error
from torchrec_exfm.losses.contract import Loss, LossInputs, check_temperature
from torchrec_exfm.tasks import Task, map_tasks, mean_task_losses


def task_loss() -> Loss:
    """Return each task's own loss, the default of a term (arXiv 2502.17494, eq. 1).

    .. math:: h(z, \\min(α σ(t), 1)) \\text{ for a binary task}, \\quad (z - α t)^2
        \\text{ for a regression}

    h is :func:`torchrec_exfm.functional.soft_bce_with_logits`.
    """
    return Loss(_task_loss, takes_alpha=True)


def temperature(tau: float) -> Loss:
    """Return the task's own loss at a temperature (Hinton et al., arXiv 1503.02531).

    .. math:: τ^2 \\, h(z / τ, \\min(α σ(t / τ), 1)), \\quad
        ∂/∂z = τ (σ(z / τ) - \\min(α σ(t / τ), 1))

    The larger τ, the closer it is to a squared error of the logits. It equals :func:`task_loss` at
    τ = 1, and at any τ for a regression.

    Args:
        tau: τ > 0, finite.

    Raises:
        ValueError: for another τ.
    """
    return Loss(partial(_task_loss, tau=check_temperature("tau", tau)), takes_alpha=True)


def squared_error_of_logits() -> Loss:
    """Return the squared error of the logits, or of a regression's predictions.

    .. math:: (z - t)^2

    It weighs an error at a probability of 1e-6 as much as one at 0.5; cross entropy hardly counts
    the former. It takes no α, which scales probabilities.
    """
    return Loss(_squared_error)


def _task_loss(inputs: LossInputs, tau: float | None = None) -> Tensor:
    outputs, values = inputs.outputs, inputs.values
    if tau is not None:
        outputs, values = outputs.masked_fill(inputs.absent, 0.0) / tau, values / tau
    soft_label = partial(_soft_label, alpha=inputs.alpha)
    targets = map_tasks(inputs.tasks, soft_label, values).to(outputs.dtype)
    present = (inputs.absent, inputs.count, inputs.weights)
    losses = mean_task_losses(inputs.tasks, outputs, targets, *present)
    return losses if tau is None else tau**2 * losses


def _soft_label(task: Task, values: Tensor, alpha: float) -> Tensor:
    if task.regression:
        return values if alpha == 1 else alpha * values
    return values.sigmoid() if alpha == 1 else scale_label(values.sigmoid(), alpha)


def _squared_error(inputs: LossInputs) -> Tensor:
    outputs = inputs.outputs.masked_fill(inputs.absent, 0.0)  # a NaN would make the gradient NaN
    losses = squared_error(outputs, inputs.values.to(outputs.dtype))
    return present_mean(losses, inputs.absent, inputs.count, inputs.weights)
