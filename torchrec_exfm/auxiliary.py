"""The auxiliary head: a loop over the terms of the distillation loss.

Shapes: B examples, D width of a shared representation, M teachers, T tasks, K terms, U tasks of a
term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from torchrec_exfm.batch import TeacherOutputs
from torchrec_exfm.functional import positive
from torchrec_exfm.tasks import (
    Task,
    check_names,
    check_tasks,
    check_types,
    checked_candidates,
    checked_groups,
    checked_labels,
    checked_weights,
    count_outputs,
    find_absent,
)
from torchrec_exfm.terms import DistillationTerm, Targets, TermInputs, TermLoss

__all__ = ["AuxiliaryHead"]

Value = TypeVar("Value")
ByTasks: TypeAlias = Mapping[str | tuple[str, ...], Value]


class AuxiliaryHead(nn.Module):
    """The auxiliary head (AH): all distillation heads and their terms (arXiv 2502.17494, eq. 3-5).

    .. math:: L_D = \\sum_k w_k \\frac{1}{T_k} \\sum_t
        \\mathrm{mean}_{b\\text{ present}} \\; h(D_k(x_b)_t,
        \\min(α_k σ(y_{F,b,t} + \\log r_{F,k} - \\log r_{S,t}), 1))

    The sum of K terms, each with its own :class:`DistillationHead` D_k. h is the task's own loss,
    or the term's ``loss`` (:mod:`torchrec_exfm.losses`). r_F and r_S are the negative sampling
    rates of the teacher's data (:class:`DistillationTerm`) and of the student's (:class:`Task`), 1
    by default. They shift no logits of adapted terms and no predictions of a regression.

    The shared representation x receives the gradient of L_D (times β_k). The serving head receives
    none, except from terms with ``serving=True``, whose D_k is the serving head. Every head is in
    the graph on every step, as missing outputs are masked. The mean of a term with a ``margin`` is
    multiplied by its teacher's lead: :class:`DistillationTerm`.

    Args:
        in_features: D, the width of the shared representation. If tasks have their own
            representations: a mapping from each task, or tuple of tasks, to its width. A term over
            several of them has a head on each.
        terms: the K terms.
        teachers: the names of the M teachers, in the order of the outputs.
        tasks: the T tasks, in the order of the outputs.

    Raises:
        ValueError: without terms; for a term with an unknown teacher or task, or over a regression
            with a ``negative_sampling_rate`` other than 1; for a mapping that does not name each
            task once.
        TypeError: for terms or tasks of another type.

    Example:
        >>> ah = AuxiliaryHead(8, terms=[DistillationTerm(weight=2.0)])
        >>> loss, term_losses = ah(torch.zeros(3, 8), TeacherOutputs(torch.zeros(3)))
    """

    def __init__(
        self,
        in_features: int | ByTasks[int],
        *,
        terms: Sequence[DistillationTerm] = (DistillationTerm(),),
        teachers: Sequence[str] = ("teacher",),
        tasks: Sequence[Task] = (Task(),),
    ) -> None:
        super().__init__()
        check_types("terms", terms, DistillationTerm)
        if not terms:
            raise ValueError("terms should hold at least one DistillationTerm; received none")
        self.task_names = check_tasks(tasks)
        self.tasks = tuple(tasks)
        self.teachers = check_names("teachers", teachers)
        self.terms = tuple(terms)
        taps = [
            ([self.task_names.index(name) for name in names], width)
            for names, width in by_tasks("in_features", in_features, self.task_names)
        ]
        for term in terms:
            self._check_term(term)
        self.term_losses: Any = nn.ModuleList(
            TermLoss(term, self.teachers.index(term.teacher), tasks, taps) for term in terms
        )

    def forward(
        self,
        shared: Tensor | Sequence[Tensor],
        teacher: TeacherOutputs,
        *,
        serving: Tensor | None = None,
        adapted: Tensor | None = None,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        counts: Tensor | None = None,
        groups: Tensor | None = None,
        candidates: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the terms.

        Args:
            shared: (B, D), with gradient; if ``in_features`` is a mapping, one for each entry.
            teacher: the outputs for the same B examples.
            serving: (B, T), or (B,) for one task, the serving head's outputs, with gradient;
                needed by terms with ``serving=True``.
            adapted: (B, M, T), the student adapter's outputs, without gradient; needed by terms
                with ``adapted=True``.
            labels: (B, T), or (B,) for one task, fresh labels, NaN where one is missing; needed by
                terms with a margin, in training. This step updates their running means after use;
                under data parallelism, then average ``lead_losses`` over the ranks.
            weights: (B, T), or (B,) for all tasks, the examples' weights; None: all 1.
            counts: (2, M, T), the denominators of the means: of the outputs, and of those with a
                label. See ``count`` of :func:`torchrec_exfm.functional.masked_mean`. If a term
                learns from embeddings, theirs is added last, (3, M, T).
            groups: (B,) int64, equal for the examples of a group, in any order; needed by terms
                whose loss compares them. A group holds examples of this rank only.
            candidates: (B,) int64, the ids of the examples' items, or a pair of them and (B,) log
                q, how often an item is sampled; needed by losses over in-batch candidates, which
                are this rank's examples only.

        Returns:
            L_D as a scalar, and the K unweighted losses, detached.

        Raises:
            ValueError: if the outputs' shape does not fit B, M and T; if ``adapted``, ``serving``,
                ``labels``, ``groups``, ``candidates`` or the teachers' embeddings are needed and
                missing, or have another shape or dtype; on the CPU for infinite labels and log q,
                and negative weights.
        """
        shared = [shared] if isinstance(shared, Tensor) else list(shared)
        size = len(shared[0])
        self._check_outputs(teacher, size)
        if any(term.serving for term in self.terms):
            serving = self._checked_serving(serving, size)
        if any(term.adapted for term in self.terms):
            self._check_adapted(adapted, teacher)
        needs_labels = self.training and bool(self.lead_losses)
        labels = checked_labels(labels, self.tasks, size) if needs_labels else None
        if weights is not None:
            weights = checked_weights(weights, self.tasks, size)
        if any(term.loss.needs_groups for term in self.terms):
            groups = checked_groups(groups, size)
        needs_candidates = any(term.loss.needs_candidates for term in self.terms)
        embedded = self.embedding_presence(teacher)
        if counts is None:
            counts = count_outputs(teacher.presence, labels, weights, embedded)
        embeddings = None
        if embedded is not None and teacher.embeddings is not None:
            absent = find_absent(embedded.unsqueeze(-1).expand_as(teacher.presence), None, weights)
            embeddings = Targets(teacher.embeddings, absent, positive(counts[-1]))
        absent = find_absent(teacher.presence, None, weights)
        inputs = TermInputs(
            outputs=Targets(teacher.values, absent, positive(counts[0])),
            embeddings=embeddings,
            adapted=adapted,
            labels=labels,
            weights=weights,
            label_count=counts[0 if labels is None else 1],
            unlabelled=None if labels is None else find_absent(teacher.presence, labels, weights),
            groups=groups,
            candidates=checked_candidates(candidates, size) if needs_candidates else None,
        )
        pairs = [term(shared, serving, inputs) for term in self.term_losses]
        taught, losses = zip(*pairs, strict=True)
        return sum(taught[1:], taught[0]), torch.stack(losses)  # sum() would add 0 in a kernel

    @property
    def leads(self) -> Tensor:
        """The factor of each task's loss in each term, all terms in one tensor, on the CPU.

        In [0, 1] for terms with a margin, 1 for others.
        """
        return torch.cat([term.lead.cpu() for term in self.term_losses])

    @property
    def lead_losses(self) -> list[Tensor]:
        """The running means of terms with a margin, of target and student, each (2, U)."""
        return [term.lead_losses for term in self.term_losses if term.lead_losses is not None]

    def embedding_presence(self, teacher: TeacherOutputs) -> Tensor | None:
        """Return the mask of the teachers' embeddings, (B, M), or None if no term needs them.

        Raises:
            ValueError: if a term needs embeddings and the outputs have none.
        """
        names = [term.name for term in self.terms if term.loss.embeddings]
        if names and teacher.embeddings is None:
            raise ValueError(
                f"the losses of the terms {names} learn from the teachers' embeddings; received "
                "outputs without them: look them up with TeacherLookup(embeddings=True), or "
                "give TeacherOutputs(..., embeddings=...)"
            )
        return teacher.embedding_presence if names else None

    def _check_term(self, term: DistillationTerm) -> None:
        if term.teacher not in self.teachers:
            raise ValueError(
                f"a term's teacher should be one of {list(self.teachers)}; received "
                f"{term.teacher!r}"
            )
        names = self.task_names
        covered = names if term.tasks is None else term.tasks
        if not set(covered) <= set(names) or len(set(covered)) != len(covered) or not covered:
            raise ValueError(
                f"a term's tasks should be distinct and among {list(names)}; received "
                f"{list(covered)}"
            )

    def _check_outputs(self, teacher: TeacherOutputs, size: int) -> None:
        expected = (size, len(self.teachers), len(self.tasks))
        if teacher.values.shape != expected:
            raise ValueError(
                f"teacher outputs should be of shape {expected} (examples, teachers "
                f"{list(self.teachers)}, tasks {list(self.task_names)}); received "
                f"{tuple(teacher.values.shape)}"
            )

    def _checked_serving(self, serving: Tensor | None, size: int) -> Tensor:
        """Return the serving head's outputs as (B, T)."""
        shape = tuple(serving.shape) if isinstance(serving, Tensor) else type(serving).__name__
        expected = (size, len(self.tasks))
        fits = shape == expected or (shape == expected[:1] and expected[1] == 1)
        if not isinstance(serving, Tensor) or not fits:
            names = [term.name for term in self.terms if term.serving]
            raise ValueError(
                f"the terms {names} teach the serving head, whose outputs should be of shape "
                f"{expected} (examples, tasks {list(self.task_names)}); received {shape}: let "
                "ExFMWrapper tap the module that returns the logits, or pass serving_logits=..., a "
                "function from the student's output to them"
            )
        return serving.reshape(expected)

    def _check_adapted(self, adapted: Tensor | None, teacher: TeacherOutputs) -> None:
        if adapted is None:
            names = [term.name for term in self.terms if term.adapted]
            raise ValueError(
                f"the terms {names} learn from a student adapter's outputs; received none: give "
                "the pipeline an adapter"
            )
        if adapted.shape != teacher.values.shape:
            raise ValueError(
                "adapted outputs should be of the teacher's shape "
                f"{tuple(teacher.values.shape)}; received {tuple(adapted.shape)}"
            )


def by_tasks(
    what: str, value: Value | ByTasks[Value], tasks: Sequence[str]
) -> list[tuple[tuple[str, ...], Value]]:
    """Return pairs of task names and their value: one pair for all tasks, or those of a mapping.

    Raises:
        ValueError: for a mapping that does not name each task once.
    """
    if not isinstance(value, Mapping):
        return [(tuple(tasks), value)]
    groups = [((key,) if isinstance(key, str) else tuple(key), v) for key, v in value.items()]
    named = [name for names, _ in groups for name in names]
    if sorted(named) != sorted(tasks):
        raise ValueError(
            f"{what} should name each of the tasks {list(tasks)} once, alone or in a tuple; "
            f"received {named}"
        )
    return groups
