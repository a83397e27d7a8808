"""A few small functions that the notebooks share, which put the promo_response example on the path.

B examples, T tasks.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import data
import numpy as np
import numpy.typing as npt
import torch
from main import set_up
from matplotlib import pyplot as plt

from torchrec_exfm.das import Window, train_windows

Array = npt.NDArray[Any]


def start() -> torch.device:
    """Make this process the only rank of a job, as without torchrun; set small pictures."""
    plt.rcParams.update(
        {"figure.dpi": 70, "figure.figsize": (9.0, 3.2), "figure.constrained_layout.use": True}
    )
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    return set_up()


def examples_of(stream: data.Stream, departments: Sequence[str], weeks: range) -> data.Stream:
    """The examples of some departments and weeks, in time order."""
    codes = [stream.verticals.index(name) for name in departments]
    rows = np.isin(stream.vertical, codes) & (stream.week >= weeks.start)
    return stream.select(np.flatnonzero(rows & (stream.week < weeks.stop)))


def train(pipeline: Any, feed: Iterator[tuple[slice, Any]], shape: tuple[int, ...]) -> Array:
    """One pass; what the model says of each example before the update that learns from it.

    Of the given shape, (B,) or (B, T); NaN for the last examples, which fill no batch.
    """
    logits = np.full(shape, np.nan, np.float32)
    loaded: deque[slice] = deque()  # rows of the batches that the pipeline has on their way

    def batches() -> Iterator[Any]:
        for rows, batch in feed:
            loaded.append(rows)
            yield batch

    def step(output: Any) -> None:
        logits[loaded.popleft()] = output[1].detach().cpu().numpy()

    for _ in train_windows(pipeline, [Window(0, 1, batches())], step=step):
        pass  # one window, however long
    pipeline.detach()
    return logits


def normalized_entropy(logits: Array, labels: Array) -> float:
    """Log-loss over that of the mean label, of the examples that have a logit; lower is better."""
    there = ~np.isnan(logits)
    z, y = logits[there].astype(np.float64), labels[there].astype(np.float64)
    rate = y.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float((np.logaddexp(0, z) - y * z).mean() / entropy)


def calibration(logits: Array, labels: Array) -> float:
    """Mean prediction over mean label, of the examples that have a logit; 1 is best."""
    there = ~np.isnan(logits)
    probabilities = 1 / (1 + np.exp(-logits[there].astype(np.float64)))
    return float(probabilities.mean() / labels[there].mean())


def without_path(text: object, url: str) -> str:
    """A message about a store, with the store's name in the place of its folder."""
    return str(text).replace(url, Path(url).name)


def das(command: str, url: str) -> None:
    """Run ``python -m torchrec_exfm.das`` on a store, and print what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "torchrec_exfm.das", command, url], capture_output=True, text=True
    )
    print(f"$ python -m torchrec_exfm.das {command} {Path(url).name}")
    print(without_path(done.stdout.strip(), url))
    print(f"exit status {done.returncode}")
