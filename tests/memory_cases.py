"""Random events, examples and stores, and the check of a memory in SQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from das_data import US, WINDOW, new_store
from memory_reference import brute_force
from numpy.random import Generator

from torchrec_exfm.das import Snapshot, TeacherStore
from torchrec_exfm.das.memory import MemoryFormat
from torchrec_exfm.das.rules import NO_KEY
from torchrec_exfm.das.schema import KEYS

START = 1_700_000_000
USER, ITEM, PAIR = ["user_id"], ["item_id"], ["user_id", "item_id"]
FORMATS = [
    MemoryFormat(name="fm", keys=[USER]),
    MemoryFormat(name="fm", keys=[USER, ITEM, PAIR], length=3, half_life_seconds=40),
    MemoryFormat(name="fm", keys=[PAIR, USER], length=200, delay_seconds=17),
    MemoryFormat(name="fm", keys=[ITEM], length=1, half_life_seconds=0.25),  # 1,200 in the span
    MemoryFormat(name="fm", keys=[ITEM], half_life_seconds=1e-6),
]


def key_columns(random: Generator, n: int) -> dict[str, list[int | None]]:
    """Return random keys: one user has half of the rows, and some keys are missing."""
    users = np.where(random.random(n) < 0.5, 1, random.integers(-3, 5, n))
    columns = {"user_id": users, "item_id": random.integers(2**62, 2**62 + 4, n)}
    absent = random.random((2, n)) < 0.1
    return {
        name: [None if a else int(v) for v, a in zip(column, none, strict=True)]
        for (name, column), none in zip(columns.items(), absent, strict=True)
    }


def random_tables(random: Generator, n: int = 200) -> tuple[pa.Table, pa.Table]:
    """Return events and examples: many share a second, some repeat, some lack a key or a value."""
    values = random.normal(size=n).astype(np.float32).tolist()
    values[:5] = None, float("nan"), float("inf"), float("-inf"), None
    events = {
        **key_columns(random, n),
        "example_id": random.integers(0, n, n).tolist(),
        "event_seconds": (START + random.integers(0, 300, n)).tolist(),
        "value": values,
    }
    events["event_seconds"][5] = None
    examples = {
        **key_columns(random, n),
        "event_seconds": (START + random.integers(-20, 400, n)).tolist(),
    }
    events, examples = (
        {name: [*column, *column[-20:]] for name, column in table.items()}
        for table in (events, examples)
    )
    examples["number"] = [*range(n + 20)]
    return pa.table(events), pa.table(examples)


def random_store(folder: Path, random: Generator, ids: int = 150) -> TeacherStore:
    """Create a store: two teachers, several windows and versions, scored and logged rows."""
    store = new_store(
        folder, tasks=("click", "watch-time.s"), embedding_width=2, embedding_resolution="float16"
    )
    seconds = random.integers(2 * WINDOW, 5 * WINDOW, ids)
    seconds[::3] = seconds[0]
    keys = {name: random.integers(0, 4, ids) for name in KEYS}
    keys["user_id"][::7] = NO_KEY
    for teacher in ("fm", "gm"):
        for version in (1, 2, 3):
            for logged in (False, True):
                chosen = random.permutation(ids)[: ids // 3]
                outputs = random.normal(size=(len(chosen), 2)).astype(np.float32)
                tasks = store.tasks if version != 2 else store.tasks[1:]
                through = int(random.integers(0, (6 if logged else 2) * WINDOW))
                store.write(
                    Snapshot(teacher, version, through),
                    chosen,
                    outputs[:, : len(tasks)],
                    seconds[chosen],
                    tasks=tasks,
                    logged=logged,
                    embeddings=outputs if version != 3 else None,
                    keys={name: key[chosen] for name, key in keys.items()},
                )
    store.refresh()
    return store


def events_of(
    store: TeacherStore, task: int, exclude: int | None = None, *, embeddings: bool = False
) -> list[dict[str, Any]]:
    """Return the events of teacher fm, computed with a dict of all rows, by time and id."""
    won: dict[int, tuple[Any, dict[str, Any]]] = {}
    for window in store.windows("fm"):
        rows, _ = store.read("fm", window, keys=KEYS, embeddings=embeddings)
        for i in range(len(rows)):
            rank = (rows.snapshot[i], rows.logged[i], rows.scored_at[i])
            number, example = rows.outputs[i, task], int(rows.example_id[i])
            value = None if np.isnan(number) else float(number)
            if embeddings:
                vector = bytes(rows.embedding[i])
                value = None if vector == b"\xff" * len(vector) else vector
            keys = {name: int(rows.keys[i, k]) for k, name in enumerate(KEYS)}
            known = max(rows.event_time[i], rows.trained_through[i])
            event = {
                **{name: None if key == NO_KEY else key for name, key in keys.items()},
                "example_id": example,
                "event_seconds": int(known) // US,
                "value": value,
            }
            if rank[0] != exclude and (example not in won or rank > won[example][0]):
                won[example] = rank, event
    events = [event for _, event in won.values() if event["value"] is not None]
    return sorted(events, key=lambda event: (event["event_seconds"], event["example_id"]))


def check(
    columns: dict[str, Any],
    events: list[dict[str, Any]],
    examples: dict[str, list[Any]],
    format: MemoryFormat,
    event_seconds: str = "event_seconds",
    value: str = "value",
) -> None:
    """Require an engine's columns to equal the reference, up to the rounding of float64."""
    names = sorted({name for key in format.keys for name in key})
    present = [
        event
        for event in events
        if event[event_seconds] is not None
        and event[value] is not None
        and np.isfinite(event[value])
    ]
    present.sort(key=lambda event: (event[event_seconds], event["example_id"], event[value]))
    parts = (
        {name: [event[name] for event in present] for name in names},
        [event[event_seconds] for event in present],
        [[event[value]] for event in present],
    )
    expected = brute_force(parts, (examples, examples[event_seconds]), format)
    size = max((abs(event[value]) for event in present), default=0.0)
    # of sums of n numbers, and of weights 2^x, |x| <= 1,100, whose exponents are rounded
    bound = 4 * (len(present) + 1_100) * 2.0**-52 * size
    for key, rows in expected.items():
        for feature in ("count", "days_since", *(("values", "ages_days") * bool(format.length))):
            column = [*map(flat, columns[f"fm_{key}_{feature}"])]
            assert column == [flat(row[feature]) for row in rows], (key, feature)
        for feature in ("mean", "last", "decayed_mean"):
            for number, row in zip(columns[f"fm_{key}_{feature}"], rows, strict=True):
                assert (number is None) == (row[feature] is None), (key, feature)
                if number is not None:
                    limit = 0 if feature == "last" else bound
                    assert abs(number - row[feature][0]) <= limit, (key, feature)


def flat(feature: Any) -> Any:
    """Replace vectors of one number by that number."""
    if not isinstance(feature, list):
        return feature
    return [entry[0] if isinstance(entry, list) else entry for entry in feature]
