"""The formulas against other float64 formulas, to the extremes of float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torchrec_exfm.functional import (
    correct_sampling,
    masked_count,
    masked_mean,
    scale_gradient,
    scale_label,
    soft_bce_with_logits,
    squared_error,
)

LABELS = (0.0, 0.3, 1.0)
LOGITS = (-1e30, -1e4, -88.0, -20.0, -3.0, -0.5, -1e-4, 0.0, 1e-4, 0.5, 3.0, 20.0, 88.0, 1e4, 1e30)
EPS = float(np.finfo(np.float32).eps)
NAN, INF = float("nan"), float("inf")


def grid() -> tuple[Tensor, Tensor]:
    """Return every logit with every label in float32; logits require a gradient."""
    pairs = torch.cartesian_prod(torch.tensor(LOGITS), torch.tensor(LABELS))
    return pairs[:, 0].clone().requires_grad_(), pairs[:, 1].clone()


def float64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def test_soft_bce_is_the_cross_entropy() -> None:
    logits, labels = grid()
    z, y = float64(logits), float64(labels)
    expected = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    losses = soft_bce_with_logits(logits, labels)
    assert losses.shape == logits.shape and losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    # a float32 sum of terms as large as z is known to within an ulp or two of z
    bound = 1e-6 * expected + 2 * EPS * np.abs(z)
    assert (np.abs(float64(losses) - expected) <= bound).all()


def test_soft_bce_gradient_is_sigmoid_less_label() -> None:
    logits, labels = grid()
    soft_bce_with_logits(logits, labels).sum().backward()
    z, y = float64(logits), float64(labels)
    expected = np.exp(-np.logaddexp(0, -z)) - y
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    np.testing.assert_allclose(float64(logits.grad), expected, rtol=1e-6, atol=EPS)


def test_squared_error_and_its_gradient() -> None:
    predictions = torch.tensor([-3e4, -1.5, 0.0, 0.25, 7.0, 1e15], requires_grad=True)
    targets = torch.tensor([3e4, 2.0, 0.0, 0.25, -1.0, -1e15])
    losses = squared_error(predictions, targets)
    losses.sum().backward()
    error = float64(predictions) - float64(targets)
    np.testing.assert_allclose(float64(losses), error**2, rtol=1e-6)
    assert predictions.grad is not None
    np.testing.assert_allclose(float64(predictions.grad), 2 * error, rtol=1e-6)


@pytest.mark.parametrize("formula", [soft_bce_with_logits, squared_error])
def test_targets_receive_no_gradient(formula) -> None:
    outputs = torch.tensor([0.3, -2.0], requires_grad=True)
    source = torch.tensor([0.1, 0.9], requires_grad=True)
    formula(outputs, source * 1.0).sum().backward()
    assert outputs.grad is not None and source.grad is None


@pytest.mark.parametrize("formula", [soft_bce_with_logits, squared_error])
def test_formulas_pass_gradcheck(formula) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.rand(4, 2, dtype=torch.float64, generator=generator)
    assert gradcheck(lambda z: formula(z, targets), outputs)


def entropy(y: float) -> float:
    return -sum(p * math.log(p) for p in (y, 1 - y) if p > 0)


@settings(deadline=None, derandomize=True)
@given(z=st.floats(-1e6, 1e6), y=st.floats(0, 1))
def test_soft_bce_is_never_below_the_entropy(z: float, y: float) -> None:
    loss = soft_bce_with_logits(torch.tensor(z).double(), torch.tensor(y).double()).item()
    z32, y32 = torch.tensor(z).item(), torch.tensor(y).item()
    assert loss >= entropy(y32) - 1e-15 * (1 + abs(z32))


@settings(deadline=None, derandomize=True)
@given(y=st.floats(1e-6, 1 - 1e-6), step=st.floats(0.01, 50), up=st.booleans())
def test_soft_bce_is_smallest_where_sigmoid_is_the_label(y: float, step: float, up: bool) -> None:
    best = math.log(y) - math.log1p(-y)
    other = best + step if up else best - step
    logits = torch.tensor([best, other], dtype=torch.float64, requires_grad=True)
    losses = soft_bce_with_logits(logits, torch.full_like(logits, y))
    losses.sum().backward()
    assert losses[0].item() == pytest.approx(entropy(y), rel=1e-6, abs=1e-14)
    assert losses[1] > losses[0]
    assert logits.grad is not None and abs(logits.grad[0].item()) < 1e-15 * (2 + abs(best))
    assert (logits.grad[1] > 0) == up


def test_scale_label_multiplies_and_clips_at_one() -> None:
    probabilities = torch.tensor([0.0, 1e-8, 0.1, 0.25, 0.3, 0.9, 1.0])
    expected = [min(4 * p, 1.0) for p in float64(probabilities)]
    np.testing.assert_allclose(float64(scale_label(probabilities, 4.0)), expected, rtol=1e-7)
    assert scale_label(probabilities, 1e30)[1:].tolist() == [1.0] * 6
    assert torch.equal(scale_label(probabilities, 1.0), probabilities)
    np.testing.assert_allclose(float64(scale_label(probabilities, 0.1))[-1], 0.1, rtol=1e-7)


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 1e-3, 1e-38])
def test_correct_sampling_is_the_formula_for_probabilities(rate: float) -> None:
    """Compare odds in float64 where probabilities differ from 0 and 1; logits beyond."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    corrected = correct_sampling(logits, rate)
    z = float64(logits)
    assert corrected.dtype == torch.float32 and torch.isfinite(corrected).all()
    np.testing.assert_allclose(
        float64(corrected), z + np.log(rate), rtol=EPS, atol=EPS * abs(math.log(rate))
    )
    middle = np.abs(z) <= 20
    p = 1 / (1 + np.exp(-z[middle]))
    q = p / (p + (1 - p) / rate)
    np.testing.assert_allclose(float64(corrected.double().sigmoid())[middle], q, rtol=2e-5)
    upstream = torch.linspace(-2, 3, len(LOGITS))
    corrected.backward(upstream)
    assert torch.equal(logits.grad, upstream)


