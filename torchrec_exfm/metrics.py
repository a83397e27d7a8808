"""What an operator watches: the serving head's NE, AUC and calibration, and the teacher's reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.metrics.metric_module import RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import (
    MetricsConfig,
    RecMetricDef,
    RecMetricEnum,
    RecTaskInfo,
)
from torchrec.metrics.rec_metric import RecMetricComputation

from torchrec_exfm._compat import metric_computations, metric_state, set_metric_state
from torchrec_exfm._ranks import rank, world_size
from torchrec_exfm.batch import TeacherOutputs, check_outputs_shape
from torchrec_exfm.heads import Task, check_names, check_tasks

__all__ = ["ExFMMetrics"]

_BINARY = (RecMetricEnum.NE, RecMetricEnum.AUC, RecMetricEnum.CALIBRATION)
_REGRESSION = (RecMetricEnum.MSE,)


class ExFMMetrics:
    """The student's metrics by ``torchrec.metrics``, and the coverage of the teachers.

    * ``ne/TASK``: normalized entropy, log-loss over the entropy of the base rate.
    * ``auc/TASK``: over the last ``window_size`` examples; of examples with equal predictions
      TorchRec counts the order they came in.
    * ``calibration/TASK``: mean prediction over mean label; 1 is best.
    * ``mse/TASK``: for tasks of regression, instead of the three above.
    * ``coverage/TEACHER/TASK``: the share of examples for which the teacher's output was there.
    * ``age_seconds/TEACHER``: mean age of the outputs that were there, where ages are known.

    Apart from the AUC all are over every example since the start. Give it what ``progress``
    returns in training: those logits were computed before the step's update, so the metrics are
    of examples that the student had not seen ("score before train").

    Args:
        batch_size: B, of one rank.
        device: where the metrics are kept: the model's.
        tasks: the T tasks, in the order of the logits and the labels.
        teachers: the names of the M teachers, in the order of the outputs.
        window_size: examples of all ranks in the window of the AUC.

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
    ) -> None:
        check_tasks(tasks)
        self._tasks = tuple(tasks)
        self._teachers = check_names("teachers", teachers)
        # of each teacher: examples, outputs with a known age, sum of the ages, outputs by task
        columns = 3 + len(tasks)
        self._sums = torch.zeros(len(teachers), columns, dtype=torch.float64, device=device)
        self._modules = [
            _metric_module(kind, group, batch_size, device, window_size)
            for kind, group in _by_kind(self._tasks)
        ]

    def update(
        self, output: tuple[Tensor, Tensor, Tensor], teacher: TeacherOutputs | None = None
    ) -> None:
        """Count one step.

        Args:
            output: ``(loss, logits, labels)``, logits and labels (B,), (B, 1) or (B, T).
            teacher: the step's outputs, such as ``ExFMWrapper.last_teacher``, for the coverage.

        Raises:
            ValueError: if the shapes do not fit the tasks and teachers.
        """
        _, logits, labels = output
        logits, labels = (self._columns(values) for values in (logits, labels))
        if logits.shape != labels.shape:
            raise ValueError(
                f"logits and labels should be of one shape; received {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        columns: dict[str, Tensor] = {}
        for t, task in enumerate(self._tasks):
            values = logits[:, t].detach().float()
            columns[f"{task.name}-prediction"] = values if task.regression else values.sigmoid()
            columns[f"{task.name}-label"] = labels[:, t].float()
            columns[f"{task.name}-weight"] = torch.ones_like(values)
        for module in self._modules:
            module.update(columns)
        if teacher is not None:
            self._update_coverage(teacher)

    def _columns(self, values: Tensor) -> Tensor:
        if values.dim() not in (1, 2) or values.numel() != values.shape[0] * len(self._tasks):
            raise ValueError(
                f"logits and labels should be of shape (B, {len(self._tasks)}) for the tasks "
                f"{[task.name for task in self._tasks]}; received {tuple(values.shape)}"
            )
        return values.reshape(-1, len(self._tasks))

    def _update_coverage(self, teacher: TeacherOutputs) -> None:
        check_outputs_shape(teacher, (len(self._teachers), len(self._tasks)))
        present = teacher.presence
        self._sums[:, 0] += present.shape[0]
        self._sums[:, 3:] += present.sum(0)
        if teacher.age_seconds is not None:
            there = present.any(-1)
            self._sums[:, 1] += there.sum(0)
            self._sums[:, 2] += torch.where(there, teacher.age_seconds, 0.0).sum(0)

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks; every rank must call it."""
        results: dict[str, float] = {}
        for module in self._modules:
            for key, value in module.compute().items():  # ne-TASK|lifetime_ne and others
                namespace, _, metric = key.rpartition("|")
                name, _, task = namespace.partition("-")
                if metric == ("window_auc" if name == "auc" else f"lifetime_{name}"):
                    results[f"{name}/{task}"] = float(value)
        return results | self._coverage()

    def own_examples(self) -> int:
        """How many examples this rank has counted for the coverage; waits for the device."""
        return int(self._sums[0, 0])

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of this rank's part of what :meth:`compute` needs; not that of all ranks."""
        state = {"coverage": self._sums.clone()}
        for name, computation in self._computations():
            found = metric_state(computation)
            state |= {f"{name}/{key}": value for key, value in found.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave on this rank of as many.

        Raises:
            ValueError: if it is that of other tasks or teachers.
        """
        self.check_state_dict(state)
        self._sums.copy_(state["coverage"])
        for name, computation in self._computations():
            start = f"{name}/"
            found = {key.removeprefix(start): state[key] for key in state if key.startswith(start)}
            set_metric_state(computation, found, self._sums.device)

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """A ValueError for a state that :meth:`load_state_dict` would not take."""
        here = self.state_dict()
        if state.keys() != here.keys() or state["coverage"].shape != self._sums.shape:
            raise ValueError(
                f"the state should be that of metrics of {self._sums.shape[0]} teachers, with "
                f"{sorted(here)}; received one of {len(state.get('coverage', ()))} teachers, with "
                f"{sorted(state)}"
            )

    def _computations(self) -> Iterator[tuple[str, RecMetricComputation]]:
        for module in self._modules:
            yield from metric_computations(module)

    def _coverage(self) -> dict[str, float]:
        sums = self._sums.clone()
        if world_size() > 1:
            dist.all_reduce(sums)
        results: dict[str, float] = {}
        for teacher, row in zip(self._teachers, sums.tolist(), strict=True):
            examples, with_age, age, *present = row
            if examples:
                for task, count in zip(self._tasks, present, strict=True):
                    results[f"coverage/{teacher}/{task.name}"] = count / examples
            if with_age:
                results[f"age_seconds/{teacher}"] = age / with_age
        return results


def _by_kind(tasks: tuple[Task, ...]) -> list[tuple[tuple[RecMetricEnum, ...], list[Task]]]:
    binary = [task for task in tasks if not task.regression]
    regression = [task for task in tasks if task.regression]
    return [
        (kind, group) for kind, group in ((_BINARY, binary), (_REGRESSION, regression)) if group
    ]


def _metric_module(
    kind: tuple[RecMetricEnum, ...],
    tasks: list[Task],
    batch_size: int,
    device: torch.device,
    window_size: int,
) -> RecMetricModule:
    infos = [
        RecTaskInfo(
            name=task.name,
            label_name=f"{task.name}-label",
            prediction_name=f"{task.name}-prediction",
            weight_name=f"{task.name}-weight",
        )
        for task in tasks
    ]
    config = MetricsConfig(
        rec_tasks=infos,
        rec_metrics={
            metric: RecMetricDef(rec_tasks=infos, window_size=window_size) for metric in kind
        },
        compute_on_all_ranks=True,
    )
    return generate_metric_module(
        RecMetricModule,
        metrics_config=config,
        batch_size=batch_size,
        world_size=world_size(),
        my_rank=rank(),
        state_metrics_mapping={},
        device=device,
    )
