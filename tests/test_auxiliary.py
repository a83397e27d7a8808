"""The auxiliary head and its terms, against backpropagation written by hand in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from models import make_teacher
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchrec_exfm import (
    AuxiliaryHead,
    DistillationHead,
    DistillationTerm,
    Task,
    TeacherOutputs,
)

B, D = 16, 5
NAN = float("nan")
TASKS = (Task(name="click"), Task(name="buy"), Task(name="minutes", regression=True))
TEACHERS = ("fm", "peer")
TERMS = (
    DistillationTerm(teacher="fm", alpha=3.0, beta=0.5, weight=1.5, hidden=(6,)),
    DistillationTerm(
        teacher="fm",
        adapted=True,
        tasks=("minutes", "click"),
        alpha=0.7,
        beta=2.0,
        weight=0.3,
        hidden=(),
    ),
    DistillationTerm(teacher="peer", tasks=("buy",), alpha=8.0, beta=3.3, weight=2.0, hidden=(4,)),
    DistillationTerm(teacher="peer", tasks=("minutes",), alpha=1.3, beta=0.0, hidden=(4, 3)),
)

SAMPLED_TASKS = (
    Task(name="click", negative_sampling_rate=0.1),
    Task(name="buy", negative_sampling_rate=0.5),
    TASKS[2],
)
SAMPLED_TERMS = (
    *TERMS[:2],
    dataclasses.replace(TERMS[2], negative_sampling_rate=0.02),
    DistillationTerm(
        teacher="fm", tasks=("buy", "click"), weight=0.7, negative_sampling_rate=0.25, hidden=(3,)
    ),
)


SERVING_TERMS = (
    DistillationTerm(teacher="peer", serving=True, alpha=0.7, weight=1.5),
    TERMS[0],
    dataclasses.replace(TERMS[1], serving=True, beta=1.0, hidden=(128,)),
    DistillationTerm(teacher="fm", tasks=("buy",), serving=True, negative_sampling_rate=0.25),
    *TERMS[1:3],
)


def make_head(*terms: DistillationTerm, seed: int = 0, **options: Any) -> AuxiliaryHead:
    torch.manual_seed(seed)
    return AuxiliaryHead(D, terms=terms or (DistillationTerm(hidden=(4,)),), **options)


def make_shared() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(B, D, generator=generator).requires_grad_()


def heads_of(head: AuxiliaryHead) -> list[DistillationHead]:
    return [task_head for term in head.term_losses for task_head in term.heads]


def gradients(head: AuxiliaryHead, shared: Tensor, loss: Tensor) -> list[Tensor]:
    """Return the gradients of the shared representation and of every parameter; None fails."""
    return list(torch.autograd.grad(loss, [shared, *head.parameters()]))


def reference_term(
    term: DistillationTerm,
    layers: list[np.ndarray],
    x: np.ndarray,
    column: dict[str, Any],
    rates: dict[str, float],
) -> tuple[float, list[np.ndarray]]:
    """Return a term's loss and its gradients: β times that of x, then of each weight and bias."""
    activations = [x]
    for i in range(0, len(layers), 2):
        z = activations[-1] @ layers[i].T + layers[i + 1]
        activations.append(np.maximum(z, 0) if i + 2 < len(layers) else z)
    z, loss = activations[-1], 0.0
    upstream = np.zeros_like(z)
    names = term.tasks or tuple(column)
    r_teacher = term.negative_sampling_rate
    for i, name in enumerate(names):
        r_student = rates[name]
        values, mask, count = column[name]
        for b in np.flatnonzero(mask):
            if name == "minutes":
                error = z[b, i] - term.alpha * values[b]
                example_loss, slope = error**2, 2 * error
            else:
                p = 1 / (1 + math.exp(-values[b]))
                if not term.adapted:
                    p = p / (p + (1 - p) / r_teacher)  # of all examples
                    p = p / (p + (1 - p) * r_student)  # of those the student sees
                y = min(term.alpha * p, 1.0)
                example_loss = y * np.logaddexp(0, -z[b, i]) + (1 - y) * np.logaddexp(0, z[b, i])
                slope = 1 / (1 + math.exp(-z[b, i])) - y
            loss += example_loss / count / len(names)
            upstream[b, i] = term.weight * slope / count / len(names)
    grads: list[np.ndarray] = []
    for i in range(len(layers) - 2, -1, -2):
        grads[:0] = [upstream.T @ activations[i // 2], upstream.sum(0)]
        upstream = upstream @ layers[i]
        if i:
            upstream = upstream * (activations[i // 2] > 0)
    return loss, [term.beta * upstream, *grads]


@pytest.mark.parametrize("with_count", [False, True])
@pytest.mark.parametrize(
    ("terms", "tasks"),
    [(TERMS, TASKS), (SAMPLED_TERMS, SAMPLED_TASKS), (SERVING_TERMS, SAMPLED_TASKS)],
    ids=["all", "sampled", "serving"],
)
def test_against_a_reference_of_several_terms(
    terms: tuple[DistillationTerm, ...], tasks: tuple[Task, ...], with_count: bool
) -> None:
    head = make_head(*terms, teachers=TEACHERS, tasks=tasks)
    shared = make_shared()
    teacher = make_teacher(1, B, teachers=2, tasks=3, missing=0.4)
    adapted = teacher.values * 1.5 - 0.2
    count = teacher.presence.sum(0) * 0.75 if with_count else None
    serving = torch.randn(B, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    counts = None if count is None else count[None]
    loss, term_losses = head(shared, teacher, adapted=adapted, counts=counts, serving=serving)
    (serving_grad,) = torch.autograd.grad(loss, serving, retain_graph=True, materialize_grads=True)
    actual = [serving_grad, *gradients(head, shared, loss)]

    expected_loss, expected_x, expected, losses = 0.0, 0.0, [], []
    expected_serving = np.zeros((B, 3))
    denominators = (teacher.presence.sum(0) if count is None else count).double().numpy()
    rates = {task.name: task.negative_sampling_rate for task in tasks}
    for term, module in zip(terms, head.term_losses, strict=True):
        m = TEACHERS.index(term.teacher)
        source = (adapted if term.adapted else teacher.values)[:, m].double().numpy()
        mask = teacher.presence[:, m].numpy()
        column = {
            task.name: (source[:, t], mask[:, t], denominators[m, t])
            for t, task in enumerate(tasks)
        }
        layers = [p.detach().double().numpy() for p in module.parameters()]
        x = shared.detach().double().numpy()
        columns = [t for name in term.tasks or column for t, k in enumerate(column) if k == name]
        if term.serving:
            x = serving.detach().double().numpy()[:, columns]
        term_loss, grads = reference_term(term, layers, x, column, rates)
        losses.append(term_loss)
        expected_loss += term.weight * term_loss
        if term.serving:
            expected_serving[:, columns] += grads[0]
            continue
        expected_x = expected_x + grads[0]
        expected += grads[1:]
    assert not term_losses.requires_grad
    np.testing.assert_allclose(term_losses.double(), losses, rtol=1e-6)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    for value, reference in zip(actual, [expected_serving, expected_x, *expected], strict=True):
        scale = np.abs(reference).max()
        assert scale > 0 or value is serving_grad
        np.testing.assert_allclose(value.double(), reference, rtol=1e-6, atol=1e-6 * scale)


MARGIN_TASKS = (SAMPLED_TASKS[0], TASKS[2])
MARGIN_TERMS = (
    DistillationTerm(teacher="peer", adapted=True, serving=True, alpha=0.7, weight=1.5, margin=1.3),
    DistillationTerm(teacher="fm", alpha=0.7, beta=0.5, weight=2.0, hidden=(4,)),
    DistillationTerm(
        teacher="fm", tasks=("click",), serving=True, margin=0.9, negative_sampling_rate=0.25
    ),
    DistillationTerm(teacher="fm", tasks=("minutes",), serving=True, weight=0.4),
)
MARGINS = (1.3, 1.3, NAN, NAN, 0.9, NAN)  # of each column


class Step(NamedTuple):
    """The inputs of a head; the labels are of click and minutes."""

    teacher: TeacherOutputs
    adapted: Tensor
    count: Tensor | None
    serving: Tensor
    labels: Tensor

    def taught_to(self, head: AuxiliaryHead, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head's result for these inputs."""
        counts = None if self.count is None else torch.stack([self.count, self.count])
        return head(
            shared,
            self.teacher,
            adapted=self.adapted,
            counts=counts,
            serving=self.serving,
            labels=self.labels,
        )


def margin_step(
    step: int, *, teachers: int = 2, with_count: bool = False, missing: float = 0.4
) -> Step:
    """Return teachers that know the labels less and less, and a serving head that does not."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randn(B, 2, generator=generator) + torch.tensor([0.0, 1.0])
    labels[:, 0] = (labels[:, 0] > 0).float()
    truth = torch.stack([4 * labels[:, 0] - 2, labels[:, 1]], dim=1).unsqueeze(1)
    noise = make_teacher(step, B, teachers=teachers, tasks=2, missing=missing)
    corrections = torch.tensor([[math.log(0.1 / 0.25), 0.0], [0.0, 0.0]])
    values = truth + (0.2 + 0.3 * step) * noise.values
    teacher = TeacherOutputs(values + corrections[:teachers], noise.presence)
    count = (0.75 + 0.2 * step) * noise.presence.sum(0) if with_count else None
    serving = torch.randn(B, 2, generator=generator).requires_grad_()
    return Step(teacher, values + 0.1, count, serving, labels)


def reference_mean(name: str, z: Tensor, y: Tensor, mask: Tensor, count: float) -> float:
    """Return the mean loss of outputs on labels, over the examples of the mask."""
    values, labels = z[mask].detach().double().numpy(), y[mask].double().numpy()
    if name == "minutes":
        return float(((values - labels) ** 2).sum() / count)
    return float((np.logaddexp(0, values) - labels * values).sum() / count)


@pytest.mark.parametrize("with_count", [False, True])
def test_margins_against_a_reference_of_several_steps(with_count: bool) -> None:
    head = make_head(*MARGIN_TERMS, teachers=TEACHERS, tasks=MARGIN_TASKS)
    rates = {task.name: task.negative_sampling_rate for task in MARGIN_TASKS}
    mlp = [p.detach().double().numpy() for p in head.parameters()]
    running, seen = np.zeros((2, 6)), []
    for step in range(8):
        shared = make_shared()
        inputs = margin_step(step, with_count=with_count, missing=1.0 if step == 3 else 0.4)
        ratio = np.divide(*running, out=np.ones(6), where=running[1] > 0)
        leads = np.where(np.isnan(MARGINS), 1, np.clip((1 - ratio) / MARGINS, 0, 1))
        seen.append(leads)
        np.testing.assert_allclose(head.leads.double(), leads, rtol=1e-5, atol=1e-6)
        loss, term_losses = inputs.taught_to(head, shared)
        actual = torch.autograd.grad(loss, [shared, inputs.serving])

        counts = inputs.teacher.presence.sum(0) if inputs.count is None else inputs.count
        expected_loss, losses, gradient = 0.0, [], [np.zeros((B, D)), np.zeros((B, 2))]
        now, column = np.zeros((2, 6)), 0
        for term in MARGIN_TERMS:
            source = inputs.adapted if term.adapted else inputs.teacher.values
            m, names = TEACHERS.index(term.teacher), term.tasks or tuple(rates)
            losses.append(0.0)
            for name in names:
                t, lead = list(rates).index(name), leads[column]
                mask, count = inputs.teacher.presence[:, m, t], counts[m, t].clamp(min=0.5).item()
                values = source[:, m, t].double()
                x, layers, rows = inputs.serving[:, t : t + 1], list[np.ndarray](), slice(t, t + 1)
                if not term.serving:
                    x, rows = shared, slice(None)
                    layers = [*mlp[:2], mlp[2][t : t + 1], mlp[3][t : t + 1]]
                task_loss, (input_gradient, *_) = reference_term(
                    dataclasses.replace(term, tasks=(name,)),
                    layers,
                    x.detach().double().numpy(),
                    {name: (values.numpy(), mask.numpy(), count)},
                    rates,
                )
                gradient[term.serving][:, rows] += lead * input_gradient / len(names)
                losses[-1] += task_loss / len(names)
                expected_loss += term.weight * lead * task_loss / len(names)
                if name == "click" and not term.adapted:
                    values = values + math.log(term.negative_sampling_rate / rates[name])
                now[:, column] = [
                    reference_mean(name, z, inputs.labels[:, t], mask, count)
                    for z in (values, x[:, 0])
                ]
                column += 1
        if step != 3:
            running += 0.01 * (now - running)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        np.testing.assert_allclose(term_losses.double(), losses, rtol=1e-6)
        for value, reference in zip(actual, gradient, strict=True):
            np.testing.assert_allclose(value.double(), reference, rtol=1e-4, atol=1e-6)
    margin_leads = np.stack(seen)[:, ~np.isnan(MARGINS)]
    assert not margin_leads[0].any() and (margin_leads[1:] > 0).all()
    assert (margin_leads[1:] < 1).any(0).all()


def taught(head: AuxiliaryHead, step: Step, labels: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the loss, the terms' losses, and the gradient of the serving head."""
    labels = step.labels if labels is None else labels
    loss, term_losses = step._replace(labels=labels).taught_to(head, make_shared())
    (serving_grad,) = torch.autograd.grad(loss, step.serving)
    return loss, term_losses, serving_grad


def means_of(head: AuxiliaryHead) -> Tensor:
    """Return the running means of the only term with a margin."""
    (means,) = head.lead_losses
    return means


def margin_head(margin: float | None = 1.3, **options: Any) -> AuxiliaryHead:
    term = DistillationTerm(adapted=True, serving=True, margin=margin, **options)
    return make_head(term, tasks=MARGIN_TASKS)


def test_a_term_whose_teacher_has_not_led_yet_teaches_nothing() -> None:
    head, step = margin_head(), margin_step(0, teachers=1)
    loss, term_losses, serving_grad = taught(head, step)
    assert loss == 0 and not serving_grad.any() and (term_losses > 0).all()
    loss, term_losses, serving_grad = taught(head, step)
    assert loss > 0 and serving_grad.any()


def test_a_teacher_worse_than_the_student_teaches_nothing() -> None:
    head, step = margin_head(), margin_step(0, teachers=1)
    worse = step._replace(adapted=step.serving.detach()[:, None] * 3)
    step = step._replace(serving=step.adapted[:, 0].clone().requires_grad_())
    for _ in range(3):
        loss, term_losses, serving_grad = taught(head, worse._replace(serving=step.serving))
        assert loss == 0 and not serving_grad.any() and (term_losses > 0).all()
    assert (means_of(head) > 0).all() and not head.leads.any()


def test_a_term_whose_teacher_leads_by_its_margin_is_one_without_to_the_bit() -> None:
    head, plain, step = margin_head(0.01), margin_head(None), margin_step(0, teachers=1)
    taught(head, step)
    assert head.leads.tolist() == [1, 1] == plain.leads.tolist()
    assert all(map(torch.equal, taught(head, step), taught(plain, step)))


def test_a_step_without_any_output_leaves_the_leads() -> None:
    head, step = margin_head(), margin_step(0, teachers=1)
    taught(head, step)
    before = head.leads
    assert ((before > 0) & (before < 1)).all()
    taught(head, step._replace(teacher=TeacherOutputs.missing(B, 1, 2)))
    torch.testing.assert_close(head.leads, before, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("poison", [NAN, float("inf")])
@pytest.mark.parametrize("where", ["serving", "adapted"])
def test_a_step_that_is_not_finite_is_not_remembered(where: str, poison: float) -> None:
    head, step = margin_head(), margin_step(0, teachers=1)
    taught(head, step)
    before = means_of(head).clone()
    poisoned = getattr(step, where).detach().clone()
    poisoned[..., 1] = poison
    taught(head, step._replace(**{where: poisoned.requires_grad_()}))
    assert torch.equal(means_of(head)[:, 1], before[:, 1])
    assert not torch.equal(means_of(head)[:, 0], before[:, 0])


def test_a_look_in_evaluation_moves_no_mean_and_needs_no_labels() -> None:
    head, step = margin_head(), margin_step(0, teachers=1)
    taught(head, step)
    before = means_of(head).clone()
    loss, _ = step._replace(labels=None).taught_to(head.eval(), make_shared())
    assert torch.equal(means_of(head), before)
    assert torch.equal(loss, taught(head.train(), step)[0])


def test_the_means_of_a_margin_are_state_and_stay_float32() -> None:
    head, step = margin_head(1 / 3), margin_step(6, teachers=1)
    assert (
        list(head.state_dict()) == ["term_losses.0.lead_losses"]
        and not margin_head(None).state_dict()
    )
    taught(head, step)
    before, leads = means_of(head).clone(), head.leads
    assert ((leads > 0) & (leads < 1)).any()
    head.to(torch.bfloat16)
    assert torch.equal(means_of(head), before) and means_of(head).dtype == torch.float32
    assert torch.equal(head.leads, leads)
    with torch.device("meta"):
        other = margin_head(1 / 3)
    assert not other.leads.any()
    other.load_state_dict(head.state_dict())
    assert all(map(torch.equal, taught(other, step), taught(head, step)))


def test_a_compiled_head_is_one_graph_and_keeps_the_means_of_a_margin() -> None:
    terms = DistillationTerm(adapted=True, serving=True, margin=1.3), DistillationTerm(beta=2.0)
    head, step = make_head(*terms, tasks=MARGIN_TASKS), margin_step(0, teachers=1)
    compiled = copy.deepcopy(head)
    compiled.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    for _ in range(3):
        shared, other = make_shared(), make_shared()
        loss, _ = step.taught_to(compiled, shared)
        expected, _ = step.taught_to(head, other)
        torch.testing.assert_close(loss, expected)
        # The serving head's gradient has the lead from before the step; the forward updates it.
        gradients = torch.autograd.grad(loss, (shared, step.serving))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, (other, step.serving)))
    assert torch.equal(means_of(compiled), means_of(head))


@pytest.mark.parametrize("margin", [0.0, -1.0, NAN, float("inf")])
def test_wrong_margins_are_refused(margin: float) -> None:
    message = rf"margin should be None, or a number > 0 .*received margin={margin}, serving=True"
    with pytest.raises(ValueError, match=message):
        DistillationTerm(serving=True, margin=margin)
    with pytest.raises(ValueError, match=r"with serving=True; received margin=0.1, serving=False"):
        DistillationTerm(margin=0.1)


@pytest.mark.parametrize(
    ("labels", "received"),
    [
        (None, r"NoneType.*labels="),
        ([0.0] * B, "list"),
        (torch.zeros(B), r"\(16,\)"),
        (torch.zeros(2, B), r"\(2, 16\)"),
        (torch.zeros(B - 1, 2), r"\(15, 2\)"),
    ],
)
def test_labels_that_a_margin_cannot_use_are_refused(labels: Any, received: str) -> None:
    head, step = margin_head(), margin_step(0, teachers=1)
    with pytest.raises(ValueError, match=rf"labels should be .*\(16, 2\); received {received}"):
        step._replace(labels=labels).taught_to(head, make_shared())
    assert not means_of(head).any()


def loss_and_gradients(**options: float) -> tuple[Tensor, list[Tensor]]:
    head, shared = make_head(DistillationTerm(hidden=(4,), **options)), make_shared()
    loss, _ = head(shared, make_teacher(1, B, missing=0.3))
    return loss, gradients(head, shared, loss)


@pytest.mark.parametrize("beta", [0.0, 0.25, 8.0, 3.7])
def test_beta_scales_the_backbones_gradient_alone(beta: float) -> None:
    loss, (shared, *head_gradients) = loss_and_gradients()
    scaled_loss, (scaled_shared, *scaled_own) = loss_and_gradients(beta=beta)
    assert torch.equal(scaled_loss, loss)
    assert all(map(torch.equal, scaled_own, head_gradients))
    torch.testing.assert_close(scaled_shared, beta * shared, rtol=1e-6, atol=0.0)
    if beta != 3.7:
        assert torch.equal(scaled_shared, beta * shared)


@pytest.mark.parametrize("weight", [0.25, 8.0, 3.7])
def test_weight_scales_the_loss_and_every_gradient(weight: float) -> None:
    loss, grads = loss_and_gradients()
    scaled_loss, scaled = loss_and_gradients(weight=weight)
    tolerance = 1e-6 if weight == 3.7 else 0.0
    torch.testing.assert_close(scaled_loss, weight * loss, rtol=tolerance, atol=0.0)
    for value, unscaled in zip(scaled, grads, strict=True):
        expected = weight * unscaled
        scale = tolerance * expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=scale)


def with_rates(student: float, teacher: float, adapted: float = 1.0) -> list[Tensor]:
    """Return losses and gradients of a plain and an adapted term, over one binary task and both."""
    tasks = (Task(name="click", negative_sampling_rate=student), TASKS[2])
    terms = [
        DistillationTerm(tasks=("click",), alpha=0.7, negative_sampling_rate=teacher),
        DistillationTerm(tasks=("minutes",), alpha=0.7),
        DistillationTerm(adapted=True, negative_sampling_rate=adapted),
    ]
    head, shared = make_head(*terms, tasks=tasks), make_shared()
    outputs = make_teacher(1, B, tasks=2, missing=0.3)
    loss, term_losses = head(shared, outputs, adapted=0.5 * outputs.values)
    return [term_losses, loss, *gradients(head, shared, loss)]


@pytest.mark.parametrize("rate", [0.5, 0.1, 1 / 3, 1e-300])
def test_equal_rates_are_none_to_the_bit(rate: float) -> None:
    assert all(map(torch.equal, with_rates(rate, rate), with_rates(1.0, 1.0)))


def test_rates_move_the_binary_labels_of_the_teacher_alone() -> None:
    moved, *_ = with_rates(0.1, 1.0)
    back, *_ = with_rates(1.0, 0.1)
    plain, *_ = with_rates(1.0, 1.0)
    for losses in (moved, back):
        assert losses[0] != plain[0] and torch.equal(losses[1:], plain[1:])
    assert moved[0] != back[0]


def test_a_teacher_of_sampled_data_teaches_the_optimum_of_the_students_data() -> None:
    """Of four counted kinds of examples, the head that fits the student's data has no gradient."""
    positives = np.array([3.0, 10.0, 40.0, 700.0])
    negatives = np.array([64e4, 32e3, 12800.0, 640.0])
    student_rate, *teacher_rates = 1 / 8, 1.0, 1 / 64, 1 / 8

    def learnt(rate: float) -> Tensor:
        rates = positives / (positives + rate * negatives)
        return torch.from_numpy(np.log(rates) - np.log1p(-rates)).float()

    outputs = TeacherOutputs(torch.stack([learnt(rate) for rate in teacher_rates], 1)[..., None])
    for corrected in (True, False):
        terms = [
            DistillationTerm(teacher=name, hidden=(), negative_sampling_rate=rate)
            for name, rate in zip(("all", "few", "like"), teacher_rates, strict=True)
        ]
        if not corrected:
            terms = [dataclasses.replace(term, negative_sampling_rate=1.0) for term in terms]
        head = AuxiliaryHead(
            4,
            terms=terms,
            teachers=("all", "few", "like"),
            tasks=(Task(negative_sampling_rate=student_rate if corrected else 1.0),),
        )
        for perceptron in heads_of(head):
            perceptron.mlp[0].weight.data = learnt(student_rate)[None]
            torch.nn.init.zeros_(perceptron.mlp[0].bias)
        head(torch.eye(4), outputs)[0].backward()
        largest = [task_head.mlp[0].weight.grad.abs().max().item() for task_head in heads_of(head)]
        assert largest[2] < 1e-6
        assert (max(largest[:2]) < 1e-6) == corrected and (min(largest[:2]) > 1e-2) != corrected


@pytest.mark.parametrize("case", ["weight 0", "teacher missing", "no examples"])
def test_nothing_to_learn_gives_zero_gradients_to_all(case: str) -> None:
    head = make_head(DistillationTerm(weight=0.0 if case == "weight 0" else 1.0))
    shared, teacher = make_shared(), make_teacher(1, B)
    if case == "teacher missing":
        teacher = TeacherOutputs.missing(B)
    elif case == "no examples":
        shared, teacher = shared[:0].detach().requires_grad_(), TeacherOutputs.missing(0)
    loss, term_losses = head(shared, teacher)
    loss.backward()
    assert loss.item() == 0.0
    assert (term_losses.item() > 0) == (case == "weight 0")
    for tensor in (shared, *head.parameters()):
        assert tensor.grad is not None and not tensor.grad.any()


@pytest.mark.parametrize("poison", [-1e30, 7.5, float("inf"), NAN])
@pytest.mark.parametrize("where", ["teacher", "adapted"])
def test_what_is_masked_has_no_influence(poison: float, where: str) -> None:
    head, shared = make_head(*TERMS, teachers=TEACHERS, tasks=TASKS), make_shared()
    clean = make_teacher(1, B, teachers=2, tasks=3, missing=0.4)
    poisoned = torch.where(clean.presence, clean.values, poison)
    loss, _ = head(shared, clean, adapted=clean.values)
    if where == "teacher":
        other, _ = head(shared, TeacherOutputs(poisoned, clean.presence), adapted=clean.values)
    else:
        other, _ = head(shared, clean, adapted=poisoned)
    assert torch.equal(loss, other)
    pairs = zip(gradients(head, shared, loss), gradients(head, shared, other), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)


def test_large_outputs_of_one_task_leave_the_others_alone() -> None:
    values = torch.tensor([[1e4, -1e4, 1e15], [-1e4, 1e4, -1e15]])
    small = torch.tensor([[1e4, -1e4, 1.0], [-1e4, 1e4, 2.0]])
    grads = []
    for outputs in (values, small):
        head = make_head(DistillationTerm(hidden=()), tasks=TASKS)
        loss, _ = head(torch.ones(2, D), TeacherOutputs(outputs))
        loss.backward()
        grads.append(heads_of(head)[0].mlp[0].weight.grad)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.equal(grads[0][:2], grads[1][:2]) and grads[0][:2].any()


def test_factors_are_exact_in_heads_of_any_dtype() -> None:
    term = DistillationTerm(alpha=0.7, weight=0.3, hidden=())
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        head = make_head(term).to(dtype)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        loss, term_losses = head(torch.ones(2, D, dtype=dtype), TeacherOutputs(torch.ones(2)))
        losses.append((loss, term_losses))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(losses[0][0], 0.3 * losses[0][1].sum())


def test_terms_of_several_widths_in_any_order_are_each_its_own() -> None:
    """A term's loss equals that of an auxiliary head with this term alone."""
    hiddens: list[tuple[int, ...]] = [(6,), (6,), (4, 3), (), (6,), (), (4, 3)]
    terms = [
        DistillationTerm(teacher=TEACHERS[k % 2], beta=k, weight=k + 0.5, hidden=hidden)
        for k, hidden in enumerate(hiddens)
    ]
    head = make_head(*terms, teachers=TEACHERS, tasks=TASKS)
    shared, teacher = make_shared(), make_teacher(1, B, teachers=2, tasks=3, missing=0.4)
    loss, term_losses = head(shared, teacher)
    (shared_gradient,) = torch.autograd.grad(loss, shared)
    losses, total = [], torch.zeros_like(shared)
    for term, term_head in zip(terms, heads_of(head), strict=True):
        alone = make_head(term, teachers=TEACHERS, tasks=TASKS)
        heads_of(alone)[0].load_state_dict(term_head.state_dict())
        loss, term_loss = alone(shared, teacher)
        losses.append(term_loss)
        total += torch.autograd.grad(loss, shared)[0]
    torch.testing.assert_close(term_losses, torch.cat(losses))
    torch.testing.assert_close(shared_gradient, total)


def loss_and_grads(head: AuxiliaryHead) -> tuple[Tensor, list[Tensor]]:
    shared = make_shared()
    loss, _ = head(shared, make_teacher(1, B))
    return loss, gradients(head, shared, loss)


def test_factors_survive_memory_without_values() -> None:
    term = DistillationTerm(alpha=0.7, weight=0.3)
    head, other = (
        make_head(term),
        make_head(term).to_empty(device="cpu").type(torch.float64).float(),
    )
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(loss_and_grads(other), loss_and_grads(head), rtol=0, atol=0)


def test_heads_under_activation_checkpointing() -> None:
    head, shared, teacher = make_head(), make_shared(), make_teacher(1, B)
    expected = gradients(head, shared, head(shared, teacher)[0])
    loss, _ = checkpoint(head, shared, teacher, use_reentrant=False)
    torch.testing.assert_close(gradients(head, shared, loss), expected)


def test_heads_that_somebody_changed_are_run_as_they_are() -> None:
    head, expected = make_head(DistillationTerm(beta=2.0)), []
    expected.append(loss_and_grads(head))
    seen: list[int] = []
    heads_of(head)[0].mlp[0].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(loss_and_grads(head), expected[0])
    assert seen == [1]
    heads_of(head)[0].mlp[1] = torch.nn.Tanh()
    shared = make_shared()
    outputs = heads_of(head)[0](shared)
    first, _, last = heads_of(head)[0].mlp
    assert torch.equal(outputs, last(first(shared).tanh()))
    assert not torch.allclose(loss_and_grads(head)[0], expected[0][0])


def test_heads_of_widths_that_somebody_changed() -> None:
    terms = [DistillationTerm(hidden=(4,)), DistillationTerm(hidden=(4,))]
    head, shared = make_head(*terms), make_shared()
    heads_of(head)[1].mlp[0] = torch.nn.Linear(D, 7)
    heads_of(head)[1].mlp[2] = torch.nn.Linear(7, 1, bias=False)
    teacher = make_teacher(1, B)
    _, losses = head(shared, teacher)
    for k, loss in enumerate(losses):
        alone = make_head(terms[k])
        alone.term_losses[0].heads[0] = heads_of(head)[k]
        torch.testing.assert_close(alone(shared, teacher)[0].detach(), loss)


def test_training_after_a_look_in_inference_mode() -> None:
    head = make_head(DistillationTerm(alpha=0.7, weight=0.3))
    with torch.inference_mode():
        expected, _ = head(make_shared(), make_teacher(1, B))
    loss, _ = loss_and_grads(head)
    assert loss.item() == expected.item()


def test_a_head_on_the_meta_device() -> None:
    head = DistillationHead(D, num_tasks=2).to("meta")
    assert head(torch.zeros(3, D, device="meta")).shape == (3, 2)


def test_the_state_is_the_heads_parameters() -> None:
    head = make_head(TERMS[1], TERMS[2], teachers=TEACHERS, tasks=TASKS)
    assert list(head.state_dict()) == [name for name, _ in head.named_parameters()]
    shapes = [tuple(parameter.shape) for parameter in head.parameters()]
    assert shapes == [(2, D), (2,), (4, D), (4,), (1, 4), (1,)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": ()}, r"at least one DistillationTerm; received none"),
        ({"terms": (DistillationTerm(teacher="x"),)}, r"one of \['teacher'\]; received 'x'"),
        ({"terms": (DistillationTerm(tasks=("x",)),)}, r"among \['label'\]; received \['x'\]"),
        ({"terms": (DistillationTerm(tasks=()),)}, r"among \['label'\]; received \[\]"),
        ({"terms": (DistillationTerm(tasks=("label",) * 2),)}, r"received \['label', 'label'\]"),
        ({"teachers": ("a", "a")}, r"teachers should be distinct.*received \('a', 'a'\)"),
        ({"teachers": ()}, r"teachers should be .*at least one; received \(\)"),
        ({"teachers": "teacher"}, r"teachers should be .*received 'teacher'"),
        ({"tasks": (Task(), Task())}, r"tasks should be distinct.*received \['label', 'label'\]"),
        ({"tasks": ()}, r"tasks should be .*at least one; received \[\]"),
    ],
)
def test_wrong_terms_and_names_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuxiliaryHead(D, **options)


@pytest.mark.parametrize("name", ["alpha", "beta", "weight"])
@pytest.mark.parametrize("value", [-1.0, NAN, float("inf")])
def test_wrong_factors_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} should be a finite number.*received {value}"):
        DistillationTerm(**{name: value})


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, NAN, float("inf")])
@pytest.mark.parametrize("kind", [Task, DistillationTerm])
def test_wrong_rates_are_refused(kind: Any, rate: float) -> None:
    message = rf"negative_sampling_rate should be a number in \(0, 1\]; received {rate}"
    with pytest.raises(ValueError, match=message):
        kind(negative_sampling_rate=rate)


