"""Missing labels and examples' weights in heads, margins and adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import CPU, dlrm_train, make_batch, make_teacher
from torch import Tensor

from torchrec_exfm import (
    AuxiliaryHead,
    DistillationTerm,
    ExFMWrapper,
    StudentAdapter,
    Task,
    TeacherOutputs,
    TrainPipelineExFM,
    adapter_step,
)

B, D = 12, 5
NAN, INF = float("nan"), float("inf")
TASKS = (Task(name="click"), Task(name="minutes", regression=True))
TERMS = (
    DistillationTerm(alpha=1.5, beta=0.5, weight=0.7, hidden=(4,)),
    DistillationTerm(adapted=True, serving=True, margin=1.2),
    DistillationTerm(serving=True, tasks=("minutes",), margin=0.9, weight=2.0),
)


class Inputs:
    """The inputs of a head and an adapter, in float64 except for the teacher outputs."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 2, (B, 2), generator=generator).double()
        self.serving = torch.randn(B, 2, generator=generator).double()
        self.shared = torch.randn(B, D, generator=generator).double()
        noise = make_teacher(seed, B, tasks=2, missing=0.3)
        values = torch.stack([4 * self.labels[:, 0] - 2, self.labels[:, 1]], 1).unsqueeze(1)
        self.teacher = TeacherOutputs(values + 0.3 * noise.values, noise.presence)
        self.adapted = self.teacher.values.double() + 0.1
        self.weights: Tensor | None = None

    def rows(self, index: Any) -> Inputs:
        """Return some of the examples, in that order."""
        part = copy.copy(self)
        part.labels, part.serving = self.labels[index], self.serving[index]
        part.shared, part.adapted = self.shared[index], self.adapted[index]
        part.teacher = TeacherOutputs(self.teacher.values[index], self.teacher.presence[index])
        part.weights = None if self.weights is None else self.weights[index]
        return part


def make_head() -> AuxiliaryHead:
    torch.manual_seed(0)
    return AuxiliaryHead(D, terms=TERMS, tasks=TASKS).double()


def taught(head: AuxiliaryHead, inputs: Inputs, steps: int = 3) -> list[Tensor]:
    """Take some steps; return the last one's losses, gradients and running means."""
    for _ in range(steps):
        shared, serving = inputs.shared.requires_grad_(), inputs.serving.requires_grad_()
        loss, losses = head(
            shared,
            inputs.teacher,
            serving=serving,
            adapted=inputs.adapted,
            labels=inputs.labels,
            weights=inputs.weights,
        )
        gradients = torch.autograd.grad(loss, [shared, serving, *head.parameters()])
    return [loss, losses, *gradients, *(means.clone() for means in head.lead_losses)]


def adapter_taught(inputs: Inputs) -> list[Tensor]:
    """Return the adapter's loss, its gradients, and the outputs after a step."""
    torch.manual_seed(1)
    adapter = StudentAdapter(tasks=TASKS, hidden=(4,))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    loss = adapter.loss(
        adapter(inputs.teacher), inputs.teacher, inputs.labels, weights=inputs.weights
    )
    gradients = torch.autograd.grad(loss, list(adapter.parameters()))
    sgd = torch.optim.SGD(adapter.parameters(), lr=0.1)
    outputs = adapter_step(adapter, sgd, inputs.teacher, inputs.labels, weights=inputs.weights)
    return [loss, *gradients, outputs]


@pytest.mark.parametrize("case", ["one task", "both", "all", "all of one task"])
def test_a_missing_label_is_cut_out_of_the_margins_means_alone(case: str) -> None:
    """Outputs without a label still teach: the loss differs only by the margin's means."""
    inputs, head = Inputs(), make_head()
    complete = copy.deepcopy(inputs)
    missing = missing_of(case)
    inputs.labels[missing] = NAN
    taught(head, inputs)
    adapted, minutes = head.lead_losses
    means = torch.stack([adapted[:, 0], adapted[:, 1], minutes[:, 0]])
    for k, (t, source) in enumerate([(0, inputs.adapted), (1, inputs.adapted), (1, None)]):
        values = inputs.teacher.values.double() if source is None else source
        here = inputs.teacher.presence[:, 0, t] & ~missing[:, t]
        expected = [
            mean_loss(t, z[here].detach(), complete.labels[here, t])
            for z in (values[:, 0, t], inputs.serving[:, t])
        ]
        running = (1 - 0.99**3) * torch.stack(expected)
        torch.testing.assert_close(means[k].double(), running, rtol=1e-6, atol=1e-7)
    for value in taught(head, inputs):
        assert value.isfinite().all()


