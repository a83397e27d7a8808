"""The job that the tests of resuming kill: a student's training that saves and resumes."""

from __future__ import annotations

import hashlib
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import rank_models as rm
import torch
from rank_checks_resume import new_run
from torch import Tensor

from torchrec_exfm import load_training, save_training

STEPS = 30
SAVE_STEPS = 2


class End(NamedTuple):
    """The losses of a training's steps, their duration, and digests of the final state."""

    losses: list[float]
    seconds: float
    everything: list[str]


def training(
    rank: int,
    world_size: int,
    folder: Path,
    *,
    steps: int = STEPS,
    save_steps: int = SAVE_STEPS,
    sharding: str = "row_wise",
) -> End:
    """Train from the newest checkpoint on."""
    torch.manual_seed(rank)
    checkpoints = folder / "checkpoints"
    run = new_run(world_size, "RowWiseAdagrad", sharding=sharding)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the metrics start anew", RuntimeWarning)
        position = load_training(checkpoints, run.pipeline, metrics=run.metrics) or {"step": 0}
    batches = iter(rm.parts(rank, world_size, steps=steps)[position["step"] :])
    losses, started = [], time.monotonic()
    for step in range(position["step"] + 1, steps + 1):
        losses.append(float(run.step(batches)[0]))
        if step % save_steps == 0:
            save_training(checkpoints, run.pipeline, position={"step": step}, metrics=run.metrics)
    seconds = time.monotonic() - started
    everything = [*run.everything(), torch.get_rng_state()]
    return End(losses, seconds, [digest(part) for part in everything])


def digest(value: Any) -> str:
    """Return a digest of all tensors (every bit) and numbers in a tree of dicts and lists."""
    if isinstance(value, dict):
        value = [part for pair in sorted(value.items()) for part in pair]
    if isinstance(value, list):
        value = "".join(digest(item) for item in value)
    if isinstance(value, Tensor):
        value = (value.dtype, value.shape, value.cpu().contiguous().numpy().tobytes())
    return hashlib.sha256(repr(value).encode()).hexdigest()
