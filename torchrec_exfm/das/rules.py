"""What every row of the store has to keep to, checked where rows come in and where they go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from torchrec_exfm.das.arrays import (
    MAX_SECONDS,
    MICROSECONDS,
    Bytes,
    Floats,
    Ints,
    Mask,
    likely_unit,
    utc,
)

BadRows: TypeAlias = Literal["refuse", "quarantine"]
ABSENT = np.uint32(0xFFFFFFFF)  # the bits of an output that is null in the store: of a NaN
NO_KEY = np.int64(-(2**63))  # a key that is null in the store


@dataclass(frozen=True)
class Rows:
    """Rows of one teacher: outputs (n, T), embeddings (n, W) bytes, times in epoch microseconds.

    Keys are (n, K); K and W are 0 unless asked for. An output that is null has the bits ``ABSENT``,
    and a key that is null is ``NO_KEY``.
    """

    example_id: Ints
    outputs: Floats
    event_time: Ints
    snapshot: Ints
    trained_through: Ints
    logged: Mask
    scored_at: Ints
    embedding: Bytes
    keys: Ints

    def __len__(self) -> int:
        return len(self.example_id)

    def __getitem__(self, rows: Mask | Ints | slice) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def concatenate(
        cls, parts: Sequence[Rows], num_tasks: int, embedding_bytes: int = 0, num_keys: int = 0
    ) -> Rows:
        """The rows of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            ints, bools = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_)
            outputs = np.empty((0, num_tasks), dtype=np.float32)
            embedding = np.empty((0, embedding_bytes), dtype=np.uint8)
            keys = np.empty((0, num_keys), dtype=np.int64)
            return cls(ints, outputs, ints, ints, ints, bools, ints, embedding, keys)
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def age_seconds(self) -> Floats:
        """Event time - trained-through, (n,); 0 for logged rows, whose teacher was up to date."""
        age = (self.event_time - self.trained_through) / MICROSECONDS
        age[self.logged] = 0
        return age.astype(np.float32)


def broken_rules(rows: Rows, window: int | None, window_seconds: int) -> dict[str, Mask]:
    """Each rule that is broken, in words, with the rows (n,) that break it.

    The rows are of one teacher, and of one window, or (None) of one write.
    """
    seconds = rows.event_time // MICROSECONDS
    rules: dict[str, Mask] = {}
    if window is None:
        rules["repeat an example id"] = _repeated(rows.example_id)
    rules["have a negative example id"] = rows.example_id < 0
    finite = np.isfinite(rows.outputs)
    if not finite.all():
        finite |= absent(rows.outputs)
    infinite = np.logical_not(finite.all(axis=1))
    rules["have an output that is NaN or infinite"] = infinite
    out_of_range = (seconds < 0) | (seconds >= MAX_SECONDS)
    unit = likely_unit(int(seconds.max(initial=0)))
    rules[f"have an event time outside of [0, {MAX_SECONDS:,}) seconds ({unit})"] = out_of_range
    # what was logged in the teacher's training forward was said before it learned the label
    # (in whole seconds, as trained-through is: what was cut off it may have been the example's)
    leaks = (rows.trained_through >= seconds * MICROSECONDS) & ~rows.logged
    rules["leak: their teacher was trained through their own event time"] = leaks
    if window is not None:
        rules[f"lie outside of window {window}"] = seconds // window_seconds != window
    return {words: bad for words, bad in rules.items() if bad.any()}


def absent(outputs: Floats) -> Mask:
    """Which outputs are null in the store: their teacher does not know the task."""
    null: Mask = outputs.view(np.uint32) == ABSENT
    return null


def _repeated(ids: Ints) -> Mask:
    """Which (n,) have been there before."""
    repeated = np.zeros(len(ids), dtype=np.bool_)
    if not _rise(np.sort(ids)):  # to sort the ids alone costs a fifth
        order = np.argsort(ids, kind="stable")
        repeated[order[1:]] = np.diff(ids[order]) == 0
    return repeated


def _rise(ids: Ints) -> bool:
    return bool((ids[1:] > ids[:-1]).all())


def newest(rows: Rows) -> Rows:
    """One row for each example: the newest snapshot wins.

    Among those of one snapshot what was logged in training, then what was scored last.
    """
    if _rise(rows.example_id) or _rise(ids := np.sort(rows.example_id)):
        return rows
    order = np.lexsort((rows.scored_at, rows.logged, rows.snapshot, rows.example_id))
    return rows[order[np.append(ids[1:] != ids[:-1], len(ids) > 0)]]


def first_few(values: Any) -> str:
    """Some of an array's or a list's values, to show."""
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _refusal(where: str, words: str, bad: Mask, rows: Rows) -> str:
    """The sentence that says which rows break a rule."""
    at = np.flatnonzero(bad)
    first = rows[at[:1]]
    return (
        f"{where}: {len(at)} of {len(rows)} rows {words}: rows {first_few(at)} (example ids "
        f"{first_few(rows.example_id[at])}); the first is of "
        f"{utc(first.event_time[0] // MICROSECONDS)}, from snapshot {first.snapshot[0]}, trained "
        f"through {utc(first.trained_through[0] // MICROSECONDS)}, with outputs "
        f"{first.outputs[0].tolist()}; correct them, or pass bad_rows='quarantine' to leave such "
        "rows out and count them"
    )


def sift(
    rows: Rows, broken: dict[str, Mask], bad_rows: BadRows, where: str, error: type[Exception]
) -> tuple[Mask, dict[str, int]]:
    """The rows (n,) that break no rule, and how many of the others break which one first.

    Raises:
        Exception: of the kind given, for ``bad_rows="refuse"``, if there are others.
    """
    good = np.ones(len(rows), dtype=np.bool_)
    quarantined: dict[str, int] = {}
    for words, bad in broken.items():
        if bad_rows == "refuse":
            raise error(_refusal(where, words, bad, rows))
        if (bad & good).any():
            quarantined[words] = int((bad & good).sum())
        good &= ~bad
    return good, quarantined


def check_bad_rows(bad_rows: str) -> None:
    """A ValueError unless it is one of the two ways."""
    if bad_rows not in ("refuse", "quarantine"):
        raise ValueError(f"bad_rows should be 'refuse' or 'quarantine'; received {bad_rows!r}")
