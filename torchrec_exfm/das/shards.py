"""Names of shards: what was written by a name of a snapshot, and whether it is there still."""

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
    """Rows of a snapshot that are written by one name; None: by one that nobody else has.

    The log keeps for each name a number: how many rows were offered, and a digest of their ids and
    times, in any order, of whether they were logged, and of what the snapshot was trained through.
    Outputs are compared with those that are there, as they may differ by rounding; keys and
    embeddings are not compared.
    """

    url: str
    snapshot: Snapshot
    name: str | None
    offered: Rows

    def transaction(self) -> tuple[str, int]:
        """The name in the log, and the number that stands for the rows."""
        if self.name is None:
            return f"write/{uuid.uuid4().hex}", 0
        rows = self.offered
        times = mix(2 * rows.event_time + rows.logged) + mix(rows.trained_through)
        digest = mix(rows.example_id + times.view(np.int64)).sum()
        number = (len(rows) & (2**31 - 1)) << 32 | int(digest) >> 32
        return transaction_name(self.snapshot, self.name), number

    def may_be_stored(
        self, last: int, number: int, files: Sequence[DataFile], read: Callable[[DataFile], Rows]
    ) -> bool:
        """Whether what the name wrote may be in the files; it raises if ``last`` differs then."""
        if last == number:
            return True
        version = self.snapshot.version
        known = (file for file in files if self._may_be_in(file))
        if not any((read(file).snapshot == version).any() for file in known):
            return False  # all of the snapshot's rows are gone: the name is free
        raise ValueError(
            f"{self.url}: nothing was written: {self.name!r}, a shard of {self.snapshot}, should "
            f"have the rows it was written with, {_summary(last)}; received {_summary(number)}: "
            "give other rows another name, or publish what said them as another version"
        )

    def _may_be_in(self, file: DataFile) -> bool:
        version = self.snapshot.version
        lowest, highest = file.snapshots or (version, version)
        return file.partition[0] == self.snapshot.teacher and lowest <= version <= highest

    def find(self, rows: Rows, stored: Rows, alike: Callable[[Floats, Floats], Mask]) -> Mask:
        """Which of the rows (n,) are among those stored; it raises where outputs differ."""
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
        matched, known = np.zeros((2, len(rows)), dtype=np.bool_)
        known[at] = True
        matched[at[same]] = True  # another shard may have said something else of the example
        differ = known & ~matched
        if differ.any():
            first = np.flatnonzero(differ)[0]
            before, received = stored.outputs[at == first][0], rows.outputs[first]
            raise ValueError(
                f"{self.url}: nothing was written: {self.name!r}, a shard of {self.snapshot}, "
                f"should have the outputs it was written with; received others for {differ.sum()} "
                f"of {len(rows)} examples: of example {rows.example_id[first]} there are "
                f"{before.tolist()}, and these are {received.tolist()}: "
                "publish what said them as another version, or forget this one before"
            )
        return matched


def transaction_name(snapshot: Snapshot, shard: str) -> str:
    """The name in the log of what is written by a name of a snapshot."""
    return f"shard/{snapshot.teacher}/{snapshot.version}/{shard}"


def _summary(number: int) -> str:
    """What the number of a shard tells of its rows."""
    return f"{number >> 32} of the digest {number & (2**32 - 1):08x}"
