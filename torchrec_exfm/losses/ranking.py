"""Losses that compare the examples of a group: of a request, a page, a session.

Shapes: B examples, U tasks of a term, N neighbours. z is the student's logit (or prediction), t
the teacher's, w an example's weight.

Nothing asks the device for a value: groups are found by sorting their ids, and sums over them lie
in buffers of B rows, the most groups there can be.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_exfm.losses.contract import Loss, LossInputs
from torchrec_exfm.tasks import map_tasks


def pairwise(*, max_neighbours: int = 16) -> Loss:
    """Return the logistic loss of a group's pairs, weighted by how far the teacher has them apart.

    .. math:: \\frac{1}{C} \\sum_g W_g \\frac{\\sum_{ij} w_i w_j |y_i - y_j| \\,
        \\log(1 + e^{-s_{ij} (z_i - z_j)})}{\\sum_{ij} w_i w_j}, \\quad s_{ij} =
        \\mathrm{sign}(y_i - y_j)

    y is the teacher's probability σ(t) of a binary task, or its prediction, W_g the weights of the
    group's present examples, added up, and C those of all examples (``count``). Pairs that are
    equal, y_i = y_j, or have an absent example are left out; a group without a pair is 0. A weight
    of 2 equals having the example twice. The order alone is learnt: level and scale of z are free,
    and α has no meaning. Rare events differ little in y, and need a larger weight of the term.

    Groups are those of a rank's batch: keep each on one rank. Time and memory are O(B U N).

    Args:
        max_neighbours: N >= 1. Each example is paired with the N that follow it in its group, in
            the order of the batch and absent ones counted, so that larger groups than N + 1 lose
            pairs.

    Raises:
        ValueError: for another N.
    """
    if max_neighbours < 1:
        raise ValueError(f"max_neighbours should be at least 1; received {max_neighbours}")
    return Loss(partial(_pairwise, max_neighbours), needs_groups=True)


def listwise(*, calibrated: bool = False) -> Loss:
    """Return the cross entropy of each group's distributions, the teacher's and the student's.

    .. math:: -\\frac{1}{C} \\sum_g W_g \\sum_{i \\in g} q_i \\log p_i, \\quad
        q_i = \\frac{w_i f(t_i)}{\\sum_{j \\in g} w_j f(t_j)}, \\quad
        p_i = \\frac{w_i f(z_i)}{\\sum_{j \\in g} w_j f(z_j)}

    over present examples; W_g are the weights of the group's, added up, and C those of all examples
    (``count``). A group of one example is 0. A weight of 2 has the gradient of having the example
    twice. α has no meaning, as q does not change by it.

    Groups are those of a rank's batch, in any order and of any size: keep each on one rank.

    Args:
        calibrated: False: f is exp, q and p are softmaxes of the logits; they agree where
            z = t + c, for any c of the group. True: f is σ, probabilities themselves are normalised
            (CLID, arXiv 2312.08727); they agree where σ(z) = c σ(t), so that a group's
            probabilities have the teacher's ratios. For binary tasks alone.
    """
    return Loss(partial(_listwise, calibrated), needs_groups=True, binary_only=calibrated)


def _pairwise(max_neighbours: int, inputs: LossInputs) -> Tensor:
    outputs, values, mass, segment = _sort_by_group(inputs)
    targets = map_tasks(inputs.tasks, lambda task, z: z if task.regression else z.sigmoid(), values)
    following = partial(_following, max_neighbours)
    lead = targets.unsqueeze(-1) - following(targets)
    together = (segment.unsqueeze(-1) == following(segment)).unsqueeze(1)
    pair_mass = torch.where(together & (lead != 0), mass.unsqueeze(-1) * following(mass), 0.0)
    losses = -F.logsigmoid(lead.sign() * (outputs.unsqueeze(-1) - following(outputs)))
    example_losses = (pair_mass * lead.abs() * losses).sum(-1)
    group_pairs = _sum_by_segment(pair_mass.sum(-1), segment)
    # Where there is no pair, a quotient would be infinite or NaN, and NaN backward
    scale = torch.where(group_pairs > 0, _sum_by_segment(mass, segment) / group_pairs, 0.0)
    return (scale * example_losses).sum(0) / inputs.count


def _following(count: int, values: Tensor) -> Tensor:
    """(B, ...) -> (B, ..., N), the N rows below each, 0 below the last, where there is no mass."""
    padded = F.pad(values, [0, 0] * (values.dim() - 1) + [0, count])
    return padded.unfold(0, count, 1)[1:]


def _listwise(calibrated: bool, inputs: LossInputs) -> Tensor:
    outputs, values, mass, segment = _sort_by_group(inputs)
    if calibrated:
        outputs, values = F.logsigmoid(outputs), F.logsigmoid(values)
    log_q, log_p = (_log_softmax(scores + mass.log(), segment) for scores in (values, outputs))
    group_mass = _sum_by_segment(mass, segment)
    return -(group_mass * log_q.exp() * log_p).sum(0) / inputs.count


def _log_softmax(scores: Tensor, segment: Tensor) -> Tensor:
    """(B, U) scores, -inf where absent -> the logarithm of the softmax within each segment."""
    # The lowest number in the place of -inf: a segment without any example has no NaN then
    lowest = torch.finfo(scores.dtype).min
    scores = scores.clamp(min=lowest)
    index = segment.unsqueeze(1).expand_as(scores)
    peaks = torch.full_like(scores, lowest).scatter_reduce(0, index, scores.detach(), "amax")
    shifted = scores - peaks.gather(0, index)
    return shifted - _sum_by_segment(shifted.exp(), segment).log()


def _sort_by_group(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, values and weights, (B, U), 0 where absent; and groups, (B,), from 0 to B - 1."""
    assert inputs.groups is not None
    ids, order = inputs.groups.sort(stable=True)
    begins = (ids != ids.roll(1)).cumsum(0)
    outputs, absent = inputs.outputs, inputs.absent
    weights = torch.ones_like(outputs) if inputs.weights is None else inputs.weights
    columns = (outputs, inputs.values.detach().to(outputs.dtype), weights.to(outputs.dtype))
    outputs, values, mass = (c.masked_fill(absent, 0.0).index_select(0, order) for c in columns)
    return outputs, values, mass, begins - begins[:1]


def _sum_by_segment(values: Tensor, segment: Tensor) -> Tensor:
    """(B, U) -> (B, U), each example having the sum of its segment."""
    return torch.zeros_like(values).index_add(0, segment, values).index_select(0, segment)
