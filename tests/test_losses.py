"""The losses of a term, against loops over groups and pairs in float64, to the extremes."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import ranking_reference as reference
import torch
from costs import Costs
from models import make_teacher
from torch import Tensor

from torchrec_exfm import AuxiliaryHead, DistillationTerm, Task, TeacherOutputs
from torchrec_exfm.functional import scale_label, soft_bce_with_logits, squared_error
from torchrec_exfm.losses import (
    Loss,
    LossInputs,
    listwise,
    pairwise,
    squared_error_of_logits,
    task_loss,
    temperature,
)

NAN, INF = float("nan"), float("inf")
BINARY = (Task(name="click"), Task(name="buy"))
MIXED = (Task(name="click"), Task(name="minutes", regression=True))
RANKING: dict[str, tuple[Loss, Callable[..., Tensor], tuple[Task, ...]]] = {
    "pairwise": (pairwise(), reference.pairwise, MIXED),
    "pairwise, cut": (
        pairwise(max_neighbours=2),
        functools.partial(reference.pairwise, max_neighbours=2),
        MIXED,
    ),
    "listwise": (listwise(), reference.listwise, MIXED),
    "calibrated": (listwise(calibrated=True), reference.REFERENCES["calibrated"], BINARY),
}
ELEMENTWISE = {"temperature": temperature(2.5), "squared": squared_error_of_logits()}
ALL = {"default": task_loss(), **ELEMENTWISE, **{key: loss for key, (loss, *_) in RANKING.items()}}


def make_inputs(
    size: int = 40,
    tasks: tuple[Task, ...] = BINARY,
    *,
    scale: float = 2.0,
    missing: float = 0.3,
    weighted: bool = False,
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    """Return unordered groups of 1 to about 9 examples; absent values are NaN or infinite."""
    generator = torch.Generator().manual_seed(size)
    outputs, values = (
        scale * torch.randn(size, 2, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    absent = torch.rand(size, 2, generator=generator) < missing
    weights = None
    if weighted:
        weights = torch.randint(0, 4, (size, 2), generator=generator) / 2
        absent = absent | (weights == 0)
    groups = torch.tensor([-(2**62), 7, 2**62, 5, -3, 0, 11])[
        torch.randint(7, (size,), generator=generator)
    ]
    values[::4] = values[:1]  # equal targets
    groups[:2] = torch.tensor([99, 100])  # alone
    groups[2:5], absent[2:5] = 101, True  # not there at all
    outputs[absent], values[absent] = NAN, INF
    return LossInputs(
        tasks=tasks,
        outputs=outputs.to(dtype).requires_grad_(),
        values=values.to(dtype),
        absent=absent,
        count=torch.tensor([11.0, 7.5], dtype=dtype),
        weights=weights,
        groups=groups,
    )


def with_gradient(loss: Loss, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return the loss of each task, and the gradient of their sum by the outputs."""
    losses = loss(inputs)
    return losses.detach(), torch.autograd.grad(losses.sum(), inputs.outputs)[0]


def expected_of(function: Callable[..., Tensor], inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """As ``with_gradient``, by a reference."""
    outputs = inputs.outputs.detach().double().masked_fill(inputs.absent, 0.0).requires_grad_()
    values = inputs.values.double().masked_fill(inputs.absent, 0.0)
    weights = torch.ones(outputs.shape) if inputs.weights is None else inputs.weights
    losses = []
    for t, task in enumerate(inputs.tasks):
        columns = (outputs[:, t], values[:, t], weights[:, t].double(), ~inputs.absent[:, t])
        sums = function(*columns, inputs.groups, regression=task.regression)
        losses.append(sums / inputs.count[t].double())
    gradient = torch.autograd.grad(sum(losses), outputs, materialize_grads=True)[0]
    return torch.stack(losses).detach(), gradient


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", RANKING)
def test_losses_of_groups_against_loops(name: str, weighted: bool) -> None:
    loss, function, tasks = RANKING[name]
    inputs = make_inputs(tasks=tasks, weighted=weighted)
    losses, gradient = with_gradient(loss, inputs)
    expected, expected_gradient = expected_of(function, inputs)
    assert (losses > 0).all() and losses.shape == (2,)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)
    assert not gradient[inputs.absent].any()
    assert not gradient[:2].any()  # groups of one