def test_correct_sampling_at_rate_one_is_the_identity() -> None:
    logits = torch.tensor(LOGITS)
    for rate in (1, 1.0, torch.ones(()), torch.ones(len(LOGITS), dtype=torch.float64)):
        assert torch.equal(correct_sampling(logits, rate), logits)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (3, 2)])
def test_correct_sampling_with_a_rate_for_each(shape: tuple[int, ...]) -> None:
    logits = torch.arange(6.0).view(3, 2).requires_grad_()
    rates = torch.linspace(0.1, 1.0, math.prod(shape), dtype=torch.float64).view(shape)
    rates.requires_grad_()
    corrected = correct_sampling(logits, rates)
    corrected.sum().backward()
    expected = float64(logits) + np.log(np.broadcast_to(float64(rates), (3, 2)))
    assert corrected.dtype == torch.float32
    np.testing.assert_allclose(float64(corrected), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits.grad, torch.ones(3, 2)) and rates.grad is None


def test_correct_sampling_passes_gradcheck() -> None:
    logits = torch.tensor([[0.5, -1.5]], dtype=torch.float64, requires_grad=True)
    rates = torch.tensor([0.1, 1.0], dtype=torch.float64)
    for rate in (0.3, rates):
        assert gradcheck(lambda z, r: correct_sampling(z, r).sigmoid(), (logits, rate))
        assert gradgradcheck(lambda z, r: correct_sampling(z, r).sigmoid(), (logits, rate))


@settings(deadline=None)
@given(positives=st.integers(1, 10**9), sampled=st.integers(1, 10**6), every=st.integers(1, 10**6))
def test_correct_sampling_gives_back_the_rate_of_the_population(
    positives: int, sampled: int, every: int
) -> None:
    """Of ``sampled * every`` negatives one in ``every`` is sampled."""
    learnt = torch.tensor(math.log(positives / sampled), dtype=torch.float64)
    q = correct_sampling(learnt, 1 / every).sigmoid().item()
    assert q == pytest.approx(positives / (positives + sampled * every), rel=1e-12)


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.0001, NAN, INF])
def test_correct_sampling_refuses_rates_that_are_none(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"rate should be .* \(0, 1\]; received {rate}"):
        correct_sampling(torch.zeros(2), rate)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1)])
def test_correct_sampling_refuses_rates_that_would_widen_the_logits(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match=r"the logits' shape \(3, 1\); received \("):
        correct_sampling(torch.zeros(3, 1), torch.ones(shape))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.7, 1e4])
def test_scale_gradient_is_the_identity_forward_and_beta_backward(beta: float) -> None:
    inputs = torch.tensor([-INF, -1e-40, 0.1, 3.0, 1e30, NAN], requires_grad=True)
    outputs = scale_gradient(inputs, beta)
    assert torch.equal(outputs.view(torch.int32), inputs.view(torch.int32))
    upstream = torch.tensor([1.0, -2.0, 0.3, 1e-20, 5.0, -7.7])
    outputs.backward(upstream)
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, upstream * torch.tensor(beta))


