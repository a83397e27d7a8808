"""ExFMMetrics on one rank: missing labels, weights, ties, undefined metrics, refused inputs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import rank_checks_metrics as metrics_checks
import torch
from costs import Costs
from models import CPU, make_teacher
from torch import Tensor

from torchrec_exfm import ExFMMetrics, Task
from torchrec_exfm import tasks as exfm_tasks

TASKS = (Task(name="click"), Task(name="buy"), Task(name="stay", regression=True))
SIZE, STEPS = 16, 3
LOSS = torch.zeros(())


def metrics_of(*tasks: Task, **options: Any) -> ExFMMetrics:
    return ExFMMetrics(
        **{"batch_size": SIZE, "device": CPU, "tasks": tasks or (Task(),), **options}
    )


def steps(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return logits (B, T), many of them equal, and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS, SIZE, len(TASKS))
    logits = torch.randn(shape, generator=generator).mul(2).round() / 2
    labels = (torch.rand(shape, generator=generator) < logits.sigmoid()).float()
    return list(zip(logits, labels, strict=True))


def cut(feed: Iterable[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    """Compute the metrics of each task alone, with each example repeated by its weight."""
    alone = [metrics_of(task) for task in TASKS]
    for logits, labels, weights in feed:
        for t, metrics in enumerate(alone):
            times = torch.where(labels[:, t].isnan(), 0, weights[:, t]).long()
            columns = (values[:, t].repeat_interleave(times) for values in (logits, labels))
            metrics.update((LOSS, *columns))
    return {name: value for metrics in alone for name, value in metrics.compute().items()}


def assert_figures(actual: dict[str, float], expected: dict[str, float]) -> None:
    assert actual == pytest.approx(expected, rel=1e-9, abs=0, nan_ok=True)


# ---- Missing labels and weights ----


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # where all of a task are missing
@pytest.mark.parametrize("shares", list(itertools.product((0.0, 0.4, 1.0), repeat=3)))
def test_a_missing_label_leaves_the_example_out(shares: tuple[float, ...]) -> None:
    """With none, some or all of a task's labels missing, the others count as before."""
    generator = torch.Generator().manual_seed(1)
    metrics, feed = metrics_of(*TASKS), []
    for logits, labels in steps():
        labels[torch.rand(labels.shape, generator=generator) < torch.tensor(shares)] = torch.nan
        metrics.update((LOSS, logits, labels))
        feed.append((logits, labels, torch.ones_like(labels)))
    assert_figures(metrics.compute(), cut(feed))


def test_a_batch_without_labels_changes_nothing() -> None:
    metrics = metrics_of(*TASKS)
    for logits, labels in steps():
        metrics.update((LOSS, logits, labels))
    before = metrics.compute()
    nothing = torch.full_like(labels, torch.nan)
    metrics.update((LOSS, logits, nothing))
    metrics.update((LOSS, logits, labels), weights=torch.zeros(SIZE))
    metrics.update((LOSS, nothing, nothing))  # and the student's logits are NaN, too
    metrics.update((LOSS, logits[:0], labels[:0]))
    assert metrics.compute() == before


GIVERS: dict[str, Callable[[ExFMMetrics, Tensor, Tensor, Tensor], None]] = {
    "argument": lambda m, z, y, w: m.update((LOSS, z, y), weights=w),
    "output": lambda m, z, y, w: m.update((LOSS, z, y, w)),
    "argument goes first": lambda m, z, y, w: m.update((LOSS, z, y, 1 + w), weights=w),
}


