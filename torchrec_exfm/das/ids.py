"""Stable ids of examples, hashed from their features, so that students share stored outputs.

Shapes: B examples, K values of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import md5
from typing import Any, Literal, TypeAlias, get_args, overload
from uuid import UUID

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torchrec import JaggedTensor, KeyedJaggedTensor

from torchrec_exfm.das.arrays import Ints, describe_dtype, on_host

__all__ = ["hash_ids", "hash_ids_sql"]

Kind: TypeAlias = Literal["integer", "string"]
Dialect: TypeAlias = Literal["duckdb", "spark"]
_Turn: TypeAlias = tuple[int, int, "int | str"]  # a term may be an expression

# SplitMix64's constants less 2^64: torch has no arithmetic in uint64; int64 wraps to the same bits
_STEP = 0x9E3779B97F4A7C15 - 2**64
_TURNS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_START = 0x9E3779B843248F65 - 2**64  # x for which x ^ (x >> 31) is the step


@overload
def hash_ids(*columns: Tensor | JaggedTensor) -> Tensor: ...
@overload
def hash_ids(*columns: Any) -> Tensor | Ints: ...
def hash_ids(*columns: Any) -> Tensor | Ints:
    """Hash integers or text of chosen features to one 63-bit id for each example.

    Choose features that every student has and that together identify an example, such as the ids of
    a request and an item. Equal values give equal ids, whatever their dtype, device, batch, student
    or library. Among n different examples, two get the same id with a probability of about n²/2⁶⁴
    (0.5% for 300 million). A column that holds v_1 ... v_L for an example has the digest d_c, and
    the columns 1 ... C together give the id, all modulo 2⁶⁴:

    .. math::
        d_c = m(L + \\sum_{j=1}^{L} m(m(v_j) + g j)), \\quad
        h_c = m(h_{c-1} + d_c), \\quad h_0 = 0, \\quad \\mathrm{id} = h_C \\bmod 2^{63}

    where g = 0x9e3779b97f4a7c15 and m(x) is the output of SplitMix64 for the state x::

        x = x + g
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9    # >> fills with zeros
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb
        return x ^ (x >> 31)

    An integer v enters modulo 2⁶⁴, so an unsigned one of 2⁶³ or more enters by its 64 bits. A text
    enters as the first 16 hexadecimal digits of the MD5 of its UTF-8, read as a number; a
    ``uuid.UUID`` as its text, 36 characters in lower case. Text is not normalized: ``"7"`` differs
    from ``7``, and a UUID in capitals from one in lower case.

    Stored outputs are looked up by these ids, so the formula never changes. The order of the
    columns, the order of an example's values in a column and their number all matter; whether a
    column is (B,), (B, 1) or jagged does not. The columns are not changed.

    Args:
        columns: of shape (B,) or (B, K), or a ``JaggedTensor`` (such as ``kjt["user"]``) with any
            number of values an example; all on one device. Tensors hold integers or booleans; numpy
            arrays, lists, and columns of pandas, Arrow or Polars may also hold text or UUIDs.

    Returns:
        (B,) int64 ids of at least 0, as a tensor on the columns' device if any column is a tensor,
        else as a numpy array.

    Raises:
        TypeError: for a column of mixed or unsupported types: floats (students may round them
            differently), bytes, decimals, integers as Python objects.
        ValueError: without columns, for another shape, for nulls and masked entries, for text that
            is not Unicode, and for columns of different B or on different devices.

    Example:
        >>> import torch
        >>> hash_ids(torch.tensor([7, 8]), torch.tensor([[1, 2], [1, 2]])).tolist()
        [397739981447029692, 532566187041226689]
        >>> hash_ids(["ann", "ben"], np.array([1, 2**64 - 1], np.uint64)).tolist()
        [7313924994585183533, 3674428504952757823]
    """
    if not columns:
        raise ValueError("hash_ids should get one column or more; received none; pass features")
    digests = [_digest(f"column {number}", column) for number, column in enumerate(columns)]
    if len(devices := {str(digest.device) for digest in digests}) > 1:
        raise ValueError(
            f"the columns should be on one device; received {sorted(devices)}; move them to one"
        )
    sizes = [digest.shape[0] for digest in digests]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the columns should have the same number of examples; received {sizes}; take them "
            "from one batch"
        )
    state = torch.zeros_like(digests[0])
    for digest in digests:
        state = _mix(state + digest)
    ids = state & (2**63 - 1)
    return ids if any(isinstance(c, (Tensor, JaggedTensor)) for c in columns) else ids.numpy()


def _digest(name: str, column: Any) -> Tensor:
    if isinstance(column, JaggedTensor):
        return _digest_jagged(_check(name, column.values(), dims=(1,)), column.offsets().long())
    if not isinstance(column, Tensor) or isinstance(column, MaskedTensor):
        column = torch.from_numpy(_as_integers(name, column))
    values = _check(name, column, dims=(1, 2))
    table = values.unsqueeze(1) if values.dim() == 1 else values
    places = torch.arange(table.shape[1], device=table.device)
    return _mix(table.shape[1] + _terms(table, places).sum(1))


def _digest_jagged(values: Tensor, offsets: Tensor) -> Tensor:
    # where each value's example starts; values outside of all examples enter no sum
    starts = offsets.new_zeros(values.shape[0] + 1)
    starts[offsets] = offsets
    starts = starts.cummax(0).values[:-1]
    terms = _terms(values, torch.arange(values.shape[0], device=values.device) - starts)
    # int64 wraps, so that differences of running sums are exact modulo 2^64
    sums = torch.cat([terms.new_zeros(1), terms.cumsum(0)])[offsets]
    return _mix(offsets.diff() + sums.diff())


def _terms(values: Tensor, places: Tensor) -> Tensor:
    """Return each value's summand of the digest, by its place in its example, from 0."""
    return _mix(_mix(values) + (places + 1) * _STEP)


