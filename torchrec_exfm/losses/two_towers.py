"""Losses over in-batch candidates, for students that retrieve: two towers, whose score is u . v.

Shapes: B examples (a query and an item), U tasks of a term, D width of both towers together. u and
v are a query's and an item's vector, a and b the teacher's, w an example's weight.

The candidates of a query are the items of its batch that are present: of those with the id of its
own item only that one. With log q, the logarithm of how often an item is sampled (the expected
number in a batch, or up to a constant), popular items count no more for coming often. Candidates
are those of a rank's batch. Time and memory are O(B^2 U).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from torchrec_exfm.functional import present_mean
from torchrec_exfm.losses.contract import Loss, LossInputs, check_temperature


def in_batch_softmax(*, tau: float = 1.0, teacher_tau: float = 1.0) -> Loss:
    """Return the Kullback-Leibler divergence between each query's distributions over the batch.

    .. math:: \\frac{1}{C} \\sum_i w_i \\sum_j q_{ij} \\log \\frac{q_{ij}}{p_{ij}}, \\quad
        p_{ij} \\propto \\frac{e^{u_i \\cdot v_j / τ}}{Q_j}, \\quad
        q_{ij} \\propto \\frac{e^{a_i \\cdot b_j / τ_T}}{Q_j}

    over the candidates j of query i. C is the sum of the weights of examples with an embedding
    (``count``), Q what ``candidates`` gives as log q, or 1. The teacher's embedding of an example
    is [a, b], the query's half first, so that a pair that was never scored costs a product alone.
    It is 0 where u_i . v_j / τ = a_i . b_j / τ_T + c_i, for any c of the query.

    Args:
        tau: τ > 0, finite, the student's temperature: that of its own loss.
        teacher_tau: τ_T > 0, finite, the teacher's; the larger, the flatter what is taught.

    Raises:
        ValueError: for another temperature; in the forward for embeddings of an odd width.
    """
    taus = check_temperature("tau", tau), check_temperature("teacher_tau", teacher_tau)
    return Loss(partial(_divergence, *taus), needs_candidates=True, embeddings=True, width=0)


def in_batch_positives(*, tau: float = 1.0) -> Loss:
    """Return the sampled softmax of each query's own item, weighted by the teacher's probability.

    .. math:: -\\frac{1}{C} \\sum_i w_i σ(t_i) \\log p_{ii}, \\quad
        p_{ij} \\propto \\frac{e^{u_i \\cdot v_j / τ}}{Q_j}

    t is the teacher's logit of the pair, C the sum of the weights of examples with one (``count``).
    For teachers that score pairs and have no embeddings of query and item: a pair counts as far as
    the teacher has it for a positive, a weak or mistaken one hardly. For binary tasks alone.

    Args:
        tau: τ > 0, finite, the student's temperature: that of its own loss.

    Raises:
        ValueError: for another temperature.
    """
    positives = partial(_positives, check_temperature("tau", tau))
    return Loss(positives, needs_candidates=True, binary_only=True, width=0)


def _divergence(tau: float, teacher_tau: float, inputs: LossInputs) -> Tensor:
    if inputs.values.shape[-1] % 2:
        raise ValueError(
            "the teacher's embeddings should be of an even width, the query's half and the item's; "
            f"received {inputs.values.shape[-1]}"
        )
    log_p = _log_softmax(inputs.outputs, tau, inputs)
    log_q = _log_softmax(inputs.values.to(log_p.dtype), teacher_tau, inputs)
    losses = (log_q.exp() * (log_q - log_p)).sum(-1).t()
    return present_mean(losses, inputs.absent, inputs.count, inputs.weights)


def _positives(tau: float, inputs: LossInputs) -> Tensor:
    log_p = _log_softmax(inputs.outputs, tau, inputs).diagonal(dim1=1, dim2=2).t()
    losses = -inputs.values.sigmoid() * log_p
    return present_mean(losses, inputs.absent, inputs.count, inputs.weights)


def _log_softmax(vectors: Tensor, tau: float, inputs: LossInputs) -> Tensor:
    """(B, U, D) vectors [u, v] -> (U, B, B), of each query's candidates; others have no share."""
    assert inputs.candidates is not None
    absent, (ids, log_q) = inputs.absent, inputs.candidates
    vectors = vectors.masked_fill(absent.unsqueeze(-1), 0.0)  # NaN would be NaN in every gradient
    queries, items = vectors.transpose(0, 1).chunk(2, dim=-1)
    scores = queries @ items.transpose(1, 2) / tau
    if log_q is not None:
        scores = scores - log_q.to(scores.dtype)
    same = (ids == ids.unsqueeze(1)).fill_diagonal_(False)
    # The lowest number in the place of -inf: where no candidate is left there is no NaN then
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(same | absent.t().unsqueeze(1), lowest).log_softmax(-1)
