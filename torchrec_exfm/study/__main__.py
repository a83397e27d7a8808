"""The command of a study: see :mod:`torchrec_exfm.study`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from torchrec_exfm._ranks import rank
from torchrec_exfm.study import Study, run
from torchrec_exfm.study.passes import device


def main() -> None:
    """Join the ranks that torchrun started, or be the only one, and run the study of a module."""
    parser = argparse.ArgumentParser(
        prog="python -m torchrec_exfm.study",
        description="does a teacher pay for a student of yours, and with which setting",
    )
    parser.add_argument("module", type=Path, help="a file with make_student, stream, tap ...")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="by default results/NAME, NAME being the file's")
    options = parser.parse_args()
    if not options.module.is_file():
        parser.error(f"module should be a Python file; received {options.module}")
    _join_ranks()
    sys.path.insert(0, str(options.module.parent))  # as for a script: what lies beside it
    names = runpy.run_path(str(options.module))
    study = study_of(names, options.module)
    folder = options.out or Path("results") / options.module.stem
    text = run(study, seeds=options.seeds, folder=folder, key=options.module.read_text())
    if rank() == 0:
        print(text)
    dist.destroy_process_group()


def study_of(names: dict[str, object], module: Path) -> Study:
    """The study that a module's names make.

    Raises:
        SystemExit: for a module that lacks one of those that a study needs.
    """
    fields = dataclasses.fields(Study)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in names]
    if needed:
        raise SystemExit(
            f"{module} should define {', '.join(needed)}; received a module without: see "
            "`python -c 'help(\"torchrec_exfm.study.Study\")'`"
        )
    return Study(**{f.name: names[f.name] for f in fields if f.name in names})  # type: ignore[arg-type]


def _join_ranks() -> None:
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "nccl" if where.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        meeting_point = f"file://{tempfile.mkdtemp()}/ranks"
        dist.init_process_group(backend, init_method=meeting_point, rank=0, world_size=1)


if __name__ == "__main__":
    main()
