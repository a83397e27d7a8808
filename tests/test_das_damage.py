"""Damage to a teacher store, and traps in it: each error is one sentence that names the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import das_data as dd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from das_data import AT, WINDOW, new_store, small_store, snapshot
from deltalake import Field
from deltalake.schema import PrimitiveType
from torch import nn

from torchrec_exfm import TeacherMissingWarning
from torchrec_exfm.das import (
    StoreError,
    TeacherLookup,
    TeacherStore,
    Window,
    forget,
    newest_snapshot,
    publish,
    score,
    wait_for_outputs,
)
from torchrec_exfm.das.__main__ import main
from torchrec_exfm.das.errors import MissingFileError


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return small_store(tmp_path / "store")


def refused(store: TeacherStore, words: str, *, where: str | Path | None = None) -> None:
    """Require every read of the window to raise an error that names the file."""
    named = str(dd.only_file(store) if where is None else where)
    for bad_rows in ("refuse", "quarantine"):  # a damaged file is no bad row
        with pytest.raises(StoreError, match=words) as caught:
            TeacherStore(store.url).read("fm", 2, bad_rows=bad_rows)  # type: ignore[arg-type]
        assert named in dd.sentence(caught.value)


def replace(store: TeacherStore, table: pa.Table | bytes) -> None:
    """Replace the data file by another of the size in the log."""
    path = dd.only_file(store)
    if isinstance(table, bytes):
        path.write_bytes(table)
    else:
        pq.write_table(table, path)
    size = path.stat().st_size
    dd.edit_log(store, 1, "add", lambda add: add.update(size=size))


# ---- Data files ----


@pytest.mark.parametrize("keep", [0, 1, 500, -1])
def test_a_truncated_file(store: TeacherStore, keep: int) -> None:
    path = dd.only_file(store)
    path.write_bytes(path.read_bytes()[:keep])
    refused(store, rf"has {path.stat().st_size} bytes and the table's log says \d+: it was cut")


def test_a_longer_file(store: TeacherStore) -> None:
    path = dd.only_file(store)
    path.write_bytes(path.read_bytes() + b"\0")
    refused(store, "it was cut short or replaced")


@pytest.mark.parametrize("place", ["nothing", "folder"])
def test_a_missing_file(store: TeacherStore, place: str) -> None:
    path = dd.only_file(store)
    path.unlink()
    if place == "folder":
        path.mkdir()
    refused(store, "is missing, and the table's log has it; restore it")
    with pytest.raises(MissingFileError):
        store.read("fm", 2)


def test_a_file_that_is_no_parquet(store: TeacherStore) -> None:
    replace(store, b"PAR1" + b"x" * 1000 + b"PAR1")
    refused(store, "can't be read")


def test_a_file_of_another_table(store: TeacherStore) -> None:
    replace(store, pa.table({"example_id": [1], "other": [2]}))
    refused(store, r"lacks the columns \[.*'event_time'.*\]: it is not of this table")


def test_a_file_of_other_tasks(store: TeacherStore) -> None:
    rows = dd.plain_rows(store, 3).rename_columns(
        ["output_click" if name == "output_label" else name for name in store.format.schema().names]
    )
    replace(store, rows)
    refused(store, r"lacks the columns \['output_label'\]")


@pytest.mark.parametrize(
    "column",
    [pa.array(["a"] * 3), pa.array([1.5] * 3), pa.array([2**63] * 3, pa.uint64())],
    ids=["text", "fractions", "uint64"],
)
def test_a_file_with_a_column_of_another_type(store: TeacherStore, column: pa.Array) -> None:
    replace(store, dd.plain_rows(store, 3).set_column(0, "example_id", column))
    refused(store, "can't be read")


def test_a_file_with_nulls(store: TeacherStore) -> None:
    nulls = pa.array([1, None, 2], pa.int64())
    replace(store, dd.plain_rows(store, 3).set_column(0, "example_id", nulls))
    refused(store, "nulls")


def test_a_file_with_fewer_rows_than_the_log_says(store: TeacherStore) -> None:
    replace(store, dd.plain_rows(store, 2, example_id=[0, 1]))
    refused(store, "2 rows")


def test_a_file_with_changed_bytes_never_gives_another_kind_of_error(store: TeacherStore) -> None:
    path = dd.only_file(store)
    content = path.read_bytes()
    kinds = set()
    for at in range(0, len(content), 5):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            store.read("fm", 2)
        except StoreError as error:
            assert str(path) in dd.sentence(error)
            kinds.add("told")
    assert kinds == {"told"}


def test_another_windows_file_in_this_ones_place(store: TeacherStore) -> None:
    store.write(snapshot(), [7, 8, 9], [0.5, 0.5, 0.5], [AT + WINDOW] * 3)
    store.refresh()
    shutil.copy(dd.only_file(store, window=3), dd.only_file(store))
    size = dd.only_file(store).stat().st_size
    dd.edit_log(store, 1, "add", lambda add: add.update(size=size))
    with pytest.raises(StoreError, match="3 of 3 rows lie outside of window 2") as caught:
        TeacherStore(store.url).read("fm", 2)
    assert str(dd.only_file(store)) in dd.sentence(caught.value)


def test_the_registry_is_checked_too(store: TeacherStore) -> None:
    publish(store, "fm", None, trained_through_seconds=5)
    (path,) = Path(store.url, "snapshots").glob("*.parquet")
    content = path.read_bytes()
    for damaged in (content[:-1], None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"cut short|is missing") as caught:
            newest_snapshot(store, "fm")
        assert str(path) in dd.sentence(caught.value)


# ---- The log ----


def test_a_damaged_log(store: TeacherStore) -> None:
    path = dd.log_file(store, 1)
    for text in (path.read_text()[:-1000], "{]", "\0\xff", "1\n"):
        path.write_text(text)
        with pytest.raises(StoreError, match="restore it from a copy") as caught:
            TeacherStore(store.url)
        assert f"{path}: " in dd.sentence(caught.value)


def commits(store: TeacherStore) -> dict[str, int]:
    """Make one commit of each kind; return them by version."""
    store.write(snapshot(), [9], [0.5], [AT], shard="a")
    versions = {"write": store.refresh()}
    store.write(snapshot(2), [9, 10], [0.5, 0.5], [AT, AT + WINDOW])
    versions["of two files"] = store.refresh()
    store.table.compact(("fm", 2))
    versions["compact"] = store.refresh()
    forget(store, "fm", versions=[1])
    versions["forget"] = store.refresh()
    store.advance_watermark("fm", AT)
    versions["watermark"] = store.refresh()
    return versions


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("kind", ["write", "of two files", "compact", "forget", "watermark"])
def test_a_commit_that_lost_lines(
    store: TeacherStore, kind: str, opened: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line of it but the first, and all: found when the store is opened, or refreshed."""
    version = commits(store)[kind]
    path = dd.log_file(store, version)
    lines = path.read_bytes().splitlines(keepends=True)
    for later in range(version + 1, store.table.version + 1):
        dd.log_file(store, later).unlink()
    path.unlink()
    reader = TeacherStore(store.url)
    texts = [b"".join(lines[:remaining]) for remaining in range(len(lines))]
    if any(b'"txn"' in line for line in lines):
        texts.append(b"".join(lines[1:]))
    for text in texts:
        path.write_bytes(text)
        with pytest.raises(StoreError, match="lines were lost; restore it") as caught:
            reader.refresh() if opened else TeacherStore(store.url)
        assert str(path) in dd.sentence(caught.value)
        with pytest.raises(StoreError, match="lines were lost"):  # and again
            reader.refresh()
        assert main(["verify", store.url]) == 2 and str(path) in capsys.readouterr().err
    path.write_bytes(b"".join(lines))
    assert TeacherStore(store.url).refresh() == version


