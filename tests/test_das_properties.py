"""Random sequences of writes, read and looked up, against a dict with the rule in one line."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import das_data as dd
import numpy as np
import pytest
from das_data import new_store
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from torchrec_exfm.das import Snapshot, TeacherLookup, TeacherStore

TOP = 2**63 - 1
WINDOW = 100
TIMES = 4 * WINDOW  # event times are below
EXAMPLES = st.dictionaries(  # an example has one event time, in any write
    st.one_of(st.integers(0, TOP), st.integers(TOP - 3, TOP), st.integers(0, 5)),
    st.integers(0, TIMES - 1),
    min_size=1,
    max_size=8,
)
FEW = settings(  # each commits several times; to shrink a failing one would take minutes
    max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)


class Entry(NamedTuple):
    """A row of the model; rows sort by precedence."""

    snapshot: int
    logged: bool
    write: int
    output: float
    through: int


@dataclass
class Case:
    """Random writes, and the rows that the store should have for each example."""

    times: dict[int, int]
    rows: dict[int, list[Entry]]
    leaks: list[int]
    store: TeacherStore

    def winner(self, example: int, pinned: int | None) -> Entry | None:
        """Return the row that counts: newest snapshot, then logged, then scored last."""
        rows = [row for row in self.rows[example] if pinned in (None, row.snapshot)]
        return max(rows, default=None)


@st.composite
def write(draw: st.DrawFn, examples: list[int]) -> tuple[Snapshot, bool, list[int], list[float]]:
    version = draw(st.integers(0, 2))
    some = st.lists(st.sampled_from(examples), min_size=1, unique=True)
    ids = draw(st.one_of(st.permutations(examples), some))
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    outputs = draw(st.lists(number, min_size=len(ids), max_size=len(ids)))
    through = draw(st.one_of(st.integers(0, 50), st.integers(0, TIMES)))  # the later leak more
    return Snapshot("fm", version, through), draw(st.booleans()), ids, outputs


def written(data: st.DataObject, folder: Path) -> Case:
    times = data.draw(EXAMPLES)
    examples = sorted(times)
    store = new_store(folder, window_seconds=WINDOW, embedding_width=1)
    case = Case(times, {id_: [] for id_ in examples}, [], store)
    for number in range(data.draw(st.integers(2, 5))):
        snapshot, logged, ids, outputs = data.draw(write(examples))
        through = snapshot.trained_through_seconds
        leaks = [id_ for id_ in ids if times[id_] <= through and not logged]
        seconds = [times[id_] for id_ in ids]
        embeddings = [[float(number)]] * len(ids) if has_embeddings(number) else None
        options = {"embeddings": embeddings, "logged": logged}
        report = store.write(snapshot, ids, outputs, seconds, bad_rows="quarantine", **options)
        assert (report.written, sum(report.quarantined.values())) == (
            len(ids) - len(leaks),
            len(leaks),
        )
        for id_, output in zip(ids, outputs, strict=True):
            if id_ not in leaks:
                entry = Entry(snapshot.version, logged, number, output, through)
                case.rows[id_].append(entry)
    return case


def has_embeddings(number: int) -> bool:
    """Return whether a write has embeddings (its number in each row) or none."""
    return number % 3 < 2


@FEW
@given(st.data())
def test_what_was_written_is_read(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = written(data, Path(folder))
        if data.draw(st.booleans()):
            for window in case.store.windows("fm"):
                case.store.table.compact(("fm", window))
        rows = dd.all_rows(case.store)
        assert Counter(
            zip(
                rows.example_id.tolist(),
                rows.event_time.tolist(),
                rows.snapshot.tolist(),
                rows.trained_through.tolist(),
                rows.logged.tolist(),
                rows.outputs[:, 0].view(np.uint32).tolist(),
                strict=True,
            )
        ) == Counter(
            (
                id_,
                case.times[id_] * dd.US,
                entry.snapshot,
                entry.through * dd.US,
                entry.logged,
                int(np.float32(entry.output).view(np.uint32)),
            )
            for id_, entries in case.rows.items()
            for entry in entries
        )
        windows = {case.times[id_] // WINDOW for id_, entries in case.rows.items() if entries}
        assert case.store.windows("fm") == sorted(windows)


@pytest.mark.filterwarnings("ignore:.*read again soon after")  # batches of any windows
@FEW
@given(st.data())
def test_what_is_looked_up_is_what_the_rule_says(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case = written(data, Path(folder))
        pinned = data.draw(st.sampled_from([None, 0, 1, 2]))
        oldest = data.draw(st.sampled_from([None, 0, 30, 150]))
        most = data.draw(st.sampled_from([1, 2]))
        lookup = TeacherLookup(
            case.store,
            "fm",
            ids=lambda batch: np.array([id_ for id_, _ in batch], np.int64),
            event_seconds=lambda batch: np.array([at for _, at in batch], np.int64),
            snapshot=pinned,
            max_age_seconds=oldest,
            max_windows=most,
            embeddings=True,
        )
        stored = st.sampled_from(sorted(case.times.items()))
        elsewhere = st.tuples(st.integers(0, TOP), st.integers(0, TIMES + WINDOW))
        asked = Counter[str]()
        batches = st.lists(st.lists(st.one_of(stored, stored, elsewhere), max_size=8), max_size=4)
        for batch in [list(case.times.items()), *data.draw(batches)]:
            check_batch(case, lookup, batch, pinned, oldest, asked)
        counters = lookup.counters["fm"]
        for name in ("asked", "present", "missing", "stale"):
            assert getattr(counters, name) == asked[name], name


def check_batch(
    case: Case,
    lookup: TeacherLookup,
    batch: list[tuple[int, int]],
    pinned: int | None,
    oldest: int | None,
    asked: Counter[str],
) -> None:
    outputs = lookup(batch)
    assert outputs.values.shape == outputs.presence.shape == (len(batch), 1, 1)
    assert outputs.embeddings is not None and outputs.embedding_presence is not None
    assert outputs.age_seconds is not None and outputs.age_seconds.shape == (len(batch), 1)
    for row, (id_, at) in enumerate(batch):
        entry = None
        if id_ in case.times and case.times[id_] // WINDOW == at // WINDOW:
            entry = case.winner(id_, pinned)
        age = None if entry is None else 0 if entry.logged else case.times[id_] - entry.through
        stale = age is not None and oldest is not None and age > oldest
        outcome = "missing" if entry is None else "stale" if stale else "present"
        asked.update(["asked", outcome])
        assert bool(outputs.presence[row]) == (outcome == "present")
        has_embedding = entry is not None and outcome == "present" and has_embeddings(entry.write)
        assert bool(outputs.embedding_presence[row]) == has_embedding
        if entry is not None and outcome == "present":
            assert outputs.values[row].item() == np.float32(entry.output)
            assert outputs.embeddings[row].item() == (entry.write if has_embedding else 0)
            assert outputs.age_seconds[row].item() == age
