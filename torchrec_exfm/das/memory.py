"""Teacher memory: earlier teacher outputs or labels of a key, as features of the student.

An event is a vector of numbers at a time: a teacher's output or embedding of an earlier example, or
that example's label. A memory keeps the events of each key (a user, an item, a pair of them) as
running aggregates and, optionally, as the sequence of the last ones. **Serving needs it too**, as
one key-value read for each example (:mod:`torchrec_exfm.das.memory_server`).

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

_RECORDS_AT_ONCE = 2_000  # records that are yielded, and published, at a time


class MemoryEvents(NamedTuple):
    """Events: key columns by name (n,), times in epoch seconds (n,) and vectors (n, V)."""

    columns: dict[str, Ints]
    seconds: Ints
    values: Floats


class Memory:
    """A memory that is filled and read in one pass over the data, in time order.

    An example sees the events strictly before its time minus the delay: never its own event, nor
    one of the same second. The size of the state is linear in the number of keys (and in L),
    however many events there are. The features equal those of :func:`memory_sql` up to rounding.

    Args:
        format: keys, aggregates and sequences to keep.
        max_keys: maximum number of values to keep of each key of the format. Beyond it, the quarter
            whose last events are the oldest is forgotten, and counted. None: keep all.

    Attributes:
        forgotten: number of forgotten values, by the key's name.
        through_seconds: the latest time that was read. An event that an example of that time would
            have seen is refused.
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
        # Events that no read has seen yet: keys (n, K), events (n,), values (n, V). The first part
        # is in order of time.
        empty = np.empty((0, len(format.keys)), np.int64), np.empty(0, format.event_dtype)
        self._waiting: list[tuple[AnyArray, ...]] = [
            (*empty, np.empty((0, format.width), np.float32))
        ]

    @property
    def forgotten(self) -> dict[str, int]:
        """Number of forgotten values, by the key's name."""
        return {name: memory.forgotten for name, memory in self._by_key.items()}

    def write(self, columns: Columns, seconds: Any, values: Any) -> None:
        """Add events; events of one second keep the order in which they are written.

        Args:
            columns: key columns by name, each of integers (n,); NO_KEY stands for no key.
            seconds: (n,) times, epoch seconds or timestamps.
            values: (n, V), or (n,) for V = 1, finite floating-point numbers.

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape; for values that are not finite or that the resolution
                can't hold; for events that an example should have seen that was read before.
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
            columns: key columns by name, each of integers (B,).
            seconds: (B,) times, in any order, but none before a time of an earlier call.

        Raises:
            TypeError: for a wrong dtype.
            ValueError: for a wrong shape; for an example before one of an earlier call.
        """
        t = as_seconds("seconds", seconds)
        keys = self.format.key_values(columns, len(t))
        if len(t) and t.min() < self.through_seconds:
            raise ValueError(
                f"examples should be read in order of time; received one of {t.min()} after one "
                f"of {self.through_seconds}: sort the stream, or use a table of memory_sql"
            )
        event_keys, events, values = self._take_ready(int(t.max(initial=self.through_seconds)))
        return {
            name: memory.read(column, events, values, keys[name], t)
            for (name, memory), column in zip(self._by_key.items(), event_keys.T, strict=True)
        }

    def records(
        self, before_seconds: int, *, unchanged: bool = False
    ) -> Iterator[tuple[str, Ints, list[bytes]]]:
        """Yield the records of keys as of a time: the key's name, its values (n,), and n records.

        With ``unchanged`` all records are yielded, else those that have changed since they were
        yielded last, some thousands at a time. A part counts as yielded once the caller asks for
        the next one.
        """
        # An example without a key sees nothing, but adds the events before its time to the state.
        no_key = np.full(1, NO_KEY)
        columns = dict.fromkeys((column for key in self.format.keys for column in key), no_key)
        self.read(columns, [max(before_seconds, self.through_seconds)])
        for name, memory in self._by_key.items():
            for values, records in memory.changed(unchanged):
                yield name, values, records

    def _take_ready(self, through: int) -> tuple[AnyArray, ...]:
        """Remove and return the waiting events that examples of a time see; keep the time."""
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
    """The memory of one key: a state of each of its values, and a ring of its last L events."""

    def __init__(self, format: MemoryFormat, max_keys: int | None) -> None:
        self.format, self.max_keys, self.forgotten = format, max_keys, 0
        self.slots: dict[int, int] = {}
        # One row more than slots, of zeros: for values without events. In float64, since float32
        # does not hold epoch seconds exactly.
        self.states = np.zeros((1, format.state_width))
        self.rings = np.zeros((1, format.length), format.event_dtype)  # event i is at i % L
        self.is_changed = np.zeros(1, np.bool_)

    def read(
        self, event_keys: Ints, events: AnyArray, values: Floats, keys: Ints, seconds: Ints
    ) -> MemoryFeatures:
        """Add events, and return the features of examples, each at its own time.

        Events and examples are sorted together, by key and time, so that each example's state is
        that after the last event before it.
        """
        has_key = event_keys != NO_KEY
        n, all_keys = np.count_nonzero(has_key), np.concatenate([event_keys[has_key], keys])
        # Examples are even, events odd: an example comes before the events of its own second.
        visible_from = events["seconds"][has_key] + self.format.delay_seconds
        instants = [2 * visible_from + 1, 2 * seconds]
        order = np.lexsort((np.concatenate(instants), all_keys))
        is_event = order < n
        # the complement of the first key differs from it, so that it starts a group
        starts = np.diff(all_keys[order], prepend=~all_keys[order[:1]]) != 0
        group = np.cumsum(starts) - 1
        event_group, example_group = group[is_event], group[~is_event]
        sizes = np.bincount(event_group, minlength=np.count_nonzero(starts))
        slots = self._find_slots(all_keys[order[starts]], sizes > 0)
        first = np.cumsum(sizes) - sizes  # place of each group's first event
        place = np.arange(n) - first[event_group]
        before, sources = self.states[slots], np.flatnonzero(has_key)[order[is_event]]
        events, values = events[sources], values[sources]
        states = self._accumulate(before[event_group], place, events["seconds"], values)

        targets = order[~is_event] - n
        last, example_groups = np.empty((2, len(keys)), np.int64)
        last[targets], example_groups[targets] = np.cumsum(is_event)[~is_event] - 1, example_group
        num_new = last + 1 - first[example_groups]  # new events of its key that an example sees
        rows = np.where(num_new > 0, len(before) + last, example_groups)
        example_states = np.concatenate([before, states]).take(rows, axis=0)
        sequences = self._sequences(slots[example_groups], events, last, num_new)
        features = self.format.features(example_states, *sequences, seconds)

        # Only the last L new events of a key: earlier ones would be written to the same places.
        is_last = place >= sizes[event_group] - self.format.length
        last_groups = event_group[is_last]
        number = before[last_groups, 1].astype(np.int64) + place[is_last]
        self.rings[slots[last_groups], number % self.format.length] = events[is_last]
        ends = (first + sizes - 1)[sizes > 0]
        self.states[slots[sizes > 0]] = states[ends]
        self.is_changed[slots[sizes > 0]] = True
        self._forget()
        return features

    def changed(self, unchanged: bool) -> Iterator[tuple[Ints, list[bytes]]]:
        """Yield the values with new events, or with ``unchanged`` all, and their records."""
        keys = np.fromiter(self.slots, np.int64, len(self.slots))
        changed = np.flatnonzero(self.is_changed[: len(keys)] | unchanged)
        # If the caller stops midway, as a publication that fails, the rest still counts as changed.
        self.is_changed[changed] = True
        for begin in range(0, len(changed), _RECORDS_AT_ONCE):
            slots = changed[begin : begin + _RECORDS_AT_ONCE]
            zeros = np.zeros(len(slots), np.int64)
            events, lengths = self._sequences(slots, np.empty(0, self.rings.dtype), zeros, zeros)
            parts = np.split(events, np.cumsum(lengths)[:-1])
            pairs = zip(self.states[slots], parts, strict=True)
            yield keys[slots], [state.tobytes() + part.tobytes() for state, part in pairs]
            self.is_changed[slots] = False

    def _find_slots(self, distinct: Ints, has_events: AnyArray) -> Ints:
        """Return the rows of distinct values, adding rows for new values that have events."""
        known_slots = map(self.slots.get, distinct.tolist(), repeat(-1))
        slots = np.fromiter(known_slots, np.int64, len(distinct))
        new = np.flatnonzero((slots < 0) & has_events)
        slots[new] = np.arange(len(self.slots), len(self.slots) + len(new))
        self.slots.update(zip(distinct[new].tolist(), slots[new].tolist(), strict=True))
        slots[slots < 0] = len(self.slots)
        self._keep_rows(slice(None))
        return slots

    def _accumulate(
        self, before: AnyArray, place: Ints, seconds: Ints, vectors: Floats
    ) -> AnyArray:
        """Return the state after each event, given that before the first event of its group.

        This is a prefix sum by doubling distances. It never subtracts, unlike differences of a
        running sum over all groups, which would lose digits.
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
        """Return the last L events of B rows, one row after another, newest first; lengths (B,).

        The newest ``num_new`` of a row are in ``events``, from ``last`` backwards; the others are
        in its ring.
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
        # A quarter at once: to sort all keys for each new one would take far longer.
        rows = np.sort(newest_first[: max(1, 3 * self.max_keys // 4)])
        keys = np.fromiter(self.slots, np.int64, size)[rows]
        self.slots = dict(zip(keys.tolist(), range(len(rows)), strict=True))
        self.forgotten += size - len(rows)
        self._keep_rows(rows)

    def _keep_rows(self, rows: Any) -> None:
        """Keep some rows, and make room for one more than there are slots."""
        for name in ("states", "rings", "is_changed"):
            setattr(self, name, _grow(getattr(self, name)[rows], len(self.slots) + 1))


def _grow(array: AnyArray, size: int) -> AnyArray:
    """Return the array with at least ``size`` rows, new ones zero; double it if it has to grow."""
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
    """Yield a teacher's outputs in a store as events, window by window in order of time.

    The time of an event is its example's event time, or the time that the snapshot was trained
    through, if that is later. So no feature depends on what came after its example.

    Args:
        store: the store, at its current commit.
        teacher: the teacher's name.
        keys: key columns of the store to return.
        task: the task whose outputs are the values, (n, 1); None: the first.
        embeddings: take the embeddings as values, (n, E); leave out rows without one.
        snapshot: a pinned version; None: the newest output of each example counts.
        exclude: versions to ignore.
        bad_rows: as for :meth:`TeacherStore.read`.

    Raises:
        ValueError: for a wrong value; after the last window, if no row has a key.
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
