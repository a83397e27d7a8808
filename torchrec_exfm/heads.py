"""The distillation head: a small perceptron next to the serving head, dropped for serving.

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
    of binary tasks and predictions of regressions. Its parameters receive the full gradient, the
    shared representation receives it β times.

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
        """Map the shared representation, (B, D), to logits or predictions, (B, T)."""
        if self.beta != 1:
            shared = scale_gradient(shared, self.beta)
        dtype = _linear_layers(self.mlp)[0].weight.dtype
        if shared.dtype != dtype and not _autocast_applies(shared, dtype):
            shared = shared.to(dtype)  # the student may have run under its own autocast
        outputs: Tensor = self.mlp(shared)
        return outputs


def _autocast_applies(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether autocast will convert the inputs of a linear layer; never for float64."""
    device_type = tensor.device.type
    # torch.is_autocast_enabled raises for the meta device.
    enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return enabled and torch.float64 not in (tensor.dtype, dtype)


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Build linear layers with a ReLU between each two."""
    widths = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def run_mlp(perceptron: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """Run an :func:`mlp`; return the input of each linear layer, then the output."""
    values = [inputs]
    for layer in _linear_layers(perceptron):
        if len(values) > 1:
            values[-1].relu_()
        values.append(F.linear(values[-1], layer.weight, layer.bias))
    return values


def fill_mlp_gradients(perceptron: nn.Sequential, inputs: list[Tensor], slope: Tensor) -> None:
    """Write the gradients of an :func:`mlp` into its parameters' ``grad``, in place.

    ``inputs`` come from :func:`run_mlp`; ``slope`` is the derivative of the loss by the outputs.
    """
    for layer, values in reversed(list(zip(_linear_layers(perceptron), inputs, strict=True))):
        torch.mm(slope.t(), values, out=layer.weight.grad)
        torch.sum(slope, 0, out=layer.bias.grad)
        if values is not inputs[0]:
            slope = torch.mm(slope, layer.weight).mul_(values > 0)


def _linear_layers(perceptron: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in perceptron if isinstance(layer, nn.Linear)]
