"""Checks of export, checkpoints, evaluation and the pipeline's options."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from typing import Any
from unittest import mock

import pytest
import rank_models as rm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from costs import Costs
from models import NUM_DENSE, Student, students, tables
from ranks import device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchrec import EmbeddingBagCollection
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.gradient_accumulation import (
    GradientAccumulationConfig,
    GradientAccumulationWrapper,
)
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import DataType

from torchrec_exfm import (
    DistillationTerm,
    ExFMWrapper,
    TrainPipelineExFM,
    _gather,
    export_student,
    student_state_dict,
)

TERMS = (*rm.HEADS, *rm.ADAPTED, *rm.MARGINS)
FREES_FEATURES = (  # since TorchRec 1.7
    "free_features_storage_early" in inspect.signature(TrainPipelineSparseDist.__init__).parameters
)
OPTIONS = (  # of the pipeline
    "enable_inplace_copy_batch",
    "enqueue_batch_after_forward",
    *(["free_features_storage_early"] if FREES_FEATURES else []),
)


def _training(
    world_size: int, sharding: str = "table_wise", **options: Any
) -> tuple[rm.Trainee, TrainPipelineExFM]:
    trainee = rm.sharded(rm.wrapped(terms=TERMS), world_size, sharding=sharding)
    adapter = rm.two_task_adapter()
    return trainee, rm.pipeline_of(trainee, teacher=rm.informed, adapter=adapter, **options)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        _, (_, logits, _) = model(batch)
    student_logits: Tensor = logits
    return student_logits


def check_export(rank: int, world_size: int, sharding: str) -> None:
    """An export during training gives the sharded student's outputs, and disturbs nothing."""
    trainee, pipeline = _training(world_size, sharding)
    batches = iter(rm.parts(rank, world_size))
    for _ in range(3):
        pipeline.progress(batches)
    exported = export_student(trainee.model)
    at_export = rm.snapshot(exported.state_dict()) if exported else {}
    expected = _logits_of_trainee_after(3, rank, world_size, sharding)
    rm.drained(pipeline, batches)

    undisturbed, other = _training(world_size, sharding)
    rm.drained(other, rm.parts(rank, world_size))
    rm.assert_same(
        rm.snapshot(trainee.model.state_dict()), rm.snapshot(undisturbed.model.state_dict())
    )
    assert (exported is not None) == (rank == 0)
    if exported is not None:
        plain = rm.two_task_student()
        assert type(exported) is type(plain)
        assert list(exported.state_dict()) == list(plain.state_dict())
        assert not any(module.training for module in exported.modules())
        rm.assert_same(rm.snapshot(exported.state_dict()), at_export)
        actual = [_logits(exported, batch) for batch in rm.parts(rank, world_size)]
        rm.assert_near(actual, expected)


