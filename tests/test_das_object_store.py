"""A teacher store on S3, served by a server that fails as object stores do."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import das_data as dd
import numpy as np
import pytest
from das_data import AT, WINDOW, snapshot
from s3_server import S3Server

from torchrec_exfm.das import StoreError, TeacherLookup, TeacherStore, newest_snapshot, publish

IDS = np.arange(3)
OUTPUTS = {0: [0.5], 1: [1.5], 2: [2.5]}


def new_store(url: str, server: S3Server) -> TeacherStore:
    return TeacherStore.create(
        url, window_seconds=WINDOW, resolution="float32", storage_options=server.storage_options
    )


def write(store: TeacherStore, at: int = AT) -> None:
    store.write(snapshot(), IDS, IDS + np.float32(0.5), np.full(3, at))


def test_a_store_is_written_read_and_looked_up(server: S3Server, url: str) -> None:
    store = new_store(url, server)
    write(store)
    assert dd.by_id(store) == OUTPUTS
    lookup = TeacherLookup(store, "fm", ids=lambda batch: batch, event_seconds=lambda _: AT)
    outputs = lookup([2, 0, 9])
    assert outputs.values[:, 0, 0].tolist()[:2] == [2.5, 0.5]
    assert outputs.presence[:, 0, 0].tolist() == [True, True, False]


def test_snapshots_are_published(server: S3Server, url: str) -> None:
    store = new_store(url, server)
    published = [publish(store, "fm", None, trained_through_seconds=s) for s in (5, 6)]
    assert newest_snapshot(store, "fm") == published[1]


def test_slow_replies_and_errors_are_passed_over(server: S3Server, url: str) -> None:
    server.set_faults(failing=0.3, latency_seconds=0.005)
    store = new_store(url, server)
    write(store)
    write(store, AT + WINDOW)
    store.refresh()
    for window in (2, 3):
        assert store.read("fm", window)[0].example_id.tolist() == [0, 1, 2]


@pytest.mark.parametrize("status", [500, 503, 0], ids=["500", "503", "closed"])
def test_rows_are_there_once_if_the_reply_is_lost(server: S3Server, url: str, status: int) -> None:
    store = new_store(url, server)
    server.set_faults(lost_replies=1, lost_status=status)
    write(store)
    assert dd.by_id(store) == OUTPUTS  # which fails for a row that is there twice


def test_several_writers_lose_nothing(server: S3Server, url: str) -> None:
    new_store(url, server)
    server.set_faults(failing=0.05)

    def write_five(writer: int) -> None:
        store = TeacherStore(url, storage_options=server.storage_options)
        for piece in range(5):
            store.write(snapshot(), [10 * writer + piece], [0.5], [AT])

    threads = [threading.Thread(target=write_five, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.set_faults()
    store = TeacherStore(url, storage_options=server.storage_options)
    assert set(dd.by_id(store)) == {
        10 * writer + piece for writer in range(3) for piece in range(5)
    }


def test_a_long_log_is_listed_in_pages(server: S3Server, url: str) -> None:
    store = new_store(url, server)
    for window in range(4):
        write(store, AT + window * WINDOW)
    server.set_faults(page=2)
    opened = TeacherStore(url, storage_options=server.storage_options)
    assert opened.windows("fm") == [2, 3, 4, 5]
    assert any("continuation-token" in request for request in server.requests())


def test_a_store_that_fails_is_one_sentence(server: S3Server, url: str) -> None:
    store = new_store(url, server)
    write(store)
    store.refresh()
    server.set_faults(failing=1.0, status=500)
    for act in (lambda: store.read("fm", 2), lambda: write(store), lambda: store.refresh()):
        started = time.monotonic()
        with pytest.raises(StoreError, match="500 Internal Server Error") as caught:
            act()
        assert url in dd.sentence(caught.value)
        assert time.monotonic() - started < 5


def test_what_was_written_is_there_for_whoever_has_the_options(server: S3Server, url: str) -> None:
    write(new_store(url, server))
    wrong = {**server.storage_options, "aws_endpoint_url": "http://127.0.0.1:1", "max_retries": "0"}
    with pytest.raises(StoreError, match="can't be opened"):
        TeacherStore(url, storage_options=wrong)
    opened = TeacherStore(f"{url}/", storage_options=server.storage_options)
    assert dd.by_id(opened) == OUTPUTS


# ---- Conditional puts ----


def folder_of(url: str) -> str:
    return url.rpartition("/")[2]


def probes(server: S3Server) -> list[str]:
    return [request for request in server.requests() if "_probe-" in request]


def test_a_store_that_overwrites_commits_is_refused(server: S3Server, url: str) -> None:
    server.set_faults(conditional_puts=False, latency_seconds=0.02)
    with pytest.raises(StoreError, match=r"should refuse to overwrite a commit .* took [234]") as e:
        new_store(url, server)
    assert url in dd.sentence(e.value)
    assert not server.stored(folder_of(url))


def test_the_probe_of_a_good_store_leaves_nothing(server: S3Server, url: str) -> None:
    new_store(url, server)
    assert 20 < len(probes(server)) < 300
    assert server.stored(folder_of(url)) and not server.stored("_probe-")
    new_store(url, server)
    TeacherStore(url, storage_options=server.storage_options)
    assert not probes(server)  # of a store that is there


def test_several_creators_make_one_store(server: S3Server, url: str) -> None:
    with ThreadPoolExecutor(3) as creators:
        stores = list(creators.map(lambda _: new_store(url, server), range(3)))
    write(stores[0])
    assert all(dd.by_id(store) == OUTPUTS for store in stores)


def test_a_store_that_takes_nothing_is_one_sentence(server: S3Server, url: str) -> None:
    server.set_faults(failing=1.0, failing_in="PUT", status=403)
    with pytest.raises(StoreError, match=r"can't be written to .*403 Forbidden") as caught:
        new_store(url, server)
    assert url in dd.sentence(caught.value)


def test_a_probe_that_cannot_be_removed_harms_nobody(server: S3Server, url: str) -> None:
    server.set_faults(failing=1.0, failing_in="POST ?delete", status=403)
    store = new_store(url, server)
    write(store)
    assert dd.by_id(store) == OUTPUTS
