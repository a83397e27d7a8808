"""Teacher memory: what was said, or seen, of a key before an example, as features of the student.

An event is a vector of numbers at a time: a teacher's output or embedding of an earlier example, or
that example's label. A memory keeps the events of each key (a user, an item, a pair of them) as
running aggregates and, if asked, as the sequence of the last ones. **Serving needs it too**:
it is a key-value read for each example (:mod:`torchrec_exfm.das.memory_server`).

B examples, n events, V numbers of an event, L events of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from torchrec_exfm.das.arrays import (
    MICROSECONDS,
    AnyArray,
    Floats,
    Ints,
    as_epoch,
    as_floats,
    as_int64,
    check_duration,
)
from torchrec_exfm.das.choice import chosen_versions
from torchrec_exfm.das.embeddings import decode, embedding_bytes, encode
from torchrec_exfm.das.errors import StoreError
from torchrec_exfm.das.ids import hash_ids
from torchrec_exfm.das.rules import NO_KEY, BadRows, absent, newest
from torchrec_exfm.das.schema import KEYS, check_name
from torchrec_exfm.das.store import TeacherStore

if TYPE_CHECKING:
    from torchrec import JaggedTensor

__all__ = ["Memory", "MemoryEvents", "MemoryFeatures", "MemoryFormat", "store_events"]

DAY_SECONDS = 86_400
_PART = 2_000  # records that are made, and published, at a time
Columns: TypeAlias = Mapping[str, Any]


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
    resolution: Literal["float32", "float16", "int8", "int4"] = "float32"

    def __post_init__(self) -> None:
        check_name("a memory", self.name)
        if isinstance(self.keys, str) or any(isinstance(key, str) for key in self.keys):
            raise ValueError(
                f'keys should be as [["user_id"], ["user_id", "item_id"]]; received {self.keys!r}'
            )
        keys = tuple(tuple(key) for key in self.keys)
        object.__setattr__(self, "keys", keys)
        if not keys or len({*keys}) < len(keys) or not all(keys):
            raise ValueError(f"keys should be some, none twice or empty; received {keys}")
        for column in {column for key in keys for column in key}:
            check_name("a column of a key", column)
        for name, least in (("width", 1), ("length", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} should be a whole number from {least}; received {value!r}"
                )
        for name in ("half_life_seconds", "delay_seconds"):
            check_duration(name, getattr(self, name))
        if not self.half_life_seconds:
            raise ValueError("half_life_seconds should be more than 0; received 0")
        object.__setattr__(self, "delay_seconds", int(self.delay_seconds))
        if self.resolution not in (known := ("float32", "float16", "int8", "int4")):
            raise ValueError(f"resolution should be one of {known}; received {self.resolution!r}")

    @property
    def key_names(self) -> tuple[str, ...]:
        """A name for each key: its columns' joined by ``_``."""
        return tuple("_".join(key) for key in self.keys)

    def key_values(self, columns: Columns, rows: int | None = None) -> dict[str, Ints]:
        """Return each key's values (B,): a column's own, or the hash of several (`hash_ids`)."""
        needed = {column for key in self.keys for column in key}
        if missing := sorted(needed - {*columns}):
            raise ValueError(
                f"the columns of the keys should be {sorted(needed)}; received {sorted(columns)}, "
                f"without {missing}"
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
        t = as_epoch("seconds", seconds, len(records))
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
                f"a record of the memory {self.name} should have {head} bytes, and {size} for each "
                f"of its last {self.length} events; received {received[row]} bytes, of "
                f"{states[row, 1]:g} events, for row {row} (the first of {len(damaged)}): drop this "
                "version of the memory, and publish it again"
            )
        events = np.frombuffer(bytearray().join([part[head:] for part in parts]), self.event_dtype)
        return self.features(states, events, lengths.astype(np.int64), t)

    def features(
        self, states: AnyArray, events: AnyArray, lengths: Ints, seconds: Ints
    ) -> MemoryFeatures:
        """Return the features of B states and of their events, the last first, row by row."""
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

    def to_json(self) -> str:
        """Return it as text, which says what a student that is served needs."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> MemoryFormat:
        """Return what :meth:`to_json` told."""
        return cls(**json.loads(text))


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


class MemoryEvents(NamedTuple):
    """Events: the columns of their keys (n,), times in epoch seconds (n,), vectors (n, V)."""

    columns: dict[str, Ints]
    seconds: Ints
    values: Floats


class Memory:
    """A memory beside one pass over the data in time order.

    An example gets what was written of events strictly before its time less the delay: never its
    own, nor one of the same second. The state is linear in the number of keys (and in L), however
    many events there are. It is equal to a table made by :func:`memory_sql` up to rounding.

    Args:
        format: what is kept.
        max_keys: of each of the format's keys so many values are kept; beyond, the quarter whose
            last events are the oldest is forgotten, and counted. None: all.

    Attributes:
        forgotten: how many values of keys were, by the key's name.
        published_through: the time of the last :func:`~memory_server.publish_memory`, or None.

    Example:
        >>> memory = Memory(MemoryFormat(name="fm", keys=[["user_id"]]))
        >>> batch = {"user_id": [7, 8, 7]}
        >>> memory.write(batch, [100, 100, 160], [0.5, -2.0, 1.5])
        >>> features = memory.read(batch, [100, 100, 160])["user_id"]
        >>> features.count.tolist(), features.mean[:, 0].tolist()
        ([0, 0, 1], [nan, nan, 0.5])
    """

    def __init__(self, format: MemoryFormat, *, max_keys: int | None = None) -> None:
        if max_keys is not None and max_keys < 1:
            raise ValueError(f"max_keys should be at least 1, or None; received {max_keys}")
        self.format = format
        self.published_through: int | None = None
        self._by_key = {name: _KeyMemory(format, max_keys) for name in format.key_names}
        self._waiting: list[tuple[dict[str, Ints], Ints, Floats]] = []
        self._through = 0  # the latest time that was read

    @property
    def forgotten(self) -> dict[str, int]:
        """How many values of each key were."""
        return {name: memory.forgotten for name, memory in self._by_key.items()}

    def write(self, columns: Columns, seconds: Any, values: Any) -> None:
        """Take events; those of one second count in the order in which they come.

        Args:
            columns: of the keys, by name, each whole numbers (n,); NO_KEY is no key.
            seconds: (n,) times, epoch seconds or timestamps.
            values: (n, V), or (n,) for one number, finite floating-point numbers.

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape, for what is not finite, and for events that should have
                been features of examples that were read before.
        """
        t = as_epoch("seconds", seconds)
        numbers = as_floats("values", values, (len(t), self.format.width))
        if not np.isfinite(numbers).all():
            raise ValueError(
                f"values should be finite; received {np.count_nonzero(~np.isfinite(numbers))} that "
                "are not: leave out the events of examples without an output or a label"
            )
        keys = self.format.key_values(columns, len(t))
        if len(t) and t.min() + self.format.delay_seconds < self._through:
            raise ValueError(
                f"events should be written before later examples are read; received one of "
                f"{t.min()} (delay {self.format.delay_seconds}) after an example of "
                f"{self._through}: write the events of a batch before it is read, or set a delay"
            )
        self._waiting.append((keys, t, numbers))

    def read(self, columns: Columns, seconds: Any) -> dict[str, MemoryFeatures]:
        """Return the features of B examples by key, in the order of the examples.

        Args:
            columns: of the keys, by name, each whole numbers (B,).
            seconds: (B,) times, in any order, none before one of an earlier call.

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape; for examples out of order.
        """
        t = as_epoch("seconds", seconds)
        keys = self.format.key_values(columns, len(t))
        if len(t) and t.min() < self._through:
            raise ValueError(
                f"examples should be read in order of time; received one of {t.min()} after one "
                f"of {self._through}: sort the stream, or take a table of memory_sql"
            )
        known = self._take(int(t.max(initial=self._through)))
        return {
            name: memory.read(known[0][name], *known[1:], keys[name], t)
            for name, memory in self._by_key.items()
        }

    @property
    def through_seconds(self) -> int:
        """The latest time that was read; nothing is written of before it any more."""
        return self._through

    def records(
        self, before_seconds: int, *, unchanged: bool = False
    ) -> Iterator[tuple[str, Ints, list[bytes]]]:
        """Yield what each value of a key is known by at a time: the key's name, values, records.

        Those alone that have changed since they were last yielded, or all; some thousands at a
        time. Those after which nothing more was asked for count as changed still.
        """
        nothing = np.empty(0, np.int64)
        known = self._take(max(before_seconds, self._through))
        for name, memory in self._by_key.items():
            memory.read(known[0][name], *known[1:], nothing, nothing)
        for name, memory in self._by_key.items():
            for values, records in memory.changed(unchanged):
                yield name, values, records

    def _take(self, through: int) -> tuple[dict[str, Ints], Ints, Floats]:
        """Take the events out that examples of a time see, and note the time."""
        self._through = through
        parts = self._waiting or [
            (
                dict.fromkeys(self.format.key_names, np.empty(0, np.int64)),
                np.empty(0, np.int64),
                np.empty((0, self.format.width), np.float32),
            )
        ]
        keys = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
        seconds, values = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        ready = seconds + self.format.delay_seconds < through
        split = []
        for chosen in (ready, ~ready):
            columns = {name: column[chosen] for name, column in keys.items()}
            split.append((columns, seconds[chosen], values[chosen]))
        self._waiting = [split[1]] if len(split[1][1]) else []
        return split[0]


class _KeyMemory:
    """One key's: a state for each of its values, and a list of events linked from the last back."""

    def __init__(self, format: MemoryFormat, max_keys: int | None) -> None:
        self.format, self.max_keys, self.forgotten = format, max_keys, 0
        self.slots: dict[int, int] = {}
        self.states = np.zeros((0, format.state_width))
        self.heads = np.zeros(0, np.int64)  # of each slot its last event's place, or -1
        self.is_changed = np.zeros(0, np.bool_)
        self.events = np.zeros(0, format.event_dtype)
        self.previous = np.zeros(0, np.int64)  # of each event the place of the one before, or -1
        self.used = 0  # places

    def read(
        self, event_keys: Ints, event_seconds: Ints, values: Floats, keys: Ints, seconds: Ints
    ) -> MemoryFeatures:
        """Add events, and return the features of examples, each as of its own time."""
        has_key = event_keys != NO_KEY
        if not has_key.all():
            event_keys, event_seconds = event_keys[has_key], event_seconds[has_key]
            values = values[has_key]
        n = len(event_keys)
        # of one instant the examples come first: an event is one of later examples alone
        instants = [2 * (event_seconds + self.format.delay_seconds) + 1, 2 * seconds]
        all_keys = np.concatenate([event_keys, keys])
        order = np.lexsort((np.concatenate(instants), all_keys))
        is_event = order < n
        starts = np.diff(all_keys[order], prepend=~all_keys[order[:1]]) != 0
        group = np.cumsum(starts) - 1
        distinct = all_keys[order[starts]]
        event_order, event_group = order[is_event], group[is_event]
        slots = self._slots_of(distinct, np.bincount(event_group, minlength=len(distinct)) > 0)
        initial = np.zeros((len(slots), self.format.state_width))
        heads = np.full(len(slots), -1)
        initial[slots >= 0] = self.states[slots[slots >= 0]]
        heads[slots >= 0] = self.heads[slots[slots >= 0]]
        seconds_in_order, values_in_order = event_seconds[event_order], values[event_order]
        states = self._accumulate(initial, event_group, seconds_in_order, values_in_order)
        places = self._append(heads, event_group, seconds_in_order, values_in_order)

        before = np.cumsum(is_event)[~is_event] - 1  # the last event in this order
        example_group = group[~is_event]
        is_new = before >= 0
        is_new[is_new] = event_group[before[is_new]] == example_group[is_new]
        source = np.where(is_new, len(slots) + before, example_group)
        inverse = np.empty(len(keys), np.int64)
        inverse[order[~is_event] - n] = source
        example_states = np.concatenate([initial, states]).take(inverse, axis=0)
        events, lengths = self._sequences(np.concatenate([heads, places])[inverse])
        features = self.format.features(example_states, events, lengths, seconds)

        last = np.flatnonzero(np.diff(event_group, append=-1))
        changed = slots[event_group[last]]
        self.states[changed], self.heads[changed] = states[last], places[last]
        self.is_changed[changed] = True
        self._shrink()
        return features

    def changed(self, unchanged: bool) -> Iterator[tuple[Ints, list[bytes]]]:
        """Yield the values with new events, or all, and their records."""
        keys = np.fromiter(self.slots, np.int64, len(self.slots))
        changed = np.flatnonzero(self.is_changed[: len(keys)] | unchanged)
        self.is_changed[changed] = True
        for first in range(0, len(changed), _PART):
            slots = changed[first : first + _PART]
            events, lengths = self._sequences(self.heads[slots])
            parts = np.split(events, np.cumsum(lengths)[:-1])
            states = self.states[slots]
            yield (
                keys[slots],
                [states[row].tobytes() + part.tobytes() for row, part in enumerate(parts)],
            )
            self.is_changed[slots] = False

    def _slots_of(self, distinct: Ints, has_events: AnyArray) -> Ints:
        """Return the slots of values, making those of new ones with events; -1 for others."""
        looked_up = map(self.slots.get, distinct.tolist(), repeat(-1))
        slots = np.fromiter(looked_up, np.int64, len(distinct))
        new = np.flatnonzero((slots < 0) & has_events)
        slots[new] = np.arange(len(self.slots), len(self.slots) + len(new))
        self.slots.update(zip(distinct[new].tolist(), slots[new].tolist(), strict=True))
        size = len(self.slots)
        self.states, self.is_changed = _room(self.states, size), _room(self.is_changed, size)
        self.heads = _room(self.heads, size)
        self.heads[slots[new]] = -1
        return slots

    def _accumulate(
        self, initial: AnyArray, group: Ints, seconds: Ints, values: Floats
    ) -> AnyArray:
        """Return the state after each event: of its key's events so far.

        Added up by doubling distances, which never subtracts, as differences of running sums would.
        """
        start = initial[group]
        place = np.arange(len(group)) - np.searchsorted(group, group)  # among its key's
        states = np.empty((len(group), self.format.state_width))
        last_seconds, count, last, weight, decayed, sums = self.format.split(states)
        last_seconds[:, 0], last[:], weight[:], decayed[:], sums[:] = (
            seconds,
            values,
            1,
            values,
            values,
        )
        count[:] = start[:, 1:2] + place[:, None] + 1
        totals, num_decayed = states[:, 2 + self.format.width :], 1 + self.format.width
        before = start[:, 2 + self.format.width :]

        def decay(rows: Any, earlier_seconds: AnyArray, earlier: AnyArray) -> AnyArray:
            exponents = (earlier_seconds - seconds[rows]) / self.format.half_life_seconds
            earlier[:, :num_decayed] *= np.exp2(exponents)[:, None]
            return earlier

        distance, rows = 1, np.flatnonzero(place)
        while len(rows):
            totals[rows] += decay(
                rows, seconds[rows - distance], totals.take(rows - distance, axis=0)
            )
            distance *= 2
            rows = rows[place[rows] >= distance]
        totals += decay(slice(None), start[:, 0], before)
        return states

    def _append(self, heads: Ints, group: Ints, seconds: Ints, values: Floats) -> Ints:
        """Put events into the list, and return their places; -1 without sequences."""
        if not self.format.length:
            return np.full(len(group), -1)
        places = np.arange(self.used, self.used + len(group))
        self.used += len(group)
        self.events = _room(self.events, self.used)
        self.previous = _room(self.previous, self.used)
        self.events["seconds"][places] = seconds
        self.events["vector"][places] = encode(values, self.format.resolution)
        is_first = np.diff(group, prepend=-1) != 0
        self.previous[places] = np.where(is_first, heads[group], places - 1)
        return places

    def _sequences(self, last: Ints) -> tuple[AnyArray, Ints]:
        """Return the events from the last (B,) places back, at most L each, and how many."""
        places = np.full((len(last), self.format.length), -1)
        for column in places.T:
            column[:] = last
            last = np.where(last >= 0, self.previous[last], -1) if len(self.previous) else last
        return self.events[places[places >= 0]], (places >= 0).sum(1)

    def _shrink(self) -> None:
        """Forget values beyond ``max_keys``, and events that no sequence reaches."""
        size = len(self.slots)
        if self.max_keys is not None and size > self.max_keys:
            kept = np.sort(
                np.argsort(-self.states[:size, 0], kind="stable")[: max(1, 3 * self.max_keys // 4)]
            )
            keys = np.fromiter(self.slots, np.int64, size)[kept]
            self.slots = dict(zip(keys.tolist(), range(len(kept)), strict=True))
            self.forgotten += size - len(kept)
            self.states, self.heads = self.states[kept], self.heads[kept]
            self.is_changed = self.is_changed[kept]
            size = len(kept)
        if self.used > 2 * self.format.length * size + 2**16:
            reached = np.zeros(self.used, np.bool_)
            last = self.heads[:size]
            for _ in range(self.format.length):
                last = last[last >= 0]
                reached[last] = True
                last = self.previous[last]
            moved = np.append(np.where(reached, np.cumsum(reached) - 1, -1), -1)  # of -1: -1
            self.heads[:size] = moved[self.heads[:size]]
            self.previous = moved[self.previous[: self.used][reached]]
            self.events = self.events[: self.used][reached]
            self.used = len(self.events)


def _room(array: AnyArray, size: int) -> AnyArray:
    """Return the array with room for so many rows, at least doubled where it grows."""
    if size <= len(array):
        return array
    more = max(size, 2 * len(array)) - len(array)
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])


