"""Checks of the columns of a stream, of any data set."""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_types(stream: Any) -> None:
    """Require the types of the columns, ids within their table, and finite values."""
    for name in ("time", "example_id"):
        assert getattr(stream, name).dtype == np.int64
    for name in ("week", "vertical"):
        assert getattr(stream, name).dtype == np.int32
    for name in ("label", "weight"):
        assert getattr(stream, name).dtype == np.float32
    assert 0 <= stream.vertical.min() <= stream.vertical.max() < len(stream.verticals)
    assert set(stream.sparse) == set(stream.cardinalities)
    for name, ids in stream.sparse.items():
        assert ids.dtype == np.int32 and ids.shape == (len(stream),)
        assert 0 <= ids.min() <= ids.max() < stream.cardinalities[name]
    for name, values in stream.dense.items():
        assert values.dtype == np.float32, name
        assert values.shape == (len(stream),) and np.isfinite(values).all()
