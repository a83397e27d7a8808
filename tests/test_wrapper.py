"""The wrapped student: its own loss plus the heads', and the student itself unchanged."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from models import HandTrain, Student, make_batch, make_teacher, students
from torch import Tensor, nn

from torchrec_exfm import DistillationTerm, ExFMBatch, ExFMWrapper, TeacherOutputs

STUDENTS = students()
TERMS = (
    DistillationTerm(alpha=2.0, beta=0.5, weight=1.5, hidden=(6,)),
    DistillationTerm(adapted=True, beta=3.0, weight=0.25, hidden=()),
)
SERVING = DistillationTerm(serving=True, weight=0.7)
every_student = pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS.keys())
GIVES_LOGITS = {name: student for name, student in STUDENTS.items() if name != "deepfm"}
students_of_logits = pytest.mark.parametrize(
    "student", GIVES_LOGITS.values(), ids=GIVES_LOGITS.keys()
)


def wrapped(student: Student, *terms: DistillationTerm, seed: int = 0) -> ExFMWrapper:
    terms = terms or (DistillationTerm(hidden=(6,)),)
    return ExFMWrapper(student.factory(seed), tap=student.tap, terms=terms)


def supervised(student: Student, seed: int = 0) -> ExFMBatch[Any]:
    return ExFMBatch(student.make_batch(seed, 8), make_teacher(seed, 8, missing=0.3))


def adapt(batch: ExFMBatch[Any], adapted: Tensor) -> None:
    """Give a batch an adapter's outputs."""
    batch.step_inputs = dataclasses.replace(batch.step_inputs, adapted=adapted)


