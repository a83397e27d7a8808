"""Teacher memory: what was said, or seen, of a key before an example, as features of the student.

An event is a vector of numbers at a time: a teacher's output or embedding of an earlier example, or
that example's label. A memory keeps the events of each key (a user, an item, a pair of them) as
running aggregates and, if asked, as the sequence of the last ones. **Serving needs it too**:
it is a key-value read for each example (:mod:`torchrec_exfm.das.memory_server`).

B examples, n events, V numbers of an event, L events of a sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from torchrec_exfm.das.arrays import (
    MICROSECONDS,
    AnyArray,
    Floats,
    Ints,
    as_floats,
    as_int,
    as_seconds,
)
from torchrec_exfm.das.choice import check_names, choose_versions
from torchrec_exfm.das.embeddings import decode, encode
from torchrec_exfm.das.memory_format import Columns, MemoryFeatures, MemoryFormat
from torchrec_exfm.das.rules import NO_KEY, BadRows, absent, newest
from torchrec_exfm.das.schema import KEYS
from torchrec_exfm.das.store import TeacherStore

__all__ = ["Memory", "MemoryEvents", "MemoryFeatures", "MemoryFormat", "store_events"]

_RECORDS_AT_ONCE = 2_000  # records that are made, and published, at a time


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
        through_seconds: the latest time that was read; events that it would have seen are refused.
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
        if max_keys is not None and as_int(max_keys) < 1:
            raise ValueError(f"max_keys should be at least 1, or None; received {max_keys!r}")
        self.format = format
        self.through_seconds = 0
        self.published_through: int | None = None
        self._by_key = {name: _KeyMemory(format, max_keys) for name in format.key_names}
        # keys (n, keys), events (n,), values (n, V): the first part is in order of time
        nothing = np.empty((0, len(format.keys)), np.int64), np.empty(0, format.event_dtype)
        self._waiting: list[tuple[AnyArray, ...]] = [
            (*nothing, np.empty((0, format.width), np.float32))
        ]

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
            ValueError: for a wrong shape, for values that are not finite or that the resolution
                can't hold, and for events that examples which were read before should have seen.
        """
        t = as_seconds("seconds", seconds)
        numbers = as_floats("values", values, (len(t), self.format.width))
        if bad := np.count_nonzero(~np.isfinite(numbers)):
            raise ValueError(
                f"values should be finite; received {bad} that are not: leave out the events of "
                "examples without an output or a label"
            )
        events = np.empty(len(t), self.format.event_dtype)
        events["seconds"], events["vector"] = t, encode(numbers, self.format.resolution)
        keys = self.format.key_values(columns, len(t))
        if len(t) and t.min() + self.format.delay_seconds < self.through_seconds:
            raise ValueError(
                f"events should be written before later examples are read; received one of "
                f"{t.min()} (delay {self.format.delay_seconds}) after an example of "
                f"{self.through_seconds}: write a batch's events before it is read, or set a delay"
            )
        self._waiting.append((np.stack([*keys.values()], 1), events, numbers.copy()))

    def read(self, columns: Columns, seconds: Any) -> dict[str, MemoryFeatures]:
        """Return the features of B examples by key, in the order of the examples.

        Args:
            columns: of the keys, by name, each whole numbers (B,).
            seconds: (B,) times, in any order, none before one of an earlier call.

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape; for examples out of order.
        """
        t = as_seconds("seconds", seconds)
        keys = self.format.key_values(columns, len(t))
        if len(t) and t.min() < self.through_seconds:
            raise ValueError(
                f"examples should be read in order of time; received one of {t.min()} after one "
                f"of {self.through_seconds}: sort the stream, or take a table of memory_sql"
            )
        event_keys, events, values = self._take_ready(int(t.max(initial=self.through_seconds)))
        return {
            name: memory.read(column, events, values, keys[name], t)
            for (name, memory), column in zip(self._by_key.items(), event_keys.T, strict=True)
        }

    def records(
        self, before_seconds: int, *, unchanged: bool = False
    ) -> Iterator[tuple[str, Ints, list[bytes]]]:
        """Yield what each value of a key is known by at a time: the key's name, values, records.

        Those alone that have changed since they were last yielded, or all; some thousands at a
        time. Those after which nothing more was asked for count as changed still.
        """
        none = np.full(1, NO_KEY)
        columns = dict.fromkeys((column for key in self.format.keys for column in key), none)
        self.read(columns, [max(before_seconds, self.through_seconds)])
        for name, memory in self._by_key.items():
            for values, records in memory.changed(unchanged):
                yield name, values, records

    def _take_ready(self, through: int) -> tuple[AnyArray, ...]:
        """Take the events out that examples of a time see, and note the time."""
        self.through_seconds = through
        if len(self._waiting) > 1:
            merged = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
            order = np.argsort(merged[1]["seconds"], kind="stable")
            self._waiting = [tuple(part[order] for part in merged)]
        (waiting,) = self._waiting
        ready = np.searchsorted(waiting[1]["seconds"], through - self.format.delay_seconds)
        self._waiting = [tuple(part[ready:] for part in waiting)]
        return tuple(part[:ready] for part in waiting)


