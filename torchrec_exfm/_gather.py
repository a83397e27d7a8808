"""A sharded tensor brought to rank 0 in pieces, so that no device must have room for a table."""

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
    """What all ranks know of a shard."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """Split a tensor of this shard's shape into views of as many rows as make a piece."""
        row_bytes = math.prod(self.sizes[1:]) * self.dtype.itemsize
        return list(torch.atleast_1d(tensor).split(max(1, PIECE_BYTES // row_bytes)))

    def place_in(self, whole: Tensor) -> Tensor:
        """Return the view of the whole that this shard is a copy of."""
        pairs = zip(self.offsets, self.sizes, strict=True)
        return whole[tuple(slice(start, start + size) for start, size in pairs)]


def gather_to_rank_0(tensor: ShardedTensor | DTensor, whole: Tensor | None) -> None:
    """Copy a sharded tensor into ``whole``, on the CPU of rank 0; the other ranks pass None.

    Every rank of the tensor's group or mesh must call it. A device holds one piece of
    ``PIECE_BYTES``, or one row if that is longer, beside its own shards.
    """
    group = group_of_shards(tensor)
    if group is None:
        assert isinstance(tensor, DTensor)
        full = tensor.full_tensor().detach()
        if whole is not None:
            whole.copy_(full)
        return
    root, me = dist.get_group_rank(group, 0), dist.get_rank(group)
    mine = {
        _Shard(offsets, tuple(shard.shape), shard.dtype): shard
        for offsets, shard in local_shards(tensor)
        if shard.numel()
    }
    # Asked of the ranks: TorchRec's DTensors call a table that is whole on one rank a replica on
    # all. NCCL also needs a collective of the whole group before it lets two ranks of it talk.
    held = gather_from_ranks(list(mine), group)
    owners = dict.fromkeys(held[root], root)  # no transfer of what rank 0 has a copy of
    for rank, shards in enumerate(held):
        for shard in shards:
            owners.setdefault(shard, rank)
    assert sum(math.prod(shard.sizes) for shard in owners) == shape_and_dtype(tensor)[0].numel()

    for shard, owner in owners.items():
        if me == root and whole is not None:
            targets = shard.pieces(shard.place_in(whole))
            if owner == me:
                for target, piece in zip(targets, shard.pieces(mine[shard]), strict=True):
                    target.copy_(piece)
            else:
                _receive(targets, shard.dtype, owner, group)
        elif me == owner:
            _send(shard.pieces(mine[shard]), root, group)


def _send(pieces: list[Tensor], receiver: int, group: dist.ProcessGroup) -> None:
    device = communication_device(group)
    for piece in pieces:
        _transfer(dist.isend, piece.to(device).contiguous(), receiver, group)


def _receive(
    targets: list[Tensor], dtype: torch.dtype, sender: int, group: dist.ProcessGroup
) -> None:
    device = communication_device(group)
    buffer = torch.empty(targets[0].shape, dtype=dtype, device=device)
    for target in targets:  # the last may be shorter
        piece = buffer[: len(target)]
        _transfer(dist.irecv, piece, sender, group)
        target.copy_(piece)


def _transfer(
    operation: Callable[..., Any], piece: Tensor, peer: int, group: dist.ProcessGroup
) -> None:
    # A batch, if of one: NCCL sends it through the group's own communicator. For a plain send it
    # would open a communicator, with memory on the GPU, for each pair of ranks.
    batch = [dist.P2POp(operation, piece, group=group, group_peer=peer)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
