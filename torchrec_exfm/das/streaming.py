"""Training on a stream, span by span: evaluate while training, log, score and publish.

A :class:`Window` is a span of the stream. Its bounds need not be those of the windows in a store,
which are the unit that a store is read in.

Teacher, scorer and students go through the same spans, each in a process of its own, or one after
the other in one process. They exchange outputs, snapshots and watermarks through a teacher store
only. So each can be killed, restarted or left out without the others::

    teacher   for window in train_teacher(pipeline, windows, store, "fm", logger=logger): ...
    scorer    for window in score_windows(teacher, windows, store, "fm", device=device): ...
    student   for window in train_windows(pipeline, wait_for_outputs(windows, lookup)): ...

``progress`` returns what was computed before the update. So ``step`` receives outputs of a model
that has not been trained on their examples.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipeline

from torchrec_exfm._compat import batches_in_flight, pipeline_parts, take_next_iterator
from torchrec_exfm._ranks import gather_from_ranks, on_rank_0
from torchrec_exfm._warnings import TeacherMissingWarning
from torchrec_exfm.das.arrays import as_second, check_duration, utc
from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.logger import TeacherLogger
from torchrec_exfm.das.lookup import TeacherLookup
from torchrec_exfm.das.schema import Snapshot
from torchrec_exfm.das.scoring import score
from torchrec_exfm.das.snapshots import load_snapshot, newest_snapshot, publish
from torchrec_exfm.das.store import TeacherStore
from torchrec_exfm.metrics import ExFMMetrics
from torchrec_exfm.resume import load_training, save_training

__all__ = ["Window", "score_windows", "train_teacher", "train_windows", "wait_for_outputs"]

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Window:
    """A span of a training stream, of any length in event time.

    Args:
        begin_seconds: first event time of the span, epoch seconds.
        end_seconds: first second after the span.
        data: for training, this rank's batches, which are iterated when the span's turn comes, and
            are as many on every rank; for :func:`score_windows`, this rank's shards
            (:class:`Shard`).

    Raises:
        TypeError: for times of a wrong type.
        ValueError: if the span does not end after it begins; for times out of range.
    """

    begin_seconds: int
    end_seconds: int
    data: Iterable[Any]

    def __post_init__(self) -> None:
        begin = as_second("begin_seconds", self.begin_seconds)
        end = as_second("end_seconds", self.end_seconds)
        if begin >= end:
            raise ValueError(f"a window should end after it begins; received {begin} and {end}")
        object.__setattr__(self, "begin_seconds", begin)  # an int, also from numpy or torch
        object.__setattr__(self, "end_seconds", end)


def train_windows(
    pipeline: TrainPipeline[Any, Any],
    windows: Iterable[Window],
    *,
    step: Callable[[Any], None] = lambda output: None,
    metrics: ExFMMetrics | None = None,
    folder: Path | str | None = None,
) -> Iterator[Window]:
    """Train on one span after another, and yield each when it is done; called by all ranks.

    This is a generator: iterate it in a ``for`` loop, whose body runs after each span. With a
    folder, the training is saved after the body (:func:`~torchrec_exfm.save_training`). A run that
    was killed, or left by a ``break``, resumes with the span that it was in.

    Args:
        pipeline: TorchRec's pipeline for a teacher, ``TrainPipelineExFM`` for a student.
        windows: spans, each beginning where the one before ends; pass the same ones to resume.
        step: function called with each result of ``progress``, computed before the step's update.
        metrics: saved and restored with the training; ``step`` should update them.
        folder: folder of the checkpoints; None: save none.

    Raises:
        ValueError: if spans have a gap or an overlap, or none begins where the training resumes;
            for a checkpoint of another run; if the pipeline has batches in flight between two
            spans.
    """
    position = load_training(folder, pipeline, metrics=metrics) if folder is not None else None
    if position is not None and position.keys() != {"before_seconds"}:
        raise ValueError(
            f"{folder} should be of a run of train_windows; received one at the position {position}"
        )
    before_seconds = position["before_seconds"] if position is not None else 0
    for window in _check_order(windows, before_seconds):
        if window.end_seconds <= before_seconds:
            continue
        for output in _run_batches(pipeline, window.data):
            step(output)
        yield window
        # Saved after the loop's body: a run that was killed in the body repeats the span with it.
        if folder is not None:
            position = {"before_seconds": window.end_seconds}
            save_training(folder, pipeline, position=position, metrics=metrics)


def train_teacher(
    pipeline: TrainPipeline[Any, Any],
    windows: Iterable[Window],
    store: TeacherStore,
    teacher: str,
    *,
    refresh: int = 1,
    logger: TeacherLogger | None = None,
    step: Callable[[Any], None] = lambda output: None,
    folder: Path | str | None = None,
) -> Iterator[Window]:
    """Train a teacher by :func:`train_windows`; log its outputs and publish its snapshots.

    After a span the logger is flushed, a snapshot is published if it is due, and then the teacher's
    watermark is advanced to the end of the span.

    Args:
        pipeline: the teacher's pipeline, whose model is published.
        windows: as for :func:`train_windows`.
        store: the store to publish in, which the logger writes to.
        teacher: the teacher's name.
        refresh: publish a snapshot after every so many spans (``windows``).
        logger: a logger attached to the model; None: log nothing, and leave all examples to a
            scorer.
        step: as for :func:`train_windows`.
        folder: as for :func:`train_windows`.

    Raises:
        ValueError: as :func:`train_windows`, :meth:`TeacherLogger.flush` and :func:`publish`; if
            ``refresh`` is less than 1.
        StoreError: if the store can't be read or written.
    """
    _check_count("refresh", refresh, 1)
    number = 0

    def count_windows() -> Iterator[Window]:
        nonlocal number
        for window in windows:
            # Spans that an earlier run trained on count too: a resumed run publishes at the same.
            number += 1
            yield window

    for window in train_windows(pipeline, count_windows(), step=step, folder=folder):
        if logger is not None:
            logger.flush()
        last_second = window.end_seconds - 1
        newest = on_rank_0(lambda: newest_snapshot(store, teacher))
        # A run that was killed after it published this span trains on it again.
        is_published = newest is not None and newest.trained_through_seconds >= last_second
        if number % refresh == 0 and not is_published:
            model = pipeline_parts(pipeline).model
            publish(store, teacher, model, trained_through_seconds=last_second)
        # Last: who waits for the watermark then finds the outputs and the snapshot.
        _advance_watermark(store, teacher, window.end_seconds)
        yield window


def score_windows(
    model: nn.Module,
    windows: Iterable[Window],
    store: TeacherStore,
    teacher: str,
    *,
    device: torch.device,
    delay: int = 0,
    timeout_seconds: float = 600.0,
    **options: Any,
) -> Iterator[Window]:
    """Score the students' examples span by span, by a teacher's snapshots as they are published.

    A span is scored by the newest snapshot that was trained neither on it nor on the ``delay``
    spans before it. The job waits for the teacher's watermark, so that this snapshot is published.
    A span before the first such snapshot gets no outputs.

    After each span the watermark of the writer ``TEACHER/scores`` is advanced to its end, and the
    span is yielded. A job that was killed resumes there: it skips the spans before that watermark.

    Args:
        model: the teacher; its parameters are overwritten by those of its snapshots.
        windows: as for :func:`train_windows`, with ``data`` this rank's shards (:class:`Shard`) of
            examples that the teacher does not log itself.
        store: the store to load snapshots from and to write outputs to.
        teacher: the teacher's name.
        device: the device that the model runs on.
        delay: number of spans that a snapshot takes to get here from its teacher. It counts the
            spans in ``windows`` only: the first may be scored by the newest snapshot before it.
        timeout_seconds: how long to wait for the teacher.
        options: as for :func:`score`.

    Raises:
        ValueError: if spans have a gap or an overlap, or none begins where the scoring resumes; as
            :func:`score`; if ``delay`` is less than 0.
        TimeoutError: if the teacher's watermark does not advance in time.
    """
    _check_count("delay", delay, 0)
    check_duration("timeout_seconds", timeout_seconds)
    begins: deque[int] = deque(maxlen=delay + 1)
    loaded: Snapshot | None = None
    writer = f"{teacher}/scores"
    before_seconds = on_rank_0(lambda: _read_watermark(store, writer)) or 0
    for window in _check_order(windows, before_seconds):
        begins.append(window.begin_seconds)
        if window.end_seconds <= before_seconds:
            continue
        _wait_for_watermark(store.url, lambda: store, teacher, begins[0], timeout_seconds)
        snapshot = on_rank_0(lambda: newest_snapshot(store, teacher, before_seconds=begins[0]))
        if snapshot is not None:
            if snapshot != loaded:
                load_snapshot(store, snapshot, model)
            loaded = snapshot
            score(model, store, window.data, snapshot, device=device, **options)
        _advance_watermark(store, writer, window.end_seconds)
        yield window


def wait_for_outputs(
    windows: Iterable[Window],
    lookup: TeacherLookup,
    writers: str | Sequence[str] | None = None,
    *,
    timeout_seconds: float = 600.0,
    on_late: Literal["raise", "mask"] = "raise",
) -> Iterator[Window]:
    """Yield each span once its outputs are in the store; called by all ranks.

    Args:
        windows: spans of a student's stream.
        lookup: the look-up of the student's pipeline, which is refreshed before each span.
        writers: names of the writers whose watermarks to wait for; None: the look-up's teachers.
        timeout_seconds: how long to wait for each watermark.
        on_late: what to do after that time: ``"raise"``; or ``"mask"``, to warn and continue with
            the outputs that are there. The look-up masks and counts examples without one.

    Raises:
        ValueError: for another ``on_late``.
        TimeoutError: if a watermark does not advance in time and ``on_late`` is ``"raise"``.

    Warns:
        TeacherMissingWarning: if a watermark does not advance in time and ``on_late`` is
            ``"mask"``.
    """
    if on_late not in ("raise", "mask"):
        raise ValueError(f"on_late should be 'raise' or 'mask'; received {on_late!r}")
    check_duration("timeout_seconds", timeout_seconds)
    writers = lookup.teachers if writers is None else writers
    writers = (writers,) if isinstance(writers, str) else tuple(writers)
    first_store = next(iter(lookup.stores.values()))
    # Copies, since the look-up's threads use its own stores. Opened at the first use, within the
    # wait, so that a store that is out of reach is waited for.
    open_copy = functools.cache(copy.copy)
    for window in windows:
        for writer in writers:
            store = lookup.stores.get(writer, first_store)
            opened = functools.partial(open_copy, store)
            try:
                _wait_for_watermark(store.url, opened, writer, window.end_seconds, timeout_seconds)
            except TimeoutError as error:
                if on_late == "raise":
                    raise
                warnings.warn(f"{error}; training goes on", TeacherMissingWarning, stacklevel=2)
        lookup.refresh()
        yield window


def _run_batches(pipeline: TrainPipeline[Any, Any], batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the pipeline's result for each batch; no batch is in flight before and after."""
    # TorchRec starts over only for another iterator object, and a data loader with persistent
    # workers returns the same one each time: so wrap it.
    iterator = (batch for batch in batches)
    _check_none_in_flight(pipeline)
    take_next_iterator(pipeline)
    while True:
        try:
            output = pipeline.progress(iterator)
        except StopIteration:
            _check_none_in_flight(pipeline)
            return
        yield output


