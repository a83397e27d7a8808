"""The student adapter: what it learns, what from, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import make_teacher
from torch import Tensor

from torchrec_exfm import (
    AuxiliaryHead,
    DistillationTerm,
    StudentAdapter,
    Task,
    TeacherOutputs,
    adapter_step,
)

B = 12
TASKS = (Task(name="click"), Task(name="minutes", regression=True))


def make_adapter(
    seed: int = 0, *, teachers: int = 2, tasks: tuple[Task, ...] = TASKS
) -> StudentAdapter:
    """Return an adapter after some training: no layer is 0."""
    torch.manual_seed(seed)
    adapter = StudentAdapter(num_teachers=teachers, tasks=tasks, hidden=(4,))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return adapter


def make_labels(seed: int = 0, tasks: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (B, tasks), generator=generator).float()


def gradients(adapter: StudentAdapter, teacher: TeacherOutputs, labels: Tensor) -> list[Tensor]:
    loss = adapter.loss(adapter(teacher), teacher, labels)
    return [loss, *torch.autograd.grad(loss, list(adapter.parameters()))]


def test_starts_as_the_identity_within_the_limits() -> None:
    values = torch.tensor([[-15.0, -1e6], [0.1, 0.0], [1e4, 3e7], [-1e4, 0.5]])
    adapter = StudentAdapter(tasks=TASKS)
    expected = [[-15.0, -1e6], [0.1, 0.0], [15.0, 3e7], [-15.0, 0.5]]
    assert torch.equal(adapter(TeacherOutputs(values))[:, 0], torch.tensor(expected))


def reference_loss(
    parameters: list[np.ndarray], teacher: TeacherOutputs, labels: Tensor, count: Tensor
) -> float:
    """Return L_SA for TASKS and one hidden layer per teacher, in float64."""
    limits, loss = np.array([15.0, np.inf]), 0.0
    for m in range(teacher.values.shape[1]):
        present = teacher.presence[:, m].double().numpy()
        values = np.clip(teacher.values[:, m].double().numpy(), -limits, limits)
        w1, b1, w2, b2 = parameters[m * 4 : m * 4 + 4]
        hidden = np.maximum(np.hstack([values, present]) @ w1.T + b1, 0)
        z, y = values + hidden @ w2.T + b2, labels.double().numpy()
        losses = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
        losses[:, 1] = (z[:, 1] - y[:, 1]) ** 2
        loss += (present * losses).sum(0) @ (1 / count[m].double().numpy()) / 2
    return float(loss)


@pytest.mark.parametrize("with_count", [False, True])
def test_loss_and_gradients_against_finite_differences(with_count: bool) -> None:
    adapter, labels = make_adapter(), make_labels()
    teacher = make_teacher(1, B, teachers=2, tasks=2, missing=0.4)
    teacher.values[5] *= 100
    counts = teacher.presence.sum(0) * (0.75 if with_count else 1)
    loss = adapter.loss(adapter(teacher), teacher, labels, counts if with_count else None)
    loss.backward()
    arrays = [parameter.detach().double().numpy().copy() for parameter in adapter.parameters()]
    assert loss.item() == pytest.approx(reference_loss(arrays, teacher, labels, counts), rel=1e-6)
    for parameter, array in zip(adapter.parameters(), arrays, strict=True):
        numeric = np.zeros_like(array)
        for index, value in np.ndenumerate(array):
            ends = []
            for step in (1e-5, -1e-5):
                array[index] = value + step
                ends.append(reference_loss(arrays, teacher, labels, counts))
            array[index] = value
            numeric[index] = (ends[0] - ends[1]) / 2e-5
        scale = np.abs(numeric).max()
        assert scale > 0
        np.testing.assert_allclose(parameter.grad.double(), numeric, rtol=1e-6, atol=1e-6 * scale)


def test_extreme_logits_stay_finite() -> None:
    values = torch.tensor([1e4, -1e4, 1e30, -1e30])
    adapter = make_adapter(teachers=1, tasks=(Task(),))
    teacher, labels = TeacherOutputs(values), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert all(torch.isfinite(value).all() for value in gradients(adapter, teacher, labels))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    for _ in range(3):
        assert torch.isfinite(adapter_step(adapter, optimizer, teacher, labels)).all()


def test_masked_examples_have_no_influence() -> None:
    adapter, labels = make_adapter(tasks=(Task(),)), make_labels(tasks=1)
    presence = torch.rand(B, 2, 1, generator=torch.Generator().manual_seed(3)) < 0.5
    presence[0], presence[1] = False, True
    values = torch.randn(B, 2, 1, generator=torch.Generator().manual_seed(4))
    other_values = torch.where(presence, values, float("nan"))
    other_labels = labels.clone()
    other_labels[0] = 1 - labels[0]
    before = gradients(adapter, TeacherOutputs(values, presence), labels)
    after = gradients(adapter, TeacherOutputs(other_values, presence), other_labels)
    assert all(map(torch.equal, before, after))
    other_labels[1] = 1 - labels[1]
    changed = gradients(adapter, TeacherOutputs(values, presence), other_labels)
    assert not any(map(torch.equal, before, changed))


def test_without_any_teacher_the_step_changes_nothing() -> None:
    adapter = make_adapter(teachers=1)
    before = copy.deepcopy(adapter.state_dict())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    adapter_step(adapter, optimizer, TeacherOutputs.missing(B, 1, 2), make_labels())
    assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())


def test_no_gradient_comes_from_the_student_or_goes_to_the_teacher() -> None:
    adapter, labels = make_adapter(teachers=1), make_labels()
    source = torch.randn(B, 2, requires_grad=True)
    teacher = TeacherOutputs(source * 1.0)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapted = adapter_step(adapter, optimizer, teacher, labels)
    assert not adapted.requires_grad
    terms = [DistillationTerm(adapted=True)]
    head = AuxiliaryHead(3, terms=terms, tasks=TASKS)
    shared = torch.randn(B, 3, requires_grad=True)
    head(shared, teacher, adapted=adapted)[0].backward()
    assert shared.grad is not None and shared.grad.any()
    assert source.grad is None
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_teachers_do_not_influence_one_another() -> None:
    adapter, labels = make_adapter(), make_labels()
    teacher = make_teacher(1, B, teachers=2, tasks=2, missing=0.3)
    outputs, (_, *grads) = adapter(teacher), gradients(adapter, teacher, labels)
    for m in range(2):
        values, presence = teacher.values.clone(), teacher.presence.clone()
        values[:, m] += 1.5
        presence[::2, m] = True
        other = TeacherOutputs(values, presence)
        assert torch.equal(adapter(other)[:, 1 - m], outputs[:, 1 - m])
        assert not torch.equal(adapter(other)[:, m], outputs[:, m])
        _, *changed = gradients(adapter, other, labels)
        same = [torch.equal(*pair) for pair in zip(changed, grads, strict=True)]
        assert all(same[4 * (1 - m) :][:4]) and not any(same[4 * m :][:4])


def test_adapter_step_is_a_plain_step_and_leaves_no_gradient() -> None:
    adapter, labels = make_adapter(), make_labels()
    teacher = make_teacher(1, B, teachers=2, tasks=2, missing=0.3)
    _, *grads = gradients(adapter, teacher, labels)
    rate = 0.125
    pairs = zip(adapter.parameters(), grads, strict=True)
    expected = [parameter.detach() - rate * grad for parameter, grad in pairs]
    assert all(grad.any() for grad in grads)
    for parameter in adapter.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)  # must not affect the step
    with torch.no_grad():
        optimizer = torch.optim.SGD(adapter.parameters(), lr=rate)
        adapted = adapter_step(adapter, optimizer, teacher, labels)
    assert all(map(torch.equal, adapter.parameters(), expected))
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert torch.equal(adapted, adapter(teacher))


class Recorder(torch.optim.SGD):
    """Records the gradients of a step, and changes no parameter."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        self.gradients = [parameter.grad.clone() for parameter in group["params"]]


