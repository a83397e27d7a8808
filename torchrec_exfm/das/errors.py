"""The error of a store, and how what the libraries raise becomes one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import pyarrow as pa
from deltalake.exceptions import CommitFailedError, DeltaError

from torchrec_exfm.das.redaction import describe_error

__all__ = ["ConflictError", "MissingFileError", "StoreError", "check_process", "store_errors"]

_ERRORS = (DeltaError, OSError, ValueError, pa.ArrowException)  # of reading what is damaged


class StoreError(RuntimeError):
    """Something in a store is damaged, missing, foreign or can't be written; the text names it."""


class MissingFileError(StoreError):
    """A file of the store is not there (any more)."""


class ConflictError(StoreError):
    """Another writer was first."""


def check_process(process: int) -> None:
    """Refuse to go on in a process that was forked from the one given.

    The library's threads, and those of a look-up, are not there after a fork: it would panic, and
    who waits for them would wait for ever.
    """
    if os.getpid() != process:
        raise _forked()


@contextlib.contextmanager
def store_errors(
    where: str, failure: str, storage_options: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Raise the libraries' errors as a StoreError: what could not be done, where, and why."""
    try:
        yield
    except BaseException as error:
        # what panics in the library is no Exception, and would end threads without a word
        if not isinstance(error, _ERRORS) and type(error).__name__ != "PanicException":
            raise
        if "Forked process" in str(error):
            raise _forked() from None
        kind = ConflictError if isinstance(error, CommitFailedError) else StoreError
        text, cause = describe_error(error, storage_options)
        raise kind(f"{where}: {failure} ({text})".removeprefix(": ")) from cause


def _forked() -> StoreError:
    return StoreError(
        "a store should be used in the process that has opened it; received a use in one that was "
        "forked from it: start workers with multiprocessing_context='spawn' or 'forkserver' (of a "
        "DataLoader): stores and look-ups travel there by their URLs"
    )
