"""Every formula of ExFM (arXiv 2502.17494) as a pure function.

Shapes: B examples, T tasks. A logit is the log-odds of a binary label; a regression has predictions
in its own units instead.
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
    """Return the elementwise cross entropy of a soft label (eq. 1, negated to be minimized).

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
    """Return the elementwise squared error, for regressions.

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
    """Scale soft labels (LS), to raise those of rare events, and clip them at 1.

    .. math:: \\min(α y, 1)

    Args:
        probabilities: the teacher's, in [0, 1], any shape.
        alpha: α > 0, a number, or a tensor with one for each entry of the last dimension; 1 leaves
            the label unchanged.

    Returns:
        Probabilities of the same shape.

    Example:
        >>> import torch
        >>> scale_label(torch.tensor([0.25, 0.75]), alpha=2.0)
        tensor([0.5000, 1.0000])
    """
    return (alpha * probabilities).clamp(max=1.0)


def correct_sampling(logits: Tensor, rate: float | Tensor) -> Tensor:
    """Undo negative sampling: correct logits learned on sampled negatives.

    .. math:: z + \\log r, \\quad \\text{that is} \\quad q = \\frac{p}{p + (1 - p) / r}
        \\quad \\text{for} \\quad p = σ(z), \\; q = σ(z + \\log r)

    From He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014. Only
    ``logits`` receive gradient, unscaled.

    Args:
        logits: log-odds learned while each negative was kept with probability r, any shape.
        rate: r, the negative sampling rate, in (0, 1]; 1 leaves the logits unchanged. A tensor
            gives each example or task its own rate and broadcasts to the logits' shape. Its
            contents are not checked, as that would synchronize an accelerator.

    Returns:
        Log-odds for unsampled data, of the logits' shape and dtype.

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


def scale_gradient(inputs: Tensor, beta: float) -> Tensor:
    """Scale a gradient (GS): the identity in forward, β times the gradient in backward.

    .. math:: f(x) = x, \\quad ∂L/∂x = β \\, ∂L/∂f

    Between the shared representation and a distillation head, it scales the teacher's gradient into
    the backbone and leaves the head's own gradient unchanged.

    Args:
        inputs: any shape.
        beta: β >= 0; 1 leaves the gradient unchanged, 0 stops it.

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
    """Return the per-task mean over the examples whose mask is true; 0 if there are none.

    .. math:: \\frac{\\sum_b w_b m_b v_b}{\\sum_b w_b m_b}

    Masked values have no influence, even if NaN or infinite. They receive a gradient of 0, so a
    head stays in the graph on a step without any teacher output. A weight of 0 also masks; a weight
    of 2 equals having the example twice.

    Args:
        values: (B, ...).
        mask: (B, ...), boolean.
        count: (...), the denominator; None: that of these examples. Under data parallelism, pass
            the global one divided by the number of ranks: then the average of the ranks' gradients
            is the gradient of the global mean.
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


def check_sampling_rate(name: str, rate: float) -> None:
    """Raise a ValueError unless the rate is in (0, 1]."""
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


def present_mean(
    values: Tensor, absent: Tensor, count: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return a :func:`masked_mean` with a mask and a count that several means share.

    ``absent`` is true where an example should have no influence, which includes weights of 0.
    A count of 0, without examples, makes the mean NaN.
    """
    values = values if weights is None else weights * values
    return values.masked_fill(absent, 0.0).sum(0) / count


def positive(count: Tensor) -> Tensor:
    """Clamp a count to a denominator above 0, so that the mean of no examples is 0."""
    return count.clamp(min=torch.finfo(torch.float32).tiny)


def masked_count(mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up the weights of the examples whose mask is true: (B, ...) -> (...) floats."""
    return (mask if weights is None else mask * weights).sum(0, dtype=torch.float32)
