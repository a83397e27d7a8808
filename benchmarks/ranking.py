"""AUC and NDCG@5 within groups, and the table of what terms over groups bring.

A group is what a reader had in view at once, or what was promoted to a household at once. Letters
in shapes: B examples, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from quality_report import RECIPE, Result, changes, kinds_of, pick

from torchrec_exfm.study.figures import Array, p_value
from torchrec_exfm.study.report import markdown, mean_cell

CUTOFF = 5  # of NDCG
HEAD = """
## 6. Ranking within groups

Groups are lists that exist in the data. On the promotions a group is what was promoted to a
household on one trip to a store, in one department. On EB-NeRD it is the articles in view on a
page; a click counts in features of later pages once its page was left. AUC and NDCG@5 are means
over the groups that have both labels.

Terms are added to the recipe, each with a head of its own. The weights are 1 (pairwise) and 0.1
(listwise, representation). The representation term has a linear head and a cosine loss. It learns
the teacher's last hidden layer along 12 principal directions, of the time before week 14 (day 4).
Terms were chosen by single runs on the time from there to the evaluation; they are not kept here.
"""


def group_figures(logits: Array, labels: Array, groups: Array) -> dict[str, float]:
    """Return AUC and NDCG@5 within groups, means over the groups that have both labels.

    NDCG is that of Järvelin and Kekäläinen, DCG = Σ y / log2(1 + rank) over the first `CUTOFF`
    ranks, over that of the best order. Ties count half in AUC; in NDCG examples that are tied share
    the discounts of their ranks, which is the mean over their orders.

    Args:
        logits: (B,), the larger the higher up.
        labels: 0 or 1, (B,).
        groups: ids, (B,), in any order.

    Returns:
        "group_auc", "ndcg" (NaN without such a group) and "groups", the number of these.
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
    """Count, for each sorted example, those before its ties and those through them, (B,)."""
    new = np.ones(len(logits), bool)
    new[1:] = (logits[1:] != logits[:-1]) | (group[1:] != group[:-1])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(logits))
    block = np.cumsum(new) - 1
    return starts[block], ends[block]


def table(results: Sequence[Result], arms: Sequence[str]) -> Iterator[str]:
    """Yield table 6: what terms over groups add to the recipe."""
    yield HEAD
    tested = []
    for source, student in kinds_of(results):
        kind = {"source": source, "student": student}
        measured = [r for r in results if "group_auc" in r]
        by_figure = {
            figure: {arm: changes(measured, auc=figure, arm=arm, **kind) for arm in (RECIPE, *arms)}
            for figure in ("group_auc", "ndcg")
        }
        recipe = by_figure["group_auc"][RECIPE]
        if recipe is None or not any(by_figure["group_auc"][arm] for arm in arms):
            continue
        none = pick(measured, arm="none", **kind)
        level = [np.mean([r[figure] for r in none]) for figure in ("group_auc", "ndcg")]
        groups = {r["vertical"]: r["groups"] for r in none}
        yield (
            f"\n{source}, {student} student. Without a teacher: AUC within groups {level[0]:.4f}, "
            f"NDCG@{CUTOFF} {level[1]:.4f}. Groups with both labels: "
            f"{'; '.join(f'{part}: {groups[part]:,}' for part in recipe.parts)}. "
            f"The recipe: AUC within groups {mean_cell(recipe.auc)}. Less the recipe:\n\n"
        )
        rows = []
        for arm in arms:
            auc, ndcg = (by_figure[figure][arm] for figure in ("group_auc", "ndcg"))
            plain = by_figure["ndcg"][RECIPE]
            if auc is None or ndcg is None or plain is None:
                continue
            tested.append(auc.less(recipe, "auc"))
            ratio = auc.calibration.mean() / np.mean([r["calibration"] for r in none])
            differences = (auc.less(recipe), tested[-1], ndcg.less(plain, "auc"))
            rows.append([arm, *map(mean_cell, differences), f"{ratio:.3f}"])
        head = ["arm", "NE", "AUC within groups", f"NDCG@{CUTOFF}", "calibration over none's"]
        yield markdown(head, rows)
    above = [gain.mean() > 0 for gain in tested if p_value(gain.mean(1)) < 0.05]
    yield (
        f"\nOf these {len(tested)} differences of AUC within groups {sum(above)} are above 0 and "
        f"{len(above) - sum(above)} below with p < 0.05, without a correction for their number. By "
        f"chance alone about {0.05 * len(tested):.1f} would be, of both signs together.\n"
    )
