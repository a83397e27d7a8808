"""A teacher of a weight that is realistic for a CPU, and random examples for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_exfm.das import Examples, hash_ids

CPU = torch.device("cpu")
KEYS = [f"f{i}" for i in range(26)]
TABLE_ROWS, WIDTH, NUM_DENSE = 100_000, 16, 13


def make_teacher() -> tuple[nn.Module, KeyedOptimizerWrapper]:
    """A DLRM, sharded over the ranks, and the optimizer of its dense part."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"table_{key}",
            embedding_dim=WIDTH,
            num_embeddings=TABLE_ROWS,
            feature_names=[key],
        )
        for key in KEYS
    ]
    collection = EmbeddingBagCollection(tables, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.02})
    dlrm = DLRM(collection, NUM_DENSE, [256, 128, WIDTH], [256, 128, 1])
    model = DistributedModelParallel(DLRMTrain(dlrm), device=CPU)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    return model, KeyedOptimizerWrapper(dense, lambda some: torch.optim.Adam(some, lr=1e-3))


@dataclass
class Batch(TorchRecBatch):
    example_ids: Tensor
    event_seconds: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self  # all is on the host


class Stream:
    """Random examples in order of time, the same on all ranks.

    Args:
        rows: how many.
        first: epoch seconds of the first.
        seconds: from the first to the last.
    """

    def __init__(self, rows: int, first: int, seconds: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.dense = torch.randn(rows, NUM_DENSE, generator=generator)
        self.labels = torch.rand(rows, generator=generator).round()
        self.sparse = torch.randint(TABLE_ROWS, (rows, len(KEYS)), generator=generator)
        self.ids = hash_ids(torch.arange(rows))
        self.seconds = first + torch.arange(rows) * seconds // rows

    def batch(self, at: Tensor) -> Batch:
        values = self.sparse[at].t().reshape(-1)
        sparse = KeyedJaggedTensor(KEYS, values, lengths=torch.ones_like(values))
        return Batch(self.dense[at], sparse, self.labels[at], self.ids[at], self.seconds[at])

    def examples(self, first: int, last: int) -> Examples:
        """What score() takes, of the rows from first to last."""
        part = slice(first, last)
        return Examples(self.ids[part], self.seconds[part], lambda at: self.batch(at + first))
