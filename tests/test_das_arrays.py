"""Times, tables and masked arrays from users: taken as meant, or refused."""

from __future__ import annotations

import calendar
import contextlib
import datetime as dt
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import das_data as dd
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from das_data import AT, new_store, snapshot
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.masked import masked_tensor

from torchrec_exfm.das import (
    Shard,
    Snapshot,
    TeacherLogger,
    TeacherLookup,
    TeacherStore,
    Window,
    arrays,
    hash_ids,
    newest_snapshot,
    publish,
    score,
    wait_for_outputs,
)
from torchrec_exfm.das.__main__ import main

BOUND = 7_258_118_400  # 2200-01-01
DATE = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)
NOW = 1_790_000_000


@pytest.fixture
def store(tmp_path: Path) -> TeacherStore:
    return new_store(tmp_path / "store")


def masked_of_torch(values: list[Any], mask: list[bool]) -> Any:
    with warnings.catch_warnings(action="ignore"):  # a prototype
        return masked_tensor(torch.tensor(values), ~torch.tensor(mask))


# ---- Calls that take columns: each with two rows ----


def write(store: TeacherStore, ids: Any, times: Any, outputs: Any) -> None:
    store.write(snapshot(), ids, outputs, times)


def quarantine(store: TeacherStore, ids: Any, times: Any, outputs: Any) -> None:
    store.write(snapshot(), ids, outputs, times, bad_rows="quarantine")


def look_up(store: TeacherStore, ids: Any, times: Any, _: Any) -> None:
    batch = SimpleNamespace(example_ids=ids, event_seconds=times)
    TeacherLookup(store, "fm")(batch)


def log(store: TeacherStore, ids: Any, times: Any, _: Any) -> None:
    logger = TeacherLogger(store, "fm")
    logger.log(ids, times, torch.tensor([0.5, 1.5]))
    logger.flush()


class Batch(SimpleNamespace):
    def to(self, device: torch.device, non_blocking: bool) -> Batch:
        return self


class Teacher(nn.Module):
    def forward(self, batch: Batch) -> Any:
        return None, (None, batch.logits)


def score_all(store: TeacherStore, ids: Any, times: Any, _: Any) -> None:
    batch = Batch(example_ids=ids, event_seconds=times, logits=torch.tensor([0.5, 1.5]))
    shard = Shard("a", lambda: [batch])
    score(Teacher(), store, [shard], snapshot(), device=torch.device("cpu"), progress=False)


def write_keys(store: TeacherStore, ids: Any, times: Any, outputs: Any) -> None:
    store.write(snapshot(), [1, 2], [0.5, 1.5], times, keys={"user_id": ids})


