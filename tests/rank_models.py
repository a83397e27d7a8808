"""Helpers of the checks on ranks: sharded models, global data split by rank, comparisons.

The data of a step does not depend on the number of ranks: GLOBAL_SIZE examples, split into equal
consecutive parts, one per rank.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import ranking_reference
import torch
import torch.distributed as dist
from models import NUM_DENSE, NUM_TABLES, Student, make_teacher, tables
from ranks import device
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

from torchrec_exfm import (
    DistillationTerm,
    ExFMBatch,
    ExFMWrapper,
    StudentAdapter,
    Task,
    TeacherOutputs,
    TrainPipelineExFM,
)
from torchrec_exfm.losses import listwise, pairwise

GLOBAL_SIZE = 16
ALIGNMENT = 64  # bytes, of what torch allocates on the CPU
ROWS = 21  # odd: row-wise shards of two ranks differ in size
DIM = 8  # two column-wise shards of 4, the smallest
TAP = "model.over_arch"
TEACHERS = ("a", "b")
TASKS = (Task(name="click"), Task(name="stay", regression=True))
HEADS = (
    DistillationTerm(teacher="a", alpha=1.5, beta=2.0, weight=0.7, hidden=(6,)),
    DistillationTerm(teacher="b", tasks=("click",), hidden=()),
)
ADAPTED = (DistillationTerm(teacher="a", adapted=True, beta=0.5, hidden=(4,)),)
SERVING = (
    DistillationTerm(teacher="a", adapted=True, serving=True, weight=0.6),
    DistillationTerm(teacher="b", tasks=("click",), serving=True, alpha=1.2),
)
MARGINS = (  # wide enough that an informed teacher has only a part of its weight
    DistillationTerm(teacher="a", adapted=True, serving=True, weight=0.6, margin=1.5),
    DistillationTerm(
        teacher="b", tasks=("click",), serving=True, weight=3.0, alpha=1.2, margin=0.9
    ),
)
PAIRS, FEW_PAIRS, LISTS = pairwise(), pairwise(max_neighbours=1), listwise(calibrated=True)
BY_HAND = {
    PAIRS: ranking_reference.pairwise,
    FEW_PAIRS: partial(ranking_reference.pairwise, max_neighbours=1),
    LISTS: partial(ranking_reference.listwise, calibrated=True),
}
RANKING = (
    DistillationTerm(teacher="a", loss=PAIRS, beta=2.0, weight=0.7, hidden=(6,)),
    DistillationTerm(teacher="b", tasks=("click",), loss=LISTS, weight=0.5, hidden=(4,)),
    DistillationTerm(teacher="a", tasks=("click",), loss=LISTS, serving=True, margin=1.5),
    DistillationTerm(teacher="a", adapted=True, loss=FEW_PAIRS, hidden=()),
)
SHARDINGS = ("table_wise", "row_wise", "column_wise", "data_parallel", "mixed")


class Columns(Pipelineable):
    """A user's own batch, with teacher outputs as columns."""

    def __init__(self, **columns: Any) -> None:
        self.columns = columns

    def __getattr__(self, name: str) -> Any:
        if name == "columns" or name not in self.columns:
            raise AttributeError(name)
        return self.columns[name]

    def to(self, device: torch.device, non_blocking: bool = False, **_: Any) -> Columns:
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Columns:
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self.columns.values():
            part.record_stream(stream)

    def _map(self, function: Callable[[Any], Any]) -> Columns:
        return Columns(**{name: function(part) for name, part in self.columns.items()})


def logged(batch: Columns) -> TeacherOutputs:
    """Return the teacher outputs in a batch's columns."""
    return TeacherOutputs(batch.values, batch.presence, batch.age_seconds)


