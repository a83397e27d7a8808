"""Checks of the teachers, tasks and versions given to a look-up, a join or a memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from torchrec_exfm.das.arrays import as_int, as_int64

__all__ = ["check_names", "choose_versions"]


def choose_versions(
    caller: str,
    teachers: Sequence[str],
    snapshot: int | Mapping[str, int] | None,
    exclude: Collection[int] | Mapping[str, Collection[int]],
) -> tuple[dict[str, int | None], dict[str, tuple[int, ...]]]:
    """Return each teacher's pinned version (None: the newest counts) and its excluded versions.

    Both may be given for all teachers, or by name. ``caller`` begins an error message.

    Raises:
        TypeError: if ``exclude`` is no collection, or a version is not an integer.
        ValueError: for an unknown teacher, a version out of range, or one pinned and excluded.
    """
    pins = snapshot if isinstance(snapshot, Mapping) else dict.fromkeys(teachers, snapshot)
    excluded = exclude if isinstance(exclude, Mapping) else dict.fromkeys(teachers, exclude)
    check_names("teachers of snapshot", tuple(pins), teachers, may_be_empty=True)
    check_names("teachers of exclude", tuple(excluded), teachers, may_be_empty=True)
    excluded_versions = {teacher: _sort_versions(excluded.get(teacher, ())) for teacher in teachers}
    pinned: dict[str, int | None] = dict.fromkeys(teachers)
    for teacher, version in pins.items():
        if version is None:
            continue
        if not 0 <= as_int(version) < 2**40:
            raise ValueError(f"snapshot should be a version; received {version!r}")
        if version in excluded_versions[teacher]:
            raise ValueError(f"{caller} pins version {version} of {teacher}, and excludes it")
        pinned[teacher] = as_int(version)
    return pinned, excluded_versions


def check_names(
    what: str, names: Sequence[str], known: Sequence[str], *, may_be_empty: bool = False
) -> None:
    """Raise a ValueError unless names are known, distinct and, as a rule, at least one."""
    is_missing = not names and not may_be_empty
    if is_missing or not set(names) <= set(known) or len(set(names)) < len(names):
        raise ValueError(
            f"unknown, repeated or missing {what}: expected a subset of {tuple(known)}, received "
            f"{tuple(names)}"
        )


def _sort_versions(versions: Collection[int]) -> tuple[int, ...]:
    if isinstance(versions, str) or not isinstance(versions, Iterable):
        raise TypeError(f"exclude should be a collection of versions; received {versions!r}")
    return tuple(np.sort(as_int64("exclude", list(versions))).tolist())
