"""Stores and look-ups in other processes: pickled by URL, with an error after a fork."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import das_data as dd
import numpy as np
import pytest
import torch
from das_data import AT, small_store, snapshot
from torch.utils.data import DataLoader, Dataset

from torchrec_exfm.das import StoreError, TeacherLogger, TeacherLookup, TeacherStore

SECONDS = 60.0


def as_ids(batch: Any) -> Any:
    return np.asarray(batch)


def at(_: Any) -> int:
    return AT


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return small_store(tmp_path)


@pytest.fixture
def lookup(store: TeacherStore) -> TeacherLookup:
    return TeacherLookup(store, "fm", ids=as_ids, event_seconds=at)


class LookedUp(Dataset[float]):
    """A data set whose workers look up outputs."""

    def __init__(self, lookup: TeacherLookup) -> None:
        self.lookup = lookup

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> float:
        return float(self.lookup([index]).values)


def forked(function: Callable[[], Any]) -> str:
    """Return the outcome of a function in a forked process, which must end."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            text = f"returned {function()!r}"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException as error:
            text = f"no Exception: {type(error).__name__}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    os.waitpid(process, 0)
    return text


def uses(store: TeacherStore, lookup: TeacherLookup) -> dict[str, Callable[[], Any]]:
    logger = TeacherLogger(store, "fm")
    column = torch.tensor([7])
    logger.log(column, torch.tensor([AT]), torch.tensor([0.5]))
    return {
        "read": lambda: store.read("fm", 2),
        "refresh": store.refresh,
        "write": lambda: store.write(snapshot(), [9], [0.5], [AT]),
        "watermark": lambda: store.watermark("fm"),
        "advance": lambda: store.advance_watermark("fm", 9),
        "open": lambda: TeacherStore(store.url),
        "create": lambda: dd.new_store(Path(store.url) / "new"),
        "copy": lambda: copy.copy(store),
        "look_up": lambda: lookup([1]),
        "start": lambda: lookup.start([1]),
        "forget_windows": lookup.refresh,
        "log": logger.flush,
    }


USES = "read refresh write watermark advance open create copy look_up start forget_windows log"


@pytest.mark.parametrize("use", USES.split())
def test_a_forked_process_is_told_what_to_do(
    store: TeacherStore, lookup: TeacherLookup, use: str
) -> None:
    lookup([1])
    answer = forked(uses(store, lookup)[use])
    assert answer.startswith("StoreError: ") and "multiprocessing_context='spawn'" in answer
    lookup.close()


def test_a_forked_process_ends_with_a_look_up_of_its_parent(lookup: TeacherLookup) -> None:
    lookup([1])
    assert forked(lookup.close) == "returned None"
    assert lookup([1]).presence.all()


def test_workers_that_are_forked_are_told(lookup: TeacherLookup) -> None:
    lookup([1])
    loader = DataLoader(
        LookedUp(lookup), num_workers=1, multiprocessing_context="fork", timeout=SECONDS
    )
    with pytest.raises(StoreError, match="multiprocessing_context='spawn'"):
        list(loader)


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_open_the_store_anew(lookup: TeacherLookup, context: str) -> None:
    lookup([1])
    loader = DataLoader(
        LookedUp(lookup), num_workers=1, multiprocessing_context=context, timeout=SECONDS
    )
    assert [float(value) for value in loader] == [0.5, 1.5, 2.5]


def write_one(store: TeacherStore) -> int:
    return store.write(snapshot(), [9], [0.5], [AT]).written


def test_a_spawned_process_writes(store: TeacherStore) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(write_one, (store,)) == 1
    assert list(dd.by_id(store)) == [0, 1, 2, 9]


def test_a_store_travels_with_its_options(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "storage_options": {"timeout": "5s"},
        "checkpoints": tmp_path / "elsewhere",
    }
    store = dd.new_store(tmp_path / "store", **options)
    for travelled in (copy.copy(store), pickle.loads(pickle.dumps(store))):
        assert travelled is not store and travelled.url == store.url
        assert {name: getattr(travelled, name) for name in options} == options


def test_a_look_up_travels_with_its_options(store: TeacherStore) -> None:
    store.write(snapshot(2), [0], [9.0], [AT])
    lookup = TeacherLookup(
        store, "fm", ids=as_ids, event_seconds=at, exclude=[2], max_age_seconds=AT, missing="raise"
    )
    travelled = pickle.loads(pickle.dumps(lookup))
    assert travelled([0]).values.flatten().tolist() == [0.5]
    with pytest.raises(LookupError, match="1 of 1 examples have no output"):
        travelled([99])
    assert (lookup.counters["fm"].asked, travelled.counters["fm"].asked) == (0, 2)


def test_a_closed_look_up(lookup: TeacherLookup) -> None:
    with lookup:
        started = lookup.start([1])
    assert started.result().presence.all()
    lookup.close()
    with pytest.raises(ValueError, match="should be used before close"):
        lookup([1])
