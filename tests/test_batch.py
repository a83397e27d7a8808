"""ExFMBatch, which carries teacher outputs beside the user's own batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import make_batch, make_hand_batch, make_teacher
from torch import Tensor
from torchrec.streamable import Pipelineable

from torchrec_exfm import ExFMBatch, TeacherOutputs
from torchrec_exfm.batch import StepInputs

CPU = torch.device("cpu")
META = torch.device("meta")


class Recording(Pipelineable):
    """A user's batch that records its calls; it has keys, and a length of 0."""

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
    assert batch.step_inputs == StepInputs(teacher)


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
    copied = copy.copy(batch)
    assert copied is not batch and copied.batch is not batch.batch
    assert copied.numbers is batch.numbers and copied.teacher is batch.teacher
    copied.batch.numbers = torch.zeros(1)
    assert batch.numbers.shape == (8, 5)


def test_copy_keeps_what_the_pipeline_has_set() -> None:
    batch = ExFMBatch(make_hand_batch(), make_teacher())
    batch.step_inputs = StepInputs(batch.teacher, labels=torch.ones(8), counts=torch.ones(2, 1, 1))
    assert copy.copy(batch).step_inputs is batch.step_inputs
    for copied in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert torch.equal(copied.step_inputs.labels, batch.step_inputs.labels)
        assert copied.teacher is copied.step_inputs.teacher


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
@pytest.mark.parametrize("make", [make_batch, make_hand_batch])
def test_survives_pickle_and_deepcopy(make: Any, duplicate: Any) -> None:
    teacher = TeacherOutputs(torch.tensor([1.0, float("nan")] * 4), torch.tensor([True, False] * 4))
    batch = ExFMBatch(make(0, 8), teacher)
    copied = duplicate(batch)
    assert type(copied) is ExFMBatch and type(copied.batch) is type(batch.batch)
    assert torch.equal(copied.teacher.values, teacher.values)
    assert torch.equal(copied.teacher.presence, teacher.presence)
    for name, value in vars(batch.batch).items():
        after = getattr(copied, name)
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


class Bare(Pipelineable):
    """The least that a Pipelineable must have, like TorchRec's own ModelInput."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Bare:
        return self

    def record_stream(self, stream: Any) -> None:
        pass


@pytest.mark.parametrize("user", [{"ids": 1}, (1, 2), [torch.ones(2)], Bare()], ids=type)
def test_any_batch_is_taken_and_its_methods_asked_for_where_they_are_called(user: Any) -> None:
    batch = ExFMBatch(user, make_teacher())
    if isinstance(user, Bare):
        assert batch.to(CPU).batch is user
        methods = ["pin_memory"]
    else:
        key = "ids" if isinstance(user, dict) else 0
        assert batch[key] is user[key]
        methods = ["to", "record_stream", "pin_memory"]
    for name in methods:
        arguments = {"to": (CPU,), "record_stream": (None,)}.get(name, ())
        message = f"should have the method {name} .*received {type(user).__name__} without it"
        with pytest.raises(TypeError, match=message):
            getattr(batch, name)(*arguments)


def test_outputs_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="should be TeacherOutputs; received Tensor: make it"):
        ExFMBatch(Recording(), torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("make", [make_batch, make_hand_batch])
def test_to_cuda_from_pinned_memory(make: Any) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batch = ExFMBatch(make(0, 8), make_teacher(0, 8))
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        moved = batch.pin_memory().to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(stream)
    moved.record_stream(torch.cuda.current_stream(device))
    assert type(moved) is ExFMBatch and type(moved.batch) is type(batch.batch)
    assert torch.equal(moved.teacher.values.cpu(), batch.teacher.values)
    for name, value in vars(batch.batch).items():
        part, before = getattr(moved, name), value
        if not isinstance(value, Tensor):
            part, before = part.values(), value.values()
        assert part.device == device and torch.equal(part.cpu(), before)
