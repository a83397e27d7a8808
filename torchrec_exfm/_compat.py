"""Names of TorchRec and torch that are not public, or that moved between TorchRec 1.6 and 1.9.

Other modules use no private names, except for members of the train pipeline and of ``nn.Module``,
and those that ``checkpoint.py`` and ``_manifest.py`` mark.
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
    """Return the ranks over which DDP or FSDP2 averages the dense gradients; None if only one.

    Warn if the model is sharded over several ranks with neither of them.
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
    """Return the ranks over which a module averages its parameters' gradients, if it does."""
    if isinstance(module, DistributedDataParallel):
        return module.process_group
    if isinstance(module, FSDPModule):
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                # Two dimensions: it shards within a host and replicates between hosts.
                return (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
    return None


class PipelineParts(NamedTuple):
    """The public constructor arguments of a TorchRec train pipeline, which it keeps private."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device


def pipeline_parts(pipeline: TrainPipeline[Any, Any]) -> PipelineParts:
    """Return the model, optimizer and device of any train pipeline."""
    parts: Any = pipeline
    return PipelineParts(parts._model, parts._optimizer, parts._device)


def batches_in_flight(pipeline: TrainPipeline[Any, Any]) -> int:
    """Return how many batches a train pipeline has loaded and not yet trained on."""
    loaded = getattr(pipeline, "batches", None)
    if loaded is None:  # TrainPipelineBase holds one batch and has no queue
        return int(getattr(pipeline, "_cur_batch", None) is not None)
    return len(loaded)


def take_next_iterator(pipeline: TrainPipeline[Any, Any]) -> None:
    """Let a pipeline that has exhausted an iterator accept another one."""
    if hasattr(pipeline, "_reset_data_iter"):  # TrainPipelineBase; others notice a new iterator
        pipeline._reset_data_iter()


def frees_features(pipeline: Any) -> bool:
    """Return whether a train pipeline frees a batch's features once they are distributed."""
    return getattr(pipeline, "_free_features_storage_early", False)


def side_stream(device: torch.device) -> Any:
    """Create a stream for small copies on accelerators that TorchRec's pipelines know, or None."""
    has_streams = device.type in ("cuda", "mtia")
    return torch.get_device_module(device).Stream() if has_streams else None


def group_of_shards(tensor: ShardedTensor | DTensor) -> dist.ProcessGroup | None:
    """Return the ranks that hold a sharded tensor; None if its shards can't be gathered here.

    A mesh of several dimensions has a group only if it spans all ranks. Shards that are no blocks
    of the full tensor (partial sums, strided shards) only the DTensor itself can combine.
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
    """Return this rank's shards of a tensor, each with its offsets in the full tensor."""
    if isinstance(tensor, ShardedTensor):
        shards = tensor.local_shards()
        return [(tuple(shard.metadata.shard_offsets), shard.tensor.detach()) for shard in shards]
    local: Any = tensor._local_tensor  # to_local() would detach TorchRec's wrapper in place
    tensors = local.local_shards() if hasattr(local, "local_shards") else [local]
    # Not strict: TorchRec's wrapper has a chunk even if this rank holds no shard.
    pairs = zip(tensor.__create_chunk_list__(), tensors, strict=False)
    return [(tuple(chunk.offsets), shard.detach()) for chunk, shard in pairs]


def shape_and_dtype(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of the full tensor, without ShardedTensor's deprecation warning."""
    if isinstance(tensor, ShardedTensor):
        return tensor.metadata().size, tensor.metadata().tensor_properties.dtype
    return tensor.shape, tensor.dtype


def communication_device(group: dist.ProcessGroup) -> torch.device:
    """Return the device for tensors that a group exchanges: the CPU if its backend allows it."""
    return torch.device(_get_object_coll_device(group))


def sharded_names(model: nn.Module) -> list[str]:
    """Return the names of the outermost sharded modules."""
    names = [name for name, module in model.named_modules() if isinstance(module, ShardedModule)]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def unsharded_tables(model: nn.Module) -> list[str]:
    """Return the names of embedding collections that DistributedModelParallel did not shard."""
    collections = EmbeddingBagCollection, EmbeddingCollection
    if not any(isinstance(module, DistributedModelParallel) for module in model.modules()):
        return []
    return [name for name, module in model.named_modules() if isinstance(module, collections)]


def pipelined_names(pipeline: TrainPipelineSparseDist[Any, Any], model: nn.Module) -> list[str]:
    """Return the names of the sharded modules whose input distribution the pipeline overlaps."""
    pipelined = {id(module) for module in pipeline._pipelined_modules}
    return [name for name, module in model.named_modules() if id(module) in pipelined]


def single_optimizers(
    optimizer: torch.optim.Optimizer, name: str = ""
) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Yield the optimizers inside TorchRec's combinations and wrappers, by name."""
    if isinstance(optimizer, CombinedOptimizer):
        for key, member in optimizer.optimizers:
            yield from single_optimizers(member, f"{name}{key}." if key else name)
    elif isinstance(optimizer, OptimizerWrapper):
        yield from single_optimizers(optimizer._optimizer, name)
    else:
        yield name, optimizer


def optimizer_class_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the class name of an optimizer, looking inside TorchRec's KeyedOptimizerWrapper."""
    return type(getattr(optimizer, "_optimizer", optimizer)).__name__


def fused_optimizers(model: nn.Module) -> list[KeyedOptimizer]:
    """Return the optimizers that update a model's sharded tables in backward."""
    parallel = (m for m in model.modules() if isinstance(m, DistributedModelParallel))
    return [module.fused_optimizer for module in parallel]


def fused_steps(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return a fused optimizer's step counters, which it keeps outside of its state."""
    tables = getattr(optimizer, "_emb_module", None)
    counters = (getattr(tables, name, None) for name in ("iter", "iter_cpu"))
    return [counter for counter in counters if counter is not None]


def step_if(optimizer: torch.optim.Optimizer, condition: torch.Tensor) -> None:
    """Take an optimizer's step if a condition, a boolean scalar on the device, is true.

    A fused optimizer decides on the device, through the attributes by which ``GradScaler`` of
    ``torch.amp`` lets it skip a step. For other optimizers the host waits for the value.
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
    """TorchRec's AUC, but a pair of equal predictions counts half, instead of by arrival order."""

    class _Computation(AUCMetricComputation):
        def _compute(self) -> list[MetricComputationReport]:
            window = (
                torch.cat(getattr(self, name), -1)[0] for name in (PREDICTIONS, LABELS, WEIGHTS)
            )
            area = _area(*window).reshape(1)
            return [MetricComputationReport(MetricName.AUC, MetricPrefix.WINDOW, area)]

    _computation_class = _Computation


def _area(predictions: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted share of pairs in order, ties half; NaN without a pair, or for NaN."""
    distinct, index = predictions.unique(return_inverse=True)  # in ascending order
    labels, weights = labels.double(), weights.double()
    class_weights = torch.stack([weights * labels, weights * (1 - labels)])
    positive, negative = weights.new_zeros(2, len(distinct)).index_add_(1, index, class_weights)
    below = negative.cumsum(0) - negative / 2
    area = positive @ below / (positive.sum() * negative.sum())
    return torch.where(distinct.isnan().any(), torch.nan, area)


def metric_computations(metrics: Iterable[Any]) -> Iterator[tuple[str, RecMetricComputation]]:
    """Yield the computations of TorchRec's metrics, named by metric and task."""
    for metric in metrics:
        for task, computation in zip(metric._tasks, metric._metrics_computations, strict=True):
            yield f"{metric._namespace.value}/{task.name}", computation


def metric_state(computation: RecMetricComputation) -> dict[str, torch.Tensor]:
    """Copy this rank's state, without the window buffers that TorchRec keeps next to the totals."""
    state = {"updates": torch.tensor(computation._update_count)}
    if hasattr(computation, "_num_samples"):  # the AUC's
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
    """Restore a state that :func:`metric_state` returned."""
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
