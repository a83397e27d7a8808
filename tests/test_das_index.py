"""A window's index by example id, against a dict: any ids, any number, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_exfm.das import index as index_module
from torchrec_exfm.das.index import WindowIndex

TOP = 2**63 - 1
ROWS = 150_000  # more than two blocks of the build
IDS = st.one_of(st.integers(0, TOP), st.integers(0, 40), st.integers(TOP - 40, TOP))
PATTERNS = {
    "random": np.unique(np.random.default_rng(1).integers(0, TOP, ROWS)),
    "sequential": np.arange(ROWS),
    "basket and product": (np.arange(ROWS) // 7 << 25) | (np.arange(ROWS) % 7 * 104_729),
    "high bits only": np.arange(ROWS) << 45,
    "next to 2^53": np.arange(2**53 - 10, 2**53 + ROWS - 10),
    "the largest": TOP - np.arange(ROWS),
}


def outputs_of(ids: np.ndarray, tasks: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.normal(size=(len(ids), tasks)).astype(np.float32), rng.random(len(ids), np.float32)


def check(ids: np.ndarray, queries: np.ndarray, tasks: int) -> WindowIndex:
    """Compare an index's results with a dict."""
    values, ages = outputs_of(ids, tasks)
    window = WindowIndex(ids, values, ages)
    rows = {int(example_id): row for row, example_id in enumerate(ids)}
    row = np.array([rows.get(int(query), -1) for query in queries], dtype=np.int64)
    output, found_ages, present = window.find(queries)
    assert (output.dtype, found_ages.dtype, present.dtype) == (np.float32, np.float32, np.bool_)
    np.testing.assert_array_equal(present, row >= 0)
    padded, padded_ages = np.vstack([values, np.zeros((1, tasks))]), np.append(ages, 0.0)
    assert output.shape == (len(queries), tasks)
    np.testing.assert_array_equal(output, padded[row])
    np.testing.assert_array_equal(found_ages, padded_ages[row])
    assert len(window) == len(ids)
    return window


@settings(deadline=None)
@given(
    ids=st.lists(IDS, unique=True, max_size=60),
    others=st.lists(st.one_of(IDS, st.integers(-(2**63), -1)), max_size=20),
    tasks=st.sampled_from([1, 3]),
)
def test_it_finds_what_a_dict_finds(ids: list[int], others: list[int], tasks: int) -> None:
    near = [query ^ 1 for query in ids]
    queries = np.array([*reversed(ids), *others, *near, *ids], dtype=np.int64)
    check(np.array(ids, dtype=np.int64), queries, tasks)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_large_windows_of_every_pattern(pattern: str, tasks: int) -> None:
    rng = np.random.default_rng(2)
    ids = rng.permutation(PATTERNS[pattern])
    stored = rng.choice(ids, 4096)
    flipped = stored ^ (1 << rng.integers(0, 63, 4096))
    # about 1.1 rows a bucket: never many in one, as the mix spreads the pattern
    window = WindowIndex(ids, *outputs_of(ids, tasks))
    assert np.diff(window._starts.astype(np.int64)).max() <= 16
    check(ids, rng.permutation(np.concatenate([stored, flipped, ids])), tasks)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 64, 65, 1000, 2**16 - 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("tasks", [1, 3])
def test_bytes_a_row(rows: int, tasks: int) -> None:
    ids = np.arange(rows) * 999_983
    window = check(ids, np.append(ids, [1, -1]), tasks)
    record = {1: 16, 3: 24}[tasks]
    # more than half as many buckets as rows, no more than rows, 4 bytes each
    assert (record + 2) * rows <= window.nbytes <= (record + 4) * rows + 48
    arrays = [part for part in vars(window).values() if isinstance(part, np.ndarray)]
    assert window.nbytes == sum(part.nbytes for part in arrays)
    assert all(part.base is None for part in arrays)


def test_an_empty_window_finds_nothing() -> None:
    none = np.array([], dtype=np.int64)
    check(none, none, 3)
    window = check(none, np.array([0, 1, TOP, -1, -(2**63)]), 1)
    assert len(window) == 0


def with_keys(keys: list[int]) -> np.ndarray:
    """Return the ids that hash to these keys, without negative ones."""
    ids = []
    for key in keys:
        for factor in reversed(index_module._FACTORS):
            key = key * pow(int(factor), -1, 2**64) % 2**64
            key ^= key >> 32
        ids.append(key)
    return np.array([example_id for example_id in ids if example_id <= TOP], dtype=np.int64)


