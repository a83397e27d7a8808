"""TeacherLookup: its outputs, counters and memory, and its state after an error."""

from __future__ import annotations

import math
import shutil
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import das_data as dd
import numpy as np
import pytest
import torch
from das_data import AT, WINDOW, new_store, small_store, snapshot

from torchrec_exfm import NotPipelinedWarning, TeacherOutputs
from torchrec_exfm.das import StoreError, TeacherLookup, TeacherStore
from torchrec_exfm.das import windows as windows_module
from torchrec_exfm.das.arrays import MAX_SECONDS
from torchrec_exfm.das.index import WindowIndex


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    """Create a store with examples 0, 1, 2 of window 2."""
    return small_store(tmp_path)


def lookup_of(store: TeacherStore, teachers: Any = "fm", **options: Any) -> TeacherLookup:
    """Return a look-up for batches that map ids to event times."""
    functions = {"ids": lambda batch: list(batch), "event_seconds": lambda b: list(b.values())}
    return TeacherLookup(store, teachers, **{**functions, **options})


def listed(outputs: TeacherOutputs, teacher: int = 0) -> list[float | None]:
    """Return the first task's output of each example, None where it is absent."""
    pairs = zip(outputs.values[:, teacher, 0], outputs.presence[:, teacher, 0], strict=True)
    return [float(value) if present else None for value, present in pairs]


def several_windows(folder: Path, windows: int = 6) -> TeacherStore:
    """Create a store: example w with output w in each window w = 2, 3 ..."""
    store = new_store(folder)
    numbers = np.arange(2, 2 + windows)
    store.write(snapshot(), numbers, numbers.astype(np.float32), numbers * WINDOW)
    store.refresh()
    return store


def batch_of(*windows: int) -> dict[int, int]:
    return {window: window * WINDOW for window in windows}


def settle(lookup: TeacherLookup) -> None:
    """Wait until all requested windows are read."""
    windows = lookup._windows["fm"]
    while not all(p.done() for p in [*windows._held.values(), *windows._reread.values()]):
        time.sleep(0.002)


def after_refresh(lookup: TeacherLookup, batch: dict[int, int]) -> TeacherOutputs:
    """Return the outputs after the windows in memory were refreshed."""
    for _ in range(3):  # the first begins it, the second may find it done
        outputs = lookup(batch)
        settle(lookup)
    return outputs


# ---- What is given ----


def test_outputs_ages_and_their_kinds(store: TeacherStore) -> None:
    outputs = lookup_of(store)({1: AT, 7: AT, 0: AT})
    assert listed(outputs) == [1.5, None, 0.5]
    assert outputs.values.dtype == torch.float32 and outputs.presence.dtype == torch.bool
    assert outputs.age_seconds is not None
    assert outputs.age_seconds.tolist() == [[AT + 1 - 1_000], [0], [AT - 1_000]]


def test_the_same_example_several_times_in_a_batch(store: TeacherStore) -> None:
    lookup = TeacherLookup(store, "fm", ids=torch.tensor, event_seconds=lambda _: AT)
    assert listed(lookup([1, 1, 9, 1])) == [1.5, 1.5, None, 1.5]


@pytest.mark.parametrize("scalar", [AT, np.int64(AT), torch.tensor(AT), np.array(AT, np.int32)])
def test_one_event_time_for_all(store: TeacherStore, scalar: Any) -> None:
    assert listed(lookup_of(store, event_seconds=lambda _: scalar)({0: 5, 2: 5})) == [0.5, 2.5]


@pytest.mark.parametrize("scalar", [AT + 0.5, torch.tensor(AT + 0.5), math.nan])
def test_one_event_time_that_is_no_whole_number(store: TeacherStore, scalar: Any) -> None:
    with pytest.raises(TypeError, match="event_seconds of a batch should be whole numbers"):
        lookup_of(store, event_seconds=lambda _: scalar)({0: 5})


def test_an_example_is_looked_for_in_its_window_alone(store: TeacherStore) -> None:
    assert listed(lookup_of(store)({0: AT + WINDOW - 1, 1: AT + WINDOW, 2: 0})) == [0.5, None, None]


