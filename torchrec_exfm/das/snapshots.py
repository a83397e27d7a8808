"""Snapshots of a teacher: published atomically, found by version and event time."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from torchrec_exfm._ranks import on_rank_0
from torchrec_exfm.checkpoint import load_checkpoint, save_checkpoint
from torchrec_exfm.das.arrays import MICROSECONDS, as_int, as_second
from torchrec_exfm.das.delta import Commit
from torchrec_exfm.das.errors import StoreError, store_errors
from torchrec_exfm.das.schema import SNAPSHOT_NUMBERS, SNAPSHOTS, Snapshot, check_name
from torchrec_exfm.das.store import TeacherStore

__all__ = ["ForgetReport", "forget", "load_snapshot", "newest_snapshot", "publish", "published"]


def publish(
    store: TeacherStore, teacher: str, model: nn.Module | None, *, trained_through_seconds: int
) -> Snapshot:
    """Publish the teacher's current parameters as its next version; called by all ranks.

    torch.distributed.checkpoint writes the parameters, sharded as they are. Then one commit
    publishes the snapshot: a process killed before leaves nothing that a reader sees. A version is
    never used twice, even if its snapshot was forgotten.

    Args:
        store: the store to publish in; the parameters go into its ``checkpoints``.
        teacher: the teacher's name.
        model: the teacher, under DMP or not; None: publish without a checkpoint, for a teacher that
            is kept elsewhere.
        trained_through_seconds: the last event time that it was trained on, epoch seconds. The
            newer of two snapshots is the one with the higher version, whichever was trained
            further.

    Raises:
        TypeError: for a time of a wrong type.
        ValueError: for a wrong value; if the store has no folder for checkpoints.
        StoreError: if the store can't be written.
    """
    through = Snapshot(teacher, 0, trained_through_seconds).trained_through_seconds  # or fail now
    # Rank 0 names the folder for all; the name is unique, so that two jobs never share one.
    name = on_rank_0(lambda: f"{int(time.time())}-{uuid.uuid4().hex[:12]}")
    if model is not None:
        save_checkpoint(checkpoint_folder(store, teacher, name), model.state_dict())
    checkpoint = name if model is not None else None
    return on_rank_0(lambda: _commit(store, teacher, through, checkpoint))


def published(store: TeacherStore, teacher: str) -> list[Snapshot]:
    """Return a teacher's published snapshots, oldest version first."""
    store.registry.refresh()
    snapshots = (snapshot for snapshot, _ in entries(store) if snapshot.teacher == teacher)
    return sorted(snapshots, key=lambda snapshot: snapshot.version)


def newest_snapshot(
    store: TeacherStore, teacher: str, *, before_seconds: int | None = None
) -> Snapshot | None:
    """Return the newest published snapshot; None: there is none.

    With ``before_seconds`` only snapshots that were trained through an earlier time count.

    Raises:
        TypeError: for a time of a wrong type.
        ValueError: for a time out of range.
    """
    if before_seconds is not None:
        before_seconds = as_second("before_seconds", before_seconds)
    allowed = [
        snapshot
        for snapshot in published(store, teacher)
        if before_seconds is None or snapshot.trained_through_seconds < before_seconds
    ]
    return allowed[-1] if allowed else None


def load_snapshot(store: TeacherStore, snapshot: Snapshot, model: nn.Module) -> None:
    """Load a published snapshot into a model, in place; called by all ranks, of any number.

    Nothing is unpickled: only tensors are read, with ``weights_only=True``.

    Args:
        store: the store that it was published in, with its parameters in ``checkpoints``.
        snapshot: one of :func:`published`.
        model: a model with the same parameters, sharded in any way.

    Raises:
        StoreError: if the snapshot is not published, or has no checkpoint.
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if the checkpoint is damaged, or has other parameters than the model; if the
            store has no folder for checkpoints.
    """
    store.registry.refresh()
    names = [name for entry, name in entries(store) if entry == snapshot]
    if not names:
        raise StoreError(f"{store.registry.url}: {snapshot}, is not published there")
    if names[0] is None:
        raise StoreError(f"{store.registry.url}: {snapshot}, was published without a checkpoint")
    state = model.state_dict()
    load_checkpoint(checkpoint_folder(store, snapshot.teacher, names[0]), state)
    model.load_state_dict(state)


@dataclass(frozen=True)
class ForgetReport:
    """Counts of what was deleted.

    Attributes:
        rows: outputs that were deleted.
        snapshots: published snapshots that were deleted.
    """

    rows: int
    snapshots: int


