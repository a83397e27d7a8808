"""The ranks of a job, one if ``torch.distributed`` is not in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

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


def of_each_rank(value: T) -> list[T]:
    """The value of each rank, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
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
