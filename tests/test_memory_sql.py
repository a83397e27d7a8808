"""A memory as SQL: equal to the reference on DuckDB, and blind to the present and the future."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import duckdb
import memory_cases as cases
import numpy as np
import pyarrow as pa
import pytest
from das_data import AT, WINDOW, new_store, small_store, snapshot
from memory_reference import brute_force

from torchrec_exfm.das import TeacherStore, data_files
from torchrec_exfm.das.embeddings import decode
from torchrec_exfm.das.memory import Memory, MemoryFormat, store_events
from torchrec_exfm.das.memory_sql import events_sql, memory_sql
from torchrec_exfm.das.schema import KEYS


def engine(**tables: pa.Table) -> Any:
    """Make a DuckDB with tables, in a time zone that nothing may depend on."""
    made = duckdb.connect()
    made.execute("SET TimeZone = 'America/New_York'")
    for name, table in tables.items():
        made.register(name, table)
    return made


def with_outputs(store: TeacherStore, **tables: pa.Table) -> Any:
    made = engine(**tables)
    files = data_files(store)
    made.execute(f"CREATE VIEW outputs AS FROM read_parquet({files}, hive_partitioning = true)")
    return made


def columns(made: Any, format: MemoryFormat, **names: str) -> dict[str, list[Any]]:
    text = memory_sql(format, dialect="duckdb", **names)
    table = made.sql(f"SELECT * FROM ({text}) ORDER BY number").to_arrow_table()
    rows: dict[str, list[Any]] = table.to_pydict()
    return rows


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("format", cases.FORMATS)
def test_it_knows_what_the_reference_knows(format: MemoryFormat, seed: int) -> None:
    events, examples = cases.random_tables(np.random.default_rng(seed))
    computed = columns(engine(events=events, examples=examples), format)
    assert all(computed[name] == examples[name].to_pylist() for name in examples.column_names)
    cases.check(computed, events.to_pylist(), examples.to_pydict(), format)
    for key in format.key_names:
        counts = computed[f"fm_{key}_count"]
        assert min(counts) == 0 and max(counts) > 5


@pytest.mark.parametrize("choice", [{}, {"exclude": [3]}, {"task": "watch-time.s"}])
def test_events_are_what_counts_of_a_store(tmp_path: Path, choice: dict[str, Any]) -> None:
    random = np.random.default_rng(1)
    store = cases.random_store(tmp_path, random)
    _, examples = cases.random_tables(random)
    times = random.integers(2 * WINDOW, 7 * WINDOW, len(examples))
    drawn = {name: random.integers(0, 5, len(examples)) for name in KEYS}
    examples = pa.table({**drawn, "event_seconds": times, "number": np.arange(len(examples))})
    made = with_outputs(store, examples=examples)
    text = events_sql(store, "fm", **choice)
    made.execute(f"CREATE VIEW events AS {text}")
    rows = made.sql("FROM events ORDER BY event_seconds, example_id").to_arrow_table().to_pylist()
    task = store.tasks.index(choice.get("task", "click"))
    expected = cases.events_of(store, task, choice.get("exclude", [None])[0])
    assert rows == expected and len(rows) > 20
    format = MemoryFormat(name="fm", keys=[["category_id"], ["user_id", "item_id"]], length=2)
    cases.check(columns(made, format), rows, examples.to_pydict(), format)


def test_a_table_is_what_the_iterator_reads(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    store = cases.random_store(tmp_path, random)
    examples: dict[str, Any] = {name: random.integers(0, 5, 300) for name in KEYS}
    examples["event_seconds"] = random.integers(2 * WINDOW, 7 * WINDOW, 300)
    examples["number"] = np.arange(300)
    keys = [["user_id"], ["user_id", "item_id"]]
    format = MemoryFormat(name="fm", keys=keys, length=3, half_life_seconds=5e3, delay_seconds=100)
    memory = Memory(format)
    for events in store_events(store, "fm"):
        memory.write(*events)
    made = with_outputs(store, examples=pa.table(examples))
    made.execute(f"CREATE VIEW events AS {events_sql(store, 'fm')}")
    computed = columns(made, format)
    for key, read in memory.read(examples, examples["event_seconds"]).items():
        assert computed[f"fm_{key}_count"] == read.count.tolist() and read.count.max() > 1
        for name in ("mean", "last", "decayed_mean", "days_since"):
            column = np.array(computed[f"fm_{key}_{name}"], np.float64)
            # of float32, and of sums of at most 150 normal numbers in float64
            np.testing.assert_allclose(getattr(read, name).ravel(), column, 2.0**-24, 1e-12)
        values = [v for row in computed[f"fm_{key}_values"] for v in row]
        assert values == read.vectors.ravel().tolist()


def test_embeddings_are_bytes_in_sequences(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    store = cases.random_store(tmp_path, random)
    examples = {"user_id": [0, 1, 2, 9], "event_seconds": [5 * WINDOW] * 4, "number": [0, 1, 2, 3]}
    made = with_outputs(store, examples=pa.table(examples))
    made.execute(f"CREATE TABLE events AS {events_sql(store, 'fm', embeddings=True)}")
    format = MemoryFormat(name="fm", keys=[["user_id"]], width=2, length=4)
    computed = columns(made, format)
    features = ["count", "days_since", "values", "ages_days"]
    assert [*computed] == [*examples, *(f"fm_user_id_{name}" for name in features)]
    events = cases.events_of(store, 0, embeddings=True)
    vectors = [decode(np.frombuffer(e["value"], np.uint8), "float16") for e in events]
    parts = {"user_id": [e["user_id"] for e in events]}, [e["event_seconds"] for e in events]
    expected = brute_force((*parts, vectors), (examples, examples["event_seconds"]), format)
    for row, reference in enumerate(expected["user_id"]):
        for name in ("count", "days_since", "ages_days"):
            assert computed[f"fm_user_id_{name}"][row] == reference[name]
        values = computed["fm_user_id_values"][row]
        assert [decode(np.frombuffer(v, np.uint8), "float16").tolist() for v in values] == (
            reference["values"]
        )
    assert len(computed["fm_user_id_values"][0]) == 4 and computed["fm_user_id_values"][3] == []


def test_the_present_and_the_future_change_nothing() -> None:
    events, examples = cases.random_tables(np.random.default_rng(3))
    format, now = cases.FORMATS[2], cases.START + 150
    hidden = [
        second is not None and second + 17 >= now for second in events["event_seconds"].to_pylist()
    ]
    values = np.array(events["value"].to_pylist(), object)
    random = np.random.default_rng(4)
    values[hidden] = random.normal(size=sum(hidden)).tolist()
    at = examples["event_seconds"].to_numpy()
    asked = examples.filter(at <= now)
    changed = events.set_column(4, "value", pa.array(values.tolist(), pa.float64()))
    computed = [columns(engine(events=e, examples=asked), format) for e in (events, changed)]
    assert repr(computed[0]) == repr(computed[1])
    all_rows = [columns(engine(events=e, examples=examples), format) for e in (events, changed)]
    assert repr(all_rows[0]) != repr(all_rows[1])


def test_a_snapshot_of_later_than_the_example_is_not_used(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    keys = {"user_id": np.array([7])}
    store.write(snapshot(1, AT + 50), [1], [1.5], [AT], logged=True, keys=keys)
    store.refresh()
    times = [AT + 1, AT + 50, AT + 51]
    examples = pa.table({"user_id": [7] * 3, "event_seconds": times, "number": [0, 1, 2]})
    made = with_outputs(store, examples=examples)
    made.execute(f"CREATE VIEW events AS {events_sql(store, 'fm')}")
    computed = columns(made, MemoryFormat(name="fm", keys=[["user_id"]]))
    assert computed["fm_user_id_last"] == [None, None, 1.5]


def test_one_table_of_labels_with_names_that_need_quotes() -> None:
    random = np.random.default_rng(5)
    events, _ = cases.random_tables(random)
    names = {"example_id": "order", "event_seconds": "select", "value": "label of t"}
    rows = events.rename_columns([names.get(name, name) for name in events.column_names])
    rows = rows.rename_columns(["key_1", "values", *rows.column_names[2:]])
    rows = rows.append_column("number", pa.array(range(len(rows))))
    format = MemoryFormat(name="fm", keys=[["key_1"], ["values", "key_1"]], length=2)
    made = duckdb.connect()
    made.execute('CREATE SCHEMA "a b"')
    made.register("rows", rows)
    made.execute('CREATE TABLE "a b"."or`der" AS FROM rows')
    table = "a b.or`der"
    computed = columns(made, format, events=table, examples=table, **names)
    dicts = [{**row, "example_id": row["order"]} for row in rows.to_pylist()]
    has_time = np.array([row["select"] is not None for row in dicts])
    computed = {
        name: [v for v, k in zip(c, has_time, strict=True) if k] for name, c in computed.items()
    }
    examples = rows.filter(has_time).to_pydict()
    cases.check(computed, dicts, examples, format, event_seconds="select", value="label of t")


def test_years_of_short_half_lives_are_no_overflow() -> None:
    random = np.random.default_rng(6)
    seconds = cases.START + np.sort(random.integers(0, 10**8, 300))
    table = {"user_id": [0] * 300, "event_seconds": seconds.tolist(), "number": [*range(300)]}
    table |= {"example_id": [*range(300)], "value": (random.normal(size=300) * 2.0**100).tolist()}
    table["value"] = np.float32(table["value"]).tolist()
    rows = pa.table(table)
    for half_life_seconds in (600.0, 1e5, 2e6, 1e12, 1e30):
        format = MemoryFormat(name="fm", keys=[["user_id"]], half_life_seconds=half_life_seconds)
        computed = columns(engine(events=rows, examples=rows), format)
        assert all(map(math.isfinite, computed["fm_user_id_decayed_mean"][1:]))
        cases.check(computed, rows.to_pylist(), table, format)


def test_no_product_of_tables_is_made() -> None:
    events, examples = cases.random_tables(np.random.default_rng(0))
    made = engine(events=events, examples=examples)
    text = memory_sql(cases.FORMATS[1], dialect="duckdb")
    plan = made.sql(f"EXPLAIN (FORMAT JSON) {text}").fetchall()[0][1]
    assert plan.count("HASH_JOIN") == 3
    assert not any(word in plan for word in ("NESTED_LOOP", "CROSS_PRODUCT", "BLOCKWISE"))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"dialect": "mysql"}, "dialect should be one of \\('duckdb', 'spark'\\)"),
        ({"events": ""}, "a table or column should have a name that can be read; received ''"),
        ({"value": "a\nb"}, "a table or column should have a name"),
    ],
)
def test_wrong_names_are_told(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        memory_sql(cases.FORMATS[0], **{"dialect": "duckdb", **wrong})


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"teacher": "other"}, "missing teachers: expected a subset of"),
        ({"task": "stay"}, "missing tasks: expected a subset of"),
        ({"snapshot": 3, "exclude": [3]}, "pins version 3 of fm, and excludes it"),
        ({"embeddings": True}, "embedding_width; it is 0"),
    ],
)
def test_wrong_events_are_told(tmp_path: Path, wrong: dict[str, Any], text: str) -> None:
    store = small_store(tmp_path / "store")
    with pytest.raises(ValueError, match=text):
        events_sql(store, **{"teacher": "fm", **wrong})
