"""Two towers that search all movies for a user's next likes, taught by teachers too slow to search.

    python examples/retrieval/retrieval.py                # prints the table
    python examples/retrieval/retrieval.py --validation   # on the tenth before, to choose settings
    python examples/retrieval/retrieval.py --write        # and writes README.md beside it

The towers train on the liked pairs of the first nine tenths of MovieLens-1M, and search all movies
for those that their users like in the last. Arms differ in what is taught; seeds in parameters and
the order of pairs. The teachers' outputs are logged once, for all students.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pairs import PARTS, Pairs, Queries, movielens, pairs_of, queries_of
from passes import start
from scipy.stats import ttest_rel
from teachers import RANK, ItemToItem, Logged, log_embeddings, rank_all, train_ranker
from towers import find, measure, search, train, unseen

from torchrec_exfm import DistillationTerm
from torchrec_exfm.losses import in_batch_positives, in_batch_softmax

HERE = Path(__file__).resolve().parent
MOST = 100  # movies found for a query
STUDENT: dict[str, Any] = {
    "width": 32,
    "layers": (64, 32),
    "tau": 0.15,
    "learning_rate": 1e-3,
    "table_learning_rate": 0.1,
    "batch_size": 1024,
}
"""The best settings on the validation part without a teacher; all arms use them."""

TAU = STUDENT["tau"]
EMBEDDINGS = DistillationTerm(loss=in_batch_softmax(tau=TAU))
UNTAUGHT, CONTROL = "untaught", "in-batch, popularity alone"
TERMS = {
    UNTAUGHT: [],
    "AH on pair logits": [DistillationTerm(weight=0.3)],
    "in-batch, pair logits": [DistillationTerm(loss=in_batch_positives(tau=TAU), weight=0.3)],
    CONTROL: [EMBEDDINGS],
    "in-batch, embeddings": [EMBEDDINGS],
}
"""The terms of each arm; weights are the best of a few in validation."""

FIGURES = ("Recall@10", "Recall@100", "NDCG@10")
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """What all arms share: the pairs of the first parts, their logged outputs, the queries."""

    pairs: Pairs
    parts: int
    logged: Logged
    queries: Queries


def main() -> None:
    """Run all arms and print the table."""
    options = parse_options()
    start()
    task, teachers = prepare(PARTS - 2 if options.validation else PARTS - 1)
    arms = {name: [run(name, task, seed) for seed in range(options.seeds)] for name in TERMS}
    text = page(task, teachers, arms)
    print(text)
    if options.write:
        (HERE / "README.md").write_text(text)


def prepare(parts: int) -> tuple[Task, dict[str, Figures]]:
    """Return the task with a cut after so many parts, and the teachers' own figures."""
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
    movies_found = {
        "popularity": search(users[:, -1:], movies[:, -1:], queries, MOST),
        "item-to-item model": search(users, movies, queries, MOST),
    }
    teachers = {name: measure(ids, queries.relevant) for name, ids in movies_found.items()}
    ranked = unseen(rank_all(ranker, stream, few, cut), few.seen, MOST)
    teachers["ranker, of every 6th user"] = measure(ranked, few.relevant)
    return Task(pairs, parts, Logged(logits, embeddings), queries), teachers


def run(name: str, task: Task, seed: int) -> Figures:
    """Train one arm's towers and measure what they find."""
    logged = task.logged.without_users() if name == CONTROL else task.logged
    rows = task.pairs.shuffled(task.parts, seed)
    towers = train(task.pairs, rows, STUDENT, seed=seed, terms=TERMS[name], teacher=logged)
    figures = measure(find(towers, task.pairs, task.queries, MOST), task.queries.relevant)
    say(f"{name}, seed {seed}: " + ", ".join(f"{key} {figures[key]:.4f}" for key in FIGURES))
    return figures


