"""A stream, window by window: each is evaluated as it is trained on, logged, scored, published.

Teacher, scorer and students go round the same windows, in processes of their own or one after the
other in one. They meet only in a teacher store, by its outputs, snapshots and watermarks, so that
each can be killed, started again or left out alone::

    teacher   for window in train_teacher(pipeline, windows, store, "fm", logger=logger): ...
    scorer    for window in score_windows(teacher, windows, store, "fm", device=device): ...
    student   for window in train_windows(pipeline, wait_for_outputs(windows, lookup)): ...

What ``progress`` returns was computed before the update, so that what ``step`` is given of a window
is of a model that has not seen it.
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
from torchrec_exfm._ranks import of_each_rank, on_rank_0
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
    """A stretch of a stream.

    Args:
        begin_seconds: of its event times, epoch seconds.
        end_seconds: the first second after it.
        data: for training this rank's batches, as many on every rank, which are taken when the
            window's turn comes; for :func:`score_windows` this rank's shards (:class:`Shard`).

    Raises:
        TypeError: for times of another kind.
        ValueError: if it does not end after it begins; for times out of range.
    """

    begin_seconds: int
    end_seconds: int
    data: Iterable[Any]

    def __post_init__(self) -> None:
        begin = as_second("begin_seconds", self.begin_seconds)
        end = as_second("end_seconds", self.end_seconds)
        if begin >= end:
            raise ValueError(f"a window should end after it begins; received {begin} and {end}")
        object.__setattr__(self, "begin_seconds", begin)  # an int, of numpy's and torch's too
        object.__setattr__(self, "end_seconds", end)


def train_windows(
    pipeline: TrainPipeline[Any, Any],
    windows: Iterable[Window],
    *,
    step: Callable[[Any], None] = lambda output: None,
    metrics: ExFMMetrics | None = None,
    folder: Path | str | None = None,
) -> Iterator[Window]:
    """Train on window after window, and yield each when it is done; called by all ranks.

    A generator: nothing happens but in a ``for`` loop, whose body is what follows a window. With a
    folder, the training is saved after the body (:func:`~torchrec_exfm.save_training`), and one
    that was killed, or left by a ``break``, goes on with the window that it was in.

    Args:
        pipeline: TorchRec's for a teacher, ``TrainPipelineExFM`` for a student.
        windows: each begins where the one before ends; the same ones when it goes on.
        step: takes what each ``progress`` returned, computed before the step's update.
        metrics: saved and taken up with the training; updating them is ``step``'s.
        folder: of the checkpoints; None: none are made.

    Raises:
        ValueError: if windows do not follow one another, or none begins where the training goes
            on; for a checkpoint of another run; if the pipeline has batches in flight between two
            windows.
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
    """:func:`train_windows` for a teacher: after each window what it said is logged, and published.

    Then the watermark of the teacher is brought to the window's end.

    Args:
        pipeline: of the teacher, in which all that is published is trained.
        windows: as for :func:`train_windows`.
        store: where it publishes, and the logger writes.
        teacher: its name.
        refresh: publishes after every so many windows.
        logger: attached to the model; None: nothing is logged, a scorer sees to all.
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
            number += 1  # of those that a run before this one trained on, too
            yield window

    for window in train_windows(pipeline, count_windows(), step=step, folder=folder):
        if logger is not None:
            logger.flush()
        last = window.end_seconds - 1
        newest = on_rank_0(lambda: newest_snapshot(store, teacher))
        known = newest is not None and newest.trained_through_seconds >= last  # and then killed
        if number % refresh == 0 and not known:
            model = pipeline_parts(pipeline).model
            publish(store, teacher, model, trained_through_seconds=last)
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
    """Score the students' examples of window after window by a teacher's snapshots, as they come.

    A window's snapshot is the newest that was trained on none of the ``delay`` windows before it;
    it is waited for until the teacher's watermark is there. A window that comes before the first
    such snapshot is left without outputs. After each window the watermark of the
    writer ``TEACHER/scores`` is brought to its end, and the window is yielded; windows that lie
    before it at the start are passed over, so that a killed job goes on.

    Args:
        model: the teacher, whose parameters are overwritten by those of its snapshots.
        windows: as for :func:`train_windows`, ``data`` this rank's :class:`Shard` s of
            examples that the teacher does not log itself.
        store: where snapshots are found, and outputs written.
        teacher: its name.
        device: where the model runs.
        delay: for how many windows a snapshot is on its way from its teacher to here; of those
            given: the first may have the newest snapshot before it.
        timeout_seconds: how long to wait for the teacher.
        options: as for :func:`score`.

    Raises:
        ValueError: if windows do not follow one another, or none begins where the scoring goes on;
            as :func:`score`; if ``delay`` is less than 0.
        TimeoutError: if the teacher's watermark does not come in time.
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
    """The windows, each given out once its outputs are in the store; called by all ranks.

    Args:
        windows: of a student.
        lookup: that of its pipeline, which is told to read anew.
        writers: whose watermarks to wait for; None: those of the look-up's teachers.
        timeout_seconds: how long.
        on_late: what to do then: ``"raise"``, or ``"mask"``: warn, and go on with what is there;
            examples without an output are masked, and counted by the look-up.

    Raises:
        ValueError: for another ``on_late``.
        TimeoutError: if a watermark does not come in time.

    Warns:
        TeacherMissingWarning: if it does not, and ``on_late`` is ``"mask"``.
    """
    if on_late not in ("raise", "mask"):
        raise ValueError(f"on_late should be 'raise' or 'mask'; received {on_late!r}")
    check_duration("timeout_seconds", timeout_seconds)
    writers = lookup.teachers if writers is None else writers
    writers = (writers,) if isinstance(writers, str) else tuple(writers)
    first = next(iter(lookup.stores.values()))
    opened = functools.cache(copy.copy)  # when it is there
    for window in windows:
        for writer in writers:
            store = lookup.stores.get(writer, first)
            at = functools.partial(opened, store)
            try:
                _wait_for_watermark(store.url, at, writer, window.end_seconds, timeout_seconds)
            except TimeoutError as late:
                if on_late == "raise":
                    raise
                warnings.warn(f"{late}; training goes on", TeacherMissingWarning, stacklevel=2)
        lookup.refresh()
        yield window


