"""EB-NeRD as a stream: is an article in view clicked, in the order of the pages.

An example is an article in view of an impression; its label says whether it was clicked, and its
group is the impression: what was on one page. Verticals are four surfaces: front page and article
page, on mobile devices (tablets among them) and on desktops. `week` counts days; the demo has
fourteen.

The data are those of Ekstra Bladet (Kruse et al., "EB-NeRD: A Large-Scale Dataset for News
Recommendation", RecSys Challenge 2024), for research, not to be redistributed. So they are not
included. Who has agreed to their terms gives the published folder, with `train/behaviors.parquet`,
`train/history.parquet` and the same two files in `validation/`. No other file is read. The built
stream stays in the cache folder.

A click counts for later examples once the page was left, read_time after it was opened, if that is
strictly before the example's own page was opened. The order of the articles in view is not used.
Letters in shapes: B examples.
"""

from __future__ import annotations

import hashlib
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

# After the script's own folder, as both have a report.py.
sys.path.insert(1, str(Path(__file__).parents[1] / "examples" / "promo_response"))

import data

FORMAT_VERSION = 2
SURFACES = tuple(
    f"{page}, {device}"
    for page in ("front page", "article page")
    for device in ("mobile", "desktop")
)
DESKTOP = 1  # of device_type
SPLITS = ("train", "validation")
COLUMNS = {
    "behaviors": {
        "impression_id": pl.Int64,
        "impression_time": pl.Datetime("us"),
        "article_id": pl.Int64,
        "read_time": pl.Float64,
        "device_type": pl.Int64,
        "article_ids_inview": pl.List(pl.Int64),
        "article_ids_clicked": pl.List(pl.Int64),
        "user_id": pl.Int64,
        "is_sso_user": pl.Boolean,
        "is_subscriber": pl.Boolean,
        "gender": pl.Int64,
        "age": pl.Int64,
        "postcode": pl.Int64,
    },
    "history": {
        "user_id": pl.Int64,
        "impression_time_fixed": pl.List(pl.Datetime("us")),
        "article_id_fixed": pl.List(pl.Int64),
    },
}
"""The columns that are read, and their types."""

USER_ATTRIBUTES = ("is_sso_user", "is_subscriber", "gender", "age", "postcode")
SEEN_KEYS = (("article",), ("user",), ("user", "article"))
WINDOW_HOURS = (1, 6, 24)

LEAN_SPARSE = ("user", "article", "device", "weekday", "hour")
LEAN_DENSE = (*data.LEAN_DENSE, "article_log_age", "log_in_view")
STRONG_DENSE = (
    *LEAN_DENSE,
    *(f"{'_'.join(key)}_{figure}" for key in SEEN_KEYS for figure in ("log_seen", "log_odds")),
)
RICH_SPARSE = (*LEAN_SPARSE, "surface", "page", *USER_ATTRIBUTES)
RICH_DENSE = (
    *STRONG_DENSE,
    *(f"page_article_{figure}" for figure in ("log_seen", "log_odds")),
    *(
        f"{figure}_{hours}h"
        for hours in WINDOW_HOURS
        for figure in ("log_clicks", "log_odds", "lead")
    ),
    *(f"{key}_log_{figure}" for key in ("user", "user_article") for figure in ("reads", "days")),
    "age_lead",
)

PRIOR_RATE, PRIOR_COUNT = 0.09, 10.0
"""A prior rate of clicks, fixed so that nothing looks ahead, and how many examples it counts as."""
_DAY_SECONDS = 86_400


class Tables(NamedTuple):
    """The raw tables: a row for each impression, and one for each article that a user has read.

    Attributes:
        behaviors: the columns of `COLUMNS`.
        reads: user_id, time (epoch seconds), article_id.
    """

    behaviors: pl.DataFrame
    reads: pl.DataFrame


def load_stream(folder: Path, cache: Path | None = None) -> data.Stream:
    """Return the stream of a published folder; build it in the cache folder the first time.

    Args:
        folder: has `train` and `validation`.
        cache: folder to keep the built stream in, by default that of the promotion stream. The
            arrays are memory-mapped from there, read-only.

    Raises:
        FileNotFoundError: one of the four files is missing.
        ValueError: one is of another form.
    """
    name = f"ebnerd-v{FORMAT_VERSION}-{digest(folder)[:12]}"
    built = (cache or data._default_cache()) / name
    if not built.exists():
        data.save(build_stream(read_tables(folder)), built)
    return data.load(built)


@lru_cache
def digest(folder: Path) -> str:
    """Return the SHA-256 of the four files' SHA-256."""
    files = [_file(folder, split, kind) for split in SPLITS for kind in COLUMNS]
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _file(folder: Path, split: str, kind: str) -> Path:
    path = folder / split / f"{kind}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"The folder of EB-NeRD should have {split}/{kind}.parquet. Received: {folder}, "
            "without it. Give the folder that `train` and `validation` of the demo were unpacked to"
        )
    return path


