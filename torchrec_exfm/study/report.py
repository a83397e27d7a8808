"""The table of a study, its picture, and the sentence that says which setting to take.

Letters in shapes: N examples, P periods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from torchrec_exfm.study.figures import (
    Array,
    Changes,
    Result,
    compare_arms,
    figures,
    generation_ratio,
    losses,
    p_value,
)
from torchrec_exfm.study.passes import Arm, Pass
from torchrec_exfm.tasks import Task

__all__ = ["Run", "line_style", "markdown", "mean_cell", "p_text", "write_report"]

ITSELF = {"teacher": "the teacher itself", "older": "the older teacher itself"}
SURE = 0.05  # the level for p times the number of settings tried (Bonferroni)
LINE_STYLES: Mapping[str, Mapping[str, Any]] = {  # an arm looks the same in every picture
    "none": {"color": "#7f7f7f"},
    "head on the label": {"color": "#c7c7c7", "linestyle": "--"},
    "AH": {"color": "#1f77b4"},
    "AH + SA": {"color": "#9467bd"},
    "AH + SA by margin": {"color": "#ff7f0e"},
    "serving head": {"color": "#d62728"},
    "label memory": {"color": "#2ca02c"},
    "teacher": {"color": "#000000"},
}
OTHER_COLORS = ("#8c564b", "#e377c2", "#bcbd22", "#17becf")  # of arms that have none above


class Run(NamedTuple):
    """A pass of an arm with a seed, and the mask of the examples for the figures, (N,)."""

    name: str
    arm: Arm
    seed: int
    outcome: Pass
    counted: Array


class Finding(NamedTuple):
    """An arm's changes: over all examples, over those with a teacher output, and over time.

    Attributes:
        over_time: (P,) the change of the mean log-loss in each period, in per cent, over all seeds.
        cost: the time to train an example, over that of the student alone: the median over seeds.
    """

    arm: Arm
    change: Changes
    covered: Changes
    over_time: Array
    cost: float


def write_report(folder: Path, runs: Sequence[Run], tasks: Sequence[Task]) -> str:
    """Write table.md, table.json and picture.png to the folder; return the text of the first."""
    results = compute_results(runs, tasks)
    findings = summarize_arms(runs, results)
    text = f"{_table(runs, results, findings)}\n{sentence(findings)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    (folder / "table.json").write_text(json.dumps(results))
    draw(folder / "picture.png", findings)
    return text


def compute_results(runs: Sequence[Run], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Return figures by arm, seed and task: of all examples, and of those that teachers cover.

    The outputs of the teachers themselves are further arms.
    """
    results = []
    outputs: dict[tuple[str, int], Array] = {
        (run.arm.teacher, run.seed): run.outcome.teacher for run in runs if run.arm.terms
    }
    for run in runs:
        for t, task in enumerate(tasks):
            labels = run.outcome.labels[:, t]
            labelled = run.counted & ~np.isnan(labels)
            predictions = {run.name: run.outcome.logits[:, t]}
            for kind, name in ITSELF.items():
                if run.name == "none" and (kind, run.seed) in outputs:
                    predictions[name] = outputs[kind, run.seed][:, 0, t]
            # The same examples for every arm, so that η compares gains on equal terms.
            covered = labelled.copy()
            for kind in ITSELF:
                if (kind, run.seed) in outputs:
                    covered &= ~np.isnan(outputs[kind, run.seed][:, 0, t])
            for name, logits in predictions.items():
                rows = labelled & ~np.isnan(logits) if name in ITSELF.values() else labelled
                total = figures(logits[rows], labels[rows])
                same = np.array_equal(covered, rows)
                on_covered = total if same else figures(logits[covered], labels[covered])
                results.append(
                    {
                        **{"arm": name, "seed": run.seed, "part": task.name},
                        **total,
                        **{f"covered_{figure}": on_covered[figure] for figure in ("ne", "auc")},
                    }
                )
    return results


