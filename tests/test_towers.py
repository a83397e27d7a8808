"""Every kind of term for students with a tower per task, or for user and item."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CPU, make_hand_batch, make_teacher
from torch import Tensor, nn

from torchrec_exfm import (
    AuxiliaryHead,
    DistillationTerm,
    ExFMBatch,
    ExFMWrapper,
    StudentAdapter,
    Task,
    TrainPipelineExFM,
    export_student,
)

B = 8
TASKS = (Task(name="click"), Task(name="buy"), Task(name="minutes", regression=True))
NAMES = [task.name for task in TASKS]
HEAD = DistillationTerm(beta=2.0, hidden=(3,))
SERVING = DistillationTerm(adapted=True, serving=True, weight=0.7)
KINDS = ("shared bottom", "mmoe", "two share a tower")


class MultiTask(nn.Module):
    """A tower per task, on one representation or on its own mixture of experts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(1 if "bottom" in kind else 2))
        self.gates = nn.ParameterDict({name: torch.randn(len(self.experts)) for name in NAMES})
        names = ["click", "rest"] if "share" in kind else NAMES
        self.towers = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1 + (name == "rest")))
                for name in names
            }
        )
        self.detached = True

    def forward(self, batch: Any) -> Any:
        experts = [expert(batch.numbers).tanh() for expert in self.experts]
        columns = []
        for name, tower in self.towers.items():
            gate = self.gates["buy" if name == "rest" else name].softmax(0)
            columns.append(tower(sum(g * x for g, x in zip(gate, experts, strict=True))))
        logits = torch.cat(columns, dim=1)
        labels = batch.clicked.unsqueeze(1).expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return loss, (loss.detach(), logits.detach() if self.detached else logits, labels)


def taps_of(kind: str) -> dict[Any, str]:
    if "share" in kind:
        return {("buy", "minutes"): "towers.rest", "click": "towers.click"}
    return {name: f"towers.{name}" for name in NAMES}


def wrapped(kind: str, *terms: DistillationTerm, **options: Any) -> ExFMWrapper:
    student = MultiTask(kind)
    torch.manual_seed(1)
    return ExFMWrapper(
        student, **{"tap": taps_of(kind), "terms": terms or (HEAD,), "tasks": TASKS, **options}
    )


def batch_of() -> ExFMBatch[Any]:
    return ExFMBatch(make_hand_batch(0, B), make_teacher(0, B, tasks=3, missing=0.3))


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, values = zip(*module.named_parameters(), strict=True)
    tensors = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
    return dict(zip(names, tensors, strict=True))


def by_hand(wrapper: ExFMWrapper, batch: ExFMBatch[Any]) -> tuple[Tensor, Tensor]:
    """Return the student's loss, and that of ``HEAD`` with one layer read per tower."""
    student, inputs = wrapper.student, {}
    handles = [
        student.get_submodule(name).register_forward_pre_hook(
            lambda _, args, names=names: inputs.update({names: args[0]})
        )
        for names, name in taps_of(student.kind).items()
    ]
    loss, _ = student(batch.batch)
    for handle in handles:
        handle.remove()
    (term,) = wrapper.auxiliary_head.term_losses
    losses: dict[str, Tensor] = {}
    for names, head in zip(taps_of(student.kind), term.heads, strict=True):
        shared = inputs[names]
        outputs = head.mlp(2.0 * shared - shared.detach())  # β = 2
        for column, name in enumerate([names] if isinstance(names, str) else names):
            t = NAMES.index(name)
            here = batch.teacher.presence[:, 0, t]
            target, z = batch.teacher.values[here, 0, t], outputs[here, column]
            if TASKS[t].regression:
                losses[name] = (z - target).square().mean()
            else:
                p, q = target.sigmoid(), z.sigmoid()
                losses[name] = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    assert losses.keys() == set(NAMES)
    return loss, sum(losses.values()) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_has_a_head_on_each_tower(kind: str) -> None:
    wrapper, batch = wrapped(kind), batch_of()
    (term,) = wrapper.auxiliary_head.term_losses
    if "share" in kind:
        assert [head.mlp[-1].out_features for head in term.heads] == [2, 1]
    student_loss, added = by_hand(wrapper, batch)
    expected = gradients(wrapper, student_loss + added)
    loss, _ = wrapper(batch)
    torch.testing.assert_close(wrapper.last_losses, added.detach().reshape(1))
    torch.testing.assert_close(loss, student_loss + added)
    actual = gradients(wrapper, loss)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_serving_term_reads_towers_outputs_or_the_students_output(kind: str) -> None:
    """Both taps give the same result up to rounding."""
    results = []
    for options in ({}, {"serving_logits": lambda output: output[1][1]}):
        wrapper, batch = wrapped(kind, SERVING, HEAD, **options), batch_of()
        wrapper.student.detached = not options
        adapted = 2 * batch.teacher.values - 1
        batch.step_inputs = type(batch.step_inputs)(batch.teacher, adapted=adapted)
        loss, (_, logits, _) = wrapper(batch)
        results.append((loss, gradients(wrapper, loss)))
        order = ["click", "buy", "minutes"]
        columns = dict(zip(order, logits.detach().unbind(1), strict=True))
        expected = []
        for t, name in enumerate(NAMES):
            here = batch.teacher.presence[:, 0, t]
            z, target = columns[name][here], adapted[here, 0, t]
            expected.append(
                (z - target).square().mean()
                if TASKS[t].regression
                else F.binary_cross_entropy_with_logits(z, target.sigmoid())
            )
        torch.testing.assert_close(wrapper.last_losses[0], torch.stack(expected).mean())
    torch.testing.assert_close(results[0], results[1])
    towers = [value for name, value in results[0][1].items() if "towers" in name]
    assert all(value.any() for value in towers)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_is_the_untouched_student(kind: str) -> None:
    batch = batch_of()
    bare = MultiTask(kind)
    expected = gradients(bare, bare(batch.batch)[0])
    terms = [DistillationTerm(weight=0.0), DistillationTerm(serving=True, weight=0.0)]
    wrapper = wrapped(kind, *terms)
    actual = gradients(wrapper.student, wrapper(batch)[0])
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_trained_in_the_pipeline_and_exported(kind: str) -> None:
    terms = [HEAD, DistillationTerm(adapted=True, serving=True, margin=0.5, tasks=("buy",))]
    wrapper = wrapped(kind, *terms)
    pipeline = TrainPipelineExFM(
        wrapper,
        torch.optim.SGD(wrapper.parameters(), lr=0.1),
        CPU,
        teacher=lambda batch: make_teacher(0, B, tasks=3),
        adapter=StudentAdapter(tasks=TASKS),
        labels=lambda batch: batch.clicked.unsqueeze(1).expand(B, 3),
    )
    batches = iter([make_hand_batch(step, B) for step in range(4)])
    losses = [float(pipeline.progress(batches)[0]) for _ in range(4)]
    assert all(loss == loss for loss in losses)
    served = export_student(wrapper)
    assert type(served) is MultiTask
    assert served.state_dict().keys() == MultiTask(kind).state_dict().keys()
    batch = make_hand_batch(9, B)
    assert torch.equal(served(batch)[1][1], wrapper.eval()(batch)[1][1])


