"""A bad snapshot is noticed, withheld from students and removed; outputs grow old."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import das_data as dd
import numpy as np
import pyarrow as pa
import pytest
from das_data import AT, WINDOW, new_store
from deltalake import write_deltalake
from torch import nn

from torchrec_exfm.das import (
    ForgetReport,
    StoreError,
    TeacherLookup,
    TeacherStore,
    forget,
    newest_snapshot,
    publish,
    published,
)
from torchrec_exfm.das.__main__ import main
from torchrec_exfm.das.schema import SNAPSHOTS

BAD = 2


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    """Create a store of three versions in two windows; one version has some nonsense outputs."""
    store = new_store(tmp_path / "store", tasks=("click", "buy"))
    for version in (1, 2, 3):
        model = nn.Linear(2, 1)
        published = publish(store, "fm", model, trained_through_seconds=1_000 * version)
        ids = np.arange(10 * version)
        outputs = np.full((len(ids), 2), [100.0 * version if version == BAD else version, -1.0])
        store.write(published, ids, outputs, AT + (ids % 2) * WINDOW)
    return store


def look_up(store: TeacherStore, ids: list[int], **options: Any) -> list[float | None]:
    times = AT + (np.array(ids) % 2) * WINDOW
    options = {"tasks": ["click"], "ids": np.array, "event_seconds": lambda _: times, **options}
    with TeacherLookup(store, "fm", **options) as lookup:
        outputs = lookup(ids)
    values, presence = outputs.values.flatten().tolist(), outputs.presence.flatten().tolist()
    return [value if present else None for value, present in zip(values, presence, strict=True)]


def test_show_by_version(store: TeacherStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", store.url, "--json"]) == 0
    (outputs,) = json.loads(capsys.readouterr().out)["outputs"]
    first, last = "1970-01-01T02:00:00Z", "1970-01-01T03:00:00Z"
    assert outputs["versions"] == [
        {
            "version": version,
            "rows": 10 * version,
            "windows": 2,
            "first": first,
            "last": last,
            "mean_output": {"click": mean, "buy": -1.0},
            "coverage": version / 3,
        }
        for version, mean in ((1, 1.0), (2, 200.0), (3, 3.0))
    ]
    assert main(["show", store.url]) == 0
    out = capsys.readouterr().out
    assert f"version 2: 20 rows in 2 window(s), {first} to {last}" in out
    assert "coverage 66.67% of these examples, mean output click 200, buy -1" in out


def test_excluded_versions_are_passed_over(store: TeacherStore) -> None:
    ids = [5, 15, 25, 99]
    assert look_up(store, ids) == [3.0, 3.0, 3.0, None]
    for exclude in ([3], {"fm": {3}}, np.array([3])):
        assert look_up(store, ids, exclude=exclude) == [200.0, 200.0, None, None]
    assert look_up(store, ids, exclude=[2, 3]) == [1.0, None, None, None]
    assert look_up(store, ids, exclude=range(9)) == [None] * 4


@pytest.mark.parametrize(
    ("exclude", "error", "words"),
    [
        ({"gm": [1]}, ValueError, "missing teachers of exclude: expected a subset"),
        (3, TypeError, "a collection of versions; received 3"),
        ("3", TypeError, "a collection of versions; received '3'"),
        ([0.5], TypeError, "exclude should be whole numbers"),
        (None, TypeError, "a collection of versions; received None"),
        ({"fm": None}, TypeError, "a collection of versions; received None"),
    ],
)
def test_wrong_exclusions(
    store: TeacherStore, exclude: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        TeacherLookup(store, "fm", exclude=exclude)


def test_a_pinned_version_is_not_excluded(store: TeacherStore) -> None:
    with pytest.raises(ValueError, match="pins version 2 of fm, and excludes it"):
        TeacherLookup(store, "fm", snapshot=2, exclude=[2])


def test_forget_a_version_between_others(store: TeacherStore) -> None:
    assert forget(store, "fm", versions=[BAD]) == ForgetReport(rows=20, snapshots=1)
    assert look_up(store, [5, 15, 25]) == [3.0, 3.0, 3.0]
    assert look_up(store, [5, 15], snapshot=2) == [None, None]
    assert len(dd.all_rows(store)) == 40
    assert [entry.version for entry in published(store, "fm")] == [1, 3]
    assert len(list(Path(store.url).glob("checkpoints/fm/*"))) == 2
    assert forget(store, "fm", versions=[BAD]) == ForgetReport(rows=0, snapshots=0)
    assert main(["verify", store.url]) == 0


def test_forget_takes_versions_of_any_kind(store: TeacherStore) -> None:
    for version, versions in enumerate(([1], np.array([2]), (v for v in (3,))), start=1):
        assert forget(store, "fm", versions=versions).rows == 10 * version


def test_a_generator_excludes_for_every_teacher(store: TeacherStore) -> None:
    store.write(dd.snapshot(3, teacher="gm"), [1], [[0.5, 0.5]], [AT])
    with TeacherLookup(
        store,
        ("gm", "fm"),
        ids=np.array,
        event_seconds=lambda _: AT,
        exclude=(version for version in (3,)),
    ) as lookup:
        assert lookup([1, 2]).presence[:, :, 0].tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("text", ["5-3", "4-", "1,,2", "x", "", "2-999999999"])
def test_versions_that_are_none(
    store: TeacherStore, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["forget", store.url, "fm", "--versions", text])
    assert "versions should look like 3 or 3,5-9" in capsys.readouterr().err
    assert len(dd.all_rows(store)) == 60


def test_times_of_the_command(store: TeacherStore, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["forget", store.url, "fm", "--before", "tomorrow"])
    assert "a time should look like 2026-01-31" in capsys.readouterr().err
    assert main(["forget", store.url, "fm", "--before", "20260131"]) == 0
    assert dd.all_rows(store).example_id.tolist() == []


def test_a_snapshot_is_published_though_the_registry_is_not_compacted(
    store: TeacherStore, tmp_path: Path
) -> None:
    for _ in range(96):
        publish(store, "fm", None, trained_through_seconds=9)
    (Path(store.registry.url) / "link").symlink_to(tmp_path)
    assert publish(store, "fm", None, trained_through_seconds=9).version == 100


def test_a_version_is_never_given_twice(store: TeacherStore) -> None:
    forget(store, "fm", versions=[3, 1])
    assert publish(store, "fm", None, trained_through_seconds=9).version == 4
    forget(store, "fm", versions=range(9))
    assert newest_snapshot(store, "fm") is None
    assert publish(TeacherStore(store.url), "fm", None, trained_through_seconds=9).version == 5


def test_forget_a_snapshot_whose_time_is_damaged(store: TeacherStore) -> None:
    """A snapshot whose event times were in milliseconds, which an older version accepted."""
    row = {
        "teacher": "fm",
        "version": 9,
        "trained_through": 978_300_760_000 * dd.US,
        "published_at": 0,
        "checkpoint": None,
    }
    data = pa.Table.from_pylist([row], schema=SNAPSHOTS)
    write_deltalake(store.registry.url, data, mode="append")
    with pytest.raises(StoreError, match=r"is damaged .*milliseconds"):
        newest_snapshot(store, "fm")
    assert publish(store, "fm", None, trained_through_seconds=9).version == 10
    assert forget(store, "fm", versions=[9]) == ForgetReport(rows=0, snapshots=1)
    assert [entry.version for entry in published(store, "fm")] == [1, 2, 3, 10]


def test_forget_windows_before_a_time(store: TeacherStore) -> None:
    assert forget(store, "fm", before_seconds=AT + WINDOW - 1) == ForgetReport(0, 0)
    assert forget(store, "fm", before_seconds=AT + WINDOW) == ForgetReport(30, 0)
    assert store.windows("fm") == [3]
    assert len(published(store, "fm")) == 3


def test_forget_leaves_other_teachers_alone(store: TeacherStore) -> None:
    store.write(dd.snapshot(2, teacher="gm"), [1], [[0.5, 0.5]], [AT])
    forget(store, "fm", versions=range(9))
    forget(store, "fm", before_seconds=AT + 9 * WINDOW)
    assert store.teachers() == ["gm"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, "received neither"),
        ({"versions": [1], "before_seconds": 1}, ValueError, "received both"),
        ({"versions": ["x"]}, TypeError, "received 'x'"),
        ({"versions": [-1]}, TypeError, r"in \[0, 2\^40\); received -1"),
        ({"versions": [2**63]}, TypeError, r"in \[0, 2\^40\); received 9223"),
        ({"versions": [True]}, TypeError, r"in \[0, 2\^40\); received True"),
        ({"before_seconds": 1_790_000_000_000}, ValueError, "milliseconds"),
    ],
)
def test_wrong_arguments_of_forget(
    store: TeacherStore, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        forget(store, "fm", **options)
    assert len(dd.all_rows(store)) == 60


def test_the_three_commands(store: TeacherStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", store.url, "fm", "--versions", "2"]) == 0
    assert "forgotten: 20 rows and 1 snapshot(s) of fm" in capsys.readouterr().out
    assert main(["forget", store.url, "fm", "--before", "1970-01-01T03:00:00Z"]) == 0
    assert "forgotten: 20 rows and 0 snapshot(s) of fm" in capsys.readouterr().out
    assert main(["compact", store.url, "--vacuum-hours", "0"]) == 0
    assert len(list(Path(store.url).glob("outputs/*/*/*.parquet"))) == 1
    assert len(dd.all_rows(TeacherStore(store.url))) == 20


def test_a_running_look_up_loses_what_was_forgotten(store: TeacherStore) -> None:
    lookup = TeacherLookup(
        store,
        "fm",
        tasks=["click"],
        ids=np.array,
        event_seconds=lambda _: AT,
        refresh_seconds=0.0,
    )
    assert lookup([2, 12]).values.flatten().tolist() == [3.0, 3.0]
    forget(store, "fm", versions=[3])
    deadline = time.monotonic() + 60
    while lookup([2, 12]).values.flatten().tolist() != [200.0, 200.0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lookup.close()
