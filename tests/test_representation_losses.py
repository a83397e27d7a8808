"""Losses of the shared representation, against loops in float64; and the terms that use them."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import representation_reference as reference
import torch
from costs import Costs
from torch import Tensor

from torchrec_exfm import AuxiliaryHead, DistillationTerm, OutputsOf, Task, TeacherOutputs
from torchrec_exfm.losses import (
    Loss,
    LossInputs,
    cosine_of_embeddings,
    in_batch_positives,
    in_batch_softmax,
    listwise,
    squared_error_of_embeddings,
)

NAN, INF = float("nan"), float("inf")
TASKS = (Task(name="click"), Task(name="buy"))
WIDTH, SIZE = 6, 20
LOSSES: dict[str, tuple[Loss, Callable[..., Tensor]]] = {
    "cosine": (cosine_of_embeddings(WIDTH), reference.cosine),
    "squared": (squared_error_of_embeddings(WIDTH), reference.squared),
    "divergence": (
        in_batch_softmax(tau=0.5, teacher_tau=2.0),
        functools.partial(reference.divergence, tau=0.5, teacher_tau=2.0),
    ),
    "positives": (in_batch_positives(tau=0.5), functools.partial(reference.positives, tau=0.5)),
}
names = pytest.mark.parametrize("name", LOSSES)


def make_inputs(
    name: str,
    *,
    weighted: bool = False,
    corrected: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    """Return examples of about seven items; absent values are NaN or infinite."""
    generator = torch.Generator().manual_seed(5)
    outputs, values = (
        scale * torch.randn(SIZE, tasks, WIDTH, generator=generator, dtype=torch.float64)
        for tasks in (2, 1)
    )
    absent = torch.rand(SIZE, 2, generator=generator) < 0.2
    weights = None
    if weighted:
        weights = torch.randint(0, 4, (SIZE, 2), generator=generator) / 2
        absent = absent | (weights == 0)
    outputs[absent] = NAN
    values[absent.all(1)] = INF
    if name == "positives":
        values = values[:, 0, :2].masked_fill(absent, INF)
    ids = torch.tensor([-(2**62), 7, 2**62, 5, -3, 0, 11])[
        torch.randint(7, (SIZE,), generator=generator)
    ]
    log_q = torch.randn(SIZE, generator=generator, dtype=torch.float64) if corrected else None
    return LossInputs(
        tasks=TASKS,
        outputs=outputs.to(dtype).requires_grad_(),
        values=values.to(dtype),
        absent=absent,
        count=torch.tensor([11.0, 7.5], dtype=dtype),
        weights=weights,
        candidates=(ids, log_q),
    )


def with_gradient(loss: Loss, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    losses = loss(inputs)
    return losses.detach(), torch.autograd.grad(losses.sum(), inputs.outputs)[0]


def expected_of(name: str, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """As ``with_gradient``, by the reference."""
    absent = inputs.absent
    outputs = inputs.outputs.detach().double().masked_fill(absent.unsqueeze(-1), 0.0)
    outputs.requires_grad_()
    weights = torch.ones(SIZE, 2) if inputs.weights is None else inputs.weights
    assert inputs.candidates is not None
    ids, log_q = inputs.candidates
    keys: tuple[Any, ...] = ()
    if name in ("divergence", "positives"):
        keys = ids.tolist(), [0.0] * SIZE if log_q is None else log_q.tolist()
    losses = []
    for t in range(2):
        rows = (~absent[:, t]).nonzero().flatten().tolist()
        values = inputs.values[:, t if name == "positives" else 0].double()
        total = LOSSES[name][1](outputs[:, t], values, weights[:, t].tolist(), rows, *keys)
        losses.append(total / inputs.count[t].double())
    gradient = torch.autograd.grad(sum(losses), outputs)[0]
    return torch.stack(losses).detach(), gradient


@names
@pytest.mark.parametrize(("weighted", "corrected"), [(False, False), (True, True)])
def test_losses_of_representations_against_loops(
    name: str, weighted: bool, corrected: bool
) -> None:
    inputs = make_inputs(name, weighted=weighted, corrected=corrected)
    losses, gradient = with_gradient(LOSSES[name][0], inputs)
    expected, expected_gradient = expected_of(name, inputs)
    assert (losses > 0).all() and losses.shape == (2,)
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)
    assert not gradient[inputs.absent].any() or name in ("divergence", "positives")
    assert gradient[~inputs.absent].abs().sum(-1).min() > 0


@names
def test_losses_of_representations_in_float32_at_the_extremes(name: str) -> None:
    """Scores of some hundreds, whose exponentials float32 can't hold."""
    inputs = make_inputs(name, scale=3.5, corrected=True, dtype=torch.float32)
    losses, gradient = with_gradient(LOSSES[name][0], inputs)
    expected, expected_gradient = expected_of(name, inputs)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


