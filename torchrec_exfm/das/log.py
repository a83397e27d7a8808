"""The log of a table: whether its commits have all their lines, and which of its files has not.

The library takes a commit that was cut after a line for a whole one, and where it can't read a log
it names the table. Here each commit is held against what it says of itself.
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
    """The log in the folder of a table, as far as it has been checked."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        summed_up = [file for file in self._files() if file[1].endswith(".parquet")]
        self._begin = summed_up[-1][0] if summed_up else -1  # the version of the last checkpoint
        self._checked = self._begin
        self._checkpoint = [path for version, path in summed_up if version == self._begin]
        self._added: set[str] | None = set()  # paths, since then; None: a commit was not there

    def check(self, version: int) -> None:
        """Check the commits up to a version that were not checked before."""
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
        """What is wrong with files of the log, each in words that name it."""
        for _, path in self._files():
            if words := self._damage(path):
                yield f"{self._folder.url}/{path}: {words}"

    def _files(self) -> list[tuple[int, str]]:
        """The commits and checkpoints: their versions and paths."""
        self._folder.check_inside(_LOG)
        with store_errors(self._folder.url, "its log can't be listed", self._folder.options):
            infos = self._folder.filesystem.get_file_info(pa_fs.FileSelector(_LOG))
        named = [(re.match(r"(\d{20})(\.json|\..*parquet)$", i.base_name), i) for i in infos]
        return sorted((int(match[1]), f"{_LOG}/{info.base_name}") for match, info in named if match)

    def _damage(self, path: str, *, follow: bool = False) -> str | None:
        """What is wrong with a file, in words; None if nothing is, or it is gone.

        To ``follow`` the commits, in order, is to see that they remove what was there; the rows of
        a checkpoint are not read then.
        """
        self._folder.check_inside(path)
        # what can't be read just now is no damage: that is an error of its own
        with store_errors(f"{self._folder.url}/{path}", "can't be read", self._folder.options):
            try:
                with self._folder.filesystem.open_input_file(path) as source:
                    if path.endswith(".parquet"):
                        return _lost_columns(pq.ParquetFile(source), read=not follow)
                    actions = [
                        json.loads(line) for line in source.read().splitlines() if line.strip()
                    ]
                return _lost_lines(actions) or (self._revived(actions) if follow else None)
            except FileNotFoundError:  # cleaned up since it was listed
                self._added = None if follow else self._added
                return None
            except _DAMAGE as error:
                return f"is not what was written: {' '.join(str(error).split())[:200]}"

    def _revived(self, actions: list[dict[str, Any]]) -> str | None:
        """Whether a commit removes a file that was never there, and so leaves another in."""
        if self._added is None:
            return None
        ours = any("mark" in action.get("commitInfo", {}) for action in actions)
        unknown = {unquote(action["remove"]["path"]) for action in actions if "remove" in action}
        unknown -= self._added
        # others may remove what was removed before
        if ours and unknown and self._added_before is not None:
            unknown -= self._added_before
            if unknown:
                return f"removes {min(unknown)!r}, which was not there: it is damaged"
        self._added.update(unquote(action["add"]["path"]) for action in actions if "add" in action)
        return None

    @functools.cached_property
    def _added_before(self) -> set[str] | None:
        """The paths in the last checkpoint; None if it can't be read any more."""
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
    """What a checkpoint lacks, by whose absence files or transactions would not be known."""
    schema = checkpoint.schema_arrow
    for name, parts in _CHECKPOINT.items():
        kind = schema.field(name).type if name in schema.names else None
        present = [field.name for field in kind] if isinstance(kind, pa.StructType) else []
        if missing := [part for part in parts if part not in present]:
            return f"lacks the column {name}.{missing[0]}: it is no checkpoint"
    if read:
        checkpoint.read()
    return None


def _lost_lines(actions: list[dict[str, Any]]) -> str | None:
    """What a commit lacks of what it says of itself, in words; None for nothing that is known."""
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
    if all("numRecords" in each for each in stats):
        counts["num_added_rows"] = sum(each["numRecords"] for each in stats)
    for name, count in counts.items():
        if str(metrics.get(name) or count) != str(count):  # some write numbers as text
            return f"says {name} of itself is {metrics[name]}, and has {count}: lines were lost"
    noted = info.get("transaction") if "mark" in info else None  # of ours
    if noted is not None and noted not in transactions:
        return f"says it is of the transaction {noted!r}, and has {transactions}: lines were lost"
    return None
