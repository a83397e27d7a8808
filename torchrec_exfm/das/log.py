"""Checks of a table's log: that its commits are complete, and which of its files is damaged.

The library accepts a commit that was cut off after a line, and where it can't read a log it names
the table only. Here each commit is compared with the counts in its own summary.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from deltalake import DeltaTable

from torchrec_exfm.das.errors import StoreError, store_errors
from torchrec_exfm.das.folder import Folder

_LOG = "_delta_log"
_CHECKPOINT = {"add": ("path", "partitionValues", "size"), "txn": ("appId", "version")}
_OURS = (
    "shard/",
    "scored/",
    "write/",
    "watermark/",
    "snapshot/",
    "removed",
)  # names of the package's transactions
_DAMAGE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Log:
    """The log of a table, which remembers how far it has been checked."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        # the library starts from the last checkpoint, and does not read the commits before it
        checkpoints = [file for file in self._files() if file[1].endswith(".parquet")]
        self._begin = checkpoints[-1][0] if checkpoints else -1
        self._checked = self._begin
        self._checkpoint = [path for version, path in checkpoints if version == self._begin]
        self._added: set[str] | None = set()  # paths since then; None: a commit was missing

    def check(self, version: int) -> None:
        """Raise a StoreError for a damaged commit up to a version; each is checked once."""
        while self._checkpoint:
            self._check_file(self._checkpoint[0])
            del self._checkpoint[0]
        for number in range(self._checked + 1, version + 1):
            self._check_file(f"{_LOG}/{number:020}.json")
            self._checked = number

    def _check_file(self, path: str) -> None:
        if words := self._damage(path, follow=True):
            raise StoreError(f"{self._folder.url}/{path}: {words}; restore it from a copy")

    def damaged(self) -> Iterator[str]:
        """Yield a message for each damaged file of the log."""
        for _, path in self._files():
            if words := self._damage(path):
                yield f"{self._folder.url}/{path}: {words}"

    def _files(self) -> list[tuple[int, str]]:
        """Return versions and paths of the commits and checkpoints, in order."""
        self._folder.check_inside(_LOG)
        with store_errors(self._folder.url, "its log can't be listed", self._folder.options):
            infos = self._folder.filesystem.get_file_info(pa_fs.FileSelector(_LOG))
        named = [(re.match(r"(\d{20})(\.json|\..*parquet)$", i.base_name), i) for i in infos]
        return sorted((int(match[1]), f"{_LOG}/{info.base_name}") for match, info in named if match)

    def _damage(self, path: str, *, follow: bool = False) -> str | None:
        """Return what is wrong with a file, in words; None if nothing is, or it was cleaned up.

        With ``follow``, commits come in order, and a commit must not remove unknown files; the
        rows of a checkpoint are not read then.
        """
        self._folder.check_inside(path)
        # a file that can't be read at the moment is not damaged: that raises
        with store_errors(f"{self._folder.url}/{path}", "can't be read", self._folder.options):
            try:
                with self._folder.filesystem.open_input_file(path) as source:
                    if path.endswith(".parquet"):
                        return _lost_columns(pq.ParquetFile(source), read=not follow)
                    actions = [
                        json.loads(line) for line in source.read().splitlines() if line.strip()
                    ]
                return _lost_lines(actions) or (self._bad_removal(actions) if follow else None)
            except FileNotFoundError:  # cleaned up since it was listed
                self._added = None if follow else self._added
                return None
            except _DAMAGE as error:
                return f"is not what was written: {' '.join(str(error).split())[:200]}"

    def _bad_removal(self, actions: list[dict[str, Any]]) -> str | None:
        """Return how a commit removes an unknown file, in words; record the files it adds.

        Where a path in it is damaged, the file that was meant stays in the table, and its rows,
        which were deleted or compacted, are read again.
        """
        if self._added is None:
            return None
        ours = any("mark" in action.get("commitInfo", {}) for action in actions)
        unknown = {unquote(action["remove"]["path"]) for action in actions if "remove" in action}
        unknown -= self._added
        # only of our own commits: other tools may remove a file twice
        if ours and unknown and self._added_before is not None:
            unknown -= self._added_before
            if unknown:
                return f"removes {min(unknown)!r}, which was not there: it is damaged"
        self._added.update(unquote(action["add"]["path"]) for action in actions if "add" in action)
        return None

    @functools.cached_property
    def _added_before(self) -> set[str] | None:
        """The paths in the last checkpoint; None if it can no longer be read."""
        if self._begin < 0:
            return set()
        try:
            url, options = self._folder.url, self._folder.options
            with store_errors(url, "can't be read", options):
                table = DeltaTable(url, self._begin, storage_options=options)
                paths = pa.table(table.get_add_actions())["path"].to_pylist()
        except StoreError:
            return None
        return {unquote(path) for path in paths}


def _lost_columns(checkpoint: pq.ParquetFile, *, read: bool) -> str | None:
    """Return which column a checkpoint lacks: without it, files or transactions would be lost."""
    schema = checkpoint.schema_arrow
    for name, parts in _CHECKPOINT.items():
        kind = schema.field(name).type if name in schema.names else None
        present = [field.name for field in kind] if isinstance(kind, pa.StructType) else []
        if missing := [part for part in parts if part not in present]:
            return f"lacks the column {name}.{missing[0]}: it is no checkpoint"
    if read:
        checkpoint.read()  # raises where pages are damaged
    return None


def _lost_lines(actions: list[dict[str, Any]]) -> str | None:
    """Return how a commit contradicts its own summary, in words; None if it does not."""
    if not actions:
        return "is an empty commit: its lines were lost"
    transactions = [f"{a['txn']['appId']}={a['txn']['version']}" for a in actions if "txn" in a]
    infos = [action["commitInfo"] for action in actions if "commitInfo" in action]
    info: dict[str, Any] = infos[0] if infos else {}
    if not infos and any(name.startswith(_OURS) for name in transactions):
        return "lacks its own summary: lines were lost"
    metrics = info.get("operationMetrics") or {}
    adds = [action["add"] for action in actions if "add" in action]
    removes = sum("remove" in action for action in actions)
    counts = {
        "num_added_files": len(adds),
        "numFilesAdded": len(adds),
        "num_removed_files": removes,
        "numFilesRemoved": removes,
    }
    stats = [json.loads(add.get("stats") or "{}") for add in adds]
    if all("numRecords" in statistics for statistics in stats):
        counts["num_added_rows"] = sum(statistics["numRecords"] for statistics in stats)
    for name, count in counts.items():
        if str(metrics.get(name) or count) != str(count):  # some write numbers as text
            return f"states {name} = {metrics[name]}, and has {count}: lines were lost"
    noted = info.get("transaction") if "mark" in info else None  # only our commits have marks
    if noted is not None and noted not in transactions:
        return f"states the transaction {noted!r}, and has {transactions}: lines were lost"
    return None