def missing_of(case: str) -> Tensor:
    some = torch.rand(B, 2, generator=torch.Generator().manual_seed(3)) < 0.4
    return {
        "one task": some & torch.tensor([True, False]),
        "both": some,
        "all": torch.ones_like(some),
        "all of one task": torch.tensor([False, True]).expand(B, 2),
    }[case]


def mean_loss(task: int, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss by another formula; 0 without examples."""
    if not len(outputs):
        return outputs.sum()
    if TASKS[task].regression:
        return (outputs - labels).square().mean()
    p = 1 / (1 + torch.exp(-outputs))
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()


@pytest.mark.parametrize("case", ["one task", "both", "all", "all of one task"])
def test_the_adapters_loss_is_over_the_labels_that_are_there(case: str) -> None:
    inputs, missing = Inputs(), missing_of(case)
    complete = copy.deepcopy(inputs)
    inputs.labels[missing] = NAN
    loss, *rest = adapter_taught(inputs)
    torch.manual_seed(1)
    adapter = StudentAdapter(tasks=TASKS, hidden=(4,))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    outputs = adapter(inputs.teacher)[:, 0].detach().double()
    expected = sum(
        mean_loss(t, outputs[here, t], complete.labels[here, t]) / 2
        for t in range(2)
        for here in [inputs.teacher.presence[:, 0, t] & ~missing[:, t]]
    )
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    assert all(value.isfinite().all() for value in rest)
    assert bool(rest[0].any()) == (case != "all")


@pytest.mark.parametrize("teach", [taught, adapter_taught])
def test_examples_without_any_label_are_those_cut_out(teach: Any) -> None:
    """For the adapter, which learns only from labels, and for the margin's means."""
    inputs = Inputs()
    missing = torch.arange(B) % 3 == 0
    inputs.labels[missing] = NAN
    cut = inputs.rows(~missing)
    if teach is adapter_taught:
        actual, expected = adapter_taught(inputs)[:-1], adapter_taught(cut)[:-1]
    else:
        heads = make_head(), make_head()
        taught(heads[0], inputs), taught(heads[1], cut)
        actual, expected = heads[0].lead_losses, heads[1].lead_losses
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("by_task", [False, True])
def test_weights_leave_out_and_repeat(by_task: bool) -> None:
    """0 equals leaving the example out, 2 equals having it twice: in losses, gradients, means."""
    inputs = Inputs()
    weights = torch.tensor([1.0, 0.0, 2.0] * (B // 3))
    inputs.weights = weights.unsqueeze(1).expand(B, 2) if by_task else weights
    rows = torch.arange(B).repeat_interleave(weights.int())
    repeated = inputs.rows(rows)
    repeated.weights = None

    actual = taught(make_head(), inputs)
    loss, losses, shared, serving, *rest = taught(make_head(), repeated)
    gradients = [
        torch.zeros(B, value.shape[1]).double().index_add_(0, rows, value)
        for value in (shared, serving)
    ]
    torch.testing.assert_close(actual, [loss, losses, *gradients, *rest], rtol=1e-6, atol=1e-7)
    loss, *gradients, _ = adapter_taught(inputs)
    expected, *others, _ = adapter_taught(repeated)
    torch.testing.assert_close([loss, *gradients], [expected, *others], rtol=1e-5, atol=1e-6)


def test_weights_by_task_are_each_tasks_own() -> None:
    inputs = Inputs()
    weights = torch.rand(B, 2, generator=torch.Generator().manual_seed(5))
    weights[::4, 0] = 0.0
    inputs.weights = weights
    head = make_head()
    head(
        inputs.shared,
        inputs.teacher,
        serving=inputs.serving,
        adapted=inputs.adapted,
        labels=inputs.labels,
        weights=weights,
    )
    adapted, _ = head.lead_losses
    for t in range(2):
        w = weights[:, t].double() * inputs.teacher.presence[:, 0, t]
        for row, z in enumerate((inputs.adapted[:, 0, t], inputs.serving[:, t])):
            losses = torch.stack(
                [mean_loss(t, z[b : b + 1], inputs.labels[b : b + 1, t]) for b in range(B)]
            )
            expected = 0.01 * (w * losses).sum() / w.sum()
            assert adapted[row, t].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("poison", [INF, -INF])
def test_infinite_labels_are_refused_by_the_tasks_name(poison: float) -> None:
    inputs = Inputs()
    inputs.labels[4, 1] = poison
    message = rf"labels should be finite, or NaN.*received {poison} for example 4, task 'minutes'"
    for teach in (adapter_taught, lambda inputs: taught(make_head(), inputs)):
        with pytest.raises(ValueError, match=message):
            teach(inputs)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.full((B,), -1.0), r"weights should be finite numbers >= 0; received -1.0 for"),
        (torch.full((B, 2), NAN), r"weights should be finite numbers >= 0; received nan for"),
        (torch.full((B,), INF), r"weights should be finite numbers >= 0; received inf for"),
        (torch.ones(B - 1), r"weights should be of shape \(12, 2\) or \(12,\); received \(11,\)"),
        (torch.ones(B, 3), r"weights should be of shape .*received \(12, 3\)"),
        ([1.0] * B, r"weights should be a tensor .*received list.*\(weights=\.\.\.\)"),
    ],
)
def test_wrong_weights_are_refused(weights: Any, message: str) -> None:
    inputs = Inputs()
    inputs.weights = weights
    for teach in (adapter_taught, lambda inputs: taught(make_head(), inputs)):
        with pytest.raises(ValueError, match=message):
            teach(inputs)