@pytest.mark.parametrize("name", RANKING)
def test_losses_of_groups_in_float32_at_the_extremes(name: str) -> None:
    """Logits of ±80 and more: probabilities of 1e-35, and of 1 in float32."""
    loss, function, _ = RANKING[name]
    inputs = make_inputs(tasks=BINARY, scale=80.0, dtype=torch.float32)
    inputs.outputs.data[5:9], inputs.values[5:9] = -80.0, 80.0
    inputs.groups[5:9] = 102
    inputs.absent[5:9] = False
    losses, gradient = with_gradient(loss, inputs)
    if "pairwise" in name:  # what is equal in float32 is no pair
        inputs = dataclasses.replace(inputs, values=inputs.values.sigmoid().double().logit())
    expected, expected_gradient = expected_of(function, inputs)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RANKING)
def test_groups_without_a_pair_are_zero(name: str) -> None:
    loss, _, tasks = RANKING[name]
    inputs = make_inputs(tasks=tasks)
    alone = dataclasses.replace(inputs, groups=torch.arange(40).flip(0))
    absent = dataclasses.replace(inputs, absent=torch.ones_like(inputs.absent))
    empty = dataclasses.replace(
        inputs,
        outputs=torch.zeros(0, 2, requires_grad=True),
        values=torch.zeros(0, 2),
        absent=torch.zeros(0, 2, dtype=torch.bool),
        groups=torch.zeros(0, dtype=torch.int64),
    )
    for nothing in (alone, absent, empty):
        losses, gradient = with_gradient(loss, nothing)
        assert losses.tolist() == [0, 0] and not gradient.any()
        assert gradient.shape == nothing.outputs.shape


def test_all_equal_targets_are_no_pairs_and_a_uniform_list() -> None:
    inputs = dataclasses.replace(
        make_inputs(9, missing=0.0), groups=torch.ones(9, dtype=torch.int64)
    )
    inputs.values.fill_(0.7)
    inputs.absent.fill_(False)
    inputs.outputs.data.fill_(-1.3)
    losses, gradient = with_gradient(pairwise(), inputs)
    assert not losses.any() and not gradient.any()
    for loss in (listwise(), listwise(calibrated=True)):
        losses, gradient = with_gradient(loss, inputs)
        torch.testing.assert_close(losses, 9 * math.log(9) / inputs.count)
        assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("name", RANKING)
