"""The TorchX components: what TorchX reads of them, what they run, what schedulers are given.

The files in `golden/` hold what is ours of a dry run. `RENEW_GOLDEN=1 make test
PYTEST_ARGS=tests/test_torchx.py` writes them anew: read the difference before you keep it.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchx import specs
from torchx.runner import get_runner
from torchx.specs.file_linter import get_fn_docstring, validate

from torchx_components import exfm

COMPONENTS = exfm.__file__
GOLDEN = Path(__file__).with_name("golden")
BIN = str(Path(sys.executable).parent)  # where torchrun is

both = pytest.mark.parametrize("component", [exfm.score, exfm.train])
every = pytest.mark.parametrize("component", [exfm.score, exfm.train, exfm.stream])


@every
def test_torchx_reads_signature_and_help(component: Callable[..., specs.AppDef]) -> None:
    assert validate(COMPONENTS, component.__name__) == []
    text, helps = get_fn_docstring(component)
    assert text.startswith(("Score the examples", "Train one student", "Run a teacher"))
    assert all(line.strip() and "\n" not in line for line in helps.values())


@both
def test_what_a_component_gives(component: Callable[..., specs.AppDef]) -> None:
    env = {"LEVEL": "3"}
    app = component(
        "jobs/run.py",
        "--store",
        "a b",
        j="1x4",
        name="mine",
        image="exfm:1",
        cpu=8,
        gpu=4,
        memMB=16_000,
        env=env,
        mounts=["type=bind", "src=/data", "dst=/stores", "readonly"],
        max_retries=3,
    )
    (role,) = app.roles
    assert (app.name, role.name) == ("mine", component.__name__)
    assert (role.entrypoint, role.image, role.num_replicas) == ("torchrun", "exfm:1", 1)
    assert role.args == [
        *("--rdzv_endpoint", "localhost:0"),
        *("--rdzv_backend", "c10d", "--rdzv_id", specs.macros.app_id),
        *("--nnodes", "1", "--nproc_per_node", "4", "--tee", "3", "--role", ""),
        *("jobs/run.py", "--store", "a b"),
    ]
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (8, 4, 16_000)
    assert role.env == env
    assert role.env is not env  # TorchX adds its own to it
    assert role.mounts == [specs.BindMount("/data", "/stores", read_only=True)]
    assert role.max_retries == 3


@both
def test_a_named_resource(component: Callable[..., specs.AppDef]) -> None:
    (role,) = component("run.py", h="aws_p4d.24xlarge", cpu=1).roles
    assert (role.resource.cpu, role.resource.gpu) == (96, 8)


def test_a_module_in_place_of_a_file() -> None:
    (role,) = exfm.score("jobs.run", "a").roles
    assert role.args[-3:] == ["-m", "jobs.run", "a"]


def test_several_nodes_meet_on_the_first() -> None:
    (role,) = exfm.score("run.py", "$HOME", j="3x8", rdzv_port=1234).roles
    assert (role.entrypoint, role.num_replicas, role.port_map) == ("bash", 3, {"c10d": 1234})
    applied = specs.macros.Values("", "app", "0", rank0_env="FIRST").apply(role)
    shell = [role.entrypoint, *applied.args]
    shell[2] = shell[2].replace("exec torchrun", "printf '%s\n'")
    for env, host in ({"FIRST": "node-1"}, "node-1"), ({"FIRST": ""}, "localhost"):
        printed = subprocess.run(shell, env=os.environ | env, capture_output=True, text=True)
        assert printed.stdout.splitlines() == [
            *("--rdzv_endpoint", f"{host}:1234", "--rdzv_backend", "c10d", "--rdzv_id", "app"),
            *("--nnodes", "3", "--nproc_per_node", "8", "--tee", "3", "--role", ""),
            *("run.py", "$HOME"),
        ]


def test_each_student_is_a_role_of_one_node() -> None:
    app = exfm.train("run.py", "--seed", "1", students=["DRUG GM", "b"], j="1x2")
    assert [role.name for role in app.roles] == ["student-drug-gm", "student-b"]
    assert [role.num_replicas for role in app.roles] == [1, 1]
    assert [role.args[-5:] for role in app.roles] == [
        ["run.py", "--student", "DRUG GM", "--seed", "1"],
        ["run.py", "--student", "b", "--seed", "1"],
    ]


def test_the_roles_of_a_stream() -> None:
    def roles(**options: Any) -> dict[str, list[str]]:
        app = exfm.stream("run.py", "--seed", "1", students=["DRUG GM", "b"], j="1x2", **options)
        assert {role.num_replicas for role in app.roles} == {1}
        return {role.name: role.args[role.args.index("run.py") + 1 :] for role in app.roles}

    expected = {
        "teacher": ["--role", "teacher", "--seed", "1"],
        "scorer": ["--role", "scorer", "--seed", "1"],
        "student-drug-gm": ["--role", "student", "--student", "DRUG GM", "--seed", "1"],
        "student-b": ["--role", "student", "--student", "b", "--seed", "1"],
    }
    assert roles() == expected
    del expected["scorer"]
    assert roles(scorer=False) == expected


def test_a_resource_for_each_role_of_a_stream() -> None:
    app = exfm.stream("run.py", students=["a"], gpu=1, env={"A": "b"}, max_retries=2, image="i")
    for role in app.roles:
        assert (role.resource.gpu, role.env, role.max_retries) == (1, {"A": "b"}, 2)
        assert role.image == "i"


@pytest.mark.parametrize("j", ["2", "1:2x4", "0x2", "2x0", "2x", "2X4", "-1x2", " 1x2", ""])
def test_a_bad_j(j: str) -> None:
    with pytest.raises(ValueError, match=rf"\{{nodes\}}x\{{nproc\}}.*Received: {j}\. Write -j 1x2"):
        exfm.score("run.py", j=j)


@pytest.mark.parametrize("script", ["run", "jobs/run", "jobs/run.sh", "jobs.", "a-b.run", ""])
def test_a_bad_script(script: str) -> None:
    message = re.escape(f".py or a dotted module name. Received: {script}. Write --script")
    with pytest.raises(ValueError, match=message):
        exfm.train(script)


def test_bad_students() -> None:
    with pytest.raises(ValueError, match=r"should be 1x\{nproc\}.*Received: 2x4\. For a student"):
        exfm.train("run.py", students=["a", "b"], j="2x4")
    with pytest.raises(ValueError, match=r"should be 1x\{nproc\}.*Received: 2x4"):
        exfm.stream("run.py", students=["a"], j="2x4")
    for component in exfm.train, exfm.stream:
        for students in (["a b", "A-B"], ["a", ""], ["a", "a"]):
            received = rf"differ.*Received: {', '.join(students)}\. Write --students A,B"
            with pytest.raises(ValueError, match=received):
                component("run.py", students=students)
    with pytest.raises(ValueError, match="Received: none"):
        exfm.stream("run.py", students=[])


VALID = re.compile("[a-z]([a-z0-9-]*[a-z0-9])?")


def cut(name: str) -> str:
    """The name with a sign in the place of its digest."""
    return re.sub("-[0-9a-f]{8}$", "-#", name)


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("exfm-train", "b"),
        ("my-ads-2026", "7"),
        ("n" * 34, "b"),
        ("a", "b" * 34),
        ("n" * 11, "b" * 24),
    ],
)
def test_names_that_are_valid_stay(name: str, student: str) -> None:
    app = exfm.train("run.py", students=[student], name=name)
    assert (app.name, app.roles[0].name) == (name, f"student-{student}")


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("Ads_Ranking/CTR", "ads-ranking-ctr"),
        ("2026-run", "exfm-2026-run"),
        ("-x-", "exfm-x"),
        ("広告", "exfm-#"),
        ("n" * 40, "n" * 29 + "-#"),
    ],
)
def test_the_name_of_a_job_is_made_valid(name: str, valid: str) -> None:
    assert cut(exfm.score("run.py", name=name).name) == valid


@pytest.mark.parametrize(
    ("student", "valid"),
    [
        ("DRUG GM", "student-drug-gm"),
        ("広告", "student-#"),
        ("click広告", "student-click-#"),
        ("+", "student-#"),
        ("s" * 70, "student-" + "s" * 16 + "-#"),
        ("s" * 14 + "-" * 9 + "t" * 50, "student-" + "s" * 14 + "-t-#"),
    ],
)
def test_the_name_of_a_role_is_made_valid(student: str, valid: str) -> None:
    (role,) = exfm.train("run.py", students=[student]).roles
    assert cut(role.name) == valid
    assert role.args[-2:] == ["--student", student]


def test_long_names_that_differ_at_the_end_stay_apart() -> None:
    students = ["s" * 70 + "a", "s" * 70 + "b", "広告", "広吿"]
    roles = exfm.stream("run.py", students=students).roles
    assert len({role.name for role in roles}) == 6


SCRIPT = """
import os, sys
from pathlib import Path

