"""The import guard: versions of torch, FBGEMM and TorchRec that it refuses or warns of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_exfm._versions import GONE, UNKNOWN, doubt, explain

ROOT = Path(__file__).parents[1]
TORCHREC_NEEDS = {
    "tensordict": "0.15.3",
    "torchmetrics": "1.0.3",
    "tqdm": "4.70.1",
    "pyre-extensions": "0.0.32",
}
CPU = {
    "torch": "2.13.0+cpu",
    "fbgemm-gpu-cpu": "1.8.0",
    "torchrec": "1.8.0",
    **TORCHREC_NEEDS,
}
CUDA = {
    "torch": "2.13.0",
    "fbgemm-gpu": "1.8.0",
    "torchrec": "1.8.0",
    **TORCHREC_NEEDS,
}


IN_ONE_SENTENCE = r"torchrec_exfm (?:(?!\.\s).)+\."


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


@pytest.mark.parametrize(
    "versions",
    [
        pytest.param(CPU, id="cpu"),
        pytest.param(CUDA, id="cuda"),
        pytest.param(
            {
                **CUDA,
                "torch": "2.11.0",
                "fbgemm-gpu": "1.6.0",
                "torchrec": "1.6.1",
                "iopath": "0.1.10",
            },
            id="oldest",
        ),
        pytest.param(
            {**CUDA, "torch": "2.12.1", "fbgemm-gpu": "1.7.0", "torchrec": "1.8.0"},
            id="torchrec of another minor than FBGEMM",
        ),
        pytest.param(
            {**CUDA, "torch": "2.14.1", "fbgemm-gpu": "1.9.0", "torchrec": "1.9.2"}, id="newest"
        ),
        pytest.param({**CUDA, "torch": "2.15.0", "fbgemm-gpu": "1.10.0"}, id="newer than known"),
        pytest.param({**CUDA, "torch": "2.13.0+cu130"}, id="torch for CUDA 13"),
        pytest.param(
            {**CUDA, "torch": "2.13.0+cu126", "fbgemm-gpu": "1.8.0+cu126"}, id="both for CUDA 12"
        ),
        pytest.param({**CUDA, "torch": "2.13.0+cpu", "fbgemm-gpu": "1.8.0+cpu"}, id="cpu by tag"),
        pytest.param(
            {**CPU, "fbgemm-gpu": "1.8.0+cpu.shim"}, id="empty stand-in beside the CPU one"
        ),
        pytest.param({**CPU, "torch": "2.13.0"}, id="CPU FBGEMM with a CUDA torch"),
        pytest.param(
            {**CUDA, "torch": "2.16.0.dev20261101", "fbgemm-gpu": UNKNOWN, "torchrec": UNKNOWN},
            id="nightlies under names of their own",
        ),
        pytest.param({**CUDA, "fbgemm-gpu": "2026.10.16", "torchrec": "2026.10.16"}, id="dates"),
        pytest.param({**CUDA, "fbgemm-gpu": "1.9.0.dev3+git0123abc"}, id="FBGEMM from source"),
        pytest.param({**CUDA, "torch": UNKNOWN}, id="torch without metadata"),
    ],
)
def test_what_fits_or_may_fit_is_not_refused(versions: dict[str, str]) -> None:
    assert explain(versions) is None


@given(
    major=st.integers(0, 3) | st.integers(2026, 2030),
    minor=st.integers(0, 20),
    rest=st.sampled_from(
        ["", ".0", ".2", ".0rc1", ".0.dev20261101", ".1+cu130", ".0a0+git0123abc"]
    ),
)
def test_a_torchrec_that_was_not_tried_is_doubted_and_not_refused(
    major: int, minor: int, rest: str
) -> None:
    version = f"{major}.{minor}{rest}"
    versions = {**CPU, "torchrec": version, "iopath": "0.1.10"}

    assert explain(versions) is None
    if (1, 6) <= (major, minor) <= (1, 9):
        assert doubt(versions) is None
    else:
        sentence = doubt(versions)
        assert sentence is not None and re.fullmatch(IN_ONE_SENTENCE, sentence)
        assert f"tried with torchrec 1.6 to 1.9, and goes on with version {version}:" in sentence


def test_a_torchrec_without_metadata_is_doubted_and_not_refused() -> None:
    sentence = doubt({**CPU, "torchrec": UNKNOWN})

    assert explain({**CPU, "torchrec": UNKNOWN}) is None
    assert sentence is not None and "goes on with version unknown:" in sentence


def test_nothing_is_asked_for_that_an_untried_torchrec_may_not_need() -> None:
    assert explain({**without(CPU, *TORCHREC_NEEDS), "torchrec": "1.10.0"}) is None


def test_an_untried_torchrec_excuses_no_fbgemm_of_another_torch() -> None:
    sentence = explain({**CUDA, "fbgemm-gpu": "1.9.0", "torchrec": "1.10.0"})

    assert sentence is not None and "built for torch 2.14" in sentence


@pytest.mark.parametrize(
    ("versions", "parts"),
    [
        pytest.param(
            {},
            [
                "found no torch",
                '"torch==2.13.*" "fbgemm-gpu==1.8.*"',
                '--no-deps "torchrec==1.8.*"',
            ],
            id="nothing",
        ),
        pytest.param(without(CPU, "torch"), ["found no torch"], id="no torch"),
        pytest.param(
            without(CPU, "fbgemm-gpu-cpu"),
            ["needs FBGEMM beside torch 2.13.0+cpu", 'run `pip install "fbgemm-gpu-cpu==1.8.*"`'],
            id="no FBGEMM, torch without CUDA",
        ),
        pytest.param(
            {**without(CUDA, "fbgemm-gpu"), "torch": "2.11.0"},
            ['run `pip install "fbgemm-gpu==1.6.*"` (fbgemm-gpu-cpu without CUDA)'],
            id="no FBGEMM, torch with CUDA",
        ),
        pytest.param(
            {**without(CUDA, "fbgemm-gpu"), "torch": "2.15.0"},
            ["no FBGEMM is known for torch 2.15.0", '"torch==2.14.*" "fbgemm-gpu==1.9.*"'],
            id="no FBGEMM, torch newer than known",
        ),
        pytest.param(
            {**CPU, "fbgemm-gpu": "1.9.0"},
            [
                "found both fbgemm-gpu 1.9.0 and fbgemm-gpu-cpu 1.8.0",
                "run `pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu`",
                'then run `pip install "fbgemm-gpu-cpu==1.8.*"`',
            ],
            id="both FBGEMMs",
        ),
        pytest.param(
            {**CPU, "fbgemm-gpu-cpu": GONE},
            ["metadata of fbgemm-gpu-cpu without the files", "pip uninstall -y fbgemm-gpu-cpu"],
            id="FBGEMM without files",
        ),
        pytest.param(
            {**CUDA, "fbgemm-gpu": "1.9.0"},
            [
                "found torch 2.13.0 with fbgemm-gpu 1.9.0, which is built for torch 2.14",
                'run `pip install "fbgemm-gpu==1.8.*"`',
                "which goes with torch 2.13",
            ],
            id="FBGEMM one too new",
        ),
        pytest.param(
            {**CPU, "fbgemm-gpu-cpu": "1.7.0"},
            ["built for torch 2.12", 'run `pip install "fbgemm-gpu-cpu==1.8.*"`'],
            id="FBGEMM one too old",
        ),
        pytest.param(
            {**CUDA, "fbgemm-gpu": "0.8.0"}, ["built for torch 2.4"], id="FBGEMM before 1.0"
        ),
        pytest.param(
            {**CUDA, "torch": "2.15.0", "fbgemm-gpu": "1.9.0"},
            ["built for torch 2.14", '"torch==2.14.*" "fbgemm-gpu==1.9.*"'],
            id="torch that no FBGEMM is known for",
        ),
        pytest.param(
            {**CUDA, "torch": "2.13.0+cpu"},
            ["which needs CUDA", "pip uninstall -y fbgemm-gpu", '"fbgemm-gpu-cpu==1.8.*"'],
            id="CUDA FBGEMM with a CPU torch",
        ),
        pytest.param(
            {**CUDA, "torch": "2.13.0+cu126"},
            ["built for CUDA 13", "an FBGEMM for cu126"],
            id="CUDA 13 FBGEMM with a CUDA 12 torch",
        ),
        pytest.param(
            without(CPU, "torchrec"),
            ["needs torchrec 1.6 to 1.9", 'run `pip install --no-deps "torchrec==1.8.*"`'],
            id="no torchrec",
        ),
        pytest.param(
            {**without(CUDA, "torchrec"), "torch": "2.11.0", "fbgemm-gpu": "1.6.0"},
            ['run `pip install --no-deps "torchrec==1.6.*"`'],
            id="no torchrec, an older FBGEMM",
        ),
        pytest.param(
            {**CPU, "torchrec": "1.7.0"},
            ["found torchrec 1.7.0 without iopath: run `pip install iopath`"],
            id="torchrec 1.7 without iopath",
        ),
        pytest.param(
            without(CPU, "tensordict", "torchmetrics"),
            ["without tensordict, torchmetrics", 'tensordict "torchmetrics==1.0.3"`'],
            id="torchrec installed with --no-deps alone",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(
    versions: dict[str, str], parts: list[str]
) -> None:
    sentence = explain(versions)

    assert sentence is not None and re.fullmatch(IN_ONE_SENTENCE, sentence)
    for part in parts:
        assert part in sentence


def install_fake(site: Path, name: str, version: str, module: str | None) -> None:
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module is not None:
        (site / module).mkdir(exist_ok=True)
        (site / module / "__init__.py").write_text("raise AssertionError('must not be imported')\n")


def install_fakes(site: Path, fbgemm: str, torchrec: str) -> None:
    for name, version in {**CUDA, "fbgemm-gpu": fbgemm, "torchrec": torchrec}.items():
        install_fake(site, name, version, name.replace("-", "_"))


def run_with(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with only ``site`` installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def import_error(site: Path) -> str:
    """Return the last line of ``import torchrec_exfm`` with only ``site`` installed."""
    run = run_with(site, "-c", "import torchrec_exfm")
    assert run.returncode == 1
    return run.stderr.strip().splitlines()[-1]


def test_import_ends_in_the_sentence_rather_than_in_a_missing_symbol(tmp_path: Path) -> None:
    install_fake(tmp_path, "torch", "2.13.0", "torch")
    install_fake(tmp_path, "fbgemm-gpu", "1.9.0", "fbgemm_gpu")
    install_fake(tmp_path, "torchrec", "1.9.2", "torchrec")

    assert import_error(tmp_path) == (
        "ImportError: torchrec_exfm found torch 2.13.0 with fbgemm-gpu 1.9.0, which is built for "
        "torch 2.14: run `pip uninstall -y fbgemm-gpu`, then run "
        '`pip install "fbgemm-gpu==1.8.*"` (fbgemm-gpu-cpu without CUDA), '
        "which goes with torch 2.13."
    )


def test_import_warns_once_of_an_untried_torchrec_before_anything_is_loaded(tmp_path: Path) -> None:
    install_fakes(tmp_path, fbgemm="1.8.0", torchrec="1.10.0")

    stderr = run_with(tmp_path, "-c", "import torchrec_exfm").stderr

    assert stderr.startswith(
        "<string>:1: ExFMWarning: torchrec_exfm was tried with torchrec 1.6 to"
    )
    assert stderr.count("ExFMWarning") == 1
    assert stderr.endswith("AssertionError: must not be imported\n")


@pytest.mark.parametrize(
    ("warnings", "ends_in"),
    [
        ("ignore:torchrec_exfm was tried", "AssertionError: must not be imported"),
        ("error::RuntimeWarning", "and goes on with version 1.10.0"),
    ],
)
def test_the_warning_can_be_silenced_or_made_an_error(
    tmp_path: Path, warnings: str, ends_in: str
) -> None:
    install_fakes(tmp_path, fbgemm="1.8.0", torchrec="1.10.0")

    run = run_with(tmp_path, "-W", warnings, "-c", "import torchrec_exfm")

    assert ends_in in run.stderr.splitlines()[-1]
    assert ("ExFMWarning" in run.stderr) == warnings.startswith("error")


@pytest.mark.parametrize(
    ("fbgemm", "torchrec", "status"),
    [("1.8.0", "1.8.0", 0), ("1.8.0", "1.10.0", 0), ("1.9.0", "1.8.0", 1), ("1.9.0", "1.10.0", 1)],
)
def test_the_script_exits_with_1_only_for_what_cannot_load(
    tmp_path: Path, fbgemm: str, torchrec: str, status: int
) -> None:
    install_fakes(tmp_path, fbgemm=fbgemm, torchrec=torchrec)

    run = run_with(tmp_path, str(ROOT / "torchrec_exfm" / "_versions.py"))

    assert run.returncode == status
    assert bool(run.stderr) == bool(status)


def test_import_sees_an_fbgemm_whose_files_went_with_its_twin(tmp_path: Path) -> None:
    install_fake(tmp_path, "torch", "2.13.0+cpu", "torch")
    install_fake(tmp_path, "fbgemm-gpu-cpu", "1.8.0", None)
    install_fake(tmp_path, "torchrec", "1.8.0", "torchrec")
    (tmp_path / "fbgemm_gpu").mkdir()

    assert "found the metadata of fbgemm-gpu-cpu without the files" in import_error(tmp_path)


def test_import_without_torch_is_no_module_not_found_error(tmp_path: Path) -> None:
    assert import_error(tmp_path).startswith("ImportError: torchrec_exfm needs torch, FBGEMM and")


def test_import_lets_a_nightly_fbgemm_pass_on_to_the_next_question(tmp_path: Path) -> None:
    install_fake(tmp_path, "torch", "2.13.0", "torch")
    install_fake(tmp_path, "fbgemm-gpu-nightly", "2026.6.11", "fbgemm_gpu")

    assert "needs torchrec 1.6 to 1.9, and found none" in import_error(tmp_path)


def test_the_recipes_of_this_repository_fit() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    cpu, cuda = (
        dict(re.findall(r'"([a-z-]+)==([\d.]+)"', extra))
        for extra in re.findall(r"^(?:cpu|cuda) = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)
    )
    torchrec = dict(re.findall(r"^TORCHREC := (torchrec)==([\d.]+)$", makefile, re.MULTILINE))

    assert set(cuda) == {"torch", "fbgemm-gpu", "torchrec"}
    assert torchrec == {"torchrec": cuda["torchrec"]}
    assert explain({**TORCHREC_NEEDS, **cpu, **torchrec}) is None
    assert explain({**TORCHREC_NEEDS, **cuda}) is None