def pipeline_of(labels: Tensor, **options: Any) -> TrainPipelineExFM[Any, Any]:
    wrapper = ExFMWrapper(
        dlrm_train(),
        tap="model.over_arch",
        terms=[DistillationTerm(), DistillationTerm(adapted=True, serving=True, margin=0.5)],
    )
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    return TrainPipelineExFM(
        wrapper,
        optimizer,
        CPU,
        adapter=StudentAdapter(),
        labels=lambda batch: labels,
        **{"teacher": lambda batch: make_teacher(0, len(batch.labels)), **options},
    )


@pytest.mark.parametrize("missing", [[0], [0, 3, 5], list(range(8))])
def test_a_label_that_is_missing_ruins_no_student(missing: list[int]) -> None:
    labels = make_batch().labels.float()
    labels[missing] = NAN
    pipeline = pipeline_of(labels)
    batches = iter([make_batch(step) for step in range(4)])
    for _ in range(4):
        loss, _, _ = pipeline.progress(batches)
        assert loss.isfinite()
    modules = (pipeline._model, pipeline.adapter)
    assert all(value.isfinite().all() for module in modules for value in module.parameters())


def test_weights_are_read_from_the_batch_by_a_function() -> None:
    labels = make_batch().labels.float()
    pipeline = pipeline_of(labels, weights=lambda batch: batch.nothing)
    with pytest.raises(ValueError, match=r"weights should take the user's batch to its weights;"):
        pipeline.progress(iter([make_batch()]))
    students = []
    for options in ({"weights": lambda _: torch.zeros(8)}, {}):
        outputs = make_teacher(0, 8) if options else TeacherOutputs.missing(8)
        pipeline = pipeline_of(labels, teacher=lambda _, outputs=outputs: outputs, **options)
        batches = iter([make_batch(step) for step in range(3)])
        losses = [float(pipeline.progress(batches)[0]) for _ in range(3)]
        students.append((losses, [value.clone() for value in pipeline._model.student.parameters()]))
    torch.testing.assert_close(*students, rtol=0, atol=0)  # weight 0 equals absence


def test_labels_and_outputs_of_another_length_are_both_named() -> None:
    pipeline = pipeline_of(torch.zeros(7))
    message = r"labels should be .*\(8, 1\) or \(8,\); received \(7,\), beside 8 .*one of the two"
    with pytest.raises(ValueError, match=message):
        pipeline.progress(iter([make_batch()]))