def test_scale_gradient_twice_in_a_graph() -> None:
    inputs = torch.tensor([0.5, -1.5], requires_grad=True)
    loss = scale_gradient(inputs, 2.0).square() + 3.0 * scale_gradient(inputs, 4.0) + inputs
    loss.sum().backward()
    assert torch.equal(inputs.grad, 2.0 * 2.0 * inputs.detach() + 3.0 * 4.0 + 1.0)
    inputs.grad = None
    scale_gradient(scale_gradient(inputs, 2.0), 4.0).sum().backward()
    assert inputs.grad.tolist() == [8.0, 8.0]


def test_scale_gradient_by_one_passes_gradcheck() -> None:
    inputs = torch.tensor([0.5, -1.5], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: scale_gradient(x.square(), 1.0), inputs)
    assert gradgradcheck(lambda x: scale_gradient(x.square(), 1.0), inputs)


BETAS = [3.0, 0.0, 0.5]


def test_masked_mean_of_a_part_for_each_task() -> None:
    values = torch.tensor([[1.0, NAN], [2.5, 10.0], [-INF, 0.1]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    means = masked_mean(values, mask)
    means.backward(torch.tensor([1.0, 4.0]))
    np.testing.assert_allclose(float64(means), [1.75, 5.05], rtol=1e-6)
    assert values.grad.tolist() == [[0.5, 0.0], [0.5, 2.0], [0.0, 2.0]]


@pytest.mark.parametrize("count", [None, torch.tensor([0.0, 0.0])])
def test_masked_mean_of_nothing_is_zero_and_stays_in_the_graph(count: Tensor | None) -> None:
    values = torch.tensor([[1.0, NAN], [INF, -INF]], requires_grad=True)
    means = masked_mean(values, torch.zeros(2, 2, dtype=torch.bool), count)
    assert means.tolist() == [0.0, 0.0] and means.requires_grad
    means.sum().backward()
    assert values.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_masked_mean_with_a_count_given() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, NAN, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    means = masked_mean(values, mask, torch.tensor([2.5, 0.5, 3.0]))
    np.testing.assert_allclose(float64(means), [4.0 / 2.5, 2.0 / 0.5, 0.0], rtol=1e-6)
    means.sum().backward()
    expected = [[1 / 2.5, 1 / 0.5, 0.0], [1 / 2.5, 0.0, 0.0]]
    np.testing.assert_allclose(float64(values.grad), expected, rtol=1e-6)


def test_masked_mean_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = torch.rand(5, 2, 3, generator=generator) < 0.6
    assert gradcheck(lambda v: masked_mean(v, mask), values)
    count = torch.rand(2, 3, dtype=torch.float64, generator=generator)
    assert gradcheck(lambda v: masked_mean(v, mask, count), values)


WEIGHTS = [[1.0, 0.0], [2.0, 0.5], [3.0, 1.5]]


def test_masked_mean_of_weighted_examples() -> None:
    values = torch.tensor([[1.0, NAN], [2.5, 10.0], [-INF, 0.1]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, True], [False, True]])
    means = masked_mean(values, mask, weights=torch.tensor(WEIGHTS))
    means.sum().backward()
    np.testing.assert_allclose(float64(means), [(1 + 2 * 2.5) / 3, (5 + 0.15) / 2], rtol=1e-6)
    expected = [[1 / 3, 0.0], [2 / 3, 0.25], [0.0, 0.75]]
    np.testing.assert_allclose(float64(values.grad), expected, rtol=1e-6)


def test_a_weight_of_zero_leaves_out_and_one_of_two_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 2, 3, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 2, 3, generator=generator) < 0.7
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 2.0, 0.0])
    rows = weights.int().tolist()
    repeated = [row for row, times in enumerate(rows) for _ in range(times)]
    actual = masked_mean(values, mask, weights=weights.view(-1, 1, 1))
    torch.testing.assert_close(actual, masked_mean(values[repeated], mask[repeated]))
    count = masked_count(mask, weights.view(-1, 1, 1))
    assert torch.equal(count, masked_count(mask[repeated]))


def test_masked_mean_of_weights_that_are_all_zero() -> None:
    values = torch.tensor([[INF], [1.0]], requires_grad=True)
    means = masked_mean(values, torch.tensor([[True], [True]]), weights=torch.zeros(2, 1))
    means.sum().backward()
    assert means.tolist() == [0.0] and values.grad.tolist() == [[0.0], [0.0]]
