"""When does external distillation pay, and how much: the paper's experiments on real streams.

    python benchmarks/quality.py [--quick] [--tune] [--workers N] [--out FOLDER] [--no-run]
                                 [--table ranking] [--ebnerd FOLDER]

One pass in time order, each example scored before it is trained on, figures over weeks 27 and
later, several seeds (a teacher and its students share one). The table Ranking is run where the
folder of EB-NeRD's demo is given, and otherwise stays as it is. Each run of a student is kept in a
file of its own, so that a stopped job goes on where it was. At the end benchmarks/QUALITY.md, its
pictures and measured/quality.json are written from what was measured (with --quick the tables are
printed, and nothing is kept in the repository).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import numpy as np
import passes
import quality_report
import ranking as ranking_report
import torch
from passes import SOURCES, WIDTH, Array
from tqdm import tqdm

from torchrec_exfm import DistillationTerm as Term
from torchrec_exfm import Task
from torchrec_exfm.functional import correct_sampling
from torchrec_exfm.losses import Loss, cosine_of_embeddings, listwise, pairwise

HERE = Path(__file__).parent
KEPT_FILE = HERE / "measured" / "quality.json"
VERTICALS = {  # departments of 50,000 to 250,000 examples; the five largest genres
    "promotions": (
        "MEAT-PCKGD",
        "MEAT",
        "PRODUCE",
        "NUTRITION",
        "DELI",
        "COSMETICS",
        "SEAFOOD-PCKGD",
    ),
    "movielens": ("Comedy", "Action", "Drama", "Horror", "Adventure"),
    "ebnerd": ("front page", "article page"),
}
SWEPT = ("PRODUCE", "DELI", "MEAT-PCKGD")  # verticals of the sweeps, but for that of freshness
TUNED = {
    "promotions": SWEPT,
    "movielens": ("Drama", "Horror", "Adventure"),
    "ebnerd": VERTICALS["ebnerd"],
}
RANKED = {"promotions": ("MEAT-PCKGD",), "ebnerd": VERTICALS["ebnerd"]}
STUDENTS = ("lean", "strong")
SEEDS, SWEEP_SEEDS = tuple(range(5)), tuple(range(3))
DELAYS = (0, 1, 2, 4, 8, 16)
FROZEN_AFTER = 16
SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
WIDTHS = (4, 8, 16, 32, 64)
SMALL_BATCH = 128
OTHER_RATES = (256, 5e-4, 1.0)  # a little better for the lean student than those it is run with
TUNING_SEED = 100
GRID = tuple(itertools.product((256, 512), (5e-4, 1e-3, 2e-3), (0.1, 0.3, 0.5, 1.0)))
KEPT = 0.2  # of the negatives, by the student that samples once more

ARMS: dict[str, tuple[Term, ...]] = {
    "none": (),
    "serving head": (Term(serving=True),),
    "AH": (Term(),),
    "AH + GS": (Term(beta=3.0),),
    "AH + LS": (Term(alpha=1.5),),
    "AH + LW": (Term(weight=2.0),),
    "AH + SA": (Term(), Term(adapted=True)),
    "SA on serving": (Term(adapted=True, serving=True),),
    "AH + SA by margin": (Term(), Term(adapted=True, serving=True, margin=0.25)),
}
RECIPE = "AH + SA by margin"  # what the library advises
RANKING_ARMS = {  # of the table Ranking; heads and weights were chosen before the evaluation
    "recipe + pairwise": (*ARMS[RECIPE], Term(loss=pairwise())),
    "recipe + listwise": (*ARMS[RECIPE], Term(loss=listwise(), weight=0.1)),
    "recipe + calibrated listwise": (
        *ARMS[RECIPE],
        Term(loss=listwise(calibrated=True), weight=0.1),
    ),
    "recipe + representation": (
        *ARMS[RECIPE],
        Term(loss=cosine_of_embeddings(passes.DIRECTIONS), hidden=(), weight=0.1),
    ),
}
VARIANTS = {  # of it, for the sweep over the adapter
    "margin 0.1": (Term(), Term(adapted=True, serving=True, margin=0.1)),
    "margin 0.5": (Term(), Term(adapted=True, serving=True, margin=0.5)),
    "no margin": (Term(), Term(adapted=True, serving=True)),
    "weight 0.5": (Term(), Term(adapted=True, serving=True, margin=0.25, weight=0.5)),
    "weight 2": (Term(), Term(adapted=True, serving=True, margin=0.25, weight=2.0)),
    "AH's weight 0.5": (Term(weight=0.5), Term(adapted=True, serving=True, margin=0.25)),
}
ADAPTERS = ((1e-3, 32), (1e-1, 32), (1e-2, 8), (1e-2, 128))
MAIN = ("none", "serving head", "AH", "AH + SA", RECIPE)


@dataclass(frozen=True)
class Cell:
    """One run of one student.

    Attributes:
        source, vertical: where the examples come from.
        student: "lean" or "strong".
        arm: of `ARMS`, or "teacher": no student, what the teacher itself says.
        seed: of teacher and student.
        feed: how old the teacher is, see `passes.teacher_logits`.
        width: of the teacher's tables.
        shift: added to its logits.
        kept: the share of the stream's negatives that the student trains on.
        corrected: the library is told so.
        rates: in the place of the source's own: batch size, learning rate, that of the tables.
        adapter: the student adapter's learning rate and width.
    """

    source: str
    vertical: str
    student: str
    arm: str
    seed: int
    feed: str = "fresh"
    width: int = WIDTH
    shift: float = 0.0
    kept: float = 1.0
    corrected: bool = False
    rates: tuple[int, float, float] | None = None
    adapter: tuple[float, int] = (1e-2, 32)

    @property
    def name(self) -> str:
        """Of its file: another one for every other cell, and for every change of a setting."""
        told = {**asdict(self), "rates": self.rates or SOURCES[self.source].rates[self.student]}
        terms = [vars(term).copy() for term in terms_of(self.arm)]
        for term in terms:
            if (loss := term.pop("loss")) is not Term().loss:  # that of a term, if not told
                term["loss"] = _told(loss)
        text = json.dumps([told, terms, settings(self.source)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def _told(loss: Loss) -> list[Any]:
    """What a loss is, in words and numbers: its function, what that was given, its width."""
    function = getattr(loss.function, "func", loss.function)
    return [function.__name__, *getattr(loss.function, "args", ()), loss.width]


def settings(source: str) -> dict[str, Any]:
    """What a run rests on beside its cell; of the code nothing is told."""
    features = {name: getattr(SOURCES[source], name) for name in ("lean", "strong", "rich")}
    names = ("TEACHER", "STUDENT", "TEACHER_RATES")
    first = SOURCES[source].first_week, SOURCES[source].tuning_week
    weeks = (*first, FROZEN_AFTER, passes.TEACHER_BATCH)
    formats = (passes.data.FORMAT_VERSION, passes.movielens.FORMAT_VERSION)
    models = {name: getattr(passes.demo, name) for name in names}
    told = {**features, **models, "weeks": weeks, "formats": formats}
    if source == "ebnerd":
        digest = passes.ebnerd.digest(passes.ebnerd_folder())
        told["ebnerd"] = (passes.ebnerd.FORMAT_VERSION, digest)
    return told


def terms_of(arm: str) -> tuple[Term, ...]:
    return {**ARMS, **VARIANTS, **RANKING_ARMS}.get(arm, ())


def said_for(cell: Cell) -> set[str]:
    """What a cell needs of its teacher: what `passes.teacher_logits` calls it."""
    if cell.arm == "none":
        return set()
    taught = any(term.loss.embeddings for term in terms_of(cell.arm))
    return {cell.feed, passes.TAUGHT} if taught else {cell.feed}


def groups(quick: bool) -> list[list[Cell]]:
    """All that the tables need, in the order to run them: the first seeds of a group first."""
    together = (
        ablation(quick, "promotions", MAIN),
        freshness(quick, ("AH", RECIPE)),
        () if quick else ablation(quick, "movielens", ("none", "serving head", "AH", RECIPE)),
        itertools.chain(bias(quick), sampling(quick)),
        () if quick else freshness(quick, ("AH + SA", "serving head")),
        () if quick else adapters(),
        scale(quick),
        () if quick else ablation(quick, "promotions", tuple(ARMS)),
        batches(quick),
    )
    return [sorted(dict.fromkeys(cells), key=lambda cell: cell.seed) for cells in together]


def ablation(quick: bool, source: str, arms: Sequence[str]) -> Iterator[Cell]:
    verticals, seeds = (SWEPT[:2], SEEDS[:2]) if quick else (VERTICALS[source], SEEDS)
    for seed, student, vertical, arm in itertools.product(
        seeds, ("lean", "strong"), verticals, ("teacher", *arms)
    ):
        yield Cell(source, vertical, student, arm, seed)


def sweep(quick: bool, arms: Sequence[str], verticals: Sequence[str] = SWEPT) -> Iterator[Cell]:
    """Cells of the lean student that a sweep changes one thing of."""
    verticals, seeds = (SWEPT[:2], SEEDS[:2]) if quick else (verticals, SWEEP_SEEDS)
    for seed, vertical, arm in itertools.product(seeds, verticals, arms):
        yield Cell("promotions", vertical, "lean", arm, seed)


def bias(quick: bool) -> Iterator[Cell]:
    yield from sweep(quick, ["none"])
    shifts = (0.0, 1.0) if quick else SHIFTS
    for cell in sweep(quick, ["serving head", "AH", "AH + SA", RECIPE]):
        yield from (replace(cell, shift=shift) for shift in shifts)


def freshness(quick: bool, arms: Sequence[str]) -> Iterator[Cell]:
    """Over all verticals, as they differ in how fast a teacher grows old."""
    verticals = VERTICALS["promotions"]
    yield from sweep(quick, ["none"], verticals)
    feeds = ("delay-0", "delay-8") if quick else (*(f"delay-{d}" for d in DELAYS), "frozen")
    for cell in sweep(quick, ["teacher", *arms], verticals):
        yield from (replace(cell, feed=feed) for feed in feeds)


def adapters() -> Iterator[Cell]:
    """What the recipe's second term needs, with the teacher that is oldest."""
    for cell in sweep(False, [RECIPE, *VARIANTS], VERTICALS["promotions"]):
        yield replace(cell, feed="frozen")
    for cell in sweep(False, [RECIPE], VERTICALS["promotions"]):
        yield from (replace(cell, feed="frozen", adapter=adapter) for adapter in ADAPTERS)


