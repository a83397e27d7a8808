"""Run the notebooks of this folder from top to bottom, each in a temporary copy of the folder.

    python examples/notebooks/execute.py                       # all, and the seconds of each
    python examples/notebooks/execute.py 01_quickstart.ipynb   # one
    python examples/notebooks/execute.py --write               # and keep their outputs

A cell that fails ends the run with its error. The outputs that are kept hold no times, no warnings
and no names of this machine, so that a second run changes little.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NEEDED = "examples/notebooks", "examples/promo_response", "examples/retrieval", "benchmarks"
CELL_SECONDS = 600  # a cell that takes longer hangs
MAX_BYTES = 150_000


def main() -> None:
    """Run the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="files of this folder; none: all")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebooks")
    options = parser.parse_args()
    for name in options.names or sorted(path.name for path in HERE.glob("*.ipynb")):
        started = time.perf_counter()
        notebook = execute(HERE / name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        if options.write:
            write(notebook, HERE / name)


def execute(path: Path) -> Any:
    """Run a notebook in a copy of its folder, with the folders that it needs; return it."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            ignored = shutil.ignore_patterns("__pycache__", ".*", "measured")
            shutil.copytree(ROOT / name, Path(folder, name), ignore=ignored)
        # One thread for the same sums each time; no start-up files of the user's; stores and other
        # temporary files that are deleted with the folder.
        environment = {"OMP_NUM_THREADS": "1", "IPYTHONDIR": folder, "TMPDIR": folder}
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}  # files: no open port
        working_folder = str(Path(folder, NEEDED[0]))
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": working_folder}},
            config=Config({"KernelManager": sockets}),
        )
        client.execute(env={**os.environ, **environment})
    return notebook


def write(notebook: Any, path: Path) -> None:
    """Write a notebook without what differs from run to run or from machine to machine.

    Raises:
        ValueError: if it is larger than MAX_BYTES.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in outputs:
                output.get("data", {}).pop("text/html", None)  # text/plain holds the same
                if "image/png" in output.get("data", {}):
                    output["data"].pop("text/plain", None)  # <Figure size ...>
            cell.outputs = outputs
    text = nbformat.writes(notebook) + "\n"
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path.name} should be at most {MAX_BYTES} bytes; received {len(text)}")
    path.write_text(text)


if __name__ == "__main__":
    main()
