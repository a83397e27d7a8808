"""Shared by the benchmarks: time, memory, spreads, processes of their own, output."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deltalake", "pyarrow", "numpy")

Time: TypeAlias = tuple[float, float]  # seconds by the clock, seconds that the process had a core


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--quick", action="store_true", help="smaller, within a minute")
    return parser


def timed(function: Callable[..., Any], *args: Any) -> Time:
    wall, core = time.perf_counter(), time.process_time()
    function(*args)
    return time.perf_counter() - wall, time.process_time() - core


def memory(name: str, *, new_peak: bool = False) -> int:
    """Return bytes of this process: VmRSS, its memory now, or VmHWM, its peak.

    Args:
        name: of the field of /proc/self/status.
        new_peak: starts a new peak first.
    """
    if new_peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return a function's result from a new process, whose memory and threads nobody shares."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def rounded(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of measurements, their quartiles and their number."""
    low, median, high = map(rounded, np.percentile(values, [25, 50, 75]))
    return {"median": median, "quartile_1": low, "quartile_3": high, "runs": len(values)}


def rates(times: Sequence[tuple[int, Time]]) -> dict[str, float]:
    """Return rows a second by the time on a core, and the median by the clock."""
    wall = spread([rows / seconds for rows, (seconds, _) in times])
    return {**spread([rows / core for rows, (_, core) in times]), "on_the_wall": wall["median"]}


def cell(value: Any) -> str:
    """Format a number to three digits, or a median with its quartiles, for a table."""
    if isinstance(value, dict):
        low, high = (cell(value[name]) for name in ("quartile_1", "quartile_3"))
        return f"{cell(value['median'])} ({low} to {high})"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value / 1e6:.3g} M" if abs(value) >= 1e6 else f"{float(f'{value:.3g}'):,g}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown; its first column holds names."""
    lines = [header, ["---"] * len(header), *([row[0], *map(cell, row[1:])] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def environment() -> dict[str, Any]:
    """Return the versions and the machine that figures are of."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "versions": versions,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average_at_end": rounded(os.getloadavg()[0]),
    }


def show(result: dict[str, Any], as_json: bool, aims: dict[str, str]) -> None:
    """Print a result as one JSON object, or as a line for each figure with its aim."""
    result = {**result, "aims": aims, "environment": environment()}
    if as_json:
        print(json.dumps(result))
    else:
        del result["aims"]
        _show_lines(result, "", aims)


def _show_lines(figures: dict[str, Any], prefix: str, aims: dict[str, str]) -> None:
    for name, value in figures.items():
        name = prefix + name
        if isinstance(value, dict) and "median" in value:
            rest = ", ".join(f"{k} {_text(v)}" for k, v in value.items() if k != "median")
            print(f"{name:56} {_text(value['median']):>12}   {rest}")
        elif isinstance(value, dict):
            _show_lines(value, f"{name}.", aims)
        else:
            aim = f"   aim {aims[name]}" if name in aims else ""
            print(f"{name:56} {_text(value):>12}{aim}")


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
