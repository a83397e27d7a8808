"""Checks of other ways to train than the pipelines, each run by every rank of one or two.

Each compares with a run that other checks cover: a loop by hand, or ``TrainPipelineExFM``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import rank_checks as checks
import rank_models as rm
import torch
import torch.distributed as dist
from models import students
from rank_checks_pipelines import BASES, mixed
from rank_reference import ByHand
from ranks import device
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.gradient_accumulation import (
    GradientAccumulationConfig,
    GradientAccumulationWrapper,
)
from torchrec.distributed.types import ShardedModule, ShardingEnv
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_exfm import (
    DistillationTerm,
    ExFMSteps,
    ExFMWrapper,
    StudentAdapter,
    student_state_dict,
)
from torchrec_exfm.sources import as_source
from torchrec_exfm.steps import Feed, Steps
from torchrec_exfm.wrapper import find_wrapper

TERMS = checks.TERMS["margins"]  # heads, heads on the adapter's outputs, and margins


class Scaling(TrainPipelineSparseDist[Any, Any]):
    """A user's own pipeline for float16, with a gradient scaler."""

    scaler: torch.amp.GradScaler
    scales: list[float]

    def _backward(self, losses: Tensor) -> None:
        super()._backward(self.scaler.scale(losses))

    def _optimizer_step(self) -> None:
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())


class ScaledPipeline(ExFMSteps, Scaling):  # type: ignore[misc, type-arg]
    pass


def _trainee(world_size: int, sharding: str = "table_wise") -> rm.Trainee:
    return rm.sharded(rm.wrapped(terms=TERMS), world_size, sharding=sharding)


def _pipeline(
    trainee: rm.Trainee, base: str = "sparse_dist", kind: type[Any] | None = None, **options: Any
) -> Any:
    kind = mixed(BASES[base]) if kind is None else kind
    options = {"teacher": rm.informed, "adapter": rm.two_task_adapter(), **options}
    return kind(trainee.model, trainee.optimizer, device(), **options)


def _result(pipeline: Any, outputs: list[Any]) -> Any:
    """Return outputs, weights, and the adapter's weights."""
    adapter = [weight.detach().clone() for weight in pipeline.adapter.parameters()]
    return outputs, rm.snapshot(pipeline.model.state_dict()), adapter


def _run(pipeline: Any, batches: Iterable[Any]) -> Any:
    return _result(pipeline, rm.drained(pipeline, batches))


def _run_within(around: Callable[[], Any], pipeline: Any, batches: Sequence[Any]) -> Any:
    """As ``_run``, with each step inside ``around``; autocast keeps cast weights until it ends."""
    outputs, loader = [], iter(batches)
    for _ in batches:
        with around():
            outputs.append([value.clone() for value in pipeline.progress(loader)])
    return _result(pipeline, outputs)


def _autocast(dtype: torch.dtype) -> Any:
    return torch.autocast(device().type, dtype)


def check_autocast(rank: int, world_size: int, way: str) -> None:
    """Autocast around a step or the student equals a loop by hand, and differs from float32."""

    def around() -> Any:
        return _autocast(torch.bfloat16)

    trainee, batches = _trainee(world_size), rm.parts(rank, world_size)
    if way == "student":

        def forward(batch: Any) -> Any:
            with around():
                return trainee.model(batch)

        trained = _run(_pipeline(trainee, custom_model_fwd=forward), batches)
    else:
        trained = _run_within(around, _pipeline(trainee, way), batches)
    rm.assert_same(trained, checks.looped(rank, world_size, TERMS, around=around))
    without = checks.looped(rank, world_size, TERMS)
    assert rm.differs(trained[1], without[1])
    rm.assert_same(trained[2], without[2])  # the adapter computes in float32


def check_gradient_scaler(rank: int, world_size: int) -> None:
    """A gradient scaler in float16, whose scale grows until it skips a step, equals a loop.

    The tables are data-parallel: a fused optimizer takes the scaled gradients as they are.
    """

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device().type, init_scale=2.0**17, growth_interval=2)

    def around() -> Any:
        return _autocast(torch.float16)

    pipeline = _pipeline(_trainee(world_size, "data_parallel"), kind=ScaledPipeline)
    pipeline.scaler, pipeline.scales = scaler(), []
    trained = _run_within(around, pipeline, rm.parts(rank, world_size))
    expected = checks.looped(
        rank, world_size, TERMS, "data_parallel", around=around, scaler=scaler()
    )
    rm.assert_same(trained, expected)
    steps = list(itertools.pairwise(pipeline.scales))
    assert any(before > after for before, after in steps), pipeline.scales
    assert any(before < after for before, after in steps), pipeline.scales
    untrained = rm.snapshot(_trainee(world_size, "data_parallel").model.state_dict())
    assert rm.differs(trained[1], untrained)


