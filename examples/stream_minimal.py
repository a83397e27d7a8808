"""A stream in three roles that meet only in a teacher store: a teacher, its scorer, its students.

    torchrun --nproc-per-node 2 examples/stream_minimal.py --role teacher &
    torchrun --nproc-per-node 2 examples/stream_minimal.py --role scorer &
    torchrun --nproc-per-node 2 examples/stream_minimal.py --role student --student A

Start them in any order, on one rank or several. A role that was killed resumes when it is started
again. ``torchx run torchx_components/exfm.py:stream`` starts all of them as one job. This runs on
the CPU; train_minimal.py sets up a GPU. Only the teacher knows the feature "page".
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad, apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_exfm import ExFMMetrics, ExFMWrapper, RunMonitor, TrainPipelineExFM, das

NAMES, ROWS, SIZE = ["user", "item", "page"], 500, 128
BEGIN, SECONDS, CPU = 1_760_000_400, 3600, torch.device("cpu")  # a window is an hour
EXAMPLES = torch.arange(4096)  # of each window; the teacher trains on three of four
LOGGED, SCORED = EXAMPLES[EXAMPLES % 4 > 0], EXAMPLES[::4]


@dataclass
class Examples(Batch):
    example_ids: torch.Tensor  # both stay on the host, where the store is written and read
    event_seconds: torch.Tensor

    def to(self, device, non_blocking=False):
        return replace(self, **vars(super().to(device, non_blocking)))


def batches(examples, window):
    """Yield some of a window's examples in batches; made up, the same at every call."""
    appeal = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(window)
    ids = torch.randint(ROWS, (3, len(EXAMPLES)), generator=random)
    odds = appeal.gather(1, ids).sum(0) - 1
    clicked = (torch.rand(len(EXAMPLES), generator=random) < odds.sigmoid()).float()
    for rows in examples.split(SIZE):
        lengths = torch.ones(3 * len(rows)).int()
        sparse = KeyedJaggedTensor(NAMES, ids[:, rows].flatten(), lengths=lengths)
        seconds = BEGIN + window * SECONDS + rows * SECONDS // len(EXAMPLES)
        example_ids = window * len(EXAMPLES) + rows
        yield Examples(torch.ones(len(rows), 1), sparse, clicked[rows], example_ids, seconds)


def windows(first, last, data):
    for window in range(first, last):
        begin = BEGIN + window * SECONDS
        yield das.Window(begin, begin + SECONDS, data(window))


def distribute(names, wrap=lambda module: module):
    tables = [EmbeddingBagConfig(ROWS, 16, name=name, feature_names=[name]) for name in names]
    bags = EmbeddingBagCollection(tables, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), {"lr": 0.1})
    wrapped = wrap(DLRMTrain(DLRM(bags, 1, [16], [32, 1])))
    model = DistributedModelParallel(wrapped, device=CPU)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    return model, torch.optim.Adam(dense.values(), lr=1e-3)


def teacher(store, rank_slice, options):
    model, optimizer = distribute(NAMES)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    stream = windows(0, options.windows, partial(batches, LOGGED[rank_slice]))
    with das.TeacherLogger(store, "fm") as logger:
        logger.attach(model)
        folder = options.folder / "teacher"  # of its checkpoints
        yield from das.train_teacher(pipeline, stream, store, "fm", logger=logger, folder=folder)


def scorer(store, rank_slice, options):
    model, _ = distribute(NAMES)

    def shards(window):
        parts = enumerate(SCORED.chunk(4))  # the same shards for any number of ranks
        named = [das.Shard(f"{window}/{i}", partial(batches, p, window)) for i, p in parts]
        return named[rank_slice]

    stream = windows(1, options.windows, shards)  # window 0 has no snapshot before it
    yield from das.score_windows(model, stream, store, "fm", device=CPU, progress=False)


def student(store, rank_slice, options):
    model, optimizer = distribute(NAMES[:2], partial(ExFMWrapper, tap="model.over_arch"))
    lookup = das.TeacherLookup(store, "fm")
    pipeline = TrainPipelineExFM(model, optimizer, CPU, teacher=lookup)
    metrics = ExFMMetrics(batch_size=SIZE, device=CPU)
    stream = windows(1, options.windows, partial(batches, EXAMPLES[rank_slice]))
    stream = das.wait_for_outputs(stream, lookup, ["fm", "fm/scores"])
    folder = options.folder / options.student
    with RunMonitor(pipeline, metrics) as monitor:  # prints NE and coverage
        yield from das.train_windows(
            pipeline, stream, step=monitor.step, metrics=metrics, folder=folder
        )


ROLES = {"teacher": teacher, "scorer": scorer, "student": student}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("--student", default="A", help="its name, and its folder")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("results/stream"))
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    store = das.TeacherStore.create(options.folder / "store", window_seconds=SECONDS)
    rank_slice = slice(dist.get_rank(), None, dist.get_world_size())
    for window in ROLES[options.role](store, rank_slice, options):
        number = (window.begin_seconds - BEGIN) // SECONDS
        if dist.get_rank() == 0:
            print(f"{options.role}: done with window {number}", flush=True)
    dist.destroy_process_group()
