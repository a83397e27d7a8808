"""A two-rank training in which one rank loses its teacher: torchrun tests/failing_rank.py."""

from __future__ import annotations

import os

import rank_models as rm
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from torchrec_exfm import TeacherOutputs

FAILS_AT = 3


@record
def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    calls = iter(range(100))

    def teacher(batch: rm.Columns) -> TeacherOutputs:
        if next(calls) == FAILS_AT and rank == 1:
            raise ConnectionError("no route to the store")
        return rm.logged(batch)

    trainee = rm.sharded(rm.wrapped(), world_size)
    rm.drained(rm.pipeline_of(trainee, teacher=teacher), rm.parts(rank, world_size))
    print("went on to the end", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
