"""Names of TorchRec and torch that are not public, or have moved between 1.6 and 1.9.

Other modules use of what is not public only members of the train pipeline and of ``nn.Module``, and
what ``checkpoint.py`` and ``_manifest.py`` mark in themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor as ShardedTensor
from torch.distributed.distributed_c10d import _get_object_coll_device
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipeline
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist as TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.metrics.auc import LABELS, PREDICTIONS, WEIGHTS, AUCMetric, AUCMetricComputation
from torchrec.metrics.metrics_namespace import MetricName, MetricPrefix
from torchrec.metrics.rec_metric import MetricComputationReport, RecMetricComputation
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, OptimizerWrapper

from torchrec_exfm._warnings import DistillationWarning


def data_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that average the dense gradients, by DDP or FSDP2; None if that is one or none.

    It warns where there are several ranks, and neither.
    """
    for module in model.modules():
        group = _averaging_group(module)
        if group is not None:
            return group if group.size() > 1 else None
    if sharded_names(model) and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            "the model is sharded over ranks without DistributedDataParallel or fully_shard: the "
            "means of the teachers' losses and the student adapter are each rank's own, not those "
            "of all ranks",
            DistillationWarning,
            stacklevel=3,
        )
    return None


def _averaging_group(module: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which a module averages the gradients of its parameters."""
    if isinstance(module, DistributedDataParallel):
        return module.process_group
    if isinstance(module, FSDPModule):
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                # Of two dimensions where it shards within a host and replicates between them.
                return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
    return None


class PipelineParts(NamedTuple):
    """What a train pipeline of TorchRec was made of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device


def pipeline_parts(pipeline: TrainPipeline[Any, Any]) -> PipelineParts:
    """Model, optimizer and device of any train pipeline."""
    parts: Any = pipeline
    return PipelineParts(parts._model, parts._optimizer, parts._device)


def batches_in_flight(pipeline: TrainPipeline[Any, Any]) -> int:
    """The batches that a train pipeline has loaded and not trained on."""
    loaded = getattr(pipeline, "batches", None)
    if loaded is None:  # as TrainPipelineBase, which holds one
        return int(getattr(pipeline, "_cur_batch", None) is not None)
    return len(loaded)


def take_next_iterator(pipeline: TrainPipeline[Any, Any]) -> None:
    """Let a pipeline that has trained on every batch of an iterator take another one."""
    if hasattr(pipeline, "_reset_data_iter"):  # of TrainPipelineBase; others see it by themselves
        pipeline._reset_data_iter()


def frees_features(pipeline: Any) -> bool:
    """Whether a train pipeline frees a batch's features once they are distributed."""
    return getattr(pipeline, "_free_features_storage_early", False)


def side_stream(device: torch.device) -> Any:
    """A stream for small copies on the accelerators that TorchRec's pipelines know, else None."""
    known = device.type in ("cuda", "mtia")
    return torch.get_device_module(device).Stream() if known else None


def group_of_shards(tensor: ShardedTensor | DTensor) -> dist.ProcessGroup | None:
    """The ranks that a sharded tensor lies on; None if its shards can't be brought together here.

    Those of a mesh of several dimensions have a group if they are all ranks. What is no block of
    the whole (a sum over ranks, strided shards) only the DTensor itself can put together.
    """
    if isinstance(tensor, ShardedTensor):
        return tensor._process_group
    mesh = tensor.device_mesh
    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.group.WORLD if mesh.size() == dist.get_world_size() else None


def local_shards(tensor: ShardedTensor | DTensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """This rank's shards of a tensor, each with its offsets in the whole."""
    if isinstance(tensor, ShardedTensor):
        shards = tensor.local_shards()
        return [(tuple(shard.metadata.shard_offsets), shard.tensor.detach()) for shard in shards]
    local: Any = tensor._local_tensor  # to_local() would detach in place what TorchRec has wrapped
    tensors = local.local_shards() if hasattr(local, "local_shards") else [local]
    # TorchRec's wrapper of no shards has a chunk all the same
    pairs = zip(tensor.__create_chunk_list__(), tensors, strict=False)
    return [(tuple(chunk.offsets), shard.detach()) for chunk, shard in pairs]


def shape_and_dtype(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    """Those of the whole, without the warning that a ShardedTensor gives where it is asked."""
    if isinstance(tensor, ShardedTensor):
        return tensor.metadata().size, tensor.metadata().tensor_properties.dtype
    return tensor.shape, tensor.dtype


def communication_device(group: dist.ProcessGroup) -> torch.device:
    """Where a tensor must lie that the ranks of a group exchange; the CPU where they can."""
    return torch.device(_get_object_coll_device(group))


def sharded_names(model: nn.Module) -> list[str]:
    """The names of the sharded modules, of the outermost where they nest."""
    names = [name for name, module in model.named_modules() if isinstance(module, ShardedModule)]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def tables_left_whole(model: nn.Module) -> list[str]:
    """The names of embedding collections that DistributedModelParallel has not sharded."""
    collections = EmbeddingBagCollection, EmbeddingCollection
    if not any(isinstance(module, DistributedModelParallel) for module in model.modules()):
        return []
    return [name for name, module in model.named_modules() if isinstance(module, collections)]


def pipelined_names(pipeline: TrainPipelineSparseDist[Any, Any], model: nn.Module) -> list[str]:
    """The names of the sharded modules whose input distribution the pipeline overlaps."""
    pipelined = {id(module) for module in pipeline._pipelined_modules}
    return [name for name, module in model.named_modules() if id(module) in pipelined]


def single_optimizers(
    optimizer: torch.optim.Optimizer, name: str = ""
) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """The optimizers that TorchRec's combinations and wrappers are made of, by name."""
    if isinstance(optimizer, CombinedOptimizer):
        for key, each in optimizer.optimizers:
            yield from single_optimizers(each, f"{name}{key}." if key else name)
    elif isinstance(optimizer, OptimizerWrapper):
        yield from single_optimizers(optimizer._optimizer, name)
    else:
        yield name, optimizer


def optimizer_class_name(optimizer: torch.optim.Optimizer) -> str:
    """The class of an optimizer, below TorchRec's KeyedOptimizerWrapper."""
    return type(getattr(optimizer, "_optimizer", optimizer)).__name__


def fused_optimizers(model: nn.Module) -> list[KeyedOptimizer]:
    """What updates the sharded tables of a model in backward."""
    modules = model.modules()
    return [each.fused_optimizer for each in modules if isinstance(each, DistributedModelParallel)]


def fused_steps(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The counters of a fused optimizer's steps, which it keeps outside of its state."""
    tables = getattr(optimizer, "_emb_module", None)
    found = (getattr(tables, name, None) for name in ("iter", "iter_cpu"))
    return [counter for counter in found if counter is not None]


def step_if(optimizer: torch.optim.Optimizer, condition: torch.Tensor) -> None:
    """Take an optimizer's step where a condition, a boolean scalar on the device, is true.

    A fused optimizer decides on the device, by the switch with which ``torch.amp.GradScaler`` lets
    it skip a step; for another the host waits for the value.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        switch: Any = optimizer
        skipped = torch.empty((), device=condition.device)
        switch.grad_scale, switch.found_inf = None, torch.logical_not(condition, out=skipped)
        optimizer.step()
        del switch.grad_scale, switch.found_inf
    elif condition:
        optimizer.step()


class TieAwareAUC(AUCMetric):
    """TorchRec's AUC, which counts equal predictions by the order they came in; here half."""

    class _Computation(AUCMetricComputation):
        def _compute(self) -> list[MetricComputationReport]:
            window = (
                torch.cat(getattr(self, name), -1)[0] for name in (PREDICTIONS, LABELS, WEIGHTS)
            )
            area = _area(*window).reshape(1)
            return [MetricComputationReport(MetricName.AUC, MetricPrefix.WINDOW, area)]

    _computation_class = _Computation


def _area(predictions: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """By the weights of the pairs, half of those that are equal; NaN without a pair, or for NaN."""
    distinct, at = predictions.unique(return_inverse=True)  # in ascending order
    labels, weights = labels.double(), weights.double()
    of_labels = torch.stack([weights * labels, weights * (1 - labels)])
    positive, negative = weights.new_zeros(2, len(distinct)).index_add_(1, at, of_labels)
    below = negative.cumsum(0) - negative / 2
    area = positive @ below / (positive.sum() * negative.sum())
    return torch.where(distinct.isnan().any(), torch.nan, area)


def metric_computations(metrics: Iterable[Any]) -> Iterator[tuple[str, RecMetricComputation]]:
    """What computes TorchRec's metrics, by metric and task."""
    for metric in metrics:
        for task, computation in zip(metric._tasks, metric._metrics_computations, strict=True):
            yield f"{metric._namespace.value}/{task.name}", computation


def metric_state(computation: RecMetricComputation) -> dict[str, torch.Tensor]:
    """A copy of this rank's state, but of the windows that TorchRec keeps beside the totals."""
    state = {"updates": torch.tensor(computation._update_count)}
    if hasattr(computation, "_num_samples"):  # of the AUC
        state["samples"] = torch.tensor(computation._num_samples)
    for key in computation._defaults:
        value = getattr(computation, key)
        if isinstance(value, list):
            state[f"{key}.sizes"] = torch.tensor([part.shape[-1] for part in value])
            state[key] = torch.cat(value, dim=-1)
        elif key not in (computation._batch_window_buffers or ()):
            state[key] = value.clone()
    return state


def set_metric_state(
    computation: RecMetricComputation, state: dict[str, torch.Tensor], device: torch.device
) -> None:
    """Put back what :func:`metric_state` gave."""
    computation.reset()
    computation._update_count = int(state["updates"])
    if "samples" in state:
        computation._num_samples = int(state["samples"])
    for key in computation._defaults:
        if f"{key}.sizes" in state:
            sizes = state[f"{key}.sizes"].tolist()
            setattr(computation, key, list(state[key].to(device).split(sizes, dim=-1)))
        elif key in state:
            setattr(computation, key, state[key].to(device, copy=True))