class _KeyMemory:
    """One key's memory: for each of its values a state, and a ring of its last L events."""

    def __init__(self, format: MemoryFormat, max_keys: int | None) -> None:
        self.format, self.max_keys, self.forgotten = format, max_keys, 0
        self.slots: dict[int, int] = {}
        # the row after the last slot's is of zeros, and stands for values without events
        self.states = np.zeros((1, format.state_width))
        self.rings = np.zeros((1, format.length), format.event_dtype)  # the i-th is at i % L
        self.is_changed = np.zeros(1, np.bool_)

    def read(
        self, event_keys: Ints, events: AnyArray, values: Floats, keys: Ints, seconds: Ints
    ) -> MemoryFeatures:
        """Add events, and return the features of examples, each as of its own time."""
        has_key = event_keys != NO_KEY
        n, all_keys = np.count_nonzero(has_key), np.concatenate([event_keys[has_key], keys])
        # in one instant examples come first: an event counts for later ones alone
        known = events["seconds"][has_key] + self.format.delay_seconds
        instants = [2 * known + 1, 2 * seconds]
        order = np.lexsort((np.concatenate(instants), all_keys))
        is_event = order < n
        starts = np.diff(all_keys[order], prepend=~all_keys[order[:1]]) != 0
        group = np.cumsum(starts) - 1
        event_group, example_group = group[is_event], group[~is_event]
        sizes = np.bincount(event_group, minlength=np.count_nonzero(starts))
        slots = self._find_slots(all_keys[order[starts]], sizes > 0)
        first = np.cumsum(sizes) - sizes  # event of each group
        place = np.arange(n) - first[event_group]
        before, sources = self.states[slots], np.flatnonzero(has_key)[order[is_event]]
        events, values = events[sources], values[sources]
        states = self._accumulate(before[event_group], place, events["seconds"], values)

        targets = order[~is_event] - n
        last, example_groups = np.empty((2, len(keys)), np.int64)
        last[targets], example_groups[targets] = np.cumsum(is_event)[~is_event] - 1, example_group
        num_new = last + 1 - first[example_groups]  # events of the key up to the last one before
        rows = np.where(num_new > 0, len(before) + last, example_groups)
        example_states = np.concatenate([before, states]).take(rows, axis=0)
        sequences = self._sequences(slots[example_groups], events, last, num_new)
        features = self.format.features(example_states, *sequences, seconds)

        kept = place >= sizes[event_group] - self.format.length
        number = (before[event_group[kept], 1].astype(np.int64) + place[kept]) % self.format.length
        self.rings[slots[event_group[kept]], number] = events[kept]
        ends = (first + sizes - 1)[sizes > 0]
        self.states[slots[sizes > 0]] = states[ends]
        self.is_changed[slots[sizes > 0]] = True
        self._forget()
        return features

    def changed(self, unchanged: bool) -> Iterator[tuple[Ints, list[bytes]]]:
        """Yield the values with new events, or all, and their records."""
        keys = np.fromiter(self.slots, np.int64, len(self.slots))
        changed = np.flatnonzero(self.is_changed[: len(keys)] | unchanged)
        self.is_changed[changed] = True
        for begin in range(0, len(changed), _RECORDS_AT_ONCE):
            slots = changed[begin : begin + _RECORDS_AT_ONCE]
            none = np.zeros(len(slots), np.int64)
            events, lengths = self._sequences(slots, np.empty(0, self.rings.dtype), none, none)
            parts = np.split(events, np.cumsum(lengths)[:-1])
            pairs = zip(self.states[slots], parts, strict=True)
            yield keys[slots], [state.tobytes() + part.tobytes() for state, part in pairs]
            self.is_changed[slots] = False

    def _find_slots(self, distinct: Ints, has_events: AnyArray) -> Ints:
        """Return the rows of values, with new ones for those that have events."""
        looked_up = map(self.slots.get, distinct.tolist(), repeat(-1))
        slots = np.fromiter(looked_up, np.int64, len(distinct))
        new = np.flatnonzero((slots < 0) & has_events)
        slots[new] = np.arange(len(self.slots), len(self.slots) + len(new))
        self.slots.update(zip(distinct[new].tolist(), slots[new].tolist(), strict=True))
        slots[slots < 0] = len(self.slots)
        self._keep_rows(slice(None))
        return slots

    def _accumulate(
        self, before: AnyArray, place: Ints, seconds: Ints, vectors: Floats
    ) -> AnyArray:
        """Return the state after each event, from that before the first of its group.

        Added up by doubling distances, which never subtracts, as differences of running sums would.
        """
        width, half_life = self.format.width, self.format.half_life_seconds
        states = np.empty((len(place), self.format.state_width))
        parts = seconds[:, None], before[:, 1:2] + place[:, None] + 1, vectors, 1, vectors, vectors
        for column, part in zip(self.format.split(states), parts, strict=True):
            column[:] = part

        def add(rows: Any, earlier: AnyArray) -> None:
            decay = np.exp2((earlier[:, 0] - seconds[rows]) / half_life)
            earlier[:, 2 + width : 3 + 2 * width] *= decay[:, None]
            states[rows, 2 + width :] += earlier[:, 2 + width :]

        distance, rows = 1, np.flatnonzero(place)
        while len(rows):
            add(rows, states.take(rows - distance, axis=0))
            distance *= 2
            rows = rows[place[rows] >= distance]
        add(slice(None), before)
        return states

    def _sequences(
        self, slots: Ints, events: AnyArray, last: Ints, num_new: Ints
    ) -> tuple[AnyArray, Ints]:
        """Return the last L events of rows, the last first, and how many, (B,).

        The first ``num_new`` of each are those of ``events`` from ``last`` back.
        """
        back = np.arange(self.format.length)
        is_new = back < num_new[:, None]
        number = self.states[slots, 1].astype(np.int64)[:, None] - 1 - back + num_new[:, None]
        sequences = self.rings[slots[:, None], number % max(self.format.length, 1)]
        sequences[is_new] = events[(last[:, None] - back)[is_new]]
        exists = is_new | (number >= 0)
        return sequences[exists], exists.sum(1)

    def _forget(self) -> None:
        """Forget the values whose last events are the oldest, beyond ``max_keys``."""
        size = len(self.slots)
        if self.max_keys is None or size <= self.max_keys:
            return
        newest_first = np.argsort(-self.states[:size, 0], kind="stable")
        kept = np.sort(newest_first[: max(1, 3 * self.max_keys // 4)])
        keys = np.fromiter(self.slots, np.int64, size)[kept]
        self.slots = dict(zip(keys.tolist(), range(len(kept)), strict=True))
        self.forgotten += size - len(kept)
        self._keep_rows(kept)

    def _keep_rows(self, rows: Any) -> None:
        """Keep some rows, and have room for one more than there are slots."""
        for name in ("states", "rings", "is_changed"):
            setattr(self, name, _grow(getattr(self, name)[rows], len(self.slots) + 1))


def _grow(array: AnyArray, size: int) -> AnyArray:
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
        ValueError: for a wrong value; at the end, if no row has a key.
        StoreError: as :meth:`TeacherStore.read`.
    """
    pinned, excluded = choose_versions("the memory", [teacher], snapshot, exclude)
    check_names("teachers", [teacher], store.teachers() or [teacher])
    tasks, num_rows, have_keys = [store.tasks[0] if task is None else task], 0, False
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
            presence: Any = np.isfinite(values).all(axis=1)
        else:
            values, presence = rows.outputs, ~absent(rows.outputs)[:, 0]
        seconds = np.maximum(rows.event_time, rows.trained_through) // MICROSECONDS
        order = np.lexsort((rows.example_id, seconds))
        order = order[presence[order]]
        num_rows, have_keys = num_rows + len(rows), have_keys or bool(np.any(rows.keys != NO_KEY))
        columns = {name: rows.keys[order, number] for number, name in enumerate(keys)}
        yield MemoryEvents(columns, seconds[order], values[order])
    if num_rows and not have_keys:
        raise ValueError(
            f"{store.url}: rows of {teacher} should have some of the keys {tuple(keys)}; received "
            f"{num_rows} that have none: write them with keys=..."
        )
