"""Snapshots of a teacher: published whole or not at all, found by version and event time."""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from torch import nn

from torchrec_exfm._ranks import on_rank_0
from torchrec_exfm.checkpoint import load_checkpoint, save_checkpoint
from torchrec_exfm.das.arrays import MICROSECONDS, as_int, as_second, utc
from torchrec_exfm.das.delta import StoreError, Table
from torchrec_exfm.das.schema import TIMESTAMP, check_name

if TYPE_CHECKING:
    from torchrec_exfm.das.store import TeacherStore

__all__ = [
    "Snapshot",
    "forget_snapshots",
    "load_snapshot",
    "newest_snapshot",
    "publish",
    "published",
]

SCHEMA = pa.schema(
    [
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("trained_through", TIMESTAMP, nullable=False),
        pa.field("published_at", TIMESTAMP, nullable=False),
        pa.field("checkpoint", pa.string()),
    ]
)
# times as epoch microseconds: to be cast to after SCHEMA, as files may have them in other units
NUMBERS = pa.schema([f.with_type(pa.int64()) if f.type == TIMESTAMP else f for f in SCHEMA])


@dataclass(frozen=True)
class Snapshot:
    """One version of a teacher, and how far it was trained.

    Args:
        teacher: its name.
        version: a whole number from 0, higher for newer; :func:`publish` counts from 1.
        trained_through_seconds: the last event time that it was trained on, epoch seconds: an
            example of that time or before may have taught it its label.

    Raises:
        TypeError: for a time of another kind.
        ValueError: for a wrong value.
    """

    teacher: str
    version: int
    trained_through_seconds: int

    def __post_init__(self) -> None:
        check_name("a teacher", self.teacher)
        version = as_int(self.version)
        if isinstance(self.version, bool) or not 0 <= version < 2**40:
            raise ValueError(f"version should be an int in [0, 2^40); received {self.version!r}")
        through = as_second("trained_through_seconds", self.trained_through_seconds)
        object.__setattr__(self, "version", version)  # an int, of numpy's and torch's too
        object.__setattr__(self, "trained_through_seconds", through)

    def __str__(self) -> str:
        through = utc(self.trained_through_seconds)
        return f"{self.teacher} version {self.version}, trained through {through}"


def publish(
    store: TeacherStore,
    teacher: str,
    model: nn.Module | None,
    *,
    trained_through_seconds: int,
    checkpoints: Path | str | None = None,
) -> Snapshot:
    """Publish the teacher as it is now, as the next version; called by all ranks.

    Its parameters are written by torch.distributed.checkpoint, sharded as they are, and then one
    commit makes the snapshot known: a process killed before leaves nothing that a reader sees.

    Args:
        store: where it is made known.
        teacher: its name.
        model: the teacher, under DMP or not; None: there is no checkpoint to load (a teacher that
            is kept elsewhere).
        trained_through_seconds: the last event time that it was trained on, epoch seconds. Of two
            snapshots the newer is that of the higher version, whichever was trained further.
        checkpoints: the folder of the checkpoints, the same for all ranks; None: in the store's
            own folder, which has to be a local (or mounted) one.

    Raises:
        TypeError: for a time of another kind.
        ValueError: for a wrong value; if the store is on an object store and no folder is given.
        StoreError: if it can't be written.
    """
    through = Snapshot(teacher, 0, trained_through_seconds).trained_through_seconds  # or fail now
    name = on_rank_0(lambda: f"{int(time.time())}-{uuid.uuid4().hex[:12]}")
    if model is not None:
        folder = checkpoint_folder(store, checkpoints) / teacher / name
        save_checkpoint(folder, model.state_dict())
    row = (through, name if model is not None else None)
    return on_rank_0(lambda: _commit(store, teacher, *row))


def published(store: TeacherStore, teacher: str) -> list[Snapshot]:
    """A teacher's snapshots, oldest version first."""
    rows = entries(registry_of(store))
    return sorted(
        (snapshot for snapshot, _ in rows if snapshot.teacher == teacher),
        key=lambda snapshot: snapshot.version,
    )