COLUMNS: list[Callable[..., None]] = [write, quarantine, look_up, log, score_all]
OTHER_KINDS = {
    "whole floats": (np.array([AT, AT], np.float64), "float64"),
    "float tensor": (torch.tensor([AT, AT + 0.5]), "float32"),
    "NaN": ([AT, np.nan], "float64"),
    "NaN among objects": (np.array([AT, np.nan], object), "float and int objects: convert"),
    "datetimes among others": ([DATE, AT], "datetime and int objects: convert"),
    "booleans": ([True, False], "bool"),
    "timedelta64": (np.array([0, 1], "timedelta64[s]"), r"timedelta64\[s\]: convert"),
    "strings": (["1790000000", "1790000000"], "str objects: convert"),
    "numbers and strings": ([AT, "1790000000"], "int and str objects: convert"),
    "numpy's strings": (np.array(["1", "2"]), "str objects: convert"),
    "pandas strings": (pd.Series(["1", "2"]), "str objects: convert"),
    "Polars strings": (pl.Series(["1", "2"]), "str objects: convert"),
    "both sides of 2^63": ([AT, 2**63], "int objects: convert"),
    "structured": (np.zeros(2, [("a", "i8")]), "convert"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("call", [*COLUMNS, write_keys])
def test_times_and_ids_of_another_kind_are_refused(
    store: TeacherStore, call: Callable[..., None], kind: str
) -> None:
    values, words = OTHER_KINDS[kind]
    for given_ in ([1, 2], values), (values, [AT, AT]):
        with pytest.raises(TypeError, match="should be whole numbers.*; received .*" + words) as e:
            call(store, *given_, [0.5, 1.5])
        dd.sentence(e.value)
    assert store.refresh() == 0


def nulls() -> dict[str, tuple[Any, Any]]:
    """Return integers and floats whose second element is null."""
    integers, floats, mask = [AT, AT + 1], [0.5, 1.5], [False, True]
    return {
        "numpy": (np.ma.array(integers, mask=mask), np.ma.array(floats, mask=mask)),
        "numpy, in a list": (
            [np.ma.array(value, mask=masked) for value, masked in zip(integers, mask, strict=True)],
            [np.ma.array([value], mask=masked) for value, masked in zip(floats, mask, strict=True)],
        ),
        "numpy, nested": ([AT, np.ma.masked], [[0.5], [np.ma.masked]]),
        "torch": (masked_of_torch(integers, mask), masked_of_torch(floats, mask)),
        "list": ([AT, None], [0.5, None]),
        "objects": (np.array([AT, None]), np.array([0.5, pd.NaT], object)),
        "pandas": (pd.Series([AT, None], dtype="Int64"), pd.Series([0.5, None], dtype="Float64")),
        "pandas array": (pd.array([AT, None], dtype="Int64"), pd.array([0.5, None])),
        "pandas objects": (pd.Series([AT, pd.NA], dtype=object), [0.5, pd.NA]),
        "pandas on Arrow": (
            pd.Series([AT, None], dtype="int64[pyarrow]"),
            pd.Series([0.5, None], dtype="double[pyarrow]"),
        ),
        "Polars": (pl.Series([AT, None]), pl.Series([0.5, None])),
        "Arrow": (pa.array([AT, None]), pa.array([0.5, None])),
        "Arrow, chunked": (pa.chunked_array([[AT], [None]]), pa.chunked_array([[0.5], [None]])),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.parametrize("kind", nulls())
@pytest.mark.parametrize("call", [*COLUMNS, write_keys])
def test_what_is_null_or_masked_is_refused(
    store: TeacherStore, call: Callable[..., None], kind: str
) -> None:
    integers, floats = nulls()[kind]
    cases = [([1, 2], integers, [0.5, 1.5]), (integers, [AT, AT], [0.5, 1.5])]
    if call in (write, quarantine):
        cases.append(([1, 2], [AT, AT], floats))
    for case in cases:
        with pytest.raises(
            ValueError, match=r"no nulls and .* received 1 such rows: 1: "
        ) as caught:
            call(store, *case)
        dd.sentence(caught.value)
    assert store.refresh() == 0


def test_masked_embeddings_are_refused(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path, embedding_width=2)
    for embeddings in (
        np.ma.array([[1.0, 2.0]], mask=[[False, True]]),
        [np.ma.array([1.0, 2.0], mask=[False, True])],
        masked_of_torch([[1.0, 2.0]], [[False, True]]),
    ):
        with pytest.raises(ValueError, match=r"embeddings should have no nulls .*: 0: "):
            store.write(snapshot(), [1], [0.5], [AT], embeddings=embeddings)


def test_many_nulls_are_counted(store: TeacherStore) -> None:
    ids = np.ma.array(np.arange(9), mask=np.arange(9) > 1)
    with pytest.raises(ValueError, match=r"received 7 such rows: 2, 3, 4, 5, 6, \.\.\.: "):
        store.write(snapshot(), ids, np.zeros(9), np.full(9, AT))


def test_a_mask_that_covers_nothing_is_none(store: TeacherStore) -> None:
    integers, floats = np.ma.array([1, 2], mask=[0, 0]), np.ma.array([0.5, 1.5])
    store.write(snapshot(), integers, floats, np.ma.array([AT, AT]), keys={"user_id": integers})
    store.write(
        snapshot(2), [3, 4], masked_of_torch([2.5, 3.5], [False] * 2), np.ma.array([AT, AT])
    )
    assert dd.by_id(store) == {1: [0.5], 2: [1.5], 3: [2.5], 4: [3.5]}


COLUMNS_OF_WHOLE_NUMBERS: dict[str, Callable[[list[int]], Any]] = {
    "pandas": pd.Series,
    "pandas nullable": lambda values: pd.Series(values, dtype="Int64"),
    "pandas on Arrow": lambda values: pd.Series(values, dtype="int64[pyarrow]"),
    "Polars": pl.Series,
    "Arrow": pa.array,
    "chunked": lambda values: pa.chunked_array([values[:1], values[1:]]),
    "tensors": lambda values: [torch.tensor(value) for value in values],
    "numpy's": lambda values: [np.int64(value) for value in values],
    "uint64": lambda values: np.array(values, np.uint64),
}


@pytest.mark.parametrize("kind", COLUMNS_OF_WHOLE_NUMBERS)
def test_columns_of_whole_numbers_are_taken(store: TeacherStore, kind: str) -> None:
    make = COLUMNS_OF_WHOLE_NUMBERS[kind]
    store.write(snapshot(), make([2**62 + 1, 5]), [0.5, 1.5], make([AT, AT + 1]))
    assert dd.by_id(store) == {5: [1.5], 2**62 + 1: [0.5]}


def test_an_id_from_2_63_on_is_told_of_hash_ids(store: TeacherStore) -> None:
    ids = np.array([5, 2**63], np.uint64)
    for call in write, look_up, log, score_all:
        with pytest.raises(
            ValueError, match=r"below 2\^63; received 9223372036854775808: .*hash_ids"
        ):
            call(store, ids, [AT, AT], [0.5, 1.5])
    write(store, hash_ids(ids), [AT, AT], [0.5, 1.5])
    assert sorted(dd.by_id(store)) == sorted(hash_ids(ids).tolist())


# ---- Timestamps ----

MOMENTS = [  # of seconds AT and AT + 1, in two zones
    dt.datetime.fromtimestamp(AT, dt.timezone.utc) + dt.timedelta(microseconds=1),
    dt.datetime.fromtimestamp(AT + 1.999_999, dt.timezone(dt.timedelta(hours=-9.5))),
]
NAIVE = [moment.astimezone(dt.timezone.utc).replace(tzinfo=None) for moment in MOMENTS]
NEW_YORK = "America/New_York"
TIMESTAMPS: dict[str, Callable[[list[dt.datetime | None]], Any]] = {
    "datetime": list,
    "objects": lambda naive: np.array(naive, object),
    "pandas's own": lambda naive: [pd.Timestamp(time) for time in naive],
    **{
        f"numpy {unit}": lambda naive, unit=unit: np.array(naive, "M8[us]").astype(f"M8[{unit}]")
        for unit in ("s", "ms", "us", "ns", "ps")
    },
    "numpy's, in a list": lambda naive: [np.datetime64(time) for time in naive],
    "pandas": pd.Series,
    "pandas ns": lambda naive: pd.Series(naive, dtype="datetime64[ns]"),
    "pandas index": pd.DatetimeIndex,
    "pandas zone": lambda naive: pd.Series(pd.DatetimeIndex(naive, tz="UTC").tz_convert(NEW_YORK)),
    "pandas array": lambda naive: pd.DatetimeIndex(naive, tz="UTC").array,
    "pandas on Arrow": lambda naive: pd.Series(naive).astype("timestamp[us][pyarrow]"),
    "pandas on Arrow, zone": lambda naive: pd.Series(
        pd.array(
            pa.array(naive, pa.timestamp("us", NEW_YORK)),
            "timestamp[us, America/New_York][pyarrow]",
        )
    ),
    "Arrow": lambda naive: pa.array(naive, pa.timestamp("us")),
    "Arrow ns": lambda naive: pa.array(naive, pa.timestamp("ns")),
    "Arrow zone": lambda naive: pa.array(naive, pa.timestamp("us", NEW_YORK)),
    "Arrow chunked": lambda naive: pa.chunked_array([naive[:1], naive[1:]], pa.timestamp("us")),
    "Polars": pl.Series,
    "Polars ms": lambda naive: pl.Series(naive, dtype=pl.Datetime("ms")),
    "Polars zone": lambda naive: pl.Series(naive, dtype=pl.Datetime("us", "UTC")),
}


@pytest.mark.parametrize("kind", TIMESTAMPS)
def test_timestamps_are_the_seconds_that_they_lie_in(kind: str) -> None:
    make = TIMESTAMPS[kind]
    assert arrays.as_seconds("times", make([*NAIVE])).tolist() == [AT, AT + 1]
    before = dt.datetime(1969, 12, 31, 23, 59, 59, 500_000)
    assert arrays.as_epoch("times", make([NAIVE[0], before])).tolist() == [AT, -1]
    with pytest.raises(ValueError, match="some are before 1970"):
        arrays.as_seconds("times", make([NAIVE[0], before]))
    with pytest.raises(ValueError, match=r"times should have no nulls .* 1 such rows: 1: "):
        arrays.as_seconds("times", make([NAIVE[0], None]))


@pytest.mark.parametrize(
    "make",
    [
        list,
        pa.array,
        pl.Series,
        lambda days: np.array(days, "M8[D]"),
        lambda days: pa.array(days, pa.date64()),
    ],
    ids=["date", "Arrow", "Polars", "numpy", "date64"],
)
def test_a_date_is_its_first_second(make: Callable[[Any], Any]) -> None:
    days = make([dt.date(1970, 1, 2), dt.date(2020, 1, 1)])
    assert arrays.as_seconds("days", days).tolist() == [86_400, DATE.timestamp()]


@given(st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2199, 12, 31), timezones=st.timezones()))
def test_a_zone_is_counted_in(moment: dt.datetime) -> None:
    expected = [calendar.timegm(moment.utctimetuple())]  # by the calendar, in UTC
    assert arrays.as_epoch("times", [moment]).tolist() == expected
    assert arrays.as_epoch("times", pd.Series([moment])).tolist() == expected


@pytest.mark.parametrize("call", [write, quarantine, log, score_all])
def test_timestamps_are_stored(store: TeacherStore, call: Callable[..., None]) -> None:
    call(store, [1, 2], pd.Series(pd.DatetimeIndex(NAIVE, tz=NEW_YORK)), [0.5, 1.5])
    store.refresh()
    hours = dt.timedelta(hours=5) // dt.timedelta(seconds=1)
    rows = [store.read("fm", window)[0] for window in store.windows("fm")]
    times = sorted(time for part in rows for time in part.event_time.tolist())
    assert times == [(AT + hours) * 10**6, (AT + hours + 1) * 10**6]


def test_timestamps_are_looked_up(store: TeacherStore, tmp_path: Path) -> None:
    write(store, [1, 2], [AT, AT + 1], [0.5, 1.5])
    for times in MOMENTS, pd.Series(NAIVE), pa.array(MOMENTS), pl.Series(NAIVE):
        look_up(store, [1, 2], times, None)
        batch = SimpleNamespace(example_ids=[1, 2], event_seconds=times)
        assert TeacherLookup(store, "fm", missing="raise")(batch).values.flatten().tolist() == [
            0.5,
            1.5,
        ]


@pytest.mark.parametrize("kind", ["datetime", "Arrow zone", "Polars"])
def test_show_takes_timestamps(
    store: TeacherStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write(store, [1, 2], [AT, AT + 1], [0.5, 1.5])
    path = tmp_path / "ids.parquet"
    times = pa.array(TIMESTAMPS[kind]([*NAIVE]))
    pq.write_table(pa.table({"example_id": [1, 2], "event_time": times}), path)
    assert main(["show", store.url, "--ids", str(path)]) == 0
    assert "coverage 100.00% of the examples asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind",
    [
        lambda time: time,
        pd.Timestamp,
        np.datetime64,
        lambda time: time.replace(tzinfo=dt.timezone.utc),
    ],
)
def test_one_time_may_be_a_timestamp(store: TeacherStore, kind: Callable[[Any], Any]) -> None:
    time = kind(NAIVE[1])
    assert Snapshot("fm", 1, time).trained_through_seconds == AT + 1
    for call in SCALARS.values():
        call(store, time)
    assert store.watermark("fm") == AT + 1


def moment(microseconds: int) -> dt.datetime:
    return DATE + dt.timedelta(microseconds=microseconds)


@given(*[st.integers(0, 3_000_000).map(moment)] * 2)
@example(moment(10_900_000), moment(10_700_000))
@example(moment(10_200_000), moment(10_700_000))
def test_no_leak_passes_for_the_fraction_of_a_second(
    through: dt.datetime, event: dt.datetime
) -> None:
    trained = Snapshot("fm", 1, cast(Any, through)).trained_through_seconds
    seen = trained >= arrays.as_seconds("times", [event])[0]  # what the leak rule refuses
    assert seen or event > through
    # as far as the store's seconds can tell: an event of a later second is none
    assert not seen or event < through + dt.timedelta(seconds=1)


@pytest.mark.parametrize(
    ("through", "event", "leaks"),
    [(10.9, 10.7, True), (10.7, 10.7, True), (10.2, 10.7, True), (9.9, 10.2, False)],
)
def test_a_leak_within_a_second_is_refused(
    store: TeacherStore, through: float, event: float, leaks: bool
) -> None:
    trained, shown = (DATE + dt.timedelta(seconds=second) for second in (through, event))
    with pytest.raises(ValueError, match="leak: ") if leaks else contextlib.nullcontext():
        store.write(Snapshot("fm", 1, cast(Any, trained)), [1], [0.5], [shown])


# ---- Times ----

SCALARS: dict[str, Callable[[TeacherStore, Any], Any]] = {
    "Snapshot": lambda store, time: Snapshot("fm", 1, time),
    "publish": lambda store, time: publish(store, "fm", None, trained_through_seconds=time),
    "newest_snapshot": lambda store, time: newest_snapshot(store, "fm", before_seconds=time),
    "advance_watermark": lambda store, time: store.advance_watermark("fm", time),
    "Shard": lambda store, time: Shard("a", list, begin_seconds=time),
    "Window's begin": lambda store, time: Window(time, BOUND - 1, ()),
    "Window's end": lambda store, time: Window(0, time, ()),
    "look-up": lambda store, time: look_up(store, [1], time, None),
}
OTHER_TIMES = {
    "float": (float(NOW), "float64"),
    "NaN": (np.nan, "float64"),
    "boolean": (True, "bool"),
    "boolean of torch": (torch.tensor(True), "bool"),
    "text": ("1790000000", "str objects: convert"),
    "timedelta": (dt.timedelta(1), "timedelta objects: convert"),
    "number of Arrow": (pa.scalar(5), "Int64Scalar"),
    "beyond 64 bits": (2**70, "int objects: convert"),
}


@pytest.mark.parametrize("kind", OTHER_TIMES)
@pytest.mark.parametrize("call", SCALARS)
def test_one_time_of_another_kind_is_refused(store: TeacherStore, call: str, kind: str) -> None:
    value, words = OTHER_TIMES[kind]
    with pytest.raises(TypeError, match="_seconds.* whole numbers.*; received " + words) as caught:
        SCALARS[call](store, value)
    dd.sentence(caught.value)
    assert store.refresh() == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1, r"received -1: some are before 1970"),
        (BOUND, r"\[0, 7,258,118,400\); received 7,258,118,400: deciseconds"),
        (NOW * 10, "received 17,900,000,000: deciseconds. divide by 10$"),
        (NOW * 100, "centiseconds. divide by 100$"),
        (NOW * 1_000, "received 1,790,000,000,000: milliseconds. divide by 1,000$"),
        (978_300_760_000, "milliseconds. divide by 1,000$"),
        (NOW * 10**6, "microseconds. divide by 1,000,000$"),
        (np.int64(NOW * 10**9), "nanoseconds. divide by 1,000,000,000$"),
        (np.uint64(2**63), "below 2.63"),
        (np.ma.masked, "no nulls and nothing masked"),
        (np.ma.array(5, mask=True), "no nulls and nothing masked"),
        (pd.NA, "no nulls and nothing masked"),
        (pd.NaT, "no nulls and nothing masked"),
    ],
)
@pytest.mark.parametrize("call", SCALARS)
def test_one_time_out_of_range_is_refused(
    store: TeacherStore, call: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError, match="_seconds.* should .*" + words) as caught:
        SCALARS[call](store, value)
    dd.sentence(caught.value)
    assert store.refresh() == 0


