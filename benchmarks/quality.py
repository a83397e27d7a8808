"""When does external distillation pay, and how much: the paper's experiments on real streams.

    python benchmarks/quality.py [--source NAME [--data FOLDER]] [--table NAME ...] [--quick]
                                 [--seeds N] [--tune] [--no-run] [--workers N] [--out FOLDER]

One pass in time order: each example is scored before it is trained on. Figures are over the later
half and several seeds; a teacher and its students share a seed. A stream whose files the user
brings needs its folder, by --data or in the environment (EBNERD=FOLDER).

Each run of a student is kept in a file of its own, so that a stopped job resumes. One that is kept
in measured/quality.json does not run again, unless its settings have changed. At the end
benchmarks/QUALITY.md, its picture and measured/quality.json are written. With --quick the page goes
into the folder --out, and nothing is kept in the repository.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import passes
import quality_page
import quality_report
import ranking as ranking_report
import remembered
import torch
from passes import WIDTH
from quality_report import CONTROL, RECIPE, STUDENTS
from sources import SOURCES, Array, at_hand, demo, rows_of, sampling_rates, source_of, stream_of
from tqdm import tqdm

from torchrec_exfm import DistillationTerm as Term
from torchrec_exfm import Task, study
from torchrec_exfm.functional import correct_sampling
from torchrec_exfm.losses import cosine_of_embeddings, listwise, pairwise
from torchrec_exfm.study import Arm, Study, figures, run_pass
from torchrec_exfm.study.passes import changed_fields, term_in_words
from torchrec_exfm.study.runs import write_whole

HERE = Path(__file__).parent
KEPT_FILE = HERE / "measured" / "quality.json"
RANKED = {"promotions": ("MEAT-PCKGD",)}  # verticals of the table Ranking, if not all
SEEDS, SWEEP_SEEDS = tuple(range(5)), tuple(range(3))
SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
WIDTHS = (4, 8, 16, 32, 64)
SMALL_BATCH = 128
OTHER_RATES = (256, 5e-4, 1.0)  # slightly better for the lean student than its own
TUNING_SEED = 100
GRID = tuple(itertools.product((256, 512), (5e-4, 1e-3, 2e-3), (0.1, 0.3, 0.5, 1.0)))
KEPT = 0.2  # share of the negatives that a student keeps which samples once more


@dataclass(frozen=True)
class Setting(Arm):
    """An arm, and what else the student is trained on.

    Attributes:
        mixed: the teacher's probability is the mean of its own and the label.
        unlabelled: for each example there is one of another vertical, without its label.
        late: the student starts in the tuning week.
        tables: a late student starts with the tables that the teacher has then.
        memory: dense features of earlier "labels", of the "teacher"'s logits, or of both.
        history: the user's last events, pooled: "raw" ids with labels, or the "teacher"'s vectors.
    """

    mixed: bool = False
    unlabelled: bool = False
    late: bool = False
    tables: bool = False
    memory: tuple[str, ...] = ()
    history: str | None = None


AH, ADAPTED = study.ARMS[RECIPE].terms
ARMS: dict[str, Setting] = {
    **{name: Setting(arm.terms, arm.teacher) for name, arm in study.ARMS.items()},
    "AH + GS": Setting((Term(beta=3.0),)),
    "AH + LS": Setting((Term(alpha=1.5),)),
    "AH + LW": Setting((Term(weight=2.0),)),
    "AH + SA": Setting((AH, Term(adapted=True))),
    "SA on serving": Setting((Term(adapted=True, serving=True),)),
}
MECHANISMS = {  # of ExFM's successors
    "AH + label": Setting((Term(weight=2.0),), mixed=True),
    "AH + serving head": Setting((AH, Term(serving=True))),
    "AH, alpha 5, w 10, beta 20": Setting((Term(alpha=5.0, weight=10.0, beta=20.0),)),
    "AH + unlabelled rows": Setting((AH,), unlabelled=True),
    "none, late": Setting(late=True),
    "AH, late": Setting((AH,), late=True),
    "none, late, teacher's tables": Setting(late=True, tables=True),
    "AH, late, teacher's tables": Setting((AH,), late=True, tables=True),
}
RANKING = {  # heads and weights were chosen before the evaluation
    "recipe + pairwise": Setting((AH, ADAPTED, Term(loss=pairwise()))),
    "recipe + listwise": Setting((AH, ADAPTED, Term(loss=listwise(), weight=0.1))),
    "recipe + calibrated listwise": Setting(
        (AH, ADAPTED, Term(loss=listwise(calibrated=True), weight=0.1))
    ),
    "recipe + representation": Setting(
        (AH, ADAPTED, Term(loss=cosine_of_embeddings(passes.DIRECTIONS), hidden=(), weight=0.1))
    ),
}
MEMORY = {  # the control of each is in remembered.CONTROLS
    "label memory": Setting(memory=("labels",)),
    "label memory + AH": Setting((AH,), memory=("labels",)),
    "label and teacher memory + AH": Setting((AH,), memory=("labels", "teacher")),
    "label memory + recipe": Setting((AH, ADAPTED), memory=("labels",)),
    "teacher memory + recipe": Setting((AH, ADAPTED), memory=("teacher",)),
    "label and teacher memory + recipe": Setting((AH, ADAPTED), memory=("labels", "teacher")),
    "raw history + recipe": Setting((AH, ADAPTED), history="raw"),
    "teacher history + recipe": Setting((AH, ADAPTED), history="teacher"),
}
LEAN_MEMORY = [arm for arm in MEMORY if "history" in arm or "+ AH" in arm]  # lean student only
VARIANTS = {  # of the recipe, in the sweep over the adapter
    "margin 0.1": Setting((AH, replace(ADAPTED, margin=0.1))),
    "margin 0.5": Setting((AH, replace(ADAPTED, margin=0.5))),
    "no margin": Setting((AH, replace(ADAPTED, margin=None))),
    "weight 0.5": Setting((AH, replace(ADAPTED, weight=0.5))),
    "weight 2": Setting((AH, replace(ADAPTED, weight=2.0))),
    "AH's weight 0.5": Setting((Term(weight=0.5), ADAPTED)),
}
SECOND, SECOND_ADAPTED = replace(AH, teacher="second"), replace(ADAPTED, teacher="second")
TWO_TEACHERS = {
    "AH of both": Setting((AH, SECOND)),
    "recipe of both": Setting((AH, ADAPTED, SECOND, SECOND_ADAPTED)),
    "recipe, margin alone of the second": Setting((AH, ADAPTED, SECOND_ADAPTED)),
    "AH of both, weight 0.1 of the second": Setting((AH, replace(SECOND, weight=0.1))),
}
SETTINGS = {**ARMS, **MECHANISMS, **RANKING, **MEMORY, **VARIANTS, **TWO_TEACHERS}
ADAPTERS = ((1e-3, 32), (1e-1, 32), (1e-2, 8), (1e-2, 128))
FEWER = ("none", CONTROL, "serving head", "AH", RECIPE)


@dataclass(frozen=True)
class Cell:
    """One run of one student.

    Attributes:
        source, vertical: where the examples come from.
        student: "lean" or "strong".
        arm: of `SETTINGS`, or "teacher": the teacher's own logits, without a student.
        seed: of teacher and student.
        feed: how old the teacher is, see `passes.teacher_logits`.
        width: of the teacher's tables.
        shift: added to the teacher's logits.
        kept: the share of the stream's negatives that the student trains on.
        corrected: whether the task states this share.
        rates: batch size, learning rate, that of the tables; None: the source's own.
        adapter: the student adapter's learning rate and width.
        teacher: "rich"; "strong", the generation before, with the strong student's features;
            "domain", a model with these features that the rich one taught on all verticals, and
            "domain alone", the same untaught; "rich+domain", "rich+noise": two teachers.
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
    teacher: str = "rich"

    @property
    def key(self) -> str:
        """A hash of the cell and of every setting that its result depends on."""
        fields = {**changed_fields(self), "rates": rates_of(self)}
        arm = SETTINGS.get(self.arm, Setting())
        options = {**changed_fields(arm), "terms": [term_in_words(term) for term in arm.terms]}
        if arm.memory or arm.history:
            options["remembered"] = remembered.settings(source_of(self.source))
        text = json.dumps([fields, options, settings(self.source)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def rates_of(cell: Cell) -> tuple[int, float, float]:
    """Return a cell's batch size, learning rate, and that of the tables."""
    source, arm = source_of(cell.source), SETTINGS.get(cell.arm, Setting())
    remembers = cell.student == "lean" and (arm.memory or arm.history)
    usual = source.rates[cell.student]
    return cell.rates or (source.memory_rates if remembers else None) or usual


def settings(source: str) -> dict[str, Any]:
    """Return the settings that a run depends on beside its cell; the code is not among them."""
    values = {name: getattr(source_of(source), name) for name in ("lean", "strong", "rich")}
    values |= {name: getattr(demo, name) for name in ("TEACHER", "STUDENT")}
    names = ("verticals", "teacher_rates", "tuning_week", "first_week", "frozen_after", "hourly")
    values |= {name: getattr(source_of(source), name) for name in names}
    return values | {"version": source_of(source).version()}


class Part(NamedTuple):
    """The cells of a table, and the streams that it is run on."""

    cells: Callable[[str, bool], Iterable[Cell]]
    sources: tuple[str, ...] | None = None  # None: all

    def of(self, source: str, quick: bool) -> list[Cell]:
        """Return the cells of a stream; none if the table is not run on it."""
        cells = self.cells(source, quick) if source in (self.sources or (source,)) else ()
        return list(dict.fromkeys(cells))


def ablation(source: str, quick: bool, arms: Iterable[str] = ARMS) -> Iterator[Cell]:
    verticals = source_of(source).swept[:2] if quick else source_of(source).verticals
    seeds = SEEDS[:2] if quick else SEEDS
    if source not in ("promotions", "ebnerd"):
        arms = [arm for arm in arms if arm in FEWER or arm not in ARMS]
    for seed, student, vertical, arm in itertools.product(
        seeds, STUDENTS, verticals, ("teacher", *arms)
    ):
        if source != "ebnerd" or seed in SWEEP_SEEDS or arm in ("teacher", *FEWER):
            yield Cell(source, vertical, student, arm, seed)


def sweep(
    source: str,
    quick: bool,
    arms: Iterable[str],
    verticals: Sequence[str] = (),
    students: Sequence[str] = STUDENTS[:1],
    **changed: Iterable[Any],
) -> Iterator[Cell]:
    """Yield cells with each combination of the values of the changed fields."""
    verticals = verticals or source_of(source).swept
    verticals, seeds = (verticals[:2], SEEDS[:2]) if quick else (verticals, SWEEP_SEEDS)
    combinations = [
        dict(zip(changed, values, strict=True)) for values in itertools.product(*changed.values())
    ]
    for seed, vertical, student, arm in itertools.product(seeds, verticals, students, arms):
        for fields in combinations:
            yield replace(Cell(source, vertical, student, arm, seed), **fields)


def generations(source: str, quick: bool) -> Iterator[Cell]:
    """Yield cells with the older teacher, for the generation ratio."""
    arms = ("teacher", "AH", RECIPE)
    return sweep(source, quick, arms, students=STUDENTS, teacher=["strong"])


def mechanisms(source: str, quick: bool) -> Iterator[Cell]:
    return sweep(source, quick, MECHANISMS, students=STUDENTS)


def bias(source: str, quick: bool) -> Iterator[Cell]:
    yield from sweep(source, quick, ["none"])
    arms = ["serving head", "AH", RECIPE, *(["AH + SA"] if source == "promotions" else [])]
    yield from sweep(source, quick, arms, shift=(0.0, 1.0) if quick else SHIFTS)


def freshness(source: str, quick: bool) -> Iterator[Cell]:
    """Yield cells of all verticals, as they differ in how fast a teacher grows old."""
    verticals = source_of(source).verticals
    yield from sweep(source, quick, ["none"], verticals)
    feeds = [*(f"delay-{delay}" for delay in source_of(source).delays), "frozen"]
    arms = ["teacher", "AH", RECIPE]
    if source == "promotions" and not quick:
        arms += ["AH + SA", "serving head"]
    yield from sweep(source, quick, arms, verticals, feed=(feeds[0], feeds[-2]) if quick else feeds)


def adapters(source: str, quick: bool) -> Iterator[Cell]:
    """Yield variants of the recipe's second term, with the oldest teacher."""
    verticals, late = source_of(source).verticals, ["frozen"]
    yield from sweep(source, quick, [RECIPE, *VARIANTS], verticals, feed=late)
    yield from sweep(source, quick, [RECIPE], verticals, feed=late, adapter=ADAPTERS)


def scale(source: str, quick: bool) -> Iterator[Cell]:
    return sweep(source, quick, ["teacher", "AH", RECIPE], width=WIDTHS)


def sampling(source: str, quick: bool) -> Iterator[Cell]:
    yield from sweep(source, quick, ["none"], kept=[KEPT])
    arms = ["serving head", "AH"]
    yield from sweep(source, quick, arms, kept=[KEPT], corrected=[False, True])


def ranking(source: str, quick: bool) -> Iterator[Cell]:
    """Yield the recipe with terms over groups."""
    verticals = RANKED.get(source, source_of(source).verticals)
    arms = ("none", "AH", RECIPE, *RANKING)
    cells = sweep(source, quick, arms, verticals, STUDENTS, seed=SEEDS)
    return iter(dict.fromkeys(cells))


def memory(source: str, quick: bool) -> Iterator[Cell]:
    """Yield students with memories of labels and of the teacher's logits."""
    arms = ("teacher", "none", "AH", RECIPE, *MEMORY)
    verticals = source_of(source).verticals if source == "ebnerd" else ()
    for cell in sweep(source, quick, arms, verticals, STUDENTS, seed=SEEDS):
        if cell.student == "lean" or cell.arm not in LEAN_MEMORY:
            yield cell


def hierarchy(source: str, quick: bool) -> Iterator[Cell]:
    """Yield cells with a model between teacher and student, which is both."""
    yield from sweep(source, quick, ["none"], students=STUDENTS)
    arms, teachers = ("teacher", "AH", RECIPE), ("rich", "domain", "domain alone")
    yield from sweep(source, quick, arms, students=STUDENTS, teacher=teachers)
    arms = ("AH of both", "recipe of both")
    yield from sweep(source, quick, arms, students=STUDENTS, teacher=["rich+domain"])


def noise(source: str, quick: bool) -> Iterator[Cell]:
    """Yield cells with a second teacher that knows nothing."""
    yield from sweep(source, quick, ["none", "AH", RECIPE], students=STUDENTS)
    yield from sweep(source, quick, TWO_TEACHERS, students=STUDENTS, teacher=["rich+noise"])


def batches(source: str, quick: bool) -> Iterator[Cell]:
    """Yield cells with a smaller batch, which is better but twice as slow, and with other rates."""
    for student in STUDENTS:
        rates = (SMALL_BATCH, *source_of(source).rates[student][1:])
        yield from sweep(source, quick, ["none", RECIPE], students=[student], rates=[rates])
    verticals = source_of(source).verticals
    yield from sweep(source, quick, ["none", "AH", RECIPE], verticals, rates=[OTHER_RATES])


def tuning(source: str, quick: bool) -> Iterator[Cell]:
    """Yield students without a teacher over a grid of rates, with a seed of their own."""
    cells = sweep(source, quick, ["none"], students=STUDENTS, seed=[TUNING_SEED], rates=GRID)
    return iter(dict.fromkeys(cells))


OURS = ("promotions", "movielens", "ebnerd")
PARTS = {  # in the order in which they run
    "ablation": Part(ablation),
    "bias": Part(bias, ("promotions", "ebnerd")),
    "freshness": Part(freshness, ("promotions", "ebnerd")),
    "generations": Part(generations, OURS),
    "mechanisms": Part(mechanisms, OURS),
    "ranking": Part(ranking, ("promotions", "ebnerd")),
    "memory": Part(memory, OURS),
    "hierarchy": Part(hierarchy, ("promotions",)),
    "noise": Part(noise, ("promotions",)),
    "adapters": Part(adapters, ("promotions",)),
    "scale": Part(scale, ("promotions",)),
    "sampling": Part(sampling, ("promotions",)),
    "batches": Part(batches, ("promotions",)),
}
QUICK = ("ablation", "bias", "freshness", "mechanisms")


class Teacher(NamedTuple):
    """One pass of one teacher."""

    source: str
    kind: str
    width: int
    seed: int

    def file(self, folder: Path, feed: str) -> Path:
        text = json.dumps(settings(self.source), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        name = ".".join(map(str, (*self, feed, digest, "npz" if feed == passes.TABLES else "npy")))
        return folder / "teachers" / name.replace(" ", "-")


def feeds_for(cell: Cell) -> dict[Teacher, set[str]]:
    """Return the outputs that a cell needs of each teacher, by their names in `teacher_logits`."""
    arm = SETTINGS.get(cell.arm, Setting())
    feeds = {passes.TABLES} if arm.tables else set()
    if cell.arm == "teacher" or (arm.terms and arm.teacher == "teacher"):
        feeds |= {cell.feed}
    if "teacher" in arm.memory:
        feeds |= {cell.feed}
    if arm.history or any(term.loss.embeddings for term in arm.terms):
        feeds |= {passes.TAUGHT}
    kinds = [kind for kind in cell.teacher.split("+") if kind != "noise"]
    return {Teacher(cell.source, k, cell.width, cell.seed): feeds for k in kinds if feeds}


def teach(teacher: Teacher, feeds: set[str], folder: Path) -> None:
    """Run a teacher, and keep its outputs: a file for each age, directions and tables."""
    source, stream = source_of(teacher.source), stream_of(teacher.source)
    rows = rows_of(teacher.source, *source.verticals)
    if teacher.kind.startswith("domain"):
        outputs: dict[str, Any] = {"fresh": domain_logits(teacher, rows, folder)}
    else:
        scored = np.zeros(len(stream), bool)
        scored[rows] = True
        needs_past = {passes.TAUGHT, passes.TABLES} & feeds
        ages = [feed.removeprefix("delay-") for feed in feeds if feed.startswith("delay-")]
        outputs = passes.teacher_logits(
            stream,
            getattr(source, teacher.kind),
            source.teacher_rates,
            seed=teacher.seed,
            width=teacher.width,
            delays=list(map(int, ages)),
            frozen_after=source.frozen_after if "frozen" in feeds else None,
            scored=scored,
            kept_before=source.tuning_period if needs_past else None,
            periods=source.periods(stream),
        )
    for feed, values in outputs.items():
        save = np.savez if feed == passes.TABLES else np.save
        arrays = values if feed == passes.TABLES else {"arr": values}
        write_whole(teacher.file(folder, feed), lambda to, s=save, a=arrays: s(to, **a))


def domain_logits(teacher: Teacher, rows: Array, folder: Path) -> Array:
    """Return the logits of a model between teacher and students, (B,); NaN in other verticals."""
    source, stream = source_of(teacher.source), stream_of(teacher.source)
    above = np.load(teacher._replace(kind="rich").file(folder, "fresh"), mmap_mode="r")
    domain = passes.study_of(
        stream.select(rows),
        source.strong,
        source.teacher_rates,
        teacher=above[rows],
        sizes=demo.TEACHER,
    )
    arm = ARMS["none" if teacher.kind == "domain alone" else "AH"]
    scored = run_pass(domain, arm, teacher.seed).logits[:, 0]
    logits = np.full(len(stream), np.nan, np.float32)
    logits[rows[: len(scored)]] = scored
    return logits


def outputs_of(cell: Cell, rows: Array, folder: Path) -> Array:
    """Return the logits of a cell's teachers, (B, M)."""
    columns = []
    for kind in cell.teacher.split("+"):
        if kind == "noise":
            random = np.random.default_rng(cell.seed)
            columns.append(random.normal(-2, 1, len(rows)).astype(np.float32))
            continue
        file = Teacher(cell.source, kind, cell.width, cell.seed).file(folder, cell.feed)
        columns.append(np.load(file, mmap_mode="r")[rows] + np.float32(cell.shift))
    return np.stack(columns, 1)


def study_of(cell: Cell, folder: Path) -> tuple[Study, Any, Array]:
    """Return a cell's student with its teacher, its examples, and their rows in the stream."""
    source, arm = source_of(cell.source), SETTINGS.get(cell.arm, Setting())
    rows, labelled = training_rows(cell)
    stream = stream_of(cell.source).select(rows)
    options = student_options(cell, rows, stream.label, folder)
    batch_size, *rates = rates_of(cell)
    if arm.unlabelled:
        labels = np.where(np.isin(rows, labelled), stream.label, np.nan).astype(np.float32)
        stream = replace(stream, label=labels)
        batch_size *= 2  # as many labels in a step as without the unlabelled rows
    student = passes.study_of(
        stream,
        getattr(source, cell.student),
        (batch_size, *rates),
        adapter=cell.adapter,
        task=Task(negative_sampling_rate=cell.kept if cell.corrected else 1.0),
        first_week=source.first_week,
        **options,
    )
    return student, stream, rows


def training_rows(cell: Cell) -> tuple[Array, Array]:
    """Return the stream's rows that a student trains on, and those that have labels."""
    source, arm = source_of(cell.source), SETTINGS.get(cell.arm, Setting())
    stream = stream_of(cell.source)
    random = np.random.default_rng(cell.seed)
    rows = rows_of(cell.source, cell.vertical)
    if cell.kept < 1:
        drawn = random.random(len(rows)) < cell.kept
        rows = rows[(np.asarray(stream.label)[rows] == 1) | drawn]
    labelled = rows
    if arm.unlabelled:
        others = np.setdiff1d(rows_of(cell.source, *source.verticals), rows)
        count = min(len(others), len(rows))
        rows = np.union1d(rows, random.choice(others, count, replace=False))
    if arm.late:
        rows = rows[np.asarray(stream.week)[rows] >= source.tuning_week]
    return rows, labelled


def student_options(cell: Cell, rows: Array, labels: Array, folder: Path) -> dict[str, Any]:
    """Return what `passes.study_of` gets from a cell's teachers and memories, for some rows."""
    arm, needed = SETTINGS.get(cell.arm, Setting()), feeds_for(cell)
    options: dict[str, Any] = {}
    if any(cell.feed in feeds for feeds in needed.values()):
        options["teacher"] = outputs_of(cell, rows, folder)
    if arm.mixed:
        options["teacher"] = mixed(options["teacher"], labels)
    if arm.memory:
        columns = [aggregates_of(cell, kind, rows, folder) for kind in arm.memory]
        options["memory"] = np.concatenate(columns, axis=1)
    if arm.history:
        options["history"] = history_of(cell, arm.history, rows, folder)
    for teacher, feeds in needed.items():
        if passes.TAUGHT in feeds and not arm.history:
            directions = np.load(teacher.file(folder, passes.TAUGHT), mmap_mode="r")
            options["embeddings"] = directions[rows]
        if passes.TABLES in feeds:
            options["taught_tables"] = dict(np.load(teacher.file(folder, passes.TABLES)))
    return options


def aggregates_of(cell: Cell, kind: str, rows: Array, folder: Path) -> Array:
    """Return dense features of a memory of "labels" or of the "teacher"'s logits, for some rows."""
    teacher = Teacher(cell.source, cell.teacher, cell.width, cell.seed)
    if kind == "labels":
        return remembered_rows(teacher._replace(seed=0), kind, rows, folder, remembered.aggregates)
    logits = np.load(teacher.file(folder, cell.feed), mmap_mode="r")
    make = partial(remembered.aggregates, logits=logits)
    return remembered_rows(teacher, f"{kind}-{cell.feed}", rows, folder, make)


def history_of(cell: Cell, kind: str, rows: Array, folder: Path) -> tuple[Array, Array]:
    """Return the rows of the user's last events, and a vector or id of each row of the stream."""
    source, stream = source_of(cell.source), stream_of(cell.source)
    teacher = Teacher(cell.source, cell.teacher, cell.width, cell.seed)
    taught = np.load(teacher.file(folder, passes.TAUGHT), mmap_mode="r")
    # Both kinds have the same events: those with a vector of the teacher
    make = partial(remembered.histories, events=~np.isnan(taught[:, 0]))
    places = remembered_rows(teacher._replace(seed=0), "history", rows, folder, make)
    if kind == "raw":
        item = source.memory_keys[1][0]
        taught = 2 * stream.sparse[item].astype(np.int64) + (np.asarray(stream.label) == 1)
    return places, taught


def remembered_rows(
    teacher: Teacher, kind: str, rows: Array, folder: Path, make: Callable[..., Array]
) -> Array:
    """Return some rows of features that are made for all verticals once, and kept in a file."""
    source, stream = source_of(teacher.source), stream_of(teacher.source)
    text = json.dumps(remembered.settings(source))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    file = teacher.file(folder, f"memory-{kind}-{digest}")
    examples = rows_of(teacher.source, *source.verticals)
    if not file.exists():
        is_example = np.zeros(len(stream), bool)
        is_example[examples] = True
        features = make(source, stream, is_example)
        write_whole(file, lambda to: np.save(to, features))
    return np.asarray(np.load(file, mmap_mode="r")[np.searchsorted(examples, rows)])


def mixed(logits: Array, labels: Array) -> Array:
    """Return the logit of the mean of a teacher's probability and the label."""
    p = (1 / (1 + np.exp(-logits.astype(np.float64))) + labels[:, None]) / 2
    return (np.log(p) - np.log1p(-p)).astype(np.float32)


def run(cell: Cell, folder: Path) -> None:
    """Train a cell's student, and keep its figures."""
    student, stream, rows = study_of(cell, folder)
    source = source_of(cell.source)
    if cell.arm == "teacher":
        logits = outputs_of(cell, rows, folder)[:, 0]
        batch_size = source.rates[cell.student][0]
        logits = logits[: len(logits) // batch_size * batch_size]  # as a student drops the rest
    else:
        logits = run_pass(student, SETTINGS[cell.arm], cell.seed).logits[:, 0]
    stream, rates = stream.select(slice(0, len(logits))), sampling_rates(cell.source)[rows]
    usable = ~np.isnan(stream.label)
    if cell.arm == "teacher":  # a student's NaN must count: it diverged
        usable &= ~np.isnan(logits)
    counted = usable & (stream.week >= source.first_week)
    early = usable & (stream.week < source.first_week) & (stream.week >= source.tuning_week)
    z, y = logits[counted], stream.label[counted]
    result = {
        **asdict(cell),
        "key": cell.key,
        **figures(z, y),
        **ranking_report.group_figures(z, y, stream.group[counted]),
        "early_ne": figures(logits[early], stream.label[early])["ne"],
    }
    if cell.kept < 1:
        result["unsampled"] = {
            "stream": unsampled(z, y, cell.kept),
            "pairs": unsampled(z, y, cell.kept * rates[: len(logits)][counted]),
        }
    write_whole(cell_file(folder, cell), lambda to: to.write(json.dumps(result).encode()))


def sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def unsampled(logits: Array, labels: Array, rate: float | Array) -> tuple[float, float]:
    """Return calibration as if no negative had been left out: of raw and of corrected logits.

    A negative that was kept at rate r counts 1 / r times.
    """
    weights = np.where(labels == 1, 1, 1 / np.asarray(rate, np.float64))
    z = torch.from_numpy(logits.astype(np.float64))
    corrected = correct_sampling(z, rate if isinstance(rate, float) else torch.from_numpy(rate))
    raw, after = (float(weights @ sigmoid(x.numpy()) / labels.sum()) for x in (z, corrected))
    return raw, after


def measure(parts: Sequence[Sequence[Cell]], folder: Path, workers: int) -> None:
    """Run the missing cells, part by part, the first seeds of each part first."""
    needed: dict[Teacher, set[str]] = {}
    for cell in itertools.chain(*parts):
        for teacher, feeds in feeds_for(cell).items():
            needed.setdefault(teacher, set()).update(feeds)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=passes.start
    ) as pool:
        for part in parts:
            cells = [cell for cell in part if not cell_file(folder, cell).exists()]
            wanted = {teacher for cell in cells for teacher in feeds_for(cell)}
            wanted |= {t._replace(kind="rich") for t in wanted if t.kind.startswith("domain")}
            for domain in (False, True):  # a domain model learns from the rich teacher's outputs
                teachers = [t for t in sorted(wanted) if t.kind.startswith("domain") == domain]
                missing = [t for t in teachers if not _exists(t, needed.get(t, set()), folder)]
                jobs = [pool.submit(teach, t, needed.get(t, {"fresh"}), folder) for t in missing]
                _wait(jobs, "teachers")
            cells.sort(key=lambda cell: cell.seed)
            _wait([pool.submit(run, cell, folder) for cell in cells], "students")


def _exists(teacher: Teacher, feeds: set[str], folder: Path) -> bool:
    return all(teacher.file(folder, feed).exists() for feed in feeds or {"fresh"})


def finished(cells: Iterable[Cell], folder: Path) -> list[dict[str, Any]]:
    """Return the results of the cells that have run."""
    files = [cell_file(folder, cell) for cell in dict.fromkeys(cells)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def cell_file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.key}.json"


def _wait(futures: Sequence[Future[None]], name: str) -> None:
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc=name, unit="run"):
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def tune(sources: Sequence[str], folder: Path, workers: int) -> None:
    """Print the grid of rates for the students without a teacher, the best first."""
    cells = [cell for source in sources for cell in tuning(source, False)]
    measure([cells], folder, workers)
    results = finished(cells, folder)
    for source, student in itertools.product(sources, STUDENTS):
        print(f"\n{source}, {student}: batch, rate, rate of the tables: early NE")
        by_rates: dict[tuple[float, ...], list[float]] = {}
        for r in results:
            if (r["source"], r["student"]) == (source, student):
                by_rates.setdefault(tuple(r["rates"]), []).append(r["early_ne"])
        for rates, values in sorted(by_rates.items(), key=lambda item: np.mean(item[1])):
            print(f"{rates}: {np.mean(values):.4f}")


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--source", choices=SOURCES, help="this stream alone")
    parser.add_argument("--data", type=Path, help="folder of its published files")
    parser.add_argument("--table", nargs="+", choices=PARTS, help="these tables alone")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="the first of them alone")
    parser.add_argument("--tune", action="store_true", help="the grid of rates without a teacher")
    parser.add_argument("--no-run", action="store_true", help="write the page from kept results")
    parser.add_argument("--workers", type=int, default=common.cores(), help="processes")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    options = parser.parse_args()
    if options.data and not options.source:
        parser.error("--data should come with the --source that it is of; received none")
    if options.data:
        os.environ[options.source.upper()] = str(options.data.absolute())  # for the pool too
    sources = [options.source] if options.source else at_hand()
    if options.tune:
        return tune(sources, options.out, options.workers)
    names = options.table or (QUICK if options.quick else PARTS)
    parts = [
        [cell for cell in PARTS[name].of(source, options.quick) if cell.seed < options.seeds]
        for name in names
        for source in sources
    ]
    stored = {} if options.quick else json.loads(KEPT_FILE.read_text())
    keys = {result["key"] for result in stored.get("results", ())}
    if not options.no_run:
        new = [[cell for cell in part if cell.key not in keys] for part in parts]
        measure(new, options.out, options.workers)
    cells = [cell for part in PARTS.values() for s in sources for cell in part.of(s, options.quick)]
    cells = [*itertools.chain(*parts)] if options.quick else cells
    results, planned = finished(cells, options.out), {cell: cell.key for cell in cells}
    text = quality_report.merged(stored, results, planned, common.environment())
    folder = options.out if options.quick else HERE
    if not options.quick:
        write_whole(KEPT_FILE, lambda to: to.write(text.encode()))
    print(show(json.loads(text), folder))


def show(stored: dict[str, Any], folder: Path) -> str:
    """Write the page and its picture; return the page."""
    return quality_page.write_page(
        stored,
        folder,
        ranking=lambda results: ranking_report.table(results, list(RANKING)),
        memory=remembered.table,
        names={"variants": VARIANTS, "mechanisms": MECHANISMS, "two teachers": TWO_TEACHERS},
    )


if __name__ == "__main__":
    main()
