"""Example ids, against the formula in Python's own integers: a stored format that never changes."""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_exfm.das.ids import hash_ids, hash_ids_sql

INT64 = st.integers(-(2**63), 2**63 - 1)
ROWS = st.lists(st.lists(st.one_of(INT64, st.integers(-2, 2)), max_size=4), min_size=3, max_size=3)
STEP = 0x9E3779B97F4A7C15
CPU = torch.device("cpu")


def mix(state: int) -> int:
    """Return SplitMix64's output for a state."""
    z = (state + STEP) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def reference(*columns: list[list[int]]) -> list[int]:
    """Compute the docstring's formula by example; a column has a list of values per example."""
    ids = []
    for lists in zip(*columns, strict=True):
        h = 0
        for values in lists:
            terms = [mix(mix(value) + STEP * j) for j, value in enumerate(values, 1)]
            h = mix(h + mix(len(values) + sum(terms)))
        ids.append(h % 2**63)
    return ids


def jagged(rows: list[list[int]], dtype: torch.dtype = torch.int64) -> JaggedTensor:
    values = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return JaggedTensor(values=values, lengths=torch.tensor([len(row) for row in rows]))


def test_the_mix_is_splitmix64() -> None:
    # its first outputs for the seeds 0 and 1234567, as published with it
    assert mix(0) == 0xE220A8397B1DCDAF
    assert [mix(1234567), mix(1234567 + STEP)] == [6457827717110365317, 3203168211198807973]


def test_stored_ids_never_change() -> None:
    user = [[0], [1], [-1], [2**63 - 1], [2**53 + 1]]
    shown = [[5, 6], [6, 5], [0, 0], [-(2**63), 7], [1, 2]]
    liked = [[], [3], [3, 3], [0], [0, 0]]
    frozen = [
        4047286164765862190,
        8062205065814404778,
        4900968334426649625,
        6391046222854095840,
        5486638556285405892,
    ]
    columns = torch.tensor(user)[:, 0], torch.tensor(shown), jagged(liked)
    assert hash_ids(*columns).tolist() == frozen
    assert reference(user, shown, liked) == frozen


@settings(deadline=None)
@given(columns=st.lists(ROWS, min_size=1, max_size=3))
def test_ids_are_those_of_the_formula(columns: list[list[list[int]]]) -> None:
    ids = hash_ids(*(jagged(rows) for rows in columns))
    assert ids.dtype == torch.int64 and ids.shape == (3,)
    assert ids.tolist() == reference(*columns)
    assert min(ids.tolist()) >= 0


@settings(deadline=None)
@given(table=st.integers(0, 3).flatmap(lambda k: st.lists(st.lists(INT64, min_size=k, max_size=k))))
def test_a_table_has_the_ids_of_its_rows(table: list[list[int]]) -> None:
    tensor = torch.tensor(table, dtype=torch.int64).reshape(
        len(table), len(table[0]) if table else 2
    )
    assert hash_ids(tensor).tolist() == reference(table)
    if tensor.shape[1] == 1:
        assert torch.equal(hash_ids(tensor[:, 0]), hash_ids(tensor))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64],
)
def test_only_the_values_count(dtype: torch.dtype) -> None:
    rows = [[0, 1], [1], [], [1, 1, 0]]
    user = torch.tensor([0, 1, 1, 0])
    expected = reference(user.unsqueeze(1).tolist(), rows)
    assert hash_ids(user.to(dtype), jagged(rows, dtype)).tolist() == expected
    negative = torch.tensor([-1, -128])
    if dtype.is_signed:
        assert torch.equal(hash_ids(negative.to(dtype)), hash_ids(negative))


def test_neither_the_batch_nor_the_layout_counts() -> None:
    table = torch.randint(0, 10, (50, 3), generator=torch.Generator().manual_seed(0))
    ids = hash_ids(table, table[:, 1])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(hash_ids(table[order], table[order, 1]), ids[order])
    assert torch.equal(hash_ids(table.T.contiguous().T, table[:, 1].contiguous()), ids)


