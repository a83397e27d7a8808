"""Export: a bare checkpoint in and out, and the module that is served."""

from __future__ import annotations

import pytest
import torch
from models import HandBatch, Student, make_hand_batch, make_teacher, students
from torch import Tensor, nn

from torchrec_exfm import (
    DistillationTerm,
    ExFMBatch,
    ExFMWrapper,
    export_student,
    student_state_dict,
)

STUDENTS = students()
every_student = pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS.keys())


def trained(student: Student, steps: int = 2) -> ExFMWrapper:
    wrapper = ExFMWrapper(student.factory(0), tap=student.tap)
    train(wrapper, student, steps)
    return wrapper


def train(wrapper: ExFMWrapper, student: Student, steps: int, first: int = 0) -> list[float]:
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    losses = []
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        loss, _ = wrapper(ExFMBatch(student.make_batch(seed, 8), make_teacher(seed, 8)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(module: nn.Module, student: Student) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = module.eval()(student.make_batch(77, 16))[1][1]
    return outputs


@every_student
def test_a_bare_checkpoint_goes_in(student: Student) -> None:
    wrapper = ExFMWrapper(student.factory(0), tap=student.tap)
    bare = student.factory(1)
    assert not torch.equal(logits(wrapper, student), logits(bare, student))
    wrapper.student.load_state_dict(bare.state_dict())
    assert torch.equal(logits(wrapper, student), logits(bare, student))


@every_student
def test_a_bare_checkpoint_comes_out(student: Student) -> None:
    wrapper = trained(student)
    bare = student.factory(1)
    outer = nn.Sequential(wrapper)
    bare.load_state_dict(student_state_dict(outer))
    assert torch.equal(logits(bare, student), logits(wrapper, student))


@every_student
def test_the_exported_student_is_the_users_own(student: Student) -> None:
    wrapper = trained(student)
    exported, bare = export_student(wrapper), student.factory(1)
    assert type(exported) is type(bare) and not exported.training
    assert [type(m) for m in exported.modules()] == [type(m) for m in bare.modules()]
    assert list(exported.state_dict()) == list(bare.state_dict())
    for ours, theirs in zip(exported.parameters(), bare.parameters(), strict=True):
        assert (ours.shape, ours.device, ours.dtype) == (theirs.shape, theirs.device, theirs.dtype)
        assert type(ours) is nn.Parameter and ours.requires_grad
    for module in exported.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._forward_pre_hooks_with_kwargs
    assert torch.equal(logits(exported, student), logits(wrapper, student))
    bare.load_state_dict(exported.state_dict(), strict=True)
    assert torch.equal(logits(bare, student), logits(exported, student))


def test_a_student_that_was_taught_itself_is_exported_without_hooks() -> None:
    student = STUDENTS["hand_written"]
    wrapper = ExFMWrapper(
        student.factory(0), tap=student.tap, terms=[DistillationTerm(serving=True)]
    )
    train(wrapper, student, 2)
    exported = export_student(wrapper)
    for module in exported.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    keys = list(student.factory(0).state_dict())
    assert list(exported.state_dict()) == list(student_state_dict(wrapper)) == keys
    assert list(wrapper.state_dict()) == [f"student.{key}" for key in keys]
    assert torch.equal(logits(exported, student), logits(wrapper, student))


@every_student
def test_export_does_not_disturb_the_training(student: Student) -> None:
    wrapper, undisturbed = trained(student), trained(student)
    before = logits(export_student(wrapper), student)
    exported = export_student(wrapper)
    assert wrapper.training and wrapper.student.training
    assert train(wrapper, student, 2, first=2) == train(undisturbed, student, 2, first=2)
    later = export_student(wrapper)
    assert torch.equal(logits(exported, student), before)
    assert torch.equal(logits(later, student), logits(wrapper, student))
    assert not torch.equal(logits(later, student), before)


@every_student
def test_the_exported_student_can_be_wrapped_and_trained(student: Student) -> None:
    wrapper = trained(student)
    exported = export_student(wrapper)
    rewrapped = ExFMWrapper(exported, tap=student.tap)
    rewrapped.exfm.load_state_dict(wrapper.exfm.state_dict())
    assert train(rewrapped.train(), student, 2) == train(wrapper, student, 2)


class Quirky(nn.Module):
    """A model with buffers of both kinds, a frozen and a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.encode = nn.Linear(5, 5, bias=False)
        self.decode = nn.Linear(5, 5, bias=False)
        self.decode.weight = self.encode.weight
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("shift", torch.tensor(3.0), persistent=False)
        self.head = nn.Linear(5, 1)

    def forward(self, batch: HandBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        hidden = self.decode(self.encode(self.norm(batch.numbers)).relu())
        scores = self.head(hidden)[:, 0] * self.scale + self.shift
        loss = nn.functional.binary_cross_entropy_with_logits(scores, batch.clicked)
        return loss, (loss.detach(), scores.detach(), batch.clicked)


def quirky() -> Student:
    return Student(lambda seed: Quirky(), "head", make_hand_batch)


def test_buffers_and_frozen_parameters_are_exported() -> None:
    wrapper = trained(quirky())
    exported = export_student(wrapper)
    assert exported.norm.num_batches_tracked == 2
    assert torch.equal(exported.norm.running_var, wrapper.student.norm.running_var)
    assert exported.scale.requires_grad is False and exported.encode.weight.requires_grad
    assert torch.equal(logits(exported, quirky()), logits(wrapper, quirky()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_outside_the_state_are_exported_as_they_are(device: str) -> None:
    with torch.device(device):
        module = Quirky()
    wrapper = ExFMWrapper(module, tap="head")
    if device == "meta":
        wrapper.student.to_empty(device="cpu").load_state_dict(Quirky().state_dict())
    wrapper.student.shift.fill_(-4.5)
    exported = export_student(wrapper)
    assert exported.shift.item() == -4.5
    assert torch.equal(logits(exported, quirky()), logits(wrapper, quirky()))


def test_a_shared_parameter_is_exported_as_one() -> None:
    wrapper = trained(quirky())
    exported = export_student(wrapper)
    assert len(list(exported.parameters())) == len(list(Quirky().parameters()))
    assert exported.decode.weight is exported.encode.weight


def test_a_model_without_a_wrapper_is_refused() -> None:
    for function in (export_student, student_state_dict):
        with pytest.raises(ValueError, match="hold an ExFMWrapper; received Linear without one"):
            function(nn.Linear(2, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@every_student
@pytest.mark.parametrize("moved", ["before", "after"])
def test_a_student_from_the_gpu_is_exported_to_the_cpu(student: Student, moved: str) -> None:
    module = student.factory(0)
    if moved == "before":
        module = module.cuda()
    wrapper = ExFMWrapper(module, tap=student.tap).cuda()
    exported = export_student(wrapper)
    tensors = [*exported.parameters(), *exported.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert torch.equal(logits(exported, student), logits(student.factory(0), student))
