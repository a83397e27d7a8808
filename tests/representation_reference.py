"""Losses of representations, example by example and pair by pair in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cosine(
    vectors: Tensor, embeddings: Tensor, weights: Sequence[float], rows: list[int]
) -> Tensor:
    """Return the sum of w (1 - cos) over the rows present, before division by the count."""
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        lengths = vectors[i].square().sum().sqrt() * embeddings[i].square().sum().sqrt()
        total = total + weights[i] * (1 - (vectors[i] * embeddings[i]).sum() / lengths)
    return total


def squared(
    vectors: Tensor, embeddings: Tensor, weights: Sequence[float], rows: list[int]
) -> Tensor:
    """As :func:`cosine`, of the mean squared difference."""
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        errors = [(x - e) ** 2 for x, e in zip(vectors[i], embeddings[i], strict=True)]
        total = total + weights[i] * sum(errors) / len(errors)
    return total


def divergence(
    vectors: Tensor,
    embeddings: Tensor,
    weights: Sequence[float],
    rows: list[int],
    ids: Sequence[int],
    log_q: Sequence[float],
    tau: float,
    teacher_tau: float,
) -> Tensor:
    """As :func:`cosine`, of the divergence of each query's distributions over its candidates."""
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        candidates = _candidates(i, rows, ids)
        p = _distribution(vectors, i, candidates, log_q, tau)
        q = _distribution(embeddings, i, candidates, log_q, teacher_tau)
        terms = [b * torch.log(b / a) for a, b in zip(p, q, strict=True)]
        total = total + weights[i] * sum(terms)
    return total


def positives(
    vectors: Tensor,
    logits: Tensor,
    weights: Sequence[float],
    rows: list[int],
    ids: Sequence[int],
    log_q: Sequence[float],
    tau: float,
) -> Tensor:
    """As :func:`cosine`, of the own items' negative log likelihoods times the probability."""
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        candidates = _candidates(i, rows, ids)
        share = _distribution(vectors, i, candidates, log_q, tau)[candidates.index(i)]
        total = total - weights[i] / (1 + torch.exp(-logits[i])) * torch.log(share)
    return total


def _candidates(query: int, rows: list[int], ids: Sequence[int]) -> list[int]:
    return [j for j in rows if j == query or ids[j] != ids[query]]


def _distribution(
    vectors: Tensor, query: int, candidates: list[int], log_q: Sequence[float], tau: float
) -> list[Tensor]:
    half = vectors.shape[1] // 2
    scores = [
        torch.exp((vectors[query, :half] * vectors[j, half:]).sum() / tau - log_q[j])
        for j in candidates
    ]
    return [score / sum(scores) for score in scores]
