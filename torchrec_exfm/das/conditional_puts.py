"""A probe of whether an object store keeps one writer from overwriting another's commit."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.fs import DeltaStorageHandler

from torchrec_exfm.das.errors import StoreError, store_errors

_WRITERS = 4
_ROUNDS = 20  # where replies are instant, two rounds of three are inconclusive


def check_conditional_puts(url: str, storage_options: Mapping[str, str] | None = None) -> None:
    """Raise a StoreError unless an object store accepts one of several concurrent first commits.

    A commit is a put with ``If-None-Match: *``. An object store that ignores the condition lets one
    commit overwrite another, and rows are lost silently. Local folders, and those that hold a
    table, are not probed. The probe's files are removed.
    """
    options = dict(storage_options or {})
    if "://" not in url:
        return
    with store_errors(url, "can't be written to", options):
        if DeltaTable.is_deltatable(url, options):
            return
        for _ in range(_ROUNDS):
            accepted, refused = _race(f"{url}/_probe-{uuid.uuid4().hex}", options)
            if accepted > 1:
                break
            if refused:
                return
        else:  # no two puts ever met, so nothing speaks against the store
            return
    raise StoreError(
        f"{url}: an object store should refuse to overwrite a commit (a conditional put, "
        f"If-None-Match: *); this one took {accepted} commits of one version, so that writers "
        "would lose each other's rows: use a newer version of it, or another store"
    )


def _race(url: str, options: dict[str, str]) -> tuple[int, int]:
    """Commit to one new table from several threads; return how many were accepted, and refused.

    The library looks for a commit before it puts its own. Only commits that are put between that
    look and the first put are left to the object store: the others count as neither.
    """
    start = threading.Barrier(_WRITERS)

    def commit(_: int) -> bool | None:
        start.wait()
        try:
            DeltaTable.create(
                url,
                pa.schema([("probe", pa.int64())]),
                storage_options=options,
                commit_properties=CommitProperties(max_commit_retries=0),
            )
            return True
        except CommitFailedError:
            return False
        except DeltaError:
            if DeltaTable.is_deltatable(url, options):  # it saw another's commit before its put
                return None
            raise

    try:
        with ThreadPoolExecutor(_WRITERS) as writers:
            outcomes = list(writers.map(commit, range(_WRITERS)))
    finally:
        # a probe that can't be removed leaves some bytes, which no reader looks at
        with contextlib.suppress(DeltaError, OSError):
            DeltaStorageHandler(url, options).delete_dir("_delta_log")
    return outcomes.count(True), outcomes.count(False)
