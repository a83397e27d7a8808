"""Checks of ExFMMetrics, against NumPy in float64 on the data of all ranks."""

from __future__ import annotations

import numpy as np
import pytest
import rank_models as rm
import torch
from ranks import device
from torch import Tensor

from torchrec_exfm import ExFMMetrics, Task, TeacherOutputs

STEPS = 5


def _outputs(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """(G, T) logits (predictions of the regression) and labels of each step."""
    generator = torch.Generator().manual_seed(4)
    outputs = []
    for _ in range(steps):
        logits = torch.randn(rm.GLOBAL_SIZE, len(rm.TASKS), generator=generator) - 0.5
        labels = torch.rand(rm.GLOBAL_SIZE, len(rm.TASKS), generator=generator)
        labels[:, 0] = (labels[:, 0] < logits[:, 0].sigmoid()).float()
        outputs.append((logits, labels))
    return outputs


def _metrics(world_size: int, **options: int) -> ExFMMetrics:
    return ExFMMetrics(
        batch_size=rm.GLOBAL_SIZE // world_size,
        device=device(),
        tasks=rm.TASKS,
        teachers=rm.TEACHERS,
        **options,
    )


def _part(whole: Tensor, rank: int, world_size: int) -> Tensor:
    return whole.chunk(world_size)[rank].to(device())


def _fed(
    metrics: ExFMMetrics, outputs: list[tuple[Tensor, Tensor]], rank: int, world_size: int
) -> ExFMMetrics:
    parts = rm.parts(rank, world_size, steps=len(outputs))
    for (logits, labels), batch in zip(outputs, parts, strict=True):
        shares = (_part(whole, rank, world_size) for whole in (logits, labels))
        metrics.update((torch.zeros(()), *shares), rm.logged(batch).to(device()))
    return metrics


def check_metrics(rank: int, world_size: int) -> None:
    """Every metric, of two tasks and two teachers, over all ranks."""
    outputs = _outputs()
    found = _fed(_metrics(world_size), outputs, rank, world_size).compute()
    logits, labels = (torch.cat(parts).double().numpy() for parts in zip(*outputs, strict=True))
    p, y = 1 / (1 + np.exp(-logits[:, 0])), labels[:, 0]
    expected = {
        "ne/click": _log_loss(p, y) / _log_loss(np.full_like(y, y.mean()), y),
        "auc/click": _auc(p, y),
        "calibration/click": p.sum() / y.sum(),
        "mse/stay": np.square(logits[:, 1] - labels[:, 1]).mean(),
        **_reach(rm.global_data(steps=STEPS)),
    }
    assert found == pytest.approx(expected, rel=1e-6, abs=0)


def _log_loss(p: np.ndarray, y: np.ndarray) -> float:
    return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())


def _auc(p: np.ndarray, y: np.ndarray) -> float:
    """The share of pairs of a positive and a negative that are in order."""
    above = p[y == 1][:, None] - p[y == 0][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def _reach(data: list[rm.Columns]) -> dict[str, float]:
    """Coverage, and the mean age of the examples with an output."""
    presence = torch.cat([batch.presence for batch in data]).numpy()
    ages = torch.cat([batch.age_seconds for batch in data]).double().numpy()
    expected = {}
    for m, teacher in enumerate(rm.TEACHERS):
        for t, task in enumerate(rm.TASKS):
            expected[f"coverage/{teacher}/{task.name}"] = presence[:, m, t].mean()
        expected[f"age_seconds/{teacher}"] = ages[presence[:, m].any(-1), m].mean()
    return expected


def check_window_of_auc(rank: int, world_size: int) -> None:
    """The AUC is of the last examples, the others are of all."""
    outputs = _outputs()
    window = 2 * rm.GLOBAL_SIZE
    found = _fed(_metrics(world_size, window_size=window), outputs, rank, world_size).compute()
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*outputs[-2:], strict=True))
    assert found["auc/click"] == pytest.approx(_auc(logits[:, 0], labels[:, 0]), rel=1e-6)
    everything = _fed(_metrics(world_size), outputs, rank, world_size).compute()
    assert found.keys() == everything.keys()
    assert found.pop("auc/click") != everything.pop("auc/click")
    assert found == everything


