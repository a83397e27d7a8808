"""Checks of training that resumes from a checkpoint as if it had not stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import random
import resource
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import rank_models as rm
import torch
import torch.distributed as dist
from ranks import device
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_exfm import (
    DistillationTerm,
    ExFMMetrics,
    StudentAdapter,
    TrainPipelineExFM,
    load_training,
    save_training,
)
from torchrec_exfm._compat import fused_steps, single_optimizers
from torchrec_exfm.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from torchrec_exfm.wrapper import find_wrapper

TERMS = (*rm.HEADS, *rm.ADAPTED, *rm.MARGINS)
WAYS: dict[str, dict[str, Any]] = {  # sharding, and optimizers of tables and dense parts
    "SGD": {"lr": 0.2},
    "Adagrad": {
        "sharding": "column_wise",
        "fused": torch.optim.Adagrad,
        "dense": torch.optim.Adagrad,
        "lr": 0.1,
    },
    "RowWiseAdagrad": {
        "sharding": "row_wise",
        "fused": RowWiseAdagrad,
        "dense": torch.optim.AdamW,
        "lr": 0.05,
        "weight_decay": 0.1,
    },
    "mixed": {
        "sharding": "mixed",
        "fused": RowWiseAdagrad,
        "dense": torch.optim.Adam,
        "lr": 0.05,
    },
}

ON_CUDA = {"Adam": {"fused": torch.optim.Adam, "dense": torch.optim.Adam, "lr": 0.05}}


class Run(NamedTuple):
    """A training with a schedule of its learning rates, and its metrics."""

    trainee: rm.Trainee
    pipeline: TrainPipelineExFM
    metrics: ExFMMetrics

    def step(self, batches: Any) -> list[Tensor]:
        output = self.pipeline.progress(batches)
        self.metrics.update(output, find_wrapper(self.trainee.model).last_teacher)
        fused, dense = self.trainee.model.fused_optimizer, self.pipeline._optimizer
        groups = {id(group): group for group in (*fused.param_groups, *dense.param_groups)}
        for group in groups.values():
            group["lr"] *= 0.99
        fused.step()  # passes the learning rate on to the tables
        return [*(value.clone() for value in output), torch.rand(2)]

    def everything(self) -> list[Any]:
        """Return a copy of the weights, the optimizers' state, the rates and the metrics."""
        pipeline, fused = self.pipeline, self.trainee.model.fused_optimizer
        assert pipeline.adapter is not None and pipeline.adapter_optimizer is not None
        optimizers = (fused, self.trainee.optimizer, pipeline.adapter_optimizer)
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        states += [self.trainee.model.state_dict(), pipeline.adapter.state_dict()]
        groups = itertools.chain(*(optimizer.param_groups for optimizer in optimizers))
        rates = [group["lr"] for group in groups]
        steps = [
            [int(counter) for counter in fused_steps(optimizer)]
            for _, optimizer in single_optimizers(fused)
        ]
        metrics = self.metrics.compute().items()
        defined = {key: value for key, value in metrics if not math.isnan(value)}
        return [*map(_copied, states), rates, steps, defined]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, ShardedTensor):
        return [shard.tensor.clone() for shard in value.local_shards()]
    return value.detach().clone() if isinstance(value, Tensor) else value


def new_run(
    world_size: int,
    way: str,
    seed: int = 0,
    terms: Sequence[DistillationTerm] = TERMS,
    adapter: StudentAdapter | None = None,
    **changes: Any,
) -> Run:
    wrapper = rm.wrapped(rm.two_task_student(seed), terms=terms, seed=seed + 1)
    trainee = rm.sharded(wrapper, world_size, **((WAYS | ON_CUDA)[way] | changes))
    if way != "SGD":  # its optimizer holds the dense parameters alone
        combined = CombinedOptimizer([trainee.model.fused_optimizer, trainee.optimizer])
        trainee = trainee._replace(optimizer=combined)
    adapter = adapter or rm.two_task_adapter(seed + 2)
    pipeline = rm.pipeline_of(trainee, teacher=rm.informed, adapter=adapter)
    metrics = ExFMMetrics(
        batch_size=rm.GLOBAL_SIZE // world_size,
        device=device(),
        tasks=rm.TASKS,
        teachers=rm.TEACHERS,
        window_size=3 * rm.GLOBAL_SIZE,
    )
    return Run(trainee, pipeline, metrics)