def test_features_of_a_keyed_jagged_tensor() -> None:
    rows = {"item": [[9, 9], [8], [7, 7, 7]], "user": [[1], [], [2, 3]], "none": [[], [], []]}
    values = [value for lists in rows.values() for row in lists for value in row]
    lengths = [len(row) for lists in rows.values() for row in lists]
    features = KeyedJaggedTensor(
        list(rows),
        torch.tensor(values, dtype=torch.int32),
        weights=torch.rand(len(values)),
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )
    copies = features.values().clone(), features.lengths().clone()
    for key in rows:
        assert hash_ids(features[key]).tolist() == reference(rows[key])
    assert hash_ids(features["user"], features["item"]).tolist() == reference(
        rows["user"], rows["item"]
    )
    assert torch.equal(features.values(), copies[0]) and torch.equal(features.lengths(), copies[1])


def test_values_outside_all_examples_do_not_count() -> None:
    offsets = torch.tensor([2, 3, 3, 5], dtype=torch.int32)
    within = JaggedTensor(values=torch.tensor([50, 51, 1, 2, 3, 52, 53]), offsets=offsets)
    assert hash_ids(within).tolist() == reference([[1], [], [2, 3]])


def test_how_many_values_and_where_they_are_matters() -> None:
    single, none = jagged([[1]]), jagged([[]])
    ids = [
        hash_ids(*columns).item()
        for columns in (
            (single, none),
            (none, single),
            (single,),
            (none,),
            (none, none),
            (jagged([[0]]),),
            (jagged([[0, 0]]),),
            (jagged([[0]]), jagged([[0]])),
            (jagged([[1, 2]]),),
            (jagged([[2, 1]]),),
            (jagged([[1]]), jagged([[2]])),
            (jagged([[2]]), jagged([[1]])),
            (jagged([[1, 2]]), none),
        )
    ]
    assert len(set(ids)) == len(ids)


