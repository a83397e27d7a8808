"""Losses that compare the examples of a group: a request, a page, a session.

Shapes: B examples, U tasks of a term, N neighbours. z is the student's logit (or prediction), t
the teacher's, w an example's weight.

Nothing here synchronizes the device: ids are sorted to form groups, and sums over groups lie in
buffers of B rows, the largest possible number of groups.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrec_exfm.losses.contract import Loss, LossInputs
from torchrec_exfm.tasks import map_tasks


def pairwise(*, max_neighbours: int = 16) -> Loss:
    """Return the logistic loss of a group's pairs, weighted by the teacher's difference.

    .. math:: \\frac{1}{C} \\sum_g W_g \\frac{\\sum_{ij} w_i w_j |y_i - y_j| \\,
        \\log(1 + e^{-s_{ij} (z_i - z_j)})}{\\sum_{ij} w_i w_j}, \\quad s_{ij} =
        \\mathrm{sign}(y_i - y_j)

    y is the teacher's probability σ(t) of a binary task, or its prediction of a regression. W_g is
    the sum of the weights of the group's present examples, C that of all examples (``count``).
    Pairs with y_i = y_j or an absent example are left out; a group without pairs adds 0. A weight
    of 2 equals having the example twice. Only the order is learned: level and scale of z are free,
    and α has no effect. Rare events differ little in y and need a larger weight of the term.

    Each rank forms its own groups: keep a group on one rank. Time and memory are O(B U N).

    Args:
        max_neighbours: N >= 1. Each example is paired with the N that follow it in its group, in
            the order of the batch, including absent ones. Groups larger than N + 1 lose pairs.

    Raises:
        ValueError: for another N.
    """
    if max_neighbours < 1:
        raise ValueError(f"max_neighbours should be at least 1; received {max_neighbours}")
    return Loss(partial(_pairwise, max_neighbours), needs_groups=True)


def listwise(*, calibrated: bool = False) -> Loss:
    """Return the cross entropy between the teacher's and the student's distribution in each group.

    .. math:: -\\frac{1}{C} \\sum_g W_g \\sum_{i \\in g} q_i \\log p_i, \\quad
        q_i = \\frac{w_i f(t_i)}{\\sum_{j \\in g} w_j f(t_j)}, \\quad
        p_i = \\frac{w_i f(z_i)}{\\sum_{j \\in g} w_j f(z_j)}

    All sums are over present examples. W_g is the sum of the group's weights, C that of all
    examples (``count``). A group of one example adds 0. A weight of 2 has the gradient of having
    the example twice. α has no effect, as it cancels in q.

    Groups may be of any order and size. Each rank forms its own: keep a group on one rank.

    Args:
        calibrated: False: f is exp; q and p are softmaxes of the logits, equal if z = t + c for any
            c of the group. True: f is σ; the probabilities themselves are normalized (CLID, arXiv
            2312.08727), equal if σ(z) = c σ(t), so that a group's probabilities have the teacher's
            ratios. For binary tasks only.
    """
    return Loss(partial(_listwise, calibrated), needs_groups=True, binary_only=calibrated)


def _pairwise(max_neighbours: int, inputs: LossInputs) -> Tensor:
    outputs, values, mass, segment = _sort_by_group(inputs)
    targets = map_tasks(inputs.tasks, lambda task, z: z if task.regression else z.sigmoid(), values)
    following = partial(_following, max_neighbours)
    difference = targets.unsqueeze(-1) - following(targets)
    together = (segment.unsqueeze(-1) == following(segment)).unsqueeze(1)
    is_pair = together & (difference != 0)
    pair_mass = torch.where(is_pair, mass.unsqueeze(-1) * following(mass), 0.0)
    losses = -F.logsigmoid(difference.sign() * (outputs.unsqueeze(-1) - following(outputs)))
    example_losses = (pair_mass * difference.abs() * losses).sum(-1)
    group_pairs = _sum_by_segment(pair_mass.sum(-1), segment)
    # Without pairs the quotient is infinite or NaN: masked here, so that backward is not NaN.
    scale = torch.where(group_pairs > 0, _sum_by_segment(mass, segment) / group_pairs, 0.0)
    return (scale * example_losses).sum(0) / inputs.count


def _following(count: int, values: Tensor) -> Tensor:
    """Return the N rows after each row, 0 after the last: (B, ...) -> (B, ..., N)."""
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
    """Return the log-softmax within each segment of scores, (B, U), that are -inf where absent."""
    # The lowest number instead of -inf, as a segment of absent examples would become NaN.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.clamp(min=lowest)
    index = segment.unsqueeze(1).expand_as(scores)
    peaks = torch.full_like(scores, lowest).scatter_reduce(0, index, scores.detach(), "amax")
    shifted = scores - peaks.gather(0, index)
    return shifted - _sum_by_segment(shifted.exp(), segment).log()


def _sort_by_group(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return outputs, values, weights, (B, U), 0 where absent, and segments, (B,), 0 to B - 1."""
    assert inputs.groups is not None
    ids, order = inputs.groups.sort(stable=True)
    begins = (ids != ids.roll(1)).cumsum(0)
    outputs, absent = inputs.outputs, inputs.absent
    weights = torch.ones_like(outputs) if inputs.weights is None else inputs.weights
    columns = (outputs, inputs.values.detach().to(outputs.dtype), weights.to(outputs.dtype))
    outputs, values, mass = (c.masked_fill(absent, 0.0).index_select(0, order) for c in columns)
    return outputs, values, mass, begins - begins[:1]


def _sum_by_segment(values: Tensor, segment: Tensor) -> Tensor:
    """Return the sum of its segment for each example, (B, U) -> (B, U)."""
    return torch.zeros_like(values).index_add(0, segment, values).index_select(0, segment)
