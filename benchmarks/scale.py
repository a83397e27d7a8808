"""What a row costs as the work grows: rows in the store, tasks, teachers, ranks, the batch.

    python benchmarks/scale.py [--json] [--quick]

An exponent is the slope of log(cost of a row) over log(size), through the medians: 0 is flat, 1
grows as the size does.

exponent_store_rows: of the time of a look-up, TeacherLookup(batch) of 8192 examples at random
    places in the one window of a store, by all threads together, on one core.
exponent_tasks, exponent_teachers: of what ExFM adds to a step. Student and heads have an output for
    each task; each teacher has one term, through the adapter.
exponent_batch: of the seconds of a step with ExFM; that of a step without is in the details.
over_plain_1_rank, over_plain_2_ranks: seconds of a step with ExFM over seconds without. Each of two
    ranks has as large a batch as one alone, and half of the cores or a GPU of its own. Two ranks
    are left out on a machine with one GPU.
peak_rss_added_mib, peak_rss_over_plain: the peak memory of a process that trains with ExFM, against
    one without. What a GPU has allocated is in the details. Blocks from 64 KiB on go back to the
    system once they are free (MALLOC_MMAP_THRESHOLD_), as what malloc keeps otherwise differs from
    run to run by more than ExFM adds.

The student is the reference DLRM: 26 tables of 100,000 rows of 16, dense part 512-256-16, over part
512-256-tasks. ExFM is AH and SA, except where teachers are counted; outputs come as columns of the
batch. For each question all students, with ExFM and without, train in turns in one process. An
added cost is the difference of two figures of a round, spread over the rounds. Ranks and peaks of
memory have processes of their own. A row is one of a rank. A student's batches together have the
same number of rows whatever their size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import common
import numpy as np
import store
import torch
from reference import FIRST, STUDENT, Batch, Sizes, Stream
from training import AH_SA, Arm, exfm, on_ranks, over, plain, take_turns

from torchrec_exfm import DistillationTerm, Task, TrainPipelineExFM
from torchrec_exfm.das import TeacherLookup, TeacherStore
from torchrec_exfm.das.index import WindowIndex

POOL = 2**17  # rows of a student's batches together
AIMS = {
    "exponent_store_rows": "0",
    "exponent_tasks": "< 1",
    "exponent_teachers": "<= 1",
    "exponent_batch": "<= 0",
}


class Case(NamedTuple):
    """A student's rows in a batch and in a turn, its terms and tasks."""

    size: int
    rows: int
    terms: Sequence[DistillationTerm] = AH_SA
    tasks: int = 1

    @property
    def student(self) -> Sizes:
        return STUDENT._replace(over=(*STUDENT.over[:-1], self.tasks))

    def exfm(self, device: torch.device) -> TrainPipelineExFM:
        tasks = [Task(name=f"task_{number}") for number in range(self.tasks)]
        return exfm(device, self.terms, sizes=self.student, tasks=tasks)


