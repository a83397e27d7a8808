"""The command of a study: see :mod:`torchrec_exfm.study`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchrec_exfm._ranks import rank
from torchrec_exfm.study import Study, run


def main() -> None:
    """Run the study of a module, on the ranks that torchrun started or in this process alone."""
    parser = argparse.ArgumentParser(
        prog="python -m torchrec_exfm.study",
        description="find out whether a teacher pays for your student, and with which setting",
    )
    parser.add_argument("module", type=Path, help="a file with make_student, stream, tap ...")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="by default results/NAME for a file NAME.py")
    options = parser.parse_args()
    if not options.module.is_file():
        parser.error(f"module should be a Python file; received {options.module}")
    _set_up()
    names = _names_in(options.module)
    folder = options.out or Path("results") / options.module.stem
    key = f"{options.module.read_text()}{names.pop('key', '')}"
    text = run(Study(**names), seeds=options.seeds, folder=folder, key=key)
    if rank() == 0:
        print(text)
    dist.destroy_process_group()


def _names_in(path: Path) -> dict[str, Any]:
    """Return the fields of a study, and ``key``, that a module defines."""
    sys.path.insert(0, str(path.parent))  # as for a script: it may import its neighbours
    names = vars(importlib.import_module(path.stem))
    fields = dataclasses.fields(Study)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in names]
    if missing:
        raise SystemExit(
            f"{path} should define make_student, stream and tap; received one without "
            f"{', '.join(missing)}: examples/study_minimal.py shows them"
        )
    known = [*(f.name for f in fields), "key"]
    return {name: names[name] for name in known if name in names}


def _set_up() -> None:
    """Join the ranks, and keep TorchRec's planning out of the terminal."""
    for name in ("", "torch.fx", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu)(\.|$)")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        meeting_point = f"file://{tempfile.mkdtemp()}/ranks"  # a port could be taken
        dist.init_process_group(backend, init_method=meeting_point, rank=0, world_size=1)


if __name__ == "__main__":
    main()
