"""The data augmentation system (DAS): teacher outputs, stored once and shared by many students.

The teacher store is a Delta table, which other tools can read too. Every row carries its
provenance: the teacher, its snapshot, the time that snapshot was trained through, and when the
output was scored. Needs the packages of the extra ``das``: deltalake and pyarrow.
"""

# Imported first, so that a missing package is reported with the extra that installs it.
try:
    import deltalake  # noqa: F401
    import pyarrow  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"torchrec_exfm.das needs deltalake and pyarrow, and {error.name} is not installed: "
        "pip install 'torchrec-exfm[das]'",
        name=error.name,
    ) from error

from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.ids import hash_ids, hash_ids_sql
from torchrec_exfm.das.join import data_files, join_sql
from torchrec_exfm.das.logger import TeacherLogger
from torchrec_exfm.das.lookup import LookupCounters, TeacherLookup
from torchrec_exfm.das.schema import Snapshot
from torchrec_exfm.das.scoring import ScoringReport, Shard, score
from torchrec_exfm.das.snapshots import (
    ForgetReport,
    forget,
    load_snapshot,
    newest_snapshot,
    publish,
    published,
)
from torchrec_exfm.das.store import TeacherStore, WriteReport
from torchrec_exfm.das.streaming import (
    Window,
    score_windows,
    train_teacher,
    train_windows,
    wait_for_outputs,
)

__all__ = [
    "ForgetReport",
    "LookupCounters",
    "ScoringReport",
    "Shard",
    "Snapshot",
    "StoreError",
    "TeacherLogger",
    "TeacherLookup",
    "TeacherStore",
    "Window",
    "WriteReport",
    "data_files",
    "forget",
    "hash_ids",
    "hash_ids_sql",
    "join_sql",
    "load_snapshot",
    "newest_snapshot",
    "publish",
    "published",
    "score",
    "score_windows",
    "train_teacher",
    "train_windows",
    "wait_for_outputs",
]
