"""TeacherOutputs: shapes, masks, ages, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import make_teacher
from torch import Tensor

from torchrec_exfm import TeacherOutputs

CPU = torch.device("cpu")
META = torch.device("meta")
NAN, INF = float("nan"), float("inf")
SHAPES = [((4,), (4, 1, 1)), ((4, 3), (4, 1, 3)), ((4, 2, 3), (4, 2, 3)), ((0, 2, 3), (0, 2, 3))]


def parts(outputs: TeacherOutputs) -> list[Tensor]:
    return [tensor for tensor in vars(outputs).values() if tensor is not None]


@pytest.mark.parametrize(("shape", "expected"), SHAPES)
def test_outputs_are_brought_to_examples_teachers_tasks(shape: Any, expected: Any) -> None:
    values = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape) < 0.5
    outputs = TeacherOutputs(values, mask)
    assert outputs.values.shape == outputs.presence.shape == expected
    assert outputs.values.dtype == torch.float32 and not outputs.values.requires_grad
    masked = torch.where(mask, values.detach().float(), 0.0)
    assert torch.equal(outputs.values.flatten(), masked.flatten())
    assert torch.equal(outputs.presence.flatten(), mask.flatten())
    assert TeacherOutputs(values).presence.all()
    assert outputs.age_seconds is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_of_other_float_dtypes_are_kept_as_float32(dtype: torch.dtype) -> None:
    outputs = TeacherOutputs(torch.tensor([0.5, -3.0], dtype=dtype))
    assert outputs.values.dtype == torch.float32
    assert outputs.values.flatten().tolist() == [0.5, -3.0]


def test_presence_of_an_example_is_that_of_all_its_outputs() -> None:
    presence = torch.tensor([True, False, True, False])
    outputs = TeacherOutputs(torch.ones(4, 2, 3), presence)
    expected = [[[present] * 3] * 2 for present in presence.tolist()]
    assert outputs.presence.tolist() == expected
    assert outputs.values.tolist() == torch.tensor(expected).float().tolist()


def test_ages_by_example_and_teacher() -> None:
    ages = torch.tensor([60, 3600, 0, -1])
    single = TeacherOutputs(torch.ones(4), age_seconds=ages)
    assert single.age_seconds.tolist() == [[60.0], [3600.0], [0.0], [-1.0]]
    assert single.age_seconds.dtype == torch.float32
    both = TeacherOutputs(torch.ones(4, 2, 1), age_seconds=torch.stack([ages, ages + 1], 1))
    assert both.age_seconds[:, 1].tolist() == [61.0, 3601.0, 1.0, 0.0]


def test_the_givers_tensors_are_left_alone() -> None:
    values, presence = torch.tensor([NAN, 1.0]), torch.tensor([False, True])
    TeacherOutputs(values, presence)
    TeacherOutputs.from_probabilities(values, presence)
    assert values.isnan().tolist() == [True, False] and values[1] == 1.0
    assert presence.tolist() == [False, True]


def test_probabilities_become_logits() -> None:
    probabilities = torch.tensor([0.0, 1e-3, 0.25, 0.5, 1.0, NAN, 7.0])
    presence = torch.tensor([True] * 5 + [False] * 2)
    ages = torch.arange(7.0)
    outputs = TeacherOutputs.from_probabilities(probabilities, presence, ages)
    logits = outputs.values.flatten().tolist()
    limit = math.log(1e-6) - math.log1p(-1e-6)
    expected = [limit, math.log(1e-3) - math.log1p(-1e-3), -math.log(3), 0.0]
    assert logits[:4] == pytest.approx(expected, rel=1e-6)
    assert logits[4] == pytest.approx(-limit, abs=0.05)  # 1 - 1e-6 has few digits in float32
    assert logits[5:] == [0.0, 0.0]
    assert torch.equal(outputs.age_seconds.flatten(), ages)
    wider = TeacherOutputs.from_probabilities(torch.tensor([0.0, 1.0]), eps=0.25)
    assert wider.values.flatten().tolist() == pytest.approx([-math.log(3), math.log(3)], rel=1e-6)


def test_missing_outputs() -> None:
    outputs = TeacherOutputs.missing(4, 2, 3)
    assert outputs.values.shape == outputs.presence.shape == (4, 2, 3)
    assert not outputs.presence.any() and not outputs.values.any()
    assert TeacherOutputs.missing(0).values.shape == (0, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([0.5],), TypeError, "outputs should be a torch.Tensor; received list"),
        ((torch.ones(2, dtype=torch.int64),), TypeError, r"int64: convert with \.float\(\)"),
        (
            (torch.ones(2, dtype=torch.bool),),
            TypeError,
            "floating-point dtype; received torch.bool",
        ),
        ((torch.tensor(1.0),), ValueError, r"\(B, M, T\), \(B, T\) or \(B,\); received \(\)"),
        ((torch.ones(2, 1, 1, 1),), ValueError, r"received \(2, 1, 1, 1\)"),
        ((torch.tensor([0.0, NAN]),), ValueError, "finite; received nan for example 1.*presence"),
        ((torch.tensor([[0.0, -INF]]),), ValueError, "received -inf for example 0.*task 1"),
        ((torch.tensor([1e300]).double(),), ValueError, "finite; received inf for example 0"),
        ((torch.ones(2), [True, True]), TypeError, "presence should be .*received list"),
        ((torch.ones(2), torch.ones(2)), TypeError, "dtype torch.bool; received torch.float32"),
        ((torch.ones(2, 3), torch.ones(3).bool()), ValueError, r"\(2, 3\) or \(2,\); .*\(3,\)"),
        ((torch.ones(2, 3), torch.ones(2, 1).bool()), ValueError, r"\(2, 3\) or .*\(2, 1\)"),
        ((torch.ones(2), None, 60.0), TypeError, "age_seconds should be .*received float"),
        ((torch.ones(2), None, torch.ones(3)), ValueError, r"shape \(2, 1\); received \(3,\)"),
        ((torch.ones(2, 2, 1), None, torch.ones(2)), ValueError, r"\(2, 2\); received \(2,\)"),
    ],
)
def test_wrong_outputs_are_refused(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        TeacherOutputs(*arguments)


@pytest.mark.parametrize("value", [-1e-6, 1.0001, -3.0, NAN])
def test_what_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"should be (in \[0, 1\]|finite); received .* example 1"):
        TeacherOutputs.from_probabilities(torch.tensor([0.5, value]))
    with pytest.raises(TypeError, match=r"teacher probabilities .*received torch\.int64"):
        TeacherOutputs.from_probabilities(torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize("device", [CPU, META])
def test_to_moves_every_part_and_keeps_its_dtype(device: torch.device) -> None:
    ages, embeddings = torch.ones(4, 2), torch.ones(4, 2, 3)
    outputs = TeacherOutputs(torch.ones(4, 2, 1), age_seconds=ages, embeddings=embeddings)
    assert len(parts(outputs)) == 5
    moved = outputs.to(device, non_blocking=True)
    assert moved is not outputs and isinstance(moved, TeacherOutputs)
    for before, after in zip(parts(outputs), parts(moved), strict=True):
        assert after.device == device
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert before.device == CPU
    assert make_teacher().to(device).age_seconds is None


def test_every_part_is_pinned_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    ages, embeddings = torch.ones(2), torch.ones(2, 3)
    outputs = TeacherOutputs(torch.ones(2), age_seconds=ages, embeddings=embeddings)
    stream = object()
    pinned, recorded = [], []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, s: recorded.append((self, s)))
    copied = outputs.pin_memory()
    outputs.record_stream(stream)  # type: ignore[arg-type]
    for seen in (pinned, [tensor for tensor, _ in recorded]):
        assert len(seen) == 5
        assert all(a is b for a, b in zip(seen, parts(outputs), strict=True))
    assert all(recorded_stream is stream for _, recorded_stream in recorded)
    assert not any(a is b for a, b in zip(parts(copied), parts(outputs), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_to_cuda_on_a_stream_of_its_own() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    outputs = TeacherOutputs(torch.randn(8), age_seconds=torch.rand(8))
    pinned, stream = outputs.pin_memory(), torch.cuda.Stream(device)
    assert all(part.is_pinned() for part in parts(pinned))
    moved = pinned.to(device, True, data_copy_stream=stream)
    torch.cuda.current_stream(device).wait_stream(stream)
    moved.record_stream(torch.cuda.current_stream(device))
    for part, original in zip(parts(moved), parts(outputs), strict=True):
        assert part.device == device and torch.equal(part.cpu(), original)


@pytest.mark.parametrize("age", [float("nan"), float("inf")])
def test_an_age_that_is_not_finite_is_refused_where_there_is_an_output(age: float) -> None:
    values, ages = torch.zeros(2), torch.tensor([1.0, age])
    with pytest.raises(ValueError, match="age_seconds should be finite"):
        TeacherOutputs(values, age_seconds=ages)
    TeacherOutputs(values, torch.tensor([True, False]), ages)


def test_embeddings_are_kept_by_example_and_teacher() -> None:
    embeddings = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    embeddings.data[1] = float("nan")
    presence = torch.tensor([True, False, True])
    outputs = TeacherOutputs(torch.zeros(3), embeddings=embeddings, embedding_presence=presence)
    assert outputs.embeddings is not None and not outputs.embeddings.requires_grad
    assert outputs.embeddings.shape == (3, 1, 4) and outputs.embeddings.dtype == torch.float32
    assert torch.equal(outputs.embeddings[presence, 0], embeddings.detach()[presence].float())
    assert not outputs.embeddings[1].any()
    assert outputs.embedding_presence is not None
    assert outputs.embedding_presence.tolist() == [[True], [False], [True]]


def test_embeddings_are_those_of_examples_with_an_output_unless_told() -> None:
    presence = torch.tensor([[[True, False], [False, False]]])
    outputs = TeacherOutputs(torch.zeros(1, 2, 2), presence, embeddings=torch.ones(1, 2, 3))
    assert outputs.embeddings is not None and outputs.embedding_presence is not None
    assert outputs.embedding_presence.tolist() == [[True, False]]
    assert outputs.embeddings.tolist() == [[[1.0] * 3, [0.0] * 3]]


@pytest.mark.parametrize(
    ("embeddings", "presence", "match"),
    [
        (torch.zeros(2), None, r"embeddings should be of shape \(2, 1, E\); received \(2,\)"),
        (torch.zeros(3, 4), None, r"embeddings should be of shape \(2, 1, E\)"),
        (torch.zeros(2, 2, 4), None, r"embeddings should be of shape \(2, 1, E\)"),
        (torch.tensor([[0.0], [float("inf")]]), None, "received NaN or infinity for 1 examples"),
        (
            torch.zeros(2, 4),
            torch.ones(3, dtype=torch.bool),
            "embedding_presence should be of shape",
        ),
    ],
)
def test_bad_embeddings_are_refused(embeddings: Tensor, presence: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TeacherOutputs(torch.zeros(2), embeddings=embeddings, embedding_presence=presence)


def test_embeddings_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="embeddings should be of a floating-point dtype"):
        TeacherOutputs(torch.zeros(2), embeddings=torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"embedding_presence should be of dtype torch\.bool"):
        TeacherOutputs(
            torch.zeros(2), embeddings=torch.zeros(2, 4), embedding_presence=torch.ones(2)
        )


def test_missing_outputs_have_no_embeddings() -> None:
    outputs = TeacherOutputs.missing(3, 2)
    assert outputs.embeddings is not None and outputs.embeddings.shape == (3, 2, 0)
    assert outputs.embedding_presence is not None and not outputs.embedding_presence.any()


def test_probabilities_may_have_embeddings_beside_them() -> None:
    presence = torch.tensor([True, False])
    embeddings = {"embeddings": torch.ones(2, 3), "embedding_presence": presence}
    outputs = TeacherOutputs.from_probabilities(torch.tensor([0.5, 0.5]), **embeddings)
    assert outputs.values.flatten().tolist() == [0.0, 0.0]
    assert outputs.embeddings is not None and outputs.embeddings.sum() == 3
