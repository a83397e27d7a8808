"""MovieLens-1M as pairs of a user and a movie that they like, for retrieval.

A pair is a rating; a liked one, of four stars or more, is a positive. Ratings are in time order.
Training uses those before a cut. A user who likes a movie before the cut and another after it is
a query of the evaluation.

Shapes: N ratings, B of them in a batch, Q queries, M movies that were rated before the cut.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

# `sources` has the stream, its rankers and their features; the script's own folder comes first.
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from sources import data, movielens

Array = npt.NDArray[Any]

USER = ("user", *movielens.USER_ATTRIBUTES)
MOVIE = ("movie", "release_year", "genres")
PARTS = 10
"""Equal parts of the stream. The teacher is fitted anew after each; a cut is between two."""


class Bags(NamedTuple):
    """Ids of several rows; those of row i are ``values[begin[i]:end[i]]``."""

    values: Array
    begin: Array
    end: Array

    def take(self, rows: Array) -> tuple[Array, Array]:
        """Return the ids of some rows, one row after the other, and the number of ids by row."""
        lengths = self.end[rows] - self.begin[rows]
        shift = self.begin[rows] - np.cumsum(lengths) + lengths
        places = np.repeat(shift, lengths) + np.arange(lengths.sum())
        return self.values[places], lengths


@dataclass
class PairBatch(Pipelineable):
    """A batch of liked pairs.

    Attributes:
        features: of `USER` and `MOVIE`.
        labels: 1 throughout, float32 (B,).
        item_ids: the movies, int64 (B,).
        log_q: log(1 + number of earlier likes of the movie), float32 (B,).
        rows: positions among the N ratings, int64 (B,); they stay on the host.
    """

    features: KeyedJaggedTensor
    labels: Tensor
    item_ids: Tensor
    log_q: Tensor
    rows: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> PairBatch:
        return self._map(lambda column: column.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> PairBatch:
        return self._map(lambda column: column.pin_memory())

    def record_stream(self, stream: Any) -> None:
        self._map(lambda column: column.record_stream(stream))

    def _map(self, change: Callable[[Any], Any]) -> PairBatch:
        columns = [change(getattr(self, field.name)) for field in fields(self)[:-1]]
        return PairBatch(*columns, self.rows)


@dataclass(frozen=True)
class Pairs:
    """All ratings in time order.

    Attributes:
        user, movie: ids, int64 (N,).
        time: epoch seconds, int64 (N,).
        liked: bool (N,).
        log_q: as in the batch, float32 (N,).
        features: `USER` and `MOVIE`, N rows.
        history: the movies that the user had liked strictly before, N rows.
        cardinalities: number of ids by feature.
    """

    user: Array
    movie: Array
    time: Array
    liked: Array
    log_q: Array
    features: Mapping[str, Bags]
    history: Bags
    cardinalities: Mapping[str, int]

    def cut(self, part: int) -> int:
        """Return the first row of a part."""
        return part * len(self.time) // PARTS

    def liked_rows(self, first: int, end: int) -> Array:
        """Return the liked rows of a range."""
        return first + np.flatnonzero(self.liked[first:end])

    def batch(self, rows: Array, names: Sequence[str]) -> PairBatch:
        """Make a batch of some rows, with the features of the given names."""
        values, lengths = zip(*(self.features[name].take(rows) for name in names), strict=True)
        columns = self.liked.astype(np.float32)[rows], self.movie[rows], self.log_q[rows], rows
        ids, counts = (torch.from_numpy(np.concatenate(parts)) for parts in (values, lengths))
        features = KeyedJaggedTensor(list(names), ids.long(), lengths=counts.long())
        return PairBatch(features, *map(torch.from_numpy, columns))

    def batches(self, rows: Array, batch_size: int) -> Iterator[PairBatch]:
        """Yield full batches of some rows in their order; leave out the rest."""
        for first in range(0, len(rows) - batch_size + 1, batch_size):
            yield self.batch(rows[first : first + batch_size], (*USER, *MOVIE))

    def shuffled(self, parts: int, seed: int) -> Array:
        """Return the liked rows of the first parts: part by part, shuffled within a part."""
        random = np.random.default_rng(seed)
        bounds = [self.cut(part) for part in range(parts + 1)]
        rows = [self.liked_rows(*part) for part in itertools.pairwise(bounds)]
        return np.concatenate([random.permutation(part) for part in rows])


def pairs_of(stream: data.Stream) -> Pairs:
    """Read the ratings of a stream as pairs."""
    user, movie = (np.asarray(stream.sparse[name]).astype(np.int64) for name in ("user", "movie"))
    time, liked = np.asarray(stream.time), np.asarray(stream.label) == 1
    row = np.arange(len(time))
    log_q = np.log1p(data.earlier_labels(movie, time, liked)[1]).astype(np.float32)
    columns = {name: np.asarray(stream.sparse[name]) for name in (*USER, *MOVIE[:2])}
    ids = {name: Bags(values, row, row + 1) for name, values in columns.items()}
    flags = np.stack([stream.dense[f"is_{genre}"] for genre in movielens.GENRES], axis=1)
    flag_rows, genres = np.nonzero(flags)
    bounds = np.searchsorted(flag_rows, np.arange(len(time) + 1))
    features = {**ids, "genres": Bags(genres, bounds[:-1], bounds[1:])}
    sizes = {**stream.cardinalities, "genres": len(movielens.GENRES)}
    history = _history(user, movie, time, liked)
    return Pairs(user, movie, time, liked, log_q, features, history, sizes)


def _history(user: Array, movie: Array, time: Array, liked: Array) -> Bags:
    span = 1 + time.max() - time.min()
    keys = user * span + (time - time.min())
    order = np.flatnonzero(liked)[np.argsort(keys[liked], kind="stable")]
    begin, end = np.searchsorted(keys[order], user * span), np.searchsorted(keys[order], keys)
    return Bags(movie[order], begin, end)


class Queries(NamedTuple):
    """Users who like movies after a cut, and the movies that existed before it.

    Attributes:
        rows: the user's first rating after the cut, (Q,): its features and its history.
        relevant: the movies that each query's user likes after the cut.
        seen: the movies that each query's user has rated before it; they are not searched.
        movies: ids of the movies that can be found, (M,).
        movie_rows: the last rating of each before the cut, (M,), for its features.
    """

    rows: Array
    relevant: list[Array]
    seen: list[Array]
    movies: Array
    movie_rows: Array


def queries_of(pairs: Pairs, first: int, end: int) -> Queries:
    """Return the queries of the ratings from a cut to an end."""
    before, after = np.arange(first), np.arange(first, end)
    liked_before, liked_after = (rows[pairs.liked[rows]] for rows in (before, after))
    users = np.intersect1d(pairs.user[liked_before], pairs.user[liked_after])
    movies, from_last = np.unique(pairs.movie[:first][::-1], return_index=True)
    _, place = np.unique(pairs.user[after], return_index=True)
    rows = after[place]
    relevant, seen = (_movies_by_user(pairs, part, users) for part in (liked_after, before))
    return Queries(
        rows[np.isin(pairs.user[rows], users)], relevant, seen, movies, first - 1 - from_last
    )


def _movies_by_user(pairs: Pairs, rows: Array, users: Array) -> list[Array]:
    """Split the movies of some rows by user (sorted)."""
    rows = rows[np.isin(pairs.user[rows], users)]
    rows = rows[np.argsort(pairs.user[rows], kind="stable")]
    bounds = np.searchsorted(pairs.user[rows], users)
    return np.split(pairs.movie[rows], bounds[1:])