def check_resumed_equals_straight(rank: int, world_size: int, way: str) -> None:
    """A training that is saved and resumed in new objects equals a straight one, to the bit."""
    batches = rm.parts(rank, world_size)
    torch.manual_seed(rank)
    straight = new_run(world_size, way)
    iterator = iter(batches)
    torch.manual_seed(rank)
    expected = [straight.step(iterator) for _ in batches]

    with rm.shared_folder() as folder:
        run = new_run(world_size, way)
        iterator = iter(batches)
        torch.manual_seed(rank)
        outputs = []
        for step in range(len(batches)):
            if step in (0, 3, 4):
                position = {"step": step, "epoch": 7}
                save_training(folder, run.pipeline, position=position, metrics=run.metrics)
            outputs.append(run.step(iterator))
        rm.assert_same(outputs, expected)
        rm.assert_same(run.everything(), straight.everything())

        resumed = new_run(world_size, way, seed=5)
        torch.manual_seed(99)
        position = load_training(folder, resumed.pipeline, metrics=resumed.metrics)
        assert position == {"step": 4, "epoch": 7}
        iterator = iter(batches[4:])
        rm.assert_same([resumed.step(iterator) for _ in batches[4:]], expected[4:])
        rm.assert_same(resumed.everything(), straight.everything())


def check_resumed_before_the_first_step(rank: int, world_size: int) -> None:
    """Loading replaces all state of new objects; without a checkpoint it changes nothing."""
    batches = rm.parts(rank, world_size)
    run = new_run(world_size, "RowWiseAdagrad")
    resumed = new_run(world_size, "RowWiseAdagrad", seed=5)
    before = resumed.everything()[3:5]
    with rm.shared_folder() as folder:
        assert load_training(folder, resumed.pipeline) is None
        assert load_training(Path(folder) / "none", resumed.pipeline) is None
        rm.assert_same(resumed.everything()[3:5], before)
        save_training(folder, run.pipeline, position={"step": 0}, metrics=run.metrics)
        assert load_training(folder, resumed.pipeline) == {"step": 0}
        outputs = []
        for candidate in (run, resumed):
            iterator = iter(batches)
            torch.manual_seed(rank)
            outputs.append([candidate.step(iterator) for _ in batches])
        rm.assert_same(*outputs)
        rm.assert_same(resumed.everything(), run.everything())


def check_resumed_without_dmp(rank: int, world_size: int) -> None:
    """Plain tables, alone on a rank or under DDP, with an optimizer of torch's own."""
    batches = rm.parts(rank, world_size)

    def new(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, TrainPipelineExFM]:
        wrapper = rm.wrapped(rm.two_task_student(seed), terms=(*rm.HEADS, rm.MARGINS[1]))
        model = wrapper.to(device())
        model = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True)
        pipeline = TrainPipelineExFM(model, optimizer, device(), teacher=rm.informed)
        return model, optimizer, pipeline

    straight, optimizer, first = new(seed=0)
    resumed, other, second = new(seed=5)
    assert_goes_on(first, second, batches)
    rm.assert_same(resumed.state_dict(), straight.state_dict())
    rm.assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def assert_goes_on(first: Any, second: Any, batches: Sequence[rm.Columns]) -> None:
    """Require the second pipeline, resumed from a save of the first, to end the same."""
    iterator = iter(batches)
    with rm.shared_folder() as folder:
        for _ in range(3):
            first.progress(iterator)
        save_training(folder, first, position={"step": 3})
        expected = rm.drained(first, iterator)
        assert load_training(folder, second) == {"step": 3}
    rm.assert_same(rm.drained(second, batches[3:]), expected)


def check_a_resumed_teacher_equals_straight(rank: int, world_size: int) -> None:
    """TorchRec's own pipeline and a model without a wrapper, to the bit."""
    batches = rm.parts(rank, world_size)

    def new(seed: int) -> tuple[rm.Trainee, Any]:
        trainee = rm.sharded(rm.two_task_student(seed), world_size, **WAYS["RowWiseAdagrad"])
        return trainee, TrainPipelineSparseDist(trainee.model, trainee.optimizer, device())

    def everything(trainee: rm.Trainee) -> list[Any]:
        optimizers = trainee.model.fused_optimizer, trainee.optimizer
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        return [_copied(state) for state in (trainee.model.state_dict(), *states)]

    trainee, first = new(seed=0)
    resumed, second = new(seed=5)
    assert_goes_on(first, second, batches)
    rm.assert_same(everything(resumed), everything(trainee))


