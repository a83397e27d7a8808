"""All passes of a study, each kept in a file of its own, and the report of them."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from torchrec_exfm._ranks import of_each_rank, on_rank_0, rank, world_size
from torchrec_exfm.study.passes import ARMS, Arm, Pass, Study, run_pass
from torchrec_exfm.study.report import Run, write_report

__all__ = ["run"]

OLDER = "AH, by the older teacher"


def run(study: Study, *, seeds: int = 3, folder: Path | str, key: str = "") -> str:
    """Train every arm with every seed, and report; called by all ranks.

    What a pass said is kept in the folder, 4 + 8 T + 4 M T bytes an example, and a study that was
    killed goes on after the last whole pass. table.md, table.json and picture.png are written
    beside it.

    Args:
        study: what is trained on what.
        seeds: passes of each arm; tests over seeds take two or more.
        folder: for the passes and the report, seen by rank 0.
        key: of the study's state: passes that were kept under another one are made anew. Without
            one, give a changed study another folder.

    Returns:
        the table, and the sentence that says what to take.

    Raises:
        ValueError: for a study without the arm "none" or with a task that is no binary one, for
            a number of seeds below 1; if the stream is not the same whenever it is called.
    """
    arms = dict(study.arms or ARMS)
    if study.make_older_teacher is not None:
        arms[OLDER] = Arm(ARMS["AH"].terms, "older")
    regressions = [task.name for task in study.tasks if task.regression]
    if seeds < 1 or arms.get("none", ARMS["AH"]).terms or regressions:
        raise ValueError(
            "a study should have at least one seed, an arm 'none' without terms, and binary tasks; "
            f"received {seeds} seeds, the arms {list(arms)}, and the regressions {regressions}"
        )
    folder = Path(folder)
    files = {
        (name, seed): folder / "passes" / f"{_digest(name, arm, seed, key)}.npz"
        for seed in range(seeds)
        for name, arm in arms.items()
    }
    missing = on_rank_0(lambda: [run for run, file in files.items() if not file.exists()])
    seconds = 0.1 if sys.stderr.isatty() else 60.0  # between two lines of a log
    options = {"unit": " examples", "unit_scale": True, "mininterval": seconds}
    with tqdm(disable=rank() != 0, **options) as bar:
        for at, (name, seed) in enumerate(missing):
            bar.set_description(
                f"{at + 1} of {len(missing)}: {name}, seed {seed}"
                f"{' (time left: known after it)' if not at else ''}"
            )
            kept = run_pass(study, arms[name], seed, lambda size: bar.update(size * world_size()))
            _write(files[name, seed], kept)
            bar.total = bar.n * len(missing) // (at + 1)
    return on_rank_0(lambda: write_report(folder, _read(files, arms, study), study.tasks))


def _digest(name: str, arm: Arm, seed: int, key: str) -> str:
    terms = [{**vars(term), "loss": None} for term in arm.terms]
    text = repr([name, terms, arm.teacher, seed, world_size(), key])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _write(path: Path, part: Pass) -> None:
    """The ranks' parts, one after the other, in a file that appears whole or not at all."""
    parts = of_each_rank(part)
    names = ("logits", "labels", "teacher", "periods")
    columns: dict[str, Any] = {n: np.concatenate([vars(part)[n] for part in parts]) for n in names}
    seconds = max(part.seconds for part in parts) / len(parts)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        with draft.open("wb") as file:
            np.savez(file, **columns, seconds=seconds)
        draft.replace(path)

    on_rank_0(write)


def _read(
    files: Mapping[tuple[str, int], Path], arms: Mapping[str, Arm], study: Study
) -> list[Run]:
    """What was kept, with the figures' examples marked."""
    first = study.first_period
    runs: list[Run] = []
    for (name, seed), file in files.items():
        with np.load(file) as values:
            said = Pass(**{column: values[column] for column in values})
        if runs and not np.array_equal(said.labels, runs[0].said.labels, equal_nan=True):
            raise ValueError(
                "stream() should give the same batches in the same order whenever it is called; "
                f"received other labels for {name!r} with seed {seed} than for {runs[0].name!r}: "
                f"where that is mended, or the data have changed, remove {file.parent}"
            )
        if first is None:
            first = math.ceil(np.median(said.periods))
        runs.append(Run(name, arms[name], seed, said, said.periods >= first))
    return runs
