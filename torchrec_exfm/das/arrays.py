"""Numpy arrays of what users have: whole numbers, times and floats, none changed on the way.

What is null or masked is refused everywhere, and so is a time that is no second of 1970 to 2199.
A timestamp becomes the second that it lies in: floor(t), in UTC where it has no time zone. As floor
keeps order, a snapshot that was trained through an event is not taken for one from before it.
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
# The year 2200. A bound at the year 9999 would let the centiseconds of today through: the year 7650
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
    """A whole number as an int, of numpy's and torch's too; -1 for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        return -1


def as_int64(what: str, values: Any, rows: int | None = None) -> Ints:
    """Convert whole numbers (a tensor, array, series or sequence) to int64 (n,).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, nulls, or a number above 2^63 - 1.
    """
    return _whole(what, on_host(what, values), rows, hint=", or make ids with hash_ids")


def as_epoch(what: str, values: Any, rows: int | None = None) -> Ints:
    """Convert event times to epoch seconds (n,), of any range.

    They are whole seconds, as :func:`as_int64` takes them, or timestamps or dates: of numpy,
    pandas, Arrow, Polars or ``datetime``.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, or nulls.
    """
    return _whole(what, _seconds(on_host(what, values)), rows, also=" or timestamps")


def as_seconds(what: str, values: Any, rows: int | None = None) -> Ints:
    """Convert event times, as :func:`as_epoch` does, if all lie in [0, ``MAX_SECONDS``).

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, nulls, or a time out of range, with its likely unit.
    """
    seconds = as_epoch(what, values, rows)
    if not len(seconds):
        return seconds
    least, most = int(seconds.min()), int(seconds.max())
    if least < 0 or most >= MAX_SECONDS:
        received = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        raise ValueError(
            f"{what} should be seconds since 1970, in [0, {MAX_SECONDS:,}); received {received}: "
            + likely_unit(most)
        )
    return seconds


def as_second(what: str, value: Any) -> int:
    """Convert one time, as :func:`as_seconds` does.

    Raises:
        TypeError: for another kind.
        ValueError: for several, a null, or a time out of range, with its likely unit.
    """
    array = on_host(what, value)
    if array.ndim:
        raise ValueError(f"{what} should be one time; received an array of shape {array.shape}")
    return int(as_seconds(what, array[None])[0])


def as_seconds_of_rows(what: str, values: Any, rows: int) -> Ints:
    """Convert event times (rows,), or one for all rows, as :func:`as_seconds` does."""
    array = on_host(what, values)
    if array.ndim == 0:
        return np.full(rows, as_second(what, array))
    return as_seconds(what, array, rows)


def likely_unit(time: int) -> str:
    """Guess the unit of a time that is no second in [0, ``MAX_SECONDS``); say what to do."""
    if time < MAX_SECONDS:
        return "some are before 1970"
    for unit, divisor in _UNITS.items():
        if time // divisor in _PLAUSIBLE_SECONDS:
            return f"{unit}? divide by {divisor:,}"
    return "of another unit?"


def check_duration(what: str, seconds: Any) -> None:
    """Refuse what is no length of time.

    Raises:
        ValueError: for NaN, a negative number, or what is no number.
    """
    if not isinstance(seconds, numbers.Real) or not float(seconds) >= 0:
        raise ValueError(f"{what} should be a number of seconds from 0; received {seconds!r}")


def as_floats(
    what: str, values: Any, shape: tuple[int, int], columns: Sequence[str] = ()
) -> Floats:
    """Convert floating-point numbers (a tensor, array or sequence) to float32 of a shape (n, k).

    For k = 1 the shape (n,) will do. What has names for its columns (a DataFrame, an Arrow table, a
    structured array, a mapping) is taken by name, in the order of ``columns``. The name of a series
    and an index count for nothing: they say where values come from, not what they are for.

    Raises:
        TypeError: for another dtype; for named columns where ``columns`` has no names.
        ValueError: for another shape, other names, or nulls.
    """
    names = column_names(values)
    if names is not None:
        _check_columns(what, names, columns)
        one = (shape[0], 1)
        parts = [as_floats(f"{name}, of {what}", values[name], one) for name in columns]
        return np.concatenate(parts, axis=1)
    array = on_host(what, values)
    if array.dtype.kind != "f" and array.size:
        raise TypeError(f"{what} should be floating-point numbers; received {array.dtype}")
    if array.ndim == 1 and shape[1] == 1:
        array = array[:, None]
    _check_shape(what, array, shape, 2)
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused
        return array.astype(np.float32, copy=False)


def _is_tensor(values: Any) -> bool:
    """Whether it is one of torch, which is not imported for it: a host's reader does without."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _is_masked_tensor(values: Any) -> bool:
    masked = sys.modules.get("torch.masked")
    return masked is not None and isinstance(values, masked.MaskedTensor)


def column_names(values: Any) -> list[Any] | None:
    """The names of the columns of a frame, table, structured array or mapping; None for others."""
    if _is_tensor(values):
        names = None
    elif isinstance(values, np.ndarray):
        names = values.dtype.names
    elif isinstance(values, Mapping):
        names = values
    else:  # an Arrow table has both, and its columns are arrays
        names = getattr(values, "column_names", getattr(values, "columns", None))
    return None if names is None else list(names)


def among(values: Ints, ordered: Ints) -> Mask:
    """Which values (n,) are among others, which are in rising order."""
    if len(ordered) == 0:
        return np.zeros(len(values), dtype=np.bool_)
    at = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    matches: Mask = ordered[at] == values
    return matches


def utc(seconds: float) -> str:
    """Epoch seconds as a date and time."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"second {seconds}"