class TwoTowers(nn.Module):
    """A dot product, which is no module, of a user's and an item's projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, batch: Any) -> Any:
        user, item = batch.numbers.split([2, 3], dim=1)
        logits = (self.user(user) * self.item(item)).sum(1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.clicked)
        return loss, (loss.detach(), logits, batch.clicked)


def test_a_serving_term_teaches_both_towers_of_a_dot_product() -> None:
    student, batch = TwoTowers(), ExFMBatch(make_hand_batch(0, B), make_teacher(0, B))
    loss, (_, logits, _) = student(batch.batch)
    soft = batch.teacher.values.flatten().sigmoid()
    expected = gradients(student, loss + 0.7 * F.binary_cross_entropy_with_logits(logits, soft))
    term = DistillationTerm(serving=True, weight=0.7)
    wrapper = ExFMWrapper(
        TwoTowers(), tap="user", terms=[term], serving_logits=lambda output: output[1][1]
    )
    actual = gradients(wrapper.student, wrapper(batch)[0])
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


# ---- What is refused ----


def test_a_container_is_refused_with_what_is_in_it() -> None:
    message = r"forward of its own; received 'towers', a ModuleDict.*candidates: (.*)"
    with pytest.raises(ValueError, match=message) as error:
        wrapped("mmoe", tap="towers")
    candidates = str(error.value).partition("candidates: ")[2]
    assert "'towers.click'" in candidates and "experts" not in candidates
    with pytest.raises(ValueError, match="candidates") as error:
        wrapped("mmoe", tap="tower")
    assert "'towers'" not in str(error.value).partition("candidates: ")[2]


@pytest.mark.parametrize(
    "tap",
    [
        {"click": "towers.click"},
        {**taps_of("mmoe"), "more": "towers.click"},
        {"click": "towers.click", ("buy", "click", "minutes"): "towers.buy"},
        {},
    ],
)
def test_taps_that_do_not_name_each_task_once_are_refused(tap: Any) -> None:
    with pytest.raises(ValueError, match=r"tap should name each of the tasks .* once"):
        wrapped("mmoe", tap=tap)


def test_logits_of_other_shapes_or_without_gradient_are_refused() -> None:
    wide = {("click", "buy"): "towers.click", "minutes": "towers.minutes"}
    with pytest.raises(ValueError, match=r"'towers.click' should be .*'buy'\], \(B, 2\).*\(8, 1\)"):
        wrapped("mmoe", SERVING, tap=wide)(adapted_batch())
    for function, message in (
        (lambda output: output[1][1], r"with their gradient.*received logits without it"),
        (lambda output: output[1]["logits"], r"serving_logits should take .*pass serving_logits="),
        (lambda output: output[0], r"of shape \(8, 3\) .*received \(\).*serving_logits"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapped("mmoe", SERVING, serving_logits=function)(adapted_batch())


def adapted_batch() -> ExFMBatch[Any]:
    batch = batch_of()
    batch.step_inputs = type(batch.step_inputs)(batch.teacher, adapted=batch.teacher.values)
    return batch


def test_widths_by_task() -> None:
    head = AuxiliaryHead({"click": 4, ("buy", "minutes"): 6}, tasks=TASKS)
    loss, _ = head([torch.ones(B, 4), torch.ones(B, 6)], make_teacher(0, B, tasks=3))
    assert loss.isfinite()
    with pytest.raises(ValueError, match="in_features should name each of the tasks"):
        AuxiliaryHead({"click": 4}, tasks=TASKS)
