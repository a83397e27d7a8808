"""Losses of groups, pair by pair and example by example in float64: no sorting, no masks."""

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
    """The sum over the groups of one task, to be divided by the count; all (B,), in float64."""
    targets = values if regression else 1 / (1 + torch.exp(-values))

    def of_group(examples: list[int]) -> Tensor:
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

    return _sum_over_groups(of_group, groups)


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
    """As :func:`pairwise`; predictions of a regression are taken for logits."""
    assert not (regression and calibrated)

    def of_group(examples: list[int]) -> Tensor:
        there = [i for i in examples if present[i]]
        if not there:
            return torch.zeros((), dtype=torch.float64)
        parts = []
        for logits in (values, outputs):
            f = [1 / (1 + torch.exp(-z)) if calibrated else torch.exp(z) for z in logits[there]]
            f = [weights[i] * each for i, each in zip(there, f, strict=True)]
            parts.append([each / sum(f) for each in f])
        loss = -sum(q * torch.log(p) for q, p in zip(*parts, strict=True))
        return sum(float(weights[i]) for i in there) * loss

    return _sum_over_groups(of_group, groups)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "pairwise": pairwise,
    "listwise": listwise,
    "calibrated": functools.partial(listwise, calibrated=True),
}


def _sum_over_groups(of_group: Callable[[list[int]], Tensor], groups: Tensor) -> Tensor:
    examples = defaultdict(list)
    for i, group in enumerate(groups.tolist()):
        examples[group].append(i)
    return sum((of_group(these) for these in examples.values()), torch.zeros(()).double())
