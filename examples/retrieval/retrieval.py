"""Two towers for retrieval, taught by teachers that are no two towers: who finds what users like next?

    python examples/retrieval/retrieval.py                      # prints the table
    python examples/retrieval/retrieval.py --validation         # of the part before: to choose by
    python examples/retrieval/retrieval.py --write              # and writes README.md beside it

The towers train on the liked pairs of nine tenths of MovieLens-1M in the order of time, and search
all movies for what the users of those come to like in the last tenth. Arms differ in what is taught,
seeds in the parameters and the order of the pairs; the teachers speak once, to all students.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import numpy as np
from main import set_up
from pairs import PARTS, Array, Pairs, Queries, movielens, pairs_of, queries_of
from scipy.stats import ttest_rel
from teachers import RANK, ItemToItem, Logged, log_embeddings, rank_all, train_ranker
from towers import TwoTower, measure, search, train, unseen, vectors

from torchrec_exfm import DistillationTerm
from torchrec_exfm.losses import in_batch_positives, in_batch_softmax

HERE = Path(__file__).resolve().parent
MOST = 100  # movies that are found
STUDENT: dict[str, Any] = {
    "width": 32,
    "layers": (64, 32),
    "tau": 0.1,
    "learning_rate": 1e-3,
    "table_learning_rate": 0.1,
    "batch_size": 512,
}
"""The best on the validation part without a teacher; all arms have it."""

IN_BATCH = DistillationTerm(loss=in_batch_softmax(tau=STUDENT["tau"]), weight=1.0)
TERMS = {
    "untaught": [],
    "AH on pair logits": [DistillationTerm()],
    "in-batch, by pair logits": [DistillationTerm(loss=in_batch_positives(tau=STUDENT["tau"]))],
    "in-batch, popularity alone": [IN_BATCH],
    "in-batch, embeddings": [IN_BATCH],
}
FIGURES = ("Recall@10", "Recall@100", "NDCG@10")


@dataclass(frozen=True)
class Task:
    """What all arms share: the pairs of the first parts, the outputs logged for them, the queries."""

    pairs: Pairs
    parts: int
    logged: Logged
    queries: Queries


def main() -> None:
    """Run all arms, and print the table."""
    options = parse_options()
    set_up()
    task, teachers = prepare(PARTS - 2 if options.validation else PARTS - 1)
    arms = {name: [run(name, task, seed) for seed in range(options.seeds)] for name in TERMS}
    text = page(teachers, arms, task.parts, len(task.queries.rows))
    print(text)
    if options.write:
        (HERE / "README.md").write_text(text)


def prepare(parts: int) -> tuple[Task, dict[str, dict[str, float]]]:
    """The task whose cut is after so many parts, and what popularity and the teachers reach."""
    stream = movielens.load_stream()
    pairs = pairs_of(stream)
    cut = pairs.cut(parts)
    queries = queries_of(pairs, cut, pairs.cut(parts + 1))
    model = ItemToItem.fit(pairs, cut)
    users, movies = model.users(pairs, queries.rows), model.movies(queries.movies)
    say("item-to-item model: logging")
    embeddings = log_embeddings(pairs, parts)
    say("ranker: training and logging")
    ranker, logits = train_ranker(stream, cut)
    few = Queries(*(column[::6] for column in queries[:3]), *queries[3:])
    found = {
        "popularity": search(users[:, -1:], movies[:, -1:], queries, MOST),
        "item-to-item model": search(users, movies, queries, MOST),
    }
    teachers = {name: measure(ids, queries.relevant) for name, ids in found.items()}
    ranked = unseen(rank_all(ranker, stream, few, cut), few.seen, MOST)
    teachers["ranker, of every 6th user"] = measure(ranked, few.relevant)
    return Task(pairs, parts, Logged(logits, embeddings), queries), teachers


def run(name: str, task: Task, seed: int, student: Mapping[str, Any] = STUDENT) -> dict[str, float]:
    """Train one arm's towers, and measure what they find."""
    logged = task.logged.without_users() if "popularity" in name else task.logged
    rows = task.pairs.shuffled(task.parts, seed)
    towers = train(task.pairs, rows, student, seed=seed, terms=TERMS[name], teacher=logged)
    figures = measure(find(towers, task.pairs, task.queries), task.queries.relevant)
    say(f"{name}, seed {seed}: " + ", ".join(f"{key} {figures[key]:.4f}" for key in FIGURES))
    return figures


