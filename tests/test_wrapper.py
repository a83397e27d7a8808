"""The wrapped student: its own loss plus the heads', and nothing of its own touched."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from models import Student, make_batch, make_teacher, students
from torch import Tensor, nn

from torchrec_exfm import DistillationTerm, ExFMBatch, ExFMWrapper, TeacherOutputs

STUDENTS = students()
TERMS = (
    DistillationTerm(alpha=2.0, beta=0.5, weight=1.5, hidden=(6,)),
    DistillationTerm(adapted=True, beta=3.0, weight=0.25, hidden=()),
)
every_student = pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS.keys())


def wrapped(student: Student, *terms: DistillationTerm, seed: int = 0) -> ExFMWrapper:
    terms = terms or (DistillationTerm(hidden=(6,)),)
    return ExFMWrapper(student.factory(seed), tap=student.tap, terms=terms)


def supervised(student: Student, seed: int = 0) -> ExFMBatch[Any]:
    return ExFMBatch(student.make_batch(seed, 8), make_teacher(seed, 8, missing=0.3))


def tapped_input(module: nn.Module, tap: str, batch: Any) -> Tensor:
    """What the tapped module is called with, by a hook of the test's own."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.extend([*args, *kwargs.values()])

    handle = module.get_submodule(tap).register_forward_pre_hook(keep, with_kwargs=True)
    module(batch)
    handle.remove()
    (shared,) = seen
    return shared


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for item in value for leaf in flat(item)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return grads


def bare_gradients(student: Student, batch: Any) -> dict[str, Tensor]:
    bare = student.factory(0)
    bare(batch)[0].backward()
    return gradients(bare)


@every_student
def test_loss_is_the_students_plus_the_weighted_terms(student: Student) -> None:
    wrapper, batch = wrapped(student, *TERMS), supervised(student)
    batch.adapted = batch.teacher.values - 0.5
    loss, rest = wrapper(batch)

    bare = student.factory(0)
    bare_loss, bare_rest = bare(batch.batch)
    shared = tapped_input(bare, student.tap, batch.batch).detach().double().numpy()
    present = batch.teacher.presence.flatten().numpy()
    terms = []
    for k, source in enumerate((batch.teacher.values, batch.adapted)):
        values = source.flatten().double().numpy()
        labels = np.minimum(TERMS[k].alpha / (1 + np.exp(-values)), 1)
        weights = [
            p.detach().double().numpy() for p in wrapper.auxiliary_head.heads[k].parameters()
        ]
        hidden = shared if k else np.maximum(shared @ weights[0].T + weights[1], 0)
        z = (hidden @ weights[-2].T + weights[-1])[:, 0]
        losses = labels * np.logaddexp(0, -z) + (1 - labels) * np.logaddexp(0, z)
        terms.append(losses[present].mean())
    added = 1.5 * terms[0] + 0.25 * terms[1]
    assert loss.item() == pytest.approx(bare_loss.item() + added, rel=1e-6)
    assert wrapper.last_losses.tolist() == pytest.approx(terms, rel=1e-6)
    assert wrapper.last_teacher is batch.teacher
    assert all(map(torch.equal, flat(rest), flat(bare_rest)))
    assert type(rest) is type(bare_rest) and len(rest) == len(bare_rest) == 3


@every_student
def test_the_student_is_given_the_users_own_batch(student: Student) -> None:
    wrapper, batch = wrapped(student), supervised(student)
    seen: list[Any] = []
    wrapper.student.register_forward_pre_hook(lambda _, args: seen.extend(args))
    wrapper(batch)
    wrapper.eval()(batch)
    wrapper(batch.batch)
    assert len(seen) == 3 and all(given is batch.batch for given in seen)


@every_student
def test_keys_are_the_students_under_a_prefix(student: Student) -> None:
    keys = list(wrapped(student).state_dict())
    own = [key.removeprefix("student.") for key in keys if key.startswith("student.")]
    assert own == list(student.factory(0).state_dict())
    assert {key.split(".")[0] for key in keys} == {"student", "exfm"}


@every_student
def test_the_students_initialisation_is_as_without_the_wrapper(student: Student) -> None:
    module = student.factory(5)
    before = torch.random.get_rng_state()
    wrapper = ExFMWrapper(module, tap=student.tap)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert wrapper.student is module
    expected = student.factory(5).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in module.state_dict().items())


