"""A student's training that is killed at any moment resumes as if nothing had happened.

FAULT_KILLS is the number of kills; ``-s`` shows their moments.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from functools import partial
from pathlib import Path

import fault_jobs
import resume_jobs as jobs
import torch
from forked import Forked

KILLS = int(os.environ.get("FAULT_KILLS", "2"))
KILLS_A_ROUND = 10
SAVES = jobs.STEPS // jobs.SAVE_STEPS


class Attempts:
    """The training in a folder, restarted until it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kills: list[int] = []  # the newest checkpoint at each
        self._started = 0
        (folder / "checkpoints").mkdir(parents=True)

    def run(self, world_size: int, job: fault_jobs.Job = jobs.training) -> list[jobs.End]:
        """Run the training to its end; return each rank's final state."""
        return [process.result() for process in self._start(world_size, job)]

    def kill_after(self, saves: int, seconds: float) -> bool:
        """Start it and kill both ranks a while after some saves; False if it ended before."""
        wanted = self.newest() + saves
        processes = self._start(2, jobs.training)
        while self.newest() < wanted and all(fork.process.is_alive() for fork in processes):
            time.sleep(0.001)
        time.sleep(seconds)
        running = all(fork.process.is_alive() for fork in processes)
        random.shuffle(processes)
        for fork in processes:
            if running:
                fork.kill()
                time.sleep(random.choice((0.0, 0.05 * random.random())))  # the other may go on
            else:
                fork.result()  # raises what went wrong
        self.kills += [self.newest()] * running
        return running

    def newest(self) -> int:
        """Return the number of the newest complete checkpoint; 0 for none."""
        folder = self.folder / "checkpoints"
        names = [name for name in os.listdir(folder) if (folder / name / "metadata.json").exists()]
        return max(map(int, names), default=0)

    def _start(self, world_size: int, job: fault_jobs.Job) -> list[Forked]:
        self._started += 1
        return fault_jobs.on_ranks(job, world_size, self.folder, self._started)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Weights, states, metrics and random numbers end equal to the bit."""
    expected = Attempts(tmp_path / "whole").run(2)
    between_saves = expected[0].seconds / SAVES
    landed: list[int] = []
    rounds = itertools.count()  # a round lands no kill if the training ends too soon
    while len(landed) < KILLS:
        attempts = Attempts(tmp_path / f"killed-{next(rounds)}")
        kills_of_round = min(KILLS_A_ROUND, KILLS - len(landed))
        while len(attempts.kills) < kills_of_round:
            saves = random.randint(0, 2 * SAVES // (KILLS_A_ROUND + 1))
            if not attempts.kill_after(saves, 2 * between_saves * random.random()):
                break
        ends = attempts.run(2)
        assert [end.everything for end in ends] == [end.everything for end in expected]
        for end, straight in zip(ends, expected, strict=True):
            assert end.losses == straight.losses[len(straight.losses) - len(end.losses) :]
        landed += attempts.kills
    print(f"\nkilled after {landed} of {SAVES} saves, {between_saves:.2f} s apart")


def test_resumed_on_another_number_of_ranks(tmp_path: Path) -> None:
    """The losses are, to six digits, those of a training on one rank from beginning to end."""
    half = partial(jobs.training, steps=jobs.STEPS // 2, save_steps=jobs.STEPS // 2)
    rest = partial(jobs.training, save_steps=jobs.STEPS)
    straight = _losses(Attempts(tmp_path / "straight").run(1, rest))
    for before, after, sharding in [(2, 1, "table_wise"), (1, 2, "row_wise")]:
        attempts = Attempts(tmp_path / sharding)
        losses = [
            _losses(attempts.run(ranks, partial(job, sharding=sharding)))
            for ranks, job in ((before, half), (after, rest))
        ]
        torch.testing.assert_close(torch.cat(losses), straight, rtol=1e-6, atol=0)


def _losses(ends: list[jobs.End]) -> torch.Tensor:
    """Return the loss of each step over the examples of all ranks."""
    return torch.tensor([end.losses for end in ends], dtype=torch.float64).mean(0)
