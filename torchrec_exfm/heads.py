"""The distillation head: a small perceptron beside the serving head, dropped when serving.

Shapes: B examples, D width of the shared representation, T tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_exfm.functional import scale_gradient

__all__ = ["DistillationHead"]


class DistillationHead(nn.Module):
    """A multi-layer perceptron on the shared representation, with gradient scaling before it.

    D_k of :class:`~torchrec_exfm.AuxiliaryHead` (arXiv 2502.17494, eq. 3-5). Its outputs are logits
    of binary tasks, predictions of regressions; its parameters receive the whole gradient, the
    shared representation β times.

    Args:
        in_features: D, the width of the shared representation.
        num_tasks: T, one output each.
        hidden: widths of the hidden layers, each followed by a ReLU; () for a linear head.
        beta: β, see :func:`torchrec_exfm.functional.scale_gradient`.

    Example:
        >>> head = DistillationHead(8, num_tasks=2, hidden=(4,))
        >>> head(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_tasks: int = 1,
        hidden: Sequence[int] = (128,),
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.mlp = mlp(in_features, hidden, num_tasks)

    def forward(self, shared: Tensor) -> Tensor:
        """(B, D) shared representation -> (B, T) logits or predictions."""
        if self.beta != 1:
            shared = scale_gradient(shared, self.beta)
        dtype = _linear_layers(self.mlp)[0].weight.dtype
        if shared.dtype != dtype and not _autocast_applies(shared, dtype):
            shared = shared.to(dtype)  # the student may have run under an autocast of its own
        outputs: Tensor = self.mlp(shared)
        return outputs


def _autocast_applies(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast is on, which leaves float64 alone."""
    kind = tensor.device.type
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)
    return enabled and torch.float64 not in (tensor.dtype, dtype)


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Linear layers with a ReLU between each two."""
    widths = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def run_mlp(perceptron: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """Run an :func:`mlp` of its layers alone: the input of each linear layer, then the output."""
    values = [inputs]
    for layer in _linear_layers(perceptron):
        if len(values) > 1:
            values[-1].relu_()
        values.append(F.linear(values[-1], layer.weight, layer.bias))
    return values


def fill_mlp_gradients(perceptron: nn.Sequential, inputs: list[Tensor], slope: Tensor) -> None:
    """Write an :func:`mlp`'s gradients into what its parameters' ``grad`` holds.

    ``inputs`` are as :func:`run_mlp` gave them, the slope is the loss's derivative by the outputs.
    """
    for layer, values in reversed(list(zip(_linear_layers(perceptron), inputs, strict=True))):
        torch.mm(slope.t(), values, out=layer.weight.grad)
        torch.sum(slope, 0, out=layer.bias.grad)
        if values is not inputs[0]:
            slope = torch.mm(slope, layer.weight).mul_(values > 0)


def _linear_layers(perceptron: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in perceptron if isinstance(layer, nn.Linear)]
