"""Embeddings in the teacher store: their bytes, and what is read, refused and stored."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any, Literal

import das_data as dd
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from das_data import AT, WINDOW, new_store, snapshot
from deltalake import DeltaTable, write_deltalake
from torch import nn

from torchrec_exfm import TeacherMissingWarning
from torchrec_exfm.das import StoreError, TeacherLogger, TeacherLookup, TeacherStore, forget
from torchrec_exfm.das.__main__ import main
from torchrec_exfm.das.embeddings import MISSING, decode, embedding_bytes, encode
from torchrec_exfm.das.schema import StoreFormat

Resolution = Literal["float16", "int8", "int4"]
RESOLUTIONS: tuple[Resolution, ...] = ("float16", "int8", "int4")
SCALED: dict[Resolution, int] = {"int8": 127, "int4": 7}  # steps from zero to the largest
E = 5  # odd, so that no row of bytes is a whole number of float32
LARGEST = np.finfo(np.float32).max


def store_of(folder: Path, resolution: Resolution = "float16", **options: Any) -> TeacherStore:
    options = {"embedding_width": E, "embedding_resolution": resolution, **options}
    return new_store(folder, **options)


def embeddings_of(rows: int, seed: int = 0, width: int = E) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def reference(row: Any, resolution: str) -> tuple[bytes, list[float]]:
    """Return a row's bytes and their values, by Python's own float64 and struct."""
    numbers = [float(number) for number in row]
    if code := {"float16": "e", "float32": "f"}.get(resolution):
        data = struct.pack(f"<{len(numbers)}{code}", *numbers)
        return data, list(struct.unpack(f"<{len(numbers)}{code}", data))
    largest = max(map(abs, numbers)) / (127 if resolution == "int8" else 7)
    (scale,) = struct.unpack("<f", struct.pack("<f", largest))
    scale = max(scale, 2.0**-126)
    steps = [round(number / scale) for number in numbers]
    read = np.array([scale * step for step in steps]).astype(np.float32)  # exact, then rounded
    if resolution == "int8":
        return struct.pack(f"<f{len(steps)}b", scale, *steps), read.tolist()
    digits = "".join(f"{step % 16:x}" for step in steps) + "0" * (len(steps) % 2)
    data = bytes(int(high + low, 16) for low, high in zip(digits[::2], digits[1::2], strict=True))
    return struct.pack("<f", scale) + data, read.tolist()


def lookup_of(store: TeacherStore, teachers: Any = "fm", **options: Any) -> TeacherLookup:
    """Return a look-up for batches that map ids to event times."""
    functions = {"ids": lambda batch: list(batch), "event_seconds": lambda b: list(b.values())}
    return TeacherLookup(store, teachers, **{"embeddings": True, **functions, **options})


def listed(lookup: TeacherLookup, batch: dict[int, int], teacher: int = 0) -> list[Any]:
    """Return each example's embedding, None where it is absent."""
    outputs = lookup(batch)
    assert outputs.embeddings is not None and outputs.embedding_presence is not None
    assert outputs.embeddings.dtype == torch.float32 and not outputs.embeddings.isnan().any()
    pairs = zip(outputs.embeddings[:, teacher], outputs.embedding_presence[:, teacher], strict=True)
    return [value.tolist() if present else None for value, present in pairs]


# ---- The bytes ----

EXTREMES = {
    "zeros": [0.0, 0.0, -0.0, 0.0, 0.0],
    "float16's own": [65504.0, -65504.0, 2.0**-24, 2.0**-14, 1 + 2.0**-10],
    "halfway": [1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25, -1 - 2.0**-11],
    "denormal": [1e-45, -1e-45, 1e-40, 1e-39, -1e-38],
    "just beside 65504": [65519.0, -65519.0, 65488.0, 0.0, 1.0],
    "all alike": [0.3] * 5,
}
HUGE = {
    "one huge value": [LARGEST, 1.0, -1.0, 0.0, LARGEST / 100],
    "the two largest": [LARGEST, -LARGEST, np.nextafter(LARGEST, np.float32(0)), 0.0, 1e38],
    "halves of a step": [127.0, 0.5, 1.5, 2.5, -0.5],
}


