"""What users do that is not in the book: each was once wrong, silently or with a bare error."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from models import CPU, HandTrain, dlrm_train, hand_train, make_batch, make_hand_batch, make_teacher
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchrec_exfm import (
    AuxiliaryHead,
    DistillationTerm,
    DistillationWarning,
    ExFMBatch,
    ExFMWrapper,
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
    """Calls its head by keywords, in another order than the head's own."""

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


def test_constants_survive_the_meta_device() -> None:
    tasks = [Task(name="a"), Task(name="b", regression=True)]
    with torch.device("meta"):
        head = AuxiliaryHead(4, tasks=tasks, terms=[DistillationTerm(tasks=("b",))])
        both = AuxiliaryHead(4, tasks=tasks)
        adapter = StudentAdapter(tasks=tasks)
    buffers = [*head.buffers(), *both.buffers(), *adapter.buffers()]
    assert [values.tolist() for values in buffers] == [
        [1],
        [1],
        [False, True],
        [15.0, float("inf")],
        [False, True],
    ]


@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 1, 1)])
def test_an_empty_batch_passes(shape: tuple[int, ...]) -> None:
    outputs = TeacherOutputs(torch.zeros(shape))
    assert outputs.values.shape == (0, 1, 1)
    wrapper = ExFMWrapper(hand_train(), tap="score")
    wrapper(ExFMBatch(make_hand_batch(0, 8), make_teacher(0, 8)))
    loss, _ = AuxiliaryHead(4)(torch.zeros(0, 4, requires_grad=True), outputs)
    loss.backward()
    assert loss.item() == 0


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
    """The heads would never learn, and the network would learn from them."""
    student = dlrm_train(0)
    bare = torch.optim.SGD(student.parameters(), lr=0.1)
    wrapper = ExFMWrapper(student, tap="model.over_arch")
    with pytest.warns(DistillationWarning, match="make it of the wrapped model's parameters"):
        TrainPipelineExFM(wrapper, bare, CPU)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("regression", [False, True])
def test_probabilities_for_logits_are_told(size: int, regression: bool) -> None:
    """Once, of the first batch, where it is large enough to tell."""
    told = size == 64 and not regression
    tasks = [Task(regression=regression)]
    wrapper = ExFMWrapper(dlrm_train(0), tap="model.over_arch", tasks=tasks)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)

    def columns(batch: Any) -> TeacherOutputs:
        values = torch.linspace(0, 1, len(batch.labels) + 1)
        there = torch.arange(len(values)) < size
        return TeacherOutputs(values[:-1], there[:-1])

    pipeline = TrainPipelineExFM(wrapper, optimizer, CPU, teacher=columns)
    batches = iter([make_batch(step, 80) for step in range(3)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pipeline.progress(batches)
    of_ours = [str(one.message) for one in caught if one.category is DistillationWarning]
    assert len(of_ours) == told
    assert not told or "all of the first 64 lie in [0, 1]" in of_ours[0]


@pytest.mark.parametrize("values", [torch.full((80,), 0.5), torch.linspace(-0.1, 1, 80)])
def test_logits_are_not_taken_for_probabilities(values: Tensor) -> None:
    wrapper = ExFMWrapper(dlrm_train(0), tap="model.over_arch")
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    pipeline = TrainPipelineExFM(wrapper, optimizer, CPU, teacher=lambda _: TeacherOutputs(values))
    pipeline.progress(iter([make_batch(0, 80)]))  # warnings are errors here
