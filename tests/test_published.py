"""Published data sets as streams, against plain Python on small files in the published form."""

from __future__ import annotations

import gzip
import math
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from stream_form import assert_types

with pytest.MonkeyPatch.context() as patch:  # undone: beside data.py is a models.py
    patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import published
    import published_tables
    from published_tables import data

DAY = 86_400


def write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stream of a few rows is of several parts."""
    monkeypatch.setattr(published_tables, "PART_ROWS", 7)


def ranks(values: Sequence[object]) -> list[int]:
    """The code of each value; of None the number of known ones."""
    known = sorted({value for value in values if value is not None})
    return [len(known) if value is None else known.index(value) for value in values]


def smoothed(labels: Sequence[int], prior: float) -> float:
    return (sum(labels) + 10 * prior) / (len(labels) + 10)


def assert_form(stream: data.Stream, features: published.Format) -> None:
    """What the stream of any data set has in common."""
    assert_types(stream)
    assert stream.weight.tolist() == [1.0] * len(stream)
    assert len(set(stream.example_id.tolist())) == len(stream)
    assert (np.diff(stream.time) >= 0).all() and (np.diff(stream.week) >= 0).all()
    assert set(features.rich[0]) == set(stream.sparse)
    assert set(features.rich[1]) == set(stream.dense)
    for less, more in ((features.lean, features.strong), (features.strong, features.rich)):
        assert all(set(a) <= set(b) for a, b in zip(less, more, strict=True)) and less != more


def assert_dense(stream: data.Stream, name: str, expected: Sequence[float]) -> None:
    assert len(set(expected)) > 1, name
    np.testing.assert_allclose(stream.dense[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def assert_same(one: data.Stream, other: data.Stream) -> None:
    first, second = data._columns(one), data._columns(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert one.verticals == other.verticals and one.cardinalities == other.cardinalities


# TaobaoAd


class Shown(NamedTuple):
    user: int
    time: int
    ad: int
    pid: str
    click: int


FIRST = 1_494_000_300  # 6 May 2017, a Saturday, 00:05 in China and Friday in UTC
ADS = {  # category, campaign, customer, brand and price
    1: (9, 50, 7, "NULL", "170.0"),
    2: (9, 51, 7, "95471", "0.5"),
    30: (4520, 51, 8, "100", "1E8"),
    846_811: (7, 52, 9, "95471", "12.99"),
}
PROFILES = {  # all that user_profile.csv has
    581_738: ("0", "5", "2", "2", "", "3", "0", ""),
    12: ("13", "5", "2", "2", "1", "3", "0", "3"),
    9: ("96", "10", "1", "4", "3", "1", "1", "4"),
    777: ("1", "10", "1", "4", "2", "1", "1", "1"),  # has seen nothing
}
HEADER = (
    "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,"
    "occupation,new_user_class_level "
)


def random_shown(seed: int = 0) -> list[Shown]:
    """A hundred in three days; some in the same second, one twice with another label."""
    rng = random.Random(seed)
    times = [FIRST, *(FIRST + rng.randrange(3 * DAY) for _ in range(20))]
    rows = [
        Shown(
            rng.choice((581_738, 12, 9, 1_141_729)),
            FIRST if k == 0 else rng.choice(times),
            rng.choice(list(ADS)),
            rng.choice(("430548_1007", "430539_1007")),
            int(rng.random() < 0.3),
        )
        for k in range(98)
    ]
    rows += [rows[5], rows[6]._replace(click=1 - rows[6].click)]
    return rng.sample(rows, len(rows))


def write_taobaoad(folder: Path, rows: Sequence[Shown]) -> Path:
    lines = [f"{r.user},{r.time},{r.ad},{r.pid},{1 - r.click},{r.click}" for r in rows]
    write(folder / "raw_sample.csv", ["user,time_stamp,adgroup_id,pid,nonclk,clk", *lines])
    lines = [f"{ad},{','.join(map(str, values))}" for ad, values in ADS.items()]
    header = "adgroup_id,cate_id,campaign_id,customer,brand,price"
    write(folder / "ad_feature.csv", [header, *lines])
    lines = [f"{user},{','.join(values)}" for user, values in PROFILES.items()]
    write(folder / "user_profile.csv", [HEADER, *lines])
    return folder


@pytest.fixture(scope="module")
def shown() -> list[Shown]:
    """In the order of the stream."""
    return sorted(random_shown(), key=lambda r: (r.time, r.user, r.ad, r.pid, r.click))


@pytest.fixture
def taobaoad(tmp_path: Path) -> data.Stream:
    return published.taobaoad(write_taobaoad(tmp_path / "raw", random_shown()), tmp_path)


def test_taobaoad_has_the_rows_in_order(taobaoad: data.Stream, shown: list[Shown]) -> None:
    assert_form(taobaoad, published.TAOBAOAD)
    assert len(taobaoad) == 100
    assert taobaoad.verticals == ("430539_1007", "430548_1007")
    for at, row in enumerate(shown):
        assert taobaoad.time[at] == row.time
        assert taobaoad.label[at] == row.click
        assert taobaoad.verticals[taobaoad.vertical[at]] == row.pid
        moment = datetime.fromtimestamp(row.time, timezone(timedelta(hours=8)))
        assert taobaoad.week[at] == moment.day - 5
        assert taobaoad.sparse["weekday"][at] == moment.weekday()
        assert taobaoad.sparse["hour"][at] == moment.hour
    assert len(set(taobaoad.week.tolist())) > 2
    views = [(row.user, row.time) for row in shown]
    assert max(map(views.count, views)) > 2
    for at, group in enumerate(taobaoad.group):
        same = [views[k] for k in np.flatnonzero(taobaoad.group == group)]
        assert same == [views[at]] * views.count(views[at])


def test_taobaoad_codes_are_ranks(taobaoad: data.Stream, shown: list[Shown]) -> None:
    raw = {
        "user": [row.user for row in shown],
        "ad": [row.ad for row in shown],
        "placement": [row.pid for row in shown],
    }
    for at, name in enumerate(("cate_id", "campaign_id", "customer", "brand")):
        values = [ADS[row.ad][at] for row in shown]
        raw[name] = [None if value == "NULL" else int(value) for value in values]
    for at, name in enumerate(HEADER.strip().split(",")[1:]):
        profiles = [PROFILES.get(row.user, [""] * 8)[at] for row in shown]
        raw[name] = [int(value) if value else None for value in profiles]
    for name, values in raw.items():
        assert taobaoad.sparse[name].tolist() == ranks(values), name
        assert taobaoad.cardinalities[name] == len({*values, None}), name
    assert_dense(taobaoad, "log_price", [math.log1p(float(ADS[row.ad][4])) for row in shown])
    hours = taobaoad.sparse["hour"]
    assert_dense(taobaoad, "hour_sin", [math.sin(2 * math.pi * hour / 24) for hour in hours])


@pytest.mark.parametrize(
    ("key", "ids"),
    [
        ("user", lambda row: row.user),
        ("ad", lambda row: row.ad),
        ("user_category", lambda row: (row.user, ADS[row.ad][0])),
    ],
)
def test_taobaoad_looks_at_strictly_earlier_rows(
    taobaoad: data.Stream, shown: list[Shown], key: str, ids: Callable[[Shown], Hashable]
) -> None:
    pasts = [[r for r in shown if ids(r) == ids(here) and r.time < here.time] for here in shown]
    assert_dense(taobaoad, f"{key}_log_seen", [math.log1p(len(past)) for past in pasts])
    means = [smoothed([r.click for r in past], 0.05) for past in pasts]
    assert_dense(taobaoad, f"{key}_mean", means)
    days = [
        (here.time - past[-1].time) / DAY if past else 30
        for here, past in zip(shown, pasts, strict=True)
    ]
    assert_dense(taobaoad, f"{key}_log_days", np.log1p(days).tolist())


def test_a_stream_is_built_once_for_its_files(tmp_path: Path) -> None:
    folder, cache = write_taobaoad(tmp_path / "one", random_shown()), tmp_path / "cache"
    built = published.taobaoad(folder, cache)
    names = [path.name for path in cache.iterdir()]
    assert len(names) == 1 and names[0].startswith("taobaoad-v1-")
    made = (cache / names[0]).stat().st_mtime_ns
    again = published.taobaoad(folder, cache)
    assert_same(again, built)
    assert (cache / names[0]).stat().st_mtime_ns == made
    assert not again.time.flags.writeable
    other = write_taobaoad(tmp_path / "two", random_shown(seed=1))
    assert len(published.taobaoad(other, cache)) == len(built)
    assert len(list(cache.iterdir())) == 2


def test_a_file_is_known_by_its_name_its_size_and_both_ends(tmp_path: Path) -> None:
    def digest_of(name: str, ends: tuple[str, str], size: int) -> str:
        (tmp_path / name).write_text(ends[0] + "." * size + ends[1])
        return published_tables.digest([tmp_path / name])

    kinds = [
        ("a", ("1", "2"), 3 * 2**20),
        ("b", ("1", "2"), 3 * 2**20),
        ("a", ("0", "2"), 3 * 2**20),
        ("a", ("1", "0"), 3 * 2**20),
        ("a", ("1", "2"), 3 * 2**20 + 1),
    ]
    digests = [digest_of(*kind) for kind in kinds]
    assert len(set(digests)) == len(kinds)
    assert digest_of(*kinds[0]) == digests[0]


def test_a_stream_that_another_process_has_built_since_is_kept(
    tmp_path: Path, taobaoad: data.Stream
) -> None:
    paths, cache = [tmp_path / "raw" / "raw_sample.csv"], tmp_path / "cache"

    def late(_: object) -> Iterator[data.Stream]:
        published_tables.load_or_build("one", paths, cache, lambda _: iter([taobaoad]))
        yield taobaoad.select(slice(5))

    assert_same(published_tables.load_or_build("one", paths, cache, late), taobaoad)
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_takes_no_folder_is_told(
    tmp_path: Path, taobaoad: data.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    paths = [tmp_path / "raw" / "raw_sample.csv"]
    with pytest.raises(PermissionError, match="read-only"):
        published_tables.load_or_build("one", paths, tmp_path / "c", lambda _: iter([taobaoad]))


def test_in_any_order_of_rows_and_in_any_parts(
    taobaoad: data.Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_tables, "PART_ROWS", 1000)
    turned = write_taobaoad(tmp_path / "turned", random_shown()[::-1])
    assert_same(published.taobaoad(turned, tmp_path / "cache"), taobaoad)


def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Received: 0 rows"):
        published.taobaoad(write_taobaoad(tmp_path / "raw", []), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["raw_sample.csv", "ad_feature.csv", "user_profile.csv"])
def test_taobaoad_without_a_file(tmp_path: Path, name: str) -> None:
    (write_taobaoad(tmp_path, random_shown()) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"TaobaoAd should have.*without {name}. Give"):
        published.taobaoad(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "old", "new", "received"),
    [
        ("raw_sample.csv", "nonclk,clk", "clk,nonclk", "should name.*'nonclk', 'clk'.*Received"),
        ("user_profile.csv", ",occupation", "", "first line of .*user_profile.csv should name"),
        ("raw_sample.csv", "0,1\n", "0,2\n", r"Line: \d+.*\"2\" to 'ENUM\('0', '1'\)'"),
        ("raw_sample.csv", "0,1\n", "0,\n", "100 rows, [1-9][0-9]* that lack a value"),
        ("raw_sample.csv", f",{FIRST},", ",yesterday,", "time_stamp.*\"yesterday\" to 'BIGINT'"),
        ("raw_sample.csv", f",{FIRST},", f",{FIRST},1,", "Columns: 6 Found: 7"),
        ("ad_feature.csv", ",12.99", "", "Columns: 6 Found: 5"),
        ("ad_feature.csv", "846811,", "846812,", "1 ads that are not, one of them 846811"),
        ("ad_feature.csv", "30,45", "2,45", "each adgroup_id in one row. Received: 4 rows of 3"),
        ("user_profile.csv", "\n12,", "\n9,", "each userid in one row. Received: 4 rows of 3"),
    ],
)
def test_taobaoad_of_another_form(
    tmp_path: Path, name: str, old: str, new: str, received: str
) -> None:
    path = write_taobaoad(tmp_path, random_shown()) / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"(?s){received}"):
        published.taobaoad(tmp_path, tmp_path / "cache")


# KuaiVideo


class Video(NamedTuple):
    stamp: str
    user: str
    item: str
    click: int
    like: int
    follow: int
    liked: str
    passed: str

    @property
    def time(self) -> float:
        return float(self.stamp)


VIDEO_HEADER = "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items"
VIDEOS = ("10", "9", "3239533", "77")


def random_videos(seed: int = 0) -> list[Video]:
    """In no order; an item of a history may be no row's item, and a history may be empty."""
    rng = random.Random(seed)
    stamps = [str(rng.randrange(10**12)) for _ in range(20)] + ["0.25"]

    def history() -> str:
        return "^".join(rng.choice((*VIDEOS, "5")) for _ in range(rng.choice((0, 1, 3, 100))))

    rows = []
    for _ in range(90):
        labels = (int(rng.random() < rate) for rate in (0.4, 0.3, 0.3))
        ids = rng.choice(stamps), rng.choice(("0", "9999", "12")), rng.choice(VIDEOS)
        rows.append(Video(*ids, *labels, history(), history()))
    return rows


