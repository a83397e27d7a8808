"""The join of examples with the store: equal to the look-up, in order, complete, or an error."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import duckdb
import join_cases as cases
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from das_data import AT, US, WINDOW, new_store, plant, sentence, small_store, snapshot

from torchrec_exfm.das import StoreError, TeacherStore, data_files, join_sql
from torchrec_exfm.das.__main__ import main
from torchrec_exfm.das.embeddings import decode
from torchrec_exfm.das.join_files import NOTE, join_files


def engine(store: TeacherStore, examples: pa.Table) -> Any:
    """Make a DuckDB with the tables of the query, in a time zone that nothing may depend on."""
    made = duckdb.connect()
    made.execute("SET TimeZone = 'America/New_York'")
    made.register("examples", examples)
    made.execute(
        f"CREATE VIEW outputs AS FROM read_parquet({data_files(store)}, hive_partitioning = true)"
    )
    return made


def columns(made: Any, text: str) -> dict[str, list[Any]]:
    by_name: dict[str, list[Any]] = (
        made.sql(f"SELECT * FROM ({text}) ORDER BY number").to_arrow_table().to_pydict()
    )
    return by_name


def small_examples(ids: Any, seconds: Any = AT, **more: Any) -> pa.Table:
    ids = np.asarray(ids)
    times = np.broadcast_to(seconds, ids.shape)
    return pa.table({"example_id": ids, "event_seconds": times, **more})


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    """Create a store with examples 0, 1, 2 of window 2 and outputs 0.5, 1.5, 2.5."""
    return small_store(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder for files of examples."""
    (tmp_path / "examples").mkdir()
    return tmp_path / "examples"