def informed(batch: Columns) -> TeacherOutputs:
    """Return outputs of teachers that lead both the logged ones and the student."""
    labels = batch.labels.nan_to_num(0.5)
    truth = torch.stack([labels[:, 0].logit(eps=0.1), labels[:, 1]], dim=1)
    values = truth.unsqueeze(1) + 0.1 * batch.values
    return TeacherOutputs(values, batch.presence, batch.age_seconds)


def teacher_for(terms: Sequence[DistillationTerm]) -> Callable[[Columns], TeacherOutputs]:
    """Return a source of outputs: of teachers that lead, if some term has a margin."""
    return informed if any(term.margin for term in terms) else logged


def lopsided(step: int, generator: torch.Generator) -> Tensor:
    """Return presence (G, M, T) that differs between the halves of the data, hence two ranks."""
    present = torch.rand(GLOBAL_SIZE, len(TEACHERS), len(TASKS), generator=generator) < 0.7
    half = GLOBAL_SIZE // 2
    if step % 3 == 0:
        present[half:] = False
    if step % 3 == 1:
        present[:half, 1] = False
        present[half:, :, 1] = True
    if step % 3 == 2:
        present[:, 1] = False
    return present


def global_data(steps: int = 6, seed: int = 0) -> list[Columns]:
    """Return batches of GLOBAL_SIZE examples: two teachers, two tasks, lopsided presence."""
    generator = torch.Generator().manual_seed(seed)
    return [_examples(step, generator) for step in range(steps)]


def _examples(step: int, generator: torch.Generator) -> Columns:
    size = GLOBAL_SIZE
    presence = lopsided(step, generator)
    values = 2 * torch.randn(size, len(TEACHERS), len(TASKS), generator=generator)
    requests = torch.tensor([7, -2, 7, 2**40, 5, -2, 7, 5]).roll(step)
    lengths = torch.randint(0, 4, (NUM_TABLES * size,), generator=generator)
    ids = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return Columns(
        # Each group is in one half of the data, so on one of two ranks
        groups=torch.cat([requests, requests + 1]),
        dense_features=torch.randn(size, NUM_DENSE, generator=generator),
        sparse_features=_features(ids, lengths),
        labels=torch.rand(size, len(TASKS), generator=generator).round(decimals=1),
        values=values.masked_fill(~presence, float("nan")),
        presence=presence,
        age_seconds=100 * torch.rand(size, len(TEACHERS), generator=generator),
    )


