"""The distillation head: a perceptron behind gradient scaling, in every precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from torchrec_exfm import DistillationHead

B, D = 6, 5


def make_head(
    *hidden: int, beta: float = 1.0, dtype: torch.dtype = torch.float64
) -> DistillationHead:
    torch.manual_seed(0)
    return DistillationHead(D, num_tasks=2, hidden=hidden, beta=beta).to(dtype)


def make_shared(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(B, D, generator=generator, dtype=torch.float64)
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0, 3.7])
@pytest.mark.parametrize("hidden", [(), (7,), (7, 4)])
def test_outputs_and_gradients_are_those_written_by_hand(
    hidden: tuple[int, ...], beta: float
) -> None:
    head, shared = make_head(*hidden, beta=beta), make_shared()
    outputs = head(shared)
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2)).double()
    actual = torch.autograd.grad(outputs, [shared, *head.parameters()], upstream)

    layers = [parameter.detach().numpy() for parameter in head.parameters()]
    values = [shared.detach().numpy()]
    for i in range(0, len(layers), 2):
        z = values[-1] @ layers[i].T + layers[i + 1]
        values.append(np.maximum(z, 0) if i + 2 < len(layers) else z)
    np.testing.assert_allclose(outputs.detach(), values[-1], rtol=1e-12)
    gradient, expected = upstream.numpy(), list[np.ndarray]()
    for i in range(len(layers) - 2, -1, -2):
        expected[:0] = [gradient.T @ values[i // 2], gradient.sum(0)]
        gradient = gradient @ layers[i]
        if i:
            gradient = gradient * (values[i // 2] > 0)
    for value, reference in zip(actual, [beta * gradient, *expected], strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-11, atol=1e-13)


def test_passes_gradcheck_where_beta_is_one() -> None:
    head = make_head(4)
    assert gradcheck(head, make_shared())


def test_no_examples_and_an_input_without_gradient() -> None:
    head, shared = make_head(4), make_shared()
    for part in (shared[:0], shared.detach()):
        outputs = head(part)
        assert outputs.shape == (len(part), 2)
        gradients = torch.autograd.grad(outputs.sum(), list(head.parameters()))
        assert any(gradient.any() for gradient in gradients) == bool(len(part))


def test_a_head_on_the_meta_device() -> None:
    head = DistillationHead(D, num_tasks=2).to("meta")
    assert head(torch.zeros(3, D, device="meta")).shape == (3, 2)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shared_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
def test_any_dtype_of_the_representation(
    shared_dtype: torch.dtype, head_dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    head, shared = make_head(4, beta=2.0, dtype=head_dtype), make_shared(shared_dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = head(shared)
    outputs.sum().backward()
    assert shared.grad.dtype == shared_dtype
    exact = make_shared()
    expected = make_head(4, beta=2.0)(exact)
    expected.sum().backward()
    for value, reference in ((outputs, expected), (shared.grad, exact.grad)):
        torch.testing.assert_close(value.double(), reference, rtol=0.05, atol=0.05)
