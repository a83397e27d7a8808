"""What distillation adds to a training step, measured against the plain step.

    python benchmarks/step.py [--json] [--quick]

The student is a DLRM of 26 tables of 100,000 rows of 16, dense part 512-256-16, over part
512-256-1, batches of 8192 (--quick: 2048), under DistributedModelParallel, in a pipeline. The arms
train in turns in one process (one for each rank), in several launches. A ratio is of two arms in
the same round, by the clock, and "cpu" by the seconds of all threads. On a GPU the clock is that of
its events.

plain: TrainPipelineSparseDist, without a teacher.
ah: an auxiliary head of 128; the teacher's logits are columns of the batch.
exfm: ah with the student adapter and its second head of 128.
store: exfm with logits from a TeacherStore of 2^18 rows.
live: exfm with logits from a LiveTeacher whose over part is 1024-1024-512-1.
metrics: exfm with ExFMMetrics at every step.
wide: exfm whose heads have the widths of the serving head.
hand_written: one head of 128, and a second loss in the student's own forward.
matmuls, wide_matmuls: the matrix products of the two heads alone, forward and backward.
exfm_less_matmuls, wide_less_matmuls: exfm and wide without these, over plain.

Losses, on one rank: ah whose term has another loss, in groups of 10 examples, or learns from
embeddings of 64 by a linear head. Two towers: two_towers.py.

Small batches, on one rank and one thread: AH and the recipe (AH, and the serving head taught by
margin from the adapter) over plain. They are in seconds on a core, which other processes lengthen
least. Host: the milliseconds on a core that each arm adds to a step whose layers and batch are
tiny, so that it does little but launch operations, and how many it launches, views left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import common
import numpy as np
import torch
import torch.distributed as dist
import two_towers
from reference import (
    KEYS,
    SNAPSHOT,
    STUDENT,
    TEACHER,
    WIDTH,
    WINDOW,
    Batch,
    Sizes,
    Stream,
    dlrm,
    sharded,
)
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRMTrain
from training import (
    AH,
    AH_SA,
    EMBEDDING,
    RECIPE,
    Arm,
    embeddings,
    exfm,
    kernels_of,
    on_ranks,
    over,
    plain,
    take_turns,
)

from torchrec_exfm import DistillationTerm, ExFMMetrics, LiveTeacher, losses
from torchrec_exfm.das import TeacherLookup, TeacherStore
from torchrec_exfm.wrapper import find_wrapper

ROWS = 2**18  # in the store
SHARED = (len(KEYS) + 1) * len(KEYS) // 2 + WIDTH  # the width of the shared representation
WIDE = STUDENT.over[:-1]
SMALL_BATCHES = (128, 1024)
TINY, TINY_BATCH = Sizes((8, WIDTH), (8, 1)), 16
AIMS = {
    "exfm_over_plain": "<= 1.05 (<= 1.03 on a GPU, of a step that the GPU bounds)",
    **{f"ah_over_plain_batch_{size}": "<= 1.1" for size in SMALL_BATCHES},
    **{f"recipe_over_plain_batch_{size}": "<= 1.3" for size in SMALL_BATCHES},
    "ah_host_milliseconds": "<= 0.88",
    "exfm_host_milliseconds": "<= 1.88",
    "recipe_host_milliseconds": "<= 1.74",
    "exfm_less_matmuls": "<= 1.03",
    "wide_less_matmuls": "<= 1.03",
    "store_over_columns": "<= 1.03",
}

LOSSES = {
    "task_loss": losses.task_loss(),
    "temperature": losses.temperature(2.0),
    "squared_error_of_logits": losses.squared_error_of_logits(),
    "pairwise": losses.pairwise(),
    "listwise": losses.listwise(),
    "listwise_calibrated": losses.listwise(calibrated=True),
    "cosine_of_embeddings": losses.cosine_of_embeddings(EMBEDDING),
    "squared_error_of_embeddings": losses.squared_error_of_embeddings(EMBEDDING),
}

Times: TypeAlias = dict[str, list[common.Time]]


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    common.show(measure(options.quick), options.json, AIMS)


def measure(quick: bool) -> dict[str, Any]:
    batch, launches, rounds = (2048, 1, 5) if quick else (8192, 3, 5)
    ranks = {"one_rank": 1}
    if not quick and torch.cuda.device_count() != 1:
        ranks["two_ranks"] = 2
    details = {
        name: figures([on_ranks(n, on_rank, batch, rounds, turn) for turn in range(launches)])
        for name, n in ranks.items()
    }
    one: dict[str, Any] = details["one_rank"]
    fields = ("exfm_over_plain", "store_over_columns", "live_over_plain", "ah_over_hand_written")
    result = {name: one[name]["wall"]["median"] for name in fields}
    result |= {f"{name}_cpu": one[name]["cpu"]["median"] for name in fields}
    result |= {
        f"{name}_less_matmuls": one[f"{name}_less_matmuls"]["wall"]["median"]
        for name in ("exfm", "wide")
    }
    small = small_figures([on_ranks(1, small_on_rank, rounds, turn) for turn in range(launches)])
    result |= {name: small[name]["median"] for name in AIMS if name in small}
    by_loss = loss_figures(
        [on_ranks(1, losses_on_rank, batch, rounds, turn) for turn in range(launches)]
    )
    launched = [
        on_ranks(1, two_towers.towers_on_rank, batch, rounds, turn) for turn in range(launches)
    ]
    towers = two_towers.figures(joined(launched))
    parts = {"small": small, "losses": by_loss, "two_towers": towers}
    return {**result, "details": {"batch": batch, **details, **parts}}


def on_rank(device: torch.device, folder: str, batch: int, rounds: int, launch: int) -> Times:
    stream = Stream(ROWS)
    lookup = TeacherLookup(stored(f"{folder}/outputs", stream), "fm")
    makers = arms(device, stream.pool(8, batch), lookup)
    names = list(makers)[:: -1 if launch % 2 else 1]
    trained = {name: makers[name]() for name in names}
    steps = 20 if device.type == "cuda" else 2
    return take_turns(trained, device, rounds=rounds, steps=steps)


def figures(launches: list[Times]) -> dict[str, Any]:
    """Return the ratios of arms over the rounds of all launches."""
    # Several launches, as where malloc puts an arm's tensors differs between them
    times = joined(launches)
    return {
        "exfm_over_plain": ratio(times, "exfm", "plain"),
        "ah_over_plain": ratio(times, "ah", "plain"),
        "wide_over_plain": ratio(times, "wide", "plain"),
        "live_over_plain": ratio(times, "live", "plain"),
        "store_over_columns": ratio(times, "store", "exfm"),
        "ah_over_hand_written": ratio(times, "ah", "hand_written"),
        "metrics_over_exfm": ratio(times, "metrics", "exfm"),
        "matmuls_over_plain": ratio(times, "matmuls", "plain"),
        "wide_matmuls_over_plain": ratio(times, "wide_matmuls", "plain"),
        "exfm_less_matmuls": less(times, "exfm", "matmuls"),
        "wide_less_matmuls": less(times, "wide", "wide_matmuls"),
        "milliseconds": {
            name: common.spread([1000 * wall for wall, _ in rounds])
            for name, rounds in times.items()
        },
    }


def joined(launches: list[Times]) -> Times:
    """Return the rounds of all launches, by arm."""
    return {arm: list(itertools.chain(*(times[arm] for times in launches))) for arm in launches[0]}


def losses_on_rank(
    device: torch.device, folder: str, batch: int, rounds: int, launch: int
) -> Times:
    batches = Stream(ROWS).pool(8, batch)
    by_loss = {}
    for name, loss in LOSSES.items():
        changed = {"hidden": (), "loss": loss} if loss.embeddings else {"loss": loss}
        teacher = {"teacher": embeddings} if loss.embeddings else {}
        by_loss[name] = Arm(exfm(device, [replace(AH[0], **changed)], **teacher), batches)
    by_loss["plain"] = Arm(plain(device), batches)
    steps = 20 if device.type == "cuda" else 2
    return take_turns(by_loss, device, rounds=rounds, steps=steps)


def loss_figures(launches: list[Times]) -> dict[str, Any]:
    """Return AH with each loss over the plain step."""
    times = joined(launches)
    return {name: ratio(times, name, "plain") for name in LOSSES}


def small_on_rank(device: torch.device, folder: str, rounds: int, launch: int) -> dict[str, Any]:
    """Measure steps of small batches, and times and operations of a step of tiny layers."""
    torch.set_num_threads(1)  # threads that spin while they wait would count as work
    stream = Stream(ROWS)
    kinds = {"plain": None, "ah": AH, "exfm": AH_SA, "recipe": RECIPE}

    def make_arm(name: str, size: int, sizes: Sizes) -> Arm:
        terms = kinds[name]
        pipeline = exfm(device, terms, sizes=sizes) if terms else plain(device, sizes)
        return Arm(pipeline, stream.pool(8, size))

    small: dict[str, Callable[[int], None]] = {
        f"{name}_batch_{size}": make_arm(name, size, STUDENT)
        for size in SMALL_BATCHES
        for name in ("plain", "ah", "recipe")
    }
    tiny: dict[str, Callable[[int], None]] = {
        f"{name}_host": make_arm(name, TINY_BATCH, TINY) for name in kinds
    }
    times = take_turns(small, device, rounds=rounds, steps=2)
    times |= take_turns(tiny, device, rounds=2 * rounds, steps=10)
    return {"times": times, "kernels": {name: kernels_of(arm) for name, arm in tiny.items()}}


def small_figures(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return ratios and differences to the plain step, in seconds on a core, and operations."""
    kernels = launches[0]["kernels"]
    cores = {
        name: np.array([core for launch in launches for _, core in launch["times"][name]])
        for name in launches[0]["times"]
    }
    result: dict[str, Any] = {}
    for name in ("ah", "recipe"):
        for size in SMALL_BATCHES:
            ratios = cores[f"{name}_batch_{size}"] / cores[f"plain_batch_{size}"]
            result[f"{name}_over_plain_batch_{size}"] = common.spread(ratios)
    for name in ("ah", "exfm", "recipe"):
        added = 1000 * (cores[f"{name}_host"] - cores["plain_host"])
        result[f"{name}_host_milliseconds"] = common.spread(added)
    result["plain_host_milliseconds"] = common.spread(1000 * cores["plain_host"])
    return {**result, "operations": {name.split("_")[0]: n for name, n in kernels.items()}}


