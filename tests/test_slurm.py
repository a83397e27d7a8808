"""The TorchX components on a real Slurm, judged by what their jobs write.

`make slurm` starts one with four virtual nodes and runs this file, which skips without it. The jobs
are the scripts of the promotion-response example, on a twentieth of the households.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import das_data as dd
import numpy as np
import pytest

from torchrec_exfm.das import TeacherStore, published
from torchx_components import exfm

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "promo_response"
FAILING = ROOT / "tests" / "failing_stream.py"
NODES = {"exfm1", "exfm2", "exfm3", "exfm4"}
WEEKS = 4
ROLES = "teacher", "DRUG-GM", "MEAT"  # those that train, as their folders are named
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
SECONDS = 400  # for a job; Slurm itself waits 120 before it starts one again


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "EXFM_TEST_SLURM" not in os.environ, reason="needs the Slurm that make slurm starts"
    ),
]


class Job:
    """A job on Slurm; TorchX submits each replica of a role as a part of it."""

    def __init__(self, folder: Path, component: str, script: Path, *args: str) -> None:
        command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "slurm"]
        command += ["-cfg", "partition=cpu,time=10", f"{exfm.__file__}:{component}"]
        command += ["--script", str(script), "--cpu", "2", "--memMB", "2000", *args]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # torchrun
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            "SBATCH_OPEN_MODE": "append",  # a second attempt keeps the log of the first
        }
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        match = re.search(r"slurm://\w+/(\d+)", run.stdout)
        assert match is not None, run.stderr
        self.folder, self.id = folder, match[1]

    def parts(self) -> dict[str, dict[str, str]]:
        """The fields that `scontrol` shows of each part, by the part's name."""
        lines = slurm("scontrol", "show", "job", self.id, "--oneliner").splitlines()
        parts = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
        return {part["JobName"]: part for part in parts}

    def states(self) -> dict[str, str]:
        return {name: part["JobState"] for name, part in self.parts().items()}

    def wait(self) -> dict[str, str]:
        """Wait until all parts have ended; return their states."""
        deadline = time.monotonic() + SECONDS
        while not ENDED.issuperset(self.states().values()):
            assert time.monotonic() < deadline, (self.states(), slurm("squeue"), self.log())
            time.sleep(1)
        return self.states()

    def log(self, part: str = "*", stream: str = "*") -> str:
        """The text of a part's log, `slurm-JOB-PART.out` or `.err`."""
        paths = sorted(self.folder.glob(f"slurm-{self.id}-{part}.{stream}"))
        return "".join(path.read_text() for path in paths)


class Examples(NamedTuple):
    """Columns of the stream, one value per example."""

    ids: np.ndarray
    seconds: np.ndarray
    week: np.ndarray
    household: np.ndarray
    department: np.ndarray


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stream of a twentieth of the households, as the scripts load it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        import data

        folder = tmp_path_factory.mktemp("cache")
        stream = data.load_stream(progress=False)
        part = stream.select(stream.sparse["household"] % 80 < 4)
        data.save(part, folder / f"promo_response-v{data.FORMAT_VERSION}-seed0")
    return folder


@pytest.fixture(scope="module")
def examples(cache: Path) -> Examples:
    (folder,) = cache.iterdir()
    names = np.array(json.loads((folder / "meta.json").read_text())["verticals"])
    columns = "example_id", "time", "week", "sparse.household", "vertical"
    *others, vertical = (np.load(folder / f"{name}.npy") for name in columns)
    return Examples(*others, names[vertical])