def newest_snapshot(
    store: TeacherStore, teacher: str, *, before_seconds: int | None = None
) -> Snapshot | None:
    """The newest snapshot, of those trained through times before ``before_seconds`` if given.

    Raises:
        TypeError: for a time of another kind.
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


def load_snapshot(
    store: TeacherStore,
    snapshot: Snapshot,
    model: nn.Module,
    *,
    checkpoints: Path | str | None = None,
) -> None:
    """Load a published snapshot into a model, in place; called by all ranks, of any number.

    Nothing is unpickled: only tensors are read, with ``weights_only=True``.

    Args:
        store: where it is known.
        snapshot: one of :func:`published`.
        model: of the same parameters, sharded in any way.
        checkpoints: as for :func:`publish`.

    Raises:
        StoreError: if it is not published, or was without a checkpoint.
        FileNotFoundError: if its checkpoint is not there.
        ValueError: if its checkpoint is damaged, or of other parameters than the model's.
    """
    found = [name for known, name in entries(registry_of(store)) if known == snapshot]
    if not found:
        raise StoreError(f"{store.url}/snapshots: {snapshot}, is not published there")
    if found[0] is None:
        raise StoreError(f"{store.url}/snapshots: {snapshot}, was published without a checkpoint")
    if not is_plain(found[0]):
        raise StoreError(
            f"{store.url}/snapshots: the checkpoint {found[0]!r} of {snapshot} is refused: it may "
            "leave the store's folder"
        )
    state = model.state_dict()
    load_checkpoint(checkpoint_folder(store, checkpoints) / snapshot.teacher / found[0], state)
    model.load_state_dict(state)


def forget_snapshots(
    store: TeacherStore, teacher: str, before_version: int, *, checkpoints: Path | str | None = None
) -> int:
    """Delete a teacher's older snapshots: their outputs in the store, entries and checkpoints.

    Args:
        store: where they are known.
        teacher: its name.
        before_version: those of lower versions are deleted.
        checkpoints: as for :func:`publish`.

    Returns:
        How many published snapshots there were of them.

    Raises:
        ValueError: for a wrong name; if the store is on an object store and no folder is given.
        StoreError: if they can't be deleted.
    """
    check_name("a teacher", teacher)
    registry = registry_of(store)
    old = [
        (known, name)
        for known, name in entries(registry)
        if known.teacher == teacher and known.version < before_version
    ]
    folders = [
        checkpoint_folder(store, checkpoints) / teacher / name  # fails before anything is deleted
        for _, name in old
        if name is not None and is_plain(name)
    ]
    store.table.delete(f"teacher = '{teacher}' AND snapshot < {int(before_version)}")
    registry.delete(f"teacher = '{teacher}' AND version < {int(before_version)}")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return len(old)


def create_registry(url: str, storage_options: Mapping[str, str] | None) -> None:
    """Make the empty table of snapshots, unless it is there."""
    Table.create(f"{url}/snapshots", SCHEMA, (), "snapshots of teachers", storage_options)


def _commit(
    store: TeacherStore, teacher: str, trained_through_seconds: int, checkpoint: str | None
) -> Snapshot:
    registry = registry_of(store)
    while True:
        newest = newest_snapshot(store, teacher)
        version = 1 if newest is None else newest.version + 1
        row = {
            "teacher": teacher,
            "version": version,
            "trained_through": trained_through_seconds * MICROSECONDS,
            "published_at": int(time.time() * MICROSECONDS),
            "checkpoint": checkpoint,
        }
        data = pa.Table.from_pylist([row], schema=SCHEMA)
        if registry.append(data, (f"snapshot/{teacher}", version)):
            if version % 100 == 0:  # each has a file of its own: make them one
                registry.compact()
            return Snapshot(teacher, version, trained_through_seconds)


def registry_of(store: TeacherStore) -> Table:
    """The table of a store's snapshots."""
    return Table(f"{store.url}/snapshots", store.storage_options)


def entries(registry: Table) -> list[tuple[Snapshot, str | None]]:
    """The snapshots, each with the name of its checkpoint's folder."""
    rows = []
    for file in registry.files():
        for row in registry.read(file, SCHEMA).cast(NUMBERS).to_pylist():
            seconds = row["trained_through"] // MICROSECONDS
            try:
                snapshot = Snapshot(row["teacher"], row["version"], seconds)
            except ValueError as error:
                raise StoreError(f"{registry.url}/{file.path}: is damaged ({error})") from error
            rows.append((snapshot, row["checkpoint"]))
    return rows


def is_plain(checkpoint: str) -> bool:
    """Whether the name of a checkpoint is as :func:`publish` makes them, and leads nowhere else."""
    return re.fullmatch(r"[0-9]+-[0-9a-f]+", checkpoint) is not None


def checkpoint_folder(store: TeacherStore, checkpoints: Path | str | None) -> Path:
    """Where a store's checkpoints are."""
    if checkpoints is not None:
        return Path(checkpoints)
    if "://" in store.url:
        raise ValueError(
            f"checkpoints should be a folder that all ranks share, as {store.url} is no local one; "
            "received None"
        )
    return Path(store.url) / "checkpoints"