def summarize_arms(runs: Sequence[Run], results: Sequence[Result]) -> dict[str, Finding]:
    """Return the findings of each arm with terms, by its name."""
    alone = {run.seed: run.outcome for run in runs if run.name == "none"}
    findings = {}
    for name, arm in {run.name: run.arm for run in runs if run.arm.terms}.items():
        arm_runs = [run for run in runs if run.name == name]
        change, covered = (_changes(results, name, prefix) for prefix in ("", "covered_"))
        assert change is not None and covered is not None
        cost = np.median([run.outcome.seconds / alone[run.seed].seconds for run in arm_runs])
        findings[name] = Finding(arm, change, covered, _over_time(arm_runs, alone), float(cost))
    return findings


def _changes(results: Sequence[Result], name: str, prefix: str = "") -> Changes | None:
    taught, none = ([r for r in results if r["arm"] == arm] for arm in (name, "none"))
    return compare_arms(taught, none, (f"{prefix}ne", f"{prefix}auc"))


def _over_time(runs: Sequence[Run], alone: Mapping[int, Pass]) -> Array:
    """Return the change of the log-loss in each period that has labels, (P,): see `Finding`."""
    sums = []
    for run in runs:
        labelled = run.counted & ~np.isnan(run.outcome.labels).all(1)
        _, period = np.unique(run.outcome.periods[labelled], return_inverse=True)
        for outcome in (run.outcome, alone[run.seed]):
            labels = outcome.labels[labelled]
            values = np.where(np.isnan(labels), 0, losses(outcome.logits[labelled], labels))
            sums.append(np.bincount(period, values.sum(1)))
    return np.asarray(100 * (sum(sums[::2]) / sum(sums[1::2]) - 1))


def _table(runs: Sequence[Run], results: Sequence[Result], findings: Mapping[str, Finding]) -> str:
    none = [r for r in results if r["arm"] == "none"]
    level = {name: np.mean([r[name] for r in none]) for name in ("ne", "auc", "calibration")}
    teachers = {kind: _changes(results, name, "covered_") for kind, name in ITSELF.items()}

    def row(name: str, change: Changes, p: str, eta: str, cost: str) -> list[str]:
        calibration = f"{change.calibration.mean():.3f}"
        return [name, mean_cell(change.ne), mean_cell(change.auc), p, calibration, eta, cost]

    rows = [row(ITSELF[k], change, "", "1", "") for k, change in teachers.items() if change]
    for name, finding in findings.items():
        teacher = teachers.get(finding.arm.teacher)
        eta = f"{finding.covered.eta(teacher):.2f}" if teacher else ""
        p = p_text(p_value(finding.over_time))
        rows.append(row(name, finding.change, p, eta, f"{finding.cost:.2f}"))
    counts = {"seed": len({r["seed"] for r in none}), "task": len({r["part"] for r in none})}
    means = " and ".join(f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items())
    periods = {len(finding.over_time) for finding in findings.values()}
    return (
        f"The student alone: NE {level['ne']:.4f}, AUC {level['auc']:.4f}, calibration "
        f"{level['calibration']:.3f}; means over {means}, of {runs[0].counted.sum():,} examples, "
        "each scored before it was trained on.\n\n"
        + markdown(["arm", "NE", "AUC", "p over time", "calibration", "η", "cost"], rows)
        + "\nNE, AUC: change against the student alone, ± the standard deviation over seeds, and p "
        f"of a paired t-test over seeds; p over time: over {max(periods, default=0)} stretches of "
        "time. η: the share of the teacher's lead in NE that the student gets. Cost: of training "
        "an example, over the student alone.\n" + _generations(findings, teachers)
    )


def _generations(findings: Mapping[str, Finding], teachers: Mapping[str, Changes | None]) -> str:
    """Return the ratio between two teachers' generations, for the arms that both taught."""
    lines = []
    by_arm = {finding.arm: finding for finding in findings.values()}
    for name, finding in findings.items():
        new = by_arm.get(replace(finding.arm, teacher="teacher"))
        teacher, older = teachers["teacher"], teachers["older"]
        if finding.arm.teacher == "older" and new and teacher and older:
            ratio = generation_ratio(new.covered, finding.covered, teacher, older)
            lines.append(f"\nGeneration ratio of {name}: {ratio:.2f}.\n")
    return "".join(lines)