# ---- The text ----


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_the_look_up_finds(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    store = cases.random_store(tmp_path, random)
    examples = cases.random_examples(store, random)
    made = engine(store, examples)
    present = 0
    for choice in cases.CHOICES:
        joined = columns(made, join_sql(store, cases.TEACHERS, **choice))
        cases.check(joined, store, examples, choice)
        for name in examples.column_names:
            assert joined[name] == examples[name].to_pylist()
        present += sum(version is not None for version in joined["fm_snapshot"])
    assert present > 100


def test_examples_may_have_timestamps_and_other_names(tmp_path: Path) -> None:
    random = np.random.default_rng(9)
    store = cases.random_store(tmp_path, random)
    examples = cases.random_examples(store, random)
    times = pa.array(examples["event_seconds"].to_numpy() * US + 999_999)  # within the second
    odd = {"number": examples["number"], "the `id`": examples["example_id"]}
    odd["at"] = times.cast(pa.timestamp("us", "UTC"))
    made = engine(store, pa.table(odd))
    text = join_sql(store, cases.TEACHERS, example_id="the `id`", event_time="at")
    cases.check(columns(made, text), store, examples, {})


def test_a_null_is_no_broken_rule_and_wins_with_its_row(store: TeacherStore) -> None:
    store = new_store(Path(store.url).with_name("of-two"), tasks=("click", "buy"))
    outputs = pa.table(
        {
            "example_id": [0, 0, 1, 2],
            "output_click": pa.array([1.0, None, None, math.nan], pa.float32()),
            "output_buy": pa.array([2.0, 3.0, math.inf, None], pa.float32()),
            "event_time": pa.array([AT * US] * 4).cast(pa.timestamp("us", "UTC")),
            "snapshot": [1, 2, 1, 1],
            "trained_through": pa.array([0] * 4).cast(pa.timestamp("us", "UTC")),
            "logged": [False] * 4,
            "scored_at": pa.array([0] * 4).cast(pa.timestamp("us", "UTC")),
            "teacher": ["fm"] * 4,
            "window": [AT // WINDOW] * 4,
        }
    )
    made = duckdb.connect()
    made.register("outputs", outputs)
    made.register("examples", small_examples([0, 1, 2], number=[0, 1, 2]))
    joined = columns(made, join_sql(store, "fm"))
    assert joined["fm_click"] == [None, None, None]
    assert joined["fm_buy"] == [3.0, None, None]
    assert joined["fm_snapshot"] == [2, None, None]


def test_embeddings_are_the_bytes_that_the_store_keeps(tmp_path: Path) -> None:
    store = new_store(tmp_path, embedding_width=2)
    store.write(snapshot(), [0, 1], [0.5, 1.5], [AT, AT], embeddings=np.eye(2, dtype=np.float32))
    store.write(snapshot(), [2], [2.5], [AT])
    store.refresh()
    made = engine(store, small_examples([1, 2, 3], number=[0, 1, 2]))
    joined = columns(made, join_sql(store, "fm", embeddings=True))
    assert joined["fm_embedding"][1:] == [None, None] and joined["fm_label"] == [1.5, 2.5, None]
    assert decode(np.frombuffer(joined["fm_embedding"][0], np.uint8), "float16").tolist() == [0, 1]
    assert "fm_embedding" not in columns(made, join_sql(store, "fm"))


def test_data_files_are_those_of_the_table_in_the_windows_asked_for(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for teacher in ("fm", "x"):
        store.write(snapshot(teacher=teacher), [2, 3], [2.0, 3.0], [2 * WINDOW, 3 * WINDOW])
    store.write(snapshot(2), [2], [2.0], [2 * WINDOW])
    store.refresh()
    store.table.compact(("fm", 2))
    files = data_files(store)
    assert len(files) == 4 and all(os.path.isfile(file) for file in files)
    assert len(list(Path(store.table.url).rglob("*.parquet"))) == 6
    assert data_files(store, "fm", 3 * WINDOW) == [f for f in files if "fm/window=3" in f]
    assert data_files(store, ["x"], 0, 3 * WINDOW - 1) == [f for f in files if "x/window=2" in f]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"teachers": "other"}, "missing teachers: expected a subset of \\('fm',\\)"),
        ({"tasks": ["stay"]}, "missing tasks: expected a subset of"),
        ({"snapshot": -1}, "snapshot should be a version; received -1"),
        ({"max_age_seconds": -1}, "max_age_seconds should be a number of seconds from 0"),
        ({"snapshot": 3, "exclude": [3]}, "the join pins version 3 of fm, and excludes it"),
        ({"embeddings": True}, "embedding_width; it is 0"),
        ({"examples": ""}, "a table or column should have a name that can be read; received ''"),
        ({"example_id": "a\nb"}, "a table or column should have a name"),
    ],
)
def test_wrong_arguments_are_told(store: TeacherStore, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        join_sql(store, **{"teachers": "fm", **wrong})


def test_names_that_differ_by_case_alone_are_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path, tasks=("Snapshot", "buy"))
    store.write(snapshot(teacher="fm"), [0], [[0.0, 1.0]], [AT])
    store.write(snapshot(teacher="FM"), [0], [[0.0, 1.0]], [AT])
    store.refresh()
    text = "columns should differ by more than upper and lower case"
    with pytest.raises(ValueError, match=text):
        join_sql(store, "fm")
    with pytest.raises(ValueError, match=text):
        join_sql(store, ["fm", "FM"], tasks=["buy"])
    join_sql(store, "FM", tasks=["buy"])


# ---- Files ----


