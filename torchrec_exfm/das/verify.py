"""A check of a whole store against every rule, in memory for its largest window."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
from deltalake import Schema
from deltalake.exceptions import DeltaError
from tqdm import tqdm

from torchrec_exfm.checkpoint import read_metadata
from torchrec_exfm.das.arrays import MICROSECONDS, Mask, utc
from torchrec_exfm.das.delta import DataFile, Table
from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.redaction import redacted
from torchrec_exfm.das.rules import Rows, broken_rules, first_few
from torchrec_exfm.das.schema import check_name
from torchrec_exfm.das.snapshots import checkpoint_folder, entries
from torchrec_exfm.das.store import TeacherStore

__all__ = ["ERRORS", "Verification"]

ERRORS = (StoreError, DeltaError, pa.ArrowException, ValueError, OSError)
_BLOCK = 2**22  # ids that are compared at a time, to bound memory


class Verification:
    """A check of a store, at the version it is read, that reports everything that breaks a rule.

    Args:
        store: the store to read.
        say: called with a sentence for each violation, which names the file and the rows.

    Attributes:
        counts: of violations, and of the files, rows, snapshots and checkpoints that were read.
        notes: sentences on what breaks no rule but should be known.
    """

    def __init__(
        self,
        store: TeacherStore,
        say: Callable[[str], object],
    ) -> None:
        self.counts = Counter(files=0, rows=0, snapshots=0, checkpoints=0, violations=0)
        self.notes: list[str] = []
        self._store, self._say = store, say
        self._published: dict[tuple[str, int], int] = {}  # trained through, in seconds
        self._unpublished = defaultdict[str, Counter[int]](Counter)  # rows, by version
        self._attempt(self._check_snapshots)
        self._attempt(self._check_table)
        for teacher, rows in self._unpublished.items():
            text = f"{sum(rows.values())} rows of {teacher} are of versions not published here: "
            self.notes.append(text + first_few(sorted(rows)))

    def _violation(self, text: str) -> None:
        self.counts["violations"] += 1
        text = text if self._store.url in text else f"{self._store.url}: {text}"
        self._say(" ".join(text.split()))

    def _attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function; report its error as a violation, so that the check continues."""
        try:
            return function(*arguments)
        except ERRORS as error:
            self._violation(redacted(str(error), self._store.storage_options))

    def _check_snapshots(self) -> None:
        if (checkpoints := self._store.checkpoints) is None:
            self.notes.append("checkpoints were not checked: their folder was not given")
        self._check_log(self._store.registry)
        for snapshot, name in entries(self._store):
            self.counts["snapshots"] += 1
            self._published[snapshot.teacher, snapshot.version] = snapshot.trained_through_seconds
            if name is not None and checkpoints is not None:
                folder = self._attempt(checkpoint_folder, self._store, snapshot.teacher, name)
                read = folder is not None and self._attempt(read_metadata, folder) is not None
                self.counts["checkpoints"] += read

    def _check_log(self, table: Table) -> None:
        for words in table.log.damaged():
            self._violation(words)

    def _check_table(self) -> None:
        table = self._store.table
        self._check_log(table)
        expected = pa.schema(Schema.from_arrow(self._store.format.schema()))
        if differing := {*pa.schema(table.delta.schema())} ^ {*expected}:
            self._violation(f"{table.url}: not as in the format: {sorted(map(str, differing))}")
        for teacher in self._store.teachers():
            self._attempt(check_name, "a teacher", teacher)
            with tempfile.TemporaryFile() as ids:
                for window in tqdm(self._store.windows(teacher), desc=teacher, disable=None):
                    self._check_window(self._store.files(teacher, window), ids)
                self._check_ids(f"{table.url}/teacher={teacher}", ids)

    def _check_window(self, files: Sequence[DataFile], all_ids: IO[bytes]) -> None:
        """Check a window's files, and their rows against each other; append its ids to all ids."""
        parts = [(file, self._attempt(self._check_file, file)) for file in files]
        parts = [(file, part) for file, part in parts if part is not None]
        rows = Rows.concatenate([part for _, part in parts], len(self._store.tasks))
        order = np.lexsort((rows.scored_at, rows.logged, rows.snapshot, rows.example_id))
        same_id, same_snapshot, same_logged, same_time = (  # as in the row before, in this order
            np.append(False, np.diff(column[order]) == 0)[: len(rows)]
            for column in (rows.example_id, rows.snapshot, rows.logged, rows.event_time)
        )
        ends = np.cumsum([len(part) for _, part in parts])
        repeats = order[same_id & same_snapshot & same_logged]
        for words, bad in (
            ("repeat an output of their snapshot", repeats),
            (
                "have another event time than another row of their example",
                order[same_id & ~same_time],
            ),
        ):
            masks = np.split(np.bincount(bad, minlength=len(rows)) > 0, ends)
            for (file, part), mask in zip(parts, masks, strict=False):
                self._report_rows(file, words, mask, part)
        rows.example_id[order][~same_id].tofile(all_ids)

    def _check_file(self, file: DataFile) -> Rows:
        """Check a file's rows one by one, and return them."""
        store, (teacher, window) = self._store, file.partition
        # read_file leaves out what look-ups do not need: the optional columns are read here
        store.table.read(file, pa.schema([f for f in store.format.schema() if f.nullable]))
        rows = store.read_file(file)
        self.counts.update(files=1, rows=len(rows))
        for words, bad in broken_rules(rows, window, store.format.window_seconds).items():
            self._report_rows(file, words, bad, rows)
        for version in np.unique(rows.snapshot).tolist():
            in_version = rows.snapshot == version
            if (through := self._published.get((teacher, version))) is None:
                self._unpublished[teacher][version] += int(in_version.sum())
            else:
                words = f"contradict that version {version} was trained through {utc(through)}"
                in_version &= rows.trained_through != through * MICROSECONDS
                self._report_rows(file, words, in_version, rows)
        return rows

    def _check_ids(self, where: str, all_ids: IO[bytes]) -> None:
        """Report ids that are in several windows: each window has appended its own once."""
        # an empty file can't be mapped
        ids = np.memmap(all_ids, np.int64, "r+") if all_ids.tell() else np.empty(1, np.int64)
        ids.sort()  # on disk
        # blocks overlap by one id, so that a pair across two of them is seen
        blocks = (ids[start : start + _BLOCK + 1] for start in range(0, len(ids), _BLOCK))
        repeated = np.unique(np.concatenate([b[1:][np.diff(b) == 0] for b in blocks]))
        if len(repeated):
            text = f"{where}: {len(repeated)} ids are in several windows: {first_few(repeated)}"
            self._violation(text)

    def _report_rows(self, file: DataFile, words: str, bad: Mask, rows: Rows) -> None:
        if bad.any():
            at = np.flatnonzero(bad)
            text = f"{self._store.table.url}/{file.path}: {len(at)} of {len(rows)} rows {words}: "
            self._violation(
                f"{text}rows {first_few(at)} (example ids {first_few(rows.example_id[at])})"
            )
