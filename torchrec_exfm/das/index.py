"""An index of one window's teacher outputs by example id, in memory or in shared files.

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

_BLOCK = 1 << 16  # rows that are put in place at a time, to bound the memory for copies
_HALF = np.uint64(32)
_STARTS, _RECORDS = "starts", "records"  # the files of a folder
_FACTORS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))


class WindowIndex:
    """A hash index of a window's outputs: a look-up costs about two cache misses.

    An example's key is a bijective mix of its id; the key's top bits are its bucket. The rows are
    sorted by key, each as one record of id, age and values, and an array says where each bucket
    starts. There are between n / 2 and n buckets, so that T = 1 takes 18 to 20 bytes a row. Several
    threads may look up at once.

    Args:
        example_ids: (n,), int64, at least 0, without repeats. n may be 0.
        values: (n, T), float32.
        age_seconds: (n,), float32.
        folder: where to keep the index as files, which other processes map with :meth:`open`; None:
            in this process's memory.

    Raises:
        OSError: if the folder has no room for it.
        TypeError: for another dtype.
        ValueError: for another shape, a negative or repeated id, and for 2³² rows or more.

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
        # one more record, of no example: empty buckets at the end point to it
        self._records = _zeros(rows + 1, _record(values.shape[1]), folder and folder / _RECORDS)
        self._records["id"][-1] = -1
        self._fill(example_ids, values, age_seconds)
        is_repeated = self._records["id"][1:] == self._records["id"][:-1]
        if is_repeated.any():
            repeated = self._records["id"][1:][is_repeated]
            raise ValueError(
                f"example ids should come once; received {repeated[0]} more than once "
                f"({len(repeated)} such rows); keep one row of each"
            )

    @classmethod
    def open(cls, folder: Path, width: int) -> WindowIndex:
        """Map the index in a folder, of ``width`` values a row: a host holds its memory once.

        Raises:
            FileNotFoundError: if the folder has none.
        """
        index = cls.__new__(cls)
        index._starts = _mapped(folder / _STARTS, np.dtype(np.uint32))
        index._records = _mapped(folder / _RECORDS, _record(width))
        index._shift = np.uint64(65 - len(index._starts).bit_length())
        return index

    def find(self, example_ids: Ints) -> tuple[Floats, Floats, Mask]:
        """Look up the outputs of examples; zeros where the window has none.

        Args:
            example_ids: (B,), int64; ids may repeat.

        Returns:
            The values (B, T) and ages in seconds (B,), float32, and the mask (B,) of those present.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape.
        """
        _check("example_ids", example_ids, np.int64, 1)
        buckets = self._bucket(example_ids)
        # mode="clip": indices are in bounds by construction; "raise" would check them again
        places = self._starts.take(buckets, mode="clip").astype(np.int64)
        records = self._records.take(places, mode="clip")
        # those that are not first in their bucket: one step ahead at a time, all at once
        left = np.flatnonzero(records["id"] != example_ids)
        places, wanted = places.take(left), example_ids.take(left)
        last = self._starts.take(buckets.take(left) + 1, mode="clip").astype(np.int64) - 1
        more = np.flatnonzero(places < last)
        while len(more):
            left, wanted, last = left.take(more), wanted.take(more), last.take(more)
            places = places.take(more) + 1
            records[left] = following = self._records.take(places, mode="clip")
            more = np.flatnonzero((following["id"] != wanted) & (places < last))
        # a negative id would match the record of no example
        present = (records["id"] == example_ids) & (example_ids >= 0)
        values = np.where(present[:, None], records["values"], np.float32(0))
        return values, np.where(present, records["age"], np.float32(0)), present

    def __len__(self) -> int:
        return len(self._records) - 1

    @property
    def width(self) -> int:
        """T, the number of values of a row."""
        width: int = self._records["values"].shape[1]
        return width

    @property
    def nbytes(self) -> int:
        """Number of bytes of the index."""
        return self._records.nbytes + self._starts.nbytes

    def _fill(self, example_ids: Ints, values: Floats, age_seconds: Floats) -> None:
        """Store the rows in order of their keys, block by block, and count them by bucket."""
        order = np.argsort(mix(example_ids))
        for first in range(0, len(order), _BLOCK):
            rows = order[first : first + _BLOCK]
            block = self._records[first : first + len(rows)]
            block["id"] = example_ids[rows]
            block["age"] = age_seconds[rows]
            block["values"] = values[rows]
            buckets = self._bucket(block["id"])
            counts = np.bincount(buckets - buckets[0])
            ends = self._starts[buckets[0] + 1 :][: len(counts)]
            ends += counts.astype(np.uint32)
        np.cumsum(self._starts, out=self._starts)

    def _bucket(self, example_ids: Ints) -> Ints:
        buckets: Ints = (mix(example_ids) >> self._shift).view(np.int64)
        return buckets


def index_bytes(rows: int, width: int) -> int:
    """Return the bytes of an index of ``rows`` rows of ``width`` values."""
    return (rows + 1) * _record(width).itemsize + 4 * ((1 << _bits(rows)) + 1)


def _bits(rows: int) -> int:
    """Return the number of bits of a bucket's number."""
    return max(rows.bit_length() - 1, 1)


def _record(width: int) -> np.dtype[Any]:
    return np.dtype([("id", "i8"), ("age", "f4"), ("values", "f4", (width,))], align=True)


def _zeros(length: int, dtype: np.dtype[Any], path: Path | None) -> AnyArray:
    if path is None:
        return np.zeros(length, dtype)
    with path.open("xb") as file:
        # allocate now: without room, a write to mapped memory would kill the process
        os.posix_fallocate(file.fileno(), 0, length * dtype.itemsize)
    return _mapped(path, dtype, "r+")


def _mapped(path: Path, dtype: np.dtype[Any], mode: Any = "r") -> AnyArray:
    return np.asarray(np.memmap(path, dtype, mode))


def mix(example_ids: Ints) -> npt.NDArray[np.uint64]:
    """Return the ids' keys: MurmurHash3's finaliser without its last step.

    That step would not change the top bits, by which buckets are chosen.
    """
    keys = example_ids.view(np.uint64)
    for factor in _FACTORS:
        keys = (keys ^ (keys >> _HALF)) * factor
    return keys


def _check(name: str, array: object, dtype: type, dims: int, rows: int | None = None) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise TypeError(
            f"{name} should be a numpy array of {np.dtype(dtype)}; received "
            f"{getattr(array, 'dtype', type(array).__name__)}; convert it without loss"
        )
    if array.ndim != dims or rows not in (None, array.shape[0]):
        length = "B" if rows is None else rows
        expected = f"({length}, T)" if dims == 2 else f"({length},)"
        raise ValueError(f"{name} should be of shape {expected}; received {array.shape}")
