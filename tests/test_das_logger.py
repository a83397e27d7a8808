"""TeacherLogger: each example once, as it was said before its label was learned from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import das_data as dd
import pytest
import torch
from das_data import AT, WINDOW, new_store, snapshot
from torch import Tensor, nn

from torchrec_exfm.das import TeacherLogger, TeacherLookup, TeacherStore, publish


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return new_store(tmp_path)


def log(logger: TeacherLogger, ids: list[int], first: float = 0.0, at: int = AT) -> None:
    """The output of each example is its id and what is given."""
    example_ids = torch.tensor(ids, dtype=torch.int64)
    logger.log(example_ids, torch.full_like(example_ids, at), example_ids.float() + first)


def test_rows_carry_the_snapshot_that_the_teacher_moves_on_from(store: TeacherStore) -> None:
    with TeacherLogger(store, "fm") as logger:
        log(logger, [1])
        logger.flush()
        publish(store, "fm", None, trained_through_seconds=AT + 5)
        log(logger, [2])
    rows = dd.all_rows(store)
    assert rows.snapshot.tolist() == [0, 1]
    assert (rows.trained_through // dd.US).tolist() == [0, AT + 5]
    assert rows.logged.all() and (rows.age_seconds == 0).all()
    assert (logger.written, logger.logged_before, logger.quarantined) == (2, 0, 0)


def test_a_run_that_begins_anew_logs_what_is_not_there(store: TeacherStore) -> None:
    store.write(snapshot(5), [2], [-2.0], [AT])  # scored, not logged
    with TeacherLogger(store, "fm", shard_rows=2) as logger:
        log(logger, [1, 2, 3])
        log(logger, [4], at=AT + WINDOW)
    with TeacherLogger(store, "fm", shard_rows=2) as again:
        log(again, [1, 2, 3, 5], first=100.0)
        log(again, [4, 6], first=100.0, at=AT + WINDOW)
    rows = dd.all_rows(store)
    logged = rows[rows.logged]
    assert logged.example_id.tolist() == [1, 2, 3, 4, 5, 6]
    assert logged.outputs.ravel().tolist() == [1.0, 2.0, 3.0, 4.0, 105.0, 106.0]
    assert (logger.written, again.written, again.logged_before) == (4, 2, 4)


@pytest.mark.parametrize("shard_rows", [1, 100], ids=["shards apart", "one shard"])
def test_what_is_said_after_the_label_was_learned_from_is_not_logged(
    store: TeacherStore, shard_rows: int
) -> None:
    """A second epoch: by then the teacher has been trained on the example."""
    with TeacherLogger(store, "fm", shard_rows=shard_rows) as logger:
        for first in (0.0, 100.0):
            log(logger, [1, 2], first)
            log(logger, [3], first, at=AT + WINDOW)
    rows = dd.all_rows(store)
    assert rows.example_id.tolist() == [1, 2, 3]
    assert rows.outputs.ravel().tolist() == [1.0, 2.0, 3.0]
    lookup = TeacherLookup(store, "fm", ids=torch.tensor, event_seconds=lambda _: AT)
    assert lookup([1, 2]).values.ravel().tolist() == [1.0, 2.0]


def test_a_batch_may_be_overwritten_after_it_was_logged(store: TeacherStore) -> None:
    ids, seconds, outputs = torch.tensor([1]), torch.tensor([AT]), torch.tensor([0.5])
    with TeacherLogger(store, "fm") as logger:
        logger.log(ids, seconds, outputs)
        for buffer in (ids, seconds, outputs):  # as a loader may that uses its buffers again
            buffer.fill_(7)
    assert dd.by_id(store) == {1: [0.5]}


def test_a_rank_may_have_a_batch_without_an_example(store: TeacherStore) -> None:
    with TeacherLogger(store, "fm") as logger:
        log(logger, [])
        log(logger, [1])
    assert dd.by_id(store) == {1: [1.0]}


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch: Any) -> tuple[Tensor, tuple[Tensor, Tensor, None]]:
        logits = self.weight * batch.numbers
        return logits.sum(), (logits.sum().detach(), logits, None)


def test_training_forwards_are_logged_and_no_others(store: TeacherStore) -> None:
    def batch(id_: int) -> SimpleNamespace:
        ids = torch.tensor([id_])
        return SimpleNamespace(example_ids=ids, event_seconds=ids + AT, numbers=ids.float())

    teacher = Teacher()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=1.0)
    logger = TeacherLogger(store, "fm", shard_rows=1)
    logger.attach(teacher)
    for id_ in (1, 3):
        loss, _ = teacher(batch(id_))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    teacher.eval()(batch(4))
    logger.close()
    teacher.train()(batch(5))  # detached
    assert dd.by_id(store) == {1: [2.0], 3: [3.0]}  # before each update


def test_bad_rows_are_told_or_counted(store: TeacherStore) -> None:
    logger = TeacherLogger(store, "fm")
    log(logger, [1, -1])
    with pytest.raises(ValueError, match="1 of 2 rows have a negative example id"):
        logger.flush()
    with TeacherLogger(store, "fm", bad_rows="quarantine") as counting:
        log(counting, [1, -1])
    assert (counting.written, counting.quarantined) == (1, 1)
    assert dd.by_id(store) == {1: [1.0]}


def test_wrong_options_are_refused(store: TeacherStore) -> None:
    for options, words in [
        ({"teacher": "../fm"}, "a teacher should be named"),
        ({"shard_rows": 0}, "at least 1; received 0"),
        ({"bad_rows": "drop"}, "'refuse' or 'quarantine'"),
    ]:
        with pytest.raises(ValueError, match=words):
            TeacherLogger(store, **{"teacher": "fm", **options})  # type: ignore[arg-type]
