"""The ranks of a job: a single one without ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    """Return whether ``torch.distributed`` is initialized, even with one rank."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank; 0 without ``torch.distributed``."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without ``torch.distributed``."""
    return dist.get_world_size() if distributed() else 1


def gather_from_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks, or of a group's, in the order of ranks, on every rank."""
    size = world_size() if group is None else group.size()
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value, group)
    return values


def on_rank_0(function: Callable[[], T]) -> T:
    """Call a function on rank 0; return its result, or raise its error, on all ranks."""
    if world_size() == 1:
        return function()
    answer: list[T | Exception | None] = [None]
    if rank() == 0:
        try:
            answer = [function()]
        except Exception as error:  # sent like a result: the other ranks wait in the broadcast
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def start_average(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> Callable[[], None]:
    """Start to average tensors over the ranks, in place, in one all-reduce.

    Call the returned function to wait for it. Without a group nothing happens.
    """
    if group is None or not tensors:
        return lambda: None
    flat = tensors[0] if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])
    averages = dist.get_backend(group) == dist.Backend.NCCL  # gloo can only sum
    operation = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
    work = dist.all_reduce(flat, operation, group=group, async_op=True)

    def wait() -> None:
        assert work is not None
        work.wait()
        if not averages:
            flat.div_(group.size())
        if flat is not tensors[0]:
            pieces = flat.split([tensor.numel() for tensor in tensors])
            for tensor, piece in zip(tensors, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    return wait
