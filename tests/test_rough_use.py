"""Unusual uses: each was once wrong silently, or with an unhelpful error."""

from __future__ import annotations

import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from models import CPU, HandTrain, dlrm_train, hand_train, make_batch, make_hand_batch, make_teacher
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineContext
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchrec_exfm import (
    AuxiliaryHead,
    DistillationTerm,
    DistillationWarning,
    ExFMBatch,
    ExFMMetrics,
    ExFMWrapper,
    LiveTeacher,
    RunMonitor,
    StudentAdapter,
    Task,
    TeacherOutputs,
    TrainPipelineExFM,
    export_student,
)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        scores: Tensor = self.out(hidden * gate)
        return scores


class GatedTrain(nn.Module):
    """Calls its head by keywords in another order than the head's signature."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.head = Gated()
        self.reentrant: bool | None = None

    def forward(self, batch: Any) -> Any:
        if self.reentrant is None:
            scores = self._scores(batch.numbers)
        else:
            numbers = batch.numbers.clone().requires_grad_()
            scores = checkpoint(self._scores, numbers, use_reentrant=self.reentrant)
        logits = scores[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.clicked)
        return loss, (loss.detach(), logits.detach(), batch.clicked)

    def _scores(self, numbers: Tensor) -> Tensor:
        hidden = self.trunk(numbers)
        scores: Tensor = self.head(gate=torch.ones_like(hidden), hidden=hidden)
        return scores


def trunk_gradient(student: GatedTrain, weight: float, *, serving: bool = False) -> Tensor:
    torch.manual_seed(0)
    term = DistillationTerm(weight=weight, serving=serving)
    wrapper = ExFMWrapper(student, tap="head", terms=[term])
    wrapper.zero_grad()
    wrapper(ExFMBatch(make_hand_batch(0, 8), make_teacher(0, 8)))[0].backward()
    gradient = student.trunk.weight.grad
    assert gradient is not None
    return gradient.clone()


def test_the_first_argument_is_that_of_the_signature() -> None:
    student = GatedTrain()
    assert not torch.equal(trunk_gradient(student, 1.0), trunk_gradient(student, 0.0))


@pytest.mark.parametrize("serving", [False, True])
def test_checkpointing_around_the_tap(serving: bool) -> None:
    student = GatedTrain()
    expected = trunk_gradient(student, 1.0, serving=serving)
    student.reentrant = False
    torch.testing.assert_close(trunk_gradient(student, 1.0, serving=serving), expected)
    student.reentrant = True
    with pytest.warns(RuntimeWarning, match="carries no gradient"):
        trunk_gradient(student, 1.0, serving=serving)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_are_of_the_students_dtype(dtype: torch.dtype) -> None:
    class Cast(GatedTrain):
        def forward(self, batch: Any) -> Any:
            logits = self._scores(batch.numbers.to(dtype))[:, 0].float()
            loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.clicked)
            return loss, (loss.detach(), logits.detach(), batch.clicked)

    wrapper = ExFMWrapper(Cast().to(dtype), tap="head")
    wrapper(ExFMBatch(make_hand_batch(0, 8), make_teacher(0, 8)))[0].backward()
    assert {parameter.dtype for parameter in wrapper.parameters()} == {dtype}


def test_running_means_survive_the_meta_device() -> None:
    tasks = [Task(name="a"), Task(name="b", regression=True)]
    with torch.device("meta"):
        head = AuxiliaryHead(4, tasks=tasks, terms=[DistillationTerm(serving=True, margin=0.5)])
        adapter = StudentAdapter(tasks=tasks)
    assert [values.tolist() for values in head.buffers()] == [[[0.0, 0.0]] * 2]
    assert not list(adapter.buffers())


@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 1, 1)])
def test_an_empty_batch_passes(shape: tuple[int, ...]) -> None:
    outputs = TeacherOutputs(torch.zeros(shape))
    assert outputs.values.shape == (0, 1, 1)
    wrapper = ExFMWrapper(hand_train(), tap="score")
    wrapper(ExFMBatch(make_hand_batch(0, 8), make_teacher(0, 8)))
    loss, _ = AuxiliaryHead(4)(torch.zeros(0, 4, requires_grad=True), outputs)
    loss.backward()
    assert loss.item() == 0
    shared = torch.zeros(0, 4, requires_grad=True)
    loss, _ = AuxiliaryHead(4)(shared, outputs, weights=torch.zeros(shape[:1]))
    assert loss.item() == 0


def test_outputs_are_a_copy_of_what_they_are_made_from() -> None:
    """A loader may refill the same column, or slice a small one from a large one."""
    column = torch.arange(1000.0)
    outputs = TeacherOutputs(column[:3])
    column.fill_(-1)
    assert outputs.values.flatten().tolist() == [0, 1, 2]
    assert len(pickle.dumps(outputs)) < 2000
    with torch.inference_mode():
        column = torch.zeros(3)
    head = AuxiliaryHead(4, tasks=[Task(regression=True)])
    head(torch.zeros(3, 4, requires_grad=True), TeacherOutputs(column))[0].backward()


class Giving:
    """A source that returns given results one after another."""

    def __init__(self, *started: Any) -> None:
        self.started = iter(started)

    def start(self, batch: Any) -> Any:
        return next(self.started)


@pytest.mark.parametrize(
    ("started", "error", "message"),
    [
        ([], RuntimeError, "ended before the batches"),
        ([None], TypeError, r"teacher should be TeacherOutputs; received NoneType"),
        ([lambda _: torch.zeros(8)], TypeError, r"should give TeacherOutputs.*received Tensor"),
        ([lambda _: make_teacher(0, 8, tasks=3)], ValueError, r"of shape \(B, 1, 1\)"),
    ],
)
def test_a_source_that_gives_something_else_is_told(
    started: list[Any], error: type[Exception], message: str
) -> None:
    wrapper = ExFMWrapper(hand_train(), tap="score")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    pipeline = TrainPipelineExFM(wrapper, optimizer, CPU, teacher=Giving(*started))
    with pytest.raises(error, match=message):
        pipeline.progress(iter([make_hand_batch(0, 8)]))


def test_a_step_that_failed_leaves_nothing_behind() -> None:
    """No tap is left open, no flag set, and outputs are looked up again."""
    wrapper = ExFMWrapper(hand_train(), tap="score")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    forward: list[Any] = [wrapper]
    sizes = iter([5, 8, 8])
    pipeline = TrainPipelineExFM(
        wrapper,
        optimizer,
        CPU,
        teacher=Giving(*[lambda _: make_teacher(0, next(sizes))] * 3),
        custom_model_fwd=lambda batch: forward[0](batch),
    )
    batches = iter([make_hand_batch(step, 8) for step in range(3)])
    pipeline.fill_pipeline(batches)
    with pytest.raises(ValueError, match="teacher outputs should be of shape"):
        pipeline.progress(batches)
    assert not wrapper.exfm.taps[0]._open
    pipeline.progress(batches)
    forward[0] = lambda batch: wrapper.student(batch.batch)
    with pytest.raises(RuntimeError, match="should run the ExFMWrapper"):
        pipeline.progress(batches)
    forward[0] = wrapper
    pipeline.progress(batches)
    with pytest.raises(StopIteration):
        pipeline.progress(batches)


def test_a_class_is_no_teacher() -> None:
    wrapper = ExFMWrapper(hand_train(), tap="score")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="received type"):
        TrainPipelineExFM(wrapper, optimizer, CPU, teacher=Giving)  # type: ignore[arg-type]


def test_a_student_that_can_not_be_copied_trains_and_says_so_at_export() -> None:
    student = dlrm_train()
    student.lock = threading.Lock()  # type: ignore[assignment]
    wrapper = ExFMWrapper(student, tap="model.over_arch")
    wrapper(ExFMBatch(make_batch(0, 8), make_teacher(0, 8)))[0].backward()
    with pytest.raises(TypeError, match=r"deepcopy.*lock.*student_state_dict"):
        export_student(wrapper)


@pytest.mark.parametrize(
    "options",
    [{"tasks": ["a"]}, {"terms": DistillationTerm()}, {"terms": ["teacher"]}, {"tasks": Task()}],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"should be a sequence of \w+; received"):
        ExFMWrapper(HandTrain(), tap="score", **options)


@pytest.mark.parametrize("options", [{"hidden": 128}, {"tasks": "label"}])
def test_a_term_wants_tuples(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="should be a tuple; received"):
        DistillationTerm(**options)


def test_a_head_of_no_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1; received \(0,\)"):
        DistillationTerm(hidden=(0,))


@pytest.mark.parametrize("eps", [0.0, 1e-9, 0.5])
def test_an_epsilon_that_can_not_work_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="eps should be in"):
        TeacherOutputs.from_probabilities(torch.tensor([0.5]), eps=eps)


def test_an_optimizer_of_the_bare_student_is_told() -> None:
    """Untrained heads would still send gradients into the network."""
    student = dlrm_train(0)
    bare = torch.optim.SGD(student.parameters(), lr=0.1)
    wrapper = ExFMWrapper(student, tap="model.over_arch")
    with pytest.warns(DistillationWarning, match="make it of the wrapped model's parameters"):
        TrainPipelineExFM(wrapper, bare, CPU)


@pytest.mark.parametrize(
    ("present", "warns"),
    [
        ([20, 20, 20], False),
        ([64, 0, 0], True),
        ([63, 1, 0], True),
        ([0, 0, 0, 20, 44, 0, 0, 0], True),
    ],
    ids=["too few", "the first", "in batches of 63", "late"],
)
@pytest.mark.parametrize("regression", [False, True])
def test_probabilities_for_logits_are_told(
    present: list[int], warns: bool, regression: bool
) -> None:
    """A warning comes once, after enough outputs, however late and small the batches."""
    warns = warns and not regression
    tasks = [Task(regression=regression)]
    wrapper = ExFMWrapper(dlrm_train(0), tap="model.over_arch", tasks=tasks)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    sizes = iter(present)

    def columns(batch: Any) -> TeacherOutputs:
        values = torch.linspace(0, 1, len(batch.labels))
        return TeacherOutputs(values, torch.arange(len(values)) < next(sizes))

    pipeline = TrainPipelineExFM(wrapper, optimizer, CPU, teacher=columns)
    batches = iter([make_batch(step, 80) for step in range(len(present))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in present:
            pipeline.progress(batches)
    messages = [
        str(warning.message) for warning in caught if warning.category is DistillationWarning
    ]
    assert len(messages) == warns
    assert not warns or "all of the first 64 lie in [0, 1]" in messages[0]


@pytest.mark.parametrize("values", [torch.full((80,), 0.5), torch.linspace(-0.1, 1, 80)])
def test_logits_are_not_taken_for_probabilities(values: Tensor) -> None:
    wrapper = ExFMWrapper(dlrm_train(0), tap="model.over_arch")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    pipeline = TrainPipelineExFM(wrapper, optimizer, CPU, teacher=lambda _: TeacherOutputs(values))
    pipeline.progress(iter([make_batch(0, 80)]))  # warnings are errors here


# ---- Autocast ----


class Autocast(nn.Module):
    """A student that runs itself, or its tapped part, under autocast."""

    def __init__(self, dtype: torch.dtype, part: str) -> None:
        super().__init__()
        self.student = dlrm_train(0)
        self.dtype, self.part = dtype, part
        if part == "tapped":
            inner = self.student.model.over_arch
            inner.forward = self._cast(inner.forward)

    def _cast(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            with torch.autocast("cpu", self.dtype):
                return function(*args)

        return call

    def forward(self, batch: Any) -> Any:
        return self._cast(self.student)(batch) if self.part == "student" else self.student(batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["step", "student", "tapped", "step and student"])
def test_autocast_in_any_place(dtype: torch.dtype, part: str) -> None:
    terms = [
        DistillationTerm(beta=2.0, hidden=(4,)),
        DistillationTerm(adapted=True, serving=True, margin=0.5),
    ]

    def trained(student: nn.Module, tap: str, enabled: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(3)
        wrapper = ExFMWrapper(student, tap=tap, terms=terms)
        optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
        pipeline = TrainPipelineExFM(
            wrapper,
            optimizer,
            CPU,
            teacher=lambda batch: make_teacher(0, len(batch.labels), missing=0.3),
            adapter=StudentAdapter(),
        )
        batches, losses = iter([make_batch(step, 32) for step in range(4)]), []
        for _ in range(4):
            with torch.autocast("cpu", dtype, enabled=enabled):
                losses.append(float(pipeline.progress(batches)[0]))
        assert wrapper.last_losses is not None and wrapper.last_losses.dtype == torch.float32
        return losses, [value.detach().clone() for value in wrapper.parameters()]

    inner = part.removeprefix("step and ")
    student = Autocast(dtype, inner)
    losses, weights = trained(student, "student.model.over_arch", "step" in part)
    expected, exact = trained(dlrm_train(0), "model.over_arch", False)
    assert losses == pytest.approx(expected, rel=0.02) and losses != expected
    for value, reference in zip(weights, exact, strict=True):
        assert (value - reference).norm() <= 0.05 * reference.norm() + 1e-3


# ---- What TorchRec takes ----


class Told(nn.Module):
    """A student that returns loss and logits in a form of its own."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.student = dlrm_train(0)
        self.form = form

    def forward(self, batch: Any) -> Any:
        logits = self.student.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
        return self.form(loss, logits, batch.labels)