@pytest.mark.parametrize("first_key", [0, 2**63 - 1000, 2**64 - 1000])
def test_a_window_whose_ids_share_one_bucket(first_key: int) -> None:
    ids = with_keys([first_key + step for step in range(1000)])
    assert len(ids) > 400
    absent, stored = ids[::5], np.delete(ids, slice(None, None, 5))
    elsewhere = with_keys([(key << 54) + 1 for key in range(1024)])
    window = check(stored, np.concatenate([absent, stored, elsewhere, -1 - elsewhere]), 1)
    assert np.diff(window._starts.astype(np.int64)).max() == len(stored)


def test_any_float32_is_kept_to_the_bit_and_missing_is_zero() -> None:
    odd = np.array([[np.nan], [np.inf], [-np.inf], [-0.0], [1e-45], [3.4e38]], np.float32)
    ids = np.arange(6)
    values, ages, present = WindowIndex(ids, odd, odd[:, 0]).find(np.arange(200))
    assert values[:6].tobytes() == ages[:6].tobytes() == odd.tobytes()
    assert not values[6:].any() and not ages[6:].any() and not present[6:].any()


def test_the_callers_arrays_are_neither_kept_nor_changed() -> None:
    ids, queries = np.arange(0, 40, 2), np.arange(40)
    values, ages = outputs_of(ids, 1)
    wide_ids, wide_values, wide_ages = (
        np.repeat(ids, 3),
        np.repeat(values, 3, 0),
        np.repeat(ages, 3),
    )
    window = WindowIndex(wide_ids[::3], wide_values[::3], wide_ages[::3])
    for array in (wide_ids, wide_values, wide_ages):
        array[:] = 1
    queries.flags.writeable = False
    for _ in range(2):
        found_values, found_ages, present = window.find(queries)
        np.testing.assert_array_equal(found_values[::2], values)
        np.testing.assert_array_equal(found_ages[::2], ages)
        assert present[::2].all() and not present[1::2].any()
        found_values[:], found_ages[:], present[:] = 9, 9, False
    assert window.find(queries[::-1])[2][1::2].all()


IDS_3, VALUES_3, AGES_3 = np.arange(3), np.zeros((3, 1), np.float32), np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IDS_3.astype(np.int32), VALUES_3, AGES_3), TypeError, "example_ids .* int64; .* int32"),
        ((IDS_3.astype(float), VALUES_3, AGES_3), TypeError, "example_ids .* int64; .* float64"),
        (([0, 1, 2], VALUES_3, AGES_3), TypeError, "example_ids .* int64; received list"),
        ((IDS_3, VALUES_3.astype(float), AGES_3), TypeError, "values .* float32; .* float64"),
        ((IDS_3, VALUES_3, AGES_3.astype(float)), TypeError, "age_seconds .* float32; .* float64"),
        ((IDS_3[:, None], VALUES_3, AGES_3), ValueError, r"example_ids .* \(B,\); .* \(3, 1\)"),
        ((IDS_3, VALUES_3[:, 0], AGES_3), ValueError, r"values .* \(3, T\); .* \(3,\)"),
        ((IDS_3, VALUES_3[:2], AGES_3), ValueError, r"values .* \(3, T\); .* \(2, 1\)"),
        ((IDS_3, VALUES_3, AGES_3[:2]), ValueError, r"age_seconds .* \(3,\); .* \(2,\)"),
        ((IDS_3 - 1, VALUES_3, AGES_3), ValueError, "at least 0; received -1"),
        ((IDS_3 // 2, VALUES_3, AGES_3), ValueError, r"once; received 0 more .*\(1 such"),
        ((np.full(3, TOP), VALUES_3, AGES_3), ValueError, rf"received {TOP} more .*\(2 such"),
    ],
)
def test_what_an_index_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WindowIndex(*arguments)


def test_a_repeated_id_is_seen_among_many() -> None:
    ids = np.append(PATTERNS["sequential"], ROWS // 2)
    with pytest.raises(ValueError, match=f"received {ROWS // 2} more than once"):
        WindowIndex(ids, *outputs_of(ids, 1))


def test_more_rows_than_32_bits_count_are_refused() -> None:
    rows = 2**32  # arrays of one number each, repeated
    ids = np.broadcast_to(np.int64(-1), (rows,))
    ones = np.broadcast_to(np.float32(1), (rows, 1))
    with pytest.raises(ValueError, match=r"fewer than 2\^32 rows; received 4294967296"):
        WindowIndex(ids, ones, ones[:, 0])


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (IDS_3.astype(np.int32), TypeError, "example_ids .* int64; .* int32"),
        (IDS_3.astype(float), TypeError, "example_ids .* int64; .* float64"),
        (IDS_3.astype(np.uint64), TypeError, "example_ids .* int64; .* uint64"),
        (IDS_3[:, None], ValueError, r"example_ids .* \(B,\); .* \(3, 1\)"),
    ],
)
def test_what_find_refuses(queries: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WindowIndex(IDS_3, VALUES_3, AGES_3).find(queries)