def test_files_keep_their_rows_order_columns_and_row_groups(tmp_path: Path, folder: Path) -> None:
    random = np.random.default_rng(3)
    store = cases.random_store(tmp_path / "store", random)
    wanted = {}
    for number in range(3):
        examples = cases.random_examples(store, random)
        features = [[int(i)] * (int(i) % 3) for i in examples["number"].to_numpy()]
        examples = examples.append_column("features", pa.array(features, pa.large_list(pa.int32())))
        examples = examples.replace_schema_metadata({"of": "the user"})
        wanted[f"{number}.parquet"] = examples
        pq.write_table(examples, folder / f"{number}.parquet", row_group_size=50)
    out = tmp_path / "out"
    report = join_files(store, str(folder), out, cases.TEACHERS, bad_rows="quarantine")
    assert sorted(os.listdir(out)) == sorted(wanted)
    present = 0
    for name, examples in wanted.items():
        made = pq.read_table(out / name)
        assert made.select(examples.column_names).equals(examples)
        assert made.schema.metadata[b"of"] == b"the user"
        assert pq.ParquetFile(out / name).num_row_groups == 3
        joined = {name: made[name].to_pylist() for name in made.column_names}
        cases.check(joined, store, examples.select(["example_id", "event_seconds"]), {})
        present += len(made) - made["fm_snapshot"].null_count
    assert (report.examples, report.present["fm"]) == (360, present)
    assert report.left_out["fm"]["have an output that is NaN or infinite"] == 3


def test_rows_keep_their_order_where_the_engine_would_not(tmp_path: Path, folder: Path) -> None:
    store, ids = new_store(tmp_path / "store"), np.arange(400_000)
    store.write(snapshot(), ids, ids.astype(np.float32), AT + 0 * ids)
    store.refresh()
    shuffled = np.random.default_rng(0).permutation(ids)[:150_000]
    pq.write_table(small_examples(shuffled), folder / "a.parquet")
    join_files(store, str(folder), tmp_path / "out")
    made = pq.read_table(tmp_path / "out" / "a.parquet")
    assert np.array_equal(made["example_id"], shuffled)
    assert np.array_equal(made["fm_label"], shuffled.astype(np.float32))


def test_what_is_left_out_is_what_a_reader_leaves_out(tmp_path: Path, folder: Path) -> None:
    store = cases.random_store(tmp_path / "store", np.random.default_rng(5))
    windows = range(cases.WINDOWS[0], cases.WINDOWS[-1] + 2)
    seconds = np.array(windows) * WINDOW
    pq.write_table(small_examples(np.arange(len(seconds)), seconds), folder / "a.parquet")
    report = join_files(store, str(folder), tmp_path / "out", bad_rows="quarantine")
    for teacher in cases.TEACHERS:
        parts = [store.read(teacher, window, bad_rows="quarantine")[1] for window in windows]
        counted = sum(sum(part.values()) for part in parts)
        assert report.left_out[teacher].total() == counted >= 7


def test_a_window_is_read_once_for_files_that_share_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path / "store")
    ids = np.arange(1, 9)
    store.write(snapshot(), ids, ids.astype(np.float32), ids * WINDOW)
    store.refresh()
    for number in range(3):  # windows 1-2, 3-4 and 4-5
        at = np.array([[1, 2], [3, 4], [4, 5]][number])
        pq.write_table(small_examples(at, at * WINDOW), folder / f"{number}.parquet")
    read: list[str] = []
    original = store.table.read
    monkeypatch.setattr(
        store.table, "read", lambda file, schema: read.append(file.path) or original(file, schema)
    )
    join_files(store, str(folder), tmp_path / "out")
    assert [path.split("/")[1] for path in read] == [f"window={w}" for w in (1, 2, 3, 4, 5)]


