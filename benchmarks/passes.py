"""One pass of a teacher and of a student over a real stream, each example scored before it trains.

The teacher is refreshed at the end of every week; what each of its snapshots says of later weeks is
what a student gets from a teacher that is so old.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import ebnerd
import movielens  # puts the example's folder on the path
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

sys.path.insert(1, str(Path(__file__).parents[1] / "examples" / "promo_response"))

import data
import main as demo
import models

from torchrec_exfm import (
    DistillationTerm,
    ExFMBatch,
    ExFMWrapper,
    StudentAdapter,
    Task,
    TeacherOutputs,
    TrainPipelineExFM,
)

Array = npt.NDArray[Any]
CPU = torch.device("cpu")
FIRST_WEEK = 27  # of the evaluation: half of the rows of either stream are before it
TEACHER_BATCH = 2048
WIDTH = demo.TEACHER["width"]  # of the teacher's tables, if not told otherwise
DIRECTIONS = 12  # of the teacher's last hidden layer, for terms that teach it
TAUGHT = f"directions-{DIRECTIONS}"


@dataclass(frozen=True)
class Source:
    """A stream, and who sees what of it.

    Attributes:
        load: the stream.
        lean, strong: sparse and dense features of the two students.
        rich: those of the teacher.
        rates: batch size, learning rate, and that of the tables, of the two students: the best for
            them without a teacher, see `quality.py --tune`.
        tuning_week, first_week: settings are chosen on the weeks from the first of these on, and
            evaluated on those from the second on (days, where a stream counts days).
    """

    load: Callable[[], data.Stream]
    lean: tuple[Sequence[str], Sequence[str]]
    strong: tuple[Sequence[str], Sequence[str]]
    rich: tuple[Sequence[str], Sequence[str]]
    rates: dict[str, tuple[int, float, float]]
    tuning_week: int = 14
    first_week: int = FIRST_WEEK


def ebnerd_folder() -> Path:
    """The folder of EB-NeRD, which the user gives; processes of a pool get it with the rest."""
    folder = os.environ.get("EBNERD")
    if not folder:
        raise SystemExit(
            "The table Ranking needs the folder of EB-NeRD's demo, with `train` and `validation`. "
            "Received none: give --ebnerd FOLDER, or set EBNERD. (recsys.eb.dk has the data)"
        )
    return Path(folder)


SOURCES = {
    "promotions": Source(
        load=lambda: data.load_stream(progress=False),
        lean=(data.LEAN_SPARSE, data.LEAN_DENSE),
        strong=(data.LEAN_SPARSE, data.STRONG_DENSE),
        rich=(data.RICH_SPARSE, tuple(dict.fromkeys((*data.RICH_DENSE, *data.STRONG_DENSE)))),
        rates={"lean": (256, 1e-3, 0.5), "strong": (256, 2e-3, 0.3)},
    ),
    "movielens": Source(
        load=movielens.load_stream,
        lean=(movielens.LEAN_SPARSE, movielens.LEAN_DENSE),
        strong=(movielens.LEAN_SPARSE, movielens.STRONG_DENSE),
        rich=(movielens.RICH_SPARSE, movielens.RICH_DENSE),
        rates={"lean": (256, 1e-3, 0.3), "strong": (256, 2e-3, 0.1)},
    ),
    "ebnerd": Source(
        load=lambda: ebnerd.load_stream(ebnerd_folder()),
        lean=(ebnerd.LEAN_SPARSE, ebnerd.LEAN_DENSE),
        strong=(ebnerd.LEAN_SPARSE, ebnerd.STRONG_DENSE),
        rich=(ebnerd.RICH_SPARSE, ebnerd.RICH_DENSE),
        rates={"lean": (256, 2e-3, 0.5), "strong": (256, 2e-3, 0.3)},
        tuning_week=4,
        first_week=8,
    ),
}


def start() -> None:
    """Make this process the only rank, on one thread, and end it when its parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    meeting = Path(tempfile.mkdtemp(), "rank")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    torch.set_num_threads(1)


@lru_cache(1)
def stream_of(source: str) -> data.Stream:
    return SOURCES[source].load()


@lru_cache(2)
def vertical_of(source: str, vertical: str) -> tuple[Array, data.Stream]:
    """The rows of a vertical in the stream, and its examples."""
    stream = stream_of(source)
    rows = np.flatnonzero(demo.rows_of(stream, vertical))
    return rows, stream.select(rows)


