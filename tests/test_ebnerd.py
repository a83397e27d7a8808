"""EB-NeRD as a stream, against plain Python on small files in the published form."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from stream_form import assert_types

with pytest.MonkeyPatch.context() as patch:  # undone: beside data.py is a models.py
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import ebnerd
    from ebnerd import data

START = datetime(2023, 5, 18, 7, 0, 3)  # a Thursday
ARTICLES = [9_700_000 + 7 * k for k in range(9)]
HOUR = 3600


@dataclass(frozen=True)
class Page:
    """An impression: an article page where `page` is an article, a front page where it is None."""

    number: int
    user: int
    time: int  # seconds after START
    in_view: tuple[int, ...]
    clicked: tuple[int, ...]
    page: int | None = None
    read_time: float = 20.0


def random_pages(seed: int = 0) -> list[Page]:
    """Sixty over nine days, several in one second, in no order."""
    rng = random.Random(seed)
    times = [0, *(rng.randrange(9 * 24 * HOUR) for _ in range(15)), *range(5000, 40000, 2500)]
    pages = []
    for number in range(60):
        in_view = tuple(rng.sample(ARTICLES, rng.randint(2, 6)))
        clicked = tuple(rng.sample(in_view, rng.choice((0, 1, 1, 1, 2))))
        page = rng.choice((None, None, *ARTICLES))
        read_time = rng.choice((0.0, 3.5, 200.0, 4000.0))
        time = 0 if number == 7 else rng.choice(times)
        user = rng.choice((11, 5, 70_000))
        pages.append(Page(number * 3 + 1, user, time, in_view, clicked, page, read_time))
    return rng.sample(pages, len(pages))


READS = {  # by user: seconds after START and article
    5: [(-9 * 24 * HOUR, ARTICLES[0]), (-50, ARTICLES[8]), (6000, ARTICLES[8])],
    11: [(-3000, ARTICLES[3]), (-3000, ARTICLES[4]), (70_000, ARTICLES[3])],
}


def write_folder(folder: Path, pages: list[Page], split_at: int = 6 * 24 * HOUR) -> Path:
    """Both splits; the second history repeats the first one's reads, and has those since."""
    parts = {
        "train": ([p for p in pages if p.time < split_at], 0),
        "validation": ([p for p in pages if p.time >= split_at], split_at),
    }
    for split, (part, until) in parts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        behaviors(part).write_parquet(folder / split / "behaviors.parquet")
        history(until).write_parquet(folder / split / "history.parquet")
    return folder


def behaviors(pages: list[Page]) -> pl.DataFrame:
    lists = pl.List(pl.Int32)
    columns = {
        "impression_id": (pl.UInt32, [p.number for p in pages]),
        "article_id": (pl.Int32, [p.page for p in pages]),
        "impression_time": (pl.Datetime("us"), [START + timedelta(seconds=p.time) for p in pages]),
        "read_time": (pl.Float32, [p.read_time for p in pages]),
        "scroll_percentage": (pl.Float32, [None for _ in pages]),
        "device_type": (pl.Int8, [1 + p.user % 3 for p in pages]),
        "article_ids_inview": (lists, [list(p.in_view) for p in pages]),
        "article_ids_clicked": (lists, [list(p.clicked) for p in pages]),
        "user_id": (pl.UInt32, [p.user for p in pages]),
        "is_sso_user": (pl.Boolean, [p.user == 5 for p in pages]),
        "gender": (pl.Int8, [None if p.user == 5 else 1 for p in pages]),
        "postcode": (pl.Int8, [None for _ in pages]),
        "age": (pl.Int8, [20 if p.user == 11 else None for p in pages]),
        "is_subscriber": (pl.Boolean, [False for _ in pages]),
        "session_id": (pl.UInt32, [1 for _ in pages]),
    }
    return pl.DataFrame({name: pl.Series(v, dtype=t) for name, (t, v) in columns.items()})


def history(until: int) -> pl.DataFrame:
    reads = {user: [r for r in of if r[0] < until] for user, of in READS.items()}
    times = [[START + timedelta(seconds=t) for t, _ in of] for of in reads.values()]
    articles = [[article for _, article in of] for of in reads.values()]
    return pl.DataFrame(
        {
            "user_id": pl.Series(list(reads), dtype=pl.UInt32),
            "impression_time_fixed": pl.Series(times, dtype=pl.List(pl.Datetime("us"))),
            "article_id_fixed": pl.Series(articles, dtype=pl.List(pl.Int32)),
            "read_time_fixed": pl.Series([[1.0] * len(a) for a in articles]),
        }
    )


def stream_of(folder: Path, pages: list[Page]) -> data.Stream:
    return ebnerd.build_stream(ebnerd.read_tables(write_folder(folder, pages)))


@dataclass(frozen=True)
class Row:
    """What a row of the stream should be of."""

    page: Page
    article: int

    @property
    def label(self) -> int:
        return int(self.article in self.page.clicked)

    @property
    def left(self) -> int:
        return self.page.time + math.ceil(self.page.read_time)


