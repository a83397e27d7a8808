"""The ranks of a job, one if ``torch.distributed`` is not in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    """Whether ``torch.distributed`` is in use, if by one rank alone."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """How many there are."""
    return dist.get_world_size() if distributed() else 1


def of_each_rank(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of each rank, on every rank; of the ranks of a group, in its order."""
    size = world_size() if group is None else group.size()
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value, group)
    return values


def on_rank_0(function: Callable[[], T]) -> T:
    """What a function gives on rank 0, for all ranks; an error of it is raised on all."""
    if world_size() == 1:
        return function()
    answer: list[T | Exception | None] = [None]
    if rank() == 0:
        try:
            answer = [function()]
        except Exception as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def start_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> Callable[[], None]:
    """Start to average a tensor over the ranks, in place. Call the returned function to wait."""
    work = None if group is None else dist.all_reduce(tensor, group=group, async_op=True)

    def wait() -> None:
        if group is not None and work is not None:
            work.wait()
            tensor.div_(group.size())

    return wait


def average_over(group: dist.ProcessGroup | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Average tensors over the ranks of a group, in one all-reduce; None: as they are."""
    if group is None or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    pieces = (flat / group.size()).split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]
