"""Every formula of ExFM (arXiv 2502.17494) as a pure function.

Shapes: B examples, T tasks. "Logit" means the log-odds of a binary label; a task of
regression has predictions in its own units instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class _Perceptrons(torch.autograd.Function):
    """Each layer's values are in one tensor, as are their gradients, so that nothing is copied."""

    @staticmethod
    def forward(ctx, inputs, betas, *parameters):  # type: ignore[no-untyped-def]
        heads = len(betas)
        (weights, biases), *others = _by_layer(parameters, heads)
        values = [inputs, torch.addmm(torch.cat(biases), inputs, torch.cat(weights).t())]
        for weights, biases in others:
            hidden = values[-1].relu_()
            values.append(hidden.new_empty(len(hidden), sum(map(len, biases))))
            columns = (tensor.chunk(heads, dim=1) for tensor in (hidden, values[-1]))
            for part, output, weight, bias in zip(*columns, weights, biases, strict=True):
                torch.addmm(bias, part, weight.t(), out=output)
        ctx.betas = betas
        ctx.save_for_backward(*values[:-1], *parameters)
        return values[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        heads, saved = len(ctx.betas), ctx.saved_tensors
        depth = len(saved) // (2 * heads + 1)
        inputs, *values = saved[:depth]
        (first, _), *others = _by_layer(saved[depth:], heads)
        gradients: list[Tensor] = []
        for hidden, (weights, _) in zip(reversed(values), reversed(others), strict=True):
            below, of_weights = torch.empty_like(hidden), []
            columns = (tensor.chunk(heads, dim=1) for tensor in (grad, hidden, below))
            for of_output, part, of_part, weight in zip(*columns, weights, strict=True):
                of_weights.append(of_output.t() @ part)
                torch.mm(of_output, weight, out=of_part)
            gradients[:0] = [*of_weights, *grad.sum(0).chunk(heads)]
            grad = torch.ops.aten.threshold_backward.grad_input(below, hidden, 0, grad_input=below)
        gradients[:0] = [*(grad.t() @ inputs).chunk(heads), *grad.sum(0).chunk(heads)]
        if not ctx.needs_input_grad[0]:
            return None, None, *gradients
        scaled = [beta * weight for beta, weight in zip(ctx.betas, first, strict=True)]
        of_inputs = _with_aligned_rows(inputs)
        return torch.mm(grad, torch.cat(scaled), out=of_inputs), None, *gradients


def _with_aligned_rows(like: Tensor) -> Tensor:
    """Room for (B, D) whose rows begin with a cache line: faster to fill where D is odd."""
    rows, width = like.shape
    return like.new_empty(rows, -(-width // 16) * 16)[:, :width]


def _by_layer(parameters: tuple[Tensor, ...], heads: int) -> list[tuple[tuple[Tensor, ...], ...]]:
    """The weights of all heads, their biases, and so for each layer."""
    return [
        (parameters[at : at + heads], parameters[at + heads : at + 2 * heads])
        for at in range(0, len(parameters), 2 * heads)
    ]


def perceptrons(
    inputs: Tensor,
    layers: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    betas: Sequence[float],
) -> Tensor:
    """K multi-layer perceptrons of one shape on one input, each with its gradient scaling (GS).

    .. math:: D_k(x) = b_{k,n} + W_{k,n} \\, \\mathrm{relu}(\\dots
        \\mathrm{relu}(b_{k,1} + W_{k,1} x)), \\quad
        ∂L/∂x = \\sum_k β_k \\frac{∂L}{∂D_k} \\frac{∂D_k}{∂x}

    The same as ``mlp_k(scale_gradient(x, β_k))`` for each k, side by side, but the first layers are
    one multiplication, and β multiplies the weights on the way back and not the (B, D) gradient.
    Can be differentiated once.

    Args:
        inputs: (B, D).
        layers: from the first to the last: the K weights (H, D), (H', H) ... and the K biases.
        betas: K numbers >= 0.

    Returns:
        (B, K T), the outputs of the first perceptron first.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> layer = [torch.ones(1, 2), 2 * torch.ones(1, 2)], [torch.zeros(1), torch.zeros(1)]
        >>> y = perceptrons(x, [layer], betas=[5.0, 0.0])
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([[2.0, 4.0]], [[5.0, 5.0]])
    """
    parameters = [tensor for of_layer in layers for tensors in of_layer for tensor in tensors]
    kind = inputs.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        inputs, parameters = inputs.to(dtype), [tensor.to(dtype) for tensor in parameters]
    apply: Callable[..., Tensor] = _Perceptrons.apply
    return apply(inputs, betas, *parameters)


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
