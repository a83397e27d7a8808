"""The loop over a stream: teacher, scorer and students, window by window.

FAULT_KILLS is the number of kills of the jobs that run side by side.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import das_data as dd
import fault_jobs
import numpy as np
import pytest
import stream_jobs as jobs
import torch
from models import hand_train, make_hand_batch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from torchrec_exfm import TeacherMissingWarning
from torchrec_exfm._compat import batches_in_flight
from torchrec_exfm.das import (
    Snapshot,
    TeacherLookup,
    TeacherStore,
    Window,
    published,
    score_windows,
    streaming,
    train_teacher,
    train_windows,
    wait_for_outputs,
)
from torchrec_exfm.das.__main__ import main

KILLS = int(os.environ.get("FAULT_KILLS", "2"))


class Role:
    """A job on its ranks, restarted until it ends."""

    attempts = itertools.count()

    def __init__(self, name: str, folder: Path) -> None:
        self.job, self.world_size = jobs.JOBS[name]
        self.folder = folder
        self.start()

    def start(self) -> None:
        attempt = next(self.attempts)
        self.processes = fault_jobs.on_ranks(self.job, self.world_size, self.folder, attempt)

    def kill(self) -> bool:
        """Kill all ranks in random order; return False if the job had ended."""
        running = all(fork.process.is_alive() for fork in self.processes)
        for fork in random.sample(self.processes, len(self.processes)):
            fork.kill()
        return running

    def result(self) -> list[Any]:
        return [fork.result() for fork in self.processes]


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run teacher, scorer and student one after another; return the folder."""
    folder = tmp_path_factory.mktemp("stream") / "whole"
    jobs.make_store(folder)
    for name in "teacher", "scorer":
        Role(name, folder).result()
    return folder


def test_side_by_side_and_killed(one_after_the_other: Path, tmp_path: Path) -> None:
    """Outputs, snapshots and the student do not depend on who is ahead or killed.

    Logged outputs are equal to the bit, as their batches are the same by construction. So is the
    student, compared with an undisturbed one on the same store. Scored outputs come from batches of
    what was left, and are compared with float64.
    """
    folder = tmp_path / "killed"
    jobs.make_store(folder)
    roles = {name: Role(name, folder) for name in random.sample(list(jobs.JOBS), len(jobs.JOBS))}
    killed = []
    for _ in range(KILLS):
        time.sleep(1.5 * random.random())
        name = random.choice(list(roles))
        if roles[name].kill():
            killed.append((name, TeacherStore(folder / "store").watermark("fm")))
        roles[name].start()
    for name in jobs.JOBS:
        if name != "student":
            roles[name].result()
    student_digests = roles["student"].result()
    shutil.rmtree(folder / "student")
    assert student_digests == Role("student", folder).result()
    straight = one_after_the_other
    assert without_scores(jobs.rows_of(folder)) == without_scores(jobs.rows_of(straight))
    for path in folder, straight:
        jobs.assert_scores(path)
    assert published(TeacherStore(folder / "store"), "fm") == published(
        TeacherStore(straight / "store"), "fm"
    )
    print(f"\nkilled, and the teacher's watermark: {killed}")


def without_scores(rows: dict[int, jobs.Row]) -> dict[int, jobs.Row]:
    """Return the rows, without the outputs of scored ones."""
    return {id_: row if row.logged else row._replace(outputs=[]) for id_, row in rows.items()}


