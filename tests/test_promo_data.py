"""The promotion-response stream, against a plain Python reference on small tables."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from promo_response import data

Row = dict[str, Any]
NEGATIVES = 3
START = datetime(2017, 1, 2, 6)


def purchase(household: int, store: int, basket: int, product: int, at: datetime) -> Row:
    week = 1 + (at - datetime(2017, 1, 1)).days // 7
    return {
        "household_id": household,
        "store_id": store,
        "basket_id": basket,
        "product_id": product,
        "week": week,
        "transaction_timestamp": at,
    }


def promotion(product: int, store: int, week: int, display: str = "0", mailer: str = "A") -> Row:
    return {
        "product_id": product,
        "store_id": store,
        "display_location": display,
        "mailer_location": mailer,
        "week": week,
    }


def product_row(product: int) -> Row:
    return {
        "product_id": product,
        "manufacturer_id": 100 + product % 4,
        "department": ("GROCERY", "DELI", "MEAT")[product % 3],
        "brand": ("National", "Private")[product % 2],
        "product_category": None if product == 7 else f"C{product % 5}",
        "product_type": f"T{product % 7}",
    }


def person_row(household: int) -> Row:
    return {"household_id": household, **dict.fromkeys(data.DEMOGRAPHICS, f"v{household % 2}")}


def tables(transactions: list[Row], promotions: list[Row]) -> data.Tables:
    return data.Tables(
        pl.DataFrame(transactions),
        pl.DataFrame(promotions),
        pl.DataFrame([product_row(product) for product in range(1, 31)]),
        pl.DataFrame([person_row(household) for household in (11, 12, 99)]),
    )


def random_tables(seed: int = 0) -> data.Tables:
    """Eight weeks of three households.

    With simultaneous baskets, lines that repeat, and products (31, 32) no one knows.
    """
    rng = random.Random(seed)
    transactions = []
    for basket in range(5_000_000_001, 5_000_000_061):
        if basket % 5:
            household = rng.choice((11, 12, 13))
            at = START + timedelta(days=rng.randrange(55), hours=rng.randrange(20))
        store = rng.choice((301, 302))
        for product in rng.sample(range(1, 33), rng.randrange(1, 12)):
            line = purchase(household, store, basket, product, at)
            transactions += [line] * rng.choice((1, 1, 2))
    promotions = [
        promotion(rng.randrange(1, 33), rng.choice((301, 302, 999)), week, rng.choice("0123"))
        for week in range(1, 10)
        for _ in range(60)
    ]
    return tables(transactions, promotions)


@dataclasses.dataclass
class Reference:
    """What the raw rows say, kept in sets and dictionaries."""

    trip: dict[int, Row]
    basket: dict[int, set[int]]
    promoted: dict[tuple[int, int], set[int]]

    @classmethod
    def of(cls, raw: data.Tables) -> Reference:
        trip, basket, promoted = {}, defaultdict(set), defaultdict(set)
        for row in raw.transactions.to_dicts():
            trip[row["basket_id"]] = row
            basket[row["basket_id"]].add(row["product_id"])
        for row in raw.promotions.to_dicts():
            if row["product_id"] <= 30:
                promoted[row["store_id"], row["week"]].add(row["product_id"])
        return cls(trip, basket, promoted)

    def on_offer(self, basket: int) -> set[int]:
        return self.promoted[self.trip[basket]["store_id"], self.trip[basket]["week"]]

    def history(self, basket: int, product: int, attribute: str) -> tuple[int, float]:
        """Earlier purchases of the household that share the product's attribute, days since."""
        here = self.trip[basket]
        times = [
            there["transaction_timestamp"]
            for other, there in self.trip.items()
            for bought in self.basket[other]
            if there["household_id"] == here["household_id"]
            and there["transaction_timestamp"] < here["transaction_timestamp"]
            and bought <= 30
            and product_row(bought)[attribute] == product_row(product)[attribute]
        ]
        if not times:
            return 0, data.NEVER_DAYS
        since = here["transaction_timestamp"] - max(times)
        return len(times), since / timedelta(days=1)


