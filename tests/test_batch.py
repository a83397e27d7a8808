"""The teacher's outputs, and the batch that carries them beside the user's own."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from models import HandBatch, make_batch, make_hand_batch, make_teacher
from torch import Tensor
from torchrec.streamable import Pipelineable

from torchrec_exfm import ExFMBatch, TeacherOutputs

CPU = torch.device("cpu")
META = torch.device("meta")
NAN, INF = float("nan"), float("inf")
SHAPES = [((4,), (4, 1, 1)), ((4, 3), (4, 1, 3)), ((4, 2, 3), (4, 2, 3)), ((0, 2, 3), (0, 2, 3))]


class Recording(Pipelineable):
    """A user's batch that notes what is asked of it; it has keys, and a length of 0."""

    def __init__(self, calls: list[Any] | None = None) -> None:
        self.calls: list[Any] = [] if calls is None else calls
        self.rows = {"ids": [1, 2]}

    def to(self, device: torch.device, non_blocking: bool = False, **kwargs: Any) -> Recording:
        self.calls.append(("to", device, non_blocking, kwargs))
        return Recording(self.calls)

    def pin_memory(self) -> Recording:
        self.calls.append(("pin_memory",))
        return Recording(self.calls)

    def record_stream(self, stream: Any) -> None:
        self.calls.append(("record_stream", stream))

    def __getitem__(self, key: str) -> list[int]:
        return self.rows[key]

    def __len__(self) -> int:
        return 0


def parts(outputs: TeacherOutputs) -> list[Tensor | None]:
    return [outputs.values, outputs.presence, outputs.age_seconds]


@pytest.mark.parametrize(("shape", "expected"), SHAPES)
def test_outputs_are_brought_to_examples_teachers_tasks(shape: Any, expected: Any) -> None:
    given = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape) < 0.5
    outputs = TeacherOutputs(given, mask)
    assert outputs.values.shape == outputs.presence.shape == expected
    assert outputs.values.dtype == torch.float32 and not outputs.values.requires_grad
    kept = torch.where(mask, given.detach().float(), 0.0)
    assert torch.equal(outputs.values.flatten(), kept.flatten())
    assert torch.equal(outputs.presence.flatten(), mask.flatten())
    assert TeacherOutputs(given).presence.all()
    assert outputs.age_seconds is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_of_other_float_dtypes_are_kept_as_float32(dtype: torch.dtype) -> None:
    outputs = TeacherOutputs(torch.tensor([0.5, -3.0], dtype=dtype))
    assert outputs.values.dtype == torch.float32
    assert outputs.values.flatten().tolist() == [0.5, -3.0]


def test_presence_of_an_example_is_that_of_all_its_outputs() -> None:
    presence = torch.tensor([True, False, True, False])
    outputs = TeacherOutputs(torch.ones(4, 2, 3), presence)
    expected = [[[there] * 3] * 2 for there in presence.tolist()]
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
    outputs = TeacherOutputs(torch.ones(4, 2, 1), age_seconds=torch.ones(4, 2))
    moved = outputs.to(device, non_blocking=True)
    assert moved is not outputs and isinstance(moved, TeacherOutputs)
    for before, after in zip(parts(outputs), parts(moved), strict=True):
        assert after.device == device
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert before.device == CPU
    assert make_teacher().to(device).age_seconds is None


def test_every_part_is_pinned_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, stream = TeacherOutputs(torch.ones(2), age_seconds=torch.ones(2)), object()
    pinned, recorded = [], []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, s: recorded.append((self, s)))
    copied = outputs.pin_memory()
    outputs.record_stream(stream)  # type: ignore[arg-type]
    for seen in (pinned, [tensor for tensor, _ in recorded]):
        assert all(a is b for a, b in zip(seen, parts(outputs), strict=True))
    assert all(of is stream for _, of in recorded)
    assert not any(a is b for a, b in zip(parts(copied), parts(outputs), strict=True))


def test_both_parts_of_a_batch_are_moved_pinned_and_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(TeacherOutputs, "to", lambda self, *a, **k: asked.append((a, k)) or self)
    monkeypatch.setattr(TeacherOutputs, "pin_memory", lambda self: asked.append("pin") or self)
    monkeypatch.setattr(TeacherOutputs, "record_stream", lambda self, s: asked.append(s))
    user, stream, copy_stream = Recording(), object(), object()
    batch = ExFMBatch(user, make_teacher())
    moved = batch.to(META, non_blocking=True, data_copy_stream=copy_stream)
    pinned = batch.pin_memory()
    batch.record_stream(stream)  # type: ignore[arg-type]
    copying = {"data_copy_stream": copy_stream}
    expected = [("to", META, True, copying), ("pin_memory",), ("record_stream", stream)]
    assert user.calls == expected
    assert asked == [((META, True), copying), "pin", stream]
    for made in (moved, pinned):
        assert type(made) is ExFMBatch and isinstance(made.batch, Recording)
        assert made.batch is not user