@every_student
@pytest.mark.parametrize("weight", [0.0, 1.0, 1e4])
def test_the_serving_head_has_no_gradient_of_the_teachers(student: Student, weight: float) -> None:
    batch = supervised(student)
    expected = bare_gradients(student, batch.batch)
    wrapper = wrapped(student, DistillationTerm(hidden=(6,), weight=weight))
    wrapper(batch)[0].backward()
    actual = gradients(wrapper.student)
    head = [name for name in expected if name.startswith(f"{student.tap}.")]
    backbone = [name for name in expected if name not in head]
    assert head and backbone
    assert all(torch.equal(actual[name], expected[name]) for name in head)
    same = [torch.equal(actual[name], expected[name]) for name in backbone]
    assert all(same) if weight == 0 else not any(same)
    assert all(grad.any() == (weight > 0) for grad in gradients(wrapper.auxiliary_head).values())


@every_student
def test_a_step_without_any_teacher_is_the_bare_students(student: Student) -> None:
    batch = ExFMBatch(student.make_batch(0, 8), TeacherOutputs.missing(8))
    expected = bare_gradients(student, batch.batch)
    wrapper = wrapped(student)
    wrapper(batch)[0].backward()
    actual = gradients(wrapper.student)
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())
    assert not any(grad.any() for grad in gradients(wrapper.auxiliary_head).values())


@every_student
def test_evaluation_is_the_students_own(student: Student) -> None:
    batch = supervised(student)
    expected = student.factory(0).eval()(batch.batch)
    wrapper = wrapped(student).eval()
    for given in (batch, batch.batch):
        outputs = wrapper(given)
        assert type(outputs) is type(expected)
        assert all(map(torch.equal, flat(outputs), flat(expected)))
    assert wrapper.last_losses is None and wrapper.last_teacher is None
    wrapper.train()(batch)[0].backward()
    assert wrapper.last_losses is not None


def test_wrapping_again_leaves_one_tap() -> None:
    student, batch = STUDENTS["dlrm"], supervised(STUDENTS["dlrm"])
    module = student.factory(0)
    users = module.get_submodule(student.tap).register_forward_pre_hook(lambda *_: None)
    first = ExFMWrapper(module, tap="model.dense_arch")
    second = ExFMWrapper(module, tap=student.tap, terms=[DistillationTerm(hidden=(6,))])
    hooks = [hook for m in module.modules() for hook in m._forward_pre_hooks.values()]
    assert sum(len(m._forward_pre_hooks_with_kwargs) for m in module.modules()) == 1
    assert len(hooks) == 2 and users.id in module.get_submodule(student.tap)._forward_pre_hooks
    expected = wrapped(student)
    second.load_state_dict(expected.state_dict())
    assert torch.equal(second(batch)[0], expected(batch)[0])
    with pytest.raises(RuntimeError, match="ran 0 times"):
        first(batch)


@every_student
def test_a_deep_copy_trains_by_itself(student: Student) -> None:
    wrapper, batch = wrapped(student), supervised(student)
    loss, _ = wrapper(batch)
    copied = copy.deepcopy(wrapper)
    copied_loss, _ = copied(batch)
    assert torch.equal(copied_loss, loss)
    copied_loss.backward()
    assert all(parameter.grad is None for parameter in wrapper.parameters())
    assert all(grad is not None for grad in gradients(copied).values())


def test_a_failed_step_leaves_nothing_behind() -> None:
    student = STUDENTS["dlrm"]
    wrapper, batch = wrapped(student), supervised(student)
    with pytest.raises(ValueError, match="teacher outputs should be of shape"):
        wrapper(ExFMBatch(batch.batch, make_teacher(0, 7)))
    with pytest.raises(TypeError, match="should be given an ExFMBatch; received Batch: let"):
        wrapper(make_batch())
    assert torch.equal(wrapper(batch)[0], wrapped(student)(batch)[0])


def test_a_student_that_runs_by_itself_leaves_no_graph_behind() -> None:
    student = STUDENTS["dlrm"]
    wrapper, batch = wrapped(student), supervised(student)
    shared = tapped_input(wrapper.student, student.tap, batch.batch)
    alive = weakref.ref(shared)
    del shared
    assert alive() is None
    assert torch.equal(copy.deepcopy(wrapper)(batch)[0], wrapper(batch)[0])


def test_mixed_precision_changes_little() -> None:
    student = STUDENTS["dlrm"]
    wrapper, batch = wrapped(student), supervised(student)
    loss, _ = wrapper(batch)
    exact = torch.autograd.grad(loss, list(wrapper.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = wrapper(batch)
    assert loss.dtype == wrapper.last_losses.dtype == torch.float32
    for grad, reference in zip(
        torch.autograd.grad(loss, list(wrapper.parameters())), exact, strict=True
    ):
        assert (grad - reference).norm() < 0.05 * reference.norm()
