"""Whether an object store keeps one writer from overwriting another's commit."""

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
_ROUNDS = 20  # where a reply takes no time, two rounds of three teach nothing


def check_conditional_puts(url: str, storage_options: Mapping[str, str] | None = None) -> None:
    """Check that of several first commits to a table an object store takes one.

    A commit is a put with ``If-None-Match: *``. Where the store ignores that, a commit overwrites
    another, and rows are lost without a word. A folder with a table, and a local one, aren't tried;
    what is tried is removed again.
    """
    options = dict(storage_options or {})
    if "://" not in url:
        return
    with store_errors(url, "can't be written to", options):
        if DeltaTable.is_deltatable(url, options):
            return
        for _ in range(_ROUNDS):
            taken, refused = _race(f"{url}/_probe-{uuid.uuid4().hex}", options)
            if taken > 1:
                break
            if refused:
                return
        else:  # each writer saw the table of another: nothing was learnt that speaks against it
            return
    raise StoreError(
        f"{url}: an object store should refuse to overwrite a commit (a conditional put, "
        f"If-None-Match: *); this one took {taken} in one place, so that writers would lose each "
        "other's rows. Use a newer version of it, or another store"
    )


def _race(url: str, options: dict[str, str]) -> tuple[int, int]:
    """Commit to one new table at the same time; return how many were taken, and refused.

    The library looks for a commit before it puts its own: only what is put between two such looks
    is up to the object store.
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
            if DeltaTable.is_deltatable(url, options):  # it saw that of another
                return None
            raise

    try:
        with ThreadPoolExecutor(_WRITERS) as writers:
            outcomes = list(writers.map(commit, range(_WRITERS)))
    finally:
        with contextlib.suppress(DeltaError, OSError):  # some bytes are left, and harm nobody
            DeltaStorageHandler(url, options).delete_dir("_delta_log")
    return outcomes.count(True), outcomes.count(False)
