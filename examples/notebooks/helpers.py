"""What the notebooks share: the modules of the examples, colors, and a few small functions.

B examples, T tasks.
"""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import pyplot as plt

from torchrec_exfm.das import Window, train_windows

# The examples are scripts, not packages: their modules import one another by their bare names.
EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(EXAMPLES / "promo_response"), str(EXAMPLES / "retrieval")]

import data  # noqa: E402
import main as demo  # noqa: E402
import models  # noqa: E402, F401  (for the notebooks)
import stream as example  # noqa: E402, F401

Array = npt.NDArray[Any]

COLORS = {
    "student alone": "#7f7f7f",
    "AH": "#1f77b4",
    "AH + SA": "#ff7f0e",
    "teacher": "black",
    "teacher on the serving head": "#d62728",
    "label memory": "#2ca02c",
}


def start() -> torch.device:
    """Make this process the only rank of a job, set the size of pictures, and return the device."""
    plt.rcParams.update(
        {"figure.dpi": 64, "figure.figsize": (9.0, 3.2), "figure.constrained_layout.use": True}
    )
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    return demo.set_up()


def examples_of(stream: data.Stream, departments: Sequence[str], weeks: range) -> data.Stream:
    """Return the examples of some departments and weeks, in time order."""
    codes = [stream.verticals.index(name) for name in departments]
    rows = np.isin(stream.vertical, codes) & (stream.week >= weeks.start)
    return stream.select(np.flatnonzero(rows & (stream.week < weeks.stop)))


def train(pipeline: Any, feed: Iterator[tuple[slice, Any]], shape: tuple[int, ...]) -> Array:
    """Train for one pass; return each example's outputs from before its own update.

    They have the given shape, (B,) or (B, T), and are NaN for the last examples, which fill no
    batch.
    """
    logits = np.full(shape, np.nan, np.float32)
    loaded: deque[slice] = deque()  # rows of the batches in flight

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
    """Return the log-loss over that of the mean label, of examples with a logit."""
    present = ~np.isnan(logits)
    z, y = logits[present].astype(np.float64), labels[present].astype(np.float64)
    rate = y.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float((np.logaddexp(0, z) - y * z).mean() / entropy)


def calibration(logits: Array, labels: Array) -> float:
    """Return the mean prediction over the mean label, of examples with a logit; 1 is best."""
    present = ~np.isnan(logits)
    probabilities = 1 / (1 + np.exp(-logits[present].astype(np.float64)))
    return float(probabilities.mean() / labels[present].mean())


def without_path(text: object, url: str) -> str:
    """Return a message about a store with the store's name in place of its path."""
    return str(text).replace(url, Path(url).name)


def das(command: str, url: str) -> None:
    """Run ``python -m torchrec_exfm.das`` on a store and print its output."""
    done = subprocess.run(
        [sys.executable, "-m", "torchrec_exfm.das", command, url], capture_output=True, text=True
    )
    print(f"$ python -m torchrec_exfm.das {command} {Path(url).name}")
    print(without_path(done.stdout.strip(), url))
    print(f"exit status {done.returncode}")
