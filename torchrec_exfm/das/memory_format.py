"""What a memory keeps of a key, and the features that it gives.

B examples, V numbers of an event, L events of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from torchrec_exfm.das.arrays import (
    MAX_SECONDS,
    AnyArray,
    Floats,
    Ints,
    as_int,
    as_int64,
    as_seconds,
    check_duration,
    column_names,
)
from torchrec_exfm.das.embeddings import decode, embedding_bytes
from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.ids import hash_ids
from torchrec_exfm.das.rules import NO_KEY
from torchrec_exfm.das.schema import check_name

if TYPE_CHECKING:
    from torchrec import JaggedTensor

__all__ = ["MemoryFeatures", "MemoryFormat"]

DAY_SECONDS = 86_400
Columns: TypeAlias = Any  # a mapping, a DataFrame, an Arrow table: by name, each (n,)
Resolution: TypeAlias = Literal["float32", "float16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class MemoryFormat:
    """What a memory keeps: the same for a table, beside training and for serving.

    Args:
        name: begins the names of the features, such as ``"fm"`` or ``"label"``.
        keys: each the names of one column or several, such as ``[["user_id"], ["user_id",
            "item_id"]]``.
        width: V, numbers of an event.
        length: L, events of a sequence; 0: aggregates alone.
        half_life_seconds: an event of this age weighs half as much in the decayed mean.
        delay_seconds: D: an event of time s is a feature of examples of times t > s + D.
        resolution: of the vectors in sequences; ``"int8"`` and ``"int4"`` with a scale for each.

    Raises:
        ValueError: for a wrong value.
    """

    name: str
    keys: Sequence[Sequence[str]]
    width: int = 1
    length: int = 0
    half_life_seconds: float = 7 * DAY_SECONDS
    delay_seconds: int = 0
    resolution: Resolution = "float32"

    def __post_init__(self) -> None:
        given = self.keys
        keys = tuple((key,) if isinstance(key, str) else tuple(key) for key in given)
        object.__setattr__(self, "keys", keys)
        for name in (self.name, *(column for key in keys for column in key)):
            check_name("a memory, and a column of its keys,", name)
        if isinstance(given, str) or not all(keys) or len({*self.key_names}) < len(keys or "1"):
            raise ValueError(
                "keys should be a list of keys, each of one column or more, that differ in their "
                f"names joined by '_'; received {given!r}"
            )
        for name, least in (("width", 1), ("length", 0), ("delay_seconds", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not least <= as_int(value) <= MAX_SECONDS:
                raise ValueError(
                    f"{name} should be a whole number from {least}; received {value!r}"
                )
        check_duration("half_life_seconds", self.half_life_seconds)
        if not self.half_life_seconds:
            raise ValueError(
                f"half_life_seconds should be more than 0; received {self.half_life_seconds!r}"
            )
        if self.resolution not in (known := get_args(Resolution)):
            raise ValueError(f"resolution should be one of {known}; received {self.resolution!r}")

    @property
    def key_names(self) -> tuple[str, ...]:
        """A name for each key: its columns' joined by ``_``."""
        return tuple("_".join(key) for key in self.keys)

    def key_values(self, columns: Columns, rows: int | None = None) -> dict[str, Ints]:
        """Return each key's values (B,): a column's own, or the hash of several (`hash_ids`)."""
        needed = {column for key in self.keys for column in key}
        names = column_names(columns) or []
        if not needed <= {*names}:
            raise ValueError(
                f"the columns of the keys should be {sorted(needed)}; received {names}"
            )
        values = {name: as_int64(name, columns[name], rows) for name in needed}
        hashed = {}
        for name, key in zip(self.key_names, self.keys, strict=True):
            parts = [values[column] for column in key]
            ids = parts[0] if len(parts) == 1 else hash_ids(*parts)
            without = np.any([part == NO_KEY for part in parts], axis=0)
            hashed[name] = np.where(without, NO_KEY, ids)
        return hashed

    @cached_property
    def event_dtype(self) -> np.dtype[Any]:
        """An event of a sequence."""
        size = embedding_bytes(self.width, self.resolution)
        return np.dtype([("seconds", "<i8"), ("vector", "u1", (size,))])

    @property
    def state_width(self) -> int:
        """Numbers of a state, float64: seconds, count, last (V), weight, decayed (V), sums (V)."""
        return 3 + 3 * self.width

    def unpack(self, records: Sequence[bytes | None], seconds: Any) -> MemoryFeatures:
        """Return the features of B keys' records, of :meth:`Memory.records`; None: no event.

        Raises:
            StoreError: for a record whose length is not that of its events.
        """
        t = as_seconds("seconds", seconds, len(records))
        head, size = 8 * self.state_width, self.event_dtype.itemsize
        empty = bytes(head)
        parts = [empty if record is None else record for record in records]
        heads = bytearray().join([part[:head].ljust(head, b"\0") for part in parts])  # writable
        states = np.frombuffer(heads, "<f8").reshape(-1, self.state_width)
        lengths = np.clip(states[:, 1], 0, self.length)  # 1: the count
        received = np.array([len(part) for part in parts])
        if len(damaged := np.flatnonzero(received != head + size * lengths)):
            row = damaged[0]
            raise StoreError(
                f"records of the memory {self.name} should have {head} bytes, and {size} for each "
                f"of the last {self.length} events; received {received[row]} bytes of "
                f"{states[row, 1]:g} events in row {row}, the first of {len(damaged)}: drop this "
                "version of the memory, and publish it again"
            )
        events = np.frombuffer(bytearray().join([part[head:] for part in parts]), self.event_dtype)
        return self.features(states, events, lengths.astype(np.int64), t)

    def features(
        self, states: AnyArray, events: AnyArray, lengths: Ints, seconds: Ints
    ) -> MemoryFeatures:
        """Return the features of B states, and of the events of each, the last first."""
        last_seconds, count, last, weight, decayed, sums = self.split(states)
        with np.errstate(invalid="ignore"):  # 0 / 0 where there is none
            mean, decayed_mean = sums / count, decayed / weight
        none = count == 0
        days = np.where(none, np.nan, (seconds[:, None] - last_seconds) / DAY_SECONDS)
        ages = (np.repeat(seconds, lengths) - events["seconds"]) / DAY_SECONDS
        return MemoryFeatures(
            count=count[:, 0].astype(np.int64),
            mean=mean.astype(np.float32),
            last=np.where(none, np.nan, last).astype(np.float32),
            decayed_mean=decayed_mean.astype(np.float32),
            days_since=days[:, 0].astype(np.float32),
            lengths=lengths.astype(np.int32),
            vectors=decode(events["vector"], self.resolution, self.width),
            ages_days=ages.astype(np.float32),
        )

    def split(self, states: AnyArray) -> list[AnyArray]:
        """Return views of states (n, 3 + 3 V), one of each part of them."""
        return np.split(states, np.cumsum([1, 1, self.width, 1, self.width]), axis=1)

    def dense(self, features: Mapping[str, MemoryFeatures]) -> Floats:
        """Return all keys' :meth:`MemoryFeatures.dense` side by side, (B, keys * (3 + 3 V))."""
        return np.concatenate([features[name].dense() for name in self.key_names], axis=1)


