"""A foundation model (FM) teaches a domain model, which teaches vertical students.

The cases have no model: an output stands for the set of labels that it may know, and passes that
set from teacher to student. A leak over two hops shows as an example's own label.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import das_data as dd
import numpy as np
import pytest
import rank_checks_hierarchy as checks
import torch
from ranks import Ranks, check_name

from torchrec_exfm.das import Snapshot, TeacherLogger, TeacherLookup, publish
from torchrec_exfm.das.arrays import Ints

CHECKS: list[tuple[Any, ...]] = [
    (checks.check_student_and_teacher_at_once,),
    (checks.check_what_is_logged_is_the_serving_head_before_the_update,),
    (checks.check_nothing_of_a_leak_reaches_the_second_hop,),
    *((checks.check_a_published_domain_model_scores, form) for form in ("wrapped", "bare")),
    (checks.check_a_stream_of_three,),
]
EXAMPLES, WINDOW, WINDOWS = 60, 10, 3
SEEDS = range(4)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check_name(*check))
def test_on_ranks(ranks: Ranks, check: tuple[Any, ...]) -> None:
    ranks.run(*check)


def test_a_look_up_before_the_domain_model_has_said_anything(tmp_path: Path) -> None:
    """A look-up may be created while the store is empty, and again once both have outputs."""
    store = dd.new_store(tmp_path)
    TeacherLookup(store, ["fm", "domain"]).close()
    store.write(dd.snapshot(), [1], [0.5], [dd.AT])
    store.refresh()
    with pytest.raises(ValueError, match=r"a subset of \('fm',\), received \('domain',\)"):
        TeacherLookup(store, ["fm", "domain"])
    store.write(dd.snapshot(teacher="domain"), [1], [0.5], [dd.AT])
    store.refresh()
    TeacherLookup(store, ["fm", "domain"]).close()


class Entry(NamedTuple):
    """A row; rows sort by precedence, and an output is the number of a set of labels."""

    snapshot: int
    logged: bool
    output: int
    through: int

    def fits(self, second: int) -> bool:
        """Return whether an example of that second may use this row."""
        return self.logged or self.through < second


class Case:
    """Examples by position in time, some in the same second, and the labels behind each output.

    Teachers train in order of time or, if shuffled, in any order within a window.
    """

    def __init__(self, folder: Path, seed: int, *, shuffled: bool) -> None:
        self.random, self.shuffled = np.random.default_rng(seed), shuffled
        self.seconds = np.sort(self.random.integers(WINDOWS * WINDOW, size=EXAMPLES)) + WINDOW
        self.ids = self.random.permutation(EXAMPLES)
        self.store = dd.new_store(folder, window_seconds=WINDOW)
        self.known: list[frozenset[int]] = []  # by an output's number: the labels' positions
        self.entries: dict[tuple[str, int], list[Entry]] = defaultdict(list)

    def train(self, teacher: str, taught_by: str = "", *, logs: bool = True) -> None:
        """Log each batch, then learn it; published snapshots score random examples.

        If shuffled, snapshots are published only at the end of a window.
        """
        lookup = self.lookup(taught_by) if taught_by else None
        labels, snapshots = frozenset[int](), [(Snapshot(teacher, 0, 0), frozenset[int]())]
        with TeacherLogger(self.store, teacher) as logger:
            for rows, may_publish in self.batches():
                if logs:
                    self.log(logger, self.some(rows), snapshots[-1][0], labels)
                labels = labels.union(rows.tolist(), self.learnt_from(lookup, rows))
                if may_publish and self.random.random() < 0.5:
                    last = int(self.seconds[sorted(labels)].max())
                    snapshot = publish(self.store, teacher, None, trained_through_seconds=last)
                    snapshots.append((snapshot, labels))
            logged = [position for name, position in self.entries if name == teacher]
            if logged:
                self.log(logger, np.array(logged), None, labels)  # a second epoch
        for snapshot, known in snapshots[1:]:
            rows = self.some(np.arange(EXAMPLES))
            values = self.values(teacher, rows, snapshot, known)
            columns = self.ids[rows], values, self.seconds[rows]
            self.store.write(snapshot, *columns, bad_rows="quarantine")

    def batches(self) -> Iterator[tuple[Ints, bool]]:
        """Yield batches, and whether a snapshot may be published after each."""
        for window in np.unique(self.seconds // WINDOW):
            rows = np.flatnonzero(self.seconds // WINDOW == window)
            if self.shuffled:
                rows = self.random.permutation(rows)
            cuts = np.array_split(rows, self.random.integers(1, 4))
            batches = [batch for batch in cuts if len(batch)]
            yield from ((batch, batch is batches[-1] or not self.shuffled) for batch in batches)

    def some(self, rows: Ints) -> Ints:
        chosen: Ints = rows[self.random.random(len(rows)) < 0.7]
        return chosen if len(chosen) else rows

    def lookup(self, *teachers: str) -> TeacherLookup:
        """Return a look-up whose batches are positions."""
        return TeacherLookup(
            self.store,
            teachers,
            ids=lambda rows: self.ids[rows],
            event_seconds=lambda rows: self.seconds[rows],
            bad_rows="quarantine",
            max_windows=WINDOWS + 1,
        )

    def learnt_from(self, lookup: TeacherLookup | None, rows: Ints) -> frozenset[int]:
        """Return the labels that a teacher's outputs of a batch know."""
        if lookup is None:
            return frozenset()
        outputs = lookup(rows)
        numbers = outputs.values[outputs.presence].int().tolist()
        return frozenset().union(*(self.known[number] for number in numbers))

    def log(
        self, logger: TeacherLogger, rows: Ints, snapshot: Snapshot | None, known: frozenset[int]
    ) -> None:
        """Log outputs that the store should keep under ``snapshot``, or ignore if it is None."""
        values = self.values(logger.teacher, rows, snapshot, known, logged=True)
        times = torch.from_numpy(self.seconds[rows])
        logger.log(torch.from_numpy(self.ids[rows]), times, torch.tensor(values))
        logger.flush()

    def values(
        self,
        teacher: str,
        rows: Ints,
        snapshot: Snapshot | None,
        known: frozenset[int],
        *,
        logged: bool = False,
    ) -> list[float]:
        """Return an output for each row that stands for the known labels."""
        numbers = range(len(self.known), len(self.known) + len(rows))
        self.known.extend([known] * len(rows))
        for position, number in zip(rows.tolist(), numbers, strict=True):
            if snapshot is not None:
                entry = Entry(snapshot.version, logged, number, snapshot.trained_through_seconds)
                self.entries[teacher, position].append(entry)
        return [float(number) for number in numbers]

    def plant(self, teacher: str) -> None:
        """Plant leaking rows of a newer version that knows all labels."""
        rows = self.some(np.arange(EXAMPLES))
        last = Snapshot(teacher, 99, int(self.seconds[-1]))
        dd.plant(
            self.store,
            len(rows),
            teacher=[teacher] * len(rows),
            example_id=self.ids[rows],
            event_time=self.seconds[rows] * dd.US,
            trained_through=[last.trained_through_seconds * dd.US] * len(rows),
            snapshot=[last.version] * len(rows),
            window=self.seconds[rows] // WINDOW,
            output_label=self.values(teacher, rows, last, frozenset(range(EXAMPLES))),
        )

    def own_labels(self, *teachers: str) -> Counter[str]:
        """Count the outputs that a student gets, those refused, and those that know their label.

        Require each teacher's output of an example to be the winner among the rows that fit.
        """
        counts: Counter[str] = Counter()
        outputs = self.lookup(*teachers)(np.arange(EXAMPLES))
        for position, second in enumerate(self.seconds.tolist()):
            for place, teacher in enumerate(teachers):
                entries = self.entries[teacher, position]
                winner = max((row for row in entries if row.fits(second)), default=None)
                assert bool(outputs.presence[position, place]) == (winner is not None)
                counts["refused"] += sum(not row.fits(second) for row in entries)
                if winner is not None:
                    assert outputs.values[position, place].item() == winner.output
                    counts["given"] += 1
                    counts[teacher] += position in self.known[winner.output]
        return counts


