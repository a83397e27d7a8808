"""Processes that run checks together, one per rank, and stay for many checks.

Importing TorchRec takes seconds, so the processes start at the first check and stay. A check is a
function ``check(rank, world_size, *arguments)`` of an importable module. If only some ranks fail,
or one hangs, all processes are killed, and the next check starts new ones.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
CHECK_SECONDS = 60.0
GRACE_SECONDS = 3.0
RAISED = "Traceback"

Check = Callable[[int, int], None]


class Ranks:
    """``world_size`` processes with one process group.

    Args:
        world_size: the number of ranks.
        device: ``"cpu"`` with gloo, or ``"cuda"`` with NCCL; checks find it in ``device()``.
    """

    def __init__(self, world_size: int, *, device: str = "cpu") -> None:
        self._world_size = world_size
        self._device = device
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, check: Check, *arguments: Any) -> None:
        """Run ``check(rank, world_size, *arguments)`` on every rank.

        Raises:
            AssertionError: with the traceback of each rank that failed, or was lost or too slow.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((check.__module__, check.__name__, arguments))
        outcomes = self._outcomes(CHECK_SECONDS)
        if any(outcome is not None for outcome in outcomes):
            if not all(outcome is not None and outcome.startswith(RAISED) for outcome in outcomes):
                self.close()
            lines = [f"rank {rank}: {outcome or 'ok'}" for rank, outcome in enumerate(outcomes)]
            raise AssertionError("\n".join([f"{check.__name__} failed", *lines]))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = Path(self._folder.name) / "store"
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self._world_size, self._device, store, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        outcomes = self._outcomes(START_SECONDS)
        if any(outcome is not None for outcome in outcomes):
            self.close()
            raise AssertionError(f"the ranks did not start: {outcomes}")

    def _outcomes(self, timeout: float) -> list[str | None]:
        """Return each rank's answer. Once one has failed, the others get only GRACE_SECONDS."""
        outcomes: dict[int, str | None] = {}
        deadline = time.monotonic() + timeout
        while len(outcomes) < self._world_size:
            waiting = {
                self._connections[rank]: rank
                for rank in range(self._world_size)
                if rank not in outcomes
            }
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                outcomes[rank] = _received(connection)  # type: ignore[arg-type]
                if outcomes[rank] is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return [outcomes.get(rank, "no answer in time") for rank in range(self._world_size)]


def check_name(*check: Any) -> str:
    """Return a test's name for a check and its arguments."""
    parts = [getattr(part, "__name__", str(part)).removeprefix("check_") for part in check]
    return "-".join(parts)


def device() -> Any:
    """Return the device of the checks in this process."""
    import torch

    return torch.device(_DEVICE, torch.cuda.current_device() if _DEVICE == "cuda" else None)


_DEVICE = "cpu"


def _received(connection: Connection) -> str | None:
    try:
        answer: str | None = connection.recv()
    except EOFError:
        return "the process died"
    return answer


def _serve(rank: int, world_size: int, kind: str, store: Path, connection: Connection) -> None:
    global _DEVICE
    _DEVICE = kind
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            _join(rank, world_size, store)
            connection.send(None)
        except Exception:
            connection.send(traceback.format_exc())
            return
        while True:
            module, name, arguments = connection.recv()
            connection.send(_outcome(module, name, rank, world_size, arguments))


def _join(rank: int, world_size: int, store: Path) -> None:
    import torch
    import torch.distributed as dist
    import torchrec  # noqa: F401

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if _DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if _DEVICE == "cuda" else "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=CHECK_SECONDS),
    )


def _outcome(
    module: str, name: str, rank: int, world_size: int, arguments: tuple[Any, ...]
) -> str | None:
    try:
        with _strict_warnings():
            check = getattr(importlib.import_module(module), name)
            check(rank, world_size, *arguments)
    except BaseException:
        return traceback.format_exc()
    return None


@contextlib.contextmanager
def _strict_warnings() -> Iterator[None]:
    """Turn warnings into errors, except those that torch and TorchRec raise about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu|torchmetrics)(\.|$)")
        # TorchRec's own too, but raised in code that torch.compile generates, which has no module
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        yield