def stored(url: str, stream: Stream) -> TeacherStore:
    """Return a store of the stream's logits, written by rank 0."""
    if dist.get_rank() == 0:
        store = TeacherStore.create(url, window_seconds=WINDOW)
        store.write(SNAPSHOT, stream.ids, stream.logits, stream.seconds)
    dist.barrier()
    return TeacherStore(url)


def arms(
    device: torch.device, batches: list[Batch], lookup: TeacherLookup
) -> dict[str, Callable[[], Callable[[int], None]]]:
    """Return a function that makes each arm."""
    wide = [DistillationTerm(beta=3.0, adapted=term.adapted, hidden=WIDE) for term in AH_SA]
    size = len(batches[0].labels)
    return {
        "plain": lambda: Arm(plain(device), batches),
        "ah": lambda: Arm(exfm(device, AH), batches),
        "exfm": lambda: Arm(exfm(device), batches),
        "store": lambda: Arm(exfm(device, teacher=lookup), batches),
        "live": lambda: Arm(
            exfm(device, teacher=LiveTeacher(sharded(dlrm(TEACHER), device)[0])), batches
        ),
        "metrics": lambda: Watched(exfm(device), batches, device),
        "wide": lambda: Arm(exfm(device, wide), batches),
        "hand_written": lambda: Arm(hand_written(device), batches),
        "matmuls": lambda: Matmuls(device, size, AH_SA[0].hidden),
        "wide_matmuls": lambda: Matmuls(device, size, WIDE),
    }


