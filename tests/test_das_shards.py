"""Shard names belong to a teacher and version and to their rows, and are free if these are gone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import das_data as dd
import numpy as np
import pytest
from das_data import AT, WINDOW, new_store, snapshot

from torchrec_exfm.das import TeacherLogger, TeacherStore, forget
from torchrec_exfm.das.rules import Rows

DAY = "2025-10-09"
IDS = [1, 2, 3]
OUTPUTS = [0.5, 1.5, 2.5]


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return new_store(tmp_path)


def write(store: TeacherStore, ids: Any = IDS, outputs: Any = OUTPUTS, **changed: Any) -> Any:
    options: dict[str, Any] = {"shard": DAY, **changed}
    version = options.pop("snapshot", snapshot())
    times = options.pop("times", [AT] * len(ids))
    report = store.write(version, ids, outputs, times, **options)
    return report.written, report.stored_before, report.committed


def test_a_name_belongs_to_its_teacher_and_version(store: TeacherStore) -> None:
    for version in (snapshot(1), snapshot(1, teacher="gm"), snapshot(2)):
        assert write(store, snapshot=version) == (3, 0, True)
        assert write(store, snapshot=version) == (0, 3, False)
    assert len(dd.all_rows(store)) == 6 and len(dd.all_rows(store, "gm")) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"ids": [1, 2, 4]},
        {"ids": [1, 2], "outputs": [0.5, 1.5]},
        {"times": [AT, AT, AT + 1]},
        {"times": [AT + WINDOW] * 3},
        {"logged": True},
    ],
    ids=str,
)
def test_other_rows_under_a_name_are_refused(store: TeacherStore, other: dict[str, Any]) -> None:
    write(store)
    with pytest.raises(ValueError, match=r"with, 3 of the digest \w{8}; received \d of the dig"):
        write(store, **other)
    assert dd.by_id(store) == dict(zip(IDS, ([v] for v in OUTPUTS), strict=True))


def test_other_outputs_under_a_name_are_refused(store: TeacherStore) -> None:
    write(store)
    with pytest.raises(ValueError, match=r"for 1 of 3 examples: of example 2 \[1.5\] are stored, "):
        write(store, outputs=[0.5, 1.6, 2.5])
    assert dd.by_id(store)[2] == [1.5]


@pytest.mark.parametrize(("resolution", "step"), [("float32", 2e-5), ("bfloat16", 2**-8)])
def test_outputs_that_differ_by_rounding_are_the_same(
    tmp_path: Path, resolution: str, step: float
) -> None:
    store = new_store(tmp_path / resolution, resolution=resolution)
    write(store)
    assert write(store, outputs=np.multiply(OUTPUTS, 1 + step)) == (0, 3, False)
    with pytest.raises(ValueError, match="should have the outputs"):
        write(store, outputs=np.multiply(OUTPUTS, 1 + 16 * step))


def test_an_outlier_hides_no_other_output(store: TeacherStore) -> None:
    write(store, outputs=[1e6, -2.0, 3.0])
    with pytest.raises(ValueError, match="for 2 of 3 examples"):
        write(store, outputs=[1e6, 9.0, -9.0])


def test_another_shard_may_say_something_else_of_an_example(store: TeacherStore) -> None:
    write(store)
    write(store, outputs=[5.0, 6.0, 7.0], shard="another")
    assert write(store) == (0, 3, False)
    assert write(store, outputs=[5.0, 6.0, 7.0], shard="another") == (0, 3, False)


def test_a_snapshot_trained_through_another_time_is_another(store: TeacherStore) -> None:
    write(store)
    with pytest.raises(ValueError, match="should have the rows it was written with"):
        write(store, snapshot=snapshot(1, 999))


def test_a_name_is_free_after_forget_and_compaction(store: TeacherStore) -> None:
    for version in (1, 2, 3):
        store.write(snapshot(version), [version], [0.5], [AT], shard=DAY)
    forget(store, "fm", versions=[2])
    store.table.compact(("fm", 2))
    assert write(store, snapshot=snapshot(2)) == (3, 0, True)


def test_what_was_left_out_is_noted_once(store: TeacherStore) -> None:
    bad = [0.5, float("nan"), 2.5]
    write(store, outputs=bad, bad_rows="quarantine")
    TeacherStore(store.url).table.delta.delete("example_id = 1")
    assert write(store, outputs=bad, bad_rows="quarantine") == (1, 1, True)
    history = store.table.delta.history()
    assert sum("quarantined" in commit for commit in history) == 1


@pytest.mark.parametrize("shard", [3, "", "\ud800", b"a"])
def test_names_that_are_none(store: TeacherStore, shard: Any) -> None:
    with pytest.raises(ValueError, match="shard should be a name"):
        write(store, shard=shard)


def test_a_commit_is_of_what_was_read_for_it(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows are read, another writer rewrites the missing ones, compacts and vacuums."""
    times = {"times": [AT, AT, AT + WINDOW]}
    write(store, **times)
    TeacherStore(store.url).table.delta.delete("example_id < 3")
    other, real = TeacherStore(store.url), store.read
    others: list[Any] = []

    def read(teacher: str, window: int, **options: Any) -> Any:
        if window == 3 and not others:
            others.append(write(other, **times))
            other.write(snapshot(9), [9], [0.5], [AT + WINDOW])
            other.table.compact(("fm", 3))
            other.table.vacuum(0, enforce=False)
        return real(teacher, window, **options)

    monkeypatch.setattr(store, "read", read)
    assert write(store, **times) == (0, 3, False) and others == [(2, 1, True)]
    assert list(dd.by_id(TeacherStore(store.url))) == [1, 2, 3, 9]