def test_two_million_structured_rows_do_not_collide() -> None:
    number = torch.arange(2_000_000)
    pairs = torch.stack([number // 1000, number % 1000], 1)  # a user and an item, small numbers
    for columns in ((pairs[:, 0], pairs[:, 1]), (pairs,), (number << 25,)):
        ids = hash_ids(*columns).sort().values
        assert (ids.diff() > 0).all()
        # spread evenly: of 64 parts of the range, each has its 31250, give or take 6 sigma
        counts = torch.bincount(ids >> 57, minlength=64)
        assert (counts - 31_250).abs().max() < 6 * 31_250**0.5


@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_bit_of_a_value_turns_over_half_of_the_id(place: int) -> None:
    rows = torch.arange(4096 * 3).reshape(4096, 3)
    ids, bits = hash_ids(rows[:, 0], rows[:, 1:]), torch.arange(63)
    for bit in range(64):
        other = rows.clone()
        other[:, place] ^= torch.tensor(1) << bit
        turned = ids ^ hash_ids(other[:, 0], other[:, 1:])
        share = ((turned.unsqueeze(1) >> bits) & 1).double().mean(0)
        # 1/2, give or take 6.4 sigma
        assert ((share - 0.5).abs() < 0.05).all()


def test_no_examples() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    none = JaggedTensor(values=empty, lengths=empty)
    ids = hash_ids(empty, torch.empty(0, 3, dtype=torch.int32), none)
    assert ids.shape == (0,) and ids.dtype == torch.int64


def on(device: torch.device) -> tuple[Tensor, Tensor, JaggedTensor]:
    values, offsets = torch.arange(5, device=device), torch.tensor([0, 2, 2, 5], device=device)
    features = JaggedTensor(values=values, offsets=offsets)
    return values[:3].int(), (values[:3] > 1).unsqueeze(1), features


def test_a_device_is_never_waited_for() -> None:
    # a meta tensor has no contents: whatever looks at them fails
    ids = hash_ids(*on(torch.device("meta")))
    assert ids.shape == (3,) and ids.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_ids() -> None:
    ids = hash_ids(*on(torch.device("cuda")))
    assert ids.device.type == "cuda" and ids.tolist() == hash_ids(*on(CPU)).tolist()


# ---- Columns on the host ----

TEXTS = ["ann", "", "ann ", "1", "Ångström", "漢\0字\0", "e97a2c56-0a4e-4c4b-9d5e-2ed0a1a7e3cd"]
WHOLE = [0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1, 7]


def number_of(text: str) -> int:
    return int(hashlib.md5(text.encode()).hexdigest()[:16], 16)


def singles(values: list[Any]) -> list[list[int]]:
    return [[number_of(value) if isinstance(value, str) else value] for value in values]


def host(ids: Any) -> list[int]:
    """Require ids to be a numpy array; return them as a list."""
    assert isinstance(ids, np.ndarray) and ids.dtype == np.int64 and ids.shape == (len(ids),)
    return [int(number) for number in ids]


def test_stored_ids_of_text_never_change() -> None:
    people = [uuid.UUID(int=7), uuid.UUID("E97A2C56-0A4E-4C4B-9D5E-2ED0A1A7E3CD")]
    assert host(hash_ids(["ann", "Ångström"], people)) == [
        7487876856254067498,
        1600886827379260055,
    ]
    assert number_of("abc") == 0x900150983CD24FB0  # as RFC 1321 has it


COLUMNS_OF_TEXT: dict[str, Callable[[list[str]], Any]] = {
    "list": list,
    "tuple": tuple,
    "objects": lambda texts: np.array(texts, object),
    "numpy, of any length": lambda texts: np.array(texts, np.dtypes.StringDType()),
    "pandas": pd.Series,
    "pandas objects": lambda texts: pd.Series(texts, dtype=object),
    "pandas string": lambda texts: pd.Series(texts, dtype="string"),
    "pandas on Arrow": lambda texts: pd.Series(texts, dtype=pd.ArrowDtype(pa.string())),
    "pandas categories": lambda texts: pd.Series(texts, dtype="category"),
    "pandas index": pd.Index,
    "Polars": pl.Series,
    "Polars categories": lambda texts: pl.Series(texts, dtype=pl.Categorical),
    "Arrow": pa.array,
    "Arrow, large": lambda texts: pa.array(texts, pa.large_string()),
    "Arrow, views": lambda texts: pa.array(texts, pa.string_view()),
    "Arrow, dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "chunked": lambda texts: pa.chunked_array([texts[:2], texts[2:]]),
}


@pytest.mark.parametrize("kind", COLUMNS_OF_TEXT)
def test_text_has_one_id_in_whatever_it_comes(kind: str) -> None:
    make = COLUMNS_OF_TEXT[kind]
    assert host(hash_ids(make(TEXTS))) == reference(singles(TEXTS))
    assert host(hash_ids(WHOLE, make(TEXTS))) == reference(singles(WHOLE), singles(TEXTS))
    assert host(hash_ids(make([]))) == []
    if kind not in ("numpy, of any length", "pandas index"):  # which have no nulls
        with pytest.raises(ValueError, match=r"column 0 should have no nulls .* rows: 1: "):
            hash_ids(make(["ann", None]))  # type: ignore[list-item]


COLUMNS_OF_INTEGERS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "numpy": lambda values: np.array(values, np.int64),
    "big-endian": lambda values: np.array(values, ">i8"),
    "strided": lambda values: np.repeat(values, 2)[::-2][::-1],
    "uint64": lambda values: np.array(values, np.int64).view(np.uint64),
    "pandas": pd.Series,
    "pandas nullable": lambda values: pd.Series(values, dtype="Int64"),
    "pandas on Arrow": lambda values: pd.Series(values, dtype="int64[pyarrow]"),
    "pandas unsigned": lambda values: pd.Series(
        np.array(values, np.int64).view(np.uint64), dtype="UInt64"
    ),
    "Polars": pl.Series,
    "Polars unsigned": lambda values: pl.Series(np.array(values, np.int64).view(np.uint64)),
    "Arrow": pa.array,
    "Arrow unsigned": lambda values: pa.array(np.array(values, np.int64).view(np.uint64)),
    "chunked": lambda values: pa.chunked_array([values[:2], values[2:]]),
}


@pytest.mark.parametrize("kind", COLUMNS_OF_INTEGERS)
def test_integers_have_the_ids_of_tensors(kind: str) -> None:
    column = COLUMNS_OF_INTEGERS[kind](WHOLE)
    assert host(hash_ids(column)) == hash_ids(torch.tensor(WHOLE)).tolist()
    assert host(hash_ids(column, TEXTS)) == reference(singles(WHOLE), singles(TEXTS))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int32, np.uint32, np.uint64])
def test_only_the_values_count_in_arrays(dtype: type) -> None:
    values = np.array([[0, 1], [1, 1]], dtype)
    assert host(hash_ids(values)) == reference([[0, 1], [1, 1]])


