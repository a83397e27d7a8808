"""Conversion of users' arrays (tensors, frames, columns, lists) to numpy without loss.

Nulls and masked entries are refused everywhere, and so are times outside of 1970 to 2199. A
timestamp becomes the second that it lies in: floor(t), in UTC where it has no time zone. As floor
keeps order, a snapshot that was trained through an event never appears to be older than the event.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

AnyArray: TypeAlias = npt.NDArray[Any]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]

MICROSECONDS = 1_000_000
# The year 2200. A bound at the year 9999 would accept today's times in centiseconds: the year 7650
MAX_SECONDS = 7_258_118_400

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_PLAUSIBLE_SECONDS = range(631_152_000, 4_102_444_800)  # of 1990 to 2099
_UNITS = {
    "milliseconds": 10**3,
    "microseconds": 10**6,
    "nanoseconds": 10**9,
    "centiseconds": 10**2,
    "deciseconds": 10,
}


def as_int(value: Any) -> int:
    """Return a whole number (of Python, numpy or torch) as an int; -1 for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return -1


def as_int64(name: str, values: Any, rows: int | None = None) -> Ints:
    """Convert whole numbers (a tensor, array, series or sequence) to int64 (n,).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, nulls, or a number above 2^63 - 1.
    """
    return _as_ints(name, on_host(name, values), rows, hint=", or make ids with hash_ids")


def as_epoch(name: str, values: Any, rows: int | None = None) -> Ints:
    """Convert event times to epoch seconds (n,), of any range.

    Accepts whole seconds, as :func:`as_int64` does, and timestamps or dates of numpy, pandas,
    Arrow, Polars or ``datetime``.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, or nulls.
    """
    return _as_ints(name, _floor_to_seconds(on_host(name, values)), rows, also=" or timestamps")


def as_seconds(name: str, values: Any, rows: int | None = None) -> Ints:
    """Convert event times, as :func:`as_epoch` does; all must lie in [0, ``MAX_SECONDS``).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, nulls, or a time out of range, with its likely unit.
    """
    seconds = as_epoch(name, values, rows)
    if not len(seconds):
        return seconds
    earliest, latest = int(seconds.min()), int(seconds.max())
    if earliest < 0 or latest >= MAX_SECONDS:
        received = f"{earliest:,}" if earliest == latest else f"{earliest:,} to {latest:,}"
        raise ValueError(
            f"{name} should be seconds since 1970, in [0, {MAX_SECONDS:,}); received {received}: "
            + likely_unit(latest)
        )
    return seconds


def as_second(name: str, value: Any) -> int:
    """Convert one time, as :func:`as_seconds` does.

    Raises:
        TypeError: for another kind.
        ValueError: for several, a null, or a time out of range, with its likely unit.
    """
    array = on_host(name, value)
    if array.ndim:
        raise ValueError(f"{name} should be one time; received an array of shape {array.shape}")
    return int(as_seconds(name, array[None])[0])


def as_seconds_of_rows(name: str, values: Any, rows: int) -> Ints:
    """Convert event times (rows,), or one for all rows, as :func:`as_seconds` does."""
    array = on_host(name, values)
    if array.ndim == 0:
        return np.full(rows, as_second(name, array))
    return as_seconds(name, array, rows)


def likely_unit(time: int) -> str:
    """Guess the unit of a time outside of [0, ``MAX_SECONDS``) seconds, and name the divisor."""
    if time < MAX_SECONDS:
        return "some are before 1970"
    for unit, divisor in _UNITS.items():
        if time // divisor in _PLAUSIBLE_SECONDS:
            return f"{unit}? divide by {divisor:,}"
    return "of another unit?"


def check_duration(name: str, seconds: Any) -> None:
    """Raise a ValueError unless ``seconds`` is a number from 0; NaN is none."""
    if not isinstance(seconds, numbers.Real) or not float(seconds) >= 0:
        raise ValueError(f"{name} should be a number of seconds from 0; received {seconds!r}")