def rows_of(pages: list[Page]) -> list[Row]:
    """In the order of the stream: by time, impression and article."""
    rows = [Row(page, article) for page in pages for article in page.in_view]
    return sorted(rows, key=lambda row: (row.page.time, row.page.number, row.article))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return rows_of(random_pages())


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> data.Stream:
    return stream_of(tmp_path_factory.mktemp("ebnerd"), random_pages())


def assert_same(one: data.Stream, other: data.Stream) -> None:
    first, second = data._columns(one), data._columns(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype, name
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert one.verticals == other.verticals
    assert one.cardinalities == other.cardinalities


def test_rows_are_the_articles_in_view_in_order(stream: data.Stream, rows: list[Row]) -> None:
    assert len(stream) == len(rows) > 150
    first = int(START.replace(tzinfo=timezone.utc).timestamp())
    for at, row in enumerate(rows):
        assert stream.time[at] == first + row.page.time
        assert stream.week[at] == 1 + row.page.time // (24 * HOUR)
        assert stream.label[at] == row.label
        assert stream.group[at] == row.page.number
        assert stream.example_id[at] == row.page.number * 2**25 + row.article
        on_desktop = row.page.user % 3 == 0  # device type 1; 2 and 3 are mobile
        assert stream.vertical[at] == 2 * (row.page.page is not None) + on_desktop
        moment = START + timedelta(seconds=row.page.time)
        assert stream.sparse["weekday"][at] == moment.weekday()
        assert stream.sparse["hour"][at] == moment.hour
    assert set(stream.label.tolist()) == {0.0, 1.0}
    assert len(set(stream.example_id.tolist())) == len(stream)
    assert stream.weight.tolist() == [1.0] * len(stream)


def test_the_columns_have_their_types(stream: data.Stream) -> None:
    assert_types(stream)
    assert set(stream.sparse) == set(ebnerd.RICH_SPARSE)
    assert set(stream.dense) == set(ebnerd.RICH_DENSE)
    assert set(ebnerd.LEAN_SPARSE) < set(ebnerd.RICH_SPARSE)
    assert set(ebnerd.LEAN_DENSE) < set(ebnerd.STRONG_DENSE) < set(ebnerd.RICH_DENSE)
    assert stream.verticals == (
        "front page, mobile",
        "front page, desktop",
        "article page, mobile",
        "article page, desktop",
    )


def test_sparse_ids_are_ranks_of_the_raw_values(stream: data.Stream, rows: list[Row]) -> None:
    raw = {
        "user": [row.page.user for row in rows],
        "article": [row.article for row in rows],
        "device": [1 + row.page.user % 3 for row in rows],
        "page": [row.page.page for row in rows],
        "gender": [None if row.page.user == 5 else 1 for row in rows],
        "postcode": [None for _ in rows],
    }
    for name, values in raw.items():
        known = sorted({value for value in values if value is not None})
        expected = [len(known) if value is None else known.index(value) for value in values]
        assert stream.sparse[name].tolist() == expected, name
        assert stream.cardinalities[name] == len(known) + 1


KEYS = {
    "article": lambda row: row.article,
    "user": lambda row: row.page.user,
    "user_article": lambda row: (row.page.user, row.article),
    "page_article": lambda row: (row.page.page, row.article),
}


def log_odds(earlier: list[Row]) -> float:
    clicks = sum(row.label for row in earlier)
    return math.log((clicks + 0.9) / (len(earlier) - clicks + 9.1))


@pytest.mark.parametrize("key", KEYS)
def test_clicks_count_once_their_page_was_left(
    stream: data.Stream, rows: list[Row], key: str
) -> None:
    of = KEYS[key]
    parts = [[r for r in rows if of(r) == of(here) and r.left < here.page.time] for here in rows]
    assert 0 == min(map(len, parts)) < max(map(len, parts))
    seen = [math.log1p(len(part)) for part in parts]
    np.testing.assert_allclose(stream.dense[f"{key}_log_seen"], seen, rtol=1e-6)
    odds = list(map(log_odds, parts))
    np.testing.assert_allclose(stream.dense[f"{key}_log_odds"], odds, rtol=1e-6)


@pytest.mark.parametrize("hours", ebnerd.WINDOW_HOURS)
def test_the_last_hours_of_an_article(stream: data.Stream, rows: list[Row], hours: int) -> None:
    parts = [
        [
            r
            for r in rows
            if r.article == here.article
            and here.page.time - hours * HOUR <= r.left < here.page.time
        ]
        for here in rows
    ]
    clicks = [math.log1p(sum(row.label for row in part)) for part in parts]
    odds = np.array(list(map(log_odds, parts)))
    assert max(clicks) > 0
    np.testing.assert_allclose(stream.dense[f"log_clicks_{hours}h"], clicks, rtol=1e-6)
    np.testing.assert_allclose(stream.dense[f"log_odds_{hours}h"], odds, rtol=1e-6)
    pages = np.array([row.page.number for row in rows])
    lead = [odds[at] - odds[pages == pages[at]].mean() for at in range(len(rows))]
    np.testing.assert_allclose(stream.dense[f"lead_{hours}h"], lead, rtol=1e-4, atol=1e-6)


def test_what_was_read_and_how_old_it_is(stream: data.Stream, rows: list[Row]) -> None:
    known = [(t, user, article) for user, reads in READS.items() for t, article in reads]
    for at, row in enumerate(rows):
        now = row.page.time
        earlier = [r for r in known if r[1] == row.page.user and r[0] < now]
        same = [r for r in earlier if r[2] == row.article]
        for name, reads in (("user", earlier), ("user_article", same)):
            days = (now - max(r[0] for r in reads)) / 86_400 if reads else 366
            assert stream.dense[f"{name}_log_reads"][at] == pytest.approx(math.log1p(len(reads)))
            assert stream.dense[f"{name}_log_days"][at] == pytest.approx(math.log1p(days), rel=1e-5)
        moments = [r[0] for r in known if r[2] == row.article]
        moments += [r.page.time for r in rows if r.article == row.article]
        age = math.log1p((now - min(moments)) / HOUR)
        assert stream.dense["article_log_age"][at] == pytest.approx(age, rel=1e-5, abs=1e-6)
        in_view = math.log1p(len(row.page.in_view))
        assert stream.dense["log_in_view"][at] == pytest.approx(in_view)


@pytest.mark.parametrize("at", [0, 60, 120, -1])
def test_nothing_looks_ahead(stream: data.Stream, rows: list[Row], at: int, tmp_path: Path) -> None:
    """Neither to the labels of the same second, nor to those of pages that are still read."""
    now = rows[at].page.time

    def turned(page: Page) -> Page:
        known = page.time + math.ceil(page.read_time) < now
        clicked = page.clicked if known else set(page.in_view) - set(page.clicked)
        return replace(page, clicked=tuple(clicked))

    other = stream_of(tmp_path / "turned", [turned(page) for page in random_pages()])
    seen = np.array([row.page.time <= now for row in rows])
    assert (other.label[seen] != stream.label[seen]).any()
    for name, values in {**other.sparse, **other.dense}.items():
        mine = {**stream.sparse, **stream.dense}[name]
        np.testing.assert_array_equal(values[seen], mine[seen], err_msg=name)
    if not seen.all():
        assert (other.dense["article_log_odds"] != stream.dense["article_log_odds"]).any()
    part = stream_of(tmp_path / "part", [page for page in random_pages() if page.time <= now])
    for name, values in part.dense.items():
        np.testing.assert_array_equal(values, stream.dense[name][seen], err_msg=name)


def test_same_stream_in_any_order(stream: data.Stream, tmp_path: Path) -> None:
    tables = ebnerd.read_tables(write_folder(tmp_path, random_pages()))
    shuffled = ebnerd.Tables(*(t.sample(fraction=1, shuffle=True, seed=1) for t in tables))
    lists = pl.col("article_ids_inview").list.sort()
    ordered = shuffled._replace(behaviors=shuffled.behaviors.with_columns(lists))
    assert_same(ebnerd.build_stream(ordered), stream)


def test_it_is_built_once_for_each_folder(stream: data.Stream, tmp_path: Path) -> None:
    folder, cache = write_folder(tmp_path / "a", random_pages()), tmp_path / "cache"
    assert_same(ebnerd.load_stream(folder, cache), stream)
    again = ebnerd.load_stream(folder, cache)
    assert_same(again, stream)
    assert not again.time.flags.writeable and len(list(cache.iterdir())) == 1
    other = write_folder(tmp_path / "b", random_pages()[1:])
    assert len(ebnerd.load_stream(other, cache)) < len(stream)
    assert len(list(cache.iterdir())) == 2


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    (write_folder(tmp_path, random_pages()) / "validation" / "history.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"validation/history\.parquet.*Give the folder"):
        ebnerd.load_stream(tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("how", "received"),
    [
        (lambda path: path.write_text("no parquet") and None, "magic|parquet"),
        (lambda path: rewrite(path, lambda t: t.drop("read_time")), "read_time"),
        (lambda path: rewrite(path, lambda t: t.with_columns(user_id=pl.lit("a"))), "user_id|str"),
    ],
)
def test_another_form_is_refused(
    how: Callable[[Path], object], received: str, tmp_path: Path
) -> None:
    path = write_folder(tmp_path, random_pages()) / "train" / "behaviors.parquet"
    how(path)
    with pytest.raises(ValueError, match=f"(?s)behaviors.parquet should be.*{received}"):
        ebnerd.read_tables(tmp_path)


def rewrite(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    change(pl.read_parquet(path)).write_parquet(path)


PAGE = Page(1, 5, 0, (ARTICLES[0], ARTICLES[1]), (ARTICLES[0],))


@pytest.mark.parametrize(
    ("pages", "received"),
    [
        ([], "0 impressions"),
        ([PAGE, PAGE], "1 of them again"),
        ([replace(PAGE, clicked=(ARTICLES[2],))], "1 clicks on others"),
        ([replace(PAGE, in_view=(ARTICLES[0], ARTICLES[0]))], "2 rows of articles twice"),
    ],
)
def test_pages_that_make_no_sense_are_refused(
    pages: list[Page], received: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=received):
        stream_of(tmp_path, pages)
