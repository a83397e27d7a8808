"""`make gpu` without a GPU: its runner, and its measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rank_checks_gpu as checks
from ranks import Ranks, check_name

ROOT = Path(__file__).parents[1]
PRINTS = "import sys; print('a line'); print('{\"figure\": 1}'); sys.exit(int(sys.argv[1]))"
HANGS = "import os, time; os.fork(); os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    monkeypatch.setattr(gpu, "SCRATCH", tmp_path / "scratch")
    return gpu


def step(gpu: ModuleType, name: str, code: str, *arguments: str, **options: Any) -> Any:
    options = {"seconds": 60, **options}
    return gpu.Step(name, [sys.executable, "-c", code, *arguments], f"what {name} does", **options)


def go_through(gpu: ModuleType, todo: list[Any], out: Path, seconds: float = 60) -> int:
    status: int = gpu.go_through(
        todo, out, "cuda", gpus=0, seconds=seconds, environment=dict(os.environ)
    )
    return status


def outcomes(out: Path) -> dict[str, str]:
    steps = json.loads((out / "gpu.cuda.json").read_text())["steps"]
    return {name: step["outcome"] for name, step in steps.items()}


def test_a_step_that_fails_is_told_and_the_rest_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    todo = [
        step(gpu, "good", PRINTS, "0"),
        step(gpu, "bad", PRINTS, "3"),
        gpu.Step("lost", [str(tmp_path / "no such command")], "nothing", 60),
        step(gpu, "other machine", PRINTS, "0", gpus=2),
        step(gpu, "last", PRINTS, "0"),
    ]
    assert go_through(gpu, todo, tmp_path) == 1
    assert outcomes(tmp_path) == {
        "good": "passed",
        "bad": "FAILED: status 3",
        "lost": "FAILED",
        "other machine": "skipped: needs 2 GPU(s), found 0",
        "last": "passed",
    }
    page = (tmp_path / "gpu.md").read_text()
    assert "| bad | FAILED: status 3 | 0 | what bad does |" in page
    assert "## bad\n\n```text\na line\n```" in page
    assert "no such command" in page
    figures = json.loads((tmp_path / "gpu.cuda.json").read_text())["steps"]["bad"]["figures"]
    assert figures == {"figure": 1}


def test_nothing_failed(gpu: ModuleType, tmp_path: Path) -> None:
    assert go_through(gpu, [step(gpu, "good", PRINTS, "0")], tmp_path) == 0


def test_a_step_over_its_time_is_killed_with_its_children(gpu: ModuleType, tmp_path: Path) -> None:
    todo = [step(gpu, "slow", HANGS, seconds=3), step(gpu, "next", PRINTS, "0")]
    assert go_through(gpu, todo, tmp_path) == 1
    assert outcomes(tmp_path) == {"slow": "FAILED: out of time", "next": "passed"}
    pids = (tmp_path / "scratch" / "slow.log").read_text().split()
    assert len(pids) == 2
    assert not any(command_of(pid) for pid in pids)


def command_of(pid: str) -> bytes:
    """Return a process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def test_no_step_begins_when_the_time_of_all_is_over(gpu: ModuleType, tmp_path: Path) -> None:
    assert go_through(gpu, [step(gpu, "late", PRINTS, "0")], tmp_path, seconds=0) == 1
    assert outcomes(tmp_path) == {"late": "FAILED: out of time"}


def test_wheels_are_installed_first_and_outside_the_environment(gpu: ModuleType) -> None:
    without, with_wheels = gpu.steps([], False), gpu.steps(["a.whl", "b.whl"], False)
    assert [step.name for step in with_wheels] == ["install", *(step.name for step in without)]
    command = with_wheels[0].command
    assert {"--no-index", "--no-deps", "--target"} < set(command)
    assert command[-3:] == [str(gpu.SITE), "a.whl", "b.whl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpu", "nothing"], "STEP should be of"),
        (["--cpu", "--wheels", "no"], "a folder with wheels; received no"),
        ([], "expected a GPU, and nvidia-smi lists none"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    no_nvidia_smi = {**os.environ, "PATH": str(tmp_path)}
    result = subprocess.run(command, env=no_nvidia_smi, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr


def test_make_gpu_makes_no_environment() -> None:
    command = ["make", "-n", "gpu", "WHEELS=folder", "GPU=tests", "PYTHON=python"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if not line.startswith("make")]
    assert lines == ["python benchmarks/gpu.py --wheels folder tests"]


@pytest.fixture(scope="module")
def rank() -> Iterator[Ranks]:
    processes = Ranks(1)
    yield processes
    processes.close()


@pytest.mark.parametrize(
    "check",
    [
        (checks.check_counts,),
        *((checks.check_measure, name) for name in ("export", "gaps", "step")),
    ],
    ids=lambda check: check_name(*check),
)
def test_measures(rank: Ranks, check: tuple[Any, ...]) -> None:
    rank.run(*check)
