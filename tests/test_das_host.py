"""Windows read once per host: what is shared, and what happens if processes end or disks fill."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import das_data as dd
import forked
import numpy as np
import pytest
from das_data import AT, WINDOW, new_store, small_store, snapshot
from forked import Forked
from s3_server import S3Server
from test_das_lookup import batch_of, listed, lookup_of, several_windows

from torchrec_exfm import TeacherOutputs
from torchrec_exfm.das import StoreError, TeacherLookup, TeacherStore
from torchrec_exfm.das import host as host_module

SOON = 20.0


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    """Create a store with examples 0, 1, 2 of window 2."""
    return small_store(tmp_path / "store")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """Make a host folder, and require it to be empty once all look-ups are closed."""
    folder = tmp_path / "host"
    yield folder
    until(lambda: not [*folder.glob("*/*")])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def readers(host: Path) -> list[int]:
    """Return the reader processes of a folder: those that hold its lock."""
    (lock,) = host.glob("*/*/reader")
    return [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdecimal() and int(process.name) != os.getpid()
        if any(target(file) == str(lock) for file in files(process / "fd"))
    ]


def files(folder: Path) -> list[Path]:
    try:
        return [*folder.iterdir()]
    except OSError:  # it has ended, or is another user's
        return []


def target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


# ---- What is shared ----


@pytest.mark.parametrize("pinned", [None, np.int64(2)])
def test_mapped_is_as_in_memory(tmp_path: Path, host: Path, pinned: Any) -> None:
    store = new_store(
        tmp_path / "store", tasks=("click", "buy"), embedding_width=3, embedding_resolution="int8"
    )
    ids, random = np.arange(600), np.random.default_rng(0)
    for version in (1, 2):
        outputs = random.normal(size=(300, 2)).astype(np.float32)
        given_ids = random.choice(ids, 300, replace=False)
        embeddings = random.normal(size=(300, 3)).astype(np.float32)
        times = AT + 60 * given_ids
        store.write(snapshot(version), given_ids, outputs, times, embeddings=embeddings)
    store.write(snapshot(3), [0, 1], [1.0, 2.0], [AT, AT + 60], tasks=["buy"])
    batch = {int(i): AT + 60 * int(i) for i in random.permutation(700)}
    options: Any = {"embeddings": True, "max_age_seconds": 30_000, "tasks": ("buy", "click")}
    options["snapshot"] = pinned
    with (
        lookup_of(store, host_folder=host, **options) as mapped,
        lookup_of(store, **options) as plain,
    ):
        for actual, expected in zip(tensors(mapped(batch)), tensors(plain(batch)), strict=True):
            np.testing.assert_array_equal(actual, expected)
        assert mapped.counters == plain.counters


def tensors(outputs: TeacherOutputs) -> list[Any]:
    assert outputs.embeddings is not None and outputs.embedding_presence is not None
    return [
        outputs.values,
        outputs.presence,
        outputs.age_seconds,
        outputs.embeddings.nan_to_num(-1),
        outputs.embedding_presence,
    ]


def test_two_jobs_of_a_host_share_one_reader_and_its_files(tmp_path: Path, host: Path) -> None:
    store = several_windows(tmp_path / "store")
    with lookup_of(store, host_folder=host, refresh_seconds=None) as first:
        assert listed(first(batch_of(2, 3))) == [2.0, 3.0]
        job, connection = job_of(store.url, host)
        assert connection.recv() == [2.0, 3.0]
        assert len([*host.glob("*/*")]) == len(readers(host)) == 1
        job.kill()
        assert listed(first(batch_of(3))) == [3.0]
        with lookup_of(store, host_folder=host, exclude=[7]):  # of other rows: apart
            assert len([*host.glob("*/*")]) == 2


def job_of(url: str, host: Path) -> tuple[Forked, Connection]:
    """Run a process that looks up windows 2 and 3, sends the outputs, and waits to be killed."""
    ours, theirs = forked.CONTEXT.Pipe()
    return Forked(look_up, theirs, url, host), ours


def look_up(connection: Connection, url: str, host: Path) -> None:
    lookup = lookup_of(TeacherStore(url), host_folder=host, refresh_seconds=None)
    connection.send(listed(lookup(batch_of(2, 3))))
    connection.recv()


def test_late_rows_come_to_all_that_look_up(store: TeacherStore, host: Path) -> None:
    options: Any = {"host_folder": host, "refresh_seconds": 0.05}
    batch = {0: AT, 8: AT}
    with lookup_of(store, **options) as first, lookup_of(store, **options) as second:
        assert listed(first(batch)) == listed(second(batch)) == [0.5, None]
        store.write(snapshot(), [8], [8.0], [AT])
        for lookup in (first, second):
            until(lambda lookup=lookup: listed(lookup(batch)) == [0.5, 8.0])  # type: ignore[misc]
            assert lookup.counters["fm"].late == 1
        store.write(snapshot(2), [0], [7.0], [AT])
        first.refresh()
        assert listed(first(batch)) == [7.0, 8.0]


def test_as_many_windows_as_allowed(tmp_path: Path, host: Path) -> None:
    store = several_windows(tmp_path / "store")
    with lookup_of(store, host_folder=host, max_windows=3) as lookup:
        for windows in ([2], [3], [4, 5, 6], [7, 2, 3, 4], [7]):
            assert listed(lookup(batch_of(*windows))) == [float(window) for window in windows]
            assert len([*host.glob("*/*/*.ready")]) <= 3
    ids = np.arange(4_000)  # a thousand more in each of four windows
    store.write(snapshot(), ids + 10, ids.astype(np.float32), (2 + ids // 1_000) * WINDOW)
    two = 2 * host_module.index_bytes(1_001, 1) + 5_000
    with lookup_of(store, host_folder=host, max_windows=3, host_bytes=two) as lookup:
        for window in (2, 3, 4, 5):
            assert listed(lookup(batch_of(window))) == [float(window)]
            assert len([*host.glob("*/*/*.ready")]) <= 2


# ---- What ends ----


def test_a_reader_that_is_killed_is_started_again(tmp_path: Path, host: Path) -> None:
    store = several_windows(tmp_path / "store")
    with lookup_of(store, host_folder=host) as lookup:
        assert listed(lookup(batch_of(2))) == [2.0]
        (reader,) = readers(host)
        os.kill(reader, signal.SIGKILL)
        (folder,) = host.glob("*/*")
        (folder / "part").mkdir(exist_ok=True)  # it was at work
        assert listed(lookup(batch_of(5))) == [5.0]
        (another,) = readers(host)
        assert another != reader
        assert listed(lookup(batch_of(2))) == [2.0]


def test_a_reader_that_ends_at_once_is_told(
    store: TeacherStore, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module.sys, "executable", "/bin/false")
    with lookup_of(store, host_folder=host, timeout_seconds=SOON) as lookup:
        with pytest.raises(StoreError, match="has ended 3 times") as caught:
            lookup({0: AT})
        dd.sentence(caught.value)
        monkeypatch.undo()
        assert listed(lookup({0: AT})) == [0.5]


def test_a_host_is_left_clean_if_all_is_killed(tmp_path: Path, host: Path) -> None:
    store = several_windows(tmp_path / "store")
    for with_its_reader in (False, True):
        job, connection = job_of(store.url, host)
        assert connection.recv() == [2.0, 3.0]
        for reader in readers(host) if with_its_reader else ():
            os.kill(reader, signal.SIGKILL)
        job.kill()
        if with_its_reader:  # only the next look-up is left to do it
            assert [*host.glob("*/*/*.ready")]
            with lookup_of(store, host_folder=host, exclude=[9]):
                assert len([*host.glob("*/*")]) == 1
        until(lambda: not [*host.glob("*/*")])


def test_a_folder_that_goes_is_made_anew(tmp_path: Path, host: Path) -> None:
    store = several_windows(tmp_path / "store")
    with lookup_of(store, host_folder=host) as lookup:
        assert listed(lookup(batch_of(2))) == [2.0]
        shutil.rmtree(host)
        assert listed(lookup(batch_of(2))) == [2.0]  # it is mapped
        assert listed(lookup(batch_of(6))) == [6.0]


# ---- What has no room ----


def test_a_window_without_room_is_told(store: TeacherStore, host: Path) -> None:
    with lookup_of(store, host_folder=host, host_bytes=50) as lookup:
        for _ in range(2):
            with pytest.raises(StoreError, match=r"room for a window of .*; has 50") as caught:
                lookup({0: AT})
            dd.sentence(caught.value)


def test_a_disk_that_takes_no_more_gives_an_error(
    store: TeacherStore, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to mapped memory without space on the disk would end the reader with SIGBUS."""
    ids = np.arange(10_000)
    store.write(snapshot(), ids, ids.astype(np.float32), AT + WINDOW + ids % WINDOW)
    limited = host.parent / "python"
    limited.write_text(f'#!/bin/bash\nulimit -f 100; exec {sys.executable} "$@"\n')  # KiB a file
    limited.chmod(0o755)
    monkeypatch.setattr(host_module.sys, "executable", str(limited))
    with lookup_of(store, host_folder=host) as lookup:
        assert listed(lookup({0: AT})) == [0.5]
        with pytest.raises(StoreError, match="File too large"):
            lookup({0: AT + WINDOW})
        assert listed(lookup({0: AT})) == [0.5]


