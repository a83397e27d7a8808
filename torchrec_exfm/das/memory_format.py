"""Format of a memory: the state and sequence that it keeps of a key, and the features they give.

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
Columns: TypeAlias = Any  # a mapping, DataFrame or Arrow table of columns (n,) by name
Resolution: TypeAlias = Literal["float32", "float16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class MemoryFormat:
    """Settings of a memory, the same in a table, in training and in serving.

    Args:
        name: first part of the features' names, such as ``"fm"`` or ``"label"``.
        keys: a list of keys, each a list of one or more columns, such as ``[["user_id"],
            ["user_id", "item_id"]]``.
        width: V, numbers of an event.
        length: L, events of a sequence; 0: keep aggregates only.
        half_life_seconds: the age at which an event weighs half as much in the decayed mean.
        delay_seconds: D; examples of times t > s + D see an event of time s.
        resolution: precision of the vectors in sequences; ``"int8"`` and ``"int4"`` keep a scale
            with each vector.

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
        received = self.keys
        keys = tuple((key,) if isinstance(key, str) else tuple(key) for key in received)
        object.__setattr__(self, "keys", keys)
        for name in (self.name, *(column for key in keys for column in key)):
            check_name("a memory, and a column of its keys,", name)
        if isinstance(received, str) or not all(keys) or len({*self.key_names}) < len(keys or "1"):
            raise ValueError(
                "keys should be a list of keys, each a list of columns, whose names joined by '_' "
                f"differ; received {received!r}"
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
        if self.resolution not in (names := get_args(Resolution)):
            raise ValueError(f"resolution should be one of {names}; received {self.resolution!r}")

    @property
    def key_names(self) -> tuple[str, ...]:
        """Names of the keys: their columns joined by ``_``."""
        return tuple("_".join(key) for key in self.keys)

    def key_values(self, columns: Columns, rows: int | None = None) -> dict[str, Ints]:
        """Return each key's values (B,): those of its column, or a hash of several (`hash_ids`)."""
        needed = {column for key in self.keys for column in key}
        names = column_names(columns) or []
        if not needed <= {*names}:
            raise ValueError(
                f"the columns of the keys should be {sorted(needed)}; received {names}"
            )
        arrays = {name: as_int64(name, columns[name], rows) for name in needed}
        values = {}
        for name, key in zip(self.key_names, self.keys, strict=True):
            parts = [arrays[column] for column in key]
            ids = parts[0] if len(parts) == 1 else hash_ids(*parts)
            has_none = np.any([part == NO_KEY for part in parts], axis=0)  # of any of its columns
            values[name] = np.where(has_none, NO_KEY, ids)
        return values

    @cached_property
    def event_dtype(self) -> np.dtype[Any]:
        """Dtype of an event in a sequence: its time, and its vector as encoded bytes."""
        size = embedding_bytes(self.width, self.resolution)
        return np.dtype([("seconds", "<i8"), ("vector", "u1", (size,))])

    @property
    def state_width(self) -> int:
        """Numbers of a state, float64: seconds, count, last (V), weight, decayed (V), sums (V)."""
        return 3 + 3 * self.width

    def unpack(self, records: Sequence[bytes | None], seconds: Any) -> MemoryFeatures:
        """Return the features of B records of :meth:`Memory.records`; None: a key without events.

        Raises:
            StoreError: for a record of a wrong length.
        """
        t = as_seconds("seconds", seconds, len(records))
        head, size = 8 * self.state_width, self.event_dtype.itemsize
        empty = bytes(head)
        parts = [empty if record is None else record for record in records]
        # A bytearray, since an array of bytes would be read-only. A short record is padded, so that
        # it is refused below with its row.
        heads = bytearray().join([part[:head].ljust(head, b"\0") for part in parts])
        states = np.frombuffer(heads, "<f8").reshape(-1, self.state_width)
        lengths = np.clip(states[:, 1], 0, self.length)  # column 1 is the count
        sizes = np.array([len(part) for part in parts])
        if len(damaged := np.flatnonzero(sizes != head + size * lengths)):
            row = damaged[0]
            raise StoreError(
                f"records of the memory {self.name} should have {head} bytes, and {size} for each "
                f"of the last {self.length} events; received {sizes[row]} bytes of "
                f"{states[row, 1]:g} events in row {row}, the first of {len(damaged)}: drop this "
                "version of the memory, and publish it again"
            )
        events = np.frombuffer(bytearray().join([part[head:] for part in parts]), self.event_dtype)
        return self.features(states, events, lengths.astype(np.int64), t)

    def features(
        self, states: AnyArray, events: AnyArray, lengths: Ints, seconds: Ints
    ) -> MemoryFeatures:
        """Return the features of B states and their sequences, at times ``seconds`` (B,).

        ``events`` holds one sequence after another, each newest first, of ``lengths`` (B,).
        """
        last_seconds, count, last, weight, decayed, sums = self.split(states)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as it should be, without events
            mean, decayed_mean = sums / count, decayed / weight
        is_empty = count == 0
        days = np.where(is_empty, np.nan, (seconds[:, None] - last_seconds) / DAY_SECONDS)
        ages = (np.repeat(seconds, lengths) - events["seconds"]) / DAY_SECONDS
        return MemoryFeatures(
            count=count[:, 0].astype(np.int64),
            mean=mean.astype(np.float32),
            last=np.where(is_empty, np.nan, last).astype(np.float32),
            decayed_mean=decayed_mean.astype(np.float32),
            days_since=days[:, 0].astype(np.float32),
            lengths=lengths.astype(np.int32),
            vectors=decode(events["vector"], self.resolution, self.width),
            ages_days=ages.astype(np.float32),
        )

    def split(self, states: AnyArray) -> list[AnyArray]:
        """Return views of the parts of states (n, 3 + 3 V), in the order of ``state_width``."""
        return np.split(states, np.cumsum([1, 1, self.width, 1, self.width]), axis=1)

    def dense(self, features: Mapping[str, MemoryFeatures]) -> Floats:
        """Return all keys' :meth:`MemoryFeatures.dense` side by side, (B, keys * (3 + 3 V))."""
        return np.concatenate([features[name].dense() for name in self.key_names], axis=1)


@dataclass(frozen=True, eq=False)
class MemoryFeatures:
    """A memory's features of one key of B examples; without events they are NaN, with count 0.

    Attributes:
        count: int64 (B,), number of events.
        mean, last: float32 (B, V), mean of all events' vectors, and the last event's vector.
        decayed_mean: float32 (B, V), sum_i w_i v_i / sum_i w_i with w_i = 2^(-age_i / half-life).
        days_since: float32 (B,), age of the last event in days.
        lengths: int32 (B,), lengths of the sequences, at most L.
        vectors: float32 (N, V), the examples' sequences one after another, each newest first; N is
            the sum of lengths.
        ages_days: float32 (N,), the events' ages in days.
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

        They are whether there was an event, log(1 + count), log(1 + days since), mean, last and
        decayed mean. All are 0 without an event.
        """
        columns = [self.count > 0, np.log1p(self.count), np.log1p(self.days_since)]
        parts = [*(column[:, None] for column in columns), self.mean, self.last, self.decayed_mean]
        dense = np.concatenate(parts, axis=1, dtype=np.float32)
        return np.where((self.count > 0)[:, None], dense, np.float32(0))

    def jagged(self) -> JaggedTensor:
        """Return the sequences as a JaggedTensor: vectors (N, V), and ages in days as weights."""
        # Imported here, as nothing else in a memory needs them.
        import torch
        from torchrec import JaggedTensor

        vectors, lengths, ages = map(torch.from_numpy, (self.vectors, self.lengths, self.ages_days))
        return JaggedTensor(vectors, lengths=lengths, weights=ages)
