"""The two published data sets whose rows bring a history of the user: KuaiVideo, AmazonElectronics.

Both are as the collection RecZoo publishes them, each in train.csv and test.csv, where a history is
a list of ids with `^` between them, the latest last. Ids are taken as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
from published_tables import (
    LABEL,
    Arrays,
    Format,
    data,
    earlier,
    load_or_build,
    make_codes,
    part,
    parts,
    past,
    read_table,
    require_files,
    require_values,
)

SPLITS = ("train.csv", "test.csv")
PERIODS = 10
"""Into which rows without a calendar are divided; `week` counts them."""

# KuaiVideo

_VIDEO = {
    "timestamp": "DOUBLE",
    "user_id": "VARCHAR",
    "item_id": "VARCHAR",
    "is_click": LABEL,
    "is_like": LABEL,
    "is_follow": LABEL,
    "pos_items": "VARCHAR",
    "neg_items": "VARCHAR",
}
_SIDES = ("pos", "neg")
_RATES = {"label": 0.2, "is_like": 0.01, "is_follow": 0.01}  # prior ones
_KEYS = ("user", "item")
_LAST_ITEMS = tuple(f"{side}_last_item" for side in _SIDES)

_LEAN = ("user", "item"), tuple(f"{side}_log_length" for side in _SIDES)
_STRONG_DENSE = (*_LEAN[1], *(f"{key}_{what}" for key in _KEYS for what in ("log_seen", "mean")))
KUAIVIDEO = Format(
    lean=_LEAN,
    strong=(_LEAN[0], _STRONG_DENSE),
    rich=(
        (*_LEAN[0], *_LAST_ITEMS),
        (
            *_STRONG_DENSE,
            *(f"{side}_item_share" for side in _SIDES),
            *(f"{key}_{label}_mean" for key in _KEYS for label in ("is_like", "is_follow")),
        ),
    ),
)


def kuaivideo(folder: Path, cache: Path | None = None) -> data.Stream:
    """Micro-videos that users of Kuaishou had in view, from train.csv and test.csv.

    The label says whether the video was clicked. The published time stamps tell the order and no
    more, so `time` is the number of different ones that are earlier, and `week` the tenth of the
    rows that the example is in. Rows are sorted by time, user and item, those that are alike in
    all three as in the files. There is one vertical.

    Args:
        folder: has the two files.
        cache: folder to keep the built stream in, by default that of the promotion stream.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one is of another form.
    """
    paths = require_files("KuaiVideo_x1", folder, SPLITS)
    return load_or_build("kuaivideo", paths, cache, partial(_kuaivideo_parts, paths))


def _kuaivideo_parts(
    paths: list[Path], database: duckdb.DuckDBPyConnection
) -> Iterator[data.Stream]:
    labels = ("is_click", "is_like", "is_follow")
    kept = ["CASE WHEN isfinite(timestamp) THEN timestamp END AS timestamp", "user_id", "item_id"]
    kept += [f"{name}::VARCHAR::TINYINT AS {name}" for name in labels]
    for side in _SIDES:
        items = f"string_split({side}_items, '^')"
        kept.append(f"{_length(items)} AS {side}_length, {items}[-1] AS {side}_last")
        kept.append(f"{_number(items, 'item_id')} AS {side}_same")
    for path in paths:
        read_table(database, "shown", path, _VIDEO, ", ".join(kept))
    total = require_values(database, "shown", ("timestamp", "user_id", "item_id", *labels))
    users = make_codes(database, "users", "user_id", "shown")
    items = make_codes(database, "items", "item_id", "shown")
    make_codes(database, "times", "timestamp", "shown")
    sizes = {"user": users + 1} | dict.fromkeys(("item", *_LAST_ITEMS), items + 1)
    for rows in parts(database, _kuaivideo_query(items)):
        dense: Arrays = {}
        for side in _SIDES:
            length = rows[f"{side}_length"]
            dense[f"{side}_log_length"] = np.log1p(length)
            dense[f"{side}_item_share"] = rows[f"{side}_same"] / np.maximum(length, 1)
        for key in _KEYS:
            for label, rate in _RATES.items():
                dense |= past(key, rows, rate, label)
        rows["week"] = 1 + PERIODS * rows["earlier_rows"] // total
        rows["page"] = rows["user_before"] + rows["user_seen"]  # a number that is the user's alone
        yield part(KUAIVIDEO, rows, rows, dense, ("videos",), sizes)


def _kuaivideo_query(no_item: int) -> str:
    """The rows with codes and what is known of the past, in order."""
    labels = tuple(_RATES)
    past_of = (earlier("user", '"user"', labels), earlier("item", "item", labels))
    columns, windows = zip(*past_of, strict=True)
    last = " ".join(
        f"LEFT JOIN items AS {side}_items ON {side}_items.item_id = {side}_last" for side in _SIDES
    )
    return f"""
        WITH coded AS (
            SELECT times.code AS time, times.before AS earlier_rows, users.code AS "user",
                users.before AS user_before, items.code AS item, shown.rowid AS row,
                is_click AS label, is_like, is_follow,
                {", ".join(f"{side}_length, {side}_same" for side in _SIDES)},
                {", ".join(f"coalesce({side}_items.code, {no_item}) AS {side}_last_item" for side in _SIDES)}
            FROM shown JOIN times USING (timestamp) JOIN users USING (user_id)
                JOIN items USING (item_id) {last})
        SELECT *, {", ".join(columns)},
            row_number() OVER (PARTITION BY "user", time ORDER BY item, row) - 1 AS slot
        FROM coded WINDOW {", ".join(windows)} ORDER BY time, "user", slot"""


def _length(items: str) -> str:
    """SQL of the length of a list, 0 of a missing one."""
    return f"coalesce(len({items}), 0)"


def _number(items: str, item: str) -> str:
    """SQL of how often a list has an item."""
    return _length(f"list_filter({items}, lambda x: x = {item})")