def scale(quick: bool) -> Iterator[Cell]:
    if not quick:
        for cell in sweep(quick, ["teacher", "AH", RECIPE]):
            yield from (replace(cell, width=width) for width in WIDTHS)


def sampling(quick: bool) -> Iterator[Cell]:
    for cell in sweep(quick, ["none", "serving head", "AH"]):
        fewer = replace(cell, kept=KEPT)
        yield from (fewer, replace(fewer, corrected=True)) if cell.arm != "none" else (fewer,)


def batches(quick: bool) -> Iterator[Cell]:
    """With a smaller batch, which is better and takes twice the time, and with other rates."""
    if not quick:
        for cell in sweep(quick, ["none", RECIPE]):
            for student in ("lean", "strong"):
                _, *rates = SOURCES[cell.source].rates[student]
                yield replace(cell, student=student, rates=(SMALL_BATCH, *rates))
        for cell in sweep(quick, ["none", "AH", RECIPE], VERTICALS["promotions"]):
            yield replace(cell, rates=OTHER_RATES)


def ranking(quick: bool) -> list[Cell]:
    """What terms over groups add to the recipe."""
    arms = ("teacher", "none", "AH", RECIPE, *RANKING_ARMS)
    cells = [
        Cell(source, vertical, student, arm, seed)
        for source, verticals in RANKED.items()
        for seed, vertical, student, arm in itertools.product(
            SEEDS[:2] if quick else SEEDS, verticals[-1:] if quick else verticals, STUDENTS, arms
        )
    ]
    return sorted(cells, key=lambda cell: cell.seed)