def measure(quick: bool) -> dict[str, Any]:
    size, rounds = (2048, 4) if quick else (8192, 8)
    steps = 20 if torch.cuda.is_available() else 2
    case = Case(size, size * steps)
    ranks = [1] if torch.cuda.device_count() == 1 else [1, 2]
    tasks = [1, 16] if quick else [1, 4, 16]
    teachers = [1, 4] if quick else [1, 2, 4]
    sizes = [2**10, 2**12] if quick else [2**10, 2**12, 2**14, 2**16]
    stores = [10**5, 10**6] if quick else [10**5, 10**6, 10**7]
    sweeps = {
        "tasks": {n: case._replace(tasks=n) for n in tasks},
        "teachers": {n: case._replace(terms=one_each(n)) for n in teachers},
        "batch": {n: Case(n, max(sizes) * steps // 2) for n in sizes},
    }
    details = {
        "rows_of_a_batch": size,
        "store_rows": common.in_process(look_ups, stores, rounds),
        **{name: on_ranks(1, costs, cases, rounds) for name, cases in sweeps.items()},
        "ranks": {n: on_ranks(n, costs, {n: case}, rounds)[str(n)] for n in ranks},
        "memory": common.in_process(memory, size, 1 if quick else 3),
    }
    details["exponent_batch_plain"] = exponent(details["batch"], "plain_us_per_row")
    ratios = [figures["over_plain"]["median"] for figures in details["ranks"].values()]
    names = ["over_plain_1_rank", "over_plain_2_ranks"]
    return {
        "exponent_store_rows": exponent(details["store_rows"], "us_per_row"),
        "exponent_tasks": exponent(details["tasks"], "added_us_per_row"),
        "exponent_teachers": exponent(details["teachers"], "added_us_per_row"),
        "exponent_batch": exponent(details["batch"], "exfm_us_per_row"),
        **dict(zip(names, ratios, strict=False)),
        "peak_rss_added_mib": details["memory"]["rss"]["added_mib"]["median"],
        "peak_rss_over_plain": details["memory"]["rss"]["over_plain"]["median"],
        "details": details,
    }


def exponent(by_size: dict[str, Any], name: str) -> float | None:
    """Return the slope of the medians in logarithms; None if one of them is not above 0."""
    medians = [figures[name]["median"] for figures in by_size.values()]
    if min(medians) <= 0:
        return None
    slope, _ = np.polyfit(np.log([int(size) for size in by_size]), np.log(medians), 1)
    return round(float(slope), 3)


def look_ups(sizes: Sequence[int], rounds: int, steps: int = 40) -> dict[str, Any]:
    """Measure look-ups in stores of several sizes, in turns; each batch is looked up once."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    arms, row_bytes = {}, {}
    with tempfile.TemporaryDirectory(prefix="benchmark-scale-") as folder:
        for rows in sizes:
            url = f"{folder}/{rows}"
            store.write(url, "random", rows)
            row_bytes[str(rows)] = bytes_per_row(url)
            batches = store.random_batches("random", rows, steps * (rounds + 1))
            arms[str(rows)] = Arm(lookup_pipeline(TeacherLookup(TeacherStore(url), "fm")), batches)
        times = take_turns(arms, torch.device("cpu"), rounds=rounds, steps=steps)
    return {
        size: {
            "us_per_row": common.spread([core / store.BATCH * 1e6 for _, core in times[size]]),
            "bytes_per_row_in_memory": row_bytes[size],
        }
        for size in arms
    }


def lookup_pipeline(lookup: TeacherLookup) -> SimpleNamespace:
    """Return a pipeline whose steps are look-ups alone."""
    return SimpleNamespace(progress=lambda feed: lookup(next(feed)))


def bytes_per_row(url: str) -> float:
    rows, _ = TeacherStore(url).read("fm", FIRST)
    index = WindowIndex(rows.example_id, rows.outputs, rows.age_seconds)
    return common.rounded(index.nbytes / len(index))


def one_each(teachers: int) -> list[DistillationTerm]:
    names = [f"teacher_{number}" for number in range(teachers)]
    return [DistillationTerm(teacher=name, beta=3.0, adapted=True) for name in names]


def costs(device: torch.device, folder: str, cases: dict[int, Case], rounds: int) -> dict[int, Any]:
    """Measure the cost of a row without ExFM and with it, for all cases in turns."""
    arms: dict[str, Callable[[int], None]] = {}
    for number, case in cases.items():
        batches = pool(case)
        arms[f"plain {number}"] = turn(plain(device, case.student), batches, case)
        arms[f"exfm {number}"] = turn(case.exfm(device), batches, case)
    times = take_turns(arms, device, rounds=rounds, steps=1)
    figures = {}
    for number, case in cases.items():
        without, with_it = f"plain {number}", f"exfm {number}"
        us = [np.array(times[name])[:, 0] / case.rows * 1e6 for name in (without, with_it)]
        _, by_threads = over(times, with_it, without)
        figures[number] = {**beside(*us, "us_per_row"), "over_plain_all_threads": by_threads}
    return figures


def turn(pipeline: Any, batches: Sequence[Batch], case: Case) -> Callable[[int], None]:
    arm = Arm(pipeline, batches)
    return lambda turns: arm(turns * case.rows // case.size)


def beside(without: Any, with_it: Any, unit: str) -> dict[str, dict[str, float]]:
    """Return figures without ExFM and with it, measured in pairs."""
    return {
        f"plain_{unit}": common.spread(without),
        f"exfm_{unit}": common.spread(with_it),
        f"added_{unit}": common.spread(with_it - without),
        "over_plain": common.spread(with_it / without),
    }


def pool(case: Case) -> list[Batch]:
    """Return batches with random teacher outputs and labels of the tasks."""
    generator = torch.Generator().manual_seed(3)
    teachers = {term.teacher for term in case.terms}
    outputs = (case.size, len(teachers), case.tasks)
    return [
        replace(
            batch,
            labels=torch.rand(case.size, case.tasks, generator=generator).round().squeeze(-1),
            logits=torch.randn(outputs, generator=generator),
        )
        for batch in Stream(POOL).pool(POOL // case.size, case.size)
    ]


def memory(size: int, pairs: int) -> dict[str, Any]:
    """Measure peaks of processes that train without ExFM and with it.

    Runs in a process of its own, as it sets the environment of those that it starts.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    peaks = [[on_ranks(1, peak, train, size) for train in (plain, exfm)] for _ in range(pairs)]
    return {
        place: beside(*np.array([[run[place] for run in pair] for pair in peaks]).T, "mib")
        for place in peaks[0][0]
    }


def peak(
    device: torch.device, folder: str, train: Callable[..., Any], size: int
) -> dict[str, float]:
    """Return MiB at the peak of ten steps, after a first one."""
    arm = Arm(train(device), Stream(POOL).pool(POOL // size, size))
    arm(1)
    common.memory("VmRSS", new_peak=True)
    arm(10)
    figures = {"rss": common.memory("VmHWM") / 2**20}
    if device.type == "cuda":
        figures["gpu"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures


def markdown(result: dict[str, Any]) -> str:
    details = result["details"]
    steps = [
        [f"{sweep}: {int(size):,}", *list(figures.values())[:4]]
        for sweep in ("tasks", "teachers", "ranks", "batch")
        for size, figures in details[sweep].items()
    ]
    looked_up = [
        [f"{int(rows):,}", *figures.values()] for rows, figures in details["store_rows"].items()
    ]
    peaks = [[place, *figures.values()] for place, figures in details["memory"].items()]
    sides = ["without ExFM", "with it", "added", "with over without"]
    return f"""\
An exponent says how the cost of a row grows with a size: 0 is flat, 1 grows as the size does.

* A look-up, with the rows in the store: **{result["exponent_store_rows"]}**.
* What ExFM adds to a step, with tasks: **{result["exponent_tasks"]}**.
* The same, with teachers: **{result["exponent_teachers"]}**.
* A step with ExFM, with the rows of the batch: **{result["exponent_batch"]}**.
* The same without ExFM: {details["exponent_batch_plain"]}.

Batches have {details["rows_of_a_batch"]:,} rows on each rank where their size is not given.

{common.table(["a step, µs a row", *sides], steps)}

{common.table(["rows in the store", "look-up, µs a row", "bytes a row in memory"], looked_up)}

{common.table(["peak of memory, MiB", *sides], peaks)}"""


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(measure(options.quick), options.json, AIMS)


if __name__ == "__main__":
    main()