def check_checkpoints_of_a_run(rank: int, world_size: int) -> None:
    """The newest checkpoints are kept; an incomplete one is ignored, and deleted later."""
    run = new_run(world_size, "SGD")
    with rm.shared_folder() as name:
        folder = Path(name)

        def save(step: int, **options: int) -> list[str]:
            new = save_training(folder, run.pipeline, position={"step": step}, **options)
            assert new.parent == folder
            dist.barrier()
            names = sorted(path.name for path in folder.iterdir())
            dist.barrier()
            return names

        assert save(10) == ["1"]
        assert save(20) == ["1", "2"]
        assert save(30) == ["2", "3"]
        if rank == 0:
            (folder / "3" / "metadata.json").unlink()
            (folder / "2025").mkdir()
            (folder / "2025" / "notes.txt").touch()
            (folder / "x").mkdir()
        dist.barrier()
        assert load_training(folder, run.pipeline) == {"step": 20}
        assert save(40) == ["2", "2025", "2026", "x"]
        assert load_training(folder, run.pipeline) == {"step": 40}
        assert save(50, keep=1) == ["2025", "2027", "x"]
        with pytest.raises(ValueError, match="keep should be at least 1; received 0"):
            save(60, keep=0)
        with pytest.raises(TypeError, match="whole numbers"):
            save_training(folder, run.pipeline, position={"step": 0.5})  # type: ignore[dict-item]
        if world_size > 1:
            with pytest.raises(ValueError, match="the same on every rank"):
                save(60 + rank)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save(70)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        dist.barrier()
        assert sorted(path.name for path in folder.iterdir()) == ["2025", "2027", "x"]
        older = folder / "2027" / "metadata.json"
        if rank == 0:
            older.write_text('{"format": "torchrec_exfm.checkpoint", "version": 1, "tensors": {}}')
        dist.barrier()
        with pytest.raises(ValueError, match="an older one without digests"):
            load_training(folder, run.pipeline)


def check_links_and_files_among_checkpoints(rank: int, world_size: int) -> None:
    """Links and files named by a number are not loaded, written to, deleted or in the way."""
    run = new_run(world_size, "SGD")
    with rm.shared_folder() as name:
        outside, folder, link = (Path(name) / part for part in ("outside", "run", "link"))
        save_training(outside, run.pipeline, position={"step": 7})
        if rank == 0:
            folder.mkdir()
            link.symlink_to(folder)
            (folder / "1").symlink_to(outside / "1")
            (folder / "3").touch()
            (folder / "4").symlink_to(outside / "none")
            (folder / "9").symlink_to(outside / "1")
            (folder / ("9" * 255)).touch()
            (folder / "٣").mkdir()
        dist.barrier()
        before = {path.name: path.read_bytes() for path in (outside / "1").iterdir()}
        assert load_training(link, run.pipeline) is None
        numbers = [
            int(save_training(link, run.pipeline, position={"step": step}, keep=1).name)
            for step in range(3)
        ]
        assert numbers == [2, 5, 6]
        assert load_training(link, run.pipeline) == {"step": 2}
        dist.barrier()
        names = {path.name for path in folder.iterdir()}
        assert names == {"1", "3", "4", "6", "9", "9" * 255, "٣"}
        assert {path.name: path.read_bytes() for path in (outside / "1").iterdir()} == before


