"""Teachers on a real stream in one pass, each example scored before they train on it.

A teacher publishes a snapshot at the end of every week. Its outputs for later weeks are what a
student gets from a teacher of that age. Where a stream counts days, a week is a day.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import remembered
import torch
import torch.distributed as dist
from sources import SOURCES, Array, Features, data, demo, models
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import ExFMBatch, StudentAdapter, Task, TeacherOutputs
from torchrec_exfm.study import Study

CPU = torch.device("cpu")
WIDTH = demo.TEACHER["width"]  # of the teacher's tables by default
DIRECTIONS = 12  # of the teacher's last hidden layer, for terms that teach it
TAUGHT = f"directions-{DIRECTIONS}"
TABLES = "tables"  # the teacher's, at the beginning of the week when late students start


def start() -> None:
    """Make this process the only rank, on one thread."""
    # A killed parent does not end a spawned worker, which would train on
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    meeting = Path(tempfile.mkdtemp(), "rank")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    torch.set_num_threads(1)


def distribute(
    module: nn.Module, rates: tuple[int, float, float]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    _, learning_rate, table_learning_rate = rates
    return models.distribute(
        module, CPU, learning_rate=learning_rate, table_learning_rate=table_learning_rate
    )


def teacher_logits(
    stream: data.Stream,
    features: Features,
    rates: tuple[int, float, float],
    *,
    seed: int,
    width: int,
    delays: Sequence[int] = (),
    frozen_after: int | None = None,
    scored: Array | None = None,
    kept_before: int | None = None,
    periods: Array | None = None,
) -> dict[str, Any]:
    """Return a teacher's logits by its age, (B,), NaN where it has none.

    Args:
        stream: in time order.
        features: sparse and dense.
        rates: batch size, learning rate, and that of the tables.
        seed: of its parameters.
        width: of its tables.
        delays: for each, week t is scored by the snapshot of the end of week t - 1 - delay.
        frozen_after: the week whose snapshot scores all later ones.
        scored: a mask of the rows that snapshots score; None: all.
        kept_before: the week at whose beginning directions are fitted and tables are kept; None:
            without them.
        periods: the weeks of the examples, from 1 on, (B,); None: the stream's own.

    Returns:
        "fresh": from the training forward, before the update; "delay-D" and "frozen". `TAUGHT`,
        (B, DIRECTIONS): the last hidden layer of that forward along its first principal directions
        among the scored rows before `kept_before`, NaN in these. `TABLES`: by feature.
    """
    torch.manual_seed(seed)
    sizes = {**demo.TEACHER, "width": width}
    module = models.ranker(*features, stream.cardinalities, **sizes)
    model, optimizer = distribute(module, rates)
    feeds = ["fresh", *(f"delay-{delay}" for delay in delays)]
    feeds += [] if frozen_after is None else ["frozen"]
    outputs: dict[str, Any] = {feed: np.full(len(stream), np.nan, np.float32) for feed in feeds}
    hidden = None if kept_before is None else Hidden(module, len(stream), scored)
    snapshots: dict[int, list[Tensor]] = {}
    weeks = np.asarray(stream.week if periods is None else periods)
    begin, batch_size = 0, rates[0]
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
                outputs[feed][rows] = score(model, values, stream.select(rows), features)
        end = last // batch_size * batch_size  # never a row of the next week
        part, fresh = stream.select(slice(begin, end)), outputs["fresh"][begin:end]
        if hidden is not None and week == kept_before:
            hidden.fit()
            outputs[TABLES] = {name: table.numpy() for name, table in tables(model).items()}
        train(model, optimizer, data.batches(part, *features, batch_size), part, fresh)
        if hidden is not None:
            hidden.take(slice(begin, end))
        begin = end
        if delays or frozen_after is not None:
            oldest = week - max(delays, default=0)
            snapshots = {w: v for w, v in snapshots.items() if w >= oldest or w == frozen_after}
            snapshots[week] = [value.clone() for value in parameters(model)]
    return outputs if hidden is None else {**outputs, TAUGHT: hidden.values}


class Hidden:
    """A teacher's last hidden layer in training, along directions fitted on the past.

    Args:
        module: the teacher.
        size: B.
        scored: a mask of the rows to keep; None: all.

    Attributes:
        values: (B, DIRECTIONS) float32, NaN before the fit and in rows that are not scored.
    """

    def __init__(self, module: nn.Module, size: int, scored: Array | None) -> None:
        self.values = np.full((size, DIRECTIONS), np.nan, np.float32)
        self._wanted = np.ones(size, bool) if scored is None else scored
        self._past: list[Tensor] = []
        self._taken: list[Tensor] = []
        self._fitted: tuple[Tensor, Tensor] | None = None
        module.get_submodule(demo.TAP).register_forward_pre_hook(self._see)

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            self._taken.append(inputs[0].detach().clone())

    def take(self, rows: slice) -> None:
        """Keep the layer of the rows that were trained on since the last call."""
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
        """Fit principal directions on all rows that were kept so far."""
        past = torch.cat(self._past)
        self._past.clear()
        mean = past.mean(0)
        _, _, directions = torch.linalg.svd(past - mean, full_matrices=False)
        self._fitted = mean, directions[:DIRECTIONS].T


def parameters(model: nn.Module) -> list[Tensor]:
    """Return all values of a model of one rank, tables included, without a copy."""
    return list(_by_name(model).values())


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
        for name, value in model.state_dict().items()
    }


def tables(model: nn.Module) -> dict[str, Tensor]:
    """Return the embedding tables of a model of one rank by feature, without a copy."""
    prefix, suffix = "embedding_bags.", ".weight"
    return {
        name.partition(prefix)[2].removesuffix(suffix): value
        for name, value in _by_name(model).items()
        if prefix in name
    }


def start_tables(model: nn.Module, taught: dict[str, Array]) -> None:
    """Initialize a student's tables from the teacher's (CrossAdapt, arXiv 2602.01775).

    A wider table gets the teacher's columns through a random orthonormal map, a narrower one their
    first principal directions. Values are scaled to the spread of the student's own start.
    """
    random = torch.Generator().manual_seed(0)
    for name, table in tables(model).items():
        values = torch.from_numpy(np.array(taught[name]))
        values = values - values.mean(0)
        teacher_width, width = values.shape[1], table.shape[1]
        if teacher_width <= width:
            projection = torch.linalg.qr(torch.randn(width, teacher_width, generator=random)).Q.T
        else:
            projection = torch.linalg.svd(values).Vh[:width].T
        projected = values @ projection
        table.copy_(projected * (table.std() / projected.std()))


def score(
    model: nn.Module, snapshot: list[Tensor], stream: data.Stream, features: Features
) -> Array:
    """Return the logits of a model with a snapshot's values, (B,); restore its values."""
    live = parameters(model)
    current = [value.clone() for value in live]
    for value, old in zip(live, snapshot, strict=True):
        value.copy_(old)
    model.eval()
    parts = [np.empty(0, np.float32)]
    with torch.no_grad():
        for first in range(0, len(stream), 8192):
            part = stream.select(slice(first, first + 8192))
            _, batch = next(data.batches(part, *features, len(part)))
            parts.append(model(batch)[1][1].numpy())
    for value, new in zip(live, current, strict=True):
        value.copy_(new)
    model.train()
    return np.concatenate(parts)