@pytest.mark.parametrize("resolution", [*RESOLUTIONS, "float32"])
@pytest.mark.parametrize("kind", [*EXTREMES, "random"])
def test_bytes_are_those_of_an_independent_reference(kind: str, resolution: str) -> None:
    rows = np.array([EXTREMES.get(kind, [0.0] * E)], np.float32)
    if kind == "random":
        exponents = np.random.default_rng(2).uniform(-30, 15, (500, 1))
        rows = (embeddings_of(500) * 2.0**exponents).astype(np.float32).clip(-65504, 65504)
    check_bytes(rows, resolution)
    check_bytes(np.asfortranarray(np.tile(rows, (2, 1)))[::2, ::-1], resolution)
    check_bytes(rows[:, :4], resolution)


def check_bytes(rows: np.ndarray, resolution: str) -> None:
    data = encode(rows, resolution)
    read = decode(data, resolution, rows.shape[1])
    assert data.dtype == np.uint8 and read.dtype == np.float32 and np.isfinite(read).all()
    assert data.shape == (len(rows), embedding_bytes(rows.shape[1], resolution))
    assert not np.shares_memory(data, rows) and not np.shares_memory(data, read)
    for row, stored, back in zip(rows, data, read, strict=True):
        expected, numbers = reference(row, resolution)
        assert stored.tobytes() == expected
        assert back.tolist() == numbers


@pytest.mark.parametrize("resolution", SCALED)
@pytest.mark.parametrize("kind", ["one huge value", "halves of a step"])
def test_each_row_has_a_scale(kind: str, resolution: Resolution) -> None:
    rows = np.array([HUGE[kind], EXTREMES["denormal"], EXTREMES["all alike"]], np.float32)
    if kind == "one huge value":
        rows[0, 0] = LARGEST / 2  # the largest of all has a test of its own
    check_bytes(rows, resolution)
    spread = rows[2:] * np.array([[1, -0.5, 0.25, 0.01, 0]], np.float32)
    error = np.abs(decode(encode(spread, resolution), resolution, E) - spread)
    # half a step, and the float32 roundings of the scale, the quotient and the product: 3 x 2^-24
    bound = 1 / (2 * SCALED[resolution]) + 3 * 2.0**-24
    assert (error <= np.abs(spread).max() * bound).all()


@pytest.mark.parametrize("resolution", SCALED)
def test_the_largest_numbers_do_not_become_infinite(resolution: Resolution) -> None:
    rows = np.array(list(HUGE.values())[:2], np.float32)
    read = decode(encode(rows, resolution), resolution, E).astype(np.float64)
    assert np.isfinite(read).all()
    # the scale is one float32 below that of the formula: 2^-23 of it, for each step to the largest
    bound = 1 / (2 * SCALED[resolution]) + 2.0**-22
    assert (np.abs(read - rows) <= float(LARGEST) * bound).all()


def test_int4_without_a_width_has_the_padding_of_an_odd_one() -> None:
    rows = embeddings_of(3)
    data = encode(rows, "int4")
    read = decode(data, "int4")
    assert read.shape == (3, E + 1) and not read[:, E].any()
    assert np.array_equal(read[:, :E], decode(data, "int4", E))
    assert decode(data[:, None].repeat(2, 1), "int4", E).shape == (3, 2, E)


@pytest.mark.parametrize("resolution", [*RESOLUTIONS, "float32"])
@pytest.mark.parametrize("width", [1, E, 8])
def test_bytes_that_are_missing_are_nan(resolution: str, width: int) -> None:
    missing = np.full((1, embedding_bytes(width, resolution)), ord(MISSING), np.uint8)
    rows = np.concatenate([encode(embeddings_of(2, width=width), resolution), missing])
    read = decode(rows, resolution, width)
    assert read.shape == (3, width)
    assert np.isnan(read).tolist() == [[False] * width] * 2 + [[True] * width]


def test_a_store_has_no_float32() -> None:
    with pytest.raises(ValueError, match=r"one of \('float16', 'int8', 'int4'\); .*'float32'"):
        StoreFormat(embedding_width=8, embedding_resolution="float32")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, 65520.0, -70000.0])
