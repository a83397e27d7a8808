"""Every formula of ExFM (arXiv 2502.17494) as a pure function.

Shapes: B examples, T tasks. "Logit" means the log-odds of a binary label; a task of
regression has predictions in its own units instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
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


class _LinearWithScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias, betas):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs, weight)
        ctx.betas = betas
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        inputs, weight = ctx.saved_tensors
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            blocks = weight.split([rows for rows, _ in ctx.betas])
            scaled = [beta * block for block, (_, beta) in zip(blocks, ctx.betas, strict=True)]
            grad_inputs = grad @ torch.cat(scaled)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ inputs
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_inputs, grad_weight, grad_bias, None


def linear_with_scaled_gradient(
    inputs: Tensor, weight: Tensor, bias: Tensor, betas: Sequence[tuple[int, float]]
) -> Tensor:
    """The first layers of several heads in one, with a gradient scaling (GS) for each of them.

    .. math:: f(x) = x W^T + b, \\quad
        ∂L/∂x = \\sum_k β_k \\frac{∂L}{∂f_k} W_k, \\quad ∂L/∂W_k = (∂L/∂f_k)^T x

    The same as ``linear(scale_gradient(x, β_k), W_k, b_k)`` side by side, for which β multiplies
    the weights on the way back, (H, D), and not the gradient, (B, D).

    Args:
        inputs: (B, D).
        weight: (H, D), the rows of the first head first.
        bias: (H,).
        betas: of each head how many rows are its, and its β >= 0.

    Returns:
        (B, H).

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> y = linear_with_scaled_gradient(x, torch.eye(2), torch.zeros(2), [(1, 5.0), (1, 0.0)])
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([[1.0, 1.0]], [[5.0, 0.0]])
    """
    if torch.is_autocast_enabled(inputs.device.type):
        dtype = torch.get_autocast_dtype(inputs.device.type)
        inputs, weight, bias = inputs.to(dtype), weight.to(dtype), bias.to(dtype)
    outputs: Tensor = _LinearWithScaledGradient.apply(inputs, weight, bias, betas)  # type: ignore[no-untyped-call]
    return outputs


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """The mean over the examples whose mask is true, per task; 0 where no mask is true.

    .. math:: \\frac{\\sum_b m_b v_b}{\\max(\\sum_b m_b, 1)}

    What is masked out has no influence, not even if it is NaN or infinite, and receives a
    gradient of 0, so a head stays in the graph on a step without any teacher.

    Args:
        values: (B, ...).
        mask: (B, ...), boolean.
        count: (...), the denominator if it is not this mask's own count: under data parallelism
            the global count divided by the number of ranks, so that the average of the ranks'
            gradients is that of the global mean.

    Returns:
        (...), one mean per task.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    total = torch.where(mask, values, 0.0).sum(0)
    if count is None:
        return total / mask.sum(0).clamp(min=1)
    return total / torch.where(count > 0, count, 1.0)