def _check_none_in_flight(pipeline: TrainPipeline[Any, Any]) -> None:
    in_flight = batches_in_flight(pipeline)
    if in_flight:
        raise ValueError(
            "the pipeline should have trained on every batch at a window's end; received one with "
            f"{in_flight} in flight: make a new one, with execute_all_batches=True"
        )


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} should be at least {least}, in windows; received {value}")


def _check_order(windows: Iterable[Window], before_seconds: int) -> Iterator[Window]:
    """Yield the spans; raise if there is a gap or an overlap, between them or with an earlier run.

    ``before_seconds`` is the time that an earlier run has done all before; 0: there was none.
    """
    end = None
    for window in windows:
        if end is not None and window.begin_seconds != end:
            raise ValueError(
                f"a window should begin where the one before ends, {utc(end)}; received one that "
                f"begins {utc(window.begin_seconds)}"
            )
        leaves_gap = end is None and 0 < before_seconds < window.begin_seconds
        if leaves_gap or window.begin_seconds < before_seconds < window.end_seconds:
            raise ValueError(
                f"a window should begin at {utc(before_seconds)}, where the run resumes; received "
                f"one from {utc(window.begin_seconds)} to {utc(window.end_seconds)}: pass the same "
                "windows as before, and those after them"
            )
        end = window.end_seconds
        yield window


