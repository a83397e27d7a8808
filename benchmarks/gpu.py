"""Run all that needs an NVIDIA GPU, on a machine that may have no network: `make gpu`.

    python benchmarks/gpu.py [STEP ...] [--wheels FOLDER] [--out FOLDER] [--minutes 9.5] [--cpu]

Each step is a command with an expected outcome and a time limit. A step that fails is reported, and
the next one runs. The results are a page, OUT/gpu.md, and the figures, OUT/gpu.cuda.json; logs and
traces, which are large, go into build/gpu. All wheels of the folder are installed beside the
machine's own packages, which stay as they are; CONTRIBUTING.md lists what the folder needs. --cpu
tries the same at tiny sizes on a machine without a GPU.

Nothing here imports torch, so that wheels that do not load are reported like any other failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
SCRATCH = ROOT / "build" / "gpu"
SITE = SCRATCH / "site"
TAIL_LINES = 25
JSON_START = '{"'  # of a line with figures
PASSED, FAILED, TOO_LATE, SKIPPED = "passed", "FAILED", "FAILED: out of time", "skipped"

VERSIONS = """
import contextlib, json, sys, torch
from importlib import metadata
import torchrec_exfm, torchrec, torchrec_exfm.das
versions = {}
for name in "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton", "deltalake", "pyarrow":
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions[name] = metadata.version(name)
versions["CUDA"] = torch.version.cuda
versions["GPU"] = "none" if "--cpu" in sys.argv else torch.cuda.get_device_name()
print(json.dumps(versions))
"""


class Step(NamedTuple):
    """A command, its expected outcome, its time limit and the number of GPUs it needs."""

    name: str
    command: Sequence[str]
    expected: str
    seconds: float
    gpus: int = 0
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """The outcome of a step, and what it printed."""

    word: str
    seconds: float
    output: str

    def figures(self) -> dict[str, Any]:
        """Return the JSON object that a step printed on a line of its own, the last one."""
        lines = [line for line in self.output.splitlines() if line.startswith(JSON_START)]
        return json.loads(lines[-1]) if lines else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="STEP", help="only these; none: all")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install before")
    parser.add_argument("--out", type=Path, help="where page and figures go: benchmarks/measured")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps together")
    parser.add_argument("--cpu", action="store_true", help="a trial without a GPU, at tiny sizes")
    options = parser.parse_args()
    wheels = sorted(map(str, options.wheels.glob("*.whl"))) if options.wheels else []
    if options.wheels and not wheels:
        parser.error(f"--wheels should be a folder with wheels; received {options.wheels}")
    gpus = 0 if options.cpu else number_of_gpus()
    if not gpus and not options.cpu:
        parser.error("expected a GPU, and nvidia-smi lists none: --cpu tries all without one")
    todo = steps(wheels, options.cpu)
    unknown = set(options.names) - {step.name for step in todo}
    if unknown:
        parser.error(f"STEP should be of {[step.name for step in todo]}; received {unknown}")
    todo = [step for step in todo if not options.names or step.name in options.names]
    if todo[0].name == "install":
        shutil.rmtree(SITE, ignore_errors=True)
    environment = dict(os.environ)
    paths = [str(SITE)] if wheels else []  # and this package, which need not be installed
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT), os.getenv("PYTHONPATH", "")])
    if options.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return go_through(
        todo,
        options.out or (SCRATCH if options.cpu else HERE / "measured"),
        "cpu" if options.cpu else "cuda",
        gpus=gpus,
        seconds=options.minutes * 60,
        environment=environment,
    )


def steps(wheels: Sequence[str], cpu: bool) -> list[Step]:
    """Return the steps, in order."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    measure = [sys.executable, str(HERE / "gpu_measures.py")]
    trial = ["--cpu"] if cpu else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    pip += ["--no-index", "--no-deps", "--no-compile", "--target", str(SITE)]
    needed = 0 if cpu else 1  # GPUs of the steps that --cpu can try
    sanitizer = {"TORCH_CUDA_SANITIZER": "1"}
    all_steps = [
        Step("install", [*pip, *wheels], "no message", 150),
        Step(
            "guard",
            # Not with -I, which would hide the installed wheels
            [sys.executable, str(ROOT / "torchrec_exfm" / "_versions.py")],
            "no message: torch, FBGEMM and TorchRec go together",
            20,
        ),
        Step(
            "import",
            [sys.executable, "-c", VERSIONS, *trial],
            "the versions, and the card's name",
            60,
            needed,
        ),
        Step("driver", ["nvidia-smi"], "the driver, and nobody else on the card", 20, 1),
        Step(
            "tests",
            [*pytest, "-m", "gpu"],
            "all pass, on two ranks where there are two GPUs",
            180,
            needed,
        ),
        Step(
            "sanitizer, TorchRec alone",
            [*pytest, "-k", "torchrecs_own"],
            "passes; if not, what the sanitizer says below is false alarm in part",
            60,
            1,
            sanitizer,
        ),
        Step(
            "sanitizer",
            [*pytest, "-k", "pipelined or live or ways or late or margins"],
            "all pass: no stream reads what another writes",
            150,
            1,
            sanitizer,
        ),
        Step(
            "step, 8,192",
            [*measure, "step", "--batch", "8192", *trial],
            "host: AH over plain, the recipe over AH, compiled between the two;"
            " whole: over plain by as much where the host is the limit, else less",
            120,
            needed,
        ),
        Step(
            "step, 65,536",
            [*measure, "step", "--batch", "65536", *trial],
            "whole: nearer to plain than at 8,192; compiled below eager",
            120,
            needed,
        ),
        Step(
            "profile",
            [*measure, "profile", "--traces", str(SCRATCH / "traces"), *trial],
            "no pageable copies in any arm; waits of the host as in plain; NCCL's kernels in each"
            " arm but plain beside other work (see the traces); fewer kernels where compiled",
            120,
            needed,
        ),
        Step(
            "export",
            [*measure, "export", *trial],
            "device memory in use while exporting: a small part of the table",
            120,
            needed,
        ),
        Step(
            "gaps",
            [*measure, "gaps", *trial],
            "no gap of over 2 ms between launches beside the reader that is not there without it",
            90,
            needed,
        ),
        Step(
            "step, two ranks",
            [*measure, "step", "--ranks", "2", "--batch", "8192"],
            "over plain as on one rank",
            120,
            2,
        ),
    ]
    return all_steps if wheels else all_steps[1:]