def test_who_says_what(one_after_the_other: Path) -> None:
    """With refresh and delay each window's rows are of the expected snapshot."""
    store = TeacherStore(one_after_the_other / "store")
    ends = [jobs.START + n * jobs.SECONDS for n in range(jobs.WINDOWS + 1)]
    through = [snapshot.trained_through_seconds for snapshot in published(store, "fm")]
    assert through == [ends[2] - 1, ends[4] - 1, ends[6] - 1]  # every second window
    assert store.watermark("fm") == store.watermark("fm/scores") == ends[-1]
    data = jobs.Data()
    rows = jobs.rows_of(one_after_the_other)
    newest = [None, None, None, 1, 1, 2]  # of those trained through the window before the last
    for position, (id_, second) in enumerate(zip(data.ids.tolist(), data.seconds, strict=True)):
        window = (int(second) - jobs.START) // jobs.SECONDS
        if position % 4:
            assert rows.pop(id_)[:2] == (window // 2, True)
        elif newest[window] is None:
            assert id_ not in rows
        else:
            assert rows.pop(id_)[:2] == (newest[window], False)
    assert not rows


class Counting:
    """A stand-in for a pipeline: a step returns its batch."""

    batches = ()  # none in flight

    def __init__(self) -> None:
        self._model = nn.Linear(1, 1)
        self._optimizer = self._device = None

    def progress(self, batches: Iterator[Any]) -> Any:
        return next(batches)


def pipeline() -> Any:
    return Counting()


def windows(*parts: Iterable[Any], begin: int = 100) -> Iterator[Window]:
    for number, part in enumerate(parts):
        yield Window(begin + 10 * number, begin + 10 * (number + 1), part)


def test_torchrecs_other_pipelines_pass_from_window_to_window() -> None:
    """TrainPipelineBase needs a reset for a new iterator, and holds its batch elsewhere."""
    model = hand_train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    base: Any = TrainPipelineBase(model, optimizer, torch.device("cpu"))
    seen: list[Any] = []
    parts = [[make_hand_batch(2 * number + i, 8) for i in range(2)] for number in range(3)]
    assert len(list(train_windows(base, windows(*parts), step=seen.append))) == 3
    assert len(seen) == 6 and batches_in_flight(base) == 0
    base.reset()
    base.progress(iter(parts[0]))
    assert batches_in_flight(base) == 1
    with pytest.raises(ValueError, match="1 in flight"):
        list(train_windows(base, windows(*parts)))


def test_every_batch_of_every_window_is_a_step() -> None:
    seen: list[Any] = []
    ended = []
    for window in train_windows(pipeline(), windows("ab", "", "c"), step=seen.append):
        ended.append((window.end_seconds, "".join(seen)))
    assert ended == [(110, "ab"), (120, "ab"), (130, "abc")]


def test_a_window_is_asked_for_when_its_turn_comes() -> None:
    asked: list[str] = []

    def batches(name: str) -> Iterator[str]:
        asked.append(name)
        yield name

    def lazily() -> Iterator[Window]:
        for number, name in enumerate("ab"):
            asked.append(f"window {name}")
            yield Window(number, number + 1, batches(name))

    for window in train_windows(pipeline(), lazily()):
        asked.append(f"end {window.end_seconds}")
    assert asked == ["window a", "a", "end 1", "window b", "b", "end 2"]


def test_windows_follow_one_another() -> None:
    apart = [Window(0, 10, ""), Window(11, 20, "")]
    over = [Window(0, 10, ""), Window(9, 20, "")]
    for wrong in apart, over:
        with pytest.raises(ValueError, match=r"begin where the one before ends, 1970.*:10Z; rec"):
            list(train_windows(pipeline(), wrong))
    for begin, end in (5, 4), (5, 5):
        with pytest.raises(ValueError, match=f"end after it begins; received {begin} and {end}"):
            Window(begin, end, ())
    window = Window(cast(Any, np.int64(1)), cast(Any, torch.tensor(2)), ())
    assert [type(bound) for bound in (window.begin_seconds, window.end_seconds)] == [int, int]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the stand-in for a checkpoint: the position."""
    position: dict[str, int] = {}

    def save(*_: Any, position: dict[str, int], **__: Any) -> None:
        saved.update(position)

    saved = position
    monkeypatch.setattr(streaming, "save_training", save)
    monkeypatch.setattr(streaming, "load_training", lambda *_, **__: saved or None)
    return saved


def test_a_run_that_stopped_goes_on_with_the_window_that_it_was_in(saved: dict[str, int]) -> None:
    seen: list[Any] = []
    for window in train_windows(pipeline(), windows("a", "b", "c"), step=seen.append, folder="x"):
        if window.end_seconds == 120:
            break  # before it is saved
    assert saved == {"before_seconds": 110}
    ends = [w.end_seconds for w in train_windows(pipeline(), windows("a", "b", "c"), folder="x")]
    assert ends == [120, 130]
    assert not list(train_windows(pipeline(), windows("a", "b", "c"), folder="x"))


def test_a_run_goes_on_without_a_gap_and_trains_on_nothing_twice(saved: dict[str, int]) -> None:
    """Also if the windows differ from before, or their iterator was partly read."""
    saved["before_seconds"] = 110
    longer = [Window(100, 115, "ab")]
    for wrong in longer, windows("b", begin=120):
        with pytest.raises(
            ValueError, match=r":01:50Z, where the run resumes; received one from .* to"
        ):
            list(train_windows(pipeline(), wrong, folder="x"))
    assert len(list(train_windows(pipeline(), [Window(110, 111, "")], folder="x"))) == 1
    saved.clear()
    saved["step"] = 3
    with pytest.raises(ValueError, match=r"run of train_windows; received .*{'step': 3}"):
        next(train_windows(pipeline(), windows("a"), folder="x"))


class Rewound:
    """Like a data loader with persistent workers: returns the same iterator each time."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)

    def __iter__(self) -> Iterator[Any]:
        self.left = iter(self.batches)
        return self

    def __next__(self) -> Any:
        return next(self.left)


def test_torchrecs_pipeline_trains_on_every_batch_of_every_window() -> None:
    """Windows have new iterators and any length; batches left in flight are refused."""
    batch = torch.zeros(1)
    model = nn.Linear(1, 1)
    model.forward = lambda batch: (batch.sum() * model.weight.sum(), batch)  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    once = Rewound([batch, batch])
    parts = [[], [batch], once, once, [], [batch] * 5, []]
    for options in {}, {"execute_all_batches": False}:
        seen: list[Any] = []
        torchrecs: Any = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"), **options)
        if not options:
            ends = train_windows(torchrecs, windows(*parts), step=seen.append)
            assert [len(seen) for _ in ends] == [0, 1, 3, 5, 5, 10, 10]
            continue
        with pytest.raises(ValueError, match=r"every batch at a window's end; rec.* 1 in flight"):
            list(train_windows(torchrecs, windows([batch]), step=seen.append))
        with pytest.raises(ValueError, match="1 in flight: make a new one"):  # nor taken up
            next(train_windows(torchrecs, windows([batch])))
        assert not seen


def test_a_teacher_publishes_logs_and_moves_its_watermark(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    flushed = []
    logger = cast(Any, SimpleNamespace(flush=lambda: flushed.append(store.watermark("fm"))))
    marks = []
    stream = windows("a", "b", "c", "d", "e")
    for _ in train_teacher(pipeline(), stream, store, "fm", refresh=2, logger=logger):
        store.refresh()
        marks.append((store.watermark("fm"), len(published(store, "fm"))))
    assert marks == [(110, 0), (120, 1), (130, 1), (140, 2), (150, 2)]
    assert flushed == [None, 110, 120, 130, 140]  # before the watermark says so
    assert [s.trained_through_seconds for s in published(store, "fm")] == [119, 139]


def test_a_teacher_that_was_killed_after_it_published_does_not_again(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    for _ in range(2):  # from the beginning, as without a checkpoint
        assert len(list(train_teacher(pipeline(), windows("a", "b"), store, "fm"))) == 2
        assert [s.version for s in published(store, "fm")] == [1, 2]


def test_bad_counts(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    with pytest.raises(ValueError, match="refresh should be at least 1, in windows; received 0"):
        next(train_teacher(pipeline(), (), store, "fm", refresh=0))
    with pytest.raises(ValueError, match="delay should be at least 0, in windows; received -1"):
        next(score_windows(nn.Linear(1, 1), (), store, "fm", device=torch.device("cpu"), delay=-1))


def test_a_scorer_whose_teacher_does_not_come(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    waiting = score_windows(
        nn.Linear(1, 1),
        windows([]),
        store,
        "fm",
        device=torch.device("cpu"),
        timeout_seconds=0.0,
    )
    with pytest.raises(TimeoutError, match=r"fm should have.*watermark is not there: is its job"):
        next(waiting)


def test_a_scorer_goes_on_without_a_gap(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    store.advance_watermark("fm", 200)

    def scored(windows: Iterable[Window], delay: int = 0) -> list[int]:
        model, cpu = nn.Linear(1, 1), torch.device("cpu")
        ends = score_windows(model, windows, store, "fm", device=cpu, delay=delay)
        return [window.end_seconds for window in ends]

    assert scored(windows([]), delay=9) == [110]  # more than there are
    for wrong in [Window(100, 115, [])], windows([], begin=120):
        with pytest.raises(ValueError, match=r":01:50Z, where the run resumes; received one from"):
            scored(wrong)
    assert scored(windows([], [], [])) == [120, 130]
    assert scored(windows([], [], [])) == []


def look_up(lookup: TeacherLookup, *ids: int) -> list[bool]:
    seconds = torch.tensor([100 + id_ for id_ in ids])
    batch = SimpleNamespace(example_ids=torch.tensor(ids), event_seconds=seconds)
    return lookup(batch).presence.flatten().tolist()


def test_two_ranks_stop_waiting_together(tmp_path: Path) -> None:
    """Both get the same error, whatever the clock of one says."""
    folder = tmp_path / "waiting"
    jobs.make_store(folder)
    processes = fault_jobs.on_ranks(jobs.waiting, 2, folder, 0)
    first, second = (process.result() for process in processes)
    assert "fm should have" in first and "its watermark is 1970-01-01T00:16:40Z" in first
    assert second == first


def write(store: TeacherStore, *ids: int) -> None:
    store.write(Snapshot("fm", 1, 50), ids, [0.5] * len(ids), [100 + id_ for id_ in ids])


def test_a_student_sees_all_of_a_window_once_it_is_there(tmp_path: Path) -> None:
    """Also if part of the store's window was read before the rest came."""
    store = dd.new_store(tmp_path, window_seconds=1_000)
    lookup = TeacherLookup(store, "fm", refresh_seconds=None)
    waiting = wait_for_outputs(windows("a", "b"), lookup, timeout_seconds=0.0)
    write(store, 1, 2)
    store.advance_watermark("fm", 110)
    assert next(waiting).data == "a"
    assert look_up(lookup, 1, 2) == [True, True]
    write(store, 11)
    assert look_up(lookup, 11) == [False]  # it was read before
    store.advance_watermark("fm", 120)
    assert next(waiting).data == "b"
    assert look_up(lookup, 1, 11) == [True, True]


def test_outputs_that_come_late(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    store.advance_watermark("fm", 110)
    lookup = TeacherLookup(store, "fm")
    late = r"fm/scores should have .* before 1970-01-01T00:01:50Z .* watermark is not there"
    both = ("fm", "fm/scores")
    with pytest.raises(TimeoutError, match=late):
        next(wait_for_outputs(windows("a"), lookup, both, timeout_seconds=0.0))
    stream = windows("a", "b")
    masked = wait_for_outputs(stream, lookup, both, timeout_seconds=0.0, on_late="mask")
    with pytest.warns(TeacherMissingWarning, match=f"{late}.*training goes on"):
        assert next(masked).data == "a"
    assert look_up(lookup, 1) == [False]
    write(store, 1)
    for writer in both:
        store.advance_watermark(writer, 120)
    assert next(masked).data == "b"  # and no warning
    assert look_up(lookup, 1) == [True]  # which was late
    with pytest.raises(TimeoutError, match=r"fm/sco should have"):  # one name is not its letters
        next(wait_for_outputs(windows("a"), lookup, "fm/sco", timeout_seconds=0.0))
    with pytest.raises(ValueError, match="on_late should be 'raise' or 'mask'; received 'wait'"):
        next(wait_for_outputs((), lookup, on_late=cast(Any, "wait")))


def test_watermarks(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    other = TeacherStore(tmp_path)
    assert store.watermark("a") is None
    store.advance_watermark("a", 10)
    other.advance_watermark("a", 7)  # never falls
    other.advance_watermark("b", 5)
    assert (store.watermark("a"), store.watermark("b")) == (10, None)  # as of what is read
    store.refresh()
    assert (store.watermark("a"), store.watermark("b")) == (10, 5)
    assert not list(tmp_path.rglob("*.parquet"))
    for wrong in "", None:
        with pytest.raises(ValueError, match=f"should have a name; received {wrong!r}"):
            store.advance_watermark(cast(Any, wrong), 1)


def test_watermarks_outlast_the_log(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path)
    options = {"delta.checkpointInterval": "3", "delta.logRetentionDuration": "interval 0 seconds"}
    dd.edit_log(store, 0, "metaData", lambda data: data["configuration"].update(options))
    store, reader, writer = TeacherStore(tmp_path), TeacherStore(tmp_path), TeacherStore(tmp_path)
    writer.advance_watermark("fm/scores", 1)
    for second in range(1, 9):
        write(store, second)
        store.advance_watermark("fm", second)
    assert list(tmp_path.rglob("*.checkpoint.parquet"))
    assert main(["compact", str(tmp_path), "--vacuum-hours", "0"]) == 0
    delta = TeacherStore(tmp_path).table.delta
    delta.create_checkpoint()
    delta.cleanup_metadata()
    assert len(list(tmp_path.glob("outputs/_delta_log/*.json"))) == 1
    writer.advance_watermark("fm/scores", 2)  # whose last look was before all that
    for view in reader, TeacherStore(tmp_path):
        view.refresh()
        assert (view.watermark("fm"), view.watermark("fm/scores")) == (8, 2)
    for command in "show", "verify":
        assert main([command, str(tmp_path)]) == 0