def check_wrong_values_are_refused(rank: int, world_size: int) -> None:
    """Wrong values with matching digests are refused before any rank changes anything."""
    way = "RowWiseAdagrad"
    run = new_run(world_size, way)
    run.step(iter(rm.parts(rank, world_size)))
    other = new_run(world_size, way, seed=5)
    before = other.everything()

    def refused(message: str, change: Any) -> None:
        change_tensors(folder / "1", change)
        with pytest.raises(ValueError, match=message):
            load_training(folder, other.pipeline, metrics=other.metrics)
        rm.assert_same(other.everything(), before)

    def change_values(change: Any) -> Any:
        def changed(tensors: dict[str, Tensor]) -> None:
            values = json.loads(bytes(tensors["values"].tolist()))
            tensors["values"] = torch.tensor(list(json.dumps(change(values)).encode())).byte()

        return changed

    def put(*path: str, value: Any) -> Any:
        def change(values: dict[str, Any]) -> Any:
            record = values
            for key in path[:-1]:
                record = record[key]
            record[path[-1]] = value
            return values

        return change_values(change)

    with rm.shared_folder() as name:
        folder = Path(name)
        save_training(folder, run.pipeline, position={"step": 1}, metrics=run.metrics)
        prefix = f"rank{world_size - 1}/"  # wrong on one rank
        saved = change_tensors(folder / "1", lambda tensors: None)
        numbers = json.loads(bytes(saved["values"].tolist()))["numbers"]
        fused = next(key for key in numbers if key.startswith("fused"))
        dense = next(key for key in numbers if key.startswith("dense"))
        state = next(key for key in saved if key.startswith("dense"))
        wrong = "hold values of a training; received others"
        deep = torch.tensor(list(b"[" * 100_000)).byte()
        for message, change in [
            (wrong, change_values(lambda values: [])),
            *(
                (wrong, change_values(lambda v, key=key: v.pop(key) and v))
                for key in ("names", "ranks")
            ),
            (wrong, change_values(lambda v: {key: v[key] for key in v if key != "states"})),
            (wrong, put("position", value={"step": "7"})),
            (wrong, put("position", value=[7])),
            (wrong, put("names", "tasks", value="click")),
            (wrong, put("numbers", dense, value={"kind": "AdamW"})),
            (wrong, put("numbers", dense, "group", "lr", value="7")),
            (wrong, put("states", value={state: [7]})),
            ("values of version 1; received 2", put("version", value=2)),
            ("each state of an optimizer once", put("states", value={state: 7})),
            ("hold numbers of 'dense", put("numbers", dense, "group", "betas", value=[0.5])),
            ("hold numbers of 'dense", put("numbers", dense, "group", "betas", value=0.5)),
            ("hold numbers of 'dense", put("numbers", dense, "group", "params", value=[1])),
            ("hold numbers of 'fused", put("numbers", fused, "steps", value=[])),
            ("hold numbers of 'fused", put("numbers", fused, "steps", value=[2**63])),
            ("JSON as values", lambda t: t.update(values=deep)),
            ("JSON as values", lambda t: t.update(values=torch.tensor([255]).byte())),
            ("JSON as values", lambda t: t.update(values=t["values"][:-1])),
            ("JSON as values", lambda t: t.update(values=torch.ones(2, 2))),
            ("JSON as values", lambda t: t.update(values=torch.ones(2).bfloat16())),
            (
                "state of random numbers",
                lambda t: [t.pop(key) for key in list(t) if key.startswith(prefix)],
            ),
            ("state of random numbers", lambda t: t.pop(prefix + "random")),
            ("state of random numbers", lambda t: t.update({prefix + "random": torch.ones(7)})),
            ("state of random numbers", lambda t: t[prefix + "random"].fill_(1)),
            ("state should be that of metrics", lambda t: t.pop(prefix + "metrics/sums")),
            (
                "hold metrics with '.*sizes' of",
                lambda t: t.update(
                    {key: t[key][None] for key in t if key.startswith(prefix) and "sizes" in key}
                ),
            ),
            (
                "hold metrics with '.*' of",
                lambda t: [
                    t[key].sub_(1) for key in t if key.startswith(prefix) and "sizes" in key
                ],
            ),
            (
                "hold metrics with '.*updates' of",
                lambda t: t.update(
                    {key: torch.ones(3) for key in t if key.startswith(prefix) and "updates" in key}
                ),
            ),
        ]:
            refused(
                message, lambda t, change=change: (t.clear(), t.update(_copied(saved)), change(t))
            )
        change_tensors(folder / "1", lambda t: (t.clear(), t.update(_copied(saved))))
        position = load_training(folder, other.pipeline, metrics=other.metrics)
        assert position == {"step": 1}


def change_tensors(folder: Path, change: Any) -> dict[str, Tensor]:
    """Let one process rewrite a checkpoint with changed tensors; return them."""
    saved = {
        key: torch.zeros(record.size, dtype=record.properties.dtype)
        for key, record in read_metadata(folder).state_dict_metadata.items()
    }
    with mock.patch.object(dist, "is_initialized", lambda: False):
        load_checkpoint(folder, saved)
        dist.barrier() if dist.get_world_size() > 1 else None
        change(saved)
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
            save_checkpoint(folder, saved)
    dist.barrier()
    return saved


