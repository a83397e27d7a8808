"""TorchX components for the jobs of external distillation: scoring, students, whole streams.

One on this machine::

    torchx run -s local_cwd torchx_components/exfm.py:score -j 1x2 --script score.py -- --store out

Each is a function that gives a plain ``AppDef``, whose roles run ``torchrun`` from the PATH and
nothing of this package but what the script imports. TorchX makes options and help of the signatures
and docstrings; its release 0.7 knows no other spelling of a type than ``Optional[List[str]]``.
"""

import hashlib
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

from torchx import specs

# Kubernetes takes names of pods up to 63 characters. With Volcano they are
# {name}-{id of up to 14}-{role}-{replica}-0.
_POD = 63 - len("--") - 14 - len("-") - len("-0")
_ROLE = 24  # characters of a role, at least: student-, 7 of its name, a digest


def score(
    script: str,
    *args: str,
    j: str = "1x2",
    name: str = "exfm-score",
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """A scoring job: a teacher's outputs for examples of its students, into a teacher store.

    The script calls torchrec_exfm.das.score. It goes on where it was killed, so that retries lose
    little. Arguments for the script follow after a "--".

    Args:
        script: path that ends in .py, or a dotted module name, as it is found where the job runs
        args: arguments of the script, after a "--"
        j: {nodes}x{nproc}, the nodes and the ranks on each of them
        name: name of the job
        image: container image with torchrec_exfm and the script; needed on kubernetes
        h: a registered named resource, in place of cpu, gpu and memMB
        cpu: CPUs of each node
        gpu: GPUs of each node
        memMB: host memory of each node in MB
        env: environment variables of the job (NAME=value,OTHER=value)
        mounts: mounts into the container (type=<bind/volume/device>,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler starts a failed job again; local_cwd never does
        rdzv_port: port on the first node where several nodes meet; a single one takes a free port
    """
    return _app(
        name,
        script,
        {"score": args},
        j=j,
        image=image,
        resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
        env=env,
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def train(
    script: str,
    *args: str,
    students: Optional[List[str]] = None,
    j: str = "1x2",
    name: str = "exfm-train",
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Students that learn from a teacher store: one, or several side by side in one job.

    Each of the students is a role of its own, of one node, whose script gets --student NAME before
    its other arguments. The job fails if one of them does. Without students, the script is one
    role on any number of nodes. Arguments for the script follow after a "--".

    Args:
        script: path that ends in .py, or a dotted module name, as it is found where the job runs
        args: arguments of the script, after a "--"
        students: names of the students (A,B,C), each a role
        j: {nodes}x{nproc}, the nodes of a role and the ranks on each of them
        name: name of the job
        image: container image with torchrec_exfm and the script; needed on kubernetes
        h: a registered named resource, in place of cpu, gpu and memMB
        cpu: CPUs of each node
        gpu: GPUs of each node
        memMB: host memory of each node in MB
        env: environment variables of the job (NAME=value,OTHER=value)
        mounts: mounts into the container (type=<bind/volume/device>,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler starts a failed job again; local_cwd never does
        rdzv_port: port on the first node where several nodes meet; a single one takes a free port
    """
    by_role = {"train": args}
    if students:
        _check_one_node(j)
        by_role = _of_students(name, students, args)
    return _app(
        name,
        script,
        by_role,
        j=j,
        image=image,
        resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
        env=env,
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )


def stream(
    script: str,
    *args: str,
    students: List[str],
    scorer: bool = True,
    j: str = "1x2",
    name: str = "exfm-stream",
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """A teacher, its scorer and its students, side by side, window by window through a stream.

    Each is a role of its own, of one node, whose script gets --role teacher, --role scorer, or
    --role student --student NAME before its other arguments, and goes on where it was killed. They
    meet only in the teacher store (torchrec_exfm.das.train_teacher, score_windows and
    wait_for_outputs), so that each may run as a job of its own as well. Arguments for the script
    follow after a "--".

    Args:
        script: path that ends in .py, or a dotted module name, as it is found where the job runs
        args: arguments of the script, after a "--"
        students: names of the students (A,B,C), each a role
        scorer: False where the teacher logs the outputs of all that the students train on
        j: 1x{nproc}, the ranks of a role
        name: name of the job
        image: container image with torchrec_exfm and the script; needed on kubernetes
        h: a registered named resource, in place of cpu, gpu and memMB
        cpu: CPUs of each role
        gpu: GPUs of each role
        memMB: host memory of each role in MB
        env: environment variables of the job (NAME=value,OTHER=value)
        mounts: mounts into the container (type=<bind/volume/device>,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler starts a failed job again; local_cwd never does
    """
    _check_one_node(j)
    by_role = {"teacher": ("--role", "teacher", *args)}
    if scorer:
        by_role["scorer"] = ("--role", "scorer", *args)
    by_role.update(_of_students(name, students, args, "--role", "student"))
    return _app(
        name,
        script,
        by_role,
        j=j,
        image=image,
        resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
        env=env,
        mounts=mounts,
        max_retries=max_retries,
    )


def _check_one_node(j: str) -> None:
    # Schedulers tell the address of the first role's first node, and of no other role's.
    if _nodes_and_ranks(j)[0] > 1:
        raise ValueError(
            f"with students, j should be 1x{{nproc}}: each is a role of one node. Received: {j}. "
            "For a student on several nodes, run train once for it, without students"
        )


def _of_students(
    app: str, students: Sequence[str], args: Sequence[str], *before: str
) -> Dict[str, Tuple[str, ...]]:
    """The arguments of each student's role, by its name."""
    longest = max(_POD - len("0") - len(_label(app, _POD)), _ROLE) - len("student-")
    by_role = {
        f"student-{_label(student, longest)}": (*before, "--student", student, *args)
        for student in students
    }
    if not all(students) or len(by_role) < max(len(students), 1):
        raise ValueError(
            "students should have names that differ in letters and digits. Received: "
            f"{', '.join(students) or 'none'}. Write --students A,B"
        )
    return by_role


def _app(
    name: str, script: str, by_role: Dict[str, Tuple[str, ...]], **options: Any
) -> specs.AppDef:
    """Roles that run the same script, each with arguments of its own."""
    roles = [_role(role, script, args, **options) for role, args in by_role.items()]
    last = max(role.num_replicas for role in roles) - 1
    longest = _POD - len(str(last)) - max(map(len, by_role))
    # A service is named after the job, and may not begin with a digit.
    name = name if name[:1].isalpha() and name.isascii() else f"exfm-{name}"
    return specs.AppDef(name=_label(name, longest), roles=roles)


def _role(
    name: str,
    script: str,
    args: Sequence[str],
    *,
    j: str,
    image: str,
    resource: specs.Resource,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
    max_retries: int,
    rdzv_port: int = 29500,
) -> specs.Role:
    """A role that runs the script under torchrun, with the options of `dist.ddp`."""
    nodes, ranks = _nodes_and_ranks(j)
    command = ["--rdzv_backend", "c10d", "--rdzv_id", specs.macros.app_id]
    command += ["--nnodes", str(nodes), "--nproc_per_node", str(ranks), "--tee", "3", "--role", ""]
    command += [*_program(script), *args]
    if nodes == 1:
        entrypoint, command = "torchrun", ["--rdzv_endpoint", "localhost:0", *command]
    else:
        # The first node stands in a variable that the scheduler names (Kubernetes after the role,
        # which has to be a word), and only where the job runs: that takes a shell. All the rest
        # is its "$@", and needs no quotes.
        first_node = f"$${{{specs.macros.rank0_env}:-localhost}}:{rdzv_port}"
        line = f'exec torchrun --rdzv_endpoint "{first_node}" "$@"'
        entrypoint, command = "bash", ["-c", line, "torchrun", *command]
    return specs.Role(
        name=name,
        image=image,
        entrypoint=entrypoint,
        args=command,
        num_replicas=nodes,
        resource=resource,
        env=dict(env or {}),
        mounts=specs.parse_mounts(mounts or []),
        max_retries=max_retries,
        port_map={"c10d": rdzv_port},
    )


def _nodes_and_ranks(j: str) -> Tuple[int, int]:
    """Both numbers of `j`, at least 1."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", j)
    if found is None:
        raise ValueError(
            f"j should be {{nodes}}x{{nproc}}, both at least 1. Received: {j}. "
            "Write -j 1x2 for two ranks on one node, -j 2x8 for eight on each of two"
        )
    return int(found[1]), int(found[2])


def _program(script: str) -> List[str]:
    """What torchrun runs: a file, or a module."""
    if script.endswith(".py"):
        return [script]
    if "." in script and all(part.isidentifier() for part in script.split(".")):
        return ["-m", script]
    raise ValueError(
        "script should be a path that ends in .py or a dotted module name. "
        f"Received: {script}. Write --script jobs/score.py or --script jobs.score"
    )


def _label(name: str, longest: int) -> str:
    """A name that every scheduler takes: small letters, digits and "-" (RFC 1123).

    A digest tells it from others where letters are lost or it is cut.
    """
    label = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if label and name.isascii() and len(label) <= longest:
        return label
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{label[: longest - 9]}-{digest}".lstrip("-").replace("--", "-")
