"""TeacherLogger: each example once, with the output from before its label was learned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import das_data as dd
import numpy as np
import pytest
import torch
from das_data import AT, WINDOW, new_store, snapshot
from torch import Tensor, nn

from torchrec_exfm.das import TeacherLogger, TeacherLookup, TeacherStore, publish
from torchrec_exfm.das.rules import NO_KEY


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return new_store(tmp_path)


def log(logger: TeacherLogger, ids: list[int], first: float = 0.0, at: int = AT) -> None:
    """Log for each example its id plus ``first`` as the output."""
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
    with TeacherLogger(store, "fm", shard_rows=2) as second:
        log(second, [1, 2, 3, 5], first=100.0)
        log(second, [4, 6], first=100.0, at=AT + WINDOW)
    rows = dd.all_rows(store)
    logged = rows[rows.logged]
    assert logged.example_id.tolist() == [1, 2, 3, 4, 5, 6]
    assert logged.outputs.ravel().tolist() == [1.0, 2.0, 3.0, 4.0, 105.0, 106.0]
    assert (logger.written, second.written, second.logged_before) == (4, 2, 4)


@pytest.mark.parametrize("shard_rows", [1, 100], ids=["shards apart", "one shard"])
def test_what_is_said_after_the_label_was_learned_from_is_not_logged(
    store: TeacherStore, shard_rows: int
) -> None:
    """In a second epoch the teacher has already been trained on the example."""
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


NAMES = ("item_id", "user_id", "category_id")


def keys_in(store: TeacherStore) -> list[list[int]]:
    """Return each example's id and keys."""
    rows = dd.all_rows(store, keys=NAMES)
    return [[id_, *keys] for id_, keys in zip(rows.example_id.tolist(), rows.keys, strict=True)]


def test_keys_are_logged_beside_outputs(store: TeacherStore) -> None:
    """Keys over several shards and windows, with repeated and unordered examples."""

    def batch(ids: list[int]) -> tuple[list[int], list[int], Tensor]:
        return ids, [AT + (i % 2) * WINDOW for i in ids], torch.tensor(ids).float()

    for first in (0, 10**6):  # the second run logs example 6 alone
        with TeacherLogger(store, "fm", shard_rows=3) as logger:
            for ids in ([5, 2], [4, 5, 1], [3], [] if first == 0 else [6]):
                users = torch.tensor(ids, dtype=torch.int32) * 10 + first
                items = np.array([NO_KEY if i == 3 else 2**62 + i for i in ids], np.int64)
                logger.log(*batch(ids), keys={"user_id": users, "item_id": items})
                users.fill_(7)  # as a loader may that uses its buffers again
                items.fill(7)
    expected = [[i, 2**62 + i, 10 * i, NO_KEY] for i in range(1, 6)]
    expected[2][1] = NO_KEY
    assert keys_in(store) == [*expected, [6, 2**62 + 6, 60 + 10**6, NO_KEY]]


def test_without_keys_there_are_none(store: TeacherStore) -> None:
    with TeacherLogger(store, "fm") as logger:
        log(logger, [1, 2])
    assert keys_in(store) == [[1, *[NO_KEY] * 3], [2, *[NO_KEY] * 3]]


def test_keys_that_do_not_fit_are_told(store: TeacherStore) -> None:
    outputs = torch.ones(2)
    with TeacherLogger(store, "fm") as logger:
        with pytest.raises(ValueError, match=r"keys should be among .*; received \['user'\]"):
            logger.log([1, 2], [AT, AT], outputs, keys={"user": [1, 2]})
        with pytest.raises(TypeError, match=r"item_id should be whole numbers"):
            logger.log([1, 2], [AT, AT], outputs, keys={"item_id": [0.5, 1.5]})
        with pytest.raises(ValueError, match=r"item_id should have no nulls"):
            logger.log([1, 2], [AT, AT], outputs, keys={"item_id": [1, None]})
        logger.log([1, 2], [AT, AT], outputs, keys={"user_id": [1, 2]})
        for _ in range(2):  # the second time after they were written
            for other in ({"item_id": [3, 4]}, {"user_id": [3, 4], "item_id": [3, 4]}, None):
                words = r"received \[.*\] after \['user_id'\]: pass -2\^63"
                with pytest.raises(ValueError, match=words):
                    logger.log([3, 4], [AT, AT], outputs, keys=other)
            logger.flush()
    assert keys_in(store) == [[1, NO_KEY, 1, NO_KEY], [2, NO_KEY, 2, NO_KEY]]
    with TeacherLogger(store, "fm") as logger:
        log(logger, [3])
        with pytest.raises(ValueError, match=r"received \['user_id'\] after \[\]"):
            logger.log([4], [AT], torch.ones(1), keys={"user_id": [4]})
    assert logger.written == 1


@pytest.mark.parametrize("keys", [torch.ones(3).long(), torch.ones(2), torch.ones(2, 1).long()])
def test_tensors_of_keys_are_looked_at_before_a_row_is_written(
    store: TeacherStore, keys: Tensor
) -> None:
    logger = TeacherLogger(store, "fm")
    logger.log([1, 2], [AT, AT], torch.ones(2), keys={"user_id": torch.arange(2)})
    logger.log([3, 4], [AT, AT], torch.ones(2), keys={"user_id": keys})
    with pytest.raises((TypeError, ValueError), match=r"user_id should be (of shape|whole)"):
        logger.flush()
    assert store.refresh() == 0


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
    keys = {"keys": lambda batch: {"category_id": -batch.example_ids}}
    logger = TeacherLogger(store, "fm", shard_rows=1, **keys)
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
    assert keys_in(store) == [[1, NO_KEY, NO_KEY, -1], [3, NO_KEY, NO_KEY, -3]]


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
