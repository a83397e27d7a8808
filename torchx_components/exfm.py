"""TorchX components for the jobs of external distillation: scoring, students, whole streams.

To run one on this machine::

    torchx run -s local_cwd torchx_components/exfm.py:score -j 1x2 --script score.py -- --store out

Each component is a function that returns an ``AppDef``. Its roles run ``torchrun`` from the PATH;
this package is imported only by the script. TorchX derives the options and the help from signatures
and docstrings.
"""

import hashlib
import re

# TorchX 0.7 reads the types of options in this spelling alone: no list[str] | None.
from typing import Any, Dict, List, Optional, Sequence, Tuple

from torchx import specs

# Kubernetes limits the name of a pod to 63 characters, and Volcano names pods
# {name}-{id of up to 14}-{role}-{replica}-0. These are left for name, role and replica.
_POD_CHARACTERS = 63 - len("--") - 14 - len("-") - len("-0")
_MIN_ROLE_CHARACTERS = 24  # "student-", 7 of the student's name, a digest


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
    """Score the examples of students with their teacher, into a teacher store.

    The script calls torchrec_exfm.das.score, which resumes where it was killed, so that a retry
    repeats little work. Arguments of the script follow after a "--".

    Args:
        script: path of a .py file, or a dotted module name, as seen where the job runs
        args: arguments of the script, after a "--"
        j: {nodes}x{nproc}, the number of nodes, and of ranks on each
        name: name of the job
        image: container image with torchrec_exfm and the script; required on kubernetes
        h: name of a registered resource, used instead of cpu, gpu and memMB
        cpu: CPUs of each node
        gpu: GPUs of each node
        memMB: host memory of each node in MB
        env: environment variables of the job (NAME=value,OTHER=value)
        mounts: mounts into the container (type=<bind/volume/device>,src=/host,dst=/job[,readonly])
        max_retries: how many times the scheduler restarts a failed job; local_cwd never does
        rdzv_port: port of the first node, where several nodes meet; one node takes a free port
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
    """Train one student from a teacher store, or several side by side in one job.

    With --students, each student is a role of one node. Its script gets --student NAME before the
    other arguments. The job fails if one of the students does. Without --students, the script is a
    single role on any number of nodes. Arguments of the script follow after a "--".

    Args:
        script: path of a .py file, or a dotted module name, as seen where the job runs
        args: arguments of the script, after a "--"
        students: names of the students (A,B,C); each becomes a role
        j: {nodes}x{nproc}, the number of nodes, and of ranks on each; 1x{nproc} with students
        name: name of the job
        image: container image with torchrec_exfm and the script; required on kubernetes
        h: name of a registered resource, used instead of cpu, gpu and memMB
        cpu: CPUs of each node
        gpu: GPUs of each node
        memMB: host memory of each node in MB
        env: environment variables of the job (NAME=value,OTHER=value)
        mounts: mounts into the container (type=<bind/volume/device>,src=/host,dst=/job[,readonly])
        max_retries: how many times the scheduler restarts a failed job; local_cwd never does
        rdzv_port: port of the first node, where several nodes meet; one node takes a free port
    """
    by_role = {"train": args}
    if students:
        _check_one_node(j)
        by_role = _student_args(name, students, args)
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
    """Run a teacher, its scorer and its students side by side, window by window.

    Each is a role of one node. Its script gets --role teacher, --role scorer, or --role student
    --student NAME before the other arguments, and should resume where it was killed. The roles meet
    only in the teacher store (torchrec_exfm.das.train_teacher, score_windows, wait_for_outputs), so
    each can also run as a job of its own. Arguments of the script follow after a "--".

    Args:
        script: path of a .py file, or a dotted module name, as seen where the job runs
        args: arguments of the script, after a "--"
        students: names of the students (A,B,C); each becomes a role
        scorer: False if the teacher itself logs outputs for all of the students' examples
        j: 1x{nproc}, with the number of ranks of each role
        name: name of the job
        image: container image with torchrec_exfm and the script; required on kubernetes
        h: name of a registered resource, used instead of cpu, gpu and memMB
        cpu: CPUs of each role
        gpu: GPUs of each role
        memMB: host memory of each role in MB
        env: environment variables of the job (NAME=value,OTHER=value)
        mounts: mounts into the container (type=<bind/volume/device>,src=/host,dst=/job[,readonly])
        max_retries: how many times the scheduler restarts a failed job; local_cwd never does
    """
    _check_one_node(j)
    by_role = {"teacher": ("--role", "teacher", *args)}
    if scorer:
        by_role["scorer"] = ("--role", "scorer", *args)
    by_role.update(_student_args(name, students, args, "--role", "student"))
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
    """Raise unless every role has one node."""
    # Ranks of several nodes meet on the first one, and schedulers give a job the address of the
    # first role's first node only.
    if _nodes_and_ranks(j)[0] > 1:
        raise ValueError(
            f"with students, j should be 1x{{nproc}}: each is a role of one node. Received: {j}. "
            "For a student on several nodes, run a train job for it alone, without --students"
        )


def _student_args(
    job_name: str, students: Sequence[str], args: Sequence[str], *role_args: str
) -> Dict[str, Tuple[str, ...]]:
    """Return the arguments of each student's script by the name of its role."""
    job_characters = len(_label(job_name, _POD_CHARACTERS))
    role_characters = max(_POD_CHARACTERS - len("0") - job_characters, _MIN_ROLE_CHARACTERS)
    by_role = {
        f"student-{_label(student, role_characters - len('student-'))}": (
            *role_args,
            *("--student", student),
            *args,
        )
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
    """Return a job whose roles run the same script, each with its own arguments."""
    roles = [_role(role, script, args, **options) for role, args in by_role.items()]
    last_replica = max(role.num_replicas for role in roles) - 1
    max_characters = _POD_CHARACTERS - len(str(last_replica)) - max(map(len, by_role))
    # Volcano names a service after the job, and the name of a service may not begin with a digit.
    name = name if name[:1].isalpha() and name.isascii() else f"exfm-{name}"
    return specs.AppDef(name=_label(name, max_characters), roles=roles)


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
    """Return a role that runs the script under torchrun, with the options of `dist.ddp`."""
    nodes, ranks = _nodes_and_ranks(j)
    command = ["--rdzv_backend", "c10d", "--rdzv_id", specs.macros.app_id]
    command += ["--nnodes", str(nodes), "--nproc_per_node", str(ranks), "--tee", "3", "--role", ""]
    command += [*_program(script), *args]
    if nodes == 1:
        entrypoint, command = "torchrun", ["--rdzv_endpoint", "localhost:0", *command]
    else:
        # Only a shell where the job runs can read the address of the first node: it is in an
        # environment variable, whose name depends on the scheduler (on Kubernetes it contains the
        # name of the role, here one word). The other arguments go through "$@", so that none
        # needs quotes.
        first_node = f"$${{{specs.macros.rank0_env}:-localhost}}:{rdzv_port}"
        shell_line = f'exec torchrun --rdzv_endpoint "{first_node}" "$@"'
        entrypoint, command = "bash", ["-c", shell_line, "torchrun", *command]
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
    """Return both numbers of `j`; raise unless they are at least 1."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", j)
    if match is None:
        raise ValueError(
            f"j should be {{nodes}}x{{nproc}}, both at least 1. Received: {j}. "
            "Write -j 1x2 for two ranks on one node, -j 2x8 for eight on each of two"
        )
    return int(match[1]), int(match[2])


def _program(script: str) -> List[str]:
    """Return the arguments by which torchrun finds the script: a file, or a module."""
    if script.endswith(".py"):
        return [script]
    if "." in script and all(part.isidentifier() for part in script.split(".")):
        return ["-m", script]
    raise ValueError(
        "script should be a path that ends in .py or a dotted module name. "
        f"Received: {script}. Write --script jobs/score.py or --script jobs.score"
    )


def _label(name: str, max_characters: int) -> str:
    """Return a name that all schedulers accept: lowercase letters, digits and "-" (RFC 1123).

    If the name is cut or loses letters that are not ASCII, a digest keeps it distinct.
    """
    label = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if label and name.isascii() and len(label) <= max_characters:
        return label
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{label[: max_characters - 9]}-{digest}".lstrip("-").replace("--", "-")
