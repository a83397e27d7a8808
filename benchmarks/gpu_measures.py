"""Measurements of a training step that need a GPU: the measuring steps of `make gpu`.

    python benchmarks/gpu_measures.py step|profile|export|gaps [--batch 8192] [--ranks 1] [--cpu]

step: milliseconds until `progress` returns to the host, with an empty queue of the device before
    (host), and of whole steps (whole). Arms take turns in rounds.
profile: what five steps launch, copy and wait for.
export: device memory that export_student takes beside the model.
gaps: between launches of kernels, while another thread reads a window of the store in a loop.

The arms: plain is TorchRec's pipeline. ah has an auxiliary head of 128. recipe also has the student
adapter, its head, and the serving term by a margin. The teacher's logits are columns of the batch,
are looked up in a store, or are carried by the batches of the loader. In compiled, torch.compile
compiles heads and adapter. Batches are in page-locked memory. A single rank all-reduces as several
do.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import common
import numpy as np
import reference
import torch
import torch.distributed as dist
from reference import NUM_DENSE, STUDENT, TAP, Batch, Sizes, Stream, sharded
from step import stored
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM, DLRMTrain
from training import AH, AH_SA, Arm, columns, exfm, on_ranks, over, plain, take_turns

from torchrec_exfm import DistillationTerm, ExFMBatch, ExFMWrapper, export_student
from torchrec_exfm.das import TeacherLookup, TeacherStore
from torchrec_exfm.wrapper import find_wrapper

RECIPE = (*AH_SA, DistillationTerm(adapted=True, serving=True, margin=0.25))
WAITS = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
    "cudaHostAlloc",
)
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
PAGEABLE = "Pageable -> Device"
TRACED = ("plain", "recipe, look-up")
LONG_GAP = 2.0  # milliseconds


class Scale(NamedTuple):
    """The sizes and repetitions of the measurements."""

    batch: int
    sizes: Sizes = STUDENT
    table_rows: int = reference.TABLE_ROWS
    stored_rows: int = 2**18
    exported_table: tuple[int, int] = (12_000_000, 128)  # 6 GB
    warm_up: int = 10
    rounds: int = 7
    steps: int = 20
    single_steps: int = 5
    profiled: int = 5


TRIAL = Scale(
    batch=16,
    sizes=Sizes((16,), (4, 1)),
    table_rows=10,
    stored_rows=64,
    exported_table=(10, 16),
    warm_up=1,
    rounds=2,
    steps=1,
    single_steps=1,
    profiled=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(MEASURES))
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--traces", type=Path, help="a folder for the traces of two arms")
    parser.add_argument("--cpu", action="store_true", help="a trial at tiny sizes")
    options = parser.parse_args()
    if not options.cpu and torch.cuda.device_count() < options.ranks:
        parser.error(f"expected {options.ranks} GPU(s), found {torch.cuda.device_count()}: --cpu?")
    scale = TRIAL if options.cpu else Scale(options.batch)
    traces = None if options.traces is None else str(options.traces)
    figures = on_ranks(options.ranks, on_rank, options.name, scale, traces)
    for table in figures.pop("tables"):
        print(f"{table}\n")
    print(json.dumps({**figures, "environment": common.environment()}))


def on_rank(
    device: torch.device, folder: str, name: str, scale: Scale, traces: str | None = None
) -> dict[str, Any]:
    """Measure one thing; return its figures, and tables of them."""
    with a_group_of_one(), mock.patch.object(reference, "TABLE_ROWS", scale.table_rows):
        return MEASURES[name](device, folder, scale, traces)


@contextmanager
def a_group_of_one() -> Iterator[None]:
    """Let a rank that is alone all-reduce as several would, over NCCL on a GPU."""
    with mock.patch("torchrec_exfm.pipeline.data_parallel_group", lambda _: dist.group.WORLD):
        yield


def cost_of_a_step(
    device: torch.device, folder: str, scale: Scale, traces: str | None
) -> dict[str, Any]:
    arms = {name: make() for name, make in makers(device, folder, scale).items()}
    for arm in arms.values():
        arm(scale.warm_up)
    steps = take_turns(dict(arms), device, rounds=scale.rounds, steps=scale.steps)
    host: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(scale.rounds * scale.single_steps):
        for name, arm in arms.items():
            host[name].append(1000 * host_seconds(arm, device))
    figures = {
        name: {
            "host_milliseconds": common.spread(host[name]),
            "host_over_plain": common.spread(np.array(host[name]) / np.array(host["plain"])),
            "whole_milliseconds": common.spread([1000 * wall for wall, _ in steps[name]]),
            "whole_over_plain": over(steps, name, "plain")[0],
        }
        for name in arms
    }
    return {"batch": scale.batch, "arms": figures, "tables": [table_of(figures)]}


def host_seconds(arm: Callable[[int], None], device: torch.device) -> float:
    """Time one step until ``progress`` returns; the device is idle before."""
    synchronize(device)
    began = time.perf_counter()
    arm(1)
    return time.perf_counter() - began


def profile_of_a_step(
    device: torch.device, folder: str, scale: Scale, traces: str | None
) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    for name, make in makers(device, folder, scale).items():
        arm = make()
        arm(scale.warm_up)
        profiled = profile_steps(arm, scale.profiled, device)
        figures[name] = counts(profiled.events(), scale.profiled, device)
        if traces is not None and name in TRACED and dist.get_rank() == 0:
            Path(traces).mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(f"{traces}/{name.replace(', ', '_')}.json")
    return {"batch": scale.batch, "arms": figures, "tables": [table_of(figures)]}


def profile_steps(arm: Callable[[int], None], steps: int, device: torch.device) -> Any:
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiled:
        arm(steps)
        synchronize(device)
    return profiled


def counts(events: Sequence[Any], steps: int, device: torch.device) -> dict[str, float]:
    """Count per step what was launched, copied and waited for."""
    names = [event.name for event in events]
    figures = {"operators": sum(name.startswith("aten::") for name in names) / steps}
    if device.type != "cuda":
        return figures
    on_device = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    figures["kernels"] = len(kernels) / steps
    figures["nccl_kernels"] = sum("nccl" in event.name for event in kernels) / steps
    figures["pageable_copies"] = sum(PAGEABLE in name for name in names) / steps
    figures |= {wait: names.count(wait) / steps for wait in WAITS}
    figures["busy_milliseconds"] = (
        sum(event.time_range.elapsed_us() for event in on_device) / 1000 / steps
    )
    return figures


def memory_of_export(
    device: torch.device, folder: str, scale: Scale, traces: str | None
) -> dict[str, Any]:
    rows, width = scale.exported_table
    config = EmbeddingBagConfig(
        name="table", embedding_dim=width, num_embeddings=rows, feature_names=["feature"]
    )
    tables = EmbeddingBagCollection([config], device=torch.device("meta"))
    student = DLRMTrain(DLRM(tables, NUM_DENSE, [16, width], [16, 1]))
    model, _ = sharded(ExFMWrapper(student, tap=TAP), device)
    table_bytes = 4 * rows * width
    figures: dict[str, Any] = {"table_gigabytes": table_bytes / 1e9}
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    exported = export_student(model)
    figures["seconds"] = time.perf_counter() - began
    if on_cuda:
        peak = torch.cuda.max_memory_allocated(device)
        figures["device_gigabytes_before"] = before / 1e9
        figures["device_gigabytes_at_peak"] = peak / 1e9
        figures["peak_over_table"] = (peak - before) / table_bytes
    assert (exported is not None) == (dist.get_rank() == 0)
    figures = {name: common.rounded(value) for name, value in figures.items()}
    return {**figures, "tables": [table_of({"export": figures})]}


def gaps_between_launches(
    device: torch.device, folder: str, scale: Scale, traces: str | None
) -> dict[str, Any]:
    arm = makers(device, folder, scale)["recipe, look-up"]()
    arm(scale.warm_up)
    batch = Stream(scale.stored_rows).pool(1, scale.batch)[0]
    figures = {}
    for name, readers in (("alone", 0), ("beside a reader", 1)):
        with reading(f"{folder}/outputs", batch, readers) as windows:
            profiled = profile_steps(arm, scale.steps, device)
        starts = np.sort([start for start, _ in launches(profiled.events(), device)])
        gaps = np.diff(starts) / 1000
        figures[name] = {
            "launches": len(starts) / scale.steps,
            "longest_gap_milliseconds": common.rounded(float(gaps.max())),
            "long_gaps": int((gaps > LONG_GAP).sum()),
            "windows_read": len(windows),
        }
    return {"batch": scale.batch, "runs": figures, "tables": [table_of(figures)]}


def launches(events: Sequence[Any], device: torch.device) -> list[tuple[float, str]]:
    """List the host's launches, with the start in microseconds; on the CPU, its operators."""
    prefixes = LAUNCHES if device.type == "cuda" else ("aten::",)
    return [
        (event.time_range.start, event.name) for event in events if event.name.startswith(prefixes)
    ]