def check_export_in_pieces(rank: int, world_size: int, sharding: str) -> None:
    """An export needs memory for one copy on rank 0, and for a piece on every rank."""
    torch.manual_seed(0)
    rows = 2_001  # odd, and much more than the dense layers
    collection = EmbeddingBagCollection(
        tables=[
            dataclasses.replace(table, data_type=DataType.FP16 if i else DataType.FP32)
            for i, table in enumerate(tables(rows=rows, dim=rm.DIM).embedding_bag_configs())
        ]
    )
    student = DLRMTrain(DLRM(collection, NUM_DENSE, [6, rm.DIM], [5, len(rm.TASKS)]))
    expected = rm.snapshot(student.state_dict())
    size = sum(tensor.nbytes for (tensor,) in expected.values())
    model = rm.sharded(rm.wrapped(student, terms=TERMS), world_size, sharding=sharding).model
    with Costs() as costs, mock.patch.object(_gather, "PIECE_BYTES", size // 100):
        exported = export_student(model)
    assert costs.bytes - (size if rank == 0 else 0) < 0.1 * size
    if exported is not None:
        rm.assert_same(rm.snapshot(exported.state_dict()), expected)


def check_gathered_dtensors(rank: int, world_size: int) -> None:
    """DTensors of torch, and of TorchRec, which marks a table on one rank as replicated."""
    expected = torch.arange(70.0).view(7, 10).half()
    kinds = (Replicate(), Shard(0), Shard(1))
    meshes = [init_device_mesh(device().type, shape) for shape in ((world_size, 1), (world_size,))]
    for mesh in meshes:
        for placements in itertools.product(kinds, repeat=mesh.ndim):
            _assert_gathered(distribute_tensor(expected.to(device()), mesh, placements), expected)
        _assert_gathered(
            _torchrec_dtensor(expected, mesh, rank, [(world_size - 1, 0, 10)]), expected
        )
        blocks = [(0, 0, 3), (world_size - 1, 3, 4), (0, 4, 10)]
        _assert_gathered(_torchrec_dtensor(expected, mesh, rank, blocks), expected)
    uneven = _torchrec_dtensor(expected, meshes[-1], rank, [(0, 0, 3)])
    with pytest.raises(AssertionError):  # on every rank
        _assert_gathered(uneven, expected)


def _torchrec_dtensor(
    tensor: Tensor, mesh: DeviceMesh, rank: int, blocks: list[tuple[int, int, int]]
) -> DTensor:
    """Return TorchRec's column-wise DTensor; ``blocks`` are (rank, first column, end)."""
    columns = [(start, end) for owner, start, end in blocks if owner == rank]
    shards = [tensor[:, start:end].contiguous().to(device()) for start, end in columns]
    local = LocalShardsWrapper(shards, [(0, start) for start, _ in columns])
    size = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(local, mesh, run_check=False, **size)


def _assert_gathered(tensor: DTensor, expected: Tensor) -> None:
    target = torch.empty_like(expected) if dist.get_rank() == 0 else None
    with mock.patch.object(_gather, "PIECE_BYTES", 48):  # two rows of ten, or more of a shard
        _gather.gather_to_rank_0(tensor, target)
    if target is not None:
        rm.assert_same(target, expected)


def _logits_of_trainee_after(steps: int, rank: int, world_size: int, sharding: str) -> list[Tensor]:
    _, pipeline = _training(world_size, sharding)
    rm.drained(pipeline, rm.parts(rank, world_size)[:steps])
    return _evaluated(pipeline.detach(), rank, world_size)


def _evaluated(model: nn.Module, rank: int, world_size: int) -> list[Tensor]:
    model.eval()
    batches = [batch.to(device()) for batch in rm.parts(rank, world_size)]
    logits = [_logits(model, batch).cpu() for batch in batches]
    model.train()
    return logits


def check_checkpoint(rank: int, world_size: int, sharding: str, other: str) -> None:
    """Checkpoints of the wrapped and of the bare student are interchangeable."""
    trainee, pipeline = _training(world_size, sharding)
    rm.drained(pipeline, rm.parts(rank, world_size))
    model = pipeline.detach()
    bare = rm.sharded(rm.two_task_student(seed=3), world_size, sharding=other)
    before = _evaluated(bare.model, rank, world_size)
    expected = _evaluated(model, rank, world_size)
    _copied_through_disk(student_state_dict(trainee.model), bare.model.state_dict())
    rm.assert_near(_evaluated(bare.model, rank, world_size), expected)
    assert rm.differs({"logits": before}, {"logits": expected})

    fresh, _ = _training(world_size, other)
    heads = rm.snapshot(fresh.model.state_dict())
    _copied_through_disk(bare.model.state_dict(), student_state_dict(fresh.model))
    rm.assert_near(_evaluated(fresh.model, rank, world_size), expected)
    after = rm.snapshot(fresh.model.state_dict())
    for key in (key for key in heads if key.startswith("exfm.")):
        rm.assert_same(after[key], heads[key])


def _copied_through_disk(source: dict[str, Any], target: dict[str, Any]) -> None:
    assert sorted(source) == sorted(target)
    with rm.shared_folder() as folder:
        dcp.save(source, checkpoint_id=folder)
        dcp.load(target, checkpoint_id=folder)


def check_resumed_training(rank: int, world_size: int) -> None:
    """Training resumes from a checkpoint of model and adapter as if it had not stopped."""
    batches = rm.parts(rank, world_size)
    straight, pipeline = _training(world_size)
    expected = rm.drained(pipeline, batches)

    _, first = _training(world_size)
    outputs = rm.drained(first, batches[:3])
    resumed, second = _training(world_size)
    rm.load_weights(resumed.model.state_dict(), _zeros())
    _copied_through_disk(first.detach().state_dict(), resumed.model.state_dict())
    second.adapter.load_state_dict(first.adapter.state_dict())
    second.adapter_optimizer.load_state_dict(first.adapter_optimizer.state_dict())
    outputs += rm.drained(second, batches[3:])
    rm.assert_same(outputs, expected)
    rm.assert_same(
        rm.snapshot(resumed.model.state_dict()), rm.snapshot(straight.model.state_dict())
    )


def _zeros() -> dict[str, Tensor]:
    state = rm.wrapped(terms=TERMS).state_dict()
    return {key: torch.zeros_like(value) for key, value in state.items()}


def check_student(rank: int, world_size: int, name: str) -> None:
    """Every kind of student trains, pipelined, evaluates, and is exported."""
    student = students()[name]
    wrapper = ExFMWrapper(student.factory(), tap=student.tap)
    trainee = rm.sharded(wrapper, world_size, fused=torch.optim.Adagrad)
    before = rm.snapshot(trainee.model.state_dict())
    pipeline = rm.pipeline_of(trainee)
    outputs = rm.drained(pipeline, rm.random_batches(student, rank, steps=3))
    assert len(outputs) == 3
    assert pipeline._pipelined_modules
    after = rm.snapshot(trainee.model.state_dict())
    for key in after:
        assert rm.differs({key: after[key]}, {key: before[key]}) or _may_rest(key), key

    exported = export_student(trainee.model)
    batch = student.make_batch(1000 + rank).to(device())
    expected = _logits(pipeline.detach().eval(), batch)
    assert (exported is not None) == (rank == 0)
    if exported is not None:
        assert type(exported) is type(student.factory())
        assert list(exported.state_dict()) == list(student.factory().state_dict())
        rm.assert_near([_logits(exported, batch.to(torch.device("cpu")))], [expected.cpu()])


def _may_rest(key: str) -> bool:
    """Return whether a parameter may get no gradient, as behind a ReLU that is shut."""
    return key.endswith("bias")


def check_option_changes_nothing(rank: int, world_size: int, option: str) -> None:
    """TorchRec's own options of the pipeline: faster or leaner, with the same result."""
    results = []
    for options in ({}, {option: True}):
        trainee, pipeline = _training(world_size, **options)
        outputs = rm.drained(pipeline, rm.parts(rank, world_size))
        results.append((outputs, rm.snapshot(trainee.model.state_dict())))
    rm.assert_same(*results)


def check_gradient_accumulation(rank: int, world_size: int) -> None:
    """With w = 0 as the plain student, with its gradients accumulated in the same way."""
    student = students()["dlrm"]
    bare = rm.sharded(student.factory(), world_size)
    plain = TrainPipelineSparseDist(bare.model, bare.optimizer, device())
    expected = rm.drained(_accumulating(plain, bare), _plain_batches(student, rank))

    wrapper = ExFMWrapper(student.factory(), tap=student.tap, terms=[DistillationTerm(weight=0.0)])
    trainee = rm.sharded(wrapper, world_size)
    pipeline = _accumulating(rm.pipeline_of(trainee), trainee)
    outputs = rm.drained(pipeline, rm.random_batches(student, rank, steps=6))
    rm.assert_same(outputs, expected)
    rm.assert_same(
        rm.snapshot(student_state_dict(trainee.model)), rm.snapshot(bare.model.state_dict())
    )


def _plain_batches(student: Student, rank: int) -> list[Any]:
    return rm.random_batches(student, rank, steps=6, supervised=False)


def _accumulating(pipeline: Any, trainee: rm.Trainee) -> Any:
    config = GradientAccumulationConfig(num_steps=2)
    return GradientAccumulationWrapper(pipeline, trainee.optimizer, trainee.model, config)


def check_adapter_while_accumulating(rank: int, world_size: int) -> None:
    """The adapter steps at every batch, whether or not the student's gradients accumulate."""
    weights = []
    for accumulate in (False, True):
        trainee, pipeline = _training(world_size)
        runner = _accumulating(pipeline, trainee) if accumulate else pipeline
        before = rm.snapshot(trainee.model.state_dict())
        assert len(rm.drained(runner, rm.parts(rank, world_size))) == 6
        assert rm.differs(rm.snapshot(trainee.model.state_dict()), before)
        weights.append(rm.snapshot(pipeline.adapter.state_dict()))
    rm.assert_same(*weights)


def check_evaluation_between_steps(rank: int, world_size: int) -> None:
    """Train, detach, evaluate plain batches in TorchRec's own pipeline, train on as before."""
    undisturbed, pipeline = _training(world_size)
    expected = rm.drained(pipeline, rm.parts(rank, world_size))

    trainee, pipeline = _training(world_size)
    batches = iter(rm.parts(rank, world_size))
    outputs = [[value.clone() for value in pipeline.progress(batches)] for _ in range(3)]
    model = pipeline.detach().eval()
    held_out = rm.parts(rank, world_size, seed=9)
    by_model = [_logits(model, batch.to(device())) for batch in held_out]
    by_pipeline = _evaluated_by_pipeline(trainee, held_out)
    rm.assert_same(by_pipeline, by_model)
    model.train()
    pipeline.attach(model)
    outputs += rm.drained(pipeline, batches)
    rm.assert_same(outputs, expected)
    rm.assert_same(
        rm.snapshot(trainee.model.state_dict()), rm.snapshot(undisturbed.model.state_dict())
    )


def _evaluated_by_pipeline(trainee: rm.Trainee, batches: list[Any]) -> list[Tensor]:
    evaluation = EvalPipelineSparseDist(trainee.model, trainee.optimizer, device())
    with torch.no_grad():
        outputs = rm.drained(evaluation, batches)
    evaluation.detach()
    return [logits for _, logits, _ in outputs]


def check_evaluation_in_the_pipeline(rank: int, world_size: int) -> None:
    """Batches that pass in evaluation mode leave no trace in the training."""
    batches = rm.parts(rank, world_size)
    trained_on = [*batches[:2], *batches[4:]]
    undisturbed, pipeline = _training(world_size)
    expected = rm.drained(pipeline, trained_on)

    trainee, pipeline = _training(world_size)
    iterator = iter(batches)
    outputs = []
    for step in range(len(batches)):
        trainee.model.train(step not in (2, 3))
        with torch.set_grad_enabled(trainee.model.training):
            output = [value.clone() for value in pipeline.progress(iterator)]
        outputs += [output] if trainee.model.training else []
    rm.assert_same(outputs, expected)
    rm.assert_same(
        rm.snapshot(trainee.model.state_dict()), rm.snapshot(undisturbed.model.state_dict())
    )


def check_sharded_student_is_refused(rank: int, world_size: int) -> None:
    """A wrapper around tables that are already sharded is refused."""
    student = students()["dlrm"]
    trainee = rm.sharded(student.factory(), world_size)
    with pytest.raises(ValueError, match="before DistributedModelParallel"):
        ExFMWrapper(trainee.model.module, tap=student.tap)
