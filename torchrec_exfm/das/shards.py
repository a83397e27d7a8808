"""Named shards: what a snapshot's shard was written with, and what of it is still stored."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from torchrec_exfm.das.arrays import Floats, Mask
from torchrec_exfm.das.delta import DataFile
from torchrec_exfm.das.index import mix
from torchrec_exfm.das.rules import Rows
from torchrec_exfm.das.schema import Snapshot


@dataclass(frozen=True)
class NamedRows:
    """Rows of a snapshot that are written under a shard's name; None stands for a unique name.

    The log keeps a number for each name: how many rows were offered, and a digest of them. The
    digest covers ids, event times, whether the rows were logged, and what the snapshot was trained
    through, in any order of rows. Outputs may differ by rounding, so they are compared with the
    stored ones instead. Keys and embeddings are not compared.
    """

    url: str
    snapshot: Snapshot
    name: str | None
    offered: Rows

    def transaction(self) -> tuple[str, int]:
        """Return the name in the log, and the number that stands for the rows."""
        if self.name is None:
            return f"write/{uuid.uuid4().hex}", 0
        rows = self.offered
        # a sum, as a shard that is scored again may give its rows in another order
        times = mix(2 * rows.event_time + rows.logged) + mix(rows.trained_through)
        digest = mix(rows.example_id + times.view(np.int64)).sum()
        number = (len(rows) & (2**31 - 1)) << 32 | int(digest) >> 32
        return transaction_name(self.snapshot, self.name), number

    def may_be_stored(
        self, last: int, number: int, files: Sequence[DataFile], read: Callable[[DataFile], Rows]
    ) -> bool:
        """Return whether rows of this name may be in the files.

        Args:
            last: the number in the log, of the last write under this name.
            number: the number of these rows.
            files: the data files of the table.
            read: reads a data file.

        Raises:
            ValueError: if the numbers differ while rows of the snapshot are stored.
        """
        if last == number:
            return True
        version = self.snapshot.version
        candidates = (file for file in files if self._may_be_in(file))
        if not any((read(file).snapshot == version).any() for file in candidates):
            return False  # the snapshot was forgotten: its names are free again
        raise ValueError(
            f"{self.url}: nothing was written: {self.name!r}, a shard of {self.snapshot}, should "
            f"have the rows it was written with, {_summary(last)}; received {_summary(number)}: "
            "give other rows another name, or publish their teacher as another version"
        )

    def _may_be_in(self, file: DataFile) -> bool:
        """Return whether the file may hold rows of the snapshot, without reading it."""
        version = self.snapshot.version
        lowest, highest = file.snapshots or (version, version)
        return file.partition[0] == self.snapshot.teacher and lowest <= version <= highest

    def find(self, rows: Rows, stored: Rows, alike: Callable[[Floats, Floats], Mask]) -> Mask:
        """Return the mask (n,) of rows that are stored; a ValueError where their outputs differ.

        ``alike`` says which outputs are equal up to rounding.
        """
        logged = bool(len(rows) and rows.logged[0])
        stored = stored[(stored.snapshot == self.snapshot.version) & (stored.logged == logged)]
        if not len(stored) or not len(rows):
            return np.zeros(len(rows), dtype=np.bool_)
        order = np.argsort(rows.example_id)
        at = np.searchsorted(rows.example_id[order], stored.example_id).clip(max=len(order) - 1)
        at = order[at]
        offered = rows.example_id[at] == stored.example_id
        stored, at = stored[offered], at[offered]
        same = alike(stored.outputs, rows.outputs[at]).all(axis=1)
        matched, has_stored = np.zeros((2, len(rows)), dtype=np.bool_)
        has_stored[at] = True
        # of two stored rows one may match: another shard may hold other outputs of the example
        matched[at[same]] = True
        differ = has_stored & ~matched
        if differ.any():
            first = np.flatnonzero(differ)[0]
            before, received = stored.outputs[at == first][0], rows.outputs[first]
            raise ValueError(
                f"{self.url}: nothing was written: {self.name!r}, a shard of {self.snapshot}, "
                f"should have the outputs it was written with; received others for {differ.sum()} "
                f"of {len(rows)} examples: of example {rows.example_id[first]} {before.tolist()} "
                f"are stored, and {received.tolist()} were offered: publish their teacher as "
                "another version, or forget this version first"
            )
        return matched


def transaction_name(snapshot: Snapshot, shard: str) -> str:
    """Return the name in the log for a shard of a snapshot."""
    return f"shard/{snapshot.teacher}/{snapshot.version}/{shard}"


def _summary(number: int) -> str:
    """Return in words what a shard's number says of its rows."""
    return f"{number >> 32} of the digest {number & (2**32 - 1):08x}"
