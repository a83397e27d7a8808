"""Losses over in-batch candidates, for retrieval students: two towers, whose score is u . v.

Shapes: B examples (a query and an item), U tasks of a term, D width of both towers together. u and
v are a query's and an item's vector, a and b the teacher's, w is an example's weight.

The candidates of a query are the present items of its batch on this rank. Other examples of the
query's own item are left out. log q is the logarithm of how often an item is sampled (its expected
number in a batch, up to a constant); it keeps popular items from counting more. Time is O(B^2 U),
memory O(B U): the (B, B) scores are computed in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_exfm.losses.contract import Loss, LossInputs, check_temperature

SCORES = 2**22  # per block and task
NO_CANDIDATE = -1e30  # instead of -inf, which would be NaN for a query without candidates


def in_batch_softmax(*, tau: float = 1.0, teacher_tau: float = 1.0) -> Loss:
    """Return the Kullback-Leibler divergence between each query's distributions over the batch.

    .. math:: \\frac{1}{C} \\sum_i w_i \\sum_j q_{ij} \\log \\frac{q_{ij}}{p_{ij}}, \\quad
        p_{ij} \\propto \\frac{e^{u_i \\cdot v_j / τ}}{Q_j}, \\quad
        q_{ij} \\propto \\frac{e^{a_i \\cdot b_j / τ_T}}{Q_j}

    The sums are over the candidates j of query i. C is the sum of the weights of examples with an
    embedding (``count``). log Q is the log q of ``candidates``, or 0. The teacher's embedding of an
    example is [a, b], the query's half first, so that the teacher's score of any pair is a product.
    The loss is 0 if u_i . v_j / τ = a_i . b_j / τ_T + c_i, for any c_i of the query.

    Args:
        tau: τ > 0, finite, the student's temperature: that of its own loss.
        teacher_tau: τ_T > 0, finite, the teacher's; the larger, the flatter the targets.

    Raises:
        ValueError: for another temperature; in forward, for embeddings of an odd width.
    """
    taus = check_temperature("tau", tau), check_temperature("teacher_tau", teacher_tau)
    return Loss(partial(_divergence, *taus), needs_candidates=True, embeddings=True, width=0)


def in_batch_positives(*, tau: float = 1.0) -> Loss:
    """Return the sampled softmax of each query's own item, weighted by the teacher's probability.

    .. math:: -\\frac{1}{C} \\sum_i w_i σ(t_i) \\log p_{ii}, \\quad
        p_{ij} \\propto \\frac{e^{u_i \\cdot v_j / τ}}{Q_j}

    t is the teacher's logit of the pair, C the sum of the weights of examples with one (``count``).
    For teachers that score pairs and have no embeddings of query and item. A pair counts by the
    teacher's probability that it is positive, so a weak or wrong one hardly counts. For binary
    tasks only.

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
    values = _present(inputs.values.to(inputs.outputs.dtype), inputs.absent)
    return _mean(tau, inputs, None, partial(_log_softmax, values, teacher_tau))


def _positives(tau: float, inputs: LossInputs) -> Tensor:
    return _mean(tau, inputs, inputs.values.sigmoid(), _log_one_hot)


def _mean(tau: float, inputs: LossInputs, mass: Tensor | None, log_targets: Any) -> Tensor:
    """Return the mean of the queries' divergences, (U,), each times its mass, (B, U)."""
    share = inputs.count.reciprocal().expand(inputs.absent.shape)
    for factor in (inputs.weights, mass):
        share = share if factor is None else share * factor
    share = share.masked_fill(inputs.absent, 0.0).to(inputs.outputs.dtype)
    vectors = _present(inputs.outputs, inputs.absent)
    # Autocast would compute the scores in half precision, too coarse for a softmax over a batch.
    with torch.autocast(vectors.device.type, enabled=False):
        losses: Tensor = _Divergence.apply(vectors, tau, share, inputs, log_targets)  # type: ignore[no-untyped-call]
    return losses


class _Divergence(torch.autograd.Function):
    """The sum of share times divergence.

    Its gradient, share times (p - q), is computed in forward, block by block: backward then needs
    no scores, and the scores of only one block are in memory at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        tau: float,
        share: Tensor,
        inputs: LossInputs,
        log_targets: Callable[[_Block], Tensor],
    ) -> Tensor:
        """Return the losses, (U,), of vectors, (B, U, D), and shares, (B, U)."""
        losses, slopes = vectors.new_zeros(vectors.shape[1]), torch.zeros_like(vectors)
        queries, items = vectors.transpose(0, 1).chunk(2, dim=-1)
        query_slopes, item_slopes = slopes.transpose(0, 1).chunk(2, dim=-1)  # views, filled below
        share = share.t().unsqueeze(-1)  # (U, B, 1)
        for block in _blocks(inputs):
            rows = block.rows
            log_p, log_q = _log_softmax(vectors, tau, block), log_targets(block)
            log_ratio = log_q - log_p
            q = log_q.exp_()
            losses += (log_ratio.mul_(q).sum(-1, keepdim=True) * share[:, rows]).sum((1, 2))
            slope, scale = log_p.exp_().sub_(q), share[:, rows] / tau
            query_slopes[:, rows] = scale * (slope @ items)
            item_slopes += slope.transpose(1, 2) @ (scale * queries[:, rows])
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the vectors; the other arguments have none."""
        (slopes,) = ctx.saved_tensors
        return gradients[0].unsqueeze(-1) * slopes, None, None, None, None


def _present(vectors: Tensor, absent: Tensor) -> Tensor:
    """Set absent vectors to 0: a NaN, as a candidate of others, would make every gradient NaN."""
    return vectors.masked_fill(absent.unsqueeze(-1), 0.0)


class _Block(NamedTuple):
    """A block of n queries, and the masks and offsets that both distributions share."""

    rows: Tensor  # (n,), the queries' positions in the batch
    same: Tensor  # (n, B), which candidates are other examples of the query's own item
    bias: Tensor  # (U, 1, B), -log q, and NO_CANDIDATE for absent examples


def _blocks(inputs: LossInputs) -> Iterator[_Block]:
    assert inputs.candidates is not None
    ids, log_q = inputs.candidates
    bias = torch.where(inputs.absent.t(), NO_CANDIDATE, 0.0).to(inputs.outputs.dtype)
    bias = (bias if log_q is None else bias - log_q.to(bias.dtype)).unsqueeze(1)
    size = max(1, SCORES // max(1, len(ids)))
    for rows in torch.arange(len(ids), device=ids.device).split(size):
        same = (ids[rows].unsqueeze(1) == ids).scatter_(1, rows.unsqueeze(1), False)
        yield _Block(rows, same, bias)


def _log_softmax(vectors: Tensor, tau: float, block: _Block) -> Tensor:
    """Return the log-softmax over the candidates of n queries, (U, n, B), of vectors, (B, U, D)."""
    queries, items = vectors.transpose(0, 1).chunk(2, dim=-1)
    scores = torch.baddbmm(block.bias, queries[:, block.rows] / tau, items.transpose(1, 2))
    return scores.masked_fill_(block.same, NO_CANDIDATE).log_softmax(-1)


def _log_one_hot(block: _Block) -> Tensor:
    """Return the log-distribution that is 1 at each query's own item, (1, n, B)."""
    log_q = block.bias.new_full((1, *block.same.shape), NO_CANDIDATE)
    return log_q.scatter_(2, block.rows.reshape(1, -1, 1), 0.0)
