"""Checks of the measurements of `make gpu`, at the sizes of its trial without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import rank_models as rm
import torch
from ranks import device

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def check_measure(rank: int, world_size: int, name: str) -> None:
    """Each arm or run has the same figures, and a row in the table."""
    import gpu_measures

    some, makers = ("plain", "recipe, look-up"), gpu_measures.makers  # all of them take long

    def few(*args: Any) -> dict[str, Any]:
        return {name: make for name, make in makers(*args).items() if name in some}

    with rm.shared_folder() as folder, mock.patch.object(gpu_measures, "makers", few):
        measured = gpu_measures.on_rank(device(), folder, name, gpu_measures.TRIAL)
    (table,) = measured["tables"]
    figures: dict[str, Any] = measured.get("arms") or measured.get("runs") or {"export": None}
    assert len(table.splitlines()) == 2 + len(figures)
    if name == "step":
        assert tuple(figures) == some
        assert figures["plain"]["whole_over_plain"]["median"] == 1
    if name == "gaps":
        assert figures["alone"]["windows_read"] == 0 < figures["beside a reader"]["windows_read"]


def check_counts(rank: int, world_size: int) -> None:
    """Each event of a GPU profile is counted once, by kind."""
    import gpu_measures

    def event(name: str, on_device: bool = True, annotation: bool = False) -> Any:
        kind = torch.autograd.DeviceType
        return SimpleNamespace(
            name=name,
            device_type=kind.CUDA if on_device else kind.CPU,
            is_user_annotation=annotation,
            time_range=SimpleNamespace(elapsed_us=lambda: 500.0, start=7.0),
        )

    events = [
        *[event("gemm")] * 4,
        *[event("ncclDevKernel_AllReduce")] * 2,
        *[event("Memcpy HtoD (Pageable -> Device)")] * 2,
        event("Memcpy HtoD (Pinned -> Device)"),
        event("Memset (Device)"),
        event("## forward ##", annotation=True),
        *[event("aten::mm", on_device=False)] * 8,
        *[event("cudaStreamSynchronize", on_device=False)] * 2,
        event("cudaLaunchKernel", on_device=False),
    ]
    counts = gpu_measures.counts(events, 2, torch.device("cuda"))
    expected = {
        "operators": 4,
        "kernels": 3,
        "nccl_kernels": 1,
        "pageable_copies": 1,
        "cudaStreamSynchronize": 1,
        "busy_milliseconds": 2.5,
    }
    assert counts == dict.fromkeys(gpu_measures.WAITS, 0) | expected, counts
    assert gpu_measures.launches(events, torch.device("cuda")) == [(7.0, "cudaLaunchKernel")]
