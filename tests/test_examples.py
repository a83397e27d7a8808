"""The minimal examples, started by torchrun as their docstrings say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import das_data as dd
import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_exfm.das import TeacherStore, published

ROOT = Path(__file__).parents[1]
SECONDS = 150  # a start takes ten, on two cores that do nothing else

pytestmark = pytest.mark.slow


def start(script: str, folder: Path, *options: str, ranks: int = 2) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun.append(f"--nproc-per-node={ranks}")
    return subprocess.Popen(
        [*torchrun, f"examples/{script}", "--folder", str(folder), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs(*jobs: subprocess.Popen[str]) -> list[str]:
    """What the jobs print; each has to succeed."""
    try:
        texts = [job.communicate(timeout=SECONDS)[0] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()  # torchrun ends its ranks
    for job, text in zip(jobs, texts, strict=True):
        assert job.returncode == 0, text
    return texts


def test_training_resumes_and_exports_the_bare_student(tmp_path: Path) -> None:
    for begin, end in (0, 4), (4, 6):
        (text,) = outputs(start("train_minimal.py", tmp_path, f"--steps={end}"))
        assert f"trained from step {begin} to {end}\n" in text
        assert text.count("label=1.0000") >= 2  # the coverage of both teachers
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "2"]
    names = ["user", "item"]
    tables = [EmbeddingBagConfig(500, 16, name=name, feature_names=[name]) for name in names]
    bare = DLRMTrain(DLRM(EmbeddingBagCollection(tables), 1, [16], [32, 1]))
    bare.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))


def test_roles_of_a_stream_meet_in_the_store(tmp_path: Path) -> None:
    def role(name: str, windows: int, ranks: int = 2) -> subprocess.Popen[str]:
        options = f"--role={name}", f"--hours={windows}"
        return start("stream_minimal.py", tmp_path, *options, ranks=ranks)

    outputs(role("student", 2), role("scorer", 3, ranks=1), role("teacher", 3))
    (resumed,) = outputs(role("student", 3))
    assert set(re.findall("done with hour .", resumed)) == {"done with hour 2"}  # not 1 again
    assert re.findall("coverage=(.*?)[],]", resumed)[-1] == "1.0000"
    store = TeacherStore(tmp_path / "store")
    assert [snapshot.version for snapshot in published(store, "fm")] == [1, 2, 3]
    ids = np.arange(3 * 4096)  # those of hour 0 as far as they are logged
    stored = dd.all_rows(store).example_id - 489_000 * 4096
    assert stored.tolist() == ids[(ids >= 4096) | (ids % 4 > 0)].tolist()
