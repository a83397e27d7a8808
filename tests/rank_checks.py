"""Checks of training under DistributedModelParallel, each run by every rank of one or two."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import rank_models as rm
import torch
import torch.distributed as dist
from costs import Costs
from models import students
from rank_reference import ByHand
from ranks import device
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_exfm import (
    DistillationTerm,
    ExFMBatch,
    ExFMWrapper,
    LiveTeacher,
    NotPipelinedWarning,
    StudentAdapter,
    TeacherOutputs,
    TrainPipelineExFM,
    adapter_step,
    student_state_dict,
)
from torchrec_exfm.batch import StepInputs
from torchrec_exfm.wrapper import find_wrapper

BOTH = (*rm.HEADS, *rm.ADAPTED)
TERMS = {
    "heads": rm.HEADS,
    "adapted": BOTH,
    "serving": (rm.SERVING[0], *BOTH, rm.SERVING[1]),
    "serving_alone": rm.SERVING[:1],
    "margins": (rm.MARGINS[0], *BOTH, rm.MARGINS[1]),
    "margin_without_adapter": rm.MARGINS[1:],
    "ranking": rm.RANKING,
}


def check_weight_zero_is_plain(
    rank: int, world_size: int, name: str, adapted: bool, ranking: bool = False
) -> None:
    """With w = 0 the student trains as if there were no teacher, to the bit."""
    terms = [DistillationTerm(weight=0.0), DistillationTerm(weight=0.0, adapted=True)]
    terms = terms[: 1 + adapted]
    if ranking:
        terms += [DistillationTerm(weight=0.0, loss=rm.PAIRS)]
        terms += [DistillationTerm(weight=0.0, loss=rm.LISTS, serving=True)]
    pipelines = (TrainPipelineSparseDist, TrainPipelineExFM)
    assert_weight_zero_is_plain(rank, world_size, name, terms, *pipelines)


def assert_weight_zero_is_plain(
    rank: int,
    world_size: int,
    name: str,
    terms: Sequence[DistillationTerm],
    plain_type: type[Any],
    exfm_type: type[Any],
) -> None:
    """Require a student in a plain pipeline to equal one with teachers and terms of weight 0."""
    student = students()[name]
    bare = rm.sharded(student.factory(), world_size, fused=torch.optim.Adagrad)
    plain = plain_type(bare.model, bare.optimizer, device())
    expected = rm.drained(plain, rm.random_batches(student, rank, supervised=False))

    wrapper = ExFMWrapper(student.factory(), tap=student.tap, terms=terms)
    trainee = rm.sharded(wrapper, world_size, fused=torch.optim.Adagrad)
    options: dict[str, Any] = {"groups": _threes}
    if any(term.adapted for term in terms):
        options |= {"adapter": StudentAdapter(), "labels": _labels}
    pipeline = exfm_type(trainee.model, trainee.optimizer, device(), **options)
    outputs = rm.drained(pipeline, rm.random_batches(student, rank))

    assert len(outputs) == 5
    rm.assert_same(outputs, expected)
    trained = rm.snapshot(student_state_dict(trainee.model))
    rm.assert_same(trained, rm.snapshot(bare.model.state_dict()))
    assert rm.differs(trained, _fresh(student.factory(), world_size))


def _threes(batch: Any) -> Tensor:
    labels = _labels(batch)
    return torch.arange(len(labels), device=labels.device) // 3


def _labels(batch: Any) -> Tensor:
    labels: Tensor = batch.clicked if hasattr(batch, "clicked") else batch.labels
    return labels


def _fresh(module: nn.Module, world_size: int) -> dict[str, list[Tensor]]:
    return rm.snapshot(rm.sharded(module, world_size).model.state_dict())


def check_pipelined_equals_plain(rank: int, world_size: int, kind: str, sharding: str) -> None:
    """The same outputs and weights from the pipeline and from a loop written by hand."""
    terms = TERMS[kind]
    runs = [
        _pipelined(rank, world_size, terms, sharding, trace=True),
        _pipelined(rank, world_size, terms, sharding, trace=False),
        looped(rank, world_size, terms, sharding),
    ]
    for run in runs[1:]:
        rm.assert_same(run, runs[0])


def _adapter_of(terms: Sequence[DistillationTerm]) -> StudentAdapter | None:
    return rm.two_task_adapter() if any(term.adapted for term in terms) else None


def _pipelined(
    rank: int,
    world_size: int,
    terms: Sequence[DistillationTerm] = BOTH,
    sharding: str = "table_wise",
    *,
    trace: bool = True,
    **options: Any,
) -> Any:
    """Train in the pipeline; return outputs, weights, and the adapter's weights."""
    trainee = rm.sharded(rm.wrapped(terms=terms), world_size, sharding=sharding)
    options = {"teacher": rm.teacher_for(terms), "adapter": _adapter_of(terms), **options}
    options["groups"] = lambda batch: batch.groups
    pipeline = rm.pipeline_of(trainee, trace=trace, **options)
    outputs = rm.drained(pipeline, rm.parts(rank, world_size))
    assert len(outputs) == 6
    assert len(pipeline._pipelined_modules) == trace
    return outputs, rm.snapshot(trainee.model.state_dict()), _weights(pipeline.adapter)