import torch
import torch.distributed as dist

if os.environ["MOOD"] == "bad":
    sys.exit(1)
dist.init_process_group("gloo")
ranks = torch.ones(())
dist.all_reduce(ranks)
Path(sys.argv[1], str(dist.get_rank())).write_text(f"{ranks.item():.0f}")
dist.destroy_process_group()
"""


def run_locally(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`torchx run` of the script, as one types it."""
    folder.joinpath("run.py").write_text(SCRIPT)
    folder.joinpath("out").mkdir()
    line = [sys.executable, "-m", "torchx.cli.main", "run", "--scheduler", "local_cwd"]
    line += [f"{COMPONENTS}:score", "--script", "run.py", *options, "--", "out"]
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("j", ["1x2", "2x1"])
def test_two_ranks_run_locally(tmp_path: Path, j: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ran = run_locally(tmp_path, "-j", j, "--rdzv_port", port, "--env", "MOOD=good")
    assert ran.returncode == 0, ran.stderr
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {"0": "2", "1": "2"}


@pytest.mark.slow
def test_a_script_that_fails_fails_the_job(tmp_path: Path) -> None:
    ran = run_locally(tmp_path, "-j", "1x1", "--env", "MOOD=bad")
    assert ran.returncode == 1
    assert "FAILED" in ran.stderr
    assert not list((tmp_path / "out").iterdir())


JOBS = {
    "score": ["-j", "2x4", "--max_retries", "2", "--env", "LEVEL=3,MOOD=good"],
    "train": ["-j", "1x4", "--students", "DRUG GM,b"],
    "stream": ["-j", "1x4", "--students", "DRUG GM"],
}
ODD = {
    "score": ["-j", "12x1", "--name", "Ads_Ranking/CTR " * 5],
    "train": ["-j", "1x1", "--students", f"{'s' * 70},広告", "--name", "Ads_Ranking/CTR"],
    "stream": ["-j", "1x1", "--students", f"{'s' * 70},a b", "--name", "7" * 70],
}
COMMON = ["--script", "jobs/run.py", "--image", "exfm:1", "--cpu", "8"]
COMMON += ["--mounts", "type=volume,src=data,dst=/stores", "--", "--store", "/stores/a b"]


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The request that a scheduler would be given, as TorchX prints it."""
    monkeypatch.chdir(tmp_path)  # without a .torchxconfig
    monkeypatch.setenv("PATH", str(tmp_path))  # without a sinfo, which speaks of its cluster

    def request(name: str, scheduler: str, jobs: Any = JOBS, **cfg: Any) -> str:
        with get_runner() as runner:
            args = jobs[name] + COMMON
            return str(runner.dryrun_component(f"{COMPONENTS}:{name}", args, scheduler, cfg))

    return request


def check_golden(file: str, text: str) -> None:
    golden = GOLDEN / file
    if os.environ.get("RENEW_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", JOBS)
def test_what_slurm_is_given(name: str, dry_run: Callable[..., str]) -> None:
    script = dry_run(name, "slurm", partition="gpu", time="2:00:00")
    head = re.findall("^#SBATCH .*", script, re.MULTILINE)
    head += re.findall("^export TORCHX_.*", script, re.MULTILINE)
    (command,) = re.findall(r"^srun (.*)\nexitcode", script, re.MULTILINE | re.DOTALL)
    words = shlex.split("srun " + command.replace(":\\\n", ": "))
    words = [re.sub(",TORCHX_[A-Z_]+=[^,]*", "", word) for word in words]
    check_golden(f"slurm_{name}.txt", "\n".join([*head, *words, ""]))


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.filterwarnings("ignore:(?s).*Volcano.*retries:UserWarning")
def test_what_kubernetes_is_given(name: str, dry_run: Callable[..., str]) -> None:
    # without a cluster that newer TorchX would ask whether the job is valid
    request = yaml.safe_load(dry_run(name, "kubernetes", queue="research", validate_spec=False))
    tasks = []
    for task in request["spec"]["tasks"]:
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        container["env"] = [
            variable for variable in container["env"] if not variable["name"].startswith("TORCHX_")
        ]
        del container["resources"]["requests"]  # what TorchX leaves free on a node
        ours = {key: task.get(key) for key in ("name", "maxRetry", "replicas")}
        tasks.append(ours | {"container": container, "volumes": pod["volumes"]})
    text = yaml.safe_dump({"queue": request["spec"]["queue"], "tasks": tasks})
    check_golden(f"kubernetes_{name}.yaml", text.replace(request["metadata"]["name"], "APP_ID"))


@pytest.mark.parametrize("name", ODD)
def test_kubernetes_is_given_valid_names(
    name: str, dry_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = sys.modules["torchx.schedulers.kubernetes_scheduler"]
    longest_id = "x" * 14  # that TorchX makes of 64 random bits
    monkeypatch.setattr(scheduler, "make_unique", lambda app: f"{app}-{longest_id}")
    request = yaml.safe_load(
        dry_run(name, "kubernetes", ODD, queue="research", validate_spec=False)
    )
    job = request["metadata"]["name"]
    assert VALID.fullmatch(job)
    for task in request["spec"]["tasks"]:
        assert VALID.fullmatch(task["name"])
        assert len(f"{job}-{task['name']}-0") <= 63  # the pod's
        for value in task["template"]["metadata"]["labels"].values():
            assert len(value) <= 63 and re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", value)


@pytest.mark.parametrize("name", ODD)
def test_slurm_is_given_valid_names(name: str, dry_run: Callable[..., str]) -> None:
    script = dry_run(name, "slurm", ODD, partition="gpu", time="2:00:00")
    names = re.findall("--job-name=([^ ]+)", script)
    assert names and all(VALID.fullmatch(job) for job in names)