def tuning() -> Iterator[Cell]:
    """The students without a teacher, with other rates; seeds of their own."""
    for source, verticals in TUNED.items():
        if source == "ebnerd" and not os.environ.get("EBNERD"):
            continue
        for student, vertical, rates in itertools.product(("lean", "strong"), verticals, GRID):
            yield Cell(source, vertical, student, "none", seed=TUNING_SEED, rates=rates)


def teach(source: str, width: int, seed: int, feeds: set[str], folder: Path) -> None:
    """Run a teacher, and keep what it says: one file for each age of it, and its directions."""
    stream = passes.stream_of(source)
    used = np.logical_or.reduce(
        [passes.demo.rows_of(stream, vertical) for vertical in VERTICALS[source]]
    )
    logits = passes.teacher_logits(
        stream,
        SOURCES[source].rich,
        seed=seed,
        width=width,
        delays=[int(feed.removeprefix("delay-")) for feed in feeds if feed.startswith("delay-")],
        frozen_after=FROZEN_AFTER if "frozen" in feeds else None,
        scored=used,
        fitted_before=SOURCES[source].tuning_week if passes.TAUGHT in feeds else None,
    )
    for feed, values in logits.items():
        write(
            teacher_file(folder, source, width, seed, feed), lambda file, v=values: np.save(file, v)
        )


