"""The reference models (a student, a teacher, a scorer for a CPU) and random examples for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.distributed import DistributedModelParallel
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_exfm.das import Snapshot, hash_ids

CPU = torch.device("cpu")
KEYS = [f"f{i}" for i in range(26)]
TABLE_ROWS, WIDTH, NUM_DENSE = 100_000, 16, 13
TAP = "model.over_arch"
WINDOW, FIRST = 86_400, 20_000  # seconds of a window, the number of the first window
SNAPSHOT = Snapshot("fm", 1, FIRST * WINDOW - 1)  # trained through the second before
COLUMNS = (
    "dense_features",
    "sparse_features",
    "labels",
    "logits",
)  # what a batch moves to the device


class Sizes(NamedTuple):
    """The widths of a DLRM's layers; the last of the dense part is that of the tables."""

    dense: tuple[int, ...]
    over: tuple[int, ...]


STUDENT = Sizes((512, 256, WIDTH), (512, 256, 1))
SCORER = Sizes((256, 128, WIDTH), (256, 128, 1))
TEACHER = Sizes((512, 256, WIDTH), (1024, 1024, 512, 1))


def dlrm(sizes: Sizes, *, tables: str = "meta", keys: list[str] = KEYS) -> DLRMTrain:
    """Return a DLRM with its loss; its tables are on meta, for DistributedModelParallel."""
    configs = [
        EmbeddingBagConfig(
            name=f"table_{key}",
            embedding_dim=WIDTH,
            num_embeddings=TABLE_ROWS,
            feature_names=[key],
        )
        for key in keys
    ]
    collection = EmbeddingBagCollection(configs, device=torch.device(tables))
    return DLRMTrain(DLRM(collection, NUM_DENSE, list(sizes.dense), list(sizes.over)))


def sharded(
    module: nn.Module, device: torch.device = CPU
) -> tuple[nn.Module, KeyedOptimizerWrapper]:
    """Return a module under DistributedModelParallel, and the optimizer of its dense part."""
    tables = [child for child in module.modules() if isinstance(child, EmbeddingBagCollection)]
    for collection in tables:
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.02})
    model = DistributedModelParallel(module, device=device)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    return model, KeyedOptimizerWrapper(
        dense, lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
    )


@dataclass
class Batch(TorchRecBatch):
    """TorchRec's batch, with what a look-up needs on the host, and the teacher's logits."""

    example_ids: Tensor
    event_seconds: Tensor
    logits: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for name in COLUMNS:
            getattr(self, name).record_stream(stream)

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        return replace(self, **{name: function(getattr(self, name)) for name in COLUMNS})


class Stream:
    """Random examples of the first window, in time order, the same on all ranks.

    Args:
        rows: how many.
        keys: the sparse features.
    """

    def __init__(self, rows: int, keys: list[str] = KEYS) -> None:
        generator = torch.Generator().manual_seed(1)
        self.keys = keys
        self.dense = torch.randn(rows, NUM_DENSE, generator=generator)
        self.labels = torch.rand(rows, generator=generator).round()
        self.sparse = torch.randint(TABLE_ROWS, (rows, len(keys)), generator=generator)
        self.logits = torch.randn(rows, generator=generator)
        self.ids = hash_ids(torch.arange(rows))
        self.seconds = FIRST * WINDOW + torch.arange(rows) * WINDOW // rows

    def batch(self, at: Tensor) -> Batch:
        values = self.sparse[at].t().reshape(-1)
        sparse = KeyedJaggedTensor(self.keys, values, lengths=torch.ones_like(values))
        return Batch(
            self.dense[at], sparse, self.labels[at], self.ids[at], self.seconds[at], self.logits[at]
        )

    def pool(self, count: int, size: int) -> list[Batch]:
        """Return a rank's batches of random examples, pinned if there is a GPU."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        generator = torch.Generator().manual_seed(2 + rank)
        batches = [
            self.batch(torch.randint(len(self.ids), (size,), generator=generator))
            for _ in range(count)
        ]
        return [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches
