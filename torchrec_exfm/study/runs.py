"""All passes of a study, each stored in a file of its own, and their report."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from torchrec_exfm._ranks import on_rank_0, rank, world_size
from torchrec_exfm.study.passes import ARMS, Arm, Pass, Study, run_pass, term_in_words
from torchrec_exfm.study.report import Run, write_report

__all__ = ["run"]

OLDER = "AH, by the older teacher"


def run(study: Study, *, seeds: int = 3, folder: Path | str, key: str = "") -> str:
    """Train every arm with every seed, and write the report; every rank must call it.

    The outcome of each pass is stored in the folder, 4 + 8 T + 4 M T bytes an example, so that a
    killed study resumes after its last complete pass. table.md, table.json and picture.png are
    written beside it.

    Args:
        study: the student, the stream and the teacher.
        seeds: passes of each arm; tests over seeds need two or more.
        folder: for the passes and the report; rank 0 alone uses it.
        key: names the state of the study: passes stored under another key are made anew. Without
            a key, give a changed study another folder.

    Returns:
        The table, and the sentence that says which setting to take.

    Raises:
        ValueError: for a study without the arm "none", with another arm without terms, or with a
            task that is not binary; for fewer than one seed; if the stream differs from one call
            to the next, or is the same on two ranks; see also :func:`run_pass`.
    """
    arms = dict(study.arms or ARMS)
    if study.make_older_teacher is not None:
        arms[OLDER] = Arm(ARMS["AH"].terms, "older")
    regressions = [task.name for task in study.tasks if task.regression]
    plain = [name for name, arm in arms.items() if not arm.terms]
    older = [name for name, arm in arms.items() if arm.teacher == "older"]
    lacking = older if study.make_older_teacher is None else []
    if seeds < 1 or plain != ["none"] or regressions or lacking:
        raise ValueError(
            "a study should have at least one seed, the one arm 'none' without terms, binary "
            f"tasks, and make_older_teacher where an arm learns from it; received {seeds} seeds, "
            f"{plain} without terms, the regressions {regressions}, and {lacking} of an older one"
        )
    folder = Path(folder)
    files = {
        (name, seed): folder / "passes" / f"{_digest(name, arm, seed, key)}.npz"
        for seed in range(seeds)
        for name, arm in arms.items()
    }
    missing = on_rank_0(lambda: [run for run, file in files.items() if not file.exists()])
    seconds = 0.1 if sys.stderr.isatty() else 60.0  # between two lines of a log file
    options = {"unit": " examples", "unit_scale": True, "mininterval": seconds}
    with tqdm(disable=rank() != 0, **options) as bar:
        for done, (name, seed) in enumerate(missing):
            bar.set_description(
                f"{done + 1} of {len(missing)}: {name}, seed {seed}"
                f"{' (time left: known after it)' if not done else ''}"
            )
            part = run_pass(study, arms[name], seed, lambda size: bar.update(size * world_size()))
            others = [file for file in files.values() if file != files[name, seed]]
            on_rank_0(functools.partial(_write, files[name, seed], _gather(part), others))
            bar.total = bar.n * len(missing) // (done + 1)
    return on_rank_0(lambda: write_report(folder, _read(files, arms, study), study.tasks))


def _digest(name: str, arm: Arm, seed: int, key: str) -> str:
    terms = [term_in_words(term) for term in arm.terms]
    text = repr([name, terms, arm.teacher, seed, world_size(), key])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _gather(part: Pass) -> list[Pass]:
    """Return the parts of all ranks on rank 0, and an empty list on the others."""
    parts: list[Any] | None = [part] * world_size() if rank() == 0 else None
    if world_size() > 1:
        dist.gather_object(part, parts)
    return parts or []


def _write(path: Path, parts: Sequence[Pass], others: Sequence[Path]) -> None:
    """Store the ranks' parts of a pass, one after the other."""
    first, *rest = parts
    if any(np.array_equal(first.logits, part.logits) for part in rest):
        raise ValueError(
            "stream() should give each rank examples of its own; received the same on two ranks: "
            "give rank r of n every n-th batch, from the r-th on"
        )
    columns: dict[str, Any] = {
        name: np.concatenate([vars(part)[name] for part in parts])
        for name in ("logits", "labels", "teacher", "periods")
    }
    _check_labels(columns["labels"], others)
    columns["seconds"] = max(part.seconds for part in parts) / len(parts)
    write_whole(path, lambda file: np.savez(file, **columns))


def write_whole(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")  # two processes may write the same one
    with draft.open("wb") as file:
        write(file)
    draft.replace(path)


def _check_labels(labels: Any, others: Sequence[Path]) -> None:
    """Raise a ValueError if another stored pass of the study had other labels."""
    stored = next((path for path in others if path.exists()), None)
    if stored is None:
        return
    with np.load(stored) as values:
        if np.array_equal(labels, values["labels"], equal_nan=True):
            return
    raise ValueError(
        "stream() should give the same batches in the same order whenever it is called; received "
        "other labels than in an earlier pass: once that is fixed, or if the data have changed, "
        f"remove {stored.parent}"
    )


def _read(
    files: Mapping[tuple[str, int], Path], arms: Mapping[str, Arm], study: Study
) -> list[Run]:
    """Return the stored passes, with the examples marked that figures are computed on."""
    first = study.first_period
    runs: list[Run] = []
    for (name, seed), file in files.items():
        with np.load(file) as values:
            outcome = Pass(**{column: values[column] for column in values})
        if first is None:
            first = math.ceil(np.median(outcome.periods))
        runs.append(Run(name, arms[name], seed, outcome, outcome.periods >= first))
    return runs