def test_an_empty_batch(store: TeacherStore) -> None:
    lookup = lookup_of(store)
    outputs = lookup({})
    assert outputs.values.shape == (0, 1, 1)
    assert lookup.counters["fm"].asked == 0 and math.isnan(lookup.counters["fm"].coverage)
    assert math.isnan(lookup.counters["fm"].age_seconds)


def test_two_teachers_are_in_the_order_asked_for(store: TeacherStore) -> None:
    store.write(snapshot(5, 2_000, "other"), [1, 8], [-1.0, -8.0], [AT, AT])
    batch = {0: AT, 1: AT, 8: AT}
    for order in (("fm", "other"), ("other", "fm")):
        lookup = lookup_of(store, order)
        outputs = lookup(batch)
        assert listed(outputs, order.index("fm")) == [0.5, 1.5, None]
        assert listed(outputs, order.index("other")) == [None, -1.0, -8.0]
        assert outputs.age_seconds is not None
        assert outputs.age_seconds[1].tolist() == [
            {"fm": AT + 1 - 1_000, "other": AT - 2_000}[teacher] for teacher in order
        ]
        assert [lookup.counters[teacher].missing for teacher in order] == [1, 1]
    pinned = lookup_of(store, ("fm", "other"), snapshot={"other": 4})(batch)
    assert listed(pinned, 0) == [0.5, 1.5, None]  # not pinned
    assert listed(pinned, 1) == [None, None, None]