FORMS: dict[str, tuple[Any, Any]] = {  # and where the metrics find what they count
    "a list": (lambda loss, z, y: [loss, (loss.detach(), z.detach(), y)], None),
    "four": (
        lambda loss, z, y: (loss, (loss.detach(), z.detach(), y, torch.ones(len(y)))),
        None,
    ),
    "predictions": (
        lambda loss, z, y: (loss, ({"bce": loss.detach()}, {"logits": z.detach()}, {"labels": y})),
        lambda output: (output[0]["bce"], output[1]["logits"], output[2]["labels"]),
    ),
    "logits": (
        lambda loss, z, y: (loss, (z.detach(), y)),
        lambda output: (output[0].mean(), *output),
    ),
    "a dict": (
        lambda loss, z, y: (loss, {"loss": loss.detach(), "logits": z.detach(), "labels": y}),
        lambda output: tuple(output.values()),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_students_that_return_other_forms(form: str) -> None:
    returned, outputs = FORMS[form]
    wrapper = ExFMWrapper(Told(returned), tap="student.model.over_arch")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    pipeline = TrainPipelineExFM(
        wrapper, optimizer, CPU, teacher=lambda batch: make_teacher(0, len(batch.labels))
    )
    metrics = ExFMMetrics(batch_size=8, device=CPU, outputs=outputs)
    batches = iter([make_batch(step) for step in range(2)])
    with RunMonitor(pipeline, metrics, progress=False) as monitor:
        for _ in range(2):
            monitor.step(pipeline.progress(batches))
    assert 0 < monitor.last["ne/label"] < 5 and monitor.last["coverage/teacher/label"] == 1


def test_a_student_or_a_live_teacher_that_returns_a_dict_is_told_so() -> None:
    student = Told(lambda loss, z, y: {"loss": loss, "logits": z})
    wrapper = ExFMWrapper(student, tap="student.model.over_arch")
    batch = ExFMBatch(make_batch(), make_teacher())
    with pytest.raises(TypeError, match=r"should return \(loss, \(loss.*received dict"):
        wrapper(batch)
    with pytest.raises(ValueError, match=r"outputs should take .*live teacher's .*received dict"):
        LiveTeacher(student)(make_batch())
    live = LiveTeacher(student, outputs=lambda output: output["logits"])
    assert live(make_batch()).values.shape == (8, 1, 1)
    live = LiveTeacher(student, outputs=lambda output: TeacherOutputs(output["logits"], **hidden))
    hidden = {"embeddings": torch.ones(8, 3)}
    assert live(make_batch()).embeddings.shape == (8, 1, 3)


def test_the_pipeline_is_a_generic_class_with_torchrecs_options_by_position() -> None:
    seen: list[Any] = []
    model = ExFMWrapper(dlrm_train(0), tap="model.over_arch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def forward(batch: Any) -> Any:
        seen.append(batch)
        return model(batch)

    options = (False, False, TrainPipelineContext, False, forward)
    pipeline = TrainPipelineExFM[Batch, Any](
        model, optimizer, CPU, *options, teacher=lambda batch: make_teacher(0, len(batch.labels))
    )
    assert pipeline._execute_all_batches is False
    pipeline.progress(iter([make_batch(step) for step in range(3)]))
    assert len(seen) == 1 and isinstance(seen[0], ExFMBatch)
    with pytest.raises(TypeError, match="multiple values for argument 'execute_all_batches'"):
        TrainPipelineExFM(model, optimizer, CPU, True, execute_all_batches=True)


@pytest.mark.parametrize("make", [dict, tuple, list])
def test_batches_of_any_kind_in_a_plain_loop(make: Any) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

        def forward(self, batch: Any) -> Any:
            numbers, labels = batch.values() if isinstance(batch, dict) else batch
            logits = self.head(self.trunk(numbers)).squeeze(-1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            return loss, (loss.detach(), logits.detach(), labels)

    parts = {"numbers": torch.randn(8, 5), "labels": torch.ones(8)}
    wrapper = ExFMWrapper(Plain(), tap="head")
    batch = parts if make is dict else make(parts.values())
    loss, _ = wrapper(ExFMBatch(batch, make_teacher()))
    loss.backward()
    assert all(value.grad is not None for value in wrapper.parameters())


def test_a_failing_teacher_is_not_needed_to_find_wrong_labels() -> None:
    """Wrong labels are found at the first batch, before the teacher can fail."""
    wrapper = ExFMWrapper(hand_train(), tap="score")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    pipeline = TrainPipelineExFM(
        wrapper,
        optimizer,
        CPU,
        teacher=lambda batch: make_teacher(0, len(batch.clicked)),
        on_teacher_error="mask",
    )
    with pytest.raises(ValueError, match=r"labels should take the user's batch .*labels=\.\.\."):
        pipeline.progress(iter([make_hand_batch()]))
    assert pipeline.teacher_failures == 0


# ---- The wrapper ----


def test_a_name_of_the_students_is_pointed_at() -> None:
    wrapper = ExFMWrapper(dlrm_train(0), tap="model.over_arch")
    message = (
        r"'ExFMWrapper' object has no attribute 'model': the student's own is \.student\.model"
    )
    with pytest.raises(AttributeError, match=message):
        _ = wrapper.model.sparse_arch
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = wrapper.nothing
    assert wrapper.student.model.sparse_arch is not None


@pytest.mark.parametrize("nested", [False, True])
def test_wrapping_twice_is_refused(nested: bool) -> None:
    wrapper: nn.Module = ExFMWrapper(dlrm_train(0), tap="model.over_arch")
    wrapper = nn.Sequential(wrapper) if nested else wrapper
    with pytest.raises(ValueError, match=r"not be wrapped yet; received .*wrap its \.student"):
        ExFMWrapper(wrapper, tap="student.model.over_arch")


# ---- Gradient clipping ----


def clipped(module: nn.Module) -> GradientClippingOptimizer:
    return GradientClippingOptimizer(sgd(module), GradientClipping.NORM, max_gradient=0.1)


def sgd(module: nn.Module) -> KeyedOptimizerWrapper:
    parameters = dict(module.named_parameters())
    return KeyedOptimizerWrapper(parameters, lambda some: torch.optim.SGD(some, lr=0.1))


def test_heads_that_are_clipped_apart_leave_the_students_steps_alone() -> None:
    """At a β of 0 the student is the bare one; clipped together it takes smaller steps."""

    def moved(kind: str) -> float:
        student = hand_train()
        before = [value.detach().clone() for value in student.parameters()]
        torch.manual_seed(1)
        wrapper = ExFMWrapper(student, tap="score", terms=[DistillationTerm(beta=0.0)])
        optimizer: Any = clipped(student if kind == "bare" else wrapper)
        if kind == "apart":
            heads = ("heads", sgd(wrapper.auxiliary_head))
            optimizer = CombinedOptimizer([clipped(student), heads])
        for step in range(5):
            batch = make_hand_batch(step, 64)
            outputs = TeacherOutputs(5 * make_teacher(step, 64).values)
            optimizer.zero_grad()
            wrapper(ExFMBatch(batch, outputs))[0].backward()
            optimizer.step()
        pairs = zip(student.parameters(), before, strict=True)
        return sum(float((value.detach() - start).square().sum()) for value, start in pairs)

    assert moved("apart") == pytest.approx(moved("bare"), rel=1e-6)
    assert moved("together") < 0.8 * moved("bare")
