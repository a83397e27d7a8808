"""A reference of the memory: one example and one event at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrec_exfm.das.memory import MemoryFormat
from torchrec_exfm.das.rules import NO_KEY

Columns = Mapping[str, Sequence[Any]]


def brute_force(
    events: tuple[Columns, Sequence[int], Sequence[Any]],
    examples: tuple[Columns, Sequence[int]],
    format: MemoryFormat,
) -> dict[str, list[dict[str, Any]]]:
    """Return the features of each example, by the name of the key, in float64.

    Args:
        events: columns of the keys, seconds (n,), values (n, V); of one second in their order.
        examples: columns of the keys, seconds (B,).
        format: as for the memory.

    Returns:
        For each example ``count``, ``mean``, ``last``, ``decayed_mean`` (lists of V; None without
        an event), ``days_since`` (None), ``values`` and ``ages_days`` (lists, the last first).
    """
    features: dict[str, list[dict[str, Any]]] = {}
    for name, key in zip(format.key_names, format.keys, strict=True):
        histories: dict[tuple[int, ...], list[tuple[int, list[float]]]] = {}
        for row, second in enumerate(events[1]):
            if (value := key_of(events[0], key, row)) is not None:
                vector = [float(number) for number in events[2][row]]
                histories.setdefault(value, []).append((int(second), vector))
        for history in histories.values():
            history.sort(key=lambda event: event[0])  # which keeps the order within a second
        features[name] = []
        for row, second in enumerate(examples[1]):
            value = key_of(examples[0], key, row)
            history = [] if value is None else histories.get(value, [])
            seen = [event for event in history if event[0] + format.delay_seconds < second]
            features[name].append(as_of(seen, int(second), format))
    return features


def key_of(columns: Columns, key: Sequence[str], row: int) -> tuple[int, ...] | None:
    values = [columns[name][row] for name in key]
    return None if any(v is None or v == NO_KEY for v in values) else tuple(map(int, values))


def as_of(seen: list[tuple[int, list[float]]], second: int, format: MemoryFormat) -> dict[str, Any]:
    """Return the features of one example, from the events that it may know, in order of time."""
    latest = seen[::-1][: format.length]
    features: dict[str, Any] = {
        "count": len(seen),
        "values": [vector for _, vector in latest],
        "ages_days": [(second - s) / 86_400 for s, _ in latest],
    }
    if not seen:
        return {**features, **dict.fromkeys(("mean", "last", "decayed_mean", "days_since"))}
    end, last = seen[-1]
    weights = [2.0 ** ((s - end) / format.half_life_seconds) for s, _ in seen]
    width = range(len(last))
    features["mean"] = [math.fsum(vector[v] for _, vector in seen) / len(seen) for v in width]
    features["decayed_mean"] = [
        math.fsum(w * vector[v] for w, (_, vector) in zip(weights, seen, strict=True))
        / math.fsum(weights)
        for v in width
    ]
    return {**features, "last": last, "days_since": (second - end) / 86_400}