@pytest.mark.parametrize("giver", GIVERS)
@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64])
def test_a_weight_is_how_often_an_example_counts(
    giver: str, by_task: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    metrics, feed = metrics_of(*TASKS), []
    for logits, labels in steps():
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = torch.nan
        shape = (SIZE, len(TASKS) if by_task else 1)
        weights = torch.randint(3, shape, generator=generator).to(dtype)
        GIVERS[giver](metrics, logits, labels, weights if by_task else weights[:, 0])
        feed.append((logits, labels, weights.expand_as(labels)))
    assert_figures(metrics.compute(), cut(feed))


def test_teachers_reach_is_of_all_examples() -> None:
    metrics = metrics_of()
    logits = torch.zeros(8)
    metrics.update((LOSS, logits, logits + torch.nan, logits), make_teacher(0, 8))
    assert metrics.compute()["coverage/teacher/label"] == 1 and metrics.own_examples() == 8


# ---- The AUC ----


@pytest.mark.parametrize("weighted", [False, True])
def test_the_auc_is_that_of_the_pairs_in_any_order(weighted: bool) -> None:
    """Logits are rounded to bfloat16, so that many are equal."""
    generator = torch.Generator().manual_seed(3)
    labels = (torch.rand(2000, generator=generator) < 0.3).float()
    logits = (torch.randn(2000, generator=generator) + 0.1 * labels).bfloat16()
    weights = (
        torch.randint(1, 5, (2000,), generator=generator) / 4.0 if weighted else labels * 0 + 1
    )
    expected = metrics_checks.area_by_pairs(
        *(x.double().numpy() for x in (logits, labels, weights))
    )
    orders = [torch.randperm(2000, generator=generator) for _ in range(3)]
    orders += [labels.argsort(), labels.argsort(descending=True)]
    areas = set()
    for order in orders:
        metrics = metrics_of(batch_size=500)
        for part in order.split(500):
            metrics.update((LOSS, logits[part], labels[part]), weights=weights[part])
        areas.add(metrics.compute()["auc/label"])
    assert len(areas) == 1 and areas.pop() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "area"),
    [
        ([0.3] * 4, [1, 0, 1, 0], 0.5),
        ([0.3] * 4, [0, 1, 0, 1], 0.5),
        ([20.0, 30.0], [0, 1], 1.0),  # σ of both is 1 in single precision
        ([30.0, 20.0], [0, 1], 0.0),
        ([-float("inf"), float("inf")], [0, 1], 1.0),
        ([1.0, 2.0], [0.25, 0.75], (0.75 * 0.75 + (0.75 * 0.25 + 0.25 * 0.75) / 2)),  # soft labels
        ([1.0, float("nan")], [0, 1], float("nan")),
    ],
)
def test_the_auc_of_a_few(logits: list[float], labels: list[float], area: float) -> None:
    metrics = metrics_of()
    metrics.update((LOSS, torch.tensor(logits), torch.tensor(labels)))
    assert metrics.compute()["auc/label"] == pytest.approx(area, rel=1e-6, nan_ok=True)


def test_the_window_of_the_auc_has_a_place_for_every_example() -> None:
    """An example without a label takes a place, and one of weight 2 takes one."""
    metrics = metrics_of(batch_size=2, window_size=4)

    def auc_after(labels: list[float], weight: float = 1.0) -> float:
        output = (LOSS, torch.tensor([1.0, 2.0]), torch.tensor(labels))
        metrics.update(output, weights=torch.full((2,), weight))
        return metrics.compute()["auc/label"]

    assert auc_after([0.0, 1.0], 2.0) == 1.0
    assert auc_after([torch.nan, torch.nan]) == 1.0
    assert np.isnan(auc_after([torch.nan, torch.nan]))  # the labels have left the window
    assert not np.isnan(metrics.compute()["ne/label"])


# ---- What is not defined ----


