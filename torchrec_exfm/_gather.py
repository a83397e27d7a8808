"""Gathering a sharded tensor to rank 0 in pieces, so that no device needs room for a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchrec_exfm._compat import (
    ShardedTensor,
    communication_device,
    group_of_shards,
    local_shards,
    shape_and_dtype,
)
from torchrec_exfm._ranks import gather_from_ranks

PIECE_BYTES = 64 * 2**20


class _Shard(NamedTuple):
    """A shard's place, size and dtype: copies on several ranks compare equal."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """Split a tensor of this shard's shape into views of at most PIECE_BYTES, or of one row."""
        row_bytes = math.prod(self.sizes[1:]) * self.dtype.itemsize
        return list(torch.atleast_1d(tensor).split(max(1, PIECE_BYTES // row_bytes)))

    def view_in(self, tensor: Tensor) -> Tensor:
        """Return the part of the full tensor that this shard holds, as a view."""
        pairs = zip(self.offsets, self.sizes, strict=True)
        return tensor[tuple(slice(start, start + size) for start, size in pairs)]


def gather_to_rank_0(tensor: ShardedTensor | DTensor, target: Tensor | None) -> None:
    """Copy a sharded tensor into ``target``, on the CPU of rank 0; the other ranks pass None.

    Every rank of the tensor's group or mesh must call it. Besides its own shards, a device holds
    one piece of ``PIECE_BYTES``, or one row if a row is longer.
    """
    group = group_of_shards(tensor)
    if group is None:
        assert isinstance(tensor, DTensor)
        full = tensor.full_tensor().detach()
        if target is not None:
            target.copy_(full)
        return
    root, group_rank = dist.get_group_rank(group, 0), dist.get_rank(group)
    shards = {
        _Shard(offsets, tuple(shard.shape), shard.dtype): shard
        for offsets, shard in local_shards(tensor)
        if shard.numel()
    }
    # Ask the ranks, as a DTensor's placements can mislead: TorchRec calls a table that lies on one
    # rank a replica on all. NCCL also needs a collective of the group before point-to-point.
    shards_by_rank = gather_from_ranks(list(shards), group)
    owners = dict.fromkeys(shards_by_rank[root], root)  # rank 0's copies need no transfer
    for rank, rank_shards in enumerate(shards_by_rank):
        for shard in rank_shards:
            owners.setdefault(shard, rank)
    assert sum(math.prod(shard.sizes) for shard in owners) == shape_and_dtype(tensor)[0].numel()

    for shard, owner in owners.items():  # in one order on all ranks, so that transfers pair up
        if group_rank == root and target is not None:
            parts = shard.pieces(shard.view_in(target))
            if owner == root:
                for part, piece in zip(parts, shard.pieces(shards[shard]), strict=True):
                    part.copy_(piece)
            else:
                _receive(parts, shard.dtype, owner, group)
        elif group_rank == owner:
            _send(shard.pieces(shards[shard]), root, group)


def _send(pieces: list[Tensor], receiver: int, group: dist.ProcessGroup) -> None:
    device = communication_device(group)
    for piece in pieces:
        _transfer(dist.isend, piece.to(device).contiguous(), receiver, group)


def _receive(
    targets: list[Tensor], dtype: torch.dtype, sender: int, group: dist.ProcessGroup
) -> None:
    device = communication_device(group)
    buffer = torch.empty(targets[0].shape, dtype=dtype, device=device)
    for target in targets:  # the last one may be shorter than the buffer
        piece = buffer[: len(target)]
        _transfer(dist.irecv, piece, sender, group)
        target.copy_(piece)


def _transfer(
    operation: Callable[..., Any], piece: Tensor, peer: int, group: dist.ProcessGroup
) -> None:
    # A batch, even of one: NCCL sends it through the group's own communicator. For a plain send it
    # would open a communicator, with memory on the GPU, for each pair of ranks.
    batch = [dist.P2POp(operation, piece, group=group, group_peer=peer)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
