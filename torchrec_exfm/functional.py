"""Every formula of ExFM (arXiv 2502.17494) as a pure function.

Shapes: B examples, T tasks. "Logit" means the log-odds of a binary label; a task of
regression has predictions in its own units instead.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "correct_sampling",
    "masked_mean",
    "scale_gradient",
    "scale_label",
    "soft_bce_with_logits",
    "squared_error",
]


def soft_bce_with_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of a soft label, element by element (eq. 1, negated to be minimised).

    .. math:: h(z, y) = -y \\log σ(z) - (1 - y) \\log(1 - σ(z)), \\quad dh/dz = σ(z) - y

    Finite for every finite logit. It is smallest at ``σ(z) = y``, where it equals the entropy
    of y, not 0. Only ``logits`` receive gradient.

    Args:
        logits: log-odds, any shape.
        targets: probabilities in [0, 1], of the same shape.

    Returns:
        The losses, in nats, of the same shape.

    Example:
        >>> import torch
        >>> soft_bce_with_logits(torch.tensor([0.0]), torch.tensor([0.25]))
        tensor([0.6931])
    """
    return F.binary_cross_entropy_with_logits(logits, targets.detach(), reduction="none")


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared error, element by element, for tasks of regression.

    .. math:: h(z, y) = (z - y)^2

    Only ``predictions`` receive gradient.

    Args:
        predictions: in the task's own units, any shape.
        targets: of the same shape and units.

    Returns:
        The losses, in squared units, of the same shape.

    Example:
        >>> import torch
        >>> squared_error(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([4.])
    """
    return F.mse_loss(predictions, targets.detach(), reduction="none")


def scale_label(probabilities: Tensor, alpha: float | Tensor) -> Tensor:
    """Label scaling (LS): lift a rare event's soft label, clipped to stay a probability.

    .. math:: \\min(α y, 1)

    Args:
        probabilities: the teacher's, in [0, 1], any shape.
        alpha: α > 0, a number or one for each of the last dimension; 1 leaves the label as it is.

    Returns:
        Probabilities of the same shape.

    Example:
        >>> import torch
        >>> scale_label(torch.tensor([0.25, 0.75]), alpha=2.0)
        tensor([0.5000, 1.0000])
    """
    return (alpha * probabilities).clamp(max=1.0)


def correct_sampling(logits: Tensor, rate: float | Tensor) -> Tensor:
    """Undo negative sampling: logits learnt on sampled negatives, as if none had been left out.

    .. math:: z + \\log r, \\quad \\text{that is} \\quad q = \\frac{p}{p + (1 - p) / r}
        \\quad \\text{for} \\quad p = σ(z), \\; q = σ(z + \\log r)

    From He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014. Only
    ``logits`` receive gradient, as it is.

    Args:
        logits: log-odds where each negative was kept with probability r, any shape.
        rate: r, the negative sampling rate, in (0, 1]; 1 leaves the logits as they are. A tensor
            gives each example or task its own and broadcasts to the logits' shape; its contents
            are not looked at, as that would stop the step on an accelerator.

    Returns:
        Log-odds at the unsampled rate, of the logits' shape and dtype.

    Raises:
        ValueError: for a number outside (0, 1], or a tensor that would widen the logits.

    Example:
        >>> import torch
        >>> correct_sampling(torch.tensor([0.0]), rate=0.25).sigmoid()
        tensor([0.2000])
    """
    if not isinstance(rate, Tensor):
        check_sampling_rate("rate", rate)
        return logits + math.log(rate)
    corrected = logits + rate.detach().log().to(logits.dtype)
    if corrected.shape != logits.shape:
        raise ValueError(
            f"rate should broadcast to the logits' shape {tuple(logits.shape)}; received "
            f"{tuple(rate.shape)}"
        )
    return corrected


def check_sampling_rate(name: str, rate: float) -> None:
    """A ValueError unless it is in (0, 1]."""
    if not 0 < rate <= 1:
        raise ValueError(f"{name} should be a number in (0, 1]; received {rate}")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, beta: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.beta = beta
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad * ctx.beta, None


def scale_gradient(inputs: Tensor, beta: float) -> Tensor:
    """Gradient scaling (GS): the identity forward, β times the gradient backward.

    .. math:: f(x) = x, \\quad ∂L/∂x = β \\, ∂L/∂f

    Put between the shared representation and a distillation head, it scales what the backbone
    receives from the teacher and leaves the head's own gradient alone.

    Args:
        inputs: any shape.
        beta: β >= 0; 1 leaves the gradient as it is, 0 stops it.

    Returns:
        A view of the inputs.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale_gradient(x, 5.0).sum().backward()
        >>> x.grad
        tensor([5., 5.])
    """
    scaled: Tensor = _ScaleGradient.apply(inputs, beta)  # type: ignore[no-untyped-call]
    return scaled


def masked_mean(
    values: Tensor, mask: Tensor, count: Tensor | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """The mean over the examples whose mask is true, per task; 0 where no mask is true.

    .. math:: \\frac{\\sum_b w_b m_b v_b}{\\sum_b w_b m_b}

    What is masked out has no influence, not even if it is NaN or infinite, and receives a
    gradient of 0, so a head stays in the graph on a step without any teacher. A weight of 0 masks
    as well; a weight of 2 equals having the example twice.

    Args:
        values: (B, ...).
        mask: (B, ...), boolean.
        count: (...), the denominator if it is not that of these examples: under data parallelism
            the global one divided by the number of ranks, so that the average of the ranks'
            gradients is that of the global mean.
        weights: (B, ...), w >= 0, finite; None: all 1.

    Returns:
        (...), one mean per task.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    if count is None:
        count = masked_count(mask, weights)
    absent = ~mask if weights is None else ~mask | (weights == 0)
    return present_mean(values, absent, positive(count), weights)


def present_mean(
    values: Tensor, absent: Tensor, count: Tensor, weights: Tensor | None = None
) -> Tensor:
    """As :func:`masked_mean`, of a mask and a count that several means share.

    ``absent`` is true where an example should have no influence; others have no weight of 0.
    Without an example the mean is NaN if the count is 0.
    """
    values = values if weights is None else weights * values
    return values.masked_fill(absent, 0.0).sum(0) / count


def positive(count: Tensor) -> Tensor:
    """A denominator that is never 0: without an example the mean is 0."""
    return count.clamp(min=torch.finfo(torch.float32).tiny)


def masked_count(mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of the weights of the examples whose mask is true: (B, ...) -> (...) floats."""
    return (mask if weights is None else mask * weights).sum(0, dtype=torch.float32)
