"""Four published data sets as streams for the quality benchmark.

    taobaoad           TaobaoAd (Tianchi, data set 56): is an ad clicked, in the order of time
    kuaivideo          KuaiVideo_x1: is a micro-video clicked, in the order of time
    amazonelectronics  AmazonElectronics_x1: is a product reviewed, in no order of time
    criteo             Criteo's day_0 to day_23: is an ad clicked, in the order of time

The data are not included. Who has agreed to their terms gives the folder that the files were
unpacked to. A stream is built in the cache folder the first time, and memory-mapped afterwards;
`published_tables` keeps its memory small.

Features of the past are of rows with a strictly earlier time, so that rows of the same time do not
see each other. Means are smoothed towards a fixed rate, so that nothing looks ahead. An example's
group is what one user had in view at one time. Letters in shapes: B examples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
from published_histories import AMAZONELECTRONICS, KUAIVIDEO, amazonelectronics, kuaivideo
from published_tables import (
    FORMAT_VERSION,
    LABEL,
    Format,
    Names,
    code_columns,
    data,
    digest,
    earlier,
    load_or_build,
    make_codes,
    part,
    parts,
    past,
    read_table,
    require_files,
    require_once,
    require_values,
)

__all__ = (
    "AMAZONELECTRONICS",
    "CRITEO",
    "KUAIVIDEO",
    "TAOBAOAD",
    "amazonelectronics",
    "criteo",
    "kuaivideo",
    "taobaoad",
    "version",
)


@lru_cache
def version(folder: Path) -> tuple[int, str]:
    """Return the version of the streams' format, and the digest of a folder's files."""
    kinds = ("*.csv", "day_*")
    return FORMAT_VERSION, digest(sorted(path for kind in kinds for path in folder.glob(kind)))


NEVER_DAYS = 30.0
"""Days since the last example where there is none: longer than the data last."""
_DAY = 86_400

# TaobaoAd

_SAMPLE = {
    "user": "BIGINT",
    "time_stamp": "BIGINT",
    "adgroup_id": "BIGINT",
    "pid": "VARCHAR",
    "nonclk": "BIGINT",
    "clk": LABEL,
}
_AD = {
    "adgroup_id": "BIGINT",
    "cate_id": "BIGINT",
    "campaign_id": "BIGINT",
    "customer": "BIGINT",
    "brand": "BIGINT",
    "price": "DOUBLE",
}
_PROFILE = {
    "userid": "BIGINT",
    "cms_segid": "BIGINT",
    "cms_group_id": "BIGINT",
    "final_gender_code": "BIGINT",
    "age_level": "BIGINT",
    "pvalue_level": "BIGINT",
    "shopping_level": "BIGINT",
    "occupation": "BIGINT",
    "new_user_class_level": "BIGINT",
}
_AD_ATTRIBUTES = ("cate_id", "campaign_id", "customer", "brand")
_USER_ATTRIBUTES = tuple(_PROFILE)[1:]
_KEYS = {"user": '"user"', "ad": "ad", "user_category": '"user", cate_id'}
_CLICK_RATE = 0.05
_LOCAL = 8 * 3600  # seconds before UTC
_THURSDAY = 3  # of 1 January 1970

_LEAN_SPARSE = ("user", "ad", "cate_id", "placement", "weekday", "hour")
_LEAN_DENSE = (*data.LEAN_DENSE, "log_price")
_STRONG_DENSE = (
    *_LEAN_DENSE,
    *(f"{key}_{figure}" for key in _KEYS for figure in ("log_seen", "mean")),
)
TAOBAOAD = Format(
    lean=(_LEAN_SPARSE, _LEAN_DENSE),
    strong=(_LEAN_SPARSE, _STRONG_DENSE),
    rich=(
        (*_LEAN_SPARSE, *_AD_ATTRIBUTES[1:], *_USER_ATTRIBUTES),
        (*_STRONG_DENSE, *(f"{key}_log_days" for key in _KEYS)),
    ),
)


def taobaoad(folder: Path, cache: Path | None = None) -> data.Stream:
    """Return eight days of ads on Taobao, from three files of a folder.

    An example is an ad that a user had in view; its label says whether it was clicked. Verticals
    are the placements. `week` counts local days (UTC+8), from the first on. Rows are sorted by
    time, user, ad and placement; their order in the file does not matter.

    Args:
        folder: has raw_sample.csv, ad_feature.csv and user_profile.csv.
        cache: folder to keep the built stream in, by default that of the promotion stream.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one is of another form, or an ad is not in ad_feature.csv.
    """
    names = ("raw_sample.csv", "ad_feature.csv", "user_profile.csv")
    paths = require_files("TaobaoAd", folder, names)
    return load_or_build("taobaoad", paths, cache, partial(_taobaoad_parts, paths))


def _taobaoad_parts(
    paths: list[Path], database: duckdb.DuckDBPyConnection
) -> Iterator[data.Stream]:
    users, ads, placements = _read_taobaoad(paths, database)
    user_codes, user_sizes = code_columns(users, _USER_ATTRIBUTES)
    ad_codes, ad_sizes = code_columns(ads, _AD_ATTRIBUTES)
    counts = {"user": len(users), "ad": len(ads), "placement": len(placements)}
    sizes = {name: 1 + count for name, count in counts.items()} | user_sizes | ad_sizes
    sizes |= {"weekday": 7, "hour": 24}
    log_price = np.log1p(ads["price"].fill_null(0).clip(0).to_numpy())
    pages = users["before"].to_numpy()
    first_day = None
    for rows in parts(database, _taobaoad_query()):
        local = rows["time"] + _LOCAL
        first_day = local[0] // _DAY if first_day is None else first_day
        user, ad = rows["user"], rows["ad"]
        sparse = {"user": user, "ad": ad, "placement": rows["placement"]}
        sparse |= {"weekday": (local // _DAY + _THURSDAY) % 7, "hour": local % _DAY // 3600}
        sparse |= {name: codes[user] for name, codes in user_codes.items()}
        sparse |= {name: codes[ad] for name, codes in ad_codes.items()}
        dense = data._clock(sparse) | {"log_price": log_price[ad]}
        for key in _KEYS:
            dense |= past(key, rows, _CLICK_RATE)
            dense[f"{key}_log_days"] = _log_days(rows["time"], rows[f"{key}_last"])
        rows |= {"week": 1 + local // _DAY - first_day, "vertical": rows["placement"]}
        rows["page"] = pages[user] + rows["user_seen"]  # no other user has this number
        yield part(TAOBAOAD, rows, sparse, dense, placements, sizes)


def _read_taobaoad(
    paths: list[Path], database: duckdb.DuckDBPyConnection
) -> tuple[pl.DataFrame, pl.DataFrame, Names]:
    """Return users and ads that have rows, with attributes, in order of code; and placements."""
    columns = (
        '"user" AS user_id, time_stamp AS time, adgroup_id, pid, clk::VARCHAR::TINYINT AS label'
    )
    read_table(database, "samples", paths[0], _SAMPLE, columns)
    read_table(database, "features", paths[1], _AD)
    read_table(database, "profiles", paths[2], _PROFILE)
    require_values(database, "samples", ("user_id", "time", "adgroup_id", "pid", "label"))
    require_once(database, "features", "adgroup_id", paths[1])
    require_once(database, "profiles", "userid", paths[2])
    for table, key in (("users", "user_id"), ("ads", "adgroup_id"), ("placements", "pid")):
        make_codes(database, table, key, "samples")
    unknown = database.sql("SELECT adgroup_id FROM ads ANTI JOIN features USING (adgroup_id)")
    if len(unknown):
        raise ValueError(
            f"Every ad of {paths[0]} should be in {paths[1].name}. Received: {len(unknown)} ads "
            f"that are not, one of them {unknown.fetchall()[0][0]}. Unpack both files again"
        )
    users = database.sql("FROM users LEFT JOIN profiles ON userid = user_id ORDER BY code").pl()
    ads = database.sql("FROM ads JOIN features USING (adgroup_id) ORDER BY code").pl()
    placements = database.sql("FROM placements ORDER BY code").pl()["pid"]
    return users, ads, tuple(placements)


def _taobaoad_query() -> str:
    """Return SQL of the rows with codes and features of the past, in order."""
    columns, windows = zip(*(earlier(key, by) for key, by in _KEYS.items()), strict=True)
    return f"""
        WITH coded AS (
            SELECT time, label, users.code AS "user", ads.code AS ad, cate_id,
                placements.code AS placement
            FROM samples JOIN users USING (user_id) JOIN ads USING (adgroup_id)
                JOIN features USING (adgroup_id) JOIN placements USING (pid))
        SELECT *, {", ".join(columns)},
            row_number() OVER (PARTITION BY "user", time ORDER BY ad, placement, label) - 1 AS slot
        FROM coded WINDOW {", ".join(windows)} ORDER BY time, "user", slot"""


def _log_days(time: data.Array, last: data.Array) -> data.Array:
    """Return log1p of the days since the last example; of NEVER_DAYS where that is NaN."""
    return np.log1p(np.where(np.isnan(last), NEVER_DAYS, (time - last) / _DAY))


# Criteo

_INTEGERS = tuple(f"int_{k}" for k in range(1, 14))
_CATEGORIES = tuple(f"cat_{k}" for k in range(1, 27))
_CLICK = {
    "label": LABEL,
    **dict.fromkeys(_INTEGERS, "BIGINT"),
    **dict.fromkeys(_CATEGORIES, "VARCHAR"),
}
BUCKETS = 2**18
"""Ids of a category of Criteo; a missing value has one more."""


def _with_missing(integers: Names) -> Names:
    return tuple(f"{name}_{figure}" for name in integers for figure in ("log", "missing"))


CRITEO = Format(
    lean=(_CATEGORIES[:8], _with_missing(_INTEGERS[:4])),
    strong=(_CATEGORIES[:13], _with_missing(_INTEGERS)),
    rich=(_CATEGORIES, _with_missing(_INTEGERS)),
)


def criteo(folder: Path, cache: Path | None = None) -> data.Stream:
    """Return days of display ads, from consecutive files among day_0 to day_23, also with .gz.

    The label says whether the ad was clicked. `week` counts days; 1 is that of day_0. The order
    within a day is that of the file. As rows have no time, `time` spreads those of a day over its
    seconds, counted from the start of day_0. An integer becomes log1p, of 0 where it is negative,
    and a flag where it is missing. A category is a hash, and becomes its remainder by `BUCKETS`. No
    example is in view with another, and there is one vertical.

    Args:
        folder: has the files of the days.
        cache: folder to keep the built stream in, by default that of the promotion stream.

    Raises:
        FileNotFoundError: there is no file of a day.
        ValueError: one is of another form, or a day between two others is missing.
    """
    days = _criteo_days(folder)
    return load_or_build("criteo", list(days.values()), cache, partial(_criteo_parts, days))


def _criteo_days(folder: Path) -> dict[int, Path]:
    """Return the files by day; of a day that comes twice, the one without .gz."""
    paths = sorted(folder.glob("day_*"), reverse=True)
    named = ((re.fullmatch(r"day_(\d+)(\.gz)?", path.name), path) for path in paths)
    days = {int(match[1]): path for match, path in named if match}
    if not days:
        raise FileNotFoundError(
            "The folder of Criteo should have files such as day_0 or day_0.gz. "
            f"Received: {folder}, without one. Give the folder that they were downloaded to"
        )
    if max(days) - min(days) + 1 != len(days):
        raise ValueError(
            f"The days of Criteo in {folder} should follow each other. Received: {sorted(days)}. "
            "Add the days between them, or move those of one side elsewhere"
        )
    return dict(sorted(days.items()))


def _criteo_parts(
    days: dict[int, Path], database: duckdb.DuckDBPyConnection
) -> Iterator[data.Stream]:
    hashes = [
        f"coalesce(('0x' || {c})::UINTEGER % {BUCKETS}, {BUCKETS}) AS {c}" for c in _CATEGORIES
    ]
    logs = [f"ln(1 + coalesce(greatest({i}, 0), 0)) AS {i}_log" for i in _INTEGERS]
    missing = [f"{i} IS NULL AS {i}_missing" for i in _INTEGERS]
    columns = ", ".join(["label::VARCHAR::TINYINT AS label", *hashes, *logs, *missing])
    sizes = dict.fromkeys(_CATEGORIES, BUCKETS + 1)
    earlier_rows = 0
    for day, path in days.items():
        read_table(database, "clicks", path, _CLICK, columns, delimiter="\t", header=False)
        total, first = require_values(database, "clicks", ("label",)), earlier_rows
        for rows in parts(database, "FROM clicks"):  # in the order of the file
            size = len(rows["label"])
            rows["page"] = earlier_rows + np.arange(size)
            rows["slot"] = np.zeros(size, np.int64)
            rows["week"] = np.full(size, day + 1)
            rows["time"] = day * _DAY + (rows["page"] - first) * _DAY // total
            yield part(CRITEO, rows, rows, rows, ("ads",), sizes)
            earlier_rows += size
        database.execute("DROP TABLE clicks")
