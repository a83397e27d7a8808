"""Jobs killed at any moment on a failing object store: every row once, every report true.

FAULT_KILLS is the number of kills per job; ``-s`` shows their moments.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import das_data as dd
import fault_jobs
import numpy as np
import pytest
import rank_models as rm
import server_fault_jobs as jobs
from das_data import AT, WINDOW, snapshot
from forked import Forked
from s3_server import S3Server

from torchrec_exfm.das import ForgetReport, TeacherStore, forget, publish, published
from torchrec_exfm.das.rules import Rows

KILLS = int(os.environ.get("FAULT_KILLS", "2"))
KILLS_A_ROUND = 10
LOST = [500, 503, 0]  # statuses instead of a reply; 0 closes the connection


# ---- Killed ----


class Attempts:
    """A job with its own store on the server, restarted until it ends."""

    def __init__(
        self, server: S3Server, url: str, job: jobs.ServerJob, folder: Path, chance: random.Random
    ) -> None:
        self.server, self.url, self.job, self.folder = server, url, job, folder
        self.kills: list[int] = []  # the commits that were there
        self.commits_before: list[int] = []  # each attempt
        self._chance = chance
        self._table = "snapshots" if job is jobs.publishing else "outputs"
        folder.mkdir(parents=True)
        TeacherStore.create(
            url,
            tasks=fault_jobs.TASKS,
            window_seconds=fault_jobs.WINDOW,
            resolution="float32",
            storage_options=server.storage_options,
        )

    def finish(self, *, faults: bool) -> None:
        process = self._start(faults)
        process.result()
        self.server.set_faults()

    def kill_at(self, commits: float, delay: float) -> None:
        """Start the job, and kill it a while after some commits, unless it has ended."""
        process = self._start(True)
        while self.commits() < commits and process.process.is_alive():
            time.sleep(0.004)
        time.sleep(delay)
        alive = process.process.is_alive()
        if not alive:
            process.result()  # raises what went wrong
        process.kill()
        self.server.set_faults()
        if alive:
            self.kills.append(self.commits())

    def commits(self) -> int:
        log, all_keys = f"{self._folder}/{self._table}/_delta_log/", self.server.stored()
        return sum(re.fullmatch(rf"{log}\d+\.json", key) is not None for key in all_keys) - 1

    def store(self) -> TeacherStore:
        return TeacherStore(self.url, storage_options=self.server.storage_options)

    def rows(self) -> Rows:
        """Return the store's rows, and require each example once."""
        rows = dd.all_rows(self.store())
        assert (np.diff(rows.example_id) > 0).all()
        return rows

    def rows_by_transaction(self) -> dict[str, int]:
        """Return the rows added per transaction name, and require each name at most once."""
        store = self.store()
        table = store.registry if self._table == "snapshots" else store.table
        infos = [info for info in table.delta.history() if "transaction" in info]
        names = [info["transaction"].rpartition("=")[0] for info in infos]
        assert self._table == "snapshots" or len(set(names)) == len(names)
        return {
            name: info["operationMetrics"]["num_added_rows"]
            for name, info in zip(names, infos, strict=True)
        }

    def rows_of_last_attempt(self) -> int:
        infos = self.store().table.delta.history(self.commits() - self.commits_before[-1])
        return sum(info["operationMetrics"]["num_added_rows"] for info in infos)

    @property
    def _folder(self) -> str:
        return self.url.removeprefix(f"{self.server.url}/")

    def _start(self, faults: bool) -> Forked:
        self.commits_before.append(self.commits())
        if faults:
            self.server.set_faults(
                failing=0.04,
                status=self._chance.choice((500, 503)),
                lost_share=0.2,
                lost_keys=".",
                lost_status=self._chance.choice(LOST),
            )
        attempt = len(self.commits_before)
        options = self.server.storage_options
        return Forked(jobs.run, self.job, self.url, options, self.folder, attempt)