@pytest.mark.parametrize("hidden", [(), (4,), (7, 6)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_the_gradients_are_those_of_autograd(
    hidden: tuple[int, ...], weighted: bool, missing: float
) -> None:
    """In float64, for binary tasks, regressions and both, one teacher and three."""
    generator = torch.Generator().manual_seed(5)
    for tasks, teachers in itertools.product((TASKS[:1], TASKS[1:], TASKS), (1, 3)):
        adapter = StudentAdapter(num_teachers=teachers, tasks=tasks, hidden=hidden).double()
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        teacher = make_teacher(1, B, teachers=teachers, tasks=len(tasks), missing=missing)
        teacher.values = 10 * teacher.values.double()
        labels = make_labels(tasks=len(tasks))
        labels[torch.rand(labels.shape, generator=generator) < missing] = torch.nan
        weights = make_labels(6, tasks=len(tasks)) * 1.7 if weighted else None
        count = torch.rand(teachers, len(tasks), generator=generator, dtype=torch.float64) + 3
        outputs, factors = adapter(teacher), 1.0 if weights is None else weights.unsqueeze(1)
        targets = labels.double().nan_to_num(0).unsqueeze(1).expand_as(outputs)
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        squares = torch.tensor([task.regression for task in tasks])
        losses = torch.where(squares, (outputs - targets) ** 2, losses) * factors
        losses = torch.where(teacher.presence & ~labels.isnan().unsqueeze(1), losses, 0)
        loss = (losses.sum(0) / count).mean(1).sum()
        expected = torch.autograd.grad(loss, list(adapter.parameters()))
        recorder = Recorder(adapter.parameters(), lr=0.0)
        adapter_step(adapter, recorder, teacher, labels, count=count, weights=weights)
        assert all(gradient.any() for gradient in expected)
        torch.testing.assert_close(recorder.gradients, list(expected), rtol=1e-12, atol=1e-14)


def test_an_output_that_overflows_without_a_label_has_no_influence() -> None:
    adapter = make_adapter(teachers=1, tasks=TASKS[1:])
    values, labels = (
        torch.randn(B, generator=torch.Generator().manual_seed(2)),
        make_labels(tasks=1),
    )
    labels[3], recorder = torch.nan, Recorder(adapter.parameters(), lr=0.0)
    for value in (0.0, 3e38):  # of which the derivative overflows
        values[3] = value
        adapter_step(adapter, recorder, TeacherOutputs(values), labels)
        assert all(gradient.isfinite().all() for gradient in recorder.gradients)


def test_a_compiled_adapter_is_one_graph() -> None:
    adapter, labels = make_adapter(), make_labels()
    teacher = make_teacher(1, B, teachers=2, tasks=2, missing=0.3)
    labels[0, 0] = torch.nan
    compiled = torch.compile(
        lambda: adapter.loss(adapter(teacher), teacher, labels),
        backend="aot_eager",
        dynamic=False,
        fullgraph=True,
    )
    loss = compiled()
    expected = gradients(adapter, teacher, labels)
    actual = [loss, *torch.autograd.grad(loss, list(adapter.parameters()))]
    torch.testing.assert_close(actual, expected)


def test_a_subclass_is_refused() -> None:
    """A subclass might change the loss whose gradient is hard-coded."""
    with pytest.raises(TypeError, match=r"should have no subclass.*received Other"):

        class Other(StudentAdapter):
            pass


def _frozen(adapter: StudentAdapter) -> None:
    next(adapter.parameters()).requires_grad_(False)


def _with_another_layer(adapter: StudentAdapter) -> None:
    adapter.mlps[0].insert(2, torch.nn.LayerNorm(32))


def _tied(adapter: StudentAdapter) -> None:
    adapter.mlps[1] = adapter.mlps[0]


def _hooked(adapter: StudentAdapter) -> None:
    adapter.mlps[0].register_forward_hook(lambda *_: None)


def _normed(adapter: StudentAdapter) -> None:
    torch.nn.utils.parametrizations.weight_norm(adapter.mlps[0][0])


@pytest.mark.parametrize("change", [_frozen, _with_another_layer, _tied, _hooked, _normed])
def test_layers_whose_gradient_is_not_known_are_refused(change: Any) -> None:
    adapter, teacher = StudentAdapter(num_teachers=2), make_teacher(0, B, teachers=2)
    change(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="should have the layers that StudentAdapter makes"):
        adapter_step(adapter, optimizer, teacher, make_labels(tasks=1))


def trained(tasks: tuple[Task, ...], sample: Callable[..., Any]) -> StudentAdapter:
    torch.manual_seed(0)
    adapter = StudentAdapter(tasks=tasks)
    for epoch, rate in enumerate((0.05, 0.01, 0.002)):
        optimizer = torch.optim.Adam(adapter.parameters(), lr=rate)
        for step in range(30):
            adapter_step(adapter, optimizer, *sample(1000 * epoch + step, 8192))
    return adapter


def test_calibrates_a_stale_teacher_on_examples_it_has_not_seen() -> None:
    def sample(seed: int, size: int) -> tuple[TeacherOutputs, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(size, generator=generator) - 1.5
        labels = torch.rand(size, generator=generator) < logits.sigmoid()
        return TeacherOutputs(1.7 * logits + 1.0), labels.float()

    adapter = trained((Task(),), sample)
    teacher, labels = sample(10_000, 200_000)
    raw, adapted = teacher.values, adapter(teacher).detach()
    assert adapted.sigmoid().mean() / labels.mean() == pytest.approx(1.0, abs=0.02)
    assert raw.sigmoid().mean() / labels.mean() > 1.1
    losses = [adapter.loss(outputs, teacher, labels).item() for outputs in (adapted, raw)]
    assert losses[0] < 0.97 * losses[1]


def test_calibrates_a_task_of_regression() -> None:
    def sample(seed: int, size: int) -> tuple[TeacherOutputs, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        truth = 2.0 * torch.randn(size, generator=generator) + 5.0
        noise = 0.5 * torch.randn(size, generator=generator)
        return TeacherOutputs(0.6 * truth + 0.5 + noise), truth

    adapter = trained((Task(regression=True),), sample)
    teacher, labels = sample(10_000, 20_000)
    adapted = adapter(teacher).detach()
    assert adapted.mean() / labels.mean() == pytest.approx(1.0, abs=0.02)
    loss = adapter.loss(adapted, teacher, labels).item()
    assert loss < 0.5 * adapter.loss(teacher.values, teacher, labels).item()


def test_wrong_labels_and_shapes_are_refused() -> None:
    adapter = make_adapter(teachers=1, tasks=(Task(),))
    teacher = make_teacher(1, B)
    outputs = adapter(teacher)
    expected = rf"labels should be .*\({B}, 1\) or \({B},\); received"
    with pytest.raises(ValueError, match=rf"{expected} NoneType.*where they are \(labels="):
        adapter.loss(outputs, teacher, None)
    for shape in ((B - 1,), (B, 2), (1, B), ()):
        with pytest.raises(ValueError, match=expected):
            adapter.loss(outputs, teacher, torch.zeros(shape))
    flat, column = torch.ones(B), torch.ones(B, 1, dtype=torch.int64)
    losses = [adapter.loss(outputs, teacher, labels) for labels in (flat, column)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"\(B, 1, 1\) .*received \(12, 2, 1\)"):
        adapter(make_teacher(1, B, teachers=2))
    with pytest.raises(ValueError, match=r"tasks should be distinct names.*\['label', 'label'\]"):
        StudentAdapter(tasks=(Task(), Task()))


def test_a_label_without_a_dimension_is_refused_even_for_one_example() -> None:
    adapter, teacher = make_adapter(teachers=1, tasks=(Task(),)), make_teacher(1, 1)
    with pytest.raises(ValueError, match=r"labels should be .*\(1, 1\) or \(1,\); received \(\)"):
        adapter.loss(adapter(teacher), teacher, torch.tensor(1.0))
