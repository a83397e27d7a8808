"""The published data sets whose rows have a history of the user: KuaiVideo, AmazonElectronics.

Both have the form of the collection RecZoo, in train.csv and test.csv. A history is a list of ids
with `^` between them, the latest last. Ids are read as text.
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
"""How many periods rows without a calendar are divided into; `week` counts them."""

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
_STRONG_DENSE = (
    *_LEAN[1],
    *(f"{key}_{figure}" for key in _KEYS for figure in ("log_seen", "mean")),
)
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
    """Return micro-videos that users of Kuaishou had in view, from train.csv and test.csv.

    The label says whether the video was clicked. The published time stamps only give the order. So
    `time` is the number of different earlier ones, and `week` is the example's tenth of the rows.
    Rows are sorted by time, user and item, and then by their order in the files. There is one
    vertical.

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
    select = ["CASE WHEN isfinite(timestamp) THEN timestamp END AS timestamp", "user_id", "item_id"]
    select += [f"{name}::VARCHAR::TINYINT AS {name}" for name in labels]
    for side in _SIDES:
        history = _split(f"{side}_items")
        select.append(f"{_length(history)} AS {side}_length, {history}[-1] AS {side}_last")
        select.append(f"{_number(history, 'item_id')} AS {side}_same")
    for path in paths:
        read_table(database, "shown", path, _VIDEO, ", ".join(select))
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
        rows["page"] = rows["user_before"] + rows["user_seen"]  # no other user has this number
        yield part(KUAIVIDEO, rows, rows, dense, ("videos",), sizes)


def _kuaivideo_query(no_item: int) -> str:
    """Return SQL of the rows with codes and features of the past, in order."""
    labels = tuple(_RATES)
    by_key = (earlier("user", '"user"', labels), earlier("item", "item", labels))
    columns, windows = zip(*by_key, strict=True)
    select = [f"{side}_length, {side}_same" for side in _SIDES]
    select += [f"coalesce({side}.code, {no_item}) AS {side}_last_item" for side in _SIDES]
    joins = [f"LEFT JOIN items AS {side} ON {side}.item_id = {side}_last" for side in _SIDES]
    return f"""
        WITH coded AS (
            SELECT times.code AS time, times.before AS earlier_rows, users.code AS "user",
                users.before AS user_before, items.code AS item, shown.rowid AS row,
                is_click AS label, is_like, is_follow, {", ".join(select)}
            FROM shown JOIN times USING (timestamp) JOIN users USING (user_id)
                JOIN items USING (item_id) {" ".join(joins)})
        SELECT *, {", ".join(columns)},
            row_number() OVER (PARTITION BY "user", time ORDER BY item, row) - 1 AS slot
        FROM coded WINDOW {", ".join(windows)} ORDER BY time, "user", slot"""


# AmazonElectronics

_REVIEW = {
    "label": LABEL,
    "user_id": "VARCHAR",
    "item_id": "VARCHAR",
    "cate_id": "VARCHAR",
    "item_history": "VARCHAR",
    "cate_history": "VARCHAR",
}
_IDS = ("user", "item", "category")
_AMAZON_STRONG = ("history_log_length", "category_in_history", "category_log_count")
AMAZONELECTRONICS = Format(
    lean=(_IDS, _AMAZON_STRONG[:1]),
    strong=(_IDS, _AMAZON_STRONG),
    rich=(
        (*_IDS, "last_item", "last_category"),
        (*_AMAZON_STRONG, "category_share", "item_share", "category_log_distance"),
    ),
    in_time_order=False,
)


def amazonelectronics(folder: Path, cache: Path | None = None) -> data.Stream:
    """Return reviews of electronics at Amazon and drawn negatives, from train.csv and test.csv.

    The label says whether the user reviewed the item. Rows have no time, and are in no order of
    time. They keep the order of the files, train.csv before test.csv; `time` is the number of the
    row, and `AMAZONELECTRONICS.in_time_order` is False. So features are of the row's own history,
    not of earlier rows. `week` is the row's tenth of train.csv, and 11 for test.csv. An example's
    group is the user in one of the files. There is one vertical.

    Args:
        folder: has the two files.
        cache: folder to keep the built stream in, by default that of the promotion stream.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one is of another form.
    """
    paths = require_files("AmazonElectronics_x1", folder, SPLITS)
    return load_or_build("amazonelectronics", paths, cache, partial(_amazon_parts, paths))


