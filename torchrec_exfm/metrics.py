"""Metrics of a run: the serving head's NE, AUC and calibration, the teachers' coverage and age.

Shapes: B examples, M teachers, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.metrics.calibration import CalibrationMetric
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.metrics_namespace import (
    MetricName,
    MetricNamespace,
    MetricPrefix,
    compose_metric_key,
)
from torchrec.metrics.mse import MSEMetric
from torchrec.metrics.ne import NEMetric
from torchrec.metrics.rec_metric import RecMetric

from torchrec_exfm._compat import TieAwareAUC, metric_computations, metric_state, set_metric_state
from torchrec_exfm._ranks import rank, world_size
from torchrec_exfm._user import outline
from torchrec_exfm.batch import TeacherOutputs, check_outputs_shape
from torchrec_exfm.tasks import Task, check_names, check_tasks, checked_labels, checked_weights

__all__ = ["ExFMMetrics"]

_METRICS: dict[str, type[RecMetric]] = {
    "ne": NEMetric,
    "auc": TieAwareAUC,
    "calibration": CalibrationMetric,
    "mse": MSEMetric,  # for regressions; the others are for binary tasks
}


class StepOutput(NamedTuple):
    """The part of a step's output that the metrics use."""

    loss: Tensor
    logits: Tensor
    labels: Tensor
    weights: Tensor | None = None