def forget(
    store: TeacherStore,
    teacher: str,
    *,
    versions: Iterable[int] | None = None,
    before_seconds: int | None = None,
) -> ForgetReport:
    """Delete versions of a teacher, or its outputs of examples before a time.

    With ``versions`` their outputs, published snapshots and checkpoints are deleted. Shards of the
    same names can then be written again. With ``before_seconds`` the outputs of every version are
    deleted, in the windows that have ended by then; snapshots stay.

    Data files stay on disk until a vacuum (``python -m torchrec_exfm.das compact URL
    --vacuum-hours H``), so that readers of an older commit are not disturbed. A call that
    was killed can be repeated.

    Args:
        store: the store to delete from.
        teacher: the teacher's name.
        versions: versions in any order; unknown ones are ignored.
        before_seconds: event time, epoch seconds.

    Raises:
        TypeError: for a time or a version of a wrong type.
        ValueError: for a wrong value; unless exactly one of ``versions`` and ``before_seconds`` is
            given.
        StoreError: if the store can't be written.
    """
    check_name("a teacher", teacher)
    if (versions is None) == (before_seconds is None):
        raise ValueError(
            "forget should get versions or before_seconds; received "
            + ("both" if versions is not None else "neither")
        )
    if before_seconds is not None:
        window = as_second("before_seconds", before_seconds) // store.format.window_seconds
        rows = store.table.delete(f"teacher = '{teacher}' AND \"window\" < {window}")
        return ForgetReport(rows, 0)
    numbers = sorted({_as_version(version) for version in ([] if versions is None else versions)})
    if not numbers:
        return ForgetReport(0, 0)

    def find_rows() -> list[dict[str, Any]]:
        store.registry.refresh()
        rows = rows_of_registry(store)
        return [row for row in rows if row["teacher"] == teacher and row["version"] in numbers]

    def folders() -> list[Path]:
        names = [row["checkpoint"] for row in to_forget]
        return [checkpoint_folder(store, teacher, name) for name in names if name is not None]

    to_forget = find_rows()
    folders()  # a wrong folder of checkpoints raises here, before anything is deleted
    rows = store.table.delete(f"teacher = '{teacher}' AND ({_sql_in('snapshot', numbers)})")
    to_forget = find_rows()  # again, to include snapshots published meanwhile
    snapshots = store.registry.delete(f"teacher = '{teacher}' AND ({_sql_in('version', numbers)})")
    if left := [row for row in find_rows() if row in to_forget]:
        # deltalake looks for rows only in files whose statistics in the log allow them
        raise StoreError(
            f"{store.registry.url}: still has what was to be forgotten, version "
            f"{left[0]['version']}: the statistics in its log are damaged; restore the log from a "
            "copy"
        )
    # Checkpoints go last: if the process is killed before, no published snapshot lacks its own.
    for folder in folders():
        shutil.rmtree(folder, ignore_errors=True)
    return ForgetReport(rows, snapshots)


def entries(store: TeacherStore) -> list[tuple[Snapshot, str | None]]:
    """Return all snapshots, each with the name of its checkpoint's folder (None: it has none)."""
    snapshots = []
    for row in rows_of_registry(store):
        seconds = row["trained_through"] // MICROSECONDS
        with store_errors(row["file"], "is damaged"):
            snapshot = Snapshot(row["teacher"], row["version"], seconds)
        snapshots.append((snapshot, row["checkpoint"]))
    return snapshots


def rows_of_registry(store: TeacherStore) -> Iterator[dict[str, Any]]:
    """Yield the registry's rows, unchecked: times in microseconds, and the path of its file."""
    for file in store.registry.files():
        for row in store.registry.read(file, SNAPSHOTS).cast(SNAPSHOT_NUMBERS).to_pylist():
            yield {**row, "file": f"{store.registry.url}/{file.path}"}


def checkpoint_folder(store: TeacherStore, teacher: str, name: str) -> Path:
    """Return the folder of a checkpoint, whose name should be one that :func:`publish` makes."""
    if store.checkpoints is None:
        raise ValueError(
            f"checkpoints should be a folder that all ranks share, as {store.url} is no local one; "
            "received None; open the store with TeacherStore(url, checkpoints=...)"
        )
    folder = store.checkpoints / teacher / name
    # The name comes from a table that others may write: "..", or a link, could lead anywhere.
    is_plain = re.fullmatch(r"[0-9]+-[0-9a-f]+", name) is not None
    if not is_plain or folder.resolve() != store.checkpoints.resolve() / teacher / name:
        raise StoreError(
            f"{store.registry.url}: the checkpoint {name!r} of {teacher} is refused: it may leave "
            "the folder of the checkpoints"
        )
    return folder


def _commit(
    store: TeacherStore, teacher: str, trained_through_seconds: int, checkpoint: str | None
) -> Snapshot:
    registry, versions = store.registry, [0]

    def prepare() -> Commit:
        rows = rows_of_registry(store)
        known = [row["version"] for row in rows if row["teacher"] == teacher]
        # The registry lacks forgotten snapshots; the transaction keeps the last version of all.
        last = registry.transaction(f"snapshot/{teacher}") or 0
        versions.append(max([*known, last]) + 1)
        row = {
            "teacher": teacher,
            "version": versions[-1],
            "trained_through": trained_through_seconds * MICROSECONDS,
            "published_at": int(time.time() * MICROSECONDS),
            "checkpoint": checkpoint,
        }
        data = pa.Table.from_pylist([row], schema=SNAPSHOTS)
        transaction = f"snapshot/{teacher}", versions[-1]
        return Commit(lambda properties: registry.append(data, properties), transaction)

    registry.commit("can't be written to, and nothing was", prepare)
    if versions[-1] % 100 == 0:  # every snapshot adds a file: merge them
        with contextlib.suppress(StoreError):  # the snapshot is published already
            registry.compact()
    return Snapshot(teacher, versions[-1], trained_through_seconds)


def _as_version(version: int) -> int:
    number = as_int(version)
    if isinstance(version, bool) or not 0 <= number < 2**40:
        raise TypeError(f"versions should be whole numbers in [0, 2^40); received {version!r}")
    return number


def _sql_in(column: str, numbers: list[int]) -> str:
    """Return a predicate that is true for sorted numbers: a comparison for each run of them."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    bounds = [(members[0][1], members[-1][1]) for members in (list(run) for _, run in runs)]
    return " OR ".join(f"({column} >= {low} AND {column} <= {high})" for low, high in bounds)
