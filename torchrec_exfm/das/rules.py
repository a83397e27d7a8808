"""The rules for every row of the store, checked when rows are written and when they are read."""

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
# The bits of an output that is null in the store. They are a NaN's, and `write` stores no NaN with
# these bits: so null (the teacher does not know the task) differs from NaN (a broken output).
ABSENT = np.uint32(0xFFFFFFFF)
NO_KEY = np.int64(-(2**63))  # a key that is null in the store


@dataclass(frozen=True)
class Rows:
    """Rows of one teacher: outputs (n, T), embeddings (n, W) bytes, times in epoch microseconds.

    Keys are (n, K); K and W are 0 unless they were read. A null output has the bits ``ABSENT``, a
    null key is ``NO_KEY``.
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
        """Return the rows of all parts, in order; the numbers give the shapes if there are none."""
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
        """Ages (n,): event time - trained-through; 0 for logged rows, of a teacher up to date."""
        age = (self.event_time - self.trained_through) / MICROSECONDS
        age[self.logged] = 0
        return age.astype(np.float32)


def broken_rules(rows: Rows, window: int | None, window_seconds: int) -> dict[str, Mask]:
    """Return the rules that are broken, in words, each with the mask (n,) of rows that break it.

    The rows are of one teacher, and of one window, or of one write (``window=None``).
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
    # A logged output was computed before the teacher learned the label. Times are compared in whole
    # seconds, as trained-through is rounded down: the rest of its second may have been trained on.
    leaks = (rows.trained_through >= seconds * MICROSECONDS) & ~rows.logged
    rules["leak: their teacher was trained through their own event time"] = leaks
    if window is not None:
        rules[f"lie outside of window {window}"] = seconds // window_seconds != window
    return {words: bad for words, bad in rules.items() if bad.any()}


def absent(outputs: Floats) -> Mask:
    """Return which outputs are null in the store: their teacher does not know the task."""
    null: Mask = outputs.view(np.uint32) == ABSENT
    return null


def _repeated(ids: Ints) -> Mask:
    """Return which ids (n,) repeat an earlier one."""
    repeated = np.zeros(len(ids), dtype=np.bool_)
    if not _is_increasing(np.sort(ids)):  # sorting the ids alone costs a fifth
        order = np.argsort(ids, kind="stable")
        repeated[order[1:]] = np.diff(ids[order]) == 0
    return repeated


def _is_increasing(ids: Ints) -> bool:
    return bool((ids[1:] > ids[:-1]).all())


def newest(rows: Rows) -> Rows:
    """Return one row for each example: the newest snapshot wins.

    Among the rows of one snapshot, a logged row wins, then the one scored last.
    """
    # where no example has two rows, the sort by four keys is not needed
    if _is_increasing(rows.example_id) or _is_increasing(ids := np.sort(rows.example_id)):
        return rows
    order = np.lexsort((rows.scored_at, rows.logged, rows.snapshot, rows.example_id))
    return rows[order[np.append(ids[1:] != ids[:-1], len(ids) > 0)]]


def first_few(values: Any) -> str:
    """Return the first values of an array or list, as text."""
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _refusal(where: str, words: str, bad: Mask, rows: Rows) -> str:
    """Return the message that names the rows which break a rule."""
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
    """Return the mask (n,) of rows that break no rule, and how many others break which rule first.

    Raises:
        Exception: of the type ``error``, for ``bad_rows="refuse"``, if a rule is broken.
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
    """Raise a ValueError unless ``bad_rows`` is "refuse" or "quarantine"."""
    if bad_rows not in ("refuse", "quarantine"):
        raise ValueError(f"bad_rows should be 'refuse' or 'quarantine'; received {bad_rows!r}")
