"""The heads that meet the teacher: trained beside the serving head, dropped when serving.

Shapes: B examples, D width of the shared representation, M teachers, T tasks, K terms, C outputs
of all terms together: one for each task of each term.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchrec_exfm.batch import TeacherOutputs
from torchrec_exfm.functional import (
    check_sampling_rate,
    masked_mean,
    perceptrons,
    scale_gradient,
    scale_label,
    soft_bce_with_logits,
    squared_error,
)

__all__ = ["AuxiliaryHead", "DistillationHead", "DistillationTerm", "Task", "TaskLoss"]

LEAD_DECAY = 0.99  # of the running means that tell whether a teacher leads, per step


@dataclass(frozen=True, kw_only=True)
class Task:
    """One output of student and teacher: a binary label, or a quantity to regress.

    Args:
        name: what errors and metrics call it.
        regression: False: labels in {0, 1}, outputs are logits, loss of cross entropy.
            True: labels and outputs in the task's units, loss of squared error.
        negative_sampling_rate: r_S, the share of the negatives that the student's own training
            data keeps, in (0, 1]. Teachers' logits are moved by log r_F - log r_S, from the rate
            of their data to this one: see :class:`DistillationTerm`.

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


@dataclass(frozen=True, kw_only=True)
class DistillationTerm:
    """One term of the loss: one teacher, taught to one head (arXiv 2502.17494, eq. 3-5, 7).

    Args:
        teacher: the teacher's name.
        adapted: learn from the student adapter's re-calibrated outputs in the place of the
            teacher's own.
        serving: teach the serving head itself, without a head of its own: the tapped module's
            output, (B, T) or (B,), is taken as its logits (not probabilities; or predictions).
            Meant for ``adapted``: the adapter has learnt the teacher's bias away on fresh labels.
            Without, the teacher's bias goes right into what is served.
        tasks: the names of the tasks it covers; None: all. Terms over different tasks give each
            task its own α, β and w.
        alpha: α, label scaling: multiplies the soft label, which is then clipped at 1 (or the
            prediction of a regression, unclipped).
        beta: β, gradient scaling: multiplies this head's gradient into the backbone.
        weight: w, multiplies the term in the loss, and so every gradient of it.
        hidden: widths of the head's hidden layers; () for a linear head.
        margin: ρ, for terms of the serving head: the lead over the student at which the term has
            its whole weight. Each task's loss is multiplied by clip((1 - L_T / L_S) / ρ, 0, 1), L_T
            and L_S being running means of what its target and the serving head lose on the fresh
            labels: a teacher that has grown no better than the student teaches it no more. None:
            the weight holds whatever the teacher is worth.
        negative_sampling_rate: r_F, the share of the negatives that the teacher's training data
            kept, in (0, 1]. The soft label of a binary task is σ(z + log r_F - log r_S), r_S being
            the task's: the teacher's logit z as if it had learnt from the student's data. Where
            both are sampled alike, give both or neither. An adapted term needs none: the adapter
            learns from the student's own labels. Neither does a regression.

    Raises:
        ValueError: if α is not positive, if β or w is negative, or one is not finite; if the rate
            is outside (0, 1], or is not 1 and the term is adapted; for a β or hidden layers of a
            term of the serving head; for a margin that is not positive, or of another term.
        TypeError: if ``hidden`` or ``tasks`` is no tuple.
    """

    teacher: str = "teacher"
    adapted: bool = False
    serving: bool = False
    tasks: tuple[str, ...] | None = None
    alpha: float = 1.0
    beta: float = 1.0
    weight: float = 1.0
    hidden: tuple[int, ...] = (128,)
    margin: float | None = None
    negative_sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("beta", self.beta), ("weight", self.weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} should be a finite number >= 0; received {value}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha should be a finite number > 0; received {self.alpha}")
        if self.serving and (self.beta != 1 or self.hidden != type(self).hidden):
            raise ValueError(
                "a term of the serving head has no head of its own and no gradient to scale: leave "
                f"hidden and beta as they are; received hidden={self.hidden}, beta={self.beta}"
            )
        if self.margin is not None and not (self.serving and 0 < self.margin < math.inf):
            raise ValueError(
                "margin should be None, or a number > 0 of a term with serving=True; received "
                f"margin={self.margin}, serving={self.serving}"
            )
        check_sampling_rate("negative_sampling_rate", self.negative_sampling_rate)
        if self.adapted and self.negative_sampling_rate != 1:
            raise ValueError(
                "negative_sampling_rate of an adapted term should be 1, as the adapter learns from "
                "the student's own labels and needs no correction; received "
                f"{self.negative_sampling_rate}"
            )
        for name, names in (("hidden", self.hidden), ("tasks", self.tasks)):
            if names is not None and not isinstance(names, (tuple, list)):
                raise TypeError(f"{name} should be a tuple; received {names!r}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden should be widths of at least 1; received {self.hidden}")

    @property
    def name(self) -> str:
        """The teacher's name, what it is learnt through, and the tasks if not all."""
        through = [name for name in ("adapted", "serving") if getattr(self, name)]
        return "/".join([self.teacher, *through, *(self.tasks or ())])


