"""A check, from metadata alone, that the installed torch, FBGEMM and TorchRec fit each other.

FBGEMM 1.n is compiled against torch 2.(n+5), but its wheels do not tell pip so. The packages
fbgemm-gpu and fbgemm-gpu-cpu unpack into the same folder, and torchrec accepts any fbgemm-gpu. A
set that does not fit fails only at import, with an undefined symbol. Nothing here imports torch, so
this check comes first. A TorchRec that was not tried may well work, so it is only a warning.

As a script, ``python -I torchrec_exfm/_versions.py`` prints what is wrong and exits with 1.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata, util

UNKNOWN = "unknown"  # importable without metadata, such as a nightly by another name
GONE = "gone"  # metadata without files, such as FBGEMM after its twin was uninstalled
_TWINS = ("fbgemm-gpu", "fbgemm-gpu-cpu")
_TORCHREC_NEEDS = ("tensordict", "torchmetrics", "tqdm", "pyre-extensions")
_NAMES = ("torch", *_TWINS, "torchrec", *_TORCHREC_NEEDS, "iopath")
_TRIED = ((1, 6), (1, 7), (1, 8), (1, 9))
_TRIED_RANGE = f"torchrec 1.{_TRIED[0][1]} to 1.{_TRIED[-1][1]}"
_LAST_TORCHREC_THAT_NEEDS_IOPATH = 7
_PINS = {"torchmetrics": "torchmetrics==1.0.3"}
_TESTED_MINOR = 8
_NEWEST_FBGEMM_MINOR = 9


def check() -> None:
    """Raise an ImportError for versions that can't work together; warn of an untried TorchRec."""
    versions = installed()
    wrong, untried = explain(versions), doubt(versions)
    if wrong is not None:
        raise ImportError(wrong)
    if untried is not None:
        # Imported here, as the file run as a script (python -I) can't import the package.
        from torchrec_exfm._warnings import ExFMWarning

        warnings.warn(untried, ExFMWarning, stacklevel=3)  # the line with the import


def installed() -> dict[str, str]:
    """Return the installed versions by distribution name, UNKNOWN and GONE among them."""
    modules = {name: name.removesuffix("-cpu").replace("-", "_") for name in _NAMES}
    versions: dict[str, str] = {}
    for name, module in modules.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            versions[name] = version if _is_importable(module) else GONE
    seen = {modules[name] for name in versions}
    for name, module in modules.items():
        if module not in seen and _is_importable(module):
            seen.add(module)
            versions[name] = UNKNOWN
    return versions


def explain(versions: Mapping[str, str]) -> str | None:
    """Return one sentence on what does not fit and what to install, or None if all fits.

    Only known misfits are refused: nightlies, source builds and pairs of releases newer than this
    file pass, unless FBGEMM was built for another torch.
    """
    wrong = _about_torch(versions) or _about_fbgemm(versions) or _about_torchrec(versions)
    return None if wrong is None else f"torchrec_exfm {wrong}."


def doubt(versions: Mapping[str, str]) -> str | None:
    """Return one sentence on a TorchRec that was not tried, or None for one that was."""
    torchrec = versions.get("torchrec", GONE)
    if torchrec == GONE or _release(torchrec) in _TRIED:
        return None
    return (
        f"torchrec_exfm was tried with {_TRIED_RANGE}, and goes on with version {torchrec}: "
        "if that fails, install one of these with `pip install --no-deps`."
    )


def _about_torch(versions: Mapping[str, str]) -> str | None:
    if versions.get("torch", GONE) != GONE:
        return None
    return (
        "needs torch, FBGEMM and torchrec, and found no torch: "
        f"run {_pip_pair('fbgemm-gpu', _TESTED_MINOR)} (fbgemm-gpu-cpu without CUDA), "
        f"then {_pip_torchrec(_TESTED_MINOR)}"
    )


def _about_fbgemm(versions: Mapping[str, str]) -> str | None:
    torch = versions["torch"]
    twins = [name for name in _TWINS if name in versions]
    if not twins:
        return f"needs FBGEMM beside torch {torch}, and found none: {_install_fbgemm(torch)}"
    if GONE in (versions[name] for name in twins):
        return (
            f"found the metadata of {' and '.join(twins)} without the files: "
            f"{_replace_fbgemm(twins, torch)}"
        )
    if len(twins) == 2 and not _is_cpu_build("fbgemm-gpu", versions["fbgemm-gpu"]):
        both = " and ".join(f"{name} {versions[name]}" for name in twins)
        return f"found both {both}, which overwrite each other: {_replace_fbgemm(twins, torch)}"
    name = twins[-1]
    fbgemm = versions[name]
    built_for = _torch_minor_of(fbgemm)
    major, minor = _release(torch)
    if built_for is not None and major == 2 and minor != built_for:
        return (
            f"found torch {torch} with {name} {fbgemm}, which is built for torch 2.{built_for}: "
            f"{_replace_fbgemm([name], torch)}"
        )
    return _about_cuda(torch, name, fbgemm)


