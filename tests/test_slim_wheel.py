"""The wheel for one GPU architecture, for a machine without a network."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def image(slim_wheel: ModuleType, architecture: int, code: bytes) -> bytes:
    header = slim_wheel.IMAGE.pack(2, 1, slim_wheel.IMAGE.size + 8, len(code), architecture)
    return header + bytes(8) + code


def library(slim_wheel: ModuleType) -> bytes:
    """Build host code around two bundles of device code, for architectures 80 and 90."""
    images = image(slim_wheel, 80, b"for 80..") + image(slim_wheel, 90, b"for 90..")
    bundle = slim_wheel.FATBIN.pack(0xBA55ED50, 1, slim_wheel.FATBIN.size, len(images)) + images
    return b"host" + bundle + b"code" + bundle + b"end"


def reduced(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / "slim_wheel.py"
    command = [sys.executable, str(script), str(folder / "a-1-py3-none-any.whl"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def slim_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import slim_wheel

    files = {"a/one.so": library(slim_wheel), "a/no_device.so": b"host", "a/__init__.py": b"# a"}
    lines = [slim_wheel.record(name, bytearray(content)) + "\n" for name, content in files.items()]
    files["a-1.dist-info/METADATA"] = b"Metadata-Version: 2.1\nName: a\nVersion: 1\n"
    files["a-1.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files["a-1.dist-info/RECORD"] = ("".join(lines) + "a-1.dist-info/RECORD,,\n").encode()
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return slim_wheel


@pytest.mark.parametrize(
    ("arguments", "removed"),
    [((), [b"for 80.."]), (("--without", "one.so"), [b"for 80..", b"for 90.."])],
)
def test_a_slim_wheel_installs(
    slim_wheel: ModuleType, tmp_path: Path, arguments: tuple[str, ...], removed: list[bytes]
) -> None:
    result = reduced(tmp_path, "slim", "--arch", "90", *arguments)
    assert result.returncode == 0, result.stderr
    expected = library(slim_wheel)
    for code in removed:
        expected = expected.replace(code, bytes(len(code)))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    wheel = str(tmp_path / "slim" / "a-1-py3-none-any.whl")
    subprocess.run([*pip, "--target", str(tmp_path / "site"), wheel], check=True)
    assert (tmp_path / "site" / "a" / "one.so").read_bytes() == expected
    assert (tmp_path / "site" / "a" / "no_device.so").read_bytes() == b"host"
    recorded = (tmp_path / "site" / "a-1.dist-info" / "RECORD").read_text()
    assert slim_wheel.record("a/one.so", bytearray(expected)) in recorded


def test_an_architecture_that_a_wheel_lacks_is_refused(
    slim_wheel: ModuleType, tmp_path: Path
) -> None:
    result = reduced(tmp_path, "slim", "--arch", "70")
    assert result.returncode == 1
    assert "--arch should be of [80, 90], which a/one.so has; received 70" in result.stderr


def test_a_wheel_is_not_overwritten(slim_wheel: ModuleType, tmp_path: Path) -> None:
    result = reduced(tmp_path, ".")
    assert result.returncode == 2 and "FOLDER should be another" in result.stderr