@pytest.mark.parametrize("make", [make_batch, make_hand_batch])
def test_is_generic_over_the_users_batch(make: Any) -> None:
    user, teacher = make(0, 8), make_teacher(0, 8, missing=0.3)
    batch = ExFMBatch(user, teacher)
    assert batch.batch is user and batch.teacher is teacher
    for name, value in vars(user).items():
        assert getattr(batch, name) is value
    moved = batch.to(CPU)
    assert type(moved.batch) is type(user)
    assert isinstance(batch, Pipelineable) and isinstance(teacher, Pipelineable)
    assert batch.adapted is None and batch.count is None


def test_attributes_and_items_are_the_users_batchs() -> None:
    batch = ExFMBatch(Recording(), make_teacher())
    assert batch["ids"] == [1, 2] and batch.rows == {"ids": [1, 2]}
    assert not hasattr(batch, "labels")
    with pytest.raises(AttributeError, match="'Recording' object has no attribute 'label'"):
        _ = batch.label
    with pytest.raises(KeyError, match="x"):
        _ = batch["x"]


def test_a_batch_is_true_whatever_the_length_of_the_users() -> None:
    assert not Recording()
    assert ExFMBatch(Recording(), make_teacher())


def test_copy_shares_the_tensors_and_nothing_else() -> None:
    batch = ExFMBatch(make_hand_batch(), make_teacher())
    batch.adapted, batch.count = torch.ones(8, 1, 1), torch.ones(1, 1)
    copied = copy.copy(batch)
    assert copied is not batch and copied.batch is not batch.batch
    assert copied.numbers is batch.numbers and copied.teacher is batch.teacher
    copied.batch.numbers = torch.zeros(1)
    assert batch.numbers.shape == (8, 5)
    assert copied.adapted is batch.adapted and copied.count is batch.count


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
@pytest.mark.parametrize("make", [make_batch, make_hand_batch])
def test_survives_pickle_and_deepcopy(make: Any, duplicate: Any) -> None:
    teacher = TeacherOutputs(torch.tensor([1.0, NAN] * 4), torch.tensor([True, False] * 4))
    batch = ExFMBatch(make(0, 8), teacher)
    again = duplicate(batch)
    assert type(again) is ExFMBatch and type(again.batch) is type(batch.batch)
    assert torch.equal(again.teacher.values, teacher.values)
    assert torch.equal(again.teacher.presence, teacher.presence)
    for name, value in vars(batch.batch).items():
        after = getattr(again, name)
        if isinstance(value, Tensor):
            assert torch.equal(after, value) and after is not value
        else:
            assert torch.equal(after.values(), value.values()) and after.keys() == value.keys()


def test_a_batch_comes_out_of_a_data_loader_with_workers() -> None:
    batches = [ExFMBatch(make_batch(seed, 4), make_teacher(seed, 4)) for seed in range(2)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1)
    for before, after in zip(batches, loader, strict=True):
        assert torch.equal(after.dense_features, before.dense_features)
        assert torch.equal(after.teacher.values, before.teacher.values)


@pytest.mark.parametrize(
    ("user", "absent"),
    [({"ids": 1}, "dict without to, record_stream, pin_memory"), (torch.ones(2).numpy(), "to, ")],
)
def test_a_batch_without_the_methods_is_refused(user: Any, absent: str) -> None:
    with pytest.raises(TypeError, match=f"should have the methods to, .*received .*{absent}"):
        ExFMBatch(user, make_teacher())
    with pytest.raises(TypeError, match="teacher should be TeacherOutputs; received Tensor"):
        ExFMBatch(Recording(), torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("make", [make_batch, make_hand_batch])
def test_to_cuda_from_pinned_memory(make: Any) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    teacher = TeacherOutputs(torch.randn(8), age_seconds=torch.rand(8))
    pinned = ExFMBatch(make(0, 8), teacher).pin_memory()
    assert all(part.is_pinned() for part in parts(pinned.teacher))
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        moved = pinned.to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(stream)
    moved.record_stream(torch.cuda.current_stream(device))
    on_stream = teacher.to(device, True, data_copy_stream=stream)
    torch.cuda.current_stream(device).wait_stream(stream)
    for copied in (moved.teacher, on_stream):
        for part, original in zip(parts(copied), parts(teacher), strict=True):
            assert part.device == device and torch.equal(part.cpu(), original)
    field = "numbers" if make is make_hand_batch else "dense_features"
    assert isinstance(moved.batch, HandBatch) == (make is make_hand_batch)
    assert getattr(moved, field).device == device