def _run_batches(pipeline: TrainPipeline[Any, Any], batches: Iterable[Any]) -> Iterator[Any]:
    """What the pipeline gives for each batch; at the end none is in flight."""
    left = (batch for batch in batches)  # TorchRec begins anew with another iterator: a loader
    _check_none_in_flight(pipeline)  # whose workers persist gives the same one each time
    take_next_iterator(pipeline)
    while True:
        try:
            output = pipeline.progress(left)
        except StopIteration:
            _check_none_in_flight(pipeline)
            return
        yield output


def _check_none_in_flight(pipeline: TrainPipeline[Any, Any]) -> None:
    in_flight = batches_in_flight(pipeline)
    if in_flight:
        raise ValueError(
            "the pipeline should have trained on every batch at a window's end; received one with "
            f"{in_flight} in flight: make it anew, with execute_all_batches=True"
        )


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} should be at least {least}, in windows; received {value}")


def _check_order(windows: Iterable[Window], before_seconds: int) -> Iterator[Window]:
    """The windows, without a gap or an overlap: with what was done before a time, neither."""
    end = None
    for window in windows:
        if end is not None and window.begin_seconds != end:
            raise ValueError(
                f"a window should begin where the one before ends, {utc(end)}; received one that "
                f"begins {utc(window.begin_seconds)}"
            )
        late = end is None and 0 < before_seconds < window.begin_seconds
        if late or window.begin_seconds < before_seconds < window.end_seconds:
            raise ValueError(
                f"a window should begin at {utc(before_seconds)}, where the run goes on; received "
                f"one from {utc(window.begin_seconds)} to {utc(window.end_seconds)}: give it the "
                "windows that it had, and those after them"
            )
        end = window.end_seconds
        yield window


def _advance_watermark(store: TeacherStore, writer: str, before_seconds: int) -> None:
    of_each_rank(None)  # all of them have written
    on_rank_0(lambda: store.advance_watermark(writer, before_seconds))


def _read_watermark(store: TeacherStore, writer: str) -> int | None:
    """The newest."""
    store.refresh()
    return store.watermark(writer)


def _wait_for_watermark(
    url: str,
    opened: Callable[[], TeacherStore],
    writer: str,
    before_seconds: int,
    timeout_seconds: float,
) -> None:
    """Until a watermark is there; else a TimeoutError, the same on every rank."""
    deadline = time.monotonic() + timeout_seconds

    def look() -> str | None:
        """What is wrong so far; the store may be out of reach for a while."""
        try:
            watermark = _read_watermark(opened(), writer)
        except StoreError as error:
            return f"could not be read: {error}"
        if (watermark or 0) >= before_seconds:
            return None
        return f"is {'not there' if watermark is None else utc(watermark)}: is its job running?"

    while (wrong := on_rank_0(look)) is not None:
        if on_rank_0(lambda: time.monotonic() > deadline):
            raise TimeoutError(
                f"{url}: {writer} should have its outputs of events before "
                f"{utc(before_seconds)} in the store; after {timeout_seconds:g} s its watermark "
                f"{wrong}"
            )
        time.sleep(_POLL_SECONDS)
