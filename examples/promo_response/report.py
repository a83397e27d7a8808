"""What the main job leaves behind: a table on the console, the same as JSON, and a picture."""

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
    """One arm, over a vertical's examples of the last half of the year.

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
    """A vertical's arm without a teacher."""
    return next(r for r in results if r.vertical == vertical and r.arm == "none")


def changes(result: Result, none: Result) -> dict[str, float]:
    """NE and AUC against the arm without a teacher, in per cent."""
    return {
        "ne_change_percent": 100 * (result.ne / none.ne - 1),
        "auc_change_percent": 100 * (result.auc / none.auc - 1),
    }


def table(results: Sequence[Result], none: Mapping[str, Result]) -> list[str]:
    """The lines of the table."""
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
    """The students' NE against the arm without a teacher, and their calibration, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    students = [result for result in results if result.arm != "teacher"]
    names = [
        "\n".join([result.arm, *result.teacher.split(" ", 1)]) if result.arm != "none" else "none"
        for result in students
    ]
    colours = ["tab:red" if result.teacher != "fresh" else "tab:blue" for result in students]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    left.bar(names, [changes(r, none)["ne_change_percent"] for r in students], color=colours)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_ylabel("NE against no teacher, % (lower is better)")
    right.bar(names, [result.calibration for result in students], color=colours)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("calibration (1 is best)")
    for axes in (left, right):
        axes.tick_params(axis="x", labelsize=7)
    figure.suptitle(f"Students of {none.vertical}, last half of the year")
    figure.savefig(path, dpi=110)
    plt.close(figure)
