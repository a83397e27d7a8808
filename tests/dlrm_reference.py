"""What a DLRM in float32 may say of each example: float64 values, and a bound on the rounding.

Where an example lies in a batch, and a batch in memory, may change the last bits of a product of
matrices. So outputs that were computed in other batches are not compared with one another: each is
held against the value that is its own, within what float32 and the store's resolution may add.
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
    """Float64 values, and how far from them float32 may come, in whatever order it adds."""

    value: Tensor
    error: Tensor

    @property
    def size(self) -> Tensor:
        """What no float32 value is larger than."""
        return self.value.abs() + self.error


@torch.no_grad()
def logits_alone(model: DLRM, dense: Tensor, features: KeyedJaggedTensor) -> Bounded:
    """A DLRM's logits (n, T) of examples with dense features (n, D) and ids of one table each."""
    bottom = Bounded(dense.double(), torch.zeros_like(dense, dtype=torch.float64))
    for layer in _linears(model.dense_arch):
        bottom = _relu(_linear(layer, bottom))
    top = _interactions(bottom, _pooled(model.sparse_arch.embedding_bag_collection, features))
    *hidden, last = _linears(model.over_arch)
    for layer in hidden:
        top = _relu(_linear(layer, top))
    return _linear(last, top)


def assert_said(
    outputs: npt.NDArray[np.float32], expected: Bounded, resolution: str = "float32"
) -> None:
    """Stored outputs (n, T) lie where rounding can bring them, and nowhere else."""
    value, error, size = (each.numpy() for each in (*expected, expected.size))
    bound = error + _half_a_step(size) * (resolution == "bfloat16")
    off = np.abs(outputs.astype(np.float64) - value)
    assert (off <= bound).all(), f"{(off > bound).sum()} of {off.size}, by {(off / bound).max()}"


def _half_a_step(size: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of bfloat16, as large as it is at values of that size."""
    step: npt.NDArray[np.float64] = np.ldexp(1.0, np.frexp(size)[1] - BFLOAT16_DIGITS)
    return step / 2


def _gamma(terms: int) -> float:
    """What rounding adds to a sum of products, of their sum without signs (Higham, 3.1)."""
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
    """The sums (n, F, D) of the rows that the ids of each feature ask for."""
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
    """The dense part (n, D) beside the products of all pairs of it and the pooled rows."""
    value, size = (
        torch.cat([of_dense[:, None], of_rows], dim=1)
        for of_dense, of_rows in ((bottom.value, pooled.value), (bottom.size, pooled.size))
    )
    pairs = torch.triu_indices(value.shape[1], value.shape[1], offset=1)
    products, sizes, exact = (
        (each @ each.mT)[:, pairs[0], pairs[1]] for each in (value, size, value.abs())
    )
    error = (1 + _gamma(value.shape[-1])) * sizes - exact
    return Bounded(
        torch.cat([bottom.value, products], dim=1), torch.cat([bottom.error, error], dim=1)
    )
