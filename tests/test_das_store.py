"""Writing and reading the teacher store: rows are unchanged, bad and leaking ones refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import das_data as dd
import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from das_data import AT, WINDOW, new_store, snapshot

from torchrec_exfm.das import StoreError, TeacherStore, WriteReport
from torchrec_exfm.das.arrays import MAX_SECONDS
from torchrec_exfm.das.rules import NO_KEY
from torchrec_exfm.das.schema import StoreFormat

LARGEST = float(np.finfo(np.float32).max)
LARGEST_BFLOAT16 = float(torch.finfo(torch.bfloat16).max)
TOP = 2**63 - 1


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return new_store(tmp_path)


def written(store: TeacherStore, values: Any) -> np.ndarray:
    """Write outputs of examples 0, 1 ...; return them as they are read."""
    store.write(snapshot(), np.arange(len(values)), values, np.full(len(values), AT))
    return dd.all_rows(store).outputs


def bits(values: Any) -> list[int]:
    return np.asarray(values, dtype=np.float32).view(np.uint32).ravel().tolist()


# ---- What comes back ----


def test_float32_comes_back_to_the_bit(store: TeacherStore) -> None:
    extremes = [0.0, -0.0, LARGEST, -LARGEST, 1e-45, -1e-45, np.float32(1) / 3, 1 + 2**-23]
    random = np.random.default_rng(0).integers(0, 0x7F80_0000, 1000, np.uint32).view(np.float32)
    values = np.concatenate([np.array(extremes, np.float32), random, -random])
    assert bits(written(store, values)) == bits(values)


def test_bfloat16_is_rounded_as_torch_rounds(tmp_path: Path) -> None:
    halfway = [0x3F80_8000, 0x3F81_8000, 0x3F80_7FFF, 0x3F80_8001, 0xBF80_8000, 0x0000_8000, 1]
    random = np.random.default_rng(1).integers(0, 0x7F7F_0000, 1000, np.uint32)
    values = np.concatenate([np.array(halfway, np.uint32), random]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float()
    assert bits(written(new_store(tmp_path, resolution="bfloat16"), values)) == bits(expected)


def test_bfloat16_never_turns_a_finite_output_into_an_infinite_one(tmp_path: Path) -> None:
    store = new_store(tmp_path, resolution="bfloat16")
    last = np.array([0x7F7F_7FFF, 0xFF7F_7FFF], np.uint32).view(np.float32)  # rounds to the largest
    assert written(store, last).ravel().tolist() == [LARGEST_BFLOAT16, -LARGEST_BFLOAT16]
    for value in (np.nextafter(last[0], np.float32("inf")), LARGEST, -LARGEST):
        with pytest.raises(ValueError, match="NaN or infinite"):
            store.write(snapshot(), [9], [value], [AT])
    assert len(dd.all_rows(store)) == 2


def test_every_dtype_of_floats_is_taken(tmp_path: Path) -> None:
    values = [0.5, -2.0]
    for number, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float64)):
        store = new_store(tmp_path / str(number))
        assert written(store, torch.tensor(values, dtype=dtype)).ravel().tolist() == values


def test_rows_keep_their_provenance(store: TeacherStore) -> None:
    ids = [TOP, 2**53 + 1, 2**53, 0]
    seconds = [AT, AT + WINDOW - 1, AT + WINDOW, MAX_SECONDS - 1]
    store.write(snapshot(7, 1_234), ids, [1.0, 2.0, 3.0, 4.0], seconds)
    store.write(snapshot(7, AT), [5], [5.0], [AT], logged=True)
    rows = dd.all_rows(store)
    assert rows.example_id.tolist() == [0, 5, 2**53, 2**53 + 1, TOP]
    assert (rows.event_time // dd.US).tolist() == [MAX_SECONDS - 1, AT, AT + WINDOW, seconds[1], AT]
    assert rows.outputs.ravel().tolist() == [4.0, 5.0, 3.0, 2.0, 1.0]
    assert (rows.trained_through // dd.US).tolist() == [1_234, AT, 1_234, 1_234, 1_234]
    assert rows.snapshot.tolist() == [7] * 5
    assert rows.logged.tolist() == [False, True, False, False, False]
    assert rows.age_seconds[1:].tolist() == [0, AT + WINDOW - 1_234, seconds[1] - 1_234, AT - 1_234]
    assert store.windows("fm") == [2, 3, (MAX_SECONDS - 1) // WINDOW]


def test_teachers_are_apart(store: TeacherStore) -> None:
    store.write(snapshot(), [1], [0.5], [AT])
    store.write(snapshot(teacher="other"), [1], [-0.5], [AT])
    assert dd.by_id(store) == {1: [0.5]}
    assert dd.by_id(store, "other") == {1: [-0.5]}
    assert store.teachers() == ["fm", "other"]


def test_keys_come_back(store: TeacherStore) -> None:
    keys = {"user_id": [3, -4], "category_id": np.array([5, 2**62])}
    store.write(snapshot(), [8, 7], [0.5, 1.5], [AT, AT], keys=keys)
    store.refresh()
    rows = pq.read_table(dd.only_file(store)).to_pylist()
    store.write(snapshot(2), [8], [0.5], [AT], keys={"user_id": [NO_KEY]})
    store.refresh()
    tables = [pq.read_table(f"{store.table.url}/{file.path}") for file in store.files("fm", 2)]
    assert sum(table["user_id"].null_count for table in tables) == 1  # of NO_KEY: it is null there
    assert [row["example_id"] for row in rows] == [7, 8]
    assert [row["user_id"] for row in rows] == [-4, 3]
    assert [row["item_id"] for row in rows] == [None, None]
    assert [row["category_id"] for row in rows] == [2**62, 5]


def test_unknown_keys_are_refused(store: TeacherStore) -> None:
    with pytest.raises(ValueError, match=r"among .*user_id.*; received \['user'\]"):
        store.write(snapshot(), [1], [0.5], [AT], keys={"user": [1]})


def test_keys_are_read_as_asked_for(store: TeacherStore) -> None:
    """Keys of several files, with and without them; nulls and absent columns are NO_KEY."""
    keys = {"user_id": [2**53 + 1, -4], "item_id": np.array([NO_KEY, TOP])}
    store.write(snapshot(), [8, 7], [0.5, 1.5], [AT, AT], keys=keys)
    store.write(snapshot(2), [8, 9], [2.5, 3.5], [AT, AT], keys={"item_id": [5, -(2**63) + 1]})
    store.write(snapshot(3), [9], [4.5], [AT])
    store.refresh()
    asked = ("item_id", "user_id")
    rows, _ = store.read("fm", 2, keys=asked)
    expected = {
        (7, 1): [TOP, -4],
        (8, 1): [NO_KEY, 2**53 + 1],
        (8, 2): [5, NO_KEY],
        (9, 2): [-(2**63) + 1, NO_KEY],
        (9, 3): [NO_KEY, NO_KEY],
    }
    names = zip(rows.example_id.tolist(), rows.snapshot.tolist(), strict=True)
    assert dict(zip(names, rows.keys.tolist(), strict=True)) == expected
    first = rows[rows.snapshot == 1]
    assert first.keys.tolist() == [[TOP, -4], [NO_KEY, 2**53 + 1]] and first.keys.dtype == np.int64
    files = [store.read_file(file, keys=["item_id"]) for file in store.files("fm", 2)]
    assert sorted(key for part in files for (key,) in part.keys.tolist()) == sorted(
        item for item, _ in expected.values()
    )
    assert store.read("fm", 2)[0].keys.shape == (5, 0)
    store.table.compact(("fm", 2))
    store.refresh()
    assert {*map(tuple, store.read("fm", 2, keys=asked)[0].keys)} == {
        *map(tuple, expected.values())
    }


def test_keys_of_no_rows_have_their_width(store: TeacherStore) -> None:
    assert store.read("fm", 2, keys=["category_id", "user_id"])[0].keys.shape == (0, 2)
    assert store.read("nobody", 9)[0].keys.shape == (0, 0)
    store.write(snapshot(), [1], [0.5], [AT], keys={"user_id": [3]})
    dd.plant(store, trained_through=[AT * dd.US])  # a leak, left out
    rows, _ = store.read("fm", 2, keys=["user_id"], bad_rows="quarantine")
    assert rows.keys.tolist() == [[3]]


@pytest.mark.parametrize("names", [["user"], ["user_id", "user_id"], ["example_id"], "user_id"])
def test_keys_to_read_are_among_those_of_the_store(store: TeacherStore, names: Any) -> None:
    words = r"keys should be among \('user_id', .*\), each at most once; received "
    with pytest.raises(ValueError, match=words + re.escape(str(names))):
        store.read("fm", 2, keys=names)
    dd.plant(store)
    with pytest.raises(ValueError, match=words):
        store.read_file(store.files("fm", 2)[0], keys=names)


def test_keys_to_write_are_named_once(store: TeacherStore) -> None:
    doubled = pa.table([pa.array([1]), pa.array([2])], names=["user_id", "user_id"])
    for keys, received in ((doubled, r"\['user_id', 'user_id'\]"), (torch.ones(1), "Tensor")):
        with pytest.raises(ValueError, match=f"each at most once; received {received}"):
            store.write(snapshot(), [1], [0.5], [AT], keys=keys)  # type: ignore[arg-type]
    assert store.refresh() == 0


def test_several_tasks_keep_their_order(tmp_path: Path) -> None:
    store = new_store(tmp_path, tasks=("click", "stay"))
    store.write(snapshot(), [1, 2], [[0.5, 60.0], [1.5, 90.0]], [AT, AT])
    assert dd.by_id(TeacherStore(tmp_path)) == {1: [0.5, 60.0], 2: [1.5, 90.0]}
    assert TeacherStore(tmp_path).tasks == ("click", "stay")


def test_no_rows_at_all(store: TeacherStore) -> None:
    assert store.write(snapshot(), [], [], []) == WriteReport(written=0)
    assert dd.by_id(store) == {}
    assert store.teachers() == store.windows("fm") == []


# ---- What is refused ----

BAD_ROWS = {  # id, output, event time, and what the error says
    "negative id": (-1, 0.5, AT, "negative example id"),
    "NaN": (1, np.nan, AT, "NaN or infinite"),
    "infinity": (1, np.inf, AT, "NaN or infinite"),
    "minus infinity": (1, -np.inf, AT, "NaN or infinite"),
    "beyond float32": (1, 1e39, AT, "NaN or infinite"),
    "negative time": (1, 0.5, -1, "event time outside of"),
    "time too late": (1, 0.5, MAX_SECONDS, "event time outside of"),
    "milliseconds": (1, 0.5, 1_760_000_000_000, "milliseconds"),
    "milliseconds before 2004": (1, 0.5, 1_050_000_000_000, "milliseconds"),
    "centiseconds": (1, 0.5, 176_000_000_000, "centiseconds"),
    "microseconds": (1, 0.5, 1_760_000_000_000_000, "of another unit"),
    "latest time": (1, 0.5, TOP, "event time outside of"),
    "earliest time": (1, 0.5, -(2**63), "event time outside of"),
    "leak": (1, 0.5, 999, "leak"),
    "leak by equality": (1, 0.5, 1_000, "leak"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_refuses_the_write(store: TeacherStore, kind: str) -> None:
    example, value, second, words = BAD_ROWS[kind]
    with pytest.raises(ValueError, match=words) as caught:
        store.write(snapshot(), [7, example], [0.5, value], [AT, second])
    text = dd.sentence(caught.value)
    assert store.url in text
    assert "1 of 2 rows " in text and ": rows 1 (" in text and f"example ids {example})" in text
    assert store.refresh() == 0 and store.teachers() == []


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_quarantined_and_counted(store: TeacherStore, kind: str) -> None:
    example, value, second, words = BAD_ROWS[kind]
    report = store.write(
        snapshot(), [7, example], [0.5, value], [AT, second], bad_rows="quarantine"
    )
    assert report.written == 1
    assert [count for reason, count in report.quarantined.items() if words in reason] == [1]
    assert dd.by_id(store) == {7: [0.5]}
    commit = store.table.delta.history(1)[0]
    assert json.loads(commit["quarantined"]) == report.quarantined


def test_a_row_that_breaks_two_rules_is_counted_once(store: TeacherStore) -> None:
    bad = {"example_ids": [-1, -1, 7], "outputs": [np.nan, 0.5, 0.5], "event_seconds": [-1, AT, AT]}
    report = store.write(snapshot(), **bad, bad_rows="quarantine")
    assert (report.written, sum(report.quarantined.values())) == (1, 2)


def test_of_a_repeated_id_the_first_is_kept(store: TeacherStore) -> None:
    ids, values, seconds = [5, 7, 5, 5], [1.0, 2.0, 3.0, 4.0], [AT, AT, AT + WINDOW, AT]
    with pytest.raises(ValueError, match=r"2 of 4 rows repeat an example id: rows 2, 3 .*ids 5, 5"):
        store.write(snapshot(), ids, values, seconds)
    report = store.write(snapshot(), ids, values, seconds, bad_rows="quarantine")
    assert report == WriteReport(written=2, quarantined={"repeat an example id": 2})
    assert dd.by_id(store) == {5: [1.0], 7: [2.0]}


def test_logged_rows_may_know_later_times(store: TeacherStore) -> None:
    store.write(snapshot(1, AT + 5), [1, 2], [0.5, 1.5], [AT, AT + 5], logged=True)
    assert dd.by_id(store) == {1: [0.5], 2: [1.5]}


WRONG = {
    "float ids": ({"ids": [1.0]}, TypeError, "example_ids should be whole numbers.*float64"),
    "bool ids": ({"ids": [True]}, TypeError, "example_ids should be whole numbers"),
    "text ids": ({"ids": ["1"]}, TypeError, "example_ids should be whole numbers"),
    "ids of 2^63": ({"ids": np.array([2**63], np.uint64)}, ValueError, "below 2.63; .*75808"),
    "ids of 2^64": ({"ids": [2**64]}, TypeError, "example_ids should be whole numbers"),
    "mixed ids": ({"ids": [2**63, -1], "seconds": [AT, AT]}, TypeError, "whole numbers"),
    "one id": ({"ids": 1}, ValueError, r"of shape \(n,\); received \(\)"),
    "ids (1, 1)": ({"ids": [[1]]}, ValueError, r"of shape \(n,\); received \(1, 1\)"),
    "float times": ({"seconds": [1.5]}, TypeError, "event_seconds should be whole numbers"),
    "times too many": ({"seconds": [AT, AT]}, ValueError, r"event_seconds .*\(1,\); .*\(2,\)"),
    "whole outputs": ({"outputs": [1]}, TypeError, "outputs of 1 .* floating-point.*int64"),
    "outputs too many": ({"outputs": [0.5, 0.5]}, ValueError, r"\(1, 1\); received \(2, 1\)"),
    "two tasks": ({"outputs": [[0.5, 0.5]]}, ValueError, r"\('label',\).*\(1, 1\); .*\(1, 2\)"),
    "no snapshot": ({"snapshot": "fm"}, TypeError, "should be a Snapshot; received str"),
    "way": ({"bad_rows": "drop"}, ValueError, "'refuse' or 'quarantine'; received 'drop'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_refused(store: TeacherStore, kind: str) -> None:
    wrong, error, words = WRONG[kind]
    arguments = {"snapshot": snapshot(), "ids": [1], "outputs": [0.5], "seconds": [AT]} | wrong
    arguments = {**arguments, "bad_rows": arguments.get("bad_rows", "refuse")}
    with pytest.raises(error, match=words) as caught:
        store.write(*list(arguments.values())[:4], bad_rows=arguments["bad_rows"])
    dd.sentence(caught.value)
    assert store.refresh() == 0


def test_ids_as_uint64_are_taken_below_2_to_the_63(store: TeacherStore) -> None:
    store.write(snapshot(), np.array([TOP, 2**53 + 1], np.uint64), [0.5, 1.5], [AT, AT])
    assert dd.by_id(store) == {TOP: [0.5], 2**53 + 1: [1.5]}


# ---- What others planted ----

PLANTED = {
    "leak": ({"trained_through": [(AT + 1) * dd.US]}, "leak"),
    "leak by equality": ({"trained_through": [AT * dd.US]}, "leak"),
    "negative id": ({"example_id": [-3]}, "negative example id"),
    "NaN": ({"output_label": [np.nan]}, "NaN or infinite"),
    "other window": ({"event_time": [(AT + WINDOW) * dd.US]}, "outside of window 2"),
    "no time": ({"event_time": [-1]}, "event time outside of"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_rows_are_refused_on_read(tmp_path: Path, kind: str) -> None:
    columns, words = PLANTED[kind]
    store = new_store(tmp_path)
    dd.plant(store, **columns)
    planted = dd.only_file(store)
    store.write(snapshot(), [9], [0.5], [AT])
    with pytest.raises(StoreError, match=words) as caught:
        store.read("fm", 2)
    text = dd.sentence(caught.value)
    assert str(planted) in text and "1 of 1 rows" in text and "rows 0 " in text
    rows, quarantined = store.read("fm", 2, bad_rows="quarantine")
    assert rows.example_id.tolist() == [9]
    assert all(count == 1 for count in quarantined.values())
    assert any(words in reason for reason in quarantined)


def test_planted_logged_rows_are_no_leak(store: TeacherStore) -> None:
    dd.plant(store, trained_through=[AT * dd.US], logged=[True])
    assert dd.by_id(store) == {0: [0.0]}


# ---- Others who read it ----


def test_polars_and_duckdb_read_the_same(tmp_path: Path) -> None:
    store = new_store(tmp_path, resolution="bfloat16", tasks=("click", "stay"))
    rng = np.random.default_rng(2)
    for number, teacher in enumerate(("fm", "other")):
        ids = rng.permutation(1000) + (number + 2**62)
        seconds = AT + rng.integers(0, 3 * WINDOW, 1000)
        store.write(snapshot(teacher=teacher), ids, rng.normal(size=(1000, 2)), seconds)
    store.refresh()
    store.table.compact(("fm", 2))
    ours = dd.all_rows(store)
    columns = ["example_id", *store.format.outputs, "event_time"]
    files = store.table.delta.file_uris()
    ducks = duckdb.read_parquet(files, hive_partitioning=True).filter("teacher = 'fm'").arrow()
    bears = pl.read_delta(store.table.url).filter(pl.col("teacher") == "fm")
    for name, theirs in {"duckdb": pl.from_arrow(ducks), "polars": bears}.items():
        theirs = theirs.sort("example_id")  # type: ignore[union-attr]
        assert theirs["example_id"].to_list() == ours.example_id.tolist(), name
        assert bits(theirs.select(columns[1:3]).to_numpy()) == bits(ours.outputs), name
        assert theirs["event_time"].cast(pl.Int64).to_list() == ours.event_time.tolist(), name
        assert (theirs["window"] == theirs["event_time"].cast(pl.Int64) // (WINDOW * dd.US)).all()


def test_a_wrong_format_is_refused() -> None:
    for wrong, words in [
        ({"tasks": ()}, "without repeats"),
        ({"tasks": ("a", "a")}, "without repeats"),
        ({"tasks": ("../a",)}, "a task should be named"),
        ({"window_seconds": 0}, "from 1; received 0"),
        ({"window_seconds": 1.5}, "from 1; received 1.5"),
        ({"resolution": "float16"}, "one of .*float16"),
    ]:
        with pytest.raises(ValueError, match=words):
            StoreFormat(**wrong)  # type: ignore[arg-type]
