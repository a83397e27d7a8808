"""What the losses of two towers add to a step of a retrieval student; part of step.py.

The query tower reads 13 tables and the dense features, the item tower 13 tables. Both pool and
concatenate them; layers of 256 and 64 follow. The student's own loss is the sampled softmax over
the items of the batch, or (pairs) the cross entropy of each pair's product alone.
"""

from __future__ import annotations

from typing import Any

import common
import torch
import torch.nn.functional as F
from reference import KEYS, NUM_DENSE, STUDENT, WIDTH, Batch, Stream, dlrm, sharded
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.mlp import MLP
from training import Arm, embeddings, over, take_turns

from torchrec_exfm import DistillationTerm, ExFMWrapper, OutputsOf, TrainPipelineExFM
from torchrec_exfm.losses import in_batch_positives, in_batch_softmax

VECTOR = 64
TAU = 8.0
TAP = OutputsOf("query", "item")
TERMS = {
    "in_batch_softmax": DistillationTerm(loss=in_batch_softmax(tau=TAU, teacher_tau=TAU)),
    "in_batch_positives": DistillationTerm(loss=in_batch_positives(tau=TAU)),
    "pairs_in_head": DistillationTerm(),
}


class TwoTowers(nn.Module):
    """A student of two towers in TorchRec's training contract."""

    def __init__(self, tables: EmbeddingBagCollection, *, pairs: bool) -> None:
        super().__init__()
        self.tables, self.pairs = tables, pairs
        half = len(KEYS) // 2 * WIDTH
        self.query = MLP(half + NUM_DENSE, [256, VECTOR])
        self.item = MLP(half, [256, VECTOR])

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        pooled = self.tables(batch.sparse_features).values()
        query_features, item_features = pooled.chunk(2, dim=1)
        query = self.query(torch.cat([query_features, batch.dense_features], dim=1))
        item = self.item(item_features)
        logits = (query * item).sum(1) / TAU
        if self.pairs:
            loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        else:
            loss = -(query @ item.t() / TAU).log_softmax(1).diagonal().mean()
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


def items(batch: Batch) -> Tensor:
    return batch.sparse_features[KEYS[-1]].values()


def student(*, pairs: bool) -> TwoTowers:
    torch.manual_seed(0)
    tables: Any = dlrm(STUDENT).model.sparse_arch.embedding_bag_collection
    return TwoTowers(tables, pairs=pairs)


def towers_on_rank(
    device: torch.device, folder: str, batch: int, rounds: int, launch: int
) -> dict[str, list[common.Time]]:
    """Measure each arm's step; ``softmax`` and ``pairs`` are those without a teacher."""
    batches = Stream(2 * batch).pool(4, batch)
    arms: dict[str, Any] = {}
    for pairs in (False, True):
        model, optimizer = sharded(student(pairs=pairs), device)
        pipeline = TrainPipelineSparseDist(model, optimizer, device)
        arms["pairs" if pairs else "softmax"] = Arm(pipeline, batches)
        for name, term in TERMS.items():
            wrapper = ExFMWrapper(student(pairs=pairs), tap=TAP, terms=[term])
            model, optimizer = sharded(wrapper, device)
            teacher = {"teacher": embeddings, "candidates": items}
            exfm = TrainPipelineExFM(model, optimizer, device, **teacher)
            arms[f"{name}, {'pairs' if pairs else 'softmax'}"] = Arm(exfm, batches)
    return take_turns(arms, device, rounds=rounds, steps=20 if device.type == "cuda" else 1)


def figures(times: dict[str, list[common.Time]]) -> dict[str, Any]:
    """Return each loss over the same student's step without a teacher, and its milliseconds."""
    result: dict[str, Any] = {}
    for base in ("softmax", "pairs"):
        wall = [1000 * wall for wall, _ in times[base]]
        result[base] = {"milliseconds": common.spread(wall)}
        for name in TERMS:
            wall_over, cpu_over = over(times, f"{name}, {base}", base)
            result[base][name] = {"wall": wall_over, "cpu": cpu_over}
    return result


def markdown(towers: dict[str, Any]) -> str:
    rows = [
        [f"`{name}`", *(towers[base][name][by] for base in towers for by in ("wall", "cpu"))]
        for name in TERMS
    ]
    header = ["over plain", *(f"{base}, {by}" for base in towers for by in ("wall", "CPU"))]
    plain = " and ".join(common.cell(towers[base]["milliseconds"]) for base in towers)
    return (
        "\n\nTwo towers with vectors of 64, on one rank. Their own loss is a softmax over the "
        f"items of the batch, or a loss of pairs alone. Without a teacher they take {plain} ms. "
        "`pairs_in_head` is a head of 128 on both vectors.\n\n"
        f"{common.table(header, rows)}"
    )
