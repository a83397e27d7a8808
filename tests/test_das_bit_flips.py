"""Flipped bits in a store's files: detected or without effect, except in pages of Parquet.

BIT_FLIPS is the number per file; ``-s`` shows the outcomes.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import das_data as dd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from das_data import AT, WINDOW

from torchrec_exfm.das import Snapshot, StoreError, TeacherStore, forget, publish, published

FLIPS = int(os.environ.get("BIT_FLIPS", "50"))
TEACHERS = ("fm", "big")
ROWS = 30  # of a teacher, in two windows

Content = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create a store with every kind of content: keys, embeddings, a watermark, snapshots."""
    store = dd.new_store(tmp_path / "store", tasks=("click", "buy"), embedding_width=2)
    ids = np.arange(ROWS) * 1_000_003
    outputs = np.random.default_rng(0).normal(size=(ROWS, 2)).astype(np.float32)
    seconds = AT + np.arange(ROWS) * (2 * WINDOW // ROWS)
    for number, teacher in enumerate(TEACHERS):
        snapshot = publish(store, teacher, None, trained_through_seconds=1_000 + number)
        store.write(
            snapshot,
            ids,
            outputs + number,
            seconds,
            shard="a",
            keys={"user_id": ids + 1, "category_id": ids % 7},
            embeddings=outputs * 2,
        )
    store.advance_watermark("fm", AT + WINDOW)
    store.write(Snapshot("fm", 3, 1_000), [7], [[0.5, 1.5]], [AT], shard="b")
    store.write(Snapshot("fm", 4, 1_000), [8], [[0.5, 1.5]], [AT + WINDOW])
    store.table.compact(("fm", 2))
    forget(store, "fm", versions=[4])
    return tmp_path / "store"


def content(folder: Path) -> Content:
    """Return everything that a store's readers, and writers of the same shards, see."""
    store = TeacherStore(folder)
    state: Content = {"format": store.format, "teachers": store.teachers()}
    columns = pa.schema([f for f in store.format.schema() if f.nullable])
    for teacher in store.teachers():
        state[f"{teacher} published"] = published(store, teacher)
        state[f"{teacher} shard"] = store.table.transaction(f"shard/{teacher}/1/a")
        state[f"{teacher} watermark"] = store.watermark(teacher)
        for window in store.windows(teacher):
            rows, _ = store.read(teacher, window)
            optional = [store.table.read(f, columns) for f in store.files(teacher, window)]
            state[f"{teacher} {window}"] = (
                {name: values.tobytes() for name, values in vars(rows).items()},
                [table.to_pydict() for table in optional],
                [file.path for file in store.files(teacher, window)],
            )
    return state


def outcome(folder: Path, expected: Content) -> str:
    try:
        read = content(folder)
    except StoreError as error:
        dd.sentence(error)
        return "told"
    return "harmless" if read == expected else "silent"


def flips(path: Path) -> Iterator[int]:
    """Flip one bit after another, each for the duration of a step; yield the place of its byte."""
    data = path.read_bytes()
    try:
        for bit in random.Random(0).sample(range(8 * len(data)), min(FLIPS, 8 * len(data))):
            byte = bit // 8
            changed = bytes([data[byte] ^ 1 << bit % 8])
            path.write_bytes(data[:byte] + changed + data[byte + 1 :])
            yield byte
    finally:
        path.write_bytes(data)


def pages(path: Path) -> list[range]:
    """Return the byte ranges of a Parquet file's pages, with their headers."""
    metadata = pq.ParquetFile(path).metadata
    ranges = []
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            start = column.data_page_offset
            if column.has_dictionary_page:
                start = min(start, column.dictionary_page_offset)
            ranges.append(range(start, start + column.total_compressed_size))
    return ranges


def flip_all(folder: Path, path: Path, ranges: list[range]) -> Counter[str]:
    """Count the outcomes of the flips; none may be silent except in a page."""
    expected = content(folder)
    counts = Counter[str]()
    for byte in flips(path):
        became = outcome(folder, expected)
        in_page = any(byte in page for page in ranges)
        if became == "silent" and not in_page:
            raise AssertionError(
                f"{path} at byte {byte}: {path.read_bytes()[byte - 60 : byte + 9]!r}"
            )
        if became == "silent" and path.name.startswith("part-"):
            pq.read_table(path, partitioning=None, page_checksum_verification=True)
        counts[became + " in a page" * in_page] += 1
    assert content(folder) == expected
    print(f"\n{path.name}, {path.stat().st_size} bytes: {dict(counts)}")
    return counts


@pytest.mark.parametrize(
    ("table", "version"),
    [
        pytest.param("outputs", 0, id="create"),
        pytest.param("outputs", 1, id="write"),
        pytest.param("outputs", 3, id="watermark"),
        pytest.param("outputs", 6, id="compact"),
        pytest.param("outputs", 7, id="forget"),
        pytest.param("snapshots", 2, id="publish"),
    ],
)
def test_flips_in_a_commit(folder: Path, table: str, version: int) -> None:
    path = folder / table / "_delta_log" / f"{version:020}.json"
    flip_all(folder, path, [])


def test_flips_in_a_data_file(folder: Path) -> None:
    """In a page they may be silent: deltalake's writer (arrow-rs) makes no checksums of pages.

    There is no option for it. Were there checksums one day, the reading above with their
    verification would fail, and the store should then read so as well.
    """
    path = dd.only_file(TeacherStore(folder))
    counts = flip_all(folder, path, pages(path))
    assert 0 < counts["silent in a page"] < FLIPS // 4


def test_flips_in_a_log_checkpoint(folder: Path) -> None:
    """Without the commits that it sums up; in a page they may be silent, as in a data file."""
    store = TeacherStore(folder)
    store.table.delta.create_checkpoint()
    for version in range(store.table.version + 1):
        dd.log_file(store, version).unlink()
    (path,) = (folder / "outputs" / "_delta_log").glob("*.checkpoint.parquet")
    counts = flip_all(folder, path, pages(path))
    assert counts["silent in a page"] < FLIPS // 10