def counted(folder: Path, *, shuffled: bool, fm_logs: bool) -> Counter[str]:
    """Return the counts over random cases."""
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        case = Case(folder / f"{seed}", seed, shuffled=shuffled)
        case.train("fm", logs=fm_logs)
        case.plant("fm")
        case.train("domain", taught_by="fm")
        case.plant("domain")
        counts += case.own_labels("fm", "domain")
    assert min(counts["given"], counts["refused"]) > EXAMPLES * len(SEEDS)
    return counts


def test_no_student_is_given_its_own_label_over_two_hops(tmp_path: Path) -> None:
    """Both teachers train in order of time, with any batches."""
    counts = counted(tmp_path, shuffled=False, fm_logs=True)
    assert (counts["fm"], counts["domain"]) == (0, 0)


@pytest.mark.filterwarnings("ignore:.*fm has no output for any of the first")  # before a snapshot
def test_nor_where_snapshots_from_before_the_window_teach_the_domain_model(tmp_path: Path) -> None:
    """Each may train on a window in its own order."""
    counts = counted(tmp_path, shuffled=True, fm_logs=False)
    assert (counts["fm"], counts["domain"]) == (0, 0)


def test_what_no_rule_of_a_row_can_tell(tmp_path: Path) -> None:
    """A limit that the guide names: an FM logs in another order than the domain model's.

    Its output of an example does not know that example's label. It may know the label of an example
    that is earlier in the domain model's order, and later in time.
    """
    counts = counted(tmp_path, shuffled=True, fm_logs=True)
    assert counts["fm"] == 0 < counts["domain"]
