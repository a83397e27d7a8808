"""A teacher memory for serving: records by key on disk or in Redis, read as features in one get.

The job that builds a :class:`~torchrec_exfm.das.memory.Memory` publishes what has changed; a served
student reads the keys of a request. A URL is a path (SQLite) or ``redis://host:port/db``. Under
``NAME/VERSION/`` stands, as JSON, the format and how far the memory knows, written after all
records; under ``NAME/VERSION/KEY/`` and a value (int64, big-endian) its record. Never let Redis
evict them: a record that is not there says that there was no event.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from torchrec_exfm.das.arrays import Ints, as_epoch, as_int
from torchrec_exfm.das.errors import StoreError, check_process
from torchrec_exfm.das.memory import Columns, Memory, MemoryFeatures, MemoryFormat
from torchrec_exfm.das.redaction import redacted, told
from torchrec_exfm.das.schema import check_name

__all__ = ["ServedMemory", "drop_memory", "open_memories", "publish_memory", "write_needs"]

AnyPath: TypeAlias = "str | os.PathLike[str]"
_SKEW_SECONDS = 60  # by which the clocks of publisher and server may differ
_MOST_PARAMETERS = 999  # of a statement, in an SQLite of before 3.32


def publish_memory(url: AnyPath, memory: Memory, before_seconds: int, *, version: int = 1) -> int:
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
        ValueError: for a wrong value; if the memory differs in format from what is there, or
            knows less.
        StoreError: if the server fails; what was not written is written by the next publication.
    """
    prefix, written, publication = _prefix(memory.format.name, version), 0, uuid.uuid4().hex
    with _telling(url), contextlib.closing(_open(url, writes=True)) as server:
        text = server.get([prefix])[0]
        last = None if text is None else _parse(prefix, text)
        if last and last["format"] != memory.format:
            raise ValueError(
                f"the memory's format should be that of its version {version} there, "
                f"{last['format']}; received {memory.format}: publish it as another version"
            )
        if last and last["through_seconds"] > max(before_seconds, memory.through_seconds):
            raise ValueError(
                f"before_seconds should be at least {last['through_seconds']}, through which this "
                f"version is published; received {before_seconds}: publish later, or as another "
                "version"
            )
        is_next = last is not None and last["publication"] == memory.publication
        for key, values, records in memory.records(before_seconds, unchanged=not is_next):
            server.put(dict(zip(_keys(prefix, key, values), records, strict=True)))
            written += len(records)
        meta = {
            "format": asdict(memory.format),
            "through_seconds": memory.through_seconds,
            "published_seconds": time.time(),
            "publication": publication,
        }
        server.put({prefix: json.dumps(meta).encode()})  # the last, so never ahead of records
    memory.publication = publication
    return written