def check_metrics_of_one_task(rank: int, world_size: int) -> None:
    """Logits of shape (B,), no teacher: metrics but no coverage, for none was given."""
    metrics = ExFMMetrics(batch_size=8, device=device())
    logits, labels = torch.tensor([2.0, -1.0]), torch.tensor([1, 0])
    metrics.update((torch.zeros(()), logits.to(device()), labels.to(device())))
    p, y = 1 / (1 + np.exp(-np.array([2.0, -1.0]))), np.array([1.0, 0.0])
    ne = _log_loss(p, y) / np.log(2)
    expected = {"ne/label": ne, "auc/label": 1.0, "calibration/label": p.sum()}
    assert metrics.compute() == pytest.approx(expected, rel=1e-6)


def check_metrics_in_training(rank: int, world_size: int) -> None:
    """Fed by ``progress``: coverage and age of each step's own outputs, none of them twice."""
    wrapper = rm.wrapped()
    trainee = rm.sharded(wrapper, world_size)
    pipeline = rm.pipeline_of(trainee, teacher=rm.logged)
    metrics = _metrics(world_size)
    batches = iter(rm.parts(rank, world_size, steps=STEPS))
    for _ in range(STEPS):
        metrics.update(pipeline.progress(batches), wrapper.last_teacher)
    found = metrics.compute()
    expected = _reach(rm.global_data(steps=STEPS))
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def check_uneven_batches(rank: int, world_size: int) -> None:
    """A last batch that is smaller than the others counts by its examples."""
    outputs = _outputs()
    logits, labels = outputs[-1]
    outputs[-1] = (logits[: rm.GLOBAL_SIZE // 2], labels[: rm.GLOBAL_SIZE // 2])
    metrics = _metrics(world_size)
    for logits, labels in outputs:
        shares = (_part(whole, rank, world_size) for whole in (logits, labels))
        metrics.update((torch.zeros(()), *shares))
    found = metrics.compute()
    logits, labels = (torch.cat(parts).double().numpy() for parts in zip(*outputs, strict=True))
    mse = np.square(logits[:, 1] - labels[:, 1]).mean()
    assert found["mse/stay"] == pytest.approx(mse, rel=1e-6)
    assert found["auc/click"] == pytest.approx(_auc(logits[:, 0], labels[:, 0]), rel=1e-6)


def check_wrong_shapes_are_refused(rank: int, world_size: int) -> None:
    """Logits and labels that do not fit the tasks."""
    metrics = _metrics(world_size)
    good = torch.zeros(8, 2, device=device())
    for bad in (torch.zeros(8), torch.zeros(8, 3), torch.zeros(8, 2, 1), torch.zeros(())):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=r"shape \(B, 2\) for the tasks"):
                metrics.update((torch.zeros(()), *pair))


def check_wrong_teachers_are_refused(rank: int, world_size: int) -> None:
    """Outputs of another number of teachers or tasks than the metrics were made for."""
    metrics = _metrics(world_size)
    good = torch.zeros(8, 2, device=device())
    with pytest.raises(ValueError, match=r"should be of shape.*2, 2"):
        metrics.update((torch.zeros(()), good, good), TeacherOutputs(torch.zeros(8)))


def check_names_of_tasks(rank: int, world_size: int) -> None:
    """Any name is a key of the results; two tasks can't have the same."""
    metrics = ExFMMetrics(batch_size=8, device=device(), tasks=(Task(name="ctr-1|a"),))
    metrics.update((torch.zeros(()), torch.zeros(8), torch.ones(8)))
    assert {"ne/ctr-1|a", "auc/ctr-1|a"} <= metrics.compute().keys()
    with pytest.raises(ValueError, match="distinct"):
        ExFMMetrics(batch_size=8, device=device(), tasks=(Task(), Task()))