def store_events(
    store: TeacherStore,
    teacher: str,
    *,
    keys: Sequence[str] = KEYS,
    task: str | None = None,
    embeddings: bool = False,
    snapshot: int | None = None,
    exclude: Collection[int] = (),
    bad_rows: BadRows = "refuse",
) -> Iterator[MemoryEvents]:
    """Yield what a store holds of a teacher, window by window in order of time, as events.

    The time of an event is that of its example, or, if that is later, the time that the snapshot
    was trained through: no feature knows what came after its example.

    Args:
        store: as of the commit that it is at.
        teacher: its name.
        keys: columns of the store that are wanted.
        task: whose outputs the values are, (n, 1); None: the first.
        embeddings: the values are the embeddings, (n, E); events without one are left out.
        snapshot: pins a version; None: of each example the newest counts.
        exclude: versions that are passed over.
        bad_rows: as for :meth:`TeacherStore.read`.

    Raises:
        ValueError: for a wrong value; for a window without any key.
        StoreError: as :meth:`TeacherStore.read`.
    """
    pinned, excluded = chosen_versions("the memory", [teacher], snapshot, exclude)
    tasks = [store.tasks[0] if task is None else task]
    for window in store.windows(teacher):
        rows, _ = store.read(
            teacher, window, tasks=tasks, bad_rows=bad_rows, embeddings=embeddings, keys=keys
        )
        chosen = ~np.isin(rows.snapshot, excluded[teacher])
        if pinned[teacher] is not None:
            chosen &= rows.snapshot == pinned[teacher]
        rows = newest(rows[chosen])
        if embeddings:
            resolution, width = store.format.embedding_resolution, store.format.embedding_width
            values = decode(rows.embedding, resolution, width)
            is_there = np.isfinite(values).all(axis=1)
        else:
            values, is_there = rows.outputs, ~absent(rows.outputs)[:, 0]
        seconds = np.maximum(rows.event_time, rows.trained_through) // MICROSECONDS
        order = np.lexsort((rows.example_id, seconds))
        order = order[is_there[order]]
        if len(order) and (rows.keys == NO_KEY).all():
            raise ValueError(
                f"{store.url}: rows of {teacher} should have some of the keys {tuple(keys)}; those "
                f"of window {window} have none: write them with keys=..."
            )
        columns = {name: rows.keys[order, number] for number, name in enumerate(keys)}
        yield MemoryEvents(columns, seconds[order], values[order])