def test_a_damaged_commit_before_a_log_checkpoint_is_told_by_verify(
    store: TeacherStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write(snapshot(), [9], [0.5], [AT])
    store.table.delta.create_checkpoint()
    path = dd.log_file(store, 1)
    path.write_bytes(b"")
    assert list(dd.by_id(TeacherStore(store.url))) == [0, 1, 2, 9]
    assert main(["verify", store.url]) == 1
    assert f"{path}: is an empty commit" in capsys.readouterr().out


def test_a_damaged_log_checkpoint(store: TeacherStore) -> None:
    store.table.delta.create_checkpoint()
    (path,) = Path(store.table.url).rglob("*.checkpoint.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    for version in (0, 1):
        dd.log_file(store, version).unlink()
    with pytest.raises(StoreError, match="restore it from a copy") as caught:
        TeacherStore(store.url)
    assert str(path) in dd.sentence(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["a b.parquet", "50%.parquet", "a%20b.parquet", "ä#?.parquet"])
def test_paths_are_percent_encoded_in_the_log(store: TeacherStore, name: str) -> None:
    path = dd.only_file(store)
    path.rename(path.with_name(name))
    encoded = f"teacher=fm/window=2/{quote(name)}"
    dd.edit_log(store, 1, "add", lambda add: add.update(path=encoded))
    reader = TeacherStore(store.url)
    assert list(dd.by_id(reader)) == [0, 1, 2]
    assert main(["verify", store.url]) == 0
    store.write(snapshot(), [9], [0.5], [AT])
    reader.table.compact(("fm", 2))
    assert list(dd.by_id(TeacherStore(store.url))) == [0, 1, 2, 9]


def test_a_partition_that_the_path_denies(store: TeacherStore) -> None:
    other = {"teacher": "fm", "window": "3"}
    dd.edit_log(store, 1, "add", lambda add: add.update(partitionValues=other))
    with pytest.raises(StoreError, match="the log says that it is of teacher=fm/window=3"):
        TeacherStore(store.url).windows("fm")


def spark_like(actions: list[dict[str, Any]]) -> None:
    info = next(action["commitInfo"] for action in actions if "commitInfo" in action)
    metrics = info["operationMetrics"]
    info["operationMetrics"] = {name: str(value) for name, value in metrics.items()}


def without_metrics(actions: list[dict[str, Any]]) -> None:
    info = next(action["commitInfo"] for action in actions if "commitInfo" in action)
    info["operationMetrics"] = None


def noted(actions: list[dict[str, Any]]) -> None:
    info = next(action["commitInfo"] for action in actions if "commitInfo" in action)
    del info["mark"]
    info["transaction"] = "mine=3"


def removed_twice(actions: list[dict[str, Any]]) -> None:
    noted(actions)
    actions.append({"remove": {"path": "teacher=fm/window=1/gone.parquet", "dataChange": True}})
    info = next(action["commitInfo"] for action in actions if "commitInfo" in action)
    info["operationMetrics"] = {}


@pytest.mark.parametrize("change", [spark_like, without_metrics, noted, removed_twice])
def test_commits_of_other_tools_are_whole(
    store: TeacherStore, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    path = dd.log_file(store, 1)
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    change(actions)
    path.write_text("".join(json.dumps(action) + "\n" for action in actions) + "\n")
    assert list(dd.by_id(TeacherStore(store.url))) == [0, 1, 2]


def test_a_column_that_another_tool_added(store: TeacherStore) -> None:
    field = Field("note", PrimitiveType("string"), nullable=True)
    store.table.delta.alter.add_columns([field])
    reopened = TeacherStore(store.url)
    assert reopened.write(snapshot(), [9], [0.5], [AT]).written == 1
    reopened.advance_watermark("fm", 9)
    assert list(dd.by_id(reopened)) == [0, 1, 2, 9]


def test_a_file_that_is_no_file(store: TeacherStore) -> None:
    path = dd.only_file(store)
    path.unlink()
    os.mkfifo(path)
    refused(store, "is no regular file")


def test_a_store_that_goes_while_it_is_open(store: TeacherStore) -> None:
    lookup = TeacherLookup(store, "fm", ids=np.array, event_seconds=lambda _: AT)
    window = [Window(AT, AT + WINDOW, [])]
    shutil.rmtree(store.url)
    uses: list[Callable[[], Any]] = [
        lambda: store.write(snapshot(), [9], [0.5], [AT]),
        lambda: store.write(snapshot(), [9], [0.5], [AT], shard="a"),
        lambda: store.read("fm", 2),
        lambda: store.watermark("fm"),
        lambda: store.advance_watermark("fm", 9),
        lambda: publish(store, "fm", None, trained_through_seconds=9),
        lambda: newest_snapshot(store, "fm"),
        lambda: forget(store, "fm", versions=[1]),
        lambda: store.table.compact(("fm", 2)),
        lambda: store.table.repair(),
        lambda: lookup([1]),
        lambda: TeacherStore(store.url),
        lambda: score(nn.Linear(1, 1), store, [], "fm", device=torch.device("cpu")),
    ]
    for use in uses:
        with pytest.raises(StoreError) as caught:
            use()
        assert store.url in dd.sentence(caught.value)
    with pytest.raises(TimeoutError, match="its watermark could not be read"):
        list(wait_for_outputs(window, lookup, timeout_seconds=0.1))
    with pytest.warns(TeacherMissingWarning, match="could not be read.*training goes on"):
        assert list(wait_for_outputs(window, lookup, timeout_seconds=0.1, on_late="mask")) == window
    lookup.close()


def test_polling_outlasts_a_store_that_is_away_for_a_while(store: TeacherStore) -> None:
    lookup = TeacherLookup(store, "fm", ids=np.array, event_seconds=lambda _: AT)
    store.advance_watermark("fm", AT + WINDOW)
    away = store.url + "-away"
    waiting = wait_for_outputs([Window(AT, AT + WINDOW, [])], lookup, timeout_seconds=60)
    os.rename(store.url, away)
    back = threading.Timer(1.0, lambda: os.rename(away, store.url))
    back.start()
    assert next(waiting).end_seconds == AT + WINDOW
    back.join()
    assert lookup([1]).presence.all()
    lookup.close()


def test_a_commit_missing_in_the_middle(store: TeacherStore) -> None:
    store.write(snapshot(), [9], [0.5], [AT])
    dd.log_file(store, 1).unlink()
    with pytest.raises(StoreError, match=r"can't be opened .* gap") as caught:
        TeacherStore(store.url)
    assert store.table.url in dd.sentence(caught.value)


def test_a_file_of_no_partition(store: TeacherStore) -> None:
    nowhere = {"teacher": None, "window": None}
    dd.edit_log(store, 1, "add", lambda add: add.update(partitionValues=nowhere))
    with pytest.raises(StoreError) as caught:
        TeacherStore(store.url).windows("fm")
    assert store.table.url in dd.sentence(caught.value)


def test_a_log_without_statistics_will_do(store: TeacherStore) -> None:
    dd.edit_log(store, 1, "add", lambda add: add.pop("stats"))
    assert list(dd.by_id(TeacherStore(store.url))) == [0, 1, 2]


def rename(action: dict[str, Any], name: str) -> None:
    action["x" + name] = action.pop(name)


def edit_stats(add: dict[str, Any], edit: Callable[[dict[str, Any]], object]) -> None:
    stats = json.loads(add["stats"])
    edit(stats)
    add["stats"] = json.dumps(stats)


@pytest.mark.parametrize("part", ["minValues", "maxValues"])
def test_statistics_of_other_snapshots(store: TeacherStore, part: str) -> None:
    def edit(stats: dict[str, Any]) -> None:
        stats[part]["snapshot"] ^= 4

    dd.edit_log(store, 1, "add", lambda add: edit_stats(add, edit))
    refused(store, r"its snapshots are from 1 to 1 and the table's log says")


@pytest.mark.parametrize("name", ["appId", "version"])
def test_a_damaged_transaction(store: TeacherStore, name: str) -> None:
    dd.edit_log(store, 1, "txn", lambda txn: rename(txn, name))
    with pytest.raises(StoreError, match="restore it from a copy") as caught:
        TeacherStore(store.url)
    assert str(dd.log_file(store, 1)) in dd.sentence(caught.value)


@pytest.mark.parametrize("summed_up", [False, True], ids=["in commits", "in a checkpoint"])
def test_a_removal_of_another_file(store: TeacherStore, summed_up: bool) -> None:
    """The rows that a compaction has copied would be there twice."""
    store.write(snapshot(), [9], [0.5], [AT])
    if summed_up:
        store.refresh()
        store.table.delta.create_checkpoint()
    store.table.compact(("fm", 2))
    assert list(dd.by_id(TeacherStore(store.url))) == [0, 1, 2, 9]

    def edit(remove: dict[str, Any]) -> None:
        remove["path"] = remove["path"].replace("part-00000", "part-00001")

    dd.edit_log(store, 3, "remove", edit)
    with pytest.raises(StoreError, match=r"removes .* which was not there") as caught:
        TeacherStore(store.url)
    assert str(dd.log_file(store, 3)) in dd.sentence(caught.value)


def test_a_column_of_another_name(store: TeacherStore) -> None:
    """By the schema the statistics are read, and rows that are to be forgotten found."""

    def edit(metadata: dict[str, Any]) -> None:
        metadata["schemaString"] = metadata["schemaString"].replace('"snapshot"', '"sn`pshot"')

    dd.edit_log(store, 0, "metaData", edit)
    with pytest.raises(StoreError, match=r"lacks the columns \['snapshot'\]") as caught:
        TeacherStore(store.url)
    assert store.table.url in dd.sentence(caught.value)


@pytest.mark.parametrize("name", ["add", "txn"])
def test_a_checkpoint_that_lacks_a_column(store: TeacherStore, name: str) -> None:
    """Its name has changed: the store would be empty, or would know no shard."""
    store.table.delta.create_checkpoint()
    path = dd.log_file(store, 1).with_suffix(".checkpoint.parquet")
    actions = pq.read_table(path)
    names = ["x" + column if column == name else column for column in actions.column_names]
    pq.write_table(actions.rename_columns(names), path)
    with pytest.raises(StoreError, match=f"lacks the column {name}") as caught:
        TeacherStore(store.url)
    assert str(path) in dd.sentence(caught.value)


def test_a_snapshot_that_the_log_hides_from_forget(store: TeacherStore) -> None:
    publish(store, "fm", None, trained_through_seconds=5)
    path = Path(store.registry.url) / "_delta_log" / f"{1:020}.json"
    text = path.read_text()
    path.write_text(text.replace(r"\"version\":1", r"\"version\":9"))
    assert path.read_text() != text
    with pytest.raises(StoreError, match=r"still has .* version 1") as caught:
        forget(TeacherStore(store.url), "fm", versions=[1])
    assert store.registry.url in dd.sentence(caught.value)


def upgrade(store: TeacherStore) -> None:
    """Raise the protocol to one with deletion vectors, as another program would."""
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, **features}
    dd.log_file(store, 2).write_text(json.dumps({"protocol": protocol}) + "\n")


NEWER = r"needs version 3 of the Delta reader protocol \(\['deletionVectors'\]\)"


def test_a_table_for_newer_readers(store: TeacherStore) -> None:
    upgrade(store)
    with pytest.raises(StoreError, match=NEWER) as caught:
        TeacherStore(store.url)
    assert store.table.url in dd.sentence(caught.value)
    with pytest.raises(StoreError, match=NEWER):
        store.write(snapshot(), [9], [0.5], [AT])


def test_a_table_that_becomes_one_for_newer_readers(store: TeacherStore) -> None:
    upgrade(store)
    with pytest.raises(StoreError, match=NEWER):
        store.refresh()


# ---- Ways out of the folder ----

WAYS_OUT = [
    "../secret.parquet",
    "teacher=fm/../../secret.parquet",
    "/etc/passwd",
    "file:///etc/passwd",
    "s3://elsewhere/x.parquet",
    "..",
]


@pytest.mark.parametrize("path", WAYS_OUT)
def test_a_planted_path_is_refused(store: TeacherStore, path: str) -> None:
    shutil.copy(dd.only_file(store), Path(store.url) / "secret.parquet")
    dd.edit_log(store, 1, "add", lambda add: add.update(path=path))
    for ask in (TeacherStore.teachers, lambda store: store.read("fm", 2)):
        with pytest.raises(StoreError, match="is refused: it is not in the table's f") as caught:
            ask(TeacherStore(store.url))  # type: ignore[operator]
        assert repr(path) in dd.sentence(caught.value)


@pytest.mark.parametrize("path", ["%2e%2e/secret.parquet", "..%2Fsecret.parquet", "."])
def test_an_odd_path_leads_nowhere(store: TeacherStore, path: str) -> None:
    shutil.copy(dd.only_file(store), Path(store.url) / "secret.parquet")
    dd.edit_log(store, 1, "add", lambda add: add.update(path=path))
    with pytest.raises(StoreError, match=r"is refused|is missing") as caught:
        TeacherStore(store.url).read("fm", 2)
    assert path in dd.sentence(caught.value)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leads_out_is_refused(store: TeacherStore, tmp_path: Path, link: str) -> None:
    path = dd.only_file(store)
    moved = path if link == "file" else path.parent
    shutil.move(moved, tmp_path / "outside")
    moved.symlink_to(tmp_path / "outside")
    refused(store, "is refused: it is not in the table's folder", where=path.name)


def test_a_link_to_the_whole_store_is_followed(store: TeacherStore, tmp_path: Path) -> None:
    os.symlink(store.url, tmp_path / "link")
    assert list(dd.by_id(TeacherStore(tmp_path / "link"))) == [0, 1, 2]


@pytest.mark.parametrize(
    "url",
    ["s3://key:SECRET@bucket/x", "https://host/x?sig=SECRET", "s3://bucket/../x", ""],
)
def test_urls_with_credentials_are_refused_and_not_repeated(url: str) -> None:
    for way in (TeacherStore, new_store):
        with pytest.raises(ValueError, match="a store's url should be") as caught:
            way(url)  # type: ignore[arg-type]
        assert "SECRET" not in dd.sentence(caught.value)


def test_credentials_are_in_no_file(tmp_path: Path) -> None:
    store = new_store(tmp_path, storage_options={"aws_secret_access_key": "SECRET"})
    store.write(snapshot(), [1], [0.5], [AT])
    publish(store, "fm", None, trained_through_seconds=5)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6 and not any(b"SECRET" in path.read_bytes() for path in files)


# ---- Pickles ----


def no_pickle(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was unpickled")


def test_a_reader_never_unpickles(store: TeacherStore) -> None:
    publish(store, "fm", None, trained_through_seconds=5)
    with (
        mock.patch.object(pickle, "load", no_pickle),
        mock.patch.object(pickle, "loads", no_pickle),
        mock.patch.object(pickle, "Unpickler", no_pickle),
        mock.patch.object(pickle, "_Unpickler", no_pickle),
    ):
        with pytest.raises(AssertionError, match="something was unpickled"):
            pickle.loads(b"N.")
        reopened = TeacherStore(store.url)
        assert list(dd.by_id(reopened)) == [0, 1, 2]
        lookup = TeacherLookup(reopened, "fm", ids=np.array, event_seconds=lambda _: AT)
        assert lookup([0, 7]).presence.ravel().tolist() == [True, False]
        newest = newest_snapshot(reopened, "fm")
        assert newest is not None and newest.version == 1


def test_files_are_no_pickles(store: TeacherStore) -> None:
    """Nothing that the store keeps could be unpickled."""
    publish(store, "fm", None, trained_through_seconds=5)
    kinds: dict[str, Callable[[bytes], Any]] = {
        ".parquet": lambda data: data.startswith(b"PAR1"),
        ".json": lambda data: [json.loads(line) for line in data.splitlines()],
    }
    files = [path for path in Path(store.url).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == set(kinds)
    assert all(kinds[path.suffix](path.read_bytes()) for path in files)
