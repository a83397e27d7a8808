"""What every row of the store has to keep to, checked where rows come in and where they go out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

import numpy as np

from torchrec_exfm.das.arrays import MICROSECONDS, Floats, Ints, Mask, utc

__all__ = [
    "MAX_SECONDS",
    "Rows",
    "broken_rules",
    "check_bad_rows",
    "newest",
    "repeats",
    "sift",
]

BadRows: TypeAlias = Literal["refuse", "quarantine"]

MAX_SECONDS = 2**40  # of an event time, some 35,000 years: microseconds of it stay within int64
_SHOWN = 5


@dataclass(frozen=True)
class Rows:
    """Rows of one teacher, column by column; n rows, T tasks, times in epoch microseconds.

    Attributes:
        example_id: (n,).
        outputs: (n, T).
        event_time: (n,).
        snapshot: (n,).
        trained_through: (n,).
        logged: (n,).
        scored_at: (n,).
    """

    example_id: Ints
    outputs: Floats
    event_time: Ints
    snapshot: Ints
    trained_through: Ints
    logged: Mask
    scored_at: Ints

    def __len__(self) -> int:
        return len(self.example_id)

    def __getitem__(self, rows: Mask | Ints | slice) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Rows], num_tasks: int) -> Rows:
        """The rows of all parts, in order."""
        empty = np.empty(0, dtype=np.int64)
        none = cls(
            example_id=empty,
            outputs=np.empty((0, num_tasks), dtype=np.float32),
            event_time=empty,
            snapshot=empty,
            trained_through=empty,
            logged=np.empty(0, dtype=np.bool_),
            scored_at=empty,
        )
        if len(parts) == 1:
            return parts[0]
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, n) for part in (none, *parts)]) for n in names))

    @property
    def age_seconds(self) -> Floats:
        """Event time - trained-through, (n,); 0 for logged rows, whose teacher was up to date."""
        age = (self.event_time - self.trained_through) / MICROSECONDS
        age[self.logged] = 0
        return age.astype(np.float32)


def broken_rules(rows: Rows, window: int | None, window_seconds: int) -> Iterator[tuple[str, Mask]]:
    """Each rule that is broken, in words, with the rows (n,) that break it.

    Args:
        rows: of one teacher.
        window: the window that they should lie in, or None.
        window_seconds: the length of a window.
    """
    seconds = rows.event_time // MICROSECONDS
    rules: list[tuple[str, Mask]] = [
        ("have a negative example id", rows.example_id < 0),
        (
            "have an output that is NaN or infinite",
            np.logical_not(np.isfinite(rows.outputs).all(axis=1)),
        ),
        (
            "have an event time outside of [0, 2^40) seconds (milliseconds?)",
            (seconds < 0) | (seconds >= MAX_SECONDS),
        ),
        ("leak: their teacher was trained through their own event time", leaks(rows)),
    ]
    if window is not None:
        outside = seconds // window_seconds != window
        rules.append((f"lie outside of window {window}", outside))
    for words, bad in rules:
        if bad.any():
            yield words, bad


def leaks(rows: Rows) -> Mask:
    """The rows (n,) whose teacher may have seen their label.

    Those whose snapshot was trained through their own event time or later, unless they were
    logged in the teacher's training forward, before the update.
    """
    return (rows.trained_through >= rows.event_time) & ~rows.logged


def repeats(rows: Rows) -> Iterator[tuple[str, Mask]]:
    """The rows of one write whose example has been there before in it."""
    ids = np.sort(rows.example_id)
    if (ids[1:] > ids[:-1]).all():  # to sort the ids alone costs a fifth
        return
    order = np.argsort(rows.example_id, kind="stable")
    ids = rows.example_id[order]
    bad = np.zeros(len(rows), dtype=np.bool_)
    bad[order[1:]] = ids[1:] == ids[:-1]
    if bad.any():
        yield "repeat an example id", bad


def newest(rows: Rows) -> Rows:
    """One row for each example: the newest snapshot wins.

    Among those of one snapshot what was logged in training, then what was scored last.
    """
    ids = rows.example_id
    if (ids[1:] > ids[:-1]).all():  # as they are written
        return rows
    ids = np.sort(ids)
    if (ids[1:] > ids[:-1]).all():
        return rows
    order = np.lexsort((rows.scored_at, rows.logged, rows.snapshot, rows.example_id))
    return rows[order[np.append(ids[1:] != ids[:-1], len(ids) > 0)]]


def refuse(where: str, words: str, bad: Mask, rows: Rows) -> str:
    """The sentence that says which rows break a rule."""
    at = np.flatnonzero(bad)
    shown = at[:_SHOWN]
    more = ", ..." if len(at) > _SHOWN else ""
    first = rows[shown[:1]]
    return (
        f"{where}: {len(at)} of {len(rows)} rows {words}: rows "
        f"{', '.join(map(str, shown))}{more} (example ids "
        f"{', '.join(map(str, rows.example_id[shown]))}{more}); the first is of "
        f"{utc(first.event_time[0] // MICROSECONDS)}, from snapshot {first.snapshot[0]}, trained "
        f"through {utc(first.trained_through[0] // MICROSECONDS)}, with outputs "
        f"{first.outputs[0].tolist()}; correct them, or pass bad_rows='quarantine' to leave such "
        "rows out and count them"
    )


def sift(
    rows: Rows,
    broken: Iterable[tuple[str, Mask]],
    bad_rows: BadRows,
    where: str,
    error: type[Exception],
) -> tuple[Mask, dict[str, int]]:
    """The rows (n,) that break no rule, and how many of the others break which one first.

    Raises:
        Exception: of the kind given, for ``bad_rows="refuse"``, if there are others.
    """
    good = np.ones(len(rows), dtype=np.bool_)
    quarantined: dict[str, int] = {}
    for words, bad in broken:
        if bad_rows == "refuse":
            raise error(refuse(where, words, bad, rows))
        if (bad & good).any():
            quarantined[words] = int((bad & good).sum())
        good &= ~bad
    return good, quarantined


def check_bad_rows(bad_rows: str) -> None:
    """A ValueError unless it is one of the two ways."""
    if bad_rows not in ("refuse", "quarantine"):
        raise ValueError(f"bad_rows should be 'refuse' or 'quarantine'; received {bad_rows!r}")
