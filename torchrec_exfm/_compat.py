"""Every name of TorchRec and torch that is not public, or has moved between 1.6 and 1.9."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.train_pipeline import TrainPipelineContext, TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule

__all__ = [
    "DTensor",
    "ShardedTensor",
    "TrainPipelineContext",
    "TrainPipelineSparseDist",
    "data_parallel_group",
    "gather_to_rank_0",
    "pipelined_names",
    "sharded_names",
]


def data_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that DDP averages the dense gradients over; None if that is one rank or none.

    Warns:
        RuntimeWarning: if there are several ranks and no DDP.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            group = module.process_group
            return group if group.size() > 1 else None
    if sharded_names(model) and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            "the model is sharded over ranks without DistributedDataParallel: the means of the "
            "teachers' losses and the student adapter are each rank's own, not those of all ranks",
            RuntimeWarning,
            stacklevel=3,
        )
    return None


def gather_to_rank_0(tensor: ShardedTensor) -> torch.Tensor | None:
    """The whole of a sharded tensor on rank 0, on the device of its shards; None elsewhere."""
    whole, size = None, tensor.metadata().size
    properties = tensor.metadata().tensor_properties
    if dist.get_rank() == 0:
        device = tensor._get_preferred_device()
        whole = torch.empty(size, dtype=properties.dtype, device=device)
    tensor.gather(dst=0, out=whole, dtype=properties.dtype)
    return whole


def sharded_names(model: nn.Module) -> list[str]:
    """The names of the sharded modules, of the outermost where they nest."""
    names = [name for name, module in model.named_modules() if isinstance(module, ShardedModule)]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def pipelined_names(pipeline: TrainPipelineSparseDist[Any, Any], model: nn.Module) -> list[str]:
    """The names of the sharded modules whose input distribution the pipeline overlaps."""
    pipelined = {id(module) for module in pipeline._pipelined_modules}
    return [name for name, module in model.named_modules() if id(module) in pipelined]