def _amazon_parts(paths: list[Path], database: duckdb.DuckDBPyConnection) -> Iterator[data.Stream]:
    train_rows = _read_amazon(paths, database)
    users = make_codes(database, "users", "user_id", "reviews")
    items = make_codes(database, "items", "item_id", "reviews")
    categories = make_codes(database, "categories", "cate_id", "reviews")
    sizes = {"user": users + 1, "item": items + 1, "category": categories + 1}
    sizes |= {"last_item": items + 1, "last_category": categories + 1}
    for rows in parts(database, _amazon_query(items, categories)):
        length, same = rows["length"], rows["same_category"]
        dense = {
            "history_log_length": np.log1p(length),
            "category_in_history": same > 0,
            "category_log_count": np.log1p(same),
            "category_share": same / np.maximum(length, 1),
            "item_share": rows["same_item"] / np.maximum(length, 1),
            "category_log_distance": np.log1p(rows["distance"]),
        }
        tenth = 1 + PERIODS * rows["time"] // max(train_rows, 1)
        rows["week"] = np.where(rows["is_test"], PERIODS + 1, tenth)
        rows["page"] = 2 * rows["user"] + rows["is_test"]
        yield part(AMAZONELECTRONICS, rows, rows, dense, ("electronics",), sizes)


def _read_amazon(paths: list[Path], database: duckdb.DuckDBPyConnection) -> int:
    """Read both files into the table reviews; return the number of rows of the first."""
    ids = ("user_id", "item_id", "cate_id")
    items, categories = _split("item_history"), _split("cate_history")
    # How many items ago the category came last; one more than all of them where it never came
    distance = f"list_position(list_reverse({categories}), cate_id)"
    columns = [
        *ids,
        "label::VARCHAR::TINYINT AS label",
        f"{_length(items)} AS length, {items}[-1] AS last_item, {categories}[-1] AS last_category",
        f"{_number(items, 'item_id')} AS same_item",
        f"{_number(categories, 'cate_id')} AS same_category",
        f"coalesce(nullif({distance}, 0), {_length(categories)} + 1) AS distance",
    ]
    counts = []
    for is_test, path in enumerate(paths):
        select = ", ".join([*columns, f"{is_test} AS is_test"])
        read_table(database, "reviews", path, _REVIEW, select)
        counts.append(len(database.table("reviews")))
    require_values(database, "reviews", (*ids, "label"))
    return counts[0]


def _amazon_query(no_item: int, no_category: int) -> str:
    """Return SQL of the rows with codes, in the order of the files."""
    return f"""
        SELECT reviews.rowid AS time, label, is_test, length, same_item, same_category, distance,
            users.code AS "user", items.code AS item, categories.code AS category,
            coalesce(last_items.code, {no_item}) AS last_item,
            coalesce(last_categories.code, {no_category}) AS last_category,
            row_number() OVER (PARTITION BY user_id, is_test ORDER BY reviews.rowid) - 1 AS slot
        FROM reviews JOIN users USING (user_id) JOIN items USING (item_id)
            JOIN categories USING (cate_id)
            LEFT JOIN items AS last_items ON last_items.item_id = reviews.last_item
            LEFT JOIN categories AS last_categories
                ON last_categories.cate_id = reviews.last_category
        ORDER BY time"""


# Both


def _split(history: str) -> str:
    """Return SQL of a history as a list."""
    return f"string_split({history}, '^')"


def _length(items: str) -> str:
    """Return SQL of the length of a list, 0 of a missing one."""
    return f"coalesce(len({items}), 0)"


def _number(items: str, item: str) -> str:
    """Return SQL of how often a list has an item."""
    return _length(f"list_filter({items}, lambda x: x = {item})")
