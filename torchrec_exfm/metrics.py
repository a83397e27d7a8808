"""What an operator watches: the serving head's NE, AUC and calibration, and the teacher's reach.

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
    "mse": MSEMetric,  # of a regression; the others are of a binary task
}


class StepOutput(NamedTuple):
    """What the metrics count of a step."""

    loss: Tensor
    logits: Tensor
    labels: Tensor
    weights: Tensor | None = None


class ExFMMetrics:
    """The student's metrics by ``torchrec.metrics``, and the coverage of the teachers.

    Of a binary task with the logit z, p = σ(z), the label y and the weight w:

    * ``ne/TASK``: normalized entropy, Σ w l(p, y) / Σ w l(r, y), with the log-loss l and the base
      rate r = Σ w y / Σ w.
    * ``auc/TASK``: Σ w⁺ w⁻ ([z⁺ > z⁻] + [z⁺ = z⁻] / 2) / Σ w⁺ w⁻ over the pairs of a positive and
      a negative among the last ``window_size`` examples. Every example has a place in the window,
      one without a label or a weight too.
    * ``calibration/TASK``: Σ w p / Σ w y; 1 is best.

    Of a regression with the prediction z ``mse/TASK``: Σ w (z - y)² / Σ w. Of the teachers, over
    all examples, whatever their labels and weights:

    * ``coverage/TEACHER/TASK``: the share of examples for which the teacher's output was there.
    * ``age_seconds/TEACHER``: mean age of the outputs that were there, where ages are known.

    A label that is NaN is missing: its example is left out of the metrics of that task. A metric
    that is not defined is NaN: NE and AUC without a positive or without a negative, calibration
    without a positive, MSE without an example.

    Apart from the AUC all are over every example since the start. Give it what ``progress``
    returns in training: those logits were computed before the step's update, so the metrics are
    of examples that the student had not seen ("score before train").

    Args:
        batch_size: B, of one rank.
        device: where the metrics are kept: the model's.
        tasks: the T tasks, in the order of the logits and the labels.
        teachers: the names of the M teachers, in the order of the outputs.
        window_size: examples of all ranks in the window of the AUC.
        outputs: takes what ``progress`` returns to ``(loss, logits, labels)`` or ``(loss, logits,
            labels, weights)``: tensors, and a loss of one element. None: it is that already.

    Raises:
        ValueError: for tasks or teachers that share a name, or none.
        TypeError: for tasks of another kind.
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
        # of each teacher: examples, outputs with a known age, sum of the ages, outputs by task;
        # of each task: the weight of its labels, of the positive ones, of the negative ones, and 0
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
            output: what ``progress`` returns, for ``outputs``: logits and labels are (B,), (B, 1)
                or (B, T), logits of a binary task and predictions of a regression.
            teacher: the step's outputs, such as ``ExFMWrapper.last_teacher``, for the coverage.
            weights: of the examples, (B,) or (B, T), at least 0: of weight 2 is an example that
                counts twice, of weight 0 one that is left out. None: those of ``output``, or 1.

        Raises:
            ValueError: if the shapes do not fit the tasks and teachers; for a label that is
                infinite, or a weight that is negative or not finite: on an accelerator, where
                looking would stop the step, such an example is left out.
            TypeError: if ``output`` is no ``(loss, logits, labels)`` and ``outputs`` makes none.
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
            # not for the AUC, which keeps single precision: there all σ(z) near 1 are equal
            values = probabilities if name in ("ne", "calibration") else predictions
            metric.update(predictions=values, **columns)

    def _step_output(self, output: Any) -> StepOutput:
        """What ``outputs`` makes of what ``progress`` returns; a TypeError if it is no such."""
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
        """(B, T) logits, labels and weights in double; 0 for the examples to leave out."""
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
        counted = (weights > 0) & (labels.abs() + weights < torch.inf)  # neither of them NaN
        columns = (logits, labels.double(), weights.double())
        return tuple(values.detach().where(counted, 0) for values in columns)

    def _by_task(self, values: Tensor) -> dict[str, Tensor]:
        names = (task.name for task in self._tasks)
        return dict(zip(names, values.unbind(1), strict=True))

    def _count_outputs(self, teacher: TeacherOutputs) -> None:
        present = teacher.presence
        self._coverage_sums[:, 0] += present.shape[0]
        self._coverage_sums[:, 3:] += present.sum(0)
        if teacher.age_seconds is not None:
            there = present.any(-1)
            self._coverage_sums[:, 1] += there.sum(0)
            self._coverage_sums[:, 2] += torch.where(there, teacher.age_seconds, 0.0).sum(0)

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks; every rank must call it."""
        sums = self._sums.clone()
        if world_size() > 1:
            dist.all_reduce(sums)
        rows = sums.tolist()
        of_tasks = list(zip(self._tasks, rows[len(self._teachers) :], strict=True))
        results: dict[str, float] = {}
        for name, metric in self._metrics.items():
            prefix = MetricPrefix.WINDOW if name == "auc" else MetricPrefix.LIFETIME
            computed = metric.compute()
            for task, (weight, positive, negative, *_) in of_tasks:
                key = compose_metric_key(MetricNamespace(name), task.name, MetricName(name), prefix)
                needed = {"ne": min(positive, negative), "calibration": positive, "mse": weight}
                if key in computed:
                    defined = needed.get(name, 1.0) > 0
                    results[f"{name}/{task.name}"] = float(computed[key]) if defined else nan
        return results | self._coverage(rows[: len(self._teachers)])

    def own_examples(self) -> int:
        """How many examples this rank has counted for the coverage; waits for the device."""
        return int(self._sums[0, 0])

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of this rank's part of what :meth:`compute` needs; not that of all ranks."""
        state = {"sums": self._sums.clone()}
        for name, computation in metric_computations(self._metrics.values()):
            found = metric_state(computation)
            state |= {f"{name}/{key}": value for key, value in found.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave on this rank of as many.

        Raises:
            ValueError: if it is that of other tasks or teachers.
        """
        self.check_state_dict(state)
        self._sums.copy_(state["sums"])
        for name, computation in metric_computations(self._metrics.values()):
            start = f"{name}/"
            found = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
            set_metric_state(computation, found, self._sums.device)

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """A ValueError for a state that :meth:`load_state_dict` would not take."""
        here = self.state_dict()
        received = state.get("sums", torch.empty(0))
        if state.keys() != here.keys() or received.shape != self._sums.shape:
            raise ValueError(
                f"the state should be that of metrics of {len(self._teachers)} teachers, with sums "
                f"of shape {tuple(self._sums.shape)} and {sorted(here)}; received one with sums of "
                f"shape {tuple(received.shape)} and {sorted(state)}"
            )

    def _coverage(self, sums: list[list[float]]) -> dict[str, float]:
        results: dict[str, float] = {}
        for teacher, row in zip(self._teachers, sums, strict=True):
            examples, with_age, age, *present = row
            if examples:
                for task, count in zip(self._tasks, present, strict=True):
                    results[f"coverage/{teacher}/{task.name}"] = count / examples
            if with_age:
                results[f"age_seconds/{teacher}"] = age / with_age
        return results