def on_host(what: str, values: Any) -> AnyArray:
    """An array of the values: text, and other objects of Python, as objects.

    Raises:
        ValueError: for nulls, and what lies under a mask.
    """
    if (nulls := _nulls(values)) is not None:
        _check_nulls(what, nulls)
    if _is_masked_tensor(values):
        values = values.get_data()
    if _is_tensor(values):
        tensor = values.detach().cpu()
        floating = tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4
        array: AnyArray = (tensor.float() if floating else tensor).numpy()
    else:
        # else pandas makes objects of the times that have a zone
        zone = getattr(getattr(values, "dtype", None), "tz", None)
        array = np.asarray(values, None if zone is None else "datetime64[us]")
    if array.dtype.kind in "UT" or (array.dtype.kind == "f" and _are_ints(values)):
        array = np.asarray(values, object)
    if array.dtype == object and any(map(_is_of_nulls, set(map(type, array.flat)))):
        nulls = np.array([_is_of_nulls(type(value)) for value in array.flat])
        _check_nulls(what, nulls.reshape(array.shape))
    if array.dtype.kind in "mM":
        _check_nulls(what, np.isnat(array))
    return array


def describe_dtype(array: AnyArray) -> str:
    """What an array holds, in words."""
    if array.dtype != object:
        return str(array.dtype)
    return " and ".join(sorted({type(value).__name__ for value in array.flat})) + " objects"


def _are_ints(values: Any) -> bool:
    """Whether a list is of ints alone: on both sides of 2^63, numpy makes floats of them."""
    return isinstance(values, (list, tuple)) and all(isinstance(value, int) for value in values)


def _whole(what: str, array: AnyArray, rows: int | None, *, also: str = "", hint: str = "") -> Ints:
    if array.dtype.kind not in "iu" and array.shape != (0,):
        kind = describe_dtype(array)
        if array.dtype.kind == "f":
            kind += ", which may not hold every number above 2^53"
        raise TypeError(
            f"{what} should be whole numbers (int64){also}; received {kind}: convert where they "
            f"come from{hint}"
        )
    _check_shape(what, array, None if rows is None else (rows,), 1)
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(
            f"{what} should be below 2^63; received {array.max()}: convert where they come from"
            f"{hint}"
        )
    return array.astype(np.int64, copy=False)


def _seconds(array: AnyArray) -> AnyArray:
    """The epoch seconds that times lie in; what holds others is left as it is."""
    if array.dtype == object and all(isinstance(value, date) for value in array.flat):
        return np.array([_second(value) for value in array.flat], np.int64).reshape(array.shape)
    if array.dtype.kind == "M":
        return array.astype("datetime64[s]").astype(np.int64)
    return array


def _second(value: date) -> int:
    if not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if value.utcoffset() is None:
        value = value.replace(tzinfo=timezone.utc)
    return (value - _EPOCH) // timedelta(seconds=1)


def _nulls(values: Any) -> AnyArray | None:
    """Which entries an array of its own kind has as null or masked; None if it can't have any."""
    if _is_masked_tensor(values):
        return ~np.asarray(values.get_mask().cpu())
    if isinstance(values, np.ma.MaskedArray):
        return None if values.dtype.names else np.ma.getmaskarray(values)
    if _is_tensor(values) or isinstance(values, np.ndarray):
        return None
    if isinstance(values, (list, tuple)):
        # numpy drops the masks of arrays in a list; to look at the kinds first costs a tenth
        plain = set(map(type, values)) <= {int, float, str}
        return None if plain else np.array([_holds_masked(value) for value in values], np.bool_)
    if hasattr(values, "is_null"):  # Arrow, Polars
        return np.asarray(values.is_null())
    own_dtype = not isinstance(getattr(values, "dtype", None), np.dtype)
    if hasattr(values, "isna") and own_dtype:  # pandas: in numpy's dtypes a NaN is a number
        return np.asarray(values.isna())
    return None


def _holds_masked(values: Any) -> bool:
    if isinstance(values, np.ma.MaskedArray):
        return bool(np.ma.getmaskarray(values).any())
    return isinstance(values, (list, tuple)) and any(map(_holds_masked, values))


def _is_of_nulls(kind: type) -> bool:
    return kind.__name__ in ("NoneType", "NAType", "NaTType")  # pandas is optional


def _check_nulls(what: str, nulls: AnyArray) -> None:
    if nulls.any():
        rows = np.flatnonzero(nulls.reshape(len(nulls), -1).any(1)) if nulls.ndim else [0]
        raise ValueError(
            f"{what} should have no nulls and nothing masked; received {len(rows)} such rows: "
            f"{', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''}: fill them in, or "
            "leave them out"
        )


def _check_columns(what: str, names: list[Any], columns: Sequence[str]) -> None:
    if not columns:
        raise TypeError(
            f"{what} should have no names for its columns; received {names}: pass an array, such "
            "as frame.to_numpy()"
        )
    if Counter(names) != Counter(columns):
        raise ValueError(
            f"{what}: the columns should be named {tuple(columns)}, in any order; received "
            f"{tuple(names)}: rename or select them, or pass an array in the order of the tasks"
        )


def _check_shape(what: str, array: AnyArray, shape: tuple[int, ...] | None, dims: int) -> None:
    if array.ndim != dims or (shape is not None and array.shape != shape):
        expected = shape or "(n,)"
        raise ValueError(f"{what} should be of shape {expected}; received {array.shape}")