def _mix(x: Tensor) -> Tensor:
    x = x + _STEP
    for shift, factor in _TURNS:
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # >> of int64 copies the sign; the formula shifts in zeros
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _check(name: str, values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return whole numbers as int64; raise for another dtype or number of dimensions."""
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise TypeError(
            f"{name} should be of integers or booleans; received {values.dtype}, which students "
            "may round differently; choose another feature, or pass the integers it came from"
        )
    if values.dim() not in dims:
        expected = "(B,) or (B, K)" if 2 in dims else "(N,) in a JaggedTensor"
        raise ValueError(f"{name} should be of shape {expected}; received {tuple(values.shape)}")
    return values.long()


def _as_integers(name: str, column: Any) -> Ints:
    """Return the whole numbers, modulo 2^64, by which a column on the host enters the formula."""
    if isinstance(column, KeyedJaggedTensor):
        raise TypeError(
            f"{name} should be of one feature; received a KeyedJaggedTensor; pass kjt[key]"
        )
    if isinstance(getattr(column, "type", None), pa.UuidType):
        column = column.to_pylist()  # numpy would receive bytes
    array = on_host(name, column)
    if array.dtype.kind in "biu" or not array.size:
        return array.astype(np.int64)
    kinds = set(map(type, array.flat)) if array.dtype == object else {array.dtype.type}
    if not all(issubclass(kind, (str, UUID)) for kind in kinds):
        raise TypeError(
            f"{name} should be of integers, booleans, text or UUIDs; received "
            f"{describe_dtype(array)}; pass an array of one of these (of integers np.int64 or "
            "np.uint64), or another feature"
        )
    try:
        texts = [str(value).encode() for value in array.flat]
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} should be of Unicode text; received {error.object!r:.100}, which UTF-8 can't "
            "hold; correct it where it comes from"
        ) from None
    digests = b"".join([md5(text, usedforsecurity=False).digest() for text in texts])
    return np.frombuffer(digests, ">i8")[::2].astype(np.int64).reshape(array.shape)


def hash_ids_sql(columns: Mapping[str, Kind], dialect: Dialect) -> str:
    """Return :func:`hash_ids` as a SQL expression of built-in functions only.

    It gives the same ids as ``hash_ids`` for the same columns in the same order, of one value an
    example; NULL if any column is NULL. Each column is a fold over turns, and a turn maps a state x
    to ((x ^ (x >> shift)) · factor + term) mod 2⁶⁴. The state after the previous columns is the
    term of one of the turns.

    Args:
        columns: names of columns, in order, and what they hold: ``"integer"``, any integer type of
            up to 64 bits, or ``"string"``. Cast a UUID to a string first.
        dialect: ``"duckdb"`` (1.3 or newer), or ``"spark"`` (3.5 or newer, ANSI mode or not).

    Raises:
        ValueError: without columns, for another kind, or another dialect.

    Example:
        >>> import duckdb
        >>> ids = hash_ids_sql({"visitor": "string", "request": "integer"}, "duckdb")
        >>> duckdb.sql(f"SELECT {ids} FROM (SELECT 'ann' AS visitor, 7 AS request)").fetchall()
        [(5730135706573243336,)]
        >>> hash_ids(["ann"], [7]).tolist()
        [5730135706573243336]
    """
    if not columns or not set(columns.values()) <= set(get_args(Kind)):
        raise ValueError(
            f"columns should be names with one of {get_args(Kind)} for each; received {columns!r}"
        )
    if dialect not in get_args(Dialect):
        raise ValueError(f"dialect should be one of {get_args(Dialect)}; received {dialect!r}")
    fold, wide, quote = _FOLDS[dialect]
    state: str | int = _STEP
    for left, (name, kind) in zip(reversed(range(len(columns))), columns.items(), strict=True):
        value = _VALUES[dialect, kind].format(quote + name.replace(quote, 2 * quote) + quote)
        turns: list[_Turn] = [(31, 1, value)]
        for term in (2 * _STEP, 1 + _STEP, state, _STEP if left else 0):
            turns += [(shift, factor, 0) for shift, factor in _TURNS] + [(31, 1, term)]
        state = fold(turns)
    return f"CAST({state} & CAST({2**63 - 1} AS {wide}) AS BIGINT)"


def _fold_in_duckdb(turns: list[_Turn]) -> str:
    """Return the fold in unsigned 128-bit integers, where no product overflows.

    ``list_reduce`` needs both arguments of one type, so the state is the term of a turn.
    """
    rows = [
        [f"CAST({x % 2**64 if isinstance(x, int) else x} AS UHUGEINT)" for x in turn]
        for turn in [(0, 0, _START), *turns]
    ]
    elements = [f"{{'shift': {s}, 'factor': {f}, 'term': {t}}}" for s, f, t in rows]
    low = f"CAST({2**64 - 1} AS UHUGEINT)"
    state = f"(xor(x.term, x.term >> turn.shift) * turn.factor + turn.term) & {low}"
    body = f"{{'shift': turn.shift, 'factor': turn.factor, 'term': {state}}}"
    return f"list_reduce([{', '.join(elements)}], lambda x, turn: {body}).term"


def _fold_in_spark(turns: list[_Turn]) -> str:
    """Return the fold in halves of 32 bits: in ANSI mode, overflow of 64 bits is an error.

    With y = x ^ (x >>> shift) = 2³² h + l, 0 <= l < 2³², and factor = 2³² G + F, -2³¹ <= F < 2³¹,
    y · factor + term = l F + term + 2³² (h F + l G), modulo 2⁶⁴. Only term and l G could overflow
    the sums: of term the halves are added apart, of l G the lower half, as the upper one is a
    multiple of 2⁶⁴.
    """
    elements = []
    for shift, factor, term in turns:
        low = _signed(factor, 32)
        high = _signed((factor - low) >> 32, 32)
        text = f"{_signed(term, 64)}L" if isinstance(term, int) else term
        elements.append(f"named_struct('s', {shift}, 'f', {low}L, 'g', {high}L, 'term', {text})")
    y, half = "(x ^ shiftrightunsigned(x, turn.s))", f"{2**32 - 1}L"
    lower = f"(({y} & {half}) * turn.f + (turn.term & {half}))"
    upper = f"shiftright({lower}, 32) + shiftright({y}, 32) * turn.f"
    upper += f" + (({y} & {half}) * turn.g & {half}) + shiftright(turn.term, 32)"
    body = f"shiftleft({upper}, 32) | ({lower} & {half})"
    return f"aggregate(array({', '.join(elements)}), {_START}L, (x, turn) -> {body})"


def _signed(number: int, bits: int) -> int:
    """Return a number modulo 2^bits as a signed integer."""
    half = 1 << (bits - 1)
    return (number + half) % (2 * half) - half


_FOLDS = {"duckdb": (_fold_in_duckdb, "UHUGEINT", '"'), "spark": (_fold_in_spark, "BIGINT", "`")}
_VALUES = {
    ("duckdb", "integer"): f"({{}} & CAST({2**64 - 1} AS HUGEINT))",
    ("duckdb", "string"): "('0x' || substr(md5({}), 1, 16))::UBIGINT",
    ("spark", "integer"): "({} | 0L)",
    ("spark", "string"): "CAST(conv(substr(md5({}), 1, 16), 16, -10) AS BIGINT)",
}