def test_a_killed_join_goes_on_with_the_files_that_are_missing(
    store: TeacherStore, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        pq.write_table(small_examples([number, 7]), folder / f"{number}.parquet")
    out, replace = tmp_path / "out", os.replace

    def killed(part: Path, target: Path) -> None:
        if target.name == "1.parquet":
            raise KeyboardInterrupt
        replace(part, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        join_files(store, str(folder), out)
    assert [name for name in os.listdir(out) if name[0] != "."] == ["0.parquet"]
    monkeypatch.setattr(os, "replace", replace)
    first = (out / "0.parquet").stat().st_mtime_ns
    report = join_files(store, str(folder), out)
    assert (out / "0.parquet").stat().st_mtime_ns == first
    assert (report.examples, report.present["fm"]) == (6, 3)
    assert sorted(os.listdir(out)) == ["0.parquet", "1.parquet", "2.parquet"]


def test_files_of_another_join_are_not_taken_for_its_own(
    store: TeacherStore, tmp_path: Path, folder: Path
) -> None:
    pq.write_table(small_examples([0, 7]), folder / "a.parquet")
    out = tmp_path / "out"
    join_files(store, str(folder), out)
    with pytest.raises(ValueError, match=r"a\.parquet: exists, and is not of this join"):
        join_files(store, str(folder), out, exclude=[5])
    with pytest.raises(ValueError, match=r"a\.parquet: exists, and is not of this join"):
        join_files(store, str(folder), folder)  # the examples' own folder
    (out / "b.parquet").touch()
    with pytest.raises(ValueError, match=r"only the files of this join; it has \['b\.parquet'\]"):
        join_files(store, str(folder), out)


def test_an_empty_file_and_one_of_times_without_outputs(
    store: TeacherStore, tmp_path: Path, folder: Path
) -> None:
    pq.write_table(small_examples(np.arange(0)), folder / "a.parquet")
    pq.write_table(small_examples([0, 1], 9 * WINDOW), folder / "b.parquet")
    report = join_files(store, str(folder), tmp_path / "out")
    assert (report.examples, report.present["fm"]) == (2, 0)
    made = pq.read_table(tmp_path / "out" / "a.parquet")
    assert made.num_rows == 0 and made.schema.field("fm_label").type == pa.float32()


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", None])
def test_timestamps_of_any_unit_and_zone(
    store: TeacherStore, tmp_path: Path, folder: Path, zone: str | None
) -> None:
    times = pa.array([AT * 1000, (AT + WINDOW) * 1000 - 1]).cast(pa.timestamp("ms", zone))
    pq.write_table(pa.table({"example_id": [0, 1], "event_time": times}), folder / "a.parquet")
    join_files(store, str(folder), tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "a.parquet")["fm_label"].to_pylist() == [0.5, 1.5]


# ---- Errors ----


@pytest.mark.parametrize(
    ("examples", "error", "text"),
    [
        ({"id": [1], "event_seconds": [AT]}, ValueError, "it lacks \\['example_id'\\]"),
        ({"example_id": [1]}, ValueError, "it lacks \\['event_time'\\]"),
        ({"example_id": ["1"], "event_seconds": [AT]}, TypeError, "example_id should be whole"),
        ({"example_id": [-1], "event_seconds": [AT]}, ValueError, "should be at least 0"),
        ({"example_id": [None, 1], "event_seconds": [AT] * 2}, ValueError, "should have no nulls"),
        (
            {"example_id": [1], "event_seconds": [1_760_000_000_000]},
            ValueError,
            "milliseconds\\? divide by 1,000",
        ),
        (
            {"example_id": [1], "event_seconds": [AT], "fm_label": [0.5]},
            ValueError,
            "has columns \\['fm_label'\\] already, which the join would add",
        ),
    ],
)
def test_examples_that_are_wrong_are_told(
    store: TeacherStore,
    tmp_path: Path,
    folder: Path,
    examples: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    pq.write_table(pa.table(examples), folder / "a.parquet")
    with pytest.raises(error, match=text) as caught:
        join_files(store, str(folder), tmp_path / "out")
    assert "a.parquet: " in sentence(caught.value)
    assert not os.listdir(tmp_path / "out")


def test_no_files_and_files_of_one_name_are_told(
    store: TeacherStore, tmp_path: Path, folder: Path
) -> None:
    with pytest.raises(ValueError, match="should be Parquet files of examples, on this machine"):
        join_files(store, f"{folder}/*.parquet", tmp_path / "out")
    for day in ("a", "b"):
        (folder / day).mkdir()
        pq.write_table(small_examples([0]), folder / day / "part-0.parquet")
    with pytest.raises(ValueError, match="the files should differ in name"):
        join_files(store, f"{folder}/*/*.parquet", tmp_path / "out")


def test_bad_rows_are_refused_unless_left_out(
    store: TeacherStore, tmp_path: Path, folder: Path
) -> None:
    plant(store, 2, output_label=[math.nan, 1.0])
    pq.write_table(small_examples([0]), folder / "a.parquet")
    text = "1 rows of fm in window 2 have an output that is NaN or infinite: correct them, or join"
    with pytest.raises(StoreError, match=text) as caught:
        join_files(store, str(folder), tmp_path / "out")
    sentence(caught.value)
    report = join_files(store, str(folder), tmp_path / "out", bad_rows="quarantine")
    assert report.left_out["fm"] == {"have an output that is NaN or infinite": 1}


def test_a_data_file_that_is_damaged_or_missing_is_told(
    store: TeacherStore, tmp_path: Path, folder: Path
) -> None:
    pq.write_table(small_examples([0]), folder / "a.parquet")
    (file,) = map(Path, data_files(store))
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(StoreError, match="it was cut short or replaced"):
        join_files(store, str(folder), tmp_path / "out")
    file.unlink()
    with pytest.raises(StoreError, match="is missing, and the table's log has it"):
        join_files(store, str(folder), tmp_path / "out")


def test_rows_that_were_compacted_meanwhile_are_found(
    store: TeacherStore, tmp_path: Path, folder: Path
) -> None:
    pq.write_table(small_examples([0, 9]), folder / "a.parquet")
    store.write(snapshot(), [9], [9.5], [AT])
    store.refresh()
    other = TeacherStore(store.url)
    other.table.compact(("fm", 2))
    other.table.vacuum(0, enforce=False)
    report = join_files(store, str(folder), tmp_path / "out")
    assert report.present["fm"] == 2


def test_a_wrong_memory_limit_is_told(store: TeacherStore, tmp_path: Path, folder: Path) -> None:
    pq.write_table(small_examples([0]), folder / "a.parquet")
    with pytest.raises(ValueError, match="memory_limit should be as '4GB'; received 'much'"):
        join_files(store, str(folder), tmp_path / "out", memory_limit="much")
    with pytest.raises(StoreError, match="DuckDB can't join these examples"):
        join_files(store, str(folder), tmp_path / "out", memory_limit="1KB")


def test_without_duckdb_it_is_told_what_to_install(
    store: TeacherStore, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(small_examples([0]), folder / "a.parquet")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchrec-exfm\[das,join\]'"):
        join_files(store, str(folder), tmp_path / "out")


# ---- The command ----


def test_the_command_joins_and_says_what_it_found(
    store: TeacherStore, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(store, 1, example_id=[-1])
    pq.write_table(small_examples([0, 1, 8, 9]), folder / "a.parquet")
    arguments = ["join", store.url, "--examples", f"{folder}/*.parquet"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "1 rows of fm in window 2 have a negative example id" in capsys.readouterr().err
    arguments += ["--bad-rows", "quarantine", "--memory-limit", "1GB", "--exclude", "3,5-9"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fm: an output for 50.00% of 4 examples",
        "  left out, as they have a negative example id: 1 rows",
    ]
    assert main([*arguments, "--teacher", "other"]) == 2
    assert "missing teachers: expected a subset of" in capsys.readouterr().err


def test_what_a_file_was_made_of_is_in_it(
    store: TeacherStore, tmp_path: Path, folder: Path
) -> None:
    pq.write_table(small_examples([0, 7]), folder / "a.parquet")
    join_files(store, str(folder), tmp_path / "out", max_age_seconds=10**6)
    metadata = pq.read_schema(tmp_path / "out" / "a.parquet").metadata
    note = json.loads(metadata[NOTE])
    assert note["commit"] == store.table.version and note["made_of"]["store"] == store.url
    assert note["made_of"]["max_age_seconds"] == 10**6
    assert (note["examples"], note["present"]) == (2, {"fm": 1})