def test_a_folder_that_cannot_be_made_is_named(store: TeacherStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"can't hold the host's windows .* host_folder") as caught:
        lookup_of(store, host_folder=tmp_path / "file" / "host")
    assert str(tmp_path / "file") in dd.sentence(caught.value)


# ---- What does not answer ----


@pytest.fixture
def remote(server: S3Server, url: str) -> TeacherStore:
    """Create a store on a server: example w with output w in each window w = 2 ... 7."""
    options = server.storage_options
    store = TeacherStore.create(
        url, window_seconds=WINDOW, resolution="float32", storage_options=options
    )
    numbers = np.arange(2, 8)
    store.write(snapshot(), numbers, numbers.astype(np.float32), numbers * WINDOW)
    return store


@pytest.mark.parametrize("hanging", [".parquet", "_delta_log"])
def test_a_store_that_hangs_is_waited_for_once(
    server: S3Server, remote: TeacherStore, host: Path, hanging: str
) -> None:
    options: Any = {"host_folder": host, "timeout_seconds": 0.5, "refresh_seconds": None}
    with lookup_of(remote, **options) as lookup:
        until(lambda: answers(lookup, 2))
        server.set_faults(hanging=hanging)
        assert listed(lookup(batch_of(2))) == [2.0]
        beats, done = [time.monotonic()], threading.Event()
        heart = threading.Thread(target=beat, args=(beats, done))
        heart.start()
        waits = []
        for window in (5, 5, 6):
            started = time.monotonic()
            with pytest.raises(StoreError, match=r"should answer within 0.5 s") as caught:
                lookup(batch_of(window))
            waits.append(time.monotonic() - started)
        done.set()
        heart.join()
        dd.sentence(caught.value)
        assert np.diff(beats).max() < 0.45  # nothing holds this process's interpreter
        assert 0.5 <= waits[0] < 2.0 and max(waits[1:]) < 0.45  # less than a second wait
        assert listed(lookup(batch_of(2))) == [2.0]  # is in memory
        server.set_faults()
        until(lambda: answers(lookup, 5))