def test_rates_where_there_is_nothing_to_correct_are_refused() -> None:
    with pytest.raises(ValueError, match=r"regression.* should be 1; received 0\.5"):
        Task(regression=True, negative_sampling_rate=0.5)
    with pytest.raises(ValueError, match=r"adapted term should be 1.* own labels.*received 0\.5"):
        DistillationTerm(adapted=True, negative_sampling_rate=0.5)
    term = DistillationTerm(teacher="fm", negative_sampling_rate=0.5)
    with pytest.raises(
        ValueError, match=r"'fm' over the regression 'minutes' .*received 0\.5.*own"
    ):
        make_head(term, teachers=TEACHERS, tasks=TASKS)


def test_a_term_is_frozen_and_alpha_is_not_zero() -> None:
    with pytest.raises(ValueError, match="alpha should be a finite number > 0; received 0"):
        DistillationTerm(alpha=0.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillationTerm().beta = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        DistillationTerm("teacher")  # type: ignore[misc]


def test_teacher_outputs_of_another_shape_are_refused() -> None:
    head, shared = make_head(teachers=("teacher", "other")), make_shared()
    for size, teachers, tasks in ((B - 1, 2, 1), (B, 1, 1), (B, 2, 3)):
        teacher = make_teacher(0, size, teachers=teachers, tasks=tasks)
        with pytest.raises(ValueError, match=rf"\({B}, 2, 1\).*received \({size}, {teachers}, "):
            head(shared, teacher)


@pytest.mark.parametrize("regression", [False, True])
def test_adapted_outputs_absent_or_of_another_shape_are_refused(regression: bool) -> None:
    head = make_head(DistillationTerm(adapted=True), tasks=(Task(regression=regression),))
    with pytest.raises(ValueError, match=r"'teacher/adapted'.*give .* an adapter"):
        head(make_shared(), make_teacher(0, B))
    for shape in ((B,), (B, 1), (B - 1, 1, 1), (B, 1, 2)):
        with pytest.raises(ValueError, match=r"adapted .*\(16, 1, 1\).*received"):
            head(make_shared(), make_teacher(0, B), adapted=torch.zeros(shape))


@pytest.mark.parametrize(
    ("serving", "received"),
    [
        (None, "NoneType"),
        ((torch.zeros(B, 2),), "tuple"),
        (torch.zeros(B), r"\(16,\)"),
        (torch.zeros(B, 5), r"\(16, 5\)"),
        (torch.zeros(2, B), r"\(2, 16\)"),
        (torch.zeros(B - 1, 2), r"\(15, 2\)"),
        (torch.zeros(B, 1, 2), r"\(16, 1, 2\)"),
    ],
)
def test_outputs_that_are_no_serving_heads_are_refused(serving: Any, received: str) -> None:
    head = make_head(DistillationTerm(serving=True), tasks=TASKS[:2])
    message = (
        r"'teacher/serving'\].* of shape \(16, 2\) \(examples, tasks \['click', 'buy'\]\); "
        rf"received {received}: let ExFMWrapper tap"
    )
    with pytest.raises(ValueError, match=message):
        head(make_shared(), make_teacher(0, B, tasks=2), serving=serving)


@pytest.mark.parametrize("shape", [(B,), (B, 1)])
def test_a_serving_head_of_one_task(shape: tuple[int, ...]) -> None:
    head, teacher = make_head(DistillationTerm(serving=True)), make_teacher(1, B)
    assert not list(head.parameters()) and not head.state_dict()
    logits = torch.randn(B, generator=torch.Generator().manual_seed(3))
    loss, _ = head(make_shared(), teacher, serving=logits.reshape(shape))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, teacher.values.flatten().sigmoid()
    )
    torch.testing.assert_close(loss, expected)


def test_a_serving_head_of_another_dtype_than_the_heads() -> None:
    head = make_head(DistillationTerm(serving=True), DistillationTerm(hidden=(4,)))
    shared, teacher = make_shared(), make_teacher(1, B)
    logits = torch.randn(B, 1).bfloat16()
    losses = [
        head(shared, teacher, serving=logits.to(dtype)) for dtype in (torch.bfloat16, torch.float32)
    ]
    assert losses[0][0].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    loss, _ = head(shared, teacher, serving=logits.double())
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("options", [{"beta": 3.0}, {"hidden": (64,)}, {"hidden": ()}])
def test_a_serving_term_has_nothing_of_a_head(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no head of its own.*leave hidden and beta as they are"):
        DistillationTerm(serving=True, **options)
    assert DistillationTerm(serving=True, adapted=True).name == "teacher/adapted/serving"
