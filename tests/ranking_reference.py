"""Ranking losses in float64, pair by pair and example by example: no sorting, no masks."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


def pairwise(
    outputs: Tensor,
    values: Tensor,
    weights: Tensor,
    present: Tensor,
    groups: Tensor,
    *,
    regression: bool = False,
    max_neighbours: int = 16,
) -> Tensor:
    """Return the sum over the groups of one task, before division by the count; inputs are (B,)."""
    targets = values if regression else 1 / (1 + torch.exp(-values))

    def group_loss(examples: list[int]) -> Tensor:
        total, pairs = torch.zeros((), dtype=torch.float64), 0.0
        for at, i in enumerate(examples):
            for j in examples[at + 1 : at + 1 + max_neighbours]:
                if not (present[i] and present[j]) or targets[i] == targets[j]:
                    continue
                better, worse = (i, j) if targets[i] > targets[j] else (j, i)
                loss = torch.log(1 + torch.exp(outputs[worse] - outputs[better]))
                pair = float(weights[i] * weights[j])
                total = total + pair * (targets[better] - targets[worse]) * loss
                pairs += pair
        mass = sum(float(weights[i]) for i in examples if present[i])
        return mass * total / pairs if pairs else total

    return _sum_over_groups(group_loss, groups)


def listwise(
    outputs: Tensor,
    values: Tensor,
    weights: Tensor,
    present: Tensor,
    groups: Tensor,
    *,
    regression: bool = False,
    calibrated: bool = False,
) -> Tensor:
    """As :func:`pairwise`, for lists; a regression's predictions are used as logits."""
    assert not (regression and calibrated)

    def group_loss(examples: list[int]) -> Tensor:
        members = [i for i in examples if present[i]]
        if not members:
            return torch.zeros((), dtype=torch.float64)
        parts = []
        for logits in (values, outputs):
            f = [1 / (1 + torch.exp(-z)) if calibrated else torch.exp(z) for z in logits[members]]
            f = [weights[i] * mass for i, mass in zip(members, f, strict=True)]
            parts.append([mass / sum(f) for mass in f])
        loss = -sum(q * torch.log(p) for q, p in zip(*parts, strict=True))
        return sum(float(weights[i]) for i in members) * loss

    return _sum_over_groups(group_loss, groups)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "pairwise": pairwise,
    "listwise": listwise,
    "calibrated": functools.partial(listwise, calibrated=True),
}


def _sum_over_groups(group_loss: Callable[[list[int]], Tensor], groups: Tensor) -> Tensor:
    examples = defaultdict(list)
    for i, group in enumerate(groups.tolist()):
        examples[group].append(i)
    return sum((group_loss(members) for members in examples.values()), torch.zeros(()).double())