def answers(lookup: TeacherLookup, window: int) -> bool:
    try:
        return listed(lookup(batch_of(window))) == [float(window)]
    except StoreError:
        return False


def beat(beats: list[float], done: threading.Event) -> None:
    while not done.wait(0.01):
        beats.append(time.monotonic())


def test_a_window_that_is_late_in_this_process_is_waited_for_once(tmp_path: Path) -> None:
    store = several_windows(tmp_path)
    with lookup_of(store, timeout_seconds=0.2) as lookup:
        busy = threading.Event()
        lookup._reader._thread.submit(busy.wait)  # type: ignore[union-attr]
        started = time.monotonic()
        for _ in range(5):
            with pytest.raises(StoreError, match=r"within 0.2 s"):
                lookup(batch_of(2))
        assert 0.2 <= time.monotonic() - started < 0.9  # five waits take a second
        busy.set()
        until(lambda: answers(lookup, 2))
        assert listed(lookup(batch_of(4))) == [4.0]


def test_the_process_ends_though_its_store_does_not_answer(
    server: S3Server, remote: TeacherStore, host: Path
) -> None:
    server.set_faults(hanging=".parquet")
    job = Forked(start_and_end, remote.url, remote.storage_options, host)
    job.process.join(SOON)  # not for the deadline of ten minutes
    assert job.process.exitcode == 0


def start_and_end(url: str, options: dict[str, str], host: Path) -> None:
    store = TeacherStore(url, storage_options=options)
    lookup_of(store, host_folder=host).start(batch_of(2))
