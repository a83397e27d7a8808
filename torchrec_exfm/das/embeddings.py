"""Teachers' embeddings as the bytes that the store keeps: E numbers in W bytes, little-endian.

``float16``: each number e as one, to the nearest, ties to even; W = 2 E. ``int8``: a float32 scale,
max abs(e) / 127 (2^-126 at least), then each e / scale as int8, to the nearest; W = 4 + E. A row
without an embedding is null on disk and 255 in each byte in memory: NaN as a float16 and as a
scale, which no row that is written has.
"""

from __future__ import annotations

import numpy as np

from torchrec_exfm.das.arrays import Bytes, Floats
from torchrec_exfm.das.rules import first_few

MISSING = b"\xff"
_RANGE = np.finfo(np.float32)
_SCALES = _RANGE.tiny, np.nextafter(_RANGE.max / np.float32(127), np.float32(0))  # 127 are finite


def encode(embeddings: Floats, resolution: str) -> Bytes:
    """The bytes (n, W) of embeddings (n, E); a ValueError for numbers that they can't hold."""
    with np.errstate(over="ignore"):
        numbers = embeddings.astype("<f2" if resolution == "float16" else "<f4", copy=False)
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(bad):
        raise ValueError(
            "embeddings should be finite, and at most 65504 as float16; received others in "
            f"{len(bad)} rows: {first_few(bad)}: correct or scale them; int8 holds any size"
        )
    if resolution == "float16":
        return numbers.view(np.uint8)
    scale = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
    scale = scale.clip(*_SCALES).astype("<f4", copy=False)
    rounded = np.rint(numbers / scale).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), rounded.view(np.uint8)], axis=1)


def decode(rows: Bytes, resolution: str) -> Floats:
    """The embeddings (..., E) in bytes (..., W); NaN where there is none."""
    if resolution == "float16":
        return rows.view("<f2").astype(np.float32)
    scale = np.ascontiguousarray(rows[..., :4]).view("<f4").astype(np.float32, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):  # scales that others have written
        return scale * rows[..., 4:].view(np.int8)