def test_numbers_that_bytes_can_not_hold_are_refused(tmp_path: Path, bad: float) -> None:
    rows = embeddings_of(3).astype(np.float64)
    rows[1, 2] = bad
    for resolution in RESOLUTIONS:
        store = store_of(tmp_path / resolution, resolution)
        fits = resolution in SCALED and abs(bad) < float(LARGEST)
        if fits:
            store.write(snapshot(), [1, 2, 3], [0.5] * 3, [AT] * 3, embeddings=rows)
            continue
        for bad_rows in ("refuse", "quarantine"):
            with pytest.raises(ValueError, match=r"finite, .* 65504 .* others in 1 rows: 1: ") as e:
                store.write(
                    snapshot(),
                    [1, 2, 3],
                    [0.5] * 3,
                    [AT] * 3,
                    embeddings=rows,
                    bad_rows=bad_rows,  # type: ignore[arg-type]
                )
            dd.sentence(e.value)
        assert store.refresh() == 0


@pytest.mark.parametrize(
    ("embeddings", "error", "words"),
    [
        ([[0.5] * 4], ValueError, r"of shape \(1, 5\); received \(1, 4\)"),
        ([[0.5] * E] * 2, ValueError, r"of shape \(1, 5\); received \(2, 5\)"),
        ([0.5] * E, ValueError, r"of shape \(1, 5\); received \(5,\)"),
        ([], ValueError, r"of shape \(1, 5\); received \(0,\)"),
        ([[1] * E], TypeError, "floating-point numbers; received int64"),
        ([[0.5] * 4 + [None]], ValueError, "no nulls and nothing masked"),
    ],
)
def test_other_shapes_and_nulls_are_refused(
    tmp_path: Path, embeddings: Any, error: type[Exception], words: str
) -> None:
    store = store_of(tmp_path)
    with pytest.raises(error, match=f"embeddings should (be |have )?{words}"):
        store.write(snapshot(), [1], [0.5], [AT], embeddings=embeddings)
    assert store.refresh() == 0


def test_a_store_without_refuses_them_everywhere(tmp_path: Path) -> None:
    store = dd.small_store(tmp_path)
    outputs = torch.ones(1)
    for act in (
        lambda: store.write(snapshot(2), [9], [0.5], [AT], embeddings=[[0.5]]),
        lambda: store.read("fm", 2, embeddings=True),
        lambda: TeacherLookup(store, "fm", embeddings=True),
        lambda: TeacherLogger(store, "fm").log([9], [AT], outputs, embeddings=outputs[None]),
    ):
        with pytest.raises(ValueError, match=r"with an embedding_width; it is 0: make") as e:
            act()
        dd.sentence(e.value)
    assert dd.by_id(store) == {0: [0.5], 1: [1.5], 2: [2.5]}
    assert "embedding" not in pq.read_schema(dd.only_file(store)).names
    assert lookup_of(store, embeddings=False)({1: AT}).embeddings is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"embedding_width": -1}, "embedding_width should be a whole number from 0; received -1"),
        ({"embedding_width": 8.0}, "embedding_width should be a whole number .*; received 8.0"),
        ({"embedding_width": 8, "embedding_resolution": "bfloat16"}, "embedding_resolution .*one"),
    ],
)
def test_a_wrong_format_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StoreFormat(**wrong)


