"""One stable id for each example, from its features, so that the examples of students meet.

Shapes: B examples, K values of each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec import JaggedTensor

__all__ = ["hash_ids"]

# SplitMix64's, less 2^64: torch's int64 wraps, and has the same bits
_STEP = 0x9E3779B97F4A7C15 - 2**64
_TURNS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def hash_ids(*columns: Tensor | JaggedTensor) -> Tensor:
    """A 63-bit id of each example, from the integer values of chosen features.

    Choose features that every student has and that together tell the examples apart, such as a
    request's id and the item's. Equal values give equal ids, whatever their dtype, device, batch
    or student. Of n different examples, two get the same id with a probability of about n²/2⁶⁴
    (0.5% for 300 million). A column that holds v_1 ... v_L for an example has the digest d, and
    the columns 1 ... C together the id, all modulo 2⁶⁴:

    .. math::
        d = m(L + \\sum_{j=1}^{L} m(m(v_j) + g j)), \\quad
        h_c = m(h_{c-1} + d_c), \\quad h_0 = 0, \\quad \\mathrm{id} = h_C \\bmod 2^{63}

    where g = 0x9e3779b97f4a7c15 and m(x) is what SplitMix64 puts out for the state x::

        x = x + g
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9    # >> fills with zeros
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb
        return x ^ (x >> 31)

    Stored outputs are found by these ids, so the formula never changes. The order of the columns,
    the order of an example's values in a column and their number all matter; whether they came as
    (B,), as (B, 1) or jagged does not. The columns are left as they are.

    Args:
        columns: integers or booleans of shape (B,) or (B, K), or a ``JaggedTensor`` (such as
            ``kjt["user"]``) with any number of values an example; all on one device.

    Returns:
        (B,), int64, at least 0, on the columns' device.

    Raises:
        TypeError: for a column that is no tensor, or of floats: students may round differently.
        ValueError: without columns, for another shape, and for columns of different B.

    Example:
        >>> import torch
        >>> hash_ids(torch.tensor([7, 8]), torch.tensor([[1, 2], [1, 2]])).tolist()
        [397739981447029692, 532566187041226689]
    """
    if not columns:
        raise ValueError("hash_ids should get one column or more; received none; pass features")
    digests = [_digest(f"column {number}", column) for number, column in enumerate(columns)]
    sizes = [digest.shape[0] for digest in digests]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the columns should have the same number of examples; received {sizes}; take them "
            "from one batch"
        )
    state = torch.zeros_like(digests[0])
    for digest in digests:
        state = _mix(state + digest)
    return state & (2**63 - 1)


def _digest(what: str, column: Tensor | JaggedTensor) -> Tensor:
    if isinstance(column, JaggedTensor):
        return _digest_jagged(_check(what, column.values(), dims=(1,)), column.offsets().long())
    values = _check(what, column, dims=(1, 2))
    table = values.unsqueeze(1) if values.dim() == 1 else values
    places = torch.arange(table.shape[1], device=table.device)
    return _mix(table.shape[1] + _terms(table, places).sum(1))


def _digest_jagged(values: Tensor, offsets: Tensor) -> Tensor:
    # where each value's own example starts; values outside all examples end in none of the sums
    starts = offsets.new_zeros(values.shape[0] + 1)
    starts[offsets] = offsets
    starts = starts.cummax(0).values[:-1]
    terms = _terms(values, torch.arange(values.shape[0], device=values.device) - starts)
    sums = torch.cat([terms.new_zeros(1), terms.cumsum(0)])[offsets]
    return _mix(offsets.diff() + sums.diff())


def _terms(values: Tensor, places: Tensor) -> Tensor:
    """What each value adds, from its place in its example, 0 for the first."""
    return _mix(_mix(values) + (places + 1) * _STEP)


def _mix(x: Tensor) -> Tensor:
    x = x + _STEP
    for shift, factor in _TURNS:
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _check(what: str, values: object, dims: tuple[int, ...]) -> Tensor:
    """The values as int64, if they are whole numbers in a tensor of so many dimensions."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{what} should be a torch.Tensor or a torchrec.JaggedTensor; received "
            f"{type(values).__name__}; of a KeyedJaggedTensor, pass kjt[key]"
        )
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise TypeError(
            f"{what} should be of integers or booleans; received {values.dtype}, which students "
            "may round differently; choose another feature, or pass the integers it came from"
        )
    if values.dim() not in dims:
        expected = "(B,) or (B, K)" if 2 in dims else "(N,) in a JaggedTensor"
        raise ValueError(f"{what} should be of shape {expected}; received {tuple(values.shape)}")
    return values.long()