class TaskLoss(nn.Module):
    """The loss of each of T tasks: cross entropy if it is binary, squared error if not."""

    regression: Tensor | None

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        flags = [task.regression for task in tasks]
        self._all_regression = all(flags)
        mixed = constant(flags) if any(flags) and not all(flags) else None
        self.register_buffer("regression", mixed, persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(..., T) logits or predictions, (..., T) what soft_labels gives -> (..., T) losses."""
        if self._all_regression:
            return squared_error(outputs, targets)
        losses = soft_bce_with_logits(outputs, targets)
        if self.regression is None:
            return losses
        return torch.where(self.regression, squared_error(outputs, targets), losses)

    def soft_labels(self, values: Tensor, alphas: _Factors) -> Tensor:
        """(..., T) logits or predictions -> (..., T) probabilities or predictions, times α."""
        if self._all_regression:
            return alphas.times(values)
        probabilities = values.sigmoid()
        if not alphas.all_one:
            probabilities = scale_label(probabilities, alphas.like(probabilities))
        if self.regression is None:
            return probabilities
        return torch.where(self.regression, alphas.times(values), probabilities)


class DistillationHead(nn.Module):
    """A multi-layer perceptron on the shared representation, with gradient scaling before it.

    D_k of :class:`AuxiliaryHead` (arXiv 2502.17494, eq. 3-5). Its outputs are logits of binary
    tasks, predictions of regressions; its parameters receive the whole gradient, the shared
    representation β times.

    Args:
        in_features: D, the width of the shared representation.
        num_tasks: T, one output each.
        hidden: widths of the hidden layers, each followed by a ReLU; () for a linear head.
        beta: β, see :func:`torchrec_exfm.functional.scale_gradient`.

    Example:
        >>> head = DistillationHead(8, num_tasks=2, hidden=(4,))
        >>> head(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_tasks: int = 1,
        hidden: Sequence[int] = (128,),
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.mlp = mlp(in_features, hidden, num_tasks)

    def forward(self, shared: Tensor) -> Tensor:
        """(B, D) shared representation -> (B, T) logits or predictions."""
        if _are_plain([self]):
            return heads_side_by_side([self], shared)
        outputs: Tensor = self.mlp(scale_gradient(shared, self.beta))
        return outputs

    @property
    def layers(self) -> list[nn.Linear]:
        """The linear layers, from the shared representation to the outputs."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]


def heads_side_by_side(heads: Sequence[DistillationHead], shared: Tensor) -> Tensor:
    """The outputs of K heads of the same widths, computed together.

    Args:
        heads: the K heads, of T outputs each.
        shared: (B, D); receives the sum of the heads' gradients, each times its β.

    Returns:
        (B, K T), the outputs of the first head first.
    """
    layers = [
        ([layer.weight for layer in of_heads], [layer.bias for layer in of_heads])
        for of_heads in zip(*(head.layers for head in heads), strict=True)
    ]
    return perceptrons(shared, layers, [head.beta for head in heads])


def _are_plain(heads: Sequence[DistillationHead]) -> bool:
    """Whether they are as they were made: unchanged, not hooked into, not being compiled."""
    for head in heads:
        kinds = [type(module) for module in head.mlp]
        plain = kinds == [nn.Linear, nn.ReLU] * (len(kinds) // 2) + [nn.Linear]
        plain = plain and all(layer.bias is not None for layer in head.layers)
        if not plain or any(m._forward_hooks or m._forward_pre_hooks for m in head.modules()):
            return False
    shapes = {tuple(layer.weight.shape for layer in head.layers) for head in heads}
    return len(shapes) == 1 and not torch.compiler.is_compiling()


def _outputs_of(heads: list[DistillationHead], shared: Tensor) -> Tensor:
    if _are_plain(heads):
        return heads_side_by_side(heads, shared)
    return torch.cat([head(shared) for head in heads], dim=1)


class _ServingHead(nn.Module):
    """In the place of a head: what the serving head says of a term's tasks."""

    columns: Tensor | None

    def __init__(self, columns: Sequence[int], num_tasks: int) -> None:
        super().__init__()
        all_in_order = list(columns) == list(range(num_tasks))
        picked = None if all_in_order else constant(columns)
        self.register_buffer("columns", picked, persistent=False)

    def forward(self, serving: Tensor) -> Tensor:
        """(B, T) -> (B, tasks of the term)."""
        return _picked(serving, self.columns)


class _Factors:
    """A number for each of some columns: as a tensor where it is needed, exact in the module."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = tuple(values)
        self.all_one = all(value == 1 for value in values)
        self.all_zero = not any(values)
        self._tensor: Tensor | None = None

    def like(self, columns: Tensor) -> Tensor:
        """(C,), of the dtype and on the device of (..., C)."""
        kept = self._tensor
        if kept is None or kept.device != columns.device or kept.dtype != columns.dtype:
            with torch.inference_mode(False):  # whatever asks first, training may ask next
                kept = torch.tensor(self.values, dtype=columns.dtype, device=columns.device)
            self._tensor = kept
        return kept

    def times(self, columns: Tensor) -> Tensor:
        """(..., C) times (C,)."""
        return columns if self.all_one else self.like(columns) * columns

    def plus(self, columns: Tensor) -> Tensor:
        """(..., C) plus (C,)."""
        return columns if self.all_zero else self.like(columns) + columns


class AuxiliaryHead(nn.Module):
    """The auxiliary head (AH): all that meets the teachers' labels (arXiv 2502.17494, eq. 3-5).

    .. math:: L_D = \\sum_k w_k \\frac{1}{T_k} \\sum_t
        \\mathrm{mean}_{b\\text{ present}} \\; h(D_k(x_b)_t,
        \\min(α_k σ(y_{F,b,t} + \\log r_{F,k} - \\log r_{S,t}), 1))

    r_F and r_S are the negative sampling rates of the teacher's data and of the student's, 1 unless
    given: :class:`DistillationTerm` and :class:`Task`. Logits of adapted terms are not moved, nor
    are predictions of a regression.

    One :class:`DistillationHead` D_k for each term, side by side where they have the same widths;
    one loss over all outputs of all terms. The shared representation x receives the
    gradient of L_D (times β_k); the serving head, which is no part of this, receives none, but
    for terms with ``serving=True``, whose D_k is the serving head. Every head is in the graph on
    every step: missing outputs are masked. The mean of a term with a ``margin`` is multiplied by
    how far its teacher leads: :class:`DistillationTerm`.

    Args:
        in_features: D, the width of the shared representation.
        terms: the K terms; fastest with those of the same widths next to each other.
        teachers: the names of the M teachers, in the order of the outputs.
        tasks: the T tasks, in the order of the outputs.

    Raises:
        ValueError: for no terms, a term with an unknown teacher or task, or a term over a
            regression with a ``negative_sampling_rate`` other than 1.
        TypeError: for terms or tasks of another kind.

    Example:
        >>> ah = AuxiliaryHead(8, terms=[DistillationTerm(weight=2.0)])
        >>> loss, of_each_term = ah(torch.zeros(3, 8), TeacherOutputs(torch.zeros(3)))
    """

    value_columns: Tensor | None
    presence_columns: Tensor | None
    task_columns: Tensor
    lead_losses: Tensor | None

    def __init__(
        self,
        in_features: int,
        *,
        terms: Sequence[DistillationTerm] = (DistillationTerm(),),
        teachers: Sequence[str] = ("teacher",),
        tasks: Sequence[Task] = (Task(),),
    ) -> None:
        super().__init__()
        check_kinds("terms", terms, DistillationTerm)
        if not terms:
            raise ValueError("terms should hold at least one DistillationTerm; received none")
        self.tasks = check_tasks(tasks)
        self.regressions = tuple(task.regression for task in tasks)
        self.teachers = check_names("teachers", teachers)
        self.terms = tuple(terms)
        self._adapts = any(term.adapted for term in terms)
        self._serves = any(term.serving for term in terms)
        by_term = [self._columns_of(term) for term in terms]
        self._sizes = [len(of_term) for of_term in by_term]
        columns = list(itertools.chain(*by_term))
        of_columns = [
            (term, tasks[column % len(tasks)])
            for term, of_term in zip(terms, by_term, strict=True)
            for column in of_term
        ]
        self._alphas = _Factors([term.alpha for term, _ in of_columns])
        self._shifts = _Factors([_shift(term, task) for term, task in of_columns])
        self._weights = _Factors([term.weight for term in terms])
        self._register_columns(columns)
        self._register_leads([term for term, _ in of_columns], columns)
        self.loss = TaskLoss([task for _, task in of_columns])
        self.heads = nn.ModuleList(
            _head_of(term, of_term, in_features, len(tasks))
            for term, of_term in zip(terms, by_term, strict=True)
        )
        self._alike = _alike(terms, self._sizes)

    def _columns_of(self, term: DistillationTerm) -> list[int]:
        """Where a term's targets are in the M T outputs, with the adapted ones behind them."""
        if term.teacher not in self.teachers:
            raise ValueError(
                f"a term's teacher should be one of {list(self.teachers)}; received "
                f"{term.teacher!r}"
            )
        covered = self.tasks if term.tasks is None else term.tasks
        if not set(covered) <= set(self.tasks) or len(set(covered)) != len(covered) or not covered:
            raise ValueError(
                f"a term's tasks should be distinct and among {list(self.tasks)}; received "
                f"{list(covered)}"
            )
        row = self.teachers.index(term.teacher) + (len(self.teachers) if term.adapted else 0)
        return [row * len(self.tasks) + self.tasks.index(name) for name in covered]

    def _register_columns(self, columns: list[int]) -> None:
        outputs = len(self.teachers) * len(self.tasks)
        there = outputs * (2 if self._adapts else 1)
        all_in_order = columns == list(range(there))
        of_values = None if all_in_order else constant(columns)
        of_presence = None if columns == list(range(outputs)) else constant(columns) % outputs
        self.register_buffer("value_columns", of_values, persistent=False)
        self.register_buffer("presence_columns", of_presence, persistent=False)

    def _register_leads(self, terms: Sequence[DistillationTerm], columns: list[int]) -> None:
        """For terms with a margin: the running means of target and serving head, (2, C)."""
        self._margins = _Factors([term.margin or math.nan for term in terms])
        self.register_buffer("lead_losses", None)
        if any(term.margin for term in terms):
            of_tasks = constant(columns) % len(self.tasks)
            self.register_buffer("task_columns", of_tasks, persistent=False)
            self.lead_losses = torch.zeros(2, len(columns), device="cpu")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moved and converted as any module, but running means stay in float32."""
        before = self.lead_losses
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        after = self.lead_losses
        if before is not None and after is not None and after.dtype != before.dtype:
            self.lead_losses = before.to(after.device)
        return self

    def forward(
        self,
        shared: Tensor,
        teacher: TeacherOutputs,
        adapted: Tensor | None = None,
        count: Tensor | None = None,
        serving: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the terms.

        Args:
            shared: (B, D), with gradient.
            teacher: the outputs for the same B examples.
            adapted: (B, M, T), the student adapter's outputs, without gradient; needed by terms
                with ``adapted=True``.
            count: (M, T), see :func:`torchrec_exfm.functional.masked_mean`.
            serving: (B, T), or (B,) for one task, the serving head's outputs, with gradient;
                needed by terms with ``serving=True``.
            labels: (B, T), or (B,) for one task, fresh labels; needed by terms with a margin. Their
                running means take in this step's after it: under data parallelism average
                ``lead_losses`` over the ranks then.

        Returns:
            L_D as a scalar, and the K unweighted losses, detached.

        Raises:
            ValueError: if the outputs' shape does not fit B, M and T, or ``adapted``,
                ``serving`` or ``labels`` are needed and not there.
        """
        expected = (shared.shape[0], len(self.teachers), len(self.tasks))
        if teacher.values.shape != expected:
            raise ValueError(
                f"teacher outputs should be of shape {expected} (examples, teachers "
                f"{list(self.teachers)}, tasks {list(self.tasks)}); received "
                f"{tuple(teacher.values.shape)}"
            )
        outputs = self._outputs(shared, serving)
        values = self._values(teacher, adapted)
        targets = self.loss.soft_labels(values, self._alphas).to(outputs.dtype)
        present = _picked(teacher.presence.flatten(1), self.presence_columns)
        denominators = None if count is None else _picked(count.flatten(), self.presence_columns)
        means = masked_mean(self.loss(outputs, targets), present, denominators)
        losses = self._means_by_term(means)
        if self.lead_losses is None:
            return self._weights.times(losses).sum(), losses.detach()
        taught = self._means_by_term(self.leads * means)
        if self.training:
            labels = checked_labels(labels, len(shared), len(self.tasks))
            both = torch.stack([values, outputs.detach()], dim=1)
            self._compare(both, labels, present, denominators)
        return self._weights.times(taught).sum(), losses.detach()

    @property
    def leads(self) -> Tensor:
        """What multiplies the loss of each task of each term, one after the other, (C,).

        In [0, 1] for terms with a margin, 1 for others.
        """
        if self.lead_losses is None:
            return torch.ones(sum(self._sizes))
        of_target, of_student = self.lead_losses
        margins = self._margins.like(of_student)
        lead = (1 - of_target / of_student) / margins
        lead = torch.where(of_target < of_student, lead, 0.0).clamp(0, 1)
        return torch.where(margins.isnan(), 1.0, lead)

    @torch.no_grad()
    def _compare(self, both: Tensor, labels: Tensor, present: Tensor, count: Tensor | None) -> None:
        """Take what targets and outputs, (B, 2, C), lose on the labels into the running means."""
        assert self.lead_losses is not None
        labels = labels.index_select(1, self.task_columns).unsqueeze(1).expand_as(both)
        losses = masked_mean(self.loss(both.float(), labels), present.unsqueeze(1), count)
        there = present.any(0) if count is None else count > 0
        usable = there & losses.isfinite().all(0)  # one overflow would stay in the means for ever
        losses = torch.where(usable, losses, self.lead_losses)
        self.lead_losses.lerp_(losses, 1 - LEAD_DECAY)

    def _outputs(self, shared: Tensor, serving: Tensor | None) -> Tensor:
        """(B, C): what the heads say, those of the same widths side by side."""
        heads = list(self.heads)
        if self._serves:
            serving = self._checked_serving(serving, len(shared))
        parts = [
            torch.cat([head(serving) for head in heads[alike]], dim=1)
            if self.terms[alike.start].serving
            else _outputs_of(cast(list[DistillationHead], heads[alike]), shared)
            for alike in self._alike
        ]
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def _checked_serving(self, serving: Tensor | None, batch_size: int) -> Tensor:
        """(B, T)."""
        shape = tuple(serving.shape) if isinstance(serving, Tensor) else type(serving).__name__
        expected = (batch_size, len(self.tasks))
        fits = shape == expected or (shape == expected[:1] and expected[1] == 1)
        if not isinstance(serving, Tensor) or not fits:
            names = [term.name for term in self.terms if term.serving]
            raise ValueError(
                f"the terms {names} teach the serving head, whose outputs should be of shape "
                f"{expected} (examples, tasks {list(self.tasks)}); received {shape}: let "
                "ExFMWrapper tap the module that gives the logits"
            )
        return serving.reshape(expected)

    def _values(self, teacher: TeacherOutputs, adapted: Tensor | None) -> Tensor:
        """(B, C): the teachers' logits or predictions, in the order of the heads' outputs."""
        values = teacher.values.flatten(1)
        if self._adapts:
            adapted = self._checked_adapted(adapted, teacher)
            values = torch.cat([values, adapted.flatten(1)], dim=1)
        return self._shifts.plus(_picked(values, self.value_columns))

    def _checked_adapted(self, adapted: Tensor | None, teacher: TeacherOutputs) -> Tensor:
        """(B, M, T), 0 where the teacher's output is missing."""
        if adapted is None:
            names = [term.name for term in self.terms if term.adapted]
            raise ValueError(
                f"the terms {names} learn from a student adapter's outputs and there are none: "
                "give TrainPipelineExFM an adapter"
            )
        if adapted.shape != teacher.values.shape:
            raise ValueError(
                "adapted outputs should be of the teacher's shape "
                f"{tuple(teacher.values.shape)}; received {tuple(adapted.shape)}"
            )
        return torch.where(teacher.presence, adapted, 0.0)

    def _means_by_term(self, means: Tensor) -> Tensor:
        """(C,) -> (K,)."""
        if len(set(self._sizes)) == 1:
            return means.view(-1, self._sizes[0]).mean(1)
        return torch.stack([of_term.mean() for of_term in means.split(self._sizes)])


def _head_of(
    term: DistillationTerm, columns: Sequence[int], in_features: int, num_tasks: int
) -> nn.Module:
    if term.serving:
        return _ServingHead([column % num_tasks for column in columns], num_tasks)
    return DistillationHead(in_features, num_tasks=len(columns), hidden=term.hidden, beta=term.beta)


def _alike(terms: Sequence[DistillationTerm], sizes: Sequence[int]) -> list[slice]:
    """The runs of terms whose heads have the same widths."""
    pairs = zip(terms, sizes, strict=True)
    widths = [(term.serving, *term.hidden, size) for term, size in pairs]
    ends = [k for k in range(1, len(terms)) if widths[k] != widths[k - 1]]
    return [slice(*pair) for pair in itertools.pairwise([0, *ends, len(terms)])]


def _shift(term: DistillationTerm, task: Task) -> float:
    """From the rate of the teacher's data to that of the student's: log r_F - log r_S."""
    if term.adapted:
        return 0.0
    if task.regression and term.negative_sampling_rate != 1:
        raise ValueError(
            f"negative_sampling_rate of the term {term.name!r} over the regression {task.name!r} "
            f"should be 1; received {term.negative_sampling_rate}: give the binary tasks a term of "
            "their own"
        )
    return math.log(term.negative_sampling_rate) - math.log(task.negative_sampling_rate)


def _picked(values: Tensor, columns: Tensor | None) -> Tensor:
    return values if columns is None else values.index_select(-1, columns)


def constant(values: Sequence[float]) -> Tensor:
    """A tensor with its values, on the CPU even where modules are being made on meta."""
    return torch.tensor(values, device="cpu")


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Linear layers with a ReLU between each two."""
    widths = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def checked_labels(labels: Tensor | None, batch_size: int, num_tasks: int) -> Tensor:
    """(B, T) or, for one task, (B,) labels -> (B, T); a ValueError for others, or none."""
    expected = f"({batch_size}, {num_tasks})" + (f" or ({batch_size},)" if num_tasks == 1 else "")
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"fresh labels should be a tensor of shape {expected}; received "
            f"{type(labels).__name__}: tell TrainPipelineExFM where they are (labels=...)"
        )
    if labels.numel() != batch_size * num_tasks or labels.shape[:1] != (batch_size,):
        raise ValueError(
            f"fresh labels should be of shape {expected}; received {tuple(labels.shape)}, with "
            f"{batch_size} teacher outputs"
        )
    return labels.float().reshape(batch_size, num_tasks)


def check_kinds(what: str, values: Sequence[object], kind: type) -> None:
    """A TypeError unless it is a sequence of that kind."""
    if not isinstance(values, (tuple, list)) or any(not isinstance(v, kind) for v in values):
        raise TypeError(f"{what} should be a sequence of {kind.__name__}; received {values!r}")


def check_tasks(tasks: Sequence[Task]) -> tuple[str, ...]:
    """The tasks' names; an error unless they are tasks, at least one, of distinct names."""
    check_kinds("tasks", tasks, Task)
    return check_names("tasks", [task.name for task in tasks])


def check_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names, at least one and each once; a ValueError otherwise."""
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise ValueError(f"{what} should be distinct names, at least one; received {names!r}")
    return tuple(names)