@pytest.mark.parametrize("call", SCALARS)
def test_several_times_for_one_are_refused(store: TeacherStore, call: str) -> None:
    with pytest.raises(ValueError, match=r"one time; .*\(2,\)|shape \(1,\); received \(2,\)"):
        SCALARS[call](store, torch.tensor([5, 6]))


@pytest.mark.parametrize("value", [7, np.int32(7), np.uint64(7), np.array(7), torch.tensor(7)])
@pytest.mark.parametrize("call", SCALARS)
def test_one_time_is_taken_as_any_integer(store: TeacherStore, call: str, value: Any) -> None:
    SCALARS[call](store, value)
    assert type(Snapshot("fm", 1, value).trained_through_seconds) is int


def test_one_time_for_a_column_is_refused(store: TeacherStore) -> None:
    for call in write, log, score_all:
        with pytest.raises(ValueError, match=r"event_seconds should be of shape .* received \(\)"):
            call(store, [1, 2], AT, [0.5, 1.5])


UNITS = st.sampled_from(sorted(arrays._UNITS.items()))


@given(st.integers(631_152_000, 4_102_444_799), UNITS, st.integers(0, 999_999_999))
def test_the_unit_of_a_time_is_told(second: int, unit: tuple[str, int], part: int) -> None:
    name, divisor = unit
    time = second * divisor + part % divisor
    if time < BOUND:
        return  # deciseconds of before 1993
    with pytest.raises(ValueError, match=rf"received {time:,}: {name}\? divide by {divisor:,}$"):
        arrays.as_seconds("times", np.array([time]))


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, BOUND - 1, BOUND, -1])))
def test_a_column_of_times_is_taken_if_all_are_in_range(times: list[int]) -> None:
    column = np.array(times, np.int64)
    if all(0 <= time < BOUND for time in times):
        assert arrays.as_seconds("times", column).tolist() == times
    else:
        with pytest.raises(ValueError, match=rf"received {min(times):,}( to {max(times):,})?: "):
            arrays.as_seconds("times", column)


