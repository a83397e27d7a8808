"""Taps and students that break the wrapper's contract are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import HandTrain, dlrm_train, hand_train, make_hand_batch, make_teacher
from torch import Tensor, nn

from torchrec_exfm import DistillationTerm, ExFMBatch, ExFMWrapper


class Tower(nn.Module):
    """A student that calls its tapped module with a test's inputs, one call each."""

    def __init__(self, *inputs: Any, loss: Any = None) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.head = nn.Linear(4, 1)
        self.table = nn.EmbeddingBag(3, 4)
        self.inputs = inputs
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        for inputs in self.inputs:
            if isinstance(inputs, Tensor):
                logits = self.head(inputs)
            else:
                self.head.forward = lambda hidden: hidden[0]  # type: ignore[method-assign]
                logits = self.head(inputs)
        if self.loss is not None:
            return self.loss
        loss = self.trunk(batch.numbers).mean()
        return loss, (loss.detach(), logits if self.inputs else loss, batch.clicked)


def train(student: nn.Module, **options: Any) -> Tensor:
    wrapper = ExFMWrapper(student, tap="head", **options)
    loss, _ = wrapper(ExFMBatch(make_hand_batch(0, 8), make_teacher(0, 8)))
    return loss


def test_an_unknown_tap_is_refused_with_candidates() -> None:
    for tap in ("over_arch", "", "model.over_arch.nothing"):
        with pytest.raises(ValueError, match=f"submodule of DLRMTrain; received {tap!r}") as error:
            ExFMWrapper(dlrm_train(), tap=tap)
        candidates = str(error.value).partition("candidates: ")[2]
        assert "'model.over_arch'" in candidates and "'model.dense_arch'" in candidates
        assert not any(wrong in candidates for wrong in ("sparse_arch", "'model'", "''"))


def test_every_candidate_that_is_named_can_be_tapped() -> None:
    with pytest.raises(ValueError, match="candidates") as error:
        ExFMWrapper(hand_train(), tap="x")
    named = str(error.value).partition("candidates: ")[2]
    assert named == "['trunk', 'trunk.0', 'score', 'score.out']"
    batch = ExFMBatch(make_hand_batch(), make_teacher())
    for tap in ("trunk", "trunk.0", "score", "score.out"):
        loss, _ = ExFMWrapper(hand_train(), tap=tap)(batch)
        assert torch.isfinite(loss)


def test_a_width_that_cannot_be_told_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"'norm' \(LayerNorm\).* no nn.Linear: pass in_features"):
        ExFMWrapper(hand_train(), tap="norm")
    wrapper = ExFMWrapper(hand_train(), tap="norm", in_features=7)
    loss, _ = wrapper(ExFMBatch(make_hand_batch(), make_teacher()))
    loss.backward()
    assert wrapper.student.trunk[0].weight.grad.any()


@pytest.mark.parametrize("times", [0, 2])
def test_a_tapped_module_that_does_not_run_once_is_refused(times: int) -> None:
    message = rf"'head' should run exactly once .* ran {times} times: tap a module that runs once"
    with pytest.raises(RuntimeError, match=message):
        train(Tower(*[torch.ones(8, 4, requires_grad=True)] * times))
    assert torch.isfinite(train(Tower(torch.ones(8, 4, requires_grad=True))))


@pytest.mark.parametrize(
    ("inputs", "received"),
    [
        (torch.ones(8, 2, 4), r"\(8, 2, 4\)"),
        (torch.ones(4), r"\(4,\)"),
        ([torch.ones(8, 4)], "list"),
    ],
)
def test_a_tapped_input_that_is_no_matrix_is_refused(inputs: Any, received: str) -> None:
    message = rf"'head' should be a tensor of shape \(B, 4\); received {received}: pass in_features"
    with pytest.raises(ValueError, match=message):
        train(Tower(inputs))


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 3\); received \(8, 4\): pass in_features"):
        train(Tower(torch.ones(8, 4, requires_grad=True)), in_features=3)


@pytest.mark.parametrize(
    ("outputs", "received"),
    [
        (torch.ones(()), r"a tensor of shape \(\)"),
        ((torch.ones(()), torch.ones(8), torch.ones(8)), r"\(a tensor of shape \(\), a tensor"),
        ((torch.ones(8), (torch.ones(8),)), r"\(a tensor of shape \(8,\), \(a tensor"),
        ((0.5, (torch.ones(8),)), r"\(float, \(a tensor of shape \(8,\)\)\)"),
        ({"loss": 1}, "dict"),
    ],
)
def test_a_student_of_another_contract_is_refused(outputs: Any, received: str) -> None:
    message = rf"should return \(loss, \(loss, logits, labels\)\).*DLRMTrain; received {received}"
    with pytest.raises(TypeError, match=message):
        train(Tower(torch.ones(8, 4, requires_grad=True), loss=outputs))


def test_a_loss_of_one_element_is_taken() -> None:
    rest = (torch.ones(8),)
    loss = train(
        Tower(torch.ones(8, 4, requires_grad=True), loss=(torch.ones(1, requires_grad=True), rest))
    )
    assert loss.numel() == 1
    loss.sum().backward()


def test_a_plain_batch_is_refused_in_training_alone() -> None:
    wrapper = ExFMWrapper(hand_train(), tap="score")
    message = "given an ExFMBatch; received HandBatch: let TrainPipelineExFM make it, or build"
    with pytest.raises(TypeError, match=message):
        wrapper(make_hand_batch())
    wrapper.eval()(make_hand_batch())


def test_wrong_terms_are_refused_and_the_student_left_as_it_was() -> None:
    student = hand_train()
    with pytest.raises(ValueError, match=r"one of \['teacher'\]; received 'x'"):
        ExFMWrapper(student, tap="score", terms=[DistillationTerm(teacher="x")])
    with pytest.raises(ValueError, match="in_features"):
        ExFMWrapper(student, tap="norm")
    assert isinstance(student, HandTrain)
    assert not any(module._forward_pre_hooks for module in student.modules())


@pytest.mark.parametrize("tap", ["trunk", "trunk.0"])
def test_a_serving_term_wants_the_serving_head_tapped(tap: str) -> None:
    wrapper = ExFMWrapper(hand_train(), tap=tap, terms=[DistillationTerm(serving=True)])
    message = (
        rf"output of the tapped module '{tap}' should be the logits of the tasks \['label'\], "
        r"\(B, 1\); received \(8, 7\): tap the module that returns them, or pass serving_logits"
    )
    with pytest.raises(ValueError, match=message):
        wrapper(ExFMBatch(make_hand_batch(0, 8), make_teacher(0, 8)))
    (used,) = wrapper.exfm.taps
    assert not any(isinstance(value, Tensor) for value in vars(used).values())


def test_a_serving_head_without_gradient_is_told() -> None:
    class Frozen(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(hidden)

    student = Tower(torch.ones(8, 4, requires_grad=True))
    student.head = Frozen(4, 1)
    with pytest.warns(RuntimeWarning, match="the output of the tapped module 'head' carries no"):
        train(student, terms=[DistillationTerm(serving=True)])


def test_a_serving_head_that_does_not_run_once_is_refused() -> None:
    for times in (0, 2):
        student = Tower(*[torch.ones(8, 4, requires_grad=True)] * times)
        with pytest.raises(RuntimeError, match=f"should run exactly once .* ran {times} times"):
            train(student, terms=[DistillationTerm(serving=True)])