@dataclass(frozen=True, eq=False)
class MemoryFeatures:
    """What a memory knows of one key of B examples; what it has no event for is NaN, count 0.

    Attributes:
        count: int64 (B,), how many events there were.
        mean, last: float32 (B, V), over all of them, and of the last.
        decayed_mean: sum_i w_i v_i / sum_i w_i with w_i = 2^(-age_i / half-life).
        days_since: float32 (B,), the age of the last, in days.
        lengths: int32 (B,), at most L.
        vectors: float32 (N, V), the last first, one example's after the other; N = sum of lengths.
        ages_days: float32 (N,).
    """

    count: Ints
    mean: Floats
    last: Floats
    decayed_mean: Floats
    days_since: Floats
    lengths: Ints
    vectors: Floats
    ages_days: Floats

    def dense(self) -> Floats:
        """Return dense features (B, 3 + 3 V), float32.

        Whether there was an event, log(1 + count), log(1 + days since), mean, last, decayed mean;
        0 where there was none.
        """
        columns = [self.count > 0, np.log1p(self.count), np.log1p(self.days_since)]
        parts = [*(column[:, None] for column in columns), self.mean, self.last, self.decayed_mean]
        dense = np.concatenate(parts, axis=1, dtype=np.float32)
        return np.where((self.count > 0)[:, None], dense, np.float32(0))

    def jagged(self) -> JaggedTensor:
        """Return the sequences as a JaggedTensor: vectors (N, V), and ages in days as weights."""
        import torch
        from torchrec import JaggedTensor

        vectors, lengths, ages = map(torch.from_numpy, (self.vectors, self.lengths, self.ages_days))
        return JaggedTensor(vectors, lengths=lengths, weights=ages)
