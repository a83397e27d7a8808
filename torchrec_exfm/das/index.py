"""One time window's teacher outputs, in memory or in files that processes share, found by id.

Shapes: n rows of the window, B examples of a batch, T tasks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_exfm.das.arrays import AnyArray, Floats, Ints, Mask

__all__ = ["WindowIndex", "index_bytes"]

_BLOCK = 1 << 16
_HALF = np.uint64(32)
_STARTS, _RECORDS = "starts", "records"  # the files of a folder
_FACTORS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


class WindowIndex:
    """The outputs of a window's examples, each found by its id with about two cache misses.

    An example's key is a bijective mix of its id; the key's top bits are its bucket. The rows lie
    in order of their keys, each as one record of id, age and values, and an array says where each
    bucket starts. There are between half as many buckets as rows and as many, so that T = 1 takes
    18 to 20 bytes a row. Look-ups may run in several threads.

    Args:
        example_ids: (n,), int64, at least 0, none of them twice. n may be 0.
        values: (n, T), float32.
        age_seconds: (n,), float32.
        folder: where to keep it as files, which other processes map with :meth:`open`; None: in
            this process's memory.

    Raises:
        OSError: if the folder has no room for it.
        TypeError: for another dtype.
        ValueError: for another shape, a negative id or one that comes twice, and for 2³² rows or
            more.

    Example:
        >>> import numpy as np
        >>> index = WindowIndex(np.array([7, 5]), np.array([[0.5], [-2.0]], np.float32),
        ...                     np.array([60.0, 30.0], np.float32))
        >>> values, age_seconds, present = index.find(np.array([5, 6]))
        >>> values.tolist(), age_seconds.tolist(), present.tolist()
        ([[-2.0], [0.0]], [30.0, 0.0], [True, False])
    """

    def __init__(
        self,
        example_ids: Ints,
        values: Floats,
        age_seconds: Floats,
        folder: Path | None = None,
    ) -> None:
        _check("example_ids", example_ids, np.int64, 1)
        rows = example_ids.shape[0]
        _check("values", values, np.float32, 2, rows)
        _check("age_seconds", age_seconds, np.float32, 1, rows)
        if rows >= 2**32:
            raise ValueError(
                f"an index should have fewer than 2^32 rows; received {rows}; make windows shorter"
            )
        if rows and example_ids.min() < 0:
            raise ValueError(
                f"example ids should be at least 0; received {example_ids.min()}; hash_ids makes "
                "such ids"
            )
        bits = _bits(rows)
        self._shift = np.uint64(64 - bits)
        self._starts = _zeros(2**bits + 1, np.dtype(np.uint32), folder and folder / _STARTS)
        # the last record is no example's: empty buckets at the end lead there
        self._records = _zeros(rows + 1, _record(values.shape[1]), folder and folder / _RECORDS)
        self._records["id"][-1] = -1
        self._fill(example_ids, values, age_seconds)
        same = self._records["id"][1:] == self._records["id"][:-1]
        if same.any():
            twice = self._records["id"][1:][same]
            raise ValueError(
                f"example ids should come once; received {twice[0]} more than once ({len(twice)} "
                "such rows); keep one row of each"
            )

    @classmethod
    def open(cls, folder: Path, width: int) -> WindowIndex:
        """That of a folder, of so many values a row, mapped: its memory is held once a host.

        Raises:
            FileNotFoundError: if it is not there.
        """
        index = cls.__new__(cls)
        index._starts = _mapped(folder / _STARTS, np.dtype(np.uint32))
        index._records = _mapped(folder / _RECORDS, _record(width))
        index._shift = np.uint64(65 - len(index._starts).bit_length())
        return index

    def find(self, example_ids: Ints) -> tuple[Floats, Floats, Mask]:
        """The outputs of the examples of these ids; zeros where the window has none.

        Args:
            example_ids: (B,), int64; the same may come several times.

        Returns:
            The values (B, T) and the ages in seconds (B,), float32, and which are present (B,).

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape.
        """
        _check("example_ids", example_ids, np.int64, 1)
        buckets = self._bucket(example_ids)
        # mode="clip": the places are right; "raise" would look once more
        places = self._starts.take(buckets, mode="clip").astype(np.int64)
        found = self._records.take(places, mode="clip")
        # those that lie further on in their buckets, if anywhere: one step at a time
        left = np.flatnonzero(found["id"] != example_ids)
        places, wanted = places.take(left), example_ids.take(left)
        last = self._starts.take(buckets.take(left) + 1, mode="clip").astype(np.int64) - 1
        more = np.flatnonzero(places < last)
        while len(more):
            left, wanted, last = left.take(more), wanted.take(more), last.take(more)
            places = places.take(more) + 1
            found[left] = nexts = self._records.take(places, mode="clip")
            more = np.flatnonzero((nexts["id"] != wanted) & (places < last))
        present = (found["id"] == example_ids) & (example_ids >= 0)
        values = np.where(present[:, None], found["values"], np.float32(0))
        return values, np.where(present, found["age"], np.float32(0)), present

    def __len__(self) -> int:
        return len(self._records) - 1

    @property
    def width(self) -> int:
        """T, the values of a row."""
        width: int = self._records["values"].shape[1]
        return width

    @property
    def nbytes(self) -> int:
        """All the bytes it keeps."""
        return self._records.nbytes + self._starts.nbytes

    def _fill(self, example_ids: Ints, values: Floats, age_seconds: Floats) -> None:
        """Put the rows in order of their keys, block by block, and count them by bucket."""
        order = np.argsort(mix(example_ids))
        for first in range(0, len(order), _BLOCK):
            chosen = order[first : first + _BLOCK]
            block = self._records[first : first + len(chosen)]
            block["id"] = example_ids[chosen]
            block["age"] = age_seconds[chosen]
            block["values"] = values[chosen]
            buckets = self._bucket(block["id"])
            counts = np.bincount(buckets - buckets[0])
            ends = self._starts[buckets[0] + 1 :][: len(counts)]
            ends += counts.astype(np.uint32)
        np.cumsum(self._starts, out=self._starts)

    def _bucket(self, example_ids: Ints) -> Ints:
        buckets: Ints = (mix(example_ids) >> self._shift).view(np.int64)
        return buckets


def index_bytes(rows: int, width: int) -> int:
    """The bytes of an index of so many rows, of so many values each."""
    return (rows + 1) * _record(width).itemsize + 4 * ((1 << _bits(rows)) + 1)


def _bits(rows: int) -> int:
    """Of the number of a bucket."""
    return max(rows.bit_length() - 1, 1)


def _record(width: int) -> np.dtype[Any]:
    return np.dtype([("id", "i8"), ("age", "f4"), ("values", "f4", (width,))], align=True)


def _zeros(length: int, dtype: np.dtype[Any], path: Path | None) -> AnyArray:
    if path is None:
        return np.zeros(length, dtype)
    with path.open("xb") as file:
        # all at once: where there is no room, to write what is mapped would end the process
        os.posix_fallocate(file.fileno(), 0, length * dtype.itemsize)
    return _mapped(path, dtype, "r+")


def _mapped(path: Path, dtype: np.dtype[Any], mode: Any = "r") -> AnyArray:
    return np.asarray(np.memmap(path, dtype, mode))


def mix(example_ids: Ints) -> npt.NDArray[np.uint64]:
    """The ids' keys: MurmurHash3's finaliser but for its last step, which leaves the top bits."""
    keys = example_ids.view(np.uint64)
    for factor in _FACTORS:
        keys = (keys ^ (keys >> _HALF)) * factor
    return keys


def _check(what: str, array: object, dtype: type, dims: int, rows: int | None = None) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise TypeError(
            f"{what} should be a numpy array of {np.dtype(dtype)}; received "
            f"{getattr(array, 'dtype', type(array).__name__)}; convert it without loss"
        )
    if array.ndim != dims or rows not in (None, array.shape[0]):
        length = "B" if rows is None else rows
        expected = f"({length}, T)" if dims == 2 else f"({length},)"
        raise ValueError(f"{what} should be of shape {expected}; received {array.shape}")