def check_precision_settings_stay(rank: int, world_size: int) -> None:
    """The user's precision settings, such as TF32, stay as they are."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            allowed = [backend.allow_tf32 for backend in backends]
            _run(_pipeline(_trainee(world_size)), rm.parts(rank, world_size, steps=2))
            assert torch.get_float32_matmul_precision() == precision
            assert [backend.allow_tf32 for backend in backends] == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def check_compiled(rank: int, world_size: int, part: str, backend: str, base: str) -> None:
    """A compiled part that holds the tap trains equally to the bit, except for inductor's sums."""
    batches = rm.parts(rank, world_size)
    expected = _run(_pipeline(_trainee(world_size), base), batches)
    trainee, counter = _trainee(world_size), CompileCounterWithBackend(backend)
    _part(trainee.model, part).compile(backend=counter)
    compiled = _run(_pipeline(trainee, base), batches)
    assert counter.op_count
    if backend == "inductor":
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    else:
        rm.assert_same(compiled, expected)


def _part(model: nn.Module, part: str) -> nn.Module:
    wrapper = find_wrapper(model)
    return {
        "over": wrapper.student.get_submodule(rm.TAP),
        "student": wrapper.student,
        "heads": wrapper.auxiliary_head,
        "model": model,
    }[part]


def check_gradient_accumulation(rank: int, world_size: int, name: str) -> None:
    """With w = 0 as the plain student, with its gradients accumulated in the same way."""
    student, base = students()["dlrm"], BASES[name]
    bare = rm.sharded(student.factory(), world_size)
    plain = _accumulating(base(bare.model, bare.optimizer, device()), bare)
    expected = rm.drained(plain, rm.random_batches(student, rank, supervised=False))
    terms = [DistillationTerm(weight=0.0, adapted=True, serving=True, margin=0.5)]
    wrapper = ExFMWrapper(student.factory(), tap=student.tap, terms=terms)
    trainee = rm.sharded(wrapper, world_size)
    pipeline = mixed(base)(trainee.model, trainee.optimizer, device(), adapter=StudentAdapter())
    outputs = rm.drained(_accumulating(pipeline, trainee), rm.random_batches(student, rank))
    rm.assert_same(outputs, expected)
    trained = rm.snapshot(student_state_dict(trainee.model))
    rm.assert_same(trained, rm.snapshot(bare.model.state_dict()))


def _accumulating(pipeline: Any, trainee: rm.Trainee) -> Any:
    config = GradientAccumulationConfig(num_steps=2)
    return GradientAccumulationWrapper(pipeline, trainee.optimizer, trainee.model, config)


def check_evaluation_between_steps(rank: int, world_size: int, name: str) -> None:
    """TorchRec's evaluation of plain batches between two epochs leaves nothing in the training."""
    epochs = rm.parts(rank, world_size)[:3], rm.parts(rank, world_size)[3:]
    results = []
    for evaluated in (False, True):
        trainee = _trainee(world_size)
        pipeline = _pipeline(trainee, name)
        outputs = rm.drained(pipeline, epochs[0])
        if evaluated:
            _evaluate(pipeline, trainee, rm.parts(rank, world_size, seed=9))
        pipeline.reset()
        results.append(_result(pipeline, outputs + rm.drained(pipeline, epochs[1])))
        assert len(results[-1][0]) == 6
    rm.assert_same(*results)


def _evaluate(pipeline: Any, trainee: rm.Trainee, batches: list[Any]) -> None:
    attached = hasattr(pipeline, "detach")  # TrainPipelineBase has nothing to detach
    model = (pipeline.detach() if attached else trainee.model).eval()
    evaluation = EvalPipelineSparseDist(trainee.model, trainee.optimizer, device())
    with torch.no_grad():
        by_pipeline = [logits for _, logits, _ in rm.drained(evaluation, batches)]
        evaluation.detach()
        by_model = [model(batch.to(device()))[1][1] for batch in batches]
    rm.assert_same(by_pipeline, by_model)
    model.train()
    if attached:
        pipeline.attach(model)


