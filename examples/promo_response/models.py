"""Teacher and students of the promotion-response stream, and their distribution over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRM_DCN, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad


def tables(
    names: Sequence[str], cardinalities: Mapping[str, int], width: int
) -> EmbeddingBagCollection:
    """Make a table for each sparse feature, on meta until DistributedModelParallel allocates it."""
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
    """Make a DLRM with deep cross interactions (DCN v2), in TorchRec's training wrapper."""
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
    """Shard the tables with a fused optimizer; return the model and its dense optimizer."""
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