def test_order_and_names_of_groups_do_not_matter(name: str) -> None:
    """Except for pairs of a group that is cut, where the order within the group matters."""
    loss, _, tasks = RANKING[name]
    inputs = make_inputs(tasks=tasks, weighted=True)
    assert inputs.weights is not None and inputs.groups is not None
    losses, gradient = with_gradient(loss, inputs)
    within = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    order = (-3 * inputs.groups % 13).argsort(stable=True) if "cut" in name else within
    other = dataclasses.replace(
        inputs,
        outputs=inputs.outputs.detach()[order].requires_grad_(),
        values=inputs.values[order],
        absent=inputs.absent[order],
        weights=inputs.weights[order],
        groups=inputs.groups[order] ^ 12345,
    )
    other_losses, other_gradient = with_gradient(loss, other)
    torch.testing.assert_close(other_losses, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(other_gradient, gradient[order], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", RANKING)
def test_a_weight_of_two_has_the_gradient_of_having_the_example_twice(name: str) -> None:
    if "cut" in name:
        return
    loss, _, tasks = RANKING[name]
    inputs = make_inputs(30, tasks)
    rows = torch.cat([torch.arange(30), torch.arange(0, 30, 3)])
    twice = dataclasses.replace(
        inputs,
        outputs=inputs.outputs.detach()[rows].requires_grad_(),
        values=inputs.values[rows],
        absent=inputs.absent[rows],
        groups=inputs.groups[rows],
    )
    weights = torch.ones(30, 2)
    weights[::3] = 2.0
    _, once = with_gradient(loss, dataclasses.replace(inputs, weights=weights))
    _, gradient = with_gradient(loss, twice)
    summed = torch.zeros_like(once).index_add(0, rows, gradient)
    torch.testing.assert_close(once, summed, rtol=1e-11, atol=1e-15)
    assert once[::3].any()


def test_what_each_list_leaves_free() -> None:
    """Softmaxes leave a constant of the logits free, normalised probabilities a factor."""
    inputs = make_inputs()
    values = inputs.values.masked_fill(inputs.absent, NAN)
    shifted, halved = values + 1, (values.sigmoid() / 2).logit()
    for calibrated, free, other in ((False, shifted, halved), (True, halved, shifted)):
        slopes = []
        for outputs in (values, free, other):
            taught = dataclasses.replace(inputs, outputs=outputs.clone().requires_grad_())
            _, gradient = with_gradient(listwise(calibrated=calibrated), taught)
            slopes.append(gradient.abs().max())
        assert slopes[0] < 1e-15 and slopes[1] < 1e-15 and slopes[2] > 1e-3


@pytest.mark.parametrize("alpha", [1.0, 1.4])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_temperature_against_its_formula(tau: float, alpha: float) -> None:
    inputs = dataclasses.replace(make_inputs(tasks=MIXED, weighted=True), alpha=alpha)
    assert inputs.weights is not None
    losses, gradient = with_gradient(temperature(tau), inputs)
    expected, expected_gradient = torch.zeros(2).double(), torch.zeros_like(gradient)
    for b, t in (~inputs.absent).nonzero().tolist():
        z, value = inputs.outputs[b, t].item(), inputs.values[b, t].item()
        share = inputs.weights[b, t].item() / inputs.count[t].item()
        if MIXED[t].regression:
            loss, slope = (z - alpha * value) ** 2, 2 * (z - alpha * value)
        else:
            y, p = min(alpha / (1 + math.exp(-value / tau)), 1), 1 / (1 + math.exp(-z / tau))
            loss = tau**2 * -(y * math.log(p) + (1 - y) * math.log(1 - p))
            slope = tau * (p - y)
        expected[t] += share * loss
        expected_gradient[b, t] = share * slope
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)


def test_the_default_and_a_temperature_of_one_are_the_tasks_own_loss_to_the_bit() -> None:
    inputs = make_inputs(tasks=MIXED, missing=0.0, dtype=torch.float32)
    inputs.absent.fill_(False)
    inputs.outputs.data[2:5], inputs.values[2:5] = 0.3, -1.0
    inputs = dataclasses.replace(inputs, alpha=1.5)
    z, t = inputs.outputs, inputs.values
    losses = [
        soft_bce_with_logits(z[:, 0], scale_label(t[:, 0].sigmoid(), 1.5)),
        squared_error(z[:, 1], 1.5 * t[:, 1]),
    ]
    expected = torch.stack(losses, dim=1).sum(0) / inputs.count
    slopes = torch.autograd.grad(expected.sum(), z)[0]
    for loss in (task_loss(), temperature(1.0)):
        for actual, known in zip(with_gradient(loss, inputs), (expected, slopes), strict=True):
            assert torch.equal(actual, known)


def test_squared_error_of_logits_against_its_formula() -> None:
    inputs = make_inputs(tasks=MIXED, weighted=True)
    assert inputs.weights is not None
    losses, gradient = with_gradient(squared_error_of_logits(), inputs)
    presence = ~inputs.absent
    error = torch.where(presence, inputs.outputs.detach() - inputs.values, 0.0)
    share = inputs.weights.double() / inputs.count
    torch.testing.assert_close(losses, (share * error**2).sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, 2 * share * error, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_no_loss_asks_the_device_for_a_value(name: str) -> None:
    """No loss reads a value of the device, and memory does not grow with the batch squared."""
    sizes = (64, 640)
    for size in sizes:
        inputs = make_inputs(size, dtype=torch.float32)
        with Costs() as costs:
            ALL[name](inputs).sum().backward()
        assert not costs.syncs
        assert costs.bytes <= 4000 * size
    on_meta = {
        key: value.to("meta") if isinstance(value, Tensor) else value
        for key, value in vars(inputs).items()
    }
    assert ALL[name](LossInputs(**on_meta)).is_meta


@pytest.mark.parametrize("name", ALL)
def test_a_loss_travels_to_other_processes(name: str) -> None:
    unpickled = pickle.loads(pickle.dumps(DistillationTerm(loss=ALL[name]))).loss
    inputs = make_inputs()
    assert torch.equal(unpickled(inputs), ALL[name](inputs))


def head_of(*terms: DistillationTerm, tasks: tuple[Task, ...] = BINARY) -> AuxiliaryHead:
    torch.manual_seed(0)
    return AuxiliaryHead(3, terms=terms, tasks=tasks)


@pytest.mark.parametrize("name", RANKING)
def test_a_term_gives_its_loss_what_is_present(name: str) -> None:
    """The term shifts the teacher by its sampling rate, and selects its task."""
    loss, function, _ = RANKING[name]
    terms = [
        DistillationTerm(loss=loss, tasks=("buy",), weight=0.5, negative_sampling_rate=0.25),
        DistillationTerm(),
    ]
    head = head_of(*terms)
    teacher = make_teacher(0, 12, tasks=2, missing=0.3)
    shared, groups = torch.randn(12, 3), torch.arange(12) % 3
    loss_, losses = head(shared, teacher, groups=groups)
    outputs = head.term_losses[0].heads[0](shared)[:, 0].detach().double()
    present = teacher.presence[:, 0, 1]
    values = teacher.values[:, 0, 1].double() + math.log(0.25)
    ones = torch.ones(12, dtype=torch.float64)
    expected = function(outputs, values, ones, present, groups) / present.sum()
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss_.item() == pytest.approx((0.5 * losses[0] + losses[1]).item())


def test_a_margin_multiplies_the_loss_and_its_means_stay_those_of_the_task() -> None:
    """The running means do not depend on the loss; its gradient is multiplied by the lead."""
    teacher, labels = make_teacher(0, 16, missing=0.2), torch.ones(16).bernoulli(0.5)
    teacher = TeacherOutputs(4 * labels - 2 + 0.1 * teacher.values[:, 0, 0])
    serving, groups = torch.randn(16, requires_grad=True), torch.arange(16) // 4
    means, gradients = [], []
    for loss, margin in ((task_loss(), 1.5), (pairwise(), 1.5), (pairwise(), None)):
        head = head_of(DistillationTerm(serving=True, loss=loss, margin=margin), tasks=BINARY[:1])
        for _ in range(2):
            step = head(torch.zeros(16, 3), teacher, serving=serving, labels=labels, groups=groups)
        means.extend(head.lead_losses)
        gradients.append(torch.autograd.grad(step[0], serving)[0])
    assert torch.equal(*means) and means[0].all()
    lead = (1 - means[0][0] / means[0][1]) / 1.5
    assert 0 < lead < 1
    torch.testing.assert_close(gradients[1], lead * gradients[2])


def test_a_loss_of_ones_own_is_a_function() -> None:
    def huber(inputs: LossInputs) -> Tensor:
        errors = torch.nn.functional.huber_loss(inputs.outputs, inputs.values, reduction="none")
        return errors.masked_fill(inputs.absent, 0.0).sum(0) / inputs.count

    teacher, shared = make_teacher(0, 8, tasks=2, missing=0.0), torch.randn(8, 3)
    head = head_of(DistillationTerm(loss=Loss(huber)))
    expected = torch.nn.functional.huber_loss(
        head.term_losses[0].heads[0](shared), teacher.values[:, 0]
    )
    torch.testing.assert_close(head(shared, teacher)[0], expected)
    wrong = head_of(DistillationTerm(loss=Loss(lambda inputs: inputs.outputs)))
    with pytest.raises(ValueError, match=r"should return \(2,\).*received \(8, 2\)"):
        wrong(shared, teacher)


def test_what_does_not_fit_is_refused() -> None:
    for loss in (listwise, lambda inputs: 0, "listwise", None):
        with pytest.raises(TypeError, match="loss should be a Loss"):
            DistillationTerm(loss=loss)
    for loss in (pairwise(), listwise(), listwise(calibrated=True), squared_error_of_logits()):
        with pytest.raises(ValueError, match=r"alpha should be 1 with this loss.*received 2"):
            DistillationTerm(loss=loss, alpha=2)
    DistillationTerm(loss=temperature(2.0), alpha=2)
    for tau in (0.0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="tau should be a finite number > 0"):
            temperature(tau)
    with pytest.raises(ValueError, match="max_neighbours should be at least 1; received 0"):
        pairwise(max_neighbours=0)
    with pytest.raises(ValueError, match=r"'teacher'.*binary tasks alone over \['minutes'\]"):
        head_of(DistillationTerm(loss=listwise(calibrated=True)), tasks=MIXED)
    head_of(DistillationTerm(loss=listwise(calibrated=True), tasks=("click",)), tasks=MIXED)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, r"int64 ids of shape \(4,\).*received NoneType: tell the pipeline"),
        (
            torch.zeros(5, dtype=torch.int64),
            r"int64 ids of shape \(4,\).*received torch.int64 of \(5,\)",
        ),
        (torch.zeros(4, 1, dtype=torch.int64), r"int64 ids of shape \(4,\).*of \(4, 1\)"),
        (torch.zeros(4), r"int64 ids of shape \(4,\).*received torch.float32"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups: Any, message: str) -> None:
    head = head_of(DistillationTerm(), DistillationTerm(loss=pairwise()))
    with pytest.raises(ValueError, match=message):
        head(torch.zeros(4, 3), make_teacher(0, 4, tasks=2), groups=groups)
    head_of(DistillationTerm())(torch.zeros(4, 3), make_teacher(0, 4, tasks=2), groups=groups)
