"""Teacher and students of the promotion-response stream, and how they are put on the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRM_DCN, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_exfm import ExFMBatch
from torchrec_exfm.functional import soft_bce_with_logits


def tables(
    names: Sequence[str], cardinalities: Mapping[str, int], width: int
) -> EmbeddingBagCollection:
    """One table for each sparse feature, to be materialised by DistributedModelParallel."""
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=name,
                embedding_dim=width,
                num_embeddings=cardinalities[name],
                feature_names=[name],
            )
            for name in names
        ],
        device=torch.device("meta"),
    )


def ranker(
    sparse_names: Sequence[str],
    dense_names: Sequence[str],
    cardinalities: Mapping[str, int],
    *,
    width: int,
    cross_layers: int,
    over_arch: Sequence[int],
) -> DLRMTrain:
    """A DLRM with deep cross interactions (DCN v2), in TorchRec's training wrapper."""
    return DLRMTrain(
        DLRM_DCN(
            tables(sparse_names, cardinalities, width),
            dense_in_features=len(dense_names),
            dense_arch_layer_sizes=[32, width],
            over_arch_layer_sizes=[*over_arch, 1],
            dcn_num_layers=cross_layers,
            dcn_low_rank_dim=32,
        )
    )


def distribute(
    module: nn.Module, device: torch.device, *, learning_rate: float, table_learning_rate: float
) -> tuple[DistributedModelParallel, KeyedOptimizerWrapper]:
    """Shard the tables over the ranks with a fused optimizer, and give the dense part's own."""
    collections = [m for m in module.modules() if isinstance(m, EmbeddingBagCollection)]
    constraints = {}
    for collection in collections:
        apply_optimizer_in_backward(
            RowWiseAdagrad, collection.parameters(), {"lr": table_learning_rate}
        )
        for config in collection.embedding_bag_configs():
            constraints[config.name] = ParameterConstraints(sharding_types=["table_wise"])
    world_size = dist.get_world_size()
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size, local_world_size=world_size, compute_device=device.type
        ),
        constraints=constraints,
    )
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(module, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = KeyedOptimizerWrapper(
        dense, lambda parameters: torch.optim.Adam(parameters, lr=learning_rate)
    )
    return model, optimizer


class ServingHeadDistillation(nn.Module):
    """What one would write by hand: the teacher's soft label on the serving head itself.

    The arm that the auxiliary head is compared with: h(y_S, y) + w h(y_S, y_F).
    """

    def __init__(self, ranker: DLRMTrain, weight: float) -> None:
        super().__init__()
        self.ranker = ranker.model
        self.loss = _LabelAndTeacherLoss(weight)

    def forward(self, batch: ExFMBatch[Any]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """TorchRec's training contract."""
        logits = self.ranker(batch.dense_features, batch.sparse_features)
        result: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] = self.loss(
            logits.squeeze(-1), batch.labels, batch.teacher
        )
        return result


class _LabelAndTeacherLoss(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self, logits: Tensor, labels: Tensor, teacher: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        loss = soft_bce_with_logits(logits, labels).mean()
        soft_labels = teacher.values[:, 0, 0].sigmoid()
        total = loss + self.weight * soft_bce_with_logits(logits, soft_labels).mean()
        return total, (loss.detach(), logits.detach(), labels)
