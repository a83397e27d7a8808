"""Jobs killed at any moment, and full disks: every example is stored once.

FAULT_KILLS is the number of kills per job; ``-s`` shows their moments.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import das_data as dd
import fault_jobs as jobs
import forked
import numpy as np
import pytest
import rank_models as rm
from forked import Forked

from torchrec_exfm.das import StoreError, TeacherStore
from torchrec_exfm.das.rules import Rows

KILLS = int(os.environ.get("FAULT_KILLS", "2"))
KILLS_A_ROUND = 10
ROWS = {jobs.scoring: jobs.ROWS, jobs.training: jobs.LOGGED}


class Attempts:
    """A job in a folder, restarted until it ends."""

    def __init__(self, job: jobs.Job, world_size: int, folder: Path) -> None:
        self.job = job
        self.world_size = world_size
        self.folder = folder
        self.kills: list[float] = []  # the part of the rows that was in the store
        self._started = 0
        folder.mkdir()
        jobs.make_store(folder)

    def finish(self, world_size: int) -> float:
        """Run the job to its end; return the seconds since the first commit."""
        processes = self._start(world_size)
        while self.commits() == 0 and all(fork.process.is_alive() for fork in processes):
            time.sleep(0.001)
        started = time.monotonic()
        for fork in processes:
            fork.result()
        return time.monotonic() - started

    def kill_at(self, commits: float, delay: float) -> None:
        """Start the job, and kill every rank a while after some commits, unless it has ended."""
        processes = self._start(self.world_size)
        while self.commits() < commits:
            if not all(fork.process.is_alive() for fork in processes):
                for fork in processes:
                    fork.result()  # raises what went wrong
                raise AssertionError("it ended too soon")
            time.sleep(0.001)
        time.sleep(delay)
        alive = any(fork.process.is_alive() for fork in processes)
        random.shuffle(processes)
        for fork in processes:
            fork.kill()
            time.sleep(random.choice((0.0, 0.05 * random.random())))  # the others may go on a bit
        if alive:
            self.kills.append(len(self.rows()) / ROWS[self.job])

    def commits(self) -> int:
        log = self.folder / "store" / "outputs" / "_delta_log"
        return sum(name.endswith(".json") for name in os.listdir(log)) - 1

    def rows(self) -> Rows:
        """Return the store's rows, and require each example once."""
        rows = dd.all_rows(TeacherStore(self.folder / "store"), keys=jobs.KEYS)
        jobs.assert_keys(rows)
        assert (np.diff(rows.example_id) > 0).all()
        return rows

    def _start(self, world_size: int) -> list[Forked]:
        self._started += 1
        return jobs.on_ranks(self.job, world_size, self.folder, self._started)


def assert_part_of(rows: Rows, expected: Rows, job: jobs.Job) -> None:
    """Require equal bits, except for outputs that were scored in other batches."""
    names = ["example_id", "event_time", "snapshot", "trained_through", "logged"]
    if job is jobs.scoring:
        jobs.assert_within_rounding(rm.two_task_student(), rows)
    else:  # it resumes with the same batches
        names.append("outputs")
    at = np.searchsorted(expected.example_id, rows.example_id)
    for name in names:
        column, other = getattr(rows, name), getattr(expected, name)[at]
        np.testing.assert_array_equal(column.view(np.uint8), other.view(np.uint8), name)


def spread(
    job: jobs.Job, world_size: int, folder: Path, kills: int, *, last: int | None = None
) -> None:
    """Kill a job repeatedly, at moments spread over its work.

    Then let it end on ``last`` ranks.
    """
    folder.mkdir()
    reference = Attempts(job, world_size, folder / "whole")
    seconds = reference.finish(world_size)
    commits, expected = reference.commits(), reference.rows()
    assert len(expected) == ROWS[job]
    assert_part_of(expected, expected, job)
    landed: list[float] = []
    rounds = itertools.count()  # a round lands no kill if the job ends too soon
    while len(landed) < kills:
        attempts = Attempts(job, world_size, folder / f"killed-{next(rounds)}")
        kills_of_round = min(KILLS_A_ROUND, kills - len(landed))
        for number in range(kills_of_round):
            moment = commits * (number + random.random()) / kills_of_round
            attempts.kill_at(moment, 2 * random.random() * seconds / commits)
            assert_part_of(attempts.rows(), expected, job)
        attempts.finish(last or world_size)
        rows, end = attempts.rows(), attempts.commits()
        assert len(rows) == len(expected)
        assert_part_of(rows, expected, job)
        landed += attempts.kills
    attempts.finish(world_size)  # a second run has nothing left to do
    assert attempts.commits() == end
    shown = " ".join(f"{part:.0%}" for part in landed)
    print(
        f"\n{job.__name__} on {world_size}: {seconds:.1f} s, killed with {shown} of the rows there"
    )


def test_a_scoring_job_killed_at_any_moment(tmp_path: Path) -> None:
    spread(jobs.scoring, 2, tmp_path / "scoring", KILLS, last=1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_that_logs_killed_at_any_moment(tmp_path: Path, world_size: int) -> None:
    spread(jobs.training, world_size, tmp_path / "training", max(1, KILLS // 2))


# ---- Full disks ----


@pytest.mark.parametrize(
    ("rows", "name", "limit"),
    [(5_000, "a", 1_000), (1, "a" * 20_000, 8_000)],
    ids=["for the data", "for the log"],
)
def test_a_full_disk(tmp_path: Path, rows: int, name: str, limit: int) -> None:
    Forked(jobs.write_to_a_full_disk, tmp_path, rows, name, limit).result()


@pytest.mark.parametrize(
    "check",
    [
        jobs.write_where_a_log_checkpoint_does_not_fit,
        jobs.log_to_a_full_disk,
        jobs.publish_to_a_full_disk,
        jobs.create_on_a_full_disk,
    ],
    ids=lambda check: check.__name__,
)
def test_a_full_disk_elsewhere(tmp_path: Path, check: jobs.Job) -> None:
    Forked(check, tmp_path).result()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up(small_disk: Path) -> None:
    store = dd.new_store(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))

    def write(number: int) -> int:
        ids = np.arange(2_000) + 2_000 * number
        values = np.random.default_rng(number).random(2_000, np.float32)
        seconds = dd.AT + ids % 100
        return store.write(dd.snapshot(), ids, values, seconds, shard=str(number)).written

    written = 0
    with pytest.raises(StoreError, match="can't be written to, and nothing of this shard") as at:
        while written < 100:
            write(written)
            written += 1
    assert store.table.url in dd.sentence(at.value) and written > 1
    assert len(dd.by_id(store)) == 2_000 * written
    ballast.unlink()
    assert write(written) == 2_000
    assert len(dd.by_id(store)) == 2_000 * (written + 1)


def test_forked_processes_tell_what_went_wrong(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"Traceback(.|\n)*No such file"):
        Forked(os.listdir, tmp_path / "none").result()
    with pytest.raises(AssertionError, match="the process died"):
        forked.Forked(os._exit, 3).result()