def pairs(stream: data.Stream) -> list[tuple[int, int]]:
    """(basket_id, product_id) of each example, from its id."""
    return [divmod(int(example), 2**25) for example in stream.example_id]


@pytest.fixture(scope="module")
def raw() -> data.Tables:
    return random_tables()


@pytest.fixture(scope="module")
def stream(raw: data.Tables) -> data.Stream:
    return data.build_stream(raw, negatives_per_positive=NEGATIVES)


@pytest.fixture(scope="module")
def reference(raw: data.Tables) -> Reference:
    return Reference.of(raw)


def columns(stream: data.Stream) -> dict[str, np.ndarray]:
    found = {
        field.name: getattr(stream, field.name)
        for field in dataclasses.fields(stream)
        if isinstance(getattr(stream, field.name), np.ndarray)
    }
    return {**found, **stream.sparse, **stream.dense}


def assert_same(one: data.Stream, other: data.Stream) -> None:
    first, second = columns(one), columns(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype, name
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert one.verticals == other.verticals
    assert one.cardinalities == other.cardinalities


def test_positives_are_the_promoted_purchases(stream: data.Stream, reference: Reference) -> None:
    expected = {
        (basket, product)
        for basket, products in reference.basket.items()
        for product in products & reference.on_offer(basket)
    }
    positives = {pair for pair, label in zip(pairs(stream), stream.label, strict=True) if label}
    assert positives == expected
    assert set(stream.label.tolist()) == {0.0, 1.0}


def test_negatives_are_promoted_and_not_bought(stream: data.Stream, reference: Reference) -> None:
    for (basket, product), label in zip(pairs(stream), stream.label, strict=True):
        assert product in reference.on_offer(basket)
        assert (product in reference.basket[basket]) == bool(label)


def test_each_basket_has_its_negatives_and_weights(
    stream: data.Stream, reference: Reference
) -> None:
    labels: dict[int, list[float]] = defaultdict(list)
    weights: dict[int, float] = defaultdict(float)
    for (basket, _), label, weight in zip(pairs(stream), stream.label, stream.weight, strict=True):
        labels[basket].append(label)
        weights[basket] += weight
        assert label == 0 or weight == 1
    short = 0
    for basket, found in labels.items():
        positives, offers = int(sum(found)), len(reference.on_offer(basket))
        assert len(found) - positives == min(NEGATIVES * positives, offers - positives)
        assert len(found) == offers or positives == 0 or weights[basket] == pytest.approx(offers)
        short += len(found) < (1 + NEGATIVES) * positives
    assert 0 < short < len(labels)


def test_draw_is_uniform_among_the_free() -> None:
    rng, counts, draws = np.random.default_rng(0), np.zeros(8, dtype=int), 4000
    for _ in range(draws):
        drawn = data.draw_free(rng, np.array([0, 3, 4]), free=5, count=2)
        assert len(set(drawn.tolist())) == 2
        counts[drawn] += 1
    assert counts[[0, 3, 4]].sum() == 0
    expected = draws * 2 / 5
    deviation = 5 * math.sqrt(expected * 3 / 5)
    assert np.abs(counts[[1, 2, 5, 6, 7]] - expected).max() < deviation


def test_ids_are_unique_and_in_order_of_time_basket_and_product(
    stream: data.Stream, reference: Reference
) -> None:
    assert len(set(pairs(stream))) == len(stream)
    for (basket, _), time, week in zip(pairs(stream), stream.time, stream.week, strict=True):
        at = reference.trip[basket]["transaction_timestamp"].replace(tzinfo=timezone.utc)
        assert time == at.timestamp()
        assert week == reference.trip[basket]["week"]
    order = list(zip(stream.time.tolist(), pairs(stream), strict=True))
    assert order == sorted(order)


def test_a_group_is_a_trip(stream: data.Stream) -> None:
    """In the stream and in its batches: one id for a trip, in as many rows as it has products."""
    baskets = [basket for basket, _ in pairs(stream)]
    assert 1 < len(set(baskets)) < len(baskets)
    assert stream.group.tolist() == baskets
    _, batch = next(data.batches(stream, data.LEAN_SPARSE, data.LEAN_DENSE, 8))
    assert batch.groups.dtype == torch.int64 and batch.groups.tolist() == baskets[:8]


def test_example_ids_say_when_they_do_not_fit() -> None:
    ids = data.example_ids(np.array([2**38 - 1, 3]), np.array([2**25 - 1, 5]))
    assert ids.tolist() == [2**63 - 1, 3 * 2**25 + 5]
    with pytest.raises(ValueError, match="product_id"):
        data.example_ids(np.array([1]), np.array([2**25]))
    with pytest.raises(ValueError, match="basket_id"):
        data.example_ids(np.array([-1]), np.array([1]))


@pytest.mark.parametrize(
    ("key", "attribute"),
    [
        ("product", "product_id"),
        ("category", "product_category"),
        ("manufacturer", "manufacturer_id"),
    ],
)
def test_history_counts_earlier_baskets_only(
    stream: data.Stream, reference: Reference, key: str, attribute: str
) -> None:
    expected = [reference.history(basket, product, attribute) for basket, product in pairs(stream)]
    count, days = np.array(expected).T
    assert 0 < (count == 0).sum() < len(stream)
    np.testing.assert_allclose(stream.dense[f"{key}_log_count"], np.log1p(count), rtol=1e-6)
    np.testing.assert_allclose(stream.dense[f"{key}_log_days"], np.log1p(days), rtol=1e-6)


def test_simultaneous_baskets_do_not_see_each_other() -> None:
    noon = datetime(2017, 1, 3, 12)
    bought = [
        purchase(11, 301, 1, 5, noon),
        purchase(11, 301, 2, 5, noon),
        purchase(12, 301, 3, 5, noon - timedelta(days=1)),
        purchase(11, 301, 4, 5, noon + timedelta(days=3)),
    ]
    stream = data.build_stream(tables(bought, [promotion(5, 301, 1)]))
    assert [basket for basket, _ in pairs(stream)] == [3, 1, 2, 4]
    np.testing.assert_allclose(np.expm1(stream.dense["product_log_count"]), [0, 0, 0, 2], rtol=1e-6)
    days = np.expm1(stream.dense["product_log_days"])
    np.testing.assert_allclose(days, [data.NEVER_DAYS] * 3 + [3], rtol=1e-6)


@pytest.mark.parametrize("key", data.SEEN_KEYS, ids="_".join)
def test_labels_of_earlier_examples_are_counted(stream: data.Stream, key: tuple[str, ...]) -> None:
    ids = list(zip(*(stream.sparse[name].tolist() for name in key), strict=True))
    times, labels = stream.time.tolist(), stream.label.tolist()
    earlier = [
        [labels[j] for j in range(len(ids)) if ids[j] == ids[i] and times[j] < times[i]]
        for i in range(len(ids))
    ]
    seen = np.array([len(found) for found in earlier])
    odds = [(sum(f) + 10 / 11) / (len(f) - sum(f) + 100 / 11) for f in earlier]
    assert 0 < (seen == 0).sum() < len(stream)
    name = "_".join(key)
    np.testing.assert_allclose(stream.dense[f"{name}_log_seen"], np.log1p(seen), rtol=1e-6)
    found = stream.dense[f"{name}_log_odds"]
    np.testing.assert_allclose(found, np.log(10 * np.array(odds)), rtol=1e-5, atol=1e-6)


def test_sparse_ids_are_ranks_of_the_raw_values(raw: data.Tables, stream: data.Stream) -> None:
    products = {row["product_id"]: row for row in raw.products.to_dicts()}
    people = {row["household_id"]: row for row in raw.demographics.to_dicts()}
    trips = {row["basket_id"]: row for row in raw.transactions.to_dicts()}
    places: dict[tuple[int, int, int], str] = defaultdict(str)
    for row in raw.promotions.to_dicts():
        where = row["store_id"], row["week"], row["product_id"]
        places[where] = max(places[where], row["display_location"])
    values: dict[str, list[Any]] = defaultdict(list)
    for basket, product in pairs(stream):
        trip = trips[basket]
        values["household"].append(trip["household_id"])
        values["store"].append(trip["store_id"])
        values["display"].append(places[trip["store_id"], trip["week"], product])
        values["age"].append(people.get(trip["household_id"], {"age": None})["age"])
        values["product"].append(product)
        values["category"].append(products[product]["product_category"])
        values["manufacturer"].append(products[product]["manufacturer_id"])
        values["department"].append(products[product]["department"])
    words = data.vocabularies(raw)
    for name, found in values.items():
        ranks = {value: rank for rank, value in enumerate(sorted(words[name].to_list()))}
        expected = [ranks.get(value, len(ranks)) for value in found]
        assert stream.sparse[name].tolist() == expected, name
        assert stream.cardinalities[name] == len(ranks) + 1
    assert None in values["age"]
    assert None in values["category"]
    named = [stream.verticals[vertical] for vertical in stream.vertical]
    assert named == values["department"]


def test_features_are_complete_typed_and_in_range(stream: data.Stream) -> None:
    assert set(stream.sparse) == set(data.RICH_SPARSE) == set(stream.cardinalities)
    assert set(stream.dense) == set(data.RICH_DENSE) | set(data.STRONG_DENSE)
    assert set(data.LEAN_SPARSE) < set(data.RICH_SPARSE)
    assert set(data.LEAN_DENSE) < set(data.RICH_DENSE)
    for name, ids in stream.sparse.items():
        assert ids.dtype == np.int32
        assert ids.shape == (len(stream),)
        assert 0 <= ids.min() <= ids.max() < stream.cardinalities[name]
    for values in stream.dense.values():
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("utc", "weekday", "hour"),
    [
        (datetime(2017, 1, 2, 4, 59), 6, 23),
        (datetime(2017, 1, 2, 5, 0), 0, 0),
        (datetime(2017, 7, 3, 3, 59), 6, 23),
        (datetime(2017, 7, 3, 4, 0), 0, 0),
    ],
)
def test_clock_is_the_stores(utc: datetime, weekday: int, hour: int) -> None:
    row = purchase(11, 301, 1, 5, utc)
    stream = data.build_stream(tables([row], [promotion(5, 301, row["week"])]))
    assert stream.sparse["weekday"].tolist() == [weekday]
    assert stream.sparse["hour"].tolist() == [hour]
    angle = 2 * math.pi * weekday / 7
    assert stream.dense["weekday_sin"][0] == pytest.approx(math.sin(angle), abs=1e-6)
    assert stream.dense["hour_cos"][0] == pytest.approx(math.cos(math.pi * hour / 12), abs=1e-6)