class ExFMMetrics:
    """The student's metrics by ``torchrec.metrics``, and coverage and age of teacher outputs.

    For a binary task with logit z, p = σ(z), label y and weight w:

    * ``ne/TASK``: normalized entropy, Σ w l(p, y) / Σ w l(r, y), with the log-loss l and the base
      rate r = Σ w y / Σ w.
    * ``auc/TASK``: Σ w⁺ w⁻ ([z⁺ > z⁻] + [z⁺ = z⁻] / 2) / Σ w⁺ w⁻ over the pairs of a positive and
      a negative among the last ``window_size`` examples. Every example takes a place there, even
      without a label or a weight.
    * ``calibration/TASK``: Σ w p / Σ w y; 1 is best.

    For a regression with prediction z, ``mse/TASK``: Σ w (z - y)² / Σ w. For the teachers, over
    all examples whatever their labels and weights:

    * ``coverage/TEACHER/TASK``: the share of examples that have the teacher's output.
    * ``age_seconds/TEACHER``: the mean age of the teacher's outputs, where ages are known.

    A label that is NaN is missing: its example is left out of the metrics of that task. An
    undefined metric is NaN: NE and AUC without a positive or without a negative, calibration
    without a positive, MSE without an example.

    All but the AUC cover every example since the start. Give :meth:`update` what ``progress``
    returns in training: its logits were computed before the step's update, so the metrics are
    those of unseen examples ("score before train").

    Args:
        batch_size: B on one rank.
        device: the model's device, where the metrics are kept.
        tasks: the T tasks, in the order of the logits and the labels.
        teachers: the names of the M teachers, in the order of the outputs.
        window_size: examples of all ranks in the window of the AUC.
        outputs: maps what ``progress`` returns to ``(loss, logits, labels)`` or ``(loss, logits,
            labels, weights)``: tensors, the loss of one element. None: it already is one of these.

    Raises:
        ValueError: for no tasks or teachers, or a name that occurs twice.
        TypeError: for tasks of another type.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        device: torch.device,
        tasks: Sequence[Task] = (Task(),),
        teachers: Sequence[str] = ("teacher",),
        window_size: int = 1_000_000,
        outputs: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        check_tasks(tasks)
        self._tasks = tuple(tasks)
        self._teachers = check_names("teachers", teachers)
        self._outputs = outputs
        # A row per teacher: examples, outputs with a known age, sum of ages, outputs by task. A row
        # per task: weight of labels, of positive and of negative ones, padding. One buffer needs
        # one all-reduce; float64, as a float32 counter stops at 2**24 examples.
        rows, columns = len(teachers) + len(tasks), 3 + len(tasks)
        self._sums = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self._coverage_sums, self._label_weights = self._sums.split([len(teachers), len(tasks)])
        binary, regressions = (
            [RecTaskInfo(name=task.name) for task in tasks if task.regression == regression]
            for regression in (False, True)
        )
        self._metrics = {
            name: metric(
                world_size=world_size(),
                my_rank=rank(),
                batch_size=batch_size,
                tasks=regressions if name == "mse" else binary,
                window_size=window_size,
                compute_on_all_ranks=True,
            ).to(device)
            for name, metric in _METRICS.items()
        }

    def update(
        self, output: Any, teacher: TeacherOutputs | None = None, *, weights: Tensor | None = None
    ) -> None:
        """Count one step.

        Args:
            output: what ``progress`` returns, for ``outputs``. Logits (predictions for a
                regression) and labels are (B,), (B, 1) or (B, T).
            teacher: the step's outputs, such as ``ExFMWrapper.last_teacher``, for the coverage.
            weights: of the examples, (B,) or (B, T), at least 0: an example of weight 2 counts
                twice, one of weight 0 is left out. None: those of ``output``, or 1.

        Raises:
            ValueError: if the shapes do not fit the tasks and teachers. On the CPU also for an
                infinite label, or a weight that is negative or not finite. On an accelerator a
                check would wait for the device: there such an example is left out.
            TypeError: if neither ``output``, nor what ``outputs`` makes of it, is such a tuple.
        """
        step = self._step_output(output)
        logits, labels, weights = self._columns(step, step.weights if weights is None else weights)
        if teacher is not None:
            check_outputs_shape(teacher, (len(self._teachers), len(self._tasks)))
            self._count_outputs(teacher)
        label_weights = torch.stack([weights, weights * labels, weights * (1 - labels)], -1)
        self._label_weights[:, :3] += label_weights.sum(0)
        columns = {"labels": self._by_task(labels), "weights": self._by_task(weights)}
        probabilities, predictions = self._by_task(logits.sigmoid()), self._by_task(logits)
        for name, metric in self._metrics.items():
            # Logits for the AUC: in its float32 σ(z) is 1 for every large z, which would tie them.
            values = probabilities if name in ("ne", "calibration") else predictions
            metric.update(predictions=values, **columns)

    def _step_output(self, output: Any) -> StepOutput:
        """Return what ``outputs`` makes of a step's output; raise a TypeError if it is unusable."""
        if isinstance(output, StepOutput):
            return output
        parts = output if self._outputs is None else self._outputs(output)
        are_tensors = isinstance(parts, (tuple, list)) and all(isinstance(x, Tensor) for x in parts)
        if are_tensors and len(parts) in (3, 4) and parts[0].numel() == 1:
            return StepOutput(*parts)
        raise TypeError(
            f"{'output' if self._outputs is None else 'outputs(output)'} should be tensors (loss, "
            "logits, labels) or (loss, logits, labels, weights), with a loss of one element; "
            f"received {outline(parts)}: pass ExFMMetrics(outputs=...), a function that takes "
            "what progress returns to them"
        )

    def _columns(self, step: StepOutput, weights: Tensor | None) -> tuple[Tensor, ...]:
        """Return logits, labels and weights, (B, T) in double; 0 for examples to leave out."""
        logits, tasks = step.logits, self._tasks
        if logits.dim() not in (1, 2) or logits.numel() != len(logits) * len(tasks):
            raise ValueError(
                f"logits should be of shape (B, {len(tasks)}) for the tasks "
                f"{[task.name for task in tasks]}; received {tuple(logits.shape)}"
            )
        logits = logits.detach().double().reshape(-1, len(tasks))
        labels = checked_labels(step.labels, tasks, len(logits))
        weights = torch.ones_like(labels) if weights is None else weights
        weights = checked_weights(weights, tasks, len(logits)).to(labels.device)
        counted = (weights > 0) & (labels.abs() + weights < torch.inf)  # False for any NaN
        columns = (logits, labels.double(), weights.double())
        return tuple(values.detach().where(counted, 0) for values in columns)

    def _by_task(self, values: Tensor) -> dict[str, Tensor]:
        names = (task.name for task in self._tasks)
        return dict(zip(names, values.unbind(1), strict=True))

    def _count_outputs(self, teacher: TeacherOutputs) -> None:
        presence = teacher.presence
        self._coverage_sums[:, 0] += presence.shape[0]
        self._coverage_sums[:, 3:] += presence.sum(0)
        if teacher.age_seconds is not None:
            has_output = presence.any(-1)
            self._coverage_sums[:, 1] += has_output.sum(0)
            self._coverage_sums[:, 2] += torch.where(has_output, teacher.age_seconds, 0.0).sum(0)

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks; every rank must call it."""
        sums = self._sums.clone()
        if world_size() > 1:
            dist.all_reduce(sums)
        rows = sums.tolist()
        task_weights = list(zip(self._tasks, rows[len(self._teachers) :], strict=True))
        results: dict[str, float] = {}
        for name, metric in self._metrics.items():
            prefix = MetricPrefix.WINDOW if name == "auc" else MetricPrefix.LIFETIME
            computed = metric.compute()
            for task, (weight, positive, negative, *_) in task_weights:
                key = compose_metric_key(MetricNamespace(name), task.name, MetricName(name), prefix)
                needed = {"ne": min(positive, negative), "calibration": positive, "mse": weight}
                if key in computed:
                    defined = needed.get(name, 1.0) > 0
                    results[f"{name}/{task.name}"] = float(computed[key]) if defined else nan
        return results | self._coverage(rows[: len(self._teachers)])

    def own_examples(self) -> int:
        """Return how many examples this rank has counted for coverage; waits for the device."""
        return int(self._sums[0, 0])

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of this rank's part of the state; each rank has its own."""
        state = {"sums": self._sums.clone()}
        for name, computation in metric_computations(self._metrics.values()):
            part = metric_state(computation)
            state |= {f"{name}/{key}": value for key, value in part.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned on this rank, in a run of as many ranks.

        Raises:
            ValueError: if the state is of other tasks or teachers.
        """
        self.check_state_dict(state)
        self._sums.copy_(state["sums"])
        for name, computation in metric_computations(self._metrics.values()):
            start = f"{name}/"
            part = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
            set_metric_state(computation, part, self._sums.device)

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError for a state that :meth:`load_state_dict` would refuse."""
        expected = self.state_dict()
        received = state.get("sums", torch.empty(0))
        if state.keys() != expected.keys() or received.shape != self._sums.shape:
            raise ValueError(
                f"the state should be that of metrics of {len(self._teachers)} teachers, with sums "
                f"of shape {tuple(self._sums.shape)} and {sorted(expected)}; received sums of "
                f"shape {tuple(received.shape)} and {sorted(state)}"
            )

    def _coverage(self, sums: list[list[float]]) -> dict[str, float]:
        results: dict[str, float] = {}
        for teacher, row in zip(self._teachers, sums, strict=True):
            examples, with_age, age, *outputs = row
            if examples:
                for task, count in zip(self._tasks, outputs, strict=True):
                    results[f"coverage/{teacher}/{task.name}"] = count / examples
            if with_age:
                results[f"age_seconds/{teacher}"] = age / with_age
        return results
