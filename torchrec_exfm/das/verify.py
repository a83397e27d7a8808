"""Whether a store keeps to every rule: all of its files, rows and checkpoints are looked at.

A window at a time: memory depends on the largest window, not on the store. n rows.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from torchrec_exfm.das.arrays import MICROSECONDS, Ints, Mask, utc
from torchrec_exfm.das.checkpoint import _read_metadata
from torchrec_exfm.das.delta import DataFile, StoreError
from torchrec_exfm.das.rules import Rows, broken_rules
from torchrec_exfm.das.schema import PARTITION, check_name
from torchrec_exfm.das.snapshots import _folder, _registry, _rows
from torchrec_exfm.das.store import TeacherStore

__all__ = ["Verification"]

_BLOCK = 2**22  # of ids that are compared at once


class Verification:
    """Reads a store, as of the version it is at, and tells of everything that breaks a rule.

    Args:
        store: what to read.
        say: called with a sentence for each violation, which names the file and the rows.
        checkpoints: as for :func:`~torchrec_exfm.das.load_snapshot`.

    Attributes:
        counts: of violations, and of the files, rows, snapshots and checkpoints that were read.
        notes: sentences on what is no violation, but should be known.
    """

    def __init__(
        self, store: TeacherStore, say: Callable[[str], object], checkpoints: Path | None = None
    ) -> None:
        self.counts = dict.fromkeys(("files", "rows", "snapshots", "checkpoints", "violations"), 0)
        self.notes: list[str] = []
        self._store = store
        self._say = say
        self._published: dict[tuple[str, int], int] = {}  # trained through, in microseconds
        self._unpublished = Counter[tuple[str, int]]()
        self._attempt(self._check_snapshots, checkpoints)
        self._attempt(self._check_table)
        for (teacher, version), rows in sorted(self._unpublished.items()):
            self.notes.append(f"{rows} rows are of {teacher} version {version}, not published here")

    def _violation(self, text: str) -> None:
        self.counts["violations"] += 1
        where = "" if self._store.url in text else f"{self._store.url}: "
        self._say(where + " ".join(text.split()))

    def _attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (StoreError, ValueError, OSError) as error:
            self._violation(str(error))

    def _check_snapshots(self, checkpoints: Path | None) -> None:
        for snapshot, name in _rows(_registry(self._store)):
            self.counts["snapshots"] += 1
            through = snapshot.trained_through_seconds * MICROSECONDS
            if self._published.setdefault((snapshot.teacher, snapshot.version), through) != through:
                self._violation(f"{snapshot}, was also published as trained through another time")
            if name is not None and not re.fullmatch(r"[0-9]+-[0-9a-f]+", name):
                self._violation(f"the checkpoint {name!r} of {snapshot}, has no safe name")
            elif name is not None and checkpoints is None and "://" in self._store.url:
                self.notes.append(f"the checkpoint of {snapshot}, was not looked for")
            elif name is not None:
                folder = _folder(self._store, checkpoints) / snapshot.teacher / name
                self.counts["checkpoints"] += self._attempt(_read_metadata, folder) is not None

    def _check_table(self) -> None:
        table, wanted = self._store.table, self._store.format.schema()
        if differing := {*pa.schema(table.delta.schema())} ^ {*wanted}:
            self._violation(f"{table.url}: not as in the format: {sorted(map(str, differing))}")
        if tuple(table.delta.metadata().partition_columns) != PARTITION:
            raise StoreError(f"{table.url}: is not partitioned by {PARTITION}: its rows are unread")
        for teacher in self._store.teachers():
            self._attempt(check_name, "a teacher", teacher)
            windows = self._store.windows(teacher)
            with tempfile.TemporaryFile() as ids:
                for window in tqdm(windows, desc=teacher, unit="window", disable=None):
                    self._check_window(self._store.files(teacher, window), ids)
                self._check_ids(f"{table.url}/teacher={teacher}", ids)

    def _check_window(self, files: Sequence[DataFile], all_ids: IO[bytes]) -> None:
        """Check files, and their rows with each other; adds their ids, each once, to all."""
        found = [(file, self._attempt(self._check_file, file)) for file in files]
        read = [(file, part) for file, part in found if part is not None]
        rows = Rows.concatenate([part for _, part in read], len(self._store.tasks))
        order = np.lexsort((rows.scored_at, rows.logged, rows.snapshot, rows.example_id))
        id_, snapshot, logged, time = (  # as in the row before
            np.append(False, np.diff(column[order]) == 0)[: len(rows)]
            for column in (rows.example_id, rows.snapshot, rows.logged, rows.event_time)
        )
        ends = np.cumsum([len(part) for _, part in read])
        for words, bad in (
            ("repeat an output of their snapshot", order[id_ & snapshot & logged]),
            ("have another event time than another row of their example", order[id_ & ~time]),
        ):
            masks = np.split(np.bincount(bad, minlength=len(rows)) > 0, ends)
            for (file, part), mask in zip(read, masks, strict=False):
                self._bad_rows(file, words, mask, part)
        rows.example_id[order][~id_].tofile(all_ids)

    def _check_file(self, file: DataFile) -> Rows:
        store, (teacher, window) = self._store, file.partition
        store.table.read(file, pa.schema([f for f in store.format.schema() if f.nullable]))
        rows = store._rows_of(file)
        self.counts["files"] += 1
        self.counts["rows"] += len(rows)
        if file.rows not in (None, len(rows)):
            where = f"{store.table.url}/{file.path}"
            self._violation(f"{where}: holds {len(rows)} rows, and the log says {file.rows}")
        for words, bad in broken_rules(rows, window, store.format.window_seconds):
            self._bad_rows(file, words, bad, rows)
        for version in np.unique(rows.snapshot).tolist():
            of_version = rows.snapshot == version
            through = self._published.get((teacher, version))
            if through is None:
                self._unpublished[teacher, version] += int(of_version.sum())
            else:
                words = f"deny that version {version} was trained through {utc(through / 1e6)}"
                self._bad_rows(file, words, of_version & (rows.trained_through != through), rows)
        return rows

    def _check_ids(self, where: str, all_ids: IO[bytes]) -> None:
        if all_ids.tell():
            ids = np.memmap(all_ids, dtype=np.int64, mode="r+")  # sorted on disk
            ids.sort()
            blocks = (ids[start : start + _BLOCK + 1] for start in range(0, len(ids), _BLOCK))
            again = np.unique(np.concatenate([b[1:][np.diff(b) == 0] for b in blocks]))
            if len(again):
                self._violation(f"{where}: {len(again)} ids are in several windows: {_some(again)}")

    def _bad_rows(self, file: DataFile, words: str, bad: Mask, rows: Rows) -> None:
        if bad.any():
            at = np.flatnonzero(bad)
            where = f"{self._store.table.url}/{file.path}: {len(at)} of {len(rows)} rows"
            ids = _some(rows.example_id[at])
            self._violation(f"{where} {words}: rows {_some(at)} (example ids {ids})")


def _some(values: Ints) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