@pytest.mark.parametrize(
    ("labels", "weights", "undefined"),
    [
        ([1.0, 1.0], None, {"ne", "auc"}),
        ([0.0, 0.0], None, {"ne", "auc", "calibration"}),
        ([0.0, 1.0], [0.0, 0.1], {"ne", "auc"}),
        ([0.0, 1.0], [0.1, 0.0], {"ne", "auc", "calibration"}),
        ([0.0, 1.0], [1e-9, 1e-9], set()),
        ([0.5, 0.5], None, set()),
        ([], None, {"ne", "auc", "calibration"}),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of no examples
def test_what_is_not_defined_is_nan(
    labels: list[float], weights: list[float] | None, undefined: set[str]
) -> None:
    metrics = metrics_of()
    values = torch.tensor(labels)
    for _ in range(3):
        weight_tensor = None if weights is None else torch.tensor(weights)
        metrics.update((LOSS, values * 0 + 0.3, values), weights=weight_tensor)
    result = metrics.compute()
    assert {
        name.partition("/")[0] for name, value in result.items() if np.isnan(value)
    } == undefined


# ---- Going on ----


def test_going_on_with_labels_missing_and_weights() -> None:
    straight, saved = metrics_of(*TASKS, window_size=40), metrics_of(*TASKS, window_size=40)
    feed = [*steps(), *steps(1)]
    for at, (_, labels) in enumerate(feed):
        labels[::3] = torch.nan
        if at >= 2:
            labels[:, 0] = torch.nan  # the metrics are defined by the steps before
    for at, (logits, labels) in enumerate(feed):
        output = (LOSS, logits, labels, torch.arange(SIZE) % 3)
        if at == 2:
            resumed = metrics_of(*TASKS, window_size=40)
            resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
            saved = resumed
        straight.update(output)
        saved.update(output)
    actual, expected = saved.compute(), straight.compute()
    assert actual == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert not np.isnan(expected["ne/click"])


# ---- What is refused ----

VALUES = torch.zeros(4)


@pytest.mark.parametrize(
    ("output", "outline"),
    [
        ({"loss": LOSS, "logits": VALUES}, "received dict"),
        (VALUES, r"received a tensor of shape \(4,\)"),
        ((LOSS, VALUES), r"received \(a tensor of shape \(\), a tensor of shape \(4,\)\)"),
        ((LOSS, VALUES, object()), r"a tensor of shape \(4,\), object\)"),
        ((LOSS, VALUES, VALUES, None), "NoneType"),
        ((VALUES, VALUES, VALUES), r"received \(a tensor of shape \(4,\), "),
        ((LOSS, VALUES, VALUES, VALUES, VALUES), r"received \("),
        (None, "received NoneType"),
    ],
)
@pytest.mark.parametrize("with_function", [False, True])
def test_outputs_of_another_form(output: Any, outline: str, with_function: bool) -> None:
    """Wrong outputs of students, and of the function that should convert them."""
    metrics = metrics_of(outputs=(lambda output: output) if with_function else None)
    name = r"^outputs\(output\)" if with_function else "^output"
    with pytest.raises(TypeError, match=rf"{name} should be .*{outline}.*pass ExFMMetrics\(outp"):
        metrics.update(output)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"labels": [0.0, torch.inf]}, "labels should be finite, or NaN.*received inf .*'label'"),
        ({"labels": [0.0, -torch.inf]}, "labels should be finite, or NaN.*received -inf .*'label'"),
        ({"weights": [1.0, -1.0]}, r"weights should be finite numbers >= 0; received -1\.0"),
        ({"weights": [1.0, torch.inf]}, "weights should be finite numbers >= 0; received inf"),
        ({"weights": [torch.nan, 1.0]}, "weights should be finite numbers >= 0; received nan"),
        ({"weights": [1.0]}, r"weights should be of shape \(2, 1\) or \(2,\).*received \(1,\)"),
        ({"weights": [[1.0, 1.0]]}, r"weights should be of shape .*received \(1, 2\)"),
        ({"weights": 1.0}, r"weights should be of shape .*received \(\)"),
    ],
)
def test_what_is_refused_changes_nothing(bad: dict[str, Any], message: str) -> None:
    metrics = metrics_of()
    columns = {"logits": [1.0, 2.0], "labels": [0.0, 1.0], "weights": [1.0, 1.0]}
    metrics.update((LOSS, *map(torch.tensor, columns.values())), make_teacher(0, 2))
    before = metrics.compute()
    with pytest.raises(ValueError, match=message):
        values = map(torch.tensor, (columns | bad).values())
        metrics.update((LOSS, *values), make_teacher(0, 2))
    assert metrics.compute() == before


def test_the_task_of_an_infinite_label_is_named() -> None:
    labels = torch.zeros(SIZE, 3)
    labels[3, 1] = torch.inf
    with pytest.raises(ValueError, match="task 'buy'"):
        metrics_of(*TASKS).update((LOSS, torch.zeros(SIZE, 3), labels))


def test_what_is_on_an_accelerator_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation reads a value; what would have been refused is left out."""
    monkeypatch.setattr(exfm_tasks, "_check_values", lambda *_: None)
    metrics = metrics_of()
    labels = torch.tensor([0.0, 1.0, torch.inf, 1.0, 1.0, 1.0])
    weights = torch.tensor([1.0, 1.0, 1.0, torch.nan, torch.inf, -1.0])
    with Costs() as costs:
        metrics.update((LOSS, torch.arange(6.0), labels, weights))
    assert not costs.syncs
    expected = metrics_checks.binary_figures(np.arange(2.0), np.array([0.0, 1.0]), np.ones(2))
    figures = {name.replace("label", "click"): value for name, value in metrics.compute().items()}
    assert figures == pytest.approx(expected, rel=1e-6)