def check_loaders_in_turns(rank: int, world_size: int, name: str) -> None:
    """Steps of two loaders in turns equal one loader of the same batches in that order."""
    batches: list[Any] = []
    loaders = [_recorded(rm.parts(rank, world_size, seed=seed), batches) for seed in (0, 9)]
    in_turns = _stepped(_pipeline(_trainee(world_size), name), loaders * 2)
    loader = iter(list(batches))
    rm.assert_same(in_turns, _stepped(_pipeline(_trainee(world_size), name), [loader] * 4))


def _stepped(pipeline: Any, loaders: Sequence[Iterator[Any]]) -> Any:
    """Take a step of each loader."""
    outputs = [[value.clone() for value in pipeline.progress(loader)] for loader in loaders]
    return _result(pipeline, outputs)


def _recorded(batches: Iterable[Any], record: list[Any]) -> Iterator[Any]:
    for batch in batches:
        record.append(batch)
        yield batch


def check_batch_sizes_by_feature(rank: int, world_size: int) -> None:
    """Features with repeated bags left out (VBE): the same sums, in the tables' own order."""
    batches = rm.parts(rank, world_size)
    expected = _run(_pipeline(_trainee(world_size)), batches)
    fewer = [
        rm.Columns(**(batch.columns | {"sparse_features": _distinct(batch.sparse_features)}))
        for batch in batches
    ]
    assert all(batch.sparse_features.variable_stride_per_key() for batch in fewer)
    actual = _run(_pipeline(_trainee(world_size)), fewer)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def _distinct(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return the features with each distinct bag once, and inverse indices."""
    distinct: list[list[tuple[int, ...]]] = []
    places = []
    for key in features.keys():  # noqa: SIM118  # it is no mapping
        bags = [tuple(bag.tolist()) for bag in features[key].to_dense()]
        distinct.append(list(dict.fromkeys(bags)))
        places.append([distinct[-1].index(bag) for bag in bags])
    bags = list(itertools.chain(*distinct))
    return KeyedJaggedTensor(
        features.keys(),
        torch.tensor(list(itertools.chain(*bags))),
        lengths=torch.tensor([len(bag) for bag in bags]),
        stride_per_key_per_rank=[[len(positions)] for positions in distinct],
        inverse_indices=(features.keys(), torch.tensor(places)),
    )


def check_a_loop_of_ones_own(rank: int, world_size: int) -> None:
    """Feed and Steps work in a loop without a pipeline as under StagedTrainPipeline."""
    batches = rm.parts(rank, world_size)
    expected = _run(_pipeline(_trainee(world_size)), batches)

    trainee, adapter = _trainee(world_size), rm.two_task_adapter().to(device())
    steps = Steps(
        find_wrapper(trainee.model).auxiliary_head,
        as_source(rm.informed),
        adapter,
        torch.optim.Adam(adapter.parameters(), lr=1e-2, fused=True),
        labels=lambda batch: batch.labels,
        weights=None,
        groups=None,
        candidates=None,
        group=dist.group.WORLD if world_size > 1 else None,
        device=device(),
    )
    outputs = []
    for batch in Feed(iter(batches), steps):
        trainee.optimizer.zero_grad()
        loss, output = trainee.model(batch.to(device()))
        loss.backward()
        trainee.optimizer.step()
        steps.finish()
        outputs.append([value.clone() for value in output])
    weights = [weight.detach() for weight in adapter.parameters()]
    rm.assert_same((outputs, rm.snapshot(trainee.model.state_dict()), weights), expected)


class PaddedTrain(rm.LabelledTrain):
    """A loss with a fixed denominator: that of a batch without examples is 0."""

    size = rm.GLOBAL_SIZE

    def forward(self, batch: Any) -> Any:
        logits = self.model(batch.dense_features, batch.sparse_features)
        loss = self.loss_fn.forward(logits, batch.labels).sum() / self.size
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


def _padded_student(size: int) -> nn.Module:
    student = rm.labelled_student()
    student.__class__, student.size = PaddedTrain, size  # type: ignore[assignment]
    return student


def check_batches_without_examples(rank: int, world_size: int, name: str) -> None:
    """A rank that pads with empty batches trains like one process on the examples that exist."""
    data, adapter = rm.global_data(), rm.two_task_adapter()
    wrapper = rm.wrapped(_padded_student(rm.GLOBAL_SIZE), terms=TERMS)
    reference = ByHand(wrapper, adapter, torch.optim.SGD, adapter_lr=0.1, lr=0.2)
    batches = [rm.part_of(batch, rank, world_size) for batch in data]
    for step, batch in enumerate(data):
        if step < 4:
            reference.step(batch)
        else:
            reference.step(rm.part_of(batch, 0, world_size))
            batches[step] = batches[step] if rank == 0 else _empty(batch)
    student = _padded_student(rm.GLOBAL_SIZE // world_size)
    trainee = rm.sharded(rm.wrapped(student, terms=TERMS), world_size)
    sgd = torch.optim.SGD(adapter.parameters(), lr=0.1)
    pipeline = _pipeline(trainee, name, adapter=adapter, adapter_optimizer=sgd)
    outputs = rm.drained(pipeline, batches)
    assert [len(output[1]) for output in outputs[4:]] == [8 * (rank == 0)] * 2
    state = {f"adapter.{key}": value for key, value in adapter.state_dict().items()}
    rm.assert_near_whole(state | trainee.model.state_dict(), reference.weights())


def _empty(batch: rm.Columns) -> rm.Columns:
    keys, nothing = batch.sparse_features.keys(), torch.zeros(0, dtype=torch.long)
    columns = {name: part[:0] for name, part in batch.columns.items() if name != "sparse_features"}
    return rm.Columns(sparse_features=KeyedJaggedTensor(keys, nothing, lengths=nothing), **columns)


def check_uneven_batches_end(rank: int, world_size: int, is_exfm: bool) -> None:
    """A rank with one batch more waits for the group's timeout, with and without the mixin."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    in_group = functools.partial(
        DistributedModelParallel, env=ShardingEnv.from_process_group(group)
    )
    with mock.patch.object(rm, "DistributedModelParallel", in_group):
        trainee = rm.sharded(rm.wrapped() if is_exfm else rm.two_task_student(), world_size)
    base, options = BASES["base"], {"teacher": rm.logged} if is_exfm else {}
    kind = mixed(base) if is_exfm else base
    pipeline = kind(trainee.model, trainee.optimizer, device(), **options)
    batches = iter(rm.parts(rank, world_size)[: 3 if rank == 0 else 2])
    for _ in range(2):
        pipeline.progress(batches)
    with pytest.raises(RuntimeError if rank == 0 else StopIteration, match=r"Timed out|^$"):
        pipeline.progress(batches)
    dist.barrier()