def find(towers: TwoTower, pairs: Pairs, queries: Queries) -> Array:
    """The movies that the towers find for each query, (Q, `MOST`)."""
    users = vectors(towers, pairs, queries.rows, 0)
    movies = vectors(towers, pairs, queries.movie_rows, 1)
    return search(users, movies, queries, MOST)


def table(
    teachers: Mapping[str, Mapping[str, float]], arms: Mapping[str, Sequence[Mapping[str, float]]]
) -> str:
    """Means over the seeds with standard deviations; p of a paired t-test against untaught."""
    header = ["", *FIGURES, "Recall@100 vs untaught", "p"]
    rows = [
        [name, *(f"{figures[key]:.4f}" for key in FIGURES), "", ""]
        for name, figures in teachers.items()
    ]
    none = np.array([figures["Recall@100"] for figures in arms["untaught"]])
    for name, seeds in arms.items():
        values = {key: np.array([figures[key] for figures in seeds]) for key in FIGURES}
        row = [name, *(f"{v.mean():.4f} ± {v.std(ddof=1):.4f}" for v in values.values())]
        taught = values["Recall@100"]
        change = 100 * (taught.mean() / none.mean() - 1)
        rows.append(
            [*row, "", ""]
            if name == "untaught"
            else [*row, f"{change:+.1f} %", f"{ttest_rel(taught, none).pvalue:.2g}"]
        )
    return common.table(header, rows)


PAGE = """# Two towers for retrieval

What towers that serve gain from teachers that could not serve, on MovieLens-1M. This page is written
by the script; no figure is by hand.

* **Task.** Of all movies that anyone had rated before a cut in time (after {parts} tenths of the
  ratings), find those that a user likes (four stars or more) between it and the end of the tenth that
  follows. Movies that the user has rated before the cut are left out of the search. Queries are the
  {queries:,} users who have liked a movie before the cut and like another after it.
* **Student.** TorchRec's two towers: user id, gender, age, occupation, ZIP code, and title, year,
  genres. In-batch softmax over liked pairs, corrected for popularity, one pass. Its settings are the
  best without a teacher on the tenth before the last. It knows nothing of a user's history.
* **Teachers.** Each says what it says of a pair before it learns from it, once for all students. The
  ranker of the benchmarks has rich features of user and movie together, and a logit for each pair.
  The item-to-item model has weights for each two movies (a linear autoencoder, of rank {rank}), and
  reads a user's whole history; its score is a product of two embeddings.
* **Arms.** AH: a head on [u, v] learns the ranker's logits. In-batch, by pair logits: pairs count as
  far as the ranker has them for liked. In-batch, embeddings: each user's distribution over the movies
  of the batch is the teacher's. Popularity alone: the same, of a teacher that does not know who asks.
  All pairs of a retrieval log are liked ones, so that a second head on their label would learn a
  constant: there is no such control.
* **Served** are the towers that `export_student` gives, with their own keys; the FAISS index (exact
  inner products) is filled from the item tower.

Means over {seeds} seeds ± their standard deviation; p is of a paired t-test of Recall@100 over the
seeds. The teachers are the same for all seeds. Their own figures are what a student could come to,
the ranker's those of a model that was made to tell liked movies from others that were rated, not from
all.

{table}

<sub>{command}: {machine}</sub>
"""


def page(
    teachers: Mapping[str, Mapping[str, float]],
    arms: Mapping[str, Sequence[Mapping[str, float]]],
    parts: int,
    queries: int,
) -> str:
    """The README."""
    return PAGE.format(
        parts=parts,
        queries=queries,
        rank=RANK,
        seeds=len(arms["untaught"]),
        table=table(teachers, arms),
        command=shlex.join(["python", "examples/retrieval/retrieval.py", *sys.argv[1:]]),
        machine=machine(),
    )


def machine() -> str:
    about = common.environment()
    versions = {**about["versions"], "faiss-cpu": version("faiss-cpu")}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{about['cores']} cores of {about['cpu']}, GPU: {about['gpu']}; {listed}"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="students of each arm, 2 or more")
    parser.add_argument("--validation", action="store_true", help="of the tenth before the last")
    parser.add_argument("--write", action="store_true", help="write README.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
