"""Tasks of student and teacher, and checks of labels, weights, groups and candidates.

Shapes: B examples, M teachers, T tasks. A label that is NaN is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_exfm.functional import (
    check_sampling_rate,
    present_mean,
    soft_bce_with_logits,
    squared_error,
)

__all__ = ["Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One output of student and teacher: a binary label, or a quantity to regress.

    Args:
        name: the task's name in errors and metrics.
        regression: False: labels in {0, 1}, outputs are logits, the loss is cross entropy.
            True: labels and outputs in the task's units, the loss is squared error.
        negative_sampling_rate: r_S, the share of the negatives that the student's own training
            data keeps, in (0, 1]. Teachers' logits are shifted by log r_F - log r_S, from their
            data's rate to this one: see :class:`~torchrec_exfm.DistillationTerm`.

    Raises:
        ValueError: if the rate is outside (0, 1], or is not 1 and the task is a regression.
    """

    name: str = "label"
    regression: bool = False
    negative_sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        check_sampling_rate("negative_sampling_rate", self.negative_sampling_rate)
        if self.regression and self.negative_sampling_rate != 1:
            raise ValueError(
                "negative_sampling_rate of a regression, which has no negatives, should be 1; "
                f"received {self.negative_sampling_rate}"
            )


def map_tasks(tasks: Sequence[Task], function: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Apply ``function(task, ...)`` to each task's columns, (..., T) -> (..., T).

    One call serves all tasks if they differ in their names only.
    """
    if len({(task.regression, task.negative_sampling_rate) for task in tasks}) == 1:
        return function(tasks[0], *columns)
    by_task = zip(tasks, *(tensor.unbind(-1) for tensor in columns), strict=True)
    return torch.stack([function(task, *column) for task, *column in by_task], dim=-1)


def mean_task_losses(
    tasks: Sequence[Task],
    outputs: Tensor,
    targets: Tensor,
    absent: Tensor,
    count: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Return each task's mean loss: cross entropy if it is binary, else squared error.

    Args:
        tasks: the T tasks.
        outputs: (B, ..., T) logits or predictions; only they receive gradient.
        targets: (B, ..., T) probabilities or predictions.
        absent: (B, ..., T), see :func:`torchrec_exfm.functional.present_mean`.
        count: (..., T), as for ``absent``.
        weights: (B, ..., T), as for ``absent``.

    Returns:
        (..., T).
    """
    return present_mean(map_tasks(tasks, _loss, outputs, targets), absent, count, weights)


def _loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    return (squared_error if task.regression else soft_bce_with_logits)(outputs, targets)


def pick_columns(values: Tensor, columns: Sequence[int]) -> Tensor:
    """Return some columns of the last dimension, without sending an index to the device."""
    if list(columns) == list(range(values.shape[-1])):
        return values
    return torch.stack([values[..., column] for column in columns], dim=-1)


def find_absent(presence: Tensor, labels: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return the mask of what a mean leaves out: no output, no label, or a weight of 0.

    Args:
        presence: (B, M, T), which outputs exist.
        labels: (B, T), NaN where one is missing; None: no label is needed.
        weights: (B, T); None: all 1.

    Returns:
        (B, M, T), boolean.
    """
    # For booleans p <= q is "not p, or q", in one kernel.
    absent = ~presence if labels is None else presence <= labels.isnan().unsqueeze(1)
    return absent if weights is None else absent | (weights == 0).unsqueeze(1)


def count_outputs(
    presence: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    embeddings: Tensor | None = None,
) -> Tensor:
    """Add up the weights of the examples with an output, then of those that also have a label.

    Args:
        presence: (B, M, T), which outputs exist.
        labels: (B, T), NaN where one is missing; None: count no labels.
        weights: (B, T), or (B,) for all tasks; None: all 1.
        embeddings: (B, M), which embeddings exist; None: count none.

    Returns:
        (1, M, T); with labels or embeddings (2, M, T); with both (3, M, T), embeddings last.
    """
    masks = presence.unsqueeze(0)
    if labels is not None:
        masks = torch.stack([presence, presence > labels.isnan().unsqueeze(1)])  # p and not q
    if embeddings is not None:
        masks = torch.cat([masks, embeddings.unsqueeze(-1).expand_as(presence).unsqueeze(0)])
    if weights is not None:
        masks = masks * (weights.unsqueeze(1) if weights.dim() > 1 else weights.reshape(-1, 1, 1))
    return masks.sum(1, dtype=torch.float32)


def checked_labels(labels: Tensor | None, tasks: Sequence[Task], batch_size: int) -> Tensor:
    """Return fresh labels, (B, T) or for one task (B,), as (B, T) floats; NaN is missing.

    Raises:
        ValueError: for another shape, or None; for an infinite label. The contents of a tensor on
            an accelerator are not checked, as that would synchronize the device.
    """
    labels = _columns("labels", labels, tasks, batch_size)
    _check_values("labels", "finite, or NaN where one is missing", torch.isinf, labels, tasks)
    return labels


def checked_weights(weights: Tensor, tasks: Sequence[Task], batch_size: int) -> Tensor:
    """Return example weights, (B, T) or for all tasks at once (B,), as (B, T) floats.

    Raises:
        ValueError: for another shape; for a weight that is negative, infinite or NaN, on the CPU.
    """
    if isinstance(weights, Tensor) and weights.shape == (batch_size,):
        weights = weights.unsqueeze(1).expand(batch_size, len(tasks))
    weights = _columns("weights", weights, tasks, batch_size)
    _check_values("weights", "finite numbers >= 0", _are_invalid_weights, weights, tasks)
    return weights


def checked_groups(groups: Tensor | None, batch_size: int) -> Tensor:
    """Return ids of groups, (B,) int64; raise a ValueError for another shape or dtype, or None."""
    received = type(groups).__name__
    if isinstance(groups, Tensor):
        if groups.shape == (batch_size,) and groups.dtype == torch.int64:
            return groups
        received = f"{groups.dtype} of {tuple(groups.shape)}"
    raise ValueError(
        f"groups should be int64 ids of shape {(batch_size,)}, one for each example; received "
        f"{received}: tell the pipeline where they are (groups=...)"
    )


def checked_candidates(candidates: Any, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Return ids of items, (B,) int64, and log q, (B,) or None.

    Raises:
        ValueError: for another shape or dtype; on the CPU for a log q that is not finite.
    """
    parts = candidates if isinstance(candidates, (tuple, list)) else (candidates, None)
    ids: Any
    log_q: Any
    ids, log_q = parts if len(parts) == 2 else (None, None)
    shape = (batch_size,)
    fits = isinstance(ids, Tensor) and ids.shape == shape and ids.dtype == torch.int64
    if log_q is not None:
        floats = isinstance(log_q, Tensor) and log_q.dtype.is_floating_point
        fits = fits and floats and log_q.shape == shape
    if not fits:
        received = [f"{p.dtype} of {tuple(p.shape)}" for p in parts if isinstance(p, Tensor)]
        raise ValueError(
            f"candidates should be int64 ids of items of shape {shape}, or a pair of them and log "
            f"q, floats of the same shape; received {received or type(candidates).__name__}: tell "
            "the pipeline where they are (candidates=...)"
        )
    if log_q is not None and log_q.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~log_q.isfinite()
        if bool(wrong.any()):
            raise ValueError(
                f"log q of the candidates should be finite; received {int(wrong.sum())} values "
                "that are not: an item of a batch was sampled with a probability above 0"
            )
    return ids, log_q


def _columns(what: str, values: Tensor | None, tasks: Sequence[Task], batch_size: int) -> Tensor:
    """Return (B, T) floats from (B, T) or, for one task, (B,)."""
    shapes = [(batch_size, len(tasks)), *[(batch_size,)] * (len(tasks) == 1 or what == "weights")]
    if not isinstance(values, Tensor):
        raise ValueError(
            f"{what} should be a tensor of shape {' or '.join(map(str, shapes))}; received "
            f"{type(values).__name__}: tell the pipeline where they are ({what}=...)"
        )
    if tuple(values.shape) not in shapes:
        raise ValueError(
            f"{what} should be of shape {' or '.join(map(str, shapes))}; received "
            f"{tuple(values.shape)}, beside {batch_size} logits or teacher outputs for the tasks "
            f"{[task.name for task in tasks]}: one of the two is from other examples or tasks"
        )
    return values.float().reshape(batch_size, len(tasks))


def _are_invalid_weights(values: Tensor) -> Tensor:
    return (values < 0) | ~values.isfinite()


def _check_values(
    what: str,
    expected: str,
    are_wrong: Callable[[Tensor], Tensor],
    values: Tensor,
    tasks: Sequence[Task],
) -> None:
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return  # looking would synchronize an accelerator, and break a compiled graph
    wrong = are_wrong(values)
    if not bool(wrong.any()):
        return
    example, task = wrong.nonzero()[0].tolist()
    raise ValueError(
        f"{what} should be {expected}; received {values[example, task].item()} for example "
        f"{example}, task {tasks[task].name!r} ({int(wrong.sum())} such values)"
    )


def check_types(what: str, values: Sequence[object], expected: type) -> None:
    """Raise a TypeError unless it is a tuple or list of that type."""
    if not isinstance(values, (tuple, list)) or any(not isinstance(v, expected) for v in values):
        raise TypeError(f"{what} should be a sequence of {expected.__name__}; received {values!r}")


def check_tasks(tasks: Sequence[Task]) -> tuple[str, ...]:
    """Return the tasks' names; raise unless there is at least one task, with distinct names."""
    check_types("tasks", tasks, Task)
    return check_names("tasks", [task.name for task in tasks])


def check_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names; raise a ValueError unless there is at least one, without repetition."""
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise ValueError(f"{what} should be distinct names, at least one; received {names!r}")
    return tuple(names)