def test_same_seed_same_stream_in_any_row_order(raw: data.Tables, stream: data.Stream) -> None:
    shuffled = data.Tables(*(table.sample(fraction=1, shuffle=True, seed=1) for table in raw))
    assert_same(data.build_stream(shuffled, negatives_per_positive=NEGATIVES), stream)
    other = data.build_stream(raw, seed=1, negatives_per_positive=NEGATIVES)
    assert set(pairs(other)) != set(pairs(stream))


def test_without_a_promoted_purchase_it_says_so() -> None:
    row = purchase(11, 301, 1, 5, START)
    with pytest.raises(ValueError, match="promoted"):
        data.build_stream(tables([row], [promotion(6, 301, row["week"])]))


def test_select_takes_the_same_rows_everywhere(stream: data.Stream) -> None:
    deli = stream.vertical == stream.verticals.index("DELI")
    part = stream.select(deli)
    assert 0 < len(part) < len(stream)
    for name, values in columns(part).items():
        np.testing.assert_array_equal(values, columns(stream)[name][deli])
    assert_same(stream.select(slice(2, 5)), stream.select(np.array([2, 3, 4])))


def test_batches_hold_what_the_arrays_hold(stream: data.Stream) -> None:
    size, seen = 16, 0
    for rows, batch in data.batches(stream, data.RICH_SPARSE, data.RICH_DENSE, size):
        assert rows == slice(seen, seen + size)
        seen += size
        sparse = batch.sparse_features
        assert sparse.keys() == list(data.RICH_SPARSE)
        assert sparse.stride() == size
        for name in data.RICH_SPARSE:
            assert sparse[name].values().dtype == torch.int64
            assert sparse[name].values().tolist() == stream.sparse[name][rows].tolist()
            assert sparse[name].lengths().tolist() == [1] * size
        for column, name in enumerate(data.RICH_DENSE):
            assert batch.dense_features[:, column].tolist() == stream.dense[name][rows].tolist()
        assert batch.dense_features.dtype == batch.labels.dtype == torch.float32
        assert batch.labels.tolist() == stream.label[rows].tolist()
    assert seen == len(stream) // size * size