@names
def test_nothing_present_is_zero(name: str) -> None:
    inputs = make_inputs(name)
    absent = dataclasses.replace(inputs, absent=torch.ones_like(inputs.absent))
    empty = dataclasses.replace(
        inputs,
        outputs=torch.zeros(0, 2, WIDTH, requires_grad=True),
        values=inputs.values[:0],
        absent=inputs.absent[:0],
        candidates=(torch.zeros(0, dtype=torch.int64), None),
    )
    for nothing in (absent, empty):
        losses, gradient = with_gradient(LOSSES[name][0], nothing)
        assert losses.tolist() == [0, 0] and not gradient.any()


def test_zeros_have_no_direction() -> None:
    """Neither a projection nor an embedding of zeros makes a gradient infinite or NaN."""
    inputs = dataclasses.replace(make_inputs("cosine"), absent=torch.zeros(SIZE, 2).bool())
    inputs.outputs.data.nan_to_num_(0.0)
    inputs.outputs.data[0] = 0.0
    inputs = dataclasses.replace(inputs, values=inputs.values.nan_to_num(0.0, 0.0, 0.0))
    inputs.values[1] = 0.0
    losses, gradient = with_gradient(cosine_of_embeddings(WIDTH), inputs)
    assert losses.isfinite().all() and gradient.isfinite().all()
    assert not gradient[1].any()