def table(teachers: Mapping[str, Figures], arms: Mapping[str, Sequence[Figures]]) -> str:
    """Make the table: means ± standard deviations over seeds, and Recall@100 against two arms."""
    header = ["", *FIGURES, "Recall@100 against untaught", "against popularity alone"]
    rows = [
        [name, *(f"{figures[key]:.4f}" for key in FIGURES), "", ""]
        for name, figures in teachers.items()
    ]
    recall = {name: [figures["Recall@100"] for figures in seeds] for name, seeds in arms.items()}
    for name, seeds in arms.items():
        values = [[figures[key] for figures in seeds] for key in FIGURES]
        cells = [f"{np.mean(column):.4f} ± {np.std(column, ddof=1):.4f}" for column in values]
        others = [compared(recall[name], recall[arm]) for arm in (UNTAUGHT, CONTROL)]
        rows.append([name, *cells, *others])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(taught: Sequence[float], other: Sequence[float]) -> str:
    """Return the change of the mean and p of a paired t-test."""
    if taught == other:
        return ""
    change = 100 * (np.mean(taught) / np.mean(other) - 1)
    return f"{change:+.1f} %, p = {ttest_rel(taught, other).pvalue:.1g}"


PAGE = """# Two towers for retrieval

What two towers gain from teachers that are too slow to serve, on MovieLens-1M. The script writes
this page; no figure is by hand.

* **Task.** A user likes a movie rated with four stars or more. Of all movies that anyone had rated
  in the first {parts} tenths of the ratings, find those that a user likes in the tenth after them.
  Movies that the user had rated by then are left out of the search. Queries are the {queries:,}
  users who have liked a movie before this cut and like another after it.
* **Student.** TorchRec's two towers, of user id, gender, age, occupation and ZIP code, and of
  title, year and genres; no history. In-batch softmax over liked pairs, corrected for the frequency
  of a movie, in one pass. Its settings are the best without a teacher on the tenth before the last.
* **Teachers.** Each scores a pair before it learns from it, once for all students. The ranker of
  the benchmarks gives a logit, from features of user and movie together. The item-to-item model (a
  linear autoencoder of rank {rank}) reads the user's whole history, and gives two embeddings, whose
  product is its score.
* **Arms.** AH: a head on [u, v] learns the ranker's logits. In-batch, pair logits: a pair counts by
  the probability that the ranker gives it. In-batch, embeddings: the student learns the
  teacher's distribution over the movies of the batch. Popularity alone: the same without the user's
  half; what embeddings gain beyond it comes from knowing users. All pairs of a retrieval log are
  liked. A second head on the label would learn a constant, so there is no such control.
* **Serving.** `export_student` returns the towers, with their own keys. The item tower fills the
  index (FAISS, exact inner products).

Means over {seeds} seeds ± their standard deviation; Recall@100 is compared over them by paired
t-tests. The teachers are the same for all seeds. The ranker was trained to tell which rated movies
are liked, not which of all movies are rated, and it shows where it ranks all of them. A teacher's
own figures are no bound: students have their own loss as well.

{table}

<sub>{command}: {machine}</sub>
"""


def page(task: Task, teachers: Mapping[str, Figures], arms: Mapping[str, Sequence[Figures]]) -> str:
    """Make the text of README.md."""
    packages = ("torch", "torchrec", "numpy", "faiss-cpu")
    versions = [f"python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    return PAGE.format(
        parts=task.parts,
        queries=len(task.queries.rows),
        rank=RANK,
        seeds=len(arms[UNTAUGHT]),
        table=table(teachers, arms),
        command=shlex.join(["python", "examples/retrieval/retrieval.py", *sys.argv[1:]]),
        machine=f"{os.cpu_count()} cores of {platform.machine()}; {', '.join(versions)}",
    )


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="students of each arm, 2 or more")
    parser.add_argument(
        "--validation", action="store_true", help="evaluate on the tenth before the last"
    )
    parser.add_argument("--write", action="store_true", help="write README.md")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds should be 2 or more, for a spread; received {options.seeds}")
    return options


if __name__ == "__main__":
    main()
