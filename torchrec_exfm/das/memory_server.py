"""A teacher memory for serving: records by key on disk or in Redis, read as features in one get.

The job that builds a :class:`~torchrec_exfm.das.memory.Memory` publishes what has changed; a served
student reads the keys of a request. A URL is a path (SQLite) or ``redis://host:port/db``. Under
``NAME/VERSION/`` stands, as JSON, the format and how far the memory knows, written after all
records; under ``NAME/VERSION/KEY/`` and a value (int64, big-endian) its record. Never let Redis
evict them: a record that is not there says that there was no event.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from os import PathLike, fspath, getpid
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_exfm.das.arrays import Ints, as_epoch, as_int
from torchrec_exfm.das.errors import StoreError, check_process
from torchrec_exfm.das.memory import Columns, Memory, MemoryFeatures, MemoryFormat
from torchrec_exfm.das.redaction import redacted, told
from torchrec_exfm.das.schema import check_name

__all__ = ["ServedMemory", "drop_memory", "open_memories", "publish_memory", "write_needs"]

_SKEW_SECONDS = 60  # by which the clocks of publisher and server may differ


def publish_memory(
    url: str | PathLike[str], memory: Memory, before_seconds: int, *, version: int = 1
) -> int:
    """Write the records that have changed since the last publication; return how many.

    All of them where the last one there is not this memory's last: of one that was built anew, or
    for a server that has lost something. One job at a time publishes a version. What a memory built
    anew no longer knows stays until its version is dropped: publish it as a new one.

    Args:
        url: a path, whose file is made, or ``redis://host:port/db``.
        memory: of events of this version of the teacher's encoder.
        before_seconds: events of before this time less the delay are published.
        version: of the memory; others stay beside it.

    Raises:
        ModuleNotFoundError: for Redis, without redis-py.
        ValueError: for a wrong value; if the memory differs in format from what is there.
        StoreError: if the server fails; what was not written is written by the next publication.
    """
    prefix = _prefix(memory.format.name, version)
    with contextlib.closing(_open(url, writes=True)) as server:
        last = server.get([prefix])[0]
        meta = {} if last is None else _parse(last, prefix)
        if meta and meta["format"] != memory.format:
            raise ValueError(
                f"the memory's format should be that of its version {version} there, "
                f"{meta['format']}; received {memory.format}: publish it as another version"
            )
        continues = bool(meta) and meta["publication"] == memory.publication
        written = 0
        for key, values, records in memory.records(before_seconds, unchanged=not continues):
            server.put(dict(zip(_keys(prefix, key, values), records, strict=True)))
            written += len(records)
        publication = uuid.uuid4().hex
        meta = {"through_seconds": memory.through_seconds, "published_seconds": time.time()}
        meta |= {"format": asdict(memory.format), "version": version, "publication": publication}
        server.put({prefix: json.dumps(meta).encode()})
        memory.publication = publication
    return written


def drop_memory(url: str | PathLike[str], name: str, version: int) -> None:
    """Remove a version of a memory; those who read it get a StoreError.

    Raises:
        ModuleNotFoundError: for Redis, without redis-py.
        ValueError: for a wrong value.
        StoreError: if the server fails.
    """
    with contextlib.closing(_open(url, writes=True)) as server:
        server.drop(_prefix(name, version))


class ServedMemory:
    """What was published of a memory, for the features of a served student.

    Features are equal to the bit to those of :meth:`Memory.read` for the events that are published.
    Threads may share it; a process that is forked opens its own.

    Args:
        url: as for :func:`publish_memory`. Redis has 5 seconds to answer, or those of
            ``redis://host:port/db?socket_timeout=0.1``.
        name: the format's.
        version: the one to read, whatever else is published.
        format: that of training, which is then required.

    Attributes:
        format: of the records.
        through_seconds: the time through which the memory knew as of the last read.
        published_seconds: when it was published, by the clock on the wall.

    Raises:
        ModuleNotFoundError: for Redis, without redis-py.
        ValueError: for a wrong value; if the format is not that of training.
        StoreError: if the server fails, or has no such memory.

    Example:
        >>> memory = Memory(MemoryFormat(name="fm", keys=[["user_id"]]))
        >>> memory.write({"user_id": [7, 8, 7]}, [100, 100, 160], [0.5, -2.0, 1.5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     published = publish_memory(f"{folder}/memory", memory, 200)
        ...     served = ServedMemory(f"{folder}/memory", "fm")
        ...     features = served.read({"user_id": [7, 9]}, [260, 260])["user_id"]
        ...     served.close()
        >>> published, features.count.tolist(), features.mean[:, 0].tolist()
        (2, [2, 0], [1.0, nan])
    """

    def __init__(
        self,
        url: str | PathLike[str],
        name: str,
        *,
        version: int = 1,
        format: MemoryFormat | None = None,
    ) -> None:
        self._prefix, self._server = _prefix(name, version), _open(url, writes=False)
        meta = self._take(self._server.get([self._prefix])[0])
        if format is not None and meta["format"] != format:
            raise ValueError(
                f"the format of {name}, version {version}, should be that of training, {format}; "
                f"received {meta['format']}: serve the version that the student was trained with"
            )
        self.format: MemoryFormat = meta["format"]

    def read(self, columns: Columns, seconds: Any) -> dict[str, MemoryFeatures]:
        """Return the features of B examples by key, in one get for all distinct keys.

        What has no record has count 0, and NaN.

        Args:
            columns: of the keys, by name, each whole numbers (B,).
            seconds: (B,) times of the requests, epoch seconds or timestamps.

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape; for examples of before ``through_seconds``.
            StoreError: if the server fails, has lost the memory, or holds damaged records.
        """
        t = as_epoch("seconds", seconds)
        values = self.format.key_values(columns, len(t))
        distinct = {key: np.unique(column, return_inverse=True) for key, column in values.items()}
        keys = [self._prefix]
        for key, (column, _) in distinct.items():
            keys += _keys(self._prefix, key, column)
        last, *records = self._server.get(keys)
        if self._take(last)["format"] != self.format:
            raise StoreError("the memory should keep its format; received another: open it again")
        if len(t) and t.min() < self.through_seconds - _SKEW_SECONDS:
            raise ValueError(
                f"examples should not be older than what the memory knows, "
                f"{self.through_seconds}; received one of {t.min()}, which would be given later "
                "events: replay the past with Memory, or a table of memory_sql"
            )
        features, first = {}, 0
        for key, (column, rows) in distinct.items():
            part = records[first : first + len(column)]
            features[key] = self.format.unpack([part[row] for row in rows.tolist()], t)
            first += len(column)
        return features

    def age_seconds(self, now: float | None = None) -> float:
        """Return how far behind a time (None: the clock's) the memory was at the last read."""
        return (time.time() if now is None else now) - self.through_seconds

    def close(self) -> None:
        """Close the file, or the connections."""
        self._server.close()

    def _take(self, last: bytes | None) -> dict[str, Any]:
        if last is None:
            raise StoreError(
                f"{self._server.url}: should hold the memory {self._prefix.decode()}; received "
                "none: publish it, or serve a version that is there"
            )
        meta = _parse(last, self._prefix)
        self.through_seconds: int = meta["through_seconds"]
        self.published_seconds: float = meta["published_seconds"]
        return meta


def write_needs(path: str | PathLike[str], memories: Sequence[tuple[MemoryFormat, int]]) -> None:
    """Write what a served student reads, (format, version) each, as JSON beside its export."""
    needs = [{"version": version, "format": asdict(format)} for format, version in memories]
    Path(path).write_text(json.dumps({"memories": needs}, indent=1) + "\n")


def open_memories(url: str | PathLike[str], path: str | PathLike[str]) -> dict[str, ServedMemory]:
    """Open the memories of :func:`write_needs` by name; raise as :class:`ServedMemory` does."""
    needs = json.loads(Path(path).read_text())["memories"]
    formats = [(MemoryFormat(**need["format"]), need["version"]) for need in needs]
    return {
        format.name: ServedMemory(url, format.name, version=version, format=format)
        for format, version in formats
    }


def _prefix(name: str, version: int) -> bytes:
    check_name("a memory", name)
    if as_int(version) < 0:
        raise ValueError(f"version should be a whole number from 0; received {version!r}")
    return f"{name}/{as_int(version)}/".encode()


def _keys(prefix: bytes, key: str, values: Ints) -> list[bytes]:
    """Return the key of each value's record."""
    packed, begin = values.astype(">i8").tobytes(), prefix + key.encode() + b"/"
    return [begin + packed[i : i + 8] for i in range(0, len(packed), 8)]


def _parse(text: bytes, prefix: bytes) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads(text)
        numbers = {"through_seconds": int(meta["through_seconds"])}
        numbers["published_seconds"] = float(meta["published_seconds"])
        texts = {"publication": str(meta["publication"])}
        return {**numbers, **texts, "format": MemoryFormat(**meta["format"])}
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"the description of the memory {prefix.decode()} should be JSON; received "
            f"{text[:200]!r}: drop this version and publish it again"
        ) from error


def _open(url: str | PathLike[str], *, writes: bool) -> _SQLite | _Redis:
    """Open what a URL names."""
    text = fspath(url)
    if text.startswith(("redis://", "rediss://")):
        return _Redis(text)
    if "://" in text:
        raise ValueError(
            f"a memory's URL should be a path or redis://host:port/db; received {redacted(text)}"
        )
    return _SQLite(text, writes)


@contextlib.contextmanager
def _telling(url: str, error: type[Exception]) -> Iterator[None]:
    """Raise a server's errors as a StoreError."""
    try:
        yield
    except error as raised:
        text, cause = told(raised, {"url": url} if "://" in url else None)
        raise StoreError(
            f"{redacted(url)}: the memory's server should answer; received {text}: see that it "
            "runs and can be reached, or that the file is there and is a memory"
        ) from cause


class _SQLite:
    """Records in a file. Readers see whole commits, and wait for no writer."""

    def __init__(self, path: str, writes: bool) -> None:
        self.url, self._process, self._lock = path, getpid(), threading.Lock()
        with _telling(path, sqlite3.Error):
            file = f"{Path(path).absolute().as_uri()}?mode={'rwc' if writes else 'ro'}"
            self._connection = sqlite3.connect(
                file, uri=True, timeout=30, isolation_level=None, check_same_thread=False
            )
            if writes:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS memory (key BLOB PRIMARY KEY, record BLOB)"
                )

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return a record for each key, all as of one commit."""
        records: dict[bytes, bytes] = {}
        with self._transaction("BEGIN") as connection:
            for first in range(0, len(keys), 999):  # the parameters that every SQLite takes
                part = keys[first : first + 999]
                marks = ",".join("?" * len(part))
                sql = f"SELECT key, record FROM memory WHERE key IN ({marks})"
                records.update(connection.execute(sql, part))
        return [records.get(key) for key in keys]

    def put(self, items: dict[bytes, bytes]) -> None:
        """Write records in one commit."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            connection.executemany("INSERT OR REPLACE INTO memory VALUES (?, ?)", items.items())

    def drop(self, prefix: bytes) -> None:
        """Remove what begins with a prefix that ends with a slash."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            bounds = prefix, prefix[:-1] + b"0"  # the byte after a slash
            connection.execute("DELETE FROM memory WHERE key >= ? AND key < ?", bounds)

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        check_process(self._process)
        with _telling(self.url, sqlite3.Error), self._lock:
            self._connection.execute(begin)
            with self._connection:  # commits, or rolls back
                yield self._connection


class _Redis:
    """Records in a Redis or Valkey."""

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a memory in Redis needs redis-py, which is not installed: "
                "pip install 'torchrec-exfm[memory]'",
                name="redis",
            ) from error
        self.url, self._error = url, redis.RedisError
        retry = Retry(NoBackoff(), 1)  # a connection of before a restart of the server
        self._redis = redis.Redis.from_url(url, socket_timeout=5, retry=retry)

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return a record for each key, all as of one moment."""
        with _telling(self.url, self._error):
            records: list[bytes | None] = self._redis.mget(keys)
            return records

    def put(self, items: dict[bytes, bytes]) -> None:
        """Write records at once."""
        with _telling(self.url, self._error):
            self._redis.mset(items)

    def drop(self, prefix: bytes) -> None:
        """Remove what begins with a prefix, the memory's description first."""
        with _telling(self.url, self._error):
            self._redis.unlink(prefix)
            for key in self._redis.scan_iter(prefix + b"*", count=1000):
                self._redis.unlink(key)

    def close(self) -> None:
        self._redis.close()
