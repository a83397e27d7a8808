"""Ranking within groups: AUC and NDCG@5 of lists that exist, and the table of what terms bring.

A group is what a reader had in view, or a household was promoted, at once. Letters in shapes:
B examples, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CUTOFF = 5  # of NDCG


def group_figures(logits: Array, labels: Array, groups: Array) -> dict[str, float]:
    """AUC and NDCG@5 within groups, means over those with both labels, and how many these are.

    NDCG is that of Järvelin and Kekäläinen, DCG = Σ y / log2(1 + rank) over the first `CUTOFF`
    ranks, over that of the best order. Ties count half in AUC; in NDCG examples that are tied share
    the discounts of their ranks, which is the mean over their orders.

    Args:
        logits: (B,), the larger the higher up.
        labels: 0 or 1, (B,).
        groups: ids, (B,), in any order.

    Returns:
        "group_auc", "ndcg" (NaN without such a group) and "groups".
    """
    _, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((-logits, group))
    group, positive = group[order], labels[order] == 1
    sizes, positives = np.bincount(group), np.bincount(group, positive)
    begin = np.cumsum(sizes) - sizes
    above, through = (places - begin[group] for places in _ties(logits[order], group))
    discounts = np.zeros(1 + sizes.max(initial=0))
    ranks = np.arange(1, min(CUTOFF, len(discounts) - 1) + 1)
    discounts[ranks] = 1 / np.log2(1 + ranks)
    gained = np.cumsum(discounts)
    gain = positive * (gained[through] - gained[above]) / (through - above)
    ideal = gained[positives.astype(int)]
    # The mean rank of the positives from below, less the least it can be
    lower = positive * (sizes[group] - (above + through + 1) / 2)
    wins = np.bincount(group, lower) - positives * (positives - 1) / 2
    both = (positives > 0) & (positives < sizes)
    pairs, n = (positives * (sizes - positives))[both], int(both.sum())
    auc = wins[both] / pairs
    ndcg = np.bincount(group, gain)[both] / ideal[both]
    means = (float(values.mean()) if n else float("nan") for values in (auc, ndcg))
    return dict(zip(("group_auc", "ndcg"), means, strict=True)) | {"groups": n}


def _ties(logits: Array, group: Array) -> tuple[Array, Array]:
    """For each sorted example: how many are before those equal to it, and through them, (B,)."""
    new = np.ones(len(logits), bool)
    new[1:] = (logits[1:] != logits[:-1]) | (group[1:] != group[:-1])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(logits))
    block = np.cumsum(new) - 1
    return starts[block], ends[block]
