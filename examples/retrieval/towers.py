"""Two towers over TorchRec's tables, their training, and an exact index of their vectors.

Shapes: B pairs, D width of a vector, Q queries, M movies, K movies found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import faiss
import numpy as np
import torch
from pairs import MOVIE, USER, Array, PairBatch, Pairs, Queries
from passes import CPU
from sources import models
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_exfm import (
    DistillationTerm,
    ExFMWrapper,
    OutputsOf,
    TeacherOutputs,
    TrainPipelineExFM,
    export_student,
)

TAP = OutputsOf("two_tower.query_proj", "two_tower.candidate_proj")


class Normalize(nn.Module):
    """Scale vectors to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)


class TwoTower(nn.Module):
    """A user's vector u and a movie's v, (B, D) each; the score is u . v.

    Each tower has its own network, on the concatenated embeddings of its features.
    """

    def __init__(
        self, cardinalities: Mapping[str, int], *, width: int, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name=name,
                    embedding_dim=width,
                    num_embeddings=cardinalities[name],
                    feature_names=[name],
                    pooling=PoolingType.MEAN,
                )
                for name in (*USER, *MOVIE)
            ],
            device=torch.device("meta"),
        )
        self.query_proj = _network([width * len(USER), *layers])
        self.candidate_proj = _network([width * len(MOVIE), *layers])

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        pooled = self.ebc(features)
        query, candidate = (torch.cat([pooled[key] for key in keys], 1) for keys in (USER, MOVIE))
        return self.query_proj(query), self.candidate_proj(candidate)


def _network(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers[1:], Normalize())


class TwoTowerTrainTask(nn.Module):
    """In-batch softmax: which of the batch's movies does the user like?

    The loss is the mean of -log p_ii, where p_ij is in proportion to exp(u_i . v_j / τ) / Q_j. Q is
    the frequency of a movie. Other pairs of the same movie are no candidates of pair i.
    """

    def __init__(self, two_tower: TwoTower, tau: float) -> None:
        super().__init__()
        self.two_tower, self.tau = two_tower, tau

    def forward(self, batch: PairBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        query, candidate = self.two_tower(batch.features)
        scores = query @ candidate.t() / self.tau
        repeated = (batch.item_ids == batch.item_ids.unsqueeze(1)).fill_diagonal_(False)
        log_p = (scores - batch.log_q).masked_fill(repeated, -torch.inf).log_softmax(1)
        loss = -log_p.diagonal().mean()
        return loss, (loss.detach(), scores.detach().diagonal(), batch.labels)


def train(
    pairs: Pairs,
    rows: Array,
    student: Mapping[str, Any],
    *,
    seed: int,
    terms: Sequence[DistillationTerm] = (),
    teacher: Callable[[PairBatch], TeacherOutputs] | None = None,
) -> TwoTower:
    """Train for one pass over some rows; return the towers as they are served.

    Args:
        pairs: where the rows are from.
        rows: in the order of training.
        student: `STUDENT`, or other settings.
        seed: of the parameters.
        terms: what is distilled; none: TorchRec's own pipeline.
        teacher: maps a batch to the outputs logged for it.
    """
    torch.manual_seed(seed)
    tower = TwoTower(pairs.cardinalities, width=student["width"], layers=student["layers"])
    task: Any = TwoTowerTrainTask(tower, student["tau"])
    if terms:
        task = ExFMWrapper(task, tap=TAP, terms=terms)
    rates = {name: student[name] for name in ("learning_rate", "table_learning_rate")}
    model, optimizer = models.distribute(task, CPU, **rates)
    pipeline: Any = TrainPipelineSparseDist(model, optimizer, CPU)
    if terms:
        items = lambda batch: (batch.item_ids, batch.log_q)  # noqa: E731
        pipeline = TrainPipelineExFM(model, optimizer, CPU, teacher=teacher, candidates=items)
    feed = pairs.batches(rows, student["batch_size"])
    for _ in range(len(rows) // student["batch_size"]):
        pipeline.progress(feed)
    pipeline.detach()
    return export_student(model).two_tower if terms else model.module.two_tower


def vectors(towers: TwoTower, pairs: Pairs, rows: Array, side: int) -> Array:
    """Return the vectors of some rows' users (side 0) or movies (side 1), float32."""
    towers.eval()
    with torch.no_grad():
        parts = [
            towers(pairs.batch(rows[first : first + 4096], (*USER, *MOVIE)).features)[side]
            for first in range(0, len(rows), 4096)
        ]
    return torch.cat(parts).numpy()


def find(towers: TwoTower, pairs: Pairs, queries: Queries, count: int) -> Array:
    """Find movies for each query by the towers, (Q, K) ids."""
    users = vectors(towers, pairs, queries.rows, 0)
    movies = vectors(towers, pairs, queries.movie_rows, 1)
    return search(users, movies, queries, count)


def search(users: Array, movies: Array, queries: Queries, count: int) -> Array:
    """Find the movies with the highest products, best first, (Q, K) ids; -1 where none is left.

    Args:
        users: vectors of the queries' users, (Q, D).
        movies: vectors of ``queries.movies``, (M, D).
        queries: whose seen movies are left out.
        count: K.
    """
    index = faiss.IndexIDMap(faiss.IndexFlatIP(movies.shape[1]))
    index.add_with_ids(np.ascontiguousarray(movies, np.float32), queries.movies)
    deepest = min(len(movies), count + max(map(len, queries.seen)))
    _, movie_ids = index.search(np.ascontiguousarray(users, np.float32), deepest)
    return unseen(movie_ids, queries.seen, count)


def unseen(movie_ids: Array, seen: Sequence[Array], count: int) -> Array:
    """Return the first K unseen ids of each row, (Q, K); -1 where none is left."""
    unseen_ids = np.full((len(movie_ids), count), -1, np.int64)
    for row, (ids, seen_ids) in enumerate(zip(movie_ids, seen, strict=True)):
        new = ids[~np.isin(ids, seen_ids)][:count]
        unseen_ids[row, : len(new)] = new
    return unseen_ids


def measure(movie_ids: Array, relevant: Sequence[Array]) -> dict[str, float]:
    """Return Recall@10, Recall@100 and NDCG@10, means over queries.

    Recall@K is the number of relevant movies among the first K over the number of relevant ones;
    NDCG@10 has gains of 1 and discounts log2(1 + rank).
    """
    hits = np.stack([np.isin(ids, movies) for ids, movies in zip(movie_ids, relevant, strict=True)])
    wanted = np.array([len(movies) for movies in relevant])
    discounts = 1 / np.log2(np.arange(2, 12))
    best = np.cumsum(discounts)[np.minimum(wanted, 10) - 1]
    return {
        "Recall@10": float((hits[:, :10].sum(1) / wanted).mean()),
        "Recall@100": float((hits[:, :100].sum(1) / wanted).mean()),
        "NDCG@10": float((hits[:, :10] @ discounts / best).mean()),
    }