# ---- Through the store ----


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("width", [1, 2, 4, E, 32])
def test_what_is_written_is_given(tmp_path: Path, resolution: Resolution, width: int) -> None:
    """Of two teachers in three windows, in any order, with outputs that stay what they are."""
    store = store_of(tmp_path, resolution, embedding_width=width, tasks=("click", "stay"))
    ids = np.random.default_rng(1).permutation(90) + 2**53
    seconds = AT + (ids - 2**53) * WINDOW // 30
    outputs = embeddings_of(90, 7, 2)
    for number, teacher in enumerate(("fm", "big")):
        embeddings = embeddings_of(90, number, width)
        store.write(snapshot(teacher=teacher), ids, outputs, seconds, embeddings=embeddings)
    lookup = lookup_of(store, ("big", "fm"), tasks=("stay",))
    rows = np.random.default_rng(3).integers(0, 90, 200)
    ids, seconds, outputs = ids[rows], seconds[rows], outputs[rows]
    batch = dict(zip(ids.tolist(), seconds.tolist(), strict=True)) | {5: AT}
    for place, number in ((0, 1), (1, 0)):
        known = dict(zip(ids.tolist(), embeddings_of(90, number, width)[rows], strict=True))
        expected = [reference(known[i], resolution)[1] if i in known else None for i in batch]
        assert listed(lookup, batch, place) == expected
    plain = lookup_of(store, ("big", "fm"), tasks=("stay",), embeddings=False)(batch)
    result = lookup(batch)
    assert plain.embeddings is None and plain.embedding_presence is None
    assert torch.equal(result.values, plain.values) and torch.equal(result.presence, plain.presence)
    assert torch.equal(result.age_seconds, plain.age_seconds)  # type: ignore[arg-type]
    assert int(result.presence.sum()) == 2 * (len(batch) - 1)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_rows_with_and_without_in_one_store(tmp_path: Path, resolution: Resolution) -> None:
    store = store_of(tmp_path, resolution)
    row = EXTREMES["all alike"]
    expected = reference(np.array(row, np.float32), resolution)[1]
    store.write(snapshot(), [1], [0.5], [AT], embeddings=[row])
    store.write(snapshot(), [2], [1.5], [AT])
    store.write(snapshot(), [3], [2.5], [AT + WINDOW])
    store.write(snapshot(teacher="big"), [1], [3.5], [AT])
    batch = {1: AT, 2: AT, 3: AT + WINDOW, 4: AT}
    lookup = lookup_of(store, ("fm", "big"))
    assert listed(lookup, batch) == [expected, None, None, None]
    assert listed(lookup, batch, 1) == [None] * 4
    assert lookup(batch).presence.squeeze(-1).tolist() == [
        [True, True],
        [True, False],
        [True, False],
        [False, False],
    ]
    store.refresh()
    read = [store.read("fm", window, embeddings=True)[0] for window in (2, 3)]
    data = {
        int(i): bytes(e)
        for part in read
        for i, e in zip(part.example_id, part.embedding, strict=True)
    }
    missing = b"\xff" * store.format.embedding_bytes
    assert data == {1: reference(np.array(row, np.float32), resolution)[0], 2: missing, 3: missing}
    assert store.read("fm", 2)[0].embedding.shape == (2, 0)
    assert store.read("fm", 99, embeddings=True)[0].embedding.shape == (0, len(missing))