def test_two_ranks_share_each_global_batch(stream: data.Stream) -> None:
    names = data.LEAN_SPARSE, data.LEAN_DENSE
    whole = list(data.batches(stream, *names, 32))
    ranks = [list(data.batches(stream, *names, 32, rank=r, world_size=2)) for r in (0, 1)]
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for (rows, batch), *parts in zip(whole, *ranks, strict=True):
        (first, one), (second, other) = parts
        assert (first.start, first.stop, second.stop) == (rows.start, second.start, rows.stop)
        assert len(one.labels) == len(other.labels) == 16
        assert torch.equal(torch.cat([one.labels, other.labels]), batch.labels)
        dense = torch.cat([one.dense_features, other.dense_features])
        assert torch.equal(dense, batch.dense_features)
        for name in data.LEAN_SPARSE:
            ids = torch.cat([part.sparse_features[name].values() for part in (one, other)])
            assert torch.equal(ids, batch.sparse_features[name].values())


def test_batches_equal_a_tensor_built_by_torchrec(stream: data.Stream) -> None:
    _, batch = next(data.batches(stream, data.LEAN_SPARSE, data.LEAN_DENSE, 8))
    sparse = batch.sparse_features
    plain = type(sparse).from_lengths_sync(sparse.keys(), sparse.values(), sparse.lengths())
    assert torch.equal(plain.offsets(), sparse.offsets())
    assert plain.length_per_key() == sparse.length_per_key()
    assert plain.offset_per_key() == sparse.offset_per_key()
    assert torch.equal(plain.permute([3, 1]).values(), sparse.permute([3, 1]).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5, "world_size": 2}, "multiple"),
        ({"rank": 1}, "rank"),
        ({"sparse_names": ["shoe_size"]}, "shoe_size"),
        ({"dense_names": ["shoe_size"]}, "shoe_size"),
    ],
)
def test_batches_fail_at_the_call(stream: data.Stream, change: Row, message: str) -> None:
    arguments: Row = {"sparse_names": ["store"], "dense_names": [], "batch_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        data.batches(stream, **arguments)


def test_cache_round_trip(
    raw: data.Tables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads = []

    def read() -> data.Tables:
        reads.append(1)
        return raw

    monkeypatch.setattr(data, "read_tables", read)
    built = data.load_stream(tmp_path / "new", seed=3, progress=False)
    assert_same(built, data.build_stream(raw, seed=3))
    assert_same(data.load_stream(tmp_path / "new", seed=3), built)
    assert len(reads) == 1
    names = [path.name for path in (tmp_path / "new").iterdir()]
    assert names == [f"promo_response-v{data.FORMAT_VERSION}-seed3"]


def test_interrupted_writing_leaves_nothing(
    stream: data.Stream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = np.save
    written: list[Path] = []

    def interrupted(path: Path, values: np.ndarray) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        real(path, values)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.save(stream, tmp_path / "stream")
    assert len(written) == 3
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    data.save(stream, tmp_path / "stream")
    assert_same(data.load(tmp_path / "stream"), stream)


def test_the_first_of_two_writers_wins(stream: data.Stream, tmp_path: Path) -> None:
    data.save(stream, tmp_path / "stream")
    data.save(stream.select(slice(5)), tmp_path / "stream")
    assert_same(data.load(tmp_path / "stream"), stream)
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]