def _features(values: Tensor, lengths: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor([f"f{i}" for i in range(NUM_TABLES)], values, lengths=lengths)


def part_of(data: Columns, rank: int, world_size: int) -> Columns:
    """Return a rank's part of a global batch."""
    size = GLOBAL_SIZE // world_size
    rows = slice(rank * size, (rank + 1) * size)
    features = data.sparse_features
    wanted = torch.zeros(NUM_TABLES, GLOBAL_SIZE, dtype=torch.bool)
    wanted[:, rows] = True
    lengths = features.lengths()
    ids = features.values()[wanted.flatten().repeat_interleave(lengths)]
    columns = {
        name: part[rows].clone() for name, part in data.columns.items() if name != "sparse_features"
    }
    features = _features(ids, lengths[wanted.flatten()])
    return where_torch_allocates(sparse_features=features, **columns)


def where_torch_allocates(**columns: Any) -> Columns:
    """Return a batch of aligned tensors: other alignments could change the bits of a product."""
    for part in columns.values():
        parts = [part] if isinstance(part, Tensor) else [part.values(), part.lengths()]
        assert not any(tensor.data_ptr() % ALIGNMENT for tensor in parts)
    return Columns(**columns)


def parts(rank: int, world_size: int, steps: int = 6, seed: int = 0) -> list[Columns]:
    """Return the batches of a rank."""
    return [part_of(data, rank, world_size) for data in global_data(steps, seed)]


def lacking(data: Sequence[Columns], case: str) -> list[Columns]:
    """Return the batches with missing labels, or with weights (some 0), as ``case`` says."""
    generator, half = torch.Generator().manual_seed(7), GLOBAL_SIZE // 2
    batches = []
    for step, batch in enumerate(data):
        labels, shape = batch.labels.clone(), batch.labels.shape
        some = torch.rand(shape, generator=generator) < 0.4
        missing = {
            "one task": some & torch.tensor([True, False]),
            "both tasks": some,
            "whole batches": torch.full(shape, step % 2 == 0),
            "one rank": torch.arange(GLOBAL_SIZE).unsqueeze(1).expand(shape) < half,
            "weights": torch.zeros_like(some),
            "labels and weights": some,
        }[case]
        columns = {"labels": labels.masked_fill(missing, float("nan"))}
        if "weights" in case:
            columns["weights"] = torch.randint(0, 4, shape, generator=generator) / 2
        batches.append(Columns(**(batch.columns | columns)))
    return batches


class LabelledTrain(DLRMTrain):
    """A DLRMTrain whose loss masks missing labels and divides by the number of all."""

    def forward(self, batch: Any) -> Any:
        logits = self.model(batch.dense_features, batch.sparse_features)
        labels = batch.labels.nan_to_num(0.0)
        losses = self.loss_fn.forward(logits, labels)
        loss = torch.where(batch.labels.isnan(), 0.0, losses).mean()
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


def labelled_student(seed: int = 0) -> LabelledTrain:
    torch.manual_seed(seed)
    student = LabelledTrain(DLRM(tables(rows=ROWS, dim=DIM), NUM_DENSE, [6, DIM], [5, len(TASKS)]))
    student.loss_fn = nn.BCEWithLogitsLoss(reduction="none")
    return student


def two_task_student(seed: int = 0) -> DLRMTrain:
    torch.manual_seed(seed)
    return DLRMTrain(DLRM(tables(rows=ROWS, dim=DIM), NUM_DENSE, [6, DIM], [5, len(TASKS)]))


def wrapped(
    student: nn.Module | None = None,
    *,
    terms: Sequence[DistillationTerm] = HEADS,
    teachers: Sequence[str] = TEACHERS,
    tasks: Sequence[Task] = TASKS,
    tap: str = TAP,
    seed: int = 1,
) -> ExFMWrapper:
    student = two_task_student() if student is None else student
    torch.manual_seed(seed)
    return ExFMWrapper(student, tap=tap, terms=terms, teachers=teachers, tasks=tasks)


def two_task_adapter(seed: int = 2) -> StudentAdapter:
    torch.manual_seed(seed)
    return StudentAdapter(num_teachers=len(TEACHERS), tasks=TASKS, hidden=(5,))


class Trainee(NamedTuple):
    """A sharded model and the optimizer of its dense parameters."""

    model: DistributedModelParallel
    optimizer: KeyedOptimizerWrapper


def sharded(
    module: nn.Module,
    world_size: int,
    *,
    sharding: str = "table_wise",
    fused: type[torch.optim.Optimizer] = torch.optim.SGD,
    dense: type[torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> Trainee:
    """Return the module under DMP, with the weights that it had on the CPU, on every rank.

    Both optimizers get the options; the dense one updates data-parallel tables.
    """
    options = options or {"lr": 0.2}
    weights = copy.deepcopy(module.state_dict())
    path, collection = next(
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, EmbeddingBagCollection)
    )
    apply_optimizer_in_backward(fused, collection.parameters(), dict(options))
    plan = construct_module_sharding_plan(
        collection,
        {f"t{i}": _placement(sharding, i, world_size) for i in range(NUM_TABLES)},
        local_size=world_size,
        world_size=world_size,
        device_type=device().type,
    )
    model = DistributedModelParallel(module, device=device(), plan=ShardingPlan({path: plan}))
    load_weights(model.state_dict(), weights)
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    return Trainee(
        model, KeyedOptimizerWrapper(parameters, lambda trained: dense(trained, **options))
    )


def _placement(sharding: str, table: int, world_size: int) -> Any:
    if sharding == "mixed":
        sharding = ("row_wise", "column_wise", "data_parallel")[table]
    every_rank = list(range(world_size))
    return {
        "table_wise": lambda: table_wise(rank=table % world_size),
        "row_wise": row_wise,
        "column_wise": lambda: column_wise(ranks=every_rank),
        "data_parallel": data_parallel,
    }[sharding]()


def load_weights(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Fill a state, sharded or not, from unsharded tensors of the same keys."""
    assert state.keys() == weights.keys(), state.keys() ^ weights.keys()
    with torch.no_grad():
        for key, value in state.items():
            for tensor, index in _pieces(value):
                tensor.copy_(weights[key][index])


def _pieces(value: Tensor | ShardedTensor) -> list[tuple[Tensor, Any]]:
    """Return this rank's parts of a tensor, with their indices in the unsharded tensor."""
    if not isinstance(value, ShardedTensor):
        return [(value, ...)]
    pieces: list[tuple[Tensor, Any]] = []
    for shard in value.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        pieces.append((shard.tensor, (slice(row, row + rows), slice(column, column + columns))))
    return pieces


def snapshot(state: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Return a copy of this rank's part of a state."""
    return {
        key: [tensor.detach().clone() for tensor, _ in _pieces(value)]
        for key, value in state.items()
    }


def drained(pipeline: TrainPipelineSparseDist[Any, Any], batches: Iterable[Any]) -> list[Any]:
    """Return copies of everything that ``progress`` returns until the batches end."""
    iterator = iter(batches)
    outputs = []
    while True:
        try:
            outputs.append([value.clone() for value in pipeline.progress(iterator)])
        except StopIteration:
            return outputs


def pipeline_of(trainee: Trainee, **options: Any) -> TrainPipelineExFM:
    return TrainPipelineExFM(trainee.model, trainee.optimizer, device(), **options)


def assert_same(actual: Any, expected: Any) -> None:
    """Require equal bits on the CPU; on CUDA, where sums have no fixed order, near values."""
    if device().type == "cpu":
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def differs(actual: Mapping[str, list[Tensor]], expected: Mapping[str, list[Tensor]]) -> bool:
    """Return whether some tensor of two snapshots differs on some rank."""
    different = any(
        not torch.equal(tensor, other)
        for key in expected
        for tensor, other in zip(actual[key], expected[key], strict=True)
    )
    flag = torch.tensor(float(different), device=device())
    dist.all_reduce(flag)
    return bool(flag)


def on_every_rank(tensor: Tensor) -> list[Tensor]:
    """Return every rank's tensor."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.detach().contiguous())
    return gathered


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """Make a temporary folder that all ranks share."""
    name = [tempfile.mkdtemp(prefix="ranks-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    assert name[0] is not None
    try:
        yield name[0]
        dist.barrier()
    finally:
        shutil.rmtree(name[0], ignore_errors=True)


def random_batches(
    student: Student, rank: int, *, steps: int = 5, supervised: bool = True
) -> list[Any]:
    """Return a rank's batches for a student of one task, with half of the outputs missing."""
    batches = []
    for step in range(steps):
        seed = 100 * step + rank
        batch = student.make_batch(seed)
        batches.append(ExFMBatch(batch, make_teacher(seed, missing=0.5)) if supervised else batch)
    return batches


def assert_near_whole(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Require this rank's part of a state to equal unsharded float64 tensors, to six digits."""
    assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
    for key, value in state.items():
        for tensor, index in _pieces(value):
            torch.testing.assert_close(
                tensor.double().cpu(),
                expected[key][index],
                rtol=_near(),
                atol=_near(),
                msg=lambda message, key=key: f"{key}: {message}",
            )


def _near() -> float:
    return 1e-6 if device().type == "cpu" else 1e-5


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Require equality to six digits, for the same sums in another order."""
    torch.testing.assert_close(list(actual), list(expected), rtol=_near(), atol=_near())
