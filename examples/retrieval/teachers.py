"""Two teachers, whose outputs for each liked pair are logged before they learn from it.

* The ranker of the benchmarks scores pairs, from features of user and movie together, and has no
  vector for either. It gives a logit for each pair, from its training forward, before the update.
* The item-to-item model has a weight for each pair of movies, and knows all that a user has liked
  so far. It is fitted anew after each tenth of the stream. For the pairs of the next tenth it gives
  the factors of its score, an embedding [a, b]; a comes from what was liked before the pair.

Shapes: N ratings, B of them, V movies, Q queries, E width of a half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pairs import Array, PairBatch, Pairs, Queries
from passes import CPU, parameters, score
from passes import train as train_one_pass
from scipy.sparse import csr_matrix
from sources import SOURCES, data, demo, models, movielens

from torchrec_exfm import TeacherOutputs

RANK = 64  # of the item-to-item weights
RIDGE = 3000.0
SHARPNESS = 50.0  # brings the scores to those of a softmax; the best for the student


@dataclass(frozen=True)
class ItemToItem:
    """A linear model from the movies that a user has liked to the next (EASE: Steck, WWW 2019).

    X, users by movies, is 1 where one is liked. The weights are W = argmin |X - XW|² + λ|W|² with
    a diagonal of 0, in closed form, and W ≈ F Gᵀ of rank `RANK`. With n movies x liked before,

        a . b = `SHARPNESS` (x W)_j / √n + log(1 + how often movie j is liked).

    Attributes:
        liked_factors: F, float32 (V, RANK).
        next_factors: G, float32 (V, RANK).
        counts: how often a movie is liked, (V,).
    """

    liked_factors: Array
    next_factors: Array
    counts: Array

    @classmethod
    def fit(cls, pairs: Pairs, end: int) -> ItemToItem:
        """Fit the model to the liked pairs before a row."""
        rows = pairs.liked_rows(0, end)
        size = pairs.user.max() + 1, pairs.cardinalities["movie"]
        ones = np.ones(len(rows), np.float32)
        likes = csr_matrix((ones, (pairs.user[rows], pairs.movie[rows])), size)
        gram = (likes.T @ likes).toarray()
        inverse = np.linalg.inv(gram + RIDGE * np.eye(len(gram), dtype=np.float32))
        weights = -inverse / inverse.diagonal()
        np.fill_diagonal(weights, 0)
        torch.manual_seed(0)  # svd_lowrank begins with a random projection
        left, sizes, right = torch.svd_lowrank(torch.from_numpy(weights), RANK, niter=4)
        factors = ((side * sizes.sqrt()).numpy() for side in (left, right))
        return cls(*factors, np.asarray(likes.sum(0)).ravel())

    def users(self, pairs: Pairs, rows: Array) -> Array:
        """Return a for the users of some rows, from their histories, float32 (B, E)."""
        movies, lengths = pairs.history.take(rows)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        shares = np.repeat(1 / np.sqrt(np.maximum(lengths, 1)), lengths).astype(np.float32)
        liked = csr_matrix((shares, movies, bounds), (len(rows), len(self.counts)))
        ones = np.ones((len(rows), 1), np.float32)
        return np.hstack([SHARPNESS * (liked @ self.liked_factors), ones])

    def movies(self, ids: Array) -> Array:
        """Return b for some movies, float32 (B, E)."""
        return np.hstack([self.next_factors[ids], np.log1p(self.counts[ids, None])])


@dataclass(frozen=True)
class Logged:
    """The teachers' outputs by rating, NaN where there is none.

    Attributes:
        logits: of the ranker, float32 (N,).
        embeddings: [a, b] of the item-to-item model, float16 (N, 2E).
    """

    logits: Array
    embeddings: Array

    def __call__(self, batch: PairBatch) -> TeacherOutputs:
        """Return the outputs of a batch."""
        rows = batch.rows.numpy()
        logits, embeddings = (
            torch.from_numpy(column[rows]).float() for column in (self.logits, self.embeddings)
        )
        presence = ~embeddings.isnan().any(1)
        return TeacherOutputs(
            logits, ~logits.isnan(), embeddings=embeddings, embedding_presence=presence
        )

    def without_users(self) -> Logged:
        """Return a copy without the user's half, so that only the popularity of movies is left."""
        embeddings = self.embeddings.copy()
        embeddings[:, : embeddings.shape[1] // 2 - 1] *= 0
        return replace(self, embeddings=embeddings)


def log_embeddings(pairs: Pairs, parts: int) -> Array:
    """Return [a, b] for the liked pairs of all parts but the first, by the model of earlier parts.

    It is NaN where the user has liked nothing before, or nobody has liked the movie.
    """
    embeddings = np.full((len(pairs.time), 2 * (RANK + 1)), np.nan, np.float16)
    for part in range(1, parts):
        model = ItemToItem.fit(pairs, pairs.cut(part))
        rows = pairs.liked_rows(pairs.cut(part), pairs.cut(part + 1))
        known = (pairs.history.end > pairs.history.begin)[rows]
        rows = rows[known & (model.counts[pairs.movie[rows]] > 0)]
        for piece in np.array_split(rows, 20):  # histories are long: not all at once
            halves = model.users(pairs, piece), model.movies(pairs.movie[piece])
            embeddings[piece] = np.hstack(halves)
    return embeddings


FEATURES = movielens.RICH_SPARSE, movielens.RICH_DENSE


def train_ranker(stream: Any, end: int) -> tuple[Any, Array]:
    """Train the ranker for one pass up to a row; return it and its logits, (N,)."""
    torch.manual_seed(0)
    module = models.ranker(*FEATURES, stream.cardinalities, **demo.TEACHER)
    model, optimizer = models.distribute(module, CPU, **demo.TEACHER_RATES)
    logits = np.full(len(stream), np.nan, np.float32)
    part, size = stream.select(slice(0, end)), SOURCES["movielens"].teacher_rates[0]
    feed = data.batches(part, *FEATURES, size)
    train_one_pass(model, optimizer, feed, part, logits)
    return model, logits


def rank_all(model: Any, stream: Any, queries: Queries, cut: int) -> Array:
    """Rank all movies for each query by the logits at the cut, best first, (Q, M) ids."""
    users, movies = len(queries.rows), len(queries.movies)
    user_rows = np.repeat(queries.rows, movies)
    asked = _pairs_at(stream, user_rows, np.tile(queries.movie_rows, users), cut)
    logits = score(model, parameters(model), asked, FEATURES)
    order = np.argsort(-logits.reshape(users, movies), axis=1, kind="stable")
    return queries.movies[order]


def _pairs_at(stream: Any, user_rows: Array, movie_rows: Array, cut: int) -> Any:
    """Pair one row's user with another's movie, with features as of the cut."""
    asked, movies = stream.select(user_rows), stream.select(movie_rows)
    past, now = stream.select(slice(0, cut)), stream.select(np.full(len(user_rows), cut))
    sparse = {name: now.sparse[name] for name in ("weekday", "hour")}
    sparse |= {name: movies.sparse[name] for name in ("movie", "genre", "release_year")}
    sparse = asked.sparse | sparse
    keys = {
        key: np.concatenate([past.sparse[key], sparse[key]]) for key in ("user", "movie", "genre")
    }
    time = np.concatenate([past.time, now.time])
    label = np.concatenate([past.label, np.zeros(len(user_rows), np.float32)])
    history = movielens._history(keys, time, label)
    dense = {name: values[cut:] for name, values in history.items()}
    dense |= {name: now.dense[name] for name in movielens.LEAN_DENSE}
    dense = movies.dense | dense  # genres; the years since the release hardly change
    return replace(asked, time=now.time, sparse=sparse, dense=dense)
