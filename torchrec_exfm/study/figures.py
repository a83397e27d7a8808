"""Figures of logits and labels, and tests of an arm's changes, with numpy and SciPy alone.

Letters in shapes: B examples, S seeds, V parts (verticals, or the tasks of a student).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Changes", "compare_arms", "figures", "generation_ratio", "losses", "p_value"]

Array = npt.NDArray[Any]
Result = Mapping[str, Any]


def figures(logits: Array, labels: Array) -> dict[str, float]:
    """Return NE, AUC and calibration of a student's predictions.

    With p = σ(z), the log-loss l and the base rate r = mean(y):

        ne = mean l(p, y) / l(r, r),    calibration = mean p / r,

    and auc is the share of pairs of a positive and a negative in the right order; ties count half.

    Args:
        logits: z, (B,).
        labels: y in [0, 1], (B,).

    Returns:
        "rows", "ne", "auc" and "calibration"; NaN where one is undefined.
    """
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    rate = y.mean() if len(y) else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
        return {
            "rows": len(y),
            "ne": float(np.mean(losses(z, y)) / entropy) if len(y) else np.nan,
            "auc": _auc(z, y > 0.5),
            "calibration": float(np.mean(1 / (1 + np.exp(-z))) / rate) if len(y) else np.nan,
        }


def losses(logits: Array, labels: Array) -> Array:
    """Return the log-loss of each example, (B,)."""
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    with np.errstate(invalid="ignore"):  # the infinite logits of a student that diverged
        return np.logaddexp(0, z) - y * z


def _auc(z: Array, positive: Array) -> float:
    """Return the AUC by the ranks of the positives (Mann-Whitney), where ties share their mean."""
    _, index, counts = np.unique(z, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]
    n = int(positive.sum())
    pairs = n * (len(z) - n)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / pairs) if pairs else np.nan


class Changes(NamedTuple):
    """An arm's changes against the student alone, in per cent.

    Attributes:
        ne, auc: (S, V).
        seeds, parts: those of the rows and columns, in ascending order.
        calibration: (S, V), the arm's own, not a change.
    """

    ne: Array
    auc: Array
    seeds: list[int]
    parts: list[str]
    calibration: Array

    def common(self, other: Changes, figure: str) -> Array:
        """Return a figure for the seeds and parts that the other has as well."""
        rows = [row for row, seed in enumerate(self.seeds) if seed in other.seeds]
        columns = [column for column, part in enumerate(self.parts) if part in other.parts]
        return np.asarray(getattr(self, figure))[np.ix_(rows, columns)]

    def less(self, other: Changes, figure: str = "ne") -> Array:
        """Return the difference of a figure over the seeds and parts that both have."""
        return self.common(other, figure) - other.common(self, figure)

    def worse(self) -> list[str]:
        """Return the parts where NE is significantly higher: p < 0.05 over seeds, uncorrected."""
        columns = zip(self.parts, self.ne.T, strict=True)
        return [part for part, ne in columns if ne.mean() > 0 and p_value(ne) < 0.05]

    def eta(self, teacher: Changes) -> float:
        """Return η, the share of the teacher's lead in NE that the student gains.

        η = (NE_none - NE_arm) / (NE_none - NE_teacher), of means over seeds and parts, each NE in
        per cent of none's (Rec-Distill, arXiv 2605.29755).
        """
        return float(self.common(teacher, "ne").mean() / teacher.common(self, "ne").mean())


def generation_ratio(new: Changes, old: Changes, teacher: Changes, older: Changes) -> float:
    """Return the students' gain from a newer teacher, over the gain of that teacher itself.

    (NE_arm,old - NE_arm,new) / (NE_older - NE_teacher): it can be high where η is low.
    """
    return float(new.less(old).mean() / teacher.less(older).mean())


def compare_arms(
    arm: Iterable[Result], none: Iterable[Result], figures: Sequence[str] = ("ne", "auc")
) -> Changes | None:
    """Compare an arm with the student alone, over the seeds for which both have all its parts.

    Args:
        arm: the arm's results, each with "part", "seed", "ne", "auc" and "calibration".
        none: the results of the student alone.
        figures: the names of the figures to take as NE and AUC.

    Returns:
        The changes, or None if there is no such seed.
    """
    taught, alone = ({(r["part"], r["seed"]): r for r in results} for results in (arm, none))
    parts = sorted({part for part, _ in taught})  # the same order for every arm
    seeds = [
        seed
        for seed in sorted({seed for _, seed in taught})
        if all((part, seed) in taught and (part, seed) in alone for part in parts)
    ]
    if not seeds:
        return None

    def table(name: str, results: Mapping[Any, Result]) -> Array:
        return np.array([[results[part, seed][name] for part in parts] for seed in seeds])

    ne, auc = (100 * (table(name, taught) / table(name, alone) - 1) for name in figures)
    return Changes(ne, auc, seeds, parts, table("calibration", taught))


def p_value(values: Array) -> float:
    """Return p of a two-sided t-test that the mean is 0; NaN for one value, or zeros alone."""
    if len(values) < 2 or not np.any(values):
        return float("nan")
    return float(stats.ttest_1samp(values, 0).pvalue)