def test_the_newest_snapshot_wins_with_its_embedding(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for version in (2, 3, 1):
        ids = [1, 2] if version == 3 else [1, 2, 3]
        rows = np.full((len(ids), E), version, np.float32)
        extra: Any = {} if version == 2 else {"embeddings": rows}
        store.write(snapshot(version), ids, rows[:, 0], [AT] * len(ids), **extra)
    batch = {1: AT, 2: AT, 3: AT}
    assert listed(lookup_of(store), batch) == [[3.0] * E, [3.0] * E, None]  # 2 is 3's newest
    assert listed(lookup_of(store, snapshot=1), batch) == [[1.0] * E] * 3
    assert listed(lookup_of(store, exclude=[3, 2]), batch) == [[1.0] * E] * 3


def test_a_stale_output_has_lost_its_embedding(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for version, through, example_id in ((1, AT - 500, 1), (2, AT - 50, 2)):
        rows = [[float(version)] * E]
        store.write(snapshot(version, through), [example_id], [0.5], [AT], embeddings=rows)
    lookup = lookup_of(store, max_age_seconds=100)
    assert listed(lookup, {1: AT, 2: AT}) == [None, [2.0] * E]
    assert lookup.counters["fm"].stale == 1


def test_leaks_and_bad_rows_take_their_embeddings_with_them(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    rows = np.arange(3 * E, dtype=np.float32).reshape(3, E)
    arguments: Any = (snapshot(1, AT), [3, 1, 2], [0.5, np.nan, 1.5], [AT, AT + 1, AT + 2])
    with pytest.raises(ValueError, match="NaN or infinite"):
        store.write(*arguments, embeddings=rows)
    report = store.write(*arguments, embeddings=rows, bad_rows="quarantine")
    assert report.written == 1 and sum(report.quarantined.values()) == 2
    assert listed(lookup_of(store), {1: AT, 2: AT, 3: AT}) == [None, rows[2].tolist(), None]


def test_a_shard_that_is_written_again(tmp_path: Path) -> None:
    """Does nothing, and its rows that were lost come back with their embeddings."""
    store = store_of(tmp_path, window_seconds=WINDOW)
    ids, seconds, rows = np.arange(4), AT + np.arange(4) * WINDOW, embeddings_of(4)
    arguments: Any = (snapshot(), ids, rows[:, 0], seconds)
    store.write(*arguments, shard="a", embeddings=rows)
    assert not store.write(*arguments, shard="a", embeddings=rows).committed
    store.refresh()
    (Path(store.table.url) / store.files("fm", 3)[0].path).unlink()
    store.table.repair()
    assert store.write(*arguments, shard="a", embeddings=rows).written == 1
    batch = dict(zip(ids.tolist(), seconds.tolist(), strict=True))
    assert listed(lookup_of(store), batch) == [reference(row, "float16")[1] for row in rows]


def test_the_column_is_not_read_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Its pages are overwritten: whoever reads them is told."""
    store = store_of(tmp_path)
    store.write(snapshot(), [1, 2], [0.5, 1.5], [AT, AT], embeddings=embeddings_of(2))
    store.refresh()
    path = dd.only_file(store)
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    (column,) = [column for column in columns if column.path_in_schema == "embedding"]
    content, start = bytearray(path.read_bytes()), column.data_page_offset
    content[start : start + column.total_compressed_size] = b"x" * column.total_compressed_size
    path.write_bytes(content)
    assert dd.by_id(store) == {1: [0.5], 2: [1.5]}
    plain = lookup_of(store, embeddings=False)({2: AT, 1: AT})
    assert plain.values.flatten().tolist() == [1.5, 0.5]
    with pytest.raises(StoreError, match="can't be read") as caught:
        lookup_of(store)({1: AT})
    assert str(path) in dd.sentence(caught.value)
    assert main(["verify", store.url]) == 1


# ---- What others wrote ----


def plant(store: TeacherStore, rows: list[bytes | None]) -> None:
    """Append rows with any bytes as embeddings, as another program would."""
    table = dd.plain_rows(store, len(rows), example_id=list(range(len(rows))))
    at = table.schema.get_field_index("embedding")
    table = table.set_column(at, pa.field("embedding", pa.binary()), pa.array(rows, pa.binary()))
    write_deltalake(store.table.url, table, mode="append")
    store.refresh()


def test_bytes_of_another_length_are_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, rows in enumerate(([b"12345678"], [b"x" * 10, b"y" * 11], [b"x" * 10, b""])):
        store = store_of(tmp_path / str(number))
        plant(store, [*rows])
        with pytest.raises(StoreError, match="widths must match") as caught:
            lookup_of(store)({0: AT})
        assert str(dd.only_file(store)) in dd.sentence(caught.value)
        assert len(dd.by_id(store)) == len(rows)
        assert main(["verify", store.url]) == 1
        assert "widths must match" in capsys.readouterr().out


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_numbers_that_are_not_finite_are_no_embedding(
    tmp_path: Path, resolution: Resolution
) -> None:
    store = store_of(tmp_path, resolution)
    good = encode(embeddings_of(1), resolution)[0].tobytes()
    number = "<e" if resolution == "float16" else "<f"
    bad = [struct.pack(number, value) for value in (np.nan, np.inf, -np.inf)]
    plant(store, [good, None, *(start + good[len(start) :] for start in bad)])
    expected = reference(embeddings_of(1)[0], resolution)[1]
    lookup = lookup_of(store)
    assert listed(lookup, dict.fromkeys(range(5), AT)) == [expected, None, None, None, None]
    assert lookup.counters["fm"].present == 5


def test_a_store_of_before_is_read_and_written_as_one_without(tmp_path: Path) -> None:
    """Its description says nothing of embeddings, and it has a column of lists."""
    store = dd.new_store(tmp_path / "new")
    fields = json.loads(store.format.to_json())["torchrec_exfm"]
    text = {name: fields[name] for name in fields if "embedding" not in name and name != "digest"}
    schema = store.format.schema().append(pa.field("embedding", pa.list_(pa.float32())))
    folder = tmp_path / "old"
    for name in ("outputs", "snapshots"):
        (folder / name).mkdir(parents=True)
    DeltaTable.create(
        str(folder / "outputs"),
        schema,
        partition_by=["teacher", "window"],
        description=json.dumps({"torchrec_exfm": text}),
    )
    old = TeacherStore(folder)
    assert old.format == store.format and old.format.embedding_width == 0
    old.write(snapshot(), [1], [0.5], [AT])
    assert dd.by_id(old) == {1: [0.5]}
    with pytest.raises(ValueError, match="it is 0"):
        old.write(snapshot(), [2], [0.5], [AT], embeddings=[[0.5]])


# ---- What goes on working ----


def test_embeddings_outlive_compact_forget_pickling_and_other_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(tmp_path, "int8")
    rows = embeddings_of(6)
    for version in (1, 2, 3):
        at = slice(2 * version - 2, 2 * version)
        store.write(snapshot(version), np.arange(6)[at], rows[at, 0], [AT] * 2, embeddings=rows[at])
    store.write(snapshot(3), [6], [0.5], [AT])
    batch = dict.fromkeys(range(8), AT)
    expected: list[Any] = [*(reference(row, "int8")[1] for row in rows), None, None]
    lookup = lookup_of(store, ids=list, event_seconds=_times)
    assert listed(lookup, batch) == expected
    for other in (copy.copy(lookup), pickle.loads(pickle.dumps(lookup))):
        assert listed(other, batch) == expected
    assert main(["compact", store.url]) == 0
    assert len(TeacherStore(store.url).files("fm", 2)) == 1
    assert listed(lookup_of(store), batch) == expected
    forget(store, "fm", versions=[2])
    assert listed(lookup_of(store), batch) == [*expected[:2], None, None, *expected[4:]]
    extra = store.format.schema().append(pa.field("extra", pa.int64())).empty_table()
    write_deltalake(store.table.url, extra, mode="append", schema_mode="merge")
    store.write(snapshot(4), [7], [0.5], [AT], embeddings=rows[:1])
    assert listed(lookup_of(store), batch)[-1] == expected[0]
    store.advance_watermark("fm", AT)
    capsys.readouterr()
    assert main(["show", store.url]) == 0
    assert "float32, embeddings of 5 in int8" in capsys.readouterr().out
    assert main(["show", store.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"]["embedding_width"] == E


def _times(batch: dict[int, int]) -> list[int]:
    return list(batch.values())


def test_verify_is_content_with_embeddings(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.write(snapshot(), [1, 2], [0.5, 1.5], [AT, AT + WINDOW], embeddings=embeddings_of(2))
    store.write(snapshot(), [3], [0.5], [AT])
    assert main(["verify", store.url]) == 0
    assert main(["compact", store.url]) == 0
    assert main(["verify", store.url]) == 0


def test_an_existing_store_must_be_of_the_same_width(tmp_path: Path) -> None:
    store_of(tmp_path)
    assert store_of(tmp_path).format.embedding_width == E
    for options in ({"embedding_width": 0}, {"embedding_resolution": "int8"}):
        with pytest.raises(StoreError, match="was asked for"):
            store_of(tmp_path, **options)  # type: ignore[arg-type]


def test_other_tools_read_the_bytes(tmp_path: Path) -> None:
    rows = embeddings_of(3)
    store = store_of(tmp_path)
    store.write(snapshot(), [1, 2, 3], rows[:, 0], [AT] * 3, embeddings=rows)
    store.write(snapshot(), [4], [0.5], [AT])
    frame = pl.read_delta(store.table.url).sort("example_id")
    assert frame["embedding"].dtype == pl.Binary
    expected = [reference(row, "float16")[0] for row in rows]
    assert frame["embedding"].to_list() == [*expected, None]


# ---- Logging ----


def test_the_logger_writes_what_it_is_given(tmp_path: Path) -> None:
    store = store_of(tmp_path, tasks=("click", "stay"))
    rows = torch.from_numpy(embeddings_of(4))
    with TeacherLogger(store, "fm") as logger:
        for ids in (torch.tensor([1, 2]), torch.tensor([2, 3])):
            outputs, embeddings = rows[ids, :2].double(), rows[ids].clone()
            logger.log(ids, ids + AT, outputs, embeddings=embeddings)
            embeddings.zero_()  # the teacher's buffers are its own again
            outputs.zero_()
    assert logger.written == 3
    expected = [reference(rows[i].numpy(), "float16")[1] for i in (1, 2, 3)]
    assert listed(lookup_of(store), {1: AT, 2: AT, 3: AT}) == expected
    assert dd.by_id(store) == {i: rows[i, :2].tolist() for i in (1, 2, 3)}


def test_a_log_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    outputs = torch.ones(2)
    with TeacherLogger(store, "fm") as logger:
        for embeddings in (torch.ones(2, 4), torch.ones(3, E), torch.ones(2)):
            with pytest.raises(ValueError, match=r"embeddings should be of shape \(2, 5\)"):
                logger.log([1, 2], [AT, AT], outputs, embeddings=embeddings)
        logger.log([1, 2], [AT, AT], outputs, embeddings=torch.ones(2, E))
        for _ in range(2):
            with pytest.raises(ValueError, match=r"every call of log\(\) .*; received none"):
                logger.log([3, 4], [AT, AT], outputs)
            logger.flush()
    assert logger.written == 2
    with TeacherLogger(store, "fm") as logger:
        logger.log([3, 4], [AT, AT], outputs)
        with pytest.raises(ValueError, match=r"every call of log\(\) .*; received some"):
            logger.log([5, 6], [AT, AT], outputs, embeddings=torch.ones(2, E))
    assert listed(lookup_of(store), {1: AT, 3: AT}) == [[1.0] * E, None]


def test_embeddings_of_a_training_forward_by_a_hook(tmp_path: Path) -> None:
    """The teacher's forward does not return its hidden layer."""
    store = store_of(tmp_path)

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(3, E), nn.Linear(E, 1)

        def forward(self, batch: Any) -> Any:
            logits = self.head(self.hidden(batch["x"]).relu()).squeeze(-1)
            return logits.sum(), (logits.sum(), logits, None)

    teacher, hooked, expected = Teacher(), {}, {}
    teacher.hidden.register_forward_hook(lambda *call: hooked.update(hidden=call[-1]))
    logger = TeacherLogger(
        store,
        "fm",
        ids=lambda batch: batch["id"],
        event_seconds=lambda batch: batch["id"] * 0 + AT,
        embeddings=lambda output: hooked["hidden"],
    )
    logger.attach(teacher)
    for step in range(3):
        ids = torch.arange(2) + 2 * step
        batch = {"id": ids, "x": torch.randn(2, 3, generator=torch.manual_seed(step))}
        teacher(batch)[0].backward()
        with torch.no_grad():
            rows = teacher.hidden(batch["x"]).numpy().copy()
            for weight in teacher.parameters():
                weight -= 0.1 * weight.grad  # type: ignore[operator]
        expected.update(zip(ids.tolist(), [reference(r, "float16")[1] for r in rows], strict=True))
    logger.close()
    assert listed(lookup_of(store), dict.fromkeys(range(6), AT)) == list(expected.values())


def test_rows_without_embeddings_are_told_once(tmp_path: Path) -> None:
    """A term that learns them would learn nothing, and nobody would see it."""
    store = store_of(tmp_path)
    store.write(snapshot(), [1, 2], [0.5, 1.5], [AT, AT])
    lookup = lookup_of(store)
    for _ in range(9):
        lookup({1: AT, 2: AT})
    with pytest.warns(TeacherMissingWarning, match=r"fm has no embedding for any of the first 20"):
        lookup({1: AT, 2: AT})
    assert lookup.counters["fm"].embedded == 0
    store.write(snapshot(2), [1], [0.5], [AT], embeddings=embeddings_of(1))
    lookup.refresh()
    for _ in range(12):  # an output of another version, and no second warning
        lookup({1: AT, 2: AT})
    assert lookup.counters["fm"].embedded == 12