def hand_written(device: torch.device) -> TrainPipelineSparseDist:
    torch.manual_seed(0)
    model, optimizer = sharded(TwoLosses(dlrm(STUDENT)), device)
    return TrainPipelineSparseDist(model, optimizer, device)


class TwoLosses(nn.Module):
    """A student with a head and a loss in its own forward, as written without this package."""

    def __init__(self, student: DLRMTrain) -> None:
        super().__init__()
        self.model = student.model
        self.head = nn.Sequential(nn.Linear(SHARED, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        dense = self.model.dense_arch(batch.dense_features)
        shared = self.model.inter_arch(dense, self.model.sparse_arch(batch.sparse_features))
        logits = self.model.over_arch(shared).squeeze(-1)
        loss = binary_cross_entropy_with_logits(logits, batch.labels)
        distilled = self.head(shared).squeeze(-1)
        loss = loss + binary_cross_entropy_with_logits(distilled, batch.logits.sigmoid())
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


class Watched(Arm):
    """An arm that updates metrics at every step."""

    def __init__(self, pipeline: Any, batches: list[Batch], device: torch.device) -> None:
        super().__init__(pipeline, batches)
        self.wrapper = find_wrapper(pipeline.model)
        self.metrics = ExFMMetrics(batch_size=len(batches[0].labels), device=device)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.metrics.update(self.pipeline.progress(self.feed), self.wrapper.last_teacher)


class Matmuls:
    """The matrix products of two heads alone, forward and backward, one product for a layer."""

    def __init__(self, device: torch.device, size: int, hidden: tuple[int, ...]) -> None:
        first, *widths = (*hidden, 1)
        self.shared = torch.randn(size, SHARED, device=device)
        self.first = torch.randn(2 * first, SHARED, device=device)
        self.others = [
            torch.randn(2, before, after, device=device)
            for before, after in zip(hidden, widths, strict=True)
        ]

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            inputs = [(self.shared @ self.first.t()).unflatten(1, (2, -1)).transpose(0, 1)]
            for weights in self.others:
                inputs.append(inputs[-1] @ weights)
            gradient = inputs.pop()
            for weights in reversed(self.others):
                inputs.pop().transpose(1, 2) @ gradient
                gradient = gradient @ weights.transpose(1, 2)
            first_gradient = gradient.transpose(0, 1).flatten(1)
            first_gradient.t() @ self.shared
            first_gradient @ self.first


def ratio(times: Times, arm: str, base: str) -> dict[str, Any]:
    wall, cpu = over(times, arm, base)
    return {"wall": wall, "cpu": cpu}


def less(times: Times, arm: str, part: str) -> dict[str, Any]:
    """Return an arm without a part of it, over the plain step."""
    wall, cpu = ((np.array(times[arm]) - times[part]) / times["plain"]).T
    return {"wall": common.spread(wall), "cpu": common.spread(cpu)}


def markdown(result: dict[str, Any]) -> str:
    details = result["details"]
    ranks = [name for name in ("one_rank", "two_ranks") if name in details]
    rows = [
        ("exfm_over_plain", "**ExFM (AH + SA, columns) over plain**", "1.05"),
        ("matmuls_over_plain", "of it: the matrix products of its two heads of 128", ""),
        ("exfm_less_matmuls", "**ExFM without these products, over plain**", "1.03"),
        ("ah_over_plain", "AH alone over plain", ""),
        ("ah_over_hand_written", "AH alone over a hand-written second loss", ""),
        ("store_over_columns", "**ExFM from the store, over columns**", "1.03"),
        ("live_over_plain", "ExFM with a live teacher over plain", ""),
        ("metrics_over_exfm", "ExFM with metrics at every step over ExFM", ""),
        ("wide_over_plain", "ExFM with heads as wide as the serving head over plain", ""),
        ("wide_matmuls_over_plain", "of it: the matrix products of these heads", ""),
        ("wide_less_matmuls", "ExFM with these heads, without these products, over plain", "1.03"),
    ]
    header = ["", *(f"{name.replace('_', ' ')}, {by}" for name in ranks for by in ("wall", "CPU"))]
    table = [
        [text, *(details[name][field][by] for name in ranks for by in ("wall", "cpu")), aim]
        for field, text, aim in rows
    ]
    plain_ms = " and ".join(common.cell(details[name]["milliseconds"]["plain"]) for name in ranks)
    matmuls = details["one_rank"]["matmuls_over_plain"]["wall"]["median"]
    return (
        f"Batches of {details['batch']:,}. The plain step takes {plain_ms} ms on "
        f"{' and '.join(name.replace('_', ' ') for name in ranks)}.\n\n"
        f"{common.table([*header, 'aim'], table)}\n\n"
        f"The matrix products of the heads, timed apart, take {common.cell(matmuls)} of the plain "
        "step on one rank, as the student's own layers are small. ExFM with these heads should "
        f"thus take about {common.cell(1 + matmuls)} of the plain step. The rest is meant to be "
        "small. Each term has a head and a loss of its own, whose operations the tests bound. A β "
        "other than 1 multiplies the gradient of the shared representation, once for each head.\n\n"
        "Launches differ by more than the rest amounts to, in the plain step too. On a CPU it "
        "matters where malloc puts tensors and which pages are fresh. So whole runs of this script "
        "differ by more than their quartiles say."
        f"{loss_markdown(details['losses']) if 'losses' in details else ''}"
        f"{two_towers.markdown(details['two_towers']) if 'two_towers' in details else ''}"
        f"{small_markdown(details['small']) if 'small' in details else ''}"
    )


def loss_markdown(by_loss: dict[str, Any]) -> str:
    rows = [[f"`{name}`", ratios["wall"], ratios["cpu"]] for name, ratios in by_loss.items()]
    return (
        "\n\nAH alone with each loss, in groups of 10 examples, on one rank:\n\n"
        f"{common.table(['over plain', 'wall', 'CPU'], rows)}"
    )


def small_markdown(small: dict[str, Any]) -> str:
    operations = small["operations"]
    rows = [
        [
            text,
            *(small.get(f"{name}_over_plain_batch_{size}", "") for size in SMALL_BATCHES),
            small[f"{name}_host_milliseconds"],
            operations[name] - operations["plain"],
        ]
        for name, text in (("ah", "AH"), ("exfm", "AH + SA"), ("recipe", "AH + SA by margin"))
    ]
    header = ["", *(f"batches of {size:,}, over plain" for size in SMALL_BATCHES)]
    return (
        "\n\nSmall batches, on one core. The last columns are what each arm adds to a step whose "
        "layers and batch are tiny, where the host is the limit: milliseconds of the host, and the "
        "operations that it launches, each a kernel or more on a GPU. The plain step of tiny "
        f"layers takes {common.cell(small['plain_host_milliseconds'])} ms and launches "
        f"{operations['plain']}.\n\n"
        f"{common.table([*header, 'host, ms more', 'operations more'], rows)}"
    )


if __name__ == "__main__":
    main()