def drop_memory(url: AnyPath, name: str, version: int) -> None:
    """Remove a version of a memory; those who read it get a StoreError.

    Raises:
        ModuleNotFoundError: for Redis, without redis-py.
        ValueError: for a wrong value.
        StoreError: if the server fails.
    """
    with _telling(url), contextlib.closing(_open(url, writes=True)) as server:
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
        format: that of training, which the memory should then have; None: any.

    Attributes:
        format: of the records.
        through_seconds: the time before which the memory knew all, as of the last read.
        published_seconds: when it was published, by the clock on the wall.

    Raises:
        ModuleNotFoundError: for Redis, without redis-py.
        ValueError: for a wrong value; if the format is not that of training.
        StoreError: if the server fails, or has no such memory.

    Example:
        >>> memory = Memory(MemoryFormat(name="fm", keys=[["user_id"]]))
        >>> memory.write({"user_id": [7, 8, 7]}, [100, 100, 160], [0.5, -2.0, 1.5])
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     published = publish_memory(f"{folder}/memory", memory, 200)
        ...     served = ServedMemory(f"{folder}/memory", "fm")
        ...     features = served.read({"user_id": [7, 9]}, [260, 260])["user_id"]
        ...     served.close()
        >>> published, features.count.tolist(), features.mean[:, 0].tolist()
        (2, [2, 0], [1.0, nan])
    """

    def __init__(
        self, url: AnyPath, name: str, *, version: int = 1, format: MemoryFormat | None = None
    ) -> None:
        self._url, self._prefix = url, _prefix(name, version)
        with _telling(url):
            self._server = _open(url, writes=False)
            self.format = self._note(self._server.get([self._prefix])[0])
        if self.format != (format or self.format):
            raise ValueError(
                f"the format of {name}, version {version}, should be that of training, {format}; "
                f"received {self.format}: serve the version that the student was trained with"
            )

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
        keys = [_keys(self._prefix, key, column) for key, (column, _) in distinct.items()]
        with _telling(self._url):
            meta, *flat = self._server.get([self._prefix, *itertools.chain(*keys)])
        if self._note(meta) != self.format:
            raise StoreError(
                f"the memory's format should stay {self.format}; received another: open it again"
            )
        if len(t) and t.min() < self.through_seconds - _SKEW_SECONDS:
            raise ValueError(
                f"examples should not be of before {self.through_seconds}, through which the memory"
                f" knows; received one of {t.min()}, which would be given later events: replay the "
                "past with Memory, or a table of memory_sql"
            )
        features, rest = {}, iter(flat)
        for key, (column, rows) in distinct.items():
            records = list(itertools.islice(rest, len(column)))
            features[key] = self.format.unpack([records[row] for row in rows.tolist()], t)
        return features

    def age_seconds(self, now: float | None = None) -> float:
        """Return how far behind a time (None: the clock's) the memory was at the last read."""
        return (time.time() if now is None else now) - self.through_seconds

    def close(self) -> None:
        """Close the file, or the connections."""
        self._server.close()

    def _note(self, text: bytes | None) -> MemoryFormat:
        """Take how far the memory knows, and return its format."""
        if text is None:
            raise StoreError(
                f"{redacted(os.fspath(self._url))} should hold the memory {self._prefix.decode()}; "
                "received none: publish it, or open a version that is there"
            )
        meta = _parse(self._prefix, text)
        self.through_seconds: int = meta["through_seconds"]
        self.published_seconds: float = meta["published_seconds"]
        return cast(MemoryFormat, meta["format"])


def write_needs(path: AnyPath, memories: Sequence[tuple[MemoryFormat, int]]) -> None:
    """Write what a served student reads, (format, version) each, as JSON beside its export."""
    needs = [{"version": version, "format": asdict(format)} for format, version in memories]
    Path(path).write_text(json.dumps({"memories": needs}, indent=1) + "\n")


def open_memories(url: AnyPath, path: AnyPath) -> dict[str, ServedMemory]:
    """Open the memories of :func:`write_needs` by name; raise as :class:`ServedMemory` does."""
    memories = {}
    for need in json.loads(Path(path).read_text())["memories"]:
        format, version = MemoryFormat(**need["format"]), need["version"]
        memories[format.name] = ServedMemory(url, format.name, version=version, format=format)
    return memories


def _prefix(name: str, version: int) -> bytes:
    """Return what the keys of a memory begin with."""
    check_name("a memory", name)
    if as_int(version) < 0:
        raise ValueError(f"version should be a whole number from 0; received {version!r}")
    return f"{name}/{version}/".encode()


def _keys(prefix: bytes, key: str, values: Ints) -> list[bytes]:
    """Return the keys of values' records."""
    packed, start = values.astype(">i8").tobytes(), prefix + key.encode() + b"/"
    return [start + packed[i : i + 8] for i in range(0, len(packed), 8)]


def _parse(prefix: bytes, text: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(text)
        names = ("through_seconds", "published_seconds", "publication")
        return {name: meta[name] for name in names} | {"format": MemoryFormat(**meta["format"])}
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"the description of the memory {prefix.decode()} should be JSON with its format; "
            f"received {text[:200]!r}: drop this version, and publish it again"
        ) from error


def _open(url: AnyPath, *, writes: bool) -> _SQLite | _Redis:
    text = os.fspath(url)
    if text.startswith(("redis://", "rediss://")):
        return _Redis(text)
    if "://" in text:
        raise ValueError(
            f"a memory's URL should be a path or redis://host:port/db; received {redacted(text)}"
        )
    return _SQLite(text, writes)


@contextlib.contextmanager
def _telling(url: AnyPath) -> Iterator[None]:
    """Raise the libraries' errors as a StoreError."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("sqlite3", "redis"):
            raise
        name = os.fspath(url)
        text, cause = told(error, {"url": name} if "://" in name else None)
        raise StoreError(
            f"{redacted(name)} should answer with the memory; received {text}: see that the server "
            "runs and can be reached, or that the file is a memory's and can be read"
        ) from cause


class _SQLite:
    """Records in a file: readers see whole commits, and wait for no writer."""

    def __init__(self, path: str, writes: bool) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        file = f"{Path(path).absolute().as_uri()}?mode={'rwc' if writes else 'ro'}"
        self._connection = sqlite3.connect(
            file, uri=True, timeout=30, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA cache_size = -65536")  # KiB
        if writes:
            self._connection.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
                "CREATE TABLE IF NOT EXISTS memory (key BLOB PRIMARY KEY, record BLOB)"
            )

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return a record for each key, all as of one commit."""
        records: dict[bytes, bytes] = {}
        with self._transaction("BEGIN") as connection:
            for first in range(0, len(keys), _MOST_PARAMETERS):
                part = keys[first : first + _MOST_PARAMETERS]
                marks = ",".join("?" * len(part))
                sql = f"SELECT key, record FROM memory WHERE key IN ({marks})"
                records.update(connection.execute(sql, part))
        return [records.get(key) for key in keys]

    def put(self, records: dict[bytes, bytes]) -> None:
        """Write records in one commit."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            connection.executemany("INSERT OR REPLACE INTO memory VALUES (?, ?)", records.items())

    def drop(self, prefix: bytes) -> None:
        """Remove all below a prefix, which ends with a slash."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            bounds = prefix, prefix[:-1] + b"0"  # the byte after a slash
            connection.execute("DELETE FROM memory WHERE key >= ? AND key < ?", bounds)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        check_process(self._process)
        with self._lock:
            self._connection.execute(begin)
            with self._connection:  # commits, or rolls back
                yield self._connection


class _Redis:
    """Records in a Redis or Valkey: each get and put is of one moment."""

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
        retry = Retry(NoBackoff(), 1)  # for connections of before a restart of the server
        self._client = redis.Redis.from_url(url, socket_timeout=5, retry=retry)

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return a record for each key."""
        return cast("list[bytes | None]", self._client.mget(keys))

    def put(self, records: dict[bytes, bytes]) -> None:
        """Write records."""
        self._client.mset(records)

    def drop(self, prefix: bytes) -> None:
        """Remove all below a prefix, the description of the memory first."""
        self._client.unlink(prefix)
        keys = self._client.scan_iter(prefix + b"*", count=1000)
        while part := list(itertools.islice(keys, 1000)):
            self._client.unlink(*part)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