def test_a_table_of_text_has_the_ids_of_its_rows() -> None:
    rows = [["ann", "ben"], ["ben", "ann"], ["", ""]]
    expected = reference([[number_of(text) for text in row] for row in rows])
    assert host(hash_ids(np.array(rows))) == host(hash_ids(np.array(rows, object))) == expected


@pytest.mark.parametrize("make", [list, np.array, pl.Series, pa.array])
def test_a_uuid_is_its_text(make: Callable[[Any], Any]) -> None:
    people = [uuid.UUID(int=number << 99) for number in range(3)]
    texts = [str(person) for person in people]
    assert all(len(text) == 36 and text == text.lower() for text in texts)
    column = pa.array([p.bytes for p in people], pa.uuid()) if make is pa.array else make(people)
    assert host(hash_ids(column)) == host(hash_ids(texts))
    with pytest.raises(ValueError, match="no nulls"):
        hash_ids([people[0], None])


def test_columns_of_arrays_go_with_tensors_on_the_host() -> None:
    ids = hash_ids(torch.tensor([1, 2]), ["ann", "ben"], jagged([[1], []]))
    assert isinstance(ids, Tensor)
    assert ids.tolist() == reference([[1], [2]], singles(["ann", "ben"]), [[1], []])
    with pytest.raises(ValueError, match=r"one device; received \['cpu', 'meta'\]; move"):
        hash_ids(torch.arange(2, device="meta"), ["ann", "ben"])


@given(st.lists(st.text(st.characters(exclude_categories=[])) | st.integers(), min_size=1))
def test_text_alone_is_hashed(values: list[Any]) -> None:
    if all(isinstance(value, str) for value in values):
        if any(0xD800 <= ord(letter) < 0xE000 for value in values for letter in value):
            with pytest.raises(ValueError, match=r"Unicode text; received .*correct it"):
                hash_ids(values)
        else:
            assert host(hash_ids(values)) == reference(singles(values))
    elif all(-(2**63) <= value < 2**63 for value in values if isinstance(value, int)):
        all_integers = all(isinstance(value, int) for value in values)
        if all_integers:
            assert host(hash_ids(values)) == reference(singles(values))
        else:
            with pytest.raises(TypeError, match=r"column 0 .* received int and str objects; pass"):
                hash_ids(values)


# ---- SQL ----


