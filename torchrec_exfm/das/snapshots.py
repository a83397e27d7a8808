"""Snapshots of a teacher: published once, whole or not at all, found by version and event time."""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_exfm.das.schema import check_name

__all__ = ["Snapshot"]

_MAX_SECONDS = 2**40


@dataclass(frozen=True)
class Snapshot:
    """One version of a teacher, and how far it was trained.

    Args:
        teacher: its name.
        version: a whole number from 0, higher for newer.
        trained_through_seconds: the last event time that it was trained on, epoch seconds: an
            example at or before that time may have taught it its label.

    Raises:
        ValueError: for a wrong value.
    """

    teacher: str
    version: int
    trained_through_seconds: int

    def __post_init__(self) -> None:
        check_name("a teacher", self.teacher)
        for name in ("version", "trained_through_seconds"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not 0 <= value < _MAX_SECONDS
            ):
                raise ValueError(
                    f"{name} should be a whole number in [0, 2^40); received {value!r}"
                )
