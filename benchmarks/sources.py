"""The streams of the quality benchmark, with the features and settings of each model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ebnerd
import movielens  # puts the example's folder on the path
import numpy as np
import numpy.typing as npt
import published

sys.path.insert(1, str(Path(__file__).parents[1] / "examples" / "promo_response"))

import data
import main as demo
import models as models

Array = npt.NDArray[Any]
Features = tuple[Sequence[str], Sequence[str]]


@dataclass(frozen=True)
class Source:
    """A stream, with the features and settings of teacher and students.

    Attributes:
        load: loads the stream.
        verticals: those with students; (): all, and the weeks below are those before which a
            quarter and a half of the examples lie.
        swept: the verticals of sweeps.
        lean: sparse and dense features of the lean student.
        strong: those of the strong student, and of the generation before the rich teacher.
        rich: those of the teacher.
        rates: batch size, learning rate, and that of the tables, for each student. They are the
            best without a teacher, see `quality.py --tune`.
        teacher_rates: the same for the teacher.
        tuning_week: settings are chosen on the weeks (days, where a stream counts days) from this
            one on; late students start here.
        first_week: of the evaluation.
        hourly: the teacher is refreshed every hour instead of every week.
        delays: how many weeks (hours) a teacher is late, for the table Freshness.
        frozen_after: the last week (hour) that a frozen teacher trains on.
        memory_keys: columns of sparse features that a memory has as keys; the first is the user.
        memory_half_life: of the decayed means, in days.
        memory_rates: of the lean student with a memory; None: its own. Half-life and rates are the
            best in one vertical of three with a memory of labels, without a teacher.
        known: when the label of each example is known, in seconds (B,); None: at its own time.
        brought: whether the user has to bring the files.
        version: of the stream's format and of the files.
    """

    load: Callable[[], data.Stream]
    verticals: tuple[str, ...]
    swept: tuple[str, ...]
    lean: Features
    strong: Features
    rich: Features
    rates: dict[str, tuple[int, float, float]]
    teacher_rates: tuple[int, float, float] = (2048, 1e-3, 0.3)
    tuning_week: int = 14
    first_week: int = 27
    hourly: bool = False
    delays: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    frozen_after: int = 16
    memory_keys: tuple[tuple[str, ...], ...] = ()
    memory_half_life: float = 28.0
    memory_rates: tuple[int, float, float] | None = None
    known: Callable[[], Array] | None = None
    brought: bool = False
    version: Callable[[], Any] = lambda: 1

    def periods(self, stream: data.Stream) -> Array:
        """Return the weeks or hours, from 1 on, at whose end the teacher is refreshed, (B,)."""
        if not self.hourly:
            return np.asarray(stream.week)
        return 1 + (np.asarray(stream.time) - stream.time[0]) // 3600

    @property
    def tuning_period(self) -> int:
        """The tuning week, counted in the periods of the teacher."""
        return 1 + 24 * (self.tuning_week - 1) if self.hourly else self.tuning_week


def at_hand() -> list[str]:
    """Return the streams whose files pip brings, or whose folder is in the environment."""
    return [name for name, s in SOURCES.items() if not s.brought or name.upper() in os.environ]


def data_folder(source: str) -> Path:
    """Return the folder of a stream whose files the user brings, from the environment.

    Processes of a pool inherit it.
    """
    folder = os.environ.get(source.upper())
    if not folder:
        raise SystemExit(
            f"{source} needs the folder of its published files. Received none: give make quality "
            f"SOURCE={source} DATA=FOLDER, or set {source.upper()}"
        )
    return Path(folder)


def _published(name: str) -> Source:
    """Return a stream of published files, with rates that were not tuned."""
    features: published.Format = getattr(published, name.upper())
    return Source(
        load=lambda: getattr(published, name)(data_folder(name)),
        verticals=(),
        swept=(),
        lean=features.lean,
        strong=features.strong,
        rich=features.rich,
        rates={"lean": (2048, 2e-3, 0.3), "strong": (2048, 2e-3, 0.3)},
        brought=True,
        version=lambda: published.version(data_folder(name)),
    )


SOURCES = {
    "promotions": Source(
        load=lambda: data.load_stream(progress=False),
        verticals=(  # departments of 50,000 to 250,000 examples
            "MEAT-PCKGD",
            "MEAT",
            "PRODUCE",
            "NUTRITION",
            "DELI",
            "COSMETICS",
            "SEAFOOD-PCKGD",
        ),
        swept=("PRODUCE", "DELI", "MEAT-PCKGD"),
        lean=(data.LEAN_SPARSE, data.LEAN_DENSE),
        strong=(data.LEAN_SPARSE, data.STRONG_DENSE),
        rich=(data.RICH_SPARSE, tuple(dict.fromkeys((*data.RICH_DENSE, *data.STRONG_DENSE)))),
        rates={"lean": (256, 1e-3, 0.5), "strong": (256, 2e-3, 0.3)},
        memory_keys=(
            ("household",),
            ("product",),
            ("household", "product"),
            ("household", "category"),
        ),
        memory_rates=(256, 2e-3, 0.3),
        version=lambda: data.FORMAT_VERSION,
    ),
    "movielens": Source(
        load=movielens.load_stream,
        verticals=("Comedy", "Action", "Drama", "Horror", "Adventure"),  # the five largest genres
        swept=("Drama", "Horror", "Adventure"),
        lean=(movielens.LEAN_SPARSE, movielens.LEAN_DENSE),
        strong=(movielens.LEAN_SPARSE, movielens.STRONG_DENSE),
        rich=(movielens.RICH_SPARSE, movielens.RICH_DENSE),
        rates={"lean": (256, 1e-3, 0.3), "strong": (256, 2e-3, 0.1)},
        memory_keys=(("user",), ("movie",), ("user", "genre")),
        memory_rates=(256, 2e-3, 0.1),
        version=lambda: movielens.FORMAT_VERSION,
    ),
    "ebnerd": Source(
        load=lambda: ebnerd.load_stream(data_folder("ebnerd")),
        verticals=ebnerd.SURFACES,
        swept=ebnerd.SURFACES[::3],
        lean=(ebnerd.LEAN_SPARSE, ebnerd.LEAN_DENSE),
        strong=(ebnerd.LEAN_SPARSE, ebnerd.STRONG_DENSE),
        rich=(ebnerd.RICH_SPARSE, ebnerd.RICH_DENSE),
        rates={"lean": (256, 2e-3, 0.5), "strong": (256, 4e-3, 0.3)},
        teacher_rates=(256, 2e-3, 0.3),
        tuning_week=4,
        first_week=8,
        hourly=True,
        delays=(0, 5, 23, 71),
        frozen_after=96,
        memory_keys=(("user",), ("article",), ("user", "article")),
        memory_half_life=0.25,
        known=lambda: ebnerd.left_seconds(data_folder("ebnerd")),
        brought=True,
        version=lambda: (ebnerd.FORMAT_VERSION, ebnerd.digest(data_folder("ebnerd"))),
    ),
    **{name: _published(name) for name in ("taobaoad", "kuaivideo", "amazonelectronics", "criteo")},
}


@lru_cache(1)
def stream_of(source: str) -> data.Stream:
    return SOURCES[source].load()


@lru_cache
def source_of(name: str) -> Source:
    """Return a stream's settings; some follow from its examples."""
    source = SOURCES[name]
    if source.verticals:
        return source
    stream = stream_of(name)
    quarter, half = (int(stream.week[len(stream) * k // 4]) for k in (1, 2))
    return replace(
        source,
        verticals=stream.verticals,
        swept=stream.verticals,
        tuning_week=quarter,
        first_week=half,
    )


@lru_cache(4)
def rows_of(source: str, *verticals: str) -> Array:
    """Return the rows of some verticals in the stream."""
    stream = stream_of(source)
    return np.flatnonzero(np.any([demo.rows_of(stream, name) for name in verticals], axis=0))


@lru_cache(1)
def sampling_rates(source: str) -> Array:
    """Return the share of the negatives of a row's basket that are in the stream, (B,).

    Negatives of the promotions were drawn basket by basket; each one's weight is how many it stands
    for.
    """
    stream = stream_of(source)
    if source != "promotions":
        return np.ones(len(stream))
    _, basket = np.unique(stream.group, return_inverse=True)
    negative = np.asarray(stream.label) == 0
    stands_for = np.ones(basket.max() + 1)
    stands_for[basket[negative]] = stream.weight[negative]
    return 1 / stands_for[basket]
