"""The results of the main job: a table on the console, the same as JSON, and a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Result:
    """The figures of one arm, over a vertical's examples of the last half of the year.

    Attributes:
        vertical: the department.
        arm: how the student was trained, or "teacher".
        teacher: "fresh" or "biased by ...".
        ne: normalized entropy; lower is better.
        auc: area under the ROC curve.
        calibration: mean prediction over mean label; 1 is best.
        samples_per_second: of the whole pass, loading included.
    """

    vertical: str
    arm: str
    teacher: str
    ne: float
    auc: float
    calibration: float
    samples_per_second: float


def write(results: Sequence[Result], options: argparse.Namespace) -> None:
    """Print the table and write `results.json` and `results.png`."""
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    verticals = {result.vertical: None for result in results}
    none = {name: none_of(results, name) for name in verticals}
    print("\nweeks 27 to 53, each example scored before it was trained on:")
    print("\n".join(table(results, none)))
    record = {
        "options": {
            name: value for name, value in vars(options).items() if name not in ("cache", "out")
        },
        "versions": {name: version(name) for name in ("torch", "torchrec", "torchrec-exfm")},
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "ranks": dist.get_world_size(),
        },
        "results": [asdict(r) | changes(r, none[r.vertical]) for r in results],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    first = [result for result in results if result.vertical == options.verticals[0]]
    draw(first, none[options.verticals[0]], folder / "results.png")
    print(f"\nwritten: {folder / 'results.json'}, {folder / 'results.png'}")


def none_of(results: Sequence[Result], vertical: str) -> Result:
    """Return a vertical's arm without a teacher."""
    return next(r for r in results if r.vertical == vertical and r.arm == "none")


def changes(result: Result, none: Result) -> dict[str, float]:
    """Return the changes of NE and AUC against the arm without a teacher, in per cent."""
    return {
        "ne_change_percent": 100 * (result.ne / none.ne - 1),
        "auc_change_percent": 100 * (result.auc / none.auc - 1),
    }


def table(results: Sequence[Result], none: Mapping[str, Result]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        f"{'vertical':12}{'arm':14}{'teacher':14}{'NE':>8}{'AUC':>8}{'calibration':>13}"
        f"{'NE vs none':>12}{'AUC vs none':>13}{'samples/s':>11}"
    ]
    for result in results:
        change = changes(result, none[result.vertical])
        lines.append(
            f"{result.vertical:12}{result.arm:14}{result.teacher:14}{result.ne:8.4f}{result.auc:8.4f}"
            f"{result.calibration:13.3f}{change['ne_change_percent']:+11.2f}%"
            f"{change['auc_change_percent']:+12.2f}%{result.samples_per_second:11,.0f}"
        )
    return lines


def draw(results: Sequence[Result], none: Result, path: Path) -> None:
    """Draw the students' NE against the arm without a teacher, and their calibration, as bars."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from torchrec_exfm.study.report import line_style

    students = [result for result in results if result.arm != "teacher"]
    arms = list(dict.fromkeys(result.arm for result in students))
    hatches = {"fresh": "", students[-1].teacher: "///"}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"Students of {none.vertical}, last half of the year")
    left, right = figure.subplots(1, 2)
    for result in students:
        # AH + SA of this demo has the margin
        style = line_style("AH + SA by margin" if result.arm == "AH + SA" else result.arm)
        options = {"width": 0.38, "edgecolor": "white", "hatch": hatches[result.teacher]}
        shift = 0.0 if result.arm == "none" else -0.2 if result.teacher == "fresh" else 0.2
        at = arms.index(result.arm) + shift
        left.bar(at, changes(result, none)["ne_change_percent"], color=style["color"], **options)
        right.bar(at, result.calibration, color=style["color"], **options)
    biased = [result for result in students if result.teacher == students[-1].teacher]
    ne = ", ".join(f"{r.arm} {changes(r, none)['ne_change_percent']:+.1f} %" for r in biased)
    calibration = ", ".join(f"{r.arm} {r.calibration:.2f}" for r in biased)
    left.set(
        ylabel="NE against none, % (lower is better)",
        title=f"NE, teacher {biased[0].teacher}:\n{ne}",
    )
    right.set(
        ylabel="calibration (1 is best)",
        title=f"Calibration, teacher {biased[0].teacher}:\n{calibration}",
    )
    for axes, level in ((left, 0), (right, 1)):
        axes.axhline(level, color="black", linewidth=0.8)
        axes.set_xticks(range(len(arms)), arms)
        axes.title.set_fontsize(10)
    patches = [
        Patch(facecolor="grey", edgecolor="white", hatch=hatch, label=f"teacher {teacher}")
        for teacher, hatch in hatches.items()
    ]
    left.legend(handles=patches, fontsize=9)
    figure.savefig(path, dpi=130)
