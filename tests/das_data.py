"""Small stores, rows that break the rules, and damage, for the tests of the teacher store."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake

from torchrec_exfm.das import Snapshot, TeacherStore
from torchrec_exfm.das.rules import Rows

WINDOW = 3600  # seconds
AT = 2 * WINDOW  # an event time, the first of window 2
US = 1_000_000


def snapshot(version: int = 1, through: int = 1_000, teacher: str = "fm") -> Snapshot:
    return Snapshot(teacher, version, through)


def new_store(folder: Path, **options: Any) -> TeacherStore:
    """Create a store of float32 and windows of an hour, unless the options say otherwise."""
    return TeacherStore.create(
        folder, **{"window_seconds": WINDOW, "resolution": "float32", **options}
    )


def small_store(folder: Path, rows: int = 3) -> TeacherStore:
    """Create a store of one file: examples 0, 1 ... of window 2, with outputs 0.5, 1.5 ...."""
    store = new_store(folder)
    ids = np.arange(rows)
    store.write(snapshot(), ids, ids + np.float32(0.5), AT + ids)
    store.refresh()
    return store


def all_rows(store: TeacherStore, teacher: str = "fm", keys: Sequence[str] = ()) -> Rows:
    """Return a teacher's rows as of the newest commit, sorted by id."""
    store.refresh()
    parts = [store.read(teacher, window, keys=keys)[0] for window in store.windows(teacher)]
    rows = Rows.concatenate(parts, len(store.tasks), num_keys=len(keys))
    return rows[np.argsort(rows.example_id, kind="stable")]


def by_id(store: TeacherStore, teacher: str = "fm") -> dict[int, list[float]]:
    """Return the outputs of each example, and require a single row for each."""
    rows = all_rows(store, teacher)
    assert len(set(rows.example_id.tolist())) == len(rows)
    return dict(zip(rows.example_id.tolist(), rows.outputs.tolist(), strict=True))


def plain_rows(store: TeacherStore, n: int = 1, **columns: Any) -> pa.Table:
    """Return rows of window 2 with the store's schema; ``columns`` may break every rule."""
    values: dict[str, Any] = {
        "example_id": list(range(n)),
        **{name: [0.0] * n for name in store.format.outputs},
        "event_time": [AT * US] * n,
        "snapshot": [1] * n,
        "trained_through": [1_000 * US] * n,
        "logged": [False] * n,
        "scored_at": [0] * n,
        "teacher": ["fm"] * n,
        "window": [2] * n,
        **columns,
    }
    schema = store.format.schema()
    return pa.table(
        [
            pa.array(values[field.name], field.type)
            if field.name in values
            else pa.nulls(n, field.type)
            for field in schema
        ],
        schema=schema,
    )


def plant(store: TeacherStore, n: int = 1, **columns: Any) -> None:
    """Append rows as another program would, without the store's checks."""
    write_deltalake(store.table.url, plain_rows(store, n, **columns), mode="append")
    store.refresh()


def only_file(store: TeacherStore, teacher: str = "fm", window: int = 2) -> Path:
    (file,) = store.files(teacher, window)
    return Path(store.table.url) / file.path


def log_file(store: TeacherStore, version: int) -> Path:
    return Path(store.table.url) / "_delta_log" / f"{version:020}.json"


def edit_log(store: TeacherStore, version: int, action: str, edit: Callable[[Any], Any]) -> None:
    """Edit the actions of one kind ("add", "metaData" ...) in one commit."""
    path = log_file(store, version)
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    for record in actions:
        if action in record:
            edit(record[action])
    path.write_text("".join(json.dumps(record) + "\n" for record in actions))


def sentence(error: BaseException) -> str:
    """Return the text of an error, and require it to be one line."""
    text = str(error)
    assert text and "\n" not in text, text
    return text
