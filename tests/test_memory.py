"""The memory during training: equal to the reference, blind to the present, bounded."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from das_data import AT, US, WINDOW, new_store, plant, small_store, snapshot
from memory_reference import brute_force
from numpy.random import Generator
from torch import Tensor, nn

from torchrec_exfm.das import StoreError, TeacherLogger, TeacherStore
from torchrec_exfm.das.memory import (
    Memory,
    MemoryEvents,
    MemoryFeatures,
    MemoryFormat,
    store_events,
)
from torchrec_exfm.das.rules import NO_KEY
from torchrec_exfm.das.schema import KEYS

START = 1_700_000_000
USER, ITEM, PAIR = ["user_id"], ["item_id"], ["user_id", "item_id"]
ONE = MemoryFormat(name="fm", keys=[USER])
FORMATS = [
    ONE,
    MemoryFormat(name="fm", keys=[USER, ITEM, PAIR], width=3, length=5, half_life_seconds=40),
    MemoryFormat(name="fm", keys=[PAIR, USER], length=1, delay_seconds=17, half_life_seconds=1e12),
    MemoryFormat(name="fm", keys=[ITEM], width=3, length=5, resolution="float16"),
    MemoryFormat(name="fm", keys=[USER], width=3, length=5, resolution="int8", delay_seconds=60),
    MemoryFormat(name="fm", keys=[USER], width=3, length=1, resolution="int4"),
    MemoryFormat(name="fm", keys=[PAIR, ITEM], half_life_seconds=0.25),  # 1,200 in the stream
    MemoryFormat(name="fm", keys=[ITEM], width=3, half_life_seconds=1e-6),
]


@dataclass
class Rows:
    """Events with values (n, V), or examples without."""

    columns: dict[str, np.ndarray[Any, Any]]
    seconds: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]

    def __getitem__(self, rows: Any) -> Rows:
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Rows(columns, self.seconds[rows], self.values[rows])


def random_rows(random: Generator, n: int, width: int, span: int = 300) -> Rows:
    """Return rows of few seconds: one user has half, a tenth has no user, a tenth no item."""
    users = np.where(random.random(n) < 0.5, 1, random.integers(-3, 5, n))
    columns = {"user_id": users, "item_id": random.integers(2**62, 2**62 + 4, n)}
    for column in columns.values():
        column[random.random(n) < 0.1] = NO_KEY
    values = random.normal(size=(n, width)) * 10.0 ** random.integers(-3, 3, (n, 1))
    return Rows(columns, START + random.integers(0, span, n), values.astype(np.float32))


def steps_of(
    random: Generator, events: Rows, examples: Rows, delay: int, batches: int
) -> tuple[list[tuple[Rows, Rows]], Rows, Rows]:
    """Return batches of events and examples by step, and all of them in the order of the calls.

    Cuts are random; an event is written at any step up to the one that must know it.
    """
    order = np.argsort(examples.seconds, kind="stable")
    cuts = np.sort(random.integers(0, len(order) + 1, batches - 1))
    parts = [random.permutation(part) for part in np.split(order, cuts)]
    latest = [examples.seconds[part].max(initial=0) for part in parts]
    latest = np.maximum.accumulate(latest)
    needed = np.searchsorted(latest, events.seconds + delay, side="right").clip(max=batches - 1)
    steps = random.integers(0, needed + 1)
    written = [random.permutation(np.flatnonzero(steps == step)) for step in range(batches)]
    calls = [(events[w], examples[p]) for w, p in zip(written, parts, strict=True)]
    return calls, events[np.concatenate(written)], examples[np.concatenate(parts)]


def run(memory: Memory, calls: Sequence[tuple[Rows, Rows]]) -> dict[str, MemoryFeatures]:
    """Run the steps; return the fields that all calls read, concatenated."""
    answers = []
    for events, examples in calls:
        memory.write(events.columns, events.seconds, events.values)
        answers.append(memory.read(examples.columns, examples.seconds))
    names = [field.name for field in fields(MemoryFeatures)]
    return {
        key: MemoryFeatures(
            **{name: np.concatenate([getattr(a[key], name) for a in answers]) for name in names}
        )
        for key in memory.format.key_names
    }


def sequences(features: MemoryFeatures, name: str) -> list[Any]:
    """Return the vectors or ages of each example."""
    parts: list[Any] = np.split(getattr(features, name), np.cumsum(features.lengths)[:-1])
    return parts


def rounding(n: int, size: float) -> float:
    """Bound the error of a mean of n numbers of a given size, whose weights come from n products.

    Weights 2^x with |x| <= 1,100 (those below vanish), in numerator and denominator. Each product
    takes an exponential of 4 units in the last place, itself, a sum and the exponent's rounding.
    """
    return 2 * (11 * n + 1_100) * 2.0**-53 * size


def vector_bound(vector: Any, resolution: str) -> float:
    """Bound the error of a vector's number in a sequence."""
    size = float(np.abs(vector).max())
    if resolution == "float16":
        return size * 2.0**-11 + 2.0**-25
    steps = {"int8": 127, "int4": 7}.get(resolution)  # half a step, and float32's roundings
    return max(size / steps, 2.0**-126) * (0.5 + steps * 3 * 2.0**-24) if steps else 0.0