def _advance_watermark(store: TeacherStore, writer: str, before_seconds: int) -> None:
    gather_from_ranks(None)  # a barrier: a watermark promises the rows of all ranks
    on_rank_0(lambda: store.advance_watermark(writer, before_seconds))


def _read_watermark(store: TeacherStore, writer: str) -> int | None:
    """Return a writer's watermark at the newest commit; None: it has none."""
    store.refresh()
    return store.watermark(writer)


def _wait_for_watermark(
    url: str,
    opened: Callable[[], TeacherStore],
    writer: str,
    before_seconds: int,
    timeout_seconds: float,
) -> None:
    """Wait until a watermark reaches a time; raise the same TimeoutError on every rank if not."""
    deadline = time.monotonic() + timeout_seconds

    def describe_lag() -> str | None:
        """Return what is missing so far; None: the watermark is there."""
        try:
            watermark = _read_watermark(opened(), writer)
        except StoreError as error:  # the store may be out of reach for a while: keep waiting
            return f"could not be read: {error}"
        if (watermark or 0) >= before_seconds:
            return None
        return f"is {'not there' if watermark is None else utc(watermark)}: is its job running?"

    while (lag := on_rank_0(describe_lag)) is not None:
        if on_rank_0(lambda: time.monotonic() > deadline):  # rank 0's clock decides for all
            raise TimeoutError(
                f"{url}: {writer} should have its outputs of events before "
                f"{utc(before_seconds)} in the store; after {timeout_seconds:g} s its watermark "
                f"{lag}"
            )
        time.sleep(_POLL_SECONDS)
