"""External distillation by hand: one process, float64, plain modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rank_models import BY_HAND, TAP, TASKS, TEACHERS, Columns, teacher_for
from torch import Tensor, nn

from torchrec_exfm import ExFMWrapper, StudentAdapter

LIMITS = torch.tensor([float("inf") if task.regression else 15.0 for task in TASKS])


class ByHand:
    """A wrapped student, and its adapter, trained on global batches.

    Args:
        wrapper: an unsharded wrapper of a two-task DLRM.
        adapter: the student adapter, or None.
        optimizer: of the student and the heads, built with ``options``.
        adapter_lr: the learning rate of the adapter's SGD.
    """

    def __init__(
        self,
        wrapper: ExFMWrapper,
        adapter: StudentAdapter | None,
        optimizer: type[torch.optim.Optimizer],
        *,
        adapter_lr: float,
        **options: Any,
    ) -> None:
        self.terms = wrapper.auxiliary_head.terms
        self.student = copy.deepcopy(wrapper.student).double()
        pairs = zip(self.terms, wrapper.auxiliary_head.term_losses, strict=True)
        mlps = [
            nn.Identity() if term.serving else term_loss.heads[0].mlp for term, term_loss in pairs
        ]
        self.teacher = teacher_for(self.terms)
        self.leads: list[float] = []
        widths = [len(term.tasks or TASKS) for term in self.terms]
        self.lost = [torch.zeros(2, width, dtype=torch.float64) for width in widths]
        self.heads = copy.deepcopy(nn.ModuleList(mlps)).double()
        self.adapters = copy.deepcopy(adapter.mlps).double() if adapter else nn.ModuleList()
        self.optimizer = optimizer(
            [*self.student.parameters(), *self.heads.parameters()], **options
        )
        self.adapter_lr = adapter_lr
        tapped = self.student.get_submodule(TAP)
        tapped._forward_pre_hooks.clear()
        tapped._forward_hooks.clear()
        tapped.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.shared, self.serving = args[0], output

    def step(self, batch: Columns) -> None:
        """Take the adapter's step, then the student's."""
        batch = Columns(**(batch.columns | {"values": self.teacher(batch).values}))
        adapted = self._step_of_adapter(batch) if len(self.adapters) else None
        dense = batch.dense_features.double()
        self.optimizer.zero_grad()
        loss, _ = self.student(Columns(**(batch.columns | {"dense_features": dense})))
        for k, term in enumerate(self.terms):
            loss = loss + term.weight * self._loss(k, batch, adapted)
        loss.backward()
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name in the wrapper's state; the adapter's under ``adapter.``."""
        weights = {f"student.{key}": value for key, value in self.student.state_dict().items()}
        for k, head in enumerate(self.heads):
            prefix = f"exfm.auxiliary_head.term_losses.{k}"
            mlp = head.state_dict().items()
            weights |= {f"{prefix}.heads.0.mlp.{key}": value for key, value in mlp}
            if self.terms[k].margin:
                weights[f"{prefix}.lead_losses"] = self.lost[k]
        state = self.adapters.state_dict()
        return weights | {f"adapter.mlps.{key}": value for key, value in state.items()}

    def _loss(self, k: int, batch: Columns, adapted: Tensor | None) -> Tensor:
        term = self.terms[k]
        outputs = self.heads[k](term.beta * self.shared + (1 - term.beta) * self.shared.detach())
        source = batch.values.double() if adapted is None or not term.adapted else adapted
        m = TEACHERS.index(term.teacher)
        names = [task.name for task in TASKS]
        losses, weights = [], _weights(batch)
        for column, name in enumerate(term.tasks or names):
            t = names.index(name)
            output = self.serving[:, t] if term.serving else outputs[:, column]
            here = batch.presence[:, m, t] & (weights[:, t] > 0)
            values, target, w = source[:, m, t], source[here, m, t], weights[here, t]
            target_loss, student_loss = self.lost[k][:, column].tolist()
            known = here & ~batch.labels[:, t].isnan()
            if known.any():
                predictions = (source[known, m, t], output[known].detach())
                labels = batch.labels[known, t].double()
                means = [
                    _mean_loss(t, prediction, labels, weights[known, t])
                    for prediction in predictions
                ]
                self.lost[k][:, column] *= 0.99
                self.lost[k][:, column] += 0.01 * torch.stack(means)
            if not TASKS[t].regression:
                target = target.sigmoid()
            target = term.alpha * target
            if term.loss in BY_HAND:
                columns = (output, values, weights[:, t], here, batch.groups)
                loss = BY_HAND[term.loss](*columns, regression=TASKS[t].regression)
                loss = loss / w.sum().clamp(min=0.1)
            else:
                loss = _mean_loss(t, output[here], target, w)
            if term.margin:
                lead = 1 - target_loss / student_loss if student_loss else 0.0
                self.leads.append(min(max(lead / term.margin, 0.0), 1.0))
                loss = self.leads[-1] * loss
            losses.append(loss)
        return sum(losses) / len(losses)

    def _step_of_adapter(self, batch: Columns) -> Tensor:
        outputs = self._adapted(batch)
        total = torch.zeros((), dtype=torch.float64)
        for m in range(len(TEACHERS)):
            for t in range(len(TASKS)):
                weights = _weights(batch)[:, t]
                here = batch.presence[:, m, t] & ~batch.labels[:, t].isnan() & (weights > 0)
                labels = batch.labels[here, t].double()
                loss = _mean_loss(t, outputs[here, m, t], labels, weights[here])
                total = total + loss / len(TASKS)
        parameters = list(self.adapters.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(total, parameters), strict=True
            ):
                parameter -= self.adapter_lr * gradient
        return self._adapted(batch).detach()

    def _adapted(self, batch: Columns) -> Tensor:
        values = batch.values.nan_to_num(0.0).double()
        values = torch.maximum(torch.minimum(values, LIMITS), -LIMITS)
        inputs = torch.cat([values, batch.presence.double()], dim=-1)
        corrections = [mlp(inputs[:, m]) for m, mlp in enumerate(self.adapters)]
        return values + torch.stack(corrections, dim=1)


def _weights(batch: Columns) -> Tensor:
    """Return the weights (B, T), all 1 if the batch has none."""
    weights = batch.columns.get("weights")
    return torch.ones(batch.labels.shape).double() if weights is None else weights.double()


def _mean_loss(task: int, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean loss of one task; 0 without outputs."""
    if not len(outputs):
        return outputs.sum()
    if TASKS[task].regression:
        losses = (outputs - targets).square()
    else:
        targets = targets.clamp(max=1.0)
        p = 1 / (1 + torch.exp(-outputs))
        losses = -(targets * p.log() + (1 - targets) * (1 - p).log())
    return (weights * losses).sum() / weights.sum()
