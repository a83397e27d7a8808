"""Random stores, and a comparison of a join with TeacherLookup, for the tests of joins."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from das_data import US, WINDOW, new_store, plant
from numpy.random import Generator

from torchrec_exfm.das import Snapshot, TeacherLookup, TeacherStore

TEACHERS = ("fm", "fm-2.b")
TASKS = ("click", "watch-time.s")
IDS = 40
WINDOWS = range(2, 6)

# arguments of a join and of a look-up
CHOICES: list[dict[str, Any]] = [
    {},
    {"snapshot": 2},
    {"exclude": [3, 1], "max_age_seconds": math.inf},
    {"snapshot": {"fm": 3}, "exclude": {"fm-2.b": [3]}},
    {"max_age_seconds": 2 * WINDOW},
    {"tasks": TASKS[::-1]},
    {"tasks": TASKS[1:], "exclude": [2], "max_age_seconds": 0},
]


def random_store(folder: Path, random: Generator) -> TeacherStore:
    """Create a store: several windows and versions, scored and logged rows, and bad rows."""
    store = new_store(folder, tasks=TASKS)
    seconds = event_seconds(random)
    for teacher, version in itertools.product(TEACHERS, (1, 2, 3)):
        for _ in range(random.integers(1, 4)):  # rows are repeated: the last scored counts
            logged = bool(random.integers(0, 2))
            ids = random.permutation(IDS)[: random.integers(1, IDS)]
            # a logged row's teacher may have learned from the example since
            through = int(random.integers(0, (6 if logged else 2) * WINDOW))
            known = TASKS if random.random() < 0.7 else TASKS[:1]
            outputs = random.normal(size=(len(ids), len(known))).astype(np.float32)
            snapshot = Snapshot(teacher, version, through)
            store.write(snapshot, ids, outputs, seconds[ids], tasks=known, logged=logged)
    plant_bad_rows(store, seconds, random)
    store.refresh()
    return store


def event_seconds(random: Generator) -> Any:
    """Return an event time for each id, many at the borders of windows."""
    seconds = random.integers(WINDOWS[0] * WINDOW, (WINDOWS[-1] + 1) * WINDOW, IDS)
    borders = random.integers(WINDOWS[0] + 1, WINDOWS[-1] + 1, IDS) * WINDOW
    kinds = random.integers(0, 4, IDS)
    return np.select([kinds == 1, kinds == 2], [borders, borders - 1], seconds)


def plant_bad_rows(store: TeacherStore, seconds: Any, random: Generator) -> None:
    """Plant rows of a newer version: some break a rule; the others count."""
    for teacher in TEACHERS:
        ids = random.permutation(IDS)[:10]
        times = seconds[ids].copy()
        columns: dict[str, Any] = {
            "example_id": ids,
            "output_click": np.full(10, 9.0, np.float32),
            "output_watch-time.s": np.full(10, -9.0, np.float32),
            "snapshot": np.full(10, 9),
            "event_time": times * US,
            "trained_through": np.full(10, 1_000 * US),
            "scored_at": np.arange(10),
            "window": times // WINDOW,
            "teacher": [teacher] * 10,
        }
        columns["output_click"][:2] = math.nan, math.inf
        columns["output_watch-time.s"][2] = -math.inf
        columns["trained_through"][3:5] = columns["event_time"][3:5] + np.array([0, 1])  # leaks
        columns["event_time"][5] += WINDOW * US  # of another window
        columns["example_id"][6] = -1
        columns["trained_through"][7] = columns["event_time"][7] - 1_500_000  # no whole seconds
        plant(store, 10, **columns)


def random_examples(store: TeacherStore, random: Generator) -> pa.Table:
    """Return examples in any order: some twice, some without output, some in another window."""
    ids = random.integers(0, IDS + 10, 3 * IDS)
    known = np.append(event_seconds_of(store), np.full(10, 3 * WINDOW))
    seconds = known[ids]
    elsewhere = random.random(len(ids)) < 0.1
    seconds[elsewhere] += WINDOW
    return pa.table({"number": np.arange(len(ids)), "example_id": ids, "event_seconds": seconds})


def event_seconds_of(store: TeacherStore) -> Any:
    """Return each id's event time in the store's good rows."""
    seconds = np.full(IDS, 4 * WINDOW)
    for teacher in store.teachers():
        for window in store.windows(teacher):
            rows, _ = store.read(teacher, window, bad_rows="quarantine")
            seconds[rows.example_id] = rows.event_time // US
    return seconds


def looked_up(store: TeacherStore, examples: pa.Table, choice: dict[str, Any]) -> dict[str, Any]:
    """Return the outputs of TeacherLookup as columns of a join, None where there are none."""
    functions: Any = {
        "ids": lambda batch: batch["example_id"].to_numpy(),
        "event_seconds": lambda batch: batch["event_seconds"].to_numpy(),
    }
    windows = 2 * len(WINDOWS)
    with TeacherLookup(
        store, TEACHERS, bad_rows="quarantine", max_windows=windows, **functions, **choice
    ) as lookup:
        outputs = lookup(examples)
    columns: dict[str, Any] = {}
    assert outputs.age_seconds is not None
    for m, teacher in enumerate(TEACHERS):
        for t, task in enumerate(lookup.tasks):
            columns[f"{teacher}_{task}"] = masked(
                outputs.values[:, m, t], outputs.presence[:, m, t]
            )
        age_seconds = masked(outputs.age_seconds[:, m], outputs.presence[:, m].any(1))
        columns[f"{teacher}_age_seconds"] = age_seconds
    return columns


def masked(values: Any, presence: Any) -> list[Any]:
    pairs = zip(values.tolist(), presence.tolist(), strict=True)
    return [value if present else None for value, present in pairs]


def check(joined: dict[str, Any], store: TeacherStore, examples: pa.Table, choice: Any) -> None:
    """Require the columns of a join to equal a look-up's outputs.

    The age of a row whose outputs are all null is left out: a look-up has none.
    """
    expected = looked_up(store, examples, choice)
    columns = {name: joined[name] for name in expected}
    for teacher in TEACHERS:
        outputs = [columns[f"{teacher}_{task}"] for task in choice.get("tasks", TASKS)]
        null = [all(output is None for output in row) for row in zip(*outputs, strict=True)]
        ages = zip(columns[f"{teacher}_age_seconds"], null, strict=True)
        columns[f"{teacher}_age_seconds"] = [None if absent else age for age, absent in ages]
    assert columns == expected, choice