def check_fsdp(rank: int, world_size: int, way: str) -> None:
    """FSDP2 for the dense part trains as DDP does, up to the order of averaging."""
    expected = _run(_pipeline(_trainee(world_size)), rm.parts(rank, world_size))
    pipeline = _pipeline(_fully_sharded(way, world_size))
    outputs, _, adapter = _run(pipeline, rm.parts(rank, world_size))
    weights = {
        key: [value.full_tensor()] if isinstance(value, DTensor) else rm.snapshot({key: value})[key]
        for key, value in pipeline.model.state_dict().items()
    }
    assert any(isinstance(value, DTensor) for value in pipeline.model.state_dict().values())
    torch.testing.assert_close((outputs, weights, adapter), expected, rtol=1e-6, atol=1e-6)


def _fully_sharded(way: str, world_size: int) -> rm.Trainee:
    without_ddp = functools.partial(DistributedModelParallel, init_data_parallel=False)
    with mock.patch.object(rm, "DistributedModelParallel", without_ddp):
        model = rm.sharded(rm.wrapped(terms=TERMS), world_size).model
    wrapper = find_wrapper(model)
    mesh = init_device_mesh(device().type, (world_size,))
    if way == "hybrid":
        mesh = init_device_mesh(device().type, (1, world_size), mesh_dim_names=("between", "in"))
    if way == "whole":
        sharded = [module for module in model.modules() if isinstance(module, ShardedModule)]
        tables = {parameter for module in sharded for parameter in module.parameters()}
        fully_shard(wrapper, mesh=mesh, ignored_params=tables)
    else:
        dense = wrapper.student.model.dense_arch, wrapper.student.model.over_arch, wrapper.exfm
        for module in dense:
            fully_shard(module, mesh=mesh)
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = KeyedOptimizerWrapper(parameters, lambda these: torch.optim.SGD(these, lr=0.2))
    return rm.Trainee(model, optimizer)