@lru_cache(1)
def sampling_rates(source: str) -> Array:
    """The share of a row's fellow negatives that are in the stream, (B,).

    Negatives of the promotions were drawn basket by basket, and each knows how many it stands for.
    """
    stream = stream_of(source)
    if source != "promotions":
        return np.ones(len(stream))
    of_one_basket = data.example_ids(np.array([1]), np.array([0]))
    _, basket = np.unique(stream.example_id // of_one_basket, return_inverse=True)
    negative = np.asarray(stream.label) == 0
    stands_for = np.ones(basket.max() + 1)
    stands_for[basket[negative]] = stream.weight[negative]
    return 1 / stands_for[basket]


def teacher_logits(
    stream: data.Stream,
    features: tuple[Sequence[str], Sequence[str]],
    *,
    seed: int,
    width: int,
    delays: Sequence[int] = (),
    frozen_after: int | None = None,
    scored: Array | None = None,
    fitted_before: int | None = None,
) -> dict[str, Array]:
    """What a teacher says of each example, by how old it is: logits (B,), NaN where there are none.

    Args:
        stream: in time order.
        features: sparse and dense.
        seed: of its parameters.
        width: of its tables.
        delays: for each, week t is scored by the snapshot of the end of week t - 1 - delay.
        frozen_after: the week whose snapshot scores all later ones.
        scored: rows (a mask) that snapshots score; None: all.
        fitted_before: the week whose beginning the directions are fitted at; None: without them.

    Returns:
        "fresh": logged in its own training forward, before the update; "delay-D" and "frozen".
        `TAUGHT`, (B, DIRECTIONS): the last hidden layer of that forward along its first
        principal directions among the scored rows before `fitted_before`, NaN there.
    """
    torch.manual_seed(seed)
    sizes = {**demo.TEACHER, "width": width}
    module = models.ranker(*features, stream.cardinalities, **sizes)
    model, optimizer = models.distribute(module, CPU, **demo.TEACHER_RATES)
    feeds = ["fresh", *(f"delay-{delay}" for delay in delays)]
    feeds += [] if frozen_after is None else ["frozen"]
    logits = {feed: np.full(len(stream), np.nan, np.float32) for feed in feeds}
    hidden = None if fitted_before is None else Hidden(module, len(stream), scored)
    snapshots: dict[int, list[Tensor]] = {}
    weeks = np.asarray(stream.week)
    begin = 0
    for week in range(1, int(weeks[-1]) + 1):
        first, last = np.searchsorted(weeks, [week, week + 1])
        rows = (
            np.arange(first, last) if scored is None else first + np.flatnonzero(scored[first:last])
        )
        age = {f"delay-{delay}": week - 1 - delay for delay in delays}
        if frozen_after is not None and week > frozen_after:
            age["frozen"] = frozen_after
        for feed, trained_through in age.items():
            if trained_through in snapshots:
                values = snapshots[trained_through]
                logits[feed][rows] = score(model, values, stream.select(rows), features)
        end = last // TEACHER_BATCH * TEACHER_BATCH  # never a row of the next week
        part, fresh = stream.select(slice(begin, end)), logits["fresh"][begin:end]
        if hidden is not None and week == fitted_before:
            hidden.fit()
        train(model, optimizer, data.batches(part, *features, TEACHER_BATCH), part, fresh)
        if hidden is not None:
            hidden.take(slice(begin, end))
        begin = end
        if delays or frozen_after is not None:
            oldest = week - max(delays, default=0)
            kept = {w: v for w, v in snapshots.items() if w >= oldest or w == frozen_after}
            snapshots = {**kept, week: [value.clone() for value in parameters(model)]}
    return logits if hidden is None else {**logits, TAUGHT: hidden.values}


class Hidden:
    """A teacher's last hidden layer as it trains, along directions that are fitted on the past.

    Args:
        module: the teacher.
        size: B.
        scored: rows (a mask) that are wanted; None: all.

    Attributes:
        values: (B, DIRECTIONS) float32, NaN before the fit and where they are not wanted.
    """

    def __init__(self, module: torch.nn.Module, size: int, scored: Array | None) -> None:
        self.values = np.full((size, DIRECTIONS), np.nan, np.float32)
        self._wanted = np.ones(size, bool) if scored is None else scored
        self._past: list[Tensor] = []
        self._taken: list[Tensor] = []
        self._fitted: tuple[Tensor, Tensor] | None = None
        module.get_submodule(demo.TAP).register_forward_pre_hook(self._see)

    def _see(self, layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            self._taken.append(inputs[0].detach().clone())

    def take(self, rows: slice) -> None:
        """Keep what was seen of the rows since the last time."""
        if not self._taken:
            return
        seen = torch.cat(self._taken)
        self._taken.clear()
        wanted = self._wanted[rows]
        seen = seen[torch.from_numpy(wanted)]
        if self._fitted is None:
            self._past.append(seen)
            return
        mean, directions = self._fitted
        self.values[rows.start + np.flatnonzero(wanted)] = ((seen - mean) @ directions).numpy()

    def fit(self) -> None:
        """Principal directions of all that was kept so far."""
        past = torch.cat(self._past)
        self._past.clear()
        mean = past.mean(0)
        _, _, directions = torch.linalg.svd(past - mean, full_matrices=False)
        self._fitted = mean, directions[:DIRECTIONS].T


def parameters(model: torch.nn.Module) -> list[Tensor]:
    """All values of a model of one rank, the tables' included, as they are in memory."""
    return [
        value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        for value in model.state_dict().values()
    ]


def score(
    model: torch.nn.Module,
    snapshot: list[Tensor],
    stream: data.Stream,
    features: tuple[Sequence[str], Sequence[str]],
) -> Array:
    """The logits of a model with a snapshot's values (B,); its own come back afterwards."""
    live = parameters(model)
    own = [value.clone() for value in live]
    for value, old in zip(live, snapshot, strict=True):
        value.copy_(old)
    model.eval()
    parts = [np.empty(0, np.float32)]
    with torch.no_grad():
        for first in range(0, len(stream), 8192):
            part = stream.select(slice(first, first + 8192))
            _, batch = next(data.batches(part, *features, len(part)))
            parts.append(model(batch)[1][1].numpy())
    for value, mine in zip(live, own, strict=True):
        value.copy_(mine)
    model.train()
    return np.concatenate(parts)


def train(
    model: Any, optimizer: Any, feed: Iterator[Any], stream: data.Stream, logits: Array
) -> None:
    """One pass without a teacher; the logits before each update are put into the last argument."""
    pipeline: Any = TrainPipelineSparseDist(model, optimizer, CPU)
    for rows, (_, outputs, _) in demo.progress(pipeline, feed, stream):
        logits[rows] = outputs.numpy()
    pipeline.detach()


def student_logits(
    stream: data.Stream,
    features: tuple[Sequence[str], Sequence[str]],
    rates: tuple[int, float, float],
    *,
    seed: int,
    terms: Sequence[DistillationTerm] = (),
    teacher: Array | None = None,
    embeddings: Array | None = None,
    adapter: tuple[float, int] = (1e-2, 32),
    task: Task | None = None,
) -> Array:
    """What a student says of each example before it trains on it: logits (B,), NaN at the end.

    Args:
        stream: the vertical's examples, in time order.
        features: sparse and dense.
        rates: batch size, learning rate, and that of the tables.
        seed: of its parameters.
        terms: how it learns from the teacher; none: TorchRec's own pipeline.
        teacher: logits (B,), NaN where there is none.
        embeddings: the teacher's, (B, E), NaN where there is none; None: without.
        adapter: the student adapter's learning rate and width, if a term needs one.
        task: with the rate at which negatives of the stream were sampled.
    """
    torch.manual_seed(seed)
    module: Any = models.ranker(*features, stream.cardinalities, **demo.STUDENT)
    if terms:
        module = ExFMWrapper(module, tap=demo.TAP, terms=terms, tasks=[task or Task()])
    batch_size, learning_rate, table_learning_rate = rates
    model, optimizer = models.distribute(
        module, CPU, learning_rate=learning_rate, table_learning_rate=table_learning_rate
    )
    logits = np.full(len(stream), np.nan, np.float32)
    feed = data.batches(stream, *features, batch_size)
    if not terms:
        train(model, optimizer, feed, stream, logits)
        return logits
    assert teacher is not None
    torch.manual_seed(seed)
    options: dict[str, Any] = {}
    if any(term.adapted for term in terms):
        rate, width = adapter
        options["adapter"] = made = StudentAdapter(hidden=(width,))
        options["adapter_optimizer"] = torch.optim.Adam(made.parameters(), lr=rate, fused=True)
    pipeline = TrainPipelineExFM(model, optimizer, CPU, groups=attrgetter("groups"), **options)
    feed = _with_teacher(feed, teacher, embeddings)
    for rows, (_, outputs, _) in demo.progress(pipeline, feed, stream):
        logits[rows] = outputs.numpy()
    return logits


def _with_teacher(
    feed: Iterator[Any], logits: Array, embeddings: Array | None = None
) -> Iterator[Any]:
    for rows, batch in feed:
        values = torch.from_numpy(np.array(logits[rows]))
        options = {}
        if embeddings is not None:
            taught = torch.from_numpy(np.array(embeddings[rows]))
            options = {"embeddings": taught, "embedding_presence": ~taught[:, 0].isnan()}
        yield rows, ExFMBatch(batch, TeacherOutputs(values, ~values.isnan(), **options))
