"""Numpy arrays by kind, whole numbers from what users have, and times one can read."""

from __future__ import annotations

import operator
from datetime import datetime, timezone
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

AnyArray: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]

MICROSECONDS = 1_000_000


def as_int(value: Any) -> int:
    """A whole number as an int, of numpy's and torch's too; -1 for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        return -1


def as_int64(what: str, values: Any, rows: int | None = None) -> Ints:
    """Whole numbers (a tensor, array or sequence) as int64 (n,), none changed on the way.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, or a number above 2^63 - 1.
    """
    array = _on_host(values)
    if array.dtype.kind not in "iu" and array.shape != (0,):
        raise TypeError(
            f"{what} should be whole numbers (int64); received {array.dtype}"
            + (", which may not hold every number above 2^53" if array.dtype.kind == "f" else "")
            + ": convert where they come from"
        )
    _check_shape(what, array, None if rows is None else (rows,), 1)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{what} should be below 2^63; received {array.max()}")
    return array.astype(np.int64, copy=False)


def as_floats(what: str, values: Any, shape: tuple[int, int]) -> Floats:
    """Floating-point numbers (a tensor, array or sequence) as float32 of a shape (n, k).

    For k = 1 the shape (n,) will do.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape.
    """
    array = _on_host(values)
    if array.dtype.kind != "f" and array.size:
        raise TypeError(f"{what} should be floating-point numbers; received {array.dtype}")
    if array.ndim == 1 and shape[1] == 1:
        array = array[:, None]
    _check_shape(what, array, shape, 2)
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused
        return array.astype(np.float32, copy=False)


def among(values: Ints, ordered: Ints) -> Mask:
    """Which values (n,) are among others, which are in rising order."""
    if len(ordered) == 0:
        return np.zeros(len(values), dtype=np.bool_)
    at = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    found: Mask = ordered[at] == values
    return found


def utc(seconds: float) -> str:
    """Epoch seconds as a date and time."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"second {seconds}"


def _on_host(values: Any) -> AnyArray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    tensor = values.detach().cpu()
    floating = tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4
    array: AnyArray = (tensor.float() if floating else tensor).numpy()
    return array


def _check_shape(what: str, array: AnyArray, shape: tuple[int, ...] | None, dims: int) -> None:
    if array.ndim != dims or (shape is not None and array.shape != shape):
        expected = shape or "(n,)"
        raise ValueError(f"{what} should be of shape {expected}; received {array.shape}")
