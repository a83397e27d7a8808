"""The errors of a store, and the conversion of the libraries' errors to them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import pyarrow as pa
from deltalake.exceptions import CommitFailedError, DeltaError

from torchrec_exfm.das.redaction import describe_error

__all__ = ["ConflictError", "MissingFileError", "StoreError", "check_process", "store_errors"]

_ERRORS = (DeltaError, OSError, ValueError, pa.ArrowException)  # raised for damaged files


class StoreError(RuntimeError):
    """A store is damaged, missing, of a foreign format or not writable; the text names it."""


class MissingFileError(StoreError):
    """A file of the store does not exist, or no longer exists."""


class ConflictError(StoreError):
    """Another writer committed first."""


def check_process(process: int) -> None:
    """Raise a StoreError unless this is the given process: a store can't be used after a fork.

    A forked process lacks the threads of deltalake and of a look-up: deltalake would panic, and a
    wait for a look-up would never end.
    """
    if os.getpid() != process:
        raise _forked()


@contextlib.contextmanager
def store_errors(
    where: str, failure: str, storage_options: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Convert the libraries' errors to a StoreError that says where, what failed, and why."""
    try:
        yield
    except BaseException as error:
        # A panic of deltalake is not an Exception, and would end a thread silently.
        if not isinstance(error, _ERRORS) and type(error).__name__ != "PanicException":
            raise
        if "Forked process" in str(error):
            raise _forked() from None
        kind = ConflictError if isinstance(error, CommitFailedError) else StoreError
        text, cause = describe_error(error, storage_options)
        raise kind(f"{where}: {failure} ({text})".removeprefix(": ")) from cause


def _forked() -> StoreError:
    return StoreError(
        "a store should be used in the process that opened it; received a call in a process forked "
        "from it: start workers, of a DataLoader too, with multiprocessing_context='spawn' or "
        "'forkserver': there stores and look-ups are opened anew from their URLs"
    )