def check_flipped_bits_of_values(rank: int, world_size: int) -> None:
    """Each of 200 flipped bits in the values is an error, and changes nothing."""
    run, other = new_run(world_size, "SGD"), new_run(world_size, "SGD", seed=5)
    before = other.everything()
    with rm.shared_folder() as name:
        folder = Path(name)
        save_training(folder, run.pipeline, position={"step": 1})
        (place,) = read_metadata(folder / "1").storage_data["values"]
        content = place.path.read_bytes()
        dist.barrier()
        generator = random.Random(0)
        for count in range(200):
            bit = generator.randrange(8 * place.offset, 8 * (place.offset + place.length))
            if rank == 0:
                flipped = bytearray(content)
                flipped[bit // 8] ^= 1 << bit % 8
                place.path.write_bytes(flipped)
            dist.barrier()
            with pytest.raises(ValueError, match="should have the SHA-256"):
                load_training(folder, other.pipeline)
            dist.barrier()
            if count % 50 == 0:
                rm.assert_same(other.everything(), before)
        rm.assert_same(other.everything(), before)


def check_a_checkpoint_of_another_run_is_refused(rank: int, world_size: int) -> None:
    """The error says what differs, and nothing is changed."""
    batches = iter(rm.parts(rank, world_size))
    way = "RowWiseAdagrad"
    run = new_run(world_size, way)
    run.step(batches)

    def refused(other: Run, message: str) -> None:
        before = other.everything()
        with pytest.raises(ValueError, match=message):
            load_training(folder, other.pipeline, metrics=other.metrics)
        rm.assert_same(other.everything(), before)

    with rm.shared_folder() as name:
        folder = Path(name)
        save_training(folder, run.pipeline, position={"step": 1}, metrics=run.metrics)
        refused(run, r"no batches in flight; received one with \d;")
        refused(new_run(world_size, way, terms=TERMS[1:]), r"with the terms \['b/click', .*\['a', ")
        wider = dataclasses.replace(TERMS[1], hidden=(3,))
        refused(
            new_run(world_size, way, terms=(TERMS[0], wider, *TERMS[2:])),
            r"received one without \['model/exfm.*term_losses\.1.*\] and with \[\]",
        )
        plan = "data_parallel" if way != "SGD" else "row_wise"
        refused(
            new_run(world_size, way, sharding=plan),
            r"with these optimizers and this sharding plan; received one without \['dense",
        )
        refused(new_run(world_size, "SGD"), r"without \[\] and with .*momentum1")
        refused(new_run(world_size, way, dense=torch.optim.Adam), "with Adam for .* one with AdamW")
        plain = new_run(world_size, way)
        plain.pipeline._optimizer = torch.optim.AdamW(plain.trainee.model.parameters())
        refused(plain, r"without \['dense/0'.* and with \['dense/exfm")
        hidden = StudentAdapter(num_teachers=2, tasks=rm.TASKS, hidden=(7,))
        refused(
            new_run(world_size, way, adapter=hidden),
            r"'adapter/mlps.*\[7, 4\]; received .*\[5, 4\]",
        )
        metrics = ExFMMetrics(batch_size=8, device=device(), tasks=rm.TASKS[:1])
        refused(
            new_run(world_size, way)._replace(metrics=metrics), "should be that of metrics of 1"
        )
        if rank == 0:
            for file in (folder / "1").glob("*.distcp"):
                os.truncate(file, file.stat().st_size // 2)
        dist.barrier()
        refused(new_run(world_size, way), r"distcp should hold \d+ bytes; received \d+ bytes")
        save_checkpoint(folder / "2", {"a": torch.zeros(2)})
        refused(new_run(world_size, way), "2 should hold a training; received another checkpoint")


def check_metrics_start_anew(rank: int, world_size: int) -> None:
    """Metrics that were not saved start from zero, with a warning."""
    run, other = new_run(world_size, "SGD"), new_run(world_size, "SGD")
    other.step(iter(rm.parts(rank, world_size)))
    expected = other.metrics.compute()
    with rm.shared_folder() as folder:
        save_training(folder, run.pipeline, position={"step": 3})
        fresh = new_run(world_size, "SGD")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_training(folder, fresh.pipeline, metrics=other.metrics)
        messages = [str(warning.message) for warning in caught if warning.filename == __file__]
        assert len(messages) == 1 and messages[0].startswith("the metrics start anew")
    assert other.metrics.compute() == expected