def check(
    read: dict[str, MemoryFeatures], events: Rows, examples: Rows, format: MemoryFormat
) -> None:
    """Require the features to equal the reference."""
    assert [*read] == [*format.key_names]
    parts: Any = ((events.columns, events.seconds, events.values), (examples.columns,))
    expected = brute_force(parts[0], (*parts[1], examples.seconds), format)
    size = float(np.abs(events.values).max(initial=0))
    for key, rows in expected.items():
        features = read[key]
        assert features.count.tolist() == [row["count"] for row in rows], key
        assert features.lengths.tolist() == [len(row["values"]) for row in rows], key
        vectors, ages = sequences(features, "vectors"), sequences(features, "ages_days")
        for i, row in enumerate(rows):
            for name in ("mean", "last", "decayed_mean", "days_since"):
                number = getattr(features, name)[i]
                if row[name] is None:
                    assert np.isnan(number).all(), (key, name)
                else:
                    limit = np.abs(row[name]) * 2.0**-24 + 2.0**-149  # of float32
                    limit += rounding(row["count"], size) if name.endswith("mean") else 0
                    assert (np.abs(number - np.float64(row[name])) <= limit).all(), (key, name)
            assert ages[i].tolist() == np.float32(row["ages_days"]).tolist(), key
            for vector, reference in zip(vectors[i], row["values"], strict=True):
                bound = vector_bound(reference, format.resolution)
                assert (np.abs(vector - np.float64(reference)) <= bound).all(), key


