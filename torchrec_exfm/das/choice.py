"""Which teachers, and which of their versions, a look-up or a join is asked for."""

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
    """Of each teacher the version that is pinned, if one is, and those that are passed over.

    Both may be given for all teachers, or by name. ``caller`` is who is told of in an error.

    Raises:
        TypeError: for another kind.
        ValueError: for another name, what is no version, and one that is pinned and excluded.
    """
    pins = snapshot if isinstance(snapshot, Mapping) else dict.fromkeys(teachers, snapshot)
    excluded = exclude if isinstance(exclude, Mapping) else dict.fromkeys(teachers, exclude)
    check_names("snapshot", tuple(pins), teachers)
    check_names("exclude", tuple(excluded), teachers)
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


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """A ValueError unless the names are of those known, each at most once; some must be given."""
    none = not names and what not in ("snapshot", "exclude")
    if none or not set(names) <= set(known) or len(set(names)) < len(names):
        raise ValueError(
            f"{what} should be of those there are, {tuple(known)}, each at most once; received "
            f"{tuple(names)}"
        )


def _sort_versions(versions: Collection[int]) -> tuple[int, ...]:
    if isinstance(versions, str) or not isinstance(versions, Iterable):
        raise TypeError(f"exclude should be a collection of versions; received {versions!r}")
    return tuple(np.sort(as_int64("exclude", list(versions))).tolist())
