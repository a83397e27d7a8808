"""The bytes of teachers' embeddings in the store: E numbers in W bytes, little-endian.

* ``float32``, ``float16``: each number, rounded to nearest, ties to even; W = 4 E, 2 E.
* ``int8``: a float32 scale, max abs(e) / 127 (at least 2^-126), then each e / scale as int8,
  rounded to nearest; W = 4 + E.
* ``int4``: the same with 7 in place of 127, and two numbers in a byte, the first in its low half
  (the last byte of an odd E has zeros in its high half); W = 4 + ceil(E / 2).

A row without an embedding is null on disk, and in memory 255 in each byte: a NaN, as a float and as
a scale, which no written row has.
"""

from __future__ import annotations

import numpy as np

from torchrec_exfm.das.arrays import Bytes, Floats
from torchrec_exfm.das.rules import first_few

MISSING = b"\xff"
_FLOATS = {"float32": "<f4", "float16": "<f2"}
_LARGEST = {"int8": np.float32(127), "int4": np.float32(7)}
_RANGE = np.finfo(np.float32)


def embedding_bytes(width: int, resolution: str) -> int:
    """Return W, the number of bytes of an embedding of E numbers."""
    if resolution in _FLOATS:
        return width * int(_FLOATS[resolution][-1])
    return 4 + (width if resolution == "int8" else (width + 1) // 2)


def encode(embeddings: Floats, resolution: str) -> Bytes:
    """Encode embeddings (n, E) as bytes (n, W); a ValueError for numbers that they can't hold."""
    is_float = resolution in _FLOATS
    with np.errstate(over="ignore"):  # overflow gives infinity, which is refused below
        # a copy where the numbers are returned as they are: the caller's array may change later
        numbers = embeddings.astype(_FLOATS.get(resolution, "<f4"), order="C", copy=is_float)
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(bad):
        raise ValueError(
            "embeddings should be finite, and at most 65504 as float16; received others in "
            f"{len(bad)} rows: {first_few(bad)}: correct or scale them; int8 holds any size"
        )
    if is_float:
        return numbers.view(np.uint8)
    largest = _LARGEST[resolution]
    # not 0 for a row of zeros, which would give 0 / 0; and scale * largest must stay finite
    bounds = _RANGE.tiny, np.nextafter(_RANGE.max / largest, np.float32(0))
    scale = (np.abs(numbers).max(axis=1, keepdims=True) / largest).clip(*bounds)
    scale = scale.astype("<f4", copy=False)
    packed = np.rint(numbers / scale).astype(np.int8).view(np.uint8)
    if resolution == "int4":
        halves = np.pad(packed & 15, ((0, 0), (0, packed.shape[1] % 2)))
        packed = halves[:, ::2] | halves[:, 1::2] << 4
    return np.concatenate([scale.view(np.uint8), packed], axis=1)


def decode(rows: Bytes, resolution: str, width: int | None = None) -> Floats:
    """Decode bytes (..., W) to embeddings (..., E); NaN where a row has none.

    Without ``width`` (E), an int4 embedding of odd E has one more number, 0.
    """
    if resolution in _FLOATS:
        return rows.view(_FLOATS[resolution]).astype(np.float32)
    scale = np.ascontiguousarray(rows[..., :4]).view("<f4").astype(np.float32, copy=False)
    numbers = rows[..., 4:].view(np.int8)
    if resolution == "int4":  # right shifts of int8 keep the sign
        pairs = np.stack([numbers << 4 >> 4, numbers >> 4], axis=-1)
        # not -1, which is ambiguous for no rows
        numbers = pairs.reshape(*rows.shape[:-1], 2 * numbers.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):  # other writers may store any scale
        return scale * numbers[..., :width]
