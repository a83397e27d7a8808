"""A stream of three roles that meet only in a teacher store: a teacher, its scorer, its students.

    torchrun --nproc-per-node 2 examples/stream_minimal.py --role teacher  # or scorer, or student

Start them side by side, in any order, by hand or by TorchX. A killed one resumes when restarted."""

import argparse
from functools import partial

import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, optim
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_exfm import ExFMMetrics, ExFMWrapper, RunMonitor, TrainPipelineExFM, das

NAMES, ROWS, CPU, HOUR, BEGIN = ["user", "item", "page"], 500, torch.device("cpu"), 3600, 489_000
EXAMPLES = torch.arange(4096)  # of an hour; the teacher trains on three of four, knows the page
COLUMNS = {  # where the store finds ids and times in a batch
    "ids": lambda batch: batch.sparse_features["id"].values(),
    "event_seconds": lambda batch: batch.sparse_features["second"].values(),
}


def batches(examples, hour):  # some of an hour's examples, the same at every call
    appeal = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(0))
    values = torch.randint(ROWS, (3, 4096), generator=torch.Generator().manual_seed(hour))
    labels = (appeal.gather(1, values).sum(0) > 1).float()
    values = torch.stack([*values, hour * 4096 + EXAMPLES, hour * HOUR + EXAMPLES * HOUR // 4096])
    for rows in examples.split(128):
        columns, lengths = values[:, rows].flatten(), torch.ones(5 * len(rows)).int()
        features = KeyedJaggedTensor([*NAMES, "id", "second"], columns, lengths=lengths)
        yield Batch(torch.ones(len(rows), 1), features, labels[rows])


def distribute(names, wrap=lambda dlrm: dlrm):
    tables = [EmbeddingBagConfig(ROWS, 16, name=name, feature_names=[name]) for name in names]
    bags = EmbeddingBagCollection(tables, device=torch.device("meta"))
    optim.apply_optimizer_in_backward(optim.RowWiseAdagrad, bags.parameters(), {"lr": 0.1})
    model = DistributedModelParallel(wrap(DLRMTrain(DLRM(bags, 1, [16], [32, 1]))), device=CPU)
    dense = dict(optim.optimizers.in_backward_optimizer_filter(model.named_parameters()))
    return model, torch.optim.Adam(dense.values(), lr=1e-3)


def start(role, student, hours, folder):  # returns an iterator over the windows that are done
    dist.init_process_group("gloo")
    store = das.TeacherStore.create(f"{folder}/store", window_seconds=HOUR)
    folder = f"{folder}/{student if role == 'student' else role}"  # of its checkpoints
    share = slice(dist.get_rank(), None, dist.get_world_size())  # of this rank

    def windows(first, data):
        for hour in range(BEGIN + first, BEGIN + hours):
            yield das.Window(hour * HOUR, (hour + 1) * HOUR, data(hour))

    def shards(hour):  # the same for any number of ranks
        parts = EXAMPLES[::4].chunk(4)[share]
        return [das.Shard(f"{hour}/{rows[0]}", partial(batches, rows, hour)) for rows in parts]

    if role == "scorer":
        model, _ = distribute(NAMES)
        return das.score_windows(model, windows(1, shards), store, "fm", device=CPU, **COLUMNS)
    if role == "teacher":
        model, optimizer = distribute(NAMES)
        logger = das.TeacherLogger(store, "fm", **COLUMNS)
        logger.attach(model)
        pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
        stream = windows(0, partial(batches, EXAMPLES[EXAMPLES % 4 > 0][share]))
        return das.train_teacher(pipeline, stream, store, "fm", logger=logger, folder=folder)
    model, optimizer = distribute(NAMES[:2], partial(ExFMWrapper, tap="model.over_arch.model.1"))
    lookup = das.TeacherLookup(store, "fm", **COLUMNS)
    pipeline = TrainPipelineExFM(model, optimizer, CPU, teacher=lookup)
    metrics = ExFMMetrics(batch_size=128, device=CPU)
    step = RunMonitor(pipeline, metrics, every_steps=16).step  # prints NE and coverage
    stream = windows(1, partial(batches, EXAMPLES[share]))
    stream = das.wait_for_outputs(stream, lookup, ["fm", "fm/scores"])
    return das.train_windows(pipeline, stream, step=step, metrics=metrics, folder=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", choices=["teacher", "scorer", "student"], required=True)
    parser.add_argument("--student", default="A", help="its name, and its folder")
    parser.add_argument("--hours", type=int, default=8)
    parser.add_argument("--folder", default="results/stream")
    for window in start(**vars(parser.parse_args())):
        print(f"done with hour {window.begin_seconds // HOUR - BEGIN}", flush=True)
    dist.destroy_process_group()