def write_splits(folder: Path, header: str, rows: Sequence[Sequence[object]], train: int) -> Path:
    lines = [",".join(map(str, row)) for row in rows]
    write(folder / "train.csv", [header, *lines[:train]])
    write(folder / "test.csv", [header, *lines[train:]])
    return folder


def write_kuaivideo(folder: Path, rows: Sequence[Video]) -> Path:
    return write_splits(folder, VIDEO_HEADER, rows, train=70)


@pytest.fixture(scope="module")
def videos() -> list[Video]:
    """In the order of the stream: sorted() leaves those that are alike as in the files."""
    return sorted(random_videos(), key=lambda r: (r.time, r.user, r.item))


@pytest.fixture
def kuaivideo(tmp_path: Path) -> data.Stream:
    return published.kuaivideo(write_kuaivideo(tmp_path / "raw", random_videos()), tmp_path)


def test_kuaivideo_has_the_rows_in_order(kuaivideo: data.Stream, videos: list[Video]) -> None:
    assert_form(kuaivideo, published.KUAIVIDEO)
    assert published.KUAIVIDEO.in_time_order
    assert kuaivideo.label.tolist() == [row.click for row in videos]
    assert kuaivideo.time.tolist() == ranks([row.time for row in videos])
    earlier = [sum(r.time < row.time for r in videos) for row in videos]
    assert kuaivideo.week.tolist() == [1 + 10 * count // 90 for count in earlier]
    views = [(row.user, row.time) for row in videos]
    assert max(map(views.count, views)) > 2
    for at, group in enumerate(kuaivideo.group):
        same = [views[k] for k in np.flatnonzero(kuaivideo.group == group)]
        assert same == [views[at]] * views.count(views[at])


def test_kuaivideo_codes_are_ranks(kuaivideo: data.Stream, videos: list[Video]) -> None:
    assert kuaivideo.sparse["user"].tolist() == ranks([row.user for row in videos])
    assert kuaivideo.sparse["item"].tolist() == ranks([row.item for row in videos])
    known = {item: code for code, item in enumerate(sorted(VIDEOS))}
    for name, histories in (
        ("pos_last_item", [row.liked for row in videos]),
        ("neg_last_item", [row.passed for row in videos]),
    ):
        expected = [known.get(history.split("^")[-1], 4) for history in histories]
        assert kuaivideo.sparse[name].tolist() == expected
    assert kuaivideo.cardinalities == {
        "user": 4,
        "item": 5,
        "pos_last_item": 5,
        "neg_last_item": 5,
    }


def test_kuaivideo_tells_histories(kuaivideo: data.Stream, videos: list[Video]) -> None:
    for side, field in (("pos", "liked"), ("neg", "passed")):
        lists = [getattr(row, field).split("^") if getattr(row, field) else [] for row in videos]
        lengths = [math.log1p(len(items)) for items in lists]
        assert_dense(kuaivideo, f"{side}_log_length", lengths)
        shares = [
            items.count(row.item) / len(items) if items else 0
            for row, items in zip(videos, lists, strict=True)
        ]
        assert_dense(kuaivideo, f"{side}_item_share", shares)


@pytest.mark.parametrize("key", ["user", "item"])
def test_kuaivideo_looks_at_strictly_earlier_rows(
    kuaivideo: data.Stream, videos: list[Video], key: str
) -> None:
    pasts = [
        [r for r in videos if getattr(r, key) == getattr(row, key) and r.time < row.time]
        for row in videos
    ]
    assert_dense(kuaivideo, f"{key}_log_seen", [math.log1p(len(rows)) for rows in pasts])
    for name, label, prior in (
        ("mean", "click", 0.2),
        ("is_like_mean", "like", 0.01),
        ("is_follow_mean", "follow", 0.01),
    ):
        means = [smoothed([getattr(r, label) for r in rows], prior) for rows in pasts]
        assert_dense(kuaivideo, f"{key}_{name}", means)


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_kuaivideo_without_a_file(tmp_path: Path, name: str) -> None:
    (write_kuaivideo(tmp_path, random_videos()) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"KuaiVideo_x1 should have.*without {name}"):
        published.kuaivideo(tmp_path, tmp_path / "cache")


VIDEO = Video("7", "1", "2", 1, 0, 0, "3^4", "5")


@pytest.mark.parametrize(
    ("header", "rows", "received"),
    [
        (VIDEO_HEADER, [], "Received: 0 rows"),
        (VIDEO_HEADER.replace("is_click,", ""), [VIDEO], "train.csv should name.*'item_id', 'is_l"),
        (VIDEO_HEADER, [(*VIDEO, "6")], "Columns: 8 Found: 9"),
        (VIDEO_HEADER, [VIDEO._replace(click=2)], 'is_click.*"2" to \'ENUM'),
        (VIDEO_HEADER, [VIDEO._replace(like=-1)], 'is_like.*"-1" to \'ENUM'),
        (VIDEO_HEADER, [VIDEO._replace(stamp="now")], "timestamp.*\"now\" to 'DOUBLE'"),
        (VIDEO_HEADER, [VIDEO._replace(stamp="nan")], "1 rows, 1 that lack a value"),
        (VIDEO_HEADER, [VIDEO._replace(user="")], "1 rows, 1 that lack a value"),
    ],
)
def test_kuaivideo_of_another_form(
    tmp_path: Path, header: str, rows: Sequence[Sequence[object]], received: str
) -> None:
    write_splits(tmp_path, header, rows, train=1)
    with pytest.raises(ValueError, match=f"(?s){received}"):
        published.kuaivideo(tmp_path, tmp_path / "cache")


# AmazonElectronics


class Review(NamedTuple):
    label: int
    user: str
    item: str
    category: str
    items: str
    categories: str


REVIEW_HEADER = "label,user_id,item_id,cate_id,item_history,cate_history"
REVIEWED = {"13179": "738", "5": "8", "41": "738", "40": "16"}  # category by item
TRAIN = 60


def random_reviews(seed: int = 0) -> list[Review]:
    rng = random.Random(seed)
    others = {**REVIEWED, "63000": "800"}  # no row is of the last
    rows = []
    for _ in range(80):
        item = rng.choice(list(REVIEWED))
        items = [rng.choice(list(others)) for _ in range(rng.choice((0, 1, 2, 9)))]
        histories = "^".join(items), "^".join(others[item] for item in items)
        user = str(rng.randrange(8, 14))
        rows.append(Review(rng.randint(0, 1), user, item, REVIEWED[item], *histories))
    return rows


@pytest.fixture
def amazon(tmp_path: Path) -> data.Stream:
    write_splits(tmp_path / "raw", REVIEW_HEADER, random_reviews(), TRAIN)
    return published.amazonelectronics(tmp_path / "raw", tmp_path)


def test_amazonelectronics_keeps_the_order_of_the_files(amazon: data.Stream) -> None:
    rows = random_reviews()
    assert_form(amazon, published.AMAZONELECTRONICS)
    assert not published.AMAZONELECTRONICS.in_time_order
    assert amazon.time.tolist() == list(range(80))
    assert amazon.label.tolist() == [row.label for row in rows]
    assert amazon.week.tolist() == [1 + k // 6 for k in range(TRAIN)] + [11] * 20
    groups = [(row.user, at >= TRAIN) for at, row in enumerate(rows)]
    for at, group in enumerate(amazon.group):
        same = [groups[k] for k in np.flatnonzero(amazon.group == group)]
        assert same == [groups[at]] * groups.count(groups[at])


def test_amazonelectronics_codes_are_ranks(amazon: data.Stream) -> None:
    rows = random_reviews()
    for name in ("user", "item", "category"):
        assert amazon.sparse[name].tolist() == ranks([getattr(row, name) for row in rows])
    for name, field, values in (
        ("last_item", "items", REVIEWED),
        ("last_category", "categories", REVIEWED.values()),
    ):
        known = {value: code for code, value in enumerate(sorted(set(values)))}
        last = [getattr(row, field).split("^")[-1] for row in rows]
        assert amazon.sparse[name].tolist() == [known.get(value, len(known)) for value in last]
    sizes = {"user": 7, "item": 5, "category": 4, "last_item": 5, "last_category": 4}
    assert amazon.cardinalities == sizes


def test_amazonelectronics_tells_histories(amazon: data.Stream) -> None:
    rows = random_reviews()
    items = [row.items.split("^") if row.items else [] for row in rows]
    categories = [row.categories.split("^") if row.categories else [] for row in rows]
    same = [seen.count(row.category) for row, seen in zip(rows, categories, strict=True)]
    ago = [
        [*seen[::-1], row.category].index(row.category) + 1
        for row, seen in zip(rows, categories, strict=True)
    ]
    length = [max(1, len(seen)) for seen in items]
    assert_dense(amazon, "history_log_length", [math.log1p(len(seen)) for seen in items])
    assert_dense(amazon, "category_in_history", [float(count > 0) for count in same])
    assert_dense(amazon, "category_log_count", [math.log1p(count) for count in same])
    shares = [count / total for count, total in zip(same, length, strict=True)]
    assert_dense(amazon, "category_share", shares)
    shares = [
        seen.count(row.item) / total for row, seen, total in zip(rows, items, length, strict=True)
    ]
    assert_dense(amazon, "item_share", shares)
    assert_dense(amazon, "category_log_distance", [math.log1p(count) for count in ago])


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_amazonelectronics_without_a_file(tmp_path: Path, name: str) -> None:
    (write_splits(tmp_path, REVIEW_HEADER, random_reviews(), TRAIN) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"AmazonElectronics_x1 should .*without {name}"):
        published.amazonelectronics(tmp_path, tmp_path / "cache")


REVIEW = Review(1, "1", "2", "3", "4^5", "3^8")


@pytest.mark.parametrize(
    ("header", "rows", "received"),
    [
        (REVIEW_HEADER, [], "Received: 0 rows"),
        ("clk,user_id", [REVIEW], "train.csv should name.*'cate_history'.*Received: .'clk'"),
        (REVIEW_HEADER, [REVIEW[:5]], "Columns: 6 Found: 5"),
        (REVIEW_HEADER, [REVIEW._replace(label=3)], 'label.*"3" to \'ENUM'),
        (REVIEW_HEADER, [REVIEW._replace(category="")], "1 rows, 1 that lack a value"),
    ],
)
def test_amazonelectronics_of_another_form(
    tmp_path: Path, header: str, rows: Sequence[Sequence[object]], received: str
) -> None:
    write_splits(tmp_path, header, rows, train=1)
    with pytest.raises(ValueError, match=f"(?s){received}"):
        published.amazonelectronics(tmp_path, tmp_path / "cache")


# Criteo


class Ad(NamedTuple):
    label: int
    integers: tuple[int | None, ...]
    categories: tuple[str, ...]


def random_ads(number: int, seed: int) -> list[Ad]:
    """Integers and categories are missing now and then; one in three integers is negative."""
    rng = random.Random(seed)
    values = (None, -2, -1, 0, 1, 7, 65_535)
    return [
        Ad(
            rng.randint(0, 1),
            tuple(rng.choice(values) for _ in range(13)),
            tuple(rng.choice(("", f"{rng.getrandbits(32):08x}")) for _ in range(26)),
        )
        for _ in range(number)
    ]


def day_lines(rows: Sequence[Ad]) -> list[str]:
    return [
        "\t".join([str(r.label), *("" if i is None else str(i) for i in r.integers), *r.categories])
        for r in rows
    ]


DAYS = {3: random_ads(20, seed=3), 4: random_ads(31, seed=4), 5: random_ads(9, seed=5)}


def write_criteo(folder: Path) -> Path:
    for day, rows in DAYS.items():
        write(folder / f"day_{day}", day_lines(rows))
    packed = gzip.compress((folder / "day_4").read_bytes())
    (folder / "day_4").unlink()
    (folder / "day_4.gz").write_bytes(packed)
    write(folder / "day_3.md5", ["no day"])
    return folder


@pytest.fixture
def criteo(tmp_path: Path) -> data.Stream:
    return published.criteo(write_criteo(tmp_path / "raw"), tmp_path)


def test_criteo_keeps_the_order_of_the_days(criteo: data.Stream) -> None:
    assert_form(criteo, published.CRITEO)
    assert criteo.label.tolist() == [row.label for rows in DAYS.values() for row in rows]
    assert criteo.week.tolist() == [4] * 20 + [5] * 31 + [6] * 9
    times = [
        day * DAY + at * DAY // len(rows) for day, rows in DAYS.items() for at in range(len(rows))
    ]
    assert criteo.time.tolist() == times
    assert criteo.group.tolist() == list(range(60))


def test_criteo_has_every_column(criteo: data.Stream) -> None:
    rows = [row for rows in DAYS.values() for row in rows]
    for k in range(13):
        values = [row.integers[k] for row in rows]
        assert_dense(criteo, f"int_{k + 1}_log", [math.log1p(max(v or 0, 0)) for v in values])
        assert_dense(criteo, f"int_{k + 1}_missing", [float(v is None) for v in values])
    for k in range(26):
        hashes = [row.categories[k] for row in rows]
        buckets = [int(word, 16) % 2**18 if word else 2**18 for word in hashes]
        assert criteo.sparse[f"cat_{k + 1}"].tolist() == buckets
    assert set(criteo.cardinalities.values()) == {2**18 + 1}
    lean, strong = published.CRITEO.lean, published.CRITEO.strong
    assert [len(names) for names in (*lean, *strong)] == [8, 8, 13, 26]


def test_criteo_takes_what_is_unpacked_where_both_are_there(tmp_path: Path) -> None:
    folder = write_criteo(tmp_path / "raw")
    write(folder / "day_4", day_lines(DAYS[4][:2]))
    assert len(published.criteo(folder, tmp_path)) == 20 + 2 + 9


def test_criteo_without_days(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"such as day_0 or day_0\.gz.*without one"):
        published.criteo(tmp_path, tmp_path)


def test_criteo_with_days_that_do_not_follow_each_other(tmp_path: Path) -> None:
    (write_criteo(tmp_path) / "day_4.gz").unlink()
    with pytest.raises(ValueError, match=r"follow each other. Received: \[3, 5\]"):
        published.criteo(tmp_path, tmp_path / "cache")


AD = day_lines(random_ads(1, seed=6))[0]


@pytest.mark.parametrize(
    ("lines", "received"),
    [
        ([], "Received: 0 rows"),
        ([AD, AD + "\t1"], "Line: 2.*Columns: 40 Found: 41"),
        ([AD, "2" + AD[1:]], 'Line: 2.*"2" to \'ENUM'),
        ([AD, AD[1:]], "2 rows, 1 that lack a value"),
        ([AD, f"{AD.rpartition(chr(9))[0]}\tno hash"], "0xno hash"),
        ([AD, "0\tmany\t" + AD.split("\t", 2)[2]], "int_1.*\"many\" to 'BIGINT'"),
    ],
)
def test_criteo_of_another_form(tmp_path: Path, lines: Sequence[str], received: str) -> None:
    write(tmp_path / "day_0", lines)
    with pytest.raises(ValueError, match=f"(?s){received}"):
        published.criteo(tmp_path, tmp_path / "cache")