@pytest.fixture(scope="module", autouse=True)
def failing_once(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that fails once. It is submitted first: others run while Slurm delays its restart."""
    folder = tmp_path_factory.mktemp("once")
    args = ["-j", "2x1", "--max_retries", "1", "--env", "FAILS=once", "--rdzv_port", "29501"]
    return Job(folder, "train", FAILING, *args, "--", *stream_options(cache))


@pytest.fixture(scope="module")
def scored(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A scoring job of two ranks that has ended."""
    folder = tmp_path_factory.mktemp("scored")
    args = ["-j", "1x2", "--", "--cache", str(cache), "--store", "store"]
    job = Job(folder, "score", EXAMPLE / "score.py", *args)
    assert job.wait() == {"score-0": "COMPLETED"}, job.log()
    return job


def test_a_scoring_job_fills_a_store(scored: Job, examples: Examples) -> None:
    store = TeacherStore(scored.folder / "store")
    (snapshot,) = published(store, "half-year")
    first_half = examples.week < 27
    assert snapshot.trained_through_seconds == examples.seconds[first_half].max()
    departments = ["DRUG GM", "MEAT", "MEAT-PCKGD", "SEAFOOD-PCKGD", "PRODUCE", "DELI", "PASTRY"]
    asked = ~first_half & np.isin(examples.department, departments)
    rows = dd.all_rows(store, "half-year")
    np.testing.assert_array_equal(rows.example_id, np.sort(examples.ids[asked]))
    assert not rows.logged.any()


def test_two_nodes_train_from_the_store(scored: Job, cache: Path) -> None:
    args = ["--cache", str(cache), "--store", str(scored.folder / "store")]
    args += ["--teacher", "half-year", "--student", "MEAT"]
    job = Job(scored.folder, "train", EXAMPLE / "train.py", "-j", "2x1", "--", *args)
    assert job.wait() == {"train-0": "COMPLETED", "train-1": "COMPLETED"}, job.log()
    nodes = {part["NodeList"] for part in job.parts().values()}
    assert len(nodes) == 2 and nodes <= NODES
    # One line, by rank 0, on whichever node that is: the nodes have met.
    (line,) = re.findall(r"^.*NE \d.*$", job.log(stream="out"), re.MULTILINE)
    assert re.match(r"\[0\]:MEAT, AH: NE \d\.\d{4}, AUC 0\.\d{4}", line)


def test_a_stream_is_a_job_of_four_parts(cache: Path, examples: Examples, tmp_path: Path) -> None:
    args = ["-j", "1x1", "--students", "DRUG GM,MEAT", "--", *stream_options(cache)]
    job = Job(tmp_path, "stream", EXAMPLE / "stream.py", *args)
    parts = ["teacher-0", "scorer-0", "student-drug-gm-0", "student-meat-0"]
    assert job.wait() == dict.fromkeys(parts, "COMPLETED"), job.log()
    assert {part["NodeList"] for part in job.parts().values()} == NODES
    check_stream(tmp_path / "out", examples)
    for student in "DRUG GM", "MEAT":
        part = f"student-{student.lower().replace(' ', '-')}-0"
        assert job.log(part, "out").count(f"{student}: through") == WEEKS


def test_one_role_that_fails_ends_the_others(cache: Path, tmp_path: Path) -> None:
    args = ["-j", "1x1", "--students", "DRUG GM,MEAT", "--", *stream_options(cache, weeks=53)]
    job = Job(tmp_path, "stream", FAILING, *args)
    assert set(job.wait().values()) == {"FAILED"}, job.log()
    assert "RuntimeError: a bug of the student MEAT" in job.log("student-meat-0", "err")
    assert job.log("student-drug-gm-0", "out").count("DRUG GM: through") < 53
    assert "signal: 15" in job.log("student-drug-gm-0", "err")  # srun has ended the others
    assert checkpoints(tmp_path / "out" / "MEAT") == [1]  # the first week; the second one failed


def test_a_job_that_failed_once_resumes(failing_once: Job, examples: Examples) -> None:
    states = failing_once.wait()
    assert states == {"train-0": "COMPLETED", "train-1": "COMPLETED"}, failing_once.log()
    assert {part["Restarts"] for part in failing_once.parts().values()} == {"1"}
    # In the second attempt only MEAT had weeks left, from the one in which it had failed.
    log = failing_once.log(stream="out")
    for role, repeated in {"teacher": 0, "scorer": 0, "DRUG GM": 0, "MEAT": 1}.items():
        assert log.count(f"{role}: through") == WEEKS + repeated
    # A role saves once a week. Had it started over, its last checkpoint would have a higher number.
    check_stream(failing_once.folder / "out", examples)
    for role in ROLES:
        path = failing_once.folder / "out" / role / str(WEEKS) / "metadata.json"
        assert {"rank0/random", "rank1/random"} <= json.loads(path.read_text())["tensors"].keys()


def stream_options(cache: Path, weeks: int = WEEKS) -> list[str]:
    return ["--weeks", "1", str(weeks), "--cache", str(cache), "--out", "out"]


def check_stream(folder: Path, examples: Examples) -> None:
    """Check that each example has an output, and that every role has reached the last week."""
    store = TeacherStore(folder / "store")
    in_stream, by_teacher = examples.week <= WEEKS, examples.household % 4 > 0
    seen_by_students = np.isin(examples.department, ["DRUG GM", "MEAT"])
    rows = dd.all_rows(store, "rich")
    logged, scored = rows.example_id[rows.logged], rows.example_id[~rows.logged]
    assert not len(np.setdiff1d(logged, examples.ids[in_stream & by_teacher]))
    assert len(logged) >= (in_stream & by_teacher).sum() - WEEKS  # two ranks leave out an odd one
    # No snapshot is old enough for the first weeks: two until it is published, one of delay.
    np.testing.assert_array_equal(
        scored,
        np.sort(examples.ids[in_stream & (examples.week > 3) & seen_by_students & ~by_teacher]),
    )
    assert [snapshot.version for snapshot in published(store, "rich")] == [1, 2]
    end_seconds = store.watermark("rich")
    assert end_seconds == store.watermark("rich/scores")
    last = examples.seconds[in_stream].max()
    assert last < end_seconds <= examples.seconds[examples.week == WEEKS + 1].min()
    for role in ROLES:
        assert checkpoints(folder / role) == [WEEKS - 1, WEEKS]


def checkpoints(folder: Path) -> list[int]:
    """The numbers of a role's checkpoints: one is written each week, and the last two are kept."""
    return sorted(int(path.name) for path in folder.iterdir())