def test_threads_that_share_a_store(store: TeacherStore) -> None:
    ids = np.arange(500)
    for number in range(5):
        with ThreadPoolExecutor(3) as threads:
            writes = [
                threads.submit(
                    store.write,
                    snapshot(),
                    ids + 1_000 * number,
                    ids.astype(np.float32),
                    AT + ids,
                    shard=f"{number}",
                )
                for _ in range(2)
            ]
            threads.submit(lambda: [store.refresh() for _ in range(20)])
        assert sorted(future.result().written for future in writes) == [0, 500]
    assert len(dd.by_id(store)) == 2_500


def test_the_order_of_the_rows_counts_for_nothing(store: TeacherStore) -> None:
    write(store)
    assert write(store, ids=IDS[::-1], outputs=OUTPUTS[::-1]) == (0, 3, False)


def test_quarantined_rows_that_were_mended_are_written(store: TeacherStore) -> None:
    bad = [0.5, float("nan"), 2.5]
    assert write(store, outputs=bad, bad_rows="quarantine") == (2, 0, True)
    assert write(store, outputs=bad, bad_rows="quarantine") == (0, 2, False)
    assert write(store) == (1, 2, True)
    assert dd.by_id(store)[2] == [1.5]


def forget_version(store: TeacherStore) -> None:
    forget(store, "fm", versions=[1])


def delete_elsewhere(store: TeacherStore) -> None:
    TeacherStore(store.url).table.delta.delete("example_id < 100")


def lose_the_file(store: TeacherStore) -> None:
    for file in store.files("fm", 2):
        (Path(store.table.url) / file.path).unlink()
    store.table.repair()


def restore_an_old_version(store: TeacherStore) -> None:
    TeacherStore(store.url).table.delta.restore(0)


GONE = [forget_version, delete_elsewhere, lose_the_file, restore_an_old_version]


@pytest.mark.parametrize("lose", GONE, ids=lambda lose: lose.__name__)
def test_rows_that_are_gone_are_written_again(store: TeacherStore, lose: Any) -> None:
    write(store)
    lose(store)
    assert write(store) == (3, 0, True)
    assert write(store) == (0, 3, False)
    assert list(dd.by_id(store)) == IDS


@pytest.mark.parametrize("lose", GONE, ids=lambda lose: lose.__name__)
def test_a_name_is_free_where_all_of_a_version_is_gone(store: TeacherStore, lose: Any) -> None:
    write(store)
    lose(store)
    assert write(store, ids=[7], outputs=[1.0]) == (1, 0, True)
    assert list(dd.by_id(store)) == [7]


def test_a_part_that_is_gone_is_written_again(store: TeacherStore) -> None:
    write(store, times=[AT, AT + WINDOW, AT + 2 * WINDOW])
    TeacherStore(store.url).table.delta.delete("example_id = 2")
    assert write(store, times=[AT, AT + WINDOW, AT + 2 * WINDOW]) == (1, 2, True)
    assert list(dd.by_id(store)) == IDS


@pytest.mark.parametrize("lose", GONE, ids=lambda lose: lose.__name__)
def test_a_logger_logs_again_what_is_gone(store: TeacherStore, lose: Any) -> None:
    torch = pytest.importorskip("torch")
    columns = torch.tensor(IDS), torch.full((3,), AT), torch.tensor(OUTPUTS)
    with TeacherLogger(store, "fm") as logger:
        logger.log(*columns)
        logger.flush()
        store.refresh()
        if lose is forget_version:
            forget(store, "fm", versions=[0])
        else:
            lose(store)
        logger.log(*columns)
        logger.flush()
        assert (logger.written, logger.logged_before) == (6, 0)
        logger.log(*columns)
    assert (logger.written, logger.logged_before) == (6, 3)
    assert list(dd.by_id(store)) == IDS


def test_a_store_sees_its_own_writes(store: TeacherStore) -> None:
    write(store)
    assert store.windows("fm") == [2]
    store.advance_watermark("fm", AT)
    assert store.watermark("fm") == AT


def test_a_write_of_very_many_windows_is_refused(store: TeacherStore) -> None:
    ids = np.arange(1_001)
    times = AT + ids * WINDOW
    with pytest.raises(ValueError, match="of at most 1000 windows; received 1001: write them in"):
        store.write(snapshot(), ids, ids.astype(np.float32), times)
    assert store.write(snapshot(), ids[1:], ids[1:].astype(np.float32), times[1:]).written == 1_000
    assert isinstance(dd.all_rows(store), Rows) and len(dd.all_rows(store)) == 1_000


def test_a_logger_of_very_many_windows_goes_on(store: TeacherStore) -> None:
    torch = pytest.importorskip("torch")
    ids = torch.arange(1_500)
    with TeacherLogger(store, "fm") as logger:
        logger.log(ids, AT + ids * WINDOW, ids.float())
    assert logger.written == 1_500 == len(dd.all_rows(store))
