"""Example ids, against the formula in Python's own integers: a stored format that never changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_exfm.das.ids import hash_ids

INT64 = st.integers(-(2**63), 2**63 - 1)
ROWS = st.lists(st.lists(st.one_of(INT64, st.integers(-2, 2)), max_size=4), min_size=3, max_size=3)
STEP = 0x9E3779B97F4A7C15
CPU = torch.device("cpu")


def mix(state: int) -> int:
    """SplitMix64's output for a state."""
    z = (state + STEP) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def reference(*columns: list[list[int]]) -> list[int]:
    """The docstring's formula, one example at a time; a column is a list of values an example."""
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
    kept = features.values().clone(), features.lengths().clone()
    for key in rows:
        assert hash_ids(features[key]).tolist() == reference(rows[key])
    assert hash_ids(features["user"], features["item"]).tolist() == reference(
        rows["user"], rows["item"]
    )
    assert torch.equal(features.values(), kept[0]) and torch.equal(features.lengths(), kept[1])


def test_values_outside_all_examples_do_not_count() -> None:
    offsets = torch.tensor([2, 3, 3, 5], dtype=torch.int32)
    within = JaggedTensor(values=torch.tensor([50, 51, 1, 2, 3, 52, 53]), offsets=offsets)
    assert hash_ids(within).tolist() == reference([[1], [], [2, 3]])


def test_how_many_values_and_where_they_are_matters() -> None:
    one, none = jagged([[1]]), jagged([[]])
    ids = [
        hash_ids(*columns).item()
        for columns in (
            (one, none),
            (none, one),
            (one,),
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
        (([1, 2],), TypeError, "column 0 .* received list"),
        ((KJT,), TypeError, r"received KeyedJaggedTensor; .* kjt\[key\]"),
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