def read_tables(folder: Path) -> Tables:
    """Return the raw tables of both splits together."""
    behaviors, history = (
        pl.concat([_read(_file(folder, split, kind), COLUMNS[kind]) for split in SPLITS])
        for kind in ("behaviors", "history")
    )
    reads = history.select(
        "user_id", time="impression_time_fixed", article_id="article_id_fixed"
    ).explode("time", "article_id")
    # The second history repeats weeks of the first; a user without any has a row of nulls
    reads = reads.drop_nulls().with_columns(pl.col("time").dt.epoch("s")).unique()
    return Tables(behaviors, reads)


def _read(path: Path, columns: dict[str, pl.DataType]) -> pl.DataFrame:
    """Return columns of a file, cast to their types.

    Raises:
        ValueError: it is no parquet file, lacks a column, or has one of another type.
    """
    try:
        return pl.read_parquet(path, columns=list(columns)).cast(columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(
            f"{path} should be a parquet file as published for EB-NeRD, with {columns}. Received: "
            f"{error}. Download it again, or see whether the set has another version"
        ) from error


def build_stream(tables: Tables) -> data.Stream:
    """Return the stream of the given tables, sorted by time, impression and article.

    The order of the tables' rows does not matter, nor does that of the articles in view.

    Raises:
        ValueError: no impression, one that comes twice, one that lacks a time or a user, a clicked
            article that was not in view, or one that was in view twice.
    """
    shown = articles_in_view(tables.behaviors)
    time = shown["time"].to_numpy()
    words = {
        "user": shown["user_id"],
        "article": shown["article_id"],
        "device": shown["device_type"],
        "page": shown["page_id"],
        **{name: shown[name] for name in USER_ATTRIBUTES},
    }
    coded = {name: (column, column.drop_nulls().unique().sort()) for name, column in words.items()}
    sparse = {name: data.code(column, known) for name, (column, known) in coded.items()}
    sparse |= {name: shown[name].to_numpy() for name in ("weekday", "hour", "surface")}
    sparse = {name: sparse[name] for name in RICH_SPARSE}
    label = shown["label"].to_numpy()
    dense = data._clock(sparse) | _freshness(shown, tables.reads)
    dense |= _earlier_clicks(shown, sparse) | _reads(shown, tables.reads)
    return data.Stream(
        time=time,
        week=(1 + (time - time[0]) // _DAY_SECONDS).astype(np.int32),
        label=label,
        vertical=2 * sparse["surface"]
        + (shown["device_type"] == DESKTOP).fill_null(False).to_numpy(),
        weight=np.ones(len(time), np.float32),
        example_id=data.example_ids(
            shown["impression_id"].to_numpy(), shown["article_id"].to_numpy()
        ),
        sparse=sparse,
        dense={name: dense[name] for name in RICH_DENSE},
        verticals=SURFACES,
        cardinalities={name: len(known) + 1 for name, (_, known) in coded.items()}
        | {"weekday": 7, "hour": 24, "surface": 2},
    )


def left_seconds(folder: Path) -> data.Array:
    """Return when each example's page was left and its clicks are known, epoch seconds (B,)."""
    return articles_in_view(read_tables(folder).behaviors)["left"].to_numpy()


def articles_in_view(behaviors: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each impression and article in view, in order, with the clock (UTC)."""
    needed = ["impression_id", "impression_time", "user_id", "article_ids_inview"]
    lacking = behaviors.select(pl.any_horizontal(pl.col(needed).is_null()).sum()).item()
    twice = len(behaviors) - behaviors["impression_id"].n_unique()
    if not len(behaviors) or lacking or twice:
        raise ValueError(
            f"There should be impressions, none twice, all with {needed}. Received: "
            f"{len(behaviors)} impressions, {twice} of them again, {lacking} that lack a value"
        )
    at = pl.col("impression_time")
    pages = behaviors.with_columns(
        time=at.dt.epoch("s"),
        left=at.dt.epoch("s") + pl.col("read_time").fill_null(0).clip(0).ceil().cast(pl.Int64),
        weekday=at.dt.weekday().cast(pl.Int32) - 1,
        hour=at.dt.hour().cast(pl.Int32),
        surface=pl.col("article_id").is_not_null().cast(pl.Int32),
        in_view=pl.col("article_ids_inview").list.len(),
        clicks=pl.col("article_ids_clicked").list.n_unique().fill_null(0),
    ).rename({"article_id": "page_id", "article_ids_inview": "article_id"})
    shown = pages.filter(pl.col("in_view") > 0).explode("article_id")
    shown = shown.with_columns(
        label=pl.col("article_ids_clicked")
        .list.contains(pl.col("article_id"))
        .fill_null(False)
        .cast(pl.Float32)
    )
    repeated = shown.select(pl.struct("impression_id", "article_id").is_duplicated().sum()).item()
    outside = int(pages["clicks"].sum() - shown["label"].sum())
    if repeated or outside:
        raise ValueError(
            "An impression should have an article in view once, and clicks on those alone. "
            f"Received: {repeated} rows of articles twice in view, {outside} clicks on others"
        )
    return shown.sort("time", "impression_id", "article_id")


def _freshness(shown: pl.DataFrame, reads: pl.DataFrame) -> dict[str, data.Array]:
    """Return log1p of an article's age in hours, and of the number of articles in view.

    The age counts from when it was first in view or read. "age_lead" is its logarithm less the mean
    over the page. Float32 (B,).
    """
    known = pl.concat([shown.select("article_id", "time"), reads.select("article_id", "time")])
    first = known.group_by("article_id").agg(first=pl.col("time").min())
    joined = shown.join(first, on="article_id", how="left", maintain_order="left")
    hours = (joined["time"] - joined["first"]).to_numpy() / 3600
    age = np.log1p(hours).astype(np.float32)
    return {
        "article_log_age": age,
        "age_lead": _lead(age, shown["impression_id"].to_numpy()),
        "log_in_view": np.log1p(shown["in_view"].to_numpy()).astype(np.float32),
    }


def _earlier_clicks(shown: pl.DataFrame, sparse: dict[str, data.Array]) -> dict[str, data.Array]:
    """Return features of the pages that were left before this one was opened, float32 (B,).

    For each of `SEEN_KEYS`, and for the page's article with the one in view: log1p of how many
    examples had the same ids, and the log-odds of a click among them,

        log(clicks + PRIOR_RATE * PRIOR_COUNT) - log(others + (1 - PRIOR_RATE) * PRIOR_COUNT);

    for the article over the last hours: log1p of its clicks, the log-odds, and how far these lead
    over their mean of the page.
    """
    time, left = shown["time"].to_numpy(), shown["left"].to_numpy()
    clicked = shown["label"].to_numpy() == 1
    impression = shown["impression_id"].to_numpy()
    dense = {}

    def counts(group: data.Array, since: data.Array | None = None) -> tuple[data.Array, data.Array]:
        """Count examples and clicks that were known before (and not before `since`)."""
        parts = []
        for rows in (np.ones(len(time), bool), clicked):
            count, _ = data.earlier_purchases(group[rows], left[rows], group, time)
            if since is not None:
                count = count - data.earlier_purchases(group[rows], left[rows], group, since)[0]
            parts.append(count)
        return parts[0], parts[1]

    for key in (*SEEN_KEYS, ("page", "article")):
        shape = [1 + int(sparse[name].max()) for name in key]
        seen, clicks = counts(np.ravel_multi_index([sparse[name] for name in key], shape))
        dense[f"{'_'.join(key)}_log_seen"] = np.log1p(seen).astype(np.float32)
        dense[f"{'_'.join(key)}_log_odds"] = log_odds(seen, clicks)
    for hours in WINDOW_HOURS:
        seen, clicks = counts(sparse["article"].astype(np.int64), time - 3600 * hours)
        odds = log_odds(seen, clicks)
        dense[f"log_clicks_{hours}h"] = np.log1p(clicks).astype(np.float32)
        dense[f"log_odds_{hours}h"] = odds
        dense[f"lead_{hours}h"] = _lead(odds, impression)
    return dense


def log_odds(seen: data.Array, clicks: data.Array) -> data.Array:
    """Return the smoothed log-odds of a click, float32."""
    others = seen - clicks + (1 - PRIOR_RATE) * PRIOR_COUNT
    return np.log((clicks + PRIOR_RATE * PRIOR_COUNT) / others).astype(np.float32)


def _lead(values: data.Array, group: data.Array) -> data.Array:
    """Return values less their mean over the group, float32 (B,)."""
    _, code = np.unique(group, return_inverse=True)
    means = np.bincount(code, values) / np.bincount(code)
    return (values - means[code]).astype(np.float32)


def _reads(shown: pl.DataFrame, reads: pl.DataFrame) -> dict[str, data.Array]:
    """Return log1p of the user's earlier reads and of the days since; also of the article's.

    Float32 (B,); without an earlier one the days are `data.NEVER_DAYS`.
    """
    time = shown["time"].to_numpy()
    dense = {}
    for name, columns in (("user", ["user_id"]), ("user_article", ["user_id", "article_id"])):
        both = pl.concat([reads.select(columns), shown.select(columns)])
        group = both.select(pl.struct(columns).rank("dense")).to_series().cast(pl.Int64).to_numpy()
        count, days = (
            data.earlier_purchases(
                group[: len(reads)], reads["time"].to_numpy(), group[len(reads) :], time
            )
            if len(reads)
            else (np.zeros(len(time)), np.full(len(time), data.NEVER_DAYS))
        )
        dense[f"{name}_log_reads"] = np.log1p(count).astype(np.float32)
        dense[f"{name}_log_days"] = np.log1p(days).astype(np.float32)
    return dense