def teacher_file(folder: Path, source: str, width: int, seed: int, feed: str) -> Path:
    of_settings = hashlib.sha256(json.dumps(settings(source), sort_keys=True).encode()).hexdigest()
    return folder / "teachers" / f"{source}.{width}.{seed}.{feed}.{of_settings[:12]}.npy"


def run(cell: Cell, folder: Path) -> None:
    """Train a cell's student, and keep its figures."""
    started = time.perf_counter()
    rows, stream = passes.vertical_of(cell.source, cell.vertical)
    teacher = np.full(len(rows), np.nan, np.float32)
    if cell.arm != "none":
        file = teacher_file(folder, cell.source, cell.width, cell.seed, cell.feed)
        teacher = np.load(file, mmap_mode="r")[rows] + np.float32(cell.shift)
    embeddings = None
    if passes.TAUGHT in said_for(cell):
        file = teacher_file(folder, cell.source, cell.width, cell.seed, passes.TAUGHT)
        embeddings = np.load(file, mmap_mode="r")[rows]
    rates = passes.sampling_rates(cell.source)[rows]
    if cell.kept < 1:
        drawn = np.random.default_rng(cell.seed).random(len(stream)) < cell.kept
        chosen = (stream.label == 1) | drawn
        stream, teacher, rates = stream.select(chosen), teacher[chosen], rates[chosen]
        embeddings = None if embeddings is None else embeddings[chosen]
    if cell.arm == "teacher":
        batch_size, *_ = SOURCES[cell.source].rates[cell.student]
        logits = teacher.copy()
        logits[len(logits) // batch_size * batch_size :] = np.nan  # the student drops them too
    else:
        logits = _student(cell, stream, teacher, embeddings)
    there, source = ~np.isnan(logits), SOURCES[cell.source]
    counted = there & (stream.week >= source.first_week)
    early = there & (stream.week < source.first_week) & (stream.week >= source.tuning_week)
    result = {
        **asdict(cell),
        **figures(logits[counted], stream.label[counted]),
        **ranking_report.group_figures(
            logits[counted], stream.label[counted], stream.group[counted]
        ),
        "early_ne": normalized_entropy(logits[early], stream.label[early]),
        "weeks": by_week(logits[counted], stream.label[counted], stream.week[counted]),
        "bins": reliability(logits[counted], stream.label[counted]),
        "unsampled": {
            "stream": unsampled(logits[counted], stream.label[counted], cell.kept),
            "pairs": unsampled(logits[counted], stream.label[counted], cell.kept * rates[counted]),
        },
        "seconds": time.perf_counter() - started,
    }
    write(cell_file(folder, cell), lambda to: to.write(json.dumps(result).encode()))


def _student(cell: Cell, stream: Any, teacher: Array, embeddings: Array | None) -> Array:
    source = SOURCES[cell.source]
    return passes.student_logits(
        stream,
        getattr(source, cell.student),
        cell.rates or source.rates[cell.student],
        seed=cell.seed,
        terms=terms_of(cell.arm),
        teacher=teacher,
        embeddings=embeddings,
        adapter=cell.adapter,
        task=Task(negative_sampling_rate=cell.kept if cell.corrected else 1.0),
    )


def figures(logits: Array, labels: Array) -> dict[str, float]:
    """NE, AUC and calibration."""
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    return {
        "rows": len(y),
        "ne": normalized_entropy(z, y),
        "auc": quality_report.auc(z, y),
        "calibration": float(sigmoid(z).mean() / y.mean()),
    }


def normalized_entropy(logits: Array, labels: Array) -> float:
    """Mean log-loss over the entropy of the mean label."""
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    rate = y.mean()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
    return float(losses(z, y).mean() / entropy)


def losses(z: Array, y: Array) -> Array:
    return np.logaddexp(0, z) - y * z


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def by_week(logits: Array, labels: Array, weeks: Array) -> list[tuple[int, int, float, float]]:
    """For each week: examples, mean loss and mean label."""
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    parts = ((week, weeks == week) for week in np.unique(weeks))
    return [(int(w), int(at.sum()), losses(z[at], y[at]).mean(), y[at].mean()) for w, at in parts]


def reliability(logits: Array, labels: Array) -> list[tuple[float, float, int]]:
    """Mean prediction, mean label and examples of ten equal parts, by prediction."""
    order = np.argsort(logits, kind="stable")
    parts = np.array_split(order, 10)
    p = sigmoid(logits.astype(np.float64))
    return [(p[part].mean(), float(labels[part].mean()), len(part)) for part in parts]


def unsampled(logits: Array, labels: Array, rate: float | Array) -> tuple[float, float]:
    """Calibration as if no negative had been left out: of the logits as they are, and corrected.

    A negative of rate r stands for 1 / r of them.
    """
    stands_for = np.where(labels == 1, 1, 1 / np.asarray(rate, np.float64))
    z = torch.from_numpy(logits.astype(np.float64))
    corrected = correct_sampling(z, rate if isinstance(rate, float) else torch.from_numpy(rate))
    raw, after = (float(stands_for @ sigmoid(x.numpy()) / labels.sum()) for x in (z, corrected))
    return raw, after


def write(path: Path, how: Any) -> None:
    """A file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        how(file)
    draft.replace(path)


def measure(parts: Sequence[Sequence[Cell]], folder: Path, workers: int) -> None:
    """Run what is missing, one part after the other."""
    feeds: dict[tuple[str, int, int], set[str]] = {}
    for cell in itertools.chain(*parts):
        if said := said_for(cell):
            feeds.setdefault((cell.source, cell.width, cell.seed), set()).update(said)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=passes.start
    ) as pool:
        for part in parts:
            teachers = dict.fromkeys((c.source, c.width, c.seed) for c in part if c.arm != "none")
            missing = [
                pool.submit(teach, *teacher, feeds[teacher], folder)
                for teacher in teachers
                if not all(teacher_file(folder, *teacher, f).exists() for f in feeds[teacher])
            ]
            _wait(missing, "teachers")
            cells = [cell for cell in part if not cell_file(folder, cell).exists()]
            _wait([pool.submit(run, cell, folder) for cell in cells], "students")


def finished(parts: Sequence[Sequence[Cell]], folder: Path) -> list[dict[str, Any]]:
    """The figures of the cells that have been run."""
    files = [cell_file(folder, cell) for cell in dict.fromkeys(itertools.chain(*parts))]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def cell_file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _wait(futures: Sequence[Future[None]], name: str) -> None:
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc=name, unit="run"):
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def tune(folder: Path, workers: int) -> None:
    """Print the grid for the students without a teacher, the best first."""
    parts = [list(tuning())]
    measure(parts, folder, workers)
    results = finished(parts, folder)
    sources = dict.fromkeys(r["source"] for r in results)
    for source, student in itertools.product(sources, STUDENTS):
        print(f"\n{source}, {student}: batch, rate, rate of the tables: early NE")
        means = {
            rates: np.mean(
                [
                    r["early_ne"]
                    for r in results
                    if r["source"] == source
                    and r["student"] == student
                    and tuple(r["rates"]) == rates
                ]
            )
            for rates in GRID
        }
        for rates in sorted(means, key=means.__getitem__):
            print(f"{rates}: {means[rates]:.4f}")


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--tune", action="store_true", help="the grid of the student without one")
    parser.add_argument("--table", choices=["ranking"], help="this one alone; others stay")
    parser.add_argument("--ebnerd", type=Path, help="folder of EB-NeRD, for the table Ranking")
    parser.add_argument("--no-run", action="store_true", help="the page from what is there")
    parser.add_argument("--workers", type=int, default=common.cores(), help="processes")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    options = parser.parse_args()
    if options.ebnerd:
        os.environ["EBNERD"] = str(options.ebnerd.absolute())  # for the processes of the pool
    if options.tune:
        return tune(options.out, options.workers)
    parts = [] if options.table else groups(options.quick)
    ranked = [ranking(options.quick)] if options.table or os.environ.get("EBNERD") else []
    if not options.no_run:
        measure([*parts, *ranked], options.out, options.workers)
    kept = {} if options.quick else json.loads(KEPT_FILE.read_text())
    new = measured(parts, options.out)
    if told := measured(ranked, options.out):
        new["ranking"] = told
    kept |= new
    if new and not options.quick:
        KEPT_FILE.write_text(quality_report.as_text(kept))
    table = ranking_report.table(kept["ranking"]) if "ranking" in kept else ()
    if options.table:
        section = "".join(table)
        if not options.quick:  # the others to the letter: they were made of more digits
            file = HERE / "QUALITY.md"
            file.write_text(quality_report.put_section(file.read_text(), section))
        print(section)
    else:
        quality_report.write_page(kept, options.out if options.quick else HERE, table)


def measured(parts: Sequence[Sequence[Cell]], folder: Path) -> dict[str, Any]:
    """What is kept of the cells that have been run; nothing if none has."""
    results = finished(parts, folder)
    planned = len({cell for part in parts for cell in part})
    kept = {"recipe": RECIPE, "planned": planned, "environment": common.environment()}
    return {**kept, "results": results} if results else {}


if __name__ == "__main__":
    main()