def assert_same(rows: Rows, expected: Rows, *, outputs: bool = True) -> None:
    """Require equal bits, except for the time of scoring."""
    names = ["example_id", "event_time", "snapshot", "trained_through", "logged"]
    for name in names + ["outputs"] * outputs:
        column, other = getattr(rows, name), getattr(expected, name)
        np.testing.assert_array_equal(column.view(np.uint8), other.view(np.uint8), name)


def check_writing(attempts: Attempts, reference: Attempts) -> None:
    """Require each named shard once, by the call that reports it; unnamed rows all or none."""
    reports, added = jobs.reports(attempts.folder), attempts.rows_by_transaction()
    unsaid = 0
    for number in range(jobs.SHARDS):
        shard_reports = [report for report in reports if report.get("shard") == number]
        assert added[f"shard/fm/1/shard-{number}"] == jobs.SHARD_ROWS
        assert sum(report["committed"] for report in shard_reports) <= 1
        unsaid += not any(report["committed"] for report in shard_reports)
        for report in shard_reports:
            shares = report["written"], report["stored_before"]
            expected = (jobs.SHARD_ROWS, 0) if report["committed"] else (0, jobs.SHARD_ROWS)
            assert shares == expected
        first = next(iter(shard_reports))
        assert all(report is first or not report["committed"] for report in shard_reports)
    rows = attempts.rows()
    unnamed = rows[rows.example_id < 2**60]
    values = dict(zip(unnamed.example_id.tolist(), unnamed.outputs[:, 0].tolist(), strict=True))
    wanted = {}
    for report in reports:
        if "unnamed" in report:
            assert (report["committed"], report["written"]) == (True, jobs.UNNAMED_ROWS)
            ids = jobs.unnamed_ids(report["attempt"], report["unnamed"])
            wanted.update(dict.fromkeys(ids.tolist(), report["attempt"] + report["unnamed"]))
    assert {id_: values.pop(id_) for id_ in wanted} == wanted
    left = sorted(values)  # by calls that were killed
    assert all(
        left[start] % 10 == 0 and left[start : start + 3] == [left[start] + k for k in range(3)]
        for start in range(0, len(left), jobs.UNNAMED_ROWS)
    )
    assert unsaid + len(left) // jobs.UNNAMED_ROWS <= len(attempts.kills)
    written = sum(report["written"] for report in reports)
    assert written + unsaid * jobs.SHARD_ROWS + len(left) == len(rows) == sum(added.values())
    theirs = reference.rows()
    assert_same(rows[rows.example_id >= 2**60], theirs[theirs.example_id >= 2**60])


def check_scoring(attempts: Attempts, reference: Attempts) -> None:
    reports = jobs.reports(attempts.folder)  # several if one ended before it was to be killed
    assert reports[-1]["scored"] == attempts.rows_of_last_attempt()
    assert {report["shards"] for report in reports} == {2}
    rows = attempts.rows()
    assert sum(attempts.rows_by_transaction().values()) == len(rows) == jobs.ROWS
    assert_same(rows, reference.rows(), outputs=False)
    fault_jobs.assert_within_rounding(rm.two_task_student(), rows)


def check_teacher_logging(attempts: Attempts, reference: Attempts) -> None:
    reports = jobs.reports(attempts.folder)
    last = reports[-1]
    assert last["attempt"] == len(attempts.commits_before)
    assert last["written"] == attempts.rows_of_last_attempt()
    assert last["written"] + last["before"] == jobs.ROWS
    by_attempt = {report["attempt"]: report for report in reports}  # the last of each
    left = jobs.ROWS - sum(report["written"] for report in by_attempt.values())
    assert left in [jobs.SHARD_ROWS * n for n in range(len(attempts.kills) + 1)]
    rows = attempts.rows()
    assert sum(attempts.rows_by_transaction().values()) == len(rows)
    assert_same(rows, reference.rows())


