"""Checks of ExFMMetrics and RunMonitor, against NumPy in float64 on the data of all ranks."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import rank_models as rm
import torch
import torch.distributed as dist
from ranks import device
from torch import Tensor

from torchrec_exfm import (
    DistillationTerm,
    ExFMMetrics,
    RunMonitor,
    StudentAdapter,
    Task,
    TeacherOutputs,
)

STEPS = 5


def _outputs(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Return the logits (the regression's predictions) and labels (G, T) of each step."""
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


def _part(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    return tensor.chunk(world_size)[rank].to(device())


def _fed(
    metrics: ExFMMetrics, outputs: Sequence[tuple[Tensor, ...]], rank: int, world_size: int
) -> ExFMMetrics:
    parts = rm.parts(rank, world_size, steps=len(outputs))
    for step_outputs, batch in zip(outputs, parts, strict=True):
        shares = (_part(tensor, rank, world_size) for tensor in step_outputs)
        metrics.update((torch.zeros(()), *shares), rm.logged(batch).to(device()))
    return metrics


def check_metrics(rank: int, world_size: int) -> None:
    """Every metric, of two tasks and two teachers, over all ranks."""
    outputs = _outputs()
    metrics = _fed(_metrics(world_size), outputs, rank, world_size).compute()
    expected = expected_metrics(outputs, rm.global_data(steps=STEPS))
    assert metrics == pytest.approx(expected, rel=1e-6, abs=0)


def expected_metrics(
    outputs: Sequence[tuple[Tensor, ...]], data: list[rm.Columns]
) -> dict[str, float]:
    """Return the metrics in float64 of all ranks' logits, labels, weights and batches."""
    logits, labels, *weights = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    weight = weights[0] if weights else torch.ones_like(labels)
    click, stay = (values.numpy() for values in _by_task(logits, labels, weight))
    return {**binary_figures(*click), "mse/stay": mean_squared_error(*stay), **_reach(data)}


def _by_task(*columns: Tensor) -> Tensor:
    """Return logits, labels and weights (T, 3, B) in float64."""
    return torch.stack([column.double() for column in columns]).movedim(-1, 0)


def binary_figures(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> dict[str, float]:
    """Return NE, AUC and calibration of logits, labels (NaN if missing) and weights."""
    z, y, w = (values[~np.isnan(y)] for values in (z, y, w))
    p = 1 / (1 + np.exp(-z))
    undefined = {"ne/click": np.nan, "auc/click": np.nan, "calibration/click": np.nan}
    if not (w * y).any():
        return undefined
    calibration = (w * p).sum() / (w * y).sum()
    if not (w * (1 - y)).any():
        return {**undefined, "calibration/click": calibration}
    rate = (w * y).sum() / w.sum()
    constant_loss = -(w * (y * np.log(rate) + (1 - y) * np.log(1 - rate))).sum()
    return {
        "ne/click": (w * (np.logaddexp(0, z) - y * z)).sum() / constant_loss,
        "auc/click": area_by_pairs(z, y, w),
        "calibration/click": calibration,
    }


def area_by_pairs(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Return the AUC: the share of pairs of a positive and a negative in order, ties as half."""
    weight = np.outer(w * y, w * (1 - y))
    above = z[:, None] - z[None, :]
    return float((weight * ((above > 0) + 0.5 * (above == 0))).sum() / weight.sum())


def mean_squared_error(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    counted = ~np.isnan(y) & (w > 0)
    z, y, w = z[counted], y[counted], w[counted]
    return float((w * np.square(z - y)).sum() / w.sum()) if len(w) else np.nan


def _reach(data: list[rm.Columns]) -> dict[str, float]:
    """Return the coverage, and the mean age of the examples with an output."""
    if not data:
        return {}
    presence = torch.cat([batch.presence for batch in data]).numpy()
    ages = torch.cat([batch.age_seconds for batch in data]).double().numpy()
    expected = {}
    for m, teacher in enumerate(rm.TEACHERS):
        for t, task in enumerate(rm.TASKS):
            expected[f"coverage/{teacher}/{task.name}"] = presence[:, m, t].mean()
        expected[f"age_seconds/{teacher}"] = ages[presence[:, m].any(-1), m].mean()
    return expected


MISSING = ("first", "second", "both", "batch", "rank", "everything")  # labels of tasks, and others


def check_missing_labels(rank: int, world_size: int, case: str) -> None:
    """NaN labels are left out of their task's figures, but not of the coverage."""
    outputs, half = _outputs(), rm.GLOBAL_SIZE // 2
    for step, (_, labels) in enumerate(outputs):
        some = torch.rand(len(labels), generator=torch.Generator().manual_seed(step)) < 0.3
        if case in ("first", "both"):
            labels[some, 0] = torch.nan
        if case in ("second", "both"):
            labels[some.flip(0), 1] = torch.nan
        if case == "everything" or (case == "batch" and step == 0):
            labels.fill_(torch.nan)
        if case == "rank":
            labels[half:] = torch.nan  # all that the second of two ranks sees
    metrics = _fed(_metrics(world_size), outputs, rank, world_size)
    expected = expected_metrics(outputs, rm.global_data(steps=STEPS))
    assert np.isnan(expected["ne/click"]) == (case == "everything")
    assert metrics.compute() == pytest.approx(expected, rel=1e-6, abs=0, nan_ok=True)
    more = [(logits, labels.nan_to_num(0.0).round()) for logits, labels in _outputs()]
    computed = _fed(metrics, more, rank, world_size).compute()
    expected = expected_metrics([*outputs, *more], 2 * rm.global_data(steps=STEPS))
    assert computed == pytest.approx(expected, rel=1e-6, abs=0)


def check_weights(rank: int, world_size: int) -> None:
    """Fractional weights with missing labels, and ties between and within the ranks."""
    generator = torch.Generator().manual_seed(8)
    outputs = []
    for logits, labels in _outputs():
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = torch.nan
        weights = torch.randint(4, labels.shape, generator=generator) * 0.7
        outputs.append(((2 * logits).round() / 2, labels, weights))
    expected = expected_metrics(outputs, rm.global_data(steps=STEPS))
    unweighted = expected_metrics([pair[:2] for pair in outputs], rm.global_data(steps=STEPS))
    assert abs(expected["auc/click"] - unweighted["auc/click"]) > 1e-3
    computed = _fed(_metrics(world_size), outputs, rank, world_size).compute()
    assert computed == pytest.approx(expected, rel=1e-6, abs=0)


def check_undefined_metrics(rank: int, world_size: int) -> None:
    """Metrics are NaN until some rank has positives and negatives; MSE until it has a label."""
    metrics = _metrics(world_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics' of no update
        names = {name for name, value in metrics.compute().items() if np.isnan(value)}
    assert names == {"ne/click", "auc/click", "calibration/click", "mse/stay"}

    def nan_names(click: float, stay: float) -> set[str]:
        """Return the names that are NaN after a step in which the last rank alone has labels."""
        labels = torch.tensor([[click, stay]] if rank == world_size - 1 else [[torch.nan] * 2])
        metrics.update((torch.zeros(()), torch.ones(1, 2).to(device()), labels.to(device())))
        return {name for name, value in metrics.compute().items() if np.isnan(value)}

    assert nan_names(torch.nan, torch.nan) == names
    assert nan_names(0.0, torch.nan) == names
    assert nan_names(torch.nan, 5.0) == names - {"mse/stay"}
    assert nan_names(1.0, 5.0) == set()


def check_window_of_auc(rank: int, world_size: int) -> None:
    """The AUC covers the last examples, the other metrics all."""
    outputs = _outputs()
    window = 2 * rm.GLOBAL_SIZE
    computed = _fed(_metrics(world_size, window_size=window), outputs, rank, world_size).compute()
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*outputs[-2:], strict=True))
    area = area_by_pairs(logits[:, 0], labels[:, 0], np.ones(window))
    assert computed["auc/click"] == pytest.approx(area, rel=1e-6)
    everything = _fed(_metrics(world_size), outputs, rank, world_size).compute()
    assert computed.keys() == everything.keys()
    assert computed.pop("auc/click") != everything.pop("auc/click")
    assert computed == everything


def check_metrics_of_one_task(rank: int, world_size: int) -> None:
    """Logits of shape (B,) without a teacher give metrics, but no coverage."""
    metrics = ExFMMetrics(batch_size=8, device=device())
    logits, labels = torch.tensor([2.0, -1.0]), torch.tensor([1, 0])
    metrics.update((torch.zeros(()), logits.to(device()), labels.to(device())))
    expected = binary_figures(np.array([2.0, -1.0]), np.array([1.0, 0.0]), np.ones(2))
    expected = {name.replace("click", "label"): value for name, value in expected.items()}
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
    computed = metrics.compute()
    expected = _reach(rm.global_data(steps=STEPS))
    assert {key: computed[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def check_uneven_batches(rank: int, world_size: int) -> None:
    """A last batch that is smaller than the others counts by its examples."""
    outputs = _outputs()
    logits, labels = outputs[-1]
    outputs[-1] = (logits[: rm.GLOBAL_SIZE // 2], labels[: rm.GLOBAL_SIZE // 2])
    metrics = _metrics(world_size)
    for logits, labels in outputs:
        shares = (_part(tensor, rank, world_size) for tensor in (logits, labels))
        metrics.update((torch.zeros(()), *shares))
    computed = metrics.compute()
    assert computed == pytest.approx(expected_metrics(outputs, []), rel=1e-6)


def check_wrong_shapes_are_refused(rank: int, world_size: int) -> None:
    """Logits and labels that do not fit the tasks."""
    metrics = _metrics(world_size)
    good = torch.zeros(8, 2, device=device())
    for bad in (torch.zeros(8), torch.zeros(8, 3), torch.zeros(8, 2, 1), torch.zeros(())):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=r"should be of shape \((B|8), 2\)"):
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


def clicked(data: list[rm.Columns]) -> list[rm.Columns]:
    """Round the clicks of the batches to 0 or 1."""
    for batch in data:
        batch.columns["labels"] = batch.labels.clone()
        batch.labels[:, 0].round_()
    return data


def expected_losses(
    terms: Sequence[DistillationTerm], losses: list[Tensor], data: list[rm.Columns]
) -> dict[str, float]:
    """Return the mean of each term over the steps with an output for it; losses are (K,) a step."""
    expected = {}
    for k, term in enumerate(terms):
        columns = [[task.name for task in rm.TASKS].index(task) for task in term.tasks or ()]
        m = rm.TEACHERS.index(term.teacher)
        step_losses = [
            float(term_losses[k])
            for term_losses, batch in zip(losses, data, strict=True)
            if bool(batch.presence[:, m, columns or slice(None)].any())
        ]
        if step_losses:
            expected[f"distillation_loss/{term.name}"] = sum(step_losses) / len(step_losses)
    return expected


def expected_adapter_loss(
    adapter: StudentAdapter, teacher: TeacherOutputs, labels: Tensor
) -> float:
    """Return L_SA by NumPy in float64: the sum over teachers of the mean over tasks."""
    values = teacher.values.double().numpy()
    values[..., 0] = values[..., 0].clip(-15, 15)
    presence, y = teacher.presence.numpy(), labels.double().numpy()
    total = 0.0
    for m, perceptron in enumerate(adapter.mlps):
        first, bias, last, last_bias = (
            p.detach().double().numpy() for p in perceptron.parameters()
        )
        hidden = np.concatenate([values[:, m], presence[:, m]], 1) @ first.T + bias
        z = values[:, m] + np.maximum(hidden, 0) @ last.T + last_bias
        losses = np.stack([np.logaddexp(0, z[:, 0]) - y[:, 0] * z[:, 0], (z - y)[:, 1] ** 2], 1)
        counted = [column[rows] for column, rows in zip(losses.T, presence[:, m].T, strict=True)]
        total += sum(float(column.mean()) for column in counted if len(column)) / len(rm.TASKS)
    return total


def check_monitor(rank: int, world_size: int) -> None:
    """The monitor's scalars cover all ranks, and rank 0 alone reports them."""
    # here, so that a machine without TensorBoard can run the other checks
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kinds = (*rm.HEADS, *rm.ADAPTED)
    wrapper = rm.wrapped(terms=kinds)
    trainee = rm.sharded(wrapper, world_size)
    adapter = rm.two_task_adapter()
    pipeline = rm.pipeline_of(trainee, teacher=rm.logged, on_teacher_error="mask", adapter=adapter)
    data = clicked(rm.global_data(steps=STEPS))
    batches = iter([rm.part_of(batch, rank, world_size) for batch in data])
    outputs, student, terms, adapted = [], [], [], []
    line = io.StringIO()
    with rm.shared_folder() as folder, contextlib.redirect_stderr(line):
        with RunMonitor(
            pipeline, _metrics(world_size), folder=folder, start_examples=100, every_steps=3
        ) as monitor:
            for step in range(STEPS):
                before = copy.deepcopy(adapter).cpu()
                adapted.append(
                    expected_adapter_loss(before, rm.logged(data[step]), data[step].labels)
                )
                output = pipeline.progress(batches)
                pipeline._masked.failures += 1
                monitor.step(output)
                loss, logits, labels = (torch.stack(rm.on_every_rank(value)) for value in output)
                outputs.append((logits.flatten(0, 1).cpu(), labels.flatten(0, 1).cpu()))
                student.append(float(loss.double().mean()))
                terms.append(torch.stack(rm.on_every_rank(wrapper.last_losses)).double().mean(0))
        dist.barrier()
        events = EventAccumulator(folder).Reload()
    scalars = monitor.scalars()
    assert scalars.pop("examples_per_second") > 0
    expected = {
        **expected_metrics(outputs, data),
        **expected_losses(kinds, terms[3:], data[3:]),
        "student_loss": sum(student[3:]) / 2,
        "adapter_loss": sum(adapted[3:]) / 2,
        "teacher_failures": STEPS * world_size,
    }
    assert scalars == pytest.approx(expected, rel=1e-6, abs=0)
    for name, value in expected.items():
        points = events.Scalars(name)
        assert points[-1].step == 100 + STEPS * rm.GLOBAL_SIZE
        assert points[-1].value == pytest.approx(value, rel=1e-6)
    assert [point.step for point in events.Scalars("student_loss")] == [148, 180]
    assert (line.getvalue() != "") == (rank == 0)
    assert monitor.examples == 180 and len(set(adapted)) == STEPS


def check_a_monitor_that_cannot_write(rank: int, world_size: int) -> None:
    """A folder that rank 0 can't open is an error on every rank; none is left waiting."""
    pipeline = rm.pipeline_of(rm.sharded(rm.wrapped(), world_size), teacher=rm.logged)
    with rm.shared_folder() as folder:
        file = Path(folder) / "file"
        if rank == 0:
            file.touch()
        with pytest.raises(OSError, match="file"):
            RunMonitor(pipeline, _metrics(world_size), folder=file)
        missing = {"tensorboard": None, "torch.utils.tensorboard": None} if rank == 0 else {}
        with mock.patch.dict(sys.modules, missing), pytest.raises(ImportError, match="pip install"):
            RunMonitor(pipeline, _metrics(world_size), folder=Path(folder) / "runs")