def _about_cuda(torch: str, name: str, fbgemm: str) -> str | None:
    if fbgemm == UNKNOWN or _is_cpu_build(name, fbgemm):
        return None
    if _local(torch) == "cpu":
        return (
            f"found {name} {fbgemm}, which needs CUDA, with torch {torch}, which has none: "
            f"{_replace_fbgemm([name], torch)}"
        )
    built_for_cuda_13 = _release(fbgemm) >= (1, 6) and not _local(fbgemm)
    if built_for_cuda_13 and re.match("cu1[12]", _local(torch)):
        return (
            f"found torch {torch} with {name} {fbgemm}, which is built for CUDA 13: "
            f"install a torch for CUDA 13, or an FBGEMM for {_local(torch)}"
        )
    return None


def _about_torchrec(versions: Mapping[str, str]) -> str | None:
    torchrec = versions.get("torchrec", GONE)
    if torchrec == GONE:
        fbgemm_minor = max(_release(versions.get(name, GONE)) for name in _TWINS)[1]
        return (
            f"needs {_TRIED_RANGE}, and found none: run {_pip_torchrec(fbgemm_minor)}, "
            "as without --no-deps pip may bring another FBGEMM"
        )
    if _release(torchrec) not in _TRIED:  # its requirements are unknown
        return None
    needs_iopath = _release(torchrec)[1] <= _LAST_TORCHREC_THAT_NEEDS_IOPATH
    needs = (*_TORCHREC_NEEDS, "iopath") if needs_iopath else _TORCHREC_NEEDS
    missing = [name for name in needs if versions.get(name, GONE) == GONE]
    if missing:
        command = _pip(*(_PINS.get(name, name) for name in missing))
        return f"found torchrec {torchrec} without {', '.join(missing)}: run {command}"
    return None


def _is_importable(module: str) -> bool:
    if module in sys.modules:
        return True
    spec = util.find_spec(module)
    return spec is not None and spec.origin is not None


def _release(version: str) -> tuple[int, int]:
    """Return (major, minor), or (-1, -1) if the version does not begin with two numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def _local(version: str) -> str:
    return version.partition("+")[2]


def _is_cpu_build(name: str, version: str) -> bool:
    return name == "fbgemm-gpu-cpu" or _local(version).startswith("cpu")


def _torch_minor_of(fbgemm: str) -> int | None:
    """Return n if this FBGEMM is a release built for torch 2.n, None if that is unknown."""
    major, minor = _release(fbgemm)
    if re.search(r"\.dev|\+git", fbgemm):
        return None
    return {0: minor - 4, 1: minor + 5}.get(major)


def _install_fbgemm(torch: str) -> str:
    """Return the command that installs the FBGEMM for this torch, or a torch that has one."""
    major, torch_minor = _release(torch)
    minor = torch_minor - 5
    name = "fbgemm-gpu-cpu" if _local(torch) == "cpu" else "fbgemm-gpu"
    without_cuda = "" if name == "fbgemm-gpu-cpu" else " (fbgemm-gpu-cpu without CUDA)"
    if major == 2 and 0 <= minor <= _NEWEST_FBGEMM_MINOR:
        command = _pip(f"{name}==1.{minor}.*")
        return f"run {command}{without_cuda}, which goes with torch 2.{torch_minor}"
    command = _pip_pair(name, _NEWEST_FBGEMM_MINOR)
    return f"run {command}{without_cuda}, as no FBGEMM is known for torch {torch}"


def _replace_fbgemm(names: list[str], torch: str) -> str:
    return f"run `pip uninstall -y {' '.join(names)}`, then {_install_fbgemm(torch)}"


def _pip_torchrec(fbgemm_minor: int) -> str:
    minor = fbgemm_minor if (1, fbgemm_minor) in _TRIED else _TESTED_MINOR
    return _pip("--no-deps", f"torchrec==1.{minor}.*")


def _pip_pair(fbgemm: str, minor: int) -> str:
    return _pip(f"torch==2.{minor + 5}.*", f"{fbgemm}==1.{minor}.*")


def _pip(*arguments: str) -> str:
    quoted = (f'"{argument}"' if "=" in argument else argument for argument in arguments)
    return f"`pip install {' '.join(quoted)}`"


if __name__ == "__main__":
    sys.exit(explain(installed()))