def test_a_store_that_is_still_empty(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    lookup = lookup_of(store, refresh_seconds=0)
    assert listed(lookup({0: AT})) == [None]
    store.write(snapshot(), [0], [0.5], [AT])
    assert listed(after_refresh(lookup, {0: AT})) == [0.5]


def test_tasks_in_another_order(tmp_path: Path) -> None:
    store = new_store(tmp_path, tasks=("click", "stay", "buy"))
    store.write(snapshot(), [1], [[0.5, 60.0, -3.0]], [AT])
    for tasks, expected in [
        (None, [0.5, 60.0, -3.0]),
        (("buy", "click"), [-3.0, 0.5]),
        (("stay",), [60.0]),
    ]:
        outputs = lookup_of(store, tasks=tasks)({1: AT, 2: AT})
        assert outputs.values[0, 0].tolist() == expected
        assert outputs.presence.tolist() == [[[True] * len(expected)], [[False] * len(expected)]]


def test_rows_that_came_since_the_store_was_opened_are_found(store: TeacherStore) -> None:
    lookup = lookup_of(store)
    store.write(snapshot(), [9], [9.0], [AT])
    assert listed(lookup({9: AT})) == [9.0]


# ---- Policies and counters ----


def test_missing_examples_are_counted_or_refused(store: TeacherStore) -> None:
    lookup = lookup_of(store)
    lookup({0: AT, 7: AT})
    lookup({1: AT, 2: AT, 8: AT + WINDOW})
    counters = lookup.counters["fm"]
    assert (counters.asked, counters.present, counters.missing) == (5, 3, 2)
    assert counters.coverage == 0.6
    assert counters.age_seconds == AT + 1 - 1_000  # on average
    refusing = lookup_of(store, missing="raise")
    assert listed(refusing({0: AT})) == [0.5]
    with pytest.raises(LookupError, match=r"1 of 2 examples have no output of fm: ids \[7\]") as at:
        refusing({0: AT, 7: AT})
    assert "windows [2]" in dd.sentence(at.value) and store.url in str(at.value)


def test_old_outputs_are_masked_and_counted(store: TeacherStore) -> None:
    lookup = lookup_of(store, max_age_seconds=AT + 1 - 1_000)  # the age of example 1
    assert listed(lookup({0: AT, 1: AT, 2: AT, 9: AT})) == [0.5, 1.5, None, None]
    counters = lookup.counters["fm"]
    assert (counters.present, counters.stale, counters.missing) == (2, 1, 1)
    assert counters.coverage == 0.5 and counters.age_seconds == AT + 0.5 - 1_000


def test_logged_outputs_are_of_age_zero(store: TeacherStore) -> None:
    store.write(snapshot(2, AT + 99), [0], [9.0], [AT], logged=True)
    lookup = lookup_of(store, max_age_seconds=0)
    assert listed(lookup({0: AT, 1: AT})) == [9.0, None]
    assert lookup.counters["fm"].age_seconds == 0


def test_bad_rows_are_refused_or_left_out_and_counted(store: TeacherStore) -> None:
    dd.plant(store, example_id=[1], trained_through=[(AT + 9) * dd.US], snapshot=[9])
    batch = {0: AT, 1: AT}
    with pytest.raises(StoreError, match=r"part-.*\.parquet: 1 of 1 rows leak") as caught:
        lookup_of(store)(batch)
    assert "snapshot 9" in dd.sentence(caught.value)
    lookup = lookup_of(store, bad_rows="quarantine")
    assert listed(lookup(batch)) == listed(lookup(batch)) == [0.5, 1.5]
    assert lookup.counters["fm"].quarantined == 1


def test_late_rows_are_found_and_counted(store: TeacherStore) -> None:
    lookup, never = (lookup_of(store, refresh_seconds=seconds) for seconds in (0, None))
    batch = {0: AT, 8: AT, 9: AT}
    assert listed(lookup(batch)) == listed(never(batch)) == [0.5, None, None]
    store.write(snapshot(), [8, 9], [8.0, 9.0], [AT, AT])
    assert listed(after_refresh(lookup, batch)) == [0.5, 8.0, 9.0]
    assert lookup.counters["fm"].late == 2
    store.write(snapshot(2), [0], [7.0], [AT])
    assert listed(after_refresh(lookup, batch)) == [7.0, 8.0, 9.0]
    assert listed(after_refresh(never, batch)) == [0.5, None, None]
    assert never.counters["fm"].late == 0


def test_quarantined_rows_are_counted_once_however_often_they_are_read(store: TeacherStore) -> None:
    dd.plant(store, example_id=[7], trained_through=[(AT + 9) * dd.US])
    lookup = lookup_of(store, bad_rows="quarantine", refresh_seconds=0)
    batch = {0: AT, 8: AT}
    assert listed(lookup(batch)) == [0.5, None]
    store.write(snapshot(), [8], [8.0], [AT])
    assert listed(after_refresh(lookup, batch)) == [0.5, 8.0]
    assert lookup.counters["fm"].quarantined == 1


# ---- What is in memory ----


def test_the_next_window_is_read_ahead(tmp_path: Path) -> None:
    store = several_windows(tmp_path)
    lookup = lookup_of(store)
    assert listed(lookup(batch_of(2))) == [2.0]
    lookup._windows["fm"]._held[3].result()
    shutil.rmtree(dd.only_file(store, window=3).parent)
    assert listed(lookup(batch_of(3))) == [3.0]


@pytest.mark.filterwarnings("ignore:.*read again soon after")
def test_no_more_windows_are_in_memory_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = several_windows(tmp_path)
    alive: weakref.WeakSet[WindowIndex] = weakref.WeakSet()

    class Counted(WindowIndex):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            alive.add(self)

    monkeypatch.setattr(windows_module, "WindowIndex", Counted)
    rng = np.random.default_rng(0)
    for most in (1, 2, 3):
        alive.clear()
        lookup = lookup_of(store, max_windows=most, refresh_seconds=None)
        batches = [[2], [2, 3], [7, 2, 4, 5, 6, 3], [9], *(rng.choice(6, 2) + 2 for _ in range(12))]
        for windows in batches:
            outputs = lookup(batch_of(*windows))
            assert listed(outputs) == [w if w < 8 else None for w in dict.fromkeys(windows)]
            settle(lookup)
            assert len(lookup._windows["fm"]._held) <= most
            assert 1 <= len(alive) <= most


def test_look_ups_begun_early_keep_their_order(tmp_path: Path) -> None:
    lookup = lookup_of(several_windows(tmp_path), max_windows=1)
    started = [lookup.start(batch_of(window)) for window in (2, 5, 3, 7, 2)]
    assert [listed(future.result()) for future in started] == [[2.0], [5.0], [3.0], [7.0], [2.0]]


def test_a_batch_may_be_overwritten_once_its_look_up_has_begun(store: TeacherStore) -> None:
    ids, seconds, busy = torch.tensor([0]), torch.tensor([AT]), threading.Event()
    lookup = TeacherLookup(store, "fm", ids=lambda b: b[0], event_seconds=lambda b: b[1])
    lookup._thread.submit(busy.wait)
    started = lookup.start((ids, seconds))
    ids.fill_(1)
    seconds.fill_(0)
    busy.set()
    assert listed(started.result()) == [0.5]


# ---- What goes wrong ----


@pytest.mark.parametrize("refresh", [0, None])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_lost_file_is_named_and_found_when_it_is_back(
    tmp_path: Path, ahead: bool, refresh: float | None
) -> None:
    store = several_windows(tmp_path / "store")
    path = dd.only_file(store, window=3)
    shutil.move(path, tmp_path / "kept")
    lookup = lookup_of(store, refresh_seconds=refresh)
    if ahead:
        assert listed(lookup(batch_of(2))) == [2.0]
    for _ in range(2):
        with pytest.raises(StoreError, match="is missing") as caught:
            lookup(batch_of(2, 3))
        assert str(path) in dd.sentence(caught.value)
    shutil.move(tmp_path / "kept", path)
    for _ in range(3):
        assert listed(lookup(batch_of(2, 3))) == [2.0, 3.0]


def test_an_error_from_before_a_file_was_back_is_not_told_later(tmp_path: Path) -> None:
    """A check for late rows that began while the file was lost ends after it was read again."""
    store = several_windows(tmp_path / "store")
    path = dd.only_file(store, window=3)
    shutil.move(path, tmp_path / "kept")
    lookup = lookup_of(store, refresh_seconds=0)
    reader, held = lookup._reader._thread, lookup._windows["fm"]._held
    for _ in range(2):
        lookup(batch_of(2))
        reader.submit(lambda: None).result()  # window 3 was read ahead, and then again: it failed
    busy = threading.Event()
    reader.submit(busy.wait)
    with pytest.raises(StoreError, match="is missing"):
        lookup(batch_of(3))
    shutil.move(tmp_path / "kept", path)
    started = lookup.start(batch_of(3))
    while 3 not in held:  # until it waits for the reader
        time.sleep(0.001)
    busy.set()
    assert listed(started.result()) == listed(lookup(batch_of(3))) == [3.0]


WRONG = {
    "no ids": ({}, SimpleNamespace(event_seconds=[AT]), ValueError, "pass ids=..., a function"),
    "no times": ({}, SimpleNamespace(example_ids=[1]), ValueError, "pass event_seconds=..., a f"),
    "no key": (
        {"ids": lambda batch: batch["id"], "event_seconds": lambda batch: batch["at"]},
        {"id": [1]},
        ValueError,
        "event_seconds should take the user's batch .* received dict and KeyError: 'at'",
    ),
    "float ids": (
        {},
        SimpleNamespace(example_ids=torch.ones(1), event_seconds=[AT]),
        TypeError,
        "the example ids of a batch should be whole numbers .*float32",
    ),
    "fewer times": (
        {},
        SimpleNamespace(example_ids=[1, 2], event_seconds=[AT]),
        ValueError,
        r"event_seconds of a batch should be of shape \(2,\); received \(1,\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_batch_it_does_not_understand(store: TeacherStore, kind: str) -> None:
    options, batch, error, words = WRONG[kind]
    with pytest.raises(error, match=words) as caught:
        TeacherLookup(store, "fm", **options)(batch)
    dd.sentence(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teachers": "nobody"}, r"teachers: .* \('fm',\), received \('nobody',\)"),
        ({"teachers": ()}, r"missing teachers: expected .* received \(\)"),
        ({"teachers": ("fm", "fm")}, "unknown, repeated or missing teachers"),
        ({"tasks": ("buy",)}, r"tasks: .* \('label',\), received \('buy',\)"),
        ({"tasks": ()}, "missing tasks"),
        ({"snapshot": {"nobody": 1}}, "unknown, .* teachers of snapshot"),
        ({"missing": "drop"}, "'mask' or 'raise'; received 'drop'"),
        ({"bad_rows": "drop"}, "'refuse' or 'quarantine'; received 'drop'"),
        ({"max_age_seconds": -1}, "seconds from 0; received -1"),
        ({"max_age_seconds": math.nan}, "seconds from 0; received nan"),
        ({"max_age_seconds": "5"}, "max_age_seconds should be .* seconds from 0; received '5'"),
        (
            {"refresh_seconds": math.nan},
            "refresh_seconds should be .* seconds from 0; received nan",
        ),
        ({"max_windows": 0}, "at least 1; received 0"),
    ],
)
def test_wrong_options_are_refused(store: TeacherStore, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lookup_of(store, **options)


def test_a_look_up_that_finds_nothing_is_told_once(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    store.write(snapshot(), [1], [0.5], [AT])
    lookup = lookup_of(store, snapshot=9)
    for _ in range(9):
        assert listed(lookup({1: AT})) == [None]
    with pytest.warns(RuntimeWarning, match="no output for any of the first 10 examples") as caught:
        for _ in range(11):
            lookup({1: AT})
    assert len(caught) == 1


@pytest.mark.parametrize("seconds", [-1, MAX_SECONDS, 1_760_000_000_000])
def test_times_of_another_unit_are_refused(tmp_path: Path, seconds: int) -> None:
    with pytest.raises(ValueError, match=f"seconds since 1970.*received {seconds:,}: "):
        lookup_of(new_store(tmp_path))({1: seconds})
    with pytest.raises(ValueError, match="should be at least 0; received -5"):
        lookup_of(new_store(tmp_path))({-5: AT})


# ---- Teachers of different tasks, and of several stores ----


def two_tasks(folder: Path) -> TeacherStore:
    """Create a store: a GBDT knows clicks, a foundation model clicks and conversions."""
    store = new_store(folder, tasks=("click", "buy"))
    store.write(snapshot(teacher="gbdt"), [0, 1], [0.5, 1.5], [AT, AT], tasks=["click"])
    store.write(snapshot(), [1, 2], [[1.0, -1.0], [2.0, -2.0]], [AT, AT])
    store.refresh()
    return store


def test_a_teacher_that_knows_some_of_the_tasks(tmp_path: Path) -> None:
    store, batch = two_tasks(tmp_path), {0: AT, 1: AT, 2: AT}
    lookup = lookup_of(store, ("gbdt", "fm"))
    outputs = lookup(batch)
    assert outputs.presence.tolist() == [
        [[True, False], [False, False]],
        [[True, False], [True, True]],
        [[False, False], [True, True]],
    ]
    assert outputs.values.tolist() == [[[0.5, 0], [0, 0]], [[1.5, 0], [1, -1]], [[0, 0], [2, -2]]]
    assert [lookup.counters[teacher].present for teacher in ("gbdt", "fm")] == [2, 2]
    bought = lookup_of(store, ("gbdt", "fm"), tasks=["buy"])
    outputs = bought(batch)
    assert outputs.presence[:, :, 0].tolist() == [[False, False], [False, True], [False, True]]
    assert [bought.counters[teacher].missing for teacher in ("gbdt", "fm")] == [3, 1]
    with pytest.raises(LookupError, match="1 of 3 examples have no output of gbdt"):
        lookup_of(store, "gbdt", missing="raise")(batch)


def test_an_output_that_is_nan_is_no_output_that_is_null(tmp_path: Path) -> None:
    store = two_tasks(tmp_path)
    for nan in (np.float32(np.nan), np.uint32(0xFFFFFFFF).view(np.float32)):
        with pytest.raises(ValueError, match="1 of 1 rows have an output that is NaN"):
            store.write(snapshot(), [7], np.array([nan]), [AT], tasks=["buy"])
    dd.plant(store, output_click=[float("nan")], output_buy=[None], example_id=[7])
    with pytest.raises(StoreError, match="1 of 1 rows have an output that is NaN"):
        lookup_of(store)({7: AT})


@pytest.mark.parametrize("tasks", [(), ["other"], ["buy", "buy"], "view"])
def test_tasks_that_the_store_does_not_have_are_not_written(tmp_path: Path, tasks: Any) -> None:
    store = new_store(tmp_path, tasks=("click", "buy"))
    with pytest.raises(ValueError, match=r"tasks should be of the store's, \('click', 'buy'\)"):
        store.write(snapshot(), [1], [0.5], [AT], tasks=tasks)


def test_no_more_tasks_are_in_memory_than_asked_for(tmp_path: Path) -> None:
    names = tuple(f"task_{number}" for number in range(16))
    store, ids = new_store(tmp_path, tasks=names), np.arange(1_000)
    outputs = np.random.default_rng(0).normal(size=(1_000, 16)).astype(np.float32)
    store.write(snapshot(), ids, outputs, AT + ids)
    sizes = {}
    for tasks in (["task_3"], ["task_9", "task_3"], None):
        lookup = lookup_of(store, tasks=tasks)
        values = lookup({5: AT + 5}).values[0, 0].tolist()
        assert values == outputs[5, [names.index(task) for task in tasks or names]].tolist()
        sizes[len(values)] = lookup._windows["fm"]._held[2].result().index.nbytes / 1_000
    assert sizes[1] < 21 and sizes[2] < 29 and sizes[16] > 76


def test_teachers_of_several_stores(tmp_path: Path) -> None:
    clicks = new_store(tmp_path / "clicks", tasks=("click",), window_seconds=WINDOW // 2)
    clicks.write(snapshot(through=AT - 7, teacher="gbdt"), [0, 1], [0.5, 1.5], [AT, AT + WINDOW])
    both = new_store(tmp_path / "both", tasks=("buy", "click"))
    both.write(snapshot(), [1, 2], [[-1.0, 1.0], [-2.0, 2.0]], [AT + WINDOW, AT])
    stores = {"gbdt": clicks, "fm": both}
    batch = {0: AT, 1: AT + WINDOW, 2: AT}
    with lookup_of(stores, None) as lookup:
        assert lookup.teachers == ("gbdt", "fm") and lookup.tasks == ("click", "buy")
        outputs = lookup(batch)
        assert outputs.values.tolist() == [
            [[0.5, 0], [0, 0]],
            [[1.5, 0], [1, -1]],
            [[0, 0], [2, -2]],
        ]
        assert outputs.presence.sum((0, 2)).tolist() == [2, 4]
        assert outputs.age_seconds is not None and outputs.age_seconds[0].tolist() == [7, 0]
    assert listed(lookup_of(stores, "fm", tasks=["click"])(batch)) == [None, 1.0, 2.0]
    with pytest.raises(ValueError, match="missing teachers: expected a subset of"):
        lookup_of(stores, "other")
    with pytest.raises(ValueError, match=r"missing tasks: expected a subset of \('click', 'buy'\)"):
        lookup_of(stores, None, tasks=["view"])
    with pytest.raises(ValueError, match=r"a subset of \('fm',\), received \('gbdt',\)"):
        lookup_of({"gbdt": both}, None)
    with pytest.raises(TypeError, match="store should be a TeacherStore; received str"):
        lookup_of({"gbdt": clicks, "fm": "both"}, None)


def test_windows_that_are_read_again_and_again_are_told_once(tmp_path: Path) -> None:
    store = several_windows(tmp_path, windows=5)
    in_order, shuffled = (lookup_of(store, refresh_seconds=None) for _ in range(2))
    for window in (2, 3, 4, 5, 6) * 2:
        assert listed(in_order(batch_of(window))) == [float(window)]
    with pytest.warns(NotPipelinedWarning, match="max_windows=2: raise it, or give") as warned:
        for _ in range(10):
            assert listed(shuffled(batch_of(2, 4, 6))) == [2.0, 4.0, 6.0]
    assert len(warned) == 1
