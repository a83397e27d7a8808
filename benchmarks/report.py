"""Run the benchmarks, and write README.md beside them from what they measured.

    python benchmarks/report.py [NAME ...] [--quick] [--no-run]

Without names, all of them run, one after the other. What each prints is kept in measured/, one file
for each benchmark and kind of device, so that --no-run can write README.md without measuring. With
--quick nothing is kept, and the tables are printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TITLES = {
    "step": "A training step",
    "amortization": "One teacher, many students",
    "serving": "Serving",
    "scale": "As the work grows",
    "store": "The teacher store",
    "stalls": "A store that hangs, or is slow",
    "scoring": "Filling it",
    "join": "Outputs as columns",
    "memory": "Teacher memory",
    "readers": "Published data sets as streams",
}
HEAD = """# Benchmarks

What external distillation costs. What it brings is in `QUALITY.md`.

Each script answers one question. `make bench` runs them all and writes this page from what they
print, which is kept in `measured/`. No figure is written by hand. Each script also runs alone: it
prints a table, or one JSON object with `--json`. With `--quick` it takes about a minute.

Arms that are compared run in turns within one process. Figures are medians, with the quartiles in
brackets. Ratios are taken round by round. An *aim* is what the project wants to reach.

* **Plain**: the student without a teacher, in TorchRec's own pipeline.
* **AH**, auxiliary head: the heads that learn from the teacher, and are dropped at export.
* **SA**, student adapter: the small network that re-calibrates teacher outputs on fresh labels.
* **Columns**: teacher outputs come with the batch. **Store**: they are looked up in a teacher
  store. **Live**: the teacher's forward runs in the student's step.
* **Wall**: by the clock. **CPU**, or **on a core**: seconds in which threads had a core, so that
  other work on the machine counts less.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TITLES)}")
    parser.add_argument("--quick", action="store_true", help="print small runs, keep nothing")
    parser.add_argument("--no-run", action="store_true", help="write README.md from what is kept")
    options = parser.parse_args()
    unknown = set(options.names) - set(TITLES)
    if unknown:
        parser.error(f"NAME should be of {list(TITLES)}; received {sorted(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) if options.quick else HERE / "measured"
        results.mkdir(exist_ok=True)
        for name in [] if options.no_run else options.names or TITLES:
            run(name, options.quick, results)
        text = page(results)
    if options.quick:
        print(text)
    else:
        (HERE / "README.md").write_text(text)


def page(folder: Path) -> str:
    """Return the page of what is kept in a folder."""
    return HEAD + "".join(section(name, folder) for name in TITLES)


def run(name: str, quick: bool, folder: Path) -> None:
    """Run a benchmark, and keep what it prints."""
    print(f"benchmarks/{name}.py ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", *(["--quick"] if quick else [])]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(printed.splitlines()[-1])
    device = "cpu" if result["environment"]["gpu"] == "none" else "cuda"
    (folder / f"{name}.{device}.json").write_text(json.dumps(result, indent=1) + "\n")


def section(name: str, folder: Path) -> str:
    """Return what is kept of a benchmark, as text; nothing if it was not run."""
    files = sorted(folder.glob(f"{name}.*.json"))
    if not files:
        return ""
    benchmark: Any = importlib.import_module(name)
    question = benchmark.__doc__.splitlines()[0]
    parts = [f"\n## {TITLES[name]}: `python benchmarks/{name}.py --json`\n\n{question}\n"]
    for file in files:
        result = json.loads(file.read_text())
        parts.append(f"\n{benchmark.markdown(result)}\n\n{machine(result['environment'])}\n")
    return "".join(parts)


def machine(environment: dict[str, Any]) -> str:
    """Return the machine and the versions of a run, in small print."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    where = f"{environment['cores']} cores of {environment['cpu']}, GPU: {environment['gpu']}"
    return f"<sub>{where}; {versions}; load average {environment['load_average_at_end']}</sub>"


if __name__ == "__main__":
    main()
