"""Commits to the teacher store: each shard once, completely or not at all, with any writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import das_data as dd
import forked
import numpy as np
import pyarrow as pa
import pytest
from das_data import AT, WINDOW, new_store, snapshot
from deltalake import write_deltalake

from torchrec_exfm.das import (
    ForgetReport,
    Snapshot,
    StoreError,
    TeacherLookup,
    TeacherStore,
    forget,
    newest_snapshot,
    publish,
    published,
)
from torchrec_exfm.das.delta import Table
from torchrec_exfm.das.rules import Rows, newest

SHARDS = 6


# ---- Once ----


def test_a_shard_is_written_once(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    assert store.write(snapshot(), [1, 2], [0.5, 1.5], [AT, AT], shard="a").committed
    for reopened in (store, TeacherStore(tmp_path)):
        report = reopened.write(snapshot(), [2, 1], [1.5, 0.5], [AT, AT], shard="a")
        assert (report.committed, report.written, report.stored_before) == (False, 0, 2)
    store.write(snapshot(), [3], [2.5], [AT], shard="b")
    assert dd.by_id(store) == {1: [0.5], 2: [1.5], 3: [2.5]}


def test_a_shard_of_no_good_rows_is_done_too(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    first, second = (
        store.write(snapshot(), [-1], [0.5], [AT], shard="a", bad_rows="quarantine")
        for _ in range(2)
    )
    assert (first.committed, first.written, second.committed) == (True, 0, False)


def test_the_log_remembers_shards_past_its_checkpoint(tmp_path: Path) -> None:
    store = dd.small_store(tmp_path)
    store.write(snapshot(), [9], [0.5], [AT], shard="a")
    store.refresh()
    store.table.delta.create_checkpoint()
    for version in range(3):
        dd.log_file(store, version).unlink()
    assert not TeacherStore(tmp_path).write(snapshot(), [9], [0.5], [AT], shard="a").committed
    assert list(dd.by_id(TeacherStore(tmp_path))) == [0, 1, 2, 9]


def test_a_refused_write_can_be_mended_under_its_name(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with pytest.raises(ValueError, match="leak"):
        store.write(snapshot(), [1], [0.5], [0], shard="a")
    assert store.write(snapshot(), [1], [0.5], [AT], shard="a").committed


# ---- At once ----


def write_shards(barrier: Any, url: str, first_id: int, prefix: str) -> list[bool]:
    """Commit ten rows several times, as fast as possible."""
    store = TeacherStore(url)
    barrier.wait(60)
    return [
        store.write(
            snapshot(),
            np.arange(10) + first_id + 10 * number,
            np.full(10, first_id, np.float32),
            np.full(10, AT),
            shard=f"{prefix}{number}",
        ).committed
        for number in range(SHARDS)
    ]


def test_two_writers_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    committed = forked.run_together(
        write_shards, (store.url, 0, "first "), (store.url, 2**62, "second ")
    )
    assert committed == [[True] * SHARDS] * 2
    ids = np.arange(10 * SHARDS)
    assert dd.all_rows(store).example_id.tolist() == [*ids.tolist(), *(ids + 2**62).tolist()]
    assert store.table.version == 2 * SHARDS


def test_the_same_shards_from_two_writers_at_once_are_there_once(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    committed = forked.run_together(
        write_shards, (store.url, 0, "shard "), (store.url, 0, "shard ")
    )
    assert [sum(pair) for pair in zip(*committed, strict=True)] == [1] * SHARDS
    assert list(dd.by_id(store)) == list(range(10 * SHARDS))
    assert store.table.version == SHARDS


def create(barrier: Any, folder: Path, tasks: tuple[str, ...]) -> list[str]:
    """Create stores at the same moment as the other process; return each outcome."""

    def wait(*arguments: Any) -> None:
        real(*arguments)
        if arguments[0].endswith("/snapshots"):
            barrier.wait(60)

    outcomes, real = [], Table.create
    with mock.patch.object(Table, "create", wait):
        for number in range(10):
            try:
                outcomes.append(new_store(folder / str(number), tasks=tasks).tasks[0])
            except StoreError as error:
                assert "was asked for" in str(error)
                outcomes.append("refused")
    return outcomes


def test_a_store_made_by_two_at_once_is_made_once(tmp_path: Path) -> None:
    outcomes = forked.run_together(create, (tmp_path, ("a",)), (tmp_path, ("a",)))
    assert outcomes == [["a"] * 10] * 2
    assert [TeacherStore(tmp_path / str(number)).refresh() for number in range(10)] == [0] * 10


def test_two_formats_at_once_are_told(tmp_path: Path) -> None:
    outcomes = forked.run_together(create, (tmp_path, ("a",)), (tmp_path, ("b",)))
    for number, pair in enumerate(zip(*outcomes, strict=True)):
        (task,) = TeacherStore(tmp_path / str(number)).tasks
        assert sorted(pair) == [task, "refused"]


def publish_several(barrier: Any, url: str, through: int) -> list[int]:
    store = TeacherStore(url)
    barrier.wait(60)
    return [
        publish(store, "fm", None, trained_through_seconds=through + number).version
        for number in range(3)
    ]


def test_versions_published_at_once_differ(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    versions = forked.run_together(publish_several, (store.url, 1_000), (store.url, 2_000))
    assert sorted(versions[0] + versions[1]) == [1, 2, 3, 4, 5, 6]
    throughs = {
        snapshot.version: snapshot.trained_through_seconds for snapshot in published(store, "fm")
    }
    for first, job_versions in zip((1_000, 2_000), versions, strict=True):
        assert [throughs[version] for version in job_versions] == [first, first + 1, first + 2]


# ---- Made again, newer, foreign ----


def test_a_store_made_again_is_opened(tmp_path: Path) -> None:
    store = dd.small_store(tmp_path)
    assert list(dd.by_id(new_store(tmp_path))) == [0, 1, 2]
    assert new_store(tmp_path).format == store.format


@pytest.mark.parametrize(
    "other", [{"tasks": ("click",)}, {"window_seconds": 7}, {"resolution": "bfloat16"}]
)
def test_a_store_made_again_in_another_format_is_refused(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    dd.small_store(tmp_path)
    with pytest.raises(StoreError, match=r"is a store of .* was asked for") as caught:
        new_store(tmp_path, **other)
    assert f"{tmp_path}/outputs" in dd.sentence(caught.value)
    assert list(dd.by_id(TeacherStore(tmp_path))) == [0, 1, 2]


def describe(store: TeacherStore, **changed: Any) -> None:
    def edit(metadata: dict[str, Any]) -> None:
        description = json.loads(metadata["description"])
        description["torchrec_exfm"] |= changed
        metadata["description"] = json.dumps(description)

    dd.edit_log(store, 0, "metaData", edit)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    describe(dd.small_store(tmp_path), format_version=2, something_new=True)
    words = "format version 2, .* reads version 1: upgrade"
    for way in (TeacherStore, new_store):
        with pytest.raises(StoreError, match=words) as caught:
            way(tmp_path)
        assert f"{tmp_path}/outputs" in dd.sentence(caught.value)


@pytest.mark.parametrize("changed", [{"tasks": 5}, {"tasks": ["../x"]}, {"window_seconds": 0}])
def test_a_damaged_description_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    describe(dd.small_store(tmp_path), **changed)
    with pytest.raises(StoreError, match="has a description that is damaged") as caught:
        TeacherStore(tmp_path)
    assert f"{tmp_path}/outputs" in dd.sentence(caught.value)


@pytest.mark.parametrize("description", [None, "a table", "[1]", '{"torchrec_exfm": {}}'])
def test_another_table_is_refused(tmp_path: Path, description: str | None) -> None:
    url = str(tmp_path / "outputs")
    write_deltalake(url, pa.table({"a": [1]}), description=description)
    for way in (TeacherStore, new_store):
        with pytest.raises(StoreError, match="is a Delta table, but not a teacher store") as caught:
            way(tmp_path)
        assert url in dd.sentence(caught.value)


def test_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"there is no store; TeacherStore.create makes one"
    ) as caught:
        TeacherStore(tmp_path / "none")
    assert str(tmp_path / "none") in dd.sentence(caught.value)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be made") as caught:
        new_store(tmp_path / "file")
    assert str(tmp_path / "file") in dd.sentence(caught.value)


# ---- Of several outputs for an example ----


def looked_up(store: TeacherStore, ids: list[int], **options: Any) -> list[float | None]:
    lookup = TeacherLookup(store, "fm", ids=np.array, event_seconds=lambda _: AT, **options)
    outputs = lookup(ids)
    values, presence = outputs.values.ravel().tolist(), outputs.presence.ravel().tolist()
    return [value if present else None for value, present in zip(values, presence, strict=True)]


def test_the_newest_snapshot_wins_unless_one_is_pinned(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    store.write(snapshot(3), [1, 2], [3.0, 3.0], [AT, AT])
    store.write(snapshot(10), [1], [10.0], [AT])
    store.write(snapshot(2), [1, 2, 3], [2.0, 2.0, 2.0], [AT, AT, AT])
    assert len(dd.all_rows(store)) == 6  # none of them is deleted
    assert looked_up(store, [1, 2, 3, 4]) == [10.0, 3.0, 2.0, None]
    assert looked_up(store, [1, 2, 3, 4], snapshot=3) == [3.0, 3.0, None, None]
    assert looked_up(store, [1, 2, 3, 4], snapshot={"fm": 2}) == [2.0, 2.0, 2.0, None]
    assert looked_up(store, [1, 2], snapshot=99) == [None, None]


def test_ties_are_won_by_what_was_logged_and_then_by_the_last_score() -> None:
    cases = [  # of each example two rows: snapshot, trained through, logged, scored at
        [(1, 9, 1, 9), (2, 1, 0, 1)],
        [(2, 1, 1, 1), (2, 2, 0, 2)],
        [(2, 2, 0, 1), (2, 1, 0, 2)],
        [(2, 2, 1, 5), (2, 2, 1, 3)],
    ]
    versions, throughs, logged, times = np.array(cases).reshape(8, 4).T
    rows = Rows(
        example_id=np.repeat(np.arange(4), 2),
        outputs=np.arange(8, dtype=np.float32)[:, None],
        event_time=np.full(8, AT),
        snapshot=versions,
        trained_through=throughs,
        logged=logged > 0,
        scored_at=times,
        embedding=np.arange(8, dtype=np.uint8)[:, None],
        keys=np.arange(8)[:, None],
    )
    for seed in range(10):
        won = newest(rows[np.random.default_rng(seed).permutation(8)])
        assert won.example_id.tolist() == [0, 1, 2, 3]
        assert won.outputs.ravel().tolist() == won.embedding.ravel().tolist() == [1, 2, 5, 6]
        assert won.keys.ravel().tolist() == [1, 2, 5, 6]


def test_the_newest_snapshot_before_a_time(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    assert newest_snapshot(store, "fm") is None
    for through in (100, 300, 200):
        publish(store, "fm", None, trained_through_seconds=through)
    publish(store, "other", None, trained_through_seconds=999)
    assert newest_snapshot(store, "fm") == Snapshot("fm", 3, 200)
    assert newest_snapshot(store, "fm", before_seconds=201) == Snapshot("fm", 3, 200)
    assert newest_snapshot(store, "fm", before_seconds=200) == Snapshot("fm", 1, 100)
    assert newest_snapshot(store, "fm", before_seconds=100) is None


# ---- Compaction, versions ----


def test_compaction_keeps_all_rows(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(5):
        ids = rng.choice(1_000, 200, replace=False) + (number * 2**60)
        values = rng.integers(0, 0x7F80_0000, 200, np.uint32).view(np.float32)
        seconds = AT + rng.integers(0, 2 * WINDOW, 200)
        store.write(snapshot(number), ids, values, seconds, logged=number == 1)
    before, open_before = dd.all_rows(store), TeacherStore(tmp_path)
    assert len(store.files("fm", 2)) == 5
    store.table.compact(("fm", 2))
    for reader in (store, TeacherStore(tmp_path), open_before):
        after = dd.all_rows(reader)
        assert [len(reader.files("fm", window)) for window in (2, 3)] == [1, 5]
        for name in ("outputs", "event_time", "snapshot", "trained_through", "logged", "scored_at"):
            column, other = getattr(before, name), getattr(after, name)
            np.testing.assert_array_equal(column.view(np.uint8), other.view(np.uint8), name)
    (file,) = store.files("fm", 2)
    assert (np.diff(store.read_file(file).example_id) > 0).all()


def test_what_is_forgotten_is_counted_and_may_be_nothing(tmp_path: Path) -> None:
    store = dd.small_store(tmp_path)
    store.write(snapshot(2), [9], [0.5], [AT + WINDOW])
    publish(store, "fm", None, trained_through_seconds=1_000)
    cases: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({"versions": [7]}, (0, 0)),
        ({"versions": [2]}, (1, 0)),  # whose snapshot was not published
        ({"before_seconds": AT}, (0, 0)),
        ({"versions": [1, 2]}, (3, 1)),
        ({"versions": [1, 2]}, (0, 0)),
        ({"before_seconds": AT + 9 * WINDOW}, (0, 0)),
    ]
    for options, (rows, snapshots) in cases:
        assert forget(store, "fm", **options) == ForgetReport(rows, snapshots)
    assert dd.by_id(store) == {}


def test_a_reader_from_before_a_compaction_finds_the_new_file(tmp_path: Path) -> None:
    store = dd.small_store(tmp_path)
    store.write(snapshot(), [9], [0.5], [AT])
    reader = TeacherStore(tmp_path)
    old = reader.files("fm", 2)
    store.table.compact(("fm", 2))
    for file in old:
        (Path(store.table.url) / file.path).unlink()  # as a vacuum does
    assert sorted(reader.read("fm", 2)[0].example_id.tolist()) == [0, 1, 2, 9]


def test_a_reader_sees_whole_commits_of_the_version_it_asks_for(tmp_path: Path) -> None:
    store = dd.small_store(tmp_path)
    reader = TeacherStore(tmp_path)
    store.write(snapshot(), [9, 10], [0.5, 0.5], [AT, AT + WINDOW])
    assert reader.windows("fm") == [2]
    assert (reader.refresh(), reader.windows("fm")) == (2, [2, 3])
    assert (reader.refresh(1), reader.windows("fm")) == (1, [2])
    with pytest.raises(StoreError, match="its log can't be read") as caught:
        reader.refresh(99)
    assert f"{tmp_path}/outputs" in dd.sentence(caught.value)
    assert reader.refresh() == 2
