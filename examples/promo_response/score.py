"""A scoring job on a real stream: a teacher of the first half of a year scores the second half.

    torchrun --nproc-per-node 2 examples/promo_response/score.py

1. A teacher with rich features trains on the first half of the year and is published: its
   checkpoint, and the event time that it was trained through.
2. The job takes the newest snapshot that has not seen the examples. It scores those of the second
   half that any of three students has, each once, shard by shard. Stopped at any moment, it resumes
   when it is started again.
3. Each student looks up its examples; the quality and the age of the outputs are printed.

Runs on one rank as well (python in place of torchrun), on CPU or CUDA.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import data
import main as demo
import models
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_exfm.das import Shard, TeacherLookup, TeacherStore, newest_snapshot, publish, score

TEACHER_NAME = "half-year"
STUDENTS = {
    "DRUG GM": ("DRUG GM",),
    "MEAT": ("MEAT", "MEAT-PCKGD", "SEAFOOD-PCKGD"),
    "fresh": ("PRODUCE", "MEAT", "DELI", "PASTRY"),
}
BATCH, SHARD = 2**13, 2**15  # examples


def main() -> None:
    """Train and publish the teacher if that is not done yet, then score and look up."""
    options = parse_options()
    device = demo.set_up()
    stream = data.load_stream(options.cache, progress=dist.get_rank() == 0)
    first = stream.select(stream.week < demo.FIRST_WEEK)
    store = TeacherStore.create(options.store, window_seconds=demo.WEEK_SECONDS)
    torch.manual_seed(options.seed)
    features = data.RICH_SPARSE, data.RICH_DENSE
    module = models.ranker(*features, stream.cardinalities, **demo.TEACHER)
    teacher, optimizer = models.distribute(module, device, **demo.TEACHER_RATES)
    if newest_snapshot(store, TEACHER_NAME) is None:
        pipeline: demo.Pipeline = demo.TrainPipelineSparseDist(teacher, optimizer, device)
        feed = data.batches(first, *features, demo.BATCH, **demo.ranks())
        demo.run("teacher", pipeline, feed, first)
        pipeline.detach()
        publish(store, TEACHER_NAME, teacher, trained_through_seconds=int(first.time.max()))
    examples = second_half(stream, sum(STUDENTS.values(), ()))
    report = score(teacher, store, shards(examples), TEACHER_NAME, device=device)
    if dist.get_rank() == 0:
        print(report)
    for name, verticals in STUDENTS.items():
        part = second_half(stream, verticals)
        outputs, lookup = look_up(store, part)
        figures = demo.evaluate(part, outputs)
        if dist.get_rank() == 0:
            counters = lookup.counters[TEACHER_NAME]
            print(
                f"{name:10}{counters.asked:8,} examples, coverage {counters.coverage:.3f}, "
                f"mean age {counters.age_seconds / 86_400:.0f} days, NE {figures[0]:.4f}, "
                f"AUC {figures[1]:.4f}, calibration {figures[2]:.3f}"
            )
    dist.destroy_process_group()


def second_half(stream: data.Stream, verticals: tuple[str, ...]) -> data.Stream:
    """Return the examples of some departments in the second half of the year."""
    rows = np.logical_or.reduce([demo.rows_of(stream, name) for name in verticals])
    return stream.select(rows & (stream.week >= demo.FIRST_WEEK))


def shards(part: data.Stream) -> list[Shard]:
    """Return this rank's shards; all ranks' together are the same for any number of ranks."""

    def shard(first: int) -> Shard:
        rows = part.select(slice(first, first + SHARD))

        def batches() -> Iterator[data.StreamBatch]:
            for start in range(0, len(rows), BATCH):
                batch = rows.select(slice(start, start + BATCH))
                yield next(data.batches(batch, data.RICH_SPARSE, data.RICH_DENSE, len(batch)))[1]

        return Shard(f"week {rows.week[0]}, {first}", batches, int(rows.time[0]))

    firsts = range(0, len(part), SHARD)
    return [shard(first) for first in firsts[dist.get_rank() :: dist.get_world_size()]]


def look_up(store: TeacherStore, part: data.Stream) -> tuple[Tensor, TeacherLookup]:
    """Return a student's outputs as its training sees them, NaN where there is none."""
    lookup = TeacherLookup(store, TEACHER_NAME)
    outputs = torch.full((len(part),), torch.nan)
    for first in range(0, len(part), BATCH):
        rows = slice(first, first + BATCH)
        ids, seconds = (torch.from_numpy(np.array(c[rows])) for c in (part.example_id, part.time))
        looked_up = lookup(SimpleNamespace(example_ids=ids, event_seconds=seconds))
        outputs[rows] = looked_up.values.flatten().where(looked_up.presence.flatten(), torch.nan)
    return outputs, lookup


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder of the built stream")
    parser.add_argument("--store", type=Path, default=Path("results/promo_response_scores/store"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
