"""A teacher memory for serving: records by key in a file or in Redis, read in one get.

A memory is a hash ``NAME/VERSION``. It holds records under ``KEY/VALUE``, and under ``format``
their format and the time that they go through, as JSON that is written last. As one hash, Redis
evicts all of it or nothing.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from torchrec_exfm.das.arrays import as_seconds
from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.memory import Memory
from torchrec_exfm.das.memory_format import Columns, MemoryFeatures, MemoryFormat
from torchrec_exfm.das.redaction import describe_error, redacted

__all__ = ["ServedMemory", "drop_memory", "open_memories", "publish_memory", "write_needs"]
AnyPath: TypeAlias = "str | Path"


def publish_memory(url: AnyPath, memory: Memory, before_seconds: int, *, version: int = 1) -> int:
    """Publish the records that have changed since the last publication; return how many.

    If the server does not hold the last publication, all records are written. One job publishes a
    version. Keys that the memory forgets stay on the server.

    Args:
        url: path of a SQLite file, which is made if needed, or ``redis://host:port/db``.
        memory: the memory to publish.
        before_seconds: events before this time minus the delay are published.
        version: version of the teacher's encoder; other versions stay beside it.

    Raises:
        ValueError: if the published version goes through a later time.
        StoreError: if the published version has another format; if the server fails, after which
            the next publication writes all records.
    """
    name, written = f"{memory.format.name}/{version}", 0
    through = int(max(before_seconds, memory.through_seconds))
    with _as_store_errors(url), contextlib.closing(_connect(url, writes=True)) as server:
        (text,) = server.hmget(name, ["format"])
        served_through = _parse(url, name, text, memory.format)[1] if text else -1
        if served_through > through:
            raise ValueError(
                f"before_seconds should be at least {served_through}; received {through}: publish "
                "it later"
            )
        unchanged = served_through != memory.published_through
        # Reset first: after a failure the server may lack records that no longer count as changed.
        memory.published_through = None
        for key, values, records in memory.records(through, unchanged=unchanged):
            fields = (f"{key}/{value}" for value in values.tolist())
            server.hset(name, mapping=dict(zip(fields, records, strict=True)))
            written += len(records)
        # Last, so that a publication that was killed leaves the earlier time (or no memory).
        description = json.dumps({"format": asdict(memory.format), "through_seconds": through})
        server.hset(name, mapping={"format": description.encode()})
    memory.published_through = through
    return written


def drop_memory(url: AnyPath, name: str, version: int) -> None:
    """Remove a version of a memory; readers of it then get a StoreError.

    Raises:
        StoreError: if the server fails.
    """
    with _as_store_errors(url), contextlib.closing(_connect(url, writes=True)) as server:
        server.unlink(f"{name}/{version}")


class ServedMemory:
    """A published memory, whose features equal those of :meth:`Memory.read` to the bit.

    Threads and forked processes may share it.

    Args:
        url: as for :func:`publish_memory`; Redis has 5 seconds to answer, or ``?socket_timeout=``.
        name, version: name and version of the memory to read.
        format: the format of training, which the memory should have; None: any.

    Attributes:
        format: format of the records.
        through_seconds: the time before which it holds all events, less the delay; as of the last
            read.

    Raises:
        StoreError: if the server fails, or has no such memory of this format.

    Example:
        >>> import tempfile
        >>> memory = Memory(MemoryFormat(name="fm", keys=[["user_id"]]))
        >>> memory.write({"user_id": [7, 8, 7]}, [100, 100, 160], [0.5, -2.0, 1.5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = publish_memory(f"{folder}/memory", memory, 200)
        ...     served = ServedMemory(f"{folder}/memory", "fm")
        ...     features = served.read({"user_id": [7, 9]}, [260, 260])["user_id"]
        >>> written, features.count.tolist(), features.mean[:, 0].tolist()
        (2, [2, 0], [1.0, nan])
    """

    def __init__(
        self, url: AnyPath, name: str, *, version: int = 1, format: MemoryFormat | None = None
    ) -> None:
        self._url, self._name = url, f"{name}/{version}"
        with _as_store_errors(url):
            self._server = _connect(url, writes=False)
            (text,) = self._server.hmget(self._name, ["format"])
        self.format, self.through_seconds = _parse(url, self._name, text, format)

    def read(self, columns: Columns, seconds: Any) -> dict[str, MemoryFeatures]:
        """Return features as :meth:`Memory.read` does, in one get; keys without a record: count 0.

        Raises:
            ValueError: for examples before ``through_seconds``, and as :meth:`Memory.read`.
            StoreError: if the server fails, has lost the memory, or holds damaged records.
        """
        t = as_seconds("seconds", seconds)
        keys = self.format.key_values(columns, len(t))
        fields = {key: [f"{key}/{value}" for value in keys[key].tolist()] for key in keys}
        # The description is read in the same get: without it the memory was dropped or evicted.
        names = ["format", *{field for part in fields.values() for field in part}]
        with _as_store_errors(self._url):
            records = dict(zip(names, self._server.hmget(self._name, names), strict=True))
        _, self.through_seconds = _parse(self._url, self._name, records["format"], self.format)
        if len(t) and t.min() < self.through_seconds - 60:  # clocks may differ by a minute
            raise ValueError(
                f"examples should be of {self.through_seconds} or later; received one of {t.min()}"
                ": replay the past with Memory"
            )
        return {key: self.format.unpack([records[f] for f in fields[key]], t) for key in keys}

    def close(self) -> None:
        """Close the file or the connections."""
        self._server.close()


def write_needs(path: AnyPath, memories: Sequence[tuple[MemoryFormat, int]]) -> None:
    """Write the memories that a served student reads, (format, version) each, as a JSON file."""
    needs = [{"version": version, "format": asdict(format)} for format, version in memories]
    Path(path).write_text(json.dumps({"memories": needs}, indent=1) + "\n")


def open_memories(url: AnyPath, path: AnyPath) -> dict[str, ServedMemory]:
    """Open the memories in a file of :func:`write_needs`, by name.

    Raises:
        StoreError: as :class:`ServedMemory`.
    """
    needs = json.loads(Path(path).read_text())["memories"]
    memories = [(MemoryFormat(**need["format"]), need["version"]) for need in needs]
    return {m.name: ServedMemory(url, m.name, version=v, format=m) for m, v in memories}


def _parse(url: AnyPath, name: str, text: bytes | None, expected: Any) -> tuple[MemoryFormat, int]:
    """Return a memory's format and its time; raise unless it is of the ``expected`` format."""
    # A description that is missing or damaged raises here; the error below shows it.
    with contextlib.suppress(ValueError, TypeError, KeyError):
        description = json.loads(text or b"")
        if (format := MemoryFormat(**description["format"])) == (expected or format):
            return format, description["through_seconds"]
    raise StoreError(
        f"{redacted(str(url))} should hold {name} as {expected or 'a memory'}; received {text!r}: "
        "publish it, as another version if its format differs, or serve the version of training"
    )


def _connect(url: AnyPath, *, writes: bool) -> Any:
    """Return a client of redis-py, or a file with the methods of such a client used here."""
    if not str(url).startswith(("redis://", "rediss://")):
        return _File(url, writes)
    try:
        from redis import Redis
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a memory in Redis needs redis-py, which is not installed: "
            "pip install 'torchrec-exfm[memory]'",
            name="redis",
        ) from error
    return Redis.from_url(str(url), socket_timeout=5)


@contextlib.contextmanager
def _as_store_errors(url: AnyPath) -> Iterator[None]:
    """Raise errors of SQLite and redis-py as a StoreError, without credentials."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("sqlite3", "redis"):
            raise
        text, cause = describe_error(error, {"url": str(url)} if "://" in str(url) else None)
        raise StoreError(
            f"{redacted(str(url))} should answer; received {text}: check the server or the file"
        ) from cause


class _File:
    """Hashes in a SQLite file.

    Each call opens the file, so that threads and forked processes may share this object.
    """

    def __init__(self, path: AnyPath, writes: bool) -> None:
        self._uri = f"{Path(path).absolute().as_uri()}?mode={'rwc' if writes else 'ro'}"
        if writes:
            self._run("PRAGMA journal_mode = WAL")  # so that readers don't wait for a publication
            self._run("CREATE TABLE IF NOT EXISTS hash (name, key, data, PRIMARY KEY (name, key))")

    def _run(self, sql: str, *rows: Sequence[Any]) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self._uri, 30, uri=True)) as file, file:  # commits
            return [result for row in rows or [()] for result in file.execute(sql, row)]

    def hmget(self, name: str, keys: list[str]) -> list[bytes | None]:
        sql = "SELECT key, data FROM hash WHERE name=? AND key IN (SELECT value FROM json_each(?))"
        return [*map(dict(self._run(sql, (name, json.dumps(keys)))).get, keys)]

    def hset(self, name: str, mapping: dict[str, bytes]) -> None:
        self._run("REPLACE INTO hash VALUES (?, ?, ?)", *((name, *row) for row in mapping.items()))

    def unlink(self, name: str) -> None:
        self._run("DELETE FROM hash WHERE name = ?", (name,))

    def close(self) -> None: ...
