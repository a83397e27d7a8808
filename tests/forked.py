"""Processes forked from one that has imported TorchRec: a start costs some 50 ms, not seconds."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ranks import RAISED, _strict_warnings

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pandas",  # pyarrow looks for it at its first array
        "pytest",
        "torch.distributed.optim",
        "torchrec",
        "torchrec.datasets.utils",
        "torchrec.distributed.train_pipeline",
        "torchrec.models.deepfm",
        "torchrec.models.dlrm",
        "torchrec_exfm.das",
    ]
)
START_SECONDS = 120.0  # the import, on a busy machine
RUN_SECONDS = 60.0


class Forked:
    """``function(*arguments)`` in a process of its own; both must be importable and picklable."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._connection, theirs = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_run, args=(theirs, function, arguments), daemon=True)
        self.process.start()
        theirs.close()
        assert self._connection.poll(START_SECONDS), "the process did not start"
        self._connection.recv()

    def result(self) -> Any:
        """Wait for the function, and return its result.

        Raises:
            AssertionError: with the traceback, or if the process was lost or too slow.
        """
        try:
            assert self._connection.poll(RUN_SECONDS), "no answer in time"
            answer = self._connection.recv()
        except EOFError:
            raise AssertionError("the process died") from None
        finally:
            self.kill()
        assert not str(answer).startswith(RAISED), answer
        return answer

    def kill(self) -> None:
        """Send SIGKILL if the process still runs."""
        self.process.kill()
        self.process.join()


def run_together(function: Callable[..., Any], *arguments: tuple[Any, ...]) -> list[Any]:
    """Run a function in one process per tuple of arguments, all together; return the results.

    Its first argument is a barrier, to wait at when it is ready.
    """
    barrier = CONTEXT.Barrier(len(arguments))
    processes = [Forked(function, barrier, *run_arguments) for run_arguments in arguments]
    try:
        return [process.result() for process in processes]
    finally:
        for process in processes:
            process.kill()


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(None)
    try:
        with _strict_warnings():
            answer = function(*arguments)
    except BaseException:
        answer = traceback.format_exc()
    connection.send(answer)
