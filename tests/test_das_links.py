"""Links that lead out of a store: nothing is read, written, compacted or removed behind them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import das_data as dd
import pytest
from das_data import AT, snapshot
from torch import nn

from torchrec_exfm.das import StoreError, TeacherStore, forget, load_snapshot, publish
from torchrec_exfm.das.__main__ import main

USES: dict[str, Callable[[TeacherStore], object]] = {
    "read": lambda store: store.read("fm", 2),
    "write": lambda store: store.write(snapshot(), [9], [0.5], [AT]),
    "compact": lambda store: store.table.compact(("fm", 2)),
    "repair": lambda store: store.table.repair(),
    "vacuum": lambda store: store.table.vacuum(0, enforce=False),
    "forget": lambda store: forget(store, "fm", versions=[1]),
    "forget before": lambda store: forget(store, "fm", before_seconds=9 * AT),
}


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    """Create a store with two files of a window."""
    store = dd.small_store(tmp_path / "store")
    store.write(snapshot(2), [0], [9.0], [AT])
    return store


def lead_out(path: Path, outside: Path) -> dict[str, bytes]:
    """Replace a file or folder by a link; return everything behind it."""
    shutil.move(path, outside)
    path.symlink_to(outside)
    return behind(outside)


def behind(outside: Path) -> dict[str, bytes]:
    files = [outside, *outside.rglob("*")]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.parametrize("place", ["teacher=fm", "teacher=fm/window=2", "a file", "_delta_log"])
@pytest.mark.parametrize("use", USES)
def test_nothing_happens_behind_a_link(
    store: TeacherStore, tmp_path: Path, use: str, place: str
) -> None:
    if place == "a file":
        place = store.files("fm", 2)[0].path
    outside = tmp_path / "outside"
    before = lead_out(Path(store.table.url) / place, outside)
    if use == "write" and place.endswith(".parquet"):
        assert store.write(snapshot(), [9], [0.5], [AT]).written == 1  # which goes elsewhere
    elif use == "read" and place == "_delta_log":
        with pytest.raises(StoreError, match="is refused: it is not in the table's folder"):
            TeacherStore(store.url)
    else:
        with pytest.raises(StoreError, match="is refused: it is not in the table's folder"):
            USES[use](store)
    assert before and behind(outside) == before


@pytest.mark.parametrize("use", ["compact", "forget", "vacuum"])
def test_links_that_stay_inside_are_followed(store: TeacherStore, use: str) -> None:
    folder = Path(store.table.url) / "teacher=fm"
    folder.rename(folder.with_name("moved"))
    folder.symlink_to("moved")
    USES[use](store)
    assert len(dd.all_rows(store)) == (1 if use == "forget" else 4)


@pytest.mark.parametrize("place", ["fm", "fm/NAME"])
def test_checkpoints_behind_a_link(store: TeacherStore, tmp_path: Path, place: str) -> None:
    model = nn.Linear(2, 1)
    published = publish(store, "fm", model, trained_through_seconds=5)
    (folder,) = Path(store.url).glob("checkpoints/fm/*")
    outside = tmp_path / "outside"
    before = lead_out(folder if place == "fm/NAME" else folder.parent, outside)
    with pytest.raises(StoreError, match="is refused: it may leave the folder"):
        load_snapshot(store, published, model)
    with pytest.raises(StoreError, match="is refused: it may leave the folder"):
        forget(store, "fm", versions=[1])
    assert main(["verify", store.url]) == 1
    assert before and behind(outside) == before


def test_a_folder_of_checkpoints_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "link")
    store = dd.new_store(tmp_path / "store", checkpoints=tmp_path / "link")
    model = nn.Linear(2, 1)
    published = publish(store, "fm", model, trained_through_seconds=5)
    load_snapshot(store, published, model)
    assert len(list((tmp_path / "disk/fm").iterdir())) == 1
    assert forget(store, "fm", versions=[1]).snapshots == 1
    assert not list((tmp_path / "disk/fm").iterdir())
