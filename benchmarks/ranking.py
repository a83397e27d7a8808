"""Ranking within groups: AUC and NDCG@5 of lists that exist, and the table of what terms bring.

A group is what a reader had in view, or a household was promoted, at once. Letters in shapes:
B examples, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import report
from quality_report import Array, Result, markdown, mean_cell, p_value

CUTOFF = 5  # of NDCG
FIGURES = ("ne", "auc", "group_auc", "ndcg")
TITLES = ("NE", "AUC", "AUC within groups", "NDCG@5")
AIMED = "recipe + calibrated listwise"
HEAD = """
## 7. Ranking within groups

Lists that exist: a household's trip to a store, and what was promoted to it there (of one
department), and a page of Ekstra Bladet, and the articles in view (EB-NeRD's demo; a click counts
in features of later pages once its page was left). AUC and NDCG@5 are means over the groups that
have both labels; all figures are of the serving head, in the last half (weeks 27 and later, and
days 8 to 14). "± s" and p are as above.

Terms are added to the recipe, each with a head of its own: the pairwise one with a weight of 1,
the listwise ones with 0.1, and the representation term, which has a linear head, with 0.1 (cosine;
the teacher's last hidden layer along 12 principal directions of its past before week 14, and
day 4). Chosen by single runs on the time from there to the evaluation, which are not kept here:
the lean student of both surfaces and of a department, and the strong one of article pages. Tried
were weights of 0.3 and 1 (pairwise), and of 0.1, 0.3 and 1 (listwise); of the calibrated term also
a linear head, and the serving head, where AUC within pages fell at all three weights. The others
were not tried there, and the representation term's weight was not varied. EB-NeRD's
students have the rates that were best for them without a teacher on days 4 to 7, of the grid of
`quality.py --tune` at batches of 256; its teacher has those of the other streams, and was not
tuned.
"""


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


def table(ranked: Mapping[str, Any]) -> Iterator[str]:
    """The table Ranking of the page, of what `quality.py --table ranking` keeps."""
    results, recipe = ranked["results"], ranked["recipe"]
    yield HEAD
    if len(results) < ranked["planned"]:
        yield f"\n**Not through: {len(results)} of {ranked['planned']} runs.**\n"
    kinds = {kind: _whole(results, kind) for kind in dict.fromkeys(map(_kind, results))}
    kinds = {
        kind: part
        for kind, part in kinds.items()
        if {"none", "teacher", recipe} <= {r["arm"] for r in part}
    }
    if not kinds:
        return
    yield from _verdicts(kinds, recipe)
    for part in kinds.values():
        yield from _table(part, recipe)
    yield f"\n{report.machine(ranked['environment'])}\n"


def _kind(result: Result) -> str:
    return f"{result['source']}, {result['student']}"


def _whole(results: Sequence[Result], kind: str) -> list[Result]:
    """Of a stream and student, the seeds that have all arms in all verticals, to be paired."""
    part = [r for r in results if _kind(r) == kind]
    runs = Counter(r["seed"] for r in part)
    needed = len({(r["arm"], r["vertical"]) for r in part})
    return [r for r in part if runs[r["seed"]] == needed]


def _table(results: Sequence[Result], recipe: str) -> Iterator[str]:
    """Of one stream and student: each arm against none, and what a term adds to the recipe."""
    found = {arm: changes(results, arm) for arm in dict.fromkeys(r["arm"] for r in results)}
    none = [r for r in results if r["arm"] == "none"]
    means = (np.mean([r[figure] for r in none]) for figure in (*FIGURES, "calibration"))
    told = ", ".join(
        f"{name} {mean:.4f}" for name, mean in zip((*TITLES, "calibration"), means, strict=True)
    )
    groups = {r["vertical"]: r["groups"] for r in none}
    teacher = ", ".join(
        f"{title} {found['teacher'][figure].mean():+.2f} %"
        for title, figure in zip(TITLES, FIGURES, strict=True)
    )
    yield (
        f"\n### {none[0]['source']}, {none[0]['student']} student\n\nWithout a teacher: {told}; "
        f"means over {', '.join(groups)} and {len({r['seed'] for r in none})} seeds, with "
        f"{' and '.join(f'{count:,}' for count in groups.values())} groups of both labels. The "
        f"teacher itself: {teacher}.\n\n"
    )
    rows = [
        [arm, *(mean_cell(c[figure]) for figure in FIGURES), f"{c['calibration'].mean():.3f}"]
        for arm, c in found.items()
        if arm not in ("none", "teacher")
    ]
    yield markdown(["arm", *TITLES, "calibration over none's"], rows)
    rows = [
        [arm, *(mean_cell(found[arm][f] - found[recipe][f]) for f in FIGURES)]
        for arm in found
        if arm.startswith("recipe + ")
    ]
    yield "\nLess the recipe, paired by seed:\n\n"
    yield markdown(["arm", *TITLES], rows)


def changes(results: Sequence[Result], arm: str) -> dict[str, Array]:
    """An arm against none, by figure, (seeds, verticals): in per cent; of calibration the ratio."""
    by = {(r["arm"], r["seed"], r["vertical"]): r for r in results}
    seeds = list(dict.fromkeys(r["seed"] for r in results))
    verticals = list(dict.fromkeys(r["vertical"] for r in results))

    def ratios(figure: str) -> Array:
        mine, none = (
            np.array([[by[of, seed, name][figure] for name in verticals] for seed in seeds])
            for of in (arm, "none")
        )
        return mine / none

    percent = {figure: 100 * (ratios(figure) - 1) for figure in FIGURES}
    return percent | {"calibration": ratios("calibration")}


def _verdicts(kinds: Mapping[str, Sequence[Result]], recipe: str) -> Iterator[str]:
    """For each term what it adds to the recipe, and whether what was aimed at is met."""
    found = {
        kind: {arm: changes(part, arm) for arm in dict.fromkeys(r["arm"] for r in part)}
        for kind, part in kinds.items()
    }
    gains = {
        kind: {
            arm: change["group_auc"] - arms[recipe]["group_auc"]
            for arm, change in arms.items()
            if arm.startswith("recipe + ")
        }
        for kind, arms in found.items()
    }
    tested = [gain for by_arm in gains.values() for gain in by_arm.values()]
    sure = [gain.mean() > 0 for gain in tested if p_value(gain.mean(1)) < 0.05]
    met = [
        kind
        for kind, by_arm in gains.items()
        if AIMED in by_arm
        and by_arm[AIMED].mean() > 0
        and p_value(by_arm[AIMED].mean(1)) < 0.05
        and abs(found[kind][AIMED]["calibration"].mean() - 1) <= 0.01
    ]
    yield (
        f"\nAimed at: {AIMED.removeprefix('recipe + ')} raises AUC within groups over the recipe "
        "for a stream and student, p < 0.05, with calibration within 1 % of none's. Met: "
        f"{'; '.join(met) or '**nowhere**'}. AUC within groups, less the recipe:\n\n"
    )
    arms = dict.fromkeys(arm for by_arm in gains.values() for arm in by_arm)
    yield markdown(
        ["arm", *gains],
        [[arm, *(mean_cell(by_arm[arm]) for by_arm in gains.values())] for arm in arms],
    )
    yield (
        f"\nOf these {len(tested)} differences {sum(sure)} are above 0 and "
        f"{len(sure) - sum(sure)} below with p < 0.05, without a correction for their number: by "
        f"chance alone about {0.05 * len(tested):.1f} would be, of both signs together.\n"
    )