def sentence(findings: Mapping[str, Finding]) -> str:
    """Return which setting to take, or that none pays, and how certain that is.

    A setting pays if its NE is below that of the student alone, and of the head on the label, in
    tests over seeds and over time. Each p, times the number of settings, must be under 0.05. Of the
    settings that pay, the first (and so the simplest) is taken that is not significantly behind the
    best one over time.
    """
    settings = {
        name: finding
        for name, finding in findings.items()
        if finding.arm.teacher == "teacher"
        and np.isfinite(finding.change.ne).all()  # NaN: it diverged
    }
    controls = [finding for finding in findings.values() if finding.arm.teacher == "labels"]
    if not settings:
        return "No arm with a teacher has figures."

    def pays(finding: Finding) -> bool:
        by_seeds, samples = len(finding.change.seeds) > 1, []
        if len(finding.over_time) > 1 or not by_seeds:
            samples += [finding.over_time, *(finding.over_time - c.over_time for c in controls)]
        if by_seeds:
            beyond = (finding.change.less(c.change) for c in controls)
            samples += [values.mean(1) for values in (finding.change.ne, *beyond)]
        return all(v.mean() < 0 and p_value(v) * len(settings) < SURE for v in samples)

    paying = {name: finding for name, finding in settings.items() if pays(finding)}
    name, best = min((paying or settings).items(), key=lambda item: item[1].change.ne.mean())
    if not paying:
        beside = " and a head on the label without any teacher" if controls else ""
        return (
            f"It does not pay here: the best setting, {name}, changes NE by {_interval(best)}, "
            f"and that is not surely below the student alone{beside}."
        )
    name, chosen = next(
        (name, finding)
        for name, finding in paying.items()
        if (less := finding.over_time - best.over_time).mean() <= 0 or p_value(less) > SURE
    )
    beyond = "".join(
        f", {-chosen.change.less(control.change).mean():.2f} % below a head on the label"
        for control in controls
    )
    exposed = any(term.serving and not term.adapted for term in chosen.arm.terms)
    caution = " The serving head learns from the teacher itself, and serves any bias of it."
    return (
        f"Take {name}: NE {_interval(chosen)}{beyond}, at {chosen.cost:.2f} of the cost of "
        f"training.{caution * exposed}"
    )


def _interval(finding: Finding) -> str:
    """Return the change of NE with its 95 % interval over seeds, or over time for one seed."""
    seeds = finding.change.ne.mean(1)
    values, what = (seeds, "seeds") if len(seeds) > 1 else (finding.over_time, "stretches of time")
    mean, n = seeds.mean(), len(values)
    if n < 2:
        return f"{mean:+.2f} %"
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return f"{mean:+.2f} % (95 % interval {mean - half:+.2f} to {mean + half:+.2f} over {n} {what})"


def draw(path: Path, findings: Mapping[str, Finding]) -> None:
    """Draw the change of NE by arm, with a point for each seed, and the log-loss over time."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, (name, finding) in enumerate(findings.items()):
        seeds, style = finding.change.ne.mean(1), line_style(name, row)
        left.barh(row, seeds.mean(), color=style["color"], alpha=0.6)
        left.plot(seeds, [row] * len(seeds), ".", color="black")
        right.plot(finding.over_time, label=name, **style)
    left.set(yticks=range(len(findings)), yticklabels=list(findings), xlabel="change of NE, %")
    left.invert_yaxis()
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="stretch of time", ylabel="log-loss against the student alone, %")
    right.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def line_style(arm: str, index: int = 0) -> Mapping[str, Any]:
    """Return the color and dashes of an arm, as keywords of matplotlib.

    Args:
        arm: its name.
        index: picks the color of an arm that `LINE_STYLES` does not name.
    """
    return LINE_STYLES.get(arm, {"color": OTHER_COLORS[index % len(OTHER_COLORS)]})


def mean_cell(values: Array, digits: int = 2) -> str:
    """Return the mean of (S, V) values ± standard deviation over seeds (p), as text."""
    means = values.mean(1)
    if len(means) < 2:
        return f"{means.mean():+.{digits}f} %"
    spread = means.std(ddof=1)
    return f"{means.mean():+.{digits}f} ± {spread:.{digits}f} % (p {p_text(p_value(means))})"


def p_text(p: float) -> str:
    """Return a p-value as text, to two digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