def tapped_input(module: nn.Module, tap: str, batch: Any) -> Tensor:
    """Return the tapped module's input, by a hook of the test."""
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
    adapt(batch, batch.teacher.values - 0.5)
    loss, rest = wrapper(batch)

    bare = student.factory(0)
    bare_loss, bare_rest = bare(batch.batch)
    shared = tapped_input(bare, student.tap, batch.batch).detach().double().numpy()
    present = batch.teacher.presence.flatten().numpy()
    terms = []
    for k, source in enumerate((batch.teacher.values, batch.step_inputs.adapted)):
        values = source.flatten().double().numpy()
        labels = np.minimum(TERMS[k].alpha / (1 + np.exp(-values)), 1)
        weights = [
            p.detach().double().numpy() for p in wrapper.auxiliary_head.term_losses[k].parameters()
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
    assert len(seen) == 3 and all(received is batch.batch for received in seen)


@every_student
def test_keys_are_the_students_under_a_prefix(student: Student) -> None:
    keys = list(wrapped(student).state_dict())
    student_keys = [key.removeprefix("student.") for key in keys if key.startswith("student.")]
    assert student_keys == list(student.factory(0).state_dict())
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
    for inputs in (batch, batch.batch):
        outputs = wrapper(inputs)
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


@pytest.mark.parametrize("terms", [(), (SERVING,), (SERVING, TERMS[0])], ids=len)
def test_mixed_precision_changes_little(terms: tuple[DistillationTerm, ...]) -> None:
    student = STUDENTS["dlrm"]
    wrapper, batch = wrapped(student, *terms), supervised(student)
    loss, _ = wrapper(batch)
    exact = torch.autograd.grad(loss, list(wrapper.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = wrapper(batch)
    assert loss.dtype == wrapper.last_losses.dtype == torch.float32
    for grad, reference in zip(
        torch.autograd.grad(loss, list(wrapper.parameters())), exact, strict=True
    ):
        assert (grad - reference).norm() < 0.05 * reference.norm()


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        scale = 1e-5 * grad.abs().max().item()
        torch.testing.assert_close(actual[name], grad, rtol=1e-5, atol=scale)


def with_labels(batch: Any, labels: Tensor) -> Any:
    """Return the batch with other labels."""
    other = copy.copy(batch)
    setattr(other, "clicked" if hasattr(batch, "clicked") else "labels", labels)
    return other


@students_of_logits
@pytest.mark.parametrize("adapted", [False, True])
def test_a_serving_term_is_training_on_mixed_labels(student: Student, adapted: bool) -> None:
    """h(z, y) + w h(z, y') = (1 + w) h(z, (y + w y') / (1 + w))."""
    w = 0.7
    batch = ExFMBatch(student.make_batch(0, 8), make_teacher(0, 8))
    adapt(batch, 2 * batch.teacher.values - 1)
    wrapper = wrapped(student, DistillationTerm(serving=True, adapted=adapted, weight=w))
    loss, (_, _, labels) = wrapper(batch)
    loss.backward()

    soft = (
        (batch.step_inputs.adapted if adapted else batch.teacher.values)
        .flatten()
        .double()
        .sigmoid()
    )
    mixed = with_labels(batch.batch, ((labels + w * soft) / (1 + w)).float())
    bare_loss, _ = student.factory(0)(mixed)
    assert loss.item() == pytest.approx((1 + w) * bare_loss.item(), rel=1e-6)
    expected = {name: (1 + w) * grad for name, grad in bare_gradients(student, mixed).items()}
    assert_near(gradients(wrapper.student), expected)


@students_of_logits
@pytest.mark.parametrize("order", [1, -1])
def test_heads_beside_a_serving_term(student: Student, order: int) -> None:
    """Their gradients add up in any order; the serving head's comes from its own term alone."""
    batch, terms = supervised(student), [SERVING, TERMS[0]]
    adapt(batch, batch.teacher.values)
    both = wrapped(student, *terms[::order])
    both(batch)[0].backward()
    alone = [wrapped(student, term) for term in terms]
    heads = both.auxiliary_head.term_losses[order == 1].heads
    alone[1].auxiliary_head.term_losses[0].heads = copy.deepcopy(heads)
    for wrapper in alone:
        wrapper.zero_grad()
        wrapper(batch)[0].backward()
    bare = bare_gradients(student, batch.batch)
    serving_gradients, head_gradients = (gradients(wrapper.student) for wrapper in alone)
    expected = {name: serving_gradients[name] + head_gradients[name] - bare[name] for name in bare}
    assert_near(gradients(both.student), expected)
    head = [name for name in bare if name.startswith(student.head)]
    actual = {name: both.student.get_parameter(name).grad for name in head}
    assert_near(actual, {name: serving_gradients[name] for name in head})
    assert not any(torch.equal(serving_gradients[name], bare[name]) for name in bare)


@students_of_logits
def test_a_serving_term_learns_from_what_is_there(student: Student) -> None:
    wrapper, batch = wrapped(student, SERVING), supervised(student)
    loss, _ = wrapper(batch)
    loss.backward()
    bare, logits = student.factory(0), list[Tensor]()
    bare.get_submodule(student.tap).register_forward_hook(lambda *call: logits.append(call[-1]))
    expected, _ = bare(batch.batch)
    here = batch.teacher.presence.flatten()
    assert 0 < here.sum() < len(here)
    soft = batch.teacher.values.flatten().sigmoid()[here]
    term = nn.functional.binary_cross_entropy_with_logits(logits[0].flatten()[here], soft)
    (expected + SERVING.weight * term).backward()
    assert wrapper.last_losses.tolist() == pytest.approx([term.item()], rel=1e-6)
    assert_near(gradients(wrapper.student), gradients(bare))


@students_of_logits
@pytest.mark.parametrize("case", ["weight 0", "no teacher"])
def test_a_serving_term_that_teaches_nothing(student: Student, case: str) -> None:
    weight = 0.0 if case == "weight 0" else 1.0
    wrapper = wrapped(student, DistillationTerm(serving=True, weight=weight))
    teacher = make_teacher(0, 8) if case == "weight 0" else TeacherOutputs.missing(8)
    batch = ExFMBatch(student.make_batch(0, 8), teacher)
    wrapper(batch)[0].backward()
    expected = bare_gradients(student, batch.batch)
    actual = gradients(wrapper.student)
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


def test_logits_that_the_student_changes_in_place_are_taken_as_they_were() -> None:
    class Probabilities(HandTrain):
        in_place = False

        def forward(self, batch: Any) -> Any:
            inputs = torch.cat([self.lookup(batch.ids).values(), batch.numbers], dim=1)
            scores = self.score(self.norm(self.trunk(inputs).tanh()))
            scores = scores.squeeze_(1).sigmoid_() if self.in_place else scores[:, 0].sigmoid()
            loss = nn.functional.binary_cross_entropy(scores, batch.clicked)
            return loss, (loss.detach(), scores.detach(), batch.clicked)

    results = []
    for in_place in (False, True):
        torch.manual_seed(0)
        wrapper = ExFMWrapper(Probabilities(), tap="score", terms=[SERVING])
        wrapper.student.in_place = in_place
        wrapper(supervised(STUDENTS["hand_written"]))[0].backward()
        results.append((wrapper.last_losses, gradients(wrapper)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@students_of_logits
def test_the_taps_of_a_serving_term_leave_nothing_behind(student: Student) -> None:
    module, batch = student.factory(0), supervised(student)
    users = module.get_submodule(student.tap).register_forward_hook(lambda *_: None)
    wrapper = ExFMWrapper(module, tap=student.tap, terms=[SERVING])
    expected = module.eval()(batch.batch)
    assert all(map(torch.equal, flat(wrapper.eval()(batch)), flat(expected)))
    for mode in (False, True):
        wrapper.train(mode)(batch)
        wrapper.student(batch.batch)
        (used,) = wrapper.exfm.taps
        assert not any(isinstance(value, Tensor) for value in vars(used).values())
    copied = copy.deepcopy(wrapper)
    loss, _ = copied(batch)
    loss.backward()
    assert torch.equal(loss, wrapper(batch)[0])
    assert all(parameter.grad is None for parameter in wrapper.parameters())
    rewrapped = ExFMWrapper(module, tap=student.tap)
    hooks = [key for part in module.modules() for key in part._forward_hooks]
    assert hooks == [users.id]
    rewrapped(batch)[0].backward()
