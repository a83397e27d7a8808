"""Pairs, queries, search and figures of retrieval, against plain Python on small rows."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

with pytest.MonkeyPatch.context() as patch:  # undone: other examples have files of these names
    patch.syspath_prepend(Path(__file__).parents[1] / "examples" / "retrieval")
    import pairs
    import teachers
    import towers
    from pairs import data, movielens
    from retrieval import STUDENT

from torchrec_exfm import DistillationTerm
from torchrec_exfm.losses import in_batch_softmax

USERS, MOVIES, RATINGS = 6, 12, 60


@pytest.fixture(scope="module")
def stream() -> data.Stream:
    """Return ratings in order of time, some in the same second; a user rates a movie once."""
    rng = random.Random(0)
    every = [(user, movie) for user in range(USERS) for movie in range(MOVIES)]
    rated = rng.sample(every, RATINGS)
    time = np.sort(np.array([rng.randrange(100) for _ in rated], np.int64))
    label = np.array([rng.random() < 0.6 for _ in rated], np.float32)
    user, movie = (np.array(column, np.int32) for column in zip(*rated, strict=True))
    genre = movie % 3
    sparse = {name: np.zeros(RATINGS, np.int32) for name in movielens.RICH_SPARSE}
    sparse |= {"user": user, "movie": movie, "genre": genre}
    dense = {name: np.zeros(RATINGS, np.float32) for name in movielens.RICH_DENSE}
    for number, name in enumerate(movielens.GENRES):
        dense[f"is_{name}"] = ((genre == number) | (number == 5)).astype(np.float32)
    dense |= movielens._history(sparse, time, label)
    sizes = dict.fromkeys(sparse, 2) | {"user": USERS, "movie": MOVIES, "genre": 3}
    week = np.ones(RATINGS, np.int32)
    weight, ids = np.ones(RATINGS, np.float32), np.arange(RATINGS)
    return data.Stream(
        time, week, label, genre, weight, ids, sparse, dense, movielens.GENRES, sizes
    )


@pytest.fixture(scope="module")
def all_pairs(stream: data.Stream) -> pairs.Pairs:
    return pairs.pairs_of(stream)


def earlier_likes(stream: data.Stream, row: int) -> list[int]:
    """Return the rows that were liked strictly before a row."""
    return [r for r in range(RATINGS) if stream.time[r] < stream.time[row] and stream.label[r]]


def test_history_and_frequency_are_of_strictly_earlier_likes(
    stream: data.Stream, all_pairs: pairs.Pairs
) -> None:
    user, movie = stream.sparse["user"], stream.sparse["movie"]
    lengths = []
    for row in range(RATINGS):
        values, length = all_pairs.history.take(np.array([row]))
        likes = earlier_likes(stream, row)
        assert sorted(values) == sorted(movie[r] for r in likes if user[r] == user[row])
        count = sum(movie[r] == movie[row] for r in likes)
        assert all_pairs.log_q[row] == pytest.approx(math.log1p(count), abs=1e-6)
        lengths.append(int(length[0]))
    assert 0 in lengths
    assert max(lengths) > 2


def test_a_batch_has_the_features_of_its_rows(stream: data.Stream, all_pairs: pairs.Pairs) -> None:
    rows = np.array([40, 3, 17])
    batch = all_pairs.batch(rows, (*pairs.USER, *pairs.MOVIE))
    for place, row in enumerate(rows):
        for name in (*pairs.USER, *pairs.MOVIE[:-1]):
            bag = batch.features[name].to_dense()[place]
            assert bag.tolist() == [stream.sparse[name][row]]
        genres = batch.features["genres"].to_dense()[place].tolist()
        assert genres == sorted({int(stream.sparse["genre"][row]), 5})
    assert batch.item_ids.tolist() == stream.sparse["movie"][rows].tolist()


def test_batches_are_full_and_of_liked_rows_part_by_part(all_pairs: pairs.Pairs) -> None:
    rows = all_pairs.shuffled(4, seed=1)
    assert sorted(rows) == np.flatnonzero(all_pairs.liked[: all_pairs.cut(4)]).tolist()
    parts = np.searchsorted([all_pairs.cut(part) for part in range(5)], rows, side="right")
    assert (np.diff(parts) >= 0).all()
    assert rows.tolist() != sorted(rows)
    batches = list(all_pairs.batches(rows, 5))
    assert np.concatenate([b.rows for b in batches]).tolist() == rows[: 5 * len(batches)].tolist()
    assert len(batches) == len(rows) // 5


def test_queries_are_of_users_with_likes_on_both_sides(
    stream: data.Stream, all_pairs: pairs.Pairs
) -> None:
    first, end = 20, 45
    queries = pairs.queries_of(all_pairs, first, end)
    user, movie, liked = stream.sparse["user"], stream.sparse["movie"], stream.label == 1
    expected = {}
    for u in range(USERS):
        before = [r for r in range(first) if user[r] == u]
        after = [r for r in range(first, end) if user[r] == u]
        relevant = {movie[r] for r in after if liked[r]}
        if relevant and any(liked[r] for r in before):
            expected[u] = after[0], relevant, {movie[r] for r in before}
    assert len(expected) > 2
    assert user[queries.rows].tolist() == list(expected)
    actual = zip(queries.rows, map(set, queries.relevant), map(set, queries.seen), strict=True)
    assert list(actual) == list(expected.values())
    last = {int(movie[r]): r for r in range(first)}
    assert dict(zip(queries.movies, queries.movie_rows, strict=True)) == last


def queries_with(relevant: list[Any], seen: list[Any], movies: list[int]) -> pairs.Queries:
    arrays = ([np.array(ids, np.int64) for ids in lists] for lists in (relevant, seen))
    return pairs.Queries(np.zeros(0), *arrays, np.array(movies), np.zeros(0))


@pytest.mark.parametrize("seed", range(3))
def test_search_and_figures_equal_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    movies = rng.permutation(1000)[:150].tolist()
    users, vectors = (rng.normal(size=(size, 4)).astype(np.float32) for size in (7, 150))
    relevant = [rng.choice(movies, size, replace=False) for size in (1, 2, 5, 9, 10, 11, 120)]
    seen = [rng.choice(movies, size, replace=False) for size in (0, 1, 2, 60, 140, 149, 3)]
    relevant[0] = np.array([5000])  # a movie that was not there before
    results = towers.search(users, vectors, queries_with(relevant, seen, movies), 100)
    recalls: dict[str, list[float]] = {"Recall@10": [], "Recall@100": [], "NDCG@10": []}
    for row, (wanted, known) in enumerate(zip(relevant, seen, strict=True)):
        products = {m: float(users[row] @ vectors[i]) for i, m in enumerate(movies)}
        best = sorted(set(movies) - set(known.tolist()), key=lambda m: -products[m])[:100]
        assert results[row].tolist() == best + [-1] * (100 - len(best))
        for most in (10, 100):
            hits = len(set(best[:most]) & set(wanted.tolist()))
            recalls[f"Recall@{most}"].append(hits / len(wanted))
        gain = sum(1 / math.log2(rank + 2) for rank, m in enumerate(best[:10]) if m in wanted)
        ideal = sum(1 / math.log2(rank + 2) for rank in range(min(10, len(wanted))))
        recalls["NDCG@10"].append(gain / ideal)
    for name, value in towers.measure(results, relevant).items():
        assert value == pytest.approx(sum(recalls[name]) / 7, abs=1e-9), name


def test_item_to_item_weights_are_the_least_squares(
    all_pairs: pairs.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are least squares by column without the movie itself; full-rank factors give them."""
    monkeypatch.setattr(teachers, "RIDGE", 0.7)
    monkeypatch.setattr(teachers, "RANK", MOVIES)
    end = 40
    model = teachers.ItemToItem.fit(all_pairs, end)
    likes = np.zeros((USERS, MOVIES))
    for row in all_pairs.liked_rows(0, end):
        likes[all_pairs.user[row], all_pairs.movie[row]] = 1
    weights = np.zeros((MOVIES, MOVIES))
    for movie in range(MOVIES):
        rest = [m for m in range(MOVIES) if m != movie]
        x = likes[:, rest]
        weights[rest, movie] = np.linalg.solve(
            x.T @ x + 0.7 * np.eye(MOVIES - 1), x.T @ likes[:, movie]
        )
    np.testing.assert_allclose(model.liked_factors @ model.next_factors.T, weights, atol=1e-4)
    rows = np.arange(end, RATINGS)
    scores = model.users(all_pairs, rows) @ model.movies(np.arange(MOVIES)).T
    for row, actual in zip(rows, scores, strict=True):
        history, _ = all_pairs.history.take(np.array([row]))
        mean = weights[history].sum(0) / math.sqrt(max(len(history), 1))
        expected = teachers.SHARPNESS * mean + np.log1p(likes.sum(0))
        np.testing.assert_allclose(actual, expected, atol=50 * 1e-4)