def as_floats(
    name: str, values: Any, shape: tuple[int, int], columns: Sequence[str] = ()
) -> Floats:
    """Convert floating-point numbers (a tensor, array or sequence) to float32 of a shape (n, k).

    For k = 1 the shape (n,) will do. Named columns (of a DataFrame, an Arrow table, a structured
    array, a mapping) are taken by name, in the order of ``columns``. The name of a series and an
    index are ignored: they say where values come from, not what they are for.

    Raises:
        TypeError: for another dtype; for named columns where ``columns`` has no names.
        ValueError: for another shape, other names, or nulls.
    """
    names = column_names(values)
    if names is not None:
        _check_columns(name, names, columns)
        column_shape = (shape[0], 1)
        parts = [
            as_floats(f"{column}, of {name}", values[column], column_shape) for column in columns
        ]
        return np.concatenate(parts, axis=1)
    array = on_host(name, values)
    if array.dtype.kind != "f" and array.size:
        raise TypeError(f"{name} should be floating-point numbers; received {array.dtype}")
    if array.ndim == 1 and shape[1] == 1:
        array = array[:, None]
    _check_shape(name, array, shape, 2)
    # a number that float32 can't hold becomes infinite, which the rules refuse later
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _is_tensor(values: Any) -> bool:
    """Return whether it is a torch.Tensor."""
    # torch is not imported for this: the host's reader runs without it
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _is_masked_tensor(values: Any) -> bool:
    masked = sys.modules.get("torch.masked")
    return masked is not None and isinstance(values, masked.MaskedTensor)


def column_names(values: Any) -> list[Any] | None:
    """Return the column names of a frame, table, structured array or mapping; None for others."""
    if _is_tensor(values):
        names = None
    elif isinstance(values, np.ndarray):
        names = values.dtype.names
    elif isinstance(values, Mapping):
        names = values
    else:  # an Arrow table has both attributes, and its `columns` are arrays
        names = getattr(values, "column_names", getattr(values, "columns", None))
    return None if names is None else list(names)


def among(values: Ints, ordered: Ints) -> Mask:
    """Return which values (n,) are among others, which are sorted."""
    if len(ordered) == 0:
        return np.zeros(len(values), dtype=np.bool_)
    at = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    matches: Mask = ordered[at] == values
    return matches