def check_publishing(attempts: Attempts, reference: Attempts) -> None:
    """Require consecutive versions; those of killed calls may be among them."""
    store = attempts.store()
    known = {
        snapshot.version: snapshot.trained_through_seconds for snapshot in published(store, "fm")
    }
    assert list(known) == list(range(1, attempts.commits() + 1))
    assert len(set(known.values())) == len(known)  # no call has published twice
    reports = jobs.reports(attempts.folder)
    assert len(reports) == len({report["version"] for report in reports}) == jobs.SHARDS
    assert all(known[report["version"]] == report["through"] for report in reports)
    assert len(known) - len(reports) <= len(attempts.kills)


@pytest.mark.parametrize(
    ("job", "check"),
    [
        (jobs.writing, check_writing),
        (jobs.scoring, check_scoring),
        (jobs.teacher_logging, check_teacher_logging),
        (jobs.publishing, check_publishing),
    ],
    ids=lambda function: function.__name__,
)
def test_a_job_killed_at_any_moment(
    server: S3Server,
    url: str,
    tmp_path: Path,
    job: jobs.ServerJob,
    check: Callable[[Attempts, Attempts], None],
) -> None:
    chance = random.Random(job.__name__)
    reference = Attempts(server, f"{url}/whole", job, tmp_path / "whole", chance)
    reference.finish(faults=False)
    check(reference, reference)
    commits = reference.commits()
    landed: list[str] = []
    for number in itertools.count():  # a round lands no kill if the job ends too soon
        name = f"killed-{number}"
        attempts = Attempts(server, f"{url}/{name}", job, tmp_path / name, chance)
        kills_of_round = min(KILLS_A_ROUND, KILLS - len(landed))
        for kill in range(kills_of_round):
            moment = commits * (kill + chance.random()) / kills_of_round
            attempts.kill_at(moment, 0.2 * chance.random())
        attempts.finish(faults=True)
        check(attempts, reference)
        landed += [f"{part / commits:.0%}" for part in attempts.kills]
        if len(landed) >= KILLS:
            break
    print(f"\n{job.__name__}: killed with {' '.join(landed)} of the commits there")


# ---- Replies that are lost ----


@pytest.fixture(params=LOST)
def losing(server: S3Server, url: str, request: pytest.FixtureRequest) -> TeacherStore:
    """Create a store on a server that loses every other reply to a stored object."""
    options = server.storage_options
    store = TeacherStore.create(
        url, window_seconds=WINDOW, resolution="float32", storage_options=options
    )
    server.set_faults(lost_share=0.5, lost_keys=".", lost_status=request.param, failing=0.05)
    return store


def test_reports_are_true_if_replies_are_lost(server: S3Server, losing: TeacherStore) -> None:
    store = losing
    for number in range(5):
        ids = np.arange(4) + 10 * number
        shard: dict[str, Any] = {"shard": str(number)}
        for expected in ((True, 4, 0), (False, 0, 4)):
            report = store.write(snapshot(), ids, ids + np.float32(0.5), AT + ids, **shard)
            assert (report.committed, report.written, report.stored_before) == expected
        report = store.write(snapshot(2), [1_000 + number], [0.5], [AT + WINDOW])
        assert (report.committed, report.written) == (True, 1)
        made = publish(store, "fm", None, trained_through_seconds=1_000 + number)
        assert (made.version, made.trained_through_seconds) == (number + 1, 1_000 + number)
        store.advance_watermark("fm", AT + number)
        assert store.watermark("fm") == AT + number
    store.table.compact(("fm", 2))
    assert len(store.files("fm", 2)) == 1
    assert len(dd.by_id(store)) == 25
    forgotten = [
        forget(store, "fm", versions=[2, 3]),
        forget(store, "fm", versions=[2, 3]),
        forget(store, "fm", before_seconds=AT + WINDOW),
        forget(store, "fm", before_seconds=AT + WINDOW),
    ]
    counts = [(5, 2), (0, 0), (20, 0), (0, 0)]
    assert forgotten == [ForgetReport(*count) for count in counts]
    server.set_faults()
    assert [entry.version for entry in published(store, "fm")] == [1, 4, 5]
    assert dd.by_id(store) == {}
    metrics = [info.get("operationMetrics", {}) for info in store.table.delta.history()]
    assert sum(entry.get("num_added_rows", 0) for entry in metrics) == 25
