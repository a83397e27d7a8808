"""External distillation written out by hand: one process, float64, plain modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rank_models import TAP, TASKS, TEACHERS, Columns, teacher_for
from torch import Tensor, nn

from torchrec_exfm import DistillationTerm, ExFMWrapper, StudentAdapter

LIMITS = torch.tensor([float("inf") if task.regression else 15.0 for task in TASKS])


class ByHand:
    """A wrapped student, and its adapter, trained on global batches.

    Args:
        wrapper: not sharded, with a two-task DLRM.
        adapter: or None.
        optimizer: for the student and the heads, with its options; the adapter's is SGD.
        adapter_lr: its rate.
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
        heads = zip(self.terms, wrapper.auxiliary_head.heads, strict=True)
        mlps = [nn.Identity() if term.serving else head.mlp for term, head in heads]
        self.teacher = teacher_for(self.terms)
        self.leads: list[float] = []
        columns = sum(len(term.tasks or TASKS) for term in self.terms)
        self.lost = torch.zeros(2, columns, dtype=torch.float64)
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
        """The adapter's step, then the student's."""
        batch = Columns(**(batch.columns | {"values": self.teacher(batch).values}))
        lost: list[Tensor] = []
        adapted = self._step_of_adapter(batch) if len(self.adapters) else None
        dense = batch.dense_features.double()
        self.optimizer.zero_grad()
        loss, _ = self.student(Columns(**(batch.columns | {"dense_features": dense})))
        for term, head in zip(self.terms, self.heads, strict=True):
            loss = loss + term.weight * self._loss(term, head, batch, adapted, lost)
        loss.backward()
        self.optimizer.step()
        self.lost = 0.99 * self.lost + 0.01 * torch.stack(lost, dim=1)

    def weights(self) -> dict[str, Tensor]:
        """By the names of the wrapper's state; the adapter's under ``adapter.``."""
        weights = {f"student.{key}": value for key, value in self.student.state_dict().items()}
        for k, head in enumerate(self.heads):
            prefix = f"exfm.auxiliary_head.heads.{k}.mlp"
            weights |= {f"{prefix}.{key}": value for key, value in head.state_dict().items()}
        if any(term.margin for term in self.terms):
            weights["exfm.auxiliary_head.lead_losses"] = self.lost
        state = self.adapters.state_dict()
        return weights | {f"adapter.mlps.{key}": value for key, value in state.items()}

    def _loss(
        self,
        term: DistillationTerm,
        head: nn.Module,
        batch: Columns,
        adapted: Tensor | None,
        lost: list[Tensor],
    ) -> Tensor:
        outputs = head(term.beta * self.shared + (1 - term.beta) * self.shared.detach())
        source = batch.values.double() if adapted is None or not term.adapted else adapted
        m = TEACHERS.index(term.teacher)
        names = [task.name for task in TASKS]
        losses = []
        for column, name in enumerate(term.tasks or names):
            t = names.index(name)
            if term.serving:
                outputs, column = self.serving, t
            here = batch.presence[:, m, t]
            target = source[here, m, t]
            labels = batch.labels[here, t].double()
            of_target, of_student = self.lost[:, len(lost)].tolist()
            both = (target, outputs[here, column].detach())
            means = torch.stack([_mean_loss(t, one, labels) for one in both])
            lost.append(means if here.any() else self.lost[:, len(lost)])
            if not TASKS[t].regression:
                target = target.sigmoid()
            target = term.alpha * target
            loss = _mean_loss(t, outputs[here, column], target)
            if term.margin:
                lead = 1 - of_target / of_student if of_student else 0.0
                self.leads.append(min(max(lead / term.margin, 0.0), 1.0))
                loss = self.leads[-1] * loss
            losses.append(loss)
        return sum(losses) / len(losses)

    def _step_of_adapter(self, batch: Columns) -> Tensor:
        outputs = self._adapted(batch)
        total = torch.zeros((), dtype=torch.float64)
        for m in range(len(TEACHERS)):
            for t in range(len(TASKS)):
                here = batch.presence[:, m, t]
                loss = _mean_loss(t, outputs[here, m, t], batch.labels[here, t].double())
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


def _mean_loss(task: int, outputs: Tensor, targets: Tensor) -> Tensor:
    """Over the outputs that are there; 0 for none."""
    if not len(outputs):
        return outputs.sum()
    if TASKS[task].regression:
        return (outputs - targets).square().mean()
    targets = targets.clamp(max=1.0)
    p = 1 / (1 + torch.exp(-outputs))
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
