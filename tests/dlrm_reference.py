"""A DLRM's outputs in float64, with a bound on the rounding of float32.

An example's place in a batch, and the batch's place in memory, may change the last bits of a matrix
product. So outputs of different batches are not compared with one another. Each is compared with
its float64 value, within the roundings of float32 and of the store's resolution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

UNIT = 2.0**-24  # of rounding to float32
BFLOAT16_DIGITS = 8  # of the mantissa, the leading one included


class Bounded(NamedTuple):
    """Float64 values, and how far float32 may be from them, in any order of addition."""

    value: Tensor
    error: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude that float32 may reach."""
        return self.value.abs() + self.error


@torch.no_grad()
def logits_alone(model: DLRM, dense: Tensor, features: KeyedJaggedTensor) -> Bounded:
    """Return a DLRM's logits (n, T) for dense features (n, D) and ids of one table each."""
    bottom = Bounded(dense.double(), torch.zeros_like(dense, dtype=torch.float64))
    for layer in _linears(model.dense_arch):
        bottom = _relu(_linear(layer, bottom))
    top = _interactions(bottom, _pooled(model.sparse_arch.embedding_bag_collection, features))
    *hidden, last = _linears(model.over_arch)
    for layer in hidden:
        top = _relu(_linear(layer, top))
    return _linear(last, top)


def assert_within_rounding(
    outputs: npt.NDArray[np.float32], expected: Bounded, resolution: str = "float32"
) -> None:
    """Require stored outputs (n, T) to be within rounding of the expected ones."""
    value, error, size = (tensor.numpy() for tensor in (*expected, expected.size))
    bound = error + _half_a_step(size) * (resolution == "bfloat16")
    off = np.abs(outputs.astype(np.float64) - value)
    assert (off <= bound).all(), f"{(off > bound).sum()} of {off.size}, by {(off / bound).max()}"


def _half_a_step(size: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return half a step of bfloat16 at values of these sizes."""
    step: npt.NDArray[np.float64] = np.ldexp(1.0, np.frexp(size)[1] - BFLOAT16_DIGITS)
    return step / 2


def _gamma(terms: int) -> float:
    """Bound a sum of products' rounding, relative to the sum of their magnitudes (Higham, 3.1)."""
    return terms * UNIT / (1 - terms * UNIT)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _linear(layer: nn.Linear, x: Bounded) -> Bounded:
    weight, bias = layer.weight.double(), layer.bias.double()
    sizes = x.size @ weight.abs().T + bias.abs()
    error = x.error @ weight.abs().T + _gamma(layer.in_features + 1) * sizes
    return Bounded(x.value @ weight.T + bias, error)


def _relu(x: Bounded) -> Bounded:
    return Bounded(x.value.relu(), x.error)


def _pooled(tables: EmbeddingBagCollection, features: KeyedJaggedTensor) -> Bounded:
    """Return each feature's pooled rows (n, F, D)."""
    sums = []
    for config in tables.embedding_bag_configs():
        ids, lengths = (part := features[config.feature_names[0]]).values(), part.lengths()
        weight = tables.embedding_bags[config.name].weight.double()
        value, size = (
            F.embedding_bag(ids, rows, lengths.cumsum(0) - lengths, mode="sum")
            for rows in (weight, weight.abs())
        )
        most = max(lengths.tolist(), default=1)  # rows of a sum
        sums.append(Bounded(value, _gamma(most - 1) * size))
    return Bounded(*(torch.stack(parts, dim=1) for parts in zip(*sums, strict=True)))


def _interactions(bottom: Bounded, pooled: Bounded) -> Bounded:
    """Return the dense part (n, D) and the dot products of all pairs of it and the pooled rows."""
    value, size = (
        torch.cat([dense[:, None], rows], dim=1)
        for dense, rows in ((bottom.value, pooled.value), (bottom.size, pooled.size))
    )
    pairs = torch.triu_indices(value.shape[1], value.shape[1], offset=1)
    products, sizes, exact = (
        (vectors @ vectors.mT)[:, pairs[0], pairs[1]] for vectors in (value, size, value.abs())
    )
    error = (1 + _gamma(value.shape[-1])) * sizes - exact
    return Bounded(
        torch.cat([bottom.value, products], dim=1), torch.cat([bottom.error, error], dim=1)
    )