def go_through(
    todo: Sequence[Step],
    out: Path,
    device: str,
    *,
    gpus: int,
    seconds: float,
    environment: Mapping[str, str],
) -> int:
    """Run the steps, print the outcome of each, write the page; return 1 if any step failed."""
    deadline = time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    out.mkdir(parents=True, exist_ok=True)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    for step in todo:
        print(f"{step.name} ...", end=" ", flush=True)
        if step.gpus > gpus:
            outcome = Outcome(f"{SKIPPED}: needs {step.gpus} GPU(s), found {gpus}", 0.0, "")
        else:
            outcome = run(step, min(step.seconds, deadline - time.monotonic()), environment)
            (SCRATCH / f"{step.name.replace(' ', '_')}.log").write_text(outcome.output)
        outcomes[step.name] = outcome
        print(f"{outcome.word} ({outcome.seconds:.0f} s)", flush=True)
        if outcome.word.startswith(FAILED):
            print(f"  expected: {step.expected}\n{indented(tail(outcome.output))}", flush=True)
        # After each step, so that a run that is cut off leaves a page
        (out / "gpu.md").write_text(page(todo, outcomes))
        (out / f"gpu.{device}.json").write_text(json.dumps(as_json(outcomes), indent=1) + "\n")
    failed = [name for name, outcome in outcomes.items() if outcome.word.startswith(FAILED)]
    print(f"{out / 'gpu.md'}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def run(step: Step, seconds: float, environment: Mapping[str, str]) -> Outcome:
    """Run a step's command; past its time limit, kill it and all processes that it started."""
    began = time.monotonic()
    if seconds <= 0:
        return Outcome(TOO_LATE, 0.0, "")
    try:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**environment, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(FAILED, 0.0, str(error))
    try:
        output, _ = process.communicate(timeout=seconds)
        word = f"{FAILED}: status {process.returncode}" if process.returncode else PASSED
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        word = TOO_LATE
    return Outcome(word, time.monotonic() - began, output)


def number_of_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def page(todo: Sequence[Step], outcomes: Mapping[str, Outcome]) -> str:
    """Return the steps with their expected and actual outcomes, as Markdown."""
    done = [(step, outcomes[step.name]) for step in todo if step.name in outcomes]
    lines = [
        "# On a GPU",
        "",
        "Written by `make gpu`, from what its steps printed.",
        "",
        *(f"* {name}: {value}" for name, value in versions(outcomes).items()),
        "",
        "| step | outcome | seconds | expected |",
        "| --- | --- | --- | --- |",
        *(
            f"| {step.name} | {outcome.word} | {outcome.seconds:.0f} | {step.expected} |"
            for step, outcome in done
        ),
    ]
    for step, outcome in done:
        if tail(outcome.output):
            lines += ["", f"## {step.name}", "", "```text", tail(outcome.output), "```"]
    return "\n".join(lines) + "\n"


def versions(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    packages = outcomes["import"].figures() if "import" in outcomes else {}
    driver = outcomes["driver"].output if "driver" in outcomes else ""
    numbers = [part.split()[0] for part in driver.split("Driver Version:")[1:]]
    return {**packages, **({"driver": numbers[0]} if numbers else {})}


def as_json(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        "versions": versions(outcomes),
        "steps": {
            name: {
                "outcome": outcome.word,
                "seconds": round(outcome.seconds, 1),
                "figures": outcome.figures(),
            }
            for name, outcome in outcomes.items()
        },
    }


def tail(output: str) -> str:
    """Return the last printed lines, without the JSON."""
    lines = [line for line in output.rstrip().splitlines() if not line.startswith(JSON_START)]
    return "\n".join(lines[-TAIL_LINES:]).strip()


def indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