@contextmanager
def reading(url: str, batch: Batch, readers: int) -> Iterator[list[int]]:
    """Let threads read the window of a batch in a loop; yield a list with an item for each read."""
    stop, windows = threading.Event(), list[int]()

    def read() -> None:
        lookup = TeacherLookup(TeacherStore(url), "fm")
        while not stop.is_set():
            lookup.refresh()
            windows.append(len(lookup(batch).values))

    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    try:
        yield windows
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def makers(device: torch.device, folder: str, scale: Scale) -> dict[str, Callable[[], Arm]]:
    """Return a function that makes each arm."""
    stream = Stream(scale.stored_rows)
    batches = pinned(stream.pool(8, scale.batch), device)
    carried = pinned([ExFMBatch(batch, columns(batch)) for batch in batches], device)
    url = f"{folder}/outputs"
    lookup = TeacherLookup(stored(url, stream), "fm")
    sizes = scale.sizes
    return {
        "plain": lambda: Arm(plain(device, sizes), batches),
        "ah, columns": lambda: Arm(exfm(device, AH, sizes=sizes), batches),
        "ah, carried": lambda: Arm(exfm(device, AH, None, sizes), carried),
        "recipe, columns": lambda: Arm(exfm(device, RECIPE, sizes=sizes), batches),
        "recipe, look-up": lambda: Arm(exfm(device, RECIPE, lookup, sizes), batches),
        "recipe, carried": lambda: Arm(exfm(device, RECIPE, None, sizes), carried),
        "recipe, compiled": lambda: Arm(compiled(exfm(device, RECIPE, None, sizes)), carried),
    }


def pinned(batches: Sequence[Any], device: torch.device) -> list[Any]:
    return [batch.pin_memory() if device.type == "cuda" else batch for batch in batches]


def compiled(pipeline: Any) -> Any:
    """Compile heads and adapter, in place; only trace them on the CPU, for a trial."""
    backend = "inductor" if pipeline._device.type == "cuda" else "eager"
    parts: list[nn.Module] = [find_wrapper(pipeline.model).auxiliary_head, pipeline.adapter]
    for part in parts:
        part.compile(dynamic=False, backend=backend)
    return pipeline


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table_of(figures: dict[str, dict[str, Any]]) -> str:
    """Return figures as Markdown, with a row for each name."""
    columns = list(next(iter(figures.values())))
    header = ["", *(name.replace("_", " ") for name in columns)]
    rows = [[name, *(values[column] for column in columns)] for name, values in figures.items()]
    return common.table(header, rows)


MEASURES = {
    "step": cost_of_a_step,
    "profile": profile_of_a_step,
    "export": memory_of_export,
    "gaps": gaps_between_launches,
}


if __name__ == "__main__":
    main()