def _weights(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else [value.detach().clone() for value in module.parameters()]


def looped(
    rank: int,
    world_size: int,
    terms: Sequence[DistillationTerm],
    sharding: str = "table_wise",
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Any:
    """As ``_pipelined``, in a plain loop, with the counts over all ranks from the global data.

    The student's forward runs ``around``, as under autocast; a scaler scales the loss.
    """
    trainee = rm.sharded(rm.wrapped(terms=terms), world_size, sharding=sharding)
    adapter = _adapter_of(terms)
    adapter = None if adapter is None else adapter.to(device())
    adam = torch.optim.Adam(adapter.parameters(), lr=1e-2, fused=True) if adapter else None
    head = find_wrapper(trainee.model).auxiliary_head
    outputs = []
    for data in rm.global_data():
        part = rm.part_of(data, rank, world_size)
        batch = ExFMBatch(part, rm.teacher_for(terms)(part)).to(device())
        count = (data.presence.sum(0).float() / world_size).to(device())
        labels, adapted = batch.batch.labels, None
        if adapter is not None and adam is not None:
            step = (adapter, adam, batch.teacher, labels)
            adapted = adapter_step(*step, count=count, group=_group(world_size))
        counts = torch.stack([count, count])
        batch.step_inputs = StepInputs(
            batch.teacher, labels, None, counts, adapted, batch.batch.groups
        )
        trainee.optimizer.zero_grad()
        with around():
            loss, output = trainee.model(batch)
        for means in head.lead_losses:
            means.copy_(torch.stack(rm.on_every_rank(means)).mean(0))
        if scaler is None:
            loss.backward()
            trainee.optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(trainee.optimizer)
            scaler.update()
        outputs.append([value.clone() for value in output])
    return outputs, rm.snapshot(trainee.model.state_dict()), _weights(adapter)


def _group(world_size: int) -> dist.ProcessGroup | None:
    return dist.group.WORLD if world_size > 1 else None


def check_ranks_agree_with_one(
    rank: int, world_size: int, sharding: str, optimizer: str, kind: str
) -> None:
    """Ranks with very different presence train like one process on all data."""
    rule = getattr(torch.optim, optimizer)
    options = {"lr": 0.2} if optimizer == "SGD" else {"lr": 0.05, "eps": 1e-3}
    data = rm.global_data()
    _agree(rank, world_size, kind, data, rm.two_task_student, sharding, rule, **options)


def check_labels_and_weights(rank: int, world_size: int, case: str, kind: str) -> None:
    """Missing labels and weights train like one process on all data without those examples."""
    data = rm.lacking(rm.global_data(), case)
    weights = (lambda batch: batch.weights) if "weights" in case else None
    outputs = _agree(rank, world_size, kind, data, rm.labelled_student, weights=weights, lr=0.2)
    assert len(outputs) == len(data) and all(output[0].isfinite() for output in outputs)


def _agree(
    rank: int,
    world_size: int,
    kind: str,
    data: Sequence[rm.Columns],
    student: Callable[[], nn.Module],
    sharding: str = "table_wise",
    rule: type[torch.optim.Optimizer] = torch.optim.SGD,
    weights: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> list[Any]:
    """Compare training on all ranks with training by hand; return the pipeline's outputs."""
    terms = TERMS[kind]
    adapter = _adapter_of(terms)
    wrapper = rm.wrapped(student(), terms=terms)
    reference = ByHand(wrapper, adapter, rule, adapter_lr=0.1, **options)
    for batch in data:
        reference.step(batch)

    wrapper = rm.wrapped(student(), terms=terms)
    trainee = rm.sharded(wrapper, world_size, sharding=sharding, fused=rule, dense=rule, **options)
    teacher = rm.teacher_for(terms)
    pipeline = rm.pipeline_of(
        trainee,
        teacher=teacher,
        adapter=adapter,
        weights=weights,
        groups=lambda batch: batch.groups,
        **_sgd(adapter),
    )
    outputs = rm.drained(pipeline, [rm.part_of(batch, rank, world_size) for batch in data])

    _check_leads(find_wrapper(trainee.model), reference, world_size)
    state = {f"adapter.{k}": v for k, v in adapter.state_dict().items()} if adapter else {}
    rm.assert_near_whole(state | trainee.model.state_dict(), reference.weights())
    return outputs


def check_nothing_to_learn_moves_no_adapter(rank: int, world_size: int, fused: bool) -> None:
    """A step without labels on any rank leaves the adapter alone, even its optimizer's momentum."""
    data = rm.global_data(steps=4)
    nothing = torch.full_like(data[2].labels, float("nan"))
    data[2] = rm.Columns(**(data[2].columns | {"labels": nothing}))
    adapter = rm.two_task_adapter()
    trainee = rm.sharded(rm.wrapped(rm.labelled_student(), terms=BOTH), world_size)
    adam = torch.optim.Adam(adapter.parameters(), lr=0.1, fused=fused)
    pipeline = rm.pipeline_of(trainee, teacher=rm.logged, adapter=adapter, adapter_optimizer=adam)
    batches = iter([rm.part_of(batch, rank, world_size) for batch in data])
    moved = []
    for _ in data:
        before = _weights(adapter)
        pipeline.progress(batches)
        pairs = zip(_weights(adapter), before, strict=True)
        moved.append(any(not torch.equal(*pair) for pair in pairs))
    assert moved == [True, True, False, True]
    assert {int(state["step"]) for state in adam.state.values()} == {3}


def _check_leads(wrapper: ExFMWrapper, reference: ByHand, world_size: int) -> None:
    """With margins: every rank has the same means, and they made a difference."""
    for means in wrapper.auxiliary_head.lead_losses:
        rm.assert_same(rm.on_every_rank(means), [means] * world_size)
        assert sum(0 < lead < 1 for lead in reference.leads) >= 4, reference.leads


def _sgd(adapter: StudentAdapter | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    return {"adapter_optimizer": torch.optim.SGD(adapter.parameters(), lr=0.1)}


class ShiftedDLRM(DLRM):
    """Changes the ids on their way to the tables."""

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        shifted = KeyedJaggedTensor(
            keys=sparse_features.keys(),
            values=(sparse_features.values() + 1) % rm.ROWS,
            lengths=sparse_features.lengths(),
        )
        logits: Tensor = super().forward(dense_features, shifted)
        return logits


class BranchingDLRM(DLRM):
    """Its forward depends on the values of a tensor."""

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        if dense_features.sum() > 0:
            dense_features = dense_features + 1
        logits: Tensor = super().forward(dense_features, sparse_features)
        return logits


def _dlrm_of(kind: type[DLRM]) -> DLRMTrain:
    torch.manual_seed(0)
    tables = rm.tables(rows=rm.ROWS, dim=rm.DIM)
    return DLRMTrain(kind(tables, rm.NUM_DENSE, [6, rm.DIM], [5, len(rm.TASKS)]))


def _run(kind: type[DLRM], rank: int, world_size: int, *, trace: bool) -> Any:
    trainee = rm.sharded(rm.wrapped(_dlrm_of(kind)), world_size)
    pipeline = rm.pipeline_of(trainee, teacher=rm.logged, trace=trace)
    outputs = rm.drained(pipeline, rm.parts(rank, world_size))
    assert not pipeline._pipelined_modules
    return outputs, rm.snapshot(trainee.model.state_dict())


def check_changed_ids_are_told(rank: int, world_size: int) -> None:
    """Ids that are changed before the tables: a warning, and the right result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = _run(ShiftedDLRM, rank, world_size, trace=True)
    messages = [
        str(warning.message) for warning in caught if warning.category is NotPipelinedWarning
    ]
    assert len(messages) == 1, messages
    assert "embedding_bag_collection" in messages[0] and "NOT pipelined" in messages[0]
    rm.assert_same(traced, _run(ShiftedDLRM, rank, world_size, trace=False))


def check_tables_left_whole_are_told(rank: int, world_size: int) -> None:
    """A plan of the bare model shards nothing of the wrapped one: a warning names the tables."""
    model = DistributedModelParallel(rm.wrapped(), device=device(), plan=ShardingPlan({}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(NotPipelinedWarning, match=r"embedding_bag_collection'\] are not sharded"):
        TrainPipelineExFM(model, optimizer, device())


def check_untraceable_is_told(rank: int, world_size: int) -> None:
    """A forward that depends on values: an error that names the way out, which works."""
    with pytest.raises(RuntimeError, match="trace=False"):
        _run(BranchingDLRM, rank, world_size, trace=True)
    outputs, weights = _run(BranchingDLRM, rank, world_size, trace=False)
    assert len(outputs) == 6
    assert rm.differs(weights, _fresh(rm.wrapped(_dlrm_of(BranchingDLRM)), world_size))


def check_costs_of_a_step(rank: int, world_size: int) -> None:
    """Up to three small all-reduces on several ranks, none on one; nothing waits for a value."""
    student = students()["dlrm"]
    terms = (
        DistillationTerm(),
        DistillationTerm(adapted=True),
        DistillationTerm(serving=True, margin=0.1),
    )
    bare = rm.sharded(student.factory(), world_size)
    plain = _costs(TrainPipelineSparseDist(bare.model, bare.optimizer, device()), rank, False)
    for added, these in enumerate((terms[:1], terms[:2], terms), start=1):
        trainee = rm.sharded(
            ExFMWrapper(student.factory(), tap=student.tap, terms=these), world_size
        )
        adapter = StudentAdapter() if len(these) > 1 else None
        costs = _costs(rm.pipeline_of(trainee, adapter=adapter), rank, True)
        # DDP divides the gradient of each parameter by a number that it has on the host
        parameters = len(list(find_wrapper(trainee.model).auxiliary_head.parameters()))
        looks = {1: 0, 2: 2, 3: 3}[added] if device().type == "cpu" else 0  # at labels
        expected = Counter(plain.syncs) + Counter(_local_scalar_dense=parameters + looks)
        assert costs.syncs == expected, (costs.syncs, expected)
        expected = Counter(plain.collectives) + Counter(allreduce_=added if world_size > 1 else 0)
        assert costs.collectives == expected, (costs.collectives, expected)
    assert world_size == 1 or plain.collectives["allreduce_"] >= 1


def check_order_of_all_reduces(rank: int, world_size: int) -> None:
    """The counts' all-reduce overlaps the student's forward, the margins' the backward."""
    student, order = students()["dlrm"], list[str]()
    terms = (DistillationTerm(adapted=True, serving=True, margin=0.1),)
    trainee = rm.sharded(ExFMWrapper(student.factory(), tap=student.tap, terms=terms), world_size)
    tapped = find_wrapper(trainee.model).student.get_submodule(student.tap)
    tapped.register_forward_hook(lambda *_: order.append("forward"))
    tapped.register_full_backward_hook(lambda *_: order.append("backward"))
    pipeline = rm.pipeline_of(trainee, adapter=StudentAdapter())
    batches = iter(rm.random_batches(student, rank))
    pipeline.progress(batches)
    order.clear()
    all_reduce, distribute = dist.all_reduce, pipeline.start_sparse_data_dist
    with (
        mock.patch.object(dist, "all_reduce", lambda *a, **k: _Told(all_reduce(*a, **k), order)),
        mock.patch.object(
            pipeline, "start_sparse_data_dist", lambda *a: order.append("input") or distribute(*a)
        ),
    ):
        pipeline.progress(batches)
    count, adapter, margins = ["start"], ["wait", "start", "wait"], ["start", "backward", "wait"]
    expected = ["input", *count, "forward", *adapter, *margins]
    assert order == (expected if world_size > 1 else ["input", "forward", "backward"]), order


def check_a_forward_around_the_wrapper_is_refused(rank: int, world_size: int) -> None:
    """A forward that goes around the wrapper is refused; nothing holds the pipeline then."""
    student = students()["dlrm"]
    terms = (DistillationTerm(adapted=True),)
    trainee = rm.sharded(ExFMWrapper(student.factory(), tap=student.tap, terms=terms), world_size)
    bare = find_wrapper(trainee.model).student
    pipeline = rm.pipeline_of(
        trainee, adapter=StudentAdapter(), custom_model_fwd=lambda batch: bare(batch.batch)
    )
    with pytest.raises(RuntimeError, match=r"should run the ExFMWrapper.*custom_model_fwd"):
        rm.drained(pipeline, rm.random_batches(student, rank, steps=2))
    pipeline.detach()
    alive = weakref.ref(pipeline)
    del pipeline
    assert alive() is None


class _Told:
    """A pending collective that records its start and the wait for it."""

    def __init__(self, work: dist.Work, order: list[str]) -> None:
        self._work, self._order = work, order
        order.append("start")

    def wait(self) -> None:
        self._order.append("wait")
        self._work.wait()


def _costs(pipeline: TrainPipelineSparseDist[Any, Any], rank: int, supervised: bool) -> Costs:
    """Return the costs of the third of five steps."""
    batches = iter(rm.random_batches(students()["dlrm"], rank, supervised=supervised))
    for _ in range(2):
        pipeline.progress(batches)
    with Costs() as costs:
        pipeline.progress(batches)
    return costs


def check_absent_teacher(rank: int, world_size: int) -> None:
    """A head without any output gets no gradient, one with some gets the same on every rank."""
    trainee = rm.sharded(rm.wrapped(), world_size)
    pipeline = rm.pipeline_of(trainee, teacher=rm.logged)
    data = rm.global_data(steps=9)
    iterator = iter([rm.part_of(batch, rank, world_size) for batch in data])
    parameters = dict(trainee.model.named_parameters())
    for batch in data:
        pipeline.progress(iterator)
        for k, columns in ((0, batch.presence[:, 0]), (1, batch.presence[:, 1, 0])):
            gradients = [
                parameter.grad
                for name, parameter in parameters.items()
                if f".term_losses.{k}." in name
            ]
            assert all(gradient is not None for gradient in gradients)
            nonzero = any(bool(gradient.any()) for gradient in gradients)
            assert nonzero == bool(columns.any()), (k, columns)
            for gradient in gradients:
                rm.assert_same(rm.on_every_rank(gradient), [gradient] * world_size)
    absent = [not batch.presence[:, 1, 0].any() for batch in data]
    assert any(absent) and not all(absent)


def check_adapter_is_shared(rank: int, world_size: int) -> None:
    """Adapters that start differently become rank 0's on every rank, and stay equal."""
    trainee = rm.sharded(rm.wrapped(terms=BOTH), world_size)
    adapter = rm.two_task_adapter(seed=10 + rank)
    pipeline = rm.pipeline_of(trainee, teacher=rm.logged, adapter=adapter)
    expected = _weights(rm.two_task_adapter(seed=10).to(device()))
    rm.assert_same(_weights(pipeline.adapter), expected)

    rm.drained(pipeline, rm.parts(rank, world_size))
    for parameter, before in zip(adapter.parameters(), expected, strict=True):
        assert not torch.equal(parameter, before)
        for other in rm.on_every_rank(parameter):
            assert torch.equal(parameter, other)


def check_adapter_learns_from_labels_alone(rank: int, world_size: int) -> None:
    """Neither the student changes the adapter, nor the adapter's loss the student."""
    with_one = _pipelined(rank, world_size)
    heavy = [DistillationTerm(teacher="a", adapted=True, weight=50.0, beta=9.0)]
    with_another = _pipelined(rank, world_size, heavy)
    rm.assert_same(with_another[2], with_one[2])
    assert rm.differs({"student": [with_another[0][-1][1]]}, {"student": [with_one[0][-1][1]]})


def check_student_does_not_feel_the_adapters_loss(rank: int, world_size: int) -> None:
    """With an adapter that can't move, the student does not depend on the adapter's labels."""
    runs = []
    for learns in (False, True):
        for labels in (lambda batch: batch.labels, lambda batch: 1 - batch.labels):
            adapter = rm.two_task_adapter()
            rate = 0.1 if learns else 0.0
            sgd = torch.optim.SGD(adapter.parameters(), lr=rate)
            options = {"adapter": adapter, "adapter_optimizer": sgd, "labels": labels}
            runs.append(_pipelined(rank, world_size, **options)[:2])
    frozen, frozen_other, learning, learning_other = runs
    rm.assert_same(frozen_other, frozen)
    assert rm.differs(learning[1], frozen[1])
    assert rm.differs(learning_other[1], learning[1])


def _teacher_model(world_size: int) -> nn.Module:
    module = rm.two_task_student(seed=5)
    return rm.sharded(module, world_size, sharding="mixed").model


def _live(world_size: int) -> LiveTeacher:
    """Return one large model for both teachers: b's outputs are half of a's."""

    def logits(output: Any) -> Tensor:
        values: Tensor = output[1][1]
        assert not torch.is_grad_enabled()
        return torch.stack([values, values / 2], dim=1)

    return LiveTeacher(_teacher_model(world_size), outputs=logits)


def check_live_teacher(rank: int, world_size: int) -> None:
    """A live teacher teaches the same as outputs computed before, and does not learn."""
    teacher = _live(world_size)
    before = rm.snapshot(teacher.model.state_dict())
    answered = [teacher(batch.to(device())) for batch in rm.parts(rank, world_size)]
    columns = [
        _relogged(batch, outputs.to(torch.device("cpu")))
        for batch, outputs in zip(rm.parts(rank, world_size), answered, strict=True)
    ]
    live = _trained(world_size, rm.parts(rank, world_size), teacher)
    rm.assert_same(live, _trained(world_size, columns, rm.logged))

    assert not teacher.model.training
    assert not any(module.training for module in teacher.model.modules())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    rm.assert_same(rm.snapshot(teacher.model.state_dict()), before)


def _relogged(batch: rm.Columns, outputs: TeacherOutputs) -> rm.Columns:
    return rm.Columns(**(batch.columns | {"values": outputs.values, "presence": outputs.presence}))


def _trained(world_size: int, batches: Iterable[Any], teacher: Any) -> Any:
    trainee = rm.sharded(rm.wrapped(terms=BOTH), world_size)
    adapter = rm.two_task_adapter()
    pipeline = rm.pipeline_of(trainee, teacher=teacher, adapter=adapter)
    outputs = rm.drained(pipeline, batches)
    assert len(outputs) == 6
    return outputs, rm.snapshot(trainee.model.state_dict()), _weights(adapter)


def check_ways_of_bringing_outputs(rank: int, world_size: int) -> None:
    """Outputs in the batches, in their columns or from a source teach the same."""
    batches = rm.parts(rank, world_size)
    columns = _trained(world_size, batches, rm.logged)
    loaded = [ExFMBatch(batch, rm.logged(batch)) for batch in batches]
    rm.assert_same(_trained(world_size, loaded, None), columns)
    rm.assert_same(_trained(world_size, batches, _Replay(batches)), columns)


class _Replay(LiveTeacher):
    """A live teacher that knows the answers."""

    def __init__(self, batches: Sequence[rm.Columns]) -> None:
        super().__init__(nn.Identity())
        self.answers = iter([rm.logged(batch).to(device()) for batch in batches])

    def __call__(self, batch: Any) -> TeacherOutputs:
        return next(self.answers)


def check_wrong_set_ups_are_refused(rank: int, world_size: int) -> None:
    """Each wrong set-up raises an error that says what was expected."""
    trainee = rm.sharded(rm.wrapped(), world_size)
    adapting = rm.sharded(rm.wrapped(terms=BOTH), world_size)
    batches = rm.parts(rank, world_size)
    loaded = [ExFMBatch(batch, rm.logged(batch)) for batch in batches]

    with pytest.raises(TypeError, match="given a teacher as well"):
        rm.drained(rm.pipeline_of(trainee, teacher=rm.logged), loaded)
    with pytest.raises(TypeError, match="given a teacher as well"):
        rm.drained(rm.pipeline_of(trainee, teacher=_live(world_size)), loaded)
    with pytest.raises(TypeError, match=r"should give ExFMBatch; received Columns.*teacher="):
        rm.drained(rm.pipeline_of(trainee), batches)
    with pytest.raises(TypeError, match="LiveTeacher"):
        rm.pipeline_of(trainee, teacher=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="received int"):
        rm.pipeline_of(trainee, teacher=3)
    with pytest.raises(ValueError, match=r"'a/adapted'.*pass adapter"):
        rm.pipeline_of(adapting, teacher=rm.logged)
    with pytest.raises(ValueError, match="no term learns from the adapter"):
        rm.pipeline_of(trainee, teacher=rm.logged, adapter=rm.two_task_adapter())
    with pytest.raises(ValueError, match=r"\(2, 2\); received \(1, 1\)"):
        rm.pipeline_of(adapting, teacher=rm.logged, adapter=StudentAdapter())
    alone = torch.optim.SGD(rm.two_task_adapter().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="pass adapter"):
        rm.pipeline_of(trainee, teacher=rm.logged, adapter_optimizer=alone)
    bare = rm.sharded(rm.two_task_student(), world_size)
    with pytest.raises(ValueError, match="should hold an ExFMWrapper"):
        rm.pipeline_of(bare, teacher=rm.logged)
    wrong = rm.pipeline_of(trainee, teacher=lambda batch: TeacherOutputs(batch.values[:, :1]))
    with pytest.raises(ValueError, match=r"should be of shape \(B, 2, 2\)"):
        rm.drained(wrong, _present(batches))
    lost = rm.pipeline_of(
        adapting, teacher=rm.logged, adapter=rm.two_task_adapter(), labels=lambda batch: batch.lost
    )
    with pytest.raises(ValueError, match=r"labels should .*lost.*pass labels="):
        rm.drained(lost, batches)
    leading = rm.sharded(rm.wrapped(terms=TERMS["margin_without_adapter"]), world_size)
    lost = rm.pipeline_of(leading, teacher=rm.informed, labels=lambda batch: batch.lost)
    with pytest.raises(ValueError, match=r"labels should .*lost.*pass labels="):
        rm.drained(lost, batches)
    ranking = rm.sharded(rm.wrapped(terms=rm.RANKING[:1]), world_size)
    with pytest.raises(ValueError, match=r"terms \['a'\] need groups.*pass groups=\.\.\."):
        rm.pipeline_of(ranking, teacher=rm.logged)
    for groups, message in (
        (lambda batch: batch.lost, r"groups should take .*lost.*pass groups="),
        (lambda batch: batch.groups[1:], r"groups should be int64 ids .*received torch.int64 of"),
    ):
        wrong = rm.pipeline_of(ranking, teacher=rm.logged, groups=groups)
        with pytest.raises(ValueError, match=message):
            rm.drained(wrong, batches)
    short = rm.pipeline_of(leading, teacher=rm.informed, labels=lambda batch: batch.labels[1:])
    with pytest.raises(ValueError, match=r"labels should be of shape .* 2\); received \(\d+, 2\)"):
        rm.drained(short, batches)


def check_freed_features_are_refused(rank: int, world_size: int) -> None:
    """A live teacher reads the ids after the point where TorchRec can be told to free them."""
    trainee = rm.sharded(rm.wrapped(), world_size)
    with pytest.raises(ValueError, match="free_features_storage_early"):
        rm.pipeline_of(trainee, teacher=_live(world_size), free_features_storage_early=True)


def check_without_dmp(rank: int, world_size: int, parallel: bool) -> None:
    """Plain tables, alone on a rank or under DDP, train as by hand."""
    terms = (*rm.HEADS, rm.MARGINS[1])
    reference = ByHand(rm.wrapped(terms=terms), None, torch.optim.SGD, adapter_lr=0.0, lr=0.2)
    part = (rank, world_size) if parallel else (0, 1)
    wrapper = rm.wrapped(terms=terms).to(device())
    model = nn.parallel.DistributedDataParallel(wrapper) if parallel else wrapper
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    pipeline = TrainPipelineExFM(model, optimizer, device(), teacher=rm.informed)
    rm.drained(pipeline, rm.parts(*part))
    for data in rm.global_data():
        reference.step(data)
    _check_leads(wrapper, reference, world_size)
    rm.assert_near_whole(wrapper.state_dict(), reference.weights())


def check_pinned_batches(rank: int, world_size: int) -> None:
    """Batches that are copied while earlier steps run arrive unchanged."""
    pinned = [batch.pin_memory() for batch in rm.parts(rank, world_size)]
    expected = _trained(world_size, rm.parts(rank, world_size), rm.logged)
    rm.assert_same(_trained(world_size, pinned, rm.logged), expected)


def check_fails_on_the_last_rank(rank: int, world_size: int) -> None:
    """Fail on the last rank while the others wait for it, to test the harness itself."""
    if rank == world_size - 1:
        raise ArithmeticError("on purpose")
    dist.barrier()


def _present(batches: Iterable[rm.Columns]) -> list[rm.Columns]:
    return [
        rm.Columns(**(batch.columns | {"values": batch.values.nan_to_num(0.0)}))
        for batch in batches
    ]


def check_ranks_without_ddp_are_told(rank: int, world_size: int) -> None:
    """A dense part without DDP on two ranks is a warning."""
    wrapper = rm.wrapped()
    model = DistributedModelParallel(wrapper, device=device(), init_data_parallel=False)
    optimizer = torch.optim.SGD(wrapper.auxiliary_head.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TrainPipelineExFM(model, optimizer, device(), teacher=rm.logged)
    messages = [
        str(warning.message) for warning in caught if "without Distrib" in str(warning.message)
    ]
    assert len(messages) == (world_size > 1)