def columns_to_hash(size: int) -> dict[str, list[Any]]:
    """Return texts and integers, including the ends of their ranges."""
    rng = random.Random(0)
    ends = [0, 1, -1, 2**31, 2**32 - 1, -(2**31), -(2**32), 2**63 - 1, -(2**63)]
    integers = ends + [rng.randrange(-(2**63), 2**63) for _ in range(size - len(ends))]
    texts = [TEXTS[row % 7] * (row // 7) for row in range(size)]
    return {"user": texts, "request": integers, 'Odd "`name': integers[::-1]}


SETS_OF_COLUMNS: list[dict[str, Any]] = [
    {"request": "integer"},
    {"user": "string"},
    {"user": "string", "request": "integer"},
    {"request": "integer", "user": "string", 'Odd "`name': "integer"},
]


@pytest.mark.parametrize("columns", SETS_OF_COLUMNS, ids=str)
def test_duckdb_gives_the_same_ids(columns: dict[str, Any]) -> None:
    turn = pa.table(columns_to_hash(200))
    database = duckdb.connect()
    database.register("turn", turn)  # a name that is in the expression
    rows = database.sql(f"SELECT {hash_ids_sql(columns, 'duckdb')} FROM turn").fetchall()
    assert [row[0] for row in rows] == host(hash_ids(*(turn[name] for name in columns)))


def test_types_of_duckdb() -> None:
    def hashed(value: str, kind: Any) -> Any:
        query = f"SELECT {hash_ids_sql({'v': kind}, 'duckdb')} FROM (SELECT {value} AS v)"
        return duckdb.sql(query).fetchall()[0][0]

    for kind in "TINYINT", "SMALLINT", "INTEGER", "BIGINT":
        assert hashed(f"(-7)::{kind}", "integer") == hash_ids([-7])[0]
    unsigned = np.array([2**64 - 1], np.uint64)
    assert hashed(f"{2**64 - 1}::UBIGINT", "integer") == hash_ids(unsigned)[0]
    person = uuid.UUID("E97A2C56-0A4E-4C4B-9D5E-2ED0A1A7E3CD")
    assert hashed(f"'{person}'::UUID::VARCHAR", "string") == hash_ids([person])[0]
    assert hashed("NULL::BIGINT", "integer") is None and hashed("NULL::VARCHAR", "string") is None
    for value, kind in (("1.5", "integer"), ("'7'", "integer"), ("7", "string"), ("1.0", "string")):
        with pytest.raises(duckdb.BinderException):
            hashed(value, kind)


@pytest.mark.parametrize(
    ("columns", "dialect", "message"),
    [
        ({}, "duckdb", "columns should be names with one of .*'integer', 'string'.*received {}"),
        ({"user": "text"}, "spark", "columns should .* received {'user': 'text'}"),
        ({"user": "string"}, "sqlite", r"dialect should be one of .*'spark'\); received 'sqlite'"),
    ],
)
def test_what_sql_is_refused(columns: Any, dialect: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hash_ids_sql(columns, dialect)


KJT = KeyedJaggedTensor(["a"], torch.arange(2), lengths=torch.tensor([1, 1]))
ONE = torch.arange(2)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ((), ValueError, "one column or more; received none"),
        ((ONE, ONE.float()), TypeError, "column 1 .* integers or booleans; .* torch.float32"),
        ((ONE.bfloat16(),), TypeError, "column 0 .* torch.bfloat16"),
        ((ONE.to(torch.complex64),), TypeError, "column 0 .* torch.complex64"),
        ((jagged([[1], [2]], torch.float64),), TypeError, "column 0 .* torch.float64"),
        ((ONE, [0.5, 1.5]), TypeError, "column 1 .* integers, booleans, text .*received float64; "),
        (([1, 2.5],), TypeError, "column 0 .* received float64; pass"),
        (([1, "2"],), TypeError, "column 0 .* received int and str objects; pass"),
        (([b"ann", b"ben"],), TypeError, r"column 0 .* received \|S3; pass"),
        ((pa.array([b"ann"]),), TypeError, "column 0 .* received bytes objects; pass"),
        (([Decimal(1), Decimal(2)],), TypeError, "column 0 .* received Decimal objects; pass"),
        ((np.array([1, 2], object),), TypeError, "received int objects; .* np.int64 or np.uint64"),
        (([1, 2**63],), TypeError, "received int objects; pass .* np.int64 or np.uint64"),
        (([2**64],), TypeError, "column 0 .* received int objects; pass"),
        ((["ann", np.nan],), TypeError, "column 0 .* received float and str objects; pass"),
        ((np.zeros(2, "M8[s]"),), TypeError, r"column 0 .* received datetime64\[s\]; pass"),
        (([None, 1],), ValueError, "column 0 should have no nulls .*: 0: fill"),
        (
            (np.ma.array([1, 2], mask=[0, 1]),),
            ValueError,
            "column 0 should .*nothing masked.*: 1: ",
        ),
        ((["\ud800"],), ValueError, "column 0 .* Unicode text; received '.*ud800'"),
        (("ann",), ValueError, r"column 0 .* \(B,\) or \(B, K\); received \(\)"),
        ((KJT,), TypeError, r"column 0 .* received a KeyedJaggedTensor; pass kjt\[key\]"),
        ((torch.tensor(1),), ValueError, r"column 0 .* \(B,\) or \(B, K\); received \(\)"),
        ((ONE.reshape(1, 1, 2),), ValueError, r"column 0 .* received \(1, 1, 2\)"),
        (
            (JaggedTensor(values=ONE.reshape(2, 1), lengths=torch.tensor([1, 1])),),
            ValueError,
            r"column 0 .* \(N,\) in a JaggedTensor; received \(2, 1\)",
        ),
        ((ONE, torch.arange(3)), ValueError, r"number of examples; received \[2, 3\]"),
        ((ONE, jagged([[1, 2]])), ValueError, r"number of examples; received \[2, 1\]"),
        ((ONE, torch.arange(1)), ValueError, r"number of examples; received \[2, 1\]"),
    ],
)
def test_what_is_refused(columns: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hash_ids(*columns)
