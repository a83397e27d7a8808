"""Checks of checkpoints between numbers of ranks and shardings."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import rank_models as rm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import device
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchrec_exfm.checkpoint import load_checkpoint, save_checkpoint


def check_checkpoint_across_ranks(rank: int, world_size: int, sharding: str, other: str) -> None:
    """A checkpoint loads into other shardings, into one process, and back on these ranks."""
    saved = rm.sharded(rm.two_task_student(), world_size, sharding=sharding).model.state_dict()
    loaded = _other_student(world_size, other)
    assert rm.differs(rm.snapshot(loaded), rm.snapshot(_student_of(world_size, other)))
    with rm.shared_folder() as name:
        folder = Path(name)
        save_checkpoint(folder / "ranks", saved)
        load_checkpoint(folder / "ranks", loaded)
        rm.assert_same(rm.snapshot(loaded), rm.snapshot(_student_of(world_size, other)))
        by_dcp = _other_student(world_size, other)
        dcp.load(by_dcp, checkpoint_id=folder / "ranks")
        rm.assert_same(rm.snapshot(by_dcp), rm.snapshot(loaded))

        if rank == 0:
            _through_one_process(folder)
        dist.barrier()
        loaded = _other_student(world_size, other)
        load_checkpoint(folder / "one", loaded)
        rm.assert_same(rm.snapshot(loaded), rm.snapshot(_student_of(world_size, other)))


def _student_of(world_size: int, sharding: str) -> dict[str, Any]:
    """Return the state that is saved, in a given sharding."""
    student = rm.two_task_student()
    state: dict[str, Any] = rm.sharded(student, world_size, sharding=sharding).model.state_dict()
    return state


def _other_student(world_size: int, sharding: str) -> dict[str, Any]:
    student = rm.two_task_student(seed=3)
    state: dict[str, Any] = rm.sharded(student, world_size, sharding=sharding).model.state_dict()
    return state


def _through_one_process(folder: Path) -> None:
    """Load and save as a process without torch.distributed."""
    weights = rm.two_task_student(seed=3).state_dict()
    with mock.patch.object(dist, "is_initialized", lambda: False):
        load_checkpoint(folder / "ranks", weights)
        rm.assert_same(weights, rm.two_task_student().state_dict())
        by_dcp = {key: torch.zeros_like(value) for key, value in weights.items()}
        dcp.load(by_dcp, checkpoint_id=folder / "ranks", no_dist=True)
        rm.assert_same(by_dcp, weights)
        save_checkpoint(folder / "one", weights)


def check_checkpoint_of_dtensors(rank: int, world_size: int) -> None:
    """DTensors of uneven shards, with a rank that has none, and with a copy per rank."""
    mesh = init_device_mesh(device().type, (world_size,))
    placements = {"rows": Shard(0), "row": Shard(0), "copies": Replicate()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "rows": torch.randn(5, 3, generator=generator),
        "row": torch.randn(1, 4, generator=generator),
        "copies": torch.randn(4, generator=generator),
    }

    def distributed(values: dict[str, Tensor]) -> dict[str, DTensor]:
        return {
            key: distribute_tensor(value.to(device()), mesh, [placements[key]])
            for key, value in values.items()
        }

    saved = distributed(tensors)
    loaded = distributed({key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    with rm.shared_folder() as name:
        save_checkpoint(Path(name) / "new", saved)
        load_checkpoint(Path(name) / "new", loaded)
    for key, tensor in tensors.items():
        rm.assert_same(loaded[key].full_tensor().cpu(), tensor)


def check_checkpoint_errors_reach_every_rank(rank: int, world_size: int) -> None:
    """An error of the last rank alone is raised on every rank."""
    last = rank == world_size - 1
    with rm.shared_folder() as name:
        folder = Path(name) / "new"
        with pytest.raises(TypeError, match="'b', of type int"):
            save_checkpoint(folder, {"a": torch.ones(2), "b": 3 if last else torch.ones(1)})
        save_checkpoint(folder, {"a": torch.ones(2)})
        with pytest.raises(FileExistsError, match="save to a new folder"):
            save_checkpoint(folder, {"a": torch.ones(2)})
        dist.barrier()

        with pytest.raises(FileNotFoundError, match=r"none should hold metadata\.json"):
            load_checkpoint(folder.with_name("none") if last else folder, {"a": torch.ones(2)})
        with pytest.raises(ValueError, match=r"'a' should be .*\[3\]; received .*\[2\]"):
            load_checkpoint(folder, {"a": torch.ones(3 if last else 2)})
        if rank == 0:
            document = json.loads((folder / "metadata.json").read_text())
            (chunk,) = document["tensors"]["a"]["chunks"]
            (folder / chunk["file"]).write_bytes(os.urandom(chunk["length"]))
        dist.barrier()
        with pytest.raises(ValueError, match=r"should have the SHA-256 .{64}; received .{64};"):
            load_checkpoint(folder, {"a": torch.ones(2)})
        seal(folder)
        with pytest.raises(ValueError, match=r"received what torch\.load"):
            load_checkpoint(folder, {"a": torch.ones(2)})


def seal(folder: Path) -> None:
    """Recompute the digests in metadata.json from the files; every rank must call it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        document = json.loads((folder / "metadata.json").read_text())
        for name, record in document["files"].items():
            data = (folder / name).read_bytes()
            record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        document.pop("sha256")
        sealed = hashlib.sha256(json.dumps(document).encode()).hexdigest()
        (folder / "metadata.json").write_text(json.dumps(document | {"sha256": sealed}))
    if dist.is_initialized():
        dist.barrier()


def check_damage_on_one_rank_is_refused_on_all(rank: int, world_size: int) -> None:
    """A flipped bit of any file, and a chunk that only the last rank reads: nothing is copied."""
    student = _student_of(world_size, "row_wise")
    loaded = _other_student(world_size, "row_wise")
    before = rm.snapshot(loaded)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_checkpoint(folder, loaded)
        rm.assert_same(rm.snapshot(loaded), before)

    with rm.shared_folder() as name:
        folder = Path(name) / "new"
        save_checkpoint(folder, student)
        files = sorted(folder.iterdir())
        assert len(files) == world_size + 2
        for index, file in enumerate(files):
            content = file.read_bytes()
            dist.barrier()
            if rank == 0:
                bit = 8 * (len(content) // (index + 2))
                flipped = bytearray(content)
                flipped[bit // 8] ^= 1 << index
                file.write_bytes(flipped)
            dist.barrier()
            refused(r"SHA-256|be JSON")
            dist.barrier()
            if rank == 0:
                file.write_bytes(content)
            dist.barrier()
        if rank == 0:  # a file that only the last rank reads, and torch.load refuses
            file = folder / f"__{world_size - 1}_0.distcp"
            file.write_bytes(bytes(file.stat().st_size))
        dist.barrier()
        seal(folder)
        refused(r"received what torch\.load")


def check_a_failed_save_is_removed_on_every_rank(rank: int, world_size: int) -> None:
    """A save that fails on the last rank alone is removed on every rank."""
    state = {f"{number}": torch.zeros(100 * (number + 1)) for number in range(world_size)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with rm.shared_folder() as name:
        if rank == world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_checkpoint(Path(name) / "new", state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        dist.barrier()
        assert not list(Path(name).iterdir())