def test_what_in_batch_softmax_leaves_free() -> None:
    """Agreement is one of scores up to a constant of the query, whatever log q is."""
    inputs = make_inputs("divergence", corrected=True)
    values = inputs.values.expand(-1, 2, -1).masked_fill(inputs.absent.unsqueeze(-1), NAN)
    outputs = values.clone()
    outputs[..., : WIDTH // 2] *= 0.5 / 2.0  # tau over teacher_tau
    direction = torch.zeros(WIDTH, dtype=torch.float64)
    agreed = dataclasses.replace(inputs, outputs=outputs.requires_grad_())
    losses, gradient = with_gradient(LOSSES["divergence"][0], agreed)
    assert losses.abs().max() < 1e-14 and gradient.abs().max() < 1e-14
    direction[WIDTH // 2 :] = 1.0  # added to every item: a constant of each query
    shifted = dataclasses.replace(inputs, outputs=(outputs.detach() + direction).requires_grad_())
    losses, gradient = with_gradient(LOSSES["divergence"][0], shifted)
    assert losses.abs().max() < 1e-13
    without = dataclasses.replace(agreed, candidates=(inputs.candidates[0], None))  # type: ignore[index]
    assert with_gradient(LOSSES["divergence"][0], without)[0].abs().max() < 1e-14


@names
def test_other_items_of_the_same_id_are_no_candidates(name: str) -> None:
    inputs = make_inputs(name)
    if name in ("cosine", "squared"):
        assert not LOSSES[name][0].needs_candidates
        return
    same = dataclasses.replace(inputs, candidates=(torch.ones(SIZE, dtype=torch.int64), None))
    losses, gradient = with_gradient(LOSSES[name][0], same)
    assert losses.tolist() == [0, 0] and not gradient.any()


@names
def test_no_loss_of_representations_asks_the_device_for_a_value(name: str) -> None:
    inputs = make_inputs(name, dtype=torch.float32)
    with Costs() as costs:
        LOSSES[name][0](inputs).sum().backward()
    assert not costs.syncs


@names
def test_scores_are_of_float32_under_autocast(name: str) -> None:
    inputs = make_inputs(name, dtype=torch.float32)
    expected = with_gradient(LOSSES[name][0], inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_gradient(LOSSES[name][0], inputs)
    assert all(map(torch.equal, actual, expected))


def test_queries_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients do not depend on the number of scores held at a time."""
    for name in ("divergence", "positives"):
        inputs = make_inputs(name, weighted=True, corrected=True)
        unblocked = with_gradient(LOSSES[name][0], inputs)
        with monkeypatch.context() as patched:
            patched.setattr("torchrec_exfm.losses.two_towers.SCORES", 7 * SIZE)
            parts = with_gradient(LOSSES[name][0], inputs)
        for part, expected in zip(parts, unblocked, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-15)


@names
def test_a_loss_travels_to_other_processes(name: str) -> None:
    unpickled = pickle.loads(pickle.dumps(DistillationTerm(loss=LOSSES[name][0]))).loss
    inputs = make_inputs(name)
    assert torch.equal(unpickled(inputs), LOSSES[name][0](inputs))


def head_of(
    *terms: DistillationTerm, in_features: Any = 4, tasks: tuple[Task, ...] = TASKS
) -> AuxiliaryHead:
    torch.manual_seed(0)
    return AuxiliaryHead(in_features, terms=terms, tasks=tasks, teachers=("a", "b"))


def make_outputs(size: int = 12, width: int = WIDTH) -> TeacherOutputs:
    torch.manual_seed(3)
    presence, embedding_presence = torch.rand(size, 2, 2) < 0.7, torch.rand(size, 2) < 0.6
    values, embeddings = torch.randn(size, 2, 2), torch.randn(size, 2, width)
    return TeacherOutputs(
        values, presence, embeddings=embeddings, embedding_presence=embedding_presence
    )


def term_of(name: str, **options: Any) -> DistillationTerm:
    hidden = {} if name in ("divergence", "positives") else {"hidden": ()}
    return DistillationTerm(teacher="b", loss=LOSSES[name][0], **hidden, **options)


@names
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_a_term_gives_its_loss_what_is_present(name: str, beta: float) -> None:
    """Embeddings by their own presence and count; β multiplies the representation's gradient."""
    teacher, shared = make_outputs(), torch.randn(12, 4, requires_grad=True)
    towers = (
        torch.randn(12, 6, requires_grad=True) if name in ("divergence", "positives") else shared
    )
    head = head_of(term_of(name, weight=0.5, beta=beta), in_features=towers.shape[1])
    weights, ids = torch.rand(12, 2), torch.arange(12) % 5
    total, losses = head(towers, teacher, weights=weights, candidates=ids)
    (gradient,) = torch.autograd.grad(total, towers)
    vectors = towers.detach().requires_grad_()
    projected = (
        vectors if name in ("divergence", "positives") else head.term_losses[0].heads[0](vectors)
    )
    expected = []
    for t in range(2):
        present = (
            teacher.presence[:, 1, t] if name == "positives" else teacher.embedding_presence[:, 1]
        )  # type: ignore[index]
        values = teacher.values[:, 1, t] if name == "positives" else teacher.embeddings[:, 1]  # type: ignore[index]
        rows = present.nonzero().flatten().tolist()
        keys = (ids.tolist(), [0.0] * 12) if LOSSES[name][0].needs_candidates else ()
        sums = LOSSES[name][1](
            projected.double(), values.double(), weights[:, t].tolist(), rows, *keys
        )
        expected.append(sums / weights[rows, t].sum())
    mean = sum(expected) / 2
    slope = torch.autograd.grad(mean, vectors)[0]
    if beta != 1 and head.term_losses[0].heads:
        slope = slope / beta  # the head's own β is in it
    assert losses[0].item() == pytest.approx(mean.item(), rel=1e-5)
    assert total.item() == pytest.approx(0.5 * mean.item(), rel=1e-5)
    torch.testing.assert_close(gradient, 0.5 * beta * slope, rtol=1e-4, atol=1e-6)


def test_tasks_with_towers_of_their_own_have_a_projection_each() -> None:
    head = head_of(term_of("squared"), in_features={"buy": 3, "click": 4})
    teacher, shared = make_outputs(), [torch.randn(12, 3), torch.randn(12, 4)]
    _, losses = head(shared, teacher)
    present = teacher.embedding_presence[:, 1]  # type: ignore[index]
    expected = [
        (projection(x) - teacher.embeddings[:, 1]).square().mean(1)[present].mean()  # type: ignore[index]
        for projection, x in zip(head.term_losses[0].heads, shared, strict=True)
    ]
    assert [head.term_losses[0].heads[i].mlp[0].in_features for i in (0, 1)] == [3, 4]
    torch.testing.assert_close(losses[0], sum(expected).detach() / 2)
    only = head_of(term_of("squared", tasks=("click",)), in_features={"buy": 3, "click": 4})
    assert [h.mlp[0].in_features for h in only.term_losses[0].heads] == [4]
    with pytest.raises(ValueError, match=r"tasks that share two towers; received 2 taps"):
        head_of(term_of("divergence"), in_features={"buy": 4, "click": 4})


@names
def test_a_batch_without_embeddings_teaches_nothing(name: str) -> None:
    """As after a masked failure of the teacher. Outputs that never had embeddings are refused."""
    shared = torch.randn(3, 4, requires_grad=True)
    head = head_of(term_of(name))
    ids = torch.arange(3)
    total, losses = head(shared, TeacherOutputs.missing(3, 2, 2), candidates=ids)
    total.backward()
    assert losses.tolist() == [0.0] and not shared.grad.any()
    without = TeacherOutputs(torch.zeros(3, 2, 2))
    if name == "positives":
        head(shared, without, candidates=ids)
        return
    with pytest.raises(ValueError, match=r"\['b'\] learn from the teachers' embeddings.*without"):
        head(shared, without, candidates=ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine_of_embeddings(0), "width should be .*>= 1; received 0"),
        (lambda: in_batch_softmax(tau=0.0), "tau should be a finite number > 0"),
        (lambda: in_batch_softmax(teacher_tau=INF), "teacher_tau should be a finite number > 0"),
        (lambda: in_batch_positives(tau=NAN), "tau should be a finite number > 0"),
        (lambda: term_of("positives", serving=True), "serving, adapted and.*serving=True"),
        (lambda: term_of("cosine", adapted=True), "negative_sampling_rate are for.*adapted=True"),
        (lambda: term_of("cosine", negative_sampling_rate=0.5), "negative_sampling_rate are for"),
        (
            lambda: DistillationTerm(loss=in_batch_softmax(), hidden=()),
            r"hidden for those with a head.*hidden=\(\)",
        ),
        (lambda: term_of("cosine", alpha=2.0), "alpha should be 1 with this loss"),
        (lambda: OutputsOf(), "modules of OutputsOf should be distinct names"),
        (lambda: OutputsOf("a", "a"), "modules of OutputsOf should be distinct names"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_embeddings_of_another_width_are_refused() -> None:
    shared = torch.randn(12, 4)
    with pytest.raises(ValueError, match=r"of the width 6 .* received 5"):
        head_of(term_of("cosine"))(shared, make_outputs(width=5))
    with pytest.raises(ValueError, match=r"of an even width.*received 5"):
        ids = torch.arange(12)
        head_of(term_of("divergence"))(shared, make_outputs(width=5), candidates=ids)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (None, r"int64 ids of items of shape \(12,\).*received NoneType"),
        (torch.arange(11), r"received \['torch.int64 of \(11,\)'\]"),
        (torch.arange(12.0), r"received \['torch.float32 of \(12,\)'\]"),
        ((torch.arange(12), torch.arange(12)), "a pair of them and log q, floats"),
        ((torch.arange(12), torch.zeros(11)), "a pair of them and log q, floats"),
        ((torch.arange(12),), "a pair of them and log q, floats"),
        (
            (torch.arange(12), torch.tensor([0.0] * 11 + [-INF])),
            "log q of the candidates should be finite; received 1",
        ),
    ],
)
def test_candidates_that_do_not_fit_are_refused(candidates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_of(term_of("divergence"))(torch.randn(12, 4), make_outputs(), candidates=candidates)


def test_groups_and_candidates_go_together() -> None:
    terms = term_of("divergence"), DistillationTerm(teacher="a", loss=listwise())
    keys = {"groups": torch.arange(12) // 3, "candidates": torch.arange(12)}
    _, losses = head_of(*terms)(torch.randn(12, 4), make_outputs(), **keys)
    assert (losses > 0).all()
