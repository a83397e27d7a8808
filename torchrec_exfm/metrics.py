"""What an operator watches: the serving head's NE, AUC and calibration, and the teacher's reach."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.metrics.metric_module import RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import (
    MetricsConfig,
    RecMetricDef,
    RecMetricEnum,
    RecTaskInfo,
)

from torchrec_exfm.heads import Task
from torchrec_exfm.wrapper import find_wrapper

__all__ = ["ExFMMetrics"]

_BINARY = (RecMetricEnum.NE, RecMetricEnum.AUC, RecMetricEnum.CALIBRATION)
_REGRESSION = (RecMetricEnum.MSE,)


class ExFMMetrics:
    """The student's metrics by ``torchrec.metrics``, and the coverage of the teachers.

    * ``ne/TASK``: normalized entropy, log-loss over the entropy of the base rate.
    * ``auc/TASK``: over the last ``window_size`` examples.
    * ``calibration/TASK``: mean prediction over mean label; 1 is best.
    * ``mse/TASK``: for tasks of regression, instead of the three above.
    * ``coverage/TEACHER/TASK``: the share of examples for which the teacher's output was there.
    * ``age_seconds/TEACHER``: mean age of the outputs that were there, where ages are known.

    Apart from the AUC all are over every example since the start. Give it what ``progress``
    returns in training: those logits were computed before the step's update, so the metrics are
    of examples that the student had not seen ("score before train").

    Args:
        model: an ExFMWrapper, or a model that holds one.
        batch_size: B, of one rank.
        device: where the metrics are kept: the model's.
        window_size: examples of all ranks in the window of the AUC.

    Raises:
        ValueError: if there is no ExFMWrapper.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int,
        device: torch.device,
        window_size: int = 1_000_000,
    ) -> None:
        self._wrapper = find_wrapper(model)
        head = self._wrapper.auxiliary_head
        self._tasks = head.task_list
        shape = (len(head.teachers), len(head.tasks))
        self._examples = torch.zeros((), dtype=torch.float64, device=device)
        self._present = torch.zeros(shape, dtype=torch.float64, device=device)
        self._age = torch.zeros(2, len(head.teachers), dtype=torch.float64, device=device)
        self._modules = [
            _metric_module(kind, tasks, batch_size, device, window_size)
            for kind, tasks in _by_kind(self._tasks)
        ]

    def update(self, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Count one step: ``(loss, logits, labels)``, logits and labels (B,), (B, 1) or (B, T).

        Raises:
            ValueError: if the shapes do not fit the tasks.
        """
        _, logits, labels = output
        logits, labels = (self._columns(values) for values in (logits, labels))
        columns: dict[str, Tensor] = {}
        for t, task in enumerate(self._tasks):
            values = logits[:, t].detach().float()
            columns[f"{task.name}-prediction"] = values if task.regression else values.sigmoid()
            columns[f"{task.name}-label"] = labels[:, t].float()
            columns[f"{task.name}-weight"] = torch.ones_like(values)
        for module in self._modules:
            module.update(columns)
        self._update_coverage()

    def _columns(self, values: Tensor) -> Tensor:
        if values.dim() not in (1, 2) or values.numel() != values.shape[0] * len(self._tasks):
            raise ValueError(
                f"logits and labels should be of shape (B, {len(self._tasks)}) for the tasks "
                f"{[task.name for task in self._tasks]}; received {tuple(values.shape)}"
            )
        return values.reshape(-1, len(self._tasks))

    def _update_coverage(self) -> None:
        teacher = self._wrapper.last_teacher
        if teacher is None:
            return
        self._examples += teacher.presence.shape[0]
        self._present += teacher.presence.sum(0)
        if teacher.age_seconds is not None:
            known = teacher.presence.any(-1)
            self._age += torch.stack([(teacher.age_seconds * known).sum(0), known.sum(0)])

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks; every rank must call it."""
        results: dict[str, float] = {}
        for module in self._modules:
            for key, value in module.compute().items():
                _add_result(results, key, value)
        return results | self._coverage()

    def _coverage(self) -> dict[str, float]:
        head = self._wrapper.auxiliary_head
        sums = torch.cat([self._examples.reshape(1), self._present.flatten(), self._age.flatten()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        examples, *rest = sums.tolist()
        names = [f"coverage/{teacher}/{task}" for teacher in head.teachers for task in head.tasks]
        results = {
            name: present / examples for name, present in zip(names, rest, strict=False) if examples
        }
        ages, known = rest[len(names) :][: len(head.teachers)], rest[-len(head.teachers) :]
        for teacher, age, count in zip(head.teachers, ages, known, strict=True):
            if count:
                results[f"age_seconds/{teacher}"] = age / count
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
    )
    distributed = dist.is_initialized()
    return generate_metric_module(
        RecMetricModule,
        metrics_config=config,
        batch_size=batch_size,
        world_size=dist.get_world_size() if distributed else 1,
        my_rank=dist.get_rank() if distributed else 0,
        state_metrics_mapping={},
        device=device,
    )


def _add_result(results: dict[str, float], key: str, value: Any) -> None:
    """Keep TorchRec's ``ne-TASK|lifetime_ne`` as ``ne/TASK``: lifetime, but the AUC's window."""
    namespace, _, metric = key.partition("|")
    name, _, task = namespace.partition("-")
    wanted = f"window_{name}" if name == "auc" else f"lifetime_{name}"
    if metric == wanted:
        results[f"{name}/{task}"] = float(value)
