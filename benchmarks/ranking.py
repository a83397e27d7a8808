"""Ranking within groups: AUC and NDCG@5 of lists that exist, and the table of what terms bring.

A group is what a reader had in view, or a household was promoted, at once. Letters in shapes:
B examples, G groups.
"""

from __future__ import annotations

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
`quality.py --tune` at batches of 256.
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
        yield f"**Not through: {len(results)} of {ranked['planned']} runs.**\n\n"
    kinds = dict.fromkeys((r["source"], r["student"]) for r in results)
    yield from _verdicts(results, recipe, list(kinds))
    for source, student in kinds:
        yield from _table(
            [r for r in results if (r["source"], r["student"]) == (source, student)], recipe
        )
    yield f"\n{report.machine(ranked['environment'])}\n"


def _table(results: Sequence[Result], recipe: str) -> Iterator[str]:
    """Of one stream and student: each arm against none, and what a term adds to the recipe."""
    found = {arm: changes(results, arm) for arm in dict.fromkeys(r["arm"] for r in results)}
    whole = {arm: change for arm, change in found.items() if change is not None}
    none = [r for r in results if r["arm"] == "none"]
    if not none or "teacher" not in whole:
        return
    means = (np.mean([r[figure] for r in none]) for figure in (*FIGURES, "calibration"))
    told = ", ".join(
        f"{name} {mean:.4f}" for name, mean in zip((*TITLES, "calibration"), means, strict=True)
    )
    groups = {r["vertical"]: r["groups"] for r in none}
    teacher = ", ".join(
        f"{title} {whole['teacher'][figure].mean():+.2f} %"
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
        for arm, c in whole.items()
        if arm not in ("none", "teacher")
    ]
    yield markdown(["arm", *TITLES, "calibration over none's"], rows)
    rows = [
        [arm, *(mean_cell(whole[arm][f] - whole[recipe][f]) for f in FIGURES)]
        for arm in whole
        if recipe in whole and arm.startswith("recipe + ")
    ]
    yield "\nLess the recipe, paired by seed:\n\n"
    yield markdown(["arm", *TITLES], rows)


def changes(results: Sequence[Result], arm: str) -> dict[str, Array] | None:
    """An arm against none, by figure, each (seeds, verticals): in per cent, and the calibration's
    quotient. None if no seed is whole."""
    by = {(r["arm"], r["seed"], r["vertical"]): r for r in results}
    verticals = list(dict.fromkeys(r["vertical"] for r in results))
    cells = [
        [(by.get((arm, seed, name)), by.get(("none", seed, name))) for name in verticals]
        for seed in sorted({r["seed"] for r in results})
    ]
    whole = [seed for seed in cells if all(mine and none for mine, none in seed)]
    if not whole:
        return None

    def quotients(figure: str) -> Array:
        return np.array([[mine[figure] / none[figure] for mine, none in seed] for seed in whole])

    percent = {figure: 100 * (quotients(figure) - 1) for figure in FIGURES}
    return percent | {"calibration": quotients("calibration")}


def _verdicts(
    results: Sequence[Result], recipe: str, kinds: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """For each term what it adds to the recipe, and whether what was aimed at is met."""
    rows, aimed = [], []
    for arm in dict.fromkeys(r["arm"] for r in results if r["arm"].startswith("recipe + ")):
        cells = []
        for kind in kinds:
            part = [r for r in results if (r["source"], r["student"]) == kind]
            mine, base = changes(part, arm), changes(part, recipe)
            if mine is None or base is None or len(mine["ne"]) != len(base["ne"]):
                continue
            gain = mine["group_auc"] - base["group_auc"]
            cells.append(mean_cell(gain))
            calibration = mine["calibration"].mean()
            if arm == AIMED and gain.mean() > 0 and p_value(gain.mean(1)) < 0.05:
                kept = abs(calibration - 1) <= 0.01
                aimed += [", ".join(kind)] if kept else []
        if len(cells) == len(kinds):
            rows.append([arm, *cells])
    yield (
        f"Aimed at: {AIMED.removeprefix('recipe + ')} raises AUC within groups over the recipe "
        "somewhere, p < 0.05, with calibration within 1 % of none's. "
        f"Met: {'; '.join(aimed) or '**nowhere**'}. AUC within groups, less the recipe:\n\n"
    )
    yield markdown(["arm", *(", ".join(kind) for kind in kinds)], rows)