def same_bits(actual: dict[str, MemoryFeatures], expected: dict[str, MemoryFeatures]) -> bool:
    names = [field.name for field in fields(MemoryFeatures)]
    return all(
        getattr(actual[key], name).tobytes() == getattr(expected[key], name).tobytes()
        for key in actual
        for name in names
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("format", FORMATS)
def test_it_knows_what_the_reference_knows(format: MemoryFormat, seed: int) -> None:
    random = np.random.default_rng(seed)
    events, examples = (random_rows(random, 120, format.width) for _ in range(2))
    batches = [1, 9, 50][seed]
    calls, events, examples = steps_of(random, events, examples, format.delay_seconds, batches)
    read = run(Memory(format), calls)
    check(read, events, examples, format)
    for features in read.values():
        assert features.count.min() == 0 and features.count.max() > 5


@pytest.mark.parametrize("format", FORMATS[:3])
def test_cuts_between_batches_change_nothing(format: MemoryFormat) -> None:
    random = np.random.default_rng(3)
    events, examples = (random_rows(random, 60, format.width) for _ in range(2))
    events, examples = (
        rows[np.argsort(rows.seconds, kind="stable")] for rows in (events, examples)
    )
    empty = events[:0]
    uncut = run(Memory(format), [(events, examples)])
    single = run(
        Memory(format),
        [(events, empty), *((empty, examples[i : i + 1]) for i in range(len(examples.seconds)))],
    )
    size = float(np.abs(events.values).max())
    for key, features in uncut.items():
        for name in ("count", "last", "days_since", "lengths", "vectors", "ages_days"):
            actual, expected = getattr(features, name), getattr(single[key], name)
            assert actual.tobytes() == expected.tobytes(), (key, name)
        for name in ("mean", "decayed_mean"):
            actual, expected = getattr(features, name), getattr(single[key], name)
            atol = 2 * rounding(60, size)
            np.testing.assert_allclose(actual, expected, rtol=2.0**-22, atol=atol)


def test_extreme_values_and_half_lives_are_no_overflow() -> None:
    random = np.random.default_rng(4)
    events = random_rows(random, 60, 1)
    events.seconds = START + np.sort(random.integers(0, 10**8, 60))
    events.values = np.float32(random.choice([-3.4e38, 3.4e38, 1e-45], (60, 1)))
    examples = events[::-1]
    for half_life_seconds in (1e-6, 600.0, 1e5, 2e6, 1e12, float("inf")):
        format = replace(ONE, half_life_seconds=half_life_seconds, length=2, resolution="int8")
        memory = Memory(format)
        read = run(memory, [(events, examples)])
        check(read, events, examples, format)
        assert np.isfinite(read["user_id"].dense()).all()


def test_sequences_stay_right_while_old_events_are_dropped() -> None:
    random, format = np.random.default_rng(5), replace(ONE, length=5, delay_seconds=3)
    memory, sizes, parts = Memory(format), [], []
    users = np.append(np.arange(-3, 5), np.arange(100, 120))  # the last have few events
    for step in range(10):
        part = random_rows(random, 40_000, 1, span=100)
        part.columns["user_id"][:12] = random.integers(100, 120, 12)
        part = part[np.argsort(part.seconds, kind="stable")]
        part.seconds += 100 * step
        memory.write(part.columns, part.seconds, part.values)
        now = START + 100 * (step + 1)
        read = memory.read({"user_id": users}, [now] * len(users))["user_id"]
        sizes.append(len(pickle.dumps(memory)))
        parts.append((part.columns["user_id"], part.seconds, part.values[:, 0]))
        keys, seconds, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        vectors, ages = sequences(read, "vectors"), sequences(read, "ages_days")
        for i, user in enumerate(users):
            seen = (keys == user) & (seconds + 3 < now)
            last = np.flatnonzero(seen)[:-6:-1]
            assert read.count[i] == seen.sum()
            assert vectors[i][:, 0].tolist() == values[last].tolist()
            assert ages[i].tolist() == np.float32((now - seconds[last]) / 86_400).tolist()
            if seen.any():
                mean = math.fsum(values[seen]) / seen.sum()
                size = float(np.abs(values[seen]).max())
                limit = abs(mean) * 2.0**-24 + rounding(int(seen.sum()), size)
                assert abs(read.mean[i, 0] - mean) <= limit
    assert read.count.min() > 0
    assert max(sizes) < 400_000 * (8 + 4)  # times and values of all events, and nothing else


@pytest.mark.parametrize("format", [FORMATS[1], FORMATS[4]])
def test_the_present_and_the_future_change_nothing(format: MemoryFormat) -> None:
    random = np.random.default_rng(6)
    events, examples = (random_rows(random, 200, format.width) for _ in range(2))
    before = run(Memory(format), [(events, examples)])
    for now in np.sort(examples.seconds)[[50, 90, 130]]:
        hidden = events.seconds + format.delay_seconds >= now
        values = events.values.copy()
        values[hidden] = random.permutation(values[hidden]) * -2
        after = run(Memory(format), [(replace(events, values=values), examples)])
        asked = examples.seconds <= now
        assert same_bits(rows_of(before, asked), rows_of(after, asked))
        assert not same_bits(rows_of(before, ~asked), rows_of(after, ~asked))


def rows_of(read: dict[str, MemoryFeatures], chosen: Any) -> dict[str, MemoryFeatures]:
    """Return the features of some examples."""
    picked = {}
    for key, features in read.items():
        entries = np.repeat(chosen, features.lengths)
        columns = {field.name: getattr(features, field.name) for field in fields(features)}
        picked[key] = MemoryFeatures(
            **{
                name: column[entries if name in ("vectors", "ages_days") else chosen]
                for name, column in columns.items()
            }
        )
    return picked


def test_an_example_sees_neither_itself_nor_another_of_its_second() -> None:
    random, seen = np.random.default_rng(7), 0
    memory = Memory(replace(ONE, length=3))
    for second in range(START, START + 5):
        batch = {"user_id": [1] * 4}
        labels = random.normal(size=4).astype(np.float32)
        for _ in range(2):  # two batches of one second
            memory.write(batch, [second] * 4, labels)
            features = memory.read(batch, [second] * 4)["user_id"]
            assert features.count.tolist() == [seen] * 4
            assert not np.isin(features.vectors, labels).any()
        seen += 8


def test_a_delay_is_over_after_its_last_second() -> None:
    memory = Memory(replace(ONE, delay_seconds=60))
    memory.write({"user_id": [1]}, [START], [0.5])
    seconds = [START + 61, START + 60, START + 1]
    features = memory.read({"user_id": [1] * 3}, seconds)["user_id"]
    assert features.count.tolist() == [1, 0, 0]
    assert features.days_since[0] == np.float32(61 / 86_400)


@pytest.mark.parametrize("length", [0, 2])
def test_beyond_max_keys_the_oldest_are_forgotten(length: int) -> None:
    format = replace(ONE, keys=[USER, ITEM], length=length)
    memory, sizes = Memory(format, max_keys=100), []
    for first in range(0, 2_000, 50):
        users = np.arange(first, first + 50)
        columns = {"user_id": np.append(users, -1), "item_id": np.arange(51)}
        values = columns["user_id"].astype(np.float32)
        memory.write(columns, START + np.append(users, first), values)
        read = memory.read(columns, [START + first + 50] * 51)
        assert read["user_id"].count[:50].tolist() == [1] * 50
        # the events of one batch count before any key is forgotten
        assert read["user_id"].count[50] == first // 50 + 1
        sizes.append(len(pickle.dumps(memory)))
    users = np.arange(-1, 2_000)
    columns = {"user_id": users, "item_id": users}
    features = memory.read(columns, [START + 2_000] * len(users))
    known = users[features["user_id"].count > 0]
    assert 75 <= len(known) <= 100
    assert known.tolist() == [-1, *range(2_000 - len(known) + 1, 2_000)]
    assert memory.forgotten == {"user_id": 2_001 - len(known), "item_id": 0}
    assert features["user_id"].last[features["user_id"].count > 0, 0].tolist() == known.tolist()
    if length:
        vectors = sequences(features["user_id"], "vectors")
        expected = [[-1.0] * 2, *([float(user)] for user in known[1:])]
        assert [v[:, 0].tolist() for v in vectors if len(v)] == expected
    else:
        assert max(sizes[20:]) <= max(sizes[:20]) + 16  # a counter's digits

    memory.write({"user_id": [0], "item_id": [0]}, [START + 2_000], [2.5])
    reread = memory.read({"user_id": [0], "item_id": [0]}, [START + 2_001])["user_id"]
    assert (reread.count.tolist(), reread.mean.tolist()) == ([1], [[2.5]])


def test_events_of_the_same_keys_take_no_memory() -> None:
    random, memory, sizes = np.random.default_rng(8), Memory(replace(ONE, width=3)), []
    for step in range(6):
        for rows in (random_rows(random, 10 if step == 0 else 5_000, 3, span=99),):
            rows.seconds += 100 * step
            rows.columns["user_id"][:8] = range(-3, 5)
            memory.write(rows.columns, rows.seconds, rows.values)
        memory.read({"user_id": [1]}, [START + 100 * (step + 1)])
        sizes.append(len(pickle.dumps(memory)))
    assert max(sizes) <= sizes[0] + 100  # integers of other lengths


def test_a_pickled_memory_goes_on_to_the_bit() -> None:
    random, format = np.random.default_rng(9), FORMATS[4]
    events, examples = (random_rows(random, 200, format.width) for _ in range(2))
    calls, _, _ = steps_of(random, events, examples, format.delay_seconds, 6)
    memory = Memory(format, max_keys=5)
    run(memory, calls[:3])
    copy = pickle.loads(pickle.dumps(memory))
    assert same_bits(run(copy, calls[3:]), run(memory, calls[3:]))
    assert copy.forgotten == memory.forgotten


def test_dense_features_and_sequences_by_hand() -> None:
    format = MemoryFormat(name="fm", keys=[USER, PAIR], width=2, length=2, half_life_seconds=86_400)
    memory, day = Memory(format), 86_400
    columns = {"user_id": [1, 1, 1, 2], "item_id": [5, 6, 5, 5]}
    values = [[1.0, -2.0], [3.0, 4.0], [5.0, 0.0], [7.0, 7.0]]
    memory.write(columns, [START, START + day, START + 2 * day, START], values)
    asked = {"user_id": [3, 1, 2], "item_id": [5, 6, NO_KEY]}
    read = memory.read(asked, [START + 3 * day] * 3)
    third, half = float(np.log1p(3.0)), float(np.log1p(1.0))
    user = [
        [0.0] * 9,
        [1, third, half, 3, 2 / 3, 5, 0, (5 + 3 / 2 + 1 / 4) / 1.75, (4 / 2 - 2 / 4) / 1.75],
        [1, half, third, *[7.0] * 6],
    ]
    pair = [[0.0] * 9, [1, half, float(np.log1p(2.0)), *[3.0, 4.0] * 3], [0.0] * 9]
    dense = format.dense(read)
    assert dense.dtype == np.float32 and dense.shape == (3, 18)
    np.testing.assert_allclose(dense, np.hstack([user, pair]), rtol=2.0**-22)
    np.testing.assert_array_equal(read["user_id"].dense(), dense[:, :9])

    jagged = read["user_id"].jagged()
    assert jagged.lengths().tolist() == [0, 2, 1]
    assert jagged.values().tolist() == [[5.0, 0.0], [3.0, 4.0], [7.0, 7.0]]
    assert jagged.weights().tolist() == [1.0, 2.0, 3.0]
    assert jagged.values().dtype == jagged.weights().dtype == torch.float32
    lists = [vectors.tolist() for vectors in jagged.to_dense()]
    assert lists == [[], [[5.0, 0.0], [3.0, 4.0]], [[7.0, 7.0]]]
    empty = Memory(replace(format, length=0)).read(asked, [START] * 3)["user_id"].jagged()
    assert empty.values().shape == (0, 2) and empty.lengths().tolist() == [0, 0, 0]


@pytest.mark.parametrize("format", [*FORMATS, replace(ONE, half_life_seconds=float("inf"))])
def test_a_format_goes_through_json(format: MemoryFormat) -> None:
    parsed = MemoryFormat(**json.loads(json.dumps(asdict(format))))
    assert parsed == format and parsed.key_names == format.key_names


ROWS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "tensors": lambda: (
        {"user_id": torch.tensor([7, -8], dtype=torch.int32)},
        torch.tensor([START, START]),
        torch.tensor([[0.5], [1.5]], dtype=torch.bfloat16, requires_grad=True),
    ),
    "a frame": lambda: (
        pd.DataFrame({"user_id": [7, -8], "name": ["a", "b"]}),
        pd.Series(pd.to_datetime([START, START], unit="s", utc=True)),
        pd.Series([0.5, 1.5]),
    ),
    "a zone": lambda: (
        {"user_id": pd.array([7, -8], "Int64")},
        pd.Series(pd.to_datetime([START] * 2, unit="s", utc=True)).dt.tz_convert("Asia/Tokyo"),
        [0.5, 1.5],
    ),
    "seconds with a fraction": lambda: (
        {"user_id": np.array([7, -8], np.int16)},
        np.array([START * US, START * US + 999_999], "datetime64[us]"),
        np.array([[0.5], [1.5]], np.float64),
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_columns_of_other_libraries(kind: str) -> None:
    columns, seconds, values = ROWS[kind]()
    memory = Memory(ONE)
    memory.write(columns, seconds, values)
    later = [START + 86_400] * 2
    features = memory.read({"user_id": [-8, 7]}, later)["user_id"]
    assert (features.last[:, 0].tolist(), features.days_since.tolist()) == ([1.5, 0.5], [1.0, 1.0])
    assert Memory(ONE).read(columns, seconds)["user_id"].count.tolist() == [0, 0]


@pytest.mark.parametrize("user", [-(2**63) + 1, 2**63 - 1, np.uint64(2**63 - 1), 0, -1])
def test_keys_at_the_ends_of_int64(user: Any) -> None:
    memory = Memory(replace(ONE, keys=[USER, PAIR]))
    columns = {"user_id": np.array([user]), "item_id": [-(2**63) + 1]}
    memory.write(columns, [START], [0.5])
    read = memory.read(columns, [START + 1])
    assert [features.count.tolist() for features in read.values()] == [[1], [1]]


WRONG_FORMATS: list[tuple[dict[str, Any], str]] = [
    ({"name": "a b"}, "a memory, and .* should be named with letters.*received 'a b'"),
    ({"keys": "user_id"}, "keys should be a list of keys.*received 'user_id'"),
    ({"keys": []}, r"keys should be a list of keys.*received \[\]"),
    ({"keys": [USER, []]}, r"keys should be a list.*received \[\['user_id'\], \[\]\]"),
    ({"keys": [USER, USER]}, "keys should be a list of keys.*received"),
    ({"keys": [["a b"]]}, "a column of its keys, should be named with letters.*received 'a b'"),
    ({"keys": [[1]]}, "a column of its keys, should be named with letters.*received 1"),
    ({"width": 0}, "width should be a whole number from 1; received 0"),
    ({"width": 1.0}, "width should be a whole number from 1; received 1.0"),
    ({"length": -1}, "length should be a whole number from 0; received -1"),
    ({"half_life_seconds": 0}, "half_life_seconds should be more than 0; received 0"),
    ({"half_life_seconds": float("nan")}, "half_life_seconds should be a number of seconds"),
    ({"half_life_seconds": "7d"}, "a number of seconds from 0; received '7d'"),
    ({"delay_seconds": -1}, "delay_seconds should be a whole number from 0; received -1"),
    ({"resolution": "int2"}, "resolution should be one of .*received 'int2'"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG_FORMATS)
def test_wrong_formats_are_told(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MemoryFormat(**{"name": "fm", "keys": [USER], **wrong})


@pytest.mark.parametrize("max_keys", [0, -1])
def test_a_wrong_bound_is_told(max_keys: int) -> None:
    with pytest.raises(ValueError, match=f"max_keys should be at least 1.*received {max_keys}"):
        Memory(ONE, max_keys=max_keys)


def write(**wrong: Any) -> tuple[str, dict[str, Any]]:
    right = {"columns": {"user_id": [1, 2]}, "seconds": [START + 9] * 2, "values": [0.5, 1.5]}
    return "write", {**right, **wrong}


def read(**wrong: Any) -> tuple[str, dict[str, Any]]:
    return "read", {"columns": {"user_id": [1, 2]}, "seconds": [START + 9] * 2, **wrong}


FLOATS = np.array([1.0, 2.0])
WRONG_CALLS: list[tuple[tuple[str, dict[str, Any]], type[Exception], str]] = [
    (
        write(seconds=[START + 9, START - 1]),
        ValueError,
        rf"received one of {START - 1} \(delay 0\) after an example of {START}: write a batch's",
    ),
    (
        read(seconds=[START + 9, START - 1]),
        ValueError,
        f"in order of time; received one of {START - 1} after one of {START}: sort the stream",
    ),
    (write(values=[0.5, float("nan")]), ValueError, "values should be finite; received 1 that"),
    (write(values=[float("inf")] * 2), ValueError, "finite; received 2 .*: leave out the events"),
    (
        write(values=np.array([0.5, 1e39])),
        ValueError,
        "values should be finite; received 1 that",
    ),
    (write(values=[0.5, None]), ValueError, "values should have no nulls.*: 1: fill them in"),
    (write(values=[1, 0]), TypeError, "values should be floating-point numbers; received int64"),
    (write(values=[0.5] * 3), ValueError, r"values should be of shape \(2, 1\); received \(3,"),
    (write(values=[[0.5, 0.5]] * 2), ValueError, r"of shape \(2, 1\); received \(2, 2\)"),
    (write(values=pd.DataFrame({"v": FLOATS})), TypeError, "values should have no names"),
    (write(seconds=START + 9), ValueError, r"seconds should be of shape \(n,\); received \(\)"),
    (write(seconds=FLOATS + START), TypeError, "seconds should be whole numbers.*or timestamps"),
    (write(seconds=np.array(["NaT"] * 2, "M8[s]")), ValueError, "seconds should have no nulls"),
]
WRONG_COLUMNS: list[tuple[Any, type[Exception], str]] = [
    ({}, ValueError, r"should be \['user_id'\]; received \[\]"),
    ({"User_id": [1, 2]}, ValueError, r"should be \['user_id'\]; received \['User_id'\]"),
    ({"user_id": [1]}, ValueError, r"user_id should be of shape \(2,\); received \(1,\)"),
    ({"user_id": [[1], [2]]}, ValueError, r"of shape \(2,\); received \(2, 1\)"),
    ({"user_id": ["a", "b"]}, TypeError, "whole numbers.*received str.*ids with hash_ids"),
    ({"user_id": FLOATS}, TypeError, "user_id should be whole numbers.*received float64"),
    ({"user_id": [1, None]}, ValueError, "user_id should have no nulls.*received 1 such rows: 1"),
    ({"user_id": [1, 2**63]}, TypeError, "user_id should be whole numbers.*received int objects"),
    (
        {"user_id": np.array([1, 2**63], np.uint64)},
        ValueError,
        r"user_id should be below 2\^63; received 92233",
    ),
    (
        pd.DataFrame([[1, 2], [3, 4]], columns=["user_id", "user_id"]),
        ValueError,
        r"user_id should be of shape \(2,\); received \(2, 2\)",
    ),
]
WRONG_CALLS += [
    (call(columns=columns), error, text)
    for columns, error, text in WRONG_COLUMNS
    for call in (write, read)
]


@pytest.mark.parametrize(("call", "error", "text"), WRONG_CALLS)
def test_a_wrong_call_is_told_and_changes_nothing(
    call: tuple[str, dict[str, Any]], error: type[Exception], text: str
) -> None:
    memories = [Memory(replace(ONE, length=2)) for _ in range(2)]
    for memory in memories:
        memory.write({"user_id": [1, 2]}, [START - 1, START + 1], [0.5, 1.5])
        memory.read({"user_id": [1]}, [START])
    method, arguments = call
    with pytest.raises(error, match=text):
        getattr(memories[0], method)(**arguments)
    reads = [memory.read({"user_id": [1, 2]}, [START + 2] * 2) for memory in memories]
    assert same_bits(*reads) and reads[0]["user_id"].count.tolist() == [1, 1]


def test_a_late_event_is_one_that_an_example_should_have_seen() -> None:
    memory = Memory(replace(ONE, delay_seconds=10))
    memory.read({"user_id": [1]}, [START])
    with pytest.raises(ValueError, match=r"\(delay 10\) after an example"):
        memory.write({"user_id": [1]}, [START - 11], [0.5])
    memory.write({"user_id": [1]}, [START - 10], [0.5])
    features = memory.read({"user_id": [1, 1]}, [START, START + 1])["user_id"]
    assert features.count.tolist() == [0, 1]


@dataclass
class Written:
    """A row that was written to a store."""

    teacher: str
    example: int
    seconds: int
    keys: dict[str, int]
    outputs: dict[str, float]
    embedding: list[float] | None
    rank: tuple[int, bool, int]  # version, logged, number of the write
    through: int


def written_store(
    folder: Path, random: Generator, resolution: Any, ids: int = 120
) -> tuple[TeacherStore, list[Written]]:
    """Create a store: two teachers, three windows, several versions, scored and logged rows."""
    tasks = ("click", "stay")
    store = new_store(folder, tasks=tasks, embedding_width=3, embedding_resolution=resolution)
    seconds = random.integers(2 * WINDOW, 5 * WINDOW, ids)
    seconds[::3] = seconds[0]
    columns = {name: random.integers(-2, 3, ids) for name in KEYS}
    columns["user_id"][::7] = NO_KEY
    rows = []
    plan = [("fm", 3, True), ("fm", 1, False), ("fm", 2, True), ("fm", 3, False), ("fm", 3, False)]
    for number, (teacher, version, logged) in enumerate([*plan, ("gm", 9, False)]):
        chosen = random.permutation(ids)[: ids // 2]
        outputs = random.normal(size=(len(chosen), 2)).astype(np.float32)
        known = tasks[1:] if version == 2 else tasks
        through = int(random.integers(2 * WINDOW, 6 * WINDOW)) if logged else WINDOW + version
        embeddings = random.normal(size=(len(chosen), 3)).astype(np.float32)
        has_embedding = number % 2 == 0
        store.write(
            snapshot(version, through, teacher),
            chosen,
            outputs[:, 2 - len(known) :],
            seconds[chosen],
            tasks=known,
            logged=logged,
            keys={name: column[chosen] for name, column in columns.items()},
            embeddings=embeddings if has_embedding else None,
        )
        for i, example in enumerate(chosen.tolist()):
            rows.append(
                Written(
                    teacher,
                    example,
                    int(seconds[example]),
                    {name: int(column[example]) for name, column in columns.items()},
                    {task: float(outputs[i, tasks.index(task)]) for task in known},
                    embeddings[i].tolist() if has_embedding else None,
                    (version, logged, number),
                    through,
                )
            )
    store.refresh()
    return store, rows


def expected_events(
    rows: list[Written], task: str | None, chosen: Callable[[int], bool]
) -> list[tuple[dict[str, int], int, list[float]]]:
    """Return fm's rows that count by window, time and id; without tasks, their embeddings."""
    won: dict[int, Written] = {}
    for row in rows:
        if row.teacher == "fm" and chosen(row.rank[0]):
            best = won.get(row.example)
            if best is None or row.rank > best.rank:
                won[row.example] = row
    events = []
    for row in won.values():
        value = row.embedding if task is None else row.outputs.get(task)
        if value is not None:
            second = max(row.seconds, row.through)
            vector = [value] if isinstance(value, float) else value
            place = row.seconds // WINDOW, second, row.example
            events.append((place, (row.keys, second, vector)))
    return [event for _, event in sorted(events, key=lambda event: event[0])]


def listed(events: Iterator[MemoryEvents]) -> list[tuple[dict[str, int], int, list[float]]]:
    return [
        ({name: int(c[i]) for name, c in columns.items()}, int(seconds[i]), values[i].tolist())
        for columns, seconds, values in events
        for i in range(len(seconds))
    ]


@pytest.mark.parametrize("resolution", ["float16", "int8", "int4"])
def test_events_are_what_counts_of_a_store(tmp_path: Path, resolution: Any) -> None:
    store, rows = written_store(tmp_path, np.random.default_rng(10), resolution)
    choices: list[tuple[dict[str, Any], str, Callable[[int], bool]]] = [
        ({}, "click", lambda version: True),
        ({"task": "stay"}, "stay", lambda version: True),
        ({"exclude": [3]}, "click", lambda version: version != 3),
        ({"exclude": [3, 1]}, "stay", lambda version: version == 2),
        ({"snapshot": 1}, "click", lambda version: version == 1),
        ({"snapshot": 2}, "stay", lambda version: version == 2),
    ]
    for options, task, chosen in choices:
        events = listed(store_events(store, "fm", **{"task": task, **options}))
        assert events == expected_events(rows, task, chosen) and len(events) > 30
    assert listed(store_events(store, "fm")) == expected_events(rows, "click", lambda v: True)
    assert listed(store_events(store, "fm", snapshot=2)) == []  # which knows no clicks

    events = listed(store_events(store, "fm", keys=["item_id"], embeddings=True))
    expected = expected_events(rows, None, lambda version: True)
    assert len(events) == len(expected) > 30
    for (columns, second, vector), (keys, at, embedding) in zip(events, expected, strict=True):
        assert columns == {"item_id": keys["item_id"]} and second == at
        bound = vector_bound(embedding, resolution)
        assert np.abs(np.float64(vector) - embedding).max() <= bound


def test_a_memory_of_a_store_is_what_the_reference_knows(tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    store, rows = written_store(tmp_path, random, "float16")
    format = replace(FORMATS[1], keys=[USER, ["category_id"], PAIR], width=1)
    keys, seconds, values = zip(*expected_events(rows, "stay", lambda v: True), strict=True)
    names = ("user_id", "item_id", "category_id")
    columns = {name: np.array([row[name] for row in keys]) for name in names}
    events = Rows(columns, np.array(seconds), np.array(values, np.float32))
    order = np.argsort(events.seconds, kind="stable")
    drawn = {name: random.integers(-2, 3, 200) for name in names}
    times = random.integers(2 * WINDOW, 7 * WINDOW, 200)
    examples = Rows(drawn, times, np.zeros((200, 0)))
    memory = Memory(format)
    for part in store_events(store, "fm", task="stay"):
        memory.write(*part)
    check(memory.read(drawn, times), events[order], examples, format)


def test_a_snapshot_trained_through_later_than_an_example_is_not_used(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    keys = {"user_id": np.array([7, 7])}
    store.write(snapshot(1, AT + 50), [1, 2], [1.5, 2.5], [AT, AT + 60], logged=True, keys=keys)
    store.write(snapshot(2, AT - 1), [3, 4], [3.5, 4.5], [AT, AT + 70], keys=keys)
    store.refresh()
    (events,) = store_events(store, "fm", keys=["user_id"])
    assert events.seconds.tolist() == [AT, AT + 50, AT + 60, AT + 70]
    memory = Memory(replace(ONE, length=4))
    memory.write(*events)
    seconds = [AT, AT + 1, AT + 50, AT + 51, AT + 61, AT + 71]
    features = memory.read({"user_id": [7] * 6}, seconds)["user_id"]
    vectors = [part[:, 0].tolist() for part in sequences(features, "vectors")]
    latest = [4.5, 2.5, 1.5, 3.5]
    assert vectors == [[], latest[3:], latest[3:], latest[2:], latest[1:], latest]
    ages = [np.rint(part * 86_400).tolist() for part in sequences(features, "ages_days")]
    assert ages == [[], [1], [50], [1, 51], [1, 11, 61], [1, 11, 21, 71]]


def test_rows_without_any_key_are_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    users = {"user_id": np.array([7, NO_KEY])}
    store.write(snapshot(), [1, 2], [0.5, 1.5], [AT, AT], keys=users)
    store.write(snapshot(), [3], [2.5], [AT + WINDOW])
    store.refresh()
    windows = [*store_events(store, "fm")]  # a night in which nobody was logged in
    assert [part.columns["user_id"].tolist() for part in windows] == [[7, NO_KEY], [NO_KEY]]
    with pytest.raises(ValueError, match=r"the keys \('item_id',\); received 3 that have none"):
        list(store_events(store, "fm", keys=["item_id"]))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"task": "stay"}, "tasks should be of the store's"),
        ({"keys": ["user"]}, "user"),
        ({"snapshot": 3, "exclude": [3]}, "the memory pins version 3 of fm, and excludes it"),
        ({"snapshot": -1}, "snapshot should be a version; received -1"),
        ({"embeddings": True}, "embedding_width"),
        ({"bad_rows": "drop"}, "bad_rows should be 'refuse' or 'quarantine'; received 'drop'"),
    ],
)
def test_wrong_choices_of_events_are_told(tmp_path: Path, wrong: Any, text: str) -> None:
    store = small_store(tmp_path / "store")
    with pytest.raises(ValueError, match=text):
        [*store_events(store, "fm", **wrong)]


def test_bad_rows_are_refused_or_left_out(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    late = [(AT + 1) * US, 1_000 * US]
    plant(store, 2, example_id=[1, 2], trained_through=late, user_id=[7, 7])
    with pytest.raises(StoreError, match="leak: their teacher was trained through"):
        next(store_events(store, "fm"))
    (events,) = store_events(store, "fm", bad_rows="quarantine")
    assert events.seconds.tolist() == [AT]


def test_what_a_sequence_cannot_hold_is_refused_when_it_is_written() -> None:
    memory = Memory(replace(ONE, length=1, resolution="float16"))
    memory.write({"user_id": [1]}, [START], [0.5])
    with pytest.raises(ValueError, match="65504"):
        memory.write({"user_id": [1]}, [START], [1e6])
    assert memory.read({"user_id": [1]}, [START + 1])["user_id"].last.tolist() == [[0.5]]


def test_arrays_may_be_used_again_once_they_are_written() -> None:
    users, seconds = np.array([1]), np.array([START])
    values = np.array([0.5], np.float32)
    memory = Memory(ONE)
    memory.write({"user_id": users}, seconds, torch.from_numpy(values))
    users[:], seconds[:], values[:] = 2, START + 5, 99.0
    features = memory.read({"user_id": [1]}, [START + 6])["user_id"]
    assert features.last.tolist() == [[0.5]]
    assert features.days_since.tolist() == np.float32([6 / 86_400]).tolist()


def test_keys_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="keys should"):
        MemoryFormat(name="fm", keys=[["a", "b"], ["a_b"]])


def test_an_unknown_teacher_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown, .* teachers: .*'other'"):
        [*store_events(small_store(tmp_path), "other")]


@pytest.mark.parametrize("second", [-1, START * 1_000, 2**62])
def test_times_of_another_unit_are_told(second: int) -> None:
    with pytest.raises(ValueError, match="seconds should be seconds since 1970"):
        Memory(ONE).write({"user_id": [1]}, [second], [0.5])
    with pytest.raises(ValueError, match="seconds should be seconds since 1970"):
        Memory(ONE).read({"user_id": [1]}, [second])


@pytest.mark.parametrize("delay_seconds", [0.9, float("inf"), 2**63])
def test_a_delay_that_is_no_number_of_seconds_is_told(delay_seconds: Any) -> None:
    with pytest.raises(ValueError, match="delay_seconds should be"):
        replace(ONE, delay_seconds=delay_seconds)


@pytest.mark.parametrize("name", ["width", "length"])
def test_a_truth_value_is_no_number(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} should be a whole number"):
        MemoryFormat(**{"name": "fm", "keys": [USER], name: True})


@pytest.mark.parametrize("max_keys", ["3", 1.5])
def test_a_bound_that_is_no_whole_number_is_told(max_keys: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_keys should be"):
        Memory(ONE, max_keys=max_keys)


def test_a_table_of_arrow_has_columns() -> None:
    memory = Memory(ONE)
    memory.write(pa.table({"user_id": [7]}), [START], [0.5])
    assert memory.read({"user_id": [7]}, [START + 1])["user_id"].count.tolist() == [1]


class Teacher(nn.Module):
    """A teacher with TorchRec's contract, whose logit is the item's."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, batch: SimpleNamespace) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits = self.logits[batch.keys["item_id"]]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


def stream() -> list[SimpleNamespace]:
    """Return three batches a minute apart: of user 1, and of an example without a user."""
    return [
        SimpleNamespace(
            example_ids=torch.tensor([2 * i, 2 * i + 1]),
            event_seconds=torch.tensor([AT + 60 * i, AT + 60 * i + 1]),
            keys={"user_id": torch.tensor([1, int(NO_KEY)]), "item_id": torch.tensor([i, i])},
            labels=torch.tensor([1.0, 0.0]),
        )
        for i in range(3)
    ]


def test_a_student_learns_from_what_was_logged_of_earlier_examples(
    tmp_path: Path,
) -> None:
    store, teacher = new_store(tmp_path), Teacher()
    with TeacherLogger(store, "fm", keys=lambda batch: batch.keys) as logger:
        logger.attach(teacher)
        for batch in stream():
            teacher(batch)
    store.refresh()

    def features_of_a_pass(memory: Memory) -> list[Tensor]:
        (events,) = store_events(store, "fm", keys=["user_id"])
        memory.write(*events)
        dense = []
        for batch in stream():
            read = memory.read(batch.keys, batch.event_seconds)
            dense.append(torch.from_numpy(memory.format.dense(read)))
        return dense

    memory = Memory(ONE)
    dense = features_of_a_pass(memory)
    days = np.log1p(60 / 86_400)
    weight = 2.0 ** (-60 / ONE.half_life_seconds)
    known = [
        [0.0] * 6,
        [1.0, np.log(2), days, 0.5, 0.5, 0.5],
        [1.0, np.log(3), days, -0.25, -1.0, (weight * 0.5 - 1) / (weight + 1)],
    ]
    expected = torch.tensor([[row, [0.0] * 6] for row in known], dtype=torch.float32)
    torch.testing.assert_close(torch.stack(dense), expected, rtol=2.0**-21, atol=0.0)

    student = nn.Linear(6, 1)
    for batch, features in zip(stream(), dense, strict=True):
        logits = student(features)[:, 0]
        nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
    assert student.weight.grad is not None and student.weight.grad.abs().min() > 0

    with pytest.raises(ValueError, match="events should be written before later examples"):
        features_of_a_pass(memory)  # a second epoch
    with pytest.raises(ValueError, match="examples should be read in order of time"):
        memory.read(stream()[0].keys, stream()[0].event_seconds)
    assert torch.equal(torch.stack(features_of_a_pass(Memory(ONE))), torch.stack(dense))