def train(
    model: Any, optimizer: Any, feed: Iterator[Any], stream: data.Stream, logits: Array
) -> None:
    """Train for one pass without a teacher; write the logits before each update to `logits`."""
    pipeline: Any = TrainPipelineSparseDist(model, optimizer, CPU)
    for rows, (_, outputs, _) in demo.progress(pipeline, feed, stream):
        logits[rows] = outputs.numpy()
    pipeline.detach()


class PartlyLabelled(nn.Module):
    """A ranker in TorchRec's training contract whose loss masks labels that are NaN."""

    def __init__(self, ranker: nn.Module) -> None:
        super().__init__()
        self.model = ranker
        self.loss = _LabelledLoss()

    def forward(self, batch: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        loss = self.loss(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


class _LabelledLoss(nn.Module):  # a leaf for the pipeline's tracing, as it indexes by values
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        presence = ~labels.isnan()
        return nn.functional.binary_cross_entropy_with_logits(logits[presence], labels[presence])


def study_of(
    stream: data.Stream,
    features: Features,
    rates: tuple[int, float, float],
    *,
    teacher: Array | None = None,
    embeddings: Array | None = None,
    adapter: tuple[float, int] = (1e-2, 32),
    task: Task | None = None,
    memory: Array | None = None,
    history: tuple[Array, Array] | None = None,
    sizes: dict[str, Any] = demo.STUDENT,
    taught_tables: dict[str, Array] | None = None,
    first_week: int = SOURCES["promotions"].first_week,
) -> Study:
    """Return a student on a vertical as a study, for `run_pass` and the study command.

    Args:
        stream: the vertical's examples, in time order; a label that is NaN is missing.
        features: sparse and dense.
        rates: batch size, learning rate, and that of the tables.
        teacher: logits (B,) or of several teachers (B, M), NaN where there is none.
        embeddings: the teacher's, (B, E), NaN where there is none; None: without.
        adapter: the student adapter's learning rate and width.
        task: with the rate at which negatives of the stream were sampled.
        memory: further dense features, (B, D).
        history: the rows of the user's last events, -1: none, (B, L); and for each row a vector of
            the teacher (N, V) or an id (N,).
        sizes: of the ranker.
        taught_tables: tables of a teacher that the student starts from; None: its own.
        first_week: of the evaluation.
    """
    logits = np.full((len(stream), 1), np.nan, np.float32) if teacher is None else teacher
    logits = logits.reshape(len(stream), -1)
    partly = bool(np.isnan(stream.label).any())
    if memory is not None:
        remembered_columns = {f"memory_{n}": column for n, column in enumerate(memory.T)}
        stream = replace(stream, dense={**stream.dense, **remembered_columns})
        features = features[0], (*features[1], *remembered_columns)

    def make_student() -> nn.Module:
        if history is not None:
            return remembered.with_pooled_history(features, stream, sizes, history[1])
        module = models.ranker(*features, stream.cardinalities, **sizes)
        return PartlyLabelled(module.model) if partly else module

    def put_on_rank(module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = distribute(module, rates)
        if taught_tables is not None:
            start_tables(model, taught_tables)
        return model, optimizer

    def batches() -> Iterator[ExFMBatch[Any]]:
        for rows, batch in data.batches(stream, *features, rates[0]):
            values = torch.from_numpy(np.array(logits[rows])).unsqueeze(2)
            options = {}
            if history is not None:
                batch = remembered.with_history(batch, history[0][rows], history[1])
            if embeddings is not None:
                taught = torch.from_numpy(np.array(embeddings[rows]))
                options = {"embeddings": taught, "embedding_presence": ~taught[:, 0].isnan()}
            yield ExFMBatch(batch, TeacherOutputs(values, ~values.isnan(), **options))

    def make_adapter() -> tuple[StudentAdapter, torch.optim.Optimizer]:
        rate, width = adapter
        module = StudentAdapter(num_teachers=logits.shape[1], hidden=(width,))
        return module, torch.optim.Adam(module.parameters(), lr=rate, fused=True)

    def week(batch: Any) -> Array:
        return stream.week[np.searchsorted(stream.time, batch.event_seconds.numpy())]

    return Study(
        make_student=make_student,
        stream=batches,
        tap=demo.TAP,
        tasks=[task or Task()],
        teachers=("teacher", "second")[: logits.shape[1]],
        distribute=put_on_rank,
        make_adapter=make_adapter,
        groups=attrgetter("groups"),
        period=week,
        first_period=first_week,
    )
