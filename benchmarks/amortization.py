"""What N students of one teacher cost in all, with stored outputs or a live teacher for each.

    python benchmarks/amortization.py [--json] [--quick]

Three ways. Logged: the teacher scores the examples once, score() stores its outputs, and the
students train from the store. Co-distillation: each student's loop runs the teacher (LiveTeacher).
A teacher for each: every student has its own, whose training logs its outputs (TeacherLogger).

The top level is of the largest N; "by_students" in the details has all.
saved_over_codistillation: 1 - seconds of the logged way / seconds of co-distillation.
saved_over_a_teacher_for_each: the same against a teacher for each; the shared one comes trained.
..._with_teacher: the training of the one shared teacher is counted in.
saved_overhead: 1 - what the logged way adds to plain training / what co-distillation adds.
saved_if_logged_in_training: as the first; the shared teacher's own training wrote the outputs.
extra_over_plain: seconds of the logged way / those of as many plain students, - 1.
teacher_over_student: what the live teacher adds to a student's step, over the step from the store.
limit: what is saved over co-distillation in the limit of large N.
students_to_break_even, students_to_save_claim: the smallest N that saves anything over
    co-distillation, or more than the claim, in more than half of the rounds.
added_up: the seconds of one pass and N students as they ran.

All students see the same examples. A round trains a student of each kind and a teacher, all new,
over all rows, and scores the rows into a new store. Figures are taken round by round. Models and
batches are made beforehand and not timed. One thread computes; others write and look up. Seconds
are for a million examples of each student: of all threads on a CPU, by the clock on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import common
import numpy as np
import torch
import training
from reference import SNAPSHOT, TEACHER, WINDOW, Stream, dlrm, sharded
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import LiveTeacher
from torchrec_exfm.das import Shard, TeacherLogger, TeacherLookup, TeacherStore, score

BATCH, STUDENTS = 8192, (1, 2, 4, 8)
CLAIM = 0.4  # "40 % less training overhead", in a summary of the paper
CLOCKS = ("by_the_clock", "of_all_threads")
WAYS = ("plain", "logged", "codistillation", "teacher_for_each")
SAVED = "saved_over_codistillation"
COMPARED = {
    SAVED: ("logged", "codistillation"),
    f"{SAVED}_with_teacher": ("logged_with_teacher", "codistillation_with_teacher"),
    "saved_over_a_teacher_for_each": ("logged", "teacher_for_each"),
    "saved_over_a_teacher_for_each_with_teacher": ("logged_with_teacher", "teacher_for_each"),
    "saved_overhead": ("logged_overhead", "codistillation_overhead"),
    "saved_if_logged_in_training": ("logged_in_training", "codistillation"),
}
AIMS = {SAVED: "grows with N"}

Job: TypeAlias = Callable[[], None]


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(measure(options.quick), options.json, AIMS)


def measure(quick: bool) -> dict[str, Any]:
    run = training.on_ranks(1, run_in_rounds, quick)
    times = {part: np.array(pairs) * 1e6 / run["rows"] for part, pairs in run.pop("times").items()}
    clock = CLOCKS[run["device"] == "cpu"]
    compared = compare(costs({part: t[:, CLOCKS.index(clock)] for part, t in times.items()}))
    last, limits = compared["by_students"][str(STUDENTS[-1])], compared["limits"][SAVED]
    return {
        "students": STUDENTS[-1],
        **{name: last[name]["median"] for name in COMPARED},
        "extra_over_plain": last["extra_over_plain"]["logged"]["median"],
        "teacher_over_student": compared["teacher_over_student"]["median"],
        **{**limits, "limit": limits["limit"]["median"]},
        "details": {
            **run,
            "claim": CLAIM,
            "seconds_are": clock,
            "parts": {
                part: {name: common.spread(t[:, i]) for i, name in enumerate(CLOCKS)}
                for part, t in times.items()
            },
            **compared,
        },
    }


def run_in_rounds(device: torch.device, folder: str, quick: bool) -> dict[str, Any]:
    """Return the times of the parts, each round in another order; a small round warms up."""
    torch.set_num_threads(1)
    batches = {"cpu": (4, 2), "cuda": (128, 32)}[device.type][quick]
    rounds = 2 if quick else STUDENTS[-1]
    take_rounds(Bench(device, f"{folder}/warm", BATCH), 1)
    times = take_rounds(Bench(device, folder, batches * BATCH), rounds)
    sizes = {"rows": batches * BATCH, "batch": BATCH, "rounds": rounds}
    return {**sizes, "device": device.type, "times": times}


def take_rounds(bench: Bench, rounds: int) -> dict[str, list[common.Time]]:
    times: dict[str, list[common.Time]] = {part: [] for part in bench.parts}
    for turn in range(rounds):
        for part in np.roll(list(times), -turn).tolist():
            job = bench.parts[part]()
            gc.collect()
            times[part].append(common.timed(finish, job, bench.device))
    return times


def finish(job: Job, device: torch.device) -> None:
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """The parts of all ways. Each makes its models, and returns the job to time."""

    def __init__(self, device: torch.device, folder: str, rows: int) -> None:
        self.device = device
        self.folder = folder
        self.stores = itertools.count()
        stream = Stream(rows)
        self.batches = [stream.batch(at) for at in torch.arange(rows).split(BATCH)]
        self.teacher, _ = sharded(dlrm(TEACHER), device)
        self.scored = self.new_store()
        self.score(self.scored)
        self.parts: dict[str, Callable[[], Job]] = {
            "plain": lambda: partial(self.train, training.plain(device)),
            "from_store": lambda: self.student(TeacherLookup(self.scored, "fm")),
            "with_live_teacher": lambda: self.student(LiveTeacher(self.teacher)),
            "pass_of_teacher": lambda: partial(self.score, self.new_store()),
            "teacher": lambda: partial(self.train, training.plain(device, TEACHER)),
            "teacher_that_logs": self.teacher_that_logs,
        }

    def new_store(self) -> TeacherStore:
        url = f"{self.folder}/{next(self.stores)}"
        return TeacherStore.create(url, window_seconds=WINDOW)

    def student(self, teacher: TeacherLookup | LiveTeacher) -> Job:
        return partial(self.train, training.exfm(self.device, teacher=teacher))

    def teacher_that_logs(self) -> Job:
        model, optimizer = sharded(dlrm(TEACHER), self.device)
        logger = TeacherLogger(self.new_store(), "fm")
        logger.attach(model)
        pipeline = TrainPipelineSparseDist(model, optimizer, self.device)
        return partial(self.train, pipeline, logger.close)

    def train(self, pipeline: Any, close: Job = lambda: None) -> None:
        feed = iter(self.batches)
        with contextlib.suppress(StopIteration):
            while True:
                pipeline.progress(feed)
        close()

    def score(self, store: TeacherStore) -> None:
        shard = Shard("all", lambda: self.batches)
        options: Any = {"device": self.device, "progress": False}
        score(self.teacher, store, [shard], SNAPSHOT, **options)


class Cost(NamedTuple):
    """The seconds of N students in each round, (rounds,): spent once, and on each of them."""

    once: Any
    each: Any

    def of(self, students: int) -> Any:
        return self.once + students * self.each

    def added_up(self, students: int) -> float:
        """Add up the students of successive rounds, and what the first round spent once."""
        return common.rounded(self.once[0] + self.each[:students].sum())


def costs(parts: dict[str, Any]) -> dict[str, Cost]:
    """Return the costs of the ways, from the seconds of the parts in each round."""
    plain, stored, live, scored, teacher, logging = (np.asarray(parts[p]) for p in parts)
    return {
        "plain": Cost(0 * plain, plain),
        "logged": Cost(scored, stored),
        "logged_with_teacher": Cost(scored + teacher, stored),
        "logged_in_training": Cost(logging - teacher, stored),
        "logged_overhead": Cost(scored, stored - plain),
        "codistillation": Cost(0 * live, live),
        "codistillation_with_teacher": Cost(teacher, live),
        "codistillation_overhead": Cost(0 * live, live - plain),
        "teacher_for_each": Cost(0 * logging, logging + stored),
    }


def compare(costs: dict[str, Cost]) -> dict[str, Any]:
    """Return what follows from the costs: limits as N grows, and figures for each N."""
    pairs = {name: (costs[way], costs[other]) for name, (way, other) in COMPARED.items()}
    return {
        "teacher_over_student": common.spread(
            costs["codistillation"].each / costs["logged"].each - 1
        ),
        "limits": {
            name: {
                "limit": common.spread(1 - way.each / other.each),
                "students_to_break_even": students_to_save(0.0, way, other),
                "students_to_save_claim": students_to_save(CLAIM, way, other),
            }
            for name, (way, other) in pairs.items()
        },
        "by_students": {
            str(n): {
                "seconds": {way: common.spread(costs[way].of(n)) for way in WAYS},
                "added_up": {
                    way: costs[way].added_up(n) for way in WAYS if n <= len(costs[way].each)
                },
                "extra_over_plain": {
                    way: common.spread(costs[way].of(n) / costs["plain"].of(n) - 1)
                    for way in WAYS[1:]
                },
                **{
                    name: common.spread(1 - way.of(n) / other.of(n))
                    for name, (way, other) in pairs.items()
                },
            }
            for n in STUDENTS
        },
    }


def students_to_save(share: float, way: Cost, other: Cost) -> int | str:
    """Return the smallest N that saves more than a share of the other way in most rounds."""
    gain = (1 - share) * other.each - way.each
    lead = way.once - (1 - share) * other.once
    needed = [max(1, a // b + 1) if b > 0 else np.inf for a, b in zip(lead, gain, strict=True)]
    in_most = sorted(needed)[len(needed) // 2]
    return "never" if np.isinf(in_most) else int(in_most)


def markdown(result: dict[str, Any]) -> str:
    return "\n\n".join(part(result["details"]) for part in (describe_parts, as_table, conclude))


def describe_parts(details: dict[str, Any]) -> str:
    """Return what is compared, and what the parts take that the table adds up."""
    part = {
        name: f"{common.cell(clocks[details['seconds_are']])} s"
        for name, clocks in details["parts"].items()
    }
    ran = {n: row for n, row in details["by_students"].items() if row["added_up"]}
    most, last = list(ran.items())[-1]
    added_up, medians = last["added_up"], last["seconds"]
    return (
        "Ways to teach N students: *plain* (no teacher), *logged* (the teacher's pass is stored "
        "once, the students look it up), *codistillation* (each student's loop runs the teacher), "
        "and *a teacher for each*. *With teacher* counts in the shared teacher's training. *If "
        "logged in training*: that training itself wrote the outputs.\n\n"
        f"All students see the same {details['rows']:,} examples, the most that they can overlap. "
        f"One rank on {details['device']}, one thread, batches of {details['batch']:,}, medians "
        f"and quartiles of {details['rounds']} rounds. Seconds are "
        f"{details['seconds_are'].replace('_', ' ')}, for a million examples of each student:\n\n"
        f"* a plain student takes {part['plain']}, one from the store {part['from_store']}, one "
        f"that asks the teacher {part['with_live_teacher']};\n"
        f"* the teacher's pass takes {part['pass_of_teacher']};\n"
        f"* its training takes {part['teacher']}, or {part['teacher_that_logs']} if it logs.\n\n"
        f"The table adds these up, round by round. One pass and {most} students, as they ran, took "
        f"{added_up['logged']:,.4g} s in all, {medians['logged']['median']:,.4g} s by the median. "
        f"{most} that asked the teacher took {added_up['codistillation']:,.4g} s, "
        f"{medians['codistillation']['median']:,.4g} s by the median."
    )


def as_table(details: dict[str, Any]) -> str:
    by_n, blank = details["by_students"].values(), [""] * 3
    rows = [[f"{way}, seconds", *(row["seconds"][way] for row in by_n), *blank] for way in WAYS]
    for way in WAYS[1:]:
        extra = [row["extra_over_plain"][way] for row in by_n]
        rows.append([f"{way} over plain, - 1", *extra, *blank])
    for name, limits in details["limits"].items():
        rows.append([name, *(row[name] for row in by_n), *limits.values()])
    header = ["", *(f"N = {n}" for n in details["by_students"]), "limit", "any from N"]
    named = [[row[0].replace("_", " "), *row[1:]] for row in rows]
    return common.table([*header, f"over {details['claim']:.0%} from N"], named)


def conclude(details: dict[str, Any]) -> str:
    """Return what the table says of the claim, and what it depends on."""
    claim, limits, ratio = (details[name] for name in ("claim", "limits", "teacher_over_student"))
    saved = {n: f"{row[SAVED]['median']:.0%}" for n, row in details["by_students"].items()}
    (first, at_first), *_, (last, at_last) = saved.items()
    passes = {name: from_n(row["students_to_save_claim"]) for name, row in limits.items()}
    limit = limits[SAVED]["limit"]
    near = limit["quartile_1"] <= claim <= limit["quartile_3"]
    return (
        f"A summary of the paper speaks of {claim:.0%} less training overhead. Of all that "
        f"co-distillation takes, the logged way saves {at_first} at N = {first}, {at_last} at N = "
        f"{last} and {limit['median']:.0%} in the limit of many students. It breaks even "
        f"{from_n(limits[SAVED]['students_to_break_even'])}, and passes {claim:.0%} "
        f"{passes[SAVED]}{', though the limit is too near to be sure' if near else ''}.\n\n"
        "What is saved grows with N, as the pass is shared. The limit is (step with the teacher - "
        "step from the store) / step with the teacher. So the ratio of the teacher's forward to "
        f"the student's step decides. It is {common.cell(ratio)} here. A limit above {claim:.0%} "
        f"needs more than {claim / (1 - claim):.2f}.\n\nThe overhead alone is what distillation "
        f"adds to plain training. More than {claim:.0%} of it is saved "
        f"{passes['saved_overhead']}. Against a teacher for each, more than {claim:.0%} is saved "
        f"{passes['saved_over_a_teacher_for_each']}, or "
        f"{passes['saved_over_a_teacher_for_each_with_teacher']} with the training of the shared "
        "teacher counted in.\n\nStudents that overlap less share less. Let u be the distinct "
        "examples for each one that a student sees: 1 / N where all see the same, 1 where they "
        "share none. Then 1 - (step from the store + u * pass) / step with the teacher is saved, "
        f"down to the {at_first} of N = {first}."
    )


def from_n(students: int | str) -> str:
    return "at no N" if students == "never" else f"from N = {students} on"


if __name__ == "__main__":
    main()
