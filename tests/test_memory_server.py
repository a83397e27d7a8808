"""A served teacher memory, on SQLite and a real Redis, equals training's to the bit."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import runpy
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forked
from redis_server import BINARY, RedisServer

from torchrec_exfm.das import StoreError, memory_server
from torchrec_exfm.das.memory import Memory, MemoryFeatures, MemoryFormat
from torchrec_exfm.das.memory_server import (
    ServedMemory,
    drop_memory,
    open_memories,
    publish_memory,
    write_needs,
)

FORMAT = MemoryFormat(
    name="fm", keys=[["user"], ["user", "item"]], width=3, length=4, resolution="int8"
)
COUNTS = MemoryFormat(name="fm", keys=[["user"]])
KILLED = replace(COUNTS, length=8)
BACKENDS = [
    "sqlite",
    pytest.param(
        "redis",
        marks=pytest.mark.skipif(
            BINARY is None, reason="neither redis-server nor valkey-server is installed"
        ),
    ),
]


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    pytest.importorskip("redis")
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "memory.sqlite")
    import redis

    server: RedisServer = request.getfixturevalue("redis_server")
    with redis.Redis(port=server.port) as client:
        client.flushall()
    return server.url


def events(seed: int, first: int, n: int = 400, width: int = 3) -> tuple[Any, Any, Any]:
    """Return events of users and items of both signs, including the ends of int64."""
    numbers = np.random.default_rng(seed)
    users = numbers.choice(np.r_[-3:40, -(2**63) + 1, 2**63 - 1], n)
    columns = {"user": users, "item": numbers.integers(-5, 5, n)}
    values = numbers.normal(size=(n, width)).astype(np.float32)
    return columns, np.sort(numbers.integers(first, first + 100, n)), values


def requests(seed: int, seconds: int, n: int = 200) -> tuple[Any, Any]:
    """Return requests of known users (some twice), unknown users, and rows without a user."""
    columns, _, _ = events(seed, 0, n)
    columns["user"][::7] += 1000
    columns["user"][::11] = -(2**63)  # NO_KEY
    return columns, np.random.default_rng(seed).integers(seconds, seconds + 1000, n)


def assert_same(served: dict[str, MemoryFeatures], read: dict[str, MemoryFeatures]) -> None:
    assert served.keys() == read.keys()
    for key in read:
        for field in fields(MemoryFeatures):
            ours, theirs = getattr(served[key], field.name), getattr(read[key], field.name)
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, field.name
            assert ours.tobytes() == theirs.tobytes(), (key, field.name)
            assert ours.flags.writeable, field.name  # else torch.from_numpy warns


def simple(counts: dict[int, int], seconds: int = 100) -> Memory:
    """Build a memory with a number of events of 1.0 per user."""
    memory = Memory(COUNTS)
    users = [user for user, count in counts.items() for _ in range(count)]
    memory.write({"user": users}, [seconds] * len(users), [1.0] * len(users))
    return memory


def read_counts(url: str, users: list[int], seconds: int = 10_000, **options: Any) -> list[int]:
    with contextlib.closing(ServedMemory(url, "fm", **options)) as served:
        features = served.read({"user": users}, [seconds] * len(users))["user"]
    counts: list[int] = features.count.tolist()
    return counts


@pytest.mark.parametrize("length", [0, 4])
@pytest.mark.parametrize("resolution", ["float32", "float16", "int8", "int4"])
def test_served_features_are_those_of_training_to_the_bit(
    url: str, length: int, resolution: Any
) -> None:
    memory = Memory(replace(FORMAT, length=length, resolution=resolution, delay_seconds=7))
    known = set()
    for step in range(3):
        columns, seconds, values = events(step, 1000 + 100 * step)
        memory.write(columns, seconds, values)
        before = 1100 + 100 * step
        written = publish_memory(url, memory, before)
        asked, times = requests(10 + step, before)
        training = copy.deepcopy(memory)
        (waiting,) = training._waiting
        training._waiting = [tuple(part[:0] for part in waiting)]  # not known by then
        with contextlib.closing(ServedMemory(url, "fm", format=memory.format)) as served:
            assert_same(served.read(asked, times), training.read(asked, times))
            empty = {name: np.empty(0, np.int64) for name in asked}
            assert len(served.read(empty, [])["user"].count) == 0
            assert served.format == memory.format
            assert served.through_seconds == before
        changed = columns["user"][seconds + 7 < before]
        known |= {*changed.tolist()}
        assert written >= len({*changed.tolist()})
    users = sorted(known)
    with contextlib.closing(ServedMemory(url, "fm")) as served:
        columns = {"user": users, "item": [0] * len(users)}
        assert (served.read(columns, [before] * len(users))["user"].count > 0).all()


def test_a_publication_writes_what_has_changed(url: str) -> None:
    memory = simple({1: 2, 2: 1})
    assert publish_memory(url, memory, 200) == 2
    assert publish_memory(url, memory, 200) == 0
    memory.write({"user": [2, 3]}, [250, 251], [1.0, 1.0])
    assert publish_memory(url, memory, 251) == 1  # that of 251 is not known before 252
    assert read_counts(url, [1, 2, 3]) == [2, 2, 0]
    assert publish_memory(url, memory, 252) == 1
    assert read_counts(url, [1, 2, 3, 3]) == [2, 2, 1, 1]


def test_many_records_and_keys_in_one_get(url: str) -> None:
    users = list(range(-2500, 2500))
    memory = simple(dict.fromkeys(users, 1))
    assert publish_memory(url, memory, 200) == 5000
    assert read_counts(url, [*users, 9999]) == [1] * 5000 + [0]


def test_a_key_that_is_twice_in_a_batch_is_asked_for_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_memory(url, simple({1: 2, 2: 1}), 200)
    with contextlib.closing(ServedMemory(url, "fm")) as served:
        asked: list[list[str]] = []
        get = served._server.hmget

        def counting(name: str, keys: list[str]) -> Any:
            asked.append(keys)
            return get(name, keys)

        monkeypatch.setattr(served._server, "hmget", counting)
        counts = served.read({"user": [2, 1, 2, 2]}, [300] * 4)["user"].count.tolist()
    assert counts == [1, 2, 1, 1]
    assert len(asked) == 1 and len(asked[0]) == 1 + 2  # the description, and two users


def test_versions_stand_beside_each_other(url: str) -> None:
    publish_memory(url, simple({1: 2}), 200)
    with contextlib.closing(ServedMemory(url, "fm")) as old:
        publish_memory(url, simple({1: 5}), 200, version=12)
        assert old.read({"user": [1]}, [300])["user"].count.tolist() == [2]
        assert read_counts(url, [1], version=12) == [5]
        drop_memory(url, "fm", 1)
        with pytest.raises(StoreError, match=r"should hold fm/1 as .*; received None"):
            old.read({"user": [1]}, [300])
    assert read_counts(url, [1], version=12) == [5]  # 1 is no prefix of 12
    with pytest.raises(StoreError, match="should hold fm/1 as a memory"):
        ServedMemory(url, "fm")
    drop_memory(url, "fm", 12)
    drop_memory(url, "fm", 12)
    publish_memory(url, simple({2: 1}), 200, version=12)
    assert read_counts(url, [1, 2], version=12) == [0, 1]  # no record was left


def test_names_that_begin_alike_are_apart(url: str) -> None:
    for name in ("fm", "fm2", "fm.1"):
        memory = Memory(replace(COUNTS, name=name))
        memory.write({"user": [1]}, [100], [1.0])
        publish_memory(url, memory, 200)
    drop_memory(url, "fm", 1)
    for name in ("fm2", "fm.1"):
        with contextlib.closing(ServedMemory(url, name)) as served:
            assert served.read({"user": [1]}, [300])["user"].count.tolist() == [1]


def test_a_format_that_differs_is_refused(url: str, tmp_path: Path) -> None:
    publish_memory(url, simple({1: 2}), 200)
    other = replace(COUNTS, half_life_seconds=60.0)
    with pytest.raises(StoreError, match=r"should hold fm/1 as .*half_life_seconds=60"):
        publish_memory(url, Memory(other), 200)
    with pytest.raises(StoreError, match=r"should hold fm/1 as .*half_life_seconds=60"):
        ServedMemory(url, "fm", format=other)
    needs = tmp_path / "memories.json"
    write_needs(needs, [(COUNTS, 1)])
    (served,) = open_memories(url, needs).values()
    assert served.read({"user": [1]}, [300])["user"].count.tolist() == [2]
    write_needs(needs, [(other, 1)])
    with pytest.raises(StoreError, match=r"should hold fm/1 as .*half_life_seconds=60"):
        open_memories(url, needs)
    drop_memory(url, "fm", 1)
    publish_memory(url, Memory(other), 300)
    with pytest.raises(StoreError, match=r"received b.*half_life_seconds\": 60"):
        served.read({"user": [1]}, [300])
    served.close()


def test_a_memory_that_was_built_anew_publishes_all(url: str) -> None:
    memory = simple({1: 2, 2: 1})
    publish_memory(url, memory, 200)
    rebuilt = simple({1: 2, 2: 1})
    assert publish_memory(url, rebuilt, 200) == 2
    publish_memory(url, rebuilt, 250)
    memory.write({"user": [1]}, [250], [1.0])
    assert publish_memory(url, memory, 300) == 2  # the last publication is not its own


def test_a_memory_that_knows_less_is_refused(url: str) -> None:
    publish_memory(url, simple({1: 2}), 300)
    with pytest.raises(ValueError, match="before_seconds should be at least 300"):
        publish_memory(url, simple({1: 1}), 299)
    assert read_counts(url, [1]) == [2]


def test_what_another_server_got_is_not_left_out(url: str, tmp_path: Path) -> None:
    memory, second = simple({1: 2, 2: 1}), str(tmp_path / "second.sqlite")
    publish_memory(url, memory, 200)
    assert publish_memory(second, memory, 200) == 2
    assert read_counts(second, [1, 2]) == [2, 1]


def test_what_could_not_be_published_is_published_next(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = simple({1: 1})
    publish_memory(url, memory, 200)
    users = list(range(5000))
    second = str(tmp_path / "second.sqlite")
    publish_memory(second, memory, 200)
    server, calls = type(memory_server._connect(url, writes=True)), iter([True, False])
    hset = server.hset

    def failing(self: Any, name: str, mapping: Any) -> None:
        if not next(calls):
            raise sqlite3.OperationalError("disk I/O error")
        hset(self, name, mapping=mapping)

    memory.write({"user": users}, [250] * 5000, [1.0] * 5000)
    with monkeypatch.context() as patch:
        patch.setattr(server, "hset", failing)
        with pytest.raises(StoreError, match="disk I/O error"):
            publish_memory(url, memory, 300)
    with contextlib.closing(ServedMemory(url, "fm")) as served:
        assert served.through_seconds == 200  # never ahead of the records
    for server_url in (second, url):  # though the other has got some of them
        assert publish_memory(server_url, memory, 300) == 5000
        assert read_counts(server_url, users) == [2 if user == 1 else 1 for user in users]


def test_examples_of_the_past_are_refused(url: str) -> None:
    publish_memory(url, simple({1: 1}), 1000)
    with contextlib.closing(ServedMemory(url, "fm")) as served:
        served.read({"user": [1]}, [940])  # clocks differ
        with pytest.raises(ValueError, match="examples should be of 1000 or later"):
            served.read({"user": [1, 1]}, [2000, 939])
        with pytest.raises(ValueError, match=r"should be .*'user'.*; received .*'item'"):
            served.read({"item": [1]}, [2000])


@pytest.mark.parametrize(
    "damage",
    [lambda r: r[:-1], lambda r: r[:5], lambda r: b"", lambda r: r + r[-15:], lambda r: r[:-15]],
)
def test_damaged_records_are_told(url: str, damage: Any) -> None:
    memory = Memory(FORMAT)
    memory.write(*events(0, 100))
    publish_memory(url, memory, 200)
    with contextlib.closing(ServedMemory(url, "fm")) as served:
        assert served.format.event_dtype.itemsize == 15
        tamper(url, "user/5", damage)
        served.read({"user": [6], "item": [0]}, [300])
        with pytest.raises(StoreError, match=r"records of the memory fm should have 96 bytes"):
            served.read({"user": [6, 5], "item": [0, 0]}, [300, 300])
        for text in (b"{", b"[]", b"{}", b'{"format": {}}'):
            tamper(url, "format", lambda _, text=text: text)
            with pytest.raises(StoreError, match=r"hold fm/1 as MemoryFormat.*; received b'"):
                served.read({"user": [6], "item": [0]}, [300])


def tamper(url: str, key: str, damage: Any) -> None:
    server = memory_server._connect(url, writes=True)
    (record,) = server.hmget("fm/1", [key])
    server.hset("fm/1", mapping={key: damage(record)})
    server.close()


def publish_steps(url: str, finished: Path, first: int, last: int) -> None:
    """Give each user one event per step, and publish from a first step on."""
    memory, users = Memory(KILLED), list(range(4000))
    for step in range(1, last):
        memory.write({"user": users}, [1000 * step] * len(users), [float(step)] * len(users))
        if step >= first:
            publish_memory(url, memory, 1000 * step + 1)
            finished.write_text(str(step))


def test_a_killed_writer_leaves_whole_records_and_none_behind(url: str, tmp_path: Path) -> None:
    chance, first, finished = random.Random(0), 1, tmp_path / "finished"
    publish_steps(url, finished, 1, 2)
    with contextlib.closing(ServedMemory(url, "fm")) as served:
        for _ in range(4):
            writer = Forked(publish_steps, url, finished, first, 10**6)
            while int(finished.read_text() or 0) <= first:  # a busy machine takes long
                assert writer.process.is_alive()
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            check_steps(served, 1)  # beside the writer
            writer.kill()
            first = int(finished.read_text() or first)
            first = check_steps(served, first)
    assert first > 1


def check_steps(served: ServedMemory, finished: int) -> int:
    """Return the published step; require each record to be complete, of it or a later one."""
    features = served.read({"user": range(4000)}, [10**9] * 4000)["user"]
    known, counts = served.through_seconds // 1000, features.count
    assert finished <= known <= counts.min()
    np.testing.assert_array_equal(features.lengths, np.minimum(counts, 8))
    np.testing.assert_array_equal(features.last[:, 0], counts)
    np.testing.assert_array_equal(features.mean[:, 0], ((counts + 1) / 2).astype(np.float32))
    newest = features.vectors[np.cumsum(features.lengths) - features.lengths, 0]
    np.testing.assert_array_equal(newest, counts)
    return known


def test_readers_beside_a_writer_see_whole_records(url: str) -> None:
    memory, users, stop = Memory(COUNTS), list(range(3000)), threading.Event()
    memory.write({"user": users}, [0] * 3000, [1.0] * 3000)
    publish_memory(url, memory, 1)
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                through = served.through_seconds  # another thread may put it forward
                features = served.read({"user": users}, [10**6] * 3000)["user"]
                np.testing.assert_array_equal(features.last[:, 0], features.count)
                assert features.count.min() >= through
        except BaseException as error:
            failures.append(error)

    with contextlib.closing(ServedMemory(url, "fm")) as served:  # which both threads share
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for step in range(1, 12):
            memory.write({"user": users}, [step] * 3000, [step + 1.0] * 3000)
            publish_memory(url, memory, step + 1)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert read_counts(url, users, 10**6) == [12] * 3000


@pytest.mark.skipif(BINARY is None, reason="neither redis-server nor valkey-server is installed")
def test_a_server_that_goes_away_and_comes_back() -> None:
    pytest.importorskip("redis")
    server = RedisServer()
    memory = simple({1: 2, 2: 1})
    try:
        assert publish_memory(server.url, memory, 200) == 2
        with contextlib.closing(ServedMemory(server.url, "fm")) as served:
            server.stop()
            with pytest.raises(StoreError, match="should answer; received"):
                served.read({"user": [1]}, [300])
            with pytest.raises(StoreError, match="should answer; received"):
                publish_memory(server.url, memory, 200)
            server.start()  # it has lost all
            with pytest.raises(StoreError, match=r"should hold fm/1 as .*; received None"):
                served.read({"user": [1]}, [300])
            assert publish_memory(server.url, memory, 200) == 2
            assert served.read({"user": [1, 2]}, [300] * 2)["user"].count.tolist() == [2, 1]
            server.stop()
            server.start()  # while no request saw it
            assert publish_memory(server.url, memory, 200) == 2
            assert served.read({"user": [1, 2]}, [300] * 2)["user"].count.tolist() == [2, 1]
    finally:
        server.stop()


def test_a_server_that_does_not_answer_is_given_up() -> None:
    pytest.importorskip("redis")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        secret = f"redis://user:hunter2@127.0.0.1:{port}/0?socket_timeout=0.1"
        with pytest.raises(StoreError, match="should answer; received") as raised:
            ServedMemory(secret, "fm")
    assert "hunter2" not in str(raised.value)


def test_wrong_urls_and_files_are_told(tmp_path: Path) -> None:
    for call in (lambda url: ServedMemory(url, "fm"), lambda url: drop_memory(url, "fm", 1)):
        with pytest.raises(StoreError, match=r"s3://bucket/memory should answer; received unable"):
            call("s3://bucket/memory")
    with pytest.raises(StoreError, match="unable to open database file"):
        ServedMemory(tmp_path / "none.sqlite", "fm")
    assert not (tmp_path / "none.sqlite").exists()
    (tmp_path / "text").write_text("no database " * 1000)
    with pytest.raises(StoreError, match="file is not a database"):
        ServedMemory(tmp_path / "text", "fm")
    with pytest.raises(StoreError, match="should answer; received"):
        publish_memory(tmp_path / "no folder" / "file", simple({1: 1}), 200)


def test_a_path_may_have_what_a_url_escapes(tmp_path: Path) -> None:
    path = tmp_path / "a ?b#c%20d.sqlite"
    publish_memory(path, simple({1: 1}), 200)
    assert path.exists() and read_counts(str(path), [1]) == [1]


def test_without_the_extra_redis_alone_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    path = tmp_path / "memory.sqlite"
    fresh = runpy.run_path(memory_server.__file__)  # imported anew, it does without
    assert fresh["publish_memory"](path, simple({1: 1}), 200) == 1
    with pytest.raises(ModuleNotFoundError, match="redis"):
        ServedMemory("redis://127.0.0.1:1/0", "fm")


def test_needs_are_json(tmp_path: Path) -> None:
    write_needs(tmp_path / "needs.json", [(FORMAT, 3)])
    (need,) = json.loads((tmp_path / "needs.json").read_text())["memories"]
    assert need["version"] == 3 and MemoryFormat(**need["format"]) == FORMAT


def test_the_extra_that_redis_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchrec-exfm\[memory\]'"):
        ServedMemory("redis://127.0.0.1:1/0", "fm")