def test_what_is_logged_of_a_pair_has_not_seen_it(
    all_pairs: pairs.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed likes from a row on change no output logged before it."""
    monkeypatch.setattr(teachers, "RANK", 4)
    logged = teachers.log_embeddings(all_pairs, 9)
    assert np.isnan(logged[: all_pairs.cut(1)]).all()
    presence = ~np.isnan(logged).any(1)
    assert 5 < presence.sum() < all_pairs.liked.sum()
    for cut in range(10, 54):
        earlier = all_pairs.liked & (np.arange(RATINGS) < cut)
        fewer = pairs.Pairs(**{**vars(all_pairs), "liked": earlier})
        np.testing.assert_array_equal(teachers.log_embeddings(fewer, 9)[:cut], logged[:cut])


def test_without_users_all_have_the_same_order(
    all_pairs: pairs.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "RANK", 4)
    embeddings = teachers.log_embeddings(all_pairs, 9)
    logged = teachers.Logged(np.zeros(RATINGS, np.float32), embeddings).without_users()
    users, movies = np.split(logged.embeddings[~np.isnan(embeddings).any(1)], 2, axis=1)
    assert (users == users[0]).all()
    assert len(np.unique(movies[:, -1])) > 1
    np.testing.assert_array_equal(users[0] @ movies.T, movies[:, -1])


def test_pairs_at_the_cut_have_the_features_of_a_rating_then(stream: data.Stream) -> None:
    """A pair of one row's user and another row's movie has the features of that real rating."""
    movie, time = stream.sparse["movie"], stream.time
    cut = next(r for r in range(30, RATINGS) if time[r - 1] < time[r] and movie[r] in movie[:r])
    same_movie = np.flatnonzero(movie[:cut] == movie[cut])[:1]
    asked = teachers._pairs_at(stream, np.array([cut]), same_movie, cut)
    for name in movielens.RICH_DENSE:
        np.testing.assert_allclose(asked.dense[name], stream.dense[name][[cut]], err_msg=name)
    for name in movielens.RICH_SPARSE:
        assert asked.sparse[name] == stream.sparse[name][cut], name


@pytest.mark.usefixtures("one_rank")
def test_taught_towers_are_served_with_their_own_keys(
    all_pairs: pairs.Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a weight of 0 towers equal those that were never taught; otherwise they differ."""
    monkeypatch.setattr(teachers, "RANK", 4)
    student = {**STUDENT, "width": 8, "layers": (8, 4), "batch_size": 6}
    logits = np.zeros(RATINGS, np.float32)
    logged = teachers.Logged(logits, teachers.log_embeddings(all_pairs, 9))
    rows = np.tile(all_pairs.shuffled(9, seed=0), 2)
    states = []
    for weight in (None, 0.0, 1.0):
        loss = in_batch_softmax(tau=STUDENT["tau"])
        terms = [] if weight is None else [DistillationTerm(loss=loss, weight=weight)]
        trained = towers.train(all_pairs, rows, student, seed=0, terms=terms, teacher=logged)
        states.append(trained.state_dict())
    bare, untaught, taught = states
    assert list(taught) == list(bare)
    assert any("query_proj" in key for key in bare)
    for key in bare:
        torch.testing.assert_close(as_float32(untaught[key]), as_float32(bare[key]), rtol=0, atol=0)
    assert any((as_float32(taught[key]) != as_float32(bare[key])).any() for key in bare)


def as_float32(value: Any) -> torch.Tensor:
    return value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