def utc(seconds: float) -> str:
    """Format epoch seconds as a date and time in UTC."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"second {seconds}"


def on_host(name: str, values: Any) -> AnyArray:
    """Return the values as a numpy array; text and other Python objects as objects.

    Raises:
        ValueError: for nulls and masked entries.
    """
    if (nulls := _null_mask(values)) is not None:
        _check_nulls(name, nulls)
    if _is_masked_tensor(values):
        values = values.get_data()
    if _is_tensor(values):
        tensor = values.detach().cpu()
        # numpy has no bfloat16; float32 holds all of it, and of float16
        floating = tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4
        array: AnyArray = (tensor.float() if floating else tensor).numpy()
    else:
        # without a dtype, pandas would return timestamps with a time zone as objects
        zone = getattr(getattr(values, "dtype", None), "tz", None)
        array = np.asarray(values, None if zone is None else "datetime64[us]")
    if array.dtype.kind in "UT" or (array.dtype.kind == "f" and _are_ints(values)):
        array = np.asarray(values, object)
    if array.dtype == object and any(map(_is_null_type, set(map(type, array.flat)))):
        nulls = np.array([_is_null_type(type(value)) for value in array.flat])
        _check_nulls(name, nulls.reshape(array.shape))
    if array.dtype.kind in "mM":
        _check_nulls(name, np.isnat(array))
    return array


def describe_dtype(array: AnyArray) -> str:
    """Return what an array holds, in words."""
    if array.dtype != object:
        return str(array.dtype)
    return " and ".join(sorted({type(value).__name__ for value in array.flat})) + " objects"


def _are_ints(values: Any) -> bool:
    """Return whether a list holds only ints: numpy makes floats of ints on both sides of 2^63."""
    return isinstance(values, (list, tuple)) and all(isinstance(value, int) for value in values)


def _as_ints(
    name: str, array: AnyArray, rows: int | None, *, also: str = "", hint: str = ""
) -> Ints:
    if array.dtype.kind not in "iu" and array.shape != (0,):
        kind = describe_dtype(array)
        if array.dtype.kind == "f":
            kind += ", which may not hold every number above 2^53"
        raise TypeError(
            f"{name} should be whole numbers (int64){also}; received {kind}: convert where they "
            f"come from{hint}"
        )
    _check_shape(name, array, None if rows is None else (rows,), 1)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(
            f"{name} should be below 2^63; received {array.max()}: convert where they come from"
            f"{hint}"
        )
    return array.astype(np.int64, copy=False)


def _floor_to_seconds(array: AnyArray) -> AnyArray:
    """Round timestamps and dates down to epoch seconds; return other arrays as they are."""
    if array.dtype == object and all(isinstance(value, date) for value in array.flat):
        return np.array([_to_second(value) for value in array.flat], np.int64).reshape(array.shape)
    if array.dtype.kind == "M":
        return array.astype("datetime64[s]").astype(np.int64)
    return array


def _to_second(value: date) -> int:
    if not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if value.utcoffset() is None:
        value = value.replace(tzinfo=timezone.utc)
    return (value - _EPOCH) // timedelta(seconds=1)


def _null_mask(values: Any) -> AnyArray | None:
    """Return the mask of null or masked entries; None if this kind of array can't have any."""
    if _is_masked_tensor(values):
        return ~np.asarray(values.get_mask().cpu())
    if isinstance(values, np.ma.MaskedArray):
        return None if values.dtype.names else np.ma.getmaskarray(values)
    if _is_tensor(values) or isinstance(values, np.ndarray):
        return None
    if isinstance(values, (list, tuple)):
        # numpy drops the masks of arrays in a list; checking the types first takes a tenth
        plain = set(map(type, values)) <= {int, float, str}
        return None if plain else np.array([_holds_masked(value) for value in values], np.bool_)
    if hasattr(values, "is_null"):  # Arrow, Polars
        return np.asarray(values.is_null())
    has_own_dtype = not isinstance(getattr(values, "dtype", None), np.dtype)
    if hasattr(values, "isna") and has_own_dtype:  # pandas: in numpy's dtypes a NaN is a number
        return np.asarray(values.isna())
    return None


def _holds_masked(values: Any) -> bool:
    if isinstance(values, np.ma.MaskedArray):
        return bool(np.ma.getmaskarray(values).any())
    return isinstance(values, (list, tuple)) and any(map(_holds_masked, values))


def _is_null_type(kind: type) -> bool:
    # by name, as pandas is optional
    return kind.__name__ in ("NoneType", "NAType", "NaTType")


def _check_nulls(name: str, nulls: AnyArray) -> None:
    if nulls.any():
        rows = np.flatnonzero(nulls.reshape(len(nulls), -1).any(1)) if nulls.ndim else [0]
        raise ValueError(
            f"{name} should have no nulls and nothing masked; received {len(rows)} such rows: "
            f"{', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''}: fill them in or "
            "leave them out"
        )


def _check_columns(name: str, names: list[Any], columns: Sequence[str]) -> None:
    if not columns:
        raise TypeError(
            f"{name} should have no names for its columns; received {names}: pass an array, such "
            "as frame.to_numpy()"
        )
    if Counter(names) != Counter(columns):
        raise ValueError(
            f"{name}: the columns should be named {tuple(columns)}, in any order; received "
            f"{tuple(names)}: rename or select them, or pass an array in the order of the tasks"
        )


def _check_shape(name: str, array: AnyArray, shape: tuple[int, ...] | None, dims: int) -> None:
    if array.ndim != dims or (shape is not None and array.shape != shape):
        expected = shape or "(n,)"
        raise ValueError(f"{name} should be of shape {expected}; received {array.shape}")