def test_times_in_centiseconds_do_not_pass_the_leak_rule(store: TeacherStore) -> None:
    with pytest.raises(ValueError, match=r"centiseconds\? divide by 100\): rows 0, 1"):
        store.write(snapshot(), [1, 2], [0.5, 1.5], [NOW * 100, NOW * 100 + 1])
    assert quarantined(store, [NOW * 1_000, AT]) == {
        "have an event time outside of [0, 7,258,118,400) seconds "
        "(milliseconds? divide by 1,000)": 1
    }


def quarantined(store: TeacherStore, times: list[int]) -> dict[str, int]:
    return store.write(snapshot(), [1, 2], [0.5, 1.5], times, bad_rows="quarantine").quarantined


@pytest.mark.parametrize("seconds", [-1, np.nan, "5", None, dt.timedelta(5)])
def test_a_length_of_time_is_a_number(store: TeacherStore, seconds: Any) -> None:
    with pytest.raises(ValueError, match="timeout_seconds should be a number of seconds from 0"):
        lookup = TeacherLookup(store, "fm")
        next(wait_for_outputs([Window(0, 5, ())], lookup, timeout_seconds=seconds))


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("event_seconds", [NOW * 1_000], "milliseconds? divide by 1,000"),
        ("event_time", [NOW * 100], "centiseconds? divide by 100"),
        ("event_time", pa.array([NOW * 1_000], pa.timestamp("s")), "milliseconds? divide by 1,000"),
        ("event_seconds", [float(AT)], "whole numbers (int64) or timestamps; received float64"),
        ("event_time", ["2020-01-01"], "or timestamps; received str objects: convert"),
        ("event_time", pa.array([None], pa.date32()), "should have no nulls"),
        ("event_seconds", pa.array([None], pa.int64()), "should have no nulls"),
    ],
)
def test_the_examples_of_show_are_held_to_the_same(
    store: TeacherStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    column: Any,
    words: str,
) -> None:
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"example_id": [1], name: column}), path)
    assert main(["show", store.url, "--ids", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: {name} should" in error and words in error and error.count("\n") == 1


# ---- Names ----

BUY_AND_CLICK = {"buy": [1.0, 2.0], "click": [3.0, 4.0]}


def structured(columns: dict[str, list[float]]) -> Any:
    array = np.zeros(2, [(name, "f8") for name in columns])
    for name, values in columns.items():
        array[name] = values
    return array


TABLES: dict[str, Callable[[dict[str, list[float]]], Any]] = {
    "pandas": pd.DataFrame,
    "pandas, another index": lambda columns: pd.DataFrame(columns, index=[1, 0]),
    "Polars": pl.DataFrame,
    "Arrow": pa.table,
    "record batch": pa.record_batch,
    "structured": structured,
    "structured and masked": lambda columns: np.ma.array(structured(columns)),
    "mapping": dict,
    "mapping of tensors": lambda columns: {k: torch.tensor(v) for k, v in columns.items()},
}


@pytest.mark.parametrize("kind", TABLES)
def test_outputs_go_by_the_names_of_their_columns(tmp_path: Path, kind: str) -> None:
    store = new_store(tmp_path, tasks=("click", "buy"))
    store.write(snapshot(), [1, 2], TABLES[kind](BUY_AND_CLICK), [AT, AT])
    assert dd.by_id(store) == {1: [3.0, 1.0], 2: [4.0, 2.0]}


@pytest.mark.parametrize("names", [("buy",), ("buy", "click", "stay"), ("buy", "output_click")])
@pytest.mark.parametrize("kind", TABLES)
def test_other_names_are_refused(tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    store = new_store(tmp_path, tasks=("click", "buy"))
    with pytest.raises(ValueError, match=r"named \('click', 'buy'\), in any .*received") as caught:
        store.write(
            snapshot(), [1, 2], TABLES[kind]({name: [1.0, 2.0] for name in names}), [AT] * 2
        )
    assert all(repr(name) in dd.sentence(caught.value) for name in names)


def test_columns_without_names_or_with_one_twice_are_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path, tasks=("0", "1"))
    for outputs in (
        pd.DataFrame([[1.0, 2.0]]),  # named 0 and 1, the numbers
        pa.table([[1.0], [2.0], [3.0]], names=["0", "1", "1"]),
    ):
        with pytest.raises(ValueError, match=r"named \('0', '1'\), in any order; received \("):
            store.write(snapshot(), [1], outputs, [AT])


def test_a_column_is_checked_like_an_array(tmp_path: Path) -> None:
    store = new_store(tmp_path, tasks=("click", "buy"))
    for column, error, words in (
        ([1, 2], TypeError, "buy, of outputs .* floating-point numbers; received int64"),
        ([0.5], ValueError, r"buy, of outputs .* shape \(2, 1\)"),
        ([0.5, None], ValueError, "buy, of outputs .* no nulls .*: 1: "),
        (np.ma.array([0.5, 1.0], mask=[0, 1]), ValueError, "buy, of outputs .* no nulls .*: 1: "),
    ):
        with pytest.raises(error, match=words):
            outputs = {"buy": column, "click": [0.5, 0.5]}
            store.write(snapshot(), [1, 2], outputs, [AT, AT])


@pytest.mark.parametrize(
    "series",
    [pd.Series([0.5, 1.5], index=[1, 0], name="buy"), pl.Series("buy", [0.5, 1.5])],
)
def test_a_series_goes_by_its_order_whatever_its_name(store: TeacherStore, series: Any) -> None:
    store.write(snapshot(), [1, 2], series, [AT, AT])
    assert dd.by_id(store) == {1: [0.5], 2: [1.5]}


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_keys_may_be_a_table(store: TeacherStore, make: Callable[[Any], Any]) -> None:
    keys = make({"item_id": [3, 4], "user_id": [5, 6]})
    store.write(snapshot(), [1, 2], [0.5, 1.5], [AT, AT], keys=keys)
    store.refresh()
    rows = pq.read_table(dd.only_file(store))
    assert rows["user_id"].to_pylist() == [5, 6] and rows["item_id"].to_pylist() == [3, 4]
    for wrong, words in (make({"user": [1]}), r"\['user'\]"), ([1], "list"):
        with pytest.raises(ValueError, match=rf"keys should be among .*; received {words}"):
            store.write(snapshot(), [1], [0.5], [AT], keys=wrong)


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_a_table_of_embeddings_is_refused(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    store = dd.new_store(tmp_path, embedding_width=2)
    with pytest.raises(TypeError, match=r"no names for its columns; received \['b', 'a'\]: pass"):
        store.write(snapshot(), [1], [0.5], [AT], embeddings=make({"b": [1.0], "a": [2.0]}))
